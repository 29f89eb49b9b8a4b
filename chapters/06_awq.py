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
# *On a GPU*: nothing changes here.
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
import matplotlib.pyplot as plt

from helpers.book import settings
from helpers.models.calibration import Walk
from helpers.models.layers import add_outliers, architecture
from helpers.models.loading import load
from helpers.models.texts import calibration, windows

run_on = settings(model, profile)
lm, tokenizer = load(run_on["model"], run_on["revision"])  # fp32, on the CPU, in every profile
tokens = windows(calibration(tokenizer), 128, 32)


def first_block(lm):
    """The first block, and the Gram matrices of its linears."""
    walk = Walk(lm)
    walk.begin(tokens)
    _, block = next(walk.blocks())
    return block, walk.grams(block, architecture(lm).groups), walk


block, grams, walk = first_block(lm)
loud = add_outliers(load(run_on["model"], run_on["revision"]).model)
loud_block, loud_grams, _ = first_block(loud)

# %%
figure, axes = plt.subplots(figsize=(6.5, 2.4))
name = architecture(lm).folds[0].linears[0]
for what, found in (("this model", grams), ("with outlier channels", loud_grams)):
    axes.semilogy(found[name].x_mean().sort(descending=True).values, label=what)
axes.set(xlabel="input channels, largest first", ylabel="mean |x|")
axes.legend()
plt.show()

# %% [markdown]
# The bundled model has no outlier channels; large language models do. So the book also measures a variant: a few channels
# leave the norms 32 times larger and the weights that read them are as much smaller. It computes exactly the same function,
# and rounding hurts it more.

# %%
ids = torch.tensor(tokens[:2])
with torch.inference_mode():
    assert torch.allclose(lm(ids).logits, loud(ids).logits, rtol=1e-3, atol=1e-3)
print("same function")

# %% [markdown]
# ## The search, without a forward pass for each candidate
#
# autoawq runs the attention or the MLP once for each of the 20 candidates. For the error of a linear's output that is not
# needed: equation 3.3 gives it from $H$, which is collected once, whatever the number of tokens. Same choice? (In code $X$ has
# a row for each token.)

# %%
from helpers.quantizers.awq import RATIOS, candidate_scales, gram_loss, search_scale, weight_saliency

fold = architecture(loud).folds[0]  # the linears that read the first norm's output (more under Folding)
inputs = []
handle = loud_block.get_submodule(name).register_forward_pre_hook(lambda _, args: inputs.append(args[0].flatten(0, -2)))
walk_again = Walk(loud)
walk_again.begin(tokens)
walk_again.advance(loud_block)
handle.remove()
X = torch.cat(inputs)

W = torch.cat([loud_block.get_submodule(n).weight for n in fold.linears]).detach()
gram = loud_grams[name]
candidates = candidate_scales(gram.x_mean(), weight_saliency(W, 128))


def forward_loss(s):
    return ((X / s) @ fake_quantize(W * s).T - X @ W.T).square().sum().item()


by_gram = search_scale(candidates, gram_loss(W, gram.H))
by_forward = search_scale(candidates, forward_loss)
assert by_gram.ratio == by_forward.ratio
print(f"ratio {by_gram.ratio}, with {len(X)} tokens and without")

# %% tags=["nbval-ignore-output"]
figure, axes = plt.subplots(figsize=(6, 2.6))
quiet_W = torch.cat([block.get_submodule(n).weight for n in fold.linears]).detach()
quiet = search_scale(candidate_scales(grams[name].x_mean(), weight_saliency(quiet_W, 128)), gram_loss(quiet_W, grams[name].H))
ones = torch.ones(W.shape[1])
unscaled = {"this model": gram_loss(quiet_W, grams[name].H)(ones), "with outlier channels": gram_loss(W, gram.H)(ones)}
for what, found in (("this model", quiet), ("with outlier channels", by_gram)):
    axes.plot(RATIOS, torch.tensor(found.losses) / unscaled[what], marker=".", label=what)
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
# search, twenty products of $\Delta W$ and $H$ for each group of linears, whatever the number of tokens (few in the runs of
# whole models, because the toolkits need minutes; one run of the larger one):

# %% tags=["nbval-ignore-output"]
from helpers.measure.latency import beside
from helpers.results import read

bench = read("bench")
print(f"{bench.machine['cpu']}, {bench.data['threads']} threads, {bench.date}, {bench.command}")
beside(bench.data["awq"] | {k: v for k, v in bench.data["end to end"].items() if k.startswith("AWQ")})

# %% [markdown]
# ## Folding
#
# Dividing the inputs by $s$ costs nothing at run time, because the norm before the linears can do it: its weight is divided
# by $s$. The same goes for values into the output projection (if there are as many value heads as query heads, which is not
# so in this model) and up into down projections. Without rounding nothing changes:

# %%
import copy

from helpers.models.scaling import fold_scale

