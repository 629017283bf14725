"""A package from a file of any format has that format's error and the package's own, as squares."""

import math

import pytest
import torch

from engine.build.quantize import Quantization, groups
from engine.config import ModelConfig
from engine.denoise.block import FP8
from engine.models.checkpoint import Checkpoint
from tests.support.checkpoints import save, small_weights, to_sat
from tests.support.layouts import LAYOUTS, gguf_of, model_in

MODEL = ModelConfig(layers=2, dim=256, ffn=320, text_dim=64, clip_dim=64)
ROWS_LOSS = 2.65  # per cent, of FP8 rows
OWN = {"BF16": 0.2, "FP16": 0.1, "FP8 cast": 2.7, "Q8_0": 0.54, "Q4_0": 8.6}
FROM_TABLE = [*LAYOUTS, "Q8_0", "Q4_0", "SAT"]


def write(layout, weights, folder):
    if layout == "SAT":
        torch.save({"module": to_sat(weights)}, folder / "m.pt")
        return folder / "m.pt"
    if layout in ("Q8_0", "Q4_0"):
        gguf_of(layout, weights, folder / "m.gguf")
        return folder / "m.gguf"
    return model_in(layout, weights).save(folder / "m.safetensors")


def packed(path):
    """The linears of a package as FP32, by their names in it."""
    tensors = {}
    for group in groups(Quantization(Checkpoint(path), FP8)):
        tensors |= group.make()[0]
    return {
        name.removesuffix(".q"): held.float() * tensors[f"{name[:-1]}s"][:, None]
        for name, held in tensors.items()
        if name.endswith(".q")
    }


@pytest.fixture(scope="module")
def exact(tmp_path_factory):
    """The linears as they are, put together as a package does, and those of a package from FP32."""
    path = save(small_weights(config=MODEL), tmp_path_factory.mktemp("exact") / "m.safetensors")
    return packed(path)


@pytest.mark.slow
@pytest.mark.parametrize("layout", FROM_TABLE)
def test_a_package_from_any_layout_is_as_far_from_one_of_fp32_as_its_format_says(
    tmp_path, exact, layout
):
    path = write(layout, small_weights(config=MODEL), tmp_path)
    checkpoint = Checkpoint(path)
    stored = checkpoint.stored
    kinds = {stored[name].loss for name in stored if ".ffn.0.weight" in name}
    own = OWN.get(layout, max(kinds, default=0.0))
    got = packed(path)
    assert got.keys() == exact.keys()
    for name, weight in exact.items():
        error = 100 * ((got[name] - weight).norm() / weight.norm()).item()
        # both are rounded to FP8 rows, each by itself
        assert error <= 1.3 * math.hypot(own, ROWS_LOSS * math.sqrt(2)), name
        if own > 8:
            assert error >= 0.7 * own, name
