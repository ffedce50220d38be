"""What event datasets share: the names of ACE 2005 and of M2E2, and JMEE's form of a sentence.

Names of event types differ between the published files in their separators and capitals (``Conflict:Attack``,
``Conflict.Attack``, ``Transaction||Transfer|MONEY``). All samples spell them as M2E2 does, so that what is trained on
one dataset is tested on another.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from lvlm_clorae.data.convert.common import BuildReport, checked_mention, token_list
from lvlm_clorae.data.shards import DatasetSpec

ACE_TYPES = [
    "Business:Declare-Bankruptcy",
    "Business:End-Org",
    "Business:Merge-Org",
    "Business:Start-Org",
    "Conflict:Attack",
    "Conflict:Demonstrate",
    "Contact:Meet",
    "Contact:Phone-Write",
    "Justice:Acquit",
    "Justice:Appeal",
    "Justice:Arrest-Jail",
    "Justice:Charge-Indict",
    "Justice:Convict",
    "Justice:Execute",
    "Justice:Extradite",
    "Justice:Fine",
    "Justice:Pardon",
    "Justice:Release-Parole",
    "Justice:Sentence",
    "Justice:Sue",
    "Justice:Trial-Hearing",
    "Life:Be-Born",
    "Life:Die",
    "Life:Divorce",
    "Life:Injure",
    "Life:Marry",
    "Movement:Transport",
    "Personnel:Elect",
    "Personnel:End-Position",
    "Personnel:Nominate",
    "Personnel:Start-Position",
    "Transaction:Transfer-Money",
    "Transaction:Transfer-Ownership",
]
ACE_ROLES = [
    "Adjudicator",
    "Agent",
    "Artifact",
    "Attacker",
    "Beneficiary",
    "Buyer",
    "Crime",
    "Defendant",
    "Destination",
    "Entity",
    "Giver",
    "Instrument",
    "Money",
    "Org",
    "Origin",
    "Person",
    "Place",
    "Plaintiff",
    "Position",
    "Price",
    "Prosecutor",
    "Recipient",
    "Seller",
    "Sentence",
    "Target",
    "Time-After",
    "Time-At-Beginning",
    "Time-At-End",
    "Time-Before",
    "Time-Ending",
    "Time-Holds",
    "Time-Starting",
    "Time-Within",
    "Vehicle",
    "Victim",
]
"""ACE's 35; OneIE's files, which have neither values nor times, use 22 of them."""

M2E2_TYPES = [
    "Conflict:Attack",
    "Conflict:Demonstrate",
    "Contact:Meet",
    "Contact:Phone-Write",
    "Justice:Arrest-Jail",
    "Life:Die",
    "Movement:Transport",
    "Transaction:Transfer-Money",
]
M2E2_ROLES = [
    "Agent",
    "Artifact",
    "Attacker",
    "Destination",
    "Entity",
    "Giver",
    "Instrument",
    "Money",
    "Origin",
    "Person",
    "Place",
    "Police",
    "Recipient",
    "Target",
    "Vehicle",
    "Victim",
]


def event_spec(name: str, types: list[str], roles: list[str]) -> DatasetSpec:
    """What a dataset of events is; the reference F1 is M2E2's, for which the others are trained (METHOD 3)."""
    labels = {"trigger": types, "argument": {"types": types, "roles": roles}}
    return DatasetSpec(name, "mee", ("trigger", "argument"), labels, {"trigger": 57.6, "argument": 23.4})


def spelt_as(name: object, known: Iterable[str]) -> Any:
    """The one of `known` with the same letters as `name`, whatever their case and separators; else `name` itself."""
    letters = _letters(str(name))
    return next((label for label in known if _letters(label) == letters), name)


def _letters(name: str) -> str:
    return re.sub(r"[^a-z]", "", name.casefold())


def jmee_events(record: Mapping[str, Any], report: BuildReport) -> tuple[list[str], list[dict[str, Any]]]:
    """(tokens, events) of a sentence in JMEE's form, which M2E2's text has too.

        {"words": [...], "golden-event-mentions": [{"event_type": "Life:Die", "trigger": {"start", "end", "text"},
                                                    "arguments": [{"role", "start", "end", "text"}]}]}

    Raises KeyError, TypeError or ValueError for a record of another form.
    """
    tokens = token_list(record["words"])
    events = []
    for event in record["golden-event-mentions"]:
        arguments = [(item["role"], item) for item in event["arguments"]]
        events.append(text_event(tokens, event["event_type"], event["trigger"], arguments, report))
    return tokens, events


def text_event(
    tokens: list[str],
    event_type: object,
    trigger: Mapping[str, Any],
    arguments: Iterable[tuple[object, Mapping[str, Any]]],
    report: BuildReport,
) -> dict[str, Any]:
    """An event seen in the text, of ``{"start", "end", "text"}`` mentions. Raises as `checked_mention`."""
    filled = [{"role": spelt_as(role, ACE_ROLES), **checked_mention(tokens, item, report)} for role, item in arguments]
    found = checked_mention(tokens, trigger, report)
    return {"type": spelt_as(event_type, ACE_TYPES), "trigger": found, "arguments": filled}
