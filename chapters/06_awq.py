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
# # 6. AWQ: scale what matters, then round
#
# **After this chapter** you can say what "salient" means and what the "1 %" is, search AWQ's scales without a forward pass,
# fold them away, and tell on which models that helps.
#
# *Needs*: chapters [2](02_pipelines.ipynb) (KL, ΔNLL) and [3](03_error_formula.ipynb). *Time*: a minute on a laptop CPU.
# *On a GPU*: the same cells.
#
# Some input channels are much larger than others. An error in a weight that multiplies a large input is a large error of the
# output. AWQ ([Lin et al. 2023](https://arxiv.org/abs/2306.00978)) multiplies the weights of such channels by $s > 1$ before
# rounding, and divides the inputs by $s$:
#
# $$W X = (W\,\mathrm{diag}(s))\,(\mathrm{diag}(s)^{-1} X)$$
#
# $$W X \approx Q(W\,\mathrm{diag}(s))\,\mathrm{diag}(s)^{-1} X \tag{6.1}$$

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
# A row of four weights on a 2-bit grid over its range, $-0.6$ to $0.9$, step 0.5, and a second input ten times as large as the
# others. Scaling channel 2 by $s$ divides the largest possible error of its weight by $s$, as long as the range, and so the
# step, stays what it was.

# %%
import torch

from helpers.quantizers.awq import fake_quantize

w = torch.tensor([[0.9, 0.2, -0.5, -0.6]])
X = torch.diag(torch.tensor([1.0, 10.0, 1.0, 1.0]))
for factor in (1.0, 2.0, 4.0, 16.0):
    s = torch.tensor([1.0, factor, 1.0, 1.0])
    error = ((fake_quantize(w * s, bits=2, group_size=4) / s - w) @ X).square().sum().item()
    print(f"s = {factor:4}: output error {error:.3f}")

# %% [markdown]
# Too much is too much: at 16 the scaled weight is the largest, the step grows, and every other weight pays. So $s$ has to be
# searched, and one number decides it:
#
# $$s \propto \frac{\bar x^{\,r}}{\bar w^{\,1-r}}, \quad r = 0, 0.05, \ldots, 0.95 \tag{6.2}$$
#
# with $\bar x$ the mean magnitude of each input channel and $\bar w$ the mean of its weights relative to their groups; then $s$
# is divided by $\sqrt{\max s \cdot \min s}$. (The paper's own code has $\bar x^{\,r}$ alone, where $r = 0$ is no scaling; with
# $\bar w$, as in autoawq and here, no scaling is not among the candidates.)
#
# ## What the "top 1 %" is and is not
#
# The paper's first table keeps 1 % of the *channels* in 16 bits, those with the largest inputs, and finds that this rescues a
# rounded model. That is the observation, not the method: mixed precision is slow, so AWQ scales instead, and *nothing* stays
# in 16 bits. Here is how the channels of this model differ:

# %%
import copy

import matplotlib.pyplot as plt

from helpers.book import settings
from helpers.models.layers import common_group
from helpers.models.method import Gram
from helpers.models.outliers import add_outliers
from helpers.models.source import load
from helpers.models.texts import calibration, context_of, windows
from helpers.models.walk import first_step

run_on = settings(model, profile)
lm, tokenizer = load(*(run_on[k] for k in ("model", "revision", "dtype", "device")))
tokens = windows(calibration(tokenizer), min(128, context_of(tokenizer, lm.config)), 32)
size = common_group(lm)  # 128, or what divides this model's widths

quiet = first_step(lm, tokens)
loud_lm = add_outliers(copy.deepcopy(lm))
loud = first_step(loud_lm, tokens)
grams, loud_grams = quiet.grams(Gram), loud.grams(Gram)

# %%
figure, axes = plt.subplots(figsize=(6.5, 2.4))
fold = quiet.layout.folds[0]  # linears that read one input, and the norm before them (more under Folding)
name = fold.linears[0]
for what, found in (("this model", grams), ("with outlier channels", loud_grams)):
    axes.semilogy(found[name].x_mean().sort(descending=True).values.cpu(), label=what)
axes.set(xlabel="input channels, largest first", ylabel="mean |x|")
axes.legend()
plt.show()

# %% [markdown]
# In the attention of the bundled model no channel stands out; in large language models some do. So the book also measures a
# variant: a few channels leave the norms 32 times larger and the weights that read them are as much smaller. It computes
# exactly the same function, and rounding hurts it more.

# %%
ids = torch.tensor(tokens[:2]).to(lm.device)
with torch.inference_mode():
    assert torch.allclose(lm(ids).logits, loud_lm(ids).logits, rtol=1e-3, atol=1e-3)
