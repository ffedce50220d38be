"""The sweep file: its points, what is refused, and that a point's arguments give its configuration."""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lvlm_clorae.errors import UserError
from lvlm_clorae.sweep.points import Sweep, read_sweep
from lvlm_clorae.training.config import load_config, make_config
from tests.launch import REPOSITORY
from tests.sweep.helpers import sweep_of, write_sweep
from tests.sweep.settings import SETTINGS, varied_settings


def names(sweep: Sweep) -> list[str]:
    return [point.name for point in sweep.points]


def test_grid_then_points_each_with_its_seeds(tmp_path: Path) -> None:
    sweep = sweep_of(
        tmp_path,
        settings={"model": "flan-t5-base", "micro-batch": 3},
        grid={"rank": [32, 64], "dropout": [0, 0.05]},
        points=[{"adapter": "lora", "rank": 64.0}],
        seeds=[0, 2],
    )
    assert names(sweep) == [
        *(f"rank={r},dropout={d},seed={s}" for r in (32, 64) for d in (0.0, 0.05) for s in (0, 2)),
        "adapter=lora,rank=64,seed=0",
        "adapter=lora,rank=64,seed=2",
    ]
    assert [point.number for point in sweep.points] == list(range(10))
    assert sweep.keys == ["adapter", "rank", "dropout"]
    assert sweep.points[-1].group == "adapter=lora,rank=64"
    expected = make_config({"model": "flan-t5-base", "micro_batch": 3, "adapter": "lora", "rank": 64, "seed": 2})
    directory = tmp_path / "runs" / "adapter=lora,rank=64,seed=2"
    assert sweep.points[-1].config == replace(expected, output=str(directory), resume="auto")
    assert sweep.points[-1].directory == directory


def test_the_commented_example() -> None:
    sweep = read_sweep(REPOSITORY / "recipes/sweeps/rank.yaml")
    assert len(sweep.points) == (3 * 2 + 1) * 3
    assert sweep.output == Path("runs/rank-sweep")
    assert names(sweep)[7] == "rank=64,dropout=0.0,seed=1"
    assert all((REPOSITORY / point.config.deepspeed).is_file() for point in sweep.points)


def test_defaults(tmp_path: Path) -> None:
    sweep = read_sweep(write_sweep(tmp_path, {"settings": {"seed": 5}}, "mine.yaml"))
    assert names(sweep) == ["seed=5"]
    assert sweep.points[0].directory == Path("runs/mine/seed=5")
    assert read_sweep(write_sweep(tmp_path, "seeds:\ngrid: {seed: [3, 4]}")).points[1].name == "seed=4"
    assert sweep_of(tmp_path, points=[{"rank": 3}], settings={"rank": 2}).points[0].config.rank == 3


def test_every_model_has_its_own_recipe(tmp_path: Path) -> None:
    sweep = sweep_of(tmp_path, grid={"model": ["demo", "flan-t5-base"]})
    assert [point.config.rank for point in sweep.points] == [16, 128]


