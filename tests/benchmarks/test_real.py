"""The comparison on published data: its subsets, its plan, and the frozen base with examples in the prompt."""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lvlm_clorae.data.dataset import ShardDataset
from lvlm_clorae.data.index import load_index
from lvlm_clorae.data.reader import read_samples
from lvlm_clorae.models.loading import describe_model
from lvlm_clorae.tasks import build_prompt, format_answer
from lvlm_clorae.training import distributed
from lvlm_clorae.training.adapters import add_adapter
from lvlm_clorae.training.config_loading import make_config
from tests.helpers.launch import REPOSITORY

sys.path.insert(0, str(REPOSITORY / "benchmarks"))

import few_shot
import real
from plan import MAIN, Result, Run
from real_data import choose, write_subset
from real_plan import EXAMPLES, FULL, LOOKUP, SYSTEMS, TASKS, VARIANTS

DEMO = REPOSITORY / "shards/demo"


@given(is_empty=st.lists(st.booleans()), limit=st.integers(0, 40), seed=st.text(max_size=3), balanced=st.booleans())
def test_subsets_are_drawn_without_repetition(is_empty: list[bool], limit: int, seed: str, balanced: bool) -> None:
    found = choose(is_empty, limit, seed, balanced)
    assert found == sorted(set(found)) == choose(is_empty, limit, seed, balanced)
    assert set(found) <= set(range(len(is_empty)))
    assert len(found) == min(limit, len(is_empty)) or (balanced and sum(is_empty) > len(is_empty) / 2)
    if balanced and len(is_empty) > limit:
        assert sum(is_empty[number] for number in found) <= limit / 2


def test_a_subset_has_samples_of_the_source_and_of_one_task(tmp_path: Path) -> None:
    for name in ("demo_posts", "demo_pairs"):
        write_subset(DEMO, tmp_path, name, {"train": 5, "test": 3}, "mner")
    index = load_index(tmp_path)
    assert list(index.datasets) == ["demo_posts"]
    source = {key: sample for key, sample, _ in read_samples(DEMO, load_index(DEMO), "demo_posts", "train")}
    found = {key: sample for key, sample, _ in read_samples(tmp_path, index, "demo_posts", "train")}
    assert len(found) == 5
    assert found.items() <= source.items()


def test_examples_are_prompts_with_their_answers() -> None:
    train = ShardDataset(load_index(DEMO), DEMO)
    task = train.index.dataset_tasks("train")["demo_posts/entity"]
    samples = [train[ref].data for ref in train.refs(task.name)]
    asked = {f"{build_prompt(one, 'entity', task.labels)}\nAnswer: {format_answer(one, 'entity')}" for one in samples}
    first, other = (few_shot.examples_of(train, task, 3, seed).split("\n\n") for seed in (0, 1))
    assert len(first) == 4
    assert first[-1] == ""
    assert set(first[:-1]) <= asked
    assert first != other
    assert few_shot.examples_of(train, task, 0, 0) == ""


@pytest.mark.integration
def test_examples_stand_before_every_prompt(tmp_path: Path) -> None:
    write_subset(DEMO, tmp_path, "demo_posts", {"train": 6, "test": 2}, None)
    settings = {"seed": 0, "batch_size": 2, "max_new_tokens": 4}
    try:
        (found,) = few_shot.evaluate("demo", tmp_path, number=2, **settings).values()
    finally:
        distributed.stop()
    assert 0 <= found["f1"] <= 100
    assert found["gold"] > 0


def test_every_system_is_planned_and_tuned_as_described() -> None:
    results: dict[Run, Result] = {}
    while left := FULL.missing(results):
        results |= {run: Result({"a/entity": -run.rate}, {"a/entity": 1.0}) for run in left}
    planned = Counter((run.variant, run.system) for run in results if run.seed not in FULL.tuning_seeds)
    assert {system for _, system in planned} == set(SYSTEMS)
    assert [planned["comparison", system] for system in MAIN] == [3, 3]
    assert {planned[variant, "C-LoRAE, 1e-3"] for variant in ("text", "boxes", "image")} == {3}
    tuned = {run.system for run in results if run.seed in FULL.tuning_seeds}
    assert tuned == {*MAIN, "full"}
    assert {SYSTEMS[name].task for name in SYSTEMS} - {None} == set(TASKS)
    assert {name for name, system in SYSTEMS.items() if system.settings["adapter"] == "none"} == {*EXAMPLES, LOOKUP}
    assert {run.variant for run in results} == set(VARIANTS)


def test_settings_of_runs_have_no_places(tmp_path: Path) -> None:
    options = real.parse(["--data", "data", "--base", str(tmp_path), "--work", str(tmp_path / "work")])
    work = real.Real(options, FULL, real.SETTINGS)
    run = Run("full", "C-LoRAE, all data", 1e-3, 0)
    assert str(tmp_path) not in str(work.arguments(run))
    config = make_config({**work.arguments(run), **{name: str(it) for name, it in work.places(run, tmp_path).items()}})
    assert (config.model, config.vision, config.lora_rank) == (str(tmp_path), "none", 32)


def test_a_tuning_run_has_dev_scores_alone(tmp_path: Path) -> None:
    options = real.parse(["--data", "data", "--base", str(tmp_path), "--work", str(tmp_path / "work")])
    work = real.Real(options, FULL, real.SETTINGS)
    run = next(run for run in FULL.missing({}) if run.seed in FULL.tuning_seeds)
    folder = work.directory / run.name
    folder.mkdir()
    (folder / "metrics.jsonl").write_text('{"kind": "dev", "step": 1, "f1": {"a/entity": 3.0}}\n')
    result = work.keep(run, 1.0)
    assert (result.dev, result.test) == ({"a/entity": 3.0}, {})
    assert work.results() == {run: result}


@pytest.mark.slow
def test_adapters_have_equal_trained_parameters() -> None:
    counts = {}
    for name, system in SYSTEMS.items():
        if system.settings["adapter"] not in ("full", "none") and system.task is None:
            settings = {"model": "smollm2-135m", "target_modules": ["all-linear"], **system.settings}
            model = add_adapter(describe_model("smollm2-135m", vision="none"), make_config(settings), list(TASKS))
            counts[name] = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    reference = counts[MAIN[1]]
    assert {name: count for name, count in counts.items() if abs(count / reference - 1) > 0.035} == {}
