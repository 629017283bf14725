"""Makes the tensors of a package from a checkpoint, in groups, in the order a worker needs them.

Linears of the blocks become 8-bit rows, those with one input a single matrix; all else keeps its
precision. Three things are folded exactly: LoRAs (by the checkpoint), LayerNorm's weights into a
modulation, and the multipliers of a linear's input into the operation that makes that input: those
of `down` are a vector behind GELU. Rotation comes after the multipliers and the padding. Where the
file holds the very codes that a package has (engine/build/copied.py), they are not rounded again.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Protocol, TypeAlias

import torch
from torch import Tensor

from engine.build.calibration import Activations, FormatChoice, choose
from engine.build.copied import rows_of
from engine.build.report import TensorError, measure, measure_cast
from engine.config import ModelConfig
from engine.denoise.block import LINEARS, WEIGHT_FORMS
from engine.models.formats.held import Codes, PackageForm
from kernels.fp8 import E4M3, FORMS, RowForm, Rows, quantize_rows, rotate

FFN_MULTIPLE = 256  # a multiple of all tiles; the rest is filled with zeros, whose GELU is zero
CONTEXT = ("text", "vision")  # used once a clip; the other linears at every step
CHUNK_ROWS = 64
KEPT = "not calibrated, as it is in the file"
LARGE = 2**20  # values from which a matrix outside the blocks is worth two bytes a value

Made: TypeAlias = tuple[Mapping[str, Tensor], Sequence[TensorError]]
Choices: TypeAlias = Callable[[int, str], FormatChoice]  # of a block's linear


class WeightSource(Protocol):
    """A source of weights: a `Checkpoint`."""

    config: ModelConfig

    def __iter__(self) -> Iterator[str]: ...

    def shape(self, name: str) -> tuple[int, ...]: ...

    def read_into(self, name: str, out: Tensor) -> None: ...

    def kept_by(self, name: str) -> PackageForm | None: ...

    def codes(self, name: str) -> Codes | None: ...


@dataclass(frozen=True, slots=True)
class Quantization:
    """The weights to be quantised, and their form."""

    weights: WeightSource
    form: RowForm
    seen: Activations | None = None
    codes: Sequence[str] = tuple(form.codes for form in FORMS)  # those that the GPU multiplies

    @property
    def allowed(self) -> Sequence[RowForm]:
        """The forms that linears may have: calibration may find E4M3 better than rotated INT8,
        where the GPU multiplies it.
        """
        forms = [self.form] if self.seen is None else [self.form, E4M3]
        return [form for form in dict.fromkeys(forms) if form.codes in self.codes]


@dataclass(frozen=True, slots=True)
class TensorGroup:
    """Tensors that are made together. Nothing is read before `make` is called."""

    name: str
    make: Callable[[], Made]


def groups(job: Quantization) -> Iterator[TensorGroup]:
    """Lists the groups in load order: embeddings, context of all blocks, the blocks, the head."""
    names = sorted(job.weights)
    outside = [name for name in names if not name.startswith("blocks.")]
    head = [name for name in outside if name.startswith("head.")]
    choices = cache(partial(_choice, job))
    layers = range(job.weights.config.layers)
    for name in outside:
        if name not in head:
            yield TensorGroup(name, partial(_kept, job, name))
    for n in layers:
        for field in CONTEXT:
            yield TensorGroup(f"blocks.{n}.{field}", partial(_linear, job, choices, n, field))
        yield TensorGroup(f"blocks.{n}.context", partial(_context_norms, job, n))
    for n in layers:
        yield TensorGroup(f"blocks.{n}.tables", partial(_tables, job, choices, n))
        for field in LINEARS:
            if field not in CONTEXT:
                yield TensorGroup(f"blocks.{n}.{field}", partial(_linear, job, choices, n, field))
    for name in head:
        yield TensorGroup(name, partial(_kept, job, name))


def padded_ffn(config: ModelConfig) -> int:
    return -(-config.ffn // FFN_MULTIPLE) * FFN_MULTIPLE


def package_bytes(weights: WeightSource) -> int:
    """Bounds the bytes of a package's tensors from above: one byte for each value of the linears,
    their scales and biases, and four for each value of the rest except large matrices.
    """
    total = 0
    for name in weights:
        count = torch.Size(weights.shape(name)).numel()
        if name.startswith("blocks.") and len(weights.shape(name)) == 2:
            total += count * padded_ffn(weights.config) // weights.config.ffn
        else:
            total += (2 if _is_large(weights.shape(name)) else 4) * count
        total += 8 * 256  # for alignment; scales take less than biases are counted for
    return total


def _kept(job: Quantization, name: str) -> Made:
    """Keeps a tensor outside the blocks: convolutions as matrices, tables without a leading one."""
    weight = _read(job.weights, name)
    flat = weight.flatten(1) if weight.ndim > 2 else weight
    if name == "head.modulation":
        flat = weight[0]
    if not _is_large(weight.shape):
        return {name: flat}, []
    small = narrow(flat)
    return {name: small}, [measure_cast(name, flat, small)]


def narrow(weight: Tensor) -> Tensor:
    """Takes two bytes a value: BF16 where that loses nothing, as for the checkpoints in use, else
    FP16, which rounds the FP32 values of a merged LoRA four times finer than BF16.
    """
    short = weight.bfloat16()
    parts = zip(short.split(CHUNK_ROWS), weight.split(CHUNK_ROWS))
    is_exact = all(torch.equal(stored.float(), exact) for stored, exact in parts)
    return short if is_exact else weight.half()


def _is_large(shape: Sequence[int]) -> bool:
    return len(shape) == 2 and torch.Size(shape).numel() >= LARGE


def _context_norms(job: Quantization, n: int) -> Made:
    norms = {"cross_norm_q": "norm_q", "text_norm_k": "norm_k", "vision_norm_k": "norm_k_img"}
    made = {
        f"blocks.{n}.{field}": _read(job.weights, f"blocks.{n}.cross_attn.{name}.weight")
        for field, name in norms.items()
    }
    return made, []


def _tables(job: Quantization, choices: Choices, n: int) -> Made:
    read, block = partial(_read, job.weights), f"blocks.{n}."
    first, second, third, inner = (
        choices(n, field).smooth for field in ("qkv", "up", "cross_q", "down")
    )
    made = {
        "modulation": read(f"{block}modulation")[0],
        "smooth": torch.stack([first, second]),
        "norm_q": read(f"{block}self_attn.norm_q.weight"),
        "norm_k": read(f"{block}self_attn.norm_k.weight"),
        "norm3_shift": read(f"{block}norm3.bias") * third,
        "norm3_scale": read(f"{block}norm3.weight") * third - 1,
        "inner": inner,
    }
    return {block + field: tensor for field, tensor in made.items()}, []


def _linear(job: Quantization, choices: Choices, n: int, field: str) -> Made:
    choice, name = choices(n, field), f"blocks.{n}.{field}"
    weight = _read_linear(job.weights, n, field, "weight")
    bias = _read_linear(job.weights, n, field, "bias")
    if not bool((choice.smooth == 1).all()):
        weight /= choice.smooth
    if choice.form.rotated:
        rotate(weight, out=weight)
    rows, copied = _rows(job.weights, choice, n, field, weight)
    error = measure(name, weight, rows, choice.reason, copied)
    after = {"qkv": "o", "text": "cross_o", "vision": "cross_o"}.get(field)
    if after is not None:  # the values are the last of its outputs, and make the input of `after`
        dim, multiplier = job.weights.config.dim, choices(n, after).smooth
        rows.s[-dim:] *= multiplier
        bias[-dim:] *= multiplier
    return {f"{name}.q": rows.q, f"{name}.s": rows.s, f"{name}.bias": bias}, [error]


def _rows(
    weights: WeightSource, choice: FormatChoice, n: int, field: str, weight: Tensor
) -> tuple[Rows, list[str]]:
    """Makes rows of weight [out, in], in its final basis, and names the parts whose codes are the
    file's.
    """
    copied = _kept_parts(weights, n, field, choice.form)
    if bool((choice.smooth != 1).any()) or not copied:
        return quantize_rows(weight, replace(choice.form, rotated=False)), []
    q = torch.zeros(weight.shape, dtype=choice.form.dtype)
    made, first = Rows(q, torch.empty(len(q)), choice.form.rotated), 0
    for part in LINEARS[field]:
        name = f"blocks.{n}.{part}.weight"
        codes = weights.codes(name) if part in copied else None
        count, width = weights.shape(name)
        held = slice(first, first + count)
        if codes is None:
            rows, width = quantize_rows(weight[held], RowForm(q.dtype)), weight.shape[1]
        else:
            rows = rows_of(codes)
        made.q[held, :width], made.s[held] = rows.q, rows.s
        first += count
    made.s[first:] = quantize_rows(weight[first:], RowForm(q.dtype)).s  # rows of zeros
    return made, copied


def _kept_parts(weights: WeightSource, n: int, field: str, form: RowForm) -> list[str]:
    """Names the parts of a linear of which the file holds the codes of a form."""
    kept = ((part, weights.kept_by(f"blocks.{n}.{part}.weight")) for part in LINEARS[field])
    return [part for part, by in kept if by is not None and WEIGHT_FORMS[by] == form]


def _choice(job: Quantization, n: int, field: str) -> FormatChoice:
    """Chooses the form of a linear of a block, and the multipliers of its input.

    A linear whose codes are all in the file gets none, so that they can stay; where inputs were
    seen, what that saves is weighed against what multipliers would.
    """
    if field in CONTEXT:  # all blocks share their input
        return FormatChoice.plain(job.form, _shape(job.weights, n, field)[1])
    if job.seen is None and not job.form.rotated:
        return FormatChoice.plain(job.form, _shape(job.weights, n, field)[1])
    kept = [form for form in job.allowed if _is_kept(job.weights, n, field, form)]
    if job.seen is None and kept:
        return FormatChoice.plain(job.form, _shape(job.weights, n, field)[1], KEPT)
    weight = _read_linear(job.weights, n, field, "weight")
    seen = None
    if job.seen is not None:
        seen = job.seen.channels(f"blocks.{n}.{LINEARS[field][0]}").padded(weight.shape[1])
    # a program of TensorRT, which FP8 weights may be for, has no multipliers behind GELU
    can_smooth = field != "down" or job.form.rotated
    return choose(weight, seen, job.allowed, job.form, can_smooth, kept)


def _is_kept(weights: WeightSource, n: int, field: str, form: RowForm) -> bool:
    return len(_kept_parts(weights, n, field, form)) == len(LINEARS[field])


def _shape(weights: WeightSource, n: int, field: str) -> tuple[int, int]:
    """The shape [out, in] of a linear in the package."""
    shapes = [weights.shape(f"blocks.{n}.{name}.weight") for name in LINEARS[field]]
    out, width = sum(rows for rows, _ in shapes), shapes[0][1]
    ffn = padded_ffn(weights.config)
    return (ffn if field == "up" else out), (ffn if field == "down" else width)


def _read_linear(weights: WeightSource, n: int, field: str, kind: str) -> Tensor:
    """Reads a linear in fp32, its parts below each other. Zeros pad the feed forward."""
    shape = _shape(weights, n, field)
    out = torch.zeros(shape if kind == "weight" else shape[:1])
    first = 0
    for part in LINEARS[field]:
        name = f"blocks.{n}.{part}.{kind}"
        rows, *columns = weights.shape(name)
        target = out[first : first + rows]
        weights.read_into(name, target[:, : columns[0]] if columns else target)
        first += rows
    return out


def _read(weights: WeightSource, name: str) -> Tensor:
    out = torch.empty(weights.shape(name))
    weights.read_into(name, out)
    return out
