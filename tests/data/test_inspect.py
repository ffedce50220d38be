"""Statistics of shards, lookup of a sample by number or key, and errors for invalid options."""

from __future__ import annotations

import dataclasses
import io
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from lvlm_clorae import cli
from lvlm_clorae.data import reader
from lvlm_clorae.data.index import DatasetSpec, load_index
from lvlm_clorae.data.inspect import FoundSample, find_sample, gather, tables
from lvlm_clorae.data.writer import ShardWriter
from lvlm_clorae.errors import UserError
from tests.helpers.shards import SPEC, TYPES, pil_image, sample, write_toy

EVENTS = DatasetSpec(
    "scenes",
    "mee",
    ("trigger", "argument"),
    {"trigger": ["attack", "meet"], "argument": {"types": ["attack", "meet"], "roles": ["agent", "place"]}},
    {},
)
PAIRS = DatasetSpec("pairs", "mre", ("relation",), {"relation": ["none", "/per/loc/place_of_residence"]}, {})


def _words(count: int) -> dict[str, Any]:
    """Return a `toy` sample of `count` tokens without entities."""
    tokens = ["w"] * count
    return {**sample(), "tokens": tokens, "text": " ".join(tokens), "entities": []}


def _scene() -> dict[str, Any]:
    agent, scene = {"role": "agent", "text": "Anna", "span": [0, 1]}, {"role": "place", "object": "O2"}
    events = [{"type": "attack", "trigger": None, "arguments": [agent, {**agent, "role": "pilot"}, scene, scene]}]
    boxes = [[0, 0, 5, 5], [1, 1, 9, 9]]
    return {**sample(image="a.png", boxes=boxes), "dataset": "scenes", "task": "mee", "events": events}


def _pair() -> dict[str, Any]:
    ends = {"head": {"text": "Anna", "span": [0, 1]}, "tail": {"text": "met", "span": [2, 3]}}
    return {**sample(), "dataset": "pairs", "task": "mre", "relation": {**ends, "label": "none"}}


@pytest.fixture
def three(tmp_path: Path) -> Path:
    """Write shards of `toy` (train, test), `scenes` (train) and `pairs` (dev)."""
    write_toy(tmp_path, max_samples=3)
    with ShardWriter(tmp_path, EVENTS) as writer:
        writer.add("train", "scene", _scene(), pil_image())
        writer.add("train", "blind", _scene())
    with ShardWriter(tmp_path, PAIRS) as writer:
        writer.add("dev", "000000_toy", _pair())
    return tmp_path


def test_counts(three: Path) -> None:
    found = gather(three)
    assert {name: (of.task, list(of.splits)) for name, of in found.items()} == {
        "pairs": ("mre", ["dev"]),
        "scenes": ("mee", ["train"]),
        "toy": ("mner", ["train", "test"]),
    }
    toy = found["toy"].splits["train"]
    size = sum(path.stat().st_size for path in three.glob("toy-train-*.tar"))
    assert toy.counts == {"samples": 7, "shards": 3, "bytes": size, "images": 4, "missing_images": 0, "objects": 0}
    assert toy.labels == {"entity_types": {"person": 7, "location": 0}}
    assert found["pairs"].splits["dev"].labels == {"relations": {"none": 1, "/per/loc/place_of_residence": 0}}
    scenes = found["scenes"].splits["train"]
    counts = [scenes.counts[name] for name in ("samples", "images", "missing_images", "objects")]
    assert counts == [2, 1, 1, 4]
    assert scenes.labels == {
        "event_types": {"attack": 2, "meet": 0},
        "argument_roles": {"agent": 2, "place": 4, "pilot": 2},
    }


@pytest.mark.parametrize(
    ("lengths", "expected"),
    [
        ([3], {"p50": 3, "p90": 3, "p99": 3, "max": 3}),
        ([0, 4], {"p50": 0, "p90": 4, "p99": 4, "max": 4}),
        (list(range(100, 0, -1)), {"p50": 50, "p90": 90, "p99": 99, "max": 100}),
        ([2] * 198 + [9, 40], {"p50": 2, "p90": 2, "p99": 2, "max": 40}),
        ([2] * 197 + [9, 9, 40], {"p50": 2, "p90": 2, "p99": 9, "max": 40}),
    ],
)
def test_percentiles(tmp_path: Path, lengths: list[int], expected: dict[str, int]) -> None:
    with ShardWriter(tmp_path, SPEC) as writer:
        for number, length in enumerate(lengths):
            writer.add("train", f"k{number}", _words(length))
    assert gather(tmp_path)["toy"].splits["train"].percentiles() == expected


def test_only_annotations_of_the_task_are_counted(tmp_path: Path) -> None:
    with ShardWriter(tmp_path, SPEC) as writer:
        writer.add("train", "k", {**sample(), "events": [{}], "relation": 7})
    assert gather(tmp_path)["toy"].splits["train"].labels == {"entity_types": {"person": 1, "location": 0}}


