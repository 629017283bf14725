"""Schedules against the printed figures, solvers against goldens and equations solved by hand."""

import math
from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from engine.denoise.sampler import (
    SAMPLERS,
    Grid,
    denoise,
    grid,
    guided,
    noise_like,
    seeded,
    trajectory,
)
from engine.errors import BadCheckpoint, BadRequest
from engine.flow import Recipe, Settings
from engine.golden.sampling import checks, recognises
from engine.recipes import RECIPES, check_settings

SHAPE = (4, 3, 2, 5)  # C, t, h, w
FROM_NOISE_ALONE = ("euler", "dpm++_official", "euler_simple")  # their first level is 1


def recipe(sampler, steps, shift=5.0):
    return Recipe(sampler, steps, cfg=1.0, shift=shift)


def no_draw():
    raise AssertionError("this sampler draws no noise")


def ignore(done):
    pass


def decay(latents, step, timestep):
    return 0.5 * latents + math.sin(timestep / 300)


@pytest.mark.parametrize(
    ("steps", "want"),
    [
        (4, [1, 0.9375, 0.833333313, 0.625, 0]),
        (6, [1, 0.961538434, 0.909090877, 0.833333313, 0.714285731, 0.5, 0]),
        (
            8,
            [1, 0.972222209, 0.9375, 0.892857134, 0.833333313, 0.75, 0.625, 0.416666687, 0],
        ),
    ],
)
def test_the_official_grid_has_the_printed_levels(steps, want):
    assert grid("euler", steps, 5.0).sigmas.tolist() == torch.tensor(want).tolist()


def test_the_official_grid_of_50_steps_begins_and_ends_as_printed():
    levels = grid("euler", 50, 5.0)
    head = [1, 0.995934963, 0.991735518, 0.987394929, 0.982905984, 0.978260875, 0.973451316]
    head += [0.968468487, 0.963302732, 0.957943916, 0.952380955]
    tail = [0.448717952, 0.405405402, 0.357142866, 0.303030312, 0.241935492, 0.172413766]
    tail += [0.092592597, 0]
    assert levels.sigmas[:11].tolist() == torch.tensor(head).tolist()
    assert levels.sigmas[25] == torch.tensor(0.833333313)
    assert levels.sigmas[-8:].tolist() == torch.tensor(tail).tolist()
    assert levels.timesteps[25] == pytest.approx(833.3333, abs=1e-4)  # not rounded
    assert levels.timesteps[0] == 1000


@pytest.mark.parametrize(
    ("sampler", "want"),
    [
        ("dpm++", [0.99995995, 0.961494, 0.909041, 0.833278, 0.714224, 0.499940, 0]),
        ("dpm++_sde", [0.99995995, 0.961494, 0.909041, 0.833278, 0.714224, 0.499940, 0]),
        ("unipc", [0.99979985, 0.961316, 0.908843, 0.833055, 0.713979, 0.499700, 0]),
    ],
)
def test_production_grids_have_the_printed_levels_and_whole_timesteps(sampler, want):
    levels = grid(sampler, 6, 5.0)
    assert torch.allclose(levels.sigmas, torch.tensor(want), rtol=0, atol=6e-7)
    assert levels.timesteps == [math.floor(1000 * level) for level in want[:-1]]


def test_the_shift_of_the_comfyui_workflow_counts_as_five():
    assert grid("dpm++_sde", 6, 5.000000000000001).timesteps == [999, 961, 909, 833, 714, 499]


def test_unipc_takes_the_printed_timesteps_of_the_official_recipe_of_scail_2():
    timesteps = grid("unipc", 40, 3.0).timesteps
    assert timesteps[:6] == [999, 991, 982, 973, 963, 954]
    assert timesteps[-2:] == [136, 71]


@pytest.mark.parametrize(
    ("shift", "want"),
    [
        (8.0, [1, 0.975724, 0.941259, 0.888889, 0.800479, 0.615952, 0]),
        (5.0, [1, 0.961716, 0.909215, 0.833333, 0.714897, 0.500600, 0]),
    ],
)
def test_the_simple_grid_has_the_printed_levels_and_timesteps_that_are_not_rounded(shift, want):
    levels = grid("euler_simple", 6, shift)
    assert torch.allclose(levels.sigmas, torch.tensor(want), rtol=0, atol=6e-7)
    assert levels.timesteps == pytest.approx([1000 * level for level in want[:-1]], abs=6e-4)


