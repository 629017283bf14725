"""A build that is stopped, by whatever, leaves nothing that opens, and the next one goes on."""

import hashlib
import json
import logging
import os
import resource
import shutil
import signal
import subprocess
import sys
import traceback
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from engine.errors import BadPackage, BuildFailed
from engine.package.folder import PackageWriter, open_folder
from engine.package.search import find_packages
from kernels.arch import SM89
from tests.support.packages import MANIFEST, build, complete, facts, make, tensors
from tests.support.permissions import bound_by_modes, shared_folder


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The content of a package that an undisturbed build makes."""
    return content(build(tmp_path_factory.mktemp("whole") / "sm89"))


def content(folder):
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def partial(folder, groups, identity="a"):
    """A build that stopped after so many groups."""
    with PackageWriter(folder / "sm89", identity) as writer:
        for n in range(groups):
            writer.write(f"group {n}", lambda n=n: make(n))
    return folder / "sm89.partial"


def assert_nothing_opens(folder):
    assert find_packages(folder) == []
    for path in [folder / "sm89", *folder.glob("sm89*")]:
        with pytest.raises(BadPackage):
            open_folder(path)


def assert_goes_on(folder, whole, made):
    """The build started again makes only these groups, and the same bytes."""
    again = []
    home = build(folder / "sm89", made=again)
    assert again == made
    assert content(home) == whole
    assert [path.name for path in folder.iterdir()] == ["sm89"]
    open_folder(home, SM89).verify()


def in_a_process(work):
    """Does the work in a process. Returns how it ended, as `Popen` says it, and the result of
    `work`, or the traceback.
    """
    read, write = os.pipe()
    child = os.fork()
    if not child:
        code = 1
        try:
            os.write(write, str(work()).encode())
            code = 0
        finally:
            if code:
                os.write(write, traceback.format_exc().encode())
            os._exit(code)
    os.close(write)
    with os.fdopen(read) as told:
        text = told.read()
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), text


def kill():
    os.kill(os.getpid(), signal.SIGKILL)


# --- killed


def test_a_build_killed_in_the_middle_of_a_group_goes_on_with_the_same_bytes(tmp_path, whole):
    class Deadly(dict):
        def items(self):
            yield from [*super().items()][:3]
            kill()

    def work():
        with PackageWriter(tmp_path / "sm89", "a") as writer:
            writer.write("group 0", lambda: make(0))
            writer.write("group 1", lambda: (Deadly(tensors(1)), facts(1)))

    assert in_a_process(work) == (-signal.SIGKILL, "")
    left = (tmp_path / "sm89.partial" / "weights.bin").read_bytes()
    third = json.loads(whole["manifest.json"])["tensors"][len(tensors(0)) + 2]
    assert left == whole["weights.bin"][: third["offset"] + third["nbytes"]]
    assert_nothing_opens(tmp_path)
    assert_goes_on(tmp_path, whole, made=[1, 2])


@pytest.mark.parametrize("older", [False, True])
def test_a_build_killed_while_it_moves_into_its_place_leaves_one_package_or_none(
    tmp_path, whole, older
):
    if older:
        build(tmp_path / "sm89", groups=1, identity="older")

    def watch(event, arguments):
        if event == "os.rename" and str(arguments[0]).endswith(".partial"):
            kill()

    def work():
        sys.addaudithook(watch)
        build(tmp_path / "sm89")

    assert in_a_process(work) == (-signal.SIGKILL, "")
    assert (tmp_path / "sm89.partial" / "manifest.json").exists()
    with pytest.raises(BadPackage, match="unfinished build"):
        open_folder(tmp_path / "sm89.partial")
    assert find_packages(tmp_path) == []
    assert (tmp_path / "sm89.replaced").exists() == older
    assert_goes_on(tmp_path, whole, made=[])


def test_a_line_of_the_journal_that_was_cut_is_not_believed(tmp_path, whole):
    left = partial(tmp_path, groups=2)
    journal = (left / "journal").read_bytes()
    first, second = (len(part) for part in journal.splitlines(keepends=True)[1:])
    head = len(journal) - first - second
    for number, length in enumerate([
        len(journal), len(journal) - 1, len(journal) - 2, head + first + 1, head + first,
        head + first - 1, head + 1, head, head - 1, 1, 0,
    ]):  # fmt: skip
        folder = tmp_path / str(number)
        shutil.copytree(left, folder / "sm89.partial")
        os.truncate(folder / "sm89.partial" / "journal", length)
        kept = (length >= head + first) + (length >= len(journal))
        assert_goes_on(folder, whole, made=[0, 1, 2][kept:])


JUNK = {
    "zeros": bytes(3000),
    "text": b"{}\n",
    "a list": b"[]\n",
    "depth": b"[" * 10**5 + b"\n",
    "a negative place": b'{"group": "group 2", "tensors": [{"name": "x", "dtype": "int8", '
    b'"shape": [1], "offset": -256, "nbytes": 1, "sha256": ""}], "facts": {}}\n',
    "a place beyond": b'{"group": "group 2", "tensors": [{"name": "x", "dtype": "int8", '
    b'"shape": [1], "offset": 1073741824, "nbytes": 1, "sha256": ""}], "facts": {}}\n',
    "a place that is taken": b'{"group": "group 2", "tensors": [{"name": "x", "dtype": "int8", '
    b'"shape": [231], "offset": 0, "nbytes": 231, "sha256": "%s"}], "facts": {}}\n'
    % hashlib.sha256(tensors(0)["blocks.0.q"].numpy().tobytes()).hexdigest().encode(),
}


@pytest.mark.parametrize("junk", JUNK.values(), ids=JUNK)
def test_junk_behind_the_journal_is_cut(tmp_path, whole, junk):
    with (partial(tmp_path, groups=2) / "journal").open("ab") as journal:
        journal.write(junk)
    shutil.copytree(tmp_path, tmp_path / "again")
    partial(tmp_path / "again", groups=3)
    assert_goes_on(tmp_path / "again", whole, made=[])  # what came after the junk is believed
    shutil.rmtree(tmp_path / "again")
    assert_goes_on(tmp_path, whole, made=[2])


@pytest.mark.parametrize("damage", ["changed", "cut", "gone"])
def test_bytes_that_a_power_cut_took_are_made_again(tmp_path, whole, damage, caplog):
    weights = partial(tmp_path, groups=3) / "weights.bin"
    data = weights.read_bytes()
    second = json.loads((weights.parent / "journal").read_text("utf-8").splitlines()[2])
    start = second["tensors"][2]["offset"]
    if damage == "changed":
        weights.write_bytes(data[:start] + bytes(4096) + data[start + 4096 :])
    elif damage == "cut":
        os.truncate(weights, start)
    else:
        weights.unlink()
    assert_goes_on(tmp_path, whole, made=[0, 1, 2] if damage == "gone" else [1, 2])
    assert f"group {0 if damage == 'gone' else 1} is damaged; it is made again" in caplog.text


def test_changed_padding_is_in_the_hash_of_the_file(tmp_path, whole):
    weights = partial(tmp_path, groups=2) / "weights.bin"
    with weights.open("r+b") as file:
        file.seek(231)  # behind the first tensor
        file.write(b"!")
    home = build(tmp_path / "sm89")
    data = (home / "weights.bin").read_bytes()
    assert data[:231] + b"\0" + data[232:] == whole["weights.bin"]
    open_folder(home).verify()
    assert open_folder(home).manifest.files[0].sha256 == hashlib.sha256(data).hexdigest()


# --- other builds


def test_another_build_is_not_gone_on_with(tmp_path, whole, caplog):
    left = partial(tmp_path, groups=2, identity="other weights")
    (left / "plans").mkdir()
    (left / "plans" / "stale.plan").write_bytes(b"stale")
    with caplog.at_level(logging.INFO):
        assert_goes_on(tmp_path, whole, made=[0, 1, 2])
    assert f"{left} is of another build, it is written afresh" in caplog.text


def test_groups_in_another_order_are_made_again(tmp_path, whole, caplog):
    with PackageWriter(tmp_path / "sm89", "a") as writer:
        for n in (0, 2, 1):
            writer.write(f"group {n}", lambda n=n: make(n))
    assert_goes_on(tmp_path, whole, made=[1, 2])
    assert "group 2 stands where group 1 belongs" in caplog.text


def test_groups_that_nobody_asks_for_any_more_are_left_out(tmp_path, whole):
    with PackageWriter(tmp_path / "sm89", "a") as writer:
        for n in range(5):
            writer.write(f"group {n}", lambda n=n: make(n))
    assert_goes_on(tmp_path, whole, made=[])


def test_two_builds_do_not_write_the_same_package(tmp_path, whole):
    with PackageWriter(tmp_path / "sm89", "a") as writer:
        writer.write("group 0", lambda: make(0))
        with pytest.raises(BuildFailed, match=r"Another build is writing .*sm89\.partial"):
            PackageWriter(tmp_path / "sm89", "b")
        with PackageWriter(tmp_path / "sm120", "a"):  # its neighbour may be built
            pass
        code, told = in_a_process(lambda: PackageWriter(tmp_path / "sm89", "a"))
        assert (code, "BuildFailed: Another build is writing" in told) == (1, True)
    shutil.rmtree(tmp_path / "sm120.partial")
    assert_goes_on(tmp_path, whole, made=[1, 2])


def test_a_build_that_waited_for_another_to_finish_does_not_write_into_its_package(tmp_path, whole):
    """The folder moves between opening the lock and holding it."""
    place, moved = tmp_path / "sm89.partial", tmp_path / "finished"

    def watch(event, _):
        if event == "fcntl.flock" and not moved.exists():
            place.rename(moved)

    def work():
        sys.addaudithook(watch)
        return build(tmp_path / "sm89")

    assert in_a_process(work) == (0, str(tmp_path / "sm89"))
    assert content(tmp_path / "sm89") == whole
    assert content(tmp_path / "finished") == {"journal": b""}


def test_the_older_package_serves_until_the_new_one_is_whole(tmp_path, whole):
    home = build(tmp_path / "sm89", groups=1, identity="older")
    before = content(home)
    with PackageWriter(home, "a") as writer:
        for n in range(3):
            writer.write(f"group {n}", lambda n=n: make(n))
            assert content(home) == before
        complete(writer)
    assert content(home) == whole
    assert [path.name for path in tmp_path.iterdir()] == ["sm89"]


def test_a_link_to_the_place_is_followed(tmp_path, whole):
    (tmp_path / "disk").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "disk")
    assert build(tmp_path / "link" / "sm89") == tmp_path / "disk" / "sm89"
    assert content(tmp_path / "link" / "sm89") == whole


@pytest.mark.parametrize("name", ["sm89", "sm89.partial", "sm89.replaced"])
def test_a_folder_of_other_things_is_left_alone(tmp_path, name):
    (tmp_path / name).mkdir()
    (tmp_path / name / "thesis.txt").write_text("years of work")
    with pytest.raises(BuildFailed, match=r"is in the way: it holds thesis\.txt"):
        build(tmp_path / "sm89")
    assert content(tmp_path) == {f"{name}/thesis.txt": b"years of work"}
    (tmp_path / name / "thesis.txt").unlink()
    build(tmp_path / "sm89")


def test_a_file_in_the_place_is_left_alone(tmp_path):
    (tmp_path / "sm89").write_text("years of work")
    with pytest.raises(BuildFailed, match=r"sm89 cannot be written: Not a directory"):
        build(tmp_path / "sm89")
    assert content(tmp_path) == {"sm89": b"years of work"}


# --- failures


def test_a_group_that_cannot_be_made_stops_the_build_and_keeps_the_rest(tmp_path, whole):
    def fail():
        raise OSError(5, "of the checkpoint")

    with (
        pytest.raises(OSError, match="of the checkpoint"),
        PackageWriter(tmp_path / "sm89", "a") as writer,
    ):
        writer.write("group 0", lambda: make(0))
        writer.write("group 1", fail)
    assert_nothing_opens(tmp_path)
    assert_goes_on(tmp_path, whole, made=[1, 2])


def test_a_package_that_would_not_open_is_not_put_into_its_place(tmp_path):
    with PackageWriter(tmp_path / "sm89", "a") as writer:
        writer.write("group 0", lambda: make(0))
        with pytest.raises(BadPackage, match=r"lacks kernels/gemm\.i8\.cubin"):
            writer.finish(MANIFEST)
        with pytest.raises(BadPackage, match=r"architecture is 'sm75'"):
            complete(writer, replace(MANIFEST, arch="sm75"))
    assert_nothing_opens(tmp_path)


def test_a_package_without_tensors_is_not_put_into_its_place(tmp_path):
    with (
        PackageWriter(tmp_path / "sm89", "a") as writer,
        pytest.raises(BadPackage, match="0 tensors"),
    ):
        complete(writer)
    assert_nothing_opens(tmp_path)


@pytest.mark.parametrize(
    "wrong", [torch.zeros(0), torch.zeros(2, dtype=torch.float64)], ids=["empty", "float64"]
)
def test_tensors_that_the_index_cannot_tell_are_a_bug(tmp_path, wrong):
    with PackageWriter(tmp_path / "sm89", "a") as writer:
        with pytest.raises(AssertionError, match="odd"):
            writer.write("group 0", lambda: ({"odd": wrong}, {}))
        writer.write("group 0", lambda: make(0))
        with pytest.raises(AssertionError, match=r"blocks\.0\.q"):
            writer.write("group 1", lambda: make(0))


def test_a_disk_that_is_too_small_is_told_before_anything_is_written(tmp_path, whole):
    free = shutil.disk_usage(tmp_path).free
    with PackageWriter(tmp_path / "sm89", "a") as writer:
        writer.expect(free // 2)
        with pytest.raises(BuildFailed, match=rf"sm89 needs {2 * free} bytes, 0 are written and"):
            writer.expect(2 * free)
    assert_nothing_opens(tmp_path)
    assert_goes_on(tmp_path, whole, made=[0, 1, 2])


def test_a_disk_that_refuses_in_the_middle_is_told_and_the_next_build_goes_on(tmp_path, whole):
    """Here by a limit to the size of a file, which lifts while the writer is still open."""
    unlimited = resource.RLIM_INFINITY

    def work():
        resource.setrlimit(resource.RLIMIT_FSIZE, (len(whole["weights.bin"]) // 2, unlimited))
        with PackageWriter(tmp_path / "sm89", "a") as writer:
            writer.expect(30_000)
            writer.write("group 0", lambda: make(0))
            with pytest.raises(BuildFailed) as caught:
                writer.write("group 1", lambda: make(1))
            resource.setrlimit(resource.RLIMIT_FSIZE, (unlimited, unlimited))
            writer.write("group 1", lambda: make(1))
        return caught.value

    code, told = in_a_process(work)
    place = tmp_path / "sm89.partial"
    assert (code, told.startswith(f"{place} cannot be written: File too large. ")) == (0, True)
    assert " of 30000 bytes are written, " in told
    assert told.endswith(" are free. Make room and build again: it goes on where it stopped.")
    assert_nothing_opens(tmp_path)
    assert_goes_on(tmp_path, whole, made=[2])


def test_a_full_disk_is_told(tmp_path, whole):
    """A real one, of 20 KB, in a namespace of its own."""
    mount = f"mount -t tmpfs -o size=20k tmpfs {tmp_path}"
    try_out = ["unshare", "--mount", "--map-root-user", "sh", "-c"]
    if shutil.which("unshare") is None or subprocess.run([*try_out, mount]).returncode:
        pytest.skip("no file system can be mounted here")
    code = "\n".join([
        "import sys; from pathlib import Path; from tests.support.packages import *",
        "from engine.errors import BuildFailed; from engine.package.search import find_packages",
        "home = Path(sys.argv[1]) / 'sm89'",
        "try: build(home, groups=9)",
        "except BuildFailed as error: print(error)",
        "print(find_packages(home.parent), [path.name for path in home.parent.iterdir()])",
    ])  # fmt: skip
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2]), "CODE": code}
    command = f'{mount} && exec "{sys.executable}" -c "$CODE" {tmp_path}'
    done = subprocess.run(
        [*try_out, command], env=environment, capture_output=True, text=True, check=False
    )
    told, left = done.stdout.splitlines()
    assert told.startswith(f"{tmp_path / 'sm89.partial'} cannot be written: No space left on")
    assert told.endswith(" 0 are free. Make room and build again: it goes on where it stopped.")
    assert left == "[] ['sm89.partial']"


def test_a_folder_that_may_not_be_written_is_told():
    with shared_folder() as folder, bound_by_modes():
        with pytest.raises(BuildFailed, match=r"cannot be written: Permission denied. Choose"):
            build(folder / "sm89")
        with pytest.raises(BuildFailed, match=r"cannot be written"):
            build(Path("/proc/nothing/sm89"))


def test_facts_come_back_as_json_keeps_them_made_or_resumed(tmp_path):
    given = {"shape": (2, 3), "errors": {"up": 0.5}}
    for _ in range(2):
        with PackageWriter(tmp_path / "sm89", "a") as writer:
            got = writer.write("group 0", lambda: (tensors(0), given))
        assert got == {"shape": [2, 3], "errors": {"up": 0.5}}
