"""The weights of a package: one file of tensors in load order, each aligned and with its sha256.

While it is written a journal lies beside it: a line for what is being built, then one for each
group of tensors that is whole. A build that was killed, even by a power cut, goes on after the last
group that is there as the journal says; all bytes are hashed again before they are believed.
"""

import fcntl
import hashlib
import json
import logging
import os
from collections import deque
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from io import FileIO
from pathlib import Path
from typing import TYPE_CHECKING

from engine.errors import BadPackage, BuildFailed
from engine.package.direct_file import map_private
from engine.package.manifest import (
    ITEM_BYTES,
    MEND,
    SCHEMA,
    WEIGHTS,
    Entry,
    PackageFile,
    aligned,
    from_json,
)

if TYPE_CHECKING:  # see `read_tensor`
    from torch import Tensor

log = logging.getLogger(__name__)

JOURNAL = "journal"
_BLOCK_BYTES = 16 * 2**20


def read_tensor(path: Path, entry: Entry, *, verified: bool) -> "Tensor":
    """Maps a tensor into memory as it is stored: it takes no memory that the system cannot take
    back, and writes to it stay in this process. Unless it was `verified` before, its bytes are read
    for the hash.

    Raises `BadPackage` for other bytes than were written, `OSError` if they cannot be read.
    """
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        if size < entry.offset + entry.nbytes:  # a mapping beyond the end would kill the process
            raise BadPackage(f"{path} has {size} bytes, {entry.name} ends behind them. {MEND}")
        mapped = map_private(file.fileno(), entry.offset, entry.nbytes)
    if not verified:
        found = hashlib.sha256(mapped).hexdigest()
        if found != entry.sha256:
            raise BadPackage(
                f"{path} is damaged: {entry.name} has sha256 {found}, not {entry.sha256}. {MEND}"
            )
    import torch  # takes a second, for which opening a package should not wait

    flat = torch.frombuffer(mapped, dtype=getattr(torch, entry.dtype))
    return flat.view(entry.shape)


@dataclass(frozen=True, slots=True)
class _Group:
    """Tensors that were written together, and what is known of them: a line of the journal."""

    group: str
    tensors: tuple[Entry, ...]
    facts: Mapping[str, object]


