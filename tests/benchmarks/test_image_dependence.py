"""Dependence on images, measured for a model with a known dependence."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from lvlm_clorae.data.index import load_index
from lvlm_clorae.data.reader import read_samples
from lvlm_clorae.inference.extractor import Extractor
from lvlm_clorae.models import Processor
from lvlm_clorae.tasks import build_prompt, format_answer
from tests.helpers.launch import REPOSITORY, environment, small_shards
from tests.helpers.shards import write_toy
from tools.demo_data import world

sys.path.insert(0, str(REPOSITORY / "benchmarks"))

import image_dependence

Sample = dict[str, Any]
SAMPLES = 12


@pytest.fixture(autouse=True)
def _environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Restore the variables that a process group of one rank sets."""
    for name, value in (("RANK", "0"), ("LOCAL_RANK", "0"), ("WORLD_SIZE", "1"), ("MASTER_ADDR", "127.0.0.1")):
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("MASTER_PORT", "0")
    monkeypatch.setenv("PATH", environment()["PATH"])


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_shards(tmp_path_factory.mktemp("images") / "shards", train=1, dev=SAMPLES, test=1)


def without_the_image(sample: Sample) -> Sample:
    """The part of the annotation that the text shows."""
    if "entities" in sample:
        kept = [entity for entity in sample["entities"] if entity["text"] not in world.AMBIGUOUS]
        return {**sample, "entities": kept}
    if "relation" in sample:
        in_image = sample["relation"]["label"] in world.PAIR_ICON.values()
        return {**sample, "relation": None if in_image else sample["relation"]}
    events = [
        {**event, "arguments": [argument for argument in event["arguments"] if "text" in argument]}
        for event in sample["events"]
        if event["trigger"]
    ]
    return {**sample, "events": events}


class Oracle(torch.nn.Module):
    """A model that knows every sample by its prompt; without the image it answers as ``blind`` says."""

    def __init__(self, shards: Path, processor: Processor, blind: Callable[[Sample], Sample]) -> None:
        super().__init__()
        self.processor, self.blind = processor, blind
        self.known: dict[str, tuple[str, Sample]] = {}
        index = load_index(shards)
        for dataset_task in index.dataset_tasks("dev").values():
            for _, sample, _ in read_samples(shards, index, dataset_task.dataset, "dev"):
                prompt = build_prompt(sample, dataset_task.subtask, dataset_task.labels)
                self.known[processor.decode(processor([prompt])["input_ids"])[0]] = dataset_task.subtask, sample

    def generate(self, input_ids: torch.Tensor, pixel_mask: torch.Tensor, **others: Any) -> torch.Tensor:
        answers = []
        for prompt, shown in zip(self.processor.decode(input_ids), pixel_mask.tolist(), strict=True):
            subtask, sample = self.known[prompt]
            sees = shown or not sample["image"]
            answers.append(format_answer(sample if sees else self.blind(sample), subtask))
        tokens = self.processor(answers, max_source_length=512)["input_ids"]
        return torch.nn.functional.pad(tokens, (1, 0))  # the decoder's start token is the padding token


@pytest.fixture
def run(shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """Runs the benchmark for an oracle, with results in ``tmp_path``."""
    processor = Processor.from_pretrained(REPOSITORY / "lvlm_clorae/models/demo")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "schema.json").touch()

    def start(blind: Callable[[Sample], Sample], *arguments: object) -> int:
        schema = {"tasks": ["mner", "mre", "mee"], "max_source_length": 256, "max_target_length": 64}
        extractor = SimpleNamespace(model=Oracle(shards, processor, blind), processor=processor, schema=schema)
        monkeypatch.setattr(Extractor, "from_pretrained", lambda path: extractor)
        line = ["--run", tmp_path / "run", "--shards", shards, "--output", tmp_path / "results.json", *arguments]
        return image_dependence.main([str(item) for item in line])

    return start


def rows(path: Path) -> dict[tuple[str, str], dict[str, Any]]:
    content = json.loads(path.read_text())
    assert content["about"]["split"] == "dev"
    assert "commit" in content["about"]
    return {(row["dataset_task"], row["tuples"]): row for row in content["rows"]}


def test_tuples_that_only_images_show_are_lost_without_them(
    run: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(without_the_image) == 0
    found = rows(tmp_path / "results.json")
    assert len(found) == 10
    for (dataset_task, tuples), row in found.items():
        assert row["f1_with"] == (100.0 if row["gold"] else 0.0)
        assert row["drop"] == row["f1_with"] - row["f1_without"]
        if tuples == "image only":
            gold, lost = found[dataset_task, "all"]["gold"], row["gold"]
            assert row["f1_without"] == 0.0
            assert found[dataset_task, "all"]["f1_without"] == pytest.approx(
                100 * 2 * (gold - lost) / (2 * gold - lost)
            )
    needed = {dataset_task for (dataset_task, _), row in found.items() if row["needs_the_image"]}
    assert needed == {"demo_posts/entity", "demo_pairs/relation", "demo_events/argument"}
    assert all(found[dataset_task, "image only"]["gold"] > 1 for dataset_task in needed)
    printed = capsys.readouterr().out
    for dataset_task in needed:
        assert f"| {dataset_task} * | all |" in printed


def test_the_check_requires_a_drop_in_every_dataset_task(
    run: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def all_but_pairs(sample: Sample) -> Sample:
        return sample if "relation" in sample else without_the_image(sample)

    for blind, points, code in ((without_the_image, 5, 0), (without_the_image, 95, 1), (all_but_pairs, 5, 1)):
        assert run(blind, "--check", points) == code
        (tmp_path / "results.json").unlink()
    assert "demo_pairs/relation: drops by 0.0, required >= 5: not met" in capsys.readouterr().out


def test_results_are_never_overwritten(
    run: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "results.json").write_text("kept")
    with pytest.raises(SystemExit):
        run(without_the_image)
    assert "not overwritten" in capsys.readouterr().err
    assert (tmp_path / "results.json").read_text() == "kept"


def test_other_shards_are_refused(run: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_toy(tmp_path / "toy", counts=(("dev", 2),))
    assert run(without_the_image, "--shards", tmp_path / "toy") == 2
    assert "--shards" in capsys.readouterr().err
