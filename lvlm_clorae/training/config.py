"""The configuration of a run: one flat dataclass, from defaults, the model preset's recipe, the DeepSpeed file, a YAML
file and flags.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

import yaml

from lvlm_clorae.arguments import Parser
from lvlm_clorae.data.settings import INTERLEAVES, ON_BAD_SAMPLE
from lvlm_clorae.errors import UserError, nearest
from lvlm_clorae.models.presets import preset_recipe
from lvlm_clorae.models.settings import FUSIONS, PROJECTORS
from lvlm_clorae.tasks import MATCHES

CHOICES = ("fusion", "vision", "vision_layer", "projector")
"""Settings that decide the shape of the base, as arguments of ``load_model`` have them too."""
ADAPTERS = ("clorae", "lora", "moslora", "loramoe", "full", "none")


DEEPSPEED_SECTION = "lvlm_clorae"
"""The section of a DeepSpeed file with settings of the run that go with it; those given elsewhere win."""


def option(default: Any, help: str, group: str, choices: tuple[str, ...] = ()) -> Any:
    """A field with its help text and, where only some values are valid, those."""
    metadata = {"help": help, "group": group, "choices": choices}
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass
class TrainConfig:
    """Everything that decides a run. The defaults are the paper's (METHOD 4) where it gives one."""

    model: str = option("demo", "preset, local directory or hub id of the base", "model")
    vision: str | None = option(
        None, "open_clip model:tag of the vision tower for a base without one; a tag may be a weight file", "model"
    )
    vision_layer: int | None = option(
        None, "block of that tower whose patch tokens are taken, default -2, the last but one", "model"
    )
    projector: str | None = option(
        None, "projector for a base without one: linear or mlp2x_gelu (default)", "model", PROJECTORS
    )
    fusion: str = option("concat", "how pictures reach T5: before the text, or UMIE's gate", "model", FUSIONS)
    template: str | None = option(
        None, "conversation of a causal language model, with {image}, {prompt} and {answer}", "model"
    )
    load_in_8bit: bool = option(False, "frozen language model in LLM.int8 (bitsandbytes)", "model")
    load_in_4bit: bool = option(False, "frozen language model in nf4 (bitsandbytes)", "model")
    gradient_checkpointing: bool = option(False, "recompute activations in backward: less memory, more time", "model")
    precision: str = option("auto", "auto: bf16 on a GPU that has it, else fp32", "model", ("auto", "fp32", "bf16"))
    max_length: int = option(256, "tokens of a prompt", "model")
    max_answer_length: int = option(128, "tokens of an answer, in training and generation", "model")

    adapter: str = option("clorae", "what is trained; none evaluates the base as it is", "adapter", ADAPTERS)
    rank: int = option(64, "rank of the universal expert, of LoRA and MoSLoRA", "adapter")
    expert_rank: int | None = option(
        None, "rank of a task expert, default rank / number of tasks; of a LoRAMoE expert", "adapter"
    )
    alpha: float | None = option(
        None,
        "experts are scaled by alpha / rank; default twice the rank, times the experts among which a gate shares",
        "adapter",
    )
    dropout: float = option(0.1, "dropout before the experts", "adapter")
    target_modules: list[str] = option(  # noqa: RUF009 - a field, whose default is a factory
        [], "linear layers to adapt; default: attention query and value", "adapter"
    )
    use_universal: bool = option(True, "the universal expert (ablation)", "adapter")
    use_experts: bool = option(True, "the task experts (ablation)", "adapter")
    use_gate: bool = option(True, "the token gate (ablation)", "adapter")
    mim_tokens: int = option(
        0, "tokens, drawn anew in every layer and micro-step, from which MIM is estimated; 0: all", "adapter"
    )
    train_projector: bool = option(True, "train the visual projector beside the adapter", "adapter")

    shards: str = option(
        "shards/demo", "directory of shards with its index.json, or a URL, or a pipe; braces name several", "data"
    )
    cache_dir: str | None = option(None, "local directory that keeps whole shards of remote places", "data")
    cache_gib: float = option(50.0, "bound of cache_dir in GiB", "data")
    micro_batch: int = option(4, "samples a rank and micro-step", "data")
    accumulation: int = option(1, "micro-steps an optimizer step", "data")
    block: int | None = option(
        None, "samples of one dataset that all ranks read in a row; default micro_batch x ranks", "data"
    )
    interleave: str = option("proportional", "how often datasets come up", "data", INTERLEAVES)
    temperature: float = option(2.0, "of interleave temperature; 1: proportional, the larger the flatter", "data")
    on_bad_sample: str = option("error", "what becomes of a sample that is not sound", "data", ON_BAD_SAMPLE)
    hold_out: list[str] = option(  # noqa: RUF009 - a field, whose default is a factory
        [], "datasets that are not trained on but tested all the same (Table 4)", "data"
    )
    workers: int = option(0, "processes a rank that read and tokenise; 0: none beside it", "data")

    beta: float = option(
        0.01, "weight of the mutual-information loss, of LoRAMoE's balance loss; 0 switches it off (ablation)", "loss"
    )
    achievement: bool = option(True, "weigh datasets by their achievement (ablation)", "loss")
    gamma: float = option(2.0, "exponent of the achievement loss", "loss")
    margin: float = option(1.05, "margin on the reference F1, above 1", "loss")
    normalise: str = option("softmax", "how achievement weights are normalised", "loss", ("softmax", "sum", "none"))
    ema: float | None = option(
        None, "share of the old dev F1 in its moving average (Yun and Cho: 0.9); default: none", "loss"
    )

    reference_f1: list[str] = option(  # noqa: RUF009
        [], "dataset/sub-task=F1 in percent to measure it by, over the index's", "loss"
    )

    epochs: int = option(20, "passes over all training samples", "optimisation")
    max_steps: int | None = option(None, "stop after so many optimizer steps", "optimisation")
    learning_rate: float = option(1e-4, "peak learning rate of Adam", "optimisation")
    weight_decay: float = option(0.0, "decoupled weight decay", "optimisation")
    schedule: str = option(
        "step",
        "after warm-up; step halves it every step_epochs",
        "optimisation",
        ("constant", "linear", "cosine", "step"),
    )
    step_epochs: int = option(5, "epochs between halvings of the step schedule", "optimisation")
    warmup: float = option(0.03, "share of all steps that warms up", "optimisation")
    gradient_clipping: float = option(1.0, "norm to which gradients are clipped; 0: never", "optimisation")
    on_nonfinite: str = option(
        "stop", "what becomes of a step whose loss or gradient is not finite", "optimisation", ("stop", "skip")
    )
    seed: int = option(0, "of initialisation, order and dropout", "optimisation")

    eval_batch: int = option(16, "samples a rank generates for at once", "evaluation")
    match: str = option("exact", "how tuples are matched in scoring (docs/scoring.md)", "evaluation", MATCHES)
    patience: int | None = option(
        None, "evaluations on dev without a better All after which training ends; default: never", "evaluation"
    )
    evaluate_every: int = option(1, "epochs between evaluations on dev", "evaluation")
    constrained: bool = option(
        False, "answers of label names, words of the text, objects and separators alone", "evaluation"
    )

    output: str | None = option(None, "run directory; default runs/<model>-<adapter>, numbered where taken", "run")
    resume: str | None = option(None, "auto: go on from the newest checkpoint of the run", "run", ("auto",))
    checkpoint_every: int = option(500, "optimizer steps between checkpoints; one a epoch besides", "run")
    keep_checkpoints: int = option(2, "checkpoints that are kept", "run")
    collective_timeout: float = option(
        10.0,
        "minutes after which a rank that waits for another gives up; more where one saves or loads for long",
        "run",
    )
    log_every: int = option(10, "optimizer steps between lines of the log and of metrics.jsonl", "run")
    log_conflicts: int = option(
        0, "optimizer steps between measurements of the cosine between the datasets' gradients; 0: never", "run"
    )

    deepspeed: str = option("ds_configs/zero2.json", "DeepSpeed configuration file", "run")

    def to_yaml(self) -> str:
        """The resolved configuration, readable by ``--config``."""
        return yaml.safe_dump(dataclasses.asdict(self), sort_keys=False)


