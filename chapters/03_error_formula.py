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
# # 3. The error formula
#
# **After this chapter** you can round a matrix to four bits by hand, say what scale, zero point and group are, and judge a
# rounding by what it does to a layer's *output* instead of to its weights.
#
# *Needs*: chapters [1](01_start_here.ipynb) and [2](02_pipelines.ipynb), matrix products. *Time*: half a minute on a laptop
# CPU. *On a GPU*: nothing changes.
#
# Every method of this book replaces the weight $W$ of a linear by values $\hat W = Q(W)$ from a small grid. What it loses
# on inputs $X$ is
#
# $$E = \lVert W X - \hat W X \rVert \tag{3.1}$$
#
# GPTQ lowers $E$ by choosing the codes, AWQ by scaling $W$ before rounding, NF4 by the choice of the grid. This chapter is
# about $E$ itself.

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
# ## The uniform grid, by hand
#
# Two bits give four codes, 0 to 3. The *scale* $s$ is the distance between neighbours, the *zero point* $z$ the code that
# means 0:
#
# $$q = \mathrm{clamp}\!\left(\mathrm{round}\frac{w}{s} + z,\; 0,\; 2^b - 1\right)$$
#
# $$\hat w = (q - z)\, s \tag{3.2}$$
#
# For a row that runs from $-1$ to $2$: $s = 3/3 = 1$, and $0$ must lie one step above the bottom, so $z = 1$.

# %%
import torch

row = torch.tensor([[-1.0, 0.1, 0.6, 2.0]])
scale, zero = (row.max() - row.min()) / 3, 1
codes = (torch.round(row / scale) + zero).clamp(0, 3)
print("codes ", codes.int().tolist()[0])
print("values", ((codes - zero) * scale).tolist()[0])

# %% [markdown]
# The helper does the same for each *group* of neighbouring weights of a row:

# %%
from helpers.quantizers.affine import dequantize, fit_qparams, quantize

grid = fit_qparams(row, bits=2, group_size=-1, sym=False)  # -1: one group for the whole row
assert torch.equal(quantize(row, grid), codes.int()) and grid.zero_point.item() == zero
print(dequantize(quantize(row, grid), grid).tolist()[0])

# %% [markdown]
# *Symmetric* grids put 0 in the middle and need no zero point; *asymmetric* ones cover exactly the range. The field has
# several ways to write the same thing:
#
# | where | value of a code | remarks |
# |---|---|---|
# | this book | $(q - z)\,s$ | $q, z$ in $0 \ldots 2^b-1$ |
# | GPTQ files, version 1 | $(q - (z' + 1))\,s$ | stores $z' = z - 1$; `gptq_v2` stores $z$ |
# | AWQ files | $(q - z)\,s$ | other order of the 4-bit codes in a word |
# | signed integers | $q'\,s$ | $q' = q - 2^{b-1}$, symmetric only |
# | `min + step` | $q\,s + m$ | $m = -z\,s$, not rounded to the grid |

# %% [markdown]
# ## Smaller groups follow the weights more closely
#
# Each group has its own scale, so an outlier spoils only its own group. What does a group cost? With a 16-bit scale and a
# 4-bit zero point, 20 bits for each group of $g$ weights: $4 + 20/g$ bits per weight. And what does it win? Errors are given
# in *decibels* of the signal, $10 \log_{10}(\text{error energy} / \text{signal energy})$: $-20$ dB is an error of 1 % of the
# energy. Guess how many dB of weight error you win from one group a row (256 weights here) down to groups of 32.

# %%
guess_db = 3.0

# %%
from helpers.book import settings
from helpers.models.layers import common_group, linears
from helpers.models.source import load
from helpers.quantizers.affine import decibel, round_to_nearest

run_on = settings(model, profile)
lm, tokenizer = load(*(run_on[k] for k in ("model", "revision", "dtype", "device")))
name, linear = next(linears(lm))
W = linear.weight.detach().float()


def weight_error_db(W_hat):
    """||W - W_hat||^2 as a share of ||W||^2, in dB."""
    return decibel((W - W_hat).square().sum().item(), W.square().sum().item())


