"""Measures of variants as jobs, on any executor: what is measured lands in its cell at once, what fails does so alone."""

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Executor, as_completed
from contextlib import contextmanager
from typing import NamedTuple, Protocol

import numpy as np
import torch
from tqdm import tqdm

from helpers.harness.serve import EngineMissing, EngineRefused
from helpers.harness.stream import EngineFailed
from helpers.harness.variants import Variant
from helpers.measure.memory import Died
from helpers.results import machine, versions
from helpers.store import Cell, Store
from helpers.toolkits.process import ToolkitFailed, ToolkitMissing

# what one variant may fail of while the others go on (OSError: a model that cannot be had); all else is a mistake of ours
FAILURES = (ValueError, OSError, MemoryError, torch.OutOfMemoryError, Died, ToolkitFailed, ToolkitMissing, EngineMissing,
            EngineRefused, EngineFailed)


class ExecutorUnavailable(ValueError):
    """An executor that is not known, not installed, or not at its address."""


class Measure(Protocol):
    """Something that is measured of one variant; picklable, so that another process can do it."""

    name: str
    key: Mapping

    def of(self, variant: Variant) -> Mapping[str, np.ndarray]:
        """One value an item, or a single one."""


class Done(NamedTuple):
    """(measure, variant) of each job: its cell, or why there is none."""

    cells: dict[tuple[str, str], Cell]
    failed: dict[tuple[str, str], str]


def work(measure: Measure, variant: Variant, here: Mapping) -> dict[str, np.ndarray]:
    """One job, wherever it runs, with as many threads as `here`. Raises ValueError on a machine that would round otherwise."""
    torch.set_num_threads(here["machine"]["threads"])
    there = {"machine": machine(), "versions": versions()}
    for what in ("cpu", "cpu_capability", "gpu"):
        if there["machine"][what] != here["machine"][what]:
            raise ValueError(f"a worker has another {what}, {there['machine'][what]}: results could not be paired")
    if there["versions"] != here["versions"]:
        raise ValueError(f"a worker has {there['versions']}, here are {here['versions']}: results could not be paired")
    return dict(measure.of(variant))


def run(jobs: Sequence[tuple[Measure, Variant]], store: Store, executor: Executor | None = None, progress: bool = True) -> Done:
    """Every job whose cell is not in the store, one after another, or all at once on an executor; shows what is left.

    A variant that fails is in `failed` with the reason, and is tried again the next time. Raises BadCell, and any error that
    is not in FAILURES; what is finished by then is stored.
    """
    done, here = Done({}, {}), {"machine": machine(), "versions": versions()}
    waiting = {}
    with tqdm(total=len(jobs), disable=not progress, desc="measure", unit="cell") as bar:

        def settle(measure: Measure, variant: Variant, result: Callable[[], Mapping[str, np.ndarray]]) -> None:
            name = (measure.name, variant.name)
            try:
                done.cells[name] = store.get(variant.name, {**measure.key, "variant": variant.key()}, result)
            except FAILURES as error:
                done.failed[name] = f"{type(error).__name__}: {error}"
            bar.update()

        for measure, variant in jobs:
            bar.set_postfix_str(f"{measure.name}, {variant.name}")
            if executor is None or _settled(store, measure, variant):
                settle(measure, variant, lambda m=measure, v=variant: m.of(v))
            else:
                waiting[executor.submit(work, measure, variant, here)] = measure, variant
        for future in as_completed(waiting):
            settle(*waiting[future], future.result)
    return done


def _settled(store: Store, measure: Measure, variant: Variant) -> bool:
    """Whether there is nothing to compute: it is stored, or the variant cannot even be made."""
    try:
        return store.has(variant.name, {**measure.key, "variant": variant.key()})
    except FAILURES:
        return True


@contextmanager
def executor_at(address: str | None):
    """The executor of an address: None is this process, `dask://host:port` a Dask cluster. Raises ExecutorUnavailable."""
    if not address:
        yield None
        return
    kind, _, where = address.partition("://")
    if kind != "dask" or not where:
        raise ExecutorUnavailable(f"executor: {address!r}: expected nothing, or dask://host:port")
    try:
        from distributed import Client
    except ImportError as error:
        raise ExecutorUnavailable("executor: Dask is not installed: pip install distributed") from error
    try:
        with Client(f"tcp://{where}", timeout=10) as client:
            yield client.get_executor(pure=False)
    except OSError as error:
        raise ExecutorUnavailable(f"executor: no Dask scheduler answers at {where}: {error}") from error
