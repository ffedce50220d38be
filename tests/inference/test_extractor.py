"""Extractor: loading an adapter directory, records of every task, batching, and errors."""

from __future__ import annotations

import copy
import json
import logging
import re
import shutil
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import peft
import pytest
import torch
import transformers
from huggingface_hub.utils import are_progress_bars_disabled as hub_bars_are_disabled
from safetensors.torch import load_file, save_file
from torch import nn

from lvlm_clorae import Extractor
from lvlm_clorae.digests import write_digests
from lvlm_clorae.errors import UserError
from lvlm_clorae.inference.adapter_directory import SCHEMA_VERSION
from lvlm_clorae.inference.records import Argument, Entity, Event, Relation, Request
from lvlm_clorae.models import load_model
from lvlm_clorae.models.fingerprint import base_fingerprint
from lvlm_clorae.tasks import TASKS
from tests.helpers.adapter_directory import write_schema
from tests.helpers.launch import REPOSITORY, environment
from tests.helpers.tiny import PROMPTS, noise_image, save_tiny, tiny_processor
from tools.demo_data.generator import DATASETS

TEXT = "guards struck the harbour on Monday"


@pytest.fixture(scope="module")
def loaded(adapter: Path) -> Extractor:
    return Extractor.from_pretrained(adapter, device="cpu")


class Scripted:
    """Replaces the answers of an extractor's model by given ones, and records its inputs."""

    def __init__(self, extractor: Extractor, patch: pytest.MonkeyPatch) -> None:
        self.answers: list[str] = []
        self.asked: list[dict[str, Any]] = []
        self.tasks: list[str] = []
        patch.setattr(extractor.model, "generate", self._generate)
        patch.setattr(extractor.model, "set_task", self.tasks.append, raising=False)
        patch.setattr(extractor.processor, "decode", lambda tokens: [self.answers.pop(0) for _ in tokens])

    def _generate(self, **inputs: Any) -> torch.Tensor:
        self.asked.append(inputs)
        return torch.zeros(len(inputs["input_ids"]), 1, dtype=torch.long)

    def prompts(self) -> list[str]:
        return [text for inputs in self.asked for text in tiny_processor().decode(inputs["input_ids"])]


@pytest.fixture
def scripted(loaded: Extractor) -> Iterator[tuple[Extractor, Scripted]]:
    with pytest.MonkeyPatch.context() as patch:
        yield loaded, Scripted(loaded, patch)


def test_saved_weights_are_loaded(adapter: Path, loaded: Extractor) -> None:
    stored = load_file(adapter / "adapter_model.safetensors")
    state = peft.get_peft_model_state_dict(loaded.model)
    assert stored.keys() == state.keys()
    assert any("projector" in name for name in stored)
    assert all(torch.equal(tensor, state[name]) for name, tensor in stored.items())
    assert not loaded.model.training
    batch = tiny_processor()(PROMPTS[:1], [noise_image()], [[[0, 0, 9, 9], [3, 3, 20, 20]]])
    tokens = {}
    for task in TASKS:
        loaded.model.set_task(task)
        tokens[task] = loaded.model.generate(**batch, max_new_tokens=8, do_sample=False).tolist()
    assert len({str(row) for row in tokens.values()}) > 1, "each task has its expert"


@pytest.mark.parametrize("task", list(TASKS))
def test_every_task(loaded: Extractor, task: str) -> None:
    names = {"head": "guards", "tail": "harbour"} if task == "mre" else {}
    for image in (None, noise_image()):
        found = loaded.extract(TEXT, image, task, **names)
        assert isinstance(found, list)
        assert found == loaded.extract(TEXT, image, task, **names)


