"""Cells: what one measure gave of one variant, item by item, under the key of everything that decides it.

A cell is a file that numpy reads alone, written whole or not at all. A sweep that was killed goes on at the cell it was at;
a changed input is another key, and misses.
"""

import io
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np

from helpers.files import key_hash, write_atomically
from helpers.results import RESULTS, machine, versions

ROOT = Path(__file__).resolve().parents[1]
CACHE = ROOT / ".cache" / "cells"


class BadCell(ValueError):
    """A file that is not a whole cell, or not the one that its name says."""


@dataclass(frozen=True)
class Cell:
    """Arrays, one value an item, and how they came about."""

    name: str
    key: dict[str, Any]
    arrays: dict[str, np.ndarray]
    made: dict[str, Any] = field(default_factory=lambda: {
        "machine": machine(), "versions": versions(), "date": datetime.now(UTC).date().isoformat()})

    def save(self, path: Path) -> None:
        """Raises ValueError for an array of objects, which numpy could not read alone."""
        about = np.array(json.dumps({"name": self.name, "key": self.key, "made": self.made}, allow_nan=False))
        if bad := [k for k, v in self.arrays.items() if v.dtype == object or k == "about"]:
            raise ValueError(f"arrays: {bad} cannot be stored")
        content = io.BytesIO()
        np.savez_compressed(content, about=about, **self.arrays)
        write_atomically(path, content.getvalue())

    @classmethod
    def read(cls, path: Path) -> "Cell":
        """Raises BadCell naming the file."""
        try:
            with np.load(path, allow_pickle=False) as data:
                arrays = {k: data[k] for k in data.files}
            about = json.loads(str(arrays.pop("about")))
            return cls(about["name"], about["key"], arrays, about["made"])
        except (OSError, ValueError, KeyError, EOFError, BadZipFile) as error:
            raise BadCell(f"{path} is not a whole cell ({error}): delete it, it will be made again") from error


@dataclass(frozen=True)
class Store:
    """A folder of cells."""

    folder: Path = CACHE

    def path(self, name: str, key: Mapping) -> Path:
        return self.folder / f"{re.sub(r'[^a-z0-9]+', '-', name.lower()).strip('-')[:60]}-{key_hash(dict(key))}.npz"

    def has(self, name: str, key: Mapping) -> bool:
        """Whether the cell of this key is there."""
        return self.path(name, key).is_file()

    def get(self, name: str, key: Mapping, compute: Callable[[], Mapping[str, np.ndarray]]) -> Cell:
        """The cell of this key, computed and stored if it is not there. Raises BadCell, and what `compute` raises."""
        path = self.path(name, key)
        if not path.is_file():
            Cell(name, dict(key), dict(compute())).save(path)
        cell = Cell.read(path)
        if key_hash(cell.key) != key_hash(dict(key)):
            raise BadCell(f"{path} has another key than its name says: delete it, it will be made again")
        return cell


def bundle(cells: Mapping[str, Sequence[Cell]], keep: Sequence[str], shared: Sequence[str]) -> Cell:
    """Many cells as one, small enough to commit: {variant: its draws}, all on the same items.

    `shared` arrays are stored once; of the others, `keep` as [rows, items], in fp32 but for truth values. The key names the
    rows of each variant, and each row's cell. Raises ValueError if the cells are not of the same items.
    """
    distinct = {key_hash(cell.key): cell for draws in cells.values() for cell in draws}
    first, where = next(iter(distinct.values())), {k: n for n, k in enumerate(distinct)}
    for cell in distinct.values():
        if bad := [k for k in shared if not np.array_equal(cell.arrays[k], first.arrays[k])]:
            raise ValueError(f"{cell.name} has other {bad} than {first.name}")
    arrays = {k: first.arrays[k] for k in shared} | {
        k: np.stack([c.arrays[k] if c.arrays[k].dtype == bool else c.arrays[k].astype(np.float32) for c in distinct.values()])
        for k in keep}
    rows = {name: [where[key_hash(c.key)] for c in draws] for name, draws in cells.items()}
    key = {"rows": rows, "shared": list(shared), "keys": [c.key for c in distinct.values()]}
    return Cell("bundle", key, arrays, first.made)


def cells_of(cell: Cell) -> list[Cell]:
    """The cells of a bundle again, of what it kept of them."""
    shared = {k: cell.arrays[k] for k in cell.key["shared"]}
    kept = {k: v for k, v in cell.arrays.items() if k not in shared}
    return [Cell("bundled", key, shared | {k: v[n] for k, v in kept.items()}, cell.made)
            for n, key in enumerate(cell.key["keys"])]


def unbundle(cell: Cell) -> dict[str, dict[str, np.ndarray]]:
    """{variant: arrays}: the shared ones [items], the others [draws, items]."""
    return {name: {k: v if k in cell.key["shared"] else v[rows] for k, v in cell.arrays.items()}
            for name, rows in cell.key["rows"].items()}


def values(name: str, folder: Path = RESULTS) -> dict[str, dict[str, np.ndarray]]:
    """{variant: arrays, by question} of a committed bundle, data/results/NAME.npz; `stats.paired` compares any two."""
    return {variant: arrays | {"tokens": arrays["answer_tokens"]}
            for variant, arrays in unbundle(Cell.read(folder / f"{name}.npz")).items()}
