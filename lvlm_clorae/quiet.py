"""What libraries say at every run, that is no news to the user of a command."""

from __future__ import annotations

import logging
import warnings


def quiet_libraries() -> None:
    """Silence deprecations among libraries, and bitsandbytes on a kernel that it would use for four bits on some CPUs.

    That is for the layout which :func:`lvlm_clorae.models.quantise.keep_layout` avoids, and is said at its import.
    """
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"(transformers|deepspeed|torch\.distributed)\.")
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
