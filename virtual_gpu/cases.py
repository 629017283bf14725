"""Every kernel of the 14B model against its reference, within limits as tight as the arithmetic.

An `Op` launches some kernels of the table at the sizes that it is asked for, and yields what it
measured. Sums come out in another order than the references', so that values are compared by their
relative error, and 8-bit codes by whether they are the nearest to a value that close to the exact
one: none may be another.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

from kernels.arch import Arch
from kernels.attention import ATTENTION, attention, formats, variant_reference
from kernels.channel_norm import CHANNEL_NORM, channel_norm, channel_norm_reference
from kernels.cross_attention import (
    CROSS_ATTENTION,
    CrossKeys,
    cross_attention,
    cross_keys,
    tiled_reference,
)
from kernels.fp8 import FORMS, RowForm, Rows, quantize_rows, rotate
from kernels.gemm import (
    GEMM,
    gemm,
    gemm_gelu,
    gemm_gelu_reference,
    gemm_reference,
    gemm_residual,
    gemm_residual_reference,
)
from kernels.layout import (
    HEAD,
    K_BLOCK,
    LOGIT_SCALE,
    Q_BLOCK,
    Qkv8,
    mix,
    quantize_qkv,
    unpermute_keys,
)
from kernels.modulate import (
    EPS,
    MODULATE,
    QUANTIZE,
    modulate,
    modulate_reference,
    quantize,
)
from kernels.ops import native_specs
from kernels.rope import (
    RMS_INVERSE,
    ROPE,
    rms_inverse,
    rms_inverse_reference,
    rope,
    rope_reference,
)
from kernels.spec import Bank, KernelSpec
from virtual_gpu.measure import Check, draw, relative_error, wrong_codes

WIDTH, FFN = 5120, 13824  # of the 14B model
QUICK = (130,)
ODD = (1, 17, 127, 129, 300)

FP32 = 2.0**-23

Wanted: TypeAlias = Callable[[KernelSpec], bool]


@dataclass(frozen=True, slots=True)
class Op:
    specs: Callable[[Arch], list[KernelSpec]]  # what `run` launches
    # at these numbers of tokens; of these kernels, or of others too where several make one result
    run: Callable[[Bank, Arch, Sequence[int], Wanted], Iterator[Check]]


def every(spec: KernelSpec) -> bool:
    return True


def table(arch: Arch) -> list[KernelSpec]:
    """Returns all kernels of a package of the 14B model."""
    return native_specs(WIDTH, FFN, FORMS, arch)


# --- rows


def row_forms(arch: Arch) -> list[RowForm]:
    """Returns the forms of rows that an architecture multiplies."""
    return [form for form in FORMS if form.codes in arch.codes]


def _row_specs(arch: Arch) -> list[KernelSpec]:
    found = [*MODULATE.values(), *QUANTIZE.values(), RMS_INVERSE]
    return [spec for spec in found if spec in table(arch)]


def _rows(bank: Bank, arch: Arch, tokens: Sequence[int], wanted: Wanted) -> Iterator[Check]:
    for count in sorted({min(size, 17) for size in tokens}):
        x = 3 * draw(count, WIDTH) + 0.5
        shift, scale = draw(2, WIDTH, seed=1)
        for form in row_forms(arch):
            if wanted(MODULATE[form]):
                got = modulate(bank, x, shift.clone(), scale.clone(), form)
                yield from _modulated(got, x, shift, scale)
            for width in (width for width in (WIDTH, FFN) if wanted(QUANTIZE[width, form])):
                branch = draw(count, width, seed=2).bfloat16()
                branch[-1] *= count == 1  # a row of zeros
                yield from _quantized(quantize(bank, branch, form), branch)
        if not wanted(RMS_INVERSE):
            continue
        branch = draw(count, WIDTH, seed=2).bfloat16()
        error = relative_error(
            rms_inverse(bank, branch, WIDTH, 1), rms_inverse_reference(branch, WIDTH, 1)
        )
        yield Check(RMS_INVERSE.name, f"{count} rows", "error", error, 4 * FP32)


def _modulated(got: Rows, x: Tensor, shift: Tensor, scale: Tensor) -> Iterator[Check]:
    case, form = f"{len(x)} rows", got.form
    name = MODULATE[form].name
    want = modulate_reference(x, shift, scale, form)
    yield Check(name, case, "error of scales", relative_error(got.s, want.s), 8 * FP32)
    exact = x.double() - x.double().mean(1, keepdim=True)
    exact = exact / (exact.square().mean(1, keepdim=True) + EPS).sqrt() * (1 + scale) + shift
    exact = rotate(exact) if form.rotated else exact
    exact = exact / exact.abs().amax(1, keepdim=True) * form.limit
    yield Check(name, case, "wrong codes", wrong_codes(got.q, exact, 16 * FP32), 0)


def _quantized(got: Rows, x: Tensor) -> Iterator[Check]:
    """The formula of the kernel, in the precision of the kernel: not a code may differ. Sums of a
    rotation have an order of their own.
    """
    form = got.form
    name, case = QUANTIZE[x.shape[1], form].name, f"{len(x)} rows"
    want = quantize_rows(x, form)
    limit = (8 if form.rotated else 1) * FP32
    yield Check(name, case, "error of scales", relative_error(got.s, want.s), limit)
    if form.rotated:
        exact = rotate(x.double())
        exact = exact / exact.abs().amax(1, keepdim=True).clamp_min(1e-12) * form.limit
        yield Check(name, case, "wrong codes", wrong_codes(got.q, exact, 16 * FP32), 0)
        return
    peak = x.float().abs().amax(1, keepdim=True).clamp_min(1e-12)
    factor = torch.full_like(peak, form.limit) / peak  # `1.0 / x` would be two roundings
    # INT8 may be rounded once (fused multiply-add) or twice
    exact = x.double() * factor if form.dtype == torch.int8 else x.float() * factor
    yield Check(name, case, "wrong codes", wrong_codes(got.q, exact.double(), FP32 / 2), 0)


# --- rope


def _rope_specs(arch: Arch) -> list[KernelSpec]:
    known = table(arch)
    return [s for s in {s.name: s for specs in ROPE.values() for s in specs}.values() if s in known]


def _rope(bank: Bank, arch: Arch, tokens: Sequence[int], wanted: Wanted) -> Iterator[Check]:
    forms = sorted({formats(spec) for spec in _attention_specs(arch)}, key=str)
    forms = [form for form in forms if any(map(wanted, ROPE[form[:2]]))]
    for count in tokens:
        qkv = (draw(count, 3 * WIDTH) + 0.3 * draw(1, 3 * WIDTH, seed=1)).bfloat16()
        norm_q, norm_k = (part.clone() for part in 1 + 0.3 * draw(2, WIDTH, seed=2))
        angles = 3 * draw(count, HEAD // 2, seed=3)
        given = (qkv, norm_q, norm_k, angles.cos(), angles.sin())
        exact = _exact_heads(*given)
        for qk, v, v_limit in forms:
            got = rope(bank, *given, qk, v_limit, v)
            want = rope_reference(*given, qk, v_limit, v)
            yield from _roped(got, want, exact, qk, v)


def _exact_heads(
    qkv: Tensor, norm_q: Tensor, norm_k: Tensor, cos: Tensor, sin: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns q and k after norm and rotation, q in units of log2, k without its mean, and v:
    [N, S, K] fp64 each.
    """
    q, k, v = (part.unflatten(1, (-1, HEAD)).transpose(0, 1) for part in qkv.double().chunk(3, 1))

    def rotated(x: Tensor, weight: Tensor) -> Tensor:
        mean = x.square().mean((0, 2), keepdim=True)
        x = x / (mean + EPS).sqrt() * weight.double().unflatten(0, (-1, 1, HEAD))
        even, odd = x[..., 0::2], x[..., 1::2]
        turned = [even * cos - odd * sin, odd * cos + even * sin]
        return torch.stack(turned, dim=-1).flatten(-2)

    k = rotated(k, norm_k)
    return rotated(q, norm_q) * LOGIT_SCALE, k - k.mean(1, keepdim=True), v


