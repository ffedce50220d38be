"""What a user may choose of the stream: names only, so that reading a command line costs no import of more."""

INTERLEAVES = ("proportional", "balanced", "temperature")
"""How often units come up (see :class:`~lvlm_clorae.data.plan.Order`)."""

ON_BAD_SAMPLE = ("error", "skip", "blank")
"""What becomes of a sample that is not sound (see :class:`~lvlm_clorae.data.batches.Batcher`)."""
