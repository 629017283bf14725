"""A job as the platform hands it over, checked: the one place that reads what clients want.

Where several fields name one medium, an address comes before a path, a path before base64, and
those of nested objects come last. A field beats the workflow that comes with it, a workflow the
defaults of the endpoint. What was ignored or understood otherwise is told in `Job.warnings`.
"""

import dataclasses
import math
import re
import secrets
from pathlib import Path
from typing import get_args

from engine.config import LIMITS, SIZE_MULTIPLE, TRAINED_SIZE, Defaults
from engine.errors import BadRequest
from engine.flow import Motion, Request
from engine.jobs.body import Fields, read_body
from engine.jobs.fields import is_blank, parse_json, shown
from engine.jobs.job import Draft, Given, Job, MediumKind
from engine.jobs.workflow import read_workflow
from engine.recipes import (
    NEGATIVE_PROMPT,
    PROMPT,
    RECIPES,
    SEED,
    attention_of,
    check_range,
    check_request,
)

_MAX_DEADLINE_S = 7 * 24 * 3600  # the platform's own
_RANDOM_BITS = 53  # a drawn seed is told to clients, whose JSON may know no longer numbers
_WORKFLOW_NAME = re.compile(r"[\w-]{1,64}", re.ASCII)


# What the endpoints in production do where nothing is said (docs/reference/runpod.md A.2), and the
# recipe of the released script, whose sizes and rate are those of training and of the motion.
_SAID_NOWHERE = {
    "production": Draft(
        RECIPES["production"],
        prompt=PROMPT,
        negative_prompt=NEGATIVE_PROMPT,
        seed=SEED,
        width=416,
        height=672,
        fps=24.0,
    ),
    "official": Draft(RECIPES["official"], prompt=PROMPT, negative_prompt="", seed=SEED),
}


def parse_job(given: object, defaults: Defaults) -> Job:
    """The job in `{"input": {...}, "s3Config": {...}}`; the input may be a JSON string of its own.

    Raises `BadRequest` for what is no job, or one that no clip can be made of.
    """
    fields, bucket, of_body = read_body(given)
    draft = _draft(fields, defaults)
    action = fields.action or "generate"
    image, of_image = _image(fields, draft)
    motion, kind, of_motion = _motion(fields, draft, defaults)
    if action != "health":
        _check_media(image, motion or defaults.video)
    attention, of_attention = attention_of(draft.attention or "sageattn")
    draft, of_caps = _capped(draft, defaults)
    job = Job(
        action=action,
        image=image,
        motion=motion,
        kind=kind,
        recipe=draft.recipe,
        attention=attention,
        prompt=draft.prompt or "",
        negative_prompt=draft.negative_prompt or "",
        seed=_seed(draft),
        width=draft.width,
        height=draft.height,
        fps=draft.fps,
        frames=draft.frames,
        max_seconds=_deadline(fields),
        audio=draft.audio is not False,
        fit=draft.fit or defaults.fit,
        persons=1 if fields.persons is None else fields.persons,
        align=fields.align or "exact",
        delivery=fields.output or "base64",
        bucket=bucket,
        warnings=(*of_body, *of_image, *of_motion, *of_attention, *of_caps, *draft.warnings),
    )
    check_request(make_request(job, Path(), Path()))
    return job


def make_request(job: Job, image: Path, motion: Path) -> Request:
    """What the pipeline is asked for, once the media of a job are files."""
    return Request(
        image=image,
        motion=motion,
        kind=job.kind,
        recipe=job.recipe,
        prompt=job.prompt,
        negative_prompt=job.negative_prompt,
        seed=job.seed,
        width=job.width,
        height=job.height,
        fit=job.fit,
        fps=job.fps,
        frames=job.frames,
        audio=job.audio,
        persons=job.persons,
        align=job.align,
    )


def _deadline(fields: Fields) -> float | None:
    if fields.max_seconds is not None:
        check_range("max_seconds", fields.max_seconds, 1, _MAX_DEADLINE_S)
    return fields.max_seconds


def _seed(draft: Draft) -> int:
    """-1 is a seed of its own for each job, as an endpoint in use has it."""
    if draft.seed is None or draft.seed == -1:
        return secrets.randbits(_RANDOM_BITS)
    return draft.seed


