"""All that is known of one variant, and how a gate asks for it."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from helpers.harness.variants import Variant
from helpers.measure.bytes import Fit, fits
from helpers.measure.quality import Scores, Sums


class NotMeasured(LookupError):
    """Something that was not measured, with the reason."""


@dataclass(frozen=True)
class Measured:
    """What each measure gave of a variant; None or nothing where it was not taken, `failed` says why it could not be."""

    variant: Variant
    questions: Scores | None = None
    texts: Scores | None = None
    form: Mapping[str, np.ndarray] | None = None
    peaks: Mapping[str, float] | None = None
    timed: Mapping[str, np.ndarray] | None = None
    served: Mapping[float, Any] = field(default_factory=dict)  # by requests a second
    loads: Mapping[str, Any] = field(default_factory=dict)  # by engine
    failed: Mapping[str, str] = field(default_factory=dict)  # by measure

    @property
    def name(self) -> str:
        return self.variant.name

    @property
    def bytes(self) -> int:
        """Of the weights on disk; of what has no file, those predicted. Raises NotMeasured."""
        for size in (self.variant.measured(), self.variant.predicted()):
            if size is not None:
                return size
        why = getattr(self.variant, "why", None)
        raise NotMeasured(f"it could not be made: {why}" if why else "no file format holds it, so it has no size")

    def right(self, task: str = "overall") -> np.ndarray:
        """Whether each answer is right [questions], of a task or overall. Raises NotMeasured."""
        questions = self._scores("questions")
        if task != "overall" and task not in questions.tasks:
            raise NotMeasured(f"nothing of the name {task!r} was asked")
        return (questions if task == "overall" else questions.select(task)).exact

    def sums(self, name: str = "overall") -> Sums:
        """Sums over the answers of a task (overall: of all), or over a text ("texts": all). Raises NotMeasured, also for one
        text alone, which gives no interval."""
        if len((found := self._sums(name)).tokens) < 2:
            raise NotMeasured("a single text gives no interval: ask more")
        return found

    def _sums(self, name: str) -> Sums:
        questions, texts = self.questions, self.texts
        if name == "overall":
            return self._scores("questions").answer
        if name == "texts":
            return self._scores("texts").all
        if questions is not None and name in questions.tasks:
            return questions.select(name).answer
        if texts is not None and name in texts.tasks:
            return texts.select(name).all
        raise NotMeasured(self.failed.get("questions") or self.failed.get("texts") or f"nothing of the name {name!r} was asked")

    def _scores(self, which: str) -> Scores:
        if (scores := getattr(self, which)) is None:
            raise NotMeasured(self.failed.get(which, f"no {which} were asked"))
        return scores

    def form_of(self, part: str) -> np.ndarray:
        """Whether each generated answer has this part of its form, of those that it is asked of. Raises NotMeasured."""
        if self.form is None:
            raise NotMeasured(self.failed.get("form", "no answers were generated"))
        asked = self.form["structured"] if part in ("json_parses", "schema") else np.ones(len(self.form["id"]), dtype=bool)
        if not asked.any():
            raise NotMeasured("no question asks for JSON")
        return self.form[part][asked]

    def latency_of(self, what: str, rate: float | None = None) -> np.ndarray:
        """Milliseconds of each request (ITL: the mean gap of each), in process or served at a rate. Raises NotMeasured."""
        if rate is None:
            if self.timed is None:
                raise NotMeasured(self.failed.get("memory", "latency was not measured"))
            return self.timed[what].mean(1) if self.timed[what].ndim == 2 else self.timed[what]
        load = self._at(rate)
        if load.doubt and what != "e2el_ms":
            raise NotMeasured(f"not to be believed: {load.doubt}")
        if not len(getattr(load, what)):
            raise NotMeasured("no request succeeded")
        return getattr(load, what)

    def errors_at(self, rate: float) -> tuple[int, int]:
        """(requests that failed, requests) served at a rate. Raises NotMeasured."""
        load = self._at(rate)
        failed = sum(load.errors.values())
        return failed, failed + len(load.e2el_ms)

    def tokens_per_second_at(self, rate: float) -> float:
        """All requests that succeeded together. Raises NotMeasured."""
        return self._at(rate).tokens_per_second

    def _at(self, rate: float) -> Any:
        if rate not in self.served:
            raise NotMeasured(self.failed.get("served", f"nothing was served at {rate:g} requests a second"))
        return self.served[rate]

    def engines(self) -> tuple[int, int]:
        """(engines that load it and give the right answers, engines that were not tried). Raises NotMeasured."""
        if not self.loads:
            raise NotMeasured(self.failed.get("memory", "no engine was tried"))
        works = sum(e.loads and e.right == e.asked for e in self.loads.values())
        return works, sum(not e.loads and e.reason.startswith("not installed") for e in self.loads.values())

    def peak(self) -> float:
        """Most bytes held while answering, loading apart. Raises NotMeasured."""
        if self.peaks is None:
            raise NotMeasured(self.failed.get("memory", "memory was not measured"))
        return max(self.peaks["peak_prefill"], self.peaks["peak_decode"])

    def fit(self, gpu_gb: float, context: int, batch: int) -> Fit:
        """Whether it fits a GPU. Raises NotMeasured for what has no size."""
        return fits(self.variant.config, self.bytes, gpu_gb, context, batch)
