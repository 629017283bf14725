"""The transformer of a package: the velocity of the exact model, from fused 8-bit blocks.

What lies outside the blocks is `dit.Scail` without layers. Its tokens are put in the order video,
reference, skeleton: attention has no order of its own, and the tokens that are needed after the
last block come first. Modulations of all steps are computed when a clip begins, and so is all that
depends on text and picture alone, whose weights are read for it and not kept.
"""

from collections.abc import Callable, Mapping
from dataclasses import fields, replace
from functools import cache, partial

import torch
from torch import Tensor, nn

from engine.binding import Forward, bind, check_widths
from engine.block import BlockWeights, ContextKeys, ContextWeights, assemble, context_keys
from engine.flow import Conditions, Recipe
from engine.graphs import GraphedSteps
from engine.models.dit import Rope, Scail, patch_grid, rope_tables
from engine.package import Package
from engine.resident import Resident
from engine.sampler import grid
from engine.steps import Blocks, Steps
from engine.upload import Weights
from engine.windows import WindowVelocity
from kernels.ops import Ops

CONTEXT = {field.name for field in fields(ContextWeights)}
TIME = ("time_embedding.", "time_projection.")  # used once a clip, on the CPU: 0.7 GB at 14B


class PackagedDenoiser:
    """Owns the weights of a package on a device."""

    def __init__(
        self, weights: Weights, ops: Ops, graphed: Callable[[Steps], GraphedSteps] | None = None
    ) -> None:
        """`graphed`: how steps are recorded and replayed; None: each is run."""
        self.package = weights.package
        self.name = f"the package {self.package.path.name}"
        self.device = weights.device
        self.config = self.package.manifest.model
        self.home = Resident(self._load_blocks, self._drop_blocks)
        self._ops, self._weights, self._graphed = ops, weights, graphed
        self._blocks: Blocks | None = None
        self._graphs: GraphedSteps | None = None
        self._wants_graphs = True
        self._outside = outside_the_blocks(self.package, weights)
        self._load_blocks()

    def use_graphs(self, wanted: bool) -> None:
        """Whether steps are recorded, where they can be: that takes memory."""
        self._wants_graphs = wanted

    def forget(self) -> None:
        """Gives back what only the clip at hand has a use for."""
        if self._graphs is not None:
            self._graphs.forget()

    def _load_blocks(self) -> None:
        names = [name for name in self.package.names if _is_of_step(name)]
        held = self._weights.read(names)
        layers = range(self.config.layers)
        self._blocks = Blocks(
            self._ops, [assemble(BlockWeights, _of_block(held, n)) for n in layers]
        )
        self._graphs = None if self._graphed is None else self._graphed(self._blocks)

    def _drop_blocks(self) -> None:
        self._blocks, self._graphs = None, None

    @property
    def _steps(self) -> Steps:
        assert self._blocks is not None
        return self._graphs if self._graphs is not None and self._wants_graphs else self._blocks

    @property
    def watched(self) -> None:
        """Its linears are parts of kernels."""

    def bind(self, conditions: Conditions, recipe: Recipe) -> WindowVelocity:
        check_widths(conditions, self.config, self.name)
        reference, vision = conditions.reference.to(self.device), conditions.vision.to(self.device)
        strength = recipe.pose_strength
        times = grid(recipe.sampler, recipe.steps, recipe.shift).timesteps
        with torch.inference_mode():
            vectors, modulations = (
                made.to(self.device) for made in self._outside.embed_times(times)
            )
        tables = cache(partial(_tables, device=self.device))

        def toward(text: Tensor) -> Forward:
            with torch.inference_mode():
                context = self.context(text, vision)

            def forward(latents: Tensor, step: int, timestep: float, pose: Tensor | None) -> Tensor:
                assert timestep == times[step]
                patches = patch_grid(latents)
                area, video = patches[1] * patches[2], patches[0] * patches[1] * patches[2]
                with torch.inference_mode():
                    embed = partial(self._outside.embed, pose_strength=strength)
                    x = video_first(embed(latents, reference, pose), area, video)
                    rope = tables(patches, pose is not None)
                    x = self._steps(x, modulations[step], context, rope, video)
                    return self._outside.head(x, vectors[step], patches)

            return forward

        return bind(toward, conditions, recipe, conditions.pose.to(self.device))

    def context(self, text: Tensor, vision: Tensor) -> list[ContextKeys]:
        """What each block's cross attention looks at. Rows of text that are zero are padding; they
        are equal after the embedding too, and one stands for all.
        """
        padding = count_padding(text)
        rows = text[: len(text) - max(padding - 1, 0)]
        embedded = self._outside.embed_context(rows.to(self.device), vision)
        made: list[ContextKeys] = []
        held: dict[str, Tensor] = {}

        def take(name: str, tensor: Tensor) -> None:
            held[name] = tensor
            if len(held) == len(names) // self.config.layers:  # those of one block
                weights = assemble(ContextWeights, _of_block(held, len(made)))
                given = embedded.text, embedded.vision, max(padding, 1)
                made.append(context_keys(self._ops, weights, *given))
                held.clear()

        names = [name for name in self.package.names if _is_context(name)]
        self._weights.visit(names, take)
        return made


def outside_the_blocks(package: Package, weights: Weights) -> Scail:
    """The model without layers, in FP32, on the device but for what embeds times."""
    held = weights.read(name for name in package.names if _is_outside(name))
    with torch.device("meta"):
        model = Scail(replace(package.manifest.model, layers=0))
    for path, module in model.named_modules():
        for key, parameter in module.named_parameters(path, recurse=False):
            stored = package.read(key) if key.startswith(TIME) else held[key]
            weight = stored.float().reshape(parameter.shape)
            setattr(module, key.rpartition(".")[2], nn.Parameter(weight, requires_grad=False))
    return model.eval()


def _is_context(name: str) -> bool:
    """Of the weights that `context_keys` needs, which lie together, block after block."""
    block, _, rest = name.partition(".")[2].partition(".")
    return block.isdigit() and rest.split(".")[0] in CONTEXT


def _is_of_step(name: str) -> bool:
    return name.startswith("blocks.") and not _is_context(name)


def _is_outside(name: str) -> bool:
    return not name.startswith(("blocks.", *TIME))


def video_first(tokens: Tensor, area: int, video: int) -> Tensor:
    """Tokens, or their tables [S, ...], from reference, video, skeleton to video first."""
    reference, seen, skeleton = tokens.split([area, video, len(tokens) - area - video])
    return torch.cat([seen, reference, skeleton])


def count_padding(text: Tensor) -> int:
    """How many of the last rows [L, C] are zero."""
    real = text.any(dim=1).nonzero()
    return len(text) - (int(real[-1]) + 1 if len(real) else 0)


def _tables(patches: tuple[int, int, int], with_pose: bool, device: torch.device) -> Rope:
    rope = rope_tables(patches, with_pose, device)
    area, video = patches[1] * patches[2], patches[0] * patches[1] * patches[2]
    return Rope(video_first(rope.cos, area, video), video_first(rope.sin, area, video))


def _of_block(held: Mapping[str, Tensor], n: int) -> Callable[[str], Tensor]:
    return lambda name: held[f"blocks.{n}.{name}"]
