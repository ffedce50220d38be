"""Score the test split and export the adapter directory, a self-contained folder for ``Extractor.from_pretrained``."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from lvlm_clorae.digests import write_digests
from lvlm_clorae.files import replace_directory, write_text_atomic
from lvlm_clorae.inference.adapter_directory import SCHEMA, SCHEMA_VERSION
from lvlm_clorae.models.presets import presets, published_name
from lvlm_clorae.tasks import Counts
from lvlm_clorae.training import distributed
from lvlm_clorae.training.reporting import scores_json, total_f1
from lvlm_clorae.training.setup import Run, use_bf16


def score_and_export(run: Run) -> None:
    """Write ``predictions/``, ``scores.json`` and ``adapter/`` of a trained run. Collective."""
    counts: dict[str, Counts] = {}
    if run.dataset_tasks.test:
        test, folder = run.evaluator("test"), run.directory / "predictions"
        distributed.on_first_rank(lambda: folder.mkdir(exist_ok=True))
        run.report.begin("test", len(test))
        result = test(run.model, advance=run.advance)
        result.write(folder)
        counts = result.counts
        run.report.scores("test", counts)
        distributed.on_first_rank(lambda: write_text_atomic(run.directory / "scores.json", scores_json(counts)))
    if run.config.adapter != "none":
        save_adapter(run, run.directory / "adapter", "test", counts)


def save_adapter(run: Run, target: Path, split: str, counts: Mapping[str, Counts]) -> None:
    """Write the trained weights, the processor, the schema and a card with the scores of ``split``. Collective."""
    full = run.config.adapter == "full"
    state = distributed.gathered_state(run.model, trainable_only=not full)

    def write(path: Path) -> None:
        if full:
            run.model.save_pretrained(path, state_dict=state)
        else:
            run.model.peft_config["default"].base_model_name_or_path = published_name(run.config.model)
            run.model.save_pretrained(str(path), state_dict=state, save_embedding_layers=False)
        run.processor.save_pretrained(path)
        write_text_atomic(path / SCHEMA, json.dumps(_schema(run), indent=1, ensure_ascii=False) + "\n")
        write_text_atomic(path / "README.md", _card(run, split, counts))
        write_digests(path)

    distributed.on_first_rank(lambda: replace_directory(target, write))


def _schema(run: Run) -> dict[str, Any]:
    config, chosen = run.config, run.dataset_tasks
    dataset_tasks = {
        name: {key: getattr(dataset_task, key) for key in ("dataset", "task", "subtask", "labels")}
        for name, dataset_task in {**chosen.test, **chosen.dev, **chosen.train}.items()
        if dataset_task.dataset not in config.hold_out
    }
    return {
        "version": SCHEMA_VERSION,
        "base": config.model if config.model in presets() else published_name(config.model),
        "base_options": {**config.load_options(), "dtype": "bfloat16" if use_bf16(config) else "float32"},
        "adapter": config.adapter,
        "tasks": run.tasks,
        "dataset_tasks": dataset_tasks,
        "base_fingerprint": run.base,
        "base_revision": getattr(run.model.config, "_commit_hash", None),
        "max_source_length": config.max_source_length,
        "max_target_length": config.max_target_length,
    }


def _card(run: Run, split: str, counts: Mapping[str, Counts]) -> str:
    config, done, trained = run.config, run.status.progress, list(run.dataset_tasks.train.values())
    full, task = config.adapter == "full", trained[0].task
    tags = ["lvlm_clorae", "multimodal-information-extraction", config.adapter]
    front = {"base_model": published_name(config.model), "library_name": tags[0] if full else "peft", "tags": tags}
    rows = "".join(f"| {name} | {c.precision:.1f} | {c.recall:.1f} | {c.f1:.1f} |\n" for name, c in counts.items())
    table = f"| {split} | P | R | F1 |\n|---|---|---|---|\n{rows}| All | | | {total_f1(counts):.1f} |\n"
    has_relations = (task, "relation") in {(one.task, one.subtask) for one in trained}
    names = ', head="Mara", tail="Tamsk"' if has_relations else ""
    return (
        f"---\n{yaml.safe_dump(front, sort_keys=False)}---\n\n"
        f"# {config.adapter} on {config.model}\n\nTrained by lvlm_clorae on "
        f"{', '.join(sorted({one.dataset for one in trained}))} ({'' if full else f'rank {config.lora_rank}, '}"
        f"{done['step']} optimizer steps, {done['epoch']} complete epochs, seed {config.seed})."
        f"{' Answers were constrained (--constrained).' if config.constrained else ''}\n\n{table if counts else ''}\n"
        "In this directory (add `image=FILE` for an image):\n\n"
        "```python\nfrom lvlm_clorae import Extractor\n\n"
        'extractor = Extractor.from_pretrained(".")\n'
        f'print(extractor.extract("Mara sings in Tamsk", task="{task}"{names}))\n```\n'
    )
