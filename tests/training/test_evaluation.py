"""Evaluation in one process: every sample generated for and counted once, whatever the answers are."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from lvlm_clorae.data.batches import Batcher
from lvlm_clorae.data.reader import BadSample
from lvlm_clorae.data.shard_reader import ShardReader
from lvlm_clorae.data.shards import load_index, read_samples
from lvlm_clorae.data.units import Unit, find_units
from lvlm_clorae.models import Processor
from lvlm_clorae.tasks import Counts, build_prompt, format_answer, gold_tuples, parse_with_errors
from lvlm_clorae.training import distributed
from lvlm_clorae.training.evaluation import Evaluation
from tests.launch import REPOSITORY, environment, small_shards

Answer = Callable[[str, dict[str, Any]], str]
SAMPLES = 5
TASKS = ["mner", "mre", "mee"]


@pytest.fixture(scope="module", autouse=True)
def _alone() -> Iterator[None]:
    """A process group of one; what it sets in the environment is for no other test."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in (("RANK", "0"), ("LOCAL_RANK", "0"), ("WORLD_SIZE", "1"), ("MASTER_ADDR", "127.0.0.1")):
            patch.setenv(name, value)
        patch.setenv("MASTER_PORT", "0")
        # DeepSpeed builds an operator here, and anew where ninja is another than in the jobs of tests/launch.py.
        patch.setenv("PATH", environment()["PATH"])
        distributed.start()
        yield
        distributed.stop()


@pytest.fixture(scope="module")
def processor() -> Processor:
    return Processor.from_pretrained(REPOSITORY / "lvlm_clorae/models/demo")


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_shards(tmp_path_factory.mktemp("evaluation") / "shards", train=1, dev=SAMPLES, test=1)


class Oracle(torch.nn.Module):
    """Knows every sample by its prompt and answers as it is told to."""

    def __init__(self, directory: Path, units: dict[str, Unit], processor: Processor, answer: Answer) -> None:
        super().__init__()
        self.processor, self.answer = processor, answer
        self.known: dict[str, tuple[Unit, dict[str, Any]]] = {}
        self.task: str | torch.Tensor = ""
        self.sizes: list[int] = []
        self.mixed = 0
        index = load_index(directory)
        for unit in units.values():
            for _, sample, _ in read_samples(directory, index, unit.dataset, "dev"):
                prompt = self._read(processor([build_prompt(sample, unit.subtask, unit.labels)])["input_ids"])[0]
                self.known[prompt] = (unit, sample)

    def _read(self, input_ids: torch.Tensor) -> list[str]:
        return self.processor.decode(input_ids)

    def set_task(self, task: str | torch.Tensor) -> None:
        self.task = task

    def generate(self, input_ids: torch.Tensor, **settings: Any) -> torch.Tensor:
        assert not self.training
        assert "labels" not in settings
        assert (settings["max_new_tokens"], settings["do_sample"]) == (64, False)
        self.sizes.append(len(input_ids))
        asked = [self.known[prompt] if prompt else None for prompt in self._read(input_ids)]
        self._check_task([found[0].task for found in asked if found])
        answers = [self.answer(found[0].subtask, found[1]) if found else "nonsense" for found in asked]
        tokens = self.processor(answers, max_length=512)["input_ids"]
        return torch.nn.functional.pad(tokens, (1, 0))  # the decoder's start token is the padding token

    def _check_task(self, tasks: list[str]) -> None:
        """One task is chosen by its name, for the dense path; several by an index a row."""
        if isinstance(self.task, str):
            assert set(tasks) <= {self.task}
        else:
            assert [TASKS[number] for number in self.task] == tasks
            assert len(set(tasks)) > 1
            self.mixed += 1


