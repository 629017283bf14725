"""Blocks come to the device ahead of their use, into memory that nobody reads, and cost no time.

The device is one of two queues and a clock. It is shown wrong schedules too, and waits that were
forgotten: what it calls damage is damage.
"""

from dataclasses import replace
from functools import partial
from itertools import islice

import pytest
import torch

from engine.denoise.schedule import Streaming, Turn, first_fill, streamed_blocks, turns
from engine.denoise.streamed import StreamedBlocks
from tests.support.fake_device import FakeDevice

LAYERS, STEPS = 40, 6
CPU = torch.device("cpu")


def blocks_of(device, streaming, **changes):
    return StreamedBlocks(device, streaming, changes.pop("transfers", device), CPU, **changes)


# --- the schedule


@pytest.mark.parametrize("layers", [1, 2, 7, 40])
def test_blocks_that_stay_are_spread_evenly(layers):
    for resident in range(layers + 1):
        passing = streamed_blocks(layers, resident)
        assert len(passing) == layers - resident
        for begin in range(layers):  # in any stretch as many as its share, give or take one
            for end in range(begin + 1, layers + 1):
                held = sum(begin <= block < end for block in passing)
                assert abs(held - (end - begin) * len(passing) / layers) < 1


def test_a_ring_of_two_takes_turns_and_goes_on_into_the_next_step():
    streaming = Streaming(resident=1, depth=2)
    assert first_fill(4, streaming) == [1, 2]
    assert [*islice(turns(4, streaming), 8)] == [
        Turn(0, None, None), Turn(1, 0, 3), Turn(2, 1, 1), Turn(3, 0, 2),
        Turn(0, None, None), Turn(1, 1, 3), Turn(2, 0, 1), Turn(3, 1, 2),
    ]  # fmt: skip


@pytest.mark.parametrize("depth", [2, 3, 5])
@pytest.mark.parametrize("resident", [0, 1, 13, 37, 38, 39, 40])
def test_each_turn_finds_the_block_that_was_copied_last_into_its_buffer(resident, depth):
    streaming = Streaming(resident, depth)
    ring = first_fill(LAYERS, streaming)
    for n, turn in enumerate(islice(turns(LAYERS, streaming), 5 * LAYERS)):
        assert turn.block == n % LAYERS
        if turn.buffer is not None:
            assert ring[turn.buffer] == turn.block
            ring[turn.buffer] = turn.refill


# --- followed on a device

SPEEDS = [0.1, 0.5, 0.8, 0.95, 1.0, 1.05, 1.3, 4.0]  # of all copies, as shares of a step's kernels


@pytest.mark.parametrize("speed", SPEEDS)
@pytest.mark.parametrize("depth", [2, 3])
def test_a_step_takes_as_long_as_the_larger_of_computing_and_copying(depth, speed):
    """Three buffers do it whatever stays, two where nothing does: no plan has others."""
    for resident in range(LAYERS - 3) if depth == 3 else [0]:
        copy_s = speed * LAYERS / (LAYERS - resident)
        device = FakeDevice(LAYERS, 1.0, copy_s)
        blocks = blocks_of(device, Streaming(resident, depth))
        device.kernels_end = device.copies_end  # other models worked meanwhile
        took = [device.step(blocks) for _ in range(STEPS)]
        assert device.damage() == []
        assert device.is_one_by_one()
        assert max(took) <= 1.05 * max(LAYERS, (LAYERS - resident) * copy_s)


@pytest.mark.parametrize("depth", [2, 3])
def test_copies_run_ahead_of_the_block_that_computes(depth):
    """While a block computes the next ones are on their way, over the end of a step too."""
    device = FakeDevice(LAYERS, 1.0, 0.5)
    blocks = blocks_of(device, Streaming(0, depth))
    device.step(blocks)
    for n, memory in enumerate(blocks):
        assert len(device.writes) == LAYERS + n + depth
        ahead = [write.block for write in device.writes[LAYERS + n :]]
        assert ahead == [(n + k) % LAYERS for k in range(depth)]
        device.launch(n, memory)
    rests = device.kernels_end
    device.kernels_end += 10  # the sampler, and what is outside of the blocks
    assert device.copies_end < rests + 2 * 0.5
    assert device.step(blocks) == LAYERS


def test_blocks_that_stay_are_copied_once():
    device = FakeDevice(LAYERS, 1.0, 0.5)
    blocks = blocks_of(device, Streaming(resident=30, depth=2))
    for _ in range(STEPS):
        device.step(blocks)
    passing = streamed_blocks(LAYERS, 30)
    copied = [write.block for write in device.writes]
    assert sorted(copied[2:32]) == sorted({*range(LAYERS)} - {*passing})
    assert len(copied) == 30 + 10 * STEPS + 2
    assert set(copied[32:]) == {*passing}


def test_a_step_that_ended_halfway_is_begun_again():
    device = FakeDevice(LAYERS, 1.0, 0.5)
    blocks = blocks_of(device, Streaming(resident=3, depth=2))
    for stop in (0, 1, 17, LAYERS - 1):
        for block, memory in enumerate(blocks):
            device.launch(block, memory)
            if block == stop:
                break
        device.step(blocks)
    assert device.damage() == []


def test_a_copy_that_failed_is_told_and_the_next_step_begins_again():
    device = FakeDevice(LAYERS, 1.0, 0.5)
    blocks = blocks_of(device, Streaming(resident=0, depth=2))
    wait = device.wait

    def fail(copied):
        device.wait = wait
        raise OSError("the disk is gone")

    device.wait = fail
    with pytest.raises(OSError, match="the disk is gone"):
        device.step(blocks)
    device.step(blocks)
    assert device.damage() == []


# --- what is wrong is seen


def one_too_far(layers, streaming):
    """Copies the block behind the one that is wanted."""
    for turn in turns(layers, streaming):
        yield replace(turn, refill=(turn.refill + 1) % layers)


def other_buffer(layers, streaming):
    """Reads from the buffer beside."""
    for turn in turns(layers, streaming):
        wrong = None if turn.buffer is None else (turn.buffer + 1) % streaming.depth
        yield replace(turn, buffer=wrong)


def never_refilled(layers, streaming):
    for turn in turns(layers, streaming):
        yield replace(turn, refill=None)


@pytest.mark.parametrize("order", [one_too_far, other_buffer, never_refilled])
def test_a_wrong_schedule_is_damage(order):
    device = FakeDevice(LAYERS, 1.0, 0.5)
    blocks = blocks_of(device, Streaming(0, 3), order=order)
    device.step(blocks)
    assert device.damage() != []


class Careless:
    """Transfers in which one of the waits was forgotten."""

    def __init__(self, device, forgotten):
        self.mark, self.start, self.wait = device.mark, device.start, device.wait
        self.finish = device.finish
        if forgotten == "the block that has the buffer":
            self.start = lambda copy, after: device.start(copy, 0.0)
        elif forgotten == "the copy":
            self.wait = lambda copied: None
        else:
            self.mark = partial(self.mark_early, device)

    def mark_early(self, device):
        return device.kernels_end - device.kernel_s


@pytest.mark.parametrize(
    ("forgotten", "copy_s"),
    [
        ("the block that has the buffer", 0.5),
        ("the last kernels of the block", 0.5),
        ("the copy", 2.0),
    ],
)
def test_a_wait_that_was_forgotten_is_damage(forgotten, copy_s):
    device = FakeDevice(LAYERS, 1.0, copy_s)
    blocks = blocks_of(device, Streaming(0, 2), transfers=Careless(device, forgotten))
    for _ in range(2):
        device.step(blocks)
    assert device.damage() != []
