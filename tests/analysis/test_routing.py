"""Gate routing: counts against a plain recomputation of every gate by token type, and the command."""

from __future__ import annotations

import json
import math
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console
from torch import Tensor

from lvlm_clorae.analysis.plots import ROUTING_PLOT, plot_routing
from lvlm_clorae.analysis.routing import (
    CROSS,
    DECODER,
    ENCODER,
    MODEL,
    LayerLocation,
    Panel,
    Routing,
    Tally,
    bands,
    count,
    route,
)
from lvlm_clorae.cli import main as cli
from lvlm_clorae.models import load_model
from lvlm_clorae.models.processor import TOKEN_TYPES as KINDS
from lvlm_clorae.tasks import TASKS
from lvlm_clorae.training.adapters import add_adapter
from lvlm_clorae.training.config import TrainConfig
from tests.helpers.adapter_directory import write_schema
from tests.helpers.launch import REPOSITORY, environment, small_shards
from tests.helpers.pages import commands
from tests.helpers.tiny import noise_image, save_tiny, tiny_model, tiny_processor
from tests.helpers.tiny_causal import randomize, save_language, save_tower
from tests.helpers.tiny_image_text import save_qwen

Batch = dict[str, Tensor]
PROMPTS = [
    "event arguments. objects: O1 <region> O2 <region> text: guards struck the harbour",
    "entities. text: Mara",
    "entities. text: Mara Novotny leaves Tamsk for the Winter Cup tonight",
    "event arguments. objects: O1 <region> text: guards",
]
IMAGES = [noise_image(), None, noise_image(1), noise_image(2)]
BOXES = [[[0, 0, 20, 15], [10, 5, 40, 30]], [], [], [[1, 1, 20, 20]]]
ANSWERS = ["attack <spot> target, O1", "none", "person, Mara Novotny <spot> location, Tamsk", "none"]
PATCHES = 4


def batches(processor: Any, size: int) -> list[Batch]:
    """The four samples in batches of a size, which decides the padding."""
    cuts = [slice(start, start + size) for start in range(0, len(PROMPTS), size)]
    return [processor(PROMPTS[cut], IMAGES[cut], BOXES[cut], ANSWERS[cut]) for cut in cuts]


def tuned(model: Any, seed: int = 1, **settings: Any) -> Any:
    """The model in float64 with a random adapter."""
    model = add_adapter(model, TrainConfig(lora_rank=4, lora_dropout=0.0, **settings), list(TASKS))
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.3)
    return model.double().eval()


def t5(fusion: str, **settings: Any) -> tuple[Any, Any]:
    return tuned(tiny_model(fusion=fusion), **settings), tiny_processor()


