"""Which tensors of a file belong to one parameter: its values, and all that lies beside them.

The model's prefix may stand before a weight and not before its scale, or the other way round.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from engine.errors import BadCheckpoint
from engine.models.formats import quanto
from engine.models.formats.fp8 import SCALES
from engine.models.formats.held import WEIGHT, Held, Told
from engine.models.formats.table import ACTIVATIONS, BESIDE, REFUSED
from engine.models.formats.told import FORMAT, more, told_by_metadata, told_by_tensor
from engine.models.tensorfile import TensorFile

PREFIXES = ("model.diffusion_model.", "diffusion_model.", "")
MARKER = "scaled_fp8"  # of older files: their FP8 weights have scales
ALIASES = {  # of WanGP
    "pose_patch_embedding": "patch_embedding_pose",
    "mask_patch_embedding": "patch_embedding_mask",
}
_ENDINGS = sorted((*BESIDE, *ACTIVATIONS, FORMAT, *REFUSED), key=len, reverse=True)
_DOTTED = tuple(f".{ending}" for ending in _ENDINGS)


@dataclass(frozen=True, slots=True)
class Collection:
    """The tensors of a file by the parameters that they belong to."""

    file: TensorFile
    prefix: str
    own: Mapping[str, str]  # the tensor with a parameter's values, by its name without prefix
    beside: Mapping[str, Mapping[str, Sequence[str]]]  # stored names by linear and ending
    told: Mapping[str, Told]  # by linear
    ignored: frozenset[str]  # stored names of parameters of other models
    is_marked: bool
    notes: tuple[str, ...]

    def held(self, name: str) -> Held:
        """All of one parameter. Raises `BadCheckpoint` for what is there twice."""
        stem = name.removesuffix(".weight")
        tensors = {WEIGHT: self.own[name]}
        beside = self.beside.get(stem, {})
        scales = [stored for ending in SCALES for stored in beside.get(ending, ())]
        for found in (scales, *beside.values()):
            if len(found) > 1:
                raise BadCheckpoint(
                    f"{self.file.path.name} has two scales for {self.own[name]}: {found[0]} and "
                    f"{found[1]}; one is expected."
                )
        tensors |= {ending: stored[0] for ending, stored in beside.items() if ending != FORMAT}
        return Held(self.file, name, tensors, self.told.get(stem))

    def is_ignored(self, stored: str) -> bool:
        """Tells if a tensor beside a weight is beside one of another model."""
        stem, _ = split(stored)
        return f"{stem}.weight" in self.ignored or stem in self.ignored


def collect(file: TensorFile) -> Collection:
    """Sorts the tensors of a file. Raises `BadCheckpoint` for formats that are refused by name and
    for words about formats that make no sense.
    """
    own: list[str] = []
    beside: dict[str, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    for name in file:
        stem, ending = split(name)
        if ending is None:
            own.append(name)
        else:
            beside[_short(stem)][ending].append(name)
    _refuse(file, beside)
    params = [name for name in own if name != MARKER and not name.endswith(f".{MARKER}")]
    prefix = next(p for p in PREFIXES if not p or any(n.startswith(p) for n in params))
    named: dict[str, str] = {}
    for name in (name for name in params if name.startswith(prefix)):
        short = _aliased(name.removeprefix(prefix).removesuffix(quanto.DATA))
        if short in named:
            raise BadCheckpoint(f"{file.path.name}: {short} is stored twice.")
        named[short] = name
    told, notes = _told(file, beside)
    ignored = frozenset(name for name in params if not name.startswith(prefix))
    return Collection(file, prefix, named, beside, told, ignored, len(params) < len(own), notes)


def split(name: str) -> tuple[str, str | None]:
    """A stored name as that of a linear and an ending beside it; no ending for a parameter."""
    if not name.endswith(_DOTTED):
        return name, None
    ending = next(ending for ending in _ENDINGS if name.endswith(f".{ending}"))
    return name[: -len(ending) - 1], ending


def _refuse(file: TensorFile, beside: Mapping[str, Mapping[str, Sequence[str]]]) -> None:
    for endings in beside.values():
        for ending in (ending for ending in REFUSED if ending in endings):
            stored = endings[ending][0]
            weight = f"{split(stored)[0]}.weight"
            if ending != "scales" or (weight in file and file.dtype(weight) == "U32"):
                raise BadCheckpoint(
                    f"{file.path.name}: {stored} is of {REFUSED[ending]}, whose weights are not "
                    "read. Use a copy in another format."
                )


def _told(
    file: TensorFile, beside: Mapping[str, Mapping[str, Sequence[str]]]
) -> tuple[dict[str, Told], tuple[str, ...]]:
    """What the file says, by linear, and what that names in vain."""
    no_tensors = [name for name in file.left_out if split(name)[1] in (*BESIDE, FORMAT)]
    if no_tensors:
        raise BadCheckpoint(
            f"{file.path.name}: {no_tensors[0]} is no tensor, one is expected. Save the file as "
            ".safetensors."
        )
    told = {_short(name): said for name, said in told_by_metadata(file).items()}
    for stem, endings in beside.items():
        if FORMAT in endings:
            told[stem] = told_by_tensor(file, endings[FORMAT][0])
    by_quanto = quanto.quantization_map(file)
    quanto.require_read(file, by_quanto)
    lost = [name for name in by_quanto if quanto.SCALE not in beside.get(_short(name), {})]
    if not lost:
        return told, ()
    note = f"its map of quanto names {lost[0][:80]}{more(lost)}, which is not stored so"
    return told, (note,)


def _short(name: str) -> str:
    prefix = next(prefix for prefix in PREFIXES if name.startswith(prefix))
    return _aliased(name.removeprefix(prefix))


def _aliased(name: str) -> str:
    first, dot, rest = name.partition(".")
    return f"{ALIASES.get(first, first)}{dot}{rest}"
