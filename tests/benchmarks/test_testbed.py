"""The testbed: its synthetic datasets, its plan of runs, and its results."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lvlm_clorae.data.index import load_index
from lvlm_clorae.models.loading import describe_model
from lvlm_clorae.tasks import format_answer, parse_answer
from lvlm_clorae.tasks.answer import written_tuples
from lvlm_clorae.tasks.schema import check_sample
from lvlm_clorae.training.adapters import add_adapter
from lvlm_clorae.training.config_loading import load_config, make_config
from tests.helpers.launch import REPOSITORY, environment
from tests.helpers.pages import commands
from tests.helpers.results import read_results
from tools.demo_data import world

sys.path.insert(0, str(REPOSITORY / "benchmarks"))

import run_plan
import testbed
import testbed_world
from plan import MAIN, Plan, Result, Run, System
from testbed_plan import FULL, QUICK, WIDEST
from testbed_world import DATASETS, GAZETTEER, ICONS, UNCLEAR, VARIANTS, WORDS, make_sample

SEEDS = st.integers(0, 2**32)


@given(seed=SEEDS, name=st.sampled_from(list(DATASETS)), variant=st.sampled_from(list(VARIANTS)))
def test_samples_are_valid_and_their_answers_parse_back(seed: int, name: str, variant: str) -> None:
    sample, _ = make_sample(name, VARIANTS[variant], random.Random(seed))
    assert check_sample(sample) == []
    for subtask, labels in DATASETS[name].labels.items():
        assert parse_answer(format_answer(sample, subtask), subtask, labels) == written_tuples(sample, subtask)


@given(seed=SEEDS, name=st.sampled_from(list(DATASETS)))
def test_variants_have_equal_texts_and_images_and_different_labels(seed: int, name: str) -> None:
    (conflict, image), (control, same) = (
        make_sample(name, VARIANTS[variant], random.Random(seed)) for variant in ("conflict", "control")
    )
    assert image == same
    assert (conflict["text"], conflict["objects"]) == (control["text"], control["objects"])
    if DATASETS[name].task == "mner":  # its words are those of the control
        assert conflict["entities"][0]["type"] == control["entities"][0]["type"]
    else:
        (before,), (now,) = (labels(sample) for sample in (control, conflict))
        assert (before == now) == (before == "none")


@given(seed=SEEDS)
def test_a_class_has_a_label_for_each_task_in_conflict_and_one_in_control(seed: int) -> None:
    kind = seed % len(ICONS)
    words = {variant: {VARIANTS[variant].word(task, kind) for task in ("mner", "mre", "mee")} for variant in VARIANTS}
    assert {name: len(found) for name, found in words.items()} == {"conflict": 3, "control": 1, "unequal": 1}
    assert words["conflict"] | words["control"] <= set(WORDS)


@given(seed=SEEDS, variant=st.sampled_from(list(VARIANTS)))
def test_names_outside_the_gazetteer_have_an_icon(seed: int, variant: str) -> None:
    sample, _ = make_sample("events", VARIANTS[variant], random.Random(seed))
    (event,) = sample["events"]
    (name,) = (one["text"].split()[-1] for one in event["arguments"] if one["role"] == "target")
    shown = [one["object"] for one in event["arguments"] if "object" in one]
    assert (name in UNCLEAR) == bool(shown)
    if name in GAZETTEER:
        assert event["type"] == VARIANTS[variant].word("mee", GAZETTEER[name])


def test_ambiguous_names_are_not_in_the_gazetteer() -> None:
    assert not set(GAZETTEER) & set(UNCLEAR)
    assert not set(GAZETTEER) & {*world.FIRST, *world.CITIES, *world.GROUPS}


@given(seed=SEEDS)
def test_unequal_datasets_have_names_of_the_gazetteer_or_an_icon(seed: int) -> None:
    for name in ("posts", "pairs", "wire", "ties"):
        sample, image = make_sample(name, VARIANTS["unequal"], random.Random(seed))
        words = set(sample["tokens"])
        if sample.get("relation", {}).get("label") == "none":
            continue
        assert bool(words & set(GAZETTEER)) == (name in ("posts", "pairs"))
        assert image or name in ("posts", "pairs")


def test_unequal_datasets_have_a_tenth_of_the_samples(tmp_path: Path) -> None:
    testbed_world.build(tmp_path, "unequal", 0, "mner")
    index = load_index(tmp_path)
    assert [index.dataset(name).samples("train") for name in ("posts", "wire")] == [400, 40]


def test_spans_leave_out_the_first_word_only_under_conflict() -> None:
    lengths: dict[tuple[str, str], set[int]] = {}
    for name in ("posts", "wire"):
        for variant, about in VARIANTS.items():
            samples = (make_sample(name, about, random.Random(seed))[0] for seed in range(40))
            lengths[name, variant] = {len(sample["entities"][0]["text"].split()) for sample in samples}
    assert lengths.pop(("wire", "conflict")) == {1}
    assert all(found == {1, 2} for found in lengths.values())


def labels(sample: dict) -> set[str]:
    return {sample["relation"]["label"]} if "relation" in sample else {event["type"] for event in sample["events"]}


def test_adapters_have_equal_trained_parameters() -> None:
    counts = {}
    for name, system in FULL.systems.items():
        if system.settings["adapter"] == "full":
            continue
        config = make_config({**testbed.SETTINGS, **system.settings, "train_projector": False})
        model = add_adapter(describe_model("demo"), config, ["mner", "mre", "mee"])
        counts[name] = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    reference = counts[MAIN[1]]
    assert {
        name: round(count / reference, 2) for name, count in counts.items() if abs(count / reference - 1) > 0.025
    } == {}


def done(plan: Plan, score: Callable[[Run], float]) -> dict[Run, Result]:
    """Results of all runs, scored by a function."""
    results: dict[Run, Result] = {}
    while left := plan.missing(results):
        assert len(set(left)) == len(left)
        results |= {run: Result({"a/entity": score(run)}, {"a/entity": score(run)}) for run in left}
    return results


@pytest.mark.integration
@settings(deadline=None)  # each example goes through a whole plan
@given(best=st.floats(1e-4, 0.1))
def test_the_best_rate_is_inside_its_grid_or_at_the_bounds(best: float) -> None:
    results = done(FULL, lambda run: -max(best / run.rate, run.rate / best))
    for variant, system in FULL.order:
        if FULL.systems[system].rate is not None:
            assert FULL.best_rate(results, variant, system) == FULL.systems[system].rate
            continue
        tried = FULL.rates(results, variant, FULL.systems[system].like or system)
        rate = FULL.best_rate(results, variant, system)
        assert rate == min(tried, key=lambda one: max(best / one, one / best))
        assert len(tried) >= 3
        assert rate not in (tried[0], tried[-1]) or rate / 2 < WIDEST[0] or rate * 2 > WIDEST[1]


def test_evaluation_seeds_are_not_tuning_seeds_and_systems_are_tuned_alike() -> None:
    results = done(FULL, lambda run: -abs(run.rate - 2e-3))
    for variant, system in FULL.order:
        seeds = {run.seed for run in FULL.evaluation(results, variant, system)}
        assert len(seeds) >= (12 if system in MAIN else 3)
        assert not seeds & set(FULL.tuning_seeds)
        if FULL.systems[system].tuned:
            assert len(seeds) >= 5
            assert FULL.rates(results, variant, system) == list(FULL.grid)
    assert len({run.name for run in results}) == len(results)


def test_a_difference_is_paired_by_seed() -> None:
    def score(run: Run) -> float:
        return 10.0 * run.seed + (2.0 if run.system == MAIN[0] else 0.0)

    rows = run_plan.summarise(QUICK, done(QUICK, score))
    (behind,) = (row["behind"] for row in rows if row["system"] == MAIN[1])
    assert (behind["mean"], behind["error"]) == (2.0, 0.0)
    assert "+2.0 ± 0.0" in run_plan.table(rows)


def test_settings_are_formatted_as_flags() -> None:
    found = run_plan.flags({"use_gate": False, "loss_weighting": "coba", "target_modules": ["q", "v"], "lora_rank": 4})
    config = load_config(found)
    assert (config.use_gate, config.loss_weighting, config.target_modules) == (False, "coba", ["q", "v"])
    assert config.lora_rank == 4


def test_a_system_of_one_task_has_shards_of_that_task_only(tmp_path: Path) -> None:
    plan = Plan({"x": System({}, task="mre")}, (("control", "x"),), (1e-3,), (100,))
    (directory,) = {testbed.Testbed(tmp_path, plan, {}).shards(run) for run in plan.missing({})}
    assert set(json.loads((directory / "index.json").read_text())["datasets"]) == {"pairs", "ties"}


def test_the_commands_of_its_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both are parsed; the report is also run."""
    prefix = "python benchmarks/testbed.py "
    lines = [line.removeprefix(prefix).split() for line in commands(REPOSITORY / "docs/testbed.md", prefix)]
    monkeypatch.setattr(testbed, "results_file", lambda *given: tmp_path / "none.json")
    assert [testbed.parse(words).report for words in lines] == [False, True]
    monkeypatch.chdir(tmp_path)
    assert testbed.main(lines[1]) == 0
    assert not (tmp_path / "none.json").exists()


