"""recipes/paper: each file is what its row of the paper says, the job takes it, and docs/reproduce.md tells of it."""

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

from lvlm_clorae import cli
from lvlm_clorae.analysis.compare import compare
from lvlm_clorae.analysis.paper import ROWS, UNITS, PaperRow, paper_row, unlike
from lvlm_clorae.data.convert import PUBLISHED, load_converter
from lvlm_clorae.data.shards import ShardWriter
from lvlm_clorae.models.presets import preset_recipe
from lvlm_clorae.sweep.points import read_sweep
from lvlm_clorae.training.checks import check_block, check_model, check_quantised, check_shards, check_values
from lvlm_clorae.training.config import FIELDS, TrainConfig, load_config, make_config
from lvlm_clorae.training.deepspeed_config import read_deepspeed_file, resolve
from lvlm_clorae.training.units import choose_units
from tests.analysis.runs import make_run
from tests.launch import REPOSITORY, train
from tests.test_readme import blocks, commands

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


def config_of(row: PaperRow) -> TrainConfig:
    return load_config(["--config", str(path_of(row))])


def annotations(task: str) -> dict[str, Any]:
    """Of "Mara sings in Tamsk", with labels that the task's published datasets all have."""
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
    """Shards of all published datasets as their converters describe them, with two invented samples a split."""
    directory = tmp_path_factory.mktemp("published") / "real"
    for name in PUBLISHED:
        spec = load_converter(name, directory).SPEC
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


def test_every_file_is_a_row_and_every_row_a_file() -> None:
    assert sorted(path.stem for path in RECIPES.iterdir()) == sorted([SWEEP.stem, *(row.recipe for row in ROWS)])


@every_row
def test_a_recipe_is_what_its_row_says_and_no_more(row: PaperRow) -> None:
    config = config_of(row)
    assert paper_row(config) is row
    assert unlike(config, row) == {}
    told = settings_of(row)
    usual = make_config({"model": row.model})
    assert told.keys() <= FIELDS.keys()
    for name, value in told.items():
        if name != "model":
            assert value != getattr(usual, name), f"{name} repeats the default or the preset's recipe"


@every_row
def test_its_head_has_the_line_that_runs_it(row: PaperRow) -> None:
    [line] = re.findall(r"^#   sbatch (.*)$", path_of(row).read_text(encoding="utf-8"), re.MULTILINE)
    words = shlex.split(line)
    assert words[:4] == ON_FOUR_GPUS
    assert words[4:6] == ["--config", str(path_of(row).relative_to(REPOSITORY))]
    config = load_config(["--config", str(path_of(row)), *words[6:]])
    assert (config.output, config.resume) == (f"runs/paper/{row.recipe}", "auto")


