"""Evaluate a trained run on any split and shards, with and without images."""

import logging
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lvlm_clorae.analysis.tables import Sheet
from lvlm_clorae.data.collate import Collator
from lvlm_clorae.data.dataset import ShardDataset
from lvlm_clorae.data.index import DatasetTask
from lvlm_clorae.data.storage import open_storages
from lvlm_clorae.errors import UserError, located, nearest
from lvlm_clorae.files import file_errors
from lvlm_clorae.inference.extractor import Extractor
from lvlm_clorae.models.constrained import check_tokenizer
from lvlm_clorae.tasks import Counts, confusion
from lvlm_clorae.training import distributed
from lvlm_clorae.training.config import TrainConfig
from lvlm_clorae.training.config_loading import read_config
from lvlm_clorae.training.evaluation import EvaluationResult, Evaluator
from lvlm_clorae.training.reporting import total_f1

logger = logging.getLogger(__name__)

DEFAULT_BATCH = 16
TEXT_ONLY = "text only: the images of %s samples are not read"


@dataclass(frozen=True)
class Scores:
    """Scores of a run on a split, by dataset task."""

    split: str
    counts: Mapping[str, Counts]
    malformed: Mapping[str, int]  # pieces of answers that could not be parsed
    confusion: Mapping[str, Counter[tuple[str, str]]]  # number of each (gold label, predicted label)
    blank: Mapping[str, Counts] | None = None  # counts with all images left out
    limit: int | None = None  # number of samples of each dataset task, if they are not all

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain data, with precision, recall and F1 in percent by dataset task, and their sum."""
        dataset_tasks: dict[str, Any] = {}
        for name, count in self.counts.items():
            shares = {"precision": count.precision, "recall": count.recall, "f1": count.f1}
            confused = [[*labels, number] for labels, number in self.confusion[name].most_common()]
            dataset_tasks[name] = {**vars(count), **shares, "malformed": self.malformed[name], "confusion": confused}
            if self.blank:
                dataset_tasks[name]["f1_without_images"] = self.blank[name].f1
        found = {"split": self.split, "limit": self.limit, "all": total_f1(self.counts)}
        found["maximum"] = 100.0 * len(dataset_tasks)
        if self.blank:
            found["all_without_images"] = total_f1(self.blank)
        return {**found, "dataset_tasks": dataset_tasks}

    def table(self) -> Sheet:
        """Scores by dataset task, and All."""
        columns = ["dataset", "P", "R", "F1", *(("F1 blank", "difference") if self.blank else ()), "malformed"]
        rows = []
        for name, count in self.counts.items():
            shares = f"{count.precision:.1f}", f"{count.recall:.1f}", *self._f1(count.f1, name)
            rows.append([name, *shares, str(self.malformed[name])])
        rows.append(["All", "", "", *self._f1(total_f1(self.counts)), str(sum(self.malformed.values()))])
        return Sheet(f"{self.split}, first {self.limit} samples of each" if self.limit else self.split, columns, rows)

    def confusion_table(self, most: int = 5) -> Sheet:
        """The most frequent wrong, missed and spurious labels, up to ``most`` a dataset task."""
        rows = []
        for name, counts in self.confusion.items():
            wrong = [(labels, number) for labels, number in counts.most_common() if labels[0] != labels[1]]
            rows += [[name, *labels, str(number)] for labels, number in wrong[:most]]
        return Sheet("most often confused", ["dataset", "gold", "predicted", "times"], rows, left=3)

    def _f1(self, f1: float, dataset_task: str | None = None) -> list[str]:
        if not self.blank:
            return [f"{f1:.1f}"]
        blank = self.blank[dataset_task].f1 if dataset_task else total_f1(self.blank)
        return [f"{f1:.1f}", f"{blank:.1f}", f"{f1 - blank:.1f}"]


@dataclass(frozen=True)
class Samples:
    """Samples for an evaluation, and the configuration of the run if it is known."""

    split: str
    dataset_tasks: dict[str, DatasetTask]
    dataset: ShardDataset
    config: TrainConfig | None


def find_samples(
    adapter: Path, split: str, shards: str | None = None, datasets: Sequence[str] | None = None
) -> Samples:
    """Find the samples of a split for an adapter directory (``adapter``, ``best`` or a copy), without loading a model.

    ``shards`` are by default the run's, ``datasets`` all of them.

    Raises:
        UserError: the shards cannot be found or read, or have no such split or dataset
    """
    path = adapter.resolve().parent / "config.yaml"
    config = read_config(path) if path.is_file() else None
    if shards is not None:
        where: Any = nullcontext()
    elif config is not None:
        shards, where = config.shards, located(f"{path}: its shards, in place of which --shards can name others")
    else:
        raise UserError(f"{adapter}: not in a run directory, so its data is unknown. Give --shards.")
    cache = (config.cache_dir, config.cache_gib) if config else ()
    with where:
        dataset = ShardDataset(*open_storages(shards, *cache), split)
    found = dataset.index.dataset_tasks(split)
    if not found:
        raise UserError(f"{shards}: no dataset has a split {split}. Choose another --split.")
    known = dict.fromkeys(dataset_task.dataset for dataset_task in found.values())
    for name in datasets or ():
        if name not in known:
            raise UserError(f'{shards}: {split} has no dataset "{name}".{nearest(name, known)}')
    return Samples(split, {k: v for k, v in found.items() if not datasets or v.dataset in datasets}, dataset, config)


def make_folder(folder: Path, split: str) -> None:
    """Make a directory for predictions. Raise UserError if it cannot be made or already has some of the split."""
    with file_errors(f"{folder}: cannot be written"):
        folder.mkdir(parents=True, exist_ok=True)
    if any(folder.glob(f"predictions-*-{split}.jsonl")):
        raise UserError(f"{folder}: already has predictions of {split}. Choose another directory.")


def evaluate_run(
    adapter: Path,
    samples: Samples,
    *,
    batch_size: int | None = None,
    match: str | None = None,
    constrained: bool | None = None,
    blank_images: bool = False,
    predictions: Path | None = None,
    begin: Callable[[str, int], None] = lambda description, samples: None,
    advance: Callable[[int], None] = lambda samples: None,
) -> Scores:
    """Evaluate an adapter directory. Collective: call it on every rank of the process group.

    Args:
        batch_size, match, constrained: by default the run's, which reproduce its scores
        blank_images: evaluate a second time with all images left out
        predictions: directory for ``predictions-<dataset>-<split>.jsonl``, written with images
        begin, advance: callbacks for progress: description and number of samples, then samples done

    Raises:
        UserError: the weights cannot be read, or do not know a task of the samples
    """
    config, dataset_tasks = samples.config, samples.dataset_tasks
    extractor = Extractor.from_pretrained(adapter, device=distributed.device())
    if constrained is None:
        constrained = config is not None and config.constrained
    if constrained:
        check_tokenizer(extractor.processor)
    check_tasks(extractor, dataset_tasks.values())
    if not extractor.processor.reads_images:
        _warn_text_only(adapter, samples, blank_images)

    def score(images: bool) -> EvaluationResult:
        limits = extractor.schema["max_source_length"], extractor.schema["max_target_length"]
        evaluation = Evaluator(
            samples.dataset,
            Collator(extractor.processor, dataset_tasks, *limits, use_images=images),
            batch_size or (config.per_device_eval_batch_size if config else DEFAULT_BATCH),
            limits[1],
            match or (config.match if config else "exact"),
            constrained,
        )
        begin(samples.split if images else f"{samples.split} without images", len(evaluation))
        return evaluation(extractor.model, advance)

    found = score(True)
    if predictions:
        found.write(predictions)
    malformed = dict.fromkeys(dataset_tasks, 0)
    confused = {name: Counter[tuple[str, str]]() for name in dataset_tasks}
    for line in found.gathered():  # ranks other than 0 have no lines
        name = f"{line['dataset']}/{line['subtask']}"
        malformed[name] += line["malformed"]
        confused[name] += confusion(line["gold"], line["predicted"], line["subtask"])
    blank = score(False).counts if blank_images else None
    return Scores(samples.split, found.counts, malformed, confused, blank, samples.dataset.limit)


def _warn_text_only(adapter: Path, samples: Samples, blank_images: bool) -> None:
    if blank_images:
        raise UserError(f"{adapter}: the base is text only and reads no images. Leave --blank_images out.")
    if distributed.rank() == 0:
        logger.warning(TEXT_ONLY, samples.dataset.index.count_images(samples.split))


def check_tasks(extractor: Extractor, dataset_tasks: Iterable[DatasetTask]) -> None:
    """Raise UserError if the adapter distinguishes tasks and does not know one of these."""
    tasks = extractor.schema["tasks"]
    for dataset_task in dataset_tasks:
        if hasattr(extractor.model, "set_task") and dataset_task.task not in tasks:
            raise UserError(
                f"{dataset_task.dataset} has the task {dataset_task.task}, but the adapter has experts for "
                f"{', '.join(tasks)} only. Choose other datasets with --datasets."
            )
