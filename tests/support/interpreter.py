"""Triton 3.6's CPU interpreter, corrected, behind the interface that kernels are launched through.

As shipped it drops the carry and the ties when it rounds to E4M3, multiplies the bit patterns of
BF16, and fails at block-scaled products (docs/reference/kernels.md 5); it also cuts instead of
rounding to BF16 (seen in tests/kernels/test_interpreter.py). Here values are decoded to FP32,
computed, and encoded again with one rounding, as the GPU does. Loads and stores outside the
arguments of the launch are errors.

Not modelled: fused multiply-add, the approximate exp2 and reciprocal, and the truncation of sums
inside a tensor core.

Triton decides at import whether functions are compiled or interpreted. So the process of pytest
interprets, from the first import of this module on; compiling always happens in processes of its
own (`kernels.aot.compile`).
"""

import os
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib import import_module

os.environ["TRITON_INTERPRET"] = "1"

import ml_dtypes
import numpy as np
import triton.language as tl
from triton._C.libtriton import ir
from triton.language.semantic import TritonSemantic
from triton.runtime import interpreter

from kernels.arch import Arch
from kernels.device.fp8 import TO_E4M3
from kernels.signature import check_launch
from kernels.spec import Argument, KernelError, KernelSpec, Tuning

# Formats that numpy lacks are kept as unsigned integers of their size.
ENCODED = {
    tl.bfloat16: np.dtype(ml_dtypes.bfloat16),
    tl.float8e4nv: np.dtype(ml_dtypes.float8_e4m3fn),
    tl.float8e5: np.dtype(ml_dtypes.float8_e5m2),
}
SATURATING = {tl.float8e4nv: 448.0, tl.float8e5: 57344.0}  # cvt.rn.satfinite; NaN stays NaN
SCALED = {"E4M3": tl.float8e4nv, "E5M2": tl.float8e5}
GROUP = 32  # values that share a scale in a block-scaled product
MMA_BYTES = 32  # of K that one MMA instruction consumes before it rounds its sum


def decode(handle: interpreter.TensorHandle) -> np.ndarray:
    """Returns the values: FP32 for the encoded formats, else what numpy holds."""
    dtype = handle.dtype.scalar
    if dtype not in ENCODED:
        return handle.data
    return np.ascontiguousarray(handle.data).view(ENCODED[dtype]).astype(np.float32)


def encode(values: np.ndarray, dtype: tl.dtype) -> interpreter.TensorHandle:
    """Rounds values to nearest, ties to even, and stores them as the interpreter does."""
    storage = interpreter._get_np_dtype(dtype)
    if dtype not in ENCODED:
        return interpreter.TensorHandle(values.astype(storage), dtype)
    values = values.astype(np.float32)
    if dtype in SATURATING:
        values = np.clip(values, -SATURATING[dtype], SATURATING[dtype])
    return interpreter.TensorHandle(values.astype(ENCODED[dtype]).view(storage), dtype)


@dataclass(frozen=True)
class Result:
    """What an operation with one result is to Triton's language."""

    handle: interpreter.TensorHandle

    def get_result(self, index):
        return [self.handle][index]


