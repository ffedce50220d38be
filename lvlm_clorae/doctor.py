"""What this machine has and lacks for the job. A lack is a row with its remedy, never a traceback."""

from __future__ import annotations

import importlib
import logging
import os
import shutil
import sys
import sysconfig
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from rich.table import Table

State = Literal["ok", "note", "lacking"]
GIB = 1 << 30
_INSTALL = "pip install -e . (in a checkout; else pip install lvlm_clorae)"
_TOGETHER = (
    "torch and torchvision must be of one build: pip uninstall -y torch torchvision && pip install -e . "
    "(install no CPU-only torch first)"
)


@dataclass(frozen=True)
class Finding:
    """One row: ``note`` is worth knowing, ``lacking`` stops training. ``remedy`` is empty where none is needed."""

    name: str
    found: str
    state: State = "ok"
    remedy: str = ""

    def __str__(self) -> str:
        return f"{self.name}: {self.found}." + (f" Remedy: {self.remedy}" if self.remedy else "")


def examine(quick: bool = False) -> list[Finding]:
    """Look at this machine; `quick` looks only at what training needs and imports anyway."""
    with _quiet():
        findings = [
            _python(),
            _torch(),
            *([] if quick else [_gpus()]),
            _library("torchvision", remedy=_TOGETHER),
            _library("transformers"),
            _library("peft"),
            _deepspeed(),
            _library("open_clip", "open_clip_torch"),
        ]
        on_cpu = _ranks_on_cpu()
        findings += [*_compiler(needed=on_cpu), _ninja(needed=on_cpu), _operators(on_cpu)]
        if not quick:
            findings += [_bitsandbytes(), _library("webdataset", needed=False), _slurm()]
        return [*findings, _memory(), _disk()]


def lacking_for_training(findings: Iterable[Finding]) -> list[Finding]:
    """Those without which training cannot start."""
    return [finding for finding in findings if finding.state == "lacking"]


def render(findings: Iterable[Finding]) -> Table:
    """The findings as a table."""
    from rich.markup import escape
    from rich.table import Table

    styles = {"ok": "green", "note": "yellow", "lacking": "bold red"}
    table = Table(title="What this machine has and lacks")
    for heading in ("", "found", "state", "remedy"):
        table.add_column(heading, overflow="fold")
    for finding in findings:
        state = f"[{styles[finding.state]}]{finding.state}[/]"
        table.add_row(finding.name, escape(finding.found), state, escape(finding.remedy))
    return table


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the warnings of libraries being imported: what matters in them is a finding."""
    before = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def _import(module: str) -> Any:
    """The module, or the reason it cannot be imported as a string."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        return "not installed" if error.name == module else f"cannot be imported: {error}"
    except Exception as error:  # a broken installation raises anything: OSError, RuntimeError, AttributeError
        text = str(error).strip() or type(error).__name__
        return f"cannot be imported: {text.splitlines()[0][:200]}"


def _library(module: str, package: str = "", *, needed: bool = True, remedy: str = "") -> Finding:
    found = _import(module)
    if isinstance(found, str):
        lack = f"pip install {package or module}" if found == "not installed" and not needed else remedy or _INSTALL
        return Finding(module, found, "lacking" if needed else "note", lack)
    return Finding(module, _version(found))


def _version(module: Any) -> str:
    return str(getattr(module, "__version__", "installed"))


def _python() -> Finding:
    found = ".".join(map(str, sys.version_info[:3]))
    if sys.version_info < (3, 10):  # noqa: UP036 - run from a checkout, nothing has checked it
        return Finding("Python", found, "lacking", "make the virtual environment with Python 3.10 or newer")
    return Finding("Python", found)


def _torch() -> Finding:
    torch = _import("torch")
    if isinstance(torch, str):
        return Finding("torch", torch, "lacking", _INSTALL)
    build = f"CUDA {torch.version.cuda}" if torch.version.cuda else "CPU"
    return Finding("torch", f"{_version(torch)}, built for {build}")


def _gpus() -> Finding:
    torch = _import("torch")
    if isinstance(torch, str):
        return Finding("GPU", "unknown without torch", "note")
    try:
        if torch.cuda.is_available():
            cards = [torch.cuda.get_device_properties(number) for number in range(torch.cuda.device_count())]
            # bf16 is native from compute capability 8.0 on.
            names = [f"{c.name}, {c.total_memory / GIB:.0f} GiB, {'' if c.major >= 8 else 'no '}bf16" for c in cards]
            return Finding("GPU", "; ".join(names))
        reason = ""
    except Exception as error:  # a driver in disorder
        reason = f" ({str(error).splitlines()[0][:120]})"
    if shutil.which("nvidia-smi") is None:
        return Finding("GPU", f"none, so training runs on the CPU{reason}", "note")
    if torch.version.cuda is None:
        return Finding("GPU", "there is a driver, but this torch is built for the CPU", "note", _TOGETHER)
    remedy = f"compare the driver in nvidia-smi with torch's CUDA {torch.version.cuda}; see CUDA_VISIBLE_DEVICES"
    return Finding("GPU", f"there is a driver, but torch finds no GPU{reason}", "note", remedy)


