"""Arguments of a processor of another type or length, in every family."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lvlm_clorae.models import Processor, load_model
from tests.helpers.tiny import noise_image, tiny_processor
from tests.helpers.tiny_causal import save_language, save_tower
from tests.helpers.tiny_image_text import save_qwen


def causal(directory: Path) -> Processor:
    save_language(directory / "base")
    return load_model(str(directory / "base"), vision=str(save_tower(directory / "tower")))[1]


def qwen(directory: Path) -> Processor:
    save_qwen(directory)
    return load_model(str(directory))[1]


def t5(directory: Path) -> Processor:
    return tiny_processor()


@pytest.fixture(scope="module", params=[t5, causal, qwen])
def processor(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Processor:
    make: Callable[[Path], Processor] = request.param
    return make(tmp_path_factory.mktemp("base"))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"prompts": "entities"}, "prompts.*list of str"),
        ({"prompts": [None]}, r"prompts\[0\].*str"),
        ({"images": ["location, Avalon"]}, r"images\[0\].*PIL\.Image\.Image or None.*str"),
        ({"images": noise_image()}, r"images.*list of PIL\.Image\.Image or None"),
        ({"answers": "location, Avalon"}, "answers.*list of str"),
        ({"answers": [5]}, r"answers\[0\].*str"),
        ({"boxes": [7]}, r"boxes\[0\].*\[x1, y1, x2, y2\]"),
        ({"images": [noise_image()], "boxes": [[[0, 0, 9]]]}, r"boxes.*\[x1, y1, x2, y2\]"),
        ({"boxes": [[0, 0, 9, 9]]}, r"boxes.*\[x1, y1, x2, y2\]"),
    ],
)
def test_another_type_is_an_error_that_names_argument_and_types(
    processor: Processor, arguments: dict[str, Any], words: str
) -> None:
    with pytest.raises(TypeError, match=words):
        processor(**{"prompts": ["entities. text: so"], **arguments})


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        ({"images": []}, "images"),
        ({"answers": ["none", "none"]}, "answers"),
        ({"boxes": [[], []]}, "boxes"),
    ],
)
def test_another_length_is_an_error_that_names_the_argument(
    processor: Processor, arguments: dict[str, Any], name: str
) -> None:
    with pytest.raises(ValueError, match=f"^{name} "):
        processor(["entities. text: so"], **arguments)


def test_positional_and_keyword_arguments_are_the_same(processor: Processor) -> None:
    boxes = [[[0, 0, 9, 9]], []]
    values = {"prompts": ["a", "b"], "images": [noise_image(), None], "boxes": boxes, "answers": ["x", "y"]}
    by_position, by_name = processor(*values.values()), processor(**values)
    assert by_position.keys() == by_name.keys()
    assert all((by_position[name] == by_name[name]).all() for name in by_name)
