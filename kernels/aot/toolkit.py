"""The assemblers (ptxas) that machine code is made with: found in a cache, or fetched through pip.

A driver takes cubins of certain CUDA releases only, so the release of ptxas is a choice and not
what happens to be installed. Both releases come from NVIDIA's wheels, known by their sha256. Two
versions of one package cannot be installed side by side, so the one file needed is unpacked.
Source: docs/reference/kernels.md 1.
"""

import hashlib
import logging
import subprocess
import sys
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from kernels.spec import BuildError
from kernels.whole_file import whole_file

log = logging.getLogger(__name__)

PACKAGE = "nvidia-cuda-nvcc-cu12"
MEMBER = "nvidia/cuda_nvcc/bin/ptxas"


@dataclass(frozen=True, slots=True)
class Release:
    """One version of ptxas for Linux on x86-64."""

    version: str
    platform: str  # pip's name for that of the wheel
    wheel_sha256: str
    ptxas_sha256: str


RELEASES = {
    "12.6": Release(
        "12.6.85",
        "manylinux1_x86_64",
        "d75d9d74599f4d7c0865df19ed21b739e6cb77a6497a3f73d6f61e8038a765e4",
        "81ef7761e3769ec17980aba4e416ecbc85352b8dce26cdd392b7204302a909a2",
    ),
    "12.8": Release(
        "12.8.93",
        "manylinux2010_x86_64",
        "2d6dc36fb7cb5ac9c0b8825bc13d193c35487a315664007287d0126531238011",
        "c960a4f238b17d5c5d3c01ad2bbc1ebd2c5aecc459cb4d223bff10b45f9b8fca",
    ),
}


def ptxas(name: str, state: Path) -> Path:
    """Returns the ptxas of a release ("12.6") below `state`, where it is fetched once.

    Raises `BuildError` for a release that is not pinned here, and for one that cannot be fetched.
    """
    if name not in RELEASES:
        raise BuildError(f"no ptxas of CUDA {name} is pinned, only {', '.join(RELEASES)}")
    return install(RELEASES[name], state)


def install(
    release: Release, state: Path, download: Callable[[Release, Path], Path] | None = None
) -> Path:
    """Returns the ptxas of a release below `state`. A missing or damaged one comes from its wheel,
    which `download` puts into a folder; by default that is `fetch`.
    """
    path = state / "toolkits" / release.version / "ptxas"
    if path.is_file():
        if _sha256(path) == release.ptxas_sha256:
            return path
        log.warning("%s is damaged, it is fetched again", path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=path.parent) as folder:
        unpack((download or fetch)(release, Path(folder)), release, path)
    return path


def fetch(release: Release, folder: Path, pip: tuple[str, ...] = ("-m", "pip")) -> Path:
    """Downloads the wheel as pip is configured here. `pip` is how Python starts it."""
    log.info("fetching %s %s", PACKAGE, release.version)
    command = [
        sys.executable, *pip, "download", "--quiet", "--no-deps", "--only-binary=:all:",
        "--platform", release.platform, "--dest", str(folder), f"{PACKAGE}=={release.version}",
    ]  # fmt: skip
    done = subprocess.run(
        command, capture_output=True, encoding="utf-8", errors="replace", check=False
    )
    wheels = list(folder.glob("*.whl"))
    if done.returncode or len(wheels) != 1:
        reason = done.stderr.strip().splitlines()[-1:] or [f"{len(wheels)} wheels"]
        raise BuildError(
            f"pip could not fetch {PACKAGE} {release.version}: {reason[0]}. "
            f"Let pip reach a package index that has it."
        )
    return wheels[0]


def unpack(wheel: Path, release: Release, path: Path) -> None:
    """Writes the wheel's ptxas to `path`, whole or not at all."""
    found = _sha256(wheel)
    if found != release.wheel_sha256:
        raise BuildError(
            f"{wheel.name} has sha256 {found}, expected {release.wheel_sha256}. "
            f"It is not NVIDIA's wheel: check the package index that pip uses."
        )
    try:
        with zipfile.ZipFile(wheel) as archive:
            program = archive.read(MEMBER)
    except (zipfile.BadZipFile, KeyError) as error:
        raise BuildError(f"{wheel.name} has no {MEMBER}") from error
    with whole_file(path) as draft:
        draft.write_bytes(program)
        draft.chmod(0o755)


def main() -> None:
    """Fetches every release below the folder that is named: what compiles then needs no network."""
    for name in RELEASES:
        ptxas(name, Path(sys.argv[1]))


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


if __name__ == "__main__":
    main()
