"""Self attention of 8-bit queries, keys and values in one pass over the keys.

    x = (q8 . k8) * qs * ks               logits in units of log2; of padding exactly 0
    w = limit * exp2(x - base)            base: each query's largest x so far, or of this iteration
    o = sum(round8(w) * vt) * vs / sum(w)       both sums carried on over iterations

Shapes    `kernels.layout.Qkv8` of N heads over S tokens -> o [S, N * K] bf16
Numerics  logits INT32 or FP32, softmax FP32, weights 8 bits, o FP32. What padded keys add to the
          sum of weights is known, limit * exp2(-base) each, and taken out at the end: no tile is
          masked.

Three forms, by the formats of q and k, and of w and v:

`int8fp8`  The default where tensor cores know E4M3 (`Arch.attention`). That has the same relative
           error at every size, so `base` is the maximum so far. Its three bits, in w and v, are
           what limits it.
`int8`     The default elsewhere. Even steps of 1/127 of the largest weight, so `base` is that of
           the iteration, at least `REACH` below the largest so far: scaled to that of all keys,
           small weights would vanish. Half the error on normal values (more on such with rare
           outliers), exact sums at full rate on every GPU, and a conversion of each iteration's.
`fp8`      Logits are three times less exact than with INT8, and need no conversion.

What is summed in a tensor core (`SUM`):

`fp32`     Ada and Hopper keep about 14 bits of a sum of FP8 products, too few for 50 000 keys. So
           each iteration's sum starts at zero and meets o outside, in the multiply-add that moves
           o to its new `base` and has to be done anyway.
`fp16`     The same with sums in FP16, which a GeForce of Ada forms at twice the rate. v is scaled
           so that 128 keys cannot overflow (`kernels.layout.V_LIMIT_FP16`).
`scaled`   Block-scaled products with scales of one sum in true FP32 at full rate: o is their
           accumulator.
`int32`    Exact.

Sources: docs/reference/kernels.md 2, docs/reference/performance.md 0 and D.
"""

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from kernels.arch import SM80, SM86, SM89, SM90, SM120, Arch
from kernels.fp8 import LIMITS, to_8bit
from kernels.layout import (
    HEAD,
    K_BLOCK,
    KEY_GROUP,
    Q_BLOCK,
    V_LIMIT_FP16,
    Qkv8,
    padded_keys,
    spread,
    unpermute_keys,
)
from kernels.signature import Axis, require
from kernels.spec import Bank, KernelError, KernelSpec, Loop, Tuning

REACH = 30  # how far `base` may lie below the largest logit so far: FP32 ends at 2^127
MMA_KEYS = 32  # of one instruction that multiplies weights and values
CODES = {torch.float8_e4m3fn: "fp8e4nv", torch.int8: "i8"}
FORMS = {  # format of q and k, format of v
    "int8fp8": (torch.int8, torch.float8_e4m3fn),
    "int8": (torch.int8, torch.int8),
    "fp8": (torch.float8_e4m3fn, torch.float8_e4m3fn),
}


