"""A file of weights is told for what it is from its header alone."""

import json
import os
import subprocess
import sys

import pytest
import torch

from engine.__main__ import main
from engine.config import NANO_SCAIL2, SCAIL2_14B, ModelConfig
from engine.errors import BadCheckpoint, MissingModel
from engine.models.checkpoint import parameter_shapes
from engine.models.describe import LINEARS, describe
from engine.models.dit import Scail
from engine.package.direct_file import cached_bytes
from tests.support.checkpoints import SMALL, SMALL_SCAIL2, save, small_weights, to_sat
from tests.support.layouts import LAYOUTS, gguf_of, int8, model_in
from tests.support.sparse import LINEARS as SPARSE
from tests.support.sparse import sparse_gguf, sparse_safetensors

Q4_K = 12
COPIED = {"FP8 scale_weight": "fp8", "FP8 comfy_quant": "fp8", "FP8 rows": "fp8", "FP8 cast": "fp8",
          "MXFP8": "fp8", "MXFP8 in U8, untold": "fp8"}  # fmt: skip
MOST_BYTES = 16_000_000


def formats(told):
    return {row["format"]: row["weights"] for row in told["formats"] if row["of"] == LINEARS}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_is_told_with_what_it_lost_and_what_a_package_will_lose(tmp_path, layout):
    told = describe(model_in(layout, small_weights()).save(tmp_path / "m.safetensors"))
    assert (told["is"], told["problem"]) == ("a checkpoint of SCAIL-Preview", None)
    assert told["model"] == {
        "name": "SCAIL-Preview", "layers": 2, "width": 128, "feed_forward": 192, "mask_channels": 0,
    }  # fmt: skip
    first, *others = told["formats"]
    assert (first["of"], first["weights"]) == (LINEARS, 24)
    assert [row for row in others if "package_loses_percent" in row] == []
    lost, copied = first["has_lost_percent"], COPIED.get(layout)
    assert first["package_copies_its_codes"] == copied
    for form, rows in (("int8", 0.88), ("fp8", 2.65)):
        want = lost if form == copied else (lost**2 + rows**2) ** 0.5
        assert first["package_loses_percent"][form] == pytest.approx(want, abs=0.01)
    json.dumps(told)


def test_rotated_codes_are_copied_in_the_groups_of_packages_alone(tmp_path):
    config = ModelConfig(layers=2, dim=256, ffn=512, text_dim=64, clip_dim=64)
    model = model_in("BF16", small_weights(config=config))
    settings = {"format": "int8_tensorwise", "convrot": True}
    for n, group in enumerate((256, 64)):
        name = f"blocks.{n}.ffn.2"
        made = int8(group=group, **settings, convrot_groupsize=group)
        written = made(model.means[f"{name}.weight"])
        model.tensors.update({f"{name}.{end}": t for end, t in written.tensors.items()})
    told = describe(model.save(tmp_path / "m.safetensors"))
    rows = {row["format"]: row for row in told["formats"] if "ConvRot" in row["format"]}
    assert {kind: (row["package_copies_its_codes"], row["package_loses_percent"])
            for kind, row in rows.items()} == {
        "INT8 rows, rotated (ConvRot 256)": ("int8", {"int8": 0.88, "fp8": 2.79}),
        "INT8 rows, rotated (ConvRot 64)": (None, {"int8": 1.24, "fp8": 2.79}),
    }  # fmt: skip


def test_linears_of_the_official_names_are_told_from_the_rest(tmp_path):
    torch.save({"module": to_sat(small_weights())}, tmp_path / "m.pt")
    rows = describe(tmp_path / "m.pt")["formats"]
    [linears] = [row for row in rows if row["of"] == LINEARS]
    [rest] = [row for row in rows if row["of"] == "other matrices"]
    assert linears["package_loses_percent"] == {"int8": 0.88, "fp8": 2.65}
    assert linears["weights"] == 2 * 8  # fused as a package fuses them, q of the text apart
    assert rest["values"] == sum(
        w.numel() for name, w in small_weights().items()
        if w.ndim > 1 and not (name.startswith("blocks.") and w.ndim == 2)
    )  # fmt: skip


def test_the_official_file_and_gguf_are_told(tmp_path):
    weights = small_weights(config=SMALL_SCAIL2)
    torch.save({"module": to_sat(weights), "iteration": 3}, tmp_path / "m.pt")
    told = describe(tmp_path / "m.pt")
    assert (told["is"], told["container"]) == ("a checkpoint of SCAIL-2", "PyTorch")
    assert "iteration lie beside the weights and are not used" in told["notes"]
    gguf_of("Q4_0", weights, tmp_path / "m.gguf")
    told = describe(tmp_path / "m.gguf")
    assert (told["is"], told["container"]) == ("a checkpoint of SCAIL-2", "GGUF")
    assert formats(told)["GGUF Q4_0"] == 24
    assert told["dtypes"]["Q4_0"] == 24
    assert "24 weights are stored as GGUF Q4_0, which lost about 8.6 %" in told["notes"][0]


