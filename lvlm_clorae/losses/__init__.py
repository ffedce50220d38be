"""Loss terms. ``achievement`` is pure Python; ``mutual_information`` needs torch."""
