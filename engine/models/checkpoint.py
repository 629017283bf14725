"""SCAIL transformer checkpoints: every layout people have comes in, one naming goes out.

Layouts (docs/reference/denoiser.md 2): the official SAT file, the converted safetensors in 16 or
32 bits, and their copies in fewer (docs/reference/formats.md), each tensor in a format of its own.
All is checked from the headers before any weight is read; weights are then read one at a time,
LoRAs merged into them in FP32.
"""

import logging
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from engine.clock import over
from engine.config import HEAD_SIZE, SCAIL2_14B, SCAIL_1_3B, SCAIL_14B, ModelConfig
from engine.errors import BadCheckpoint
from engine.models.attention import Attention, sdpa
from engine.models.dit import Linear, Scail
from engine.models.fill import count_blocks
from engine.models.formats.held import Codes, PackageForm
from engine.models.formats.weights import USED_METADATA, StoredWeights
from engine.models.lora import Lora, merge, require_one_magnitude
from engine.models.lora_roles import require_kind
from engine.models.tensorfile import TensorFile, is_finite

log = logging.getLogger(__name__)

BLOCK = re.compile(r"blocks\.(?P<n>[0-9]+)\.")
LAYERS = {known.dim: known.layers for known in (SCAIL_14B, SCAIL_1_3B)}  # of the models as trained

# SAT names, and the converted names their rows are divided among in order ({n}: the layer)
SAT_NAMES = {
    "mixins.patch_embed.proj": ("patch_embedding",),
    "mixins.patch_embed.proj_pose": ("patch_embedding_pose",),
    "mixins.patch_embed.proj_mask": ("patch_embedding_mask",),
    "time_embed.0": ("time_embedding.0",),
    "time_embed.2": ("time_embedding.2",),
    "adaln_projection.1": ("time_projection.1",),
    "text_embedding.0": ("text_embedding.0",),
    "text_embedding.2": ("text_embedding.2",),
    "clip_proj.proj.0": ("img_emb.proj.0",),
    "clip_proj.proj.1": ("img_emb.proj.1",),
    "clip_proj.proj.3": ("img_emb.proj.3",),
    "clip_proj.proj.4": ("img_emb.proj.4",),
    "mixins.final_layer.adaLN_modulation": ("head.modulation",),
    "mixins.final_layer.linear": ("head.head",),
    "mixins.adaln_layer.adaLN_modulations.{n}": ("blocks.{n}.modulation",),
    "mixins.adaln_layer.query_layernorm_list.{n}": ("blocks.{n}.self_attn.norm_q",),
    "mixins.adaln_layer.key_layernorm_list.{n}": ("blocks.{n}.self_attn.norm_k",),
    "mixins.adaln_layer.cross_query_layernorm_list.{n}": ("blocks.{n}.cross_attn.norm_q",),
    "mixins.adaln_layer.cross_key_layernorm_list.{n}": ("blocks.{n}.cross_attn.norm_k",),
    "mixins.adaln_layer.clip_feature_key_layernorm_list.{n}": ("blocks.{n}.cross_attn.norm_k_img",),
    "mixins.adaln_layer.clip_feature_key_value_list.{n}": (
        "blocks.{n}.cross_attn.k_img",
        "blocks.{n}.cross_attn.v_img",
    ),
    "transformer.layers.{n}.attention.query_key_value": (
        "blocks.{n}.self_attn.q",
        "blocks.{n}.self_attn.k",
        "blocks.{n}.self_attn.v",
    ),
    "transformer.layers.{n}.attention.dense": ("blocks.{n}.self_attn.o",),
    "transformer.layers.{n}.cross_attention.query": ("blocks.{n}.cross_attn.q",),
    "transformer.layers.{n}.cross_attention.key_value": (
        "blocks.{n}.cross_attn.k",
        "blocks.{n}.cross_attn.v",
    ),
    "transformer.layers.{n}.cross_attention.dense": ("blocks.{n}.cross_attn.o",),
    "transformer.layers.{n}.post_cross_attention_layernorm": ("blocks.{n}.norm3",),
    "transformer.layers.{n}.mlp.dense_h_to_4h": ("blocks.{n}.ffn.0",),
    "transformer.layers.{n}.mlp.dense_4h_to_h": ("blocks.{n}.ffn.2",),
}


@dataclass(frozen=True, slots=True)
class Place:
    """Where a parameter lies: part `part` of `parts` of the rows of a stored one."""

    stored: str
    part: int = 0
    parts: int = 1


