"""A layer alone: the numbers of the loop that everybody writes first, from fewer passes, of a model that stays as it is; and a
map that is measured once."""

import copy
import signal
import subprocess
import sys
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from helpers.harness import sensitivity as maps
from helpers.harness.sensitivity import LayerUnknown, Sensitivity, effect, table, where
from helpers.harness.variants import Original, loaded
from helpers.measure import sensitivity
from helpers.measure.quality import Judge
from helpers.measure.sensitivity import EMBEDDING, HEAD, Panel, alone, downwards, head_step, places, upwards
from helpers.measure.stats import ratio_interval
from helpers.measure.tasks import Item, encode, encode_text, examples, text
from helpers.methods.awq import Awq
from helpers.methods.gptq import Gptq
from helpers.methods.int8 import RowInt8
from helpers.methods.keep import Keep
from helpers.methods.nf4 import Nf4
from helpers.methods.rtn import Rtn
from helpers.models import quantize
from helpers.models.branches import branches, changed
from helpers.models.layers import blocks_of, linears
from helpers.models.method import Gram, Method, Outcome, Plan, PlanError
from helpers.models.quantize import quantize_block, quantized
from helpers.models.texts import calibration, windows
from helpers.models.walk import Batch, Stream, walk
from helpers.quantizers import awq
from helpers.quantizers.affine import GroupSizeError
from helpers.store import BadCell, Cell, Store
from tests.test_families import CONFIGS, TOKENS

ROOT = Path(__file__).resolve().parents[1]
NAMES = ("answer_nll", "answer_kl", "answer_agree", "answer_tokens", "exact")


@pytest.fixture(scope="module")
def tokens(bundled):
    return windows(calibration(bundled.tokenizer), 64, 6)


@pytest.fixture(scope="module")
def items(bundled):
    """Answers of one token and of many, and text of which every token counts, in batches of unequal lengths."""
    found = [encode(bundled.tokenizer, e) for e in examples("tune", ["json", "facts", "arithmetic", "recall_4"], 2)]
    return [*found[:4], *encode_text(bundled.tokenizer, text("tales")[:2], 90)[:2], *found[4:]]


@pytest.fixture
def model(bundled):
    return copy.deepcopy(bundled.model)


def family(name: str) -> nn.Module:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGS[name]).eval()
    for p in model.parameters():
        if p.ndim == 1:
            p.data += 0.2 * torch.randn_like(p)
        else:
            p.data *= 3  # else all tokens are as likely
    if name == "cohere":
        model.logit_scale = 0.5  # of 0.06
    return model.half().float()


def asked() -> list[Item]:
    g = torch.Generator().manual_seed(1)
    return [Item(tuple(torch.randint(5, 320, (n,), generator=g).tolist()), start, id=str(n))
            for n, start in ((9, 1), (33, 20), (17, 16), (60, 40))]


def replaced(model: nn.Module, module: str, W_hat: torch.Tensor) -> nn.Module:
    """A copy with another weight in a module; what shared the weight keeps its own."""
    model = copy.deepcopy(model)
    model.get_submodule(module).weight = nn.Parameter(W_hat, requires_grad=False)
    return model


def name_of(model: nn.Module, module: nn.Module) -> str:
    return next(n for n, m in model.named_modules() if m is module)


def same(found, scores, near: float = 5e-3) -> bool:
    """To within what sums in another order change; `near`, of the KL, and of NLL a tenth of that."""
    expected = scores.arrays()
    assert [found[k].tolist() for k in ("id", "task", "exact", "answer_tokens")] == [
        expected[k].tolist() for k in ("id", "task", "exact", "answer_tokens")] and found["exact"].dtype == bool
    close = [np.allclose(found[f"answer_{k}"], expected[f"answer_{k}"], rtol=r, atol=a) for k, r, a in (
        ("kl", near, 1e-5), ("nll", near / 50, 5e-5), ("agree", 0, 0))]
    return all(close) and found["answer_kl"].sum() == pytest.approx(expected["answer_kl"].sum(), rel=near, abs=1e-5)


def fast(found, other) -> bool:
    return all(np.allclose(found[k], other[k], rtol=1e-3, atol=1e-5) for k in NAMES)


