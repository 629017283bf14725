"""The transformer: equal to the golden data, and to the specification where they end."""

import math

import pytest
import torch

from engine.errors import Unavailable
from engine.golden import transformer
from engine.models.attention import find_attention
from engine.models.checkpoint import Checkpoint, load_transformer
from engine.models.dit import ROPE_DIMS, Linear, rope_tables
from tests.support.checkpoints import SMALL, save, small_weights

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def model_file(tmp_path_factory):
    return save(small_weights(), tmp_path_factory.mktemp("model") / "small.safetensors")


def example(seed=1, frames=2, height=8, width=12):
    draw = torch.Generator().manual_seed(seed)

    def randn(*shape):
        return torch.randn(*shape, generator=draw)

    return {
        "latents": randn(16, frames, height, width),
        "reference": randn(16, 1, height, width),
        "pose": randn(16, frames, height // 2, width // 2),
        "text": randn(9, SMALL.text_dim),
        "vision": randn(17, SMALL.clip_dim),
    }


@torch.inference_mode()
def run(model, x, pose=True, timestep=700.0):
    context = model.embed_context(x["text"], x["vision"])
    skeleton = x["pose"] if pose else None
    return model(x["latents"], timestep, context, x["reference"], skeleton)


@pytest.mark.golden
@pytest.mark.parametrize("case", ["a", "b"])
@pytest.mark.parametrize("kind", ["forward", "trajectory"])
def test_the_transformer_equals_the_reference_program(golden, case, kind):
    checks = list(transformer.checks(golden / "transformer" / f"case_{case}_{kind}.safetensors"))
    assert len(checks) >= 7
    assert [check for check in checks if not check.ok] == []


def test_pose_tables_shrink_by_the_cosine_of_half_the_frequency():
    """Closed form of the 2x2 mean: cos(omega / 2) times the rotation at the middle.

    Source: docs/reference/denoiser.md 3.4.
    """
    t, h, w = 3, 4, 6
    rope = rope_tables((t, h, w), True, CPU)
    first = h * w * (1 + t)
    token = first + (1 * (h // 2) + 1) * (w // 2) + 2  # frame 1, Y = 1, X = 2
    positions = (1 + 1, 2 * 1 + 0.5, 120 + 2 * 2 + 0.5)
    want = []
    for axis, (position, size) in enumerate(zip(positions, ROPE_DIMS)):
        for j in range(size // 2):
            omega = 10000 ** (-2 * j / size)
            shrink = 1.0 if axis == 0 else math.cos(omega / 2)
            want.append((shrink * math.cos(position * omega), shrink * math.sin(position * omega)))
    got = torch.stack([rope.cos[token, 0], rope.sin[token, 0]], dim=1)
    assert torch.allclose(got, torch.tensor(want), atol=2e-5)


def test_reference_tokens_stand_at_time_zero_and_video_starts_at_one():
    rope = rope_tables((2, 2, 3), False, CPU)
    assert rope.cos.shape == (18, 1, 64)
    assert torch.equal(rope.cos[0], torch.ones(1, 64))  # (0, 0, 0)
    assert math.isclose(rope.cos[6, 0, 0].item(), math.cos(1), abs_tol=1e-6)  # (1, 0, 0)
    assert math.isclose(rope.sin[6 + 2, 0, 22 + 21].item(), math.sin(2), abs_tol=1e-6)  # w = 2


@pytest.mark.parametrize(("dtype", "limit"), [(torch.bfloat16, 0.02), (torch.float16, 0.003)])
def test_half_precision_stays_near_fp32(model_file, dtype, limit):
    x = example()
    exact = run(load_transformer(Checkpoint(model_file), CPU), x)
    half = run(load_transformer(Checkpoint(model_file), CPU, dtype), x)
    assert half.dtype == torch.float32
    assert 0 < ((half - exact).norm() / exact.norm()).item() < limit


def test_half_precision_keeps_the_residual_stream_in_fp32(model_file):
    model = load_transformer(Checkpoint(model_file), CPU, torch.bfloat16)
    seen = []
    for block in model.blocks:
        block.register_forward_hook(lambda _, args, out: seen.extend([args[0].dtype, out.dtype]))
        for module in block.modules():
            if isinstance(module, torch.nn.RMSNorm | torch.nn.LayerNorm):
                module.register_forward_hook(lambda _, __, out: seen.append(out.dtype))
            elif isinstance(module, Linear):
                assert module.weight.dtype == torch.bfloat16
    run(model, example())
    assert len(seen) == 2 * (2 + 6)
    assert set(seen) == {torch.float32}


def test_leaving_the_skeleton_out_takes_its_tokens_away(model_file):
    model = load_transformer(Checkpoint(model_file), CPU)
    x = example()
    without = run(model, x, pose=False)
    assert not torch.allclose(without, run(model, x), atol=1e-3)
    x["pose"] = x["pose"] * 5
    assert torch.equal(without, run(model, x, pose=False))


def test_every_input_matters(model_file):
    model = load_transformer(Checkpoint(model_file), CPU)
    x = example()
    base = run(model, x)
    for name in x:
        changed = run(model, x | {name: x[name].flip(-1)})
        assert (changed - base).abs().max() > 1e-5, name
    assert (run(model, x, timestep=100.0) - base).abs().max() > 1e-4


def test_more_frames_than_the_official_tables_hold_keep_their_places():
    """The official tables end at 21 frames; nothing in the mathematics ends there."""
    long, short = rope_tables((30, 2, 2), True, CPU), rope_tables((21, 2, 2), True, CPU)
    assert torch.equal(long.cos[: 4 * 22], short.cos[: 4 * 22])  # reference and video
    assert torch.equal(long.sin[4 * 31 :][:21], short.sin[4 * 22 :])  # skeleton
    assert math.isclose(long.cos[4 * 30, 0, 0].item(), math.cos(30), abs_tol=1e-5)


def test_attention_is_chosen_by_name_and_an_absent_one_is_an_error():
    with pytest.raises(Unavailable, match="no attention 'flash'"):
        find_attention("flash")
    with pytest.raises(Unavailable, match="xformers was asked for"):
        find_attention("xformers")
    q, k, v = (torch.randn(n, 2, 128) for n in (5, 7, 7))
    weights = torch.softmax(torch.einsum("snk,lnk->nsl", q, k) / math.sqrt(128), dim=-1)
    want = torch.einsum("nsl,lnk->snk", weights, v)
    assert torch.allclose(find_attention("sdpa")(q, k, v), want, atol=1e-5)
