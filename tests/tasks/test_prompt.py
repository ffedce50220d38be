from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given

from lvlm_clorae.errors import UserError
from lvlm_clorae.tasks import EVENT, REGION, SPOT, SUBTASKS, build_prompt, fit_prompt, visible
from tests.helpers.task_samples import LABELS, SAMPLES, asked_samples, form, mee, mner, mre


def test_prompt_of_each_subtask() -> None:
    assert {subtask: build_prompt(SAMPLES[subtask](), subtask, LABELS[subtask]) for subtask in SUBTASKS} == {
        "entity": "entities. types: person, location, organization, miscellaneous text: Kyrie leaves Dallas .",
        "relation": "relation. relations: /per/per/couple, /per/loc/place_of_residence, couple, None "
        "between: Ryan Reynolds and Blake Lively text: Ryan Reynolds with Blake Lively",
        "trigger": "event triggers. types: Conflict:Attack, attack, meet "
        "objects: O1 <region> O2 <region> text: coalition launched airstrike",
        "argument": "event arguments. types: Conflict:Attack, attack, meet roles: attacker, target, place "
        "objects: O1 <region> O2 <region> text: coalition launched airstrike",
        "link": "links. relations: answer, part of text: Date: 5 May To: Mara",
    }


def test_prompt_with_a_layout() -> None:
    boxes = [{"span": [0, 1], "box": [8, 5, 20, 7]}, {"span": [1, 3], "box": [24, 5, 50, 7]}]
    sample = {**form(), "layout": boxes}
    prompt = build_prompt(sample, "link", LABELS["link"])
    assert prompt.endswith("text: [8 5 20 7] Date: [24 5 50 7] 5 May To: Mara")
    cut, read = fit_prompt(sample, "link", LABELS["link"], lambda prompt: "To:" not in prompt)
    assert (cut, read) == (prompt.replace(" To: Mara", ""), 3)
    assert visible(sample, read)["links"] == sample["links"][:1]
    assert visible(sample, 2)["links"] == []


def test_gold_that_is_not_in_the_text_is_not_visible() -> None:
    sample = form()
    sample["links"][0]["tail"] = {"text": "6 June", "verbatim": False}
    sample["entities"] = [
        {"type": "date", "text": "5 may", "span": [1, 3], "verbatim": False},
        {"type": "date", "text": "6 June", "verbatim": False},
    ]
    assert visible(sample, 5)["links"] == sample["links"][1:]
    assert visible(sample, 5)["entities"] == sample["entities"][:1]
    assert visible({**mee()}, 3)["events"] == mee()["events"]


def test_prompt_lists_the_objects_of_any_task() -> None:
    sample = {**mner(), "objects": mee()["objects"]}
    assert "objects: O1 <region> O2 <region> text:" in build_prompt(sample, "entity", LABELS["entity"])


def test_prompt_without_text() -> None:
    sample = {**mee(), "text": "", "tokens": []}
    assert "text:" not in build_prompt(sample, "trigger", LABELS["trigger"])


@pytest.mark.integration
@given(asked_samples)
def test_prompt_is_independent_of_the_gold_answer(asked: tuple[str, dict[str, Any]]) -> None:
    subtask, sample = asked
    asked_only: dict[str, Any] = {key: sample[key] for key in ("text", "objects")}
    if subtask == "relation":
        asked_only["relation"] = {end: {"text": sample["relation"][end]["text"]} for end in ("head", "tail")}
    assert build_prompt(sample, subtask, LABELS[subtask]) == build_prompt(asked_only, subtask, LABELS[subtask])


@given(asked_samples)
def test_text_creates_no_markers(asked: tuple[str, dict[str, Any]]) -> None:
    subtask, sample = asked
    prompt = build_prompt(sample, subtask, LABELS[subtask])
    assert prompt.count(REGION) == len(sample["objects"])
    assert SPOT not in prompt
    assert EVENT not in prompt
    assert "\n" not in prompt


@pytest.mark.parametrize("relation", [None, {"head": {"text": "Ryan"}}, {"head": None, "tail": {"text": "Blake"}}])
def test_relation_without_two_names_raises(relation: Any) -> None:
    with pytest.raises(UserError, match="head"):
        build_prompt({**mre(), "relation": relation}, "relation", LABELS["relation"])


def test_unknown_subtask_and_malformed_labels_raise() -> None:
    with pytest.raises(UserError, match="relation"):
        build_prompt(mre(), "relations", LABELS["relation"])
    with pytest.raises(UserError, match="roles"):
        build_prompt(mee(), "argument", LABELS["trigger"])


@pytest.mark.parametrize("sample", ["Mara sings", None, ["Mara"]])
def test_a_sample_of_another_type_is_an_error(sample: Any) -> None:
    with pytest.raises(TypeError, match=r"^sample .*text"):
        build_prompt(sample, "entity", LABELS["entity"])


def test_boxes_may_be_written_in_place_of_region_tokens() -> None:
    sample = {**mner(), "objects": [{"id": "O1", "box": [0.4, 12.6, 40, 30], "label": ""}]}
    prompt = build_prompt(sample, "entity", LABELS["entity"], region_tokens=False)
    assert "objects: O1 [0, 13, 40, 30] text:" in prompt
    assert REGION not in prompt


def test_a_sample_without_text_is_an_error() -> None:
    for sample in ({"tex": "a"}, {"text": 5}):
        with pytest.raises(UserError, match='"text"'):
            build_prompt(sample, "entity", ["person"])
