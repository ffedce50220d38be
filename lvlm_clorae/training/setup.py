"""Set up a run: base model with adapter, DeepSpeed engine and data."""

from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import deepspeed
import torch

from lvlm_clorae.data.collate import Batch, Collator
from lvlm_clorae.data.dataset import ShardDataset
from lvlm_clorae.data.loader import ShardDataLoader
from lvlm_clorae.data.sampler import DistributedTaskBatchSampler, SamplingPlan
from lvlm_clorae.models.constrained import check_tokenizer
from lvlm_clorae.models.fingerprint import base_fingerprint
from lvlm_clorae.models.loading import find_source, load_model
from lvlm_clorae.models.parts import PartSize, language_names, part_sizes
from lvlm_clorae.tasks.schema import in_task_order
from lvlm_clorae.training import distributed
from lvlm_clorae.training.adapters import add_adapter, method_of
from lvlm_clorae.training.config import FIELDS, PROJECTOR, ModelArguments, TrainConfig
from lvlm_clorae.training.dataset_tasks import RunDatasetTasks, choose_dataset_tasks
from lvlm_clorae.training.deepspeed_config import resolve
from lvlm_clorae.training.evaluation import Evaluator
from lvlm_clorae.training.optimizer_state import trained_shapes
from lvlm_clorae.training.preemption import stop_while_waiting
from lvlm_clorae.training.reporting import Reporter
from lvlm_clorae.training.run_directory import Status

AMX_WIDTH = 512
"""Least width of a language model that ``bf16: auto`` computes in bf16 on a CPU with AMX; fp32 is faster below."""
MAX_GRAPHS = 64
"""Graphs of a compiled stack, of which there is one a task, and one for evaluation."""