print("same function")

# %% [markdown]
# ## The search, without a forward pass for each candidate
#
# autoawq runs the attention or the MLP once for each of the 20 candidates. For the error of a linear's output that is not
# needed: equation 3.3 gives it from $H$, which is collected once, whatever the number of tokens. Same choice? (In code $X$ has
# a row for each token.)

# %%
from helpers.methods.reference import Inputs
from helpers.quantizers.awq import RATIOS, candidate_scales, gram_loss, search_scale, weight_saliency

X = torch.cat([x.flatten(0, -2).float() for x in loud.grams(Inputs)[name].X])
W = torch.cat([loud.block.get_submodule(n).weight for n in fold.linears]).detach().float()
gram = loud_grams[name]
candidates = candidate_scales(gram.x_mean(), weight_saliency(W, size))


def forward_loss(s):
    return ((X / s) @ fake_quantize(W * s, 4, size).T - X @ W.T).square().sum().item()


by_gram = search_scale(candidates, gram_loss(W, gram.H, 4, size))
by_forward = search_scale(candidates, forward_loss)
assert by_gram.ratio == by_forward.ratio
print(f"ratio {by_gram.ratio}, with {len(X)} tokens and without")

# %% tags=["nbval-ignore-output"]
figure, axes = plt.subplots(figsize=(6, 2.6))
quiet_W = torch.cat([quiet.block.get_submodule(n).weight for n in fold.linears]).detach().float()
quiet_loss, loud_loss = gram_loss(quiet_W, grams[name].H, 4, size), gram_loss(W, gram.H, 4, size)
quiet_found = search_scale(candidate_scales(grams[name].x_mean(), weight_saliency(quiet_W, size)), quiet_loss)
unscaled = torch.ones_like(gram.absolute)
for what, found, loss in (("this model", quiet_found, quiet_loss), ("with outlier channels", by_gram, loud_loss)):
    axes.plot(RATIOS, torch.tensor(found.losses) / loss(unscaled), marker=".", label=what)
axes.axhline(1, color="black", linewidth=0.8)
axes.set(xlabel="ratio r", ylabel="output error,\nwithout scaling = 1")
axes.legend()
plt.show()

# %% [markdown]
# Note $r = 0$, which knows nothing of the inputs: on the outlier variant it has most of the gain already. The columns that
# read a loud channel were made 32 times smaller here, and $\bar w$ undoes just that. In other models such columns need not be
# small, so take the gain on this variant as an example, not as a forecast.
#
# Twenty candidates through the Gram matrix (given) against twenty forward passes, and whole models beside the toolkits. Ours
# looks at each linear's output, theirs at that of the attention and the MLP. In the larger model most of our time is the
# search, twenty products of $\Delta W$ and $H$ for each group of linears, whatever the number of tokens. (The toolkits need
# minutes for a whole model, so there are few tokens, and one run of the larger one.)

# %% tags=["nbval-ignore-output"]
from helpers.measure.latency import beside
from helpers.results import read

bench = read("bench")
print(f"{bench.machine['cpu']}, {bench.data['threads']} threads, {bench.date}, {bench.command}")
beside(bench.data["awq"] | {k: v for k, v in bench.data["end to end"].items() if k.startswith("AWQ")})

# %% [markdown]
# ## Folding
#
# Dividing the inputs by $s$ costs nothing at run time if what makes these inputs can do it: the weight of a norm is divided by
# $s$. Without rounding nothing changes:

# %%
from helpers.models.layers import fold_scale

folded = copy.deepcopy(loud_lm)
fold_scale(first_step(folded, tokens[:1]).block, fold, by_gram.scale)
with torch.inference_mode():
    change = (folded(ids).logits - loud_lm(ids).logits).norm() / loud_lm(ids).logits.norm()
assert change < (1e-3 if lm.dtype == torch.float32 else 0.05)  # 16 bits round what fp32 keeps
print("folded: same function")

# %% [markdown]
# What else can take a scale? Values, through the attention, for the output projection? The gate, for the down projection? There
# is no need of a table of architectures: try it. Multiply the readers' columns by a random $s$, divide the candidate's rows by
# it, and see how much of the change of the block's output is left. What leaves nothing is a fold; that is the definition. Every
# linear or norm with as many outputs as the reader has inputs is a candidate. Guess which work before you look:

# %%
guess_folds = {"mlp.gate_proj -> mlp.down_proj": False, "mlp.up_proj -> mlp.down_proj": True}

# %%
from helpers.models.layers import Fold


