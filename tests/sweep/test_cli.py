"""``lvlm-clorae sweep``: the output of its commands, and the example of the docs."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from lvlm_clorae.sweep.expand import read_sweep
from lvlm_clorae.sweep.status import STALE_AFTER, STATES, ranges
from lvlm_clorae.training.config_loading import load_config
from tests.helpers.commands import Run, runner
from tests.helpers.launch import REPOSITORY, environment, small_shards
from tests.helpers.sweeps import age, begin, finish, sweep_of

pytestmark = pytest.mark.usefixtures("no_squeue")


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    return runner(capsys, "sweep")


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """A sweep of six runs: done, running, interrupted, failed, waiting, foreign."""
    sweep = sweep_of(tmp_path, settings={"lora_rank": 8}, grid={"gamma": [1, 2, 3]}, seeds=[0, 1])
    finish(sweep.sweep_runs[0], a_entity=50.0)
    begin(sweep.sweep_runs[1], state="running", step=7, epoch=1)
    begin(sweep.sweep_runs[2], state="interrupted")
    begin(sweep.sweep_runs[3], state="failed", message="error: [b]out of memory[/b]\nmore")
    directory = begin(sweep.sweep_runs[5])
    (directory / "config.yaml").write_text(sweep.sweep_runs[5].config.to_yaml().replace("rank: 8", "rank: 9"))
    return sweep.path


@given(st.sets(st.integers(0, 40)))
def test_ranges_are_those_of_slurm(numbers: set[int]) -> None:
    text = ranges(sorted(numbers))
    read: list[int] = []
    for part in text.split(",") if text else []:
        first, _, last = part.partition("-")
        read += range(int(first), int(last or first) + 1)
    assert read == sorted(numbers)
    assert ranges([0, 1, 2, 3, 7]) == "0-3,7"


def test_expand_lists_the_runs_and_submits_the_rest(file: Path, run: Run) -> None:
    out, _ = run("expand", file)
    assert re.search(r"0 +│ gamma=1.0,seed=0 +│ done ", out)
    assert "6 runs: 1 done, 1 running, 1 interrupted, 1 failed, 1 waiting, 1 foreign" in out
    assert "rank = 9" in out
    assert out.splitlines()[-1] == f"sbatch --array=2-4 slurm/sweep.sbatch {file}"
    content = json.loads(run("expand", file, "--json")[0])
    assert content["array"] == "2-4"
    assert content["sbatch"] == out.splitlines()[-1]
    assert content["sweep_runs"][3]["settings"] == {"gamma": 2.0, "seed": 1}
    assert [sweep_run["state"] for sweep_run in content["sweep_runs"]][::5] == ["done", "foreign"]
    assert json.loads(run("expand", file, "--json", "--stale-after", 0)[0])["array"] == "1-4"


def test_the_submit_command_is_quoted_for_a_shell(tmp_path: Path, run: Run) -> None:
    sweep = sweep_of(tmp_path)
    path = sweep.path.rename(tmp_path / "my sweep.yaml")
    line = run("expand", path)[0].splitlines()[-1]
    assert shlex.split(line) == ["sbatch", "--array=0", "slurm/sweep.sbatch", str(path)]
    finish(sweep.sweep_runs[0], a_entity=1.0)
    out, _ = run("expand", path)
    assert "sbatch" not in out
    assert json.loads(run("expand", path, "--json")[0])["sbatch"] == ""


def test_expand_prints_the_arguments_of_a_run(file: Path, run: Run) -> None:
    sweep = read_sweep(file)
    for number in (1, 2, 3, 4):
        out, err = run("expand", file, "--index", number)
        assert load_config(out.splitlines()) == sweep.sweep_runs[number].config
        assert f"run {number}, {sweep.sweep_runs[number].name}: " in err
    content = json.loads(run("expand", file, "--index", 4, "--json")[0])
    assert content["arguments"] == out.splitlines()
    assert content["state"] == "waiting"


def test_a_finished_run_is_not_run_again(file: Path, run: Run) -> None:
    out, err = run("expand", file, "--index", 0)
    assert out == ""
    assert err == "run 0, gamma=1.0,seed=0: done\n"
    assert json.loads(run("expand", file, "--index", 0, "--json")[0])["arguments"] == []


@pytest.mark.parametrize(("number", "part"), [(6, "0 to 5"), (-1, "-1"), (5, "rank = 9")])
def test_runs_that_cannot_be_started_are_errors(number: int, part: str, file: Path, run: Run) -> None:
    out, err = run("expand", file, f"--index={number}", code=2)
    assert out == ""
    assert part in err


@pytest.mark.integration
def test_bash_reads_the_arguments(file: Path) -> None:
    script = f"mapfile -t found < <({sys.executable} -m lvlm_clorae sweep expand {file} --index 4)\n"
    script += "printf '%s|' \"${found[@]}\""
    done = subprocess.run(["bash", "-euc", script], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    assert load_config(done.stdout.split("|")[:-1]) == read_sweep(file).sweep_runs[4].config


@pytest.mark.integration
def test_status_lists_the_state_of_each_run(file: Path, run: Run) -> None:
    out, _ = run("status", file)
    assert re.search(r"1 +│ gamma=1.0,seed=1 +│ running +│ 1 +│ 7 +│ +│ \d+ s", out)
    assert re.search(r"failed .* error: \[b\]out of memory\[/b\] ", out)
    assert "6 runs: 1 done, 1 running, 1 interrupted, 1 failed, 1 waiting, 1 foreign" in out
    content = json.loads(run("status", file, "--json")[0])
    assert content["states"] == dict.fromkeys(("done", "running", "interrupted", "failed", "waiting", "foreign"), 1)
    assert content["sweep_runs"][3]["error"] == "error: [b]out of memory[/b]"
    age(read_sweep(file).sweep_runs[1].directory, STALE_AFTER + 100)
    assert re.search(r"1 +│ gamma=1.0,seed=1 +│ interrupted .* 2 h ", run("status", file)[0])
    assert f"{STALE_AFTER:.0f})" in help_of("status")


def help_of(command: str) -> str:
    line = [sys.executable, "-m", "lvlm_clorae", "sweep", command, "--help"]
    return subprocess.run(line, cwd=REPOSITORY, capture_output=True, text=True, check=True).stdout


def test_collect_prints_and_writes_the_table(file: Path, tmp_path: Path, run: Run) -> None:
    out, _ = run("collect", file)
    assert re.search(r"gamma ┃ seeds ┃ +entity ┃ +All ┃", out)
    assert re.search(r"1.0 +│ +1 │ +50.0 │ +50.0 │", out)
    assert "3 gamma=2.0,seed=1 (failed)" in out
    assert (tmp_path / "runs" / "sweep.png").read_bytes().startswith(b"\x89PNG")
    (read_sweep(file).sweep_runs[0].directory / "scores.json").write_text("{")
    before = (tmp_path / "runs" / "sweep.csv").read_bytes()
    out, _ = run("collect", file)
    assert "scores.json: damaged" in out
    assert (tmp_path / "runs" / "sweep.csv").read_bytes() == before


def test_a_table_that_cannot_be_written_is_an_error(file: Path, tmp_path: Path, run: Run) -> None:
    (tmp_path / "runs" / "sweep.csv").mkdir()
    assert "cannot be written" in run("collect", file, code=2)[1]


def test_mistakes_end_with_code_2(tmp_path: Path, run: Run) -> None:
    assert "cannot be read" in run("status", tmp_path / "none.yaml", code=2)[1]
    assert "collect" in run("colect", tmp_path, code=2)[1]
    assert "--index" in run("expand", "--idnex", "3", tmp_path, code=2)[1]


@pytest.mark.integration
def test_no_module_of_sweeps_imports_torch_or_matplotlib() -> None:
    code = (
        "import sys, lvlm_clorae.cli, lvlm_clorae.sweep.status, lvlm_clorae.analysis.tables\n"
        "print(sorted({name.split('.')[0] for name in sys.modules} & {'torch', 'numpy', 'matplotlib', 'rich', 'PIL'}))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_the_docs_list_every_state() -> None:
    text = (REPOSITORY / "docs/sweeps.md").read_text(encoding="utf-8")
    rows = [line.split("`")[1] for line in text.splitlines() if line.startswith("| `")]
    assert [state for state in rows if state in STATES] == list(STATES)


@pytest.mark.slow
def test_the_example_of_the_docs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On fewer samples and steps. Three runs are done at the start, one is trained."""
    page = (REPOSITORY / "docs/sweeps.md").read_text(encoding="utf-8")
    [text] = re.findall(r"```yaml\n(.*?)```", page, re.DOTALL)
    content: dict[str, Any] = yaml.safe_load(text)
    shards = small_shards(tmp_path / "shards", train=8, dev=2, test=2)
    tiny = {"shards": str(shards), "max_steps": 2, "max_target_length": 8}
    content["settings"] = {**content["settings"], **tiny}
    (tmp_path / "sweep.yaml").write_text(yaml.safe_dump(content, sort_keys=False))
    for name in ("train.py", "ds_configs", "lvlm_clorae"):
        (tmp_path / name).symlink_to(REPOSITORY / name)
    sweep = read_sweep(tmp_path / "sweep.yaml")
    assert [sweep_run.name for sweep_run in sweep.sweep_runs] == [
        f"lora_rank={r},gamma={g},seed=0" for r in (8, 16) for g in (1.0, 2.0)
    ]
    monkeypatch.chdir(tmp_path)
    for sweep_run in (*sweep.sweep_runs[:2], sweep.sweep_runs[3]):
        finish(sweep_run, demo_entity=50.0)

    [script] = re.findall(r"```bash\n(.*?)```", page, re.DOTALL)
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
    assert "run 2, lora_rank=16,gamma=1.0,seed=0: waiting" in done.stderr
    assert (done.stdout + done.stderr).count("run directory: ") == 2, "one run, at its start and end"
    assert "4 runs: 4 done; in runs/small-sweep" in done.stdout
    assert "left out" not in done.stdout
    with open(tmp_path / "runs/small-sweep/sweep.json", encoding="utf-8") as file:
        assert [row["seeds"] for row in json.load(file)["rows"]] == [[0]] * 4
    assert (tmp_path / "runs/small-sweep/sweep.png").is_file()


def test_a_running_run_is_not_handed_out_again(tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    sweep = sweep_of(tmp_path, settings={"lora_rank": 8})
    begin(sweep.sweep_runs[0], state="running", job="77_3")
    out, err = run("expand", sweep.path, "--index", 0, code=2)
    assert out == ""
    assert "in job 77_3" in err
    monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "77")
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "3")
    assert run("expand", sweep.path, "--index", 0)[0], "it is this job, requeued"
