"""No flipped bit in any file of a real run's checkpoints and adapter is loaded in silence."""

from __future__ import annotations

import json
import logging
import random
import shutil
from pathlib import Path

import pytest

from lvlm_clorae.errors import UserError
from lvlm_clorae.inference.extractor import Extractor
from lvlm_clorae.training import checkpoint
from lvlm_clorae.training.run_directory import complete_checkpoints
from tests.helpers.fork_server import train
from tests.helpers.launch import small_shards

pytestmark = pytest.mark.slow

SETTINGS = ["--lora_rank", 3, "--num_train_epochs", 1, "--max_steps", 2, "--save_steps", 1, "--max_target_length", 4]
FLIPS = 6
"""Bits of each file, among them one of the first and one of the last byte."""


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("flips")
    train(folder / "run", 1, "--shards", small_shards(folder / "shards", 8, 2, 2), *SETTINGS)
    return folder / "run"


def flipped(source: Path, target: Path) -> list[Path]:
    """Return copies of a directory, each with one flipped bit."""
    choose, copies = random.Random(0), []
    for file in sorted(source.iterdir()):
        data = file.read_bytes()
        for number in range(FLIPS):
            copy = shutil.copytree(source, target / file.name / str(number) / source.name)
            changed, position = bytearray(data), (0, len(data) - 1, *choose.choices(range(len(data)), k=FLIPS))[number]
            changed[position] ^= 1 << choose.randrange(8)
            (copy / file.name).write_bytes(changed)
            copies.append(copy)
    return copies


def test_checkpoints_with_a_flipped_bit_are_replaced_by_the_one_before(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoint, "_restore", lambda path, engine, state: None)
    monkeypatch.setattr(checkpoint.distributed, "on_first_rank", lambda work: work())
    older, newer = complete_checkpoints(run)
    fingerprint = json.loads((newer / "state.json").read_bytes())["fingerprint"]
    assert checkpoint.load([older, newer], None, fingerprint, print)[0] == newer
    copies = flipped(newer, tmp_path)
    assert len(copies) >= 4 * FLIPS
    for copy in copies:
        lines: list[str] = []
        try:
            assert checkpoint.load([older, copy], None, fingerprint, lines.append)[0] == older, copy
        except UserError as error:
            lines.append(str(error))
        assert str(copy) in lines[0]
        with pytest.raises(UserError, match=str(copy)):
            checkpoint.load([copy], None, fingerprint, print)


@pytest.mark.parametrize("name", ["adapter", "best"])
def test_adapters_with_a_flipped_bit_are_refused(
    name: str, run: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    Extractor.from_pretrained(run / name)
    copies = flipped(run / name, tmp_path)
    assert {copy.parts[-3] for copy in copies} >= {
        "README.md",
        "SHA256SUMS",
        "adapter_model.safetensors",
        "schema.json",
    }
    for copy in copies:
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            try:
                Extractor.from_pretrained(copy)
                said = caplog.text
            except UserError as error:
                said = str(error)
        assert str(copy) in said
