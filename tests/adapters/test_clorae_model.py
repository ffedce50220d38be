"""C-LoRAE as a PEFT method on small T5, LLaMA and GPT-2 models; what all methods share is in test_behaviour.py."""

from __future__ import annotations

import copy
import json
import warnings

import peft
import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, T5Config

from lvlm_clorae import CLoRAEConfig
from tests.helpers.adapters import TASKS, gradients, layers_of, llama, randomise, t5
from tests.helpers.adapters import seq2seq_batch as batch
from tests.helpers.clorae_reference import plain_clorae

PARAMETERS = {"universal_A", "universal_B", "expert_A", "expert_B", "gate", "mim_scale", "mim_rho"}


def adapted(base, **fields):
    return randomise(peft.get_peft_model(base, CLoRAEConfig(**{"tasks": TASKS, "r": 4, **fields})))


def test_targets_and_trainable_parameters():
    model = adapted(t5(), task_type="SEQ_2_SEQ_LM")
    assert {name.rsplit(".", 1)[1] for name in layers_of(model)} == {"q", "v"}
    assert len(layers_of(model)) == 12  # 2 encoder blocks, 2 decoder blocks with self- and cross-attention
    assert {n.rsplit(".", 1)[1] for n, p in model.named_parameters() if p.requires_grad} == PARAMETERS
    assert all(".clorae_experts.default." in name for name, p in model.named_parameters() if p.requires_grad)


def test_default_targets_of_a_subclass_of_a_known_model():
    class OwnConfig(T5Config):
        model_type = "own_t5"

    base = t5()
    base.config = OwnConfig(**base.config.to_dict() | {"model_type": "own_t5"})
    assert {name.rsplit(".", 1)[1] for name in layers_of(adapted(base))} == {"q", "v"}


@pytest.mark.parametrize("task", ["mre", 1])
@pytest.mark.parametrize("base", [t5, llama])
def test_every_parameter_has_a_gradient_and_absent_experts_a_zero_one(base, task):
    model = adapted(base(), use_mim=True).train()
    inputs = batch()
    if base is llama:
        inputs["labels"] = inputs["input_ids"]
    model.set_task(task)
    (model(**inputs).loss + model.mutual_information_loss()).backward()
    grads = gradients(model)
    assert grads.keys() == {name for name, p in model.named_parameters() if p.requires_grad}
    for name, grad in grads.items():
        assert torch.count_nonzero(grad) > 0, name
        if "expert_" in name:
            assert torch.count_nonzero(grad[[0, 2]]) == 0, name


def test_set_task_errors_name_the_tasks():
    model = adapted(t5()).eval()
    with pytest.raises(ValueError, match=r"set_task.*mner.*mre.*mee"):
        model(**batch())
    tensors = torch.tensor([0, 3]), torch.tensor([-1]), torch.tensor([[0]]), torch.tensor([0.5])
    for wrong in ("ner", 3, -1, True, None, 1.0, [0], ["mner"], b"mner", *tensors):
        with pytest.raises(ValueError, match=r"mner \(0\), mre \(1\), mee \(2\)"):
            model.set_task(wrong)
    model.set_task(torch.tensor([0, 1, 2]))
    with pytest.raises(ValueError, match=r"mner.*mre.*mee"):
        model(**batch(rows=4))
    with pytest.raises(ValueError, match="set_task"):
        adapted(llama()).generate(input_ids=batch()["input_ids"], max_new_tokens=1)


def test_task_kept_restores_the_task():
    model = adapted(t5(), use_gate=False).eval()
    with torch.no_grad():
        for layer in layers_of(model).values():
            layer.adapters["default"].expert_B.normal_()
        model.set_task("mner")
        before = model(**batch()).logits
        with model.task_kept():
            model.set_task("mee")
            assert not torch.equal(model(**batch()).logits, before)
        assert torch.equal(model(**batch()).logits, before)


def test_mixed_tasks_equal_single_task_batches():
    model = adapted(t5()).eval()
    inputs = batch()
    model.set_task(torch.tensor([0, 2]))
    mixed = model(**inputs).logits
    for row, task in enumerate(["mner", "mee"]):
        model.set_task(task)
        torch.testing.assert_close(mixed[row], model(**inputs).logits[row])
    assert not torch.allclose(mixed[0], model(**inputs).logits[0])


@pytest.mark.parametrize("base", [t5, llama])
def test_beam_search_with_mixed_tasks(base):
    model = adapted(base()).eval()
    inputs = {"input_ids": batch()["input_ids"], "attention_mask": torch.ones(2, 6, dtype=torch.long)}
    settings = {"num_beams": 3, "max_new_tokens": 3, "min_new_tokens": 3, "do_sample": False}
    model.set_task(torch.tensor([0, 2]))
    mixed = model.generate(**inputs, **settings)
    for row, task in enumerate([0, 2]):
        model.set_task(task)
        assert torch.equal(mixed[row], model.generate(**inputs, **settings)[row])