def _roped(
    got: Qkv8, want: Qkv8, exact: Sequence[Tensor], qk: torch.dtype, v_dtype: torch.dtype
) -> Iterator[Check]:
    specs, count = ROPE[qk, v_dtype], got.tokens
    case = f"{count} tokens"
    q, k, v = exact
    if qk == torch.int8:
        q, k = mix(q), mix(k)
    scales = [(specs.queries, got.qs, want.qs, 8), (specs.combine, got.vs, want.vs, 1)]
    if count > 1:  # of one key its mean is taken, and rounding is left
        scales.append((specs.keys, got.ks, want.ks, 32))
    for spec, found, right, limit in scales:
        error = relative_error(found, right)
        yield Check(spec.name, case, "error of scales", error, limit * FP32)
    spread = got.qs.double().repeat_interleave(Q_BLOCK, 1)[:, :count, None]
    wrong = wrong_codes(got.q, q / spread, 24 * FP32)
    yield Check(specs.queries.name, case, "wrong codes", wrong, 0)
    if count > 1:
        spread = got.ks.double().repeat_interleave(K_BLOCK, 1)[:, :count, None]
        wrong = wrong_codes(got.k[:, :count], k / spread, 64 * FP32)
        yield Check(specs.keys.name, case, "wrong codes", wrong, 0)
    values = unpermute_keys(got.vt).mT.contiguous()
    wrong = wrong_codes(values[:, :count].contiguous(), v / got.vs.double()[:, None], 2 * FP32)
    yield Check(specs.values.name, case, "wrong codes", wrong, 0)
    for spec, codes in ((specs.keys, got.k), (specs.values, values)):
        padding = codes[:, count:].float().abs().sum().item()
        yield Check(spec.name, case, "padding", padding, 0)


