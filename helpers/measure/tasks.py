"""Questions with right answers and texts to score, each with an id that stays: what any two results are paired by."""

import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

import jsonschema

from helpers.models.source import DATA
from helpers.models.texts import BadData, chat, context_of, read_jsonl, read_text


class Task(NamedTuple):
    """A kind of question: its name in figures, whether the answer is JSON, whether only this world's model can know it."""

    title: str
    structured: bool = False
    world: bool = False


TASKS = {
    "facts": Task("facts", world=True), "facts_rare": Task("rare facts", world=True),
    "facts_tail": Task("facts of the tail", world=True), "arithmetic": Task("arithmetic"),
    "arithmetic_hard": Task("harder arithmetic"), "arithmetic_steps": Task("two-step arithmetic"),
    "multiply": Task("two-digit products"), "recall_4": Task("recall, 4 pairs"), "recall_12": Task("recall, 12 pairs"),
    "recall_far": Task("recall, far"), "json": Task("JSON", structured=True), "tool": Task("tool call", structured=True),
    "condense": Task("condense", structured=True),
}
# of the splits english_tune and english_judge, which a real model can half do
ENGLISH = {
    "en_recall": Task("recall, 5 pairs"), "en_records": Task("records", structured=True), "en_last": Task("last word"),
    "en_agreement": Task("agreement"), "en_next_novel": Task("next sentence, novel"),
    "en_next_speeches": Task("next sentence, speeches"),
}


FIELDS = {"answer": str, "task": str, "id": str, "schema": dict, "plain": bool}  # that a question of one's own may have
KINDS = {str: "text", dict: "an object", bool: "true or false"}


def title(task: str) -> str:
    """A task's name in figures; of one that is not in the table, its own."""
    return TASKS[task].title if task in TASKS else task


def identify(task: str, *parts: str) -> str:
    """The id of a question or a text: its task, and a hash of what is said in it, whatever file it stands in."""
    return f"{task}-{hashlib.sha256(chr(0).join(parts).encode()).hexdigest()[:10]}"


@dataclass(frozen=True)
class Example:
    """One request with the answer that is right; `schema`, a JSON schema that the answer has to hold. A `plain` one is text
    that the answer continues, without a chat template; `choices` are answers that are wrong."""

    task: str
    prompt: str
    answer: str
    id: str = field(default="")
    schema: dict | None = field(default=None, hash=False)
    plain: bool = False
    choices: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "choices", tuple(self.choices))
        if not self.id:
            object.__setattr__(self, "id", identify(self.task, self.prompt, self.answer))


@dataclass(frozen=True)
class Item:
    """Tokens to score: `ids`, of which those from `start` on are the answer (text without a request: start 1)."""

    ids: tuple[int, ...]
    start: int
    task: str = "text"
    id: str = ""


def examples(split: str = "judge", tasks: Sequence[str] | None = None, limit: int | None = None) -> list[Example]:
    """The evaluation examples of a split ("tune" to choose settings, "judge" to report), at most `limit` a task."""
    found: dict[str, list[Example]] = {}
    for record in read_jsonl(DATA / "eval" / f"{split}.jsonl"):
        found.setdefault(record["task"], []).append(Example(**record))
    if unknown := set(tasks or ()) - set(found):
        raise BadData(f"no task {sorted(unknown)} in the {split} set; there are {list(found)}")
    return [e for task in (tasks or found) for e in found[task][:limit]]


def applicable(tokenizer, tasks: Sequence[str] = tuple(TASKS)) -> list[str]:
    """The tasks a model can be asked: all for the model that was trained on this world, else those in the request."""
    bundled = "<|assistant|>" in tokenizer.get_vocab() and "ĠSaltby" in tokenizer.get_vocab()
    return [t for t in tasks if bundled or t not in TASKS or not TASKS[t].world]


def render(tokenizer, example: Example, shots: Sequence[Example] = ()) -> tuple[str, str]:
    """(prompt, prompt with answer) in the model's chat template, or as plain text if it has none or the example wants that.

    `shots` are worked examples put before the request, for models that do not know the answer's form.
    """
    if example.plain:
        start = tokenizer.bos_token or ""
        return f"{start}{example.prompt}", f"{start}{example.prompt} {example.answer}"
    turns = [m for shot in shots for m in ({"role": "user", "content": shot.prompt},
                                           {"role": "assistant", "content": shot.answer})]
    turns.append({"role": "user", "content": example.prompt})
    answered = [*turns, {"role": "assistant", "content": example.answer}]
    return chat(tokenizer, turns, ask=True), chat(tokenizer, answered)


