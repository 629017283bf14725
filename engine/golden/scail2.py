"""Golden data of SCAIL-2: a forward pass in its variants, intermediates, sampler trajectories.

Axis order in the files is [batch, C, T, H, W], ours without the batch. Sizes, widths and the
numbers of further pictures and history frames are those of the tensors; the mode is in the
description of the case (docs/reference/scail2.md 9).
"""

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeAlias

import torch
from torch import Tensor

from engine.denoise.sampler import Velocity, grid, guided, trajectory
from engine.errors import BadCheckpoint
from engine.flow import Mode, Recipe, Roles
from engine.golden.cases import Metadata, RecordedCase, fields, find, takes_masks
from engine.golden.check import Check, compare
from engine.models.dit import Block, Context, Scail, modulate, patch_grid, places, rope_tables

FORWARD = 1e-4
SIGMAS = 1e-6
TRAJECTORY = 2e-4

SAMPLER_OF = {"unipc": "unipc", "dpm++": "dpm++_official"}
OTHER_MODE: Mapping[Mode, Mode] = {"animation": "replacement", "replacement": "animation"}

_RUN = re.compile(
    r"(?P<solver>.+)\.n(?P<steps>\d+)\.shift(?P<shift>\d+(\.\d+)?)\.cfg(?P<cfg>\d+(\.\d+)?)"
)
_RUN_HOLDS = ("sigmas", "timesteps", "after_step")


@dataclass(frozen=True, slots=True)
class Told:
    """What the model is told of a clip beside its text, without a batch, as it takes it."""

    reference: Tensor  # [16, 1, h, w]
    driving: Tensor  # [16, t, h/2, w/2]
    roles: Roles
    known: Tensor | None  # [4, t, h, w], 1 in the frames of the history

    def velocity(self, model: Scail, context: Context) -> Velocity:
        return lambda latents, step, timestep: model(
            latents, timestep, context, self.reference, self.driving, self.known, roles=self.roles
        )


Variant: TypeAlias = Callable[[Told], Told]


def _as_told(told: Told) -> Told:
    return told


def _in_other_mode(told: Told) -> Told:
    return replace(told, roles=replace(told.roles, mode=OTHER_MODE[told.roles.mode]))


def _with_zero_masks(told: Told) -> Told:
    """The masks of further pictures stay."""
    zeros = {name: torch.zeros_like(getattr(told.roles, name)) for name in ("reference", "driving")}
    return replace(told, roles=replace(told.roles, **zeros))


def _without_history(told: Told) -> Told:
    return replace(told, known=None)


def _without_additional(told: Told) -> Told:
    none = {name: getattr(told.roles, name)[:, :0] for name in ("additional", "additional_masks")}
    return replace(told, roles=replace(told.roles, **none))


VARIANTS: Mapping[str, Variant] = {
    "out.out": _as_told,
    "out.out_other_mode": _in_other_mode,
    "out.out_zero_masks": _with_zero_masks,
    "out.out_no_history": _without_history,
    "out.out_no_additional": _without_additional,
}


def recognises(names: frozenset[str], metadata: Metadata) -> bool:
    if "case" not in metadata or not takes_masks(metadata):
        return False
    return "in.x" in names or any(map(_is_result, names))


@torch.inference_mode()
def checks(path: Path) -> Iterator[Check]:
    """Checks a case. Raises `BadCheckpoint` or `MissingModel` for bad or incomplete weights."""
    case = find(path)
    if isinstance(case, Check):
        yield case
        return
    clip = GoldenClip(case)
    results = sorted(name for name in case.wanted if not name.startswith("in."))
    at_once = [name for name in results if name.startswith(("mid.", "out."))]
    if at_once:
        yield from _forward(case, clip, at_once)
    yield from _trajectories(case, clip, [name for name in results if name not in at_once])


class GoldenClip:
    """A model and the inputs of one golden case."""

    def __init__(self, case: RecordedCase) -> None:
        given = {name: tensor[0] for name, tensor in case.inputs.items()}
        self.model = case.load()
        self.latents = given["in.x"]
        self.timestep = given["in.timestep"].item()
        self.vision = given["in.clip_fea"]
        self.context = self.model.embed_context(given["in.context"], self.vision)
        self.negative = self.model.embed_context(given["in.context_uncond"], self.vision)
        self.noise, self.history = given.get("in.noise"), given.get("in.history_latent")
        self.told = Told(
            given["in.ref_latents"],
            given["in.pose_latents"],
            _roles(given, mode_of(case)),
            given.get("in.history_mask"),
        )

    def run(self, told: Told, context: Context) -> Tensor:
        """The velocity in the axis order of the files."""
        return told.velocity(self.model, context)(self.latents, 0, self.timestep)[None]

    def after_each_step(self, recipe: Recipe) -> Tensor:
        """Latents of a run from noise [steps, 1, 16, t, h, w]."""
        if self.noise is None:
            raise BadCheckpoint("The case has no in.noise, from which its runs begin.")
        toward, away = (self.told.velocity(self.model, c) for c in (self.context, self.negative))
        velocity = guided(toward, away, recipe.cfg)
        path = trajectory(velocity, self.noise, recipe, _no_draw, self.history)
        return torch.stack(list(path))[:, None]


