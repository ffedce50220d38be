"""Constrained decoding: of each row's next token, only those that continue an answer of its grammar.

The grammar (lvlm_clorae/tasks/grammar.py) is one of text. Its pieces are tokenized as the model learnt them, in the
place where they stand in an answer, and its states become nodes from which tokens lead on. A row is at several nodes
at once where its tokens can still mean several things, as the beginnings of two words.

An answer is not decoded but spelled: the text of the pieces that its tokens went through. So it is in the words of
the input even where tokens cannot say them, as in T5, whose vocabulary lacks some characters and rewrites others.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from transformers import LogitsProcessor

from ..errors import UserError
from ..tasks.grammar import DONE, END, START, Grammar, answer_grammar, without_dead_ends
from ..tasks.schema import NONE, Labels, Sample
from .processor import Processor

Tokens = dict[str, list[int]]
"""Piece of an answer -> its token ids."""
Places = dict[int, str]
"""Nodes where a row may be -> the pieces that led there."""

PROBE = [f" {word}" for word in "one of the cities in the United States of America at the end of the day".split()]
"""Words that a tokenizer joins if it ever does."""


class Constraint(LogitsProcessor):
    """For one call of ``generate``, greedy, with any mix of sub-tasks in its rows.

    It is built once a batch. A step looks at one token a row and makes one index of the tokens that may follow; the
    scores of these stay as they are. Rows that have ended, or got a token that was not allowed, may only end.

    Args:
        processor: of the model, one that passes :func:`check_tokenizer`
        asked: the sample, the sub-task and the labels of each row

    Raises:
        UserError: a sub-task is unknown, or its labels are of another form.
    """

    def __init__(self, processor: Processor, asked: Sequence[tuple[Sample, str, Labels]]) -> None:
        grammars = [answer_grammar(*row) for row in asked]
        edges = (edge for grammar in grammars for edges in grammar.values() for edge in edges)
        tokens = tokenize(processor, {piece for piece, _ in edges})
        unsayable = {piece for piece, ids in tokens.items() if not ids}
        if unsayable:
            grammars = [without_dead_ends(grammar, unsayable) for grammar in grammars]
        self.rows = [TokenGrammar(grammar, tokens) for grammar in grammars]
        self._end = int(processor.tokenizer.eos_token_id)
        self._places: list[Places] = []
        self._given = 0

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Scores ``[B, V]`` with -inf for what may not follow ``input_ids [B, T]``.

        The tokens of the first call, a prompt or a decoder's start, are not part of the answers.
        """
        if not self._places:
            self._given = input_ids.shape[1]
            self._places = [row.start for row in self.rows]
        else:
            last = input_ids[:, -1].tolist()
            moves = zip(self.rows, self._places, last, strict=True)
            self._places = [row.follow(places, token) for row, places, token in moves]
        width = scores.shape[1]
        kept = [
            number * width + token
            for number, (row, places) in enumerate(zip(self.rows, self._places, strict=True))
            for token in row.allowed(places) or (self._end,)
        ]
        index = torch.tensor(kept, device=scores.device)
        masked = scores.new_full(scores.shape, -torch.inf)
        masked.view(-1)[index] = scores.reshape(-1)[index]
        return masked

    def answers(self, tokens: torch.Tensor) -> list[str]:
        """The answers in what ``generate`` gave, ``[B, T]``; one that was cut off ends with its last whole piece."""
        rows = tokens[:, self._given :].tolist()
        return [row.spell(found) for row, found in zip(self.rows, rows, strict=True)]


class TokenGrammar:
    """A grammar whose steps are tokens. Pieces that begin alike share their nodes."""

    def __init__(self, grammar: Grammar, tokens: Tokens) -> None:
        self._steps: list[dict[int, list[tuple[int, str]]]] = [{} for _ in grammar]
        self._within: dict[tuple[int, int], int] = {}
        nodes = {state: number for number, state in enumerate(grammar)}
        for state, edges in grammar.items():
            for piece, states in edges:
                self._add(nodes[state], tokens[piece], piece, [nodes[target] for target in states])
        self.start: Places = {nodes[START]: ""} if START in nodes else {}
        self._done = nodes[DONE]

    def _add(self, node: int, tokens: list[int], piece: str, targets: list[int]) -> None:
        for token in tokens[:-1]:
            key = node, token
            if key not in self._within:
                self._within[key] = len(self._steps)
                self._steps[node].setdefault(token, []).append((self._within[key], ""))
                self._steps.append({})
            node = self._within[key]
        self._steps[node].setdefault(tokens[-1], []).extend((target, piece) for target in targets)

    def allowed(self, places: Places) -> set[int]:
        """The tokens that may follow; none after the end."""
        return {token for node in places for token in self._steps[node]}

    def follow(self, places: Places, token: int) -> Places:
        """Where a row is after the token; nowhere if that was not allowed. Of two texts of one node the first stays."""
        after: Places = {}
        for node, text in places.items():
            for target, piece in self._steps[node].get(token, ()):
                after.setdefault(target, text + piece)
        return after

    def spell(self, tokens: Iterable[int]) -> str:
        """The text of the answer that the tokens begin with, up to its end or its last whole piece."""
        places = self.start
        for token in tokens:
            after = self.follow(places, token)
            if not after:
                break
            places = after
        return places.get(self._done) or max(places.values(), key=len, default="")


def tokenize(processor: Processor, pieces: Iterable[str]) -> Tokens:
    """The token ids of each piece in the place where it stands in an answer, first or after a word.

    A piece of characters that the tokenizer drops has none. One that it joins with the word before (see
    :func:`check_tokenizer`) gets tokens that the model has not learnt there; they still say the piece.
    """
    first: list[str] = []
    further: list[str] = []
    for piece in pieces:
        (further if piece.startswith(" ") else first).append(piece)
    before, *found = processor.answer_ids([NONE, *first, *(NONE + piece for piece in further)])
    tokens = dict(zip(first, found, strict=False))
    for piece, ids in zip(further, found[len(first) :], strict=True):
        apart = ids[: len(before)] == before
        tokens[piece] = ids[len(before) :] if apart else processor.answer_ids([piece])[0]
    tokens[END] = [int(processor.tokenizer.eos_token_id)]
    return tokens


def check_tokenizer(processor: Processor) -> None:
    """Raises UserError where answers are not made of words, because the tokenizer joins them."""
    words = tokenize(processor, {NONE, *PROBE})
    sentence = NONE + "".join(PROBE)
    if processor.answer_ids([sentence]) != [[token for piece in (NONE, *PROBE) for token in words[piece]]]:
        raise UserError(
            f'The tokenizer joins words of "{sentence}" in one token, but constrained decoding makes an answer of the '
            "words of a text one by one. Leave out --constrained, or take another base."
        )
