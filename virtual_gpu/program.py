"""A kernel as the machine runs it: numbered operations on places of a register file."""

from dataclasses import dataclass, field

SHARED_BASE = 1024  # where shared memory begins; as in machine/program.hpp

# Words of a warp's register file that a register of a type takes: 32 lanes of one or two words. The
# bits of a predicate are one word; 16 are reserved, so that place / 16 numbers registers.
WORDS = {"pred": 16, "b16": 32, "b32": 32, "b64": 64}


class UnknownPtx(Exception):
    """PTX that the virtual GPU does not know: it must be taught, nothing is skipped."""


@dataclass(frozen=True, slots=True)
class Instruction:
    operation: str  # a name of machine/program.hpp
    guard: int  # 0, or 1 + the place of a predicate, negative where it is negated
    operands: tuple[int, ...]
    line: int  # of the PTX text, from 1


@dataclass(slots=True)
class Program:
    name: str
    threads: int  # of a block
    lines: list[str]  # the PTX text
    code: list[Instruction] = field(default_factory=list)
    constants32: dict[int, int] = field(default_factory=dict)  # place -> bits
    constants64: dict[int, int] = field(default_factory=dict)
    parameters: list[tuple[int, int]] = field(default_factory=list)  # offset, bytes
    words: int = 0  # of a warp's register file, constants included
    opcodes: set[str] = field(default_factory=set)  # as they were read

    def reserve(self, words: int) -> int:
        """Returns the place of so many new words."""
        place = self.words
        self.words += words
        return place
