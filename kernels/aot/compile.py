"""Compiles specs to proven cubins, without a GPU or torch, to the same bytes on every machine.

Triton works in processes of its own (`python -m kernels.device`): each has one toolkit, a cache of
its own, and none of the caller's settings. What was compiled from the same sources before is taken
from the state folder, and proven again.

The PTX of a kernel is kept in the state folder too, under the hash of its machine code: packages
have no use for it, `virtual_gpu` runs it.
"""

import ast
import hashlib
import json
import logging
import os
import subprocess
import sys
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory

from kernels.aot.cubin import BadCubin, Cubin, cubin_from_record, spec_digest
from kernels.aot.hazards import hazards
from kernels.aot.proofs import ProofError, cubin, prove
from kernels.aot.sass import disassemble, main_loop
from kernels.aot.toolkit import RELEASES, ptxas
from kernels.arch import Arch
from kernels.signature import parameters
from kernels.spec import BuildError, KernelSpec
from kernels.whole_file import whole_file

log = logging.getLogger(__name__)

TRITON = "3.6.0"  # makes the kernels; those in the store need none (docs/reference/kernels.md 0)
WORKER = "kernels.device"
# What is stored depends on these files too.
_OWN = (
    "aot/compile.py", "aot/elf.py", "aot/hazards.py", "aot/proofs.py", "aot/sass.py",
    "device/__main__.py",
)  # fmt: skip
# Variables that change what Triton or ptxas do.
_SETTINGS = ("TRITON_", "PTXAS_", "DISABLE_PTXAS", "LLVM_", "MLIR_", "ENABLE_", "NVPTX_", "USE_IR")


@dataclass(frozen=True, slots=True)
class _Build:
    """One kernel for one architecture, and the name of its result in the store."""

    spec: KernelSpec
    arch: Arch
    key: str


def compile_kernels(
    wanted: Sequence[tuple[KernelSpec, Arch]], state: Path, *, processes: int | None = None
) -> list[Cubin]:
    """Returns a proven cubin for each kernel and architecture, in order.

    The folder `state` keeps toolkits and results, with their PTX; what it lacks is made again.
    Raises `BuildError` if a kernel does not compile, and `ProofError` if it does not hold what its
    spec asks.
    """
    for spec, arch in wanted:
        if arch not in spec.tuning:
            raise BuildError(f"{spec.name} is not tuned for {arch.name}")
    builds = [_Build(spec, arch, _key(spec, arch)) for spec, arch in wanted]
    found = {build.key: _stored(build, state) for build in builds}
    missing = {build.key: build for build in builds if found[build.key] is None}
    with TemporaryDirectory(prefix="scail-compile-") as folder:
        found |= _compile(
            [*missing.values()], state, Path(folder), processes or os.cpu_count() or 1
        )
    cubins = []
    for build in builds:
        made = found[build.key]
        assert made is not None
        prove(made, build.spec, build.arch)
        if build.key in missing:
            _store(made, state / "cubins" / build.key)
        cubins.append(made)
    return cubins


def ptx_path(sha256: str, state: Path) -> Path:
    """Returns where the PTX is kept of which the machine code with this hash was made."""
    return state / "ptx" / f"{sha256}.ptx"


def _compile(
    builds: list[_Build], state: Path, folder: Path, processes: int
) -> dict[str, Cubin | None]:
    """Compiles in parallel; each worker has every n-th kernel of one toolkit."""
    if builds:
        _require_triton(builds[0].spec.name)
    by_toolkit: dict[str, list[_Build]] = {}
    for build in builds:
        by_toolkit.setdefault(build.spec.tuning[build.arch].toolkit, []).append(build)
    portions = [
        (ptxas(name, state), jobs[first::processes])
        for name, jobs in by_toolkit.items()
        for first in range(min(processes, len(jobs)))
    ]

    def work(number: int) -> dict[str, Cubin | None]:
        program, jobs = portions[number]
        out = folder / str(number)
        out.mkdir()
        errors = _run(jobs, out, program)
        return {build.key: _collect(build, out, errors, state) for build in jobs}

    made = {}
    with ThreadPoolExecutor(processes) as pool:  # the threads wait for processes
        for cubins in pool.map(work, range(len(portions))):
            made |= cubins
    return made


def _require_triton(kernel: str) -> None:
    try:
        found = version("triton")
    except PackageNotFoundError:
        found = "none"
    if found != TRITON:
        raise BuildError(
            f"{kernel} must be compiled with Triton {TRITON}, and {found} is installed here. "
            f"Install triton=={TRITON}; an image has the kernels of the 14B model only."
        )


