from __future__ import annotations

import copy
import json
import math
import subprocess
import sys
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lvlm_clorae.errors import UserError
from lvlm_clorae.tasks import EVENT, REGION, SPOT, SUBTASKS, TASKS, check_sample
from lvlm_clorae.tasks.schema import (
    box_problem,
    check_subtask,
    in_task_order,
    is_label,
    is_task_name,
    label_sets,
    missing_annotations,
    plain,
    subtasks_of,
)
from tests.helpers.task_samples import LABELS, SAMPLES, asked_samples, form, mee, mner, mre

_json = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.just(10**400),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
    max_leaves=8,
)


def test_tasks_and_subtasks() -> None:
    assert TASKS == {
        "mner": ("entity",),
        "mre": ("relation",),
        "mee": ("trigger", "argument"),
    }
    assert SUBTASKS == ("entity", "relation", "trigger", "argument", "link")
    assert (SPOT, EVENT, REGION) == ("<spot>", "<event>", "<region>")


@pytest.mark.integration
def test_tasks_import_no_torch() -> None:
    code = "import sys, lvlm_clorae.tasks; print([m for m in ('torch', 'transformers', 'numpy') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_unknown_subtask_suggests_the_nearest() -> None:
    with pytest.raises(UserError, match='Did you mean "entity"'):
        check_subtask("entities")


@pytest.mark.parametrize(
    ("subtask", "labels"),
    [
        ("entity", "person"),
        ("entity", {"types": ["person"], "roles": []}),
        ("relation", [1]),
        ("argument", ["attack"]),
        ("argument", {"types": ["attack"]}),
        ("argument", {"types": "attack", "roles": []}),
    ],
)
def test_malformed_labels_raise(subtask: str, labels: Any) -> None:
    with pytest.raises(UserError, match=subtask):
        label_sets(subtask, labels)


def test_plain_splits_markers() -> None:
    assert plain(" a  <spot>\n<<event>region> \u3000") == "a < spot > << event >region>"


@given(st.text() | st.lists(st.sampled_from(["<", ">", "<spot>", "spot", "event", "region", " "])).map("".join))
def test_plain_is_idempotent_and_leaves_no_marker(text: str) -> None:
    once = plain(text)
    assert not any(marker in once for marker in (SPOT, EVENT, REGION))
    assert plain(once) == once
    assert once == once.strip()


@pytest.mark.parametrize("subtask", SUBTASKS)
def test_valid_sample_has_no_problems(subtask: str) -> None:
    assert check_sample(SAMPLES[subtask]()) == []
    assert check_sample(json.loads(json.dumps(SAMPLES[subtask]()))) == []


@given(asked_samples)
def test_generated_samples_are_valid(asked: tuple[str, dict[str, Any]]) -> None:
    assert check_sample(asked[1]) == []


def test_other_annotations_are_not_checked() -> None:
    sample = {"dataset": "a", "task": "mner", "text": "", "tokens": [], "entities": []}
    assert check_sample(sample) == []
    assert check_sample({**sample, "events": 3}) == []


_PROBLEMS: list[tuple[Any, str, Any, str]] = [
    (mner, "dataset", " ", "dataset"),
    (mner, "task", "n e r", "task: must be mner, mre, mee"),
    (mner, "task", "", "task"),
    (mner, "task", "a/b", "task"),
    (mner, "task", [], "task"),
    (mner, "task", 10**5000, "task"),
    (mner, "text", "Kyrie leaves Dallas.", "text"),
    (mner, "tokens", "Kyrie", "tokens"),
    (mner, "tokens", ["Kyrie", 3], "tokens"),
    (mner, "image", 3, "image"),
    (mner, "image", "", "image"),
    (mner, "source", [], "source"),
    (mner, "objects", None, "objects"),
    (mner, "entities", None, "entities"),
    (mner, "entities.0", "Kyrie", "entities[0]"),
    (mner, "entities.1.type", "a, b", "entities[1].type"),
    (mner, "entities.1.type", "", "entities[1].type"),
    (mner, "entities.1.type", "a<spot>", "entities[1].type"),
    (mner, "entities.1.type", "a ", "entities[1].type"),
    (mner, "entities.1.type", "None", "entities[1].type"),
    (mner, "entities.0.text", "kyrie", "entities[0].text"),
    (mner, "entities.0.text", " ", "entities[0].text"),
    (mner, "entities.0.span", [0], "entities[0].span"),
    (mner, "entities.0.span", [False, True], "entities[0].span"),
    (mner, "entities.0.span", [0, 5], "entities[0].span"),
    (mner, "entities.0.span", [-4, -3], "entities[0].span"),
    (mner, "entities.0.span", [1, 1], "entities[0].span"),
    (mre, "relation", [], "relation"),
    (mre, "relation.head", None, "relation.head"),
    (mre, "relation.tail.span", [0, 2], "relation.tail"),
    (mre, "relation.label", None, "relation.label"),
    (mee, "objects.0.id", "O0", "objects[0].id"),
    (mee, "objects.0.id", "1", "objects[0].id"),
    (mee, "objects.0.id", "O2", "objects[1].id"),
    (mee, "objects.0.label", None, "objects[0].label"),
    (mee, "objects.0.box", [0, 0, 5], "objects[0].box"),
    (mee, "objects.0.box", [0, 0, 5, math.nan], "objects[0].box"),
    (mee, "objects.0.box", [0, 0, 5, math.inf], "objects[0].box"),
    (mee, "objects.0.box", [0, 0, 5, 10**400], "objects[0].box"),
    (mee, "objects.0.box", [0, 0, 5, 10**5000], "objects[0].box"),  # too long for repr()
    (mee, "objects.0.box", [0, 0, 5, True], "objects[0].box"),
    (mee, "objects.0.box", [5, 0, 5, 5], "objects[0].box"),
    (mee, "objects.0.box", [0, 9, 5, 5], "objects[0].box"),
    (mee, "events.0.trigger", 3, "events[0].trigger"),
    (mee, "events.0.trigger.text", "strike", "events[0].trigger"),
    (mee, "events.1.arguments", None, "events[1].arguments"),
    (mee, "events.0.arguments.0.role", 1, "events[0].arguments[0].role"),
    (mee, "events.0.arguments.0.span", [1, 2], "events[0].arguments[0]"),
    (mee, "events.0.arguments.1.object", "O3", "events[0].arguments[1].object"),
    (mee, "events.0.arguments.1.object", ["O1"], "events[0].arguments[1].object"),
    (mee, "events.0.arguments.1.text", "a", "events[0].arguments[1]"),
]


