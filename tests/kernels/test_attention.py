"""Self attention equals its definition in every variant, at odd lengths and with hard values; its
machine code holds what was asked of it. How exact the 8-bit forms are: test_attention_accuracy.py.
"""

from dataclasses import replace

import pytest
import torch

from kernels import layout
from kernels.arch import ARCHS, SM89, SM90, SM120
from kernels.attention import (
    ATTENTION,
    CODES,
    FORMS,
    attention,
    attention_reference,
    formats,
    variant_reference,
    variants,
)
from kernels.fp8 import E4M3_MAX, LIMITS, rotate
from kernels.layout import (
    HEAD,
    KEY_GROUP,
    KEY_ORDER,
    LOGIT_SCALE,
    V_LIMIT_FP16,
    mix,
    padded_keys,
    permute_keys,
    quantize_qkv,
    unpermute_keys,
)
from kernels.spec import KernelError
from tests.support.compiled import compiled
from tests.support.interpreter import InterpretedBank, different_archs

VARIANTS = [
    pytest.param(spec, arch, id=f"{name}-{arch.name}")
    for name, spec in ATTENTION.items()
    for arch in spec.tuning
]
DIFFERENT = [
    pytest.param(spec, arch, id=f"{name}-{arch.name}")
    for name, spec in ATTENTION.items()
    for arch in different_archs(spec)
]
EVERY_WAY_TO_SUM = [
    pytest.param(ATTENTION[name], arch, id=name)
    for name, arch in (
        ("i8_fp8_f16_wide", SM89), ("i8_fp8_f32", SM90), ("i8_mx", SM120), ("i8_i8", SM90)
    )
]  # fmt: skip


def inputs(tokens, heads=1, seed=0):
    """Draws keys with a strong mean, and values of different size in each channel."""
    generator = torch.manual_seed(seed)
    q, k, v = torch.randn(3, tokens, heads, HEAD, generator=generator)
    k += 2 * torch.randn(1, heads, HEAD, generator=generator)
    return q, k, v * torch.exp(torch.randn(1, heads, HEAD, generator=generator))


def quantized(spec, q, k, v):
    dtype, v_dtype, v_limit = formats(spec)
    return quantize_qkv(q, k, v, dtype, v_limit, v_dtype)


def run(spec, arch, qkv, **blocks):
    """Returns what the kernel makes and what it should, in the BF16 that it stores."""
    bank = InterpretedBank(arch, **blocks)
    want = variant_reference(spec, bank.tuning(spec), qkv)
    return attention(bank, spec, qkv), want.bfloat16()


def relative_error(got, want):
    return ((got.double() - want.double()).norm() / want.double().norm()).item()


def assert_same(spec, got, want):
    """Both have the same BF16 but where the sums' last bits tip one over, by 2^-8 of it. The
    interpreter rounds a sum in FP16 once a tile, a tensor core after each 32 keys.
    """
    assert got.dtype == torch.bfloat16 and got.shape == want.shape
    assert relative_error(got, want) < (2e-3 if spec.constants["SUM"] == "fp16" else 5e-4)


# --- layout


def test_values_come_back_in_the_order_of_their_keys():
    vt = torch.arange(96.0).reshape(2, 3 * KEY_GROUP)
    assert torch.equal(unpermute_keys(permute_keys(vt)), vt)
    assert permute_keys(vt)[1, KEY_GROUP : 2 * KEY_GROUP].tolist() == [
        48 + KEY_GROUP + key for key in KEY_ORDER
    ]


@pytest.mark.parametrize("tokens", [1, 64, 77, 128, 129])
@pytest.mark.parametrize("dtype", LIMITS)
def test_quantised_operands_are_near_and_their_padding_is_zero(dtype, tokens):
    q, k, v = inputs(tokens, heads=2)
    qkv = quantize_qkv(q, k, v, dtype, v_dtype=dtype)
    got = qkv.dequantize()
    want = (q * LOGIT_SCALE, k - k.mean(dim=0), v)
    for name, mine, exact in zip("qkv", got, want):
        exact = exact.transpose(0, 1)
        if dtype == torch.int8 and name != "v":
            exact = mix(exact)
        error = (mine - exact).norm()
        assert error <= 0.03 * exact.norm() + 1e-5
    assert qkv.k.shape[1] == qkv.vt.shape[2] == padded_keys(tokens)
    assert not qkv.k[:, tokens:].float().any()
    assert not unpermute_keys(qkv.vt)[:, :, tokens:].float().any()


def test_quantisation_does_not_see_what_all_keys_have_in_common():
    q, k, v = inputs(200)
    plain = quantize_qkv(q, k, v)
    moved = quantize_qkv(q, k + 50 * torch.randn(1, 1, HEAD), v)
    assert (plain.k.int() - moved.k.int()).abs().max() <= 1
    assert (plain.k != moved.k).float().mean() < 0.01


