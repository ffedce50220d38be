"""The bytes that analysis/ says are what two real ranks hand to their collectives and keep (see scaling_worker.py)."""

from __future__ import annotations

import json
from collections import Counter
from functools import cache
from typing import Any

import pytest

from lvlm_clorae.analysis.memory import memory
from lvlm_clorae.analysis.parameters import describe
from lvlm_clorae.analysis.scaling import Plan, make_plan
from lvlm_clorae.analysis.traffic import Zero, traffic
from lvlm_clorae.training.config import make_config
from tests.distributed.scaling_worker import CASES, RUN
from tests.launch import small_shards, two_ranks

pytestmark = [pytest.mark.slow, pytest.mark.distributed]

KINDS = {"all_gather_into_tensor": "all_gather", "reduce_scatter_tensor": "reduce_scatter"}
ROUGH = ("nothing kept", "some kept", "few live", "checkpointing")
"""Cases in which a formula of the order of modules stands for what ZeRO-3's prefetcher does; the others are exact."""


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("scaling")
    small_shards(folder / "shards")
    two_ranks("scaling_worker.py", folder, timeout=900)
    return json.loads((folder / "results.json").read_text(encoding="utf-8"))


@cache
def plan_of(case: str) -> Plan:
    settings, zero = CASES[case]
    config = make_config({**RUN, "precision": "fp32", **settings})
    return make_plan(describe(config, ["mner", "mre", "mee"]), config, 2, Zero.read(zero))


@pytest.mark.parametrize("case", CASES)
def test_what_ranks_send(found: dict[str, dict[str, Any]], case: str) -> None:
    plan = plan_of(case)
    calls: Counter[str] = Counter()
    payload: Counter[str] = Counter()
    for one in traffic(plan.weights, plan.setting):
        calls[one.kind] += one.calls
        payload[one.kind] += one.payload
    measured = {KINDS.get(kind, kind): number for kind, number in found[case]["bytes"].items()}
    counted = {KINDS.get(kind, kind): number for kind, number in found[case]["calls"].items()}
    assert set(measured) == set(counted) == set(payload)
    rough = case.endswith(ROUGH)
    for kind, number in measured.items():
        assert payload[kind] == (pytest.approx(number, rel=0.05) if rough and kind == "all_gather" else number), kind
    # Calls only carry the latency of the estimate: where a bucket ends is not modelled.
    assert sum(calls.values()) == pytest.approx(sum(counted.values()), rel=0.25 if rough else 0.1, abs=6)


@pytest.mark.parametrize("case", CASES)
def test_what_a_rank_keeps(found: dict[str, dict[str, Any]], case: str) -> None:
    plan, measured = plan_of(case), found[case]["kept"]
    kept = memory(plan.weights, plan.setting)
    assert not kept.host
    kinds = ["frozen weights", "trained weights", "weights kept whole", "moments"]
    kinds += ["buckets", "fp32 gradients", "master weights"]
    if plan.setting.zero.stage == 3:
        kinds.append("gradients")
    for kind in kinds:
        assert kept.gpu.get(kind, 0) == pytest.approx(measured.get(kind, 0), rel=0.05), kind
    gathered = kept.gpu.get("weights gathered", 0)  # an upper bound, to which the prefetcher may add a weight
    assert measured.get("weights gathered", 0) <= 1.1 * gathered
