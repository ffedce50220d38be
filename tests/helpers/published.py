"""The published annotation files, if available, and a few synthetic records in their formats."""

from __future__ import annotations

import os
from pathlib import Path

from tests.helpers.launch import REPOSITORY

DATA = Path(os.environ.get("LVLM_CLORAE_REAL_DATA") or REPOSITORY.parent / "shared" / "data")
FOLDERS = {"twitter15": "twitter15", "mre_v1": "mnre_v1", "m2e2": "m2e2"}


def write_invented(directory: Path) -> Path:
    """A post a split in ``twitter2015``, which names the image 1.jpg, and a pair in ``mnre_v1``."""
    posts = directory / "twitter2015"
    posts.mkdir(parents=True)
    for split in ("train", "valid", "test"):
        (posts / f"{split}.txt").write_text("IMGID:1\nMara\tB-PER\nNovotny\tI-PER\nsings\tO\n\n")
    pairs = directory / "mnre_v1"
    pairs.mkdir()
    record = {
        "token": ["Mara", "lives", "in", "Tamsk"],
        "h": {"name": "Mara", "pos": [0, 1]},
        "t": {"name": "Tamsk", "pos": [3, 4]},
        "img_id": 7,
        "relation": "/per/loc/place_of_residence",
    }
    for split in ("train", "val", "test"):
        (pairs / f"ours_{split}.txt").write_text(f"{record}\n")
    return directory
