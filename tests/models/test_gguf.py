"""GGUF files as bases: the weights, tokenizer and template of the file, found by path, and errors."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

from lvlm_clorae.errors import UserError
from lvlm_clorae.models import gguf, load_model
from lvlm_clorae.models.fingerprint import base_fingerprint
from lvlm_clorae.models.loading import check_options, find_source
from lvlm_clorae.models.presets import published_name
from lvlm_clorae.training.checks import check_model
from tests.helpers.tiny_gguf import save_gguf


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("gguf") / "base/tiny.gguf"
    path.parent.mkdir()
    save_gguf(path)
    return path


@pytest.mark.integration
def test_has_the_weights_of_the_file(tmp_path: Path) -> None:
    plain = save_gguf(tmp_path / "tiny.gguf")
    model, processor = load_model(str(tmp_path / "tiny.gguf"), vision="none")
    state = model.language_model.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in plain.state_dict().items())
    ids = processor(["Mara leaves Tamsk"])["input_ids"]
    with torch.no_grad():
        torch.testing.assert_close(model(input_ids=ids).logits, plain(input_ids=ids).logits, rtol=1e-5, atol=1e-5)
    assert "<|im_start|>" in processor.template


@pytest.mark.integration
def test_a_dequantized_model_is_not_marked_as_quantized(file: Path, tmp_path: Path) -> None:
    model, _ = load_model(str(file), vision="none", dtype=torch.bfloat16)
    assert {weight.dtype for weight in model.parameters()} == {torch.bfloat16}
    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            assert not any(getattr(module, name, None) for name in gguf.FLAGS)
            assert not hasattr(module.config, "quantization_config")
    model.language_model.save_pretrained(tmp_path)
    assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text())


@pytest.mark.integration
def test_file_and_directory_are_the_same_base(file: Path) -> None:
    by_file, _ = load_model(str(file), vision="none")
    by_directory, _ = load_model(str(file.parent), vision="none")
    assert base_fingerprint(by_file) == base_fingerprint(by_directory)
    assert published_name(str(file)) == str(file)
    check_model(str(file))


def test_a_directory_with_several_files_is_refused(tmp_path: Path) -> None:
    for name in ("a.gguf", "b.gguf"):
        (tmp_path / name).touch()
    with pytest.raises(UserError, match="2 GGUF files"):
        find_source(str(tmp_path))


def test_config_json_has_precedence(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "a.gguf").touch()
    assert gguf.find_gguf(tmp_path) is None


def test_quantization_is_refused(file: Path) -> None:
    with pytest.raises(UserError, match="load_in_8bit"):
        load_model(str(file), vision="none", load_in_8bit=True)


def test_an_invalid_file_is_a_user_error(tmp_path: Path) -> None:
    (tmp_path / "a.gguf").write_bytes(b"GGUF and no more")
    with pytest.raises(UserError, match="cannot be read as a GGUF file"):
        check_options(str(tmp_path / "a.gguf"), vision="none")


def test_a_missing_file_is_a_user_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such"):
        check_model("weights/none.gguf")


def test_the_missing_package_is_one_line_with_the_command(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gguf, "is_gguf_available", lambda: False)
    with pytest.raises(UserError, match="pip install") as caught:
        check_options(str(file), vision="none")
    assert "\n" not in str(caught.value)