folded = copy.deepcopy(loud)
fold_scale(folded.get_submodule(architecture(loud).blocks)[0], fold, by_gram.scale)
with torch.inference_mode():
    assert torch.allclose(folded(ids).logits, loud(ids).logits, rtol=1e-3, atol=1e-3)
print("folded: same function")

# %% [markdown]
# ## Clipping
#
# The second half of AWQ: clamp each group to a threshold $t \le \max|w|$ before rounding, so that all other weights get a
# finer step. Searched group by group, again with $H$: each group only needs its own block of it.

# %%
from helpers.quantizers.affine import decibel, output_error
from helpers.quantizers.awq import clip, clip_by_gram

down = architecture(lm).groups[-1][0]
W_down, H_down = block.get_submodule(down).weight.detach(), grams[down].H
clipped = clip(W_down, clip_by_gram(W_down, H_down, bits=3))
signal = output_error(W_down, H_down)
for what, W_hat in (("rounded", fake_quantize(W_down, 3)), ("clipped, then rounded", fake_quantize(clipped, 3))):
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
# - *Clipping* alone helps both models, and scales and clipping together have the lowest KL of AWQ's variants on both.
# - *GPTQ*, which uses all of $H$, has about half the KL of AWQ on both. AWQ's scales before it lower the KL measurably where
#   there are outliers, and not where there are none.
# - *Channels in 16 bits*, the paper's observation (4 of 256 inputs, as many as stand out; 8 of 768), helps both models, most
#   where there are outliers. Scales alone do not do better than that; with clipping, AWQ does where there are outliers, with
#   nothing in 16 bits. The AWQ format has no place for mixed channels.
# - *Calibration text*: no difference in KL detectable between instructions, recipes and long texts; short texts are a little
#   better, random tokens worse. (In loss, long texts are just measurably worse, and short ones cannot be told.) GPTQ, on the
#   same texts, is much more particular (chapter 5).
# - *Groups*: 32 and 64 are measurably better in KL than 128; a whole row (256 or 768 weights here) cannot be told from it.
# - *By whom*: GPTQModel's file cannot be told from ours; autoawq's, a single draw, has a slightly higher KL. No quality was
#   lost for speed as far as this shows: on the bundled model, with more tokens than in the timed runs.
#
# ## To a file, and back

# %% tags=["nbval-ignore-output"]
import tempfile
from pathlib import Path

from transformers import AwqConfig

from helpers.models.checkpoints import load_simulated, quantize_to
from helpers.models.loading import resolve
from helpers.models.scheme import Scheme
from helpers.toolkits.artefacts import reload

scratch = tempfile.TemporaryDirectory()
out = Path(scratch.name) / "awq"
outcome = quantize_to(out, resolve(run_on["model"], run_on["revision"]), Scheme("awq"), tokens[:8])
with torch.inference_mode():
    theirs = reload(out, quantization_config=AwqConfig(bits=4, backend="torch_awq"))(ids[:1, :16]).logits
    ours = load_simulated(out)(ids[:1, :16]).logits
assert (theirs - ours).norm() < 0.002 * ours.norm()
print(f"{len(outcome.ratios)} scales found; logits through transformers equal ours within 0.2 %")

# %% [markdown]
# ## Against the toolkit, word by word
#
# autoawq runs now, in its own process, on four short windows; its objective is the output of the whole attention or MLP, in
# fp16. Our code follows it with the same objective. (`make bench` times both.)

# %% tags=["nbval-ignore-output"]
from helpers.models.loading import BUNDLED
from helpers.models.quantize import quantize_model
from helpers.toolkits.compare import differing_words
from helpers.toolkits.process import Job, ToolkitMissing, run

bundled, bundled_tokenizer = load(dtype="float16")
few = windows(calibration(bundled_tokenizer), 64, 4)
try:
    run("autoawq", Job("awq", str(BUNDLED), few), Path(scratch.name) / "theirs", originals=True)
    outcome = quantize_model(bundled, Scheme("awq", reference=True), few)
    different, total = differing_words(outcome, Path(scratch.name) / "theirs", "awq")
    print(f"{different} of {total:,} packed words differ")
    assert different == 0
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
# clipping. The candidates need only the sizes of the inputs; choosing among them, and clipping, use $H$.
#
# ## Exercises
#
# 1. Search with the paper's form (`candidate_scales(gram.x_mean())`). Is the best loss lower or higher?
#
# <details><summary>Solution</summary>
#
# `min(search_scale(candidate_scales(gram.x_mean()), gram_loss(W, gram.H)).losses)` against `min(by_gram.losses)`: higher on
# the outlier variant of the bundled model, 0.70 of the error without scaling against 0.52.
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
# 1. None: scales need $\bar x$, clipping needs the inputs of each group. 2. In the paper's form it is plain rounding, the
# fallback; with $\bar w$ it is scaling by the weights alone. 3. To choose among its candidates by the output error, yes (they
# are in $H$); to form the candidates, no.
# </details>
#
# **Next**: chapters on sensitivity, kernels and speed. *References*: [Lin et al. 2023](https://arxiv.org/abs/2306.00978).
