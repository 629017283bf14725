"""What a reply tells of a request: marks in prompts that mean nothing here, and a bound on all."""

import re
from collections.abc import Sequence

from engine.flow import Settings

_MOST = 20  # sentences
_MOST_CHARS = 2000  # of one sentence
_SHOT = re.compile(r"\[\d{1,3}\]")
_WEIGHT = re.compile(r"\([^():]{1,200}:\d*\.?\d+\)")


def prompt_marks(settings: Settings) -> list[str]:
    """Names the marks by which WanVideoWrapper divides or weighs a prompt; here it is one text."""
    prompt, said = settings.prompt, list[str]()
    parts = prompt.count("|") + 1
    if parts > 1:
        said.append(
            f'The prompt has {parts} parts between "|". WanVideoWrapper gives each to a stretch of '
            "the clip; here all of it is one text, for the whole clip."
        )
    elif _SHOT.search(prompt):
        said.append(
            'The prompt has shots that are marked like "[1]". They are not told apart here: all of '
            "it is one text, for the whole clip."
        )
    if any(_WEIGHT.search(text) for text in (prompt, settings.negative_prompt)):
        said.append('A prompt has weights like "(words:1.2)", which are read as text here.')
    return said


def bounded(told: Sequence[str]) -> tuple[str, ...]:
    """Cuts the sentences to what a reply may carry, and says how many are left out."""
    cut = [said if len(said) <= _MOST_CHARS else f"{said[: _MOST_CHARS - 3]}..." for said in told]
    if len(cut) <= _MOST:
        return tuple(cut)
    return (*cut[: _MOST - 1], f"{len(cut) - _MOST + 1} more warnings are left out.")
