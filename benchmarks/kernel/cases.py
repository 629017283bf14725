"""The cases that kernels are measured on: inputs, a check of the result, and the work that is done.

Results are compared with the references beside the kernels, on a sample of rows where the whole
would not fit. Inputs are standard normal values, drawn anew for every size.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from benchmarks.kernel import work
from benchmarks.kernel.work import WorkOf
from engine.config import ModelConfig
from kernels import cross_attention as crossing
from kernels import gemm as product
from kernels import modulate as norm
from kernels import rope as rotation
from kernels.arch import Arch
from kernels.attention import ATTENTION, attention, attention_reference, formats
from kernels.cross_attention import CROSS_ATTENTION, cross_keys
from kernels.fp8 import Rows, quantize_rows
from kernels.gemm import GEMM, Gemm
from kernels.layout import HEAD, LOGIT_SCALE, Qkv8, quantize_qkv
from kernels.spec import Bank, KernelSpec

SAMPLE = 128  # rows that are compared
TEXT, VISION = 77, 257  # keys of cross attention; the other 435 rows of text are padding
SHORT = {torch.int8: "i8", torch.float8_e4m3fn: "fp8"}
LIMIT, ATTENTION_LIMIT = 1e-2, 0.09  # relative errors up to which a result is right

Normal = Callable[..., Tensor]  # draws standard normal values of a shape
MakeProduct = Callable[..., Tensor]


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
    work: WorkOf
    prepare: Callable[[Bank, Normal, int], KernelJob]  # for S tokens
    limit: float = LIMIT

    @property
    def group(self) -> str:
        """The name of what it does: "attention", "qkv". Cases of one group do the same work."""
        kind = self.name.partition(".")[0]
        if kind == "gemm":
            return self.name.split()[1]
        return kind if kind == "attention" else self.name


def cases(arch: Arch, model: ModelConfig) -> list[KernelCase]:
    """Everything that is compiled for an architecture."""
    found = [*_attention(model), *_products(model), *_rows(model), _cross_attention(model)]
    return [case for case in found if all(arch in spec.tuning for spec in case.specs)]


def normal(seed: int, device: torch.device) -> Normal:
    return partial(torch.randn, generator=torch.Generator(device).manual_seed(seed), device=device)


# --- products


def _products(model: ModelConfig) -> Iterator[KernelCase]:
    dim, ffn = model.dim, model.ffn
    for name, form in GEMM.items():
        qkv = partial(_to_bf16, product.gemm, product.gemm_reference, form, 3 * dim, dim)
        up = partial(_to_bf16, product.gemm_gelu, product.gemm_gelu_reference, form, ffn, dim)
        o, down = partial(_residual, form, dim, dim), partial(_residual, form, dim, ffn)
        gelu, added = (form.gelu,), (form.residual,)
        yield KernelCase(f"gemm.{name} qkv", (form.bias,), work.product(3 * dim, dim, 2), qkv)
        # x is read and written: 8 bytes a value
        yield KernelCase(f"gemm.{name} o + residual", added, work.product(dim, dim, 8), o)
        yield KernelCase(f"gemm.{name} up + gelu", gelu, work.product(ffn, dim, 2), up)
        yield KernelCase(f"gemm.{name} down + residual", added, work.product(dim, ffn, 8), down)


def _operands(form: Gemm, n: int, k: int, normal: Normal, tokens: int) -> tuple[Rows, Rows, Tensor]:
    """Draws A [S, k], B [n, k] and a bias [n]."""
    a, b = (quantize_rows(normal(rows, k), form.dtype) for rows in (tokens, n))
    return a, b, normal(n)


def _to_bf16(
    launch: MakeProduct, reference: MakeProduct, form: Gemm, n: int, k: int,
    bank: Bank, normal: Normal, tokens: int,
) -> KernelJob:  # fmt: skip
    a, b, bias = _operands(form, n, k, normal, tokens)
    run = partial(launch, bank, form, a, b, bias)
    rows = _sample(bias, tokens)
    return KernelJob(run, lambda: (run()[rows], reference(_take(a, rows), b, bias)))


def _residual(form: Gemm, n: int, k: int, bank: Bank, normal: Normal, tokens: int) -> KernelJob:
    a, b, bias = _operands(form, n, k, normal, tokens)
    gate, x = normal(n), normal(tokens, n)
    run = partial(product.gemm_residual, bank, form, a, b, bias, gate, x)
    rows = _sample(bias, tokens)

    def compare() -> tuple[Tensor, Tensor]:
        before, want = x[rows], x[rows]
        product.gemm_residual_reference(_take(a, rows), b, bias, gate, want)
        run()
        return x[rows] - before, want - before

    return KernelJob(run, compare)


# --- attention


def _attention(model: ModelConfig) -> Iterator[KernelCase]:
    done = work.self_attention(model.dim)
    for spec in ATTENTION.values():
        prepare = partial(_attend, spec, model.dim // HEAD)
        yield KernelCase(spec.name, (spec,), done, prepare, ATTENTION_LIMIT)


def _attend(spec: KernelSpec, heads: int, bank: Bank, normal: Normal, tokens: int) -> KernelJob:
    """The result is compared with exact attention, whatever the format of the kernel."""
    q, k, v = (normal(tokens, heads, HEAD) for _ in range(3))
    qk_dtype, v_dtype, v_limit = formats(spec)
    run = partial(attention, bank, spec, quantize_qkv(q, k, v, qk_dtype, v_limit, v_dtype))
    rows = _sample(q, tokens)
    return KernelJob(run, lambda: (run()[rows], attention_reference(q[rows], k, v)))


def _cross_attention(model: ModelConfig) -> KernelCase:
    dim = model.dim

    def prepare(bank: Bank, normal: Normal, tokens: int) -> KernelJob:
        q, weight = normal(tokens, dim).bfloat16(), 1 + 0.1 * normal(dim)
        text = cross_keys(normal(TEXT + 1, dim), normal(TEXT + 1, dim), weight, 512 - TEXT)
        vision = cross_keys(normal(VISION, dim), normal(VISION, dim), weight)
        inverse = rotation.rms_inverse_reference(q, dim, 1)[0]
        run = partial(crossing.cross_attention, bank, q, inverse, text, vision)
        rows = _sample(q, tokens)
        want = partial(crossing.cross_attention_reference, q[rows], inverse[rows], text, vision)
        return KernelJob(run, lambda: (run()[rows], want()))

    done = work.cross_attention(dim, TEXT + 1 + VISION)
    return KernelCase(CROSS_ATTENTION.name, (CROSS_ATTENTION,), done, prepare)


# --- rows


def _rows(model: ModelConfig) -> Iterator[KernelCase]:
    dim, ffn = model.dim, model.ffn
    for dtype, short in SHORT.items():
        spec, prepare = norm.modulate_spec(dim, dtype), partial(_modulate, dim, dtype)
        yield KernelCase(f"modulate.{short}", (spec,), work.rows(dim, 5), prepare)
        for width in (dim, ffn):
            spec, prepare = norm.quantize_spec(width, dtype), partial(_quantize, width, dtype)
            yield KernelCase(f"quantize.{short} {width}", (spec,), work.rows(width, 3), prepare)
        specs, prepare = tuple(rotation.rope_specs(dim, dtype)), partial(_rope, dim, dtype)
        yield KernelCase(f"rope.{short}", specs, work.rows(dim, 9), prepare)
    prepare = partial(_rms_inverse, dim)
    yield KernelCase(
        "rms_inverse", (rotation.rms_inverse_spec(dim, 1),), work.rows(dim, 2), prepare
    )


def _modulate(dim: int, dtype: torch.dtype, bank: Bank, normal: Normal, tokens: int) -> KernelJob:
    x, shift, scale = normal(tokens, dim), normal(dim), 0.2 * normal(dim)
    return _whole(partial(norm.modulate, bank), norm.modulate_reference, x, shift, scale, dtype)


def _quantize(width: int, dtype: torch.dtype, bank: Bank, normal: Normal, tokens: int) -> KernelJob:
    return _whole(
        partial(norm.quantize, bank), quantize_rows, normal(tokens, width).bfloat16(), dtype
    )


def _rope(dim: int, dtype: torch.dtype, bank: Bank, normal: Normal, tokens: int) -> KernelJob:
    qkv, angles = normal(tokens, 3 * dim).bfloat16(), normal(tokens, HEAD // 2)
    norms = 1 + 0.1 * normal(dim), 1 + 0.1 * normal(dim)
    tables = angles.cos(), angles.sin()
    return _whole(
        partial(rotation.rope, bank), rotation.rope_reference, qkv, *norms, *tables, dtype
    )


def _rms_inverse(dim: int, bank: Bank, normal: Normal, tokens: int) -> KernelJob:
    x = normal(tokens, dim).bfloat16()
    return _whole(partial(rotation.rms_inverse, bank), rotation.rms_inverse_reference, x, dim, 1)


def _whole(
    launch: Callable[..., object], reference: Callable[..., object], *operands: object
) -> KernelJob:
    """Compares all that a kernel makes with what its reference makes of the same operands."""
    run = partial(launch, *operands)
    return KernelJob(run, lambda: (_values(run()), _values(reference(*operands))))


# --- parts


def _sample(like: Tensor, count: int) -> Tensor:
    """Rows that are compared, the first and the last among them, on the device of `like`."""
    return torch.linspace(0, count - 1, min(count, SAMPLE), device=like.device).round().long()


def _take(rows: Rows, index: Tensor) -> Rows:
    return Rows(rows.q[index], rows.s[index])


def _values(made: object) -> Tensor:
    """The numbers that a result stands for."""
    if isinstance(made, Qkv8):
        q, k, v = made.dequantize()
        return torch.cat([q / LOGIT_SCALE, k, v])
    made = made.dequantize() if isinstance(made, Rows) else made
    assert isinstance(made, Tensor)
    return made
