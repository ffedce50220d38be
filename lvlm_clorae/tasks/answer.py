"""Answers as UMIE writes them (METHOD 7), from annotation to string and from string to tuples.

    entity     person, Kyrie <spot> location, Dallas
    relation   Ryan Reynolds <spot> couple <spot> Blake Lively
    trigger    attack, airstrike <spot> meet                     an event seen only in the picture is its type alone
    argument   attack <spot> attacker, coalition <spot> target, O1 <event> meet
    nothing    none

A type or role ends at the first comma, so what follows it may hold commas, colons, "none" or a label's name. Text that
contains a marker is written with the marker broken up (`plain`), in answers and gold tuples alike, and so is a text
argument that reads like an object of its own sample ("O 1"), which would otherwise be taken for that object.
"""

from __future__ import annotations

from collections.abc import Container, Sequence
from typing import Any, NamedTuple

from lvlm_clorae.tasks.schema import EVENT, NONE, SPOT, Labels, Sample, check_subtask, label_sets, plain

Tuples = list[tuple[Any, ...]]


class Parsed(NamedTuple):
    """What an answer says: its tuples, and how many of its pieces were dropped as malformed or of unknown label."""

    tuples: Tuples
    malformed: int


def format_answer(sample: Sample, subtask: str) -> str:
    """The gold answer of a sound sample (`check_sample`); ``none`` where nothing is annotated.

    `parse_answer` reads it back as `written_tuples`, provided that the sample's labels are among those given to it.
    Raises UserError for an unknown sub-task.
    """
    if subtask == "argument":
        events = [
            f" {SPOT} ".join([event["type"], *(f"{role}, {filler}" for role, filler in _arguments(event, sample))])
            for event in sample.get("events") or ()
        ]
        return f" {EVENT} ".join(events) or NONE
    tuples = written_tuples(sample, subtask)
    if subtask == "relation":
        pieces = [piece for triple in tuples for piece in triple]
    else:
        pieces = [f"{kind}, {text}" if text else kind for kind, text in tuples]
    return f" {SPOT} ".join(pieces) or NONE


def written_tuples(sample: Sample, subtask: str) -> Tuples:
    """The annotation as the tuples that `format_answer` writes: a visual argument is still its object's id.

    entity (type, text); relation (head, label, tail); trigger (type, text or ""); argument (type, role, text or id).
    Raises UserError for an unknown sub-task.
    """
    check_subtask(subtask)
    if subtask == "entity":
        return [(entity["type"], plain(entity["text"])) for entity in sample.get("entities") or ()]
    if subtask == "relation":
        relation = sample.get("relation")
        if not relation:
            return []
        return [(plain(relation["head"]["text"]), relation["label"], plain(relation["tail"]["text"]))]
    events = sample.get("events") or ()
    if subtask == "trigger":
        return [(event["type"], plain(event["trigger"]["text"]) if event["trigger"] else "") for event in events]
    return [(event["type"], *argument) for event in events for argument in _arguments(event, sample)]


def told_apart(text: str, ids: Container[str]) -> str:
    """A text argument, broken up where it reads like one of its sample's objects."""
    return f"{text[0]} {text[1:]}" if text in ids else text


def parse_answer(text: str, subtask: str, labels: Labels) -> Tuples:
    """The tuples of an answer, in its order and with its duplicates; a broken piece costs only itself.

    entity (type, text); relation (head, label, tail); trigger (type, text or ""); argument (type, role, text or object
    id), where an event without arguments has no tuple. Labels match without regard to case and come back as `labels`
    (see `build_prompt`) spells them. Never raises on any string; UserError for an unknown sub-task or labels of
    another form.
    """
    return parse_with_errors(text, subtask, labels).tuples


def parse_with_errors(text: str, subtask: str, labels: Labels) -> Parsed:
    """`parse_answer`, with the number of pieces it had to drop.

    An empty answer is one such piece. A relation that is not exactly three known pieces is dropped whole, and so is an
    event of unknown type with all its arguments.
    """
    sets = label_sets(subtask, labels)
    if plain(text).casefold() == NONE:
        return Parsed([], 0)
    if subtask == "relation":
        return _parse_relation(text, sets["relations"])
    if subtask == "argument":
        return _parse_events(text, sets["types"], sets["roles"])
    pieces = text.split(SPOT)
    pairs = [_pair(piece, sets["types"], bare=subtask == "trigger") for piece in pieces]
    return _kept(pairs)


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
        kind = _match(name, types)
        if kind is None:
            malformed += 1 + len(pieces)
            continue
        arguments = _kept([_pair(piece, roles) for piece in pieces])
        tuples += [(kind, role, filler) for role, filler in arguments.tuples]
        malformed += arguments.malformed
    return Parsed(tuples, malformed)


def _pair(piece: str, labels: Sequence[str], bare: bool = False) -> tuple[str, str] | None:
    """``label, text`` as (label, text), and where `bare` ones are allowed ``label`` as (label, ""); None otherwise."""
    name, comma, rest = piece.partition(",")
    label, text = _match(name, labels), plain(rest)
    sound = text or (bare and not comma)
    return (label, text) if label is not None and sound else None


def _kept(pairs: Sequence[tuple[str, str] | None]) -> Parsed:
    tuples: Tuples = [pair for pair in pairs if pair is not None]
    return Parsed(tuples, len(pairs) - len(tuples))


def _match(name: str, labels: Sequence[str]) -> str | None:
    """The label that `name` means: the very one before one that differs in case."""
    name = plain(name)
    if name in labels:
        return name
    folded = name.casefold()
    return next((label for label in labels if label.casefold() == folded), None)


def _arguments(event: dict[str, Any], sample: Sample) -> list[tuple[str, str]]:
    """(role, text or object id) of each argument of one event."""
    ids = {item["id"] for item in sample.get("objects") or ()}
    return [(argument["role"], _filler(argument, ids)) for argument in event["arguments"]]


def _filler(argument: dict[str, Any], ids: set[str]) -> str:
    return str(argument["object"]) if "object" in argument else told_apart(plain(argument["text"]), ids)