def test_booleans_lists_and_nothing_can_be_swept(tmp_path: Path) -> None:
    sweep = sweep_of(tmp_path, grid={"use_gate": [True, False], "hold_out": [[], ["a", "b"]], "ema": [None, 0.9]})
    assert names(sweep)[:3] == [
        "use_gate=true,hold_out=none,ema=none,seed=0",
        "use_gate=true,hold_out=none,ema=0.9,seed=0",
        "use_gate=true,hold_out=a+b,ema=none,seed=0",
    ]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[", "not valid YAML"),
        ("- rank", "is a mapping"),
        ("", "is a mapping"),
        ({"girds": {}}, 'no key "girds". Did you mean "grid"?'),
        ({"rank": 3}, "It is a setting: it belongs under settings, grid or points."),
        ({"output": 3}, "output must be a directory"),
        ({"settings": [1]}, "settings must be a mapping"),
        ({"settings": {"rnk": 3}}, 'settings: there is no setting "rnk". Did you mean "rank"?'),
        ({"grid": {"rnk": [3]}}, 'grid: there is no setting "rnk". Did you mean "rank"?'),
        ({"points": [{"rank": 3}, {"rnk": 3}]}, "points, number 2: there is no setting"),
        ({"grid": {"rank": 3}}, "grid: rank must be a list"),
        ({"grid": {"rank": []}}, "grid: rank must be a list"),
        ({"grid": {"output": ["a"]}}, "grid: output is each run's own"),
        ({"settings": {"resume": "auto"}}, "settings: resume is each run's own"),
        ({"points": {"rank": 3}}, "points must be a list"),
        ({"points": [3]}, "points, number 1 must be a mapping"),
        ({"grid": {"rank": [3, "many"]}}, 'grid: rank: "many" is not a whole number'),
        ({"grid": {"rank": [3, 0]}}, "grid: rank = 0 is out of range"),
        ({"grid": {"adapter": ["clorea"]}}, 'Did you mean "clorae"?'),
        ({"settings": {"margin": 1}, "points": [{}]}, "margin = 1.0 is out of range"),
        ({"seeds": 3}, "seeds must be a list"),
        ({"seeds": []}, "seeds must be a list"),
        ({"seeds": ["one"]}, 'seed: "one" is not a whole number'),
        ({"seeds": [1], "grid": {"seed": [2]}}, "seed is given, but seeds are too"),
        ({"seeds": [1, 1]}, "seed=1 is the same run as seed=1"),
        ({"grid": {"rank": [64, 64.0]}}, "rank=64,seed=0 is the same run as rank=64,seed=0"),
        (
            {"grid": {"rank": [16, 64]}, "points": [{"rank": 64, "adapter": "clorae"}]},
            "points, number 1: adapter=clorae,rank=64,seed=0 is the same run as rank=64,seed=0",
        ),
    ],
)
def test_what_is_refused(content: Any, message: str, tmp_path: Path) -> None:
    path = write_sweep(tmp_path, content)
    with pytest.raises(UserError) as caught:
        read_sweep(path)
    assert message in str(caught.value)
    assert str(caught.value).startswith(f"{path}: ")


def test_a_file_that_is_none(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot be read"):
        read_sweep(tmp_path / "none.yaml")
    (tmp_path / "bytes.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="not valid YAML"):
        read_sweep(tmp_path / "bytes.yaml")


@given(varied_settings(), varied_settings())
@settings(deadline=None)
def test_the_arguments_give_the_configuration(shared: dict[str, Any], varied: dict[str, Any]) -> None:
    with tempfile.TemporaryDirectory() as name:
        [point] = sweep_of(Path(name), settings=shared, points=[varied]).points
        arguments = point.write_arguments()
        assert not any("\n" in argument for argument in arguments)
        assert arguments[-4:] == ["--output", str(point.directory), "--resume", "auto"]
        assert load_config(arguments) == point.config
        expected = make_config({**shared, **varied})
        assert load_config(arguments) == replace(expected, output=str(point.directory), resume="auto")
        assert not point.directory.exists(), "training refuses a directory that is not empty and holds no run"


def test_no_value_replaces_the_recipes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lvlm_clorae.training.config.preset_recipe", lambda model: {"patience": 3})
    [point] = sweep_of(tmp_path, settings={"patience": None}).points
    assert load_config(point.write_arguments()).patience is None


def test_arguments_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "runs").write_text("a file")
    [point] = sweep_of(tmp_path).points
    with pytest.raises(UserError, match="Choose another output"):
        point.write_arguments()


@st.composite
def grown(draw: st.DrawFn) -> tuple[dict[str, Any], dict[str, Any]]:
    """A sweep, and the same with more values, points and seeds, in any order."""
    key, other = draw(st.permutations(["rank", "gamma", "beta", "hold_out"]))[:2]
    values = {name: draw(st.lists(SETTINGS[name], min_size=2, max_size=4, unique_by=repr)) for name in (key, other)}
    seeds = draw(st.lists(st.integers(0, 9), min_size=2, max_size=4, unique=True))
    small = {"grid": {name: some[:1] for name, some in values.items()}, "seeds": seeds[:1]}
    points = [{"adapter": "lora", key: values[key][0]}, {"adapter": "moslora"}]
    large = {
        "points": draw(st.permutations(points)),
        "grid": {name: draw(st.permutations(values[name])) for name in draw(st.permutations([key, other]))},
        "seeds": draw(st.permutations(seeds)),
    }
    return small, large


@given(grown())
@settings(deadline=None)
def test_points_keep_name_and_configuration_when_others_come(both: tuple[dict[str, Any], dict[str, Any]]) -> None:
    with tempfile.TemporaryDirectory() as name:
        small, large = (sweep_of(Path(name), **content) for content in both)
    later = {point.name: point.config for point in large.points}
    assert {point.name: point.config for point in small.points}.items() <= later.items()
    assert len(later) == len(large.points)
