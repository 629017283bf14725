"""Keeps the colours of a clip steady over its segments, one segment in memory at a time.

The frames of a segment are measured before any of them is handed on, corrected where they drifted,
and measured again: what the next segment begins with and what is encoded are the corrected ones.
Source: docs/reference/masks.md 5.
"""

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

from engine.drift.correct import Aim, Correction, correct, correction_to, outcome_of
from engine.drift.cuts import film_cuts
from engine.drift.look import Look, Looks, looks_of
from engine.drift.regions import BACKGROUND, Scale, name_of, owners_of
from engine.drift.told import figures_of, line_of, told_of_drift
from engine.flow import Check, Drift, DriftOutcome, RegionDrift, SegmentDrift, Source

log = logging.getLogger(__name__)

_AT_ONCE = 16  # frames that are handed on together
Lap: TypeAlias = Callable[[str], AbstractContextManager[None]]  # measures the time of a stage


@dataclass(frozen=True, slots=True)
class _Stretch:
    """What of a segment is in the clip."""

    first: int  # frame of the clip
    end: int
    looks: Looks  # as handed on


class Steady:
    """Follows one clip from its first segment to its last. Frames of a clip that has one segment,
    or no masks that show somebody, pass as they come.
    """

    def __init__(self, drift: Drift, source: Source, segments: int) -> None:
        roles, size = source.roles, source.image.shape[1:]
        self._drift, self._driving, self._scale = drift, source.skeleton, Scale.of(*size)
        self._report = list[SegmentDrift]()
        self._first: _Stretch | None = None
        self._before: _Stretch | None = None
        self._masks, self._cuts, self._in_place, self._lacks_mask = None, list[int](), False, False
        if roles is None or segments == 1:
            return
        if not any(owners_of(mask.numpy()).any() for mask in roles.driving):
            self._lacks_mask = drift != "none"
            return
        self._masks = roles.driving
        self._cuts = film_cuts(source.skeleton, roles.driving)
        self._in_place = roles.mode == "replacement"

    @property
    def report(self) -> tuple[SegmentDrift, ...]:
        """The figures of the segments that were handed on."""
        return tuple(self._report)

    @property
    def notes(self) -> tuple[str, ...]:
        """What whoever asked for the clip shall know of its colours."""
        if self._lacks_mask:
            return (
                "No driving mask shows where somebody is, so the colours of the clip's segments "
                "were neither compared nor corrected; give a mask to have that.",
            )
        return told_of_drift(self._report)

    def hand_on(self, frames: Iterator[Tensor], check: Check, lap: Lap) -> Iterator[Tensor]:
        """Hands on the frames of the next segment, chunks [n, H, W, 3] u8.

        `check` is asked at every frame that is worked on; what it raises ends the job.
        """
        if self._masks is None:
            yield from frames
            return
        held = torch.cat([some.cpu() for some in frames])
        with lap("drift"):
            held = self._steadied(held, self._masks, check)
        yield from held.split(_AT_ONCE)

    def _steadied(self, frames: Tensor, masks: Tensor, check: Check) -> Tensor:
        """Corrects the frames of a segment, and notes what they look like."""
        start = 0 if self._before is None else self._before.end
        here = slice(start, start + len(frames))
        found = looks_of(frames, masks[here], self._scale, check)
        wanted: Looks = {}
        if self._in_place:
            wanted = looks_of(self._driving[here], masks[here], self._scale, check)
        aims = self._aims(found, wanted)
        outcomes: dict[int, DriftOutcome] = {
            owner: self._outcome(found.get(owner), aim, here) for owner, aim in aims.items()
        }
        corrections = {
            owner: correction_to(found[owner], aim)
            for owner, aim in aims.items()
            if aim is not None and outcomes[owner] == "corrected"
        }
        made = found
        if corrections:
            frames = _corrected(frames, masks[here], corrections, self._scale, check)
            made = looks_of(frames, masks[here], self._scale, check)
        self._before = _Stretch(here.start, here.stop, made)
        self._first = self._first or self._before
        self._note(self._before, found, outcomes, wanted)
        return frames

    def _aims(self, found: Looks, wanted: Looks) -> dict[int, Aim | None]:
        """What each region shall look like; None: nothing is known that it should.

        The background of a replacement is that of the video, in the first segment too: else the
        clip would change where the second begins.
        """
        anchor = self._anchor.looks if self._anchor is not None else {}
        aims: dict[int, Aim | None] = {}
        for owner in sorted(found.keys() | anchor.keys()):
            look = anchor.get(owner)
            aims[owner] = None if look is None else Aim(look.mean, look.spread, look)
        if BACKGROUND in wanted:
            aims[BACKGROUND] = Aim(wanted[BACKGROUND].mean, None, None)
        return aims

    @property
    def _anchor(self) -> _Stretch | None:
        return self._before if self._drift == "previous" else self._first

    def _outcome(self, found: Look | None, aim: Aim | None, here: slice) -> DriftOutcome:
        anchor = self._anchor
        if anchor is None and aim is None:
            return "anchor"
        begins = here.start if anchor is None else anchor.first
        is_cut = any(begins < cut < here.stop for cut in self._cuts)
        outcome = outcome_of(found, aim, self._scale, is_cut=is_cut)
        return "off" if outcome == "corrected" and self._drift == "none" else outcome

    def _note(
        self,
        made: _Stretch,
        found: Looks,
        outcomes: Mapping[int, DriftOutcome],
        wanted: Looks,
    ) -> None:
        """Reports a segment: its figures to the first one, or to the video where it is redrawn."""
        assert self._first is not None
        regions = list[RegionDrift]()
        for owner, outcome in outcomes.items():
            is_video = owner == BACKGROUND and owner in wanted
            measure = (wanted if is_video else self._first.looks).get(owner)
            before = figures_of(found.get(owner), measure)
            after = figures_of(made.looks.get(owner), measure)
            against = "driving video" if is_video else "first segment"
            regions.append(RegionDrift(name_of(owner), against, outcome, *before, *after))
        number = len(self._report) + 1
        self._report.append(SegmentDrift(number, (made.first, made.end), tuple(regions)))
        log.info("%s", line_of(self._report[-1]))


def _corrected(
    frames: Tensor,
    masks: Tensor,
    corrections: dict[int, Correction],
    scale: Scale,
    check: Check,
) -> Tensor:
    """Corrects frames [n, H, W, 3] u8."""
    made = torch.empty_like(frames)
    for place, frame, mask in zip(made, frames, masks, strict=True):
        check()
        pixels = correct(frame.numpy(), owners_of(mask.numpy()), corrections, scale)
        place.copy_(torch.from_numpy(pixels))
    return made
