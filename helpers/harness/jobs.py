"""Measures of variants as jobs, on any executor: what is measured lands in its cell at once, what fails does so alone."""

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import BrokenExecutor, CancelledError, Executor, as_completed
from contextlib import contextmanager, suppress
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from tqdm import tqdm

from helpers.harness.compare import code
from helpers.harness.serve import EngineMissing, EngineRefused
from helpers.harness.stream import EngineFailed
from helpers.harness.variants import Variant
from helpers.measure.memory import Died
from helpers.results import machine, versions
from helpers.store import BadCell, Cell, Store
from helpers.toolkits.process import ToolkitFailed, ToolkitMissing

# what one variant may fail of while the others go on (OSError: a model that cannot be had); all else is a mistake of ours
FAILURES = (ValueError, OSError, MemoryError, torch.OutOfMemoryError, Died, ToolkitFailed, ToolkitMissing, EngineMissing,
            EngineRefused, EngineFailed)
PATIENCE = 10  # seconds that a scheduler has to answer


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


def conditions() -> dict[str, Any]:
    """What has to be alike wherever a job runs."""
    return {"machine": machine(), "versions": versions(), "code": code()}


def work(measure: Measure, variant: Variant, here: Mapping) -> dict[str, np.ndarray]:
    """One job, wherever it runs, with as many threads as `here`. Raises ValueError where it would round otherwise."""
    torch.set_num_threads(here["machine"]["threads"])
    there = conditions()
    for what in ("cpu", "cpu_capability", "gpu"):
        if there["machine"][what] != here["machine"][what]:
            raise ValueError(f"a worker has another {what}, {there['machine'][what]}: results could not be paired")
    for what in ("versions", "code"):
        if there[what] != here[what]:
            raise ValueError(f"a worker has other {what}, {there[what]}, here are {here[what]}: results could not be paired")
    return dict(measure.of(variant))


def run(jobs: Sequence[tuple[Measure, Variant]], store: Store, executor: Executor | None = None, progress: bool = True) -> Done:
    """Every job whose cell is not in the store, one after another, or all at once on an executor; shows what is left.

    A variant that fails is in `failed` with the reason, and is tried again the next time. Raises BadCell, ExecutorUnavailable
    if the executor breaks off, and any error that is not in FAILURES; what is finished by then is stored.
    """
    done, here, waiting = Done({}, {}), conditions(), {}
    keys: dict[str, Mapping | Exception] = {}  # once each: it reads all weights, and may run a toolkit
    with tqdm(total=len(jobs), disable=not (progress and jobs), desc="measure", unit="cell") as bar:

        def key(measure: Measure, variant: Variant) -> dict:
            if variant.name not in keys:
                try:
                    keys[variant.name] = variant.key()
                except FAILURES as error:
                    keys[variant.name] = error
            if isinstance(found := keys[variant.name], Exception):
                raise found
            return {**measure.key, "variant": found}

        def settle(measure: Measure, variant: Variant, result: Callable[[], Mapping[str, np.ndarray]]) -> None:
            name = (measure.name, variant.name)
            try:
                done.cells[name] = store.get(variant.name, key(measure, variant), result)
            except BadCell:
                raise
            except FAILURES as error:
                done.failed[name] = f"{type(error).__name__}: {error}"
            except (CancelledError, BrokenExecutor) as error:
                raise ExecutorUnavailable(f"executor: it broke off: {error}; what was finished is stored") from error
            except Exception as error:
                if type(error).__name__ != "KilledWorker":  # Dask's, which need not be installed
                    raise
                done.failed[name] = f"Died: {error}"
            bar.update()

        try:
            for measure, variant in jobs:
                bar.set_postfix_str(f"{measure.name}, {variant.name}")
                try:
                    to_do = executor is not None and not store.has(variant.name, key(measure, variant))
                except FAILURES:
                    to_do = False  # it cannot even be made
                if to_do:
                    waiting[executor.submit(work, measure, variant, here)] = measure, variant
                else:
                    settle(measure, variant, lambda m=measure, v=variant: m.of(v))
            for future in as_completed(waiting):
                settle(*waiting.pop(future), future.result)
        except BaseException:
            for future, job in waiting.items():
                if not future.cancel() and future.done() and not future.cancelled():
                    with suppress(Exception):  # the first one is raised
                        settle(*job, future.result)
            raise
    return done


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
        client = Client(f"tcp://{where}", timeout=PATIENCE)
    except (OSError, ValueError) as error:  # ValueError: not an address
        raise ExecutorUnavailable(f"executor: no Dask scheduler answers at {where}: {error}") from error
    with client:  # an OSError in here is none of the scheduler's
        yield client.get_executor(pure=False)
