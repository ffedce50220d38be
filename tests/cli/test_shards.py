"""``lvlm-clorae shards``: demo, build, verify."""

from __future__ import annotations

from pathlib import Path

import pytest

from lvlm_clorae import cli
from lvlm_clorae.data.index import load_index
from tests.helpers.launch import REPOSITORY
from tests.helpers.shards import files


def refused(capsys: pytest.CaptureFixture[str], *argv: str, code: int = 2) -> str:
    assert cli.main(["shards", *argv]) == code
    return capsys.readouterr().err


@pytest.mark.integration
def test_demo_and_verify(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = tmp_path / "demo"
    assert cli.main(["shards", "demo", "--output_dir", str(target)]) == 0
    assert "demo_posts: 300 train" in capsys.readouterr().out
    index = load_index(target)
    assert {entry.task for entry in index.datasets.values()} == {"mner", "mre", "mee"}
    assert len(index.datasets["demo_posts"].splits["train"]) == 3
    assert files(target) == files(REPOSITORY / "lvlm_clorae/data/demo")
    assert cli.main(["shards", "verify", str(target)]) == 0

    before = {path.name: path.read_bytes() for path in target.iterdir()}
    assert str(target) in refused(capsys, "demo", "--output_dir", str(target))
    assert {path.name: path.read_bytes() for path in target.iterdir()} == before, "nothing is overwritten"

    shard = next(target.glob("*-test-*.tar"))
    shard.write_bytes(shard.read_bytes()[:-1] + b"x")
    assert cli.main(["shards", "verify", str(target)]) == 1
    assert shard.name in capsys.readouterr().out


def test_build(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tweets = tmp_path / "tweets"
    tweets.mkdir()
    for name in ("train", "valid", "test"):
        (tweets / f"{name}.txt").write_text("IMGID:1\nMaple\tB-PER\n\nIMGID:2\nElm\tB-LOC\n")
    common = ["build", "--dataset", "twitter15", "--input", str(tweets), "--output_dir", str(tmp_path / "out")]
    assert str(tmp_path / "none") in refused(capsys, *common, "--images", str(tmp_path / "none"))
    assert "limit" in refused(capsys, *common, "--limit", "0")
    assert cli.main(["shards", *common, "--limit", "1"]) == 0
    assert "1 train, 1 dev, 1 test" in capsys.readouterr().out
    assert "twitter15" in refused(capsys, *common)


def test_too_many_invalid_records(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("train", "valid", "test"):
        (tmp_path / f"{name}.txt").write_text("IMGID:1\nMaple\tB-XYZ\n")
    common = ["build", "--dataset", "twitter15", "--input", str(tmp_path), "--output_dir", str(tmp_path / "out")]
    assert "max" in refused(capsys, *common, code=1)


def test_options_that_cannot_apply_are_errors(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    inspect = ["inspect", str(tmp_path)]
    assert "--model" in refused(capsys, *inspect, "--max_target_length", "20")
    assert "--sample" in refused(capsys, *inspect, "--sample", "0", "--model", "demo")
    build = ["build", "--dataset", "jsonl", "--input", str(tmp_path), "--output_dir", str(tmp_path / "out")]
    assert "sroie and funsd" in refused(capsys, *build, "--layout", "none")
