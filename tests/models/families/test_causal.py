"""VisionCausalLM: equal to its language model without an image, placement of images and regions, training."""

from __future__ import annotations

import copy
from pathlib import Path

import peft
import pytest
import torch
from torch.nn import functional

import lvlm_clorae
from lvlm_clorae.models import load_model
from lvlm_clorae.models.families.causal import CausalProcessor, VisionCausalLM
from lvlm_clorae.models.parts import outside_language, query_and_value
from lvlm_clorae.models.vision import VisionTower
from tests.helpers.tiny import TOWER, image_a_row, noise_image
from tests.helpers.tiny_causal import TOKENIZERS, randomize, save_language, save_tower

Batch = dict[str, torch.Tensor]
PROMPTS = ["event arguments. objects: O1 <region> O2 <region> text: guards struck the harbour", "entities. text: Mara"]
ANSWERS = ["attack <spot> target, O1", "none"]


class Tiny:
    """A saved language model, and the model loaded from it."""

    def __init__(self, directory: Path, model_type: str) -> None:
        self.plain = save_language(directory, model_type)
        self.model, self.processor = load_model(str(directory), vision=save_tower(directory / "tower"))
        randomize(self.model.projector)

    def batch(self, answers: bool = True) -> Batch:
        boxes = [[[0, 0, 20, 15], [10, 5, 40, 30]], []]
        return self.processor(PROMPTS, [noise_image(), None], boxes, ANSWERS if answers else None)

    def text(self, answers: bool = True) -> Batch:
        prompts = ["entities. text: Mara Novotny leaves Tamsk", "entities. text: so"]
        return self.processor(prompts, None, None, ["person, Mara Novotny", "none"] if answers else None)


