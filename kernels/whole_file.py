"""Files that are written whole or not at all, whatever stops the writer and whoever else writes."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from uuid import uuid4

PART = ".part"  # the suffix of drafts: what a killed writer leaves is known by it


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Yields a draft beside `path` to be written, which takes the place of `path` at the end.

    If the block raises, the draft goes and `path` stays as it was. Raises `OSError`.
    """
    draft = path.with_name(f".{uuid4().hex}{PART}")  # any name of `path` may be as long as can be
    try:
        yield draft
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)
