"""SAM 2 from a folder of transformers or from one original file -> a `Segmenter`.

Nothing of a file is run: tensors are read as tensors, and loaded only if each has its place and
each place its tensor. Source: docs/reference/masks.md 7.2 and 7.3.
"""

import json
import logging
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor

from engine.errors import BadCheckpoint, MissingModel, Unavailable
from engine.masks.sam2_names import is_original, original_tensors, renamed, with_grid
from engine.masks.sam2_others import refusal_of_tensors, refusal_of_type
from engine.masks.sam2_sizes import Sam2Kind, config_of, tell
from engine.masks.segmenter import Network, Segmenter, Session
from engine.models.tensorfile import TensorFile, is_finite

if TYPE_CHECKING:
    from transformers.models.sam2_video.configuration_sam2_video import Sam2VideoConfig
    from transformers.models.sam2_video.modeling_sam2_video import Sam2VideoModel

CONFIG, WEIGHTS = "config.json", "model.safetensors"
_INDEX = "model.safetensors.index.json"
_MODEL_TYPE = "sam2_video"
_PLAIN = ("F32", "F16", "BF16")
_KERNELS = ("eager", "sdpa")
_ATTENTION = ("attn_implementation", "attn_implementation_internal")  # ends of names
_MOST_CONFIG_BYTES = 1 << 20
_SHOWN = 3  # names in a sentence

log = logging.getLogger(__name__)


def load_sam2(path: Path, device: torch.device, name: str = "") -> Segmenter:
    """Loads SAM 2 or 2.1 from a folder of transformers, or a .pt or .safetensors file.

    It computes in BF16 on a GPU and in FP32 elsewhere. `name` tells it from others, with its hash.
    Raises `MissingModel` if nothing is there, and `BadCheckpoint` for what is damaged, of another
    model, or needs code of its own.
    """
    config, tensors, kind = _of_folder(path) if path.is_dir() else _of_file(path)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    model = _filled(config, tensors, path.name)
    cast(torch.nn.Module, model).to(device=device, dtype=dtype)
    log.info("masks by %s on %s, %s", name or kind or path.name, device.type, path)
    return as_segmenter(model, name or str(kind or path.name), device, dtype)


def require_library() -> None:
    """Raises `Unavailable` where transformers, which runs SAM 2, is not installed."""
    if find_spec("transformers") is None:
        raise Unavailable(
            "Making masks needs transformers, which is not installed: pip install "
            "'scail-engine[masks]', or give a file of masks."
        )


def look_at(path: Path) -> Sam2Kind | None:
    """Tells what a folder or a file holds, without loading it; None for a size of somebody's own.

    Raises as `load_sam2` for what can be told by names and shapes.
    """
    if path.is_dir():
        _config(path)
        file = TensorFile(_weights(path))
        return _kind(file, {})
    file = TensorFile(path, top_key="model")
    if (known := refusal_of_tensors(file, path.name)) is not None:
        raise BadCheckpoint(known)
    return _kind(file, renamed(file) if is_original(file) else {})


def files_of(path: Path) -> tuple[Path, ...]:
    """All files that what is loaded depends on. Raises `MissingModel`, `BadCheckpoint`."""
    if path.is_dir():
        return (path / CONFIG, *TensorFile(_weights(path)).files)
    return TensorFile(path, top_key="model").files


def as_segmenter(
    model: "Sam2VideoModel",
    name: str,
    device: torch.device,
    dtype: torch.dtype,
) -> Segmenter:
    """Wraps transformers' model."""
    from transformers.models.sam2_video.modeling_sam2_video import Sam2VideoInferenceSession

    def opened(height: int, width: int) -> Session:
        session = Sam2VideoInferenceSession(
            video_height=height, video_width=width, inference_device=device,
            inference_state_device=device, video_storage_device=device, dtype=dtype,
        )  # fmt: skip
        return cast(Session, session)

    config = model.config
    side = config.image_size if isinstance(config.image_size, int) else config.image_size[0]
    kept = max(config.num_maskmem, config.max_object_pointers_in_encoder)
    return Segmenter(name, cast(Network, model.eval()), opened, int(side), int(kept), device, dtype)


def _of_folder(path: Path) -> tuple["Sam2VideoConfig", dict[str, Tensor], Sam2Kind | None]:
    config = _config(path)
    file = TensorFile(_weights(path))
    return config, with_grid(_read(file)), _kind(file, {})


def _weights(path: Path) -> Path:
    weights = next((held for name in (WEIGHTS, _INDEX) if (held := path / name).is_file()), None)
    if weights is None:
        raise MissingModel(f"{path} has no {WEIGHTS}; put it beside {CONFIG}.")
    return weights


def _kind(file: TensorFile, names: Mapping[str, str]) -> Sam2Kind | None:
    """The size, if it is one that was released; `names` are those of transformers."""
    try:
        return tell({names.get(name, name): file.shape(name) for name in file}, file.path.name)
    except BadCheckpoint:
        return None


