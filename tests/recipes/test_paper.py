"""recipes/paper: each file equals its row of the paper, can be trained with, and is listed in docs/reproduce.md."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from lvlm_clorae.analysis.compare import compare
from lvlm_clorae.cli import shards
from lvlm_clorae.data.convert import PUBLISHED, load_converter
from lvlm_clorae.data.writer import ShardWriter
from lvlm_clorae.models.presets import preset_recipe
from lvlm_clorae.sweep.expand import read_sweep
from lvlm_clorae.training.checks import (
    check_experts,
    check_global_micro_batch,
    check_model,
    check_quantized,
    check_shards,
)
from lvlm_clorae.training.config import FIELDS, TrainConfig
from lvlm_clorae.training.config_loading import load_config, make_config
from lvlm_clorae.training.dataset_tasks import choose_dataset_tasks
from lvlm_clorae.training.deepspeed_config import read_deepspeed_file, resolve
from tests.helpers.fork_server import train
from tests.helpers.launch import REPOSITORY
from tests.helpers.pages import commands
from tests.helpers.runs import make_run
from tools.paper import DATASET_TASKS, ROWS, PaperRow, paper_row, unlike

RECIPES = REPOSITORY / "recipes/paper"
SWEEP = RECIPES / "figure5.yaml"
PAGE = REPOSITORY / "docs/reproduce.md"
ON_FOUR_GPUS = ["--nodes=1", "--gpus-per-node=4", "--ntasks-per-node=4", "slurm/train.sbatch"]

every_row = pytest.mark.parametrize("row", ROWS, ids=lambda row: row.recipe)


def path_of(row: PaperRow) -> Path:
    return RECIPES / f"{row.recipe}.yaml"


def settings_of(row: PaperRow) -> dict[str, Any]:
    content: dict[str, Any] = yaml.safe_load(path_of(row).read_text(encoding="utf-8"))
    return content


DATASETS = tuple(name for name in PUBLISHED if name not in ("sroie", "funsd"))
"""The datasets of the paper."""


def config_of(row: PaperRow) -> TrainConfig:
    return load_config(["--config", str(path_of(row))])


def annotations(task: str) -> dict[str, Any]:
    """Return annotations of "Mara sings in Tamsk", with labels of all published datasets of the task."""
    head, tail = {"text": "Mara", "span": [0, 1]}, {"text": "Tamsk", "span": [3, 4]}
    trigger = {"text": "sings", "span": [1, 2]}
    place = {"role": "Place", **tail}
    return {
        "mner": {"entities": [{"type": "person", **head}]},
        "mre": {"relation": {"head": head, "tail": tail, "label": "none"}},
        "mee": {"events": [{"type": "Contact:Meet", "trigger": trigger, "arguments": [place]}]},
    }[task]


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write shards of all published datasets with the converters' specs and two synthetic samples per split."""
    directory = tmp_path_factory.mktemp("published") / "real"
    for name in DATASETS:
        spec = load_converter(name, directory).spec
        tokens = ["Mara", "sings", "in", "Tamsk"]
        sample = {
            **{"dataset": name, "task": spec.task, "text": " ".join(tokens), "tokens": tokens, "image": None},
            **{"objects": [], "source": {}, **annotations(spec.task)},
        }
        with ShardWriter(directory, spec) as writer:
            for split in ("train", "dev", "test"):
                for number in range(2):
                    writer.add(split, f"{name}_{split}_{number}", sample, None)
    return directory


def test_files_and_rows_correspond() -> None:
    assert sorted(path.stem for path in RECIPES.iterdir()) == sorted([SWEEP.stem, *(row.recipe for row in ROWS)])


@every_row
def test_recipe_equals_its_row_without_defaults(row: PaperRow) -> None:
    config = config_of(row)
    assert paper_row(config) is row
    assert unlike(config, row) == {}
    settings = settings_of(row)
    usual = make_config({"model": row.model})
    assert settings.keys() <= FIELDS.keys()
    for name, value in settings.items():
        if name != "model":
            assert value != getattr(usual, name), f"{name} repeats the default or the preset"


