"""The paper's own figures, as rows that a run can be put beside (arXiv 2505.06303, Tables 2 to 5).

As printed: C-LoRAE base has 503.9 for All, though its figures add up to 504.3. MED of C-LoRAE large is 64.5 in Table 2
and 64.0 in Table 3; All, 521.3, is the sum with 64.0. Trained parameters are Table 5's, of the ablations Table 3's.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lvlm_clorae.analysis.systems import SYSTEMS, UMIE, ablations, deviations
from lvlm_clorae.sweep.collect import ALL
from lvlm_clorae.training.config import TrainConfig, make_config

UNITS = (
    *("twitter15/entity", "twitter17/entity", "snap/entity", "mre_v1/relation", "mre_v2/relation"),
    *("m2e2/trigger", "m2e2/argument"),
)
"""The columns of Tables 2 and 3; MED and MEAE are the last two."""
TESTED_ONLY = "m2e2"
"""Trained on ACE 2005 and SWiG, tested on M2E2: its other samples are held out in every row."""
UNSEEN = ("twitter17", "mre_v2")
"""Held out as well in Table 4."""


@dataclass(frozen=True)
class PaperRow:
    """A row of the paper.

    Args:
        model: preset of the base
        adapter: as in the configuration
        without: the ablations, as :data:`ABLATIONS` calls them
        held_out: datasets that are not trained on, besides M2E2
        f1: test F1 in percent by unit, and ``All``, as far as printed
        trained: trained parameters in millions
        table: where it stands
    """

    model: str
    adapter: str
    table: str
    f1: dict[str, float]
    without: tuple[str, ...] = ()
    held_out: tuple[str, ...] = ()
    trained: float | None = None

    @property
    def name(self) -> str:
        system = UMIE if self.adapter == "full" else SYSTEMS[self.adapter]
        held_out = (f"{' and '.join(self.held_out)} held out",) if self.held_out else ()
        return ", ".join([f"{system} {self.model.rpartition('-')[2]}", *self.without, *held_out])

    @property
    def recipe(self) -> str:
        """Its file in recipes/paper, without the ending."""
        system = UMIE if self.adapter == "full" else self.adapter
        words = [system, self.model.rpartition("-")[2], *self.without, *(("unseen",) if self.held_out else ())]
        return "-".join(words).lower().replace(" ", "-")

    def settings(self) -> TrainConfig:
        """What that file says, ablations aside; where the data lies is the user's."""
        return make_config(
            {
                "model": self.model,
                "adapter": self.adapter,
                "fusion": "gated" if self.adapter == "full" else "concat",
                "achievement": self.adapter == "clorae",
                "hold_out": [TESTED_ONLY, *self.held_out],
            }
        )


def _table(adapter: str, size: str, figures: str, trained: float | None = None, *without: str) -> PaperRow:
    f1 = dict(zip((*UNITS, ALL), map(float, figures.split()), strict=True)) if figures else {}
    where = "Table 3" if without else "Table 2" if figures else "Table 5"
    return PaperRow(f"flan-t5-{size}", adapter, where, f1, without, trained=trained)


def _unseen(adapter: str, size: str, *figures: float) -> PaperRow:
    f1 = {f"{UNSEEN[0]}/entity": figures[0], f"{UNSEEN[1]}/relation": figures[1]}
    return PaperRow(f"flan-t5-{size}", adapter, "Table 4", f1, held_out=UNSEEN)


ROWS = (
    _table("full", "base", "76.1 88.1 87.7 84.3 74.8 60.5 22.5 494.0", 287.0),
    _table("full", "large", "77.2 90.7 90.5 85.0 75.5 61.0 23.6 503.5", 843.0),
    _table("full", "xl", "78.2 91.4 91.0 86.4 76.2 62.1 24.5 509.8"),
    _table("clorae", "base", "74.4 86.3 85.8 87.3 81.4 60.7 28.4 503.9", 30.4),
    _table("clorae", "large", "75.9 88.9 89.3 89.2 82.8 64.5 31.2 521.3", 39.9),
    _table("clorae", "xl", "77.8 89.8 90.5 89.6 83.2 63.5 32.6 527.0"),
    _table("clorae", "large", "74.5 87.8 88.1 82.1 74.9 61.0 25.3 493.7", 19.0, "only universal"),
    _table("clorae", "large", "72.9 85.2 82.3 85.8 81.2 62.4 29.5 499.3", 19.0, "only task experts"),
    _table("clorae", "large", "74.9 87.8 88.4 86.4 80.8 61.8 27.8 507.9", 38.0, "no gate"),
    _table("clorae", "large", "74.3 87.2 86.8 87.6 81.7 63.3 29.8 510.7", 39.0, "no achievement loss"),
    _table("clorae", "large", "75.4 88.2 88.1 87.1 82.0 63.8 30.2 514.8", 39.0, "no MIM"),
    _table("lora", "base", "", 15.5),
    _table("lora", "large", "", 20.3),
    _table("moslora", "base", "", 15.8),
    _table("moslora", "large", "", 20.4),
    _table("loramoe", "base", "", 30.5),
    _table("loramoe", "large", "", 40.0),
    _unseen("full", "base", 66.8, 67.3),
    _unseen("full", "large", 68.5, 68.8),
    _unseen("clorae", "base", 66.2, 76.5),
    _unseen("clorae", "large", 67.8, 78.2),
)


def paper_row(config: TrainConfig) -> PaperRow | None:
    """The row of this system on this base with these datasets held out, whatever else the run has otherwise."""
    held_out = set(config.hold_out) - {TESTED_ONLY}
    for row in ROWS:
        same = (row.model, row.adapter, list(row.without), set(row.held_out))
        if same == (Path(config.model).name, config.adapter, ablations(config), held_out):
            return row
    return None


def unlike(config: TrainConfig, row: PaperRow) -> dict[str, Any]:
    """In what a run differs from the recipe of its row: {setting: its value}; where base and data lie is not asked."""
    found = deviations(config, row.settings())
    if set(config.hold_out) == {TESTED_ONLY, *row.held_out}:
        found.pop("hold_out", None)
    return {name: value for name, value in found.items() if name not in ("model", "shards")}
