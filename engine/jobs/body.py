"""The body of a job as clients write it: its fields, one by one, as typed values.

They are the union of what the endpoints in use take (docs/reference/runpod.md A.2). Numbers may be
strings, and the input may be a JSON string of its own. Null and the empty string are as good as a
field that is not there, but for prompts, which may be empty.
"""

from collections.abc import Callable
from typing import Annotated, Literal, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, ValidationError

from engine.errors import BadRequest
from engine.flow import Align, Drift, Fit, Framing, Mode, RecipeName, SegmentPlan
from engine.jobs.fields import (
    flag,
    glance,
    is_blank,
    listing,
    number,
    parse_json,
    shown,
    text,
    whole,
    word,
)
from engine.jobs.job import Action, Bucket, Delivery
from engine.masks.order import read_who

Value = TypeVar("Value")

_NAMED_KEYS = 10


def _or_nothing(read: Callable[[object], Value]) -> BeforeValidator:
    return BeforeValidator(lambda value: None if is_blank(value) else read(value))


def _or_empty(value: object) -> str | None:
    """Reads a prompt, which may be empty."""
    return None if value is None else text(value)


def _mode(value: object) -> str:
    """Reads a mode, also as the requests for Wan-Animate call it."""
    said = word(value)
    return {"animate": "animation", "replace": "replacement"}.get(said, said)


def _texts(value: object) -> tuple[str, ...] | None:
    return tuple(text(one) for one in listing(value)) or None


def _who(value: object) -> tuple[int, ...]:
    """Reads persons: a text such as "2,1", or a list of numbers or colours."""
    parts = [value] if isinstance(value, int) and not isinstance(value, bool) else listing(value)
    return read_who(",".join(str(part) for part in parts))


def _records(value: object) -> list[object] | None:
    """Reads a list of objects; a text alone is the address in one."""
    return [{"url": one} if isinstance(one, str) else one for one in listing(value)] or None


Whole = Annotated[int | None, _or_nothing(whole)]
Number = Annotated[float | None, _or_nothing(number)]
Flag = Annotated[bool | None, _or_nothing(flag)]
Text = Annotated[str | None, _or_nothing(text)]
Word = Annotated[str | None, _or_nothing(word)]
Texts = Annotated[tuple[str, ...] | None, _or_nothing(_texts)]
Prompt = Annotated[str | None, BeforeValidator(_or_empty)]
_ONE_OF = _or_nothing(word)


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, hide_input_in_errors=True)


class _Images(_Part):
    reference_image: Text = None


class _Videos(_Part):
    dance_video: Text = None


class ReferenceFields(_Part):
    """One of `references`: a picture beside the first one, and its mask."""

    url: Text = None
    path: Text = None
    base64: Text = None
    mask_url: Text = None
    mask_path: Text = None
    mask_base64: Text = None


