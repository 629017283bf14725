"""Norm, rotation, split and quantisation of q, k and v: the kernels against their definition."""

import re
from itertools import chain

import pytest
import torch
import torch.nn.functional as F

from engine.config import TINY as TINY_MODEL
from engine.models.attention import sdpa
from engine.models.dit import Rope, SelfAttention, rope_tables
from kernels.aot.sass import disassemble
from kernels.arch import SM90
from kernels.fp8 import LIMITS
from kernels.fp8 import TINY as SMALLEST_PEAK
from kernels.layout import (
    HEAD,
    KEY_GROUP,
    KEY_ORDER,
    LOGIT_SCALE,
    V_LIMIT_FP16,
    mix,
    padded_keys,
)
from kernels.rope import (
    RMS_INVERSE,
    ROPE,
    rms_inverse,
    rms_inverse_reference,
    rope,
    rope_reference,
    rotate_in_place,
    rotated_heads,
)
from kernels.spec import KernelError
from tests.support.codes import assert_same_codes
from tests.support.compiled import compiled, each_arch
from tests.support.interpreter import InterpretedBank

BANK = InterpretedBank(SM90)
E4M3, INT8 = torch.float8_e4m3fn, torch.int8
DIM = 256  # two heads

dtypes = pytest.mark.parametrize("dtype", LIMITS, ids=["e4m3", "int8"])


def tables(tokens):
    """Returns cos and sin of places in all regions of a small clip: reference, video, skeleton."""
    rope = rope_tables((4, 8, 8), with_pose=True, device=torch.device("cpu"))
    at = torch.linspace(0, len(rope.cos) - 1, tokens).long()
    return rope.cos[at, 0].contiguous(), rope.sin[at, 0].contiguous()


def inputs(tokens, dim=DIM, seed=0):
    """Draws k with a bias on some channels, v with channels of very different sizes."""
    generator = torch.manual_seed(seed)
    qkv = torch.randn(tokens, 3 * dim, generator=generator)
    qkv[:, dim : 2 * dim] += 6 * (torch.rand(dim, generator=generator) > 0.9)
    qkv[:, 2 * dim :] *= torch.exp2(torch.randint(-8, 8, (dim,), generator=generator))
    norm_q, norm_k = 1 + 0.3 * torch.randn(2, dim, generator=generator)
    return qkv.bfloat16(), norm_q, norm_k, *tables(tokens)


def assert_same(got, want):
    assert got.tokens == want.tokens
    for name in ("qs", "ks", "vs"):
        torch.testing.assert_close(getattr(got, name), getattr(want, name), rtol=1e-5, atol=0)
    for name in ("q", "k", "vt"):
        assert_same_codes(getattr(got, name), getattr(want, name))


@dtypes
@pytest.mark.parametrize("tokens", [1, 63, 64, 65, 129, 257])
def test_rope_equals_its_reference(tokens, dtype):
    given = inputs(tokens)
    assert_same(rope(BANK, *given, dtype), rope_reference(*given, dtype))


@pytest.mark.parametrize("dim", [128, 1536, 5120])
def test_every_head_has_its_place(dim):
    """There is one head; 12, which 8 does not divide; the 40 of the model."""
    given = inputs(2, dim)
    assert_same(rope(BANK, *given), rope_reference(*given))


def test_statistics_span_more_blocks_than_are_added_at_once():
    given = inputs(70)
    want = rope_reference(*given)
    for rows in (1, 2, 64):
        assert_same(rope(InterpretedBank(SM90, ROWS=rows), *given), want)


def test_values_can_be_kept_small_for_sums_in_fp16():
    given = inputs(70)
    got = rope(BANK, *given, v_limit=V_LIMIT_FP16)
    assert_same(got, rope_reference(*given, v_limit=V_LIMIT_FP16))
    assert got.vt.float().abs().max() == V_LIMIT_FP16


def test_values_can_be_int8_too():
    given = inputs(70)
    got = rope(BANK, *given, v_limit=LIMITS[INT8], v_dtype=INT8)
    assert_same(got, rope_reference(*given, v_limit=LIMITS[INT8], v_dtype=INT8))
    assert got.vt.dtype == INT8
    assert got.vt.abs().max() == LIMITS[INT8]


