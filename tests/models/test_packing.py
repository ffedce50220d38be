"""Batches without padding: the same loss and gradients as padded ones, for every language model that may be packed."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from lvlm_clorae import CLoRAEConfig, LoRAMoEConfig
from lvlm_clorae.models import load_model
from lvlm_clorae.models.families.t5 import T5Processor
from lvlm_clorae.models.generation import choose_tasks, generate_answers
from lvlm_clorae.models.packing import MODEL_TYPES, _masked, is_packable, pack_causal, packed_inputs, prefix_first
from tests.helpers.adapters import randomise
from tests.helpers.packed import padded_batch, tiny_language_model
from tests.helpers.tiny import noise_image, save_plain_t5, tiny_model, tiny_processor
from tests.helpers.tiny_causal import randomize, save_language, save_tower

PREFIX = "event triggers. types: attack, meet, arrest, target role agent text: "
PROMPTS = [PREFIX + text for text in ("guards struck the harbour", "Mara", "Mara Novotny leaves Tamsk for the Cup")]
ANSWERS = ["attack, struck", "none", "meet, leaves <spot> attack, Cup"]
UNIQUE = 1


def target_logits(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """The logits of the padded batch that predict labels, ``[M, V]``."""
    mask, labels = batch["attention_mask"], batch["labels"]
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    logits = model(input_ids=batch["input_ids"], attention_mask=mask, position_ids=positions).logits
    return logits[:, -labels.shape[1] - 1 : -1][labels != -100]


def gradients(loss: Tensor, model: nn.Module) -> dict[str, Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: value.grad.clone() for name, value in model.named_parameters() if value.grad is not None}


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    assert any(grad.abs().max() > 1e-3 for grad in expected.values())
    for name, grad in expected.items():
        assert (found[name] - grad).norm() <= 1e-6 * grad.norm() + 1e-9, name  # the loss is in fp32


@pytest.mark.parametrize("prefix", [7, 0])
@pytest.mark.parametrize("model_type", sorted(MODEL_TYPES))
def test_logits_and_gradients_of_each_model_type(model_type: str, prefix: int) -> None:
    model = tiny_language_model(model_type)
    batch = padded_batch(prefix=prefix)
    assert is_packable(model)
    expected = target_logits(model, batch)
    expected_grads = gradients(nn.functional.cross_entropy(expected, batch["labels"][batch["labels"] != -100]), model)

    packing = pack_causal(batch)
    assert len(packing["tokens"]) - len(packing["back"]) == prefix
    found = model(**packed_inputs(model, model.get_input_embeddings()(batch["input_ids"]), packing)).logits[0]
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
    assert_same(gradients(nn.functional.cross_entropy(found, packing["labels"]), model), expected_grads)


def test_a_packable_model_is_unchanged_without_packing() -> None:
    model = tiny_language_model("llama")
    batch = padded_batch()
    before = target_logits(model, batch)
    model(**packed_inputs(model, model.get_input_embeddings()(batch["input_ids"]), pack_causal(batch)))
    assert torch.equal(target_logits(model, batch), before)


@pytest.mark.parametrize("change", [{"sliding_window": 8}, {"model_type": "mamba2"}, {"_attn_implementation": "eager"}])
def test_other_models_are_not_packed(change: dict[str, Any]) -> None:
    model = tiny_language_model("mistral")
    for name, value in change.items():
        setattr(model.config, name, value)
    assert not is_packable(model)


ROWS = st.lists(
    st.tuples(st.integers(0, 4), st.lists(st.integers(2, 4), min_size=1, max_size=5), st.integers(0, 3)),
    min_size=1,
    max_size=5,
)


@given(ROWS, st.lists(st.integers(1, 4), max_size=6))
def test_every_token_is_packed_once_and_the_prefix_shared(rows: list[Any], head: list[int]) -> None:
    """Rows are (number of answer tokens, own tokens of the prompt, seed of the answer)."""
    prompts, answers = [[*head, *own] for _, own, _ in rows], [[5 + seed] * count for count, _, seed in rows]
    width, target = max(map(len, prompts)), max(1, *map(len, answers))
    ids = torch.tensor(
        [[0] * (width - len(p)) + p + a + [0] * (target - len(a)) for p, a in zip(prompts, answers, strict=True)]
    )
    mask = (ids != 0).long()
    labels = ids[:, width:].masked_fill(mask[:, width:] == 0, -100)
    packing = pack_causal({"input_ids": ids, "attention_mask": mask, "labels": labels}, (UNIQUE,))
    packed = ids.flatten()[packing["tokens"]]
    P = len(packed) - len(packing["back"])

    assert UNIQUE not in packed[:P]
    limit = min(map(len, prompts)) - 1
    longer = {tuple(prompt[: P + 1]) for prompt in prompts}
    assert limit == P or len(longer) > 1 or UNIQUE in next(iter(longer)), "the prefix is the longest one"
    first = P
    for row, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        own = (prompt + answer)[P:]
        places = packing["rows"][row]
        assert packed[:P].tolist() + packed[first : first + len(own)].tolist() == prompt + answer
        assert places[: len(own)].tolist() == list(range(first, first + len(own)))
        assert not any(places[len(own) :])
        first += len(own)
    assert torch.equal(packing["rows"].flatten()[packing["back"]], torch.arange(P, len(packed)))
    before = [(prompt[-1:] + answer)[: len(answer)] for prompt, answer in zip(prompts, answers, strict=True)]
    assert packed[packing["targets"]].tolist() == [token for tokens in before for token in tokens]
    assert packing["labels"].tolist() == [token for answer in answers for token in answer]


@given(st.lists(st.integers(0, 5), min_size=1, max_size=4), st.integers(1, 3))
def test_prefix_first(paddings: list[int], length: int) -> None:
    width = max(paddings) + 4
    ids = torch.tensor([[0] * n + list(range(1, width - n + 1)) for n in paddings])
    embeds, mask = prefix_first(ids.unsqueeze(-1), (ids != 0).long(), length)
    for row, n in zip(embeds.squeeze(-1).tolist(), paddings, strict=True):
        assert row == list(range(1, length + 1)) + [0] * n + list(range(length + 1, width - n + 1))
    assert torch.equal(mask, (embeds.squeeze(-1) != 0).long())


@pytest.fixture(scope="module")
def text_model(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    directory = tmp_path_factory.mktemp("llama")
    save_language(directory)
    model, processor = load_model(str(directory), vision="none")
    return model.double(), processor


@pytest.fixture(scope="module")
def image_model(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    directory = tmp_path_factory.mktemp("llava")
    save_language(directory)
    model, processor = load_model(str(directory), vision=save_tower(directory / "tower"))
    randomize(model.projector)
    return model.double(), processor


@pytest.fixture(scope="module")
def t5_model() -> tuple[Any, Any]:
    return tiny_model(dropout_rate=0.0).double(), tiny_processor()


@pytest.fixture(scope="module")
def t5_text_model() -> tuple[Any, Any]:
    return tiny_model(vision=None).double(), T5Processor(tiny_processor().tokenizer, None)


TASKS = ["mner", "mre", "mee"]
LAYERS = {"text": ["q_proj", "k_proj", "o_proj", "gate_proj", "down_proj"], "t5": ["q", "k", "v", "o", "wi_0", "wo"]}
METHODS = {
    "clorae": lambda layers: CLoRAEConfig(tasks=TASKS, r=4, target_modules=layers),
    "teacher": lambda layers: CLoRAEConfig(tasks=TASKS, r=4, target_modules=layers, mim_detach_teacher=False),
    "loramoe": lambda layers: LoRAMoEConfig(tasks=TASKS, r=4, target_modules=layers),
    "lora": lambda layers: peft.LoraConfig(r=4, target_modules=layers),
}


def batch_of(kind: str, processor: Any) -> dict[str, Tensor]:
    if kind != "t5":
        return dict(processor(PROMPTS, answers=ANSWERS))
    prompts = [PROMPTS[0], "objects: O1 <region> O2 <region> " + PROMPTS[1], PROMPTS[2]]
    boxes = [[], [[0, 0, 20, 15], [10, 5, 40, 30]], []]
    batch = {**processor(prompts, [noise_image(0), noise_image(1), None], boxes, ANSWERS)}
    batch["pixel_values"] = batch["pixel_values"].double()
    return batch


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("method", sorted(METHODS))
@pytest.mark.parametrize("kind", sorted(LAYERS))
def test_adapters_have_the_same_loss_auxiliary_loss_and_gradients(
    kind: str, method: str, checkpointing: bool, request: pytest.FixtureRequest
) -> None:
    base, processor = request.getfixturevalue(f"{kind}_model")
    model = randomise(peft.get_peft_model(base, METHODS[method](LAYERS[kind]))).double().train()
    has_tasks = hasattr(model, "set_task")
    if has_tasks:
        model.set_task("mre")
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    batch = batch_of(kind, processor)
    packing = model.packing(batch)
    assert len(packing["rows"]) == 3
    losses, grads = [], []
    try:
        for extra in ({}, {"packing": packing}):
            ce = model(**batch, **extra).loss
            aux = model.base_model.aux_loss() if has_tasks else torch.zeros(())
            losses.append([ce.item(), aux.item()])
            grads.append(gradients(ce + aux, model))
    finally:
        base.gradient_checkpointing_disable()
        model.unload()
    assert has_tasks == (losses[0][1] != 0)
    assert losses[1] == pytest.approx(losses[0], rel=1e-6)
    assert_same(grads[1], grads[0])


@pytest.mark.parametrize("kind", ["t5", "t5_text"])
def test_t5_has_the_same_logits_and_gradients(kind: str, request: pytest.FixtureRequest) -> None:
    model, processor = request.getfixturevalue(f"{kind}_model")
    batch = batch_of(kind, processor)
    assert model.is_packable
    model.requires_grad_(True)
    real = batch["labels"] != -100
    padded, packed = model(**batch), model(**batch, packing=model.packing(batch))
    torch.testing.assert_close(packed.logits[0], padded.logits[real], rtol=1e-6, atol=1e-6)
    assert packed.logits.std() > 0.1, "logits that hardly vary would show nothing"
    assert_same(gradients(packed.loss, model), gradients(padded.loss, model))
    assert torch.equal(model(**batch).logits, padded.logits), "a padded batch after a packed one"


def test_a_published_t5_is_packed(tmp_path: Path) -> None:
    save_plain_t5(tmp_path, own_head=True)
    model, processor = load_model(str(tmp_path), vision="none")
    batch = processor(PROMPTS, answers=ANSWERS)
    with torch.no_grad():
        padded, packed = model(**batch), model(**batch, packing=model.packing(batch))
    torch.testing.assert_close(packed.logits[0], padded.logits[batch["labels"] != -100], rtol=1e-4, atol=1e-5)


def test_t5_drops_the_visual_tokens_of_rows_without_an_image(t5_model: tuple[Any, Any]) -> None:
    model, processor = t5_model
    packing = model.packing(batch_of("t5", processor))
    text = int(batch_of("t5", processor)["attention_mask"].sum())
    assert len(packing["tokens"]) == text + 2 * model.vision_tower.grid**2
    assert len(packing["decoder_tokens"]) == len(packing["labels"])


def test_gated_fusion_is_not_packed() -> None:
    assert not tiny_model(fusion="gated").is_packable


@pytest.mark.parametrize("kind", ["text", "t5"])
def test_rows_without_labels_have_no_loss(kind: str, request: pytest.FixtureRequest) -> None:
    model, processor = request.getfixturevalue(f"{kind}_model")
    batch = batch_of(kind, processor)
    whole = {**batch, "labels": batch["labels"].clone()}
    whole["labels"][0] = -100
    found = model(**whole, packing=model.packing(whole)).loss
    torch.testing.assert_close(found, model(**whole).loss, rtol=1e-6, atol=0)
    batch["labels"] = torch.full_like(batch["labels"], -100)
    model.requires_grad_(True)
    loss = model(**batch, packing=model.packing(batch), num_items_in_batch=torch.tensor(1.0)).loss
    assert loss.item() == 0
    loss.backward()


def test_gate_statistics_count_a_token_in_each_of_its_rows(text_model: tuple[Any, Any]) -> None:
    base, processor = text_model
    model = randomise(peft.get_peft_model(base, METHODS["clorae"](["q_proj"]))).double().train()
    model.set_task("mre")
    batch = processor(PROMPTS, answers=ANSWERS)
    found = []
    for extra in ({}, {"packing": model.packing(batch)}):
        model(**batch, **extra)
        found.append(model.base_model.gate_statistics())
    model.unload()
    for name, mean in found[0].items():
        torch.testing.assert_close(found[1][name], mean, rtol=1e-5, atol=1e-6)


def test_images_are_not_shared(image_model: tuple[Any, Any]) -> None:
    model, processor = image_model
    boxes = [[[0, 0, 20, 15]], [[10, 5, 40, 30]], [[1, 1, 9, 9]]]
    prompts = ["objects: O1 <region> " + prompt for prompt in PROMPTS]
    for images in ([noise_image(0), noise_image(1), noise_image(2)], [noise_image(0), None, noise_image(2)]):
        batch = {**processor(prompts, images, boxes, ANSWERS)}
        batch["pixel_values"] = batch["pixel_values"].double()
        with torch.no_grad():
            padded, packed = model(**batch), model(**batch, packing=model.packing(batch))
        torch.testing.assert_close(packed.loss, padded.loss, rtol=1e-6, atol=0)
        torch.testing.assert_close(packed.logits[0], padded.logits[batch["labels"] != -100], rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("kind", ["text", "image"])
def test_generation_computes_a_shared_prefix_once(kind: str, request: pytest.FixtureRequest) -> None:
    model, processor = request.getfixturevalue(f"{kind}_model")
    batch = processor(PROMPTS)
    prefix = processor.shared_prefix(batch)
    assert prefix >= 16
    calls = count_forwards(model.language_model)
    shared = generate_answers(model, processor, batch, 8)
    assert next(calls) == (1, prefix)
    assert shared == generate_answers(model, processor, batch, 8, use_cache=True), "by the model's own generate"
    assert shared == generate_answers(model, processor, batch, 8, same_model=False)
    assert len(set(shared)) > 1


def count_forwards(language_model: Any) -> Iterator[tuple[int, int]]:
    """Yield the shapes of the language model's inputs, from now on."""
    shapes: list[tuple[int, int]] = []

    def shape_of(inputs: dict[str, Any]) -> tuple[int, int]:
        given = inputs["input_ids"] if inputs.get("inputs_embeds") is None else inputs["inputs_embeds"]
        return tuple(given.shape[:2])

    hook = language_model.register_forward_pre_hook(
        lambda _, args, kwargs: shapes.append(shape_of(kwargs)), with_kwargs=True
    )

    def found() -> Iterator[tuple[int, int]]:
        hook.remove()
        yield from shapes

    return found()


