"""The adapter directory: one self-contained folder that ``Extractor.from_pretrained`` loads.

PEFT's files (adapter and projector in safetensors), the tokenizer and picture settings, ``schema.json`` (base, tasks,
label sets) and a card with the scores.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lvlm_clorae.adapter_directory import SCHEMA
from lvlm_clorae.extractor import SCHEMA_VERSION
from lvlm_clorae.files import write_text_atomic
from lvlm_clorae.tasks import Counts
from lvlm_clorae.training import distributed
from lvlm_clorae.training.job import Job, base_options, use_bf16
from lvlm_clorae.training.reporting import total_f1
from lvlm_clorae.training.run_directory import replace_directory


def save_adapter(job: Job, target: Path, split: str, counts: Mapping[str, Counts]) -> None:
    """Write the trained weights and all that is needed to use them to ``target``, whole or not at all. Collective.

    Args:
        split, counts: the scores for the card, and the split they are of
    """
    full = job.config.adapter == "full"
    state = distributed.gathered_state(job.model, trainable_only=not full)

    def write(path: Path) -> None:
        if full:
            job.model.save_pretrained(path, state_dict=state)
        else:
            job.model.peft_config["default"].base_model_name_or_path = job.config.model
            job.model.save_pretrained(str(path), state_dict=state, save_embedding_layers=False)
        job.processor.save_pretrained(path)
        write_text_atomic(path / SCHEMA, json.dumps(_schema(job), indent=1, ensure_ascii=False) + "\n")
        write_text_atomic(path / "README.md", _card(job, split, counts))

    distributed.on_first_rank(lambda: replace_directory(target, write))


def _schema(job: Job) -> dict[str, Any]:
    units = {
        name: {"dataset": unit.dataset, "task": unit.task, "subtask": unit.subtask, "labels": unit.labels}
        for name, unit in {**job.units.test, **job.units.dev, **job.units.train}.items()
        if unit.dataset not in job.config.hold_out
    }
    limits = {"max_length": job.config.max_length, "max_answer_length": job.config.max_answer_length}
    return {
        "version": SCHEMA_VERSION,
        "base": job.config.model,
        "base_options": {**base_options(job.config), "dtype": "bfloat16" if use_bf16(job.config) else "float32"},
        "adapter": job.config.adapter,
        "tasks": job.tasks,
        "units": units,
        **limits,
    }


def _card(job: Job, split: str, counts: Mapping[str, Counts]) -> str:
    rows = "".join(f"| {unit} | {c.precision:.1f} | {c.recall:.1f} | {c.f1:.1f} |\n" for unit, c in counts.items())
    scores = (
        f"| {split} | P | R | F1 |\n|---|---|---|---|\n{rows}| All | | | {total_f1(counts):.1f} |\n" if counts else ""
    )
    return (
        f"---\nlibrary_name: peft\ntags: [multimodal-information-extraction, {job.config.adapter}]\n---\n\n"
        f"# {job.config.adapter} on {job.config.model}\n\n"
        f"Trained by lvlm_clorae on {', '.join(sorted({unit.dataset for unit in job.units.train.values()}))} "
        f"(rank {job.config.rank}, {job.config.epochs} epochs, seed {job.config.seed})."
        f"{' Answers were constrained (--constrained).' if job.config.constrained else ''}\n\n{scores}\n"
        "```python\nfrom lvlm_clorae import Extractor\n\n"
        'extractor = Extractor.from_pretrained("path/of/this/directory")\n'
        'extractor.extract("...", image="picture.jpg", task="mner")\n```\n'
    )
