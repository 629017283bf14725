"""An engine package: a folder for one architecture, with weights, kernels, plans and a manifest.

It is written beside its place, as NAME.partial, and moved there when all of it is on the disk. A
package that opens has every file in its size and kernels with the right code; weights and other
files are hashed when they are read. Nothing in a package is ever run as Python.
"""

import hashlib
import logging
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from errno import EDQUOT, EFBIG, ENOSPC
from pathlib import Path
from typing import TYPE_CHECKING, Self, TypeAlias

from engine.clock import Progress
from engine.errors import BadPackage, BuildFailed
from engine.flow import KindName
from engine.package.contents import REPORT, check_contents
from engine.package.manifest import (
    MANIFEST,
    MEND,
    WEIGHTS,
    Entry,
    Manifest,
    PackageFile,
    check_path,
    encode,
    kernel_path,
    require_plain,
)
from engine.package.reading import read_manifest, reading, regular
from engine.package.search import the_one, title
from engine.package.weights_file import JOURNAL, WeightWriter, read_tensor
from kernels.aot.cubin import BadCubin, Cubin, cubin_from_record
from kernels.arch import Arch

if TYPE_CHECKING:  # a package can be opened while torch is still being imported
    from torch import Tensor

log = logging.getLogger(__name__)

PARTIAL, REPLACED = ".partial", ".replaced"
WrittenGroup: TypeAlias = (
    "tuple[Mapping[str, Tensor], Mapping[str, object]]"  # tensors by name, facts
)
_FULL = (ENOSPC, EDQUOT, EFBIG)
_BLOCK_BYTES = 16 * 2**20


