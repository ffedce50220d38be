"""Answers in UMIE's format: annotation to string, and string to tuples.

    entity     person, Kyrie <spot> location, Dallas
    relation   Ryan Reynolds <spot> couple <spot> Blake Lively
    trigger    attack, airstrike <spot> meet                     an event seen only in the image has its type alone
    argument   attack <spot> attacker, coalition <spot> target, O1 <event> meet
    link       Date: <spot> answer <spot> 5 May <event> To: <spot> answer <spot> Mara
    nothing    none
    caption    A dog runs on the beach .                         as a whole its only tuple

A type or role ends at the first comma, so the text after it may contain commas, colons, "none" or the name of a label.
Markers in text are split (`plain`), in answers and gold tuples alike. A text argument that equals an object id of its
own sample is split too ("O 1"), because it would otherwise be parsed as that object.
"""

from collections.abc import Container, Sequence
from typing import Any, NamedTuple

from lvlm_clorae.tasks.schema import CAPTION, EVENT, NONE, SPOT, Labels, Sample, check_subtask, label_sets, plain

Tuples = list[tuple[Any, ...]]


class Parsed(NamedTuple):
    """The tuples of an answer, and the number of pieces dropped as malformed or with an unknown label."""

    tuples: Tuples
    malformed: int


def format_answer(sample: Sample, subtask: str) -> str:
    """Format the gold answer of a valid sample; ``none`` without annotations. Raises UserError for another sub-task."""
    if subtask == CAPTION:
        return plain(sample[CAPTION])
    if subtask == "argument":
        events = [
            f" {SPOT} ".join([event["type"], *(f"{role}, {filler}" for role, filler in _arguments(event, sample))])
            for event in sample.get("events") or ()
        ]
        return f" {EVENT} ".join(events) or NONE
    tuples = written_tuples(sample, subtask)
    if subtask == "link":
        return f" {EVENT} ".join(f" {SPOT} ".join(link) for link in tuples) or NONE
    if subtask != "relation":
        tuples = [(f"{label}, {text}" if text else label,) for label, text in tuples]
    return f" {SPOT} ".join(piece for pieces in tuples for piece in pieces) or NONE


def written_tuples(sample: Sample, subtask: str) -> Tuples:
    """Return the annotation as the tuples that `parse_answer` returns for its answer."""
    check_subtask(subtask)
    if subtask == CAPTION:
        return [(plain(sample[CAPTION]),)]
    if subtask == "entity":
        return [(entity["type"], plain(entity["text"])) for entity in sample.get("entities") or ()]
    if subtask in ("relation", "link"):
        relations = sample.get("links") or () if subtask == "link" else filter(None, [sample.get("relation")])
        return [(plain(one["head"]["text"]), one["label"], plain(one["tail"]["text"])) for one in relations]
    events = sample.get("events") or ()
    if subtask == "trigger":
        return [(event["type"], plain(event["trigger"]["text"]) if event["trigger"] else "") for event in events]
    return [(event["type"], *argument) for event in events for argument in _arguments(event, sample)]


def distinct_from_ids(text: str, ids: Container[str]) -> str:
    """Return a text argument, with a space inserted if it equals an object id of its sample."""
    return f"{text[0]} {text[1:]}" if text in ids else text


def parse_answer(text: str, subtask: str, labels: Labels) -> Tuples:
    """Parse an answer to tuples, in its order and with its duplicates. A malformed piece drops only itself.

    entity (type, text); relation and link (head, label, tail); trigger (type, text or ""); argument (type, role, text
    or object id), where an event without arguments has no tuple. Labels match case-insensitively and are returned as
    spelled in `labels` (see `build_prompt`). No string raises; UserError for an unknown sub-task or labels of another
    form.
    """
    return parse_with_errors(text, subtask, labels).tuples


def parse_with_errors(text: str, subtask: str, labels: Labels) -> Parsed:
    """Parse an answer as `parse_answer` does, and count the dropped pieces.

    A relation or link that is not exactly three known pieces is dropped as a whole, as is an event of unknown type.
    """
    if not isinstance(text, str):
        raise TypeError(f"An answer must be a str, not {type(text).__name__}.")
    sets = label_sets(subtask, labels)
    if subtask == CAPTION:
        return Parsed([(plain(text),)], 0)
    if plain(text).casefold() == NONE:
        return Parsed([], 0)
    if subtask == "relation":
        return _parse_relation(text, sets["relations"])
    if subtask == "link":
        links = [_parse_relation(link, sets["relations"]) for link in text.split(EVENT)]
        return Parsed([item for link in links for item in link.tuples], sum(link.malformed for link in links))
    if subtask == "argument":
        return _parse_events(text, sets["types"], sets["roles"])
    return _split_malformed([_pair(piece, sets["types"], bare=subtask == "trigger") for piece in text.split(SPOT)])


def _parse_relation(text: str, labels: Sequence[str]) -> Parsed:
    pieces = text.split(SPOT)
    if len(pieces) == 3:
        head, label, tail = plain(pieces[0]), _match(pieces[1], labels), plain(pieces[2])
        if head and label is not None and tail:
            return Parsed([(head, label, tail)], 0)
    return Parsed([], len(pieces))


def _parse_events(text: str, types: Sequence[str], roles: Sequence[str]) -> Parsed:
    tuples: Tuples = []
    malformed = 0
    for event in text.split(EVENT):
        name, *pieces = event.split(SPOT)
        event_type = _match(name, types)
        if event_type is None:
            malformed += 1 + len(pieces)
            continue
        arguments = _split_malformed([_pair(piece, roles) for piece in pieces])
        tuples += [(event_type, role, filler) for role, filler in arguments.tuples]
        malformed += arguments.malformed
    return Parsed(tuples, malformed)


def _pair(piece: str, labels: Sequence[str], bare: bool = False) -> tuple[str, str] | None:
    """Parse ``label, text`` to (label, text), and if `bare` also ``label`` to (label, ""); None for anything else."""
    name, comma, rest = piece.partition(",")
    label, text = _match(name, labels), plain(rest)
    valid = text or (bare and not comma)
    return (label, text) if label is not None and valid else None


def _split_malformed(pairs: Sequence[tuple[str, str] | None]) -> Parsed:
    tuples: Tuples = [pair for pair in pairs if pair is not None]
    return Parsed(tuples, len(pairs) - len(tuples))


def _match(name: str, labels: Sequence[str]) -> str | None:
    """Return the label equal to `name`, else the first that differs only in case, else None."""
    name = plain(name)
    return name if name in labels else next((label for label in labels if label.casefold() == name.casefold()), None)


def _arguments(event: dict[str, Any], sample: Sample) -> list[tuple[str, str]]:
    """Return (role, text or object id) of each argument of one event."""
    ids = {item["id"] for item in sample.get("objects") or ()}
    return [
        (item["role"], item["object"] if "object" in item else distinct_from_ids(plain(item["text"]), ids))
        for item in event["arguments"]
    ]