def test_mixing_keeps_products_and_is_its_own_inverse():
    q, k = torch.randn(2, 5, HEAD, dtype=torch.float64)
    torch.testing.assert_close(mix(q) @ mix(k).T, q @ k.T)
    torch.testing.assert_close(mix(mix(q)), q)
    matrix = mix(torch.eye(HEAD, dtype=torch.float64))
    one = rotate(torch.eye(256, dtype=torch.float64))[:64, :64] * -2  # by its first base-4 digit
    assert torch.equal(matrix[:64, :64], one)
    assert torch.equal(matrix[64:, 64:], one)
    assert not matrix[:64, 64:].any() and not matrix[64:, :64].any()


def test_a_channel_that_stands_out_costs_the_others_few_steps(monkeypatch):
    """Without mixing the steps of its block would be as large as that channel wants them."""
    q, k, v = inputs(256)
    k[:, :, 5] *= 30
    q[:, :, 5] /= 30
    want = q[:, 0].double() @ (k[:, 0] - k[:, 0].mean(dim=0)).double().T * LOGIT_SCALE

    def error():
        q8, k8, _ = quantize_qkv(q, k, v).dequantize()
        return (q8[0].double() @ k8[0].double().T - want).norm() / want.norm()

    mixed = error()
    monkeypatch.setattr(layout, "mix", lambda x: x)
    assert mixed < 0.05 and 3 * mixed < error()


# --- the kernel


@pytest.mark.parametrize("tokens", [1, 77, 129])  # one token, odd, just past a tile
@pytest.mark.parametrize(("spec", "arch"), DIFFERENT)
def test_attention_equals_its_reference(spec, arch, tokens):
    qkv = quantized(spec, *inputs(tokens, heads=2 if tokens == 77 else 1))
    assert_same(spec, *run(spec, arch, qkv))


@pytest.mark.parametrize(("spec", "arch"), EVERY_WAY_TO_SUM)
@pytest.mark.parametrize(("queries", "keys", "tiles"), [(64, 64, 1), (128, 32, 2), (64, 32, 1)])
def test_every_tile_reads_the_scales_of_its_own_blocks(spec, arch, queries, keys, tiles):
    q, k, v = inputs(150)
    q[128:] *= 7  # blocks of very different scales
    k[64:128] *= 5
    blocks = {"BLOCK_Q": queries, "BLOCK_KEYS": keys, "TILES": tiles}
    assert_same(spec, *run(spec, arch, quantized(spec, q, k, v), **blocks))


@pytest.mark.parametrize(("spec", "arch"), EVERY_WAY_TO_SUM)
def test_logits_that_single_out_one_key_stay_finite(spec, arch):
    q, k, v = inputs(140)
    qkv = quantized(spec, 60 * q, 3 * k, v)
    got, want = run(spec, arch, qkv)
    assert got.isfinite().all()
    assert_same(spec, got, want)


@pytest.mark.parametrize(("spec", "arch"), EVERY_WAY_TO_SUM)
def test_a_maximum_that_rises_with_every_tile_takes_the_earlier_sums_along(spec, arch):
    q, k, v = inputs(300)
    direction = torch.randn(HEAD)
    q[:] = direction
    k = k * 0.1 + torch.linspace(-2, 2, 300)[:, None, None] * direction
    assert_same(spec, *run(spec, arch, quantized(spec, q, k, v)))


@pytest.mark.parametrize(("spec", "arch"), EVERY_WAY_TO_SUM)
def test_tiles_far_below_the_maximum_neither_count_nor_overflow(spec, arch):
    """Their weights are 2^-100 of the largest and less, which comes first for half of the queries
    and last for the others.
    """
    q, k, v = inputs(300)
    direction = torch.randn(HEAD)
    q[:] = 5 * direction
    q[::2] *= -1
    k = k * 0.1 + torch.linspace(2, -2, 300)[:, None, None] * direction
    got, want = run(spec, arch, quantized(spec, q, k, v))
    assert got.isfinite().all()
    assert_same(spec, got, want)
    exact = attention_reference(q, k, v)
    assert torch.cosine_similarity(got.float(), exact).mean() > 0.9


@pytest.mark.parametrize(("spec", "arch"), EVERY_WAY_TO_SUM)
def test_equal_keys_give_the_mean_of_the_values(spec, arch):
    """These are the largest sums that FP16 meets: every weight and every value at its limit."""
    q, k, v = inputs(256)
    k[:] = k[0]
    v[:] = v[0].abs()
    got, _ = run(spec, arch, quantized(spec, q, k, v))
    assert relative_error(got, v.flatten(1).expand(256, -1)) < 2**-8


@pytest.mark.parametrize(("spec", "arch"), EVERY_WAY_TO_SUM)
def test_zeros_give_zeros(spec, arch):
    got, _ = run(spec, arch, quantized(spec, *torch.zeros(3, 65, 1, HEAD)))
    assert not got.any()