FIELDS = {item.name: item for item in dataclasses.fields(TrainConfig)}
_TYPES = get_type_hints(TrainConfig)
_WORDS = {bool: "true or false", list: "a list of names", int: "a whole number", float: "a number", str: "a text"}


def load_config(argv: list[str] | None = None) -> TrainConfig:
    """The configuration from the command line.

    Raises:
        UserError: an unknown key or flag, a value of another type or not among the choices, an unreadable YAML file.
    """
    flags = vars(_parser().parse_args(argv))
    flags.pop("local_rank", None)
    path = flags.pop("config", None)
    given = {**(_read_settings(Path(path)) if path else {}), **flags}
    return make_config({**_deepspeed_settings(given.get("deepspeed", FIELDS["deepspeed"].default)), **given})


def make_config(given: dict[str, Any]) -> TrainConfig:
    """The configuration of the values given, over the model preset's recipe, over the defaults. Raises UserError."""
    recipe = preset_recipe(str(given.get("model", FIELDS["model"].default)))
    values = {name: _checked(name, value) for name, value in {**recipe, **given}.items()}
    return TrainConfig(**values)


def read_config(path: Path) -> TrainConfig:
    """The configuration of a run directory's ``config.yaml``. Raises UserError as :func:`load_config`."""
    return TrainConfig(**{name: _checked(name, value) for name, value in _read_settings(path).items()})


