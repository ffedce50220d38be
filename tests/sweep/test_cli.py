"""``lvlm-clorae sweep``: what its commands print, and that the example of the docs works."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from lvlm_clorae import cli
from lvlm_clorae.sweep.cli import ranges
from lvlm_clorae.sweep.points import read_sweep
from lvlm_clorae.sweep.standing import STALE_AFTER
from lvlm_clorae.training.config import load_config
from tests.launch import REPOSITORY, environment, small_shards
from tests.sweep.helpers import age, begin, finish, sweep_of
from tests.test_readme import blocks

Run = Callable[..., "tuple[str, str]"]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs a command of sweep; returns what it printed, and its messages."""

    def _run(*argv: object, code: int = 0) -> tuple[str, str]:
        assert cli.main(["sweep", *map(str, argv)]) == code
        return tuple(capsys.readouterr())  # type: ignore[return-value]

    return _run


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """A sweep of six points: done, running, interrupted, failed, waiting, foreign."""
    sweep = sweep_of(tmp_path, settings={"rank": 8}, grid={"gamma": [1, 2, 3]}, seeds=[0, 1])
    finish(sweep.points[0], a_entity=50.0)
    begin(sweep.points[1], state="running", step=7, epoch=1)
    begin(sweep.points[2], state="interrupted")
    begin(sweep.points[3], state="failed", message="error: [b]out of memory[/b]\nmore")
    directory = begin(sweep.points[5])
    (directory / "config.yaml").write_text(sweep.points[5].config.to_yaml().replace("rank: 8", "rank: 9"))
    return sweep.path


@given(st.sets(st.integers(0, 40)))
def test_ranges_are_slurms(numbers: set[int]) -> None:
    text = ranges(sorted(numbers))
    read: list[int] = []
    for part in text.split(",") if text else []:
        first, _, last = part.partition("-")
        read += range(int(first), int(last or first) + 1)
    assert read == sorted(numbers)
    assert ranges([0, 1, 2, 3, 7]) == "0-3,7"


def test_expand_lists_what_is_left(file: Path, run: Run) -> None:
    out, _ = run("expand", file)
    assert re.search(r"0 +│ gamma=1.0,seed=0 +│ done ", out)
    assert "6 points: 1 done, 1 running, 1 interrupted, 1 failed, 1 waiting, 1 foreign" in out
    assert "rank = 9, but this one has 8" in out
    assert out.splitlines()[-1] == f"sbatch --array=2-4 slurm/sweep.sbatch {file}"
    content = json.loads(run("expand", file, "--json")[0])
    assert content["array"] == "2-4"
    assert content["sbatch"] == out.splitlines()[-1]
    assert content["points"][3]["settings"] == {"gamma": 2.0, "seed": 1}
    assert [point["state"] for point in content["points"]][::5] == ["done", "foreign"]
    assert json.loads(run("expand", file, "--json", "--stale-after", 0)[0])["array"] == "1-4"


def test_the_line_can_be_pasted(tmp_path: Path, run: Run) -> None:
    sweep = sweep_of(tmp_path)
    path = sweep.path.rename(tmp_path / "my sweep.yaml")
    line = run("expand", path)[0].splitlines()[-1]
    assert shlex.split(line) == ["sbatch", "--array=0", "slurm/sweep.sbatch", str(path)]
    finish(sweep.points[0], a_entity=1.0)
    out, _ = run("expand", path)
    assert out.splitlines()[-1] == "nothing is left to be started"
    assert json.loads(run("expand", path, "--json")[0])["sbatch"] == ""


def test_expand_prints_the_arguments_of_a_point(file: Path, run: Run) -> None:
    sweep = read_sweep(file)
    for number in (1, 2, 3, 4):
        out, err = run("expand", file, "--index", number)
        assert load_config(out.splitlines()) == sweep.points[number].config
        assert f"point {number}, {sweep.points[number].name}: " in err
    content = json.loads(run("expand", file, "--index", 4, "--json")[0])
    assert content["arguments"] == out.splitlines()
    assert content["state"] == "waiting"


def test_a_point_that_is_done_is_not_run_again(file: Path, run: Run) -> None:
    out, err = run("expand", file, "--index", 0)
    assert out == ""
    assert err == "point 0, gamma=1.0,seed=0: done\n"
    assert json.loads(run("expand", file, "--index", 0, "--json")[0])["arguments"] == []


@pytest.mark.parametrize(
    ("number", "message"), [(6, "has the points 0 to 5; there is no 6"), (-1, "no -1"), (5, "rank = 9, but")]
)
def test_points_that_cannot_be_run(number: int, message: str, file: Path, run: Run) -> None:
    out, err = run("expand", file, f"--index={number}", code=2)
    assert out == ""
    assert message in err


