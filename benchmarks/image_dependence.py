"""Measure how much a run on the demo depends on images: F1 of a split with all images and with none.

    python benchmarks/image_dependence.py --run runs/demo-clorae
    python benchmarks/image_dependence.py --run runs/demo-clorae --check 20     exit code 1 if F1 drops by less

Whether a tuple needs the image follows from the generator of the demo, not from a model's answers: an entity with an
ambiguous name (the icon shows its type), a relation of two people (the icon shows it), an event without a trigger, or
an argument that is an object. A dataset task needs the image if the generator makes it so by design: the entities of
posts, the relations of pairs, the arguments. News rarely need it, and 60 % of the triggers are in the text. The table
has F1 of all tuples, and of those that only the image shows.

Without images the prompt still names the objects, but not their boxes.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parent))

from measure import description, results_file

from lvlm_clorae.data.collate import Collator
from lvlm_clorae.data.dataset import ShardDataset
from lvlm_clorae.data.index import DatasetTask, load_index
from lvlm_clorae.data.reader import read_samples
from lvlm_clorae.errors import UserError
from lvlm_clorae.files import write_text_atomic
from lvlm_clorae.inference.adapter_directory import adapter_directory
from lvlm_clorae.inference.extractor import Extractor
from lvlm_clorae.tasks import Counts, gold_tuples, score, score_sample
from lvlm_clorae.training import distributed
from lvlm_clorae.training.evaluation import Evaluator
from tools.demo_data import world
from tools.demo_data.generator import DATASETS

NEED_THE_IMAGE = ("demo_posts/entity", "demo_pairs/relation", "demo_events/argument")
IN_THE_IMAGE_ONLY: dict[str, Callable[[tuple[Any, ...]], bool]] = {
    "entity": lambda found: found[1] in world.AMBIGUOUS,
    "relation": lambda found: found[2].split()[0] in world.FIRST,  # the tail is a person in no other template
    "trigger": lambda found: not found[1],
    "argument": lambda found: isinstance(found[2], tuple),
}
BATCH = 16
HEADINGS = ("dataset_task", "tuples", "gold", "F1 with", "without", "drop")


class Split:
    """The demo's samples of one split."""

    def __init__(self, shards: Path, name: str) -> None:
        self.shards, self.name, self.index = shards, name, load_index(shards)
        dataset_tasks = self.index.dataset_tasks(name)
        self.dataset_tasks = {
            name: dataset_task for name, dataset_task in dataset_tasks.items() if dataset_task.dataset in DATASETS
        }
        missing = [dataset_task for dataset_task in NEED_THE_IMAGE if dataset_task not in self.dataset_tasks]
        if missing:
            raise UserError(f"{shards}: has no {missing[0]} in {name}. Give the shards of the demo with --shards.")

    def evaluate(self, extractor: Extractor, images: bool) -> dict[str, dict[str, Counts]]:
        """Count all tuples, and those that only the image shows, by dataset task."""
        limits = extractor.schema["max_source_length"], extractor.schema["max_target_length"]
        dataset = ShardDataset(self.index, self.shards, self.name)
        collator = Collator(extractor.processor, self.dataset_tasks, *limits, use_images=images)
        evaluation = Evaluator(dataset, collator, BATCH, limits[1])
        with tempfile.TemporaryDirectory() as folder:
            evaluated = evaluation(extractor.model)
            evaluated.write(Path(folder))
            counts = evaluated.counts
            return {
                name: {"all": counts[name], "image only": self._in_the_image_only(dataset_task, Path(folder))}
                for name, dataset_task in self.dataset_tasks.items()
            }

    def _in_the_image_only(self, dataset_task: DatasetTask, predictions: Path) -> Counts:
        text = (predictions / f"predictions-{dataset_task.dataset}-{self.name}.jsonl").read_text("utf-8")
        lines = [line for line in map(json.loads, text.splitlines()) if line["subtask"] == dataset_task.subtask]
        answers = {line["key"]: line["answer"] for line in lines}
        needs, counts = IN_THE_IMAGE_ONLY[dataset_task.subtask], Counts()
        for key, sample, _ in read_samples(self.shards, self.index, dataset_task.dataset, self.name):
            predicted = score_sample(sample, answers[key], dataset_task.subtask, dataset_task.labels).tuples
            gold = gold_tuples(sample, dataset_task.subtask)
            counts += score(filter(needs, gold), filter(needs, predicted), dataset_task.subtask)
        return counts


