"""Forward and backward of a whole causal language model, all linear layers adapted, in fp32 and bf16.

    python benchmarks/whole_step.py --base DIR            SmolLM2-135M of recipes/real_base
    python benchmarks/whole_step.py --base DIR --check    exit with code 1 if a limit is exceeded
    python benchmarks/whole_step.py --quick               smoke test: a tiny random model, two rounds

It compares the frozen model, PEFT's LoRA of rank r, and C-LoRAE of rank r / 2 with its MIM loss, which has about as
many trained parameters. Ratios are medians over rounds of ratios. The limits are for CPUs with AMX, whose products in
bf16 are so fast that small operations count, as on a GPU; `amx` in the results says whether the CPU has it.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

sys.path.insert(0, str(Path(__file__).parent))

from adapter_step import TASKS, adapt, step, trained
from measure import description, interleaved, ratio, results_file

from lvlm_clorae import CLoRAEConfig
from lvlm_clorae.files import write_text_atomic

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
LIMITS = {"fp32": 0.80, "bf16": 0.95}
"""Most time of C-LoRAE relative to LoRA on a CPU with AMX."""
METHODS = ("frozen", "lora", "clorae")


def measure(dtype: str, dropout: float, options: argparse.Namespace) -> dict[str, Any]:
    """Measure the three models in one dtype: a row of the results."""
    common: dict[str, Any] = {"target_modules": "all-linear", "lora_dropout": dropout}
    configs = {
        "lora": peft.LoraConfig(r=options.rank, lora_alpha=2 * options.rank, task_type="CAUSAL_LM", **common),
        "clorae": CLoRAEConfig(r=options.rank // 2, tasks=TASKS, task_type="CAUSAL_LM", **common),
    }
    cpu = torch.device("cpu")
    models: dict[str, Any] = {"frozen": load(options).to(DTYPES[dtype]).train()}
    models |= {name: adapt(load(options), config, DTYPES[dtype], cpu) for name, config in configs.items()}
    tokens = torch.randint(models["frozen"].config.vocab_size, (options.rows, options.length))
    embedded = models["frozen"].get_input_embeddings()(tokens).detach().requires_grad_()

    def one(model: Any) -> Callable[[], None]:
        return lambda: step(model, lambda: model(inputs_embeds=embedded, labels=tokens).loss, None)

    seconds = interleaved({name: one(model) for name, model in models.items()}, options.repeats, cpu)
    return {
        "dtype": dtype,
        "dropout": dropout,
        "trained_parameters": {name: trained(model) for name, model in models.items()},
        "seconds": {name: statistics.median(times) for name, times in seconds.items()},
        "time_by_lora": {name: ratio(seconds, name, "lora") for name in models},
    }


def load(options: argparse.Namespace) -> Any:
    """Return the frozen base."""
    torch.manual_seed(0)
    if options.quick:
        shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
        model: Any = LlamaForCausalLM(LlamaConfig(**shape, vocab_size=64))
    else:
        model = AutoModelForCausalLM.from_pretrained(options.base, dtype=torch.float32)
    return model.requires_grad_(False)


def table(rows: list[dict[str, Any]]) -> str:
    """Return a Markdown table of the times and ratios."""
    lines = [
        "| dtype | dropout | frozen [s] | LoRA [s] | C-LoRAE [s] | C-LoRAE by LoRA |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for row in rows:
        times = " | ".join(f"{row['seconds'][name]:.2f}" for name in METHODS)
        lines.append(f"| {row['dtype']} | {row['dropout']} | {times} | {row['time_by_lora']['clorae']:.3f} |")
    return "\n".join(lines)


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", help="directory or Hub id of the causal language model")
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--rank", type=int, default=64, help="rank of LoRA; C-LoRAE's universal expert has half of it")
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--length", type=int, default=128, help="tokens of a row")
    parser.add_argument("--repeats", type=int, default=7, help="rounds")
    parser.add_argument("--threads", type=int, help="torch's CPU threads; default: torch's own choice")
    parser.add_argument("--quick", action="store_true", help="a tiny random model, 16 tokens a row, two rounds")
    parser.add_argument("--check", action="store_true", help="exit with code 1 if a limit is exceeded")
    parser.add_argument("--output", type=Path, help="JSON file; default results/whole_step-cpu-<date>.json")
    options = parser.parse_args(argv)
    if not (options.base or options.quick):
        parser.error("give a model with --base DIR, or --quick")
    if options.quick:
        options.rank, options.length, options.repeats = 8, 16, 2
    if options.threads:
        torch.set_num_threads(options.threads)
    about = description(torch.device("cpu"))
    name = f"whole_step-{'quick-' if options.quick else ''}cpu-{about['date']}.json"
    options.output = results_file(parser, options.output, name)
    settings = {name: getattr(options, name) for name in ("rank", "rows", "length", "repeats")}
    options.about = {**about, "amx": torch.cpu._is_amx_tile_supported(), **settings}
    return options


def main(argv: list[str] | None = None) -> int:
    """Measure, print and write the results. Returns 1 if ``--check`` is given and a limit is exceeded, else 0."""
    options = parse(argv)
    rows = []
    for dtype in options.dtypes:
        for dropout in (0.0, 0.1):
            rows.append(measure(dtype, dropout, options))
            print(f"{dtype}, dropout {dropout}: {rows[-1]['seconds']}", file=sys.stderr, flush=True)
            write_text_atomic(options.output, json.dumps({"about": options.about, "rows": rows}, indent=1) + "\n")
    print(table(rows))
    print(f"written to {options.output}")
    exceeded = [row for row in rows if row["time_by_lora"]["clorae"] > LIMITS[row["dtype"]]]
    return 1 if options.check and exceeded else 0


if __name__ == "__main__":
    raise SystemExit(main())