def test_bash_reads_the_arguments(file: Path) -> None:
    script = f"mapfile -t found < <({sys.executable} -m lvlm_clorae.cli sweep expand {file} --index 4)\n"
    script += "printf '%s|' \"${found[@]}\""
    done = subprocess.run(["bash", "-euc", script], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    assert load_config(done.stdout.split("|")[:-1]) == read_sweep(file).points[4].config


def test_status(file: Path, run: Run) -> None:
    out, _ = run("status", file)
    assert re.search(r"1 +│ gamma=1.0,seed=1 +│ running +│ 1 +│ 7 +│ +│ \d+ s", out)
    assert re.search(r"failed .* error: \[b\]out of memory\[/b\] ", out)
    assert "6 points: 1 done, 1 running, 1 interrupted, 1 failed, 1 waiting, 1 foreign" in out
    content = json.loads(run("status", file, "--json")[0])
    assert content["states"] == dict.fromkeys(("done", "running", "interrupted", "failed", "waiting", "foreign"), 1)
    assert content["points"][3]["error"] == "error: [b]out of memory[/b]"
    age(read_sweep(file).points[1].directory, STALE_AFTER + 100)
    assert re.search(r"1 +│ gamma=1.0,seed=1 +│ interrupted .* 2 h ", run("status", file)[0])
    assert f"({STALE_AFTER:.0f})" in help_of("status")


def help_of(command: str) -> str:
    line = [sys.executable, "-m", "lvlm_clorae.cli", "sweep", command, "--help"]
    return subprocess.run(line, cwd=REPOSITORY, capture_output=True, text=True, check=True).stdout


def test_collect(file: Path, tmp_path: Path, run: Run) -> None:
    out, _ = run("collect", file)
    assert re.search(r"gamma ┃ seeds ┃ All +┃ a/entity ", out)
    assert re.search(r"1.0 +│ 1 +│ 50.0 +│ 50.0 ", out)
    assert "not in the table: 3 gamma=2.0,seed=1 (failed)" in out
    assert (tmp_path / "runs" / "sweep.png").read_bytes().startswith(b"\x89PNG")
    (read_sweep(file).points[0].directory / "scores.json").write_text("{")
    before = (tmp_path / "runs" / "sweep.csv").read_bytes()
    out, _ = run("collect", file)
    assert "not in the table: " in out
    assert "is damaged: no JSON" in out
    assert "nothing is written" in out
    assert (tmp_path / "runs" / "sweep.csv").read_bytes() == before


def test_collect_that_cannot_write(file: Path, tmp_path: Path, run: Run) -> None:
    (tmp_path / "runs" / "sweep.csv").mkdir()
    assert "cannot be written" in run("collect", file, code=2)[1]


def test_mistakes(tmp_path: Path, run: Run) -> None:
    assert "cannot be read" in run("status", tmp_path / "none.yaml", code=2)[1]
    assert 'Did you mean "collect"?' in run("colect", tmp_path, code=2)[1]
    assert 'Did you mean "--index"?' in run("expand", "--idnex", "3", tmp_path, code=2)[1]


def test_no_room_of_sweeps_imports_torch_or_draws() -> None:
    code = (
        "import sys, lvlm_clorae.cli, lvlm_clorae.sweep.standing, lvlm_clorae.sweep.collect, lvlm_clorae.sweep.plot\n"
        "print(sorted({name.split('.')[0] for name in sys.modules} & {'torch', 'numpy', 'matplotlib', 'rich', 'PIL'}))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_the_table_of_states_is_whole() -> None:
    from lvlm_clorae.sweep.standing import STATES

    text = (REPOSITORY / "docs/sweeps.md").read_text(encoding="utf-8")
    assert [
        line.split("`")[1] for line in text.split("## How points stand")[1].splitlines() if line.startswith("| `")
    ] == list(STATES)


@pytest.mark.slow
def test_the_example_of_the_docs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On fewer samples and steps. Three points are done when it starts, one is trained."""
    [(_, text)] = blocks(REPOSITORY / "docs/sweeps.md", "yaml")
    content: dict[str, Any] = yaml.safe_load(text)
    shards = small_shards(tmp_path / "shards", train=8, dev=2, test=2)
    tiny = {"shards": str(shards), "max_steps": 2, "max_answer_length": 8}
    content["settings"] = {**content["settings"], **tiny}
    (tmp_path / "sweep.yaml").write_text(yaml.safe_dump(content, sort_keys=False))
    for name in ("train.py", "ds_configs", "lvlm_clorae"):
        (tmp_path / name).symlink_to(REPOSITORY / name)
    sweep = read_sweep(tmp_path / "sweep.yaml")
    assert [point.name for point in sweep.points] == [f"rank={r},gamma={g},seed=0" for r in (8, 16) for g in (1.0, 2.0)]
    monkeypatch.chdir(tmp_path)
    for point in (*sweep.points[:2], sweep.points[3]):
        finish(point, demo_entity=50.0)

    [(_, script)] = blocks(REPOSITORY / "docs/sweeps.md", "bash")
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", script],
        cwd=tmp_path,
        env={**environment(), "PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "sbatch --array=2 slurm/sweep.sbatch sweep.yaml" in done.stdout
    assert "point 2, rank=16,gamma=1.0,seed=0: waiting" in done.stderr
    assert (done.stdout + done.stderr).count("run directory: ") == 1
    assert "4 points: 4 done; in runs/small-sweep" in done.stdout
    assert "not in the table" not in done.stdout
    with open(tmp_path / "runs/small-sweep/sweep.json", encoding="utf-8") as file:
        assert [row["seeds"] for row in json.load(file)["rows"]] == [[0]] * 4
    assert (tmp_path / "runs/small-sweep/sweep.png").is_file()
