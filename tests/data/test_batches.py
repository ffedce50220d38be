"""Batches of one unit: prompts, pictures, regions and answers in their rows, and what becomes of bad samples."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from lvlm_clorae.data.batches import Batcher, Instance
from lvlm_clorae.data.plan import Place
from lvlm_clorae.data.reader import BadSample
from lvlm_clorae.data.shard_reader import ShardReader
from lvlm_clorae.data.shards import Index
from lvlm_clorae.data.units import find_units
from lvlm_clorae.models import Processor
from tests.data.helpers import at, everywhere, picture, write_toy


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
    batch = Batcher(reader, processor, "train")(at(unit, places))
    assert batch.wrapped == [False, False, False, True]
    assert batch.keys == [reader.read(unit.dataset, "train", place).key for place in places]
    prompts = processor.decode(batch.tensors["input_ids"])
    answers = processor.decode(batch.tensors["labels"].clamp(min=0))
    slots = (batch.tensors["input_ids"] == processor.region_token_id).sum(-1).tolist()
    areas = (batch.tensors["regions"][..., 2] > batch.tensors["regions"][..., 0]).sum(-1).tolist()
    for row, sample in enumerate(batch.samples):
        assert sample["text"] in prompts[row]
        assert answers[row].startswith(sample["events"][0]["type"])
        assert slots[row] == areas[row] == len(sample["objects"])
        assert bool(batch.tensors["pixel_mask"][row]) == (sample["image"] is not None)
    assert "labels" not in Batcher(reader, processor, "train")(at(unit, places), answers=False).tensors


def test_the_length_limits_reach_the_processor(index: Index, reader: ShardReader, processor: Processor) -> None:
    unit = find_units(index, "train")["demo_posts/entity"]
    tensors = Batcher(reader, processor, "train", max_length=16, max_answer_length=8)(at(unit, [Place(0, 0)])).tensors
    assert (tensors["input_ids"].shape[1], tensors["labels"].shape[1]) == (16, 8)


def test_pictures_may_be_left_out(index: Index, reader: ShardReader, processor: Processor) -> None:
    """Only what the model sees changes: question, answer and what is counted do not."""
    unit = find_units(index, "train")["demo_events/argument"]
    places = everywhere(index.dataset(unit.dataset), "train")[:4]
    shown = Batcher(reader, processor, "train")(at(unit, places))
    blank = Batcher(reader, processor, "train", pictures=False)(at(unit, places))
    assert shown.tensors["pixel_mask"].any()
    for name in ("pixel_mask", "pixel_values", "regions"):
        assert not blank.tensors[name].any(), name
    for name in ("input_ids", "labels"):
        assert torch.equal(blank.tensors[name], shown.tensors[name]), name
    assert (blank.samples, blank.counted) == (shown.samples, shown.counted)


def test_a_batch_may_hold_rows_of_several_units(index: Index, reader: ShardReader, processor: Processor) -> None:
    """Each row is asked, answered and shown as in a batch of its own unit."""
    units = find_units(index, "train")
    names = ["demo_events/trigger", "demo_events/argument", "demo_posts/entity", "demo_events/trigger"]
    instances = [Instance(units[name], Place(0, number)) for number, name in enumerate(names)]
    batcher = Batcher(reader, processor, "train")
    mixed = batcher(instances)
    assert [unit.name for unit in mixed.units] == names
    with pytest.raises(ValueError, match="several units"):
        _ = mixed.unit
    questions, answers = processor.decode(mixed.tensors["input_ids"]), mixed.tensors["labels"].clamp(min=0)
    for row, instance in enumerate(instances):
        alone = batcher([instance])
        assert (mixed.keys[row], mixed.samples[row], mixed.prompts[row]) == (
            alone.keys[0],
            alone.samples[0],
            alone.prompts[0],
        )
        assert questions[row] == processor.decode(alone.tensors["input_ids"])[0]
        assert processor.decode(answers)[row] == processor.decode(alone.tensors["labels"].clamp(min=0))[0]
        assert mixed.tensors["pixel_mask"][row] == alone.tensors["pixel_mask"][0]
        assert alone.unit == instance.unit


# ---- bad samples


def break_picture(directory: Path, index: Index, number: int = 4) -> str:
    """Damage the picture of one sample of the toy dataset; returns its shard's name."""
    (shard,) = index.dataset("toy").splits["train"]
    path = directory / shard.name
    data = path.read_bytes()
    path.write_bytes(data.replace(picture(colour=number)[:60], picture(colour=number)[:40] + bytes(20)))
    assert path.read_bytes() != data
    return shard.name


