"""Two ranks that each stand for a machine with its own copy of the shards."""

from __future__ import annotations

import platform
import sys
from pathlib import Path

from lvlm_clorae.data.dataset import ShardDataset
from lvlm_clorae.data.storage import open_storages
from lvlm_clorae.errors import UserError
from lvlm_clorae.training import distributed
from lvlm_clorae.training.checks import verify_shards

if __name__ == "__main__":
    folder = Path(sys.argv[-1])
    distributed.start()
    machine = f"machine{distributed.rank()}"
    platform.node = lambda: machine
    try:
        found = str(verify_shards(ShardDataset(*open_storages(str(folder / machine)))))
    except UserError as error:
        found = str(error)
    (folder / f"{machine}.txt").write_text(found, encoding="utf-8")
    distributed.stop()
