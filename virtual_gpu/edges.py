"""The last block of launches of the longest clip, 48,832 tokens: are its addresses right?

Only what these blocks read is drawn. The rest of tensors of gigabytes is memory that nobody
touches, so that it costs nothing; a kernel that strays there computes with zeros, and is found out.
"""

import math
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from kernels.attention import attention, formats, variant_reference
from kernels.cross_attention import (
    CROSS_ATTENTION,
    cross_attention,
    cross_keys,
    tiled_reference,
)
from kernels.fp8 import LIMITS, RowForm, Rows, quantize_rows
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
    padded_keys,
    quantize_qkv,
    unpermute_keys,
)
from kernels.modulate import MODULATE, QUANTIZE, modulate, modulate_reference, quantize
from kernels.rope import ROPE, RopeSpecs
from virtual_gpu.bank import VirtualBank
from virtual_gpu.cases import ATTENTION_LIMIT, FFN, FP32, OPS, WIDTH, row_forms
from virtual_gpu.measure import Check, draw, relative_error, wrong_codes

TOKENS = 48_832
HEADS = WIDTH // HEAD
CASE = f"{TOKENS} tokens, the last block"


def edges(bank: VirtualBank) -> Iterator[Check]:
    """Yields what the last blocks of all large launches compute."""
    try:
        yield from _rows(bank)
        yield from _products(bank)
        yield from _attention(bank)
        yield from _cross_attention(bank)
        yield from _rope(bank)
    finally:
        bank.machine.only()