sizes = sorted({g for g in (W.shape[1], 128, 64, 32) if W.shape[1] % g == 0}, reverse=True)
by_group = {g: weight_error_db(round_to_nearest(W, 4, g, sym=False)) for g in sizes}
for g, db in by_group.items():
    print(f"groups of {g:5}: {4 + 20 / g:5.2f} bits a weight, error {db:6.1f} dB")
print(f"won: {by_group[sizes[0]] - by_group[sizes[-1]]:.1f} dB, guessed {guess_db}")

# %% [markdown]
# One bit more halves the step, so it quarters the squared error: 6.02 dB. Is that what happens?

# %%
import matplotlib.pyplot as plt

bits = [2, 3, 4, 5, 6, 7, 8]
measured = [weight_error_db(round_to_nearest(W, b, sizes[-1], sym=False)) for b in bits]
figure, axes = plt.subplots(figsize=(6, 2.6))
axes.plot(bits, measured, "o", label="measured")
axes.plot(bits, [measured[-1] + 6.02 * (8 - b) for b in bits], color="black", linewidth=0.8, label="6.02 dB a bit")
axes.set(xlabel="bits", ylabel="weight error (dB)")
axes.legend()
plt.show()
slope = (measured[0] - measured[-1]) / 6
print(f"{slope:.1f} dB a bit")
assert 5.5 < slope < 7.5

# %% [markdown]
# A little more: the step is the range divided by $2^b - 1$, not $2^b$, and from two bits to three that is 7.4 dB.
#
# ## Weight error is not output error
#
# In formulas $X$ has a row for each input and a column for each token. Two inputs that always move together, $x_2 = x_1$. Two
# roundings of $w = (0.5, 0.5)$ to integers, equally far from $w$:

# %%
w, X = torch.tensor([[0.5, 0.5]]), torch.tensor([[1.0, -2.0, 3.0], [1.0, -2.0, 3.0]])
for w_hat in (torch.tensor([[1.0, 1.0]]), torch.tensor([[1.0, 0.0]])):
    print(w_hat.tolist()[0], " weight error", (w - w_hat).square().sum().item(),
          " output error", ((w - w_hat) @ X).square().sum().item())

# %% [markdown]
# The second is perfect: one error cancels the other. Rounding to nearest cannot see that, because it does not look at $X$.
#
# ## A whole data set as one matrix
#
# Squared, the error of all tokens together needs $X$ only through $H = X X^\top$, as many rows as the layer has inputs, no
# matter how many tokens there are:
#
# $$\Delta W = W - \hat W,\quad E^2 = \mathrm{tr}\!\left(\Delta W\, X X^\top \Delta W^\top\right)$$
#
# $$E^2 = \lVert \Delta W\, X\rVert^2 = \mathrm{tr}\!\left(\Delta W\, H\, \Delta W^\top\right) \tag{3.3}$$

# %%
from helpers.quantizers.affine import output_error

torch.manual_seed(0)
dW, X = torch.randn(8, 16), torch.randn(16, 5000)
H = X @ X.T
assert abs(output_error(dW, H) / (dW @ X).square().sum().item() - 1) < 1e-4
print(f"H is {H.shape[0]} x {H.shape[1]}, X was {X.shape[0]} x {X.shape[1]}")

# %% [markdown]
# For a linear of Llama-2-7B (4096 inputs) $H$ takes 67 MB in fp32, and a calibration set of 128 × 2048 tokens would take
# 4.3 GB. GPTQ's Hessian is this matrix, and AWQ's search can use it too (chapters 5 and 6).
#
# `walk` sends calibration text through the model and stops at each block, where one $H$ is kept for all linears that share an
# input. Here at the first:

# %%
from helpers.models.method import Gram
from helpers.models.texts import calibration, context_of, windows
from helpers.models.walk import first_step

tokens = windows(calibration(tokenizer), min(128, context_of(tokenizer, lm.config)), 16)
step = first_step(lm, tokens)
grams = step.grams(Gram)
print(step.stream.tokens, "tokens; linears that share an input:")
for shared in step.layout.groups:
    print("   ", ", ".join(shared))

# %% [markdown]
# Now the output error of each linear of the first block, rounded to nearest, beside its weight error:

