"""A plan that would run slower than asked is refused, and the refusal says where."""

import pytest

from engine.build.plan_proofs import PlanProof, layer_table, prove, read_layers
from engine.errors import BuildFailed

D, FFN = 256, 512
DEPTHS = {"qkv.q": D, "down.q": FFN}  # a weight's name -> the values in a row


def operand(name, dims, dtype, strides=None):
    if strides is None:
        strides = [1] * len(dims)
        for n in reversed(range(len(dims) - 1)):
            strides[n] = -1 if -1 in (dims[n + 1], strides[n + 1]) else strides[n + 1] * dims[n + 1]
    dims, strides = (",".join(map(str, numbers)) for numbers in (dims, strides))
    return (
        f"{{ Name: {name}, Dimensions: [{dims}], Strides: [{strides}], StrideOrder: [2,1,0], "
        f"Datatype: {dtype}, Format: (Linear) Row major linear format }}"
    )


def layer(name, kind, inputs, outputs, tactic="__myelin_CASK_STUB"):
    inputs, outputs = (f"[ {', '.join(side)}]" if side else "[]" for side in (inputs, outputs))
    constants = operand("__mye7_myl0", [1], "Float")
    return (
        f"Name: {name}, LayerType: {kind}, Inputs: {inputs}, Constants: [ {constants}], "
        f"Outputs: {outputs}, TacticName: {tactic}, StreamId: 0, Metadata: [ONNX Layer: {name}]"
    )


def weight(name, depth, rows, dtype="FP8"):
    """A weight whose rows lie in one piece, as a product of the builder sees it."""
    return operand(name, [1, depth, rows], dtype, [depth * rows, 1, depth])


def product(name, depth, rows, *, a="FP8", b="FP8", reads=None):
    inputs = [operand("codes", [1, -1, depth], a), reads or weight(name, depth, rows, b)]
    return layer(f"node_{name}", "gemm", inputs, [operand("y", [1, -1, rows], "BFloat16")])


def attention(name, dtype):
    inputs = [
        operand("q", [2, -1, 128], dtype),
        operand("k", [2, 128, -1], dtype),
        operand("v", [2, -1, 128], dtype),
    ]
    return layer(name, "kgen", inputs, [operand("o", [2, -1, 128], "BFloat16")], f"{name}_0x1f")


QKV, DOWN = product("qkv.q", D, 3 * D), product("down.q", FFN, D)
NORM = layer(
    "__myl_AddMeanCast_myl0_3",
    "kgen",
    [operand("x", [1, -1, D], "Float"), operand("modulation", [1, 6, D], "Float")],
    [operand("codes", [1, -1, D], "FP8")],
)
SIGNAL = layer("entry^bb^signal^3_myl0_1", "signal", [], [])
SELF, CROSS = (
    attention("_gemm_mha_v2_myl0_21", "FP8"),
    attention("_gemm_mha_v2_myl0_31", "BFloat16"),
)


def proof(*lines, attentions8=1, attentions=1):
    return prove("block.plan", read_layers("\n".join(lines)), DEPTHS, attentions8, attentions)


def test_a_good_plan_is_proven_and_counted():
    assert proof(SIGNAL, NORM, QKV, SELF, CROSS, DOWN) == PlanProof(
        kernels=5, products8=2, attentions8=1, attentions=1
    )


def test_layers_are_read_with_their_operands():
    found = read_layers("\n".join([NORM, QKV]))
    assert [(one.name, one.kind) for one in found] == [
        ("__myl_AddMeanCast_myl0_3", "kgen"),
        ("node_qkv.q", "gemm"),
    ]
    codes, rows = found[1].inputs
    assert (codes.name, codes.dims, codes.dtype) == ("codes", (1, -1, D), "FP8")
    assert (rows.name, rows.dims, rows.strides) == ("qkv.q", (1, D, 3 * D), (3 * D * D, 1, D))
    assert [one.dtype for one in found[1].outputs] == ["BFloat16"]