def test_the_simple_grid_picks_places_of_the_table_as_comfyui_divides():
    """1000 / 38 times 19 is a little less than 500, and the place before it is taken."""
    unshifted = grid("euler_simple", 38, 1.0).sigmas
    assert unshifted[19] == torch.tensor(0.501)
    assert grid("euler_simple", 40, 1.0).sigmas[20] == torch.tensor(0.5)


def test_the_third_grid_shifts_evenly_spaced_levels_in_fp64():
    levels = grid("dpm++_official", 40, 3.0)
    even = np.linspace(1, 0, 41)
    shifted = 3 * even / (1 + 2 * even)
    assert levels.sigmas.tolist() == shifted.astype(np.float32).tolist()
    assert levels.timesteps == np.floor(1000 * shifted[:-1]).tolist()
    assert (levels.timesteps[0], levels.timesteps[12]) == (1000, 874)  # 875 in FP32


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("official", [999, 991, 982, 973, 963, 954]),
        ("turbo", [1000, 975.724, 941.259, 888.889, 800.479, 615.952]),
        ("fast8", [999, 874, 749, 624, 499, 374, 249, 124]),
    ],
)
def test_the_recipes_of_scail_2_tell_the_network_the_printed_timesteps(name, told):
    chosen = RECIPES["scail2"][name]
    timesteps = grid(chosen.sampler, chosen.steps, chosen.shift).timesteps
    assert timesteps[: len(told)] == pytest.approx(told, abs=6e-4)
    assert len(timesteps) == chosen.steps == {"official": 40, "turbo": 6, "fast8": 8}[name]
    assert (chosen.cfg, chosen.pose_from, chosen.pose_until) == (
        5 if name == "official" else 1,
        0,
        1,
    )
    assert chosen.window_frames == 81
    check_settings(Settings(chosen))


@pytest.mark.golden
def test_the_official_grid_is_that_of_the_official_trajectories(golden):
    stored = load_file(golden / "transformer" / "case_a_trajectory.safetensors")
    for steps in (4, 8):
        assert torch.equal(grid("euler", steps, 5.0).sigmas, stored[f"steps{steps}.sigmas"])


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("shift", [0.01, 1.0, 5.0, 100.0])
@pytest.mark.parametrize("steps", [1, 2, 100])
def test_levels_fall_from_noise_to_zero_at_every_setting(sampler, shift, steps):
    levels = grid(sampler, steps, shift)
    assert len(levels.sigmas) == steps + 1
    assert len(levels.timesteps) == steps
    assert levels.sigmas.diff().max() < 0
    assert levels.sigmas[-1] == 0
    assert levels.sigmas[0] == 1 if sampler in FROM_NOISE_ALONE else 0 < levels.sigmas[0] < 1


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize(
    ("steps", "shift"),
    [(0, 5.0), (-3, 5.0), (6, 0.0), (6, -1.0), (6, 101.0), (6, math.nan), (6, math.inf)],
)
def test_steps_and_shifts_that_make_no_grid_are_refused(sampler, steps, shift):
    with pytest.raises(BadRequest, match=f"{steps} steps at shift"):
        grid(sampler, steps, shift)


def test_levels_that_fp32_cannot_tell_apart_are_refused():
    with pytest.raises(BadRequest, match="cannot tell apart"):
        grid("euler", 50, 1e-9)


@pytest.mark.parametrize("name", ["dpm", "", "DPM++", "euler_a"])
def test_an_unknown_sampler_is_refused_with_the_names_there_are(name):
    known = r"euler, dpm\+\+_sde, dpm\+\+, unipc, dpm\+\+_official, euler_simple\.$"
    with pytest.raises(BadRequest, match=known):
        grid(name, 6, 5.0)
    with pytest.raises(BadRequest, match=known):
        denoise(decay, torch.zeros(SHAPE), recipe(name, 6), no_draw, ignore)


def test_euler_follows_a_constant_velocity_exactly():
    noise, slope = noise_like(SHAPE, seeded(1)), noise_like(SHAPE, seeded(2))
    clip = denoise(lambda x, step, t: slope, noise, recipe("euler", 7), no_draw, ignore)
    assert torch.allclose(clip, noise - slope, rtol=0, atol=1e-6)


