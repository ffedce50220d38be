"""A point's name, which is its run directory's: what it varies and nothing else, so other points cannot move it."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from typing import Any

from lvlm_clorae.training.config import FIELDS

LONGEST = 120
"""Characters of a name; a file system takes 255 bytes, and temporary files add to it."""
_PLAIN = re.compile(r"[A-Za-z0-9._+-]{1,32}")
_UNSAFE = re.compile(r"[^A-Za-z0-9._+-]+")


def point_name(varied: Mapping[str, Any]) -> str:
    """``rank=64,dropout=0.05,seed=1``: the settings in the order of the configuration, the seed last.

    Names differ where the settings do: a value that cannot stand in a name as it is, or would read as another one,
    is cut and followed by ``@`` and its hash. Only letters, digits and ``=,._+-@`` occur, which no shell expands.

    Args:
        varied: values of the types of the configuration, as ``make_config`` gives them
    """
    order = sorted(varied, key=lambda key: (key == "seed", list(FIELDS).index(key)))
    name = ",".join(f"{key}={_text(key, varied[key])}" for key in order)
    if len(name) <= LONGEST:
        return name
    seed = f",seed={varied['seed']}" if "seed" in varied else ""
    return f"{name[: LONGEST - 40]}@{_hash(name)}{seed}"


def _text(key: str, value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if value is None or value == []:
        return "none"
    if isinstance(value, list):
        plain = all(_PLAIN.fullmatch(item) and "+" not in item for item in value) and value != ["none"]
        return _short("+".join(value), value, plain)
    # "none" is a word of some settings (adapter), and of others the lack of one (vision).
    return _short(str(value), value, not (value == "none" and FIELDS[key].default is None))


def _short(text: str, value: Any, plain: bool) -> str:
    if plain and _PLAIN.fullmatch(text):
        return text
    return f"{_UNSAFE.sub('-', text)[:16]}@{_hash(json.dumps(value))}"


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8")).hexdigest()[:8]
