"""The transformer of a package: the velocity of the exact model, from fused 8-bit blocks.

Outside the blocks it is `dit.Scail` without layers. Its tokens are put in the order video,
pictures, skeleton: attention has no order of its own, and the tokens that are needed after the
last block come first. Modulations of all steps are computed when a clip begins, and so are the keys
of text and picture (`engine.denoise.contexts`).
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cache, partial

import torch
from torch import Tensor, nn

from engine.denoise.block import BlockWeights, ContextKeys, assemble, tensor_names
from engine.denoise.block_runner import BlockRunner, Blocks, LaunchedBlocks, Pass
from engine.denoise.contexts import Contexts
from engine.denoise.cuda_graphs import GraphedBlocks
from engine.denoise.guidance import Seen, bind, check_widths, texts
from engine.denoise.packed import BlockSource, StoredBlocks, pack
from engine.denoise.sampler import grid
from engine.denoise.schedule import Streaming
from engine.denoise.streamed import StreamedBlocks
from engine.denoise.windows import WindowVelocity, evaluations_of_each
from engine.flow import Conditions, Recipe, Roles
from engine.machine.resident import Resident
from engine.machine.transfers import transfers_of
from engine.machine.upload import PackageWeights
from engine.models.attention import Attention
from engine.models.dit import Rope, Scail, patch_grid, pictures, places, rope_tables
from engine.package.folder import Package
from kernels.ops import Ops, plain_attention

TIME = ("time_embedding.", "time_projection.")  # used once a clip, on the CPU: 0.7 GB at 14B


class PackagedDenoiser:
    """Owns the weights of a package on a device."""

    def __init__(
        self,
        weights: PackageWeights,
        ops: Ops,
        make_graphs: Callable[[BlockRunner], GraphedBlocks] | None = None,
        make_runner: Callable[[Ops, Blocks], BlockRunner] = LaunchedBlocks,
        *,
        loads: bool = True,
        streams_from: Callable[[StoredBlocks], BlockSource] = lambda stored: stored,
    ) -> None:
        """`make_runner` makes the program that runs the blocks, and `make_graphs` one that records
        and replays it; None: nothing is recorded. Unless it `loads` them, the blocks come when they
        are used first. `streams_from` says where streamed blocks are kept: in the file.
        """
        self.package = weights.package
        self.name = f"the package {self.package.path.name}"
        self.device = weights.device
        self.config = self.package.manifest.model
        self.home = Resident(self._load_blocks, self._drop_blocks)
        self._ops, self._weights = ops, weights
        self._make_graphs, self._make_runner = make_graphs, make_runner
        self._streams_from = cache(lambda: streams_from(self._stored()))
        self._transfers = cache(lambda: transfers_of(self.device))
        self._streaming: Streaming | None = None
        self._blocks: Blocks | None = None
        self._plain_runner: BlockRunner | None = None
        self._graphs: GraphedBlocks | None = None
        self._wants_graphs = True
        layers = self.config.layers
        names = tensor_names(BlockWeights)  # those of a block lie together in the file
        self._block_names = [f"blocks.{n}.{name}" for n in range(layers) for name in names]
        self._outside = outside_the_blocks(self.package, weights)
        self.kept = Contexts(weights, layers, self._outside)
        self.home.settle(stays=False)  # they are not here yet
        self.home.settle(stays=loads)

    def use_graphs(self, wanted: bool) -> None:
        """Decides if evaluations are recorded, where they can be: that takes memory."""
        self._wants_graphs = wanted

    def stream(self, streaming: Streaming | None) -> None:
        """Decides which blocks stay on the device while others are copied to it ahead of their use;
        None: all stay. Where that changes, the blocks leave.
        """
        if streaming != self._streaming:
            self.home.settle(stays=False)
            self._streaming = streaming

    @property
    def block_bytes(self) -> int:
        """Those of all blocks, in one piece each."""
        return self._stored().nbytes

    @property
    def read_rate(self) -> float | None:
        """Bytes a second that were read from the package so far; None: nothing was streamed."""
        weights = self._weights
        return weights.read_bytes / weights.read_s if weights.read_s else None

    @property
    def attention_bits(self) -> int:
        """Those of q, k and v in self attention now."""
        return self._ops.attention_bits

    @contextmanager
    def attending(self, attention: Attention) -> Iterator[None]:
        """Computes self attention in 16 bits by `attention` while it is open: slower, and without
        the errors of 8 bits.
        """
        usual = self._ops
        self._use(plain_attention(usual, attention))
        try:
            yield
        finally:
            self._use(usual)

    def _use(self, ops: Ops) -> None:
        self._ops = ops
        if self._blocks is not None:
            self._plain_runner = self._make_runner(ops, self._blocks)
            make_graphs = self._make_graphs
            self._graphs = None if make_graphs is None else make_graphs(self._plain_runner)

    def forget(self) -> None:
        """Gives back the memory that only the clip at hand has a use for."""
        if self._graphs is not None:
            self._graphs.forget()

    def _load_blocks(self) -> None:
        if self._streaming is not None:
            source, transfers = self._streams_from(), self._transfers()
            self._blocks = StreamedBlocks(source, self._streaming, transfers, self.device)
        else:
            held = self._weights.read(self._block_names)
            layers = range(self.config.layers)
            self._blocks = [assemble(BlockWeights, _of_block(held, n)) for n in layers]
        self._use(self._ops)

    def _drop_blocks(self) -> None:
        if isinstance(self._blocks, StreamedBlocks):
            self._blocks.close()
        self._blocks, self._plain_runner, self._graphs = None, None, None

    def _stored(self) -> StoredBlocks:
        layers = range(self.config.layers)
        return StoredBlocks(self._weights, [pack(self._weights, n) for n in layers])

    @property
    def _runner(self) -> BlockRunner:
        assert self._plain_runner is not None
        # a graph would hold the copies of one step to its end
        graphs = self._graphs if self._wants_graphs and self._streaming is None else None
        return self._plain_runner if graphs is None else graphs

    @property
    def recorded(self) -> None:
        """None: its linears are parts of kernels."""

    def bind(self, conditions: Conditions, recipe: Recipe) -> WindowVelocity:
        check_widths(conditions, self.config, self.name)
        reference, vision = conditions.reference.to(self.device), conditions.vision.to(self.device)
        strength = recipe.pose_strength
        times = grid(recipe.sampler, recipe.steps, recipe.shift).timesteps
        with torch.inference_mode():
            vectors, modulations = (
                made.to(self.device) for made in self._outside.embed_times(times)
            )
            contexts = self.contexts(texts(conditions), vision)
        tables = cache(partial(_tables, device=self.device, roles=conditions.roles))
        shown = pictures(conditions.roles)
        seeing, blind = evaluations_of_each(recipe, conditions.pose.shape[1])

        @torch.inference_mode()
        def forward(
            context: Sequence[ContextKeys],
            left: dict[bool, int],
            latents: Tensor,
            step: int,
            timestep: float,
            seen: Seen,
        ) -> Tensor:
            assert timestep == times[step]
            patches = patch_grid(latents)
            before, video = shown * patches[1] * patches[2], math.prod(patches)
            embed = partial(self._outside.embed, pose_strength=strength, roles=seen.roles)
            x = video_first(embed(latents, reference, seen.pose, seen.history), before, video)
            with_pose = seen.pose is not None
            rope = tables(patches, with_pose)
            x = self._runner(Pass(x, modulations[step], context, rope, video, left[with_pose]))
            left[with_pose] -= 1
            return self._outside.head(x, vectors[step], patches)

        forwards = [partial(forward, context, {True: seeing, False: blind}) for context in contexts]
        return bind(forwards, recipe, conditions, self.device)

    def contexts(self, texts: Sequence[Tensor], vision: Tensor) -> list[list[ContextKeys]]:
        """Computes the keys of each block's cross attention for each text [L, text_dim] with the
        picture.
        """
        return self.kept.keys(self._ops, texts, vision)


def outside_the_blocks(package: Package, weights: PackageWeights) -> Scail:
    """Loads the model without layers, in FP32, on the device except for what embeds times."""
    with torch.device("meta"):
        model = Scail(replace(package.manifest.model, layers=0))
    names = [name for name, _ in model.named_parameters()]
    held = weights.read(name for name in names if not name.startswith(TIME))
    for path, module in model.named_modules():
        for key, parameter in module.named_parameters(path, recurse=False):
            stored = package.read(key) if key.startswith(TIME) else held[key]
            weight = stored.float().reshape(parameter.shape)
            setattr(module, key.rpartition(".")[2], nn.Parameter(weight, requires_grad=False))
    return model.eval()


def video_first(tokens: Tensor, before: int, video: int) -> Tensor:
    """Reorders tokens, or their tables [S, ...], from pictures, video, skeleton to video first.

    `before` are those of the pictures.
    """
    shown, seen, skeleton = tokens.split([before, video, len(tokens) - before - video])
    return torch.cat([seen, shown, skeleton])


def _tables(
    patches: tuple[int, int, int], with_pose: bool, device: torch.device, roles: Roles | None
) -> Rope:
    rope = rope_tables(patches, with_pose, device, *places(roles))
    before, video = pictures(roles) * patches[1] * patches[2], math.prod(patches)
    return Rope(video_first(rope.cos, before, video), video_first(rope.sin, before, video))


def _of_block(held: Mapping[str, Tensor], n: int) -> Callable[[str], Tensor]:
    return lambda name: held[f"blocks.{n}.{name}"]
