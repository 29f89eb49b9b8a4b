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
# # 4. NF4: a grid for bell curves
#
# **After this chapter** you can derive NF4's sixteen values, say what blocks and double quantization cost, load a model in
# NF4 with the right settings, and decide when its grid beats a uniform one.
#
# *Needs*: chapters [2](02_pipelines.ipynb) (KL, ΔNLL) and [3](03_error_formula.ipynb). *Time*: half a minute on a laptop CPU.
# *On a GPU*: nothing changes here.
#
# NF4 is a data type, not an algorithm: it looks at nothing but the weights, one block at a time
# ([Dettmers et al. 2023](https://arxiv.org/abs/2305.14314)).

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
# ## Sixteen values from quantiles
#
# Weights of a trained model look like a bell curve. The idea: put the values at the quantiles of that curve, dense around 0 and
# sparse at the ends, so that no code is wasted. And 0 itself should be a value, or a zero weight would not stay zero. So: eight
# steps from the outer quantile to the middle for the positive side, seven for the negative one, and 0.

# %%
from statistics import NormalDist

import torch

offset = 0.9677083  # bitsandbytes' outermost quantile, the mean of 1 - 1/30 and 1 - 1/32; at 1 it would be infinite


def side(n):
    """Quantiles from the outermost to just above the middle, n - 1 of them."""
    return [NormalDist().inv_cdf(p) for p in torch.linspace(offset, 0.5, n)[:-1].tolist()]


values = torch.tensor(sorted([-v for v in side(8)] + [0.0] + side(9)))
values = values / values.max()
print([round(v, 3) for v in values.tolist()])

# %% [markdown]
# Bit for bit what the library uses?

# %%
import bitsandbytes.functional as bnb

from helpers.quantizers.nf4 import codebook

assert torch.equal(values, codebook()) and torch.equal(values, bnb.get_4bit_type("nf4", device="cpu"))
print("16 of 16 values identical")

# %%
import matplotlib.pyplot as plt

from helpers.book import settings
from helpers.models.layers import linears
from helpers.models.source import load

run_on = settings(model, profile)
lm, tokenizer = load(*(run_on[k] for k in ("model", "revision", "dtype", "device")))
weights = torch.cat([m.weight.detach().float().cpu().flatten() for _, m in linears(lm)])
blocks = weights[:len(weights) // 64 * 64].view(-1, 64)
scaled = (blocks / blocks.abs().amax(1, keepdim=True).clamp(min=1e-12)).flatten()

figure, axes = plt.subplots(figsize=(6.5, 2.4))
axes.hist(scaled.numpy(), 200, density=True, color="#bbbbbb")
axes.vlines(values, 0, 0.4, color="#009E73", linewidth=1.5, label="NF4")
axes.vlines((torch.arange(16) - 8) * 2 / 15, -0.4, 0, color="#56B4E9", linewidth=1.5, label="INT4, symmetric")
axes.set(xlabel="weight / largest of its block of 64", ylabel="density")
axes.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=2, fontsize=8)
plt.show()

# %% [markdown]
# ## Blocks
#
# Each block of 64 weights is divided by its largest magnitude, *absmax*, and every weight goes to the nearest value:
#
# $$q_i = \arg\min_k \left| \frac{w_i}{\max_j |w_j|} - v_k \right|$$
#
# $$\hat w_i = v_{q_i} \max_j |w_j| \tag{4.1}$$

# %%
from helpers.quantizers.nf4 import dequantize_nf4, quantize_nf4, unpack_pairs

W = next(linears(lm))[1].weight.detach().float().cpu()
first = W.flatten()[:64]
by_hand = (first[:, None] / first.abs().max() - values).abs().argmin(1)
q = quantize_nf4(W)
assert torch.equal(unpack_pairs(q.packed, W.numel())[:64].long(), by_hand)
print("codes of the first eight weights:", by_hand[:8].tolist())
share = unpack_pairs(quantize_nf4(blocks).packed, blocks.numel()).int().bincount(minlength=16) / blocks.numel()
print(f"of all weights the rarest code has {share.min():.1%}, the most frequent {share.max():.1%}")

# %% [markdown]
# Quantiles would be used equally often, 6.25 % each, if a block were divided by the curve's outer quantile; its largest weight
# lies farther out. So NF4 is neither exactly of equal use nor of least error: measure it.
#
# Speed beside the library, on the machine that the record names. "theirs / ours" sets median against median: above 1 ours is
# faster. The range sets the fastest run of one side against the slowest of the other.

