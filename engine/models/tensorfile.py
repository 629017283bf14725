"""A file of tensors, whatever its container: safetensors, sharded or whole, or a PyTorch zip.

Files are memory-mapped. Tensors are handed out one at a time and their pages are given back to
the system after use, so reading a 33 GB file needs little memory of its own.
"""

import ctypes
import json
import mmap
import pickle
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from engine.errors import BadCheckpoint, MissingModel

_SHARD = re.compile(r"(?P<stem>.+)-(?P<part>\d{5})-of-(?P<parts>\d{5})\.safetensors")
_LIBC = ctypes.CDLL(None, use_errno=True)
_TINY_BYTES = 1 << 16  # not worth a system call


class TensorFile:
    """Names, shapes and tensors of one checkpoint: a file, any of its shards, or their index.

    Raises `MissingModel` if the file or a shard is not there, `BadCheckpoint` if it cannot be read.
    """

    def __init__(self, path: Path, *more: Path, top_key: str | None = None) -> None:
        """`more`: shards that their names do not tell. `top_key`: where a PyTorch file that holds
        more than the weights keeps them.
        """
        self.path = path
        self.metadata: dict[str, str] = {}
        self._tensors: dict[str, _Entry] = {}
        for part in dict.fromkeys(part for named in (path, *more) for part in _parts(named)):
            self._open(part, top_key)

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __contains__(self, name: object) -> bool:
        return name in self._tensors

    def __len__(self) -> int:
        return len(self._tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._tensors[name].shape

    @contextmanager
    def open(self, name: str) -> Iterator[Tensor]:
        """The tensor as stored; it must not be used after the block, nor written to."""
        try:
            tensor = self._tensors[name].read()
        except (SafetensorError, RuntimeError, OSError) as error:
            raise BadCheckpoint(f"{self.path.name}: {name} cannot be read: {error}") from error
        try:
            yield tensor
        finally:
            _forget(tensor)

    def _open(self, part: Path, top_key: str | None) -> None:
        if not part.is_file():
            raise MissingModel(f"There is no file {part}.")
        if part.suffix == ".safetensors":
            self._open_safetensors(part)
        elif part.suffix in (".pt", ".pth", ".bin"):
            self._open_pickle(part, top_key)
        else:
            raise BadCheckpoint(
                f"{part.name} is neither a .safetensors nor a .pt, .pth or .bin file; "
                "GGUF and other containers are not read."
            )

    def _open_safetensors(self, part: Path) -> None:
        try:
            handle = safe_open(part, framework="pt")
        except (SafetensorError, OSError) as error:
            raise BadCheckpoint(
                f"{part.name} is damaged or cut short ({part.stat().st_size} bytes): {error}"
            ) from error
        self.metadata |= handle.metadata() or {}
        for name in handle.keys():  # noqa: SIM118 - not a dict
            shape = tuple(handle.get_slice(name).get_shape())
            self._add(name, _Entry(shape, partial(handle.get_tensor, name)), part)

    def _open_pickle(self, part: Path, top_key: str | None) -> None:
        try:
            held = torch.load(part, map_location="cpu", mmap=True, weights_only=True)
        except (RuntimeError, pickle.UnpicklingError, EOFError, OSError, ValueError) as error:
            reason = str(error).splitlines()[0]
            raise BadCheckpoint(
                f"{part.name} is damaged, cut short or holds more than tensors "
                f"({part.stat().st_size} bytes): {reason}"
            ) from error
        if top_key is not None and isinstance(held, Mapping) and top_key in held:
            held = held[top_key]
        if not isinstance(held, Mapping):
            raise BadCheckpoint(f"{part.name} holds a {type(held).__name__}, not named tensors.")
        for name, value in held.items():
            if isinstance(value, Tensor):
                self._add(str(name), _Entry(tuple(value.shape), value.detach), part)

    def _add(self, name: str, entry: "_Entry", part: Path) -> None:
        if name in self._tensors:
            raise BadCheckpoint(f"{part.name}: {name} is already in another file of the set.")
        self._tensors[name] = entry


@dataclass(frozen=True, slots=True)
class _Entry:
    shape: tuple[int, ...]
    read: Callable[[], Tensor]


def _parts(path: Path) -> list[Path]:
    """The files of a set, from the name of any one of them, or of its index."""
    if path.name.endswith(".safetensors.index.json"):
        try:
            names = set(json.loads(path.read_text())["weight_map"].values())
        except FileNotFoundError as error:
            raise MissingModel(f"There is no file {path}.") from error
        except (ValueError, KeyError, AttributeError, OSError) as error:
            raise BadCheckpoint(f"{path.name} is not an index of shards: {error!r}") from error
        return [path.with_name(Path(name).name) for name in sorted(names)]
    shard = _SHARD.fullmatch(path.name)
    if shard is None:
        return [path]
    parts = int(shard["parts"])
    return [
        path.with_name(f"{shard['stem']}-{part:05d}-of-{parts:05d}.safetensors")
        for part in range(1, parts + 1)
    ]


def _forget(tensor: Tensor) -> None:
    """Give the pages that lie wholly inside a mapped tensor back; a later read maps them again."""
    start, size = tensor.data_ptr(), tensor.nbytes
    if size < _TINY_BYTES or tensor.device.type != "cpu":
        return
    page = mmap.PAGESIZE
    first = -(-start // page) * page
    last = (start + size) // page * page
    if last > first:
        _LIBC.madvise(ctypes.c_void_p(first), ctypes.c_size_t(last - first), mmap.MADV_DONTNEED)
