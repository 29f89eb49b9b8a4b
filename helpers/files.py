"""Files and folders that appear whole or not at all, and their hashes."""

import ast
import errno
import hashlib
import itertools
import json
import os
import tempfile
from contextlib import suppress
from pathlib import Path

PROVENANCE = "provenance.json"  # of an artefact of ours: how it was made, with the hashes of its files
REPORT = "report.json"  # of a toolkit's artefact, the same
HASHED = ("*.safetensors", "config.json", "quantize_config.json")  # what decides what a model is


class BadIndex(ValueError):
    """An index of weights that cannot be read."""


def file_hash(path: Path) -> str:
    """sha256 of a file, hex."""
    with path.open("rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def weight_files(folder: Path) -> list[Path]:
    """The files that hold a model's weights: those in its index, else model.safetensors, else all *.safetensors. Beside the
    first two a folder may hold the same weights once more, under other names. Raises BadIndex."""
    index, whole = folder / "model.safetensors.index.json", folder / "model.safetensors"
    if index.is_file():
        try:
            return sorted(folder / name for name in set(json.loads(index.read_text())["weight_map"].values()))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise BadIndex(f"{index} is no index of weights, fetch it again: {type(error).__name__}: {error}") from error
    return [whole] if whole.is_file() else sorted(folder.glob("*.safetensors"))


def folder_hash(folder: Path) -> str:
    """sha256 over the weights of a model folder (their files, by name), hex."""
    return hashlib.sha256("".join(f.name + file_hash(f) for f in weight_files(folder)).encode()).hexdigest()


def wording_hash(folder: Path) -> str:
    """A short name for what turns requests into tokens and ends answers."""
    found = (p for pattern in ("tokenizer*", "*.jinja", "generation_config.json") for p in sorted(folder.glob(pattern)))
    return key_hash([[p.name, file_hash(p)] for p in found])


def key_hash(key: object) -> str:
    """A short name, 16 hex digits, for anything that JSON can write: equal keys, equal names."""
    return hashlib.sha256(json.dumps(key, sort_keys=True, allow_nan=False).encode()).hexdigest()[:16]


def hashes(folder: Path) -> dict[str, str]:
    """{file: sha256} of the files that decide what a model is."""
    return {p.name: file_hash(p) for pattern in HASHED for p in sorted(folder.glob(pattern))}


def write_atomically(path: Path, content: str | bytes) -> None:
    """Write a file so that after a crash it is the old one or the new one, never half of either."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as f:
            f.write(content.encode() if isinstance(content, str) else content)
            f.flush()
            os.fsync(f.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def check_replaceable(out: Path, mark: str) -> None:
    """Raises FileExistsError if `out` exists and is no earlier artefact, which has a file `mark`: only that may be replaced."""
    if out.exists() and not (out / mark).is_file() and not (out.is_dir() and not any(out.iterdir())):
        raise FileExistsError(f"{out} exists and has no {mark}, so it is no earlier artefact: choose another folder")


def put_in_place(folder: Path, out: Path) -> None:
    """Rename a complete folder to `out`, its files readable as any other's (safetensors writes them for their owner alone).

    An earlier one is moved beside `folder`, to go away with its temporary parent.
    """
    for path in folder.rglob("*"):
        if path.is_file():
            path.chmod(0o644)
    for n in itertools.count():  # another process may put its own there between the two
        with suppress(FileNotFoundError):
            os.replace(out, folder.with_name(f"earlier-{n}"))
        try:
            return os.replace(folder, out)
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise


def code_hash(*folders: Path) -> str:
    """A short name for what the Python files of these folders do: comments, docstrings and layout do not change it."""
    found = []
    for path in sorted(p for folder in folders for p in folder.glob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            body = getattr(node, "body", None)
            if isinstance(body, list) and body and isinstance(body[0], ast.Expr) and isinstance(body[0].value, ast.Constant):
                del body[0]
        found.append([path.name, ast.dump(tree)])
    return key_hash(found)
