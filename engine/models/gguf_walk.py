"""The header of a GGUF file, walked and checked before any byte is taken for a weight.

docs/reference/formats.md 6.1 has the container. Counts, sizes and places come from a stranger: each
is compared with what the file has before it is used, and nothing is read of the tensors.
"""

import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import BinaryIO, NamedTuple

from engine.errors import BadCheckpoint

MAGIC = b"GGUF"
ORIGINAL_SHAPE = "comfy.gguf.orig_shape."  # before the name of a tensor whose axes were joined
_VERSIONS = (2, 3)  # one layout; the first had counts of 32 bits
_MOST_TENSORS, _MOST_ENTRIES, _MOST_AXES = 1 << 16, 1 << 16, 8
_MOST_HEADER_BYTES, _MOST_NAME_BYTES = 8 << 20, 1024
_MOST_VALUES = 1 << 40  # of a tensor
_ALIGNMENTS = tuple(8 << n for n in range(14))
_SPLIT = "split.count"
# value types of the header: what struct calls them; 8 is text, 9 an array
_NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "B", 10: "Q", 11: "q",
            12: "d"}  # fmt: skip
_TEXT, _ARRAY = 8, 9


class BlockType(NamedTuple):
    """How a type stores values: so many in a block of so many bytes."""

    name: str
    values: int
    nbytes: int


TYPES: Mapping[int, BlockType] = {
    number: BlockType(*row)
    for number, row in {
        0: ("F32", 1, 4), 1: ("F16", 1, 2), 30: ("BF16", 1, 2),
        2: ("Q4_0", 32, 18), 3: ("Q4_1", 32, 20), 6: ("Q5_0", 32, 22), 7: ("Q5_1", 32, 24),
        8: ("Q8_0", 32, 34), 10: ("Q2_K", 256, 84), 11: ("Q3_K", 256, 110),
        12: ("Q4_K", 256, 144), 13: ("Q5_K", 256, 176), 14: ("Q6_K", 256, 210),
        16: ("IQ2_XXS", 256, 66), 17: ("IQ2_XS", 256, 74), 18: ("IQ3_XXS", 256, 98),
        19: ("IQ1_S", 256, 50), 20: ("IQ4_NL", 32, 18), 21: ("IQ3_S", 256, 110),
        22: ("IQ2_S", 256, 82), 23: ("IQ4_XS", 256, 136), 29: ("IQ1_M", 256, 56),
        34: ("TQ1_0", 256, 54), 35: ("TQ2_0", 256, 66), 39: ("MXFP4", 32, 17),
    }.items()
}  # fmt: skip


class GgufTensor(NamedTuple):
    """One tensor of the file, as it lies there."""

    name: str
    type: BlockType
    shape: tuple[int, ...]  # in values, the fastest axis last
    start: int  # of its bytes in the file
    nbytes: int


@dataclass(frozen=True, slots=True)
class GgufHeader:
    """All that the header tells and that is of use here."""

    tensors: tuple[GgufTensor, ...]
    texts: Mapping[str, str] = field(default_factory=dict)  # entries that are text
    shapes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)  # whose axes were joined
    unused_bytes: int = 0  # between and behind the tensors


def walk(path: Path) -> GgufHeader:
    """Reads the header of a file. Raises `BadCheckpoint` for all that cannot be as it says."""
    size = path.stat().st_size
    with path.open("rb") as file:
        cursor = _Cursor(path.name, file, min(size, _MOST_HEADER_BYTES))
        try:
            return _walk(cursor, size)
        except (UnicodeDecodeError, struct.error) as error:
            raise cursor.error(f"cannot be read as GGUF at byte {cursor.place}: {error}") from error


