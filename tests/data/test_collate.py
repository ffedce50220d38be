"""The collate function: prompts, images, regions and targets in their rows, and how invalid samples are handled."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from lvlm_clorae.data.collate import Batch, Collator
from lvlm_clorae.data.dataset import ShardDataset
from lvlm_clorae.data.index import DatasetSpec, Index, load_index
from lvlm_clorae.data.reader import InvalidSample
from lvlm_clorae.data.sampler import SampleRef
from lvlm_clorae.data.writer import ShardWriter
from lvlm_clorae.errors import UserError
from lvlm_clorae.models import Processor
from tests.helpers.shards import break_image, break_json, write_toy

ARGUMENT = "demo_events/argument"


@pytest.fixture(scope="module")
def collator(index: Index, processor: Processor) -> Collator:
    return Collator(processor, index.dataset_tasks("train"))


def test_dataset_tasks_are_datasets_and_sub_tasks(index: Index) -> None:
    dataset_tasks = index.dataset_tasks("train")
    assert sorted(dataset_tasks) == [
        "demo_events/argument",
        "demo_events/trigger",
        "demo_news/entity",
        "demo_pairs/relation",
        "demo_posts/entity",
    ]
    argument = dataset_tasks[ARGUMENT]
    assert (argument.dataset, argument.subtask, argument.task) == ("demo_events", "argument", "mee")
    assert argument.reference_f1 == 85.0
    assert argument.labels == index.dataset("demo_events").labels["argument"]
    assert index.dataset_tasks("test").keys() == dataset_tasks.keys()


def test_a_batch_has_prompts_images_regions_and_targets(
    dataset: ShardDataset, collator: Collator, processor: Processor
) -> None:
    refs = [ref._replace(is_padding=number == 3) for number, ref in enumerate(dataset.refs(ARGUMENT)[:4])]
    batch = collator(dataset.__getitems__(refs))
    assert batch.is_padding == [False, False, False, True]
    assert batch.keys == [dataset[ref].key for ref in refs]
    prompts = processor.decode(batch.tensors["input_ids"])
    answers = processor.decode(batch.tensors["labels"].clamp(min=0))
    slots = (batch.tensors["input_ids"] == processor.region_token_id).sum(-1).tolist()
    areas = (batch.tensors["regions"][..., 2] > batch.tensors["regions"][..., 0]).sum(-1).tolist()
    for row, sample in enumerate(batch.samples):
        assert sample["text"] in prompts[row]
        assert answers[row].startswith(sample["events"][0]["type"])
        assert slots[row] == areas[row] == len(sample["objects"])
        assert bool(batch.tensors["pixel_mask"][row]) == (sample["image"] is not None)
    assert "labels" not in replace(collator, with_labels=False)(dataset.__getitems__(refs)).tensors


def test_the_length_limits_reach_the_processor(dataset: ShardDataset, collator: Collator) -> None:
    limited = replace(collator, max_source_length=16, max_target_length=8)
    tensors = limited([dataset[SampleRef("demo_posts/entity", 0, 0)]]).tensors
    assert (tensors["input_ids"].shape[1], tensors["labels"].shape[1]) == (16, 8)


def test_images_may_be_left_out(dataset: ShardDataset, collator: Collator) -> None:
    """Only what the model sees changes: prompts, targets and scored rows do not."""
    samples = dataset.__getitems__(dataset.refs(ARGUMENT)[:4])
    shown, blank = collator(samples), replace(collator, use_images=False)(samples)
    assert shown.tensors["pixel_mask"].any()
    for name in ("pixel_mask", "pixel_values", "regions"):
        assert not blank.tensors[name].any(), name
    for name in ("input_ids", "labels"):
        assert torch.equal(blank.tensors[name], shown.tensors[name]), name
    assert (blank.samples, blank.counted) == (shown.samples, shown.counted)


def test_a_batch_of_several_dataset_tasks_raises(dataset: ShardDataset, collator: Collator) -> None:
    refs = [SampleRef(name, 0, number) for number, name in enumerate(["demo_posts/entity", ARGUMENT])]
    with pytest.raises(ValueError, match="dataset task"):
        collator(dataset.__getitems__(refs))


# ---- invalid samples


def collate_toy(directory: Path, index: Index, processor: Any, numbers: list[int], policy: str = "error") -> Batch:
    collator = Collator(processor, index.dataset_tasks("train"), on_invalid_sample=policy)
    refs = [SampleRef("toy/entity", 0, number) for number in numbers]
    return collator(ShardDataset(index, directory).__getitems__(refs))


def test_an_invalid_sample_is_an_error_by_default(tmp_path: Path, processor: Processor) -> None:
    index = write_toy(tmp_path)
    name = break_image(tmp_path, index, 4)
    with pytest.raises(InvalidSample, match=rf"^{name}, 000004_toy: its image"):
        collate_toy(tmp_path, index, processor, [3, 4])


@pytest.mark.parametrize("policy", ["skip", "blank"])
def test_policies_keep_the_length_of_the_batch_and_report_what_was_invalid(
    tmp_path: Path, processor: Processor, policy: str
) -> None:
    index = write_toy(tmp_path)
    name = break_image(tmp_path, index, 4)
    break_json(tmp_path, index, 2)
    batch = collate_toy(tmp_path, index, processor, [1, 2, 3, 4], policy)
    rows = {name: len(tensor) for name, tensor in batch.tensors.items()}
    assert rows == {**dict.fromkeys(rows, 4), "pixel_values": max(1, int(batch.tensors["pixel_mask"].sum()))}
    unread, undecoded = batch.invalid
    assert unread.startswith(f"{name}, 000002_toy: ")
    assert undecoded.startswith(f"{name}, 000004_toy: its image")
    skipped = [False, True, False, policy == "skip"]
    assert batch.ignored == skipped
    assert batch.counted == [not row for row in skipped]
    assert [bool((row == -100).all()) for row in batch.tensors["labels"]] == skipped
    assert batch.tensors["pixel_mask"].tolist()[1::2] == [0, 0]
    assert batch.keys == ["000001_toy", "", "000003_toy", "" if policy == "skip" else "000004_toy"]


def test_samples_consumed_before_a_resume_are_ignored(
    dataset: ShardDataset, collator: Collator, processor: Processor
) -> None:
    refs = dataset.refs("demo_news/entity")[:2]
    plain = collator(dataset.__getitems__(refs))
    batch = collator(dataset.__getitems__([refs[0]._replace(is_consumed=True), refs[1]]))
    assert batch.ignored == [True, False]
    assert (batch.tensors["labels"][0] == -100).all()
    assert torch.equal(batch.tensors["labels"][1], plain.tensors["labels"][1])
    assert torch.equal(batch.tensors["input_ids"], plain.tensors["input_ids"])


def test_a_sample_without_the_annotations_of_its_dataset_task_is_invalid(tmp_path: Path, processor: Processor) -> None:
    """A shard is not trusted to have the task that its index says."""
    index = write_toy(tmp_path)
    dataset_task = replace(index.dataset_tasks("train")["toy/entity"], name="toy/relation", subtask="relation")
    samples = ShardDataset(index, tmp_path).__getitems__([SampleRef("toy/relation", 0, 0)])
    with pytest.raises(InvalidSample, match=r"train-000000\.tar, 000000_toy: .*relation"):
        Collator(processor, {"toy/relation": dataset_task})(samples)


def test_a_label_that_the_index_lacks_is_invalid(tmp_path: Path, processor: Processor) -> None:
    """F1 of such a sample would be 0 without a word."""
    index = write_toy(tmp_path)
    dataset_task = replace(index.dataset_tasks("train")["toy/entity"], labels=["other"])
    samples = ShardDataset(index, tmp_path).__getitems__([SampleRef("toy/entity", 0, 0)])
    with pytest.raises(InvalidSample, match=r'000000_toy: its label entity "person"'):
        Collator(processor, {"toy/entity": dataset_task})(samples)


# ---- samples beyond the limits

LONG = "Ann sings in Oslo and later Bo Berg sings in Rome with Cy".split()
ENTITIES = [("person", 0, 1), ("location", 3, 4), ("person", 6, 8), ("location", 10, 11), ("person", 12, 13)]


@pytest.fixture
def long(tmp_path: Path) -> tuple[Path, Index]:
    spec = DatasetSpec("toy", "mner", ("entity",), {"entity": ["person", "location"]}, {})
    entities = [{"type": t, "span": [a, b], "text": " ".join(LONG[a:b])} for t, a, b in ENTITIES]
    sample = {"dataset": "toy", "task": "mner", "text": " ".join(LONG), "tokens": LONG, "image": None, "objects": []}
    with ShardWriter(tmp_path, spec) as writer:
        writer.add("train", "long", {**sample, "entities": entities})
        writer.add("train", "short", {**sample, "text": "Ann", "tokens": ["Ann"], "entities": entities[:1]})
    return tmp_path, load_index(tmp_path)


def collate_long(long: tuple[Path, Index], processor: Any, policy: str = "cut", **limits: int) -> Batch:
    directory, index = long
    collator = Collator(processor, index.dataset_tasks("train"), on_truncation=policy, **limits)
    dataset = ShardDataset(index, directory)
    return collator(dataset.__getitems__(dataset.refs("toy/entity")))


def target_ids(batch: Batch, row: int) -> list[int]:
    labels = batch.tensors["labels"][row]
    return labels[labels != -100].tolist()


def test_a_long_prompt_keeps_question_and_labels_and_loses_gold_with_its_text(
    long: tuple[Path, Index], processor: Processor
) -> None:
    whole = collate_long(long, processor)
    assert whole.truncated == []
    room = processor.prompt_tokens(whole.prompts[0])
    for limit in range(room - 12, room):
        batch = collate_long(long, processor, max_source_length=limit)
        prompt = batch.prompts[0]
        assert prompt.startswith("entities. types: person, location text: ")
        assert processor.prompt_tokens(prompt) <= limit
        assert batch.tensors["attention_mask"][0].sum() == processor.prompt_tokens(prompt)
        words = prompt.partition("text: ")[2].split()
        assert words == LONG[: len(words)]
        left = [f"{t}, {' '.join(LONG[a:b])}" for t, a, b in ENTITIES if b <= len(words)]
        answer = processor.decode(torch.tensor([target_ids(batch, 0)]))[0]
        assert answer == (" <spot> ".join(left) or "none")
        (message,) = batch.truncated
        assert f"only {len(words)} of {len(LONG)} words" in message
        assert batch.prompts[1] == whole.prompts[1]
        assert batch.ignored == [False, False]


def test_a_target_that_is_cut_has_no_end_of_sequence_token(long: tuple[Path, Index], processor: Processor) -> None:
    whole = target_ids(collate_long(long, processor), 0)
    assert whole[-1] == processor.eos_token_id
    for limit in range(len(target_ids(collate_long(long, processor), 1)), len(whole)):
        batch = collate_long(long, processor, max_target_length=limit)
        assert target_ids(batch, 0) == whole[:limit]
        assert target_ids(batch, 1)[-1] == processor.eos_token_id
        (message,) = batch.truncated
        assert "long: " in message
    assert collate_long(long, processor, max_target_length=len(whole)).truncated == []


@pytest.mark.parametrize("limits", [{"max_source_length": 26}, {"max_target_length": 12}])
def test_policies_for_samples_beyond_the_limits(
    long: tuple[Path, Index], processor: Processor, limits: dict[str, int]
) -> None:
    skipped = collate_long(long, processor, "skip", **limits)
    assert skipped.ignored == [True, False]
    assert target_ids(skipped, 0) == []
    assert len(skipped.truncated) == 1
    with pytest.raises(UserError, match=r"long: .*--on_truncation"):
        collate_long(long, processor, "error", **limits)


def test_a_prompt_without_room_for_its_labels_is_invalid(long: tuple[Path, Index], processor: Processor) -> None:
    with pytest.raises(InvalidSample, match="max_source_length"):
        collate_long(long, processor, max_source_length=6)
