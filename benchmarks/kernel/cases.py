"""The cases that kernels are measured on: inputs, a check of the result, and the work that is done.

Results are compared with the references beside the kernels, on a sample of rows where the whole
would not fit. Inputs are standard normal values, drawn anew for every size. Cases of one size share
them, and what is only compared is drawn again and let go of: a GPU of 24 GB holds all attention.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import TypeVar
from zlib import crc32

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
from kernels.attention import FORMS as ATTENTION_FORMS
from kernels.cross_attention import CROSS_ATTENTION, cross_keys
from kernels.fp8 import FORMS, LIMITS, RowForm, Rows, quantize_rows
from kernels.gemm import GEMM, Gemm
from kernels.layout import HEAD, LOGIT_SCALE, Qkv8, quantize_qkv
from kernels.spec import Bank, KernelSpec

SAMPLE = 128  # rows that are compared
TEXT, VISION = 77, 257  # keys of cross attention; the other 435 rows of text are padding
SHORT = {torch.int8: "i8", torch.float8_e4m3fn: "fp8"}
LIMIT, ATTENTION_LIMIT = 1e-2, 0.09  # relative errors up to which a result is right

Made = TypeVar("Made")


class Inputs:
    """The tensors that cases of one size are given."""

    def __init__(self, seed: int, device: torch.device) -> None:
        self.device, self._seed = device, seed
        self._kept: dict[str, object] = {}

    def normal(self, name: str, *shape: int) -> Tensor:
        """Draws standard normal values: equal ones for a name and a shape, whoever asks."""
        seed = crc32(f"{name} {shape} {self._seed}".encode())
        generator = torch.Generator(self.device).manual_seed(seed)
        return torch.randn(*shape, generator=generator, device=self.device)

    def shared(self, name: str, make: Callable[[], Made]) -> Made:
        """Returns what was made under this name, and makes it the first time."""
        if name not in self._kept:
            self._kept[name] = make()
        return self._kept[name]  # type: ignore[return-value]


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
    prepare: Callable[[Bank, Inputs, int], KernelJob]  # for S tokens
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


# --- products


def _products(model: ModelConfig) -> Iterator[KernelCase]:
    dim, ffn = model.dim, model.ffn
    for name, form in GEMM.items():
        qkv = partial(_plain, form, 3 * dim, dim)
        up = partial(_gelu, form, ffn, dim)
        o, down = partial(_residual, form, dim, dim), partial(_residual, form, dim, ffn)
        gelu, added = (form.gelu,), (form.residual,)
        yield KernelCase(f"gemm.{name} qkv", (form.bias,), work.product(3 * dim, dim, 2), qkv)
        # x is read and written: 8 bytes a value
        yield KernelCase(f"gemm.{name} o + residual", added, work.product(dim, dim, 8), o)
        yield KernelCase(f"gemm.{name} up + gelu", gelu, work.product(ffn, dim, 2), up)
        yield KernelCase(f"gemm.{name} down + residual", added, work.product(dim, ffn, 8), down)


def _operands(form: Gemm, n: int, k: int, inputs: Inputs, tokens: int) -> tuple[Rows, Rows, Tensor]:
    """Draws A [S, k], B [n, k] and a bias [n]."""

    def rows(name: str, count: int) -> Rows:
        key = f"{name} {count} {k} {form.dtype}"
        return inputs.shared(
            key, lambda: quantize_rows(inputs.normal(name, count, k), RowForm(form.dtype))
        )

    return rows("a", tokens), rows("b", n), inputs.normal("bias", n)


def _plain(form: Gemm, n: int, k: int, bank: Bank, inputs: Inputs, tokens: int) -> KernelJob:
    a, b, bias = _operands(form, n, k, inputs, tokens)
    run = partial(product.gemm, bank, form, a, b, bias)
    rows = _sample(bias.device, tokens)
    return KernelJob(run, lambda: (run()[rows], product.gemm_reference(_take(a, rows), b, bias)))


def _gelu(form: Gemm, n: int, k: int, bank: Bank, inputs: Inputs, tokens: int) -> KernelJob:
    a, b, bias = _operands(form, n, k, inputs, tokens)
    multiplier = 1 + 0.2 * inputs.normal("multiplier", n)
    run = partial(product.gemm_gelu, bank, form, a, b, bias, multiplier)
    rows = _sample(bias.device, tokens)
    reference = product.gemm_gelu_reference
    return KernelJob(run, lambda: (run()[rows], reference(_take(a, rows), b, bias, multiplier)))


def _residual(form: Gemm, n: int, k: int, bank: Bank, inputs: Inputs, tokens: int) -> KernelJob:
    a, b, bias = _operands(form, n, k, inputs, tokens)
    gate = inputs.normal("gate", n)
    x = inputs.shared(f"x {tokens} {n}", lambda: inputs.normal("x", tokens, n))  # changed in place
    run = partial(product.gemm_residual, bank, form, a, b, bias, gate, x)
    rows = _sample(bias.device, tokens)

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


def _attend(spec: KernelSpec, heads: int, bank: Bank, inputs: Inputs, tokens: int) -> KernelJob:
    """The result is compared with exact attention, whatever the format of the kernel."""
    qk_dtype, v_dtype, v_limit = formats(spec)

    def drawn(name: str) -> Tensor:
        return inputs.normal(name, tokens, heads, HEAD)

    def quantized() -> Qkv8:
        return quantize_qkv(drawn("q"), drawn("k"), drawn("v"), qk_dtype, v_limit, v_dtype)

    def exact() -> Tensor:
        q, k, v = drawn("q")[rows], drawn("k"), drawn("v")
        sides = zip(*(side.split(1, dim=1) for side in (q, k, v)))  # FP64 of one head at a time
        return torch.cat([attention_reference(*side) for side in sides], dim=1)

    qkv = inputs.shared(f"qkv {tokens} {heads} {qk_dtype} {v_dtype} {v_limit}", quantized)
    rows = _sample(inputs.device, tokens)
    run = partial(attention, bank, spec, qkv)
    # of all queries the same few are compared, so that all cases of a size share what is right
    want = inputs.shared(f"attention {tokens} {heads}", exact)
    return KernelJob(run, lambda: (run()[rows], want))


def _cross_attention(model: ModelConfig) -> KernelCase:
    dim = model.dim

    def prepare(bank: Bank, inputs: Inputs, tokens: int) -> KernelJob:
        normal = inputs.normal
        q, weight = normal("q", tokens, dim).bfloat16(), 1 + 0.1 * normal("weight", dim)
        text, vision = (
            cross_keys(normal(f"{name} k", keys, dim), normal(f"{name} v", keys, dim), weight, more)
            for name, keys, more in (("text", TEXT + 1, 512 - TEXT), ("vision", VISION, 1))
        )
        inverse = rotation.rms_inverse_reference(q, dim, 1)[0]
        run = partial(crossing.cross_attention, bank, q, inverse, text, vision)
        rows = _sample(q.device, tokens)
        want = partial(crossing.cross_attention_reference, q[rows], inverse[rows], text, vision)
        return KernelJob(run, lambda: (run()[rows], want()))

    done = work.cross_attention(dim, TEXT + 1 + VISION)
    return KernelCase(CROSS_ATTENTION.name, (CROSS_ATTENTION,), done, prepare)


# --- rows


def short_name(form: RowForm) -> str:
    """The name of rows in cases: "fp8", "i8r"."""
    return SHORT[form.dtype] + "r" * form.rotated


def _rows(model: ModelConfig) -> Iterator[KernelCase]:
    dim, ffn = model.dim, model.ffn
    for form in FORMS:
        short = short_name(form)
        spec, prepare = norm.modulate_spec(dim, form), partial(_modulate, dim, form)
        yield KernelCase(f"modulate.{short}", (spec,), work.rows(dim, 5), prepare)
        for width in (dim, ffn):
            spec, prepare = norm.quantize_spec(width, form), partial(_quantize, width, form)
            yield KernelCase(f"quantize.{short} {width}", (spec,), work.rows(width, 3), prepare)
    for name, (qk, v) in ATTENTION_FORMS.items():
        specs, prepare = tuple(rotation.rope_specs(dim, qk, v)), partial(_rope, dim, qk, v)
        yield KernelCase(f"rope.{name}", specs, work.rows(dim, 9), prepare)
    prepare = partial(_rms_inverse, dim)
    yield KernelCase(
        "rms_inverse", (rotation.rms_inverse_spec(dim, 1),), work.rows(dim, 2), prepare
    )


def _modulate(dim: int, form: RowForm, bank: Bank, inputs: Inputs, tokens: int) -> KernelJob:
    normal = inputs.normal
    x, shift, scale = normal("x", tokens, dim), normal("shift", dim), 0.2 * normal("scale", dim)
    return _whole(partial(norm.modulate, bank), norm.modulate_reference, x, shift, scale, form)


def _quantize(width: int, form: RowForm, bank: Bank, inputs: Inputs, tokens: int) -> KernelJob:
    rows = inputs.normal("rows", tokens, width).bfloat16()
    return _whole(partial(norm.quantize, bank), quantize_rows, rows, form)


def _rope(
    dim: int, qk: torch.dtype, v: torch.dtype, bank: Bank, inputs: Inputs, tokens: int
) -> KernelJob:
    qkv = inputs.normal("qkv", tokens, 3 * dim).bfloat16()
    angles = inputs.normal("angles", tokens, HEAD // 2)
    norms = 1 + 0.1 * inputs.normal("q norm", dim), 1 + 0.1 * inputs.normal("k norm", dim)
    tables = angles.cos(), angles.sin()
    given = (qkv, *norms, *tables, qk, LIMITS[v], v)
    return _whole(partial(rotation.rope, bank), rotation.rope_reference, *given)


def _rms_inverse(dim: int, bank: Bank, inputs: Inputs, tokens: int) -> KernelJob:
    x = inputs.normal("x", tokens, dim).bfloat16()
    return _whole(partial(rotation.rms_inverse, bank), rotation.rms_inverse_reference, x, dim, 1)


def _whole(
    launch: Callable[..., object], reference: Callable[..., object], *operands: object
) -> KernelJob:
    """Compares all that a kernel makes with what its reference makes of the same operands."""
    run = partial(launch, *operands)
    return KernelJob(run, lambda: (_values(run()), _values(reference(*operands))))


# --- parts


def _sample(device: torch.device, count: int) -> Tensor:
    """Rows that are compared, the first and the last among them."""
    return torch.linspace(0, count - 1, min(count, SAMPLE), device=device).round().long()


def _take(rows: Rows, index: Tensor) -> Rows:
    return replace(rows, q=rows.q[index], s=rows.s[index])


def _values(made: object) -> Tensor:
    """The numbers that a result stands for."""
    if isinstance(made, Qkv8):
        q, k, v = made.dequantize()
        return torch.cat([q / LOGIT_SCALE, k, v])
    made = made.dequantize() if isinstance(made, Rows) else made
    assert isinstance(made, Tensor)
    return made
