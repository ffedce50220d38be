"""VisionT5 with either fusion: equal to T5 without an image, placement of images and regions, generation, training."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from typing import TypeVar

import pytest
import torch
from torch.nn import functional
from transformers import T5Config, T5ForConditionalGeneration
from transformers.modeling_outputs import BaseModelOutput
from transformers.models.t5.modeling_t5 import T5Block, T5Stack

from lvlm_clorae.models.families.t5 import VisionT5
from lvlm_clorae.models.fusion import GatedFusion
from tests.helpers.tiny import DEMO, image_a_row, tiny_batch, tiny_config, tiny_model, tiny_processor

Batch = dict[str, torch.Tensor]
Model = TypeVar("Model", bound=torch.nn.Module)


@pytest.fixture(scope="module", params=["concat", "gated"])
def model(request: pytest.FixtureRequest) -> VisionT5:
    return tiny_model(fusion=request.param)


@pytest.fixture(scope="module")
def plain(model: VisionT5) -> T5ForConditionalGeneration:
    return plain_t5(model)


def plain_t5(model: VisionT5) -> T5ForConditionalGeneration:
    """Build transformers' own T5 with the same weights."""
    settings = tiny_config().to_dict()
    for name in ("model_type", "architectures", "vision", "projector", "region_token_id", "fusion"):
        settings.pop(name, None)
    plain = T5ForConditionalGeneration(T5Config(**settings)).eval()
    own = {name for name in model.state_dict() if name.startswith(("vision_tower.", "projector.", "fusion."))}
    plain.load_state_dict({name: value for name, value in model.state_dict().items() if name not in own})
    return plain


@pytest.fixture
def batch() -> Batch:
    return image_a_row(tiny_batch())


def text_batch() -> Batch:
    prompts = ["entities. text: Mara Novotny leaves Tamsk for the Winter Cup", "entities. text: so proud"]
    return tiny_processor()(prompts, None, None, ["person, Mara Novotny <spot> location, Tamsk", "none"])


def in_float64(model: Model, batch: Batch) -> tuple[Model, Batch]:
    """Return copies in float64, since rounding in float32 depends on other rows, padding and the order of sums."""
    doubles = {name: tensor.double() if tensor.is_floating_point() else tensor for name, tensor in batch.items()}
    return copy.deepcopy(model).double(), doubles