def _config(path: Path) -> "Sam2VideoConfig":
    place = path / CONFIG
    try:
        if place.stat().st_size > _MOST_CONFIG_BYTES:
            raise BadCheckpoint(f"{place} is too large to be a configuration; fetch it again.")
        said = json.loads(place.read_bytes())
        model_type = said.get("model_type")
    except FileNotFoundError as error:
        raise MissingModel(
            f"{path} is no folder of a model: it has no {CONFIG}. Name the folder that holds "
            f"{CONFIG} and {WEIGHTS}, or a file."
        ) from error
    except (OSError, ValueError, AttributeError, RecursionError) as error:
        raise BadCheckpoint(f"{place} cannot be read as a JSON object; fetch it again.") from error
    if model_type != _MODEL_TYPE or "auto_map" in said:
        known = refusal_of_type(str(model_type).lower(), path.name)
        if known is None and "auto_map" in said:
            known = f"{path.name} wants to run code that lies in it, which is not done."
        found = f"{path.name} is a model of type {str(model_type)[:40]!r}"
        raise BadCheckpoint(known or f"{found}; {_MODEL_TYPE} is expected.")
    if (kernels := _kernels_of(said)) is not None:
        raise BadCheckpoint(
            f"{place} wants its attention to run by {kernels[:40]!r}, code that may lie elsewhere, "
            f"which is not done: {' or '.join(_KERNELS)} is expected, or nothing."
        )
    from huggingface_hub.errors import StrictDataclassError  # slow to import: only when used
    from transformers.models.sam2_video.configuration_sam2_video import Sam2VideoConfig

    try:
        return Sam2VideoConfig.from_dict(said)
    except (ValueError, TypeError, LookupError, AttributeError, StrictDataclassError) as error:
        raise BadCheckpoint(f"{place} describes no SAM 2: {_short(error)}.") from error


def _kernels_of(said: object) -> str | None:
    """Finds what a configuration wants attention to be computed by, if torch does not do that.

    Transformers takes the name of a repository there, fetches it and runs what lies in it.
    """
    if isinstance(said, list):
        return next((found for one in said if (found := _kernels_of(one)) is not None), None)
    if not isinstance(said, dict):
        return None
    for name, value in said.items():
        if name.endswith(_ATTENTION) and value is not None and value not in _KERNELS:
            return str(value)
        if (found := _kernels_of(value)) is not None:
            return found
    return None


def _of_file(path: Path) -> tuple["Sam2VideoConfig", dict[str, Tensor], Sam2Kind | None]:
    file = TensorFile(path, top_key="model")
    if not is_original(file):
        known = refusal_of_tensors(file, path.name)
        if known is None and any(name.startswith("vision_encoder.backbone.") for name in file):
            tensors = with_grid(_read(file))
            kind = tell({name: tuple(held.shape) for name, held in tensors.items()}, path.name)
            return config_of(kind), tensors, kind
        raise BadCheckpoint(
            known or f"{path.name} is no SAM 2: none of its {len(file)} tensors is its encoder's."
        )
    if (known := refusal_of_tensors(file, path.name)) is not None:
        raise BadCheckpoint(known)
    _require_plain(file)
    tensors = original_tensors(file)
    kind = tell({name: tuple(held.shape) for name, held in tensors.items()}, path.name)
    return config_of(kind), tensors, kind


def _read(file: TensorFile) -> dict[str, Tensor]:
    _require_plain(file)
    tensors = {}
    for name in file:
        with file.open(name) as tensor:
            tensors[name] = tensor.float()
            if tensors[name].data_ptr() == tensor.data_ptr():  # of FP32: still in the file
                tensors[name] = tensor.clone()
    return tensors


def _require_plain(file: TensorFile) -> None:
    for name in file:
        if file.dtype(name) not in _PLAIN:
            raise BadCheckpoint(
                f"{file.path.name}: {name} is {file.dtype(name)}; {', '.join(_PLAIN)} are read."
            )


def _filled(
    config: "Sam2VideoConfig", tensors: Mapping[str, Tensor], name: str
) -> "Sam2VideoModel":
    """The model with its weights. Raises `BadCheckpoint` unless they fit it one to one."""
    from transformers.initialization import no_init_weights  # slow to import: only when used
    from transformers.models.sam2_video.modeling_sam2_video import Sam2VideoModel

    try:
        with no_init_weights():
            model = Sam2VideoModel(config)
    except (ValueError, TypeError, LookupError, ArithmeticError, RuntimeError) as error:
        raise BadCheckpoint(f"{name} describes no SAM 2: {_short(error)}.") from error
    wanted = model.state_dict()
    missing, more = wanted.keys() - tensors.keys(), tensors.keys() - wanted.keys()
    if missing or more:
        raise BadCheckpoint(
            f"{name} does not fit: {len(missing)} tensors are missing{_some(missing)}, {len(more)} "
            f"have no place{_some(more)}. Fetch it again, or a file of SAM 2.1."
        )
    for key, held in tensors.items():
        if held.shape != wanted[key].shape:
            raise BadCheckpoint(
                f"{name}: {key} is {list(held.shape)}; {list(wanted[key].shape)} is expected."
            )
        if not is_finite(held):
            raise BadCheckpoint(f"{name}: {key} has infinite numbers or NaN; fetch it again.")
    model.load_state_dict(dict(tensors), strict=True, assign=True)
    return model.requires_grad_(False).eval()


def _some(names: set[str]) -> str:
    return f" ({', '.join(sorted(names)[:_SHOWN])})" if names else ""


def _short(error: Exception) -> str:
    return " ".join(str(error).split())[:200]
