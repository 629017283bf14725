"""A compiled kernel as a package keeps it: machine code, and what a launch must know of it.

The record goes into the package's manifest, the code into a file beside it. Both are written and
read here; what a build demands of them before is in `kernels.aot.proofs`.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace

from kernels.arch import Arch
from kernels.spec import KernelSpec

HIDDEN_POINTERS = 2  # Triton 3.6 appends global and profile scratch; both are null here
WARP = 32  # threads


class BadCubin(Exception):
    """A record or file of a package that does not describe a compiled kernel."""


@dataclass(frozen=True, slots=True)
class Mix:
    """The instructions of one iteration of a loop, as one warp issues them."""

    instructions: int
    mma: Mapping[str, int]  # matrix instructions by their whole names: {"IMMA.16832.S8.S8.SAT": 32}
    others: Mapping[str, int]  # the rest by their first names: {"FFMA": 64, "LDSM": 36}

    def count(self, *names: str) -> int:
        return sum(self.others.get(name, 0) for name in names)


@dataclass(frozen=True, slots=True)
class Cubin:
    name: str  # that of the spec
    arch: str
    spec: str  # digest of the spec and its tuning: the launcher's must be the same
    sha256: str  # hash of the machine code
    entry: str
    warps: int
    shared_bytes: int
    scratch_bytes: int
    registers: int
    text_bytes: int
    toolkit: str
    loop: Mix | None  # None: a kernel without a loop, or whose loop nobody asked for
    data: bytes = field(repr=False)

    def record(self) -> Mapping[str, object]:
        """Returns all but the machine code, for JSON."""
        return asdict(replace(self, data=b"")) | {"data": len(self.data)}


def spec_digest(spec: KernelSpec, arch: Arch) -> str:
    """Returns a digest that changes with everything that a launcher of this kernel relies on."""
    tuning = spec.tuning[arch]
    facts = [
        spec.name, spec.device, spec.signature, dict(spec.constants), spec.multiples_of_16,
        spec.fuse_multiply_add, tuning.warps, tuning.stages, dict(tuning.blocks), tuning.toolkit,
        tuning.max_registers,
    ]  # fmt: skip
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def cubin_from_record(record: object, data: bytes) -> Cubin:
    """Reads what `Cubin.record` wrote. Raises `BadCubin` if it is not that, or the code is not."""
    if not isinstance(record, dict) or not isinstance(record.get("name"), str):
        raise BadCubin(f"a kernel's record is {str(record)[:80]}, not an object with a name")
    name, loop = record["name"], record.get("loop")
    kinds = {part.name: part.type for part in fields(Cubin)} | {"loop": type(loop), "data": int}
    wrong = kinds.items() ^ {key: type(value) for key, value in record.items()}.items()
    if wrong:
        keys = ", ".join(sorted({key for key, _ in wrong}))
        raise BadCubin(f"the record of kernel {name} lacks or mistakes {keys}")
    found = hashlib.sha256(data).hexdigest()
    if found != record["sha256"]:
        raise BadCubin(f"the code of kernel {name} has sha256 {found}, not {record['sha256']}")
    return Cubin(**record | {"loop": _mix(name, loop), "data": data})


def _mix(name: str, loop: object) -> Mix | None:
    match loop:
        case None:
            return None
        case {"instructions": count, "mma": dict(mma), "others": dict(others), **more} if not more:
            if all(type(number) is int for number in (count, *mma.values(), *others.values())):
                return Mix(count, mma, others)
    raise BadCubin(f"the main loop of kernel {name} is {str(loop)[:80]}, not counts")
