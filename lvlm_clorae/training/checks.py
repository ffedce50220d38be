"""Cross-field and environment checks of a run, before any weights are loaded.

Types and ranges of single settings are checked when the configuration is built. The cheap checks come first, so that a
mistake in the configuration costs no import of torch. Every rank runs all checks with the same result.
"""

from __future__ import annotations

import os
import platform
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lvlm_clorae.data.index import INDEX_NAME, content_fault
from lvlm_clorae.data.storage import LocalStorage, open_storages
from lvlm_clorae.errors import UserError
from lvlm_clorae.models.presets import check_model
from lvlm_clorae.tasks.schema import CAPTION
from lvlm_clorae.training.config import (
    FIELDS,
    PROJECTOR,
    WITHOUT_ADAPTER,
    AdapterArguments,
    DataArguments,
    ModelArguments,
    TrainConfig,
)
from lvlm_clorae.training.dataset_tasks import choose_dataset_tasks, make_weighting
from lvlm_clorae.training.deepspeed_config import check_sections, find_deepspeed_file, read_deepspeed_file, resolve
from lvlm_clorae.training.run_directory import find_run

if TYPE_CHECKING:
    from lvlm_clorae.data.dataset import ShardDataset


def check_run(config: TrainConfig) -> tuple[ShardDataset, dict[str, Any]]:
    """Return dataset and DeepSpeed file. Raises UserError if settings contradict each other or the data."""
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    check_experts(config)
    check_global_micro_batch(config, ranks)
    check_model(config.model)
    content = read_deepspeed_file(find_deepspeed_file(config.deepspeed))
    check_quantized(config, content)
    check_conflicts(config, content)
    check_compilation(config, content)
    dataset = check_shards(config)
    find_run(config)
    check_environment()
    check_base(config)
    bf16 = check_bf16(config)
    if config.adapter != "none":
        check_sections(resolve(content, config, ranks, bf16, config.deepspeed), config.deepspeed)
    return dataset, content


def check_experts(config: AdapterArguments) -> None:
    """Raise UserError if both types of experts are disabled."""
    if config.adapter == "clorae" and not (config.use_universal or config.use_experts):
        raise UserError(
            "use_universal and use_experts are both false, so there is nothing to train. "
            "Enable one of them, or evaluate the base model with --adapter none."
        )


def check_global_micro_batch(config: DataArguments, ranks: int) -> None:
    """Raise UserError if the ranks cannot share a global micro-batch evenly (data/sampler.py)."""
    size = config.per_device_train_batch_size * ranks
    if config.global_micro_batch is not None and config.global_micro_batch % size:
        raise UserError(
            f"global_micro_batch = {config.global_micro_batch} is not a multiple of per_device_train_batch_size x "
            f"ranks = {config.per_device_train_batch_size} x {ranks}. Set it to a multiple of {size}, or leave it out."
        )


def check_quantized(config: TrainConfig, deepspeed_file: dict[str, Any]) -> None:
    """Raise UserError for a quantized base in both 8 and 4 bits, trained in full, aligned, or under ZeRO-3."""
    if config.load_in_8bit and config.load_in_4bit:
        raise UserError("load_in_8bit and load_in_4bit exclude each other. Choose one.")
    if not (config.load_in_8bit or config.load_in_4bit):
        return
    flag = "--load_in_8bit" if config.load_in_8bit else "--load_in_4bit"
    if config.adapter == "full":
        raise UserError(f"{flag} freezes the base model, so --adapter full trains nothing. Leave one of them out.")
    if config.adapter == PROJECTOR:
        raise UserError(f"{flag}: an aligned base is saved with whole weights. Leave it out; training can quantize it.")
    if config.adapter != "none" and _stage(deepspeed_file) == 3:
        raise UserError(
            f"{flag} does not work with ZeRO-3 ({config.deepspeed}), since bitsandbytes keeps quantized weights whole "
            f"on every rank. Use a ZeRO-2 file (--deepspeed zero2), or leave {flag} out."
        )


def check_compilation(config: TrainConfig, deepspeed_file: dict[str, Any]) -> None:
    """Raise UserError for compilation under ZeRO-3, whose hooks in every layer cannot be compiled."""
    if config.torch_compile and config.adapter != "none" and _stage(deepspeed_file) == 3:
        raise UserError(
            "--torch_compile does not work with ZeRO-3. Use a ZeRO-2 file (--deepspeed zero2), or leave it out."
        )


def check_conflicts(config: TrainConfig, deepspeed_file: dict[str, Any]) -> None:
    """Raise UserError if gradient conflict cannot be measured: under ZeRO-3, or without shared weights."""
    if not config.log_conflicts or config.adapter == "none":
        return
    if config.adapter == "clorae" and not config.use_universal:
        raise UserError(
            "log_conflicts compares gradients of weights that the datasets share, but there are none without the "
            "universal expert. Leave out --log_conflicts or --no_use_universal."
        )
    if _stage(deepspeed_file) == 3:
        raise UserError(
            f"log_conflicts needs the trained weights whole on every rank, but {config.deepspeed} partitions them "
            "(ZeRO-3). Leave out --log_conflicts, or use a ZeRO-2 file (--deepspeed zero2)."
        )


