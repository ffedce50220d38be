"""Estimates of communication and pace, and their command line."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from lvlm_clorae.analysis.zero import Zero
from tests.helpers.weights import small_model
from tools import scaling
from tools.scaling import CALL, HOP_INSIDE, HOP_OUTSIDE, INSIDE, Plan
from tools.traffic import Collective, Step

MODEL = small_model()
PLAN = Plan(MODEL, frozenset(weight.name for weight in MODEL), Step(8, Zero(2)), micro_batch=2, patches=16)


def test_operations_of_a_micro_step() -> None:
    joined = 16 + scaling.TEXT + scaling.ANSWER
    language = (4 * (3 * 1000 + 500) + 6 * 30) * joined
    assert scaling.flops(PLAN) == 2 * (language + 2 * 300 * 16)
    again = replace(PLAN, step=replace(PLAN.step, checkpointing=True))
    assert scaling.flops(again) - scaling.flops(PLAN) == 2 * 2 * (3 * 1010) * joined


def test_seconds_of_a_collective() -> None:
    one = Collective("", "all_reduce", 3, 10**9)
    inside = scaling.seconds(one, 8, node=1e9)
    assert inside == pytest.approx(3 * (CALL + 2 * 7 * HOP_INSIDE) + 2 * 7 / 8 * 1e9 / INSIDE)
    outside = scaling.seconds(one, 64, node=25e9)
    hops = 7 * HOP_INSIDE + 3 * HOP_OUTSIDE
    assert outside == pytest.approx(3 * (CALL + 2 * hops) + 2 * 63 / 64 * 1e9 / 25e9)


@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize("node", [1e3, 1e9, 1e15])
def test_overlap_helps_and_one_rank_has_full_efficiency(stage: int, node: float) -> None:
    zero = Zero(stage, stage3_param_persistence_threshold=0)
    one, many = (
        scaling.pace(replace(PLAN, step=replace(PLAN.step, zero=zero, ranks=ranks)), node) for ranks in (1, 64)
    )
    assert one.plain == one.overlapped == 1
    assert 0 < many.plain <= many.overlapped < 1
    assert many.exposed <= many.talking


def printed(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    scaling.main(list(words))
    return capsys.readouterr().out


def test_estimates_of_a_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    flags = "--world-size 8 --zero-stage 3 --gradient_accumulation_steps 2"
    counted = json.loads(printed(capsys, "--json", *flags.split()))
    assert (counted["ranks"], counted["zero"]["stage"], counted["accumulation"]) == (8, 3, 2)
    purposes = {"losses", "gradients", "norm", "updated weights", "weights"}
    assert {one["purpose"] for one in counted["collectives"]} == purposes
    assert counted["sent"] == pytest.approx(sum(one["sent"] for one in counted["collectives"]))
    assert set(counted["pace"]) == set(scaling.LINKS)
    text = printed(capsys, "--world-size", "8")
    assert all(word in text for word in ("8 ranks, ZeRO-2", "all_reduce", "25 GbE"))


def test_the_auxiliary_loss_of_a_method_is_counted(capsys: pytest.CaptureFixture[str]) -> None:
    sizes = {}
    for name, words in {"clorae": [], "loramoe": [], "lora": [], "clorae, beta 0": ["--beta", "0"]}.items():
        line = ["--json", "--world-size", "2", "--adapter", name.split(",")[0], *words]
        collectives = json.loads(printed(capsys, *line))["collectives"]
        sizes[name] = sum(one["payload"] for one in collectives if one["purpose"] == "losses") // 4
    layers = 72  # of the demo base, all of whose linear layers are adapted
    assert sizes == {"clorae": layers + 6, "loramoe": 6 * layers + 6, "lora": 6, "clorae, beta 0": 6}


def test_mistakes_end_with_code_2(capsys: pytest.CaptureFixture[str]) -> None:
    for words, part in (("--model demo", "--world_size"), ("--world_size 2 --zero_stage 5", "zero_stage")):
        with pytest.raises(SystemExit, match="2"):
            scaling.main(words.split())
        assert part in capsys.readouterr().err
