"""Plans are built without a GPU and proven, and whatever the builder does becomes a sentence."""

import hashlib
import json
import sys
from dataclasses import asdict
from importlib.util import find_spec

import pytest
import torch
from onnx import TensorProto, helper

from engine.build.export import export, quantise_softmax
from engine.build.plan_proofs import PlanProof, layer_table, prove, read_layers
from engine.build.segments import DEPLOY, SEGMENTS, Segment
from engine.build.tensorrt import (
    RANGES,
    build_plan,
    build_program,
    run_builder,
    unavailable,
)
from engine.config import LIMITS, SCAIL_14B, TINY
from engine.errors import BuildFailed
from engine.memory import ClipShape
from engine.tensorrt.plans import TokenRange
from kernels.arch import SM89, SM90, SM120

TIMEOUT_S = 120  # for one build, which takes 2
TARGETS = pytest.mark.parametrize("arch", [SM89, SM120], ids=lambda arch: arch.name)
library = pytest.mark.skipif(
    find_spec("tensorrt_rtx") is None,
    reason="TensorRT-RTX is not installed: pip install '.[tensorrt]'",
)

PROOFS = {
    "block": PlanProof(kernels=28, products8=6, attentions8=1, attentions=2),
    "pre": PlanProof(kernels=3, products8=1, attentions8=0, attentions=0),
    "post": PlanProof(kernels=19, products8=5, attentions8=0, attentions=2),
    "context": PlanProof(kernels=8, products8=2, attentions8=0, attentions=0),
}


def planned(name, config, folder, *arches):
    """A plan of one segment for each architecture, from one graph."""
    segment, tokens = Segment(name, config, DEPLOY), RANGES[512 if config is TINY else 65_536]
    export(segment, folder / f"{name}.onnx")
    return [build_plan(segment, arch, folder, tokens, timeout_s=TIMEOUT_S)[0] for arch in arches]


@library
@pytest.mark.parametrize("name", ["block", "pre"])
def test_a_tiny_plan_is_built_for_both_architectures_and_proven(tmp_path, name):
    found = planned(name, TINY, tmp_path, SM89, SM120)
    for plan in found:
        assert plan.proof == asdict(PROOFS[name])
        assert plan.bytes < 2**22
    assert len({plan.sha256 for plan in found}) == 2
    assert hashlib.sha256((tmp_path / f"{name}.plan").read_bytes()).hexdigest() == found[1].sha256
    assert (tmp_path / f"{name}.layers.txt").read_text("utf-8").count("LayerType: gemm") == (
        PROOFS[name].products8
    )


@library
@pytest.mark.parametrize(
    "name", ["block", *(pytest.param(n, marks=pytest.mark.slow) for n in PROOFS if n != "block")]
)
def test_a_plan_of_the_whole_width_is_built_for_both_architectures_and_proven(tmp_path, name):
    for plan in planned(name, SCAIL_14B, tmp_path, SM89, SM120):
        assert plan.proof == asdict(PROOFS[name])
        assert plan.bytes < 2**22


def test_plans_of_the_real_models_take_the_largest_clip_with_all_further_pictures():
    largest = ClipShape(704, 1280, 81, references=LIMITS.max_references).tokens
    most = RANGES[65_536].most
    assert largest <= most < largest + 1024


@library
@pytest.mark.slow
@TARGETS
def test_a_program_is_all_plans_with_their_graphs_and_a_record_of_them(tmp_path, arch):
    program = build_program(TINY, arch, tmp_path, timeout_s=TIMEOUT_S)
    proofs = {name: plan.proof for name, plan in program.plans.items()}
    assert proofs == {name: asdict(proof) for name, proof in PROOFS.items()}
    record = json.loads(json.dumps(asdict(program)))
    assert (record["arch"], record["library"]) == (arch.name, "1.7.1.116")
    assert record["tokens"] == {"least": 64, "usual": 1024, "most": 16_384}
    assert ["qkv.q", "FP8", [1, 768, 256]] in record["plans"]["block"]["inputs"]
    assert record["plans"]["pre"]["outputs"] == [["qkv", "BF16", [1, "S", 768]]]
    assert record["plans"]["block"]["proof"]["products8"] == 6
    files = {plan["file"] for plan in record["plans"].values()} | set(record["graphs"])
    assert files == {path.name for path in tmp_path.iterdir()}
    for plan in record["plans"].values():
        data = (tmp_path / plan["file"]).read_bytes()
        assert (len(data), hashlib.sha256(data).hexdigest()) == (plan["bytes"], plan["sha256"])
        assert b".py" not in data


