"""Finds packages in a folder of packages, and the one that is meant.

They lie in DIR/KIND/ARCH, as `packages/scail2/sm89`. A folder DIR/ARCH, where they lay when there
was one kind, is searched too, and may hold any; one of a kind that DIR/KIND/ARCH has is left alone.
"""

import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from engine.config import KINDS
from engine.errors import BadPackage
from engine.flow import KindName
from engine.package.manifest import MANIFEST
from engine.package.reading import read_manifest, reading
from kernels.arch import ARCHS, Arch

log = logging.getLogger(__name__)


class Held(NamedTuple):
    """A package in a folder of packages."""

    kind: KindName | None  # None: its manifest cannot be read, as opening it will tell
    arch: str
    path: Path


def package_home(folder: Path, kind: KindName, arch: Arch) -> Path:
    """The place of a package in a folder of packages."""
    return folder / kind / arch.name


def find_packages(path: Path) -> list[Held]:
    """Finds a package, or those in a folder of packages, by architecture and kind.

    Raises `BadPackage` if `path` is a package whose manifest cannot be read.
    """
    with reading(path):
        if (path / MANIFEST).is_file():
            manifest = read_manifest(path)[0]
            return [Held(manifest.model_kind, manifest.arch, path)]
        return [held for arch in ARCHS for held in _for_arch(path, arch)]


def _for_arch(path: Path, arch: Arch) -> Iterator[Held]:
    homes = [Held(kind, arch.name, package_home(path, kind, arch)) for kind in KINDS]
    found = [held for held in homes if (held.path / MANIFEST).is_file()]
    yield from found
    older = path / arch.name
    if not (older / MANIFEST).is_file():
        return
    kind = _kind(older)
    if not found or kind not in (None, *(held.kind for held in found)):
        yield Held(kind, arch.name, older)


def _kind(package: Path) -> KindName | None:
    try:
        return read_manifest(package)[0].model_kind
    except BadPackage:
        return None


def the_one(path: Path, arch: Arch | None) -> Held:
    """Chooses the package for `arch` of a folder of packages; without `arch` the only one.

    Raises `BadPackage` where there is none, or several, with their names.
    """
    held = find_packages(path)
    fitting = [one for one in held if arch is None or one.arch == arch.name]
    if len(fitting) == 1:
        older = path / fitting[0].arch
        if older != fitting[0].path and (older / MANIFEST).is_file():
            log.info("%s is not used: %s is there", older, fitting[0].path.relative_to(path))
        return fitting[0]
    if not held:
        archs = ", ".join(known.name for known in ARCHS)
        raise BadPackage(
            f"{path} holds no package: there is no {MANIFEST} in it, nor in a folder of it called "
            f"KIND/ARCH, of {', '.join(KINDS)} and {archs}, or ARCH. Build one with "
            "build_engine.py."
        )
    if not fitting and arch is not None:
        raise BadPackage(
            f"{path} holds packages for {_archs(held)}, none for {arch.name}; build that one."
        )
    raise BadPackage(several(path, fitting))


def several(path: Path, fitting: Sequence[Held]) -> str:
    """Says which packages of a folder might be meant, and how one of them is named."""
    if len({one.arch for one in fitting}) > 1:
        places = ", ".join(str(one.path.relative_to(path)) for one in fitting)
        return f"{path} holds packages for {_archs(fitting)}; name one of them: {places}."
    titles = " and ".join(title(one.kind) for one in fitting)
    names = [one.path if one.path.parent == path else one.path.parent for one in fitting]
    return (
        f"{path} holds packages of {titles} for {fitting[0].arch}; name one of them: "
        f"{' or '.join(f'--package {name}' for name in names)} (SCAIL_PACKAGE of a worker)."
    )


def title(kind: KindName | None) -> str:
    """What a kind of model is called."""
    return "an unknown kind" if kind is None else KINDS[kind].title


def _archs(held: Sequence[Held]) -> str:
    return ", ".join(dict.fromkeys(one.arch for one in held))
