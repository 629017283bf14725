"""The nano model's weights in every layout, and what packages of them have lost.

python -m tests.support.nano_layouts

prints, in per cent: what the linears of a file have lost, those of a package from it, and how far
its velocity is from the exact one at three steps of a clip, attention in 16 bits. The table of
benchmarks/results/README.md comes from it.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from engine.build.columns import equalised, square_sums
from engine.build.quantize import Quantization, groups
from engine.build.report import TensorError
from engine.config import state_dir
from engine.demo.presets import SHIPPED
from engine.denoise.block import LINEARS
from engine.models.checkpoint import Checkpoint
from kernels.fp8 import E4M3, INT8R, RowForm, Rows, rotate
from tests.support.checkpoints import to_sat
from tests.support.layouts import gguf_of, int8, model_in

CONVROT = int8(group=256, format="int8_tensorwise", convrot=True)  # as published
NAMES = (
    "FP32", "SAT", "BF16", "FP16", "FP8 scale_weight", "FP8 comfy_quant", "FP8 cast", "INT8 rows",
    "ConvRot", "MXFP8", "NVFP4", "NVFP4 inverse", "Q8_0", "Q4_0", "quanto",
)  # fmt: skip
FORMS = (INT8R, E4M3)
AFTER = {"qkv": "o", "text": "cross_o", "vision": "cross_o"}  # whose input are the last outputs


@dataclass(frozen=True)
class Made:
    """The tensors of a package, and its report."""

    tensors: Mapping[str, Tensor]
    errors: list[TensorError]
    checkpoint: Checkpoint

    @property
    def copied(self) -> dict[str, list[str]]:
        return {one.name: [*one.copied] for one in self.errors if one.copied}

    def read(self, name: str) -> Tensor:
        """A tensor, as `engine.package.folder.Package` gives it."""
        return self.tensors[name]


@cache
def nano_weights() -> Mapping[str, Tensor]:
    """The weights of the demo as FP32, by their converted names."""
    held = load_file(SHIPPED.weights(state_dir()).checkpoint)
    return {name: tensor.float() for name, tensor in held.items()}


def write(layout: str, weights: Mapping[str, Tensor], folder: Path) -> Path:
    """Writes weights in a layout of `NAMES`, or of tests/support/layouts.py."""
    path, held = folder / "m.safetensors", dict(weights)
    if layout == "SAT":
        torch.save({"module": to_sat(held)}, path.with_suffix(".pt"))
        return path.with_suffix(".pt")
    if layout == "FP32":
        save_file(held, path)
        return path
    if layout.startswith("Q"):
        gguf_of(layout, held, path.with_suffix(".gguf"))
        return path.with_suffix(".gguf")
    if layout == "ConvRot":
        return model_in(layout, held, made={"ConvRot": CONVROT}).save(path)
    return model_in(layout, held).save(path)


def package_of(path: Path, form: RowForm) -> Made:
    checkpoint = Checkpoint(path)
    tensors: dict[str, Tensor] = {}
    errors: list[TensorError] = []
    for group in groups(Quantization(checkpoint, form)):
        made, found = group.make()
        tensors |= made
        errors += found
    return Made(tensors, errors, checkpoint)


def linears(made: Made) -> Iterator[tuple[str, Tensor]]:
    """What the rows of a package stand for: rotated back, without multipliers, a matrix of the
    checkpoint after the other.
    """
    for n in range(made.checkpoint.config.layers):
        for field, parts in LINEARS.items():
            name = f"blocks.{n}.{field}"
            rows = Rows(made.tensors[f"{name}.q"], made.tensors[f"{name}.s"])
            held = rows.dequantize()
            if rows.q.dtype == torch.int8:
                held = rotate(held)
            if field in AFTER:
                dim = made.checkpoint.config.dim
                held[-dim:] /= multipliers(made, n, AFTER[field])[:, None]
            held = held * multipliers(made, n, field)
            first = 0
            for part in parts:
                count, width = made.checkpoint.shape(f"blocks.{n}.{part}.weight")
                yield f"blocks.{n}.{part}.weight", held[first : first + count, :width]
                first += count


def multipliers(made: Made, n: int, field: str) -> Tensor:
    """The multipliers of a linear's input, by their definition."""
    rows = made.tensors[f"blocks.{n}.{field}.q"]
    is_copied = len(made.copied.get(f"blocks.{n}.{field}", ())) == len(LINEARS[field])
    if rows.dtype != torch.int8 or is_copied or field in ("text", "vision"):
        return torch.ones(rows.shape[1])
    whole = torch.zeros(rows.shape[1], dtype=torch.float64)
    for part in LINEARS[field]:
        name = f"blocks.{n}.{part}.weight"
        weight = torch.empty(made.checkpoint.shape(name))
        made.checkpoint.read_into(name, weight)
        whole[: weight.shape[1]] += square_sums(weight)
    return equalised(whole)


def lost(found: Iterator[tuple[str, Tensor]], exact: Mapping[str, Tensor]) -> float:
    """Relative error of all linears together, in per cent."""
    apart = size = 0.0
    for name, weight in found:
        apart += (weight - exact[name]).double().square().sum().item()
        size += exact[name].double().square().sum().item()
    return 100 * (apart / size) ** 0.5


def stored(path: Path) -> Iterator[tuple[str, Tensor]]:
    """The linears of the blocks as a file has them."""
    checkpoint = Checkpoint(path)
    for name in checkpoint:
        if name.startswith("blocks.") and name.endswith(".weight") and name in nano_weights():
            shape = checkpoint.shape(name)
            if len(shape) == 2:
                weight = torch.empty(shape)
                checkpoint.read_into(name, weight)
                yield name, weight


def main() -> None:
    from benchmarks.nano.scenes import HELD_OUT
    from benchmarks.nano.suite import dance, task
    from benchmarks.quality.blocks import recorded, walk
    from benchmarks.quality.metrics import relative_error
    from benchmarks.quality.suite import QualityScene, model_of, networks, settings
    from engine.load import load_exact
    from engine.models.attention import find_attention
    from kernels.ops import plain_attention, reference_ops

    torch.set_num_threads(1)
    with TemporaryDirectory() as name:
        folder = Path(name)
        one, demo = task(HELD_OUT, folder), SHIPPED.weights(state_dir())
        scene = QualityScene("nano", demo.checkpoint, demo.models, one.request, {})
        pipeline = load_exact(demo.checkpoint, [], demo.models, networks(scene), settings(None))
        exact = model_of(pipeline)
        with recorded(exact) as calls:
            dance(pipeline, one)
        steps = (calls[0], calls[len(calls) // 2], calls[-1])
        ops = {"sdpa": plain_attention(reference_ops(), find_attention("sdpa"))}
        print("| layout | file | INT8 package | velocity | FP8 package | velocity |")
        print("|---|---|---|---|---|---|")
        for layout in NAMES:
            path = write(layout, nano_weights(), folder)
            cells = [f"{lost(stored(path), nano_weights()):.2f}"]
            for form in FORMS:
                made = package_of(path, form)
                share = len(made.copied) and ", copied"
                cells.append(f"{lost(linears(made), nano_weights()):.2f}{share or ''}")
                errors = [
                    100 * relative_error(walk(exact, made, ops, call)["sdpa"].velocity,
                                         call.velocity)
                    for call in steps
                ]  # fmt: skip
                cells.append(" ".join(f"{error:.2f}" for error in errors))
            print(f"| {layout} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