def _stage(deepspeed_file: dict[str, Any]) -> Any:
    section = deepspeed_file.get("zero_optimization")
    return section.get("stage") if isinstance(section, dict) else None


def check_base(config: TrainConfig) -> None:
    """Raise UserError if the base lacks files, an option, a target module or a projector to align. Reads no weights."""
    from lvlm_clorae.models.loading import check_options, describe_model

    options = {"template": config.template, **config.architecture_options()}
    check_options(config.model, **options)
    if config.adapter == PROJECTOR and getattr(describe_model(config.model, **options), PROJECTOR, None) is None:
        raise UserError(
            f"{config.model} has no projector to align: it is text only, or a vision-language model that transformers "
            "trained as a whole. Give a language model with --model and a tower with --vision."
        )
    if config.adapter not in WITHOUT_ADAPTER and config.target_modules:
        from lvlm_clorae.training.adapters import check_targets

        check_targets(describe_model(config.model, **options), config.target_modules)


def check_shards(config: TrainConfig) -> ShardDataset:
    """Open the shards of the run. Raises UserError, also without samples to use."""
    directory = Path(config.shards)
    if config.shards == FIELDS["shards"].default and not (directory / INDEX_NAME).is_file():
        raise UserError(
            f"{directory}: holds no shards. Give a directory with --shards, or create the demo's with: "
            f"lvlm-clorae shards demo --output_dir {directory}"
        )
    index, storages = open_storages(config.shards, config.cache_dir, config.cache_gib)
    for name, entry in index.datasets.items():
        if (entry.task == CAPTION) != (config.adapter == PROJECTOR):
            holds = "captions, which only `lvlm-clorae align` trains on" if entry.task == CAPTION else "no captions"
            raise UserError(f'{config.shards}: dataset "{name}" has {holds}. Give other shards with --shards.')
    split, purpose = ("test", "evaluate on") if config.adapter == "none" else ("train", "train on")
    if not index.dataset_tasks(split):
        raise UserError(
            f'{config.shards}: no dataset has a split "{split}" to {purpose}. '
            "Build shards that have it, or give others with --shards."
        )
    chosen = choose_dataset_tasks(index, config)
    if config.adapter != "none":
        make_weighting(config, chosen)
    from lvlm_clorae.data.dataset import ShardDataset  # imports torch

    return ShardDataset(index, storages)


def verify_shards(dataset: ShardDataset) -> int:
    """Compare the local shards of all splits with the SHA-256 of their index. Collective.

    Every machine reads all of them, since each may have its own copy; its ranks share the work.

    Returns:
        the number of local shards; the others are verified when they arrive in ``cache_dir``

    Raises:
        UserError: on every rank, with the name of each shard that differs. After a signal to stop the rest is left out.
    """
    from lvlm_clorae.training import distributed
    from lvlm_clorae.training.preemption import stop_requested

    local = [
        (storage.directory, shard)
        for name, entry in dataset.index.datasets.items()
        if type(storage := dataset.storages[name]) is LocalStorage  # not a cache of remote ones
        for shards in entry.splits.values()
        for shard in shards
    ]
    place, places = distributed.place_on_machine()
    faults = []
    for directory, shard in local[place::places]:
        if not stop_requested() and (fault := content_fault(directory, shard)):
            where = f" on {platform.node()}" if places < distributed.world_size() else ""
            faults.append(f"{directory / shard.name}{where}: {fault}")
    found = distributed.gathered(faults)

    def report() -> None:
        if found:
            raise UserError(f"{'; '.join(found)}. Copy them again, or build the shards again.")

    distributed.on_first_rank(report)
    return len(local)


def check_environment() -> None:
    """Raise UserError for missing dependencies, as ``lvlm-clorae doctor`` reports them."""
    from lvlm_clorae.doctor import examine

    missing = [finding for finding in examine(quick=True) if finding.state == "missing"]
    if missing:
        rows = "".join(f"\n  {finding}" for finding in missing)
        raise UserError(f"Dependencies of training are missing (`lvlm-clorae doctor` lists all):{rows}")


def check_bf16(config: ModelArguments) -> bool:
    """Return True if the run computes in bf16. Raises UserError if the GPU does not support it."""
    import torch

    from lvlm_clorae.training.setup import use_bf16

    gpu = torch.cuda.is_available()
    if config.bf16 is True and gpu and not torch.cuda.is_bf16_supported(including_emulation=False):
        raise UserError("bf16 needs a GPU of compute capability 8.0 or higher. Set --bf16 false.")
    return use_bf16(config)
