"""The environment checks: everything that is missing is a finding with a fix."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from lvlm_clorae import doctor
from lvlm_clorae.doctor import GIB, Finding, examine


@pytest.fixture(autouse=True, scope="module")
def _everything_imported() -> None:
    """Import everything first, so that a library broken for one test is not left half imported."""
    examine()


def named(findings: list[Finding], name: str) -> Finding:
    return next(finding for finding in findings if name in finding.name)


def broken(monkeypatch: pytest.MonkeyPatch, folder: Path, module: str, raises: str) -> None:
    """Put a module that raises in place of an installed one."""
    (folder / f"{module}.py").write_text(f"raise {raises}\n")
    monkeypatch.syspath_prepend(folder)
    monkeypatch.delitem(sys.modules, module, raising=False)


@pytest.fixture
def cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine without a GPU."""
    monkeypatch.setattr(doctor, "_gpu", lambda: Finding("GPU", "none", "note"))


def test_all_requirements_are_checked() -> None:
    findings = examine()
    expected = (
        "Python torch GPU torchvision transformers peft deepspeed open_clip ninja bitsandbytes sbatch memory disk"
    )
    assert all(named(findings, name) for name in expected.split())
    assert all(finding.fix for finding in findings if finding.state == "missing")
    assert named(findings, "torch").found == str(sys.modules["torch"].__version__)


def test_quick_checks_take_less_than_a_second_after_the_imports() -> None:
    begin = time.perf_counter()
    findings = examine(quick=True)
    assert time.perf_counter() - begin < 1
    assert {finding.name for finding in findings} < {finding.name for finding in examine()}


def test_missing_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    finding = named(examine(quick=True), "peft")
    assert (finding.found, finding.state) == ("not installed", "missing")
    assert "pip install" in finding.fix


def test_optional_library_is_a_note(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    finding = named(examine(), "bitsandbytes")
    assert (finding.state, finding.fix) == ("note", "pip install bitsandbytes")


@pytest.mark.parametrize(
    ("module", "raises", "fix"),
    [
        ("torchvision", 'RuntimeError("operator torchvision::nms does not exist")', "one build"),
        ("deepspeed", 'RuntimeError("CUDA_HOME does not exist, unable to compile CUDA op(s)")', "CUDA_HOME"),
        ("open_clip", 'OSError("libcudart.so.13: cannot open shared object file")', "pip install"),
        ("open_clip", "ValueError()", "pip install"),
        ("open_clip", 'ImportError("a\\nb")', "pip install"),
    ],
)
def test_broken_library(module: str, raises: str, fix: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    broken(monkeypatch, tmp_path, module, raises)
    finding = named(examine(quick=True), module)
    assert finding.state == "missing"
    assert finding.found.startswith("cannot be imported: ")
    assert "\n" not in finding.found
    assert fix in finding.fix


def test_no_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in [name for name in sys.modules if name == "torch" or name.startswith("torch.")]:
        monkeypatch.setitem(sys.modules, module, None)
    findings = examine()
    assert named(findings, "torch").state == "missing"
    assert named(findings, "GPU").state == "note"


@pytest.mark.parametrize(("gpu", "state"), [("note", "missing"), ("ok", "note")])
def test_no_compiler(gpu: doctor.State, state: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Only ranks on the CPU need a compiler."""
    monkeypatch.setattr(doctor, "_gpu", lambda: Finding("GPU", "", gpu))
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    findings = examine(quick=True)
    assert named(findings, "c++").state == named(findings, "ninja").state == state
    assert "g++" in named(findings, "c++").fix
    (tmp_path / "my++").touch(mode=0o755)
    monkeypatch.setenv("CXX", "my++ -O2")
    assert named(examine(quick=True), "my++").state == "ok"


@pytest.mark.usefixtures("cpu")
def test_no_python_headers(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("sysconfig.get_path", lambda name: str(tmp_path))
    finding = named(examine(quick=True), "compiler")
    assert (finding.state, finding.fix) == ("missing", "apt-get install python3-dev")


@pytest.mark.usefixtures("cpu")
def test_operator_cache_that_cannot_be_written(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "deep" / "cache"))
    assert named(examine(quick=True), "operators").state == "ok"
    monkeypatch.setattr("os.access", lambda path, mode: path != tmp_path)
    finding = named(examine(quick=True), "operators")
    assert (finding.state, finding.fix) == ("missing", "set TORCH_EXTENSIONS_DIR to a writable directory")


@pytest.mark.parametrize(("free", "state"), [(GIB - 1, "missing"), (5 * GIB, "note"), (50 * GIB, "ok")])
def test_disk(free: int, state: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=free))
    finding = named(examine(quick=True), "disk")
    assert finding.state == state
    assert bool(finding.fix) == (state != "ok")


def test_a_finding_as_text() -> None:
    assert str(Finding("two", "broken", "missing", 'pip install -e ".[test]"')) == (
        'two: broken. Fix: pip install -e ".[test]".'
    )
