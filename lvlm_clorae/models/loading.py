"""Load or describe a base by its name: preset, local directory or hub id."""

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import try_to_load_from_cache
from safetensors import SafetensorError
from transformers import AutoConfig

from ..errors import UserError, first_line
from ..quiet import quiet_libraries
from .families import Family, LoadOptions, Source, families, find_family
from .gguf import clear_quantization, find_gguf, gguf_arguments, gguf_config
from .presets import FUSIONS, PROJECTORS, base_of, check_model, presets
from .processor import Processor, reading
from .quantization import disable_cpu_repacking, quantization_arguments

DEFAULT_VISION = "ViT-L-14-quickgelu:openai"
TEXT_ONLY = "none"
"""Value of ``vision`` for a base without tower and projector."""
WEIGHTS, WEIGHTS_INDEX = "model.safetensors", "model.safetensors.index.json"
REJECTIONS = {
    "fusion": "only T5 without a vision tower takes a fusion",
    "vision": "it has its own vision tower",
    "vision_layer": "it has its own vision tower",
    "projector": "it has its own projector",
    "template": "only a causal language model as published takes a prompt template",
}
"""Option of :func:`load_model` -> the reason why a base does not accept it."""


@quiet_libraries()
def load_model(
    name_or_path: str,
    *,
    fusion: str = "concat",
    vision: str | None = None,
    dtype: torch.dtype | None = None,
    load_in_8bit: bool = False,
    load_in_4bit: bool = False,
    vision_layer: int | None = None,
    projector: str | None = None,
    template: str | None = None,
) -> tuple[Any, Processor]:
    """Load a model and its processor.

    Args:
        name_or_path: a preset, a local directory, a GGUF file (or a directory with one) or a hub id, of a model of
            any family in :mod:`lvlm_clorae.models.families` or of one saved by this package's models
        fusion: how T5 reads images: ``concat`` (visual tokens before the text) or ``gated`` (UMIE's)
        vision: ``model:tag`` of open_clip for a base without a vision tower; the tag may be a local weight file; also
            ``hf-hub:OWNER/NAME`` and ``local-dir:PATH``; ``none`` for a text-only base
        dtype: of all weights that are not quantized; default float32
        load_in_8bit, load_in_4bit: quantize the linear layers of the language model to LLM.int8 or nf4
        vision_layer: block of the tower whose patch tokens are used; default -2, as in LLaVA
        projector: ``mlp2x_gelu`` (default) or ``linear``, for a base without a projector
        template: conversation of a causal language model, with ``{image}``, ``{prompt}`` and ``{answer}``

    Returns:
        The model, in eval mode, and the processor that makes batches for its ``forward``. The model's attribute
        ``newly_initialized`` names the parts that are in no checkpoint and have to be trained.

    Raises:
        UserError: the model does not exist or is not supported, a file is missing, or an option does not apply to it.
    """
    dtype = dtype or torch.float32
    chosen = {"vision": vision, "vision_layer": vision_layer, "projector": projector, "template": template}
    source, family, options = _resolve(find_source(name_or_path), fusion, **chosen)
    if source.gguf:
        arguments = gguf_arguments(source.gguf, load_in_8bit, load_in_4bit)
    else:
        arguments = quantization_arguments(load_in_8bit, load_in_4bit, dtype)
    options = replace(options, dtype=dtype, quantization=arguments)
    saved = family.is_saved(source.config)
    try:
        if saved:
            model = family.saved_class.from_pretrained(source.base, **options.from_pretrained)
            processor = Processor.from_pretrained(source.base)
        else:
            model, processor = family.load(source, options)
    except UserError:
        raise
    except (OSError, ValueError, KeyError, TypeError, ImportError, SafetensorError) as error:
        raise loading_error(source.name, source.base, error) from None
    model.newly_initialized = () if saved else family.newly_initialized(options)
    model.name_or_path = source.base  # PEFT writes it to adapter_config.json
    disable_cpu_repacking(model)
    keep_head_input_contiguous(model)
    if source.gguf:
        clear_quantization(model)
    return model.eval(), processor


def keep_head_input_contiguous(model: Any) -> None:
    """Copy the input of the output head, where it is a slice ``[B, T, d]`` of the states of all positions.

    torch multiplies a slice by the weight as a batch of matrices. In bf16 on a CPU it copies the weight
    ``[vocabulary, d]`` B times for that: a fifth of a profiled training step of SmolLM2-135M with 8 rows.
    """
    if (head := model.get_output_embeddings()) is not None:
        head.register_forward_pre_hook(_contiguous)


