"""The model as trained, the limits of the service, and the settings read from the environment."""

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar, get_args

from engine.errors import BadRequest, Unavailable
from engine.flow import Fit, KindName, Mode, RecipeName, SegmentPlan

Word = TypeVar("Word", bound=str)

HEAD_SIZE = 128  # K, in every SCAIL model
LATENT_CHANNELS = 16
MASK_CHANNELS = 4  # of a latent frame: is it known, for each of its four pixel frames
ROLE_CHANNELS = 28  # of a colour mask: seven classes for each of four pixel frames
VAE_STRIDE = (4, 8, 8)  # pixel frames, rows, columns per latent cell
SIZE_MULTIPLE = 32  # the pose clip is encoded at half size: 2 * VAE stride * patch
TEXT_TOKENS = 512  # L: the network always sees this many, padding included
TRAINED_FRAMES = 81  # the longest clip the model was trained on: 21 latent frames
TRAINED_SIZE = (512, 896)  # short and long side in training


@dataclass(frozen=True, slots=True)
class ModelKind:
    """A model of the family: what it is called and what it is told. A row of `KINDS`."""

    name: KindName  # also the folder of its packages
    title: str
    mask_dim: int  # channels of the masks that say who is who; 0: it takes none
    modes: tuple[Mode, ...]  # the first is usual; none: it sees a skeleton, and no masks
    segments: tuple[SegmentPlan, ...]  # cuts of a long clip that it was trained for, or bears


KINDS: Mapping[KindName, ModelKind] = {
    "preview": ModelKind("preview", "SCAIL-Preview", 0, modes=(), segments=("windows",)),
    "scail2": ModelKind(
        "scail2",
        "SCAIL-2",
        ROLE_CHANNELS,
        modes=("animation", "replacement"),
        segments=("even", "cover", "official", "sat", "windows"),
    ),
}


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """SCAIL-Preview 14B as trained. Facts, not settings: another value means another checkpoint."""

    layers: int = 40
    dim: int = 5120  # D
    ffn: int = 13824
    text_dim: int = 4096  # width of the text encoder
    clip_dim: int = 1280  # width of the image encoder
    mask_dim: int = 0  # channels of the masks that say who is who: that of a row of `KINDS`

    @property
    def heads(self) -> int:  # N
        return self.dim // HEAD_SIZE

    @property
    def kind(self) -> ModelKind:
        return next(kind for kind in KINDS.values() if kind.mask_dim == self.mask_dim)


SCAIL_14B = ModelConfig()
SCAIL_1_3B = ModelConfig(layers=30, dim=1536, ffn=8960)
SCAIL2_14B = replace(SCAIL_14B, mask_dim=ROLE_CHANNELS)
TINY = ModelConfig(layers=2, dim=256, ffn=512, text_dim=64, clip_dim=160)  # same code, fits a CPU
NANO = ModelConfig(layers=6, dim=256, ffn=512, text_dim=64, clip_dim=160)  # the trained demo
TINY_SCAIL2 = replace(TINY, mask_dim=ROLE_CHANNELS)
NANO_SCAIL2 = replace(NANO, mask_dim=ROLE_CHANNELS)


@dataclass(frozen=True, slots=True)
class Limits:
    """The most that one job may ask for. A request beyond it is a mistake and not a clip."""

    min_side: int = 64
    max_side: int = 1280
    max_frames: int = 2000
    max_steps: int = 100
    max_cfg: float = 20.0
    max_shift: float = 100.0
    max_pose_strength: float = 10.0
    max_fps: float = 120.0
    max_persons: int = 8
    max_identities: int = 6  # persons whom the colours of a mask can tell apart
    max_references: int = 4  # pictures beside the first one
    max_prompt_chars: int = 4096
    max_image_bytes: int = 50 * 2**20
    max_image_pixels: int = 40_000_000
    max_video_bytes: int = 500 * 2**20
    max_video_side: int = 4096


LIMITS = Limits()


@dataclass(frozen=True, slots=True)
class Defaults:
    """The choices of one endpoint where a request makes none, and the sizes it never exceeds."""

    recipe: RecipeName | None = None  # None: the first of the model that is served
    fit: Fit = "crop"
    video: Path | None = None  # the dance of requests without one
    max_pixels: int | None = None  # in a frame; larger frames are shrunk
    max_frames: int | None = None
    workflows: Path = Path(__file__).resolve().parents[1] / "workflows"  # called by their names


def defaults() -> Defaults:
    """Reads `RECIPE`, `FIT`, `DEFAULT_VIDEO`, `MAX_PIXELS` (96x160) and `MAX_FRAMES`.

    Raises `BadRequest` for a value that is none, `Unavailable` for a video that is not there.
    """
    video = Path(given) if (given := os.environ.get("DEFAULT_VIDEO")) else None
    if video is not None and not video.is_file():
        raise Unavailable(f"DEFAULT_VIDEO is {video}, where there is no file.")
    return Defaults(
        recipe=_word("RECIPE", get_args(RecipeName)),
        fit=_word("FIT", get_args(Fit)) or "crop",
        video=video,
        max_pixels=_cap("MAX_PIXELS", LIMITS.min_side**2),
        max_frames=_cap("MAX_FRAMES", 1),
    )


def _word(variable: str, words: tuple[Word, ...]) -> Word | None:
    """Returns the one of `words` that the variable names; None if it is not set."""
    given = os.environ.get(variable)
    if not given:
        return None
    for word in words:
        if given == word:
            return word
    raise BadRequest(f"{variable} is {given!r}; {' or '.join(words)} is expected.")


def _cap(variable: str, least: int) -> int | None:
    """Reads a whole number, or a product such as 96x160; None if the variable is not set."""
    given = os.environ.get(variable)
    if not given:
        return None
    factors = given.split("x")
    if all(factor.isascii() and factor.isdigit() and len(factor) < 10 for factor in factors):
        cap = math.prod(map(int, factors))
        if cap >= least:
            return cap
    raise BadRequest(f"{variable} is {given!r}; a whole number from {least} up is expected.")


def state_dir() -> Path:
    """Returns the folder for what the engine can compute again (`SCAIL_STATE`)."""
    if given := os.environ.get("SCAIL_STATE"):
        return Path(given)
    try:
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    except RuntimeError as error:  # a user without a home, as in many containers
        raise Unavailable("There is no home directory; set SCAIL_STATE to a folder.") from error
    return cache / "scail-engine"


def expandable_segments() -> bool:
    """Tells if PyTorch's allocator was told to let its segments grow (docs/reference/performance.md
    E): releases differ in which of the two variables they obey, so all that are set must say so.
    """
    names = "PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"
    told = [_option(given, "expandable_segments") for name in names if (given := os.getenv(name))]
    return bool(told) and all(value == "True" for value in told)


def _option(given: str, name: str) -> str:
    """Finds an option in `a:1,b:2`; the last one counts. Empty if it is not there."""
    pairs = (part.partition(":") for part in given.split(","))
    return ([""] + [value.strip() for key, _, value in pairs if key.strip() == name])[-1]


def models_dir() -> Path:
    """Returns the folder of the models beside the transformer (`SCAIL_MODELS`)."""
    return Path(os.environ.get("SCAIL_MODELS") or "/runpod-volume/models")
