"""What is to be compared, by name: a method, a method with settings, a toolkit's artefact, a folder."""

import json
import shutil
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import fields
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM

import helpers.methods  # noqa: F401  (makes all methods known)
from helpers.files import code_hash, key_hash, put_in_place
from helpers.harness.allocate import read_plan
from helpers.harness.variants import Folder, Original, OurArtefact, ToolkitArtefact, Variant
from helpers.models.checkpoint import format_for, quantize_to
from helpers.models.layers import common_group
from helpers.models.method import Format, Method, Plan, PlanError
from helpers.models.source import BUNDLED, DATA, ModelUnavailable
from helpers.results import versions
from helpers.toolkits.artefacts import ARTEFACTS, CACHE

HELPERS = Path(__file__).resolve().parents[1]
DEFAULT = ("int8", "nf4", "gptq", "awq", "awq+gptq", "autoround")
# a method alone is, of the bundled model, what today's toolkit makes of it; of any other our own. They have the same bits, but
# for gptq: ours searches its scales and takes the group-aware order, GPTQModel's file is made with neither
TOOLKIT = {"int8": "bitsandbytes-int8", "nf4": "bitsandbytes-nf4", "gptq": "gptqmodel-gptq", "awq": "gptqmodel-awq",
           "autoround": "autoround-gptq"}
# rounding on these grids makes files of the same shapes; random weights need no more
SHAPED = {"gptq": "sym=true", "awq": "sym=false", "awq+gptq": "sym=false"}
WORDS = {bool: "true or false", int: "a whole number", float: "a number"}


class UnknownMethod(ValueError):
    """Something to compare that is no method, no artefact and no folder, or a method's setting that it does not have."""


def named(names: Sequence[str], full: Original, tokens: Sequence[Sequence[int]], rebuild: bool = False,
          shapes: bool = False, progress: bool = True, device: str = "cpu") -> list[Variant]:
    """The variants of these names. Files of ours are made now if they have not been (`tokens` calibrate them), those of the
    toolkits when they are first asked for. `shapes`: the weights are random, so only the files' shapes count. `device` computes
    ours.

    Raises UnknownMethod, and what `quantize_to` raises.
    """
    if twice := [n for n in names if list(names).count(n) > 1]:
        raise UnknownMethod(f"methods: {twice[0]!r} is there twice")

    def make(plan: Plan) -> Path:
        return ours(full, plan, format_for(plan), tokens, progress, device)

    found = [_one(name, full, make, rebuild, shapes) for name in names]
    called = [full.name, *(v.name for v in found)]
    if twice := [n for n in called if called.count(n) > 1]:
        raise UnknownMethod(f"methods: two variants are called {twice[0]!r}: rename one of them")
    return found


def located(names: Sequence[str]) -> list[str]:
    """The same names, folders and plans with their full paths, which mean the same wherever they are read."""
    return [n if _known(n) or not Path(n).expanduser().exists() else str(Path(n).expanduser().resolve()) for n in names]


def _known(name: str) -> bool:
    return name in ARTEFACTS or name in DEFAULT or name.partition(":")[0] in Method.known


def _one(name: str, full: Original, make: Callable[[Plan], Path], rebuild: bool, shapes: bool) -> Variant:
    kind, _, settings = name.partition(":")
    if name in ARTEFACTS or name == "autoround" or (full.folder == BUNDLED and name in TOOLKIT):
        return ToolkitArtefact(TOOLKIT.get(name, name), full.model, full.revision, rebuild, True, name)
    if not _known(name) and (folder := Path(name).expanduser().resolve() / "config.json").is_file():
        return Folder(folder.parent.name, folder.parent, True)
    if name.endswith(".json") and Path(name).expanduser().is_file():
        plan = read_plan(Path(name).expanduser(), full.folder)
        return OurArtefact(Path(name).stem, make(plan), plan, True)
    if kind not in Method.known or Method.known[kind].reference:
        known = sorted(n for n, m in Method.known.items() if not m.reference)
        raise UnknownMethod(f"methods: {name!r} is no method ({', '.join(known)}, autoround), no artefact "
                            f"({', '.join(ARTEFACTS)}), no folder with a config.json and no plan.json")
    if shapes and kind in SHAPED and not settings:
        kind, settings = "rtn", SHAPED[kind]
    plan = Plan(_method(kind, settings, full))
    return OurArtefact(name, make(plan), plan, True)


def _method(kind: str, settings: str, full: Original) -> Method:
    known, chosen = {f.name: f.default for f in fields(Method.known[kind])}, {}
    for part in filter(None, settings.split(",")):
        name, _, value = part.partition("=")
        if name not in known or not value:
            raise UnknownMethod(f"methods: {kind}: {part!r}: expected setting=value, of {', '.join(sorted(known))}")
        try:
            given = json.loads(value.lower())
        except json.JSONDecodeError:
            given = None
        kinds = (int, float) if isinstance(known[name], float) else (type(known[name]),)
        if type(given) not in kinds or name in chosen:
            raise UnknownMethod(f"methods: {kind}: {name}: {value!r}: expected {WORDS[kinds[-1]]}, once")
        chosen[name] = given
    if "group_size" in known and "group_size" not in chosen:
        with torch.device("meta"):
            chosen["group_size"] = common_group(AutoModelForCausalLM.from_config(full.config))
    try:
        return Method.known[kind](**chosen)
    except PlanError as error:
        raise UnknownMethod(f"methods: {kind}: {error}") from error


def ours(full: Original, plan: Plan, form: Format, tokens: Sequence[Sequence[int]], progress: bool = True,
         device: str = "cpu") -> Path:
    """The folder of a file that we make, in the cache, made now if it is not there. Raises what `quantize_to` raises."""
    calibrated = any(m.keeps for m in plan.methods())
    key = key_hash([full.key(), plan.key(), form.name, [list(t) for t in tokens] if calibrated else [], versions(), device,
                    code_hash(*(HELPERS / room for room in ("quantizers", "methods", "models")))])
    out = CACHE / f"ours-{plan.default.name.replace('+', '-')}-{key}"
    if not out.is_dir():
        quantize_to(out, full.folder, plan, tokens if calibrated else (), form, progress, device, revision=full.revision)
    return out


def random_weights(config: Path) -> Path:
    """A folder with random weights in the shapes of a config.json and the bundled tokenizer, in the cache: latency and memory
    need no more. Made now if it is not there. Raises ModelUnavailable."""
    try:
        said, settings = json.loads(config.read_text(encoding="utf-8")), AutoConfig.from_pretrained(config)
    except (OSError, ValueError, KeyError) as error:
        raise ModelUnavailable(f"{config} is no model's config.json: {error}") from error
    out = CACHE / f"random-{key_hash([said, versions()])}"
    if not out.is_dir():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(settings, dtype=torch.float16)
        out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=out.parent) as temporary:
            model.save_pretrained(Path(temporary) / "model", max_shard_size="4GB")
            for path in (DATA / "model").glob("*token*"):
                shutil.copy(path, Path(temporary) / "model")
            put_in_place(Path(temporary) / "model", out)
    return out
