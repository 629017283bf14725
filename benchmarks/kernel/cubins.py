"""Kernels of an architecture in a folder, for a GPU machine without a compiler.

python benchmarks/run.py cubins DIR --arch sm90
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from engine.config import SCAIL_14B, state_dir
from engine.errors import Unavailable
from kernels.aot.compile import compile_kernels, ptx_path
from kernels.aot.cubin import Cubin, cubin_from_record
from kernels.arch import ARCHS, SM90, Arch
from kernels.fp8 import FORMS
from kernels.ops import native_specs


def compiled(arch: Arch) -> dict[str, Cubin]:
    """Every kernel of a 14B package, of both 8-bit dtypes, proven, by the names of specs."""
    specs = native_specs(SCAIL_14B.dim, SCAIL_14B.ffn, FORMS, arch)
    made = compile_kernels([(spec, arch) for spec in specs], state_dir())
    return {cubin.name: cubin for cubin in made}


def write(folder: Path, arch: Arch) -> int:
    """Writes every kernel to a folder, with the PTX that the virtual GPU runs; returns the bytes of
    machine code.
    """
    (folder / "ptx").mkdir(parents=True, exist_ok=True)
    cubins = compiled(arch).values()
    for cubin in cubins:
        ptx_path(cubin.sha256, folder).write_bytes(ptx_path(cubin.sha256, state_dir()).read_bytes())
        (folder / f"{cubin.name}.cubin").write_bytes(cubin.data)
        (folder / f"{cubin.name}.json").write_text(json.dumps(cubin.record()), encoding="utf-8")
    return sum(len(cubin.data) for cubin in cubins)


def load(folder: Path) -> dict[str, Cubin]:
    """The kernels of a folder by name. Raises `Unavailable` if there are none."""
    found = {}
    for path in sorted(folder.glob("*.json")):
        record = json.loads(path.read_bytes())
        found[path.stem] = cubin_from_record(record, path.with_suffix(".cubin").read_bytes())
    if not found:
        raise Unavailable(
            f"There are no cubins in {folder}. Make them where the project's .venv is, with: "
            "python benchmarks/run.py cubins DIR --arch ARCH"
        )
    return found


def main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(prog="run.py cubins", description=__doc__)
    parser.add_argument("folder", type=Path, metavar="DIR")
    parser.add_argument("--arch", choices=[arch.name for arch in ARCHS], default=SM90.name)
    args = parser.parse_args(argv)
    arch = next(arch for arch in ARCHS if arch.name == args.arch)
    print(f"{write(args.folder, arch) / 2**20:.1f} MiB of cubins in {args.folder}")
