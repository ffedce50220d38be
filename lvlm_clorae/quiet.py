"""Silence noisy third-party warnings."""

import logging
import warnings


def quiet_libraries() -> None:
    """Hide deprecation warnings between libraries and bitsandbytes' import warning about its 4-bit CPU kernel.

    That is for the layout which :func:`lvlm_clorae.models.quantization.disable_cpu_repacking`
    avoids, and is logged at import.
    """
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"(transformers|deepspeed|torch\.distributed)\.")
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
