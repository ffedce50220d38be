"""The whole job beside what else one would use: transformers' Trainer with PEFT's LoRA.

    python benchmarks/peers.py --shards DIR --base DIR         SmolLM2 of recipes/real_base, and a random FLAN-T5-base
    python benchmarks/peers.py --shards DIR --kinds t5         the T5 alone
    python benchmarks/peers.py --quick                         a smoke test: tiny bases, few steps, one round
    python benchmarks/peers.py ... --check                     exit code 1 if a limit is not met

All train adapters on all linear layers of the same base, LoRA of rank r or C-LoRAE of rank r / 2, on the same samples
in random order, with the same micro-batch, precision and AdamW. Each run is a process of its own: the time is the
median between optimizer steps, the memory the process's peak. The runs of a round follow one another; ratios are
medians over rounds. Generation answers the same test prompts, all with the same number of new tokens: by the job's
evaluation, and by ``generate`` on padded batches in the order of the data. Images are not read.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch.optim.optimizer import register_optimizer_step_post_hook

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parent))

from measure import description, results_file, rotated

from lvlm_clorae.files import write_text_atomic

JOB, JOB_LORA, TRAINER = "job, C-LoRAE", "job, LoRA", "Trainer, PEFT LoRA"
LIMITS = {"training": 1.3, "memory": 0.65, "generation": 1.2}
"""Least samples per second and most memory of the job with C-LoRAE relative to Trainer."""
T5_SHAPE = {"d_model": 768, "d_kv": 64, "d_ff": 2048, "num_layers": 12, "num_heads": 12}
TINY = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}
WARM_UP = 2
"""Steps that are not timed."""
Row = dict[str, list[int]]


def main(argv: list[str] | None = None) -> int:
    """Measure, print the table and write the results. Returns 1 if ``--check`` finds a limit that is not met."""
    options = parse(argv)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        prepare_shards(Path(folder), options)
        for kind in options.kinds:
            made = options.base is None or kind == "t5"
            base = make_base(Path(folder) / kind, kind, options) if made else Path(options.base)
            rounds = [measure_round(kind, base, number, options) for number in range(options.rounds)]
            rows.append({"base": kind, "rounds": rounds, "ratios": ratios(rounds)})
    print(table(rows))
    write_text_atomic(options.output, json.dumps({"about": options.about, "rows": rows}, indent=1) + "\n")
    print(f"written to {options.output}")
    missed = [f"{row['base']}: {name}" for row in rows for name in LIMITS if not is_met(name, row["ratios"][name])]
    if options.check and missed:
        print(f"not met: {', '.join(missed)}")
    return 1 if options.check and missed else 0


def measure_round(kind: str, base: Path, number: int, options: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Run every contender once, each in a process of its own."""
    found: dict[str, dict[str, float]] = {}
    for contender in rotated([JOB, JOB_LORA, TRAINER], number):
        found[contender] = {}
        for phase in ("train", "generate"):
            given = {name: value for name, value in vars(options).items() if name not in ("about", "output")}
            given |= {"contender": contender, "base": base, "kind": kind, "phase": phase}
            line = [sys.executable, __file__, "--child", json.dumps(given, default=str)]
            environment = {**os.environ, "OMP_NUM_THREADS": str(options.threads), "CUDA_VISIBLE_DEVICES": ""}
            out = subprocess.run(line, env=environment, stdout=subprocess.PIPE, text=True, check=True).stdout
            found[contender] |= json.loads(out.splitlines()[-1])
        print(f"round {number + 1}, {kind}, {contender}: {found[contender]}", flush=True)
    return found


