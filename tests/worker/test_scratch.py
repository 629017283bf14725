"""Folders of jobs go with their jobs, those of dead workers with the next worker."""

import subprocess
import sys
from pathlib import Path

import pytest

from engine.errors import OutputError
from engine.worker.scratch import Scratch

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


def test_workers_that_start_at_once_do_not_remove_each_other(tmp_path):
    running = started(tmp_path, 3)
    assert all((folder / "clip.mp4").exists() for _, folder in running)
    for process, _ in running:
        process.kill()
        process.wait()
