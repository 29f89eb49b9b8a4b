"""Switch to another model by a manifest, on a log of requests and two running servers: `python -m helpers.rollout --help`.

Exit status: 0 promoted, 99 rolled back, 98 undecided (the log is too short, or has nothing that a limit is about), 2 bad input.
"""

import sys
from argparse import ArgumentParser, Namespace
from pathlib import Path

from transformers import AutoTokenizer

from helpers import book
from helpers.harness.rollout import PROMOTED, ROLLED_BACK, Ask, execute, read_manifest
from helpers.harness.serve import Server, answers
from helpers.harness.stream import EngineFailed
from helpers.measure.answers import prompt_ids
from helpers.measure.tasks import read_prompts
from helpers.models.source import resolve


def parse(argv: list[str]) -> Namespace:
    parser = ArgumentParser("python -m helpers.rollout", description=__doc__)
    parser.add_argument("manifest", type=Path, help="as `python -m helpers.compare` leaves it")
    parser.add_argument("log", type=Path, help='.jsonl of {"prompt": ...}, with "answer" and "schema"')
    parser.add_argument("fallback", help="address of the server in use, such as http://127.0.0.1:8000")
    parser.add_argument("pick", help="address of the one that is to replace it")
    parser.add_argument("--model", default="bundled", help="the tokenizer and chat template: a folder or a hub id")
    parser.add_argument("--served-as", nargs=2, default=("m", "m"), metavar=("FALLBACK", "PICK"), help="their names there")
    parser.add_argument("--tokens", type=int, default=64, help="most tokens of an answer")
    return parser.parse_args(argv)


def side(server: Server, tokenizer, tokens: int) -> Ask:
    """A server as one side of a switch."""
    return lambda asked: answers(server, [prompt_ids(tokenizer, e) for e in asked], tokens)


def rollout(options: Namespace) -> int:
    manifest, asked = read_manifest(options.manifest), read_prompts(options.log)
    tokenizer = AutoTokenizer.from_pretrained(resolve(options.model))
    servers = [Server(url.rstrip("/"), name) for url, name in zip(
        (options.fallback, options.pick), options.served_as, strict=True)]
    servers[0].check()  # without a fallback there is no switch
    switch = execute(manifest, asked, *(side(s, tokenizer, options.tokens) for s in servers),
                     lambda ids: tokenizer.decode(ids, skip_special_tokens=True), progress=True)
    print(switch.table().to_string(index=False))
    print(f"{switch.outcome}: {switch.reason}; {len(switch.served)} requests, {len(switch.lost)} without an answer")
    return {PROMOTED: 0, ROLLED_BACK: 99}.get(switch.outcome, 98)


def main(argv: list[str]) -> int:
    options = parse(argv)
    book.quiet()
    try:
        return rollout(options)
    except (ValueError, OSError, EngineFailed) as error:
        print(f"error: {error}".replace("\n", " "), file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
