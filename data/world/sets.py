"""Write the committed sets: `python -m data.world.sets` fills data/eval, data/calibration and data/text.

Each set has a seed of its own, apart from those of the training stream; arithmetic uses the reserved problems.
"""

import json
import random
from pathlib import Path

from . import tasks, text

DATA = Path(__file__).resolve().parents[1]
COUNTS = {"tune": 100, "judge": 300}  # examples of each task
# Far recall is long: a tenth of the examples would be half of the tokens. Harder arithmetic has but 67 reserved products of
# two digits by one, and half of its questions are to be products.
FEWER = {"recall_far": {"tune": 40, "judge": 120}, "arithmetic_hard": {"tune": 30, "judge": 90}}


def _write(path: Path, lines: list[dict]) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")


def evaluation() -> None:
    """One question a line, tuning and judging apart."""
    seen = set()
    for split, seed in (("tune", 11), ("judge", 12)):
        rng, lines = random.Random(seed), []
        for task, draw in tasks.TASKS.items():
            held_out = {"held_out": True} if task in tasks.ARITHMETIC else {}
            wanted = FEWER.get(task, COUNTS)[split]
            while wanted:
                [(prompt, answer)] = draw(rng, **held_out)
                if task == "arithmetic_hard" and ("*" in prompt) != wanted % 2:
                    continue
                if prompt not in seen:
                    seen.add(prompt)
                    lines.append({"task": task, "prompt": prompt, "answer": answer})
                    wanted -= 1
        _write(DATA / "eval" / f"{split}.jsonl", lines)


def _messages(turns: tasks.Turns) -> dict:
    return {"messages": [m for request, answer in turns for m in
                         ({"role": "user", "content": request}, {"role": "assistant", "content": answer})]}


def calibration(count: int = 512) -> None:
    """Conversations of all tasks; recipes (out of domain); one-turn facts and sums (short); far recall and tales (long)."""
    rng = random.Random(13)
    kinds = [k for k in tasks.TASKS if k != "recall_far"]

    def mixed() -> dict:
        if rng.random() < 0.15:
            return {"text": text.tale(rng, rng.randint(4, 12))}
        return _messages(tasks.TASKS[rng.choice(kinds)](rng, 2))

    def short() -> dict:
        return _messages(tasks.TASKS[rng.choice(["facts", "arithmetic"])](rng, 1))

    def long() -> dict:
        return _messages(tasks.recall_far(rng, 2)) if rng.random() < 0.5 else {"text": text.tale(rng, rng.randint(40, 85))}

    _write(DATA / "calibration" / "instructions.jsonl", [mixed() for _ in range(count)])
    _write(DATA / "calibration" / "recipes.jsonl", [{"text": text.recipe(rng, rng.randint(4, 12))} for _ in range(count)])
    _write(DATA / "calibration" / "short.jsonl", [short() for _ in range(count)])
    _write(DATA / "calibration" / "long.jsonl", [long() for _ in range(count // 4)])


def prose(count: int = 120) -> None:
    """Unseen tales and recipes for perplexity; essay.txt beside them is written by hand."""
    for name, seed in (("tales", 14), ("recipes", 15)):
        rng = random.Random(seed)
        draw = {"tales": text.tale, "recipes": text.recipe}[name]
        passages = [draw(rng, rng.randint(4, 12)) for _ in range(count)]
        (DATA / "text").mkdir(exist_ok=True)
        (DATA / "text" / f"{name}.txt").write_text("\n\n".join(passages) + "\n", encoding="utf-8")


if __name__ == "__main__":
    evaluation()
    calibration()
    prose()
    print(f"wrote {DATA / 'eval'}, {DATA / 'calibration'}, {DATA / 'text'}")
