"""The recipes that pretrain a base: their objectives say what they claim, and what they write is a base to train on."""

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

from lvlm_clorae.data.shards import load_index, read_samples
from lvlm_clorae.models import load_model
from lvlm_clorae.models.presets import preset_recipe
from lvlm_clorae.models.processor_t5 import T5Processor
from lvlm_clorae.tasks.schema import plain
from lvlm_clorae.training.config import load_config
from tests.launch import REPOSITORY, records, train

DEMO = REPOSITORY / "shards/demo"
SEEDS = st.integers(0, 2**32).map(random.Random)
WORDS = st.lists(st.from_regex(r"[a-zA-Z0-9.]+", fullmatch=True), min_size=2, max_size=30)


def recipe(name: str) -> ModuleType:
    """A script of recipes/, which is no package."""
    if str(REPOSITORY / "recipes") not in sys.path:
        sys.path.insert(0, str(REPOSITORY / "recipes"))
    spec = importlib.util.spec_from_file_location(name.replace("/", "_"), REPOSITORY / f"recipes/{name}.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look there
    spec.loader.exec_module(module)
    return module


shared = recipe("pretraining")


@given(words=WORDS, rng=SEEDS)
def test_a_corrupted_text_with_its_target_is_the_text(words: list[str], rng: random.Random) -> None:
    source, target = shared.corrupt(words, rng)
    pieces = re.split(r"(<extra_id_\d+>)", target)[1:]
    spans = dict(zip(pieces[::2], pieces[1::2], strict=True))
    restored = " ".join(spans.get(word, word) for word in source.split())
    assert restored.split() == words


@given(words=WORDS, rng=SEEDS)
def test_words_after_a_word(words: list[str], rng: random.Random) -> None:
    question, answer = shared.words_after(words, rng)
    asked = re.fullmatch(r"after (\S+), (\d): (.*)", question)
    assert asked
    assert asked[3].split() == words
    assert len(answer.split()) == int(asked[2]) >= 1
    assert f" {asked[1]} {answer} " in f" {' '.join(words)} "


@given(words=WORDS, rng=SEEDS)
def test_two_names_are_of_the_lexicon_and_repeated(words: list[str], rng: random.Random) -> None:
    question, answer = shared.two_names("a text", words, rng)
    first, second = answer.split(" , ")
    assert question == f"both {first} and {second}. text: a text"
    assert {*first.split(), *second.split()} <= set(words)


def test_capitalised_runs() -> None:
    assert shared.capitalised("so Mara Novotny left New Avalon early") == ["Mara Novotny", "New Avalon"]
    assert shared.capitalised("nobody came") == []


def test_a_text_base_sees_training_texts_alone() -> None:
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
    phase = shared.Phase(1, 1e-3, pretraining.ALL, pictures=False)
    example, rng = pretraining.objectives(texts, words), random.Random(0)
    kinds = set()
    for _ in range(200):
        source, target, image, boxes = example(rng, phase)
        assert (image, boxes) == (None, [])
        assert target
        kinds.add(source.split()[0].rstrip(":"))
    assert kinds == set(pretraining.ALL)


def test_a_text_base_begins_as_the_demo_base_under_its_own_tokenizer() -> None:
    demo, theirs = load_model("demo")
    tokenizer = shared.tokenizer_of(["Kyrie Irving leaves Dallas , Zweibruecken sings"] * 3, 400)
    model = recipe("text_base/pretrain").from_demo(demo, theirs, T5Processor(tokenizer, theirs.pictures))
    old, new = theirs.tokenizer.get_vocab(), tokenizer.get_vocab()
    both = sorted(old.keys() & new.keys())
    assert "<extra_id_99>" in both
    assert model.shared.weight[[new[token] for token in both]].equal(demo.shared.weight[[old[token] for token in both]])
    fresh = max(new.keys() - old.keys(), key=len)
    ids = [piece.id for piece in theirs.tokenizer.backend_tokenizer.model.tokenize(fresh)]
    torch.testing.assert_close(model.shared.weight[new[fresh]], sum(demo.shared.weight[id_] for id_ in ids) / len(ids))
    assert model.lm_head.weight.equal(model.shared.weight)
    kept = model.state_dict()
    assert all(kept[name].equal(weight) for name, weight in demo.state_dict().items() if ".block." in name)


@pytest.mark.slow
def test_a_text_base_is_a_base_for_the_main_job(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pretraining = recipe("text_base/pretrain")
    line = ["--shards", str(DEMO), "--output", str(tmp_path / "base"), "--steps", "2", "1", "--device", "cpu"]
    assert pretraining.main(line) == 0
    model, processor = load_model(str(tmp_path / "base"))
    assert len(processor.tokenizer) <= pretraining.VOCABULARY["small"]
    assert model.config.vocab_size == len(processor.tokenizer)
    theirs, _ = load_model("demo")
    kept = theirs.vision_tower.state_dict()
    assert all(weight.equal(kept[name].to(weight.dtype)) for name, weight in model.vision_tower.state_dict().items())
    settings = ["--config", REPOSITORY / "recipes/text_base/train.yaml", "--shards", DEMO, "--max-steps", 2]
    train(tmp_path / "run", 1, "--model", tmp_path / "base", *settings, "--log-every", 1, "--max-answer-length", 8)
    assert [record["step"] for record in records(tmp_path / "run", "train")][-1] == 2
    with pytest.raises(SystemExit) as refused:
        pretraining.main(line)
    assert refused.value.code == 2
    assert "would be overwritten" in capsys.readouterr().err


def test_shards_that_are_not_there_are_a_users_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = ["--shards", str(tmp_path / "none"), "--output", str(tmp_path / "base")]
    assert recipe("text_base/pretrain").main(line) == 2
    assert capsys.readouterr().err.startswith("error: ")
    assert not (tmp_path / "base").exists()


@pytest.mark.slow  # the tokenizer is made of 30,000 drawn texts
def test_the_demo_base_is_made_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All but the number of steps: sizes and tokenizer are those of the base in the repository."""
    pretraining = recipe("demo_base/pretrain")
    short = tuple(shared.Phase(1, phase.learning_rate, phase.mix, phase.pictures) for phase in pretraining.PHASES)
    monkeypatch.setattr(pretraining, "PHASES", short)
    monkeypatch.setattr(shared, "BATCH", 2)
    monkeypatch.setattr(sys, "argv", ["pretrain.py", "--output", str(tmp_path / "base")])
    pretraining.main()
    made, processor = load_model(str(tmp_path / "base"))
    kept, theirs = load_model("demo")
    assert processor.tokenizer.get_vocab() == theirs.tokenizer.get_vocab()
    assert {name: weight.shape for name, weight in made.state_dict().items()} == {
        name: weight.shape for name, weight in kept.state_dict().items()
    }


def test_a_phase_without_steps_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pretraining = recipe("text_base/pretrain")
    with pytest.raises(SystemExit) as refused:
        pretraining.main(["--shards", str(DEMO), "--output", str(tmp_path / "base"), "--steps", "5", "0"])
    assert refused.value.code == 2
    assert "either phase takes a step or more" in capsys.readouterr().err


def test_the_commands_in_its_head(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pretraining = recipe("text_base/pretrain")
    lines = [shlex.split(line) for line in pretraining.__doc__.splitlines() if line.startswith("    python")]
    monkeypatch.chdir(tmp_path)  # where there are no shards: the first thing after the command line is read
    for line in lines:
        assert line[1] == "recipes/text_base/pretrain.py"
        assert pretraining.main(line[2:]) == 2
    assert len(lines) == 2


def test_the_job_is_set_as_from_the_demo_base() -> None:
    path = REPOSITORY / "recipes/text_base/train.yaml"
    settings = yaml.safe_load(path.read_text(encoding="utf-8"))
    assert settings.items() <= preset_recipe("demo").items()
    assert load_config(["--config", str(path)]).rank == settings["rank"]
