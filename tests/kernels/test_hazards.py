"""A register of a wgmma that is touched before its wait is found in the machine code."""

import pytest

from kernels.aot import compile as module
from kernels.aot.compile import compile_kernels
from kernels.aot.hazards import hazards
from kernels.aot.proofs import ProofError
from kernels.arch import SM90
from kernels.attention import ATTENTION
from kernels.gemm import GEMM
from tests.support.compiled import STATE

PRODUCT = "QGMMA.64x64x32.F32.E4M3.E4M3 R24, R88, gdesc[UR4], R24, gsb0"
LAST = "WARPGROUP.DEPBAR.LE gsb0, 0x0"


def listing(*lines):
    """Writes instructions as nvdisasm does; a label ends with a colon."""
    return "\n".join(
        line if line.endswith(":") else f"        /*{16 * n:04x}*/                   {line} ;"
        for n, line in enumerate(lines)
    )


@pytest.mark.parametrize(
    ("instruction", "is_wrong"),
    [
        ("FADD R24, R2, R3", True),  # writes a sum
        ("FADD R2, R55, R3", True),  # reads the last of 32 sums
        ("FADD R2, R56, R3", False),
        ("@P0 MOV R91, R2", True),  # writes the last of 4 registers of A
        ("MOV R2, R91", False),  # A may be read
        ("MOV R92, R2", False),
        ("LDS.128 R84, [R2]", False),  # R84 to R87
        ("LDS.128 R85, [R2]", True),
        ("LDS.64 R87, [R2]", True),
        ("IMAD.WIDE R86, R2, R3, R4", False),
        ("STS [R88], R2", False),  # nothing is written but memory
        ("STS [R2], R30", True),
        ("UMOV UR24, UR88", False),  # uniform registers are others
    ],
)
def test_an_instruction_between_product_and_wait_is_judged(instruction, is_wrong):
    found = hazards(listing("WARPGROUP.ARRIVE", PRODUCT, instruction, LAST, instruction))
    assert len(found) == is_wrong
    assert all("at 0020 touches a register of the wgmma at 0010" in one for one in found)


def test_a_wait_covers_all_groups_but_the_last_few():
    other = PRODUCT.replace("R24", "R120").replace("R88", "R200")
    wait = "WARPGROUP.DEPBAR.LE gsb0, 0x1"
    body = (PRODUCT, other, wait)
    assert hazards(listing(*body, "MOV R88, R2", "MOV R24, R2", LAST)) == []
    assert len(hazards(listing(*body, "MOV R200, R2", LAST))) == 1


def test_products_without_an_end_of_group_belong_to_the_next_one():
    open_one = PRODUCT.removesuffix(", gsb0")
    other = PRODUCT.replace("R24", "R120").replace("R88", "R200")
    wait = "WARPGROUP.DEPBAR.LE gsb0, 0x1"
    assert len(hazards(listing(open_one, other, wait, "MOV R88, R2", LAST))) == 1


def test_a_loop_is_followed_to_its_head_again():
    head = ("MOV R5, R6", "MOV R88, R5")
    body = (PRODUCT, "BRA `(.L_x_1)", LAST)
    assert len(hazards(listing(".L_x_1:", *head, *body))) == 1
    assert hazards(listing(".L_x_1:", *head, *body[:1], LAST, body[1])) == []


def test_a_product_from_shared_memory_has_no_registers_of_a():
    shared = "QGMMA.64x64x32.F32.E4M3.E4M3 R24, gdesc[UR12], RZ, !UPT, gsb0"
    assert hazards(listing(shared, "MOV R88, R2", LAST)) == []
    assert len(hazards(listing(shared, "MOV R24, R2", LAST))) == 1


def test_a_kernel_with_a_hazard_is_not_built(tmp_path, monkeypatch):
    (tmp_path / "toolkits").symlink_to(STATE / "toolkits")
    monkeypatch.setattr(module, "hazards", lambda listing: ["MOV R88 at 0170"])
    with pytest.raises(ProofError, match="i8_i8 for sm90, waits for wgmma: found MOV R88 at 0170"):
        compile_kernels([(ATTENTION["i8_i8"], SM90)], tmp_path)
    assert not (tmp_path / "cubins").exists()


def test_no_way_to_multiply_adds_a_sum_that_was_not_waited_for():
    """`fp8_promoted` did: ptxas then waits after each product, and nothing overlaps."""
    assert all("promoted" not in name for name in GEMM)
