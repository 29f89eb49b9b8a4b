"""What learning the roundings does to first tokens, and to all others: `python -m benchmarks.first_token`, minutes on one core.

Blocks of the small model alone, on inputs of the unquantized model, quantized by GPTQ and by GPTQ, then SignRound, with all
tokens alike and with the first of each window counting as much as all others. Writes data/results/small_first_token.json: the
mean squared error of the block's outputs on windows that nothing was learned from, at first tokens and at all others.
"""

import copy
from dataclasses import replace

from tqdm import tqdm

from benchmarks.sweeps import SUBJECTS
from helpers.methods.gptq import Gptq
from helpers.methods.gptq_signround import GptqSignRound
from helpers.models.fetch import origin
from helpers.models.method import Plan
from helpers.models.quantize import Outcome, quantize_block
from helpers.models.source import Source
from helpers.models.walk import Step, Stream, walk
from helpers.results import Record, save

SMALL, BLOCKS, LEARNED, OTHER = SUBJECTS["small"], (3, 9, 15, 21), 32, 16
LEARN = GptqSignRound(4, SMALL.group, desc_act=True, steps=100)
METHODS = {"GPTQ": Gptq(4, SMALL.group, desc_act=True), "all tokens alike": LEARN,
           "first counts": replace(LEARN, alike=False)}


def errors(step: Step, other: Stream) -> dict[str, list[float]]:
    """{method: mean squared error of the block's output on other text, [of first tokens, of the others]}."""
    aims, found = other.through(step.block).batches, {}
    for name, method in METHODS.items():
        block = copy.deepcopy(step.block)
        quantize_block(replace(step, block=block), Plan(method, inputs="block"), Outcome())
        apart = [(a.hidden - b.hidden).square().mean((0, 2)) for a, b in zip(other.through(block).batches, aims, strict=True)]
        found[name] = [float(sum(of) / len(apart)) for of in ((e[0] for e in apart), (e[1:].mean() for e in apart))]
    return found


def main() -> None:
    source, windows = Source.of(SMALL.base.load()), SMALL.tokens(count=LEARNED + OTHER)
    other, found = Stream.start(source, windows[LEARNED:], LEARN.at_once), {}
    for n, step in enumerate(tqdm(walk(source, windows[:LEARNED], LEARN.at_once), total=len(source.blocks))):
        if n in BLOCKS:
            found[n] = errors(step, other)
        if n == max(BLOCKS):
            break
        other = other.through(step.block)
    told = {"learned": LEARNED, "other": OTHER, "steps": LEARN.steps, "model": origin(SMALL.base.folder), "errors": found}
    print(save(Record("small_first_token", told, command="python -m benchmarks.first_token", seed=0,
                      model_sha256=SMALL.base.weights)))


if __name__ == "__main__":
    main()
