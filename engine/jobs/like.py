"""The settings of a clip as a line of JSON in its MP4, and back: "one more like this".

    {"engine": "0.2.0", "note": "SCAIL, seed 3", "model": "preview", "input": {"seed": 3, ..}}

`input` has the fields of a request and comes back through their parser. Media, addresses, LoRAs and
whatever else is no setting is neither written nor read. Where a clip was made with something that
no field can say, as a workflow can, `lost` tells it.
"""

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

from engine.config import KINDS
from engine.errors import BadRequest
from engine.flow import Check, KindName, Recipe, Settings, go_on
from engine.jobs.body import Fields, read_body
from engine.jobs.fields import glance
from engine.jobs.served import Served
from engine.media.comment import read_comment
from engine.recipes import RECIPES

# The fields of a recipe by the names that requests have for them.
_OF_RECIPE = {
    "sampler": "sampler", "steps": "steps", "cfg": "cfg", "shift": "shift",
    "window_frames": "context_frames", "overlap_frames": "context_overlap",
}  # fmt: skip
# The other settings that a request can say, by one name here and there.
_OF_CLIP = tuple(
    field.name
    for field in dataclasses.fields(Settings)
    if field.name in Fields.model_fields and field.name not in ("recipe", "keep_settings")
)
_ALWAYS = ("seed", "prompt", "negative_prompt")  # for which every endpoint has its own
_NAMES = frozenset((*_OF_RECIPE.values(), *_OF_CLIP, "recipe"))
_NAMED = 8  # of what is ignored
_LOST_CHARS = 200


@dataclass(frozen=True, slots=True)
class Like:
    """The settings of a finished clip, as a request would say them."""

    kind: KindName
    given: Mapping[str, object]  # fields of a request, as JSON has them
    fields: Fields  # the same, checked
    told: tuple[str, ...]  # what of the clip does not come back


def comment_of(settings: Settings, kind: KindName, origin: str) -> str:
    """Writes the settings of a clip for the comment of its MP4. `origin` says whose weights made
    it: "SCAIL", or that they are those of a demo.
    """
    given, lost = _given(settings, kind)
    note = comment_without_settings(settings, origin)
    told = {"engine": version("scail-engine"), "note": note, "model": kind, "input": given}
    return json.dumps(told | ({"lost": lost} if lost else {}), ensure_ascii=False)


def comment_without_settings(settings: Settings, origin: str) -> str:
    return f"{origin}, seed {settings.seed}"


def comment_for(settings: Settings, kind: KindName, origin: str) -> str:
    """Writes the comment of a clip of a service: its settings only if the job asked for that."""
    if settings.keep_settings:
        return comment_of(settings, kind, origin)
    return comment_without_settings(settings, origin)


def like(path: Path, name: str, check: Check = go_on) -> Like:
    """Reads the settings of a clip of this engine, which sentences call `name`.

    Raises `BadRequest` for a clip that has none, and `BadMedia` for a file that is no video.
    """
    text = read_comment(path, name, check)
    if text is None or not text.startswith("{"):
        raise BadRequest(
            f"{name} does not say how it was made: settings are in clips of `generate` and of "
            'the page, and in those of a worker that was asked for them ("keep_settings": true).'
        )
    return _read(text, name)


def require_same_kind(alike: Like, served: Served) -> None:
    """Raises `BadRequest` for the settings of another kind of model than the one that runs."""
    if alike.kind != served.kind.name:
        raise BadRequest(
            f"The clip to be like was made by {KINDS[alike.kind].title}, and {served.who} is "
            f"{served.kind.title}: take a package of that model, or give the settings one by one."
        )


def _read(text: str, name: str) -> Like:
    try:
        told = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise BadRequest(f"{name} has a comment with settings, which is damaged.") from error
    told = told if isinstance(told, dict) else {}
    kind, given, lost = (told.get(key) for key in ("model", "input", "lost"))
    row = next((one for one in KINDS.values() if one.name == kind), None)
    if row is None or not isinstance(given, dict):
        raise BadRequest(f"{name} was made by another program: its comment has no settings.")
    known = {key: value for key, value in given.items() if key in _NAMES}
    fields, _, _ = read_body({"input": known})
    said = _told([key for key in given if key not in _NAMES], name)
    if isinstance(lost, str):
        told_lost = "".join(one if one.isprintable() else "?" for one in lost[:_LOST_CHARS])
        said = *said, f"{name} says of itself: {told_lost}"
    return Like(row.name, known, fields, said)


def _told(ignored: list[str], name: str) -> tuple[str, ...]:
    if not ignored:
        return ()
    names = ", ".join(map(glance, ignored[:_NAMED]))
    more = f" and {len(ignored) - _NAMED} more" if len(ignored) > _NAMED else ""
    return (f"{name} names more than settings, which is ignored: {names}{more}.",)


def _given(settings: Settings, kind: KindName) -> tuple[dict[str, object], str]:
    """Returns the fields of a request for a clip with these settings, and what they cannot say."""
    recipe = settings.recipe
    row, base = _nearest(recipe, kind)
    given: dict[str, object] = {"recipe": row}
    for name, field in _OF_RECIPE.items():
        if getattr(recipe, name) != getattr(base, name):
            given[field] = getattr(recipe, name)
    usual = Settings(base)
    for name in _OF_CLIP:
        value = getattr(settings, name)
        if name in _ALWAYS or (value is not None and value != getattr(usual, name)):
            given[name] = value
    if settings.segments == "windows":
        if KINDS[kind].segments[0] != "windows":
            given["segments"] = "windows"
    else:  # there is one model a segment, and these two change nothing
        given = {key: value for key, value in given.items() if not key.startswith("context_")}
    if _unsaid(recipe) != _unsaid(base):
        return given, "Part of its recipe came from a workflow, and is not told here."
    return given, ""


def _nearest(recipe: Recipe, kind: KindName) -> tuple[str, Recipe]:
    """Finds the row from which the fewest fields lead to a recipe, the unsayable ones first."""

    def apart(row: Recipe) -> tuple[bool, int]:
        differing = sum(getattr(row, name) != getattr(recipe, name) for name in _OF_RECIPE)
        return _unsaid(row) != _unsaid(recipe), differing

    return min(RECIPES[kind].items(), key=lambda item: apart(item[1]))


def _unsaid(recipe: Recipe) -> tuple[object, ...]:
    names = (field.name for field in dataclasses.fields(Recipe) if field.name not in _OF_RECIPE)
    return tuple(getattr(recipe, name) for name in names)
