"""Evaluation on two ranks: scores and answers equal to those of one rank, and the weights of rank 0 on both."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from lvlm_clorae.losses.achievement import achievement_weights
from tests.distributed.evaluation_worker import REFERENCE
from tests.helpers.fork_server import train, two_ranks
from tests.helpers.launch import environment, free_port, records, small_shards

SETTINGS = "--num_train_epochs 4 --max_target_length 24 --per_device_eval_batch_size 3".split()


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("evaluated")
    shards = small_shards(directory / "shards", train=64, dev=3, test=7)
    train(directory / "run", 1, "--shards", shards, *SETTINGS)
    return directory / "run"


def evaluate(run: Path, ranks: int, output: Path) -> dict[str, object]:
    launcher = [sys.executable, "-m"]
    if ranks > 1:
        path = str(Path(sys.executable).with_name("deepspeed"))
        launcher = [path, "--num_gpus", str(ranks), "--master_port", str(free_port()), "--module"]
    line = [*launcher, "lvlm_clorae", "evaluate", "--run", str(run), "--predictions", str(output), "--json"]
    done = subprocess.run(line, env=environment(), capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    if ranks == 1:
        return json.loads(done.stdout)  # nothing else is on it
    printed = done.stdout[done.stdout.index("{\n") : done.stdout.rindex("\n}") + 2]
    return json.loads(printed)


@pytest.mark.slow
@pytest.mark.distributed
def test_two_ranks_give_exactly_the_scores_and_answers_of_one(run: Path, tmp_path: Path) -> None:
    """7 samples of 5 dataset tasks in batches of 3: 12 batches, some of two tasks."""
    alone, together = (evaluate(run, ranks, tmp_path / str(ranks)) for ranks in (1, 2))
    assert alone == together
    own = json.loads((run / "scores.json").read_text())
    assert alone["all"] == own["all"] > 0
    names = sorted(path.name for path in (tmp_path / "1").iterdir())
    assert len(names) == 4
    for name in names:
        text = (tmp_path / "1" / name).read_text()
        assert text == (tmp_path / "2" / name).read_text() == (run / "predictions" / name).read_text()


@pytest.mark.slow
def test_the_weights_of_the_next_epoch_are_equation_9_and_10_of_the_measured_f1(run: Path) -> None:
    reference = {"entity": 90.0, "relation": 90.0, "trigger": 95.0, "argument": 85.0}
    evaluated = records(run, "dev")
    assert len(evaluated) == 4
    for record in evaluated:
        needed = {dataset_task: reference[dataset_task.split("/")[1]] for dataset_task in record["f1"]}
        assert record["weights"] == achievement_weights(record["f1"], needed, gamma=2.0, margin=1.05)
    assert len(set(evaluated[-1]["weights"].values())) > 1


@pytest.mark.slow
@pytest.mark.distributed
def test_both_ranks_have_the_weights_of_rank_0(tmp_path: Path) -> None:
    """Rank 1 has another F1 here, unlike in a run, to show whose weights are used."""
    two_ranks("evaluation_worker.py", tmp_path)
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1))
    f1 = {"a/entity": 33.3, "b/relation": 12.0}
    assert first["weights"] == second["weights"] == achievement_weights(f1, REFERENCE, gamma=1.5, margin=1.1)
    assert first["f1"] == second["f1"] == f1
    assert (first["gathered"], second["gathered"]) == (["0a", "0b", "1a"], None)