def end(run: Run, work: testbed.Testbed) -> None:
    """Write the files of a finished run, and keep its result."""
    directory = work.directory / run.name
    directory.mkdir(parents=True)
    (directory / "metrics.jsonl").write_text(json.dumps({"kind": "dev", "f1": {"a/entity": 1.0}}) + "\n")
    (directory / "scores.json").write_text(json.dumps({"dataset_tasks": {"a/entity": {"f1": 2.0}}}))
    work.keep(run, 3.0)


def test_results_are_continued_on_another_machine(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """With a file that is written before all runs are done. Files of other programs are refused."""
    first, part = testbed.Testbed(tmp_path / "first", FULL, testbed.SETTINGS), tmp_path / "part.json"
    for run in FULL.missing({})[:2]:
        end(run, first)
    assert testbed.main(["--work", str(first.directory), "--report", "--output", str(part)]) == 0
    content = json.loads(part.read_text())
    assert (content["left"], len(content["runs"])) == (len(FULL.missing(first.results())), 2)

    second = testbed.Testbed(tmp_path / "second", FULL, testbed.SETTINGS)
    line = ["--work", str(second.directory), "--report", "--known"]
    for _ in range(2):  # existing results are not replaced
        assert testbed.main([*line, str(part)]) == 0
        assert second.results() == first.results()
        assert "2 runs" in capsys.readouterr().out
    (tmp_path / "list.json").write_text("[]")
    for other in ("list.json", "missing.json"):
        assert testbed.main([*line, str(tmp_path / other)]) == 2
        assert other in capsys.readouterr().err
    # no path is taken from a file
    for name, value in (("variant", "../.."), ("seed", "../../x"), ("system", "other"), ("rate", "../../x")):
        bad = json.loads(part.read_text())
        bad["runs"][1]["run"][name] = value
        (tmp_path / "bad.json").write_text(json.dumps(bad))
        third = tmp_path / "third"
        assert testbed.main(["--work", str(third), "--report", "--known", str(tmp_path / "bad.json")]) == 2
        assert "bad.json" in capsys.readouterr().err
        assert not list((third / "results").iterdir())


def test_the_figures_of_its_page_are_those_of_the_committed_runs() -> None:
    page = (REPOSITORY / "docs/testbed.md").read_text(encoding="utf-8")
    now, half, part, scale = (
        read_results(f"testbed-{name}")
        for name in (
            "alpha-4r-cpu-2026-11-26",
            "alpha-2r-cpu-2026-11-26",
            "cpu-2026-11-26-part",
            "scale-cpu-2026-11-26",
        )
    )
    gated = ("C-LoRAE", "no MIM", "no achievement")  # the systems that the scale changes
    dataset_tasks = list(now["summary"][0]["dataset_tasks"])
    for row in [
        *now["summary"],
        *(row for row in half["summary"] if row["system"] in gated),
        *part["summary"],
    ]:
        assert " | ".join(run_plan.cells(row, dataset_tasks)[1:]).rstrip() in page
    readme = (REPOSITORY / "README.md").read_text(encoding="utf-8")
    rows_of_readme = ((MAIN[0], "C-LoRAE"), (MAIN[1], "LoRA"), ("only task experts", "task experts alone"))
    for system, name in rows_of_readme:
        rows = [row for row in now["summary"] if row["system"].startswith(system)]
        found = [
            max((row["all"] for row in rows if row["variant"] == variant), key=lambda one: one["mean"])
            for variant in ("conflict", "control")  # at its best rate
        ]
        assert " | ".join([f"| {name}", *(f"{one['mean']:.1f} ± {one['deviation']:.1f}" for one in found)]) in readme
    sums: dict[str, dict[str, list[str]]] = {}
    for content in sorted([*part["runs"], *scale["runs"]], key=lambda one: one["run"]["seed"]):
        run, result = content["run"], content["result"]
        if (run["variant"], run["rate"]) == ("control", 2e-3) and run["seed"] in FULL.tuning_seeds:
            for split in ("dev", "test"):
                found = f"{sum(result[split].values()):.0f}"
                sums.setdefault(run["system"], {}).setdefault(split, []).append(found)
    names = {
        **{"C-LoRAE": "C-LoRAE, alpha = r", "no gate": "without the gate", "alpha48": "alpha = 2 r"},
        **{"split40-3": "rank 40, task experts of 3", "split40-3-a80": "the same, alpha = 2 r", "LoRA, 2r": "LoRA, 2r"},
    }
    for system, name in names.items():
        assert f"| {name} | {', '.join(sums[system]['dev'])} | {', '.join(sums[system]['test'])} |" in page


def test_the_figures_under_way_are_those_of_the_committed_runs() -> None:
    readme, page = ((REPOSITORY / name).read_text(encoding="utf-8") for name in ("README.md", "docs/testbed.md"))
    found = {(row["variant"], row["system"]): row for row in read_results("testbed-2026-11-30-part")["summary"]}
    for system in MAIN:
        all_ = found["conflict", system]["all"]
        assert f"{all_['mean']:.1f} ± {all_['deviation']:.1f}" in readme.rpartition("86 of about")[2]
        assert f"{system.replace(',', '')} {all_['mean']:.1f} ± {all_['deviation']:.1f}" in page
    for variant in ("conflict", "control"):
        behind = found[variant, MAIN[1]]["behind"]
        assert f"difference {behind['mean']:.1f} ± {behind['error']:.1f}" in page
    assert len(read_results("testbed-2026-11-30-part")["runs"]) == 86
    inert, control = found["conflict", "no MIM"], found["control", MAIN[0]]["all"]
    assert len(inert["all"]["values"]) == 10
    assert f"{inert['behind']['mean']:.1f} ± {inert['behind']['error']:.1f} less" in page
    assert f"control, C-LoRAE {control['mean']:.1f} ± {control['deviation']:.1f}" in page


def test_results_with_other_settings_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (run, *_) = QUICK.missing({})
    work = testbed.Testbed(tmp_path, QUICK, {"num_train_epochs": 1})
    end(run, work)
    assert work.results() == {run: Result({"a/entity": 1.0}, {"a/entity": 2.0})}
    line = ["--work", str(tmp_path), "--report", "--output", str(tmp_path / "none.json")]
    assert testbed.main(line) == 2
    assert "--work" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["alpha-2r-cpu-2026-11-26", "alpha-4r-cpu-2026-11-26", "cpu-2026-11-26-part"])