@pytest.fixture(scope="module")
def causal(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    directory = tmp_path_factory.mktemp("causal")
    save_language(directory)
    model, processor = load_model(str(directory), vision=save_tower(directory / "tower"))
    randomize(model.projector)
    return tuned(model), processor


@pytest.fixture(scope="module")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    directory = tmp_path_factory.mktemp("qwen")
    save_qwen(directory)
    model, processor = load_model(str(directory))
    return tuned(model), processor


TypeOf = Callable[[str, Batch, int, int], str | None]
"""The type of the token at a row and position of a layer's input, by hand; None for padding."""


def t5_type(before: int) -> TypeOf:
    region = tiny_processor().region_token_id

    def kind(layer: str, batch: Batch, row: int, position: int) -> str | None:
        if layer.startswith("decoder") and not layer.endswith(("EncDecAttention.k", "EncDecAttention.v")):
            return "answer" if batch["labels"][row, position] != -100 else None
        if position < before:
            return "visual" if batch["pixel_mask"][row] else None
        position -= before
        if not batch["attention_mask"][row, position]:
            return None
        return "visual" if batch["input_ids"][row, position] == region else "text"

    return kind


def causal_type(*slots: int) -> TypeOf:
    def kind(layer: str, batch: Batch, row: int, position: int) -> str | None:
        if not batch["attention_mask"][row, position]:
            return None
        label = position - batch["input_ids"].shape[1] + batch["labels"].shape[1]
        if label >= 0 and batch["labels"][row, label] != -100:
            return "answer"
        return "visual" if batch["input_ids"][row, position] in slots else "text"

    return kind


def plainly(model: Any, task: str, given: list[Batch], type_of: TypeOf) -> dict[str, dict[str, Tally]]:
    """Recompute every token's gate from the layer's input: softmax(W_g x), one token after another."""
    layers, found = model.base_model.adapted_layers(), {}
    read: dict[str, Tensor] = {}
    hooks = [
        layer.register_forward_pre_hook(lambda _, inputs, name=name: read.update({name: inputs[0]}))
        for name, layer in layers.items()
    ]
    model.set_task(task)
    for batch in given:
        with torch.no_grad():
            model(**batch)
        for name, layer in layers.items():
            gate, tallies = layer.adapters["default"].gate, found.setdefault(name, dict.fromkeys(KINDS, Tally()))
            for row, tokens in enumerate(read[name]):
                for position, token in enumerate(tokens):
                    kind = type_of(name, batch, row, position)
                    if kind is not None:
                        universal, own = (math.exp(float(line @ token)) for line in gate.detach())
                        tallies[kind] += Tally(1, float(own > universal), own / (own + universal))
    for hook in hooks:
        hook.remove()
    return found


def assert_alike(found: dict[str, dict[str, Tally]], expected: dict[str, dict[str, Tally]]) -> None:
    assert found.keys() == expected.keys()
    for name, kinds in expected.items():
        for kind, tally in kinds.items():
            assert list(found[name][kind]) == pytest.approx(list(tally), rel=1e-9), (name, kind)


@pytest.mark.parametrize(("fusion", "before"), [("concat", PATCHES), ("gated", 0)])
@pytest.mark.parametrize("targets", [[], ["q", "k", "v", "o", "wo"]], ids=["default", "many"])
def test_t5_equals_a_recomputation_of_every_gate(fusion: str, before: int, targets: list[str]) -> None:
    model, processor = t5(fusion, target_modules=targets)
    given = batches(processor, 2)
    found, expected = route(model, "mee", iter(given)), plainly(model, "mee", given, t5_type(before))
    assert_alike(found, expected)
    shares = [tally.share for kinds in found.values() for tally in kinds.values() if tally.tokens]
    assert any(0 < share < 1 for share in shares if share is not None), "equal gates would prove nothing"
    value = found["decoder.block.1.layer.1.EncDecAttention.v"]
    assert value["text"].tokens > 20, "layers that read the encoder see its tokens"
    assert value["answer"] == Tally()


def test_t5_without_images() -> None:
    model, processor = t5("concat")
    given = [processor(PROMPTS[1:3], None, None, ANSWERS[1:3])]
    found = route(model, "mner", iter(given))
    assert_alike(found, plainly(model, "mner", given, t5_type(PATCHES)))
    assert all(kinds["visual"] == Tally() for kinds in found.values())


def test_a_causal_model_equals_a_recomputation_of_every_gate(causal: tuple[Any, Any]) -> None:
    model, processor = causal
    given = batches(processor, 2)
    type_of = causal_type(processor.image_token_id, processor.region_token_id)
    found = route(model, "mre", iter(given))
    assert_alike(found, plainly(model, "mre", given, type_of))
    first = next(iter(found.values()))
    assert first["visual"].tokens == 3 * PATCHES + 3
    assert first["answer"].tokens == sum(int((batch["labels"] != -100).sum()) for batch in given)
    bare = [processor(PROMPTS[1:3], None, None, ANSWERS[1:3])]
    assert_alike(route(model, "mre", iter(bare)), plainly(model, "mre", bare, type_of))


def test_an_image_text_model_equals_a_recomputation_of_every_gate(qwen: tuple[Any, Any]) -> None:
    model, processor = qwen
    for images in (IMAGES, [None] * 4):  # without any, a masked image stands first
        given = [processor(PROMPTS, images, BOXES, ANSWERS)]
        found = route(model, "mner", iter(given))
        assert_alike(found, plainly(model, "mner", given, causal_type(model.config.image_token_id)))
        assert all((kinds["visual"].tokens > 0) == (images is IMAGES) for kinds in found.values())


@pytest.mark.parametrize("kind", ["t5", "causal"])
def test_counts_do_not_depend_on_the_batch_size(kind: str, causal: tuple[Any, Any]) -> None:
    model, processor = t5("concat") if kind == "t5" else causal
    whole = route(model, "mee", iter(batches(processor, 4)))
    for size in (1, 3):
        assert_alike(route(model, "mee", iter(batches(processor, size))), whole)


def test_loramoe_counts_all_experts_of_the_task() -> None:
    model, processor = t5("concat", adapter="loramoe")
    given = batches(processor, 4)
    shares = {task: route(model, task, iter(given)) for task in TASKS}
    for name in shares["mner"]:
        for kind in KINDS:
            tallies = [shares[task][name][kind] for task in TASKS]
            assert sum(tally.weight for tally in tallies) == pytest.approx(tallies[0].tokens)
            assert sum(tally.given for tally in tallies) <= tallies[0].tokens
    layer = model.base_model.adapted_layers()["encoder.block.0.layer.0.SelfAttention.q"]
    weights, valid = layer.gate_weights
    own = weights[valid][:, [1, 4]].sum(-1)  # of six experts those of the second task
    text, visual, _ = (shares[list(TASKS)[1]]["encoder.block.0.layer.0.SelfAttention.q"][kind] for kind in KINDS)
    assert text.given + visual.given == (own > 0.5).sum()
    assert text.weight + visual.weight == pytest.approx(float(own.sum()))


def test_a_gate_that_separates_visual_from_text_tokens() -> None:
    model, processor = t5("concat")
    with torch.no_grad():
        model.get_base_model().shared.weight.abs_().add_(0.1)  # text above zero, visual tokens below
        for parameter in model.get_base_model().projector.parameters():
            parameter.zero_()
        for name, parameter in model.get_base_model().projector.named_parameters():
            if name.startswith("modules_to_save.default.layers.2.bias"):
                parameter.fill_(-1.0)
        layer = model.base_model.adapted_layers()["encoder.block.0.layer.0.SelfAttention.q"]
        layer.adapters["default"].gate[0] = 1.0
        layer.adapters["default"].gate[1] = -1.0
    found = route(model, "mner", iter(batches(processor, 4)))["encoder.block.0.layer.0.SelfAttention.q"]
    assert (found["visual"].share, found["text"].share) == (1.0, 0.0)
    assert found["visual"].tokens == 3 * PATCHES + 3


def test_an_even_gate_counts_half() -> None:
    model, processor = t5("concat")
    with torch.no_grad():
        for layer in model.base_model.adapted_layers().values():
            layer.adapters["default"].gate.zero_()
    for kinds in route(model, "mner", iter(batches(processor, 4))).values():
        assert {(tally.share, tally.mean) for tally in kinds.values() if tally.tokens} == {(0.5, 0.5)}


@st.composite
def weighed(draw: st.DrawFn) -> tuple[Tensor, Tensor]:
    rows, length = draw(st.integers(1, 5)), draw(st.integers(1, 7))
    weight = st.one_of(st.just(0.5), st.floats(0, 1))
    weights = draw(st.lists(weight, min_size=rows * length, max_size=rows * length))
    kinds = draw(st.lists(st.integers(-1, len(KINDS) - 1), min_size=rows * length, max_size=rows * length))
    return torch.tensor(weights).view(rows, length), torch.tensor(kinds).view(rows, length)


@settings(deadline=None)
@given(weighed(), st.integers(0, 5))
def test_counts_are_shares_and_add_up(tokens: tuple[Tensor, Tensor], cut: int) -> None:
    weights, kinds = tokens
    whole = count(weights, kinds)
    assert whole[:, 0].sum() == (kinds >= 0).sum()
    for tally in (Tally(*row) for row in whole.tolist()):
        if tally.tokens:
            assert tally.share is not None
            assert tally.mean is not None
            assert 0 <= tally.share <= 1
            assert 0 <= tally.mean <= 1
        else:
            assert (tally.share, tally.mean) == (None, None)
    torch.testing.assert_close(count(weights[:cut], kinds[:cut]) + count(weights[cut:], kinds[cut:]), whole)
    torch.testing.assert_close(count(1 - weights, kinds)[:, 1], whole[:, 0] - whole[:, 1])  # the universal expert's


def test_bands_of_the_paper_and_of_short_stacks() -> None:
    assert bands(range(24)) == {"bottom": [0, 1], "middle": [11, 12], "top": [22, 23]}
    assert bands(range(12)) == {"bottom": [0, 1], "middle": [5, 6], "top": [10, 11]}
    assert bands(range(6)) == {"bottom": [0, 1], "middle": [2, 3], "top": [4, 5]}
    assert bands(range(5)) == {"bottom": [0], "middle": [2], "top": [4]}
    assert bands(range(4)) == {"bottom": [0], "middle": [1], "top": [3]}
    assert bands(range(2)) == {"bottom": [0], "middle": [], "top": [1]}
    assert bands([7]) == {"bottom": [7], "middle": [], "top": [7]}


@given(st.sets(st.integers(0, 80), min_size=2))
def test_bands_are_disjoint_and_equally_large(blocks: set[int]) -> None:
    bottom, middle, top = bands(sorted(blocks)).values()
    assert len(bottom) == len(top) == (len(middle) or 1)
    assert len({*bottom, *middle, *top}) == len(bottom) + len(middle) + len(top)
    assert [*bottom, *middle, *top] == sorted([*bottom, *middle, *top])


LAYERS = {
    "encoder.block.0.layer.0.SelfAttention.q": LayerLocation(ENCODER, 0, "layer.0.SelfAttention.q"),
    "encoder.block.1.layer.0.SelfAttention.q": LayerLocation(ENCODER, 1, "layer.0.SelfAttention.q"),
    "decoder.block.0.layer.0.SelfAttention.q": LayerLocation(DECODER, 0, "layer.0.SelfAttention.q"),
    "decoder.block.0.layer.1.EncDecAttention.q": LayerLocation(DECODER, 0, "layer.1.EncDecAttention.q"),
    "decoder.block.0.layer.1.EncDecAttention.v": LayerLocation(CROSS, 0, "layer.1.EncDecAttention.v"),
}


def made() -> Routing:
    """Two dataset tasks, one without images; the share given is the layer's index in tenths."""
    tallies: dict[str, dict[str, dict[str, Tally]]] = {"a/x": {}, "b/y": {}}
    for dataset_task, layers in tallies.items():
        for number, (name, place) in enumerate(LAYERS.items()):
            layers[name] = dict.fromkeys(KINDS, Tally())
            kinds = ["answer"] if place.stack == DECODER else ["text", "visual"] if dataset_task == "a/x" else ["text"]
            for kind in kinds:
                layers[name][kind] = Tally(10, number, 5.5)
    return Routing("dev", {"a/x": 3, "b/y": 4}, LAYERS, tallies)


def test_the_table_has_a_row_for_each_dataset_task_in_every_panel() -> None:
    console = Console(width=100)
    with console.capture() as capture:
        console.print(made().table())
    rows = [[cell.strip() for cell in line.strip("│").split("│")] for line in capture.get().splitlines()]
    rows = [row for row in rows if len(row) == 6]
    assert rows == [
        ["encoder, text", "(0)", "", "(1)", "", ""],
        ["a/x", "0.0", "-", "10.0", "5.0", "55.0"],
        ["b/y", "0.0", "-", "10.0", "5.0", "55.0"],
        ["encoder, visual", "(0)", "", "(1)", "", ""],
        ["a/x", "0.0", "-", "10.0", "5.0", "55.0"],
        ["b/y", "-", "-", "-", "-", "-"],
        ["decoder, answer", "(0)", "", "(0)", "", ""],
        *[[dataset_task, "25.0", "-", "25.0", "25.0", "55.0"] for dataset_task in ("a/x", "b/y")],
        ["decoder reads encoder, text", "(0)", "", "(0)", "", ""],
        *[[dataset_task, "40.0", "-", "40.0", "40.0", "55.0"] for dataset_task in ("a/x", "b/y")],
        ["decoder reads encoder, visual", "(0)", "", "(0)", "", ""],
        ["a/x", "40.0", "-", "40.0", "40.0", "55.0"],
        ["b/y", "-", "-", "-", "-", "-"],
    ]


def test_the_plot_shows_every_layer_and_the_bands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from matplotlib.figure import Figure

    figures: list[Figure] = []
    save = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *args, **how: (figures.append(self), save(self, *args, **how)))
    plot_routing(made(), tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    assert [path.name for path in tmp_path.iterdir()] == ["a.png"]
    (figure,) = figures
    titled = {axes.get_title(loc="left"): axes for axes in figure.axes}
    heat = titled["encoder, visual tokens"]
    assert heat.images[0].get_array().filled(-1).tolist() == [[0, 10], [-1, -1]]
    assert [label.get_text() for label in heat.get_yticklabels()] == ["a/x", "b/y"]
    assert [label.get_text() for label in heat.get_xticklabels()] == ["SelfAttention.q", "SelfAttention.q"]
    decoder = titled["decoder, answer tokens"]
    assert [label.get_text() for label in decoder.get_xticklabels()] == ["SelfAttention.q", "EncDecAttention.q"]
    bars = figure.axes[figure.axes.index(heat) + 1]
    assert [bar.get_height() for bar in bars.containers[0]] == [0, 10]
    assert [label.get_text() for label in bars.get_xticklabels()] == ["bottom\n(0)", "top\n(1)"]


def test_a_model_with_one_stack_has_panels_by_token_type(causal: tuple[Any, Any]) -> None:
    from lvlm_clorae.analysis.routing import layer_locations

    model, processor = causal
    places = layer_locations(model)
    assert {(place.stack, place.block, place.module) for place in places.values()} == {
        (MODEL, block, f"self_attn.{name}_proj") for block in (0, 1) for name in ("q", "v")
    }
    routing = Routing("test", {"a/x": 4}, places, {"a/x": route(model, "mee", iter(batches(processor, 4)))})
    assert [panel.title for panel in routing.panels()] == ["text", "visual", "answer"]
    assert routing.total("a/x", Panel(MODEL, "visual"), [0]).tokens == 2 * (3 * PATCHES + 3)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("base")
    save_tiny(directory)
    small_shards(directory / "shards", train=2, dev=2, test=5)
    return directory


def make_run(directory: Path, base: Path, **settings: Any) -> Path:
    """Make a run directory with random weights."""
    config = TrainConfig(
        model=str(base), shards=str(base / "shards"), lora_rank=4, per_device_eval_batch_size=4, **settings
    )
    model, processor = load_model(str(base))
    model = add_adapter(model, config, list(TASKS))
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.3)
    adapter = directory / "adapter"
    model.save_pretrained(str(adapter), **({} if config.adapter == "full" else {"save_embedding_layers": False}))
    processor.save_pretrained(adapter)
    write_schema(adapter, str(base), adapter=config.adapter)
    (directory / "config.yaml").write_text(config.to_yaml(), encoding="utf-8")
    return directory


