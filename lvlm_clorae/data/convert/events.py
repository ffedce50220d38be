"""ACE 2005 English (LDC2006T06), and the event types, roles and sentence form that event datasets share.

LDC's corpus is read in either of two forms, into which other projects' scripts convert it:

- OneIE (blender.cs.illinois.edu/software/oneie, process_ace.py): train.oneie.json, dev.oneie.json, test.oneie.json, a
  JSON object per line. An argument refers to one of the sentence's entity mentions, which has the span:

      {"doc_id", "sent_id", "tokens": [...], "entity_mentions": [{"id", "start", "end", "text", ...}],
       "event_mentions": [{"event_type", "trigger": {"start", "end", "text"}, "arguments": [{"entity_id", "role"}]}]}

- JMEE (github.com/lx865712528/EMNLP2018-JMEE, github.com/nlpcl-lab/ace2005-preprocessing): train.json, dev.json,
  test.json, each a JSON list of sentences, which M2E2's text has too:

      {"words": [...], "golden-event-mentions": [{"event_type": "Life:Die", "trigger": {"start", "end", "text"},
                                                  "arguments": [{"role", "start", "end", "text"}]}]}

Sentences without an event are kept: finding none is part of the task. Event types are spelled differently in the
published files (``Conflict:Attack``, ``Conflict.Attack``, ``Transaction||Transfer|MONEY``). All samples use M2E2's
spelling, so that a model trained on one dataset can be tested on another.
"""

import re
from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from lvlm_clorae.data.convert import common
from lvlm_clorae.data.convert.common import BuildReport, Converted, Converter, Origin, Sample
from lvlm_clorae.data.index import SPLITS
from lvlm_clorae.files import parse_json
from lvlm_clorae.tasks.schema import label_sets

SPEC = common.published_spec("ace2005")
ACE_TYPES, ACE_ROLES = label_sets("argument", SPEC.labels["argument"]).values()

FILES = {split: (f"{split}.oneie.json", f"{split}.w1.oneie.json", f"{split}.json") for split in SPLITS}
PUBLISHED = "catalog.ldc.upenn.edu/LDC2006T06, to be converted to OneIE's form or JMEE's (shards/README.md)"


def normalize_label(name: object, known: Iterable[str]) -> Any:
    """Return the known label with the same letters as `name`, ignoring case and separators; else `name` itself."""
    letters = _letters(str(name))
    return next((label for label in known if _letters(label) == letters), name)


def _letters(name: str) -> str:
    return re.sub(r"[^a-z]", "", name.casefold())


def text_events(record: Mapping[str, Any], report: BuildReport) -> tuple[list[str], list[dict[str, Any]]]:
    """Return (tokens, events) of a sentence in OneIE's form if it has "tokens", else in JMEE's, which M2E2 uses too."""
    oneie = "tokens" in record
    tokens = common.token_list(record["tokens" if oneie else "words"])
    entities = {entity["id"]: entity for entity in record["entity_mentions"]} if oneie else {}
    events = []
    for event in record["event_mentions" if oneie else "golden-event-mentions"]:
        arguments = []
        for item in event["arguments"]:
            if oneie and item["entity_id"] not in entities:
                raise ValueError(f"an argument's entity {item['entity_id']!r} is not among the entity mentions")
            found = common.published_mention(tokens, entities[item["entity_id"]] if oneie else item, report)
            arguments.append({"role": normalize_label(item["role"], ACE_ROLES), **found})
        trigger = common.published_mention(tokens, event["trigger"], report)
        events.append(
            {"type": normalize_label(event["event_type"], ACE_TYPES), "trigger": trigger, "arguments": arguments}
        )
    return tokens, events


def visual_event(
    event_type: object, boxes: list[tuple[str | None, common.RawBox]]
) -> tuple[dict[str, Any], dict[common.RawBox, str]]:
    """Build an event without a trigger from (role, box) pairs, and the ids of the boxes; role None is no argument."""
    ids = common.number_boxes(box for _, box in boxes)
    filled = dict.fromkeys((role, ids[box]) for role, box in boxes if role is not None)
    arguments = [{"role": role, "object": item} for role, item in filled]
    return {"type": event_type, "trigger": None, "arguments": arguments}, ids


def _convert(input_dir: Path, images: Path | None, report: BuildReport) -> Iterator[Converted]:
    paths = common.find_inputs(input_dir, FILES, PUBLISHED)
    return common.convert_splits(paths, _records, partial(_sample, report), None, report, "sentence")


def _records(path: Path) -> Iterator[common.Numbered]:
    """Yield the records of a JSON list, or the lines of a JSON lines file."""
    first = next((line for line in common.read_lines(path) if line.strip()), "")
    if not first.lstrip().startswith("["):
        return common.numbered_lines(path)
    records = common.parse_json(common.read_bounded(path), str(path), list)
    return ((number, number, record) for number, record in enumerate(records, 1))


def _sample(report: BuildReport, record: Any, origin: Origin) -> Sample:
    if isinstance(record, str):
        record = parse_json(record)
    if "tokens" not in record and "words" not in record:
        raise ValueError('neither in OneIE\'s form (it has no "tokens") nor in JMEE\'s (no "words")')
    tokens, events = text_events(record, report)
    if "tokens" in record:
        name = record["sent_id"] if "sent_id" in record else record["wnd_id"]  # depends on OneIE's version
        origin = {**origin, "sentence": str(name)}
    return common.make_sample(SPEC, tokens, origin, events=events)


CONVERTER = Converter(SPEC, _convert)
