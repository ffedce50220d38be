"""What a model can read and say of a dataset: prompts and targets that are cut, gold that is lost, the F1 ceiling."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from lvlm_clorae.data.dataset import ShardDataset
from lvlm_clorae.data.index import DatasetTask
from lvlm_clorae.data.reader import InvalidSample
from lvlm_clorae.errors import UserError
from lvlm_clorae.tasks import (
    Counts,
    Scored,
    build_prompt,
    fit_prompt,
    format_answer,
    gold_tuples,
    score_sample,
    visible,
)
from lvlm_clorae.tasks.prompt import PromptTooLong

if TYPE_CHECKING:
    from rich.table import Table

    from lvlm_clorae.models.processor import Processor

MAX_SAMPLES = 1000
"""Samples of a dataset task that are examined, evenly spaced."""
CHUNK = 64
"""Samples that are read together, concurrently from a remote storage."""


@dataclass
class Limits:
    """Counts of a dataset task, in the examined samples. Gold is counted in tuples, as it is scored."""

    samples: int = 0
    prompts_cut: int = 0
    targets_cut: int = 0
    gold: int = 0
    gold_outside_text: int = 0
    """In the part of the text that is cut."""
    gold_outside_target: int = 0
    """In the part of the target that is cut."""
    gold_lost_in_tokenizer: int = 0
    """Changed by encoding and decoding: T5's vocabulary has no ``<``, ``{``, emoji, Chinese or Arabic."""
    f1_ceiling: float = 0.0
    """F1 in percent of a model that gives the gold answer wherever it can [%]."""
    needed_source_length: int = 0
    """Tokens of the longest question with objects and labels, if longer than the limit, which is an error; else 0."""

    @property
    def any_cut(self) -> bool:
        """Whether anything is cut or lost."""
        return self.prompts_cut + self.targets_cut > 0 or self.f1_ceiling < 100


def measure_limits(
    dataset: ShardDataset,
    dataset_tasks: Iterable[DatasetTask],
    processor: Processor,
    max_source_length: int,
    max_target_length: int,
) -> dict[str, Limits]:
    """Examine up to ``MAX_SAMPLES`` samples of each dataset task, without images. Invalid ones are left out.

    Raises UserError if a shard cannot be read.
    """
    found = {}
    for task in dataset_tasks:
        refs = dataset.refs(task.name)
        refs = refs[:: -(-len(refs) // MAX_SAMPLES) or 1]
        samples = []
        for start in range(0, len(refs), CHUNK):
            for sample in dataset.__getitems__(refs[start : start + CHUNK]):
                if sample.error and not isinstance(sample.error, InvalidSample):
                    raise sample.error
                samples += [] if sample.error else [sample.data]  # an invalid one is reported when it is used
        found[task.name] = _limits(samples, task, processor, max_source_length, max_target_length)
    return found


def check_prompts(found: Mapping[str, Limits], max_source_length: int) -> None:
    """Raise UserError if the question, objects and labels of a sample alone exceed ``max_source_length``."""
    for name, limits in found.items():
        if limits.needed_source_length:
            raise UserError(
                f"{name}: question, objects and labels have up to {limits.needed_source_length} tokens, more than "
                f"max_source_length = {max_source_length}. Set --max_source_length, with room for the text."
            )


def limits_table(found: Mapping[str, Limits], title: str) -> Table:
    """Format the limits of each dataset task for a terminal."""
    from rich.table import Table

    table = Table(title=title, title_justify="left")
    columns = "samples", "prompts cut", "targets cut", "gold", "outside text", "outside target", "lost in tokenizer"
    for column in ("dataset task", *columns, "F1 ceiling"):
        table.add_column(column, justify="left" if column == "dataset task" else "right", overflow="fold")
    for name, limits in found.items():
        *counts, ceiling, _ = vars(limits).values()
        table.add_row(name, *map(str, counts), f"{ceiling:.1f}")
    return table


def _limits(
    samples: Sequence[dict[str, Any]], task: DatasetTask, processor: Processor, max_source: int, max_target: int
) -> Limits:
    limits, counts = Limits(samples=len(samples)), Counts()

    def fits(prompt: str) -> bool:
        return processor.prompt_tokens(prompt) <= max_source

    for sample in samples:
        try:
            _, read = fit_prompt(sample, task.subtask, task.labels, fits, processor.reads_images)
        except PromptTooLong:
            read = 0
            bare = build_prompt({**sample, "tokens": [], "text": ""}, task.subtask, task.labels, processor.reads_images)
            limits.needed_source_length = max(limits.needed_source_length, processor.prompt_tokens(bare))
        (ids,) = processor.answer_ids([format_answer(visible(sample, read), task.subtask)])
        limits.prompts_cut += read < len(sample["tokens"])
        limits.targets_cut += len(ids) >= max_target
        gold = Counter(gold_tuples(sample, task.subtask))
        kept = Counter(gold_tuples(visible(sample, read), task.subtask)) & gold
        whole, cut = (_said(processor, some, sample, task) for some in (ids, ids[:max_target]))
        said = kept & Counter(whole.tuples)
        limits.gold += gold.total()
        limits.gold_outside_text += (gold - kept).total()
        limits.gold_lost_in_tokenizer += (kept - said).total()
        limits.gold_outside_target += (said - Counter(cut.tuples)).total()
        counts += cut.counts
    limits.f1_ceiling = counts.f1 if counts.gold else 100.0
    return limits


def _said(processor: Processor, ids: Sequence[int], sample: dict[str, Any], task: DatasetTask) -> Scored:
    answer = processor.decode(torch.tensor([ids]))[0] if ids else ""
    return score_sample(sample, answer, task.subtask, task.labels)
