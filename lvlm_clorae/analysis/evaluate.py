"""A trained run scored again: on any split and shards, and without its pictures."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lvlm_clorae.data.batches import Batcher
from lvlm_clorae.data.places import open_shards
from lvlm_clorae.data.shard_reader import ShardReader
from lvlm_clorae.data.units import Unit, find_units
from lvlm_clorae.errors import UserError, nearest
from lvlm_clorae.extractor import Extractor
from lvlm_clorae.models.constrained import check_tokenizer
from lvlm_clorae.tasks import Counts, confusion
from lvlm_clorae.training import distributed
from lvlm_clorae.training.config import TrainConfig, read_config
from lvlm_clorae.training.evaluation import Evaluated, Evaluation
from lvlm_clorae.training.reporting import total_f1

if TYPE_CHECKING:
    from rich.table import Table

DEFAULT_BATCH = 16


@dataclass(frozen=True)
class Scores:
    """What a run scores on a split."""

    split: str
    counts: Mapping[str, Counts]
    malformed: Mapping[str, int]
    """Pieces of the answers that could not be read, by unit."""
    confusion: Mapping[str, Counter[tuple[str, str]]]
    """How often each (gold label, predicted label) occurs, by unit."""
    blank: Mapping[str, Counts] | None = None
    """The counts with every picture left out."""

    def to_dict(self) -> dict[str, Any]:
        """Plain data: per unit counts, precision, recall, F1 and F1 ``without_pictures`` in percent; their sums."""
        units: dict[str, Any] = {}
        for name, count in self.counts.items():
            shares = {"precision": count.precision, "recall": count.recall, "f1": count.f1}
            confused = [[*labels, number] for labels, number in self.confusion[name].most_common()]
            units[name] = {**vars(count), **shares, "malformed": self.malformed[name], "confusion": confused}
            if self.blank:
                units[name]["f1_without_pictures"] = self.blank[name].f1
        found = {"split": self.split, "all": total_f1(self.counts), "maximum": 100.0 * len(units)}
        if self.blank:
            found["all_without_pictures"] = total_f1(self.blank)
        return {**found, "units": units}

    def table(self) -> Table:
        """A row a unit, and All."""
        from rich.table import Table

        table = Table(title=self.split, title_justify="left")
        table.add_column("dataset")
        for name in ("P", "R", "F1", *(("F1 blank", "fall") if self.blank else ()), "malformed"):
            table.add_column(name, justify="right")
        for unit, count in self.counts.items():
            shares = f"{count.precision:.1f}", f"{count.recall:.1f}", *self._f1(count.f1, unit)
            table.add_row(unit, *shares, str(self.malformed[unit]))
        table.add_section()
        table.add_row("All", "", "", *self._f1(total_f1(self.counts)), str(sum(self.malformed.values())))
        return table

    def confusion_table(self, most: int = 5) -> Table:
        """The labels most often taken for others, missed or made up, up to ``most`` a unit."""
        from rich.table import Table

        table = Table(title="most often confused", title_justify="left")
        for name in ("dataset", "gold", "predicted"):
            table.add_column(name)
        table.add_column("times", justify="right")
        for unit, counts in self.confusion.items():
            wrong = [(labels, number) for labels, number in counts.most_common() if labels[0] != labels[1]]
            for (gold, predicted), number in wrong[:most]:
                table.add_row(unit, gold, predicted, str(number))
            table.add_section()
        return table

    def _f1(self, f1: float, unit: str | None = None) -> list[str]:
        if not self.blank:
            return [f"{f1:.1f}"]
        blank = self.blank[unit].f1 if unit else total_f1(self.blank)
        return [f"{f1:.1f}", f"{blank:.1f}", f"{f1 - blank:.1f}"]


@dataclass(frozen=True)
class Samples:
    """What a run is to be scored on, and its configuration where it is known."""

    split: str
    units: dict[str, Unit]
    reader: ShardReader
    config: TrainConfig | None


def find_samples(
    adapter: Path, split: str, shards: str | None = None, datasets: Sequence[str] | None = None
) -> Samples:
    """The samples of ``split`` for an adapter directory; nothing heavy is loaded.

    Args:
        adapter: a run's ``adapter`` or ``best``, or such a directory elsewhere
        shards: where the samples lie; by default where the run had them
        datasets: only these

    Raises:
        UserError: shards that cannot be read or found; the split or a dataset is absent.
    """
    path = adapter.resolve().parent / "config.yaml"
    config = read_config(path) if path.is_file() else None
    if shards is None:
        if config is None:
            raise UserError(f"{adapter}: lies in no run directory that says where its data is. Give --shards.")
        shards = config.shards
    cache = Path(config.cache_dir) if config and config.cache_dir else None
    reader = ShardReader(*open_shards(shards, cache, int((config.cache_gib if config else 0) * 2**30)))
    units = find_units(reader.index, split)
    if not units:
        raise UserError(f"{shards}: no dataset has a split {split}. Choose another --split.")
    known = dict.fromkeys(unit.dataset for unit in units.values())
    for name in datasets or ():
        if name not in known:
            raise UserError(f'{shards}: {split} has no dataset "{name}".{nearest(name, known)}')
    chosen = {name: unit for name, unit in units.items() if not datasets or unit.dataset in datasets}
    return Samples(split, chosen, reader, config)


def make_folder(folder: Path, split: str) -> None:
    """A folder for predictions. Raises UserError where it cannot be made, or has those of the split already."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{folder}: cannot be written ({error.strerror}).") from None
    if any(folder.glob(f"predictions-*-{split}.jsonl")):
        raise UserError(f"{folder}: has predictions of {split} already, which are never overwritten. Give another.")


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
    """Score an adapter directory. Collective: call it on every rank of a joined process group.

    Args:
        batch_size: samples a rank generates for at once; by default the run's, under which the scores are the run's own
        match: how tuples are matched (docs/scoring.md); by default as in the run
        constrained: whether answers are made of label names, words of the text, objects and separators alone; by
            default as in the run
        blank_images: score a second time with every picture left out
        predictions: directory for ``predictions-<dataset>-<split>.jsonl``; those with pictures
        begin, advance: told what comes and how far it is

    Raises:
        UserError: the weights cannot be read, or know a task of the samples not.
    """
    config, units = samples.config, samples.units
    extractor = Extractor.from_pretrained(adapter, device=distributed.device())
    tasks = extractor.schema["tasks"]
    if constrained is None:
        constrained = config is not None and config.constrained
    if constrained:
        check_tokenizer(extractor.processor)
    check_tasks(extractor, units.values())

    def score(pictures: bool) -> Evaluated:
        limits = extractor.schema["max_length"], extractor.schema["max_answer_length"]
        evaluation = Evaluation(
            Batcher(samples.reader, extractor.processor, samples.split, *limits, pictures=pictures),
            list(units.values()),
            batch_size or (config.eval_batch if config else DEFAULT_BATCH),
            limits[1],
            tasks,
            match or (config.match if config else "exact"),
            constrained,
        )
        begin(samples.split if pictures else f"{samples.split} without pictures", len(evaluation))
        return evaluation(extractor.model, advance)

    found = score(True)
    if predictions:
        found.write(predictions)
    malformed, confused = _of_answers(units, found.gathered())
    return Scores(samples.split, found.counts, malformed, confused, score(False).counts if blank_images else None)


def check_tasks(extractor: Extractor, units: Iterable[Unit]) -> None:
    """Raises UserError where an adapter that knows tasks does not know the task of one of the units."""
    tasks = extractor.schema["tasks"]
    for unit in units:
        if hasattr(extractor.model, "set_task") and unit.task not in tasks:
            raise UserError(
                f"{unit.dataset} is of task {unit.task}, for which these weights have no expert ({', '.join(tasks)}). "
                "Choose others with --datasets."
            )


def _of_answers(
    units: Iterable[str], lines: Iterable[Mapping[str, Any]]
) -> tuple[dict[str, int], dict[str, Counter[tuple[str, str]]]]:
    """Malformed pieces and confusion of each unit; on ranks other than 0, which have no lines, nothing."""
    malformed, confused = dict.fromkeys(units, 0), {unit: Counter[tuple[str, str]]() for unit in units}
    for line in lines:
        unit = f"{line['dataset']}/{line['subtask']}"
        malformed[unit] += line["malformed"]
        confused[unit] += confusion(line["gold"], line["predicted"], line["subtask"])
    return malformed, confused
