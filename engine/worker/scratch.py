"""Gives each job a folder, and removes it with the job, or after a worker that died.

A worker's folder holds a file that the worker has locked. The system drops the lock with the
process, whatever ended it, so that the next worker can tell the dead from the living. It is a lock
of `lockf`: forks of the worker do not share it, and a process must have one `Scratch` only.

Cleaners remove what looks old, the folders of a worker that waits among them: what is gone, or is
no longer ours to use, is made anew under the same name before the next job.
"""

import errno
import fcntl
import logging
import os
import shutil
import stat
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from engine.errors import OutputError

log = logging.getLogger(__name__)

_PREFIX, _LOCK = "worker-", "lock"
_PRIVATE = 0o700
_PROBE_BYTES = 16 * 2**20  # a picture and a short clip


class Scratch:
    """Owns a folder below `root`, which workers of one machine share."""

    def __init__(self, root: Path) -> None:
        """Makes the folder. Raises `OutputError` if there can be none."""
        self.root = root.absolute()
        self._one_at_a_time = threading.Lock()  # jobs, and whoever asks how the worker is
        self._lock: IO[bytes] | None = None
        self._is_closed = False
        with self._told("cannot hold the files of jobs"), self._starting():
            self.folder = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=self.root))
            self._stand()
            self._remove_the_dead()

    @property
    def free_bytes(self) -> int:
        return shutil.disk_usage(self.folder).free

    @contextmanager
    def job_folder(self) -> Iterator[Path]:
        """Makes a folder for this user alone, with a name that nobody can guess.

        It is removed whatever happens. Raises `OutputError` if there can be none.
        """
        with self._told("has no room for the job's files"):
            self._mend()
            folder = Path(tempfile.mkdtemp(prefix="job-", dir=self.folder))
        try:
            yield folder
        finally:
            _remove(folder)

    def check(self) -> None:
        """Raises `OutputError` unless the next job can store its files; mends what it can."""
        with self._told("cannot hold the files of jobs"):
            self._mend()
            with tempfile.TemporaryFile(dir=self.folder) as file:
                os.posix_fallocate(file.fileno(), 0, _PROBE_BYTES)

    def close(self) -> None:
        """Removes the folder for good. May be called from any thread, and again."""
        self._is_closed = True
        if self.folder.exists():
            _remove(self.folder)
        if self._lock is not None:
            self._lock.close()

    @contextmanager
    def _told(self, what: str) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise OutputError(
                f"{self.root} {what}: {error.strerror}. Set TMPDIR to a folder with room."
            ) from error

    @contextmanager
    def _starting(self) -> Iterator[None]:
        """Is held by one worker at a time, so that none takes a half-made folder for a dead one."""
        self.root.mkdir(mode=_PRIVATE, parents=True, exist_ok=True)
        _own(self.root)
        with (self.root / _LOCK).open("wb") as starting:
            fcntl.lockf(starting, fcntl.LOCK_EX)
            yield

    def _mend(self) -> None:
        """Makes the folder and its lock anew if they are not as they were left."""
        with self._one_at_a_time:
            if self._is_closed:
                raise OSError(errno.ESHUTDOWN, "it was closed, since the worker ends")
            if self._stands():
                return
            log.warning("the folder for the files of jobs was taken away, and is made anew")
            with self._starting():
                if self.folder.is_symlink() or (self.folder.exists() and not self.folder.is_dir()):
                    self.folder.unlink()
                self.folder.mkdir(mode=_PRIVATE, exist_ok=True)
                self._stand()

    def _stands(self) -> bool:
        """Tells whether folder and lock are there, ours, and can be used."""
        assert self._lock is not None
        try:
            held, there = os.fstat(self._lock.fileno()), (self.folder / _LOCK).lstat()
            return (
                stat.S_ISDIR(self.folder.lstat().st_mode)
                and os.path.samestat(held, there)
                and _is_usable(self.folder)
            )
        except OSError:
            return False

    def _stand(self) -> None:
        """Locks the folder, in a file of its own that nobody had a lock on before."""
        _own(self.folder)
        with suppress(FileNotFoundError):
            (self.folder / _LOCK).unlink()
        if self._lock is not None:
            self._lock.close()
        self._lock = (self.folder / _LOCK).open("wb")
        fcntl.lockf(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)

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


def _is_usable(folder: Path) -> bool:
    return os.access(folder, os.R_OK | os.W_OK | os.X_OK, effective_ids=True)


def _own(folder: Path) -> None:
    """Gives this user's folder its permissions back."""
    with suppress(PermissionError):  # somebody else's
        if not _is_usable(folder):
            folder.chmod(_PRIVATE)


def _remove(folder: Path) -> None:
    def tell(call: object, path: str, error: tuple[object, BaseException, object]) -> None:
        log.warning("%s cannot be removed: %s", path, type(error[1]).__name__)

    shutil.rmtree(folder, onerror=tell)
