"""What build and verify accept never fails later: random records, images and index files, to batches and requests."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from lvlm_clorae.data.collate import Collator
from lvlm_clorae.data.convert import build
from lvlm_clorae.data.dataset import ShardDataset
from lvlm_clorae.data.index import SPLITS, load_index
from lvlm_clorae.data.loader import ShardDataLoader
from lvlm_clorae.data.validation import verify
from lvlm_clorae.errors import UserError
from lvlm_clorae.inference.records import Request, check_boxes
from lvlm_clorae.models import Processor
from lvlm_clorae.tasks import build_prompt, format_answer, parse_answer, score_sample
from tests.data.test_images import encoded, oriented
from tests.helpers.shards import pil_image, write_toy

pytestmark = pytest.mark.slow
CASES = settings(max_examples=2000, deadline=None, suppress_health_check=list(HealthCheck))

_ENTITY = {"type": "person", "text": "Ann"}
_ARGUMENTS = [{"role": "who", "text": "Ann"}, {"role": "where", "object": "O1"}]
_RECORDS: list[dict[str, Any]] = [
    {"text": "Ann sings in Oslo", "image": "a.jpg", "entities": [_ENTITY, {"type": "place", "span": [3, 4]}]},
    {
        "text": "Ann with Bo",
        "image": "turned.jpg",
        "relation": {"head": {"text": "Ann"}, "tail": {"text": "Bo"}, "label": "peer"},
    },
    {
        "tokens": ["Ann", "sings"],
        "image": "turned.jpg",
        "objects": [{"box": [0, 60, 50, 100]}],
        "events": [{"type": "sing", "trigger": {"text": "sings"}, "arguments": _ARGUMENTS}],
    },
]
_WORDS = [
    "",
    " ",
    "none",
    "None",
    "a, b",
    "<spot>",
    "<region>",
    "x\x00y",
    "\ud83d",
    "\u202e",
    "O1",
    "café",
    "cafe\u0301",
]
_JUNK = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.sampled_from([*_WORDS, 10**400]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=5,
)
_DEEP = st.sampled_from([20, 33, 900]).map(lambda depth: "[" * depth + "]" * depth)
_IMAGES = st.sampled_from(["a.jpg", "turned.jpg", "alpha.png", "deep.png", "broken.jpg", "page.html", "missing.jpg"])


@st.composite
def mutated(draw: st.DrawFn, start: Any) -> Any:
    """A copy of a JSON value with a few values replaced, keys removed or keys added."""
    value = copy.deepcopy(start)
    for _ in range(draw(st.integers(0, 2))):
        place = value
        while True:
            keys = list(place) if isinstance(place, dict) else list(range(len(place)))
            key = draw(st.sampled_from([*keys, "new"] if isinstance(place, dict) else keys or [None]))
            if key is None:
                break
            inner = place.get(key) if isinstance(place, dict) else place[key]
            if isinstance(inner, dict | list) and inner and draw(st.booleans()):
                place = inner
                continue
            if draw(st.booleans()) or key == "new" or isinstance(place, list):
                place[key] = draw(_JUNK)
            else:
                place.pop(key)
            break
    return value


@st.composite
def lines(draw: st.DrawFn, kind: int) -> str:
    """A line of train.jsonl, usually nearly valid."""
    record = draw(mutated(_RECORDS[kind]))
    if isinstance(record, dict) and draw(st.booleans()):
        record["image"] = draw(_IMAGES)
    line = json.dumps(record)
    if draw(st.integers(0, 9)) == 0:
        line = line.replace('"Ann"', draw(_DEEP | st.sampled_from(["1e400", "NaN", '"Ann', '"a", "type": "b"'])), 1)
    return line[: draw(st.integers(0, len(line)))] if draw(st.integers(0, 19)) == 0 else line


@st.composite
def files(draw: st.DrawFn) -> str:
    kind = draw(st.integers(0, len(_RECORDS) - 1))
    rest = draw(st.lists(lines(kind), min_size=1, max_size=3))
    return "\n".join([json.dumps(_RECORDS[kind]), *rest])


@pytest.fixture(scope="module")
def processor(processor: Processor) -> Processor:
    return processor


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("images")
    data = {
        "a.jpg": pil_image("JPEG"),
        "turned.jpg": oriented(6),
        "alpha.png": encoded(Image.new("RGBA", (9, 9), (0, 0, 0, 0))),
        "deep.png": encoded(Image.fromarray(np.arange(81, dtype=np.uint16).reshape(9, 9))),
        "broken.jpg": pil_image("JPEG")[:-30],
        "page.html": b"<html>",
    }
    for name, content in data.items():
        (folder / name).write_bytes(content)
    return folder


def use(directory: Path, processor: Processor) -> int:
    """Read all samples as training, evaluation and requests do; return their number."""
    index, count = load_index(directory), 0
    for split in SPLITS:
        dataset = ShardDataset(index, directory, split)
        for name, task in index.dataset_tasks(split).items():
            refs = dataset.refs(name)
            loader = ShardDataLoader(dataset, [[ref] for ref in refs], Collator(processor, {name: task}))
            for batch, ref in zip(loader, refs, strict=True):
                (sample,), count = batch.samples, count + 1
                assert batch.tensors["labels"].numel()
                answer = format_answer(sample, task.subtask)
                parse_answer(answer, task.subtask, task.labels)
                scored, _, malformed = score_sample(sample, answer, task.subtask, task.labels, "exact")
                assert (scored.tp, malformed) == (scored.gold, 0)
                boxes = [item["box"] for item in sample.get("objects", ())]
                request = Request(sample["text"], dataset[ref].image, task.task, boxes=check_boxes(boxes, "boxes"))
                build_prompt({**sample, "text": request.text}, task.subtask, task.labels)
    return count


def test_records_that_build_accepts_are_valid_and_usable(
    images: Path, processor: Processor, tmp_path_factory: pytest.TempPathFactory
) -> None:
    root, used = tmp_path_factory.mktemp("fuzz"), []

    @CASES
    @given(files())
    def check(text: str) -> None:
        shutil.rmtree(root)
        (root / "in").mkdir(parents=True)
        (root / "in" / "train.jsonl").write_text(text, encoding="utf-8", errors="surrogatepass")
        try:
            build("jsonl", root / "in", images, root / "out", max_rejected=1)
        except UserError:
            return
        report = verify(root / "out")
        assert report.ok, report.problems
        used.append(use(root / "out", processor))

    check()
    assert sum(used) > 1000  # the cases are not all rejected


def test_an_index_that_verify_accepts_is_usable(processor: Processor, tmp_path_factory: pytest.TempPathFactory) -> None:
    root, accepted = tmp_path_factory.mktemp("fuzz-index"), []
    write_toy(root)
    content = json.loads((root / "index.json").read_text(encoding="utf-8"))

    @CASES
    @given(mutated(content))
    def check(changed: Any) -> None:
        (root / "index.json").write_text(json.dumps(changed), encoding="utf-8", errors="surrogatepass")
        try:
            report = verify(root)
        except UserError:
            return
        if report.ok:
            accepted.append(use(root, processor))

    check()
    assert len(accepted) > 100
