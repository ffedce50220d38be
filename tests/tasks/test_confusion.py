from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lvlm_clorae.errors import UserError
from lvlm_clorae.tasks import MISSED, SPURIOUS, SUBTASKS, confusion, format_answer, gold_tuples, score, score_sample

from .samples import BOXES, LABELS, asked_samples, crowded, mee

PLACE_OF_LABEL = {"entity": 0, "relation": 1, "trigger": 0, "argument": 1}
_NEAR_O1 = (0.0, 0.0, 10.0, 9.0)


def test_entities_of_one_text() -> None:
    gold = [("person", "Kyrie"), ("location", "Dallas"), ("person", "Luka")]
    predicted = [("location", "Kyrie"), ("location", "Dallas"), ("person", "Dirk")]
    assert confusion(gold, predicted, "entity") == {
        ("person", "location"): 1,
        ("location", "location"): 1,
        ("person", MISSED): 1,
        (SPURIOUS, "person"): 1,
    }


def test_right_ones_pair_first_and_each_once() -> None:
    gold = [("person", "Jordan"), ("location", "Jordan")]
    assert confusion(gold, gold[::-1], "entity") == {("person", "person"): 1, ("location", "location"): 1}
    assert confusion(gold, [("location", "Jordan")] * 2, "entity") == {
        ("location", "location"): 1,
        ("person", "location"): 1,
    }
    assert confusion(gold, [("organization", "Jordan")] * 3, "entity") == {
        ("person", "organization"): 1,
        ("location", "organization"): 1,
        (SPURIOUS, "organization"): 1,
    }


def test_what_is_left_of_one_text_pairs_in_order() -> None:
    gold, predicted = [("a", "x"), ("b", "x")], [("c", "x"), ("d", "x")]
    assert confusion(gold, predicted, "trigger") == {("a", "c"): 1, ("b", "d"): 1}


def test_a_relation_has_its_names_and_none_is_a_label() -> None:
    couple = [("a", "couple", "b")]
    assert confusion(couple, [("a", "none", "b")], "relation") == {("couple", "none"): 1}
    assert confusion([("a", "none", "b")], [("a", "none", "b")], "relation") == {("none", "none"): 1}
    assert confusion(couple, [("b", "couple", "a")], "relation") == {("couple", MISSED): 1, (SPURIOUS, "couple"): 1}
    assert confusion(couple, [], "relation") == {("couple", MISSED): 1}


def test_triggers_without_a_text_are_the_same() -> None:
    assert confusion([("attack", "")], [("meet", "")], "trigger") == {("attack", "meet"): 1}


def test_arguments_have_their_type_and_filler() -> None:
    gold = [("attack", "target", BOXES["O1"]), ("attack", "attacker", "army")]
    predicted = [("attack", "attacker", _NEAR_O1), ("meet", "attacker", "army")]
    assert confusion(gold, predicted, "argument") == {
        ("target", "attacker"): 1,
        ("attacker", MISSED): 1,
        (SPURIOUS, "attacker"): 1,
    }
    assert confusion(gold[:1], [("attack", "target", "O1")], "argument") == {
        ("target", MISSED): 1,
        (SPURIOUS, "target"): 1,
    }
    assert confusion(gold[:1], [("attack", "place", _NEAR_O1), ("attack", "target", _NEAR_O1)], "argument") == {
        ("target", "target"): 1,
        (SPURIOUS, "place"): 1,
    }


@given(st.sampled_from(SUBTASKS), st.data())
def test_every_tuple_is_counted_once(subtask: str, data: st.DataObject) -> None:
    label = PLACE_OF_LABEL[subtask]
    gold, predicted = data.draw(_tuples(subtask)), data.draw(_tuples(subtask))
    found = confusion(gold, predicted, subtask)
    of_gold, of_predicted, right = Counter[str](), Counter[str](), 0
    for (ours, theirs), times in found.items():
        of_gold[ours] += times
        of_predicted[theirs] += times
        right += times * (ours == theirs and (subtask, ours) != ("relation", "none"))
    del of_gold[SPURIOUS], of_predicted[MISSED]
    assert of_gold == Counter(item[label] for item in gold)
    assert of_predicted == Counter(item[label] for item in predicted)
    assert right == score(gold, predicted, subtask).tp
    mirrored = {(theirs, ours): times for (ours, theirs), times in confusion(predicted, gold, subtask).items()}
    if subtask != "argument":  # of boxes that overlap with several, either may be the one
        names = {MISSED: SPURIOUS, SPURIOUS: MISSED}
        assert found == {(names.get(a, a), names.get(b, b)): times for (a, b), times in mirrored.items()}


@given(asked_samples)
def test_gold_is_taken_for_itself(asked: tuple[str, dict[str, Any]]) -> None:
    subtask, sample = asked
    gold = gold_tuples(sample, subtask)
    predicted = score_sample(sample, format_answer(sample, subtask), subtask, LABELS[subtask]).tuples
    assert confusion(gold, predicted, subtask) == Counter((item[PLACE_OF_LABEL[subtask]],) * 2 for item in gold)


def test_samples_add() -> None:
    samples = [mee(), crowded()["argument"]]
    total = sum((confusion(gold_tuples(sample, "argument"), [], "argument") for sample in samples), Counter())
    assert total == {("attacker", MISSED): 1, ("target", MISSED): 7, ("place", MISSED): 4}


def test_an_unknown_subtask_is_the_users_error() -> None:
    with pytest.raises(UserError, match="argument"):
        confusion([], [], "arguments")


def _tuples(subtask: str) -> st.SearchStrategy[list[tuple[Any, ...]]]:
    names, labels = st.sampled_from("xy"), st.sampled_from(["a", "b", "none"])
    boxes = st.sampled_from([(float(x), 0.0, x + 10.0, 1.0) for x in (0, 2, 4)])
    parts = {
        "entity": (labels, names),
        "relation": (names, labels, names),
        "trigger": (labels, names | st.just("")),
        "argument": (names, labels, names | boxes),
    }
    return st.lists(st.tuples(*parts[subtask]), max_size=6)
