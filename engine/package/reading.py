"""Reads files of a package as what they are: no link that leads elsewhere, no pipe, no folder."""

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from engine.errors import BadPackage
from engine.package.manifest import MANIFEST, MEND, Manifest, decode


def read_manifest(folder: Path) -> tuple[Manifest, str]:
    """Reads the manifest of a package and its digest. Raises `BadPackage`."""
    with reading(folder):
        regular(folder, MANIFEST)
        return decode((folder / MANIFEST).read_bytes(), folder / MANIFEST)


def regular(folder: Path, relative: str) -> os.stat_result:
    """The status of a file, which must lie in the folder itself. Raises `BadPackage`.

    A link could lead anywhere, and reading a pipe would block.
    """
    path = folder
    with reading(folder / relative):
        for name in relative.split("/"):
            path /= name
            if path.is_symlink() and not _is_cached(path):
                raise BadPackage(f"{path} is a link. Copy the package with the files themselves.")
        found = path.stat()
    if not stat.S_ISREG(found.st_mode):
        raise BadPackage(f"{path} is no file. {MEND}")
    return found


def _is_cached(link: Path) -> bool:
    """Tells if a link is one of a model cache, whose `snapshots` link to the `blobs` beside."""
    parents = link.absolute().parents
    home = next((folder.parent for folder in parents if folder.name == "snapshots"), None)
    return home is not None and link.resolve().parent == (home / "blobs").resolve()


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Makes a sentence of whatever the system says while `path` is read."""
    try:
        yield
    except (FileNotFoundError, NotADirectoryError) as error:
        raise BadPackage(f"{error.filename or path} is missing. {MEND}") from error
    except OSError as error:
        raise BadPackage(
            f"{error.filename or path} cannot be read: {error.strerror}. Check its permissions and "
            "the disk."
        ) from error