def _deepspeed() -> Finding:
    finding = _library("deepspeed")
    if "CUDA_HOME" in finding.found:
        return Finding("deepspeed", finding.found, "lacking", "module load cuda, or set CUDA_HOME to the CUDA toolkit")
    return finding


def _ranks_on_cpu() -> bool:
    accelerator = _import("deepspeed.accelerator")
    try:
        return bool(accelerator.get_accelerator().device_name() == "cpu")
    except Exception:  # no deepspeed, which is a finding of its own
        torch = _import("torch")
        return isinstance(torch, str) or not torch.cuda.is_available()


def _compiler(needed: bool) -> list[Finding]:
    """The C++ compiler and Python's headers, with which DeepSpeed builds its operators for CPU ranks."""
    state: State = "lacking" if needed else "note"
    command = os.environ.get("CXX", "c++")
    path = shutil.which(command.split()[0] if command.split() else "c++")
    other = shutil.which("g++")
    if path:
        findings = [Finding("g++", path)]
    elif other:
        findings = [Finding("g++", f"{other}, but {command} is not found", state, "export CXX=g++")]
    else:
        remedy = "apt-get install g++ (on a cluster: module load gcc)"
        findings = [Finding("g++", f"{command}: not found", state, remedy)]
    header = Path(sysconfig.get_path("include")) / "Python.h"
    if not header.is_file():
        findings.append(Finding("Python.h", f"{header}: not found", state, "apt-get install python3-dev"))
    return findings


def _ninja(needed: bool) -> Finding:
    path = shutil.which("ninja")
    if path:
        return Finding("ninja", path)
    state: State = "lacking" if needed else "note"
    beside = Path(sys.executable).parent
    if (beside / "ninja").is_file():
        return Finding("ninja", f"{beside / 'ninja'}, but not on PATH", state, f". {beside}/activate")
    return Finding("ninja", "not found", state, "pip install ninja")


def _operators(on_cpu: bool) -> Finding:
    """DeepSpeed's compiled operators for this machine, and the folder they are cached in."""
    tools = _import("torch.utils.cpp_extension")
    if isinstance(tools, str):
        return Finding("deepspeed ops", "unknown without torch", "note")
    cache = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or tools.get_default_build_root())
    existing = next(path for path in (cache, *cache.absolute().parents) if path.exists())
    if on_cpu and not os.access(existing, os.W_OK):
        return Finding(
            "deepspeed ops", f"{cache} cannot be written", "lacking", "export TORCH_EXTENSIONS_DIR=/tmp/extensions"
        )
    built = sorted({path.stem.removeprefix("deepspeed_") for path in cache.rglob("*.so")}) if cache.is_dir() else []
    have = f"built: {', '.join(built)}" if built else "none built yet"
    if on_cpu:
        return Finding("deepspeed ops", have + ("" if "shm_comm" in built else "; shm_comm is at first start (30 s)"))
    if tools.CUDA_HOME is None:
        remedy = "module load cuda, or set CUDA_HOME"
        found = f"{have}; no CUDA toolkit, which only DeepSpeed's own optimizers and offloading need"
        return Finding("deepspeed ops", found, "note", remedy)
    return Finding("deepspeed ops", f"{have}; CUDA toolkit {tools.CUDA_HOME}")


def _bitsandbytes() -> Finding:
    finding = _library("bitsandbytes", needed=False)
    if finding.state != "ok":
        return finding
    library = getattr(_import("bitsandbytes.cextension"), "lib", None)
    if library is None or "Mock" in type(library).__name__:  # its stand-in, which raises when it is called
        return Finding(
            "bitsandbytes", f"{finding.found}, no native library loaded", "note", "python -m bitsandbytes says why"
        )
    back_end = "CUDA" if getattr(library, "compiled_with_cuda", False) else "CPU"
    return Finding("bitsandbytes", f"{finding.found}, {back_end} library loaded")


def _slurm() -> Finding:
    found = [command for command in ("sbatch", "srun") if shutil.which(command)]
    return Finding("SLURM", f"{', '.join(found)}") if found else Finding("SLURM", "none; only clusters have it", "note")


def _memory() -> Finding:
    psutil = _import("psutil")
    if isinstance(psutil, str):
        return Finding("memory", f"unknown without psutil ({psutil})", "note", _INSTALL)
    memory = psutil.virtual_memory()
    found = f"{memory.available / GIB:.1f} of {memory.total / GIB:.1f} GiB free"
    return _amount("memory", found, memory.available, 1 * GIB, 4 * GIB, "end other programs, or take a larger machine")


def _disk() -> Finding:
    here = Path.cwd()
    free = shutil.disk_usage(here).free
    remedy = "make room, or start where there is: runs and checkpoints go below the current directory"
    return _amount("disk", f"{free / GIB:.1f} GiB free at {here}", free, 1 * GIB, 10 * GIB, remedy)


def _amount(name: str, found: str, free: int, needed: int, plenty: int, remedy: str) -> Finding:
    if free < needed:
        return Finding(name, found, "lacking", remedy)
    return Finding(name, found, "note", remedy) if free < plenty else Finding(name, found)
