"""Folders of jobs go with their jobs, those of dead workers with the next worker."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from engine.errors import OutputError
from engine.worker.endpoint import read_endpoint
from engine.worker.scratch import Scratch
from tests.support.permissions import bound_by_modes, shared_folder

ROOT = Path(__file__).resolve().parents[2]
WORKER = """
import sys, time
from pathlib import Path
from engine.worker.scratch import Scratch
with Scratch(Path(sys.argv[1])).job_folder() as folder:
    (folder / "clip.mp4").write_bytes(b"half")
    print(folder, flush=True)
    time.sleep(60)
"""


def started(root, count):
    """Workers that start at once, each with the folder of its job."""
    command = [sys.executable, "-c", WORKER, str(root)]
    processes = [
        subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) for _ in range(count)
    ]
    return [(process, Path(process.stdout.readline().strip())) for process in processes]


def test_what_a_killed_worker_left_goes_and_what_a_living_one_has_stays(tmp_path):
    root = tmp_path / "jobs"
    (dead, left), (living, held) = started(root, 2)
    dead.kill()
    dead.wait()
    assert (left / "clip.mp4").read_bytes() == b"half"
    (root / "worker-of-old").mkdir()  # killed before it had a lock
    scratch = Scratch(root)
    assert not left.parent.exists()
    assert not (root / "worker-of-old").exists()
    assert (held / "clip.mp4").read_bytes() == b"half"
    living.kill()
    living.wait()
    scratch.close()


def test_a_job_folder_is_private_and_gone_whatever_happens(tmp_path):
    scratch = Scratch(tmp_path / "jobs")
    with pytest.raises(ValueError, match="stop"), scratch.job_folder() as folder:
        assert folder.stat().st_mode & 0o777 == 0o700
        (folder / "deep" / "er").mkdir(parents=True)
        raise ValueError("stop")
    assert not folder.exists()
    assert scratch.free_bytes > 0
    scratch.close()
    assert sorted(path.name for path in (tmp_path / "jobs").iterdir()) == ["lock"]


def test_a_place_that_cannot_hold_folders_is_named(tmp_path):
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(OutputError, match="cannot hold the files of jobs"):
        Scratch(tmp_path / "file" / "jobs")


def gone(scratch):
    shutil.rmtree(scratch.folder)


def root_gone(scratch):
    shutil.rmtree(scratch.root)


def a_file_instead(scratch):
    gone(scratch)
    scratch.folder.write_bytes(b"x")


def a_link_instead(scratch):
    gone(scratch)
    (scratch.root / "elsewhere").mkdir()
    scratch.folder.symlink_to("elsewhere")


def a_dead_link_instead(scratch):
    gone(scratch)
    scratch.folder.symlink_to("nowhere")


def lock_gone(scratch):
    (scratch.folder / "lock").unlink()


def another_lock(scratch):
    lock_gone(scratch)
    (scratch.folder / "lock").write_bytes(b"")


def another_folder(scratch):
    gone(scratch)
    scratch.folder.mkdir()


def locks_gone(scratch):
    lock_gone(scratch)
    (scratch.root / "lock").unlink()


@pytest.mark.parametrize(
    "harm",
    [gone, root_gone, a_file_instead, a_link_instead, a_dead_link_instead, lock_gone, another_lock,
     another_folder, locks_gone],
)  # fmt: skip
@pytest.mark.parametrize("first", ["a job", "a look"])
def test_what_a_cleaner_took_is_made_anew_before_the_next_job(tmp_path, harm, first):
    root = tmp_path / "jobs"
    scratch = Scratch(root)
    harm(scratch)
    if first == "a look":
        scratch.check()
    with scratch.job_folder() as folder:
        (folder / "clip.mp4").write_bytes(b"half")
        assert folder.parent == scratch.folder
        assert not scratch.folder.is_symlink()
        (living, _), *_ = started(root, 1)  # a worker that starts sees that this one lives
        living.kill()
        living.wait()
        assert (folder / "clip.mp4").read_bytes() == b"half"
    scratch.close()
    assert not scratch.folder.exists()


def test_permissions_that_were_taken_come_back():
    with shared_folder() as folder:
        folder.chmod(0o777)
        with bound_by_modes():
            scratch = Scratch(folder / "jobs")
            for taken in (scratch.folder, scratch.root):
                taken.chmod(0)
                with scratch.job_folder() as made:
                    (made / "clip.mp4").write_bytes(b"x")
            scratch.check()
            scratch.close()


def test_a_place_that_is_lost_is_told_until_it_is_there_again(tmp_path):
    scratch = Scratch(tmp_path / "jobs")
    root_gone(scratch)
    scratch.root.write_bytes(b"in the way")
    for _ in range(2):
        with pytest.raises(OutputError, match=r"cannot hold the files of jobs: .*Set TMPDIR"):
            scratch.check()
        with pytest.raises(OutputError, match="no room for the job's files"), scratch.job_folder():
            pass
    scratch.root.unlink()
    scratch.check()
    with scratch.job_folder() as folder:
        assert folder.is_dir()
    scratch.close()


FULL = """
import resource, sys
from pathlib import Path
from engine.errors import OutputError
from engine.worker.endpoint import read_endpoint
from engine.worker.scratch import Scratch
scratch = Scratch(Path(sys.argv[1]))
scratch.check()
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
try:
    scratch.check()
except OutputError as error:
    print(error)
print([path.name for path in scratch.folder.iterdir()])
"""


def test_a_disk_without_room_is_told_and_nothing_of_the_look_is_left(tmp_path):
    command = [sys.executable, "-c", FULL, str(tmp_path / "jobs")]
    said = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert "cannot hold the files of jobs" in said
    assert said.endswith("['lock']\n")


def test_jobs_go_on_where_the_current_folder_was_removed(tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    scratch = Scratch(tmp_path / "jobs")
    monkeypatch.chdir(tmp_path / "here")
    (tmp_path / "here").rmdir()
    gone(scratch)
    with scratch.job_folder() as folder:
        assert folder.is_dir()
    scratch.close()


def test_workers_that_start_at_once_do_not_remove_each_other(tmp_path):
    running = started(tmp_path, 3)
    assert all((folder / "clip.mp4").exists() for _, folder in running)
    for process, _ in running:
        process.kill()
        process.wait()


def test_what_was_closed_is_not_made_anew_for_whoever_asks_late(tmp_path):
    scratch = Scratch(tmp_path / "jobs")
    scratch.close()
    for late in (scratch.check, scratch.job_folder().__enter__):
        with pytest.raises(OutputError, match="the worker ends"):
            late()
    scratch.close()
    assert [path.name for path in (tmp_path / "jobs").iterdir()] == ["lock"]


def test_the_folder_that_the_operator_names_is_made_and_no_other_is_taken(tmp_path, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(tmp_path / "a disk" / "of jobs"))
    root = read_endpoint().scratch
    assert root == tmp_path / "a disk" / "of jobs" / "scail-jobs"
    scratch = Scratch(root)
    assert root.is_dir()
    scratch.close()
