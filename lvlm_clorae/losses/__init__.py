"""Loss terms. ``achievement`` is pure Python; ``mutual_information`` and ``balance`` need torch."""