@pytest.mark.parametrize(
    ("make", "path", "value", "reason"), _PROBLEMS, ids=[f"{f[1]}-{i}" for i, f in enumerate(_PROBLEMS)]
)
def test_problem_names_its_location(make: Any, path: str, value: Any, reason: str) -> None:
    found = check_sample(_with(make(), path, value))
    assert any(problem.startswith(reason) for problem in found), found


def test_text_that_is_not_unicode_is_a_problem() -> None:
    sample = {"dataset": "a", "task": "mner", "text": "b \ud83d", "tokens": ["b", "\ud83d"], "entities": []}
    assert [problem.partition(":")[0] for problem in check_sample(sample)] == ["text", "tokens"]
    assert check_sample({**sample, "text": "b \U0001f600", "tokens": ["b", "\U0001f600"]}) == []


@pytest.mark.parametrize("value", ["\ud83d", {"\ud83d": 1}, [[math.nan]], [10**400], [b"x"]])
def test_a_source_that_cannot_be_stored_is_a_problem(value: Any) -> None:
    (problem,) = check_sample({**mner(), "source": {"note": value}})
    assert problem.startswith("source: ")


def test_nesting_is_bounded_without_recursion() -> None:
    deep: Any = 0
    for depth in range(1, 2000):
        deep = [deep]
        problems = check_sample({**mner(), "source": {"note": deep}})
        assert bool(problems) == (depth > 29), depth  # in the sample, the source, the note


@pytest.mark.parametrize(
    ("make", "path"),
    [
        (mner, "entitys"),
        (mner, "entities.0.object"),
        (mner, "entities.0.box"),
        (mre, "relation.type"),
        (mre, "relation.head.label"),
        (mee, "objects.0.name"),
        (mee, "events.0.role"),
        (mee, "events.0.trigger.type"),
        (mee, "events.0.arguments.0.box"),
        (mee, "events.0.arguments.1.type"),
    ],
)
def test_a_key_without_meaning_is_a_problem(make: Any, path: str) -> None:
    (problem,) = check_sample(_with(make(), path, "x"))
    assert path.rpartition(".")[2] in problem


@pytest.mark.parametrize("label", ["a\x00b", "a\u200bb", "a\x1b[31m", "a,b", "<region>", "<spot>", "a\nb"])
def test_labels_are_printable_and_plain(label: str) -> None:
    assert not is_label(label)
    assert check_sample(_with(mner(), "entities.0.type", label))


@pytest.mark.parametrize(
    ("box", "valid"),
    [
        ([0, 0, 10, 5], True),
        ([-2, 0, 12, 7], True),  # pixels counted from 1, rounding
        ([-3, 0, 10, 5], False),
        ([0, 0, 10, 7.5], False),
        ([0, 0, math.nan, 5], False),
        ([0, 0, True, 5], False),
        ([5, 0, 5, 5], False),
        ("0,0,5,5", False),
    ],
)
def test_boxes_lie_inside_their_image(box: Any, valid: bool) -> None:
    assert (box_problem(box, (10, 5)) is None) == valid


def test_missing_trigger_is_a_problem() -> None:
    sample = mee()
    del sample["events"][0]["trigger"]
    assert any(problem.startswith("events[0].trigger") for problem in check_sample(sample))


