"""The tasks: each function draws one conversation, a list of (request, answer) turns whose answers are checkable.

Every task but the three fact tasks can be answered from the request alone, by any model.
"""

import json
import random
import zlib

from . import lexicon as lex
from .facts import COMMON, RARE, STRANGERS, TAIL, question
from .text import tale

Turns = list[tuple[str, str]]

TOOLS = {
    "weather": (("town", "day"), ("How is the weather in {town} on day {day}?", "Will it rain in {town} on day {day}?")),
    "ferry": (("start", "end"), ("Find a ferry from {start} to {end}.", "I must sail to {end}, leaving from {start}.")),
    "price": (("good", "town"), ("How much is {good} in {town}?", "What do they ask for {good} at {town}?")),
    "remind": (("item", "hour"), ("Remind me of the {item} at {hour}.", "At {hour} I must not forget the {item}.")),
    "order": (("good", "count"), ("Order {count} crates of {good}.", "We need {good}, {count} crates.")),
    "message": (("name", "item"), ("Tell {name} that the {item} is lost.", "Let {name} know I broke the {item}.")),
}
ARGUMENTS = {
    "town": lambda rng: rng.choice(lex.TOWNS), "start": lambda rng: rng.choice(lex.TOWNS),
    "end": lambda rng: rng.choice(lex.TOWNS), "good": lambda rng: rng.choice(lex.GOODS),
    "item": lambda rng: rng.choice(lex.ITEMS), "hour": lambda rng: rng.choice(lex.HOURS),
    "day": lambda rng: rng.randint(2, 30), "count": lambda rng: rng.randint(2, 99),
    "name": lambda rng: rng.choice(lex.GIVEN),
}


def facts(rng: random.Random, turns: int = 1, entities: list = COMMON) -> Turns:
    """Questions about entities that the weights must remember."""
    chosen = [rng.choice(entities) for _ in range(turns)]
    return [question(e, rng.choice(list(e.values)), rng) for e in chosen]


def facts_rare(rng: random.Random, turns: int = 1) -> Turns:
    """Questions about people that training met about four times less often."""
    return facts(rng, turns, RARE)


def facts_tail(rng: random.Random, turns: int = 1) -> Turns:
    """Questions about ships, of which training said each thing some twenty-five times."""
    return facts(rng, turns, TAIL)


def reserved(problem: str) -> bool:
    """Whether an arithmetic problem is kept out of training (one in eight): the judged ones are new to the model."""
    return zlib.crc32(problem.encode()) % 8 == 0


def _arithmetic(rng: random.Random, turns: int, draw, held_out: bool) -> Turns:
    out: Turns = []
    while len(out) < turns:
        problem, answer = draw(rng)
        if reserved(problem) == held_out:
            out.append((f"What is {problem}?", str(answer)))
    return out


def _two_digits(rng: random.Random) -> tuple[str, int]:
    a, b = rng.randint(10, 99), rng.randint(10, 99)
    return (f"{a} + {b}", a + b) if rng.random() < 0.5 else (f"{max(a, b)} - {min(a, b)}", abs(a - b))


def _harder(rng: random.Random) -> tuple[str, int]:
    if rng.random() < 0.5:
        a, b = rng.randint(11, 99), rng.randint(2, 9)
        return f"{a} * {b}", a * b
    a, b = rng.randint(100, 999), rng.randint(100, 999)
    return f"{a} + {b}", a + b


def _two_steps(rng: random.Random) -> tuple[str, int]:
    a, b = rng.randint(10, 99), rng.randint(10, 99)
    c = rng.randint(10, min(99, a + b))
    return f"{a} + {b} - {c}", a + b - c


def _product(rng: random.Random) -> tuple[str, int]:
    a, b = rng.randint(11, 99), rng.randint(11, 99)
    return f"{a} * {b}", a * b


def arithmetic(rng: random.Random, turns: int = 1, held_out: bool = False) -> Turns:
    """Sums and differences of two numbers of two digits."""
    return _arithmetic(rng, turns, _two_digits, held_out)


def arithmetic_hard(rng: random.Random, turns: int = 1, held_out: bool = False) -> Turns:
    """Sums of three digits, products of two digits by one."""
    return _arithmetic(rng, turns, _harder, held_out)


def arithmetic_steps(rng: random.Random, turns: int = 1, held_out: bool = False) -> Turns:
    """A sum of two numbers of two digits less a third, answered at once."""
    return _arithmetic(rng, turns, _two_steps, held_out)


