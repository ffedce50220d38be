"""The processor of a causal language model with visual tokens: LLaVA's placeholders, template and label mask."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AddedToken, AutoTokenizer, PreTrainedTokenizerBase

from ..errors import UserError
from ..tasks.schema import NONE, REGION
from .pictures import PictureTransform
from .processor import MULTIPLE, TowerProcessor, pad

IMAGE = "<image>"
LLAVA_TEMPLATE = "USER: {image}{prompt} ASSISTANT: {answer}"


class CausalProcessor(TowerProcessor):
    """Prompts padded on the left, answers after them padded on the right, so that all answers start in one column.

    The training row is the very row that generation starts from, and the answer's tokens. Only those are labels.

    Args:
        visual_tokens: how many ``<image>`` placeholders a picture has
        template: the conversation, with ``{image}``, ``{prompt}`` and, last, ``{answer}``; the picture stands on a line
            of its own. Default: :func:`default_template`
    """

    kind = "causal"

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        pictures: PictureTransform,
        visual_tokens: int,
        template: str | None = None,
    ) -> None:
        # Their ids may lie beyond the embedding table: the model puts other vectors in their place.
        slots = [AddedToken(name, special=True, normalized=False) for name in (IMAGE, REGION)]
        tokenizer.add_tokens([slot for slot in slots if slot.content not in tokenizer.get_vocab()], special_tokens=True)
        if tokenizer.eos_token is None:
            raise UserError("The tokenizer has no end-of-sequence token, so no answer would ever end.")
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.unk_token or tokenizer.eos_token
        super().__init__(tokenizer, pictures)
        self.visual_tokens = visual_tokens
        self.template = checked_template(template or default_template(tokenizer))
        # The blank before an answer is part of its first token.
        self._before, self._blank = _split_blank(self.template.partition("{answer}")[0])
        self._bos = not (tokenizer.bos_token and self._before.startswith(tokenizer.bos_token))

    @classmethod
    def read(cls, path: str | Path, settings: dict[str, Any]) -> CausalProcessor:
        """From the files of :meth:`save_pretrained`."""
        import lvlm_clorae.models.causal  # noqa: F401 - registers the configuration at which AutoTokenizer looks

        own = {name: settings.pop(name) for name in ("visual_tokens", "template")}
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
        return cls(tokenizer, PictureTransform(**settings), **own)

    def settings(self) -> dict[str, Any]:
        return {**super().settings(), "visual_tokens": self.visual_tokens, "template": self.template}

    @property
    def image_token_id(self) -> int:
        return int(self.tokenizer.convert_tokens_to_ids(IMAGE))

    @property
    def region_token_id(self) -> int:
        return int(self.tokenizer.convert_tokens_to_ids(REGION))

    @property
    def slots(self) -> dict[str, int]:
        """The placeholders, as the model's configuration has them."""
        return {"image_token_id": self.image_token_id, "region_token_id": self.region_token_id}

    def text(
        self,
        prompts: Sequence[str],
        shown: Sequence[bool],
        answers: Sequence[str] | None,
        max_length: int,
        max_answer_length: int,
    ) -> dict[str, torch.Tensor]:
        """As in :class:`TowerProcessor`; the last T columns of ``input_ids [B, S]`` are answers: ``labels [B, T]``."""
        heads = [self._head(prompt, picture, max_length) for prompt, picture in zip(prompts, shown, strict=True)]
        filling = int(self.tokenizer.pad_token_id)
        ids, mask = pad([self._head_ids(head) for head in heads], filling, left=True)
        if answers is None:
            return {"input_ids": ids, "attention_mask": mask}
        rows = [self._answer_ids(head, answer, max_answer_length) for head, answer in zip(heads, answers, strict=True)]
        answer_ids, answer_mask = pad(rows, filling, left=False)
        return {
            "input_ids": torch.cat([ids, answer_ids], 1),
            "attention_mask": torch.cat([mask, answer_mask], 1),
            "labels": answer_ids.masked_fill(answer_mask == 0, -100),
        }

    def answer_ids(self, answers: Sequence[str]) -> list[list[int]]:
        head = self._head(NONE, False, MULTIPLE)  # any prompt: what an answer follows is the conversation's own text
        return [self._answer_ids(head, answer, sys.maxsize)[:-1] for answer in answers]

    def _head(self, prompt: str, picture: bool, max_length: int) -> str:
        """The conversation up to the answer."""
        prompt = self.cut(self.without_specials(prompt), max_length)
        return self._before.replace("{image}", f"{IMAGE}\n" if picture else "").replace("{prompt}", prompt)

    def _head_ids(self, head: str) -> list[int]:
        found: list[int] = self.tokenizer(head, add_special_tokens=self._bos)["input_ids"]
        if found and found[-1] == self.tokenizer.eos_token_id and not head.endswith(str(self.tokenizer.eos_token)):
            found = found[:-1]  # some tokenizers end every text
        image = self.image_token_id
        return [number for token in found for number in [token] * (self.visual_tokens if token == image else 1)]

    def _answer_ids(self, head: str, answer: str, max_length: int) -> list[int]:
        """The answer's tokens as they follow the conversation, and the end."""
        answer = self._blank + self.without_specials(answer)
        whole = self.tokenizer(head + answer, add_special_tokens=False, return_offsets_mapping=True)
        spans = whole["offset_mapping"]
        found = [token for token, (start, _) in zip(whole["input_ids"], spans, strict=True) if start >= len(head)]
        if any(start < len(head) < end for start, end in spans):  # a token of both: the answer's half would be lost
            found = self.tokenizer(answer, add_special_tokens=False)["input_ids"]
        end = int(self.tokenizer.eos_token_id)
        return [*[token for token in found if token != end][: max_length - 1], end]


def default_template(tokenizer: PreTrainedTokenizerBase) -> str:
    """The tokenizer's own chat template with one user turn, or LLaVA-1.5's where it has none.

    Raises:
        UserError: the chat template cannot be rendered, or drops what the user says.
    """
    if not tokenizer.chat_template:
        return LLAVA_TEMPLATE
    turn = [{"role": "user", "content": "{image}{prompt}"}]
    try:
        before = str(tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True))
    except Exception as error:  # whatever a template of jinja raises
        raise UserError(
            f"The tokenizer's chat template cannot be rendered ({error}). Give a prompt template."
        ) from None
    return checked_template(before + "{answer}")


def checked_template(template: str) -> str:
    """``template`` itself. Raises UserError unless each slot is there once, the answer's last."""
    for slot in ("{image}", "{prompt}", "{answer}"):
        if template.count(slot) != 1:
            raise UserError(f'The prompt template "{template}" has {slot} {template.count(slot)} times: once is right.')
    if template.index("{answer}") < max(template.index("{image}"), template.index("{prompt}")):
        raise UserError(f'The prompt template "{template}" must end with {{answer}}: it is what the model writes.')
    return template


def _split_blank(before: str) -> tuple[str, str]:
    head = before.rstrip(" ")
    return head, before[len(head) :]