def untouched(model: nn.Module, before: dict[str, torch.Tensor]) -> bool:
    """Every parameter to the bit, tied where it was, and nothing left behind that would see or change a forward pass."""
    own = dict(model.named_parameters())
    return own.keys() == before.keys() and all(torch.equal(p, before[n]) for n, p in own.items()) and not any(
        m._forward_hooks or m._forward_pre_hooks or "forward" in m.__dict__ for m in model.modules())


def state(model: nn.Module) -> dict[str, torch.Tensor]:
    return {n: p.detach().clone() for n, p in model.named_parameters()}


LAYERS = ("model.layers.0.self_attn.v_proj", "model.layers.1.mlp.down_proj", "model.layers.3.self_attn.o_proj",
          "model.layers.3.mlp.gate_proj")


@pytest.mark.parametrize("method", [Rtn(2), Gptq(2), Awq(3), Nf4()], ids=str)
def test_a_layer_alone_is_the_loop_that_everybody_writes(model, items, tokens, method):
    before = state(model)
    panel = Panel(model, items, batch_tokens=200)
    assert len(panel.batches) > 1 and any(len({len(items[i].ids) for i in b}) > 1 for b in panel.batches)
    judge = Judge(items, model, batch_tokens=200)
    assert same(panel.score(), judge.score(model))
    cells = {n: arrays for n, _, arrays in downwards(panel, [method], tokens, lambda n, _: n in LAYERS)}
    assert tuple(cells) == LAYERS and untouched(model, before)
    for n, found in cells.items():
        naive = quantized(model, Plan(Keep(), {f"^{n}$": method}, inputs="model"), tokens)
        # a file has AWQ's neighbours and norms, multiplied by scales, in fp16
        assert same(found, judge.score(naive), 0.05 if method.prepares else 5e-3), n
        assert found["answer_kl"].sum() > 2e-3
        W, W_hat = model.get_submodule(n).weight.detach(), naive.get_submodule(n).weight.detach()
        if not method.prepares:
            assert found["weight_error"] == pytest.approx(((W - W_hat).norm() / W.norm()).item() ** 2, rel=1e-3)


@pytest.mark.parametrize("name, kind", [
    ("llama", "down_proj"), ("phi3", "qkv_proj"), ("gemma3", "up_proj"), ("gpt_neox", "query_key_value"), ("opt", "fc1"),
    ("cohere", "v_proj")])
def test_other_families(name, kind, monkeypatch):
    """Tied heads, fused linears, norms that multiply by 1 + weight, other names of head and embedding, a scale of logits."""
    monkeypatch.setattr(quantize, "in_fp16", lambda name, p: p)  # AWQ's neighbours and norms, multiplied by scales
    model, items = family(name), asked()
    before, methods = state(model), (Rtn(3, 32), Gptq(3, 32), Awq(4, 32))
    panel, judge = Panel(model, items, batch_tokens=100), Judge(items, model, batch_tokens=100)
    inside = next(n for n, _ in reversed(list(linears(model))) if n.endswith(kind))
    head, embedding = (name_of(model, m) for m in (model.get_output_embeddings(), model.get_input_embeddings()))
    found = {(n, m): arrays for n, m, arrays in downwards(panel, methods, TOKENS, lambda n, _: n in (inside, HEAD, EMBEDDING))}
    assert untouched(model, before)
    assert set(found) == {(n, m) for n in (inside, HEAD, EMBEDDING) for m in methods} - {(EMBEDDING, m) for m in methods[1:]}
    for m in methods:
        naive = quantized(model, Plan(Keep(), {f"^{inside}$": m}, inputs="model"), TOKENS)
        assert same(found[inside, m], judge.score(naive)), m
    W = model.get_submodule(head).weight.detach()
    gram = Gram.of(W.shape[1])
    handle = model.get_submodule(head).register_forward_pre_hook(lambda _, args: gram.add(args[0]))
    with torch.inference_mode():
        for sequence in TOKENS:
            model(torch.tensor([sequence]))
    handle.remove()
    step = head_step(panel.source, Stream.start(panel.source, TOKENS).through(*panel.source.blocks))
    [kept] = step.grams(Gram).values()
    assert kept.tokens == gram.tokens and torch.allclose(kept.H, gram.H, rtol=1e-3, atol=1e-3 * gram.H.abs().max())
    assert torch.allclose(kept.x_mean(), gram.x_mean(), rtol=1e-3)
    for m in methods[:2]:
        W_hat = m.solve(W, kept)[0].stored().dequantize()
        assert same(found[HEAD, m], judge.score(replaced(model, head, W_hat))), m
        loss = ((W - W_hat) @ gram.H * (W - W_hat)).sum() / (W @ gram.H * W).sum()
        assert found[HEAD, m]["output_error"] == pytest.approx(loss.item(), rel=2e-3)
    layer = alone(step, "linear", m := Awq(4, 32, clip=False))
    s = awq.search_scale(awq.candidate_scales(kept.x_mean(), awq.weight_saliency(W, 32)), awq.gram_loss(W, kept.H, 4, 32)).scale
    W_hat = m.solve(W * s, None)[0].stored().dequantize() / s
    assert (layer.W_hat - W_hat).norm() < 1e-3 * (W - W_hat).norm()
    assert same(panel.leaves(W_hat), judge.score(replaced(model, head, W_hat)))
    rounded = Rtn(3, 32).solve(model.get_submodule(embedding).weight.detach(), None)[0].stored().dequantize()
    assert same(found[EMBEDDING, methods[0]], judge.score(replaced(model, embedding, rounded)))
    assert all(arrays["answer_kl"].sum() > 1e-4 for arrays in found.values())


