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
    check_subtask,
    in_task_order,
    is_label,
    is_task_name,
    label_sets,
    missing_annotations,
    plain,
    subtasks_of,
)

from .samples import LABELS, SAMPLES, asked_samples, mee, mner, mre

_json = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.just(10**400),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
    max_leaves=8,
)


def test_tasks_and_subtasks() -> None:
    assert {name: task.subtasks for name, task in TASKS.items()} == {
        "mner": ("entity",),
        "mre": ("relation",),
        "mee": ("trigger", "argument"),
    }
    assert SUBTASKS == ("entity", "relation", "trigger", "argument")
    assert (SPOT, EVENT, REGION) == ("<spot>", "<event>", "<region>")


def test_the_package_imports_no_heavy_module() -> None:
    code = "import sys, lvlm_clorae.tasks; print([m for m in ('torch', 'transformers', 'numpy') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_an_unknown_subtask_names_the_nearest() -> None:
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
def test_labels_of_another_form_are_the_users_error(subtask: str, labels: Any) -> None:
    with pytest.raises(UserError, match=subtask):
        label_sets(subtask, labels)


def test_plain_breaks_markers_and_is_idempotent() -> None:
    assert plain(" a  <spot>\n<<event>region> \u3000") == "a < spot > << event >region>"


@given(st.text() | st.lists(st.sampled_from(["<", ">", "<spot>", "spot", "event", "region", " "])).map("".join))
def test_plain_leaves_no_marker(text: str) -> None:
    once = plain(text)
    assert not any(marker in once for marker in (SPOT, EVENT, REGION))
    assert plain(once) == once
    assert once == once.strip()


@pytest.mark.parametrize("subtask", SUBTASKS)
def test_a_sound_sample_has_no_faults(subtask: str) -> None:
    assert check_sample(SAMPLES[subtask]()) == []
    assert check_sample(json.loads(json.dumps(SAMPLES[subtask]()))) == []


@given(asked_samples)
def test_drawn_samples_are_sound(asked: tuple[str, dict[str, Any]]) -> None:
    assert check_sample(asked[1]) == []


def test_only_the_tasks_own_annotation_and_the_text_are_required() -> None:
    sample = {"dataset": "a", "task": "mner", "text": "", "tokens": [], "entities": []}
    assert check_sample(sample) == []
    assert check_sample({**sample, "events": 3}) == []


_FAULTS: list[tuple[Any, str, Any, str]] = [
    (mner, "dataset", " ", "dataset"),
    (mner, "task", "n e r", "task: must be mner, mre, mee or a plain name, not 'n e r'"),
    (mner, "task", "", "task"),
    (mner, "task", "a/b", "task"),
    (mner, "task", [], "task"),
    (mner, "task", 10**5000, "task"),
    (mner, "text", "Kyrie leaves Dallas.", "text: must be the tokens joined"),
    (mner, "tokens", "Kyrie", "tokens"),
    (mner, "tokens", ["Kyrie", 3], "tokens"),
    (mner, "image", 3, "image"),
    (mner, "image", "", "image"),
    (mner, "source", [], "source"),
    (mner, "objects", None, "objects: must be a list"),
    (mner, "entities", None, "entities: must be a list"),
    (mner, "entities.0", "Kyrie", "entities[0]: must be an object"),
    (mner, "entities.1.type", "a, b", "entities[1].type"),
    (mner, "entities.1.type", "", "entities[1].type"),
    (mner, "entities.1.type", "a<spot>", "entities[1].type"),
    (mner, "entities.1.type", "a ", "entities[1].type"),
    (mner, "entities.1.type", "None", "kept for the empty answer"),
    (mner, "entities.0.text", "kyrie", "entities[0]: the text is not that"),
    (mner, "entities.0.text", " ", "entities[0].text"),
    (mner, "entities.0.span", [0], "entities[0].span"),
    (mner, "entities.0.span", [False, True], "entities[0].span"),
    (mner, "entities.0.span", [0, 5], "outside the 4 tokens"),
    (mner, "entities.0.span", [-4, -3], "outside"),
    (mner, "entities.0.span", [1, 1], "empty"),
    (mre, "relation", [], "relation: must be an object"),
    (mre, "relation.head", None, "relation.head"),
    (mre, "relation.tail.span", [0, 2], "relation.tail"),
    (mre, "relation.label", None, "relation.label"),
    (mee, "objects.0.id", "O0", "objects[0].id"),
    (mee, "objects.0.id", "1", "objects[0].id"),
    (mee, "objects.0.id", "O2", "O2 is there twice"),
    (mee, "objects.0.label", None, "objects[0].label"),
    (mee, "objects.0.box", [0, 0, 5], "four finite numbers"),
    (mee, "objects.0.box", [0, 0, 5, math.nan], "four finite numbers"),
    (mee, "objects.0.box", [0, 0, 5, math.inf], "four finite numbers"),
    (mee, "objects.0.box", [0, 0, 5, 10**400], "four finite numbers"),
    (mee, "objects.0.box", [0, 0, 5, 10**5000], "four finite numbers"),  # too long for repr()
    (mee, "objects.0.box", [0, 0, 5, True], "four finite numbers"),
    (mee, "objects.0.box", [5, 0, 5, 5], "x1 < x2"),
    (mee, "objects.0.box", [0, 9, 5, 5], "x1 < x2"),
    (mee, "events.0.trigger", 3, "events[0].trigger"),
    (mee, "events.0.trigger.text", "strike", "events[0].trigger"),
    (mee, "events.1.arguments", None, "events[1].arguments"),
    (mee, "events.0.arguments.0.role", 1, "events[0].arguments[0].role"),
    (mee, "events.0.arguments.0.span", [1, 2], "events[0].arguments[0]"),
    (mee, "events.0.arguments.1.object", "O3", "must be an object of the sample, not 'O3'"),
    (mee, "events.0.arguments.1.object", ["O1"], "must be an object of the sample"),
    (mee, "events.0.arguments.1.text", "a", "both an object and a text"),
]


