"""Count the operations of adapted layers, which a GPU launches as kernels, in training and in decoding.

    python benchmarks/launches.py              every method
    python benchmarks/launches.py --check      exit with code 1 if C-LoRAE exceeds a limit

Counted are the operators that compute, as PyTorch dispatches them on a CPU; views and allocations are left out.
Training is forward and backward of 24 layers (1024 wide, rank 64) with the auxiliary loss, whose batched
part they share; decoding is a token after the first. Operations of the frozen layer and of the sum that is
differentiated are included, as one layer has them. LoRA has the rank 2r, other methods their defaults.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import peft
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

sys.path.insert(0, str(Path(__file__).parent))

from measure import description, results_file

from lvlm_clorae.adapters.register import adapter_method, method_names
from lvlm_clorae.files import write_text_atomic
from lvlm_clorae.training.config import TrainConfig

LAYERS, WIDTH, RANK, TOKENS = 24, 1024, 64, (4, 16)
TASKS = ["mner", "mre", "mee"]
NO_WORK = (
    "aten::alias aten::detach aten::empty aten::empty_like aten::empty_strided aten::lift_fresh aten::new_empty "
    "aten::new_empty_strided aten::promote_types aten::_unsafe_view"
).split()
"""Operators beside views that start no kernel."""
LIMITS = {"dropout 0.1": 60, "dropout 0": 50, "decoding": 8, "decoding, a task per row": 9}
"""Maximum operations of C-LoRAE per layer."""


class Launches(TorchDispatchMode):
    """Count the operators that compute while it is active."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name
        self.counts[name] += not (func.is_view or name in NO_WORK)
        return func(*args, **(kwargs or {}))


def build(method: str, dropout: float, layers: int, dtype: torch.dtype = torch.float32) -> Any:
    """Return a stack of linear layers with adapters; ``frozen`` has none."""
    names = [str(number) for number in range(layers)]
    base = nn.Sequential(*(nn.Linear(WIDTH, WIDTH, bias=False).requires_grad_(False) for _ in names))
    if method == "frozen":
        return base.to(dtype)
    rank = RANK * (2 if method == "lora" else 1)
    common = {"r": rank, "lora_alpha": None, "lora_dropout": dropout, "target_modules": names}
    if method == "lora":
        config: Any = peft.LoraConfig(**{**common, "lora_alpha": rank})
    else:
        config = adapter_method(method).make_config(common, TrainConfig(adapter=method), list(TASKS))
    model = peft.get_peft_model(base, config, autocast_adapter_dtype=False)
    if hasattr(model.base_model, "set_task"):
        model.base_model.set_task(0)
    return model.to(dtype)


def step(model: Any, x: torch.Tensor) -> None:
    """Run forward and backward with the auxiliary loss."""
    loss = model(x).sum()
    aux = getattr(getattr(model, "base_model", None), "aux_loss", None)
    if aux is not None:
        loss = loss + 0.01 * aux()
    loss.backward()


def in_training(method: str, dropout: float, layers: int = LAYERS, dtype: torch.dtype = torch.float32) -> Counter[str]:
    """Count the operations of a training step without the optimizer."""
    model = build(method, dropout, layers, dtype).train()
    x = torch.randn(*TOKENS, WIDTH, dtype=dtype, requires_grad=True)
    with Launches() as launches:
        step(model, x)
    return launches.counts


def per_layer(method: str, dropout: float, dtype: torch.dtype = torch.float32) -> float:
    """Return the operations of one layer, with its share of what 24 layers do together and all of a loss."""
    adapted, frozen = (in_training(name, dropout, dtype=dtype).total() for name in (method, "frozen"))
    return (adapted - frozen) / LAYERS + in_training("frozen", dropout, 1, dtype).total()


def in_decoding(method: str, task: Any = 0) -> int:
    """Return the operations of one layer for the second token of each row; ``task`` is an index, or one per row."""
    model = build(method, 0.1, 1).eval()
    if hasattr(model.base_model, "set_task"):
        model.base_model.set_task(task)
    x = torch.randn(TOKENS[0], 1, WIDTH)
    with torch.no_grad():
        model(x)
        with Launches() as launches:
            model(x)
    return launches.counts.total()


def measure(method: str) -> dict[str, float]:
    """Return the operations per layer in each setting."""
    rows = torch.arange(TOKENS[0]) % len(TASKS)
    return {
        "dropout 0.1": per_layer(method, 0.1),
        "dropout 0": per_layer(method, 0.0),
        "dropout 0.1, bf16": per_layer(method, 0.1, torch.bfloat16),
        "decoding": in_decoding(method),
        "decoding, a task per row": in_decoding(method, rows),
    }


def main(argv: list[str] | None = None) -> int:
    """Print and write the counts. Returns 1 if a limit is exceeded."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="exit with code 1 if a limit is exceeded")
    parser.add_argument("--output", type=Path, help="results file (results/launches-<date>.json)")
    options = parser.parse_args(argv)
    about = description(torch.device("cpu"))
    options.output = results_file(parser, options.output, f"launches-{about['date']}.json")
    found = {method: measure(method) for method in method_names()}
    for method, counts in found.items():
        print(f"{method:>10}  " + "  ".join(f"{name} {count:.1f}" for name, count in counts.items()))
    content = {"about": about, "limits": LIMITS, "per_layer": found}
    write_text_atomic(options.output, json.dumps(content, indent=1) + "\n")
    exceeded = [name for name, limit in LIMITS.items() if found["clorae"][name] > limit]
    print(f"exceeded: {', '.join(exceeded) or 'none'}; written to {options.output}")
    return int(options.check and bool(exceeded))


if __name__ == "__main__":
    raise SystemExit(main())