def test_results_with_old_names_of_settings_are_refused_with_the_reason(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Their mutual-information loss was another one, so they are not continued."""
    known = REPOSITORY / f"benchmarks/results/testbed-{name}.json"
    assert testbed.main(["--work", str(tmp_path), "--report", "--known", str(known)]) == 2
    error = capsys.readouterr().err
    assert all(word in error for word in (known.name, "old names", "micro_batch", "mutual-information", "--known"))
    assert not list((tmp_path / "results").iterdir())


@pytest.mark.slow
def test_a_quick_testbed_is_resumed_and_ends_with_a_table_and_json(tmp_path: Path) -> None:
    output = tmp_path / "out.json"
    line = [sys.executable, "benchmarks/testbed.py", "--work", tmp_path / "work", "--quick"]

    def quick(*flags: str) -> str:
        asked = [*map(str, line), *flags]
        done = subprocess.run(asked, cwd=REPOSITORY, env=environment(), capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    written = ["--output", str(output)]
    assert "missing so far: 2 runs" in quick("--minutes", "0", *written)
    assert json.loads(output.read_text())["left"] == 2  # a part, which --known continues
    output.unlink()
    assert "6 done, 0 planned" in quick(*written)
    content = json.loads(output.read_text())
    assert [row["system"] for row in content["summary"]] == [system for _, system in QUICK.order]
    assert len(content["runs"]) == 6
    output.unlink()
    assert "planned" not in quick(*written)  # nothing is trained again
    assert json.loads(output.read_text())["summary"] == content["summary"]
