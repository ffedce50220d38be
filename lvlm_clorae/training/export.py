"""Score the test split and export the adapter directory, a self-contained folder for ``Extractor.from_pretrained``."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCardData

from lvlm_clorae.digests import write_digests
from lvlm_clorae.files import replace_directory, write_text_atomic
from lvlm_clorae.inference.adapter_directory import SCHEMA, SCHEMA_VERSION
from lvlm_clorae.models.presets import presets, published_name
from lvlm_clorae.tasks import Counts
from lvlm_clorae.training import distributed
from lvlm_clorae.training.reporting import scores_json, total_f1
from lvlm_clorae.training.setup import Run


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
        trained = run.config.adapter != "none"
        run.report.scores("test of the last weights (adapter/)" if trained else "test", counts)
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
        "base_options": {**config.load_options(), "dtype": "bfloat16" if run.bf16 else "float32"},
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
    full, name = config.adapter == "full", f"{config.adapter} on {config.model}"
    tags = ["lvlm_clorae", "multimodal-information-extraction", config.adapter]
    datasets = sorted({one.dataset for one in trained})
    results = [result for one, found in counts.items() for result in _eval_results(one, split, found)]
    front = ModelCardData(
        base_model=published_name(config.model),
        datasets=datasets,
        library_name=tags[0] if full else "peft",
        tags=tags,
        model_name=name if results else None,
        eval_results=results or None,
    )
    rows = "".join(f"| {one} | {c.precision:.1f} | {c.recall:.1f} | {c.f1:.1f} |\n" for one, c in counts.items())
    table = f"| {split} | P | R | F1 |\n|---|---|---|---|\n{rows}| All | | | {total_f1(counts):.1f} |\n"
    tasks = [task for task in run.tasks if task in {one.task for one in trained}]
    names = {one.task: ', head="Mara", tail="Tamsk"' for one in trained if one.subtask == "relation"}
    lines = (f'print(extractor.extract("Mara sings in Tamsk", task="{task}"{names.get(task, "")}))\n' for task in tasks)
    asked = "In this directory (add `image=FILE` for an image):"
    if not run.processor.reads_images:
        asked = "The base is text only: images are not read. In this directory:"
    return (
        f"---\n{front.to_yaml()}\n---\n\n"
        f"# {name}\n\nTrained by lvlm_clorae on "
        f"{', '.join(datasets)} for {', '.join(tasks)} ({'' if full else f'rank {config.lora_rank}, '}"
        f"{done['step']} optimizer steps, {done['epoch']} complete epochs, seed {config.seed})."
        f"{' Answers were constrained (--constrained).' if config.constrained else ''}\n\n{table if counts else ''}\n"
        f"{asked}\n\n"
        "```python\nfrom lvlm_clorae import Extractor\n\n"
        f'extractor = Extractor.from_pretrained(".")\n{"".join(lines)}```\n'
    )


def _eval_results(dataset_task: str, split: str, counts: Counts) -> list[EvalResult]:
    """Return the entries of a dataset task in the hub's ``model-index``: metrics in percent."""
    dataset, _, subtask = dataset_task.partition("/")
    return [
        EvalResult(
            task_type="image-text-to-text",
            task_name=subtask,
            dataset_type=dataset,
            dataset_name=dataset,
            dataset_config=subtask,
            dataset_split=split,
            metric_type=metric,
            metric_value=round(getattr(counts, metric), 2),
        )
        for metric in ("f1", "precision", "recall")
    ]
