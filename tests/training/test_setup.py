"""Errors while a run is set up."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from lvlm_clorae.errors import UserError
from lvlm_clorae.models.families.t5 import T5Processor
from lvlm_clorae.models.processor import ImageTransform
from lvlm_clorae.training import setup
from lvlm_clorae.training.config import TrainConfig
from tests.helpers.tiny import unigram_tokenizer


def test_constrained_decoding_with_a_tokenizer_that_joins_words_is_refused_before_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    processor = T5Processor(unigram_tokenizer(split=False), ImageTransform(32))
    monkeypatch.setattr(setup, "load_model", lambda name, **options: (None, processor))
    unused: Any = SimpleNamespace(index=None)
    with pytest.raises(UserError, match="--constrained"):
        setup.build(TrainConfig(adapter="none", constrained=True), unused, {}, tmp_path, unused, unused)


@pytest.mark.parametrize(
    ("adapter", "given", "unused"),
    [
        ("lora", {"lora_expert_rank": 5, "use_gate": False}, ["lora_expert_rank", "use_gate"]),
        ("loramoe", {"lora_expert_rank": 5}, []),
        ("clorae", {"lora_expert_rank": 5, "use_gate": False}, []),
    ],
)
def test_settings_that_the_adapter_has_no_use_for(adapter: str, given: dict[str, Any], unused: list[str]) -> None:
    assert setup.unused_settings(TrainConfig(adapter=adapter, **given)) == unused