@pytest.mark.parametrize("fields", [{}, {"use_universal": False}])
def test_saved_tensor_names(tmp_path, fields):
    model = adapted(t5(), **fields)
    model.save_pretrained(tmp_path)
    parameters = {"expert_A", "expert_B"} if "use_universal" in fields else PARAMETERS
    assert load_file(tmp_path / "adapter_model.safetensors").keys() == {
        f"base_model.model.{layer}.clorae_experts.{parameter}" for layer in layers_of(model) for parameter in parameters
    }
    assert json.loads((tmp_path / "adapter_config.json").read_text())["tasks"] == TASKS
    again = peft.PeftModel.from_pretrained(t5(), tmp_path, adapter_name="other")
    assert isinstance(again.peft_config["other"], CLoRAEConfig)


@torch.no_grad()
def test_merging_raises_and_changes_nothing():
    model = adapted(t5()).eval()
    model.set_task(0)
    expected = model(**batch()).logits
    for merge in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(NotImplementedError, match="gate"):
            merge()
    assert torch.equal(model(**batch()).logits, expected)


def test_two_adapters_with_their_own_tasks(tmp_path):
    model = adapted(t5())
    model.add_adapter("second", CLoRAEConfig(tasks=["mee", "other"], r=2, target_modules=["q", "k"]))
    randomise(model, seed=9)
    model.eval()
    model.set_task("mee")
    first = model(**batch()).logits
    model.set_adapter("second")
    second = model(**batch()).logits  # it has the task too, at another index
    assert not torch.allclose(first, second)
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trainable
    assert all(".clorae_experts.second." in name for name in trainable)
    with pytest.raises(ValueError, match="other"):
        model.set_task("mner")
    model.set_task("other")
    model.set_adapter("default")
    with pytest.raises(ValueError, match="mner"):  # set for the second adapter only
        model(**batch())
    model.set_task("mee")
    assert torch.equal(model(**batch()).logits, first)
    model.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(t5(), tmp_path / "second").eval()
    again.set_task("mee")
    torch.testing.assert_close(again(**batch()).logits, second)
    model.delete_adapter("second")
    assert torch.equal(model(**batch()).logits, first)


@pytest.mark.parametrize("rows", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_activation_checkpointing_preserves_mim_and_gradients(dropout, rows):
    results = []
    for checkpointing in (False, True):
        model = adapted(t5(dropout), lora_dropout=dropout).double().train()
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.set_task(torch.tensor([0, 2]) if rows else "mner")
        torch.manual_seed(7)
        loss = model(**batch()).loss
        mim = model.mutual_information_loss()
        (loss + 0.5 * mim).backward()
        assert torch.equal(model.mutual_information_loss(), mim)  # the recomputation recorded nothing
        results.append((mim, gradients(model)))
    torch.testing.assert_close(results[0][0], results[1][0])
    assert results[0][1].keys() == results[1][1].keys()
    for name, grad in results[0][1].items():
        torch.testing.assert_close(results[1][1][name], grad, msg=lambda text, name=name: f"{name}: {text}")


def test_reentrant_checkpointing_raises():
    model = adapted(t5()).train()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
        model.enable_input_require_grads()
        model.set_task(0)
        model(**batch())
    with pytest.raises(RuntimeError, match="use_reentrant"):
        model.mutual_information_loss()


def test_mim_is_of_the_last_training_forward():
    model = adapted(t5()).train()
    with pytest.raises(RuntimeError, match="forward"):
        model.mutual_information_loss()
    model.set_task(0)
    model(**batch())
    first = model.base_model.mutual_information_loss()
    assert first.requires_grad
    model(**batch())
    torch.testing.assert_close(model.mutual_information_loss(), first)
    assert len(model.base_model._context.aux_terms) == 12
    copy.deepcopy(model)  # tensors of a graph are not copied
    model.eval()
    model(**batch())
    assert model.mutual_information_loss() == 0
    without = adapted(t5(), use_mim=False).train()
    without.set_task(0)
    without(**batch())
    assert without.mutual_information_loss() == 0


def test_padding_changes_neither_the_mim_term_nor_the_gate_statistics():
    """A sample with and without padding: masks of the encoder, of the decoder by labels, and of cross-attention."""
    model = adapted(t5(), target_modules=["q", "k", "v"]).train()
    model.set_task(1)
    inputs = batch()
    short = {"input_ids": inputs["input_ids"][1:, :4], "labels": inputs["labels"][:1, :3]}
    model(**short)
    mim, statistics = model.mutual_information_loss(), model.gate_statistics()
    padded = {
        "input_ids": inputs["input_ids"][1:],
        "attention_mask": inputs["attention_mask"][1:],
        "labels": inputs["labels"][:1],
    }
    model(**padded)
    torch.testing.assert_close(model.mutual_information_loss(), mim)
    assert model.gate_statistics().keys() == layers_of(model).keys()
    for name, weight in model.gate_statistics().items():
        torch.testing.assert_close(weight, statistics[name], msg=lambda text, name=name: f"{name}: {text}")
    del padded["attention_mask"]
    model(**padded)
    assert not torch.allclose(model.mutual_information_loss(), mim)


def test_mean_mim_of_two_ranks_equals_mim_of_all_tokens():
    model = randomise(adapted(t5(), use_mim=True))
    model.train()
    model.set_task("mre")
    inputs = batch(rows=2)
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    inputs["attention_mask"][1, 3:] = 0
    inputs["labels"][1, 2:] = -100

    def term(rows, *ranks):
        model(**{name: tensor[rows] for name, tensor in inputs.items()})
        return model.base_model.mutual_information_loss(*ranks)

    together = term([0, 1])
    counts = []
    for row in (0, 1):
        term([row], lambda own: counts.append(own) or own, 2)
    assert not torch.equal(counts[0], counts[1])
    ranks = torch.stack([term([row], lambda own: counts[0] + counts[1], 2) for row in (0, 1)])
    torch.testing.assert_close(ranks.mean(), together)
    plain = torch.stack([term([row]) for row in (0, 1)]).mean()
    assert (plain - together).abs() > 1e-4  # the average of the ranks' own means differs


def test_padding_in_a_decoder_only_model_in_a_wrapper():
    class Wrapper(nn.Module):  # creates the masks itself, as a model with visual tokens
        def __init__(self):
            super().__init__()
            self.language_model = llama()

        def forward(self, ids, lengths):
            mask = torch.arange(ids.shape[1]) < lengths.unsqueeze(-1)
            return self.language_model(input_ids=ids, attention_mask=mask.long())

    model = adapted(Wrapper(), target_modules=["q_proj", "v_proj"]).train()
    model.set_task(2)
    ids = batch()["input_ids"][:1]
    model(ids[:, :4], torch.tensor([4]))
    mim, statistics = model.mutual_information_loss(), model.gate_statistics()
    model(ids, torch.tensor([4]))
    torch.testing.assert_close(model.mutual_information_loss(), mim)
    torch.testing.assert_close(model.gate_statistics(), statistics)


def test_gate_statistics_without_a_gate_and_after_generate():
    model = adapted(t5()).eval()
    assert model.gate_statistics() == {}
    model.set_task(0)
    inputs = batch()
    model.generate(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], max_new_tokens=2)
    statistics = model.gate_statistics()
    assert statistics.keys() == layers_of(model).keys()
    assert all(0 < weight < 1 and not weight.requires_grad for weight in statistics.values())
    plain = adapted(t5(), use_gate=False)
    plain.set_task(0)
    plain(**inputs)
    assert plain.gate_statistics() == {}


