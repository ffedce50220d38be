"""The benchmark of constrained decoding: a quick run, its check, and an existing results file."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from tests.helpers.launch import REPOSITORY, small_shards

sys.path.insert(0, str(REPOSITORY / "benchmarks"))

import constrained


@pytest.mark.integration
def test_quick_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    shards = small_shards(tmp_path / "shards", train=1, dev=3, test=1)
    line = ["--quick", "--device", "cpu", "--shards", str(shards), "--output", str(tmp_path / "results.json")]
    assert constrained.main([*line, "--check", "--note", "a test"]) == 0
    assert "differ from gold: 0" in capsys.readouterr().out
    results = json.loads((tmp_path / "results.json").read_text())
    assert (results["about"]["batch"], results["about"]["note"]) == (4, "a test")
    assert len(results["rows"]) == 5
    for row in results["rows"]:
        assert (row["samples"], row["rounds"], row["wrong_answers"]) == (3, 2, [])
        assert row["steps"] > 1
        assert 0 < row["build_seconds"] < row["seconds"]["constrained"]
        assert min(row["answers_per_second"].values()) > 0
        assert row["time_by_free"] > 0

    with pytest.raises(SystemExit):
        constrained.main(line)
    assert "results.json" in capsys.readouterr().err
    other = [*line[:-1], str(tmp_path / "other.json")]
    assert constrained.main([*other, "--shards", str(tmp_path / "nowhere")]) == 2
    assert "nowhere" in capsys.readouterr().err

    monkeypatch.setattr(constrained, "format_answer", lambda sample, subtask: "nonsense")
    assert constrained.main([*other, "--check"]) == 1, "disallowed answers are not generated"
