"""A cache on disk for what can be computed again: a checksummed file for each key.

The entries longest unused are dropped first. A cache saves time and nothing else: an entry that is
damaged, or a folder that cannot be written, is logged, and the value is computed again.
"""

import hashlib
import logging
import os
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from kernels.whole_file import PART, whole_file

log = logging.getLogger(__name__)

_DIGEST_BYTES = hashlib.sha256().digest_size
_HEX_DIGITS = frozenset("0123456789abcdef")
_ENTRY, _MEMO = ".entry", ".sha256"


@dataclass(frozen=True, slots=True)
class DiskCache:
    """Bytes under text keys of any length. Several processes may use one folder.

    An entry is the sha256 of what follows, then the value.
    """

    folder: Path
    limit_bytes: int

    def read(self, key: str) -> bytes | None:
        """The value kept under a key; None if there is none or it is damaged."""
        path = self._path(key)
        try:
            data = path.read_bytes()
        except FileNotFoundError:
            return None
        except OSError as error:
            log.warning("%s cannot be read, it is computed again: %s", path, error)
            return None
        digest, value = data[:_DIGEST_BYTES], data[_DIGEST_BYTES:]
        if hashlib.sha256(value).digest() != digest:
            log.warning("%s is damaged, it is computed again", path)
            return None
        with suppress(OSError):  # another worker may have dropped it, or the folder is read-only
            os.utime(path)
        return value

    def write(self, key: str, value: bytes) -> None:
        """Keeps a value, unless it alone exceeds the limit, and drops the oldest beyond it."""
        if _DIGEST_BYTES + len(value) > self.limit_bytes:
            log.warning("%d bytes are too many for the cache %s", len(value), self.folder)
            return
        _keep(self._path(key), hashlib.sha256(value).digest() + value)
        self._trim()

    def _path(self, key: str) -> Path:
        return self.folder / f"{hashlib.sha256(key.encode()).hexdigest()}{_ENTRY}"

    def _trim(self) -> None:
        """Drops the oldest files, parts that a killed worker left too; one in work is too young."""
        entries: list[tuple[int, int, Path]] = []
        for suffix in (_ENTRY, PART):
            for path in self.folder.glob(f"*{suffix}"):
                with suppress(OSError):  # dropped by another worker meanwhile
                    stat = path.stat()
                    entries.append((stat.st_mtime_ns, stat.st_size, path))
        total = sum(size for _, size, _ in entries)
        for _, size, path in sorted(entries):
            if total <= self.limit_bytes:
                return
            with suppress(OSError):
                path.unlink()
            total -= size


def remembered_sha256(path: Path, folder: Path) -> str:
    """The hash of a file, kept in `folder` under its path, size and time of change.

    The text encoder has 11 GB: it is read for this once, not once a process.
    """
    stat = path.stat()
    identity = f"{path.resolve()}\n{stat.st_size}\n{stat.st_mtime_ns}"
    memo = folder / f"{hashlib.sha256(identity.encode()).hexdigest()}{_MEMO}"
    with suppress(OSError):
        known = memo.read_text(encoding="ascii", errors="replace")
        if len(known) == 2 * _DIGEST_BYTES and _HEX_DIGITS.issuperset(known):
            return known
        log.warning("%s is damaged, %s is hashed again", memo, path)
    start = time.perf_counter()
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    log.info("hashed %s in %.0f ms", path.name, 1e3 * (time.perf_counter() - start))
    _keep(memo, digest.encode())
    return digest


def _keep(path: Path, data: bytes) -> None:
    """Writes a file whole or not at all, whatever other workers write at the same moment."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with whole_file(path) as draft:
            draft.touch(mode=0o600)  # prompts and faces of clients are nobody else's
            draft.write_bytes(data)
    except OSError as error:
        log.warning("%s could not be kept: %s", path, error)
