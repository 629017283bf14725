"""Compiled kernels hold their proofs, and every proof can fail."""

import json
from dataclasses import replace

import pytest
import torch

from kernels.aot.cubin import BadCubin, Mix, cubin_from_record, spec_digest
from kernels.aot.elf import read_elf
from kernels.aot.proofs import ProofError, prove
from kernels.aot.sass import main_loop
from kernels.arch import ARCHS, SM80, SM86, SM89, SM90, SM120
from kernels.rope import rope_specs
from kernels.spec import BuildError, KernelSpec, Loop, Tuning
from tests.support.compiled import compiled


def fault(function, signature, loop=None, registers=None, multiples=(), **constants):
    return KernelSpec(
        name=f"faults.{function}",
        device=f"faults:{function}",
        signature=signature,
        constants=constants,
        tuning={arch: Tuning(4, 2, {}, arch.toolkits[0], registers) for arch in ARCHS},
        multiples_of_16=multiples,
        loop=loop,
        package="tests.support.samples",
    )


COMBINE = rope_specs(5120, torch.int8).combine
INT8 = Loop(dict.fromkeys(ARCHS, ("IMMA.16832",)) | {SM90: ("IGMMA.64x64x32",)})
FILL = fault("fill", "*fp32 fp32 i32", BLOCK=256)
SHAPE = {"BLOCK": 64, "STEP": 64}
MULTIPLY = fault("multiply", "*i8 *i8 *i32 i32", INT8, multiples=(3,), **SHAPE, SCALAR=False)
SCALAR = replace(MULTIPLY, constants={**SHAPE, "SCALAR": True})
SPILL = fault("spill", "*fp32 *fp32", registers=32, BLOCK=8192)
BY_NAME = {"ids": lambda arch: arch.name}


@pytest.fixture(scope="module", autouse=True)
def _compiled_together():
    """Compiles what several tests use in one go, which is faster than one by one."""
    compiled(*((spec, arch) for spec in (COMBINE, FILL, MULTIPLY) for arch in ARCHS))


@pytest.mark.parametrize("arch", ARCHS, **BY_NAME)
def test_a_kernel_is_compiled_as_it_was_asked_for(arch):
    (made,) = compiled((COMBINE, arch))
    elf = read_elf(made.data)
    assert (made.name, made.arch, made.entry) == (COMBINE.name, arch.name, "combine_kernel")
    assert made.toolkit == elf.toolkit == COMBINE.tuning[arch].toolkit
    assert f"sm{elf.capability}" == arch.name
    assert elf.target == (arch.target if arch == SM120 else None)
    assert elf.parameter_bytes == (8,) * 4 + (4,) * 3 + (8,) * 2
    assert (elf.threads, elf.frame_bytes, made.scratch_bytes) == (256, 0, 0)
    assert made.shared_bytes <= 4096
    assert made.registers <= 128  # two blocks of 256 threads on a multiprocessor


@pytest.mark.parametrize("arch", ARCHS, **BY_NAME)
def test_matrix_instructions_of_the_main_loop_are_counted(arch):
    (made,) = compiled((MULTIPLY, arch))
    wgmma = {"IGMMA.64x64x32.S8.S8": 2}  # a warpgroup: 64 x 64 x 64
    assert made.loop.mma == (wgmma if arch == SM90 else {"IMMA.16832.S8.S8.SAT": 16})
    assert made.loop.instructions == sum(made.loop.mma.values()) + sum(made.loop.others.values())
    assert made.loop.count("LDGSTS") == 4


# --- every proof can fail


def expect(proof, made, spec, arch):
    with pytest.raises(ProofError) as caught:
        prove(made, spec, arch)
    assert (caught.value.kernel, caught.value.arch) == (spec.name, arch.name)
    assert caught.value.proof == proof
    assert str(caught.value) == (
        f"{spec.name} for {arch.name}, {proof}: "
        f"found {caught.value.found}, expected {caught.value.expected}"
    )
    return caught.value


@pytest.mark.parametrize("arch", ARCHS, **BY_NAME)
def test_a_kernel_that_spills_fails_the_build(arch):
    with pytest.raises(ProofError, match="local memory") as caught:
        compiled((SPILL, arch))
    assert caught.value.found > 0


@pytest.mark.parametrize("arch", ARCHS, **BY_NAME)
def test_scalar_loads_in_the_main_loop_fail_the_build(arch):
    with pytest.raises(ProofError, match="scalar loads in the main loop: found 32, expected 0"):
        compiled((SCALAR, arch))


