"""Every checkpoint layout loads to the same model, and every wrong file is named for what it is."""

import json
import re
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file

from engine.config import SCAIL_1_3B
from engine.errors import BadCheckpoint, MissingModel
from engine.models.checkpoint import Checkpoint
from engine.models.fill import depth
from engine.models.tensorfile import TensorFile
from tests.support.checkpoints import (
    SMALL,
    SMALL_SCAIL2,
    assert_equal,
    loaded,
    save,
    small_weights,
    to_fp8,
    to_sat,
)

CPU = torch.device("cpu")


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


@pytest.mark.parametrize("layout", ["converted", "sat", "wangp"])
def test_scail_2_is_known_by_its_masks_in_every_layout(tmp_path, layout):
    weights = small_weights(config=SMALL_SCAIL2)
    wangp = {
        "patch_embedding_pose": "pose_patch_embedding",
        "patch_embedding_mask": "mask_patch_embedding",
    }

    def named(name):
        stem, _, rest = name.partition(".")
        return f"{wangp.get(stem, stem)}.{rest}"

    stored = {
        "converted": weights,
        "sat": to_sat(weights),
        "wangp": {named(name): weight for name, weight in weights.items()},
    }[layout]
    path = save(stored, tmp_path / "scail2.safetensors")
    assert Checkpoint(path).config == SMALL_SCAIL2
    assert Checkpoint(path).config.kind.title == "SCAIL-2"
    assert_equal(loaded(path), weights)


def test_wangp_names_of_the_pose_embedding_are_understood(tmp_path):
    weights = small_weights()
    stored = {
        name.replace("patch_embedding_pose.", "pose_patch_embedding."): w
        for name, w in weights.items()
    }
    assert_equal(loaded(save(stored, tmp_path / "m.safetensors")), weights)


