"""Shadow traffic: a prompt log through two servers, answers compared, latency under load: `python -m helpers.replay --help`.

Either may be any server with OpenAI's completions that returns token ids (vLLM). Exit status: 0 the share of answers that
differ is within --differ, 99 it is not, 98 undecided at this number of prompts, 2 bad input.
"""

import sys
from argparse import ArgumentParser, Namespace
from pathlib import Path

import pandas as pd
from transformers import AutoTokenizer

from helpers import book
from helpers.compare import STATUS, requests_a_second
from helpers.harness.gates import SLACK, Gate
from helpers.harness.load import load
from helpers.harness.quantities import GATES
from helpers.harness.serve import EngineMissing, Server, answers
from helpers.harness.served import shadow
from helpers.harness.stream import EngineFailed
from helpers.harness.tables import percentile
from helpers.measure.answers import prompt_ids
from helpers.measure.stats import share_interval
from helpers.measure.tasks import read_prompts, render
from helpers.models.source import resolve


def parse(argv: list[str]) -> Namespace:
    parser = ArgumentParser("python -m helpers.replay", description=__doc__)
    parser.add_argument("prompts", type=Path, help='the log, a .jsonl of {"prompt": ...}')
    parser.add_argument("first", help="address of the server in use, such as http://127.0.0.1:8000")
    parser.add_argument("second", help="address of the one that is to replace it")
    parser.add_argument("--model", default="bundled", help="the tokenizer and chat template: a folder or a hub id")
    parser.add_argument("--served-as", nargs=2, default=("m", "m"), metavar=("FIRST", "SECOND"), help="the models' names there")
    parser.add_argument("--tokens", type=int, default=64, help="most tokens of an answer")
    parser.add_argument("--differ", type=float, default=0.05, help="largest share of answers that may differ, or fail")
    parser.add_argument("--rates", nargs="*", type=requests_a_second, default=[], help="also latency, at so many requests/s")
    return parser.parse_args(argv)


def replay(options: Namespace) -> int:
    asked, folder = read_prompts(options.prompts), resolve(options.model)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    urls = [url.rstrip("/") for url in (options.first, options.second)]
    servers = [Server(url, name) for url, name in zip(urls, options.served_as, strict=True)]
    for server in servers:
        server.check()
    prompts = [prompt_ids(tokenizer, e) for e in asked]
    said = [answers(server, prompts, options.tokens) for server in servers]
    apart = shadow(asked, *said, tokenizer)
    print(apart.to_string(max_colwidth=70) if len(apart) else "every answer is the same")
    share = share_interval(len(apart), len(asked), GATES)
    found = Gate("answers that differ or failed", lambda *_: share, True, options.differ + SLACK).check(None, None)
    print(f"{found.gate}: {found.outcome}, {found.reason}; {sum(a.error is not None for s in said for a in s)} failed")
    texts = [render(tokenizer, e)[0] for e in asked]
    for rate in options.rates:
        runs = {(s.url, s.model): load(s, folder, texts, rate, 64, 16, 192 / rate + 60) for s in servers}
        times = {of: {f"{what} p{q}": percentile(getattr(r, f"{what}_ms"), q / 100) for what in ("ttft", "itl", "e2el")
                      for q in (50, 95) if len(r.e2el_ms)} for of, r in runs.items()}
        print(f"{rate:g} requests/s:", pd.DataFrame({of: row | {"failed": runs[of].errors, "doubt": runs[of].doubt or ""}
                                                     for of, row in times.items()}).T.to_string(), sep="\n")
    return STATUS[found.outcome]


def main(argv: list[str]) -> int:
    options = parse(argv)
    book.quiet()
    try:
        return replay(options)
    except (ValueError, OSError, EngineFailed, EngineMissing) as error:
        print(f"error: {error}".replace("\n", " "), file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
