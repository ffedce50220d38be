"""From shards to batches: the right samples, in the plan's order whoever reads them, and faults named."""

from __future__ import annotations

import io
import os
import pickle
import random
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from lvlm_clorae.data.batches import (
    Batch,
    Batcher,
    Unit,
    decode_picture,
    evaluation_batches,
    find_units,
    training_batches,
)
from lvlm_clorae.data.plan import EpochPlan, Place
from lvlm_clorae.data.shards import DatasetEntry, Index, load_index, read_samples
from lvlm_clorae.data.stream import MAX_OPEN_SHARDS, ShardReader
from lvlm_clorae.errors import UserError
from lvlm_clorae.models import Processor
from tests.data.helpers import picture, write_toy
from tests.launch import REPOSITORY, small_shards


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_shards(tmp_path_factory.mktemp("stream") / "shards", train=12, dev=5, test=2)


@pytest.fixture(scope="module")
def index(directory: Path) -> Index:
    return load_index(directory)


@pytest.fixture(scope="module")
def processor() -> Processor:
    return Processor.from_pretrained(REPOSITORY / "lvlm_clorae/models/demo")


@pytest.fixture
def reader(directory: Path, index: Index) -> Iterator[ShardReader]:
    reader = ShardReader(directory, index)
    yield reader
    reader.close()


def everywhere(entry: DatasetEntry, split: str) -> list[Place]:
    """The places of a split in the order written."""
    return [Place(n, k, False) for n, shard in enumerate(entry.splits[split]) for k in range(shard.samples)]


def test_a_place_gives_the_sample_written_there(directory: Path, index: Index, reader: ShardReader) -> None:
    for name, entry in index.datasets.items():
        written = list(read_samples(directory, index, name, "train"))
        places = everywhere(entry, "train")
        assert len(entry.splits["train"]) == 2
        for number in random.Random(0).sample(range(len(written)), len(written)):
            assert reader.read(name, "train", places[number]) == written[number]


def test_a_split_that_is_absent_has_no_shards(reader: ShardReader) -> None:
    assert reader.shards("demo_posts", "validation") == ()


def test_open_files_are_bounded(tmp_path: Path) -> None:
    index = write_toy(tmp_path, counts=(("train", 40),), max_samples=1)
    reader = ShardReader(tmp_path, index)
    for _ in range(2):
        keys = [reader.read("toy", "train", place)[0] for place in everywhere(index.dataset("toy"), "train")]
        assert keys == [f"{number:06d}_toy" for number in range(40)]
    handles = list(reader._open.values())
    assert len(handles) == MAX_OPEN_SHARDS
    reader.close()
    assert all(handle.closed for handle in handles)


def test_a_reader_with_open_files_goes_to_another_process(index: Index, reader: ShardReader) -> None:
    place = Place(1, 1, False)
    read = reader.read("demo_posts", "train", place)
    copied = pickle.loads(pickle.dumps(reader))
    assert copied.read("demo_posts", "train", place) == read
    copied.close()


def test_reading_moves_no_offset_that_forked_workers_share(index: Index, reader: ShardReader) -> None:
    """A forked process has its parent's open files with one offset for both: a seek of one would move the other's."""
    reader.read("demo_posts", "train", Place(0, 0, False))
    (handle,) = reader._open.values()
    before = os.lseek(handle.fileno(), 0, os.SEEK_CUR)
    reader.read("demo_posts", "train", Place(0, 7, False))
    assert os.lseek(handle.fileno(), 0, os.SEEK_CUR) == before


def test_an_offset_that_is_wrong_names_the_shard(tmp_path: Path) -> None:
    index = write_toy(tmp_path)
    entry = index.dataset("toy")
    (shard,) = entry.splits["train"]
    for offset, message in (
        (shard.offsets[2] + 512, "cannot be read as a tar"),
        (shard.offsets[2] + 1024, "follow its"),
    ):
        offsets = (*shard.offsets[:2], offset, *shard.offsets[3:])
        wrong = replace(entry, splits={"train": (replace(shard, offsets=offsets),)})
        with pytest.raises(UserError, match=rf"toy-train-000000\.tar.*{message}"):
            ShardReader(tmp_path, Index({"toy": wrong})).read("toy", "train", Place(0, 2, False))


def test_zeros_where_a_sample_should_start_name_shard_and_remedy(tmp_path: Path) -> None:
    index = write_toy(tmp_path)
    (shard,) = index.dataset("toy").splits["train"]
    data = bytearray((tmp_path / shard.name).read_bytes())
    data[shard.offsets[3] :] = bytes(len(data) - shard.offsets[3])
    (tmp_path / shard.name).write_bytes(data)
    with pytest.raises(UserError, match=rf"{shard.name}: no sample at byte {shard.offsets[3]}.*shards verify"):
        ShardReader(tmp_path, index).read("toy", "train", Place(0, 3, False))


