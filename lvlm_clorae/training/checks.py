"""All that can be found wrong with a run before a weight is loaded: its values, model, DeepSpeed file, shards, machine.

The cheap checks come first, so that a typing error costs no import of torch. Every rank runs them and finds the same.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lvlm_clorae.data.index import INDEX_NAME
from lvlm_clorae.data.places import open_shards
from lvlm_clorae.data.shard_reader import ShardReader
from lvlm_clorae.errors import UserError, nearest
from lvlm_clorae.models.presets import presets
from lvlm_clorae.tasks.schema import is_task_name, subtasks_of
from lvlm_clorae.training.config import CHOICES, FIELDS, TrainConfig
from lvlm_clorae.training.deepspeed_config import read_deepspeed_file, resolve
from lvlm_clorae.training.run_directory import find_run
from lvlm_clorae.training.units import choose_units


def check_run(config: TrainConfig) -> tuple[ShardReader, dict[str, Any]]:
    """The reader of ``config.shards`` and the content of the DeepSpeed file, of a run that has nothing wrong with it.

    Raises:
        UserError: a value out of range, no expert, an unknown model, a DeepSpeed file that cannot be read or
            contradicts the run, shards that are missing, empty or of unknown tasks, an output directory that holds
            something else, a machine that lacks something, bf16 on a GPU without it.
    """
    check_values(config)
    check_block(config, int(os.environ.get("WORLD_SIZE", "1")))
    check_model(config.model)
    content = read_deepspeed_file(Path(config.deepspeed))
    check_quantised(config, content)
    check_conflicts(config, content)
    reader = check_shards(config)
    find_run(config)
    check_machine()
    bf16 = check_precision(config)
    check_base(config)
    if config.adapter != "none":
        resolve(content, config, int(os.environ.get("WORLD_SIZE", "1")), bf16, config.deepspeed)
    return reader, content


def _at_least(low: float) -> Callable[[float], bool]:
    return lambda value: low <= value < float("inf")


def _positive(value: float) -> bool:
    return 0 < value < float("inf")


def _share(value: float) -> bool:
    return 0 <= value < 1


# setting -> what holds, why, what to set instead
_COUNT = "1 or more"
_RANGES: dict[str, tuple[Callable[[Any], bool], str, str]] = {
    "max_length": (_at_least(1), "a prompt needs a token", _COUNT),
    "max_answer_length": (_at_least(1), "an answer needs a token", _COUNT),
    "rank": (_at_least(1), "an expert of rank 0 has no weights", _COUNT + ", or --adapter none to train nothing"),
    "expert_rank": (_at_least(1), "an expert of rank 0 has no weights", _COUNT + ", or --no-use-experts to go without"),
    "alpha": (_positive, "experts are scaled by alpha / rank", "more than 0; leave it out for the method's own"),
    "mim_tokens": (_at_least(0), "it counts tokens", _COUNT + "; 0 takes all"),
    "dropout": (_share, "it is the share of inputs that is dropped", "0 or more and less than 1"),
    "micro_batch": (_at_least(1), "a micro-step needs a sample", _COUNT),
    "accumulation": (_at_least(1), "an optimizer step needs a micro-step", _COUNT),
    "cache_gib": (_positive, "it bounds the shards that are kept", "more than 0"),
    "block": (_at_least(1), "it counts samples", _COUNT + ", a multiple of micro_batch x ranks; leave it out for that"),
    "temperature": (_at_least(1), "below 1 small datasets would never come up", "1 or more"),
    "workers": (_at_least(0), "it counts processes", "0 or more"),
    "beta": (_at_least(0), "it weighs a loss", "0 or more; 0 switches the loss off"),
    "gamma": (_positive, "it is the exponent that lowers the weight of what is learnt", "more than 0"),
    "margin": (
        lambda value: 1 < value < float("inf"),
        "at 1 a dataset at its reference F1 would weigh nothing",
        "more than 1",
    ),
    "ema": (_share, "it is the share of the old dev F1", "0 or more and less than 1; leave it out for no average"),
    "epochs": (_at_least(1), "a run needs an epoch", _COUNT + ", or --adapter none to evaluate only"),
    "max_steps": (_at_least(1), "a run needs a step", _COUNT + ", or --adapter none to evaluate only"),
    "learning_rate": (_positive, "nothing would be learnt", "more than 0"),
    "weight_decay": (_at_least(0), "weights would grow", "0 or more"),
    "step_epochs": (_at_least(1), "the rate is halved after whole epochs", _COUNT),
    "warmup": (_share, "it is the share of all steps that warms up", "0 or more and less than 1"),
    "gradient_clipping": (_at_least(0), "it is a norm", "0 or more; 0 switches clipping off"),
    "seed": (lambda value: 0 <= value < 1 << 63, "it seeds torch", "0 or more and less than 2^63"),
    "eval_batch": (_at_least(1), "evaluation needs a sample at a time", _COUNT),
    "evaluate_every": (_at_least(1), "it counts epochs", _COUNT),
    "patience": (_at_least(1), "it counts evaluations", _COUNT + "; leave it out to train to the last epoch"),
    "checkpoint_every": (_at_least(1), "it counts steps", _COUNT),
    "keep_checkpoints": (_at_least(1), "without a checkpoint a run cannot be resumed", _COUNT),
    "collective_timeout": (_positive, "ranks wait for each other", "more than 0"),
    "log_every": (_at_least(1), "it counts steps", _COUNT),
    "log_conflicts": (_at_least(0), "it counts steps", _COUNT + "; 0 measures nothing"),
}


def check_values(config: TrainConfig) -> None:
    """Raises UserError for a value out of its range, and where both kinds of experts are off."""
    for name, (holds, why, instead) in _RANGES.items():
        value = getattr(config, name)
        if value is not None and not holds(value):
            flag = "--" + name.replace("_", "-")
            raise UserError(f"{name} = {value} is out of range: {why}. Set {flag} to {instead}.")
    if config.adapter == "clorae" and not (config.use_universal or config.use_experts):
        raise UserError(
            "use_universal and use_experts are both off, so there is nothing to train. "
            "Leave one of them on, or evaluate the base with --adapter none."
        )


def check_block(config: TrainConfig, ranks: int) -> None:
    """Raises UserError where the ranks cannot share a block of the stream (data/plan.py)."""
    wide = config.micro_batch * ranks
    if config.block is not None and config.block % wide:
        raise UserError(
            f"block = {config.block} is no multiple of micro_batch x ranks = {config.micro_batch} x {ranks}, so the "
            f"ranks cannot share it evenly. Set --block to a multiple of {wide}, or leave it out for {wide}."
        )


def check_model(name: str) -> None:
    """Raises UserError for a name that can be no preset, directory or hub id."""
    if name in presets() or Path(name).is_dir():
        return
    if name.startswith(("/", ".", "~")):
        raise UserError(f"{name}: no such model directory. Give a directory written by save_pretrained, or a preset.")
    if "/" not in name:
        raise UserError(
            f'There is no model "{name}": it is no preset, no directory, and no hub id (which is OWNER/NAME).'
            f"{nearest(name, presets())}"
        )


def check_quantised(config: TrainConfig, deepspeed_file: dict[str, Any]) -> None:
    """Raises UserError where a quantised base cannot be: twice, trained in full, or under ZeRO-3."""
    if not (config.load_in_8bit or config.load_in_4bit):
        return
    flag = "--load-in-8bit" if config.load_in_8bit else "--load-in-4bit"
    if config.load_in_8bit and config.load_in_4bit:
        raise UserError("load_in_8bit and load_in_4bit are both on, but a weight is stored in one way. Choose one.")
    if config.adapter == "full":
        raise UserError(
            f"{flag} freezes the base in whole numbers, so --adapter full has nothing to train. Leave one of them out."
        )
    section = deepspeed_file.get("zero_optimization")
    if config.adapter != "none" and isinstance(section, dict) and section.get("stage") == 3:
        raise UserError(
            f"{flag} does not go with ZeRO-3: bitsandbytes keeps the quantised weights whole on every rank, so "
            f"partitioning saves nothing. Either keep {flag} with a ZeRO-2 file (ds_configs/zero2.json), or keep "
            f"ZeRO-3 ({config.deepspeed}) and leave {flag} out."
        )


def check_conflicts(config: TrainConfig, deepspeed_file: dict[str, Any]) -> None:
    """Raises UserError where the gradients of shared weights cannot be measured: under ZeRO-3, or where none is."""
    if not config.log_conflicts or config.adapter == "none":
        return
    if config.adapter == "clorae" and not config.use_universal:
        raise UserError(
            "log_conflicts compares the datasets' gradients on the weights that they share, but without the universal "
            "expert each task has its own. Leave out --log-conflicts or --no-use-universal."
        )
    section = deepspeed_file.get("zero_optimization")
    if isinstance(section, dict) and section.get("stage") == 3:
        raise UserError(
            f"log_conflicts needs the trained weights whole on every rank, but {config.deepspeed} partitions them "
            "(ZeRO-3). Leave out --log-conflicts, or take a ZeRO-2 file (--deepspeed ds_configs/zero2.json)."
        )


def check_base(config: TrainConfig) -> None:
    """Raises UserError for a base whose files are not here, or that has no use for an option; weights are not read."""
    from lvlm_clorae.models.loading import check_options

    check_options(config.model, **{name: getattr(config, name) for name in (*CHOICES, "template")})


def check_shards(config: TrainConfig) -> ShardReader:
    """The run's shards, wherever they lie.

    Raises:
        UserError: as :func:`open_shards` and :func:`choose_units`; an unknown task or sub-task; no sample in the
            split that is needed.
    """
    directory = Path(config.shards)
    if config.shards == FIELDS["shards"].default and not (directory / INDEX_NAME).is_file():
        raise UserError(
            f"{directory}: no shards there. Name yours with --shards DIR, or draw the demo's with: "
            f"lvlm-clorae shards demo --output {directory}"
        )
    cache = Path(config.cache_dir) if config.cache_dir else None
    index, sources = open_shards(config.shards, cache, int(config.cache_gib * 2**30))
    for name, entry in index.datasets.items():
        if not is_task_name(entry.task):
            raise UserError(f'{config.shards}: dataset "{name}" has the task "{entry.task}", which is no plain name.')
        subtasks = subtasks_of(entry.task)
        for subtask in entry.subtasks:
            if subtask not in subtasks:
                raise UserError(
                    f'{config.shards}: dataset "{name}" has the sub-task "{subtask}", unknown in {entry.task}.'
                    f"{nearest(subtask, subtasks)}"
                )
    split, purpose = ("test", "evaluate on") if config.adapter == "none" else ("train", "train on")
    if not index.units(split):
        raise UserError(
            f'{config.shards}: no dataset has a split "{split}", so there is nothing to {purpose}. '
            "Build shards that have it, or name others with --shards."
        )
    choose_units(index, config)
    return ShardReader(index, sources)


def check_machine() -> None:
    """Raises UserError for what the machine lacks, in the words of ``lvlm-clorae doctor``."""
    from lvlm_clorae.doctor import examine, lacking_for_training

    lacking = lacking_for_training(examine(quick=True))
    if lacking:
        rows = "".join(f"\n  {finding}" for finding in lacking)
        raise UserError(f"this machine lacks what training needs (lvlm-clorae doctor shows all):{rows}")


def check_precision(config: TrainConfig) -> bool:
    """Whether the run computes in bf16. Raises UserError where it is asked for and the GPU has none."""
    import torch

    from lvlm_clorae.training.job import use_bf16

    gpu = torch.cuda.is_available()
    if config.precision == "bf16" and gpu and not torch.cuda.is_bf16_supported(including_emulation=False):
        raise UserError(
            "precision = bf16, but this GPU has none (compute capability 8.0 brings it). Set --precision fp32."
        )
    return use_bf16(config)
