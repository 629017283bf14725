"""Golden data of SCAIL-2 is met whatever its files are called, and damage is one line."""

import json
import random
import shutil

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from engine.denoise.sampler import guided, trajectory
from engine.flow import Recipe, Roles
from engine.golden import scail2, segments
from engine.golden.verify import recompute
from engine.models.checkpoint import Checkpoint, load_transformer
from tests.support.checkpoints import SMALL_SCAIL2, small_weights, to_sat

CASES = ("a", "b", "c", "d")
FORWARD, TRAJECTORY = "case_d_forward.safetensors", "case_d_trajectory.safetensors"


@pytest.fixture
def folder(golden):
    return golden / "scail2"


@pytest.fixture
def copied(folder, tmp_path):
    """Case d and its weights, with few results, as each of them costs a forward."""
    shutil.copy(folder / "weights_A.safetensors", tmp_path)
    rewrite(folder / FORWARD, tmp_path / FORWARD, ("in.", "mid.tokens_in", "out.out_no"))
    rewrite(folder / TRAJECTORY, tmp_path / TRAJECTORY, ("dpm++",))
    return tmp_path


def rewrite(source, target, keep=("",), tensors=None, without=(), **metadata):
    """A copy with the tensors whose names start with one of `keep`, and what is changed."""
    with safe_open(source, "pt") as file:
        described = file.metadata()
    held = {name: tensor for name, tensor in load_file(source).items() if name.startswith(keep)}
    held = {name: tensor for name, tensor in held.items() if name not in without}
    save_file(held | (tensors or {}), target, described | metadata)


def failures(folder):
    return [check.check for check in recompute(folder) if check.ok is False]


@pytest.mark.golden
@pytest.mark.parametrize("name", CASES)
def test_forward_passes_intermediates_and_variants_are_met(folder, name):
    path = folder / f"case_{name}_forward.safetensors"
    checks = list(scail2.checks(path))
    results = sorted(tensor for tensor in load_file(path) if not tensor.startswith("in."))
    assert [check.check for check in checks] == [f"{path.name}: {tensor}" for tensor in results]
    assert len(checks) >= 10
    assert [check for check in checks if not check.ok] == []
    assert max(check.error for check in checks) < 2e-5  # the limit is 1e-4


@pytest.mark.golden
@pytest.mark.parametrize("name", CASES)
def test_trajectories_are_met(folder, name):
    checks = list(scail2.checks(folder / f"case_{name}_trajectory.safetensors"))
    assert len(checks) == (9 if name in "ad" else 6)  # dpm++ in two cases, unipc in all
    assert [check for check in checks if not check.ok] == []


@pytest.mark.golden
def test_files_of_random_names_are_known_by_what_they_hold(folder, tmp_path):
    draw = random.Random(0)
    for name in ("case_c_forward", "case_c_trajectory", "weights_A", "segments"):
        (path,) = folder.glob(f"{name}.*")
        shutil.copy(path, tmp_path / f"{draw.randbytes(6).hex()}{path.suffix}")
    checks = list(recompute(tmp_path))
    assert [check for check in checks if not check.ok] == []
    assert len(checks) == 12 + 6 + 39