def test_the_definition_is_what_the_model_computes():
    qkv, norm_q, norm_k, cos, sin = inputs(40)
    model = SelfAttention(TINY_MODEL, sdpa)
    q_part, k_part, v_part = qkv.float().chunk(3, dim=1)
    with torch.no_grad():
        model.norm_q.weight.copy_(norm_q)
        model.norm_k.weight.copy_(norm_k)
        for projection in (model.q, model.k):
            projection.weight.copy_(torch.eye(DIM))
            projection.bias.zero_()
        rotation = Rope(cos[:, None], sin[:, None])
        want_q, _ = model.rotated_queries_and_keys(q_part, rotation)
        _, want_k = model.rotated_queries_and_keys(k_part, rotation)
    q, k, v = rotated_heads(qkv, norm_q, norm_k, cos, sin)
    torch.testing.assert_close(q, want_q, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(k, want_k, rtol=1e-5, atol=1e-5)
    assert torch.equal(v.flatten(1), v_part)


@pytest.mark.parametrize(("tokens", "at_once"), [(40, 1024), (40, 16), (33, 8), (1, 4)])
def test_rotating_in_place_gives_the_heads_in_the_memory_of_what_they_were_made_of(tokens, at_once):
    qkv, norm_q, norm_k, cos, sin = inputs(tokens)
    wanted = [side.bfloat16() for side in rotated_heads(qkv, norm_q, norm_k, cos, sin)]
    before = qkv.data_ptr()
    made = rotate_in_place(qkv, norm_q, norm_k, cos, sin, at_once)
    for got, want in zip(made, wanted, strict=True):
        torch.testing.assert_close(got, want)
        assert before <= got.data_ptr() < before + qkv.nbytes


def attention_error(qkv8, want):
    """Returns the mean relative error over channels, whose sizes differ widely."""
    q, k, v = (side.double() for side in qkv8.dequantize())  # mixed, both or none
    weights = torch.exp2(q @ k.mT)  # in the units of q; softmax does not see the mean of k
    got = weights @ v / weights.sum(dim=-1, keepdim=True)
    return ((got - want).norm(dim=1) / want.norm(dim=1)).mean().item()


@dtypes
def test_attention_on_the_codes_is_attention(dtype):
    given = inputs(257)
    q, k, v = (side.transpose(0, 1).double() for side in rotated_heads(*given))
    want = F.scaled_dot_product_attention(q, k, v)
    error = attention_error(rope(BANK, *given, dtype), want)
    assert error < {INT8: 0.04, E4M3: 0.05}[dtype]
    assert error < 1.01 * attention_error(rope_reference(*given, dtype), want)


@dtypes
def test_codes_lie_within_half_a_step_of_the_exact_values(dtype):
    given = inputs(150)
    got = rope(BANK, *given, dtype)
    q, k, v = (side.transpose(0, 1).double() for side in rotated_heads(*given))
    exact = {"q": q * LOGIT_SCALE, "k": k - k.mean(dim=1, keepdim=True), "v": v}
    if dtype == INT8:
        exact |= {"q": mix(exact["q"]), "k": mix(exact["k"])}
    scales = {
        "q": got.qs.repeat_interleave(128, dim=1)[:, :150, None],
        "k": got.ks.repeat_interleave(64, dim=1)[:, :150, None],
        "v": got.vs[:, None],
    }
    for (name, want), dequantized in zip(exact.items(), got.dequantize()):
        s = scales[name].double()
        relative = dtype == E4M3 or name == "v"
        half = torch.maximum(want.abs() / 16, s * 2**-10) if relative else s / 2
        assert ((dequantized - want).abs() / half).max() < 1.01, name


def test_each_value_lies_where_its_key_belongs():
    """E4M3 holds these values exactly, and they all differ within a group of keys."""
    tokens = 40
    qkv, *rest = inputs(tokens)
    exact = torch.arange(1, 127, dtype=torch.uint8).view(E4M3)  # 2^-9 .. 448
    values = exact[(7 * torch.arange(tokens)[:, None] + torch.arange(DIM)) % 126].float()
    values[0] = 448
    qkv[:, 2 * DIM :] = values
    got = rope(BANK, qkv, *rest)
    torch.testing.assert_close(got.vs, torch.ones(2, HEAD))
    for place in range(padded_keys(tokens)):
        key = place // KEY_GROUP * KEY_GROUP + KEY_ORDER[place % KEY_GROUP]
        want = values[key].view(2, HEAD) if key < tokens else torch.zeros(2, HEAD)
        assert torch.equal(got.vt[:, :, place].float(), want)


def test_tokens_that_are_all_alike_have_keys_of_nothing():
    """Only the difference between keys counts, and there is none."""
    qkv, norm_q, norm_k, cos, sin = inputs(70)
    qkv[:], cos[:], sin[:] = qkv[:1].clone(), cos[:1].clone(), sin[:1].clone()
    got = rope(BANK, qkv, norm_q, norm_k, cos, sin)
    assert got.dequantize()[1].abs().max() < 1e-5
    assert got.k[:, 70:].abs().max() == 0


@dtypes
def test_zeros_stay_zeros(dtype):
    _, *rest = inputs(65)
    got = rope(BANK, torch.zeros(65, 3 * DIM).bfloat16(), *rest, dtype)
    for codes in (got.q, got.k, got.vt):
        assert codes.float().abs().max() == 0
    limit = LIMITS[dtype]
    torch.testing.assert_close(got.ks, torch.full_like(got.ks, SMALLEST_PEAK / limit))
    torch.testing.assert_close(got.qs, torch.full_like(got.qs, SMALLEST_PEAK / limit * LOGIT_SCALE))
    torch.testing.assert_close(got.vs, torch.full_like(got.vs, SMALLEST_PEAK / 448))


@dtypes
def test_a_token_a_thousand_times_larger_is_made_equal_by_the_norm(dtype):
    qkv, *rest = inputs(65)
    qkv[10] *= 1024
    got, want = rope(BANK, qkv, *rest, dtype), rope_reference(qkv, *rest, dtype)
    assert_same(got, want)
    usual = rope_reference(*inputs(65), dtype)
    torch.testing.assert_close(got.qs, usual.qs, rtol=0.01, atol=0)


# --- 1 / rms

WIDTHS = [(1, 256, 3, 2), (33, 384, 1, 1), (5, 5120, 1, 1), (2, 5120, 3, 2), (7, 256, 2, 2)]


@pytest.mark.parametrize(("tokens", "dim", "parts", "count"), WIDTHS)
def test_rms_inverse_equals_its_reference(tokens, dim, parts, count):
    generator = torch.manual_seed(tokens)
    sizes = torch.exp2(torch.randint(-30, 30, (tokens, 1), generator=generator))
    x = (torch.randn(tokens, parts * dim, generator=generator) * sizes).bfloat16()
    got = rms_inverse(BANK, x, dim, count)
    torch.testing.assert_close(got, rms_inverse_reference(x, dim, count), rtol=1e-5, atol=0)


def test_the_inverse_of_zeros_is_finite():
    got = rms_inverse(BANK, torch.zeros(3, 256).bfloat16(), 256, 1)
    torch.testing.assert_close(got, torch.full((1, 3), 1000.0))


# --- launches that are mistakes

QKV, NORM, _, COS, SIN = inputs(5)
X = QKV[:, :DIM].contiguous()
MISTAKES = {
    "qkv of fp32": (lambda: rope(BANK, QKV.float(), NORM, NORM, COS, SIN), "found torch.float32"),
    "half a head": (lambda: rope(BANK, QKV[:, :192], NORM, NORM, COS, SIN), r"found .* \[5, 192\]"),
    "no tokens": (
        lambda: rope(BANK, QKV[:0], NORM, NORM, COS[:0], SIN[:0]),
        r"found .* \[0, 768\]",
    ),
    "a short norm": (
        lambda: rope(BANK, QKV, NORM, NORM[:128], COS, SIN),
        r"norm_k: expected .* \[256\]",
    ),
    "a norm of bf16": (
        lambda: rope(BANK, QKV, NORM.bfloat16(), NORM, COS, SIN),
        "norm_q: expected .*, found torch.bfloat16",
    ),
    "tables of a head": (
        lambda: rope(BANK, QKV, NORM, NORM, COS[:, None], SIN[:, None]),
        r"cos: expected .* \[5, 64\], found .* \[5, 1, 64\]",
    ),
    "a short table": (
        lambda: rope(BANK, QKV, NORM, NORM, COS, SIN[:4]),
        r"sin: expected .* \[5, 64\]",
    ),
    "codes of fp16": (
        lambda: rope(BANK, QKV, NORM, NORM, COS, SIN, torch.half),
        "not torch.float16",
    ),
    "a row of other width": (
        lambda: rms_inverse(BANK, X, 192, 1),
        r"a multiple of 192, found .* \[5, 256\]",
    ),
    "more slices than a row has": (
        lambda: rms_inverse(BANK, X, 128, 3),
        "expected 1 to 2 slices, found 3",
    ),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_wrong_launch_is_refused_by_name(name):
    launch, message = MISTAKES[name]
    with pytest.raises(KernelError, match=message):
        launch()


# --- compiled

SPECS = {spec.name: spec for spec in (RMS_INVERSE, *chain.from_iterable(ROPE.values()))}


@each_arch
def test_all_kernels_compile_and_move_at_least_four_bytes_at_once(arch, tmp_path):
    for made in compiled(*((spec, arch) for spec in SPECS.values() if arch in spec.tuning)):
        assert made.registers <= 128, made.name
        path = tmp_path / f"{made.name}.cubin"
        path.write_bytes(made.data)
        assert re.findall(r"(?:LDG|STG)\S*\.[US](?:8|16)\b", disassemble(path)) == [], made.name
