"""Parts of a base by name, and their sizes."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import nn

from lvlm_clorae.errors import UserError
from lvlm_clorae.models.loading import describe_model
from lvlm_clorae.models.parts import language_names, outside_language, part_sizes, query_and_value
from lvlm_clorae.training.adapters import add_adapter
from lvlm_clorae.training.config import make_config
from tests.models.tiny import tiny_model

# What is known of the published checkpoints: FLAN-T5's safetensors on the hub, LLaVA-1.5's LLaMA of 32,064 tokens
# (6,738,149,376), CLIP ViT-L/14 of 336 pixels without its projection (303,507,456), two layers of 4096.
PUBLISHED = {
    "flan-t5-base": 247_577_856,
    "flan-t5-large": 783_150_080,
    "flan-t5-xl": 2_849_757_184,
    "llava-1.5-7b": 6_738_939_904,
    "llava-1.5-13b": 13_016_519_680,
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_preset_has_the_published_number_of_parameters(name: str) -> None:
    assert part_sizes(describe_model(name))["language model"].parameters == PUBLISHED[name]


def test_table_5_of_the_paper() -> None:
    """Rank 128 on q, v of FLAN-T5-base is 30.4 M in the paper, rank 64 on large 39.9 M (METHOD 5): the exact counts.

    Per layer and r: universal 2 r d, three experts of r/3, gate 2 d, mutual information 2 d.
    """
    for name, rank, layers, width in (("flan-t5-base", 128, 72, 768), ("flan-t5-large", 64, 144, 1024)):
        model = add_adapter(describe_model(name), make_config({"model": name}), ["mner", "mre", "mee"])
        small = round(rank / 3)
        expected = layers * (2 * rank * width + 3 * 2 * small * width + 2 * width + 2 * width)
        found = part_sizes(model)["adapter"]
        assert found.parameters == found.trained == expected


def test_names_inside_and_outside_the_language_model() -> None:
    model = tiny_model()
    assert sorted(language_names(model)) == ["decoder", "encoder"]
    outside = outside_language(model)
    names = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    inside = [name for name in names if not re.fullmatch(outside, name)]
    assert inside == [name for name in names if name.startswith(("encoder.", "decoder."))]
    assert len(inside) < len(names)
    assert query_and_value(model) == ["q", "v"]


class Odd(nn.Module):
    """A language model whose projections have names of their own."""

    class config:
        is_encoder_decoder = False

    def __init__(self, inner: bool) -> None:
        super().__init__()
        self.decoder = nn.Sequential(nn.Linear(2, 2))
        self.inner = inner

    def get_decoder(self) -> Any:
        return self.decoder if self.inner else self


def test_unusual_models_say_what_to_do() -> None:
    with pytest.raises(UserError, match="Choose target_modules among 0"):
        query_and_value(Odd(inner=True))
    with pytest.raises(UserError, match="no part of its own"):
        language_names(Odd(inner=False))


def test_sizes_are_of_what_is_stored() -> None:
    model = tiny_model()
    model.requires_grad_(False)
    model.projector.requires_grad_(True)
    sizes = part_sizes(model.to(torch.bfloat16))
    assert list(sizes) == ["language model", "projector", "vision tower"]
    assert sum(size.parameters for size in sizes.values()) == sum(p.numel() for p in model.parameters())
    assert sum(size.bytes for size in sizes.values()) == 2 * sum(p.numel() for p in model.parameters())
    assert {part: size.trained for part, size in sizes.items() if size.trained} == {
        "projector": sum(p.numel() for p in model.projector.parameters())
    }
