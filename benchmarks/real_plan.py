"""The runs of real.py: the comparison at equal trained parameters, what images and boxes add, and the full run.

The comparison tunes three systems on a grid of three rates; the others take the rate of LoRA or C-LoRAE. Tuning trains
for one epoch and scores dev only.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from plan import MAIN, Plan, System

DOCUMENTS = {"sroie": 60, "funsd": 150}


@dataclass(frozen=True)
class Variant:
    """The data of a group of runs.

    Args:
        train: dataset -> maximum number of training samples
        boxes: whether the text of documents has the boxes of its lines
        images: whether the base reads images
        settings: settings besides those of every run
    """

    train: Mapping[str, int]
    boxes: bool = False
    images: bool = False
    settings: Mapping[str, Any] = field(default_factory=dict)


COMPARED = {"twitter15": 400, "mre_v1": 250, "m2e2": 400, "sroie": 40, "funsd": 40}
EVERYTHING = dict.fromkeys(("twitter15", "mre_v1", "sroie", "funsd"), 10**6)
_LONG = {"max_source_length": 2048}  # else boxes would cost text, since digits are tokens
VARIANTS = {
    "comparison": Variant(COMPARED),
    "text": Variant(DOCUMENTS),
    "boxes": Variant(DOCUMENTS, boxes=True, settings=_LONG),
    "image": Variant(DOCUMENTS, boxes=True, images=True, settings=_LONG),
    "full": Variant(EVERYTHING, settings={"num_train_epochs": 1}),
}


def adapter(method: str, rank: int, experts: int = 1, **settings: Any) -> dict[str, Any]:
    """Settings of an adapter whose experts start at the scale of LoRA with alpha = 2 r.

    Args:
        experts: number of experts among which a gate starts evenly, which divides the scale of each
    """
    return {"adapter": method, "lora_rank": rank, "lora_alpha": 2 * experts * rank, **settings}


# Trained parameters are equal to 3.5 percent, which a test counts: those of C-LoRAE with a universal expert of rank 32
# and four of rank 8.
_CLORAE = adapter("clorae", 32, 2)
_LORA_2R = adapter("lora", 66)
_LIKE_LORA: dict[str, Any] = {"seeds": 1, "like": MAIN[1]}
TASKS = {"mner": "entities", "mre": "relations", "mee": "events", "document": "documents"}
"""Task -> its name in the table."""
EXAMPLES = {"frozen, zero-shot": 0, "frozen, three examples": 3}
"""System without training -> number of examples in its prompts."""
LOOKUP = "annotation look-up"
"""The system that looks up the training annotation (text_floors.py), without a model."""
SYSTEMS = {
    MAIN[0]: System(_CLORAE, seeds=3),
    MAIN[1]: System(_LORA_2R, seeds=3),
    "C-LoRAE, no MIM": System(_CLORAE | {"beta": 0.0}, seeds=1, like=MAIN[0]),
    "LoRAMoE": System(adapter("loramoe", 32, 4), **_LIKE_LORA),
    "MTL-LoRA": System(adapter("mtllora", 31), **_LIKE_LORA),
    "HydraLoRA": System(adapter("hydralora", 25, 3), **_LIKE_LORA),
    "full": System({"adapter": "full"}, seeds=1, grid=(2e-5, 5e-5, 1e-4)),
    **{f"LoRA, 2r, {name} alone": System(_LORA_2R, task=task, **_LIKE_LORA) for task, name in TASKS.items()},
    **{name: System({"adapter": "none"}, seeds=1, rate=1e-3) for name in (*EXAMPLES, LOOKUP)},
    "C-LoRAE, 1e-3": System(_CLORAE, seeds=3, rate=1e-3),
    "C-LoRAE, all data": System(_CLORAE, seeds=1, rate=1e-3),
}
_UNTRAINED = (LOOKUP, *EXAMPLES)
_OTHERS = [name for name in SYSTEMS if name not in (*_UNTRAINED, *MAIN, "C-LoRAE, 1e-3", "C-LoRAE, all data")]
FULL = Plan(
    SYSTEMS,
    (
        *(("comparison", name) for name in (*MAIN, *_UNTRAINED, *_OTHERS)),
        ("full", LOOKUP),
        ("full", "C-LoRAE, all data"),
        *((variant, "C-LoRAE, 1e-3") for variant in ("boxes", "text", "image")),
    ),
    grid=(5e-4, 1e-3, 2e-3),
    tuning_seeds=(100,),
)
QUICK = Plan(
    {name: replace(SYSTEMS[name], seeds=1, rate=1e-3, like=None) for name in (*_UNTRAINED, *MAIN)},
    tuple(("comparison", name) for name in (*_UNTRAINED, *MAIN)),
    grid=(1e-3,),
    tuning_seeds=(),
)
"""The main contrast at one rate, the frozen base and the look-up."""