def _parser() -> Parser:
    parser = Parser(
        prog="train.py",
        description="Fine-tune a vision-language model for multimodal information extraction with C-LoRAE.",
        argument_default=argparse.SUPPRESS,
    )
    parser.add_argument("--config", metavar="FILE", help="YAML file with any of these keys; flags win over it")
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # the deepspeed launcher adds it
    add_settings(parser)
    return parser


def add_settings(parser: Parser, only: tuple[str, ...] = ()) -> None:
    """Give ``parser`` a flag for every setting, of the groups ``only`` where there are some."""
    groups: dict[str, Any] = {}
    for name, item in FIELDS.items():
        title = item.metadata["group"]
        if only and title not in only:
            continue
        if title not in groups:
            groups[title] = parser.add_argument_group(title)
        group = groups[title]
        flag = "--" + name.replace("_", "-")
        text = item.metadata["help"] + ("" if item.default in (None, dataclasses.MISSING) else f" ({item.default})")
        kind = _plain_type(name)
        if kind is bool:
            group.add_argument(flag, action=argparse.BooleanOptionalAction, help=text)
        elif kind is list:
            group.add_argument(flag, nargs="*", metavar="NAME", help=text)
        else:
            metavar = (
                "{" + ",".join(item.metadata["choices"]) + "}" if item.metadata["choices"] else kind.__name__.upper()
            )
            group.add_argument(flag, metavar=metavar, help=text)


def _plain_type(name: str) -> type:
    """The field's type without ``None``, ``list`` for lists."""
    hint = _TYPES[name]
    options = [part for part in get_args(hint) if part is not type(None)]
    if get_origin(hint) is list:
        return list
    return options[0] if options else hint


def _checked(name: str, value: Any) -> Any:
    if name not in FIELDS:
        raise UserError(f'There is no setting "{name}".{nearest(name, FIELDS)}')
    kind, choices = _plain_type(name), FIELDS[name].metadata["choices"]
    if value is None:
        if type(None) in get_args(_TYPES[name]):
            return None
        raise UserError(f"{name} needs a value.")
    wrong = UserError(f'{name}: "{value}" is not {_WORDS[kind]}.')
    if kind is bool or kind is list:
        if not isinstance(value, kind) or (
            isinstance(value, list) and not all(isinstance(item, str) for item in value)
        ):
            raise wrong
        return value
    if isinstance(value, bool | list | dict):
        raise wrong
    try:
        converted = kind(value)
    except (TypeError, ValueError, OverflowError):
        raise wrong from None
    if kind is int and isinstance(value, float) and value != converted:
        raise wrong
    if choices and converted not in choices:
        raise UserError(
            f'{name}: "{value}" is not a choice.{nearest(str(value), choices)} Choices: {", ".join(choices)}.'
        )
    return converted


def _deepspeed_settings(path: str) -> dict[str, Any]:
    """The settings that a DeepSpeed file brings with it. What is wrong with the file is told when it is checked."""
    try:
        own = json.loads(Path(path).read_text(encoding="utf-8"))[DEEPSPEED_SECTION]
        return dict(own)
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return {}


def read_yaml(path: Path, what: str) -> Any:
    """The content of a YAML file that holds a ``what``. Raises UserError where it cannot be read or is not YAML."""
    try:
        return yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: the {what} cannot be read ({error.strerror}).") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: the {what} is not valid YAML ({' '.join(str(error).split())}).") from None


def _read_settings(path: Path) -> dict[str, Any]:
    content = read_yaml(path, "configuration")
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise UserError(f"{path}: the configuration must be a mapping of settings to values.")
    return {str(key).replace("-", "_"): value for key, value in content.items()}
