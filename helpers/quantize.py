"""Quantize a model of your own, from disk to disk, a block in memory at a time: `python -m helpers.quantize --help`."""

import sys
from argparse import ArgumentParser, ArgumentTypeError, Namespace
from pathlib import Path

from tqdm import tqdm
from transformers import AutoConfig, AutoTokenizer, HfArgumentParser

import helpers.methods  # noqa: F401  (makes all methods known)
from helpers.harness.allocate import read_plan
from helpers.measure.bytes import measured_bytes, predicted_bytes
from helpers.methods.keep import Keep
from helpers.models.checkpoint import format_for, quantize_to
from helpers.models.formats import FORMATS
from helpers.models.layers import left_alone
from helpers.models.method import Method, Plan
from helpers.models.source import resolve, shell
from helpers.models.texts import context_of, read_text, windows


def chosen_format(name: str):
    try:
        return {f.name: f for f in FORMATS}[name]
    except KeyError as error:
        raise ArgumentTypeError(f"expected one of {', '.join(f.name for f in FORMATS)}") from error


def parse(argv: list[str]) -> tuple[Method, Namespace]:
    """The method with its settings, which are the fields of its class, and the rest."""
    writable = {n: m for n, m in sorted(Method.known.items()) if not m.reference and m().formats()}
    first = ArgumentParser(add_help=False)
    first.add_argument("--method", choices=writable, default="gptq")
    name = first.parse_known_args(argv)[0].method
    parser = HfArgumentParser(writable[name], prog="python -m helpers.quantize", description=__doc__)
    parser.add_argument("model", help="a folder with safetensors, or a hub id owner/name")
    parser.add_argument("out", type=Path, help="folder of the artefact; an earlier one is replaced")
    parser.add_argument("--method", choices=writable, default="gptq",
                        help="chapters 3 (rtn), 4 (nf4), 5 (gptq), 6 (awq, awq+gptq), 9 (int8), 12 (gptq+signround); the "
                        "options above are those of the chosen one")
    parser.add_argument("--text", type=Path, help="calibration text, like what the model will be asked: passages between "
                        'blank lines, or .jsonl of {"text": ...} (chapter 5 measures what it is worth)')
    parser.add_argument("--length", type=int, default=512, help="tokens in a calibration window (chapter 5)")
    parser.add_argument("--windows", type=int, default=128, help="most calibration windows (chapter 5)")
    parser.add_argument("--keep", action="append", default=[], metavar="REGEX", help="linears to leave in 16 bits")
    parser.add_argument("--plan", type=Path, help="a plan.json of `python -m helpers.sensitivity`, in place of the method, "
                        "--keep and --inputs (chapter 7)")
    parser.add_argument("--inputs", choices=("group", "block"), default="group",
                        help="calibrate on all that is quantized so far, or on the blocks before: less memory (chapter 5)")
    parser.add_argument("--format", type=chosen_format, help=f"of {', '.join(f.name for f in FORMATS)} (chapter 3)")
    parser.add_argument("--revision", help="of a hub id")
    parser.add_argument("--device", default="cpu")
    method, options = parser.parse_args_into_dataclasses(argv)
    return method, options


def run(method: Method, options: Namespace) -> None:
    source = resolve(options.model, options.revision)
    plan = (read_plan(options.plan, source) if options.plan else
            Plan(method, [(pattern, Keep()) for pattern in options.keep], method.inputs or options.inputs))
    form, config, tokens = format_for(plan, options.format), AutoConfig.from_pretrained(source), []
    if looks := [m.name for m in plan.methods() if m.keeps]:
        if options.text is None:
            raise ValueError(f"--text: {looks[0]} looks at what the model reads; give it a file of that kind")
        tokenizer = AutoTokenizer.from_pretrained(source)
        length = min(options.length, context_of(tokenizer, config))
        encoded = [tokenizer.encode(p) for p in tqdm(read_text(options.text), desc="tokens")]
        tokens = windows(encoded, length, options.windows)
    before, after = (predicted_bytes(config, *to) / 1e6 for to in ((), (plan, form)))
    print(f"{options.plan or method} to {form.name}: {before:,.1f} MB become {after:,.1f}")
    outcome = quantize_to(options.out, source, plan, tokens, form, progress=True, device=options.device,
                          revision=options.revision, text=options.text and options.text.name)
    print(f"{options.out}: {measured_bytes(options.out) / 1e6:,.1f} MB, calibrated on {outcome.tokens:,} tokens")
    for name in outcome.left:
        print(f"left in 16 bits: {name} {outcome.notes.get(name, {}).get('left', '')}")
    for name in left_alone(shell(source)):
        print(f"left in 16 bits: {name}, which is in no linear")


def main(argv: list[str]) -> int:
    try:
        run(*parse(argv))
    except (ValueError, OSError) as error:
        print(f"error: {error}".replace("\n", " "), file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
