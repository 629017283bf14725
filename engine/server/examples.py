"""The shipped scenes: what the page shows of them, and the files that jobs name.

A dance of joints is shown as its skeleton, which is drawn when it is first asked for.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from engine.demo.presets import NANO_HOME, NANO_SCAIL2_HOME, PRESETS
from engine.flow import KindName, Request
from engine.media.mp4 import encode_mp4
from engine.server.demo_renderer import usual_of
from engine.server.disk import write_whole
from engine.server.refused import unknown
from engine.source import load_source

HOME = NANO_HOME.parent  # holds the files of all of them
_DRAWN = "preview/dance.mp4"


@dataclass(frozen=True, slots=True)
class Example:
    """A scene that the page offers. Its files are named as in `FILES`."""

    name: str
    title: str
    model: KindName
    picture: str
    motion: str  # a video, to look at
    input: Mapping[str, str]  # fields of a job, and what they name


FILES: Mapping[str, Path] = {
    "preview/dancer.png": NANO_HOME / "dancer.png",
    "preview/dance.npz": NANO_HOME / "dance.npz",
    **{
        f"scail2/{name}": NANO_SCAIL2_HOME / name
        for name in ("dancer.png", "dancer_mask.png", "driving.mp4", "driving_mask.npz")
    },
}
EXAMPLES = (
    Example(
        "drawn-dancer", "A drawn dancer", "preview", "preview/dancer.png", _DRAWN,
        {"image_path": "preview/dancer.png", "joints_path": "preview/dance.npz"},
    ),
    Example(
        "drawn-scene", "A drawn dancer in a scene", "scail2", "scail2/dancer.png",
        "scail2/driving.mp4",
        {
            "image_path": "scail2/dancer.png", "reference_mask_path": "scail2/dancer_mask.png",
            "video_path": "scail2/driving.mp4", "mask_path": "scail2/driving_mask.npz",
        },
    ),
)  # fmt: skip
TYPES: Mapping[str, str] = {".png": "image/png", ".mp4": "video/mp4"}


def told(example: Example) -> dict[str, Any]:
    """Tells of an example as `/info` does."""
    return {
        "name": example.name,
        "title": example.title,
        "model": example.model,
        "picture": f"/examples/{example.picture}",
        "motion": f"/examples/{example.motion}",
        "input": {field: f"example:{name}" for field, name in example.input.items()},
    }


def example_path(name: str) -> Path:
    """Returns the file of an example. Raises `Refused` for a name that is none."""
    if name not in FILES:
        raise unknown("example of this name")
    return FILES[name]


def shown_path(name: str, folder: Path) -> Path:
    """Returns a file of an example that a browser can show. Raises `Refused`.

    `folder` keeps what has to be drawn; drawing takes about a second.
    """
    if name == _DRAWN:
        drawn = folder / "dance.mp4"
        if not drawn.is_file():
            write_whole(drawn, draw_dance)
        return drawn
    path = example_path(name)
    if path.suffix not in TYPES:
        raise unknown("example to look at by this name")
    return path


def draw_dance(out: Path) -> None:
    """Draws the skeleton of the shipped dance as the demo model sees it."""
    preset = PRESETS["nano"]
    request = Request(
        FILES["preview/dancer.png"], FILES["preview/dance.npz"], "joints", usual_of(preset)
    )
    source = load_source(request, _no_dancer)
    encode_mp4([source.skeleton], source.fps, out)


def _no_dancer(*_: object) -> NoReturn:
    raise AssertionError("joints need no motion capture")
