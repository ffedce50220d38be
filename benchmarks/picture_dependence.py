"""What a run on the demo owes to the pictures: F1 of a split with them, and with every one left out.

    python benchmarks/picture_dependence.py --run runs/demo-clorae
    python benchmarks/picture_dependence.py --run runs/demo-clorae --check 20     exit code 1 where F1 falls by less

What needs the picture is said by how lvlm_clorae/data/demo/generator.py draws, not by what a model answers. A tuple is
in the picture only where it is an entity of an ambiguous name (the icon is its type), a relation of two people (their
icon is the relation), an event without a trigger, or an argument that is an object. A unit needs the picture where the
generator makes it so by design: the names of posts, the pairs, the arguments. News are "mostly clear without", triggers
are in the text but for 40 %. The table has F1 of all tuples, and of those in the picture only.

A left-out picture is as a missing one: the prompt still names the objects, but their boxes are no longer known.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

from measure import description, results_file

from lvlm_clorae.adapter_directory import adapter_directory
from lvlm_clorae.data.batches import Batcher
from lvlm_clorae.data.demo import world
from lvlm_clorae.data.demo.generator import DATASETS
from lvlm_clorae.data.shard_reader import ShardReader
from lvlm_clorae.data.shards import load_index, read_samples
from lvlm_clorae.data.units import Unit, find_units
from lvlm_clorae.errors import UserError
from lvlm_clorae.extractor import Extractor
from lvlm_clorae.files import write_text_atomic
from lvlm_clorae.tasks import Counts, gold_tuples, score, score_sample
from lvlm_clorae.training import distributed
from lvlm_clorae.training.evaluation import Evaluation

NEED_THE_PICTURE = ("demo_posts/entity", "demo_pairs/relation", "demo_events/argument")
IN_THE_PICTURE_ONLY: dict[str, Callable[[tuple[Any, ...]], bool]] = {
    "entity": lambda found: found[1] in world.AMBIGUOUS,
    "relation": lambda found: found[2].split()[0] in world.FIRST,  # in no other frame the tail is a person
    "trigger": lambda found: not found[1],
    "argument": lambda found: isinstance(found[2], tuple),
}
BATCH = 16
HEADINGS = ("unit", "tuples", "gold", "F1 with", "without", "fall")


class Split:
    """The demo's samples of one split, and what a model finds in them."""

    def __init__(self, shards: Path, name: str) -> None:
        self.shards, self.name, self.index = shards, name, load_index(shards)
        units = find_units(self.index, name)
        self.units = {name: unit for name, unit in units.items() if unit.dataset in DATASETS}
        lacking = [unit for unit in NEED_THE_PICTURE if unit not in self.units]
        if lacking:
            raise UserError(f"{shards}: has no {lacking[0]} in {name}. Give shards of the demo with --shards.")

    def evaluate(self, extractor: Extractor, pictures: bool) -> dict[str, dict[str, Counts]]:
        """Counts of every unit, of ``all`` tuples and of those in the ``picture only``."""
        limits = extractor.schema["max_length"], extractor.schema["max_answer_length"]
        reader = ShardReader(self.index, self.shards)
        batcher = Batcher(reader, extractor.processor, self.name, *limits, pictures=pictures)
        evaluation = Evaluation(batcher, list(self.units.values()), BATCH, limits[1], extractor.schema["tasks"])
        with tempfile.TemporaryDirectory() as folder:
            evaluated = evaluation(extractor.model)
            evaluated.write(Path(folder))
            counts = evaluated.counts
            return {
                name: {"all": counts[name], "picture only": self._in_the_picture_only(unit, Path(folder))}
                for name, unit in self.units.items()
            }

    def _in_the_picture_only(self, unit: Unit, predictions: Path) -> Counts:
        text = (predictions / f"predictions-{unit.dataset}-{self.name}.jsonl").read_text("utf-8")
        lines = [line for line in map(json.loads, text.splitlines()) if line["subtask"] == unit.subtask]
        answers = {line["key"]: line["answer"] for line in lines}
        needs, counts = IN_THE_PICTURE_ONLY[unit.subtask], Counts()
        for key, sample, _ in read_samples(self.shards, self.index, unit.dataset, self.name):
            predicted = score_sample(sample, answers[key], unit.subtask, unit.labels).tuples
            gold = gold_tuples(sample, unit.subtask)
            counts += score(filter(needs, gold), filter(needs, predicted), unit.subtask)
        return counts


def measure(run: Path, shards: Path, split: str) -> list[dict[str, Any]]:
    """One row a unit and kind of tuples. Raises UserError for a run or shards that cannot be read."""
    samples = Split(shards, split)
    extractor = Extractor.from_pretrained(adapter_directory(run))
    distributed.start()
    try:
        shown, blank = (samples.evaluate(extractor, pictures) for pictures in (True, False))
    finally:
        distributed.stop()
    return [row(unit, kind, shown[unit], blank[unit]) for unit in samples.units for kind in ("all", "picture only")]


def row(unit: str, kind: str, shown: Mapping[str, Counts], blank: Mapping[str, Counts]) -> dict[str, Any]:
    return {
        "unit": unit,
        "needs_the_picture": unit in NEED_THE_PICTURE,
        "tuples": kind,
        "gold": shown[kind].gold,
        "f1_with": shown[kind].f1,
        "f1_without": blank[kind].f1,
        "fall": shown[kind].f1 - blank[kind].f1,
    }


def table(rows: list[dict[str, Any]]) -> str:
    lines = ["| " + " | ".join(HEADINGS) + " |", "|---|---|" + "---:|" * 4]
    for found in rows:
        unit = found["unit"] + (" *" if found["needs_the_picture"] else "")
        figures = " | ".join(f"{found[name]:.1f}" for name in ("f1_with", "f1_without", "fall"))
        lines.append(f"| {unit} | {found['tuples']} | {found['gold']} | {figures} |")
    return "\n".join([*lines, "* needs the picture"])


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, required=True, help="a run on the demo, or an adapter directory")
    parser.add_argument("--shards", type=Path, default=Path("shards/demo"))
    parser.add_argument("--split", default="dev", choices=("train", "dev", "test"))
    parser.add_argument(
        "--check", type=float, metavar="N", help="exit with 1 unless F1 falls by N in each unit that needs the picture"
    )
    parser.add_argument("--output", type=Path, help="JSON file; default results/picture_dependence-<date>.json")
    options = parser.parse_args(argv)
    options.about = {**description(distributed.device()), "run": str(options.run), "split": options.split}
    options.output = results_file(parser, options.output, f"picture_dependence-{options.about['date']}.json")
    return options


def main(argv: list[str] | None = None) -> int:
    """Measure, print, write. Returns the exit code: 1 where ``--check`` is given and a unit falls by less, else 0."""
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
    checked = [found for found in rows if found["needs_the_picture"] and found["tuples"] == "all"]
    for found in checked:
        met = "met" if found["fall"] >= options.check else "not met"
        print(f"{found['unit']}: falls by {found['fall']:.1f}, to be >= {options.check:g}: {met}")
    return 1 if any(found["fall"] < options.check for found in checked) else 0


if __name__ == "__main__":
    raise SystemExit(main())