@pytest.mark.parametrize("image", [None, noise_image()], ids=["text", "image"])
def test_constrained_answers_use_words_of_the_text(loaded: Extractor, image: Any) -> None:
    """The weights are random, so unconstrained answers are invalid."""
    schema = {**loaded.schema, "max_target_length": 64}
    extractor = Extractor(loaded.model, loaded.processor, schema, loaded.device)
    (relation,) = extractor.extract(TEXT, image, "mre", head="guards", tail="harbour", constrained=True)
    assert isinstance(relation, Relation)
    assert (relation.head, relation.tail) == ("guards", "harbour")
    assert relation.label in DATASETS["demo_pairs"].labels["relation"]
    boxes = [(0, 0, 20, 15)] if image else []
    for task in ("mner", "mee"):
        found = extractor.extract(TEXT, image, task, boxes=boxes, constrained=True)
        texts = [record.text for record in found if isinstance(record, Entity)]
        for event in (record for record in found if isinstance(record, Event)):
            texts += [event.trigger, *(argument.text for argument in event.arguments)]
        assert all(text in TEXT for text in texts if text)
    assert extractor.extract(" ", task="mner", constrained=True) == []


def test_entities(scripted: tuple[Extractor, Scripted]) -> None:
    extractor, script = scripted
    script.answers = ["person, Mara Novotny <spot> nonsense <spot> LOCATION, Tamsk"]
    found = extractor.extract("Mara Novotny leaves Tamsk")
    assert found == [Entity("person", "Mara Novotny"), Entity("location", "Tamsk")]
    assert found[0].to_dict() == {"record": "entity", "type": "person", "text": "Mara Novotny"}
    assert script.tasks == ["mner"]
    (prompt,) = script.prompts()
    assert prompt.startswith("entities. types: person, location")
    assert prompt.endswith("text: Mara Novotny leaves Tamsk")
    assert script.asked[0]["max_new_tokens"] == 8
    assert "labels" not in script.asked[0]


def test_relation(scripted: tuple[Extractor, Scripted]) -> None:
    extractor, script = scripted
    script.answers = ["Mara <spot> couple <spot> Sven", "none"]
    found = extractor.extract("great evening for Mara and Sven", noise_image(), "mre", head="Mara", tail="Sven")
    assert found == [Relation("Mara", "couple", "Sven")]
    assert found[0].to_dict() == {"record": "relation", "head": "Mara", "label": "couple", "tail": "Sven"}
    assert " between: Mara and Sven text: great evening" in script.prompts()[0]
    assert script.asked[0]["pixel_mask"].tolist() == [1]
    assert extractor.extract("a so b", None, "mre", head="a", tail="b") == []


def test_events_join_answers_by_type_and_objects_have_boxes(scripted: tuple[Extractor, Scripted]) -> None:
    extractor, script = scripted
    script.answers = [
        "attack <spot> agent, guards <spot> instrument, O2 <spot> target, O3 <event> arrest <spot> target, rebels",
        "attack, struck <spot> meet",
    ]
    boxes = [(0, 0, 20, 15), (10, 5, 40, 30)]
    found = extractor.extract(TEXT, noise_image(), "mee", boxes=boxes)
    assert found == [
        Event(
            "attack",
            "struck",
            [
                Argument("agent", text="guards"),
                Argument("instrument", object="O2", box=(10, 5, 40, 30)),
                Argument("target", text="O3"),  # there is no third object, so it is text
            ],
        ),
        Event("meet", None, []),
        Event("arrest", None, [Argument("target", text="rebels")]),
    ]
    assert found[0].to_dict()["arguments"][1] == {
        "role": "instrument",
        "text": None,
        "object": "O2",
        "box": (10, 5, 40, 30),
    }
    arguments, triggers = script.prompts()  # the longer one first
    assert triggers.startswith("event triggers. types: ")
    assert arguments.startswith("event arguments. types: ")
    assert all(" objects: O1 <region> O2 <region> text: guards" in prompt for prompt in (triggers, arguments))
    torch.testing.assert_close(
        script.asked[0]["regions"], torch.tensor([[[0, 0, 0.5, 0.5], [0.25, 1 / 6, 1, 1]]] * 2, dtype=torch.float32)
    )