@pytest.mark.parametrize("limits", [
    {"PIECE": 5 * 1280}, {"PIECE": 1}, {"REMEMBERED": 0}, {"PIECE": 9000, "REMEMBERED": 0}], ids=str)
def test_memory_is_bounded_and_changes_nothing(model, items, tokens, limits, monkeypatch):
    chosen = {EMBEDDING, LAYERS[1], HEAD}

    def cells() -> dict:
        panel = Panel(model, items, batch_tokens=200)
        assert (panel.remembered is None) is ("REMEMBERED" in limits and sensitivity.REMEMBERED == 0)
        sizes.extend(len(part) for part in panel._log_probabilities(panel.end))
        return {n: arrays for n, _, arrays in downwards(panel, [Rtn(2)], tokens[:2], lambda n, _: n in chosen)}

    sizes: list[int] = []
    whole = cells()
    sizes.clear()
    for name, value in limits.items():
        monkeypatch.setattr(sensitivity, name, value)
    parts = cells()
    assert "PIECE" not in limits or max(sizes) == max(1, limits["PIECE"] // 1280)
    assert parts.keys() == whole.keys() == chosen and all(fast(parts[n], whole[n]) for n in chosen)
    assert all(arrays["answer_kl"].sum() > 1e-3 for arrays in parts.values())


def test_the_model_is_itself_whatever_happens(model, items, tokens, monkeypatch):
    before = state(model)
    panel = Panel(model, items)
    for place in places(panel, tokens[:2]):  # a consumer that stops, at the embedding and in a block
        if place.name == LAYERS[1]:
            place.judge(place.quantize(Rtn(2)).W_hat)
            break
    assert untouched(model, before)
    found = downwards(panel, [Rtn(2)], tokens[:2])
    assert next(found)[0] == EMBEDDING and next(found)[0].startswith("model.layers.0.")
    found.close()
    assert untouched(model, before)
    for n, owner, failing in ((EMBEDDING, Stream, "enter"), (LAYERS[0], Stream, "run"), (HEAD, Batch, "logits")):
        place = next(place for place in places(panel, tokens[:2]) if place.name == n)
        W_hat = place.quantize(Rtn(2)).W_hat
        with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
            patch.setattr(owner, failing, lambda *_: 1 / 0)
            place.judge(W_hat)
        assert untouched(model, before), n
        assert place.judge(W_hat)["answer_kl"].sum() > 1e-3
    assert untouched(model, before)


def test_passes_are_counted(model, items, tokens):
    """Of the questions: two of the unchanged model, and of each branch the blocks from its own on. Of the calibration: one
    for the Gram matrices of a block, one to go on."""
    passes: Counter = Counter()
    for i, block in enumerate(model.model.layers):
        block.input_layernorm.register_forward_pre_hook(lambda _, args, i=i: passes.update([(i, args[0].shape[:-1].numel())]))
    methods, L = (Rtn(3), Gptq(3), Awq(4)), 4
    panel = Panel(model, items[:3], batch_tokens=10**4)
    asked = panel.entrance.tokens
    calibrated = len(tokens) * 64
    found = [(n, m) for n, m, _ in downwards(panel, methods, tokens)]
    assert len(found) == 30 * 3 - 2  # all but GPTQ and AWQ of the embedding
    branched = 7 * 3 * sum(L - b for b in range(L)) + L  # and the embedding's; the head's takes none
    assert sum(n for (_, size), n in passes.items() if size == asked) == branched + 2 * L
    assert {passes[i, calibrated] for i in range(L)} == {2}
    naive = L * (1 + len(found))  # with the reference's own
    assert branched + 2 * L <= (L + 1) / (2 * L) * naive + L
    assert {size for _, size in passes} == {asked, calibrated, 8}


def test_a_group_is_looked_at_once(tiny, monkeypatch):
    added: Counter = Counter()
    add = Gram.add
    monkeypatch.setattr(Gram, "add", lambda gram, X: (added.update([id(X)]), kept.append(X), add(gram, X))[-1])
    kept: list = []
    step = next(walk(tiny, [range(5, 60)] * 2))
    for n in ("self_attn.q_proj", "mlp.down_proj", "self_attn.v_proj"):
        for method in (Gptq(3, 64), Awq(3, 64), Rtn(3, 64)):
            layer = alone(step, n, method)
        # the scale that AWQ folded before is not in what follows
        assert torch.equal(layer.W_hat, Rtn(3, 64).solve(step.block.get_submodule(n).weight, None)[0].stored().dequantize())
    assert set(added.values()) == {1} and len(added) == len(step.layout.groups) == 4


@pytest.mark.parametrize("name", ["llama", "many values", "gemma3", "phi3", "cohere", "opt"])
def test_awq_alone_is_one_weight_in_a_block_that_is_as_it_was(name, monkeypatch):
    monkeypatch.setattr(quantize, "in_fp16", lambda name, p: p)
    model = family(name)
    for step in walk(model, TOKENS):
        if not step.last:
            continue
        out = step.stream.through(step.block).batches[0].hidden
        for n in [n for g in step.layout.groups for n in g]:
            layer, block = alone(step, n, Awq(3, 32)), copy.deepcopy(step.block)
            quantize_block(replace(step, block=block, folded={}), Plan(Keep(), {f"{n}$": Awq(3, 32)}, "model"), Outcome())
            whole = step.stream.through(block).batches[0].hidden
            with changed(step.block, {f"{n}.weight": layer.W_hat}):
                ours = step.stream.through(step.block).batches[0].hidden
            assert (ours - whole).norm() < 2e-3 * (whole - out).norm(), n
            W, X = step.block.get_submodule(n).weight.detach(), step.grams(Gram)[n].H
            rest = W - layer.W_hat
            assert layer.weight_error == pytest.approx((rest.norm() / W.norm()).item() ** 2, rel=1e-4)
            assert layer.output_error == pytest.approx(((rest @ X * rest).sum() / (W @ X * W).sum()).item(), rel=1e-3)
            assert layer.weight_error < 0.3


def test_what_cannot_be_quantized_alone_is_left(tiny):
    step = next(walk(tiny, [range(5, 60)]))
    assert alone(step, "mlp.down_proj", Rtn(4)) is None and alone(step, "mlp.down_proj", Keep()) is None  # 192 inputs
    assert alone(step, "mlp.up_proj", Rtn(4))
    panel = Panel(tiny, [Item(tuple(range(5, 30)), 10)])
    found = [(n, m) for n, m, _ in downwards(panel, [Rtn(4), Rtn(4, 96), Keep()], [range(5, 60)])]
    fitting = {n for n, m in linears(tiny) if m.in_features == 192}
    assert {n for n, m in found if m == Rtn(4, 96)} == fitting
    assert {n for n, m in found if m == Rtn(4)} == {n for n, _ in linears(tiny)} - fitting | {EMBEDDING, HEAD}
    assert len(found) == 16


def test_a_panel_refuses_what_a_judge_does(tiny):
    with pytest.raises(ValueError, match="at least one text"):
        Panel(tiny, [])
    with pytest.raises(ValueError, match="same id twice"):
        Panel(tiny, [Item((5, 6, 7), 1, id="a"), Item((5, 6, 8), 1, id="a")])
    panel = Panel(tiny, [Item((5, 6, 7), 1)])
    with pytest.raises(ValueError, match="not finite"):
        panel.leaves(torch.full((1280, 128), torch.nan))
    with pytest.raises(ValueError, match="is in none of the blocks model.layers"):
        next(branches(tiny, {"x": {"lm_head.weight": torch.zeros(1)}}, panel.entrance))


def test_upwards_is_the_changed_model(model, bundled, items, tokens):
    low = Plan(Rtn(3))
    quantized_model = quantized(model, low)
    sets = {"one": [LAYERS[1]], "kind": [n for n, _ in linears(model) if n.endswith("v_proj")],
            "block": [n for n, _ in linears(model) if ".2." in n], "last": [LAYERS[3]]}
    changes = {k: {f"{n}.weight": model.get_submodule(n).weight.detach() for n in names} for k, names in sets.items()}
    before, full = state(quantized_model), state(model)
    panel = Panel(quantized_model, items, Panel(model, items, batch_tokens=200), batch_tokens=200)
    found = dict(upwards(panel, changes))
    assert set(found) == set(sets)
    assert untouched(quantized_model, before) and untouched(model, full)
    judge = Judge(items, bundled.model, batch_tokens=200)
    for name, layers in sets.items():
        whole = quantized(model, replace(low, rules=tuple((f"^{n}$", Keep()) for n in layers)))
        assert same(found[name], judge.score(whole)), name
    assert same(panel.score(), judge.score(quantized_model))
    assert found["kind"]["answer_kl"].sum() < panel.score()["answer_kl"].sum()


# --- the map, cell by cell

METHODS = (Rtn(3), Nf4())
SOME = (EMBEDDING, "model.layers.0.self_attn.k_proj", "model.layers.2.mlp.up_proj", HEAD)
KILLED = """
import os, signal, sys
from pathlib import Path
from helpers.store import Cell
from tests.test_sensitivity import METHODS, SOME, small
save, saved = Cell.save, []
def stop(cell, path):
    if len(saved) == int(sys.argv[2]):
        os.kill(os.getpid(), signal.SIGKILL)
    saved.append(save(cell, path))
Cell.save = stop
small(Path(sys.argv[1])).down(METHODS, SOME, progress=False)
"""


def small(folder: Path, **options) -> Sensitivity:
    base = Original()
    tokenizer = loaded(base.model, base.revision, base.dtype, "cpu").tokenizer
    found = [encode(tokenizer, e) for e in examples("tune", ["facts", "arithmetic"], 2)]
    return Sensitivity(found, [tuple(range(5, 45)), tuple(range(45, 85))], base, Store(folder), **options)


@pytest.fixture
def judged(monkeypatch):
    """What was judged: one entry a cell that was computed."""
    seen: list[str] = []
    score = Panel.score

    def counted(panel, *args, **kwargs):
        seen.append("scored")
        return score(panel, *args, **kwargs)

    monkeypatch.setattr(Panel, "score", counted)
    return seen


def test_a_killed_map_goes_on(tmp_path, judged, monkeypatch):
    """SIGKILL while the fourth cell is written, then an error at the third of the rest: no cell is computed twice but those."""
    done = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path), "3"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert len(list(tmp_path.glob("*.npz"))) == 3
    save, times = Cell.save, []

    def full(cell, path):
        if len(times) == 2:
            raise OSError("the disk is full")
        times.append(save(cell, path))

    monkeypatch.setattr(Cell, "save", full)
    with pytest.raises(OSError, match="the disk is full"):
        small(tmp_path).down(METHODS, SOME, progress=False)
    assert len(list(tmp_path.glob("*.npz"))) == 5 and len(judged) == 3
    monkeypatch.setattr(Cell, "save", save)
    cells = small(tmp_path).down(METHODS, SOME, progress=False)
    assert len(judged) == 3 + 3 and list(cells) == [(n, m) for n in SOME for m in METHODS]
    assert len(list(tmp_path.iterdir())) == 8
    again = small(tmp_path).down(METHODS, SOME, progress=False)
    assert len(judged) == 6
    assert all(np.array_equal(again[k].arrays[a], v) for k, c in cells.items() for a, v in c.arrays.items())
    fresh = small(tmp_path / "fresh").down(METHODS, SOME, progress=False)
    assert all(np.array_equal(fresh[k].arrays[a], cells[k].arrays[a]) for k in cells for a in NAMES)


