"""Cross attention equals its definition and the model's, and its machine code passes its proofs."""

import math
from dataclasses import replace

import pytest
import torch

from engine.models.attention import sdpa
from engine.models.dit import EPS, split_heads
from kernels.arch import SM89, SM90, SM120
from kernels.cross_attention import (
    CROSS_ATTENTION,
    KEY_TILE,
    cross_attention,
    cross_attention_reference,
    cross_keys,
)
from kernels.layout import HEAD
from kernels.spec import KernelError
from tests.support.compiled import compiled, each_arch
from tests.support.interpreter import InterpretedBank

WIDTH = 2 * HEAD


def context(rows, repeats=1, seed=0, size=1.0):
    generator = torch.manual_seed(seed)
    k, v = torch.randn(2, rows, WIDTH, generator=generator)
    weight = torch.rand(WIDTH, generator=generator) + 0.5
    return cross_keys(size * k, v, weight, repeats)


def queries(tokens, seed=9):
    q = 3 * torch.randn(tokens, WIDTH, generator=torch.manual_seed(seed)).bfloat16()
    return q, rms_inverse(q)


def rms_inverse(q):
    return torch.rsqrt(q.float().square().mean(dim=-1) + EPS)


def relative_error(got, want):
    return ((got.double() - want.double()).norm() / want.double().norm()).item()


def assert_near(got, want):
    """The weights, the text's part and the sum are rounded to BF16, by 2e-3 each."""
    assert got.dtype == torch.bfloat16 and got.shape == want.shape
    assert relative_error(got, want) < 4e-3
    torch.testing.assert_close(got.float(), want, rtol=2**-6, atol=2**-6)


@pytest.mark.parametrize("tokens", [1, 77, 129])  # one token, odd, just past a tile
@pytest.mark.parametrize(("rows", "repeats"), [(1, 512), (64, 449), (65, 1)])
@pytest.mark.parametrize("arch", [SM90, SM120], ids=lambda arch: arch.name)  # the two tiles
def test_cross_attention_equals_its_reference(arch, tokens, rows, repeats):
    q, rms_inv = queries(tokens)
    text, vision = context(rows, repeats), context(100, seed=1)
    got = cross_attention(InterpretedBank(arch), q, rms_inv, text, vision)
    assert_near(got, cross_attention_reference(q, rms_inv, text, vision))


def test_it_is_the_models_cross_attention_over_all_rows_of_text_and_picture():
    """Text has 512 rows, of which 30 differ; each softmax is that of engine/models/dit.py."""
    generator = torch.manual_seed(3)
    q = queries(70)[0]
    weight = torch.rand(WIDTH, generator=generator) + 0.5
    text, vision = (torch.randn(2, rows, WIDTH, generator=generator) for rows in (512, 257))
    text[:, 31:] = text[:, 30:31]  # padding
    normed = torch.nn.functional.rms_norm(q.float(), (WIDTH,), weight, EPS)
    want = sum(
        sdpa(split_heads(normed), split_heads(k), split_heads(v)).flatten(1)
        for k, v in (text, vision)
    )
    merged = cross_keys(*text[:, :31], weight, repeats=482)
    keys = merged, cross_keys(*vision, weight)
    got = cross_attention(InterpretedBank(SM89), q, rms_inverse(q), *keys)
    assert relative_error(cross_attention_reference(q, rms_inverse(q), *keys), want) < 4e-3
    assert relative_error(got, want) < 5e-3


def test_a_row_that_repeats_counts_as_often():
    generator = torch.manual_seed(4)
    k, v = torch.randn(2, 20, WIDTH, generator=generator)
    weight = torch.ones(WIDTH)
    spelt_out = torch.cat([torch.arange(20), torch.full((99,), 19)])
    vision = context(10)
    q, rms_inv = queries(33)
    merged = cross_attention_reference(q, rms_inv, cross_keys(k, v, weight, 100), vision)
    want = cross_attention_reference(
        q, rms_inv, cross_keys(k[spelt_out], v[spelt_out], weight), vision
    )
    assert relative_error(merged, want) < 1e-6


