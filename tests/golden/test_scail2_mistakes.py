"""What a reader of SCAIL-2's specification could get wrong moves a golden by more than its limit.

Places in RoPE are worked out here once more, token by token and in FP64, so that one detail can be
changed. Each mistake names the smallest change over the cases that is written down for it
(docs/reference/scail2.md 9).
"""

from dataclasses import dataclass, replace
from functools import cache

import pytest
import torch
from safetensors.torch import load_file

from engine.denoise.sampler import guided, trajectory
from engine.flow import Recipe
from engine.golden import scail2
from engine.golden.cases import find
from engine.models.dit import Rope, patch_grid, pictures, places, rope_tables

CASES = ("a", "b", "c", "d")
SIZES = (44, 42, 42)  # of a head, for time, rows, columns


@cache
def clip_of(folder, name):
    with torch.inference_mode():
        return scail2.GoldenClip(find(folder / f"case_{name}_forward.safetensors"))


@cache
def recorded(folder, name, kind="forward"):
    return load_file(folder / f"case_{name}_{kind}.safetensors")


@pytest.fixture
def folder(golden):
    return golden / "scail2"


@dataclass(frozen=True)
class Places:
    """The places of the tokens, with what a mistake changes of them."""

    later: int  # of the video behind the first picture
    lower: int  # rows of the pictures
    driving_later: int = 0  # of the driving video behind the video
    columns: int = 120  # of the driving video
    pooled: str = "mean"
    times: tuple[int, ...] | None = None  # of the pictures, in the order of their tokens


RIGHT = {"animation": Places(1, 0), "replacement": Places(0, 120)}


def turns(where):
    """Angles [n, 64] fp64 of places [n, 3]."""
    parts = [
        where[:, axis, None] * 10_000 ** (-torch.arange(0, size, 2).double() / size)
        for axis, size in enumerate(SIZES)
    ]
    return torch.cat(parts, dim=1)


def lattice(times, rows, columns):
    return torch.cartesian_prod(
        *(torch.as_tensor(part).double() for part in (times, rows, columns))
    )


def tables(clip, at):
    """Cos and sin [S, 1, 64] of the tokens of a clip."""
    (t, h, w), count = patch_grid(clip.latents), pictures(clip.told.roles)
    shown = list(range(count)) if at.times is None else at.times
    rows, columns, video = torch.arange(h), torch.arange(w), torch.arange(t) + count - 1 + at.later
    first = turns(
        torch.cat([lattice(shown, rows + at.lower, columns), lattice(video, rows, columns)])
    )
    driving = video + at.driving_later
    corners = [
        lattice(driving, rows[down::2], columns[right::2] + at.columns)
        for down in (0, 1)
        for right in (0, 1)
    ]
    if at.pooled == "midpoint":
        corners = [torch.stack(corners).mean(0)]
    if at.pooled == "nearest":
        corners = corners[:1]
    cos, sin = (
        torch.cat([turn(first), torch.stack([turn(turns(c)) for c in corners]).mean(0)])
        for turn in (torch.cos, torch.sin)
    )
    return Rope(cos.float()[:, None], sin.float()[:, None])


@torch.inference_mode()
def velocity(clip, told=None, latents=None, at=None, changed=None):
    """A forward with one detail changed: what is told, the latents, the places or the tokens."""
    model, told = clip.model, clip.told if told is None else told
    latents = clip.latents if latents is None else latents
    tokens = model.embed(latents, told.reference, told.driving, told.known, roles=told.roles)
    if changed is not None:
        tokens = changed(clip, tokens)
    grid = patch_grid(latents)
    rope = rope_tables(grid, True, tokens.device, *places(told.roles))
    e, modulation = model.embed_time(clip.timestep)
    for block in model.blocks:
        tokens = block(tokens, modulation, clip.context, tables(clip, at) if at else rope)
    area = grid[1] * grid[2]
    start = area * pictures(told.roles)
    return model.head(tokens[start : start + area * grid[0]], e, grid)[None]


def placed(names, **wrong):
    """A mistake in the places of the tokens."""

    def run(clip):
        return velocity(clip, at=replace(RIGHT[clip.told.roles.mode], **wrong))

    return names, run


def masked(change, names=CASES):
    """A mistake in all masks."""

    def run(clip):
        kinds = ("reference", "driving", "additional_masks")
        wrong = {kind: change(getattr(clip.told.roles, kind)) for kind in kinds}
        return velocity(clip, told=replace(clip.told, roles=replace(clip.told.roles, **wrong)))

    return names, run


def class_major(masks):
    return masks.unflatten(0, (4, 7)).transpose(0, 1).flatten(0, 1)


def without_bias(clip, tokens):
    return tokens - clip.model.patch_embedding_mask.bias


def reference_mask_everywhere(clip, tokens):
    embed = clip.model.patch_embedding_mask
    t, h, w = patch_grid(clip.latents)
    start = h * w * pictures(clip.told.roles)
    mask = embed(clip.told.roles.reference).flatten(1).T - embed.bias
    video = tokens[start : start + t * h * w] + mask.repeat(t, 1)
    return torch.cat([tokens[:start], video, tokens[start + t * h * w :]])


def with_scaled_history(clip):
    frames = clip.history.shape[1]
    scaled = (1 - clip.timestep / 1000) * clip.latents[:, :frames]
    return velocity(clip, latents=torch.cat([scaled, clip.latents[:, frames:]], dim=1))


