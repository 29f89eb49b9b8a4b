"""Artefacts in the formats of the real toolkits, written and read: GPTQ (v1, v2), AWQ GEMM, bitsandbytes NF4.

A folder appears when it is complete: files are written beside it and renamed, with their sha256 and where they come from.
"""

import hashlib
import json
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from helpers.models.calibration import Walk
from helpers.models.quantize import quantize_model
from helpers.models.scheme import Outcome, Scheme
from helpers.quantizers import packing
from helpers.quantizers.affine import QParams, Quantized
from helpers.quantizers.nf4 import (
    NESTED_BLOCK,
    NF4,
    DoubleQuantized,
    codebook,
    dequantize_absmax,
    dequantize_nf4,
    dynamic_map,
    quantize_absmax,
)
from helpers.results import check_replaceable, file_hash, folder_hash, put_in_place, versions

STATE = "weight.quant_state.bitsandbytes__nf4"
PROVENANCE = "provenance.json"


class BadCheckpoint(OSError):
    """A folder that is not a whole artefact in a known format."""


def format_of(scheme: Scheme) -> str:
    """nf4 for NF4, awq for asymmetric AWQ, gptq (version 1) for what is symmetric, gptq_v2 for the rest."""
    if scheme.method == "nf4":
        return "nf4"
    if scheme.method == "awq":
        return "awq"
    return "gptq" if scheme.sym else "gptq_v2"


def linear_tensors(q: Quantized | NF4, form: str) -> dict[str, Tensor]:
    """The tensors of one linear in a format, by the end of their names. Raises ValueError for what the format cannot hold."""
    if form == "nf4":
        double = quantize_absmax(q.absmax)
        state = {"quant_type": "nf4", "blocksize": q.block_size, "dtype": "float16", "shape": list(q.shape),
                 "nested_blocksize": NESTED_BLOCK, "nested_dtype": "float32", "nested_offset": double.offset.item()}
        return {"weight": q.packed[:, None], "weight.absmax": double.codes, "weight.nested_absmax": double.absmax,
                "weight.quant_map": codebook().clone(), "weight.nested_quant_map": dynamic_map().clone(),
                STATE: torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)}
    bits, zeros = (q.grid.qmax + 1).bit_length() - 1, q.grid.zero_point.to(torch.int32)
    scales = q.grid.scale.T.half().contiguous()
    if not torch.isfinite(scales).all() or ((scales == 0) & (q.grid.scale.T != 0)).any():
        raise ValueError("a scale is too large or too small for fp16, in which all formats store it")
    if form == "awq":
        if bits != 4 or (q.g_idx.diff() < 0).any():
            raise ValueError("the AWQ format holds 4 bits and groups of neighbouring columns; write gptq or gptq_v2")
        return {"qweight": packing.pack_awq(q.codes), "qzeros": packing.pack_awq(zeros.T.contiguous().T), "scales": scales}
    return {"qweight": packing.pack_gptq(q.codes, bits), "qzeros": packing.pack_gptq_zeros(zeros, bits, form == "gptq"),
            "scales": scales, "g_idx": q.g_idx.to(torch.int32)}


def read_linear(tensors: Mapping[str, Tensor], form: str) -> Quantized | NF4:
    """The inverse of `linear_tensors`, for files of any toolkit."""
    if form == "nf4":
        state = json.loads(bytes(tensors[STATE].tolist()))
        absmax = tensors["weight.absmax"]
        if "weight.nested_absmax" in tensors:
            absmax = dequantize_absmax(DoubleQuantized(absmax, tensors["weight.nested_absmax"],
                                                       torch.tensor(state["nested_offset"])))
        return NF4(tensors["weight"].flatten(), absmax, tuple(state["shape"]), state["blocksize"])
    scale = tensors["scales"].T.float().contiguous()
    if form == "awq":
        bits, codes, zeros = 4, packing.unpack_awq(tensors["qweight"]), packing.unpack_awq(tensors["qzeros"])
    else:
        bits = 32 * len(tensors["qweight"]) // len(tensors["g_idx"])
        codes = packing.unpack_gptq(tensors["qweight"], bits)
        zeros = packing.unpack_gptq_zeros(tensors["qzeros"], bits, form == "gptq")
    width = codes.shape[1]
    g_idx = tensors["g_idx"].long() if "g_idx" in tensors else torch.arange(width) // (width // scale.shape[1])
    return Quantized(codes, QParams(scale, zeros.float(), 2**bits - 1), g_idx)