# --- graphs that no plan may come of, and the real builder


def graph(nodes, inputs, outputs, constants=()):
    ports = [
        [helper.make_tensor_value_info(name, dtype, shape) for name, (dtype, shape) in side.items()]
        for side in (inputs, outputs)
    ]
    numbers = {"one": (TensorProto.BFLOAT16, 1.0), "one32": (TensorProto.FLOAT, 1.0)}
    tensors = [helper.make_tensor(name, dtype, [], [v]) for name, (dtype, v) in numbers.items()]
    made = helper.make_graph(nodes, "graph", *ports, [*tensors, *constants])
    opsets = [helper.make_opsetid("", 23), helper.make_opsetid("trt", 1)]
    return helper.make_model(made, opset_imports=opsets)


def product(weight, scale="one", turned=(0, 2, 1)):
    """The graph of y = x w^T, both E4M3. weight: shape as stored; scale: the name of its scale."""
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "one32"], ["codes"], output_dtype=17),
        helper.make_node("DequantizeLinear", ["codes", "one"], ["rows"]),
        helper.make_node("DequantizeLinear", ["w", scale], ["wide"]),
        helper.make_node("Transpose", ["wide"], ["turned"], perm=turned),
        helper.make_node("MatMul", ["rows", "turned"], ["y"], name="product"),
    ]
    inputs = {
        "x": (TensorProto.FLOAT, [1, 512, 256]),
        "w": (TensorProto.FLOAT8E4M3FN, weight),
    }
    if scale not in ("one", "one32"):
        inputs[scale] = (TensorProto.BFLOAT16, [])
    return graph(nodes, inputs, {"y": (TensorProto.BFLOAT16, [1, 512, 768])})


def attention(*, quantised, rewritten=False):
    """Self attention, from E4M3 or not, its softmax quantised or not."""
    shape = [1, 2, 512, 128]
    nodes = []
    for name in "qkv":
        nodes += [
            helper.make_node("QuantizeLinear", [name, "one"], [f"{name}8"], output_dtype=17),
            helper.make_node("DequantizeLinear", [f"{name}8", "one"], [f"{name}16"]),
        ]
    end = "16" if quantised else ""
    operands = [f"{name}{end}" for name in "qkv"]
    nodes.append(helper.make_node("Attention", operands, ["y"], name="attention", scale=1.0))
    inputs = dict.fromkeys("qkv", (TensorProto.BFLOAT16, shape))
    made = graph(nodes if quantised else nodes[-1:], inputs, {"y": (TensorProto.BFLOAT16, shape)})
    if rewritten:
        quantise_softmax(made)
    return made


def proven(model, folder, depths, attentions8, *, arch=SM89, **order):
    path = folder / "made.onnx"
    path.write_bytes(model.SerializeToString())
    log, _ = run_builder(path, folder / "made.plan", arch, {}, timeout_s=TIMEOUT_S, **order)
    return prove("made.plan", read_layers(layer_table(log)), depths, attentions8, 0)


@library
@TARGETS
def test_a_product_with_a_weight_as_it_lies_is_proven(tmp_path, arch):
    assert proven(product([1, 768, 256]), tmp_path, {"w": 256}, 0, arch=arch).products8 == 1


