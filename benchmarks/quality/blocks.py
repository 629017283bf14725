"""Compares block by block how far 8 bits are from the exact model.

The exact model says what it was called with in a clip. Then its blocks are walked one by one, with
those of a package beside them: once fed the exact tokens, once fed their own. The walk follows
`dit.Scail.forward` and `engine.denoise.block`.
"""

import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from functools import partial

import torch
from torch import Tensor, nn

from benchmarks.quality.metrics import relative_error
from engine.denoise.block import (
    BlockWeights,
    ContextKeys,
    ContextWeights,
    assemble,
    block_modulation,
    context_keys,
    run_block,
)
from engine.models.dit import Context, Rope, Scail, patch_grid, rope_tables
from engine.package.folder import Package
from kernels.ops import Ops


@dataclass(frozen=True, slots=True)
class Call:
    """One evaluation of the exact model."""

    latents: Tensor  # [16, t, h, w]
    timestep: float
    context: Context
    reference: Tensor  # [16, 1, h, w]
    pose: Tensor | None  # [16, t, h/2, w/2]
    pose_strength: float
    velocity: Tensor  # [16, t, h, w], what it answered


@dataclass(frozen=True, slots=True)
class BlockError:
    """The tokens after a block against the exact ones, the worst of the evaluations looked at."""

    block: int
    own_error: float  # fed the exact model's tokens
    through_error: float  # fed what the 8-bit blocks before it made


@dataclass(frozen=True, slots=True)
class Walked:
    """The errors of all blocks in one evaluation, and the velocities after them."""

    errors: tuple[BlockError, ...]
    velocity: Tensor  # [16, t, h, w], after the 8-bit blocks
    exact: Tensor  # [16, t, h, w], after the exact ones


@contextmanager
def recorded(model: Scail) -> Iterator[list[Call]]:
    """Records every evaluation of the model while it is open, in order."""
    calls: list[Call] = []
    signature = inspect.signature(Scail.forward)

    def record(
        _: nn.Module, args: tuple[object, ...], named: dict[str, object], velocity: Tensor
    ) -> None:
        given = signature.bind(None, *args, **named)
        given.apply_defaults()
        told = {field.name: given.arguments[field.name] for field in fields(Call)[:-1]}
        calls.append(Call(**told, velocity=velocity.clone()))

    hook = model.register_forward_hook(record, with_kwargs=True)
    try:
        yield calls
    finally:
        hook.remove()


@torch.inference_mode()
def walk(model: Scail, package: Package, ops: Mapping[str, Ops], call: Call) -> dict[str, Walked]:
    """Repeats an evaluation by each of `ops`. The package's tensors are read block by block."""
    patches = patch_grid(call.latents)
    area, video = patches[1] * patches[2], patches[0] * patches[1] * patches[2]
    x = model.embed(call.latents, call.reference, call.pose, pose_strength=call.pose_strength)
    order = video_first(len(x), area, video).to(x.device)
    tables = rope_tables(patches, call.pose is not None, x.device)
    x, rope = x[order], Rope(tables.cos[order], tables.sin[order])
    vector, modulation = model.embed_time(call.timestep)
    through = {name: x.clone() for name in ops}
    errors: dict[str, list[BlockError]] = {name: [] for name in ops}
    for n, block in enumerate(model.blocks):
        want = block(x, modulation, call.context, rope)
        weights, context_weights = read_block(package, n, x.device)
        own_modulation = block_modulation(weights, modulation)
        for name, op in ops.items():
            keys = _keys(op, context_weights, call.context)
            run = partial(run_block, op, weights, keys, modulation=own_modulation, rope=rope)
            own = run(x=x.clone())
            through[name] = run(x=through[name])
            apart = relative_error(own, want), relative_error(through[name], want)
            errors[name].append(BlockError(n, *apart))
        x = want
    head = partial(model.head, e=vector, grid=patches)
    exact = head(x[:video])
    return {name: Walked(tuple(errors[name]), head(through[name][:video]), exact) for name in ops}


def worst(walks: Sequence[Walked]) -> tuple[BlockError, ...]:
    """The worst of both errors of each block."""
    return tuple(
        BlockError(n, max(e.own_error for e in same), max(e.through_error for e in same))
        for n, same in enumerate(zip(*(walked.errors for walked in walks), strict=True))
    )


def read_block(
    package: Package, n: int, device: torch.device
) -> tuple[BlockWeights, ContextWeights]:
    def read(name: str) -> Tensor:
        return package.read(f"blocks.{n}.{name}").to(device)

    return assemble(BlockWeights, read), assemble(ContextWeights, read)


def video_first(tokens: int, area: int, video: int) -> Tensor:
    """Places of the tokens reference, video, skeleton in the order of packages: what is rounded
    together depends on it.
    """
    places = torch.arange(tokens)
    return torch.cat([places[area : area + video], places[:area], places[area + video :]])


def _keys(ops: Ops, weights: ContextWeights, context: Context) -> ContextKeys:
    """Keys of cross attention: one row stands for the last rows of text, equal as padding is."""
    differs = (context.text != context.text[-1]).any(dim=1).nonzero()
    rows = int(differs[-1]) + 2 if len(differs) else 1
    repeats = len(context.text) - rows + 1
    return context_keys(ops, weights, context.text[:rows], context.vision, repeats)