def _draft(fields: Fields, defaults: Defaults) -> Draft:
    """What the fields say, else the workflow, else the endpoint."""
    workflow = _workflow(fields.workflow, defaults)
    if workflow is not None and fields.recipe is not None:
        raise BadRequest("Give recipe or workflow, not both: a workflow is a recipe.")
    recipe = "production" if workflow is not None else fields.recipe or defaults.recipe
    endpoint = _SAID_NOWHERE[recipe]
    base = workflow or endpoint
    changes = {
        "sampler": fields.sampler,
        "steps": fields.steps,
        "cfg": fields.cfg,
        "shift": fields.shift,
        "window_frames": fields.context_frames,
        "overlap_frames": fields.context_overlap,
    }
    known = {name: value for name, value in changes.items() if value is not None}
    said = Draft(
        dataclasses.replace(base.recipe, **known),
        attention=fields.attention_mode,
        prompt=fields.prompt,
        negative_prompt=fields.negative_prompt,
        seed=fields.seed,
        width=fields.width,
        height=fields.height,
        fps=fields.fps,
        frames=_frames(fields),
        audio=fields.audio,
        fit=fields.fit,
        warnings=(*_speed(fields), *base.warnings),
    )
    if fields.frame_load_cap == 0:  # all, whatever the workflow says
        base = dataclasses.replace(base, frames=None)
    return _over(_over(said, base), endpoint)


def _over(said: Draft, below: Draft) -> Draft:
    names = [field.name for field in dataclasses.fields(Draft)]
    left = {name: getattr(below, name) for name in names if getattr(said, name) is None}
    return dataclasses.replace(said, **left)


def _frames(fields: Fields) -> int | None:
    """The lowest of the limits in use; a cap of 0 is none."""
    limits = (fields.frames, fields.num_frames, fields.frame_load_cap or None)
    return min((limit for limit in limits if limit is not None), default=None)


def _speed(fields: Fields) -> list[str]:
    if fields.select_every_nth in (None, 1):
        return []
    return [
        f"select_every_nth is {fields.select_every_nth}, done as 1: the motion keeps its speed at "
        "any fps."
    ]


def _workflow(given: object, defaults: Defaults) -> Draft | None:
    """An object of nodes, as such or as JSON, or the name of a file of ours."""
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


def _image(fields: Fields, draft: Draft) -> tuple[Given | None, list[str]]:
    nested = None if fields.images is None else fields.images.reference_image
    found, ignored = _medium(fields, "image", "images.reference_image", nested)
    if found is None and draft.image is not None:
        found = Given("workflow.image", "path", draft.image)
    return found, ignored


def _motion(
    fields: Fields, draft: Draft, defaults: Defaults
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
    if draft.video is not None and not _is_default(draft.video, defaults):
        return Given("workflow.video", "path", draft.video), "video", []
    return None, "video", []


def _is_default(name: str, defaults: Defaults) -> bool:
    """Workflows name the dance that their endpoint has, which is not in an input folder."""
    return defaults.video is not None and name.rpartition("/")[2] == defaults.video.name


def _medium(
    fields: Fields, name: str, nested_name: str = "", nested: str | None = None
) -> tuple[Given | None, list[str]]:
    """The first of the fields for a medium, and what is said of the others."""
    kinds: tuple[MediumKind, ...] = get_args(MediumKind)
    given: list[Given] = []
    for kind in kinds:
        value = getattr(fields, f"{name}_{kind}")
        if value is not None:
            given.append(Given(f"{name}_{kind}", kind, value))
    if nested is not None:
        given.append(Given(nested_name, "url", nested))
    if not given:
        return None, []
    others = ", ".join(other.field for other in given[1:])
    return given[0], [f"{others}: ignored for {given[0].field}."] if others else []


def _check_media(image: Given | None, motion: object) -> None:
    if image is None:
        raise BadRequest("No picture is given; send image_url, image_path or image_base64.")
    if motion is None:
        raise BadRequest(
            "No motion is given and this endpoint has none of its own; send video_url, video_path "
            "or video_base64."
        )


def _capped(draft: Draft, defaults: Defaults) -> tuple[Draft, list[str]]:
    """Sizes as the network can have them, no larger than the endpoint makes them."""
    said: list[str] = []
    width, height, frames = draft.width, draft.height, draft.frames
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
    return dataclasses.replace(draft, width=width, height=height, frames=frames), said


def _floored(side: float) -> int:
    return max(LIMITS.min_side, int(side) // SIZE_MULTIPLE * SIZE_MULTIPLE)


def _shrunk(width: int, height: int, most: int) -> tuple[int, int]:
    """The same shape with at most so many pixels, as far as multiples allow."""
    if width * height <= most:
        return width, height
    ratio = math.sqrt(most / (width * height))
    height = _floored(height * ratio)
    return _floored(min(width * ratio, most / height)), min(
        height, _floored(most / LIMITS.min_side)
    )
