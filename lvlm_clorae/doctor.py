"""Check the environment. A missing dependency is a finding with a suggested fix, never a traceback."""

import importlib
import logging
import os
import shutil
import sys
import sysconfig
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

State = Literal["ok", "note", "missing"]
GIB = 1 << 30
INSTALL = "pip install lvlm_clorae (in a checkout: pip install -e .)"


@dataclass(frozen=True)
class Finding:
    """Result of one check: ``note`` is informative, ``missing`` prevents training."""

    name: str
    found: str
    state: State = "ok"
    fix: str = ""

    def __str__(self) -> str:
        return f"{self.name}: {self.found}." + (f" Fix: {self.fix}." if self.fix else "")


def examine(quick: bool = False) -> list[Finding]:
    """Check the environment; ``quick`` checks only what training needs and imports anyway."""
    logging.disable(logging.ERROR)  # what matters in the warnings of imported libraries is a finding
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return list(_examine(quick))
    finally:
        logging.disable(logging.NOTSET)


def _examine(quick: bool) -> Iterator[Finding]:
    yield Finding("Python", sys.version.split()[0])
    for name in ("torch", "transformers", "peft", "open_clip"):
        yield _library(name, INSTALL)
    yield _library("torchvision", f"torch and torchvision must be of one build: uninstall both, then {INSTALL}")
    yield _library("deepspeed", f"{INSTALL}; on GPUs set CUDA_HOME to the CUDA toolkit")
    yield (gpu := _gpu())
    needed: State = "note" if gpu.state == "ok" else "missing"  # DeepSpeed builds an operator for CPU ranks
    yield _compiler(needed)
    yield _command("ninja", needed, "pip install ninja")
    yield _operators(needed)
    yield _amount("memory", _import("psutil").virtual_memory().available, 4, "use a machine with more memory")
    yield _amount(f"disk at {Path.cwd()}", shutil.disk_usage(Path.cwd()).free, 10, "free space, or run elsewhere")
    if not quick:
        yield _bitsandbytes()
        yield _command("sbatch", "note", "only SLURM clusters have it")


def _import(module: str) -> Any:
    """Return the module, or why it cannot be imported as a string."""
    try:
        return importlib.import_module(module)
    except Exception as error:  # a broken installation raises anything: OSError, RuntimeError, AttributeError
        absent = isinstance(error, ModuleNotFoundError) and error.name == module
        return "not installed" if absent else f"cannot be imported: {(str(error) or repr(error)).splitlines()[0]}"


def _library(module: str, fix: str, state: State = "missing") -> Finding:
    found = _import(module)
    failed = isinstance(found, str)
    return Finding(module, found, state, fix) if failed else Finding(module, str(getattr(found, "__version__", "")))


def _gpu() -> Finding:
    try:
        cuda = _import("torch").cuda
        gpus = [cuda.get_device_properties(number) for number in range(cuda.device_count())]
    except Exception:  # no torch, or a broken driver
        gpus = []
    if gpus:
        return Finding("GPU", "; ".join(f"{gpu.name}, {gpu.total_memory / GIB:.0f} GiB" for gpu in gpus))
    fix = "compare nvidia-smi and torch.version.cuda" if shutil.which("nvidia-smi") else ""
    return Finding("GPU", "torch finds none, so training runs on the CPU", "note", fix)


def _command(name: str, state: State, fix: str) -> Finding:
    return Finding(name, path) if (path := shutil.which(name)) else Finding(name, "not found", state, fix)


def _compiler(state: State) -> Finding:
    header = Path(sysconfig.get_path("include")) / "Python.h"
    if not header.is_file():
        return Finding("compiler", f"{header}: not found", state, "apt-get install python3-dev")
    return _command(os.environ.get("CXX", "c++").split()[0], state, "apt-get install g++, or set CXX to a C++ compiler")


def _operators(state: State) -> Finding:  # compiled by DeepSpeed
    cache = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or Path.home() / ".cache" / "torch_extensions")
    writable = os.access(next(path for path in (cache, *cache.absolute().parents) if path.exists()), os.W_OK)
    fix = () if writable else (state, "set TORCH_EXTENSIONS_DIR to a writable directory")
    return Finding("DeepSpeed operators", f"{cache}{'' if writable else ': not writable'}", *fix)


def _bitsandbytes() -> Finding:
    finding = _library("bitsandbytes", "pip install bitsandbytes", "note")
    library = getattr(_import("bitsandbytes.cextension"), "lib", None)
    if finding.state == "ok" and (library is None or "Mock" in type(library).__name__):
        return Finding("bitsandbytes", f"{finding.found}, no native library", "note", "run python -m bitsandbytes")
    return finding


def _amount(name: str, free: int, enough: int, fix: str) -> Finding:
    state: State = "missing" if free < GIB else "note" if free < enough * GIB else "ok"
    return Finding(name, f"{free / GIB:.1f} GiB free", state, "" if state == "ok" else fix)