@pytest.mark.parametrize("arch", ARCHS, **BY_NAME)
def test_a_main_loop_with_other_matrix_instructions_is_found(arch):
    (made,) = compiled((MULTIPLY, arch))
    wanted = replace(MULTIPLY, loop=Loop({arch: ("QMMA.SF",)}))
    wrong = expect("QMMA.SF in the main loop", made, wanted, arch)
    assert (wrong.found, wrong.expected) == ([*made.loop.mma], "QMMA.SF")


def test_a_kernel_without_the_main_loop_that_was_asked_for_fails_the_build():
    with pytest.raises(ProofError, match=r"IMMA in the main loop: found \[\], expected IMMA"):
        compiled((replace(FILL, loop=Loop({SM120: ("IMMA",)})), SM120))


def test_spills_and_shared_loads_in_the_main_loop_are_found():
    (made,) = compiled((MULTIPLY, SM89))
    others = dict(made.loop.others)
    spilt = replace(made, loop=replace(made.loop, others=others | {"STL": 2, "LDL": 1}))
    assert expect("spills in the main loop", spilt, MULTIPLY, SM89).found == 3
    shuffled = replace(made, loop=replace(made.loop, others=others | {"LDS": 9}))
    wrong = expect("shared loads in the main loop", shuffled, MULTIPLY, SM89)
    assert (wrong.found, wrong.expected) == (9, "at most 8")
    prove(shuffled, replace(MULTIPLY, loop=replace(INT8, max_shared_loads=9)), SM89)


def test_the_release_of_ptxas_is_proven():
    (made,) = compiled((FILL, SM89))
    newer = replace(FILL.tuning[SM89], toolkit="12.8")
    wrong = expect("toolkit", made, replace(FILL, tuning={SM89: newer}), SM89)
    assert (wrong.found, wrong.expected) == ("12.6", "12.8")


def test_the_architecture_is_proven():
    for_86, for_89, for_90, for_120 = compiled(
        *((FILL, arch) for arch in (SM86, SM89, SM90, SM120))
    )
    expect("architecture", for_86, FILL, SM80)
    expect("architecture", for_86, FILL, SM89)
    expect("architecture", for_89, FILL, SM90)
    expect("architecture", for_90, FILL, SM89)
    old = replace(FILL, tuning={SM89: FILL.tuning[SM120]})
    expect("container", for_120, old, SM89)
    other = for_120.data.replace(b"-arch sm_120a", b"-arch sm_120f")
    expect("target", replace(for_120, data=other), FILL, SM120)


@pytest.mark.parametrize("signature", ["*fp32 fp32 i64", "*fp32 i32", "*fp32 fp32 i32 i32"])
def test_the_arguments_are_proven(signature):
    (made,) = compiled((FILL, SM120))
    wrong = expect("arguments", made, replace(FILL, signature=signature), SM120)
    assert wrong.found == [8, 4, 4, 8, 8]


def test_threads_entry_registers_shared_memory_and_scratch_are_proven():
    (made,) = compiled((MULTIPLY, SM89))
    expect("threads", replace(made, warps=8), MULTIPLY, SM89)
    expect("entry", replace(made, entry="other"), MULTIPLY, SM89)
    expect("scratch memory", replace(made, scratch_bytes=128), MULTIPLY, SM89)
    expect("shared memory", replace(made, shared_bytes=SM89.shared_bytes + 1), MULTIPLY, SM89)
    few = replace(MULTIPLY.tuning[SM89], max_registers=made.registers - 1)
    expect("registers", made, replace(MULTIPLY, tuning={SM89: few}), SM89)


def test_line_tables_are_found():
    (made,) = compiled((FILL, SM89))
    renamed = made.data.replace(b".nv.callgraph\0", b".debug_line_x\0")
    expect("debug information", replace(made, data=renamed), FILL, SM89)


# --- damaged code


