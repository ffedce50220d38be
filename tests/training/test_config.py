"""The configuration: where a value comes from, and what is refused."""

from __future__ import annotations

import dataclasses
import inspect
import json
from dataclasses import replace
from pathlib import Path
from typing import get_args, get_type_hints

import pytest
from pydantic import ValidationError

from lvlm_clorae.adapters.register import method_names
from lvlm_clorae.arguments import OTHER_NAMES, RENAMED
from lvlm_clorae.cli import main as cli
from lvlm_clorae.errors import UserError
from lvlm_clorae.models.loading import load_model
from lvlm_clorae.models.presets import preset_recipe, presets
from lvlm_clorae.tasks import MATCHES
from lvlm_clorae.training.config import FIELDS, GROUPS, MAY_CHANGE, EvaluationArguments, TrainConfig
from lvlm_clorae.training.config_loading import load_config, make_config, read_config
from lvlm_clorae.training.main import main
from tests.helpers.sweeps import bomb


def yaml_file(folder: Path, text: str) -> str:
    path = folder / "config.yaml"
    path.write_text(text, encoding="utf-8")
    return str(path)


def refusal(argv: list[str]) -> str:
    """The one-line message with which a command line is refused."""
    with pytest.raises(UserError) as caught:
        load_config(argv)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_defaults_then_recipe_then_deepspeed_then_yaml_then_flags(tmp_path: Path) -> None:
    recipe = preset_recipe("demo")
    assert recipe["lora_rank"] != TrainConfig().lora_rank
    section = {"lora_dropout": 0.5, "per_device_train_batch_size": 2, "num_train_epochs": 9, "load_in_8bit": True}
    (tmp_path / "ds.json").write_text(json.dumps({"lvlm_clorae": section}))
    path = yaml_file(tmp_path, f"per_device_train_batch_size: 3\nnum_train_epochs: 7\ndeepspeed: {tmp_path}/ds.json\n")

    config = load_config(["--config", path, "--num_train_epochs", "2"])
    assert config.gamma == TrainConfig().gamma
    assert config.lora_rank == recipe["lora_rank"]
    assert (config.load_in_8bit, config.lora_dropout) == (True, 0.5)
    assert config.per_device_train_batch_size == 3
    assert config.num_train_epochs == 2


def test_the_recipe_belongs_to_the_requested_model(tmp_path: Path) -> None:
    rank = preset_recipe("flan-t5-base")["lora_rank"]
    assert rank != TrainConfig().lora_rank
    assert load_config(["--model", "flan-t5-base"]).lora_rank == rank
    assert load_config(["--config", yaml_file(tmp_path, "model: flan-t5-base")]).lora_rank == rank
    assert load_config(["--model", "owner/name"]) == TrainConfig(model="owner/name")


@pytest.mark.parametrize("name", presets())
def test_recipes_are_valid_settings(name: str) -> None:
    assert preset_recipe(name).items() <= vars(load_config(["--model", name])).items()


def test_a_written_configuration_reads_back(tmp_path: Path) -> None:
    argv = "--target_modules q k --no_use_gate --ema 0.9 --learning_rate 1e-5 --max_steps 9 --bf16 false".split()
    config = load_config(argv)
    assert read_config(Path(yaml_file(tmp_path, config.to_yaml()))) == config
    assert load_config(["--config", yaml_file(tmp_path, config.to_yaml())]) == config
    assert list(FIELDS) == [line.partition(":")[0] for line in config.to_yaml().splitlines() if line[0] not in "- "]


@pytest.mark.parametrize(
    ("words", "value"),
    [
        ("--use_gate", True),
        ("--use-gate", True),
        ("--use_gate true", True),
        ("--use_gate=false", False),
        ("--use-gate false", False),
        ("--no_use_gate", False),
        ("--no-use-gate", False),
        ("--no-use-gate --use-gate", True),
    ],
)
def test_ways_to_write_a_boolean(words: str, value: bool) -> None:
    assert load_config(words.split()).use_gate is value


@pytest.mark.parametrize(("word", "value"), [("auto", "auto"), ("true", True), ("false", False)])
def test_bf16_is_auto_or_a_boolean(word: str, value: object, tmp_path: Path) -> None:
    assert load_config(["--bf16", word]).bf16 == value
    assert load_config(["--config", yaml_file(tmp_path, f"bf16: {word}")]).bf16 == value


