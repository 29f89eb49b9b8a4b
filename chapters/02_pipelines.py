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
# # 2. One model, three pipelines
#
# **After this chapter** you can say what each real toolkit makes of one and the same model: how many bytes, how much loss,
# which answers lost, and how long the making took.
#
# *Needs*: [chapter 1](01_start_here.ipynb). *Time*: a minute on a laptop CPU, some minutes more if the toolkits run anew.
# *On a GPU*: the same cells; speed is then worth reading.
#
# The pipelines are bitsandbytes (NF4, with int8 as the mild fallback) and GPTQModel (GPTQ and AWQ), each as its own
# documentation recommends, but that GPTQModel's group-aware order of columns is off: so its GPTQ has auto-gptq's settings,
# except for the damping ([chapter 5](05_gptq.ipynb)). Beside them stand the two archived toolkits that GPTQModel replaced,
# auto-gptq and autoawq, because their files are still everywhere.

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
from helpers.book import settings
from helpers.models.source import load

run_on = settings(model, profile)
lm, tokenizer = load(*(run_on[k] for k in ("model", "revision", "dtype", "device")))
print(f"{lm.config.num_hidden_layers} blocks of width {lm.config.hidden_size}, {lm.num_parameters():,} parameters")

# %% [markdown]
# ## Four artefacts
#
# Each toolkit runs in a process of its own, because importing one patches libraries that the others use. GPTQ and AWQ
# calibrate on the same text, at most 128 windows of 256 tokens (32 for another model than the bundled one without a GPU, where
# a small model takes minutes even so). The committed artefacts are read unless `rebuild` is set.

# %% tags=["nbval-ignore-output"]
import pandas as pd
import torch

from helpers.models.source import BUNDLED, resolve
from helpers.toolkits import artefacts

names = ["bitsandbytes-int8", "bitsandbytes-nf4", "gptqmodel-gptq", "gptqmodel-awq"]
is_bundled = resolve(run_on["model"], run_on["revision"]) == BUNDLED
count = 128 if is_bundled or run_on["device"] != "cpu" else 32
of = (run_on["model"], rebuild, run_on["revision"], count)
folders = artefacts.available(names, *of)  # says which are missing and why: not every toolkit takes every model
reports = {name: artefacts.report(folder) for name, folder in folders.items()}
pd.DataFrame({name: {"seconds, with import and load": r["seconds"], "calibration tokens": r["calibration_tokens"],
                     "CPU": r["machine"]["cpu_capability"]} for name, r in reports.items()}).T

# %% [markdown]
# ## Bytes: predict, then measure
#
# All these methods cut the weights of a linear into groups. A group shares a *scale*, the size of a step, and some a *zero
# point*, the step that means 0; what is kept of a weight is its *code*, the number of its step ([chapter
# 3](03_error_formula.ipynb) does it by hand). A file format says which tensors that makes, so its size follows from the shape.
# With $n$ weights in groups of 128 a linear takes, in the GPTQ format, $n/2$ bytes of packed integers, a 2-byte scale and half
# a byte of zero point for each group, and 4 bytes for each input column, which name its group:
#
# $$\text{bytes} = \frac{n}{2} + \frac{n}{128}\left(2 + \frac12\right) + 4\,\text{columns}$$
#
# AWQ is the same without the last term. NF4 takes a byte for each block of 64, an fp32 number for each 256 of those bytes, and
# two tables of 16 and 256 such numbers. Embeddings, norms and the output head stay in 16 bits. How many bits a parameter is
# that, over the whole model? Guess before you run on: the embeddings of a small model weigh heavily.

# %%
guess_bits_per_parameter = {"nf4": 4.5, "gptq": 4.5, "awq": 4.5}

# %%
from helpers.harness.variants import ToolkitArtefact
from helpers.models.layers import common_group, linears

whole = all(m.in_features % common_group(lm) == 0 for _, m in linears(lm))  # where groups do not fill a row, toolkits pad
variants = {name: ToolkitArtefact(name, run_on["model"], run_on["revision"], rebuild, windows=count) for name in folders}
rows = {}
for name, variant in variants.items():
    predicted, measured = variant.predicted(), variant.measured()
    rows[name] = {"predicted": predicted, "measured": measured,
                  "bits per parameter": round(8 * measured / lm.num_parameters(), 2),
                  "guessed": guess_bits_per_parameter.get(variant.name.rpartition("-")[2], "")}
    assert predicted == measured or not whole, name
