"""T5Processor: task markers, padding, truncation, images and boxes."""

from __future__ import annotations

from pathlib import Path

import open_clip
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from lvlm_clorae.models import Processor
from lvlm_clorae.models.families.t5 import MARKERS, T5Processor
from lvlm_clorae.models.processor import ImageTransform
from lvlm_clorae.tasks import EVENT, REGION, SPOT
from tests.helpers.task_samples import ANSWERS
from tests.helpers.tiny import DEMO, noise_image, tiny_processor

SIZE = 32


@pytest.fixture(scope="module")
def processor() -> Processor:
    return tiny_processor()


def round_trip(processor: Processor, text: str) -> str:
    (found,) = processor.decode(processor([text], max_source_length=512)["input_ids"])
    return found


@pytest.mark.parametrize("answer", [*ANSWERS.values(), "none", "Müller 's <spot> /per/per/couple <spot> Zoë , Ltd ."])
def test_decode_inverts_encode(processor: Processor, answer: str) -> None:
    assert round_trip(processor, answer) == answer


def test_markers_are_single_tokens(processor: Processor) -> None:
    for marker, sentinel in MARKERS.items():
        number = processor.tokenizer.convert_tokens_to_ids(sentinel)
        assert processor(["a " + marker])["input_ids"][0].tolist().count(number) == 1
    assert processor.region_token_id == processor.tokenizer.convert_tokens_to_ids("<extra_id_99>")


words = st.text(st.characters(codec="utf-8", exclude_categories=("C", "Z")), min_size=1, max_size=6)


@given(st.lists(words | st.sampled_from([SPOT, EVENT, ",", ".", "'s", "n't", "O1"]), min_size=1, max_size=8))
def test_decode_inverts_encode_for_any_words(processor: Processor, found: list[str]) -> None:
    text = " ".join(found)
    assert round_trip(processor, text) == text


@pytest.mark.parametrize("token", ["</s>", "<pad>", "<unk>", "<extra_id_0>", "<extra_id_99>"])
def test_special_tokens_in_text_are_escaped(processor: Processor, token: str) -> None:
    """A tweet may contain the end of sequence or a region marker."""
    ids = processor([f"some {token} text"])["input_ids"][0].tolist()
    plain = [number for number in ids if number != processor.tokenizer.pad_token_id]
    special = set(processor.tokenizer.get_added_vocab().values())
    assert [number for number in plain if number in special] == [processor.tokenizer.eos_token_id]
    assert round_trip(processor, f"some {token} text").endswith("text")


def test_rows_are_padded_to_multiples_of_eight(processor: Processor) -> None:
    batch = processor(
        ["a", "text of the longer row , which needs more tokens"], answers=["none", "person, Mara Novotny"]
    )
    for name, padding in (("input_ids", processor.pad_token_id), ("labels", -100)):
        rows = batch[name]
        assert rows.shape[1] % 8 == 0
        ends = (rows == processor.tokenizer.eos_token_id).int().argmax(1)
        for row, end in zip(rows, ends.tolist(), strict=True):
            assert (row[end + 1 :] == padding).all()
            assert (row[: end + 1] != padding).all()
    lengths = batch["attention_mask"].sum(1)
    assert torch.equal(lengths, (batch["input_ids"] == processor.tokenizer.eos_token_id).int().argmax(1) + 1)
    assert "labels" not in processor(["a"])


def test_long_rows_are_truncated_on_the_right(processor: Processor) -> None:
    batch = processor(["word " * 100], answers=["name " * 100], max_source_length=24, max_target_length=16)
    assert batch["input_ids"].shape == batch["attention_mask"].shape == (1, 24)
    assert batch["labels"].shape == (1, 16)
    assert batch["input_ids"][0, -1] == processor.tokenizer.eos_token_id
    assert processor.tokenizer.eos_token_id not in batch["labels"], "the model would learn to stop there"


@pytest.mark.parametrize("length", [1, 7, 13])
def test_rows_are_truncated_to_any_length(processor: Processor, length: int) -> None:
    batch = processor(
        ["word " * 100, "a"], answers=["name " * 100, "b"], max_source_length=length, max_target_length=length
    )
    assert batch["attention_mask"].sum(1).max() == (batch["labels"] != -100).sum(1).max() == length
    assert batch["input_ids"].shape[1] % 8 == 0


