"""Names of systems in tables, and the paper's published figures (arXiv 2505.06303, Tables 2 to 5).

Figures are as printed. C-LoRAE base has 503.9 for All, although its figures add up to 504.3. MED of C-LoRAE large is
64.5 in Table 2 and 64.0 in Table 3; All, 521.3, is the sum with 64.0. Trained parameters are from Table 5, those of the
ablations from Table 3.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lvlm_clorae.training.config import TrainConfig
from lvlm_clorae.training.config_loading import make_config
from lvlm_clorae.training.run_directory import MAY_CHANGE

ALL = "All"  # column with the sum of the dataset tasks' F1
DATASET_TASKS = (
    *("twitter15/entity", "twitter17/entity", "snap/entity", "mre_v1/relation", "mre_v2/relation"),
    *("m2e2/trigger", "m2e2/argument"),
)
"""Columns of Tables 2 and 3; the last two are MED and MEAE."""
TESTED_ONLY = "m2e2"  # held out from training in every row: the events are trained on ACE 2005 and SWiG
UNSEEN = ("twitter17", "mre_v2")  # also held out in Table 4

SYSTEMS = {
    "clorae": "C-LoRAE",
    "lora": "LoRA",
    "moslora": "MoSLoRA",
    "loramoe": "LoRAMoE",
    "full": "full fine-tuning",
    "none": "base alone",
}
"""Names in tables by the value of ``adapter``."""
UMIE = "UMIE"  # full fine-tuning with UMIE's fusion
ABLATIONS = {
    "use_experts": "only universal",
    "use_universal": "only task experts",
    "use_gate": "no gate",
    "beta": "no MIM",
    "achievement": "no achievement loss",
}
"""Names in tables by the C-LoRAE setting that is switched off (Table 3 of the paper)."""

# These may change with the number of ranks, which a configuration lacks.
_BATCH = {"per_device_train_batch_size", "gradient_accumulation_steps", "global_micro_batch"}
UNDECIDING = (MAY_CHANGE - _BATCH) | {"seed"}  # settings in which repetitions of one run may differ


@dataclass(frozen=True)
class PaperRow:
    """A row of the paper's tables."""

    model: str  # preset of the base
    adapter: str  # value of the setting ``adapter``
    table: str
    f1: dict[str, float]  # test F1 in percent by dataset task, and All, as far as printed
    without: tuple[str, ...] = ()  # ablations, named as in ABLATIONS
    held_out: tuple[str, ...] = ()  # datasets that are not trained on, besides M2E2
    trained: float | None = None  # parameters in millions
    forward: float | None = None  # GFLOPs; the paper does not say for which input

    @property
    def name(self) -> str:
        """Name in tables."""
        system = UMIE if self.adapter == "full" else SYSTEMS[self.adapter]
        held_out = (f"{' and '.join(self.held_out)} held out",) if self.held_out else ()
        return ", ".join([f"{system} {self.model.rpartition('-')[2]}", *self.without, *held_out])

    @property
    def recipe(self) -> str:
        """Name of its file in recipes/paper, without the suffix."""
        system = UMIE if self.adapter == "full" else self.adapter
        words = [system, self.model.rpartition("-")[2], *self.without, *(("unseen",) if self.held_out else ())]
        return "-".join(words).lower().replace(" ", "-")

    def settings(self) -> TrainConfig:
        """The configuration in that file, without ablations and the location of the data."""
        return recipe_config(self.model, self.adapter, hold_out=[TESTED_ONLY, *self.held_out])


def _row(adapter: str, size: str, f1: str, trained: float | None, forward: float | None, *without: str) -> PaperRow:
    scores = dict(zip((*DATASET_TASKS, ALL), map(float, f1.split()), strict=True)) if f1 else {}
    table = "Table 3" if without else "Table 2" if f1 else "Table 5"
    return PaperRow(f"flan-t5-{size}", adapter, table, scores, without, trained=trained, forward=forward)


def _unseen(adapter: str, size: str, *figures: float) -> PaperRow:
    f1 = {f"{UNSEEN[0]}/entity": figures[0], f"{UNSEEN[1]}/relation": figures[1]}
    return PaperRow(f"flan-t5-{size}", adapter, "Table 4", f1, held_out=UNSEEN)


