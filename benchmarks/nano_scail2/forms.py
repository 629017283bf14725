"""Suite `nano-scail2`: the nano SCAIL-2 performs unseen scenes exactly and in every 8-bit form.

Runs with suite `quality`. In both modes, with one person and with two, all programs begin from the
same noise: identity, motion and room are judged (`judge.py`), and how near a clip is to the exact
program's. What wrong inputs do to the judge's figures: `suite.py`.
"""

import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

import numpy as np

from benchmarks.cold_start.scene import own_arch
from benchmarks.nano.suite import EXACT, likeness
from benchmarks.nano_scail2.judge import Verdict, judge
from benchmarks.nano_scail2.perform import PRESET, exact, given, perform
from benchmarks.nano_scail2.scenes import MODES, Frames, Mode, Scene, ScenePlan
from benchmarks.nano_scail2.suite import held_out
from benchmarks.pictures import COLOURS, figure, save
from benchmarks.quality.suite import attentions, settings
from benchmarks.record import Figure, Suite
from benchmarks.timing import columns
from engine.build.make import Order, make_package
from engine.config import state_dir
from engine.load import load_package
from engine.package.manifest import WeightsForm
from engine.pipeline import Pipeline
from engine.pose.networks import Networks
from engine.program import choose_package

WEIGHTS: tuple[WeightsForm, ...] = ("fp8", "int8")
CLIPS = 2  # scenes with one person, and as many with two


@dataclass(frozen=True, slots=True)
class FormRow:
    """What a program made of some scenes in one mode."""

    weights: str
    attention: str
    mode: Mode
    limb_iou: float
    right_colours: int  # clips in which everybody has the colours of the picture
    clips: int
    background_db: float  # PSNR to the room of the driving video: meant in replacement alone
    exact_db: float  # PSNR against the frames of the exact program

    @property
    def name(self) -> str:
        return f"{self.weights} {self.attention} {self.mode}"


@dataclass(frozen=True, slots=True)
class Staged:
    """A scene that nothing was trained on, in one mode."""

    planned: ScenePlan
    true: Scene
    mode: Mode
    seed: int


def measure_forms(clips: int = CLIPS) -> tuple[str, list[FormRow]]:
    """Says how figures were checked, and gives two rows for each program, the exact one first."""
    staged = [
        Staged(planned, true, mode, seed)
        for mode in MODES
        for persons in (1, 2)
        for seed, (planned, true) in enumerate(held_out(persons, clips))
    ]
    rows: list[FormRow] = []
    wanted: Sequence[Frames] = []
    with tempfile.TemporaryDirectory(prefix="scail-nano-scail2-") as folder:
        for weights, attention, pipeline in programs(Path(folder)):
            made = [perform(pipeline, given(one.true, one.mode), one.seed) for one in staged]
            wanted = wanted or made
            rows += rows_of(weights, attention, staged, made, wanted)
    return f"the drawings of {2 * clips} scenes that nothing was trained on", rows


def programs(folder: Path) -> Iterator[tuple[str, str, Pipeline]]:
    """Loads one program after the other: its weights, its attention, and a pipeline of it."""
    shipped, how = PRESET.weights(state_dir()), settings(None)
    yield EXACT, "sdpa", exact(shipped)
    arch = own_arch()
    networks = Networks(shipped.models, how.device, how.state)
    for weights in WEIGHTS:
        order = Order(arch, shipped.checkpoint, weights=weights)
        package = choose_package(make_package(order, folder / weights, state_dir()), how.device)
        for attention in attentions(arch):
            yield (
                weights,
                attention,
                load_package(package, shipped.models, networks, settings(attention)),
            )


def rows_of(
    weights: str,
    attention: str,
    staged: Sequence[Staged],
    made: Sequence[Frames],
    wanted: Sequence[Frames],
) -> Iterator[FormRow]:
    for mode in MODES:
        here = [number for number, one in enumerate(staged) if one.mode == mode]
        found: list[Verdict] = [
            judge(made[n], staged[n].planned, staged[n].true, mode) for n in here
        ]
        yield FormRow(
            weights,
            attention,
            mode,
            fmean(one.limb_iou for one in found),
            sum(one.right_colours for one in found),
            len(found),
            fmean(one.background_db for one in found),
            likeness([made[n] for n in here], [wanted[n] for n in here]),
        )


def forms_table(rows: Sequence[FormRow]) -> str:
    """Columns for a terminal."""
    heads = {"limb IoU": ".3f", "colours": "s", "background dB": ".1f", "to exact dB": ".1f"}
    return columns(heads, [
        (row.name, row.limb_iou, f"{row.right_colours}/{row.clips}", row.background_db,
         row.exact_db)
        for row in rows
    ])  # fmt: skip


def forms_figures(rows: Sequence[FormRow]) -> list[Figure]:
    """Rounded figures: equal seeds give equal frames, so the noise is half of the last digit."""
    found: list[Figure] = []
    for row in rows:
        share = round(100 * row.right_colours / row.clips)
        found += [
            Figure(f"{row.name} limb IoU", round(row.limb_iou, 3), "", 5e-4, "higher"),
            Figure(f"{row.name} right colours", share, "%", 0.5, "higher"),
            Figure(f"{row.name} to exact", round(row.exact_db, 1), "dB", 0.05, "higher"),
        ]
        if row.mode == "replacement":
            decibels = round(row.background_db, 1)
            found.append(Figure(f"{row.name} room", decibels, "dB", 0.05, "higher"))
    return found


def forms_pictures(rows: Sequence[FormRow], folder: Path, stem: str) -> list[Path]:
    """Draws the limb IoU of each program, and how near it is to the exact one."""
    drawing, [left, right] = figure(8, 0.6 + 0.32 * len(rows), parts=2)
    names, places = [row.name for row in rows], np.arange(len(rows))
    left.barh(places, [row.limb_iou for row in rows], color=COLOURS[0])
    left.axvline(0.6, color="black", linestyle=":")
    left.set(xlim=(0, 1), xlabel="limb-mask IoU (dotted: what is asked of one person)")
    left.set_yticks(places, names)
    left.invert_yaxis()
    near = [(place, row.exact_db) for place, row in enumerate(rows) if row.weights != EXACT]
    right.barh([place for place, _ in near], [db for _, db in near], color=COLOURS[1])
    right.set(xlabel="PSNR against the exact program, dB")
    return save(drawing, folder, stem)


SUITE = Suite(measure_forms, forms_table, forms_figures, forms_pictures)
