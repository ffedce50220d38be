"""Where the entities of an answer stand in the text, for scores that taggers can be compared with.

An answer says type and text, and not which occurrence of the text it means. It is read without a look at gold: the
k-th mention of a text is its k-th occurrence, where one that lies in a longer name of the same answer comes last. So
with "New York Times" answered too, "New York" is not found inside it while it stands elsewhere. Every entity of
Twitter-15 is found at its place in this way; where an earlier occurrence is no entity, one would not be.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

from lvlm_clorae.tasks.answer import Tuples
from lvlm_clorae.tasks.schema import Sample, plain

Span = tuple[int, int]


def gold_places(sample: Sample) -> Tuples:
    """The entities of a sound sample as (type, start, end), half-open offsets in the words that `locate` counts."""
    starts = [0, *accumulate(len(words) for words in _words(sample))]
    return [(item["type"], *(starts[offset] for offset in item["span"])) for item in sample.get("entities") or ()]


def locate(entities: Sequence[tuple[str, str]], sample: Sample) -> Tuples:
    """Each (type, text) of an answer as (type, start, end), which `gold_places` has too if the entity is right.

    A text that is not in the sample, or has been mentioned as often as it is, is (type, text) still: predicted, and
    at no place.
    """
    words = [word for token in _words(sample) for word in token]
    mentions = [text.split() for _, text in entities]
    free: dict[str, list[Span]] = {}
    taken: set[int] = set()
    found: Tuples = list(entities)
    for number in sorted(range(len(entities)), key=lambda number: -len(mentions[number])):
        kind, text = entities[number]
        if text not in free:
            free[text] = _occurrences(mentions[number], words)
        if not free[text]:
            continue
        place = next((span for span in free[text] if taken.isdisjoint(range(*span))), free[text][0])
        free[text].remove(place)
        taken.update(range(*place))
        found[number] = (kind, *place)
    return found


def _words(sample: Sample) -> list[list[str]]:
    """The words of each token as answers spell them: mostly one, none of a blank token, several of a marker."""
    return [plain(token).split() for token in sample["tokens"]]


def _occurrences(mention: list[str], words: list[str]) -> list[Span]:
    size = len(mention)
    return [(start, start + size) for start in range(len(words) - size + 1) if words[start : start + size] == mention]
