"""Sweep files: their runs, names and arguments, and the files that are refused."""

from __future__ import annotations

import re
import subprocess
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lvlm_clorae.errors import UserError
from lvlm_clorae.sweep.expand import MAX_NAME, Sweep, read_sweep, sweep_run_name, write_arguments
from lvlm_clorae.training.config import FIELDS
from lvlm_clorae.training.config_loading import load_config, make_config, read_config
from tests.helpers.launch import REPOSITORY
from tests.helpers.sweeps import SETTINGS, bomb, sweep_of, varied_settings, write_sweep


def names(sweep: Sweep) -> list[str]:
    return [sweep_run.name for sweep_run in sweep.sweep_runs]


def test_grid_and_further_runs_are_repeated_with_each_seed(tmp_path: Path) -> None:
    sweep = sweep_of(
        tmp_path,
        settings={"model": "flan-t5-base", "per-device-train-batch-size": 3},
        grid={"lora_rank": [32, 64], "lora_dropout": [0, 0.05]},
        sweep_runs=[{"adapter": "lora", "lora_rank": 64.0}],
        seeds=[0, 2],
    )
    assert names(sweep) == [
        *(f"lora_rank={r},lora_dropout={d},seed={s}" for r in (32, 64) for d in (0.0, 0.05) for s in (0, 2)),
        "adapter=lora,lora_rank=64,seed=0",
        "adapter=lora,lora_rank=64,seed=2",
    ]
    assert [sweep_run.number for sweep_run in sweep.sweep_runs] == list(range(10))
    assert sweep.keys == ["adapter", "lora_rank", "lora_dropout"]
    assert sweep.sweep_runs[-1].group == "adapter=lora,lora_rank=64"
    expected = make_config(
        {"model": "flan-t5-base", "per_device_train_batch_size": 3, "adapter": "lora", "lora_rank": 64, "seed": 2}
    )
    directory = tmp_path / "runs" / "adapter=lora,lora_rank=64,seed=2"
    assert sweep.sweep_runs[-1].config == replace(expected, output_dir=str(directory), resume_from_checkpoint="auto")
    assert sweep.sweep_runs[-1].directory == directory


def test_the_example_in_recipes() -> None:
    sweep = read_sweep(REPOSITORY / "recipes/sweeps/rank.yaml")
    assert len(sweep.sweep_runs) == (3 * 2 + 1) * 3
    assert sweep.output_dir == Path("runs/rank-sweep")
    assert names(sweep)[7] == "lora_rank=64,lora_dropout=0.0,seed=1"
    assert all((REPOSITORY / sweep_run.config.deepspeed).is_file() for sweep_run in sweep.sweep_runs)


def test_defaults_of_a_sweep_file(tmp_path: Path) -> None:
    sweep = read_sweep(write_sweep(tmp_path, {"settings": {"seed": 5}}, "mine.yaml"))
    assert names(sweep) == ["seed=5"]
    assert sweep.sweep_runs[0].directory == Path("runs/mine/seed=5")
    assert read_sweep(write_sweep(tmp_path, "seeds:\ngrid: {seed: [3, 4]}")).sweep_runs[1].name == "seed=4"
    assert (
        sweep_of(tmp_path, sweep_runs=[{"lora_rank": 3}], settings={"lora_rank": 2}).sweep_runs[0].config.lora_rank == 3
    )


def test_each_model_has_its_own_recipe(tmp_path: Path) -> None:
    sweep = sweep_of(tmp_path, grid={"model": ["demo", "flan-t5-base"]})
    assert [sweep_run.config.lora_rank for sweep_run in sweep.sweep_runs] == [16, 128]


def test_settings_of_the_deepspeed_file_apply_and_are_written(tmp_path: Path) -> None:
    sweep = sweep_of(tmp_path, grid={"deepspeed": ["zero2", "ds_configs/zero2_int8.json"]}, settings={"lora_rank": 2})
    assert [sweep_run.config.load_in_8bit for sweep_run in sweep.sweep_runs] == [False, True]
    assert read_config(Path(write_arguments(sweep.sweep_runs[1])[1])).load_in_8bit is True


def test_booleans_lists_and_null_can_be_swept(tmp_path: Path) -> None:
    sweep = sweep_of(tmp_path, grid={"use_gate": [True, False], "hold_out": [[], ["a", "b"]], "ema": [None, 0.9]})
    assert names(sweep)[:3] == [
        "use_gate=true,hold_out=none,ema=none,seed=0",
        "use_gate=true,hold_out=none,ema=0.9,seed=0",
        "use_gate=true,hold_out=a+b,ema=none,seed=0",
    ]


