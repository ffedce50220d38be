"""What an answer may be: label names, the sample's own words and separators, as an automaton of pieces of text.

Whatever `format_answer` writes of a sound sample is a way through it, and every way through it parses without a
malformed piece. Decoding under it (lvlm_clorae/models/constrained.py) can neither invent a name nor break the form.

    START  --"person,"-->  SPAN  --" Kyrie"-->  0 and REST  --" <spot> location,"-->  SPAN ...
"""

from __future__ import annotations

from collections.abc import Container, Sequence

from lvlm_clorae.tasks.answer import told_apart
from lvlm_clorae.tasks.schema import EVENT, NONE, SPOT, Labels, Sample, label_sets, plain

State = int | str
Edge = tuple[str, tuple[State, ...]]
Grammar = dict[State, list[Edge]]
"""State -> its pieces, each with the states it leads to. Pieces joined as they are make the answer: all but the first
begin with a blank."""

START = "start"
SPAN = "span"
"""Before a span of the text, or an object."""
REST = "rest"
"""Where the answer may go on with its next part, or end. A word of the text leads here, and to its own number."""
STOP = "stop"
"""Where the answer must end."""
DONE = "done"
END = ""
"""The piece that ends an answer."""

_ENDS: Grammar = {STOP: [(END, (DONE,))], DONE: []}


def answer_grammar(sample: Sample, subtask: str, labels: Labels) -> Grammar:
    """The answers of a sample: spans are any consecutive words of its text, objects those that it has.

    A relation is between the two names that are asked for. `none` is an answer where nothing may be annotated, so not
    of a relation. Labels are spelled as in `labels` (see `build_prompt`). Raises UserError as `label_sets`.
    """
    sets = label_sets(subtask, labels)
    if subtask == "relation":
        return {**_relation(sample, sets["relations"]), **_ENDS}
    first: list[Edge] = []
    if subtask != "argument":
        first += [(f"{name},", (SPAN,)) for name in sets["types"]]
    if subtask != "entity":  # an event may be its type alone
        first += [(name, (REST,)) for name in sets["types"]]
    separator = EVENT if subtask == "argument" else SPOT
    further = [(f" {separator} {piece}", states) for piece, states in first]
    arguments: list[Edge] = [(f" {SPOT} {role},", (SPAN,)) for role in sets.get("roles", ())]
    grammar = {
        START: [*first, (NONE, (STOP,))],
        REST: [*arguments, *further, (END, (DONE,))],
        **_spans([plain(word) for word in sample.get("text", "").split()], _objects(sample, subtask)),
    }
    return without_dead_ends({**grammar, **_ENDS})


def without_dead_ends(grammar: Grammar, unsayable: Container[str] = ()) -> Grammar:
    """The grammar without the pieces given, and without what leads to no end then, as a role where there is no text."""
    grammar = {state: [edge for edge in edges if edge[0] not in unsayable] for state, edges in grammar.items()}
    alive: dict[State, None] = {DONE: None}
    before = 0
    while before < len(alive):
        before = len(alive)
        for state, edges in grammar.items():
            if any(target in alive for _, states in edges for target in states):
                alive[state] = None
    found: Grammar = {state: [] for state in alive}
    for state in alive:
        for piece, states in grammar[state]:
            kept = tuple(target for target in states if target in alive)
            if kept:
                found[state].append((piece, kept))
    return found


def _relation(sample: Sample, labels: Sequence[str]) -> Grammar:
    relation = sample.get("relation") or {}
    if not (relation.get("head") and relation.get("tail") and labels):
        return {START: [(NONE, (STOP,))]}
    head, tail = (plain(relation[name]["text"]) for name in ("head", "tail"))
    return {
        START: [(head, ("label",))],
        "label": [(f" {SPOT} {name}", ("tail",)) for name in labels],
        "tail": [(f" {SPOT} {tail}", (STOP,))],
    }


def _spans(words: Sequence[str], objects: Sequence[str]) -> Grammar:
    """Word i leads to state i, from where word i + 1 may follow."""
    begins: list[Edge] = [(f" {word}", (number, REST)) for number, word in enumerate(words)]
    whole = [*objects, *(told_apart(word, objects) for word in words if word in objects)]
    grammar: Grammar = {SPAN: begins + [(f" {name}", (REST,)) for name in whole]}
    for number in range(len(words)):
        grammar[number] = begins[number + 1 : number + 2]
    return grammar


def _objects(sample: Sample, subtask: str) -> list[str]:
    return [item["id"] for item in sample.get("objects") or ()] if subtask == "argument" else []
