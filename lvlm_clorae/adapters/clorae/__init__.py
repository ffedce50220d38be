"""C-LoRAE: one universal and N task LoRA experts under a token gate (IJCAI 2025, arXiv 2505.06303)."""

import peft  # noqa: F401  first: the end of its import registers, hence loads, the modules below

from .config import CLoRAEConfig
from .experts import CLoRAEExperts
from .model import CLoRAELayer, CLoRAEModel

__all__ = ["CLoRAEConfig", "CLoRAEExperts", "CLoRAELayer", "CLoRAEModel"]
