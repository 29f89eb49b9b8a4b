"""A comparison from its parts: a model, variants of it, questions, gates. The chapter and the command use this one."""

from collections.abc import Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np
from transformers import AutoTokenizer

from helpers.harness.compare import Quality
from helpers.harness.decide import Verdict, decide
from helpers.harness.gates import Gate, check_names, read_gates
from helpers.harness.jobs import FAILURES, Done, run
from helpers.harness.measured import Measured
from helpers.harness.measures import Form, Latency, Memory
from helpers.harness.named import DEFAULT, named, random_weights
from helpers.harness.portability import Loads, matrix
from helpers.harness.served import Served
from helpers.harness.variants import Missing, Original, Variant
from helpers.measure.answers import answered, prompt_ids, structured
from helpers.measure.quality import Scores
from helpers.measure.tasks import Example, applicable, encode_all, encode_text, examples, read_prompts, split, text
from helpers.models.source import BUNDLED, DATA, check_device
from helpers.models.texts import BadData, calibration, context_of, windows
from helpers.results import BadRecord, read
from helpers.store import Store
from helpers.toolkits.artefacts import CALIBRATION, COMMITTED

DEFAULT_GATES = DATA / "gates" / "default.yml"
DTYPES = ("float32", "bfloat16", "float16")  # that full precision is computed in


@dataclass(frozen=True)
class Study:
    """What is compared and on what. `tune` are questions to choose settings by, `judge` those of the verdict."""

    full: Original
    variants: Sequence[Variant]
    tune: Sequence[Example] = field(repr=False)
    judge: Sequence[Example] = field(repr=False)
    passages: Mapping[str, Sequence[str]] = field(repr=False)
    gates: Sequence[Gate]
    device: str = "cpu"
    store: Store = field(default_factory=Store)
    shapes: bool = False  # the weights are random

    @cached_property
    def tokenizer(self):
        return AutoTokenizer.from_pretrained(self.full.folder)

    def quality(self, asked: Sequence[Example]) -> Quality:
        """The scores of questions; of the same ones the same object, which remembers what full precision says to them."""
        if (ids := tuple(e.id for e in asked)) not in self._of:
            items = encode_all(self.tokenizer, asked, self.full.config)
            self._of[ids] = Quality(items, self.full, self.store, self.device, "questions")
        return self._of[ids]

    @cached_property
    def _of(self) -> dict[tuple[str, ...], Quality]:
        return {}

    @cached_property
    def texts(self) -> Quality:
        """The scores of the passages, each from its start token, in windows of at most 512 tokens."""
        length = min(512, context_of(self.tokenizer, self.full.config))
        items = [i for name, p in self.passages.items() for i in encode_text(self.tokenizer, p, length, name)]
        return Quality(items, self.full, self.store, self.device, "texts")

    def form(self) -> Form:
        """The form of generated answers, of some 60 questions that want JSON and as many others."""
        json_wanted = [e for e in self.judge if structured(e)]
        others = [e for e in self.judge if not structured(e)]
        taken = [e for part in (json_wanted, others) for e in some(part)]
        return Form(taken, self.full, self.device)

    def latency(self) -> Latency:
        """Of up to 60 of the questions, so that a p95 may be printed; without any, of random tokens."""
        taken = [prompt_ids(self.tokenizer, e) for e in some(self.judge)]
        noise = np.random.default_rng(0).integers(5, self.full.config.get_text_config().vocab_size, (60, 128)).tolist()
        return Latency(taken or noise, device=self.device)

    def everyone(self) -> list[Variant]:
        """Full precision first. What cannot be made (a toolkit is missing, or fails) has a `Missing` in its place."""
        return [self.full, *self._made]

    @cached_property
    def _made(self) -> list[Variant]:
        found = []
        for v in self.variants:
            try:
                getattr(v, "folder", None)  # which runs the toolkit
            except FAILURES as error:
                v = Missing(v.name, v.plan, self.full, error)
            found.append(v)
        return found

    def served(self, rates: Sequence[float]) -> Served:
        """On an engine: the rates asked for, and those of the gates."""
        asked_for = sorted({*map(float, rates), *(g.rate for g in self.gates if g.rate is not None)})
        return Served(some(self.judge), self.full, tuple(asked_for))

    def measure(self, executor: Executor | None = None, progress: bool = True, rates: Sequence[float] = ()
                ) -> dict[str, Measured]:
        """Everything, of every variant: {its name: what was measured}. What is stored is read; what fails says why. On a
        serving engine only at `rates` (requests/s) and those of the gates: it takes minutes."""
        questions = [self.quality(self.judge), self.form()] if self.judge else []
        texts = [self.texts] if self.passages else []
        done = run([(m, v) for v in self.everyone() for m in questions + texts], self.store, executor, progress)
        memory = run([(Memory(device=self.device), v) for v in self.everyone()], self.store, progress=progress)
        engine = self.served(rates)
        to_serve = self.everyone() if engine.rates and self.judge else []
        served = run([(engine, v) for v in to_serve], self.store, progress=progress)
        cells, failed = done.cells | memory.cells | served.cells, done.failed | memory.failed | served.failed
        loadable = [v for v in self.everyone() if ("memory", v.name) in cells]
        times = self.times(loadable, progress)
        loads = self.loads(progress)
        return {v.name: _measured(v, Done(cells, failed), times.get(v.name), loads.get(v.name, {})) for v in self.everyone()}

    def times(self, variants: Sequence[Variant], progress: bool = False) -> dict[str, Mapping[str, np.ndarray]]:
        """{variant: its times in process}, all in turn; what does not load as its library does it is left out."""
        cell = self.latency().cell(variants, self.store, progress)
        return {v.name: Latency.times(cell, n) for n, v in enumerate(variants)}

    def loads(self, progress: bool = False) -> dict[str, dict[str, Loads]]:
        """{variant: {engine: whether it loads and answers right}}: of the committed artefacts from the record, of others
        measured now (minutes), if a gate asks for it."""
        files = {v.name: v.folder for v in self._made if hasattr(v, "folder")}
        known = recorded() if self.full.folder == BUNDLED else {}
        found = {name: known[f.name] for name, f in files.items() if f.parent == COMMITTED and f.name in known}
        rest = {name: folder for name, folder in files.items() if name not in found}
        if rest and any(g.field == "portability" for g in self.gates):
            found |= matrix(rest, tokenizer=self.full.folder, progress=progress)
        return found

    def verdict(self, measured: Mapping[str, Measured]) -> Verdict:
        return decide(self.gates, measured, self.full.name)


