"""Artefacts of any toolkit, read: nothing in a file is trusted that the config, the settings or a hash can contradict."""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from helpers.files import PROVENANCE, REPORT, BadIndex, file_hash, weight_files
from helpers.models.formats import ANY, FORMATS, FormatError, Stored
from helpers.models.layers import UnknownStructure, linears
from helpers.models.method import Codes, Format
from helpers.models.source import lasting_buffers, shell, tied_names
from helpers.quantizers.affine import GroupSizeError


class BadCheckpoint(OSError):
    """A folder that is not a whole artefact in a known format, or was changed since it was made."""


@dataclass(frozen=True)
class Artefact:
    """What is in a folder: quantized linears, all other tensors, and the format."""

    linears: dict[str, Codes]
    others: dict[str, Tensor]
    form: Format


def check_hashes(folder: Path) -> None:
    """Raises BadCheckpoint naming a file that is not what it was when the folder was made; without hashes nothing is known."""
    for name in (PROVENANCE, REPORT):
        if (folder / name).is_file():
            try:
                expected = json.loads((folder / name).read_text()).get("sha256", {})
                items = sorted(expected.items())
            except (ValueError, AttributeError) as error:
                raise BadCheckpoint(f"{folder / name} cannot be read: {error}") from error
            for file, sha256 in items:
                if not (folder / file).is_file():
                    raise BadCheckpoint(f"{folder / file} is missing, and {name} has its sha256")
                if file_hash(folder / file) != sha256:
                    raise BadCheckpoint(f"{folder / file} is not as it was written: {name} has another sha256")


def read_artefact(folder: Path) -> Artefact:
    """A quantized model in any of the formats, of any toolkit.

    Raises BadCheckpoint naming file and tensor, unless every tensor has the name, type, shape and range that the config's
    model and the settings ask for, all values are finite, and the files are those whose sha256 lie beside them.
    """
    check_hashes(folder)
    try:
        settings = json.loads((folder / "config.json").read_text())["quantization_config"]
        model = shell(folder)
        names = [n for n, _ in linears(model)]
        tensors, files = {}, {}
        for path in weight_files(folder):
            tensors |= (part := load_file(path))
            files |= dict.fromkeys(part, path)
        [form] = [f for f in FORMATS if f.reads(settings)]
    except (UnknownStructure, SafetensorError, OSError, FormatError, BadIndex) as error:
        raise BadCheckpoint(f"{folder} is not a whole quantized model: {error}") from error
    except Exception as error:  # configs raise whatever their classes do with a field that is missing or absurd
        raise BadCheckpoint(f"{folder / 'config.json'} is no quantized model's in a known format: "
                            f"{type(error).__name__}: {error}") from error
    found: dict[str, Codes] = {}
    for name in names:
        own = {k.removeprefix(f"{name}."): tensors.pop(k) for k in list(tensors) if k.startswith(f"{name}.")}
        plain = {end: own.pop(end) for end in ("weight", "bias") if end in own and own[end].is_floating_point()}
        tensors |= {f"{name}.{end}": t for end, t in plain.items()}
        if own:
            files |= {name: next(files[k] for k in files if k.startswith(f"{name}."))}
            found[name] = _read_linear(own, form, settings, name, model.get_submodule(name), files[name])
    if not found:
        raise BadCheckpoint(f"{folder} holds no quantized linear in the {form.name} format")
    _check_others(folder, tensors, found, model, files)
    return Artefact(found, tensors, form)


def _read_linear(own: dict[str, Tensor], form: Format, settings: Mapping, name: str, linear: nn.Linear, file: Path) -> Codes:
    """One linear, its tensors checked against what the format asks for."""
    try:
        method = _stored(settings, name)
        specs = form.specs(linear.out_features, linear.in_features, method)
        if "g_idx" in specs and "g_idx" not in own and not settings.get("desc_act"):
            own["g_idx"] = torch.arange(linear.in_features, dtype=torch.int32) // (linear.in_features // specs["scales"][1][0])
        if own.keys() != specs.keys():
            raise FormatError(f"has {sorted(own)}, expected {sorted(specs)}")
        for end, (dtype, shape) in specs.items():
            t = own[end]
            alike = t.dtype == dtype or {t.dtype, dtype} == {torch.float16, torch.bfloat16}  # GPTQModel's AWQ files
            if not alike or (ANY not in shape and t.shape != shape):
                raise FormatError(f"{end} is {t.dtype} {tuple(t.shape)}, expected {dtype} {shape}")
        codes = form.unpack(own, method)
        if (codes.shape if hasattr(codes, "shape") else codes.codes.shape) != linear.weight.shape:
            raise FormatError(f"holds another shape than {tuple(linear.weight.shape)}")
    except (FormatError, GroupSizeError, AttributeError, re.error) as error:
        raise BadCheckpoint(f"{file}: {name}: {error}") from error
    return codes


def _stored(settings: Mapping, name: str) -> Stored:
    """What the settings say of a linear; raises FormatError for values that decide something and cannot be."""
    said = {k: settings[k] for k in Stored._fields if k in settings}
    for pattern, changes in (settings.get("dynamic") or {}).items():
        if re.match(pattern.removeprefix("+:").removeprefix("-:"), name):
            said |= {k: v for k, v in changes.items() if k in Stored._fields}
            break
    method = Stored(**said)
    if not (type(method.bits) is type(method.group_size) is int and 2 <= method.bits <= 8
            and type(method.sym) is type(method.desc_act) is bool):
        raise FormatError(f"quantization_config says {method._asdict()}, which cannot be")
    return method


def _check_others(folder: Path, tensors: dict[str, Tensor], found: Mapping, model: PreTrainedModel, files: Mapping) -> None:
    """All other tensors: those that the model has, finite and of its shapes. Drops the zero biases that auto-gptq adds."""
    expected = {n: p.shape for n, p in model.named_parameters() if n.removesuffix(".weight") not in found}
    expected |= {n: b.shape for n, b in lasting_buffers(model).items()}
    tied = tied_names(model)
    for name in [n for n in tensors if n not in expected]:
        if name not in tied and not (name.endswith(".bias") and not tensors[name].any()):
            raise BadCheckpoint(f"{files[name]}: {name} is no tensor of a {type(model).__name__}")
        tensors.pop(name)
    for name, shape in expected.items():
        if name not in tensors:
            if name in tied:
                continue
            raise BadCheckpoint(f"{folder} has no tensor {name}")
        t = tensors[name]
        if t.shape != shape or not t.is_floating_point():
            raise BadCheckpoint(f"{files[name]}: {name} is {t.dtype} {tuple(t.shape)}, expected floating {tuple(shape)}")
        if not torch.isfinite(t).all():
            raise BadCheckpoint(f"{files[name]}: {name} has values that are NaN or infinite")


def load_simulated(folder: Path, device: str = "cpu") -> PreTrainedModel:
    """The model of an artefact in fp32, its weights dequantized exactly; no toolkit is needed. Raises BadCheckpoint."""
    read = read_artefact(folder)
    model = shell(folder)
    weights = {n: t.float() for n, t in read.others.items()} | {f"{n}.weight": q.dequantize() for n, q in read.linears.items()}
    model.load_state_dict(weights, strict=False, assign=True)
    model.tie_weights()
    return model.to(device).eval()
