"""GGUF files as bases: found by path, read and dequantized by transformers."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

from transformers import AutoConfig, PreTrainedModel
from transformers.utils import is_gguf_available

from ..errors import UserError, first_line

FLAGS = ("is_loaded_in_8bit", "is_loaded_in_4bit", "is_quantized", "quantization_method", "hf_quantizer")
"""Attributes by which transformers and PEFT recognize a quantized model."""


def find_gguf(path: Path) -> Path | None:
    """Return the GGUF file that ``path`` names, or the only one in a directory without ``config.json``, if any.

    Raises UserError for a directory with several.
    """
    if path.suffix == ".gguf" and path.is_file():
        return path
    if not path.is_dir() or (path / "config.json").is_file():
        return None
    files = sorted(path.glob("*.gguf"))
    if len(files) > 1:
        raise UserError(f"{path} has {len(files)} GGUF files. Give one of them, such as {files[0]}.")
    return files[0] if files else None


def gguf_config(file: Path) -> Any:
    """Read the configuration from the metadata of a GGUF file.

    Raises UserError if it is not readable, or the package ``gguf`` is missing.
    """
    if not is_gguf_available():
        raise UserError(f"{file}: GGUF files need the package gguf. Run: pip install 'gguf>=0.10'")
    return _read_config(file, file.stat().st_mtime_ns)


@cache  # transformers takes seconds to parse the vocabulary
def _read_config(file: Path, modified: int) -> Any:
    try:
        return AutoConfig.from_pretrained(file.parent, gguf_file=file.name, trust_remote_code=False)
    except Exception as error:  # gguf and NumPy raise anything for an invalid file
        raise UserError(
            f"{file} cannot be read as a GGUF file: {first_line(error)} Download it again, or give a directory "
            "written by save_pretrained."
        ) from None


def gguf_arguments(file: Path, load_in_8bit: bool, load_in_4bit: bool) -> dict[str, Any]:
    """Return arguments of ``from_pretrained`` that read and dequantize the file. Raises UserError for quantization."""
    if load_in_8bit or load_in_4bit:
        raise UserError(f"{file}: a GGUF file is dequantized on load. Leave load_in_8bit and load_in_4bit out.")
    try:
        from transformers import GgufConfig
    except ImportError:  # releases that always dequantize
        return {"gguf_file": file.name}
    return {"gguf_file": file.name, "quantization_config": GgufConfig(dequantize=True)}


def clear_quantization(model: Any) -> None:
    """Remove the marks of quantization that transformers leaves on a dequantized model."""
    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            for name in FLAGS:
                vars(module).pop(name, None)
            if hasattr(module.config, "quantization_config"):
                del module.config.quantization_config
