"""torch.compile of the language model: the losses of eager mode, one graph per task, generation without compilation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch._dynamo.utils import counters

from lvlm_clorae import CLoRAEConfig, LoRAMoEConfig
from lvlm_clorae.errors import UserError
from lvlm_clorae.models import load_model
from lvlm_clorae.training import setup
from lvlm_clorae.training.checks import check_compilation
from lvlm_clorae.training.config_loading import make_config
from tests.helpers.adapters import randomise
from tests.helpers.tiny import tiny_model, tiny_processor
from tests.helpers.tiny_causal import save_language

TASKS = ["mner", "mre"]
PROMPT = "event triggers. types: attack, meet, arrest, target role agent text: guards struck the harbour"


def compiled(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Compile without code generation, which takes minutes on a CPU."""
    torch._dynamo.reset()
    counters.clear()
    compile_module = torch.nn.Module.compile
    monkeypatch.setattr(
        torch.nn.Module, "compile", lambda self, **options: compile_module(self, backend="aot_eager", **options)
    )
    setup.compile_language_model(model)


def batches(processor: Any) -> list[dict[str, torch.Tensor]]:
    prompts = [[PROMPT + " and the Cup" * (number + row) for row in range(3)] for number in range(3)]
    return [processor(row, answers=["attack, struck", "none", "meet, Cup"]) for row in prompts]


@pytest.mark.slow
@pytest.mark.parametrize("padding_free", [True, False])
def test_losses_and_gradients_of_eager_mode_with_a_graph_per_task(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, padding_free: bool
) -> None:
    save_language(tmp_path)
    base, processor = load_model(str(tmp_path), vision="none")
    config = CLoRAEConfig(tasks=TASKS, r=4, target_modules="all-linear")
    model = randomise(peft.get_peft_model(base, config)).double().train()

    def losses() -> list[float]:
        found = []
        for batch in batches(processor):
            packing = model.packing(batch) if padding_free else None
            for task in TASKS:
                model.set_task(task)
                model.zero_grad()
                loss = model(**batch, packing=packing).loss + 0.1 * model.base_model.aux_loss()
                loss.backward()
                norm = torch.stack([p.grad.norm() for p in model.parameters() if p.grad is not None]).norm()
                found += [loss.item(), norm.item()]
        return found

    expected = losses()
    compiled(model, monkeypatch)
    assert losses() == pytest.approx(expected, rel=1e-5)
    assert counters["graph_break"] == {}
    assert counters["stats"]["unique_graphs"] == len(TASKS)


@pytest.mark.slow
def test_t5_with_loramoe(monkeypatch: pytest.MonkeyPatch) -> None:
    base, processor = tiny_model(dropout_rate=0.0), tiny_processor()
    model = randomise(peft.get_peft_model(base, LoRAMoEConfig(tasks=TASKS, r=4, target_modules=["q", "v"]))).train()
    model.set_task("mre")
    batch = batches(processor)[0]
    packing = model.packing(batch)
    expected = model(**batch, packing=packing).loss.item(), model.base_model.aux_loss().item()
    compiled(model, monkeypatch)
    found = model(**batch, packing=packing).loss.item(), model.base_model.aux_loss().item()
    assert found == pytest.approx(expected, rel=1e-5)


def test_compilation_under_zero_3_is_an_error() -> None:
    config = make_config({"torch_compile": True})
    check_compilation(config, {"zero_optimization": {"stage": 2}})
    with pytest.raises(UserError, match="ZeRO-3"):
        check_compilation(config, {"zero_optimization": {"stage": 3}})
