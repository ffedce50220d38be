from __future__ import annotations

import subprocess
import sys

import pytest

from tests.helpers.launch import REPOSITORY, environment

pytestmark = pytest.mark.integration


@pytest.mark.slow
def test_a_command_says_nothing_but_its_own() -> None:
    """A table on standard output, and on standard error no word of a library."""
    command = [sys.executable, "-m", "lvlm_clorae", "cost", "--model", "demo", "--adapter", "clorae"]
    done = subprocess.run(command, cwd=REPOSITORY, env=environment(), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""


@pytest.mark.slow
def test_loading_a_model_prints_nothing() -> None:
    code = "from lvlm_clorae import load_model; load_model('demo', load_in_4bit=True)"
    line = [sys.executable, "-c", code]
    done = subprocess.run(line, cwd=REPOSITORY, env=environment(), capture_output=True, text=True, check=True)
    assert done.stderr + done.stdout == ""