def test_conv1d_and_an_unsupported_layer():
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=40, n_positions=8, n_embd=16, n_layer=1, n_head=4)
    model = adapted(GPT2LMHeadModel(config)).eval()
    assert [layer.clorae_experts["default"].universal_B.shape for layer in layers_of(model).values()] == [(48, 4)]
    model.set_task(0)
    assert model(input_ids=batch()["input_ids"]).logits.isfinite().all()
    with pytest.raises(TypeError, match=r"transformer\.wte.*Embedding"):
        adapted(GPT2LMHeadModel(config), target_modules=["wte"])


def test_adapters_of_a_bf16_base_are_fp32():
    model = adapted(llama().to(torch.bfloat16))
    assert {p.dtype for name, p in model.named_parameters() if "clorae_" in name} == {torch.float32}


@pytest.mark.parametrize("fields", [{}, {"mim_detach_teacher": False}, {"use_gate": False}])
@pytest.mark.parametrize("rows", [None, [2, 0], [1, 1]])
def test_mim_and_its_gradients_equal_the_equations_over_all_layers(rows, fields):
    """Layers of three shapes in float64, with the sum over channels of Eq. (5) written out."""
    model = adapted(t5(), target_modules=["q", "v", "wi", "wo"], **fields).double().train()
    model.set_task("mre" if rows is None else torch.tensor(rows))
    seen = []
    for layer in layers_of(model).values():
        layer.register_forward_hook(
            lambda layer, args, output: seen.append((layer, args[0], layer.masks.valid(args[0], layer.reads_encoder)))
        )
    model(**batch())
    mim = model.mutual_information_loss()
    terms = []
    for layer, x, valid in seen:
        experts = layer.adapters["default"]
        parameters = dict(experts.named_parameters())
        densities = [
            plain_clorae(parameters, row, row, task, experts.config).density
            for row, task in zip(x, rows or [1, 1], strict=True)
        ]
        density = torch.stack(densities)
        terms.append((density if valid is None else density[valid]).mean())
    assert len({(layer.base_layer.in_features, layer.base_layer.out_features) for layer, *_ in seen}) == 3
    expected = torch.stack(terms).mean()
    torch.testing.assert_close(mim, expected)
    trained = [p for p in model.parameters() if p.requires_grad]
    arguments = {"retain_graph": True, "allow_unused": True, "materialize_grads": True}
    for one, other in zip(
        torch.autograd.grad(mim, trained, **arguments), torch.autograd.grad(expected, trained, **arguments), strict=True
    ):
        torch.testing.assert_close(one, other)
