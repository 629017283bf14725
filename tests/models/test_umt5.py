"""The text encoder against the library whose parameter names it has."""

import pytest
import torch

from engine.models.umt5 import EncoderShape, Stack, buckets, gelu

CPU = torch.device("cpu")
SHAPE = EncoderShape(width=64, heads=3, inner=96, hidden=160, blocks=3, buckets=32)


def oracle():
    from transformers import UMT5Config, UMT5EncoderModel

    config = UMT5Config(
        vocab_size=50,
        d_model=SHAPE.width,
        d_kv=SHAPE.inner // SHAPE.heads,
        d_ff=SHAPE.hidden,
        num_layers=SHAPE.blocks,
        num_heads=SHAPE.heads,
        feed_forward_proj="gated-gelu",
        is_encoder_decoder=False,
    )
    model = UMT5EncoderModel(config).eval()
    model.set_attn_implementation("eager")
    draw = torch.Generator().manual_seed(11)
    for name, parameter in model.named_parameters():
        parameter.data = torch.randn(parameter.shape, generator=draw) * 0.1 + ("norm" in name)
    return model.encoder


def filled(weights):
    stack = Stack(SHAPE).eval()
    kept = {name: weight for name, weight in weights.items() if not name.startswith("embed_")}
    stack.load_state_dict(kept, strict=True, assign=True)
    return stack


# Both compute the same steps in the same order; libraries may still sum in another one.
NEAR = {torch.float32: 2e-5, torch.bfloat16: 2e-2}


@pytest.mark.parametrize("dtype", NEAR)
@pytest.mark.parametrize("length", [1, 9, 200])
def test_the_encoder_is_that_of_the_library_in_both_precisions(dtype, length):
    model = oracle().to(dtype)
    rows = torch.randn(length, SHAPE.width, generator=torch.Generator().manual_seed(length))
    with torch.inference_mode():
        want = model(inputs_embeds=rows[None].to(dtype)).last_hidden_state[0].float()
        got = filled(model.state_dict())(rows.to(dtype))
    assert got.dtype == dtype
    assert (got.float() - want).norm() / want.norm() < NEAR[dtype]


@pytest.mark.parametrize("count", [16, 32, 64])
def test_distances_share_buckets_as_in_the_library(count):
    attention = oracle().block[0].layer[0].SelfAttention
    attention.relative_attention_num_buckets = count
    places = torch.arange(513)
    want = attention._relative_position_bucket(places[None] - places[:, None])
    got = buckets(513, count, CPU)
    assert torch.equal(got, want)
    assert got.unique().tolist() == [n for n in range(count) if n != count // 2]  # -0 is no sign


def test_the_tables_of_distances_count():
    weights = oracle().state_dict()
    rows = torch.randn(20, SHAPE.width, generator=torch.Generator().manual_seed(2))
    name = "block.1.layer.0.SelfAttention.relative_attention_bias.weight"
    changed = {**weights, name: torch.zeros_like(weights[name])}
    with torch.inference_mode():
        got, without = filled(weights)(rows), filled(changed)(rows)
    assert (got - without).norm() / got.norm() > 1e-4


def test_the_gate_is_the_tanh_form_of_gelu():
    x = torch.linspace(-6, 6, 101)
    torch.testing.assert_close(gelu(x), torch.nn.functional.gelu(x, approximate="tanh"))
    assert gelu(x.bfloat16()).dtype == torch.bfloat16
