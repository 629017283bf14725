"""Reads what a cubin says of itself from the bytes of its ELF file, without any tool of NVIDIA.

Containers differ by architecture and toolkit (docs/reference/kernels.md 1): up to sm_90 the toolkit
is the ELF version and the architecture the lowest byte of the flags; from sm_100 on the toolkit is
in a note and the architecture in the second byte.
"""

import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass

from kernels.spec import BuildError

OLD_CONTAINER, NEW_CONTAINER = (0x33, 7), (0x41, 8)  # OS/ABI, ABI version

# Attributes in the .nv.info sections.
_FRAME_SIZE, _REGISTERS, _PARAMETER, _BLOCK = 0x11, 0x2F, 0x17, 0x10
_WITH_SIZE = 4  # format of an attribute that is followed by its bytes


@dataclass(frozen=True, slots=True)
class Elf:
    """A cubin with one kernel."""

    container: tuple[int, int]  # OS/ABI, ABI version
    capability: int  # 89, 90, 120
    toolkit: str  # "12.8"
    target: str | None  # what ptxas was told ("sm_120a"); only the new container keeps it
    entry: str
    parameter_bytes: tuple[int, ...]  # sizes of all arguments in order, hidden ones too
    registers: int  # those of a thread
    frame_bytes: int  # local memory a thread needs: spills and arrays
    threads: int  # in a block, as required by the kernel
    text_bytes: int  # machine code
    debug_bytes: int  # line tables and source names; not the frame table, which is always there


@dataclass(frozen=True, slots=True)
class _Section:
    name: str
    data: bytes
    link: int


def read_elf(data: bytes) -> Elf:
    """Reads a cubin. Raises `BuildError` for bytes that are not one with exactly one kernel."""
    try:
        return _read(data)
    except (struct.error, IndexError, KeyError, UnicodeDecodeError, ValueError) as error:
        raise BuildError(f"{len(data)} bytes are not a whole cubin: {error}") from error


def _read(data: bytes) -> Elf:
    if data[:5] != b"\x7fELF\x02":
        raise ValueError("they do not begin as a 64-bit ELF file")
    sections = _sections(data)
    by_name = {section.name: section for section in sections}
    entries = [name.removeprefix(".nv.info.") for name in by_name if name.startswith(".nv.info.")]
    if len(entries) != 1:
        raise ValueError(f"{len(entries)} kernels instead of one")
    entry = entries[0]
    container = (data[7], data[8])
    (version,) = struct.unpack_from("<I", data, 20)
    (flags,) = struct.unpack_from("<I", data, 48)
    note = by_name[".note.nv.tkinfo"].data if ".note.nv.tkinfo" in by_name else b""
    if container == OLD_CONTAINER:
        toolkit, target, capability = f"{version // 10}.{version % 10}", None, flags & 0xFF
    else:
        toolkit, target = _noted(rb"release (\d+\.\d+), V", note), _noted(rb"-arch (\w+)", note)
        capability = flags >> 8 & 0xFF
    own = dict(_attributes(by_name[f".nv.info.{entry}"].data))
    shared = _of_kernel(by_name[".nv.info"].data, _symbols(sections, by_name), entry)
    return Elf(
        container=container,
        capability=capability,
        toolkit=toolkit,
        target=target,
        entry=entry,
        parameter_bytes=_parameter_bytes(by_name[f".nv.info.{entry}"].data),
        registers=shared[_REGISTERS],
        frame_bytes=shared[_FRAME_SIZE],
        threads=struct.unpack_from("<3I", own[_BLOCK])[0],
        text_bytes=len(by_name[f".text.{entry}"].data),
        debug_bytes=sum(
            len(section.data)
            for section in sections
            if "debug" in section.name and not section.name.endswith("debug_frame")
        ),
    )


def _sections(data: bytes) -> list[_Section]:
    (table,) = struct.unpack_from("<Q", data, 40)
    size, count, names_at = struct.unpack_from("<HHH", data, 58)
    (segments,) = struct.unpack_from("<Q", data, 32)
    segment_size, segment_count = struct.unpack_from("<HH", data, 54)
    if segments + segment_size * segment_count > len(data):
        raise ValueError("the table of segments goes beyond their end")
    headers = [struct.unpack_from("<IIQQQQIIQQ", data, table + i * size) for i in range(count)]
    names = headers[names_at][4]
    sections = []
    for name, kind, _, _, offset, length, link, *_ in headers:
        held = 0 if kind == 8 else length  # 8: memory that the file does not hold
        if offset + held > len(data):
            raise ValueError("a section goes beyond their end")
        sections.append(_Section(_text(data, names + name), data[offset : offset + held], link))
    return sections


def _text(data: bytes, start: int) -> str:
    return data[start : data.index(b"\0", start)].decode("ascii")


def _noted(pattern: bytes, note: bytes) -> str:
    found = re.search(pattern, note)
    if not found:
        raise ValueError(f"no note that matches {pattern.decode()}")
    return found[1].decode("ascii")


def _symbols(sections: list[_Section], by_name: dict[str, _Section]) -> list[str]:
    table = by_name[".symtab"]
    names = sections[table.link].data
    return [
        _text(names, struct.unpack_from("<I", table.data, at)[0])
        for at in range(0, len(table.data), 24)
    ]


def _attributes(data: bytes) -> Iterator[tuple[int, bytes]]:
    at = 0
    while at + 4 <= len(data):
        layout, attribute, size = struct.unpack_from("<BBH", data, at)
        at += 4
        if layout == _WITH_SIZE:
            yield attribute, data[at : at + size]
            at += size


def _of_kernel(info: bytes, symbols: list[str], entry: str) -> dict[int, int]:
    """Picks the attributes of one kernel from those of the whole cubin."""
    found = {}
    for attribute, value in _attributes(info):
        if attribute in (_REGISTERS, _FRAME_SIZE):
            symbol, number = struct.unpack_from("<II", value)
            if symbols[symbol] == entry:
                found[attribute] = number
    return found


def _parameter_bytes(info: bytes) -> tuple[int, ...]:
    sizes = {}
    for attribute, value in _attributes(info):
        if attribute == _PARAMETER:
            _, index, _, packed = struct.unpack_from("<IHHI", value)
            sizes[index] = packed >> 18
    return tuple(sizes[index] for index in range(len(sizes)))
