"""Golden data is recomputed whatever its files are called, and damage is one line, not a crash."""

import json
import os
import random
import shutil

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from engine.__main__ import main
from engine.config import ModelConfig
from engine.denoise.sampler import grid
from engine.errors import BadMedia
from engine.golden.check import at_most
from engine.golden.verify import recompute
from engine.models.dit import Scail

WEIGHTS = [f"weights_A-0000{part}-of-00002.safetensors" for part in (1, 2)]
FORWARD, TRAJECTORY = "case_b_forward.safetensors", "case_b_trajectory.safetensors"
INPUTS = ("in.",)


def contents(path):
    with safe_open(path, "pt") as file:
        return load_file(path), file.metadata()


def rewrite(source, target, keep=("",), tensors=None, config=None, **metadata):
    """A copy with the tensors whose names start with one of `keep`, and what is changed."""
    held, described = contents(source)
    held = {name: tensor for name, tensor in held.items() if name.startswith(keep)}
    described |= metadata
    if config:
        described["config"] = json.dumps(json.loads(described["config"]) | config)
    save_file(held | (tensors or {}), target, described)
    return target


@pytest.fixture
def folder(golden, tmp_path):
    """Case b and its weights, with the inputs and the output alone."""
    for name in WEIGHTS:
        shutil.copy(golden / "transformer" / name, tmp_path / name)
    keep = (*INPUTS, "out.out_bf16", "mid.tokens_in")
    output = contents(golden / "transformer" / FORWARD)[0]["out.out"]
    rewrite(golden / "transformer" / FORWARD, tmp_path / FORWARD, keep, {"out.out": output})
    return tmp_path


def failures(folder):
    return [check.check for check in recompute(folder) if check.ok is False]


def passed(folder):
    checks = list(recompute(folder))
    return len(checks) > 0 and all(check.ok for check in checks)


@pytest.mark.golden
def test_all_golden_data_is_met(golden, capsys):
    with pytest.raises(SystemExit) as end:
        main(["verify", str(golden)])
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line for line in lines if line["ok"] is False] == []
    assert end.value.code == 0
    assert sum(line["ok"] is True for line in lines) > 1050


@pytest.mark.golden
def test_files_of_random_names_in_one_folder_are_met_too(golden, tmp_path):
    draw = random.Random(0)
    kinds = ("transformer", "encoders")
    files = [path for kind in kinds for path in (golden / kind).iterdir()]
    for path in files:
        if path.suffix != ".md" and path.name != "case_a_trajectory.safetensors":  # it is slow
            shutil.copy(path, tmp_path / f"{draw.randbytes(6).hex()}{path.suffix}")
    checks = list(recompute(tmp_path))
    assert [check.check for check in checks if not check.ok] == []
    assert len(checks) == 80


@pytest.mark.golden
def test_the_shift_of_a_trajectory_is_that_of_its_config(golden, folder):
    for name in (*WEIGHTS, FORWARD):
        rewrite(folder / name, folder / name, config={"shift": 3})
    source, target = golden / "transformer" / TRAJECTORY, folder / TRAJECTORY
    rewrite(source, target, ("steps4.sigmas",), config={"shift": 3})
    assert failures(folder) == [f"{TRAJECTORY}: steps4.sigmas"]
    sigmas = {"steps4.sigmas": grid("euler", 4, 3.0).sigmas}
    rewrite(source, target, ("steps4.sigmas",), sigmas, config={"shift": 3})
    assert passed(folder)


@pytest.mark.golden
def test_a_config_without_shift_fails_with_a_sentence(golden, folder):
    for name in (*WEIGHTS, FORWARD):
        rewrite(folder / name, folder / name, config={"shift": None})
    source, target = golden / "transformer" / TRAJECTORY, folder / TRAJECTORY
    rewrite(source, target, ("steps4.sigmas",), config={"shift": None})
    (failed,) = failures(folder)
    assert failed.startswith(f"{TRAJECTORY}: ")
    assert failed.endswith("gives no shift: a number is expected.")


@pytest.mark.golden
@pytest.mark.parametrize("with_official", [True, False])
def test_the_limit_of_bf16_grows_with_the_output(folder, with_official):
    head = "model.diffusion_model.mixins.final_layer.linear."
    larger = {n: w * 4 for n, w in contents(folder / WEIGHTS[0])[0].items() if n.startswith(head)}
    assert len(larger) == 2
    rewrite(folder / WEIGHTS[0], folder / WEIGHTS[0], tensors=larger)
    held, _ = contents(folder / FORWARD)
    outputs = {n: held[n] * 4 for n in ("out.out", "out.out_bf16") if with_official or n[-1] == "t"}
    rewrite(folder / FORWARD, folder / FORWARD, (*INPUTS,), outputs)
    checks = list(recompute(folder))
    assert [check.ok for check in checks] == [True, True]
    assert checks[1].error > 0.008