@torch.inference_mode()
def unseen(folder, described, mode, size, additional, history):
    """Writes a set of other sizes and widths, computed without `engine.golden`."""
    (frames, height, width), draw = size, torch.Generator().manual_seed(5)

    def randn(*shape):
        return torch.randn(*shape, generator=draw)

    def masks(*shape):
        return torch.rand(28, *shape, generator=draw)

    metadata = {
        "config": json.dumps({"mask_channels": 28, "layers": 2, "config": "Q"}),
        "prefix": "model.diffusion_model.",
    }
    weights = to_sat(small_weights(config=SMALL_SCAIL2))
    save_file(weights, folder / "sat.safetensors", metadata)
    model = load_transformer(Checkpoint(folder / "sat.safetensors"), torch.device("cpu"))
    text, away, vision = randn(11, 32), randn(11, 32), randn(17, 48)
    noise, reference = randn(16, frames, height, width), randn(16, 1, height, width)
    driving = randn(16, frames, height // 2, width // 2)
    roles = Roles(
        mode,
        masks(1, height, width),
        masks(frames, height // 2, width // 2),
        randn(16, additional, height, width),
        masks(additional, height, width),
    )
    known, begun = torch.zeros(4, frames, height, width), randn(16, history, height, width)
    known[:, :history] = 1

    def velocity(given):
        context = model.embed_context(given, vision)
        return lambda x, step, t: model(x, t, context, reference, driving, known, roles=roles)

    recipe = Recipe("unipc", steps=3, cfg=2.5, shift=4.5)
    both = guided(velocity(text), velocity(away), 2.5)
    path = trajectory(both, noise, recipe, lambda: noise, begun if history else None)
    given = {
        "x": noise,
        "noise": noise,
        "context": text,
        "context_uncond": away,
        "clip_fea": vision,
        "ref_latents": reference,
        "pose_latents": driving,
        "ref_masks": torch.cat([roles.reference, torch.zeros(28, frames, height, width)], dim=1),
        "driving_masks": roles.driving,
    }
    if additional:
        given["additional_ref_latents"] = roles.additional
        given["additional_ref_masks"] = roles.additional_masks
    if history:
        given |= {"history_mask": known, "history_latent": begun}
    tensors = {f"in.{name}": tensor[None].clone() for name, tensor in given.items()}
    tensors["in.timestep"] = torch.tensor([612.5])
    tensors["out.out"] = velocity(text)(noise, 0, 612.5)[None]
    metadata["case"] = json.dumps({"name": "unseen"} | described)
    save_file(tensors, folder / "one.safetensors", metadata)
    after = {"unipc.n3.shift4.5.cfg2.5.after_step": torch.stack(list(path))[:, None]}
    save_file(after, folder / "two.safetensors", metadata)


@pytest.mark.parametrize(
    ("described", "size", "additional", "history"),
    [
        ({"mode": "replacement"}, (4, 4, 12), 0, 0),
        ({"replace": True}, (5, 8, 4), 1, 3),
        ({"replace": False}, (1, 4, 4), 4, 0),
        ({"mode": "animation", "replace": False}, (3, 12, 8), 3, 1),
    ],
)
def test_sets_of_other_sizes_widths_and_counts_are_met(
    tmp_path, described, size, additional, history
):
    replaced = described.get("mode") == "replacement" or described.get("replace")
    mode = "replacement" if replaced else "animation"
    unseen(tmp_path, described, mode, size, additional, history)
    checks = list(recompute(tmp_path))
    assert [check.check for check in checks] == [
        "one.safetensors: out.out",
        "two.safetensors: unipc.n3.shift4.5.cfg2.5.after_step",
    ]
    assert [check for check in checks if not check.ok] == []


def test_a_case_that_does_not_say_its_mode_fails_with_a_sentence(tmp_path):
    unseen(tmp_path, {}, "animation", (1, 4, 4), 0, 0)
    failed = failures(tmp_path)
    assert len(failed) == 2
    assert all("gives no mode: animation or replacement is expected" in line for line in failed)


@pytest.mark.golden
@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        ("mid.tokens_in", [f"{FORWARD}: mid.tokens_in"]),
        ("out.out_no_history", [f"{FORWARD}: out.out_no_history"]),
        ("in.x", [f"{FORWARD}: mid.tokens_in", f"{FORWARD}: out.out_no_history"]),
        ("in.noise", [f"{TRAJECTORY}: dpm++.n4.shift3.cfg5.after_step"]),
        ("in.history_latent", [f"{TRAJECTORY}: dpm++.n4.shift3.cfg5.after_step"]),
    ],
)
def test_a_damaged_tensor_fails_where_it_counts(copied, name, wrong):
    changed = load_file(copied / FORWARD)[name]
    changed.flatten()[-1] += 1
    rewrite(copied / FORWARD, copied / FORWARD, tensors={name: changed})
    assert failures(copied) == wrong