def test_equals_t5_without_an_image(model: VisionT5, plain: T5ForConditionalGeneration) -> None:
    (model, text), (plain, _) = in_float64(model, text_batch()), in_float64(plain, {})
    only_text = {name: text[name] for name in ("input_ids", "attention_mask", "labels")}
    with torch.no_grad():
        expected, found, bare = plain(**only_text), model(**text), model(**only_text)
    real = text["labels"] != -100  # plain T5 attends to padding, this model does not
    torch.testing.assert_close(found.logits[real], expected.logits[real], rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(bare.logits[real], expected.logits[real], rtol=1e-9, atol=1e-9)
    assert expected.logits.std() > 0.1, "logits that hardly vary would show nothing"
    torch.testing.assert_close(found.loss, expected.loss.float())


def test_generates_as_t5_without_an_image(model: VisionT5, plain: T5ForConditionalGeneration) -> None:
    text = text_batch()
    text.pop("labels")
    how = {"max_new_tokens": 12, "do_sample": False}
    expected = plain.generate(input_ids=text["input_ids"], attention_mask=text["attention_mask"], **how)
    assert torch.equal(model.generate(**text, **how), expected)
    assert len(set(expected[0].tolist())) > 3


def logits(model: VisionT5, batch: Batch, **changes: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(**{**batch, **changes}).logits


def test_masked_images_have_no_effect(model: VisionT5, batch: Batch) -> None:
    other = batch["pixel_values"].clone()
    other[1] = 50 * torch.randn_like(other[1])
    assert torch.equal(logits(model, batch, pixel_values=other), logits(model, batch))


def test_images_may_be_given_for_every_row(model: VisionT5, batch: Batch) -> None:
    compact = tiny_batch()
    assert (len(compact["pixel_values"]), len(batch["pixel_values"])) == (1, 2)
    torch.testing.assert_close(logits(model, compact), logits(model, batch), rtol=1e-3, atol=1e-3)
    turned = [compact[name].flip(0) for name in ("input_ids", "attention_mask", "pixel_mask", "regions", "labels")]
    names = ("input_ids", "attention_mask", "pixel_mask", "regions", "labels")
    other = {**compact, **dict(zip(names, turned, strict=True))}
    torch.testing.assert_close(logits(model, other).flip(0), logits(model, batch), rtol=1e-3, atol=1e-3)


def test_image_changes_only_its_own_row(model: VisionT5, batch: Batch) -> None:
    model, batch = in_float64(model, batch)
    other = batch["pixel_values"].clone()
    other[0] = other[0].flip(-1)
    seen, changed = logits(model, batch), logits(model, batch, pixel_values=other)
    hidden = logits(model, batch, pixel_mask=torch.zeros(2, dtype=torch.long))
    for different in (changed, hidden):
        assert (different[0] - seen[0]).abs().max() > 1e-3
        torch.testing.assert_close(different[1], seen[1], rtol=1e-5, atol=1e-5)


def test_absent_inputs_are_blanks(model: VisionT5, batch: Batch) -> None:
    absent = {name: batch[name] for name in ("input_ids", "attention_mask", "labels")}
    blank = {
        **absent,
        "pixel_values": torch.zeros_like(batch["pixel_values"]),
        "pixel_mask": torch.zeros(2, dtype=torch.long),
        "regions": torch.zeros(2, 1, 4),
    }
    assert torch.equal(logits(model, absent), logits(model, blank))
    assert torch.equal(
        logits(model, {**absent, "pixel_values": batch["pixel_values"]}),
        logits(model, {**blank, "pixel_values": batch["pixel_values"], "pixel_mask": torch.ones(2, dtype=torch.long)}),
    )
    assert torch.equal(
        model.generate(input_ids=batch["input_ids"], max_new_tokens=4),
        model.generate(
            input_ids=batch["input_ids"], attention_mask=torch.ones_like(batch["input_ids"]), max_new_tokens=4
        ),
    )


def test_right_padding_has_no_effect(model: VisionT5, batch: Batch) -> None:
    model, batch = in_float64(model, batch)
    longer = {
        "input_ids": functional.pad(batch["input_ids"], (0, 8)),
        "attention_mask": functional.pad(batch["attention_mask"], (0, 8)),
        "regions": functional.pad(batch["regions"], (0, 0, 0, 3)),
        "labels": functional.pad(batch["labels"], (0, 8), value=-100),
    }
    length = batch["labels"].shape[1]
    with torch.no_grad():
        short, long = model(**batch), model(**{**batch, **longer})
    real = batch["labels"] != -100
    torch.testing.assert_close(long.logits[:, :length][real], short.logits[real], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(long.loss, short.loss)


def test_rows_are_independent(model: VisionT5, batch: Batch) -> None:
    model, batch = in_float64(model, batch)
    both = logits(model, batch)
    for row in range(2):
        alone = {name: tensor[row : row + 1] for name, tensor in batch.items()}
        real = alone["labels"][0] != -100
        torch.testing.assert_close(logits(model, alone)[0][real], both[row][real], rtol=1e-7, atol=1e-7)


def test_region_tokens_replace_their_placeholders_in_order(model: VisionT5, batch: Batch) -> None:
    with torch.no_grad():
        found, seen = model.embed(batch["input_ids"], batch["pixel_values"], batch["pixel_mask"], batch["regions"])
        visual, regions = model.projector(model.vision_tower(batch["pixel_values"]), batch["regions"])
        text = model.shared(batch["input_ids"])
    assert torch.equal(seen, visual)
    placeholders = batch["input_ids"] == model.config.region_token_id
    assert placeholders.sum(1).tolist() == [2, 0]
    assert torch.equal(found[0][placeholders[0]], regions[0])
    assert not torch.equal(regions[0, 0], regions[0, 1])
    assert torch.equal(found[~placeholders], text[~placeholders])


def encode(model: VisionT5, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    with torch.no_grad():
        return model.encode(**{name: tensor for name, tensor in batch.items() if name != "labels"})


def test_concat_is_the_encoder_over_image_and_text(batch: Batch) -> None:
    model = tiny_model()
    with torch.no_grad():
        text, visual = model.embed(batch["input_ids"], batch["pixel_values"], batch["pixel_mask"], batch["regions"])
    patches = visual.shape[1]
    states, mask = encode(model, batch)
    assert torch.equal(mask[:, patches:], batch["attention_mask"])
    assert mask[:, :patches].sum(1).tolist() == [patches, 0]
    with torch.no_grad():
        whole = plain_t5(model).encoder(inputs_embeds=torch.cat([visual, text], 1), attention_mask=mask)
    torch.testing.assert_close(states, whole.last_hidden_state)


def test_gated_is_the_encoder_over_text_followed_by_the_fusion(batch: Batch) -> None:
    model = tiny_model(fusion="gated")
    with torch.no_grad():
        text, visual = model.embed(batch["input_ids"], batch["pixel_values"], batch["pixel_mask"], batch["regions"])
        alone = plain_t5(model).encoder(inputs_embeds=text, attention_mask=batch["attention_mask"]).last_hidden_state
        fused = model.fusion(alone, batch["attention_mask"], visual, batch["pixel_mask"])
    states, mask = encode(model, batch)
    assert torch.equal(mask, batch["attention_mask"])
    assert torch.equal(states, fused)
    assert torch.equal(states[1], alone[1])
    assert (states[0] - alone[0]).abs().max() > 1e-2


def position_bias(encoder: T5Stack, embeddings: torch.Tensor) -> torch.Tensor:
    """Return the position bias of self-attention for a row without padding, ``[heads, L, L]``."""
    found = []
    hook = encoder.block[0].layer[0].register_forward_hook(lambda layer, args, output: found.append(output[1][0]))
    encoder(inputs_embeds=embeddings, attention_mask=torch.ones(embeddings.shape[:2]))
    hook.remove()
    return found[0]


def bucket(distance: int, buckets: int = 32, furthest: int = 128) -> int:
    """Compute T5's bucket of key minus query position (Raffel et al. 2020, code in Mesh TensorFlow)."""
    half, exact = buckets // 2, buckets // 4
    after, distance = half * (distance > 0), abs(distance)
    if distance < exact:
        return after + distance
    share = math.log(distance / exact) / math.log(furthest / exact)
    return after + min(half - 1, exact + int(share * (half - exact)))


@torch.no_grad()
def test_concat_positions_start_at_the_first_visual_token(batch: Batch) -> None:
    model = tiny_model()
    names = ("input_ids", "pixel_values", "pixel_mask", "regions")
    text, visual = model.embed(*(batch[name][:1] for name in names))
    patches, length = visual.shape[1], text.shape[1]
    found = position_bias(model.encoder, torch.cat([visual, text], 1))
    table = model.encoder.block[0].layer[0].SelfAttention.relative_attention_bias.weight
    for s in range(length):
        for p in range(patches):
            assert torch.equal(found[:, patches + s, p], table[bucket(-(patches - p + s))])
            assert torch.equal(found[:, p, patches + s], table[bucket(patches - p + s)])
    assert torch.equal(found[:, patches:, patches:], position_bias(model.encoder, text))


def test_surplus_placeholders_are_harmless(model: VisionT5, batch: Batch) -> None:
    found = logits(model, batch, regions=batch["regions"][:, :1])
    assert torch.isfinite(found).all()


def test_loss_is_the_mean_over_target_tokens_or_a_given_number(model: VisionT5, batch: Batch) -> None:
    with torch.no_grad():
        output = model(**batch)
        given = model(**batch, num_items_in_batch=torch.tensor(7.0))
    real = batch["labels"] != -100
    expected = functional.cross_entropy(output.logits[real], batch["labels"][real])
    torch.testing.assert_close(output.loss, expected)
    torch.testing.assert_close(given.loss, expected * real.sum() / 7)


def test_generation_is_stepwise_argmax(model: VisionT5, batch: Batch) -> None:
    batch.pop("labels")
    generated = model.generate(**batch, max_new_tokens=10, do_sample=False)
    with torch.no_grad():
        states, mask = model.encode(**batch)
        encoded = BaseModelOutput(last_hidden_state=states)
        tokens = torch.zeros(2, 1, dtype=torch.long)
        done = torch.zeros(2, dtype=torch.bool)
        while tokens.shape[1] < generated.shape[1]:
            step = model(encoder_outputs=encoded, attention_mask=mask, decoder_input_ids=tokens)
            following = step.logits[:, -1].argmax(-1).masked_fill(done, model.config.pad_token_id)
            done |= following == model.config.eos_token_id
            tokens = torch.cat([tokens, following.unsqueeze(1)], 1)
    assert torch.equal(generated, tokens)
    other = model.generate(**{**batch, "pixel_values": -batch["pixel_values"]}, max_new_tokens=10, do_sample=False)
    assert other.tolist() != generated.tolist(), "generation must see the image"


def test_save_and_load(model: VisionT5, batch: Batch, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path)
    again, info = VisionT5.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    state = again.state_dict()
    assert state.keys() == model.state_dict().keys()
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    assert again.config.vision == model.config.vision
    assert torch.equal(logits(again.eval(), batch), logits(model, batch))
    assert not any(parameter.requires_grad for parameter in again.vision_tower.parameters())


@pytest.mark.parametrize("fusion", ["concat", "gated"])
def test_all_parts_but_the_tower_get_gradients(batch: Batch, fusion: str) -> None:
    model = tiny_model(fusion=fusion).train()
    assert not model.vision_tower.training
    assert not any(module.training for module in model.vision_tower.modules())
    model(**batch).loss.backward()
    for name, parameter in model.named_parameters():
        if name.startswith("vision_tower."):
            assert parameter.grad is None
            assert not parameter.requires_grad
        else:
            assert parameter.grad is not None, name
            assert parameter.grad.abs().sum() > 0, name


@pytest.mark.parametrize("fusion", ["concat", "gated"])
def test_all_parts_get_gradients_without_images(fusion: str) -> None:
    """Under ZeRO every rank has to reduce the same parameters for any batch."""
    model = tiny_model(fusion=fusion)
    model(**text_batch()).loss.backward()
    for name, parameter in model.named_parameters():
        if not name.startswith("vision_tower."):
            assert parameter.grad is not None, name
            assert torch.isfinite(parameter.grad).all(), name


def gradients(model: VisionT5, batch: Batch) -> dict[str, torch.Tensor]:
    model.zero_grad()
    torch.manual_seed(5)  # dropout
    model(**batch).loss.backward()
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


@pytest.mark.parametrize("fusion", ["concat", "gated"])
def test_activation_checkpointing_keeps_the_gradients(batch: Batch, fusion: str) -> None:
    model, batch = in_float64(tiny_model(fusion=fusion).train(), batch)
    expected = gradients(model, batch)
    calls: list[torch.nn.Module] = []
    blocks = [module for module in model.modules() if isinstance(module, T5Block)]
    for block in blocks:
        block.layer[0].register_forward_pre_hook(lambda module, args: calls.append(module))
    model.gradient_checkpointing_enable({"use_reentrant": False})
    found = gradients(model, batch)
    assert len(calls) == 2 * len(blocks) == (8 if fusion == "concat" else 12), "every block runs again in backward"
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, msg=name)


def test_bfloat16_is_finite(model: VisionT5, batch: Batch) -> None:
    model = copy.deepcopy(model).bfloat16()
    found = gradients(model, batch)
    assert all(torch.isfinite(gradient).all() for gradient in found.values())
    batch.pop("labels")
    assert model.generate(**batch, max_new_tokens=4).shape[0] == 2


def test_unknown_fusion_is_an_error() -> None:
    with pytest.raises(ValueError, match="cross"):
        VisionT5(tiny_config(fusion="cross"))


def test_config_without_fusion_means_concat(tmp_path: Path) -> None:
    config = json.loads((DEMO / "config.json").read_text(encoding="utf-8"))
    assert config.pop("fusion") == "concat"
    (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    (tmp_path / "model.safetensors").symlink_to(DEMO / "model.safetensors")
    model, info = VisionT5.from_pretrained(tmp_path, output_loading_info=True)
    assert model.config.fusion == "concat"
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))


def test_missing_fusion_is_newly_initialized() -> None:
    torch.manual_seed(0)
    model, info = VisionT5.from_pretrained(DEMO, fusion="gated", output_loading_info=True)
    assert info["missing_keys"] == {name for name in model.state_dict() if name.startswith("fusion.")}
    base = VisionT5.from_pretrained(DEMO).state_dict()
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in base.items())
    expected = dict(GatedFusion(model.config).named_parameters())
    for name, parameter in model.fusion.named_parameters():
        assert float(parameter.std()) == pytest.approx(float(expected[name].std()), rel=0.3), name
        assert float(parameter.mean()) == pytest.approx(float(expected[name].mean()), abs=0.05), name
