"""Parses and checks a job as the platform hands it over. Nothing else reads what clients want.

Where several fields name one medium, an address comes before a path, a path before base64, and
those of nested objects come last; what it is, its text says itself (`medium`). A field beats the
workflow that comes with it, a workflow the defaults of the endpoint. What was ignored or
understood otherwise is told in `Job.warnings`, whose number and length are bounded.
"""

import dataclasses
import math
import re
import secrets
from typing import get_args

from engine.config import LIMITS, SIZE_MULTIPLE, TRAINED_SIZE, Defaults
from engine.errors import BadRequest
from engine.flow import Motion, Recipe, RecipeName, Settings, override
from engine.jobs.body import Fields, read_body
from engine.jobs.fields import is_blank, parse_json, shown
from engine.jobs.job import Draft, Given, Job, MediumKind
from engine.jobs.medium import read_medium
from engine.jobs.told import bounded, prompt_marks
from engine.jobs.workflow import read_workflow
from engine.recipes import (
    NEGATIVE_PROMPT,
    PROMPT,
    RECIPES,
    SEED,
    attention_of,
    check_range,
    check_settings,
)

_MAX_DEADLINE_S = 7 * 24 * 3600  # the platform's own
_DRAWN = -1  # stands for a seed of its own for each job, as an endpoint in use has it
_RANDOM_BITS = 53  # a drawn seed is told to clients, whose JSON may know no longer numbers
_WORKFLOW_NAME = re.compile(r"[\w-]{1,64}", re.ASCII)


# The settings where neither request nor workflow says anything: those of the endpoints in
# production (docs/reference/runpod.md A.2), or those of the released script, with the size of
# training and the rate of the motion.
_SAID_NOWHERE: dict[RecipeName, Settings] = {
    "production": Settings(
        RECIPES["production"],
        prompt=PROMPT,
        negative_prompt=NEGATIVE_PROMPT,
        seed=SEED,
        width=416,
        height=672,
        fps=24.0,
    ),
    "official": Settings(RECIPES["official"], prompt=PROMPT, negative_prompt="", seed=SEED),
}


def parse_job(given: object, defaults: Defaults) -> Job:
    """Parses `{"input": {...}, "s3Config": {...}}`, where the input may be a JSON string.

    Raises `BadRequest` for what is no job, and for a job that no clip can be made of.
    """
    fields, bucket, of_body = read_body(given)
    workflow = _workflow(fields, defaults)
    settings = _settings(fields, workflow, defaults)
    action = fields.action or "generate"
    image, of_image = _image(fields, workflow)
    motion, kind, of_motion = _motion(fields, workflow, defaults)
    if action != "health":
        _check_media(image, motion or defaults.video)
    attention, of_attention = _attention(fields, workflow)
    settings, of_caps = _capped(settings, defaults)
    deadline_s = _deadline(fields)
    check_settings(settings)
    of_fields = (*of_body, *of_image, *of_motion, *of_attention, *of_caps, *_speed(fields))
    of_workflow = workflow.warnings if workflow else ()
    return Job(
        action=action,
        image=image,
        motion=motion,
        kind=kind,
        settings=settings,
        attention=attention,
        max_seconds=deadline_s,
        delivery=fields.output or "base64",
        bucket=bucket,
        warnings=bounded((*of_fields, *prompt_marks(settings), *of_workflow)),
    )


def _settings(fields: Fields, workflow: Draft | None, defaults: Defaults) -> Settings:
    """Takes each setting from the fields, else from the workflow, else from the endpoint."""
    if workflow is not None and fields.recipe is not None:
        raise BadRequest("Give recipe or workflow, not both: a workflow is a recipe.")
    name = "production" if workflow is not None else fields.recipe or defaults.recipe
    endpoint = dataclasses.replace(_SAID_NOWHERE[name], fit=defaults.fit)
    base = override(endpoint, workflow)
    settings = override(base, fields)
    return dataclasses.replace(
        settings,
        recipe=_recipe(base.recipe, fields),
        frames=_frames(fields, workflow),
        seed=secrets.randbits(_RANDOM_BITS) if settings.seed == _DRAWN else settings.seed,
    )


def usual_sizes(defaults: Defaults) -> list[tuple[int, int]]:
    """Lists the sizes (height, width) of clips whose requests name none: one, or both ways that the
    size of training is turned.
    """
    usual, _ = _capped(_SAID_NOWHERE[defaults.recipe], defaults)
    if usual.width is None or usual.height is None:
        short, long = TRAINED_SIZE
        return [(long, short), (short, long)]
    return [(usual.height, usual.width)]


def _recipe(base: Recipe, fields: Fields) -> Recipe:
    """Changes a recipe as the fields say."""
    windows = {"window_frames": fields.context_frames, "overlap_frames": fields.context_overlap}
    said = {name: frames for name, frames in windows.items() if frames is not None}
    return dataclasses.replace(override(base, fields), **said)


def _attention(fields: Fields, workflow: Draft | None) -> tuple[str | None, tuple[str, ...]]:
    """Finds the attention that a job asks for, as `attention_of` does."""
    of_workflow = None if workflow is None else workflow.attention
    return attention_of(fields.attention_mode or of_workflow or "sageattn")


def _deadline(fields: Fields) -> float | None:
    if fields.max_seconds is not None:
        check_range("max_seconds", fields.max_seconds, 1, _MAX_DEADLINE_S)
    return fields.max_seconds


def _frames(fields: Fields, workflow: Draft | None) -> int | None:
    """Returns the lowest of the limits that the fields name, else that of the workflow.

    A cap of 0 stands for all frames, whatever the workflow says.
    """
    named = (fields.frames, fields.num_frames, fields.frame_load_cap or None)
    limits = [limit for limit in named if limit is not None]
    if limits:
        return min(limits)
    return None if workflow is None or fields.frame_load_cap == 0 else workflow.frames