def _contiguous(module: torch.nn.Module, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    return (args[0].contiguous(), *args[1:])


def describe_model(name_or_path: str, **options: Any) -> Any:
    """Build a model on the meta device with the options of :func:`load_model`, except for those of the weights.

    A preset needs no file for that, any other base its ``config.json``.
    """
    source, family, resolved = _resolve(find_source(name_or_path, offline=True), **options)
    saved = family.is_saved(source.config)
    with torch.device("meta"):
        model = family.saved_class(source.config) if saved else family.describe(source, resolved)
    model.newly_initialized = () if saved else family.newly_initialized(resolved)
    return model


def check_options(name_or_path: str, **options: Any) -> None:
    """Raise the UserError of :func:`load_model` for a missing base or an option that does not apply to it."""
    source, family, resolved = _resolve(find_source(name_or_path), **options)
    if "vision" in family.options and not family.is_saved(source.config):
        resolved.check_tower()


def _resolve(source: Source, fusion: str = "concat", **others: Any) -> tuple[Source, Family, LoadOptions]:
    """Find the family, check the options against the base and fill in their defaults."""
    family = find_family(source.config, source.name)
    is_default = fusion in ("concat", getattr(source.config, "fusion", None))
    accepted = () if family.is_saved(source.config) else family.options
    for option, value in {"fusion": None if is_default else fusion, **others}.items():
        if option not in REJECTIONS:
            raise TypeError(f'There is no option "{option}".')
        choices = {"fusion": FUSIONS, "projector": PROJECTORS}.get(option)
        if value is not None and choices and value not in choices:
            raise UserError(f'{option} "{value}" is not available. Choose {" or ".join(choices)}.')
        if value is not None and option not in accepted:
            raise UserError(
                f"{option} = {value} does not apply to {source.name}: {REJECTIONS[option]}. Leave {option} out."
            )
    vision = (source.preset.vision if source.preset else None) or DEFAULT_VISION
    defaults: dict[str, Any] = {"vision": vision, "vision_layer": -2, "projector": "mlp2x_gelu", "template": None}
    chosen = {option: value for option, value in others.items() if value not in (None, "")}
    resolved = {"fusion": fusion, **defaults, **chosen}
    if resolved["vision"] == TEXT_ONLY:
        resolved["vision"] = None
        for name in ("vision_layer", "projector", *(["fusion"] if fusion != "concat" else [])):
            if name == "fusion" or name in chosen:
                raise UserError(f"{name} does not apply to a text-only base (vision none). Leave {name} out.")
    return source, family, LoadOptions(**resolved)


def find_source(name: str, *, offline: bool = False) -> Source:
    """Find a base and read its configuration; if ``offline`` from the preset's architecture, where there is one."""
    check_model(name)
    preset = presets().get(name)
    base = base_of(name)
    if offline and preset and preset.architecture:
        return Source(name, base, AutoConfig.for_model(**preset.architecture), preset)
    path = Path(base).resolve()
    if file := find_gguf(path):
        return Source(name, str(file.parent), gguf_config(file), preset, file)
    if path.is_dir() and not (path / "config.json").is_file():
        raise UserError(
            f"{base}: no config.json and no GGUF file in this directory. Give one written by save_pretrained."
        )
    try:
        if path.is_dir():
            with reading("config.json"):
                _ = {**json.loads((path / "config.json").read_bytes())}
        families()  # their modules register the configurations of our saved models with AutoConfig
        config = AutoConfig.from_pretrained(base, trust_remote_code=False)
    except (OSError, ValueError, ImportError, AttributeError, TypeError) as error:  # the last two: JSON, no object
        raise loading_error(name, base, error) from None
    return Source(name, str(path) if path.is_dir() else base, config, preset)


def loading_error(name: str, base: str, error: BaseException) -> UserError:
    """Build the error for a base that transformers cannot load: the reason, the missing files and how to get them."""
    reason = first_line(error)
    if isinstance(error, ImportError):
        return UserError(f"{name}: a package that the model needs is missing: {reason} Run: {install_command(error)}")
    if Path(base).is_dir():
        return UserError(f"{name}: the model cannot be loaded: {reason}")
    missing = missing_files(base)
    not_cached = f" Not in the local cache: {', '.join(missing)}." if missing else ""
    return UserError(
        f'The model "{name}" cannot be loaded: {reason}{not_cached} '
        f"On a machine without network access, download it beforehand: hf download {base}"
    )


def install_command(error: ImportError) -> str:
    """Return the command that installs the package which transformers or Python misses."""
    package = error.name.partition(".")[0] if isinstance(error, ModuleNotFoundError) and error.name else None
    if found := re.search(r"pip install (?:-\S+ )*([\w.-]+)|requires the ([\w.-]+) library", str(error)):
        package = next(filter(None, found.groups())).lower()
    return f"pip install {package or 'PACKAGE'}"


def missing_files(repository: str) -> list[str]:
    """Return the files of a hub repository that loading needs and the local cache lacks, as far as known."""

    def cached(name: str) -> str | None:
        try:
            found = try_to_load_from_cache(repository, name)
        except ValueError:  # not a valid repository name
            return None
        return found if isinstance(found, str) else None

    missing = [] if cached("config.json") else ["config.json"]
    if not any(map(cached, ("tokenizer.json", "tokenizer.model", "spiece.model", "vocab.json"))):
        missing.append("tokenizer.json")
    weights = [WEIGHTS]
    if index := cached(WEIGHTS_INDEX):
        weights = sorted(set(json.loads(Path(index).read_text(encoding="utf-8"))["weight_map"].values()))
    return missing + [name for name in weights if not cached(name)]
