"""Run by the deepspeed launcher on two ranks: each adapter method under ZeRO, against one process without it.

Three micro-steps of tasks 2, 0, 2 are accumulated into one SGD step, nothing persistent; then the adapter is saved and
loaded. What is found goes to rank 0's JSON file, one entry a method and stage; the test judges it.
"""

from __future__ import annotations

import contextlib
import json
import sys
import tempfile
from pathlib import Path

import deepspeed
import peft
import torch
from torch import distributed as dist
from transformers import T5Config, T5ForConditionalGeneration

import lvlm_clorae
from lvlm_clorae.training.distributed import gathered_state

TASKS = ["mner", "mre", "mee"]
METHODS = {
    "clorae": lambda: lvlm_clorae.CLoRAEConfig(tasks=list(TASKS), r=4, target_modules=["q", "v", "wi"]),
    "clorae, drawn tokens": lambda: lvlm_clorae.CLoRAEConfig(tasks=list(TASKS), r=4, mim_tokens=3),
    "clorae, no gate": lambda: lvlm_clorae.CLoRAEConfig(tasks=list(TASKS), r=4, use_gate=False),
    "moslora": lambda: lvlm_clorae.MoSLoRAConfig(r=4),
    "loramoe": lambda: lvlm_clorae.LoRAMoEConfig(tasks=list(TASKS), r=4),
}
RATE = 0.5


def base() -> T5ForConditionalGeneration:
    torch.manual_seed(0)
    config = T5Config(
        vocab_size=40, d_model=16, d_kv=4, d_ff=24, num_layers=1, num_heads=4, dropout_rate=0.0,
        decoder_start_token_id=0, tie_word_embeddings=False,
    )  # fmt: skip
    return T5ForConditionalGeneration(config)


def batch(rank: int, number: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(100 * rank + number)
    ids, labels = (torch.randint(1, 40, (2, length), generator=generator) for length in (6 + rank, 4))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


def loss_of(model: torch.nn.Module, forward: torch.nn.Module, rank: int, number: int, task: int) -> torch.Tensor:
    tuner = model.base_model
    if hasattr(tuner, "set_task"):
        tuner.set_task(task)
    torch.manual_seed(100 * rank + number)  # of the drawn tokens
    loss = forward(**batch(rank, number)).loss
    side = getattr(tuner, "mutual_information_loss", None) or getattr(tuner, "balance_loss", None)
    return loss + 0.1 * side() if side else loss


def alone(name: str, start: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The weights after the step, in one process."""
    model = peft.get_peft_model(base(), METHODS[name]()).train()
    model.load_state_dict(start, strict=False)
    for rank in range(2):
        for number, task in enumerate((2, 0, 2)):
            (loss_of(model, model, rank, number, task) / 6).backward()
    return {key: p.detach() - RATE * p.grad for key, p in model.named_parameters() if p.requires_grad}


def run(name: str, stage: int) -> dict[str, float]:
    rank = dist.get_rank()
    settings = {
        "train_micro_batch_size_per_gpu": 2,
        "gradient_accumulation_steps": 3,
        "gradient_clipping": 0.0,
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
    }
    inside = deepspeed.zero.Init(config_dict_or_path=settings) if stage == 3 else contextlib.nullcontext()
    plain = base()
    with inside:
        partitioned = base()
    for value, parameter in zip(plain.parameters(), partitioned.parameters(), strict=True):
        with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0):
            parameter.data.copy_(value.data)  # transformers' own initialisation does not reach partitioned weights
    with inside:
        model = peft.get_peft_model(partitioned, METHODS[name]()).train()
    prefix = model.base_model.prefix
    generator = torch.Generator().manual_seed(5)
    for key, parameter in model.named_parameters():
        if prefix in key:
            with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0):
                if rank == 0 or stage == 2:
                    parameter.data += torch.randn(parameter.shape, generator=generator) / 3
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=RATE)
    engine, *_ = deepspeed.initialize(model=model, model_parameters=trained, optimizer=optimizer, config=settings)
    start = gathered_state(model)
    for number, task in enumerate((2, 0, 2)):
        engine.backward(loss_of(model, engine, rank, number, task))
        engine.step()
    end = gathered_state(model)

    engine.eval()
    with torch.no_grad():
        logits = engine(**batch(0, 9)).logits
    found = {}
    if rank == 0:
        expected = alone(name, start)
        with tempfile.TemporaryDirectory() as folder:
            model.save_pretrained(folder, state_dict=end)
            loaded = peft.PeftModel.from_pretrained(base(), folder).eval()
        if hasattr(loaded, "set_task"):
            loaded.set_task(2)
        with torch.no_grad():
            again = loaded(**batch(0, 9)).logits
        absent = [abs(end[key][1] - start[key][1]).max() for key in end if ".expert_" in key]
        found = {
            "weights": len(end),
            "expected": len(expected),
            "difference": max((end[key] - expected[key]).abs().max().item() for key in expected),
            "moved": min((end[key] - start[key]).abs().max().item() for key in expected),
            "reloaded": (again - logits).abs().max().item(),
            "absent": float(max(absent, default=0.0)),
        }
    dist.barrier()
    return found


def main() -> None:
    deepspeed.init_distributed(auto_mpi_discovery=False)
    results = {f"{name}/{stage}": run(name, stage) for name in METHODS for stage in (2, 3)}
    if dist.get_rank() == 0:
        Path(sys.argv[-1]).write_text(json.dumps(results), encoding="utf-8")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
