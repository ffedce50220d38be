"""What a run needs, put together: model with adapter, engine, data, run directory."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import deepspeed
import peft
import torch

from lvlm_clorae.adapters.clorae import CLoRAEConfig
from lvlm_clorae.data.batches import Batcher, Unit, find_units
from lvlm_clorae.data.index import Index
from lvlm_clorae.data.stream import ShardReader
from lvlm_clorae.models.loading import load_model
from lvlm_clorae.tasks import TASKS
from lvlm_clorae.training import distributed
from lvlm_clorae.training.config import TrainConfig
from lvlm_clorae.training.deepspeed_config import resolve
from lvlm_clorae.training.reporting import Reporter
from lvlm_clorae.training.run_directory import Metrics


@dataclass
class Job:
    """One run on one rank."""

    config: TrainConfig
    directory: Path
    index: Index
    model: Any
    engine: Any
    processor: Any
    report: Reporter
    units: dict[str, Unit]
    dev_units: dict[str, Unit]
    test_units: dict[str, Unit]
    tasks: list[str]
    reader: ShardReader = field(repr=False)

    def batcher(self, split: str) -> Batcher:
        """Batches of a split under the run's length limits."""
        return Batcher(self.reader, self.processor, split, self.config.max_length, self.config.max_answer_length)

    @property
    def train(self) -> Batcher:
        return self.batcher("train")

    @property
    def dev(self) -> Batcher | None:
        return self.batcher("dev") if self.dev_units else None

    @property
    def has_tasks(self) -> bool:
        """Whether the adapter has task experts to choose from."""
        return self.config.adapter == "clorae"

    @property
    def has_mim(self) -> bool:
        """Whether the mutual-information loss takes part."""
        config = self.config
        return self.has_tasks and config.use_universal and config.use_experts and config.beta > 0

    def count(self, units: dict[str, Unit], split: str) -> int:
        """Samples of the units' split on one rank, at most."""
        ranks = distributed.world_size()
        return sum(-(-self.index.dataset(unit.dataset).samples(split) // ranks) for unit in units.values())

    def open_metrics(self, step: int) -> Any:
        """The run's metrics on rank 0; something that takes the same calls elsewhere."""
        return Metrics(self.directory, step) if distributed.rank() == 0 else _NoMetrics()


class _NoMetrics:
    def write(self, step: int, kind: str, **values: Any) -> None:
        pass

    def close(self) -> None:
        pass


def build(config: TrainConfig, index: Index, deepspeed_file: dict[str, Any], directory: Path, report: Reporter) -> Job:
    """Model, adapter, engine and data of one rank."""
    torch.manual_seed(config.seed)
    bf16 = use_bf16(config)
    model, processor = load_model(config.model)
    tasks = [task for task in TASKS if task in {entry.task for entry in index.datasets.values()}]
    model = add_adapter(model, config, tasks)
    # One seed for the weights, which must be alike on all ranks, and another a rank for dropout, which need not.
    torch.manual_seed(
        int.from_bytes(hashlib.sha256(f"{config.seed}/{distributed.rank()}".encode()).digest()[:7], "big")
    )
    engine = None
    if config.adapter == "none":
        model.to(distributed.device(), torch.bfloat16 if bf16 else torch.float32)
    else:
        settings = resolve(deepspeed_file, config, distributed.world_size(), bf16, config.deepspeed)
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        optimizer = None
        if "optimizer" not in settings:
            optimizer = torch.optim.AdamW(trained, lr=config.learning_rate, weight_decay=config.weight_decay)
        model.train()
        engine, *_ = deepspeed.initialize(model=model, model_parameters=trained, optimizer=optimizer, config=settings)
    return Job(
        config=config,
        directory=directory,
        index=index,
        model=model,
        engine=engine,
        processor=processor,
        report=report,
        units=find_units(index, "train"),
        dev_units=find_units(index, "dev"),
        test_units=find_units(index, "test"),
        tasks=tasks,
        reader=ShardReader(Path(config.shards), index),
    )


def use_bf16(config: TrainConfig) -> bool:
    """Whether the run computes in bf16; ``auto`` means on a GPU that has it, since CPUs are slower in it."""
    if config.precision == "auto":
        return torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False)
    return config.precision == "bf16"


def add_adapter(model: Any, config: TrainConfig, tasks: list[str]) -> Any:
    """The model with what ``config.adapter`` trains: a PEFT model for clorae and lora, itself for full and none."""
    if config.adapter in ("full", "none"):
        model.requires_grad_(config.adapter == "full")
        model.vision_tower.requires_grad_(False)
        return model
    common: dict[str, Any] = {
        "r": config.rank,
        "lora_alpha": config.alpha if config.alpha is not None else config.rank,
        "lora_dropout": config.dropout,
        # PEFT's own table knows T5 by its model type; ours is a subclass of it.
        "target_modules": config.target_modules or ["q", "v"],
        "exclude_modules": r".*(vision_tower|projector)\..*",
        "modules_to_save": ["projector"] if config.train_projector else None,
    }
    if config.adapter == "lora":
        return peft.get_peft_model(model, peft.LoraConfig(**common))
    adapter = CLoRAEConfig(
        **common,
        tasks=tasks,
        expert_r=config.expert_rank,
        use_universal=config.use_universal,
        use_experts=config.use_experts,
        use_gate=config.use_gate,
        use_mim=config.beta > 0,
    )
    return peft.get_peft_model(model, adapter)
