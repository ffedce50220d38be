"""SWiG: the situations in images that are ACE events (Pratt et al., ECCV 2020).

Published at github.com/allenai/swig: train.json, dev.json and test.json of SWiG_jsons, an object per image. A box of
-1 means that the role is not visible, and each annotator has a frame:

    {"arresting_1.jpg": {"verb": "arresting", "width": 512, "height": 683,
                         "bb": {"agent": [195, 282, 380, 554], "place": [-1, -1, -1, -1]},
                         "frames": [{"agent": "n10287213", "place": "n04096066"}, ...]}}

With imsitu_space.json of the same folder, an object's label is the word that its annotators agree on. The verbs and
roles that are ACE events are listed in ace_sr_mapping.txt (github.com/limanling/m2e2, data/ace): ``verb<tab>role<tab>
event<tab>role`` in a line, with events like ``Justice||Arrest|Jail``. Images of other verbs are left out. The labels
are those of M2E2, for which SWiG is training data.
"""

from collections import Counter
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from lvlm_clorae.data.convert import common
from lvlm_clorae.data.convert.common import BuildReport, Converted, Converter, Origin, Sample
from lvlm_clorae.data.convert.events import normalize_label, visual_event
from lvlm_clorae.data.index import SPLITS
from lvlm_clorae.errors import UserError
from lvlm_clorae.tasks.schema import label_sets

FILES = {split: (f"{split}.json",) for split in SPLITS}
MAPPING, NOUNS = "ace_sr_mapping.txt", "imsitu_space.json"
PUBLISHED = "github.com/allenai/swig, folder SWiG_jsons"
MAPPING_PUBLISHED = f"github.com/limanling/m2e2, data/ace/{MAPPING}"

SPEC = common.published_spec("swig")
TYPES, ROLES = label_sets("argument", SPEC.labels["argument"]).values()


VerbEvents = Mapping[str, tuple[str, dict[str, str]]]
"""Verb -> the type of its ACE event, and SWiG's role -> ACE's role."""


def _convert(input_dir: Path, images: Path | None, report: BuildReport) -> Iterator[Converted]:
    paths = common.find_inputs(input_dir, FILES, PUBLISHED)
    events = read_mapping(common.find_input(input_dir, (MAPPING,), MAPPING_PUBLISHED))
    make = partial(_sample, events, _read_glosses(input_dir / NOUNS))
    return common.convert_splits(paths, partial(_event_images, events, report), make, images, report)


def _event_images(events: VerbEvents, report: BuildReport, path: Path) -> Iterator[common.Numbered]:
    """Yield the (name, record) pairs of all images except those of verbs that are no ACE event."""
    images = common.parse_json(common.read_bounded(path), str(path), dict)
    for number, (name, record) in enumerate(images.items(), 1):
        if isinstance(record, dict) and isinstance(record.get("verb"), str) and record["verb"] not in events:
            report.notes["images left out because their verb is no ACE event"] += 1
        else:
            yield number, number, (name, record)


def read_mapping(path: Path) -> VerbEvents:
    """Read the ACE event of each verb. Raises UserError, with the line number, for a line of another form."""
    events: dict[str, tuple[str, dict[str, str]]] = {}
    for number, line in enumerate(common.read_lines(path), 1):
        if not line.strip():
            continue
        fields = [field.strip() for field in line.split("\t")]
        if len(fields) != 4 or not all(fields):
            raise UserError(f"{path}, line {number}: not a verb, a role, an event and a role, separated by tabs.")
        verb, role, name, ace_role = fields
        event_type, ace_role = normalize_label(name, TYPES), normalize_label(ace_role, ROLES)
        if event_type not in TYPES or ace_role not in ROLES:
            raise UserError(f'{path}, line {number}: "{name}", "{ace_role}" is no event type and role of M2E2.')
        known_type, roles = events.setdefault(verb, (event_type, {}))
        if known_type != event_type:
            raise UserError(f'{path}, line {number}: "{verb}" is both {known_type} and {event_type}.')
        roles[role] = ace_role
    return events


def _read_glosses(path: Path) -> dict[str, str]:
    """Read the first English word of each WordNet id; empty without the file. Raises UserError for another form."""
    if not path.is_file():
        return {}
    nouns = common.parse_json(common.read_bounded(path), str(path), dict).get("nouns")
    try:
        return {noun: str(entry["gloss"][0]) for noun, entry in nouns.items() if entry["gloss"]}
    except (AttributeError, KeyError, TypeError):
        raise UserError(f"{path}: not in the published format (nouns with a gloss are expected).") from None


def _sample(
    events: VerbEvents, glosses: Mapping[str, str], named: tuple[str, dict[str, Any]], origin: Origin
) -> Sample:
    """Build the sample of one event without a trigger. Boxes of roles that ACE does not have are only objects."""
    name, record = named
    event_type, roles = events[record["verb"]]
    boxes: dict[str, common.RawBox] = {role: tuple(box) for role, box in record["bb"].items() if set(box) != {-1}}
    visual, ids = visual_event(event_type, [(roles.get(role), box) for role, box in boxes.items()])
    # The first of the roles that share a box gives the label, so it is written last.
    labels = {ids[box]: _label(record["frames"], role, glosses) for role, box in reversed(boxes.items())}
    source, objects = {**origin, "verb": record["verb"]}, common.box_objects(ids, labels)
    return common.make_sample(SPEC, [], source, image=common.image_name(name), objects=objects, events=[visual])


def _label(frames: list[dict[str, str]], role: str, glosses: Mapping[str, str]) -> str:
    """Return the word that most annotators use for the role; empty without a majority or a known word."""
    ((noun, count),) = Counter(frame[role] for frame in frames).most_common(1)
    return glosses.get(noun, "") if 2 * count > len(frames) else ""


CONVERTER = Converter(SPEC, _convert)
