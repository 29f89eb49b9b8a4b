"""Measured results as records with their provenance, stored whole or not at all."""

import json
import os
import platform
import sys
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, distributions, version
from pathlib import Path
from typing import Any

import torch

from helpers.files import write_atomically

RESULTS = Path(__file__).resolve().parents[1] / "data" / "results"
PACKAGES = ("torch", "transformers", "bitsandbytes", "gptqmodel", "optimum", "numpy")


class BadRecord(ValueError):
    """A results file that is missing, cut short, or not a record."""


def machine() -> dict[str, Any]:
    """What the numbers were measured on; no name of a host or a user.

    The processor's name matters: another one may add up in another order, and round other weights the other way.
    """
    about = Path("/proc/cpuinfo")
    lines = about.read_text().splitlines() if about.exists() else []
    cpu = next((line.split(": ")[1] for line in lines if line.startswith("model name")), platform.processor())
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {"system": platform.system(), "processor": platform.machine(), "cpu": cpu, "cores": os.cpu_count(),
            "threads": torch.get_num_threads(), "cpu_capability": torch.backends.cpu.get_cpu_capability(), "gpu": gpu}


def versions(*others: str) -> dict[str, str]:
    """Versions of Python, of the packages that decide a result and of `others`, as far as installed."""
    found = {"python": platform.python_version()}
    for name in (*PACKAGES, *others):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def versions_in(folder: Path) -> dict[str, str]:
    """Versions of all packages that are installed in a folder."""
    return dict(sorted((d.name, d.version) for d in distributions(path=[str(folder)])))


@dataclass(frozen=True)
class Record:
    """A named result: `data` is what was measured, the rest says how it came about."""

    name: str
    data: dict[str, Any]
    command: str = field(default_factory=lambda: " ".join(["python", *sys.orig_argv[1:]]))
    seed: int | None = None
    model_sha256: str | None = None
    machine: dict[str, Any] = field(default_factory=machine)
    versions: dict[str, str] = field(default_factory=versions)
    date: str = field(default_factory=lambda: datetime.now(UTC).date().isoformat())


def save(record: Record, folder: Path = RESULTS) -> Path:
    """Store a record as FOLDER/NAME.json; raises ValueError if it holds something JSON cannot (NaN included)."""
    path = folder / f"{record.name}.json"
    write_atomically(path, json.dumps(asdict(record), indent=1, allow_nan=False) + "\n")
    return path


def read(name: str, folder: Path = RESULTS) -> Record:
    """The record of that name; raises BadRecord."""
    path = folder / f"{name}.json"
    try:
        return Record(**json.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError as error:
        raise BadRecord(f"{path} is missing: there is no measurement of that name yet") from error
    except (json.JSONDecodeError, TypeError) as error:
        raise BadRecord(f"{path} is not a record, it may be cut short: {error}") from error


def read_all(prefix: str, folder: Path = RESULTS) -> list[Record]:
    """All records whose name begins with `prefix`, by name; none is no error."""
    return [read(path.stem, folder) for path in sorted(folder.glob(f"{prefix}*.json"))]