def test_bf16_is_written_as_other_booleans() -> None:
    assert load_config(["--bf16", "--lora_rank", "4"]).bf16 is True
    assert load_config(["--no-bf16"]).bf16 is False


def test_lists_and_absent_values(tmp_path: Path) -> None:
    assert load_config("--target-modules q v --lora_rank 4".split()).target_modules == ["q", "v"]
    with pytest.raises(UserError, match="target_modules"):
        load_config(["--target_modules"])  # of an unset variable of a shell
    assert load_config(["--model", "owner/name", "--target_modules", "null"]).target_modules == []
    path = yaml_file(tmp_path, "lora_alpha: 3\nvision: x")
    assert load_config(["--config", path, "--lora_alpha", "null", "--vision", "none"]).lora_alpha is None
    assert load_config(["--vision", "none"]).vision == "none"
    first, second = TrainConfig(), TrainConfig()
    first.target_modules.append("q")
    assert second.target_modules == []


def test_yaml_values_have_the_types_of_the_fields(tmp_path: Path) -> None:
    text = "learning-rate: 1e-4\nlora_dropout: 0\nnum_train_epochs: 3.0\nema: null\n"
    config = load_config(["--config", yaml_file(tmp_path, text)])
    found = (config.learning_rate, config.lora_dropout, config.num_train_epochs, config.ema)
    assert found == (1e-4, 0.0, 3, None)
    assert [type(value) for value in found] == [float, float, int, type(None)]


def test_an_empty_file_changes_nothing(tmp_path: Path) -> None:
    assert load_config(["--config", yaml_file(tmp_path, "")]) == load_config([])


def test_large_integers_are_exact(tmp_path: Path) -> None:
    assert load_config(["--seed", str(2**53 + 1)]).seed == 2**53 + 1
    assert load_config(["--config", yaml_file(tmp_path, f"seed: {2**53 + 1}\nlora_rank: 8.0")]).seed == 2**53 + 1
    with pytest.raises(UserError, match="seed"):
        make_config({"seed": 10**400})


def test_the_flag_of_the_deepspeed_launcher_is_ignored() -> None:
    assert load_config(["--local_rank=1"]) == load_config([])