# --- attention

# The reference has the sums, the maxima and the rounding of the kernel, so that nearly all of BF16
# is equal: of 128 values one that is tipped over is 3e-4.
ATTENTION_LIMIT = 5e-4


def _attention_specs(arch: Arch) -> list[KernelSpec]:
    return [spec for spec in ATTENTION.values() if arch in spec.tuning]


def attention_operands(spec: KernelSpec, tokens: int, heads: int = 1) -> Qkv8:
    """Draws keys with a strong mean, and values of another size in each channel."""
    dtype, v_dtype, limit = formats(spec)
    q, k, v = draw(3, tokens, heads, HEAD, seed=tokens)
    k = k + 2 * draw(1, heads, HEAD, seed=1)
    v = v * torch.exp(draw(1, heads, HEAD, seed=2))
    return quantize_qkv(q, k, v, dtype, limit, v_dtype)


def attention_error(bank: Bank, spec: KernelSpec, qkv: Qkv8, queries: int | None = None) -> float:
    want = variant_reference(spec, bank.tuning(spec), qkv, queries).bfloat16()
    return relative_error(attention(bank, spec, qkv, queries), want)


def _attention(bank: Bank, arch: Arch, tokens: Sequence[int], wanted: Wanted) -> Iterator[Check]:
    for spec in filter(wanted, _attention_specs(arch)):
        cases = [(count, 1, None) for count in tokens]
        cases += [(300, 3, 131), (257, 2, 1)] if len(tokens) > 1 else []
        for count, heads, queries in cases:
            qkv = attention_operands(spec, count, heads)
            error = attention_error(bank, spec, qkv, queries)
            case = f"{count} tokens, {heads} heads, {queries or count} queries"
            yield Check(spec.name, case, "error", error, ATTENTION_LIMIT)
        if len(tokens) > 1:
            yield from _flat(bank, spec)


def _flat(bank: Bank, spec: KernelSpec) -> Iterator[Check]:
    """Every weight and value is as large as can be: sums in FP16 must not overflow."""
    dtype, v_dtype, limit = formats(spec)
    zeros, threes = torch.zeros(384, 1, HEAD), torch.full((384, 1, HEAD), 3.0)
    got = attention(bank, spec, quantize_qkv(zeros, zeros, threes, dtype, limit, v_dtype))
    error = relative_error(got, torch.full((384, HEAD), 3.0).bfloat16())
    yield Check(spec.name, "384 equal keys", "error", error, 1e-6)


# --- products


def _gemm_specs(arch: Arch) -> list[KernelSpec]:
    return [s for way in GEMM.values() for s in way.specs if arch in s.tuning]


def gemm_operands(dtype: torch.dtype, m: int, n: int, k: int) -> tuple[Rows, Rows, Tensor, Tensor]:
    """Draws A and B with rows of other sizes, bias and gate."""
    a, b = (
        quantize_rows(draw(rows, k, seed=s) * torch.exp(draw(rows, 1, seed=s + 1)), RowForm(dtype))
        for s, rows in ((m, m), (m + 7, n))
    )
    bias, gate = (part.clone() for part in draw(2, n, seed=3))
    return a, b, bias, gate


