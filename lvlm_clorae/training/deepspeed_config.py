"""The DeepSpeed file: read, its "auto" values filled from the run's configuration, contradictions refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from lvlm_clorae.errors import UserError
from lvlm_clorae.training.config import DEEPSPEED_SECTION, TrainConfig

AUTO = "auto"
_DEEPSPEEDS = {
    "zero_optimization": (
        *("reduce_bucket_size", "allgather_bucket_size"),
        *("stage3_prefetch_bucket_size", "stage3_param_persistence_threshold"),
    ),
    "optimizer.params": ("betas", "eps"),
}
"""What files for transformers' Trainer leave "auto" and DeepSpeed has good defaults for."""


def read_deepspeed_file(path: Path) -> dict[str, Any]:
    """The file's content. Raises UserError where it is missing, not JSON, or not an object."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: no such DeepSpeed file. The repository has some in ds_configs/.") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: the DeepSpeed file cannot be read ({error}).") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: the DeepSpeed file is not valid JSON ({error}).") from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: the DeepSpeed file must hold a JSON object.")
    return content


def resolve(content: dict[str, Any], config: TrainConfig, world_size: int, bf16: bool, where: str) -> dict[str, Any]:
    """The content with every "auto" replaced.

    Raises:
        UserError: a value that contradicts the run's own, an unsupported ZeRO stage, fp16, a learning-rate scheduler,
            an optimizer state on NVMe, an unknown "auto", a section that is no object.
    """
    wanted: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": config.micro_batch,
        "gradient_accumulation_steps": config.accumulation,
        "train_batch_size": config.micro_batch * config.accumulation * world_size,
        "gradient_clipping": config.gradient_clipping,
    }
    sources = {
        "train_micro_batch_size_per_gpu": "micro_batch",
        "gradient_accumulation_steps": "accumulation",
        "train_batch_size": f"micro_batch x accumulation x {world_size} ranks",
        "gradient_clipping": "gradient_clipping",
    }
    resolved = json.loads(json.dumps(content))
    for section in ("zero_optimization", "bf16", "fp16", "optimizer", DEEPSPEED_SECTION):
        if not isinstance(resolved.get(section, {}), dict):
            raise UserError(f'{where}: "{section}" is {json.dumps(resolved[section])}, but must be a JSON object.')
    resolved.pop(DEEPSPEED_SECTION, None)
    if "scheduler" in resolved:
        raise UserError(
            f'{where}: "scheduler" contradicts the setting schedule = {config.schedule}. Remove it from the file.'
        )
    for key, value in wanted.items():
        found = resolved.get(key, AUTO)
        if found != AUTO and found != value:
            raise UserError(
                f'{where}: "{key}" is {found}, but the run has {sources[key]} = {value}. '
                'Set it to "auto", or make them equal.'
            )
        resolved[key] = value
    zero = resolved.setdefault("zero_optimization", {})
    stage = zero.setdefault("stage", 1)
    if stage not in (1, 2, 3):
        why = (
            "keeps the optimizer state whole on every rank; stage 1 computes the same"
            if stage == 0
            else "does not exist"
        )
        raise UserError(f'{where}: ZeRO stage {stage!r} {why}. Set "stage" to 1, 2 or 3.')
    offload = zero.get("offload_optimizer")
    if isinstance(offload, dict) and offload.get("device") == "nvme":
        raise UserError(
            f'{where}: "offload_optimizer" to nvme is not supported: what is trained is small. Set "device" to "cpu".'
        )
    if resolved.get("fp16", {}).get("enabled") == AUTO:
        resolved["fp16"]["enabled"] = False
    if resolved.get("fp16", {}).get("enabled"):
        raise UserError(f'{where}: fp16 overflows in T5. Use "bf16": {{"enabled": "auto"}}, or fp32.')
    precision = resolved.setdefault("bf16", {}).get("enabled", AUTO)
    if precision != AUTO and precision != bf16:
        raise UserError(
            f'{where}: "bf16.enabled" is {json.dumps(precision)}, but the run computes in '
            f'{"bf16" if bf16 else "fp32"}. Set it to "auto", or set --precision.'
        )
    resolved["bf16"]["enabled"] = bf16
    parameters = resolved.get("optimizer", {}).get("params", {})
    for key, value in (("lr", config.learning_rate), ("weight_decay", config.weight_decay)):
        if parameters.get(key) == AUTO:
            parameters[key] = value
    for section, found in (("zero_optimization", zero), ("optimizer.params", parameters)):
        for key in _DEEPSPEEDS[section]:
            if found.get(key) == AUTO:
                del found[key]
    left = [key for key, value in _leaves(resolved) if value == AUTO]
    if left:
        raise UserError(f'{where}: "auto" is not known for {", ".join(left)}. Give a value.')
    return resolved


def _leaves(content: dict[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    found = []
    for key, value in content.items():
        if isinstance(value, dict):
            found += _leaves(value, f"{prefix}{key}.")
        else:
            found.append((prefix + key, value))
    return found