@pytest.fixture(scope="module", params=list(TOKENIZERS))
def tiny(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    return Tiny(tmp_path_factory.mktemp(request.param), request.param)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    return Tiny(tmp_path_factory.mktemp("llama"), "llama")


def positions(mask: torch.Tensor) -> torch.Tensor:
    return (mask.cumsum(-1) - 1).clamp(min=0)


def test_equals_its_language_model_without_an_image(tiny: Tiny) -> None:
    text = tiny.text()
    ids, mask, labels = text["input_ids"], text["attention_mask"], text["labels"]
    with torch.no_grad():
        found = tiny.model(**text)
        expected = tiny.plain(input_ids=ids, attention_mask=mask, position_ids=positions(mask)).logits
    real = labels != -100
    target = labels.shape[1]
    torch.testing.assert_close(found.logits[real], expected[:, -target - 1 : -1][real], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found.loss, functional.cross_entropy(expected[:, -target - 1 : -1][real], labels[real]))
    assert expected.std() > 0.1, "logits that hardly vary would show nothing"


def test_generates_as_its_language_model_without_an_image(tiny: Tiny) -> None:
    text = tiny.text(answers=False)
    found = tiny.model.generate(**text, max_new_tokens=12, do_sample=False)
    plain = {name: text[name] for name in ("input_ids", "attention_mask")}
    pad = tiny.processor.tokenizer.pad_token_id
    expected = tiny.plain.generate(**plain, max_new_tokens=12, do_sample=False, pad_token_id=pad)
    assert torch.equal(found, expected[:, text["input_ids"].shape[1] :])


def test_row_is_independent_of_a_longer_one(tiny: Tiny) -> None:
    both = tiny.batch()
    alone = tiny.processor(PROMPTS[1:], [None], None, ANSWERS[1:])
    with torch.no_grad():
        first, second = tiny.model(**both).logits, tiny.model(**alone).logits
    count = int((alone["labels"] != -100).sum())
    torch.testing.assert_close(first[1, :count], second[0, :count], rtol=1e-4, atol=1e-4)


def test_images_and_regions_replace_their_placeholders(llama: Tiny) -> None:
    model, batch = llama.model, llama.batch()
    ids = batch["input_ids"]
    with torch.no_grad():
        embeds = model.embed(ids, batch["pixel_values"], batch["pixel_mask"], batch["regions"])
        pixels = image_a_row(batch)["pixel_values"]
        visual, regions = model.projector(model.vision_tower(pixels), batch["regions"])
        text = model.get_input_embeddings()(ids.clamp(max=len(llama.processor.tokenizer) - 3))
    images, placeholders = ids == model.config.image_token_id, ids == model.config.region_token_id
    assert images.sum(1).tolist() == [model.vision_tower.grid**2, 0]
    torch.testing.assert_close(embeds[0][images[0]], visual[0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(embeds[0][placeholders[0]], regions[0], rtol=1e-4, atol=1e-5)
    assert torch.equal(embeds[~(images | placeholders)], text[~(images | placeholders)])


def test_images_may_be_given_for_every_row(llama: Tiny) -> None:
    """The first and the last of three rows have an image."""
    images = [noise_image(0), None, noise_image(1)]
    batch = llama.processor(["a", "b", "c"], images, None, ["x", "y", "z"])
    assert batch["pixel_values"].shape[0] == 2
    bare = {name: value for name, value in batch.items() if name != "pixel_mask"}
    with torch.no_grad():
        found = llama.model(**batch).logits
        assert torch.equal(found, llama.model(**bare).logits)
        torch.testing.assert_close(found, llama.model(**image_a_row(batch)).logits, rtol=1e-4, atol=1e-4)
        other = llama.model(**{**batch, "pixel_values": batch["pixel_values"].flip(0)}).logits
    changed = (found - other).abs().amax((1, 2)) > 1e-3
    assert changed.tolist() == [True, False, True]


def test_placeholders_need_no_embedding(llama: Tiny) -> None:
    model = copy.deepcopy(llama.model)
    batch = llama.batch()
    ids = batch["input_ids"].clone()
    beyond = model.get_input_embeddings().num_embeddings + 5
    ids[ids == model.config.image_token_id] = beyond
    ids[ids == model.config.region_token_id] = beyond + 1
    model.config.image_token_id, model.config.region_token_id = beyond, beyond + 1
    with torch.no_grad():
        found, expected = model(**{**batch, "input_ids": ids}).logits, llama.model(**batch).logits
    assert torch.equal(found, expected)


def test_labels_may_have_the_width_of_the_input(llama: Tiny) -> None:
    """As in transformers, with -100 for the prompt."""
    batch = llama.batch()
    wide = torch.full_like(batch["input_ids"], -100)
    wide[:, -batch["labels"].shape[1] :] = batch["labels"]
    with torch.no_grad():
        torch.testing.assert_close(llama.model(**{**batch, "labels": wide}).loss, llama.model(**batch).loss)
        given = llama.model(**batch, num_items_in_batch=torch.tensor(7.0)).loss
        number = (batch["labels"] != -100).sum()
        torch.testing.assert_close(given, llama.model(**batch).loss * number / 7)
        whole = llama.model(**{name: value for name, value in batch.items() if name != "labels"}).logits
    assert whole.shape[:2] == batch["input_ids"].shape


def test_generation_is_stepwise_argmax(llama: Tiny) -> None:
    model, batch = llama.model, llama.batch(answers=False)
    generated = model.generate(**batch, max_new_tokens=10, do_sample=False)
    end, pad = llama.processor.tokenizer.eos_token_id, llama.processor.tokenizer.pad_token_id
    ids, mask = batch["input_ids"], batch["attention_mask"]
    done = torch.zeros(2, dtype=torch.bool)
    for _ in range(generated.shape[1]):
        with torch.no_grad():
            logits = model(**{**batch, "input_ids": ids, "attention_mask": mask}).logits
        following = logits[:, -1].argmax(-1).masked_fill(done, pad)
        ids, mask = torch.cat([ids, following[:, None]], 1), torch.cat([mask, (~done).long()[:, None]], 1)
        done |= following == end
    assert torch.equal(generated, ids[:, batch["input_ids"].shape[1] :])
    other = model.generate(**{**batch, "pixel_values": -batch["pixel_values"]}, max_new_tokens=10, do_sample=False)
    assert other.tolist() != generated.tolist(), "generation must see the image"


def test_save_and_load(tiny: Tiny, tmp_path: Path) -> None:
    tiny.model.save_pretrained(tmp_path)
    tiny.processor.save_pretrained(tmp_path)
    again, processor = load_model(str(tmp_path))
    assert isinstance(again, VisionCausalLM)
    assert isinstance(processor, CausalProcessor)
    assert again.newly_initialized == ()
    state = tiny.model.state_dict()
    assert again.state_dict().keys() == state.keys()
    assert all(torch.equal(tensor, state[name]) for name, tensor in again.state_dict().items())
    assert again.generation_config.eos_token_id == tiny.model.generation_config.eos_token_id
    with torch.no_grad():
        assert torch.equal(again(**tiny.batch()).logits, tiny.model(**tiny.batch()).logits)
    assert torch.equal(
        again.generate(**tiny.batch(answers=False), max_new_tokens=6),
        tiny.model.generate(**tiny.batch(answers=False), max_new_tokens=6),
    )


def test_all_parts_but_the_tower_get_gradients(llama: Tiny) -> None:
    model = copy.deepcopy(llama.model).train()
    model(**llama.batch()).loss.backward()
    for name, parameter in model.named_parameters():
        if name.startswith("vision_tower."):
            assert parameter.grad is None
        else:
            assert parameter.grad is not None, name
            assert parameter.grad.abs().sum() > 0, name


def test_projector_gets_gradients_without_images(llama: Tiny) -> None:
    model = copy.deepcopy(llama.model)
    model(**llama.text()).loss.backward()
    assert all(parameter.grad is not None for parameter in model.projector.parameters())


def adapted(llama: Tiny) -> peft.PeftModel:
    model = copy.deepcopy(llama.model)
    config = lvlm_clorae.CLoRAEConfig(
        r=4,
        tasks=["mner", "mre", "mee"],
        target_modules=query_and_value(model),
        exclude_modules=outside_language(model),
        modules_to_save=["projector"],
    )
    torch.manual_seed(0)
    found = peft.get_peft_model(model, config)
    with torch.no_grad():
        for name, parameter in found.named_parameters():
            if "clorae_experts" in name and name.endswith("_B"):
                parameter.normal_(std=0.1)
    found.set_task("mre")
    return found


def test_auxiliary_loss_ignores_padding(llama: Tiny) -> None:
    """The loss of two rows is the mean over the tokens of both of what each gives alone."""
    model = adapted(llama)
    both, terms = llama.batch(), []
    model(**both)
    together = model.mutual_information_loss()
    counts = [int(mask.sum()) for mask in both["attention_mask"]]
    for number, image in ((0, noise_image()), (1, None)):
        boxes = [[[0, 0, 20, 15], [10, 5, 40, 30]]] if number == 0 else [[]]
        row = llama.processor([PROMPTS[number]], [image], boxes, [ANSWERS[number]])
        assert int(row["attention_mask"].sum()) == counts[number]
        model(**row)
        terms.append(model.mutual_information_loss())
    expected = (counts[0] * terms[0] + counts[1] * terms[1]) / sum(counts)
    torch.testing.assert_close(together, expected, rtol=1e-4, atol=1e-6)


def test_activation_checkpointing_keeps_the_gradients(llama: Tiny) -> None:
    found = []
    for checkpointing in (False, True):
        model = adapted(llama)
        if checkpointing:
            model.base_model.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
            assert any(getattr(module, "gradient_checkpointing", False) for module in model.modules())
        model.train()
        (model(**llama.batch()).loss + 0.1 * model.mutual_information_loss()).backward()
        found.append({n: p.grad for n, p in model.named_parameters() if p.requires_grad})
    assert found[0].keys() == found[1].keys()
    for name, gradient in found[0].items():
        torch.testing.assert_close(gradient, found[1][name], rtol=1e-4, atol=1e-6, msg=name)
    assert sum(gradient.abs().sum() for gradient in found[0].values()) > 0


def test_config_rebuilds_the_tower_without_its_directory(llama: Tiny) -> None:
    assert isinstance(llama.model.config.vision["model"], dict)
    assert VisionTower(**llama.model.config.vision).width == TOWER["width"]