def louder(model: nn.Module) -> nn.Module:
    model.model.layers[0].mlp.down_proj.weight.data.mul_(1.01)
    return model


def test_a_cell_is_missed_when_anything_changes(tmp_path, monkeypatch):
    one = small(tmp_path)
    others = [replace(one, base=Original(change=louder)), replace(one, tokens=one.tokens[:1]),
              replace(one, items=one.items[:3]),
              replace(one, tokens=[one.tokens[0], (*one.tokens[1][:-1], 7)]), replace(one, batch_tokens=100),
              replace(one, items=[replace(one.items[0], start=one.items[0].start + 1), *one.items[1:]]),
              replace(one, base=Original(dtype="float64"))]
    circumstances = maps.circumstances()
    monkeypatch.setattr(maps, "circumstances", lambda: circumstances)  # which takes its time
    keys = [maps.key_hash(s.key) for s in (one, *others)]
    for what in ("code", "versions", "machine"):
        monkeypatch.setattr(maps, "circumstances", lambda what=what: circumstances | {what: "another"})
        keys.append(maps.key_hash(small(tmp_path).key))
    assert len(set(keys)) == len(keys) == 11
    monkeypatch.undo()
    assert maps.key_hash(small(tmp_path / "elsewhere").key) == keys[0]


def test_layers_that_are_not_there_and_groups_that_do_not_fit(tmp_path, judged, monkeypatch):
    sens = small(tmp_path)
    with pytest.raises(LayerUnknown, match="'model.layers.9.mlp.up_proj' is no layer of bundled; there are embedding, model.l"):
        sens.down(METHODS, ["model.layers.9.mlp.up_proj"])
    assert sens.down(METHODS, []) == {} and not judged
    q, down = "model.layers.0.self_attn.q_proj", "model.layers.0.mlp.down_proj"
    methods = (Rtn(4, 96), Gptq(4, 96), Keep())  # of 256 inputs, and 768
    monkeypatch.setattr(sensitivity, "head_step", lambda *_: pytest.fail("the head, which nothing fits"))
    cells = sens.down(methods, [EMBEDDING, q, down, HEAD], progress=False)
    assert set(cells) == {(down, m) for m in methods[:2]} and len(judged) == 2
    monkeypatch.setattr(maps, "downwards", lambda *_: pytest.fail("nothing is left to measure"))
    assert set(sens.down(methods, [EMBEDDING, q, down, HEAD], progress=False)) == set(cells)
    monkeypatch.undo()
    name = sens.store.path(f"{down} {methods[0]}", cells[down, methods[0]].key)
    name.write_bytes(b"")
    with pytest.raises(BadCell, match="is not a whole cell"):
        sens.down(methods, [down], progress=False)


