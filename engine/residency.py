"""Keeps on the GPU what the memory plan of a clip says, and less where that was not enough."""

import logging
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from traceback import clear_frames
from typing import TypeVar

import torch

from engine.denoise.contexts import Contexts
from engine.denoise.schedule import Streaming
from engine.denoise.segments import segments_of
from engine.denoise.windows import evaluations_of_each, latent_frames
from engine.errors import TooLarge
from engine.flow import Request, Source
from engine.machine.exhausted import ran_out
from engine.machine.resident import Resident, nothing
from engine.memory import ClipShape, MemoryPlan, Stage, next_rung
from kernels.launch import DriverError

log = logging.getLogger(__name__)

TOLD_BYTES = 2**30  # held by others; the driver itself keeps about half of that

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Movable:
    """The models and switches that a plan decides about."""

    blocks: Resident
    vision: Resident
    vae: Resident
    use_graphs: Callable[[bool], object]
    after: Mapping[Stage, Callable[[], object]]  # gives back what a stage needs no longer
    contexts: Contexts | None = None  # None: there are none to keep
    stream: Callable[[Streaming | None], object] = lambda _: None  # how many blocks stay


def no_others() -> int:
    """Counts the bytes that other programs hold of a GPU that is not there."""
    return 0


class Memory:
    """The plan of the clip at hand. Without a planner nothing is planned and nothing moves."""

    def __init__(
        self,
        planner: Callable[[ClipShape], MemoryPlan] | None,
        models: Movable,
        others: Callable[[], int] = no_others,
    ) -> None:
        """`others` counts the bytes that other programs hold of the GPU."""
        self._planner, self._models, self._others = planner, models, others
        self._plan: MemoryPlan | None = None
        self._stage: Stage = "conditioning"
        self.notes: list[str] = []  # what became of the plan, for whoever asked for the clip

    @classmethod
    def unplanned(cls) -> "Memory":
        """Makes a memory that plans nothing: all models stay where they are."""
        return cls(None, Movable(Resident(), Resident(), Resident(), lambda _: None, {}))

    def prepare(self, request: Request, source: Source) -> None:
        """Plans a clip and follows the plan. Raises `TooLarge` if it fits in no way."""
        self.notes, self._stage = [], "conditioning"
        if self._planner is not None:
            self._follow(self._plan_of(self._planner, shape_of(request, source)))

    def foresee(self, shape: ClipShape) -> MemoryPlan | None:
        """Plans a clip, and leaves the models; None if nothing is planned. Raises `TooLarge`."""
        return None if self._planner is None else self._plan_of(self._planner, shape)

    def _plan_of(self, planner: Callable[[ClipShape], MemoryPlan], shape: ClipShape) -> MemoryPlan:
        try:
            return planner(shape)
        except TooLarge as error:
            raise TooLarge(f"{error}{self._told_of_others()}") from error

    def _told_of_others(self) -> str:
        """A sentence for an error, if other programs hold what would be of use."""
        held = self._others()
        if held < TOLD_BYTES:
            return ""
        return f" Other programs hold {held / 1e9:.1f} GB of this GPU: end them, or take another."

    def attempt(self, stage: Stage, work: Callable[[], T]) -> T:
        """Does the work of a stage, again with less on the GPU whenever it runs out of memory.

        Returns what the work returns. Raises `TooLarge` when nothing is left to be moved.
        """
        while True:
            try:
                with self.stage(stage):
                    return work()
            except (RuntimeError, DriverError) as error:
                if not ran_out(error):
                    raise
                self.step_down(error)

    def attempt_each(self, stage: Stage, make: Callable[[], Iterator[T]]) -> Generator[T]:
        """Hands out what an iterator makes. Whenever it runs out of memory, a new one goes on with
        less on the GPU, behind what was handed out.

        Raises `TooLarge` as `attempt` does.
        """
        handed = 0
        while True:
            try:
                with self.stage(stage):
                    for item in islice(make(), handed, None):
                        yield item
                        handed += 1
                return
            except (RuntimeError, DriverError) as error:
                if not ran_out(error):
                    raise
                self.step_down(error)

    @contextmanager
    def stage(self, name: Stage) -> Iterator[None]:
        self._stage = name
        try:
            yield
        finally:
            self._models.after.get(name, nothing)()
            if self._plan is not None:
                torch.cuda.empty_cache()  # the next stage needs it in other pieces

    def step_down(self, error: Exception) -> None:
        """Follows a lower rung after a stage ran out of memory, or raises `TooLarge`."""
        clear_frames(error.__traceback__)  # they hold the tensors of what failed
        lower = None if self._plan is None else next_rung(self._plan, self._stage)
        if lower is None:
            reason = str(error).partition("\n")[0].partition(". ")[0]
            raise TooLarge(
                f"The GPU ran out of memory ({self._stage}: {reason}) and nothing is left to be "
                f"moved. Ask for a smaller or shorter clip.{self._told_of_others()}"
            ) from error
        note = f"Out of memory ({self._stage}): tried again, {lower.does}."
        log.warning(note)
        self.notes.append(note)
        self._follow(lower)

    def _follow(self, plan: MemoryPlan) -> None:
        log.info(plan.sentence)
        self._plan = plan
        try:
            self._move(plan)
        except (RuntimeError, DriverError) as error:
            if not ran_out(error):
                raise
            self.step_down(error)  # what a smaller clip had sent away did not fit

    def _move(self, plan: MemoryPlan) -> None:
        rung = plan.rung
        self._models.use_graphs(rung.graphs)
        self._models.stream(plan.streaming)
        if self._models.contexts is not None:
            self._models.contexts.keep(weights=rung.contexts_stay, texts=rung.texts_stay)
        self._models.blocks.settle(stays=rung.blocks_stay)
        self._models.vision.settle(stays=rung.encoders_stay)
        self._models.vae.settle(stays=rung.encoders_stay)
        torch.cuda.empty_cache()


def shape_of(request: Request, source: Source) -> ClipShape:
    """Reads off a request and its media what decides the memory that the clip takes."""
    recipe, frames = request.settings.recipe, len(source.skeleton)
    segments = segments_of(request.settings, frames)
    counts = [evaluations_of_each(recipe, latent_frames(one.frames)) for one in segments]
    height, width = source.image.shape[1:]
    unseen = "first" if recipe.pose_from > 0 else "last" if recipe.pose_until < 1 else "never"
    longest = max(one.frames for one in segments)
    return ClipShape(
        height,
        width,
        frames=min(longest, recipe.window_frames),
        contexts=1 if recipe.cfg == 1 else 2,
        unseen=unseen,
        clip_frames=longest,
        evaluations=(max(seen for seen, _ in counts), max(blind for _, blind in counts)),
        references=len(request.references),
        has_history=any(one.history_frames for one in segments),
    )