@pytest.mark.parametrize(
    ("line", "named"),
    [
        ("--num_train_epoch 3", '"--num_train_epochs"'),
        ("--num-train-epoch 3", '"--num_train_epochs"'),
        ("stray", "stray"),
        ("--num_train_epochs", "--num_train_epochs"),
        ("--num_train_epochs many", "num_train_epochs = many"),
        ("--num_train_epochs 2.5", "num_train_epochs = 2.5"),
        ("--gamma two", "gamma = two"),
        ("--use_gate maybe", "use_gate = maybe"),
        ("--bf16 maybe", "auto, true, false"),
        ("--adapter clorea", '"clorae"'),
        ("--adapter x", ", ".join([*method_names(), "full", "none"])),
        ("--lr_scheduler_type cosin", '"cosine"'),
        ("--lr_scheduler_type x", "constant, linear, cosine, step"),
        ("--config /nowhere.yaml", "/nowhere.yaml"),
        ("--config=", "configuration"),
        ("--output_dir=", "output_dir"),
        ("--deepspeed=", "deepspeed"),
        ("--lora_rank null", "lora_rank"),
        ("--lora_dropout 2", "at least 0, below 1"),
        ("--learning_rate fast", "a number, above 0"),
        ("--", "--help"),
        ("-- --lora_rank 3", "--help"),
        ("--no_mim_tokens", "removed"),
    ],
)
def test_invalid_flags(line: str, named: str) -> None:
    assert named in refusal(line.split())


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("num_train_epoch: 3", '"num_train_epochs"'),
        ("zzzzzz: 3", "train.py --help"),
        ("num_train_epochs: [3]", "num_train_epochs"),
        ("num_train_epochs: true", "num_train_epochs"),
        ("learning_rate: true", "learning_rate"),
        ("shards: true", "shards"),
        ("num_train_epochs: 2.5", "num_train_epochs = 2.5"),
        ("num_train_epochs: .inf", "num_train_epochs"),
        ("num_train_epochs: null", "num_train_epochs"),
        ("use_gate: 7", "use_gate"),
        ("use_gate: 'maybe'", "use_gate"),
        ("target_modules: {q: 1}", "target_modules"),
        ("target_modules: [1]", "target_modules"),
        ("target_modules: null", "a list of names"),
        ("normalize: x", "softmax, sum, none"),
        ("bf16: x", "auto, true, false"),
        ("beta: [1]", "a number, at least 0"),
        ("beta: x", "beta"),
        ("shards: ''", "shards"),
        ('lora_rank: "1\\n2"', "lora_rank"),
        ("seed: 2020-13-45", "YAML"),
        (f"seed: {'1' * 5000}", "YAML"),
        ("- num_train_epochs", "mapping"),
        ("num_train_epochs", "mapping"),
        ("num_train_epochs: [", "YAML"),
        ("lora_rank: 2\nlora_rank: 3", '"lora_rank"'),
        ("lora_rank: 2\nlora-rank: 2", '"lora_rank"'),
        ("hold_out: {a: 1, a: 2}", '"a" is given twice'),
        ("x: &x {seed: 1}\n<<: *x\n<<: *x", '"<<" is given twice'),
        ("true: 1\n'true': 2", '"true" is given twice'),
        ("seed: !!int ''", "YAML"),
        ("seed: !!bool maybe", "YAML"),
        ("seed: !!timestamp soon", "YAML"),
        ("? [seed]\n: 1", "YAML"),
        ("seed: " + "[" * 1000 + "]" * 1000, "YAML"),
        ("\n".join(f"{' ' * depth}a:" for depth in range(1000)), "YAML"),
        ("seed: " + "{a: " * 1000 + "}" * 1000, "YAML"),
        (bomb("[{}]"), "alias"),
        (bomb("{{<<: [{}]}}"), "alias"),
        ("seed: &a [*a]", "alias"),
        ("seed: &a {b: *a}", "alias"),
        ("!!python/object/apply:os.getcwd []", "YAML"),
    ],
)
def test_invalid_yaml(text: str, named: str, tmp_path: Path) -> None:
    path = yaml_file(tmp_path, text)
    message = refusal(["--config", path])
    assert named in message
    assert "\n" not in message
    assert message.count(path) == 1
    with pytest.raises(UserError) as caught:
        read_config(Path(path))
    assert str(caught.value) == message


def test_an_invalid_flag_is_not_attributed_to_the_file(tmp_path: Path) -> None:
    path = yaml_file(tmp_path, "lora_rank: 3")
    assert path not in refusal(["--config", path, "--lora_dropout", "2"])


