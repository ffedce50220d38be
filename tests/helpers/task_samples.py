"""Small samples of each task, and strategies that generate valid samples with unusual text."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from hypothesis import strategies as st

from lvlm_clorae.tasks import SUBTASKS, TASKS, parse_with_errors
from lvlm_clorae.tasks.schema import plain

LABELS: dict[str, Any] = {
    "entity": ["person", "location", "organization", "miscellaneous"],
    "relation": ["/per/per/couple", "/per/loc/place_of_residence", "couple", "None"],
    "trigger": ["Conflict:Attack", "attack", "meet"],
    "argument": {"types": ["Conflict:Attack", "attack", "meet"], "roles": ["attacker", "target", "place"]},
    "link": ["answer", "part of"],
}
TASK_OF = {subtask: task for task, subtasks in TASKS.items() for subtask in subtasks} | {"link": "document"}
BOXES = {"O1": (0.0, 0.0, 10.0, 10.0), "O2": (5.0, 5.0, 25.0, 15.5)}


def mner() -> dict[str, Any]:
    entities = [("person", 0, 1), ("location", 2, 3)]
    return _sample("mner", "Kyrie leaves Dallas .", entities=entities)


def mre(label: str = "couple") -> dict[str, Any]:
    return _sample("mre", "Ryan Reynolds with Blake Lively", relation=((0, 2), label, (3, 5)))


def mee() -> dict[str, Any]:
    attack = ("attack", (2, 3), [("attacker", (0, 1)), ("target", "O1")])
    return _sample("mee", "coalition launched airstrike", events=[attack, ("meet", None, [])], objects=BOXES)


def form() -> dict[str, Any]:
    return _sample("document", "Date: 5 May To: Mara", links=[((0, 1), "answer", (1, 3)), ((3, 4), "answer", (4, 5))])


def crowded() -> dict[str, dict[str, Any]]:
    """Return a sample per sub-task with repeated and nested names, repeated roles and overlapping boxes."""
    news = "New York Times in New York : Jordan visits Jordan , says < spot > none"
    names = [("organization", 0, 3), ("location", 4, 6), ("person", 7, 8), ("location", 9, 10)]
    boxes = {"O1": (0.0, 0.0, 10.0, 10.0), "O2": (2.0, 0.0, 12.0, 10.0), "O3": (4.0, 0.0, 14.0, 10.0)}
    attack = ("attack", (0, 1), [("target", "O1"), ("target", "O2"), ("place", "O3"), ("place", (2, 3))])
    strike = ("Conflict:Attack", (0, 1), [("target", "O1"), ("target", (2, 3))])
    events = _sample("mee", "attack on Kobani , attack", events=[attack, attack, strike], objects=boxes)
    return {
        "entity": _sample("mner", news, entities=names),
        "relation": _sample("mre", "Mara , Mara", relation=((0, 1), "None", (2, 3))),
        "trigger": events,
        "argument": events,
        "link": _sample(
            "document", "none : a a : none", links=[((0, 2), "answer", (2, 3)), ((3, 5), "part of", (5, 6))]
        ),
    }


SAMPLES = {"entity": mner, "relation": mre, "trigger": mee, "argument": mee, "link": form}
ANSWERS = {
    "entity": "person, Kyrie <spot> location, Dallas",
    "relation": "Ryan Reynolds <spot> couple <spot> Blake Lively",
    "trigger": "attack, airstrike <spot> meet",
    "argument": "attack <spot> attacker, coalition <spot> target, O1 <event> meet",
    "link": "Date: <spot> answer <spot> 5 May <event> To: <spot> answer <spot> Mara",
}

_NASTY = [
    *("none", "None", ",", ", ,", "person,", "attack", "couple", "target, O1", "O1", "O2", "O3", "a:b", "-", "<", "'"),
    *("<spot>", "<event>", "<region>", "x<spot>y", "<<spot>spot>", "< spot >", "\u3000a\u00a0b", "e\u0301"),
]
_words = st.sampled_from(_NASTY) | st.text(min_size=1, max_size=4).filter(lambda word: word.strip() != "")


@st.composite
def samples(draw: st.DrawFn, subtask: str) -> dict[str, Any]:
    """Generate a valid sample with annotations for the task of `subtask`."""
    tokens = draw(st.lists(_words, min_size=1, max_size=6))
    spans = st.tuples(st.integers(0, len(tokens) - 1), st.integers(1, 3)).map(
        lambda pair: (pair[0], min(len(tokens), sum(pair)))
    )
    objects = draw(st.sampled_from([{}, {"O1": BOXES["O1"]}, BOXES]))
    annotation: dict[str, Any]
    if subtask == "entity":
        entity = st.tuples(st.sampled_from(LABELS["entity"]), spans).map(lambda pair: (pair[0], *pair[1]))
        annotation = {"entities": draw(st.lists(entity, max_size=4))}
    elif subtask == "relation":
        annotation = {"relation": draw(st.tuples(spans, st.sampled_from(LABELS["relation"]), spans))}
    elif subtask == "link":
        annotation = {"links": draw(st.lists(st.tuples(spans, st.sampled_from(LABELS["link"]), spans), max_size=3))}
    else:
        fillers = spans | st.sampled_from(list(objects)) if objects else spans
        arguments = st.lists(st.tuples(st.sampled_from(LABELS["argument"]["roles"]), fillers), max_size=4)
        event = st.tuples(st.sampled_from(LABELS["trigger"]), st.none() | spans, arguments)
        annotation = {"events": draw(st.lists(event, max_size=3))}
    return _sample(TASK_OF[subtask], tokens, objects=objects, **annotation)


asked_samples = st.sampled_from(SUBTASKS).flatmap(lambda subtask: st.tuples(st.just(subtask), samples(subtask)))


def assert_grounded(sample: dict[str, Any], subtask: str, answer: str) -> None:
    """Assert that an answer is well formed and consists of words of the text, objects, or the names of the prompt."""
    tuples, malformed = parse_with_errors(answer, subtask, LABELS[subtask])
    assert malformed == 0, answer
    text = f" {plain(sample['text'])} "
    ids = [item["id"] for item in sample["objects"]]
    split_ids = [f"{name[0]} {name[1:]}" for name in ids if f" {name} " in text]
    for item in tuples:
        if subtask == "relation":
            assert item[::2] == tuple(plain(sample["relation"][name]["text"]) for name in ("head", "tail"))
        elif subtask == "link":
            assert all(f" {end} " in text for end in item[::2]), answer
        elif subtask == "argument":
            assert item[2] in ids + split_ids or f" {item[2]} " in text, answer
        else:
            assert (subtask == "trigger" and not item[1]) or f" {item[1]} " in text, answer


def _sample(
    task: str,
    tokens: str | list[str],
    *,
    entities: Any = None,
    relation: Any = None,
    events: Any = None,
    links: Any = None,
    objects: Any = None,
) -> dict[str, Any]:
    """Build a sample from terse annotations, in which a mention is its span."""
    tokens = tokens.split() if isinstance(tokens, str) else tokens

    def mention(span: tuple[int, int]) -> dict[str, Any]:
        return {"text": " ".join(tokens[slice(*span)]), "span": list(span)}

    def argument(role: str, filler: Any) -> dict[str, Any]:
        return {"role": role, "object": filler} if isinstance(filler, str) else {"role": role, **mention(filler)}

    sample: dict[str, Any] = {"dataset": "demo", "task": task, "text": " ".join(tokens), "tokens": tokens}
    sample["image"] = None
    sample["objects"] = [{"id": name, "box": list(box), "label": ""} for name, box in (objects or {}).items()]
    if entities is not None:
        sample["entities"] = [{"type": label, **mention((start, end))} for label, start, end in entities]
    if relation is not None:
        sample["relation"] = _ends(mention, *relation)
    if links is not None:
        sample["links"] = [_ends(mention, *link) for link in links]
    if events is not None:
        sample["events"] = [
            {"type": label, "trigger": span and mention(span), "arguments": [argument(*item) for item in arguments]}
            for label, span, arguments in events
        ]
    return sample


def _ends(mention: Callable[[Any], Any], head: Any, label: str, tail: Any) -> dict[str, Any]:
    return {"head": mention(head), "tail": mention(tail), "label": label}
