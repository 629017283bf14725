"""Trials of a kernel: its error on a few tiles, and its time on a small problem.

They choose between kernels that do the same, which attention and the 8-bit products have. Both
together take a GPU some milliseconds. Inputs and definitions are computed on the CPU, since
PyTorch's libraries for a GPU take longer to start than a trial may; by one thread, since waking
many for so little takes longer than the work.
"""

import math
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import fields, replace
from typing import TypeAlias

import torch
from torch import Tensor

from kernels.attention import attention, formats, variant_reference
from kernels.fp8 import LIMITS, RowForm, Rows, quantize_rows, to_8bit
from kernels.gemm import (
    Gemm,
    gemm,
    gemm_gelu,
    gemm_gelu_reference,
    gemm_reference,
    gemm_residual,
    gemm_residual_reference,
)
from kernels.layout import HEAD, K_BLOCK, Q_BLOCK, Qkv8, quantize_qkv
from kernels.spec import Bank, KernelSpec

Way: TypeAlias = KernelSpec | Gemm  # a variant of attention, or a way to multiply
Launch: TypeAlias = Callable[[Way], object]  # one run of the timed problem

# One tile of a product, two of queries; the last of each is cut short.
CHECKED_TOKENS = 200
CHECKED_PRODUCT = (40, 256, 256)  # M, N, K
# 1280 and 640 tiles: 7 to 10 and 4 to 5 for each multiprocessor of the GPUs in question, each with
# a loop of the length it has in a real clip. About 2 ms, and 0.5 ms for each of the three endings;
# 105 and 180 MB.
TIMED_TOKENS, TIMED_HEADS = 8192, 20
TIMED_PRODUCT = (4096, 5120, 5120)

TIMED_LAUNCHES = 4  # between two events: the GPU need not wait for the host

_DRAWN = 2**16  # values; larger tensors repeat them


def specs_of(way: Way) -> tuple[KernelSpec, ...]:
    return way.specs if isinstance(way, Gemm) else (way,)


def error_of(bank: Bank, way: Way, device: torch.device) -> float:
    """Returns the relative error against the definition, for a product the largest of its three
    endings; NaN if any result is. Rounding to BF16 alone makes 2e-3. Raises what the bank raises.
    """
    with one_thread():
        if isinstance(way, Gemm):
            return _product_error(bank, way, device)
        return _attention_error(bank, way, device)


def timed_problem(bank: Bank, way: Way, device: torch.device) -> Launch:
    """Puts the problem on which all variants of a form are timed into the memory of the GPU."""
    if not isinstance(way, Gemm):
        return _attention_problem(bank, way, device)
    m, n, k = TIMED_PRODUCT
    a, b = (
        Rows(_codes(way.dtype, LIMITS[way.dtype], device, rows, k), _scales(device, rows))
        for rows in (m, n)
    )
    bias, gate, x = (torch.zeros(*shape, n, device=device) for shape in ((), (), (m,)))

    def multiply(way: Way) -> Tensor:
        """All three endings: a block needs each of them."""
        assert isinstance(way, Gemm)
        gemm_residual(bank, way, a, b, bias, gate, x)
        gemm_gelu(bank, way, a, b, bias, gate)
        return gemm(bank, way, a, b, bias)

    return multiply


def event_ms(run: Callable[[], object], launches: int = 1) -> float:
    """Times a run by the GPU's clock: milliseconds between two events on the current stream, with
    so many runs between them.
    """
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    for _ in range(launches):
        run()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / launches


def trial_ms(run: Callable[[], object]) -> float:
    """Times a variant: `TIMED_LAUNCHES` of it between two events."""
    return event_ms(run, TIMED_LAUNCHES)


@contextmanager
def one_thread() -> Iterator[None]:
    """Lets PyTorch compute with one thread of the CPU while it is open."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _attention_error(bank: Bank, spec: KernelSpec, device: torch.device) -> float:
    qk, v, v_limit = formats(spec)
    exact = _normal(_seed(spec.name), 3, CHECKED_TOKENS, 1, HEAD)
    qkv = quantize_qkv(exact[0], exact[1], exact[2], qk, v_limit, v)
    want = variant_reference(spec, bank.tuning(spec), qkv)
    tensors = {field.name: getattr(qkv, field.name) for field in fields(qkv)[:-1]}
    there = replace(qkv, **{name: tensor.to(device) for name, tensor in tensors.items()})
    return _relative_error(attention(bank, spec, there), want)


def _product_error(bank: Bank, way: Gemm, device: torch.device) -> float:
    m, n, k = CHECKED_PRODUCT
    seed = _seed(way.bias.name)
    a, b = (quantize_rows(_normal(seed + rows, rows, k), RowForm(way.dtype)) for rows in (m, n))
    b.s.mul_(0.1)  # so that GELU is neither zero nor the identity
    bias, gate = _normal(seed, 2, n)
    added = torch.zeros(m, n)
    gemm_residual_reference(a, b, bias, gate, added)
    wanted = gemm_reference(a, b, bias), gemm_gelu_reference(a, b, bias, gate), added
    a, b = (Rows(rows.q.to(device), rows.s.to(device)) for rows in (a, b))
    bias, gate, x = bias.to(device), gate.to(device), torch.zeros(m, n, device=device)
    gemm_residual(bank, way, a, b, bias, gate, x)
    made = gemm(bank, way, a, b, bias), gemm_gelu(bank, way, a, b, bias, gate), x
    errors = [_relative_error(got, want) for got, want in zip(made, wanted)]
    return math.nan if any(map(math.isnan, errors)) else max(errors)


def _relative_error(got: Tensor, want: Tensor) -> float:
    want = want.float()
    return ((got.cpu().float() - want).norm() / want.norm()).item()


def _attention_problem(bank: Bank, spec: KernelSpec, device: torch.device) -> Launch:
    qk, v, v_limit = formats(spec)
    tokens, heads = TIMED_TOKENS, TIMED_HEADS
    qkv = Qkv8(
        q=_codes(qk, LIMITS[qk], device, heads, tokens, HEAD),
        qs=_scales(device, heads, tokens // Q_BLOCK),
        k=_codes(qk, LIMITS[qk], device, heads, tokens, HEAD),
        ks=_scales(device, heads, tokens // K_BLOCK),
        vt=_codes(v, v_limit, device, heads, HEAD, tokens),
        vs=_scales(device, heads, HEAD),
        tokens=tokens,
    )

    def attend(way: Way) -> Tensor:
        assert isinstance(way, KernelSpec)
        return attention(bank, way, qkv)

    return attend


def _seed(name: str) -> int:
    """Gives each variant inputs of its own: memory that it leaves unwritten may hold the right
    result of the one before.
    """
    return zlib.crc32(name.encode())


def _normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def _codes(dtype: torch.dtype, limit: float, device: torch.device, *shape: int) -> Tensor:
    drawn = to_8bit(limit / 4 * _normal(0, _DRAWN), dtype).view(torch.uint8).to(device)
    return drawn.repeat(math.prod(shape) // _DRAWN).view(dtype).view(shape)


def _scales(device: torch.device, *shape: int) -> Tensor:
    """Returns scales that make logits as large as in a clip, or 16 times that with E4M3."""
    return torch.full(shape, 0.02, device=device)
