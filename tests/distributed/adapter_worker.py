"""Worker for two ranks: each adapter method under ZeRO-2 and ZeRO-3, compared with one process without ZeRO.

Three micro-steps of tasks 2, 0, 2 are accumulated into one SGD step, with all parameters partitioned; then the adapter
is saved and loaded. Rank 0 writes the results to a JSON file, one entry per method and stage, for test_adapters.py.
"""

from __future__ import annotations

import contextlib
import json
import re
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
    "clorae, teacher not detached": lambda: lvlm_clorae.CLoRAEConfig(tasks=list(TASKS), r=4, mim_detach_teacher=False),
    "clorae, no gate": lambda: lvlm_clorae.CLoRAEConfig(tasks=list(TASKS), r=4, use_gate=False),
    "clorae, mixed tasks, checkpointing": lambda: lvlm_clorae.CLoRAEConfig(tasks=list(TASKS), r=4),
    "moslora": lambda: lvlm_clorae.MoSLoRAConfig(r=4),
    "loramoe": lambda: lvlm_clorae.LoRAMoEConfig(tasks=list(TASKS), r=4),
    "hydralora": lambda: lvlm_clorae.HydraLoRAConfig(r=4),
    "mtllora": lambda: lvlm_clorae.MTLLoRAConfig(tasks=list(TASKS), r=4),
    "mtllora, mixed tasks, checkpointing": lambda: lvlm_clorae.MTLLoRAConfig(tasks=list(TASKS), r=4),
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


def losses(
    name: str, model: torch.nn.Module, forward: torch.nn.Module, rank: int, number: int, task: int
) -> tuple[torch.Tensor, torch.Tensor | float]:
    """The cross-entropy and the weighted auxiliary loss of a micro-step."""
    tuner = model.base_model
    if hasattr(tuner, "set_task"):
        tuner.set_task(torch.tensor([task, 2]) if "mixed" in name else task)
    loss = forward(**batch(rank, number)).loss
    return loss, 0.1 * tuner.aux_loss() if hasattr(tuner, "aux_loss") else 0.0


def adapt(name: str, model: torch.nn.Module) -> torch.nn.Module:
    model = peft.get_peft_model(model, METHODS[name]()).train()
    if "checkpointing" in name:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model


def one_process(name: str, start: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return the weights after the step."""
    model = adapt(name, base())
    model.load_state_dict(start, strict=False)
    for rank in range(2):
        for number, task in enumerate((2, 0, 2)):
            (sum(losses(name, model, model, rank, number, task)) / 6).backward()
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
        model = adapt(name, partitioned)
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
        engine.backward(sum(losses(name, model, engine, rank, number, task)))
        engine.step()
    end = gathered_state(model)

    engine.eval()
    if hasattr(model.base_model, "set_task"):
        model.base_model.set_task(2)
    with torch.no_grad():
        logits = engine(**batch(0, 9)).logits
    found = {}
    if rank == 0:
        expected = one_process(name, start)
        with tempfile.TemporaryDirectory() as folder:
            model.save_pretrained(folder, state_dict=end)
            loaded = peft.PeftModel.from_pretrained(base(), folder).eval()
        if hasattr(loaded, "set_task"):
            loaded.set_task(2)
        with torch.no_grad():
            again = loaded(**batch(0, 9)).logits
        absent = [abs(end[key][1] - start[key][1]).max() for key in end if re.search(r"\.(expert|task)_", key)]
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
