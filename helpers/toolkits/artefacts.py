"""The quantized artefacts of a model, one name each: committed for the bundled model, built once for any other.

`python -m helpers.toolkits.artefacts` builds all that are missing (make artefacts).
"""

import argparse
import contextlib
import io
import json
import shutil
import sys
import warnings
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from tqdm import tqdm
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GPTQConfig, PretrainedConfig

from helpers.files import PROVENANCE, REPORT, folder_hash, key_hash
from helpers.methods.awq import Awq
from helpers.methods.gptq import PLAIN, Gptq
from helpers.methods.int8 import RowInt8
from helpers.methods.nf4 import Nf4
from helpers.models.layers import common_group
from helpers.models.method import Method
from helpers.models.reading import check_hashes
from helpers.models.source import BUNDLED, DATA, ModelUnavailable, resolve
from helpers.models.texts import calibration, context_of, windows
from helpers.results import Record, read, save, versions
from helpers.toolkits.bitsandbytes import usable
from helpers.toolkits.process import ROOT, Job, ToolkitFailed, ToolkitMissing, run

COMMITTED = DATA / "artefacts"
CACHE = ROOT / ".cache" / "artefacts"
EXAMPLE_3 = "article_example_3"
CALIBRATION = {"name": "instructions", "length": 256, "count": 128}
MOST = CALIBRATION["count"]


@dataclass(frozen=True)
class Artefact:
    """One toolkit's output for one method: `plan` is ours that comes nearest, and whose file has the same size."""

    toolkit: str
    method: str
    plan: Method
    originals: bool = False
    packages: tuple[str, ...] = ()  # that decide the bits, beside results.PACKAGES

    def with_group(self, size: int) -> Method:
        """The plan with this group size, if it has groups."""
        return replace(self.plan, group_size=size) if hasattr(self.plan, "group_size") else self.plan


ARTEFACTS = {
    "bitsandbytes-nf4": Artefact("bitsandbytes", "nf4", Nf4()),
    "bitsandbytes-int8": Artefact("bitsandbytes", "int8", RowInt8()),
    "gptqmodel-gptq": Artefact("gptqmodel", "gptq", Gptq(**PLAIN)),
    "gptqmodel-awq": Artefact("gptqmodel", "awq", Awq()),
    "autogptq-gptq": Artefact("autogptq", "gptq", Gptq(**PLAIN), originals=True),
    "autoawq-awq": Artefact("autoawq", "awq", Awq(), originals=True),
    "autoround-gptq": Artefact("autoround", "autoround", Gptq(**PLAIN), packages=("auto-round",)),
}


def plan_of(name: str, config: PretrainedConfig) -> Method:
    """What a toolkit is asked for on a model of this config: its method, in the largest groups that fill all rows."""
    with torch.device("meta"):
        return ARTEFACTS[name].with_group(common_group(AutoModelForCausalLM.from_config(config)))


def _job(name: str, model: str, revision: str | None, count: int) -> Job:
    source, spec = resolve(model, revision), ARTEFACTS[name]
    if not spec.plan.keeps:
        return Job(spec.method, str(source), calibrated=False)
    tokenizer, config = AutoTokenizer.from_pretrained(source), AutoConfig.from_pretrained(source)
    length = min(CALIBRATION["length"], context_of(tokenizer, config))
    tokens = windows(calibration(tokenizer, CALIBRATION["name"]), length, count)
    return Job(spec.method, str(source), tokens, {"group_size": plan_of(name, config).group_size})


def _key(name: str, job: Job) -> str:
    """What decides the bits of an artefact: weights, tokens, settings, versions and the CPU's instruction set."""
    return key_hash([name, folder_hash(Path(job.source)), job.method, [list(t) for t in job.tokens], job.settings,
                     versions(*ARTEFACTS[name].packages), torch.backends.cpu.get_cpu_capability()])


def place(name: str, model: str = "bundled", rebuild: bool = False, revision: str | None = None, count: int = MOST) -> Path:
    """Where an artefact is, or will be: for the bundled model the committed one, unless `rebuild`; else in the cache.

    `count`: the windows that it is calibrated on, at most.
    """
    if model == "bundled" and not rebuild and (COMMITTED / name).is_dir():
        return COMMITTED / name
    return CACHE / f"{name}-{_key(name, _job(name, model, revision, count))}"


def artefact(name: str, model: str = "bundled", rebuild: bool = False, revision: str | None = None, count: int = MOST) -> Path:
    """The folder of an artefact, built now if it is not there (seconds to minutes). Raises KeyError for an unknown name, and
    what `run` raises."""
    if not (out := place(name, model, rebuild, revision, count)).is_dir():
        spec = ARTEFACTS[name]
        run(spec.toolkit, _job(name, model, revision, count), out, originals=spec.originals)
    return out


