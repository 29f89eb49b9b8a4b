"""Reading an artefact trusts nothing: what was changed since it was written is a typed error, never a model."""

import json
import random
import shutil
from collections import Counter
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from helpers.files import REPORT, hashes
from helpers.models.checkpoint import quantize_to
from helpers.models.reading import BadCheckpoint, load_simulated, read_artefact
from helpers.models.source import BUNDLED, ModelUnavailable
from helpers.toolkits.artefacts import COMMITTED, reload

NAMES = sorted(p.name for p in COMMITTED.iterdir() if p.is_dir())
WEIGHTS = "model.safetensors"


def rewrite(folder: Path, change) -> None:
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS, {"format": "pt"})


def flip(folder: Path, draw: random.Random, low: int, high: int) -> None:
    content = bytearray((folder / WEIGHTS).read_bytes())
    content[draw.randrange(low, min(high, len(content)))] ^= 1 << draw.randrange(8)
    (folder / WEIGHTS).write_bytes(content)


def header_end(folder: Path) -> int:
    return 8 + int.from_bytes((folder / WEIGHTS).read_bytes()[:8], "little")


def a_bit_of_the_data(folder, draw):
    flip(folder, draw, header_end(folder), 10**9)


def a_bit_of_the_header(folder, draw):
    flip(folder, draw, 0, header_end(folder))


def cut_short(folder, draw):
    content = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(content[:draw.randrange(len(content))])


def a_tensor_dropped(folder, draw):
    # g_idx, without desc_act, and auto-gptq's biases of zeros say nothing that is not known without them
    rewrite(folder, lambda t: t.pop(draw.choice(sorted(n for n in t if not n.endswith(("g_idx", "bias"))))))


def a_tensor_cut(folder, draw):
    def change(t):
        name = draw.choice(sorted(n for n in t if t[n].ndim and len(t[n]) > 1))
        t[name] = t[name][:-1].clone()
    rewrite(folder, change)


def a_value_that_is_not_finite(folder, draw):
    def change(t):
        name = draw.choice(sorted(n for n in t if t[n].is_floating_point()))
        t[name].view(-1)[draw.randrange(t[name].numel())] = draw.choice([float("nan"), float("inf"), -float("inf")])
    rewrite(folder, change)


def another_type(folder, draw):
    def change(t):
        name = draw.choice(sorted(n for n in t if not t[n].is_floating_point()))
        t[name] = t[name].to(torch.int64)
    rewrite(folder, change)


def a_group_out_of_range(folder, draw):
    def change(t):
        names = sorted(n for n in t if n.endswith("g_idx")) or sorted(n for n in t if "nested_absmax" in n or "scales" in n)
        t[draw.choice(names)].view(-1)[0] = draw.choice([-1, 99]) if names[0].endswith("g_idx") else float("nan")
    rewrite(folder, change)


def a_tensor_more(folder, draw):
    rewrite(folder, lambda t: t.update({draw.choice(["model.layers.9.x", "lm_head.qweight"]): torch.ones(4)}))


def a_field_of_the_config(folder, draw):
    config = json.loads((folder / "config.json").read_text())
    inside = config["quantization_config"] if draw.random() < 0.6 else config
    key = draw.choice(sorted(k for k in inside if k != "quantization_config"))
    value = inside[key]
    inside[key] = (not value if isinstance(value, bool) else value + draw.choice([-1, 1, 64]) if isinstance(value, int | float)
                   else draw.choice(["other", None, 3]))
    (folder / "config.json").write_text(json.dumps(config))


def a_field_less(folder, draw):
    config = json.loads((folder / "config.json").read_text())
    inside = config["quantization_config"] if draw.random() < 0.6 else config
    inside.pop(draw.choice(sorted(inside)))
    (folder / "config.json").write_text(json.dumps(config))


MUTATIONS = [a_bit_of_the_data, a_bit_of_the_header, cut_short, a_tensor_dropped, a_tensor_cut, a_value_that_is_not_finite,
             another_type, a_group_out_of_range, a_tensor_more, a_field_of_the_config, a_field_less]
BY_STRUCTURE = {cut_short, a_tensor_dropped, a_tensor_cut, a_value_that_is_not_finite, another_type, a_group_out_of_range,
                a_tensor_more}


def mutated(tmp_path: Path, name: str, mutation, seed: int) -> Path:
    shutil.copytree(COMMITTED / name, tmp_path / "a", dirs_exist_ok=True)
    before = hashes(tmp_path / "a")
    draw = random.Random(seed)
    while hashes(tmp_path / "a") == before:
        mutation(tmp_path / "a", draw)
    return tmp_path / "a"


