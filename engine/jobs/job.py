"""A job of the worker: what a client asked for, checked and typed, before anything is fetched."""

import dataclasses
from dataclasses import dataclass
from typing import Literal, TypeAlias

from engine.flow import Fit, Mode, Motion, Recipe, RecipeName, Settings

Action: TypeAlias = Literal["generate", "health", "masks", "validate"]
MediumKind: TypeAlias = Literal["url", "path", "base64"]  # of several the earliest counts
Delivery: TypeAlias = Literal["base64", "url"]


@dataclass(frozen=True, slots=True)
class Given:
    """A medium as it was named. `value` is never logged: it may be signed, or megabytes long."""

    field: str  # its name in the request, for messages: "image_url"
    kind: MediumKind
    value: str = dataclasses.field(repr=False)


@dataclass(frozen=True, slots=True)
class Bucket:
    """The S3 bucket into which a job wants its result. It is never logged."""

    endpoint_url: str = dataclasses.field(repr=False)
    access_key: str = dataclasses.field(repr=False)
    secret_key: str = dataclasses.field(repr=False)
    bucket_name: str | None = None
    is_operators: bool = False  # the endpoint's own, which may be inside the worker's network


@dataclass(frozen=True, slots=True)
class GivenReference:
    """A picture beside the first one as it was named."""

    image: Given
    mask: Given | None = None


@dataclass(frozen=True, slots=True)
class Cast:
    """Who is who, as it was named: masks in colours, and the pictures beside the first one."""

    mask: Given | None = None  # of the motion
    reference_mask: Given | None = None  # of the picture
    references: tuple[GivenReference, ...] = ()


@dataclass(frozen=True, slots=True)
class Draft:
    """The media and the settings that a workflow names; settings are called as in `Settings`.

    None leaves a value to the endpoint.
    """

    like: RecipeName  # the row whose settings stand where the workflow says nothing
    recipe: Recipe
    image: str | None = None  # names in ComfyUI's input folder
    video: str | None = None
    attention: str | None = None  # as requests call it: "sageattn"
    prompt: str | None = None
    negative_prompt: str | None = None
    seed: int | None = None
    width: int | None = None
    height: int | None = None
    fps: float | None = None
    frames: int | None = None
    audio: bool | None = None
    fit: Fit | None = None
    mode: Mode | None = None
    mask: str | None = None
    reference_mask: str | None = None
    references: tuple[tuple[str, str | None], ...] = ()  # further pictures, each with its mask
    makes_masks: bool = False  # a node of it does
    mask_persons: int | None = None  # whom those masks tell apart; None: as many as the picture has
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Job:
    """A job whose settings were checked together and whose media are still to be fetched."""

    action: Action
    image: Given | None  # None only for the action "health"
    motion: Given | None  # None: the endpoint's default video is used
    kind: Motion
    settings: Settings
    attention: str | None  # None: the worker's own
    max_seconds: float | None  # of work, from the start of the job
    delivery: Delivery
    bucket: Bucket | None = None
    cast: Cast = Cast()
    returns_masks: bool = False  # for reuse, beside the clip
    wants_masks: bool = False  # to be made where none come
    persons: int | None = None  # to be told apart in masks; None: as many as the picture has
    warnings: tuple[str, ...] = ()  # what was ignored or understood otherwise
