"""The PTX instructions that the virtual GPU knows, and the operations that they become.

Instructions whose operands are registers and constants alone are rows of a table; all others are
forms that `virtual_gpu.decode` reads. Kinds of operands, the destination first: w is 32 bits (or
16), l is 64, p is a predicate.
"""

import re

_ROWS = """
mov.b16 MOV32 ww
mov.u16 MOV32 ww
mov.b32 MOV32 ww
mov.u32 MOV32 ww
mov.b64 MOV64 ll
mov.pred PMOV pp
add.f32 ADD_F32 www
sub.f32 SUB_F32 www
mul.f32 MUL_F32 www
add.rn.f32 ADD_F32 www
sub.rn.f32 SUB_F32 www
mul.rn.f32 MUL_F32 www
div.full.f32 DIV_F32 www
fma.rn.f32 FMA_F32 wwww
neg.f32 NEG_F32 ww
abs.f32 ABS_F32 ww
max.f32 MAX_F32 www
min.f32 MIN_F32 www
max.NaN.f32 MAXNAN_F32 www
min.NaN.f32 MINNAN_F32 www
ex2.approx.f32 EX2_F32 ww
ex2.approx.ftz.f32 EX2FTZ_F32 ww
rsqrt.approx.ftz.f32 RSQRTFTZ_F32 ww
sqrt.approx.ftz.f32 SQRTFTZ_F32 ww
sqrt.rn.f32 SQRT_F32 ww
add.f32x2 ADD_F32X2 lll
sub.f32x2 SUB_F32X2 lll
mul.f32x2 MUL_F32X2 lll
fma.rn.f32x2 FMA_F32X2 llll
abs.bf16 ABS_BF16 ww
max.bf16 MAX_BF16 www
add.s32 ADD_32 www
sub.s32 SUB_32 www
mul.lo.s32 MULLO_32 www
mad.lo.s32 MADLO_32 wwww
div.s32 DIV_S32 www
rem.s32 REM_S32 www
div.u32 DIV_U32 www
rem.u32 REM_U32 www
min.s32 MIN_S32 www
max.s32 MAX_S32 www
min.u32 MIN_U32 www
max.u32 MAX_U32 www
and.b32 AND_32 www
or.b32 OR_32 www
xor.b32 XOR_32 www
not.b32 NOT_32 ww
neg.s32 NEG_32 ww
shl.b32 SHL_32 www
shr.u32 SHR_U32 www
shr.s32 SHR_S32 www
shl.b16 SHL_16 www
and.b16 AND_32 www
or.b16 OR_32 www
bfe.u32 BFE_U32 wwww
bfe.s32 BFE_S32 wwww
prmt.b32 PRMT wwww
add.s64 ADD_64 lll
sub.s64 SUB_64 lll
mul.lo.s64 MULLO_64 lll
mad.lo.s64 MADLO_64 llll
and.b64 AND_64 lll
or.b64 OR_64 lll
xor.b64 XOR_64 lll
shl.b64 SHL_64 llw
shr.u64 SHR_U64 llw
shr.s64 SHR_S64 llw
mul.wide.s32 MULW_S32 lww
mul.wide.u32 MULW_U32 lww
mad.wide.s32 MADW_S32 lwwl
mad.wide.u32 MADW_U32 lwwl
cvt.s64.s32 CVT_S64_S32 lw
cvt.u64.u32 CVT_U64_U32 lw
cvt.u32.u64 CVT_U32_U64 wl
cvt.u16.u32 CVT_U16_U32 ww
cvt.u32.u16 CVT_U32_U16 ww
cvt.s32.s16 CVT_S32_S16 ww
cvt.rn.f32.s32 CVT_F32_S32 ww
cvt.rn.f32.u32 CVT_F32_U32 ww
cvt.rzi.s32.f32 CVT_S32_F32 ww
cvt.f32.bf16 CVT_F32_BF16 ww
cvt.f32.f16 CVT_F32_F16 ww
cvt.rn.bf16.f32 CVT_BF16_F32 ww
cvt.rn.f16.f32 CVT_F16_F32 ww
cvt.rz.f16.f32 CVT_F16_F32_RZ ww
cvt.rn.bf16x2.f32 CVT_BF16X2_F32 www
cvt.rn.f16x2.f32 CVT_F16X2_F32 www
cvt.rn.satfinite.e4m3x2.f32 CVT_E4M3X2_F32 www
cvt.rn.satfinite.e4m3x2.f16x2 CVT_E4M3X2_F16X2 ww
selp.b16 SELP32 wwwp
selp.b32 SELP32 wwwp
selp.f32 SELP32 wwwp
selp.b64 SELP64 lllp
and.pred PAND ppp
or.pred POR ppp
xor.pred PXOR ppp
not.pred PNOT pp
redux.sync.max.s32 REDUX_MAX_S32 www
shfl.sync.bfly.b32 SHFL_BFLY wwwww
shfl.sync.idx.b32 SHFL_IDX wwwww
"""
# opcode -> operation, kinds of operands
ROWS = {row[0]: (row[1], row[2]) for row in map(str.split, _ROWS.strip().splitlines())}