WRONG = {
    "a product of wide activations": (
        (NORM, product("qkv.q", D, 3 * D, a="BFloat16"), SELF, CROSS, DOWN),
        "the product with qkv.q is BFloat16 x FP8",
    ),
    "a product of wide weights": (
        (NORM, QKV, SELF, CROSS, product("down.q", FFN, D, b="BFloat16")),
        "the product with down.q is FP8 x BFloat16",
    ),
    "a weight that is widened first": (
        (
            layer("__myl_Cast_myl0_2", "kgen", [weight("qkv.q", D, 3 * D)], []),
            product("wide", D, 3 * D, a="BFloat16", b="BFloat16"),
            SELF,
            CROSS,
            DOWN,
        ),
        "qkv.q is transposed or widened by __myl_Cast_myl0_2; the product node_wide is "
        "BFloat16 x BFloat16 and reads no weight",
    ),
    "a weight that is transposed first": (
        (
            layer("__myl_Tran_myl0_2", "kgen", [operand("down.q", [D, FFN], "FP8")], []),
            QKV,
            product("turned", FFN, D),
            SELF,
            CROSS,
        ),
        "down.q is transposed or widened by __myl_Tran_myl0_2",
    ),
    "a weight whose rows are scattered": (
        (QKV, product("", FFN, D, reads=operand("down.q", [1, FFN, D], "FP8")), SELF, CROSS),
        "the rows of down.q do not lie in one piece",
    ),
    "a weight that nothing reads": ((QKV, SELF, CROSS), "0 products read down.q"),
    "a weight that is read twice": ((QKV, DOWN, DOWN, SELF, CROSS), "2 products read down.q"),
    "no attention": ((QKV, DOWN), "1 fused attentions in FP8 and 1 in another type are expected, "
    "found none"),
    "an attention that fell back": (
        (QKV, DOWN, attention("_gemm_mha_v2_myl0_21", "BFloat16"), CROSS),
        "found _gemm_mha_v2_myl0_21 of BFloat16 x BFloat16 x BFloat16, _gemm_mha_v2_myl0_31 of",
    ),
    "an attention in two products": (
        (QKV, DOWN, CROSS, product("logits", 128, 128, a="BFloat16", b="BFloat16")),
        "the product node_logits is BFloat16 x BFloat16 and reads no weight; 1 fused attentions in",
    ),
    "one attention too many": ((QKV, DOWN, SELF, SELF, CROSS), "found _gemm_mha_v2_myl0_21 of FP8"),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_a_plan_is_refused_that_has(case):
    lines, reason = WRONG[case]
    with pytest.raises(BuildFailed) as caught:
        proof(*lines)
    message = str(caught.value)
    assert message.startswith("block.plan fails its proof: ")
    assert reason in message


def test_a_refusal_names_all_that_is_wrong():
    wide = product("qkv.q", D, 3 * D, a="BFloat16")
    with pytest.raises(BuildFailed) as caught:
        proof(wide, SELF)
    for reason in ("qkv.q is BFloat16 x FP8", "0 products read down.q", "1 fused attentions"):
        assert reason in str(caught.value)


def test_the_layers_are_taken_from_the_end_of_a_log():
    log = f"[VERBOSE] Parsing\n[VERBOSE] Layers:\n{SIGNAL}\n{QKV}\n\nBindings:\nx\n[INFO] done\n"
    assert layer_table(log) == f"{SIGNAL}\n{QKV}\n"


@pytest.mark.parametrize("log", ["", "[VERBOSE] nothing was planned\n", "[VERBOSE] Layers:\n"])
def test_a_log_without_layers_has_an_empty_table(log):
    assert layer_table(log) == ""


@pytest.mark.parametrize("line", [QKV[:60], QKV.replace("LayerType", "Kind"), "Name: x", "???"])
def test_a_line_that_is_no_layer_is_refused(line):
    with pytest.raises(BuildFailed, match="layer table cannot be read"):
        read_layers(f"{SIGNAL}\n{line}\n")
