"""Files that appear whole or not at all."""

from __future__ import annotations

from pathlib import Path

import pytest

from lvlm_clorae.files import atomic_path, write_text_atomic


def test_a_text_is_written_into_new_folders(tmp_path: Path) -> None:
    path = tmp_path / "new" / "folder" / "file.txt"
    write_text_atomic(path, "žluť\n")
    assert path.read_text(encoding="utf-8") == "žluť\n"
    assert [item.name for item in path.parent.iterdir()] == ["file.txt"]


def test_the_old_file_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / "file.txt"
    write_text_atomic(path, "a much longer first text")
    write_text_atomic(path, "new")
    assert path.read_text() == "new"


def test_a_failure_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "file.txt"
    path.write_text("old")
    with pytest.raises(UnicodeEncodeError):
        write_text_atomic(path, "new \ud800")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_the_temporary_name_is_hidden_and_ignored_by_git(tmp_path: Path) -> None:
    with atomic_path(tmp_path / "file.txt") as partial:
        assert partial.parent == tmp_path
        assert partial.name.startswith(".")
        assert partial.suffix == ".partial"
        partial.write_text("")
