"""Of a folder of packages the one that is meant is opened; where nobody can tell, all are named."""

import logging
import shutil
from dataclasses import replace

import pytest

from engine.config import KINDS, TINY_SCAIL2
from engine.errors import BadPackage, BuildFailed
from engine.package.folder import PackageWriter, open_folder
from engine.package.search import Held, find_packages, package_home
from kernels.arch import SM89, SM90, SM120
from tests.support.packages import MANIFEST, build, complete, for_arch, reseal

PREVIEW, SCAIL2 = "preview", "scail2"


def of(arch, kind):
    """The manifest of a package for an architecture, of a kind."""
    model = MANIFEST.model if kind == PREVIEW else TINY_SCAIL2
    return replace(for_arch(arch), model_kind=kind, model=model)


def put(home, arch, kind):
    return build(home, groups=1, manifest=of(arch, kind))


def refusal(path, arch=None):
    with pytest.raises(BadPackage) as caught:
        open_folder(path, arch)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_package_is_found_by_itself(tmp_path):
    home = put(tmp_path / "any", SM89, SCAIL2)
    assert find_packages(home) == [Held(SCAIL2, "sm89", home)]


def test_packages_lie_in_folders_of_their_kind_and_architecture(tmp_path):
    homes = {}
    for arch, kind in ((SM89, SCAIL2), (SM89, PREVIEW), (SM120, SCAIL2)):
        homes[arch, kind] = put(package_home(tmp_path, kind, arch), arch, kind)
    assert [held[:2] for held in find_packages(tmp_path)] == [
        (PREVIEW, "sm89"), (SCAIL2, "sm89"), (SCAIL2, "sm120")
    ]  # fmt: skip
    assert homes[SM89, SCAIL2] == tmp_path / "scail2" / "sm89"
    assert open_folder(tmp_path, SM120).path == homes[SM120, SCAIL2]
    assert open_folder(tmp_path / "scail2", SM89).path == homes[SM89, SCAIL2]
    assert open_folder(tmp_path / "preview").path == homes[SM89, PREVIEW]


def test_where_both_kinds_lie_both_are_named(tmp_path):
    for kind in KINDS:
        put(package_home(tmp_path, kind, SM89), SM89, kind)
    for arch in (SM89, None):
        assert refusal(tmp_path, arch) == (
            f"{tmp_path} holds packages of SCAIL-Preview and SCAIL-2 for sm89; name one of them: "
            f"--package {tmp_path}/preview or --package {tmp_path}/scail2 (SCAIL_PACKAGE of a "
            "worker)."
        )
    put(package_home(tmp_path, SCAIL2, SM120), SM120, SCAIL2)
    assert refusal(tmp_path) == (
        f"{tmp_path} holds packages for sm89, sm120; name one of them: preview/sm89, scail2/sm89, "
        "scail2/sm120."
    )
    assert open_folder(tmp_path, SM120).manifest.model_kind == SCAIL2
    assert "packages for sm89, sm120, none for sm90; build that one" in refusal(tmp_path, SM90)


@pytest.mark.parametrize("kind", KINDS)
def test_a_package_that_lies_where_they_once_lay_is_found_whatever_its_kind(tmp_path, kind):
    home = put(tmp_path / "sm89", SM89, kind)
    (tmp_path / "sm90.partial").mkdir()
    assert find_packages(tmp_path) == [Held(kind, "sm89", home)]
    assert open_folder(tmp_path).path == open_folder(tmp_path, SM89).path == home
    assert "packages for sm89, none for sm90; build that one" in refusal(tmp_path, SM90)


def test_there_too_the_one_for_the_architecture_is_opened(tmp_path):
    for arch in (SM89, SM120):
        put(tmp_path / arch.name, arch, PREVIEW)
    for arch in (SM89, SM120):
        assert open_folder(tmp_path, arch).manifest.arch == arch.name
    assert refusal(tmp_path).endswith("for sm89, sm120; name one of them: sm89, sm120.")
    (tmp_path / "sm120").rename(tmp_path / "sm90")  # the folder's name is no proof
    assert "is for sm120, sm90 is needed" in refusal(tmp_path, SM90)


def test_a_package_of_the_same_kind_in_the_newer_place_is_taken_and_said(tmp_path, caplog):
    caplog.set_level(logging.INFO, "engine")
    put(tmp_path / "sm89", SM89, PREVIEW)
    home = put(package_home(tmp_path, PREVIEW, SM89), SM89, PREVIEW)
    caplog.clear()
    assert open_folder(tmp_path, SM89).path == home
    assert caplog.messages == [f"{tmp_path}/sm89 is not used: preview/sm89 is there"]


def test_a_package_of_the_other_kind_in_the_older_place_is_named_by_it(tmp_path):
    put(tmp_path / "sm89", SM89, PREVIEW)
    put(package_home(tmp_path, SCAIL2, SM89), SM89, SCAIL2)
    assert (
        f"of SCAIL-2 and SCAIL-Preview for sm89; name one of them: --package {tmp_path}/scail2 or "
        f"--package {tmp_path}/sm89 "
    ) in refusal(tmp_path, SM89)


def test_a_package_of_the_older_schema_is_told_unless_one_was_built_since(tmp_path):
    put(tmp_path / "sm89", SM89, PREVIEW)
    reseal(tmp_path / "sm89", lambda body: body | {"schema": 1})
    assert find_packages(tmp_path) == [Held(None, "sm89", tmp_path / "sm89")]
    assert "was made by an older engine" in refusal(tmp_path, SM89)
    home = put(package_home(tmp_path, SCAIL2, SM89), SM89, SCAIL2)
    assert open_folder(tmp_path, SM89).path == home


def test_a_package_in_the_folder_of_another_kind_is_refused(tmp_path):
    home = put(package_home(tmp_path, PREVIEW, SM89), SM89, SCAIL2)
    assert refusal(tmp_path) == (
        f"{home} is a package of SCAIL-2, and lies where one of SCAIL-Preview is expected. Move it "
        "to scail2/sm89."
    )
    assert open_folder(home).manifest.model_kind == SCAIL2  # whoever names it means it


def test_a_folder_without_packages_is_told_with_what_is_looked_for(tmp_path):
    assert find_packages(tmp_path) == []
    assert refusal(tmp_path) == (
        f"{tmp_path} holds no package: there is no manifest.json in it, nor in a folder of it "
        "called KIND/ARCH, of preview, scail2 and sm80, sm86, sm89, sm90, sm120, or ARCH. Build "
        "one with build_engine.py."
    )


@pytest.mark.parametrize("early", [True, False], ids=["early", "late"])
def test_a_build_never_replaces_a_package_of_another_kind(tmp_path, early):
    home = put(tmp_path / "sm89", SM89, SCAIL2)
    before = open_folder(home).digest
    says = r"in the way: it is a package of SCAIL-2, which one of SCAIL-Preview does not replace"
    with PackageWriter(home, "b") as writer, pytest.raises(BuildFailed, match=says):
        writer.claim(PREVIEW) if early else complete(writer, of(SM89, PREVIEW))
    assert open_folder(home).digest == before
    with PackageWriter(home, "b") as writer:
        writer.claim(SCAIL2)
    shutil.rmtree(home)
    with PackageWriter(home, "b") as writer:
        writer.claim(PREVIEW)
