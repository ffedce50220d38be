"""The commands, links and Python blocks of README and the documentation work; .ci/run runs the blocks marked for it."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import open_clip
import pytest

from lvlm_clorae.cli import evaluate
from lvlm_clorae.cli import main as cli
from lvlm_clorae.models.vision import split_tower
from lvlm_clorae.tasks import check_sample
from lvlm_clorae.training.checks import check_quantized
from lvlm_clorae.training.config import TrainConfig
from lvlm_clorae.training.config_loading import load_config
from lvlm_clorae.training.deepspeed_config import read_deepspeed_file
from tests.helpers.pages import commands
from tests.helpers.published import write_invented
from tools import methods, scaling

REPOSITORY = Path(__file__).parents[1]
README = REPOSITORY / "README.md"
DOCS = REPOSITORY / "docs"
PAGES = [README, REPOSITORY / "CONTRIBUTING.md", *REPOSITORY.glob("[!.]*/README.md"), *DOCS.glob("[a-z]*.md")]
BLOCK = re.compile(r"(?:<!-- ci: (?P<mark>\w+) -->\n)?```(?P<language>\w+)\n(?P<text>.*?)```", re.DOTALL)
LINK = re.compile(r"\]\((?!https?:)([^)\s#]*)(?:#([^)\s]+))?\)")
TRAIN = re.compile(r"(?:\btrain\.py|lvlm-clorae train|lvlm-clorae align|slurm/train\.sbatch)\s+(.*)")


def blocks(page: Path, language: str) -> list[tuple[str | None, str]]:
    """Return the CI mark, or None, and the text of the page's code blocks in a language."""
    found = BLOCK.finditer(page.read_text(encoding="utf-8"))
    return [(match["mark"], match["text"]) for match in found if match["language"] == language]


def test_ci_runs_each_marked_block_of_readme() -> None:
    script = (REPOSITORY / ".ci" / "run").read_text(encoding="utf-8")
    marks = [mark for language in ("bash", "python") for mark, _ in blocks(README, language) if mark]
    assert marks == ["train", "predict", "evaluate", "test", "python", "extract"]
    run = re.findall(r"^run_block (\w+)|^for name in ([\w ]+);", script, re.MULTILINE)
    assert {word for pair in run for part in pair for word in part.split()} == set(marks)


def test_readme_trains_the_demo_and_tests_without_slow_ones() -> None:
    texts = dict(blocks(README, "bash"))
    (arguments,) = TRAIN.findall(texts["train"])
    assert load_config(shlex.split(arguments)) == load_config([])
    assert shlex.split(texts["test"].rpartition("&&")[2])[-2:] == ["-m", "not slow"]


@pytest.fixture
def published(tmp_path: Path) -> Path:
    """Datasets in their publishers' formats, each of a few invented records."""
    data = write_invented(tmp_path / "data")
    (data / "twitter2015_images").mkdir()
    return data


def test_readme_commands_for_own_data_and_models(
    published: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = [line for mark, text in blocks(README, "bash") if mark is None for line in text.splitlines()]
    lines = [line.replace("/data/", f"{published}/") for line in lines if line and not line.startswith("#")]
    trained: list[TrainConfig] = []
    monkeypatch.chdir(tmp_path)
    for words in map(shlex.split, lines):
        if words[0] == "lvlm-clorae":
            assert cli(words[1:]) == 0, words
        else:
            assert words[:2] == ["deepspeed", "train.py"]
            trained.append(load_config(words[2:]))
    assert {config.model for config in trained} >= {"flan-t5-base", "llava-1.5-7b"}
    assert {config.adapter for config in trained} >= {"clorae", "loramoe"}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(REPOSITORY)))
