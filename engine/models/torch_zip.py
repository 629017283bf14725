"""The zip archive that a PyTorch file is, checked before its bytes are taken for tensors.

`torch.load` with `mmap` maps the bytes of each member as they lie in the file. It asks neither if
they are compressed or encrypted, nor if a tensor is as long as its member: such a file would be
read as garbage without a word.
"""

import os
import struct
import sys
import zipfile
from collections.abc import Iterable, Mapping
from io import FileIO
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

from torch import Tensor

from engine.errors import BadCheckpoint

_LOCAL = struct.Struct("<4sHHHHHIIIHH")  # a member's own header
_ENCRYPTED = 0x1 | 0x40
_BYTE_ORDER = "byteorder"  # the last part of the name of the member that tells it
_SHOWN_BYTES = 16
# PyTorch reads so much at each of a thousand headers. What is in memory by then needs no reading
# ahead, which would be many times more
_READ_BYTES = 8192
_AGAIN = "Save it again with torch.save, or use a .safetensors copy."
# zipfile raises these on damaged archives
_DAMAGE = (
    zipfile.BadZipFile, NotImplementedError, struct.error, ValueError, LookupError, OverflowError,
    EOFError, OSError,
)  # fmt: skip


class Member(NamedTuple):
    """The bytes of one member of an archive, in the file."""

    start: int
    nbytes: int


def stored_members(path: Path) -> Mapping[str, Member]:
    """Where the members of a PyTorch file lie.

    Raises `BadCheckpoint` if one is compressed or encrypted, if they overlap, are named twice, or
    do not lie in the file as the archive's directory says, or if the bytes of their numbers are
    in another order than here: what is mapped is not turned.
    """
    try:
        with zipfile.ZipFile(path) as archive, path.open("rb", buffering=0) as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_RANDOM)
            infos = archive.infolist()
            held = {info.filename: _member(path, file, info) for info in infos}
            end = archive.start_dir
            byte_orders = [
                archive.open(info).read(_SHOWN_BYTES)
                for info in infos
                if info.filename.endswith(f"/{_BYTE_ORDER}")
            ]
    except _DAMAGE as error:
        raise BadCheckpoint(
            f"{path.name} is damaged or cut short ({path.stat().st_size} bytes), its zip archive "
            f"cannot be read: {error}. Fetch it again."
        ) from error
    if other := [told for told in byte_orders if told != sys.byteorder.encode()]:
        raise BadCheckpoint(
            f"{path.name} was written with its bytes in the order {other[0]!r}, {sys.byteorder} is "
            "expected: its numbers would be read as others. Use a .safetensors copy."
        )
    order = sorted((info.header_offset, *held[info.filename]) for info in infos)
    ends = [(start + nbytes, after[0]) for (_, start, nbytes), after in pairwise(order)]
    ends += [(start + nbytes, end) for _, start, nbytes in order[-1:]]
    # bytes before the first member would shift those that the directory names
    if len(held) != len(infos) or (order[:1] and order[0][0]) or any(a > b for a, b in ends):
        raise BadCheckpoint(
            f"{path.name} is a zip archive whose members overlap, are named twice or begin behind "
            f"other bytes. {_AGAIN}"
        )
    return held


def _member(path: Path, file: FileIO, info: zipfile.ZipInfo) -> Member:
    head = os.pread(file.fileno(), _READ_BYTES, info.header_offset)[: _LOCAL.size]
    magic, _, flags, method, *_, name, extra = _LOCAL.unpack(head)
    if magic != b"PK\x03\x04":
        raise zipfile.BadZipFile(f"there is no member {info.filename[:80]} where it should be")
    if (flags | info.flag_bits) & _ENCRYPTED:
        raise BadCheckpoint(f"{path.name}: {info.filename[:80]} is encrypted. {_AGAIN}")
    if {method, info.compress_type} != {zipfile.ZIP_STORED} or info.compress_size != info.file_size:
        raise BadCheckpoint(
            f"{path.name}: {info.filename[:80]} is compressed; PyTorch files are mapped into "
            f"memory, so their members must be stored as they are. {_AGAIN}"
        )
    return Member(info.header_offset + _LOCAL.size + name + extra, info.file_size)


def require_whole_storages(
    path: Path, members: Mapping[str, Member], tensors: Iterable[Tensor]
) -> None:
    """Raises `BadCheckpoint` unless the bytes under each mapped tensor are those of one member.

    Where the mapping begins nobody tells: it is the address from which all of them fit.
    """
    storages = [tensor.untyped_storage() for tensor in tensors if not tensor.is_meta]
    mapped = {(held.data_ptr(), held.nbytes()) for held in storages if held.nbytes()}
    places = {(member.start, member.nbytes) for member in members.values()}
    first = min(mapped, default=None)
    if first is not None and not any(
        all((address - base, nbytes) in places for address, nbytes in mapped)
        for base in {first[0] - start for start, nbytes in places if nbytes == first[1]}
    ):
        raise BadCheckpoint(
            f"{path.name}: its tensors are longer or shorter than what is stored for them. {_AGAIN}"
        )
