"""Training started by the deepspeed launcher; rank 1 is killed before the rendezvous."""

from __future__ import annotations

import os
import signal

from lvlm_clorae.training.main import entry

if __name__ == "__main__":
    if os.environ["RANK"] == "1":
        os.kill(os.getpid(), signal.SIGKILL)
    entry()
