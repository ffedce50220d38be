"""Configuration of a run: a dataclass for each group of settings, with type, range and help of a setting in one place.

Each setting is a field, a flag and a key of a YAML file of the same name (``lvlm_clorae/training/config_loading.py``).
"""

from __future__ import annotations

import dataclasses
from typing import Annotated, Any, Literal

import yaml
from annotated_types import Ge, Gt, Le, Lt
from pydantic import AfterValidator, ConfigDict, NonNegativeFloat, PositiveFloat
from pydantic.dataclasses import dataclass

from lvlm_clorae.adapters.register import method_names
from lvlm_clorae.errors import nearest
from lvlm_clorae.models.presets import presets

Count = Annotated[int, Ge(1), Le(10**9)]
Fraction = Annotated[float, Ge(0), Lt(1)]
Size = Annotated[float, Gt(0), Le(10**9)]
Workers = Annotated[int, Ge(0), Le(1024)]
Natural = Annotated[int, Ge(0), Le((1 << 63) - 1)]
PROJECTOR = "projector"
"""Value of ``adapter`` that trains the projector alone, on captions."""
WITHOUT_ADAPTER = ("full", "none", PROJECTOR)
"""Values of ``adapter`` that are not adapter methods."""
_CHECKED = ConfigDict(extra="forbid", allow_inf_nan=False)


def _known_adapter(name: str) -> str:
    if name not in (names := [*method_names(), *WITHOUT_ADAPTER]):
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

    model: str = setting("demo", f"base model: preset ({', '.join(presets())}), local directory, GGUF file or hub id")
    vision: str | None = setting(
        None, "vision tower, if the base has none: open_clip model:tag or directory; none: text only"
    )
    vision_layer: int | None = setting(None, "block of the vision tower whose patch features are used (-2)")
    projector: Literal["linear", "mlp2x_gelu"] | None = setting(None, "projector for a base without one (mlp2x_gelu)")
    fusion: Literal["concat", "gated"] = setting("concat", "fusion in T5: image tokens before the text, or UMIE's gate")
    template: str | None = setting(None, "template of a causal language model, with {image}, {prompt} and {answer}")
    load_in_8bit: bool = setting(False, "load the frozen language model in 8 bits (LLM.int8, bitsandbytes)")
    load_in_4bit: bool = setting(False, "load the frozen language model in 4 bits (nf4, bitsandbytes)")
    gradient_checkpointing: bool = setting(False, "recompute activations in backward to save memory", may_change=True)
    padding_free: bool = setting(
        True, "compute no padding, and the prompts' common beginning once (causal models)", may_change=True
    )
    torch_compile: bool = setting(False, "compile the language model with torch.compile in training", may_change=True)
    bf16: Literal["auto"] | bool = setting(
        "auto", "bf16 precision instead of fp32; auto: where it is faster (GPUs, CPUs with AMX)", may_change=True
    )
    max_source_length: Count = setting(512, "maximum length of a prompt [tokens]")
    max_target_length: Count = setting(128, "maximum length of an answer, in training and generation [tokens]")

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
        "clorae", "method; none evaluates the base model, projector is `lvlm-clorae align`"
    )
    lora_rank: Count = setting(64, "rank of the universal expert, of LoRA and of MoSLoRA")
    lora_expert_rank: Count | None = setting(None, "rank of a task (lora_rank / tasks) or LoRAMoE expert")
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
    cache_gib: Size = setting(50.0, "maximum size of cache_dir [GiB]", may_change=True)
    verify_shards: bool = setting(False, "compare local shards with the SHA-256 of their index first", may_change=True)
    per_device_train_batch_size: Count = setting(4, "samples per rank and micro-step", may_change=True)
    gradient_accumulation_steps: Count = setting(1, "micro-steps per optimizer step", may_change=True)
    global_micro_batch: Count | None = setting(
        None, "consecutive samples of a dataset task (batch size x ranks)", may_change=True
    )
    interleave: Literal["proportional", "balanced", "temperature"] = setting("proportional", "shares of dataset tasks")
    interleave_temperature: Annotated[float, Ge(1)] = setting(2.0, "temperature of sampling; 1 is proportional")
    on_invalid_sample: Literal["error", "skip", "blank"] = setting(
        "error", "handling of invalid samples", may_change=True
    )
    on_truncation: Literal["cut", "skip", "error"] = setting(
        "cut", "handling of samples beyond max_source_length or max_target_length"
    )
    hold_out: list[str] = setting([], "datasets that are tested but not trained on (Table 4)")
    dataloader_num_workers: Workers = setting(0, "data loading processes per rank; 0: none", may_change=True)