@pytest.mark.golden
def test_a_bf16_mode_that_errs_more_than_the_official_one_fails(folder):
    output = contents(folder / FORWARD)[0]["out.out"]
    outputs = {"out.out": output + 0.012, "out.out_bf16": output + 0.012}
    rewrite(folder / FORWARD, folder / FORWARD, tensors=outputs)
    assert failures(folder) == [f"{FORWARD}: out.out", f"{FORWARD}: bf16 mode, mean error"]
    rewrite(folder / FORWARD, folder / FORWARD, tensors={"out.out_bf16": output * torch.nan})
    assert any("limit is not a finite number" in failed for failed in failures(folder))


def test_no_measure_passes_a_limit_that_is_no_number():
    assert [at_most("x", 0.0, limit).ok for limit in (float("nan"), float("inf"))] == [False, False]


@pytest.mark.golden
def test_a_config_written_in_another_order_is_the_same(folder):
    config = json.loads(contents(folder / FORWARD)[1]["config"])
    turned = json.dumps(dict(reversed(config.items())), indent=1)
    rewrite(folder / WEIGHTS[1], folder / WEIGHTS[1])
    held, described = contents(folder / FORWARD)
    save_file(held, folder / FORWARD, described | {"config": turned})
    assert passed(folder)


@pytest.mark.golden
def test_of_two_sets_of_weights_the_one_named_after_the_case_is_used(folder):
    tensors = contents(folder / WEIGHTS[0])[0] | contents(folder / WEIGHTS[1])[0]
    other = {name: weight.flip(0) for name, weight in tensors.items()}
    rewrite(folder / WEIGHTS[0], folder / "a_model_B.safetensors", tensors=other)
    checks = list(recompute(folder))
    assert all(check.ok for check in checks)
    assert {check.check.partition(":")[0] for check in checks} == {f"{FORWARD} with weights_A"}

    (folder / "a_model_B.safetensors").rename(folder / "model_A.safetensors")
    for part, name in enumerate(WEIGHTS, start=1):
        (folder / name).rename(folder / f"model_B-0000{part}-of-00002.safetensors")
    assert failures(folder)[0] == f"{FORWARD} with model_A: mid.tokens_in"


@pytest.mark.golden
def test_weights_without_a_prefix_are_no_case_and_cases_no_weights(folder):
    prefix = "model.diffusion_model."
    for name in WEIGHTS:
        held, described = contents(folder / name)
        held = {tensor.removeprefix(prefix): weight for tensor, weight in held.items()}
        save_file(held, folder / name, described | {"prefix": ""})
    rewrite(folder / FORWARD, folder / FORWARD, prefix="")
    assert passed(folder)
    assert len(list(recompute(folder))) == 3


def test_a_golden_may_have_the_width_of_a_known_model_and_fewer_layers(tmp_path):
    """All weights are zero, so the output is."""
    with torch.device("meta"):
        shapes = Scail(ModelConfig(1, 1536, ffn=8, text_dim=8, clip_dim=8)).state_dict()
    weights = {name: torch.zeros(w.shape, dtype=torch.bfloat16) for name, w in shapes.items()}
    metadata = {"config": '{"num_layers": 1, "shift": 5}', "prefix": ""}
    save_file(weights, tmp_path / "w.safetensors", metadata)
    latents = torch.ones(1, 1, 16, 4, 4)
    case = {
        "in.x": latents.clone(),
        "in.noise": latents.clone(),
        "in.ref_concat": latents,
        "in.concat_smpl_render": latents[..., :2, :2].clone(),
        "in.history_mask": latents[:, :, :4].clone(),
        "in.timestep": torch.tensor([500.0]),
        "in.context": torch.ones(1, 2, 8),
        "in.context_uncond": torch.ones(1, 2, 8),
        "in.image_clip_features": torch.ones(1, 3, 8),
        "out.out": torch.zeros_like(latents),
    }
    save_file(case, tmp_path / "c.safetensors", metadata | {"case": '{"name": "c"}'})
    checks = list(recompute(tmp_path))
    assert [(check.error, check.ok) for check in checks] == [(0.0, True)] * 2


