"""What a build asks of every cubin, read from the cubin itself (docs/reference/kernels.md 1 and 6).

toolkit     the release of ptxas that was asked for
container   the form that drivers of the architecture's floor can read
target      exactly this architecture
arguments   widths in the order of the signature, and Triton's two hidden pointers
threads     as many as the launch will start
memory      nothing spills, no scratch, no more shared memory than a block may have
debug       no line tables: no path of the machine that built it
main loop   the matrix instructions asked for; no scalar loads, no spills, few shared loads
waits       no register of a wgmma is touched before it was waited for (`kernels.aot.hazards`)
"""

import hashlib
from collections.abc import Iterator, Mapping

from kernels.aot.cubin import HIDDEN_POINTERS, WARP, Cubin, Mix, spec_digest
from kernels.aot.elf import NEW_CONTAINER, OLD_CONTAINER, read_elf
from kernels.arch import SM80, SM86, SM89, SM90, SM120, Arch
from kernels.signature import POINTER_BYTES, parameters
from kernels.spec import BuildError, KernelSpec, Loop

MOST_REGISTERS = 255  # an instruction can name no more
CONTAINERS = {
    **dict.fromkeys((SM80, SM86, SM89, SM90), OLD_CONTAINER),
    SM120: NEW_CONTAINER,
}


class ProofError(BuildError):
    """A compiled kernel that does not hold what is asked of it."""

    def __init__(self, kernel: str, arch: str, proof: str, found: object, expected: object) -> None:
        super().__init__(f"{kernel} for {arch}, {proof}: found {found}, expected {expected}")
        self.kernel, self.arch, self.proof = kernel, arch, proof
        self.found, self.expected = found, expected


def cubin(
    spec: KernelSpec, arch: Arch, data: bytes, facts: Mapping[str, object], loop: Mix | None
) -> Cubin:
    """Makes a cubin of machine code, what the compiler said of it, and its main loop."""
    elf = read_elf(data)
    return Cubin(
        name=spec.name,
        arch=arch.name,
        spec=spec_digest(spec, arch),
        sha256=hashlib.sha256(data).hexdigest(),
        entry=str(facts["entry"]),
        warps=int(str(facts["warps"])),
        shared_bytes=int(str(facts["shared_bytes"])),
        scratch_bytes=int(str(facts["scratch_bytes"])),
        registers=elf.registers,
        text_bytes=elf.text_bytes,
        toolkit=elf.toolkit,
        loop=loop,
        data=data,
    )


def prove(cubin: Cubin, spec: KernelSpec, arch: Arch) -> None:
    """Raises `ProofError` for the first proof that fails."""
    proofs = [*_proofs(cubin, spec, arch)]
    if spec.loop is not None:
        proofs += _loop_proofs(cubin.loop, spec.loop, arch)
    for proof, found, expected, holds in proofs:
        if not holds:
            raise ProofError(spec.name, arch.name, proof, found, expected)


Proof = tuple[str, object, object, bool]  # name, found, expected, does it hold


def _is(name: str, found: object, expected: object) -> Proof:
    return name, found, expected, found == expected


def _at_most(name: str, found: int, limit: int) -> Proof:
    return name, found, f"at most {limit}", found <= limit


def _proofs(cubin: Cubin, spec: KernelSpec, arch: Arch) -> Iterator[Proof]:
    elf, tuning = read_elf(cubin.data), spec.tuning[arch]
    widths = [parameter.size_bytes for parameter in parameters(spec)]
    major, minor = arch.capability
    yield _is("toolkit", elf.toolkit, tuning.toolkit)
    yield _is("container", elf.container, CONTAINERS[arch])
    yield _is("architecture", elf.capability, 10 * major + minor)
    if elf.target is not None:
        yield _is("target", elf.target, arch.target)
    yield _is("entry", elf.entry, cubin.entry)
    yield _is("arguments", [*elf.parameter_bytes], widths + HIDDEN_POINTERS * [POINTER_BYTES])
    yield _is("threads", elf.threads, WARP * cubin.warps)
    yield _is("local memory", elf.frame_bytes, 0)
    yield _at_most("registers", elf.registers, tuning.max_registers or MOST_REGISTERS)
    yield _at_most("shared memory", cubin.shared_bytes, arch.shared_bytes)
    yield _is("scratch memory", cubin.scratch_bytes, 0)
    yield _is("debug information", elf.debug_bytes, 0)


def _loop_proofs(found: Mix | None, expected: Loop, arch: Arch) -> Iterator[Proof]:
    loop = found or Mix(0, {}, {})
    for prefix in expected.mma[arch]:
        holds = any(name.startswith(prefix) for name in loop.mma)
        yield f"{prefix} in the main loop", sorted(loop.mma), prefix, holds
    yield _is("scalar loads in the main loop", loop.count("LDG"), 0)
    yield _is("spills in the main loop", loop.count("LDL", "STL"), 0)
    yield _at_most("shared loads in the main loop", loop.count("LDS"), expected.max_shared_loads)
