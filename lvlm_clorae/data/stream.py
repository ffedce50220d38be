"""The training stream of one rank: batches by the plan, from any number of worker processes, resumable anywhere."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterator, Mapping
from typing import Any

import torch
import webdataset

from lvlm_clorae.data.batches import Batch, Batcher, Instance
from lvlm_clorae.data.index import DatasetEntry
from lvlm_clorae.data.plan import EpochPlan, MicroStep, Order, micro_steps
from lvlm_clorae.data.units import Unit
from lvlm_clorae.data.workers import leave_signals_to_rank
from lvlm_clorae.errors import UserError

STATE_VERSION = 1
logger = logging.getLogger(__name__)


class TrainingStream:
    """Micro-batches of the units, each of one unit; all ranks get the same unit at the same time.

        for batch in stream:      what is left of the epoch
            ...
        stream.next_epoch()

    Args:
        batcher: of the training split
        units: what is trained, by name
        order: see :class:`~lvlm_clorae.data.plan.Order`; its block is a multiple of ``world_size * micro_batch``
        workers: processes that read, decode and tokenise; 0: none beside this one
    """

    def __init__(
        self,
        batcher: Batcher,
        units: Mapping[str, Unit],
        order: Order,
        *,
        rank: int = 0,
        world_size: int = 1,
        micro_batch: int = 1,
        workers: int = 0,
    ) -> None:
        self.batcher, self.units, self.order = batcher, units, order
        self.rank, self.world_size, self.micro_batch, self.workers = rank, world_size, micro_batch, workers
        self.epoch = 0
        self.done = 0
        """Samples of the epoch that all ranks together were given, filling ones included."""
        self._plan: EpochPlan | None = None
        self._check_block()

    @property
    def micro_step(self) -> int:
        """Micro-steps of the epoch that are wholly done, counted in this run's width."""
        return self.done // self.samples_per_micro_step

    def __len__(self) -> int:
        """Micro-steps of the whole epoch."""
        return len(self.plan) * self.order.block // self.samples_per_micro_step

    @property
    def plan(self) -> EpochPlan:
        """Of this epoch."""
        if self._plan is None or (self._plan.epoch, self._plan.order) != (self.epoch, self.order):
            self._plan = EpochPlan(self._shard_sizes(), self.order, self.epoch)
        return self._plan

    def __iter__(self) -> Iterator[Batch]:
        """The rest of the epoch. What is yielded counts as done, so that a state taken after a step holds it.

        Raises:
            UserError: a shard cannot be read, or a sample is not sound and the policy is ``error``.
        """
        steps = _Steps(
            self._shard_sizes(), self.order, self.epoch, (self.rank, self.world_size, self.micro_batch, self.done)
        )
        pipeline = webdataset.DataPipeline(steps, webdataset.split_by_worker, _Batches(self.batcher, self.units))
        # Its own generator: drawing a seed for workers must not move the random state that dropout goes on from.
        loader = webdataset.WebLoader(
            pipeline,
            batch_size=None,
            num_workers=self.workers,
            worker_init_fn=leave_signals_to_rank,
            generator=torch.Generator(),
        )
        for batch in loader:
            if isinstance(batch, UserError):
                raise batch
            self.done = (self.micro_step + 1) * self.samples_per_micro_step
            yield batch

    def next_epoch(self) -> None:
        """Go to the beginning of the next epoch."""
        self.epoch, self.done = self.epoch + 1, 0

    def state_dict(self) -> dict[str, Any]:
        """Where the stream is and what decides its order: a few numbers, and a short sum of each dataset's shards."""
        return {
            "version": STATE_VERSION,
            "epoch": self.epoch,
            "done": self.done,
            **vars(self.order),
            "data": self._sums(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from there, on any number of ranks and workers; the order of samples is the state's, not this run's.

        Raises:
            UserError: another version; other data, naming the datasets; a block that these ranks cannot share.
        """
        if state.get("version") != STATE_VERSION:
            raise UserError(
                f"The stream's state has version {state.get('version')!r}, but this program reads {STATE_VERSION}. "
                "Go on with the release that wrote it."
            )
        before, now = state["data"], self._sums()
        changed = sorted(name for name in {*before, *now} if before.get(name) != now.get(name))
        if changed:
            raise UserError(
                f"The training shards of {', '.join(changed)} are not those that the run began with. "
                "Give it those again, or start another run."
            )
        self.order = Order(**{name: state[name] for name in vars(self.order)})
        self.epoch, self.done = state["epoch"], state["done"]
        self._check_block()

    @property
    def samples_per_micro_step(self) -> int:
        """Of all ranks together."""
        return self.world_size * self.micro_batch

    def _shard_sizes(self) -> dict[str, list[int]]:
        return {
            name: [shard.samples for shard in self.batcher.reader.shards(unit.dataset, self.batcher.split)]
            for name, unit in self.units.items()
        }

    def _check_block(self) -> None:
        if self.order.block % self.samples_per_micro_step:
            raise UserError(
                f"A block of {self.order.block} samples cannot be shared by {self.world_size} ranks of micro-batch "
                f"{self.micro_batch}: it is no multiple of {self.samples_per_micro_step}. "
                f"Choose ranks and micro_batch whose product divides {self.order.block}."
            )

    def _sums(self) -> dict[str, str]:
        index, split = self.batcher.reader.index, self.batcher.split
        names = sorted({unit.dataset for unit in self.units.values()})
        return {name: _sum(index.dataset(name), split) for name in names}


def _sum(dataset: DatasetEntry, split: str) -> str:
    shards = "".join(f"{shard.sha256}/{shard.samples}\n" for shard in dataset.splits[split])
    return hashlib.sha256(shards.encode()).hexdigest()[:16]


class _Steps:
    """The first stage of the pipeline: the micro-steps of a rank, of which a worker takes every so many-th."""

    def __init__(
        self, shard_sizes: dict[str, list[int]], order: Order, epoch: int, how: tuple[int, int, int, int]
    ) -> None:
        self.plan, self.how = (shard_sizes, order, epoch), how

    def __call__(self) -> Iterator[MicroStep]:
        return micro_steps(EpochPlan(*self.plan), *self.how)


class _Batches:
    """The last stage. A UserError is handed over like a batch, in its turn: a DataLoader would put a worker's
    traceback into its message.
    """

    def __init__(self, batcher: Batcher, units: Mapping[str, Unit]) -> None:
        self.batcher, self.units = batcher, units

    def __call__(self, steps: Iterator[MicroStep]) -> Iterator[Batch | UserError]:
        for step in steps:
            try:
                yield self.batcher([Instance(self.units[step.unit], place) for place in step.places])
            except UserError as error:
                yield error
                return


class BadSamples:
    """Counts what was bad and warns of the first few, then of ever fewer."""

    def __init__(self, loud: int = 5) -> None:
        self.count, self._loud = 0, loud

    def add(self, messages: list[str]) -> None:
        """The ``bad`` of a batch."""
        for message in messages:
            self.count += 1
            if self.count <= self._loud or self.count.bit_count() == 1:
                logger.warning("bad sample %d: %s", self.count, message)
