"""Every checkpoint layout loads to the same model, and every wrong file is named for what it is."""

import json
import re
import subprocess
import sys

import pytest
import torch
from checkpoints import SMALL, save, small_weights, to_fp8, to_sat

from engine.errors import BadCheckpoint, MissingModel
from engine.models.checkpoint import Checkpoint, load_transformer

CPU = torch.device("cpu")


def loaded(path, dtype=torch.float32):
    return load_transformer(Checkpoint(path), CPU, dtype).state_dict()


def assert_equal(got, want):
    assert got.keys() == want.keys()
    for name, tensor in want.items():
        assert torch.equal(got[name].float(), tensor.float()), name


def test_the_official_file_splits_into_the_converted_weights(tmp_path):
    weights = small_weights()
    module = to_sat(weights)
    module["conditioner.embedders.0.model.norm"] = torch.zeros(3)  # others' weights are ignored
    torch.save({"module": module, "iteration": 1}, tmp_path / "mp_rank_00_model_states.pt")
    assert_equal(loaded(tmp_path / "mp_rank_00_model_states.pt"), weights)


@pytest.mark.parametrize("prefix", ["", "diffusion_model.", "model.diffusion_model."])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_converted_files_load_in_every_dtype_and_with_every_prefix(tmp_path, prefix, dtype):
    weights = {name: w.to(dtype) for name, w in small_weights().items()}
    path = save({prefix + name: w for name, w in weights.items()}, tmp_path / "m.safetensors")
    assert_equal(loaded(path), weights)


def test_wangp_names_of_the_pose_embedding_are_understood(tmp_path):
    weights = small_weights()
    stored = {
        name.replace("patch_embedding_pose.", "pose_patch_embedding."): w
        for name, w in weights.items()
    }
    assert_equal(loaded(save(stored, tmp_path / "m.safetensors")), weights)


@pytest.mark.parametrize("scale_name", ["scale_weight", "weight_scale"])
def test_fp8_weights_are_multiplied_with_their_scales(tmp_path, scale_name):
    weights = small_weights()
    stored = to_fp8(weights, scale_name)
    got = loaded(save(stored, tmp_path / "fp8.safetensors"))
    name = "blocks.1.ffn.2.weight"
    scale = stored[name.removesuffix("weight") + scale_name]
    assert torch.equal(got[name], stored[name].float() * scale)
    for name, weight in weights.items():
        step = weight.abs().max() / 448 * 16.1  # half the widest gap of E4M3, and FP32 rounding
        assert (got[name] - weight).abs().max() <= step, name


def test_fp8_rows_may_have_a_scale_each(tmp_path):
    stored = to_fp8(small_weights())
    name = "blocks.0.self_attn.q.weight"
    scales = torch.rand(SMALL.dim, 1) + 0.5
    stored["blocks.0.self_attn.q.scale_weight"] = scales
    got = loaded(save(stored, tmp_path / "fp8.safetensors"))
    assert torch.equal(got[name], stored[name].float() * scales)


def test_a_scale_of_the_wrong_length_is_refused(tmp_path):
    stored = to_fp8(small_weights())
    stored["blocks.0.self_attn.q.scale_weight"] = torch.ones(7)
    checkpoint = Checkpoint(save(stored, tmp_path / "fp8.safetensors"))
    with pytest.raises(BadCheckpoint, match=r"scale_weight has 7 values"):
        load_transformer(checkpoint, CPU)


@pytest.mark.parametrize("opened", ["shard", "index"])
def test_a_sharded_file_opens_by_any_of_its_names(tmp_path, opened):
    weights = small_weights()
    names = list(weights)
    shards = [names[:10], names[10:]]
    files = [f"m-0000{n + 1}-of-00002.safetensors" for n in range(2)]
    for shard, file in zip(shards, files):
        save({name: weights[name] for name in shard}, tmp_path / file)
    index = tmp_path / "m.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {n: f for s, f in zip(shards, files) for n in s}}))
    assert_equal(loaded(tmp_path / files[1] if opened == "shard" else index), weights)
    (tmp_path / files[0]).unlink()
    with pytest.raises(MissingModel, match=files[0]):
        Checkpoint(tmp_path / files[1])


def test_only_the_linears_of_the_blocks_leave_fp32(tmp_path):
    path = save(small_weights(), tmp_path / "m.safetensors")
    for name, weight in loaded(path, torch.float16).items():
        linear = re.match(r"blocks\.\d+\.(self_attn|cross_attn|ffn)\.(?!norm)", name)
        assert weight.dtype == (torch.float16 if linear else torch.float32), name


def without(name):
    return lambda weights: {n: w for n, w in weights.items() if n != name}


