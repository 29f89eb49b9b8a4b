"""Time and memory of our quantizers beside the toolkits': `make bench`, some 20 minutes on two idle cores.

Both sides get all cores of this process, run in turn, and see the same inputs. Two sizes of model, so that what a toolkit
spends before it begins is visible and not counted as our speed. Writes data/results/bench.json.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM

from helpers.files import folder_hash
from helpers.measure.bytes import quantizing_bytes
from helpers.measure.memory import alone, forget_most, held, most_held
from helpers.methods.awq import Awq
from helpers.methods.gptq import PLAIN, Gptq
from helpers.methods.reference import Inputs
from helpers.methods.rtn import Rtn
from helpers.models.checkpoint import format_for, quantize_to
from helpers.models.method import Gram, Plan
from helpers.models.quantize import quantize_many, quantize_model
from helpers.models.source import BUNDLED, Source, load
from helpers.models.texts import calibration, windows
from helpers.models.walk import Step, first_step, walk
from helpers.quantizers import awq
from helpers.quantizers.affine import Quantized, output_error
from helpers.quantizers.gptq import gptq, gptq_columns
from helpers.quantizers.nf4 import dequantize_nf4, quantize_nf4
from helpers.results import Record, save
from helpers.toolkits.artefacts import CALIBRATION
from helpers.toolkits.process import Job, run

LARGER = LlamaConfig(vocab_size=1280, hidden_size=768, intermediate_size=2048, num_hidden_layers=6, num_attention_heads=12,
                     num_key_value_heads=4, max_position_embeddings=1024, bos_token_id=1, eos_token_id=2, pad_token_id=0)
HALF_A_BILLION = LlamaConfig(vocab_size=8192, hidden_size=1536, intermediate_size=4096, num_hidden_layers=20,
                             num_attention_heads=12, num_key_value_heads=12, max_position_embeddings=1024)


def in_turn(sides: dict[str, Callable[[], object]], repeats: int = 7) -> dict[str, dict[str, float]]:
    """Seconds of each side, run in turn after a warm-up: {side: {least, median}}."""
    for work in sides.values():
        work()
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(repeats):
        for name, work in sides.items():
            started = time.perf_counter()
            work()
            seconds[name].append(time.perf_counter() - started)
    return {name: summary(s) for name, s in seconds.items()}


def summary(seconds: list[float]) -> dict[str, float]:
    return {"least": min(seconds), "median": statistics.median(seconds), "most": max(seconds), "runs": len(seconds)}


def random_model(config: LlamaConfig, folder: Path) -> Path:
    """A checkpoint with random weights of these shapes, with the bundled tokenizer."""
    torch.manual_seed(0)
    LlamaForCausalLM(config).half().save_pretrained(folder, max_shard_size="400MB")
    for path in BUNDLED.glob("*token*"):
        (folder / path.name).write_bytes(path.read_bytes())
    return folder


def nf4() -> dict:
    import bitsandbytes.functional as bnb

    found = {}
    for size in (1024, 4096):
        W = torch.randn(size, size, generator=torch.Generator().manual_seed(0)) * 0.02
        packed, state = bnb.quantize_4bit(W, quant_type="nf4", compress_statistics=False)
        q = quantize_nf4(W)
        assert torch.equal(q.packed, packed.flatten()) and torch.equal(q.absmax, state.absmax)
        found[f"quantize {size} x {size}"] = in_turn({
            "ours": lambda W=W: quantize_nf4(W),
            "bitsandbytes": lambda W=W: bnb.quantize_4bit(W, quant_type="nf4", compress_statistics=False)})
        found[f"dequantize {size} x {size}"] = in_turn({
            "ours": lambda q=q: dequantize_nf4(q),
            "bitsandbytes": lambda packed=packed, state=state: bnb.dequantize_4bit(packed, state)})
    return found


def block_of(folder: Path, tokens) -> Step:
    return first_step(load(str(folder)).model, tokens)


def gptq_solve(sizes: dict[str, Path], tokens) -> dict:
    """One block's linears: the column loop linear by linear, ours with those stacked that share their input."""
    found = {}
    for name, folder in sizes.items():
        step = block_of(folder, tokens)
        grams = step.grams(Gram)
        problems = [([step.block.get_submodule(n).weight.detach() for n in group], grams[group[0]].H)
                    for group in step.layout.groups]

        def columns(problems=problems):
            return [[gptq_columns(W, H) for W in Ws] for Ws, H in problems]

        def ours(problems=problems):
            return [gptq(torch.cat(Ws), H) for Ws, H in problems]

        lost = [sum(output_error(W - s.quantized.dequantize(), H) for (Ws, H), solved in zip(problems, columns(), strict=True)
                    for W, s in zip(Ws, solved, strict=True)),
                sum(output_error(torch.cat(Ws) - s.quantized.dequantize(), H)
                    for (Ws, H), s in zip(problems, ours(), strict=True))]
        found[f"GPTQ solve, one block, {name}"] = in_turn({"ours": ours, "column loop": columns}, 5) | {
            "proxy_loss_ratio": lost[1] / lost[0]}
    return found


