"""LayerNorm, modulation and row quantisation: the kernels against their references."""

import re

import pytest
import torch
import torch.nn.functional as F

from kernels.aot.sass import disassemble
from kernels.arch import SM90
from kernels.fp8 import E4M3, FORMS, INT8, INT8R, TINY, RowForm, quantize_rows
from kernels.modulate import (
    EPS,
    MODULATE,
    QUANTIZE,
    modulate,
    modulate_reference,
    quantize,
)
from kernels.spec import KernelError
from tests.support.codes import assert_same_codes
from tests.support.compiled import compiled, each_arch
from tests.support.interpreter import InterpretedBank

BANK = InterpretedBank(SM90)
SIZES = [(1, 5120), (2, 13824), (1, 256), (33, 256), (9, 1536)]  # 1536: a quarter of lanes is idle

forms = pytest.mark.parametrize("form", [*FORMS, INT8], ids=lambda form: form.name)
plain = pytest.mark.parametrize("form", [E4M3, INT8], ids=lambda form: form.name)
sizes = pytest.mark.parametrize(("tokens", "dim"), SIZES)


def inputs(tokens, dim):
    """Draws x with a mean, a channel of outliers and tokens of very different sizes."""
    generator = torch.manual_seed(0)
    x = torch.randn(tokens, dim, generator=generator) + 0.5
    x[:, 7] *= 40
    x *= torch.exp2(torch.randint(-6, 7, (tokens, 1), generator=generator))
    shift, scale = 0.3 * torch.randn(2, dim, generator=generator)
    return x, shift.contiguous(), scale.contiguous()


def assert_same_rows(got, want):
    torch.testing.assert_close(got.s, want.s, rtol=1e-5, atol=0)
    assert_same_codes(got.q, want.q)


@forms
@sizes
def test_modulate_equals_its_reference(tokens, dim, form):
    x, shift, scale = inputs(tokens, dim)
    got = modulate(BANK, x, shift, scale, form)
    assert_same_rows(got, modulate_reference(x, shift, scale, form))


@forms
@sizes
def test_quantize_equals_its_definition(tokens, dim, form):
    x = inputs(tokens, dim)[0].bfloat16()
    got = quantize(BANK, x, form)
    assert_same_rows(got, quantize_rows(x, form))
    assert torch.equal(got.q.float().abs().amax(dim=1), torch.full((tokens,), form.limit))


@plain
def test_codes_lie_within_half_a_step_of_the_exact_values(form):
    _, shift, scale = inputs(1, 256)
    x = torch.randn(65, 256, generator=torch.manual_seed(2))
    exact = F.layer_norm(x.double(), (256,), eps=EPS) * (1 + scale) + shift
    rows = modulate(BANK, x, shift, scale, form)
    s = rows.s[:, None].double()
    half = s / 2 if form == INT8 else torch.maximum(exact.abs() / 16, s * 2**-10)
    error = (rows.q.double() * s - exact).abs()
    assert (error / half).max() < 1.001
    assert (error.norm() / exact.norm()) < {INT8: 0.01, E4M3: 0.027}[form]


def test_a_layernorm_with_weights_is_a_modulation():
    x, bias, weight = inputs(9, 256)
    got = modulate(BANK, x, bias, weight - 1, INT8)
    want = quantize_rows(F.layer_norm(x, (256,), weight, bias, EPS), INT8)
    assert_same_rows(got, want)


@forms
def test_rows_of_one_value_become_their_shift(form):
    x = torch.tensor([0.0, 3.0, -1e4])[:, None].expand(3, 256).contiguous()
    shift = torch.linspace(-2, 2, 256)
    rows = modulate(BANK, x, shift, torch.randn(256), form)
    want = quantize_rows(shift.expand(3, -1), form)
    assert_same_rows(rows, want)


@forms
def test_rows_of_zeros_stay_zeros(form):
    zeros = torch.zeros(3, 256)
    for rows in (
        modulate(BANK, zeros, zeros[0], zeros[0], form),
        quantize(BANK, zeros.bfloat16(), form),
    ):
        assert rows.q.float().abs().max() == 0
        torch.testing.assert_close(rows.s, torch.full((3,), TINY / form.limit))


