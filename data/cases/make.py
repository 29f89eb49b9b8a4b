"""Write the requests of the three case studies (chapter 10): `python -m data.cases.make`.

Those of the invented world are for the bundled model, those in English for any other. Both
are drawn with seeds of their own and meet no question of data/eval.
"""

import json
import random
from collections.abc import Iterator
from pathlib import Path

from data.english import tasks as english
from data.world import tasks as world
from data.world.facts import COMMON, question

HERE = Path(__file__).parent
EVAL = HERE.parent / "eval"
# requests of each kind: what the article's three teams would see
WORLD = {
    "chatbot": {"facts": 40, "facts_tail": 30, "arithmetic_hard": 30, "recall_4": 20, "recall_12": 20, "tool": 60, "json": 40},
    "condensing": {"condense": 140, "json": 60},
    "doses": {"dose": 300, "treats": 130, "hour": 130},
}
ENGLISH = {
    "chatbot": {"en_recall": 70, "en_records": 60},
    "condensing": {"en_records": 160},
    "doses": {"en_recall": 360},
}
REMEDIES = [e for e in COMMON if e.kind == "remedy"]


def of_world(rng: random.Random, task: str) -> Iterator[dict]:
    """Requests with their answers, without end."""
    while True:
        if task in ("dose", "treats", "hour"):
            prompt, answer = question(rng.choice(REMEDIES), task, rng)
        else:
            held_out = {"held_out": True} if task in world.ARITHMETIC else {}
            [(prompt, answer)] = world.TASKS[task](rng, **held_out)
        yield {"task": task, "prompt": prompt, "answer": answer}


def of_english(rng: random.Random, task: str) -> Iterator[dict]:
    """Text that the answer continues."""
    while True:
        drawn = english.DRAWN[task](rng)
        yield {"task": task, "plain": True, "prompt": drawn["prompt"], "answer": drawn["answer"]}


def write() -> None:
    asked = {json.loads(line)["prompt"] for path in EVAL.glob("*.jsonl") for line in path.open(encoding="utf-8")}
    for n, (kind, cases, draw) in enumerate((("", WORLD, of_world), ("english_", ENGLISH, of_english))):
        for case, counts in cases.items():
            rng, lines = random.Random(f"{31 + n} {case}"), []
            for task, count in counts.items():
                found = {}
                for one in draw(rng, task):
                    if one["prompt"] not in asked:
                        found.setdefault(one["prompt"], one)
                    if len(found) == count:
                        break
                lines += found.values()
            (HERE / f"{kind}{case}.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines), encoding="utf-8")


if __name__ == "__main__":
    write()
