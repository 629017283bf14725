"""The tensors of a package are those of the checkpoint, fused, folded, padded and in 8 bits."""

import pytest
import torch
from safetensors.torch import save_file

from engine.build.calibration import Activations, Channels
from engine.build.columns import BOUND, equalised, square_sums
from engine.build.quantize import (
    Quantization,
    groups,
    narrow,
    package_bytes,
    padded_ffn,
)
from engine.config import ModelConfig
from engine.denoise.block import (
    BlockWeights,
    ContextWeights,
    assemble,
    block_modulation,
    context_keys,
    run_block,
)
from engine.models.checkpoint import Checkpoint, load_transformer
from engine.models.dit import rope_tables
from engine.models.lora import Lora
from kernels.arch import SM86, SM89
from kernels.fp8 import E4M3, INT8R, Rows, rotate
from kernels.ops import reference_ops
from tests.support.checkpoints import save, small_weights

CPU = torch.device("cpu")
FORMS = (E4M3, INT8R)
MODEL = ModelConfig(layers=2, dim=256, ffn=320, text_dim=32, clip_dim=48)
PARTS = {  # of a fused linear, in the order of its rows
    "qkv": ("self_attn.q", "self_attn.k", "self_attn.v"),
    "o": ("self_attn.o",),
    "cross_q": ("cross_attn.q",),
    "cross_o": ("cross_attn.o",),
    "text": ("cross_attn.k", "cross_attn.v"),
    "vision": ("cross_attn.k_img", "cross_attn.v_img"),
}
STEP = 1 / 28  # of E4M3, relative to the largest value of a row


@pytest.fixture(scope="module")
def weights():
    return small_weights(config=MODEL)


@pytest.fixture(scope="module")
def checkpoint(weights, tmp_path_factory):
    return Checkpoint(save(weights, tmp_path_factory.mktemp("model") / "model.safetensors"))


def made(job):
    tensors = {}
    for group in groups(job):
        found, _ = group.make()
        assert not tensors.keys() & found.keys()
        tensors |= found
    return tensors


def linear(tensors, name):
    """What the rows stand for: rotated back, their columns multiplied again."""
    rows = Rows(tensors[f"{name}.q"], tensors[f"{name}.s"])
    if rows.q.dtype == torch.float8_e4m3fn:
        return rows.dequantize()
    return rotate(rows.dequantize()) * multiplier(tensors, name)


def multiplier(tensors, name):
    """The multipliers of a linear's input where they are stored as such, or ones."""
    block, _, field = name.rpartition(".")
    smooth = tensors[f"{block}.smooth"]
    return {"qkv": smooth[0], "up": smooth[1], "down": tensors[f"{block}.inner"]}.get(
        field, torch.ones(1)
    )


def assert_near(got, want, form):
    """E4M3: each value within half a step of its row's scale. INT8: rotation spreads the error."""
    if form == E4M3:
        limit = want.abs().amax(dim=1, keepdim=True) * STEP
        assert ((got - want).abs() <= limit * (1 + 1e-5)).all()
        return
    assert (got - want).norm() < 0.01 * want.norm()


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.name)
def test_linears_with_one_input_are_one_matrix_of_their_rows(checkpoint, weights, form):
    tensors = made(Quantization(checkpoint, form))
    for n in range(MODEL.layers):
        for field, parts in PARTS.items():
            name = f"blocks.{n}.{field}"
            names = [f"blocks.{n}.{part}" for part in parts]
            assert tensors[f"{name}.q"].dtype == form.dtype
            want = torch.cat([weights[f"{part}.weight"] for part in names])
            bias = torch.cat([weights[f"{part}.bias"] for part in names])
            read, made_bias = linear(tensors, name), tensors[f"{name}.bias"]
            if form.rotated:  # columns of what comes after are equal, where the values are made
                after = {"qkv": "o", "text": "cross_o", "vision": "cross_o"}.get(field)
                read, made_bias = read.clone(), made_bias.clone()
                if after is not None:
                    m = equal_columns(weights, n, after)
                    read[-256:] /= m[:, None]
                    made_bias[-256:] /= m
                if field in ("o", "cross_q", "cross_o"):
                    read = read * equal_columns(weights, n, field)
            assert_near(read, want, form)
            torch.testing.assert_close(made_bias, bias, rtol=1e-6, atol=1e-9)


