from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given

from lvlm_clorae.errors import UserError
from lvlm_clorae.tasks import EVENT, REGION, SPOT, SUBTASKS, build_prompt

from .samples import LABELS, SAMPLES, asked_samples, mee, mner, mre


def test_the_prompts_as_they_are() -> None:
    assert {subtask: build_prompt(SAMPLES[subtask](), subtask, LABELS[subtask]) for subtask in SUBTASKS} == {
        "entity": "entities. text: Kyrie leaves Dallas . types: person, location, organization, miscellaneous",
        "relation": "relation between Ryan Reynolds and Blake Lively. text: Ryan Reynolds with Blake Lively "
        "relations: /per/per/couple, /per/loc/place_of_residence, couple, None",
        "trigger": "event triggers. objects: O1 <region> O2 <region> text: coalition launched airstrike "
        "types: Conflict:Attack, attack, meet",
        "argument": "event arguments. objects: O1 <region> O2 <region> text: coalition launched airstrike "
        "types: Conflict:Attack, attack, meet roles: attacker, target, place",
    }


def test_any_sample_with_objects_lists_them() -> None:
    sample = {**mner(), "objects": mee()["objects"]}
    assert "objects: O1 <region> O2 <region> text:" in build_prompt(sample, "entity", LABELS["entity"])


def test_an_image_only_sample_has_no_text_part() -> None:
    sample = {**mee(), "text": "", "tokens": []}
    assert "text:" not in build_prompt(sample, "trigger", LABELS["trigger"])


@given(asked_samples)
def test_the_prompt_does_not_depend_on_the_gold_answer(asked: tuple[str, dict[str, Any]]) -> None:
    subtask, sample = asked
    asked_only: dict[str, Any] = {key: sample[key] for key in ("text", "objects")}
    if subtask == "relation":
        asked_only["relation"] = {end: {"text": sample["relation"][end]["text"]} for end in ("head", "tail")}
    assert build_prompt(sample, subtask, LABELS[subtask]) == build_prompt(asked_only, subtask, LABELS[subtask])


@given(asked_samples)
def test_text_forges_no_marker(asked: tuple[str, dict[str, Any]]) -> None:
    subtask, sample = asked
    prompt = build_prompt(sample, subtask, LABELS[subtask])
    assert prompt.count(REGION) == len(sample["objects"])
    assert SPOT not in prompt
    assert EVENT not in prompt
    assert "\n" not in prompt


@pytest.mark.parametrize("relation", [None, {"head": {"text": "Ryan"}}, {"head": None, "tail": {"text": "Blake"}}])
def test_a_relation_needs_two_names(relation: Any) -> None:
    with pytest.raises(UserError, match="head"):
        build_prompt({**mre(), "relation": relation}, "relation", LABELS["relation"])


def test_unknown_subtask_and_labels_are_the_users_error() -> None:
    with pytest.raises(UserError, match="relation"):
        build_prompt(mre(), "relations", LABELS["relation"])
    with pytest.raises(UserError, match="roles"):
        build_prompt(mee(), "argument", LABELS["trigger"])
