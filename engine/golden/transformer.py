"""Golden data of the transformer: a forward pass, its intermediates, and sampler trajectories.

Cases carry the configuration of their model as metadata; the weights are all files of the same
folder that carry the same one. Axis order in the files is [batch, T, C, H, W]; ours has no batch
and C first.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from engine.flow import Recipe
from engine.golden.check import Check, at_most, compare
from engine.models.checkpoint import Checkpoint, load_transformer
from engine.models.dit import Block, Context, Scail, modulate, patch_grid, rope_tables
from engine.sampler import Velocity, grid, guided, trajectory

FORWARD = 1e-4
CLIP_CONTEXT = 5e-6
TRAJECTORY = 2e-4
BF16_MEAN = 0.008  # the order of roundings is free in BF16 (spec/denoiser.md 9)
SHIFT = 5.0


def recognises(names: frozenset[str], metadata: Mapping[str, str]) -> bool:
    return "case" in metadata and ("in.x" in names or any(n.endswith(".final") for n in names))


def supports(names: frozenset[str], metadata: Mapping[str, str]) -> bool:
    """True for weights: they are read by the checks of other files and hold nothing to check."""
    return "prefix" in metadata and all(name.startswith(metadata["prefix"]) for name in names)


@torch.inference_mode()
def checks(path: Path) -> Iterator[Check]:
    wanted, metadata = _read(path)
    weights, inputs = [], wanted
    for other in sorted(path.parent.glob("*.safetensors")):
        with safe_open(other, "pt") as file:
            names, found = frozenset(file.keys()), file.metadata() or {}
        if found.get("config") != metadata.get("config"):
            continue
        if supports(names, found):
            weights.append(other)
        elif found.get("case") == metadata["case"] and "in.x" in names:
            inputs, _ = _read(other)
    if not weights or "in.x" not in inputs:
        missing = "weights with the same config" if not weights else "inputs of the same case"
        yield Check(f"{path.name}: no {missing} beside it", None, None, False)
        return
    case = Case(load_transformer(Checkpoint(*weights), torch.device("cpu")), inputs)
    if "in.x" in wanted:
        yield from _forward(path.name, case, wanted)
        yield _bf16(path.name, Checkpoint(*weights), case, wanted)
    if any(name.endswith(".final") for name in wanted):
        yield from _trajectories(path.name, case, wanted)


class Case:
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

    def toward(self, context: Context) -> Velocity:
        return lambda latents, step, timestep: self.model(
            latents, timestep, context, self.reference, self.pose
        )


def _forward(file: str, case: Case, wanted: Mapping[str, Tensor]) -> Iterator[Check]:
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
    for name in sorted(got.keys() & wanted.keys()):
        tolerance = CLIP_CONTEXT if name == "mid.clip_ctx" else FORWARD
        yield compare(f"{file}: {name}", got[name], wanted[name], tolerance)


def _bf16(file: str, checkpoint: Checkpoint, case: Case, wanted: Mapping[str, Tensor]) -> Check:
    """Our BF16 mode against the FP32 output, in the mean."""
    model = load_transformer(checkpoint, torch.device("cpu"), torch.bfloat16)
    out = model(case.latents, case.timestep, case.context, case.reference, case.pose)
    error = (_theirs(out) - wanted["out.out"]).abs().mean().item()
    return at_most(f"{file}: bf16 mode, mean error", error, BF16_MEAN)


def _trajectories(file: str, case: Case, wanted: Mapping[str, Tensor]) -> Iterator[Check]:
    for name in sorted(n for n in wanted if n.endswith((".sigmas", ".final"))):
        run = name.rpartition(".")[0]
        steps, _, cfg = run.removeprefix("steps").partition("_cfg")
        if name.endswith(".sigmas"):
            sigmas = grid("euler", int(steps), SHIFT).sigmas
            yield compare(f"{file}: {name}", sigmas, wanted[name], 0.0)
            continue

        recipe = Recipe("euler", int(steps), float(cfg), SHIFT)
        velocity = guided(case.toward(case.context), case.toward(case.negative), recipe.cfg)
        after = list(trajectory(velocity, case.noise, recipe, draw=_no_draw))
        yield compare(f"{file}: {name}", _theirs(after[-1]), wanted[name], TRAJECTORY)
        if f"{run}.x_after_step" in wanted:
            theirs = torch.stack([_theirs(latents) for latents in after])
            name = f"{run}.x_after_step"
            yield compare(f"{file}: {name}", theirs, wanted[name], TRAJECTORY)


def _no_draw() -> Tensor:
    raise AssertionError("Euler draws no noise")


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    with safe_open(path, "pt") as file:
        tensors = {name: file.get_tensor(name).float() for name in file.keys()}  # noqa: SIM118
        return tensors, file.metadata() or {}


def _ours(tensor: Tensor) -> Tensor:
    return tensor[0].transpose(0, 1).contiguous()


def _theirs(tensor: Tensor) -> Tensor:
    return tensor.transpose(0, 1)[None]
