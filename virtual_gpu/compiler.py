"""The C and C++ compiler of this machine, or that of the `ziglang` wheel where there is none.

So the package index is enough to build the virtual GPU and the tests' drivers. What is built needs
no particular processor: it is built for this one's vector instructions where the processor has
them, and its results are the same bits without (multiplications and additions are never fused).
"""

import hashlib
import os
import platform
import subprocess
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from shutil import which

from kernels.spec import BuildError
from kernels.whole_file import whole_file

COMPILERS = {"c": ("cc", "gcc", "clang"), "c++": ("c++", "g++", "clang++")}
ZIG = {"c": "cc", "c++": "c++"}
FLAGS = (
    "-O2", "-ftree-vectorize", "-ffp-contract=off", "-fno-strict-aliasing", "-fno-math-errno",
    "-std=c++17",
)  # fmt: skip
VECTORS = {"avx2": "-mavx2", "fma": "-mfma"}  # what the processor calls it, and the compiler


def compiler(language: str) -> list[str]:
    """Returns the command that compiles "c" or "c++". Raises `BuildError` if there is none."""
    for name in COMPILERS[language]:
        if found := which(name):
            return [found]
    if find_spec("ziglang") is not None:
        return [sys.executable, "-m", "ziglang", ZIG[language]]
    raise BuildError(
        f"no compiler of {language} is here: neither {', '.join(COMPILERS[language])} nor the "
        f"package ziglang. Install one: pip install ziglang."
    )


def vector_flags(cpuinfo: Path = Path("/proc/cpuinfo")) -> list[str]:
    """Returns flags for the vector instructions of this processor, none if it is not known."""
    if platform.machine() not in ("x86_64", "AMD64") or not cpuinfo.is_file():
        return []
    lines = [line for line in cpuinfo.read_text("utf-8").splitlines() if line.startswith("flags")]
    known = set(lines[0].split()) if lines else set()
    return [*VECTORS.values()] if known >= set(VECTORS) else []


def _environment(folder: Path) -> dict[str, str]:
    """Returns that of a compiler, which keeps what it needs again (Zig's own library) beside."""
    caches = ("ZIG_GLOBAL_CACHE_DIR", "ZIG_LOCAL_CACHE_DIR")
    return dict.fromkeys(caches, str(folder.absolute() / "zig")) | os.environ


def shared_library(
    sources: Sequence[Path], folder: Path, command: Sequence[str], flags: Sequence[str] = FLAGS
) -> Path:
    """Compiles the first of `sources`, which includes the others, and returns the library in
    `folder`; what was made of the same sources in the same way is taken from there.

    Raises `BuildError` with what the compiler says.
    """
    asked = subprocess.run(
        [*command, "--version"],
        capture_output=True,
        encoding="utf-8",
        errors="replace",
        check=False,
    )
    digest = hashlib.sha256("\n".join([*command, *flags, asked.stdout]).encode())
    for path in sources:
        digest.update(path.read_bytes())
    library = folder / f"{sources[0].stem}-{digest.hexdigest()[:16]}.so"
    if library.exists():
        return library
    folder.mkdir(parents=True, exist_ok=True)
    with whole_file(library) as draft:
        everything = [*command, *flags, "-shared", "-fPIC", str(sources[0]), "-o", str(draft)]
        done = subprocess.run(
            everything,
            capture_output=True,
            encoding="utf-8",
            errors="replace",
            check=False,
            env=_environment(folder),
        )
        if done.returncode:
            reason = done.stderr.strip().splitlines()[:5]
            raise BuildError(f"{command[0]} cannot compile {sources[0].name}: {' '.join(reason)}")
    return library