class CorrectedBuilder(interpreter.InterpreterBuilder):
    """The operations of Triton's language on numpy arrays, with the GPU's rounding."""

    def __init__(self) -> None:
        super().__init__()
        self.begins = np.zeros(0, np.uint64)  # addresses a kernel may use, ascending
        self.ends = np.zeros(0, np.uint64)

    # conversions

    def cast_impl(self, src, dst_type):
        return encode(decode(src), dst_type.scalar)

    def create_fp_to_fp(self, src, dst_type, rounding_mode):
        if rounding_mode not in (None, ir.ROUNDING_MODE.RTNE):
            raise NotImplementedError("only rounding to nearest is interpreted")
        return self.cast_impl(src, dst_type)

    def create_inline_asm(self, asm, constraints, values, types, is_pure, pack):
        """Stands in for the one piece of PTX that device code has."""
        if asm != TO_E4M3.value:
            raise NotImplementedError(f"this PTX is not interpreted: {asm}")
        return Result(self.cast_impl(values[0], types[0]))

    # arithmetic

    def binary_op(self, lhs, rhs, op):
        dtype = lhs.dtype.scalar
        if dtype not in ENCODED:
            return super().binary_op(lhs, rhs, op)
        result = op(decode(lhs), decode(rhs))
        if result.dtype == bool:
            return interpreter.TensorHandle(result, tl.int1)
        return encode(result, dtype)

    def create_fma(self, x, y, z):
        """Rounds once, by way of FP64, in which the product of two FP32 is exact."""
        exact = decode(x).astype(np.float64) * decode(y) + decode(z)
        return encode(exact, z.dtype.scalar)

    def create_dot(self, a, b, d, input_precision, max_num_imprecise_acc):
        left, right, total = decode(a), decode(b), d.data
        if total.dtype == np.int32:  # exact in FP64, which numpy multiplies fast
            product = left.astype(np.float64) @ right.astype(np.float64)
            return interpreter.TensorHandle(total + product.astype(np.int32), d.dtype.scalar)
        left, right = left.astype(np.float32), right.astype(np.float32)
        if total.dtype == np.float32:
            return interpreter.TensorHandle(total + left @ right, d.dtype.scalar)
        step = MMA_BYTES * 8 // a.dtype.scalar.primitive_bitwidth
        for k in range(0, left.shape[-1], step):
            part = left[..., k : k + step] @ right[..., k : k + step, :]
            total = (total.astype(np.float32) + part).astype(total.dtype)
        return interpreter.TensorHandle(total, d.dtype.scalar)

    def create_dot_scaled(
        self, a, a_scale, a_format, b, b_scale, b_format, fast_math, a_k_pack, b_k_pack, d
    ):  # fmt: skip
        """Multiplies with scales that are powers of two, one byte for each 32 values along K:
        [M, K/32], [N, K/32].
        """
        left = self._scaled(a, a_scale, a_format)
        right = self._scaled(self.create_trans(b, (1, 0)), b_scale, b_format)
        return interpreter.TensorHandle(d.data + left @ right.T, d.dtype.scalar)

    def _scaled(self, handle, scale, name):
        bits = interpreter.TensorHandle(handle.data.view(np.uint8), SCALED[name.name])
        if scale is None:
            return decode(bits)
        powers = np.exp2(scale.data.astype(np.float32) - 127)
        return decode(bits) * np.repeat(powers, GROUP, axis=1)

    # memory

    def create_masked_load(self, ptrs, mask, other, cache_modifier, eviction_policy, is_volatile):
        self._check_addresses(ptrs, mask.data)
        if other is None:  # undefined on a GPU: NaN here, and -1 in integers
            dtype = ptrs.get_element_ty()
            poison = np.full(ptrs.data.shape, -1, f"i{interpreter._get_np_dtype(dtype).itemsize}")
            other = interpreter.TensorHandle(poison.view(interpreter._get_np_dtype(dtype)), dtype)
        return super().create_masked_load(
            ptrs, mask, other, cache_modifier, eviction_policy, is_volatile
        )

    def create_masked_store(self, ptrs, value, mask, cache_modifier, eviction_policy):
        self._check_addresses(ptrs, mask.data)
        return super().create_masked_store(ptrs, value, mask, cache_modifier, eviction_policy)

    def create_atomic_rmw(self, rmwOp, ptr, val, mask, sem, scope):
        self._check_addresses(ptr, mask.data)
        return super().create_atomic_rmw(rmwOp, ptr, val, mask, sem, scope)

    def _check_addresses(self, ptrs, mask):
        used = ptrs.data[np.broadcast_to(mask, ptrs.data.shape)]
        size = np.uint64(max(1, ptrs.get_element_ty().primitive_bitwidth // 8))
        home = np.searchsorted(self.begins, used, side="right").astype(np.intp) - 1
        outside = (home < 0) | (used + size > self.ends.take(home, mode="clip"))
        if outside.any():
            raise IndexError(f"{outside.sum()} of {used.size} addresses are outside the arguments")

    @contextmanager
    def within(self, arguments: Sequence[Argument]) -> Iterator[None]:
        """Allows a kernel the memory of these tensors, and no other."""
        tensors = [value for value in arguments if not isinstance(value, int | float)]
        spans = sorted((tensor.data_ptr(), tensor.nbytes) for tensor in tensors)
        self.begins = np.array([begin for begin, _ in spans], np.uint64)
        ends = np.array([begin + size for begin, size in spans], np.uint64)
        self.ends = np.maximum.accumulate(ends)  # views of one tensor may overlap
        yield


class CorrectedSemantic(TritonSemantic):
    """Takes the names of formats as plain strings, as compiled code does."""

    def dot_scaled(self, lhs, lhs_scale, lhs_format, rhs, rhs_scale, rhs_format, *rest):
        left, right = (
            tl.constexpr(tl.core._unwrap_if_constexpr(f)) for f in (lhs_format, rhs_format)
        )
        return super().dot_scaled(lhs, lhs_scale, left, rhs, rhs_scale, right, *rest)


def corrected() -> CorrectedBuilder:
    """Puts the corrections in the place where Triton's interpreter looks for its operations."""
    if not isinstance(tl.cdiv, interpreter.InterpretedFunction):
        raise RuntimeError(
            "triton was imported before tests/support/interpreter.py, without interpreter"
        )
    builder = CorrectedBuilder()
    interpreter.interpreter_builder = builder
    interpreter.TritonSemantic = CorrectedSemantic
    interpreter.interpreter_semantic = CorrectedSemantic(builder)
    return builder


BUILDER = corrected()


def different_archs(spec: KernelSpec) -> list[Arch]:
    """Lists one architecture for each tile of a spec: the interpreter sees nothing else of them."""
    by_tile = {tuple(tuning.blocks.items()): arch for arch, tuning in spec.tuning.items()}
    return [*by_tile.values()]


class InterpretedBank:
    """Runs the device functions of specs on CPU tensors, with the tile sizes of one architecture.

    `blocks` replaces tile sizes by name, in the specs that have them: smaller ones make tests fast.
    """

    def __init__(self, arch: Arch, **blocks: int) -> None:
        self.arch = arch
        self.blocks = blocks

    def tuning(self, spec: KernelSpec) -> Tuning:
        if self.arch not in spec.tuning:
            raise KernelError(f"{spec.name} is not tuned for {self.arch.name}")
        tuning = spec.tuning[self.arch]
        chosen = {name: self.blocks.get(name, size) for name, size in tuning.blocks.items()}
        return replace(tuning, blocks=chosen)

    def launch(self, spec: KernelSpec, grid: Sequence[int], *arguments: Argument) -> None:
        check_launch(spec, "cpu", grid, arguments)
        function = getattr(import_module(spec.module), spec.function)
        constants = {**spec.constants, **self.tuning(spec).blocks}
        with BUILDER.within(arguments), np.errstate(all="ignore"), warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # arrays of one value as numbers
            function[tuple(grid)](*arguments, **constants)
