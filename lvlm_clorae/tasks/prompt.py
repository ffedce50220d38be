"""Prompts: one short question for a sample and sub-task.

The question and the label list come first: they are the same in all samples of a dataset task, so that a causal model
can compute them once for a batch. The paper limits a prompt to 256 tokens. Of one that is too long the text, which is
last, is cut (`fit_prompt`); the rest is kept whole.

    entities. types: person, location, organization, miscellaneous text: Kyrie leaves Dallas
    relation. relations: /per/per/couple, none between: Ryan Reynolds and Blake Lively text: ...
    event arguments. types: attack, meet roles: attacker, target objects: O1 <region> O2 <region> text: ...
    links. relations: answer text: [8 5 20 7] Date: [24 5 50 7] 5 May 1995

A text-only base reads boxes as pixels: `objects: O1 [0, 12, 40, 30] O2 [5, 5, 20, 20]`. In the last prompt the text has
a layout: each line or block follows its box x1 y1 x2 y2, in hundredths of the page. A caption has the empty prompt, as
in the first stage of LLaVA.
"""

from collections.abc import Callable, Mapping
from typing import Any

from lvlm_clorae.errors import UserError
from lvlm_clorae.tasks.schema import CAPTION, REGION, Labels, Sample, label_sets, plain


class PromptTooLong(UserError):
    """The question, objects and labels alone exceed the limit of a prompt."""


_QUESTIONS = {
    "entity": "entities.",
    "relation": "relation.",
    "trigger": "event triggers.",
    "argument": "event arguments.",
    "link": "links.",
}


def build_prompt(sample: Sample, subtask: str, labels: Labels, region_tokens: bool = True) -> str:
    """Build the prompt of a sample for a sub-task, on one line.

    Args:
        sample: a valid sample; of its annotation only the head and tail of a relation are read. There is one
            `<region>` per object, in the order of ``sample["objects"]``
        subtask: one of `SUBTASKS`, or `CAPTION`
        labels: the dataset's labels, in the form of `label_sets`. All are listed: UMIE's argument prompt names the gold
            event type, which leaks the answer
        region_tokens: False writes each box in whole pixels in place of its `<region>`

    Raises:
        UserError: for an unknown sub-task, labels of another form, and a relation without head or tail
        TypeError: the sample is no mapping
    """
    if not isinstance(sample, Mapping):
        raise TypeError(f'sample must be a mapping with "text", not {type(sample).__name__}. See docs/architecture.md.')
    if not isinstance(sample.get("text"), str):
        raise UserError('A sample needs "text", a string. See docs/architecture.md.')
    headed, names = label_sets(subtask, labels), ""
    if subtask == CAPTION:
        return ""
    if subtask == "relation":
        relation = sample.get("relation") or {}
        if not (relation.get("head") and relation.get("tail")):
            raise UserError('A relation needs two names. Add "relation" with "head" and "tail", each with a "text".')
        names = f"{plain(relation['head']['text'])} and {plain(relation['tail']['text'])}"
    objects = " ".join(
        f"{item['id']} {REGION if region_tokens else list(map(round, item['box']))}"
        for item in sample.get("objects") or ()
    )
    parts = {heading: ", ".join(labels) for heading, labels in headed.items()}
    own = {"between": names, "objects": objects, "text": plain(_text(sample))}
    parts |= {heading: value for heading, value in own.items() if value}
    return " ".join([_QUESTIONS[subtask], *(f"{heading}: {value}" for heading, value in parts.items())])


def _text(sample: Sample) -> str:
    """Return the text with the box of each item of the layout before its first token."""
    boxes = {item["span"][0]: f"[{' '.join(map(str, item['box']))}] " for item in sample.get("layout") or ()}
    if not boxes:
        return str(sample["text"])
    return " ".join(boxes.get(number, "") + token for number, token in enumerate(sample["tokens"]))


def fit_prompt(
    sample: Sample, subtask: str, labels: Labels, fits: Callable[[str], bool], region_tokens: bool = True
) -> tuple[str, int]:
    """Build the prompt with as many of the sample's first tokens as fit.

    Args:
        fits: whether a prompt is short enough
        region_tokens: as for :func:`build_prompt`

    Returns:
        the prompt, and the number of ``sample["tokens"]`` in it

    Raises:
        PromptTooLong: the prompt without any text does not fit
        UserError: as :func:`build_prompt`
    """
    tokens = sample["tokens"]

    def prompt(number: int) -> str:
        read = tokens[:number]
        return build_prompt({**sample, "tokens": read, "text": " ".join(read)}, subtask, labels, region_tokens)

    whole = prompt(len(tokens))
    if fits(whole):
        return whole, len(tokens)
    if not fits(prompt(0)):
        raise PromptTooLong("The question, objects and labels alone are too long. Raise max_source_length.")
    kept, too_many = 0, len(tokens)
    while too_many - kept > 1:
        middle = (kept + too_many) // 2
        kept, too_many = (middle, too_many) if fits(prompt(middle)) else (kept, middle)
    return prompt(kept), kept


def visible(sample: Sample, number: int) -> Sample:
    """Return the sample with only the annotations within its first ``number`` tokens, and none outside all tokens.

    Objects stay, as do the head and tail of a relation, which the question names.
    """

    def is_read(mention: Mapping[str, Any]) -> bool:
        return "object" in mention or ("span" in mention and mention["span"][1] <= number)

    events = [
        {**event, "arguments": [argument for argument in event["arguments"] if is_read(argument)]}
        for event in sample.get("events") or ()
        if event["trigger"] is None or is_read(event["trigger"])
    ]
    entities = [entity for entity in sample.get("entities") or () if is_read(entity)]
    links = [link for link in sample.get("links") or () if is_read(link["head"]) and is_read(link["tail"])]
    found = {"entities": entities, "events": events, "links": links}
    return {**sample, **{name: kept for name, kept in found.items() if name in sample}}
