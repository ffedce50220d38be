"""Loss terms. ``achievement`` and ``coba`` need the standard library only; the others need torch."""
