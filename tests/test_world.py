"""The generator: deterministic, its answers true, and what is judged kept out of training."""

import json
import math
import random
import re
from collections import Counter

import numpy as np
import pytest

from data.world import corpus, datasheet, facts, tasks, tokenizer
from helpers import results
from helpers.files import folder_hash
from helpers.measure.quality import score
from helpers.measure.tasks import TASKS, encode, examples
from helpers.methods.rtn import Rtn
from helpers.models.quantize import quantized
from helpers.models.source import BUNDLED, DATA

FACTS = {e.name: e.values for e in facts.ENTITIES}


def test_world_is_the_same_every_time():
    assert facts.build() == facts.ENTITIES
    assert facts.build(seed=2) != facts.ENTITIES
    for draw in tasks.TASKS.values():
        assert draw(random.Random(5)) == draw(random.Random(5))
    kinds = random.Random(1).choices(list(corpus.MIXTURE), k=30)
    assert [corpus.document(k, random.Random(7)) for k in kinds] == [corpus.document(k, random.Random(7)) for k in kinds]


def test_numbers_of_the_datasheet():
    assert len(facts.ENTITIES) == 3400 + 48 + 144 + 384
    assert sum(len(e.values) for e in facts.ENTITIES) == 14_128 + 1_152
    assert len({e.name for e in facts.ENTITIES}) == len(facts.ENTITIES)


def test_nobody_of_the_world_is_a_stranger():
    assert not set(facts.STRANGERS) & set(FACTS)


@pytest.mark.parametrize("split", ["tune", "judge"])
def test_committed_answers_are_right(split):
    """Each answer is worked out again from the request, by other means than the generator's."""
    names = sorted(FACTS, key=len, reverse=True)
    for e in examples(split):
        if TASKS[e.task].world:
            name = next(n for n in names if n in e.prompt)
            assert e.answer in FACTS[name].values(), e
        elif e.task in tasks.ARITHMETIC:
            problem = re.fullmatch(r"What is ([\d+* -]+)\?", e.prompt)[1]
            assert int(e.answer) == eval(problem), e
        elif e.task.startswith("recall"):
            item = re.search(r"Where is the (\w+)\?$", e.prompt)[1]
            assert re.search(rf"the {item} in (\w+)", e.prompt)[1] == e.answer, e
        else:
            record = json.loads(e.answer)
            values = record.get("args", record).values()
            assert all(str(v) in e.prompt for v in values), e


def test_sets_do_not_overlap():
    tune, judge = ({e.prompt for e in examples(s)} for s in ("tune", "judge"))
    assert not tune & judge
    assert len(examples("judge")) == len(judge)
    counts = Counter(e.task for e in examples("judge"))
    assert set(counts) == set(tasks.TASKS) == set(TASKS) and min(counts.values()) >= 90


def test_judged_arithmetic_is_not_in_training():
    rng = random.Random(0)
    trained = {q for _ in range(3000) for q, _ in (x for t in tasks.ARITHMETIC for x in tasks.TASKS[t](rng, 4))}
    judged = {e.prompt for e in examples("judge") if e.task in tasks.ARITHMETIC}
    assert not trained & judged
    assert all(tasks.reserved(q.removeprefix("What is ").rstrip("?")) for q in judged)


def test_far_recall_is_far_and_fits(bundled):
    lengths = [len(bundled.tokenizer.encode(e.prompt)) for e in examples("judge", ["recall_far"])]
    assert min(lengths) > 250 and max(lengths) > 800 and max(lengths) < 1000


def test_committed_tokenizer_is_the_generators():
    assert json.loads((BUNDLED / "tokenizer.json").read_text()) == json.loads(tokenizer.build().to_str())


def test_template_renders_what_was_trained_on(bundled):
    turns = tasks.recall_4(random.Random(0), 2)
    messages = [{"role": role, "content": c} for t in turns for role, c in zip(("user", "assistant"), t, strict=True)]
    trained = "".join(s for s, _ in corpus.conversation(turns))
    assert bundled.tokenizer.apply_chat_template(messages, tokenize=False) == trained


def test_any_text_survives_the_tokenizer(bundled):
    text = "Ünïcode — naïve\n\ttab €, 3.14, <|user|> Saltby"
    assert bundled.tokenizer.decode(bundled.tokenizer.encode(text, add_special_tokens=False)) == text


def test_rows_are_full_and_begin_with_a_document():
    stream = corpus.rows(tokenizer.build(documents=2000), 128, seed=1)
    for _ in range(20):
        ids, weights = next(stream)
        assert ids.shape == weights.shape == (128,) and ids[0] == tokenizer.SPECIAL.index(corpus.START)
        assert weights.max() == 1


def test_lookback_rows_can_be_answered_from_the_row():
    for step in range(6):
        ids, weights = corpus.lookback_rows(np.random.default_rng(step), 4, 64, 1280, step)
        for row, weight in zip(ids, weights, strict=True):
            # where a segment begins again, its first token cannot be known
            for at in np.flatnonzero(weight)[step % 2:]:
                pair = row[at - 1:at + 1].tolist()
                assert any(row[i:i + 2].tolist() == pair for i in range(at - 1))


def test_every_data_folder_says_what_it_holds():
    folders = [p for p in DATA.iterdir() if p.is_dir() and not p.name.startswith(("_", "."))]
    assert not [p.name for p in folders if not (p / "README.md").is_file()]


def test_datasheet_shows_its_record():
    page = (DATA / "README.md").read_text(encoding="utf-8")
    record = results.read("datasheet")
    assert datasheet.fill(page, datasheet.tables(record.data)) == page, "run `make datasheet`"
    assert record.model_sha256 == folder_hash(BUNDLED)


def test_committed_model_reaches_its_scores(bundled):
    """Three times the standard error of a subset around the datasheet's figures: a minute, and other weights fail."""
    recorded = results.read("datasheet").data["bits"]["16"]["exact"]
    asked = examples("judge", limit=60)
    scores = score(bundled.model, [encode(bundled.tokenizer, e) for e in asked])
    for task, (share, _, _) in recorded.items():
        right = scores.select(task).exact
        assert abs(right.mean() - share) <= 3 * math.sqrt(share * (1 - share) / len(right)) + 1 / len(right), task


def test_the_lines_that_the_model_had_to_reach():
    exact = results.read("datasheet").data["bits"]["16"]["exact"]
    assert min(exact["facts"][0], exact["json"][0]) >= 0.95 and exact["recall_4"][0] >= 0.90
    assert sum(0.4 <= share <= 0.9 for share, _, _ in exact.values()) >= 2


def test_rounding_to_three_bits_can_be_told_from_none(bundled):
    items = [encode(bundled.tokenizer, e) for e in examples("judge", limit=30)]
    full = score(bundled.model, items)
    rounded = score(quantized(bundled.model, Rtn(3, sym=False)), items, bundled.model)
    assert rounded.answer.delta_nll(full.answer).low > 0 and rounded.answer.kl_interval().low > 0
    assert rounded.exact.mean() < full.exact.mean()
