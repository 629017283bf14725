"""What a file of weights is, told from its headers: for `python -m engine info --checkpoint`.

Nothing is read of the weights. A file that could not be loaded is described as far as it goes,
with the sentence that loading it would end in.
"""

import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path

from engine.config import NANO_SCAIL2, SCAIL2_14B, SCAIL_1_3B, ModelConfig
from engine.errors import BadCheckpoint
from engine.models.checkpoint import BLOCK, LAYERS, Checkpoint, locate, parameter_shapes
from engine.models.formats.held import PackageForm, Weight
from engine.models.formats.weights import StoredWeights
from engine.models.lora import Lora
from engine.models.lora_names import is_lora
from engine.models.tensorfile import TensorFile

# relative error in per cent that 8-bit rows of a package add (docs/reference/formats.md 9)
ROWS_LOSS: Mapping[PackageForm, float] = {"int8": 0.88, "fp8": 2.65}
LINEARS = "linears of the blocks"  # a package has them in 8 bits
# whose shapes a LoRA is compared with; those of SCAIL-2 have all parameters of SCAIL-Preview
MODELS = {
    "SCAIL 14B": SCAIL2_14B,
    "SCAIL 1.3B": replace(SCAIL_1_3B, mask_dim=SCAIL2_14B.mask_dim),
    "the nano model": NANO_SCAIL2,
}
CONTAINERS = {".safetensors": "safetensors", ".json": "safetensors", ".gguf": "GGUF"}
_SHOWN = 20  # names of each list
_POSE, _MASK = "patch_embedding_pose.weight", "patch_embedding_mask.weight"


def describe(path: Path) -> dict[str, object]:
    """Says what a file is, for JSON. Raises `BadCheckpoint` or `MissingModel` for one that is no
    file of tensors.
    """
    file = TensorFile(path, top_key="module")
    found: dict[str, object] = {
        "file": path.name,
        "bytes": sum(part.stat().st_size for part in file.files),
        "files": len(file.files),
        "container": CONTAINERS.get(path.suffix, "PyTorch"),
        "tensors": len(file),
        "dtypes": _counted(file.dtype(name) for name in file),
    }
    if any(is_lora(name) for name in file):
        return found | _lora(path)
    return found | _weights(path, file)


def _weights(path: Path, file: TensorFile) -> dict[str, object]:
    try:
        stored = StoredWeights(file)
    except BadCheckpoint as error:
        return {"is": "weights", "model": None, "problem": str(error)}
    told: dict[str, object] = {"formats": _formats(stored), "notes": stored.notes}
    try:
        checkpoint = Checkpoint(path)
    except BadCheckpoint as error:
        return {**_partial(stored), **told, "problem": str(error)}
    config = checkpoint.config
    return {
        "is": f"a checkpoint of {config.kind.title}",
        "model": _model(config),
        "missing": [],
        **told,
        "problem": None,
    }


def _partial(stored: StoredWeights) -> dict[str, object]:
    """What can be said of weights that are no whole model."""
    places = locate(stored)
    held = set(places)
    if not held & {_POSE, _MASK} and not any(BLOCK.match(name) for name in held):
        return {"is": "no transformer of SCAIL", "model": None}
    blocks = {match["n"] for name in held if (match := BLOCK.match(name))}
    bias = "patch_embedding.bias"
    dim = next(iter(stored[bias].shape), 0) if bias in stored else 0
    layers = LAYERS.get(dim, len(blocks))
    mask_dim = SCAIL2_14B.mask_dim if _MASK in held else 0
    expected = set(parameter_shapes(ModelConfig(layers=layers, mask_dim=mask_dim)))
    title = ModelConfig(mask_dim=mask_dim).kind.title
    what = f"part of {title}, or another model" if _POSE in held else "another Wan model"
    return {
        "is": what,
        "model": None,
        "missing": _shown(expected - held),
        "unknown": _shown(held - expected),
    }


def _model(config: ModelConfig) -> dict[str, object]:
    return {
        "name": config.kind.title,
        "layers": config.layers,
        "width": config.dim,
        "feed_forward": config.ffn,
        "mask_channels": config.mask_dim,
    }


def _formats(stored: StoredWeights) -> list[dict[str, object]]:
    """The formats of the blocks' linears and of all else, most values first."""
    rows: dict[tuple[str, str, PackageForm | None], list[Weight]] = defaultdict(list)
    linears = {
        place.stored
        for name, place in locate(stored).items()
        if BLOCK.match(name) and name.endswith(".weight")
    }
    for name in stored:
        weight = stored[name]
        shape = "vectors" if len(weight.shape) < 2 else "other matrices"
        of = LINEARS if name in linears and len(weight.shape) == 2 else shape
        rows[weight.kind, of, weight.codes and weight.codes.by].append(weight)
    order = sorted(rows.items(), key=lambda row: -sum(math.prod(w.shape) for w in row[1]))
    return [
        {
            "format": kind,
            "of": of,
            "weights": len(weights),
            "values": sum(math.prod(weight.shape) for weight in weights),
            "has_lost_percent": weights[0].loss,
            **(_package(weights[0].loss, kept) if of == LINEARS else {}),
        }
        for (kind, of, kept), weights in order
    ]


def _package(loss: float, kept: PackageForm | None) -> dict[str, object]:
    """The error of a linear in packages that are made from it: errors add as squares, and codes
    that are copied get none. LoRAs and multipliers of inputs need them rounded anew.
    """
    loses = {
        form: round(loss if form == kept else math.hypot(loss, rows), 2)
        for form, rows in ROWS_LOSS.items()
    }
    return {"package_loses_percent": loses, "package_copies_its_codes": kept}


def _lora(path: Path) -> dict[str, object]:
    """A LoRA, compared with the models that it may be for."""
    problems: list[str] = []
    for title, config in MODELS.items():
        try:
            lora = Lora(path)
            lora.check(parameter_shapes(config))
        except BadCheckpoint as error:
            problems.append(str(error))
            continue
        return {"is": f"a LoRA for {title}", "lora": lora.summary(), "problem": None}
    return {"is": "a LoRA for another model", "lora": None, "problem": problems[0]}


def _counted(names: Iterable[str]) -> Mapping[str, int]:
    return dict(Counter(names).most_common())


def _shown(names: set[str]) -> list[str]:
    some = sorted(names)[:_SHOWN]
    more = len(names) - len(some)
    return [*some, f"and {more} more"] if more else some
