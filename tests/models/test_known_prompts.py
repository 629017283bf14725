"""Embeddings of prompts are kept in memory: the same to the bit, and asked for once."""

import pytest
import torch

from engine.errors import MissingModel
from engine.models.known_prompts import KEPT, KnownPrompts

CPU = torch.device("cpu")


class Encoder:
    """Embeds a prompt as its length, and writes down what it was asked for."""

    def __init__(self):
        self.asked = []

    def __call__(self, prompts):
        self.asked.append([*prompts])
        return [torch.full((512, 4), float(len(prompt))) for prompt in prompts]


@pytest.fixture
def encoder():
    return Encoder()


@pytest.fixture
def known(encoder):
    return KnownPrompts(encoder, CPU)


def lengths(found):
    assert {tuple(one.shape) for one in found} == {(512, 4)}
    return [one[0, 0].item() for one in found]


def test_a_prompt_is_embedded_once_whatever_it_stands_beside(encoder, known):
    assert lengths(known(["dance", ""])) == [5, 0]
    assert lengths(known(["", "dance"])) == [0, 5]
    assert lengths(known(["jump", "dance", "jump"])) == [4, 5, 4]
    assert lengths(known(["dance"])) == [5]
    assert encoder.asked == [["dance", ""], ["jump"]]


def test_prompts_differ_by_every_letter_and_space(encoder, known):
    for prompt in ("a", "a ", "A", "", " "):
        known([prompt])
    assert encoder.asked == [["a"], ["a "], ["A"], [""], [" "]]


def test_the_oldest_is_let_go_and_a_use_makes_young(encoder, known):
    known(["first"])
    for n in range(KEPT - 1):
        known([f"{n}"])
    known(["first"])
    known(["one too many"])
    encoder.asked.clear()
    known(["first"])
    known(["0"])  # the oldest by then
    assert encoder.asked == [["0"]]


def test_more_prompts_at_once_than_are_kept_are_all_handed_out(known):
    prompts = ["x" * n for n in range(2 * KEPT)]
    assert lengths(known(prompts)) == [*range(2 * KEPT)]


def test_what_fails_is_asked_again(encoder):
    fails = [True, False]

    def embed(prompts):
        if fails.pop(0):
            raise MissingModel("no encoder")
        return encoder(prompts)

    known = KnownPrompts(embed, CPU)
    with pytest.raises(MissingModel):
        known(["dance"])
    assert lengths(known(["dance"])) == [5]
