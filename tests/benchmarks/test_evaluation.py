"""The throughput of evaluation: the plain loop beside it generates for the same samples, with their task."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from lvlm_clorae.data.collate import Collator
from lvlm_clorae.data.dataset import ShardDataset
from lvlm_clorae.data.index import load_index
from lvlm_clorae.models import Processor
from lvlm_clorae.training.evaluation import Evaluator
from tests.helpers.launch import REPOSITORY, small_shards

sys.path.insert(0, str(REPOSITORY / "benchmarks"))

import evaluation as benchmark


class Model:
    """Keeps the task and the number of rows of each batch that it generates for."""

    def __init__(self) -> None:
        self.task, self.batches = "", list[tuple[str, int]]()

    def set_task(self, task: str) -> None:
        self.task = task

    def generate(self, input_ids: torch.Tensor, **settings: Any) -> torch.Tensor:
        assert (settings["max_new_tokens"], settings["do_sample"]) == (8, False)
        self.batches.append((self.task, len(input_ids)))
        return input_ids


@pytest.mark.integration
@pytest.mark.usefixtures("process_group")
def test_the_plain_loop_generates_for_every_batch(tmp_path: Path) -> None:
    shards = small_shards(tmp_path / "shards", train=1, dev=3, test=1)
    index = load_index(shards)
    tasks = index.dataset_tasks("dev")
    collator = Collator(Processor.from_pretrained(REPOSITORY / "lvlm_clorae/models/demo"), tasks)
    evaluator, model = Evaluator(ShardDataset(index, shards, "dev"), collator, 2, 8), Model()
    benchmark.PlainLoop(evaluator, model)()
    assert model.batches == [(task.task, rows) for task in tasks.values() for rows in (2, 1)]
