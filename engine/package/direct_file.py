"""A file for reading, which takes each range the faster way: from the page cache, or past it.

Cached ranges are copied. Others are read with `O_DIRECT`: through the cache a cold file comes at
less than half of the disk's speed, measured. File systems without it are read buffered.
"""

import ctypes
import errno
import logging
import mmap
import os
import stat
import weakref
from pathlib import Path
from typing import NamedTuple, Self

from engine.errors import BadPackage, Unavailable

log = logging.getLogger(__name__)

SECTOR = 4096  # offset, length and address of a direct read are multiples of it

# Of a read that this disk, or this memory, does not allow; a buffered one does the same work. What
# a GPU's driver has pinned may be no memory that a disk can write to: EFAULT.
_REFUSALS = {errno.EINVAL, errno.EFAULT, errno.EOPNOTSUPP}

_LIBC = ctypes.CDLL(None, use_errno=True)
_LIBC.mmap.restype = ctypes.c_void_p
_LIBC.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_int64]
_LIBC.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
_LIBC.mincore.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_char_p]
_MAP_FAILED = ctypes.c_void_p(-1).value


class ReadCount(NamedTuple):
    """The bytes that one read gave."""

    nbytes: int  # fewer than asked for where the file ends
    direct: int  # past the page cache
    cached: int  # in a range that was mostly in the page cache


class RawFile:
    """A regular file that any thread may read. Call `close` when all have done."""

    def __init__(self, path: Path, direct: bool | None) -> None:
        """Opens `path`. `direct`: None decides for each range, True is an error where it cannot be
        done, False always goes through the page cache.

        Raises `BadPackage` if there is no such file, `Unavailable` for direct=True where direct
        reads cannot be done.
        """
        self.path = path
        self._wish = direct
        self._direct: int | None = None
        self._refused = False  # once is enough: later reads are buffered at once
        try:
            self._buffered = os.open(path, os.O_RDONLY | os.O_NONBLOCK)  # a pipe must not block
        except (FileNotFoundError, NotADirectoryError, ValueError) as error:  # the last: a NUL
            raise BadPackage(f"There is no file {path}; fetch or build the package.") from error
        except OSError as error:
            raise BadPackage(f"{path} cannot be opened: {error.strerror}.") from error
        try:
            self._prepare()
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        for number in (self._buffered, self._direct):
            if number is not None:
                os.close(number)

    def read(self, into: memoryview, offset: int) -> ReadCount:
        """Fills `into` from byte `offset`; both offset and length are multiples of `SECTOR`.

        Raises `OSError`.
        """
        cached = self._sees_cache and 2 * cached_bytes(self._buffered, offset, len(into)) > len(
            into
        )
        direct = done = 0 if cached and not self._wish else self._read_direct(into, offset)
        while done < len(into) and (n := os.preadv(self._buffered, [into[done:]], offset + done)):
            done += n
        return ReadCount(done, direct, done if cached else 0)

    def _prepare(self) -> None:
        status = os.fstat(self._buffered)
        if not stat.S_ISREG(status.st_mode):
            raise BadPackage(f"{self.path} is not a file but a folder, a pipe or a device.")
        self.size = status.st_size
        # the kernel tells whoever may not write to it that every page is in the cache
        self._sees_cache = status.st_uid == os.geteuid() or os.access(
            self.path, os.W_OK, effective_ids=True
        )
        if self._wish is False:
            return
        try:
            self._direct = os.open(self.path, os.O_RDONLY | os.O_DIRECT)
        except OSError as error:
            self._refuse_direct(error)

    def _read_direct(self, into: memoryview, offset: int) -> int:
        """Reads past the page cache and returns how many bytes came.

        It stops where a read ends between two sectors, as at the end of the file.
        """
        done = 0
        try:
            while (
                self._direct is not None
                and not self._refused
                and done < len(into)
                and not done % SECTOR
            ):
                count = os.preadv(self._direct, [into[done:]], offset + done)
                done += count
                if not count:
                    break
        except OSError as error:
            if error.errno not in _REFUSALS:
                raise
            self._refuse_direct(error)
        return done

    def _refuse_direct(self, error: OSError) -> None:
        if self._wish:
            raise Unavailable(
                f"{self.path} cannot be read past the page cache: {error.strerror}. "
                "Leave the choice to the engine, or use another disk."
            ) from error
        self._refused = True
        log.warning("%s: no direct read (%s), a buffered one instead", self.path, error.strerror)


def map_private(number: int, offset: int, nbytes: int) -> "ctypes.Array[ctypes.c_char]":
    """Maps a range of an open file into memory for as long as the array lives; what is written to
    it stays in this process. Raises `OSError`.

    Python's own mapping keeps a descriptor for each, and a package of 14B has a thousand tensors.
    """
    start = offset // mmap.ALLOCATIONGRANULARITY * mmap.ALLOCATIONGRANULARITY
    length, access = offset - start + nbytes, mmap.PROT_READ | mmap.PROT_WRITE
    address = _LIBC.mmap(None, length, access, mmap.MAP_PRIVATE, number, start)
    if address == _MAP_FAILED:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    array = (ctypes.c_char * nbytes).from_address(address + offset - start)
    weakref.finalize(array, _LIBC.munmap, address, length).atexit = False  # others may hold it then
    return array


def cached_bytes(number: int, offset: int, nbytes: int) -> int:
    """Counts the bytes of a range of an open file that are in the page cache, in whole pages."""
    address = _LIBC.mmap(None, nbytes, mmap.PROT_READ, mmap.MAP_SHARED, number, offset)
    if address == _MAP_FAILED:
        return 0
    states = ctypes.create_string_buffer(-(-nbytes // mmap.PAGESIZE))
    failed = _LIBC.mincore(address, nbytes, states)
    _LIBC.munmap(address, nbytes)
    return 0 if failed else states.raw.count(1) * mmap.PAGESIZE