# %% tags=["nbval-ignore-output"]
from helpers.measure.latency import beside
from helpers.results import read

bench = read("bench")
print(f"{bench.machine['cpu']}, {bench.data['threads']} threads, {bench.date}, {bench.command}")
beside(bench.data["nf4"])

# %% [markdown]
# Ours quantizes by looking weights up in a fine table instead of comparing them. It dequantizes more slowly: the library looks
# up and multiplies in one fused loop on all cores; in tensor operations these are two, and torch looks up on one core.
#
# ## Double quantization
#
# One fp32 absmax for 64 weights is half a bit per weight. QLoRA quantizes the absmax values themselves, to 8 bits in blocks
# of 256. How many bits per weight remain? Guess first.

# %%
guess_bits = 4.25

# %%
single = 4 + 32 / 64
double = 4 + 8 / 64 + 32 / (64 * 256)
print(f"{single} bits without, {double:.6f} with; saved {single - double:.3f}; guessed {guess_bits}")

from helpers.quantizers.nf4 import dequantize_absmax, quantize_absmax

again = dequantize_absmax(quantize_absmax(q.absmax))
error = ((again - q.absmax).norm() / q.absmax.norm()).item()
assert error < 0.05
print(f"absmax after 8 bits: off by {error:.1%} (root mean square)")
print(f"Llama-2-70B has 68.5 billion weights in its blocks: {0.373 * 68.5e9 / 8 / 1e9:.1f} GB saved")

# %% [markdown]
# ## NF4 against INT4 at equal block size
#
# Both with blocks of 64, scales not rounded. On a true bell curve and on this model's weights: by how much does NF4 win?

# %%
from helpers.quantizers.affine import decibel, round_to_nearest

torch.manual_seed(0)
samples = {"bell curve": torch.randn(512, 512), "uniform": torch.rand(512, 512) - 0.5, "this model": blocks}
rows = {}
for what, w in samples.items():
    signal = w.square().sum().item()
    error = {"NF4": decibel((w - dequantize_nf4(quantize_nf4(w))).square().sum().item(), signal)}
    for kind, sym in (("INT4 symmetric", True), ("INT4 asymmetric", False)):
        error[kind] = decibel((w - round_to_nearest(w, 4, 64, sym)).square().sum().item(), signal)
    rows[what] = error
    print(f"{what:11}", {k: f"{v:.1f} dB" for k, v in error.items()})
assert rows["bell curve"]["NF4"] < rows["bell curve"]["INT4 symmetric"]
assert rows["uniform"]["NF4"] > rows["uniform"]["INT4 symmetric"]

# %% [markdown]
# On bell curves NF4 beats this symmetric uniform grid by about a decibel, a sixth of a bit. The asymmetric one, which may lie
# where a block's weights are, draws level. On evenly spread values NF4 loses. Note the bits: NF4 with double quantization
# stores 4.127 bits a weight, an INT4 scale in 16 bits makes 4.25, its zero point 4.31.
#
# Weight error is not answers. The record `data/results/sweep_nf4.json` has the answers of the bundled model for each of
# NF4's decision points (`make sweeps` measures it anew):

# %% tags=["nbval-ignore-output"]
from helpers import plots

record = read("sweep_nf4")
print(f"{record.data['questions']} questions, {record.machine['cpu']}, {record.date}")
plots.sweep(record.data["sweeps"], colour="#009E73")
plt.show()

# %% [markdown]
# Each row is set against the first of its panel, question by question, which tells more than two intervals side by side:
#
# - *Blocks* of 128 and more have a measurably higher KL than 64; 32 cannot be told from 64.
# - *Double quantization*: no difference detectable.
# - *Compute dtype*, in which the weights are multiplied: no difference worth naming. fp16 and bf16 stay within 0.0005
#   nats/token of fp32 in loss, intervals included; NF4 itself costs 0.006.
# - *Output head*: in NF4 it is measurably worse, by nearly a quarter of what NF4 costs elsewhere in KL, by over a third in
#   loss.
# - *NF4 or INT4* in blocks of 64: no difference detectable on this model's answers.
#
# ### The same on a real model
#
# SmolLM2-135M-Instruct (chapter 5 introduces it), on a quarter of its texts: two voices of prose, and questions. KL of each
# variant less that of the first of its panel, in % of it, with its interval; one that holds 0 says that no difference can be
# told. (`data/results/sweep_small_nf4.json`.) Which of the five verdicts above differ here?

