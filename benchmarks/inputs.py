"""What the inputs of the linears look like in the bundled model, in its variant with outlier channels, and in SmolLM2:
`python -m benchmarks.inputs`, some two minutes on one core. Writes data/results/inputs.json.
"""

from benchmarks.sweeps import SUBJECTS, WINDOWS
from helpers.files import folder_hash
from helpers.measure.inputs import POSITIONS, SHARES, look_at
from helpers.models.fetch import origin
from helpers.models.source import BUNDLED
from helpers.results import Record, save


def main() -> None:
    bundled, small = SUBJECTS["bundled"], SUBJECTS["small"]
    models = {"bundled": (bundled, bundled.base), "with outlier channels": (bundled, bundled.loud), "real": (small, small.base)}
    rows = {name: look_at(full.load(), subject.tokens()[:WINDOWS]) for name, (subject, full) in models.items()}
    real = [origin(small.base.folder), folder_hash(small.base.folder)]
    told = {"shares": SHARES, "positions": POSITIONS, "windows": WINDOWS, "rows": rows, "real": real}
    print(save(Record("inputs", told, command="python -m benchmarks.inputs", model_sha256=folder_hash(BUNDLED))))


if __name__ == "__main__":
    main()
