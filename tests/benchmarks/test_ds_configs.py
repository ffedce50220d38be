"""The benchmark of DeepSpeed files runs tiny, measures what lies on the disk, and overwrites nothing."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from benchmarks.ds_configs import BARS, main
from tests.launch import REPOSITORY

pytestmark = [pytest.mark.distributed, pytest.mark.slow]


def test_a_quick_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "results.json"
    line = ["--quick", "--check", "--files", str(REPOSITORY / "ds_configs/zero3.json"), "--output", str(output)]
    code = main(line)
    said = capsys.readouterr().out
    content = json.loads(output.read_text(encoding="utf-8"))
    (found,) = content["files"].values()
    assert list(content["files"]) == ["zero3"]
    assert code == (0 if all(found[what] <= bar for what, bar in BARS.items()) else 1)
    assert f"zero3: {found['peak_gib']:.2f} GiB a rank" in said
    assert (content["about"]["ranks"], len(found["losses"])) == (2, content["about"]["steps"])
    assert all(map(math.isfinite, found["losses"]))
    # Of so small an adapter what lies beside the weights is far below the megabyte.
    assert 12 - 1e6 / found["trained"] < found["checkpoint"] < 12
    assert 4 - 1e6 / found["trained"] < found["adapter"] < 4
    with pytest.raises(SystemExit) as ended:
        main(line)
    assert ended.value.code == 2
    assert "not overwritten" in capsys.readouterr().err
