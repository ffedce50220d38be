"""Adapted linear layers in bf16: time, kernels and saved bytes of forward and backward."""

from __future__ import annotations

import statistics
from functools import partial
from typing import Any, NamedTuple

import peft
import torch
from measure import interleaved, kept_bytes, ratio
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from lvlm_clorae import CLoRAEConfig

TASKS = ["mner", "mre", "mee"]


class Shape(NamedTuple):
    """A layer, the rank r of C-LoRAE, and the number of tokens in a batch."""

    d_in: int
    d_out: int
    r: int
    tokens: int = 8192


SHAPES = {
    "flan-t5-base": Shape(768, 2048, 128),
    "flan-t5-large": Shape(1024, 2816, 64),
    "flan-t5-xl": Shape(2048, 5120, 64),
    "llava-1.5-7b": Shape(4096, 11008, 64),
}
QUICK = {"tiny": Shape(32, 48, 4, 64)}
LAYERS = 8
"""Layers of a stack, which share the batched part of the auxiliary loss; figures are per layer."""
METHODS = ("frozen", "lora", "clorae")


class Stack(nn.Module):
    """Frozen layers that read the same input."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(shape.d_in, shape.d_out, bias=False) for _ in range(LAYERS))
        self.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([layer(x).mean() for layer in self.layers]).sum()


def adapted(base: Any, method: str, r: int, **common: Any) -> Any:
    """Return the frozen base with an adapter; LoRA of rank 2 r has as many parameters as C-LoRAE of rank r."""
    if method == "lora":
        config: Any = peft.LoraConfig(r=2 * r, lora_alpha=4 * r, **common)
    else:
        config = CLoRAEConfig(r=r, tasks=TASKS, **common)
    model = peft.get_peft_model(base, config, autocast_adapter_dtype=False)
    if method == "clorae":
        model.base_model.set_task(TASKS[0])
    return model


def build(method: str, shape: Shape, dropout: float, device: torch.device) -> Any:
    """Return the stack, with adapters unless the method is ``frozen``."""
    stack: Any = Stack(shape)
    if method != "frozen":
        stack = adapted(stack, method, shape.r, lora_dropout=dropout, target_modules=r".*layers\.\d+")
    return stack.to(device, torch.bfloat16).train()


def step(stack: Any, x: Tensor) -> None:
    """Run forward and backward of all layers, with the auxiliary loss."""
    loss = stack(x)
    if aux := getattr(getattr(stack, "base_model", None), "aux_loss", None):
        loss = loss + 0.01 * aux()
    loss.backward()


def kernels(stack: Any, x: Tensor) -> float:
    """Return the kernels of a layer on a GPU, and the operators that compute on a CPU."""
    if x.device.type == "cpu":
        from launches import Launches  # needs the package's requirements, which a GPU's environment may lack

        with Launches() as launches:
            step(stack, x)
        return launches.counts.total() / LAYERS
    with profile(activities=[ProfilerActivity.CUDA]) as profiled:
        step(stack, x)
        torch.cuda.synchronize()
    return sum(event.device_type.name == "CUDA" for event in profiled.events()) / LAYERS


def measure(shape: Shape, device: torch.device) -> dict[str, Any]:
    """Return by dropout and method: milliseconds, kernels and saved MiB per layer, and ratios to LoRA."""
    found: dict[str, Any] = {}
    for dropout in (0.0, 0.1):
        x = torch.randn(shape.tokens, shape.d_in, device=device, dtype=torch.bfloat16, requires_grad=True)
        stacks = {method: build(method, shape, dropout, device) for method in METHODS}
        steps = {method: partial(step, stack, x) for method, stack in stacks.items()}
        seconds = interleaved(steps, 5, device, at_least=0 if device.type == "cpu" else 2)
        rows: dict[str, Any] = {}
        for method, stack in stacks.items():
            with kept_bytes(stack) as kept:
                stack(x)
                saved = kept() / LAYERS
            time = 1000 * statistics.median(seconds[method]) / LAYERS
            rows[method] = {"ms": time, "kernels": kernels(stack, x), "saved_mib": saved / 2**20}
        rows["clorae_by_lora"] = {"time": ratio(seconds, "clorae", "lora")}
        rows["clorae_by_lora"]["bytes"] = rows["clorae"]["saved_mib"] / rows["lora"]["saved_mib"]
        found[f"dropout {dropout:g}"] = rows
    return found


def table(results: dict[str, Any]) -> str:
    """Format the sections of layers as Markdown."""
    lines = ["| layer | dropout | frozen [ms] | LoRA [ms] | C-LoRAE [ms] | time by LoRA | kernels | bytes by LoRA |"]
    lines.append("|---|---|---:|---:|---:|---:|---:|---:|")
    for name, by_dropout in results.items():
        if not name.startswith("layers/"):
            continue
        for dropout, rows in by_dropout.items():
            times = " | ".join(f"{rows[method]['ms']:.3f}" for method in METHODS)
            counts = " / ".join(f"{rows[method]['kernels']:.0f}" for method in METHODS)
            ratios = rows["clorae_by_lora"]
            shown = f"{name.removeprefix('layers/')} | {dropout.removeprefix('dropout ')} | {times}"
            lines.append(f"| {shown} | {ratios['time']:.2f} | {counts} | {ratios['bytes']:.2f} |")
    return "\n".join(lines)
