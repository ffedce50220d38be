"""The recipes that pretrain a base: their objectives, and training on the base that they write."""

from __future__ import annotations

import importlib.util
import random
import re
import shlex
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st

from lvlm_clorae.data.index import load_index
from lvlm_clorae.data.reader import read_samples
from lvlm_clorae.models import load_model
from lvlm_clorae.models.families.t5 import T5Processor
from lvlm_clorae.models.presets import preset_recipe
from lvlm_clorae.tasks.schema import plain
from lvlm_clorae.training.config_loading import load_config
from tests.helpers.fork_server import train
from tests.helpers.launch import REPOSITORY, records

DEMO = REPOSITORY / "shards/demo"
SEEDS = st.integers(0, 2**32).map(random.Random)
WORDS = st.lists(st.from_regex(r"[a-zA-Z0-9.]+", fullmatch=True), min_size=2, max_size=30)


def recipe(name: str) -> ModuleType:
    """Import a script of recipes/, which is not a package."""
    if str(REPOSITORY / "recipes") not in sys.path:
        sys.path.insert(0, str(REPOSITORY / "recipes"))
    spec = importlib.util.spec_from_file_location(name.replace("/", "_"), REPOSITORY / f"recipes/{name}.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # required by dataclasses
    spec.loader.exec_module(module)
    return module


shared = recipe("pretraining")


@pytest.mark.integration
@given(words=WORDS, rng=SEEDS)
def test_corruption_is_invertible(words: list[str], rng: random.Random) -> None:
    source, target = shared.corrupt(words, rng)
    pieces = re.split(r"(<extra_id_\d+>)", target)[1:]
    spans = dict(zip(pieces[::2], pieces[1::2], strict=True))
    restored = " ".join(spans.get(word, word) for word in source.split())
    assert restored.split() == words


@given(words=WORDS, rng=SEEDS)
def test_words_after(words: list[str], rng: random.Random) -> None:
    question, answer = shared.words_after(words, rng)
    asked = re.fullmatch(r"after (\S+), (\d): (.*)", question)
    assert asked
    assert asked[3].split() == words
    assert len(answer.split()) == int(asked[2]) >= 1
    assert f" {asked[1]} {answer} " in f" {' '.join(words)} "


@given(words=WORDS, rng=SEEDS)
def test_two_names_come_from_the_lexicon(words: list[str], rng: random.Random) -> None:
    question, answer = shared.two_names("a text", words, rng)
    first, second = answer.split(" , ")
    assert question == f"both {first} and {second}. text: a text"
    assert {*first.split(), *second.split()} <= set(words)


def test_capitalised_runs() -> None:
    assert shared.capitalised("so Mara Novotny left New Avalon early") == ["Mara Novotny", "New Avalon"]
    assert shared.capitalised("nobody came") == []


def test_text_base_uses_only_training_texts() -> None:
    pretraining = recipe("text_base/pretrain")
    texts, words = pretraining.training_texts(DEMO)
    index = load_index(DEMO)
    of = {
        split: {plain(s["text"]) for name in index.datasets for _, s, _ in read_samples(DEMO, index, name, split)}
        for split in ("train", "test")
    }
    assert of["train"] >= set(texts)
    assert not (of["test"] - of["train"]) & set(texts)
    assert {"person,", "location,", "entities.", "repeat:"} <= set(words)
    phase = shared.Phase(1, 1e-3, pretraining.ALL, with_images=False)
    example, rng = pretraining.objectives(texts, words), random.Random(0)
    objectives_seen = set()
    for _ in range(200):
        source, target, image, boxes = example(rng, phase)
        assert (image, boxes) == (None, [])
        assert target
        objectives_seen.add(source.split()[0].rstrip(":"))
    assert objectives_seen == set(pretraining.ALL)


def test_text_base_is_initialized_from_the_demo_base() -> None:
    demo, demo_processor = load_model("demo")
    tokenizer = shared.tokenizer_of(["Kyrie Irving leaves Dallas , Zweibruecken sings"] * 3, 400)
    model = recipe("text_base/pretrain").from_demo(
        demo, demo_processor, T5Processor(tokenizer, demo_processor.image_transform)
    )
    old, new = demo_processor.tokenizer.get_vocab(), tokenizer.get_vocab()
    both = sorted(old.keys() & new.keys())
    assert "<extra_id_99>" in both
    assert model.shared.weight[[new[token] for token in both]].equal(demo.shared.weight[[old[token] for token in both]])
    new_token = max(new.keys() - old.keys(), key=len)
    ids = [piece.id for piece in demo_processor.tokenizer.backend_tokenizer.model.tokenize(new_token)]
    torch.testing.assert_close(
        model.shared.weight[new[new_token]], sum(demo.shared.weight[id_] for id_ in ids) / len(ids)
    )
    assert model.lm_head.weight.equal(model.shared.weight)
    kept = model.state_dict()
    assert all(kept[name].equal(weight) for name, weight in demo.state_dict().items() if ".block." in name)


@pytest.mark.slow
def test_text_base_can_be_trained_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pretraining = recipe("text_base/pretrain")
    line = ["--shards", str(DEMO), "--output", str(tmp_path / "base"), "--steps", "2", "1", "--device", "cpu"]
    assert pretraining.main(line) == 0
    model, processor = load_model(str(tmp_path / "base"))
    assert len(processor.tokenizer) <= pretraining.VOCABULARY["small"]
    assert model.config.vocab_size == len(processor.tokenizer)
    demo_processor, _ = load_model("demo")
    kept = demo_processor.vision_tower.state_dict()
    assert all(weight.equal(kept[name].to(weight.dtype)) for name, weight in model.vision_tower.state_dict().items())
    settings = ["--config", REPOSITORY / "recipes/text_base/train.yaml", "--shards", DEMO, "--max-steps", 2]
    train(tmp_path / "run", 1, "--model", tmp_path / "base", *settings, "--logging_steps", 1, "--max_target_length", 8)
    assert [record["step"] for record in records(tmp_path / "run", "train")][-1] == 2
    with pytest.raises(SystemExit) as refused:
        pretraining.main(line)
    assert refused.value.code == 2
    assert "base" in capsys.readouterr().err


def test_missing_shards_exit_with_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = ["--shards", str(tmp_path / "none"), "--output", str(tmp_path / "base")]
    assert recipe("text_base/pretrain").main(line) == 2
    assert capsys.readouterr().err.startswith("error: ")
    assert not (tmp_path / "base").exists()


@pytest.mark.slow  # the tokenizer is trained on 30,000 texts
def test_demo_base_recipe_reproduces_sizes_and_tokenizer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Except for the number of steps, sizes and tokenizer equal the base of the repository."""
    pretraining = recipe("demo_base/pretrain")
    short = tuple(shared.Phase(1, phase.learning_rate, phase.mix, phase.with_images) for phase in pretraining.PHASES)
    monkeypatch.setattr(pretraining, "PHASES", short)
    monkeypatch.setattr(shared, "BATCH", 2)
    monkeypatch.setattr(sys, "argv", ["pretrain.py", "--output", str(tmp_path / "base")])
    pretraining.main()
    made, processor = load_model(str(tmp_path / "base"))
    kept, demo_processor = load_model("demo")
    assert processor.tokenizer.get_vocab() == demo_processor.tokenizer.get_vocab()
    assert {name: weight.shape for name, weight in made.state_dict().items()} == {
        name: weight.shape for name, weight in kept.state_dict().items()
    }


def test_phase_without_steps_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pretraining = recipe("text_base/pretrain")
    with pytest.raises(SystemExit) as refused:
        pretraining.main(["--shards", str(DEMO), "--output", str(tmp_path / "base"), "--steps", "5", "0"])
    assert refused.value.code == 2
    assert "--steps 5 0" in capsys.readouterr().err


def test_commands_of_the_docstring(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pretraining = recipe("text_base/pretrain")
    lines = [shlex.split(line) for line in pretraining.__doc__.splitlines() if line.startswith("    python")]
    monkeypatch.chdir(tmp_path)  # without shards, so that the recipe ends after parsing the command line
    for line in lines:
        assert line[1] == "recipes/text_base/pretrain.py"
        assert pretraining.main(line[2:]) == 2
    assert len(lines) == 2


def test_train_settings_equal_the_demo_preset() -> None:
    path = REPOSITORY / "recipes/text_base/train.yaml"
    settings = yaml.safe_load(path.read_text(encoding="utf-8"))
    assert settings.items() <= preset_recipe("demo").items()
    assert load_config(["--config", str(path)]).lora_rank == settings["lora_rank"]
