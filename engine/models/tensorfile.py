"""A file of tensors, whatever its container: safetensors (sharded or whole), PyTorch zip, or GGUF.

Files are memory-mapped. Tensors are handed out one at a time and their pages are given back to
the system after use, so reading a 33 GB file needs little memory of its own.
"""

import ctypes
import json
import logging
import math
import mmap
import os
import re
import stat
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from engine.errors import BadCheckpoint, MissingModel
from engine.models import gguf_walk, safetensors_walk
from engine.models.gguf_walk import BlockType, GgufTensor
from engine.models.safetensors_walk import StoredTensor
from engine.models.torch_pickle import load_plain
from engine.models.torch_zip import require_whole_storages

log = logging.getLogger(__name__)

_SHARD = re.compile(r"(?P<stem>.+)-(?P<part>[0-9]{5})-of-(?P<parts>[0-9]{5})\.safetensors")
_GGUF = b"GGUF"
_ZIP = b"PK\x03\x04"  # how PyTorch files begin since 1.6
_OLD_PICKLE = b"\x80"  # how they began before
_LIBC = ctypes.CDLL(None, use_errno=True)
# types as safetensors calls them
_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "F8_E8M0": torch.float8_e8m0fnu,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz, "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8,
    "U64": torch.uint64, "U32": torch.uint32, "U16": torch.uint16, "U8": torch.uint8,
    "BOOL": torch.bool, "C64": torch.complex64,
}  # fmt: skip
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
FP8 = ("F8_E4M3", "F8_E5M2")
_PLAIN_GGUF = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
# entries of the metadata that describe how a file came to be, and change nothing in its use
_DESCRIPTIVE = re.compile(
    r"format|format_version|ss_.*|sshs_.*|modelspec\..*|general\..*|quantize\..*|comfy\.gguf\..*",
    re.DOTALL,
)
_TINY_BYTES = 1 << 16  # not worth a system call