def attention_reference(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The exact result that all forms approximate: q, k, v [S, N, K], any float -> [S, N * K]
    fp32.
    """
    q, k, v = (side.double().transpose(0, 1) for side in (q, k, v))  # [N, S, K]
    p = (q @ k.mT / math.sqrt(q.shape[-1])).softmax(dim=-1)
    return (p @ v).transpose(0, 1).flatten(1).float()


def attention8_reference(
    qkv: Qkv8, keys: int = K_BLOCK, queries: int | None = None, *, halves: bool = False
) -> Tensor:
    """The definition, in plain PyTorch: [queries, N * K] fp32.

    `keys` is how many an iteration takes: that decides against which maximum a weight is rounded,
    and nothing else. With `halves` the sums of an iteration are kept in FP16, as `SUM` "fp16" does.
    """
    limit, q = LIMITS[qkv.vt.dtype], qkv.q[:, :queries].float()
    qs = spread(qkv.qs, Q_BLOCK, q.shape[1])
    k, ks = qkv.k[:, : qkv.tokens].float(), spread(qkv.ks, K_BLOCK, qkv.tokens).mT
    v = unpermute_keys(qkv.vt).mT[:, : qkv.tokens].float()
    top = last = q.new_full((*q.shape[:2], 1), -math.inf)  # [N, S, 1]
    total, out = torch.zeros_like(top), torch.zeros_like(q)
    for k_tile, ks_tile, v_tile in zip(k.split(keys, 1), ks.split(keys, 2), v.split(keys, 1)):
        logits, scale = q @ k_tile.mT, ks_tile * qs  # sums of INT8 codes are exact
        here = (logits * scale).amax(dim=-1, keepdim=True)
        if k_tile.shape[1] < keys:  # padding fills the iteration
            here = here.clamp_min(0)
        top = torch.maximum(top, here)
        base = torch.maximum(here, top - REACH) if qkv.vt.dtype == torch.int8 else top
        # the kernel's multiply-add rounds once, and its maximum has the limit in it
        x = logits.double() * scale - (base - math.log2(limit))
        p = torch.exp2(x.float())
        move = torch.exp2(last - base)
        total = total * move + p.sum(dim=-1, keepdim=True)
        out = out * move + _values(to_8bit(p, qkv.vt.dtype).float(), v_tile, halves)
        last = base
    return (out * qkv.vs[:, None] / total).transpose(0, 1).flatten(1)


def _values(p: Tensor, v: Tensor, halves: bool) -> Tensor:
    """Returns p [N, S, keys] @ v [N, keys, K], codes both: [N, S, K] fp32. With `halves` the sum
    becomes FP16 after each product of a tensor core, which is of `MMA_KEYS` keys.
    """
    if not halves:
        return p @ v
    total = p.new_zeros(*p.shape[:2], v.shape[2], dtype=torch.float16)
    for p_part, v_part in zip(p.double().split(MMA_KEYS, 2), v.double().split(MMA_KEYS, 1)):
        total = (total.double() + p_part @ v_part).half()
    return total.float()


def variant_reference(
    spec: KernelSpec, tuning: Tuning, qkv: Qkv8, queries: int | None = None
) -> Tensor:
    """The definition with the iterations and the sums of a variant: [queries, N * K] fp32."""
    keys = tuning.blocks["BLOCK_KEYS"] * tuning.blocks["TILES"]
    return attention8_reference(qkv, keys, queries, halves=spec.constants["SUM"] == "fp16")


def attention(bank: Bank, spec: KernelSpec, qkv: Qkv8, queries: int | None = None) -> Tensor:
    """Attends with the kernel `spec`, one of `ATTENTION`; `qkv` is quantised for it (`formats`).
    The first `queries` tokens look at all of them, every token if None: [queries, N * K] bf16.

    Raises `KernelError` for tensors that are not laid out as `Qkv8` says.
    """
    _check(spec, qkv)
    queries = qkv.tokens if queries is None else queries
    if not 0 < queries <= qkv.tokens:
        raise KernelError(f"{spec.name}: {queries} of {qkv.tokens} tokens cannot be queries")
    heads, _, keys = qkv.vt.shape
    rows = bank.tuning(spec).blocks["BLOCK_Q"]
    grid = (-(-queries // rows), heads)
    # the last program may hold tokens that are no queries, and stores them too
    stored = min(grid[0] * rows, qkv.tokens)
    out = qkv.vs.new_empty(stored, heads * HEAD, dtype=torch.bfloat16)
    operands = (qkv.q, qkv.qs, qkv.k, qkv.ks, qkv.vt, qkv.vs, out)
    bank.launch(spec, grid, *operands, qkv.tokens, keys, heads * HEAD)
    return out[:queries]


def formats(spec: KernelSpec) -> tuple[torch.dtype, torch.dtype, float]:
    """Returns what a variant takes: the format of q and k, that of v, and the largest |vt|."""
    types = spec.signature.split()
    qk, v = (
        next(dtype for dtype, code in CODES.items() if types[place] == f"*{code}")
        for place in (0, 4)
    )
    return qk, v, V_LIMIT_FP16 if spec.constants["SUM"] == "fp16" else LIMITS[v]


def variants(form: str, arch: Arch) -> list[KernelSpec]:
    """Lists the kernels of one of `FORMS` for a GPU; the first is the default where none was timed.

    Raises `KernelError` for a form that is none of them.
    """
    if form not in FORMS:
        raise KernelError(f"attention has the forms {', '.join(FORMS)}, not {form}")
    return [
        spec
        for spec in ATTENTION.values()
        if arch in spec.tuning and formats(spec)[:2] == FORMS[form]
    ]


def _check(spec: KernelSpec, qkv: Qkv8) -> None:
    heads, tokens, keys = len(qkv.q), qkv.tokens, padded_keys(qkv.tokens)
    qk, v, _ = formats(spec)
    require(spec.name, "q", qkv.q, (Axis("N"), tokens, HEAD), qk)
    require(spec.name, "qs", qkv.qs, (heads, -(-tokens // Q_BLOCK)), torch.float32)
    require(spec.name, "k", qkv.k, (heads, keys, HEAD), qk)
    require(spec.name, "ks", qkv.ks, (heads, keys // K_BLOCK), torch.float32)
    require(spec.name, "vt", qkv.vt, (heads, HEAD, keys), v)
    require(spec.name, "vs", qkv.vs, (heads, HEAD), torch.float32)


def _spec(
    name: str,
    form: str,
    sums: str,
    tuning: Mapping[Arch, Tuning],
    instructions: Mapping[Arch, tuple[str, ...]],
) -> KernelSpec:
    """Makes a variant. `sums` is `SUM` above, `instructions` are those of q @ k and of p @ v."""
    qk, v = FORMS[form]
    return KernelSpec(
        name=f"attention.{name}",
        device="attention:attention_kernel",
        signature=f"*{CODES[qk]} *fp32 *{CODES[qk]} *fp32 *{CODES[v]} *fp32 *bf16 i32 i32 i32",
        constants={
            "HEAD": HEAD,
            "Q_BLOCK": Q_BLOCK,
            "K_BLOCK": K_BLOCK,
            "KEY_GROUP": KEY_GROUP,
            "LOG2_P": math.log2(LIMITS[v]),
            "REACH": REACH,
            "SUM": sums,
        },
        tuning=tuning,
        multiples_of_16=(8, 9),  # padded keys and the row of the output
        loop=Loop(instructions),
    )


def _tile(
    keys: int, tiles: int, stages: int, toolkit: str, max_registers: int | None = None
) -> Tuning:
    """Sets tiles of 128 queries, 16 for each warp; an iteration takes `tiles` times `keys`."""
    blocks = {"BLOCK_Q": 128, "BLOCK_KEYS": keys, "TILES": tiles}
    return Tuning(8, stages, blocks, toolkit, max_registers)


_IMMA = "IMMA.16832.S8.S8"
_QMMA = "QMMA.16832.F32.E4M3.E4M3"
_HALF = "QMMA.16832.F16.E4M3.E4M3"
_SCALED = "QMMA.SF.16832.F32.E4M3.E4M3"
_WIDE_LOGITS, _WIDE_VALUES = "GMMA.64x64x32", "GMMA.64x128x32"  # of a warpgroup
_HOPPER_INT8 = (f"I{_WIDE_LOGITS}.S8.S8", f"I{_WIDE_VALUES}.S8.S8")
_HOPPER_FP8 = (f"Q{_WIDE_LOGITS}.F32.E4M3.E4M3", f"Q{_WIDE_VALUES}.F32.E4M3.E4M3")

# The order within a form and architecture is that of the rates which `benchmarks/kernel/model.py`
# estimates from their machine code (tests/kernels/test_preference.py): no GPU was at hand. `_wide`
# and `_narrow` differ in the tile alone; of the latter two blocks share a multiprocessor, and one
# multiplies while the other waits.
ATTENTION: Mapping[str, KernelSpec] = {
    "i8_fp8_f16_narrow": _spec(
        "i8_fp8_f16_narrow", "int8fp8", "fp16", {SM89: _tile(32, 1, 3, "12.8", 128)},
        {SM89: (_IMMA, _HALF)},
    ),
    "i8_fp8_f16_wide": _spec(
        "i8_fp8_f16_wide", "int8fp8", "fp16", {SM89: _tile(64, 2, 2, "12.8")},
        {SM89: (_IMMA, _HALF)},
    ),
    "i8_fp8_f16": _spec(
        "i8_fp8_f16", "int8fp8", "fp16", {SM89: _tile(64, 1, 2, "12.8")}, {SM89: (_IMMA, _HALF)}
    ),
    "i8_fp8_f32": _spec(
        "i8_fp8_f32", "int8fp8", "fp32",
        {SM89: _tile(64, 1, 2, "12.6"), SM90: _tile(64, 2, 2, "12.6")},
        {SM89: (_IMMA, _QMMA), SM90: (_HOPPER_INT8[0], _HOPPER_FP8[1])},
    ),
    "i8_mx_narrow": _spec(
        "i8_mx_narrow", "int8fp8", "scaled", {SM120: _tile(32, 1, 3, "12.8", 128)},
        {SM120: (_IMMA, _SCALED)},
    ),
    "i8_mx_wide": _spec(
        "i8_mx_wide", "int8fp8", "scaled", {SM120: _tile(64, 2, 2, "12.8")},
        {SM120: (_IMMA, _SCALED)},
    ),
    "i8_mx": _spec(
        "i8_mx", "int8fp8", "scaled", {SM120: _tile(64, 1, 2, "12.8")}, {SM120: (_IMMA, _SCALED)}
    ),
    "i8_i8_narrow": _spec(
        "i8_i8_narrow", "int8", "int32",
        dict.fromkeys((SM80, SM86, SM89), _tile(32, 1, 3, "12.6", 128)),
        dict.fromkeys((SM80, SM86, SM89), (_IMMA,)),
    ),
    "i8_i8": _spec(
        "i8_i8", "int8", "int32",
        {
            SM80: _tile(64, 1, 2, "12.6"),
            SM86: _tile(64, 1, 2, "12.6"),
            SM89: _tile(64, 1, 2, "12.6"),
            SM90: _tile(64, 2, 2, "12.6"),
            SM120: _tile(64, 1, 3, "12.8"),
        },
        {
            **dict.fromkeys((SM80, SM86, SM89, SM120), (_IMMA,)),
            SM90: _HOPPER_INT8,
        },
    ),
    "fp8_f32": _spec(
        "fp8_f32", "fp8", "fp32",
        {SM89: _tile(64, 1, 2, "12.6"), SM90: _tile(64, 2, 2, "12.6")},
        {SM89: (_QMMA,), SM90: _HOPPER_FP8},
    ),
    "fp8_mx": _spec(
        "fp8_mx", "fp8", "scaled", {SM120: _tile(64, 2, 2, "12.8")}, {SM120: (_SCALED,)}
    ),
}  # fmt: skip