@pytest.mark.parametrize(
    ("content", "part"),
    [
        ("[", "not valid YAML"),
        ("settings: {seed: 1}\nsettings: {seed: 2}", '"settings"'),
        ("grid: {lora_rank: [1], lora-rank: [2]}", '"lora_rank"'),
        ("sweep_runs:\n- {seed: 1, seed: 2}", '"seed" is given twice'),
        ("settings: " + "[" * 1000 + "]" * 1000, "not valid YAML"),
        (bomb("[{}]"), "alias"),
        ("- rank", "is a mapping"),
        ("", "is a mapping"),
        ({"girds": {}}, '"grid"'),
        ({"lora_rank": 3}, '"lora_rank" is a setting'),
        ({"output_dir": 3}, "output_dir must be a directory"),
        ({"output": "a"}, "output_dir"),
        ({"points": []}, "sweep_runs"),
        ({"settings": {"rank": 3}}, "lora_rank"),
        ({"settings": [1]}, "settings must be a mapping"),
        ({"settings": {"rnk": 3}}, 'settings: There is no setting "rnk"'),
        ({"grid": {"rnk": [3]}}, 'grid: There is no setting "rnk"'),
        ({"sweep_runs": [{"lora_rank": 3}, {"rnk": 3}]}, "sweep_runs, number 2: There is no setting"),
        ({"grid": {"lora_rank": 3}}, "grid: lora_rank must be a list"),
        ({"grid": {"lora_rank": []}}, "grid: lora_rank must be a list"),
        ({"grid": {"output_dir": ["a"]}}, "grid: output_dir"),
        ({"settings": {"resume_from_checkpoint": "auto"}}, "settings: resume_from_checkpoint"),
        ({"sweep_runs": {"lora_rank": 3}}, "sweep_runs must be a list"),
        ({"sweep_runs": [3]}, "sweep_runs, number 1 must be a mapping"),
        ({"grid": {"lora_rank": [3, "many"]}}, "grid: lora_rank = many"),
        ({"grid": {"lora_rank": [3, 0]}}, "grid: lora_rank = 0"),
        ({"grid": {"adapter": ["clorea"]}}, '"clorae"'),
        ({"settings": {"margin": 1}, "sweep_runs": [{}]}, "margin = 1"),
        ({"seeds": 3}, "seeds must be a list"),
        ({"seeds": []}, "seeds must be a list"),
        ({"seeds": ["one"]}, "seed = one"),
        ({"seeds": [1], "grid": {"seed": [2]}}, "both seed and seeds"),
        ({"seeds": [1, 1]}, "seed=1 is the same run as seed=1"),
        ({"grid": {"lora_rank": [64, 64.0]}}, "lora_rank=64,seed=0 is the same run as lora_rank=64,seed=0"),
        (
            {"grid": {"lora_rank": [16, 64]}, "sweep_runs": [{"lora_rank": 64, "adapter": "clorae"}]},
            "sweep_runs, number 1: adapter=clorae,lora_rank=64,seed=0 is the same run as lora_rank=64,seed=0",
        ),
    ],
)
def test_invalid_sweep_files_are_refused(content: Any, part: str, tmp_path: Path) -> None:
    path = write_sweep(tmp_path, content)
    with pytest.raises(UserError) as caught:
        read_sweep(path)
    assert part in str(caught.value)
    assert str(caught.value).startswith(f"{path}: ")


def test_an_unreadable_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot be read"):
        read_sweep(tmp_path / "none.yaml")
    (tmp_path / "bytes.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="not valid YAML"):
        read_sweep(tmp_path / "bytes.yaml")


@pytest.mark.integration
@given(varied_settings(), varied_settings())
@settings(deadline=None)
def test_the_arguments_reproduce_the_configuration(shared: dict[str, Any], varied: dict[str, Any]) -> None:
    with tempfile.TemporaryDirectory() as name:
        [sweep_run] = sweep_of(Path(name), settings=shared, sweep_runs=[varied]).sweep_runs
        arguments = write_arguments(sweep_run)
        assert not any("\n" in argument for argument in arguments)
        assert arguments[-4:] == ["--output_dir", str(sweep_run.directory), "--resume_from_checkpoint", "auto"]
        assert load_config(arguments) == sweep_run.config
        expected = make_config({**shared, **varied})
        assert load_config(arguments) == replace(
            expected, output_dir=str(sweep_run.directory), resume_from_checkpoint="auto"
        )
        assert not sweep_run.directory.exists(), "training refuses a directory with files but no run"


def test_null_overrides_the_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "lvlm_clorae.training.config_loading.preset_recipe", lambda model: {"early_stopping_patience": 3}
    )
    [sweep_run] = sweep_of(tmp_path, settings={"early_stopping_patience": None}).sweep_runs
    assert load_config(write_arguments(sweep_run)).early_stopping_patience is None


def test_arguments_that_cannot_be_written_are_an_error(tmp_path: Path) -> None:
    (tmp_path / "runs").write_text("a file")
    [sweep_run] = sweep_of(tmp_path).sweep_runs
    with pytest.raises(UserError, match="output_dir"):
        write_arguments(sweep_run)


