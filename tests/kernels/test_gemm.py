"""The 8-bit product equals its reference in every way, ending and tile, and compiles as told."""

from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from benchmarks.quality.sums import hopper_product
from kernels.arch import ARCHS, SM89
from kernels.fp8 import E4M3, E4M3_MAX, INT8, INT8R, RowForm, Rows, quantize_rows
from kernels.gemm import (
    GEMM,
    MAX_INT8_DEPTH,
    gemm,
    gemm_gelu,
    gemm_gelu_reference,
    gemm_reference,
    gemm_residual,
    gemm_residual_reference,
    product_reference,
)
from kernels.spec import KernelError
from tests.support.compiled import compiled
from tests.support.interpreter import InterpretedBank, different_archs

WAYS = [
    pytest.param(way, arch, id=f"{name}-{arch.name}")
    for name, way in GEMM.items()
    for arch in different_archs(way.bias)
]
N, K = 512, 256


def operands(way, m, n=N, k=K, seed=0):
    generator = torch.manual_seed(seed)
    a, b = (torch.randn(rows, k, generator=generator) for rows in (m, n))
    form = RowForm(way.dtype)
    return quantize_rows(a, form), quantize_rows(b, form)


def vectors(n=N, seed=1):
    return torch.randn(2, n, generator=torch.manual_seed(seed)).unbind()


def relative_error(got, want):
    return ((got.double() - want.double()).norm() / want.double().norm()).item()


def assert_same_bf16(got, want):
    """Both are equal, but where sums in another order round to the neighbour."""
    assert got.dtype == torch.bfloat16 and got.shape == want.shape
    torch.testing.assert_close(got, want, rtol=2**-7, atol=1e-5)
    assert (got != want).float().mean() < 0.01


@pytest.mark.parametrize("m", [1, 77, 259])  # one row, odd, just past a tile
@pytest.mark.parametrize(("way", "arch"), WAYS)
def test_a_product_equals_its_reference(way, arch, m):
    a, b = operands(way, m)
    bias, _ = vectors()
    got = gemm(InterpretedBank(arch), way, a, b, bias)
    want = gemm_reference(a, b, bias)
    assert_same_bf16(got, want)


@pytest.mark.parametrize(
    ("way", "arch"), [param for param in WAYS if param.values[0].dtype == torch.int8]
)
def test_a_product_of_int8_is_exact(way, arch):
    """Without a bias: a fused multiply-add rounds scale and bias once, the reference twice."""
    a, b = operands(way, 77)
    got = gemm(InterpretedBank(arch), way, a, b, torch.zeros(N))
    assert torch.equal(got, gemm_reference(a, b, torch.zeros(N)))


@pytest.mark.parametrize(("way", "arch"), WAYS)
def test_a_product_with_gelu_equals_its_reference(way, arch):
    a, b = operands(way, 259)
    bias, multiplier = vectors()
    b.s.mul_(0.05)  # so that GELU is neither zero nor the identity
    got = gemm_gelu(InterpretedBank(arch), way, a, b, bias, multiplier)
    assert_same_bf16(got, gemm_gelu_reference(a, b, bias, multiplier))


