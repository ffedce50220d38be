"""Time and saved bytes of forward and backward of one adapted layer, and of a whole FLAN-T5-base-sized model.

    python benchmarks/adapter_step.py                    every shape, dropout 0 and 0.1
    python benchmarks/adapter_step.py --whole-model      also the whole model
    python benchmarks/adapter_step.py --quick            smoke test: one small shape, three rounds
    python benchmarks/adapter_step.py --check            exit with code 1 if a limit of the summary is exceeded

It compares the frozen layer alone, PEFT's LoRA with as many trained parameters as C-LoRAE, C-LoRAE with its MIM loss, a
literal implementation of its equations, MoSLoRA and LoRAMoE. Ratios are medians over rounds of ratios.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import T5Config, T5ForConditionalGeneration

sys.path.insert(0, str(Path(__file__).parent))

from measure import description, interleaved, kept_bytes, ratio, results_file

from lvlm_clorae import CLoRAEConfig, LoRAMoEConfig, MoSLoRAConfig
from lvlm_clorae.files import write_text_atomic

TASKS = ["mner", "mre", "mee"]
BETA = 0.01
# model -> the paper's rank (128 for base, else 64), (d_in, d_out) of query and value, and of the feed-forward
SHAPES = {
    "flan-t5-base": (128, [(768, 768), (768, 2048), (2048, 768)]),
    "flan-t5-large": (64, [(1024, 1024), (1024, 2816), (2816, 1024)]),
    "flan-t5-xl": (64, [(2048, 2048), (2048, 5120), (5120, 2048)]),
    "llava-7b": (64, [(4096, 4096), (4096, 11008), (11008, 4096)]),
}
METHODS = ("frozen", "lora", "clorae", "plain", "moslora", "loramoe")
BARS = {"0.0": {"time": 0.95, "bytes": 0.95}, "0.1": {"time": 1.00, "bytes": 0.85}}


class PlainCLoRAE(nn.Module):
    """The equations as printed, one product after the other, with U and D of d_out values per token."""

    def __init__(self, base: nn.Linear, r: int, dropout: float, scaling: float = 1.0) -> None:
        super().__init__()
        self.scaling = scaling
        d_in, d_out, r_e = base.in_features, base.out_features, max(1, round(r / len(TASKS)))
        self.base, self.dropout = base, dropout
        self.A_U, self.B_U = nn.Parameter(torch.empty(r, d_in)), nn.Parameter(torch.empty(d_out, r))
        self.A_n, self.B_n = nn.Parameter(torch.empty(r_e, d_in)), nn.Parameter(torch.empty(d_out, r_e))
        self.W_g = nn.Parameter(torch.zeros(2, d_in))
        self.m, self.rho = nn.Parameter(torch.ones(d_out)), nn.Parameter(torch.full((d_out,), 0.53))
        self.mim: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        dropped = functional.dropout(x, self.dropout)
        U = functional.linear(functional.linear(dropped, self.A_U), self.B_U)
        D = functional.linear(functional.linear(dropped, self.A_n), self.B_n)
        g = functional.linear(x, self.W_g).float().softmax(-1).to(x.dtype)
        h = g[..., :1] * U + g[..., 1:] * D
        variance = functional.softplus(self.rho.float()) + 0.01
        gap = (U.detach() - self.m * D).float()
        self.mim = (gap**2 / (2 * variance) + variance.log() / 2).sum(-1).mean()
        return self.base(x) + self.scaling * h


def randomise(model: nn.Module) -> None:
    """Initialise all matrices randomly, so that no product is with zeros."""
    for parameter in model.parameters():
        if parameter.requires_grad and parameter.dim() >= 2:
            nn.init.normal_(parameter, std=0.02)


def trained(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def configs(r: int, dropout: float, lora_r: int, targets: list[str]) -> dict[str, peft.PeftConfig]:
    common: dict[str, Any] = {"lora_dropout": dropout, "target_modules": targets}
    return {
        "lora": peft.LoraConfig(r=lora_r, lora_alpha=lora_r, **common),
        "clorae": CLoRAEConfig(r=r, tasks=list(TASKS), **common),
        "moslora": MoSLoRAConfig(r=lora_r, **common),
        "loramoe": LoRAMoEConfig(r=r, tasks=list(TASKS), **common),
    }


def aux_loss(model: Any) -> Tensor | None:
    """Return the auxiliary loss of the last forward, None if the method has none."""
    if isinstance(model, PlainCLoRAE):
        return model.mim
    loss = getattr(getattr(model, "base_model", None), "aux_loss", None)
    return loss() if loss else None


def adapt(base: nn.Module, config: peft.PeftConfig, dtype: torch.dtype, device: torch.device) -> Any:
    model: Any = peft.get_peft_model(base, config, autocast_adapter_dtype=False)
    randomise(model)
    if hasattr(model.base_model, "set_task"):
        model.base_model.set_task(0)
    return model.to(device, dtype).train()


def layer_models(d_in: int, d_out: int, r: int, dropout: float, options: argparse.Namespace) -> dict[str, Any]:
    """Return a model of one linear layer for each method."""

    def base() -> nn.Linear:
        return nn.Linear(d_in, d_out, bias=False).requires_grad_(False)

    clorae = trained(peft.get_peft_model(nn.Sequential(base()), configs(r, dropout, r, ["0"])["clorae"]))
    # PEFT's LoRA has r (d_in + d_out) parameters; the task experts that are not in use count as parameters
    lora_r = round(clorae / (d_in + d_out))
    models: dict[str, Any] = {"frozen": base().to(options.device, options.dtype)}
    for name, config in configs(r, dropout, lora_r, ["0"]).items():
        models[name] = adapt(nn.Sequential(base()), config, options.dtype, options.device)
    models["plain"] = PlainCLoRAE(base(), r, dropout)
    randomise(models["plain"])
    models["plain"].to(options.device, options.dtype).train()
    return {name: models[name] for name in METHODS}


def step(model: nn.Module, forward: Callable[[], Tensor], upstream: Tensor | None) -> None:
    """Run forward and backward, the auxiliary loss included."""
    model.zero_grad(set_to_none=True)
    output = forward()
    aux = aux_loss(model)
    outputs = [output] if aux is None else [output, BETA * aux]
    torch.autograd.backward(outputs, [upstream] if aux is None else [upstream, None])


def measure_layer(
    name: str, d_in: int, d_out: int, r: int, dropout: float, options: argparse.Namespace
) -> dict[str, Any]:
    """Measure one layer shape: a row of the results."""
    torch.manual_seed(0)
    models = layer_models(d_in, d_out, r, dropout, options)
    x = torch.randn(1, options.tokens, d_in, device=options.device, dtype=options.dtype, requires_grad=True)
    dy = torch.randn(1, options.tokens, d_out, device=options.device, dtype=options.dtype)

    def one(model: nn.Module) -> Callable[[], None]:
        def run() -> None:
            x.grad = None
            step(model, lambda: model(x), dy)

        return run

    seconds = interleaved(
        {method: one(model) for method, model in models.items()}, options.repeats, options.device, options.seconds
    )
    return {
        "model": name,
        "d_in": d_in,
        "d_out": d_out,
        "r": r,
        "dropout": dropout,
        **figures(models, seconds, lambda model: model(x)),
    }


def measure_whole_model(dropout: float, options: argparse.Namespace) -> dict[str, Any]:
    """Measure a T5 of FLAN-T5-base's size with random weights, adapted at q and v."""
    config = T5Config(
        vocab_size=32128, d_model=768, d_ff=2048, num_layers=12, num_heads=12, dropout_rate=0.0,
        feed_forward_proj="gated-gelu", decoder_start_token_id=0,
    )  # fmt: skip

    def base() -> nn.Module:
        torch.manual_seed(0)
        return T5ForConditionalGeneration(config).requires_grad_(False)

    r = SHAPES["flan-t5-base"][0]
    models: dict[str, Any] = {}
    clorae = peft.get_peft_model(base(), configs(r, dropout, r, ["q", "v"])["clorae"])
    lora_r = round(trained(clorae) / (len(clorae.base_model.adapted_layers()) * 2 * config.d_model))
    for name, method in configs(r, dropout, lora_r, ["q", "v"]).items():
        models[name] = adapt(base(), method, options.dtype, options.device)
    models["frozen"] = base().to(options.device, options.dtype).train()
    embedded = torch.randn(4, 256, 768, device=options.device, dtype=options.dtype, requires_grad=True)
    labels = torch.randint(1, config.vocab_size, (4, 64), device=options.device)
    steps = {
        name: lambda model=model: step(model, lambda: model(inputs_embeds=embedded, labels=labels).loss, None)
        for name, model in models.items()
    }
    seconds = interleaved(steps, options.repeats, options.device, options.seconds)
    found = figures(models, seconds, lambda model: model(inputs_embeds=embedded, labels=labels).loss)
    return {"model": "whole flan-t5-base", "r": r, "dropout": dropout, **found}


