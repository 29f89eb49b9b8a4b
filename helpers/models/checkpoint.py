"""Artefacts in the formats of the real toolkits, written block by block.

A folder appears when it is complete, with the sha256 of its files and where they come from (`reading.py` checks both).
"""

import json
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

from helpers.files import PROVENANCE, check_replaceable, folder_hash, hashes, key_hash, put_in_place
from helpers.models.formats import FormatError
from helpers.models.layers import left_alone, linears_apart
from helpers.models.method import Format, Method, Outcome, Plan, PlanError
from helpers.models.quantize import in_fp16, quantize_model
from helpers.models.source import Source, lasting_buffers
from helpers.models.walk import Step
from helpers.results import versions


class Writer:
    """Writes an artefact block by block, so that the model need never be whole in memory (see `quantize_to`)."""

    def __init__(self, out: Path, plan: Plan, source: Path, form: Format, shard_bytes: int = 4 << 30):
        self.out, self.plan, self.source, self.form, self.shard_bytes = Path(out), plan, Path(source), form, shard_bytes
        self.tensors: dict[str, Tensor] = {}
        self.shards: list[list[str]] = []

    def __enter__(self) -> "Writer":
        check_replaceable(self.out, PROVENANCE)
        self.started = time.perf_counter()
        self.out.parent.mkdir(parents=True, exist_ok=True)
        self._scope = tempfile.TemporaryDirectory(dir=self.out.parent, prefix=f".{self.out.name}.")
        self.folder = Path(self._scope.name) / "artefact"
        self.folder.mkdir()
        return self

    def __exit__(self, *_) -> None:
        self._scope.cleanup()

    def add(self, step: Step, outcome: Outcome) -> None:
        """The tensors of a block: quantized linears packed, the rest in fp16. Codes that are written are let go."""
        self.add_parameters(step.block.named_parameters(step.name), outcome)

    def add_parameters(self, parameters: Iterator[tuple[str, Tensor]], outcome: Outcome) -> None:
        for name, tensor in parameters:
            linear = name.removesuffix(".weight")
            if linear in outcome.codes:
                try:
                    packed = self.form.pack(outcome.codes.pop(linear))
                except ValueError as error:
                    raise FormatError(f"{linear} does not fit the {self.form.name} format: {error}") from error
                self.tensors |= {f"{linear}.{end}": t.cpu().contiguous() for end, t in packed.items()}
            else:
                self.tensors[name] = in_fp16(name, tensor.detach()).cpu().contiguous()
        if sum(t.nbytes for t in self.tensors.values()) > self.shard_bytes:
            self._flush()

    def _flush(self) -> None:
        if self.tensors:
            save_file(self.tensors, self.folder / f"part{len(self.shards)}.safetensors", {"format": "pt"})
            self.shards.append(list(self.tensors))
            self.tensors = {}

    def finish(self, outside: Mapping[str, Tensor], buffers: Mapping[str, Tensor], outcome: Outcome, apart: Sequence[str] = (),
               **provenance) -> None:
        """The tensors outside of the blocks, `apart` the linears among them, settings, hashes and provenance; then the folder
        takes its name."""
        self.add_parameters(iter(outside.items()), Outcome())
        self.tensors |= {n: b.detach().cpu().contiguous() for n, b in buffers.items()}
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
        settings = self.form.settings(self.plan, outcome.left, quantized, apart)
        config = json.loads((self.source / "config.json").read_text()) | {"quantization_config": settings, "dtype": "float16"}
        config |= {"torch_dtype": "float16"} if "torch_dtype" in config else {}  # the older name of the same field
        (self.folder / "config.json").write_text(json.dumps(config, indent=1))
        if settings["quant_method"] == "gptq":
            (self.folder / "quantize_config.json").write_text(json.dumps(settings, indent=1))
        for pattern in ("tokenizer*", "*.jinja", "special_tokens_map.json", "generation_config.json", "vocab.*", "merges.txt"):
            for path in self.source.glob(pattern):
                shutil.copy(path, self.folder)
        record = provenance | {
            "plan": self.plan.key(), "format": self.form.name, "left": outcome.left, "tokens": outcome.tokens,
            "notes": outcome.notes, "source_sha256": folder_hash(self.source), "sha256": hashes(self.folder),
            "seconds": round(time.perf_counter() - self.started, 2), "versions": versions()}
        (self.folder / PROVENANCE).write_text(json.dumps(record, indent=1))
        put_in_place(self.folder, self.out)


def format_for(plan: Plan, form: Format | None = None) -> Format:
    """The format that a plan is written in; raises PlanError if none, or not the one asked for, holds all of its methods."""
    if not (fitting := plan.formats()) or (form and form not in fitting):
        raise PlanError(f"{plan} has no file format" if not fitting else
                        f"{plan} does not fit the {form.name} format, but {', '.join(f.name for f in fitting)}")
    return form or fitting[0]


def quantize_to(out: Path, source: Path, plan: Plan | Method, sequences: Sequence[Sequence[int]] = (),
                form: Format | None = None, progress: bool = False, device: str = "cpu", **provenance) -> Outcome:
    """Quantize the model in folder `source` to folder `out`, streamed from disk to disk block by block.

    `provenance` (the source's revision, the name of the calibration set, a seed) is kept with the artefact, along with the
    hashes of weights and calibration tokens. Raises what `quantize_model` and `format_for` raise, and FileExistsError if
    `out` is a folder with something else in it; an earlier artefact is replaced.
    """
    plan = Plan.of(plan)
    provenance["calibration_sha256"] = key_hash([list(s) for s in sequences])
    reader = Source.from_folder(source, device)
    provenance["not_linear"] = left_alone(reader.model)
    with Writer(out, plan, source, format_for(plan, form)) as writer:
        outcome = quantize_model(reader, plan, sequences, writer.add, progress, writer.form)
        with reader.present(reader.outside):
            outside = {n: reader.model.get_parameter(n) for n in reader.outside}
            writer.finish(outside, lasting_buffers(reader.model), outcome, linears_apart(reader.model), **provenance)
    return outcome
