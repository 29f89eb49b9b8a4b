"""A model by one name ("bundled", "small", a local folder, or a hub id with a revision), whole or read block by block."""

import json
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch
from accelerate import init_empty_weights
from accelerate.utils import set_module_tensor_to_device
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from helpers.files import weight_files
from helpers.models.fetch import ModelUnavailable, from_hub, small
from helpers.models.layers import blocks_of

DATA = Path(__file__).resolve().parents[2] / "data"
BUNDLED = DATA / "model"
NAMED = {"bundled": lambda: BUNDLED, "small": small}


class Loaded(NamedTuple):
    """What `load` returns."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase


def resolve(name: str, revision: str | None = None) -> Path:
    """The folder that a name stands for, fetched from the hub if it is an id; raises ModelUnavailable."""
    if name in NAMED:
        return NAMED[name]()
    folder = Path(name).expanduser()
    if not folder.is_dir():
        folder = from_hub(name, revision)
    for needed in ("config.json", "tokenizer_config.json"):
        if not (folder / needed).is_file():
            raise ModelUnavailable(f"{folder} has no {needed}: expected a Hugging Face model folder")
    if not any(folder.glob("*.safetensors")):
        raise ModelUnavailable(f"{folder} has no *.safetensors: other weight files can run code and are not loaded")
    return folder


def load(name: str = "bundled", revision: str | None = None, dtype: torch.dtype | str = "float32",
         device: str = "cpu") -> Loaded:
    """Load a model for evaluation and its tokenizer.

    Only safetensors are read and no code of the checkpoint is run. Raises ModelUnavailable with what to do.
    """
    source = unquantized(resolve(name, revision))
    check_device(device)
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
        model = AutoModelForCausalLM.from_pretrained(source, dtype=dtype, use_safetensors=True, trust_remote_code=False)
    except Exception as error:  # transformers and safetensors raise many kinds
        raise ModelUnavailable(f"{source} could not be loaded, its files may be truncated or of another kind: {error}"
                               ) from error
    return Loaded(model.to(device).eval(), tokenizer)


def unquantized(folder: Path) -> Path:
    """The folder, if its weights are numbers and not codes; raises ModelUnavailable."""
    try:
        settings = json.loads((folder / "config.json").read_text()).get("quantization_config")
    except (ValueError, AttributeError) as error:
        raise ModelUnavailable(f"{folder}/config.json is not a model's configuration: {error}") from error
    if settings:
        raise ModelUnavailable(f"{folder}/config.json: the model is quantized already ({settings.get('quant_method')}): "
                               "expected one in 16 or 32 bits")
    return folder


def check_device(device: torch.device | str) -> None:
    """Raises ModelUnavailable if nothing can be computed there."""
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # the second of a torch that was built without it
        raise ModelUnavailable(f"device {str(device)!r} cannot be used: {str(error).splitlines()[0]}") from error


def shell(folder: Path, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """The model of a folder with its buffers, but no weights: shapes on `meta`."""
    config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    with init_empty_weights(include_buffers=False):
        return AutoModelForCausalLM.from_config(config, dtype=dtype).eval()


def end_tokens(folder: Path) -> list[int]:
    """The tokens that end an answer, by a folder's config.json and generation_config.json."""
    said = [json.loads(path.read_text()).get("eos_token_id") for path in folder.glob("*config.json")]
    return sorted({e for s in said if s is not None for e in (s if isinstance(s, list) else [s])})


def tied_names(model: PreTrainedModel) -> set[str]:
    """Parameters that are another one under a second name, and so are not in the files."""
    return set(model._tied_weights_keys or ()) if model.config.get_text_config().tie_word_embeddings else set()


def lasting_buffers(model: PreTrainedModel) -> dict[str, Tensor]:
    """The buffers that are in the files, such as the biases of some routers."""
    return {n: b for n, b in model.named_buffers() if n in model.state_dict().keys()}  # noqa: SIM118


class Source:
    """A model whose weights are in memory, or on disk and read block by block; `device` is where all of it is computed."""

    def __init__(self, model: PreTrainedModel, folder: Path | None = None, device: torch.device | str | None = None):
        self.model, self.folder = model, folder
        self.path, self.blocks = blocks_of(model)
        self.device = torch.device(device or ("cpu" if folder else next(model.parameters()).device))
        tied = tied_names(model)
        self.outside = [n for n, _ in model.named_parameters() if not n.startswith(f"{self.path}.") and n not in tied]

    @classmethod
    def of(cls, model: "PreTrainedModel | Source") -> "Source":
        return model if isinstance(model, Source) else cls(model)

    @classmethod
    def from_folder(cls, folder: Path, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> "Source":
        """A model that is never whole in memory: weights come to the device in this dtype when their block's turn is there.

        Where the files have other names than the model (transformers renames and fuses some), it is loaded whole after all.
        """
        check_device(device)
        source = cls(shell(unquantized(folder := Path(folder)), dtype), folder, device)
        there = set(stored_names(folder))
        if any(n not in there for n, _ in source.model.named_parameters() if n not in tied_names(source.model)):
            return cls(AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, use_safetensors=True).to(device).eval())
        stored = dict(read_tensors(folder, there & lasting_buffers(source.model).keys()))
        for name, buffer in source.model.named_buffers():
            set_module_tensor_to_device(source.model, name, source.device, stored.get(name, buffer))
        return source

    @contextmanager
    def present(self, names: Sequence[str]):
        """These parameters are in memory while the context lasts."""
        if self.folder is not None:
            dtype = self.model.dtype
            for name, tensor in read_tensors(self.folder, names):
                set_module_tensor_to_device(self.model, name, self.device, tensor.to(dtype))
                del tensor  # else the last one keeps the mapped file, and with it the whole block in 16 bits, in memory
        yield
        if self.folder is not None:
            for name in names:
                set_module_tensor_to_device(self.model, name, "meta")

    def __iter__(self) -> Iterator[tuple[str, nn.Module]]:
        """(name, block) in order, each with its weights present until the next is asked for."""
        for i, block in enumerate(self.blocks):
            with self.present([f"{self.path}.{i}.{n}" for n, _ in block.named_parameters()]):
                yield f"{self.path}.{i}", block


@contextmanager
def opened(path: Path):
    """A safetensors file; raises ModelUnavailable naming it."""
    try:
        with safe_open(path, "pt") as f:
            yield f
    except SafetensorError as error:
        raise ModelUnavailable(f"{path} is not a whole safetensors file, fetch it again: {error}") from error


def stored_names(folder: Path) -> Iterator[str]:
    """The names of the tensors in a model folder."""
    for path in weight_files(folder):
        with opened(path) as f:
            yield from f.keys()


def read_tensors(folder: Path, names: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
    """The named tensors of a model folder's safetensors, one at a time; raises ModelUnavailable naming what is not there."""
    wanted = set(names)
    for path in weight_files(folder):
        with opened(path) as f:
            for name in wanted & set(f.keys()):
                yield name, f.get_tensor(name)
                wanted.remove(name)
    if wanted:
        raise ModelUnavailable(f"{folder} does not hold {sorted(wanted)}")
