"""Bits for each linear of the bundled model as two peers choose them: `make peers`, some eight minutes on one core.

AutoRound's AutoScheme, and NVIDIA ModelOpt's auto_quantize with both of its scores, at several average bits, from 2, 3, 4 and 8
by plain rounding. Each choice is made in a process of its own, and goes to data/results/peers.json as soon as it is there,
beside the scores it was made by: a run that was stopped goes on where it was, and one that is there is not made again unless
the weights or the peer's version are others (after a change of the settings here, delete the file).

Bits are those of the file: AutoScheme adds to each weight's code its share of a 16-bit scale and of a zero point of as many
bits as the code. ModelOpt counts the codes alone if it isn't told, so its formats say the same. It also counts an output head
that it is told to leave alone, with 16 bits, unless its cost leaves it out too.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from importlib.metadata import version
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer

from helpers.files import folder_hash
from helpers.models.source import BUNDLED
from helpers.models.texts import calibration, windows
from helpers.results import RESULTS, BadRecord, Record, read, save, versions, versions_in
from helpers.toolkits.process import ROOT, ToolkitFailed, ToolkitMissing

OVERLAY = ROOT / ".venv-peers"  # `make peers`: ModelOpt, over the main environment
BUDGETS = (3.25, 3.5, 3.75, 4.0)
CALIBRATION = {"name": "instructions", "count": 64, "length": 128, "batch": 8}
GROUPS = {"auto-round": {2: 64, 3: 128, 4: 128, 8: 128}, "nvidia-modelopt": {2: 128, 3: 128, 4: 128, 8: 128}}
METHODS = {"auto-round": ("DeltaLoss",), "nvidia-modelopt": ("gradient", "kl_div")}
Choice = dict[str, Any]  # what a peer chose, how, and by which scores


def bits_in_file(bits: int, group_size: int) -> float:
    """Bits of a weight with its share of a 16-bit scale and of a zero point of as many bits as a code."""
    return bits + (16 + bits) / group_size


def shown(begun: str, settings: Mapping[str, Any]) -> str:
    """The text of a call, of which `begun` is the beginning."""
    return begun + "".join(f", {name}={getattr(value, '__name__', repr(value))}" for name, value in settings.items()) + ")"


def auto_round(method: str, budget: float) -> Choice:
    """AutoScheme's choice. Linears may differ as they like, q, k and v too."""
    from auto_round import AutoRound, AutoScheme
    from auto_round.auto_scheme.utils import compute_avg_bits_for_model

    tokenizer, count, length = AutoTokenizer.from_pretrained(BUNDLED), CALIBRATION["count"], CALIBRATION["length"]
    stream = [t for sequence in calibration(tokenizer, CALIBRATION["name"]) for t in sequence]
    # it takes text, leaves out what is shorter than a window and cuts what is longer
    texts = [tokenizer.decode(stream[i * length:(i + 1) * length + 16]) for i in range(count)]
    assert [tuple(tokenizer(t.rstrip()).input_ids[:length]) for t in texts] == windows([stream], length, count)
    path = Path("texts.jsonl")
    path.write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
    # the group size is not to be given beside the scheme: it would be that of all options
    scheme = AutoScheme(budget, ["W2A16G64", "W3A16", "W4A16", "W8A16"], method=method, nsamples=count, seqlen=length,
                        batch_size=CALIBRATION["batch"], device_map="cpu")
    settings = {"scheme": scheme, "iters": 0, "dataset": str(path), "nsamples": count, "seqlen": length,
                "enable_torch_compile": False, "device_map": "cpu"}
    call = shown("AutoRound('data/model'", settings) + ".post_init()"
    started = time.perf_counter()
    rounder = AutoRound(str(BUNDLED), **settings)
    rounder.post_init()  # chooses, and rounds nothing
    seconds = time.perf_counter() - started
    scores: dict[str, dict[int, float]] = {}
    for bits, file in zip((2, 3, 4, 8), sorted(Path.cwd().glob("scheme_*.json")), strict=True):
        for name, (_, loss) in json.loads(file.read_text())["layer_scores"].items():
            scores.setdefault(name, {})[bits] = loss
    model = rounder.model_context.model
    return {"linears": {name: {"bits": c["bits"], "group_size": c["group_size"]} for name, c in rounder.layer_config.items()},
            "seconds": seconds, "bits": compute_avg_bits_for_model(model)[0], "satisfied": True, "call": call,  # or it raises
            "dtype": str(model.dtype), "scores": [{"linears": [name], "scores": s} for name, s in sorted(scores.items())]}


def logits(model: torch.nn.Module, batch: Tensor) -> Tensor:
    return model(batch).logits


def next_token_loss(logits: Tensor, batch: Tensor) -> Tensor:
    return torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), batch[:, 1:].flatten())