@pytest.mark.parametrize(
    ("make", "path", "value", "reason"), _FAULTS, ids=[f"{f[1]}-{i}" for i, f in enumerate(_FAULTS)]
)
def test_each_fault_is_named(make: Any, path: str, value: Any, reason: str) -> None:
    found = check_sample(_with(make(), path, value))
    assert any(reason in fault for fault in found), found


def test_a_missing_trigger_is_not_a_null_one() -> None:
    sample = mee()
    del sample["events"][0]["trigger"]
    assert any("events[0].trigger: is missing" in fault for fault in check_sample(sample))


def test_a_task_of_ones_own_is_checked_for_all_the_annotations_it_has() -> None:
    own = {**mner(), "task": "my-aspects"}
    assert check_sample(own) == []
    assert check_sample({**own, "relation": None}) == ["relation: must be an object, not nothing"]
    assert check_sample({**own, "events": [{"type": "a"}]}) != []
    assert check_sample({**mee(), "task": "my-aspects"}) == []
    assert check_sample({**mre(), "task": "my-aspects"}) == []
    assert check_sample({**own, "entities": [{}]}) != []
    del own["entities"]
    assert check_sample(own) == ["a sample of task my-aspects has at least one of entities, relation, events"]


def test_names_and_order_of_tasks() -> None:
    assert all(map(is_task_name, ["mner", "aspects", "a", "0", "my_task-2", "x" * 40]))
    assert not any(map(is_task_name, ["", "-a", "a b", "a.b", "é", "x" * 41, None, 3, ["a"]]))
    assert in_task_order(["zebra", "mee", "ape", "mner", "mee"]) == ["mner", "mee", "ape", "zebra"]
    assert (subtasks_of("mre"), subtasks_of("aspects")) == (("relation",), SUBTASKS)
    assert [name for name in ("a", "a: b", "", "a,b", "<spot>", " a", 3) if is_label(name)] == ["a", "a: b"]


def test_annotations_that_subtasks_ask_for() -> None:
    assert missing_annotations(mner(), SUBTASKS) == ["events", "relation"]
    assert missing_annotations(mee(), ["trigger", "argument", "unheard-of"]) == []


def test_a_none_relation_is_sound() -> None:
    assert check_sample(mre("none")) == check_sample(mre("None")) == []


@given(_json)
def test_check_sample_never_raises(value: Any) -> None:
    found = check_sample(value)
    assert found
    assert all(isinstance(fault, str) for fault in found)


@given(asked_samples, st.data())
def test_check_sample_never_raises_on_a_broken_sample(asked: tuple[str, dict[str, Any]], data: st.DataObject) -> None:
    path = data.draw(st.sampled_from(_paths(asked[1])))
    assert isinstance(check_sample(_with(asked[1], path, data.draw(_json))), list)


def test_the_label_sets_of_these_tests_are_of_the_right_form() -> None:
    assert {subtask: list(label_sets(subtask, LABELS[subtask])) for subtask in SUBTASKS} == {
        "entity": ["types"],
        "relation": ["relations"],
        "trigger": ["types"],
        "argument": ["types", "roles"],
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
