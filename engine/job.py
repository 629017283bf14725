"""A job of the worker: what a client asked for, checked and typed, before anything is fetched."""

from dataclasses import dataclass, field
from typing import Literal, TypeAlias

from engine.flow import Align, Motion, Recipe

Action: TypeAlias = Literal["generate", "health", "validate"]
Fit: TypeAlias = Literal["crop", "resize"]  # of a picture to the size of the clip
Delivery: TypeAlias = Literal["base64", "url"]


@dataclass(frozen=True, slots=True)
class Given:
    """A medium as it was named. `value` is not to be logged: it may be signed or megabytes long."""

    field: str  # of the request, for messages: "image_url"
    kind: Literal["url", "base64", "path"]
    value: str = field(repr=False)


@dataclass(frozen=True, slots=True)
class Bucket:
    """Where a job wants its result, in S3's terms. Never logged."""

    endpoint_url: str = field(repr=False)
    access_key: str = field(repr=False)
    secret_key: str = field(repr=False)
    bucket_name: str | None = None


@dataclass(frozen=True, slots=True)
class Job:
    action: Action
    image: Given | None  # None for an action that needs none
    motion: Given | None  # None: the endpoint's default video
    kind: Motion
    recipe: Recipe
    attention: str | None
    prompt: str
    negative_prompt: str
    seed: int
    width: int | None
    height: int | None
    fps: float | None
    frames: int | None  # at most so many of the motion
    max_seconds: float | None
    audio: bool
    fit: Fit
    persons: int
    align: Align
    delivery: Delivery
    bucket: Bucket | None = None
    warnings: tuple[str, ...] = ()  # what was ignored or understood otherwise