def test_user_defined_task_counts_all_annotations(tmp_path: Path) -> None:
    labels = {"entity": TYPES, "relation": ["none"], **EVENTS.labels}
    subtasks = ("entity", "relation", *EVENTS.subtasks)
    with ShardWriter(tmp_path, DatasetSpec("own", "mine", subtasks, labels, {})) as writer:
        writer.add("train", "k", {**_pair(), **_scene(), "dataset": "own", "task": "mine"}, pil_image())
    assert gather(tmp_path)["own"].splits["train"].labels == {
        "entity_types": {"person": 1, "location": 0},
        "relations": {"none": 1},
        "event_types": {"attack": 1, "meet": 0},
        "argument_roles": {"agent": 1, "place": 2, "pilot": 1},
    }


def test_selection_of_dataset_and_split(three: Path) -> None:
    assert {name: list(of.splits) for name, of in gather(three, None, "train").items()} == {
        "scenes": ["train"],
        "toy": ["train"],
    }
    assert {name: list(of.splits) for name, of in gather(three, "toy", "test").items()} == {"toy": ["test"]}


@pytest.mark.parametrize("width", [60, 80, 120, 200])
def test_tables_are_complete_at_any_width(three: Path, width: int) -> None:
    labels = {"relation": ["/per/loc/place_of_residence_a", "none"]}
    with ShardWriter(three, dataclasses.replace(PAIRS, name="wide", labels=labels)) as writer:
        for split, count in (("train", 1234), ("dev", 5), ("test", 6)):
            for number in range(count):
                writer.add(split, f"k{number}", {**_pair(), "dataset": "wide"})
    stream = io.StringIO()
    Console(file=stream, width=width).print(tables(gather(three), width))
    text = stream.getvalue()
    assert max(len(line) for line in text.splitlines()) <= width
    assert "…" not in text
    lines = [[word for word in line.split() if word[0] not in "▏▎▍▌▋▊▉█"] for line in text.splitlines()]
    assert ["none", "1,234", "100.0%", "5", "100.0%", "6", "100.0%"] in lines
    assert ["place", "4", "50.0%"] in lines
    assert ["pilot", "(not", "in", "the", "index)", "2", "25.0%"] in lines
    if width >= 80:
        assert ["/per/loc/place_of_residence_a", *["0", "0.0%"] * 3] in lines
        size = sum(path.stat().st_size for path in three.glob("wide-train-*"))
        train = ["train", "1,234", "3", f"{size / 1e6:.1f}", "MB", "0", "0", "0", "4", "4", "4", "4"]
        assert train in lines


def test_bars_are_proportional(three: Path) -> None:
    stream = io.StringIO()
    Console(file=stream, width=80).print(tables(gather(three, "scenes"), 80))
    bars = {line.split()[0]: line.count("█") for line in stream.getvalue().splitlines() if "%" in line}
    assert bars == {"attack": 16, "meet": 0, "agent": 8, "place": 16, "pilot": 8}


def test_labels_are_escaped(tmp_path: Path) -> None:
    with ShardWriter(tmp_path, SPEC) as writer:
        entity = {"type": "[b]planet", "span": [0, 1], "text": "Anna"}
        writer.add("train", "k", {**sample(), "entities": [entity]})
    stream = io.StringIO()
    Console(file=stream, width=80).print(tables(gather(tmp_path), 80))
    assert "[b]planet (not in the index)" in stream.getvalue()


def test_numbers_of_samples(three: Path) -> None:
    expected = ["pairs/dev"] + ["scenes/train"] * 2 + ["toy/train"] * 7 + ["toy/test"] * 2
    found = [find_sample(three, str(number)) for number in range(12)]
    assert [f"{item.dataset}/{item.split}" for item in found] == expected
    assert [item.number for item in found] == list(range(12))
    assert [item.key for item in found[3:10]] == [f"{number:06d}_toy" for number in range(7)]
    assert (found[9].shard, found[9].sample["source"]["line"]) == ("toy-train-000002.tar", 7)
    assert (found[9].image, found[8].image) == (pil_image(colour=6), None)
    assert find_sample(three, "1", "toy", "test").sample["source"]["line"] == 2


def test_find_by_key(three: Path) -> None:
    found = find_sample(three, "000004_toy")
    assert (found.number, found.dataset, found.split, found.shard) == (7, "toy", "train", "toy-train-000001.tar")
    assert found.sample["source"]["line"] == 5
    with pytest.raises(UserError, match=r'3 samples.*"000000_toy"'):
        find_sample(three, "000000_toy")
    assert find_sample(three, "000000_toy", "toy", "test").number == 0


