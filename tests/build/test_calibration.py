"""Calibration chooses nearly the best there is: real products are quantised to compare."""

import math

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from engine.build.calibration import (
    Activations,
    Channels,
    FormatChoice,
    choose,
    load_activations,
)
from engine.build.columns import BOUND, equalised, square_sums
from engine.config import TINY
from engine.errors import BadCheckpoint, BadRequest
from engine.models.attention import sdpa
from engine.models.dit import Context, Scail
from engine.stage_dump import ACTIVATIONS, StageDump
from kernels.fp8 import E4M3, INT8R, quantize_rows, rotate
from kernels.gemm import product_reference

BOTH = (E4M3, INT8R)
TOKENS, OUT = 1024, 384


def normal(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def uniform(seed, *shape):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def gaussian(width=1024):
    return normal(0, TOKENS, width)


def one_outlier(width=1024):
    x = gaussian(width)
    x[:, 7] *= 50
    return x


def ten_outliers(width=1024):
    x = gaussian(width)
    x[:, 100:110] *= 50
    return x


def uneven_channels(width=1024):
    return gaussian(width) * normal(2, width).exp()


def after_gelu(width=1024):
    return F.gelu(2 * gaussian(width))


def uneven_after_gelu(width=1024):
    return F.gelu(uneven_channels(width) - 1)


def heavy_after_gelu(width=1024):
    """A thousandth of the values is a hundred times larger than the others."""
    return F.gelu(gaussian(width) - 1 + 30 * (uniform(3, TOKENS, width) < 1e-3))


def massive_tokens(width=1024):
    x = F.gelu(gaussian(width))
    x[::7, :3] *= 100
    return x


SCENES = [
    gaussian,
    one_outlier,
    ten_outliers,
    uneven_channels,
    after_gelu,
    uneven_after_gelu,
    heavy_after_gelu,
    massive_tokens,
]


def a_weight(x):
    return 0.02 * normal(5, OUT, x.shape[1])


def seen(x):
    return Channels(x.abs().amax(dim=0), x.square().mean(dim=0))


def real_error(x, weight, form, smooth):
    """Computes the error of a product of both operands as a worker has them."""
    exact = x @ weight.T
    a, b = quantize_rows(x * smooth, form), quantize_rows(weight / smooth, form)
    return ((product_reference(a, b) - exact).norm() / exact.norm()).item()


def every_option(x, weight):
    """Real errors of both formats with many strengths of smoothing, and without."""
    rms_x, rms_w = x.square().mean(dim=0).sqrt(), weight.square().mean(dim=0).sqrt()
    strengths = [i / 8 for i in range(9)]
    smooths = [torch.ones(x.shape[1]), *(rms_w ** (1 - a) / rms_x**a for a in strengths)]
    return {
        (dtype, i): real_error(x, weight, dtype, m) for dtype in BOTH for i, m in enumerate(smooths)
    }


@pytest.mark.parametrize("scene", SCENES, ids=lambda scene: scene.__name__)
def test_the_choice_is_within_five_percent_of_the_best_there_is(scene):
    x = scene()
    weight = a_weight(x)
    choice = choose(weight, seen(x), BOTH, INT8R, can_smooth=True)
    best = min(every_option(x, weight).values())
    assert real_error(x, weight, choice.form, choice.smooth) < 1.05 * best


@pytest.mark.parametrize("scene", SCENES, ids=lambda scene: scene.__name__)
def test_where_nothing_can_be_smoothed_the_better_format_is_chosen(scene):
    x = scene()
    weight, ones = a_weight(x), torch.ones(x.shape[1])
    choice = choose(weight, seen(x), BOTH, INT8R, can_smooth=False)
    errors = {form: real_error(x, weight, form, ones) for form in BOTH}
    assert torch.equal(choice.smooth, ones)
    assert errors[choice.form] == min(errors.values())


def hidden_outliers(width=1024):
    """Channels that are large where the weight is small: rotation alone spreads them."""
    sizes = torch.ones(width)
    sizes[::64] = 40 * (1 + uniform(4, width // 64))
    x = gaussian(width)
    return x * sizes, a_weight(x) / sizes


def test_e4m3_is_chosen_where_rotation_is_worse_and_nothing_can_be_smoothed():
    x, weight = hidden_outliers()
    ones = torch.ones(1024)
    choice = choose(weight, seen(x), BOTH, INT8R, can_smooth=False)
    assert choice.form == E4M3
    assert real_error(x, weight, E4M3, ones) < 0.8 * real_error(x, weight, INT8R, ones)
    smoothed = choose(weight, seen(x), BOTH, INT8R, can_smooth=True)
    assert smoothed.form == INT8R
    assert real_error(x, weight, INT8R, smoothed.smooth) < 0.012


@pytest.mark.parametrize("scene", [one_outlier, ten_outliers, uneven_channels, massive_tokens])
def test_smoothing_lowers_the_real_error_where_channels_differ(scene):
    x = scene()
    weight = a_weight(x)
    choice = choose(weight, seen(x), [INT8R], INT8R, can_smooth=True)
    plain = real_error(x, weight, INT8R, torch.ones(x.shape[1]))
    assert real_error(x, weight, INT8R, choice.smooth) < 0.65 * plain


def test_without_a_clip_columns_are_made_equal():
    x, weight = hidden_outliers()
    choice = choose(weight, None, [INT8R], INT8R, can_smooth=True)
    assert choice.form == INT8R and choice.reason == "not calibrated, equal columns"
    assert torch.equal(choice.smooth, equalised(square_sums(weight)))
    assert real_error(x, weight, INT8R, choice.smooth) < 0.012


def test_even_channels_are_not_smoothed():
    x = gaussian()
    choice = choose(a_weight(x), seen(x), BOTH, INT8R, can_smooth=True)
    assert torch.equal(choice.smooth, torch.ones(1024))
    assert all(not estimate.how for estimate in choice.estimates)


@pytest.mark.parametrize("scene", SCENES, ids=lambda scene: scene.__name__)
def test_estimates_are_near_the_real_error_and_for_int8_above_it(scene):
    x = scene()
    weight, ones = a_weight(x), torch.ones(x.shape[1])
    choice = choose(weight, seen(x), BOTH, INT8R, can_smooth=False)
    for estimate in choice.estimates:
        real = real_error(x, weight, estimate.form, ones)
        assert 0.9 < estimate.total / real < (1.8 if estimate.form == INT8R else 1.4)


def test_the_two_parts_of_an_estimate_are_those_of_activation_and_weight():
    x = uneven_channels()
    weight = a_weight(x)
    choice = choose(weight, seen(x), BOTH, INT8R, can_smooth=False)
    for estimate in choice.estimates:
        basis = rotate if estimate.form.rotated else torch.clone
        exact = basis(x) @ basis(weight).T
        a = quantize_rows(x, estimate.form).dequantize() @ basis(weight).T
        b = basis(x) @ quantize_rows(weight, estimate.form).dequantize().T
        assert estimate.weight == pytest.approx(
            ((b - exact).norm() / exact.norm()).item(), rel=0.05
        )
        ratio = estimate.activation / ((a - exact).norm() / exact.norm()).item()
        assert 0.95 < ratio < 1.7


def test_without_calibration_the_default_is_taken_and_nothing_read():
    weight = torch.empty(13824, 5120, device="meta")  # cannot be read
    for default, can_smooth in ((E4M3, True), (E4M3, False), (INT8R, False)):
        choice = choose(weight, None, BOTH, default, can_smooth)
        assert choice.form == default and choice.estimates == ()
        assert torch.equal(choice.smooth, torch.ones(5120))
        assert choice.reason == "not calibrated"


def test_only_what_is_allowed_is_chosen():
    x = gaussian()
    choice = choose(a_weight(x), seen(x), [E4M3], E4M3, can_smooth=True)
    assert choice.form == E4M3 and len(choice.estimates) == 1


def test_the_reason_tells_both_errors():
    x = uneven_channels()
    choice = choose(a_weight(x), seen(x), BOTH, INT8R, can_smooth=True)
    int8, e4m3 = (100 * estimate.total for estimate in choice.estimates)
    assert int8 < e4m3
    assert choice.reason.startswith(f"int8 rotated smoothed by 0.5 {int8:.2f} % < float8_e4m3fn ")
    assert choice.reason.endswith(f"{e4m3:.2f} %")


def test_the_same_question_has_the_same_answer():
    x = uneven_channels()
    first, second = (choose(a_weight(x), seen(x), BOTH, INT8R, can_smooth=True) for _ in range(2))
    assert torch.equal(first.smooth, second.smooth)
    assert first.estimates == second.estimates and first.reason == second.reason


@pytest.mark.parametrize("factor", [1e-15, 1e-6, 1e6, 1e15])
def test_units_do_not_matter(factor):
    x = uneven_channels()
    weight = a_weight(x)
    usual = choose(weight, seen(x), BOTH, INT8R, can_smooth=True)
    scaled = choose(weight / factor, seen(x * factor), BOTH, INT8R, can_smooth=True)
    assert scaled.form == usual.form
    torch.testing.assert_close(scaled.smooth, usual.smooth, rtol=1e-4, atol=0)
    for one, other in zip(scaled.estimates, usual.estimates):
        assert one.total == pytest.approx(other.total, rel=1e-3)


def test_channels_that_were_never_used_keep_their_size():
    x = uneven_channels()
    weight = a_weight(x)
    x[:, 30:60] = 0
    weight[:, 50:90] = 0
    choice = choose(weight, seen(x), BOTH, INT8R, can_smooth=True)
    assert choice.estimates[0].how
    assert torch.equal(choice.smooth[30:90], torch.ones(60))
    assert real_error(x, weight, choice.form, choice.smooth) < 0.02


def test_multipliers_are_finite_and_bounded():
    sizes = torch.logspace(-3, 3, 1024)
    x = gaussian() * sizes
    choice = choose(a_weight(x) / sizes, seen(x), BOTH, INT8R, can_smooth=True)
    assert choice.smooth.dtype == torch.float32
    assert choice.smooth.min().item() == pytest.approx(1 / BOUND)
    assert choice.smooth.max().item() == pytest.approx(BOUND)


@pytest.mark.parametrize("which", ["input", "weight"])
def test_a_linear_that_was_never_used_keeps_the_default(which):
    x = gaussian() * (which != "input")
    weight = a_weight(x) * (which != "weight")
    choice = choose(weight, seen(x), BOTH, E4M3, can_smooth=True)
    assert choice.form == E4M3 and torch.equal(choice.smooth, torch.ones(1024))
    assert "zero" in choice.reason


def test_channels_are_padded_with_unused_ones():
    x = after_gelu(300)
    weight = a_weight(x)
    padded = seen(x).padded(512)
    assert torch.equal(padded.absmax[:300], seen(x).absmax) and not padded.absmax[300:].any()
    assert torch.equal(padded.mean_square[:300], seen(x).mean_square)
    usual = choose(weight, seen(x), [E4M3], E4M3, can_smooth=False)
    wider = choose(F.pad(weight, (0, 212)), padded, BOTH, E4M3, can_smooth=False)
    (one,) = (estimate for estimate in wider.estimates if estimate.form == E4M3)
    assert one.total == pytest.approx(usual.estimates[0].total, rel=1e-6)
    rotated = choose(F.pad(weight, (0, 212)), padded, [INT8R], INT8R, can_smooth=True)
    assert torch.equal(rotated.smooth[300:], torch.ones(212))


def test_the_largest_weight_needs_little_memory_beside_itself():
    weight = torch.zeros(13824, 5120)
    weight[:, :] = normal(0, 5120)
    x = gaussian(5120)[:64]
    largest = 0

    class Watch(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            nonlocal largest
            result = function(*args, **(kwargs or {}))
            if isinstance(result, torch.Tensor) and result.untyped_storage() is not None:
                own = result.untyped_storage().data_ptr() != weight.untyped_storage().data_ptr()
                largest = max(largest, own * result.untyped_storage().nbytes())
            return result

    with Watch():
        choice = choose(weight, seen(x), BOTH, INT8R, can_smooth=True)
    assert choice.form == INT8R
    assert largest < 25e6  # and at most six of them at once


# --- the file


@pytest.fixture(scope="module")
def tensors(tmp_path_factory):
    """Tensors that `generate --stages` keeps of one evaluation of a tiny model."""
    folder = tmp_path_factory.mktemp("stages")
    torch.manual_seed(0)
    model = Scail(TINY, sdpa)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    dump = StageDump(folder)
    with dump.recording(model), torch.no_grad():
        context = Context(torch.randn(7, TINY.dim), torch.randn(257, TINY.dim))
        model(torch.randn(16, 2, 4, 4), 500.0, context, torch.randn(16, 1, 4, 4), None)
    return load_file(folder / ACTIVATIONS)


def folder_with(tmp_path, tensors):
    save_file(tensors, tmp_path / ACTIVATIONS)
    return tmp_path


def test_what_stages_keeps_is_read(tmp_path, tensors):
    activations = load_activations(folder_with(tmp_path, tensors), TINY)
    assert isinstance(activations, Activations)
    assert len(activations.seen) == TINY.layers * 12
    down = activations.channels("blocks.1.ffn.2")
    assert torch.equal(down.absmax, tensors["blocks.1.ffn.2.absmax"])
    assert torch.equal(down.mean_square, tensors["blocks.1.ffn.2.mean_square"])
    q, k = (activations.channels(f"blocks.0.self_attn.{name}") for name in "qk")
    assert torch.equal(q.absmax, k.absmax) and torch.equal(q.mean_square, k.mean_square)
    choice = choose(0.02 * normal(1, 256, TINY.ffn), down, BOTH, E4M3, can_smooth=False)
    assert isinstance(choice, FormatChoice) and math.isfinite(choice.estimates[0].total)


def test_a_folder_without_activations_is_refused(tmp_path):
    with pytest.raises(BadRequest, match=r"holds no activations.safetensors.*generate --stages"):
        load_activations(tmp_path, TINY)
    with pytest.raises(BadRequest, match="missing holds no"):
        load_activations(tmp_path / "missing", TINY)


@pytest.mark.parametrize("kind", ["empty", "cut", "garbage", "folder"])
def test_a_file_that_is_damaged_is_refused(tmp_path, tensors, kind):
    path = folder_with(tmp_path, tensors) / ACTIVATIONS
    data = path.read_bytes()
    path.unlink()
    if kind == "folder":
        path.mkdir()
    else:
        path.write_bytes({"empty": b"", "cut": data[: len(data) // 2], "garbage": b"x" * 999}[kind])
    with pytest.raises(BadCheckpoint, match=ACTIVATIONS):
        load_activations(tmp_path, TINY)


NAME = "blocks.1.ffn.2"


def changed(tensors, **values):
    return tensors | {f"{NAME}.{key}": value for key, value in values.items()}


def with_value(tensors, key, value):
    tensor = tensors[f"{NAME}.{key}"].clone()
    tensor[3] = value
    return changed(tensors, **{key: tensor})


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda t: {k: v for k, v in t.items() if k != f"{NAME}.absmax"}, r"lacks blocks\.1\.ffn"),
        (lambda t: {k: v for k, v in t.items() if "mean_square" not in k}, r"lacks .*mean_square"),
        (lambda t: changed(t, absmax=t[f"{NAME}.absmax"][:-1]), r"\[511\].*\[512\]"),
        (lambda t: changed(t, absmax=t[f"{NAME}.absmax"][None]), r"\[1, 512\].*\[512\]"),
        (lambda t: changed(t, absmax=torch.zeros(0)), r"\[0\].*\[512\]"),
        (lambda t: changed(t, absmax=t[f"{NAME}.absmax"].half()), r"float16.*float32"),
        (lambda t: changed(t, mean_square=torch.ones(512, dtype=torch.int32)), r"int32.*float32"),
        (lambda t: with_value(t, "absmax", math.nan), "not finite"),
        (lambda t: with_value(t, "absmax", math.inf), "not finite"),
        (lambda t: with_value(t, "mean_square", math.nan), "not finite"),
        (lambda t: with_value(t, "mean_square", -1.0), "negative"),
        (lambda t: with_value(t, "absmax", -1.0), "negative"),
        (lambda t: with_value(t, "mean_square", 1e6), "above the square"),
        (lambda t: {**t, "blocks.2.ffn.0.absmax": torch.ones(256)}, r"holds blocks\.2\.ffn"),
        (lambda t: {**t, "blocks.0.ffn.9.absmax": torch.ones(256)}, r"holds blocks\.0\.ffn\.9"),
    ],
)
def test_tensors_that_cannot_be_are_refused(tmp_path, tensors, damage, message):
    folder = folder_with(tmp_path, damage(tensors))
    with pytest.raises(BadCheckpoint, match=message) as caught:
        load_activations(folder, TINY)
    assert ACTIVATIONS in str(caught.value) and "gain" in str(caught.value)  # what to do
    assert "blocks." in str(caught.value)


def test_channels_may_be_always_zero_constant_or_huge(tmp_path, tensors):
    for value in (0.0, 1e-30, 3.0, 1e18, 3e38):
        absmax = torch.full((512,), value)
        square = absmax.square().clamp_max(3e38)
        folder = folder_with(tmp_path, changed(tensors, absmax=absmax, mean_square=square))
        channels = load_activations(folder, TINY).channels(NAME)
        choice = choose(0.02 * normal(1, 256, 512), channels, BOTH, E4M3, can_smooth=True)
        assert torch.isfinite(choice.smooth).all() and (choice.smooth > 0).all()
        assert all(math.isfinite(estimate.total) for estimate in choice.estimates)
