"""Loss terms. ``achievement`` needs the standard library only; the others need torch."""
