"""The machine as a library: it takes programs, orders and ranges, and is the libcuda of a bank."""

import ctypes
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np

from virtual_gpu.compiler import FLAGS, compiler, shared_library, vector_flags
from virtual_gpu.orders import Order
from virtual_gpu.program import Program, UnknownPtx

SOURCES = Path(__file__).with_name("machine")

# Findings that are mistakes: PTX does not say what happens then, or memory was not written.
MISTAKES = {
    "UNWRITTEN", "OTHER_LANE", "COPY_UNFENCED", "STORE_UNFENCED", "EARLY_ACCUMULATOR",
    "EARLY_FRAGMENT", "UNFENCED_REGISTER", "COPY_LEFT", "PRODUCT_LEFT",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Finding:
    """What a kernel did that did not stop it."""

    kernel: str
    name: str  # of machine/program.hpp
    times: int
    places: int  # instructions
    line: int  # of the first of them, in the PTX
    text: str

    def __str__(self) -> str:
        where = f"{self.kernel}, PTX line {self.line}"
        return f"{where}: {self.text} ({self.times} times at {self.places} instructions)"


class Machine:
    """A library has its state once, so that a folder, which keeps what was compiled, has one."""

    def __init__(self, folder: Path, command: Sequence[str] | None = None) -> None:
        """Raises `kernels.spec.BuildError` without a compiler."""
        sources = [SOURCES / "driver.cpp", *sorted(SOURCES.glob("*.hpp"))]
        flags = [*FLAGS, *vector_flags()]
        self.path = shared_library(sources, folder, command or compiler("c++"), flags)
        self.library = ctypes.CDLL(str(self.path))
        self.library.vgpu_error.restype = ctypes.c_char_p
        self.library.vgpu_executed.restype = ctypes.c_uint64
        self.library.vgpu_findings.restype = ctypes.c_uint64
        self._operations: dict[str, int] = {}
        self._known: set[bytes] = set()  # machine code that there is a program for

    def add(self, program: Program, image: bytes) -> None:
        """Runs `program` where machine code is loaded that is `image`: the first given for it."""
        if image in self._known:
            return
        self._known.add(image)
        code = [
            (self._operation(i.operation), i.guard, first, len(i.operands), i.line)
            for i, first in zip(program.code, _sums(len(i.operands) for i in program.code))
        ]
        operands = [place for i in program.code for place in i.operands]
        held32, held64 = program.constants32, program.constants64
        self.library.vgpu_program(
            program.name.encode(), image, ctypes.c_uint64(len(image)),
            _array(code, np.int32), len(code), _array(operands, np.int32), len(operands),
            _array(list(held32), np.int32), _array(list(held32.values()), np.uint32), len(held32),
            _array(list(held64), np.int32), _array(list(held64.values()), np.uint64), len(held64),
            _array(program.parameters, np.int32), len(program.parameters),
            program.words, program.threads,
        )  # fmt: skip

    def _operation(self, name: str) -> int:
        if name not in self._operations:
            number = self.library.vgpu_operation(name.encode())
            if number < 0:
                raise UnknownPtx(f"the machine has no operation {name}")
            self._operations[name] = number
        return self._operations[name]

    def prepare(self, order: Order, spans: Sequence[tuple[int, int]], seed: int = 1) -> None:
        """Sets how the next launch runs, and the memory (address, bytes) that it may touch."""
        self.library.vgpu_mode(
            order.flags, order.warps, order.blocks, ctypes.c_uint32(order.poison),
            ctypes.c_uint64(seed),
        )  # fmt: skip
        begins, sizes = ([span[n] for span in spans] for n in (0, 1))
        self.library.vgpu_ranges(_array(begins, np.uint64), _array(sizes, np.uint64), len(spans))

    def only(self, blocks: Sequence[int] = ()) -> None:
        """Makes launches run these blocks alone, by number; all of them if none is named."""
        self.library.vgpu_only(_array(list(blocks), np.uint32), len(blocks))

    def error(self) -> str:
        """Returns why the last launch that failed did."""
        return self.library.vgpu_error().decode()

    def executed(self) -> int:
        """Returns how many instructions warps have executed."""
        return self.library.vgpu_executed()

    def take_findings(self) -> list[Finding]:
        """Returns what was found since the last call."""
        size = self.library.vgpu_findings(None, ctypes.c_uint64(0))
        held = ctypes.create_string_buffer(size)
        self.library.vgpu_findings(held, ctypes.c_uint64(size))
        self.library.vgpu_forget_findings()
        rows = [line.split("\t") for line in held.value.decode().splitlines()]
        return [
            Finding(k, n, int(times), int(at), int(line), t) for k, n, times, at, line, t in rows
        ]


@cache
def the_machine(state: Path) -> Machine:
    """Returns the machine of a state folder, compiled when it is first asked for."""
    return Machine(state / "virtual_gpu")


def _sums(counts: Iterable[int]) -> list[int]:
    """Returns for each count the sum of those before it."""
    sums = [0]
    for count in counts:
        sums.append(sums[-1] + count)
    return sums[:-1]


def _array(values: Sequence[object], kind: type) -> object:
    """Returns a pointer to the values, which lives as long as the array does."""
    array = np.ascontiguousarray(np.array(values, dtype=kind).ravel())
    return np.ctypeslib.as_ctypes(array) if array.size else None