@pytest.mark.golden
def test_a_tensor_that_nobody_can_recompute_is_not_said_to_be_checked(golden, folder):
    names = ("mid.block9_out", "out.out_fp8", "steps4_cfg4.velocity", "steps4.final")
    rewrite(folder / FORWARD, folder / FORWARD, tensors={name: torch.ones(1) for name in names})
    unknown = [check.check for check in recompute(folder) if check.ok is None]
    assert sorted(unknown) == sorted(f"{FORWARD}: {name}" for name in names)


@pytest.mark.golden
def test_a_case_that_lacks_a_tensor_fails_and_says_which(golden, tmp_path):
    held, described = contents(golden / "transformer" / "preprocess.safetensors")
    case = min(name.partition(".")[0] for name in held)
    del held[f"{case}.pose_half"]
    save_file(held, tmp_path / "x.safetensors", described)
    assert failures(tmp_path) == [f"x.safetensors: {case} lacks pose_half"]


@pytest.mark.golden
@pytest.mark.timeout(120)
def test_unreadable_neighbours_are_reported_and_do_not_harm_a_case(folder):
    (folder / "cut.safetensors").write_bytes((folder / WEIGHTS[0]).read_bytes()[:5000])
    (folder / "empty.safetensors").write_bytes(b"")
    (folder / "empty.npz").write_bytes(b"")
    (folder / "text.npz").write_bytes(b"PK\x03\x04 and no archive")
    (folder / "deep.json").write_text("[" * 200_000)
    (folder / "latin.json").write_bytes(b'{"a": "\xe4"}')
    (folder / "lost.npz").symlink_to(folder / "nowhere")
    for suffix in ("safetensors", "npz", "json"):
        os.mkfifo(folder / f"pipe.{suffix}")
        (folder / f"folder.{suffix}").mkdir()
    failed = failures(folder)
    bad = ["cut.safetensors", "deep.json", "empty.npz", "empty.safetensors", "latin.json"]
    assert [name.partition(":")[0] for name in failed] == [*bad, "lost.npz", "text.npz"]
    assert sum(check.ok is True for check in recompute(folder)) == 3


@pytest.mark.golden
def test_an_incomplete_set_of_weights_is_one_failure_that_says_what_is_missing(folder):
    (folder / WEIGHTS[1]).rename(folder / "elsewhere")
    (failed,) = failures(folder)
    assert failed.startswith(f"{FORWARD}: MissingModel: There is no file")
    (folder / WEIGHTS[0]).rename(folder / "one.safetensors")
    (failed,) = failures(folder)
    assert failed.startswith(f"{FORWARD}: BadCheckpoint: one.safetensors lacks img_emb")


@pytest.mark.golden
def test_an_image_encoder_without_metadata_is_one_failure(golden, tmp_path):
    save_file(
        load_file(golden / "encoders" / "clip_visual.safetensors"), tmp_path / "x.safetensors"
    )
    (failed,) = failures(tmp_path)
    assert "x.safetensors holds weights of an image encoder without metadata" in failed


@pytest.mark.golden
@pytest.mark.parametrize(
    "name",
    [
        "keypoints/yolo10.npz",
        "keypoints/dwpose_crop.npz",
        "pose/raw_cylinders.npz",
        "pose/align_solver.npz",
        "sampling/solvers.safetensors",
        "transformer/preprocess.safetensors",
    ],
)
def test_a_file_of_empty_arrays_ends_in_a_failure_and_not_in_an_exception(golden, tmp_path, name):
    if name.endswith(".npz"):
        with np.load(golden / name) as file:
            np.savez(tmp_path / "x.npz", **{key: file[key].reshape(-1)[:0] for key in file.files})
    else:
        held, described = contents(golden / name)
        held = {key: tensor.flatten()[:0].clone() for key, tensor in held.items()}
        save_file(held, tmp_path / "x.safetensors", described)
    failed = failures(tmp_path)
    assert failed
    assert all(check.startswith("x.") for check in failed)


def test_a_folder_that_cannot_be_listed_is_said_in_one_sentence(tmp_path):
    with pytest.raises(BadMedia, match=r"^The folder .* cannot be read: File name too long\.$"):
        list(recompute(tmp_path / ("x" * 300)))
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file", tmp_path / "none"):
        with pytest.raises(BadMedia, match=rf"^There is no folder {path} to verify\.$"):
            list(recompute(path))


def test_json_of_cases_that_nobody_knows_is_not_passed_over(tmp_path):
    (tmp_path / "new.json").write_text('{"cases": [], "law": "unknown"}')
    (tmp_path / "workflow.json").write_text('{"1": {"inputs": {}}}')
    assert [(check.check, check.ok) for check in recompute(tmp_path)] == [("new.json", None)]
