"""The machine rounds as PTX says, sees what the rules forbid, and gives one result in any order."""

import ctypes

import ml_dtypes
import numpy as np
import pytest
import torch

from tests.support.compiled import STATE
from tests.support.ptx import run
from virtual_gpu.bank import WrongKernel
from virtual_gpu.machine import the_machine
from virtual_gpu.orders import BACKWARD, FORWARD, UNWATCHED

OPERATIONS = {
    "CVT_E4M3X2_F32": (ml_dtypes.float8_e4m3fn, 448.0),
    "CVT_F16_F32": (np.float16, np.inf),
    "CVT_BF16_F32": (ml_dtypes.bfloat16, np.inf),
}


def hard_values(dtype):
    """Returns FP32 at, and beside, every value of a format of 8 or 16 bits and every tie."""
    size = np.dtype(dtype).itemsize
    codes = np.arange(256**size, dtype=np.uint8 if size == 1 else np.uint16)
    exact = np.unique(codes.view(dtype).astype(np.float32))
    exact = exact[np.isfinite(exact)]
    ties = ((exact[1:].astype(np.float64) + exact[:-1]) / 2).astype(np.float32)
    edges = np.concatenate([exact, ties])
    beside = [np.nextafter(edges, np.float32(side)) for side in (-np.inf, np.inf)]
    values = np.concatenate([edges, *beside])
    step = max(1, len(values) // 6000)
    return np.concatenate([values[::step], np.array([470, 1e9, -1e9, 3e38, 1e-30], np.float32)])


@pytest.mark.parametrize("operation", OPERATIONS)
def test_a_conversion_rounds_once_to_nearest_even(operation):
    dtype, most = OPERATIONS[operation]
    machine = the_machine(STATE)
    number = machine.library.vgpu_operation(operation.encode())
    machine.library.vgpu_convert.argtypes = [ctypes.c_int, ctypes.c_float]
    values = hard_values(dtype)
    got = np.array([machine.library.vgpu_convert(number, value) for value in values])
    with np.errstate(over="ignore"):
        want = np.clip(values, -most, most).astype(dtype)
    bits = want.view(np.uint8 if want.itemsize == 1 else np.uint16)
    assert (got == bits).all(), values[got != bits][:5]


STORE = "\tst.global.b32 [%rd1], %r9;"
SHARED = "\tmov.b32 %r1, global_smem;\n\tshl.b32 %r2, %r0, 2;\n\tadd.s32 %r3, %r1, %r2;\n"
# every thread writes its number, and reads that of the thread 32 places on
EXCHANGE = (
    SHARED
    + (
        "\tst.shared.b32 [%r3], %r0;\n\tbar.sync 0;\n"
        "\txor.b32 %r4, %r2, 128;\n\tadd.s32 %r5, %r1, %r4;\n\tld.shared.b32 %r9, [%r5];\n"
    )
    + STORE
)


def words(count=64):
    return torch.zeros(count, dtype=torch.int32)


def test_warps_exchange_values_through_shared_memory():
    x = words()
    run(EXCHANGE, x)
    assert x.tolist() == [n ^ 32 for n in range(64)]


def test_a_load_of_32_bits_into_64_puts_zeros_above_them():
    """What the register held before is a number of all ones."""
    x = words()
    x[:] = torch.arange(64, dtype=torch.int32) - 32
    run(
        "\tmov.b64 %rd2, -1;\n\tld.global.b32 %rd2, [%rd1];\n\tshr.u64 %rd3, %rd2, 32;\n"
        "\tcvt.u32.u64 %r1, %rd3;\n\tcvt.u32.u64 %r2, %rd2;\n\tadd.s32 %r9, %r1, %r2;\n" + STORE,
        x,
    )
    assert x.tolist() == [n - 32 for n in range(64)]


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (
            EXCHANGE.replace("\tbar.sync 0;\n", ""),
            "race: shared offset 128 was written by warp 0|read",
        ),
        (SHARED + "\tld.shared.b32 %r9, [%r3];\n" + STORE, "nobody wrote"),
        (
            SHARED + "\tst.shared.b32 [%r1], %r0;\n",
            "offset 0 was written by warp 0 too",
        ),
        ("\tadd.s64 %rd1, %rd1, 256;\n" + STORE, "write of 4 bytes at global .* outside"),
        ("\tadd.s64 %rd1, %rd1, 2;\n" + STORE, "is not a multiple of 4"),
        (SHARED + "\tst.shared.b32 [%r3+1024], %r0;\n", "shared offset 1024, of 1024"),
        (SHARED + "\tadd.s32 %r3, %r3, 1;\n\tst.shared.b32 [%r3], %r0;\n", "not a multiple of 4"),
        (
            "\tsetp.lt.s32 %p1, %r0, 7;\n\t@%p1 bra $on;\n$on:\n" + STORE,
            "the warp diverges: lanes 0x7f jump",
        ),
        (
            "\tsetp.lt.s32 %p1, %r0, 32;\n\t@%p1 bra $on;\n\tbar.sync 0;\n$on:\n",
            "some warps have ended",
        ),
        (
            SHARED + "\tcp.async.ca.shared.global [%r3], [%rd1], 4;\n\tcp.async.commit_group;\n",
            "ends while cp.async is under way",
        ),
        (
            SHARED + "\tcp.async.ca.shared.global [%r3], [%rd1], 4;\n\tcp.async.commit_group;\n"
            "\tld.shared.b32 %r9, [%r3];\n\tcp.async.wait_group 0;\n",
            "is read while cp.async may be writing it",
        ),
        (
            SHARED + "\tst.shared.b32 [%r3], %r0;\n\txor.b32 %r4, %r2, 4;\n"
            "\tadd.s32 %r5, %r1, %r4;\n\tld.shared.b32 %r9, [%r5];\n",
            "a lane reads what another lane",
        ),
        ("\tshfl.sync.bfly.b32 %r9, %r0, 1, 31, 7;\n" + STORE, "shfl by a part of a warp"),
    ],
)
def test_what_a_gpu_would_not_survive_is_an_error(body, message):
    with pytest.raises(WrongKernel, match=message):
        run(body, words())