@library
@TARGETS
def test_a_weight_with_a_scale_that_is_not_constant_is_refused(tmp_path, arch):
    with pytest.raises(BuildFailed, match=r"made.plan fails its proof: .*\bw\b"):
        proven(product([1, 768, 256], "scale"), tmp_path, {"w": 256}, 0, arch=arch)


@library
def test_a_weight_that_the_builder_transposes_is_refused(tmp_path):
    with pytest.raises(BuildFailed, match=r"w is transposed or widened by __myl_"):
        proven(product([768, 256], turned=(1, 0)), tmp_path, {"w": 256}, 0)


@library
def test_a_weight_whose_rows_do_not_lie_in_one_piece_is_refused(tmp_path):
    with pytest.raises(BuildFailed, match="the rows of w do not lie in one piece"):
        proven(product([1, 256, 768], turned=(0, 1, 2)), tmp_path, {"w": 256}, 0)


@library
@TARGETS
def test_attention_is_fp8_with_its_softmax_alone(tmp_path, arch):
    good = attention(quantised=True, rewritten=True)
    assert proven(good, tmp_path, {}, 1, arch=arch).attentions8 == 1
    for bad in (attention(quantised=True), attention(quantised=False)):
        with pytest.raises(BuildFailed, match=r"1 fused attentions in FP8 .* found .*BFloat16"):
            proven(bad, tmp_path, {}, 1, arch=arch)


@library
def test_a_builder_that_crashes_is_a_sentence(tmp_path):
    """Two attentions of one query: why the builder has a process of its own."""
    nodes = [
        helper.make_node("Transpose", ["q"], ["heads"], perm=[0, 2, 1, 3]),
        helper.make_node("Attention", ["heads", "k", "v"], ["one_of_two"]),
        helper.make_node("Attention", ["heads", "l", "w"], ["two_of_two"]),
        helper.make_node("Add", ["one_of_two", "two_of_two"], ["y"]),
    ]
    bf16 = TensorProto.BFLOAT16
    inputs = {"q": (bf16, [1, 512, 2, 128])} | {n: (bf16, [1, 2, 257, 128]) for n in "kvlw"}
    with pytest.raises(BuildFailed, match=r"made.plan for sm89: .* dies of SIGSEGV on made.onnx"):
        proven(graph(nodes, inputs, {"y": (bf16, [1, 2, 512, 128])}), tmp_path, {}, 0)


@library
def test_a_graph_that_the_library_does_not_know_is_a_sentence(tmp_path):
    nodes = [helper.make_node("Dance", ["x"], ["y"], domain="trt")]
    ports = ({"x": (TensorProto.FLOAT, [4])}, {"y": (TensorProto.FLOAT, [4])})
    with pytest.raises(BuildFailed, match=r"refuses made.onnx: .*(Plugin not found|Dance)"):
        proven(graph(nodes, *ports), tmp_path, {}, 0)


@library
@pytest.mark.parametrize("damage", [b"", b"no graph", None])
def test_a_file_that_is_no_graph_is_a_sentence(tmp_path, damage):
    path = tmp_path / "made.onnx"
    if damage is not None:
        path.write_bytes(damage)
    with pytest.raises(BuildFailed, match=r"refuses made.onnx: ."):
        run_builder(path, tmp_path / "made.plan", SM89, {}, timeout_s=TIMEOUT_S)


# --- workers that end otherwise


def worker(tmp_path, *lines):
    """A builder that does as it is told."""
    path = tmp_path / "worker.py"
    path.write_text("\n".join(["import json, os, pathlib, signal, sys, time", *lines]))
    return sys.executable, str(path)


