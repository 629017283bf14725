"""A file is written whole or not at all."""

import pytest

from kernels.whole_file import whole_file


def test_the_draft_takes_the_place_of_the_file(tmp_path):
    path = tmp_path / "kept.json"
    path.write_text("old")
    with whole_file(path) as draft:
        draft.write_text("new")
        assert path.read_text("utf-8") == "old"
    assert path.read_text("utf-8") == "new"
    assert [*tmp_path.iterdir()] == [path]


def test_a_writer_that_fails_leaves_the_old_file_and_no_draft(tmp_path):
    path = tmp_path / "kept.json"
    path.write_text("old")
    with pytest.raises(RuntimeError, match="half"), whole_file(path) as draft:
        draft.write_text("ne")
        raise RuntimeError("half")
    assert path.read_text("utf-8") == "old"
    assert [*tmp_path.iterdir()] == [path]


def test_two_writers_at_once_do_not_meet(tmp_path):
    path = tmp_path / "kept.json"
    with whole_file(path) as first, whole_file(path) as second:
        first.write_text("first")
        second.write_text("second")
    assert path.read_text("utf-8") == "first"  # the outer block ends last
    assert [*tmp_path.iterdir()] == [path]


def test_a_folder_that_is_not_there_is_an_os_error(tmp_path):
    with pytest.raises(FileNotFoundError), whole_file(tmp_path / "no" / "kept") as draft:
        draft.write_text("new")


def test_a_name_may_be_as_long_as_the_system_takes(tmp_path):
    path = tmp_path / ("n" * 251 + ".npz")
    with whole_file(path) as draft:
        draft.write_text("kept")
    assert path.read_text("utf-8") == "kept"
