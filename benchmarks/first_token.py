"""How well the linears of SmolLM2 keep first tokens, and how well all others, by rounding, by GPTQ, and by GPTQ that does not
see the first: `python -m benchmarks.first_token`, ten minutes on one core. Writes data/results/small_first_token.json.
"""

from tqdm import tqdm

from benchmarks.methods import FirstBeside, GptqBesideFirst
from benchmarks.sweeps import SUBJECTS, WINDOWS
from helpers.methods.gptq import PLAIN
from helpers.methods.rtn import Rtn
from helpers.models.fetch import origin
from helpers.models.walk import walk
from helpers.quantizers.affine import decibel, output_error
from helpers.results import Record, save

SMALL = SUBJECTS["small"]
GPTQ = {"bits": 4, "group_size": SMALL.group, "sym": False, **PLAIN}
METHODS = {"rounding": Rtn(4, SMALL.group, sym=False), "GPTQ": GptqBesideFirst(**GPTQ),
           "GPTQ without first tokens": GptqBesideFirst(**GPTQ, first=False)}


def main() -> None:
    """On inputs of the unquantized model, so that every linear is judged alone: errors in dB of its output."""
    rows = []
    for n, step in enumerate(tqdm(walk(SMALL.base.load(), SMALL.tokens(count=WINDOWS)), desc="blocks")):
        for linear, kept in step.grams(FirstBeside).items():
            W = step.block.get_submodule(linear).weight.detach().float()
            for name, method in METHODS.items():
                dW = W - method.solve(W, kept)[0].stored().dequantize()
                first, rest = (decibel(output_error(dW, H), output_error(W, H)) for H in (kept.first, kept.rest))
                rows.append({"block": n, "linear": linear, "method": name, "first": first, "rest": rest})
    told = {"windows": WINDOWS, "model": origin(SMALL.base.folder), "rows": rows}
    print(save(Record("small_first_token", told, command="python -m benchmarks.first_token", model_sha256=SMALL.base.weights)))


if __name__ == "__main__":
    main()