def equal_columns(weights, n, field):
    names = [f"blocks.{n}.{part}.weight" for part in PARTS[field]]
    return equalised(square_sums(torch.cat([weights[name] for name in names])))


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.name)
def test_the_feed_forward_is_padded_with_zeros(checkpoint, weights, form):
    assert padded_ffn(MODEL) == 512
    tensors = made(Quantization(checkpoint, form))
    up, down = linear(tensors, "blocks.1.up"), linear(tensors, "blocks.1.down")
    assert (up.shape, down.shape) == ((512, 256), (256, 512))
    assert tensors["blocks.1.down.q"].dtype == form.dtype
    inner = tensors["blocks.1.inner"]
    assert torch.equal(inner[320:], torch.ones(192))
    assert_near(up[:320], weights["blocks.1.ffn.0.weight"], form)
    assert_near(down[:, :320], weights["blocks.1.ffn.2.weight"], form)
    assert not up[320:].any()
    # what is padded shares a group with the last weights, and gets of their rounding
    assert down[:, 320:].abs().max() <= (0.01 * down.abs().max() if form.rotated else 0)
    bias = tensors["blocks.1.up.bias"]
    assert torch.equal(bias[:320], weights["blocks.1.ffn.0.bias"])
    assert not bias[320:].any()


def test_all_else_keeps_its_values(checkpoint, weights):
    tensors = made(Quantization(checkpoint, E4M3))
    for name in ("patch_embedding", "patch_embedding_pose"):
        assert torch.equal(tensors[f"{name}.weight"], weights[f"{name}.weight"].flatten(1))
    assert torch.equal(tensors["head.modulation"], weights["head.modulation"][0])
    outside = [n for n in weights if not n.startswith(("blocks.", "patch_embedding", "head.mod"))]
    assert len(outside) == 20
    for name in outside:
        assert torch.equal(tensors[name].float(), weights[name])
    block = "blocks.1."
    assert torch.equal(tensors[f"{block}modulation"], weights[f"{block}modulation"][0])
    assert torch.equal(tensors[f"{block}smooth"], torch.ones(2, 256))
    assert torch.equal(tensors[f"{block}inner"], torch.ones(512))
    norms = {
        "norm_q": "self_attn.norm_q", "norm_k": "self_attn.norm_k",
        "cross_norm_q": "cross_attn.norm_q", "text_norm_k": "cross_attn.norm_k",
        "vision_norm_k": "cross_attn.norm_k_img",
    }  # fmt: skip
    for field, name in norms.items():
        assert torch.equal(tensors[block + field], weights[f"{block}{name}.weight"])
    assert torch.equal(tensors[f"{block}norm3_shift"], weights[f"{block}norm3.bias"])
    assert torch.equal(tensors[f"{block}norm3_scale"], weights[f"{block}norm3.weight"] - 1)


def test_the_order_is_that_of_use(checkpoint):
    names = list(made(Quantization(checkpoint, E4M3)))
    parts = [
        "embedding" if not name.startswith(("blocks.", "head."))
        else "head" if name.startswith("head.")
        else "context" if name.split(".")[2] in
        {"text", "vision", "cross_norm_q", "text_norm_k", "vision_norm_k"}
        else f"block {name.split('.')[1]}"
        for name in names
    ]  # fmt: skip
    assert list(dict.fromkeys(parts)) == ["embedding", "context", "block 0", "block 1", "head"]
    assert parts == sorted(parts, key=list(dict.fromkeys(parts)).index)


def test_the_room_that_is_asked_for_is_enough_and_not_much_more(checkpoint):
    needed = sum(t.nbytes for t in made(Quantization(checkpoint, E4M3)).values())
    assert needed < package_bytes(checkpoint) < 1.3 * needed


def test_a_lora_is_in_the_rows(checkpoint, weights, tmp_path):
    down, up = torch.randn(2, 256), torch.randn(256, 2)
    save_file(
        {
            "diffusion_model.blocks.0.self_attn.o.lora_down.weight": down,
            "diffusion_model.blocks.0.self_attn.o.lora_up.weight": up,
        },
        tmp_path / "lora.safetensors",
    )
    merged = Checkpoint(checkpoint.path, loras=[Lora(tmp_path / "lora.safetensors", 0.5)])
    got = linear(made(Quantization(merged, E4M3)), "blocks.0.o")
    assert_near(got, weights["blocks.0.self_attn.o.weight"] + 0.5 * up @ down, E4M3)


def test_matrices_outside_are_stored_in_two_bytes_without_loss_where_that_can_be():
    exact = torch.randn(64, 64).bfloat16().float() * 2.0**20
    assert narrow(exact).dtype == torch.bfloat16
    assert torch.equal(narrow(exact).float(), exact)
    merged = torch.randn(64, 64)
    assert narrow(merged).dtype == torch.float16
    assert ((narrow(merged).float() - merged).abs() <= merged.abs() * 2.0**-11 + 2.0**-25).all()


# --- smoothing


def outliers(width, seed):
    """Channels of which some are far larger than the rest, once in a while."""
    rms = torch.ones(width)
    rms[torch.randperm(width, generator=torch.Generator().manual_seed(seed))[:8]] = 40.0
    return Channels(absmax=4 * rms, mean_square=rms.square())


