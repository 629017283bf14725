"""Golden data of the transformer: a forward pass, its intermediates, and sampler trajectories.

Cases carry the configuration of their model as metadata; the weights are files of the same folder
that carry an equal one. Axis order in the files is [batch, T, C, H, W]; ours has no batch and C
first.
"""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from engine.denoise.sampler import Velocity, grid, guided, trajectory
from engine.errors import BadCheckpoint
from engine.flow import Recipe
from engine.golden.cases import Metadata, RecordedCase, fields, find, takes_masks
from engine.golden.check import Check, at_most, compare
from engine.models.dit import Block, Context, Scail, modulate, patch_grid, rope_tables

FORWARD = 1e-4
CLIP_CONTEXT = 5e-6
TRAJECTORY = 2e-4
# of the standard deviation of the output (docs/reference/denoiser.md 4.5, 9)
BF16_MEAN = 0.008 / 1.25
BF16_OFFICIAL = 1.5  # times the mean error of the official code in BF16

_OFFICIAL_BF16 = "out.out_bf16"
_RUN_HOLDS = ("sigmas", "final", "x_after_step")
_RUN = re.compile(r"steps(?P<steps>\d+)(_cfg(?P<cfg>\d+(\.\d+)?))?")


def recognises(names: frozenset[str], metadata: Metadata) -> bool:
    if takes_masks(metadata):  # SCAIL-2
        return False
    return "case" in metadata and ("in.x" in names or any(map(_is_result, names)))


@torch.inference_mode()
def checks(path: Path) -> Iterator[Check]:
    """Checks a case. Raises `BadCheckpoint` or `MissingModel` for bad or incomplete weights."""
    case = find(path)
    if isinstance(case, Check):
        yield case
        return
    wanted, clip = case.wanted, GoldenCase(case.load(), case.inputs)
    if any(name.startswith(("mid.", "out.")) for name in wanted):
        yield from _forward(case.file, clip, wanted)
    if "out.out" in wanted:
        yield _bf16(case, clip)
    yield from _trajectories(case.file, clip, wanted, case.metadata)


def _is_result(name: str) -> bool:
    return name.startswith(("mid.", "out.")) or name.rpartition(".")[2] in _RUN_HOLDS


class GoldenCase:
    """A model and the inputs of one golden case, in our axis order."""

    def __init__(self, model: Scail, tensors: Mapping[str, Tensor]) -> None:
        self.model = model
        self.latents = _ours(tensors["in.x"])
        self.noise = _ours(tensors["in.noise"])
        self.reference = _ours(tensors["in.ref_concat"])
        self.pose = _ours(tensors["in.concat_smpl_render"])
        self.history = _ours(tensors["in.history_mask"])
        self.timestep = tensors["in.timestep"].item()
        vision = tensors["in.image_clip_features"][0]
        self.context = model.embed_context(tensors["in.context"][0], vision)
        self.negative = model.embed_context(tensors["in.context_uncond"][0], vision)

    def run(self, context: Context, history: Tensor | None = None) -> Tensor:
        return self.model(self.latents, self.timestep, context, self.reference, self.pose, history)

    def after_each_step(self, recipe: Recipe) -> list[Tensor]:
        """Latents of a run from noise, in the axis order of the files."""
        velocity = guided(self.toward(self.context), self.toward(self.negative), recipe.cfg)
        return [_theirs(x) for x in trajectory(velocity, self.noise, recipe, draw=_no_draw)]

    def toward(self, context: Context) -> Velocity:
        return lambda latents, step, timestep: self.model(
            latents, timestep, context, self.reference, self.pose
        )


