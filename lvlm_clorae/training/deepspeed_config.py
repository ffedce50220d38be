"""The DeepSpeed file: fill in "auto" values from the run's configuration and reject contradictions."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from lvlm_clorae.errors import UserError, first_line, nearest
from lvlm_clorae.files import parse_json, unique
from lvlm_clorae.training.config import TrainConfig

DEEPSPEED_SECTION = "lvlm_clorae"
"""Section of a DeepSpeed file with settings of a run."""
DEEPSPEED_FILES = Path(__file__).parents[1] / "ds_configs"
AUTO = "auto"
# Keys whose "auto" (written for transformers' Trainer) is dropped in favour of DeepSpeed's default.
_ZERO_DEFAULTS = frozenset(
    "reduce_bucket_size allgather_bucket_size stage3_prefetch_bucket_size stage3_param_persistence_threshold".split()
)
_OPTIMIZER_DEFAULTS = frozenset({"betas", "eps"})
_KEYS = frozenset(
    """
    activation_checkpointing aio amp autotuning bf16 bf16_master_weights_and_grads bf16_optimizer_states
    bfloat16 checkpoint comet comms_logger communication_data_type compile compression_training csv_monitor
    curriculum_learning data_efficiency data_types dataloader_drop_last disable_allgather disable_python_gc
    dump_state eigenvalue elasticity expert_parallel flops_profiler fp16 gradient_accumulation_steps
    gradient_allreduce_op gradient_clipping gradient_predivide_factor graph_harvesting hybrid_engine
    load_universal log_level managed_gradient_accumulation memory_breakdown nebula optimizer pipeline
    prescale_gradients progressive_layer_drop quantize_training scheduler seq_parallel_communication_data_type
    sparse_attention sparse_gradients steps_per_print tensor_parallel tensorboard timers torch_autocast
    train_batch_size train_micro_batch_size_per_gpu use_data_before_expert_parallelism use_node_local_storage
    vocabulary_size wall_clock_breakdown wandb weight_quantization zero_allow_untested_optimizer
    zero_force_ds_cpu_optimizer zero_optimization
    """.split()
)
"""Sections and settings of a DeepSpeed file, which ignores others."""


def find_deepspeed_file(name: str) -> Path:
    """Return the path of a DeepSpeed file, given as a path or as the name of a packaged file, such as ``zero2``."""
    path = Path(name)
    packaged = DEEPSPEED_FILES / f"{path.stem}.json"
    by_name = name in (path.stem, f"ds_configs/{path.stem}.json")
    return packaged if by_name and not path.is_file() and packaged.is_file() else path


def deepspeed_settings(path: Path) -> dict[str, Any]:
    """Return the settings in a DeepSpeed file. Raises UserError also if its section is not an object of settings."""
    section = read_deepspeed_file(path).get(DEEPSPEED_SECTION, {})
    if not isinstance(section, dict) or "deepspeed" in section:
        raise UserError(f'{path}: "{DEEPSPEED_SECTION}" must be a JSON object of settings, without "deepspeed".')
    try:
        return unique([(key.replace("-", "_"), value) for key, value in section.items()])
    except ValueError as error:
        raise UserError(f"{path}: {error}.") from None


def read_deepspeed_file(path: Path) -> dict[str, Any]:
    """Read a DeepSpeed file. Raises UserError if it is missing, not JSON, or not an object."""
    try:
        content = parse_json(path.read_bytes())
    except FileNotFoundError:
        names = ", ".join(sorted(file.stem for file in DEEPSPEED_FILES.glob("*.json")))
        raise UserError(f"{path}: no such DeepSpeed file. Give a path or a packaged one: {names}.") from None
    except OSError as error:
        raise UserError(f"{path}: the DeepSpeed file cannot be read ({error}).") from None
    except ValueError as error:
        raise UserError(f"{path}: the DeepSpeed file is not valid JSON ({error}).") from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: the DeepSpeed file must hold a JSON object.")
    if unknown := sorted(content.keys() - _KEYS - {DEEPSPEED_SECTION}):
        hint = nearest(unknown[0], _KEYS)
        raise UserError(f'{path}: "{unknown[0]}" is no setting of DeepSpeed, which would ignore it.{hint}')
    return content


def resolve(content: dict[str, Any], config: TrainConfig, world_size: int, bf16: bool, where: str) -> dict[str, Any]:
    """Replace every "auto". Raises UserError if a value of the file ``where`` contradicts the run or is unsupported."""
    resolved: dict[str, Any] = json.loads(json.dumps(content))
    for section in ("zero_optimization", "bf16", "fp16", "optimizer"):
        if not isinstance(resolved.get(section, {}), dict):
            raise UserError(f'{where}: "{section}" is {json.dumps(resolved[section])}, but must be a JSON object.')
    resolved.pop(DEEPSPEED_SECTION, None)
    if "scheduler" in resolved:
        raise UserError(
            f'{where}: "scheduler" contradicts lr_scheduler_type = {config.lr_scheduler_type}. Remove it from the file.'
        )
    _fill_batch_sizes(resolved, config, world_size, where)
    _fill_zero(resolved.setdefault("zero_optimization", {}), where)
    _fill_precision(resolved, bf16, where)
    _fill_optimizer(resolved.get("optimizer", {}), config, bool(resolved.get("zero_allow_untested_optimizer")), where)
    if unknown := list(_auto_keys(resolved)):
        raise UserError(f'{where}: "auto" is not known for {", ".join(unknown)}. Give a value.')
    return resolved


def _fill_batch_sizes(resolved: dict[str, Any], config: TrainConfig, world_size: int, where: str) -> None:
    total = config.per_device_train_batch_size * config.gradient_accumulation_steps * world_size
    for key, source, value in (
        ("train_micro_batch_size_per_gpu", "per_device_train_batch_size", config.per_device_train_batch_size),
        ("gradient_accumulation_steps", "gradient_accumulation_steps", config.gradient_accumulation_steps),
        ("train_batch_size", f"per_device_train_batch_size x gradient_accumulation_steps x {world_size}", total),
        ("gradient_clipping", "max_grad_norm", config.max_grad_norm),
    ):
        found = resolved.get(key, AUTO)
        if found not in (AUTO, value):
            raise UserError(
                f'{where}: "{key}" is {found}, but the run has {source} = {value}. '
                'Set it to "auto", or make them equal.'
            )
        resolved[key] = value


def _fill_zero(zero: dict[str, Any], where: str) -> None:
    stage = zero.setdefault("stage", 1)
    if stage not in (1, 2, 3):
        why = "keeps the whole optimizer state on every rank; stage 1 computes the same"
        raise UserError(f'{where}: ZeRO stage {stage!r} {why if stage == 0 else "does not exist"}. Set "stage" to 1-3.')
    offload = zero.get("offload_optimizer")
    if isinstance(offload, dict) and offload.get("device") == "nvme":
        raise UserError(f'{where}: "offload_optimizer" to nvme is not supported. Set "device" to "cpu".')
    _drop_auto(zero, _ZERO_DEFAULTS)


def _fill_precision(resolved: dict[str, Any], bf16: bool, where: str) -> None:
    fp16 = resolved.get("fp16", {})
    if fp16.get("enabled") == AUTO:
        fp16["enabled"] = False
    if fp16.get("enabled"):
        raise UserError(f'{where}: fp16 overflows in T5. Use "bf16": {{"enabled": "auto"}}, or fp32.')
    enabled = resolved.setdefault("bf16", {}).get("enabled", AUTO)
    if enabled not in (AUTO, bf16):
        raise UserError(
            f'{where}: "bf16.enabled" is {json.dumps(enabled)}, but the run computes in '
            f'{"bf16" if bf16 else "fp32"}. Set it to "auto", or set --bf16.'
        )
    resolved["bf16"]["enabled"] = bf16


def _fill_optimizer(optimizer: dict[str, Any], config: TrainConfig, any_type: bool, where: str) -> None:
    name, parameters = optimizer.get("type", "AdamW"), optimizer.get("params", {})
    if not (any_type or str(name).lower() in ("adam", "adamw")):
        raise UserError(
            f'{where}: "optimizer.type" is {json.dumps(name)}, which ZeRO does not support. Set it to "AdamW".'
        )
    if not isinstance(parameters, dict):
        raise UserError(f'{where}: "optimizer.params" is {json.dumps(parameters)}, but must be a JSON object.')
    for key, source in (("lr", "learning_rate"), ("weight_decay", "weight_decay")):
        value = getattr(config, source)
        if parameters.get(key, AUTO) not in (AUTO, value):
            raise UserError(
                f'{where}: "optimizer.params.{key}" is {parameters[key]}, but the run has {source} = {value}. '
                'Set it to "auto", or make them equal.'
            )
        if key in parameters:
            parameters[key] = value
    _drop_auto(parameters, _OPTIMIZER_DEFAULTS)


def check_sections(resolved: dict[str, Any], where: str) -> None:
    """Raise UserError if DeepSpeed refuses the section ``zero_optimization``. Imports DeepSpeed."""
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    try:
        DeepSpeedZeroConfig(**resolved["zero_optimization"])
    except ValidationError as error:
        found = error.errors(include_url=False)[0]
        name = ".".join(["zero_optimization", *map(str, found["loc"])])
        raise UserError(f'{where}: "{name}": {first_line(found["msg"])}. Correct or remove it.') from None


def _drop_auto(section: dict[str, Any], keys: frozenset[str]) -> None:
    for key in [key for key in section if key in keys and section[key] == AUTO]:
        del section[key]


def _auto_keys(content: dict[str, Any], prefix: str = "") -> Iterator[str]:
    for key, value in content.items():
        if isinstance(value, dict):
            yield from _auto_keys(value, f"{prefix}{key}.")
        elif value == AUTO:
            yield prefix + key
