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
# # 1. Start here
#
# **After this chapter** you can say whether this machine can run the book, what the three methods take in and put out,
# and what four bits cost in the model that the book measures.
#
# *Needs*: Python, and a rough idea of what a language model is. *Time*: a minute on a laptop CPU. *On a GPU*: nothing
# changes here.
#
# The question of the book: a team says "quantize this 7B or 70B model". GPTQ, AWQ or NF4, and how do you know? The
# [article it grew from](https://www.abstractalgorithms.dev/gptq-vs-awq-vs-nf4-choosing-the-right-llm-quantization-pipeline)
# answers with rules of thumb. This book answers with measurements that you can repeat, change and disagree with:
# every number on these pages comes from a cell that ran, or from a file that says on which machine, with which versions
# and by which command it was made.

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
# ## This machine
#
# Nothing here needs a GPU or a network. A toolkit that is missing is no obstacle: the book ships what each of them made
# of its model.

# %% tags=["nbval-ignore-output"]
from importlib.util import find_spec

from helpers.results import machine
from helpers.toolkits.process import ORIGINALS

for what, value in machine().items():
    print(f"{what:15} {value}")
for toolkit in ("bitsandbytes", "gptqmodel"):
    print(f"{toolkit:15} {'installed' if find_spec(toolkit) else 'missing: the committed artefacts are read'}")
print(f"{'originals':15} {'installed' if ORIGINALS.is_dir() else 'missing: the committed artefacts are read'}")

# %% [markdown]
# ## Three flows from one checkpoint
#
# All three start from the same 16-bit weights. They differ in what they look at before they round, and in what they leave
# behind.

# %%
import matplotlib.pyplot as plt

from helpers import plots

figure, axes = plt.subplots(figsize=(7.2, 3.6))
plots.pipelines(axes)
plt.show()

# %% [markdown]
# - **GPTQ** runs calibration text through the model, layer by layer, and chooses the integers so that the layer's *output*
#   changes least ([Frantar et al. 2022](https://arxiv.org/abs/2210.17323)). It leaves a file of packed integers.
# - **AWQ** looks at how large the inputs of each layer are, scales the columns that matter up before rounding and the
#   activations down in return ([Lin et al. 2023](https://arxiv.org/abs/2306.00978)). It leaves a file too.
# - **NF4** looks at nothing but the weights: it is a grid of 16 values suited to a bell curve
#   ([Dettmers et al. 2023](https://arxiv.org/abs/2305.14314)). bitsandbytes applies it while the model is loaded; a file
#   is optional.
#
# ## The model that the book measures
#
# Quality needs real weights, so the book brings a model: 3.8 million parameters, trained in 79 minutes on two CPU cores on
# texts about Saltmere, an invented group of islands. In an invented world the truth is known, so each thing that
# quantization can break is checkable. The [datasheet](../data/README.md) says what it can do and how it was made.

# %%
from helpers.book import settings
from helpers.measure.tasks import applicable, examples
from helpers.models.source import load

run_on = settings(model, profile)
lm, tokenizer = load(*(run_on[k] for k in ("model", "revision", "dtype", "device")))
tasks = applicable(tokenizer, ["facts", "arithmetic", "recall_4", "json", "tool"])
asked = examples("tune", tasks, limit=1)
for e in asked:
    print(f"[{e.task}] {e.prompt}\n    right: {e.answer}")

# %% [markdown]
# ## Predict, then look
#
# Now the same questions at fewer bits, by the plainest method there is: round each weight to the nearest of $2^b$ evenly
# spaced values, with one grid for every 128 weights of a row (chapter 3 writes it out). How many of the five answers
# survive at 4, 3 and 2 bits? Put your guess here before you run on.

# %%
guess = {4: 5, 3: 3, 2: 1}

# %% tags=["nbval-ignore-output"]
import pandas as pd

from helpers.measure.answers import generate, is_correct
from helpers.methods.rtn import Rtn
from helpers.models.layers import common_group
from helpers.models.quantize import quantized

group = common_group(lm)  # 128, or what divides this model's widths


def rounded(n_bits):
    return quantized(lm, Rtn(n_bits, group, sym=False))


answers, right = {}, {}
for n_bits in (16, 4, 3, 2):
    variant = lm if n_bits == 16 else rounded(n_bits)
    answers[n_bits] = generate(variant, tokenizer, asked, max_new_tokens=48)
    right[n_bits] = sum(is_correct(e, said) for e, said in zip(asked, answers[n_bits], strict=True))
print("right:", right, " guessed:", guess)
pd.DataFrame(answers, index=[e.task for e in asked]).rename(columns="{} bits".format)

# %% [markdown]
# One question a task is an anecdote. The same on more of them, as the loss per answer token: how much less probable did
# the right answer become? Both models see the same texts, so the difference is taken text by text, and its interval is far
# tighter than that of either loss.

# %%
from helpers.measure.quality import score
from helpers.measure.tasks import encode_all

