"""Jobs: cells are read or measured once, what fails does so alone, and a cluster gives the same bits."""

import os
import pickle
import signal
import threading
import time
from collections import Counter
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from types import SimpleNamespace

import numpy as np
import psutil
import pytest
import torch

from helpers.harness import jobs
from helpers.harness.compare import Quality
from helpers.harness.jobs import ExecutorUnavailable, executor_at, run
from helpers.harness.variants import Folder, Original, Simulation, ToolkitArtefact
from helpers.measure.tasks import encode, examples
from helpers.methods.nf4 import Nf4
from helpers.methods.rtn import Rtn
from helpers.store import BadCell, Cell, Store
from helpers.toolkits import artefacts
from helpers.toolkits.process import ToolkitMissing


@dataclass
class Fake:
    """A variant that is nothing but its name."""

    name: str
    plan: None = None

    def key(self) -> dict:
        return {"name": self.name}


@dataclass
class Says:
    """A measure that counts what it was asked, and fails as it is told to."""

    name: str = "says"
    errors: dict = field(default_factory=dict)
    asked: list = field(default_factory=list)

    @property
    def key(self) -> dict:
        return {"measure": self.name}

    def of(self, variant: Fake) -> dict:
        self.asked.append(variant.name)
        if variant.name in self.errors:
            raise self.errors[variant.name]
        return {"v": np.array([len(variant.name)])}


class Inline(Executor):
    """Runs jobs at once; `change` tells the worker something else of `here`, `error` is what comes instead of a result."""

    def __init__(self, error: Exception | None = None, **change):
        self.error, self.change = error, change

    def submit(self, work, measure, variant, here):
        future = Future()
        try:
            if self.error:
                raise self.error
            future.set_result(work(measure, variant, here | self.change))
        except Exception as error:
            future.set_exception(error)
        return future


def quality(bundled, folder, count: int = 2) -> Quality:
    return Quality([encode(bundled.tokenizer, e) for e in examples("tune", ["arithmetic", "json"], count)], store=Store(folder))


@pytest.mark.parametrize("executor", [None, Inline()], ids=["here", "executor"])
def test_what_is_stored_is_read(tmp_path, executor):
    store, measure, variants = Store(tmp_path), Says(), [Fake("a"), Fake("bb")]
    first = run([(measure, v) for v in variants], store, executor, progress=False)
    second = run([(measure, v) for v in [*variants, Fake("ccc")]], store, executor, progress=False)
    assert measure.asked == ["a", "bb", "ccc"] and not first.failed and not second.failed
    assert {n: c.arrays["v"].tolist() for n, c in second.cells.items()} == {
        ("says", "a"): [1], ("says", "bb"): [2], ("says", "ccc"): [3]}
    spoilt = store.path("a", {"measure": "says", "variant": {"name": "a"}})
    spoilt.write_bytes(b"")
    with pytest.raises(BadCell, match="not a whole cell"):  # ours to repair: no variant's failure
        run([(measure, variants[0])], store, executor, progress=False)


def ruined(model):
    model.model.layers[1].mlp.down_proj.weight.data.fill_(torch.nan)
    return model


def test_what_fails_fails_alone(tmp_path, bundled, monkeypatch):
    attempts = []

    def missing(*args, **kwargs):
        attempts.append(args)
        raise ToolkitMissing("autoawq is not installed: run `make originals`")

    monkeypatch.setattr(artefacts, "run", missing)
    monkeypatch.setattr(artefacts, "CACHE", tmp_path / "artefacts")
    (tmp_path / "empty").mkdir()
    broken = Original(change=ruined, name="NaN")
    variants = [Folder("gone", tmp_path / "gone"), broken, ToolkitArtefact("autoawq-awq", rebuild=True), Original(),
                Simulation("NaN, quantized", Nf4(), base=broken), Simulation("rounding", Rtn(3))]
    measures = [quality(bundled, tmp_path / "cells"), Says(errors={"rounding": MemoryError("no room")})]
    done = run([(m, v) for m in measures for v in variants], measures[0].store, progress=False)
    scores = {name: why for (m, name), why in done.failed.items() if m == "quality"}
    assert set(scores) == {"gone", "NaN", "autoawq-awq", "NaN, quantized"}
    assert scores["gone"].startswith("FileNotFoundError: ") and "gone" in scores["gone"]
    assert scores["NaN"].startswith("ValueError: the model's logits are not finite")
    assert scores["NaN, quantized"] == "ValueError: weight (256, 768) has values that are NaN or infinite"
    assert scores["autoawq-awq"] == "ToolkitMissing: autoawq is not installed: run `make originals`"
    assert done.failed["says", "rounding"] == "MemoryError: no room"
    assert len(attempts) == 1  # not once more for every measure
    assert {n for m, n in done.cells if m == "quality"} == {"16 bits", "rounding"}
    assert len(list((tmp_path / "cells").iterdir())) == len(done.cells) == 2 + 3