ROWS = (
    _row("full", "base", "76.1 88.1 87.7 84.3 74.8 60.5 22.5 494.0", 287.0, 21.3),
    _row("full", "large", "77.2 90.7 90.5 85.0 75.5 61.0 23.6 503.5", 843.0, 73.2),
    _row("full", "xl", "78.2 91.4 91.0 86.4 76.2 62.1 24.5 509.8", None, None),
    _row("clorae", "base", "74.4 86.3 85.8 87.3 81.4 60.7 28.4 503.9", 30.4, 23.2),
    _row("clorae", "large", "75.9 88.9 89.3 89.2 82.8 64.5 31.2 521.3", 39.9, 75.7),
    _row("clorae", "xl", "77.8 89.8 90.5 89.6 83.2 63.5 32.6 527.0", None, None),
    _row("clorae", "large", "74.5 87.8 88.1 82.1 74.9 61.0 25.3 493.7", 19.0, None, "only universal"),
    _row("clorae", "large", "72.9 85.2 82.3 85.8 81.2 62.4 29.5 499.3", 19.0, None, "only task experts"),
    _row("clorae", "large", "74.9 87.8 88.4 86.4 80.8 61.8 27.8 507.9", 38.0, None, "no gate"),
    _row("clorae", "large", "74.3 87.2 86.8 87.6 81.7 63.3 29.8 510.7", 39.0, None, "no achievement loss"),
    _row("clorae", "large", "75.4 88.2 88.1 87.1 82.0 63.8 30.2 514.8", 39.0, None, "no MIM"),
    _row("lora", "base", "", 15.5, 22.0),
    _row("lora", "large", "", 20.3, 74.1),
    _row("moslora", "base", "", 15.8, 26.3),
    _row("moslora", "large", "", 20.4, 89.1),
    _row("loramoe", "base", "", 30.5, 22.7),
    _row("loramoe", "large", "", 40.0, 75.2),
    _unseen("full", "base", 66.8, 67.3),
    _unseen("full", "large", 68.5, 68.8),
    _unseen("clorae", "base", 66.2, 76.5),
    _unseen("clorae", "large", 67.8, 78.2),
)


def paper_row(config: TrainConfig) -> PaperRow | None:
    """The row with this system, base and held-out datasets; other settings are not compared."""
    held_out = set(config.hold_out) - {TESTED_ONLY}
    for row in ROWS:
        same = (row.model, row.adapter, list(row.without), set(row.held_out))
        if same == (Path(config.model).name, config.adapter, ablations(config), held_out):
            return row
    return None


def unlike(config: TrainConfig, row: PaperRow) -> dict[str, Any]:
    """The settings of a run that differ from the recipe of its row, except where base and data are stored."""
    found = deviations(config, row.settings())
    if set(config.hold_out) == {TESTED_ONLY, *row.held_out}:
        found.pop("hold_out", None)
    return {name: value for name, value in found.items() if name not in ("model", "shards")}


def deciding(config: TrainConfig) -> dict[str, Any]:
    """The settings that repetitions of a run have in common."""
    return {name: value for name, value in vars(config).items() if name not in UNDECIDING}


def system(config: TrainConfig) -> str:
    """Name the system that a run trains."""
    return UMIE if (config.adapter, config.fusion) == ("full", "gated") else SYSTEMS.get(config.adapter, config.adapter)


def recipe_config(model: str, adapter: str, umie: bool = True, hold_out: Sequence[str] = ()) -> TrainConfig:
    """The paper's recipe of a system. The achievement loss is on for C-LoRAE only; full fine-tuning is UMIE's."""
    fusion = "gated" if adapter == "full" and umie else "concat"
    settings = {"model": model, "adapter": adapter, "fusion": fusion, "achievement": adapter == "clorae"}
    return make_config({**settings, "hold_out": list(hold_out)} if hold_out else settings)


def deviations(config: TrainConfig, ordinary: TrainConfig) -> dict[str, Any]:
    """The deciding settings that differ from ``ordinary``, without ablations."""
    off, own = set(ablations(config)), deciding(config).items()
    return {name: x for name, x in own if x != getattr(ordinary, name) and ABLATIONS.get(name) not in off}


def ablations(config: TrainConfig) -> list[str]:
    """Names of the ablations of a C-LoRAE run."""
    if config.adapter != "clorae":
        return []
    return [word for name, word in ABLATIONS.items() if not getattr(config, name)]


def names(configs: Sequence[TrainConfig]) -> list[str]:
    """Name runs by system, base where the bases differ, ablations, and unusual settings in which the runs differ.

    Names may be equal, for example if two values read alike.
    """
    settings = [deciding(config) for config in configs]
    varied = {name for name in settings[0] if any(other[name] != settings[0][name] for other in settings)}
    found = []
    for config in configs:
        base = f" {Path(config.model).name}" if "model" in varied else ""
        others = deviations(config, recipe_config(config.model, config.adapter, system(config) == UMIE))
        words = [f"{name}={format_value(value)}" for name, value in others.items() if name in varied]
        found.append(", ".join([system(config) + base, *ablations(config), *words]))
    return found


def format_value(value: Any) -> str:
    """Format a setting's value for a table."""
    if value is None or value == []:
        return "none"
    if isinstance(value, bool):
        return str(value).lower()
    return " ".join(value) if isinstance(value, list) else str(value)
