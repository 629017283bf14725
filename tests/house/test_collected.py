"""Every test is run where no paths are named: pytest passes over no folder that has some."""

from fnmatch import fnmatch

from tests.house.test_layers import ROOT


def test_no_folder_of_tests_is_passed_over(pytestconfig):
    held = {path.parent for path in (ROOT / "tests").rglob("test_*.py")}
    folders = {one for path in held for one in (path, *path.parents) if one.is_relative_to(ROOT)}
    passed_over = pytestconfig.getini("norecursedirs")
    assert ROOT / "tests" / "build" in folders
    assert not [one for one in folders - {ROOT} for sort in passed_over if fnmatch(one.name, sort)]
