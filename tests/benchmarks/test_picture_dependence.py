"""What a run owes to the pictures, measured of a model of which it is known."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from lvlm_clorae.data.demo import world
from lvlm_clorae.data.shards import load_index, read_samples
from lvlm_clorae.data.units import find_units
from lvlm_clorae.extractor import Extractor
from lvlm_clorae.models import Processor
from lvlm_clorae.tasks import build_prompt, format_answer
from tests.data.helpers import write_toy
from tests.launch import REPOSITORY, environment, small_shards

sys.path.insert(0, str(REPOSITORY / "benchmarks"))

import picture_dependence

Sample = dict[str, Any]
SAMPLES = 12


@pytest.fixture(autouse=True)
def _environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the process group of one sets is for no other test."""
    for name, value in (("RANK", "0"), ("LOCAL_RANK", "0"), ("WORLD_SIZE", "1"), ("MASTER_ADDR", "127.0.0.1")):
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("MASTER_PORT", "0")
    monkeypatch.setenv("PATH", environment()["PATH"])


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_shards(tmp_path_factory.mktemp("pictures") / "shards", train=1, dev=SAMPLES, test=1)


def without_the_picture(sample: Sample) -> Sample:
    """What of the annotation can be told from the text."""
    if "entities" in sample:
        kept = [entity for entity in sample["entities"] if entity["text"] not in world.AMBIGUOUS]
        return {**sample, "entities": kept}
    if "relation" in sample:
        drawn = sample["relation"]["label"] in world.PAIR_ICON.values()
        return {**sample, "relation": None if drawn else sample["relation"]}
    events = [
        {**event, "arguments": [argument for argument in event["arguments"] if "text" in argument]}
        for event in sample["events"]
        if event["trigger"]
    ]
    return {**sample, "events": events}


class Oracle(torch.nn.Module):
    """Knows every sample by its prompt; of a picture that it does not get, what ``blind`` tells it."""

    def __init__(self, shards: Path, processor: Processor, blind: Callable[[Sample], Sample]) -> None:
        super().__init__()
        self.processor, self.blind = processor, blind
        self.known: dict[str, tuple[str, Sample]] = {}
        index = load_index(shards)
        for unit in find_units(index, "dev").values():
            for _, sample, _ in read_samples(shards, index, unit.dataset, "dev"):
                prompt = build_prompt(sample, unit.subtask, unit.labels)
                self.known[processor.decode(processor([prompt])["input_ids"])[0]] = unit.subtask, sample

    def generate(self, input_ids: torch.Tensor, pixel_mask: torch.Tensor, **others: Any) -> torch.Tensor:
        answers = []
        for prompt, shown in zip(self.processor.decode(input_ids), pixel_mask.tolist(), strict=True):
            subtask, sample = self.known[prompt]
            sees = shown or not sample["image"]
            answers.append(format_answer(sample if sees else self.blind(sample), subtask))
        tokens = self.processor(answers, max_length=512)["input_ids"]
        return torch.nn.functional.pad(tokens, (1, 0))  # the decoder's start token is the padding token


@pytest.fixture
def run(shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """The benchmark of an oracle; what it writes is in ``tmp_path``."""
    processor = Processor.from_pretrained(REPOSITORY / "lvlm_clorae/models/demo")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "schema.json").touch()

    def start(blind: Callable[[Sample], Sample], *arguments: object) -> int:
        schema = {"tasks": ["mner", "mre", "mee"], "max_length": 256, "max_answer_length": 64}
        extractor = SimpleNamespace(model=Oracle(shards, processor, blind), processor=processor, schema=schema)
        monkeypatch.setattr(Extractor, "from_pretrained", lambda path: extractor)
        line = ["--run", tmp_path / "run", "--shards", shards, "--output", tmp_path / "results.json", *arguments]
        return picture_dependence.main([str(item) for item in line])

    return start


def rows(path: Path) -> dict[tuple[str, str], dict[str, Any]]:
    content = json.loads(path.read_text())
    assert content["about"]["split"] == "dev"
    assert "commit" in content["about"]
    return {(row["unit"], row["tuples"]): row for row in content["rows"]}


def test_what_is_in_the_pictures_is_lost_with_them(
    run: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(without_the_picture) == 0
    found = rows(tmp_path / "results.json")
    assert len(found) == 10
    for (unit, kind), row in found.items():
        assert row["f1_with"] == (100.0 if row["gold"] else 0.0)
        assert row["fall"] == row["f1_with"] - row["f1_without"]
        if kind == "picture only":
            gold, lost = found[unit, "all"]["gold"], row["gold"]
            assert row["f1_without"] == 0.0
            assert found[unit, "all"]["f1_without"] == pytest.approx(100 * 2 * (gold - lost) / (2 * gold - lost))
    needed = {unit for (unit, _), row in found.items() if row["needs_the_picture"]}
    assert needed == {"demo_posts/entity", "demo_pairs/relation", "demo_events/argument"}
    assert all(found[unit, "picture only"]["gold"] > 1 for unit in needed)
    printed = capsys.readouterr().out
    for unit in needed:
        assert f"| {unit} * | all |" in printed


def test_the_check_asks_for_a_fall_in_every_unit(
    run: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def all_but_pairs(sample: Sample) -> Sample:
        return sample if "relation" in sample else without_the_picture(sample)

    for blind, points, code in ((without_the_picture, 5, 0), (without_the_picture, 95, 1), (all_but_pairs, 5, 1)):
        assert run(blind, "--check", points) == code
        (tmp_path / "results.json").unlink()
    assert "demo_pairs/relation: falls by 0.0, to be >= 5: not met" in capsys.readouterr().out


def test_results_are_never_overwritten(
    run: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "results.json").write_text("kept")
    with pytest.raises(SystemExit):
        run(without_the_picture)
    assert "not overwritten" in capsys.readouterr().err
    assert (tmp_path / "results.json").read_text() == "kept"


def test_only_the_demo_is_known(run: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_toy(tmp_path / "toy", counts=(("dev", 2),))
    assert run(without_the_picture, "--shards", tmp_path / "toy") == 2
    assert "Give shards of the demo" in capsys.readouterr().err
