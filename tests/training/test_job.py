"""What is found wrong while a job is put together."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from lvlm_clorae.errors import UserError
from lvlm_clorae.models.pictures import PictureTransform
from lvlm_clorae.models.processor_t5 import T5Processor
from lvlm_clorae.training import job
from lvlm_clorae.training.config import TrainConfig
from tests.models.tiny import unigram_tokenizer


def test_a_tokenizer_that_joins_words_is_refused_before_anything_is_trained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    joins = T5Processor(unigram_tokenizer(split=False), PictureTransform(32))
    monkeypatch.setattr(job, "load_model", lambda name, **options: (None, joins))
    nothing: Any = SimpleNamespace(index=None)
    with pytest.raises(UserError, match="Leave out --constrained"):
        job.build(TrainConfig(adapter="none", constrained=True), nothing, {}, tmp_path, nothing, nothing)