def test_prompts_that_share_little_are_not_split(text_model: tuple[Any, Any], image_model: tuple[Any, Any]) -> None:
    processor = text_model[1]
    assert processor.shared_prefix(processor(["entities.", "relation."])) == 0
    with_image = image_model[1]
    images = [noise_image(seed) for seed in range(3)]
    assert with_image.shared_prefix(with_image(PROMPTS, images)) == 0


def test_rows_of_several_tasks_do_not_share_a_model() -> None:
    class Adapted:
        def set_task(self, task: Any) -> None:
            self.task = task

    assert choose_tasks(Adapted(), ["mre", "mre"], TASKS)
    assert not choose_tasks(Adapted(), ["mre", "mner"], TASKS)
    assert choose_tasks(object(), ["mre", "mner"], TASKS)


def test_the_mask_of_a_position_bias_is_made_once_for_all_layers() -> None:
    bias, mask = torch.randn(1, 4, 5, 5), torch.rand(3, 1, 1, 5) > 0.3
    found = _masked(bias, mask)
    assert torch.equal(found, torch.where(mask, bias, torch.finfo(torch.float32).min))
    assert _masked(bias, mask) is found
    assert torch.equal(_masked(bias, ~mask), torch.where(~mask, bias, torch.finfo(torch.float32).min))
