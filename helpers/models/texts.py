"""Texts and questions from files to tokens: judged sets, calibration sets, and the mask of what is scored."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from helpers.models.loading import DATA

WORLD_TASKS = frozenset({"facts", "facts_rare", "facts_tail"})  # answerable only by a model that was trained on this world


class BadData(ValueError):
    """A data file that is missing, empty, or not what was expected."""


@dataclass(frozen=True)
class Example:
    """One request with the answer that is right."""

    task: str
    prompt: str
    answer: str


@dataclass(frozen=True)
class Item:
    """Tokens to score: `ids`, of which those from `start` on are the answer (text without a request: start 1)."""

    ids: tuple[int, ...]
    start: int
    task: str = "text"


def read_jsonl(path: Path) -> list[dict]:
    """The records of a .jsonl file; raises BadData naming file and line."""
    if not path.is_file():
        raise BadData(f"{path} is missing; `make sets` writes the files of data/eval, data/calibration and data/text")
    records = []
    for n, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError as error:
            raise BadData(f"{path}:{n}: not a line of JSON ({error.msg})") from error
    if not records:
        raise BadData(f"{path} is empty")
    return records


def examples(split: str = "judge", tasks: Sequence[str] | None = None, limit: int | None = None) -> list[Example]:
    """The evaluation examples of a split ("tune" to choose settings, "judge" to report), at most `limit` a task."""
    found: dict[str, list[Example]] = {}
    for record in read_jsonl(DATA / "eval" / f"{split}.jsonl"):
        found.setdefault(record["task"], []).append(Example(**record))
    if unknown := set(tasks or ()) - set(found):
        raise BadData(f"no task {sorted(unknown)} in the {split} set; there are {list(found)}")
    return [e for task in (tasks or found) for e in found[task][:limit]]


def applicable(tokenizer, tasks: Sequence[str]) -> list[str]:
    """The tasks a model can be asked: all for the model that was trained on this world, else those in the request."""
    bundled = "<|assistant|>" in tokenizer.get_vocab() and "ĠSaltby" in tokenizer.get_vocab()
    return [t for t in tasks if bundled or t not in WORLD_TASKS]


def render(tokenizer, example: Example, shots: Sequence[Example] = ()) -> tuple[str, str]:
    """(prompt, prompt with answer) in the model's chat template, or as plain text if it has none.

    `shots` are worked examples put before the request, for models that do not know the answer's form.
    """
    turns = [m for shot in shots for m in ({"role": "user", "content": shot.prompt},
                                           {"role": "assistant", "content": shot.answer})]
    turns.append({"role": "user", "content": example.prompt})
    answer = {"role": "assistant", "content": example.answer}
    if tokenizer.chat_template is None:
        said = "".join(f"{'Answer: ' if m['role'] == 'assistant' else ''}{m['content']}\n" for m in turns) + "Answer:"
        return said, f"{said} {example.answer}\n"
    chat = tokenizer.apply_chat_template
    return (chat(turns, tokenize=False, add_generation_prompt=True), chat([*turns, answer], tokenize=False))


def encode(tokenizer, example: Example, shots: Sequence[Example] = ()) -> Item:
    """An example as tokens, the answer marked. Raises BadData if it is longer than the model's context."""
    prompt, whole = (tokenizer.encode(s, add_special_tokens=False) for s in render(tokenizer, example, shots))
    # a token may straddle the border: the answer begins where the two encodings part
    start = next((i for i, (a, b) in enumerate(zip(prompt, whole, strict=False)) if a != b), len(prompt))
    if len(whole) > tokenizer.model_max_length:
        raise BadData(f"an example of {example.task} has {len(whole)} tokens, the context {tokenizer.model_max_length}")
    return Item(tuple(whole), start, example.task)


def text(name: str) -> list[str]:
    """The passages of data/text/NAME.txt, which blank lines separate; raises BadData."""
    path = DATA / "text" / f"{name}.txt"
    if not path.is_file():
        raise BadData(f"{path} is missing; there are {sorted(p.stem for p in path.parent.glob('*.txt'))}")
    return [p.strip() for p in path.read_text(encoding="utf-8").split("\n\n") if p.strip()]


def encode_text(tokenizer, passages: Sequence[str], length: int = 512) -> list[Item]:
    """Passages as separate items of at most `length` tokens, each begun with the start token if the model has one."""
    start = [tokenizer.bos_token_id] if tokenizer.bos_token_id is not None else []
    items = []
    for passage in passages:
        ids = tokenizer.encode(f" {passage}", add_special_tokens=False)
        step = length - len(start)
        pieces = [start + ids[i:i + step] for i in range(0, len(ids), step)]
        items += [Item(tuple(p), 1) for p in pieces if len(p) > 1]
    return items


def calibration(tokenizer, name: str = "instructions") -> list[tuple[int, ...]]:
    """The token sequences of data/calibration/NAME.jsonl, as written there: whole documents of unequal length."""
    records = read_jsonl(DATA / "calibration" / f"{name}.jsonl")
    start = tokenizer.bos_token or ""
    return [tuple(tokenizer.encode(tokenizer.apply_chat_template(r["messages"], tokenize=False) if "messages" in r
                                   else f"{start} {r['text']}", add_special_tokens=False)) for r in records]


def windows(sequences: Sequence[Sequence[int]], length: int, count: int) -> list[tuple[int, ...]]:
    """The first `count` windows of `length` tokens of the sequences laid end to end (toolkits need equal lengths).

    Raises BadData if there are too few tokens for a single window; fewer windows than asked for are returned as they are.
    """
    stream = [token for sequence in sequences for token in sequence]
    cut = [tuple(stream[i:i + length]) for i in range(0, len(stream) - length + 1, length)][:count]
    if not cut:
        raise BadData(f"the calibration set has {len(stream)} tokens, fewer than one window of {length}")
    return cut
