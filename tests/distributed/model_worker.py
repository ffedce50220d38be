"""Worker of test_models.py, run on two ranks.

Each base is loaded partitioned under ZeRO-3, without persistent parameters, adapted, trained for one SGD step, and
generates answers. The same is done in one process. The rows of the ranks differ in their images. Rank 0 writes the
comparison to results.json, one entry per base.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import deepspeed
import torch
from torch import distributed as dist

from lvlm_clorae.models import load_model
from lvlm_clorae.models.constrained import Constraint
from lvlm_clorae.models.generation import generate_answers
from lvlm_clorae.training import distributed
from lvlm_clorae.training.adapters import add_adapter
from lvlm_clorae.training.config import TrainConfig
from tests.helpers.tiny import noise_image, save_plain_t5, save_tiny
from tests.helpers.tiny_causal import save_language, save_llava, save_tower
from tests.helpers.tiny_image_text import save_onevision, save_qwen

BASES: dict[str, tuple[Callable[[Path], Any], dict[str, Any]]] = {
    "own t5": (save_tiny, {}),
    "plain t5, gated": (lambda path: save_plain_t5(path, own_head=True), {"fusion": "gated"}),
    "causal": (save_language, {}),
    "llava": (save_llava, {}),
    "qwen2.5-vl": (save_qwen, {}),
    "llava-onevision": (save_onevision, {}),
}
NEEDS_TOWER = ("plain t5, gated", "causal")
RATE = 0.5
SETTINGS = {
    "train_micro_batch_size_per_gpu": 2,
    "gradient_accumulation_steps": 1,
    "gradient_clipping": 0.0,
    "zero_allow_untested_optimizer": True,
    "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
}


def rows(rank: int) -> tuple[list[str], list[Any], list[Any], list[str]]:
    """Return a rank's rows: rank 0 has an image with a box in one row, rank 1 has none."""
    prompts = [f"event arguments. objects: O1 <region> text: guards {rank}", "entities. text: Mara"]
    images = [noise_image(), None] if rank == 0 else [None, None]
    return prompts, images, [[[0, 0, 20, 15]], []], ["attack <spot> target, O1", "none"]


def adapted(directory: Path, options: dict[str, Any], settings: dict[str, Any]) -> tuple[Any, Any]:
    torch.manual_seed(0)
    with distributed.partitioned_loading(settings):
        model, processor = load_model(str(directory), **options)
    torch.manual_seed(1)  # loading partitioned weights uses other random numbers
    model = add_adapter(model, TrainConfig(lora_rank=4, lora_dropout=0.0), ["mner", "mre", "mee"])
    for module in model.modules():
        for rate in ("p", "dropout", "attention_dropout"):
            if isinstance(getattr(module, rate, None), float):
                setattr(module, rate, 0.0)
    generator = torch.Generator().manual_seed(5)
    for name, parameter in model.named_parameters():
        if "clorae_experts" in name:
            parameter.data += torch.randn(parameter.shape, generator=generator) / 10
    model.set_task("mre")
    return model.train(), processor


def loss_of(model: Any, forward: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    return forward(**batch, num_items_in_batch=8.0).loss + 0.1 * model.mutual_information_loss()


def answers_of(model: Any, processor: Any, batch: dict[str, torch.Tensor]) -> list[str]:
    """Generate unconstrained answers, and constrained ones, which end at different steps on the ranks."""
    model.eval()
    any_rank = distributed.any_rank if hasattr(next(model.parameters()), "ds_id") else None
    events = {"types": ["attack"] if dist.get_rank() else ["attack", "meet"], "roles": ["target"]}
    sample = {"text": "guards struck the harbour", "objects": [{"id": "O1"}]}
    constraint = Constraint(processor, [(sample, "argument", events), ({"text": "Mara"}, "entity", ["person"])])
    found: list[str] = []
    for length, used in ((8, None), (24, constraint)):
        with distributed.generating(model):
            found += generate_answers(model, processor, batch, length, constraint=used, any_rank=any_rank)
    return found


def run(directory: Path, options: dict[str, Any]) -> dict[str, Any]:
    rank = dist.get_rank()
    plain, processor = adapted(directory, options, {})
    batches = [processor(*rows(number)) for number in range(2)]
    untrained = answers_of(plain, processor, processor(*rows(rank)[:3]))
    plain.train()
    loss = sum(loss_of(plain, plain, batch) for batch in batches) / 2
    loss.backward()
    expected = {name: p.detach() - RATE * p.grad for name, p in plain.named_parameters() if p.requires_grad}
    with torch.no_grad():
        for name, parameter in plain.named_parameters():
            if parameter.requires_grad:
                parameter.copy_(expected[name])

    model, _ = adapted(directory, options, SETTINGS)
    partitioned = [p for p in model.parameters() if hasattr(p, "ds_numel")]
    share = sum(p.ds_tensor.numel() for p in partitioned) / sum(p.ds_numel for p in partitioned)
    at_load = sum(p.ds_numel for p in partitioned) / sum(p.numel() for p in plain.parameters() if not p.requires_grad)
    trained = [p for p in model.parameters() if p.requires_grad]
    distributed.keep_towers_whole(model)
    optimizer = torch.optim.SGD(trained, lr=RATE)
    engine, *_ = deepspeed.initialize(model=model, model_parameters=trained, optimizer=optimizer, config=SETTINGS)
    asked = processor(*rows(rank)[:3])
    before = answers_of(model, processor, asked)  # a resumed run may evaluate before it trains
    model.train()
    theirs = loss_of(model, engine, batches[rank])
    engine.backward(theirs)
    engine.step()
    end = distributed.gathered_state(model)
    mean = distributed.sum_over_ranks(theirs.detach().clone()) / 2

    after = answers_of(model, processor, asked)
    found = {
        "share": share,
        "at_load": at_load,
        "loss": abs(mean.item() - loss.item()),
        "answers": [before, after] == [untrained, answers_of(plain, processor, asked)],
    }
    if rank == 0:
        found["difference"] = max((end[name] - expected[name]).abs().max().item() for name in expected)
        found["weights"] = [len(end), len(expected)]
    gathered: list[Any] = [None, None]
    dist.all_gather_object(gathered, found["answers"])
    return {**found, "answers": all(gathered)}


def main() -> None:
    distributed.start()
    directory = Path(sys.argv[-1])
    results = {}
    for name, (save, options) in BASES.items():
        path = directory / name.replace(" ", "_")
        if dist.get_rank() == 0:
            save(path)
            if name in NEEDS_TOWER:
                save_tower(path / "tower")
        dist.barrier()
        tower = {"vision": f"local-dir:{path / 'tower'}"} if name in NEEDS_TOWER else {}
        results[name] = run(path, {**options, **tower})
    if dist.get_rank() == 0:
        (directory / "results.json").write_text(json.dumps(results), encoding="utf-8")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