def break_record(directory: Path, index: Index, number: int) -> None:
    """Make the JSON of one sample unsound."""
    (shard,) = index.dataset("toy").splits["train"]
    data = bytearray((directory / shard.name).read_bytes())
    at = data.index(b"{", shard.offsets[number])
    data[at] = ord("[")
    (directory / shard.name).write_bytes(data)


def test_a_bad_sample_is_an_error_by_default(tmp_path: Path, processor: Processor) -> None:
    index = write_toy(tmp_path)
    name = break_picture(tmp_path, index)
    unit = find_units(index, "train")["toy/entity"]
    with pytest.raises(BadSample, match=rf"^{name}, 000004_toy: its picture cannot be decoded"):
        Batcher(ShardReader(index, tmp_path), processor, "train")(at(unit, [Place(0, 3), Place(0, 4)]))


@pytest.mark.parametrize("policy", ["skip", "blank"])
def test_policies_keep_the_batch_as_long_and_say_what_was_bad(
    tmp_path: Path, processor: Processor, policy: str
) -> None:
    index = write_toy(tmp_path)
    name = break_picture(tmp_path, index)
    break_record(tmp_path, index, 2)
    unit = find_units(index, "train")["toy/entity"]
    places = [Place(0, number) for number in (1, 2, 3, 4)]
    batch = Batcher(ShardReader(index, tmp_path), processor, "train", on_bad_sample=policy)(at(unit, places))
    rows = {name: len(tensor) for name, tensor in batch.tensors.items()}
    assert rows == {**dict.fromkeys(rows, 4), "pixel_values": max(1, int(batch.tensors["pixel_mask"].sum()))}
    unread, undecoded = batch.bad
    assert unread.startswith(f"{name}, 000002_toy: not valid JSON")
    assert undecoded.startswith(f"{name}, 000004_toy: its picture cannot be decoded")
    skipped = [False, True, False, policy == "skip"]
    assert batch.ignored == skipped
    assert batch.counted == [not row for row in skipped]
    assert [bool((row == -100).all()) for row in batch.tensors["labels"]] == skipped
    assert batch.tensors["pixel_mask"].tolist()[1::2] == [0, 0]
    assert batch.keys == ["000001_toy", "", "000003_toy", "" if policy == "skip" else "000004_toy"]


def test_what_was_done_before_a_resume_is_ignored(tmp_path: Path, processor: Processor) -> None:
    index = write_toy(tmp_path)
    unit = find_units(index, "train")["toy/entity"]
    batcher = Batcher(ShardReader(index, tmp_path), processor, "train")
    batch = batcher(at(unit, [Place(0, 0, done=True), Place(0, 1)]))
    plain = batcher(at(unit, [Place(0, 0), Place(0, 1)]))
    assert batch.ignored == [True, False]
    assert (batch.tensors["labels"][0] == -100).all()
    assert torch.equal(batch.tensors["labels"][1], plain.tensors["labels"][1])
    assert torch.equal(batch.tensors["input_ids"], plain.tensors["input_ids"])


def test_a_sample_without_what_its_unit_asks_for_is_bad(tmp_path: Path, processor: Processor) -> None:
    """A shard is not trusted to hold the task that its index says."""
    index = write_toy(tmp_path)
    unit = replace(find_units(index, "train")["toy/entity"], name="toy/relation", subtask="relation")
    with pytest.raises(BadSample, match=r"train-000000\.tar, 000000_toy: has no relation, which toy/relation asks for"):
        Batcher(ShardReader(index, tmp_path), processor, "train")(at(unit, [Place(0, 0)]))