@dataclass(frozen=True, slots=True)
class Package:
    """An opened package. It holds no file open; `read` maps one tensor at a time."""

    path: Path
    digest: str  # of the manifest: names what is in the package
    manifest: Manifest
    kernels: tuple[Cubin, ...] = field(repr=False)
    _entries: Mapping[str, Entry] = field(repr=False)
    _files: Mapping[str, PackageFile] = field(repr=False)
    _verified: set[str] = field(repr=False, default_factory=set)  # names of tensors

    @property
    def weights(self) -> Path:
        """The file that the manifest's `tensors` lie in."""
        return self.path / WEIGHTS

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the tensors, in load order."""
        return tuple(self._entries)

    def entry(self, name: str) -> Entry:
        """Finds the entry of a tensor. Raises `BadPackage` if there is none of this name."""
        if name not in self._entries:
            raise BadPackage(f"{self.path} has no tensor {name}. Build it again with this engine.")
        return self._entries[name]

    def read(self, name: str) -> "Tensor":
        """Maps a tensor into memory as it is stored, and verifies it when it is first read.

        Writes to it stay in this process. Raises `BadPackage` if it is not there or damaged.
        """
        entry = self.entry(name)
        with reading(self.weights):
            tensor = read_tensor(self.weights, entry, verified=name in self._verified)
        self._verified.add(name)
        return tensor

    def file(self, relative: str) -> bytes:
        """Reads and verifies a file other than the weights. Raises `BadPackage` as `read` does."""
        if relative not in self._files:
            raise BadPackage(f"{self.path} has no {relative}. Build it again with it.")
        return _content(self.path, self._files[relative])

    def verify(self) -> None:
        """Hashes every file. Raises `BadPackage` for the first one that was changed."""
        total = sum(part.bytes for part in self.manifest.files)
        with Progress("verify", total, "B", is_scaled=True) as progress:
            for part in self.manifest.files:
                path, found = self.path / part.path, hashlib.sha256()
                _check_size(self.path, part)
                with reading(path), path.open("rb") as file:
                    while block := file.read(_BLOCK_BYTES):
                        found.update(block)
                        progress.advance(len(block))
                _require_hash(path, found.hexdigest(), part)


def open_package(path: Path, arch: Arch | None = None) -> Package:
    """Opens a package, or the one for `arch` of a folder of packages (`out/scail2/sm89`). Without
    `arch` that is the only one in there.

    Everything but the bytes of weights, plans and prompts is checked, and that model, tensors,
    kernels and plans fit each other; that takes milliseconds. Raises `BadPackage`, which says what
    is wrong and for which architectures there is a package.
    """
    package = open_folder(path, arch)
    report = package.file(REPORT) if REPORT in package._files else None
    check_contents(package.manifest, package.kernels, report, package.path)
    return package


def open_folder(path: Path, arch: Arch | None = None) -> Package:
    """Opens a package as `open_package` does, of whatever model it is: nothing is compared."""
    with reading(path):
        if not path.is_dir():
            what = "is a file, not the folder of a package" if path.exists() else "does not exist"
            raise BadPackage(f"{path} {what}. Name the folder that holds {MANIFEST}.")
        if path.resolve().suffix == PARTIAL:
            raise BadPackage(f"{path} is an unfinished build. Run the build again: it goes on.")
        kind: KindName | None = None
        if not os.path.lexists(path / MANIFEST):
            kind, _, path = the_one(path, arch)
        package = _open(path)
    if arch is not None and package.manifest.arch != arch.name:
        raise BadPackage(
            f"{path} is for {package.manifest.arch}, {arch.name} is needed. Name a package that "
            f"was built with --arch {arch.name}."
        )
    if kind not in (None, package.manifest.model_kind):
        raise BadPackage(
            f"{path} is a package of {title(package.manifest.model_kind)}, and lies where one of "
            f"{title(kind)} is expected. Move it to {package.manifest.model_kind}/"
            f"{package.manifest.arch}."
        )
    return package


def _open(path: Path) -> Package:
    manifest, digest = read_manifest(path)
    for part in manifest.files:
        _check_size(path, part)
    files = {part.path: part for part in manifest.files}
    kernels = tuple(_kernel(path, record, manifest, files) for record in manifest.native.kernels)
    entries = {entry.name: entry for entry in manifest.tensors}
    return Package(path, digest, manifest, kernels, entries, files)


def _kernel(
    path: Path, record: Mapping[str, object], manifest: Manifest, files: Mapping[str, PackageFile]
) -> Cubin:
    place = kernel_path(str(record.get("name")))
    try:
        for key, value in record.items():
            require_plain(value if isinstance(value, str) else "", f"{key[:40]!r} of a kernel")
        if place not in files:
            raise BadCubin(f"the list of files lacks {place[:80]}")
        cubin = cubin_from_record(record, _content(path, files[place]))
        if record["data"] != len(cubin.data):
            raise BadCubin(f"{place} has {len(cubin.data)} bytes, not {record['data']}")
        if cubin.arch != manifest.arch:
            raise BadCubin(f"{place} is for {cubin.arch}, not for {manifest.arch}")
    except (BadCubin, AttributeError, ValueError) as error:  # a loop's counts are no object
        raise BadPackage(f"{path / MANIFEST} is damaged: {error}. {MEND}") from error
    return cubin


def _content(folder: Path, part: PackageFile) -> bytes:
    path = folder / part.path
    _check_size(folder, part)
    with reading(path):
        data = path.read_bytes()
    _require_hash(path, hashlib.sha256(data).hexdigest(), part)
    return data


def _check_size(folder: Path, part: PackageFile) -> None:
    found = regular(folder, part.path).st_size
    if found != part.bytes:
        raise BadPackage(
            f"{folder / part.path} has {found} bytes, {part.bytes} were written. {MEND}"
        )


def _require_hash(path: Path, found: str, part: PackageFile) -> None:
    if found != part.sha256:
        raise BadPackage(f"{path} is damaged: it has sha256 {found}, not {part.sha256}. {MEND}")


class PackageWriter:
    """Builds the package `home`, in a `with`. Nothing is there until `finish`.

    A build that stopped goes on when it is started again with the same `identity`, which must name
    all that decides the bytes. Raises `BuildFailed` if another build is writing, if `home` is
    something else than a package, or if the disk refuses; finished groups stay for the next try.
    """

    def __init__(self, home: Path, identity: str) -> None:
        self.home = Path(os.path.realpath(home))
        self._partial = self.home.with_name(self.home.name + PARTIAL)
        self._replaced = self.home.with_name(self.home.name + REPLACED)
        self._files: list[PackageFile] = []
        self._needed: int | None = None
        with self._writing():
            _require_ours(self.home, MANIFEST, WEIGHTS)
            _require_ours(self._replaced, MANIFEST, WEIGHTS)
            _require_ours(self._partial, JOURNAL)
            self._weights = WeightWriter(self._partial, identity)
            for path in self._partial.iterdir():  # files are quick to make again
                if path.name not in (WEIGHTS, JOURNAL):
                    shutil.rmtree(path) if path.is_dir() else path.unlink()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._weights.close()

    def claim(self, kind: KindName) -> None:
        """Raises `BuildFailed` if a package of another kind is where this one shall be."""
        try:
            held = read_manifest(self.home)[0].model_kind if self.home.exists() else kind
        except BadPackage:  # of no use to anybody
            return
        if held != kind:
            raise BuildFailed(
                f"{self.home} is in the way: it is a package of {title(held)}, which one of "
                f"{title(kind)} does not replace. Move it, or choose another folder."
            )

    def expect(self, nbytes: int) -> None:
        """Raises `BuildFailed` now if the disk cannot take so many bytes in all."""
        self._needed = nbytes
        with self._writing():
            here = (self._partial / WEIGHTS).stat().st_blocks * 512
            free = shutil.disk_usage(self._partial).free
        if nbytes > here + free:
            raise BuildFailed(
                f"{self.home} needs {nbytes} bytes, {here} are written and {free} are free. Make "
                "room, or choose another folder."
            )

    def write(self, group: str, make: Callable[[], WrittenGroup]) -> Mapping[str, object]:
        """Appends the tensors that `make` gives, on any device, and keeps its facts as JSON.

        A group that is there already, at the same place, is not made again. Returns the facts.
        """
        with self._writing():
            facts = self._weights.resume(group)
        if facts is None:
            tensors, facts = make()
            with self._writing():
                facts = self._weights.append(group, tensors, facts)
        return facts

    def add_file(self, relative: str, data: bytes) -> None:
        """Writes one file of the package, anew in every try."""
        assert relative not in (MANIFEST, WEIGHTS, JOURNAL)
        path = self._partial / check_path(relative)
        with self._writing():
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
        self._files.append(PackageFile(relative, len(data), hashlib.sha256(data).hexdigest()))

    def finish(self, manifest: Manifest) -> Path:
        """Completes the manifest with tensors and files, and puts the package into its place, where
        it replaces an older one of its kind. Raises `BadPackage` if what was written would not
        open.
        """
        self.claim(manifest.model_kind)
        with self._writing():
            files = (self._weights.finish(), *self._files)
            manifest = replace(manifest, tensors=(*self._weights.entries.values(),), files=files)
            (self._partial / MANIFEST).write_bytes(encode(manifest))
            _open(self._partial)
            for path in (*self._partial.rglob("*"), self._partial):
                _sync(path)
            self._put_into_place()
        self._weights.close()
        log.info("%s: %d tensors, %d bytes", self.home, len(manifest.tensors), files[0].bytes)
        return self.home

    def _put_into_place(self) -> None:
        _require_ours(self.home, MANIFEST, WEIGHTS)
        if self.home.exists():
            # a build that was killed just here left it
            shutil.rmtree(self._replaced, ignore_errors=True)
            self.home.rename(self._replaced)
        self._partial.rename(self.home)
        _sync(self.home.parent)
        (self.home / JOURNAL).unlink()
        shutil.rmtree(self._replaced, ignore_errors=True)
        if self._replaced.exists():
            log.warning("%s, the older package, could not be removed", self._replaced)

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            where = error.filename or self._partial
            mend = self._full_disk() if error.errno in _FULL else "Choose another folder."
            raise BuildFailed(f"{where} cannot be written: {error.strerror}. {mend}") from error

    def _full_disk(self) -> str:
        needed = "" if self._needed is None else f" of {self._needed}"
        written = sum(path.stat().st_size for path in self._partial.rglob("*") if path.is_file())
        there = next(path for path in (self._partial, *self._partial.parents) if path.exists())
        free = shutil.disk_usage(there).free
        return (
            f"{written}{needed} bytes are written, {free} are free. Make room and build again: it "
            "goes on where it stopped."
        )


def _require_ours(folder: Path, *names: str) -> None:
    """Refuses a folder that no package was written into: the writer would remove its files."""
    held = {path.name for path in folder.iterdir()} if folder.exists() else set()
    if held and not held.issuperset(names):
        raise BuildFailed(
            f"{folder} is in the way: it holds {min(held)}, and not {' and '.join(names)} as a "
            "package does. Remove it, or choose another folder."
        )


def _sync(path: Path) -> None:
    """Returns when a file, or the names in a folder, are on the disk."""
    file = os.open(path, os.O_RDONLY)
    try:
        os.fsync(file)
    finally:
        os.close(file)


def summary(package: Package) -> dict[str, object]:
    """Describes a package in values that JSON can hold: the output of `info`."""
    manifest = package.manifest
    return {
        "path": str(package.path),
        "kind": manifest.model_kind,
        "arch": manifest.arch,
        "driver_floor": manifest.driver_floor,
        "engine": manifest.engine,
        "digest": package.digest,
        "model": asdict(manifest.model) | {"padded_ffn": manifest.padded_ffn},
        "weights": manifest.weights,
        "rotation": _rotation(manifest),
        "tensors": len(manifest.tensors),
        "bytes": sum(part.bytes for part in manifest.files),
        "native": {"kernels": [_shown(kernel) for kernel in package.kernels]},
        "tensorrt": manifest.tensorrt,
        "sources": [asdict(source) for source in manifest.sources],
        "prompts": None if manifest.prompts is None else asdict(manifest.prompts),
        "toolchain": manifest.toolchain,
    }


def _rotation(manifest: Manifest) -> Mapping[str, object] | None:
    """How rows are rotated, and of how many linears."""
    held = manifest.rotation
    return held and {"kind": held.kind, "group": held.group, "linears": len(held.linears)}


def _shown(kernel: Cubin) -> dict[str, object]:
    loop = kernel.loop
    products = sum(loop.mma.values()) if loop else 0
    return {
        "name": kernel.name,
        "toolkit": kernel.toolkit,
        "registers": kernel.registers,
        "shared_bytes": kernel.shared_bytes,
        "instructions_per_mma": round(loop.instructions / products, 1)
        if loop and products
        else None,
    }