items = encode_all(tokenizer, examples("tune", tasks, limit=20), lm.config)
full = score(lm, items)
increase = {bits: score(rounded(bits), items).answer.delta_nll(full.answer) for bits in (4, 3, 2)}
for n_bits, interval in increase.items():
    verdict = "told from zero" if interval.excludes_zero() else "not told from zero at this sample size"
    print(f"{n_bits} bits: {verdict}")
assert all(i.low <= i.estimate <= i.high for i in increase.values())

# %%
figure, axes = plt.subplots(figsize=(6, 2.2))
for n, (_, i) in enumerate(increase.items()):
    axes.errorbar(i.estimate, n, xerr=[[i.estimate - i.low], [i.high - i.estimate]], fmt="o", color="#56B4E9", capsize=3)
axes.axvline(0, color="black", linewidth=0.8)
axes.set_yticks(range(3), [f"{b} bits" for b in increase])
axes.set(xlabel="increase of the loss on answers (nats/token), 95 % interval", ylim=(2.5, -0.5))
axes.set_xscale("symlog", linthresh=0.01)
plt.show()

# %% [markdown]
# At some number of bits rounding begins to cost answers, and there a method has to be clever. That is where the book compares
# GPTQ, AWQ and NF4, and why it measures answers, not impressions.
#
# Is it the same on a larger model? On SmolLM2-135M, a real one, rounding to 4 bits in groups of 64 costs measurably, too, and
# far more: its KL, how far the probabilities moved ([chapter 2](02_pipelines.ipynb)), is 0.24 to 0.33 nats/token, by text
# ([chapter 5](05_gptq.ipynb)); on the bundled model, in groups of 128, it is 0.009. Chapters 2 to 7, 10 and 11 say which of
# their verdicts hold on both models (chapter 7 of its maps alone), and [chapter 12](12_two_models.ipynb) counts them; chapter 9
# shows the bundled one alone, and runs on any.
#
# ## How to run it
#
# | where | how |
# |---|---|
# | here, all of it | `make book`, then open `_build/site/_build/html/index.html` |
# | JupyterLab | `make env`, then `.venv/bin/jupyter lab chapters` (install `jupyterlab` into it first) |
# | Colab | open a chapter's notebook there, set `BOOK` in the first cell, run; Colab's own torch is left as it is |
# | another model | set `model` in the cell that begins with it, in any chapter, or with papermill: see the README |
# | a workshop | one chapter an hour; the prediction cells are meant to be filled in before the next cell runs |
#
# ## The map
#
# | chapter | question |
# |---|---|
# | 1 Start here | what is this, and does it run here? |
# | [2 One model, three pipelines](02_pipelines.ipynb) | what do the real toolkits make of one model? |
# | [3 The error formula](03_error_formula.ipynb) | what does rounding cost, and where does the data come in? |
# | [4 NF4](04_nf4.ipynb) | what can a better grid do, without data? |
# | [5 GPTQ](05_gptq.ipynb) | what can columns do for each other? |
# | [6 AWQ](06_awq.ipynb) | what can scaling do, and when? |
# | [7 Sensitivity](07_sensitivity.ipynb) | which layers must not be 4-bit, and what is a mixed plan worth? |
# | [9 The harness](09_harness.ipynb) | which variant passes my limits, and which differences are real? |
# | [10 Choosing](10_choosing.ipynb) | the decision run for three uses; five ways to fail |
# | [11 The article, audited](11_audit.ipynb) | which of its 24 claims hold? |
# | [12 Two models](12_two_models.ipynb) | what can a small model tell of a larger one, and what not? |
#
# The chapter on kernels and speed (8) is not written yet.
#
# ## Exercises
#
# 1. Round with one grid for a whole row (`group_size=-1`) and with one for every 32 weights, at 3 bits. What does the
#    loss do?
#
# <details><summary>Solution</summary>
#
# `{g: score(quantized(lm, Rtn(3, g, sym=False)), items).answer.delta_nll(full.answer).estimate for g in (-1, 128, 32)}`.
# Smaller groups follow the weights more closely, so the loss falls; each group also has to store its own grid (chapter 2).
# </details>
#
# 2. Which of the five tasks loses most at 3 bits? `score(...).select("json")` gives the scores of one task.
#
# <details><summary>Solution</summary>
#
# `{t: score(rounded(3), items).select(t).answer.delta_nll(full.select(t).answer) for t in tasks}`. With 20 questions
# a task the intervals overlap: the order is a hint, not a result. The datasheet has 300 a task.
# </details>
#
# ## Quiz
#
# 1. Which of the three methods needs no calibration text?
# 2. Why is the difference of two models' losses known more exactly than either loss?
#
# <details><summary>Answers</summary>
#
# 1. NF4: it looks only at the weights. 2. Both losses share the luck of which texts were drawn; in the difference, text by
# text, it cancels.
# </details>
#
# **Next**: [one model through all three real pipelines](02_pipelines.ipynb).
