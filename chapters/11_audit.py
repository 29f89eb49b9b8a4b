# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # 11. The article, audited
#
# **After this chapter** you know which of the 24 checkable claims of the article that this book grew from hold, on what, and
# which command decides the rest. You can audit a claim of your own the same way.
#
# *Needs*: chapters [3](03_error_formula.ipynb) to [7](07_sensitivity.ipynb) and [9](09_harness.ipynb), whose records are read
# here. *Time*: a minute and a half on two cores. *On a GPU*: the same verdicts; those on speed then have a command to run.
#
# Each claim is in our words. A verdict follows from a rule on measured values, which stands in its cell: *holds*, *holds with
# conditions*, *does not hold*, *undecided here*. The *bundled* model is the book's own, the *real* one SmolLM2-135M-Instruct;
# of a part that only a GPU or 70 billion parameters could tell the row says so, with the command that would decide it.

# %% tags=["setup", "hide-cell"]
# On Colab: fetch the book and what it needs. Where the book is installed this cell does nothing.
import importlib.util
import os
import subprocess
import sys

BOOK = "REPOSITORY-UNSET"
if not importlib.util.find_spec("helpers"):
    if "UNSET" in BOOK:
        raise RuntimeError("Set BOOK in this cell to the address of the book's git repository; it has no public one yet")
    if not os.path.isdir("book"):
        subprocess.run(["git", "clone", "--quiet", "--depth", "1", BOOK, "book"], check=True)
    subprocess.run([sys.executable, "book/helpers/colab.py"], check=True)
    os.chdir("book/chapters")
    sys.path.insert(0, os.path.abspath(".."))

# %% tags=["nbval-ignore-output"]
from helpers.book import start

start(seed=0)

# %% tags=["parameters"]
model = "bundled"  # or a local folder, or a hub id such as "owner/name"
rebuild = False  # make the toolkits' artefacts anew instead of reading the committed ones
profile = None  # a name from helpers/profiles.json, instead of `model`

# %%
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch

from helpers import plots
from helpers.book import settings
from helpers.harness.audit import AWQ, CONDITIONS, GPTQ, HOLDS, NOT, QLORA, UNDECIDED, Audit
from helpers.harness.carry import SAID, panels, verdict, verdicts
from helpers.harness.carry import real as real_less
from helpers.harness.study import prepared
from helpers.models.source import BUNDLED
from helpers.results import read

pd.set_option("display.max_colwidth", None)
run_on = settings(model, profile)
where = {k: run_on[k] for k in ("revision", "dtype", "device")}
a_task = min(20, run_on["limit"])  # questions
study = prepared(run_on["model"], **where, methods=["nf4"], limit=a_task)
full, audit = study.full, Audit()
draws = 4 if full.folder == BUNDLED else 1  # of a calibrated variant: each takes minutes on a larger model
LOWER, SAME, HIGHER = SAID[-1], SAID[0], SAID[1]

# %% [markdown]
# ## Predict
#
# Of 24 claims of an article written from general knowledge: how many hold as they stand? How many do not hold at all?

# %%
hold_guess, fail_guess = 12, 4

# %% [markdown]
# ## What the methods are: C1, C5, C9
#
# **C1: NF4 is a data type, not an algorithm.** If so, each weight gets the nearest of 16 values of its block, whatever the
# other weights are and whatever the inputs do:

# %%
from helpers.methods.nf4 import Nf4
from helpers.quantizers.nf4 import codebook, quantize_nf4

W = torch.randn(8, 64, generator=torch.Generator().manual_seed(0))
q = quantize_nf4(W)
absmax = W.abs().amax(1, keepdim=True)  # a row is one block here
nearest = (W[..., None] / absmax[..., None] - codebook()).abs().argmin(-1)
by_hand = codebook()[nearest] * absmax
alike = torch.allclose(q.dequantize(), by_hand, atol=1e-6)
audit.say(1, "NF4 is a data type, not an algorithm", HOLDS if alike and Nf4().keeps is None else NOT,
          "every weight is the nearest of 16 values times its block's largest; no input is looked at",
          "this chapter; [chapter 4](04_nf4.ipynb)", QLORA)

# %% [markdown]
# **C5: AWQ finds the 1 % of weights with the largest activations and keeps them out of quantization.** What does an AWQ file
# hold? Were some weights left out, they would be in 16 bits:

# %%
from helpers.models.formats import AwqFormat
from helpers.models.reading import read_artefact
from helpers.toolkits.artefacts import COMMITTED