def figures(
    models: dict[str, Any], seconds: dict[str, list[float]], forward: Callable[[Any], Tensor]
) -> dict[str, Any]:
    kept = {}
    for name, model in models.items():
        with kept_bytes(model) as count:
            output = forward(model), aux_loss(model)
            kept[name] = count()
        del output
    return {
        "rounds": len(seconds["lora"]),
        "trained_parameters": {name: trained(model) for name, model in models.items()},
        "milliseconds": {name: 1e3 * statistics.median(times) for name, times in seconds.items()},
        "time_by_lora": {name: ratio(seconds, name, "lora") for name in models},
        "time_by_frozen": {name: ratio(seconds, name, "frozen") for name in models},
        "kept_bytes": kept,
        "bytes_by_lora": {name: kept[name] / kept["lora"] for name in models},
    }


def summarise(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Return medians over the layer shapes, with their limits."""
    summary: dict[str, Any] = {}
    found: dict[str, tuple[float, float | None]]
    for dropout, bars in BARS.items():
        layers = [row for row in rows if str(row["dropout"]) == dropout and "d_in" in row]
        if not layers:
            continue
        found = {
            "time by lora": (statistics.median(row["time_by_lora"]["clorae"] for row in layers), bars["time"]),
            "bytes by lora": (statistics.median(row["bytes_by_lora"]["clorae"] for row in layers), bars["bytes"]),
            "bytes by plain": (
                statistics.median(row["kept_bytes"]["clorae"] / row["kept_bytes"]["plain"] for row in layers),
                0.6,
            ),
        }
        llava = [row["time_by_frozen"]["clorae"] for row in layers if row["model"] == "llava-7b"]
        if llava:
            found["time by frozen, llava-7b"] = (statistics.median(llava), 1.15 if dropout == "0.0" else None)
        summary[dropout] = {
            name: {"median": value, "bar": bar, "met": None if bar is None else value <= bar}
            for name, (value, bar) in found.items()
        }
    return summary


def table(rows: list[dict[str, Any]], summary: dict[str, Any]) -> str:
    lines = [
        "| layer | dropout | " + " | ".join(METHODS) + " |",
        "|---|---|" + "---|" * len(METHODS),
    ]
    for row in rows:
        shape = f"{row['model']}" + (f" {row['d_in']} to {row['d_out']}" if "d_in" in row else "") + f", r {row['r']}"
        cells = []
        for name in METHODS:
            if name not in row["milliseconds"]:
                cells.append("")
                continue
            cells.append(
                f"{row['milliseconds'][name]:.1f} ms, {row['time_by_lora'][name]:.3f}; "
                f"{row['kept_bytes'][name] / 2**20:.1f} MiB, {row['bytes_by_lora'][name]:.3f}"
            )
        lines.append(f"| {shape} | {row['dropout']} | " + " | ".join(cells) + " |")
    for dropout, found in summary.items():
        for name, entry in found.items():
            line = f"C-LoRAE, dropout {dropout}, {name}: {entry['median']:.3f}"
            if entry["bar"] is not None:
                line += f", to be <= {entry['bar']}: {'met' if entry['met'] else 'not met'}"
            lines.append(line)
    return "\n".join(lines)


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="*", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--attention-only", action="store_true", help="only query and value, the default targets")
    parser.add_argument("--whole-model", action="store_true")
    parser.add_argument("--device", type=torch.device, default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=("fp32", "bf16"), help="default: bf16 on a GPU, fp32 on a CPU")
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--repeats", type=int, default=6, help="minimum number of rounds per row")
    parser.add_argument("--seconds", type=float, default=20.0, help="minimum time per row [s]")
    parser.add_argument("--threads", type=int, help="torch's CPU threads; default: torch's own choice")
    parser.add_argument("--quick", action="store_true", help="one small shape, 128 tokens, three rounds")
    parser.add_argument("--check", action="store_true", help="exit with code 1 if a limit of the summary is exceeded")
    parser.add_argument("--output", type=Path, help="JSON file; default results/adapter_step-<device>-<date>.json")
    options = parser.parse_args(argv)
    if options.threads:
        torch.set_num_threads(options.threads)
    if options.quick:
        options.tokens, options.repeats, options.seconds = 128, 3, 0.0
    options.device = torch.device(options.device)
    dtype = options.dtype or ("bf16" if options.device.type == "cuda" else "fp32")
    options.dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[dtype]
    about = description(options.device)
    kind = "quick-" if options.quick else ""
    name = f"adapter_step-{kind}{options.device.type}-{about['date']}.json"
    options.output = results_file(parser, options.output, name)
    options.about = {
        **about,
        "dtype": dtype,
        "tokens": options.tokens,
        "repeats": options.repeats,
        "seconds": options.seconds,
    }
    return options


def main(argv: list[str] | None = None) -> int:
    """Measure, print and write the results. Returns 1 if ``--check`` is given and a limit is exceeded, else 0."""
    options = parse(argv)
    cases = [
        (name, d_in, d_out, r)
        for name in options.models
        for r, shapes in [SHAPES[name]]
        for d_in, d_out in (shapes[:1] if options.attention_only else shapes)
    ]
    if options.quick:
        cases = [("tiny", 64, 96, 12)]
    rows: list[dict[str, Any]] = []
    summary: dict[str, Any] = {}

    def add(row: dict[str, Any]) -> None:
        """Write after every row, since a run takes half an hour, and free the models, which form reference cycles."""
        rows.append(row)
        summary.update(summarise(rows))
        content = {"about": options.about, "summary": summary, "rows": rows}
        write_text_atomic(options.output, json.dumps(content, indent=1) + "\n")
        gc.collect()

    for dropout in (0.0, 0.1):
        for case in cases:
            print(f"{case[0]} {case[1]} to {case[2]}, dropout {dropout}", file=sys.stderr, flush=True)
            add(measure_layer(*case, dropout, options))
        if options.whole_model:
            print(f"whole model, dropout {dropout}", file=sys.stderr, flush=True)
            add(measure_whole_model(dropout, options))
    print(table(rows, summary))
    print(f"written to {options.output}")
    missed = any(entry["met"] is False for found in summary.values() for entry in found.values())
    return 1 if options.check and missed else 0


if __name__ == "__main__":
    raise SystemExit(main())
