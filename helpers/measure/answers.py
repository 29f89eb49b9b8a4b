"""What a model says when asked: its greedy answers, whether they are right, and whether they have the form that is expected."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace

import jsonschema
import numpy as np
import torch
from torch import nn
from tqdm import tqdm
from transformers import GenerationConfig

from helpers.measure.quality import batched
from helpers.measure.tasks import TASKS, Example, render

KINDS = {str: "string", bool: "boolean", int: "number", float: "number", list: "array", dict: "object", type(None): "null"}


@dataclass(frozen=True)
class Said:
    """One answer: its text, its tokens without the end token, and whether it came to an end by itself."""

    text: str
    tokens: tuple[int, ...]
    ended: bool


@torch.inference_mode()
def said(model: nn.Module, tokenizer, prompts: Sequence[Sequence[int]], batch_tokens: int = 4096, max_new_tokens: int = 64,
         progress: bool = False) -> list[Said]:
    """The model's own greedy answers to prompts of token ids, those of similar lengths at once: padding is computed too."""
    answers: dict[int, Said] = {}
    ends = ends_of(model, tokenizer)
    pad = next((t for t in (tokenizer.pad_token_id, tokenizer.eos_token_id) if t is not None), 0)  # masked, so any will do
    batches = list(batched([len(p) for p in prompts], batch_tokens))
    for batch in tqdm(batches, disable=not progress, desc="generate", leave=False):
        rows = [torch.tensor(prompts[i]) for i in batch]
        ids = nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=pad, padding_side="left")
        mask = nn.utils.rnn.pad_sequence([torch.ones_like(r) for r in rows], batch_first=True, padding_side="left")
        out = model.generate(input_ids=ids.to(model.device), attention_mask=mask.to(model.device),
                             generation_config=greedy(max_new_tokens, pad_token_id=pad, eos_token_id=sorted(ends) or None))
        for i, row in zip(batch, out[:, ids.shape[1]:].tolist(), strict=True):
            stop = next((n for n, token in enumerate(row) if token in ends), None)
            tokens = row[:stop]
            answers[i] = Said(tokenizer.decode(tokens, skip_special_tokens=True).strip(), tuple(tokens), stop is not None)
    return [answers[i] for i in range(len(prompts))]


def ends_of(model: nn.Module, tokenizer) -> set[int]:
    """The tokens at which an answer ends: the model's, else the tokenizer's."""
    own = model.generation_config.eos_token_id
    own = own if isinstance(own, list) else [own]
    return {t for t in own if t is not None} or {t for t in [tokenizer.eos_token_id] if t is not None}


def generate(model: nn.Module, tokenizer, asked: Sequence[Example], shots: Sequence[Example] = (), **options) -> list[str]:
    """The answers to questions, as text; `options` are those of `said`."""
    return [s.text for s in said(model, tokenizer, [prompt_ids(tokenizer, e, shots) for e in asked], **options)]


def prompt_ids(tokenizer, example: Example, shots: Sequence[Example] = ()) -> list[int]:
    """A question as tokens, to the place where the answer begins."""
    return tokenizer.encode(render(tokenizer, example, shots)[0], add_special_tokens=False)


def greedy(new_tokens: int, **others) -> GenerationConfig:
    """The likeliest token, and nothing else: some models' own settings bring a penalty that would apply even so."""
    return GenerationConfig(max_new_tokens=new_tokens, do_sample=False, temperature=1.0, top_k=50, top_p=1.0,
                            repetition_penalty=1.0, no_repeat_ngram_size=0, **others)


def parses(text: str) -> bool:
    """Whether an answer is JSON."""
    try:
        json.loads(text, parse_constant=int)  # Python takes NaN and Infinity for JSON; `int` refuses them
    except (ValueError, RecursionError):  # plain ValueError: a number of thousands of digits
        return False
    return True


def is_correct(example: Example, text: str) -> bool:
    """Exact match: for structured tasks the same JSON value, else the same words (case and a final stop aside), as also where
    the right answer, a model's own, is no JSON although it is to be."""
    if structured(example) and parses(example.answer):
        same = jsonschema.Draft202012Validator({"const": json.loads(example.answer)})  # in Python true would equal 1
        return parses(text) and same.is_valid(json.loads(text))
    said_so, right = (t.strip().rstrip(".").casefold() for t in (text, example.answer))
    return said_so == right


def structured(example: Example) -> bool:
    """Whether the answer is to be JSON: by its task, or because it came with a schema."""
    return example.schema is not None or (example.task in TASKS and TASKS[example.task].structured)


def schema_of(example: Example) -> dict:
    """The JSON schema an answer has to hold: its own, else that of the right one: the same fields with the same types; any JSON
    if the right one, a model's own, is none."""
    if example.schema is not None:
        return example.schema
    return _shape(json.loads(example.answer)) if parses(example.answer) else {}


def _shape(value) -> dict:
    shape = {"type": KINDS[type(value)]}
    if isinstance(value, dict):
        shape |= {"properties": {k: _shape(v) for k, v in value.items()}, "required": list(value)}
    return shape


def loops(tokens: Sequence[int], times: int = 4, least: int = 12) -> bool:
    """Whether an answer goes round in circles: its last tokens are one piece, said at least `times` times, `least` in all."""
    for period in range(1, len(tokens) // times + 1):
        n = max(times, -(-least // period)) * period
        tail = tokens[-n:]
        if len(tail) == n and all(tail[i] == tail[i - period] for i in range(period, n)):
            return True
    return False


def form(answers: Sequence[Said], asked: Sequence[Example]) -> dict[str, np.ndarray]:
    """The form of answers, one value a question: text, `right`, `ends` by itself, `no_loops`, and for those that are to be
    JSON `json_parses` and `schema` holds (true for the others, which `structured` tells apart). Of plain text, which goes on,
    the answer is the first line."""
    rows = []
    for s, e in zip(answers, asked, strict=True):
        if cut := e.plain and "\n" in s.text:
            s = replace(s, text=s.text.split("\n")[0].strip(), ended=True)
        whole = parses(s.text)
        holds = whole and jsonschema.Draft202012Validator(schema_of(e)).is_valid(json.loads(s.text)) if structured(e) else True
        rows.append((e.id, e.task, s.text, structured(e), is_correct(e, s.text), s.ended, cut or not loops(s.tokens),
                     whole or not structured(e), holds))
    names = ("id", "task", "text", "structured", "right", "ends", "no_loops", "json_parses", "schema")
    return {name: np.array(column) for name, column in zip(names, zip(*rows, strict=True), strict=True)}


def answered(model: nn.Module, tokenizer, asked: Sequence[Example]) -> list[Example]:
    """The questions, those without an answer with the model's own: being right then means to say what it said."""
    open_ones = [e for e in asked if not e.answer]
    answers = said(model, tokenizer, [prompt_ids(tokenizer, e) for e in open_ones], progress=bool(open_ones))
    own = {e.id: s.text for e, s in zip(open_ones, answers, strict=True)}
    return [replace(e, answer=own.get(e.id, e.answer)) for e in asked]
