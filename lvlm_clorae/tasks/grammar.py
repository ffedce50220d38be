"""Answer grammar: label names, the sample's own words and separators as a finite automaton over pieces of text.

Every answer that `format_answer` writes for a valid sample is accepted, and every accepted answer parses without a
malformed piece: decoding under it (lvlm_clorae/models/constrained.py) cannot produce a name that the sample lacks.

    START  --"person,"-->  SPAN  --" Kyrie"-->  0 and REST  --" <spot> location,"-->  SPAN ...
"""

from collections.abc import Container, Sequence

from lvlm_clorae.tasks.answer import distinct_from_ids
from lvlm_clorae.tasks.schema import EVENT, NONE, SPOT, Labels, Sample, label_sets, plain

State = int | str
Edge = tuple[str, tuple[State, ...]]
Grammar = dict[State, list[Edge]]
"""State -> its pieces of text, each with the states it leads to. An answer is the concatenation of its pieces, all but
the first of which begin with a space."""

START, DONE = "start", "done"
SPAN = "span"  # before a span of the text or an object
REST = "rest"  # before the next part or the end; a word of the text leads here and to the state of its own number
STOP = "stop"  # before the end
END = ""  # the last piece of an answer

_ENDS: Grammar = {STOP: [(END, (DONE,))], DONE: []}


def answer_grammar(sample: Sample, subtask: str, labels: Labels) -> Grammar:
    """Build the grammar of a sample's answers: a span is any run of consecutive words, an object any of the sample.

    A relation is between the two names in the prompt, a link between two spans, and `none` is an answer of the other
    sub-tasks.
    Raises UserError as `label_sets` does.
    """
    sets = label_sets(subtask, labels)
    if subtask == "relation":
        return {**_relation(sample, sets["relations"]), **_ENDS}
    words = [plain(word) for word in sample.get("text", "").split()]
    if subtask == "link":
        return without_dead_ends({**_links(words, sets["relations"]), **_ENDS})
    first: list[Edge] = []
    if subtask != "argument":
        first += [(f"{name},", (SPAN,)) for name in sets["types"]]
    if subtask != "entity":  # an event can consist of its type alone
        first += [(name, (REST,)) for name in sets["types"]]
    objects = [item["id"] for item in sample.get("objects") or ()] if subtask == "argument" else []
    separator = EVENT if subtask == "argument" else SPOT
    further = [(f" {separator} {piece}", states) for piece, states in first]
    arguments: list[Edge] = [(f" {SPOT} {role},", (SPAN,)) for role in sets.get("roles", ())]
    grammar = {
        START: [*first, (NONE, (STOP,))],
        REST: [*arguments, *further, (END, (DONE,))],
        **_spans(words, objects),
    }
    return without_dead_ends({**grammar, **_ENDS})


def without_dead_ends(grammar: Grammar, excluded: Container[str] = ()) -> Grammar:
    """Remove the excluded pieces, and the pieces from which no end is reachable, as a role without text or objects."""
    grammar = {state: [edge for edge in edges if edge[0] not in excluded] for state, edges in grammar.items()}
    live: dict[State, None] = {DONE: None}
    before = 0
    while before < len(live):
        before = len(live)
        for state, edges in grammar.items():
            if any(target in live for _, states in edges for target in states):
                live[state] = None
    targets = {state: [(piece, tuple(filter(live.__contains__, to))) for piece, to in grammar[state]] for state in live}
    return {state: [edge for edge in edges if edge[1]] for state, edges in targets.items()}


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


def _links(words: Sequence[str], labels: Sequence[str]) -> Grammar:
    heads = _spans(words, (), "head", "label", first=len(words))
    return {
        **_spans(words, ()),
        **heads,
        START: [(piece[1:], states) for piece, states in heads["head"]] + [(NONE, (STOP,))],
        "label": [(f" {SPOT} {name} {SPOT}", (SPAN,)) for name in labels],
        REST: [(f" {EVENT}", ("head",)), (END, (DONE,))],
    }


def _spans(
    words: Sequence[str], objects: Sequence[str], begin: State = SPAN, end: State = REST, first: int = 0
) -> Grammar:
    """Build the states of spans from `begin` to `end`: word i leads to state `first` + i, in which i + 1 can follow."""
    begins: list[Edge] = [(f" {word}", (number, end)) for number, word in enumerate(words, first)]
    whole = [*objects, *(distinct_from_ids(word, objects) for word in words if word in objects)]
    grammar: Grammar = {begin: begins + [(f" {name}", (end,)) for name in whole]}
    for number in range(len(words)):
        grammar[first + number] = begins[number + 1 : number + 2]
    return grammar
