"""A quantized file in another format: the same codes on the same grid, nothing is rounded again."""

import json
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path

from safetensors.torch import save_file

from helpers.files import PROVENANCE, check_replaceable, folder_hash, hashes, put_in_place
from helpers.methods.gptq import Gptq
from helpers.models.formats import FormatError
from helpers.models.layers import linears
from helpers.models.method import Format, Plan
from helpers.models.reading import read_artefact
from helpers.models.source import shell
from helpers.quantizers.affine import Quantized


def repack(source: Path, out: Path, form: Format) -> None:
    """The artefact in folder `source`, written to folder `out` in another format for uniform grids (gptq, gptq_v2, awq).

    Raises BadCheckpoint if `source` is no whole artefact, FormatError if the format cannot hold what is in it (AWQ: 4 bits,
    neighbouring columns in a group), FileExistsError if `out` has something else in it; an earlier artefact is replaced.
    """
    artefact = read_artefact(source)
    check_replaceable(out, PROVENANCE)
    tensors = dict(artefact.others)
    for name, q in artefact.linears.items():
        if not isinstance(q, Quantized):
            raise FormatError(f"{name}: {artefact.form.name} is no uniform grid: quantize the 16-bit model again")
        try:
            tensors |= {f"{name}.{end}": t.contiguous() for end, t in form.pack(q).items()}
        except ValueError as error:
            raise FormatError(f"{name} does not fit the {form.name} format: {error}") from error
    plan = Plan(_settings(source, list(artefact.linears.values())))
    left = [n for n, _ in linears(shell(source)) if n not in artefact.linears]
    config = json.loads((source / "config.json").read_text())
    config["quantization_config"] = form.settings(plan, left, list(artefact.linears))
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent) as temporary:
        folder = Path(temporary) / "artefact"
        folder.mkdir()
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
        (folder / "config.json").write_text(json.dumps(config, indent=1))
        for path in source.glob("*token*"):
            shutil.copy(path, folder)
        (folder / PROVENANCE).write_text(json.dumps({
            "plan": plan.key(), "format": form.name, "repacked_from": folder_hash(source), "sha256": hashes(folder)}, indent=1))
        put_in_place(folder, out)


def _settings(source: Path, linears: Sequence[Quantized]) -> Gptq:
    """What the codes of all linears have in common. Raises FormatError if they differ in width or group size."""
    bits, groups = {q.bits for q in linears}, {q.codes.shape[1] // q.grid.scale.shape[1] for q in linears}
    if all(q.grid.scale.shape[1] == 1 for q in linears):
        groups = {-1}
    if len(bits) > 1 or len(groups) > 1:
        raise FormatError(f"{source}: expected one width and one group size, found bits {sorted(bits)} and groups "
                          f"{sorted(groups)}: quantize the 16-bit model again")
    return Gptq(bits.pop(), groups.pop(), desc_act=any(bool((q.g_idx.diff() < 0).any()) for q in linears),
                sym=all(bool((q.grid.zero_point == 2 ** (q.bits - 1)).all()) for q in linears))
