"""In place of train.py where only what SLURM and the scripts do is asked: starts at once, keeps its exit codes.

Each rank appends to ``OUTPUT/rank-N`` a line of its variables at its start, ``saved`` at a signal; it ends with the
code that ``OUTPUT/end``, or ``end-N`` for rank N alone, holds as soon as that is there. With ``--deaf SECONDS`` the
first run listens to signals only then.
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
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--resume", choices=["auto"], required=True)
    parser.add_argument("--deaf", type=float, default=0)
    arguments = parser.parse_args()
    path = arguments.output / f"rank-{os.environ['RANK']}"
    again = path.exists()
    variables = {name: os.environ.get(name) for name in VARIABLES}
    with open(path, "a", encoding="utf-8", buffering=1) as log:
        log.write(json.dumps({**variables, "host": socket.gethostname()}) + "\n")
        if not again:
            time.sleep(arguments.deaf)
        told: list[int] = []
        for number in (signal.SIGUSR1, signal.SIGTERM):
            signal.signal(number, lambda number, _: told.append(number))
        ends = [arguments.output / name for name in ("end", f"end-{os.environ['RANK']}")]
        while not any(end.exists() for end in ends):
            if told:
                time.sleep(0.2 * int(os.environ["RANK"]))  # ranks end one after another
                log.write(json.dumps("saved") + "\n")
                return 75
            time.sleep(0.05)
    return int(next(end for end in ends if end.exists()).read_text())


if __name__ == "__main__":
    raise SystemExit(main())