def test_a_method_of_no_file_may_leave_a_layer(tmp_path):
    @dataclass(frozen=True)
    class Narrow(Method):
        """Rounding of what has 768 inputs."""

        name: ClassVar[str] = "narrow"

        def solve(self, W, kept):
            if W.shape[1] != 768:
                raise GroupSizeError("too narrow")
            return Rtn(4).solve(W, kept)

    Method.known.pop("narrow")
    q, down = "model.layers.0.self_attn.q_proj", "model.layers.0.mlp.down_proj"
    assert set(small(tmp_path).down([Narrow()], [q, down], progress=False)) == {(down, Narrow())}


def test_up_and_what_it_refuses(tmp_path, judged, bundled):
    sens, low = small(tmp_path), Plan(Rtn(3))
    raised = {"v": [n for n in sens.shapes if n.endswith("v_proj")], "first": ["model.layers.0.mlp.down_proj"]}
    cells = sens.up(low, raised, progress=False)
    assert list(cells) == ["", "v", "first"] and len(judged) == 3
    judge = Judge(sens.items, bundled.model)
    for name, cell in cells.items():
        rules = tuple((f"^{n}$", Keep()) for n in raised.get(name, ()))
        assert same(cell.arrays, judge.score(quantized(bundled.model, Plan(Rtn(3), rules)))), name
    again = small(tmp_path).up(low, raised | {"other name": raised["v"][::-1], "k": ["model.layers.1.self_attn.k_proj"]}, False)
    assert len(judged) == 3 + 2 and fast(again["other name"].arrays, cells["v"].arrays)
    assert set(sens.up(low, {"v": raised["v"][::-1]}, False)) == {"", "v"} and len(judged) == 3 + 2
    with pytest.raises(LayerUnknown, match="'output head' is no layer"):
        sens.up(low, {"x": [HEAD]})
    with pytest.raises(PlanError, match="folds scales"):
        sens.up(Plan(Awq()), raised)


