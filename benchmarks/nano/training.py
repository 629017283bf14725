"""The loop of both trainings: going on where one stopped, a rate that falls, an average, a log."""

import math
import random
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from benchmarks.nano.optimizer import NanoOptimizer
from kernels.whole_file import whole_file

WARM_UP = 50  # steps
FALLING = 0.4  # share of the time, at the end, in which the rate falls to zero
REPORT = 25  # steps between two lines on the terminal
KEEP = 50  # steps between two files
AVERAGE = 0.997  # of the averaged weights


@dataclass(slots=True)
class State:
    step: int = 0
    seconds: float = 0.0


@dataclass(frozen=True, slots=True)
class StepLoss:
    """The loss that a step is to lower, and what the log says of it."""

    loss: Tensor
    kind: str
    other: float


def train(
    path: Path,
    model: nn.Module,
    matrices: Collection[nn.Parameter],
    rng: random.Random,
    seed: int,
    minutes: float,
    rates: tuple[float, float],
    loss_of: Callable[[float], StepLoss],
    average: nn.Module | None = None,
) -> None:
    """Trains until the minutes are over, those of runs before this one included.

    `matrices` are learned by Muon, the rest by Adam, at these `rates`. `loss_of` is given the share
    of the time that has gone. `average` follows the weights and is kept beside them.
    """
    chosen = {id(parameter) for parameter in matrices}
    others = [p for p in model.parameters() if id(p) not in chosen]
    optimizer = NanoOptimizer(matrices, others)
    parts: dict[str, nn.Module | Optimizer] = {"model": model, "optimizer": optimizer}
    if average is not None:
        parts["average"] = average
    state = resume(path, parts)
    torch.manual_seed(seed + state.step)
    rng.seed(seed + state.step)
    log, started = TrainingLog(path.with_suffix(".csv")), time.monotonic() - state.seconds
    while state.seconds < 60 * minutes:
        done = (time.monotonic() - started) / (60 * minutes)
        rate = schedule(state.step, done)
        optimizer.set_rates(rate * rates[0], rate * rates[1])
        found = loss_of(done)
        optimizer.zero_grad()
        found.loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        state.step, state.seconds = state.step + 1, time.monotonic() - started
        if average is not None:
            follow(average, model, min(AVERAGE, (1 + state.step) / (10 + state.step)))
        log.add(state, found)
        if state.step % KEEP == 0 or state.seconds >= 60 * minutes:
            keep(path, parts, state)


@torch.no_grad()
def follow(average: nn.Module, model: nn.Module, decay: float) -> None:
    for slow, fast in zip(average.parameters(), model.parameters()):
        slow.lerp_(fast, 1 - decay)


def schedule(step: int, done: float) -> float:
    """The share of the full rate after so many steps, when `done` of the time has gone."""
    return min(1.0, (step + 1) / WARM_UP, max(0.0, 1 - done) / FALLING)


def keep(path: Path, parts: Mapping[str, nn.Module | Optimizer], state: State) -> None:
    """Writes the whole file or nothing."""
    kept = {name: part.state_dict() for name, part in parts.items()}
    with whole_file(path) as draft:
        torch.save({**kept, **asdict(state)}, draft)


def resume(path: Path, parts: Mapping[str, nn.Module | Optimizer]) -> State:
    """Loads the parts that `keep` wrote, if it did."""
    if not path.exists():
        return State()
    kept = torch.load(path, weights_only=True)
    for name, part in parts.items():
        part.load_state_dict(kept[name])
    return State(kept["step"], kept["seconds"])


class TrainingLog:
    """Writes one line a step into a file, and some of them on the terminal."""

    def __init__(self, path: Path) -> None:
        self.file = path.open("a", encoding="utf-8")

    def add(self, state: State, found: StepLoss) -> None:
        """Raises `FloatingPointError` for a loss that is not finite."""
        loss = found.loss.item()
        if not math.isfinite(loss):
            raise FloatingPointError(f"The loss of step {state.step} is {loss}.")
        line = f"{state.step},{state.seconds:.1f},{found.kind},{loss:.5f},{found.other:.3f}"
        print(line, file=self.file)
        if state.step % REPORT == 0:
            self.file.flush()
            print(line, flush=True)
