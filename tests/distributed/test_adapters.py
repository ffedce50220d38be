"""Every adapter method on two ranks under ZeRO-2 and ZeRO-3, in one launch (see adapter_worker.py)."""

from __future__ import annotations

import json

import pytest

from tests.helpers.fork_server import two_ranks

METHODS = (
    "clorae",
    "clorae, teacher not detached",
    "clorae, no gate",
    "clorae, mixed tasks, checkpointing",
    "moslora",
    "loramoe",
    "hydralora",
    "mtllora",
    "mtllora, mixed tasks, checkpointing",
)
CASES = [f"{name}/{stage}" for name in METHODS for stage in (2, 3)]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, float]]:
    results = tmp_path_factory.mktemp("adapters") / "results.json"
    two_ranks("adapter_worker.py", results)
    return json.loads(results.read_text(encoding="utf-8"))


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("case", CASES)
def test_two_ranks_equal_one_process_and_the_saved_adapter_reproduces_the_logits(
    found: dict[str, dict[str, float]], case: str
) -> None:
    result = found[case]
    assert result["weights"] == result["expected"] > 0
    assert result["moved"] > 1e-6  # every trained weight
    assert result["difference"] < 1e-6
    assert result["reloaded"] == 0.0
    assert result["absent"] == 0.0  # the expert of a task without samples, under SGD
