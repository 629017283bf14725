"""What both trainings share: going on where one stopped, a rate that falls, a log."""

import math
from collections import defaultdict
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import nn
from torch.optim import Optimizer

WARM_UP = 50  # steps
FALLING = 0.4  # share of the time, at the end, in which the rate falls to zero
REPORT = 25  # steps between two lines on the terminal


@dataclass(slots=True)
class State:
    step: int = 0
    seconds: float = 0.0


def schedule(step: int, done: float) -> float:
    """Share of the full rate after so many steps, when `done` of the time has gone."""
    return min(1.0, (step + 1) / WARM_UP, max(0.0, 1 - done) / FALLING)


def keep(path: Path, model: nn.Module, optimizer: Optimizer, state: State) -> None:
    """All or nothing."""
    fresh = path.with_suffix(".part")
    kept = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), **asdict(state)}
    torch.save(kept, fresh)
    fresh.replace(path)


def resume(path: Path, model: nn.Module, optimizer: Optimizer) -> State:
    if not path.exists():
        return State()
    kept = torch.load(path, weights_only=True)
    model.load_state_dict(kept["model"])
    optimizer.load_state_dict(kept["optimizer"])
    return State(kept["step"], kept["seconds"])


class TrainingLog:
    """One line a step in a file; on the terminal the means of each kind of step."""

    def __init__(self, path: Path) -> None:
        self.file = path.open("a")
        self.recent: dict[str, list[tuple[float, float]]] = defaultdict(list)

    def add(self, step: int, seconds: float, kind: str, loss: float, other: float) -> None:
        if not math.isfinite(loss):
            raise FloatingPointError(f"The loss of step {step} is {loss}.")
        self.file.write(f"{step},{seconds:.1f},{kind},{loss:.5f},{other:.3f}\n")
        self.recent[kind].append((loss, other))
        if step % REPORT == 0:
            self.file.flush()
            means = (
                f"{kind}: {sum(a for a, _ in rows) / len(rows):.4f} "
                f"{sum(b for _, b in rows) / len(rows):.2f}"
                for kind, rows in sorted(self.recent.items())
            )
            print(f"{step:6} {seconds:7.0f} s  " + "   ".join(means), flush=True)
            self.recent.clear()
