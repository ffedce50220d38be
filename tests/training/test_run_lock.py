"""A run directory has one writer; the lock ends with the process, also when it is killed."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from lvlm_clorae.errors import UserError
from lvlm_clorae.training.config import TrainConfig
from lvlm_clorae.training.run_directory import find_run, open_run
from lvlm_clorae.training.run_lock import lock_run
from tests.helpers.launch import REPOSITORY, environment

pytestmark = pytest.mark.integration

HOLD = """
import os, sys, time
from pathlib import Path
from lvlm_clorae.training.run_lock import lock_run
lock_run(Path(sys.argv[1]), "77_3")
if os.fork() == 0:  # as a DataLoader's worker, which outlives the run for a while
    time.sleep(20)
    os._exit(0)
print("locked", flush=True)
time.sleep(60)
"""


def test_a_second_process_is_refused_until_the_first_ends(tmp_path: Path) -> None:
    line = [sys.executable, "-c", HOLD, str(tmp_path)]
    first = subprocess.Popen(line, cwd=REPOSITORY, env=environment(), stdout=subprocess.PIPE, text=True)
    try:
        assert first.stdout
        assert first.stdout.readline() == "locked\n"
        with pytest.raises(UserError, match=rf"process {first.pid} on .* of job 77_3"):
            lock_run(tmp_path, None)
        with pytest.raises(UserError, match=str(first.pid)):
            open_run(TrainConfig(output_dir=str(tmp_path)))
        assert not (tmp_path / "config.yaml").exists()
    finally:
        first.kill()
        first.wait()
    lock_run(tmp_path, None)
    lock_run(tmp_path, None)
    assert str(os.getpid()) in (tmp_path / ".lock").read_text()


def test_a_directory_that_was_only_locked_is_empty(tmp_path: Path) -> None:
    lock_run(tmp_path, None)
    config = TrainConfig(output_dir=str(tmp_path))
    assert find_run(config) == open_run(config) == tmp_path