@dataclass(frozen=True, config=_CHECKED)
class LossArguments:
    """Loss."""

    beta: NonNegativeFloat = setting(0.01, "weight of the mutual-information or LoRAMoE's balance loss; 0: none")
    loss_weighting: Literal["achievement", "coba", "none"] = setting(
        "achievement", "weights of dataset tasks by dev F1 (achievement) or convergence of the dev loss (coba)"
    )
    gamma: PositiveFloat = setting(2.0, "exponent of the achievement loss")
    margin: Annotated[float, Gt(1)] = setting(1.05, "margin on the reference F1")
    normalize: Literal["softmax", "sum", "none"] = setting("softmax", "normalization of the achievement weights")
    ema: Fraction | None = setting(None, "decay of the moving average of dev F1 (none; Yun and Cho: 0.9)")
    reference_f1: list[str] = setting([], "dataset/sub-task=F1 [percent], instead of the reference F1 of the index")
    coba_update_interval: Count = setting(10, "optimizer steps between CoBa's measurements of the dev loss")
    coba_warmup_steps: Count = setting(100, "optimizer steps before CoBa changes the weights")
    coba_history_length: Annotated[Count, Ge(2)] = setting(50, "last measurements to which CoBa fits a slope")
    coba_tau: PositiveFloat = setting(5.0, "sharpness of CoBa's divergence factor")


@dataclass(frozen=True, config=_CHECKED)
class OptimizationArguments:
    """Optimization."""

    num_train_epochs: Count = setting(20, "passes over all training samples")
    max_steps: Count | None = setting(None, "maximum optimizer steps; num_train_epochs holds too")
    learning_rate: PositiveFloat = setting(1e-4, "peak learning rate of AdamW")
    weight_decay: NonNegativeFloat = setting(0.0, "decoupled weight decay")
    lr_scheduler_type: Literal["constant", "linear", "cosine", "step"] = setting("step", "schedule after warm-up")
    step_epochs: Count = setting(5, "epochs between halvings of the step schedule")
    warmup_ratio: Fraction = setting(0.03, "fraction of all steps for linear warm-up")
    max_grad_norm: NonNegativeFloat = setting(1.0, "maximum gradient norm; 0 disables clipping")
    on_nonfinite_loss: Literal["stop", "skip"] = setting("stop", "at a non-finite loss or gradient", may_change=True)
    seed: Natural = setting(0, "seed of initialization, sampling and dropout")


@dataclass(frozen=True, config=_CHECKED)
class EvaluationArguments:
    """Evaluation."""

    per_device_eval_batch_size: Count = setting(16, "samples per rank in generation", may_change=True)
    match: Literal["exact", "offset", "strict", "umie"] = setting(
        "exact", "criterion of matching tuples (docs/scoring.md)"
    )
    early_stopping_patience: Count | None = setting(None, "evaluations without a higher All before the end (never)")
    eval_every_epochs: Count = setting(1, "epochs between evaluations on dev")
    constrained: bool = setting(False, "constrain answers to label names, words of the text, objects and separators")


@dataclass(frozen=True, config=_CHECKED)
class RunArguments:
    """Run."""

    output_dir: str | None = setting(None, "run directory (runs/<model>-<adapter>, numbered)", may_change=True)
    resume_from_checkpoint: str | None = setting(None, "auto: the newest; or RUN/checkpoints/step-...", may_change=True)
    save_steps: Count = setting(500, "optimizer steps between checkpoints", may_change=True)
    save_total_limit: Count = setting(2, "number of checkpoints to keep", may_change=True)
    ddp_timeout: Size = setting(600.0, "timeout of a collective operation [s]", may_change=True)
    logging_steps: Count = setting(10, "optimizer steps between log lines and records", may_change=True)
    log_conflicts: Natural = setting(0, "steps between measurements of gradient conflict; 0: never", may_change=True)
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
