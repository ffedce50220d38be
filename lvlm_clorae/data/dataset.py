"""A map-style dataset over the shards of a split: a sample's location in, a checked sample with its image bytes out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import groupby
from operator import attrgetter
from pathlib import Path
from typing import Any

from torch.utils.data import Dataset

from lvlm_clorae.data.index import Index, ShardEntry
from lvlm_clorae.data.reader import read_sample
from lvlm_clorae.data.sampler import SampleRef
from lvlm_clorae.data.storage import LocalStorage, ShardStorage
from lvlm_clorae.errors import UserError


@dataclass(frozen=True)
class Sample:
    """A sample of a shard, or the error with which reading it failed."""

    ref: SampleRef
    shard: str
    """File name of the shard."""
    key: str = ""
    data: dict[str, Any] = field(default_factory=dict)
    """The checked annotations (docs/data.md)."""
    image: bytes | None = None
    """The original bytes of the image, if the sample has one."""
    error: UserError | None = None
    """An InvalidSample, or another UserError if the shard cannot be read."""


class ShardDataset(Dataset[Sample]):
    """The samples of one split, by their location. DataLoader workers may share it, forked or spawned.

    ``storages`` maps each dataset to the storage of its shards, or is the local directory of all shards.
    """

    limit: int | None = None  # maximum number of samples of a dataset task in refs

    def __init__(self, index: Index, storages: Mapping[str, ShardStorage] | Path, split: str = "train") -> None:
        if isinstance(storages, Path):
            storages = dict.fromkeys(index.datasets, LocalStorage(storages))
        self.index, self.storages, self.split = index, storages, split

    def of_split(self, split: str) -> ShardDataset:
        """Return the same datasets' samples of another split."""
        return ShardDataset(self.index, self.storages, split)

    def shards(self, dataset: str) -> Sequence[ShardEntry]:
        """Return the shards of a dataset in the index's order; empty if it has no such split."""
        return self.index.dataset(dataset).splits.get(self.split, ())

    def refs(self, dataset_task: str) -> list[SampleRef]:
        """Return the location of every sample of a dataset task, or the first ``limit``, in the order written."""
        shards = enumerate(self.shards(dataset_task.partition("/")[0]))
        return [SampleRef(dataset_task, n, row) for n, shard in shards for row in range(shard.samples)][: self.limit]

    def __getitem__(self, ref: SampleRef) -> Sample:
        """Read one sample. Raises InvalidSample, naming shard and key; UserError if the shard cannot be read."""
        sample = self._read(ref)
        if sample.error:
            raise sample.error
        return sample

    def __getitems__(self, refs: Sequence[SampleRef]) -> list[Sample]:
        """Read several samples, concurrently from a remote storage; an error is returned in the sample, not raised."""
        samples: list[Sample] = []
        for dataset, group in groupby(refs, attrgetter("dataset")):
            run = list(group)
            threads = min(self.storages[dataset].concurrent_reads, len(run))
            if threads == 1:
                samples += map(self._read, run)
                continue
            with ThreadPoolExecutor(threads) as pool:
                samples += pool.map(self._read, run)
        return samples

    def _read(self, ref: SampleRef) -> Sample:
        shard = self.shards(ref.dataset)[ref.shard]
        try:
            return Sample(ref, shard.name, *read_sample(self.storages[ref.dataset], shard, ref.sample))
        except UserError as error:
            return Sample(ref, shard.name, error=error)
