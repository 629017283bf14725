"""Rotation changes no product, spreads what stands out, and makes INT8 good enough for all rows."""

import pytest
import torch

from engine.build.columns import equalised, square_sums
from engine.package.manifest import ROTATION_GROUP
from kernels.arch import SM90
from kernels.fp8 import E4M3, FORMS, GROUP, INT8, INT8R, Rows, quantize_rows, rotate
from kernels.gemm import product_reference
from kernels.modulate import modulate, quantize
from kernels.spec import KernelError
from tests.support.interpreter import InterpretedBank
from tests.support.kinds_of_rows import KINDS, drawn

BANK = InterpretedBank(SM90)
R = rotate(torch.eye(GROUP, dtype=torch.float64))


def normal(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def test_r_is_symmetric_regular_and_its_own_inverse():
    assert torch.equal(R.abs(), torch.full((GROUP, GROUP), 1 / 16, dtype=torch.float64))
    assert torch.equal(R @ R, torch.eye(GROUP, dtype=torch.float64))
    assert torch.equal(R, R.T)
    assert torch.equal(R.sum(dim=1), torch.ones(GROUP, dtype=torch.float64))


def test_the_sign_of_an_entry_tells_how_many_digits_are_equal():
    places = torch.arange(GROUP)
    digits = torch.stack([places // 4**d % 4 for d in range(4)])  # [4, GROUP]
    equal = (digits[:, :, None] == digits[:, None, :]).sum(dim=0)
    assert torch.equal(R, (-1.0) ** equal.double() / 16)


def test_the_matrix_of_convrot_is_r_with_its_columns_reversed():
    """So that checkpoints in that format can be taken over: docs/reference/rotation.md 1.1."""
    four = torch.tensor([[1, 1, 1, -1], [1, 1, -1, 1], [1, -1, 1, 1], [-1, 1, 1, 1]]).double()
    whole = four
    for _ in range(3):
        whole = torch.kron(whole, four)
    assert torch.equal(whole / 16, R.flip(1))


@pytest.mark.parametrize("width", [256, 1536, 5120, 13824])
def test_a_product_of_rotated_operands_is_that_of_the_operands(width):
    x, w = normal(8, width, dtype=torch.float64), normal(16, width, seed=1, dtype=torch.float64)
    assert (rotate(x) @ rotate(w).T - x @ w.T).abs().max() < 1e-11
    torch.testing.assert_close(rotate(rotate(x)), x, rtol=0, atol=1e-14)


def test_a_constant_row_stays_as_it_is():
    x = torch.tensor([[0.0], [1.0], [-3.5]]).expand(3, 512)
    assert torch.equal(rotate(x), x)


def test_one_channel_becomes_even_within_its_group_alone():
    x = torch.zeros(1, 768)
    x[0, 300] = 16.0
    turned = rotate(x)
    assert torch.equal(turned[0, 256:512].abs(), torch.ones(256))
    assert not turned[0, :256].any() and not turned[0, 512:].any()


@pytest.mark.parametrize("rows", [1, 3, 2000])
def test_rows_are_rotated_one_by_one_wherever_they_lie(rows):
    """In chunks, in place, of any float, and with gaps between them."""
    x = normal(rows, 1024)[:, :768]
    want = torch.stack([(part.unflatten(0, (-1, GROUP)).double() @ R).flatten() for part in x])
    got = rotate(x)
    torch.testing.assert_close(got.double(), want, rtol=0, atol=1e-5)
    held = x.clone(memory_format=torch.contiguous_format)
    assert rotate(held, out=held) is held and torch.equal(held, got)
    assert torch.equal(rotate(x.bfloat16()), rotate(x.bfloat16().float()))
    assert torch.equal(quantize_rows(x, INT8R).q, quantize_rows(got, INT8).q)


def test_a_width_that_is_no_whole_group_is_refused():
    for turn in (rotate, lambda x: quantize_rows(x, INT8R)):
        with pytest.raises(KernelError, match="rows of 320 values cannot be rotated in groups of"):
            turn(torch.zeros(2, 320))


def test_packages_name_the_groups_that_are_rotated():
    assert ROTATION_GROUP == GROUP
    assert [form for form in FORMS if form.rotated] == [INT8R]
    assert Rows(torch.zeros(1, 1, dtype=torch.int8), torch.ones(1), rotated=True).form == INT8R


@pytest.mark.parametrize("width", [256, 512, 1536, 5120, 8960, 13824])
def test_kernels_make_the_codes_of_the_definition(width):
    """Of a row of zeros too, and of one with a huge value."""
    x = (normal(4, width) * torch.exp(0.7 * normal(width, seed=1))).bfloat16()
    x[1], x[2, 7] = 0, 3e4
    got, want = quantize(BANK, x, INT8R), quantize_rows(x, INT8R)
    assert torch.equal(got.q, want.q) and got.rotated and want.rotated
    torch.testing.assert_close(got.s, want.s, rtol=1e-6, atol=0)
    if width > 8192:
        return
    zeros, shift = torch.zeros(4, width), normal(width, seed=2)
    got, want = modulate(BANK, zeros, shift, shift, INT8R), quantize_rows(shift[None], INT8R)
    assert torch.equal(got.q, want.q.expand(4, -1))


# --- accuracy

# 100 x |error| / |product| of docs/reference/rotation.md 2: E4M3 as it is, and INT8 as packages
# have it, with equal columns and rotated.
STATED = {
    "gauss": (3.8, 1.27),
    "ln+mod": (3.6, 1.27),
    "80 channels": (3.7, 1.24),
    "3 channels": (3.7, 1.25),
    "row offset": (3.4, 0.94),
    "attention out": (3.6, 1.80),
    "attention out, 80 channels": (3.6, 1.81),
    "gelu": (3.8, 1.35),
    "gelu, 216 channels": (3.6, 1.31),
    "gelu, rare giants": (3.0, 1.77),
    "gelu, a giant hardly read": (3.8, 1.34),
    "gelu, a giant": (2.83, 2.03),
}
DRAWS = 2  # one scatters by up to 17 %


def product_error(x, weight, form, m):
    want = x.double() @ weight.double().T
    got = product_reference(quantize_rows(x * m, form), quantize_rows(weight / m, form))
    return 100 * ((got - want).norm() / want.norm()).item()


@pytest.mark.parametrize("kind", KINDS)
def test_rotated_int8_costs_what_the_reference_says(kind):
    found = []
    for seed in range(DRAWS):
        x, weight = drawn(kind, seed)
        m = equalised(square_sums(weight))
        plain = product_error(x, weight, E4M3, torch.ones_like(m))
        found.append((plain, product_error(x, weight, INT8R, m)))
    for stated, *errors in zip(STATED[kind], *found, strict=True):
        assert sum(errors) / DRAWS == pytest.approx(stated, rel=0.1)


def test_equal_columns_are_what_channels_of_unequal_size_need():
    """Rotation alone spreads a large channel over its group."""
    x, weight = drawn("80 channels", 0)
    m = equalised(square_sums(weight))
    alone = product_error(x, weight, INT8R, torch.ones_like(m))
    unrotated = product_error(x, weight, INT8, torch.ones_like(m))
    assert alone > 5 * product_error(x, weight, INT8R, m)
    assert unrotated > 20 * product_error(x, weight, INT8R, m)