@pytest.mark.parametrize("executor", [None, Inline(), "threads"], ids=["here", "executor", "threads"])
def test_a_mistake_of_ours_is_raised_and_what_is_finished_kept(tmp_path, executor):
    store, measure = Store(tmp_path), Says(errors={"b": KeyError("a mistake"), "c": ValueError("its own")})
    names = ["a", "c", "b", "d"]
    with ThreadPoolExecutor(1) as pool, pytest.raises(KeyError, match="a mistake"):
        run([(measure, Fake(n)) for n in names], store, pool if executor == "threads" else executor, progress=False)
    kept = {Cell.read(p).name for p in tmp_path.iterdir()}
    assert "a" in kept and "b" not in kept and "c" not in kept
    if isinstance(executor, Inline):
        assert kept == {"a", "d"}  # which was finished before the mistake was seen
    del measure.errors["b"]
    done = run([(measure, Fake(n)) for n in names], store, progress=False)
    assert {n for _, n in done.cells} == {"a", "b", "d"} and done.failed == {("says", "c"): "ValueError: its own"}
    assert measure.asked.count("a") == 1


@pytest.mark.parametrize("change, said", [
    ({"versions": {"torch": "1.0"}}, "a worker has other versions"), ({"code": "0"}, "a worker has other code"),
    ({"machine": {"threads": 1, "cpu": "abacus", "cpu_capability": "DEFAULT", "gpu": None}}, "a worker has another cpu")])
def test_another_worker_is_refused(tmp_path, change, said):
    measure = Says()
    done = run([(measure, Fake("a"))], Store(tmp_path), Inline(**change), progress=False)
    assert done.failed["says", "a"].startswith(f"ValueError: {said}") and not done.cells and not measure.asked
    assert list(tmp_path.iterdir()) == []


def test_a_variant_that_kills_its_workers_fails_and_a_lost_cluster_is_said(tmp_path):
    scheduler = pytest.importorskip("distributed.scheduler")
    killed = scheduler.KilledWorker("work", SimpleNamespace(address="tcp://there"), 3)
    done = run([(Says(), Fake("a"))], Store(tmp_path), Inline(error=killed), progress=False)
    assert done.failed["says", "a"].startswith("Died: Attempted to run task 'work' on 4 different workers")

    class Gone(Executor):
        def submit(self, *args):
            future = Future()
            future.cancel()
            future.set_running_or_notify_cancel()
            return future

    with pytest.raises(ExecutorUnavailable, match="it broke off"):
        run([(Says(), Fake("a"))], Store(tmp_path), Gone(), progress=False)


@pytest.mark.parametrize("address, said", [
    ("spark://here:1", "expected nothing, or dask://host:port"), ("dask://", "expected nothing, or dask://host:port"),
    ("dask://nowhere", "nowhere"), ("dask://127.0.0.1:1", "no Dask scheduler answers at 127.0.0.1:1")])
def test_executors_that_are_not_there(address, said, monkeypatch):
    monkeypatch.setattr(jobs, "PATIENCE", 0.3)
    with pytest.raises(ExecutorUnavailable, match=said), executor_at(address):
        pass
    with executor_at(None) as executor, executor_at("") as other:
        assert executor is None and other is None


def test_a_measure_travels_without_its_judge(tmp_path, bundled):
    measure = quality(bundled, tmp_path)
    before = len(pickle.dumps(measure))
    measure.scores(Original())
    assert "judge" in measure.__dict__
    again = pickle.loads(pickled := pickle.dumps(measure))
    assert len(pickled) < before + 10_000 and "judge" not in again.__dict__ and again.key == measure.key


def test_a_cluster_loses_a_worker_and_nothing_else(tmp_path, bundled, monkeypatch):
    """Two real workers; one is killed when the first cell is there. All cells come, once, with the bits of this process."""
    distributed = pytest.importorskip("distributed")
    before = {p.pid for p in psutil.Process().children(recursive=True)}
    torch.set_num_threads(1)
    written, save = Counter(), Cell.save
    monkeypatch.setattr(Cell, "save", lambda cell, path: (written.update([path.name]), save(cell, path))[1])
    far, near = quality(bundled, tmp_path / "far", 4), quality(bundled, tmp_path / "near", 4)
    variants = [Original(), Simulation("NF4", Nf4()), *(
        Simulation(f"{bits} bits of {group}", Rtn(bits, group)) for bits in (2, 3, 4) for group in (64, 128))]
    pids: list[int] = []
    finished: list[int] = []
    with distributed.LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=None) as cluster:
        def kill() -> None:
            until = time.time() + 300  # starting workers takes long on a busy machine
            while time.time() < until and not any((tmp_path / "far").glob("*.npz")):
                time.sleep(0.01)
            finished.append(len(list((tmp_path / "far").glob("*.npz"))))
            pids.extend(n.pid for n in cluster.workers.values())
            os.kill(pids[0], signal.SIGKILL)

        murderer = threading.Thread(target=kill)
        murderer.start()
        with executor_at(cluster.scheduler_address.replace("tcp", "dask")) as executor:
            done = run([(far, v) for v in variants], far.store, executor, progress=False)
        murderer.join()
        with pytest.raises(OSError, match="the disk is full"), executor_at(cluster.scheduler_address.replace("tcp", "dask")):
            raise OSError("the disk is full")  # which is no fault of the scheduler's
    assert len(set(pids)) == 2 and 1 <= finished[0] <= 6 and not done.failed
    assert len(written) == len(done.cells) == 8 and set(written.values()) == {1}
    here = run([(near, v) for v in variants], near.store, progress=False)
    for name, cell in here.cells.items():
        for what, values in cell.arrays.items():
            assert np.array_equal(values, done.cells[name].arrays[what]), (name, what)
    after = [p for p in psutil.Process().children(recursive=True) if p.pid not in before]
    assert not [p for p in after if "resource_tracker" not in " ".join(p.cmdline())]