def left_after_fold(before, readers, plus_one=False):
    """The share of what scaling the readers does to the block's output that dividing `before` does not undo.

    Some norms multiply by 1 + weight (`plus_one`)."""
    torch.manual_seed(0)
    s = torch.rand(quiet.block.get_submodule(readers[0]).in_features).to(lm.device) + 0.5
    batch = quiet.stream.batches[0]
    with torch.inference_mode():
        plain, alone, both = (copy.deepcopy(quiet.block) for _ in range(3))
        fold_scale(both, Fold(before, readers, plus_one), s)
        for n in readers:
            alone.get_submodule(n).weight.mul_(s)
        out = quiet.stream.run(plain, batch)
        change, rest = ((quiet.stream.run(b, batch) - out).norm() for b in (alone, both))
    return (rest / change).item()


# %%
modules = {n: m for n, m in quiet.block.named_modules() if getattr(m, "weight", None) is not None}
for readers in quiet.layout.groups:
    width = quiet.block.get_submodule(readers[0]).in_features
    for candidate in [n for n, m in modules.items() if len(m.weight) == width and n not in readers]:
        left = min(left_after_fold(candidate, readers, plus_one) for plus_one in (False, True))
        if left < 1e-3:
            print(f"{candidate} -> {', '.join(readers)}")
        elif candidate.split(".")[0] == readers[0].split(".")[0]:
            print(f"    not {candidate} -> {', '.join(readers)}")
print(f"guessed {guess_folds}")

# %% [markdown]
# The helper finds the same folds when it first sees a block (`look` in `helpers/models/layers.py`), in any family of models:
# two norms and one linear here. With grouped queries, as here, there are fewer values than inputs of the output projection, so
# that one goes without a scale, in autoawq as well.
#
# AWQ's first half is then a loop over the folds of a block: search a scale for the readers of each, fold it, and go on with
# inputs divided by it.

# %% tags=["nbval-ignore-output"]
from helpers.methods.awq import Awq, scale_folds

scaled = copy.deepcopy(loud.block)
for each in loud.layout.folds:
    W_each = torch.cat([scaled.get_submodule(n).weight for n in each.linears]).detach().float()
    inputs = loud_grams[each.linears[0]]
    if W_each.shape[1] % size:
        print(f"{', '.join(each.linears)} stay in 16 bits: groups of {size} do not divide {W_each.shape[1]} inputs")
        continue
    found = search_scale(candidate_scales(inputs.x_mean(), weight_saliency(W_each, size)), gram_loss(W_each, inputs.H, 4, size))
    fold_scale(scaled, each, found.scale)
    print(f"{each.before:28} -> {', '.join(each.linears):50} r = {found.ratio}")

same = copy.deepcopy(loud)
scale_folds(same, list(loud_grams), same.layout.folds, dict(loud_grams), 4, size)
assert all(torch.equal(a, b) for a, b in zip(scaled.parameters(), same.block.parameters(), strict=True))

# %% [markdown]
# ## Clipping
#
# The second half of AWQ: clamp each group to a threshold $t \le \max|w|$ before rounding, so that all other weights get a
# finer step. Searched group by group, again with $H$: each group only needs its own block of it.

# %%
from helpers.quantizers.affine import decibel, output_error
from helpers.quantizers.awq import clip, clip_by_gram

fitting = [n for n, m in quiet.block.named_modules() if isinstance(m, torch.nn.Linear) and m.in_features % size == 0]
down = fitting[-1]  # the last whose inputs groups of this size divide
W_down, H_down = quiet.block.get_submodule(down).weight.detach().float(), grams[down].H
clipped = clip(W_down, clip_by_gram(W_down, H_down, 3, size))
signal = output_error(W_down, H_down)
for what, W_hat in (("rounded", fake_quantize(W_down, 3, size)), ("clipped, then rounded", fake_quantize(clipped, 3, size))):
    print(f"{what:22} {decibel(output_error(W_down - W_hat, H_down), signal):6.1f} dB")

# %% [markdown]
# ## What it does to answers
#
# At 3 bits, with the bundled model and with its outlier variant, each calibrated variant on several draws of windows (chapter
# 5). Predict: how much does scaling alone help each?

# %%
guess = {"this model": "a little", "with outlier channels": "a lot"}

# %% tags=["nbval-ignore-output"]
from helpers import plots

record = read("sweep_awq")
print(f"{record.data['questions']} questions, {record.data['draws']} draws, {record.machine['cpu']}, {record.date}")
print(f"guessed: {guess}")
plots.sweep(record.data["sweeps"], plots.METHODS["awq"][0])
plt.show()

