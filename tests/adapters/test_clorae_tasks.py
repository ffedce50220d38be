"""C-LoRAE's task experts: adding tasks, absent tasks in a step, parameter counts, the weight of the MIM loss."""

from __future__ import annotations

import peft
import pytest
import torch
from torch import nn
from transformers import T5Config, T5ForConditionalGeneration

from lvlm_clorae import CLoRAEConfig
from tests.helpers.adapters import TASKS, adapted, batch, gradients, layers_of, t5


def experts_of(model):
    return [layer.adapters["default"] for layer in layers_of(model).values()]


@pytest.mark.parametrize("init_from", [None, "mre"])
def test_add_task_keeps_the_others_and_saves(init_from, tmp_path):
    model = adapted("clorae", t5(), "mre").eval()
    before = model(**batch()).logits
    model.add_task("vqa", init_from=init_from)
    assert model.peft_config["default"].tasks == [*TASKS, "vqa"]
    with pytest.raises(ValueError, match="No task is set"):
        model(**batch())
    model.set_task("mre")
    assert torch.equal(model(**batch()).logits, before)
    model.set_task("vqa")
    if init_from:
        assert torch.equal(model(**batch()).logits, before)
    for experts in experts_of(model):
        assert experts.expert_A.shape[0] == experts.expert_B.shape[0] == 4
        assert experts.expert_A.requires_grad
        if not init_from:
            assert torch.count_nonzero(experts.expert_B[3]) == 0
            assert torch.count_nonzero(experts.expert_A[3]) > 0
    model.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(t5(), tmp_path).eval()
    again.set_task("vqa")
    assert torch.equal(again(**batch()).logits, model(**batch()).logits)


@pytest.mark.parametrize("rows", [False, True])
def test_freeze_others_trains_the_new_task_alone(rows):
    model = adapted("clorae", t5()).train()
    model.add_task("vqa", freeze_others=True)
    trainable = {name.rsplit(".", 1)[1] for name, p in model.named_parameters() if p.requires_grad}
    assert trainable == {"expert_A", "expert_B"}
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.1)
    before = [(e.expert_A.detach().clone(), e.expert_B.detach().clone()) for e in experts_of(model)]
    for task in ("vqa", "mre", "vqa"):  # data of another task changes nothing
        model.set_task(torch.tensor([3, 1]) if rows else task)
        model(**batch()).loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)
    for experts, (A, B) in zip(experts_of(model), before, strict=True):
        assert torch.equal(experts.expert_A[:3], A[:3])
        assert torch.equal(experts.expert_B[:3], B[:3])
        assert not torch.equal(experts.expert_B[3], B[3])


def test_add_task_errors():
    model = adapted("clorae", t5())
    for arguments in ({"name": "mre"}, {"name": ""}, {"name": "vqa", "init_from": "no"}):
        with pytest.raises(ValueError, match=r"mner.*mre.*mee"):
            model.add_task(**arguments)
    for name in (3, ["q"], " "):
        with pytest.raises(ValueError, match="mner"):
            model.add_task(name)
    assert model.peft_config["default"].tasks == TASKS
    assert all(len(experts.expert_A) == len(TASKS) for experts in experts_of(model))
    with pytest.raises(ValueError, match="default"):
        model.add_task("vqa", adapter_name="other")
    with pytest.raises(ValueError, match="use_experts"):
        adapted("clorae", t5(), use_experts=False).add_task("vqa")
    with pytest.raises(ValueError, match="frozen_tasks"):
        CLoRAEConfig(tasks=TASKS, frozen_tasks=["vqa"])


def test_update_of_an_absent_tasks_expert():
    """SGD: none. AdamW: momentum and weight decay, with the figures in docs/checkpoint.md."""
    rate, decay, (beta1, beta2), epsilon = 0.01, 0.1, (0.9, 0.999), 1e-8

    def train(optimizer_class, **settings):
        model = adapted("clorae", t5(), target_modules=["q"]).train()
        experts = experts_of(model)[0]
        optimizer = optimizer_class([p for p in model.parameters() if p.requires_grad], lr=rate, **settings)
        history, first = [experts.expert_A[0].detach().clone()], None
        for task in ("mner", "mre", "mee"):
            model.set_task(task)
            optimizer.zero_grad(set_to_none=False)
            model(**batch()).loss.backward()
            first = first if first is not None else experts.expert_A.grad[0].clone()
            optimizer.step()
            history.append(experts.expert_A[0].detach().clone())
        return history, first

    history, _ = train(torch.optim.SGD)
    assert not torch.equal(history[0], history[1])
    assert torch.equal(history[1], history[2])
    assert torch.equal(history[2], history[3])

    history, gradient = train(torch.optim.AdamW, betas=(beta1, beta2), eps=epsilon, weight_decay=decay)
    m, v = (1 - beta1) * gradient, (1 - beta2) * gradient**2
    for step in (2, 3):  # steps without samples of mner
        m, v = beta1 * m, beta2 * v
        update = rate * (m / (1 - beta1**step)) / ((v / (1 - beta2**step)).sqrt() + epsilon)
        torch.testing.assert_close(history[step], history[step - 1] * (1 - rate * decay) - update)
        used = gradient.abs() > 1e-6
        share = (update[used].abs() / rate).median()
        assert 0.3 < share < 0.8  # about two thirds of a step, then less (docs/checkpoint.md)


