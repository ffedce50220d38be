"""Vocabulary of the synthetic datasets: invented names, icons and words for events; nothing of a real dataset.

An ambiguous name can be a person, a location, an organization or a work: only the image decides, so that answers depend
on it.
"""

from typing import NamedTuple

FIRST = (
    "Alda Bram Cora Dario Edda Finn Greta Hugo Ines Jonas Kira Lars Mara Nils Olga Pavel Quinn Rosa Sven Tilda "
    "Umar Vera Wanda Xenia Yann Zora Anouk Boris Celia Dmitri Elif Fabio Gwen Hana Ivo Jutta Kenji Lucia Milo Nadia"
).split()
LAST = (
    "Abelin Brandt Castel Dorvik Egerton Falkner Grimaldi Hobart Ibsted Jankov Kestrel Lindqvist Marchetti Norwood "
    "Okafor Pellwright Quintero Rasmus Sandoval Thackeray Ulrich Varga Westerby Yelland Zimmer Ashdown Bellamy Corvin "
    "Duvall Ekman Farrow Gorski Halloran Imbert Jessop Kovac Lattimer Mirza Novotny Osgood"
).split()
CITIES = (
    "Valmora Kesterton Brindavo Port-Elsin Norhaven Tamsk Ostrava-Bay Lindholm Quarrish Sabado Ferenc Greyfold "
    "Halcyon Ivoryton Jadwick Korrin Lowmere Marrakil Nuvola Orsk Pellham Rothby Skarn Tivoli-Heights Umbra "
    "Verdane Wexmoor Yarrow Zell Altamar"
).split()
ORG_HEADS = (
    "Larkspur Meridian Copperfield Northgate Bluefin Ironwood Solstice Redwater Granite Lumen Harrow Cobalt "
    "Everline Pinnacle Marlow Foxglove"
).split()
ORG_TAILS = "Motors Bank Airlines United Labs Steel Foods Radio".split()
WORK_HEADS = "Winter Golden Midnight Harvest Silver Summer Crimson Royal Electric Paper".split()
WORK_TAILS = "Cup Games Festival Saga Awards Symphony Marathon Derby".split()
AMBIGUOUS = (
    "Avalon Sterling Orion Juno Phoenix Sierra Madison Carson Lincoln Aurora Vesper Dallas Atlas Florence Sydney "
    "Mercury Chelsea Austin Savoy Denver Regent Camden Apollo Victoria Kingston Delphi Sabine Monterey Houston Everest"
).split()

# The icon that decides the type of an ambiguous name.
TYPE_ICON = {"person": "person", "location": "tower", "organization": "badge", "miscellaneous": "trophy"}
SCENERY = ("tree", "sun", "ball")

RELATIONS = ("none", "couple", "colleague", "parent", "member_of", "place_of_residence", "place_of_birth", "held_in")
# The icon that decides the relation of two people in a post; scenery alone means no relation.
PAIR_ICON = {"heart": "couple", "briefcase": "colleague", "bottle": "parent"}


class Event(NamedTuple):
    """The words that trigger an event, the icons that show it, and their role."""

    triggers: list[str]
    icons: list[str]
    icon_role: str


EVENTS = {
    "attack": Event("bombed shelled raided struck stormed assault".split(), ["tank"], "instrument"),
    "transport": Event("shipped carried moved evacuated delivered convoy".split(), ["truck", "boat"], "vehicle"),
    "arrest": Event("arrested detained jailed seized captured custody".split(), ["cuffs"], "instrument"),
    "demonstrate": Event("protested marched rallied chanted gathered protest".split(), ["placard"], "instrument"),
    "meet": Event("met talks summit negotiated conferred hosted".split(), ["table"], "place"),
}
EVENT_TYPES = tuple(EVENTS)
ROLES = ("agent", "target", "place", "instrument", "vehicle", "destination")

GROUPS = "rebels soldiers police guards students workers farmers miners officials ministers envoys villagers".split()
TARGETS = "harbour bridge barracks depot refinery airport market embassy station warehouse".split()
GOODS = "grain medicine refugees fuel prisoners livestock timber supplies".split()
SUSPECTS = "smugglers hackers forgers poachers thieves deserters dissidents arsonists".split()
CAUSES = "taxes wages prices pensions rents tariffs layoffs curfews".split()
DAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split()
HANDLES = "@quickpost @dailyfeed @skywatch @cityline @nightowl @freshtake".split()
TAGS = "#tbt #live #wow #breaking #love #win".split()
