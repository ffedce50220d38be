"""Demo datasets: deterministic, valid, small and dependent on their images; equal to the committed shards."""

from __future__ import annotations

import io
from collections import defaultdict
from itertools import chain, islice
from pathlib import Path
from typing import Any

import pytest
from PIL import Image, ImageChops

from lvlm_clorae.data.index import SPLITS, load_index
from lvlm_clorae.data.reader import read_samples
from lvlm_clorae.data.validation import unknown_labels, verify
from lvlm_clorae.errors import UserError
from lvlm_clorae.tasks import TASKS, check_sample, format_answer, parse_answer
from lvlm_clorae.tasks.score import written_tuples
from tests.helpers.launch import REPOSITORY
from tests.helpers.shards import files
from tools.demo_data import images, world
from tools.demo_data.generator import DATASETS, build_demo, samples

COMMITTED = REPOSITORY / "shards/demo"
Generated = tuple[str, dict[str, Any], bytes | None]
Datasets = dict[str, dict[str, list[Generated]]]


@pytest.fixture(scope="module")
def generated() -> Datasets:
    """All samples of seed 0, by dataset and split."""
    return {name: {split: list(samples(name, split, 0)) for split in spec.sizes} for name, spec in DATASETS.items()}


def pixels(data: bytes) -> Image.Image:
    with Image.open(io.BytesIO(data)) as image:
        return image.convert("RGB")


def test_samples_depend_only_on_the_seed() -> None:
    for name in DATASETS:
        first, again, other = (list(islice(samples(name, "train", seed), 5)) for seed in (3, 3, 4))
        assert first == again
        assert first != other
        assert [sample["text"] for _, sample, _ in first] != [
            s["text"] for _, s, _ in islice(samples(name, "dev", 3), 5)
        ]


def test_samples_are_valid_with_labels_of_their_dataset(generated: Datasets) -> None:
    for name, splits in generated.items():
        for key, sample, image in chain.from_iterable(splits.values()):
            assert check_sample(sample) == [], key
            assert (sample["dataset"], sample["task"]) == (name, DATASETS[name].task)
            assert unknown_labels(sample, DATASETS[name].labels) == []
            assert (sample["image"] is None) == (image is None)
            for subtask in TASKS[sample["task"]]:
                answer = format_answer(sample, subtask)
                assert parse_answer(answer, subtask, DATASETS[name].labels[subtask]) == written_tuples(sample, subtask)


def test_boxes_enclose_icons_inside_the_image(generated: Datasets) -> None:
    count = 0
    for key, sample, image in chain.from_iterable(generated["demo_events"].values()):
        if image is None:
            assert sample["objects"] == []
            continue
        shown = pixels(image)
        assert shown.size == (images.SIZE, images.SIZE)
        ground = shown.getpixel((0, 0))
        assert sample["objects"]
        for item in sample["objects"]:
            x1, y1, x2, y2 = item["box"]
            assert 0 <= x1 < x2 <= images.SIZE, key
            assert 0 <= y1 < y2 <= images.SIZE, key
            plain = Image.new("RGB", (x2 - x1, y2 - y1), ground)
            assert ImageChops.difference(shown.crop((x1, y1, x2, y2)), plain).getbbox(), "the box is empty"
            count += 1
    assert count > 200


def test_ambiguous_names_depend_on_the_image(generated: Datasets) -> None:
    types, shown = defaultdict(set), 0
    for key, sample, image in chain(generated["demo_posts"]["train"], generated["demo_posts"]["test"]):
        for entity in sample["entities"]:
            if entity["text"] in world.AMBIGUOUS:
                types[entity["text"]].add(entity["type"])
                assert image is not None, key
                shown += 1
    assert shown >= 100
    assert sum(len(found) >= 2 for found in types.values()) >= 20
    assert any(len(found) == 4 for found in types.values())


def test_relations_of_people_and_some_events_depend_on_the_image(
    generated: Datasets,
) -> None:
    people = set()
    for _, sample, _ in generated["demo_pairs"]["train"]:
        if sample["text"].startswith(("great evening for", "here are")):
            people.add(sample["relation"]["label"])
    assert people == {"none", *world.PAIR_ICON.values()}
    events = [sample["events"][0] for _, sample, _ in generated["demo_events"]["train"]]
    assert {event["type"] for event in events if event["trigger"] is None} == set(world.EVENT_TYPES)
    assert sum("object" in argument for event in events for argument in event["arguments"]) > 50


def test_every_label_occurs_in_training_and_test(generated: Datasets) -> None:
    for split in ("train", "test"):
        for name, spec in DATASETS.items():
            used = defaultdict(set)
            for _, sample, _ in generated[name][split]:
                for subtask in TASKS[spec.task]:
                    for item in written_tuples(sample, subtask):
                        used[subtask].add(item[1] if subtask in ("relation", "argument") else item[0])
            for subtask, labels in spec.labels.items():
                assert used[subtask] == set(labels["roles"] if subtask == "argument" else labels)


# ---- the committed shards


def test_committed_shards_equal_seed_0(generated: Datasets) -> None:
    index = load_index(COMMITTED)
    assert set(index.datasets) == set(DATASETS)
    for name, spec in DATASETS.items():
        entry = index.datasets[name]
        assert (entry.task, entry.labels, entry.reference_f1) == (spec.task, spec.labels, spec.reference_f1)
        assert {split: entry.samples(split) for split in SPLITS} == spec.sizes
        for split in SPLITS:
            written = list(read_samples(COMMITTED, index, name, split))
            for (key, sample, image), (own_key, own, own_image) in zip(written, generated[name][split], strict=True):
                assert (key, sample) == (own_key, own)
                assert (image is None) == (own_image is None)
                # Another zlib can compress to other bytes, so pixels are compared.
                if image and own_image:
                    assert pixels(image).tobytes() == pixels(own_image).tobytes(), key


def test_committed_shards_are_valid_small_and_of_all_tasks() -> None:
    assert [str(problem) for problem in verify(COMMITTED).problems] == []
    assert sum(path.stat().st_size for path in COMMITTED.iterdir()) <= 3_000_000
    index = load_index(COMMITTED)
    sizes = [entry.samples("train") for entry in index.datasets.values()]
    assert len(sizes) >= 4
    assert len(set(sizes)) == len(sizes)
    assert {entry.task for entry in index.datasets.values()} == set(TASKS)
    for split in SPLITS:
        assert {dataset_task.split("/")[1] for dataset_task in index.dataset_tasks(split)} == {
            subtask for subtasks in TASKS.values() for subtask in subtasks
        }


@pytest.mark.integration
def test_build_is_deterministic(tmp_path: Path) -> None:
    build_demo(tmp_path / "one", seed=5)
    build_demo(tmp_path / "two", seed=5)
    assert files(tmp_path / "one") == files(tmp_path / "two")
    with pytest.raises(UserError, match="demo_posts"):
        build_demo(tmp_path / "one", seed=5)