def test_text_and_picture_each_have_a_softmax():
    """The sum of two means of ones is two, whatever the logits are."""
    q, rms_inv = queries(40)
    text, vision = context(9, size=5.0), context(70, seed=1, size=5.0)
    ones = (replace(keys, v=torch.ones_like(keys.v)) for keys in (text, vision))
    got = cross_attention(InterpretedBank(SM120), q, rms_inv, *ones)
    assert (got.float() - 2).abs().max() < 2**-6


def test_logits_that_single_out_one_key_stay_finite():
    q, rms_inv = queries(30)
    text, vision = context(40, 400, size=100.0), context(257, seed=1, size=100.0)
    got = cross_attention(InterpretedBank(SM90), q, rms_inv, text, vision)
    assert got.isfinite().all()
    assert relative_error(got, cross_attention_reference(q, rms_inv, text, vision)) < 4e-3


def test_queries_of_zero_see_the_mean_of_each_context():
    text, vision = context(3), context(5, seed=1)
    q = torch.zeros(2, WIDTH).bfloat16()
    got = cross_attention(InterpretedBank(SM90), q, rms_inverse(q), text, vision)
    want = text.v[:3].float().mean(dim=0) + vision.v[:5].float().mean(dim=0)
    assert relative_error(got, want.expand(2, -1)) < 4e-3


# --- keys


def test_padding_of_a_tile_has_no_weight_and_a_merged_row_many():
    keys = context(KEY_TILE + 1, repeats=8)
    assert len(keys.k) == len(keys.v) == len(keys.bias) == 2 * KEY_TILE
    assert keys.bias.tolist() == [0.0] * KEY_TILE + [3.0] + [-math.inf] * (KEY_TILE - 1)


@pytest.mark.parametrize(
    ("k_shape", "v_shape", "repeats", "message"),
    [
        ((0, WIDTH), (0, WIDTH), 1, r"k: expected .* \[L, D\], .* found torch.float32 \[0, 256\]"),
        ((4, WIDTH), (5, WIDTH), 1, r"v: expected .* \[4, 256\], found torch.float32 \[5, 256\]"),
        ((4, 100), (4, 100), 1, r"k: expected .* D a multiple of 128, found .* \[4, 100\]"),
        ((4, WIDTH), (4, WIDTH), 0, "repeats: expected 1 or more, found 0"),
    ],
)
def test_keys_that_cannot_be_cached_are_refused(k_shape, v_shape, repeats, message):
    with pytest.raises(KernelError, match=f"cross_keys, {message}"):
        cross_keys(torch.zeros(k_shape), torch.zeros(v_shape), torch.ones(k_shape[1]), repeats)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": torch.zeros(5, WIDTH)}, "q: expected torch.bfloat16"),
        ({"q": torch.zeros(0, WIDTH).bfloat16()}, r"q: expected .*, found .* \[0, 256\]"),
        ({"q": torch.zeros(5, 100).bfloat16()}, "q: expected .* D a multiple of 128"),
        ({"rms_inv": torch.zeros(4)}, r"rms_inv: expected torch.float32 \[5\]"),
        ({"rms_inv": torch.zeros(5).double()}, "rms_inv: expected .*, found torch.float64"),
        ({"text": replace(context(3), bias=torch.zeros(3))}, r"bias of text: expected .* \[64\]"),
        (
            {"text": replace(context(3), v=torch.zeros(128, WIDTH).bfloat16())},
            r"v of text: expected torch.bfloat16 \[64, 256\]",
        ),
        (
            {"vision": replace(context(3), k=torch.zeros(60, WIDTH).bfloat16())},
            r"k of vision: expected torch.bfloat16 \[P, 256\], P a multiple of 64",
        ),
    ],
)
def test_operands_of_another_layout_are_refused(change, message):
    q, rms_inv = queries(5)
    right = {"q": q, "rms_inv": rms_inv, "text": context(3), "vision": context(4)}
    with pytest.raises(KernelError, match=message):
        cross_attention(InterpretedBank(SM89), **right | change)


@each_arch
def test_cross_attention_passes_its_proofs(arch):
    (made,) = compiled((CROSS_ATTENTION, arch))
    assert made.registers <= 255
    assert made.shared_bytes <= arch.shared_bytes