@dataclass
class Run:
    """One training run on one rank: configuration, model, engine and data. ``engine`` is None for adapter ``none``."""

    config: TrainConfig
    directory: Path
    model: Any
    engine: Any
    processor: Any
    report: Reporter
    dataset_tasks: RunDatasetTasks
    tasks: list[str]
    dataset: ShardDataset = field(repr=False)
    """The training split."""
    status: Status = field(repr=False)
    base: dict[str, str] = field(default_factory=dict, repr=False)
    """The fingerprint of the base; complete on rank 0."""
    bf16: bool = False
    """Whether the run computes in bf16."""

    def collator(self, split: str) -> Collator:
        """Return the collate function of a split."""
        config, dataset_tasks = self.config, getattr(self.dataset_tasks, split)
        lengths = config.max_source_length, config.max_target_length
        return Collator(self.processor, dataset_tasks, *lengths, config.on_invalid_sample, config.on_truncation)

    def train_sampler(self) -> DistributedTaskBatchSampler:
        """Return the sampler of this rank's micro-batches, at the beginning of the run."""
        config, world_size = self.config, distributed.world_size()
        global_micro_batch = config.global_micro_batch or config.per_device_train_batch_size * world_size
        return DistributedTaskBatchSampler(
            self.dataset,
            self.dataset_tasks.train,
            SamplingPlan(config.seed, global_micro_batch, config.interleave, config.interleave_temperature),
            rank=distributed.rank(),
            world_size=world_size,
            batch_size=config.per_device_train_batch_size,
        )

    def train_dataloader(self, sampler: DistributedTaskBatchSampler) -> ShardDataLoader:
        """Return the loader of the sampler's micro-batches."""
        workers, timeout = self.config.dataloader_num_workers, self.config.ddp_timeout
        return ShardDataLoader(self.dataset, sampler, self.collator("train"), workers, timeout, stop_while_waiting)

    @cached_property
    def dev(self) -> Evaluator | None:
        """The evaluator of the dev split; captions have none, since answers in free text are not scored."""
        return self.evaluator("dev") if self.dataset_tasks.dev and self.config.adapter != PROJECTOR else None

    def evaluator(self, split: str) -> Evaluator:
        """Return the evaluator of a split."""
        config, dataset, collator = self.config, self.dataset.of_split(split), self.collator(split)
        sizes, workers = (config.per_device_eval_batch_size, config.max_target_length), config.dataloader_num_workers
        return Evaluator(dataset, collator, *sizes, config.match, config.constrained, workers)

    @property
    def has_tasks(self) -> bool:
        """Whether the adapter must know the task."""
        method = method_of(self.config)
        return method is not None and method.knows_tasks

    @property
    def aux_loss(self) -> str | None:
        """The name of the adapter's auxiliary loss, None without one or with ``beta`` 0."""
        method = method_of(self.config)
        return method.aux_loss if method is not None and self.config.beta > 0 else None

    @cached_property
    def padding_free(self) -> bool:
        """Whether training batches are computed without padding."""
        return self.config.padding_free and getattr(self.model, "is_packable", False)

    @property
    def precision(self) -> str:
        """``bf16`` or ``fp32``."""
        return "bf16" if self.bf16 else "fp32"

    @cached_property
    def fingerprint(self) -> dict[str, Any]:
        """Base and adapter that checkpoints belong to; complete on rank 0."""
        return {"precision": self.precision, "base": self.base, "trained": trained_shapes(self.model)}

    def advance(self, samples: int) -> None:
        """Report samples that an evaluation has done."""
        self.report.advance(samples)
        self.status.heartbeat()

    def describe(self) -> str:
        """Return parameters, memory of the base and training samples as lines of text."""
        parts, reference = part_sizes(self.model), self.dataset_tasks.reference()
        whole = sum(parts.values(), PartSize())
        memory = ", ".join(
            f"{part} {size.bytes / 2**20:.1f} MiB"
            + (f" ({size.bytes / (4 * size.parameters):.2f} of fp32)" if size.bytes < 4 * size.parameters else "")
            for part, size in parts.items()
            if part != "adapter"
        )
        samples = ", ".join(
            f"{name} {self.dataset.index.dataset(dataset_task.dataset).samples('train')} ({reference[name]:g})"
            for name, dataset_task in self.dataset_tasks.train.items()
        )
        weighted = set(self.dataset_tasks.train) if self.config.loss_weighting != "none" else set()
        alone = ", ".join(sorted(weighted - set(self.dataset_tasks.dev)))
        note = f"\nno dev split, weighted by the mean of the others: {alone}" if alone else ""
        if unused := unused_settings(self.config):
            note += f"\nnot used by --adapter {self.config.adapter}: {', '.join(unused)}"
        if self.padding_free:
            note += "\ntraining batches are computed without padding"
        if not self.processor.reads_images:
            note += f"\ntext only: the images of {self.dataset.index.count_images()} samples are not read"
        return (
            f"{self.config.model} with {self.config.adapter}: {whole.trained / 1e6:.2f} M of "
            f"{whole.parameters / 1e6:.2f} M parameters trained, {distributed.world_size()} rank(s) on "
            f"{distributed.device().type} in {self.precision}\nweights of the base: {memory}\n"
            f"training samples (and reference F1): {samples}{note}"
        )


def build(
    config: TrainConfig,
    dataset: ShardDataset,
    deepspeed_file: dict[str, Any],
    directory: Path,
    report: Reporter,
    status: Status,
) -> Run:
    """Load model and adapter and start the engine of this rank; a UserError names what cannot be loaded. Collective."""
    bf16 = use_bf16(config)
    dtype = torch.bfloat16 if bf16 else torch.float32
    settings: dict[str, Any] = {}
    if config.adapter != "none":
        settings = resolve(deepspeed_file, config, distributed.world_size(), bf16, config.deepspeed)
    torch.manual_seed(config.seed)
    with distributed.partitioned_loading(settings):
        model, processor = load_model(config.model, dtype=dtype, **config.load_options())
    if config.constrained:
        check_tokenizer(processor)
    base = base_fingerprint(model)
    if config.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    tasks = in_task_order(entry.task for entry in dataset.index.datasets.values())
    torch.manual_seed(config.seed)  # again: loading may draw random numbers, under ZeRO-3 others than under ZeRO-2
    model = add_adapter(model, config, tasks)
    # Weights are initialized with one seed on all ranks; dropout uses another seed on each rank.
    distributed.seed_from(f"{config.seed}/{distributed.rank()}")
    engine = None
    if config.adapter == "none":
        model.to(distributed.device())
    else:
        engine = _start_engine(model, config, settings, dtype)
    dataset_tasks = choose_dataset_tasks(dataset.index, config)
    return Run(config, directory, model, engine, processor, report, dataset_tasks, tasks, dataset, status, base, bf16)


