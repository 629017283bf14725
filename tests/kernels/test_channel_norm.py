"""Norm, SiLU and the causal window in one pass: the kernel against its reference."""

import re
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F

from kernels.aot.sass import disassemble
from kernels.arch import SM90
from kernels.channel_norm import CHANNEL_NORM, channel_norm, channel_norm_reference
from kernels.spec import KernelError
from tests.support.compiled import compiled, each_arch
from tests.support.interpreter import InterpretedBank

BANK = InterpretedBank(SM90)
TYPES = {torch.bfloat16: 2**-8, torch.float16: 2**-11}  # largest relative error of one rounding
SIZES = [  # n, h, w, C: one frame, odd sizes, past one tile, lanes without a channel
    (1, 2, 3, 8),
    (1, 7, 5, 384),
    (2, 5, 9, 192),
    (4, 3, 17, 96),
    (3, 1, 1, 12),
    (4, 19, 29, 8),
]

dtypes = pytest.mark.parametrize("dtype", TYPES, ids=["bf16", "fp16"])
sizes = pytest.mark.parametrize("size", SIZES, ids=str)
forms = pytest.mark.parametrize("has_branch", [False, True], ids=["plain", "residual"])


def inputs(size, dtype, has_branch, seed=0):
    """Draws x with very different lengths; the window is unwritten."""
    generator = torch.manual_seed(seed)
    n, h, w, c = size
    x, branch = torch.randn(2, n, h, w, c, generator=generator)
    x *= torch.exp2(torch.randint(-6, 7, (n, h, w, 1), generator=generator))
    bias, gamma = torch.randn(2, c, generator=generator)
    history = torch.randn(2, h, w, c, generator=generator).to(dtype)
    window = torch.empty(2 + n, h, w, c, dtype=dtype)
    branch = branch.to(dtype) if has_branch else None
    return x.to(dtype), branch, bias.clone(), gamma.clone(), window, history


def copies(given):
    return [None if tensor is None else tensor.clone() for tensor in given]


def assert_almost_same(got, want, share=2e-3):
    """Both are equal but for a few values that were rounded the other way."""
    assert got.dtype == want.dtype
    torch.testing.assert_close(got, want, rtol=2.01 * TYPES[got.dtype], atol=1e-6)
    assert (got != want).sum() <= max(2, share * got.numel())


@forms
@dtypes
@sizes
def test_the_kernel_equals_its_reference(size, dtype, has_branch):
    given = inputs(size, dtype, has_branch)
    got, want = copies(given), copies(given)
    channel_norm(BANK, *got)
    channel_norm_reference(*want)
    x, _, bias, gamma, window, history = got
    assert torch.equal(x, want[0])  # the residual sum, or nothing at all
    assert torch.equal(x, given[0]) is not has_branch
    assert torch.equal(bias, given[2])
    assert torch.equal(gamma, given[3])
    assert torch.equal(window[:2], given[5])
    assert_almost_same(window, want[4])
    assert torch.equal(history, window[-2:])


@forms
def test_the_reference_is_the_normalisation_of_pytorch(has_branch):
    x, branch, bias, gamma, window, history = inputs((3, 4, 5, 24), torch.float32, has_branch)
    exact = x.double() + bias + (0 if branch is None else branch.double())
    unit = F.normalize(exact, dim=-1, eps=1e-12) * 24**0.5
    past = history.clone()
    channel_norm_reference(x, branch, bias, gamma, window, history)
    want = F.silu(unit * gamma)
    assert ((window[2:] - want).norm() / want.norm()) < 1e-6
    assert torch.equal(window[:2], past)
    assert torch.equal(history, window[3:])


@dtypes
@pytest.mark.parametrize("cut", [[1] * 7, [1, 4, 2], [1, 2, 4], [5, 2]])
def test_windows_one_after_the_other_see_the_same_frames_as_one_long_window(dtype, cut):
    x, _, bias, gamma, window, history = inputs((7, 3, 5, 16), dtype, has_branch=False)
    parts, memory = [], history.clone()
    for part in x.split(cut):
        small = torch.empty(2 + len(part), 3, 5, 16, dtype=dtype)
        channel_norm(BANK, part, None, bias, gamma, small, memory)
        parts.append(small)
    channel_norm(BANK, x, None, bias, gamma, window, history)
    start = 0
    for part in parts:
        assert torch.equal(part, window[start : start + len(part)])
        start += len(part) - 2
    assert torch.equal(memory, history)


def test_the_shared_memory_of_two_windows_keeps_their_pasts_apart():
    memory = torch.empty(6 * 3 * 5 * 16, dtype=torch.bfloat16)
    pasts = [], []
    histories = torch.zeros(2, 2, 3, 5, 16, dtype=torch.bfloat16)
    for step in range(3):
        for which, frames in ((0, 4), (1, 1)):
            x, _, bias, gamma, _, _ = inputs((frames, 3, 5, 16), torch.bfloat16, False, seed=step)
            window = memory[: (2 + frames) * 240].view(2 + frames, 3, 5, 16)
            channel_norm(BANK, x, None, bias, gamma, window, histories[which])
            pasts[which].append(window.clone())
    for windows in pasts:
        assert torch.count_nonzero(windows[0][:2]) == 0
        for before, after in pairwise(windows):
            assert torch.equal(after[:2], before[-2:])


