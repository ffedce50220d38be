"""Writing shards: samples are read back, equal input gives equal bytes, and a build appears completely or not."""

from __future__ import annotations

import dataclasses
import fcntl
import hashlib
import os
import signal
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lvlm_clorae.data.index import DatasetSpec, load_index
from lvlm_clorae.data.reader import image_extension, read_samples
from lvlm_clorae.data.writer import ShardWriter
from lvlm_clorae.errors import UserError
from tests.helpers.shards import SPEC, files, pil_image, sample, samples, write_toy


def test_samples_are_read_back_in_order(tmp_path: Path) -> None:
    index = write_toy(tmp_path / "out", max_samples=3)
    assert list(read_samples(tmp_path / "out", index, "toy", "train")) == list(samples(7))
    assert list(read_samples(tmp_path / "out", index, "toy", "dev")) == []
    assert [shard.samples for shard in index.dataset("toy").splits["train"]] == [3, 3, 1]
    assert sorted(files(tmp_path)) == [
        "out/index.json",
        "out/toy-test-000000.tar",
        "out/toy-train-000000.tar",
        "out/toy-train-000001.tar",
        "out/toy-train-000002.tar",
    ]


def test_equal_input_gives_equal_bytes(tmp_path: Path) -> None:
    write_toy(tmp_path / "a")
    write_toy(tmp_path / "b")
    assert files(tmp_path / "a") == files(tmp_path / "b")
    with tarfile.open(tmp_path / "a" / "toy-train-000000.tar") as tar:
        stamps = {(info.mtime, info.uid, info.gid, info.uname, info.gname, info.mode) for info in tar}
    assert stamps == {(0, 0, 0, "", "", 0o644)}


def test_the_order_of_keys_in_a_sample_does_not_matter(tmp_path: Path) -> None:
    for name, item in (("a", sample()), ("b", dict(reversed(sample().items())))):
        with ShardWriter(tmp_path / name, SPEC) as writer:
            writer.add("train", "k", item)
    assert files(tmp_path / "a") == files(tmp_path / "b")


def test_the_index_describes_the_files(tmp_path: Path) -> None:
    index = write_toy(tmp_path, max_samples=4)
    for shards in index.dataset("toy").splits.values():
        for shard in shards:
            data = (tmp_path / shard.name).read_bytes()
            assert (len(data), hashlib.sha256(data).hexdigest()) == (shard.bytes, shard.sha256)
            assert len(shard.offsets) == shard.samples
    assert list(index.dataset_tasks("train")) == ["toy/entity"]
    assert list(index.dataset_tasks("dev")) == []
    assert dataclasses.asdict(index.dataset("toy"))["labels"] == dict(SPEC.labels)


def test_the_webdataset_library_reads_the_shards(tmp_path: Path) -> None:
    webdataset = pytest.importorskip("webdataset")
    (shard,) = write_toy(tmp_path).dataset("toy").splits["train"]
    found = list(webdataset.WebDataset(str(tmp_path / shard.name), shardshuffle=False))
    assert [(item["__key__"], item.get("png")) for item in found] == [(key, image) for key, _, image in samples(7)]


@pytest.mark.parametrize(("kind", "extension"), [("JPEG", "jpg"), ("PNG", "png"), ("WEBP", "webp")])
def test_the_extension_follows_the_bytes_and_the_bytes_stay(tmp_path: Path, kind: str, extension: str) -> None:
    with ShardWriter(tmp_path, SPEC) as writer:
        writer.add("train", "k", sample(image="liar.gif"), pil_image(kind))
    with tarfile.open(tmp_path / "toy-train-000000.tar") as tar:
        assert tar.getnames() == ["k.json", f"k.{extension}"]
        member = tar.extractfile(f"k.{extension}")
        assert member is not None
        assert member.read() == pil_image(kind)
    assert image_extension(b"GIF89a") is None


def test_a_shard_stays_below_its_bytes(tmp_path: Path) -> None:
    bound = 20480
    index = write_toy(tmp_path, counts=(("train", 40),), max_bytes=bound)
    shards = index.dataset("toy").splits["train"]
    assert len(shards) > 1
    assert all(shard.bytes <= bound for shard in shards)
    alone = write_toy(tmp_path / "alone", counts=(("train", 2),), max_bytes=1)
    assert [shard.samples for shard in alone.dataset("toy").splits["train"]] == [1, 1]


def test_a_second_dataset_joins_the_first_in_any_order(tmp_path: Path) -> None:
    other = dataclasses.replace(SPEC, name="other")
    for name, order in (("a", (SPEC, other)), ("b", (other, SPEC))):
        for spec in order:
            index = write_toy(tmp_path / name, spec)
        assert list(index.dataset_tasks("train")) == ["other/entity", "toy/entity"]
    assert files(tmp_path / "a") == files(tmp_path / "b")