def _untouched(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Returns zeros that take no memory until they are written: the system gives page by page."""
    held = np.zeros(math.prod(shape) * dtype.itemsize, np.uint8)
    return torch.from_numpy(held).view(dtype).view(shape)


def _last(count: int, rows: int) -> slice:
    return slice((count - 1) // rows * rows, count)


def _rows(bank: VirtualBank) -> Iterator[Check]:
    bank.machine.only([TOKENS - 1])
    shift, scale = (part.clone() for part in draw(2, WIDTH, seed=1))
    x = _untouched(TOKENS, WIDTH)
    x[-1] = draw(WIDTH)
    wide = _untouched(TOKENS, FFN, dtype=torch.bfloat16)
    wide[-1] = draw(FFN)
    for form in row_forms(bank.arch):
        got = modulate(bank, x, shift, scale, form)
        want = modulate_reference(x[-1:], shift, scale, form)
        yield _same_row(MODULATE[form].name, got, want)
        got = quantize(bank, wide, form)
        yield _same_row(QUANTIZE[FFN, form].name, got, quantize_rows(wide[-1:], form))


def _same_row(name: str, got: Rows, want: Rows) -> Check:
    row = Rows(got.q[-1:], got.s[-1:]).dequantize()
    return Check(name, CASE, "error", relative_error(row, want.dequantize()), 2e-3)


def _products(bank: VirtualBank) -> Iterator[Check]:
    n, k = FFN, 256
    for way in (way for way in GEMM.values() if bank.arch in way.bias.tuning):
        blocks = bank.tuning(way.bias).blocks
        height, width = blocks["BLOCK_M"], blocks["BLOCK_N"]
        rows, columns = _last(TOKENS, height), slice(n - width, n)
        bank.machine.only([-(-TOKENS // height) * (n // width) - 1])
        part = quantize_rows(draw(TOKENS - rows.start, k, seed=1), RowForm(way.dtype))
        a = Rows(_untouched(TOKENS, k, dtype=way.dtype), torch.zeros(TOKENS))
        a.q[rows], a.s[rows] = part.q, part.s
        b = quantize_rows(draw(n, k, seed=2), RowForm(way.dtype))
        bias, gate = (side.clone() for side in draw(2, n, seed=3))
        corner = (part, Rows(b.q[columns], b.s[columns]), bias[columns])
        got = gemm(bank, way, a, b, bias)[rows, columns]
        error = relative_error(got, gemm_reference(*corner))
        yield Check(way.bias.name, CASE, "error", error, 1e-4)
        got = gemm_gelu(bank, way, a, b, bias, gate)[rows, columns]
        error = relative_error(got, gemm_gelu_reference(*corner, gate[columns]))
        yield Check(way.gelu.name, CASE, "error", error, 2e-4)
        x, want = _untouched(TOKENS, n), torch.zeros(TOKENS - rows.start, width)
        gemm_residual(bank, way, a, b, bias, gate, x)
        gemm_residual_reference(*corner, gate[columns], want)
        error = relative_error(x[rows, columns], want)
        yield Check(way.residual.name, CASE, "error", error, 8 * FP32)


def _attention(bank: VirtualBank) -> Iterator[Check]:
    q, k, v = draw(3, TOKENS, 1, HEAD)
    for spec in OPS["attention"].specs(bank.arch):
        dtype, v_dtype, limit = formats(spec)
        tiles = bank.tuning(spec).blocks
        one = quantize_qkv(q, k, v, dtype, limit, v_dtype)
        all_heads = _with_heads(one)
        rows = _last(TOKENS, tiles["BLOCK_Q"])
        bank.machine.only([-(-TOKENS // tiles["BLOCK_Q"]) * HEADS - 1])
        got = attention(bank, spec, all_heads)[rows, -HEAD:]
        last = replace(one, q=one.q[:, rows], qs=one.qs[:, rows.start // Q_BLOCK :])
        want = variant_reference(spec, bank.tuning(spec), last).bfloat16()
        yield Check(spec.name, CASE, "error", relative_error(got, want), ATTENTION_LIMIT)


def _with_heads(one: Qkv8) -> Qkv8:
    """Returns operands of all heads, of which the last is that of `one`."""

    def widened(side: Tensor) -> Tensor:
        held = _untouched(HEADS, *side.shape[1:], dtype=side.dtype)
        held[-1:] = side
        return held

    parts = {name: widened(getattr(one, name)) for name in ("q", "qs", "k", "ks", "vt", "vs")}
    return Qkv8(**parts, tokens=one.tokens)


def _cross_attention(bank: VirtualBank) -> Iterator[Check]:
    rows = _last(TOKENS, bank.tuning(CROSS_ATTENTION).blocks["BLOCK_Q"])
    height = bank.tuning(CROSS_ATTENTION).blocks["BLOCK_Q"]
    bank.machine.only([-(-TOKENS // height) * HEADS - 1])
    q, inverse = _untouched(TOKENS, WIDTH, dtype=torch.bfloat16), torch.zeros(TOKENS)
    q[rows], inverse[rows] = 3 * draw(TOKENS - rows.start, WIDTH).bfloat16(), 0.3
    weight = torch.ones(WIDTH)
    text, vision = (
        cross_keys(draw(count, WIDTH, seed=count), draw(count, WIDTH, seed=1), weight)
        for count in (65, 257)
    )
    got = cross_attention(bank, q, inverse, text, vision)[rows, -HEAD:]
    tuning = bank.tuning(CROSS_ATTENTION)
    want = tiled_reference(tuning, q[rows], inverse[rows], text, vision)[:, -HEAD:]
    yield Check(CROSS_ATTENTION.name, CASE, "error", relative_error(got, want), ATTENTION_LIMIT)


def _rope(bank: VirtualBank) -> Iterator[Check]:
    """Launches each kernel by itself: what it needs of the others is drawn."""
    qkv = _untouched(TOKENS, 3 * WIDTH, dtype=torch.bfloat16)
    rows = _last(TOKENS, Q_BLOCK)
    qkv[rows] = draw(TOKENS - rows.start, 3 * WIDTH).bfloat16()
    inverse = torch.ones(2, TOKENS)
    weight = 1 + 0.3 * draw(WIDTH, seed=1)
    angles = torch.zeros(TOKENS, HEAD // 2)
    angles[rows] = 3 * draw(TOKENS - rows.start, HEAD // 2, seed=2)
    tables = (angles.cos(), angles.sin())
    for qk, v in sorted({formats(s)[:2] for s in OPS["attention"].specs(bank.arch)}, key=str):
        specs = ROPE[qk, v]
        yield from _queries_and_keys(bank, specs, qk, qkv, inverse, weight, tables)
        yield _values(bank, specs, v, qkv)


def _queries_and_keys(
    bank: VirtualBank,
    specs: RopeSpecs,
    dtype: torch.dtype,
    qkv: Tensor,
    inverse: Tensor,
    weight: Tensor,
    tables: tuple[Tensor, Tensor],
) -> Iterator[Check]:
    keys = padded_keys(TOKENS)
    mean = draw(WIDTH, seed=3)
    for spec, rows, count, column in (
        (specs.queries, Q_BLOCK, TOKENS, 0), (specs.keys, K_BLOCK, keys, WIDTH)
    ):  # fmt: skip
        blocks, groups = -(-count // rows), HEADS // bank.tuning(spec).blocks["HEADS"]
        live = _last(TOKENS, rows)
        number = live.start // rows  # of the last block with a token
        bank.machine.only([blocks * (groups - 1) + number])
        codes = _untouched(HEADS, count, HEAD, dtype=dtype)
        scales = torch.zeros(HEADS, blocks)
        extra = () if spec is specs.queries else (mean,)
        given = (qkv, inverse, weight, *tables, *extra, codes, scales, TOKENS)
        bank.launch(spec, (blocks, groups), *given)
        x = qkv[live, column + WIDTH - HEAD : column + WIDTH].double() * weight[-HEAD:].double()
        cos, sin = (table[live].double() for table in tables)
        even, odd = x[:, 0::2], x[:, 1::2]
        want = torch.stack([even * cos - odd * sin, odd * cos + even * sin], -1).flatten(1)
        if extra:
            want = want - mean[-HEAD:].double()
        if dtype == torch.int8:
            want = mix(want)
        scale = want.abs().max() / LIMITS[dtype]
        found = scales[-1, number].double() / (1 if extra else LOGIT_SCALE)
        wrong = wrong_codes(codes[-1, live], want / scale, 32 * FP32)
        yield Check(spec.name, CASE, "wrong codes", wrong, 0)
        error = abs(found / scale - 1).item()
        yield Check(spec.name, CASE, "error of scales", error, 16 * FP32)


def _values(bank: VirtualBank, specs: RopeSpecs, dtype: torch.dtype, qkv: Tensor) -> Check:
    keys, block = padded_keys(TOKENS), bank.tuning(specs.values).blocks["BLOCK"]
    peaks = qkv[-block:, 2 * WIDTH :].float().abs().amax(0)
    scales = peaks / LIMITS[dtype]
    codes = _untouched(HEADS, HEAD, keys, dtype=dtype)
    blocks = keys // block
    bank.machine.only([blocks * HEADS - 1])
    bank.launch(specs.values, (blocks, HEADS), qkv, scales, codes, TOKENS)
    live = _last(TOKENS, block)
    got = unpermute_keys(codes[-1, :, (blocks - 1) * block :])[:, : TOKENS - live.start]
    want = qkv[live, -HEAD:].double().T / scales[-HEAD:].double()[:, None]
    wrong = wrong_codes(got.contiguous(), want.contiguous(), 2 * FP32)
    return Check(specs.values.name, CASE, "wrong codes", wrong, 0)
