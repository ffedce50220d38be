"""Alignment: what it trains, the held-out measure, the base that it writes, and its errors."""

from __future__ import annotations

import json
import os
import shlex
import signal
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from lvlm_clorae.cli import align
from lvlm_clorae.cli import main as cli
from lvlm_clorae.data.index import load_index
from lvlm_clorae.models.loading import describe_model, load_model
from lvlm_clorae.models.parts import part_of
from lvlm_clorae.training import distributed
from lvlm_clorae.training.adapters import add_adapter
from lvlm_clorae.training.alignment import CaptionLoss, _OtherImages, _row_losses, compare
from lvlm_clorae.training.config import TrainConfig
from lvlm_clorae.training.config_loading import load_config
from lvlm_clorae.training.main import main
from tests.helpers.captions import caption_shards, write_captions
from tests.helpers.fork_server import shared_server, train, wait_for_records
from tests.helpers.launch import REPOSITORY, records, small_shards
from tests.helpers.pages import commands
from tests.helpers.tiny import noise_image, save_plain_t5
from tests.helpers.tiny_causal import save_language, save_tower
from tests.helpers.tiny_image_text import save_qwen
from tests.helpers.towers import tower

BASES: dict[str, tuple[Callable[[Path], Any], list[str]]] = {
    "causal": (save_language, []),
    "t5, gated": (lambda path: save_plain_t5(path, own_head=True), ["--fusion", "gated"]),
}
SETTINGS = ["--adapter", "projector", "--per_device_train_batch_size", 2, "--logging_steps", 1]


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return caption_shards(tmp_path_factory.mktemp("captions"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a tower and the language models of BASES."""
    directory = tmp_path_factory.mktemp("parts")
    save_tower(directory / "tower")
    for base, (save, _) in BASES.items():
        save(directory / base)
    return directory


def base_flags(folder: Path, base: str) -> list[object]:
    return ["--model", folder / base, "--vision", f"local-dir:{folder / 'tower'}", *BASES[base][1]]


@pytest.mark.parametrize(("base", "parts"), [("causal", {"projector"}), ("t5, gated", {"projector", "fusion"})])
def test_only_new_parts_are_trained(base: str, parts: set[str], folder: Path) -> None:
    fusion = "gated" if "gated" in base else "concat"
    model = describe_model(str(folder / base), vision=f"local-dir:{folder / 'tower'}", fusion=fusion)
    add_adapter(model, TrainConfig(adapter="projector"), ["caption"])
    trained = {part_of(name) for name, weight in model.named_parameters() if weight.requires_grad}
    assert trained == parts


def test_its_defaults_are_llavas_and_flags_win() -> None:
    config = load_config(["--model", "flan-t5-large", "--adapter", "projector", "--num_train_epochs", "3"])
    assert (config.learning_rate, config.lr_scheduler_type, config.num_train_epochs) == (1e-3, "cosine", 3)


def test_the_difference_is_a_mean_over_images() -> None:
    generator = np.random.default_rng(0)
    images = [f"{number % 7}.jpg" for number in range(23)]
    own, other = generator.normal(size=(2, 23))
    shown = [f"{(number + 1) % 7}.jpg" for number in range(22)] + [images[22]]
    found = compare(
        {str(n): (image, loss) for n, (image, loss) in enumerate(zip(images, own, strict=True))},
        {str(n): (image, loss) for n, (image, loss) in enumerate(zip(shown, other, strict=True))},
    )
    rows = np.arange(22)  # the last was shown its own image
    of_image = np.array([[x[rows][rows % 7 == image].mean() for x in (own, other)] for image in range(7)])
    difference = of_image[:, 1] - of_image[:, 0]
    assert found == CaptionLoss(
        22,
        7,
        *map(pytest.approx, of_image.mean(0)),
        pytest.approx(difference.mean()),
        pytest.approx(difference.std(ddof=1) / 7**0.5),
    )
    assert compare({"a": ("1", 1.0)}, {"a": ("2", 2.0)}) is None, "one image has no standard error"


def test_every_caption_gets_the_image_of_another(shards: Path) -> None:
    own = load_index(shards)
    dataset = _OtherImages(own, shards, "train")
    refs = dataset.refs("colours/caption")
    plain = dataset.of_split("train").__getitems__(refs)
    swapped = dataset.__getitems__(refs)
    assert [one.data["caption"] for one in swapped] == [one.data["caption"] for one in plain]
    assert all(one.image != other.image for one, other in zip(plain, swapped, strict=True))
    assert sorted(one.image or b"" for one in swapped) == sorted(one.image or b"" for one in plain)


@pytest.mark.usefixtures("process_group")
@pytest.mark.parametrize("base", BASES)
def test_the_loss_of_a_row_is_that_of_the_row_alone(base: str, folder: Path) -> None:
    fusion = "gated" if "gated" in base else "concat"
    model, processor = load_model(str(folder / base), vision=f"local-dir:{folder / 'tower'}", fusion=fusion)
    captions, images = ["Mara leaves Tamsk", "guards struck the harbour in Tamsk"], [noise_image(0), noise_image(1)]
    whole: Any = SimpleNamespace(tensors=processor(["", ""], images, answers=captions))
    with torch.no_grad():
        found = _row_losses(model, whole)
        alone = [
            model(**processor([""], [image], answers=[text])).loss for image, text in zip(images, captions, strict=True)
        ]
    assert found == pytest.approx([float(loss) for loss in alone], abs=1e-5)


@pytest.mark.usefixtures("process_group")
def test_a_whole_state_has_the_statistics_of_a_cnn() -> None:
    vision = tower("resnet")
    state = distributed.gathered_state(vision, trainable_only=False)
    assert state.keys() == vision.state_dict().keys()
    assert any("running_var" in name for name in state)


def refused(capsys: pytest.CaptureFixture[str], *argv: object) -> str:
    assert main([*map(str, argv)]) == 2
    return capsys.readouterr().err


def test_a_base_without_a_projector_to_align_is_refused(
    shards: Path, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_qwen(tmp_path / "qwen")
    for flags in (["--model", tmp_path / "qwen"], ["--model", folder / "causal", "--vision", "none"]):
        said = refused(capsys, *SETTINGS, *flags, "--shards", shards, "--output_dir", tmp_path / "run")
        assert "no projector to align" in said
    said = refused(
        capsys, *SETTINGS, *base_flags(folder, "causal"), "--load_in_8bit", "--shards", shards, "--output_dir", tmp_path
    )
    assert "whole weights" in said


def test_captions_are_for_alignment_alone(shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "lvlm-clorae align" in refused(capsys, "--shards", shards, "--output_dir", tmp_path / "run")
    others = small_shards(tmp_path / "shards", train=2, dev=0, test=0)
    assert "no captions" in refused(capsys, *SETTINGS, "--shards", others, "--output_dir", tmp_path / "run")


def test_the_command_is_train_with_its_adapter(monkeypatch: pytest.MonkeyPatch) -> None:
    called: list[Any] = []
    monkeypatch.setattr(align, "entry", lambda *arguments: called.append(arguments))
    align.main(["--model", "x"])
    ((argv, prog),) = called
    assert (load_config(argv).adapter, load_config(argv).model, prog) == ("projector", "x", "lvlm-clorae align")


def test_its_help_has_its_purpose(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        load_config(["--help"], "lvlm-clorae align")
    assert "both frozen" in capsys.readouterr().out


def test_commands_of_the_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = REPOSITORY / "docs/align.md"
    monkeypatch.chdir(tmp_path)
    write_captions(tmp_path / "flickr8k", images="images")
    (build,) = commands(page, "lvlm-clorae shards build")
    assert cli(shlex.split(build)[1:]) == 0
    (align,) = commands(page, "lvlm-clorae align")
    config = load_config([*shlex.split(align)[2:], "--adapter", "projector"])
    assert load_index(Path(config.shards)).dataset("flickr8k").samples("train") == 20
    (train_line,) = commands(page, "deepspeed train.py")
    assert load_config(shlex.split(train_line)[2:]).model == config.output_dir


@pytest.mark.slow
@pytest.mark.parametrize("base", BASES)
def test_an_aligned_base_is_trained_further(base: str, shards: Path, folder: Path, tmp_path: Path) -> None:
    run, flags = tmp_path / "run", base_flags(folder, base)
    said = train(run, 1, *SETTINGS, *flags, "--shards", shards)
    loss = json.loads((run / "caption_loss.json").read_text())
    assert (loss["split"], loss["dataset_tasks"]["colours/caption"]["captions"]) == ("test", 4)
    (record,) = records(run, "caption_loss")
    assert record["difference"]["colours/caption"] == loss["dataset_tasks"]["colours/caption"]["difference"]
    assert "standard error" in said
    before, _ = load_model(str(folder / base), vision=flags[3], fusion="gated" if "gated" in base else "concat")  # type: ignore[arg-type]
    model, processor = load_model(str(run))
    assert model.newly_initialized == ()
    old, new = before.state_dict(), model.state_dict()
    assert old.keys() == new.keys()
    changed = {part_of(name) for name in new if not torch.equal(old[name], new[name])}
    assert changed <= {"projector", "fusion"}
    assert "projector" in changed
    if base == "causal":
        assert "{prompt}" in processor.template  # type: ignore[attr-defined]
    others = small_shards(tmp_path / "shards", train=4, dev=0, test=0)
    train(tmp_path / "adapted", 1, "--model", run, "--shards", others, "--max_steps", 2, "--num_train_epochs", 1)
    schema = json.loads((tmp_path / "adapted/adapter/schema.json").read_text())
    assert "projector" in schema["base_fingerprint"]


@pytest.mark.slow
def test_an_interrupted_alignment_ends_with_the_same_base(shards: Path, folder: Path, tmp_path: Path) -> None:
    whole, parted = tmp_path / "whole", tmp_path / "parted"
    arguments = [*SETTINGS, *base_flags(folder, "causal"), "--shards", shards, "--num_train_epochs", 3]
    server, log = shared_server(), tmp_path / "log"
    server.run(1, whole, *arguments)
    (pid,) = server.start(1, log, *arguments, "--output_dir", parted)
    wait_for_records(parted, 6, log)
    os.kill(pid, signal.SIGUSR1)
    assert server.wait(pid) == 75, log.read_text()
    server.run(1, parted, *arguments, "--resume_from_checkpoint", "auto")
    first, second = (load_file(run / "base/model.safetensors") for run in (whole, parted))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert (whole / "caption_loss.json").read_text() == (parted / "caption_loss.json").read_text()
    assert records(whole, "train") == records(parted, "train")