def test_a_table_of_cells(tmp_path):
    sens = small(tmp_path)
    methods = (Rtn(3), RowInt8())
    cells = sens.down(methods, SOME[1:], progress=False)
    full = sens.panel.score()
    rows = table({k: c.arrays for k, c in cells.items()}, full)
    assert list(zip(rows["layer"], rows["setting"], strict=True)) == list(cells)
    assert all(c.key["layer"] == n and c.key["method"] == m.key() for (n, m), c in cells.items())
    assert rows["bits"].tolist() == [3, 8] * 3
    assert rows["kind"].tolist() == [k for k in ("k_proj", "up_proj", HEAD) for _ in methods]
    assert rows["block"].tolist()[:4] == [0, 0, 2, 2] and rows["block"].isna().tolist()[4:] == [True, True]
    for row, cell in zip(rows.to_dict("records"), cells.values(), strict=True):
        a = cell.arrays
        assert row["kl"] == ratio_interval(a["answer_kl"], a["answer_tokens"]) and row["kl"].estimate > 0
        more = (a["answer_nll"] - full["answer_nll"]).sum() / a["answer_tokens"].sum()
        assert row["delta_nll"].estimate == pytest.approx(more)
        assert row["weight_error"] == a["weight_error"] and row["output_error"] == a["output_error"]
        assert row["quantize_s"] > 0 and row["forward_s"] > 0
    assert rows["weight_error"][0] > 10 * rows["weight_error"][1]
    broken = dict(full, exact=~full["exact"])
    found = effect(broken, full, interval=False)
    assert (found["lost"], found["won"]) == (full["exact"].sum(), (~full["exact"]).sum()) and np.isnan(found["kl"].low)
    assert found["kl"].estimate == full["answer_kl"].sum() / full["answer_tokens"].sum()


def test_where_a_layer_is():
    assert where("model.layers.31.mlp.down_proj") == (31, "down_proj") and where("transformer.h.2.attn.c") == (2, "c")
    assert where(HEAD) == (None, HEAD) and where(EMBEDDING) == (None, EMBEDDING)
    sens = Sensitivity((), ())
    assert next(iter(sens.shapes)) == EMBEDDING and next(reversed(sens.shapes)) == HEAD and len(sens.shapes) == 30
    assert sens.shapes[HEAD] == sens.shapes[EMBEDDING] == (1280, 256)
    assert sens.shapes["model.layers.3.mlp.down_proj"] == (256, 768)
    assert [sens._blocks(n) for n in (EMBEDDING, LAYERS[0], LAYERS[3], HEAD)] == [5, 5, 2, 1]
    assert sens.count == len(blocks_of(sens.base.load())[1]) == 4
