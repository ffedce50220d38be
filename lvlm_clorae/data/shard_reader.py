"""From places to samples: reads of single samples in shards wherever they lie, by the index's offsets."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from lvlm_clorae.data.index import INDEX_NAME, Index, ShardEntry
from lvlm_clorae.data.reader import MAX_RECORD_BYTES, BadSample, decode_sample, parse_record
from lvlm_clorae.data.sources import LocalSource, Source

if TYPE_CHECKING:
    from lvlm_clorae.data.plan import Place


class RawSample(NamedTuple):
    """A checked sample with its picture's original bytes."""

    shard: str
    key: str
    sample: dict[str, Any]
    picture: bytes | None


class ShardReader:
    """Reads samples by their place. DataLoader workers may share it, forked or spawned.

    Args:
        index: of all datasets
        sources: where the shards of each dataset lie, by its name; or the directory of them all
    """

    def __init__(self, index: Index, sources: Mapping[str, Source] | Path) -> None:
        self.index = index
        self._sources = dict.fromkeys(index.datasets, LocalSource(sources)) if isinstance(sources, Path) else sources

    def shards(self, dataset: str, split: str) -> Sequence[ShardEntry]:
        """The shards of a split, in the index's order; empty where it is absent."""
        return self.index.dataset(dataset).splits.get(split, ())

    def read(self, dataset: str, split: str, place: Place) -> RawSample:
        """The sample at ``place``.

        Raises:
            BadSample: it is not sound; names shard and key.
            UserError: its bytes cannot be had.
        """
        shard = self.shards(dataset, split)[place.shard]
        stops = shard.offsets[place.sample + 1 : place.sample + 2] or [shard.bytes]
        start, stop = shard.offsets[place.sample], stops[0]
        if stop - start > MAX_RECORD_BYTES:
            raise BadSample(
                f"{shard.name}: {INDEX_NAME} gives the sample at byte {start} {stop - start} bytes, more than the "
                f"{MAX_RECORD_BYTES} that one may have. Check the shards with: lvlm-clorae shards verify"
            )
        data = self._sources[dataset].read(shard, start, stop)
        record = parse_record(data, shard.name)
        if record is None:
            raise BadSample(
                f"{shard.name}: no sample at byte {start}, where {INDEX_NAME} says one starts. "
                "Check the shards with: lvlm-clorae shards verify"
            )
        sample = decode_sample(record.json, f"{shard.name}, {record.key}")
        return RawSample(shard.name, record.key, sample, record.image)

    def read_all(self, dataset: str, split: str, places: Sequence[Place]) -> list[RawSample | BadSample]:
        """The samples at ``places``, from a remote source several at once; a bad one is returned, not raised."""

        def one(place: Place) -> RawSample | BadSample:
            try:
                return self.read(dataset, split, place)
            except BadSample as error:
                return error

        at_once = min(self._sources[dataset].concurrent, len(places))
        if at_once <= 1:
            return [one(place) for place in places]
        with ThreadPoolExecutor(at_once) as pool:
            return list(pool.map(one, places))
