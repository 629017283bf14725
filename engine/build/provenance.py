"""Records what built a package: versions, their wheels, and the sources of the build itself."""

import hashlib
import platform
from collections.abc import Iterable, Mapping
from importlib.metadata import PackageNotFoundError, distribution, version
from pathlib import Path

from kernels.aot.compile import TRITON
from kernels.aot.cubin import Cubin
from kernels.aot.toolkit import PACKAGE, RELEASES

DISTRIBUTIONS = ("torch", "triton", "numpy", "tensorrt_rtx_cu12")
ROOT = Path(__file__).resolve().parents[2]


def engine_version() -> str:
    return version("scail-engine")


def toolchain(kernels: Iterable[Cubin]) -> Mapping[str, str]:
    """Lists the versions of what built a package, by name."""
    found = {"python": platform.python_version()}
    found |= {name: version(name) for name in _installed()}
    found["triton"] = TRITON  # not installed where the kernels were compiled before
    return found | {f"ptxas {name}": RELEASES[name].version for name in _toolkits(kernels)}


def wheels(kernels: Iterable[Cubin]) -> Mapping[str, str]:
    """Lists SHA-256 by name: that of the wheel of a ptxas, which is pinned, and that of the RECORD
    of what is installed, which holds the hashes of a wheel's files.
    """
    found = {f"{PACKAGE} {RELEASES[name].version}": RELEASES[name].wheel_sha256
             for name in _toolkits(kernels)}  # fmt: skip
    for name in _installed():
        record = distribution(name).read_text("RECORD") or ""
        found[f"{name} RECORD"] = hashlib.sha256(record.encode()).hexdigest()
    return found


def own_sources() -> str:
    """Digests the files that decide the weights of a package."""
    digest = hashlib.sha256()
    folders, files = ("build", "models"), ("engine/denoise/block.py", "kernels/fp8.py")
    paths = [path for folder in folders for path in (ROOT / "engine" / folder).glob("*.py")]
    for path in sorted([*paths, *(ROOT / file for file in files)]):
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


def _toolkits(kernels: Iterable[Cubin]) -> list[str]:
    return sorted({kernel.toolkit for kernel in kernels} & RELEASES.keys())


def _installed() -> list[str]:
    held = []
    for name in DISTRIBUTIONS:
        try:
            distribution(name)
        except PackageNotFoundError:
            continue
        held.append(name)
    return held
