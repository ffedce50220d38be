"""One writer per run directory: a lock that the kernel releases when the process ends, however it ends."""

import errno
import fcntl
import json
import os
import socket
from pathlib import Path
from typing import IO

from lvlm_clorae.errors import UserError

LOCK = ".lock"
_held: dict[Path, IO[str]] = {}
"""Open for the life of the process. The lock is of the process: worker processes do not inherit it."""


def lock_run(directory: Path, job: str | None) -> None:
    """Lock a run directory for this process and note its host, number and job.

    Raises:
        UserError: another process, possibly on another machine, has the lock.
    """
    path = (directory / LOCK).resolve()
    if path in _held:
        return
    handle = open(path, "a+", encoding="utf-8")  # noqa: SIM115 - closing it would release the lock
    try:
        fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EAGAIN):
            raise UserError(
                f"{directory}: is being written by {_owner(handle)}. Wait until it ends, or give another --output_dir."
            ) from None
        return  # a file system without locks
    handle.truncate(0)
    handle.write(json.dumps({"host": socket.gethostname(), "pid": os.getpid(), "job": job}))
    handle.flush()
    _held[path] = handle


def _owner(handle: IO[str]) -> str:
    handle.seek(0)
    try:
        found = json.loads(handle.read())
        job = f" of job {found['job']}" if found["job"] else ""
        return f"process {found['pid']} on {found['host']}{job}"
    except (ValueError, KeyError, TypeError):  # it has just been started
        return "another process"
