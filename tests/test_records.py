"""Requests from a file: each line read, or named with what is wrong in it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lvlm_clorae.errors import UserError
from lvlm_clorae.records import Request, check_boxes, read_requests


def test_a_line_is_a_request_and_keeps_what_else_it_has(tmp_path: Path) -> None:
    (tmp_path / "p.png").touch()
    given = {"id": 3, "text": "a b", "image": "p.png", "objects": [[0, 1, 2, 3.5]]}
    (tmp_path / "in.jsonl").write_text(json.dumps(given) + "\n \n" + '{"text": "é"}')
    (first, request), (second, other) = read_requests(tmp_path / "in.jsonl", "mee")
    assert first == given
    assert request == Request("a b", tmp_path / "p.png", "mee", boxes=[[0.0, 1.0, 2.0, 3.5]])
    assert second == {"text": "é"}
    assert other == Request("é", None, "mee", boxes=[])


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 2: not valid JSON"),
        ("[1]", "line 2: must be an object with any of text, image"),
        ("{}", 'line 2: there is nothing to read, give "text"'),
        ('{"txt": "a"}', 'Did you mean "text"?'),
        ('{"text": 1}', "line 2: text must be a text"),
        ('{"text": "a", "task": ["mner"]}', "line 2: task must be a text"),
        ('{"text": "a", "image": "none.png"}', "line 2: no such picture"),
        ('{"text": "a", "objects": [[1, 2]]}', "line 2: objects: [[1, 2]] is no list of boxes"),
        ('{"text": "a", "objects": {"a": 1}}', "is no list of boxes"),
    ],
)
def test_mistakes_name_the_line(line: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_text('{"text": "fine"}\n' + line)
    with pytest.raises(UserError) as caught:
        list(read_requests(tmp_path / "in.jsonl", "mner"))
    assert message in str(caught.value)
    assert "in.jsonl" in str(caught.value)


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"cannot be read \(No such file"):
        list(read_requests(tmp_path / "none", "mner"))
    (tmp_path / "latin").write_bytes(b"\xff\xfe{")
    with pytest.raises(UserError, match="cannot be read"):
        list(read_requests(tmp_path / "latin", "mner"))


@pytest.mark.parametrize(
    "boxes", [7, "[[0, 0, 1, 1]]", [[0, 0, 1]], [[2, 0, 1, 1]], [[-1, 0, 1, 1]], [[0, 0, 1, float("inf")]]]
)
def test_boxes_that_are_none(boxes: object) -> None:
    with pytest.raises(UserError, match=r"^here: .*no list of boxes"):
        check_boxes(boxes, "here")
