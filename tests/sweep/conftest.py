"""A sweep in which not all is well."""

from __future__ import annotations

from pathlib import Path

import pytest

from lvlm_clorae.sweep.points import Sweep
from tests.sweep.helpers import begin, finish, sweep_of


@pytest.fixture
def sweep(tmp_path: Path) -> Sweep:
    """Two ranks and plain LoRA, three seeds; one run failed, one has damaged scores, one waits."""
    sweep = sweep_of(
        tmp_path,
        settings={"model": "owner/name"},
        grid={"rank": [8, 16]},
        points=[{"adapter": "lora"}],
        seeds=[0, 1, 2],
    )
    for number, (entity, relation) in enumerate([(50, 21), (60, 25), (55, 23), (70, 30), (72, 30)]):
        finish(sweep.points[number], a_entity=float(entity), b_relation=float(relation))
    begin(sweep.points[5], state="failed", message="out of memory")
    finish(sweep.points[6], a_entity=40.0, b_relation=10.0)
    (finish(sweep.points[7], a_entity=40.0) / "scores.json").write_text('{"all": 3')
    return sweep
