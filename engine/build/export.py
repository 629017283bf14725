"""Writes a segment of a block as an ONNX file, the same bytes from the same code.

For TensorRT-RTX (`DEPLOY`) self attention becomes its own quantised operation, which fails the
build where there is no kernel for it. Graphs that are known to kill the builder, or to lose their
FP8 kernels in silence, are refused here (docs/reference/tensorrt.md 1 to 4).
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from engine.build.operators import ONNX_E4M3, SOFTMAX_SCALE, translations
from engine.build.segments import DEPLOY, Segment
from engine.errors import BuildFailed
from engine.tensorrt.plans import TOKENS

if TYPE_CHECKING:  # onnx is needed to build this program alone
    from onnx import GraphProto, ModelProto

OPSET = 23
DOMAIN, ATTENTION = "trt", "TRT_QuantizedAttention"
TRACED_TOKENS = 64  # any number will do
MOST_TOKENS = 2**17


def export(segment: Segment, path: Path) -> None:
    """Writes the graph of `segment`, S open. Raises `BuildFailed` if no builder may have it."""
    import onnx

    model = _exported(segment)
    if segment.numerics == DEPLOY:
        quantise_softmax(model)
    _forget_where_it_was_made(model)
    check(model.graph, path.name)
    onnx.checker.check_model(model)
    path.write_bytes(model.SerializeToString(deterministic=True))


def _exported(segment: Segment) -> ModelProto:
    arguments = tuple(
        torch.zeros(port.sized(TRACED_TOKENS), dtype=port.dtype) for port in segment.inputs
    )
    tokens = torch.export.Dim(TOKENS, min=2, max=MOST_TOKENS)
    shapes = tuple({1: tokens} if TOKENS in port.shape else None for port in segment.inputs)
    with _quiet():
        traced = torch.export.export(segment.eval(), arguments, dynamic_shapes=(shapes,))
        program = torch.onnx.export(
            traced,
            dynamo=True,
            opset_version=OPSET,
            custom_translation_table=translations(spell_out=segment.numerics != DEPLOY),
            input_names=[port.name for port in segment.inputs],
            output_names=[port.name for port in segment.outputs],
            optimize=True,
            verbose=False,
        )
    assert program is not None
    return program.model_proto


@contextmanager
def _quiet() -> Iterator[None]:
    """Silences PyTorch: it warns of its own code, and of torchvision, which nothing here needs."""
    log = logging.getLogger("torch.onnx")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        log.setLevel(level)


def quantise_softmax(model: ModelProto) -> None:
    """Quantises the softmax of E4M3 attention too, or nothing of it would run in FP8."""
    from onnx import TensorProto, helper

    graph, scale = model.graph, "softmax_scale"
    makers = {output: node.op_type for node in graph.node for output in node.output}
    found = [
        node
        for node in graph.node
        if node.op_type == "Attention" and makers.get(node.input[0]) == "DequantizeLinear"
    ]
    for node in found:
        operands = [*node.input[:3], "", scale]  # the missing one is a mask
        node.op_type, node.domain = ATTENTION, DOMAIN
        del node.input[:], node.attribute[:]
        node.input.extend(operands)
        node.attribute.append(helper.make_attribute("scale", 1.0))
        node.attribute.append(helper.make_attribute("normalization_quantize_to_type", ONNX_E4M3))
    if found:
        number = helper.make_tensor(scale, TensorProto.FLOAT, [], [SOFTMAX_SCALE])
        graph.initializer.append(number)
        model.opset_import.append(helper.make_opsetid(DOMAIN, 1))


def _forget_where_it_was_made(model: ModelProto) -> None:
    """Removes versions, stack traces with paths, and guesses at shapes: the builder has its own."""
    graph = model.graph
    del model.metadata_props[:], graph.metadata_props[:], graph.value_info[:]
    model.producer_name, model.producer_version = "scail-engine", ""
    graph.name, graph.doc_string, model.doc_string = "block", "", ""
    for node in graph.node:
        del node.metadata_props[:]
        node.doc_string = ""
    for value in [*graph.input, *graph.output]:
        del value.metadata_props[:]
        for size in value.type.tensor_type.shape.dim:
            if size.HasField("dim_param"):
                size.dim_param = TOKENS


def check(graph: GraphProto, name: str) -> None:
    """Refuses a graph that TensorRT-RTX would crash on or silently slow down: `BuildFailed`."""
    constants = {tensor.name for tensor in graph.initializer}
    seen: dict[str, str] = {}  # operand -> the attention it belongs to
    for node in graph.node:
        if node.op_type in ("Attention", ATTENTION):
            for operand in node.input[:3]:
                if operand in seen:
                    raise BuildFailed(
                        f"{name}: {operand} is an operand of {seen[operand]} and of {node.name}; "
                        "TensorRT-RTX's builder crashes on that. Give each its own tensor."
                    )
                seen[operand] = node.name
        if node.op_type in ("QuantizeLinear", "DequantizeLinear") and (
            node.input[1] not in constants
        ):
            raise BuildFailed(
                f"{name}: the scale {node.input[1]} of {node.name} is no constant; TensorRT-RTX "
                "would compute all its products in BF16. Apply scales after the product."
            )
