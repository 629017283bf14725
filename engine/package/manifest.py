"""The manifest of a package: manifest.json, all that it says of itself.

It is a JSON object: the schema, a digest, then the fields of `Manifest`. The digest is the sha256
of the file with 64 zeros in its place, so that any changed byte shows. It tells damage and careless
edits; whoever can write the folder can also make a new digest.
"""

import hashlib
import json
import math
import re
import shlex
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, is_dataclass
from functools import cache
from pathlib import Path
from types import NoneType, UnionType
from typing import Literal, TypeAlias, TypeVar, get_args, get_origin, get_type_hints

from engine.config import KINDS, LATENT_CHANNELS, ModelConfig
from engine.errors import BadPackage
from engine.flow import KindName, LoraRole
from kernels.arch import ARCHS

SCHEMA = 2
MANIFEST = "manifest.json"
WEIGHTS = "weights.bin"
PROMPTS = "prompts.safetensors"
ALIGNMENT = 256  # bytes, of a tensor in the weights file
ITEM_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "float8_e4m3fn": 1, "int8": 1}
ROTATION = "regular-hadamard"  # of rotated rows, in groups of so many inputs: `kernels.fp8.rotate`
ROTATION_GROUP = 256
MEND = "Copy the package again, or build it again."

_LARGEST_BYTES = 64 * 2**20  # of a manifest; that of the 14B model has less than 1 MB
_LARGEST_NUMBER = 2**63
_LONGEST_TEXT = 300  # characters of a name, a hash or a path
_MOST_SHOWN = 4  # LoRAs in a message
_ZEROS = b"0" * 64
# Names that mean the same on every file system, and nothing outside the folder.
_RELATIVE = re.compile(r"(?:[A-Za-z0-9_][A-Za-z0-9_.-]*/)*[A-Za-z0-9_][A-Za-z0-9_.-]*")
_VERSION = re.compile(r"[0-9]{1,3}\.[0-9]{1,3}")

WeightsForm: TypeAlias = Literal["int8", "fp8"]
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class MergedLora:
    """What a LoRA was merged for, and how much of it."""

    strength: float
    role: LoraRole
    rank: int | None  # the largest of its pairs; None: it has no pairs


@dataclass(frozen=True, slots=True)
class SourceFile:
    """A file that the weights were made of."""

    file: str  # its name, without folders
    bytes: int
    sha256: str
    lora: MergedLora | None  # None: the checkpoint


@dataclass(frozen=True, slots=True)
class Native:
    """The program of our own kernels."""

    kernels: tuple[Mapping[str, object], ...]  # `Cubin.record`


@dataclass(frozen=True, slots=True)
class Prompts:
    """The embedded prompts that a package ships."""

    count: int
    encoder_sha256: str


@dataclass(frozen=True, slots=True)
class PreviewColours:
    """What previews are made with: a linear map, which was fitted to one VAE."""

    vae: str  # its name by `engine.models.latent_colours.name_of`
    values: tuple[float, ...]  # of the map, as `LatentColours.values` lists them


@dataclass(frozen=True, slots=True)
class Rotation:
    """How the rows of linears are rotated, and which are. Others are stored as they are."""

    kind: str
    group: int  # neighbouring inputs that are mixed
    linears: tuple[str, ...]  # "blocks.0.qkv"


@dataclass(frozen=True, slots=True)
class Entry:
    """One tensor of the weights file."""

    name: str
    dtype: str  # a key of ITEM_BYTES
    shape: tuple[int, ...]
    offset: int  # multiple of ALIGNMENT
    nbytes: int
    sha256: str


@dataclass(frozen=True, slots=True)
class PackageFile:
    """One file of the package."""

    path: str  # below the package's folder
    bytes: int
    sha256: str


@dataclass(frozen=True, slots=True)
class Manifest:
    """The whole manifest. A build leaves `tensors` and `files` to `engine.package.folder`."""

    model_kind: KindName
    arch: str
    driver_floor: str  # "12.7": the oldest CUDA version a driver may report
    engine: str  # version
    toolchain: Mapping[str, str]  # name -> version, of what built it
    wheels: Mapping[str, str]  # name -> sha256, of what built it
    sources: tuple[SourceFile, ...]
    model: ModelConfig
    padded_ffn: int  # rows of `up` and columns of `down`, zeros included
    weights: WeightsForm
    rotation: Rotation | None  # None: no rows are rotated
    native: Native
    tensorrt: Mapping[str, object]  # the program's facts, or {"absent": a sentence why}
    prompts: Prompts | None
    colours: PreviewColours | None = None  # None: fitted where the package runs
    tensors: tuple[Entry, ...] = ()  # in load order
    files: tuple[PackageFile, ...] = ()  # all but the manifest

    @property
    def loras(self) -> tuple[SourceFile, ...]:
        """The files that were merged into the checkpoint, in the order given."""
        return tuple(source for source in self.sources if source.lora is not None)

    @property
    def driver(self) -> tuple[int, int]:
        """The floor as numbers: (12, 7)."""
        major, minor = self.driver_floor.split(".")
        return int(major), int(minor)