def settings_json(scheme: Scheme, form: str, skipped: list[str], quantized: list[str]) -> dict:
    """What the toolkits look for in `quantization_config`. Other bits or groups for some linears of a GPTQ file are in
    `dynamic`, which GPTQModel reads and transformers does not."""
    if form == "nf4":
        return {"quant_method": "bitsandbytes", "load_in_4bit": True, "load_in_8bit": False, "bnb_4bit_quant_type": "nf4",
                "bnb_4bit_use_double_quant": True, "bnb_4bit_compute_dtype": "bfloat16", "bnb_4bit_quant_storage": "uint8",
                "llm_int8_skip_modules": ["lm_head", *skipped]}
    common = {"bits": scheme.bits, "group_size": scheme.group_size}
    if form == "awq":
        return common | {"quant_method": "awq", "version": "gemm", "zero_point": True,
                         "modules_to_not_convert": skipped or None}
    each = {}
    for pattern, settings in scheme.overrides.items():
        if settings is not None:
            each[f"+:.*{pattern}.*"] = {k: v for k, v in settings.items() if k in ("bits", "group_size", "sym", "desc_act")}
    each |= {f"-:{name.replace('.', r'[.]')}$": {} for name in skipped}
    if skipped:  # transformers' word for it
        common |= {"modules_in_block_to_quantize": [quantized]}
    return common | {"quant_method": "gptq", "checkpoint_format": form, "sym": scheme.sym, "desc_act": scheme.desc_act,
                     "damp_percent": scheme.damp_percent, "true_sequential": scheme.true_sequential, "lm_head": False,
                     "static_groups": False} | ({"dynamic": each} if each else {})


