"""A model and its tokenizer by one name: "bundled", "bundled-outliers", a local folder, or a hub id with a revision."""

import re
from pathlib import Path
from typing import NamedTuple

import torch
from huggingface_hub import snapshot_download
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from helpers.models.layers import add_outliers

DATA = Path(__file__).resolve().parents[2] / "data"
BUNDLED = DATA / "model"


class ModelUnavailable(OSError):
    """A model that is not there, cannot be fetched, or cannot be read."""


class Loaded(NamedTuple):
    """What `load` returns."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase


def resolve(name: str, revision: str | None = None) -> Path:
    """The folder that a name stands for, fetched from the hub if it is an id; raises ModelUnavailable."""
    if name in ("bundled", "bundled-outliers"):
        return BUNDLED
    folder = Path(name).expanduser()
    if not folder.is_dir():
        folder = _fetch(name, revision)
    for needed in ("config.json", "tokenizer_config.json"):
        if not (folder / needed).is_file():
            raise ModelUnavailable(f"{folder} has no {needed}: expected a Hugging Face model folder")
    if not any(folder.glob("*.safetensors")):
        raise ModelUnavailable(f"{folder} has no *.safetensors: other weight files can run code and are not loaded")
    return folder


def _fetch(name: str, revision: str | None) -> Path:
    """The local copy of a hub model: configuration, tokenizer and safetensors alone."""
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", name) or name.startswith((".", "/")):
        raise ModelUnavailable(f"model {name!r} is neither 'bundled', nor a folder that exists, nor a hub id owner/name")
    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=["*.json", "*.safetensors", "*.model", "*.jinja",
                                                                              "merges.txt"]))
    except Exception as error:  # hub, http and file errors of many kinds; all mean the same to the reader
        at = f" --revision {revision}" if revision else ""
        raise ModelUnavailable(
            f"hub model {name!r} could not be fetched ({type(error).__name__}). Without a network use the name 'bundled', "
            f"or run `hf download {name}{at}` ahead where there is one") from error


def load(name: str = "bundled", revision: str | None = None, dtype: torch.dtype | str = "float32",
         device: str = "cpu") -> Loaded:
    """Load a model for evaluation and its tokenizer.

    Only safetensors are read and no code of the checkpoint is run. Raises ModelUnavailable with what to do.
    """
    source = resolve(name, revision)
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
        model = AutoModelForCausalLM.from_pretrained(source, dtype=dtype, use_safetensors=True, trust_remote_code=False)
    except Exception as error:  # transformers and safetensors raise many kinds
        raise ModelUnavailable(f"{source} could not be loaded, its files may be truncated or of another kind: {error}"
                               ) from error
    if name == "bundled-outliers":
        add_outliers(model)
    return Loaded(model.to(device).eval(), tokenizer)
