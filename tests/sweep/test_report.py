"""What a sweep's scores become on disk."""

from __future__ import annotations

import csv
import json
import statistics
from pathlib import Path

from lvlm_clorae.sweep.points import Sweep
from lvlm_clorae.sweep.report import write
from tests.sweep.helpers import collected, finish, sweep_of


def test_what_is_written(sweep: Sweep, tmp_path: Path) -> None:
    found = collected(sweep)
    paths = write(sweep, found)
    assert paths == [tmp_path / "runs" / name for name in ("sweep.csv", "sweep.json", "sweep.png", "sweep-units.png")]
    with open(paths[0], encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert rows[0]["point"] == "rank=8"
    assert (rows[0]["adapter"], rows[0]["rank"], rows[0]["seeds"]) == ("clorae", "8", "3")
    assert (float(rows[0]["All_mean"]), float(rows[0]["All_sd"]), rows[2]["All_sd"]) == (78, 7, "")
    content = json.loads(paths[1].read_text(encoding="utf-8"))
    assert content["rows"][1]["settings"] == {"adapter": "clorae", "rank": 16}
    assert content["rows"][1]["scores"]["a/entity"] == {
        "mean": 71,
        "sd": statistics.stdev([70, 72]),
        "values": [70, 72],
    }
    assert [entry["number"] for entry in content["unfinished"]] == [5, 8]
    assert len(content["problems"]) == 1
    assert not list((tmp_path / "runs").glob(".*")), "nothing half-written is left"
    write(sweep, found)


def test_a_sweep_of_seeds_alone_has_no_plot(tmp_path: Path) -> None:
    sweep = sweep_of(tmp_path, seeds=[0, 1])
    for point in sweep.points:
        finish(point, a_entity=50.0 + point.number)
    found = collected(sweep)
    assert (found.keys, found.rows[0].mean("All")) == ([], 50.5)
    assert [path.name for path in write(sweep, found)] == ["sweep.csv", "sweep.json"]