WRONG = {
    "a missing tensor": (without("blocks.1.norm3.bias"), r"lacks blocks\.1\.norm3\.bias"),
    "no text embedding": (without("text_embedding.0.weight"), r"lacks text_embedding\.0\.weight"),
    "an extra tensor": (
        lambda w: w | {"blocks.1.gate.weight": torch.ones(2)},
        r"SCAIL has not, blocks\.1\.gate\.weight",
    ),
    "a wrong shape": (
        lambda w: w | {"blocks.0.ffn.2.weight": torch.ones(128, 191)},
        r"blocks\.0\.ffn\.2\.weight has shape \[128, 191\].*\[128, 192\] is expected",
    ),
    "a scalar for a matrix": (
        lambda w: w | {"patch_embedding.weight": torch.ones(())},
        r"patch_embedding\.weight",
    ),
    "SCAIL-2": (
        lambda w: w | {"patch_embedding_mask.weight": torch.ones(128, 28, 1, 2, 2)},
        r"is SCAIL-2",
    ),
    "a plain Wan model": (
        lambda w: {n: t for n, t in w.items() if "pose" not in n},
        r"is another Wan model.*patch_embedding_pose",
    ),
    "another thing": (lambda _: {"encoder.weight": torch.ones(3)}, r"holds no SCAIL transformer"),
    "an odd width": (
        lambda w: w | {"patch_embedding.weight": torch.ones(100, 20, 1, 2, 2)},
        r"100 wide.*head size 128",
    ),
    "layers missing from a known size": (
        lambda w: (
            w | {"patch_embedding.weight": torch.empty(5120, 20, 1, 2, 2, dtype=torch.bfloat16)}
        ),
        r"has 2 layers of width 5120, not 40",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_file_is_named_for_what_it_is(tmp_path, case):
    change, message = WRONG[case]
    path = save(change(small_weights()), tmp_path / "wrong.safetensors")
    with pytest.raises(BadCheckpoint, match=message) as caught:
        Checkpoint(path)
    assert "wrong.safetensors" in str(caught.value)


def test_integer_weights_are_refused(tmp_path):
    weights = small_weights()
    weights["blocks.0.ffn.0.weight"] = torch.ones(192, 128, dtype=torch.int8)
    checkpoint = Checkpoint(save(weights, tmp_path / "m.safetensors"))
    with pytest.raises(BadCheckpoint, match=r"ffn\.0\.weight is stored as torch\.int8"):
        load_transformer(checkpoint, CPU)


@pytest.mark.parametrize("kind", ["safetensors", "pt"])
@pytest.mark.parametrize("kept", [0, 7, 1000, 0.5, 0.99])
def test_a_truncated_file_is_an_error(tmp_path, kind, kept):
    path = tmp_path / f"cut.{kind}"
    if kind == "pt":
        torch.save({"module": to_sat(small_weights())}, path)
    else:
        save(small_weights(), path)
    data = path.read_bytes()
    path.write_bytes(data[: kept if kept >= 1 else int(len(data) * kept)])
    with pytest.raises(BadCheckpoint, match=rf"cut\.{kind}"):
        Checkpoint(path)


class Trap:
    """Unpickling it would run code."""

    def __reduce__(self):
        return (print, ("code ran",))


def test_a_pickle_that_runs_code_is_refused(tmp_path, capsys):
    torch.save({"module": Trap()}, tmp_path / "trap.pt")
    with pytest.raises(BadCheckpoint, match=r"trap\.pt is damaged.*more than tensors"):
        Checkpoint(tmp_path / "trap.pt")
    assert "code ran" not in capsys.readouterr().out


def test_a_file_that_is_not_there_and_one_of_another_kind_are_told(tmp_path):
    with pytest.raises(MissingModel, match="There is no file"):
        Checkpoint(tmp_path / "none.safetensors")
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    with pytest.raises(BadCheckpoint, match=r"neither a \.safetensors nor a \.pt"):
        Checkpoint(tmp_path / "model.gguf")
    torch.save([1, 2], tmp_path / "list.pt")
    with pytest.raises(BadCheckpoint, match="holds a list"):
        Checkpoint(tmp_path / "list.pt")


MEASURE = """
import resource, sys, torch
from pathlib import Path
from engine.models.tensorfile import TensorFile
def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
file = TensorFile(Path(sys.argv[1]), top_key="module")
out = torch.ones(file.shape(next(iter(file))))
before = peak()
for name in file:
    with file.open(name) as tensor:
        out.copy_(tensor)
print(peak() - before)
"""


@pytest.mark.parametrize("kind", ["safetensors", "pt"])
def test_reading_gives_the_pages_of_each_tensor_back(tmp_path, kind):
    path = tmp_path / f"large.{kind}"
    tensors = {f"t{n}": torch.full((8, 2**20), float(n)) for n in range(16)}  # 512 MB
    if kind == "pt":
        torch.save({"module": tensors}, path)
    else:
        save(tensors, path)
    grown = subprocess.run(
        [sys.executable, "-c", MEASURE, path], capture_output=True, text=True, check=True
    )
    assert float(grown.stdout) < 100  # MiB: one tensor of 32, not all sixteen
