"""Lists of weights for the tests of ZeRO's memory and communication."""

from __future__ import annotations

from hypothesis import strategies as st

from lvlm_clorae.analysis.zero import Weight

B = 2
"""Bytes of an element."""


def weight(name: str, numel: int, trained: bool = False, stack: str = "decoder") -> Weight:
    """A weight that is not quantised."""
    return Weight(name, numel, B * numel, trained, stack)


def small_model(blocks: int = 3) -> list[Weight]:
    """An embedding, blocks with a frozen matrix of 1000 and an adapter of 10 each, a head, a frozen tower."""
    found = [weight("embed.weight", 500, stack="embedding")]
    for number in range(blocks):
        found.append(weight(f"model.layers.{number}.q.weight", 1000))
        found.append(weight(f"model.layers.{number}.a.weight", 10, trained=True))
    return [*found, weight("lm_head.weight", 500), weight("vision_tower.x.weight", 300, stack="tower")]


models = st.lists(st.tuples(st.integers(1, 5000), st.booleans()), min_size=1, max_size=12).map(
    lambda sizes: [
        weight(f"model.layers.{number}.w.weight", numel, trained) for number, (numel, trained) in enumerate(sizes)
    ]
)
