"""The demo models: their weights, recipes, sizes and the warnings that go with their clips."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from engine.config import NANO, NANO_SCAIL2, TINY, TINY_SCAIL2, ModelConfig
from engine.demo.weights import DemoWeights, demo_weights, scail2_weights
from engine.flow import Recipe
from engine.media.framing import Size
from engine.recipes import RECIPES

NANO_HOME = Path(__file__).resolve().parent / "nano"
NANO_SCAIL2_HOME = NANO_HOME.with_name("nano_scail2")


@dataclass(frozen=True, slots=True)
class Preset:
    """A model so small that any machine runs it."""

    config: ModelConfig
    weights: Callable[[Path], DemoWeights]  # they may be written to the state folder it is given
    recipe: Recipe
    size: Size | None  # height and width of clips where no others are asked for
    warning: str


def _nano(_: Path) -> DemoWeights:
    return DemoWeights(NANO_HOME / "diffusion_models" / "scail_nano_fp16.safetensors", NANO_HOME)


def _nano_scail2(_: Path) -> DemoWeights:
    checkpoint = NANO_SCAIL2_HOME / "diffusion_models" / "scail2_nano_fp16.safetensors"
    return DemoWeights(checkpoint, NANO_SCAIL2_HOME)


RANDOM = "DEMO WEIGHTS: random numbers, not a trained model"
PRESETS = {
    "tiny": Preset(
        TINY, demo_weights, replace(RECIPES["preview"]["official"], steps=4, cfg=1.0), None,
        RANDOM,
    ),
    "tiny-scail2": Preset(
        TINY_SCAIL2, scail2_weights, replace(RECIPES["scail2"]["turbo"], steps=4), None,
        RANDOM,
    ),
    # trained on drawings of 96x160 and windows of 5 latents: benchmarks/nano/README.md
    "nano": Preset(
        NANO, _nano,
        replace(
            RECIPES["preview"]["official"], steps=8, cfg=1.0, shift=3.0,
            window_frames=17, overlap_frames=8,
        ),
        (160, 96),
        "DEMO WEIGHTS: a nano model that knows nothing but drawn dancers",
    ),
    # trained on drawings of 96x160 and segments of 17 frames: benchmarks/nano_scail2/README.md
    "nano-scail2": Preset(
        NANO_SCAIL2, _nano_scail2,
        replace(
            RECIPES["scail2"]["official"], sampler="euler", steps=8, cfg=1.0, shift=3.0,
            window_frames=17, overlap_frames=8,
        ),
        (160, 96),
        "DEMO WEIGHTS: a nano SCAIL-2 that knows nothing but drawn dancers",
    ),
}  # fmt: skip
SHIPPED = PRESETS["nano"]  # what runs where nothing else is named


def preset_of(config: ModelConfig) -> Preset | None:
    """The demo model of this shape; no trained model is so small."""
    return next((preset for preset in PRESETS.values() if preset.config == config), None)
