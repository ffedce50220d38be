"""Lookup baselines on invented samples: results by hand, and no label that is not in training."""

from __future__ import annotations

import sys
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from lvlm_clorae.data.index import load_index
from lvlm_clorae.tasks import Counts
from tests.helpers.launch import REPOSITORY

sys.path.insert(0, str(REPOSITORY / "benchmarks"))

from text_floors import Gazetteer, floor, floors

Sample = dict[str, Any]


def post(text: str, *names: tuple[int, int, str]) -> Sample:
    tokens = text.split()
    entities = [{"type": label, "span": [a, b], "text": " ".join(tokens[a:b])} for a, b, label in names]
    return {"text": text, "tokens": tokens, "entities": entities}


def pair(head: str, label: str, tail: str) -> Sample:
    return {"relation": {"head": {"text": head}, "tail": {"text": tail}, "label": label}}


def news(text: str, *events: tuple[str, int | None, dict[str, int | str]]) -> Sample:
    """Events as (type, place of the trigger, role -> place in the text or object)."""
    tokens = text.split()

    def word(place: int) -> dict[str, Any]:
        return {"text": tokens[place], "span": [place, place + 1]}

    found = []
    for name, trigger, roles in events:
        arguments = [
            {"role": role, **(word(at) if isinstance(at, int) else {"object": at})} for role, at in roles.items()
        ]
        found.append({"type": name, "trigger": None if trigger is None else word(trigger), "arguments": arguments})
    return {"text": text, "tokens": tokens, "objects": [{"id": "O1", "box": [0, 0, 9, 9]}], "events": found}


def test_a_phrase_gets_its_most_frequent_label() -> None:
    train = [
        post("Avalon sings", (0, 1, "person")),
        post("in Avalon", (1, 2, "location")),
        post("to Avalon again", (1, 2, "location")),
        post("New Avalon rises", (0, 2, "organization")),
        post("May sings", (0, 1, "person")),
        post("in May"),
        post("since May"),
    ]
    test = [
        post("Avalon and avalon", (0, 1, "location")),  # case is not folded
        post("New Avalon and May", (0, 2, "organization"), (3, 4, "person")),  # the longest match; May has mostly none
        post("Avalon Avalon", (0, 1, "person"), (1, 2, "location")),  # two predictions, one is right
    ]
    assert floor(train, test, "entity") == Counts(tp=3, predicted=4, gold=5)


def test_a_relation_gets_the_label_of_the_same_names_or_the_most_frequent() -> None:
    train = [pair("Ann", "peer", "Bo"), pair("Ann", "couple", "Bo"), pair("Ann", "couple", "Bo")]
    train += [pair("Cy", "none", f"D{number}") for number in range(9)] + [
        pair("E", "peer", "F"),
        pair("G", "peer", "H"),
    ]
    test = [
        pair("Ann", "couple", "Bo"),  # the label of these names
        pair("Bo", "peer", "Ann"),  # new in this order; peer is the most frequent
        pair("Cy", "none", "D1"),  # none is neither predicted nor gold
        pair("X", "couple", "Y"),
    ]
    assert floor(train, test, "relation") == Counts(tp=2, predicted=3, gold=3)


def test_arguments_are_those_of_the_events_found() -> None:
    train = [
        news("troops attacked Tamsk", ("attack", 1, {"attacker": 0, "place": 2, "target": "O1"})),
        news("envoys met in Tamsk", ("meet", 1, {"entity": 0})),
        news("Tamsk sleeps"),  # without an event the name has no label
        news("Tamsk wakes"),
        news("", ("meet", None, {"entity": "O1"})),
    ]
    test = [
        news("troops attacked Tamsk", ("attack", 1, {"attacker": 0, "place": 2, "target": "O1"})),
        news("troops met envoys", ("meet", 1, {"entity": 2})),  # troops are no argument of a meeting
        news("troops in Tamsk", ("attack", None, {"attacker": 0})),  # only the image shows it
    ]
    assert floor(train, test, "trigger") == Counts(tp=2, predicted=2, gold=3)
    assert floor(train, test, "argument") == Counts(tp=3, predicted=3, gold=5)


def test_a_task_without_annotation_in_training_predicts_nothing() -> None:
    assert floor([post("nobody here")], [post("Ann", (0, 1, "person"))], "entity") == Counts(gold=1)
    assert floor([pair("A", "none", "B")], [pair("C", "peer", "D")], "relation") == Counts(gold=1)


@st.composite
def posts(draw: st.DrawFn) -> list[Sample]:
    def one() -> Sample:
        words = draw(st.lists(st.sampled_from("abc"), min_size=1, max_size=6))
        cuts = sorted(draw(st.sets(st.integers(0, len(words)), max_size=4)))
        spans = list(zip(cuts[::2], cuts[1::2], strict=False))
        return post(" ".join(words), *((a, b, draw(st.sampled_from(["x", "y"]))) for a, b in spans))

    return [one() for _ in range(draw(st.integers(1, 5)))]


@given(posts(), st.lists(st.sampled_from("abcd"), max_size=8))
def test_predictions_are_labels_and_phrases_of_training(train: list[Sample], tokens: list[str]) -> None:
    found = Gazetteer(train, lambda item: [(*entity["span"], entity["type"]) for entity in item["entities"]]).find(
        tokens
    )
    said = {(entity["type"], entity["text"]) for item in train for entity in item["entities"]}
    assert set(found) <= said
    rest = " ".join(tokens)
    for _, text in found:  # in order and without overlap
        before, _, rest = rest.partition(text)
        assert before != rest or text
        assert text
    assert sum(len(text.split()) for _, text in found) <= len(tokens)


def test_the_floors_of_shards_have_every_dataset_task_with_a_baseline() -> None:
    found = floors(REPOSITORY / "shards/demo")
    assert set(found) == set(load_index(REPOSITORY / "shards/demo").dataset_tasks("test"))
    assert all(counts.gold > 0 for counts in found.values())
    assert any(counts.tp > 0 for counts in found.values())


def test_an_entity_that_is_not_in_the_text_as_written_is_left_out() -> None:
    train, test = post("TAMAN SDN", (0, 2, "company")), post("TAMAN SDN", (0, 2, "company"))
    train["entities"].append({"type": "total", "text": "9.00", "verbatim": False})
    assert floor([train], [test], "entity") == Counts(tp=1, predicted=1, gold=1)