memory = pd.DataFrame(rows).T.astype({"predicted": int, "measured": int})
memory

# %% [markdown]
# The prediction is exact, so it can be trusted for a model that does not fit on this machine. For Llama-2-70B, whose shape
# is public:

# %%
from transformers import LlamaConfig

from helpers.measure.bytes import predicted_bytes
from helpers.methods.awq import Awq
from helpers.methods.gptq import Gptq
from helpers.methods.int8 import RowInt8
from helpers.methods.keep import Keep
from helpers.methods.nf4 import Nf4

llama_2_70b = LlamaConfig(vocab_size=32000, hidden_size=8192, intermediate_size=28672, num_hidden_layers=80,
                          num_attention_heads=64, num_key_value_heads=8)
for method in (Keep(), RowInt8(), Nf4(), Gptq(), Awq()):
    print(f"{method.name:5} {predicted_bytes(llama_2_70b, method) / 1e9:6.2f} GB")

# %% [markdown]
# ## How far apart are two models? One token, by hand
#
# At each position a model gives every token of its vocabulary a probability. Say there are three tokens, the 16-bit model gives
# $p = (0.7, 0.2, 0.1)$, a quantized one $q = (0.5, 0.3, 0.2)$, and the right token is the first. The *loss* on it rises by
# $\ln 0.7 - \ln 0.5$. The *KL divergence* is that difference for every token, weighted by how likely the 16-bit model finds it:
#
# $$\mathrm{KL}(p \,\|\, q) = \sum_i p_i \ln\frac{p_i}{q_i} \tag{2.1}$$

# %%
p, q = torch.tensor([0.7, 0.2, 0.1]), torch.tensor([0.5, 0.3, 0.2])
print(f"change of the loss {(p[0].log() - q[0].log()).item():+.4f} nats")
print(f"KL divergence      {(p * (p / q).log()).sum().item():+.4f} nats")
same = torch.nn.functional.kl_div(q.log(), p, reduction="sum")
assert torch.isclose(same, (p * (p / q).log()).sum())

# %% [markdown]
# The loss looks at one token and may fall by luck, where the quantized model happens to like the right answer better. KL looks
# at all of them, is zero only if nothing changed, and never falls below. With natural logarithms the unit is the *nat*.

# %% [markdown]
# ## Quality: the same questions to each
#
# The artefacts are loaded through transformers, as a user would, and asked the same questions as the 16-bit model. Three
# measures, from the most sensitive to the most tangible: KL divergence from the 16-bit model on the answer tokens, the
# change of the loss on the right answers (ΔNLL), and the answers that are right. Beside them stands the *perplexity* of whole
# texts, $e$ to the mean loss of a token.

# %% tags=["nbval-ignore-output"]
from helpers.measure.quality import compare
from helpers.measure.tasks import applicable, encode_all, encode_text, examples, render, text
from helpers.models.texts import context_of

asked = examples("judge", applicable(tokenizer), limit=run_on["limit"])
items = encode_all(tokenizer, asked, lm.config)
prose = encode_text(tokenizer, text("tales")[:40], min(512, context_of(tokenizer, lm.config)))

loaded = {name: variant.load(run_on["device"]) for name, variant in variants.items()}
scores = compare({"16 bits": lm} | loaded, items, reference=lm)
perplexity = {name: s.all.perplexity() for name, s in compare({"16 bits": lm} | loaded, prose).items()}
full = scores.pop("16 bits")

# %% tags=["nbval-ignore-output"]
from helpers.harness.compare import shown, summary

print(f"16 bits: {full.exact.mean():.1%} exact, {len(items)} questions, perplexity of tales {perplexity['16 bits']:.3f}")
found = summary(scores, full)
shown(found).assign(**{"perplexity of tales": [round(perplexity[name], 3) for name in found]})

# %% tags=["nbval-ignore-output"]
import matplotlib.pyplot as plt

from helpers import plots

kinds = {name: artefacts.ARTEFACTS[name].plan.name for name in scores}  # a colour and a marker for each method
figure, axes = plt.subplots(1, 2, figsize=(8, 2.6), sharey=True)
plots.intervals(axes[0], {n: row["kl"] for n, row in found.items()}, "KL from the 16-bit model (nats/token)", kinds)
plots.intervals(axes[1], {n: row["delta_nll"] for n, row in found.items()}, "ΔNLL on answers (nats/token)", kinds)
plt.show()