# %%
group = common_group(lm)  # 128, or what divides this model's widths
figure, axes = plt.subplots(figsize=(6.5, 2.8))
for n, (linear_name, gram) in enumerate(grams.items()):
    W = step.block.get_submodule(linear_name).weight.detach().float()
    if W.shape[1] % group:
        print(f"{linear_name} is left out: groups of {group} do not divide its {W.shape[1]} inputs")
        continue
    for n_bits, colour in ((4, "#0072B2"), (3, "#D55E00")):
        dW = W - round_to_nearest(W, n_bits, group, sym=False)
        output = decibel(output_error(dW, gram.H), output_error(W, gram.H))
        axes.plot(output, n, "o", color=colour, label=f"output, {n_bits} bits" if n == 0 else None)
        weight = decibel(dW.square().sum().item(), W.square().sum().item())
        axes.plot(weight, n, "|", color=colour, label=f"weights, {n_bits} bits" if n == 0 else None)
axes.set_yticks(range(len(grams)), [k.split(".")[-1] for k in grams])
axes.set(xlabel="error (dB of the signal)")
axes.legend(loc="center left", bbox_to_anchor=(1, 0.5))
plt.show()

# %% [markdown]
# The bars (weights) lie close together, the dots (outputs) do not: the same rounding hurts some layers' outputs more than
# others', by what their inputs are. A method that looks at $H$ can do something about it.
#
# ## Bits per weight, counted honestly
#
# "4 bits" is what the codes take. A file also holds scales and zero points, GPTQ files the group of each column, and
# embeddings, norms and the output head in 16 bits:

# %%
from transformers import LlamaConfig

from helpers.measure.bytes import predicted_bytes
from helpers.methods.awq import Awq
from helpers.methods.gptq import Gptq
from helpers.methods.nf4 import Nf4

shapes = {"this model": lm.config,
          "Llama-2-7B": LlamaConfig(),
          "Llama-2-70B": LlamaConfig(hidden_size=8192, intermediate_size=28672, num_hidden_layers=80,
                                     num_attention_heads=64, num_key_value_heads=8)}
for shape_name, config in shapes.items():
    weights = predicted_bytes(config) / 2
    size = group if config is lm.config else 128
    plans = (Gptq(group_size=size), Awq(group_size=size), Nf4())
    each = {m.name: round(8 * predicted_bytes(config, m) / weights, 2) for m in plans}
    print(f"{shape_name:12} {each}")

# %% [markdown]
# The larger the model, the nearer to the nominal number; in a small one the 16-bit embeddings and head take
# four fifths as many bytes as all quantized weights.
#
# ## Eight codes in a word
#
# Files pack codes into 32-bit words: at 4 bits, eight codes, the first in the lowest four bits. In hexadecimal a digit is a
# code, so a word can be read from right to left:

# %%
codes = [1, 2, 3, 4, 5, 6, 7, 0]
word = 0
for position, code in enumerate(codes):
    word |= code << (4 * position)
print(f"{word:#010x}")
assert [(word >> (4 * position)) & 0xF for position in range(8)] == codes

# %% [markdown]
# GPTQ files pack eight neighbouring *inputs* of one output, AWQ files eight outputs of one input in an order of their own. The
# helper packs whole matrices, codes of 3 bits across the borders of words too:

# %%
from helpers.quantizers.packing import pack_gptq, unpack_gptq

assert pack_gptq(torch.tensor([codes])).item() == word
three = torch.randint(0, 8, (4, 32))
print(tuple(three.shape), "codes of 3 bits in", tuple(pack_gptq(three, bits=3).shape), "words")
assert torch.equal(unpack_gptq(pack_gptq(three, bits=3), bits=3), three)

# %% [markdown]
# ## Against the toolkit's own file
#
# auto-gptq's artefact of this model holds codes, scales and zero points. Unpacked with equation 3.2 they give $\hat W$. How
# far is it from $W$, compared with plain rounding on the same kind of grid? Guess: is GPTQ's weight error smaller?

# %%
guess_gptq_weight_error_is_smaller = True

# %%
from helpers.models.reading import read_artefact
from helpers.toolkits.artefacts import COMMITTED