def _start_engine(model: Any, config: TrainConfig, settings: dict[str, Any], dtype: torch.dtype) -> Any:
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in trained:  # PEFT creates adapters in fp32; DeepSpeed does not cast them beside a partitioned base
        parameter.data = parameter.data.to(dtype)
    optimizer = None
    if "optimizer" not in settings:
        optimizer = torch.optim.AdamW(trained, lr=config.learning_rate, weight_decay=config.weight_decay)
    model.train()
    distributed.keep_towers_whole(model)
    with distributed.buffers_kept(model):
        engine, *_ = deepspeed.initialize(model=model, model_parameters=trained, optimizer=optimizer, config=settings)
    if config.torch_compile:
        compile_language_model(model)
    return engine


def compile_language_model(model: Any) -> None:
    """Compile the stacks of the language model, for any batch shape; each task has a graph of its own."""
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, MAX_GRAPHS)
    for name in language_names(model):
        model.get_submodule(name).compile(dynamic=True)


def compute_losses(run: Run, module: Any, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """Run the forward of ``module``, the engine or the model, on one micro-batch. Collective.

    Returns:
        cross-entropy and auxiliary loss (zero if there is none), scalars, scaled such that their mean over ranks is
        the mean over all ranks' tokens: the same samples give the same gradient on any number of ranks.
    """
    tensors: dict[str, Any] = _on_device(batch.tensors)
    if packing := run.padding_free and run.model.packing(batch.tensors):
        tensors["packing"] = _on_device(packing)
    tokens = distributed.sum_over_ranks((tensors["labels"] != -100).sum().float()).clamp(min=1)  # 0: all rows ignored
    if run.has_tasks:
        run.model.set_task(batch.dataset_task.task)
    ce = module(**tensors, num_items_in_batch=tokens / distributed.world_size()).loss
    if not run.aux_loss:
        return ce, ce.new_zeros(())
    return ce, run.model.base_model.aux_loss(distributed.sum_over_ranks, distributed.world_size())


def _on_device(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor.to(distributed.device(), non_blocking=True) for name, tensor in tensors.items()}


class _Reads:
    """A configuration that keeps the names of the settings that are read."""

    def __init__(self, config: TrainConfig) -> None:
        self._config, self.names = config, set[str]()

    def __getattr__(self, name: str) -> Any:
        self.names.add(name)
        return getattr(self._config, name)


def unused_settings(config: TrainConfig) -> list[str]:
    """Return the settings of experts that are given, and that the adapter method does not read."""
    method, reads = method_of(config), _Reads(config)
    if method is not None:
        method.make_config({"r": config.lora_rank, "lora_alpha": config.lora_alpha}, reads, ["task"])
    experts = ("lora_expert_rank", "use_universal", "use_experts", "use_gate")
    return [name for name in experts if getattr(config, name) != FIELDS[name].default and name not in reads.names]


def use_bf16(config: ModelArguments) -> bool:
    """Return True if the run computes in bf16; ``auto``: on GPUs that support it, on CPUs where AMX multiplies it.

    On a CPU a base narrower than :data:`AMX_WIDTH` stays in fp32. Raises UserError for a base that cannot be read.
    """
    if config.bf16 != "auto":
        return config.bf16
    if torch.cuda.is_available():
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if not torch.cpu._is_amx_tile_supported():
        return False
    width: int = find_source(config.model).config.get_text_config(decoder=True).hidden_size
    return width >= AMX_WIDTH