# %% [markdown]
# Read the two together. KL is never negative and sees every change, for better or worse; ΔNLL asks whether the right answer
# became less probable. A method whose ΔNLL interval contains zero did not measurably harm the answers *at this sample size*.
# Each is set against 16 bits: that one method is told from it and another is not does not rank the two.

# %% [markdown]
# Where did the lost answers go? By task:

# %% tags=["nbval-ignore-output"]
figure, axes = plt.subplots(figsize=(7, 4.2))
by_task = {"16 bits": full} | scores
plots.exact_by_task(axes, {n: {t: s.select(t).exact for t in dict.fromkeys(s.tasks)} for n, s in by_task.items()},
                    kinds | {"16 bits": "fp16"})
plt.show()

# %% [markdown]
# ## Tokens per second, with a warning
#
# A model this small spends its time in Python, not in arithmetic: what follows compares overheads. Bytes moved decide the
# speed of a large model; that needs the large shapes, and a chapter of its own.

# %% tags=["nbval-ignore-output"]
from helpers.measure.latency import tokens_per_second

speed = {"16 bits": tokens_per_second(lm)} | {name: tokens_per_second(m) for name, m in loaded.items()}
pd.DataFrame(speed, index=["median", "fastest"]).T.round(0)

# %% [markdown]
# ## On other machines
#
# `make gpu` runs this chapter on a 7B model and keeps what it measured as a record. The records that are there:

# %% tags=["nbval-ignore-output"]
from helpers.book import RECORDS
from helpers.harness.variants import Original
from helpers.results import Record, read_all, save

if profile:  # the default run is in the cells above
    measured = {n: row | {"bytes": int(memory.measured[n]), "tokens_per_second": speed[n][0]} for n, row in found.items()}
    weights = Original(run_on["model"], run_on["revision"]).weights
    save(Record(f"pipelines_{profile}", run_on | {"artefacts": measured}, model_sha256=weights), RECORDS)
for record in (there := read_all("pipelines_")):
    print(f"{record.data['model']} at {record.data['revision']}, {record.machine['gpu']}, {record.date}:")
    for name, row in record.data["artefacts"].items():
        print(f"    {name:18} KL {row['kl'][0]:.4f}  exact {row['exact']:.1%}  {row['tokens_per_second']:.0f} tokens/s")
if not there:
    print("none yet: no 7B model has been through this chapter")

# %% [markdown]
# ## The originals beside their successors
#
# auto-gptq and autoawq are archived and need a transformers of 2025. What did they make of the same model, and how much of
# it is bit for bit what GPTQModel makes? A difference is no error by itself: both first add
# a little to the diagonal of a matrix (*damping*, [chapter 5](05_gptq.ipynb)), auto-gptq 1 % and GPTQModel 5 %, and one code
# rounded the other way changes every column after it.

# %% tags=["nbval-ignore-output"]
from helpers.models.source import ModelUnavailable
from helpers.toolkits.compare import same_codes

successors = {"autogptq-gptq": "gptqmodel-gptq", "autoawq-awq": "gptqmodel-awq"}
originals = {old: folder for old, folder in artefacts.available(successors, *of).items() if successors[old] in folders}
for old, folder in originals.items():
    new = successors[old]
    try:
        s = compare({old: artefacts.reload(folder, run_on["device"])}, items, lm)[old]
        print(f"{old}: {same_codes(folder, folders[new]):.1%} of its 4-bit codes are those of {new}")
        print(f"    KL {s.answer.kl_interval()}, against {scores[new].answer.kl_interval()}")
    except (ModelUnavailable, ValueError) as error:  # what it pads, transformers may not read
        print(f"{old}: {error}")

# %% [markdown]
# ## The article's three code examples
#
# The article shows three programs. Here they are in spirit, with this model in place of Llama-2-7B and Mistral-7B.
#
# *Example 1* loads a GPTQ and an AWQ checkpoint, asks both the same thing, and notes seconds and characters of 96 tokens.

# %% tags=["nbval-ignore-output"]
import time

from helpers.measure.answers import greedy

question = tokenizer.encode(render(tokenizer, asked[0])[0], add_special_tokens=False, return_tensors="pt").to(lm.device)
for name in [n for n in ("gptqmodel-gptq", "gptqmodel-awq") if n in loaded]:
    started = time.perf_counter()
    out = loaded[name].generate(question, attention_mask=torch.ones_like(question), generation_config=greedy(96))
    said = tokenizer.decode(out[0, question.shape[1]:], skip_special_tokens=True)
    print(f"{name}: {time.perf_counter() - started:.2f} s, {len(said)} characters: {said[:60]}")

