"""Commands of the documentation pages."""

from __future__ import annotations

import re
from pathlib import Path


def commands(page: Path, prefix: str) -> list[str]:
    """Return the lines of the page's bash blocks that start with ``prefix``."""
    text = "\n".join(re.findall(r"```bash[^\n]*\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL))
    found = [line for line in text.splitlines() if line.startswith(prefix)]
    assert found, f"{page}: no command {prefix}"
    return found
