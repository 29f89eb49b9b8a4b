"""A model and its tokenizer by one name: "bundled", "bundled-outliers", a local folder, or a hub id with a revision."""

import re
from pathlib import Path
from typing import NamedTuple

import torch
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


def resolve(name: str) -> str:
    """The folder or hub id that a name stands for; raises ModelUnavailable for anything else."""
    if name in ("bundled", "bundled-outliers"):
        return str(BUNDLED)
    folder = Path(name).expanduser()
    if folder.is_dir():
        for needed in ("config.json", "tokenizer_config.json"):
            if not (folder / needed).is_file():
                raise ModelUnavailable(f"{folder} has no {needed}: expected a Hugging Face model folder")
        if not any(folder.glob("*.safetensors")):
            raise ModelUnavailable(f"{folder} has no *.safetensors: other weight files can run code and are not loaded")
        return str(folder)
    if re.fullmatch(r"[\w.-]+/[\w.-]+", name) and not name.startswith((".", "/")):
        return name
    raise ModelUnavailable(f"model {name!r} is neither 'bundled', nor a folder that exists, nor a hub id owner/name")


def load(name: str = "bundled", revision: str | None = None, dtype: torch.dtype = torch.float32,
         device: str = "cpu") -> Loaded:
    """Load a model for evaluation and its tokenizer.

    Only safetensors are read and no code of the checkpoint is run. Raises ModelUnavailable with what to do.
    """
    source = resolve(name)
    options = {"revision": revision, "trust_remote_code": False}
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, **options)
        model = AutoModelForCausalLM.from_pretrained(source, dtype=dtype, use_safetensors=True, **options)
    except Exception as error:  # transformers, hub and safetensors raise many kinds; all mean the same to the reader
        if Path(source).is_dir():
            raise ModelUnavailable(f"{source} could not be loaded, its files may be truncated or of another kind: {error}"
                                   ) from error
        at = f" --revision {revision}" if revision else ""
        raise ModelUnavailable(
            f"hub model {name!r} could not be fetched ({type(error).__name__}). Without a network use the name 'bundled', "
            f"or run `hf download {name}{at}` ahead where there is one") from error
    if name == "bundled-outliers":
        add_outliers(model)
    return Loaded(model.to(device).eval(), tokenizer)