def questions(tokenizer, count: int = 20) -> list[list[int]]:
    """Prompts of the judging set as tokens, a first of each task before a second of any."""
    rounds = -(-count // len(tasks := applicable(tokenizer)))
    asked = [e for n in range(rounds) for e in examples("judge", tasks, rounds)[n::rounds]][:count]
    return [tokenizer.encode(render(tokenizer, e)[0], add_special_tokens=False) for e in asked]


def encode(tokenizer, example: Example, shots: Sequence[Example] = ()) -> Item:
    """An example as tokens, the answer marked. Raises BadData if it is longer than the model's context."""
    prompt, whole = (tokenizer.encode(s, add_special_tokens=False) for s in render(tokenizer, example, shots))
    # a token may straddle the border: the answer begins where the two encodings part
    start = next((i for i, (a, b) in enumerate(zip(prompt, whole, strict=False)) if a != b), len(prompt))
    if len(whole) > (context := context_of(tokenizer)):
        raise BadData(f"{example.id} has {len(whole)} tokens, the context {context}")
    return Item(tuple(whole), start, example.task, example.id)


def encode_choices(tokenizer, example: Example) -> list[Item]:
    """The right answer of an example under its id, its choices under `id or n`, as quality.right_answers reads them."""
    return [replace(encode(tokenizer, replace(example, answer=answer)), id=f"{example.id} or {n}" if n else example.id)
            for n, answer in enumerate((example.answer, *example.choices))]


def encode_all(tokenizer, asked: Sequence[Example], config=None) -> list[Item]:
    """Those of the examples that a model's context holds; says how many it does not. Raises BadData if that is all."""
    context, items = context_of(tokenizer, config), []
    for example in asked:
        try:
            item = encode(tokenizer, example)
        except BadData:  # longer than the tokenizer's own limit
            continue
        items += [item] if len(item.ids) <= context else []
    if not items:
        raise BadData(f"none of {len(asked)} questions fits a context of {context} tokens")
    if len(items) < len(asked):
        print(f"{len(asked) - len(items)} of {len(asked)} questions are longer than the context of {context} tokens: left out")
    return items


def text(name: str) -> list[str]:
    """The passages of data/text/NAME.txt; raises BadData."""
    path = DATA / "text" / f"{name}.txt"
    if not path.is_file():
        raise BadData(f"{path} is missing; there are {sorted(p.stem for p in path.parent.glob('*.txt'))}")
    return read_text(path)


def encode_text(tokenizer, passages: Sequence[str], length: int = 512, domain: str = "text") -> list[Item]:
    """Passages as separate items of at most `length` tokens, each begun with the start token if the model has one."""
    start = [tokenizer.bos_token_id] if tokenizer.bos_token_id is not None else []
    items = []
    for passage in passages:
        ids = tokenizer.encode(f" {passage}", add_special_tokens=False)
        step = length - len(start)
        pieces = [start + ids[i:i + step] for i in range(0, len(ids), step)]
        items += [Item(tuple(p), 1, domain, identify("text", passage, str(n))) for n, p in enumerate(pieces) if len(p) > 1]
    return items


def read_prompts(path: Path) -> list[Example]:
    """Questions of one's own, a .jsonl of {"prompt", and if there are any "answer", "task", "id", "schema", "plain"}. One
    without an answer has the answer ""; `answered` fills it in. Raises BadData naming file, line and what was expected."""
    found = []
    for n, record in enumerate(read_jsonl(path), 1):
        if not isinstance(record, dict) or not isinstance(record.get("prompt"), str) or not record["prompt"].strip():
            raise BadData(f'{path}:{n}: expected {{"prompt": text that is not empty, ...}}')
        if bad := sorted(set(record) - {"prompt", *FIELDS}):
            raise BadData(f"{path}:{n}: unknown field {bad[0]!r}: expected some of prompt, {', '.join(FIELDS)}")
        if bad := [k for k, kind in FIELDS.items() if not isinstance(record.get(k, kind()), kind)]:
            raise BadData(f"{path}:{n}: {bad[0]}: expected {KINDS[FIELDS[bad[0]]]}")
        try:
            jsonschema.Draft202012Validator.check_schema(record.get("schema", {}))
        except jsonschema.SchemaError as error:
            raise BadData(f"{path}:{n}: schema: expected a JSON schema ({error.message})") from error
        task = record.get("task", "prompts")
        found.append(Example(task, record["prompt"], record.get("answer", ""), record.get("id") or identify(
            task, record["prompt"], record.get("answer", "")), record.get("schema"), record.get("plain", False)))
    if twice := [i for i, times in Counter(e.id for e in found).items() if times > 1]:
        raise BadData(f"{path}: {twice[0]!r} is there twice: results could not be paired by it")
    return found


def split(asked: Sequence[Example], tune: float = 1 / 3) -> tuple[list[Example], list[Example]]:
    """(to choose settings by, to judge by): each question goes where a hash of its id says, whatever else is in the file."""
    first = [e for e in asked if int(hashlib.sha256(e.id.encode()).hexdigest()[:8], 16) < tune * 2**32]
    taken = {e.id for e in first}
    return first, [e for e in asked if e.id not in taken]


def distance(tokenizer, example: Example) -> int | None:
    """Tokens from the last place in the request that says the answer to the request's end; None where it is not in it."""
    at = example.prompt.rfind(example.answer) if example.answer else -1
    return None if at < 0 else len(tokenizer.encode(example.prompt[at + len(example.answer):], add_special_tokens=False))
