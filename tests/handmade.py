"""Scores, variants and measurements made by hand, for tests of what is concluded from them."""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from transformers import LlamaConfig, PretrainedConfig

from helpers.harness.measured import Measured
from helpers.measure.quality import Scores, Sums

CONFIG = LlamaConfig(vocab_size=1280, hidden_size=128, intermediate_size=192, num_hidden_layers=2, num_attention_heads=4,
                     num_key_value_heads=2, tie_word_embeddings=True)


@dataclass(frozen=True)
class Fake:
    """A variant that is nothing but its sizes; `size` None: no file holds it."""

    name: str = "fake"
    size: int | None = 1000
    config: ClassVar[PretrainedConfig] = CONFIG
    plan: ClassVar[None] = None

    def predicted(self) -> None:
        return None

    def measured(self) -> int | None:
        return self.size


def scores(nll=(1.0, 1.0), kl=None, exact=None, tokens=None, tasks=None, agree=None) -> Scores:
    """One value a text; `all` has one token more than the answer, which adds 10 to nll and nothing to the rest."""
    n = len(nll)
    kl, agree = np.zeros(n) if kl is None else kl, np.ones(n) if agree is None else agree
    tokens = np.ones(n) if tokens is None else tokens
    answer = Sums(*(np.array(x, dtype=float) for x in (nll, kl, agree, tokens)))
    whole = Sums(answer.nll + 10, answer.kl, answer.agree, answer.tokens + 1)
    return Scores(np.array([f"q{i}" for i in range(n)]), np.array(["own"] * n if tasks is None else tasks), whole, answer,
                  np.zeros(n, dtype=bool) if exact is None else np.array(exact, dtype=bool))


def measured(name="fake", size=1000, **parts) -> Measured:
    return Measured(Fake(name, size), **parts)