def test_files_that_are_not_text(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_bytes(b"\xff\xfe\x00epochs")
    (tmp_path / "deep.yaml").write_text("[" * 5000)
    for path in (tmp_path / "config.yaml", tmp_path / "deep.yaml", tmp_path):
        with pytest.raises(UserError, match=str(path)):
            read_config(path)


@pytest.mark.parametrize(
    "old", [name for name, new in RENAMED.items() if new.split(" ")[0] in FIELDS and name != "batch"]
)
def test_old_names_are_refused_with_the_new_name(old: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    new = RENAMED[old].split(" ")[0]
    for flag in (old, old.replace("_", "-")):
        assert main([f"--{flag}", "1"]) == 2
        assert f"--{new}" in capsys.readouterr().err
    assert main(["--config", yaml_file(tmp_path, f"{old}: 1")]) == 2
    assert new in capsys.readouterr().err


def test_names_of_other_tools_are_refused_with_the_name_here(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert not OTHER_NAMES.keys() & {*FIELDS, *RENAMED}
    assert {"lr", "r", "lora_target", "model_name_or_path", "cutoff_len", "eval_strategy"} <= OTHER_NAMES.keys()
    for other, here in OTHER_NAMES.items():
        name = here.split(" ")[0]
        if name in FIELDS:
            assert main([f"--{other}", "1"]) == 2
            assert f"--{here} here" in capsys.readouterr().err
            assert main(["--config", yaml_file(tmp_path, f"{other}: 1")]) == 2
            assert f"{here} here" in capsys.readouterr().err
    assert cli(["predict", "--adapter_name_or_path", "x"]) == 2
    assert "--run here" in capsys.readouterr().err


def test_removed_settings_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--mim-tokens", "12"]) == 2
    assert "removed" in capsys.readouterr().err


_ZERO = (
    "lora_rank lora_expert_rank lora_alpha per_device_train_batch_size gradient_accumulation_steps num_train_epochs "
    "max_steps learning_rate step_epochs per_device_eval_batch_size gamma eval_every_epochs save_steps "
    "save_total_limit logging_steps max_source_length max_target_length early_stopping_patience cache_gib "
    "ddp_timeout global_micro_batch"
)


@pytest.mark.parametrize(
    ("names", "values"),
    [
        (_ZERO, ("0", "-1")),
        ("beta weight_decay max_grad_norm seed dataloader_num_workers log_conflicts", ("-1",)),
        ("beta gamma margin learning_rate lora_dropout warmup_ratio lora_alpha ddp_timeout", ("nan", "inf")),
        ("lora_dropout warmup_ratio ema margin", ("1", "-0.1")),
        ("interleave_temperature", ("0.9",)),
        ("seed", (str(1 << 63), str(10**30))),
        (_ZERO.replace(" learning_rate", "").replace(" lora_alpha", "").replace(" gamma", ""), (str(10**30), "1e300")),
        ("dataloader_num_workers", ("1025",)),
        ("log_conflicts", (str(10**30),)),
    ],
)
def test_values_out_of_range(names: str, values: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    for name in names.split():
        for value in values:
            assert main([f"--{name}={value}"]) == 2, (name, value)
            assert capsys.readouterr().err.startswith(f"error: {name} = {value}: "), (name, value)


@pytest.mark.parametrize(
    "line",
    [
        "--lora_dropout 0 --warmup_ratio 0 --ema 0 --margin 1.001 --interleave_temperature 1",
        "--beta 0 --weight_decay 0 --max_grad_norm 0 --dataloader_num_workers 0 --log_conflicts 0",
        f"--seed {(1 << 63) - 1} --save_steps {10**9} --cache_gib 1e9 --ddp_timeout 1e9",
    ],
)
def test_values_at_the_edge_of_their_range(line: str) -> None:
    load_config(line.split())


def test_a_configuration_is_checked_however_it_is_made() -> None:
    with pytest.raises(ValidationError, match="lora_rank"):
        TrainConfig(lora_rank=0)
    with pytest.raises(ValidationError, match="lora_rank"):
        replace(TrainConfig(), lora_rank=0)
    with pytest.raises(ValidationError, match="rank"):
        TrainConfig(rank=8)  # type: ignore[call-arg]


def test_every_setting_has_a_group_and_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert [item.name for group in GROUPS for item in dataclasses.fields(group)] == list(FIELDS)
    assert all(isinstance(TrainConfig(), group) for group in GROUPS)
    with pytest.raises(SystemExit) as caught:
        load_config(["--help"])
    assert caught.value.code == 0
    text = capsys.readouterr().out
    for name, item in FIELDS.items():
        assert item.metadata["help"]
        assert f"--{name}" in text
    assert all(name in text for name in (*method_names(), *presets()))


def test_help_shows_the_recipes_that_override_its_defaults(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        load_config(["--help"])
    lines = capsys.readouterr().out.splitlines()
    for name in presets():
        (line,) = [line for line in lines if line.strip().startswith(f"{name}: ")]
        assert all(f'"{key}": {json.dumps(value)}' in line for key, value in preset_recipe(name).items())


def test_settings_that_decide_the_result_may_not_change() -> None:
    assert {"output_dir", "deepspeed", "per_device_train_batch_size", "ddp_timeout"} <= MAY_CHANGE
    assert not MAY_CHANGE & {"seed", "lora_rank", "learning_rate", "shards", "model", "num_train_epochs", "match"}


def test_choices_are_those_of_the_modules_that_use_them() -> None:
    assert get_args(get_type_hints(EvaluationArguments)["match"]) == MATCHES


def test_load_options_are_arguments_of_load_model() -> None:
    parameters = inspect.signature(load_model).parameters
    assert TrainConfig().load_options().keys() <= parameters.keys()


def test_one_name_is_a_list_of_one(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("target_modules: all-linear\n")
    assert load_config(["--config", str(tmp_path / "c.yaml")]).target_modules == ["all-linear"]