class TensorFile:
    """Names, shapes and tensors of one checkpoint: a file, any of its shards, or their index.

    Raises `MissingModel` if the file or a shard is not there, `BadCheckpoint` if it cannot be read,
    is damaged, or holds tensors that are not plain (sparse, quantised, without data).
    """

    def __init__(self, path: Path, *more: Path, top_key: str | None = None) -> None:
        """`more`: shards whose names do not say that they belong together. `top_key`: the key
        under which a PyTorch file keeps the weights if it holds more than them.
        """
        self.path = path
        self.metadata: dict[str, str] = {}
        self.left_out: list[str] = []  # names in a PyTorch file under which no tensor lies
        self.beside: list[str] = []  # keys of a PyTorch file beside its `top_key`
        self._tensors: dict[str, _Entry] = {}
        self.files = tuple(dict.fromkeys(p for named in (path, *more) for p in _parts(named)))
        for part in self.files:
            self._open(part, top_key)

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __contains__(self, name: object) -> bool:
        return name in self._tensors

    def __len__(self) -> int:
        return len(self._tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._tensors[name].shape

    def dtype(self, name: str) -> str:
        """The type as safetensors calls it, "F8_E4M3", whatever the container; "Q4_K" for blocks
        of a GGUF file.
        """
        return self._tensors[name].dtype

    def blocks(self, name: str) -> "Blocks | None":
        """How the values of a tensor lie in its bytes; None if it holds them as they are."""
        return self._tensors[name].blocks

    def warn_of_metadata(self, *used: str) -> None:
        """Names the entries of the metadata that nothing reads and that might mean something."""
        known = (name for name in self.metadata if name not in used)
        unused = [name for name in known if not _DESCRIPTIVE.fullmatch(name)]
        if unused:
            some = ", ".join(name[:40] for name in unused[:20])
            log.warning("%s: its metadata %s are not used", self.path.name, some)

    def few_bytes(self, name: str) -> bytes:
        """The bytes of a small tensor, without touching those around it: what lies in a mapped
        file is read by the megabyte.
        """
        place = self._tensors[name].place
        if place is None:
            with self.open(name) as tensor:
                return tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes()
        path, start, nbytes = place
        with path.open("rb", buffering=0) as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_RANDOM)
            return os.pread(file.fileno(), nbytes, start)

    @contextmanager
    def open(self, name: str) -> Iterator[Tensor]:
        """The tensor as stored; it must not be used after the block, nor written to."""
        try:
            tensor = self._tensors[name].read()
        except (RuntimeError, OSError) as error:
            raise BadCheckpoint(f"{self.path.name}: {name} cannot be read: {error}") from error
        try:
            yield tensor
        finally:
            _forget(tensor)

    def _open(self, part: Path, top_key: str | None) -> None:
        head = _head(part)
        if part.suffix == ".safetensors" and head != _GGUF:
            self._open_safetensors(part)
        elif part.suffix in (".pt", ".pth", ".bin") and head != _GGUF:
            self._open_pickle(part, head, top_key)
        elif part.suffix == ".gguf" or head == _GGUF:
            self._open_gguf(part)
        else:
            raise BadCheckpoint(
                f"{part.name} is neither a .safetensors nor a .gguf, .pt, .pth or .bin file; other "
                "containers are not read."
            )

    def _open_safetensors(self, part: Path) -> None:
        header = safetensors_walk.walk(part)
        data = _mapped(part)
        self.metadata |= header.metadata
        for name, tensor in header.tensors.items():
            read = partial(_plain_tensor, data, tensor)
            place = part, tensor.start, tensor.nbytes
            self._add(name, _Entry(tensor.shape, tensor.dtype, read, place=place), part)

    def _open_pickle(self, part: Path, head: bytes, top_key: str | None) -> None:
        if head.startswith(_OLD_PICKLE):
            raise BadCheckpoint(
                f"{part.name} is a bare pickle, as PyTorch before 1.6 wrote them, which cannot be "
                "mapped; save it again with a newer PyTorch, or use a .safetensors copy."
            )
        if head != _ZIP:
            raise BadCheckpoint(
                f"{part.name} is no PyTorch file ({part.stat().st_size} bytes): it begins with "
                f"{head!r}, not as the zip archive that is expected. Fetch it again."
            )
        held, members = load_plain(part)
        if top_key is not None and isinstance(held, Mapping) and top_key in held:
            self.beside += [str(name) for name in held if name != top_key]
            held = held[top_key]
        if not isinstance(held, Mapping):
            raise BadCheckpoint(f"{part.name} holds one {type(held).__name__}, not named tensors.")
        tensors = {str(name): held for name, held in held.items() if isinstance(held, Tensor)}
        for name, tensor in tensors.items():
            _require_plain(tensor, f"{part.name}: {name}")
            dtype = _NAMES.get(tensor.dtype, str(tensor.dtype))
            entry = _Entry(tuple(tensor.shape), dtype, tensor.detach)
            self._add(name, entry, part)
        self.left_out += [str(name) for name in held if str(name) not in tensors]
        require_whole_storages(part, members, tensors.values())

    def _open_gguf(self, part: Path) -> None:
        header = gguf_walk.walk(part)
        data = _mapped(part)
        self.metadata |= header.texts
        if header.unused_bytes:
            log.warning("%s: %d bytes in it belong to no tensor", part.name, header.unused_bytes)
        for tensor in header.tensors:
            shape = header.shapes.get(tensor.name, tensor.shape)
            self._add(tensor.name, _gguf_entry(data, tensor, shape), part)

    def _add(self, name: str, entry: "_Entry", part: Path) -> None:
        if not name.isprintable():
            raise BadCheckpoint(f"{part.name} has a tensor of the name {name[:40]!r}.")
        if name in self._tensors:
            raise BadCheckpoint(f"{part.name}: {name} is already in another file of the set.")
        self._tensors[name] = entry


@dataclass(frozen=True, slots=True)
class Blocks:
    """The values of a GGUF tensor, whose bytes are the rows [rows, bytes a row] of a U8 tensor."""

    type: BlockType
    shape: tuple[int, ...]  # of the values


@dataclass(frozen=True, slots=True)
class _Entry:
    shape: tuple[int, ...]
    dtype: str
    read: Callable[[], Tensor]
    blocks: Blocks | None = None
    place: tuple[Path, int, int] | None = None  # file, first byte, bytes


def _mapped(part: Path) -> Tensor:
    """The bytes of a file, none of them read and none to be written: a mapping that could be is
    counted as memory, and a system without so much would refuse it.
    """
    try:
        with part.open("rb") as file:
            data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except (ValueError, OSError) as error:
        raise BadCheckpoint(f"{part.name} cannot be mapped into memory: {error}") from error
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The given buffer is not writable", UserWarning)
        return torch.frombuffer(data, dtype=torch.uint8)


