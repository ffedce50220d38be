"""The configuration: where a value comes from, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from lvlm_clorae.errors import UserError
from lvlm_clorae.models.presets import preset_recipe
from lvlm_clorae.training.checks import check_values
from lvlm_clorae.training.config import FIELDS, TrainConfig, load_config, make_config, read_config


def yaml_file(folder: Path, text: str) -> str:
    path = folder / "config.yaml"
    path.write_text(text, encoding="utf-8")
    return str(path)


def test_defaults_then_recipe_then_yaml_then_flags(tmp_path: Path) -> None:
    recipe = preset_recipe("demo")
    assert recipe["rank"] != TrainConfig().rank
    assert recipe["micro_batch"] != TrainConfig().micro_batch
    path = yaml_file(tmp_path, "micro_batch: 3\nepochs: 7\n")

    config = load_config(["--config", path, "--epochs", "2"])
    assert config.gamma == TrainConfig().gamma
    assert config.rank == recipe["rank"]
    assert config.micro_batch == 3
    assert config.epochs == 2


def test_the_recipe_is_of_the_model_that_was_asked_for(tmp_path: Path) -> None:
    assert load_config(["--model", "flan-t5-base"]).rank == preset_recipe("flan-t5-base")["rank"]
    assert load_config(["--config", yaml_file(tmp_path, "model: flan-t5-base")]).rank == 128
    assert load_config(["--model", "owner/name"]) == TrainConfig(model="owner/name")


@pytest.mark.parametrize("name", ["demo", "flan-t5-base", "flan-t5-large", "flan-t5-xl"])
def test_the_recipes_hold_valid_settings(name: str) -> None:
    config = load_config(["--model", name])
    assert preset_recipe(name).items() <= vars(config).items()


def test_a_written_configuration_reads_back(tmp_path: Path) -> None:
    argv = [
        "--target-modules",
        "q",
        "k",
        "--no-use-gate",
        "--ema",
        "0.9",
        "--learning-rate",
        "1e-5",
        "--max-steps",
        "9",
    ]
    config = load_config(argv)
    assert read_config(Path(yaml_file(tmp_path, config.to_yaml()))) == config
    assert load_config(["--config", yaml_file(tmp_path, config.to_yaml())]) == config


def test_booleans_and_lists() -> None:
    assert load_config([]).use_gate
    assert not load_config(["--no-use-gate"]).use_gate
    assert load_config(["--no-use-gate", "--use-gate"]).use_gate
    assert load_config(["--target-modules", "q", "v", "--rank", "4"]).target_modules == ["q", "v"]
    assert load_config(["--target-modules"]).target_modules == []
    first, second = TrainConfig(), TrainConfig()
    first.target_modules.append("q")
    assert second.target_modules == []


def test_yaml_values_are_converted_as_flags_are(tmp_path: Path) -> None:
    config = load_config(["--config", yaml_file(tmp_path, "learning-rate: 1e-4\ndropout: 0\nepochs: 3.0\nema: null\n")])
    assert (config.learning_rate, config.dropout, config.epochs, config.ema) == (1e-4, 0.0, 3, None)
    assert isinstance(config.dropout, float)
    assert isinstance(config.epochs, int)


def test_an_empty_file_changes_nothing(tmp_path: Path) -> None:
    assert load_config(["--config", yaml_file(tmp_path, "")]) == load_config([])


def test_whole_numbers_of_any_size(tmp_path: Path) -> None:
    assert load_config(["--seed", str(2**53 + 1)]).seed == 2**53 + 1
    assert load_config(["--config", yaml_file(tmp_path, f"seed: {2**53 + 1}\nrank: 8.0")]).seed == 2**53 + 1
    with pytest.raises(UserError, match=r"seed = 1000.* is out of range"):
        check_values(make_config({"seed": 10**400}))


def test_the_launchers_flag_is_taken() -> None:
    assert load_config(["--local_rank=1"]) == load_config([])


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--epocs", "3"], 'no option --epocs. Did you mean "--epochs"?'),
        (["--epoch", "3"], 'no option --epoch. Did you mean "--epochs"?'),
        (["--use_gate"], 'Did you mean "--use-gate"?'),
        (["stray"], "no argument stray"),
        (["--epochs"], "expected one argument"),
        (["--epochs", "many"], 'epochs: "many" is not a whole number'),
        (["--epochs", "2.5"], 'epochs: "2.5" is not a whole number'),
        (["--gamma", "two"], 'gamma: "two" is not a number'),
        (["--adapter", "clorea"], 'adapter: "clorea" is not a choice. Did you mean "clorae"?'),
        (["--schedule", "cosin"], 'Did you mean "cosine"?'),
        (["--config", "/nowhere.yaml"], "/nowhere.yaml: the configuration cannot be read (No such file"),
    ],
)
def test_flags_that_are_refused(argv: list[str], message: str) -> None:
    with pytest.raises(UserError) as caught:
        load_config(argv)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("epocs: 3", 'no setting "epocs". Did you mean "epochs"?'),
        ("zzzzzz: 3", "Valid: accumulation, achievement,"),
        ("epochs: [3]", "epochs:"),
        ("epochs: true", 'epochs: "True" is not a whole number'),
        ("epochs: 2.5", 'epochs: "2.5" is not a whole number'),
        ("epochs: .inf", 'epochs: "inf" is not a whole number'),
        ("epochs: null", "epochs needs a value"),
        ("use_gate: 1", 'use_gate: "1" is not true or false'),
        ("use_gate: 'yes'", 'use_gate: "yes" is not true or false'),
        ("target_modules: q", 'target_modules: "q" is not a list of names'),
        ("target_modules: [1]", "is not a list of names"),
        ("resume: never", 'resume: "never" is not a choice'),
        ("- epochs", "must be a mapping"),
        ("epochs", "must be a mapping"),
        ("epochs: [", "not valid YAML"),
        ("!!python/object/apply:os.getcwd []", "not valid YAML"),
    ],
)
def test_yaml_that_is_refused(text: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        load_config(["--config", yaml_file(tmp_path, text)])
    assert message in str(caught.value)


def test_bytes_that_are_no_text(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_bytes(b"\xff\xfe\x00epochs")
    with pytest.raises(UserError, match="not valid YAML"):
        read_config(tmp_path / "config.yaml")
    with pytest.raises(UserError, match="cannot be read"):
        read_config(tmp_path)


def test_every_setting_has_help(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        load_config(["--help"])
    assert caught.value.code == 0
    text = capsys.readouterr().out
    for name, item in FIELDS.items():
        assert item.metadata["help"]
        assert "--" + name.replace("_", "-") in text