# %%
guess = "NF4 or INT4"

# %% tags=["nbval-ignore-output"]
from helpers.harness import carry

print(f"guessed: {guess}")
carry.side_by_side("nf4")

# %% [markdown]
# - *NF4 or INT4*: what the bundled model cannot tell, the real one can: the uniform grids have a higher KL, the symmetric one
#   by more than half, the asymmetric one (4.31 bits) by 17 to 28 %. In loss NF4 cannot be told from the asymmetric one
#   ([chapter 11](11_audit.ipynb), C8, has perplexities).
# - *Blocks*: 32 is measurably better than 64 here. 128 and more are worse on both models.
# - *Output head*: worse on both, and here by half of what NF4 costs elsewhere: with 49,152 tokens it is a fifth of the model.
# - *Double quantization* and *compute dtype*: nothing worth naming on either.
#
# ## Loading with bitsandbytes
#
# transformers' own defaults for 4 bits are *fp4*, no double quantization and fp32 compute. Always say what you want:

# %% tags=["nbval-ignore-output"]
import inspect

from helpers.toolkits.bitsandbytes import config

print(inspect.getsource(config))

# %%
from transformers import AutoModelForCausalLM

from helpers.models.source import resolve

loaded = AutoModelForCausalLM.from_pretrained(resolve(run_on["model"], run_on["revision"]), device_map=run_on["device"],
                                              quantization_config=config("nf4"))
kinds = {n: type(m).__name__ for n, m in loaded.named_modules() if "Linear" in type(m).__name__}
left = [n for n, kind in kinds.items() if kind == "Linear"]
print("left in 16 bits:", left)
assert "lm_head" in left

# %% [markdown]
# ## Against the toolkit, bit by bit
#
# Every linear of this model: codes, absmax and double-quantized absmax, ours against what bitsandbytes just made.

# %%
stored = load(run_on["model"], run_on["revision"], "auto").model  # the weights as they lie on disk, which it was given
weights = 0
for linear_name, module in linears(loaded):
    q = quantize_nf4(stored.get_submodule(linear_name).weight.float())
    twice, state = quantize_absmax(q.absmax), module.weight.quant_state
    assert torch.equal(q.packed, module.weight.data.flatten().cpu())
    assert torch.equal(twice.codes, state.absmax.flatten().cpu()) and torch.equal(twice.absmax, state.state2.absmax.cpu())
    weights += torch.Size(q.shape).numel()
print(f"{weights:,} weights: all codes and all absmax values identical")

# %% [markdown]
# ## Where it breaks
#
# - *Outliers*: one large weight in a block pushes the other 63 into the few values around 0. Smaller blocks help, and cost.
# - *Speed*: weights are turned back into 16 bits at each use. Memory is won, time need not be.
# - *Saving late*: on some CPUs bitsandbytes repacks at the first forward pass, and a file saved afterwards is degraded.
# - *No file*: without a saved NF4 file, every start needs the 16-bit checkpoint and quantizes it again.
#
# ## Summary
#
# Sixteen quantiles, one scale per 64 weights, 4.127 bits with double quantization; no calibration, no file needed. On the
# bundled model it cannot be told from a uniform grid in blocks as small; on the real one it loses less than one.
#
# ## Exercises
#
# 1. Derive a 3-bit normal grid (8 values) the same way and measure its dB on the bell curve.
#
# <details><summary>Solution</summary>
#
# `sorted([-v for v in side(4)] + [0.0] + side(5))`, divided by the largest; then the nearest value for each weight as in
# `by_hand`. Each bit is worth 6 to 7 dB.
# </details>
#
# 2. How does the block size change the bits per weight, with and without double quantization?
#
# <details><summary>Solution</summary>
#
# $4 + 32/B$ without, $4 + 8/B + 32/(256 B)$ with. At $B = 32$: 5 and 4.254.
# </details>
#
# ## Quiz
#
# 1. Why does NF4 have eight positive values but only seven negative ones?
# 2. What does transformers give you for `load_in_4bit=True` and nothing else?
# 3. How many calibration samples does NF4 need?
#
# <details><summary>Answers</summary>
#
# 1. Zero takes one of the sixteen. 2. fp4, no double quantization, fp32 compute. 3. None.
# </details>
#
# **Next**: [GPTQ](05_gptq.ipynb), which looks at the inputs. *References*:
# [Dettmers et al. 2023](https://arxiv.org/abs/2305.14314).
