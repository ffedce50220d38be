"""Where a base comes from, and what a user is told of what is missing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig, BertConfig

from lvlm_clorae.errors import UserError
from lvlm_clorae.models.presets import presets
from lvlm_clorae.models.source import WEIGHTS, WEIGHTS_INDEX, cannot_load, family_of, find_source, missing_files
from tests.models.tiny import DEMO


class Cache:
    """A hub cache that holds these files of any repository."""

    def __init__(self, directory: Path, files: dict[str, Any]) -> None:
        self.paths = {}
        for name, content in files.items():
            self.paths[name] = str(directory / name)
            (directory / name).write_text(json.dumps(content), encoding="utf-8")

    def __call__(self, repository: str, name: str) -> str | None:
        return self.paths.get(name)


def test_families() -> None:
    kinds = {"t5": "t5", "llama": "causal", "qwen2": "causal", "llava": "llava", "qwen2_5_vl": "image_text"}
    for model_type, family in kinds.items():
        assert family_of(AutoConfig.for_model(model_type), "x") == family
    assert find_source("demo").family == "own"
    with pytest.raises(UserError, match=r'x is a "bert" model, which writes no text\. Supported: T5'):
        family_of(BertConfig(architectures=["BertForMaskedLM"]), "x")


def test_a_preset_is_described_without_a_file() -> None:
    for name, preset in presets().items():
        if name == "demo":
            continue
        source = find_source(name, described=True)
        assert source.base == preset.base
        assert source.family == ("llava" if "llava" in name else "t5")
    assert find_source("demo", described=True).base == str(DEMO)


@pytest.mark.parametrize(
    ("here", "missing"),
    [
        ({}, ["config.json", "tokenizer.json", WEIGHTS]),
        ({"config.json": {}, "tokenizer.json": {}}, [WEIGHTS]),
        ({"config.json": {}, "spiece.model": {}, WEIGHTS: {}}, []),
        (
            {
                "config.json": {},
                "tokenizer.json": {},
                WEIGHTS_INDEX: {"weight_map": {"a": "model-1-of-2.safetensors", "b": "model-2-of-2.safetensors"}},
                "model-1-of-2.safetensors": {},
            },
            ["model-2-of-2.safetensors"],
        ),
    ],
)
def test_missing_files_are_named(
    here: dict[str, Any], missing: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lvlm_clorae.models.source.try_to_load_from_cache", Cache(tmp_path, here))
    assert missing_files("owner/name") == missing
    message = str(cannot_load("owner/name", "owner/name", OSError("no network\nat all")))
    assert message.startswith('The model "owner/name" cannot be loaded: no network')
    assert "at all" not in message
    assert message.endswith("fetched beforehand: hf download owner/name")
    assert all(name in message for name in missing)


def test_what_is_no_repository_name_has_all_files_missing() -> None:
    assert missing_files("a b:c") == ["config.json", "tokenizer.json", WEIGHTS]