@pytest.mark.parametrize("m", [1, 259])
@pytest.mark.parametrize(("way", "arch"), WAYS)
def test_a_gated_product_is_added_to_the_residual_in_place(way, arch, m):
    a, b = operands(way, m)
    bias, gate = vectors()
    x = torch.randn(m, N)
    want = x.clone()
    gemm_residual_reference(a, b, bias, gate, want)
    gemm_residual(InterpretedBank(arch), way, a, b, bias, gate, x)
    torch.testing.assert_close(x, want, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("m", [31, 32, 64, 65, 97, 161])
def test_every_tile_is_computed_once_whatever_the_groups_of_tiles(m):
    """Tiles have 1 to 6 rows, 2 in a group: whole groups, broken ones, and tiles past the end."""
    way = GEMM["i8"]
    a, b = operands(way, m, n=256, k=64)
    bias, gate = vectors(256)
    bank = InterpretedBank(SM89, BLOCK_M=32, BLOCK_N=64, BLOCK_K=64, GROUP_M=2)
    zeros = torch.zeros(256)  # with a bias a fused multiply-add may round otherwise
    assert torch.equal(gemm(bank, way, a, b, zeros), gemm_reference(a, b, zeros))
    x, want = torch.zeros(2, m, 256).unbind()  # a tile that was added twice would show
    gemm_residual_reference(a, b, bias, gate, want)
    gemm_residual(bank, way, a, b, bias, gate, x)
    torch.testing.assert_close(x, want)


@pytest.mark.parametrize(("way", "arch"), WAYS)
def test_zeros_and_the_largest_codes_come_out_exactly(way, arch):
    largest = 127 if way.dtype == torch.int8 else E4M3_MAX
    codes = torch.zeros(4, K)
    codes[1], codes[2], codes[3, ::2] = largest, -largest, largest
    a = Rows(codes.to(way.dtype), torch.tensor([1.0, 2.0**-20, 2.0**-20, 2.0**-20]))
    b = Rows(torch.full((N, K), largest).to(way.dtype), torch.full((N,), 2.0**-4))
    got = gemm(InterpretedBank(arch), way, a, b, torch.zeros(N))
    full = largest**2 * K * 2.0**-24
    want = torch.tensor([0.0, full, -full, full / 2]).bfloat16()
    assert torch.equal(got, want[:, None].expand(-1, N))


def test_int8_sums_are_exact_at_the_depth_of_the_feed_forward():
    """FP32 could not hold the sum: it is odd and above 2^27."""
    way = GEMM["i8"]
    k = 13824
    a = Rows(torch.full((1, k), 127, dtype=torch.int8), torch.ones(1))
    b = Rows(torch.full((256, k), 127, dtype=torch.int8), torch.ones(256))
    b.q[:, 0] = 126
    x = torch.full((1, 256), -float(127 * 127 * k))
    gemm_residual(InterpretedBank(SM89), way, a, b, torch.zeros(256), torch.ones(256), x)
    exact = np.float32(127 * 127 * k - 127) - np.float32(127 * 127 * k)
    assert torch.equal(x, torch.full((1, 256), float(exact)))


def test_an_outlier_leaves_other_rows_as_they_are():
    way = GEMM["fp8"]
    a, b = operands(way, 8)
    bias, _ = vectors()
    bank = InterpretedBank(SM89)
    before = gemm(bank, way, a, b, bias)
    a.s[3] = 1e30
    after = gemm(bank, way, a, b, bias)
    others = [row for row in range(8) if row != 3]
    assert torch.equal(after[others], before[others])
    assert after[3].isfinite().all()


def test_gelu_is_the_identity_far_up_zero_far_down_and_exact_between():
    way = GEMM["i8"]
    y = torch.tensor([-1e30, -40.0, -6.0, -3.0, -0.75, -0.0, 0.01, 1.0, 5.0, 40.0, 1e30])
    bias = torch.zeros(256)
    bias[: len(y)] = y
    a, b = (Rows(torch.zeros(rows, 64, dtype=torch.int8), torch.ones(rows)) for rows in (1, 256))
    got = gemm_gelu(InterpretedBank(SM89), way, a, b, bias, torch.ones(256))[0, : len(y)]
    want = F.gelu(y.double(), approximate="tanh").bfloat16()
    torch.testing.assert_close(got, want, rtol=2**-8, atol=0)


# --- accuracy


def quantised_product_error(form, k):
    """Returns the relative error against the exact product of standard-normal values."""
    generator = torch.manual_seed(k)
    a, b = (torch.randn(128, k, generator=generator) for _ in range(2))
    return relative_error(
        product_reference(quantize_rows(a, form), quantize_rows(b, form)), a @ b.T
    )


@pytest.mark.parametrize("k", [5120, 13824])
@pytest.mark.parametrize(
    ("form", "stated"), [(INT8, 0.0125), (INT8R, 0.0125), (E4M3, 0.0375)], ids=str
)
def test_eight_bits_cost_what_the_reference_says(form, stated, k):
    """The errors stated are those of docs/reference/kernels.md 4."""
    assert quantised_product_error(form, k) < 1.2 * stated


@pytest.mark.parametrize("k", [5120, 13824])
def test_the_short_accumulator_of_a_hopper_adds_little_to_the_error_of_e4m3(k):
    generator = torch.manual_seed(0)
    a, b = (torch.randn(24, k, generator=generator) for _ in range(2))
    a = F.gelu(1.5 * a, approximate="tanh")
    exact = (a.double() @ b.double().T).numpy()
    a8, b8 = quantize_rows(a), quantize_rows(b)
    scales = (a8.s[:, None] * b8.s).double().numpy()
    codes = a8.q.double().numpy(), b8.q.double().numpy()

    def error(product):
        return np.linalg.norm(product * scales - exact) / np.linalg.norm(exact)

    ideal = error(codes[0] @ codes[1].T)
    assert 0.03 < ideal < 0.045
    assert error(hopper_product(*codes, promote=k)) < 1.01 * ideal
    assert error(hopper_product(*codes, promote=128)) < 1.001 * ideal


# --- machine code

SHIPPED = (
    "i8",
    "i8_pair",
    "fp8",
    "fp8_pair",
    "mx",
    "mx_pair",
)  # the others are for measuring against these


def builds(names):
    return [(spec, arch) for name in names for spec in GEMM[name].specs for arch in spec.tuning]


def assert_it_is_lean(cubin):
    """Beside the proofs, most instructions are products, and 16 bytes come at once."""
    wide = "GMMA" in next(iter(cubin.loop.mma))
    products = sum(cubin.loop.mma.values())  # 64, of a pair's tile 32
    assert cubin.loop.instructions / products < (40 if wide else 2.8 if products > 32 else 3.4)
    assert cubin.loop.count("STS", "PRMT", "STG") == 0, cubin


def test_products_compile_for_every_architecture_and_pass_their_proofs():
    for cubin in compiled(*builds(SHIPPED)):
        assert_it_is_lean(cubin)


@pytest.mark.slow
def test_the_other_tiles_compile_and_pass_their_proofs():
    for cubin in compiled(*builds(sorted(set(GEMM) - set(SHIPPED)))):
        assert_it_is_lean(cubin)


# --- what cannot be computed


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"a": Rows(torch.zeros(4, K), torch.ones(4))}, r"A: expected torch.int8 \[M, K\]"),
        ({"a": Rows(torch.zeros(0, K, dtype=torch.int8), torch.ones(0))}, r"A: .* found .* \[0,"),
        (
            {"a": Rows(torch.zeros(4, 128, dtype=torch.int8), torch.ones(4))},
            r"B: expected .* \[N, 128\], N a multiple of 256, found .* \[512, 256\]",
        ),
        (
            {"a": Rows(torch.zeros(4, K, dtype=torch.int8), torch.ones(5))},
            r"the scales of A: expected .* \[4\]",
        ),
        (
            {"b": Rows(torch.zeros(N, K).to(torch.float8_e4m3fn), torch.ones(N))},
            "B: expected torch.int8",
        ),
        (
            {"b": Rows(torch.zeros(300, K, dtype=torch.int8), torch.ones(300))},
            "B: expected .* N a multiple of 256",
        ),
        (
            {"b": Rows(torch.zeros(N, K, dtype=torch.int8), torch.ones(N).half())},
            "the scales of B: expected",
        ),
        ({"bias": torch.zeros(N, dtype=torch.bfloat16)}, "bias: expected torch.float32"),
        ({"bias": torch.zeros(N + 1)}, r"bias: expected .* \[512\]"),
        ({"gate": torch.zeros(1)}, r"gate: expected torch.float32 \[512\]"),
        ({"x": torch.zeros(5, N)}, r"x: expected torch.float32 \[4, 512\]"),
        ({"x": torch.zeros(N, 4).T}, "has gaps"),
    ],
)
def test_wrong_tensors_are_refused(change, message):
    a, b = operands(GEMM["i8"], 4)
    bias, gate = vectors()
    arguments = {"a": a, "b": b, "bias": bias, "gate": gate, "x": torch.zeros(4, N)} | change
    with pytest.raises(KernelError, match=message):
        gemm_residual(InterpretedBank(SM89), GEMM["i8"], **arguments)


