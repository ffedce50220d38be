"""The console command: exit codes, messages, and that it starts fast."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from lvlm_clorae import cli
from lvlm_clorae.data.index import load_index
from lvlm_clorae.doctor import Finding
from lvlm_clorae.records import Request

REPOSITORY = Path(__file__).parents[1]
CLI = ["-c", "from lvlm_clorae.cli import main; raise SystemExit(main())"]


def fails(capsys: pytest.CaptureFixture[str], *argv: str, code: int = 2) -> str:
    """The message of a command line that exits with `code`."""
    assert cli.main(list(argv)) == code
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    return error


@pytest.mark.parametrize(("command", "bar"), [(CLI, 0.5), (["train.py"], 2.0)])
def test_help_is_fast(command: list[str], bar: float) -> None:
    times = []
    for _ in range(3):
        begin = time.perf_counter()
        done = subprocess.run([sys.executable, *command, "--help"], cwd=REPOSITORY, capture_output=True, text=True)
        times.append(time.perf_counter() - begin)
        assert done.returncode == 0
        assert "--help" in done.stdout
    assert min(times) < bar


@pytest.mark.parametrize(
    "start",
    [
        "import lvlm_clorae.cli as cli; cli._parser().parse_args(['doctor'])",
        "from lvlm_clorae.training.config import load_config; load_config(['--epochs', '1'])",
        "import lvlm_clorae.training.main, lvlm_clorae.training.checks",
    ],
)
def test_the_start_imports_nothing_heavy(start: str) -> None:
    heavy = ("torch", "transformers", "peft", "deepspeed", "open_clip", "numpy", "PIL", "rich")
    code = f"import sys; {start}; print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_an_error_in_a_process_of_its_own() -> None:
    argv = [sys.executable, *CLI, "shards", "verify", "/nowhere"]
    done = subprocess.run(argv, cwd=REPOSITORY, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: /nowhere: no such directory.")
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("shard verify x", '"shard" is no command. Did you mean "shards"?'),
        ("shards biuld", '"biuld" is no command. Did you mean "build"?'),
        ("shards build --datset twitter15", 'no option --datset. Did you mean "--dataset"?'),
        ("shards demo --outpt=x", 'no option --outpt. Did you mean "--output"?'),
        ("--verbos doctor", "no option --verbos."),
        ("doctor now", "no argument now"),
        ("shards demo", "the following arguments are required: --output"),
        ("shards demo --output x --seed one", "invalid int value: 'one'"),
        ("shards demo --out x", 'no option --out. Did you mean "--output"?'),
        ("shards build --dataset twiter15 --input x --output y", 'Did you mean "twitter15"?'),
        ("shards build --dataset twitter71 --input x --output y", 'Did you mean "twitter17"?'),
        ("shards build --dataset jsnl --input x --output y", 'Did you mean "jsonl"?'),
        ("shards build --dataset nothing-like-it --input x --output y", "Valid: ace2005, jsonl, m2e2, mre_v1, mre_v2"),
        ("", "the following arguments are required: COMMAND"),
    ],
)
def test_mistakes_on_the_command_line(line: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert message in fails(capsys, *line.split())


def test_interrupted(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("lvlm_clorae.data.verify.verify", interrupt)
    assert cli.main(["shards", "verify", "x"]) == 130


def test_demo_and_verify(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = tmp_path / "demo"
    assert cli.main(["shards", "demo", "--output", str(target)]) == 0
    assert "demo_posts: 300 train" in capsys.readouterr().out
    index = load_index(target)
    assert {entry.task for entry in index.datasets.values()} == {"mner", "mre", "mee"}
    assert len(index.datasets["demo_posts"].splits["train"]) == 3
    assert sum(path.stat().st_size for path in target.iterdir()) <= 3_000_000
    assert cli.main(["shards", "verify", str(target)]) == 0
    assert "sound" in capsys.readouterr().out

    before = {path.name: path.read_bytes() for path in target.iterdir()}
    assert "never overwritten" in fails(capsys, "shards", "demo", "--output", str(target), "--seed", "1")
    assert {path.name: path.read_bytes() for path in target.iterdir()} == before

    shard = next(target.glob("*-test-*.tar"))
    shard.write_bytes(shard.read_bytes()[:-1] + b"x")
    assert cli.main(["shards", "verify", str(target)]) == 1
    assert f"{shard.name}: its SHA-256" in capsys.readouterr().out


def test_build(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tweets = tmp_path / "tweets"
    tweets.mkdir()
    for name in ("train", "valid", "test"):
        (tweets / f"{name}.txt").write_text("IMGID:1\nMaple\tB-PER\n\nIMGID:2\nElm\tB-LOC\n")
    common = ["shards", "build", "--dataset", "twitter15", "--input", str(tweets), "--output", str(tmp_path / "out")]
    assert "no such directory" in fails(capsys, *common, "--images", str(tmp_path / "none"))
    assert "at least one sample" in fails(capsys, *common, "--limit", "0")
    assert cli.main([*common, "--limit", "1"]) == 0
    assert "1 train, 1 dev, 1 test" in capsys.readouterr().out
    assert "already there" in fails(capsys, *common)


def test_too_many_rejected(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("train", "valid", "test"):
        (tmp_path / f"{name}.txt").write_text("IMGID:1\nMaple\tB-XYZ\n")
    common = ["shards", "build", "--dataset", "twitter15", "--input", str(tmp_path), "--output", str(tmp_path / "out")]
    assert "--max-rejected" in fails(capsys, *common, code=1)


def test_doctor_exits_by_what_is_lacking(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    findings = [Finding("torch", "2.15"), Finding("SLURM", "none", "note")]
    monkeypatch.setattr("lvlm_clorae.doctor.examine", lambda: findings)
    assert cli.main(["doctor"]) == 0
    findings.append(Finding("g++", "c++: not found", "lacking", "apt-get install g++"))
    assert cli.main(["doctor"]) == 2
    assert "apt-get install g++" in capsys.readouterr().out
    for module in [name for name in sys.modules if name.split(".")[0] == "rich"]:
        monkeypatch.setitem(sys.modules, module, None)
    assert cli.main(["doctor"]) == 2
    assert "g++: c++: not found. Remedy: apt-get install g++\n" in capsys.readouterr().out


class Extractor:
    """Stands in for the trained model and remembers how it was asked."""

    asked: tuple[Any, ...] = ()

    @classmethod
    def from_pretrained(cls, path: Path) -> Extractor:
        cls.asked = (path,)
        return cls()

    def extract_all(self, requests: list[Request], **how: Any) -> list[list[Any]]:
        Extractor.asked += (requests, how)
        return [[self] * number for number in range(2, 2 + len(requests))]

    def to_dict(self) -> dict[str, str]:
        return {"text": "Žižkov"}


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run directory whose adapter is there, and an Extractor that needs no weights."""
    module = ModuleType("lvlm_clorae.extractor")
    module.Extractor = Extractor  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "lvlm_clorae.extractor", module)
    (tmp_path / "run" / "adapter").mkdir(parents=True)
    (tmp_path / "run" / "adapter" / "schema.json").touch()
    return tmp_path / "run"