def test_empty_answer_gives_no_records(scripted: tuple[Extractor, Scripted]) -> None:
    extractor, script = scripted
    script.answers = ["none", "none", "none"]
    assert extractor.extract(TEXT) == []
    assert extractor.extract(TEXT, task="mee") == []


def test_image_may_be_a_file(scripted: tuple[Extractor, Scripted], tmp_path: Path) -> None:
    extractor, script = scripted
    noise_image().save(tmp_path / "image.png")
    script.answers = ["none"] * 3
    for image in (noise_image(), tmp_path / "image.png", str(tmp_path / "image.png")):
        extractor.extract(TEXT, image)
    first, *others = (inputs["pixel_values"] for inputs in script.asked)
    assert all(torch.equal(first, other) for other in others)


def test_batched_requests_give_the_records_of_single_ones(loaded: Extractor) -> None:
    """Decoding is constrained to get records from random weights, and in float64, where padding has no effect."""
    schema = {**loaded.schema, "max_target_length": 24}
    model = copy.deepcopy(loaded.model).double()
    extractor = Extractor(model, loaded.processor, schema, loaded.device)
    requests = [
        Request(TEXT, noise_image(), "mee", boxes=[(0, 0, 20, 15)]),
        Request("Mara Novotny sings in Tamsk", None, "mner"),
        Request("great evening for Mara and Sven", noise_image(), "mre", head="Mara", tail="Sven"),
        Request(TEXT, None, "mee"),
        Request("Tamsk", noise_image(), "mner"),
    ]
    with patch.object(extractor, "_answers", wraps=extractor._answers) as answers:
        together = extractor.extract_all(requests, batch_size=4, constrained=True)
    assert [len(call.args[0]) for call in answers.call_args_list] == [4, 3], "an event is two questions"
    assert any(together)
    for request, records in zip(requests, together, strict=True):
        assert extractor.extract(**vars(request), constrained=True) == records


def test_invalid_request_is_an_error(loaded: Extractor, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r'"mnre".*"mn?re"'):
        loaded.extract(TEXT, task="mnre")
    for names in ({}, {"head": "guards"}, {"tail": "harbour"}, {"head": "", "tail": "harbour"}):
        with pytest.raises(UserError, match="head and tail"):
            loaded.extract(TEXT, task="mre", **names)
    with pytest.raises(UserError, match="image"):
        loaded.extract(TEXT, task="mee", boxes=[(0, 0, 1, 1)])
    missing = tmp_path / "no-such.png"
    with pytest.raises(UserError, match=re.escape(str(missing))):
        loaded.extract(TEXT, missing)
    missing.write_bytes(b"no image")
    with pytest.raises(UserError, match=re.escape(str(missing))):
        loaded.extract(TEXT, missing)


@pytest.mark.parametrize(
    ("field", "value"),
    [("text", None), ("text", 5), ("task", 1), ("head", 5), ("tail", ["harbour"])],
)
def test_value_of_another_type_is_an_error_that_names_the_argument(loaded: Extractor, field: str, value: Any) -> None:
    with pytest.raises(TypeError, match=rf"^{field} .*str"):
        loaded.extract(**{"text": TEXT, field: value})


def test_names_that_are_not_in_the_text_are_an_error(loaded: Extractor) -> None:
    names = {"head": "guards", "tail": "harbour"}
    for field, name in (("head", "Mara"), ("tail", "harb"), ("tail", "the guards"), ("head", "Guards")):
        with pytest.raises(UserError, match=rf'{field} "{name}"'):
            loaded.extract(TEXT, task="mre", **{**names, field: name})
    loaded.extract(f" {TEXT} ".replace(" ", "  "), task="mre", head="the  harbour", tail="guards ")


@pytest.mark.parametrize("image", [5, b"\x89PNG", {"bytes": None}])
def test_a_value_that_is_no_image_is_an_error(loaded: Extractor, image: Any) -> None:
    with pytest.raises(UserError, match=r"^The image "):
        loaded.extract(TEXT, image)