@pytest.fixture(scope="module")
def scene(checkpoint):
    """The blocks, and tokens for which some channels are large where a linear can be smoothed."""
    model = load_transformer(checkpoint, CPU)
    draw = torch.Generator().manual_seed(3)
    with torch.inference_mode():
        context = model.embed_context(
            torch.randn(9, 32, generator=draw), torch.randn(17, 48, generator=draw)
        )
    rope = rope_tables((2, 3, 4), False, CPU)
    x = torch.randn(len(rope.cos), 256, generator=draw)
    return model, context, rope, x, torch.randn(6, 256, generator=draw) * 0.3


def computed(tensors, scene, ops=None):
    """The first block, of tensors of a package."""
    _, context, rope, x, modulation = scene
    ops = ops or reference_ops()
    read = {n.removeprefix("blocks.0."): t for n, t in tensors.items()}.__getitem__
    weights = assemble(BlockWeights, read)
    with torch.inference_mode():
        keys = context_keys(ops, assemble(ContextWeights, read), context.text, context.vision)
        own = block_modulation(weights, modulation)
        return run_block(ops, weights, keys, x.clone(), own, rope)


def test_smoothing_changes_the_numbers_and_not_what_they_mean(checkpoint, scene):
    """Whatever is multiplied before a linear is divided in it: the block stays near the model."""
    model, context, rope, x, modulation = scene
    with torch.inference_mode():
        want = model.blocks[0](x, modulation, context, rope)
    linears = [name for name, module in model.named_modules() if "blocks." in name]
    widths = {name: 320 if name.endswith("ffn.2") else 256 for name in linears}
    seen = Activations({name: outliers(width, 7) for name, width in widths.items()})
    plain = made(Quantization(checkpoint, INT8R))
    smoothed = made(Quantization(checkpoint, INT8R, seen))
    for field in ("qkv", "o", "cross_q", "cross_o", "up", "down"):
        after, before = (columns(held, f"blocks.0.{field}") for held in (smoothed, plain))
        assert (after / before).nan_to_num().max() > 2  # the columns that meet outliers
    for name in ("smooth", "inner"):
        assert not torch.equal(smoothed[f"blocks.0.{name}"], plain[f"blocks.0.{name}"])
    for tensors in (plain, smoothed):
        got = computed(tensors, scene)
        assert (got - want).norm() / want.norm() < 0.03


def test_calibration_offers_e4m3_to_gpus_that_multiply_it_alone(checkpoint):
    for arch, forms in ((SM89, [INT8R, E4M3]), (SM86, [INT8R])):
        assert Quantization(checkpoint, INT8R, Activations({}), arch.codes).allowed == forms
        assert Quantization(checkpoint, INT8R, None, arch.codes).allowed == [INT8R]


def columns(tensors, name):
    """The norms of the columns as they are stored, rotated back."""
    return rotate(Rows(tensors[f"{name}.q"], tensors[f"{name}.s"]).dequantize()).norm(dim=0)


def test_columns_are_stored_with_one_norm(checkpoint):
    tensors = made(Quantization(checkpoint, INT8R))
    for field in ("o", "cross_q", "cross_o", "up", "down"):
        live = 320 if field == "down" else 256
        sizes = columns(tensors, f"blocks.0.{field}")[:live]
        assert sizes.max() / sizes.min() < 1.05, field


def test_multipliers_of_columns_are_their_sizes_and_bounded():
    weight = torch.randn(300, 8, generator=torch.Generator().manual_seed(0))
    weight /= weight.norm(dim=0)
    weight *= torch.tensor([1.0, 2.0, 1.0, 0.0, 1e-30, 1e20, 1.0, 0.5])
    m = equalised(square_sums(weight))
    want = torch.tensor([1.0, 2.0, 1.0, 1.0, 1 / BOUND, BOUND, 1.0, 0.5])
    torch.testing.assert_close(m, want)
    assert torch.equal(equalised(square_sums(torch.zeros(3, 4))), torch.ones(4))
    torch.testing.assert_close(equalised(square_sums(weight * 1e-12)), want)


def test_what_is_multiplied_into_values_reaches_their_bias_too(checkpoint, weights, scene):
    model = scene[0]
    names = [name for name, _ in model.named_modules() if "blocks." in name]
    seen = {n: outliers(320 if n.endswith("ffn.2") else 256, 1) for n in names}
    tensors = made(Quantization(checkpoint, INT8R, Activations(seen)))
    for field, parts in {"qkv": "self_attn.v", "text": "cross_attn.v"}.items():
        bias = weights[f"blocks.0.{parts}.bias"]
        factor = tensors[f"blocks.0.{field}.bias"][-256:] / bias
        rows = linear(tensors, f"blocks.0.{field}")[-256:]
        want = weights[f"blocks.0.{parts}.weight"] * factor[:, None]
        assert factor.max() / factor.min() > 4  # outliers of what comes after were smoothed
        # columns that smoothing made small are rounded in steps of the large ones
        assert (rows - want).norm() / want.norm() < 0.04