def _run(builds: list[_Build], folder: Path, program: Path) -> str:
    """Leaves results in the folder, and returns what the worker wrote to standard error."""
    jobs = {build.key: _job(build.spec, build.arch) for build in builds}
    environment = {k: v for k, v in os.environ.items() if not k.startswith(_SETTINGS)} | {
        "PYTHONPATH": os.pathsep.join(sys.path),
        "TRITON_CACHE_DIR": str(folder / "triton"),
        "TRITON_DISABLE_LINE_INFO": "1",  # smaller, and without the paths of this machine
        "TRITON_PTXAS_PATH": str(program),
        "TRITON_PTXAS_BLACKWELL_PATH": str(program),
    }
    command = [sys.executable, "-m", WORKER, str(folder)]
    text = json.dumps(jobs)
    done = subprocess.run(
        command,
        input=text,
        env=environment,
        capture_output=True,
        encoding="utf-8",
        errors="replace",
        check=False,
    )
    return done.stderr


def _job(spec: KernelSpec, arch: Arch) -> dict[str, object]:
    tuning = spec.tuning[arch]
    arguments = parameters(spec)
    major, minor = arch.capability
    return {
        "module": spec.module,
        "function": spec.function,
        "types": [argument.type for argument in arguments],
        "multiples_of_16": [n for n, a in enumerate(arguments) if a.is_multiple_of_16],
        "constants": {**spec.constants, **tuning.blocks},
        "capability": 10 * major + minor,
        "warps": tuning.warps,
        "stages": tuning.stages,
        "max_registers": tuning.max_registers,
        "fuse_multiply_add": spec.fuse_multiply_add,
    }


def _collect(build: _Build, folder: Path, errors: str, state: Path) -> Cubin:
    """Reads what the worker left in the folder, and keeps the PTX."""
    code, facts = folder / f"{build.key}.cubin", folder / f"{build.key}.json"
    if not facts.exists():
        raise BuildError(
            f"{build.spec.name} does not compile for {build.arch.name}: {_reason(errors)}"
        )
    loop = None
    if build.spec.loop is not None:
        listing = disassemble(code)
        loop = main_loop(listing)
        if found := hazards(listing):  # proven once: what is stored depends on the proof itself
            raise ProofError(build.spec.name, build.arch.name, "waits for wgmma", found[0], "none")
    made = cubin(
        build.spec, build.arch, code.read_bytes(), json.loads(facts.read_text("utf-8")), loop
    )
    path = ptx_path(made.sha256, state)
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(path) as draft:
        draft.write_bytes((folder / f"{build.key}.ptx").read_bytes())
    return made


def _reason(errors: str) -> str:
    """Picks the line with the reason: the first complaint of ptxas, or the end of a traceback."""
    lines = errors.strip().splitlines()
    complaints = [line for line in lines if line.startswith("ptxas") and "error" in line]
    return (complaints[:1] or lines[-1:] or ["the compiler died without a word"])[0]


def _key(spec: KernelSpec, arch: Arch) -> str:
    """Returns a name that changes with everything that the machine code may depend on."""
    digest = hashlib.sha256(spec_digest(spec, arch).encode())
    here = Path(__file__).parents[1]
    for path in [*_sources(spec), *(here / name for name in _OWN)]:
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    toolkit = spec.tuning[arch].toolkit
    release = RELEASES[toolkit].wheel_sha256 if toolkit in RELEASES else toolkit
    digest.update(f"{arch.name} {release} {TRITON} {spec.loop is None}".encode())
    return digest.hexdigest()


def _sources(spec: KernelSpec) -> Iterable[Path]:
    """Lists the file of the device function, and those of its package that it imports."""
    names, seen = [spec.module], {}
    while names:
        name = names.pop()
        module = find_spec(name)
        if module is None or module.origin is None:
            raise BuildError(f"{spec.name}: there is no module {name}")
        path = seen[name] = Path(module.origin)
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            found = [n.name for n in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and node.module:
                found = [node.module]
            names += [n for n in found if n.startswith(f"{spec.package}.") and n not in seen]
    return [seen[name] for name in sorted(seen)]


def _stored(build: _Build, state: Path) -> Cubin | None:
    path = state / "cubins" / build.key
    code, record = path.with_suffix(".cubin"), path.with_suffix(".json")
    try:
        made = cubin_from_record(json.loads(record.read_text("utf-8")), code.read_bytes())
        return made if ptx_path(made.sha256, state).exists() else None
    except FileNotFoundError:
        return None
    except (BadCubin, ValueError) as error:
        log.warning("%s is compiled again: %s", build.spec.name, error)
        return None


def _store(made: Cubin, path: Path) -> None:
    """Writes the record last, since it says that the code is whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    texts = {".cubin": made.data, ".json": json.dumps(made.record()).encode()}
    for suffix, data in texts.items():
        with whole_file(path.with_suffix(suffix)) as draft:
            draft.write_bytes(data)
