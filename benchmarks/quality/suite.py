"""Suite `quality`: how far 8 bits are from the exact model with the same seed and conditions.

Hidden states block by block, latents, and decoded frames, for each attention, weights and recipe.
Without a checkpoint the tiny random model is measured, and the same written with outliers; on a CPU
the references compute what kernels do. Beside them, what FP8 sums of about 14 bits cost at worst,
from a model.
"""

import gc
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import fmean
from typing import TypeAlias

import torch
from PIL import Image
from torch import Tensor

from benchmarks.cold_start.scene import own_arch
from benchmarks.quality.blocks import Call, Walked, recorded, walk, worst
from benchmarks.quality.metrics import psnr, relative_error, ssim
from benchmarks.quality.outliers import write_outliers
from benchmarks.quality.rows import QualityRow, quality_figures, quality_pictures, quality_table
from benchmarks.quality.sums import SumRow, measure_sums, sums_figures, sums_table
from benchmarks.record import Figure, Suite
from benchmarks.timing import require
from engine.build.make import Order, make_package
from engine.conditioning import Encoders, condition_motion, condition_pictures
from engine.config import models_dir, state_dir
from engine.demo.weights import demo_weights
from engine.denoise.block import WEIGHT_FORMS
from engine.errors import Unavailable
from engine.flow import Conditions, Recipe, Request, Settings, Source
from engine.load import load_exact, load_package
from engine.models.attention import find_attention
from engine.models.dit import Scail
from engine.package.folder import Package, open_package
from engine.package.manifest import WeightsForm
from engine.pipeline import Pipeline
from engine.pose.networks import Networks
from engine.program import ModelSettings, choose_package
from engine.recipes import PROMPT, RECIPES, check_settings
from engine.source import load_source
from engine.stage_dump import StageDump
from kernels.arch import Arch
from kernels.attention import FORMS, variants
from kernels.launch import KernelBank
from kernels.ops import Ops, native_ops, plain_attention, reference_ops

DEMO = Path(__file__).resolve().parents[2] / "engine" / "demo"
TINY_SIZE, TINY_FRAMES = (64, 96), 17
SIZE, FRAMES = (512, 896), 81  # of real weights
TINY_STEPS = {"production": 4, "official": 3}
STEPS = {"production": 6, "official": 10}
PLAIN, CALIBRATED = ("fp8", "int8"), "int8 calibrated"
STAGES = "stages"  # the folder that a build is calibrated with


@dataclass(frozen=True, slots=True)
class QualityScene:
    """A model and a clip, and the packages to be measured: those that are there, or are built."""

    name: str
    checkpoint: Path
    models: Path
    request: Request  # its recipe gives way to each of `recipes`
    recipes: Mapping[str, Recipe]
    packages: Mapping[str, Path] = field(default_factory=dict)  # by what their rows are called
    builds: tuple[str, ...] = PLAIN  # where there is none; `CALIBRATED` with this very clip


@dataclass(frozen=True, slots=True)
class Exact:
    """The conditions of the exact model, and what it made of them."""

    conditions: Conditions
    calls: tuple[Call, ...]  # the first and the last: with the skeleton, and perhaps without
    latents: Tensor  # [16, t, h, w]
    frames: Tensor  # [T, H, W, 3] u8


def measure_quality(
    checkpoint: Path | None = None, package: Path | None = None, models: Path | None = None
) -> tuple[str, list[QualityRow | SumRow]]:
    """Says how figures were checked, and gives a row for each combination. Raises `WrongResult`."""
    if checkpoint is None and package is not None:
        raise Unavailable("--package is measured against the checkpoint it was built from: add "
            "--checkpoint FILE.")  # fmt: skip
    with tempfile.TemporaryDirectory(prefix="scail-quality-") as folder:
        if checkpoint is None:
            scenes = tiny_scenes(Path(folder))
        else:
            scenes = [real_scene(checkpoint, package, models or models_dir())]
        rows: list[QualityRow | SumRow] = [
            row for scene in scenes for row in measure_scene(scene, Path(folder) / scene.name)
        ]
    how = "kernels" if torch.cuda.is_available() else "references on the CPU"
    return (
        f"the velocity after the blocks walked one by one being the package's own ({how}; exact "
        f"model in {settings(None).precision})"
    ), [*rows, *measure_sums()]


def tiny_scenes(folder: Path) -> list[QualityScene]:
    """Random weights, and the same function with outliers. Their VAE makes noise of little."""
    demo = demo_weights(state_dir())
    outliers = write_outliers(demo.checkpoint, folder / "outliers.safetensors")
    request = dance(TINY_SIZE, TINY_FRAMES)
    made = _recipes(TINY_STEPS)
    return [
        QualityScene("tiny", demo.checkpoint, demo.models, request, made),
        QualityScene("outliers", outliers, demo.models, request, made, builds=(*PLAIN, CALIBRATED)),
    ]