def test_every_change_is_a_typed_error_where_there_are_hashes(tmp_path):
    """330 changes of the committed artefacts."""
    count = 0
    for mutation in MUTATIONS:
        for seed in range(30):
            folder = mutated(tmp_path, NAMES[seed % len(NAMES)], mutation, seed)
            with pytest.raises(BadCheckpoint, match="is not as it was written"):
                read_artefact(folder)
            count += 1
    assert count >= 300


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda m: m.__name__)
def test_without_hashes_nothing_but_typed_errors(mutation, tmp_path):
    """What the config or the settings contradict is an error that names the file; nothing raises anything else. A flipped bit
    that leaves every value possible, or a field that no weight depends on, cannot be seen."""
    outcome = Counter()
    for seed in range(15):
        folder = mutated(tmp_path, NAMES[seed % len(NAMES)], mutation, 100 + seed)
        (folder / REPORT).unlink()
        try:
            read_artefact(folder)
            outcome["read"] += 1
        except BadCheckpoint as error:
            assert str(folder) in str(error)
            outcome["refused"] += 1
    assert sum(outcome.values()) == 15
    if mutation in BY_STRUCTURE:
        assert outcome["read"] == 0


def test_the_error_names_file_and_tensor(tmp_path):
    shutil.copytree(COMMITTED / "autogptq-gptq", tmp_path / "a")
    (tmp_path / "a" / REPORT).unlink()
    linear = "model.layers.2.self_attn.v_proj"
    rewrite(tmp_path / "a", lambda t: t[f"{linear}.scales"].fill_(float("nan")))
    with pytest.raises(BadCheckpoint, match=rf"{WEIGHTS}: {linear}: scales has values that are NaN"):
        read_artefact(tmp_path / "a")


def test_an_order_of_columns_that_is_missing(tmp_path):
    """With desc_act, a linear without g_idx could be any order of its columns."""
    shutil.copytree(COMMITTED / "autogptq-gptq", tmp_path / "a")
    (tmp_path / "a" / REPORT).unlink()
    rewrite(tmp_path / "a", lambda t: t.pop("model.layers.2.self_attn.v_proj.g_idx"))
    read_artefact(tmp_path / "a")
    config = json.loads((tmp_path / "a" / "config.json").read_text())
    config["quantization_config"]["desc_act"] = True
    (tmp_path / "a" / "config.json").write_text(json.dumps(config))
    with pytest.raises(BadCheckpoint, match=r"v_proj: has \['qweight', 'qzeros', 'scales'\]"):
        read_artefact(tmp_path / "a")


@pytest.mark.parametrize("changes, said", [
    ({"bits": 3}, "qweight is"), ({"group_size": 64}, "qzeros is"), ({"group_size": 100}, "does not divide"),
    ({"checkpoint_format": "gptq_v2"}, "zero points other than 8"), ({"checkpoint_format": "marlin"}, "known format"),
    ({"sym": "yes"}, "cannot be"), ({"bits": None}, "cannot be"), ({"quant_method": "exl2"}, "known format")])
def test_settings_that_decide_something(changes, said, tmp_path):
    shutil.copytree(COMMITTED / "autogptq-gptq", tmp_path / "a")
    (tmp_path / "a" / REPORT).unlink()
    config = json.loads((tmp_path / "a" / "config.json").read_text())
    config["quantization_config"] |= changes
    (tmp_path / "a" / "config.json").write_text(json.dumps(config))
    with pytest.raises(BadCheckpoint, match=said):
        read_artefact(tmp_path / "a")


def test_symmetric_scales_may_be_negative():
    """AutoRound's symmetric grid reaches eight steps to one side and seven to the other, and turns to where the weights are."""
    linears = read_artefact(COMMITTED / "autoround-gptq").linears.values()
    assert len(linears) == 28
    assert any((q.grid.scale < 0).any() for q in linears) and all((q.grid.zero_point == 8).all() for q in linears)


def test_ours_have_hashes_and_transformers_gets_nothing_else(tmp_path):
    from helpers.methods.gptq import Gptq

    quantize_to(tmp_path / "o", BUNDLED, Gptq(), [tuple(range(5, 105))] * 4)
    assert {p.stat().st_mode & 0o777 for p in (tmp_path / "o").iterdir()} == {0o644}
    load_simulated(tmp_path / "o")
    flip(tmp_path / "o", random.Random(0), 10**6, 10**9)
    for read in (load_simulated, reload):
        with pytest.raises((BadCheckpoint, ModelUnavailable), match="is not as it was written"):
            read(tmp_path / "o")