BARE = {  # without operands
    "cp.async.commit_group": "CPCOMMIT",
    "wgmma.fence.sync.aligned": "WGFENCE",
    "wgmma.commit_group.sync.aligned": "WGCOMMIT",
    "fence.proxy.async.shared::cta": "FENCEASYNC",
    "ret": "RET",
}
# Registers with a value of their own, in the order in which machine/step.hpp has them.
_SPECIAL = "%tid.x %ctaid.x %ctaid.y %ctaid.z %nctaid.x %nctaid.y %nctaid.z %ntid.x %laneid"
SPECIAL = {name: number for number, name in enumerate(_SPECIAL.split())}

# Arguments of the kernel, read into a register of 32 bits and into one of 64.
PARAMETERS_32 = {f"ld.param.{kind}32": "LDP32" for kind in "busf"}
PARAMETERS_64 = {
    "ld.param.b64": "LDP64",
    "ld.param.u64": "LDP64",
    "ld.param.s32": "LDP64_S32",
    "ld.param.u32": "LDP64_U32",
}

# Comparisons for equality do not care whether numbers have a sign.
_EQUALITY = [f"{how}.{{}}{bits}" for how in ("eq", "ne") for bits in (32, 64)]
_SIGNED = {form.format(kind): form.format("s") for form in _EQUALITY for kind in "bu"}
_HOW = ("eq", "ne", "lt", "le", "gt", "ge")
_COMPARES = {f"{how}.{kind}" for how in _HOW for kind in ("s32", "s64", "f32")}
_COMPARES |= {f"{how}.{kind}" for how in _HOW[2:] for kind in ("u32", "u64")}
_COMPARES |= {f"{how}.f32" for how in ("equ", "neu", "ltu", "leu", "gtu", "geu", "nan", "num")}

# How an access is cached or ordered changes nothing where one thread runs all.
_HINTS = re.compile(r"\.(L1::\w+|L2::\w+|nc)(?=\.|$)")

# What is multiplied -> kind of operands, kind of sum, saturates, scaled (machine/products.hpp)
_SCALED = "kind::mxf8f6f4.block_scale.scale_vec::1X"
MMA = {
    "m16n8k32.row.col.satfinite.s32.s8.s8.s32": (0, 0, 1, 0),
    "m16n8k32.row.col.s32.s8.s8.s32": (0, 0, 0, 0),
    "m16n8k32.row.col.f32.e4m3.e4m3.f32": (1, 1, 0, 0),
    "m16n8k32.row.col.f16.e4m3.e4m3.f16": (1, 2, 0, 0),
    "m16n8k16.row.col.f32.bf16.bf16.f32": (2, 1, 0, 0),
    f"m16n8k32.row.col.{_SCALED}.f32.e4m3.e4m3.f32.ue8m0": (1, 1, 0, 1),
}
# Types of sum, A and B -> kind of operands, kind of sum, depth
WGMMA = {
    "s32.s8.s8": (0, 0, 32),
    "f32.e4m3.e4m3": (1, 1, 32),
    "f32.bf16.bf16": (2, 1, 16),
}


def plain(opcode: str) -> str:
    """Returns an opcode without what changes nothing here."""
    return _HINTS.sub("", opcode)


def comparison(opcode: str) -> str | None:
    """Returns the operation of a `setp`, or None if it is not known."""
    compare = opcode.removeprefix("setp.")
    compare = _SIGNED.get(compare, compare)
    return f"SETP_{compare.replace('.', '_').upper()}" if compare in _COMPARES else None