@pytest.mark.parametrize(
    ("d_model", "layers", "r", "expected"), [(768, 12, 128, (14.16, 14.16)), (1024, 24, 64, (18.87, 18.87))]
)
def test_trainable_parameters_of_flan_t5(d_model, layers, r, expected):
    """The paper's Table 5, base with r = 128 and large with r = 64, in millions, without MIM's parameters."""
    config = T5Config(d_model=d_model, num_layers=layers, num_heads=d_model // 64, d_ff=64, vocab_size=64)
    with torch.device("meta"):
        model = peft.get_peft_model(T5ForConditionalGeneration(config), CLoRAEConfig(tasks=TASKS, r=r))
    counts = model.parameter_counts()
    adapted_layers = 6 * layers  # q and v of the encoder's, the decoder's own and its cross-attention
    assert counts["gate"] == counts["mim"] == adapted_layers * 2 * d_model
    paper = sum(expected) * 1e6 + counts["gate"]
    assert abs(counts["universal"] + counts["experts"] + counts["gate"] - paper) < 0.01 * paper
    assert sum(counts.values()) == model.get_nb_trainable_parameters()[0]


def test_one_task_with_an_even_gate_equals_pefts_lora():
    """With a zero task expert it is half of a LoRA; with both experts, a LoRA of their joint rank."""
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(12, 10))
    inputs = torch.randn(3, 4, 12)
    ours = peft.get_peft_model(base, CLoRAEConfig(tasks=["only"], r=4, lora_alpha=8, target_modules=["0"]))
    experts = experts_of(ours)[0]
    nn.init.normal_(experts.universal_B)
    ours.set_task("only")
    halved = ours(inputs)
    A, B = experts.universal_A.detach().clone(), experts.universal_B.detach().clone()
    nn.init.normal_(experts.expert_B)
    both = ours(inputs)
    A2, B2 = experts.expert_A[0].detach().clone(), experts.expert_B[0].detach().clone()

    def lora(r, A, B):
        config = peft.LoraConfig(r=r, lora_alpha=r, target_modules=["0"])
        model = peft.get_peft_model(nn.Sequential(nn.Linear(12, 10)), config)
        layer = model.base_model.model[0]
        layer.base_layer.load_state_dict(ours.base_model.model[0].base_layer.state_dict())
        layer.lora_A["default"].weight.data, layer.lora_B["default"].weight.data = A, B
        return model(inputs)

    torch.testing.assert_close(halved, lora(4, A, B))  # alpha / r = 2, halved by the gate
    torch.testing.assert_close(both, lora(8, torch.cat([A, A2]), torch.cat([B, B2], 1)))


@pytest.mark.parametrize("case", ["bf16", "fp16 loss scaling", "accumulation"])
def test_mim_gradient_is_independent_of_precision_loss_scale_and_accumulation(case):
    beta = 0.25

    def mim_gradients(model, rows, scale=1.0, times=1):
        for _ in range(times):
            model(**{name: tensor[rows] for name, tensor in batch().items()})
            (beta * model.mutual_information_loss() * scale / times).backward()
        return {name: gradient.float() / scale for name, gradient in gradients(model).items()}

    exact = mim_gradients(adapted("clorae", t5()).train(), slice(0, 2))
    model = adapted("clorae", t5()).train()
    if case == "bf16":
        found = mim_gradients(model.bfloat16(), slice(0, 2))
    elif case == "fp16 loss scaling":
        found = mim_gradients(model.half(), slice(0, 2), scale=2.0**10)
    else:
        found = mim_gradients(model, slice(0, 2), times=4)
    assert found.keys() == exact.keys()
    own = [name for name in exact if "mim_" in name or "expert_B" in name]
    assert own
    for name in own:
        limit = 1e-6 if case == "accumulation" else 0.1
        assert (found[name] - exact[name]).norm() <= limit * exact[name].norm(), name