def with_one_history_channel(clip):
    one = torch.zeros_like(clip.told.known)
    one[:1] = clip.told.known[:1]
    return velocity(clip, told=replace(clip.told, known=one))


# the cases that it shows in, the forward with the mistake, and the change written down for it
MISTAKES = {
    "turned by the midpoint": (placed(CASES, pooled="midpoint"), 3.5e-3),
    "the nearest and not the mean": (placed(CASES, pooled="nearest"), 1.4e-2),
    "masks made binary again": (masked(torch.round), 1.4e-2),
    "driving video one frame early": (placed(CASES, driving_later=-1), 1.6e-2),
    "driving video one frame late": (placed(CASES, driving_later=1), 1.3e-2),
    "replacement with the video later": (placed("b", later=1), 2.3e-2),
    "replacement with the rows of animation": (placed("b", lower=0), 6.0e-2),
    "further pictures in reverse": (placed("c", times=(1, 0, 2)), 3.5e-2),
    "the first picture first": (placed("c", times=(1, 2, 0)), 2.7e-2),
    "no shift of columns": (placed(CASES, columns=0), 6.0e-2),
    "channels by class and then by frame": (masked(class_major), 0.16),
    "masks embedded without bias": ((CASES, lambda c: velocity(c, changed=without_bias)), 0.37),
    "history scaled by the signal's share": (("d", with_scaled_history), 0.87),
    "the picture's mask over the video": (
        (CASES, lambda c: velocity(c, changed=reference_mask_everywhere)),
        1.2,
    ),
    "one channel of the history mask": (("d", with_one_history_channel), 1.2),
}


@pytest.mark.golden
@pytest.mark.parametrize("name", CASES)
def test_the_forward_of_this_file_is_right_where_nothing_is_changed(folder, name):
    clip, want = clip_of(folder, name), recorded(folder, name)
    right = tables(clip, RIGHT[clip.told.roles.mode])
    assert (right.cos[:, 0] - want["mid.rope_cos"]).abs().max() < 2e-6
    assert (right.sin[:, 0] - want["mid.rope_sin"]).abs().max() < 2e-6
    for got in (velocity(clip), velocity(clip, at=RIGHT[clip.told.roles.mode])):
        assert (got - want["out.out"]).abs().max() < scail2.FORWARD


@pytest.mark.golden
@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_in_the_network_moves_the_velocity_by_what_is_written(folder, mistake):
    (names, run), written = MISTAKES[mistake]
    with torch.inference_mode():
        moved = {
            name: (run(clip_of(folder, name)) - recorded(folder, name)["out.out"]).abs().max()
            for name in names
        }
    assert written > 30 * scail2.FORWARD
    assert min(moved.values()).item() >= 0.95 * written


def run_of(clip, sampler="dpm++_official", history=None, seen=None):
    """Latents after each of 4 steps, shift 3, guided by 5; `seen` changes what the model sees."""
    recipe = Recipe(sampler, steps=4, cfg=5.0, shift=3.0)
    toward, away = (clip.told.velocity(clip.model, c) for c in (clip.context, clip.negative))
    both = guided(toward, away, recipe.cfg)

    def velocity(latents, step, timestep):
        return both(latents if seen is None else seen(latents, timestep), step, timestep)

    with torch.inference_mode():
        path = trajectory(velocity, clip.noise, recipe, lambda: clip.noise, history)
        return torch.stack(list(path))[:, None]


def seeing(history):
    """A run whose model sees this history in its first frames, whatever the solver made of them."""

    def run(clip):
        def seen(latents, timestep):
            known = history(clip, timestep / 1000)
            return torch.cat([known, latents[:, known.shape[1] :]], dim=1)

        return run_of(clip, seen=seen)

    return run


def as_it_is(clip, sigma):
    return clip.history


def scaled(clip, sigma):
    return (1 - sigma) * clip.history


def noised(clip, sigma):
    return (1 - sigma) * clip.history + sigma * clip.noise[:, : clip.history.shape[1]]


RUNS = {
    "history is noised as the rest is": seeing(noised),
    "history is scaled": seeing(scaled),
    "history is left to the solver": run_of,
    "the grid of production": lambda clip: run_of(clip, "dpm++", clip.history),
    "another solver": lambda clip: run_of(clip, "unipc", clip.history),
}


@pytest.mark.golden
def test_the_run_of_this_file_is_right_where_nothing_is_changed(folder):
    clip = clip_of(folder, "d")
    want = recorded(folder, "d", "trajectory")["dpm++.n4.shift3.cfg5.after_step"]
    got = run_of(clip, history=clip.history)
    assert (got - want).abs().max() < scail2.TRAJECTORY
    again = seeing(as_it_is)(clip)
    known = clip.history.shape[1]
    assert torch.equal(again[:, :, :, known:], got[:, :, :, known:])


@pytest.mark.golden
@pytest.mark.parametrize("mistake", RUNS)
def test_a_mistake_in_a_run_moves_the_other_frames(folder, mistake):
    clip = clip_of(folder, "d")
    want = recorded(folder, "d", "trajectory")["dpm++.n4.shift3.cfg5.after_step"]
    known = clip.history.shape[1]
    moved = (RUNS[mistake](clip) - want)[:, :, :, known:].abs().max()
    assert moved > 0.1