def _speed(fields: Fields) -> list[str]:
    if fields.select_every_nth in (None, 1):
        return []
    return [
        f"select_every_nth is {fields.select_every_nth}, done as 1: the motion keeps its speed at "
        "any fps."
    ]


def _workflow(fields: Fields, defaults: Defaults) -> Draft | None:
    """Reads an object of nodes, as such or as JSON, or the file of ours that is named."""
    given = fields.workflow
    if is_blank(given):
        return None
    if not isinstance(given, str):
        return read_workflow(given)
    if given.lstrip().startswith("{"):
        return read_workflow(parse_json(given, "workflow"))
    path = defaults.workflows / f"{given}.json"
    if not _WORKFLOW_NAME.fullmatch(given) or not path.is_file():
        names = ", ".join(sorted(path.stem for path in defaults.workflows.glob("*.json")))
        raise BadRequest(
            f"There is no workflow called {shown(given)} here, only {names or 'none'}."
        )
    return read_workflow(parse_json(path.read_text(encoding="utf-8"), "workflow"))


def _image(fields: Fields, workflow: Draft | None) -> tuple[Given | None, list[str]]:
    nested = None if fields.images is None else fields.images.reference_image
    found, ignored = _medium(fields, "image", "images.reference_image", nested)
    if found is None and workflow is not None and workflow.image is not None:
        found = read_medium("workflow.image", "path", workflow.image)
    return found, ignored


def _motion(
    fields: Fields, workflow: Draft | None, defaults: Defaults
) -> tuple[Given | None, Motion, list[str]]:
    nested = None if fields.videos is None else fields.videos.dance_video
    video, ignored = _medium(fields, "video", "videos.dance_video", nested)
    pose, of_pose = _medium(fields, "pose_video")
    joints, of_joints = _medium(fields, "joints")
    media: list[tuple[Motion, Given | None]] = [
        ("video", video),
        ("pose", pose),
        ("joints", joints),
    ]
    given: list[tuple[Motion, Given]] = [
        (kind, found) for kind, found in media if found is not None
    ]
    if len(given) > 1:
        names = " and ".join(found.field for _, found in given)
        raise BadRequest(f"{names} are both given; a clip has one motion.")
    for kind, found in given:
        return found, kind, [*ignored, *of_pose, *of_joints]
    if workflow is not None and workflow.video is not None:
        named = read_medium("workflow.video", "path", workflow.video)
        if not _is_default(named.value, defaults):
            return named, "video", []
    return None, "video", []


def _is_default(name: str, defaults: Defaults) -> bool:
    """Tells whether a workflow names the endpoint's own dance, which is in no input folder."""
    return defaults.video is not None and name.rpartition("/")[2] == defaults.video.name


def _medium(
    fields: Fields, name: str, nested_name: str = "", nested: str | None = None
) -> tuple[Given | None, list[str]]:
    """Picks the first of the fields for a medium, and names the others as ignored."""
    kinds: tuple[MediumKind, ...] = get_args(MediumKind)
    given: list[tuple[str, MediumKind, str]] = []
    for kind in kinds:
        value = getattr(fields, f"{name}_{kind}")
        if value is not None:
            given.append((f"{name}_{kind}", kind, value))
    if nested is not None:
        given.append((nested_name, "url", nested))
    if not given:
        return None, []
    first, *others = given
    ignored = ", ".join(field for field, _, _ in others)
    return read_medium(*first), [f"{ignored}: ignored for {first[0]}."] if others else []


def _check_media(image: Given | None, motion: object) -> None:
    if image is None:
        raise BadRequest("No picture is given; send image_url, image_path or image_base64.")
    if motion is None:
        raise BadRequest(
            "No motion is given and this endpoint has none of its own; send video_url, video_path "
            "or video_base64."
        )


def _capped(settings: Settings, defaults: Defaults) -> tuple[Settings, list[str]]:
    """Makes the size one that the network can have, and keeps to the caps of the endpoint.

    The sentences say what became another.
    """
    said: list[str] = []
    width, height, frames = settings.width, settings.height, settings.frames
    if width is None and height is None and defaults.max_pixels is not None:
        width, height = TRAINED_SIZE
    if width is not None and height is not None:
        asked = f"{width}x{height}"
        if all(LIMITS.min_side <= side <= LIMITS.max_side for side in (width, height)):
            width, height = _floored(width), _floored(height)
            if defaults.max_pixels is not None:
                width, height = _shrunk(width, height, defaults.max_pixels)
        if f"{width}x{height}" != asked:
            said.append(
                f"The size {asked} becomes {width}x{height}: sides are multiples of "
                f"{SIZE_MULTIPLE}, within the pixels that this endpoint makes."
            )
    most = defaults.max_frames
    if most is not None and (frames is None or frames > most):
        said.append(f"The clip has at most {most} frames on this endpoint.")
        frames = most
    return dataclasses.replace(settings, width=width, height=height, frames=frames), said


def _floored(side: float) -> int:
    return max(LIMITS.min_side, int(side) // SIZE_MULTIPLE * SIZE_MULTIPLE)


def _shrunk(width: int, height: int, most: int) -> tuple[int, int]:
    """Shrinks a size to at most `most` pixels; the shape stays, as far as multiples allow."""
    if width * height <= most:
        return width, height
    ratio = math.sqrt(most / (width * height))
    height = _floored(height * ratio)
    return _floored(min(width * ratio, most / height)), min(
        height, _floored(most / LIMITS.min_side)
    )
