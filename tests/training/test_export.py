"""The exported adapter directory: the base's name in PEFT's configuration, and the model card."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from safetensors.torch import load_file

from lvlm_clorae.data.dataset import ShardDataset
from lvlm_clorae.data.index import DatasetTask, Index
from lvlm_clorae.data.storage import open_storages
from lvlm_clorae.digests import write_digests
from lvlm_clorae.inference.extractor import Extractor
from lvlm_clorae.models.fingerprint import base_fingerprint
from lvlm_clorae.models.loading import load_model
from lvlm_clorae.tasks import Counts
from lvlm_clorae.training.adapters import add_adapter
from lvlm_clorae.training.config_loading import make_config
from lvlm_clorae.training.dataset_tasks import choose_dataset_tasks
from lvlm_clorae.training.export import save_adapter
from lvlm_clorae.training.reporting import Reporter
from lvlm_clorae.training.run_directory import Status
from lvlm_clorae.training.setup import Run
from tests.helpers.fork_server import train
from tests.helpers.launch import REPOSITORY, small_shards
from tests.helpers.tiny import DEMO, save_tiny
from tools.demo_data.generator import DATASETS

pytestmark = pytest.mark.usefixtures("process_group")
TASKS = ["mner", "mre", "mee"]


@pytest.fixture
def base(tmp_path: Path) -> Path:
    directory = tmp_path / "base"
    save_tiny(directory)
    return directory


SCORES = {"demo_pairs/relation": Counts(3, 5, 6), "demo_events/trigger": Counts(1, 1, 1)}


def export(directory: Path, base: Path, model: str, steps: int = 30, **settings: Any) -> Path:
    """Export an adapter on the base in directory ``base`` as a run with ``--model MODEL`` does after some steps."""
    config = make_config({"model": model, "lora_rank": 4, "target_modules": ["q", "v"], "bf16": False, **settings})
    dataset = ShardDataset(*open_storages(str(REPOSITORY / "shards/demo")), split="train")
    loaded, processor = load_model(str(base))
    fingerprint = base_fingerprint(loaded)
    status = Status(directory, 0)
    status.reached(steps, 0)
    run = Run(
        config=config,
        directory=directory,
        model=add_adapter(loaded, config, TASKS),
        engine=None,
        processor=processor,
        report=Reporter(False),
        dataset_tasks=choose_dataset_tasks(dataset.index, config),
        tasks=TASKS,
        dataset=dataset,
        status=status,
        base=fingerprint,
    )
    save_adapter(run, directory / "adapter", "test", SCORES)
    return directory / "adapter"


def card(adapter: Path) -> tuple[dict[str, Any], str]:
    """Return the YAML front matter and the text of the model card."""
    _, front, text = (adapter / "README.md").read_text(encoding="utf-8").split("---\n", 2)
    return yaml.safe_load(front), text


@pytest.mark.parametrize(
    ("model", "name"),
    [
        ("flan-t5-base", "google/flan-t5-base"),
        ("llava-1.5-7b", "llava-hf/llava-1.5-7b-hf"),
        ("Qwen/Qwen2.5-VL-7B-Instruct", "Qwen/Qwen2.5-VL-7B-Instruct"),
        ("demo", "demo"),
        ("base", "DIRECTORY/base"),
    ],
)
def test_other_tools_can_find_the_base(
    model: str, name: str, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    adapter = export(tmp_path, base, model)
    expected = name.replace("DIRECTORY", str(tmp_path))
    assert json.loads((adapter / "adapter_config.json").read_text())["base_model_name_or_path"] == expected
    front, _ = card(adapter)
    assert front["base_model"] == expected


def test_model_card_states_the_steps_that_were_trained(base: Path, tmp_path: Path) -> None:
    front, text = card(export(tmp_path, base, str(base), steps=30, num_train_epochs=7, max_steps=30))
    assert front["library_name"] == "peft"
    assert {"clorae", "lvlm_clorae"} <= set(front["tags"])
    assert re.search(r"\b30 optimizer steps, 0 complete epochs", text)
    assert not re.search(r"\b7 (optimizer|complete)", text)


def test_front_matter_is_that_of_the_hub(base: Path, tmp_path: Path) -> None:
    adapter = export(tmp_path, base, "flan-t5-base")
    data = ModelCard.load(adapter / "README.md").data
    assert data.base_model == "google/flan-t5-base"
    assert data.datasets == sorted(DATASETS)
    assert data.eval_results is not None
    found = {(one.dataset_name, one.task_name, one.metric_type): one.metric_value for one in data.eval_results}
    assert found["demo_pairs", "relation", "precision"] == 60
    assert found["demo_pairs", "relation", "recall"] == 50
    assert found["demo_events", "trigger", "f1"] == 100
    assert len(found) == 6
    assert {one.dataset_split for one in data.eval_results} == {"test"}


@pytest.mark.parametrize("adapter", ["clorae", "full"])
def test_snippet_of_the_model_card_runs_in_the_directory(
    adapter: str, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The base was given by a relative path, from another directory."""
    monkeypatch.chdir(tmp_path)
    directory = export(tmp_path, base, base.name, adapter=adapter, max_target_length=8)
    front, text = card(directory)
    assert front["library_name"] == ("peft" if adapter == "clorae" else "lvlm_clorae")
    assert ("rank 4" in text) == (adapter == "clorae")
    (code,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    monkeypatch.chdir(directory)
    exec(code, {})
    assert all(f'task="{task}"' in code for task in TASKS)


def test_snippet_of_a_relation_adapter_has_the_two_names(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def only_relations(self: Index, split: str) -> dict[str, DatasetTask]:
        return {"demo_pairs/relation": found(self, split)["demo_pairs/relation"]}

    found = Index.dataset_tasks
    monkeypatch.setattr(Index, "dataset_tasks", only_relations)
    monkeypatch.setattr(sys.modules[__name__], "TASKS", ["mre"])
    _, text = card(export(tmp_path, base, str(base)))
    assert all(part in text for part in ('task="mre"', "head=", "tail="))


def test_plain_peft_loads_the_exported_adapter(base: Path, tmp_path: Path) -> None:
    adapter = export(tmp_path, base, "flan-t5-base")
    model = peft.PeftModel.from_pretrained(load_model(str(base))[0], adapter)
    state = peft.get_peft_model_state_dict(model, save_embedding_layers=False)
    stored = load_file(adapter / "adapter_model.safetensors")
    assert all(torch.equal(state[name], tensor) for name, tensor in stored.items())


def test_an_adapter_with_the_name_of_a_preset_still_loads(tmp_path: Path) -> None:
    adapter = export(tmp_path, DEMO, "demo")
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "base_model_name_or_path": "demo"}))
    assert json.loads((adapter / "schema.json").read_text())["base"] == "demo"
    write_digests(adapter)
    assert Extractor.from_pretrained(adapter, device="cpu").model.peft_config["default"].tasks == TASKS


def test_a_loaded_model_has_the_absolute_path(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """PEFT writes it to ``adapter_config.json``."""
    monkeypatch.chdir(tmp_path)
    assert load_model(base.name)[0].name_or_path == str(base)


@pytest.mark.slow
def test_a_finished_run_that_is_resumed_keeps_its_steps(tmp_path: Path) -> None:
    shards, run = small_shards(tmp_path / "shards", dev=0), tmp_path / "run"
    for resume in ([], ["--resume_from_checkpoint", "auto"]):
        train(run, 1, "--shards", shards, "--max_steps", 3, "--lora_rank", 4, "--max_target_length", 4, *resume)
        assert json.loads((run / "status.json").read_text())["step"] == 3
        assert "3 optimizer steps" in card(run / "adapter")[1]