def test_find_sample_reads_no_other_sample(three: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    index = load_index(three)
    shard = index.dataset("toy").splits["train"][1]
    path = three / shard.name
    data = bytearray(path.read_bytes())
    for offset in (shard.offsets[0], shard.offsets[2]):
        data[offset + 512 : offset + 600] = b"x" * 88  # the neighbours are no valid JSON
    path.write_bytes(data)
    read = []
    parse = reader.read_raw_samples

    def counted(handle: io.BytesIO, where: str) -> Iterator[reader.RawSample]:
        read.append(len(handle.getvalue()))
        return parse(handle, where)

    monkeypatch.setattr(reader, "read_raw_samples", counted)
    for wanted in ("4", "000004_toy"):
        assert find_sample(three, wanted, "toy", "train").key == "000004_toy"
    assert read == [shard.offsets[2] - shard.offsets[1]] * 2
    with pytest.raises(UserError, match=f"{shard.name}, 000003_toy"):
        find_sample(three, "3", "toy", "train")


def test_to_json_is_readable(tmp_path: Path) -> None:
    tokens = ["Müller", "a\u200bb", "\ud83d", "\x1b[31m", *["word"] * 60]
    item = {**sample(boxes=[[0, 0, 5.5, 5]]), "tokens": tokens, "text": " ".join(tokens)}
    item["entities"] = [{"type": "person", "span": [0, 1], "text": "Müller"}]
    location = {"number": 0, "dataset": "toy", "split": "train", "shard": "toy-train-000000.tar", "key": "k"}
    text = FoundSample(*location.values(), item, pil_image(), {}).to_json()  # type: ignore[arg-type]
    assert json.loads(text) == {**location, "image_bytes": len(pil_image()), **item}
    lines = text.splitlines()
    assert '    {"type": "person", "span": [0, 1], "text": "Müller"}' in lines
    assert sum('"tokens"' in line for line in lines) == 1
    assert all(line.isprintable() for line in lines)
    assert r"a\u200bb" in text


def test_commands(three: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "60")
    assert cli.main(["shards", "inspect", str(three), "--dataset", "pairs"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("pairs (mre)")
    assert ["/per/loc/place_of_residence", "0", "0.0%"] in [line.split() for line in out.splitlines()]
    assert "toy" not in out
    assert cli.main(["shards", "inspect", str(three), "--dataset", "toy", "--split", "test", "--json"]) == 0
    size = (three / "toy-test-000000.tar").stat().st_size
    assert json.loads(capsys.readouterr().out) == {
        "toy": {
            "task": "mner",
            "splits": {
                "test": {
                    "samples": 2,
                    "shards": 1,
                    "bytes": size,
                    "images": 1,
                    "missing_images": 0,
                    "objects": 0,
                    "tokens": {"p50": 4, "p90": 4, "p99": 4, "max": 4},
                    "labels": {"entity_types": dict(zip(TYPES, (2, 0), strict=True))},
                }
            },
        }
    }
    assert cli.main(["shards", "inspect", str(three), "--sample", "3"]) == 0
    assert json.loads(capsys.readouterr().out)["key"] == "000000_toy"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--dataset tou", '"toy"'),
        ("--split tran", 'Did you mean "train"?'),
        ("--dataset toy --split dev", "Valid: test, train."),
        ("--sample 12", "12 in pairs/dev, scenes/train, toy/train, toy/test. Give a number from 0 to 11"),
        ("--sample 2 --dataset toy --split test", "2 in toy/test. Give a number from 0 to 1 "),
        ("--sample -1", "-1 in pairs/dev"),
        ("--sample 99999999999999999999999", "99999999999999999999999 in"),
        ("--sample 000004_to", "000004_to in"),
        ("--sampel 3", "--sample"),
    ],
)
def test_invalid_options(three: Path, options: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["shards", "inspect", str(three), *options.split()]) == 2
    output = capsys.readouterr()
    assert message in output.err
    assert output.err.startswith("error: ")
    assert output.out == ""


def test_missing_and_damaged_shards(three: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["shards", "inspect", str(tmp_path / "none")]) == 2
    assert "none" in capsys.readouterr().err
    path = three / "toy-test-000000.tar"
    path.write_bytes(path.read_bytes().replace(b'"person"', b"{person}"))
    assert cli.main(["shards", "inspect", str(three)]) == 2
    assert "toy-test-000000.tar, 000000_toy" in capsys.readouterr().err


def test_shard_removed_during_reading(three: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    index = load_index(three)
    (three / "toy-test-000000.tar").unlink()
    monkeypatch.setattr("lvlm_clorae.data.inspect.load_index", lambda directory: index)
    for read in (gather, lambda directory: find_sample(directory, "11"), lambda directory: find_sample(directory, "k")):
        with pytest.raises(UserError, match=r"toy-test-000000\.tar"):
            read(three)


@pytest.mark.integration
def test_imports_no_torch() -> None:
    code = "import sys, lvlm_clorae.data.inspect, lvlm_clorae.data.render; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