def _walk(cursor: "_Cursor", size: int) -> GgufHeader:
    if (magic := cursor.take(4)) != MAGIC:
        raise cursor.error(f"begins with {magic!r}, not with {MAGIC!r}")
    if (version := cursor.number("I")) not in _VERSIONS:
        raise cursor.error(f"says that it is GGUF of version {version}; 2 or 3 is expected")
    count, entries = cursor.number("Q"), cursor.number("Q")
    if not 0 < count <= _MOST_TENSORS or entries > _MOST_ENTRIES:
        raise cursor.error(f"says that it has {count} tensors and {entries} entries")
    told: dict[str, object] = {}
    for _ in range(entries):
        name = cursor.text(_MOST_NAME_BYTES)
        if name in told:
            raise cursor.error(f"tells {name[:80]} twice")
        told[name] = cursor.value(cursor.number("I"))
    if told.get(_SPLIT) not in (None, 0, 1):
        raise cursor.error(
            f"is one of {told[_SPLIT]} parts of a model, which are not read; join them first "
            "(gguf-split --merge)"
        )
    alignment = told.get("general.alignment", 32)
    if alignment not in _ALIGNMENTS:
        raise cursor.error(f"aligns its tensors to {str(alignment)[:40]} bytes")
    assert isinstance(alignment, int)
    places = [_tensor(cursor) for _ in range(count)]
    data = -(-cursor.place // alignment) * alignment
    tensors = tuple(tensor._replace(start=data + tensor.start) for tensor in places)
    if odd := next((t.name for t in tensors if (t.start - data) % alignment), None):
        raise cursor.error(f"has {odd[:80]} at no multiple of {alignment} bytes")
    unused = _gaps(cursor, tensors, data, size, alignment)
    texts = {name: value for name, value in told.items() if isinstance(value, str)}
    return GgufHeader(tensors, texts, _original_shapes(cursor, told, tensors), unused)


def _tensor(cursor: "_Cursor") -> GgufTensor:
    """One tensor's row of the header; `start` is still counted from where the data begin."""
    name, axes = cursor.text(_MOST_NAME_BYTES), cursor.number("I")
    if not name.isprintable():
        raise cursor.error(f"has a tensor of the name {name[:40]!r}")
    if axes > _MOST_AXES:
        raise cursor.error(f"has {name[:80]} with {axes} axes; at most {_MOST_AXES} are expected")
    shape = tuple(reversed([cursor.number("Q") for _ in range(axes)]))
    number, start = cursor.number("I"), cursor.number("Q")
    if number not in TYPES:
        raise cursor.error(
            f"has {name[:80]} in a type {number} that is not read; of GGUF's types "
            f"{', '.join(kind.name for kind in TYPES.values())} are"
        )
    kind, values = TYPES[number], math.prod(shape)
    if not 0 < values <= _MOST_VALUES:
        raise cursor.error(f"has {name[:80]} of the shape {list(shape)}")
    if (shape[-1] if shape else 1) % kind.values:
        raise cursor.error(
            f"has {name[:80]} of the shape {list(shape)} in {kind.name}, whose rows are multiples "
            f"of {kind.values}"
        )
    return GgufTensor(name, kind, shape, start, values // kind.values * kind.nbytes)


def _gaps(
    cursor: "_Cursor", tensors: tuple[GgufTensor, ...], data: int, size: int, alignment: int
) -> int:
    """The bytes that no tensor has. Raises if two share some, or if one reaches out of the file."""
    names = [tensor.name for tensor in tensors]
    if len(set(names)) < len(names):
        raise cursor.error(f"has {max(names, key=names.count)[:80]} twice")
    order = sorted(tensors, key=lambda tensor: tensor.start)
    for tensor in order:
        if tensor.start + tensor.nbytes > size:
            raise cursor.error(
                f"is cut short: {tensor.name[:80]} ends at byte {tensor.start + tensor.nbytes} of "
                f"{size}"
            )
    for before, after in pairwise(order):
        if before.start + before.nbytes > after.start:
            raise cursor.error(f"has {before.name[:80]} and {after.name[:80]} in the same bytes")
    ends = [data, *(tensor.start + tensor.nbytes for tensor in order)]
    gaps = [begin - end for end, begin in zip(ends, [*(t.start for t in order), size])]
    return sum(gap for gap in gaps if gap >= alignment)


def _original_shapes(
    cursor: "_Cursor", told: Mapping[str, object], tensors: tuple[GgufTensor, ...]
) -> dict[str, tuple[int, ...]]:
    """The shapes of tensors whose axes a writer joined, by their names."""
    held = {tensor.name: math.prod(tensor.shape) for tensor in tensors}
    found = {}
    for key, value in told.items():
        name = key.removeprefix(ORIGINAL_SHAPE)
        if name == key:
            continue
        shape = value if isinstance(value, tuple) and 0 < len(value) <= _MOST_AXES else ()
        is_whole = all(isinstance(size, int) and 0 < size <= _MOST_VALUES for size in shape)
        if name not in held or not is_whole or math.prod(shape) != held[name]:
            raise cursor.error(
                f"tells the shape {str(value)[:60]} for {name[:80]}, which has "
                f"{held.get(name, 'no')} values"
            )
        found[name] = tuple(int(size) for size in shape)
    return found


class _Cursor:
    """Reads a header from its beginning, and no byte beyond a limit."""

    def __init__(self, name: str, file: BinaryIO, limit: int) -> None:
        self._name, self._file, self._limit, self.place = name, file, limit, 0

    def error(self, what: str) -> BadCheckpoint:
        return BadCheckpoint(f"{self._name} {what}. Fetch it again, or use a .safetensors copy.")

    def take(self, count: int) -> bytes:
        if count > self._limit - self.place:
            raise self.error(
                f"is damaged, cut short or no GGUF file: its header asks for {count} bytes at byte "
                f"{self.place}, where {self._limit - self.place} are left for it"
            )
        self.place += count
        return self._file.read(count)

    def number(self, form: str) -> int:
        return struct.unpack(f"<{form}", self.take(struct.calcsize(form)))[0]

    def text(self, most: int) -> str:
        if (count := self.number("Q")) > most:
            raise self.error(f"has a text of {count} bytes in its header; {most} are expected")
        return self.take(count).decode("utf-8")

    def value(self, kind: int) -> object:
        """A value of the header: a number, a text, or a tuple of numbers; texts in arrays go by."""
        if kind in _NUMBERS:
            return self.number(_NUMBERS[kind])
        if kind == _TEXT:
            return self.text(_MOST_HEADER_BYTES)
        if kind != _ARRAY:
            raise self.error(f"has an entry of a type {kind} that GGUF does not have")
        inner, count = self.number("I"), self.number("Q")
        if inner in _NUMBERS:
            data = self.take(count * struct.calcsize(_NUMBERS[inner]))
            return struct.unpack(f"<{count}{_NUMBERS[inner]}", data)
        if inner != _TEXT:
            raise self.error(f"has an array of a type {inner}, which is not read")
        for _ in range(count):  # each takes eight bytes at least, so that a wrong count ends soon
            self.text(_MOST_HEADER_BYTES)
        return None
