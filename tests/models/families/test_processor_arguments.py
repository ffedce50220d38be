"""Arguments of a processor of another type or length, in every family."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from lvlm_clorae.data.images import load_image
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


def boxed(*boxes: list[float]) -> dict[str, Any]:
    return {"images": [noise_image(size=(40, 30))], "boxes": [list(boxes)]}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"prompts": []}, "prompts is empty"),
        (boxed(), r"0 boxes for 1 <region>"),
        (boxed([0, 0, 9, 9], [0, 0, 9, 9]), r"2 boxes for 1 <region>"),
        (boxed([5, 5, 1, 1]), r"boxes\[0\].*x1 < x2"),
        (boxed([0, 0, math.nan, 9]), r"boxes\[0\].*finite"),
        (boxed([0, 0, 1e6, 9]), r"boxes\[0\].*outside the 40x30 image"),
        ({"images": [Image.new("F", (4, 4))], "boxes": [[]]}, r"images\[0\].*mode F"),
    ],
)
def test_invalid_images_and_boxes_are_errors(processor: Processor, arguments: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        processor(**{"prompts": ["objects: O1 <region> text: a"], **arguments})


@pytest.mark.parametrize("mode", ["RGBA", "LA", "I;16", "CMYK", "turned"])
def test_images_of_any_mode_are_read_as_in_training(processor: Processor, mode: str) -> None:
    image = noise_image(size=(40, 30))
    if mode == "turned":
        image.getexif()[0x112] = 6
        image.info["exif"] = image.getexif().tobytes()
    elif mode == "I;16":
        image = Image.fromarray((np.asarray(image.convert("L")).astype(np.uint16) << 8) + 7)
    else:
        image = image.convert(mode)
    if mode in ("RGBA", "LA"):
        image.putalpha(Image.linear_gradient("L").resize(image.size))
    expected = load_image(image, "it").image
    assert (expected.mode, expected.size) == ("RGB", (30, 40) if mode == "turned" else (40, 30))
    found, wanted = (processor(["a"], [one])["pixel_values"] for one in (image, expected))
    assert torch.equal(found, wanted)


def test_what_is_cut_is_a_warning(processor: Processor, caplog: pytest.LogCaptureFixture) -> None:
    processor(["text: a b c", "text: " + "word " * 600], answers=["none", "word " * 200])
    assert [record.args for record in caplog.records] == [(1, "prompts", 512), (1, "answers", 127)]


def test_positional_and_keyword_arguments_are_the_same(processor: Processor) -> None:
    boxes = [[[0, 0, 9, 9]], []]
    values = {"prompts": ["a <region>", "b"], "images": [noise_image(), None], "boxes": boxes, "answers": ["x", "y"]}
    by_position, by_name = processor(*values.values()), processor(**values)
    assert by_position.keys() == by_name.keys()
    assert all((by_position[name] == by_name[name]).all() for name in by_name)