@dtypes
@pytest.mark.parametrize("bank", [None, BANK], ids=["reference", "kernel"])
def test_zeros_stay_zeros_and_very_short_vectors_are_not_stretched_to_one(bank, dtype):
    x = torch.zeros(1, 1, 4, 8, dtype=dtype)
    x[0, 0, 1] = 1e-20  # in fp16 0
    x[0, 0, 2, 3] = 1e-3
    window, history = torch.empty(3, 1, 4, 8, dtype=dtype), torch.zeros(2, 1, 4, 8, dtype=dtype)
    vectors = torch.zeros(8), torch.ones(8)
    run(bank, x, None, *vectors, window, history)
    zero, short, lone, _ = window[2, 0].float()
    assert zero.abs().max() == 0
    stretched = 8**0.5 * x[0, 0, 1, 0].item() * 1e12 / 2  # SiLU halves what is small
    torch.testing.assert_close(short, torch.full((8,), stretched), rtol=TYPES[dtype], atol=0)
    assert lone[3] == F.silu(torch.tensor(8**0.5)).to(dtype)
    assert lone.count_nonzero() == 1


@dtypes
@pytest.mark.parametrize("bank", [None, BANK], ids=["reference", "kernel"])
def test_a_position_that_is_not_finite_spoils_itself_alone(bank, dtype):
    x = torch.randn(1, 1, 3, 8, generator=torch.manual_seed(0)).to(dtype)
    x[0, 0, 1, 5] = torch.nan
    window, history = torch.empty(3, 1, 3, 8, dtype=dtype), torch.zeros(2, 1, 3, 8, dtype=dtype)
    run(bank, x, None, torch.zeros(8), torch.ones(8), window, history)
    assert window[2, 0, 1].isnan().all()
    assert window[2, 0, [0, 2]].isfinite().all()


@dtypes
@pytest.mark.parametrize("bank", [None, BANK], ids=["reference", "kernel"])
def test_large_values_of_both_signs_meet_silu_at_its_ends(bank, dtype):
    x = torch.tensor([60000.0, -60000.0]).repeat(4).to(dtype).view(1, 1, 1, 8)
    window, history = torch.empty(3, 1, 1, 8, dtype=dtype), torch.zeros(2, 1, 1, 8, dtype=dtype)
    run(bank, x, None, torch.zeros(8), torch.full((8,), 100.0), window, history)
    want = torch.tensor([100.0, 0.0]).repeat(4)
    torch.testing.assert_close(window[2].float().flatten(), want, rtol=TYPES[dtype], atol=1e-30)


def run(bank, *given):
    channel_norm_reference(*given) if bank is None else channel_norm(bank, *given)


# --- launches that are mistakes

GOOD = {
    "x": torch.zeros(2, 3, 5, 8).bfloat16(),
    "branch": None,
    "bias": torch.zeros(8),
    "gamma": torch.ones(8),
    "window": torch.zeros(4, 3, 5, 8).bfloat16(),
    "history": torch.zeros(2, 3, 5, 8).bfloat16(),
}
MISTAKES = {
    "x of fp32": ({"x": GOOD["x"].float()}, "made for .*bfloat16 and .*float16, not torch.float32"),
    "x of three axes": (
        {"x": GOOD["x"][0]},
        r", x: expected .* \[n, h, w, C\], found .* \[3, 5, 8\]",
    ),
    "no frames": ({"x": GOOD["x"][:0]}, r"found .* \[0, 3, 5, 8\]"),
    "x with gaps": ({"x": GOOD["x"].mT.contiguous().mT}, r"strides .* has gaps"),
    "a branch of one frame": ({"branch": GOOD["x"][:1]}, r"branch: expected .* \[2, 3, 5, 8\]"),
    "a branch of fp16": ({"branch": GOOD["x"].half()}, r"branch: expected .*, found torch.float16"),
    "a long bias": ({"bias": torch.zeros(16)}, r"bias: expected .* \[8\], found .* \[16\]"),
    "a bias of bf16": ({"bias": GOOD["x"][0, 0, 0]}, r"bias: expected .*, found torch.bfloat16"),
    "gamma as stored": ({"gamma": torch.ones(8, 1, 1, 1)}, r"gamma: expected .* \[8\]"),
    "a short window": (
        {"window": GOOD["window"][:3]},
        r"window: expected .* \[4, 3, 5, 8\], found .* \[3,",
    ),
    "a window of fp16": (
        {"window": GOOD["window"].half()},
        "window: expected .*, found torch.float16",
    ),
    "a long history": ({"history": GOOD["window"]}, r"history: expected .* \[2, 3, 5, 8\]"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_wrong_launch_is_refused_by_name(name):
    change, message = MISTAKES[name]
    with pytest.raises(KernelError, match=message):
        channel_norm(BANK, **(GOOD | change))


# --- compiled


@each_arch
def test_all_kernels_compile_and_move_values_sixteen_bytes_at_once(arch, tmp_path):
    cubins = compiled(*((spec, arch) for spec in CHANNEL_NORM.values()))
    for made in cubins:
        assert made.registers <= 96, made.name  # five programs of 4 warps on a multiprocessor
    # The residual form does all that the plain one does, and more.
    for made in (cubin for cubin in cubins if cubin.name in DISASSEMBLED):
        path = tmp_path / f"{made.name}.cubin"
        path.write_bytes(made.data)
        code = disassemble(path)
        assert re.findall(r"\bSTG(?!\.E\.128\b)\S*", code) == [], made.name
        loads = re.findall(r"\bLDG\S*", code)
        assert sum("128" not in load for load in loads) <= 2, made.name  # bias and gamma
        assert sum("128" in load for load in loads) >= 16, made.name  # x, branch, history twice


DISASSEMBLED = {f"channel_residual_norm.bf16_{channels}" for channels in (96, 384)}