def test_euler_on_a_linear_velocity_multiplies_by_each_step():
    noise = noise_like(SHAPE, seeded(1))
    clip = denoise(lambda x, step, t: 0.8 * x, noise, recipe("euler", 6), no_draw, ignore)
    factor = math.prod((1 + 0.8 * grid("euler", 6, 5.0).sigmas.double().diff()).tolist())
    assert torch.allclose(clip, factor * noise, rtol=0, atol=1e-6)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_every_sampler_ends_on_the_clip_that_a_perfect_velocity_points_at(sampler):
    noise, clip = noise_like(SHAPE, seeded(1)), noise_like(SHAPE, seeded(2))
    levels = grid(sampler, 6, 5.0)

    def velocity(latents, step, timestep):
        return (latents - clip) / levels.sigmas[step]

    got = denoise(velocity, noise, recipe(sampler, 6), lambda: torch.ones(SHAPE), ignore)
    assert torch.allclose(got, clip, rtol=0, atol=2e-6)


def gaussian_error(sampler, steps):
    """Largest error between noise levels 0.9 and 0.1 where clips are N(1, 4): paths are known."""
    mean, spread = 1.0, 2.0
    sigmas = torch.sigmoid(torch.linspace(math.log(9), -math.log(9), steps + 1).double())

    def deviation(sigma):
        return math.hypot((1 - sigma) * spread, sigma)

    def velocity(latents, step, timestep):
        sigma = sigmas[step].item()
        pull = (1 - sigma) * spread**2 / deviation(sigma) ** 2
        return (latents - mean - pull * (latents - (1 - sigma) * mean)) / sigma

    def on_path(sigma):
        return (1 - sigma) * mean + deviation(sigma) * noise_like(SHAPE, seeded(3)).double()

    levels = Grid(sigmas, [0.0] * steps)
    path = SAMPLERS[sampler].solve(velocity, on_path(sigmas[0].item()), levels, no_draw)
    *_, reached = path
    return (reached - on_path(sigmas[-1].item())).abs().max().item()


@pytest.mark.parametrize(("sampler", "order"), [("euler", 1), ("dpm++", 2), ("unipc", 3)])
def test_twice_the_steps_shrink_the_error_by_the_order_of_the_solver(sampler, order):
    errors = [gaussian_error(sampler, steps) for steps in (20, 40, 80, 160)]
    for coarse, fine in pairwise(errors):  # UniPC's corrector adds one order to its two
        assert math.log2(coarse / fine) == pytest.approx(order, abs=0.06)


def formula(sigmas, velocity, latents):
    """UniPC as docs/reference/scail2.md 4 writes it, in FP64: latents after each step."""
    x = xc = latents.double()
    path, clean, corrected, lambdas = [], [], [], [math.log((1 - s) / s) for s in sigmas[:-1]]
    lambdas.append(math.inf)
    for i, (sigma, after) in enumerate(pairwise(sigmas)):
        m = x - sigma * velocity(x, i, 0.0)
        xc = x
        if i > 0:
            h = lambdas[i] - lambdas[i - 1]
            p, a = math.exp(-h) - 1, 1 - sigma
            kept, change = sigma / sigmas[i - 1] * corrected[-1], m - clean[-1]
            if i == 1:
                xc = kept - a * p * (clean[-1] + change / 2)
            else:
                r = (lambdas[i - 2] - lambdas[i - 1]) / h
                k1 = p / -h - 1
                b1, b2 = k1 / p, 2 * (k1 / -h - 0.5) / p
                c0 = (b1 - b2) / (1 - r)
                bend = c0 * (clean[-2] - clean[-1]) / r + (b1 - c0) * change
                xc = kept - a * p * (clean[-1] + bend)
        h = lambdas[i + 1] - lambdas[i]
        bend = 0.0
        if 0 < i < len(sigmas) - 2:
            bend = (clean[-1] - m) / ((lambdas[i - 1] - lambdas[i]) / h)
        x = after / sigma * xc - (1 - after) * (math.exp(-h) - 1) * (m + bend / 2)
        path.append(x)
        clean.append(m)
        corrected.append(xc)
    return path


@pytest.mark.parametrize(("steps", "shift"), [(1, 3.0), (2, 3.0), (6, 5.0), (8, 1.0), (40, 3.0)])
def test_unipc_is_the_written_formula_with_its_corrector_of_order_2(steps, shift):
    noise = noise_like(SHAPE, seeded(6))
    sigmas = grid("unipc", steps, shift).sigmas.tolist()

    def velocity(latents, step, timestep):
        return 0.6 * latents + torch.sin(2 * latents + step)

    got = trajectory(velocity, noise, recipe("unipc", steps, shift), no_draw)
    want = formula(sigmas, velocity, noise)
    for mine, theirs in zip(got, want, strict=True):
        assert torch.allclose(mine.double(), theirs, rtol=0, atol=1e-4)