class Evaluated:
    """The dev split of the small shards, evaluated with an :class:`Oracle`."""

    def __init__(self, directory: Path, processor: Processor, answer: Answer, size: int = 2, **how: Any) -> None:
        index = load_index(directory)
        self.units = find_units(index, "dev")
        self.oracle = Oracle(directory, self.units, processor, answer)
        self.reader = ShardReader(index, directory)
        self.size, self.how = size, how
        self.done: list[int] = []

    def __call__(self, predictions: Path | None = None, on_bad_sample: str = "error") -> dict[str, Counts]:
        batcher = Batcher(self.reader, self.oracle.processor, "dev", on_bad_sample=on_bad_sample)
        evaluation = Evaluation(batcher, list(self.units.values()), self.size, 64, TASKS, **self.how)
        self.samples = len(evaluation)
        evaluated = evaluation(self.oracle, self.done.append)
        if predictions:
            evaluated.write(predictions)
        return evaluated.counts

    def gold(self, unit: Unit) -> int:
        """Gold tuples of the unit, ``none`` relations left out."""
        samples = [sample for asked, sample in self.oracle.known.values() if asked == unit]
        tuples = [item for sample in samples for item in gold_tuples(sample, unit.subtask)]
        return len([item for item in tuples if unit.subtask != "relation" or item[1] != "none"])


def gold_answer(subtask: str, sample: dict[str, Any]) -> str:
    return format_answer(sample, subtask)


