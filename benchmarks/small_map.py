"""The layers of the small model, each quantized alone to 3 bits: `python -m benchmarks.small_map`, an hour on one core.

What benchmarks/sensitivity.py does for the bundled model, with fewer settings, texts and no plans. Goes on at the cell it was
at. Writes data/results/small_map.json: KL of each layer and setting with its interval, on texts of the tuning set.
"""

import argparse

from benchmarks.sensitivity import interval, nested
from benchmarks.sweeps import SUBJECTS
from helpers.harness.sensitivity import Sensitivity
from helpers.methods.gptq import Gptq
from helpers.methods.rtn import Rtn
from helpers.models.fetch import origin
from helpers.results import Record, save

SMALL = SUBJECTS["small"]
MAP = (Gptq(3, SMALL.group, act_group_aware=False), Rtn(3, SMALL.group))
WINDOWS, EACH = 32, 10  # of calibration; of the tuning texts every so many


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    sens = Sensitivity(SMALL.items("tuned")[::EACH], SMALL.tokens(count=WINDOWS), SMALL.base, device=args.device)
    found = {}
    for method in MAP:  # the first is whole before the next begins
        found |= sens.down([method])
    told = {"texts": len(sens.items), "tokens": int(next(iter(found.values())).arrays["answer_tokens"].sum()),
            "windows": WINDOWS, "model": origin(SMALL.base.folder),
            "map": nested({key: interval(cell.arrays) for key, cell in found.items()}),
            "errors": nested({key: float(cell.arrays["output_error"]) for key, cell in found.items()})}
    print(save(Record("small_map", told, command=f"python -m benchmarks.small_map --device {args.device}", seed=0,
                      model_sha256=SMALL.base.weights)))


if __name__ == "__main__":
    main()
