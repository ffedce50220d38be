"""The benchmark for a GPU, as a miniature on a CPU."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.helpers.launch import REPOSITORY

FOLDER = REPOSITORY / "benchmarks/gpu"


@pytest.fixture(scope="module")
def gpu() -> Any:
    spec = importlib.util.spec_from_file_location("gpu_main", FOLDER / "__main__.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module
    for folder in (str(FOLDER), str(REPOSITORY / "benchmarks")):
        sys.path.remove(folder)


@pytest.mark.slow
def test_the_miniature_measures_every_section(gpu: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "gpu.json"
    assert gpu.main(["--quick", "--output", str(output), "--minutes", "60"]) == 0
    content = json.loads(output.read_text())
    assert content["skipped"] == {}
    sections = [name for name, _ in gpu.sections(gpu.parse(["--quick"]), torch.device("cpu"))]
    assert list(content["results"]) == sections
    layer = content["results"]["layers/tiny"]["dropout 0"]
    assert layer["frozen"]["kernels"] < layer["lora"]["kernels"] < layer["clorae"]["kernels"]
    assert layer["clorae"]["saved_mib"] > 0
    for name, row in content["results"].items():
        if name.startswith("models/"):
            assert row["tokens_per_second"] > 0
            assert ("decoded_per_second" in row) == ("/eager/" in name)
    shown = capsys.readouterr().out
    assert shown.count("| tiny llama |") == 9
    assert shown.count("| tiny |") == 2


def test_what_does_not_fit_is_listed(gpu: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails() -> dict[str, Any]:
        raise torch.cuda.OutOfMemoryError("no memory\nmore")

    def lacks() -> dict[str, Any]:
        raise ImportError("No module named bitsandbytes")

    sections = [("models/a/eager/lora", fails), ("models/a/int8/lora", lacks)]
    monkeypatch.setattr(gpu, "sections", lambda *_: sections)
    output = tmp_path / "gpu.json"
    assert gpu.main(["--quick", "--output", str(output)]) == 0
    skipped = json.loads(output.read_text())["skipped"]
    assert skipped["models/a/eager/lora"] == "OutOfMemoryError: no memory"
    assert "bitsandbytes" in skipped["models/a/int8/lora"]
    assert gpu.main(["--quick", "--output", str(tmp_path / "none.json"), "--minutes", "-1"]) == 0
    skipped = json.loads((tmp_path / "none.json").read_text())["skipped"]
    assert list(skipped.values()) == ["no time left"] * 2


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_is_an_error(gpu: Any, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert gpu.main(["--output", str(tmp_path / "gpu.json")]) == 2
    assert "--quick" in capsys.readouterr().err


@pytest.mark.integration
def test_it_needs_torch_transformers_and_peft_alone() -> None:
    program = (
        "import sys\n"
        "for name in ('pydantic', 'annotated_types', 'deepspeed', 'open_clip', 'rich', 'webdataset', 'bitsandbytes'):\n"
        "    sys.modules[name] = None\n"
        "sys.path[:0] = ['benchmarks/gpu']\n"
        "import runpy; runpy.run_path('benchmarks/gpu/__main__.py')"
    )
    subprocess.run([sys.executable, "-c", program], cwd=REPOSITORY, check=True)


def test_the_page_says_that_nothing_is_measured_until_there_are_results() -> None:
    page = (REPOSITORY / "docs/gpu.md").read_text(encoding="utf-8")
    measured = list((REPOSITORY / "benchmarks/results").glob("gpu-2*.json"))
    assert ("Not measured yet" in page) == (not measured)