@plain
def test_a_mean_far_from_zero_costs_no_accuracy(form):
    """The variance is that of the centred row: a difference of large squares would lose it."""
    noise = torch.randn(4, 256, generator=torch.manual_seed(3))
    x = 4096 + torch.round(noise * 1024) / 1024  # exact in fp32
    zeros = torch.zeros(256)
    want = F.layer_norm(x.double(), (256,), eps=EPS)
    got = modulate(BANK, x, zeros, zeros, form)
    torch.testing.assert_close(
        got.s.double(), want.abs().amax(dim=1) / form.limit, rtol=1e-3, atol=0
    )
    s = got.s[:, None].double()
    half = s / 2 if form == INT8 else torch.maximum(want.abs() / 16, s * 2**-10)
    mean = 4096 * 2**-23 * want.abs().amax()  # a mean rounded in another order of its sum
    assert ((got.q.double() * s - want).abs() <= 1.001 * half + mean).all()


@plain
def test_one_huge_value_takes_the_whole_range(form):
    x = torch.full((1, 256), 1e-3).bfloat16()
    x[0, 100] = -3e38
    rows = quantize(BANK, x, form)
    assert rows.q[0, 100].item() == -form.limit
    assert rows.q.float().abs().sum() == form.limit
    assert rows.dequantize()[0, 100].item() == pytest.approx(x[0, 100].item(), rel=1e-6)


# --- launches that are mistakes

X, V = torch.zeros(4, 256), torch.zeros(256)
B = X.bfloat16()
MISTAKES = {
    "x of bf16": (lambda: modulate(BANK, B, V, V), "x: expected .*, found torch.bfloat16"),
    "x of one axis": (lambda: modulate(BANK, V, V, V), r"x: .* \[S, D\], found .* \[256\]"),
    "no tokens": (lambda: modulate(BANK, X[:0], V, V), r"x: .* found .* \[0, 256\]"),
    "x with gaps": (lambda: modulate(BANK, X[:, ::2], V[:128], V[:128]), r"strides .* gaps"),
    "a short shift": (lambda: modulate(BANK, X, V[:8], V), r"shift: .* \[256\], found .* \[8\]"),
    "scales per token": (lambda: modulate(BANK, X, V, X), r"scale: .*, found .* \[4, 256\]"),
    "codes of fp16": (
        lambda: modulate(BANK, X, V, V, RowForm(torch.half)),
        r"rows are of .* not torch.float16",
    ),
    "rotated rows of half a group": (
        lambda: modulate(BANK, X[:, :128].contiguous(), V[:128], V[:128], INT8R),
        "rows of 128 values cannot be rotated in groups of 256",
    ),
    "rotated rows that end in a group": (
        lambda: quantize(BANK, torch.zeros(4, 384).bfloat16(), INT8R),
        "rows of 384 values cannot be rotated",
    ),
    "a scale of bf16": (lambda: modulate(BANK, X, V, B[0]), "scale: .*, found torch.bfloat16"),
    "rows of fp32": (lambda: quantize(BANK, X), "x: expected .*, found torch.float32"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_wrong_launch_is_refused_by_name(name):
    launch, message = MISTAKES[name]
    with pytest.raises(KernelError, match=message):
        launch()


# --- compiled

SPECS = [*MODULATE.values(), *QUANTIZE.values()]


@each_arch
def test_all_kernels_compile_and_move_at_least_four_bytes_at_once(arch, tmp_path):
    for made in compiled(*((spec, arch) for spec in SPECS if arch in spec.tuning)):
        assert made.registers <= 80, made.name  # three programs of 8 warps on a multiprocessor
        # a warp has its groups whole, and sums of four pass through no shared memory
        assert made.shared_bytes < 1024, made.name
        path = tmp_path / f"{made.name}.cubin"
        path.write_bytes(made.data)
        code = disassemble(path)
        assert re.findall(r"(?:LDG|STG)\S*\.[US](?:8|16)\b", code) == [], made.name
        assert re.findall(r"\b(?:LDL|STL)\b", code) == [], made.name
