"""SWiG: situations in pictures, those of them that are ACE events (METHOD 7; Pratt et al., ECCV 2020).

Published at github.com/allenai/swig: train.json, dev.json and test.json of SWiG_jsons, an object a picture:

    {"arresting_1.jpg": {"verb": "arresting", "width": 512, "height": 683,
                         "bb": {"agent": [195, 282, 380, 554], "place": [-1, -1, -1, -1]},   -1: not to be seen
                         "frames": [{"agent": "n10287213", "place": "n04096066"}, ...]}}     one of each annotator

imsitu_space.json of the same folder, where it is there, gives an object the word its annotators agree on. Which verbs
and roles are ACE events is said by ace_sr_mapping.txt (github.com/limanling/m2e2, data/ace): ``verb<tab>role<tab>event
<tab>role`` a line, events as ``Justice||Arrest|Jail``. Pictures of other verbs are left out. The label sets are M2E2's,
for which SWiG is trained.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from lvlm_clorae.data.convert.common import (
    Box,
    BuildReport,
    Converted,
    Pictures,
    Place,
    find_input,
    find_inputs,
    make_key,
    make_sample,
    number_boxes,
    parse_json,
    picture_name,
    read_bounded,
    read_lines,
)
from lvlm_clorae.data.convert.events import M2E2_ROLES, M2E2_TYPES, event_spec, spelt_as
from lvlm_clorae.data.shards import SPLITS
from lvlm_clorae.errors import UserError

FILES = {split: (f"{split}.json",) for split in SPLITS}
MAPPING, NOUNS = "ace_sr_mapping.txt", "imsitu_space.json"
PUBLISHED = "github.com/allenai/swig, folder SWiG_jsons"
MAPPING_PUBLISHED = f"github.com/limanling/m2e2, data/ace/{MAPPING}"

SPEC = event_spec("swig", M2E2_TYPES, M2E2_ROLES)


class Event(NamedTuple):
    """What a verb means in ACE: the event type, and SWiG's role -> ACE's."""

    type: str
    roles: dict[str, str]


def convert(input_dir: Path, images: Path | None, report: BuildReport) -> Iterator[Converted]:
    """The pictures of train, dev and test in the files' order.

    Raises UserError for a file that is missing, too large or not of the published form, the mapping's lines included.
    """
    paths = find_inputs(input_dir, FILES, PUBLISHED)
    events = read_mapping(find_input(input_dir, (MAPPING,), MAPPING_PUBLISHED))
    glosses = _read_glosses(input_dir / NOUNS)
    pictures = Pictures(images, report)
    for split, path in paths.items():
        for number, (name, record) in enumerate(parse_json(read_bounded(path), str(path), dict).items(), 1):
            if report.full(split):
                break
            if isinstance(record, dict) and isinstance(record.get("verb"), str) and record["verb"] not in events:
                report.notes["pictures left out, for their verb is no ACE event"] += 1
                continue
            place = {"file": path.name, "line": number}
            sample = report.attempt(_sample, name, record, place, events, glosses, place=place, record=record)
            if sample is not None:
                yield split, make_key(number, Path(name).stem), sample, pictures.read(name)


def read_mapping(path: Path) -> dict[str, Event]:
    """The event of each verb. Raises UserError, with the line, for one that is not as published."""
    events: dict[str, Event] = {}
    for number, line in enumerate(read_lines(path), 1):
        if not line.strip():
            continue
        fields = [field.strip() for field in line.split("\t")]
        if len(fields) != 4 or not all(fields):
            raise UserError(f"{path}, line {number}: not a verb, a role, an event and a role, separated by tabs.")
        verb, role, name, ace_role = fields
        kind, ace_role = spelt_as(name, M2E2_TYPES), spelt_as(ace_role, M2E2_ROLES)
        if kind not in M2E2_TYPES or ace_role not in M2E2_ROLES:
            raise UserError(f'{path}, line {number}: "{name}", "{ace_role}" is no event type and role of M2E2.')
        event = events.setdefault(verb, Event(kind, {}))
        if event.type != kind:
            raise UserError(f'{path}, line {number}: "{verb}" is {event.type} above, and {kind} here.')
        event.roles[role] = ace_role
    return events


def _read_glosses(path: Path) -> dict[str, str]:
    """WordNet id -> its first English word; empty where the file is not there. Raises UserError for another form."""
    if not path.is_file():
        return {}
    nouns = parse_json(read_bounded(path), str(path), dict).get("nouns")
    try:
        return {noun: str(entry["gloss"][0]) for noun, entry in nouns.items() if entry["gloss"]}
    except (AttributeError, KeyError, TypeError):
        raise UserError(f"{path}: not in the published format (nouns with a gloss are expected).") from None


def _sample(
    name: str, record: dict[str, Any], place: Place, events: Mapping[str, Event], glosses: Mapping[str, str]
) -> dict[str, Any]:
    """One event without a trigger. Boxes of roles that ACE has not are objects, but no arguments."""
    event = events[record["verb"]]
    boxes: dict[str, Box] = {role: tuple(box) for role, box in record["bb"].items() if set(box) != {-1}}
    ids = number_boxes(boxes.values())
    # Of the roles that share a box the first gives the label, so it comes last here.
    labels = {ids[box]: _label(record["frames"], role, glosses) for role, box in reversed(boxes.items())}
    filled = dict.fromkeys((event.roles[role], ids[box]) for role, box in boxes.items() if role in event.roles)
    arguments = [{"role": role, "object": item} for role, item in filled]
    return make_sample(
        SPEC,
        [],
        {**place, "verb": record["verb"]},
        image=picture_name(name),
        objects=[{"id": item, "box": list(box), "label": labels[item]} for box, item in ids.items()],
        events=[{"type": event.type, "trigger": None, "arguments": arguments}],
    )


def _label(frames: list[dict[str, str]], role: str, glosses: Mapping[str, str]) -> str:
    """The word for what most annotators see in the role; empty where no two agree or the word is not known."""
    ((noun, count),) = Counter(frame[role] for frame in frames).most_common(1)
    return glosses.get(noun, "") if 2 * count > len(frames) else ""
