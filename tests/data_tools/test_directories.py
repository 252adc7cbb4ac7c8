"""Folders that several processes make at the same moment."""

import pytest

from data_tools.files import make_directories
from tests.overtaking import overtake


def test_folders_above_are_made_too_and_a_file_in_the_way_is_told(tmp_path):
    make_directories(tmp_path / "a" / "b")
    make_directories(tmp_path / "a" / "b")
    assert (tmp_path / "a" / "b").is_dir()
    (tmp_path / "file").touch()
    with pytest.raises(NotADirectoryError, match="Not a directory: '.*/file'"):
        make_directories(tmp_path / "file" / "b")


def test_one_that_another_process_makes_between_two_looks_is_none_in_the_way(tmp_path, monkeypatch):
    run = tmp_path / "run"
    overtake(monkeypatch, run, run.mkdir)
    make_directories(run)
    assert run.is_dir()