def measure(run: Path, shards: Path, split: str) -> list[dict[str, Any]]:
    """A row for each dataset task and set of tuples. Raises UserError if the run or shards cannot be read."""
    samples = Split(shards, split)
    extractor = Extractor.from_pretrained(adapter_directory(run))
    distributed.start()
    try:
        shown, blank = (samples.evaluate(extractor, images) for images in (True, False))
    finally:
        distributed.stop()
    return [
        row(dataset_task, tuples, shown[dataset_task], blank[dataset_task])
        for dataset_task in samples.dataset_tasks
        for tuples in ("all", "image only")
    ]


def row(dataset_task: str, tuples: str, shown: Mapping[str, Counts], blank: Mapping[str, Counts]) -> dict[str, Any]:
    """Scores of a set of tuples with and without images."""
    return {
        "dataset_task": dataset_task,
        "needs_the_image": dataset_task in NEED_THE_IMAGE,
        "tuples": tuples,
        "gold": shown[tuples].gold,
        "f1_with": shown[tuples].f1,
        "f1_without": blank[tuples].f1,
        "drop": shown[tuples].f1 - blank[tuples].f1,
    }


def table(rows: list[dict[str, Any]]) -> str:
    """Format the rows as Markdown."""
    lines = ["| " + " | ".join(HEADINGS) + " |", "|---|---|" + "---:|" * 4]
    for found in rows:
        dataset_task = found["dataset_task"] + (" *" if found["needs_the_image"] else "")
        figures = " | ".join(f"{found[name]:.1f}" for name in ("f1_with", "f1_without", "drop"))
        lines.append(f"| {dataset_task} | {found['tuples']} | {found['gold']} | {figures} |")
    return "\n".join([*lines, "* needs the image"])


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, required=True, help="a run on the demo, or an adapter directory")
    parser.add_argument("--shards", type=Path, default=Path("shards/demo"))
    parser.add_argument("--split", default="dev", choices=("train", "dev", "test"))
    parser.add_argument(
        "--check",
        type=float,
        metavar="N",
        help="exit with 1 unless F1 drops by N in each dataset task that needs the image",
    )
    parser.add_argument("--output", type=Path, help="JSON file; default results/image_dependence-<date>.json")
    options = parser.parse_args(argv)
    options.about = {**description(distributed.device()), "run": str(options.run), "split": options.split}
    options.output = results_file(parser, options.output, f"image_dependence-{options.about['date']}.json")
    return options


def main(argv: list[str] | None = None) -> int:
    """Measure, print and write. Returns 1 if ``--check`` is given and the F1 of a dataset task drops by less."""
    options = parse(argv)
    try:
        rows = measure(options.run, options.shards, options.split)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    write_text_atomic(options.output, json.dumps({"about": options.about, "rows": rows}, indent=1) + "\n")
    print(table(rows), f"written to {options.output}", sep="\n")
    if options.check is None:
        return 0
    checked = [found for found in rows if found["needs_the_image"] and found["tuples"] == "all"]
    for found in checked:
        met = "met" if found["drop"] >= options.check else "not met"
        print(f"{found['dataset_task']}: drops by {found['drop']:.1f}, required >= {options.check:g}: {met}")
    return 1 if any(found["drop"] < options.check for found in checked) else 0


if __name__ == "__main__":
    raise SystemExit(main())
