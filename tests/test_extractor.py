"""The extractor: an adapter directory in, typed records out, and clear words for what it cannot do."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from lvlm_clorae import CLoRAEConfig, Extractor
from lvlm_clorae.data.demo.generator import DATASETS
from lvlm_clorae.errors import UserError
from lvlm_clorae.models import load_model
from lvlm_clorae.records import Argument, Entity, Event, Relation, Request
from lvlm_clorae.tasks import TASKS
from tests.models.tiny import PROMPTS, picture, save_tiny, tiny_processor

TEXT = "guards struck the harbour on Monday"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("base")
    save_tiny(directory)
    return directory


def write_schema(directory: Path, base: str, **changes: Any) -> None:
    """``schema.json`` with the units of the demo datasets, as lvlm_clorae/training/export.py has it."""
    units = {
        f"{name}/{subtask}": {"dataset": name, "task": spec.task, "subtask": subtask, "labels": spec.labels[subtask]}
        for name, spec in DATASETS.items()
        for subtask in TASKS[spec.task].subtasks
    }
    schema = {
        "version": 1,
        "base": base,
        "adapter": "clorae",
        "tasks": list(TASKS),
        "units": units,
        "max_length": 256,
        "max_answer_length": 8,
    }
    (directory / "schema.json").write_text(json.dumps({**schema, **changes}), encoding="utf-8")


@pytest.fixture(scope="module")
def adapter(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter directory with random weights in every part that training would change."""
    directory = tmp_path_factory.mktemp("adapter")
    model, processor = load_model(str(base))
    config = CLoRAEConfig(
        r=4,
        tasks=list(TASKS),
        target_modules=["q", "v"],
        exclude_modules=r".*(vision_tower|projector)\..*",
        modules_to_save=["projector"],
    )
    tuned = peft.get_peft_model(model, config)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in tuned.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.5)
    tuned.save_pretrained(str(directory), save_embedding_layers=False)
    processor.save_pretrained(directory)
    write_schema(directory, str(base))
    return directory


@pytest.fixture(scope="module")
def loaded(adapter: Path) -> Extractor:
    return Extractor.from_pretrained(adapter, device="cpu")


class Spoken:
    """Makes an extractor say given answers, and keeps what its model was asked."""

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
def spoken(loaded: Extractor) -> Iterator[tuple[Extractor, Spoken]]:
    with pytest.MonkeyPatch.context() as patch:
        yield loaded, Spoken(loaded, patch)


def test_the_saved_weights_are_in_use(adapter: Path, loaded: Extractor) -> None:
    stored = load_file(adapter / "adapter_model.safetensors")
    state = peft.get_peft_model_state_dict(loaded.model)
    assert stored.keys() == state.keys()
    assert any("projector" in name for name in stored)
    assert all(torch.equal(tensor, state[name]) for name, tensor in stored.items())
    assert not loaded.model.training
    batch = tiny_processor()(PROMPTS[:1], [picture()], [[[0, 0, 9, 9], [3, 3, 20, 20]]])
    tokens = {}
    for task in TASKS:
        loaded.model.set_task(task)
        tokens[task] = loaded.model.generate(**batch, max_new_tokens=8, do_sample=False).tolist()
    assert len({str(row) for row in tokens.values()}) > 1, "each task has its expert"


@pytest.mark.parametrize("task", list(TASKS))
def test_every_task_runs_through_the_model(loaded: Extractor, task: str) -> None:
    names = {"head": "guards", "tail": "harbour"} if task == "mre" else {}
    for image in (None, picture()):
        found = loaded.extract(TEXT, image, task, **names)
        assert isinstance(found, list)
        assert found == loaded.extract(TEXT, image, task, **names)


@pytest.mark.parametrize("image", [None, picture()], ids=["text", "picture"])
def test_constrained_answers_are_in_the_words_of_the_text(loaded: Extractor, image: Any) -> None:
    """Of random weights, which never answer well otherwise."""
    schema = {**loaded.schema, "max_answer_length": 64}
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


def test_entities(spoken: tuple[Extractor, Spoken]) -> None:
    extractor, spoken_ = spoken
    spoken_.answers = ["person, Mara Novotny <spot> nonsense <spot> LOCATION, Tamsk"]
    found = extractor.extract("Mara Novotny leaves Tamsk")
    assert found == [Entity("person", "Mara Novotny"), Entity("location", "Tamsk")]
    assert found[0].to_dict() == {"record": "entity", "type": "person", "text": "Mara Novotny"}
    assert spoken_.tasks == ["mner"]
    (prompt,) = spoken_.prompts()
    assert prompt.startswith("entities. text: Mara Novotny leaves Tamsk types: person, location")
    assert spoken_.asked[0]["max_new_tokens"] == 8
    assert "labels" not in spoken_.asked[0]


