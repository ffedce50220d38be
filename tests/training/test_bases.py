"""Training, export and extraction with a base of each family."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from lvlm_clorae.cli import main as cli
from lvlm_clorae.inference.extractor import Extractor
from lvlm_clorae.inference.records import Entity
from tests.helpers.fork_server import train
from tests.helpers.launch import records, small_shards
from tests.helpers.tiny import save_plain_t5
from tests.helpers.tiny_causal import save_language, save_llava, save_tower
from tests.helpers.tiny_gguf import save_gguf
from tests.helpers.tiny_image_text import save_qwen

SETTINGS = ["--lora_rank", 4, "--num_train_epochs", 1, "--max_steps", 3, "--per_device_train_batch_size", 2]
SETTINGS += ["--logging_steps", 1, "--max_target_length", 8]
TEMPLATE = "{image}Q: {prompt} A: {answer}"
BASES: dict[str, tuple[Callable[[Path], Any], list[str]]] = {
    "plain t5, gated, nf4": (lambda path: save_plain_t5(path, own_head=True), ["--fusion", "gated", "--load-in-4bit"]),
    "causal, linear projector": (save_language, ["--projector", "linear", "--template", TEMPLATE]),
    "causal text only": (save_language, ["--vision", "none"]),
    "plain t5 text only": (lambda path: save_plain_t5(path, own_head=True), ["--vision", "none"]),
    "gguf text only": (lambda path: save_gguf(path / "tiny.gguf"), ["--vision", "none"]),
    "llava, checkpointing, constrained": (save_llava, ["--gradient-checkpointing", "--constrained"]),
    "qwen2.5-vl, int8, bf16": (save_qwen, ["--load-in-8bit", "--bf16", "true"]),
}


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_shards(tmp_path_factory.mktemp("bases") / "shards", train=6, dev=2, test=2)


@pytest.mark.slow
@pytest.mark.parametrize("base", BASES)
def test_a_base_of_each_family_is_trained_and_exported(base: str, shards: Path, tmp_path: Path) -> None:
    save, flags = BASES[base]
    directory, run = tmp_path / "base", tmp_path / "run"
    save(directory)
    if "text only" not in base and base.startswith(("plain t5", "causal")):
        flags = [*flags, "--vision", save_tower(tmp_path / "tower")]
    train(run, 1, "--model", directory, "--shards", shards, *SETTINGS, *flags)
    losses = [record["ce"] for record in records(run, "train")]
    assert len(losses) == 3
    assert all(0 < loss < 100 for loss in losses)
    schema = json.loads((run / "adapter" / "schema.json").read_text())
    extractor = Extractor.from_pretrained(run / "adapter")
    floating = {weight.dtype for weight in extractor.model.parameters() if weight.is_floating_point()}
    assert floating == {torch.bfloat16 if "bf16" in base else torch.float32}
    if "int8" in base:
        assert extractor.model.base_model.model.is_loaded_in_8bit, "loaded as trained"
    if "linear" in base:
        assert schema["base_options"]["projector"] == "linear"
        assert extractor.processor.template == TEMPLATE
    found = extractor.extract("Mara sings", image="docs/images/post.png", task="mner")
    assert all(isinstance(record, Entity) for record in found)
    assert cli(["evaluate", "--run", str(run), "--predictions", str(tmp_path / "again")]) == 0
    for path in (run / "predictions").iterdir():
        assert (tmp_path / "again" / path.name).read_text() == path.read_text(), (
            "the exported adapter gives the answers of the run"
        )
