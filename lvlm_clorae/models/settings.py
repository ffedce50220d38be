"""The choices a user has of a base; no heavy import, for the command line reads them."""

from __future__ import annotations

FUSIONS = ("concat", "gated")
PROJECTORS = ("linear", "mlp2x_gelu")
