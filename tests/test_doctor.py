"""The doctor: every lack is a row with its remedy, never a traceback."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import pytest
from rich.console import Console

from lvlm_clorae import doctor
from lvlm_clorae.doctor import Finding, examine, lacking_for_training, render

GIB = doctor.GIB


@pytest.fixture(autouse=True, scope="module")
def _everything_imported() -> None:
    """So that a library broken for one test does not leave another half imported."""
    examine()


def named(findings: list[Finding], name: str) -> Finding:
    return next(finding for finding in findings if finding.name == name)


def broken(monkeypatch: pytest.MonkeyPatch, folder: Path, module: str, raises: str) -> None:
    """Put a module that raises in place of an installed one."""
    (folder / f"{module}.py").write_text(f"raise {raises}\n")
    monkeypatch.syspath_prepend(folder)
    monkeypatch.delitem(sys.modules, module, raising=False)


def test_the_table_names_everything_that_the_job_needs() -> None:
    findings = examine()
    expected = {
        "Python",
        "torch",
        "GPU",
        "torchvision",
        "transformers",
        "peft",
        "deepspeed",
        "open_clip",
        "g++",
        "ninja",
    }
    expected |= {"deepspeed ops", "bitsandbytes", "webdataset", "SLURM", "memory", "disk"}
    assert expected <= {finding.name for finding in findings}
    assert all(finding.remedy for finding in findings if finding.state == "lacking")
    assert named(findings, "torch").found.startswith(str(sys.modules["torch"].__version__))
    assert "library" in named(findings, "bitsandbytes").found


def test_the_quick_look_takes_less_than_a_second_after_the_imports() -> None:
    examine(quick=True)
    begin = time.perf_counter()
    findings = examine(quick=True)
    assert time.perf_counter() - begin < 1
    assert {finding.name for finding in findings} < {finding.name for finding in examine()}


def test_a_library_that_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    finding = named(examine(quick=True), "peft")
    assert (finding.found, finding.state) == ("not installed", "lacking")
    assert "pip install" in finding.remedy
    assert lacking_for_training(examine(quick=True)) == [finding]


def test_a_library_that_only_later_commands_need_is_a_note(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    finding = named(examine(), "bitsandbytes")
    assert (finding.state, finding.remedy) == ("note", "pip install bitsandbytes")


def test_torch_and_torchvision_of_two_builds(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    broken(monkeypatch, tmp_path, "torchvision", 'RuntimeError("operator torchvision::nms does not exist")')
    finding = named(examine(quick=True), "torchvision")
    assert finding.state == "lacking"
    assert "operator torchvision::nms does not exist" in finding.found
    assert "CPU-only torch" in finding.remedy


@pytest.mark.parametrize(
    "raises", ['OSError("libcudart.so.13: cannot open shared object file")', "ValueError()", 'ImportError("a\\nb")']
)
def test_a_library_that_breaks_in_any_way(raises: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    broken(monkeypatch, tmp_path, "open_clip", raises)
    finding = named(examine(quick=True), "open_clip")
    assert finding.state == "lacking"
    assert finding.found.startswith("cannot be imported: ")
    assert "\n" not in finding.found


def test_deepspeed_without_the_cuda_toolkit(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    broken(monkeypatch, tmp_path, "deepspeed", 'RuntimeError("CUDA_HOME does not exist, unable to compile CUDA op(s)")')
    assert "set CUDA_HOME" in named(examine(quick=True), "deepspeed").remedy


def test_no_torch_at_all(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in [name for name in sys.modules if name == "torch" or name.startswith("torch.")]:
        monkeypatch.setitem(sys.modules, module, None)
    findings = examine()
    assert named(findings, "torch").found == "not installed"
    assert named(findings, "GPU").state == "note"
    assert "torch" in {finding.name for finding in lacking_for_training(findings)}


@pytest.mark.parametrize(("on_cpu", "state"), [(True, "lacking"), (False, "note")])
def test_no_compiler(on_cpu: bool, state: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(doctor, "_ranks_on_cpu", lambda: on_cpu)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    finding = named(examine(quick=True), "g++")
    assert (finding.found, finding.state) == ("c++: not found", state)
    assert "apt-get install g++" in finding.remedy
    assert named(examine(quick=True), "ninja").state == state


def test_another_name_of_the_compiler(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "g++").touch(mode=0o755)
    monkeypatch.setattr(doctor, "_ranks_on_cpu", lambda: True)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    assert named(examine(quick=True), "g++").remedy == "export CXX=g++"
    monkeypatch.setenv("CXX", "g++")
    assert named(examine(quick=True), "g++").state == "ok"


def test_pythons_headers(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(doctor, "_ranks_on_cpu", lambda: True)
    monkeypatch.setattr("sysconfig.get_path", lambda name: str(tmp_path))
    assert named(examine(quick=True), "Python.h").remedy == "apt-get install python3-dev"


@pytest.mark.parametrize(("free", "state"), [(GIB - 1, "lacking"), (5 * GIB, "note"), (50 * GIB, "ok")])
def test_disk(free: int, state: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": free}))
    finding = named(examine(quick=True), "disk")
    assert finding.state == state
    assert bool(finding.remedy) == (state != "ok")


def test_old_python(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "version_info", (3, 9, 18))
    assert doctor._python().state == "lacking"


def test_the_table_shows_every_row_as_it_is() -> None:
    findings = [Finding("one", "has [brackets]", "ok"), Finding("two", "broken", "lacking", 'pip install -e ".[test]"')]
    console = Console(width=100, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(render(findings))
    text = console.export_text()
    assert "has [brackets]" in text
    assert 'pip install -e ".[test]"' in text
    assert str(findings[1]) == 'two: broken. Remedy: pip install -e ".[test]"'
