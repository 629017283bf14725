"""The graphs of a block compute what the block computes, in onnxruntime as in PyTorch."""

import math
from functools import cache

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from onnx import TensorProto, helper

from engine.build import operators
from engine.build.export import ATTENTION, check, export, quantise_softmax
from engine.build.operators import E4M3, to_e4m3, widen
from engine.build.segments import (
    DEPLOY,
    EXACT,
    K_SCALE,
    Q_SCALE,
    SEGMENTS,
    SOFTMAX_FACTOR,
    TWIN,
    Segment,
)
from engine.config import SCAIL_14B, ModelConfig
from engine.denoise.block import (
    LINEARS,
    BlockWeights,
    ContextWeights,
    assemble,
    block_modulation,
    context_keys,
    run_block,
)
from engine.errors import BuildFailed
from engine.models.attention import sdpa
from engine.models.dit import Block, Context, rope_tables, rotate
from kernels.attention import ATTENTION as KERNELS
from kernels.fp8 import E4M3_MAX, quantize_rows
from kernels.ops import reference_ops

CONFIG = ModelConfig(layers=1, dim=256, ffn=512)
NORMS = {
    "norm_q": "self_attn.norm_q",
    "norm_k": "self_attn.norm_k",
    "cross_norm_q": "cross_attn.norm_q",
    "text_norm_k": "cross_attn.norm_k",
    "vision_norm_k": "cross_attn.norm_k_img",
}


class Scene:
    """A block with attention far from uniform, and 54 tokens of a clip."""

    def __init__(self):
        draw = torch.Generator().manual_seed(5)

        def randn(*shape):
            return torch.randn(*shape, generator=draw)

        self.block = Block(CONFIG, sdpa).requires_grad_(False)
        for name, weight in self.block.named_parameters():
            if weight.ndim == 2:
                weight.copy_(randn(*weight.shape) / math.sqrt(weight.shape[1]))
            elif "norm" in name and name.endswith("weight"):
                weight.copy_(1.4 + 0.3 * randn(*weight.shape))
            else:
                weight.copy_(0.4 * randn(*weight.shape))
        self.rope = rope_tables((2, 3, 6), False, torch.device("cpu"))
        self.x, self.modulation = randn(len(self.rope.cos), CONFIG.dim), randn(6, CONFIG.dim)
        self.context = Context(randn(512, CONFIG.dim), randn(257, CONFIG.dim))

    @torch.inference_mode()
    def exact(self):
        return self.block(self.x, self.modulation, self.context, self.rope)

    def named(self, numerics):
        """All tensors by the names of ports, but those that `context` makes."""
        modules = dict(self.block.named_modules())
        tensors = {
            "x": self.x,
            "modulation": self.modulation + self.block.modulation[0],
            "cos": self.rope.cos[:, 0],
            "sin": self.rope.sin[:, 0],
            "text": self.context.text,
            "vision": self.context.vision,
        }
        tensors = {name: tensor[None] for name, tensor in tensors.items()}
        for name, parts in LINEARS.items():
            weight = torch.cat([modules[part].weight for part in parts])
            tensors[f"{name}.bias"] = torch.cat([modules[part].bias for part in parts])
            rows = quantize_rows(weight)
            tensors[f"{name}.q"] = (rows.q if numerics.quantised else weight)[None]
            tensors[f"{name}.s"] = rows.s if numerics.quantised else torch.ones(len(weight))
        tensors |= {name: modules[norm].weight for name, norm in NORMS.items()}
        tensors["norm3_shift"] = modules["norm3"].bias
        tensors["norm3_scale"] = modules["norm3"].weight - 1
        return tensors


@cache
def scene():
    return Scene()


def run(segment, tensors):
    """Computes the outputs in PyTorch, by the names of ports."""
    with torch.inference_mode():
        made = segment(*(tensors[port.name] for port in segment.inputs))
    return {port.name: tensor for port, tensor in zip(segment.outputs, made, strict=True)}


