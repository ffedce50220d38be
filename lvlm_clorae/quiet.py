"""Silence noisy third-party warnings and progress bars for the duration of a call."""

import logging
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """Hide library output that does not concern the user; a context manager or decorator that restores all settings.

    Hidden are deprecation warnings between libraries, the progress bar of loading weights (not that of a download), and
    bitsandbytes' import warning about its 4-bit CPU kernel, which is for the layout that
    :func:`lvlm_clorae.models.quantization.disable_cpu_repacking` avoids.
    """
    logger = logging.getLogger("bitsandbytes.backends.cpu.ops")
    # Its public switch would stop the bars of downloads too
    bars = getattr(sys.modules.get("transformers.utils.logging"), "__dict__", {})
    before = logger.level, bars.get("_tqdm_active")
    with warnings.catch_warnings():
        for library in ("transformers", "deepspeed", r"torch\.distributed"):
            warnings.filterwarnings("ignore", category=FutureWarning, module=rf"{library}\.")
        logger.setLevel(logging.ERROR)
        bars["_tqdm_active"] = False
        try:
            yield
        finally:
            logger.setLevel(before[0])
            bars["_tqdm_active"] = before[1]
