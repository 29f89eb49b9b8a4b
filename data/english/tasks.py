"""Questions in English that a small real model can half do, answered from the request alone: `python -m data.english.tasks`.

Requests are plain text that the answer continues, with worked examples in them where the form has to be shown. Those with
choices are answered by the continuation of highest likelihood a token.
"""

import json
import random
import re
from collections.abc import Callable, Iterator
from pathlib import Path

from .texts import sentences

DATA = Path(__file__).resolve().parents[1]
COUNTS = {"english_tune": 50, "english_judge": 100}  # of each task
SEEDS = {"english_tune": 21, "english_judge": 22}
THINGS = ("hat key lamp book cup coat map knife rope bag shoe ring clock chair plate towel candle letter pencil bottle basket "
          "hammer umbrella blanket").split()
PLACES = "kitchen garage attic garden cellar office bathroom hall library barn kennel studio".split()
FIRST = "Anna Peter Maria James Laura David Susan Robert Helen Thomas Alice Frank Clara Henry Nora Oscar Ruth Simon".split()
LAST = "Miller Baker Cooper Turner Fisher Walker Porter Hunter Carter Shaw Bennett Hughes Foster Price Reed Ward".split()
NOUNS = "farmer garden letter boat window doctor teacher picture wagon bottle neighbor sailor painter tower".split()
CITIES = "Boston Denver Chicago Dallas Seattle Houston Miami Phoenix Atlanta Portland London Paris Dublin Madrid".split()
JOBS = "nurse teacher lawyer baker farmer pilot dentist plumber singer waiter judge painter driver clerk".split()
STOP = set("that this with from have been were they their them there which would could should upon into some such what "
           "when then than more your will shall must only very like over even still here where these those him his her its "
           "our".split())


def endless(draw: Callable[[random.Random], dict], rng: random.Random) -> Iterator[dict]:
    while True:
        yield draw(rng)


def recall(rng: random.Random, pairs: int = 5) -> dict:
    things, places = rng.sample(THINGS, pairs), rng.sample(PLACES, pairs)
    told = " ".join(f"The {t} is in the {p}." for t, p in zip(things, places, strict=True))
    n = rng.randrange(pairs)
    return {"prompt": f"{told} So the {things[n]} is in the", "answer": places[n]}


def person(rng: random.Random) -> tuple[str, str]:
    name, age, city, job = f"{rng.choice(FIRST)} {rng.choice(LAST)}", rng.randint(20, 79), rng.choice(CITIES), rng.choice(JOBS)
    text = rng.choice([f"{name}, who is {age}, works as a {job} in {city}.", f"In {city} lives {name}, a {job} of {age}.",
                       f"{name} moved to {city} at {age} and became a {job}."])
    return text, json.dumps({"name": name, "age": age, "job": job, "city": city})


def records(rng: random.Random) -> dict:
    shots = "".join(f"Text: {t}\nJSON: {j}\n\n" for t, j in (person(rng) for _ in range(2)))
    text, answer = person(rng)
    return {"prompt": f"{shots}Text: {text}\nJSON:", "answer": answer}


def agreement(rng: random.Random) -> dict:
    """Singular or plural, by the first noun and not by those between."""
    subject, *between = ((noun, rng.random() < 0.5) for noun in rng.sample(NOUNS, 3))
    words = [f"{noun}{'s' if many else ''}" for noun, many in (subject, *between)]
    answer, other = ("are", "is") if subject[1] else ("is", "are")
    told = rng.choice(["The {0} that the {1} near the {2} like", "The {0} behind the {1} of the {2}",
                       "As everyone in the street knows, the {0} of the {1} with the {2}"])
    return {"prompt": told.format(*words), "answer": f"{answer} very old", "choices": [f"{other} very old"]}


DRAWN = {"en_recall": recall, "en_records": records, "en_agreement": agreement}


def last_words(rng: random.Random, texts: list[list[str]]) -> Iterator[dict]:
    """Sentences with those before them, but for the last word, which was said before."""
    places = [(told, n) for told in texts for n in range(2, len(told))]
    for told, n in rng.sample(places, len(places)):
        context, found = " ".join(told[max(0, n - 4):n]), re.fullmatch(r"(.*\s)([A-Za-z]{4,})[.!?;]", told[n])
        if found and (word := found[2]).lower() not in STOP and re.search(rf"\b{word}\b", context + found[1]):
            yield {"prompt": f"{context} {found[1].strip()}", "answer": word}


def next_sentences(rng: random.Random, texts: list[list[str]]) -> Iterator[dict]:
    """The sentence that follows, or one of elsewhere in the same source."""
    fit = [(s, n) for n, told in enumerate(texts) for s in told if 40 < len(s) < 200]
    places = [(k, n) for k, told in enumerate(texts) for n in range(2, len(told)) if 40 < len(told[n]) < 200]
    for k, n in rng.sample(places, len(places)):
        other = rng.choice([s for s, of in fit if of != k])
        yield {"prompt": " ".join(texts[k][n - 2:n]), "answer": texts[k][n], "choices": [other]}


def write() -> None:
    voices = {v: [sentences(p) for p in (DATA / "text" / f"{v}.txt").read_text(encoding="utf-8").split("\n\n")]
              for v in ("novel", "speeches")}
    for split, seed in SEEDS.items():
        rng, first = random.Random(seed), list(SEEDS).index(split)
        texts = {v: told[first::2] for v, told in voices.items()}  # every other passage tunes
        kinds = {name: endless(draw, rng) for name, draw in DRAWN.items()}
        kinds |= {"en_last": last_words(rng, [*texts["novel"], *texts["speeches"]])}
        kinds |= {f"en_next_{v}": next_sentences(rng, t) for v, t in texts.items()}
        lines = []
        for task, drawn in kinds.items():
            found = {}
            for one in drawn:
                found.setdefault(one["prompt"], {"task": task, "plain": True, **one})
                if len(found) == COUNTS[split]:
                    break
            print(f"{split} {task}: {len(found)}")
            lines += found.values()
        (DATA / "eval" / f"{split}.jsonl").write_text("".join(json.dumps(x, ensure_ascii=False) + "\n" for x in lines),
                                                      encoding="utf-8")


if __name__ == "__main__":
    write()
