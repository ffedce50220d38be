"""Atomic files and directories, and file errors."""

from __future__ import annotations

from pathlib import Path

import pytest

from lvlm_clorae.errors import UserError
from lvlm_clorae.files import (
    MAX_DEPTH,
    atomic_path,
    check_free,
    file_errors,
    parse_json,
    replace_directory,
    write_text_atomic,
)


def test_missing_folders_are_created(tmp_path: Path) -> None:
    path = tmp_path / "new" / "folder" / "file.txt"
    write_text_atomic(path, "žluť\n")
    assert path.read_text(encoding="utf-8") == "žluť\n"
    assert [item.name for item in path.parent.iterdir()] == ["file.txt"]


def test_an_existing_file_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / "file.txt"
    write_text_atomic(path, "a much longer first text")
    write_text_atomic(path, "new")
    assert path.read_text() == "new"


def test_a_failed_write_keeps_the_old_file_and_no_temporary_file(tmp_path: Path) -> None:
    path = tmp_path / "file.txt"
    path.write_text("old")
    with pytest.raises(UnicodeEncodeError):
        write_text_atomic(path, "new \ud800")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_the_temporary_file_is_hidden_and_ignored_by_git(tmp_path: Path) -> None:
    with atomic_path(tmp_path / "file.txt") as partial:
        assert partial.parent == tmp_path
        assert partial.name.startswith(".")
        assert partial.suffix == ".partial"
        partial.write_text("")


def test_a_directory_is_replaced_atomically(tmp_path: Path) -> None:
    target = tmp_path / "adapter"
    replace_directory(target, lambda path: (path / "first").touch())
    replace_directory(target, lambda path: (path / "second").touch())
    assert [path.name for path in target.iterdir()] == ["second"]

    def fail(path: Path) -> None:
        (path / "third").touch()
        raise RuntimeError("disk full")

    with pytest.raises(RuntimeError):
        replace_directory(target, fail)
    assert [path.name for path in target.iterdir()] == ["second"]
    replace_directory(target, lambda path: (path / "fourth").touch())
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]
    assert [path.name for path in target.iterdir()] == ["fourth"]


def test_a_file_error_is_a_user_error_and_others_pass(tmp_path: Path) -> None:
    with (
        pytest.raises(UserError, match=r"a: cannot be read \(No such file or directory\)\. Give another\."),
        file_errors("a: cannot be read", "Give another."),
    ):
        (tmp_path / "a").read_bytes()
    with pytest.raises(KeyError), file_errors("a: cannot be read"):
        raise KeyError


def test_an_existing_file_is_not_free(tmp_path: Path) -> None:
    check_free(tmp_path / "a")
    (tmp_path / "a").symlink_to(tmp_path / "absent")
    with pytest.raises(UserError, match="already exists"):
        check_free(tmp_path / "a")


def test_json_is_read_with_and_without_a_byte_order_mark() -> None:
    for data in ('{"a": ["é", 1.5, null]}', '\ufeff{"a": ["é", 1.5, null]}'):
        assert parse_json(data) == parse_json(data.encode()) == {"a": ["é", 1.5, None]}
    deep = "[" * MAX_DEPTH + "]" * MAX_DEPTH
    for data in (
        deep,
        '{"a": ' * MAX_DEPTH + "1" + "}" * MAX_DEPTH,
        '"' + "[" * 5000 + '"',
        "[[]," * 50 + "1" + "]" * 50,
    ):
        parse_json(data)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\xff",
        b"\xef\xbb\xbf\xef\xbb\xbf{}",
        '{"a": 1}'.encode("utf-16"),
        b'{"a": 1, "a": 1}',
        b'[{"\\u0061": 1, "a": 2}]',
        b"NaN",
        b"[-Infinity]",
        b"1e999",
        b"1" * 5000,
        b"[" * (MAX_DEPTH + 1) + b"]" * (MAX_DEPTH + 1),
        b'{"a": [' * MAX_DEPTH + b"]}" * MAX_DEPTH,
        b"[" * 10**6,
        b"{" + b",".join(b'"%d": 1' % number for number in range(10**5)) + b', "99999": 1}',
    ],
    ids=lambda data: str(data[:12]),
)
def test_invalid_json_is_a_line(data: bytes) -> None:
    with pytest.raises(ValueError, match=r"^[^\n]{1,200}$"):
        parse_json(data)
