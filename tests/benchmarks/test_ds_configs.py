"""The benchmark of DeepSpeed files on a tiny model measures files on disk and overwrites nothing."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from benchmarks.ds_configs import BARS, main
from tests.helpers.launch import REPOSITORY

pytestmark = [pytest.mark.distributed, pytest.mark.slow]


def test_a_quick_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "results.json"
    line = ["--quick", "--check", "--files", str(REPOSITORY / "ds_configs/zero3.json"), "--output", str(output)]
    code = main(line)
    printed = capsys.readouterr().out
    content = json.loads(output.read_text(encoding="utf-8"))
    (found,) = content["files"].values()
    assert list(content["files"]) == ["zero3"]
    assert code == (0 if all(found[what] <= bar for what, bar in BARS.items()) else 1)
    assert f"zero3: {found['peak_gib']:.2f} GiB" in printed
    assert (content["about"]["ranks"], len(found["losses"])) == (2, content["about"]["steps"])
    assert all(map(math.isfinite, found["losses"]))
    # With so small an adapter, the overhead is far below 1 MB.
    assert 12 - 1e6 / found["trained"] < found["checkpoint"] < 12
    assert 4 - 1e6 / found["trained"] < found["adapter"] < 4
    with pytest.raises(SystemExit) as ended:
        main(line)
    assert ended.value.code == 2