def test_a_relation(spoken: tuple[Extractor, Spoken]) -> None:
    extractor, spoken_ = spoken
    spoken_.answers = ["Mara <spot> couple <spot> Sven", "none"]
    found = extractor.extract("great evening for Mara and Sven", picture(), "mre", head="Mara", tail="Sven")
    assert found == [Relation("Mara", "couple", "Sven")]
    assert found[0].to_dict() == {"record": "relation", "head": "Mara", "label": "couple", "tail": "Sven"}
    assert spoken_.prompts()[0].startswith("relation between Mara and Sven. text: great evening")
    assert spoken_.asked[0]["pixel_mask"].tolist() == [1]
    assert extractor.extract("so", None, "mre", head="a", tail="b") == []


def test_events_are_joined_by_type_and_objects_become_boxes(spoken: tuple[Extractor, Spoken]) -> None:
    extractor, spoken_ = spoken
    spoken_.answers = [
        "attack <spot> agent, guards <spot> instrument, O2 <spot> target, O3 <event> arrest <spot> target, rebels",
        "attack, struck <spot> meet",
    ]
    boxes = [(0, 0, 20, 15), (10, 5, 40, 30)]
    found = extractor.extract(TEXT, picture(), "mee", boxes=boxes)
    assert found == [
        Event(
            "attack",
            "struck",
            [
                Argument("agent", text="guards"),
                Argument("instrument", object="O2", box=(10, 5, 40, 30)),
                Argument("target", text="O3"),  # there is no third object: words like any other
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
    arguments, triggers = spoken_.prompts()  # the longer one first
    assert triggers.startswith("event triggers. objects: O1 <region> O2 <region> text: guards")
    assert arguments.startswith("event arguments. objects: O1 <region> O2 <region> text: guards")
    torch.testing.assert_close(
        spoken_.asked[0]["regions"], torch.tensor([[[0, 0, 0.5, 0.5], [0.25, 1 / 6, 1, 1]]] * 2, dtype=torch.float32)
    )


def test_nothing_found_is_an_empty_list(spoken: tuple[Extractor, Spoken]) -> None:
    extractor, spoken_ = spoken
    spoken_.answers = ["none", "none", "none"]
    assert extractor.extract(TEXT) == []
    assert extractor.extract(TEXT, task="mee") == []


def test_a_picture_may_be_a_file(spoken: tuple[Extractor, Spoken], tmp_path: Path) -> None:
    extractor, spoken_ = spoken
    picture().save(tmp_path / "picture.png")
    spoken_.answers = ["none"] * 3
    for image in (picture(), tmp_path / "picture.png", str(tmp_path / "picture.png")):
        extractor.extract(TEXT, image)
    first, *others = (inputs["pixel_values"] for inputs in spoken_.asked)
    assert all(torch.equal(first, other) for other in others)


def test_many_requests_are_answered_as_each_alone(loaded: Extractor) -> None:
    """Constrained, so that random weights answer with records; in double precision, where padding changes nothing."""
    schema = {**loaded.schema, "max_answer_length": 24}
    model = copy.deepcopy(loaded.model).double()
    extractor = Extractor(model, loaded.processor, schema, loaded.device)
    requests = [
        Request(TEXT, picture(), "mee", boxes=[(0, 0, 20, 15)]),
        Request("Mara Novotny sings in Tamsk", None, "mner"),
        Request("great evening for Mara and Sven", picture(), "mre", head="Mara", tail="Sven"),
        Request(TEXT, None, "mee"),
        Request("Tamsk", picture(), "mner"),
    ]
    done: list[int] = []
    together = extractor.extract_all(requests, batch_size=4, constrained=True, advance=done.append)
    assert done == [4, 3], "an event is two questions"
    assert any(together)
    for request, records in zip(requests, together, strict=True):
        assert extractor.extract(**vars(request), constrained=True) == records


def test_what_cannot_be_asked_is_a_user_error(loaded: Extractor, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r'know no task "mnre"\. Did you mean "mn?re"'):
        loaded.extract(TEXT, task="mnre")
    for names in ({}, {"head": "guards"}, {"tail": "harbour"}, {"head": "", "tail": "harbour"}):
        with pytest.raises(UserError, match="give head and tail"):
            loaded.extract(TEXT, task="mre", **names)
    with pytest.raises(UserError, match="give the image too"):
        loaded.extract(TEXT, task="mee", boxes=[(0, 0, 1, 1)])
    missing = tmp_path / "no-such.png"
    with pytest.raises(UserError, match=rf"{re.escape(str(missing))}: the picture cannot be read \(No such file"):
        loaded.extract(TEXT, missing)
    missing.write_bytes(b"no picture")
    with pytest.raises(UserError, match=rf"{re.escape(str(missing))}: its picture cannot be decoded"):
        loaded.extract(TEXT, missing)


def test_only_trained_tasks_can_be_asked(loaded: Extractor) -> None:
    extractor = Extractor(nn.Identity(), loaded.processor, {**loaded.schema, "tasks": ["mner"]}, loaded.device)
    with pytest.raises(UserError, match='know no task "mee"'):
        extractor.extract(TEXT, task="mee")


def test_fully_trained_weights_are_a_model_directory(base: Path, tmp_path: Path) -> None:
    model = save_tiny(tmp_path)
    write_schema(tmp_path, "the base is not needed", adapter="full")
    extractor = Extractor.from_pretrained(tmp_path, device="cpu")
    state = extractor.model.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    assert isinstance(extractor.extract(TEXT), list)


@pytest.mark.parametrize("content", [None, "{", "[]", "{}", '{"adapter": "clorae"}'])
def test_a_directory_that_is_no_adapter_is_a_user_error(tmp_path: Path, content: str | None) -> None:
    if content is not None:
        (tmp_path / "schema.json").write_text(content, encoding="utf-8")
    with pytest.raises(UserError, match=r"schema\.json"):
        Extractor.from_pretrained(tmp_path)


def test_an_adapter_that_lost_its_files_is_a_user_error(adapter: Path, tmp_path: Path) -> None:
    for name in ("adapter_config.json", "adapter_model.safetensors", "vision_processor.json"):
        directory = tmp_path / name
        directory.mkdir()
        for path in adapter.iterdir():
            if path.name != name:
                (directory / path.name).write_bytes(path.read_bytes())
        with pytest.raises(UserError, match=re.escape(str(directory))):
            Extractor.from_pretrained(directory, device="cpu")


def test_a_missing_base_is_named(adapter: Path, tmp_path: Path) -> None:
    write_schema(tmp_path, "/no/such/base")
    with pytest.raises(UserError, match="/no/such/base"):
        Extractor.from_pretrained(tmp_path)


def test_a_schema_of_another_version_is_refused(tmp_path: Path) -> None:
    write_schema(tmp_path, "demo", version=2)
    with pytest.raises(UserError, match="version 2, but this program reads 1"):
        Extractor.from_pretrained(tmp_path)


def test_a_task_of_the_users_own_gives_what_its_sub_tasks_ask(
    loaded: Extractor, monkeypatch: pytest.MonkeyPatch
) -> None:
    units = {
        **loaded.schema["units"],
        "reviews/entity": {"dataset": "reviews", "task": "aspects", "subtask": "entity", "labels": ["food"]},
        "reviews/relation": {"dataset": "reviews", "task": "aspects", "subtask": "relation", "labels": ["likes"]},
    }
    schema = {**loaded.schema, "tasks": [*loaded.schema["tasks"], "aspects"], "units": units}
    own = Extractor(loaded.model, loaded.processor, schema, loaded.device)
    asked: list[tuple[str, Any]] = []

    def answers(batch: list[Any], *_: Any) -> list[str]:
        asked.extend((question.subtask, question.labels) for question in batch)
        said = {"entity": "food, soup", "relation": "guests <spot> likes <spot> soup"}
        return [said[question.subtask] for question in batch]

    monkeypatch.setattr(own, "_answers", answers)
    assert own.extract("the soup", task="aspects", head="guests", tail="soup") == [
        Entity("food", "soup"),
        Relation("guests", "likes", "soup"),
    ]
    assert sorted(asked) == [("entity", ["food"]), ("relation", ["likes"])], "no other task's labels"
    with pytest.raises(UserError, match="give head and tail"):
        own.extract("the soup", task="aspects")
    with pytest.raises(UserError, match=r'no task "aspect".*"aspects"'):
        own.extract("the soup", task="aspect")
