"""How far a run has come, beside its stream, its achievement weights and what DeepSpeed keeps."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class Progress:
    """Part of a checkpoint's state."""

    step: int = 0
    """Optimizer steps done since the start."""
    best: float = -1.0
    """Highest sum of dev F1."""
    waited: int = 0
    """Evaluations since then."""
    bad_samples: int = 0
    """Samples, of all ranks, that were skipped or whose picture was left out."""
    skipped: int = 0
    """Optimizer steps that were skipped, since loss or gradient was not finite."""
    skipped_in_a_row: int = 0
    """Those without a sound one since."""
    dev: dict[str, float] = field(default_factory=dict)
    """Last dev F1 by unit."""

    def skip(self) -> None:
        """Count a step that was left out."""
        self.skipped += 1
        self.skipped_in_a_row += 1
