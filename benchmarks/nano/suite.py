"""Suite `nano`: the nano model dances scenes that it was never shown, and is judged, in 8 bits too.

Runs with suite `quality`. Exact first, then each form of weights with each attention; all of them
start from the same noise. What the figures mean: `nano/judge.py`. Beside them, how far a velocity
is from the exact one where both are given the exact latents: at the first, middle and last step.
"""

import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean

import numpy as np
import torch
from PIL import Image

from benchmarks.cold_start.scene import own_arch
from benchmarks.nano.drawing import draw_dancer
from benchmarks.nano.judge import LimbVerdict, judge
from benchmarks.nano.scenes import FPS, HEIGHT, HELD_OUT, WIDTH, Frames, ScenePlan, draw, plan
from benchmarks.pictures import COLOURS, figure, save
from benchmarks.quality.blocks import Call, recorded, walk
from benchmarks.quality.metrics import psnr, relative_error
from benchmarks.quality.suite import (
    PLAIN,
    QualityScene,
    attentions,
    build,
    buildable,
    conditions_of,
    made_of,
    model_of,
    networks,
    ops_of,
    packaged,
    settings,
)
from benchmarks.record import Figure, Suite
from benchmarks.timing import columns
from engine.config import state_dir
from engine.demo.presets import SHIPPED
from engine.flow import Request, Settings
from engine.load import load_exact
from engine.models.dit import Scail
from engine.package.folder import open_package
from engine.pipeline import Pipeline
from engine.pose.joints import JointClip, save_joints
from engine.recipes import PROMPT
from engine.source import load_source
from kernels.arch import Arch

CLIPS = 2
FRAMES = 21
EXACT = "exact"
STEPS = ("first", "middle", "last")


@dataclass(frozen=True, slots=True)
class NanoRow:
    """One program, judged by its means over the clips."""

    weights: str
    attention: str
    verdict: LimbVerdict
    exact_db: float  # PSNR against the frames of the exact program
    velocity: tuple[float, ...] = ()  # relative errors at STEPS, the worst of the clips

    @property
    def name(self) -> str:
        return f"{self.weights} {self.attention}"


@dataclass(frozen=True, slots=True)
class Task:
    """One held-out scene as a job, and what it should look like."""

    planned: ScenePlan
    truth: Frames
    request: Request


def measure_nano(clips: int = CLIPS) -> tuple[str, list[NanoRow]]:
    """Says how figures were checked, and gives a row for each program, the exact one first."""
    with tempfile.TemporaryDirectory(prefix="scail-nano-") as name:
        folder = Path(name)
        tasks = [task(HELD_OUT + number, folder) for number in range(clips)]
        shipped = SHIPPED.weights(state_dir())
        model = QualityScene("nano", shipped.checkpoint, shipped.models, tasks[0].request, {})
        rows: list[NanoRow] = []
        exact: Sequence[Frames] = []
        for program in programs(model, tasks, folder):
            clips_made = program.clips
            exact = exact or clips_made
            pairs = zip(clips_made, tasks, strict=True)
            verdict = mean([judge(made, one.truth, one.planned) for made, one in pairs])
            likeness_db = likeness(clips_made, exact)
            rows.append(
                NanoRow(program.weights, program.attention, verdict, likeness_db, program.velocity)
            )
    return f"the drawings of {clips} scenes that nothing was trained on", rows


@dataclass(frozen=True, slots=True)
class Danced:
    """What a program made of the tasks."""

    weights: str
    attention: str
    clips: Sequence[Frames]
    velocity: tuple[float, ...] = ()


