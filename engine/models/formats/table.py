"""The formats in which a parameter may be stored, and how its own is found: first match wins.

docs/reference/formats.md 1. What a file tells of a linear names a row of `KINDS`; without such word
the tensors beside it find a row of `FORMATS`. Nothing is known by the name of a file.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from engine.errors import BadCheckpoint
from engine.models.formats import four_bits, fp8, gguf_blocks, int8, mxfp8, nvfp4, quanto
from engine.models.formats.held import WEIGHT, WIDE, Held, RowReader, Tensors, Told, Weight
from engine.models.tensorfile import FP8, TensorFile


@dataclass(frozen=True, slots=True)
class Format:
    """A way to store a parameter."""

    recognises: Callable[[Held], bool]
    weight: Callable[[Held], Weight]  # raises `BadCheckpoint` for what the headers contradict


@dataclass(frozen=True, slots=True)
class Kind:
    """A `format` that files tell, with the types of its codes and what else they may tell."""

    weight: Callable[[Held], Weight]
    types: tuple[str, ...]
    settings: tuple[str, ...] = ()
    is_float: bool = False  # the type of the codes says the same as the format


def _plain(held: Held) -> Weight:
    def read(tensors: Tensors) -> RowReader:
        return lambda first, last: tensors[WEIGHT][first:last]

    names = {WEIGHT: held.tensors[WEIGHT]}
    return Weight(held.dtype(), 0.0, names, held.shape(), read, is_plain=True)


def _is_wide(held: Held) -> bool:
    return held.dtype() in WIDE


FORMATS = (
    Format(gguf_blocks.is_blocks, gguf_blocks.blocks),
    Format(quanto.is_quanto, quanto.quanto),
    Format(nvfp4.is_nvfp4, nvfp4.nvfp4),
    Format(mxfp8.is_mxfp8, mxfp8.mxfp8),
    Format(fp8.is_scaled, fp8.scaled),
    Format(fp8.is_cast, fp8.cast),
    Format(int8.is_int8, int8.tensorwise),
    Format(_is_wide, _plain),
)
ROTATION = (int8.ROTATED, "convrot_groupsize")
KINDS: Mapping[str, Kind] = {
    "float8_e4m3fn": Kind(fp8.scaled, ("F8_E4M3",), is_float=True),
    "float8_e5m2": Kind(fp8.scaled, ("F8_E5M2",), is_float=True),
    "float8_e4m3fn_rowwise": Kind(fp8.scaled, ("F8_E4M3",), is_float=True),
    "float8_e4m3fn_blockwise": Kind(fp8.blockwise, ("F8_E4M3",), ("group_size",)),
    "mxfp8": Kind(mxfp8.mxfp8, ("F8_E4M3",), ("group_size",)),
    "nvfp4": Kind(nvfp4.nvfp4, ("U8",), ("group_size",)),
    "int8_tensorwise": Kind(int8.tensorwise, ("I8",), ROTATION),
    "int8_blockwise": Kind(int8.blockwise, ("I8",), ("group_size",)),
    "convrot_w4a4": Kind(four_bits.convrot_w4a4, four_bits.TYPES, ROTATION),
    "asym_w4a8_int8": Kind(four_bits.asym_w4a8, four_bits.TYPES, ("group_size", *ROTATION)),
    "awq_w4a16": Kind(four_bits.awq_w4a16, four_bits.TYPES, ("group_size",)),
}
# endings of formats that no SCAIL file is known in, or that lose what they mean without a library
REFUSED = {
    "qweight": "GPTQ, AWQ or Nunchaku", "wscales": "Nunchaku", "qzeros": "GPTQ or AWQ",
    "scales": "MLX", "SCB": "bitsandbytes", "weight.absmax": "bitsandbytes",
    "weight.quant_map": "bitsandbytes",
}  # fmt: skip
# endings beside a weight, that mean something there
BESIDE = (
    *fp8.SCALES, "weight_scale_2", "weight_global_scale", "weight_s_rel", "weight_s_channel",
    "weight_codebook", "weight_correction", "weight_zeros", "pre_quant_scale", quanto.SCALE,
)  # fmt: skip
# endings of the activations' side, for programs that compute in fewer bits
ACTIVATIONS = ("input_scale", "scale_input", "output_scale", "input_absmax", "input_global_scale",
               "weight_scalar", "alpha")  # fmt: skip


def weight_of(held: Held) -> Weight:
    """How a parameter is stored. Raises `BadCheckpoint` for a format that is not read, and for
    tensors that do not fit each other.
    """
    notes = tuple[str, ...]()
    if held.told is not None:
        kind = known_kind(held.told, held.file)
        if held.dtype() in kind.types:
            weight = kind.weight(held)
            settings = held.told.settings
            unknown = sorted(key for key in settings if settings[key] and key not in kind.settings)
            if unknown:
                some = ", ".join(unknown[:5])[:80]
                notes = (f"is told with {some} by {held.told.source}, which is not known here",)
            return replace(weight, notes=(*weight.notes, *notes))
        if not kind.is_float or held.dtype() not in (*FP8, *WIDE):
            raise held.error(f"codes of the type {held.dtype()}", " or ".join(kind.types))
        notes = (
            f"is {held.dtype()}, and {held.told.source} says {held.told.kind}: it is taken as it "
            "is stored",
        )
        held = replace(held, told=None)
    for row in FORMATS:
        if row.recognises(held):
            weight = row.weight(held)
            return replace(weight, notes=(*weight.notes, *notes))
    raise BadCheckpoint(
        f"{held.file.path.name}: {held.tensors[WEIGHT]} is stored as {held.dtype()} "
        f"{list(held.shape())} and nothing beside it says what its codes mean; floating point, "
        "or a format of the table in README.md, is expected."
    )


def known_kind(told: Told, file: TensorFile) -> Kind:
    """The row of what a file tells. Raises `BadCheckpoint` if there is none, or if the columns of
    a format are rotated that no reader here turns back.
    """
    kind = KINDS.get(told.kind)
    if kind is None:
        raise BadCheckpoint(
            f"{file.path.name}: {told.source} says that it is stored as {told.kind!r}; only "
            f"{', '.join(KINDS)} and 16 or 32 bits are read."
        )
    if told.settings.get(int8.ROTATED) and int8.ROTATED not in kind.settings:
        raise BadCheckpoint(
            f"{file.path.name}: {told.source} says that its columns are rotated "
            f"({int8.ROTATED}), which is not read of {told.kind}. Use a copy that is not."
        )
    return kind