def test_dpm_from_pure_noise_is_of_first_order_twice():
    noise = noise_like(SHAPE, seeded(6))
    sigmas = grid("dpm++_official", 6, 3.0).sigmas.tolist()
    seen = []

    def velocity(latents, step, timestep):
        seen.append(latents)
        return 0.5 * latents + step

    first, second, third, *_ = trajectory(
        velocity, noise, recipe("dpm++_official", 6, 3.0), no_draw
    )
    clean = [x - s * (0.5 * x + i) for i, (x, s) in enumerate(zip(seen, sigmas, strict=False))]
    one, two, three = sigmas[1:4]
    assert torch.allclose(first, one * noise + (1 - one) * clean[0], rtol=0, atol=1e-6)
    lambdas = [math.log((1 - s) / s) for s in (one, two, three)]
    gain = (1 - two) * (1 - math.exp(lambdas[0] - lambdas[1]))
    assert torch.allclose(second, two / one * first + gain * clean[1], rtol=0, atol=1e-6)
    r = (lambdas[1] - lambdas[0]) / (lambdas[2] - lambdas[1])
    gain = (1 - three) * (1 - math.exp(lambdas[1] - lambdas[2]))
    target = clean[2] + (clean[2] - clean[1]) / r / 2
    assert torch.allclose(third, three / two * second + gain * target, rtol=0, atol=1e-5)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_the_velocity_is_asked_once_a_step_with_index_and_timestep(sampler):
    asked = []

    def velocity(latents, step, timestep):
        assert latents.shape == SHAPE
        asked.append((step, timestep))
        return 0.1 * latents

    denoise(velocity, torch.ones(SHAPE), recipe(sampler, 6), lambda: torch.zeros(SHAPE), ignore)
    assert asked == list(enumerate(grid(sampler, 6, 5.0).timesteps))


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("steps", [1, 2, 5])
def test_progress_is_told_once_after_each_step(sampler, steps):
    told = []
    denoise(
        decay, torch.ones(SHAPE), recipe(sampler, steps), lambda: torch.zeros(SHAPE), told.append
    )
    assert told == list(range(1, steps + 1))


def test_what_progress_raises_ends_the_job():
    def stop(done):
        if done == 2:
            raise TimeoutError

    asked = Counter()

    def velocity(latents, step, timestep):
        asked["times"] += 1
        return latents

    with pytest.raises(TimeoutError):
        denoise(velocity, torch.ones(SHAPE), recipe("euler", 6), no_draw, stop)
    assert asked["times"] == 2


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_the_last_latents_of_the_trajectory_are_the_clip(sampler):
    noise = noise_like(SHAPE, seeded(5))
    path = list(trajectory(decay, noise, recipe(sampler, 5), lambda: torch.ones(SHAPE)))
    clip = denoise(decay, noise, recipe(sampler, 5), lambda: torch.ones(SHAPE), ignore)
    assert len(path) == 5
    assert torch.equal(path[-1], clip)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_the_noise_is_left_as_it_was(sampler):
    noise = noise_like(SHAPE, seeded(5))
    before = noise.clone()
    denoise(decay, noise, recipe(sampler, 3), lambda: torch.ones(SHAPE), ignore)
    assert torch.equal(noise, before)


