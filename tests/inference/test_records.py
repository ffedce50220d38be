"""read_requests and check_boxes: valid lines, and errors that name the line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lvlm_clorae.errors import UserError
from lvlm_clorae.inference.records import Request, check_boxes, read_requests

SCHEMA = {
    "tasks": ["mner", "mre", "mee"],
    "dataset_tasks": {
        f"a/{subtask}": {"task": task, "subtask": subtask}
        for task, subtask in (("mner", "entity"), ("mre", "relation"), ("mee", "trigger"), ("mee", "argument"))
    },
}


def test_lines_are_requests_and_keep_other_keys(tmp_path: Path) -> None:
    (tmp_path / "p.png").touch()
    layout = [{"span": [0, 2], "box": [0, 0, 9, 9]}]
    given = {"id": 3, "text": "a b", "image": "p.png", "boxes": [[0, 1, 2, 3.5]], "layout": layout}
    (tmp_path / "in.jsonl").write_text(json.dumps(given) + "\n \n" + '{"text": "é"}')
    (first, request), (second, other) = read_requests(tmp_path / "in.jsonl", "mee", SCHEMA)
    assert first == given
    assert request == Request("a b", tmp_path / "p.png", "mee", boxes=[[0.0, 1.0, 2.0, 3.5]], layout=layout)
    assert second == {"text": "é"}
    assert other == Request("é", None, "mee", boxes=[])


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 2: "),
        ("[1]", "text, image"),
        ("{}", "line 2: has no text"),
        ('{"txt": "a"}', '"text"?'),
        ('{"text": 1}', "line 2: text"),
        ('{"text": "a", "task": ["mner"]}', "line 2: task"),
        ('{"text": "a", "image": "none.png"}', "none.png"),
        ('{"text": "a", "boxes": [[1, 2]]}', "line 2: boxes: "),
        ('{"text": "a", "boxes": {"a": 1}}', "line 2: boxes"),
        ('{"text": "a", "boxes": [[1, 2, 3, 4]]}', "image"),
        ('{"text": "a", "objects": [[1, 2, 3, 4]]}', "called boxes"),
        ('{"text": "a", "task": "mnre"}', "line 2: "),
        ('{"text": "a", "task": "mre", "head": "a"}', "--tail"),
        ('{"text": "\\ud800"}', "UTF-8"),
        ('{"text": "a b", "layout": [{"span": [0, 3], "box": [0, 0, 9, 9]}]}', "line 2: layout[0].span"),
        ('{"text": "a b", "layout": 3}', "line 2: layout"),
        ('{"text": "a", "image": ""}', "line 2: The name of the image is empty"),
        ('{"text": "a", "imgae": "x.png"}', '"image"?'),
        ('{"text": "a", "tsk": "mre"}', '"task"?'),
        ('{"text": "a b", "head": "a", "tail": "b"}', "no relation"),
        (f'{{"text": "a", "image": "{"A" * 400}.png"}}', "line 2: "),
    ],
)
def test_invalid_line_is_an_error(line: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_text('{"text": "fine"}\n' + line)
    with pytest.raises(UserError) as caught:
        list(read_requests(tmp_path / "in.jsonl", "mner", SCHEMA))
    assert message in str(caught.value)
    assert "in.jsonl" in str(caught.value)


def test_unreadable_file_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="none"):
        list(read_requests(tmp_path / "none", "mner", SCHEMA))
    (tmp_path / "latin").write_bytes(b"\xff\xfe{")
    with pytest.raises(UserError, match="latin"):
        list(read_requests(tmp_path / "latin", "mner", SCHEMA))


@pytest.mark.parametrize(
    "boxes", [7, "[[0, 0, 1, 1]]", [[0, 0, 1]], [[2, 0, 1, 1]], [[-9, 0, 1, 1]], [[0, 0, 1, float("inf")]]]
)
def test_invalid_boxes_are_an_error(boxes: object) -> None:
    with pytest.raises(UserError, match=r"^here: "):
        check_boxes(boxes, "here")
