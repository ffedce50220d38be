"""Atomic file writing, strict reading of JSON, and file errors as UserErrors."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from lvlm_clorae.errors import UserError

if TYPE_CHECKING:
    from pydantic import ValidationError
MAX_DEPTH = 100
"""Nesting of lists and objects in a JSON file, so that no function that follows it exceeds the stack."""


@contextmanager
def long_names() -> Iterator[None]:
    """Raise UserError for a file name that is too long, as which pathlib raises OSError where others return False."""
    try:
        yield
    except OSError as error:
        if error.errno != errno.ENAMETOOLONG:
            raise
        found = UserError(f"{str(error.filename)[:60]}...: the file name is too long. Check the command line.")
        found.everywhere = True
        raise found from None


@contextmanager
def file_errors(problem: str, fix: str = "") -> Iterator[None]:
    """Raise an OSError of the block as a UserError: ``problem``, the reason in brackets, and ``fix``."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{problem} ({error.strerror or error}).{fix and f' {fix}'}") from None


def check_free(path: Path) -> None:
    """Raise UserError if the file exists: plots that the user names are never overwritten."""
    if os.path.lexists(path):
        raise UserError(f"{path}: already exists and is not overwritten. Remove it or choose another name.")


def write_png(figure: Any, path: Path, **settings: Any) -> None:
    """Write a matplotlib figure, with ``settings`` of its ``savefig``. Raises UserError if it cannot be written."""
    with file_errors(f"{path}: cannot be written", "Choose another path."), atomic_path(path) as partial:
        figure.savefig(partial, format="png", **settings)


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside ``path``; on success sync it and rename it to ``path``, otherwise remove it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        yield partial
        sync(partial)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def write_text_atomic(path: Path, text: str) -> None:
    """Write ``text`` as UTF-8. Readers see the old file or the new one, never a part of it."""
    with atomic_path(path) as partial:
        partial.write_text(text, encoding="utf-8")


def replace_directory(target: Path, write: Callable[[Path], None]) -> None:
    """Let ``write`` fill a new directory and move it to ``target``; a kill leaves the old directory or the new one."""
    partial, old = target.with_name(f".{target.name}.partial"), target.with_name(f".{target.name}.old")
    for path in (partial, old):
        shutil.rmtree(path, ignore_errors=True)
    partial.mkdir(parents=True)
    write(partial)
    if target.exists():
        target.rename(old)
    partial.rename(target)
    shutil.rmtree(old, ignore_errors=True)


def sync(path: Path) -> None:
    """Flush a file, or the entries of a directory, to disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def parse_json(data: bytes | str) -> Any:
    """Decode JSON that others have written: UTF-8, with a byte order mark or without.

    Raises:
        ValueError: invalid JSON, a key given twice, a number that is not finite, or nesting beyond ``MAX_DEPTH``.
    """
    text = data.decode("utf-8-sig") if isinstance(data, bytes) else data.removeprefix("\ufeff")
    try:
        content = json.loads(text, object_pairs_hook=unique, parse_float=_finite, parse_constant=_not_finite)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    if text.count("[") + text.count("{") > MAX_DEPTH and _is_deep(content):
        raise ValueError("nested too deeply")
    return content


def _is_deep(content: Any) -> bool:
    level = [content]
    for _ in range(MAX_DEPTH):
        inner = chain.from_iterable(item.values() if isinstance(item, dict) else item for item in level)
        level = [item for item in inner if isinstance(item, dict | list)]
    return bool(level)


def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return the content of a mapping. Raises ValueError if a key is given twice."""
    found = dict(pairs)
    if len(found) < len(pairs):
        ((name, _),) = Counter(name for name, _ in pairs).most_common(1)
        raise ValueError(f"{json.dumps(name[:60])} is given twice")
    return found


def _finite(literal: str) -> float:
    number = float(literal)
    return number if abs(number) != float("inf") else _not_finite(literal)


def _not_finite(literal: str) -> NoReturn:
    raise ValueError(f"{literal[:60]} is not a finite number")


def validation_error(where: str, error: ValidationError, fix: str) -> UserError:
    """Build the error for the first problem that pydantic found in a file."""
    problem = max(error.errors(include_url=False), key=lambda one: len(one["loc"]))  # the most specific of a union
    path = ".".join(part for part in map(str, problem["loc"]) if "[" not in part)  # without the names of types
    message = f"{where}{path and f', {path}'}: {problem['msg'].removeprefix('Value error, ')}. {fix}"
    return UserError("".join(char if char.isprintable() else ascii(char)[1:-1] for char in message))
