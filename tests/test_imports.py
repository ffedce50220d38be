"""Packages that are loaded at first use: nothing of them runs before, everything works after."""

from __future__ import annotations

import importlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from lvlm_clorae.imports import RARELY_USED, load_at_first_use


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A package ``late`` that appends to the list ``sys.late`` when it is executed."""
    folder = tmp_path / "late"
    folder.mkdir()
    (folder / "__init__.py").write_text("import sys\nsys.late.append(1)\nfrom . import inner\nVALUE = 7\n")
    (folder / "inner.py").write_text("import late\nNAME = late.__name__\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "late", [], raising=False)
    for name in ("late", "late.inner"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    yield folder
    for name in ("late", "late.inner"):
        sys.modules.pop(name, None)


def test_a_package_is_executed_once_when_an_attribute_is_read(package: Path) -> None:
    load_at_first_use("late")
    late = importlib.import_module("late")
    assert sys.late == []
    assert (late.VALUE, late.inner.NAME, sys.late) == (7, "late", [1])
    with pytest.raises(AttributeError, match="nothing"):
        _ = late.nothing
    assert importlib.import_module("late") is late
    assert sys.late == [1]


def test_a_submodule_executes_its_package_first(package: Path) -> None:
    load_at_first_use("late")
    assert importlib.import_module("late.inner").NAME == "late"
    assert sys.late == [1]
    assert sys.modules["late"].VALUE == 7


def test_imported_and_absent_packages_stay_as_they_are(package: Path) -> None:
    late = importlib.import_module("late")
    load_at_first_use("late", "no_such_package")
    assert sys.modules["late"] is late
    assert "no_such_package" not in sys.modules


def test_an_error_in_the_package_is_raised_at_its_use(package: Path) -> None:
    (package / "__init__.py").write_text("raise RuntimeError('broken')")
    load_at_first_use("late")
    with pytest.raises(RuntimeError, match="broken"):
        _ = sys.modules["late"].VALUE


@pytest.mark.integration
def test_a_command_does_not_load_what_it_does_not_use() -> None:
    program = (
        "import sys\n"
        "from lvlm_clorae.imports import *; load_at_first_use(*RARELY_USED)\n"
        "import lvlm_clorae.inference.extractor, peft\n"
        "print([name for name in RARELY_USED if any(m.startswith(name + '.') for m in sys.modules)])"
    )
    out = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    assert out.splitlines()[-1] == "[]"
    assert "bitsandbytes" in RARELY_USED
