"""Adapter directories that are damaged or made to do harm: one line each, at once, in Python and in commands."""

from __future__ import annotations

import json
import os
import re
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file

from lvlm_clorae import Extractor, UserError, cli
from lvlm_clorae.digests import write_digests
from lvlm_clorae.models import load_model
from tests.helpers.adapter_directory import save_adapter, write_schema
from tests.helpers.launch import small_shards
from tests.helpers.tiny import save_tiny

Change = Callable[[Path], object]
WEIGHTS, CONFIG, SCHEMA, PROCESSOR = (
    "adapter_model.safetensors",
    "adapter_config.json",
    "schema.json",
    "vision_processor.json",
)
DEEP = json.loads("[" * 900 + "]" * 900)
HANGS = "(a+)+$", "(.*.*)*x", r"(\w+\.?)*!", "(.|.)" * 60 + "x", "("


class Exploit:
    """Leaves a file behind when it is unpickled."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.trace,)


def set_in(file: str, *keys: str, to: Any) -> Change:
    """Return a change of one value of a JSON file."""

    def change(directory: Path) -> None:
        content = json.loads((directory / file).read_text(encoding="utf-8"))
        inner = content
        for key in keys[:-1]:
            inner = inner.setdefault(key, {})
        inner[keys[-1]] = to
        (directory / file).write_text(json.dumps(content), encoding="utf-8")

    return change


def whole(file: str, text: str) -> Change:
    return lambda directory: (directory / file).write_text(text, encoding="utf-8")


def pickled(directory: Path) -> None:
    torch.save(
        {"weights": load_file(directory / WEIGHTS), "x": Exploit(directory / "trace")}, directory / "adapter.bin"
    )
    (directory / WEIGHTS).unlink()
    (directory / "adapter.bin").rename(directory / "adapter_model.bin")


def pickled_under_its_name(directory: Path) -> None:
    pickled(directory)
    (directory / "adapter_model.bin").rename(directory / WEIGHTS)


def truncated(directory: Path) -> None:
    path = directory / WEIGHTS
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def not_finite(directory: Path) -> None:
    path = directory / "adapter_model.safetensors"
    weights = load_file(path)
    next(iter(weights.values())).view(-1)[0] = float("nan")
    save_file(weights, path)


def header_of_a_gigabyte(directory: Path) -> None:
    (directory / WEIGHTS).write_bytes((1 << 30).to_bytes(8, "little") + b"{" * 99)


CHANGES: dict[str, Change] = {
    "pickled weights": pickled,
    "pickled weights named safetensors": pickled_under_its_name,
    "truncated weights": truncated,
    "huge header": header_of_a_gigabyte,
    "no processor": lambda directory: (directory / PROCESSOR).unlink(),
    "no tokenizer": lambda directory: [path.unlink() for path in directory.glob("tokenizer*")],
    "no configuration": lambda directory: (directory / CONFIG).unlink(),
    "unknown dtype": set_in(SCHEMA, "base_options", "dtype", to="float99"),
    "dtype that is no dtype": set_in(SCHEMA, "base_options", "dtype", to="load"),
    "unknown option": set_in(SCHEMA, "base_options", "trust_remote_code", to=True),
    "quantized as a number": set_in(SCHEMA, "base_options", "load_in_8bit", to=1),
    "unknown method": set_in(SCHEMA, "adapter", to="elsewhere"),
    "unknown peft_type": set_in(CONFIG, "peft_type", to="ELSEWHERE"),
    "another peft_type": set_in(CONFIG, "peft_type", to="LORA"),
    "peft_type of a list": set_in(CONFIG, "peft_type", to=[]),
    "base that is no model": set_in(SCHEMA, "base", to="../../x"),
    "huge rank": set_in(CONFIG, "r", to=10**9),
    "large rank": set_in(CONFIG, "r", to=60_000),
    "huge expert rank": set_in(CONFIG, "expert_r", to=10**9),
    "large expert rank": set_in(CONFIG, "expert_r", to=60_000),
    "many tasks": set_in(CONFIG, "tasks", to=[f"t{number}" for number in range(1000)]),
    "tasks in another order": set_in(CONFIG, "tasks", to=["mee", "mre", "mner"]),
    "weights that are not finite": not_finite,
    "huge image": set_in(PROCESSOR, "image_size", to=10**9),
    "image of another size": set_in(PROCESSOR, "image_size", to=64),
    "image size as a list": set_in(PROCESSOR, "image_size", to=[32]),
    "huge prompts": set_in(SCHEMA, "max_source_length", to=10**12),
    "no answers": set_in(SCHEMA, "max_target_length", to=0),
    "unknown sub-task": set_in(SCHEMA, "dataset_tasks", "demo_news/entity", "subtask", to="entities"),
    "labels as a string": set_in(SCHEMA, "dataset_tasks", "demo_news/entity", "labels", to="person"),
    "pattern in the saved modules": set_in(CONFIG, "modules_to_save", to=["(.*.*)*x"]),
    "pattern of layers": set_in(CONFIG, "layers_pattern", to=["(.*.*)*x"]),
    **{f"target_modules: {pattern[:20]}": set_in(CONFIG, "target_modules", to=pattern) for pattern in HANGS},
    **{
        f"{file}, {key}: {str(value)[:9]}": set_in(file, key, to=value)
        for file, keys in {
            SCHEMA: ("base", "base_options", "base_fingerprint", "tasks", "dataset_tasks", "max_source_length"),
            CONFIG: ("r", "lora_alpha", "target_modules", "tasks", "use_gate", "frozen_tasks", "mim_s_min"),
            PROCESSOR: ("image_size", "kind", "mean"),
        }.items()
        for key in keys
        for value in ([7], {"a": 7}, True, "x", DEEP, float("nan"))
        if not (key in ("use_gate",) and value is True)
        and not (key == "base" and value == "x")
        and not (key in ("target_modules", "tasks") and file == CONFIG and value == "x")
    },
    **{
        f"{file}: {text[:9]}": whole(file, text)
        for file in (SCHEMA, CONFIG, PROCESSOR, "tokenizer.json", "tokenizer_config.json")
        for text in ("", "null", "[]", "7", '"x"', "{", "[" * 10**5, '{"a": NaN}', "\0\xff")
        if (file, text) != ("tokenizer_config.json", '{"a": NaN}')
    },
}


def refused(directory: Path) -> str:
    """Return the message of the error within some seconds."""
    began = time.monotonic()
    with pytest.raises(UserError) as caught:
        Extractor.from_pretrained(directory, device="cpu")
    assert time.monotonic() - began < 10
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) < 1000
    return message


@pytest.fixture
def copied(adapter: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(adapter, tmp_path / "copy"))


@pytest.mark.parametrize("name", CHANGES)
def test_a_hostile_directory_is_one_line(name: str, copied: Path) -> None:
    CHANGES[name](copied)
    write_digests(copied)
    refused(copied)
    assert not (copied / "trace").exists(), "nothing is unpickled"


@pytest.mark.parametrize("name", ["pickled weights", "huge rank", "target_modules: (.*.*)*x", "schema.json: ["])
def test_a_hostile_directory_on_the_command_line(
    name: str, copied: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    CHANGES[next(one for one in CHANGES if one.startswith(name))](copied)
    write_digests(copied)
    shards = small_shards(tmp_path / "shards", train=1, dev=1, test=1)
    for argv in (["predict", "--text", "Mara"], ["evaluate", "--shards", str(shards)]):
        assert cli.main([argv[0], "--run", str(copied), *argv[1:]]) == 2
        (line,) = [line for line in capsys.readouterr().err.splitlines() if "error" in line]
        assert line.startswith(f"error: {copied}")


@pytest.mark.parametrize("pattern", HANGS[:-1])
def test_a_slow_pattern_of_excluded_modules_does_not_hang(pattern: str, copied: Path, base: Path) -> None:
    """It matches no module, so that the adapter is the same as without it."""
    set_in(CONFIG, "exclude_modules", to=pattern)(copied)
    write_digests(copied)
    began = time.monotonic()
    Extractor.from_pretrained(copied, device="cpu")
    peft.PeftModel.from_pretrained(load_model(str(base))[0], str(copied))
    assert time.monotonic() - began < 20


def linked(directory: Path) -> None:
    shutil.move(directory / WEIGHTS, directory.parent / WEIGHTS)
    (directory / WEIGHTS).symlink_to(directory.parent / WEIGHTS)


def listed_outside(name: str) -> Change:
    def change(directory: Path) -> None:
        sums = directory / "SHA256SUMS"
        sums.write_text(f"{'0' * 64}  {name}\n" + sums.read_text())

    return change


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (whole(CONFIG, "{}"), CONFIG),
        (whole("SHA256SUMS", "x"), "SHA256SUMS"),
        (listed_outside("../../x"), "SHA256SUMS"),
        (listed_outside("/etc/passwd"), "SHA256SUMS"),
        (listed_outside(".."), r"\.\."),
        (linked, WEIGHTS),
        (whole("added_tokens.json", "{}"), r"added_tokens\.json"),
        (lambda directory: os.mkfifo(directory / "chat_template.jinja"), "chat_template"),
    ],
)
def test_files_that_are_not_those_of_the_export(change: Change, named: str, copied: Path) -> None:
    change(copied)
    assert re.search(named, refused(copied))


def test_a_schema_that_is_a_pipe_does_not_block(copied: Path) -> None:
    (copied / SCHEMA).unlink()
    os.mkfifo(copied / SCHEMA)
    assert SCHEMA in refused(copied)


def test_the_links_of_the_hub_cache_and_hidden_files_are_read(copied: Path) -> None:
    snapshot, blobs = copied.parent / "snapshots" / "main", copied.parent / "blobs"
    snapshot.mkdir(parents=True)
    copied.rename(blobs)
    for number, path in enumerate(sorted(blobs.iterdir())):
        path.rename(blobs / str(number))
        (snapshot / path.name).symlink_to(f"../../blobs/{number}")
    (snapshot / ".gitattributes").touch()
    Extractor.from_pretrained(snapshot, device="cpu")


@pytest.mark.parametrize(
    "change",
    [
        set_in(CONFIG, "r", to=10**9),
        set_in(CONFIG, "r", to=True),
        set_in(CONFIG, "layer_replication", to=[[0, 10**9]]),
        set_in(CONFIG, "rank_pattern", to={"(.*.*)*x": 4}),
        set_in(CONFIG, "init_lora_weights", to="pissa"),
        set_in(CONFIG, "target_modules", to="(.*.*)*x"),
    ],
)
def test_plain_lora_has_the_same_checks(change: Change, base: Path, tmp_path: Path) -> None:
    directory = save_adapter(tmp_path, base, adapter="lora")
    Extractor.from_pretrained(directory, device="cpu")
    change(directory)
    write_digests(directory)
    refused(directory)


@pytest.mark.parametrize(
    "change",
    [
        set_in(CONFIG, "r", to=10**9),
        set_in(CONFIG, "r", to=DEEP),
        set_in(CONFIG, "use_gate", to="yes"),
        set_in(CONFIG, "tasks", to=None),
        set_in(CONFIG, "target_modules", to="(.*.*)*x"),
        set_in(CONFIG, "modules_to_save", to=["(.*.*)*x"]),
        set_in(CONFIG, "layers_pattern", to=["(.*.*)*x"]),
    ],
)
def test_peft_itself_refuses_a_hostile_configuration(change: Change, copied: Path, base: Path) -> None:
    change(copied)
    began = time.monotonic()
    with pytest.raises((ValueError, RecursionError)):
        peft.PeftModel.from_pretrained(load_model(str(base))[0], str(copied))
    assert time.monotonic() - began < 10


@pytest.mark.parametrize(
    "change",
    [
        set_in("config.json", "d_model", to=10**6),
        set_in("config.json", "d_model", to="x"),
        set_in("config.json", "vision", "model", "image_size", to=10**9),
        whole("config.json", "[" * 10**5),
        lambda directory: (directory / "model.safetensors").unlink(),
    ],
)
def test_a_hostile_directory_of_full_fine_tuning(change: Change, tmp_path: Path) -> None:
    save_tiny(tmp_path)
    write_schema(tmp_path, "not needed", adapter="full")
    change(tmp_path)
    write_digests(tmp_path)
    refused(tmp_path)