def awq_search(sizes: dict[str, Path], tokens) -> dict:
    """The 20 candidates for the MLP's input: through the Gram matrix, and by forward passes over all tokens."""
    found = {}
    for name, folder in sizes.items():
        step = block_of(folder, tokens)
        inputs = step.grams(Inputs)["mlp.gate_proj"].X
        block = step.block
        X = torch.cat([x.flatten(0, -2) for x in inputs])
        W = torch.cat([block.mlp.gate_proj.weight, block.mlp.up_proj.weight]).detach()
        H, candidates = X.T @ X, awq.candidate_scales(X.abs().mean(0), awq.weight_saliency(W))

        def by_forward(X=X, W=W, candidates=candidates):
            before = X @ W.T
            return awq.search_scale(candidates, lambda s: (
                (X / s) @ awq.fake_quantize(W * s).T - before).square().sum().item())

        def by_gram(H=H, W=W, candidates=candidates):
            return awq.search_scale(candidates, awq.gram_loss(W, H))

        assert by_gram().ratio == by_forward().ratio
        found[f"AWQ scale search, {name}, {len(X)} tokens"] = in_turn({"ours": by_gram, "forward passes": by_forward}, 3)
    return found


def ours_end_to_end(folder: Path, plan: Plan, tokens) -> float:
    """Seconds from a model in memory to packed tensors in memory."""
    model, form = load(str(folder)).model, format_for(plan)
    started = time.perf_counter()
    for q in quantize_model(model, plan, tokens).codes.values():
        form.pack(q)
    return time.perf_counter() - started


def end_to_end(sizes: dict[str, Path], gptq_tokens, awq_tokens, repeats: int) -> dict:
    """Whole models, ours and each toolkit in turn; a toolkit's time is its quantize call alone, in its own process."""
    cases = {"GPTQ": (Plan(Gptq(**PLAIN)), gptq_tokens,
                      {"auto-gptq": ("autogptq", "gptq", True), "GPTQModel": ("gptqmodel", "gptq", False)}),
             "AWQ": (Plan(Awq()), awq_tokens,
                     {"autoawq": ("autoawq", "awq", True), "GPTQModel": ("gptqmodel", "awq", False)})}
    found = {}
    for method, (plan, tokens, toolkits) in cases.items():
        for name, folder in sizes.items():
            seconds: dict[str, list[float]] = {"ours": [], **{t: [] for t in toolkits}}
            with tempfile.TemporaryDirectory() as scratch:
                # autoawq needs minutes for the larger model: once has to do
                runs = 1 if method == "AWQ" and folder != BUNDLED else repeats
                for _ in tqdm(range(runs), desc=f"{method}, {name}"):
                    seconds["ours"].append(ours_end_to_end(folder, plan, tokens))
                    for toolkit, (module, job, originals) in toolkits.items():
                        report = run(module, Job(job, str(folder), tokens), Path(scratch) / toolkit, originals, 3000)
                        seconds[toolkit].append(report["quantize_seconds"])
            key = f"{method} end to end, {name}, {sum(map(len, tokens))} tokens"
            found[key] = {side: summary(s) for side, s in seconds.items()}
    return found


