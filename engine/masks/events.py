"""What went otherwise than hoped while masks were made, told with the persons' final numbers.

Persons are numbered as they are found; whom a number means to a reader is settled at the end.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from engine.flow import Warned


@dataclass(frozen=True, slots=True)
class Event:
    """Something to be looked at. `said` has {0}, {1}, .. for the persons."""

    kind: str  # `swap`, `lost`, `area`, `absent`, `cut`, `who`, `unsure`, `unseen`
    said: str
    persons: tuple[int, ...] = ()  # from 0, as found
    frame: int | None = None


def told(event: Event, names: Mapping[int, str]) -> Warned:
    """The event as a warning; `names` are those of persons as found."""
    called = [names.get(person, f"somebody ({person + 1})") for person in event.persons]
    said = event.said.format(*called)
    return Warned(event.kind, said[:1].upper() + said[1:], event.frame)