theirs = read_artefact(COMMITTED / "autogptq-gptq").linears
bundled, bundled_tokenizer = load()
first = first_step(bundled, windows(calibration(bundled_tokenizer), 256, 128))
H = first.grams(Gram)["mlp.up_proj"].H
W = first.block.mlp.up_proj.weight.detach()
file, rounded = theirs[f"{first.name}.mlp.up_proj"].dequantize(), round_to_nearest(W, 4, 128)
for what, W_hat in (("rounded to nearest", rounded), ("auto-gptq's file", file)):
    weight_db = decibel((W - W_hat).square().sum().item(), W.square().sum().item())
    output_db = decibel(output_error(W - W_hat, H), output_error(W, H))
    print(f"{what:20} weights {weight_db:6.1f} dB   output {output_db:6.1f} dB")
smaller = (W - file).norm() < (W - rounded).norm()
print("weight error smaller than rounding's:", bool(smaller), " guessed:", guess_gptq_weight_error_is_smaller)

# %% [markdown]
# GPTQ's weights are *farther* from the original, and its output is nearer. That is equation 3.1 at work, on one linear. Whether
# a nearer output of each linear is a better model is measured in chapter 5, on asymmetric grids: on the bundled model and on a
# real one GPTQ has a lower KL than rounding at every width, but for 3 bits on the real one's questions, where no difference can
# be told.
#
# The same file through transformers, which calls GPTQModel's kernel, against our reading of it: do both compute the same
# weights?

# %% tags=["nbval-ignore-output"]
from helpers.models.reading import load_simulated
from helpers.toolkits.artefacts import reload

ids = torch.tensor(windows(calibration(bundled_tokenizer), 128, 1))
with torch.inference_mode():
    ours = load_simulated(COMMITTED / "autogptq-gptq")(ids).logits
    kernel = reload(COMMITTED / "autogptq-gptq")(ids).logits
difference = ((ours - kernel).norm() / ours.norm()).item()
assert difference < 0.001
print("logits differ by less than 0.1 %")

# %% [markdown]
# ## Where it breaks
#
# - $E$ is a layer's error, on the calibration inputs. It says nothing of inputs that were not in $X$, nor of how much the
#   model's answer depends on that layer.
# - A group of zeros has no range; the helper gives it a scale of 1. Weights that are NaN raise an error.
# - Errors add up through the blocks; GPTQ calibrates each block on the outputs of the quantized ones before it.
#
# ## Summary
#
# A grid is a scale, a zero point and a number of bits; a group is who shares them. The error that counts is the output's,
# and all that a data set says about it is in $H = XX^\top$.
#
# ## Exercises
#
# 1. Round `row` symmetrically with 2 bits. Which value is now farthest off, and why?
#
# <details><summary>Solution</summary>
#
# `round_to_nearest(row, 2, -1, sym=True)`: the scale is $2 \cdot 2 / 3$, the values $-2.67, -1.33, 0, 1.33$. The largest
# weight, 2.0, becomes 1.33: a symmetric grid with an even number of values has one fewer above zero than below.
# </details>
#
# 2. Equation 3.3 with $H$ replaced by its diagonal: for which inputs is that exact?
#
# <details><summary>Solution</summary>
#
# For inputs that are uncorrelated and have mean zero ($H$ is not centred). With `dW = W - rounded`,
# `output_error(dW, torch.diag(H.diagonal()))` against `output_error(dW, H)` shows how far these are from it.
# </details>
#
# 3. What is the error of a random rounding up or down, against rounding to nearest, in dB of weights?
#
# <details><summary>Solution</summary>
#
# Nearest has a mean squared error of $s^2/12$, a fair random choice of both neighbours $s^2/3$: 6 dB worse.
# </details>
#
# ## Quiz
#
# 1. Which of $W$, $\hat W$, $X$ does NF4 look at?
# 2. Half the step: how many dB?
# 3. Why may a smaller weight error come with a larger output error?
#
# <details><summary>Answers</summary>
#
# 1. $W$ alone. 2. $-6.02$. 3. Because errors of correlated inputs can cancel or add up.
# </details>
#
# **Next**: [NF4](04_nf4.ipynb), a better grid. *References*: [Frantar et al. 2022](https://arxiv.org/abs/2210.17323),
# [Lin et al. 2023](https://arxiv.org/abs/2306.00978).