# %% [markdown]
# - *Scales* need something to scale. Without outlier channels no difference is detectable; with them they take off most of
#   what the outliers added to the KL of rounding.
# - *Clipping* alone helps with and without such channels, and scales and clipping together have the lowest KL of AWQ's
#   variants.
# - *GPTQ*, which uses all of $H$, has about half the KL of AWQ, and three fifths where there are outliers. AWQ's scales before
#   it lower the KL measurably where there are outliers, and not where there are none.
# - *Channels in 16 bits*, the paper's observation (4 of 256 inputs, as many as stand out; 8 of 768), helps with and without
#   outliers, most where there are some. Scales alone do not do better than that: measurably worse without outliers, no
#   difference detectable with them. With clipping AWQ does better in both cases, with nothing in 16 bits. The AWQ format has no
#   place for mixed channels.
# - *Calibration text*: no difference in KL detectable between instructions, recipes and long texts; short texts are a little
#   better, random tokens worse. (In loss, only random tokens can be told.) GPTQ, on the same texts, is much more
#   particular (chapter 5).
# - *Groups*: 32 and 64 are measurably better in KL than 128; a whole row (256 or 768 weights here) cannot be told from it.
# - *By whom*: GPTQModel's file cannot be told from ours; autoawq's, a single draw, has a slightly higher KL, which
#   all questions of the judging set do not show ([chapter 12](12_two_models.ipynb)). No quality was lost for speed as far as
#   this shows: on the bundled model, with more tokens than in the timed runs.
#
# ### The same on a real model
#
# SmolLM2-135M-Instruct ([chapter 5](05_gptq.ipynb) introduces it) has outlier channels of its own. At 3 bits in groups of 64,
# calibrated on 32 windows of a novel; one draw of each, and a quarter of the texts, since a variant takes two cores of a
# processor minutes. The bundled model gains by clipping, its outlier variant by scales. Which half of AWQ does more here?

# %%
guess = "scales"

# %% tags=["nbval-ignore-output"]
import pandas as pd

from helpers.harness import carry

print(f"guessed: {guess}")
halves = carry.panels("awq")
pd.DataFrame({whose: {value: plots.between(row["kl"], ".3g") for value, row in of["model"].items()}
              for whose, of in halves.items()}).reindex(halves["bundled"]["model"]).fillna("not measured")

# %% tags=["nbval-ignore-output"]
carry.side_by_side("awq").drop(index=["model, GPTQ", "with outlier channels, GPTQ", "4 bits, by whom"], level=0)

# %% [markdown]
# (KL from 16 bits, nats/token, with its interval over texts; then each variant's KL less that of rounding, of instructions, or
# of groups of 64, in % of it: an interval that holds 0 says that no difference can be told.)
#
# Neither half does more: scales alone, of which the bundled model shows nothing, take a fifth to over a third of rounding's KL
# away, clipping alone a quarter to over a third, both together about half. And where GPTQ has less than half of AWQ's KL on the
# bundled model, it has more than AWQ here, on all three kinds of text. AWQ's scales before it take a fifth to over a quarter of
# GPTQ's KL away. Beside AWQ with clipping that is less on the novel, level on the speeches, more on the questions. All of that
# is GPTQ with scales fitted to the range. With searched ones (chapter 5) its KL is below AWQ's by 0.12 [0.10, 0.14] nats/token
# on the novel and 0.07 [0.05, 0.09] on the speeches; on the questions no difference can be told. That is 3 bits. At 4 they do
# not suffice: AWQ has 13 to 27 % less KL than asymmetric GPTQ with searched scales. GPTQ gets below AWQ only with desc_act or
# the group-aware order as well.
#
# *By whom*, at 4 bits: ours is nearer than autoawq's file on the novel and farther than GPTQModel's on the speeches, by 0.010
# nats/token each; else no difference can be told (chapter 12). Not asked of the real model: channels in 16 bits, other
# calibration texts, other groups.
#
# Scales before GPTQ, that is `awq+gptq`, come nearest to full precision of this book's recipes on the real model at 4 bits, or
# level with the nearest, and cannot be told from `Gptq()` on the bundled one (chapters [5](05_gptq.ipynb) and
# [12](12_two_models.ipynb)): asymmetric grids with searched scales, the group-aware order of columns, no clipping. The codes
# fit an AWQ file like the one below.
#
# ## To a file, and back

# %% tags=["nbval-ignore-output"]
import tempfile
from pathlib import Path

from transformers import AwqConfig

from helpers.models.checkpoint import quantize_to
from helpers.models.reading import load_simulated
from helpers.models.source import resolve
from helpers.toolkits.artefacts import reload