def test_gold_answers_score_100_and_every_sample_counts_once(
    directory: Path, processor: Processor, tmp_path: Path
) -> None:
    evaluation = Evaluated(directory, processor, gold_answer, size=3)
    assert len(evaluation.oracle.known) == SAMPLES * len(evaluation.units), "the prompts must tell the samples apart"
    evaluation.oracle.train()
    counts = evaluation(tmp_path)
    assert evaluation.oracle.training, "evaluation gives the mode back"
    assert list(counts) == list(evaluation.units)
    for name, unit in evaluation.units.items():
        expected = evaluation.gold(unit)
        assert expected > 0
        assert counts[name] == Counts(expected, expected, expected), name
        assert counts[name].f1 == 100.0
    total = SAMPLES * len(evaluation.units)
    assert evaluation.oracle.sizes == evaluation.done == [3] * (total // 3) + [total % 3]
    assert evaluation.samples == total
    assert evaluation.oracle.mixed > 0, "batches of 3 hold the end of one task and the beginning of another"


def test_predictions_tell_what_was_asked_answered_read_and_right(
    directory: Path, processor: Processor, tmp_path: Path
) -> None:
    evaluation, index = Evaluated(directory, processor, gold_answer), load_index(directory)
    evaluation(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {f"predictions-{name}-dev.jsonl" for name in index.datasets}
    for name, entry in index.datasets.items():
        text = (tmp_path / f"predictions-{name}-dev.jsonl").read_text(encoding="utf-8")
        lines = [json.loads(line) for line in text.splitlines()]
        written = list(read_samples(directory, index, name, "dev"))
        asked = [(subtask, key, sample) for subtask in entry.subtasks for key, sample, _ in written]
        assert [(line["subtask"], line["key"]) for line in lines] == [(subtask, key) for subtask, key, _ in asked]
        for line, (subtask, _, sample) in zip(lines, asked, strict=True):
            assert line["prompt"] == build_prompt(sample, subtask, entry.labels[subtask])
            assert line["answer"] == format_answer(sample, subtask)
            assert line["predicted"] == line["gold"] == json.loads(json.dumps(gold_tuples(sample, subtask)))


@pytest.mark.parametrize("workers", [0, 2])
def test_neither_batch_size_nor_workers_change_a_score(directory: Path, processor: Processor, workers: int) -> None:
    def answer(subtask: str, sample: dict[str, Any]) -> str:
        return gold_answer(subtask, sample) if sample["source"]["number"] % 2 else "none"

    state = torch.get_rng_state()
    found = [Evaluated(directory, processor, answer, size, workers=workers)() for size in (1, 3, 100)]
    assert found[0] == found[1] == found[2]
    assert torch.equal(torch.get_rng_state(), state), "dropout goes on as if nothing had been evaluated"


def test_wrong_answers_are_counted_where_they_are(directory: Path, processor: Processor) -> None:
    """One sample of each dataset is answered by nothing, another by its gold and a tuple that is not there."""
    wrong = {
        "entity": " <spot> person, Nobody",
        "trigger": " <spot> meet, nothing",
        "argument": " <event> meet <spot> place, nowhere",
    }

    def answer(subtask: str, sample: dict[str, Any]) -> str:
        number, gold = sample["source"]["number"], format_answer(sample, subtask)
        if number == 0:
            return "complete nonsense <spot> <spot>"
        if number == 1:
            return gold + wrong[subtask] if subtask in wrong else "Nobody <spot> couple <spot> Someone"
        return gold

    evaluation = Evaluated(directory, processor, answer)
    counts = evaluation()
    samples = {(unit.name, s["source"]["number"]): s for unit, s in evaluation.oracle.known.values()}
    for name, unit in evaluation.units.items():
        gold = evaluation.gold(unit)

        def size(number: int, unit: Unit = unit) -> int:
            tuples = gold_tuples(samples[unit.name, number], unit.subtask)
            return len([item for item in tuples if unit.subtask != "relation" or item[1] != "none"])

        lost = size(0)
        if unit.subtask == "relation":
            assert counts[name] == Counts(gold - lost - size(1), gold - lost - size(1) + 1, gold)
        else:
            assert counts[name] == Counts(gold - lost, gold - lost + 1, gold), name
        assert counts[name].f1 < 100.0


def test_without_answers_every_score_is_zero(directory: Path, processor: Processor) -> None:
    evaluation = Evaluated(directory, processor, lambda subtask, sample: "none")
    for name, count in evaluation().items():
        assert (count.tp, count.predicted, count.f1) == (0, 0, 0.0)
        assert count.gold == evaluation.gold(evaluation.units[name])


class Babbler(torch.nn.Module):
    """Says what chance has it say, of what it may say."""

    def __init__(self, words: int) -> None:
        super().__init__()
        self.words = words

    def generate(self, input_ids: torch.Tensor, logits_processor: Any = (), **settings: Any) -> torch.Tensor:
        generator = torch.Generator().manual_seed(len(input_ids))
        tokens = input_ids.new_zeros(len(input_ids), 1)
        for _ in range(settings["max_new_tokens"]):
            scores = torch.randn(len(tokens), self.words, generator=generator)
            for process in logits_processor:
                scores = process(tokens, scores)
            tokens = torch.cat([tokens, scores.argmax(-1, keepdim=True)], 1)
        return tokens


def test_constrained_answers_parse_in_every_unit(directory: Path, processor: Processor) -> None:
    index = load_index(directory)
    units = list(find_units(index, "dev").values())
    batcher = Batcher(ShardReader(index, directory), processor, "dev")
    for constrained in (False, True):
        evaluated = Evaluation(batcher, units, 3, 400, constrained=constrained)(Babbler(len(processor.tokenizer)))
        for unit in units:
            mine = [
                line for line in evaluated.lines if (line["dataset"], line["subtask"]) == (unit.dataset, unit.subtask)
            ]
            malformed = [parse_with_errors(line["answer"], unit.subtask, unit.labels).malformed for line in mine]
            assert [line["malformed"] for line in mine] == malformed
            assert (sum(malformed) > 0) is not constrained, unit.name


def test_bad_samples_are_warned_of_and_not_counted(
    directory: Path, processor: Processor, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A score over fewer samples than the split has must say so."""
    evaluation = Evaluated(directory, processor, gold_answer)
    whole = evaluation()
    shutil.copytree(directory, tmp_path / "broken")
    index = load_index(directory)
    (shard,) = index.dataset("demo_pairs").splits["dev"]
    data = bytearray((directory / shard.name).read_bytes())
    data[data.index(b"{", shard.offsets[1])] = ord("[")
    (tmp_path / "broken" / shard.name).write_bytes(data)
    evaluation.reader = ShardReader(index, tmp_path / "broken")
    with pytest.raises(BadSample, match=rf"^{shard.name}, demo_pairs_dev_00001: not valid JSON"):
        evaluation()
    with caplog.at_level("WARNING"):
        counts = evaluation(on_bad_sample="skip")
    (warning,) = [record.getMessage() for record in caplog.records if "bad sample" in record.getMessage()]
    assert f"{shard.name}, demo_pairs_dev_00001" in warning
    known = evaluation.oracle.known.values()
    (lost,) = [s for unit, s in known if unit.subtask == "relation" and s["source"]["number"] == 1]
    gold = int(lost["relation"]["label"] != "none")
    full = whole.pop("demo_pairs/relation").gold - gold
    assert counts.pop("demo_pairs/relation") == Counts(full, full, full)
    assert counts == whole
