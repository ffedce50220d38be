"""Constrained decoding: each row's next token must continue an answer of its grammar.

The pieces of the grammar (lvlm_clorae/tasks/grammar.py) are tokenized as in training and compiled to a nondeterministic
automaton over tokens. The text of an answer is joined from the pieces on its path, not decoded: it is in the words of
the input even where tokens cannot express them, since T5's vocabulary lacks some characters and rewrites others.
"""

from collections.abc import Iterable, Sequence

import torch
from transformers import LogitsProcessor

from ..errors import UserError
from ..tasks.grammar import DONE, END, START, Grammar, answer_grammar, without_dead_ends
from ..tasks.schema import NONE, Labels, Sample
from .processor import Processor

Tokens = dict[str, list[int]]
"""Piece of an answer -> its token ids."""
ActiveNodes = dict[int, str]
"""Node that a row may be at -> the text of the pieces on the path to it."""

PROBE = [f" {word}" for word in "one of the cities in the United States of America at the end of the day".split()]
"""Frequent words, to find out whether a tokenizer merges words."""


class Constraint(LogitsProcessor):
    """Logits processor for one call of ``generate``, greedy, with any mix of sub-tasks in its rows.

    A step keeps the scores of the allowed next tokens unchanged. Rows that have ended, or got a token that was not
    allowed, may only end. ``rows`` are sample, sub-task and labels; the processor passes :func:`check_tokenizer`.
    """

    def __init__(self, processor: Processor, rows: Sequence[tuple[Sample, str, Labels]]) -> None:
        grammars = [answer_grammar(*row) for row in rows]
        edges = (edge for grammar in grammars for edges in grammar.values() for edge in edges)
        tokens = tokenize(processor, {piece for piece, _ in edges})
        if untokenizable := {piece for piece, ids in tokens.items() if not ids}:
            grammars = [without_dead_ends(grammar, untokenizable) for grammar in grammars]
        self.rows = [TokenGrammar(grammar, tokens) for grammar in grammars]
        self._end = processor.eos_token_id
        self._left = self.rows
        self._active: list[ActiveNodes] = []
        self._prefix = 0

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Return the scores ``[B, V]`` with -inf for tokens that may not follow ``input_ids [B, T]``.

        The tokens of the first call, a prompt or the decoder's start token, are not part of the answers.
        """
        if not self._active:
            self._prefix = input_ids.shape[1]
            self._active = [row.start for row in self.rows]
        else:
            steps = zip(self._left, self._active, input_ids[:, -1].tolist(), strict=True)
            self._active = [row.follow(active, token) for row, active, token in steps]
        width = scores.shape[1]
        kept = [
            number * width + token
            for number, (row, active) in enumerate(zip(self._left, self._active, strict=True))
            for token in row.allowed(active) or (self._end,)
        ]
        index = torch.tensor(kept, device=scores.device)
        masked = scores.new_full(scores.shape, -torch.inf)
        masked.view(-1)[index] = scores.reshape(-1)[index]
        return masked

    def keep(self, rows: Sequence[int]) -> None:
        """Leave out all rows but these, which are numbers of those of the last call, from the next call on."""
        self._left = [self._left[row] for row in rows]
        self._active = [self._active[row] for row in rows]

    def answers(self, tokens: torch.Tensor) -> list[str]:
        """Return the answers in ``generate``'s output ``[B, T]``; truncated ones end with their last whole piece."""
        return [row.text(found) for row, found in zip(self.rows, tokens[:, self._prefix :].tolist(), strict=True)]


class TokenGrammar:
    """A grammar compiled to an automaton over tokens. Pieces with a common prefix share nodes."""

    def __init__(self, grammar: Grammar, tokens: Tokens) -> None:
        self._steps: list[dict[int, list[tuple[int, str]]]] = [{} for _ in grammar]
        self._within: dict[tuple[int, int], int] = {}
        nodes = {state: number for number, state in enumerate(grammar)}
        for state, edges in grammar.items():
            for piece, states in edges:
                self._add(nodes[state], tokens[piece], piece, [nodes[target] for target in states])
        self.start: ActiveNodes = {nodes[START]: ""} if START in nodes else {}
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

    def allowed(self, active: ActiveNodes) -> set[int]:
        """Return the tokens that may follow; none after the end."""
        return {token for node in active for token in self._steps[node]}

    def follow(self, active: ActiveNodes, token: int) -> ActiveNodes:
        """Return the nodes after a token; none if it is not allowed. A node keeps the first of several texts."""
        after: ActiveNodes = {}
        for node, text in active.items():
            for target, piece in self._steps[node].get(token, ()):
                after.setdefault(target, text + piece)
        return after

    def text(self, tokens: Iterable[int]) -> str:
        """Return the text of the answer at the start of ``tokens``, up to its end or its last whole piece."""
        active = self.start
        for token in tokens:
            if not (after := self.follow(active, token)):
                break
            active = after
        return active.get(self._done) or max(active.values(), key=len, default="")


def tokenize(processor: Processor, pieces: Iterable[str]) -> Tokens:
    """Tokenize each piece in its context within an answer, at the start or after a word.

    A piece whose characters the tokenizer drops has no tokens. One that it merges with the preceding word is tokenized
    alone, which differs from training but has the same text.
    """
    tokens = {END: [processor.eos_token_id]}
    pieces = [piece for piece in pieces if piece != END]
    before, *found = processor.answer_ids([NONE, *(NONE + piece if piece[0] == " " else piece for piece in pieces)])
    for piece, ids in zip(pieces, found, strict=True):
        if piece[0] == " ":
            apart = ids[: len(before)] == before
            ids = ids[len(before) :] if apart else processor.answer_ids([piece])[0]
        tokens[piece] = ids
    return tokens


def check_tokenizer(processor: Processor) -> None:
    """Raise UserError for a tokenizer that merges words, since answers are then no sequences of words."""
    words = tokenize(processor, {NONE, *PROBE})
    sentence = NONE + "".join(PROBE)
    if processor.answer_ids([sentence]) != [[token for piece in (NONE, *PROBE) for token in words[piece]]]:
        raise UserError(
            f'The tokenizer merges words of "{sentence}" into one token, which constrained decoding does not support. '
            "Leave out --constrained or use another base."
        )