def recorded() -> dict[str, dict[str, Loads]]:
    """{committed artefact: {engine: Loads}} of data/results/portability.json; nothing if it is not there."""
    try:
        cells = read("portability").data["matrix"]
    except BadRecord:
        return {}
    return {name: {engine: Loads(**x) for engine, x in row.items()} for name, row in cells.items()}


def _measured(v: Variant, done: Done, times: Mapping | None, loads: Mapping[str, Loads]) -> Measured:
    arrays = {m: cell.arrays for (m, name), cell in done.cells.items() if name == v.name}
    return Measured(
        v, *(Scores.of(arrays[m]) if m in arrays else None for m in ("questions", "texts")), arrays.get("form"),
        {k: float(x) for k, x in arrays["memory"].items()} if "memory" in arrays else None, times,
        Served.by_rate(arrays["served"]) if "served" in arrays else {}, loads,
        failed={m: why for (m, name), why in done.failed.items() if name == v.name})


def some(asked: Sequence[Example], most: int = 60) -> list[Example]:
    """So many of them, evenly, from all of the list."""
    few = min(most, len(asked))
    return [asked[i * len(asked) // few] for i in range(few)]


def _fitting(asked: Sequence[Example], tokenizer, full: Original) -> list[Example]:
    """Those that the model's context holds; says how many it does not. Raises BadData if that is all."""
    fits = {i.id for i in encode_all(tokenizer, asked, full.config)} if asked else set()
    return [e for e in asked if e.id in fits]


class Material(NamedTuple):
    """A model, questions to choose settings by and others to judge by, texts, and windows of tokens to calibrate on."""

    full: Original
    tune: Sequence[Example]
    judge: Sequence[Example]
    passages: Mapping[str, Sequence[str]]
    tokens: Sequence[Sequence[int]]


def material(model: str = "bundled", revision: str | None = None, dtype: str = "float32", device: str = "cpu",
             prompts: Path | None = None, limit: int = 50) -> Material:
    """From the arguments of commands: `model` as everywhere in the book, or a config.json, whose shapes then get random
    weights; `prompts` a .jsonl (else the book's questions, `limit` a task).

    Own prompts that are kept for choosing settings calibrate too; where they are too few, the book's set follows them.
    Raises what is wrong with them: ModelUnavailable, BadData.
    """
    if limit < 1:
        raise BadData(f"limit: expected at least 1 question a task, got {limit}")
    shapes = model.endswith("config.json")
    full = Original(str(random_weights(Path(model))) if shapes else model, revision, dtype)
    check_device(device)
    tokenizer = AutoTokenizer.from_pretrained(full.folder)
    if shapes:
        tune, judge, passages = [], [], {}
    elif prompts:
        tune, judge = split(answered(full.load(device), tokenizer, read_prompts(Path(prompts))))
        if len(judge) < 2:
            raise BadData(f"{prompts}: of {len(tune) + len(judge)} questions {len(judge)} are left to judge by, as a third is "
                          "kept to choose settings by: expected at least 2")
        passages = {"essay": text("essay")}
    else:
        able = applicable(tokenizer)
        tune, judge = (examples(part, able, limit) for part in ("tune", "judge"))
        passages = {name: text(name) for name in (("tales", "recipes") if full.folder == BUNDLED else ("essay",))}
    tune, judge = (_fitting(part, tokenizer, full) for part in (tune, judge))
    length = min(CALIBRATION["length"], context_of(tokenizer, full.config))
    own = [prompt_ids(tokenizer, e) for e in tune] if prompts and not shapes else []
    tokens = windows([*own, *calibration(tokenizer, CALIBRATION["name"])], length, CALIBRATION["count"])
    return Material(full, tune, judge, passages, tokens)


def prepared(model: str = "bundled", revision: str | None = None, dtype: str = "float32", device: str = "cpu",
             prompts: Path | None = None, gates: Path | None = None, methods: Sequence[str] = (), limit: int = 50,
             rebuild: bool = False, store: Store | None = None, progress: bool = True) -> Study:
    """A study from its arguments: those of `material`, gates in a file, and `methods` by name.

    Raises what is wrong with them: ModelUnavailable, BadData, BadGates, UnknownMethod, PlanError.
    """
    chosen = read_gates(Path(gates or DEFAULT_GATES))
    full, tune, judge, passages, tokens = material(model, revision, dtype, device, prompts, limit)
    check_names(chosen, {e.task for e in judge}, set(passages))
    # AutoRound takes minutes to hours to make
    names = list(methods) or [m for m in DEFAULT if full.folder == BUNDLED or m != "autoround"]
    shapes = model.endswith("config.json")
    variants = named(names, full, tokens, rebuild, shapes, progress, device)
    return Study(full, variants, tune, judge, passages, chosen, device, store or Store(), shapes)