def test_a_shard_cut_off_or_gone_is_named(tmp_path: Path) -> None:
    index = write_toy(tmp_path)
    (shard,) = index.dataset("toy").splits["train"]
    path = tmp_path / shard.name
    path.write_bytes(path.read_bytes()[: shard.offsets[4] + 600])
    with pytest.raises(UserError, match=rf"{shard.name}: cannot be read as a tar"):
        ShardReader(tmp_path, index).read("toy", "train", Place(0, 4, False))
    path.unlink()
    with pytest.raises(UserError, match=rf"{shard.name}: cannot be read \(No such file"):
        ShardReader(tmp_path, index).read("toy", "train", Place(0, 0, False))
    path.mkdir()
    with pytest.raises(UserError, match=rf"{shard.name}: cannot be read \(Is a directory"):
        ShardReader(tmp_path, index).read("toy", "train", Place(0, 0, False))


def test_a_sample_that_is_not_sound_names_shard_and_key(tmp_path: Path) -> None:
    index = write_toy(tmp_path)
    (shard,) = index.dataset("toy").splits["train"]
    path = tmp_path / shard.name
    path.write_bytes(
        path.read_bytes().replace(b'"text": "Anna', b'"text": "Anne').replace(b'"text":"Anna', b'"text":"Anne')
    )
    with pytest.raises(UserError, match=rf"{shard.name}, 000001_toy: not a sound sample"):
        ShardReader(tmp_path, index).read("toy", "train", Place(0, 1, False))


# ---- pictures


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_pictures_are_rgb_whatever_they_were(kind: str) -> None:
    assert decode_picture(picture(kind), "here").mode == "RGB"


@pytest.mark.parametrize("mode", ["L", "LA", "RGBA", "P", "1", "CMYK", "I;16"])
def test_pictures_of_every_mode_become_rgb(mode: str) -> None:
    buffer = io.BytesIO()
    Image.new(mode, (6, 4)).save(buffer, "TIFF")
    decoded = decode_picture(buffer.getvalue(), "here")
    assert (decoded.mode, decoded.size) == ("RGB", (6, 4))


def test_pictures_are_turned_upright() -> None:
    exif = Image.Exif()
    exif[0x112] = 6  # the camera was turned: the first row stored is the right side
    buffer = io.BytesIO()
    Image.new("RGB", (20, 10)).save(buffer, "JPEG", exif=exif)
    assert decode_picture(buffer.getvalue(), "here").size == (10, 20)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_damaged_exif_data_does_not_cost_the_picture() -> None:
    """Pillow raises struct.error or TypeError where it turns such a picture and writes its data again."""
    exif = Image.Exif()
    exif[0x112], exif[0x10E] = 6, "a caption"
    buffer = io.BytesIO()
    Image.new("RGB", (12, 8)).save(buffer, "JPEG", exif=exif)
    caption = buffer.getvalue().index(b"\x01\x0e\x00\x02")
    for tag in (0x00, 0x1A):
        data = bytearray(buffer.getvalue())
        data[caption + 1] = tag
        assert decode_picture(bytes(data), "here").mode == "RGB"


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_damaged_pictures_are_user_errors() -> None:
    rng = random.Random(0)
    sound = 0
    for kind in ("PNG", "JPEG", "WEBP"):
        for _ in range(200):
            data = bytearray(picture(kind, (12, 8)))
            for _ in range(rng.randrange(1, 6)):
                data[rng.randrange(min(len(data), rng.choice([60, 200, 10_000])))] = rng.randrange(256)
            with suppress(UserError):
                decode_picture(bytes(data[: rng.randrange(1, 2 * len(data))]), "here")
                sound += 1
    assert 0 < sound < 400


def test_pictures_too_large_to_decode_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 50)
    with pytest.raises(UserError, match="here: its picture cannot be decoded"):
        decode_picture(picture(), "here")


# ---- batches


def test_units_are_datasets_and_sub_tasks(index: Index) -> None:
    units = find_units(index, "train")
    assert sorted(units) == [
        "demo_events/argument",
        "demo_events/trigger",
        "demo_news/entity",
        "demo_pairs/relation",
        "demo_posts/entity",
    ]
    argument = units["demo_events/argument"]
    assert (argument.dataset, argument.subtask, argument.task) == ("demo_events", "argument", "mee")
    assert argument.reference_f1 == 85.0
    assert argument.labels == index.dataset("demo_events").labels["argument"]
    assert find_units(index, "test").keys() == units.keys()


def test_a_batch_holds_prompts_pictures_regions_and_answers(
    index: Index, reader: ShardReader, processor: Processor
) -> None:
    unit = find_units(index, "train")["demo_events/argument"]
    places = [
        replace(place, wrapped=n == 3) for n, place in enumerate(everywhere(index.dataset(unit.dataset), "train")[:4])
    ]
    batch = Batcher(reader, processor, "train")(unit, places)
    assert batch.wrapped == [False, False, False, True]
    assert batch.keys == [reader.read(unit.dataset, "train", place)[0] for place in places]
    prompts = processor.decode(batch.tensors["input_ids"])
    answers = processor.decode(batch.tensors["labels"].clamp(min=0))
    slots = (batch.tensors["input_ids"] == processor.region_token_id).sum(-1).tolist()
    areas = (batch.tensors["regions"][..., 2] > batch.tensors["regions"][..., 0]).sum(-1).tolist()
    for row, sample in enumerate(batch.samples):
        assert sample["text"] in prompts[row]
        assert answers[row].startswith(sample["events"][0]["type"])
        assert slots[row] == areas[row] == len(sample["objects"])
        assert bool(batch.tensors["pixel_mask"][row]) == (sample["image"] is not None)
    assert "labels" not in Batcher(reader, processor, "train")(unit, places, answers=False).tensors