def real_scene(checkpoint: Path, package: Path | None, models: Path) -> QualityScene:
    found = {} if package is None else {open_package(package, own_arch()).manifest.weights: package}
    return QualityScene(
        checkpoint.stem, checkpoint, models, dance(SIZE, FRAMES), _recipes(STEPS), found
    )


def dance(size: tuple[int, int], frames: int) -> Request:
    """The demo's picture and dance at a size (H, W)."""
    picture, joints = DEMO / "dancer.png", DEMO / "dance.npz"
    settings = Settings(
        RECIPES["preview"]["production"], PROMPT, "blur", seed=3,
        height=size[0], width=size[1], frames=frames,
    )  # fmt: skip
    return Request(picture, joints, "joints", settings)


def measure_scene(scene: QualityScene, folder: Path) -> Iterator[QualityRow]:
    """Builds in `folder` what is not given. The exact model is let go of before packages load."""
    arch = own_arch()
    folder.mkdir()
    made, packages, walked = _exact_side(scene, arch, folder)
    gc.collect()  # a pipeline and its memory hold each other
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    for weights, path in packages.items():
        for attention in attentions(arch):
            loaded = packaged(scene, path, attention)
            for recipe in scene.recipes:
                walks = walked[weights, recipe, attention]
                yield _row(scene, recipe, weights, attention, loaded, made[recipe], walks)


def packaged(scene: QualityScene, package: Path, attention: str | None) -> Pipeline:
    """The pipeline of a package of the scene's model."""
    how = settings(attention)
    chosen = choose_package(package, how.device)
    return load_package(chosen, scene.models, networks(scene), how)


def attentions(arch: Arch) -> list[str]:
    """The forms of self attention that packages have for a GPU, those of 8 bits first."""
    return [*(form for form in FORMS if variants(form, arch)), "sdpa"]


def buildable(builds: Sequence[str], arch: Arch) -> list[str]:
    """Those of `QualityScene.builds` whose weights a GPU multiplies."""
    return [name for name in builds if WEIGHT_FORMS[_form(name)].codes in arch.codes]


_Walks = dict[tuple[str, str, str], list[Walked]]  # by weights, recipe and attention


def _exact_side(
    scene: QualityScene, arch: Arch, folder: Path
) -> tuple[dict[str, Exact], Mapping[str, Path], _Walks]:
    """Does everything that the exact model is needed for."""
    exact = load_exact(scene.checkpoint, [], scene.models, networks(scene), settings(None))
    is_calibrated = not scene.packages and CALIBRATED in scene.builds
    model, dump = model_of(exact), StageDump(folder / STAGES if is_calibrated else None)
    with dump.recording(model):
        made = {name: _run_exact(exact, scene, recipe) for name, recipe in scene.recipes.items()}
    builds = buildable(scene.builds, arch)
    packages = scene.packages or {name: build(scene, name, arch, folder) for name in builds}
    walks: _Walks = {}
    for weights, path in packages.items():
        package = open_package(path, arch)
        with ops_of(package, arch) as ops:
            for recipe, found in made.items():
                walked = [walk(model, package, ops, call) for call in found.calls]
                for attention in ops:
                    walks[weights, recipe, attention] = [one[attention] for one in walked]
    return made, packages, walks


def build(scene: QualityScene, name: str, arch: Arch, folder: Path) -> Path:
    """A package of one of `QualityScene.builds`."""
    seen = folder / STAGES if name == CALIBRATED else None
    order = Order(arch, scene.checkpoint, weights=_form(name), calibration=seen)
    return make_package(order, folder / name, state_dir())


def _form(build: str) -> WeightsForm:
    return "fp8" if build == "fp8" else "int8"


def _run_exact(pipeline: Pipeline, scene: QualityScene, recipe: Recipe) -> Exact:
    request = _with_recipe(scene.request, recipe)
    check_settings(request.settings)
    source = load_source(request, pipeline.capture)
    told = conditions_of(pipeline.encoders, request, source)
    with recorded(model_of(pipeline)) as calls:
        latents, frames = made_of(pipeline, request, told)
    return Exact(told, (calls[0], calls[-1]), latents, frames)


def _with_recipe(request: Request, recipe: Recipe) -> Request:
    return replace(request, settings=replace(request.settings, recipe=recipe))


