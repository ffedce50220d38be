"""The demo base is what its card says."""

from __future__ import annotations

import hashlib

from tests.launch import REPOSITORY

DEMO = REPOSITORY / "lvlm_clorae" / "models" / "demo"


def test_the_card_names_the_committed_weights() -> None:
    digest = hashlib.sha256((DEMO / "model.safetensors").read_bytes()).hexdigest()
    assert digest in (DEMO / "README.md").read_text(encoding="utf-8")


def test_it_is_small() -> None:
    assert sum(path.stat().st_size for path in DEMO.iterdir()) <= 10_000_000
