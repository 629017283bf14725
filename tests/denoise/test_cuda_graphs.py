"""Recorded evaluations give what running them gives, and are recorded no oftener than needed."""

import pytest
import torch

from engine.denoise.block_runner import Pass
from engine.denoise.cuda_graphs import KEPT_GRAPHS, GraphedBlocks, is_recorded
from engine.models.dit import Rope

ROPE = Rope(torch.zeros(1), torch.zeros(1))


def blocks(given):
    """Changes tokens in place, as blocks do."""
    given.x.mul_(2).add_(given.modulation.sum() + given.context[0])
    return given.x[: given.kept]


class Recorder:
    """Counts, and replays by running again."""

    def __init__(self):
        self.recorded, self.replayed = 0, 0

    def __call__(self, run):
        self.recorded += 1

        def replay():
            self.replayed += 1
            run()

        return replay


def evaluate(run, seed, context, tokens=5, kept=3, left=100):
    draw = torch.Generator().manual_seed(seed)
    x, modulation = torch.randn(tokens, 2, generator=draw), torch.randn(6, 2, generator=draw)
    return run(Pass(x, modulation, context, ROPE, kept, left)).clone()


def test_a_replay_computes_what_a_run_computes_for_its_own_inputs():
    recorder, context = Recorder(), [3.0]
    graphed = GraphedBlocks(blocks, recorder)
    for seed in range(4):
        assert torch.equal(evaluate(graphed, seed, context), evaluate(blocks, seed, context))
    assert (recorder.recorded, recorder.replayed) == (1, 3)  # the first evaluation is run


@pytest.mark.parametrize("total", [1, 2, 8, 9, 10, 50])
def test_a_recording_is_made_where_at_least_eight_replays_are_left(total):
    recorder, context = Recorder(), [3.0]
    graphed = GraphedBlocks(blocks, recorder)
    for done in range(total):
        got = evaluate(graphed, done, context, left=total - done)
        assert torch.equal(got, evaluate(blocks, done, context))
    assert (recorder.recorded, recorder.replayed) == ((1, total - 1) if total > 8 else (0, 0))
    assert is_recorded(total) == (total > 8)


def test_another_context_or_number_of_tokens_is_another_graph():
    recorder = Recorder()
    graphed = GraphedBlocks(blocks, recorder)
    text, negative = [3.0], [3.0]
    for given in ({}, {"tokens": 4}, {"kept": 2}):
        for context in (text, negative):
            for seed in (0, 1):
                got = evaluate(graphed, seed, context, **given)
                assert torch.equal(got, evaluate(blocks, seed, context, **given))
    assert recorder.recorded == 6


def test_old_graphs_make_room_for_new_ones():
    recorder = Recorder()
    graphed = GraphedBlocks(blocks, recorder)
    contexts = [[float(n)] for n in range(KEPT_GRAPHS + 1)]
    for context in contexts:
        for seed in (0, 1):
            evaluate(graphed, seed, context)
    assert recorder.recorded == KEPT_GRAPHS + 1
    evaluate(graphed, 2, contexts[-1])
    assert recorder.recorded == KEPT_GRAPHS + 1
    for seed in (0, 1):
        evaluate(graphed, seed, contexts[0])
    assert recorder.recorded == KEPT_GRAPHS + 2


def test_a_context_that_is_gone_is_not_taken_for_a_new_one_at_its_address():
    graphed = GraphedBlocks(blocks, Recorder())
    for value in range(20):
        context = [float(value)]
        for seed in (0, 1):
            assert torch.equal(evaluate(graphed, seed, context), evaluate(blocks, seed, context))


def test_forgotten_graphs_are_recorded_again():
    recorder, context = Recorder(), [3.0]
    graphed = GraphedBlocks(blocks, recorder)
    for seed in (0, 1):
        evaluate(graphed, seed, context)
    graphed.forget()
    for seed in (0, 1):
        assert torch.equal(evaluate(graphed, seed, context), evaluate(blocks, seed, context))
    assert recorder.recorded == 2