def test_what_is_missing_and_what_is_unknown_is_listed(tmp_path):
    weights = small_weights()
    del weights["blocks.1.ffn.2.bias"], weights["head.modulation"]
    weights["blocks.0.gate"] = torch.ones(1)
    told = describe(save(weights, tmp_path / "m.safetensors"))
    assert told["is"] == "part of SCAIL-Preview, or another model"
    assert told["missing"] == ["blocks.1.ffn.2.bias", "head.modulation"]
    assert told["unknown"] == ["blocks.0.gate"]
    assert told["problem"].startswith("m.safetensors lacks blocks.1.ffn.2.bias")


def test_other_models_are_told(tmp_path):
    weights = {name: w for name, w in small_weights().items() if "pose" not in name}
    told = describe(save(weights, tmp_path / "m.safetensors"))
    assert (told["is"], told["model"]) == ("another Wan model", None)
    assert "is another Wan model" in told["problem"]
    told = describe(save({"encoder.weight": torch.ones(2)}, tmp_path / "e.safetensors"))
    assert (told["is"], told["dtypes"]) == ("no transformer of SCAIL", {"F32": 1})
    refused = save({"blocks.0.x.qweight": torch.ones(2).int()}, tmp_path / "q.safetensors")
    assert "is of GPTQ, AWQ or Nunchaku" in describe(refused)["problem"]


def test_a_lora_is_told_with_its_kinds_and_the_model_that_it_fits(tmp_path):
    shapes = parameter_shapes(NANO_SCAIL2)
    rows, columns = shapes["blocks.5.ffn.0.weight"]
    path = save({
        "transformer.blocks.5.ffn.net.0.proj.lora_A.weight": torch.ones(8, columns),
        "transformer.blocks.5.ffn.net.0.proj.lora_B.weight": torch.ones(rows, 8),
        "transformer.blocks.5.ffn.net.0.proj.alpha": torch.tensor(4.0),
        "blocks.0.norm3.diff_b": torch.ones(256),
    }, tmp_path / "lora.safetensors")  # fmt: skip
    told = describe(path)
    assert told["is"] == "a LoRA for the nano model"
    assert told["lora"] == {
        "weights": 2, "changes": {"pair": 1, "difference": 1}, "ranks": [8], "factors": [0.5],
        "with_magnitudes": 0, "replaced": 0,
    }  # fmt: skip
    save({"lora_unet_down.lora_down.weight": torch.ones(4, 4)}, path)
    assert describe(path)["is"] == "a LoRA for another model"
    assert "half of the pair" in describe(path)["problem"]


def test_the_command_prints_one_json_object(tmp_path, capsys):
    path = save(small_weights(), tmp_path / "m.safetensors")
    main(["info", "--checkpoint", str(path)])
    assert json.loads(capsys.readouterr().out)["model"]["width"] == SMALL.dim


def test_a_file_that_is_none_ends_in_a_sentence(tmp_path, capsys):
    (tmp_path / "m.safetensors").write_bytes(b"no")
    with pytest.raises(BadCheckpoint, match="is damaged or cut short"):
        describe(tmp_path / "m.safetensors")
    with pytest.raises(MissingModel, match="There is no file"):
        describe(tmp_path / "none.gguf")
    with pytest.raises(SystemExit) as end:
        main(["info", "--checkpoint", str(tmp_path / "m.safetensors"), "--verify"])
    assert end.value.code == 2
    assert "--checkpoint tells of a file alone" in capsys.readouterr().err


def test_the_shapes_of_all_blocks_are_those_of_the_model():
    with torch.device("meta"):
        held = Scail(SMALL_SCAIL2).state_dict()
    assert parameter_shapes(SMALL_SCAIL2) == {name: tuple(w.shape) for name, w in held.items()}


def cached(path):
    with path.open("rb") as file:
        return cached_bytes(file.fileno(), 0, path.stat().st_size)


def evict(path):
    with path.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


@pytest.mark.parametrize("layout", [*SPARSE, "GGUF"])
def test_a_file_of_full_size_is_told_without_reading_it(tmp_path, layout):
    if layout == "GGUF":
        path = sparse_gguf(tmp_path / "m.gguf", Q4_K)
    else:
        path = sparse_safetensors(tmp_path / "m.safetensors", layout)
    evict(path)
    if cached(path):
        pytest.skip("files stay in memory here: what is read cannot be seen")
    told = describe(path)
    assert (told["is"], told["problem"]) == ("a checkpoint of SCAIL-2", None)
    assert told["model"]["width"] == SCAIL2_14B.dim
    assert cached(path) < MOST_BYTES


DESCRIBED = """
import sys
from engine.__main__ import main
main(["info", "--checkpoint", sys.argv[1]])
print([name for name in ("gguf", "onnxruntime", "scipy", "triton") if name in sys.modules])
"""


def test_telling_what_a_file_is_imports_nothing_large(tmp_path):
    """The package that dequantises blocks is imported with the first block."""
    path = sparse_gguf(tmp_path / "m.gguf", Q4_K)
    run = subprocess.run(
        [sys.executable, "-c", DESCRIBED, path], capture_output=True, text=True, check=True
    )
    assert run.stdout.splitlines()[-1] == "[]"