@pytest.mark.parametrize("rotated", ["A", "B"])
def test_a_product_of_a_rotated_operand_and_another_is_refused(rotated):
    """Its result would be noise."""
    a, b = (Rows(torch.ones(n, K, dtype=torch.int8), torch.ones(n)) for n in (4, N))
    a, b = replace(a, rotated=rotated == "A"), replace(b, rotated=rotated == "B")
    bias, gate = vectors()
    bank, way, x = InterpretedBank(SM89), GEMM["i8"], torch.zeros(4, N)
    for multiply in (
        lambda: gemm(bank, way, a, b, bias),
        lambda: gemm_gelu(bank, way, a, b, bias, gate),
        lambda: gemm_residual(bank, way, a, b, bias, gate, x),
        lambda: gemm_reference(a, b, bias),
        lambda: gemm_gelu_reference(a, b, bias, gate),
        lambda: gemm_residual_reference(a, b, bias, gate, x),
    ):
        with pytest.raises(KernelError, match=f"a rotated {rotated} and . as it is"):
            multiply()
    assert not x.any()


def test_rotated_operands_multiply_to_the_product_of_what_they_were():
    a, b = torch.randn(2, 4, K, generator=torch.manual_seed(7))
    b = b.repeat(64, 1)
    rows = quantize_rows(a, INT8R), quantize_rows(b, INT8R)
    got = gemm(InterpretedBank(SM89), GEMM["i8"], *rows, torch.zeros(256))
    assert relative_error(got, a @ b.T) < 0.02