@pytest.fixture(scope="module")
def run(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("project") / "runs" / "demo-clorae", base)


@pytest.mark.integration
def test_the_command_prints_a_table_and_plots(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for _ in range(2):  # its own plot is replaced
        assert cli(["routing", "--run", str(run)]) == 0
    printed = capsys.readouterr().out
    assert "decoder reads encoder, visual" in printed
    assert f"heat map: {run / ROUTING_PLOT}" in printed.replace("\n", "")
    assert (run / ROUTING_PLOT).read_bytes().startswith(b"\x89PNG")

    chosen = [
        "--split",
        "dev",
        "--datasets",
        "demo_pairs",
        "--limit",
        "1",
        "--per_device_eval_batch_size",
        "3",
        "--json",
    ]
    assert cli(["routing", "--run", str(run / "adapter"), "--png", str(tmp_path / "b.png"), *chosen]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["split"], found["samples"]) == ("dev", {"demo_pairs/relation": 1})
    assert found["bands"]["encoder"] == {"bottom": [0], "middle": [], "top": [1]}
    name = "encoder.block.1.layer.0.SelfAttention.v"
    assert found["layers"][name] == {"stack": "encoder", "block": 1, "module": "layer.0.SelfAttention.v"}
    text = found["dataset_tasks"]["demo_pairs/relation"][name]["text"]
    assert text["tokens"] > 8
    assert 0 <= text["share"] <= 1
    assert 0 < text["weight"] < 1
    assert (tmp_path / "b.png").is_file()
    assert not (run / "adapter" / ROUTING_PLOT).exists()


@pytest.mark.integration
def test_json_does_not_depend_on_the_batch(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = []
    for size in ("1", "5"):
        command = [
            "routing",
            "--run",
            str(run),
            "--json",
            "--png",
            str(tmp_path / f"{size}.png"),
            "--per_device_eval_batch_size",
            size,
        ]
        assert cli(command) == 0
        found.append(json.loads(capsys.readouterr().out))
    first, second = (list(_numbers(one)) for one in found)
    assert len(first) == len(second) > 100
    assert first == pytest.approx(second, rel=1e-3)


def _numbers(found: Any) -> Iterator[float]:
    if isinstance(found, dict):
        for name, value in found.items():
            yield from _numbers(value) if name != "share" else ()  # a token near 1/2 may round to either side
    elif isinstance(found, int | float):
        yield found


@pytest.mark.parametrize(
    ("settings", "part"),
    [
        ({"adapter": "lora"}, "lora has no gate"),
        ({"adapter": "moslora"}, "moslora has no gate"),
        ({"adapter": "full"}, "full has no gate"),
        ({"use_gate": False}, "use_gate, use_universal or use_experts off has no gate"),
        ({"use_experts": False}, "use_gate, use_universal or use_experts off has no gate"),
        ({"use_universal": False}, "use_gate, use_universal or use_experts off has no gate"),
    ],
)
def test_runs_without_a_gate_are_refused(
    settings: dict[str, Any], part: str, base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = make_run(tmp_path / "run", base, **settings)
    assert cli(["routing", "--run", str(run)]) == 2
    error = capsys.readouterr().err
    assert part in error
    assert "--adapter clorae or loramoe" in error
    assert not (run / ROUTING_PLOT).exists()


@pytest.mark.integration
def test_a_loramoe_run_is_supported(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = make_run(tmp_path / "run", base, adapter="loramoe")
    assert cli(["routing", "--run", str(run), "--datasets", "demo_posts"]) == 0
    assert "demo_posts/entity" in capsys.readouterr().out
    assert (run / ROUTING_PLOT).is_file()


@pytest.mark.parametrize(
    ("flags", "part"),
    [
        (["--datasets", "demo_pair"], '"demo_pairs"'),
        (["--limit", "0"], "--limit: 0"),
        (["--per_device_eval_batch_size", "-1"], "--per_device_eval_batch_size: -1"),
        (["--png", "adapter"], "not overwritten"),
        (["--png", "config.yaml/x.png"], "cannot be written"),
    ],
)
def test_mistakes_end_with_code_2(
    flags: list[str], part: str, run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(run)
    assert cli(["routing", "--run", ".", "--datasets", "demo_posts", *flags]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: ")
    assert part in error


def test_a_task_without_expert_and_a_damaged_adapter_are_errors(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = make_run(tmp_path / "run", base)
    write_schema(run / "adapter", str(base), tasks=["mner", "mee"])
    assert cli(["routing", "--run", str(run)]) == 2
    error = capsys.readouterr().err
    assert "has other tasks than schema.json" in error
    (run / "adapter" / "adapter_config.json").write_text("{", encoding="utf-8")
    assert cli(["routing", "--run", str(run)]) == 2
    assert "adapter_config.json: cannot be read" in capsys.readouterr().err


@pytest.mark.slow
def test_standard_output_holds_only_json(run: Path, tmp_path: Path) -> None:
    line = [sys.executable, "-m", "lvlm_clorae", "routing", "--run", str(run), "--limit", "1", "--json"]
    line += ["--png", str(tmp_path / "a.png")]
    done = subprocess.run(line, env=environment(), capture_output=True, text=True, check=True, cwd=REPOSITORY)
    assert json.loads(done.stdout)["split"] == "test"


@pytest.mark.integration
def test_the_commands_of_the_routing_page(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "runs").symlink_to(run.parent)
    monkeypatch.chdir(tmp_path)
    for words in map(shlex.split, commands(REPOSITORY / "docs" / "routing.md", "lvlm-clorae routing")):
        assert cli(words[1:]) == 0
