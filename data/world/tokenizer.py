"""The tokenizer: 1,280 pieces. A word of Saltmere is one piece, a digit is one piece, anything else falls to bytes."""

import json
import math
import random
import re
from collections import Counter
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers

from . import corpus

VOCABULARY = 1280
SPECIAL = [corpus.PAD, corpus.START, corpus.END, corpus.USER, corpus.ASSISTANT]
CHAT_TEMPLATE = ("{{ bos_token }}{% for m in messages %}{% if m['role'] == 'assistant' %}<|assistant|> {{ m['content'] }}"
                 "<|end|>{% else %}<|user|> {{ m['content'] }}{% endif %}{% endfor %}"
                 "{% if add_generation_prompt %}<|assistant|>{% endif %}")


def build(seed: int = 3, documents: int = 40_000) -> Tokenizer:
    """The most frequent words of a sample of the corpus, whole, and every byte for all the rest.

    Each piece scores its log frequency, so the Unigram model takes a known word as one piece.
    """
    rng = random.Random(seed)
    kinds = [k for k, (_, least) in corpus.MIXTURE.items() if least < 256]
    split = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(r"\d"), "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False)])
    counts = Counter()
    for _ in range(documents):
        for piece, weight in corpus.document(rng.choice(kinds), rng):
            if weight != 0.0:
                counts.update(word for word, _ in split.pre_tokenize_str(re.sub(r"<\|\w+\|>", "\n", piece)))
    single = sorted(pre_tokenizers.ByteLevel.alphabet())
    for byte in single:
        counts.pop(byte, None)
    words = counts.most_common(VOCABULARY - len(SPECIAL) - len(single))
    total = sum(counts.values())
    pieces = [(s, 0.0) for s in SPECIAL] + [(b, -20.0) for b in single] + [(w, math.log(n / total)) for w, n in words]
    pieces += [(f"<|reserved_{i}|>", -99.0) for i in range(VOCABULARY - len(pieces))]  # widths stay multiples of 128
    tokenizer = Tokenizer(models.Unigram(pieces))
    tokenizer.pre_tokenizer = split
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(s, special=True, normalized=False) for s in SPECIAL])
    return tokenizer


def save(tokenizer: Tokenizer, folder: Path, context: int) -> None:
    """Write the files that transformers 4 and 5 both load (the class name is the one both know)."""
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({
        "tokenizer_class": "PreTrainedTokenizerFast", "bos_token": corpus.START, "eos_token": corpus.END,
        "pad_token": corpus.PAD, "model_max_length": context, "clean_up_tokenization_spaces": False,
        "chat_template": CHAT_TEMPLATE}, indent=1) + "\n")