# %% [markdown]
# It runs, and says little: one request, no warm-up, and characters are no unit of a model's work. A faster time may only
# mean that one answer was shorter. The table of KL and right answers above says what the example asks.
#
# *Example 2* loads a 16-bit checkpoint straight into NF4, with double quantization (the scales are quantized as well, [chapter
# 4](04_nf4.ipynb)) and bf16 compute, and generates 80 tokens. That is the call behind `bitsandbytes-nf4`, without the file:

# %% tags=["nbval-ignore-output"]
from transformers import AutoModelForCausalLM

from helpers.toolkits.bitsandbytes import config, usable

nf4 = usable(AutoModelForCausalLM.from_pretrained(resolve(run_on["model"], run_on["revision"]), device_map=run_on["device"],
                                                  quantization_config=config("nf4")))
out = nf4.generate(question, attention_mask=torch.ones_like(question), generation_config=greedy(80))
print(tokenizer.decode(out[0, question.shape[1]:], skip_special_tokens=True)[:60])

# %% [markdown]
# *Example 3* quantizes with AutoGPTQ and with AutoAWQ, calibrated on three strings. This is what came of it, in the
# environment of the originals:

# %%
from helpers.toolkits.process import ToolkitMissing

try:
    steps = artefacts.example_3(rebuild)
except ToolkitMissing:
    steps = artefacts.example_3()
for step, outcome in steps.items():
    print(f"{step}\n    {outcome}")

# %% [markdown]
# - AutoGPTQ's `quantize` wants token dictionaries. Given strings, as printed, it indexes into the first one and stops.
#   (GPTQModel takes strings.)
# - AutoAWQ lays all texts end to end and cuts windows of 512 tokens. Three short prompts do not fill one, so it has
#   nothing to join, and the message does not say so.
# - With tokens, or a window that the prompts fill, both finish. That they finish does not make three prompts a
#   calibration set; chapter 5 measures how many tokens make one.
#
# ## Where it breaks
#
# - GPTQModel's AWQ keeps only the last batch if calibration sequences differ in length, and autoawq drops sequences longer
#   than its limit, both without a word. The helpers cut equal windows and record the number of tokens.
# - autoawq on a CPU corrupts its own backup of the weights: `weight.cpu()` copies on a GPU, but on a CPU returns the tensor
#   itself. `helpers/toolkits/autoawq.py` makes it a copy; its unpatched CPU output should not be used.
# - bitsandbytes repacks NF4 weights at the first forward pass on some CPUs, and a file saved after that is degraded: save
#   first. There it also fails on a linear whose inputs 64 does not divide; `usable` keeps such a linear as it was.
#
# ## Summary
#
# One model went through bitsandbytes, GPTQModel and their predecessors. Sizes follow from the shapes exactly, of any model.
# Quality has to be measured, with intervals: at 4 bits some differences are of the size of the noise in a small test set, and
# none of this page's is a verdict on another model. On SmolLM2-135M the order of NF4, GPTQ and AWQ is another one, and
# auto-gptq's file is measurably farther from 16 bits than the one that our GPTQ makes by the same settings ([chapter
# 12](12_two_models.ipynb)).
#
# ## Exercises
#
# 1. Which method changed most answers in either direction, and does that agree with the order by KL?
#
# <details><summary>Solution</summary>
#
# Compare lost plus won with the KL column of the table. KL sees small shifts in every token; an answer flips only where two
# tokens were nearly equal.
# </details>
#
# 2. What would Llama-2-70B take at group size 32 in the GPTQ format?
#
# <details><summary>Solution</summary>
#
# `predicted_bytes(llama_2_70b, Gptq(group_size=32)) / 1e9`: the scales and zeros are four times as many.
# </details>
#
# ## Quiz
#
# 1. Why does a 4-bit file of this small model take more than 4.5 bits a parameter?
# 2. Two artefacts agree in only part of their codes. Is one of them wrong?
#
# <details><summary>Answers</summary>
#
# 1. Embeddings and head stay in 16 bits, and in a small model they are a large share. 2. Not by itself: see the damping.
# Compare the output error.
# </details>
#
# **Next**: [the error formula](03_error_formula.ipynb), by hand.
