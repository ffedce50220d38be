"""Gather items and update the achievement weights on two ranks. Writes a JSON file per rank."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from lvlm_clorae.losses.achievement import AchievementState
from lvlm_clorae.training import distributed
from lvlm_clorae.training.loop import set_weights

REFERENCE = {"a/entity": 80.0, "b/relation": 60.0}


def main(directory: Path) -> None:
    distributed.start()
    rank = distributed.rank()
    state = AchievementState(REFERENCE, REFERENCE, gamma=1.5, margin=1.1)
    set_weights(state, {"a/entity": 33.3 + rank * 1e-3, "b/relation": 12.0})
    found = {
        "weights": state.weights,
        "f1": state.f1,
        "gathered": distributed.gathered([f"{rank}a", f"{rank}b"][: 2 - rank]),
    }
    (directory / f"{rank}.json").write_text(json.dumps(found))
    distributed.stop()


if __name__ == "__main__":
    main(Path(sys.argv[-1]))