def test_the_length_limits_reach_the_processor(index: Index, reader: ShardReader, processor: Processor) -> None:
    unit = find_units(index, "train")["demo_posts/entity"]
    tensors = Batcher(reader, processor, "train", max_length=16, max_answer_length=8)(
        unit, [Place(0, 0, False)]
    ).tensors
    assert (tensors["input_ids"].shape[1], tensors["labels"].shape[1]) == (16, 8)


def plan_of(reader: ShardReader, units: dict[str, Unit], block: int = 4) -> EpochPlan:
    sizes = {name: [shard.samples for shard in reader.shards(unit.dataset, "train")] for name, unit in units.items()}
    return EpochPlan(sizes, block, 0, 0)


def same(first: Batch, second: Batch) -> bool:
    if (first.unit, first.keys, first.wrapped) != (second.unit, second.keys, second.wrapped):
        return False
    return all(torch.equal(tensor, second.tensors[name]) for name, tensor in first.tensors.items())


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
def test_workers_change_neither_order_nor_content(index: Index, reader: ShardReader, processor: Processor) -> None:
    units = find_units(index, "train")
    batcher, plan = Batcher(reader, processor, "train"), plan_of(reader, units)
    how: dict[str, Any] = {"rank": 1, "world_size": 2, "micro_batch": 2}
    state = torch.get_rng_state()
    alone = list(training_batches(batcher, units, plan, **how))
    assert len(alone) == len(plan)
    assert {batch.unit.name for batch in alone} == set(units)
    together = list(training_batches(batcher, units, plan, **how, workers=2))
    assert len(together) == len(alone)
    assert all(map(same, alone, together))
    rest = list(training_batches(batcher, units, plan, **how, start=5, workers=2))
    assert len(rest) == len(alone) - 5
    assert all(map(same, alone[5:], rest))
    assert torch.equal(torch.get_rng_state(), state), "dropout must not depend on workers"


def test_training_reads_every_sample_once_and_fills_marked(
    index: Index, reader: ShardReader, processor: Processor
) -> None:
    units = {name: unit for name, unit in find_units(index, "train").items() if name == "demo_news/entity"}
    batcher, plan = Batcher(reader, processor, "train"), plan_of(reader, units, block=8)
    counts: Counter[str] = Counter()
    for rank in range(2):
        for batch in training_batches(batcher, units, plan, rank=rank, world_size=2, micro_batch=2):
            counts.update(key for key, wrapped in zip(batch.keys, batch.wrapped, strict=True) if not wrapped)
            assert len(batch.keys) == 2
    assert set(counts.values()) == {1}
    assert len(counts) == 12


@pytest.mark.parametrize(("ranks", "size"), [(1, 2), (2, 2), (3, 1), (4, 4)])
def test_evaluation_takes_each_sample_on_one_rank(
    index: Index, reader: ShardReader, processor: Processor, ranks: int, size: int
) -> None:
    unit = find_units(index, "dev")["demo_pairs/relation"]
    batcher = Batcher(reader, processor, "dev")
    by_rank = [
        list(evaluation_batches(batcher, unit, rank=rank, world_size=ranks, batch_size=size)) for rank in range(ranks)
    ]
    assert len({len(batches) for batches in by_rank}) == 1, (
        "under ZeRO-3 a rank with less to do would leave the others waiting"
    )
    rows = [row for batches in by_rank for batch in batches for row in zip(batch.keys, batch.wrapped, strict=True)]
    keys = [key for key, wrapped in rows if not wrapped]
    assert sorted(keys) == [key for key, _, _ in read_samples(reader.directory, index, "demo_pairs", "dev")]
    assert all(batch.keys for batches in by_rank for batch in batches)
    assert max(len(batch.keys) for batches in by_rank for batch in batches) <= size
    assert all("labels" not in batch.tensors for batches in by_rank for batch in batches)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_broken_picture_is_named_with_shard_and_key(tmp_path: Path, processor: Processor, workers: int) -> None:
    index = write_toy(tmp_path)
    (shard,) = index.dataset("toy").splits["train"]
    path = tmp_path / shard.name
    data = path.read_bytes()
    path.write_bytes(data.replace(picture(colour=4)[:60], picture(colour=4)[:40] + bytes(20)))
    assert path.read_bytes() != data
    reader, units = ShardReader(tmp_path, index), find_units(index, "train")
    batches = training_batches(
        Batcher(reader, processor, "train"),
        units,
        plan_of(reader, units, block=1),
        rank=0,
        world_size=1,
        micro_batch=1,
        workers=workers,
    )
    with pytest.raises(UserError, match=rf"^{shard.name}, 000004_toy: its picture cannot be decoded") as caught:
        list(batches)
    assert "Traceback" not in str(caught.value)