@pytest.mark.parametrize("requests", [TEXT, [TEXT], Request(TEXT)])
def test_requests_of_another_type_are_an_error(loaded: Extractor, requests: Any) -> None:
    with pytest.raises(TypeError, match=r"^requests.*Request"):
        loaded.extract_all(requests)


@pytest.mark.parametrize("size", [0, -1, None, "4", 2.5])
def test_batch_size_below_one_is_an_error(loaded: Extractor, size: int) -> None:
    with pytest.raises(UserError, match=f"batch_size.*{size}"):
        loaded.extract_all([Request(TEXT)], batch_size=size)


def test_text_that_is_not_unicode_is_an_error(loaded: Extractor) -> None:
    for request in (Request("a \ud83d b"), Request(TEXT, None, "mre", head="\udce9", tail="harbour")):
        with pytest.raises(UserError, match="UTF-8"):
            loaded.extract_all([request])


@pytest.mark.parametrize("boxes", [[(9, 0, 1, 1)], [(0, 0, float("nan"), 1)], [(0, 0, 1)], 7, [7], None])
def test_invalid_boxes_are_an_error(loaded: Extractor, boxes: Any) -> None:
    with pytest.raises(UserError, match="boxes"):
        loaded.extract(TEXT, noise_image(), "mee", boxes=boxes)


def test_untrained_task_is_an_error(loaded: Extractor) -> None:
    extractor = Extractor(nn.Identity(), loaded.processor, {**loaded.schema, "tasks": ["mner"]}, loaded.device)
    with pytest.raises(UserError, match='"mee"'):
        extractor.extract(TEXT, task="mee")


@pytest.mark.slow
@pytest.mark.parametrize("form", ["python", "predict"])
def test_records_alone_are_printed(form: str, adapter: Path) -> None:
    """On standard output, and nothing on standard error but a line if there are none."""
    code = f"from lvlm_clorae import Extractor\nprint(Extractor.from_pretrained({str(adapter)!r}).extract({TEXT!r}))"
    predict = ["-m", "lvlm_clorae", "predict", "--run", str(adapter), "--text", TEXT]
    line = [sys.executable, *(["-c", code] if form == "python" else predict)]
    done = subprocess.run(line, cwd=REPOSITORY, env=environment(), capture_output=True, text=True, check=True)
    records = done.stdout.splitlines()
    assert done.stderr == ("" if records else "no records found\n")
    assert len(records) == 1 if form == "python" else all(json.loads(record) for record in records)