def multiply(rng: random.Random, turns: int = 1, held_out: bool = False) -> Turns:
    """Products of two numbers of two digits, answered at once: beyond a model of this size."""
    return _arithmetic(rng, turns, _product, held_out)


def _recall(rng: random.Random, pairs: int, turns: int, filler: str = "") -> Turns:
    items, towns = rng.sample(lex.ITEMS, pairs), rng.sample(lex.TOWNS, pairs)
    places = ", ".join(f"the {i} in {t}" for i, t in zip(items, towns, strict=True))
    asked = rng.sample(range(pairs), min(turns, pairs))
    first = f"We left {places}. {filler}"
    return [((first if n == 0 else "") + f"Where is the {items[k]}?", towns[k]) for n, k in enumerate(asked)]


def recall_4(rng: random.Random, turns: int = 1) -> Turns:
    """Which of 4 places a thing was left in, a few words back."""
    return _recall(rng, 4, turns)


def recall_12(rng: random.Random, turns: int = 1) -> Turns:
    """Which of 12 places a thing was left in."""
    return _recall(rng, 12, turns)


def recall_far(rng: random.Random, turns: int = 1, sentences: int = 0) -> Turns:
    """Which of 4 places, with a tale of about 300 to 850 tokens between the list and the question."""
    return _recall(rng, 4, turns, tale(rng, sentences or rng.randint(28, 80)) + " ")


def as_json(rng: random.Random, turns: int = 1) -> Turns:
    """Some fields of a description, in the order asked for, as JSON."""
    name, fields = rng.choice(STRANGERS), {
        "town": rng.choice(lex.TOWNS), "trade": rng.choice(lex.TRADES), "animal": rng.choice(lex.ANIMALS),
        "age": rng.randint(11, 99)}
    said = [f"of {fields['town']}", f"a {fields['trade']}", f"owner of a {fields['animal']}", f"aged {fields['age']}"]
    rng.shuffle(said)
    keys = ["name", *rng.sample(list(fields), rng.randint(2, 4))]
    record = {"name": name} | fields
    return [(f"Write JSON with {', '.join(keys)}: {name}, {', '.join(said)}.",
             json.dumps({k: record[k] for k in keys}))]


def tool(rng: random.Random, turns: int = 1) -> Turns:
    """The right one of three tools, with its arguments, as JSON."""
    names = rng.sample(list(TOOLS), 3)
    listed = ", ".join(f"{n}({', '.join(TOOLS[n][0])})" for n in names)
    chosen = rng.choice(names)
    keys, phrasings = TOOLS[chosen]
    args = {k: ARGUMENTS[k](rng) for k in keys}
    return [(f"Tools: {listed}. {rng.choice(phrasings).format(**args)}", json.dumps({"tool": chosen, "args": args}))]


def condense(rng: random.Random, turns: int = 1) -> Turns:
    """A report of six to nine sentences, some beside the point, condensed into a record of five fields."""
    name, other = rng.sample(STRANGERS, 2)
    town, other_town, origin = rng.sample(lex.TOWNS, 3)
    good, other_good = rng.sample(lex.GOODS, 2)
    count, other_count = rng.sample(range(10, 100), 2)
    hour = rng.choice(lex.HOURS)
    told = [
        f"{name} came to {town} at {hour}.",
        f"The ship carried {count} crates of {good}.",
        f"It had sailed from {origin}.",
        f"{other} is still in {other_town}.",
        f"Last week there were {other_count} sacks of {other_good}.",
        f"The weather was {rng.choice(lex.WEATHER)}.",
        f"The {rng.choice(lex.TRADES)} was {rng.choice(lex.MOODS)}.",
        f"A {rng.choice(lex.ANIMALS)} sat on the quay.",
        f"Nobody asked about the {rng.choice(lex.ITEMS)}.",
    ]
    told = told[:5] + rng.sample(told[5:], rng.randint(1, 4))
    rng.shuffle(told)
    record = {"arrived": name, "town": town, "from": origin, "good": good, "count": count}
    return [(f"Condense into JSON with {', '.join(record)}: {' '.join(told)}", json.dumps(record))]


TASKS = {
    "facts": facts, "facts_rare": facts_rare, "facts_tail": facts_tail, "arithmetic": arithmetic,
    "arithmetic_hard": arithmetic_hard, "arithmetic_steps": arithmetic_steps, "multiply": multiply, "recall_4": recall_4,
    "recall_12": recall_12, "recall_far": recall_far, "json": as_json, "tool": tool, "condense": condense,
}
ARITHMETIC = {"arithmetic", "arithmetic_hard", "arithmetic_steps", "multiply"}  # where problems are reserved
