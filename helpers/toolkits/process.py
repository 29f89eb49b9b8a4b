"""Run one toolkit on one model in a process of its own, and keep its artefact whole or not at all.

Importing a toolkit patches transformers for everybody, and the archived ones need a transformers of their own: no two
of them share a process. `run` starts `python -m helpers.toolkits.NAME JOB OUT`, which quantizes, saves and reports.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from helpers.files import REPORT, check_replaceable, hashes, put_in_place, write_atomically
from helpers.results import machine, versions

ROOT = Path(__file__).resolve().parents[2]
ORIGINALS = Path(os.environ.get("ORIGINALS", ROOT / ".venv-originals"))  # transformers 4, the archived toolkits (Makefile)


class ToolkitFailed(RuntimeError):
    """A toolkit's process ended without an artefact."""


class ToolkitMissing(RuntimeError):
    """A toolkit that is not installed here."""


@dataclass(frozen=True)
class Job:
    """What a toolkit is asked to do: quantize the model in folder `source`, calibrated on `tokens`."""

    method: str  # by the toolkit's own name for it: gptq, awq, nf4 or int8
    source: str
    tokens: Sequence[Sequence[int]] = ()
    settings: dict = field(default_factory=dict)
    calibrated: bool = True  # needs tokens


def main(work: Callable[[Job, Path], dict], *packages: str) -> None:
    """The entry point of a toolkit's process: JOB and OUT from the command line, a report left in OUT.

    `packages`: those whose versions are to be in the report beside the usual ones.
    """
    job = Job(**json.loads(Path(sys.argv[1]).read_text()))
    out = Path(sys.argv[2])
    started = time.perf_counter()
    report = work(job, out)
    report |= {"seconds": round(time.perf_counter() - started, 2), "method": job.method, "settings": job.settings,
               "calibration_tokens": sum(map(len, job.tokens)), "machine": machine(), "versions": versions(*packages),
               "sha256": hashes(out)}
    write_atomically(out / REPORT, json.dumps(report, indent=1) + "\n")


def run(toolkit: str, job: Job, out: Path, originals: bool = False, timeout: float = 4 * 3600) -> dict:
    """Quantize in a new process, write the artefact to folder `out`, return the report.

    The artefact is built beside `out` and renamed when it is complete, so `out` is never half-written. Raises
    ToolkitMissing if the originals are not installed, ToolkitFailed with the end of the log if the process fails,
    ValueError for an empty calibration set or sequences longer than the model's context, FileExistsError if `out` holds
    something else than an earlier artefact.
    """
    if job.calibrated:
        context = json.loads((Path(job.source) / "config.json").read_text()).get("max_position_embeddings", 2**31)
        if not job.tokens:
            raise ValueError(f"tokens: {job.method} needs at least one calibration sequence, got none")
        if (longest := max(map(len, job.tokens))) > context:
            raise ValueError(f"tokens: a calibration sequence has {longest} tokens, the model's context is {context}; cut it")
    check_replaceable(out, REPORT)
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.") as temporary:
        put_in_place(_work(toolkit, job, Path(temporary), originals, timeout), out)
    return json.loads((out / REPORT).read_text())


def ask(toolkit: str, job: Job, originals: bool = False, timeout: float = 600) -> dict:
    """The report of a new process whose other files nobody needs; raises ToolkitMissing and ToolkitFailed."""
    with tempfile.TemporaryDirectory() as temporary:
        return json.loads((_work(toolkit, job, Path(temporary), originals, timeout) / REPORT).read_text())


def _work(toolkit: str, job: Job, temporary: Path, originals: bool, timeout: float) -> Path:
    """The folder inside `temporary` in which a new process left its report, and an artefact if it made one."""
    env = os.environ | {"PYTHONPATH": str(ROOT), "GPTQMODEL_CPU_WORKERS": str(os.cpu_count()), "HF_HUB_OFFLINE": "1"}
    if originals:
        if not (ORIGINALS / "transformers").is_dir():
            raise ToolkitMissing(f"{toolkit} is not installed: run `make originals` (Linux, Python 3.11), or use the artefacts "
                                 "in data/artefacts")
        env["PYTHONPATH"] = f"{ORIGINALS}{os.pathsep}{ROOT}"
    job_file, made, log = (temporary / n for n in ("job.json", "artefact", "log"))
    job_file.write_text(json.dumps(asdict(job)))
    made.mkdir()
    with log.open("w") as f:
        try:
            done = subprocess.run([sys.executable, "-m", f"helpers.toolkits.{toolkit}", str(job_file), str(made)],
                                  env=env, cwd=temporary, stdout=f, stderr=subprocess.STDOUT, timeout=timeout, check=False)
            ended = f"ended with exit status {done.returncode}"
        except subprocess.TimeoutExpired:
            ended = f"did not finish in {timeout:.0f} s"
    if not (made / REPORT).is_file():
        tail = "\n".join(log.read_text(errors="replace").splitlines()[-15:])
        raise ToolkitFailed(f"{toolkit} ({job.method}) {ended}; the end of its log:\n{tail}")
    return made
