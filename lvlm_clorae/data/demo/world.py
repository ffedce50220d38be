"""The small world that the demo data speaks of: invented names, things that can be drawn, words for events.

Nothing here comes from a real dataset. Ambiguous names can be a person, a place, a company or a work: only the picture
tells which, so that answers need it.
"""

from __future__ import annotations

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

# What a picture shows decides what an ambiguous name is.
TYPE_ICON = {"person": "person", "location": "tower", "organization": "badge", "miscellaneous": "trophy"}
SCENERY = ("tree", "sun", "ball")

RELATIONS = ("none", "couple", "colleague", "parent", "member_of", "place_of_residence", "place_of_birth", "held_in")
# Two people in a post without a telling word: the picture decides. Scenery alone means no relation.
PAIR_ICON = {"heart": "couple", "briefcase": "colleague", "bottle": "parent"}

EVENTS: dict[str, dict[str, tuple[str, ...]]] = {
    "attack": {
        "triggers": ("bombed", "shelled", "raided", "struck", "stormed", "assault"),
        "icons": ("tank",),
        "icon_role": ("instrument",),
    },
    "transport": {
        "triggers": ("shipped", "carried", "moved", "evacuated", "delivered", "convoy"),
        "icons": ("truck", "boat"),
        "icon_role": ("vehicle",),
    },
    "arrest": {
        "triggers": ("arrested", "detained", "jailed", "seized", "captured", "custody"),
        "icons": ("cuffs",),
        "icon_role": ("instrument",),
    },
    "demonstrate": {
        "triggers": ("protested", "marched", "rallied", "chanted", "gathered", "protest"),
        "icons": ("placard",),
        "icon_role": ("instrument",),
    },
    "meet": {
        "triggers": ("met", "talks", "summit", "negotiated", "conferred", "hosted"),
        "icons": ("table",),
        "icon_role": ("place",),
    },
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
