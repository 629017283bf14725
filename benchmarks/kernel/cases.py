"""The cases that kernels are measured on: inputs, a check of the result, and the work that is done.

Results are compared with the references beside the kernels, on a sample of rows where the whole
would not fit. Inputs are standard normal values, drawn anew for every size.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from engine.config import ModelConfig
from kernels.arch import Arch
from kernels.attention import ATTENTION, attention, attention_reference, formats
from kernels.cross_attention import (
    CROSS_ATTENTION,
    cross_attention,
    cross_attention_reference,
    cross_keys,
)
from kernels.fp8 import Rows, quantize_rows
from kernels.gemm import (
    GEMM,
    Gemm,
    gemm,
    gemm_gelu,
    gemm_gelu_reference,
    gemm_reference,
    gemm_residual,
    gemm_residual_reference,
)
from kernels.layout import HEAD, LOGIT_SCALE, Qkv8, quantize_qkv
from kernels.modulate import (
    modulate,
    modulate_reference,
    modulate_spec,
    quantize,
    quantize_spec,
)
from kernels.rope import rms_inverse, rms_inverse_spec, rope, rope_reference, rope_specs
from kernels.spec import Bank, KernelSpec

SAMPLE = 128  # rows that are compared
TEXT, VISION = 77, 257  # keys of cross attention; the other 435 rows of text are padding
SHORT = {torch.int8: "i8", torch.float8_e4m3fn: "fp8"}


@dataclass(frozen=True, slots=True)
class KernelJob:
    """A kernel and tensors for it, in memory."""

    run: Callable[[], object]
    compare: Callable[[], tuple[Tensor, Tensor]]  # runs once: what came out, what should have


@dataclass(frozen=True, slots=True)
class KernelCase:
    """A kernel, or the few that do one thing together, at the sizes of a model."""

    name: str
    specs: tuple[KernelSpec, ...]
    limit: float  # relative error up to which a result is right
    flop: Callable[[int], float]  # for S tokens
    moved: Callable[[int], float]  # bytes: every input read once, every output written once
    prepare: Callable[[Bank, int, torch.device], KernelJob]


def cases(arch: Arch, model: ModelConfig) -> list[KernelCase]:
    """Everything that is compiled for an architecture."""
    found = [
        *_attention(model), *_gemm(model), *_row_kernels(model), _cross_attention(model),
    ]  # fmt: skip
    return [case for case in found if all(arch in spec.tuning for spec in case.specs)]


# --- products


def _gemm(model: ModelConfig) -> Iterator[KernelCase]:
    dim, ffn = model.dim, model.ffn
    for name, form in GEMM.items():
        yield _product(f"gemm.{name} qkv", form, form.bias, 3 * dim, dim)
        yield _product(f"gemm.{name} o + residual", form, form.residual, dim, dim)
        yield _product(f"gemm.{name} up + gelu", form, form.gelu, ffn, dim)
        yield _product(f"gemm.{name} down + residual", form, form.residual, dim, ffn)


def _product(name: str, form: Gemm, spec: KernelSpec, n: int, k: int) -> KernelCase:
    written = 8 if spec is form.residual else 2  # bytes a value: x is read and written

    def prepare(bank: Bank, tokens: int, device: torch.device) -> KernelJob:
        normal = _normal(tokens, device)
        a, b = (quantize_rows(normal(rows, k), form.dtype) for rows in (tokens, n))
        bias, gate = normal(n), normal(n)
        if spec is form.residual:
            return _residual_job(bank, form, a, b, bias, gate, normal(tokens, n))
        launch, reference = (
            (gemm, gemm_reference) if spec is form.bias else (gemm_gelu, gemm_gelu_reference)
        )
        run = partial(launch, bank, form, a, b, bias)
        rows = _sample(tokens, device)

        def compare() -> tuple[Tensor, Tensor]:
            return run()[rows], reference(_take(a, rows), b, bias)

        return KernelJob(run, compare)

    return KernelCase(
        name, (spec,), 1e-2,
        flop=lambda s: 2.0 * s * n * k,
        moved=lambda s: float(s * k + n * k + written * s * n),
        prepare=prepare,
    )  # fmt: skip


def _residual_job(
    bank: Bank, form: Gemm, a: Rows, b: Rows, bias: Tensor, gate: Tensor, x: Tensor
) -> KernelJob:
    run = partial(gemm_residual, bank, form, a, b, bias, gate, x)
    rows = _sample(len(x), x.device)

    def compare() -> tuple[Tensor, Tensor]:
        before, want = x[rows], x[rows]
        gemm_residual_reference(_take(a, rows), b, bias, gate, want)
        run()
        return x[rows] - before, want - before

    return KernelJob(run, compare)


# --- attention


def _attention(model: ModelConfig) -> Iterator[KernelCase]:
    for spec in ATTENTION.values():
        qk, v, v_limit = formats(spec)

        def prepare(
            bank: Bank,
            tokens: int,
            device: torch.device,
            spec: KernelSpec = spec,
            form: tuple[torch.dtype, float, torch.dtype] = (qk, v_limit, v),
        ) -> KernelJob:
            normal = _normal(tokens, device)
            q, k, values = (normal(tokens, model.dim // HEAD, HEAD) for _ in range(3))
            qkv = quantize_qkv(q, k, values, *form)
            run = partial(attention, bank, spec, qkv)
            rows = _sample(tokens, device)

            def compare() -> tuple[Tensor, Tensor]:
                return run()[rows], attention_rows(q[rows], k, values)

            return KernelJob(run, compare)

        yield KernelCase(
            spec.name, (spec,), 0.09,
            flop=lambda s: 4.0 * s * s * model.dim,
            moved=lambda s: 5.0 * s * model.dim,
            prepare=prepare,
        )  # fmt: skip


def attention_rows(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Exact attention of some queries [R, N, K], head by head: FP64 logits need much memory."""
    heads = [
        attention_reference(q[:, n : n + 1], k[:, n : n + 1], v[:, n : n + 1])
        for n in range(q.shape[1])
    ]
    return torch.cat(heads, dim=1)