def _row(
    scene: QualityScene,
    recipe: str,
    weights: str,
    attention: str,
    pipeline: Pipeline,
    exact: Exact,
    walks: Sequence[Walked],
) -> QualityRow:
    request = _with_recipe(scene.request, scene.recipes[recipe])
    check_walk(pipeline, request.settings.recipe, exact, walks[0])
    latents, frames = made_of(pipeline, request, exact.conditions)
    pairs = [*zip(frames, exact.frames, strict=True)]
    levels = [psnr(*pair) for pair in pairs]
    worst_frame = levels.index(min(levels))
    row = QualityRow(
        scene.name, recipe, weights, attention,
        relative_error(latents, exact.latents),
        fmean(levels), min(levels), worst_frame, fmean(ssim(*pair) for pair in pairs), worst(walks),
    )  # fmt: skip
    row.picture.parent.mkdir(parents=True, exist_ok=True)
    side_by_side = torch.cat([exact.frames[worst_frame], frames[worst_frame]], dim=1)
    Image.fromarray(side_by_side.numpy()).save(row.picture)
    return row


def check_walk(pipeline: Pipeline, recipe: Recipe, exact: Exact, walked: Walked) -> None:
    """Checks by the first evaluation that the blocks walked one by one are those of the programs.

    Both must be nearer to their program than half of what the programs are to each other. Raises
    `WrongResult`.
    """
    call, told = exact.calls[0], exact.conditions
    if recipe.cfg != 1 and told.negative is not None:
        told = replace(told, text=told.negative)  # guidance asks for it first
    plain = replace(recipe, cfg=1.0)
    with pipeline.denoiser.home.present():
        velocity = pipeline.denoiser.bind(replace(told, negative=None), plain)
        own = velocity(call.latents, range(call.latents.shape[1]), 0, call.timestep)
    gap = relative_error(own, call.velocity)
    for what, apart in (
        ("8-bit", relative_error(walked.velocity, own)),
        ("exact", relative_error(walked.exact, call.velocity)),
    ):
        wrong = f"{what} blocks walked one by one are {apart:.1e} from their program"
        require(2 * apart < gap, f"{wrong}, which is {gap:.1e} from the other")


@torch.inference_mode()
def conditions_of(encoders: Encoders, request: Request, source: Source) -> Conditions:
    """All that a transformer without masks is told of a clip that is denoised as one."""
    pictures = condition_pictures(encoders, request, source)
    return condition_motion(encoders, pictures, source, source.skeleton, None)


def made_of(pipeline: Pipeline, request: Request, told: Conditions) -> tuple[Tensor, Tensor]:
    """The latents and the frames [T, H, W, 3] u8 that a pipeline makes, before a video is."""
    latents = pipeline.denoise(request, told)
    pipeline.require_finite(latents)
    with pipeline.encoders.vae_home.present():
        return latents, torch.cat([frames.cpu() for frames in pipeline.decode(latents)])


@contextmanager
def ops_of(package: Package, arch: Arch) -> Iterator[Mapping[str, Ops]]:
    """Operations by the names of attention: the package's kernels, or references without a GPU."""
    forms = {form: variants(form, arch)[0] for form in attentions(arch)[:-1]}
    with ExitStack() as stack:
        if torch.cuda.is_available():
            stream = lambda: torch.cuda.current_stream().cuda_stream  # noqa: E731
            bank = stack.enter_context(KernelBank(package.kernels, arch, stream))
            ops = {name: native_ops(bank, arch, attention=spec) for name, spec in forms.items()}
        else:
            ops = {name: reference_ops(spec, arch) for name, spec in forms.items()}
        plain = plain_attention(next(iter(ops.values())), find_attention("sdpa"))
        yield {**ops, "sdpa": plain}


Rows: TypeAlias = Sequence[QualityRow | SumRow]


def _apart(rows: Rows) -> tuple[list[QualityRow], list[SumRow]]:
    clips = [row for row in rows if isinstance(row, QualityRow)]
    return clips, [row for row in rows if isinstance(row, SumRow)]


def whole_table(rows: Rows) -> str:
    clips, sums = _apart(rows)
    return f"{quality_table(clips)}\n\n{sums_table(sums)}"


def whole_figures(rows: Rows) -> list[Figure]:
    clips, sums = _apart(rows)
    return [*quality_figures(clips), *sums_figures(sums)]


def whole_pictures(rows: Rows, folder: Path, stem: str) -> list[Path]:
    return quality_pictures(_apart(rows)[0], folder, stem)


def model_of(pipeline: Pipeline) -> Scail:
    """The model of an exact pipeline."""
    model = pipeline.denoiser.recorded
    assert isinstance(model, Scail)
    return model


def _recipes(steps: Mapping[str, int]) -> dict[str, Recipe]:
    rows = RECIPES["preview"].items()
    return {name: replace(row, steps=steps[name]) for name, row in rows if name in steps}


def settings(attention: str | None) -> ModelSettings:
    device = torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
    precision = "bf16" if device.type == "cuda" else "fp32"  # as of `generate`
    return ModelSettings(device, precision, attention, state_dir())


def networks(scene: QualityScene) -> Networks:
    return Networks(scene.models, settings(None).device, state_dir())


SUITE = Suite(measure_quality, whole_table, whole_figures, whole_pictures)
