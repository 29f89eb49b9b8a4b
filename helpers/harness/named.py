"""What is to be compared, by name: a method, a method with settings, a toolkit's artefact, a folder."""

import json
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM

import helpers.methods  # noqa: F401  (makes all methods known)
from helpers.files import code_hash, key_hash, put_in_place
from helpers.harness.variants import Folder, Original, OurArtefact, ToolkitArtefact, Variant
from helpers.methods.rtn import Rtn
from helpers.models.checkpoint import format_for, quantize_to
from helpers.models.formats import AWQ, GPTQ
from helpers.models.layers import common_group
from helpers.models.method import Format, Method, Plan
from helpers.models.source import BUNDLED, DATA
from helpers.results import versions
from helpers.toolkits.artefacts import ARTEFACTS, CACHE

HELPERS = Path(__file__).resolve().parents[1]
DEFAULT = ("int8", "nf4", "gptq", "awq", "autoround")
# a method alone is, of the bundled model, what today's toolkit makes of it; of any other our own, which has the same bits
TOOLKIT = {"int8": "bitsandbytes-int8", "nf4": "bitsandbytes-nf4", "gptq": "gptqmodel-gptq", "awq": "gptqmodel-awq",
           "autoround": "autoround-gptq"}
# the files of these methods have these shapes; random weights need no more
SHAPED = {"gptq": (Rtn(), GPTQ), "awq": (Rtn(sym=False), AWQ)}


class UnknownMethod(ValueError):
    """Something to compare that is no method, no artefact and no folder, or a method's setting that it does not have."""


def named(names: Sequence[str], full: Original, tokens: Sequence[Sequence[int]], rebuild: bool = False,
          shapes: bool = False) -> list[Variant]:
    """The variants of these names. Files of ours are made now if they have not been (`tokens` calibrate them), those of the
    toolkits when they are first asked for. `shapes`: the weights are random, so only the files' shapes count.

    Raises UnknownMethod, and what `quantize_to` raises.
    """
    if twice := [n for n in names if list(names).count(n) > 1]:
        raise UnknownMethod(f"methods: {twice[0]!r} is there twice")
    return [_one(name, full, tokens, rebuild, shapes) for name in names]


def _one(name: str, full: Original, tokens: Sequence[Sequence[int]], rebuild: bool, shapes: bool) -> Variant:
    kind, _, settings = name.partition(":")
    if name in ARTEFACTS or name == "autoround" or (full.folder == BUNDLED and name in TOOLKIT):
        return ToolkitArtefact(TOOLKIT.get(name, name), full.model, full.revision, rebuild, True, name)
    if (Path(name) / "config.json").is_file():
        return Folder(Path(name).name, Path(name), True)
    if kind not in Method.known or Method.known[kind].reference:
        ours = sorted(n for n, m in Method.known.items() if not m.reference)
        raise UnknownMethod(f"methods: {name!r} is no method ({', '.join(ours)}, autoround), no artefact "
                            f"({', '.join(ARTEFACTS)}) and no folder with a config.json")
    if shapes and kind in SHAPED and not settings:
        plan, form = Plan(SHAPED[kind][0]), SHAPED[kind][1]
    else:
        plan = Plan(_method(kind, settings, full))
        form = format_for(plan)
    return OurArtefact(name, ours(full, plan, form, tokens), plan, True)


def _method(kind: str, settings: str, full: Original) -> Method:
    known, chosen = {f.name for f in fields(Method.known[kind])}, {}
    for part in filter(None, settings.split(",")):
        name, _, value = part.partition("=")
        if name not in known or not value:
            raise UnknownMethod(f"methods: {kind}: {part!r}: expected setting=value, of {', '.join(sorted(known))}")
        try:
            chosen[name] = json.loads(value.lower())
        except json.JSONDecodeError as error:
            raise UnknownMethod(f"methods: {kind}: {name}: {value!r}: expected a number, true or false") from error
    if "group_size" in known - set(chosen):
        with torch.device("meta"):
            chosen["group_size"] = common_group(AutoModelForCausalLM.from_config(full.config))
    return Method.known[kind](**chosen)


def ours(full: Original, plan: Plan, form: Format, tokens: Sequence[Sequence[int]]) -> Path:
    """The folder of a file that we make, in the cache, made now if it is not there. Raises what `quantize_to` raises."""
    calibrated = any(m.keeps for m in plan.methods())
    key = key_hash([full.key(), plan.key(), form.name, [list(t) for t in tokens] if calibrated else [], versions(),
                    code_hash(*(HELPERS / room for room in ("quantizers", "methods", "models")))])
    out = CACHE / f"ours-{plan.default.name.replace('+', '-')}-{key}"
    if not out.is_dir():
        quantize_to(out, full.folder, plan, tokens if calibrated else (), form, progress=True, revision=full.revision)
    return out


def random_weights(config: Path) -> Path:
    """A folder with random weights in the shapes of a config.json and the bundled tokenizer, in the cache: latency and memory
    need no more. Made now if it is not there."""
    out = CACHE / f"random-{key_hash([json.loads(config.read_text()), versions()])}"
    if not out.is_dir():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(config), dtype=torch.float16)
        with tempfile.TemporaryDirectory(dir=_made(out.parent)) as temporary:
            model.save_pretrained(Path(temporary) / "model", max_shard_size="4GB")
            for path in (DATA / "model").glob("*token*"):
                shutil.copy(path, Path(temporary) / "model")
            put_in_place(Path(temporary) / "model", out)
    return out


def _made(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return folder
