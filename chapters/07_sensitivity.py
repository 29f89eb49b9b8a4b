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
# # 7. Which layers must not be 4-bit
#
# **After this chapter** you can measure what each layer of a model does when it alone is quantized, say what a cheap score is
# worth beside that measurement, and turn it into a plan of mixed widths that is not worse than a uniform one of its bytes.
#
# *Needs*: chapters [3](03_error_formula.ipynb) (output error) and [5](05_gptq.ipynb). *Time*: about a minute on a laptop CPU,
# most of it from stored measurements. *On a GPU*: the same cells.
#
# "Attention projections, MLP projections and output heads do not fail equally" is said often and measured seldom. The systems
# that mix widths (NVIDIA ModelOpt's `auto_quantize`, AutoRound's AutoScheme, EXL3, llama.cpp's imatrix) each go by a score of
# their own. Here each score is held against what it stands for: the effect on the whole model's answers.

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

# %% [markdown]
# ## By hand
#
# Two linears, of 4 and of 8 weights; each may get 2, 3 or 4 bits. Alone, each does this damage (say, KL in thousandths):
#
# | | 2 bits | 3 bits | 4 bits |
# |---|---|---|---|
# | small, 4 weights | 9 | 6 | 1 |
# | large, 8 weights | 8 | 2 | 1 |
#
# The budget is 40 bits. Uniform 3 bits takes 36 and does 6 + 2 = 8. The small one is dear per weight and cheap to raise: 4 bits
# for it and 3 for the large one take exactly 40, and do 3. Nine combinations can be tried by hand; in general
#
# $$\min_x \sum_{l,o} d_{lo} x_{lo} \;\text{with}\; \sum_{l,o} b_{lo} x_{lo} \le B, \; \sum_o x_{lo} = 1, \; x_{lo} \in \{0,
# 1\} \tag{7.1}$$
#
# ($l$ is a layer, $o$ one of its options, with the damage $d_{lo}$ and $b_{lo}$ bits; $x_{lo} = 1$ if it is taken, and $B$ is
# the budget) is a knapsack with one choice a layer, which an integer program solves exactly.

# %%
from itertools import product

from helpers.harness.allocate import Option, allocate
from helpers.methods.rtn import Rtn

damage = {"small": {2: 9, 3: 6, 4: 1}, "large": {2: 8, 3: 2, 4: 1}}
weights = {"small": 4, "large": 8}
by_hand = min((damage["small"][a] + damage["large"][b], a, b) for a, b in product((2, 3, 4), repeat=2) if 4 * a + 8 * b <= 40)
found = allocate({n: [Option(Rtn(bits), bits * weights[n], d) for bits, d in of.items()] for n, of in damage.items()}, 40)
assert (found.damage, found.methods["small"].bits, found.methods["large"].bits) == by_hand
print(f"small {by_hand[1]} bits, large {by_hand[2]} bits: damage {by_hand[0]}")

# %% [markdown]
# What is $d_{lo}$? That is the rest of the chapter: measured dearly, guessed cheaply, and whether damages add up.
#
# ## One layer alone
#
# To measure a layer of block $b$, everything before block $b$ is as it was. The unchanged model goes through the questions
# once; each change leaves it at its own block:

# %%
import inspect

import torch
from transformers import AutoTokenizer

from helpers.book import settings
from helpers.harness.sensitivity import Sensitivity
from helpers.harness.study import material
from helpers.measure.quality import Judge
from helpers.measure.tasks import encode_all
from helpers.methods.gptq import PLAIN, Gptq
from helpers.methods.keep import Keep
from helpers.models import branches
from helpers.models.layers import common_group
from helpers.models.method import Plan
from helpers.models.quantize import quantized
from helpers.models.source import BUNDLED, resolve

run_on = settings(model, profile)
is_bundled = resolve(run_on["model"], run_on["revision"]) == BUNDLED
given = material(*(run_on[k] for k in ("model", "revision", "dtype", "device")), limit=8 if is_bundled else 1)
full = given.full
tokenizer = AutoTokenizer.from_pretrained(full.folder)
items = encode_all(tokenizer, given.tune, full.config)
live = Sensitivity(items, given.tokens[:16], full, device=run_on["device"])
lm = full.load(run_on["device"])
size = common_group(lm)  # 128, or what divides this model's widths
inside = list(live.shapes)[1:-1]
print(inspect.getsource(branches.branch))