file = read_artefact(COMMITTED / "autoawq-awq")
kept = [n for n in file.others if n.endswith("proj.weight")]
codes = sum(q.codes.numel() for q in file.linears.values())
print(f"{type(file.form).__name__}: {codes:,} weights in {len(file.linears)} linears, all with a code; in 16 bits: {len(kept)}")
assert isinstance(file.form, AwqFormat)
audit.say(5, "AWQ keeps the 1 % of weights with the largest activations out of quantization", NOT if not kept else HOLDS,
          "autoawq's file has a 4-bit code for every weight: channels are scaled before rounding, none is left out. Leaving "
          "columns out is the observation that the method starts from", "this chapter; [chapter 6](06_awq.ipynb)",
          AWQ)

# %% [markdown]
# **C9: double quantization saves memory.** Without it a block of 64 weights has an fp32 scale; with it an 8-bit one, and an
# fp32 scale for each 256 of those:

# %%
without, with_it = 32 / 64, 8 / 64 + 32 / (64 * 256)
costs = {whose: verdict(of["double quantization"]["on"]) for whose, of in panels("nf4").items()}
saved_70b = (without - with_it) / 8 * 68.98e9 / 1e9
print(f"{without} to {with_it:.3f} bits a weight: 70B saves {saved_70b:.1f} GB")
audit.say(9, "double quantization saves memory", HOLDS if with_it < without else NOT,
          f"{without - with_it:.3f} bits a weight; the KL is " + ", ".join(f"{whose}: {v}" for whose, v in costs.items()),
          "this chapter; [chapter 4](04_nf4.ipynb)", QLORA)

# %% [markdown]
# ## Calibration: C2, C4, C18, C20, C23
#
# Panels of the sweeps: KL, and in brackets whether it is measurably higher (worse) or lower than that of the first row, paired
# by question, at 3 bits: all windows, which are 109 for the bundled model and 128 for the real one. Its columns are two voices
# of prose, and questions.

# %% tags=["nbval-ignore-output"]
gptq = panels("gptq")
spread = pd.DataFrame({whose: {int(n): f"{r['kl'][0]:.3g} ({verdict(r)})" for n, r in of["calibration windows of 256"].items()}
                       for whose, of in gptq.items()})
spread.sort_index(ascending=False).fillna("")

# %%
def told(knob, value, name="gptq"):
    """{whose text: verdict} of a row, where it was measured."""
    return {whose: verdict(of[knob][value]) for whose, of in panels(name).items() if value in of.get(knob, {})}


def said(verdicts):
    return ", ".join(f"{whose}: {v}" for whose, v in verdicts.items())


few, enough = told("calibration windows of 256", "1"), told("calibration windows of 256", "64")
text_kind = told("calibration text", "recipes")
good = set(few.values()) == {HIGHER} and set(enough.values()) <= {SAME, LOWER}
audit.say(2, "GPTQ is good when calibrated well: 128 to 1,024 samples, more are more stable", CONDITIONS if good else NOT,
          f"a single window is worse everywhere; 64 of 256 tokens against all: {said(enough)}. The kind of text counts too: "
          f"recipes instead of requests, {said(text_kind)}", "[chapter 5](05_gptq.ipynb)", GPTQ)

# %% [markdown]
# **C4: conservative damping avoids catastrophes.** First a case made for it: fewer calibration tokens (16) than inputs (64), so
# that the Gram matrix lacks rank. The error on *fresh* inputs, as a multiple of plain rounding's:

# %%
from helpers.quantizers.affine import output_error, round_to_nearest
from helpers.quantizers.gptq import gptq as solve

inputs = torch.randn(64, 1040, generator=torch.Generator().manual_seed(1))
H, fresh = inputs[:, :16] @ inputs[:, :16].T, inputs[:, 16:] @ inputs[:, 16:].T
W = torch.randn(32, 64, generator=torch.Generator().manual_seed(2))
plain = output_error(round_to_nearest(W, 4, 64, False) - W, fresh)
worse = {damp: output_error(solve(W, H, 4, 64, False, damp_percent=damp).quantized.dequantize() - W, fresh) / plain
         for damp in (1e-6, 1e-4, 0.01, 0.1, 1.0)}
print({damp: round(x, 1) for damp, x in worse.items()})

# %% [markdown]
# Then the models, at 4 bits with enough text, against damping of 0.01:

# %%
less, more = (told("recipes, 4 bits", f"GPTQ, damping {d}", "recipes") for d in ("0.0001", "0.1"))
needed = worse[1e-6] > 2 * worse[0.1]
audit.say(4, "conservative damping avoids catastrophic layers", CONDITIONS if needed else NOT,
          f"with too few tokens a damping of 1e-6 is {worse[1e-6]:.1f} times as bad as rounding, 0.1 {worse[0.1]:.1f} times. "
          f"With enough, at 4 bits, 0.0001 instead of 0.01: {said(less)}; 0.1: {said(more)}. At 3 bits: no difference in "
          "chapter 5's panel", "this chapter; [chapter 5](05_gptq.ipynb)", GPTQ)

# %% [markdown]
# **C18: calibration on short prompts loses long context.** Provoked in [chapter 10](10_choosing.ipynb) at 2 bits; here the same
# two calibration sets, each in two orders of its windows, by recall of what was just said and of what was said long before:

