"""Free text of two domains, for perplexity and for filling long contexts: tales of the islands, and kitchen recipes.

The two share little more than grammar, so calibration text can be in or out of the domain of what is judged.
"""

import random

from . import lexicon as lex

TALE = (
    "On a {weather} morning {hero} left {town} with {count} crates of {good}.",
    "{hero} was {mood} and spoke little on the road to {town2}.",
    "The sea was {weather} and the boat was slow.",
    "At {hour} the bell of {town2} rang twice.",
    "{friend} waited at the quay with a {item} and a {item2}.",
    "{hero} gave {friend} the {item} and kept the {item2}.",
    "They talked of {good} and of the {animal} that followed them.",
    "Nobody in {town} had seen such a {weather} day.",
    "{friend} asked for {good2}, but there was none left.",
    "The {animal} slept by the fire while {hero} mended the {item}.",
    "An old {trade} told them the way to {town}.",
    "In the end {hero} sold the {good} and went home {mood}.",
    "The {trade} of {town2} bought {count} crates and paid in {good2}.",
    "{friend} laughed, for {hero} had forgotten the {item2}.",
    "That night the wind turned {weather} and the boats stayed in.",
    "{hero} thought of {town} and of {friend}, and was {mood}.",
)
RECIPE = (
    "Wash {n} cups of {food} and cut them small.",
    "Boil the {food} with {food2} until soft.",
    "Add {n} spoons of {food2} and stir.",
    "Let the pot rest for {m} minutes.",
    "Fry the {food} slowly in a little butter.",
    "Serve hot with {food3} and a pinch of salt.",
    "Mix the {food2} and the {food3} in a clean bowl.",
    "Do not let the {food} burn.",
    "Bake for {m} minutes, then turn and bake again.",
    "Cover the {food3} with a cloth and keep it cool.",
    "This dish feeds {n} people and lasts {n2} days.",
    "If the {food} is too thin, add more {food2}.",
)


def skewed(words: list[str], rng: random.Random) -> str:
    """A word, the earlier ones of the list more often, as in real text."""
    return words[int(len(words) * rng.random() ** 2)]


def tale(rng: random.Random, sentences: int) -> str:
    """A tale whose people, towns and things recur, so that the context helps to predict them."""
    cast = {
        "hero": skewed(lex.GIVEN, rng), "friend": skewed(lex.GIVEN, rng), "town": skewed(lex.TOWNS, rng),
        "town2": skewed(lex.TOWNS, rng), "good": skewed(lex.GOODS, rng), "good2": skewed(lex.GOODS, rng),
        "item": skewed(lex.ITEMS, rng), "item2": skewed(lex.ITEMS, rng), "animal": skewed(lex.ANIMALS, rng),
        "trade": skewed(lex.TRADES, rng), "mood": rng.choice(lex.MOODS), "count": rng.randint(2, 40),
        "hour": rng.choice(lex.HOURS)}
    lines = [TALE[0]] + [rng.choice(TALE[1:]) for _ in range(sentences - 1)]
    return " ".join(line.format(weather=rng.choice(lex.WEATHER), **cast) for line in lines)


def recipe(rng: random.Random, sentences: int) -> str:
    """A recipe with a few recurring ingredients."""
    foods = [skewed(lex.FOODS, rng) for _ in range(3)]
    return " ".join(rng.choice(RECIPE).format(food=foods[0], food2=foods[1], food3=foods[2], n=rng.randint(2, 9),
                                              n2=rng.randint(2, 9), m=5 * rng.randint(1, 12))
                    for _ in range(sentences))
