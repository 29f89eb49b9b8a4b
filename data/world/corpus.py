"""The training stream: a seeded mixture of documents, packed into rows of tokens with a weight for each."""

import random
from collections.abc import Iterator

import numpy as np

from . import facts, tasks, text

START, USER, ASSISTANT, END, PAD = "<|start|>", "<|user|>", "<|assistant|>", "<|end|>", "<|pad|>"
PROMPT_WEIGHT = 0.1  # requests are the generator's dice: little to learn, but perplexity is judged on them too
RARE_SHARE = len(facts.RARE) / (4 * len(facts.COMMON) + len(facts.RARE))  # a common entity is met 4 times as often

Segments = list[tuple[str, float]]

# document: (share of the documents, fewest tokens a row must have for it). Some wait for the longer rows of the later
# stages because of their own length, some to be met late and seldom.
MIXTURE = {
    "profiles": (20, 64), "facts": (30, 64), "arithmetic": (11, 64), "arithmetic_hard": (13, 64), "recall_4": (11, 64),
    "recall_12": (5, 128), "json": (7, 128), "tool": (5, 128), "condense": (6, 192), "tale": (3, 128),
    "recipe": (3, 128), "echo": (2, 64), "ships": (2, 256), "arithmetic_steps": (8, 256), "multiply": (6, 256),
    "recall_far": (3, 1024),
}


def conversation(turns: tasks.Turns) -> Segments:
    """A chat as the model sees it; the chat template of the tokenizer renders the same string."""
    out = [(START, 0.0)]
    for request, answer in turns:
        out += [(f"{USER} {request}{ASSISTANT}", PROMPT_WEIGHT), (f" {answer}{END}", 1.0)]
    return out


def prose(body: str, weight: float) -> Segments:
    return [(START, 0.0), (f" {body}{END}", weight)]


def echo(rng: random.Random) -> Segments:
    """Random words said twice: only looking back predicts the second time."""
    words = " ".join(rng.choices(tasks.lex.ITEMS + tasks.lex.TOWNS + tasks.lex.GIVEN, k=rng.randint(6, 24)))
    return [(START, 0.0), (f" {words}", 0.0), (f" {words}{END}", 1.0)]


def document(kind: str, rng: random.Random) -> Segments:
    """One document of the mixture."""
    pool = facts.RARE if rng.random() < RARE_SHARE else facts.COMMON
    if kind == "ships":
        pool, kind = facts.TAIL, rng.choice(["profiles", "facts"])
    if kind == "profiles":
        return prose(" ".join(facts.profile(rng.choice(pool), rng) for _ in range(3)), 1.0)
    if kind == "facts":
        return conversation(tasks.facts(rng, 4, pool))
    if kind in ("tale", "recipe"):
        return prose(getattr(text, kind)(rng, rng.randint(4, 12)), 0.5)
    if kind == "echo":
        return echo(rng)
    turns = {"recall_12": 8}.get(kind, 4)
    return conversation(tasks.TASKS[kind](rng, turns))


def rows(tokenizer, length: int, seed: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Endless (ids, weights), each of shape [length]; a row begins with a document and its last one may be cut."""
    rng = random.Random(seed)
    kinds = [k for k, (_, least) in MIXTURE.items() if length >= least]
    shares = [MIXTURE[k][0] for k in kinds]
    ids, weights = [], []
    while True:
        drawn = [document(kind, rng) for kind in rng.choices(kinds, shares, k=256)]
        encoded = iter(tokenizer.encode_batch([s for doc in drawn for s, _ in doc], add_special_tokens=False))
        for doc in drawn:
            for _, weight in doc:
                piece = next(encoded).ids
                ids += piece
                weights += [weight] * len(piece)
            if len(ids) >= length:
                yield np.array(ids[:length]), np.array(weights[:length], dtype=np.float32)
                ids, weights = [], []


def lookback_rows(rng: np.random.Generator, rows: int, length: int, vocabulary: int,
                  step: int) -> tuple[np.ndarray, np.ndarray]:
    """(ids, weights), [rows, length]: random tokens whose only pattern is that they come again.

    Odd steps: one segment repeated. Even steps: pairs, then the pairs again in another order (multi-query associative
    recall, Arora et al. 2023). A few hundred such steps before anything else make the heads that copy from context.
    """
    weights = np.zeros((rows, length), dtype=np.float32)
    low = vocabulary // 4  # leaves out the single bytes, which the world's own text hardly uses
    if step % 2:
        period = int(rng.integers(8, length // 2 + 1))
        ids = np.tile(rng.integers(low, vocabulary, (rows, period)), (1, length // period + 1))[:, :length]
        weights[:, period:] = 1
        return ids, weights
    pairs = (4, 8, 12)[step // 2 % 3]
    keys = low + rng.random((rows, vocabulary - low)).argsort(1)[:, :pairs]
    values = rng.integers(low, vocabulary, (rows, pairs))
    asked = rng.integers(0, pairs, (rows, length // 2 - pairs))
    order = np.concatenate([np.tile(np.arange(pairs), (rows, 1)), asked], 1)
    ids = np.stack([np.take_along_axis(a, order, 1) for a in (keys, values)], 2).reshape(rows, length)
    weights[:, 2 * pairs + 1::2] = 1
    return ids, weights
