"""The public names of the package."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import lvlm_clorae

REPOSITORY = Path(__file__).parents[1]


def test_every_public_name_can_be_imported() -> None:
    for name in lvlm_clorae.__all__:
        assert getattr(lvlm_clorae, name) is not None
    assert set(lvlm_clorae.__all__) <= set(dir(lvlm_clorae))
    lazy = {name for names in lvlm_clorae._MODULES.values() for name in names}
    assert {*lazy, "UserError"} == set(lvlm_clorae.__all__)
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = lvlm_clorae.no_such_name


def test_user_errors_are_value_errors() -> None:
    assert issubclass(lvlm_clorae.UserError, ValueError)


@pytest.mark.slow
def test_public_names_have_types(tmp_path: Path) -> None:
    lines = [f"reveal_type(lvlm_clorae.{name})" for name in lvlm_clorae.__all__]
    (tmp_path / "api.py").write_text("\n".join(["import lvlm_clorae", *lines]))
    settings = (REPOSITORY / "setup.cfg").read_text().partition("[mypy]")[2].partition("[importlinter]")[0]
    (tmp_path / "mypy.ini").write_text(f"[mypy]{settings}")
    line = [
        sys.executable,
        "-m",
        "mypy",
        "--config-file",
        tmp_path / "mypy.ini",
        "--cache-dir",
        tmp_path,
        tmp_path / "api.py",
    ]
    done = subprocess.run(list(map(str, line)), cwd=REPOSITORY, capture_output=True, text=True, check=False)
    revealed = [line for line in done.stdout.splitlines() if "Revealed type" in line]
    assert len(revealed) == len(lines), done.stdout + done.stderr
    for line in revealed:
        assert "lvlm_clorae" in line
        assert 'type is "Any"' not in line
