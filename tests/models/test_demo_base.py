"""The demo base in the package."""

from __future__ import annotations

import hashlib

import torch

from lvlm_clorae.models import load_model
from tests.helpers.tiny import DEMO, noise_image


def test_model_card_has_the_hash_of_the_weights() -> None:
    digest = hashlib.sha256((DEMO / "model.safetensors").read_bytes()).hexdigest()
    assert digest in (DEMO / "README.md").read_text(encoding="utf-8")


def test_demo_base_is_at_most_10_mb() -> None:
    assert sum(path.stat().st_size for path in DEMO.iterdir()) <= 10_000_000


def test_demo_base_has_its_recorded_logits() -> None:
    """The values were recorded before the model code was reorganized into families."""
    model, processor = load_model("demo")
    batch = processor(
        ["event arguments. objects: O1 <region> text: guards struck", "entities. text: Mara leaves Tamsk"],
        [noise_image(), None],
        [[[0, 0, 20, 15]], []],
        ["attack <spot> target, O1", "person, Mara"],
    )
    with torch.no_grad():
        output = model(**batch)
    expected = torch.tensor([[2.0050, -0.5795, -1.0246, -0.9185], [0.8966, -2.7775, -5.1462, -0.7919]])
    torch.testing.assert_close(output.logits[:, 2, 100:104], expected, rtol=0, atol=1e-3)
    torch.testing.assert_close(output.loss, torch.tensor(8.76535), rtol=0, atol=1e-3)
