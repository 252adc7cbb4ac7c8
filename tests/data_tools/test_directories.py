"""Folders that several processes make at the same moment."""

import os
from pathlib import Path

import pytest

from data_tools.files import make_directories


def test_folders_above_are_made_too_and_a_file_in_the_way_is_told(tmp_path):
    make_directories(tmp_path / "a" / "b")
    make_directories(tmp_path / "a" / "b")
    assert (tmp_path / "a" / "b").is_dir()
    (tmp_path / "file").touch()
    with pytest.raises(NotADirectoryError, match="Not a directory: '.*/file'"):
        make_directories(tmp_path / "file" / "b")


def test_one_that_another_process_makes_between_two_looks_is_none_in_the_way(tmp_path, monkeypatch):
    look = Path.is_dir

    def made_after_the_look(path: Path) -> bool:
        found = look(path)
        os.makedirs(path, exist_ok=True)
        return found

    monkeypatch.setattr(Path, "is_dir", made_after_the_look)
    make_directories(tmp_path / "run")
