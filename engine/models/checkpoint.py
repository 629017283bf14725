"""SCAIL transformer checkpoints: every layout people have comes in, one naming goes out.

Layouts (docs/reference/denoiser.md 2): the official SAT file, the converted safetensors in 16 or
32 bits, and their FP8 copies with scales. All is checked from the headers before any weight is
read; weights are then read one at a time, LoRAs merged into them in FP32.
"""

import logging
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from engine.config import HEAD_SIZE, SCAIL2_14B, SCAIL_1_3B, SCAIL_14B, ModelConfig
from engine.errors import BadCheckpoint
from engine.models.attention import Attention, sdpa
from engine.models.dit import Linear, Scail
from engine.models.fill import Stored, count_blocks
from engine.models.foreign_formats import refuse_foreign
from engine.models.fp8_scales import METADATA, Fp8Scales, is_beside
from engine.models.lora import Lora
from engine.models.lora_roles import require_kind
from engine.models.tensorfile import TensorFile, is_finite

log = logging.getLogger(__name__)

PREFIXES = ("model.diffusion_model.", "diffusion_model.", "")
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
ALIASES = {  # WanGP
    "pose_patch_embedding.": "patch_embedding_pose.",
    "mask_patch_embedding.": "patch_embedding_mask.",
}


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
        self._file = TensorFile(path, *more, top_key="module")
        refuse_foreign(self._file)
        self._file.warn_of_metadata(METADATA)
        self._stored = self._locate()
        self.config = self._infer_config(layers)
        self._check()
        self._loras = tuple(loras)
        for lora in loras:
            lora.check({name: self.shape(name) for name in self})
            require_kind(lora, self.config.kind.name)

    @property
    def files(self) -> tuple[Path, ...]:
        """The files of the checkpoint itself, without LoRAs."""
        return self._file.files

    def __iter__(self) -> Iterator[str]:
        return iter(self._stored)

    def shape(self, name: str) -> tuple[int, ...]:
        stored = self._stored[name]
        rows, *rest = self._file.shape(stored.name) or (1,)
        return rows // stored.parts, *rest

    def read_into(self, name: str, out: Tensor) -> None:
        """Writes a weight, its scale and all LoRAs applied, into `out` in the dtype of `out`.

        Raises `BadCheckpoint` if it is not finite in that dtype.
        """
        stored = self._stored[name]
        changed = [lora for lora in self._loras if lora.changes(name)]
        with self._file.open(stored.name) as tensor:
            rows = tensor.chunk(stored.parts)[stored.part] if stored.parts > 1 else tensor
            if not rows.is_floating_point():
                raise BadCheckpoint(
                    f"{self.path.name}: {stored.name} is stored as {tensor.dtype}; "
                    "only floating point weights, FP8 to FP32, are read."
                )
            if stored.scale is None and not changed:
                out.copy_(rows)
            else:
                out.copy_(self._merged(name, rows, changed))
        if not is_finite(out):
            raise BadCheckpoint(
                f"{self.path.name}: {stored.name} holds values that are not finite in {out.dtype}. "
                "If the file is right, load it in another type; otherwise fetch it again."
            )

    def _merged(self, name: str, rows: Tensor, loras: Sequence[Lora]) -> Tensor:
        """The changed weight in FP32, as a new tensor: a mapped one must not be written to."""
        stored = self._stored[name]
        weight = rows.to(torch.float32, copy=True, memory_format=torch.contiguous_format)
        if stored.scale is not None:
            scale = self._scale(stored, rows)
            is_odd = is_finite(scale) and not bool((scale > 0).all())
            if is_odd and bool(weight[(scale <= 0).expand_as(weight)].any()):
                raise BadCheckpoint(
                    f"{self.path.name}: {stored.scale} is {scale.min().item():g} for a weight that "
                    "is not 0; a scale above 0 is expected. Fetch the file again."
                )
            weight *= scale
        for lora in loras if is_finite(weight) else ():  # else the LoRA would be blamed
            lora.add_to(name, weight)
        return weight

    def _locate(self) -> dict[str, Stored]:
        weights = [name for name in self._file if not is_beside(name)]
        prefix = next(p for p in PREFIXES if not p or any(n.startswith(p) for n in weights))
        names = [name for name in weights if name.startswith(prefix)]
        if len(names) < len(weights):
            ignored = len(weights) - len(names)
            log.warning("%s: ignored %d tensors outside %s", self.path.name, ignored, prefix)
        self._refuse_other_models({name.removeprefix(prefix) for name in names})
        targets = _target_names([name.removeprefix(prefix) for name in names])
        scales = Fp8Scales(self._file, PREFIXES)
        stored: dict[str, Stored] = {}
        for name in names:
            short = name.removeprefix(prefix)
            parts = targets.get(short, (short,))
            for target in parts:
                if target in stored:
                    raise BadCheckpoint(f"{self.path.name}: {target} is stored twice.")
            scale = scales.find(name, prefix)
            for part, target in enumerate(parts):
                stored[target] = Stored(name, part, len(parts), scale)
        scales.require_all_used()
        return stored

    def _refuse_other_models(self, names: set[str]) -> None:
        if {"patch_embedding.weight", "patch_embedding_pose.weight"} <= names:
            return
        if names & {"mixins.patch_embed.proj_pose.weight", "pose_patch_embedding.weight"}:
            return
        if "patch_embedding.weight" in names:
            raise BadCheckpoint(
                f"{self.path.name} is another Wan model: it has patch_embedding.weight but no "
                "patch_embedding_pose.weight. A transformer of SCAIL-Preview or SCAIL-2 is "
                "expected."
            )
        raise BadCheckpoint(
            f"{self.path.name} holds no SCAIL transformer: none of its {len(names)} tensors is a "
            "patch embedding of poses."
        )

    def _scale(self, stored: Stored, rows: Tensor) -> Tensor:
        assert stored.scale is not None
        with self._file.open(stored.scale) as tensor:
            if not tensor.is_floating_point() or tensor.itemsize < 2:
                raise BadCheckpoint(
                    f"{self.path.name}: {stored.scale} is stored as {tensor.dtype}; a scale of 16 "
                    "or 32 bits is expected."
                )
            scale = tensor.float().flatten()
        if len(scale) == 1:
            return scale.clone()
        return scale.chunk(stored.parts)[stored.part].clone().view(-1, *[1] * (rows.ndim - 1))

    def _infer_config(self, layers: int | None) -> ModelConfig:
        config = ModelConfig(
            layers=count_blocks(self, BLOCK, self.path.name),
            dim=self._size("patch_embedding.weight", 0),
            ffn=self._size("blocks.0.ffn.0.weight", 0),
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
        if "patch_embedding_mask.weight" not in self._stored:
            return 0
        found, known = self._size("patch_embedding_mask.weight", 1), SCAIL2_14B.mask_dim
        if found != known:
            raise BadCheckpoint(
                f"{self.path.name}: patch_embedding_mask.weight takes {found} channels; masks of "
                f"{SCAIL2_14B.kind.title} have {known}."
            )
        return found

    def _size(self, name: str, axis: int) -> int:
        if name not in self._stored:
            raise BadCheckpoint(f"{self.path.name} lacks {name}, which every SCAIL model has.")
        shape = self.shape(name)
        if axis >= len(shape) or 0 in shape:
            raise BadCheckpoint(
                f"{self.path.name}: {name} has shape {list(shape)}; at least {axis + 1} sizes "
                "above 0 are expected."
            )
        return shape[axis]

    def _check(self) -> None:
        with torch.device("meta"):
            expected = {k: tuple(v.shape) for k, v in Scail(self.config).state_dict().items()}
        for problem, names in (
            ("lacks", expected.keys() - self._stored.keys()),
            ("holds, and SCAIL has not,", self._stored.keys() - expected.keys()),
        ):
            if names:
                first = sorted(names)[0]
                more = f" and {len(names) - 1} more tensors" if len(names) > 1 else ""
                raise BadCheckpoint(f"{self.path.name} {problem} {first}{more}.")
        for name, (rows, *rest) in expected.items():
            stored = self._stored[name]
            found, whole = self._file.shape(stored.name), (rows * stored.parts, *rest)
            if found != whole:
                raise BadCheckpoint(
                    f"{self.path.name}: {stored.name} has shape {list(found)}; as {name}, "
                    f"{list(whole)} is expected."
                )


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
    for path, module in tqdm(list(model.named_modules()), "load transformer", disable=None):
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
        for alias, proper in ALIASES.items():
            if name.startswith(alias):
                targets[name] = (proper + name.removeprefix(alias),)
        stem, suffix = re.fullmatch(r"(.*?)(\.weight|\.bias)?", name).groups(default="")  # pyright: ignore[reportOptionalMemberAccess]
        layer = re.search(r"(?<=layers\.)\d+|\d+$", stem)
        for pattern in (stem, layer and stem[: layer.start()] + "{n}" + stem[layer.end() :]):
            if pattern in SAT_NAMES:
                number = layer[0] if layer else ""
                targets[name] = tuple(
                    target.replace("{n}", number) + suffix for target in SAT_NAMES[pattern]
                )
    return targets