class WeightWriter:
    """Appends groups of tensors to the weights file of a folder; a lock keeps others out.

    Raises `BuildFailed` if another process writes there, `OSError` if the disk refuses.
    """

    def __init__(self, folder: Path, identity: str) -> None:
        """`identity` names all that decides the bytes. A file of another one is dropped."""
        self.folder = folder
        self.entries: dict[str, Entry] = {}
        self._journal = _lock(folder / JOURNAL)
        try:
            self._weights = (folder / WEIGHTS).open("a+b", buffering=0)
        except OSError:
            self._journal.close()
            raise
        self._end = 0
        self._hash = hashlib.sha256()  # hashes the file up to `_end`
        self._left = self._read_journal(f"{SCHEMA} {json.dumps(identity)}\n".encode())

    def close(self) -> None:
        """Gives up the lock. What was written stays for the next one with the same identity."""
        self._weights.close()
        self._journal.close()

    def resume(self, group: str) -> Mapping[str, object] | None:
        """The facts of a group that is there already and comes next. None if it must be made."""
        if not self._left:
            return None
        line, journal_end = self._left[0]
        digest = self._rehash(line) if line.group == group else None
        if digest is None:
            what = "is damaged" if line.group == group else f"stands where {group} belongs"
            log.warning("%s: %s %s; it is made again, with the rest", self.folder, line.group, what)
            return None
        self._left.popleft()
        self._accept(line, digest, journal_end)
        return line.facts

    def append(
        self, group: str, tensors: "Mapping[str, Tensor]", facts: Mapping[str, object]
    ) -> Mapping[str, object]:
        """Writes all of a group, or nothing that counts. Returns the facts as JSON keeps them."""
        self._left.clear()
        self._weights.truncate(self._end)
        digest, end, entries = self._hash.copy(), self._end, []
        for name, tensor in tensors.items():
            data, dtype = _bytes(tensor), str(tensor.dtype).removeprefix("torch.")
            assert len(data) and dtype in ITEM_BYTES and name not in self.entries, name
            for piece in (memoryview(bytes(aligned(end) - end)), data):
                _write(self._weights, piece)
                digest.update(piece)
            sha256 = hashlib.sha256(data).hexdigest()
            entry = Entry(name, dtype, tuple(tensor.shape), aligned(end), len(data), sha256)
            entries.append(entry)
            end = entry.offset + entry.nbytes
        text = json.dumps(asdict(_Group(group, tuple(entries), facts)))
        self._journal.truncate(self._journal_end)
        _write(self._journal, memoryview(f"{text}\n".encode()))
        line = from_json(_Group, json.loads(text), group)
        self._accept(line, digest, self._journal_end + len(text) + 1)
        return line.facts

    def finish(self) -> PackageFile:
        """Cuts off groups that were not asked for, and describes the file."""
        self._weights.truncate(self._end)
        return PackageFile(WEIGHTS, self._end, self._hash.hexdigest())

    def _accept(self, line: _Group, digest: "hashlib._Hash", journal_end: int) -> None:
        self.entries |= {entry.name: entry for entry in line.tensors}
        self._hash, self._journal_end = digest, journal_end
        if line.tensors:
            self._end = line.tensors[-1].offset + line.tensors[-1].nbytes

    def _read_journal(self, head: bytes) -> deque[tuple[_Group, int]]:
        """Reads the groups up to the first line that is not whole, and where each line ends."""
        self._journal.seek(0)
        first, *lines = self._journal.readall().splitlines(keepends=True) or [b""]
        groups: deque[tuple[_Group, int]] = deque()
        self._journal_end = len(head)
        if first != head:
            if first:
                log.info("%s is of another build, it is written afresh", self.folder)
            self._journal.truncate(0)
            _write(self._journal, memoryview(head))
            return groups
        end = len(head)
        for line in lines:
            try:
                group = from_json(_Group, json.loads(line), "a line of the journal")
            except (ValueError, RecursionError):
                break
            if not line.endswith(b"\n"):
                break
            end += len(line)
            groups.append((group, end))
        if groups:
            log.info("going on with %s: %d groups are there", self.folder, len(groups))
        return groups

    def _rehash(self, line: _Group) -> "hashlib._Hash | None":
        """Hashes the file up to the end of a group. None if its tensors are not as written."""
        file, whole, end = self._weights.fileno(), self._hash.copy(), self._end
        for entry in line.tensors:
            if entry.offset != aligned(end):
                return None
            whole.update(os.pread(file, entry.offset - end, end))
            end, found = entry.offset + entry.nbytes, hashlib.sha256()
            for at in range(entry.offset, end, _BLOCK_BYTES):
                block = os.pread(file, min(_BLOCK_BYTES, end - at), at)
                found.update(block)
                whole.update(block)
            if found.hexdigest() != entry.sha256:
                return None
        return whole


def _lock(path: Path) -> FileIO:
    """Opens the journal and locks it for this process alone."""
    while True:
        path.parent.mkdir(parents=True, exist_ok=True)
        with suppress(FileNotFoundError):  # another build has just put the folder into its place
            journal = path.open("a+b", buffering=0)
            try:
                fcntl.flock(journal, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if os.path.samestat(os.fstat(journal.fileno()), path.stat()):
                    return journal
            except BlockingIOError as error:
                journal.close()
                raise BuildFailed(
                    f"Another build is writing {path.parent}. Wait for it, or choose another "
                    "folder."
                ) from error
            except OSError:
                journal.close()
                raise
            journal.close()


def _bytes(tensor: "Tensor") -> memoryview:
    """Views the bytes of a tensor, without a copy if it lies on the CPU in one piece."""
    import torch

    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data


def _write(file: FileIO, data: memoryview) -> None:
    """Writes all data: the system takes at most 2 GB at once, and less on a nearly full disk."""
    while len(data):
        data = data[file.write(data) :]
