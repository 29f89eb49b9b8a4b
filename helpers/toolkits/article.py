"""The third code example of the article the book grew from, run in its spirit: both archived toolkits on three strings.

Runs in the originals' environment. What fails is the point: each step's outcome is reported, an error with its message.
"""

from collections.abc import Callable
from pathlib import Path

from helpers.toolkits import autoawq, autogptq
from helpers.toolkits.process import Job, main

PROMPTS = ["The ferry leaves Saltby at noon.", "What is 12 + 30?", "Name the harbour master of Brask."]


def outcome(step: Callable[[], None]) -> str:
    """What came of a step: "done", or the type and the first line of its error."""
    try:
        step()
    except Exception as error:  # whatever a toolkit raises is the result here
        return f"{type(error).__name__}: {str(error).splitlines()[0]}"
    return "done"


def quantize(job: Job, out: Path) -> dict:
    """Each call of the example as the article has it, then with what it takes to make it run."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(job.source)
    tokens = [tokenizer.encode(p) for p in PROMPTS]

    def gptq(calibration: list) -> Callable[[], None]:
        return lambda: autogptq.wrap(job.source).quantize(calibration, cache_examples_on_gpu=False)

    def awq(calibration: list, **limits) -> Callable[[], None]:
        return lambda: autoawq.load(job.source).quantize(tokenizer, quant_config=autoawq.SETTINGS, calib_data=calibration,
                                                         **limits)

    steps = {
        "AutoGPTQ, three strings, as printed": gptq(PROMPTS),
        "AutoGPTQ, the strings as tokens": gptq(autogptq.rows(tokens)),
        "AutoAWQ, three strings, its defaults": awq(PROMPTS),
        "AutoAWQ, three strings, one short window": awq(PROMPTS, max_calib_seq_len=max(map(len, tokens))),
    }
    return {"toolkit": "article", "tokens": sum(map(len, tokens)), "steps": {name: outcome(s) for name, s in steps.items()}}


if __name__ == "__main__":
    main(quantize)
