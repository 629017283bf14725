"""Errors, PSNR and SSIM have their known values, and outliers are what they are said to be."""

import math

import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter

from benchmarks.quality import outliers
from benchmarks.quality.metrics import C1, EQUAL_DB, WINDOW, psnr, relative_error, ssim
from benchmarks.timing import WrongResult
from engine.config import TINY
from engine.models.attention import sdpa
from engine.models.dit import Context, Scail


def noise(*shape, seed=0):
    draw = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, shape, generator=draw, dtype=torch.uint8)


def grey(level):
    return torch.full((1, 16, 20, 3), level, dtype=torch.uint8)


# --- values


def test_the_error_is_a_share_of_what_is_wanted():
    want = torch.tensor([[3.0, 0.0], [0.0, 4.0]])
    assert relative_error(want, want) == 0
    assert relative_error(want + torch.tensor([[0.0, 1.0], [0.0, 0.0]]), want) == pytest.approx(0.2)
    assert relative_error(-want, want) == pytest.approx(2)
    assert relative_error(0 * want, 0 * want) == 0
    assert relative_error(want, 0 * want) == math.inf


def test_values_that_are_not_finite_or_not_alike_are_refused():
    good = torch.ones(3)
    for bad in (torch.tensor([1.0, math.nan, 1.0]), torch.tensor([1.0, math.inf, 1.0])):
        with pytest.raises(WrongResult, match="not finite"):
            relative_error(bad, good)
        with pytest.raises(WrongResult, match="not finite"):
            relative_error(good, bad)
    with pytest.raises(WrongResult, match=r"Compared \[3\] with \[2\]"):
        relative_error(good, good[:2])


# --- frames


def test_psnr_of_frames_five_levels_apart_is_34_dB():
    for level in (95, 105):
        assert psnr(grey(level), grey(100)) == pytest.approx(20 * math.log10(255 / 5))
    assert psnr(grey(100), grey(100)) == EQUAL_DB
    assert psnr(grey(0), grey(255)) == 0
    with pytest.raises(WrongResult, match="Compared"):
        psnr(grey(0)[:, :3], grey(0))


def test_ssim_of_even_frames_is_that_of_their_means():
    for a, b in ((100, 105), (0, 255), (7, 7)):
        want = (2 * a * b + C1) / (a * a + b * b + C1)
        assert ssim(grey(a)[0], grey(b)[0]) == pytest.approx(want)


@pytest.mark.parametrize("size", [(11, 11), (24, 37)])
def test_ssim_is_that_of_windows_taken_one_by_one(size):
    """By the paper's formula, with SciPy's Gaussian, whose 11 values are those of 1.5 * 3.5."""
    got, want = noise(2, *size, 3), noise(2, *size, 3, seed=1)
    want[1] = (0.7 * got[1].float() + 0.3 * want[1].float()).byte()

    def blur(x):
        edge = WINDOW // 2
        return gaussian_filter(x, 1.5, truncate=3.5)[edge:-edge, edge:-edge]

    for n in range(2):
        found, parts = ssim(got[n], want[n]), []
        for colour in range(3):
            x, y = (side[n, :, :, colour].double().numpy() for side in (got, want))
            ux, uy = blur(x), blur(y)
            vx, vy, vxy = blur(x * x) - ux * ux, blur(y * y) - uy * uy, blur(x * y) - ux * uy
            top = (2 * ux * uy + 6.5025) * (2 * vxy + 58.5225)
            parts.append(top / ((ux**2 + uy**2 + 6.5025) * (vx + vy + 58.5225)))
        assert found == pytest.approx(np.mean(parts), abs=1e-9)
    assert ssim(got[1], want[1]) > ssim(got[0], want[0])


# --- outliers


@pytest.fixture(scope="module")
def tiny():
    torch.manual_seed(0)
    model = Scail(TINY, sdpa).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith("modulation"):
                weight.copy_(torch.randn(weight.shape) / 16)
    return model.state_dict()


def answered(weights):
    """The velocity of one evaluation, and what entered each linear of the last block."""
    model, seen = Scail(TINY, sdpa).eval(), {}
    model.load_state_dict(weights)
    for name, module in model.blocks[-1].named_modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_pre_hook(lambda _, x, name=name: seen.__setitem__(name, x[0]))
    draw = torch.Generator().manual_seed(1)
    text, vision = (torch.randn(n, TINY.dim, generator=draw) for n in (12, 9))
    latents, reference, pose = (
        torch.randn(16, *shape, generator=draw) for shape in ((2, 8, 8), (1, 8, 8), (2, 4, 4))
    )
    with torch.inference_mode():
        return model(latents, 700.0, Context(text, vision), reference, pose), seen


@pytest.fixture(scope="module")
def pair(tiny):
    """Without and with outliers, the attention of both as sharp and as loud."""
    plain = {name: weight.clone() for name, weight in tiny.items()}
    for name, weight in plain.items():
        if "self_attn.norm_q" in name:
            weight *= outliers.SHARPER
        if "self_attn.o." in name:
            weight *= outliers.LOUDER
    return answered(plain), answered(outliers.with_outliers(tiny))


def test_outliers_leave_the_function_nearly_as_it_was(pair):
    (want, _), (got, _) = pair
    assert 1e-4 < relative_error(got, want) < 0.14  # the GELU


@pytest.mark.parametrize(
    "linear",
    ["self_attn.q", "self_attn.k", "self_attn.v", "self_attn.o", "cross_attn.q", "cross_attn.o",
     "ffn.0", "ffn.2"],
)  # fmt: skip
def test_channels_of_what_enters_each_linear_are_20_to_100_times_as_large(pair, linear):
    (_, before), (_, after) = pair
    grown = after[linear].norm(dim=0) / before[linear].norm(dim=0)
    large = grown > 10
    assert int(large.sum()) == grown.numel() // outliers.ONE_IN
    assert float(grown[large].min()) > 0.5 * outliers.SMALLEST
    assert float(grown[large].max()) < 2.1 * outliers.LARGEST  # GELU: no half is cut off any more
    assert float(grown[~large].median()) == pytest.approx(1, abs=0.1)


def test_factors_are_the_same_for_a_seed_and_within_their_range():
    first, again, other = (
        outliers.factors(256, torch.Generator().manual_seed(n)) for n in (0, 0, 1)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    raised = first[first != 1]
    assert len(raised) == 4
    assert ((raised >= 20) & (raised <= 100)).all()
