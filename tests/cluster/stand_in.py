"""Replacement of train.py for tests of SLURM and the batch scripts: starts immediately, has the same exit codes.

Each rank appends its environment variables to ``OUTPUT/rank-N`` at its start, and ``saved`` at a signal. It exits with
the code in ``OUTPUT/end``, or in ``end-N`` for rank N only, when that file exists. With ``--deaf SECONDS`` the first
run handles signals only after that time.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import socket
import time
from pathlib import Path

VARIABLES = "RANK LOCAL_RANK WORLD_SIZE LOCAL_WORLD_SIZE MASTER_ADDR MASTER_PORT CUDA_VISIBLE_DEVICES".split()


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--resume_from_checkpoint", choices=["auto"], required=True)
    parser.add_argument("--deaf", type=float, default=0)
    arguments = parser.parse_args()
    path = arguments.output_dir / f"rank-{os.environ['RANK']}"
    again = path.exists()
    variables = {name: os.environ.get(name) for name in VARIABLES}
    with open(path, "a", encoding="utf-8", buffering=1) as log:
        log.write(json.dumps({**variables, "host": socket.gethostname()}) + "\n")
        if not again:
            time.sleep(arguments.deaf)
        received: list[int] = []
        for number in (signal.SIGUSR1, signal.SIGTERM):
            signal.signal(number, lambda number, _: received.append(number))
        ends = [arguments.output_dir / name for name in ("end", f"end-{os.environ['RANK']}")]
        while not any(end.exists() for end in ends):
            if received:
                time.sleep(0.2 * int(os.environ["RANK"]))  # ranks exit one after another
                log.write(json.dumps("saved") + "\n")
                return 75
            time.sleep(0.05)
    return int(next(end for end in ends if end.exists()).read_text())


if __name__ == "__main__":
    raise SystemExit(main())