def test_training_accepts_the_flags_of_every_command(page: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also in indented blocks and in the running text."""
    monkeypatch.chdir(REPOSITORY)
    for line in page.read_text(encoding="utf-8").splitlines():
        for arguments in TRAIN.findall(line.replace("`", "\n")):
            words = shlex.split(arguments)
            if words[0].startswith("--") and "--help" not in words:
                load_config(words)


def test_flags_in_the_text_exist() -> None:
    """Flags in backquotes are settings of training, or flags of another command."""
    others = set(
        "base boxes check config constrained data dataset dataset_tasks datasets help images index layout".split()
    )
    others |= set("input json known limit max_rejected minutes name no_ssh paper png quick reference repeats".split())
    others |= set("report sample seconds shards size split stale_after work".split())
    known = others | set(TrainConfig.__dataclass_fields__)
    for page in set(PAGES) - {REPOSITORY / "slurm/README.md"}:
        for flag in re.findall(r"`--([a-z][a-z0-9_]*)[^`]*`", page.read_text(encoding="utf-8")):
            assert {flag, flag.removeprefix("no_")} & known, f"{page}: --{flag}"


def test_files_named_in_the_text_exist() -> None:
    folders = "benchmarks|docs|ds_configs|lvlm_clorae|recipes|tests|tools"
    for page in PAGES:
        for name in re.findall(rf"`((?:{folders})/[\w./-]+)`", page.read_text(encoding="utf-8")):
            assert (REPOSITORY / name).exists(), f"{page}: {name}"


def test_every_results_file_is_cited() -> None:
    text = "".join(page.read_text(encoding="utf-8") for page in PAGES)
    cited = set(re.findall(r"results/([\w.-]+\.json)", text))
    assert {path.name for path in (REPOSITORY / "benchmarks" / "results").iterdir()} == cited


@pytest.mark.integration
def test_commands_of_the_shards_page(tmp_path: Path) -> None:
    (tmp_path / "shards").symlink_to(REPOSITORY / "shards")
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    printed = []
    for _, text in blocks(REPOSITORY / "shards/README.md", "bash"):
        done = subprocess.run(["bash", "-euc", text], cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        printed.append(done.stdout)
    verified, built, inspected = printed
    assert "demo_events_test_00000.json" in verified
    assert "reviews: 2 train, 1 test" in built
    assert '"key": "demo_events_test_00003"' in inspected
    assert (tmp_path / "sample.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.integration
def test_commands_of_the_models_page(capsys: pytest.CaptureFixture[str]) -> None:
    page = DOCS / "models.md"
    for line in commands(page, "lvlm-clorae cost"):
        assert cli(shlex.split(line)[1:]) == 0
        assert "language model" in capsys.readouterr().out
    trained = [load_config(shlex.split(line)[2:]) for line in commands(page, "deepspeed train.py")]
    for config in trained:
        check_quantized(config, read_deepspeed_file(REPOSITORY / config.deepspeed))
    assert [config.model for config in trained] == [
        *("flan-t5-base", "llava-1.5-7b", "Qwen/Qwen2.5-VL-7B-Instruct", "smollm2-135m")
    ]
    name, tag = split_tower(str(trained[0].vision))
    assert open_clip.get_pretrained_cfg(name, str(tag)), "the tower of the example exists"


@pytest.mark.integration
def test_commands_of_the_scaling_page(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(REPOSITORY)
    printed = []
    for line in commands(DOCS / "scaling.md", "lvlm-clorae cost"):
        assert cli(shlex.split(line)[1:]) == 0
        printed.append(capsys.readouterr().out)
    for line in commands(DOCS / "scaling.md", "python -m tools.scaling"):
        scaling.main(shlex.split(line)[3:])
        printed.append(capsys.readouterr().out)
    assert "8 ranks, ZeRO-3" in printed[0]
    assert "8 ranks, ZeRO-3" in printed[2]
    assert json.loads(printed[1])["scaling"]["ranks"] == json.loads(printed[3])["ranks"] == 64


@pytest.mark.slow
def test_commands_of_the_cost_page(capsys: pytest.CaptureFixture[str]) -> None:
    printed = []
    for line in commands(DOCS / "cost.md", "python -m tools.methods"):
        methods.main(shlex.split(line)[3:])
        printed.append(capsys.readouterr().out)
    assert "flan-t5-large" in printed[0]
    assert set(json.loads(printed[1])) >= {"full", "LoRA", "MoSLoRA", "LoRAMoE", "C-LoRAE", "no gate", "no MIM"}


def test_evaluate_accepts_the_commands_of_the_training_page() -> None:
    for line in commands(DOCS / "training.md", "lvlm-clorae evaluate"):
        assert evaluate._parser().parse_args(shlex.split(line)[2:]).run


def test_json_blocks_are_samples() -> None:
    texts = [text for page in PAGES for _, text in blocks(page, "json")]
    assert texts
    for text in texts:
        assert check_sample(json.loads(text)) == []


def run_python(page: str) -> dict[str, Any]:
    """Run the page's Python block and return its variables."""
    [(_, text)] = blocks(REPOSITORY / page, "python")
    found: dict[str, Any] = {}
    exec(compile(text, page, "exec"), found)
    return found


@pytest.mark.integration
def test_python_of_the_data_page_reads_an_epoch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(REPOSITORY)
    found = run_python("docs/data.md")
    assert (found["sampler"].epoch, found["sampler"].consumed_samples) == (1, 0)
    assert len(found["batch"].keys) == 8


@pytest.mark.integration
def test_python_of_the_models_page_computes_a_loss() -> None:
    assert run_python("docs/models.md")["loss"].item() > 0


@pytest.mark.integration
def test_python_of_the_checkpoint_page_saves_an_adapter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    found = run_python("docs/checkpoint.md")
    assert found["model"].parameter_counts()["universal"] == 768
    assert found["model"].peft_config["default"].tasks == ["mner", "mre", "mee", "vqa"]
    assert (tmp_path / "adapter-with-vqa" / "adapter_model.safetensors").is_file()


def test_first_python_block_of_readme_computes_gradients() -> None:
    found: dict[str, Any] = {}
    exec(compile(dict(blocks(README, "python"))["python"], "README.md", "exec"), found)
    assert found["loss"].isfinite()
    assert all(weight.grad is not None for weight in found["model"].parameters() if weight.requires_grad)


def test_python_blocks_compile() -> None:
    for page in PAGES:
        for _, text in blocks(page, "python"):
            compile(text, str(page), "exec")


def anchors(page: Path) -> set[str]:
    """Return the anchors that GitHub gives to the page's headings."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(REPOSITORY)))
def test_links_have_targets(page: Path) -> None:
    for path, anchor in LINK.findall(page.read_text(encoding="utf-8")):
        target = page.parent / path if path else page
        assert target.exists(), path
        if anchor:
            assert anchor in anchors(target), f"{path}#{anchor}"


def test_the_index_links_to_every_page() -> None:
    index = DOCS / "README.md"
    linked = {(DOCS / path).resolve() for path, _ in LINK.findall(index.read_text(encoding="utf-8"))}
    assert set(PAGES) - linked == {index}
