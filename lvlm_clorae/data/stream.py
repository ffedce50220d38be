"""From the plan to samples: random reads of single samples in local shards, by the index's offsets."""

from __future__ import annotations

import io
import os
import tarfile
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any

from lvlm_clorae.data.index import Index, ShardEntry
from lvlm_clorae.data.plan import Place
from lvlm_clorae.data.reader import decode_sample, read_records
from lvlm_clorae.errors import UserError

MAX_OPEN_SHARDS = 16


class ShardReader:
    """Reads the samples of one directory by their place.

    It holds open files. DataLoader workers may share it all the same: a forked one reads without moving the offset that
    it has in common with its parent, a spawned one opens the files anew.

    Args:
        directory: where the shards of ``index`` lie
    """

    def __init__(self, directory: Path, index: Index) -> None:
        self.directory, self.index = directory, index
        self._open: OrderedDict[str, IO[bytes]] = OrderedDict()

    def shards(self, dataset: str, split: str) -> Sequence[ShardEntry]:
        """The shards of a split, in the index's order; empty where it is absent."""
        return self.index.dataset(dataset).splits.get(split, ())

    def read(self, dataset: str, split: str, place: Place) -> tuple[str, dict[str, Any], bytes | None]:
        """Key, checked sample and picture bytes.

        Raises:
            UserError: the shard cannot be read there, or the sample is not sound; names shard and key.
        """
        shard = self.shards(dataset, split)[place.shard]
        offsets = (*shard.offsets, shard.bytes)
        start, stop = offsets[place.sample], offsets[place.sample + 1]
        try:
            data = os.pread(self._handle(shard.name).fileno(), stop - start, start)
        except OSError as error:
            raise UserError(f"{self.directory / shard.name}: cannot be read ({error.strerror}).") from None
        # An empty first block ends a tar, which Python's releases report each in their own way.
        empty = not data[: tarfile.BLOCKSIZE].strip(b"\0")
        record = None if empty else next(read_records(io.BytesIO(data), shard.name), None)
        if record is None:
            raise UserError(
                f"{self.directory / shard.name}: no sample at byte {start}, where index.json says one starts. "
                "Check the shards with: lvlm-clorae shards verify"
            )
        return record.key, decode_sample(record.json, f"{shard.name}, {record.key}"), record.image

    def _handle(self, name: str) -> IO[bytes]:
        if name not in self._open:
            self._open[name] = open(self.directory / name, "rb")  # noqa: SIM115 - kept open, see close
            if len(self._open) > MAX_OPEN_SHARDS:
                self._open.popitem(last=False)[1].close()
        self._open.move_to_end(name)
        return self._open[name]

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_open": OrderedDict()}

    def close(self) -> None:
        """Close the open files."""
        while self._open:
            self._open.popitem()[1].close()
