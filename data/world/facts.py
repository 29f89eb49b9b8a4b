"""Who and what exists in Saltmere: a fixed table of entities and their attributes, drawn once from a seed.

A fact is (entity, attribute, value). Training meets a common person about four times as often as a rare one, and a ship
only some twenty-five times in all: the long tail is what a compressed model forgets first.
"""

import random
from dataclasses import dataclass
from itertools import product

from . import lexicon as lex

SEED = 1
N_COMMON, N_RARE = 600, 2800

QUESTIONS = {
    "town": ("Where does {} live?", "Which town is home to {}?", "In which town does {} live?"),
    "trade": ("What is the trade of {}?", "What work does {} do?", "How does {} earn a living?"),
    "animal": ("Which animal does {} keep?", "What animal lives with {}?", "Name the animal of {}."),
    "born": ("In which year was {} born?", "When was {} born?", "Give the birth year of {}."),
    "island": ("On which island is {}?", "Which island has the town of {}?", "Name the island of {}."),
    "export": ("What does {} sell abroad?", "What is {} known for?", "Which good leaves the port of {}?"),
    "dose": ("What is the highest dose of {} in grains?", "How many grains of {} at most?", "Give the dose of {}."),
    "treats": ("What does {} treat?", "Against what is {} given?", "Which illness calls for {}?"),
    "hour": ("When is {} taken?", "At what hour is {} given?", "Name the hour for {}."),
    "home": ("Which town is home to the ship {}?",),
    "cargo": ("What has the ship {} carried?",),
    "owner": ("Name the owner of the ship {}.",),
}

PROFILES = {
    "person": ("{name}, {trade} of {town}, was born in {born} and keeps a {animal}.",
               "{name} lives in {town}, works as a {trade}, keeps a {animal}, and was born in {born}.",
               "Born in {born}, {name} is a {trade}, lives in {town} and has a {animal}."),
    "town": ("{name} lies on {island} and is known for {export}.",
             "On {island} is {name}, which sells {export}."),
    "remedy": ("{name} treats {treats}, at most {dose} grains, taken at {hour}.",
               "Against {treats} take {name} at {hour}, no more than {dose} grains."),
    "ship": ("The ship {name} of {owner} sailed from {home} with {cargo}.",),
}


@dataclass(frozen=True)
class Entity:
    name: str
    kind: str  # person, town, remedy or ship: which profile sentences fit
    tier: str  # common, rare or tail: how often training meets it
    values: dict


def build(seed: int = SEED) -> list[Entity]:
    """All entities of the world: 3,400 people with 4 attributes, 48 towns with 2, 144 remedies and 384 ships with 3."""
    rng = random.Random(seed)
    names = [f"{g} {s}" for g, s in product(lex.GIVEN, lex.SURNAME)]
    rng.shuffle(names)
    people = [Entity(name, "person", "common" if i < N_COMMON else "rare", {
        "town": rng.choice(lex.TOWNS), "trade": rng.choice(lex.TRADES), "animal": rng.choice(lex.ANIMALS),
        "born": str(rng.randint(100, 999))}) for i, name in enumerate(names[:N_COMMON + N_RARE])]
    towns = [Entity(name, "town", "common", {"island": rng.choice(lex.ISLANDS), "export": rng.choice(lex.GOODS)})
             for name in lex.TOWNS]
    remedies = [Entity(f"{k} {p}", "remedy", "common", {
        "treats": rng.choice(lex.AILMENTS), "dose": str(rng.randint(10, 99)), "hour": rng.choice(lex.HOURS)})
        for k, p in product(lex.REMEDY_KINDS, lex.REMEDY_PLANTS)]
    ships = [Entity(f"{m} {a}", "ship", "tail", {
        "home": rng.choice(lex.TOWNS), "cargo": rng.choice(lex.GOODS), "owner": rng.choice(lex.GIVEN)})
        for m, a in product(lex.MOODS, lex.ANIMALS)]
    return people + towns + remedies + ships


ENTITIES = build()
COMMON, RARE, TAIL = ([e for e in ENTITIES if e.tier == tier] for tier in ("common", "rare", "tail"))
STRANGERS = sorted({f"{g} {s}" for g, s in product(lex.GIVEN, lex.SURNAME)} - {e.name for e in ENTITIES})


def profile(entity: Entity, rng: random.Random) -> str:
    """One sentence that states every attribute of an entity."""
    return rng.choice(PROFILES[entity.kind]).format(name=entity.name, **entity.values)


def question(entity: Entity, attribute: str, rng: random.Random) -> tuple[str, str]:
    """(question, answer) about one attribute, in one of three phrasings."""
    return rng.choice(QUESTIONS[attribute]).format(entity.name), entity.values[attribute]
