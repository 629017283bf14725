"""Gives each job a folder, and removes it with the job, or after a worker that died.

A worker's folder holds a file that the worker has locked. The system drops the lock with the
process, whatever ended it, so that the next worker can tell the dead from the living. It is a lock
of `lockf`: forks of the worker do not share it, and a process must have one `Scratch` only.
"""

import fcntl
import logging
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from engine.errors import OutputError

log = logging.getLogger(__name__)

_PREFIX, _LOCK = "worker-", "lock"


class Scratch:
    """Owns a folder below `root`, which workers of one machine share."""

    def __init__(self, root: Path) -> None:
        """Makes the folder. Raises `OutputError` if there can be none."""
        self.root = root
        try:
            root.mkdir(mode=0o700, parents=True, exist_ok=True)
            with (root / _LOCK).open("wb") as starting:  # one worker at a time
                fcntl.lockf(starting, fcntl.LOCK_EX)
                self.folder = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=root))
                self._lock = (self.folder / _LOCK).open("wb")
                fcntl.lockf(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                self._remove_the_dead()
        except OSError as error:
            raise OutputError(
                f"{root} cannot hold the files of jobs: {error.strerror}. Set TMPDIR to a folder "
                "with room."
            ) from error

    @property
    def free_bytes(self) -> int:
        return shutil.disk_usage(self.folder).free

    @contextmanager
    def job_folder(self) -> Iterator[Path]:
        """Makes a folder for this user alone, with a name that nobody can guess.

        It is removed whatever happens.
        """
        try:
            folder = tempfile.mkdtemp(prefix="job-", dir=self.folder)
        except OSError as error:
            raise OutputError(f"There is no room for the job's files: {error.strerror}.") from error
        try:
            yield Path(folder)
        finally:
            _remove(Path(folder))

    def close(self) -> None:
        _remove(self.folder)
        self._lock.close()

    def _remove_the_dead(self) -> None:
        for folder in self.root.glob(f"{_PREFIX}*"):
            if folder != self.folder and _is_dead(folder):
                log.warning("what a worker that died had left is removed")
                _remove(folder)


def _is_dead(folder: Path) -> bool:
    try:
        with (folder / _LOCK).open("r+b") as lock:
            fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except FileNotFoundError:
        return True
    except OSError:
        return False  # locked, or not ours
    return True


def _remove(folder: Path) -> None:
    def tell(call: object, path: str, error: tuple[object, BaseException, object]) -> None:
        log.warning("%s cannot be removed: %s", path, type(error[1]).__name__)

    shutil.rmtree(folder, onerror=tell)