def test_boxes_are_fractions_of_their_rows_image(processor: Processor) -> None:
    images = [noise_image(size=(40, 30)), None, noise_image(size=(10, 100))]
    boxes = [[[0, 0, 20, 15], [10, 3, 40, 30]], [[1, 2, 3, 4]], [[-1, 50, 11, 100]]]
    batch = processor(["<region> <region>", "<region>", "<region>"], images, boxes)
    expected = torch.zeros(3, 2, 4)
    expected[0] = torch.tensor([[0, 0, 0.5, 0.5], [0.25, 0.1, 1, 1]])
    expected[2, 0] = torch.tensor([0, 0.5, 1, 1])  # what reaches out of the image is cut off
    torch.testing.assert_close(batch["regions"], expected)
    assert batch["pixel_mask"].tolist() == [1, 0, 1]


def test_batch_without_boxes_has_one_empty_region_per_row(processor: Processor) -> None:
    for batch in (processor(["a", "b"]), processor(["a", "b"], [None, noise_image()], [[], []])):
        assert torch.equal(batch["regions"], torch.zeros(2, 1, 4))
    assert processor(["a"])["pixel_mask"].tolist() == [0]


def test_images_are_squashed_and_normalized(processor: Processor) -> None:
    wide = Image.new("RGB", (64, 16))
    wide.paste((255, 255, 255), (32, 0, 64, 16))  # the right half, to its very edge
    pixels = processor(["a", "b"], [wide, None])["pixel_values"]
    assert pixels.shape == (1, 3, SIZE, SIZE), "only the images that there are"
    mean, std = (torch.tensor(v) for v in (open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD))
    for column in (0, 5, 10):
        torch.testing.assert_close(pixels[0, :, 7, column], -mean / std, rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(pixels[0, :, 7, SIZE - 1 - column], (1 - mean) / std, rtol=1e-3, atol=1e-3)
    assert torch.equal(processor(["a", "b"])["pixel_values"], torch.zeros(1, 3, SIZE, SIZE))


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "1", "LA", "CMYK"])
def test_images_of_every_mode(processor: Processor, mode: str) -> None:
    grey = Image.new("L", (20, 10), 255)
    other = processor(["a"], [grey.convert(mode)])["pixel_values"]
    torch.testing.assert_close(other, processor(["a"], [grey.convert("RGB")])["pixel_values"])


def test_save_and_load(processor: Processor, tmp_path: Path) -> None:
    transform = ImageTransform(48, mean=(0.5, 0.4, 0.3), std=(0.2, 0.2, 0.1), interpolation="bilinear")
    other = T5Processor(processor.tokenizer, transform)
    other.save_pretrained(tmp_path)
    again = Processor.from_pretrained(tmp_path)
    inputs = (["objects: O1 <region> text: Mara"], [noise_image()], [[[1, 2, 3, 4]]], ["attack <spot> target, O1"])
    first, second = other(*inputs), again(*inputs)
    assert first.keys() == second.keys()
    assert all(torch.equal(tensor, second[name]) for name, tensor in first.items())
    assert first["pixel_values"].shape[-1] == 48


def test_demo_config_and_processor_agree() -> None:
    from lvlm_clorae.models.families.t5 import VisionT5Config

    config, processor = VisionT5Config.from_pretrained(DEMO), Processor.from_pretrained(DEMO)
    assert processor.region_token_id == config.region_token_id
    assert processor.tokenizer.pad_token_id == config.pad_token_id
    assert processor.tokenizer.eos_token_id == config.eos_token_id
    assert len(processor.tokenizer) <= config.vocab_size
    assert REGION not in processor.tokenizer.get_vocab()


def test_batch_of_images_equals_open_clips_transform_of_each(processor: Processor) -> None:
    transform = open_clip.image_transform(
        SIZE,
        is_train=False,
        mean=processor.image_transform.mean,
        std=processor.image_transform.std,
        resize_mode="squash",
    )
    generator = torch.Generator().manual_seed(0)
    images: list[Image.Image | None] = [None]
    for mode, size in (("RGB", (70, 40)), ("L", (20, 90)), ("P", (64, 64)), ("RGBA", (33, 31))):
        noise = torch.randint(0, 256, (size[1], size[0], 3), generator=generator, dtype=torch.uint8)
        images.append(Image.fromarray(noise.numpy()).convert(mode))
    batch = processor(["a"] * len(images), images)
    assert batch["pixel_mask"].tolist() == [0, 1, 1, 1, 1]
    assert len(batch["pixel_values"]) == 4
    for pixels, image in zip(batch["pixel_values"], images[1:], strict=True):
        assert image is not None
        assert torch.equal(pixels, transform(image.convert("RGB")))
