"""Proves what a plan does from its builder's log, and refuses what it must not do.

A plan cannot be opened without a GPU. But the builder prints the layers it planned, with the types
and the layout of all they read and write, and that shows what otherwise happens in silence: a
product or an attention that runs in BF16, a weight that is transposed at every call
(docs/reference/tensorrt.md 3). It does not show how fast a kernel is, nor how precisely it sums.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass

from engine.errors import BuildFailed

FP8 = "FP8"
PRODUCT = "gemm"
FUSED_ATTENTION = "mha"  # in the names of such kernels
NO_KERNELS = ("signal", "wait", "shape_call")

_LAYER = re.compile(
    r"Name: (?P<name>.*?), LayerType: (?P<kind>\w+), Inputs: \[(?P<inputs>.*?)\], "
    r"Constants: \[.*?\], Outputs: \[(?P<outputs>.*?)\], TacticName: "
)
_OPERAND = re.compile(
    r"\{ Name: (?P<name>.*?), Dimensions: \[(?P<dims>[^]]*)\], Strides: \[(?P<strides>[^]]*)\], "
    r".*?Datatype: (?P<dtype>\w+),"
)


@dataclass(frozen=True, slots=True)
class Operand:
    """One tensor that a layer reads or writes."""

    name: str
    dims: tuple[int, ...]  # -1 where it depends on the number of tokens
    strides: tuple[int, ...]
    dtype: str  # as the builder calls it: FP8, BFloat16, Float


@dataclass(frozen=True, slots=True)
class PlanLayer:
    """One layer that the builder planned."""

    name: str
    kind: str
    inputs: tuple[Operand, ...]
    outputs: tuple[Operand, ...]

    @property
    def is_attention(self) -> bool:
        return FUSED_ATTENTION in self.name

    @property
    def dtypes(self) -> str:
        return " x ".join(operand.dtype for operand in self.inputs)


@dataclass(frozen=True, slots=True)
class PlanProof:
    """The counts of what a plan was found to hold."""

    kernels: int
    products8: int  # in FP8, one for each weight
    attentions8: int  # in FP8
    attentions: int  # others


def layer_table(log: str) -> str:
    """Finds the lines of a builder's log that list the layers; empty if there are none."""
    _, _, table = log.rpartition("Layers:\n")
    return "".join(f"{line}\n" for line in table.splitlines() if line.startswith("Name: "))


def read_layers(table: str) -> list[PlanLayer]:
    """Reads the layers. Raises `BuildFailed` for a line of another version."""
    layers = []
    for line in table.splitlines():
        if not (found := _LAYER.match(line)):
            raise BuildFailed(
                f"TensorRT-RTX's layer table cannot be read at {line[:80]!r}: this version writes "
                "it otherwise. Install the version that pyproject.toml names."
            )
        inputs, outputs = (_operands(found[side]) for side in ("inputs", "outputs"))
        layers.append(PlanLayer(found["name"], found["kind"], inputs, outputs))
    return layers


def _operands(text: str) -> tuple[Operand, ...]:
    return tuple(
        Operand(found["name"], _numbers(found["dims"]), _numbers(found["strides"]), found["dtype"])
        for found in _OPERAND.finditer(text)
    )


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(number) for number in text.split(",") if number)


def prove(
    plan: str, layers: list[PlanLayer], depths: Mapping[str, int], attentions8: int, attentions: int
) -> PlanProof:
    """Proves that every product is of 8-bit rows with a weight as it lies in memory, and that the
    attentions are fused, so many of them in FP8. `depths` has the values in a row of each weight.

    Raises `BuildFailed` with all that is wrong with `plan`.
    """
    wrong = [reason for name, depth in depths.items() for reason in _faults(layers, name, depth)]
    for layer in layers:
        if layer.kind == PRODUCT and not any(operand.name in depths for operand in layer.inputs):
            wrong.append(f"the product {layer.name} is {layer.dtypes} and reads no weight")
    fused = [layer for layer in layers if layer.is_attention]
    in_fp8 = [layer for layer in fused if all(operand.dtype == FP8 for operand in layer.inputs)]
    if (len(in_fp8), len(fused) - len(in_fp8)) != (attentions8, attentions):
        found = ", ".join(f"{layer.name} of {layer.dtypes}" for layer in fused) or "none"
        wrong.append(
            f"{attentions8} fused attentions in FP8 and {attentions} in another type are "
            f"expected, found {found}"
        )
    if wrong:
        raise BuildFailed(
            f"{plan} fails its proof: {'; '.join(wrong)}. pyproject.toml names the version of "
            "TensorRT-RTX that is known to plan it well."
        )
    kernels = sum(layer.kind not in NO_KERNELS for layer in layers)
    return PlanProof(kernels, len(depths), attentions8, attentions)


def _faults(layers: list[PlanLayer], name: str, depth: int) -> list[str]:
    """Lists faults in the use of a weight: one product should read it, each row in one piece."""
    reads = [(layer, x) for layer in layers for x in layer.inputs if x.name == name]
    products = [(layer, x) for layer, x in reads if layer.kind == PRODUCT]
    wrong = [
        f"{name} is transposed or widened by {layer.name}"
        for layer, _ in reads
        if layer.kind != PRODUCT
    ]
    for layer, operand in products:
        if any(x.dtype != FP8 for x in layer.inputs):
            wrong.append(f"the product with {name} is {layer.dtypes}")
        if operand.dims[-2:-1] != (depth,) or operand.strides[-2:-1] != (1,):
            wrong.append(f"the rows of {name} do not lie in one piece")
    if len(products) != 1 and not wrong:
        wrong.append(f"{len(products)} products read {name}")
    return wrong