def test_blocks_that_write_the_same_bytes_are_a_race():
    body = "\tmov.u32 %r9, %ctaid.x;\n" + STORE
    with pytest.raises(WrongKernel, match=r"race between blocks: byte 0 .* block 0 wrote it"):
        run(body, words(), grid=(2,))


def test_a_race_shows_in_another_order_too_without_the_record_of_races():
    """Each block leaves its number: the last one wins, and it is another one backward."""
    body = "\tmov.u32 %r9, %ctaid.x;\n" + STORE
    quiet = [UNWATCHED, BACKWARD]
    with pytest.raises(WrongKernel, match="differ between the orders unwatched and backward"):
        run(body, words(), grid=(7,), orders=quiet)


def test_a_register_that_nobody_wrote_differs_between_orders():
    with pytest.raises(WrongKernel, match="bytes of tensor 0 differ between the orders"):
        run(STORE, words())


def test_a_copy_is_there_after_its_wait_and_past_its_end_there_are_zeros():
    body = (
        SHARED
        + (
            "\tand.b32 %r6, %r0, 1;\n\tshl.b32 %r6, %r6, 2;\n"  # odd threads copy
            "\tcp.async.ca.shared.global [%r3], [%rd1], 4, %r6;\n\tcp.async.commit_group;\n"
            "\tcp.async.wait_group 0;\n\tbar.sync 0;\n\tld.shared.b32 %r9, [%r3];\n"
        )
        + STORE
    )
    x = torch.arange(1, 65, dtype=torch.int32)
    run(body, x)
    assert x.tolist() == [n + 1 if n % 2 else 0 for n in range(64)]


def test_a_write_of_the_value_that_is_there_is_a_note():
    body = SHARED + "\tmov.b32 %r4, 5;\n\tst.shared.b32 [%r1], %r4;\n"
    bank = run(body, words(), orders=[FORWARD])
    assert [finding.name for finding in bank.notes] == ["SAME_WRITTEN"]
    assert "PTX line" in str(bank.notes[0])


@pytest.mark.parametrize(
    ("instruction", "function"),
    [
        ("shr.s32 %r9, %r0, 40;", lambda n: 0),  # shifts stop at the width
        ("bfe.u32 %r9, %r0, 2, 3;", lambda n: n >> 2 & 7),
        ("bfe.s32 %r9, %r0, 0, 3;", lambda n: (n & 7) - (8 if n & 4 else 0)),
        ("prmt.b32 %r9, %r0, 7, 0x4440U;", lambda n: n | 7 << 8 | 7 << 16 | 7 << 24),
        ("mad.lo.s32 %r9, %r0, %r0, -1;", lambda n: n * n - 1),
        ("div.s32 %r9, %r0, -4;", lambda n: -(n // 4)),
        ("shfl.sync.bfly.b32 %r9, %r0, 3, 31, -1;", lambda n: n ^ 3),
        ("shfl.sync.idx.b32 %r9, %r0, 5, 31, -1;", lambda n: n // 32 * 32 + 5),
        ("cvt.rn.f32.s32 %r9, %r0;", lambda n: int(np.float32(n).view(np.int32))),
        ("ex2.approx.ftz.f32 %r9, 0fC3000000;", lambda n: 0),  # 2^-128 is flushed
    ],
)
def test_instructions_compute_what_ptx_says(instruction, function):
    x = words()
    run(f"\t{instruction}\n{STORE}", x)
    assert x.tolist() == [function(n) for n in range(64)]