class Writer:
    """Writes an artefact block by block, so that the model need never be whole in memory (see `quantize_to`)."""

    def __init__(self, out: Path, scheme: Scheme, source: Path, form: str | None = None, shard_bytes: int = 4 << 30):
        self.out, self.scheme, self.source, self.shard_bytes = Path(out), scheme, Path(source), shard_bytes
        self.form = form or format_of(scheme)
        self.tensors: dict[str, Tensor] = {}
        self.shards: list[list[str]] = []

    def __enter__(self) -> "Writer":
        check_replaceable(self.out, PROVENANCE)
        self.out.parent.mkdir(parents=True, exist_ok=True)
        self._scope = tempfile.TemporaryDirectory(dir=self.out.parent, prefix=f".{self.out.name}.")
        self.folder = Path(self._scope.name) / "artefact"
        self.folder.mkdir()
        return self

    def __exit__(self, *_) -> None:
        self._scope.cleanup()

    def add(self, prefix: str, module: nn.Module, outcome: Outcome) -> None:
        """The tensors of a module: quantized linears packed, the rest in fp16. Codes that are written are let go."""
        for name, tensor in module.named_parameters(prefix):
            linear = name.removesuffix(".weight")
            if linear in outcome.codes:
                packed = linear_tensors(outcome.codes.pop(linear), self.form)
                self.tensors |= {f"{linear}.{end}": t.contiguous() for end, t in packed.items()}
            else:
                self.tensors[name] = tensor.detach().half().contiguous()
        if sum(t.nbytes for t in self.tensors.values()) > self.shard_bytes:
            self._flush()

    def _flush(self) -> None:
        if self.tensors:
            save_file(self.tensors, self.folder / f"part{len(self.shards)}.safetensors", {"format": "pt"})
            self.shards.append(list(self.tensors))
            self.tensors = {}

    def finish(self, outside: Mapping[str, Tensor], outcome: Outcome, **provenance) -> None:
        """The tensors outside of the blocks, settings, hashes and provenance; then the folder takes its name."""
        self.tensors |= {name: t.detach().half().contiguous() for name, t in outside.items()}
        self._flush()
        names = [f"model-{i + 1:05}-of-{len(self.shards):05}.safetensors" for i in range(len(self.shards))]
        if len(names) == 1:
            names = ["model.safetensors"]
        else:
            where = {t: name for name, shard in zip(names, self.shards, strict=True) for t in shard}
            (self.folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
        for i, name in enumerate(names):
            (self.folder / f"part{i}.safetensors").replace(self.folder / name)
        quantized = [t.removesuffix(".qweight") for shard in self.shards for t in shard if t.endswith(".qweight")]
        settings = settings_json(self.scheme, self.form, outcome.skipped, quantized)
        config = json.loads((self.source / "config.json").read_text()) | {"quantization_config": settings, "dtype": "float16"}
        (self.folder / "config.json").write_text(json.dumps(config, indent=1))
        if self.form.startswith("gptq"):
            (self.folder / "quantize_config.json").write_text(json.dumps(settings, indent=1))
        for pattern in ("tokenizer*", "*.jinja", "special_tokens_map.json", "generation_config.json"):
            for path in self.source.glob(pattern):
                shutil.copy(path, self.folder)
        record = provenance | {
            "scheme": asdict(self.scheme), "format": self.form, "skipped": outcome.skipped, "tokens": outcome.tokens,
            "damp_percent": outcome.damp_percent, "source_sha256": folder_hash(self.source),
            "sha256": {p.name: file_hash(p) for p in sorted(self.folder.glob("*.safetensors"))}, "versions": versions()}
        (self.folder / PROVENANCE).write_text(json.dumps(record, indent=1))
        put_in_place(self.folder, self.out)


def quantize_to(out: Path, source: Path, scheme: Scheme, sequences: Sequence[Sequence[int]] = (), form: str | None = None,
                progress: bool = False, **provenance) -> Outcome:
    """Quantize the model in folder `source` to folder `out`, streamed from disk to disk block by block.

    `provenance` (the source's revision, the name of the calibration set, a seed) is kept with the artefact, along with the
    hashes of weights and calibration tokens. Raises what `quantize_model` raises, and FileExistsError if `out` is a folder
    with something else in it; an earlier artefact is replaced.
    """
    provenance["calibration_sha256"] = hashlib.sha256(json.dumps([list(s) for s in sequences]).encode()).hexdigest()
    walk = Walk.from_folder(source)
    with Writer(out, scheme, source, form) as writer:
        outcome = quantize_model(walk, scheme, sequences, writer.add, progress)
        with walk.present(walk.outside):
            writer.finish({n: walk.model.get_parameter(n) for n in walk.outside}, outcome, **provenance)
    return outcome


def read_artefact(folder: Path) -> tuple[dict[str, Quantized | NF4], dict[str, Tensor]]:
    """(quantized linears, all other tensors) of an artefact in any of the formats; raises BadCheckpoint."""
    try:
        settings = json.loads((folder / "config.json").read_text())["quantization_config"]
        tensors = {}
        for path in sorted(folder.glob("*.safetensors")):
            tensors |= load_file(path)
    except (OSError, KeyError, json.JSONDecodeError, SafetensorError) as error:
        raise BadCheckpoint(f"{folder} is not a whole quantized model: {error}") from error
    form = {"bitsandbytes": "nf4", "awq": "awq"}.get(settings["quant_method"], settings.get("checkpoint_format", "gptq"))
    marker = ".weight.absmax" if form == "nf4" else ".qweight"
    linears = {}
    for name in [n.removesuffix(marker) for n in tensors if n.endswith(marker)]:
        own = {k.removeprefix(f"{name}."): tensors.pop(k) for k in list(tensors) if k.startswith(f"{name}.")}
        tensors |= {f"{name}.bias": own.pop("bias")} if "bias" in own else {}
        linears[name] = read_linear(own, form)
    if not linears:
        raise BadCheckpoint(f"{folder} holds no quantized linear in the {form} format")
    return linears, tensors


def load_simulated(folder: Path) -> nn.Module:
    """The model of an artefact in fp32, its weights dequantized exactly; no toolkit is needed."""
    linears, tensors = read_artefact(folder)
    config = AutoConfig.from_pretrained(folder)
    del config.quantization_config
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    tensors |= {f"{n}.weight": dequantize_nf4(q) if isinstance(q, NF4) else q.dequantize() for n, q in linears.items()}
    missing, unknown = model.load_state_dict({k: v.float() for k, v in tensors.items()}, strict=False)
    missing = set(missing) - set(model._tied_weights_keys or () if config.tie_word_embeddings else ())
    # auto-gptq writes biases of zero to models that have none
    unknown = [n for n in unknown if not n.endswith(".bias") or tensors[n].any()]
    if missing or unknown:
        raise BadCheckpoint(f"{folder}: missing {missing}, unknown {unknown}")
    return model.eval()