# %% [markdown]
# The same number as the loop that everybody writes first, which copies the model, quantizes it with all other layers kept, and
# scores it from the beginning:

# %%
from helpers.measure.sensitivity import downwards

middle, method = inside[len(inside) // 2], Gptq(3, size)
[(_, _, cell)] = downwards(live.panel, [method], live.tokens, lambda name, _: name == middle)
changed = quantized(lm, Plan(Keep(), ((f"^{middle}$", method),), inputs="model"), live.tokens)
whole = Judge(items, lm).score(changed).answer
assert abs(whole.kl.sum() - cell["answer_kl"].sum()) < 0.02 * whole.kl.sum() + 1e-6
print(f"{middle} alone at 3 bits: the same KL both ways, on {len(items)} questions")

# %% [markdown]
# With $L$ blocks that is $(L + 1) / 2L$ of the loop's passes through blocks. In the last block all but keys and values is
# computed where answers stand and nowhere else, and codes come from one set of Gram matrices instead of a calibration for each.
# On the bundled model, measured when nothing else ran:

# %%
from helpers.results import read

speed = read("map_speed").data
for part in ("quantize", "forward", "whole"):
    ours, naive = speed["ours_s"][part], speed["naive_s"][part]
    print(f"{part:9} {ours:7.1f} s against {naive:7.1f} s: {ours / naive:.2f} of it")
L = speed["blocks"]
print(f"(L + 1) / 2L = {(L + 1) / (2 * L):.3f}; {speed['linears']} linears, {len(speed['settings'])} settings; "
      f"largest difference of a KL {speed['largest_relative_difference_of_kl']:.1g} of it")

# %% [markdown]
# ## Predict
#
# Before you look: of `q k v o gate up down`, which kind does most damage at 3 bits, summed over the blocks? Which block?
# Change the defaults if you disagree.

# %%
worst_kind, worst_block = "down_proj", 0

# %% [markdown]
# ## The map
#
# Every linear alone, the output head and the embedding, by rounding, GPTQ and AWQ at 4, 3 and 2 bits and by NF4, on the
# *tuning* questions (those that judge the plan in the end are not touched). For the bundled model from a stored record
# (`make maps`); for any other this cell measures two settings in the first, the middle and the last block, on a question a
# task (`make sensitivity MODEL=...` measures every block, and keeps it).

# %%
import matplotlib.pyplot as plt
import pandas as pd

from helpers import maps
from helpers.harness.sensitivity import stored, table, where

if is_bundled:
    reference, cells = stored()
else:
    reference, methods = live.panel.score(), [Rtn(3, size), Gptq(3, size, **PLAIN)]
    some = [n for n in live.shapes if where(n)[0] in (None, 0, live.count // 2, live.count - 1)]
    cells = {k: c.arrays for k, c in live.down(methods, some).items()}
frame = table(cells, reference)
shown = list(dict.fromkeys(frame.setting))
norm = maps.common_norm(frame)
rows = -(-len(shown) // 3) if len(shown) > 3 else 1
figure, axes = plt.subplots(rows, min(3, len(shown)), figsize=(9, 2.1 * rows + 0.4), squeeze=False, layout="constrained")
for ax in axes.flat[len(shown):]:
    ax.set_visible(False)
for ax, setting in zip(axes.flat, shown, strict=False):
    image = maps.heat_map(ax, frame[frame.setting == setting], norm, f"{setting.name}, {getattr(setting, 'bits', 4)} bits")
figure.colorbar(image, ax=axes, label="KL (nats/token)", shrink=0.7)
plt.show()

# %% [markdown]
# *KL of the model in which one linear is quantized, the numbers in thousandths of a nat a token; one scale of colours for all.*

# %%
def by(what, setting):
    """KL of single linears, summed by kind or block, thousandths of a nat."""
    mine = frame[(frame.setting == setting) & frame.block.notna()]
    return mine.assign(kl=[1000 * k.estimate for k in mine.kl]).groupby(what).kl.sum().sort_values(ascending=False)


at = next(m for m in shown if m.name == "gptq" and m.bits == 3)
kinds, blocks = by("kind", at), by("block", at)
print("by kind:", ", ".join(f"{k} {v:.2f}" for k, v in kinds.items()))
print("by block:", ", ".join(f"{int(b)} {v:.2f}" for b, v in blocks.items()))
ends = {row.layer: row.kl for row in frame[(frame.setting == at) & frame.block.isna()].itertuples()}
print("; ".join(f"{n}: {k}" for n, k in ends.items()))
print("your kind:", kinds.index[0] == worst_kind, "| your block:", int(blocks.index[0]) == worst_block)

# %% [markdown]
# On the bundled model (thousandths of a nat, summed over four blocks, 3 bits):
#
# - *The worst kind is a matter of the method.* By rounding it is `o_proj` (25) and `v_proj` (14), and the first block does six
#   times the damage of the last. GPTQ takes most of that away: `o_proj` 6.1, `down_proj` 5.1, `gate_proj` 3.2, and blocks that
#   are alike (4.3 to 6.0). ModelOpt and AutoScheme score layers by rounding, whatever quantizes them in the end.
# - *Queries and keys* do least under GPTQ (1.1 and 1.3). They are also an eighth of the weights.
# - *The ends*: the head does 8.4 by rounding, 4.0 by GPTQ and 2.6 by AWQ; the embedding, which only rounding can treat, 20. At
#   2 bits the embedding is worse than any kind of linear (609).
#
# %% [markdown]
# ## The same on a real model
#
# SmolLM2 (chapter 12) has thirty blocks, so its map was taken at 3 bits alone, in groups of 64, on 35 texts of its tuning set
# (stored: `python -m benchmarks.small_map`). GPTQ took the columns as they are and searched its scales, all above zero: the
# default of that time.
# Is it the same kind that is dearest?

# %%
from helpers.measure.stats import Interval

real = read("small_map").data
frames = {name: pd.DataFrame([(*where(n), Interval(*of[setting])) for n, of in real["map"].items() if setting in of],
                             columns=["block", "kind", "kl"])
          for name, setting in (("rounding", str(Rtn(3, 64))), ("GPTQ", str(Gptq(3, 64, act_group_aware=False))))}
norm = maps.common_norm(pd.concat(frames.values()))
figure, axes = plt.subplots(1, 2, figsize=(8, 5), layout="constrained")
for ax, (name, f) in zip(axes, frames.items(), strict=True):
    image = maps.heat_map(ax, f, norm, f"SmolLM2, 3 bits, {name}")
    ax.set_yticks(range(0, 30, 5), range(0, 30, 5))
figure.colorbar(image, ax=axes, label="KL (nats/token)", shrink=0.7)
plt.show()
for name, f in frames.items():
    linears = f[f.block.notna()].assign(kl=lambda it: [1000 * k.estimate for k in it.kl])
    kinds, blocks = (linears.groupby(w).kl.sum().sort_values(ascending=False) for w in ("kind", "block"))
    print(f"{name}, of {linears.kl.sum():.0f}:", ", ".join(f"{k} {v:.0f}" for k, v in kinds.items()), "| blocks:",
          ", ".join(f"{int(b)} {v:.0f}" for b, v in blocks.head(3).items()))
    print("  ends:", ", ".join(f"{row.kind} {1000 * row.kl.estimate:.0f}" for row in f[f.block.isna()].itertuples()))

# %% [markdown]
# (Thousandths of a nat a token.) It is not. *Values*, a thirtieth of the block's weights, do a third of all damage under GPTQ
# (205 of 641); on the bundled model they are in the middle, and `o_proj` is first, which on this one is nearly last. By
# rounding `down_proj` leads. *The last block* alone does 18 % of the damage by rounding and 8 % by GPTQ, where one block in
# thirty would do 3 %; on the bundled model, by rounding, it is the first. *The head* by GPTQ does twice what the worst
# block does. By GPTQ queries do least on both models.
#
# So which layers to raise is to be measured on the model at hand. By the maps 8 bits for `o_proj` should help the bundled model
# most, and 8 bits for the values the real one. Do they? (Of the real one two kinds were tried.) Everything at 3 bits by GPTQ
# and one kind in 8: KL less that of everything at 3 bits, in % of it.

# %% tags=["nbval-ignore-output"]
from helpers.harness import carry

carry.side_by_side("raised").loc["3 bits, in 8 bits"]

# %% [markdown]
# Of those tried the maps name the right one. On the real model 8 bits for the values alone, 0.16 bits a weight, take a third to
# two fifths of the KL away, and `o_proj`, three times as large, a tenth at most; on the bundled model `o_proj` does most, and
# twice what the values do. (On texts that the maps did not see; one draw on the real model, two on the bundled one.)
#
# %% [markdown]
# ## What fails first
#
# One kind at a time, in all blocks, rounded to 2 bits with everything else in 16: which answers go? (Stored: the bundled
# model, questions of the judging set.)

# %%
import numpy as np

from helpers.measure.stats import mcnemar
from helpers.measure.tasks import title
from helpers.store import values

plans = values("plans")
before = plans["16 bits"]
failing = {name.split()[0]: plans[name] for name in plans if name.endswith("alone at 2 bits")}
tasks = list(dict.fromkeys(before["task"]))
change = pd.DataFrame({kind: {title(t): 100 * (a["exact"][0][a["task"] == t].mean() - before["exact"][0][a["task"] == t].mean())
                              for t in tasks} for kind, a in failing.items()})
change.columns = [k.removesuffix("_proj") for k in change]
figure, ax = plt.subplots(figsize=(6.5, 4.2))
ax.imshow(change, cmap="RdBu", vmin=-100, vmax=100, aspect="auto")
for y, x in np.ndindex(*change.shape):
    ax.text(x, y, f"{change.iloc[y, x]:+.0f}", ha="center", va="center", fontsize=8,
            color="white" if abs(change.iloc[y, x]) > 60 else "black")
ax.set_xticks(range(change.shape[1]), change.columns)
ax.set_yticks(range(change.shape[0]), change.index, fontsize=8)
ax.set(title="right answers, change in points, when one kind is rounded to 2 bits")
ax.grid(visible=False)
plt.show()

# %%
for kind, a in failing.items():
    flips = mcnemar(before["exact"][0], a["exact"][0])
    print(f"{kind:10} {flips.lost:4} answers lost, {flips.won:2} won of {len(a['exact'][0])}, p {flips.p_value:.1g}")

# %% [markdown]
# Values and attention outputs first, and with them everything that has a form: JSON, tool calls and condensing lose half to
# four fifths of their answers. Facts of the tail and two-step arithmetic go with any kind, queries and keys included. Recall
# of near pairs never fails. Each linear of the MLP, a quarter of the weights, loses 33 to 44 of the 520 answers, somewhat fewer
# than queries or keys: most of them facts of the tail and arithmetic.
#
# %% [markdown]
# ## Upwards
#
# (From here to the end all is the bundled model's: no plan was made for the real one.)
#
# Downwards, a layer is quantized in a model without other errors. Upwards, it is put back to 16 bits in a model whose other
# layers are all at 2 (or 3) bits: EXL3 measures so. What does each way say of the kinds?
#
# (The bundled model's map is of GPTQ with scales fitted to the range. This record and the plans below are of searched scales,
# all above zero. Both have the columns in the order as they are; today's default has scales of either sign and the group-aware
# order. On this model no gain of that order can be told, and on its tuning set a small loss: chapter 12.)

# %%
from dataclasses import replace

from helpers.measure.stats import rank_correlation

record, usual = read("sensitivity").data, Gptq(act_group_aware=False)
layers = list(record["options"])
for bits, ups in record["upwards"].items():
    low = ups[""][0]
    gains = {k: 100 * (1 - v[0] / low) for k, v in ups.items() if k and not k.startswith("model.")}
    print(f"all at {bits} bits: KL {low:.3f}; put back to 16 bits, it falls by", ", ".join(
        f"{k.removesuffix('_proj')} {g:.0f} %" for k, g in gains.items()))
    down = [record["options"][n][str(replace(usual, bits=int(bits)))][0] for n in layers]
    up = [low - ups[n][0] for n in layers]
    print(f"  linear by linear, downwards against upwards: rank correlation {rank_correlation(down, up)}\n"
          f"  of the KL of all at once, single linears sum to {sum(down) / low:.2f} downwards and {sum(up) / low:.2f} upwards")

# %% [markdown]
# The two ways agree in part (rank correlation 0.5 to 0.6). Both ways the first two blocks matter more in the model at 2
# bits: upwards they are worth 61 and 62 % of its KL, against 25 and 19 % for the last two; downwards they do 62 % of the sum of
# single effects. And damages do not simply add: all
# linears together do 1.5 to 5 times what their single effects sum to, and putting single ones back promises more than there is
# to win.
#
# %% [markdown]
# ## Cheap and dear
#
# The effect of a layer on the answers takes a forward pass for each layer and setting. These scores take one pass of
# calibration text for all, or one and its gradients. With $\Delta W = W - \hat W$, inputs $X$, and gradients
# $G = \partial L / \partial Y$ of the text's loss in the outputs:

# %%
from helpers.measure import scores

print(inspect.getsource(scores).split("BY_WEIGHTS = ")[1].split("\n\n\ndef")[0])

# %% [markdown]
# (AutoScheme takes its gradients with all linears quantized at once, ModelOpt with none; here none is, for both.)
# How well does each rank the 28 linears of the bundled model, and how well all settings of all linears together?

# %%
cheap, setting = record["cheap"]["scores"], str(replace(usual, bits=3))
dear = {n: record["options"][n][setting][0] for n in layers}
mixed = [(n, s) for n in layers for s in record["options"][n]]
ranks = pd.DataFrame({score: {
    "linears, 3 bits": rank_correlation([of[n][setting] for n in layers], [dear[n] for n in layers]),
    "linears and settings": rank_correlation([of[n][s] for n, s in mixed], [record["options"][n][s][0] for n, s in mixed], 500)}
    for score, of in cheap.items()}).T
ranks.map(lambda i: f"{i.estimate:.2f} [{i.low:.2f}, {i.high:.2f}]")

# %%
figure, axes = plt.subplots(2, 3, figsize=(9, 5.2), sharey=True, layout="constrained")
for ax, (score, of) in zip(axes.flat, cheap.items(), strict=True):
    maps.against(ax, {n: of[n][setting] for n in layers}, dear, f"{score}: {ranks.loc[score, 'linears, 3 bits'].estimate:.2f}")
axes[0, 2].legend(fontsize=7, ncols=2)
figure.supxlabel("cheap score of a linear at 3 bits (each in its own unit)", fontsize=9)
figure.supylabel("KL when it alone is quantized (nats/token)", fontsize=9)
plt.show()

# %% [markdown]
# All scores tell 2 bits from 4. Of which *linear* is worse at a given width ModelOpt's, the output error and the error by the
# energy of inputs say a rank correlation of 0.62 to 0.66, and by 28 linears cannot be told from each other. The weight error,
# which needs no data, cannot be told from no information, nor can the error by Fisher's diagonal.
#
# %% [markdown]
# What they cost, for all settings together, on the machine of the record (seconds):

# %%
print({k: round(v) for k, v in record["cheap"]["seconds"].items()})

# %% [markdown]
# ## Do damages add up?
#
# A plan is a sum of single effects only if effects add up. Uniform settings and plans drawn at random, quantized for real,
# against what single effects foresee:
#
# $$\mathrm{KL} \approx c \left( \sum_l \mathrm{KL}_l^{\,p} \right)^{1/p} \tag{7.2}$$
#
# $p = 1$ is plain addition; below it, many small damages count for more than one of their sum.

# %%
def foreseen(methods, p):
    return sum(max(record["options"][n][s][0], 0) ** p for n, s in methods.items()) ** (1 / p)


real = [r for r in record["additivity"] if set(r["methods"].values()) <= set(record["options"][layers[0]])]
measured = np.log([r["kl"][0] for r in real])
fits = {}
for p in (0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0, 1.2):
    apart = measured - np.log([foreseen(r["methods"], p) for r in real])
    fits[p] = apart.std(), apart.mean()
best = min(fits, key=lambda p: fits[p][0])
for p, (spread, mean) in fits.items():
    print(f"p = {p}: c = {np.exp(mean):5.2f}, off by a factor of {np.exp(spread):.2f} (one standard deviation)")
slope, at_one = np.polyfit(np.log([foreseen(r["methods"], record["power"]) for r in real]), measured, 1)
print(f"best p: {best}; the planner uses {record['power']}; KL grows as the sum to the power {slope:.2f}")

# %%
figure, ax = plt.subplots(figsize=(4.6, 3.6))
for p, marker in ((1.0, "v"), (record["power"], "o")):
    sums = [np.exp(fits[p][1]) * foreseen(r["methods"], p) for r in real]
    ax.plot(sums, np.exp(measured), marker, mfc="none", label=f"p = {p}")
edges = [np.exp(measured).min(), np.exp(measured).max()]
ax.plot(edges, edges, color="0.5", linewidth=0.8)
ax.set(xscale="log", yscale="log", xlabel="foreseen KL (nats/token)", ylabel="measured KL (nats/token)")
ax.legend()
plt.show()

# %% [markdown]
# Between $p = 0.4$ and $p = 1$ the fits differ by a few percent, which this many plans cannot tell apart; all are off by a
# factor of 1.7, mostly because plans with many bits of damage do more than their sum. For ranking plans of one size that
# matters less.
#
# %% [markdown]
# ## A plan under a budget
#
# Each linear may get any width and group that was measured, or 16 bits; $q, k, v$ get the same, and so do gate and up, because
# serving engines fuse them into one matrix. Bits are counted as files have them: codes, scales, zero points, group indices.
# (Another model than the bundled one is planned by the cheap output error here: no forward pass for each linear.)

# %%
from helpers.harness.planner import Planner
from helpers.measure.sensitivity import alone
from helpers.models.formats import GPTQ
from helpers.models.method import Gram
from helpers.models.walk import walk
from helpers.quantizers.affine import output_error


def cheap_damage(methods):
    """||dW X||^2 of each linear and method, from one walk."""
    return {(f"{step.name}.{n}", m): output_error(step.block.get_submodule(n).weight.float() - layer.W_hat, gram.H)
            for step in walk(lm, live.tokens) for n, gram in step.grams(Gram).items() for m in methods
            if (layer := alone(step, n, m))}


if is_bundled:
    widths = {str(m): m for b in (2, 3, 4, 8) for g in (32, 64, 128) for m in [replace(usual, bits=b, group_size=g)]}
    kl = {(n, widths[s]): k[0] for n, of in record["options"].items() for s, k in of.items()}
else:
    kl = cheap_damage([Gptq(b, size) for b in (3, 4)])
planner = Planner(live, kl, GPTQ)
three, four = (planner.bits(Plan(Gptq(b, size))) for b in (3, 4))
budget = round((0.75 * three + 0.25 * four), 2)
allocation = planner.allocation(budget)
figure, ax = plt.subplots(figsize=(5, 0.8 + 0.35 * live.count))
maps.where_bits_went(ax, allocation.methods, f"{budget} bits a weight")
plt.show()

# %% [markdown]
# **Never worse than uniform.** The plan and the uniform settings that fit its bytes are quantized for real and compared,
# question by question, on the tuning questions. Only where the plan is measurably better is it returned. Live, on a few
# questions:

# %% tags=["nbval-ignore-output"]
choice = planner.choose(budget, rivals=2)
assert choice.chosen in (choice.plan, choice.uniform)
assert planner.bits(choice.plan) <= budget and planner.bits(choice.uniform) <= budget
print(choice)

# %% [markdown]
# With all tuning questions, at each budget (stored):

# %%
for bits, told in record["choices"].items():
    print(f"{bits:>4} bits: {told['why']}")

# %% [markdown]
# ## The whole curve
#
# Now the judging questions, looked at once. Uniform settings, plans, and rules of thumb on a base of 3 bits:

# %%
from helpers.measure.stats import paired, ratio_interval

about = read("plans").data["plans"]
uniform = [n for n in about if n.startswith("gptq")]
planned = [n for n in about if n.startswith("plan, ")]
peers = [n for n in about if n.startswith(("auto-round", "nvidia"))]
rules = [n for n in about if not n.startswith(("plan", "climbed")) and n not in uniform + peers]


def kl_of(name):
    """KL with an interval over questions and draws."""
    return ratio_interval(plans[name]["answer_kl"], plans[name]["tokens"])


families = {"uniform": uniform, "plan": planned, "rule of thumb": rules, "AutoScheme": [n for n in peers if "auto" in n],
            "ModelOpt": [n for n in peers if "nvidia" in n]}
figure, ax = plt.subplots(figsize=(7, 4.6))
maps.curve(ax, {f: [(about[n]["bits"], kl_of(n)) for n in names if about[n]["bits"] < 7] for f, names in families.items()},
           joined=("plan",))
plt.show()


# %%
def best_uniform(bits):
    """The uniform setting of least KL on the judging questions themselves within so many bits: more than fair to uniform."""
    return min((n for n in uniform if about[n]["bits"] <= bits + 0.01), key=lambda n: kl_of(n).estimate)


for name in planned:
    rival = best_uniform(about[name]["bits"])
    mine, theirs, apart = kl_of(name), kl_of(rival), paired(plans[name], plans[rival], "answer_kl")
    print(f"{about[name]['bits']:.2f} bits: KL {mine.estimate:.4f} against {theirs.estimate:.4f} of {rival}: "
          f"{100 * (mine.estimate / theirs.estimate - 1):+.0f} % ({apart.verdict()})")

# %% [markdown]
# Between 3.25 and 4 bits the plans have 34 to 61 % less KL than the best uniform setting of their bytes. At 4.25 bits, where
# uniform 4 bits in groups of 128 fits exactly, no difference is detectable. The check on the tuning questions is careful: at
# 3.25 and at 4.5 bits it returned the uniform setting, and the judging questions would have had the plan.
#
# ## Against rules of thumb and the peers
#
# Each at its own bytes, against the plan of as many: same solver, same calibration, same questions. (The plan has to choose
# from what the peers had, groups of 128, and keeps $q, k, v$ and gate, up alike, which AutoScheme need not.)

# %%
for name in rules + peers:
    mine = plans[f"plan at the bytes of {name}"]
    apart = paired(mine, plans[name], "answer_kl")
    print(f"{name:33} {about[name]['bits']:.2f} bits: KL {kl_of(name).estimate:.4f}; "
          f"the plan less it {apart}: {apart.verdict()}")

# %% [markdown]
# On this model "attention 4, MLP 3" cannot be told from the plan of its bytes; the other seven rules are measurably worse.
# AutoScheme's and ModelOpt's allocations by gradients cannot be told from the plan either, at any of four budgets; ModelOpt's
# by KL, which leave part of the budget unused, are measurably worse at two of four. None is better. So, as far as this can
# tell, a score that takes seconds gave as good a plan as a map that takes minutes. What the map adds is the effects themselves,
# and the check.
#
# How much is left for a better allocation? From the plan at one of these sizes, 60 exchanges, one set of linears wider and
# others narrower, each quantized for real, and kept where its KL on the tuning questions fell:

# %%
climbed = next(n for n in about if n.startswith("climbed"))
origin = plans[climbed.removeprefix("climbed from the ")]
print(f"KL {kl_of(climbed).estimate:.4f}; less that of the plan it set out from {paired(plans[climbed], origin, 'answer_kl')}")

# %% [markdown]
# What looked better on 390 tuning questions is not on 520 others: an exchange that is worth less than this many questions can
# see cannot be chosen by them, whatever the solver.
#
# ## Two pieces of advice
#
# **"Keep the head high."** Files of all toolkits leave the output head and the embedding in 16 bits. What would it save to
# round them to 4 bits, and what would it cost, beside the linears? KL for each megabyte saved, by rounding in groups of 128:

# %%
def megabytes_saved(layer):
    rows, columns = live.shapes[layer]
    return rows * columns * (16 - 4 - 16 / 128) / 8e6


at = next(m for m in shown if m.name == "rtn" and m.bits in (4, 3))
mine = frame[frame.setting == at].assign(kl=lambda f: [k.estimate for k in f.kl], saved=lambda f: f.layer.map(megabytes_saved))
price = mine.groupby("kind")[["kl", "saved"]].sum()
price.columns = ["KL (nats/token)", "MB saved"]
price["KL for each MB"] = price["KL (nats/token)"] / price["MB saved"]
print(at, price.sort_values("KL for each MB", ascending=False).to_string(float_format="%.4f"), sep="\n")

# %% [markdown]
# On this model values and attention outputs are the dearest, at 5 to 14 times the head's price, so 4 bits for the head is not
# the first place where quality is lost. At 2 bits it is another matter (the map above).
#
# **"Selective precision beats converting everything to 4 bits."** At the bytes of uniform 4 bits in groups of 128:

# %%
whole = str(usual)
for name in (n for n in planned if abs(about[n]["bits"] - about[whole]["bits"]) < 0.05):
    print(f"{name} less uniform 4 bits: {paired(plans[name], plans[whole], 'answer_kl')}")

# %% [markdown]
# So, on this model, not at 4 bits, where uniform is good already, and clearly between 3 and 4 (the curve above).
#
# ## The plan as a file
#
# A GPTQ file says in `dynamic` which linears have other widths than the default. GPTQModel reads it and answers as the plan
# that was judged; transformers' own loader refuses it. vLLM looks rules up by the names of the matrices that it fuses, so the
# file has them too; its CPU build serves mixed groups and linears in 16 bits, and no 3 or 8 bits (`tests/test_mixed.py` runs
# all of that). An NF4 file leaves linears in 16 bits, and transformers loads it. `make sensitivity` leaves the plan as
# `plan.json`, which `helpers.quantize --plan` and `helpers.compare --methods` take; it knows the weights that it was made for.

# %%
import json
import tempfile
from pathlib import Path

from helpers.models.checkpoint import quantize_to
from helpers.models.reading import load_simulated

with tempfile.TemporaryDirectory() as scratch:
    out = Path(scratch) / "mixed"
    quantize_to(out, full.folder, choice.plan, live.tokens, device=run_on["device"])
    dynamic = json.loads((out / "config.json").read_text())["quantization_config"].get("dynamic", {})
    again = load_simulated(out)
ids = torch.tensor([items[0].ids])
made = planner.simulated(choice.plan).load()
with torch.inference_mode():
    assert torch.allclose(again(ids).logits, made(ids).logits, atol=1e-3)
print(f"{len(dynamic)} rules in the file; the model read back is the one that was judged")

# %% [markdown]
# ## Where it breaks
#
# - *A sample is a sample.* The map is measured on some hundred questions; an effect smaller than its interval is noise, and a
#   solver is good at finding noise. That is what the check against uniform is for, and why other questions judge.
# - *Single effects* are those of codes calibrated on the unquantized model. In the plan, later layers see quantized earlier
#   ones.
# - *Bits are not bytes.* ModelOpt counts codes alone by default; a budget that counts the head spends itself on the head.
# - *Kernels.* An engine that has no kernel for 3 bits cannot serve the plan, whatever its KL (chapter 9 asks it).
# - *Two models.* Which kind is worst is a fact about each of them. Measure yours.
#
# ## Summary
#
# Measure each layer alone, on the answers; solve a knapsack; make the plan for real, beside uniform settings of its bytes; keep
# it only if it is measurably better. With all at 4 bits no layer of the bundled model had to be wider. With all at 3 bits
# `o_proj` gained most from 8, on the real model the values.
#
# ## Exercises
#
# 1. Let the planner choose without `alike`. How much KL does fusing cost?
#
# <details><summary>Solution</summary>
#
# `dataclasses.replace(planner, alike=False).allocation(budget).damage` against `allocation.damage`: what is foreseen; only
# quantizing both says what it is worth.
# </details>
#
# 2. Plan with the cheap score of the largest rank correlation in place of the measured KL.
#
# <details><summary>Solution</summary>
#
# `Planner(live, {(n, widths[s]): of[n][s] for n in layers for s in of[n] if s in widths}, GPTQ, power=1.0)` with
# `of = record["cheap"]["scores"]["gradient x output error"]`, then `.plan(budget)` and
# `planner.judge.scores(planner.simulated(...))`.
# </details>
#
# ## Quiz
#
# 1. Why does a change in the last block cost least to measure?
# 2. Why can GPTQ do nothing for the embedding that rounding does not?
# 3. A plan is better than uniform on the questions it was chosen by. Is it better?
#
# <details><summary>Answers</summary>
#
# 1. Everything before that block is shared with the unchanged model. 2. Its input is one token: $H$ is diagonal, so no
# column can make up for another. 3. Not known: it was chosen for these questions. Ask others.
# </details>
#
# **Next**: [chapter 9](09_harness.ipynb) puts a plan beside whole methods, with latency and memory. *References*:
# [ModelOpt](https://github.com/NVIDIA/Model-Optimizer), [AutoRound](https://github.com/intel/auto-round),
# [Kim et al. 2023](https://arxiv.org/abs/2306.07629) (Fisher diagonal), [Frantar et al.
# 2022](https://arxiv.org/abs/2210.17323).
