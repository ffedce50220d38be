"""The job on a base of each family: trained from the command line, exported, loaded again by the extractor alone."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from lvlm_clorae.extractor import Entity, Extractor
from tests.launch import records, small_shards, train
from tests.models.test_loading import save_plain_t5
from tests.models.tiny_causal import save_language, save_llava, save_tower
from tests.models.tiny_image_text import save_qwen

SETTINGS = "--rank 4 --epochs 1 --max-steps 3 --micro-batch 2 --log-every 1 --max-answer-length 8".split()
TEMPLATE = "{image}Q: {prompt} A: {answer}"
BASES: dict[str, tuple[Callable[[Path], Any], list[str]]] = {
    "plain t5, gated, nf4": (lambda path: save_plain_t5(path, own_head=True), ["--fusion", "gated", "--load-in-4bit"]),
    "causal, linear projector": (save_language, ["--projector", "linear", "--template", TEMPLATE]),
    "llava, checkpointing": (save_llava, ["--gradient-checkpointing"]),
    "qwen2.5-vl, int8, bf16": (save_qwen, ["--load-in-8bit", "--precision", "bf16"]),
}


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_shards(tmp_path_factory.mktemp("bases") / "shards", train=6, dev=2, test=2)


@pytest.mark.slow
@pytest.mark.parametrize("base", BASES)
def test_a_run_on_each_family(base: str, shards: Path, tmp_path: Path) -> None:
    save, flags = BASES[base]
    directory, run = tmp_path / "base", tmp_path / "run"
    save(directory)
    if base.startswith(("plain t5", "causal")):
        flags = [*flags, "--vision", save_tower(tmp_path / "tower")]
    printed = train(run, 1, "--model", directory, "--shards", shards, *SETTINGS, *flags)
    assert "weights of the base: language model" in printed
    losses = [record["ce"] for record in records(run, "train")]
    assert len(losses) == 3
    assert all(0 < loss < 100 for loss in losses)
    schema = json.loads((run / "adapter" / "schema.json").read_text())
    extractor = Extractor.from_pretrained(run / "adapter")
    floating = {weight.dtype for weight in extractor.model.parameters() if weight.is_floating_point()}
    assert floating == {torch.bfloat16 if "bf16" in base else torch.float32}
    if "int8" in base:
        assert extractor.model.base_model.model.is_loaded_in_8bit, "as it was trained"
    if "linear" in base:
        assert schema["base_options"]["projector"] == "linear"
        assert extractor.processor.template == TEMPLATE
    found = extractor.extract("Mara sings", image="docs/images/post.png", task="mner")
    assert all(isinstance(record, Entity) for record in found)
    said = [json.loads(line) for path in (run / "predictions").glob("*entity*") for line in path.open()]
    assert said
    for line in said:
        (again,) = answers(extractor, shards, line["key"])
        assert again == line["answer"], "the exported adapter answers as the run did"


def answers(extractor: Extractor, shards: Path, key: str) -> list[str]:
    """What the extractor's model says to the test sample of this key."""
    from lvlm_clorae.data.batches import Batcher, evaluation_batches, find_units
    from lvlm_clorae.data.places import open_shards
    from lvlm_clorae.data.shard_reader import ShardReader
    from lvlm_clorae.models.generation import generate_answers

    reader = ShardReader(*open_shards(str(shards), None, 1))
    batcher = Batcher(reader, extractor.processor, "test")
    for unit in find_units(reader.index, "test").values():
        if unit.subtask == "entity":
            extractor.model.set_task(unit.task)
            for batch in evaluation_batches(batcher, unit, rank=0, world_size=1, batch_size=16):
                said = generate_answers(extractor.model, extractor.processor, batch.tensors, 8)
                found = [answer for one, answer in zip(batch.keys, said, strict=True) if one == key]
                if found:
                    return found
    raise AssertionError(key)