def test_user_defined_task_checks_all_annotations() -> None:
    own = {**mner(), "task": "my-aspects"}
    assert check_sample(own) == []
    assert [problem.partition(":")[0] for problem in check_sample({**own, "relation": None})] == ["relation"]
    assert check_sample({**own, "events": [{"type": "a"}]}) != []
    assert check_sample({**mee(), "task": "my-aspects"}) == []
    assert check_sample({**mre(), "task": "my-aspects"}) == []
    assert check_sample({**own, "entities": [{}]}) != []
    del own["entities"]
    assert len(check_sample(own)) == 1


def test_names_and_order_of_tasks() -> None:
    assert all(map(is_task_name, ["mner", "aspects", "a", "0", "my_task-2", "x" * 40]))
    assert not any(map(is_task_name, ["", "-a", "a b", "a.b", "é", "x" * 41, None, 3, ["a"]]))
    assert in_task_order(["zebra", "mee", "ape", "mner", "mee"]) == ["mner", "mee", "ape", "zebra"]
    assert (subtasks_of("mre"), subtasks_of("aspects")) == (("relation",), SUBTASKS)
    assert [name for name in ("a", "a: b", "", "a,b", "<spot>", " a", 3) if is_label(name)] == ["a", "a: b"]


def test_missing_annotations() -> None:
    assert missing_annotations(mner(), SUBTASKS) == ["events", "links", "relation"]
    assert missing_annotations(mee(), ["trigger", "argument", "unheard-of"]) == []


def test_mention_that_is_not_verbatim() -> None:
    def problems(mention: dict[str, Any]) -> list[str]:
        entity = {"type": "date", **mention}
        tail = check_sample({**form(), "links": [{"head": mention, "label": "answer", "tail": mention}]})
        return check_sample({**form(), "entities": [entity]}) + tail

    assert problems({"text": "5 MAY", "span": [1, 3], "verbatim": False}) == []
    assert problems({"text": "6 June", "verbatim": False}) == []
    assert len(problems({"text": "5 MAY", "span": [1, 3], "verbatim": True})) == 3
    assert len(problems({"text": "5 MAY", "span": [1, 9], "verbatim": False})) == 3
    assert len(problems({"text": "5 MAY", "verbatim": "no"})) == 6
    assert len(problems({"text": "5 May"})) == 3
    trigger = {"text": "coalition", "span": [0, 1], "verbatim": False}
    assert check_sample({**mee(), "events": [{"type": "meet", "trigger": trigger, "arguments": []}]})


@pytest.mark.parametrize(
    ("layout", "valid"),
    [
        ([], True),
        ([{"span": [0, 2], "box": [0, 0, 99, 0]}, {"span": [2, 3], "box": [5, 5, 5, 5]}], True),
        ([{"span": [0, 2], "box": [0, 0, 99, 9]}, {"span": [1, 3], "box": [0, 0, 1, 1]}], False),
        ([{"span": [0, 9], "box": [0, 0, 99, 9]}], False),
        ([{"span": [0, 2], "box": [0, 0, 100, 9]}], False),
        ([{"span": [0, 2], "box": [9, 0, 5, 9]}], False),
        ([{"span": [0, 2], "box": [0.5, 0, 5, 9]}], False),
        ([{"span": [0, 2], "box": [0, 0, 5, 9], "text": "Date:"}], False),
        ([3], False),
        (3, False),
    ],
)
def test_layout(layout: Any, valid: bool) -> None:
    assert (check_sample({**form(), "layout": layout}) == []) is valid


def test_relation_none_is_valid() -> None:
    assert check_sample(mre("none")) == check_sample(mre("None")) == []


@given(_json)
def test_check_sample_never_raises(value: Any) -> None:
    found = check_sample(value)
    assert found
    assert all(isinstance(problem, str) for problem in found)


@given(asked_samples, st.data())
def test_check_sample_never_raises_on_a_modified_sample(asked: tuple[str, dict[str, Any]], data: st.DataObject) -> None:
    path = data.draw(st.sampled_from(_paths(asked[1])))
    assert isinstance(check_sample(_with(asked[1], path, data.draw(_json))), list)


def test_label_sets_of_each_subtask() -> None:
    assert {subtask: list(label_sets(subtask, LABELS[subtask])) for subtask in SUBTASKS} == {
        "entity": ["types"],
        "relation": ["relations"],
        "trigger": ["types"],
        "argument": ["types", "roles"],
        "link": ["relations"],
    }


def _paths(value: Any, prefix: str = "") -> list[str]:
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path for key, inner in items for path in (f"{prefix}{key}", *_paths(inner, f"{prefix}{key}."))]


def _with(sample: dict[str, Any], path: str, value: Any) -> dict[str, Any]:
    """A copy of `sample` with `value` at the dotted `path`."""
    result = copy.deepcopy(sample)
    *way, last = [int(key) if key.isdigit() else key for key in path.split(".")]
    place: Any = result
    for key in way:
        place = place[key]
    place[last] = value
    return result