def sweep_of_twelve(folder: Path, tokens) -> dict:
    methods = [kind(bits, group, sym=False) for kind in (Rtn, Gptq) for bits in (3, 4) for group in (64, 128)]
    methods += [Awq(bits, group) for bits in (3, 4) for group in (64, 128)]
    plans, model = [Plan(m, inputs="model") for m in methods], load(str(folder)).model
    return {"12 configurations": in_turn({"one": lambda: quantize_many(model, plans[4:5], tokens),
                                          "twelve": lambda: quantize_many(model, plans, tokens)}, 3)}


def passes(sizes: dict[str, Path], tokens) -> dict:
    """GPTQ calibrated group by group in one forward pass a block, held at each group, beside a pass for each group (what
    the toolkits do) and the two passes of calibrating block by block."""
    found = {}
    for name, folder in sizes.items():
        def held(folder=folder):
            return quantize_model(load(str(folder)).model, Gptq(**PLAIN), tokens)

        def block(folder=folder):
            return quantize_model(load(str(folder)).model, Plan(Gptq(**PLAIN), inputs="block"), tokens)

        found[f"GPTQ, whole model, {name}"] = in_turn({"ours": held, "again for each group": lambda folder=folder: again(
            folder, tokens), "block by block": block}, 3)
    return found


def again(folder: Path, tokens) -> dict[str, Quantized]:
    """The codes of `Gptq(**PLAIN)` with the block run again, from its start, for each group of its linears."""
    model, codes = load(str(folder)).model, {}
    for step in walk(model, tokens):
        for group in step.layout.groups:
            H = replace(step, seen={}).keep({group: Gram})[group[0]].H
            modules = [step.block.get_submodule(n) for n in group]
            parts = gptq(torch.cat([m.weight.detach() for m in modules]), H).quantized.split([m.out_features for m in modules])
            for n, m, q in zip(group, modules, parts, strict=True):
                m.weight.data, codes[f"{step.name}.{n}"] = q.dequantize(), q
    return codes


def peak_memory(folder: Path, tokens) -> dict:
    """In a process of its own: the most memory it ever held, less what it held before, against `quantizing_bytes`."""
    terms = quantizing_bytes(LlamaConfig.from_pretrained(folder), Gptq(**PLAIN), sum(map(len, tokens)))
    with tempfile.TemporaryDirectory() as scratch:
        found = alone(memory_job, folder, Path(scratch), tokens)
    return found | {"formula": terms, "ratio": found["bytes"] / sum(terms.values()), "tokens": sum(map(len, tokens)),
                    "parameters": sum(p.numel() for p in Source.from_folder(folder).model.parameters())}


def memory_job(folder: Path, scratch: Path, tokens) -> dict:
    quantize_to(scratch / "first", BUNDLED, Gptq(**PLAIN), tokens[:1])  # what libraries take at their first call
    before, _ = held(), forget_most()
    outcome = quantize_to(scratch / "out", folder, Gptq(**PLAIN), tokens)
    return {"bytes": most_held() - before, "linears": len(outcome.notes)}


def main(repeats: int) -> None:
    torch.manual_seed(0)
    _, tokenizer = load()
    tokens = windows(calibration(tokenizer, CALIBRATION["name"]), CALIBRATION["length"], CALIBRATION["count"])
    with tempfile.TemporaryDirectory() as scratch:
        sizes = {"bundled, 3.8 M": BUNDLED, "random, 39 M": random_model(LARGER, Path(scratch) / "larger")}
        found = {"threads": torch.get_num_threads(), "nf4": nf4(), "gptq": gptq_solve(sizes, tokens),
                 "awq": awq_search(sizes, tokens), "sweep": sweep_of_twelve(BUNDLED, tokens),
                 "passes": passes(sizes, tokens),
                 "end to end": end_to_end(sizes, tokens[:32], [t[:128] for t in tokens[:8]], repeats),
                 "memory": peak_memory(random_model(HALF_A_BILLION, Path(scratch) / "half"), tokens[:8])}
    print(save(Record("bench", found, command="make bench", seed=0, model_sha256=folder_hash(BUNDLED))))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=3, help="of the runs of whole models")
    main(parser.parse_args().repeats)