def spread(latents, step, timestep):
    """A velocity in which every frame hears of all others."""
    return 0.5 * latents + torch.sin(latents.mean(dim=1, keepdim=True) + step)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_history_is_what_the_velocity_sees_clean_at_every_level(sampler):
    noise, history = noise_like(SHAPE, seeded(5)), noise_like((4, 2, 2, 5), seeded(6))
    seen = []

    def velocity(latents, step, timestep):
        seen.append(latents.clone())
        return spread(latents, step, timestep)

    path = [
        x.clone()
        for x in trajectory(velocity, noise, recipe(sampler, 5), lambda: torch.ones(SHAPE), history)
    ]
    assert (len(seen), len(path)) == (5, 5)
    for latents in (*seen, *path):
        assert torch.equal(latents[:, :2], history)
    assert torch.equal(seen[0][:, 2:], noise[:, 2:])
    clip = denoise(velocity, noise, recipe(sampler, 5), lambda: torch.ones(SHAPE), ignore, history)
    assert torch.equal(clip, path[-1])


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_history_changes_the_other_frames_through_the_velocity_alone(sampler):
    """A solver that mixed frames would be told apart from one that is run on the others only."""
    noise, history = noise_like(SHAPE, seeded(5)), noise_like((4, 1, 2, 5), seeded(6))

    def alone(latents, step, timestep):
        return spread(torch.cat([history, latents], dim=1), step, timestep)[:, 1:]

    ran = recipe(sampler, 5)
    got = denoise(spread, noise, ran, lambda: torch.ones(SHAPE), ignore, history)
    want = denoise(alone, noise[:, 1:], ran, lambda: torch.ones(4, 2, 2, 5), ignore)
    assert torch.equal(got[:, 1:], want)
    without = denoise(spread, noise, ran, lambda: torch.ones(SHAPE), ignore)
    assert (got[:, 1:] - without[:, 1:]).abs().max() > 0.05


@pytest.mark.parametrize("shape", [(4, 3, 2, 5), (4, 4, 2, 5), (2, 2, 5)])
def test_history_that_leaves_nothing_to_make_is_refused(shape):
    with pytest.raises(BadRequest, match="leaves nothing to make"):
        trajectory(decay, torch.ones(SHAPE), recipe("euler", 5), no_draw, torch.ones(shape))


def test_only_the_stochastic_sampler_draws_and_not_on_its_last_step():
    drawn = Counter()

    def draw():
        drawn["times"] += 1
        return torch.zeros(SHAPE)

    for sampler in set(SAMPLERS) - {"dpm++_sde"}:
        denoise(decay, torch.ones(SHAPE), recipe(sampler, 6), draw, ignore)
    assert drawn["times"] == 0
    denoise(decay, torch.ones(SHAPE), recipe("dpm++_sde", 6), draw, ignore)
    assert drawn["times"] == 5


def test_a_seed_gives_the_same_clip_again_and_another_seed_another():
    def clip(seed):
        generator = seeded(seed)
        noise = noise_like(SHAPE, generator)
        return denoise(
            decay, noise, recipe("dpm++_sde", 6), lambda: noise_like(SHAPE, generator), ignore
        )

    assert torch.equal(clip(7), clip(7))
    assert (clip(7) - clip(8)).abs().max() > 0.1


def test_guidance_goes_past_the_conditional_velocity():
    toward, away = noise_like(SHAPE, seeded(1)), noise_like(SHAPE, seeded(2))
    velocity = guided(lambda x, step, t: toward, lambda x, step, t: away, 4.0)
    got = velocity(torch.zeros(SHAPE), 0, 999.0)
    assert torch.equal(got, away + 4.0 * (toward - away))


def test_guidance_hands_every_input_to_both_velocities():
    seen = []

    def watch(window, frames, step, timestep):
        seen.append((window.sum().item(), frames, step, timestep))
        return window

    guided(watch, watch, 2.0)(torch.ones(2), [3, 4], 5, 6.0)
    assert seen == [(2.0, [3, 4], 5, 6.0)] * 2


@pytest.mark.parametrize("has_negative", [True, False])
@pytest.mark.parametrize("scale", [1, 1.0, 4.0])
def test_guidance_that_changes_nothing_evaluates_once(has_negative, scale):
    calls = Counter()

    def conditional(latents, step, timestep):
        calls["conditional"] += 1
        return 2 * latents

    def negative(latents, step, timestep):
        calls["negative"] += 1
        return latents

    velocity = guided(conditional, negative if has_negative else None, scale)
    got = velocity(torch.ones(SHAPE), 0, 999.0)
    both = has_negative and scale != 1
    assert calls == Counter(conditional=1, negative=1) if both else calls == Counter(conditional=1)
    assert torch.equal(got, torch.full(SHAPE, 1 + scale if both else 2.0))


def test_noise_is_drawn_time_first():
    c, t, h, w = SHAPE
    official = torch.randn(t, c, h, w, generator=torch.Generator().manual_seed(11))
    got = noise_like(SHAPE, seeded(11))
    assert torch.equal(got, official.transpose(0, 1))
    assert got.dtype == torch.float32
    assert got.is_contiguous()


