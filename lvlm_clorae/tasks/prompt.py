"""What the model is asked: one short prompt a sample and sub-task.

A prompt is cut from the right when it is too long (METHOD 4: text length 256), so its parts stand in the order in
which they may not be lost: the question, with the two names of a relation; the objects, whose region markers have to
match the regions given to the model; the text; and the label list last. That list is the longest part of some
datasets and the same in all their samples, so training teaches it even where its tail is cut.

    entities. text: Kyrie leaves Dallas types: person, location, organization, miscellaneous
    relation between Ryan Reynolds and Blake Lively. text: ... relations: /per/per/couple, none
    event arguments. objects: O1 <region> O2 <region> text: ... types: attack, meet roles: attacker, target
"""

from __future__ import annotations

from lvlm_clorae.errors import UserError
from lvlm_clorae.tasks.schema import REGION, Labels, Sample, label_sets, plain

_QUESTIONS = {"entity": "entities.", "trigger": "event triggers.", "argument": "event arguments."}


def build_prompt(sample: Sample, subtask: str, labels: Labels) -> str:
    """The prompt of `sample` for `subtask`, on one line.

    `labels` are the dataset's (index.json): a list of names, for arguments ``{"types": [...], "roles": [...]}``. All
    are listed, whatever the gold: UMIE's argument prompt names the gold event type, which is a leak (METHOD 7). Of
    the annotation only a relation's head and tail are read, which are part of its question. There is one `<region>`
    an object, in the order of ``sample["objects"]``; an image-only sample (no text) has no text part.

    Raises UserError for an unknown sub-task, labels of another form, and a relation without head or tail.
    """
    headed = label_sets(subtask, labels)
    objects = " ".join(f"{item['id']} {REGION}" for item in sample.get("objects") or ())
    text = plain(sample["text"])
    parts = [
        _relation_question(sample) if subtask == "relation" else _QUESTIONS[subtask],
        f"objects: {objects}" if objects else "",
        f"text: {text}" if text else "",
        *(f"{heading}: {', '.join(names)}" for heading, names in headed.items()),
    ]
    return " ".join(part for part in parts if part)


def _relation_question(sample: Sample) -> str:
    relation = sample.get("relation") or {}
    if not (relation.get("head") and relation.get("tail")):
        raise UserError(
            'A relation is asked between two names: give the sample a "relation" with "head" and "tail", each with '
            'a "text".'
        )
    return f"relation between {plain(relation['head']['text'])} and {plain(relation['tail']['text'])}."
