"""Evaluation in one process: every sample gets one answer and is counted once, whatever the answers are."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from lvlm_clorae.data.collate import Collator
from lvlm_clorae.data.dataset import ShardDataset
from lvlm_clorae.data.index import DatasetTask, load_index
from lvlm_clorae.data.reader import InvalidSample, read_samples
from lvlm_clorae.models import Processor
from lvlm_clorae.tasks import Counts, build_prompt, format_answer, gold_tuples, parse_with_errors
from lvlm_clorae.training import distributed
from lvlm_clorae.training.evaluation import Evaluator
from tests.helpers.launch import REPOSITORY, environment, small_shards
from tests.helpers.shards import break_json

pytestmark = pytest.mark.integration

Answer = Callable[[str, dict[str, Any]], str]
SAMPLES = 5


@pytest.fixture(scope="module", autouse=True)
def _alone() -> Iterator[None]:
    """A process group of one, whose environment variables do not reach other tests."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in (("RANK", "0"), ("LOCAL_RANK", "0"), ("WORLD_SIZE", "1"), ("MASTER_ADDR", "127.0.0.1")):
            patch.setenv(name, value)
        patch.setenv("MASTER_PORT", "0")
        # DeepSpeed builds an operator here, and again if ninja differs from that of the jobs that tests launch.
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
    """Recognizes every sample by its prompt, and answers by a given function."""

    def __init__(
        self, directory: Path, dataset_tasks: dict[str, DatasetTask], processor: Processor, answer: Answer
    ) -> None:
        super().__init__()
        self.processor, self.answer = processor, answer
        self.known: dict[str, tuple[DatasetTask, dict[str, Any]]] = {}
        self.task = ""
        self.sizes: list[int] = []
        index = load_index(directory)
        for dataset_task in dataset_tasks.values():
            for _, sample, _ in read_samples(directory, index, dataset_task.dataset, "dev"):
                prompt = self._read(
                    processor([build_prompt(sample, dataset_task.subtask, dataset_task.labels)])["input_ids"]
                )[0]
                self.known[prompt] = (dataset_task, sample)

    def _read(self, input_ids: torch.Tensor) -> list[str]:
        return self.processor.decode(input_ids)

    def set_task(self, task: str) -> None:
        self.task = task

    def generate(self, input_ids: torch.Tensor, **settings: Any) -> torch.Tensor:
        assert not self.training
        assert "labels" not in settings
        assert (settings["max_new_tokens"], settings["do_sample"]) == (64, False)
        self.sizes.append(len(input_ids))
        asked = [self.known[prompt] if prompt else None for prompt in self._read(input_ids)]
        assert {found[0].task for found in asked if found} <= {self.task}
        answers = [self.answer(found[0].subtask, found[1]) if found else "nonsense" for found in asked]
        tokens = self.processor(answers, max_source_length=512)["input_ids"]
        return torch.nn.functional.pad(tokens, (1, 0))  # the decoder's start token is the padding token


class DevEvaluation:
    """The dev split of the small shards, evaluated with an :class:`Oracle`."""

    def __init__(self, directory: Path, processor: Processor, answer: Answer, size: int = 2, **how: Any) -> None:
        index = load_index(directory)
        self.dataset_tasks = index.dataset_tasks("dev")
        self.oracle = Oracle(directory, self.dataset_tasks, processor, answer)
        self.dataset = ShardDataset(index, directory, "dev")
        self.size, self.how = size, how
        self.done: list[int] = []

    def __call__(self, predictions: Path | None = None, on_invalid_sample: str = "error") -> dict[str, Counts]:
        collator = Collator(self.oracle.processor, self.dataset_tasks, on_invalid_sample=on_invalid_sample)
        evaluator = Evaluator(self.dataset, collator, self.size, 64, **self.how)
        self.samples = len(evaluator)
        result = evaluator(self.oracle, self.done.append)
        if predictions:
            result.write(predictions)
        return result.counts

    def gold(self, dataset_task: DatasetTask) -> int:
        """Gold tuples of the dataset task, ``none`` relations left out."""
        samples = [sample for asked, sample in self.oracle.known.values() if asked == dataset_task]
        tuples = [item for sample in samples for item in gold_tuples(sample, dataset_task.subtask)]
        return len([item for item in tuples if dataset_task.subtask != "relation" or item[1] != "none"])


def gold_answer(subtask: str, sample: dict[str, Any]) -> str:
    return format_answer(sample, subtask)