def test_metadata_of_a_checkpoint_that_nothing_reads_are_told(tmp_path, caplog):
    path = tmp_path / "m.safetensors"
    save_file(
        small_weights(), path, metadata={"scale": "2", "format": "pt", "modelspec.title": "a"}
    )
    Checkpoint(path)
    assert "m.safetensors: its metadata scale are not used" in caplog.text
    assert "modelspec" not in caplog.text


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
    "half of SCAIL-2": (
        lambda w: w | {"patch_embedding_mask.weight": torch.ones(128, 28, 1, 2, 2)},
        r"lacks patch_embedding_mask\.bias",
    ),
    "masks that SCAIL-2 does not have": (
        lambda w: w | {"patch_embedding_mask.weight": torch.ones(128, 21, 1, 2, 2)},
        r"takes 21 channels; masks of SCAIL-2 have 28",
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


NUMBERS = {
    "far off": ("blocks.99999.ffn.0.weight", "holds a block 99999 but no block 2,"),
    "of 900 digits": (f"blocks.{'9' * 900}.ffn.0.weight", f"block {'9' * 20} but no block 2,"),
    "after a gap": ("blocks.3.ffn.0.weight", "holds a block 3 but no block 2,"),
    "with a nought in front": ("blocks.01.ffn.0.weight", "holds a block 01 but no block 2,"),
}


@pytest.mark.parametrize("case", NUMBERS)
def test_a_stray_layer_is_told_before_anything_is_built(tmp_path, case):
    name, message = NUMBERS[case]
    path = save(small_weights() | {name: torch.ones(1)}, tmp_path / "m.safetensors")
    with pytest.raises(BadCheckpoint, match=message) as caught:
        Checkpoint(path)
    assert len(str(caught.value)) < 300
    pattern = re.compile(r"blocks\.(?P<n>\d+)\.")
    with pytest.raises(BadCheckpoint, match=message):  # as the text and image encoders count
        depth(TensorFile(path), pattern)


def test_blocks_are_counted(tmp_path):
    path = save({f"blocks.{n}.w": torch.ones(1) for n in range(12)}, tmp_path / "m.safetensors")
    assert depth(TensorFile(path), re.compile(r"blocks\.(?P<n>\d+)\.")) == 12
    assert depth(TensorFile(path), re.compile(r"layers\.(?P<n>\d+)\.")) == 0


@pytest.mark.parametrize(
    "name", ["patch_embedding.weight", "blocks.0.ffn.0.bias", "text_embedding.0.weight"]
)
@pytest.mark.filterwarnings("error")  # torch warns of layers without weights
def test_an_empty_tensor_gives_no_size(tmp_path, name):
    weights = small_weights()
    for axis in range(min(2, weights[name].ndim)):
        shape = list(weights[name].shape)
        shape[axis] = 0
        path = save(weights | {name: torch.empty(shape)}, tmp_path / f"{axis}.safetensors")
        with pytest.raises(BadCheckpoint, match=rf"{name} has shape .*sizes above 0"):
            Checkpoint(path)


def test_rows_that_do_not_divide_among_the_converted_names_are_refused(tmp_path):
    module = to_sat(small_weights(), "")
    name = "transformer.layers.0.attention.query_key_value.weight"
    module[name] = torch.ones(3 * SMALL.dim + 1, SMALL.dim)
    torch.save({"module": module}, tmp_path / "m.pt")
    with pytest.raises(BadCheckpoint, match=r"shape \[385, 128\]; .*\[384, 128\] is expected"):
        Checkpoint(tmp_path / "m.pt")


def test_a_caller_may_say_how_many_layers_there_are(tmp_path):
    config = replace(SMALL, dim=SCAIL_1_3B.dim, ffn=16)
    path = save(small_weights(config=config), tmp_path / "m.safetensors")
    assert Checkpoint(path, layers=2).config == config
    with pytest.raises(BadCheckpoint, match="has 2 layers of width 1536, not 30"):
        Checkpoint(path)
    with pytest.raises(BadCheckpoint, match="has 2 layers of width 1536, not 3:"):
        Checkpoint(path, layers=3)


@pytest.mark.parametrize("odd", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("layout", ["plain", "fp8", "sat"])
def test_a_weight_that_is_not_finite_is_named(tmp_path, odd, layout):
    weights, path = small_weights(), tmp_path / "m.safetensors"
    weights["blocks.1.ffn.2.weight"][3, 5] = odd
    if layout == "sat":
        path = tmp_path / "m.pt"
        torch.save({"module": to_sat(weights)}, path)
    else:
        if layout == "fp8":
            weights["blocks.1.ffn.2.weight"].nan_to_num_(0, 0, 0)
            weights = to_fp8(weights)
            weights["blocks.1.ffn.2.scale_weight"] = torch.tensor(odd)
        save(weights, path)
    stored = "mlp.dense_4h_to_h" if layout == "sat" else "blocks.1.ffn.2"
    with pytest.raises(BadCheckpoint, match=rf"^{path.name}: .*{stored}\.weight holds .*finite"):
        loaded(path)


def test_a_weight_that_overflows_fp16_is_told_with_the_type(tmp_path):
    weights = small_weights()
    weights["blocks.1.ffn.2.weight"][3, 5] = 70_000
    path = save(weights, tmp_path / "m.safetensors")
    with pytest.raises(BadCheckpoint, match=r"not finite in torch\.float16.*load it in another"):
        loaded(path, torch.float16)
    assert_equal(loaded(path), weights)


def test_integer_weights_are_refused(tmp_path):
    weights = small_weights()
    weights["blocks.0.ffn.0.weight"] = torch.ones(192, 128, dtype=torch.int16)
    path = save(weights, tmp_path / "m.safetensors")
    with pytest.raises(BadCheckpoint, match=r"ffn\.0\.weight is stored as I16 .*nothing beside it"):
        Checkpoint(path)


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


def test_a_file_that_is_not_there_and_one_of_another_kind_are_told(tmp_path):
    with pytest.raises(MissingModel, match="There is no file"):
        Checkpoint(tmp_path / "none.safetensors")
    (tmp_path / "model.onnx").write_bytes(b"\x08\x08\x12\x07")
    with pytest.raises(BadCheckpoint, match=r"neither a \.safetensors nor a \.gguf"):
        Checkpoint(tmp_path / "model.onnx")
    torch.save([1, 2], tmp_path / "list.pt")
    with pytest.raises(BadCheckpoint, match="holds one list"):
        Checkpoint(tmp_path / "list.pt")


# Of this program alone: what getrusage counts begins at what the tests had when they started it.
MEASURE = """
import sys, torch
from pathlib import Path
from engine.models.tensorfile import TensorFile
def peak():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("VmHWM")) / 1024
file = TensorFile(Path(sys.argv[1]), top_key="module")
out = torch.ones(file.shape(next(iter(file))))
Path("/proc/self/clear_refs").write_text("5")  # the peak is that of now
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