def _cross_attention(model: ModelConfig) -> KernelCase:
    dim = model.dim
    keys = TEXT + 1 + VISION

    def prepare(bank: Bank, tokens: int, device: torch.device) -> KernelJob:
        normal = _normal(tokens, device)
        q, weight = normal(tokens, dim).bfloat16(), 1 + 0.1 * normal(dim)
        text = cross_keys(normal(TEXT + 1, dim), normal(TEXT + 1, dim), weight, 512 - TEXT)
        vision = cross_keys(normal(VISION, dim), normal(VISION, dim), weight)
        inverse = q.float().square().mean(dim=1).add(1e-6).rsqrt()
        run = partial(cross_attention, bank, q, inverse, text, vision)
        rows = _sample(tokens, device)

        def compare() -> tuple[Tensor, Tensor]:
            return run()[rows], cross_attention_reference(q[rows], inverse[rows], text, vision)

        return KernelJob(run, compare)

    return KernelCase(
        CROSS_ATTENTION.name, (CROSS_ATTENTION,), 1e-2,
        flop=lambda s: 4.0 * s * keys * dim,
        moved=lambda s: 4.0 * s * dim + 8.0 * keys * dim,
        prepare=prepare,
    )  # fmt: skip


# --- rows


def _row_kernels(model: ModelConfig) -> Iterator[KernelCase]:
    dim, ffn = model.dim, model.ffn
    for dtype, short in SHORT.items():
        spec = modulate_spec(dim, dtype)
        yield _rows(f"modulate.{short}", (spec,), 5 * dim, partial(_modulate, dim, dtype))
        for width in (dim, ffn):
            spec = quantize_spec(width, dtype)
            prepare = partial(_quantize, width, dtype)
            yield _rows(f"quantize.{short} {width}", (spec,), 3 * width, prepare)
        yield _rows(
            f"rope.{short}", tuple(rope_specs(dim, dtype)), 9 * dim, partial(_rope, dim, dtype)
        )
    spec = rms_inverse_spec(dim, 1)
    yield _rows("rms_inverse", (spec,), 2 * dim, partial(_rms_inverse, dim))


def _rows(
    name: str,
    specs: tuple[KernelSpec, ...],
    moved: int,
    prepare: Callable[[Bank, int, torch.device], KernelJob],
) -> KernelCase:
    return KernelCase(name, specs, 1e-2, lambda _: 0.0, lambda s: float(s * moved), prepare)


def _modulate(
    dim: int, dtype: torch.dtype, bank: Bank, tokens: int, device: torch.device
) -> KernelJob:
    normal = _normal(tokens, device)
    x, shift, scale = normal(tokens, dim), normal(dim), 0.2 * normal(dim)
    run = partial(modulate, bank, x, shift, scale, dtype)
    want = partial(modulate_reference, x, shift, scale, dtype)
    return KernelJob(run, lambda: (run().dequantize(), want().dequantize()))


def _quantize(
    width: int, dtype: torch.dtype, bank: Bank, tokens: int, device: torch.device
) -> KernelJob:
    x = _normal(tokens, device)(tokens, width).bfloat16()
    run = partial(quantize, bank, x, dtype)
    return KernelJob(run, lambda: (run().dequantize(), quantize_rows(x, dtype).dequantize()))


def _rope(dim: int, dtype: torch.dtype, bank: Bank, tokens: int, device: torch.device) -> KernelJob:
    normal = _normal(tokens, device)
    qkv = normal(tokens, 3 * dim).bfloat16()
    norm_q, norm_k = 1 + 0.1 * normal(dim), 1 + 0.1 * normal(dim)
    angles = normal(tokens, HEAD // 2)
    operands = qkv, norm_q, norm_k, angles.cos(), angles.sin()
    run = partial(rope, bank, *operands, dtype)

    def compare() -> tuple[Tensor, Tensor]:
        return _qkv_values(run()), _qkv_values(rope_reference(*operands, dtype))

    return KernelJob(run, compare)


def _rms_inverse(dim: int, bank: Bank, tokens: int, device: torch.device) -> KernelJob:
    x = _normal(tokens, device)(tokens, dim).bfloat16()
    run = partial(rms_inverse, bank, x, dim, 1)
    return KernelJob(run, lambda: (run()[0], x.float().square().mean(dim=1).add(1e-6).rsqrt()))


# --- parts


def _normal(seed: int, device: torch.device) -> Callable[..., Tensor]:
    return partial(torch.randn, generator=torch.Generator(device).manual_seed(seed), device=device)


def _sample(count: int, device: torch.device) -> Tensor:
    """Rows that are compared, the first and the last among them."""
    return torch.linspace(0, count - 1, min(count, SAMPLE), device=device).round().long()


def _take(rows: Rows, index: Tensor) -> Rows:
    return Rows(rows.q[index], rows.s[index])


def _qkv_values(qkv: Qkv8) -> Tensor:
    q, k, v = qkv.dequantize()
    return torch.cat([q / LOGIT_SCALE, k, v])