def test_a_dataset_is_never_overwritten(tmp_path: Path) -> None:
    write_toy(tmp_path / "out")
    before = files(tmp_path)
    with pytest.raises(UserError, match='"toy" is already there'):
        write_toy(tmp_path / "out")
    assert files(tmp_path) == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("train", "a.b", sample()), "cannot be a key"),
        (("train", "a/b", sample()), "cannot be a key"),
        (("train", "__a", sample()), "cannot be a key"),
        (("train", "used", sample()), "have the key"),
        (("valid", "k", sample()), 'no split "valid"'),
        (("train", "k", sample(), b"GIF89a"), "not a JPEG, PNG or WebP"),
        (("train", "k", sample(), b"\xff\xd8\xff" + bytes(64 << 20)), "more than the"),
        (("train", "k", {"text": "x" * (1 << 20)}), "more than the"),
        (("train", "k", {"text": float("nan")}), "cannot be written as JSON"),
        (("train", "k", {"text": "\ud800"}), "cannot be written as JSON"),
    ],
)
def test_samples_that_a_reader_would_reject_are_not_written(tmp_path: Path, arguments: Any, message: str) -> None:
    with ShardWriter(tmp_path, SPEC) as writer:
        writer.add("train", "used", sample())
        with pytest.raises(UserError, match=message):
            writer.add(*arguments)
    index = load_index(tmp_path)
    assert [key for key, _, _ in read_samples(tmp_path, index, "toy", "train")] == ["used"]


def test_an_error_while_writing_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot be a key"):
        _write_then_fail(tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def _write_then_fail(directory: Path) -> None:
    with ShardWriter(directory, SPEC, max_samples=1) as writer:
        for key in ("a", "b", "not.a.key"):
            writer.add("train", key, sample())


@pytest.mark.parametrize("fails_at", ["toy-train-000001.tar", "index.json"])
def test_an_error_while_publishing_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails_at: str
) -> None:
    replace = os.replace

    def full_disk(source: Any, target: Any) -> None:
        if target == tmp_path / "out" / fails_at:
            raise OSError(28, "No space left on device")
        replace(source, target)

    monkeypatch.setattr(os, "replace", full_disk)
    with pytest.raises(OSError, match="No space"):
        write_toy(tmp_path / "out", max_samples=3)
    assert files(tmp_path) == {}


def test_no_sample_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="No sample"), ShardWriter(tmp_path / "out", SPEC):
        pass
    assert list(tmp_path.iterdir()) == []


_KILLED = """
import os, signal, sys
from pathlib import Path
from lvlm_clorae.data.writer import ShardWriter
from tests.helpers.shards import SPEC, sample
rename, at = os.replace, sys.argv[2]
def killed(source, target):
    if target == Path(sys.argv[1]) / at:
        os.kill(os.getpid(), signal.SIGKILL)
    rename(source, target)
os.replace = killed
with ShardWriter(Path(sys.argv[1]), SPEC, max_samples=1) as writer:
    for number in range(4):
        writer.add("train", f"k{number}", sample(number))
        if at == "adding" and number == 2:
            os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.integration
@pytest.mark.parametrize("at", ["adding", "toy-train-000002.tar", "index.json"])
def test_a_killed_build_leaves_no_index_and_the_next_one_succeeds(tmp_path: Path, at: str) -> None:
    root = Path(__file__).parents[2]
    out = tmp_path / "out"
    done = subprocess.run([sys.executable, "-c", _KILLED, str(out), at], cwd=root, check=False, timeout=60)
    assert done.returncode == -signal.SIGKILL
    assert not (out / "index.json").exists()
    with pytest.raises(UserError):
        load_index(out)
    write_toy(out, max_samples=1)
    assert list(tmp_path.iterdir()) == [out]
    write_toy(tmp_path / "other", max_samples=1)
    assert files(out) == files(tmp_path / "other")


def test_two_builds_into_one_directory_do_not_mix(tmp_path: Path) -> None:
    partial = tmp_path / ".out.partial"
    partial.mkdir()
    with open(partial / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(UserError, match="another build"):
            write_toy(tmp_path / "out")
    write_toy(tmp_path / "out")


def test_an_output_that_is_a_file_is_rejected(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("")
    with pytest.raises(UserError, match="is a file"):
        write_toy(tmp_path / "out")


@pytest.mark.parametrize("name", ["", "a.b", "a/b", "../a", "a" * 41])
def test_a_dataset_name_fits_into_a_file_name(name: str) -> None:
    with pytest.raises(UserError, match="cannot name a dataset"):
        DatasetSpec(name, "mner", ("entity",), {"entity": ["person"]}, {})


_TOKENS = st.lists(st.text(st.characters(codec="utf-8"), min_size=1), min_size=1, max_size=6)
_IMAGES = st.none() | st.binary(max_size=2000).map(lambda data: b"\xff\xd8\xff" + data)


@settings(deadline=None, max_examples=50)
@given(st.lists(st.tuples(_TOKENS, _IMAGES), min_size=1, max_size=8), st.integers(1, 4))
def test_any_text_and_any_image_bytes_survive(content: list[tuple[list[str], bytes | None]], per_shard: int) -> None:
    items = [
        (f"k{number}", {**sample(), "tokens": tokens, "text": " ".join(tokens), "entities": []}, image)
        for number, (tokens, image) in enumerate(content)
    ]
    with tempfile.TemporaryDirectory() as folder:
        with ShardWriter(Path(folder), SPEC, max_samples=per_shard) as writer:
            for key, item, image in items:
                writer.add("dev", key, item, image)
        assert list(read_samples(Path(folder), load_index(Path(folder)), "toy", "dev")) == items


@pytest.mark.integration
def test_start_up_imports_nothing_heavy() -> None:
    code = (
        "import sys, lvlm_clorae.data.writer, lvlm_clorae.data.validation, lvlm_clorae.data.convert as c;"
        "[c.load_converter(n, c.Path()) for n in c.PUBLISHED];"
        "print([m for m in ('torch', 'transformers', 'PIL', 'webdataset', 'numpy') if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=Path(__file__).parents[2], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"
