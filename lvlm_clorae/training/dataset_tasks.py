"""Choose the dataset tasks that a run trains on and evaluates, their reference F1 and the weights of their losses."""

from dataclasses import dataclass, replace

from lvlm_clorae.data.index import DatasetTask, Index
from lvlm_clorae.errors import UserError, nearest
from lvlm_clorae.losses.achievement import AchievementState
from lvlm_clorae.losses.coba import CoBaState
from lvlm_clorae.training.config import TrainConfig

DEFAULT_REFERENCE = 100.0
"""Reference F1 in percent of a dataset task that has none of its own."""


@dataclass(frozen=True)
class RunDatasetTasks:
    """The dataset tasks of each split, by name. Held-out datasets are only in ``test`` (Table 4 of the paper)."""

    train: dict[str, DatasetTask]
    dev: dict[str, DatasetTask]
    test: dict[str, DatasetTask]

    def reference(self) -> dict[str, float]:
        """Return the reference F1 of each trained dataset task in percent."""
        return {name: dataset_task.reference_f1 or DEFAULT_REFERENCE for name, dataset_task in self.train.items()}


def choose_dataset_tasks(index: Index, config: TrainConfig) -> RunDatasetTasks:
    """Return the dataset tasks of a run. Raises UserError for a wrong ``hold_out`` or ``reference_f1``."""
    held_out = config.hold_out
    for name in held_out:
        if name not in index.datasets:
            raise UserError(f'hold_out: unknown dataset "{name}".{nearest(name, index.datasets)}')
        if not index.datasets[name].samples("test"):
            raise UserError(f'hold_out: "{name}" has no test split to evaluate it on. Hold out another dataset.')
    train, dev, test = (index.dataset_tasks(split) for split in ("train", "dev", "test"))
    left = {dataset_task.task for dataset_task in train.values() if dataset_task.dataset not in held_out}
    for dataset_task in train.values():
        if dataset_task.task not in left:
            raise UserError(
                f"hold_out leaves no training data for {dataset_task.task}. "
                "Keep one dataset of that task, or build shards without it."
            )
    given = _references(config.reference_f1, {**train, **dev, **test})

    def without(excluded: list[str], dataset_tasks: dict[str, DatasetTask]) -> dict[str, DatasetTask]:
        return {
            name: replace(dataset_task, reference_f1=given.get(name, dataset_task.reference_f1))
            for name, dataset_task in dataset_tasks.items()
            if dataset_task.dataset not in excluded
        }

    return RunDatasetTasks(without(held_out, train), without(held_out, dev), without([], test))


def make_weighting(config: TrainConfig, dataset_tasks: RunDatasetTasks) -> AchievementState | CoBaState:
    """Return the weights at the start of a run; without weighting they are not updated, so all stay 1.

    Raises UserError as the states: a setting out of range, or no dev split for CoBa.
    """
    if config.loss_weighting == "coba":
        warmup = -(-config.coba_warmup_steps // config.coba_update_interval)
        lengths = {"history_length": config.coba_history_length, "warmup": warmup}
        return CoBaState(dataset_tasks.train, dataset_tasks.dev, **lengths, tau=config.coba_tau)
    normalize = config.normalize if config.loss_weighting == "achievement" else "none"
    exponents = {"gamma": config.gamma, "margin": config.margin}
    return AchievementState(
        dataset_tasks.train, dataset_tasks.reference(), ema=config.ema, normalize=normalize, **exponents
    )


def _references(given: list[str], dataset_tasks: dict[str, DatasetTask]) -> dict[str, float]:
    found: dict[str, float] = {}
    for entry in given:
        name, _, value = entry.partition("=")
        if name in found:
            raise UserError(f"reference_f1: {name} is given twice. Give it once.")
        if name not in dataset_tasks:
            raise UserError(f'reference_f1: unknown dataset task "{name}".{nearest(name, dataset_tasks)}')
        try:
            found[name] = float(value)
        except ValueError:
            found[name] = 0.0
        if not 0 < found[name] <= 100:
            raise UserError(f'reference_f1: "{entry}" has no percentage. Write {name}=78.9.')
    return found
