"""The model of PyTorch's allocator reserves what PyTorch's documents and sources say it does."""

import random
from itertools import pairwise

import pytest

from engine.config import expandable_segments
from engine.machine.allocator import MIB, CachingAllocator, Card, Counter, Full, smallest_gpu

both = pytest.mark.parametrize("expandable", [False, True], ids=["usual", "expandable"])


def allocator(expandable=False, limit=None, **options):
    return CachingAllocator(Card(limit), expandable=expandable, **options)


@pytest.mark.parametrize(
    ("nbytes", "usual", "expandable"),
    [
        (1, 2 * MIB, 2 * MIB),
        (MIB, 2 * MIB, 2 * MIB),
        (MIB + 1, 20 * MIB, 20 * MIB),
        (10 * MIB - 512, 20 * MIB, 20 * MIB),
        (10 * MIB, 10 * MIB, 20 * MIB),
        (10 * MIB + 1, 12 * MIB, 20 * MIB),
        (21 * MIB, 22 * MIB, 40 * MIB),
        (1500 * MIB - 1, 1500 * MIB, 1500 * MIB),
        (1501 * MIB, 1502 * MIB, 1520 * MIB),
    ],
)
def test_a_first_request_reserves_a_segment_of_its_class(nbytes, usual, expandable):
    for grows, want in ((False, usual), (True, expandable)):
        one = allocator(grows)
        one.take(nbytes)
        assert one.card.reserved == want


def reserved_after(steps, expandable=False):
    """Takes so many MiB for a positive number, and gives the n-th block back for a negative one."""
    one, held = allocator(expandable), []
    for step in steps:
        if step > 0:
            held.append(one.take(int(step * MIB)))
        else:
            one.give(held[-step - 1])
    return one.card.reserved / MIB


@pytest.mark.parametrize(
    ("steps", "usual", "expandable"),
    [
        ([0.25] * 8, 2, 2),  # small requests share 2 MiB
        ([0.25] * 9, 4, 4),
        ([5] * 4, 20, 20),  # medium ones share 20 MiB
        ([5] * 5, 40, 40),
        ([6] * 4, 40, 40),  # three fit a segment: the fourth gets another, or a grown one
        ([30, -1, 30], 30, 40),  # a freed block serves the same request
        ([30, -1, 29.5], 30, 40),  # and a smaller one, whose rest of 0.5 MiB stays with it
        ([30, -1, 20, 10], 30, 40),  # or is split off from 1 MiB on
        ([30, -1, 20, 11], 42, 40),  # what does not fit the rest needs a segment of its own
        ([100, 100, -1, -2, 200], 400, 200),  # neighbours of two segments never join
        ([100, 100, -1, 40, 40, -2, 140], 340, 220),
        ([100, -1, 60, 60, -2, 100], 160, 220),
    ],
)
def test_known_sequences_reserve_what_the_rules_say(steps, usual, expandable):
    assert reserved_after(steps) == usual
    assert reserved_after(steps, expandable=True) == expandable


def test_the_best_fit_is_taken_and_not_the_first():
    one = allocator()
    held = [one.take(size * MIB) for size in (64, 32, 48)]
    for block in held:
        one.give(block)
    taken = one.take(40 * MIB)
    assert (taken.start, taken.size) == (held[2].start, 40 * MIB)


def test_a_block_that_can_grow_is_spared_for_whoever_needs_more():
    one = allocator(expandable=True)
    first, wall, last = (one.take(size * MIB) for size in (60, 20, 40))
    one.give(first)
    one.give(last)
    assert one.take(30 * MIB).start == first.start
    assert one.take(45 * MIB).start == last.start
    assert one.card.reserved == 140 * MIB
    assert wall.used


@both
def test_what_is_not_used_is_given_back_where_nothing_is_left(expandable):
    one = allocator(expandable, limit=200 * MIB)
    block = one.take(120 * MIB)
    one.give(block)
    small = one.take(20 * MIB)
    one.take(180 * MIB if expandable else 80 * MIB)
    with pytest.raises(Full):
        one.take(100 * MIB)
    assert small.used


def test_a_segment_of_which_a_part_is_used_stays_unless_it_is_expandable():
    kept = {}
    for expandable in (False, True):
        one = allocator(expandable)
        block = one.take(100 * MIB)
        one.give(block)
        one.take(10 * MIB)
        one.empty_cache()
        kept[expandable] = one.card.reserved / MIB
    assert kept == {False: 100, True: 20}


@both
def test_the_pool_of_a_graph_gives_nothing_back(expandable):
    card = Card(limit=300 * MIB)
    usual = CachingAllocator(card, expandable=expandable)
    pool = CachingAllocator(card, expandable=expandable, records=True)
    pool.give(pool.take(100 * MIB))
    usual.give(usual.take(100 * MIB))
    usual.empty_cache()
    pool.empty_cache()
    assert card.reserved == 100 * MIB
    with pytest.raises(Full):
        usual.take(220 * MIB)
    pool.take(90 * MIB)
    assert card.reserved == 100 * MIB


@both
@pytest.mark.parametrize("seed", range(6))
def test_blocks_never_overlap_and_all_memory_comes_back(expandable, seed):
    draw, one, counter, held = random.Random(seed), allocator(expandable), Counter(), []
    for _ in range(400):
        if held and draw.random() < 0.5:
            block, handle = held.pop(draw.randrange(len(held)))
            one.give(block)
            counter.give(handle)
        else:
            nbytes = int(2 ** draw.uniform(3, 30))
            held.append((one.take(nbytes), counter.take(nbytes)))
        if draw.random() < 0.05:
            one.empty_cache()
        assert one.card.reserved >= counter.now
        for pool in {block.pool for block, _ in held}:
            spans = sorted((b.start, b.start + b.size) for b, _ in held if b.pool is pool)
            assert all(end <= begin for (_, end), (begin, _) in pairwise(spans))
    assert one.card.peak >= counter.peak
    for block, _ in held:
        one.give(block)
    one.empty_cache()
    assert one.card.reserved == 0


@both
def test_the_smallest_gpu_runs_a_program_and_one_step_less_does_not(expandable):
    def run(card):
        one = CachingAllocator(card, expandable=expandable)
        first, second = one.take(100 * MIB), one.take(60 * MIB)
        one.give(first)
        third = one.take(50 * MIB)
        one.give(second)
        one.take(90 * MIB)
        assert third.used

    found = smallest_gpu(run, 160 * MIB, 4 * MIB)
    run(Card(found))
    with pytest.raises(Full):
        run(Card(found - 4 * MIB))


@pytest.mark.parametrize(
    ("told", "want"),
    [
        ({}, False),
        ({"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}, True),
        ({"PYTORCH_ALLOC_CONF": "max_split_size_mb:64, expandable_segments:True"}, True),
        ({"PYTORCH_ALLOC_CONF": "expandable_segments:True,expandable_segments:False"}, False),
        ({"PYTORCH_ALLOC_CONF": "not_expandable_segments:True"}, False),
        ({"PYTORCH_ALLOC_CONF": ""}, False),
        (
            {
                "PYTORCH_ALLOC_CONF": "expandable_segments:True",
                "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:False",
            },
            False,
        ),
    ],
)
def test_segments_grow_where_pytorch_was_told_so(monkeypatch, told, want):
    for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"):
        monkeypatch.delenv(name, raising=False)
    for name, value in told.items():
        monkeypatch.setenv(name, value)
    assert expandable_segments() is want
