"""Parts of a base by module name, and their sizes."""

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
from lvlm_clorae.training.config_loading import make_config
from tests.helpers.tiny import tiny_model

# Parameters of the published checkpoints: FLAN-T5's safetensors on the hub, LLaVA-1.5's LLaMA of 32,064 tokens
# (6,738,149,376), CLIP ViT-L/14 of 336 pixels without its projection (303,507,456), two layers of 4096.
PUBLISHED = {
    "flan-t5-base": 247_577_856,
    "flan-t5-large": 783_150_080,
    "flan-t5-xl": 2_849_757_184,
    "llava-1.5-7b": 6_738_939_904,
    "llava-1.5-13b": 13_016_519_680,
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_preset_has_the_published_number_of_parameters(name: str) -> None:
    assert part_sizes(describe_model(name))["language model"].parameters == PUBLISHED[name]


def test_trainable_parameters_of_table_5() -> None:
    """The paper has 30.4 M for rank 128 on q, v of FLAN-T5-base and 39.9 M for rank 64 on large; these are exact.

    Per layer and r: universal 2 r d, three experts of r/3, gate 2 d, mutual information 2 d.
    """
    for name, rank, layers, width in (("flan-t5-base", 128, 72, 768), ("flan-t5-large", 64, 144, 1024)):
        model = add_adapter(describe_model(name), make_config({"model": name}), ["mner", "mre", "mee"])
        small = round(rank / 3)
        expected = layers * (2 * rank * width + 3 * 2 * small * width + 2 * width + 2 * width)
        found = part_sizes(model)["adapter"]
        assert found.parameters == found.trained == expected


def test_a_trained_copy_counts_once_and_takes_its_memory() -> None:
    """PEFT keeps the original of the projector beside the trained copy."""
    plain = part_sizes(tiny_model())["projector"]
    found = part_sizes(add_adapter(tiny_model(), make_config({"model": "demo"}), ["mner"]))["projector"]
    assert (found.parameters, found.trained, found.bytes) == (plain.parameters, plain.parameters, 2 * plain.bytes)


def test_module_names_of_the_language_model() -> None:
    model = tiny_model()
    assert sorted(language_names(model)) == ["decoder", "encoder"]
    outside = outside_language(model)
    names = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    inside = [name for name in names if not re.fullmatch(outside, name)]
    assert inside == [name for name in names if name.startswith(("encoder.", "decoder."))]
    assert len(inside) < len(names)
    assert query_and_value(model) == ["q", "v"]


class Odd(nn.Module):
    """A model whose projections have unusual names."""

    class config:
        is_encoder_decoder = False

    def __init__(self, inner: bool) -> None:
        super().__init__()
        self.decoder = nn.Sequential(nn.Linear(2, 2))
        self.inner = inner

    def get_decoder(self) -> Any:
        return self.decoder if self.inner else self


def test_model_without_known_names_is_an_error() -> None:
    with pytest.raises(UserError, match="target_modules to some of 0"):
        query_and_value(Odd(inner=True))
    with pytest.raises(UserError, match="Odd"):
        language_names(Odd(inner=False))


def test_sizes_are_those_of_the_stored_weights() -> None:
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
