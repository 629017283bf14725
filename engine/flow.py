"""The values that pass between the stages of one job, with their shapes and units."""

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypeAlias, TypeVar

if TYPE_CHECKING:  # whoever reads settings alone does not wait for PyTorch
    import torch
    from torch import Tensor

Motion = Literal["video", "pose", "joints"]  # a dance, a rendered skeleton video, SMPL joints
Align = Literal["exact", "official"]  # the best fit, or what the official program's solver finds
KindName = Literal["preview", "scail2"]  # rows of `config.KINDS`
LoraRole = Literal["distill", "dpo", "relight", "other"]  # what a merged LoRA is for
Mode = Literal["animation", "replacement"]  # the picture dances, or it takes the dancer's place
SegmentPlan = Literal["even", "cover", "official", "sat", "windows"]  # the first is usual
Drift = Literal["first", "previous", "none"]  # what colours of later segments are brought back to
# What became of a region of a segment (docs/reference/masks.md 5.4).
DriftOutcome = Literal[
    "anchor", "corrected", "steady", "share", "cut", "small", "new", "absent", "off"
]
RecipeName = Literal["production", "official", "turbo", "fast8"]  # rows of `recipes.RECIPES`
Framing = Literal["auto", "as-is", "driving"]  # who is brought to whose place and size
Fit = Literal["crop", "resize"]  # the picture fills the size asked for, or the clip has its shape

Check: TypeAlias = Callable[[], None]  # asked in every long loop; what it raises ends the job


def go_on() -> None:
    """Lets a job go on: a `Check` for work that nobody calls off."""


@dataclass(frozen=True, slots=True)
class Recipe:
    """A way to denoise a clip: solver, guidance, windows, and when the skeleton is seen."""

    sampler: str
    steps: int
    cfg: float
    shift: float
    pose_from: float = 0.0  # share of the steps before the first that sees the skeleton
    pose_until: float = 1.0  # share of the steps before the first that no longer sees it
    pose_strength: float = 1.0  # multiplies the tokens of the skeleton
    window_frames: int = 81  # pixel frames denoised at once; longer clips run in windows
    overlap_frames: int = 20  # pixel frames that neighbouring windows share
    half_render: bool = False  # skeletons are drawn at half size, not drawn in full and averaged
    cuts_reference: bool = False  # in replacement the picture is black where its mask is


@dataclass(frozen=True, slots=True)
class Settings:
    """The settings of a clip, whatever its picture and its motion are.

    A new setting takes edits in four places: its field here, its check in
    `recipes.check_settings`, its JSON field in `jobs/body.py`, its option in `cli/generate.py`. The
    names of fields and options are equal, so that one loop hands all of them on.
    """

    recipe: Recipe
    prompt: str = ""
    negative_prompt: str = ""
    seed: int = 0
    width: int | None = None  # None: the trained size, turned as the picture is
    height: int | None = None
    fit: Fit = "crop"
    fps: float | None = None  # None: that of the motion
    frames: int | None = None  # None: all of the motion
    audio: bool = True  # carry the sound of the motion into the clip
    persons: int = 1  # how many dancers of a video are followed
    align: Align = "exact"
    mode: Mode | None = None  # None: of a model that takes no masks, and sees a skeleton
    segments: SegmentPlan = "windows"  # how a long clip is cut
    framing: Framing = "auto"  # in replacement the picture is placed; else it is measured
    who: tuple[int, ...] = ()  # persons of the driving mask who are person 1, 2, ..; (): as it says
    strict: bool = False  # a warning about the media is an error
    drift: Drift = "first"  # of a clip with masks and several segments
    keep_settings: bool = False  # the clip tells how it was made, in the comment of its file


Changed = TypeVar("Changed", Recipe, Settings)


def override(record: Changed, source: object) -> Changed:
    """Copies `record`, with the values that `source` has under the names of its fields.

    A value that is None or is not there leaves that of `record`.
    """
    names = [field.name for field in dataclasses.fields(record)]
    said = {name: value for name in names if (value := getattr(source, name, None)) is not None}
    return dataclasses.replace(record, **said)


@dataclass(frozen=True, slots=True)
class Reference:
    """A further picture of a character or its surroundings."""

    image: Path
    mask: Path | None = None  # None: its alpha, or all of it


@dataclass(frozen=True, slots=True)
class Request:
    """One job for the pipeline. Its settings were checked by `recipes.check_settings`."""

    image: Path
    motion: Path
    kind: Motion
    settings: Settings
    mask: Path | None = None  # who is who in the motion
    reference_mask: Path | None = None  # who is who in the picture
    references: tuple[Reference, ...] = ()
    preview: Path | None = None  # a PNG that is written anew at every step


@dataclass(frozen=True, slots=True)
class Sound:
    """A track of sound that can be read, and the moment of it at which the clip begins."""

    path: Path
    track: str  # as ffmpeg's `-map` takes it
    begins_s: Fraction