def test_predict(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    picture = run / "picture.png"
    picture.touch()
    boxes = "[[0, 1, 20, 30.5]]"
    argv = ["--text", "a b", "--image", str(picture), "--task", "mee", "--objects", boxes]
    assert cli.main(["predict", "--run", str(run), *argv]) == 0
    assert capsys.readouterr().out == '{"text": "Žižkov"}\n' * 2
    request = Request("a b", picture, "mee", boxes=json.loads(boxes))
    assert Extractor.asked == (run / "adapter", [request], {"constrained": False})
    assert cli.main(["predict", "--run", str(run / "adapter"), "--text", "a", "--constrained"]) == 0
    assert Extractor.asked[0] == run / "adapter"
    assert Extractor.asked[2]["constrained"]


def test_predict_of_a_file(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.png").touch()
    lines = [{"text": "a b", "id": 7}, {"text": "c", "image": "a.png", "task": "mre", "head": "c", "tail": "d"}]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(line) + "\n\n" for line in lines))
    assert cli.main(["predict", "--run", str(run), "--input", str(tmp_path / "in.jsonl"), "--task", "mee"]) == 0
    found = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    record = {"text": "Žižkov"}
    assert found == [{**lines[0], "records": [record] * 2}, {**lines[1], "records": [record] * 3}]
    second = Request("c", tmp_path / "a.png", "mre", "c", "d", [])
    assert Extractor.asked[1] == [Request("a b", None, "mee", boxes=[]), second]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ((), "nothing to read"),
        (("--text", "a", "--task", "mre", "--head", "a"), "give --head and --tail"),
        (("--image", "/nowhere.png"), "no such picture"),
        (("--text", "a", "--objects", "1,2,3,4"), "no list of boxes"),
        (("--text", "a", "--objects", "[[1, 2, 3]]"), "no list of boxes"),
        (("--text", "a", "--objects", "[[5, 2, 3, 4]]"), "no list of boxes"),
        (("--text", "a", "--objects", "[1]"), "no list of boxes"),
        (("--text", "a", "--objects", "7"), "no list of boxes"),
    ],
)
def test_predict_refuses(argv: tuple[str, ...], message: str, run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert message in fails(capsys, "predict", "--run", str(run), *argv)


def test_predict_says_what_a_directory_lacks(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    predict = ("predict", "--text", "a", "--run")
    assert "no such directory" in fails(capsys, *predict, str(tmp_path / "none"))
    assert "is no run and no adapter directory" in fails(capsys, *predict, str(tmp_path))
    (tmp_path / "config.yaml").touch()
    assert "--resume auto" in fails(capsys, *predict, str(tmp_path))
    (tmp_path / "best").mkdir()
    (tmp_path / "best" / "schema.json").touch()
    assert f"--run {tmp_path / 'best'}" in fails(capsys, *predict, str(tmp_path))


@pytest.mark.parametrize("model", ["flan-t5-xl", "llava-1.5-7b"])
def test_cost_of_a_large_base_takes_seconds_and_no_file(model: str) -> None:
    """The bar of 10 s is for a machine that does nothing else; imports take nearly all of it."""
    begin = time.perf_counter()
    argv = [sys.executable, *CLI, "cost", "--model", model, "--json"]
    done = subprocess.run(argv, cwd=REPOSITORY, capture_output=True, text=True, check=True)
    assert time.perf_counter() - begin < 30
    found = json.loads(done.stdout)
    assert list(found) == ["language model", "projector", "vision tower", "adapter"]
    assert found["language model"]["parameters"] > 2.8e9
    assert found["language model"]["trained"] == found["vision tower"]["trained"] == 0
    assert found["adapter"]["trained"] == found["adapter"]["parameters"] > 1e7


def test_cost_prints_a_table_and_takes_the_settings_of_training(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["cost", "--adapter", "lora", "--rank", "8", "--target-modules", "q"]) == 0
    text = capsys.readouterr().out
    assert "demo with lora, rank 8" in text
    assert all(part in text for part in ("language model", "vision tower", "projector", "adapter", "all"))
    layers, width, inner = 12, 128, 128  # encoder, decoder and cross-attention of four blocks
    assert f"{layers * 8 * (width + inner):,}" in text
    assert "rnk" not in fails(capsys, "cost", "--rank", "many")
