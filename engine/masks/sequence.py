"""The order of the pictures of a sequence, by the numbers in their names."""

import re
from collections.abc import Iterable
from itertools import pairwise

from engine.errors import BadMedia

_NUMBER = re.compile(r"([0-9]+)")
_SHOWN_CHARS = 80


def in_order(names: Iterable[str], whole: str) -> list[str]:
    """Sorts names naturally: frame 2 before frame 10, whatever zeros stand in front.

    `whole` is what sentences call the sequence. Raises `BadMedia` if the last numbers of the names
    do not follow each other, or if some have none. Where no name has one, they are sorted.
    """
    ordered = sorted(names, key=_natural)
    numbers = [_NUMBER.findall(name.rpartition("/")[2]) for name in ordered]
    if not any(numbers):
        return ordered
    for name, found in zip(ordered, numbers):
        if not found:
            raise BadMedia(
                f"{whole}: {name[-_SHOWN_CHARS:]!r} has no number, and others have: it has no "
                "place among them. Leave it out, or number it too."
            )
    last = [int(found[-1][:18]) for found in numbers]
    for place, (before, after) in enumerate(pairwise(last)):
        if after != before + 1:
            one, other = (repr(name[-_SHOWN_CHARS:]) for name in ordered[place : place + 2])
            raise BadMedia(
                f"{whole}: {other} comes after {one}; the numbers of a sequence must follow each "
                "other without a gap. Number the pictures anew."
            )
    return ordered


def _natural(name: str) -> list[tuple[int, str]]:
    parts = _NUMBER.split(name)
    return [(int(part[:18]), part) if part.isdigit() else (-1, part) for part in parts]