def with_keys(numerics):
    """All that a block is given, after its context segment has run."""
    tensors = scene().named(numerics)
    return tensors | run(Segment("context", CONFIG, numerics), tensors)


def compute(path, segment, tensors):
    """Computes the first output in onnxruntime."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    given = {}
    for port in segment.inputs:
        tensor = tensors[port.name].contiguous()
        if tensor.dtype == E4M3:
            codes = tensor.view(torch.uint8).numpy()
            given[port.name] = ort.OrtValue.ortvalue_from_numpy_with_onnx_type(
                codes, TensorProto.FLOAT8E4M3FN
            )
        else:
            given[port.name] = ort.OrtValue.ortvalue_from_numpy(tensor.numpy())
    return torch.from_numpy(session.run_with_ort_values(None, given)[0].numpy())


def relative_error(got, want):
    return ((got.double() - want.double()).norm() / want.double().norm()).item()


def cosine(got, want):
    return torch.cosine_similarity(got.double().flatten(), want.double().flatten(), dim=0).item()


# --- the block


def test_the_unquantised_segment_is_the_block():
    got = run(Segment("block", CONFIG, EXACT), with_keys(EXACT))["out"][0]
    assert relative_error(got, scene().exact()) < 1e-5


def test_the_unquantised_graph_is_the_block_in_onnxruntime(tmp_path):
    segment = Segment("block", CONFIG, EXACT)
    export(segment, tmp_path / "block.onnx")
    got = compute(tmp_path / "block.onnx", segment, with_keys(EXACT))[0]
    assert relative_error(got, scene().exact()) < 1e-5


def test_the_quantised_twin_in_onnxruntime_is_the_segment(tmp_path):
    segment, tensors = Segment("block", CONFIG, TWIN), with_keys(TWIN)
    export(segment, tmp_path / "twin.onnx")
    got = compute(tmp_path / "twin.onnx", segment, tensors)
    want = run(segment, tensors)["out"]
    assert cosine(got, want) > 0.9999
    assert relative_error(got, want) < 5e-3  # sums in another order move values across a rounding


def weights(kind):
    """The names of ports are those of a package."""
    tensors = scene().named(TWIN) | {
        "modulation": scene().block.modulation[0],
        "smooth": torch.ones(2, CONFIG.dim),
        "inner": torch.ones(CONFIG.ffn),
    }
    return assemble(kind, lambda name: tensors[name][0] if name.endswith(".q") else tensors[name])


@torch.inference_mode()
def keys(ops):
    context = scene().context
    return context_keys(ops, weights(ContextWeights), context.text, context.vision)


@cache
@torch.inference_mode()
def native():
    """Computes the same block by the references of our own kernels, all of it in FP8."""
    ops, block = reference_ops(KERNELS["fp8_f32"]), weights(BlockWeights)
    modulation = block_modulation(block, scene().modulation)
    return run_block(ops, block, keys(ops), scene().x.clone(), modulation, scene().rope)


@pytest.mark.parametrize("numerics", [TWIN, DEPLOY], ids=["fp32", "bf16"])
def test_the_quantised_block_is_as_near_as_the_native_one(numerics):
    got = run(Segment("block", CONFIG, numerics), with_keys(numerics))["out"][0]
    want, other = scene().exact(), native()
    assert cosine(got, other) > 0.999
    assert relative_error(got, want) < 1.1 * relative_error(other, want)


@torch.inference_mode()
def test_the_hybrid_with_our_attention_is_the_native_block():
    tensors, ops = with_keys(DEPLOY), reference_ops(KERNELS["fp8_f32"])
    qkv = run(Segment("pre", CONFIG, DEPLOY), tensors)["qkv"][0]
    assert qkv.dtype == torch.bfloat16
    heads = ops.rope(
        qkv, tensors["norm_q"], tensors["norm_k"], tensors["cos"][0], tensors["sin"][0]
    )
    tensors["attention"] = ops.attention(heads, len(qkv))[None]
    got = run(Segment("post", CONFIG, DEPLOY), tensors)["out"][0]
    assert cosine(got, native()) > 0.999
    assert relative_error(got, native()) < relative_error(got, scene().exact())


@torch.inference_mode()
def test_the_context_segment_makes_the_keys_of_the_native_block():
    tensors, want = with_keys(DEPLOY), keys(reference_ops())
    for name, made in (("text", want.text), ("vision", want.vision)):
        for field in "kv":
            got = tensors[f"{name}_{field}"][0]
            assert relative_error(got, getattr(made, field)[: len(got)]) < 2e-2


def moved(tensor):
    """Moves the numbers to other places."""
    if tensor.dtype == E4M3:
        return tensor.view(torch.uint8).roll(1, -1).view(E4M3)
    return tensor.roll(1, -1)


@pytest.mark.parametrize("name", SEGMENTS["block"].inputs)
def test_every_input_of_a_block_counts(name):
    segment, tensors = Segment("block", CONFIG, TWIN), with_keys(TWIN)
    got = run(segment, tensors | {name: moved(tensors[name])})["out"]
    assert relative_error(got, run(segment, tensors)["out"]) > 1e-3


def test_queries_and_keys_of_a_wide_model_fit_their_scales():
    """The largest that RMSNorm leaves: all of a token in one channel, whose weight is 12."""
    largest = 12 * math.sqrt(SCAIL_14B.dim)
    assert largest * SOFTMAX_FACTOR < Q_SCALE * E4M3_MAX
    assert 2 * largest < K_SCALE * E4M3_MAX


# --- its operations


def test_e4m3_rounds_half_to_even_and_saturates():
    x = torch.tensor([0.0, 1.0625, 1.1875, -17.0, 448.0, 500.0, -1e9, 2**-10, 3 * 2**-10])
    want = torch.tensor([0.0, 1.0, 1.25, -16.0, 448.0, 448.0, -448.0, 0.0, 2**-8])
    assert torch.equal(to_e4m3(x, 1.0, torch.float32), want)
    assert torch.equal(to_e4m3(x / 8, 1 / 8, torch.bfloat16), (want / 8).bfloat16())


def test_codes_are_widened_as_they_are():
    codes = torch.arange(0, 127, dtype=torch.uint8).view(E4M3)
    assert torch.equal(widen(codes, torch.bfloat16).float(), codes.float())


def test_heads_are_rotated_as_in_the_model():
    draw = torch.Generator().manual_seed(1)
    rope = rope_tables((1, 2, 4), True, torch.device("cpu"))
    x = torch.randn(len(rope.cos), 2, 128, generator=draw)
    got = operators.rotate(x.transpose(0, 1)[None], rope.cos[None, :, 0], rope.sin[None, :, 0])
    assert torch.equal(got[0].transpose(0, 1), rotate(x, rope))


# --- the files


@pytest.fixture(scope="module")
def pre(tmp_path_factory):
    """A segment, and the files of two exports of it."""
    segment = Segment("pre", CONFIG, TWIN)
    files = [tmp_path_factory.mktemp("export") / "pre.onnx" for _ in range(2)]
    for path in files:
        export(segment, path)
    return segment, files


def test_a_graph_says_the_same_at_every_export_and_nothing_of_this_machine(pre):
    one, two = (path.read_bytes() for path in pre[1])
    assert one == two
    for word in (b".py", b"site-packages", b"engine/", str(pre[1][0].parent).encode()):
        assert word not in one


def test_a_graph_has_the_ports_of_its_segment(pre):
    segment, (path, _) = pre
    graph = onnx.load(path).graph
    sides = ((graph.input, segment.inputs), (graph.output, segment.outputs))
    for values, ports in sides:
        sizes = [[n.dim_param or n.dim_value for n in v.type.tensor_type.shape.dim] for v in values]
        assert sizes == [list(port.shape) for port in ports]
        assert [value.name for value in values] == [port.name for port in ports]


@pytest.mark.parametrize("tokens", [2, 5, 48])
def test_a_graph_takes_any_number_of_tokens(pre, tokens):
    segment, (path, _) = pre
    tensors = scene().named(TWIN)
    tensors["x"] = tensors["x"][:, :tokens]
    got = compute(path, segment, tensors)
    assert relative_error(got, run(segment, tensors)["qkv"]) < 1e-3


# --- what no builder may have


def attention_graph(*operands, quantised=True):
    """Attentions of the operands named; those with an 8 come out of E4M3."""
    names = sorted({name for row in operands for name in row})
    shape = [1, 2, "S", 128]
    inputs = [helper.make_tensor_value_info(n, TensorProto.BFLOAT16, shape) for n in names]
    outputs = [
        helper.make_tensor_value_info(f"out{n}", TensorProto.BFLOAT16, shape)
        for n in range(len(operands))
    ]
    one = helper.make_tensor("one", TensorProto.BFLOAT16, [], [1.0])
    nodes = []
    for name in names:
        if name.endswith("8"):
            codes, wide = f"{name}.codes", f"{name}.wide"
            nodes.append(
                helper.make_node("QuantizeLinear", [name, "one"], [codes], output_dtype=17)
            )
            nodes.append(helper.make_node("DequantizeLinear", [codes, "one"], [wide]))
    wide = {name: f"{name}.wide" if name.endswith("8") else name for name in names}
    for n, row in enumerate(operands):
        given = [wide[name] for name in row]
        nodes.append(helper.make_node("Attention", given, [f"out{n}"], name=f"attention{n}"))
    graph = helper.make_graph(nodes, "attentions", inputs, outputs, [one])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)])


def test_only_attention_of_eight_bits_gets_a_quantised_softmax():
    model = attention_graph(("q8", "k8", "v8"), ("q", "k", "v"))
    quantise_softmax(model)
    first, second = (node for node in model.graph.node if "ttention" in node.op_type)
    assert (first.op_type, first.domain) == (ATTENTION, "trt")
    assert list(first.input) == ["q8.wide", "k8.wide", "v8.wide", "", "softmax_scale"]
    assert {a.name: a.i or a.f for a in first.attribute} == {
        "scale": 1.0,
        "normalization_quantize_to_type": TensorProto.FLOAT8E4M3FN,
    }
    scale = next(t for t in model.graph.initializer if t.name == "softmax_scale")
    assert np.isclose(onnx.numpy_helper.to_array(scale), 1 / 448)
    assert (second.op_type, list(second.input)) == ("Attention", ["q", "k", "v"])


@pytest.mark.parametrize(
    ("operands", "shared"),
    [
        ((("q", "k", "v"), ("q", "l", "w")), "q"),
        ((("q", "k", "v"), ("p", "l", "v")), "v"),
        ((("x", "x", "x"),), "x"),
    ],
)
def test_attentions_that_share_an_operand_are_refused(operands, shared):
    last = f"attention{len(operands) - 1}"
    with pytest.raises(BuildFailed, match=f"post.onnx: {shared} is an operand of .*{last}"):
        check(attention_graph(*operands).graph, "post.onnx")


def test_attentions_with_operands_of_their_own_are_taken_as_they_are():
    graph = attention_graph(("q8", "k8", "v8"), ("q", "k", "v")).graph
    before = graph.SerializeToString(deterministic=True)
    check(graph, "post.onnx")
    assert graph.SerializeToString(deterministic=True) == before


def test_a_scale_that_is_no_constant_is_refused():
    graph = attention_graph(("q8", "k8", "v8")).graph
    del graph.initializer[:]
    with pytest.raises(BuildFailed, match=r"post.onnx: the scale one of .* is no constant"):
        check(graph, "post.onnx")
