"""Picks the one of several fields that names a medium, and tells of the others."""

from collections.abc import Sequence
from typing import get_args

from engine.jobs.job import Given, MediumKind
from engine.jobs.medium import read_medium


def pick(
    fields: object, name: str, nested: Sequence[tuple[str, str | None]] = (), shown: str = ""
) -> tuple[Given | None, list[str]]:
    """Picks the first of NAME_url, NAME_path, NAME_base64 and the nested fields that is given.

    `nested` are names and values of addresses in objects; `shown` is how sentences call the
    record that `fields` are of. The sentence names those that are ignored.
    """
    kinds: tuple[MediumKind, ...] = get_args(MediumKind)
    given: list[tuple[str, MediumKind, str]] = []
    for kind in kinds:
        key = f"{name}_{kind}" if name else kind
        if (value := getattr(fields, key)) is not None:
            given.append((f"{shown}{key}", kind, value))
    for field, value in nested:
        if value is not None:
            given.append((field, "url", value))
    if not given:
        return None, []
    first, *others = given
    ignored = ", ".join(field for field, _, _ in others)
    return read_medium(*first), [f"{ignored}: ignored for {first[0]}."] if others else []
