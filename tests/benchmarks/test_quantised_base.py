"""The benchmark of quantized bases: a quick run and an existing results file."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from benchmarks.quantised_base import main


@pytest.mark.slow
def test_quick_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")  # main sets it and does not restore it
    line = ["--quick", "--device", "cpu", "--threads", "1", "--check", "--work", str(tmp_path)]
    line += ["--output", str(tmp_path / "results.json")]
    code = main(line)
    assert "nf4, fp32" in capsys.readouterr().out
    results = json.loads((tmp_path / "results.json").read_text())
    summary, variants = results["summary"], results["variants"]
    assert code == (0 if all(entry["met"] for entry in summary.values()) else 1)
    assert summary["losses that are not finite"]["met"]
    assert (results["about"]["repeats"], results["about"]["threads"]) == (2, 1)
    assert list(variants) == ["fp32", "bf16", "int8", "nf4", "int8, fp32", "nf4, fp32"]

    language = {name: row["bytes"]["language model"] for name, row in variants.items()}
    assert language["nf4"] < language["int8"] < language["bf16"] == language["fp32"] / 2
    for row in variants.values():
        assert set(row["bytes"]) == {"language model", "projector", "vision tower", "base"}
        assert 2 * row["bytes"]["base"] == sum(row["bytes"].values())
        assert all(0 < share <= 1 for share in row["bytes_by_fp32"].values())
        assert row["seconds"] > 0
        assert row["time_by_fp32"] > 0
        assert len(row["losses"]) == 1 + 1 + 2  # the first gradient, the warm-up, the rounds
        assert all(map(math.isfinite, row["losses"]))
        assert row["losses"][-1] < row["losses"][0]
        assert row["loss_off_fp32"] < 0.1
        assert row["gradient_cosine"] > 0.5
        peak = row["peak_bytes"]
        assert 0 < peak["before"] < min(peak["loading"], peak["training"])
    assert variants["fp32"]["gradient_cosine"] == pytest.approx(1)

    assert [path.name for path in tmp_path.iterdir()] == ["results.json"]
    with pytest.raises(SystemExit) as ended:
        main(line)
    assert ended.value.code == 2
    assert "results.json" in capsys.readouterr().err