scratch = tempfile.TemporaryDirectory()
out = Path(scratch.name) / "awq"
outcome = quantize_to(out, resolve(run_on["model"], run_on["revision"]), Awq(group_size=size), tokens[:8],
                      device=run_on["device"])
with torch.inference_mode():
    theirs = reload(out, quantization_config=AwqConfig(bits=4, backend="torch_awq"))(ids[:1, :16].cpu()).logits
    ours = load_simulated(out)(ids[:1, :16].cpu()).logits
assert (theirs - ours).norm() < 0.002 * ours.norm()
print(f"{len(outcome.noted('ratio'))} scales found; logits through transformers equal ours within 0.2 %")

# %% [markdown]
# ## Against the toolkit, word by word
#
# autoawq runs now, in its own process, on four short windows; its objective is the output of the whole attention or MLP, in
# fp16. Our code follows it with the same objective. (`make bench` times both.)

# %% tags=["nbval-ignore-output"]
from helpers.methods.reference import AutoAwq
from helpers.models.formats import AWQ
from helpers.models.quantize import quantize_model
from helpers.models.source import BUNDLED
from helpers.toolkits.compare import all_tensors, differing_words
from helpers.toolkits.process import Job, ToolkitMissing, run

bundled, bundled_tokenizer = load(dtype="float16")
few = windows(calibration(bundled_tokenizer), 64, 4)
try:
    run("autoawq", Job("awq", str(BUNDLED), few), Path(scratch.name) / "theirs", originals=True)
    outcome = quantize_model(bundled, AutoAwq(), few)
    different, total = differing_words(outcome, Path(scratch.name) / "theirs", AWQ)
    print(f"{different} of {total:,} packed words differ")
    theirs = all_tensors(Path(scratch.name) / "theirs")
    assert different == 0 and all(torch.equal(p, theirs[n]) for n, p in bundled.named_parameters() if "norm" in n)
except ToolkitMissing as missing:
    print(missing)

# %% [markdown]
# ## Where it breaks
#
# - *autoawq on a CPU* scales its own backup of the weights (`weight.cpu()` is no copy there): chapter 2. The comparison above
#   uses a copy.
# - *Lengths*: autoawq drops texts longer than its window, GPTQModel's AWQ all but the last batch of equal length. Both in
#   silence; the helpers count the tokens.
# - *Grouped-query attention*: autoawq and the helper do not scale values into the output projection; it goes without.
# - *One-sided groups*: the AWQ grid need not contain zero, but its zero point must be a code, so such a group is cut off.
# - *The top 1 %*: a sentence like "AWQ keeps the top 1 % of weights out of quantization" describes a table of the paper, not
#   the files that toolkits write. Look into one: every weight of the quantized linears has a 4-bit code.
#
# ## Summary
#
# AWQ is rounding to nearest after a change of scale that costs nothing at run time, found by a search over one number, and
# clipping. The candidates need only the sizes of the inputs; choosing among them, and clipping, use $H$. The scales pay where
# some channels are loud: on the real model and on the outlier variant, not on the bundled one.
#
# ## Exercises
#
# 1. Search with the paper's form (`candidate_scales(gram.x_mean())`). Is the best loss lower or higher?
#
# <details><summary>Solution</summary>
#
# `min(search_scale(candidate_scales(gram.x_mean()), gram_loss(W, gram.H, 4, size)).losses)` against `min(by_gram.losses)`:
# higher on the outlier variant of the bundled model, 0.70 of the error without scaling against 0.52.
# </details>
#
# 2. In the example by hand, which $s$ is best for channel 2 to the nearest half?
#
# <details><summary>Solution</summary>
#
# 2.5: then $0.2 \cdot 2.5$ is exactly one step. The error jumps wherever a weight crosses to another code, which is why a grid
# is searched and no gradient followed.
# </details>
#
# ## Quiz
#
# 1. Which part of AWQ works without any calibration data?
# 2. Why is $r = 0$ in the grid?
# 3. Does AWQ need the correlations between inputs?
#
# <details><summary>Answers</summary>
#
# 1. Scaling by the weights alone ($r = 0$); scales by $\bar x$ and clipping need inputs. 2. In the paper's form it is plain
#    rounding, the fallback; with $\bar w$ it is scaling by the weights alone. 3. To choose among its candidates by the output
#    error, yes (they are in $H$); to form the candidates, no.
# </details>
#
# **Next**: [chapter 7](07_sensitivity.ipynb), which layers need more bits than others. *References*: [Lin et al.
# 2023](https://arxiv.org/abs/2306.00978).