def modelopt(method: str, budget: float) -> Choice:
    """ModelOpt's choice. q, k and v get the same, and so do gate and up."""
    import modelopt.torch.quantization as mtq

    tokenizer = AutoTokenizer.from_pretrained(BUNDLED)
    pool = windows(calibration(tokenizer, CALIBRATION["name"]), CALIBRATION["length"], CALIBRATION["count"])
    batches, groups = torch.tensor(pool).split(CALIBRATION["batch"]), GROUPS["nvidia-modelopt"]
    formats = [{"quant_cfg": [{"quantizer_name": "*", "enable": False},
                              {"quantizer_name": "*weight_quantizer", "cfg": {"num_bits": b, "block_sizes": {-1: g}}}],
                "algorithm": "max", "effective_bits": bits_in_file(b, g)} for b, g in groups.items()]
    settings = {"constraints": {"effective_bits": budget, "cost": {"excluded_module_name_patterns": ["*lm_head*"]}},
                "quantization_formats": formats, "forward_step": logits, "loss_func": next_token_loss, "method": method,
                "disabled_layers": ["*lm_head*", "*embed*"], "num_calib_steps": len(batches), "num_score_steps": len(batches)}
    model = AutoModelForCausalLM.from_pretrained(BUNDLED, dtype=torch.float32)
    started = time.perf_counter()
    _, state = mtq.auto_quantize(model, data_loader=batches, **settings)
    seconds = time.perf_counter() - started
    best, inside = state["best"], {n: s for n, s in state["candidate_stats"].items() if len(s["formats"]) > 1}  # not the head
    chosen = {name: best["recipe"][n].num_bits for n, s in inside.items() for name in s["module_names"]}
    return {"linears": {name: {"bits": b, "group_size": groups.get(b)} for name, b in chosen.items()}, "seconds": seconds,
            "bits": best["constraints"]["effective_bits"], "satisfied": best["is_satisfied"],
            "call": shown("auto_quantize(model, data_loader=batches", settings),
            "dtype": str(model.dtype), "scores": [{"linears": s["module_names"], "scores": {
                f.num_bits: x for f, x in zip(s["formats"], s["scores"], strict=True)}} for s in inside.values()]}


def in_own_process(peer: str, method: str, budget: float) -> Choice:
    """A peer's choice from a new process; raises ToolkitMissing and ToolkitFailed."""
    if peer == "nvidia-modelopt" and not (OVERLAY / "modelopt").is_dir():
        raise ToolkitMissing("nvidia-modelopt is not installed: run `make peers`")
    with tempfile.TemporaryDirectory() as folder:
        # AutoScheme keeps scores by the name of the model's folder and not by its weights: none from elsewhere
        env = os.environ | {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1",
                            "AR_AUTO_SCHEME_CACHE": folder, "HF_DATASETS_CACHE": folder,
                            "PYTHONPATH": os.pathsep.join([str(OVERLAY)] * (peer == "nvidia-modelopt") + [str(ROOT)])}
        done = subprocess.run([sys.executable, "-m", "benchmarks.peers", peer, method, str(budget)], env=env, cwd=folder,
                              stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
        if not (out := Path(folder) / "choice.json").is_file():
            raise ToolkitFailed(f"{peer} ({method}) ended with exit status {done.returncode}:\n{done.stdout[-2000:]}")
        return json.loads(out.read_text())


def main(make: Callable[[str, str, float], Choice] = in_own_process, folder: Path = RESULTS) -> None:
    weights = folder_hash(BUNDLED)
    found = {"auto-round": version("auto-round"), **versions_in(OVERLAY)}
    data: dict[str, Any] = {"calibration": CALIBRATION, "scores": {}, "choices": {}}
    with suppress(BadRecord):  # none yet
        earlier = read("peers", folder)
        data = earlier.data if earlier.model_sha256 == weights else data
    for peer, method, budget in tqdm([(p, m, b) for p in METHODS for m, b in product(METHODS[p], BUDGETS)]):
        row = data["choices"].setdefault(f"{peer}, {method}", {})
        if (there := row.get(f"{budget:g}")) and there["version"] == found.get(peer):
            continue
        choice = make(peer, method, budget)
        data["scores"][f"{peer}, {method}"] = choice.pop("scores")  # they do not depend on the budget
        row[f"{budget:g}"] = {"version": found.get(peer), **choice}
        save(Record("peers", data, command="make peers", model_sha256=weights,
                    versions=versions("auto-round", "accelerate", "datasets") | versions_in(OVERLAY)), folder)


if __name__ == "__main__":
    if len(sys.argv) > 1:
        peer, method, budget = sys.argv[1:]
        choice = {"auto-round": auto_round, "nvidia-modelopt": modelopt}[peer](method, float(budget))
        Path("choice.json").write_text(json.dumps(choice))
    else:
        main()