def test_loading_keeps_the_settings_of_warnings_and_logs(adapter: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def settings() -> list[Any]:
        loggers = [logging.getLogger(), logging.getLogger("bitsandbytes.backends.cpu.ops")]
        bars = transformers.utils.logging.is_progress_bar_enabled(), hub_bars_are_disabled()
        return [list(warnings.filters), *((one.level, one.disabled, list(one.handlers)) for one in loggers), bars]

    def load(*given: Any, **more: Any) -> Any:
        inside.append(settings())
        return load_model(*given, **more)

    inside: list[Any] = []
    monkeypatch.setattr("lvlm_clorae.inference.extractor.load_model", load)
    before = settings()
    Extractor.from_pretrained(adapter, device="cpu")
    with pytest.raises(UserError):
        Extractor.from_pretrained(adapter / "none")
    assert settings() == before
    (during,) = inside
    assert during[-1] == (False, before[-1][1]), "no bar for weights, but for downloads"


def test_directory_of_full_fine_tuning(base: Path, tmp_path: Path) -> None:
    model = save_tiny(tmp_path)
    write_schema(tmp_path, "not needed", adapter="full")
    extractor = Extractor.from_pretrained(tmp_path, device="cpu")
    state = extractor.model.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    assert isinstance(extractor.extract(TEXT), list)


def test_given_dtype_replaces_that_of_the_run(adapter: Path, base: Path, tmp_path: Path) -> None:
    directory = Path(shutil.copytree(adapter, tmp_path / "adapter"))
    write_schema(directory, str(base), base_options={"dtype": "bfloat16"})
    for dtype, expected in ((None, torch.bfloat16), (torch.float32, torch.float32)):
        extractor = Extractor.from_pretrained(directory, device="cpu", dtype=dtype)
        assert {weight.dtype for weight in extractor.model.parameters()} == {expected}


@pytest.mark.parametrize("content", [None, "{", "[]", "{}", '{"adapter": "clorae"}'])
def test_invalid_schema_is_an_error(tmp_path: Path, content: str | None) -> None:
    if content is not None:
        (tmp_path / "schema.json").write_text(content, encoding="utf-8")
    with pytest.raises(UserError, match=r"schema\.json"):
        Extractor.from_pretrained(tmp_path)


def test_missing_adapter_file_is_an_error(adapter: Path, tmp_path: Path) -> None:
    for name in ("adapter_config.json", "adapter_model.safetensors", "vision_processor.json"):
        directory = tmp_path / name
        directory.mkdir()
        for path in adapter.iterdir():
            if path.name != name:
                (directory / path.name).write_bytes(path.read_bytes())
        with pytest.raises(UserError, match=re.escape(str(directory))):
            Extractor.from_pretrained(directory, device="cpu")


def test_missing_base_is_an_error(adapter: Path, tmp_path: Path) -> None:
    write_schema(tmp_path, "/no/such/base")
    with pytest.raises(UserError, match="/no/such/base"):
        Extractor.from_pretrained(tmp_path)


def test_method_that_is_not_registered_is_an_error(adapter: Path, base: Path, tmp_path: Path) -> None:
    directory = Path(shutil.copytree(adapter, tmp_path / "adapter"))
    write_schema(directory, str(base), adapter="elsewhere")
    path = directory / "adapter_config.json"
    path.write_text(path.read_text(encoding="utf-8").replace("CLORAE", "ELSEWHERE"), encoding="utf-8")
    write_digests(directory)
    with pytest.raises(UserError, match=r'"elsewhere".*import'):
        Extractor.from_pretrained(directory, device="cpu")


@pytest.mark.parametrize("version", [1, 2, None])
def test_schema_of_another_version_is_an_error(tmp_path: Path, version: int | None) -> None:
    """Version 1 has the old key ``units``."""
    write_schema(tmp_path, "demo", version=version)
    with pytest.raises(UserError, match=rf"version {version}, .*{SCHEMA_VERSION}.*[Ee]xport") as caught:
        Extractor.from_pretrained(tmp_path)
    assert "\n" not in str(caught.value)


def test_custom_task_gives_records_of_its_sub_tasks(loaded: Extractor, monkeypatch: pytest.MonkeyPatch) -> None:
    dataset_tasks = {
        **loaded.schema["dataset_tasks"],
        "reviews/entity": {"dataset": "reviews", "task": "aspects", "subtask": "entity", "labels": ["food"]},
        "reviews/relation": {"dataset": "reviews", "task": "aspects", "subtask": "relation", "labels": ["likes"]},
    }
    schema = {**loaded.schema, "tasks": [*loaded.schema["tasks"], "aspects"], "dataset_tasks": dataset_tasks}
    own = Extractor(loaded.model, loaded.processor, schema, loaded.device)
    asked: list[tuple[str, Any]] = []

    def answers(batch: list[Any], *_: Any) -> list[str]:
        asked.extend((question.subtask, question.labels) for question in batch)
        said = {"entity": "food, soup", "relation": "guests <spot> likes <spot> soup"}
        return [said[question.subtask] for question in batch]

    monkeypatch.setattr(own, "_answers", answers)
    assert own.extract("guests like soup", task="aspects", head="guests", tail="soup") == [
        Entity("food", "soup"),
        Relation("guests", "likes", "soup"),
    ]
    assert sorted(asked) == [("entity", ["food"]), ("relation", ["likes"])], "no other task's labels"
    with pytest.raises(UserError, match="head and tail"):
        own.extract("the soup", task="aspects")
    with pytest.raises(UserError, match=r'"aspect".*"aspects"'):
        own.extract("the soup", task="aspect")


def test_a_text_that_is_too_long_is_read_in_part(loaded: Extractor, caplog: pytest.LogCaptureFixture) -> None:
    words = TEXT.split() * 200
    found = loaded.extract(" ".join(words))
    assert found.text_read
    read = found.text_read.split()
    assert 10 < len(read) < len(words)
    assert read == words[: len(read)]
    assert f"only {len(read)} of {len(words)} words" in caplog.text
    assert loaded.extract(TEXT).text_read is None
    assert found == loaded.extract(found.text_read), "the prompt has the labels and no other words"


# ---- adapter, base and files belong together


@pytest.fixture
def copied(adapter: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(adapter, tmp_path / "copy"))


def test_one_bit_in_any_file_is_noticed(copied: Path) -> None:
    for path in sorted(set(copied.iterdir()) - {copied / "README.md"}):
        whole = path.read_bytes()
        data = bytearray(whole)
        data[len(data) // 2] ^= 1
        path.write_bytes(data)
        with pytest.raises(UserError, match=re.escape(str(copied))):
            Extractor.from_pretrained(copied)
        path.write_bytes(whole)
    Extractor.from_pretrained(copied)


def _rewritten(directory: Path, change: Any) -> Path:
    """Change the weights of an adapter directory as a tool would, with matching digests."""
    path = directory / "adapter_model.safetensors"
    save_file(change(load_file(path)), path)
    write_digests(directory)
    return directory


@pytest.mark.parametrize(
    "change",
    [
        lambda weights: {f"renamed.{name}": value for name, value in weights.items()},
        lambda weights: dict(list(weights.items())[::2]),
        lambda weights: {name: value for name, value in weights.items() if "projector" not in name},
        lambda weights: {**weights, **{n.replace(".0.", ".7."): v.clone() for n, v in weights.items() if ".0." in n}},
        lambda weights: {name: value[..., :-1].contiguous() for name, value in weights.items()},
    ],
    ids=["renamed", "half", "without projector", "another layer", "other shapes"],
)
def test_weights_that_do_not_fit_the_adapter_are_an_error(copied: Path, base: Path, change: Any) -> None:
    _rewritten(copied, change)
    with pytest.raises(UserError, match=re.escape(str(copied))):
        Extractor.from_pretrained(copied)
    with pytest.raises((ValueError, RuntimeError, KeyError)):  # through plain PEFT too
        peft.PeftModel.from_pretrained(load_model(str(base))[0], str(copied))


def test_another_base_at_the_same_place_is_an_error(adapter: Path, base: Path, tmp_path: Path) -> None:
    other = Path(shutil.copytree(base, tmp_path / "base"))
    directory = Path(shutil.copytree(adapter, tmp_path / "copy"))
    write_schema(directory, str(other))
    Extractor.from_pretrained(directory)
    (weights,) = other.glob("*.safetensors")
    save_file({name: value + 1 for name, value in load_file(weights).items()}, weights, {"format": "pt"})
    with pytest.raises(UserError, match="language model"):
        Extractor.from_pretrained(directory)


def test_the_fingerprint_of_a_base_does_not_depend_on_dtype(base: Path) -> None:
    one, half = (base_fingerprint(load_model(str(base), dtype=dtype)[0]) for dtype in (None, torch.bfloat16))
    assert one == half
    assert set(one) == {"language model", "vision tower", "projector"}


def test_an_edited_card_is_a_warning(copied: Path, caplog: pytest.LogCaptureFixture) -> None:
    (copied / "README.md").write_text("card")
    write_digests(copied)
    (copied / "README.md").write_text("my card")
    Extractor.from_pretrained(copied)
    assert "README.md" in caplog.text