FACTS = "pathlib.Path(sys.argv[2]).with_suffix('.json').write_text(json.dumps({facts!r}))"
ENDS = {
    "a crash": (
        ["os.kill(os.getpid(), signal.SIGSEGV)"],
        "dies of SIGSEGV on pre.onnx: it left no message",
    ),
    "an abort with a message": (
        ["print('[INTERNAL_ERROR] CHECK failed', flush=True)", "os.abort()"],
        r"dies of SIGABRT on pre.onnx: \[INTERNAL_ERROR\] CHECK failed",
    ),
    "a lack of memory": (["os.kill(os.getpid(), signal.SIGKILL)"], "dies of SIGKILL"),
    "an exception": (
        ["import no_such_library"],
        "refuses pre.onnx: ModuleNotFoundError: .*no_such",
    ),
    "silence": (["pass"], "refuses pre.onnx: it left no message"),
    "sleep": (["time.sleep(60)"], "was not built from pre.onnx within 0.5 s"),
    "ports of another graph": (
        [FACTS.format(facts={"library": "1", "inputs": [["x", "HALF", [1]]], "outputs": []})],
        "has the inputs .*HALF.*, expected .*modulation",
    ),
}


@pytest.mark.parametrize("case", ENDS)
def test_a_worker_that_ends_otherwise_is_a_sentence(tmp_path, case):
    lines, reason = ENDS[case]
    with pytest.raises(BuildFailed, match=reason) as caught:
        build_plan(
            Segment("pre", TINY, DEPLOY), SM89, tmp_path, TokenRange(2, 3, 4),
            timeout_s=0.5 if case == "sleep" else TIMEOUT_S, worker=worker(tmp_path, *lines),
        )  # fmt: skip
    assert "pre.plan for sm89" in str(caught.value)


def test_a_log_without_layers_is_no_proof(tmp_path):
    segment = Segment("pre", TINY, DEPLOY)
    names = {torch.float32: "FLOAT", torch.bfloat16: "BF16", torch.float8_e4m3fn: "FP8"}
    facts = {"library": "1"} | {
        side: [[port.name, names[port.dtype], list(port.sized(-1))] for port in ports]
        for side, ports in (("inputs", segment.inputs), ("outputs", segment.outputs))
    }
    silent = worker(tmp_path, FACTS.format(facts=facts), "print('[INFO] built')")
    with pytest.raises(BuildFailed, match=r"pre.plan for sm89 cannot be proven: .* no layers"):
        build_plan(segment, SM89, tmp_path, TokenRange(2, 3, 4), timeout_s=TIMEOUT_S, worker=silent)


def test_a_worker_is_told_the_target_and_the_sizes_that_are_open(tmp_path):
    told = worker(tmp_path, "pathlib.Path(sys.argv[2]).write_text(sys.stdin.read())")
    segment = Segment("pre", TINY, DEPLOY)
    with pytest.raises(BuildFailed):
        build_plan(
            segment, SM120, tmp_path, TokenRange(64, 1024, 4096), timeout_s=TIMEOUT_S, worker=told
        )
    assert json.loads((tmp_path / "pre.plan").read_text("utf-8")) == {
        "target": "SM120",
        "shapes": {"x": [[1, 64, 256], [1, 1024, 256], [1, 4096, 256]]},
    }


# --- where there is no such program


def test_there_is_a_program_for_two_architectures_and_fp8_weights():
    present = ("json", "torch")
    assert unavailable(SM89, "fp8", present) is None
    assert unavailable(SM120, "fp8", present) is None


@pytest.mark.parametrize(
    ("arch", "form", "needs", "reason"),
    [
        (SM90, "fp8", ("json",), "for sm89 and sm120, not for sm90. Leave tensorrt out"),
        (SM89, "int8", ("json",), "takes fp8 weights, not int8. Use --weights fp8"),
        (SM89, "fp8", ("json", "no_such_a", "no_such_b"), "no_such_a, no_such_b is not installed"),
    ],
)
def test_why_there_is_no_program_is_a_sentence(arch, form, needs, reason):
    assert reason in str(unavailable(arch, form, needs))


def test_every_model_has_a_range_of_tokens():
    assert [*RANGES] == sorted(RANGES)
    for tokens in RANGES.values():
        assert 2 <= tokens.least < tokens.usual < tokens.most
    assert set(PROOFS) == set(SEGMENTS)
