"""Configuration of a run: a dataclass for each group of settings, with type, range and help of a setting in one place.

Each setting is a field, a flag and a key of a YAML file of the same name (``lvlm_clorae/training/config_loading.py``).
"""

from __future__ import annotations

import dataclasses
from typing import Annotated, Any, Literal

import yaml
from annotated_types import Ge, Gt, Lt
from pydantic import AfterValidator, ConfigDict, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt
from pydantic.dataclasses import dataclass

from lvlm_clorae.adapters.register import method_names
from lvlm_clorae.errors import nearest

Fraction = Annotated[float, Ge(0), Lt(1)]
Seed = Annotated[int, Ge(0), Lt(1 << 63)]
WITHOUT_ADAPTER = ("full", "none")
"""Values of ``adapter`` that are not adapter methods."""
_CHECKED = ConfigDict(extra="forbid", allow_inf_nan=False)


def _known_adapter(name: str) -> str:
    names = [*method_names(), *WITHOUT_ADAPTER]
    if name not in names:
        raise ValueError(f'There is no adapter method "{name}".{nearest(name, names)}')
    return name


def setting(default: Any, help: str, *, may_change: bool = False) -> Any:
    """Declare a field with the help text of its flag; a resumed run may have another value if ``may_change``."""
    metadata = {"help": help, "may_change": may_change}
    if isinstance(default, list):
        return dataclasses.field(default_factory=lambda: list(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


@dataclass(frozen=True, config=_CHECKED)
class ModelArguments:
    """Base model."""

    model: str = setting("demo", "preset, local directory or hub id of the base model")
    vision: str | None = setting(None, "open_clip model:tag of the vision tower for a base without one, or none")
    vision_layer: int | None = setting(None, "block of the vision tower whose patch features are used (-2)")
    projector: Literal["linear", "mlp2x_gelu"] | None = setting(None, "projector for a base without one (mlp2x_gelu)")
    fusion: Literal["concat", "gated"] = setting(
        "concat", "fusion of image and text in T5: image tokens first, or UMIE's gate"
    )
    template: str | None = setting(None, "template of a causal language model, with {image}, {prompt} and {answer}")
    load_in_8bit: bool = setting(False, "load the frozen language model in 8 bits (LLM.int8, bitsandbytes)")
    load_in_4bit: bool = setting(False, "load the frozen language model in 4 bits (nf4, bitsandbytes)")
    gradient_checkpointing: bool = setting(False, "recompute activations in backward to save memory", may_change=True)
    bf16: Literal["auto"] | bool = setting("auto", "bf16 precision instead of fp32; auto: on GPUs that support it")
    max_source_length: PositiveInt = setting(256, "maximum length of a prompt [tokens]")
    max_target_length: PositiveInt = setting(128, "maximum length of an answer, in training and generation [tokens]")

    def architecture_options(self) -> dict[str, Any]:
        """Return the settings that decide the shape of the base, as arguments of ``load_model``."""
        return {name: getattr(self, name) for name in ("fusion", "vision", "vision_layer", "projector")}

    def load_options(self) -> dict[str, Any]:
        """Return all arguments of ``load_model`` except name and dtype."""
        names = ("template", "load_in_8bit", "load_in_4bit")
        return self.architecture_options() | {name: getattr(self, name) for name in names}


@dataclass(frozen=True, config=_CHECKED)
class AdapterArguments:
    """Adapter."""

    adapter: Annotated[str, AfterValidator(_known_adapter)] = setting(
        "clorae", "fine-tuning method: clorae, lora, moslora, loramoe, full, or none to evaluate the base model"
    )
    lora_rank: PositiveInt = setting(64, "rank of the universal expert, of LoRA and of MoSLoRA")
    lora_expert_rank: PositiveInt | None = setting(None, "rank of a task (lora_rank / tasks) or LoRAMoE expert")
    lora_alpha: PositiveFloat | None = setting(
        None, "experts are scaled by lora_alpha / lora_rank (2 x lora_rank, times the number of gated experts)"
    )
    lora_dropout: Fraction = setting(0.1, "dropout on the input of the experts")
    target_modules: list[str] = setting([], "names of the linear layers to adapt (attention query and value)")
    use_universal: bool = setting(True, "universal expert (ablation)")
    use_experts: bool = setting(True, "task experts (ablation)")
    use_gate: bool = setting(True, "token gate (ablation)")
    train_projector: bool = setting(True, "train the visual projector together with the adapter")


@dataclass(frozen=True, config=_CHECKED)
class DataArguments:
    """Data."""

    shards: str = setting(
        "shards/demo", "directory or URL of shards with an index.json, or a pipe: command; braces expand to several"
    )
    cache_dir: str | None = setting(None, "local directory in which remote shards are cached", may_change=True)
    cache_gib: PositiveFloat = setting(50.0, "maximum size of cache_dir [GiB]", may_change=True)
    per_device_train_batch_size: PositiveInt = setting(4, "samples per rank and micro-step", may_change=True)
    gradient_accumulation_steps: PositiveInt = setting(1, "micro-steps per optimizer step", may_change=True)
    global_micro_batch: PositiveInt | None = setting(
        None, "consecutive samples of a dataset task (batch size x ranks)", may_change=True
    )
    interleave: Literal["proportional", "balanced", "temperature"] = setting(
        "proportional", "how often each dataset task is sampled"
    )
    interleave_temperature: Annotated[float, Ge(1)] = setting(2.0, "temperature of sampling; 1 is proportional")
    on_invalid_sample: Literal["error", "skip", "blank"] = setting(
        "error", "handling of invalid samples", may_change=True
    )
    hold_out: list[str] = setting([], "datasets that are tested but not trained on (Table 4)")
    dataloader_num_workers: NonNegativeInt = setting(0, "data loading processes per rank; 0: none", may_change=True)


@dataclass(frozen=True, config=_CHECKED)
class LossArguments:
    """Loss."""

    beta: NonNegativeFloat = setting(
        0.01, "weight of the mutual-information loss, or of LoRAMoE's balance loss; 0 disables it (ablation)"
    )
    achievement: bool = setting(True, "weight datasets by their achievement (ablation)")
    gamma: PositiveFloat = setting(2.0, "exponent of the achievement loss")
    margin: Annotated[float, Gt(1)] = setting(1.05, "margin on the reference F1")
    normalize: Literal["softmax", "sum", "none"] = setting("softmax", "normalization of the achievement weights")
    ema: Fraction | None = setting(None, "decay of the moving average of dev F1 (none; Yun and Cho: 0.9)")
    reference_f1: list[str] = setting([], "dataset/sub-task=F1 [percent], instead of the reference F1 of the index")


@dataclass(frozen=True, config=_CHECKED)
class OptimizationArguments:
    """Optimization."""

    num_train_epochs: PositiveInt = setting(20, "passes over all training samples")
    max_steps: PositiveInt | None = setting(None, "maximum number of optimizer steps")
    learning_rate: PositiveFloat = setting(1e-4, "peak learning rate of AdamW")
    weight_decay: NonNegativeFloat = setting(0.0, "decoupled weight decay")
    lr_scheduler_type: Literal["constant", "linear", "cosine", "step"] = setting("step", "schedule after warm-up")
    step_epochs: PositiveInt = setting(5, "epochs between halvings of the step schedule")
    warmup_ratio: Fraction = setting(0.03, "fraction of all steps for linear warm-up")
    max_grad_norm: NonNegativeFloat = setting(1.0, "maximum gradient norm; 0 disables clipping")
    on_nonfinite_loss: Literal["stop", "skip"] = setting(
        "stop", "how to handle a step whose loss or gradient is not finite", may_change=True
    )
    seed: Seed = setting(0, "seed of initialization, sampling and dropout")


@dataclass(frozen=True, config=_CHECKED)
class EvaluationArguments:
    """Evaluation."""

    per_device_eval_batch_size: PositiveInt = setting(16, "samples per rank in generation", may_change=True)
    match: Literal["exact", "offset", "umie"] = setting("exact", "criterion of matching tuples (docs/scoring.md)")
    early_stopping_patience: PositiveInt | None = setting(
        None, "evaluations without a higher All before the end (never)"
    )
    eval_every_epochs: PositiveInt = setting(1, "epochs between evaluations on dev")
    constrained: bool = setting(False, "constrain answers to label names, words of the text, objects and separators")


@dataclass(frozen=True, config=_CHECKED)
class RunArguments:
    """Run."""

    output_dir: str | None = setting(None, "run directory (runs/<model>-<adapter>, numbered)", may_change=True)
    resume_from_checkpoint: Literal["auto"] | None = setting(
        None, "auto: from the newest checkpoint, if any", may_change=True
    )
    save_steps: PositiveInt = setting(500, "optimizer steps between checkpoints", may_change=True)
    save_total_limit: PositiveInt = setting(2, "number of checkpoints to keep", may_change=True)
    ddp_timeout: PositiveFloat = setting(600.0, "timeout of a collective operation [s]", may_change=True)
    logging_steps: PositiveInt = setting(10, "optimizer steps between log lines and records", may_change=True)
    log_conflicts: NonNegativeInt = setting(
        0, "optimizer steps between measurements of gradient conflict between datasets; 0: never", may_change=True
    )
    deepspeed: str = setting("ds_configs/zero2.json", "DeepSpeed configuration file", may_change=True)


@dataclass(frozen=True, config=_CHECKED)
class TrainConfig(  # dataclasses collect fields from the last base to the first
    RunArguments,
    EvaluationArguments,
    OptimizationArguments,
    LossArguments,
    DataArguments,
    AdapterArguments,
    ModelArguments,
):
    """All settings of a run. Defaults are the paper's (section 4) where it states them.

    Functions that read one group only take that group, of which a ``TrainConfig`` is an instance.

    Raises:
        pydantic.ValidationError: a value of another type or out of range
    """

    def to_yaml(self) -> str:
        """Return the configuration as YAML that ``--config`` reads."""
        return yaml.safe_dump(dataclasses.asdict(self), sort_keys=False)


GROUPS: tuple[type, ...] = TrainConfig.__bases__[::-1]
"""The groups of settings."""
FIELDS: dict[str, dataclasses.Field[Any]] = {item.name: item for item in dataclasses.fields(TrainConfig)}
"""The settings by name, in the order of the groups."""
MAY_CHANGE = frozenset(name for name, item in FIELDS.items() if item.metadata["may_change"])
"""Settings that may differ between a run and its resumption; the others decide the result."""
