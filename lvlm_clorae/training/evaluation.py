"""Distributed evaluation: every sample generated for once, counts summed over ranks, F1 from the sums."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch

from lvlm_clorae.data.batches import Batcher, Unit, evaluation_batches
from lvlm_clorae.data.stream import BadSamples
from lvlm_clorae.models.generation import generate_answers
from lvlm_clorae.tasks import Counts, score_sample
from lvlm_clorae.training import distributed


def evaluate(
    model: Any,
    batcher: Batcher,
    units: Iterable[Unit],
    *,
    batch_size: int,
    max_new_tokens: int,
    predictions: Path | None = None,
    advance: Callable[[int], None] = lambda samples: None,
) -> dict[str, Counts]:
    """Generate for every sample of the units' split and score the answers. Collective; the same on every rank.

    Args:
        model: base or PEFT model; adapters with tasks are told the unit's
        batcher: of the split
        batch_size: samples a rank generates for at once
        predictions: directory for ``predictions-<dataset>-<subtask>-<split>-rank<r>.jsonl``
        advance: called with the number of samples done on this rank

    Returns:
        counts per unit, summed over ranks.
    """
    was_training = model.training
    model.eval()
    totals, bad = {}, BadSamples()
    for unit in units:
        if hasattr(model, "set_task"):
            model.set_task(unit.task)
        counts, lines = Counts(), []
        for batch in evaluation_batches(
            batcher, unit, rank=distributed.rank(), world_size=distributed.world_size(), batch_size=batch_size
        ):
            bad.add(batch.bad)
            tensors = {name: tensor.to(distributed.device()) for name, tensor in batch.tensors.items()}
            synced = distributed.world_size() > 1
            with distributed.generating(model):
                answers = generate_answers(model, batcher.processor, tensors, max_new_tokens, synced_gpus=synced)
            rows = zip(batch.keys, batch.samples, batch.counted, answers, strict=True)
            for key, sample, counted, answer in rows:
                if not counted:
                    continue
                scored, tuples = score_sample(sample, answer, unit.subtask, unit.labels)
                counts += scored
                lines.append({"key": key, "text": sample["text"], "answer": answer, "predicted": tuples})
            advance(sum(batch.counted))
        totals[unit.name] = _sum(counts)
        if predictions:
            name = f"predictions-{unit.name.replace('/', '-')}-{batcher.split}-rank{distributed.rank()}.jsonl"
            text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
            (predictions / name).write_text(text, encoding="utf-8")
    model.train(was_training)
    return totals


def _sum(counts: Counts) -> Counts:
    values = torch.tensor([counts.tp, counts.predicted, counts.gold], dtype=torch.long, device=distributed.device())
    tp, predicted, gold = distributed.sum_over_ranks(values).tolist()
    return Counts(tp, predicted, gold)
