"""Prompts: one short question for a sample and sub-task.

A prompt that is too long is truncated on the right (the paper's limit is 256 tokens), so its parts are ordered by
importance. The label list is last: it is the same in all samples of a dataset, so the model learns it in training.

    entities. text: Kyrie leaves Dallas types: person, location, organization, miscellaneous
    relation between Ryan Reynolds and Blake Lively. text: ... relations: /per/per/couple, none
    event arguments. objects: O1 <region> O2 <region> text: ... types: attack, meet roles: attacker, target
"""

from lvlm_clorae.errors import UserError
from lvlm_clorae.tasks.schema import REGION, Labels, Sample, label_sets, plain

_QUESTIONS = {"entity": "entities.", "trigger": "event triggers.", "argument": "event arguments."}


def build_prompt(sample: Sample, subtask: str, labels: Labels) -> str:
    """Build the prompt of a sample for a sub-task, on one line.

    Args:
        sample: a valid sample; of its annotation only the head and tail of a relation are read. There is one
            `<region>` per object, in the order of ``sample["objects"]``
        subtask: one of `SUBTASKS`
        labels: the dataset's labels, in the form of `label_sets`. All are listed: UMIE's argument prompt names the gold
            event type, which leaks the answer

    Raises:
        UserError: for an unknown sub-task, labels of another form, and a relation without head or tail
    """
    headed, relation = label_sets(subtask, labels), sample.get("relation") or {}
    if subtask != "relation":
        question = _QUESTIONS[subtask]
    elif relation.get("head") and relation.get("tail"):
        question = f"relation between {plain(relation['head']['text'])} and {plain(relation['tail']['text'])}."
    else:
        raise UserError('A relation needs two names. Add "relation" with "head" and "tail", each with a "text".')
    objects = " ".join(f"{item['id']} {REGION}" for item in sample.get("objects") or ())
    text = plain(sample["text"])
    parts = [
        question,
        f"objects: {objects}" if objects else "",
        f"text: {text}" if text else "",
        *(f"{heading}: {', '.join(names)}" for heading, names in headed.items()),
    ]
    return " ".join(part for part in parts if part)
