"""The assemblers come from pinned wheels, and nothing else is taken for one."""

import hashlib
import subprocess
import zipfile
from dataclasses import replace

import pytest

from kernels.aot.toolkit import (
    MEMBER,
    PACKAGE,
    RELEASES,
    Release,
    fetch,
    install,
    ptxas,
    unpack,
)
from kernels.spec import BuildError
from tests.support.compiled import STATE

# Stands in for pip: keeps its arguments and leaves files in the folder after --dest.
PIP = """
import json, pathlib, sys
folder = pathlib.Path(sys.argv[sys.argv.index("--dest") + 1])
(folder / "arguments.json").write_text(json.dumps(sys.argv[1:]))
for number in range({wheels}):
    (folder / f"{{number}}.whl").write_bytes(b"wheel")
sys.stderr.write({error!r})
sys.exit({code})
"""


def pip(tmp_path, wheels=1, error="", code=0):
    program = tmp_path / "pip.py"
    program.write_text(PIP.format(wheels=wheels, error=error, code=code))
    return (str(program),)


def wheel(tmp_path, content=b"an assembler"):
    path = tmp_path / "x.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(MEMBER, content)
    return path, Release("9.9.9", "any", hashlib.sha256(path.read_bytes()).hexdigest(), "")


@pytest.mark.parametrize("name", RELEASES)
def test_the_pinned_ptxas_says_which_release_it_is(name):
    program = ptxas(name, STATE)
    said = subprocess.run([program, "--version"], capture_output=True, text=True, check=True)
    assert f"release {name}, V{RELEASES[name].version}" in said.stdout
    assert hashlib.sha256(program.read_bytes()).hexdigest() == RELEASES[name].ptxas_sha256
    assert ptxas(name, STATE) == program


def test_a_release_that_is_not_pinned_is_refused(tmp_path):
    with pytest.raises(BuildError, match=r"no ptxas of CUDA 13\.0 is pinned, only 12\.6, 12\.8"):
        ptxas("13.0", tmp_path)


def test_pip_is_asked_for_one_version_of_the_wheel_and_no_other_index(tmp_path):
    fetch(RELEASES["12.6"], tmp_path, pip(tmp_path))
    arguments = (tmp_path / "arguments.json").read_text("utf-8")
    assert f'"{PACKAGE}==12.6.85"]' in arguments
    assert '"--no-deps", "--only-binary=:all:", "--platform", "manylinux1_x86_64"' in arguments
    assert "index" not in arguments


@pytest.mark.parametrize(
    ("outcome", "message"),
    [
        (
            {"code": 1, "wheels": 0, "error": "x\nERROR: No matching distribution\n"},
            "ERROR: No mat",
        ),
        ({"wheels": 0}, "0 wheels"),
        ({"wheels": 2}, "2 wheels"),
        ({"code": 3, "wheels": 1}, "1 wheels"),
    ],
    ids=["not found", "nothing", "two", "failed"],
)
def test_a_failing_pip_is_told_with_its_reason(tmp_path, outcome, message):
    with pytest.raises(BuildError, match=f"could not fetch {PACKAGE} .*: {message}.*package index"):
        fetch(RELEASES["12.8"], tmp_path, pip(tmp_path, **outcome))


def test_a_missing_pip_is_told(tmp_path):
    with pytest.raises(BuildError, match="could not fetch"):
        fetch(RELEASES["12.8"], tmp_path, ("-m", "no_such_pip"))


def test_the_assembler_is_unpacked_and_can_be_started(tmp_path):
    path, release = wheel(tmp_path, b"#!/bin/sh\necho assembled\n")
    out = tmp_path / "ptxas-9"
    unpack(path, release, out)
    assert subprocess.run([out], capture_output=True, check=True).stdout == b"assembled\n"


def test_a_wheel_with_other_bytes_is_refused(tmp_path):
    path, release = wheel(tmp_path)
    path.write_bytes(path.read_bytes() + b"?")
    with pytest.raises(BuildError, match=f"expected {release.wheel_sha256}. It is not NVIDIA's"):
        unpack(path, release, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_wheel_without_the_assembler_is_refused(tmp_path):
    path = tmp_path / "x.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("other", b"")
    release = replace(RELEASES["12.8"], wheel_sha256=hashlib.sha256(path.read_bytes()).hexdigest())
    with pytest.raises(BuildError, match=r"x\.whl has no .*ptxas"):
        unpack(path, release, tmp_path / "out")


def test_a_damaged_ptxas_is_fetched_again(tmp_path, caplog):
    sound = ptxas("12.6", STATE)
    wheel = tmp_path / "x.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.write(sound, MEMBER)
    digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
    release = replace(RELEASES["12.6"], wheel_sha256=digest)
    damaged = tmp_path / "toolkits" / "12.6.85" / "ptxas"
    damaged.parent.mkdir(parents=True)
    damaged.write_bytes(b"half of it")
    assert install(release, tmp_path, lambda *_: wheel).read_bytes() == sound.read_bytes()
    assert "is damaged, it is fetched again" in caplog.text
    assert [path.name for path in damaged.parent.iterdir()] == ["ptxas"]
    assert install(release, tmp_path, lambda *_: tmp_path / "none") == damaged  # sound now