@pytest.mark.parametrize("arch", ARCHS, **BY_NAME)
def test_cut_off_code_is_not_read(arch):
    (made,) = compiled((FILL, arch))
    for size in (0, 3, 16, 63, 64, 500, len(made.data) // 2, len(made.data) - 64):
        with pytest.raises(BuildError, match=f"{size} bytes are not a whole cubin"):
            read_elf(made.data[:size])


def test_files_of_another_kind_are_not_read():
    for other in (b"PK\3\4" + bytes(400), b"\x7fELF\x01" + bytes(400), b"\x7fELF\x02" + bytes(400)):
        with pytest.raises(BuildError, match="not a whole cubin"):
            read_elf(other)


def test_code_without_the_note_of_its_toolkit_is_not_read():
    (made,) = compiled((FILL, SM120))
    with pytest.raises(BuildError, match="no note that matches release"):
        read_elf(made.data.replace(b"release 12.8", b"unknown 12.8"))


def test_code_without_its_kernel_is_not_read():
    (made,) = compiled((FILL, SM89))
    with pytest.raises(BuildError, match="0 kernels instead of one"):
        read_elf(made.data.replace(b".nv.info.fill", b".nv.xxxx.fill"))


# --- records


@pytest.mark.parametrize("spec", [FILL, MULTIPLY], ids=lambda spec: spec.name)
def test_a_record_is_read_as_it_was_written(spec):
    (made,) = compiled((spec, SM90))
    record = json.loads(json.dumps(made.record()))
    assert cubin_from_record(record, made.data) == made


def with_loop(record, **changes):
    return record | {"loop": record["loop"] | changes}


DAMAGE = {
    "no object": (lambda record: [record], "is \\[.*, not an object"),
    "no name": (lambda record: record | {"name": None}, "not an object with a name"),
    "a field less": (lambda r: {k: v for k, v in r.items() if k != "warps"}, "mistakes warps"),
    "a field more": (lambda record: record | {"extra": 1}, "mistakes extra"),
    "text for a number": (lambda record: record | {"warps": "4"}, "mistakes warps"),
    "truth for a number": (lambda record: record | {"warps": True}, "mistakes warps"),
    "another hash": (lambda record: record | {"sha256": "0" * 64}, "has sha256 .*, not 000"),
    "text for the size of the code": (lambda record: record | {"data": "CODE"}, "mistakes data"),
    "a loop less": (lambda r: {k: v for k, v in r.items() if k != "loop"}, "mistakes loop"),
    "a loop that is none": (lambda record: record | {"loop": 3}, "main loop of kernel .* is 3"),
    "a loop without counts": (lambda r: with_loop(r, mma={"IMMA": None}), "not counts"),
    "a loop with half an instruction": (lambda r: with_loop(r, instructions=0.5), "not counts"),
    "a loop of lists": (lambda r: with_loop(r, others=["LDS"]), "not counts"),
    "a loop with more": (lambda r: with_loop(r, turns=3), "not counts"),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_record_is_refused(damage):
    (made,) = compiled((MULTIPLY, SM89))
    spoil, message = DAMAGE[damage]
    with pytest.raises(BadCubin, match=message):
        cubin_from_record(spoil(json.loads(json.dumps(made.record()))), made.data)


def test_damaged_code_is_refused():
    (made,) = compiled((FILL, SM89))
    with pytest.raises(BadCubin, match=r"the code of kernel faults\.fill has sha256"):
        cubin_from_record(made.record(), made.data[:-1] + b"?")


def test_the_digest_of_a_spec_follows_all_that_a_launch_relies_on():
    tuning = replace(FILL.tuning[SM89], stages=3)
    others = [
        replace(FILL, name="b"), replace(FILL, device="faults:b"), replace(FILL, signature="*fp32"),
        replace(FILL, constants={"BLOCK": 128}), replace(FILL, tuning={SM89: tuning}),
        replace(FILL, multiples_of_16=(2,)), replace(FILL, fuse_multiply_add=False),
    ]  # fmt: skip
    digests = {spec_digest(spec, SM89) for spec in [FILL, *others]}
    assert len(digests) == 8
    assert spec_digest(replace(FILL, loop=INT8), SM89) in digests  # only the build relies on it


# --- the main loop of a listing

LISTING = """
        /*0000*/                   MOV R1, c[0x0][0x28] ;
.L_x_0:
        /*0010*/                   IADD3 R2, R2, 0x1, RZ ;
.L_x_1:
        /*0020*/              @!P0 LDS.U8 R4, [R2] ;
        /*0030*/                   IMMA.16832.S8.S8.SAT R4, R5.ROW, R6.COL, R4 ;
        /*0040*/                   QMMA.SF.16832.F32.E4M3.E4M3.E8 R4, R5, R6, R4 ;
        /*0050*/              @!UP1 UIADD3 UR4, UR4, 0x1, URZ ;
        /*0060*/               @P1 BRA `(.L_x_1) ;
        /*0070*/               @P2 BRA `(.L_x_0) ;
        /*0080*/                   BRA `(.L_x_2) ;
.L_x_2:
        /*0090*/                   EXIT ;
"""


def test_the_innermost_loop_with_the_most_matrix_instructions_is_the_main_loop():
    mma = {"IMMA.16832.S8.S8.SAT": 1, "QMMA.SF.16832.F32.E4M3.E4M3.E8": 1}
    assert main_loop(LISTING) == Mix(5, mma, {"LDS": 1, "UIADD3": 1, "BRA": 1})


def test_a_listing_without_a_backward_jump_has_no_main_loop():
    assert (
        main_loop(LISTING.replace("BRA `(.L_x_1)", "NOP").replace("BRA `(.L_x_0)", "NOP")) is None
    )
    assert main_loop("") is None
