"""ACE 2005 English: events and their arguments in news sentences (METHOD 7; LDC2006T06), without pictures.

LDC's corpus is not read itself but in either of the forms it is usually brought into, by other people's scripts:

- OneIE (blender.cs.illinois.edu/software/oneie, process_ace.py): train.oneie.json, dev.oneie.json, test.oneie.json, a
  JSON object a line. An argument names one of the sentence's entity mentions, which has the span:

      {"doc_id", "sent_id", "tokens": [...], "entity_mentions": [{"id", "start", "end", "text", ...}],
       "event_mentions": [{"event_type", "trigger": {"start", "end", "text"}, "arguments": [{"entity_id", "role"}]}]}

- JMEE (github.com/lx865712528/EMNLP2018-JMEE, github.com/nlpcl-lab/ace2005-preprocessing): train.json, dev.json,
  test.json, a JSON list each, in the form of :func:`events.jmee_events`.

Sentences without an event stay: to find nothing in them is part of the task.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lvlm_clorae.data.convert.common import (
    BuildReport,
    Converted,
    Place,
    find_inputs,
    make_key,
    make_sample,
    parse_json,
    read_bounded,
    read_lines,
    token_list,
)
from lvlm_clorae.data.convert.events import ACE_ROLES, ACE_TYPES, event_spec, jmee_events, text_event
from lvlm_clorae.data.shards import SPLITS

FILES = {split: (f"{split}.oneie.json", f"{split}.w1.oneie.json", f"{split}.json") for split in SPLITS}
PUBLISHED = "catalog.ldc.upenn.edu/LDC2006T06, to be brought into OneIE's form or JMEE's (shards/README.md)"

SPEC = event_spec("ace2005", ACE_TYPES, ACE_ROLES)


def convert(input_dir: Path, images: Path | None, report: BuildReport) -> Iterator[Converted]:
    """The sentences of train, dev and test in the files' order; `images` is not looked at.

    Raises UserError for a missing, unreadable or too large file, and for a JSON list that is cut off.
    """
    paths = find_inputs(input_dir, FILES, PUBLISHED)
    for split, path in paths.items():
        for number, record in _records(path):
            if report.full(split):
                break
            place = {"file": path.name, "line": number}
            sample = report.attempt(_sample, record, place, report, place=place, record=record)
            if sample is not None:
                yield split, make_key(number, sample["source"].get("sentence", "sentence")), sample, None


def _records(path: Path) -> Iterator[tuple[int, Any]]:
    """(number, record) of a JSON list, or (line number, line) of a file of JSON lines."""
    lines = read_lines(path)
    if next((line for line in lines if line.strip()), "").lstrip().startswith("["):
        yield from enumerate(parse_json(read_bounded(path), str(path), list), 1)
    else:
        yield from ((number, line) for number, line in enumerate(lines, 1) if line.strip())


def _sample(record: Any, place: Place, report: BuildReport) -> dict[str, Any]:
    if isinstance(record, str):
        record = json.loads(record)
    if "tokens" in record:
        tokens, events = _oneie_events(record, report)
        name = record["sent_id"] if "sent_id" in record else record["wnd_id"]  # its versions differ
        return make_sample(SPEC, tokens, {**place, "sentence": str(name)}, events=events)
    if "words" in record:
        tokens, events = jmee_events(record, report)
        return make_sample(SPEC, tokens, place, events=events)
    raise ValueError('neither in OneIE\'s form (it has no "tokens") nor in JMEE\'s (no "words")')


def _oneie_events(record: dict[str, Any], report: BuildReport) -> tuple[list[str], list[dict[str, Any]]]:
    tokens = token_list(record["tokens"])
    entities = {entity["id"]: entity for entity in record["entity_mentions"]}
    events = []
    for event in record["event_mentions"]:
        arguments = []
        for item in event["arguments"]:
            if item["entity_id"] not in entities:
                raise ValueError(f"an argument's entity {item['entity_id']!r} is not among the entity mentions")
            arguments.append((item["role"], entities[item["entity_id"]]))
        events.append(text_event(tokens, event["event_type"], event["trigger"], arguments, report))
    return tokens, events
