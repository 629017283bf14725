"""Parses and checks a job as the platform hands it over. Nothing else reads what clients want.

Where several fields name one medium, an address comes before a path, a path before base64, and
those of nested objects come last; what it is, its text says itself (`medium`). A field beats the
workflow that comes with it, a workflow the defaults of the endpoint. What was ignored or
understood otherwise is told in `Job.warnings`, whose number and length are bounded.
"""

import dataclasses
import re
import secrets

from engine.config import Defaults
from engine.errors import BadRequest
from engine.flow import Motion, Settings, override
from engine.jobs.body import Fields, read_body
from engine.jobs.cast import MASKS, read_cast
from engine.jobs.fields import is_blank, parse_json, shown
from engine.jobs.job import Bucket, Draft, Given, Job
from engine.jobs.medium import read_medium
from engine.jobs.pick import pick
from engine.jobs.served import (
    PREVIEW,
    Served,
    check_mode,
    check_recipe,
    mode_of,
    told_of_persons,
)
from engine.jobs.told import bounded, prompt_marks
from engine.jobs.usual import capped, usual_settings
from engine.jobs.workflow import read_workflow
from engine.recipes import RECIPES, attention_of, check_range, check_settings, same_row

_MAX_DEADLINE_S = 7 * 24 * 3600  # the platform's own
_DRAWN = -1  # stands for a seed of its own for each job, as an endpoint in use has it
_RANDOM_BITS = 53  # a drawn seed is told to clients, whose JSON may know no longer numbers
_WORKFLOW_NAME = re.compile(r"[\w-]{1,64}", re.ASCII)


def parse_job(given: object, defaults: Defaults, served: Served = PREVIEW) -> Job:
    """Parses `{"input": {...}, "s3Config": {...}}`, where the input may be a JSON string.

    `served` is what the worker's model can be asked for. Raises `BadRequest` for what is no job,
    for one of another model, and for one that no clip can be made of.
    """
    fields, bucket, of_body = read_body(given)
    if fields.action == "health":  # whatever the endpoint's own defaults are
        return _job_of(fields, bucket, of_body)
    workflow = _workflow(fields, defaults, served)
    cast, of_cast = read_cast(fields, workflow, served)
    settings, of_settings = _settings(fields, workflow, defaults, served)
    image, of_image = _image(fields, workflow)
    motion, kind, of_motion = _motion(fields, workflow, defaults)
    _check_media(image, motion or defaults.video)
    attention, of_attention = _attention(fields, workflow)
    settings, of_caps = capped(settings, defaults)
    deadline_s = _deadline(fields)
    check_settings(settings, served.kind.name)
    check_mode(settings.mode, kind, cast.mask, MASKS, served)
    if workflow is None:
        check_recipe(fields.recipe or defaults.recipe, served)
    elif (row := same_row(workflow.recipe, served.kind.name)) is not None:
        check_recipe(row, served)
    of_fields = (*of_body, *of_cast, *of_settings, *of_image, *of_motion, *of_attention, *of_caps)
    of_workflow = workflow.warnings if workflow else ()
    of_fields += told_of_persons(fields.persons, served)
    told = (*of_fields, *_speed(fields), *prompt_marks(settings), *of_workflow)
    return Job(
        action=fields.action or "generate",
        image=image,
        motion=motion,
        kind=kind,
        settings=settings,
        attention=attention,
        max_seconds=deadline_s,
        delivery=fields.output or "base64",
        bucket=bucket,
        cast=cast,
        returns_masks=fields.return_masks or False,
        wants_masks=settings.mode == "replacement" or bool(workflow and workflow.makes_masks),
        persons=_persons(fields, workflow),
        warnings=bounded(told),
    )


