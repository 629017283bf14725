"""What the model that is served can be asked for, and the refusal of the rest by its name.

A package is of one kind of model. Fields and options that another kind alone understands are errors
and not ignored: whoever sends a mask does not want the clip that comes out without it.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from engine.config import KINDS, LIMITS, ModelKind
from engine.errors import BadRequest, Unavailable
from engine.flow import KindName, Mode, Motion, RecipeName, Settings
from engine.recipes import row_of

# The fields of requests that one kind alone understands, without "_url", "_path" and "_base64".
_BOUND: Mapping[str, KindName] = {
    "mask": "scail2",
    "reference_mask": "scail2",
    "reference": "scail2",
    "references": "scail2",
    "segments": "scail2",
    "framing": "scail2",
    "who": "scail2",
    "strict": "scail2",
    "return_masks": "scail2",
    "drift": "scail2",
    "align": "preview",
}


@dataclass(frozen=True, slots=True)
class Served:
    """The model that a worker or a command runs, as far as requests must know it."""

    kind: ModelKind = KINDS["preview"]
    modes: tuple[Mode, ...] = KINDS["preview"].modes  # some of its kind; the first is usual
    refused: Mapping[RecipeName, str] = field(default_factory=dict)  # and what is to be done
    who: str = "this worker"
    makes_masks: bool = False  # where none come
    usual: Settings | None = None  # of requests that name no recipe; None: those of its kind


PREVIEW = Served()  # where nothing else is known


def refuse_foreign(names: Iterable[str], served: Served) -> None:
    """Raises `BadRequest` for the first of the fields that is for another kind of model.

    `names` are those of fields that were given, as the sentence shall call them: "mask_url".
    """
    for name in names:
        kind = _BOUND.get(_bare(name))
        if kind is not None and kind != served.kind.name:
            raise BadRequest(
                f"{name} is for {KINDS[kind].title}; {served.who} serves {served.kind.title}. "
                f"Leave it out, or take a package of {KINDS[kind].title}."
            )


def mode_of(said: Mode | None, served: Served) -> Mode | None:
    """Finds the mode of a clip: the usual one where none is said.

    A model without modes animates: to name that changes nothing.
    """
    if said is None or (said == "animation" and not served.kind.modes):
        return next(iter(served.modes), None)
    return said


def check_mode(mode: Mode | None, motion: Motion, mask: object, ask: str, served: Served) -> None:
    """Raises `BadRequest` for a mode that is not served, and for one that lacks what it needs.

    `mask` is the driving mask, if there is one; `ask` names what brings one.
    """
    if mode is None:
        return
    title = served.kind.title
    if mode not in served.kind.modes:
        whose = next(kind.title for kind in KINDS.values() if mode in kind.modes)
        raise BadRequest(f"The mode {mode} is for {whose}; {served.who} serves {title}.")
    if mode not in served.modes:
        raise BadRequest(
            f"The mode {mode} is not there: the weights of this {title} were made for "
            f"{' and '.join(served.modes)} only."
        )
    if mode != "replacement":
        return
    if motion != "video":
        raise BadRequest(
            "The mode replacement needs a video of the person who is replaced; what is given is a "
            "skeleton, which has no scene."
        )
    if mask is None and not served.makes_masks:
        raise BadRequest(
            "The mode replacement needs a driving mask, which says who in the video is replaced; "
            f"send {ask}."
        )


def check_recipe(name: RecipeName | None, served: Served) -> None:
    """Raises `Unavailable` for a recipe that the weights were not made for."""
    row, _ = row_of(served.kind.name, name)
    if row in served.refused:
        raise Unavailable(served.refused[row])


def told_of_persons(persons: int | None, served: Served) -> tuple[str, ...]:
    """Says that a number of dancers changes nothing for a model which masks tell who is who."""
    if persons is None or not served.kind.modes or served.makes_masks:
        return ()
    return (f"persons is {persons}, which changes nothing: masks say who is who.",)


def check_references(count: int) -> None:
    """Raises `BadRequest` for more further pictures than a clip may have."""
    if count > LIMITS.max_references:
        raise BadRequest(
            f"{count} further pictures are given; at most {LIMITS.max_references} are taken beside "
            "the first one."
        )


def _bare(name: str) -> str:
    """The name of a field without how its value comes; an option's dashes are no matter."""
    name = name.removeprefix("--").replace("-", "_").partition(".")[0]
    for way in ("_url", "_path", "_base64"):
        name = name.removesuffix(way)
    return {"reference_mask_of": "reference"}.get(name, name)
