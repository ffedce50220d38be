"""The demo data: drawn alike from a seed, sound, small, and in need of its pictures; the committed shards are it."""

from __future__ import annotations

import io
from collections import defaultdict
from itertools import chain, islice
from pathlib import Path
from typing import Any

import pytest
from PIL import Image, ImageChops

from lvlm_clorae.data.demo import pictures, world
from lvlm_clorae.data.demo.build import build_demo
from lvlm_clorae.data.demo.generator import DATASETS, samples
from lvlm_clorae.data.shards import SPLITS, load_index, read_samples
from lvlm_clorae.data.verify import unknown_labels, verify
from lvlm_clorae.errors import UserError
from lvlm_clorae.tasks import SUBTASKS, TASKS, check_sample, format_answer, parse_answer
from lvlm_clorae.tasks.score import written_tuples
from tests.data.helpers import files
from tests.launch import REPOSITORY

COMMITTED = REPOSITORY / "shards/demo"
Drawn = tuple[str, dict[str, Any], bytes | None]


@pytest.fixture(scope="module")
def drawn() -> dict[str, dict[str, list[Drawn]]]:
    """Everything the generator makes for seed 0, by dataset and split."""
    return {name: {split: list(samples(name, split, 0)) for split in spec.sizes} for name, spec in DATASETS.items()}


def pixels(data: bytes) -> Image.Image:
    with Image.open(io.BytesIO(data)) as picture:
        return picture.convert("RGB")


def test_a_seed_gives_the_same_samples_and_another_gives_others() -> None:
    for name in DATASETS:
        first, again, other = (list(islice(samples(name, "train", seed), 5)) for seed in (3, 3, 4))
        assert first == again
        assert first != other
        assert [sample["text"] for _, sample, _ in first] != [
            s["text"] for _, s, _ in islice(samples(name, "dev", 3), 5)
        ]


def test_every_sample_is_sound_with_labels_of_its_dataset(drawn: dict[str, dict[str, list[Drawn]]]) -> None:
    for name, splits in drawn.items():
        for key, sample, picture in chain.from_iterable(splits.values()):
            assert check_sample(sample) == [], key
            assert (sample["dataset"], sample["task"]) == (name, DATASETS[name].task)
            assert unknown_labels(sample, DATASETS[name].labels) == []
            assert (sample["image"] is None) == (picture is None)
            for subtask in TASKS[sample["task"]].subtasks:
                answer = format_answer(sample, subtask)
                assert parse_answer(answer, subtask, DATASETS[name].labels[subtask]) == written_tuples(sample, subtask)


def test_boxes_lie_inside_the_pictures_around_what_is_drawn(drawn: dict[str, dict[str, list[Drawn]]]) -> None:
    count = 0
    for key, sample, picture in chain.from_iterable(drawn["demo_events"].values()):
        if picture is None:
            assert sample["objects"] == []
            continue
        image = pixels(picture)
        assert image.size == (pictures.SIZE, pictures.SIZE)
        ground = image.getpixel((0, 0))
        assert sample["objects"]
        for item in sample["objects"]:
            x1, y1, x2, y2 = item["box"]
            assert 0 <= x1 < x2 <= pictures.SIZE, key
            assert 0 <= y1 < y2 <= pictures.SIZE, key
            plain = Image.new("RGB", (x2 - x1, y2 - y1), ground)
            assert ImageChops.difference(image.crop((x1, y1, x2, y2)), plain).getbbox(), "nothing is drawn there"
            count += 1
    assert count > 200


def test_ambiguous_names_need_the_picture(drawn: dict[str, dict[str, list[Drawn]]]) -> None:
    types, shown = defaultdict(set), 0
    for key, sample, picture in chain(drawn["demo_posts"]["train"], drawn["demo_posts"]["test"]):
        for entity in sample["entities"]:
            if entity["text"] in world.AMBIGUOUS:
                types[entity["text"]].add(entity["type"])
                assert picture is not None, key
                shown += 1
    assert shown >= 100
    assert sum(len(kinds) >= 2 for kinds in types.values()) >= 20
    assert any(len(kinds) == 4 for kinds in types.values())


def test_relations_of_two_people_and_some_events_need_the_picture(drawn: dict[str, dict[str, list[Drawn]]]) -> None:
    people = set()
    for _, sample, _ in drawn["demo_pairs"]["train"]:
        if sample["text"].startswith(("great evening for", "here are")):
            people.add(sample["relation"]["label"])
    assert people == {"none", *world.PAIR_ICON.values()}
    events = [sample["events"][0] for _, sample, _ in drawn["demo_events"]["train"]]
    assert {event["type"] for event in events if event["trigger"] is None} == set(world.EVENT_TYPES)
    assert sum("object" in argument for event in events for argument in event["arguments"]) > 50


def test_every_label_occurs_in_training_and_test(drawn: dict[str, dict[str, list[Drawn]]]) -> None:
    for split in ("train", "test"):
        for name, spec in DATASETS.items():
            used = defaultdict(set)
            for _, sample, _ in drawn[name][split]:
                for subtask in TASKS[spec.task].subtasks:
                    for item in written_tuples(sample, subtask):
                        used[subtask].add(item[1] if subtask in ("relation", "argument") else item[0])
            for subtask, labels in spec.labels.items():
                assert used[subtask] == set(labels["roles"] if subtask == "argument" else labels)


# ---- the committed shards


def test_the_committed_shards_are_those_of_seed_0(drawn: dict[str, dict[str, list[Drawn]]]) -> None:
    index = load_index(COMMITTED)
    assert set(index.datasets) == set(DATASETS)
    for name, spec in DATASETS.items():
        entry = index.datasets[name]
        assert (entry.task, entry.labels, entry.reference_f1) == (spec.task, spec.labels, spec.reference_f1)
        assert {split: entry.samples(split) for split in SPLITS} == spec.sizes
        for split in SPLITS:
            written = list(read_samples(COMMITTED, index, name, split))
            for (key, sample, picture), (own_key, own, own_picture) in zip(written, drawn[name][split], strict=True):
                assert (key, sample) == (own_key, own)
                assert (picture is None) == (own_picture is None)
                # Another zlib may compress to other bytes, so what is compared is what is seen.
                if picture and own_picture:
                    assert pixels(picture).tobytes() == pixels(own_picture).tobytes(), key


def test_the_committed_shards_are_sound_small_and_of_all_tasks() -> None:
    assert [str(problem) for problem in verify(COMMITTED).problems] == []
    assert sum(path.stat().st_size for path in COMMITTED.iterdir()) <= 3_000_000
    index = load_index(COMMITTED)
    sizes = [entry.samples("train") for entry in index.datasets.values()]
    assert len(sizes) >= 4
    assert len(set(sizes)) == len(sizes)
    assert {entry.task for entry in index.datasets.values()} == set(TASKS)
    for split in SPLITS:
        assert {unit.split("/")[1] for unit in index.units(split)} == set(SUBTASKS)


def test_building_again_gives_the_same_bytes(tmp_path: Path) -> None:
    build_demo(tmp_path / "one", seed=5)
    build_demo(tmp_path / "two", seed=5)
    assert files(tmp_path / "one") == files(tmp_path / "two")
    with pytest.raises(UserError, match="demo_posts"):
        build_demo(tmp_path / "one", seed=5)