def _settings(
    fields: Fields, workflow: Draft | None, defaults: Defaults, served: Served
) -> tuple[Settings, list[str]]:
    """Takes each setting from the fields, else from the workflow, else from the endpoint."""
    if workflow is not None and fields.recipe is not None:
        raise BadRequest("Give recipe or workflow, not both: a workflow is a recipe.")
    name = workflow.like if workflow is not None else fields.recipe
    endpoint, said = usual_settings(name, defaults, served)
    base = override(endpoint, workflow)
    settings = override(base, fields)
    windows, of_windows = _windows(fields, settings)
    settings = dataclasses.replace(
        settings,
        recipe=dataclasses.replace(override(base.recipe, fields), **windows),
        mode=mode_of(settings.mode, served),
        frames=_frames(fields, workflow),
        seed=secrets.randbits(_RANDOM_BITS) if settings.seed == _DRAWN else settings.seed,
    )
    return settings, [*said, *of_windows]


def _windows(fields: Fields, settings: Settings) -> tuple[dict[str, int], list[str]]:
    """Reads the windows of a long clip, where it is made in windows and not in segments."""
    named = {
        "window_frames": ("context_frames", fields.context_frames),
        "overlap_frames": ("context_overlap", fields.context_overlap),
    }
    said = {name: frames for name, (_, frames) in named.items() if frames is not None}
    if not said or settings.segments == "windows":
        return said, []
    fields_said = " and ".join(field for field, frames in named.values() if frames is not None)
    return {}, [
        f'{fields_said}: ignored. Long clips are made in segments here; "segments": "windows" '
        "makes them in windows."
    ]


def _job_of(fields: Fields, bucket: Bucket | None, warnings: list[str]) -> Job:
    """Makes the job of a question, for which there is nothing to fetch and to render."""
    return Job(
        action=fields.action or "generate",
        image=None,
        motion=None,
        kind="video",
        settings=Settings(next(iter(RECIPES["preview"].values()))),
        attention=None,
        max_seconds=None,
        delivery=fields.output or "base64",
        bucket=bucket,
        warnings=bounded(warnings),
    )


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


def _persons(fields: Fields, workflow: Draft | None) -> int | None:
    """Returns how many persons masks shall tell apart, as the fields or else the workflow say."""
    if fields.persons is not None or workflow is None:
        return fields.persons
    return workflow.mask_persons


def _speed(fields: Fields) -> list[str]:
    if fields.select_every_nth in (None, 1):
        return []
    return [
        f"select_every_nth is {fields.select_every_nth}, done as 1: the motion keeps its speed at "
        "any fps."
    ]


def _workflow(fields: Fields, defaults: Defaults, served: Served) -> Draft | None:
    """Reads an object of nodes, as such or as JSON, or the file of ours that is named."""
    given = fields.workflow
    if is_blank(given):
        return None
    if not isinstance(given, str):
        return read_workflow(given, served)
    if given.lstrip().startswith("{"):
        return read_workflow(parse_json(given, "workflow"), served)
    path = defaults.workflows / f"{given}.json"
    if not _WORKFLOW_NAME.fullmatch(given) or not path.is_file():
        names = ", ".join(sorted(path.stem for path in defaults.workflows.glob("*.json")))
        raise BadRequest(
            f"There is no workflow called {shown(given)} here, only {names or 'none'}."
        )
    return read_workflow(parse_json(path.read_text(encoding="utf-8"), "workflow"), served)


def _image(fields: Fields, workflow: Draft | None) -> tuple[Given | None, list[str]]:
    nested = None if fields.images is None else fields.images.reference_image
    found, ignored = pick(fields, "image", [("images.reference_image", nested)])
    if found is None and workflow is not None and workflow.image is not None:
        found = read_medium("workflow.image", "path", workflow.image)
    return found, ignored


def _motion(
    fields: Fields, workflow: Draft | None, defaults: Defaults
) -> tuple[Given | None, Motion, list[str]]:
    nested = None if fields.videos is None else fields.videos.dance_video
    video, ignored = pick(fields, "video", [("videos.dance_video", nested)])
    pose, of_pose = pick(fields, "pose_video")
    joints, of_joints = pick(fields, "joints")
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


def _check_media(image: Given | None, motion: object) -> None:
    if image is None:
        raise BadRequest("No picture is given; send image_url, image_path or image_base64.")
    if motion is None:
        raise BadRequest(
            "No motion is given and this endpoint has none of its own; send video_url, video_path "
            "or video_base64."
        )