@pytest.mark.golden
@pytest.mark.parametrize("what", ["sigmas", "timesteps", "after_step"])
def test_a_damaged_trajectory_fails(copied, what):
    name = f"dpm++.n4.shift3.cfg5.{what}"
    changed = load_file(copied / TRAJECTORY)[name]
    changed.flatten()[0] += 1
    rewrite(copied / TRAJECTORY, copied / TRAJECTORY, tensors={name: changed})
    assert failures(copied) == [f"{TRAJECTORY}: {name}"]


@pytest.mark.golden
@pytest.mark.parametrize("name", ["in.driving_masks", "in.ref_latents", "in.timestep", "in.x"])
def test_a_case_without_one_of_its_inputs_fails(copied, name):
    rewrite(copied / FORWARD, copied / FORWARD, without=[name])
    failed = failures(copied)
    assert [line.partition(":")[0] for line in failed] == [FORWARD, TRAJECTORY]
    told = "inputs of the same case" if name == "in.x" else name
    assert all(told in line for line in failed)


@pytest.mark.golden
def test_a_case_without_weights_of_its_config_fails(copied):
    (copied / "weights_A.safetensors").unlink()
    missing = "no weights with the same config beside it"
    assert failures(copied) == [f"{FORWARD}: {missing}", f"{TRAJECTORY}: {missing}"]


@pytest.mark.golden
def test_what_nobody_can_recompute_is_not_said_to_be_checked(copied):
    names = ("mid.block9_out", "out.out_b2", "out.out_fp8")
    rewrite(copied / FORWARD, copied / FORWARD, tensors={n: torch.ones(1) for n in names})
    runs = ("heun.n4.shift3.cfg5.sigmas", "unipc.n4.cfg5.sigmas")
    stored = {name: torch.ones(1) for name in runs}
    rewrite(copied / TRAJECTORY, copied / TRAJECTORY, tensors=stored)
    unknown = [check.check for check in recompute(copied) if check.ok is None]
    assert sorted(unknown) == [
        *(f"{FORWARD}: {name}" for name in names),
        *(f"{TRAJECTORY}: {name}" for name in runs),
    ]


@pytest.mark.golden
def test_every_golden_plan_is_made(folder):
    checks = list(segments.checks(folder / "segments.json"))
    assert len(checks) == 39  # 13 lengths, 3 plans
    assert [check for check in checks if not check.ok] == []


@pytest.mark.parametrize(
    ("stored", "ok"),
    [
        ({"200": {"even": [[0, 73, 73, 0], [64, 137, 73, 5], [128, 200, 73, 5]]}}, True),
        ({"200": {"cover": [[0, 81], [76, 157], [152, 200]]}}, True),
        ({"200": {"cover": [[0, 81, 81, 0], [76, 157, 81, 5], [152, 200, 49, 4]]}}, False),
        ({"200": {"official": [[0, 81], [76, 157], [152, 233]]}}, False),
        ({"200": {"sat": [[0, 81]]}}, False),
        ({"200": {"sat": [[0], [76]]}}, False),
        ({"200": {"sat": 3}}, False),
        ({"0": {"sat": [[0, 1]]}}, False),
        ({"82": {"sat": [[0, 81]], "other": []}}, None),
    ],
)
def test_plans_are_compared_segment_by_segment(tmp_path, stored, ok):
    (tmp_path / "plans.json").write_text(json.dumps(stored))
    checks = list(recompute(tmp_path))
    assert checks[-1].ok is ok
    assert all(check.ok for check in checks[:-1])


def test_json_that_only_looks_like_plans_fails_with_a_sentence(tmp_path):
    (tmp_path / "plans.json").write_text('{"81": {"sat": [[0, 81]]}, "82": [3]}')
    (failed,) = failures(tmp_path)
    assert failed.startswith("plans.json: BadCheckpoint: plans.json is not a list of plans")