def available(names: Iterable[str], *which, **of) -> dict[str, Path]:
    """{name: folder} of those artefacts (`artefact`'s arguments) that can be had; what is missing is said, with the reason:
    a toolkit that is not installed, or that does not know the model."""
    found = {}
    for name in tqdm(list(names), "toolkits", leave=False, delay=5):  # minutes each for a model that is not tiny
        try:
            found[name] = artefact(name, *which, **of)
        except (ToolkitMissing, ToolkitFailed) as error:
            first, *log = [line.strip() for line in str(error).splitlines() if line.strip(" ^~")]
            print(f"{name}: {first} {' '.join(log[-2:])}")
    return found


def reload(folder: Path, device: str = "cpu", **options):
    """The quantized model of an artefact, loaded by transformers, which calls the toolkit it needs.

    On a CPU GPTQ and AWQ are computed in fp32, GPTQ by the kernel that stays within 0.001 of exact dequantization (the one
    for AWQ takes a minute where the automatic choice takes two seconds); `options` go to `from_pretrained` and win. What the
    toolkits print while they load is kept back. Raises ModelUnavailable.
    """
    try:
        check_hashes(folder)
        settings = json.loads((folder / "config.json").read_text())["quantization_config"]
        exact = {"gptq": lambda: {"quantization_config": GPTQConfig(bits=settings["bits"], backend="gptq_torch")},
                 "awq": dict, "bitsandbytes": dict}[settings["quant_method"]]()
    except (OSError, KeyError, TypeError, json.JSONDecodeError) as error:
        raise ModelUnavailable(f"{folder} is not a quantized model: {error}") from error
    if device == "cpu" and settings["quant_method"] != "bitsandbytes":
        options = exact | {"dtype": torch.float32} | options
        # GPTQModel compiles its kernels for each new length of input: minutes, for a model that runs in milliseconds
        torch.compiler.set_stance("force_eager")
    try:
        with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return usable(AutoModelForCausalLM.from_pretrained(folder, device_map=device, **options).eval())
    except Exception as error:  # each toolkit raises its own kinds
        raise ModelUnavailable(f"{folder} could not be loaded by transformers: {error}") from error


def report(folder: Path) -> dict:
    """What the toolkit's process reported: seconds, settings, tokens, machine and versions."""
    return json.loads((folder / REPORT).read_text())


def build_seconds(folder: Path) -> float | None:
    """How long quantizing took, as the toolkit's report or our own provenance has it; None where nobody noted it."""
    for name, keys in ((REPORT, ("quantize_seconds", "seconds")), (PROVENANCE, ("seconds",))):
        if (folder / name).is_file():
            noted = json.loads((folder / name).read_text())
            return next((noted[k] for k in keys if k in noted), None)
    return None


def example_3(rebuild: bool = False) -> dict[str, str]:
    """What came of each call of the article's third code example (helpers/toolkits/article.py): the committed record, or
    with `rebuild` a run now, half a minute. Raises what `run` raises."""
    if not rebuild:
        return read(EXAMPLE_3).data["steps"]
    return run("article", Job("example", str(BUNDLED), calibrated=False), CACHE / EXAMPLE_3, originals=True)["steps"]


def build(names: Iterable[str], model: str, commit: bool) -> None:
    """Build these artefacts into the cache; with `commit`, copy those of the bundled model to data/artefacts."""
    missing = []
    for name in (bar := tqdm(list(names))):
        bar.set_description(name)
        try:
            built = artefact(name, model, rebuild=True)
        except (ToolkitMissing, ToolkitFailed) as error:
            missing.append(f"{name}: {error}")
            continue
        if commit and name != "bitsandbytes-int8":  # twice the size, and seconds to make
            shutil.rmtree(COMMITTED / name, ignore_errors=True)
            # the tokenizer is in data/model
            shutil.copytree(built, COMMITTED / name, ignore=shutil.ignore_patterns("tokenizer*", "chat_template*", "*.csv"))
    if commit and not missing and len(bar) == len(ARTEFACTS):
        save(Record(EXAMPLE_3, {"steps": example_3(rebuild=True)}, model_sha256=folder_hash(BUNDLED)))
    for line in missing:
        print(line, file=sys.stderr)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(ARTEFACTS)} (all)")
    parser.add_argument("--model", default="bundled")
    parser.add_argument("--commit", action="store_true", help=f"replace {COMMITTED.relative_to(ROOT)} (make refresh)")
    args = parser.parse_args()
    if unknown := set(args.names) - set(ARTEFACTS):
        parser.error(f"no artefact is called {', '.join(sorted(unknown))}; there are {', '.join(ARTEFACTS)}")
    if args.commit and resolve(args.model) != BUNDLED:
        parser.error("--commit is for the bundled model alone")
    build(args.names or ARTEFACTS, args.model, args.commit)