def _gemm(bank: Bank, arch: Arch, tokens: Sequence[int], wanted: Wanted) -> Iterator[Check]:
    sizes = [(m, 256, 384) for m in tokens]
    sizes += [(129, 512, 128), (17, 256, 1024), (1100, 512, 128)] if len(tokens) > 1 else []
    for way in (way for way in GEMM.values() if arch in way.bias.tuning):
        for m, n, k in sizes:
            a, b, bias, gate = gemm_operands(way.dtype, m, n, k)
            case = f"{m} x {n} x {k}"
            if wanted(way.bias):
                error = relative_error(gemm(bank, way, a, b, bias), gemm_reference(a, b, bias))
                yield Check(way.bias.name, case, "error", error, 1e-4)
            if wanted(way.gelu):
                got = gemm_gelu(bank, way, a, b, bias, gate)
                want = gemm_gelu_reference(a, b, bias, gate)
                yield Check(way.gelu.name, case, "error", relative_error(got, want), 2e-4)
            if wanted(way.residual):
                x = draw(m, n, seed=4)
                want = x.clone()
                gemm_residual(bank, way, a, b, bias, gate, x)
                gemm_residual_reference(a, b, bias, gate, want)
                yield Check(way.residual.name, case, "error", relative_error(x, want), 8 * FP32)


# --- cross attention


def _cross_attention(
    bank: Bank, arch: Arch, tokens: Sequence[int], wanted: Wanted
) -> Iterator[Check]:
    width = 2 * HEAD
    contexts = ((1, 512), (64, 449), (65, 1)) if len(tokens) > 1 else ((65, 448),)
    for count in tokens:
        for rows, repeats in contexts:
            q = 3 * draw(count, width, seed=count).bfloat16()
            text, vision = (_context(*size) for size in ((rows, repeats, 1), (257, 1, 2)))
            given = (q, rms_inverse_reference(q, width, 1)[0], text, vision)
            want = tiled_reference(bank.tuning(CROSS_ATTENTION), *given)
            error = relative_error(cross_attention(bank, *given), want)
            case = f"{count} tokens, {rows} rows of text"
            yield Check(CROSS_ATTENTION.name, case, "error", error, ATTENTION_LIMIT)


def _context(rows: int, repeats: int, seed: int) -> CrossKeys:
    k, v = draw(2, rows, 2 * HEAD, seed=seed)
    weight = torch.rand(2 * HEAD, generator=torch.Generator().manual_seed(seed)) + 0.5
    return cross_keys(k, v, weight, repeats)


# --- the VAE's norm


def _channel_norm(bank: Bank, arch: Arch, tokens: Sequence[int], wanted: Wanted) -> Iterator[Check]:
    sizes = ((1, 3, 5), (2, 7, 5), (4, 5, 13)) if len(tokens) > 1 else ((2, 7, 5),)
    for (channels, dtype, has_branch), spec in CHANNEL_NORM.items():
        if not wanted(spec):
            continue
        for frames, height, width in sizes:
            shape = (frames, height, width, channels)
            x, branch = draw(2, *shape, seed=frames).to(dtype)
            bias, gamma = (part.clone() for part in draw(2, channels, seed=1))
            history = draw(2, *shape[1:], seed=2).to(dtype)
            window = torch.full((2 + frames, *shape[1:]), math.nan, dtype=dtype)
            made, want = ((x.clone(), window.clone(), history.clone()) for _ in range(2))
            rest = (branch if has_branch else None, bias, gamma)
            channel_norm(bank, made[0], *rest, *made[1:])
            channel_norm_reference(want[0], *rest, *want[1:])
            case = f"{frames} x {height} x {width}"
            changed = float((made[0] != want[0]).sum())
            yield Check(spec.name, case, "values of x that differ", changed, 0)
            limit = 2.0 ** (-12 if dtype == torch.float16 else -9)
            error = relative_error(made[1], want[1])
            yield Check(spec.name, case, "error", error, limit)
            kept = float((made[2] != made[1][-2:]).sum())
            yield Check(spec.name, case, "values of the history that differ", kept, 0)


OPS = {
    "rows": Op(_row_specs, _rows),
    "rope": Op(_rope_specs, _rope),
    "attention": Op(_attention_specs, _attention),
    "gemm": Op(_gemm_specs, _gemm),
    "cross_attention": Op(lambda arch: [CROSS_ATTENTION], _cross_attention),
    "channel_norm": Op(lambda arch: [*CHANNEL_NORM.values()], _channel_norm),
}


def op_of(spec: KernelSpec, arch: Arch) -> Op:
    """Returns the op that launches a kernel of the table."""
    return next(op for op in OPS.values() if spec in op.specs(arch))