def _forward(file: str, case: GoldenCase, wanted: Mapping[str, Tensor]) -> Iterator[Check]:
    model, (e, modulation) = case.model, case.model.embed_time(case.timestep)
    tokens = model.embed(case.latents, case.reference, case.pose, None)
    rope = rope_tables(patch_grid(case.latents), True, tokens.device)
    first = model.blocks[0]
    assert isinstance(first, Block)
    shift, scale = (modulation + first.modulation[0])[:2]
    q, k = first.self_attn.rotated_queries_and_keys(modulate(tokens, shift, scale), rope)
    after = [tokens]
    for block in model.blocks:
        after.append(block(after[-1], modulation, case.context, rope))
    out = case.run(case.context)
    got = {
        "mid.tokens_in": tokens[None],
        "mid.time_emb": e[None],
        "mid.adaln_emb": modulation.flatten()[None],
        "mid.text_ctx": case.context.text[None],
        "mid.clip_ctx": case.context.vision[None],
        "mid.block0_q_rope": q.transpose(0, 1)[None],
        "mid.block0_k_rope": k.transpose(0, 1)[None],
        "mid.block0_out": after[1][None],
        "mid.blocks_out": after[-1][None],
        "out.out": _theirs(out),
        "out.out_b2": torch.cat([_theirs(case.run(case.negative)), _theirs(out)]),
        "out.out_hist": _theirs(case.run(case.context, case.history)),
    }
    for name in sorted(name for name in wanted if name.startswith(("mid.", "out."))):
        if name in got:
            tolerance = CLIP_CONTEXT if name == "mid.clip_ctx" else FORWARD
            yield compare(f"{file}: {name}", got[name], wanted[name], tolerance)
        elif name != _OFFICIAL_BF16:
            yield Check(f"{file}: {name}", None, None, None)


def _bf16(case: RecordedCase, clip: GoldenCase) -> Check:
    """Our BF16 mode against the FP32 output, in the mean: the order of roundings is free in BF16.

    The official code in BF16, if the file holds its output, says how far rounding leads in this
    model; ours rounds less. Where it is closer than on the data that the specification was written
    from, or is not there, the limit is that of the specification.
    """
    model = case.load(torch.bfloat16)
    out = model(clip.latents, clip.timestep, clip.context, clip.reference, clip.pose)
    exact = case.wanted["out.out"]
    official = (case.wanted.get(_OFFICIAL_BF16, exact) - exact).abs().mean().item()
    limit = max(BF16_OFFICIAL * official, BF16_MEAN * exact.std().item())
    error = (_theirs(out) - exact).abs().mean().item()
    return at_most(f"{case.file}: bf16 mode, mean error", error, limit)


def _trajectories(
    file: str, case: GoldenCase, wanted: Mapping[str, Tensor], metadata: Metadata
) -> Iterator[Check]:
    names = sorted(name for name in wanted if not name.startswith(("in.", "mid.", "out.")))
    runs: dict[str, list[Tensor]] = {}
    for name in names:
        run, _, what = name.rpartition(".")
        match = _RUN.fullmatch(run)
        if match is None or what not in _RUN_HOLDS or (what != "sigmas" and not match["cfg"]):
            yield Check(f"{file}: {name}", None, None, None)
            continue
        shift = _shift(file, metadata)
        if what == "sigmas":
            sigmas = grid("euler", int(match["steps"]), shift).sigmas
            yield compare(f"{file}: {name}", sigmas, wanted[name], 0.0)
            continue
        if run not in runs:
            recipe = Recipe("euler", int(match["steps"]), float(match["cfg"]), shift)
            runs[run] = case.after_each_step(recipe)
        after = runs[run]
        got = after[-1] if what == "final" else torch.stack(after)
        yield compare(f"{file}: {name}", got, wanted[name], TRAJECTORY)


def _shift(file: str, metadata: Metadata) -> float:
    shift = fields(metadata, "config").get("shift")
    if not isinstance(shift, int | float):
        raise BadCheckpoint(f"The config of {file} gives no shift: a number is expected.")
    return float(shift)


def _no_draw() -> Tensor:
    raise AssertionError("Euler draws no noise")


def _ours(tensor: Tensor) -> Tensor:
    return tensor[0].transpose(0, 1).contiguous()


def _theirs(tensor: Tensor) -> Tensor:
    return tensor.transpose(0, 1)[None]