def aligned(offset: int) -> int:
    """Rounds up to the next offset at which a tensor may begin."""
    return -(-offset // ALIGNMENT) * ALIGNMENT


def kernel_path(name: str) -> str:
    """The path of a kernel's code in the package."""
    return f"kernels/{name}.cubin"


def check_path(path: str) -> str:
    """Returns a path that stays below the package's folder. Raises `ValueError` for another."""
    if not _RELATIVE.fullmatch(path):
        raise ValueError(f"{path[:80]!r} is no plain path below the package's folder")
    return path


def encode(manifest: Manifest) -> bytes:
    body = {"schema": SCHEMA, "digest": _ZEROS.decode()} | asdict(manifest)
    data = json.dumps(body, allow_nan=False).encode()
    return data.replace(_ZEROS, hashlib.sha256(data).hexdigest().encode(), 1)


def decode(data: bytes, path: Path) -> tuple[Manifest, str]:
    """Reads the manifest in `data`, the bytes of `path`, and its digest, which names the package.

    Raises `BadPackage` if it is of another schema, was changed, or contradicts itself.
    """
    try:
        if len(data) > _LARGEST_BYTES:
            raise ValueError(f"{len(data)} bytes; a manifest has less than {_LARGEST_BYTES}")
        body = json.loads(data)
        if not isinstance(body, dict):
            raise ValueError(f"a JSON object is expected, not {str(body)[:40]!r}")
    except (ValueError, RecursionError) as error:  # the first: neither UTF-8 nor JSON too
        raise BadPackage(f"{path} is damaged: {error}. {MEND}") from error
    _check_schema(body.pop("schema", None), body, path)
    try:
        digest = _check_digest(data, body.pop("digest", None))
        manifest = from_json(Manifest, body, "the manifest")
        check(manifest)
    except (ValueError, RecursionError) as error:
        raise BadPackage(f"{path} is damaged: {error}. {MEND}") from error
    return manifest, digest


def require_plain(text: str, where: str) -> None:
    """Raises `ValueError` for what is no name, hash or path, and what no message can show."""
    if len(text) > _LONGEST_TEXT or not text.isprintable():
        raise ValueError(f"{where} is {text[:40]!r}... of {len(text)} characters, no plain text")


def _named(key: str) -> str:
    """Returns a key as messages may show it."""
    return key if len(key) <= _LONGEST_TEXT and key.isprintable() else f"{key[:40]!r}..."


def _check_schema(schema: object, body: Mapping[str, object], path: Path) -> None:
    """Refuses another schema before all else: nothing else is known of such a file."""
    if type(schema) is not int or schema < 1:
        raise BadPackage(f"{path} names no schema, so it is no package's manifest. {MEND}")
    if schema > SCHEMA:
        raise BadPackage(
            f"{path} was made by a newer engine: it has schema {str(schema)[:20]}, this engine "
            f"reads {SCHEMA}. Update the engine."
        )
    if schema < SCHEMA:
        raise BadPackage(
            f"{path} was made by an older engine: it has schema {schema}, this engine reads "
            f"{SCHEMA}; build the package again, which takes two minutes: {_rebuild(body)}"
        )


def _rebuild(body: Mapping[str, object]) -> str:
    """The command that makes a package of schema 1 again, as far as its manifest tells."""
    arch, sources = body.get("arch"), body.get("sources")
    told = [one for one in sources if isinstance(one, dict)] if isinstance(sources, list) else []
    checkpoint, loras = "FILE", []
    for one in reversed(told):  # of a checkpoint in parts, the first part stands for all
        name, strength = one.get("file"), one.get("strength")
        if not isinstance(name, str) or not 0 < len(name) <= _LONGEST_TEXT:
            continue
        if strength is None:
            checkpoint = name
        elif isinstance(strength, int | float):
            loras.insert(0, f" --lora {_word(f'{name}:{strength:g}')}")
    known = arch if arch in [arch.name for arch in ARCHS] else "ARCH"
    return (
        f"python build_engine.py --arch {known} --checkpoint {_word(checkpoint)}"
        f"{''.join(loras[:_MOST_SHOWN])} --out DIR"
    )


def _word(text: str) -> str:
    """Writes a text as one word of a shell, without what no message can show."""
    return shlex.quote("".join(c if c.isprintable() else "?" for c in text))


def _check_digest(data: bytes, digest: object) -> str:
    if not isinstance(digest, str) or len(digest) != len(_ZEROS):
        raise ValueError(f"its digest is {str(digest)[:80]!r}, 64 hexadecimal digits are expected")
    found = hashlib.sha256(data.replace(digest.encode(), _ZEROS, 1)).hexdigest()
    if found != digest:
        raise ValueError(f"it was changed after the build (digest {found}, not {digest})")
    return digest


def check(manifest: Manifest) -> None:
    """Checks what types cannot say. Raises `ValueError`."""
    kind, found = KINDS[manifest.model_kind], manifest.model.mask_dim
    if found != kind.mask_dim:
        raise ValueError(
            f"it is a package of {kind.title}, whose masks have {kind.mask_dim} channels, and its "
            f"model takes masks of {found}"
        )
    known = [arch.name for arch in ARCHS]
    if manifest.arch not in known:
        raise ValueError(
            f"its architecture is {manifest.arch[:40]!r}, not one of {', '.join(known)}"
        )
    if not _VERSION.fullmatch(manifest.driver_floor):
        raise ValueError(f"its driver floor is {manifest.driver_floor[:40]!r}, not as '12.7'")
    files = {check_path(file.path): file for file in manifest.files}
    if len(files) != len(manifest.files) or MANIFEST in files:
        raise ValueError("its list of files names one twice, or itself")
    needed = [WEIGHTS, *([PROMPTS] if manifest.prompts else [])]
    if missing := [path for path in needed if path not in files]:
        raise ValueError(f"its list of files lacks {missing[0]}")
    check_index(manifest.tensors, files[WEIGHTS].bytes)
    values = () if manifest.colours is None else manifest.colours.values
    if manifest.colours is not None and len(values) != 3 * (LATENT_CHANNELS + 1):
        raise ValueError(f"its colours for previews are {len(values)} numbers")
    if not all(map(math.isfinite, values)):
        raise ValueError("its colours for previews are not finite")


def check_index(tensors: tuple[Entry, ...], size: int) -> None:
    """Checks that each tensor begins where the last one ended, aligned, and that the last one ends
    with the file. Raises `ValueError`.
    """
    end, names = 0, set()
    for entry in tensors:
        name = f"tensor {entry.name[:80]!r}"
        if entry.name in names:
            raise ValueError(f"{name} is there twice")
        names.add(entry.name)
        if entry.dtype not in ITEM_BYTES:
            raise ValueError(
                f"{name} has dtype {entry.dtype[:40]!r}, not one of {', '.join(ITEM_BYTES)}"
            )
        if entry.nbytes != math.prod(entry.shape) * ITEM_BYTES[entry.dtype] or not entry.nbytes:
            raise ValueError(
                f"{name} {str([*entry.shape])[:80]} {entry.dtype} has {entry.nbytes} bytes"
            )
        if entry.offset != aligned(end):
            raise ValueError(f"{name} begins at byte {entry.offset}, {aligned(end)} is expected")
        end = entry.offset + entry.nbytes
    if end != size or not tensors:
        raise ValueError(f"{len(tensors)} tensors end at byte {end}, {WEIGHTS} at {size}")


def from_json(kind: type[T], value: object, where: str) -> T:
    """Makes a dataclass of a JSON object that has each of its fields, no other, and values of the
    annotated types. Integers are counts, so not negative. Raises `ValueError`, which says where.
    """
    if not isinstance(value, dict):
        raise ValueError(f"{where} is {str(value)[:40]!r}, an object is expected")
    types = _types(kind)
    if types.keys() != value.keys():
        name = sorted(types.keys() ^ value.keys())[0]
        raise ValueError(f"{where} {'lacks' if name in types else 'has an unknown'} {name[:80]!r}")
    return kind(**{name: _read(types[name], value[name], name) for name in types})


@cache
def _types(kind: type) -> dict[str, object]:
    hints = get_type_hints(kind)
    return {field.name: hints[field.name] for field in fields(kind)}


def _read(kind: object, value: object, where: str) -> object:
    """Returns `value` as an annotation asks for it."""
    origin, inside = get_origin(kind), get_args(kind)
    if kind is NoneType and value is None:
        return None
    if isinstance(kind, type) and is_dataclass(kind):
        return from_json(kind, value, where)
    if origin is UnionType:  # X | None
        return None if value is None else _read(inside[0], value, where)
    if origin is tuple and isinstance(value, list):
        return tuple([_read(inside[0], item, where) for item in value])
    if origin is Mapping and isinstance(value, dict):
        return {
            key: _read(inside[1], item, f"{where}.{_named(key)}") for key, item in value.items()
        }
    if isinstance(value, str) and (kind is str or value in inside):
        require_plain(value, where)
        return value
    if kind is object:
        return value
    if isinstance(value, int | float) and abs(value) < _LARGEST_NUMBER:
        if kind is float and not isinstance(value, bool):
            return float(value)
        if kind is int and type(value) is int and value >= 0:  # True is no int
            return value
    wanted = kind.__name__ if isinstance(kind, type) else kind
    if origin is Literal:
        wanted = " or ".join(map(repr, inside))
    raise ValueError(f"{where} is {str(value)[:40]!r}, {wanted} is expected")