def child(given: dict[str, Any]) -> None:
    """Train or generate as one contender, and print the figures as the last line."""
    options = argparse.Namespace(**given)
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    job = options.contender in (JOB, JOB_LORA)
    if options.phase == "generate":
        found = {"answers_per_second": (generate_job if job else generate_peer)(options)}
    else:
        times: list[float] = []
        register_optimizer_step_post_hook(lambda *_: times.append(time.perf_counter()))
        (train_job if job else train_peer)(options)
        median = statistics.median(after - before for before, after in pairwise(times[WARM_UP:]))
        found = {"samples_per_second": options.batch_size / median}
        found["peak_gib"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(json.dumps(found))


def train_job(options: argparse.Namespace) -> None:
    """Run the job of train.py."""
    from lvlm_clorae.training.main import main as job

    with tempfile.TemporaryDirectory() as folder:
        settings: dict[str, object] = {
            "model": options.base,
            "vision": "none",
            "shards": options.train_shards,
            "output_dir": Path(folder) / "run",
            **adapter(options),
            "target_modules": "all-linear",
            "lora_dropout": options.dropout,
            "max_steps": options.steps,
            "per_device_train_batch_size": options.batch_size,
            "max_source_length": options.max_length,
            "max_target_length": options.max_length,
            "bf16": options.bf16,
            "deepspeed": "zero2",
        }
        line = [word for name, value in settings.items() for word in (f"--{name}", str(value))]
        if code := job(line):
            raise SystemExit(code)


def adapter(options: argparse.Namespace) -> dict[str, Any]:
    """Return the settings of the job's adapter."""
    clorae = options.contender == JOB
    return {"adapter": "clorae" if clorae else "lora", "lora_rank": options.rank // 2 if clorae else options.rank}


def train_peer(options: argparse.Namespace) -> None:
    """Train LoRA with transformers' Trainer."""
    import transformers

    rows = training_rows(options)
    settings = {
        "per_device_train_batch_size": options.batch_size,
        "max_steps": options.steps,
        "learning_rate": 1e-4,
        "optim": "adamw_torch",
        "bf16": options.bf16,
        "use_cpu": True,
        "report_to": [],
        "save_strategy": "no",
        "logging_steps": 10,
        "disable_tqdm": True,
    }
    with tempfile.TemporaryDirectory() as folder:
        model, tokenizer = peft_model(options)
        collate = transformers.DataCollatorForSeq2Seq(tokenizer, pad_to_multiple_of=8)
        arguments = transformers.TrainingArguments(folder, **settings)
        transformers.Trainer(model, arguments, collate, rows).train()


def peft_model(options: argparse.Namespace) -> tuple[Any, Any]:
    """Return the base with LoRA on all linear layers, and its tokenizer."""
    import peft
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(options.base)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    auto = transformers.AutoModelForCausalLM if options.kind == "causal" else transformers.AutoModelForSeq2SeqLM
    base = auto.from_pretrained(options.base, dtype=torch.bfloat16 if options.bf16 else torch.float32)
    settings = {"r": options.rank, "lora_alpha": 2 * options.rank, "lora_dropout": options.dropout}
    return peft.get_peft_model(base, peft.LoraConfig(**settings, target_modules="all-linear")), tokenizer


def questions(shards: str, split: str) -> list[tuple[str, str]]:
    """Return prompt and answer of all samples of a split."""
    from lvlm_clorae.data.index import load_index
    from lvlm_clorae.data.reader import read_samples
    from lvlm_clorae.tasks import build_prompt, format_answer

    index = load_index(Path(shards))
    return [
        (build_prompt(sample, task.subtask, task.labels, region_tokens=False), format_answer(sample, task.subtask))
        for task in index.dataset_tasks(split).values()
        for _, sample, _ in read_samples(Path(shards), index, task.dataset, split)
    ]


def processor_of(options: argparse.Namespace) -> Any:
    from lvlm_clorae.models import load_model

    return load_model(options.base, vision="none")[1]


def training_rows(options: argparse.Namespace) -> list[Row]:
    """Return the token ids and labels of the training samples, as the job's processor makes them."""
    processor, rows = processor_of(options), []
    for prompt, answer in questions(options.train_shards, "train"):
        batch = processor.encode([prompt], [None], [[]], [answer], (options.max_length, options.max_length))
        kept = batch["attention_mask"][0].bool()
        ids, labels = batch["input_ids"][0][kept].tolist(), [one for one in batch["labels"][0].tolist() if one != -100]
        if options.kind == "causal":
            labels = [-100] * (len(ids) - len(labels)) + labels
        rows.append({"input_ids": ids, "attention_mask": [1] * len(ids), "labels": labels})
    return rows


def generate_job(options: argparse.Namespace) -> float:
    """Return the answers per second of the job's evaluation of C-LoRAE or LoRA."""
    from lvlm_clorae.data.collate import Collator
    from lvlm_clorae.data.dataset import ShardDataset
    from lvlm_clorae.data.index import load_index
    from lvlm_clorae.models import load_model
    from lvlm_clorae.tasks.schema import in_task_order
    from lvlm_clorae.training import distributed
    from lvlm_clorae.training.adapters import add_adapter
    from lvlm_clorae.training.config_loading import make_config
    from lvlm_clorae.training.evaluation import Evaluator

    distributed.start()
    index = load_index(Path(options.test_shards))
    model, processor = load_model(options.base, vision="none", dtype=torch.bfloat16 if options.bf16 else torch.float32)
    tasks = in_task_order(entry.task for entry in index.datasets.values())
    adapted = add_adapter(model, make_config({**adapter(options), "target_modules": ["all-linear"]}), tasks)
    model.generation_config.min_new_tokens = options.new_tokens
    dataset = ShardDataset(index, Path(options.test_shards), "test")
    collator = Collator(processor, index.dataset_tasks("test"), options.max_length, options.new_tokens)
    evaluator = Evaluator(dataset, collator, options.eval_batch_size, options.new_tokens)
    return rate_of(lambda: evaluator(adapted), len(evaluator))


def generate_peer(options: argparse.Namespace) -> float:
    """Return the answers per second of ``generate``, batch by batch in the order of the data."""
    model, tokenizer = peft_model(options)
    model.eval()
    processor = processor_of(options)
    asked = questions(options.test_shards, "test")
    length = {"max_new_tokens": options.new_tokens, "min_new_tokens": options.new_tokens}

    def answer() -> None:
        for start in range(0, len(asked), options.eval_batch_size):
            prompts = [prompt for prompt, _ in asked[start : start + options.eval_batch_size]]
            none: list[Any] = [None] * len(prompts)
            batch = processor.encode(prompts, none, [[]] * len(prompts), None, (options.max_length, 1))
            tokens = model.generate(**batch, **length, do_sample=False, pad_token_id=tokenizer.pad_token_id)
            tokenizer.batch_decode(tokens, skip_special_tokens=True)

    return rate_of(answer, len(asked))


def rate_of(answer: Any, number: int) -> float:
    began = time.perf_counter()
    answer()
    return number / (time.perf_counter() - began)


def prepare_shards(folder: Path, options: argparse.Namespace) -> None:
    """Write the samples of all runs: those to train on, and those to answer."""
    from real_data import write_subset

    from lvlm_clorae.data.index import load_index

    limits = {"train": 2 * options.steps * options.batch_size, "test": options.answers}
    for split, limit in limits.items():
        shards = folder / split
        setattr(options, f"{split}_shards", str(shards))
        for name in load_index(Path(options.shards)).datasets:
            write_subset(Path(options.shards), shards, name, {split: limit}, None)


def make_base(folder: Path, kind: str, options: argparse.Namespace) -> Path:
    """Save a random base in the layout of the hub, with a tokenizer of the training samples."""
    from recipes.pretraining import tokenizer_of
    from transformers import LlamaConfig, LlamaForCausalLM, T5Config, T5ForConditionalGeneration

    tokenizer = tokenizer_of([text for row in questions(options.train_shards, "train") for text in row], 8000)
    shape = TINY if options.quick else T5_SHAPE
    if kind == "t5":
        settings = {"feed_forward_proj": "gated-gelu", "dropout_rate": 0.0, "decoder_start_token_id": 0}
        size = max(len(tokenizer), 512 if options.quick else 32128)
        model: Any = T5ForConditionalGeneration(T5Config(**shape, **settings, vocab_size=size))
    else:
        shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
        model = LlamaForCausalLM(LlamaConfig(**shape, vocab_size=len(tokenizer)))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(str(folder))
    return folder


def ratios(rounds: list[dict[str, dict[str, float]]]) -> dict[str, float]:
    """Return the medians over rounds of the job with C-LoRAE relative to Trainer."""
    names = {"training": "samples_per_second", "memory": "peak_gib", "generation": "answers_per_second"}
    return {
        what: statistics.median(one[JOB][figure] / one[TRAINER][figure] for one in rounds)
        for what, figure in names.items()
    }


def is_met(name: str, ratio: float) -> bool:
    return ratio <= LIMITS[name] if name == "memory" else ratio >= LIMITS[name]


def table(rows: list[dict[str, Any]]) -> str:
    """Format medians over rounds, and the ratios with their limits, as Markdown."""
    lines = [
        "| base | | training [samples/s] | peak memory [GiB] | generation [answers/s] |",
        "|---|---|---:|---:|---:|",
    ]
    for row in rows:
        for contender in row["rounds"][0]:
            cells = []
            for figure in ("samples_per_second", "peak_gib", "answers_per_second"):
                values = [one[contender][figure] for one in row["rounds"] if figure in one[contender]]
                cells.append(f"{statistics.median(values):.2f}" if values else "")
            lines.append(f"| {row['base']} | {contender} | {' | '.join(cells)} |")
        found = [f"**{row['ratios'][name]:.2f}** ({LIMITS[name]:g})" for name in LIMITS]
        lines.append(f"| {row['base']} | {JOB} by {TRAINER} (limit) | {' | '.join(found)} |")
    return "\n".join(lines)


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shards", default="shards/demo", help="directory of shards (shards/demo)")
    parser.add_argument("--base", help="directory of a causal language model; a tiny random one by default")
    parser.add_argument("--kinds", nargs="+", choices=("causal", "t5"), default=["causal", "t5"])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=16, help="optimizer steps of a run (16)")
    parser.add_argument("--batch_size", type=int, default=16, help="samples of a micro-batch, which is a step (16)")
    parser.add_argument("--eval_batch_size", type=int, default=32)
    parser.add_argument("--answers", type=int, default=64, help="test samples of a dataset to answer (64)")
    parser.add_argument("--new_tokens", type=int, default=16, help="tokens of every answer (16)")
    parser.add_argument("--max_length", type=int, default=640, help="maximum length of a prompt and of an answer (640)")
    parser.add_argument("--rank", type=int, default=64, help="rank of LoRA; C-LoRAE has half of it (64)")
    parser.add_argument("--dropout", type=float, default=0.05)
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--quick", action="store_true", help="tiny bases, few steps, one round")
    parser.add_argument("--check", action="store_true", help="exit code 1 if a limit is not met")
    parser.add_argument("--output", type=Path, help="results file (results/peers-cpu-<date>.json)")
    options = parser.parse_args(argv)
    if options.quick:
        options.steps, options.rounds, options.answers, options.batch_size, options.rank = 4, 1, 4, 4, 8
    names = ("shards", "base", "steps", "batch_size", "eval_batch_size", "answers", "new_tokens", "rank", "dropout")
    settings = {name: getattr(options, name) for name in (*names, "bf16", "threads")}
    settings |= {name: settings[name] and Path(settings[name]).name for name in ("shards", "base")}
    options.about = {**description(torch.device("cpu")), "settings": settings}
    options.output = results_file(parser, options.output, f"peers-cpu-{options.about['date']}.json")
    return options


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        child(json.loads(sys.argv[2]))
    else:
        raise SystemExit(main())
