"""Lets a test meet files that may not be read, whoever runs it."""

import os
import tempfile
from contextlib import contextmanager
from pathlib import Path

import pytest

NOBODY = 65534


@contextmanager
def shared_folder():
    """Makes a folder that every user can enter, which pytest's `tmp_path` is not."""
    places = [Path(tempfile.gettempdir()), Path("/tmp"), Path("/var/tmp")]
    place = next((place for place in places if _is_open(place)), None)
    if place is None:
        pytest.skip(f"no folder that every user can enter: {', '.join(map(str, places))}")
    with tempfile.TemporaryDirectory(dir=place) as name:
        Path(name).chmod(0o755)
        yield Path(name)


def _is_open(folder):
    """Tells whether every user can enter a folder and those above it."""
    return folder.is_dir() and all(
        above.stat().st_mode & 0o001 for above in (folder.resolve(), *folder.resolve().parents)
    )


@contextmanager
def bound_by_modes():
    """Lets mode bits bind root too, who becomes nobody meanwhile."""
    if os.geteuid() != 0:
        yield
        return
    try:
        os.seteuid(NOBODY)
    except OSError:
        pytest.skip("root may not become another user here")
    try:
        yield
    finally:
        os.seteuid(0)