def test_gold_answers_score_100_and_every_sample_counts_once(
    directory: Path, processor: Processor, tmp_path: Path
) -> None:
    evaluation = DevEvaluation(directory, processor, gold_answer, size=3)
    assert len(evaluation.oracle.known) == SAMPLES * len(evaluation.dataset_tasks), "every prompt must be unique"
    evaluation.oracle.train()
    counts = evaluation(tmp_path)
    assert evaluation.oracle.training, "evaluation restores the mode"
    assert list(counts) == list(evaluation.dataset_tasks)
    for name, dataset_task in evaluation.dataset_tasks.items():
        expected = evaluation.gold(dataset_task)
        assert expected > 0
        assert counts[name] == Counts(expected, expected, expected), name
        assert counts[name].f1 == 100.0
    assert evaluation.oracle.sizes == evaluation.done == [3, SAMPLES - 3] * len(evaluation.dataset_tasks)
    assert evaluation.samples == SAMPLES * len(evaluation.dataset_tasks)


def test_predictions_have_prompt_answer_predicted_and_gold_tuples(
    directory: Path, processor: Processor, tmp_path: Path
) -> None:
    evaluation, index = DevEvaluation(directory, processor, gold_answer), load_index(directory)
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
    found = [DevEvaluation(directory, processor, answer, size, num_workers=workers)() for size in (1, 3, 100)]
    assert found[0] == found[1] == found[2]
    assert torch.equal(torch.get_rng_state(), state), "evaluation must not change dropout"


def test_wrong_answers_are_counted_where_they_are(directory: Path, processor: Processor) -> None:
    """One sample of each dataset gets no tuple, another its gold tuples and a wrong one."""
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

    evaluation = DevEvaluation(directory, processor, answer)
    counts = evaluation()
    samples = {(dataset_task.name, s["source"]["number"]): s for dataset_task, s in evaluation.oracle.known.values()}
    for name, dataset_task in evaluation.dataset_tasks.items():
        gold = evaluation.gold(dataset_task)

        def size(number: int, dataset_task: DatasetTask = dataset_task) -> int:
            tuples = gold_tuples(samples[dataset_task.name, number], dataset_task.subtask)
            return len([item for item in tuples if dataset_task.subtask != "relation" or item[1] != "none"])

        lost = size(0)
        if dataset_task.subtask == "relation":
            assert counts[name] == Counts(gold - lost - size(1), gold - lost - size(1) + 1, gold)
        else:
            assert counts[name] == Counts(gold - lost, gold - lost + 1, gold), name
        assert counts[name].f1 < 100.0


def test_without_answers_every_score_is_zero(directory: Path, processor: Processor) -> None:
    evaluation = DevEvaluation(directory, processor, lambda subtask, sample: "none")
    for name, count in evaluation().items():
        assert (count.tp, count.predicted, count.f1) == (0, 0, 0.0)
        assert count.gold == evaluation.gold(evaluation.dataset_tasks[name])


class Babbler(torch.nn.Module):
    """Generates random tokens among those allowed."""

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


def test_constrained_answers_parse_in_every_dataset_task(directory: Path, processor: Processor) -> None:
    index = load_index(directory)
    dataset, dataset_tasks = ShardDataset(index, directory, "dev"), index.dataset_tasks("dev")
    for constrained in (False, True):
        evaluator = Evaluator(dataset, Collator(processor, dataset_tasks), 3, 400, constrained=constrained)
        result = evaluator(Babbler(len(processor.tokenizer)))
        for dataset_task in dataset_tasks.values():
            mine = [
                line
                for line in result.predictions
                if (line["dataset"], line["subtask"]) == (dataset_task.dataset, dataset_task.subtask)
            ]
            malformed = [
                parse_with_errors(line["answer"], dataset_task.subtask, dataset_task.labels).malformed for line in mine
            ]
            assert [line["malformed"] for line in mine] == malformed
            assert (sum(malformed) > 0) is not constrained, dataset_task.name


def test_invalid_samples_are_reported_and_not_counted(
    directory: Path, processor: Processor, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A score over fewer samples than the split has must say so."""
    evaluation = DevEvaluation(directory, processor, gold_answer)
    whole = evaluation()
    shutil.copytree(directory, tmp_path / "broken")
    index = load_index(directory)
    (shard,) = index.dataset("demo_pairs").splits["dev"]
    break_json(tmp_path / "broken", index, 1, "demo_pairs", "dev")
    evaluation.dataset = ShardDataset(index, tmp_path / "broken", "dev")
    with pytest.raises(InvalidSample, match=rf"^{shard.name}, demo_pairs_dev_00001: "):
        evaluation()
    with caplog.at_level("WARNING"):
        counts = evaluation(on_invalid_sample="skip")
    assert len([message for message in caplog.messages if f"{shard.name}, demo_pairs_dev_00001" in message]) == 1
    known = evaluation.oracle.known.values()
    (lost,) = [s for dataset_task, s in known if dataset_task.subtask == "relation" and s["source"]["number"] == 1]
    gold = int(lost["relation"]["label"] != "none")
    full = whole.pop("demo_pairs/relation").gold - gold
    assert counts.pop("demo_pairs/relation") == Counts(full, full, full)
    assert counts == whole