# %% tags=["nbval-ignore-output"]

from helpers.harness.failures import on_prose, redrawn, seen, short_windows, table
from helpers.measure.stats import ratio_interval
from helpers.measure.tasks import examples
from helpers.models.texts import calibration, windows

requests = windows(calibration(study.tokenizer), 256, 32)
asks_recall = {"recall_4", "recall_far"} <= {e.task for e in study.judge}
lost = {}
if asks_recall:
    recall = study.quality([*examples("judge", ["recall_4"], 3 * a_task), *examples("judge", ["recall_far"], 6 * a_task)])
    failure = short_windows(study, requests)
    short, long = ([recall.scores(v) for v in redrawn(v, max(1, draws // 2))] for v in (failure.provoked, failure.remedied))
    for task in ("recall_4", "recall_far"):
        apart = np.stack([a.select(task).exact.astype(float) - b.select(task).exact for a, b in zip(short, long, strict=True)])
        lost[task] = ratio_interval(apart, np.ones(apart.shape[1]))
print(", ".join(f"{task}: {i}" for task, i in lost.items()) or "not applicable: this model is not asked for recall")

# %%
if asks_recall:
    near, far = lost.values()
    audit.say(18, "calibration on short prompts loses long context", CONDITIONS if far.high < 0 and far.estimate < near.estimate
              else NOT, f"at 2 bits, windows of 32 instead of 256: right answers over 300 to 850 tokens {far}, over a few "
              f"{near}. Contexts beyond 1,024 tokens: undecided", "this chapter; [chapter 10](10_choosing.ipynb)", "",
              "make compare MODEL=... PROMPTS=long.jsonl")

# %% [markdown]
# **C20: desc_act improves quality, more slowly.** And **C23: three short prompts are a usable calibration set**, live, with the
# article's number of prompts against plain rounding and against 32 windows:

# %%
act = told("recipes, 4 bits", "GPTQ, desc_act", "recipes")
audit.say(20, "desc_act improves quality on some backends, more slowly", CONDITIONS if LOWER in act.values() else NOT,
          f"KL against the order as it is: {said(act)}. How much slower is a matter of GPU kernels",
          "[chapter 5](05_gptq.ipynb)", "", "make compare MODEL=... METHODS='gptq:act_group_aware=false "
          "gptq:desc_act=true' SERVE='1'")

# %% tags=["nbval-ignore-output"]
from helpers.harness.variants import Simulation
from helpers.methods.gptq import PLAIN, Gptq
from helpers.methods.rtn import Rtn
from helpers.models.layers import common_group
from helpers.toolkits.article import PROMPTS

group = common_group(full.load(study.device))
three = [study.tokenizer.encode(p) for p in PROMPTS]
quality = study.quality(study.judge)
calibrated = {name: Simulation(name, Gptq(4, group, sym=False, **PLAIN), on, full) for name, on in (
    ("three prompts", three), ("32 windows", requests))}
rounding = quality.scores(Simulation("rounding", Rtn(4, group, sym=False), (), full)).answer
kl = {"rounding": rounding.kl[None]} | {name: np.stack([quality.scores(d).answer.kl for d in redrawn(v, draws)])
                                        for name, v in calibrated.items()}
print(f"{sum(map(len, three))} tokens in the three; each set in {draws} orders")
pd.DataFrame({name: {"KL (nats/token)": str(ratio_interval(of_, rounding.tokens)), "of the draws": of_.sum(1) / sum(
    rounding.tokens)} for name, of_ in kl.items()}).T

# %%
less_than_rounding, more_than_windows = (
    ratio_interval(kl["three prompts"] - kl[other], rounding.tokens) for other in ("rounding", "32 windows"))
audit.say(23, "three short prompts are a usable calibration set",
          NOT if less_than_rounding.high >= 0 else CONDITIONS if more_than_windows.low > 0 else HOLDS,
          f"on this model, KL less that of rounding {less_than_rounding}, less that of 32 windows "
          f"{more_than_windows}; the real model with one window of 256: see C2", "this chapter",
          GPTQ)

# %% [markdown]
# ## Grids and groups: C3, C8, C15, C21
#
# **C3: smaller groups, better quality, more metadata; 32 to 128 is the useful range.** Bits a weight by exact arithmetic, KL
# from the sweeps:

# %% tags=["nbval-ignore-output"]
groups = gptq["bundled"]["group size"]
pd.DataFrame({size: {"bits a weight": f"{3 + (16 + 3) / int(size):.3f}" if int(size) > 0 else "3 + 19 / width",
                     "KL, bundled": f"{r['kl'][0]:.3g}", "against 128": verdict(r)} for size, r in groups.items()}).T

# %%
by_group = {size: verdict(r) for size, r in groups.items()}
real_groups = verdicts("gptq").reindex([("group size", "32"), ("group size", "-1")]).drop(columns="bundled")
by_size = zip(("at 32", "for whole rows"), real_groups.to_numpy(), strict=True)
of_the_real = "not measured" if real_groups.isna().any(axis=None) else "beside groups of 64 KL is " + " and ".join(
    f"{', '.join(dict.fromkeys(row))} {what}" for what, row in by_size)
audit.say(3, "smaller groups: better quality, more metadata; 32 to 128 is the useful range", HOLDS if (
    by_group["64"] == by_group["32"] == LOWER and by_group["-1"] == HIGHER) else CONDITIONS,
    f"bundled, 3 bits: each step from whole rows to 128, 64 and 32 lowers KL. The real model: {of_the_real}",
    "[chapter 5](05_gptq.ipynb)", GPTQ, "make small-sweeps DEVICE=cuda")

# %% [markdown]
# **C8: NF4's grid beats uniform INT4 by about 0.5 perplexity.** At blocks of 64: perplexity of passages, by the texts of this
# model, live; and of the real model's two voices, from its record. Bits a weight: NF4 4.127, symmetric 4.25, asymmetric 4.3125.

# %% tags=["nbval-ignore-output"]
from helpers.harness.audit import grids_on_the_real_model

texts = study.texts
small_group = min(64, group)
grids = {"NF4": Simulation("NF4", Nf4(), (), full), "INT4, symmetric": Simulation("INT4", Rtn(4, small_group), (), full),
         "INT4, asymmetric": Simulation("INT4 asymmetric", Rtn(4, small_group, sym=False), (), full)}
of = {"16 bits": texts.scores(full), **{name: texts.scores(v) for name, v in grids.items()}}
here = pd.DataFrame({name: {t: np.exp((p := s.select(t).all).nll.sum() / p.tokens.sum()) for t in dict.fromkeys(
    s.tasks.tolist())} for name, s in of.items()})
real = grids_on_the_real_model()
pd.concat([here, real]).round(3)

# %%
both = pd.concat([here, real])
gained = {rival: both[f"INT4, {rival}"] - both["NF4"] for rival in ("symmetric", "asymmetric")}
nearer = real_less("recipes", "recipes, 4 bits: NF4", "recipes, 4 bits: rounding")
half = {rival: bool((g > 0.25).all() and (g < 0.75).all()) for rival, g in gained.items()}
audit.say(8, "NF4's grid beats uniform INT4 by about 0.5 perplexity", HOLDS if all(half.values()) else CONDITIONS if any(
    half.values()) or (gained["symmetric"] > 0).all() else NOT,
    "; ".join(f"over {rival}: " + ", ".join(f"{t} {x:+.2f}" for t, x in g.items()) for rival, g in gained.items())
    + ". No one number: it depends on the text's own perplexity, and on whether the grid has a zero point. By KL on the real "
    "model NF4 is nearer to 16 bits than both: " + ", ".join(f"{w} {i.estimate:+.2f}" for w, i in nearer.items())
    + " against asymmetric, more against symmetric",
    "this chapter; [chapter 4](04_nf4.ipynb)", f"{QLORA}, 27.41 against 34.34, mean over models")

# %% [markdown]
# **C15: the same width does not mean the same quality or latency.** **C21: BF16 is the compute dtype to choose for NF4.**

# %%
recipes = panels("recipes")
range_of = {whose: [min(k), max(k)] for whose, of_ in recipes.items() if (k := [
    r["kl"][0] for r in of_["recipes, 4 bits"].values()])}
apart = {whose: most / least for whose, (least, most) in range_of.items()}
audit.say(15, "the same bit width does not mean the same quality or latency", HOLDS if min(apart.values()) > 2 else NOT,
          "at 4 bits the recipes' KL is " + ", ".join(f"{whose}: {x:.1f}" for whose, x in apart.items()) + " times apart; "
          "latency by format: [chapter 9](09_harness.ipynb)", "[chapter 5](05_gptq.ipynb)")

dtypes = read("sweep_nf4").data["sweeps"]["compute dtype"]
most = max(abs(x) for r in dtypes.values() for x in r["kl_against_first"])
audit.say(21, "BF16 is the compute dtype to choose for NF4", CONDITIONS if most < 0.001 else NOT,
          f"bundled: fp32, fp16 and bf16 differ by less than {most:.4f} in KL, so by quality it is as good as any; by speed "
          "undecided here", "[chapter 4](04_nf4.ipynb)", QLORA, "make bench, on a GPU")

# %% [markdown]
# ## Which method: C6, C12, C17, C19
#
# **C6: AWQ has the best 4-bit quality on instructions, NF4 slightly less.**

# %% tags=["nbval-ignore-output"]
shown = ("NF4", "GPTQ", "GPTQ, desc_act, searched scales", "AWQ")
table_6 = pd.DataFrame({whose: {name: of_["recipes, 4 bits"][name]["kl"][0] for name in shown
                                if name in of_["recipes, 4 bits"]} for whose, of_ in recipes.items()})
table_6.map("{:.3g}".format)

# %%
first = {whose: column.idxmin() for whose, column in table_6.items()}
beats = told("recipes, 4 bits", "AWQ", "recipes")
audit.say(6, "AWQ has the best 4-bit quality on instruction tasks, NF4 slightly less", HOLDS if set(first.values()) == {
    "AWQ"} else CONDITIONS if LOWER in beats.values() else NOT,
    f"AWQ against plain GPTQ: {said(beats)}. The least KL of the four: " + ", ".join(
        f"{whose}: {name}" for whose, name in first.items()), "[chapter 6](06_awq.ipynb)", AWQ,
    "make compare MODEL=... METHODS='nf4 awq gptq:sym=false,search=false,act_group_aware=false'")

# %% [markdown]
# **C12: attention, MLP and head do not fail equally; a head in high precision protects quality.** From the map of
# [chapter 7](07_sensitivity.ipynb), each linear alone at 3 bits by GPTQ:

# %%
from helpers.harness.sensitivity import stored

full_cells, cells_of = stored()
damage = {}
for (layer, method), arrays in cells_of.items():
    if isinstance(method, Gptq) and method.bits == 3 and ".layers." in layer:
        damage.setdefault(layer.rsplit(".", 1)[-1], []).append(arrays["answer_kl"].sum() / arrays["answer_tokens"].sum())
mean = {kind: float(np.mean(values)) for kind, values in damage.items()}
head = read("sweep_nf4").data["sweeps"]["output head"]["NF4"]
apart = max(mean.values()) / min(mean.values())
print({kind: round(1000 * x, 2) for kind, x in sorted(mean.items(), key=lambda i: -i[1])}, "thousandths of a nat")
audit.say(12, "attention, MLP and head do not fail equally; a head in high precision protects quality", HOLDS if (
    apart > 2 and verdict(head) == HIGHER) else CONDITIONS,
    f"bundled: kinds of linears are up to {apart:.1f} times apart; a head in NF4 too raises KL by "
    f"{plots.between(head['kl_against_first'], '.4f')}. Real: values do a third of all damage, NF4 for the head as well "
    "adds half of NF4's own KL",
    "[chapter 7](07_sensitivity.ipynb)", "", "make sensitivity MODEL=...")

# %% [markdown]
# **C17: perplexity can look fine while answers are poor.** The first failure of [chapter 10](10_choosing.ipynb):

# %% tags=["nbval-ignore-output"]
prose = seen(on_prose(study, requests), study)
table([prose]).T

# %%
fine = prose.before[prose.failure.fine].outcome == "pass"
audit.say(17, "perplexity can look fine while answers are poor", HOLDS if fine and prose.detected else UNDECIDED,
          "GPTQ at 3 bits calibrated on prose: the loss on prose passes its gate, KL on answers fails its own" if fine and (
              prose.detected) else "on this model the gates do not tell them apart",
          "this chapter; [chapter 10](10_choosing.ipynb)", "", "make compare PROMPTS=...")

# %% [markdown]
# **C19: selective precision often beats one low width for the whole model.** The plans of [chapter 7](07_sensitivity.ipynb)
# against the best uniform setting of no more bytes, paired by question:

# %%
from helpers.harness.audit import plans_against_uniform

beaten = plans_against_uniform()
print({budget: SAID[said] for budget, said in beaten.items()})
better, lost = (sum(v == sign for v in beaten.values()) for sign in (-1, 1))
audit.say(19, "selective precision often beats full-model low-bit conversion", HOLDS if (
    better > len(beaten) / 2 and not lost) else CONDITIONS,
    f"bundled: lower KL than the best uniform setting of no more bytes at {better} of {len(beaten)} budgets, worse at {lost}. "
    "No difference at 4.25 bits, where 4 bits in groups of 128 fit exactly; rules of thumb are mostly worse",
    "[chapter 7](07_sensitivity.ipynb)", "", "make sensitivity MODEL=...")

# %% [markdown]
# ## Memory, speed, effort: C7, C10, C11, C13, C14, C16, C24
#
# **C10: GPTQ takes 70B from 140 to about 35 GB with under one point of perplexity lost.** The bytes are arithmetic:

# %%
from helpers.measure.bytes import predicted_bytes
from helpers.measure.shapes import SHAPES

sixteen, four = predicted_bytes(SHAPES["70B"]), predicted_bytes(SHAPES["70B"], Gptq())
print(f"{sixteen:,} to {four:,} bytes")
assert (sixteen, four) == (137_953_296_384, 36_638_572_544)
audit.say(10, "GPTQ takes 70B from 140 GB to about 35 GB at under one point of perplexity", CONDITIONS,
          f"{sixteen / 1e9:.1f} to {four / 1e9:.1f} GB with scales, zeros and order of columns. The loss is not measured here; "
          "published: 3.32 to 3.42", "this chapter", AWQ, "make compare MODEL=... METHODS=gptq, on 80 GB")

# %% [markdown]
# **C16: memory can be won without latency.** **C24: asymptotic cost stays, constant factors decide.** A linear of $m \times n$
# multiplies $mn$ numbers a token at any width; what differs is how they are stored and fetched. Served:

# %% tags=["nbval-ignore-output"]
from helpers.harness.served import slower

slower()

# %%
load = read("served").data["load"]
factors = [r["itl_ms"]["p50"] / load["16 bits"][key]["itl_ms"]["p50"] for name in ("GPTQ file", "AWQ file")
           for key, r in load[name].items()]
case = read("cases").data["small"]["chatbot"]
four, sixteen = case["variants"]["gptq:search=false,act_group_aware=false"]["served"], case["served_bf16"]
elsewhere = four["1"]["itl_ms"][0] / sixteen["1"]["itl_ms"][0]
audit.say(16, "memory can be won without latency", HOLDS if min(*factors, elsewhere) > 1 else NOT,
          f"vLLM on two cores: ITL of 4-bit files is {min(factors):.1f} to {max(factors):.1f} times that of 16 bits; on "
          f"another processor, of the real model, {elsewhere:.1f} times that of bfloat16",
          "[chapters 9](09_harness.ipynb), [10](10_choosing.ipynb)", "", "make served, on a GPU")
others = [r["itl_ms"]["p50"] / load["16 bits"][key]["itl_ms"]["p50"] for key, r in load["16 bits, bf16"].items()]
audit.say(24, "asymptotic cost does not change, constant factors decide", HOLDS if max(factors) / min(others) > 2 else NOT,
          f"the same multiplications, {min(others):.2f} to {max(factors):.1f} times the latency, by format and rate",
          "this chapter; [chapter 9](09_harness.ipynb)")

# %% [markdown]
# **C7: AWQ avoids the Hessian and so quantizes 2 to 4 times faster than GPTQ.** **C14: NF4 is fastest to deploy.** Timed side
# by side on the same calibration windows, from the record of `python -m benchmarks.effort`:

# %% tags=["nbval-ignore-output"]
effort = read("effort").data
pd.DataFrame({f"{size}, seconds": {side: np.median(runs["seconds"]) for side, runs in of_["runs"].items()}
              for size, of_ in effort["models"].items()}).round(2)

# %%
ratios = {f"{size}, {maker}": r for size, of_ in effort["models"].items() for maker, r in of_["gptq_over_awq"].items()}
seconds = {side: np.median(runs["seconds"]) for side, runs in effort["models"]["bundled"]["runs"].items()}
hessian = {size: sum(of_["share_of_gptq"].values()) for size, of_ in effort["models"].items()}
audit.say(7, "AWQ avoids the Hessian and so quantizes 2 to 4 times faster than GPTQ, at equal quality", HOLDS if all(
    2 <= r <= 4 for r in ratios.values()) else CONDITIONS if max(ratios.values()) > 1 else NOT,
    "time of GPTQ / time of AWQ: " + ", ".join(f"{k} {r:.2f}" for k, r in ratios.items()) + f". Collecting and factoring the "
    f"Hessian is {hessian['bundled']:.0%} and {hessian['larger']:.0%} of our GPTQ; AWQ's search for scales takes longer",
    "this chapter", AWQ)
audit.say(14, "NF4 is fastest to deploy: no calibration, no new file", HOLDS if seconds["bitsandbytes-nf4"] < min(
    seconds["gptqmodel-gptq"], seconds["gptqmodel-awq"]) else NOT,
    f"bundled: {seconds['bitsandbytes-nf4']:.1f} s while loading; GPTQModel's GPTQ {seconds['gptqmodel-gptq']:.1f} s, AWQ "
    f"{seconds['gptqmodel-awq']:.1f} s, once", "this chapter", QLORA)

# %% [markdown]
# **C11: QLoRA fine-tunes as BF16 does with 4 times less memory; 70B on "2×A100 (80 GB total)".** First the bytes: weights,
# adapters of rank 64 with gradients and Adam's moments, and an upper bound on activations of 2,048 tokens with checkpoints at
# each block.

# %%
from helpers.measure.finetune import finetuning_bytes, fits_gpus

ways = {"all weights": (None, None), "LoRA on 16 bits": (None, 64), "QLoRA": (Nf4(), 64)}
parts = {(size, way): finetuning_bytes(config, base, rank, 2048) for size, config in SHAPES.items()
         for way, (base, rank) in ways.items()}
pd.DataFrame({of_: {"GB": f"{sum(p.values()) / 1e9:.1f}", "one GPU of 80": fits_gpus(p, 80), "two of 40": fits_gpus(p, 40, 2),
                    "two of 80": fits_gpus(p, 80, 2)} for of_, p in parts.items()}).T

# %% [markdown]
# Then the learning: both on this model, English prose that it was not trained on, four seeds (two on a larger one); a pair has
# the same batches and the same first adapters. The band is a 95 % interval over seeds (Student's t).

# %% tags=["nbval-ignore-output"]
from scipy.stats import t as student

from helpers.measure.finetune import BASES, train, with_adapters
from helpers.measure.tasks import text
from helpers.models.quantize import quantized
from helpers.models.texts import context_of

length = min(128, context_of(study.tokenizer, full.config))
learned = windows(calibration(study.tokenizer, "novel"), length, 200)
held_out = windows([study.tokenizer.encode(text("novel")[n]) for n in range(0, 40, 5)], length, 8)
bases = {name: quantized(full.load(study.device), method, ()) for name, method in BASES.items()}
runs = {name: [train(with_adapters(lm, 8, seed=seed), learned, 20, seed, held_out) for seed in range(max(2, draws))]
        for name, lm in bases.items()}


def over_seeds(values):
    """(mean, half of the 95 % interval) of [seeds, points]."""
    return values.mean(0), student.ppf(0.975, len(values) - 1) * values.std(0, ddof=1) / len(values) ** 0.5


figure, ax = plt.subplots(figsize=(5, 2.8))
losses = {name: np.stack([r.held_out.mean(1) for r in of_]) for name, of_ in runs.items()}
for name, marker in (("16 bits", "o"), ("NF4", "D")):
    mean, half = over_seeds(losses[name])
    ax.errorbar(runs[name][0].at, mean, half, fmt=f"-{marker}", capsize=3, label=name)
ax.set(xlabel="steps", ylabel="held-out loss (nats/token)")
ax.legend()
plt.show()

# %% [markdown]
# *Held-out loss of adapters on a 16-bit base and on an NF4 base.*

# %%
(apart_at_end,), (half,) = ((x[-1],) for x in over_seeds(losses["NF4"] - losses["16 bits"]))
learned_by = (losses["16 bits"][:, 0] - losses["16 bits"][:, -1]).mean()
total = {k: sum(p.values()) for k, p in parts.items()}
less = {size: total[size, "LoRA on 16 bits"] / total[size, "QLoRA"] for size in SHAPES}
near = abs(apart_at_end) < 0.05 * learned_by
print(f"NF4 less 16 bits at the end: {'within' if near else 'beyond'} a twentieth of what was learned")
audit.say(11, "QLoRA: near-BF16 fine-tuning with 4 times less memory; 70B on 2×A100 (80 GB total)", CONDITIONS if (
    near and max(less.values()) < 4) else HOLDS if near else NOT,
    "memory against LoRA on 16 bits: " + ", ".join(f"{size} {x:.1f}" for size, x in less.items()) + " times less (against "
    f"training all weights: 70B {total['70B', 'all weights'] / total['70B', 'QLoRA']:.0f}). 70B on two GPUs of 40 GB: "
    f"{'fits' if fits_gpus(parts['70B', 'QLoRA'], 40, 2) else 'does not fit'}, of 80 GB: "
    f"{'fits' if fits_gpus(parts['70B', 'QLoRA'], 80, 2) else 'does not fit'}. Loss after 20 steps on this model: NF4 less 16 "
    f"bits {apart_at_end:+.3f} ± {half:.3f}, of {learned_by:.2f} learned", "this chapter", QLORA, "training 70B, on 2×80 GB")

# %% [markdown]
# **C13: GPTQ runs on "ExInt4" kernels on AMD and NVIDIA, AWQ on fused AutoAWQ kernels.** The kernels that the installed
# GPTQModel knows:

# %%
from pathlib import Path

spec = importlib.util.find_spec("gptqmodel")
folder = Path(spec.origin).parent / "nn_modules" / "qlinear" if spec else None
kernels = sorted(p.stem for p in folder.glob("*.py") if not p.stem.startswith("_")) if folder else []
named = [k for k in kernels if "exint4" in k.lower()]
audit.say(13, '"ExInt4" kernels for GPTQ on AMD and NVIDIA, fused AutoAWQ kernels for AWQ', NOT if not named else CONDITIONS,
          "GPTQModel has no kernel of that name; its ExLlama kernels are what is meant, and AutoAWQ is archived. What runs "
          "on which GPU: undecided here", "this chapter; [chapter 9](09_harness.ipynb)", "",
          "python -m helpers.harness.portability, on each GPU")

# %% tags=["nbval-ignore-output"]
print(", ".join(kernels) or "GPTQModel is not installed here")

# %% [markdown]
# ## The article's three programs: C22
#
# What happens to someone who runs them today. The third quantizes on three strings, with both archived toolkits (their own
# environment, in one run):

# %%
from helpers.toolkits.artefacts import example_3

steps = example_3()
for step, came in steps.items():
    print(f"{step}: {came}")
audit.say(22, "the third program runs as printed", HOLDS if steps["AutoGPTQ, three strings, as printed"] == "done" else NOT,
          f"AutoGPTQ: {steps['AutoGPTQ, three strings, as printed']}", "this chapter; [chapter 2](02_pipelines.ipynb)")

# %% [markdown]
# In this environment, that of today:

# %%
for package in ("auto_gptq", "awq"):
    print(f"import {package}: {'there' if importlib.util.find_spec(package) else 'no such module'}")

# %% [markdown]
# The first program loads a GPTQ and an AWQ checkpoint and times one answer; the second loads a model in NF4. They name models
# on a hub; with files that are here, and GPTQModel in the place of the two, both work. The first, on the committed artefacts:

# %% tags=["nbval-ignore-output"]
import time

from transformers import AutoTokenizer

from helpers.measure.answers import greedy
from helpers.models.source import BUNDLED
from helpers.toolkits.artefacts import reload

tokenizer = AutoTokenizer.from_pretrained(BUNDLED)
asked = tokenizer.apply_chat_template([{"role": "user", "content": "What is 12 + 30?"}], add_generation_prompt=True,
                                      return_tensors="pt", return_dict=True)
for name in ("autogptq-gptq", "autoawq-awq"):
    lm = reload(COMMITTED / name)
    lm.generate(**asked, generation_config=greedy(1, pad_token_id=0))  # what is done once
    started = time.perf_counter()
    answer = lm.generate(**asked, generation_config=greedy(16, pad_token_id=0))
    print(f"{name}: {tokenizer.decode(answer[0, asked['input_ids'].shape[1]:], skip_special_tokens=True)!r}, "
          f"{time.perf_counter() - started:.2f} s")

# %% [markdown]
# And the second, with the settings that it prints:

# %% tags=["nbval-ignore-output"]
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

nf4 = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
                         bnb_4bit_compute_dtype=torch.bfloat16)
lm = AutoModelForCausalLM.from_pretrained(BUNDLED, quantization_config=nf4, device_map="cpu")
answer = lm.generate(**asked, generation_config=greedy(16, pad_token_id=0))
print(tokenizer.decode(answer[0, asked["input_ids"].shape[1]:], skip_special_tokens=True))

# %% [markdown]
# ## All of them

# %% tags=["nbval-ignore-output"]
figure, ax = plt.subplots(figsize=(7, 2.4), layout="constrained")
audit.draw(ax)

# %% [markdown]
# *The verdicts.*

# %% tags=["nbval-ignore-output"]
audit.table()

# %%
not_applicable = [] if asks_recall else [18]
assert audit.missing() == not_applicable
print(f"{len(audit.findings)} of 24 claims have a verdict (guessed: {hold_guess} hold, {fail_guess} do not)")
print(audit.counts())

# %% [markdown]
# ## Where it breaks
#
# - *Two models.* "Holds" means: on what its row names, which for C3, C14, C17 and C19 is the bundled model alone, and for C24
#   a shape with random weights. A claim on "4-bit models" is about more than that.
# - *Our words.* A claim is judged as we read it; the article's own sentence may have meant less.
# - *Speed.* What was timed was timed on CPUs. The commands for a GPU are there.
#
# ## Summary
#
# Of three claims on what a method is two hold; those that name a winner or a number mostly hold with conditions or not at all;
# the article's third program does not run as printed. A measure and a rule written first found it out; a GPU was used for
# some of the real model's sweeps alone.
#
# ## Exercises
#
# 1. Take a sentence on quantization from any other text, make it checkable, and add a cell that judges it.
#
# <details><summary>Solution</summary>
#
# Say which measure, on which model, against what, and which result would refute it; then write the rule before you run it.
# </details>
#
# 2. C10 says "about 35 GB". Which group size would give that?
#
# <details><summary>Solution</summary>
#
# None at 4 bits: codes alone are 34.2 GB and the head and embedding in 16 bits 1.05 GB. Whole rows come nearest.
# </details>
#
# ## Quiz
#
# 1. Why does "undecided here" name a command?
# 2. A claim holds on the bundled model and fails on the real one. What is its verdict?
#
# <details><summary>Answers</summary>
#
# 1. So that whoever has the machine can decide it. 2. It holds with conditions, and the conditions are the finding.
# </details>
#
# **Next**: [chapter 12](12_two_models.ipynb), how far one small model's findings carry; and your own model, `make compare
# MODEL=...`. *References*: [GPTQ](https://arxiv.org/abs/2210.17323), [AWQ](https://arxiv.org/abs/2306.00978),
# [QLoRA](https://arxiv.org/abs/2305.14314); the article is in the bibliography.
