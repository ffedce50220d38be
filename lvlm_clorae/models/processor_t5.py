"""The processor of T5: the prompt is the encoder's input, the answer the decoder's, task markers are sentinels."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer

from ..tasks.schema import EVENT, REGION, SPOT
from .pictures import PictureTransform
from .processor import TowerProcessor, one_line, pad

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
        ids, mask = self._tokenize(prompts, max_length)
        batch = {"input_ids": ids, "attention_mask": mask}
        if answers is not None:
            target, valid = self._tokenize(answers, max_answer_length)
            batch["labels"] = target.masked_fill(valid == 0, -100)
        return batch

    def answer_ids(self, answers: Sequence[str]) -> list[list[int]]:
        found = self.tokenizer([self._with_sentinels(answer) for answer in answers], add_special_tokens=False)
        return list(found["input_ids"])

    def _tokenize(self, texts: Sequence[str], max_length: int) -> tuple[torch.Tensor, torch.Tensor]:
        # Padded here: the tokenizer refuses to cut at a length that is no multiple of what it pads to.
        found = self.tokenizer([self._with_sentinels(text) for text in texts], truncation=True, max_length=max_length)
        return pad(found["input_ids"], int(self.tokenizer.pad_token_id), left=False)

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
