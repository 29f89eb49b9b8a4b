"""Texts from files to tokens: chat templates, calibration sets, windows of equal length."""

import json
import random
from collections.abc import Sequence
from pathlib import Path

from helpers.models.source import DATA


class BadData(ValueError):
    """A data file that is missing, empty, or not what was expected."""


def read_jsonl(path: Path) -> list[dict]:
    """The records of a .jsonl file; raises BadData naming file and line."""
    if not path.is_file():
        made = "; `make sets` and `make english` write the files of data" if DATA in path.resolve().parents else ""
        raise BadData(f"{path} is missing{made}")
    records = []
    try:
        # not splitlines: a string may hold U+2028 and others at which that would cut
        lines = path.read_text(encoding="utf-8").rstrip("\n").split("\n")
    except UnicodeDecodeError as error:
        raise BadData(f"{path} is not UTF-8 text: {error}") from error
    if lines == [""]:
        raise BadData(f"{path} is empty")
    for n, line in enumerate(lines, 1):
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError as error:
            raise BadData(f"{path}:{n}: not a line of JSON ({error.msg})") from error
    return records


def read_text(path: Path) -> list[str]:
    """The passages of a text file, which blank lines separate, or of a .jsonl of {"text": ...}; raises BadData."""
    if path.suffix == ".jsonl":
        records = read_jsonl(path)
        if bad := [n for n, r in enumerate(records, 1) if not isinstance(r, dict) or not isinstance(r.get("text"), str)]:
            raise BadData(f'{path}:{bad[0]}: expected {{"text": "..."}}')
        return [r["text"] for r in records]
    try:
        passages = [p.strip() for p in path.read_text(encoding="utf-8").split("\n\n") if p.strip()]
    except OSError as error:
        raise BadData(f"{path} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise BadData(f"{path} is not UTF-8 text: {error}") from error
    if not passages:
        raise BadData(f"{path} is empty")
    return passages


def chat(tokenizer, turns: Sequence[dict], ask: bool = False) -> str:
    """A conversation in the model's chat template; without one as plain lines, an answer after "Answer:".

    `ask` ends it where the model's answer begins.
    """
    if tokenizer.chat_template is not None:
        return tokenizer.apply_chat_template(list(turns), tokenize=False, add_generation_prompt=ask)
    said = "".join(f"{'Answer: ' if m['role'] == 'assistant' else ''}{m['content']}\n" for m in turns)
    return f"{said}Answer:" if ask else said


def context_of(tokenizer, config=None) -> int:
    """The most tokens that a text may have: the tokenizer's limit (some have none, and say 1e30) or the model's."""
    limits = [tokenizer.model_max_length]
    if config is not None:
        limits.append(getattr(config.get_text_config(), "max_position_embeddings", None) or 2**31)
    return int(min(*limits, 2**31))


def calibration(tokenizer, name: str = "instructions") -> list[tuple[int, ...]]:
    """The token sequences of data/calibration/NAME.jsonl, as written there: whole documents of unequal length."""
    records = read_jsonl(DATA / "calibration" / f"{name}.jsonl")
    start = tokenizer.bos_token or ""
    return [tuple(tokenizer.encode(chat(tokenizer, r["messages"]) if "messages" in r else f"{start} {r['text']}",
                                   add_special_tokens=False)) for r in records]


def windows(sequences: Sequence[Sequence[int]], length: int, count: int) -> list[tuple[int, ...]]:
    """The first `count` windows of `length` tokens of the sequences laid end to end (toolkits need equal lengths).

    Raises BadData if that is none, or there are too few tokens for a single one; fewer windows than asked for are returned
    as they are.
    """
    if length < 1 or count < 1:
        raise BadData(f"windows: expected at least one window of at least one token, got {count} of {length}")
    stream = [token for sequence in sequences for token in sequence]
    cut = [tuple(stream[i:i + length]) for i in range(0, len(stream) - length + 1, length)][:count]
    if not cut:
        raise BadData(f"the calibration set has {len(stream)} tokens, fewer than one window of {length}")
    return cut


def random_tokens(tokenizer, length: int, count: int, seed: int = 0) -> list[tuple[int, ...]]:
    """Windows of uniformly random tokens: a calibration set that knows nothing, as a control."""
    draw = random.Random(seed)
    return [tuple(draw.randrange(5, len(tokenizer)) for _ in range(length)) for _ in range(count)]