@dataclass(frozen=True, slots=True)
class RoleFrames:
    """Who is who in the media of a job, as colours at the size of the result."""

    mode: Mode
    reference: "Tensor"  # [3, H, W] fp32, about -1..1, of the picture
    driving: "Tensor"  # [T, H, W, 3] u8, of the motion
    further: "tuple[tuple[Tensor, Tensor], ...]" = ()  # pictures and their masks, [3, H, W] fp32


@dataclass(frozen=True, slots=True)
class Warned:
    """Something that a person should look at before a clip is rendered."""

    kind: str  # a stable word for programs, such as `swap` or `cut`
    said: str  # a sentence with the figure and the cure
    frame: int | None = None  # of the clip, from 0; None: of no single frame


@dataclass(frozen=True, slots=True)
class Standing:
    """Where a person of the picture stands in the clip, beside who is driven by, in its pixels."""

    person: str  # the colour
    frame: int  # of the motion, where the other was measured
    scale: float  # of the picture's own pixels
    left: float  # of the picture's left edge, and
    top: float  # of its upper one: a pixel x of the picture is at scale * x + left
    height: float  # of the person
    foot_line: float  # y below the lowest pixel of the person
    motion_height: float  # of the person in the motion
    motion_foot_line: float
    cropped: float  # share of the person that lies outside of the clip


@dataclass(frozen=True, slots=True)
class Source:
    """The media of a job at the size of the result."""

    image: "Tensor"  # [3, H, W] fp32, about -1..1
    skeleton: "Tensor"  # [T, H, W, 3] u8, or drawn at half that size, or the dance itself
    fps: float
    audio: Sound | None  # goes with the clip
    notes: tuple[str, ...] = ()  # what of the media could not be had
    roles: RoleFrames | None = None  # None: of a model that takes no masks
    placed: "Tensor | None" = None  # [3, H, W] the picture as the VAE sees it; None: as it is
    standing: tuple[Standing, ...] = ()
    warned: tuple[Warned, ...] = ()  # all of them are told by `notes` too


@dataclass(frozen=True, slots=True)
class Roles:
    """Who is who in a clip, for a model that takes masks, and the pictures beside the first one."""

    mode: Mode
    reference: "Tensor"  # [28, 1, h, w] of the picture
    driving: "Tensor"  # [28, t, h/2, w/2] of the motion
    additional: "Tensor"  # [16, A, h, w] latents of the further pictures; A may be 0
    additional_masks: "Tensor"  # [28, A, h, w]

    @property
    def count(self) -> int:  # A
        return self.additional.shape[1]

    def at(self, frames: Sequence[int]) -> "Roles":
        """The roles in some latent frames of the clip."""
        return dataclasses.replace(self, driving=self.driving[:, list(frames)])

    def to(self, device: "torch.device") -> "Roles":
        moved = {
            name: getattr(self, name).to(device)
            for name in ("reference", "driving", "additional", "additional_masks")
        }
        return dataclasses.replace(self, **moved)


@dataclass(frozen=True, slots=True)
class Conditions:
    """All that the transformer is told about the clip, the same at every step."""

    text: "Tensor"  # [L, text_dim]
    negative: "Tensor | None"  # [L, text_dim]; None: no guidance
    vision: "Tensor"  # [257, clip_dim]
    reference: "Tensor"  # [16, 1, h, w] latent of the picture
    pose: "Tensor"  # [16, t, h/2, w/2] latent of the half-size skeleton, or of the dance itself
    roles: Roles | None = None  # None: the model takes no masks
    history: "Tensor | None" = None  # [16, n, h, w] of a clip that goes on: its first n frames


@dataclass(frozen=True, slots=True)
class RegionDrift:
    """How far the colours of a region of a segment are from where they began."""

    region: str  # "background", "person 1", ..
    against: Literal["first segment", "driving video"]
    outcome: DriftOutcome
    delta_e: float | None  # as it came; None: there is nothing to compare
    chroma: float | None  # ratio; None: what it is compared with is grey, or is not there
    delta_e_after: float | None  # as it is in the clip
    chroma_after: float | None


@dataclass(frozen=True, slots=True)
class SegmentDrift:
    """The drift of one segment of a long clip."""

    segment: int  # 1 is the first
    frames: tuple[int, int]  # of the clip: its first one, and the one after its last
    regions: tuple[RegionDrift, ...]


@dataclass(frozen=True, slots=True)
class Clip:
    """The finished video and what it took."""

    path: Path
    width: int
    height: int
    frames: int
    fps: float
    seed: int
    timings_ms: dict[str, float]
    notes: tuple[str, ...] = ()  # what went otherwise than planned
    drift: tuple[SegmentDrift, ...] = ()  # of a clip with masks and several segments