def mode_of(case: RecordedCase) -> Mode:
    """Reads the mode of a case, which no tensor tells. Raises `BadCheckpoint` if it is not told."""
    told = fields(case.metadata, "case")
    named: Mapping[object, Mode] = {mode: mode for mode in OTHER_MODE}
    flagged: Mapping[object, Mode] = {False: "animation", True: "replacement"}
    mode = named.get(told.get("mode")) or flagged.get(told.get("replace"))
    if mode is not None:
        return mode
    raise BadCheckpoint(
        f"The description of {case.file} gives no mode: {' or '.join(OTHER_MODE)} is expected."
    )


def _roles(given: Mapping[str, Tensor], mode: Mode) -> Roles:
    reference, masks = given["in.ref_latents"], given["in.ref_masks"][:, :1]
    return Roles(
        mode,
        masks,
        given["in.driving_masks"],
        given.get("in.additional_ref_latents", reference[:, :0]),
        given.get("in.additional_ref_masks", masks[:, :0]),
    )


def _is_result(name: str) -> bool:
    return name.startswith(("mid.", "out.")) or name.rpartition(".")[2] in _RUN_HOLDS


def _forward(case: RecordedCase, clip: GoldenClip, names: list[str]) -> Iterator[Check]:
    got = _intermediates(clip)
    for name in names:
        if name == "out.out_uncond":
            value = clip.run(clip.told, clip.negative)
        elif name in VARIANTS:
            value = clip.run(VARIANTS[name](clip.told), clip.context)
        elif name in got:
            value = got[name]
        else:
            yield Check(f"{case.file}: {name}", None, None, None)
            continue
        if name == "mid.text_ctx":  # the file holds the first rows
            value = value[:, : case.wanted[name].shape[1]]
        yield compare(f"{case.file}: {name}", value, case.wanted[name], FORWARD)


def _intermediates(clip: GoldenClip) -> dict[str, Tensor]:
    model, told = clip.model, clip.told
    e, modulation = model.embed_time(clip.timestep)
    tokens = model.embed(clip.latents, told.reference, told.driving, told.known, roles=told.roles)
    rope = rope_tables(patch_grid(clip.latents), True, tokens.device, *places(told.roles))
    first = model.blocks[0]
    assert isinstance(first, Block)
    shift, scale = (modulation + first.modulation[0])[:2]
    q, k = first.self_attn.rotated_queries_and_keys(modulate(tokens, shift, scale), rope)
    return {
        "mid.tokens_in": tokens[None],
        "mid.rope_cos": rope.cos[:, 0],
        "mid.rope_sin": rope.sin[:, 0],
        "mid.time_emb": e[None],
        "mid.adaln_emb": modulation.flatten()[None],
        "mid.text_ctx": clip.context.text[None],
        "mid.clip_ctx": clip.context.vision[None],
        "mid.block0_q_rope": q.transpose(0, 1)[None],
        "mid.block0_k_rope": k.transpose(0, 1)[None],
        "mid.block0_out": first(tokens, modulation, clip.context, rope)[None],
    }


def _trajectories(case: RecordedCase, clip: GoldenClip, names: list[str]) -> Iterator[Check]:
    for name in names:
        run, _, what = name.rpartition(".")
        match = _RUN.fullmatch(run)
        if match is None or what not in _RUN_HOLDS or match["solver"] not in SAMPLER_OF:
            yield Check(f"{case.file}: {name}", None, None, None)
            continue
        recipe = Recipe(
            SAMPLER_OF[match["solver"]],
            int(match["steps"]),
            float(match["cfg"]),
            float(match["shift"]),
        )
        levels = grid(recipe.sampler, recipe.steps, recipe.shift)
        wanted = case.wanted[name]
        if what == "after_step":
            yield compare(f"{case.file}: {name}", clip.after_each_step(recipe), wanted, TRAJECTORY)
        elif what == "sigmas":
            yield compare(f"{case.file}: {name}", levels.sigmas, wanted, SIGMAS)
        else:
            yield compare(f"{case.file}: {name}", levels.timesteps, wanted, 0)


def _no_draw() -> Tensor:
    raise AssertionError("these solvers draw no noise")
