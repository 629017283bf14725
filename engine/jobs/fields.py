"""Readers of untyped JSON values: numbers, which may be strings, words, yes and no.

Each reader returns the value or raises `ValueError` with what was expected, as a noun: "a whole
number". `shown` tells what was found and never repeats more than a glance of it.
"""

import json
import math
import re
from collections.abc import Sequence

from engine.errors import BadRequest

_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d{1,3})?", re.ASCII)
_NUMBER_CHARS = 40
_SHOWN_CHARS = 40
_WORD_CHARS = 40
_HUGE_BITS = 128  # no setting is larger; seeds have 64
_LISTED = 100
_JSON_CHARS = 64 * 2**20  # the platform takes 20 MB
_WORDS = {"true": True, "false": False, "1": True, "0": False, "yes": True, "no": False}


def whole(value: object) -> int:
    """Reads an integer exactly: a seed does not fit a float."""
    if (
        isinstance(value, str)
        and len(value) <= _NUMBER_CHARS
        and re.fullmatch(r"\s*[+-]?\d+\s*", value, re.ASCII)
    ):
        return int(value)
    if type(value) is int and value.bit_length() <= _HUGE_BITS:
        return value
    try:
        parsed = number(value)
    except ValueError:
        parsed = math.nan
    if not parsed.is_integer() or abs(parsed) >= 2.0**_HUGE_BITS:  # of NaN the first is true
        raise ValueError("a whole number")
    return int(parsed)


def number(value: object) -> float:
    """Reads a finite float."""
    if isinstance(value, str):
        value = value.strip() if len(value) <= _NUMBER_CHARS else ""
        parsed = float(value) if _NUMBER.fullmatch(value) else math.nan
    elif type(value) is float:
        parsed = value
    elif type(value) is int and value.bit_length() <= _HUGE_BITS:
        parsed = float(value)
    else:
        parsed = math.nan
    if not math.isfinite(parsed):
        raise ValueError("a number")
    return parsed


def flag(value: object) -> bool:
    if isinstance(value, bool):
        return value
    if isinstance(value, str) and len(value) < _WORD_CHARS and value.strip().lower() in _WORDS:
        return _WORDS[value.strip().lower()]
    if type(value) is int and value in (0, 1):
        return value == 1
    raise ValueError("true or false")


def word(value: object) -> str:
    """Reads a short name, as choices are called."""
    if not isinstance(value, str) or len(value) > _WORD_CHARS or not value.isprintable():
        raise ValueError("a short word")
    return value.strip()


def text(value: object) -> str:
    if not isinstance(value, str):
        raise ValueError("text")
    return value


def listing(value: object) -> Sequence[object]:
    """Reads a list, also one written as JSON; a text that is none stands for a list of one."""
    if isinstance(value, str) and value.lstrip().startswith("["):
        value = parse_json(value, "list")
    if isinstance(value, str):
        return [value]
    if not isinstance(value, list) or len(value) > _LISTED:
        raise ValueError(f"a list of at most {_LISTED}")
    return value


def is_blank(value: object) -> bool:
    """Tells whether nothing is given: null, or the empty string that a form sends."""
    return value is None or (isinstance(value, str) and (not value or value.isspace()))


def shown(value: object) -> str:
    """Writes a value for a message: short, on one line, without what lies deeper in it."""
    if value is None or isinstance(value, bool):
        return {None: "nothing", True: "true", False: "false"}[value]
    if isinstance(value, str):
        return f'"{glance(value)}"'
    if isinstance(value, int):
        return str(value) if value.bit_length() <= _HUGE_BITS else "a huge number"
    if isinstance(value, float):
        return repr(value)
    return {dict: "an object", list: "a list"}.get(type(value), f"a {type(value).__name__}")


def glance(value: str) -> str:
    """Returns the beginning of a text, with a question mark for what is not printable."""
    kept = value if len(value) <= _SHOWN_CHARS else value[: _SHOWN_CHARS - 3] + "..."
    return "".join(character if character.isprintable() else "?" for character in kept)


def parse_json(given: str, what: str) -> object:
    """Parses JSON. Raises `BadRequest` for what is none, or too long or too deep for a parser."""
    if len(given) > _JSON_CHARS:
        raise BadRequest(f"The {what} is a string of {len(given)} characters, too long for JSON.")
    try:
        return json.loads(given)
    except RecursionError as error:
        raise BadRequest(f"The {what} is JSON nested too deep to be read.") from error
    except ValueError as error:  # what json raises, and int for thousands of digits
        raise BadRequest(f"The {what} is a string, but no JSON object.") from error