class Fields(_Part):
    """The fields that are read. None stands for one that is not given."""

    action: Annotated[Action | None, _ONE_OF] = None
    workflow_type: Annotated[Literal["scail_dance"] | None, _ONE_OF] = None
    workflow: object = None
    image_url: Text = None
    image_path: Text = None
    image_base64: Text = None
    images: Annotated[_Images | None, _or_nothing(lambda value: value)] = None
    video_url: Text = None
    video_path: Text = None
    video_base64: Text = None
    videos: Annotated[_Videos | None, _or_nothing(lambda value: value)] = None
    pose_video_url: Text = None
    pose_video_path: Text = None
    pose_video_base64: Text = None
    joints_url: Text = None
    joints_path: Text = None
    joints_base64: Text = None
    mode: Annotated[Mode | None, _or_nothing(_mode)] = None
    mask_url: Text = None
    mask_path: Text = None
    mask_base64: Text = None
    reference_mask_url: Text = None
    reference_mask_path: Text = None
    reference_mask_base64: Text = None
    references: Annotated[tuple[ReferenceFields, ...] | None, _or_nothing(_records)] = None
    reference_url: Texts = None
    reference_path: Texts = None
    reference_base64: Texts = None
    segments: Annotated[SegmentPlan | None, _ONE_OF] = None
    framing: Annotated[Framing | None, _ONE_OF] = None
    who: Annotated[tuple[int, ...] | None, _or_nothing(_who)] = None
    strict: Flag = None
    return_masks: Flag = None
    drift: Annotated[Drift | None, _ONE_OF] = None
    prompt: Prompt = None
    negative_prompt: Prompt = None
    recipe: Annotated[RecipeName | None, _ONE_OF] = None
    sampler: Word = None
    steps: Whole = None
    cfg: Number = None
    shift: Number = None
    context_frames: Whole = None
    context_overlap: Whole = None
    attention_mode: Word = None
    seed: Whole = None
    width: Whole = None
    height: Whole = None
    fit: Annotated[Fit | None, _ONE_OF] = None
    fps: Number = None
    frames: Whole = None
    num_frames: Whole = None
    frame_load_cap: Whole = None
    select_every_nth: Whole = None
    audio: Flag = None
    keep_settings: Flag = None
    persons: Whole = None
    align: Annotated[Align | None, _ONE_OF] = None
    max_seconds: Number = None
    output: Annotated[Delivery | None, _ONE_OF] = None


def read_body(given: object) -> tuple[Fields, Bucket | None, list[str]]:
    """Reads fields and storage of `{"input": {...}, "s3Config": {...}}`, and names unknown fields.

    Raises `BadRequest` for what is no such body, and for a field of another kind than expected.
    """
    if not isinstance(given, dict) or "input" not in given:
        raise BadRequest('The job has no "input", an object with what is to be done.')
    body = given["input"]
    if isinstance(body, str):
        body = parse_json(body, "input")
    if not isinstance(body, dict):
        raise BadRequest(f"The input is {shown(body)}; an object is expected.")
    known = {name: body[name] for name in Fields.model_fields if name in body}
    ignored = [key for key in body if key not in known]
    for name, part in (("images", _Images), ("videos", _Videos)):
        if isinstance(held := known.get(name), dict):
            ignored += [f"{name}.{key}" for key in held if key not in part.model_fields]
    ignored += _unread(known.get("references"))
    return _read(known), _bucket(given.get("s3Config")), _told(ignored)


def _unread(references: object) -> list[str]:
    """Names what is not known in the first few of the further pictures."""
    records: list[object] = references if isinstance(references, list) else []
    return [
        f"references.{place}.{key}"
        for place, held in enumerate(records)
        if isinstance(held, dict) and place < _NAMED_KEYS
        for key in held
        if key not in ReferenceFields.model_fields
    ]


def _bucket(given: object) -> Bucket | None:
    """Reads s3Config, whose values are secrets and appear in no message."""
    if not given:
        return None
    config = given if isinstance(given, dict) else {}
    name = config.get("bucketName")
    needed = [config.get(key) for key in ("endpointUrl", "accessId", "accessSecret")]
    known = [value for value in needed if isinstance(value, str) and not is_blank(value)]
    if len(known) != len(needed) or not (is_blank(name) or isinstance(name, str)):
        raise BadRequest("s3Config needs endpointUrl, accessId and accessSecret, all of them text.")
    return Bucket(*known, bucket_name=None if is_blank(name) else str(name))


def _read(known: dict[str, object]) -> Fields:
    try:
        return Fields.model_validate(known)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        name = ".".join(map(str, first["loc"]))
        context = first.get("ctx", {})
        expected = context.get("error") or context.get("expected") or "an object"
        raise BadRequest(f"{name} is {shown(first['input'])}; {expected} is expected.") from error


def _told(ignored: list[object]) -> list[str]:
    if not ignored:
        return []
    names = ", ".join(glance(str(key)) for key in ignored[:_NAMED_KEYS])
    more = f" and {len(ignored) - _NAMED_KEYS} more" if len(ignored) > _NAMED_KEYS else ""
    return [f"Not known here and ignored: {names}{more}."]