class Checkpoint:
    """The weights of one SCAIL transformer under their converted names.

    Opening checks everything that the headers tell and raises `BadCheckpoint` or `MissingModel`
    with the file, the tensor, what was found and what was expected.
    """

    def __init__(
        self, path: Path, *more: Path, loras: Sequence[Lora] = (), layers: int | None = None
    ) -> None:
        """`layers`: how many the file must have. None: as many as SCAIL models of its width have,
        or, for a width that none has, as many as it holds.
        """
        self.path = path
        file = TensorFile(path, *more, top_key="module")
        file.warn_of_metadata(*USED_METADATA)
        self.stored = StoredWeights(file)
        for note in self.stored.notes:
            log.warning("%s: %s", path.name, note)
        self._refuse_other_models()
        self._places = locate(self.stored)
        self.config = self._infer_config(layers)
        self._shapes = self._check()
        self._loras = tuple(loras)
        for lora in loras:
            lora.check(self._shapes)
            require_kind(lora, self.config.kind.name)
        require_one_magnitude(self._loras)

    @property
    def files(self) -> tuple[Path, ...]:
        """The files of the checkpoint itself, without LoRAs."""
        return self.stored.file.files

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._shapes[name]

    def read_into(self, name: str, out: Tensor) -> None:
        """Writes a weight, dequantised and all LoRAs applied, into `out` in the dtype of `out`.

        Raises `BadCheckpoint` if it is not finite in that dtype.
        """
        place = self._places[name]
        changed = [lora for lora in self._loras if lora.changes(name)]
        first = place.part * next(iter(self._shapes[name]), 0)
        if changed:
            is_fp32 = out.dtype == torch.float32 and out.is_contiguous()
            weight = out if is_fp32 and out.device.type == "cpu" else torch.empty(out.shape)
            self.stored.read(place.stored, weight, first)
            if is_finite(weight):  # else a LoRA would be blamed
                merge(changed, name, weight)
            if weight is not out:
                out.copy_(weight)
        else:
            self.stored.read(place.stored, out, first)
        if not is_finite(out):
            stored = self.stored[place.stored].names["weight"]
            raise BadCheckpoint(
                f"{self.path.name}: {stored} holds values that are not finite in {out.dtype}. "
                "If the file is right, load it in another type; otherwise fetch it again."
            )

    def kept_by(self, name: str) -> PackageForm | None:
        """The form of packages that can hold the codes of a weight as they are; nothing is read.

        None if the weight has to be dequantised: no package has its format, it was filled up, or a
        LoRA changes it.
        """
        place, shape = self._places[name], self._shapes[name]
        whole = (shape[0] * place.parts, *shape[1:]) if shape else shape
        is_changed = any(lora.changes(name) for lora in self._loras)
        stored = self.stored[place.stored]
        if is_changed or stored.shape != whole or stored.codes is None:
            return None
        return stored.codes.by

    def codes(self, name: str) -> Codes | None:
        """The 8-bit codes of a weight, or None where `kept_by` is.

        What is wrong with them shows when the weight is read as numbers.
        """
        codes = None if self.kept_by(name) is None else self.stored.codes(self._places[name].stored)
        place, shape = self._places[name], self._shapes[name]
        if codes is None or place.parts == 1:
            return codes
        rows = slice(place.part * shape[0], (place.part + 1) * shape[0])
        return replace(codes, q=codes.q[rows].clone(), s=codes.s[rows].clone())

    def _refuse_other_models(self) -> None:
        names = set(self.stored)
        if {"patch_embedding.weight", "patch_embedding_pose.weight"} <= names:
            return
        if names & {"mixins.patch_embed.proj_pose.weight", "patch_embedding_pose.weight"}:
            return
        if "patch_embedding.weight" in names:
            raise BadCheckpoint(
                f"{self.path.name} is another Wan model: it has patch_embedding.weight but no "
                "patch_embedding_pose.weight. A transformer of SCAIL-Preview or SCAIL-2 is "
                "expected."
            )
        if any(BLOCK.match(name) for name in names):
            raise BadCheckpoint(
                f"{self.path.name} holds blocks of a Wan model and no patch embedding: writers of "
                "GGUF files keep those aside until their last step, which this file lacks. Use "
                "another copy."
            )
        raise BadCheckpoint(
            f"{self.path.name} holds no SCAIL transformer: none of its {len(names)} tensors is a "
            "patch embedding of poses."
        )

    def _infer_config(self, layers: int | None) -> ModelConfig:
        config = ModelConfig(
            layers=count_blocks(self, BLOCK, self.path.name),
            dim=self._size("patch_embedding.weight", 0),
            ffn=self._size("blocks.0.ffn.0.bias", 0),  # a weight may be filled up
            text_dim=self._size("text_embedding.0.weight", 1),
            clip_dim=self._size("img_emb.proj.0.weight", 0),
            mask_dim=self._mask_dim(),
        )
        expected = LAYERS.get(config.dim, config.layers) if layers is None else layers
        if config.layers != expected:
            raise BadCheckpoint(
                f"{self.path.name} has {config.layers} layers of width {config.dim}, not "
                f"{expected}: part of the weights is missing, or it is another model."
            )
        if config.dim % HEAD_SIZE:
            raise BadCheckpoint(
                f"{self.path.name}: patch_embedding.weight is {config.dim} wide, "
                f"which is not a multiple of the head size {HEAD_SIZE}."
            )
        return config

    def _mask_dim(self) -> int:
        """Tells the models of the family apart: the channels of the masks that they take."""
        if "patch_embedding_mask.weight" not in self._places:
            return 0
        found, known = self._size("patch_embedding_mask.weight", 1), SCAIL2_14B.mask_dim
        if found != known:
            raise BadCheckpoint(
                f"{self.path.name}: patch_embedding_mask.weight takes {found} channels; masks of "
                f"{SCAIL2_14B.kind.title} have {known}."
            )
        return found

    def _size(self, name: str, axis: int) -> int:
        if name not in self._places:
            raise BadCheckpoint(f"{self.path.name} lacks {name}, which every SCAIL model has.")
        shape = self._stored_shape(name)
        if axis >= len(shape) or 0 in shape:
            raise BadCheckpoint(
                f"{self.path.name}: {name} has shape {list(shape)}; at least {axis + 1} sizes "
                "above 0 are expected."
            )
        return shape[axis]

    def _stored_shape(self, name: str) -> tuple[int, ...]:
        """The shape of a parameter, which may be filled up."""
        place = self._places[name]
        rows, *rest = self.stored[place.stored].shape or (1,)
        return rows // place.parts, *rest

    def _check(self) -> dict[str, tuple[int, ...]]:
        """The shapes that the model's parameters have, each of which is there and fits."""
        expected = parameter_shapes(self.config)
        for problem, names in (
            ("lacks", expected.keys() - self._places.keys()),
            ("holds, and SCAIL has not,", self._places.keys() - expected.keys()),
        ):
            if names:
                first = sorted(names)[0]
                more = f" and {len(names) - 1} more tensors" if len(names) > 1 else ""
                raise BadCheckpoint(f"{self.path.name} {problem} {first}{more}.")
        for name, (rows, *rest) in expected.items():
            place = self._places[name]
            stored, whole = self.stored[place.stored], (rows * place.parts, *rest)
            if not stored.fits(whole):
                raise BadCheckpoint(
                    f"{self.path.name}: {stored.names['weight']} has shape {list(stored.shape)}; "
                    f"as {name}, {list(whole)} is expected."
                )
        return {name: expected[name] for name in self._places}