@every_row
def test_recipe_contains_its_command(row: PaperRow) -> None:
    [line] = re.findall(r"^#   sbatch (.*)$", path_of(row).read_text(encoding="utf-8"), re.MULTILINE)
    words = shlex.split(line)
    assert words[:4] == ON_FOUR_GPUS
    assert words[4:6] == ["--config", str(path_of(row).relative_to(REPOSITORY))]
    config = load_config(["--config", str(path_of(row)), *words[6:]])
    assert (config.output_dir, config.resume_from_checkpoint) == (f"runs/paper/{row.recipe}", "auto")


@every_row
def test_recipe_passes_all_checks(row: PaperRow, published: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = load_config(["--config", str(path_of(row)), "--shards", str(published)])
    monkeypatch.chdir(REPOSITORY)
    check_experts(config)
    check_global_micro_batch(config, 4)
    check_model(config.model)
    content = read_deepspeed_file(Path(config.deepspeed))
    check_quantized(config, content)
    assert (
        resolve(content, config, 4, True, config.deepspeed)["train_batch_size"]
        == 4 * config.per_device_train_batch_size
    )
    dataset_tasks = choose_dataset_tasks(check_shards(config).index, config)
    held_out = {"m2e2", *row.held_out}
    trained = {dataset_task.dataset for dataset_task in dataset_tasks.train.values()}
    assert trained == {dataset_task.dataset for dataset_task in dataset_tasks.dev.values()} == set(DATASETS) - held_out
    assert set(DATASET_TASKS) <= set(dataset_tasks.test), "held-out datasets are tested"
    for name, reference in {"twitter15/entity": 78.9, "ace2005/trigger": 100.0, "swig/argument": 100.0}.items():
        assert dataset_tasks.reference()[name] == reference


def test_defaults_and_presets_are_those_of_the_paper() -> None:
    expected = {"base": (128, 10), "large": (64, 4), "xl": (64, 2)}
    for row in ROWS:
        config = config_of(row)
        assert (config.lora_rank, config.per_device_train_batch_size) == expected[row.model.rpartition("-")[2]]
        assert set(preset_recipe(row.model)) == {"lora_rank", "per_device_train_batch_size"}
        assert (config.num_train_epochs, config.learning_rate, config.lr_scheduler_type, config.beta or 0.01) == (
            20,
            1e-4,
            "step",
            0.01,
        )
        assert (config.max_source_length, config.max_target_length) == (512, 128)
        assert 0.1 <= config.lora_dropout <= 0.4


def test_ablations_change_one_setting() -> None:
    [complete] = [settings_of(row) for row in ROWS if row.recipe == "clorae-large"]
    switched = {}
    for row in ROWS:
        if row.without:
            settings = settings_of(row)
            assert {name: settings.pop(name) for name in complete} == complete
            switched[row.without] = settings
    assert switched == {
        ("only universal",): {"use_experts": False},
        ("only task experts",): {"use_universal": False},
        ("no gate",): {"use_gate": False},
        ("no MIM",): {"beta": 0},
        ("no achievement loss",): {"loss_weighting": "none"},
    }


def test_figure_5_varies_one_setting_at_a_time() -> None:
    sweep = read_sweep(SWEEP)
    assert len(sweep.sweep_runs) == 18
    [line] = re.findall(r"sbatch (.*)", SWEEP.read_text(encoding="utf-8"))
    assert "--array=0-17" in shlex.split(line)
    assert {tuple(sweep_run.config.hold_out) for sweep_run in sweep.sweep_runs} == {("m2e2",)}
    for size, rank in (("base", 128), ("large", 64)):
        sweep_runs = {
            (sweep_run.config.lora_rank, sweep_run.config.lora_dropout)
            for sweep_run in sweep.sweep_runs
            if sweep_run.config.model == f"flan-t5-{size}"
        }
        ranks, dropouts = {(r, 0.1) for r in (16, 32, 64, 128, 256)}, {(rank, d) for d in (0.0, 0.1, 0.2, 0.4, 0.8)}
        assert sweep_runs == ranks | dropouts


@pytest.mark.slow
def test_training_with_a_recipe(published: Path, tmp_path: Path) -> None:
    """Train two steps on the demo base, and compare the run with the paper."""
    [row] = [row for row in ROWS if row.recipe == "clorae-large-no-gate"]
    tiny = [
        "--model",
        "demo",
        "--shards",
        published,
        "--max-steps",
        2,
        "--max_target_length",
        8,
        "--max_source_length",
        2048,
    ]
    printed = train(tmp_path / "run", 1, "--config", path_of(row), *tiny)
    [system] = compare([tmp_path / "run"]).rows
    assert system.name == "C-LoRAE, no gate"
    assert set(DATASET_TASKS) <= set(system.scores[0])
    assert system.trained_parameters
    [trained] = re.findall(r"with clorae: ([\d.]+) M of", printed)
    assert f"{system.trained_parameters / 1e6:.2f}" == trained
    assert "m2e2" not in printed.partition("training samples")[2].splitlines()[0]


def test_table_of_the_page_equals_the_rows() -> None:
    found = {}
    for line in PAGE.read_text(encoding="utf-8").splitlines():
        if match := re.match(r"\| (.+?) \| \[(.+?)\]\(\.\./recipes/paper/(.+?)\.yaml\) \|(.*)\|$", line):
            assert match[2] == match[3]
            found[match[2]] = [cell.strip() for cell in match[4].split("|")]
    assert list(found) == [row.recipe for row in ROWS]
    for row in ROWS:
        figures = [
            f"{row.f1[dataset_task]:.1f}" if dataset_task in row.f1 else "" for dataset_task in (*DATASET_TASKS, "All")
        ]
        assert found[row.recipe] == [*figures, "" if row.trained is None else f"{row.trained:g}"]


@pytest.mark.slow
def test_commands_of_the_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run the commands in order; the runs of the jobs exist already."""
    (tmp_path / "recipes").symlink_to(REPOSITORY / "recipes")
    for row in ROWS:
        settings = {**settings_of(row), "output_dir": f"runs/paper/{row.recipe}"}
        f1 = {dataset_task: row.f1.get(dataset_task, 50.0) for dataset_task in DATASET_TASKS}
        make_run(tmp_path / "runs/paper" / row.recipe, f1, **settings)
    monkeypatch.chdir(tmp_path)
    lines = [line for line in commands(PAGE, "") if line]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{environment['PATH']}"
    built, printed = [], []
    for line in lines:
        words = shlex.split(line)
        if words[:3] == ["lvlm-clorae", "shards", "build"]:
            arguments = shards.parser().parse_args(words[2:])
            built.append(arguments.dataset)
            assert str(arguments.output_dir) == settings_of(ROWS[0])["shards"]
        elif words[:2] == ["lvlm-clorae", "shards"]:
            assert words[2:] == ["verify", "shards/real"]
        elif words[0] == "sbatch" and "slurm/train.sbatch" in words:
            assert words[1:5] == ON_FOUR_GPUS
            assert config_of(ROWS[4]) == load_config(words[5:7])
            assert f"#   {line}" in path_of(ROWS[4]).read_text(encoding="utf-8")
        elif words[0] == "sbatch":
            assert f"#   {line}" in SWEEP.read_text(encoding="utf-8")
        else:
            done = subprocess.run(["bash", "-euc", line], env=environment, capture_output=True, text=True, check=False)
            assert done.returncode == 0, f"{line}\n{done.stderr}"
            printed.append(done.stdout)
    assert tuple(built) == DATASETS
    expand, collect, table2, table3, figure4, table4 = printed
    assert "18 runs: 18 waiting; in runs/paper/figure5" in expand
    assert "there are no scores yet" in collect
    assert [table2.count(f"paper, Table 2: {system}") for system in ("UMIE", "C-LoRAE")] == [2 * 3 - 1, 2 * 3]
    assert table3.count("| C-LoRAE") == 1 + 2 * 5
    assert "differs from recipes/paper" not in "".join(printed)
    assert "no corresponding row" not in "".join(printed)
    assert (tmp_path / "figure4.png").read_bytes().startswith(b"\x89PNG")
    assert "MoSLoRA flan-t5-large" in figure4
    assert "66.2" in table4
    assert "twitter15" not in table4.partition("not shown")[0]
