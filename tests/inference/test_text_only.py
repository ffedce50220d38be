"""A run, its adapter and its evaluation on a text-only base: boxes are numbers, and images are said not to be read."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from lvlm_clorae.analysis.evaluate import evaluate_run, find_samples
from lvlm_clorae.data.collate import Collator
from lvlm_clorae.data.dataset import ShardDataset
from lvlm_clorae.data.index import load_index
from lvlm_clorae.errors import UserError
from lvlm_clorae.inference.extractor import Extractor
from lvlm_clorae.inference.records import Request
from lvlm_clorae.models import load_model
from tests.helpers.adapter_directory import write_schema
from tests.helpers.launch import REPOSITORY
from tests.helpers.shards import pil_image
from tests.helpers.tiny_causal import save_language

DEMO = REPOSITORY / "shards/demo"
IMAGE = pil_image("JPEG")


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole text-only model with the schema of the demo's tasks."""
    base, directory = tmp_path_factory.mktemp("base"), tmp_path_factory.mktemp("adapter")
    save_language(base)
    model, processor = load_model(str(base), vision="none")
    model.save_pretrained(directory)
    processor.save_pretrained(directory)
    write_schema(directory, "HuggingFaceTB/SmolLM2-135M-Instruct", adapter="full")
    return directory


@pytest.fixture(scope="module")
def loaded(adapter: Path) -> Extractor:
    return Extractor.from_pretrained(adapter, device="cpu")


def asked(loaded: Extractor, monkeypatch: pytest.MonkeyPatch, *requests: Request) -> list[str]:
    """Return the prompts that the processor gets for requests."""
    found: list[str] = []
    call = type(loaded.processor).encode

    def record(self: Any, prompts: list[str], *args: Any, **kwargs: Any) -> Any:
        found.extend(prompts)
        return call(self, prompts, *args, **kwargs)

    monkeypatch.setattr(type(loaded.processor), "encode", record)
    loaded.extract_all(list(requests))
    return found


def test_boxes_are_numbers_and_unreadable_images_do_not_matter(
    loaded: Extractor, monkeypatch: pytest.MonkeyPatch
) -> None:
    request = Request("guards struck", b"no image", "mee", boxes=[[1.2, 2, 10.6, 8]])
    prompts = asked(loaded, monkeypatch, request)
    assert len(prompts) == 2
    assert all("objects: O1 [1, 2, 11, 8] text: guards struck" in prompt for prompt in prompts)


def test_images_that_are_not_read_are_counted_once(adapter: Path, caplog: pytest.LogCaptureFixture) -> None:
    extractor = Extractor.from_pretrained(adapter, device="cpu")
    with caplog.at_level(logging.WARNING):
        extractor.extract_all([Request("Mara"), Request("Mara", IMAGE), Request("Tamsk", IMAGE)])
        extractor.extract_all([Request("Mara", IMAGE)])
    assert [record.getMessage() for record in caplog.records if "text only" in record.getMessage()] == [
        "text only: the images of 2 of 3 requests are not read"
    ]


def test_batches_have_the_boxes_of_training_samples_as_numbers(loaded: Extractor) -> None:
    dataset = ShardDataset(load_index(DEMO), DEMO)
    collator = Collator(loaded.processor, dataset.index.dataset_tasks("train"))
    refs = dataset.refs("demo_events/argument")[:4]
    batch = collator(dataset.__getitems__(refs))
    assert set(batch.tensors) == {"input_ids", "attention_mask", "labels"}
    for sample, prompt in zip(batch.samples, batch.prompts, strict=True):
        assert all(f"{item['id']} {list(map(round, item['box']))}" in prompt for item in sample["objects"])
        assert "<region>" not in prompt


def test_a_damaged_image_is_no_invalid_sample(loaded: Extractor) -> None:
    dataset = ShardDataset(load_index(DEMO), DEMO)
    collator = Collator(loaded.processor, dataset.index.dataset_tasks("train"))
    samples = dataset.__getitems__(dataset.refs("demo_posts/entity")[:2])
    assert collator([replace(sample, image=b"damaged") for sample in samples]).invalid == []


@pytest.mark.usefixtures("process_group")
def test_evaluation_counts_the_images_and_refuses_blank_images(adapter: Path, caplog: pytest.LogCaptureFixture) -> None:
    samples = find_samples(adapter, "test", str(DEMO), ["demo_posts"])
    samples.dataset.limit = 2
    with caplog.at_level(logging.WARNING):
        evaluate_run(adapter, samples)
    total = sum(entry.samples("test") for entry in samples.dataset.index.datasets.values())
    assert any(f"of {total} samples are not read" in record.getMessage() for record in caplog.records)
    with pytest.raises(UserError, match="text only"):
        evaluate_run(adapter, samples, blank_images=True)