def locate(stored: StoredWeights) -> dict[str, Place]:
    """Where each parameter lies, by its converted name. Raises `BadCheckpoint` for one that is
    stored twice.
    """
    targets = _target_names(list(stored))
    places: dict[str, Place] = {}
    for name in stored:
        parts = targets.get(name, (name,))
        for part, target in enumerate(parts):
            if target in places:
                raise BadCheckpoint(f"{stored.file.path.name}: {target} is stored twice.")
            places[target] = Place(name, part, len(parts))
    return places


def parameter_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """The shapes of a model's parameters by their converted names."""
    with torch.device("meta"):  # all blocks are alike, and making them takes time
        one = Scail(replace(config, layers=1)).state_dict()
    shapes: dict[str, tuple[int, ...]] = {}
    for name, held in one.items():
        inside = BLOCK.match(name)
        for layer in range(config.layers) if inside else [0]:
            full = f"blocks.{layer}.{name[inside.end() :]}" if inside else name
            shapes[full] = tuple(held.shape)
    return shapes


def load_transformer(
    checkpoint: Checkpoint,
    device: torch.device,
    dtype: torch.dtype = torch.float32,
    attention: Attention = sdpa,
) -> Scail:
    """Loads the model. `dtype` is that of the linears in the blocks, the rest is FP32.

    Needs less than 1.5 GB of memory beside the model's own.
    """
    with torch.device("meta"):
        model = Scail(checkpoint.config, attention)
    for path, module in over([*model.named_modules()], "load transformer"):
        kept = dtype if isinstance(module, Linear) else torch.float32
        for key, parameter in module.named_parameters(path, recurse=False):
            weight = torch.empty(parameter.shape, dtype=kept, device=device)
            checkpoint.read_into(key, weight)
            setattr(module, key.rpartition(".")[2], torch.nn.Parameter(weight, requires_grad=False))
    return model.eval()


def _target_names(names: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """Stored name -> converted names, for the stored names that differ from the converted ones."""
    targets = {}
    for name in names:
        stem, suffix = re.fullmatch(r"(.*?)(\.weight|\.bias)?", name).groups(default="")  # pyright: ignore[reportOptionalMemberAccess]
        layer = re.search(r"(?<=layers\.)\d+|\d+$", stem)
        for pattern in (stem, layer and stem[: layer.start()] + "{n}" + stem[layer.end() :]):
            if pattern in SAT_NAMES:
                number = layer[0] if layer else ""
                targets[name] = tuple(
                    target.replace("{n}", number) + suffix for target in SAT_NAMES[pattern]
                )
    return targets