def test_noise_is_standard_normal():
    noise = noise_like((16, 21, 26, 42), seeded(779298828917358))
    assert abs(noise.mean().item()) < 0.01
    assert abs(noise.std().item() - 1) < 0.01


@pytest.mark.parametrize("seed", [0, 5, 2**31, 2**32 - 1, 779298828917358, 2**63])
@pytest.mark.parametrize("higher", [1, 2, 2**16, 2**30])
def test_seeds_that_differ_in_high_bits_alone_give_other_noise(seed, higher):
    other = seed ^ (higher << 32)
    assert (noise_like(SHAPE, seeded(seed)) - noise_like(SHAPE, seeded(other))).abs().max() > 0.1


def test_one_generator_gives_each_draw_its_own_noise():
    generator = seeded(4)
    first, second = noise_like(SHAPE, generator), noise_like(SHAPE, generator)
    assert (first - second).abs().max() > 0.1


@pytest.mark.parametrize("seed", [-1, 2**64])
def test_a_seed_beyond_64_bits_is_refused(seed):
    with pytest.raises(BadRequest, match=str(seed)):
        seeded(seed)


@pytest.fixture
def solvers(golden):
    return golden / "sampling" / "solvers.safetensors"


@pytest.mark.golden
def test_every_golden_trajectory_is_reproduced(solvers):
    results = list(checks(solvers))
    assert len(results) == 27  # 3 solvers, 3 lengths; sigmas, timesteps, latents
    assert [check for check in results if not check.ok] == []


@pytest.mark.golden
def test_golden_trajectories_are_known_by_their_tensors(solvers):
    assert recognises(frozenset(load_file(solvers)), {})
    assert not recognises(frozenset(["in.x", "out.out", "steps4.sigmas"]), {"case": "a"})
    assert not recognises(frozenset(["rule", "cases"]), {})


@pytest.mark.golden
@pytest.mark.parametrize("what", ["sigmas", "timesteps", "after_step", "noise", "step_noise"])
def test_a_damaged_golden_trajectory_fails(solvers, tmp_path, what):
    tensors = load_file(solvers)
    name = f"sde-dpmsolver++.n6.shift5.{what}"
    tensors[name].flatten()[0] += 1
    save_file(tensors, tmp_path / "other.safetensors")
    failed = [check.check for check in checks(tmp_path / "other.safetensors") if not check.ok]
    felt = what if what in ("sigmas", "timesteps") else "after_step"
    assert failed == [f"other.safetensors: sde-dpmsolver++.n6.shift5.{felt}"]


@pytest.mark.golden
@pytest.mark.parametrize("what", ["sigmas", "timesteps", "after_step", "noise", "step_noise"])
def test_a_golden_trajectory_without_one_of_its_tensors_fails(solvers, tmp_path, what):
    tensors = load_file(solvers)
    del tensors[f"sde-dpmsolver++.n4.shift5.{what}"]
    save_file(tensors, tmp_path / "other.safetensors")
    failed = [check.check for check in checks(tmp_path / "other.safetensors") if not check.ok]
    assert len(failed) == 1
    assert what in failed[0]


@pytest.mark.golden
def test_a_golden_trajectory_with_too_little_step_noise_fails(solvers, tmp_path):
    tensors = load_file(solvers)
    tensors["sde-dpmsolver++.n6.shift5.step_noise"] = torch.zeros(4, 1, 16, 3, 4, 6)
    save_file(tensors, tmp_path / "short.safetensors")
    failed = [check.check for check in checks(tmp_path / "short.safetensors") if not check.ok]
    assert failed == [
        "short.safetensors: sde-dpmsolver++.n6.shift5.step_noise: noise of 4 steps, not 6"
    ]


@pytest.mark.golden
def test_a_golden_of_a_solver_we_do_not_have_is_neither_right_nor_wrong(solvers, tmp_path):
    tensors = {
        name.replace("unipc", "heun"): tensor
        for name, tensor in load_file(solvers).items()
        if name.startswith("unipc.n4")
    }
    save_file(tensors, tmp_path / "heun.safetensors")
    assert [check.ok for check in checks(tmp_path / "heun.safetensors")] == [None]


def test_a_golden_file_cut_short_is_refused(tmp_path):
    (tmp_path / "cut.safetensors").write_bytes(b"\x40\0\0\0\0\0\0\0{")
    with pytest.raises(BadCheckpoint, match=r"cut\.safetensors"):
        list(checks(tmp_path / "cut.safetensors"))
