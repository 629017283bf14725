"""Chains of boxes -> the persons whom masks are made for, and the frames they are shown in.

Rules: docs/reference/masks.md 7.5.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from engine.masks.rectangles import area, centre, height, overlap, widened
from engine.masks.stream import Prompt
from engine.masks.tracklets import Chain
from engine.media.framing import Size
from engine.pose.arrays import Doubles
from engine.pose.tracking import pairs, prominence

LEAST_SHARE = 0.01  # of the frame, that a candidate fills
SURE = 0.5  # score of a box that a person is shown by
APART = 0.3  # IoU below which two boxes are two persons
_SEARCHED_S = 1.0  # from the beginning, in which all are looked for at once
_WIDER = 0.05  # of a box's sides, on each side, in a prompt
_NEVER = 1e3  # cost of a person who is not matched: above that of every match


@dataclass(frozen=True, slots=True)
class Last:
    """Where a person was when a shot ended, as shares of the frame."""

    rank: int  # from left to right among those who were there
    height: float


def candidates(chains: Sequence[Chain], size: Size) -> list[Chain]:
    """Chains large and sure enough to be persons of the clip, the largest first."""
    least = LEAST_SHARE * size[0] * size[1]
    large = [
        chain
        for chain in chains
        if max(map(area, chain.boxes)) >= least and chain.scores.max() >= SURE
    ]
    return sorted(large, key=_largeness, reverse=True)


def nearest_to(box: Doubles, chains: Sequence[Chain], size: Size) -> tuple[Chain, str]:
    """The one chain that a reference takes the place of, and the rule that chose it.

    `box` [4] is the reference's, stretched to the frame. Greatest IoU at the first frame; if all
    are 0, `prominence`.
    """
    shares = [overlap(chain.boxes[0], box) for chain in chains]
    if max(shares) > 0:
        return chains[int(np.argmax(shares))], "covers the person of the picture best"
    ranks = [prominence(_corner_and_size(chain.boxes[0]), *size) for chain in chains]
    return chains[int(np.argmax(ranks))], "is the largest and most central"


def prompts_of(
    persons: dict[int, Chain], first: int, fps: float
) -> tuple[list[Prompt], tuple[int, ...]]:
    """A box for each person: all in one frame near the beginning, else each in their own.

    Also gives the persons for whom no sure box stands alone: theirs is the best there is.
    """
    last = first + round(_SEARCHED_S * fps)
    together = next((t for t in range(first, last + 1) if _all_clear(persons, t)), None)
    prompts, unsure = [], []
    for number, chain in persons.items():
        frame = together
        if frame is None:
            others = [other for other in persons.values() if other is not chain]
            frame = next((t for t in chain.frames if _is_clear(chain, others, t)), None)
            if frame is None:
                unsure.append(number)
                frame = min(chain.frames, key=lambda t: _doubt(chain, others, t))
        prompts.append(prompt_at(number, chain, frame))
    return prompts, tuple(unsure)


def prompt_at(person: int, chain: Chain, frame: int) -> Prompt:
    """Shows a person by their own box, a little wider. They are there in that frame."""
    box = chain.at(frame)
    assert box is not None, f"person {person} has no box in frame {frame}"
    return Prompt(person, frame, widened(box, _WIDER))


def matched(
    known: dict[int, Last], chains: Sequence[Chain], wanted: int, size: Size
) -> dict[int, Chain]:
    """Who of a new shot is who of the earlier ones: by order from left to right, and by height.

    New persons are added while there are fewer than `wanted`.
    """
    ranks = {id(chain): rank for rank, chain in enumerate(left_to_right(chains))}
    costs = np.full((len(known), len(chains)), np.inf)
    for i, last in enumerate(known.values()):
        for k, chain in enumerate(chains):
            taller = height(chain.boxes[0]) / size[0] / last.height
            costs[i, k] = abs(ranks[id(chain)] - last.rank) + abs(np.log(taller))
    numbers = list(known)
    same = {numbers[i]: chains[k] for i, k in pairs(costs, [_NEVER] * len(known))}
    more = [chain for chain in chains if not any(chain is held for held in same.values())]
    for chain in left_to_right(more[: max(wanted - len(known), 0)]):
        same[max([*known, *same], default=-1) + 1] = chain
    return same


def left_to_right(chains: Sequence[Chain]) -> list[Chain]:
    """Sorted by the frame first seen, then by the centre of the first box."""
    return sorted(chains, key=lambda chain: (chain.frames[0], centre(chain.boxes[0])[0]))


def _largeness(chain: Chain) -> float:
    return float(np.median([area(box) for box in chain.boxes]))


def _all_clear(persons: dict[int, Chain], frame: int) -> bool:
    chains = list(persons.values())
    return all(
        _is_clear(chain, [other for other in chains if other is not chain], frame)
        for chain in chains
    )


def _is_clear(chain: Chain, others: Sequence[Chain], frame: int) -> bool:
    return chain.score(frame) >= SURE and _shared(chain, others, frame) < APART


def _shared(chain: Chain, others: Sequence[Chain], frame: int) -> float:
    """The greatest IoU with anybody else in a frame where the person has a box."""
    own = chain.at(frame)
    boxes = [box for other in others if (box := other.at(frame)) is not None]
    return max((overlap(own, box) for box in boxes), default=0.0) if own is not None else 1.0


def _doubt(chain: Chain, others: Sequence[Chain], frame: int) -> tuple[bool, float, float]:
    score = chain.score(frame)
    return score < SURE, _shared(chain, others, frame), -score


def _corner_and_size(box: Doubles) -> Doubles:
    return np.concatenate([box[:2], box[2:4] - box[:2]])
