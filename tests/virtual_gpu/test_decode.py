"""PTX is read whole: what is not known, in whatever form, is an error with its line."""

import pytest

from tests.support.ptx import ptx
from virtual_gpu.decode import decode, split, statements
from virtual_gpu.program import UnknownPtx

WGMMA = "wgmma.mma_async.sync.aligned.m64n8k32"


def code(body):
    return decode("small", ptx(body)).code


@pytest.mark.parametrize(
    "instruction",
    [
        "sin.approx.f32 %r1, %r0;",  # no such operation
        "add.sat.f32 %r1, %r0, %r0;",  # known but for a modifier
        "add.f64 %rd2, %rd0, %rd1;",  # another type
        "add.s32 %r1, %r0;",  # an operand less
        "mov.u32 %r1;",
        "bra;",
        "cp.async.wait_group;",
        "st.global.b32 [%rd0];",
        "add.s32 %r1, %r0, %r0, %r0;",  # an operand more
        "add.s32 %rd2, %r0, %r0;",  # a register of another width
        "add.s32 %r1, %r0, %r99;",  # a register that was not declared
        "add.s32 %r1, %r0, WIDTH;",  # a name
        "@%p1 add.s32 %r1, %r0, 1;",  # a guard where none is known
        "setp.lt.f64 %p1, %rd0, %rd1;",
        "setp.num.s32 %p1, %r0, %r0;",
        "ld.global.v8.b32 {%r1,%r2,%r3,%r4,%r5,%r6,%r7,%r8}, [%rd0];",
        "ld.volatile.global.b32 %r1, [%rd0];",
        "ld.local.b32 %r1, [%rd0];",
        "ld.global.b16 %rd1, [%rd0];",  # into a wider register
        "@%p1 ld.global.b32 %rd1, [%rd0];",
        "st.global.v2.b32 [%rd0], {%r1};",
        "atom.global.add.u32 %r1, [%rd0], %r0;",
        "bar.sync 1;",
        "bar.sync 0, 64;",
        "barrier.cluster.arrive;",
        "mbarrier.init.shared::cta.b64 [%r1], 1;",
        "cp.async.bulk.commit_group;",
        "cp.async.cg.shared.global [%r1], [%rd0], 16, 16, 0;",
        "ldmatrix.sync.aligned.m8n8.x3.shared.b16 {%r1, %r2, %r3}, [%r0];",
        "ldmatrix.sync.aligned.m16n16.x1.shared.b8 {%r1}, [%r0];",
        "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%r1,%r2,%r3,%r4}, {%r5,%r6,%r7,%r8},"
        " {%r9,%r10}, {%r1,%r2,%r3,%r4};",
        f"{WGMMA}.f32.e5m2.e5m2 {{%r1,%r2,%r3,%r4}}, %rd0, %rd1, 1, 1, 1;",
        f"{WGMMA}.f32.e4m3.e4m3 {{%r1,%r2,%r3,%r4}}, %rd0, %rd1, 1, -1, 1;",
        f"{WGMMA}.f32.e4m3.e4m3 {{%r1,%r2}}, %rd0, %rd1, 1, 1, 1;",
        "fence.proxy.async.global;",
        "membar.gl;",
        "bra $nowhere;",
        "call foo;",
        ".local .align 4 .b8 stack[64];",
        "mov.u32 %r1, %clock;",
        "cvt.rna.tf32.f32 %r1, %r0;",
        "shfl.sync.up.b32 %r1, %r0, 1, 0, -1;",
        "garbage",
    ],
)
def test_an_unknown_instruction_or_form_is_an_error(instruction):
    with pytest.raises(UnknownPtx, match="small"):
        code(instruction)


def test_the_error_names_the_kernel_and_the_line():
    text = ptx("\tadd.s32 %r1, %r0, 1;\n\tsin.approx.f32 %r2, %r1;")
    line = text[: text.index("sin.")].count("\n") + 1
    with pytest.raises(UnknownPtx, match=rf"small, PTX line {line}: sin\.approx\.f32 %r2"):
        decode("small", text)


def test_two_kernels_or_none_are_refused():
    for text in ("", ptx("") * 2):
        with pytest.raises(UnknownPtx, match="not one kernel"):
            decode("small", text)


def test_lines_are_those_of_the_text():
    text = ptx("// a comment; with a semicolon\n\tadd.s32 %r1,\n\t\t%r0, 1; mov.b32 %r2, %r1;\n")
    made = [(i.operation, i.line) for i in decode("small", text).code if i.operation != "RET"][-2:]
    first = text[: text.index("add.s32 %r1")].count("\n") + 1
    assert made == [("ADD_32", first), ("MOV32", first + 1)]


def test_registers_of_an_inner_scope_hide_those_outside():
    text = "{ .reg .b32 %r<2>; add.s32 %r1, %r0, 1; }\n"
    inner = code(text + text + "add.s32 %r1, %r0, 1;")[-4:-1]
    destinations = {i.operands[0] for i in inner}
    assert len(destinations) == 3
    with pytest.raises(UnknownPtx, match="no register %t1"):
        code("{ .reg .b32 %t<2>; }\nadd.s32 %t1, %r0, 1;")


def test_a_constant_has_one_place():
    made = code("add.s32 %r1, %r0, 16; add.s32 %r2, %r0, 0x10; add.s32 %r3, %r0, -1;")[-4:-1]
    assert made[0].operands[2] == made[1].operands[2] != made[2].operands[2]


def test_jumps_lead_to_labels_before_and_behind():
    made = code("$back:\n\tbra.uni $on;\n$on:\n\tsetp.eq.s32 %p1, %r0, 0;\n\t@!%p1 bra $back;\n")
    jumps = [i for i in made if i.operation == "BRA"]
    assert made[jumps[0].operands[0]].operation == "SETP_EQ_S32"
    assert made[jumps[1].operands[0]].operation == "BRA"
    assert jumps[1].guard < 0


def test_operands_are_split_outside_braces():
    assert split("{a, b}, [c + 4], d") == ["{a, b}", "[c + 4]", "d"]
    assert list(statements("a;\nb: { c; }", 1)) == [
        (1, "a"), (2, "b:"), (2, "{"), (2, "c"), (2, "}")
    ]  # fmt: skip