def programs(model: QualityScene, tasks: Sequence[Task], folder: Path) -> Iterator[Danced]:
    """Lets each program dance, the exact one first; one package is loaded at a time."""
    pipeline = load_exact(model.checkpoint, [], model.models, networks(model), settings(None))
    exact, calls = model_of(pipeline), []
    clips = []
    for one in tasks:
        with recorded(exact) as made:
            clips.append(dance(pipeline, one))
        calls.append((made[0], made[len(made) // 2], made[-1]))
    yield Danced(EXACT, "sdpa", clips)
    arch = own_arch()
    for weights in buildable(PLAIN, arch):
        package = build(model, weights, arch, folder)
        errors = velocity_errors(exact, package, arch, calls)
        for attention in attentions(arch):
            pipeline = packaged(model, package, attention)
            clips = [dance(pipeline, one) for one in tasks]
            yield Danced(weights, attention, clips, errors[attention])


def velocity_errors(
    exact: Scail, package: Path, arch: Arch, calls: Sequence[Sequence[Call]]
) -> dict[str, tuple[float, ...]]:
    """The relative error of each attention at each step, the worst of the clips. `calls`: those of
    the exact model at the steps, for each clip.
    """
    opened = open_package(package, arch)
    worst: dict[str, list[float]] = {}
    with ops_of(opened, arch) as ops:
        for at, same in enumerate(zip(*calls, strict=True)):
            for call in same:
                for attention, walked in walk(exact, opened, ops, call).items():
                    found = worst.setdefault(attention, [0.0] * len(STEPS))
                    found[at] = max(found[at], relative_error(walked.velocity, call.velocity))
    return {attention: tuple(found) for attention, found in worst.items()}


def task(number: int, folder: Path, frames: int = FRAMES) -> Task:
    """Writes the picture and the joints of a scene as a user would give them."""
    planned = plan(number, frames)
    picture, joints = folder / f"{number}.png", folder / f"{number}.npz"
    drawn = draw_dancer(planned.pictured, HEIGHT, WIDTH, planned.look)
    Image.fromarray(drawn).save(picture)
    save_joints(joints, JointClip(planned.joints, FPS, (HEIGHT, WIDTH)))
    settings = Settings(SHIPPED.recipe, PROMPT, seed=number, width=WIDTH, height=HEIGHT)
    return Task(planned, draw(planned), Request(picture, joints, "joints", settings))


def dance(pipeline: Pipeline, one: Task) -> Frames:
    """The frames [T, H, W, 3] that the engine makes, before a video compresses them."""
    source = load_source(one.request, pipeline.capture)
    told = conditions_of(pipeline.encoders, one.request, source)
    return made_of(pipeline, one.request, told)[1].numpy()


def likeness(clips: Sequence[Frames], others: Sequence[Frames]) -> float:
    """PSNR of all frames of all clips, dB."""
    made, wanted = (torch.from_numpy(np.concatenate(side)) for side in (clips, others))
    return psnr(made, wanted)


def mean(verdicts: Sequence[LimbVerdict]) -> LimbVerdict:
    columns = [asdict(verdict) for verdict in verdicts]
    return LimbVerdict(**{name: fmean(column[name] for column in columns) for name in columns[0]})


def nano_table(rows: Sequence[NanoRow]) -> str:
    """Columns for a terminal, measured on drawings."""
    heads = {"limb IoU": ".3f", "identity": ".3f", "PSNR dB": ".2f", "to exact dB": ".1f"}
    heads |= {f"{step} %": ".2f" for step in STEPS}  # of velocities
    lines = [
        (row.name, row.verdict.limb_iou, row.verdict.identity, row.verdict.psnr, row.exact_db,
         *([100 * error for error in row.velocity] or [None] * len(STEPS)))
        for row in rows
    ]  # fmt: skip
    return columns(heads, lines)


def nano_figures(rows: Sequence[NanoRow]) -> list[Figure]:
    """Rounded figures: equal seeds give equal frames, so the noise is half of the last digit."""
    found: list[Figure] = []
    for row in rows:
        name, it = row.name, row.verdict
        found += [
            Figure(f"{name} limb IoU", round(it.limb_iou, 3), "", 5e-4, "higher"),
            Figure(f"{name} identity", round(it.identity, 3), "", 5e-4),
            Figure(f"{name} PSNR", round(it.psnr, 2), "dB", 5e-3, "higher"),
            Figure(f"{name} to exact", round(row.exact_db, 1), "dB", 0.05, "higher"),
        ]
        found += [
            Figure(f"{name} velocity, {step} step", round(100 * error, 2), "%", 5e-3)
            for step, error in zip(STEPS, row.velocity)
        ]
    return found


def nano_pictures(rows: Sequence[NanoRow], folder: Path, stem: str) -> list[Path]:
    """Limb IoU of each program, and how near it is to the exact one."""
    drawing, [left, right] = figure(8, 0.6 + 0.32 * len(rows), parts=2)
    names, places = [row.name for row in rows], np.arange(len(rows))
    left.barh(places, [row.verdict.limb_iou for row in rows], color=COLOURS[0])
    left.axvline(0.45, color="black", linestyle=":")
    left.set(xlim=(0, 1), xlabel="limb-mask IoU (dotted: the floor)")
    left.set_yticks(places, names)
    left.invert_yaxis()
    right.barh(places[1:], [row.exact_db for row in rows[1:]], color=COLOURS[1])
    right.set(xlabel="PSNR against the exact program, dB")
    return save(drawing, folder, stem)


SUITE = Suite(measure_nano, nano_table, nano_figures, nano_pictures)
