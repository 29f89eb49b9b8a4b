"""Compare quantized variants of a model, check them against your limits, and pick one: `python -m helpers.compare --help`.

Exit status: 0 a variant passes every gate, 99 none does, 98 undecided (nothing passes, and something might on a larger sample),
2 bad input. With --results OLD NEW: 0 nothing got measurably worse, 99 something did.
"""

import sys
from argparse import ArgumentParser, ArgumentTypeError, Namespace, RawDescriptionHelpFormatter
from pathlib import Path

from helpers import book
from helpers.files import write_atomically
from helpers.harness import report
from helpers.harness.gates import FAIL, PASS, UNDECIDED
from helpers.harness.jobs import executor_at
from helpers.harness.named import DEFAULT, located
from helpers.harness.study import DEFAULT_GATES, DTYPES, prepared
from helpers.page import to_html

STATUS = {PASS: 0, FAIL: 99, UNDECIDED: 98}
BAD_INPUT = 2


def requests_a_second(text: str) -> float:
    """An option's value; argparse turns what is raised into a message that names the option."""
    if not (rate := float(text)) > 0:
        raise ArgumentTypeError(f"expected requests a second, above 0, got {text}")
    return rate


def parse(argv: list[str]) -> Namespace:
    parser = ArgumentParser("python -m helpers.compare", description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="bundled", help="bundled, a folder with safetensors, a hub id, or a config.json, "
                        "whose shapes then get random weights, for latency and memory alone")
    parser.add_argument("--revision", help="of a hub id")
    parser.add_argument("--prompts", type=Path, help='your questions, a .jsonl of {"prompt", and if you have them "answer", '
                        '"task", "schema"}; a third of them is kept to choose settings by')
    parser.add_argument("--gates", type=Path, default=DEFAULT_GATES, help="your limits, YAML (chapter 9)")
    parser.add_argument("--methods", nargs="+", default=[], metavar="METHOD", help=f"{' '.join(DEFAULT)}; one "
                        "with settings, gptq:bits=3,group_size=64; an artefact such as autogptq-gptq; the folder of a "
                        "quantized model; a plan.json of `python -m helpers.sensitivity`")
    parser.add_argument("--out", type=Path, default=book.BUILD / "compare", help="folder for the notebook, report.html, "
                        "results.json, manifest.yml and the figures")
    parser.add_argument("--limit", type=int, default=50, help="most questions a task, of the book's own")
    parser.add_argument("--serve", nargs="+", type=requests_a_second, default=[], metavar="RATE", help="also on a serving "
                        "engine (make serving), at these rates of requests a second")
    parser.add_argument("--executor", help="dask://host:port: scores are computed on a cluster that sees the same files")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", choices=DTYPES, help="that full precision is computed in")
    parser.add_argument("--results", nargs=2, type=Path, metavar=("OLD", "NEW"), help="compare two results.json instead")
    return parser.parse_args(argv)


def compare(options: Namespace) -> int:
    """Measure, judge, report; the exit status."""
    path = Path(options.model).expanduser()  # in full: the notebook runs in another folder
    model = str(path.resolve()) if options.model != "bundled" and path.exists() else options.model
    given = {"model": model, "revision": options.revision, "dtype": options.dtype, "device": options.device,
             "prompts": options.prompts and str(options.prompts.resolve()), "gates": str(options.gates.resolve()),
             "methods": located(options.methods), "limit": options.limit}
    book.quiet()
    options.out.mkdir(parents=True, exist_ok=True)
    with executor_at(options.executor) as executor:
        study = prepared(**given)
        measured = study.measure(executor, rates=options.serve)
    verdict = study.verdict(measured)
    report.save(report.results(study, measured, verdict), options.out / "results.json")
    write_atomically(options.out / "manifest.yml", report.manifest(study, verdict, measured))
    # the chapter finds every cell in the store
    notebook = options.out / "report.ipynb"
    book.fresh(book.CHAPTERS / "09_harness.py", fresh := options.out / "report.fresh.ipynb")
    book.execute(fresh, notebook, **given, rates=options.serve, out=str(options.out.resolve()))
    fresh.unlink()
    to_html(notebook, options.out / "report.html")
    for name, reason in verdict.reasons.items():
        print(f"{name:12} {reason}")
    print(f"verdict: {verdict.outcome}; pick: {verdict.pick or 'none'}; fallback: {verdict.fallback or 'none'}\n"
          f"{options.out / 'report.html'}")
    return STATUS[verdict.outcome]


def main(argv: list[str]) -> int:
    options = parse(argv)
    try:
        if options.results:
            worse = report.worse(*map(report.read, options.results))
            print("\n".join(worse) or "nothing got measurably worse")
            return STATUS[FAIL] if worse else STATUS[PASS]
        return compare(options)
    except (ValueError, OSError) as error:
        print(f"error: {error}".replace("\n", " "), file=sys.stderr)
        return BAD_INPUT


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