def test_a_token_alone_sees_itself():
    q, k, v = inputs(1, heads=3)
    spec = ATTENTION["fp8_mx"]
    got, _ = run(spec, SM120, quantized(spec, q, k, v))
    assert torch.equal(got, v.flatten(1).bfloat16())


def test_the_reference_is_torchs_attention():
    q, k, v = inputs(90, heads=2)
    heads_first = (side.transpose(0, 1) for side in (q, k, v))
    want = torch.nn.functional.scaled_dot_product_attention(*heads_first)
    assert relative_error(attention_reference(q, k, v), want.transpose(0, 1).flatten(1)) < 1e-6


# --- the variants


@pytest.mark.parametrize("arch", ARCHS, ids=lambda arch: arch.name)
@pytest.mark.parametrize("form", FORMS)
def test_every_form_whose_codes_an_architecture_multiplies_has_a_variant(form, arch):
    specs = variants(form, arch)
    assert bool(specs) == all(CODES[dtype] in arch.codes for dtype in FORMS[form])
    assert {formats(spec)[:2] for spec in specs} <= {FORMS[form]}
    assert all(spec.tuning[arch].toolkit in arch.toolkits for spec in specs)


@pytest.mark.parametrize("arch", ARCHS, ids=lambda arch: arch.name)
def test_the_default_form_of_an_architecture_is_one_that_it_has(arch):
    assert variants(arch.attention, arch)
    assert (arch.attention == "int8fp8") == ("fp8e4nv" in arch.codes)


@pytest.mark.parametrize("form", FORMS)
def test_an_rtx_4090_has_a_variant_of_its_oldest_toolkit(form):
    assert "12.6" in {spec.tuning[SM89].toolkit for spec in variants(form, SM89)}


@pytest.mark.parametrize(("spec", "arch"), VARIANTS)
def test_sums_in_fp16_cannot_overflow(spec, arch):
    *_, v_limit = formats(spec)
    if spec.constants["SUM"] == "fp16":
        blocks = spec.tuning[arch].blocks
        keys = blocks["BLOCK_KEYS"] * blocks["TILES"]
        assert v_limit == V_LIMIT_FP16
        assert E4M3_MAX * v_limit * keys <= torch.finfo(torch.float16).max
    else:
        assert v_limit == LIMITS[formats(spec)[1]]


@pytest.mark.parametrize(
    ("field", "value", "expected"),
    [
        ("q", torch.zeros(1, 77, HEAD).to(torch.float8_e4m3fn), "q: expected torch.int8"),
        ("q", torch.zeros(1, 77, 64, dtype=torch.int8), r"q: expected torch.int8 \[N, 77, 128\]"),
        ("q", torch.zeros(0, 77, HEAD, dtype=torch.int8), r"q: expected .*, found .* \[0, 77,"),
        ("qs", torch.zeros(1, 2), r"qs: expected torch.float32 \[1, 1\]"),
        (
            "k",
            torch.zeros(1, 77, HEAD, dtype=torch.int8),
            r"k: expected .* \[1, 128, 128\]",
        ),
        ("ks", torch.zeros(1, 1), r"ks: expected torch.float32 \[1, 2\]"),
        ("vt", torch.zeros(1, HEAD, 128, dtype=torch.int8), "vt: expected torch.float8_e4m3fn"),
        ("vs", torch.zeros(1, HEAD, dtype=torch.float16), "vs: expected torch.float32"),
        ("tokens", 0, r"q: expected torch.int8 \[N, 0, 128\]"),
        ("tokens", 200, r"q: expected torch.int8 \[N, 200, 128\]"),
    ],
)
def test_operands_of_another_layout_are_refused(field, value, expected):
    qkv = replace(quantize_qkv(*inputs(77)), **{field: value})
    with pytest.raises(KernelError, match=rf"attention\.i8_mx, {expected}"):
        attention(InterpretedBank(SM120), ATTENTION["i8_mx"], qkv)


# --- machine code


@pytest.fixture(scope="module")
def _compiled_together():
    """Compiles all at once, in several processes."""
    compiled(*((spec, arch) for spec in ATTENTION.values() for arch in spec.tuning))


@pytest.mark.usefixtures("_compiled_together")
@pytest.mark.parametrize(("spec", "arch"), VARIANTS)
def test_attention_passes_its_proofs_and_never_shuffles_an_operand(spec, arch):
    (made,) = compiled((spec, arch))
    assert made.registers <= 255
    assert made.shared_bytes <= arch.shared_bytes
    tiles = spec.tuning[arch].blocks["TILES"]
    reductions = 2 * 2 * 2  # a row lies in 4 lanes; maximum and sum; 2 rows a lane
    assert made.loop is not None
    assert made.loop.count("SHFL") <= reductions * tiles + 1
    assert made.loop.count("STS", "MOVM") == 0
