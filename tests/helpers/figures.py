"""Contents of matplotlib figures."""

from __future__ import annotations

from typing import Any


def texts(items: Any) -> list[str]:
    return [item.get_text() for item in items]
