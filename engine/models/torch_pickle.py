"""Loads the pickle of a PyTorch file without making anything of it but tensors.

Trainers of SCAIL save NumPy's and PyTorch's random states beside the weights, and PyTorch refuses
NumPy's rebuilders. While such a file is loaded, and only then, their names stand for a class that
holds nothing, so that no NumPy object is made of a file (docs/reference/formats.md 7.4).
"""

import pickle
import pickletools
import re
import struct
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path

import torch

from engine.errors import BadCheckpoint
from engine.models.torch_zip import Member, stored_members

_PICKLE = "/data.pkl"
_MOST_BYTES, _MOST_STEPS = 32 << 20, 2_000_000
# what makes tensors, and the plain values that trainers keep beside them
_KNOWN = re.compile(
    r"torch\._utils _rebuild_\w+|torch\._tensor _rebuild_from_type_v2|torch \w+Storage|"
    r"torch\.storage \w+|torch [a-z]\w*|torch Size|torch\.nn\.parameter Parameter|"
    r"torch\.serialization _get_layout|collections (OrderedDict|Counter)|_codecs encode|"
    r"(builtins|__builtin__) set"
)
_NUMPY = re.compile(
    r"numpy\.(core|_core)\.multiarray (_reconstruct|scalar)|numpy (ndarray|dtype)|"
    r"numpy\.dtypes \w+DType"
)
# torch.load raises these on damaged files; its messages advise to let pickles run code
_LOAD_ERRORS = (
    RuntimeError, pickle.UnpicklingError, EOFError, OSError, ValueError, LookupError, TypeError,
    AttributeError, AssertionError, OverflowError, struct.error, zipfile.BadZipFile,
    NotImplementedError, RecursionError,
)  # fmt: skip


_NO_MEMORY = "Cannot allocate memory"


class _Nothing:
    """Stands for an object of NumPy: takes all that it would be made of, and keeps none of it."""

    __slots__ = ()

    def __new__(cls, *_: object) -> "_Nothing":
        return super().__new__(cls)

    def __setstate__(self, _: object) -> None:
        """Forgets the state."""


def load_plain(path: Path) -> tuple[object, Mapping[str, Member]]:
    """What a PyTorch file holds, its tensors mapped into memory, and the members of its archive.

    Raises `BadCheckpoint` for a damaged file, one that would run code, or one whose pickle is too
    large to be a list of tensors.
    """
    try:
        stubs = _stubs(path)
        members = stored_members(path)
        with _replaced(stubs):
            held = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
        return held, members
    except _LOAD_ERRORS as error:
        if _NO_MEMORY in str(error):
            raise BadCheckpoint(
                f"{path.name} ({path.stat().st_size} bytes) cannot be mapped into memory: PyTorch "
                "maps its files so that they could be written, which the system counts as memory. "
                "Use a .safetensors copy, or a machine with more."
            ) from error
        raise BadCheckpoint(
            f"{path.name} is damaged, cut short or holds more than tensors "
            f"({path.stat().st_size} bytes); objects that could run code are never loaded. "
            "Fetch it again, or use a .safetensors copy."
        ) from error


def _stubs(path: Path) -> list[str]:
    """NumPy's names in the pickle. Raises `BadCheckpoint` or an error of pickles for others."""
    found: set[str] = set()
    for pickled in _pickles(path):
        for step, (opcode, value, _) in enumerate(pickletools.genops(BytesIO(pickled))):
            if step >= _MOST_STEPS:
                raise BadCheckpoint(
                    f"{path.name} describes its tensors in more than {_MOST_STEPS} steps; it is no "
                    "list of tensors. Use a .safetensors copy."
                )
            if opcode.name != "GLOBAL":  # the one way to name a thing that PyTorch reads
                continue
            if _NUMPY.fullmatch(str(value)):
                found.add(str(value).replace(" ", "."))
            elif not _KNOWN.fullmatch(str(value)):
                raise pickle.UnpicklingError(f"{value} is neither a tensor nor a plain value")
    return sorted(found)


def _pickles(path: Path) -> Iterator[bytes]:
    with zipfile.ZipFile(path) as archive:
        for info in archive.infolist():
            if not f"/{info.filename}".endswith(_PICKLE):
                continue
            if info.file_size > _MOST_BYTES:
                raise BadCheckpoint(
                    f"{path.name} describes its tensors in {info.file_size} bytes; at most "
                    f"{_MOST_BYTES} are expected. Use a .safetensors copy."
                )
            with archive.open(info) as member:
                yield member.read(_MOST_BYTES + 1)


@contextmanager
def _replaced(names: list[str]) -> Iterator[None]:
    """Lets the names stand for nothing while a file is loaded."""
    if not names:
        yield
        return
    with torch.serialization.safe_globals([(_Nothing, name) for name in names]):
        yield
