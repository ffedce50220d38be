"""What a run needs, put together: model with adapter, engine, data, run directory."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import deepspeed
import torch

from lvlm_clorae.data.batches import Batcher
from lvlm_clorae.data.index import Index
from lvlm_clorae.data.plan import Order
from lvlm_clorae.data.shard_reader import ShardReader
from lvlm_clorae.data.stream import TrainingStream
from lvlm_clorae.models.constrained import check_tokenizer
from lvlm_clorae.models.loading import load_model
from lvlm_clorae.tasks.schema import in_task_order
from lvlm_clorae.training import distributed
from lvlm_clorae.training.adapters import SIDE_LOSSES, add_adapter
from lvlm_clorae.training.config import CHOICES, TrainConfig
from lvlm_clorae.training.deepspeed_config import resolve
from lvlm_clorae.training.evaluation import Evaluation
from lvlm_clorae.training.identity import run_identity
from lvlm_clorae.training.reporting import Reporter
from lvlm_clorae.training.run_directory import Metrics
from lvlm_clorae.training.status import Status
from lvlm_clorae.training.units import RunUnits, choose_units

BASE_OPTIONS = (*CHOICES, "template", "load_in_8bit", "load_in_4bit")


@dataclass
class Job:
    """One run on one rank."""

    config: TrainConfig
    directory: Path
    model: Any
    engine: Any
    processor: Any
    report: Reporter
    units: RunUnits
    tasks: list[str]
    reader: ShardReader = field(repr=False)
    status: Status = field(repr=False)

    @property
    def index(self) -> Index:
        return self.reader.index

    def batcher(self, split: str) -> Batcher:
        """Batches of a split under the run's length limits and its policy for bad samples."""
        config = self.config
        return Batcher(
            self.reader, self.processor, split, config.max_length, config.max_answer_length, config.on_bad_sample
        )

    def stream(self) -> TrainingStream:
        """This rank's micro-batches, from the beginning of the run."""
        config, ranks = self.config, distributed.world_size()
        block = config.block or config.micro_batch * ranks
        return TrainingStream(
            self.batcher("train"),
            self.units.train,
            Order(config.seed, block, config.interleave, config.temperature),
            rank=distributed.rank(),
            world_size=ranks,
            micro_batch=config.micro_batch,
            workers=config.workers,
        )

    @cached_property
    def dev(self) -> Evaluation | None:
        return self.evaluation("dev") if self.units.dev else None

    def evaluation(self, split: str) -> Evaluation:
        """Of the units of a split, under the run's settings."""
        config = self.config
        return Evaluation(
            self.batcher(split),
            list(getattr(self.units, split).values()),
            config.eval_batch,
            config.max_answer_length,
            self.tasks,
            config.match,
            config.constrained,
            config.workers,
        )

    @property
    def has_tasks(self) -> bool:
        """Whether the adapter must know the task."""
        return self.config.adapter in SIDE_LOSSES

    @property
    def side_loss(self) -> str | None:
        """The name of the adapter's own loss, where it has one that takes part."""
        return SIDE_LOSSES.get(self.config.adapter) if self.config.beta > 0 else None

    @cached_property
    def identity(self) -> dict[str, Any]:
        """What checkpoints belong to; complete on rank 0."""
        return run_identity(self.model, "bf16" if use_bf16(self.config) else "fp32")

    def advance(self, samples: int) -> None:
        """Count what an evaluation has done."""
        self.report.advance(samples)
        self.status.pulse()

    def open_metrics(self, step: int) -> Any:
        """The run's metrics on rank 0; something that takes the same calls elsewhere."""
        return Metrics(self.directory, step) if distributed.rank() == 0 else _NoMetrics()


class _NoMetrics:
    def write(self, step: int, kind: str, **values: Any) -> None:
        pass

    def close(self) -> None:
        pass


def build(
    config: TrainConfig,
    reader: ShardReader,
    deepspeed_file: dict[str, Any],
    directory: Path,
    report: Reporter,
    status: Status,
) -> Job:
    """Model, adapter, engine and data of one rank.

    Raises:
        UserError: the base cannot be loaded, or its tokenizer is none for constrained decoding.
    """
    index = reader.index
    torch.manual_seed(config.seed)
    bf16 = use_bf16(config)
    settings: dict[str, Any] = {}
    if config.adapter != "none":
        settings = resolve(deepspeed_file, config, distributed.world_size(), bf16, config.deepspeed)
    dtype = torch.bfloat16 if bf16 else torch.float32
    with distributed.partitioned_loading(settings):
        model, processor = load_model(config.model, dtype=dtype, **base_options(config))
    if config.constrained:
        check_tokenizer(processor)
    if config.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    tasks = in_task_order(entry.task for entry in index.datasets.values())
    torch.manual_seed(config.seed)  # again: loading may draw numbers, under ZeRO-3 others than under ZeRO-2
    model = add_adapter(model, config, tasks)
    # One seed for the weights, which must be alike on all ranks, and another a rank for dropout, which need not.
    distributed.draw_from(f"{config.seed}/{distributed.rank()}")
    engine = None
    if config.adapter == "none":
        model.to(distributed.device())
    else:
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        for parameter in trained:  # PEFT makes adapters fp32; DeepSpeed casts them, but not beside a partitioned base
            parameter.data = parameter.data.to(dtype)
        optimizer = None
        if "optimizer" not in settings:
            optimizer = torch.optim.AdamW(trained, lr=config.learning_rate, weight_decay=config.weight_decay)
        model.train()
        distributed.keep_towers_whole(model)
        with distributed.buffers_kept(model):
            engine, *_ = deepspeed.initialize(
                model=model, model_parameters=trained, optimizer=optimizer, config=settings
            )
    return Job(
        config=config,
        directory=directory,
        model=model,
        engine=engine,
        processor=processor,
        report=report,
        units=choose_units(index, config),
        tasks=tasks,
        reader=reader,
        status=status,
    )


def base_options(config: TrainConfig) -> dict[str, Any]:
    """What of the base the run chooses, as arguments of :func:`load_model`."""
    return {name: getattr(config, name) for name in BASE_OPTIONS}


def use_bf16(config: TrainConfig) -> bool:
    """Whether the run computes in bf16; ``auto`` means on a GPU that has it, since CPUs are slower in it."""
    if config.precision == "auto":
        return torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False)
    return config.precision == "bf16"
