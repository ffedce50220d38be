"""The processor of T5: the prompt is the encoder's input, the answer the decoder's, task markers are sentinels."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer

from ..tasks.schema import EVENT, REGION, SPOT
from .pictures import PictureTransform
from .processor import MULTIPLE, TowerProcessor, one_line

# T5's vocabulary has no "<", but it has sentinels that fine-tuning does not use otherwise.
MARKERS = {SPOT: "<extra_id_0>", EVENT: "<extra_id_1>", REGION: "<extra_id_99>"}


class T5Processor(TowerProcessor):
    """Right-padded rows; ``labels [B, T]`` are the answers' tokens."""

    kind = "t5"

    @classmethod
    def read(cls, path: str | Path, settings: dict[str, Any]) -> T5Processor:
        """From the files of :meth:`save_pretrained`."""
        import lvlm_clorae.models.t5  # noqa: F401 - registers the configuration at which AutoTokenizer looks

        return cls(AutoTokenizer.from_pretrained(path, trust_remote_code=False), PictureTransform(**settings))

    @property
    def region_token_id(self) -> int:
        return int(self.tokenizer.convert_tokens_to_ids(MARKERS[REGION]))

    def text(
        self,
        prompts: Sequence[str],
        shown: Sequence[bool],
        answers: Sequence[str] | None,
        max_length: int,
        max_answer_length: int,
    ) -> dict[str, torch.Tensor]:
        """As in :class:`TowerProcessor`; visual tokens are no part of the text here: the model puts them before it."""
        batch = self._tokenize(prompts, max_length)
        if answers is not None:
            target = self._tokenize(answers, max_answer_length)
            batch["labels"] = target["input_ids"].masked_fill(target["attention_mask"] == 0, -100)
        return batch

    def _tokenize(self, texts: Sequence[str], max_length: int) -> dict[str, torch.Tensor]:
        tokens = self.tokenizer(
            [self._with_sentinels(text) for text in texts],
            padding=True,
            pad_to_multiple_of=MULTIPLE,
            truncation=True,
            max_length=max_length,
        )
        # return_tensors="pt" would give the same by way of one flat list in Python: a twentieth of a sample's time
        return {name: torch.tensor(tokens[name]) for name in ("input_ids", "attention_mask")}

    def _with_sentinels(self, text: str) -> str:
        text = self.without_specials(text)
        for marker, sentinel in MARKERS.items():
            text = text.replace(marker, sentinel)
        return text

    def decode(self, token_ids: torch.Tensor) -> list[str]:
        """Token ids ``[B, T]`` -> B texts with the task markers back in place, padding and end removed."""
        texts = self.tokenizer.batch_decode(token_ids, skip_special_tokens=False)
        return [self._plain(text) for text in texts]

    def _plain(self, text: str) -> str:
        for token in (self.tokenizer.pad_token, self.tokenizer.eos_token):
            text = text.replace(str(token), " ")
        for marker, sentinel in MARKERS.items():
            text = text.replace(sentinel, f" {marker} ")
        return one_line(text)
