"""The benchmark on published text: a quick run on the real files, and its behaviour on invented ones."""

from __future__ import annotations

import io
import json
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from lvlm_clorae.data.index import load_index
from lvlm_clorae.data.reader import read_samples
from lvlm_clorae.errors import UserError
from lvlm_clorae.training.config_loading import load_config
from tests.helpers.launch import REPOSITORY, environment
from tests.helpers.pages import commands
from tests.helpers.published import DATA, write_invented
from tests.helpers.results import read_results

sys.path.insert(0, str(REPOSITORY / "benchmarks"))

import real_text

TEXT_BASE = REPOSITORY / "recipes/text_base/pretrain.py"
DATASET_TASKS = ["twitter15/entity", "mre_v1/relation", "m2e2/trigger", "m2e2/argument"]
Line = list[str]


@pytest.mark.slow
@pytest.mark.real_data
@pytest.mark.skipif(not DATA.is_dir(), reason=f"no published data at {DATA}")
def test_a_quick_run(tmp_path: Path) -> None:
    line = [sys.executable, str(REPOSITORY / "benchmarks/real_text.py"), "--data", str(DATA), "--quick"]
    line += ["--threads", "1", "--work", str(tmp_path / "work"), "--output", str(tmp_path / "results.json")]
    done = subprocess.run(line, env=environment(), capture_output=True, text=True, timeout=1800, check=False)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    found = json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))
    assert [row["dataset_task"] for row in found["dataset_tasks"]] == DATASET_TASKS
    for row in found["dataset_tasks"]:
        assert row["samples"] == dict.fromkeys(("train", "dev", "test"), real_text.QUICK_LIMIT)
        for what in ("frozen", "trained"):
            assert row[what]["answers"] == real_text.QUICK_LIMIT
            assert 0 <= row[what]["malformed"] <= real_text.QUICK_LIMIT
            assert 0 <= row[what]["f1"] <= 100
        assert row["frozen"]["f1"] == 0, "the demo base knows no label"
        assert f"| {row['dataset_task']} | 32 / 32 / 32 | {row['gold']} |" in done.stdout
    assert set(found["image_files"]) == set(real_text.FOLDERS)
    assert set(found["seconds"]) >= {"shards", "frozen", "trained"}
    assert found["about"]["limit"] == real_text.QUICK_LIMIT
    index = load_index(tmp_path / "work/shards")
    texts = {sample["text"] for _, sample, _ in read_samples(tmp_path / "work/shards", index, "twitter15", "test")}
    written = (tmp_path / "results.json").read_text(encoding="utf-8")
    assert not any(text in written for text in texts if len(text) > 20), "the results contain no text of the datasets"


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Invented records of two datasets; one of them has its image."""
    monkeypatch.setattr(real_text, "FOLDERS", {"twitter15": "twitter2015", "mre_v1": "mnre_v1"})
    monkeypatch.setattr(real_text, "description", lambda device: {"date": "today"})
    images = write_invented(tmp_path / "data") / "images"
    images.mkdir()
    jpeg = io.BytesIO()
    Image.new("RGB", (20, 10)).save(jpeg, "JPEG")
    (images / "1.jpg").write_bytes(jpeg.getvalue())
    return tmp_path / "data"


class Jobs:
    """Replacement for train.py and evaluate that keeps the command lines and writes their files."""

    def __init__(self) -> None:
        self.lines: list[Line] = []
        self.codes: dict[str, int] = {}

    def __call__(self, line: Sequence[object], threads: int, **how: Any) -> subprocess.CompletedProcess[str]:
        words = list(map(str, line))
        self.lines.append(words)
        if "evaluate" in words:
            dataset_tasks = {"twitter15/entity": {"f1_without_images": 12.5}}
            return subprocess.CompletedProcess(
                words, self.codes.get("blank", 0), json.dumps({"dataset_tasks": dataset_tasks})
            )
        run = Path(words[words.index("--output_dir") + 1])
        code = self.codes.get(run.name, 0)
        (run / "predictions").mkdir(parents=True, exist_ok=True)
        for dataset_task, malformed in (("twitter15/entity", 2), ("mre_v1/relation", 0)):
            dataset, subtask = dataset_task.split("/")
            answer = json.dumps({"subtask": subtask, "malformed": malformed}) + "\n"
            (run / "predictions" / f"predictions-{dataset}-test.jsonl").write_text(answer)
        f1 = {"frozen": 0.0, "trained": 25.0}[run.name]
        shares = {"precision": f1, "recall": f1, "f1": f1}
        dataset_tasks = {"twitter15/entity": shares, "mre_v1/relation": shares}
        (run / "scores.json").write_text(json.dumps({"all": 2 * f1, "dataset_tasks": dataset_tasks}))
        (run / "status.json").write_text(json.dumps({"state": "failed" if code else "done"}))
        return subprocess.CompletedProcess(words, code, "")


@pytest.fixture
def jobs(monkeypatch: pytest.MonkeyPatch) -> Jobs:
    jobs = Jobs()
    monkeypatch.setattr(real_text, "_call", jobs)
    return jobs


@pytest.fixture
def start(data: Path, jobs: Jobs, tmp_path: Path) -> Callable[..., int]:
    def start(*arguments: str) -> int:
        line = ["--data", str(data), "--work", str(tmp_path / "work"), "--output", str(tmp_path / "results.json")]
        return real_text.main([*line, *arguments])

    return start


def test_the_runs_and_results(
    start: Callable[..., int], jobs: Jobs, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert start("--num_train_epochs", "3", "--adapter", "lora") == 0
    frozen, trained, blank = jobs.lines
    configs = [load_config(line[2:]) for line in (frozen, trained)]
    assert [(config.adapter, config.max_target_length) for config in configs] == [("none", 48), ("lora", 96)]
    for config in configs:
        assert (config.model, config.num_train_epochs, config.max_source_length, config.resume_from_checkpoint) == (
            "demo",
            3,
            1024,
            "auto",
        )
        assert config.learning_rate == 2e-3, "the recipe of the demo base applies"
        assert config.shards == str(tmp_path / "work/shards")
    # mre_v1 has no image to leave out
    assert blank[-2:] == ["--datasets", "twitter15"]
    found = json.loads((tmp_path / "results.json").read_text())
    assert found["image_files"] == {"twitter15": {"named": 1, "there": 1}, "mre_v1": {"named": 1, "there": 0}}
    entity, relation = found["dataset_tasks"]
    assert entity["annotation"]["f1"] == relation["annotation"]["f1"] == 100
    assert (entity["trained"]["malformed"], entity["trained"]["answers"]) == (1, 1)
    assert (entity["f1_blank"], relation["f1_blank"]) == (12.5, None)
    printed = capsys.readouterr().out
    assert "| twitter15/entity | 1 / 1 / 1 | 1 | 100.0 | 0.0 | 25.0 | 25.0 | 25.0 | 12.5 | 1 of 1 |" in printed
    assert "| mre_v1/relation | 1 / 1 / 1 | 1 | 100.0 | 0.0 | 25.0 | 25.0 | 25.0 | - | 0 of 1 |" in printed
    assert "images of test: twitter15 1 of 1, mre_v1 0 of 1" in printed


def test_finished_parts_are_not_repeated(
    start: Callable[..., int], jobs: Jobs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    jobs.codes = {"trained": 75}
    assert start() == 75
    assert not (tmp_path / "results.json").exists()
    jobs.codes = {"blank": 1}
    monkeypatch.setattr(real_text, "build", lambda *args, **how: pytest.fail("the shards exist"))
    assert start() == 1
    jobs.codes = {}
    assert start() == 0
    tried = ["blank" if "evaluate" in line else Path(line[line.index("--output_dir") + 1]).name for line in jobs.lines]
    assert tried == ["frozen", "trained", "trained", "blank", "blank"]
    assert json.loads((tmp_path / "results.json").read_text())["seconds"].keys() == {
        *("shards", "frozen", "trained", "blank")
    }
    with pytest.raises(SystemExit, match="2"):
        start()  # results are not overwritten


def test_other_data_or_settings_need_another_directory(
    start: Callable[..., int], jobs: Jobs, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert start("--num_train_epochs", "3") == 0
    (tmp_path / "results.json").unlink()
    for other in (
        ["--num_train_epochs", "4"],
        ["--num_train_epochs", "3", "--limit", "5"],
        ["--num_train_epochs", "3", "--base", "flan-t5-base"],
    ):
        assert start(*other) == 2
        assert "asked.json" in capsys.readouterr().err
    assert start("--work", str(tmp_path / "data")) == 2
    assert "--work" in capsys.readouterr().err
    assert len(jobs.lines) == 3


def test_damaged_shards_are_not_trained_on(
    start: Callable[..., int], jobs: Jobs, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    jobs.codes = {"frozen": 75}
    assert start() == 75
    shard = tmp_path / "work/shards/twitter15-train-000000.tar"
    content = bytearray(shard.read_bytes())
    content[600] ^= 1
    shard.write_bytes(content)
    assert start() == 2
    assert shard.name in capsys.readouterr().err
    assert len(jobs.lines) == 1


def test_missing_files_are_an_error(
    start: Callable[..., int], data: Path, jobs: Jobs, capsys: pytest.CaptureFixture[str]
) -> None:
    (data / "mnre_v1/ours_test.txt").unlink()
    assert start() == 2
    assert "github.com/thecharm/MNRE" in capsys.readouterr().err
    assert jobs.lines == []


def test_times_of_all_attempts_are_summed(tmp_path: Path) -> None:
    work = real_text.Work(tmp_path)
    (tmp_path / "seconds.json").write_text('{"trained": {"clock": 100, "cpu": 50}}')
    with pytest.raises(UserError), work.timed("trained"):
        raise UserError("cut off")
    assert 100 <= work.seconds()["trained"]["clock"] < 110


@pytest.mark.integration
def test_an_interrupt_waits_for_the_run(tmp_path: Path) -> None:
    """Both receive the Ctrl-C; the run takes a second to save, and its exit code is returned."""
    script = "import signal, sys, time\nsignal.signal(signal.SIGINT, lambda *_: (time.sleep(1), sys.exit(75)))\n"
    script += "print('ready', flush=True)\ntime.sleep(60)"
    caller = f"import sys; sys.path.insert(0, {str(REPOSITORY / 'benchmarks')!r}); import real_text\n"
    caller += f"sys.exit(real_text._call([sys.executable, '-c', {script!r}], 1).returncode)"
    line, settings = [sys.executable, "-c", caller], {**environment(), "PYTHONPATH": str(REPOSITORY)}
    process = subprocess.Popen(line, env=settings, stdout=subprocess.PIPE, text=True, start_new_session=True)
    with process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        real_text.os.killpg(process.pid, signal.SIGINT)
        assert process.wait(60) == 75


def test_the_commands_of_its_page(tmp_path: Path) -> None:
    page = REPOSITORY / "docs/real_text.md"
    assert commands(page, "python recipes") == [
        next(line for line in TEXT_BASE.read_text().splitlines() if "python" in line).strip()
    ]
    for line in commands(page, "python benchmarks"):
        words = shlex.split(line)
        assert words[:2] == ["python", "benchmarks/real_text.py"]
        options, settings = real_text.parse([*words[2:], "--output", str(tmp_path / "free.json")])
        load_config(settings)
        assert options.data == Path("../shared/data")


def test_the_tables_of_its_page_are_those_of_the_results_files() -> None:
    page = (REPOSITORY / "docs/real_text.md").read_text(encoding="utf-8")
    files = set(re.findall(r"benchmarks/results/(real_text-[\w-]+)\.json", page))
    assert files
    rows = [line for line in page.splitlines() if re.match(r"\| (twitter15|mre_v1|m2e2)/", line)]
    made = [real_text.table(read_results(name)) for name in files]
    kept = {line for table in made for line in table.splitlines() if line in rows}
    assert kept == set(rows)
    assert len(rows) == 4 * len(files)