def test_depths_that_the_tiles_do_not_cover_are_refused():
    for k, message in ((96, "K a multiple of 64"), (0, "K a multiple of 64")):
        a, b = (Rows(torch.zeros(r, k, dtype=torch.int8), torch.ones(r)) for r in (4, N))
        with pytest.raises(KernelError, match=message):
            gemm(InterpretedBank(SM89), GEMM["i8"], a, b, torch.zeros(N))


def test_a_depth_at_which_int8_sums_could_overflow_is_refused():
    k = (MAX_INT8_DEPTH // 64 + 1) * 64
    a, b = (Rows(torch.zeros(r, k, dtype=torch.int8), torch.ones(r)) for r in (1, 256))
    with pytest.raises(KernelError, match="sums at most"):
        gemm(InterpretedBank(SM89), GEMM["i8"], a, b, torch.zeros(256))


def test_each_architecture_has_a_form_of_each_type_it_multiplies_at_full_rate():
    held = {arch.name: [n for n, way in GEMM.items() if arch in way.bias.tuning] for arch in ARCHS}
    assert held == {
        "sm80": ["i8_pair", "i8", "i8_tall"],
        "sm86": ["i8_pair", "i8", "i8_tall"],
        "sm89": ["i8_pair", "i8", "i8_tall", "fp8_pair", "fp8"],
        "sm90": ["i8_pair", "i8", "fp8_pair", "fp8"],
        "sm120": ["i8_pair", "i8", "i8_tall", "mx_pair", "mx", "mx_tall"],
    }
