"""Every adapter method on two ranks under ZeRO-2 and ZeRO-3, all in one launch (see adapter_worker.py)."""

from __future__ import annotations

import json

import pytest

from tests.launch import two_ranks

METHODS = ("clorae", "clorae, drawn tokens", "clorae, no gate", "moslora", "loramoe")
CASES = [f"{name}/{stage}" for name in METHODS for stage in (2, 3)]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, float]]:
    results = tmp_path_factory.mktemp("adapters") / "results.json"
    two_ranks("adapter_worker.py", results)
    return json.loads(results.read_text(encoding="utf-8"))


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("case", CASES)
def test_two_ranks_train_what_one_process_does_and_the_saved_adapter_gives_their_logits(
    found: dict[str, dict[str, float]], case: str
) -> None:
    result = found[case]
    assert result["weights"] == result["expected"] > 0
    assert result["moved"] > 1e-6  # every trained weight
    assert result["difference"] < 1e-6
    assert result["reloaded"] == 0.0
    assert result["absent"] == 0.0  # the expert of the task that no sample had, under SGD