def _plain_tensor(data: Tensor, tensor: StoredTensor) -> Tensor:
    """A tensor of a safetensors file. Raises `RuntimeError` for types smaller than a byte."""
    if tensor.dtype not in _DTYPES:
        raise RuntimeError(
            f"it is stored as {tensor.dtype}, more than one value to a byte, or a type that is not "
            "known here; FP8 is the smallest type that is read"
        )
    held, dtype = data[tensor.start : tensor.start + tensor.nbytes], _DTYPES[tensor.dtype]
    if tensor.start % dtype.itemsize:  # of a header that was not filled up
        held = held.clone()
    return held.view(dtype).view(tensor.shape)


def _gguf_entry(data: Tensor, tensor: GgufTensor, shape: tuple[int, ...]) -> _Entry:
    """A tensor of plain numbers in its shape, or the bytes of one in blocks."""
    held = data[tensor.start : tensor.start + tensor.nbytes]
    kind = tensor.type
    if kind.name in _PLAIN_GGUF:
        plain = held.view(_PLAIN_GGUF[kind.name]).view(shape)
        return _Entry(shape, kind.name, plain.detach)
    rows = held.view(-1, (tensor.shape[-1] if tensor.shape else 1) // kind.values * kind.nbytes)
    return _Entry(tuple(rows.shape), kind.name, rows.detach, Blocks(kind, shape))


def _parts(path: Path) -> list[Path]:
    """The files of a set, from the name of any one of them, or of its index."""
    if path.name.endswith(".safetensors.index.json"):
        return _shards(path)
    shard = _SHARD.fullmatch(path.name)
    parts = int(shard["parts"]) if shard else 0
    if shard is None or not 1 <= int(shard["part"]) <= parts:
        return [path]
    return [
        path.with_name(f"{shard['stem']}-{part:05d}-of-{parts:05d}.safetensors")
        for part in range(1, parts + 1)
    ]


def _shards(index: Path) -> list[Path]:
    """The files that an index names, which lie beside it."""
    _head(index)
    try:
        names = set(json.loads(index.read_bytes())["weight_map"].values())
        parts = [index.with_name(Path(name).name) for name in sorted(names)]
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise BadCheckpoint(
            f"{index.name} is not an index of shards; a JSON object is expected whose weight_map "
            "gives the file of each tensor."
        ) from error
    if not parts:
        raise BadCheckpoint(f"{index.name} names no shards: its weight_map is empty.")
    return parts


def _head(path: Path) -> bytes:
    """The first bytes of a file. Says why it cannot be read before a library says it worse."""
    try:
        mode = path.stat().st_mode
        if not stat.S_ISREG(mode):
            what = "a folder" if stat.S_ISDIR(mode) else "a pipe or a device"
            raise BadCheckpoint(f"{path} is {what}; a file of tensors is expected.")
        with path.open("rb") as file:
            head = file.read(len(_ZIP))
    except (FileNotFoundError, NotADirectoryError, ValueError) as error:  # ValueError: a NUL in it
        raise MissingModel(f"There is no file {path}.") from error
    except OSError as error:
        raise BadCheckpoint(f"{path} cannot be read: {error.strerror}.") from error
    if not head:
        raise BadCheckpoint(f"{path.name} is empty (0 bytes); fetch it again.")
    return head


def _require_plain(tensor: Tensor, name: str) -> None:
    if tensor.is_meta:
        raise BadCheckpoint(f"{name} has a shape but no data: it was saved from the meta device.")
    if tensor.layout != torch.strided or tensor.is_nested or tensor.is_quantized:
        kind = "quantised" if tensor.is_quantized else "sparse or nested"
        raise BadCheckpoint(f"{name} is a {kind} tensor; only plain ones are read.")


def is_finite(tensor: Tensor) -> bool:
    """True if no value is NaN or infinite. Takes a tenth of a copy's time and no memory."""
    return all(math.isfinite(extreme.item()) for extreme in torch.aminmax(tensor))


def _forget(tensor: Tensor) -> None:
    """Gives back the pages that lie wholly inside a mapped tensor; a later read maps them again.

    A tensor may be larger than what holds it: an expanded one repeats its values.
    """
    start, storage = tensor.data_ptr(), tensor.untyped_storage()
    size = min(tensor.nbytes, storage.data_ptr() + storage.nbytes() - start)
    if size < _TINY_BYTES:
        return
    page = mmap.PAGESIZE
    first = -(-start // page) * page
    last = (start + size) // page * page
    if last > first:
        _LIBC.madvise(ctypes.c_void_p(first), ctypes.c_size_t(last - first), mmap.MADV_DONTNEED)
