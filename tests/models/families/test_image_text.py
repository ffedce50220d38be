"""Other image-text-to-text models of transformers: their own processor, C-LoRAE in the language model."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional

from lvlm_clorae.errors import UserError
from lvlm_clorae.models import Processor, load_model
from lvlm_clorae.models.families.image_text import ImageTextProcessor, with_boxes
from lvlm_clorae.models.generation import generate_answers
from lvlm_clorae.tasks import REGION
from lvlm_clorae.training.adapters import add_adapter
from lvlm_clorae.training.config import TrainConfig
from tests.helpers.tiny import noise_image
from tests.helpers.tiny_image_text import save_onevision, save_qwen

PROMPTS = ["entities. text: Mara", "event arguments. objects: O1 <region> text: guards struck the harbour"]
ANSWERS = ["person, Mara", "none"]
Loaded = tuple[Any, ImageTextProcessor]


@pytest.fixture(scope="module", params=[save_qwen, save_onevision], ids=["qwen2.5-vl", "llava-onevision"])
def loaded(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Loaded:
    directory = tmp_path_factory.mktemp("image_text")
    save: Callable[[Path], Any] = request.param
    save(directory)
    model, processor = load_model(str(directory))
    assert isinstance(processor, ImageTextProcessor)
    return model, processor


def test_loss_is_the_mean_over_answer_tokens(loaded: Loaded) -> None:
    model, processor = loaded
    batch = processor(PROMPTS, [None, noise_image()], [[], [[0, 0, 20, 15]]], ANSWERS)
    labels = batch["labels"]
    for row, answer in zip(labels, ANSWERS, strict=True):
        assert processor.decode(row[row != -100][None]) == [answer]
        assert row[row != -100][-1] == processor.tokenizer.eos_token_id
    with torch.no_grad():
        output = model(**batch)
        given = model(**batch, num_items_in_batch=torch.tensor(7.0))
    real = labels[:, 1:] != -100
    expected = functional.cross_entropy(output.logits[:, :-1][real], labels[:, 1:][real])
    torch.testing.assert_close(output.loss, expected)
    torch.testing.assert_close(given.loss, expected * real.sum() / 7)


def test_training_row_continues_the_generation_row(loaded: Loaded) -> None:
    _, processor = loaded
    images, boxes = [noise_image(1), noise_image()], [[], [[0, 0, 20, 15]]]
    asked, trained = processor(PROMPTS, images, boxes), processor(PROMPTS, images, boxes, ANSWERS)
    width = asked["input_ids"].shape[1]
    assert torch.equal(trained["input_ids"][:, :width], asked["input_ids"])
    assert torch.equal(trained["attention_mask"][:, :width], asked["attention_mask"])
    assert torch.equal(trained["pixel_values"], asked["pixel_values"])
    assert (asked["attention_mask"][:, -1] == 1).all(), "prompts are padded on the left"


def test_rows_are_independent(loaded: Loaded) -> None:
    model, processor = loaded
    images, boxes = [None, noise_image()], [[], [[0, 0, 20, 15]]]
    both = processor(PROMPTS, images, boxes)
    with torch.no_grad():
        together = model(**both).logits[:, -1]
        for number in range(2):
            alone = processor(PROMPTS[number : number + 1], images[number : number + 1], boxes[number : number + 1])
            torch.testing.assert_close(model(**alone).logits[0, -1], together[number], rtol=1e-4, atol=1e-4)
    answers = generate_answers(model, processor, both, 8)
    one = [
        generate_answers(model, processor, processor(PROMPTS[n : n + 1], images[n : n + 1], boxes[n : n + 1]), 8)
        for n in (0, 1)
    ]
    assert [[answer] for answer in answers] == one


def test_batch_without_images_runs_the_tower_without_effect(loaded: Loaded) -> None:
    """Under ZeRO-3 every rank has to run the same modules for any batch."""
    model, processor = loaded
    batch = processor(PROMPTS[:1])
    plain = processor._encode([processor._conversation(PROMPTS[0], None)], [None])
    assert "pixel_values" in batch
    assert "pixel_values" not in plain
    with torch.no_grad():
        found, expected = model(**batch).logits[:, -1], model(**plain).logits[:, -1]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert expected.std() > 0.1


def test_c_lorae_adapts_the_language_model_alone_and_learns(loaded: Loaded) -> None:
    model = add_adapter(
        copy.deepcopy(loaded[0]).train(), TrainConfig(lora_rank=4, lora_dropout=0.0), ["mner", "mre", "mee"]
    )
    layers = model.base_model.adapted_layers()
    assert len(layers) == 4  # query and value of two layers
    assert all(name.startswith("model.language_model.") for name in layers)
    assert all("clorae_experts" in name for name, p in model.named_parameters() if p.requires_grad)
    batch = loaded[1](PROMPTS, [None, noise_image()], [[], [[0, 0, 20, 15]]], ANSWERS)
    model.set_task("mre")
    before = model(**batch).loss
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(8):
        optimizer.zero_grad()
        (model(**batch).loss + 0.01 * model.mutual_information_loss()).backward()
        optimizer.step()
    assert model(**batch).loss < before - 0.5
    masks = {id(layer.masks): layer.masks for layer in layers.values()}
    (seen,) = masks.values()
    assert seen.own is not None
    assert torch.equal(seen.own[0], batch["attention_mask"] != 0), "the auxiliary loss must know the padding"


def test_save_and_load(loaded: Loaded, tmp_path: Path) -> None:
    model, processor = loaded
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    again = Processor.from_pretrained(tmp_path)
    arguments = (PROMPTS, [None, noise_image()], [[], [[0, 0, 20, 15]]], ANSWERS)
    first, second = processor(*arguments), again(*arguments)
    assert all(torch.equal(first[name], second[name]) for name in first)
    other, _ = load_model(str(tmp_path))
    with torch.no_grad():
        assert torch.equal(other(**second).logits, model(**first).logits)


def test_boxes_are_written_in_thousandths(loaded: Loaded) -> None:
    image = noise_image(size=(200, 50))
    found = with_boxes(f"objects: O1 {REGION} O2 {REGION} text: so", [[0, 10, 100, 60], [20, 0, 40, 25]], image)
    assert found == "objects: O1 [0, 200, 500, 1000] O2 [100, 0, 200, 500] text: so"
    assert with_boxes(f"objects: O1 {REGION} text: so", [[0, 10, 100, 60]], None) == "objects: O1 text: so"
    assert with_boxes(f"O1 {REGION} O2 {REGION}", [[0, 0, 200, 50]], image) == "O1 [0, 0, 1000, 1000] O2"


def test_special_tokens_in_text_are_escaped(loaded: Loaded) -> None:
    _, processor = loaded
    image = "<|image_pad|>" if "<|image_pad|>" in processor.tokenizer.get_vocab() else "<image>"
    number = processor.tokenizer.convert_tokens_to_ids(image)
    plain, forged = processor(["some text"]), processor([f"some {image} text <|im_end|>"])
    count = [int((b["input_ids"] == number).sum()) for b in (plain, forged)]
    assert count[0] == count[1]


def test_processor_without_chat_template_is_an_error(loaded: Loaded) -> None:
    bare = copy.deepcopy(loaded[1].processor)
    bare.chat_template = None
    with pytest.raises(UserError, match="chat template"):
        ImageTextProcessor(bare)


def test_options_of_other_families_are_an_error(loaded: Loaded, tmp_path: Path) -> None:
    loaded[0].config.save_pretrained(tmp_path)
    with pytest.raises(UserError, match="fusion = gated"):
        load_model(str(tmp_path), fusion="gated")
    with pytest.raises(UserError, match="vision = "):
        load_model(str(tmp_path), vision="ViT-B-32:")
    with pytest.raises(UserError, match="template = "):
        load_model(str(tmp_path), template="{image}{prompt}{answer}")