@every_row
def test_all_checks_that_need_no_weights_pass(row: PaperRow, published: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = load_config(["--config", str(path_of(row)), "--shards", str(published)])
    monkeypatch.chdir(REPOSITORY)
    check_values(config)
    check_block(config, 4)
    check_model(config.model)
    content = read_deepspeed_file(Path(config.deepspeed))
    check_quantised(config, content)
    assert resolve(content, config, 4, True, config.deepspeed)["train_batch_size"] == 4 * config.micro_batch
    units = choose_units(check_shards(config).index, config)
    held_out = {"m2e2", *row.held_out}
    trained = {unit.dataset for unit in units.train.values()}
    assert trained == {unit.dataset for unit in units.dev.values()} == set(PUBLISHED) - held_out
    assert set(UNITS) <= set(units.test), "what is held out is tested"
    for name, reference in {"ace2005/trigger": 57.6, "ace2005/argument": 23.4, "swig/trigger": 57.6}.items():
        assert units.reference()[name] == reference


def test_the_papers_recipe_comes_from_defaults_and_presets() -> None:
    expected = {"base": (128, 10), "large": (64, 4), "xl": (64, 2)}
    for row in ROWS:
        config = config_of(row)
        assert (config.rank, config.micro_batch) == expected[row.model.rpartition("-")[2]]
        assert set(preset_recipe(row.model)) == {"rank", "micro_batch", "mim_tokens"}
        assert (config.epochs, config.learning_rate, config.schedule, config.beta or 0.01) == (20, 1e-4, "step", 0.01)
        assert (config.max_length, config.max_answer_length) == (256, 128)
        assert 0.1 <= config.dropout <= 0.4


def test_ablations_differ_from_c_lorae_in_one_thing() -> None:
    [whole] = [settings_of(row) for row in ROWS if row.recipe == "clorae-large"]
    switched = {}
    for row in ROWS:
        if row.without:
            told = settings_of(row)
            assert {name: told.pop(name) for name in whole} == whole
            switched[row.without] = told
    assert switched == {
        ("only universal",): {"use_experts": False},
        ("only task experts",): {"use_universal": False},
        ("no gate",): {"use_gate": False},
        ("no MIM",): {"beta": 0},
        ("no achievement loss",): {"achievement": False},
    }


def test_figure_5_varies_one_thing_at_a_time() -> None:
    sweep = read_sweep(SWEEP)
    assert len(sweep.points) == 18
    [line] = re.findall(r"sbatch (.*)", SWEEP.read_text(encoding="utf-8"))
    assert "--array=0-17" in shlex.split(line)
    assert {tuple(point.config.hold_out) for point in sweep.points} == {("m2e2",)}
    for size, rank in (("base", 128), ("large", 64)):
        points = {
            (point.config.rank, point.config.dropout)
            for point in sweep.points
            if point.config.model == f"flan-t5-{size}"
        }
        ranks, dropouts = {(r, 0.1) for r in (16, 32, 64, 128, 256)}, {(rank, d) for d in (0.0, 0.1, 0.2, 0.4, 0.8)}
        assert points == ranks | dropouts


@pytest.mark.slow
def test_the_job_takes_a_recipe(published: Path, tmp_path: Path) -> None:
    """Two steps of it on the demo base, and what compare calls the run."""
    [row] = [row for row in ROWS if row.recipe == "clorae-large-no-gate"]
    tiny = ["--model", "demo", "--shards", published, "--max-steps", 2, "--max-answer-length", 8]
    printed = train(tmp_path / "run", 1, "--config", path_of(row), *tiny)
    [system] = compare([tmp_path / "run"]).systems
    assert system.name == "C-LoRAE, no gate"
    assert set(UNITS) <= set(system.row.scores[0])
    assert system.trained
    [trained] = re.findall(r"with clorae: ([\d.]+) M of", printed)
    assert f"{system.trained / 1e6:.2f}" == trained
    assert "m2e2" not in printed.partition("training samples")[2].splitlines()[0]


def test_the_pages_table_has_every_row_and_its_figures() -> None:
    found = {}
    for line in PAGE.read_text(encoding="utf-8").splitlines():
        if match := re.match(r"\| (.+?) \| \[(.+?)\]\(\.\./recipes/paper/(.+?)\.yaml\) \|(.*)\|$", line):
            assert match[2] == match[3]
            found[match[2]] = [cell.strip() for cell in match[4].split("|")]
    assert list(found) == [row.recipe for row in ROWS]
    for row in ROWS:
        figures = [f"{row.f1[unit]:.1f}" if unit in row.f1 else "" for unit in (*UNITS, "All")]
        assert found[row.recipe] == [*figures, "" if row.trained is None else f"{row.trained:g}"]


def test_the_pages_commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the order in which they stand there; jobs are not started, their runs are there already."""
    (tmp_path / "recipes").symlink_to(REPOSITORY / "recipes")
    for row in ROWS:
        settings = {**settings_of(row), "output": f"runs/paper/{row.recipe}"}
        f1 = {unit: row.f1.get(unit, 50.0) for unit in UNITS}
        make_run(tmp_path / "runs/paper" / row.recipe, f1, **settings)
    monkeypatch.chdir(tmp_path)
    lines = [line for _, text in blocks(PAGE, "bash") for line in commands(text)]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{environment['PATH']}"
    built, printed = [], []
    for line in lines:
        words = shlex.split(line)
        if words[:3] == ["lvlm-clorae", "shards", "build"]:
            arguments = cli._parser().parse_args(words[1:])
            built.append(arguments.dataset)
            assert str(arguments.output) == settings_of(ROWS[0])["shards"]
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
    assert tuple(built) == PUBLISHED
    expand, collect, table2, table3, figure4, table4 = printed
    assert "18 points: 18 waiting; in runs/paper/figure5" in expand
    assert "there are no scores yet" in collect
    assert [table2.count(f"paper, Table 2: {system}") for system in ("UMIE", "C-LoRAE")] == [2 * 3 - 1, 2 * 3]
    assert table3.count("| C-LoRAE") == 1 + 2 * 5
    assert "otherwise than" not in "".join(printed)
    assert "no row of the paper" not in "".join(printed)
    assert (tmp_path / "figure4.png").read_bytes().startswith(b"\x89PNG")
    assert "MoSLoRA flan-t5-large" in figure4
    assert "66.2" in table4
    assert "twitter15" not in table4.partition("not among")[0]