@st.composite
def grown(draw: st.DrawFn) -> tuple[dict[str, Any], dict[str, Any]]:
    """A sweep, and the same with more values, runs and seeds, in any order."""
    key, other = draw(st.permutations(["lora_rank", "gamma", "beta", "hold_out"]))[:2]
    values = {name: draw(st.lists(SETTINGS[name], min_size=2, max_size=4, unique_by=repr)) for name in (key, other)}
    seeds = draw(st.lists(st.integers(0, 9), min_size=2, max_size=4, unique=True))
    small = {"grid": {name: some[:1] for name, some in values.items()}, "seeds": seeds[:1]}
    sweep_runs = [{"adapter": "lora", key: values[key][0]}, {"adapter": "moslora"}]
    large = {
        "sweep_runs": draw(st.permutations(sweep_runs)),
        "grid": {name: draw(st.permutations(values[name])) for name in draw(st.permutations([key, other]))},
        "seeds": draw(st.permutations(seeds)),
    }
    return small, large


@pytest.mark.integration
@given(grown())
@settings(deadline=None)
def test_added_runs_leave_the_others_unchanged(
    both: tuple[dict[str, Any], dict[str, Any]],
) -> None:
    with tempfile.TemporaryDirectory() as name:
        small, large = (sweep_of(Path(name), **content) for content in both)
    later = {sweep_run.name: sweep_run.config for sweep_run in large.sweep_runs}
    assert {sweep_run.name: sweep_run.config for sweep_run in small.sweep_runs}.items() <= later.items()
    assert len(later) == len(large.sweep_runs)


@pytest.mark.parametrize(
    ("varied", "name"),
    [
        ({"lora_rank": 64, "lora_dropout": 0.05, "seed": 1}, "lora_rank=64,lora_dropout=0.05,seed=1"),
        ({"seed": 1, "match": "umie", "lora_rank": 64}, "lora_rank=64,match=umie,seed=1"),
        ({"learning_rate": 1e-5, "use_gate": False}, "use_gate=false,learning_rate=1e-05"),
        ({"ema": None, "adapter": "none"}, "adapter=none,ema=none"),
        ({"target_modules": ["q", "v"], "hold_out": []}, "target_modules=q+v,hold_out=none"),
        ({}, ""),
    ],
)
def test_names_are_readable(varied: dict[str, Any], name: str) -> None:
    assert sweep_run_name(varied) == name


def test_values_that_would_read_alike_have_different_names() -> None:
    alike = [
        [{"vision": None}, {"vision": "none"}],
        [{"hold_out": []}, {"hold_out": ["none"]}],
        [{"hold_out": ["a", "b"]}, {"hold_out": ["a+b"]}],
        [{"shards": "a/b"}, {"shards": "a-b"}, {"shards": "a b"}],
        [{"template": "x" * 40}, {"template": "x" * 41}],
        [{"model": ""}, {"model": "@"}],
    ]
    for values in alike:
        assert len({sweep_run_name(varied) for varied in values}) == len(values), values


@given(varied_settings(), varied_settings())
def test_names_are_safe_and_unique(first: dict[str, Any], second: dict[str, Any]) -> None:
    for varied in (first, second):
        assert re.fullmatch(r"[A-Za-z0-9=,._+@-]*", sweep_run_name(varied))
        assert len(sweep_run_name(varied)) <= MAX_NAME
    same = repr(sorted(first.items())) == repr(sorted(second.items()))
    assert (sweep_run_name(first) == sweep_run_name(second)) == same


@given(varied_settings(), st.randoms())
def test_a_name_does_not_depend_on_the_order_of_the_keys(varied: dict[str, Any], random: Any) -> None:
    keys = list(varied)
    random.shuffle(keys)
    assert sweep_run_name({key: varied[key] for key in keys}) == sweep_run_name(varied)


def test_a_name_of_all_settings_is_short_and_keeps_its_seed() -> None:
    everything = {name: "x" * 100 if name != "seed" else 7 for name in FIELDS}
    assert len(sweep_run_name(everything)) <= MAX_NAME
    assert sweep_run_name(everything).endswith(",seed=7")
    assert sweep_run_name(everything) != sweep_run_name({**everything, "deepspeed": "y"})


@pytest.mark.integration
def test_a_shell_does_not_expand_names(tmp_path: Path) -> None:
    """Without quotes, in a directory whose files could match."""
    unsafe = [
        sweep_run_name({"model": "a b$(touch x)*?", "lora_rank": 3, "target_modules": ["q", "~"]}),
        sweep_run_name({"template": "{image}\n{prompt}", "ema": 0.5, "seed": 1}),
    ]
    for name in unsafe:
        (tmp_path / name).touch()
    done = subprocess.run(["bash", "-uc", f"printf '%s\\n' {' '.join(unsafe)}"], cwd=tmp_path, capture_output=True)
    assert done.stdout.decode().split("\n")[:-1] == unsafe
