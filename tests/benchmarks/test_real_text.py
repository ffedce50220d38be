"""The benchmark on published text: a quick run of the real files, and all about it that needs none of them."""

from __future__ import annotations

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

from lvlm_clorae.data.shards import load_index, read_samples
from lvlm_clorae.errors import UserError
from lvlm_clorae.training.config import load_config
from tests.data.helpers import picture
from tests.launch import REPOSITORY, environment
from tests.published import DATA, write_invented
from tests.test_readme import blocks, commands

sys.path.insert(0, str(REPOSITORY / "benchmarks"))

import real_text

TEXT_BASE = REPOSITORY / "recipes/text_base/pretrain.py"
UNITS = ["twitter15/entity", "mre_v1/relation", "m2e2/trigger", "m2e2/argument"]
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
    assert [row["unit"] for row in found["units"]] == UNITS
    for row in found["units"]:
        assert row["samples"] == dict.fromkeys(("train", "dev", "test"), real_text.QUICK_LIMIT)
        for what in ("frozen", "trained"):
            assert row[what]["answers"] == real_text.QUICK_LIMIT
            assert 0 <= row[what]["malformed"] <= real_text.QUICK_LIMIT
            assert 0 <= row[what]["f1"] <= 100
        assert row["frozen"]["f1"] == 0, "the demo base knows no label"
        assert f"| {row['unit']} | 32 / 32 / 32 | {row['gold']} |" in done.stdout
    assert set(found["pictures"]) == set(real_text.FOLDERS)
    assert set(found["seconds"]) >= {"shards", "frozen", "trained"}
    assert found["about"]["limit"] == real_text.QUICK_LIMIT
    index = load_index(tmp_path / "work/shards")
    texts = {sample["text"] for _, sample, _ in read_samples(tmp_path / "work/shards", index, "twitter15", "test")}
    written = (tmp_path / "results.json").read_text(encoding="utf-8")
    assert not any(text in written for text in texts if len(text) > 20), "no text of theirs is in the results"


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Invented records of two datasets, one of which has its picture."""
    monkeypatch.setattr(real_text, "FOLDERS", {"twitter15": "twitter2015", "mre_v1": "mnre_v1"})
    monkeypatch.setattr(real_text, "description", lambda device: {"date": "today"})
    images = write_invented(tmp_path / "data") / "images"
    images.mkdir()
    (images / "1.jpg").write_bytes(picture("JPEG"))
    return tmp_path / "data"


class Jobs:
    """In place of train.py and evaluate: keeps the command lines, and writes what they would."""

    def __init__(self) -> None:
        self.lines: list[Line] = []
        self.codes: dict[str, int] = {}

    def __call__(self, line: Sequence[object], threads: int, **how: Any) -> subprocess.CompletedProcess[str]:
        words = list(map(str, line))
        self.lines.append(words)
        if "evaluate" in words:
            units = {"twitter15/entity": {"f1_without_pictures": 12.5}}
            return subprocess.CompletedProcess(words, self.codes.get("blank", 0), json.dumps({"units": units}))
        run = Path(words[words.index("--output") + 1])
        code = self.codes.get(run.name, 0)
        (run / "predictions").mkdir(parents=True, exist_ok=True)
        for unit, malformed in (("twitter15/entity", 2), ("mre_v1/relation", 0)):
            dataset, subtask = unit.split("/")
            answer = json.dumps({"subtask": subtask, "malformed": malformed}) + "\n"
            (run / "predictions" / f"predictions-{dataset}-test.jsonl").write_text(answer)
        f1 = {"frozen": 0.0, "trained": 25.0}[run.name]
        shares = {"precision": f1, "recall": f1, "f1": f1}
        units = {"twitter15/entity": shares, "mre_v1/relation": shares}
        (run / "scores.json").write_text(json.dumps({"all": 2 * f1, "units": units}))
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


def test_what_is_run_and_written(
    start: Callable[..., int], jobs: Jobs, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert start("--epochs", "3", "--adapter", "lora") == 0
    frozen, trained, blank = jobs.lines
    configs = [load_config(line[2:]) for line in (frozen, trained)]
    assert [(config.adapter, config.max_answer_length) for config in configs] == [("none", 48), ("lora", 96)]
    for config in configs:
        assert (config.model, config.epochs, config.max_length, config.resume) == ("demo", 3, 192, "auto")
        assert config.learning_rate == 2e-3, "the demo base's recipe is taken"
        assert config.shards == str(tmp_path / "work/shards")
    # mre_v1 has no picture, so there is nothing to leave out.
    assert blank[-2:] == ["--datasets", "twitter15"]
    found = json.loads((tmp_path / "results.json").read_text())
    assert found["pictures"] == {"twitter15": {"named": 1, "there": 1}, "mre_v1": {"named": 1, "there": 0}}
    entity, relation = found["units"]
    assert entity["annotation"]["f1"] == relation["annotation"]["f1"] == 100
    assert (entity["trained"]["malformed"], entity["trained"]["answers"]) == (1, 1)
    assert (entity["f1_blank"], relation["f1_blank"]) == (12.5, None)
    printed = capsys.readouterr().out
    assert "| twitter15/entity | 1 / 1 / 1 | 1 | 100.0 | 0.0 | 25.0 | 25.0 | 25.0 | 12.5 | 1 of 1 |" in printed
    assert "| mre_v1/relation | 1 / 1 / 1 | 1 | 100.0 | 0.0 | 25.0 | 25.0 | 25.0 | - | 0 of 1 |" in printed
    assert "pictures of test: twitter15 1 of 1, mre_v1 0 of 1" in printed


def test_what_is_done_is_not_done_again(
    start: Callable[..., int], jobs: Jobs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    jobs.codes = {"trained": 75}
    assert start() == 75
    assert not (tmp_path / "results.json").exists()
    jobs.codes = {"blank": 1}
    monkeypatch.setattr(real_text, "build", lambda *args, **how: pytest.fail("the shards are there"))
    assert start() == 1
    jobs.codes = {}
    assert start() == 0
    tried = ["blank" if "evaluate" in line else Path(line[line.index("--output") + 1]).name for line in jobs.lines]
    assert tried == ["frozen", "trained", "trained", "blank", "blank"]
    assert json.loads((tmp_path / "results.json").read_text())["seconds"].keys() == {
        *("shards", "frozen", "trained", "blank")
    }
    with pytest.raises(SystemExit, match="2"):
        start()  # the results are not overwritten


def test_other_settings_are_other_work(
    start: Callable[..., int], jobs: Jobs, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert start("--epochs", "3") == 0
    (tmp_path / "results.json").unlink()
    for other in (["--epochs", "4"], ["--epochs", "3", "--limit", "5"], ["--epochs", "3", "--base", "flan-t5-base"]):
        assert start(*other) == 2
        assert "other data or settings began here" in capsys.readouterr().err
    assert start("--work", str(tmp_path / "data")) == 2
    assert "is not empty and not this benchmark's" in capsys.readouterr().err
    assert len(jobs.lines) == 3


def test_shards_that_were_damaged_are_not_trained_on(
    start: Callable[..., int], jobs: Jobs, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    jobs.codes = {"frozen": 75}
    assert start() == 75
    shard = tmp_path / "work/shards/twitter15-train-000000.tar"
    content = bytearray(shard.read_bytes())
    content[600] ^= 1
    shard.write_bytes(content)
    assert start() == 2
    assert "the bytes have changed" in capsys.readouterr().err
    assert len(jobs.lines) == 1


def test_files_that_are_missing(
    start: Callable[..., int], data: Path, jobs: Jobs, capsys: pytest.CaptureFixture[str]
) -> None:
    (data / "mnre_v1/ours_test.txt").unlink()
    assert start() == 2
    assert "github.com/thecharm/MNRE" in capsys.readouterr().err
    assert jobs.lines == []


def test_seconds_of_all_attempts_are_added(tmp_path: Path) -> None:
    work = real_text.Work(tmp_path)
    (tmp_path / "seconds.json").write_text('{"trained": {"clock": 100, "cpu": 50}}')
    with pytest.raises(UserError), work.timed("trained"):
        raise UserError("cut off")
    assert 100 <= work.seconds()["trained"]["clock"] < 110


def test_an_interrupt_waits_for_the_run(tmp_path: Path) -> None:
    """Both have the Ctrl-C; the run takes a second to save and its exit code is heard."""
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
    text, pretraining = (text for _, text in blocks(REPOSITORY / "docs/real_text.md", "bash"))
    assert commands(pretraining) == [
        next(line for line in TEXT_BASE.read_text().splitlines() if "python" in line).strip()
    ]
    for line in commands(text):
        words = shlex.split(line)
        assert words[:2] == ["python", "benchmarks/real_text.py"]
        options, settings = real_text.parse([*words[2:], "--output", str(tmp_path / "free.json")])
        load_config(settings)
        assert options.data == Path("../shared/data")


def test_the_tables_of_its_page_are_of_the_files_that_it_names() -> None:
    page = (REPOSITORY / "docs/real_text.md").read_text(encoding="utf-8")
    files = set(re.findall(r"benchmarks/results/real_text-[\w-]+\.json", page))
    assert files
    rows = [line for line in page.splitlines() if re.match(r"\| (twitter15|mre_v1|m2e2)/", line)]
    made = [real_text.table(json.loads((REPOSITORY / name).read_text(encoding="utf-8"))) for name in files]
    kept = {line for table in made for line in table.splitlines() if line in rows}
    assert kept == set(rows)
    assert len(rows) == 4 * len(files)
