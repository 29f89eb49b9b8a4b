import json
import random

import pytest

from helpers.measure.tasks import Example, distance, identify, read_prompts, split
from helpers.models.texts import BadData


def written(tmp_path, *lines):
    path = tmp_path / "log.jsonl"
    path.write_bytes(b"".join((x if isinstance(x, bytes) else (x if isinstance(x, str) else json.dumps(x)).encode()) + b"\n"
                              for x in lines))
    return path


def test_prompts_with_and_without(tmp_path):
    schema = {"type": "object"}
    found = read_prompts(written(tmp_path, {"prompt": "a"}, {"prompt": "b", "answer": "x", "task": "mine"},
                                 {"prompt": "c", "id": "third", "schema": schema}))
    assert found == [Example("prompts", "a", "", identify("prompts", "a", "")),
                     Example("mine", "b", "x", identify("mine", "b", "x")), Example("prompts", "c", "", "third", schema)]


def test_a_line_ends_where_the_file_says(tmp_path):
    """Not within a string, at U+2028 or a form feed's kin, which some editors and `splitlines` take for an end."""
    path = tmp_path / "log.jsonl"
    path.write_bytes('{"prompt": "one\u2028two\u0085"}\r\n{"prompt": "b"}\n\n'.encode())
    assert [e.prompt for e in read_prompts(path)] == ["one\u2028two\u0085", "b"]


GOOD = {"prompt": "fine"}


@pytest.mark.parametrize("lines, where, expected", [
    ([GOOD, "[1]"], ":2", "expected {\"prompt\""), ([GOOD, "null"], ":2", "expected {\"prompt\""),
    ([{"answer": "x"}], ":1", "expected {\"prompt\""), ([GOOD, {"prompt": 3}], ":2", "expected {\"prompt\""),
    ([GOOD, GOOD, {"prompt": " \n"}], ":3", "text that is not empty"),
    ([GOOD, {"prompt": "x", "anwser": "y"}], ":2", "unknown field 'anwser': expected some of prompt, answer, task, id"),
    ([{"prompt": "x", "answer": 3}], ":1", "answer: expected text"),
    ([{"prompt": "x", "answer": None}], ":1", "answer: expected text"),
    ([{"prompt": "x", "task": ["a"]}], ":1", "task: expected text"), ([{"prompt": "x", "id": 7}], ":1", "id: expected text"),
    ([GOOD, {"prompt": "x", "schema": "object"}], ":2", "schema: expected an object"),
    ([GOOD, {"prompt": "x", "schema": {"type": "strin"}}], ":2", "schema: expected a JSON schema"),
    ([GOOD, '{"prompt": "x"'], ":2", "not a line of JSON"), ([GOOD, "", GOOD], ":2", "not a line of JSON"),
    ([GOOD, GOOD], "", "is there twice"), ([GOOD | {"id": "a"}, {"prompt": "b", "id": "a"}], "", "'a' is there twice"),
    ([GOOD, b'{"prompt": "\xe9"}'], "", "not UTF-8"), ([], "", "is empty"), (["", ""], "", "is empty")])
def test_what_is_wrong_with_prompts(tmp_path, lines, where, expected):
    path = written(tmp_path, *lines)
    with pytest.raises(BadData) as error:
        read_prompts(path)
    assert str(error.value).startswith(f"{path}{where}") and expected in str(error.value)


def test_prompts_that_are_not_there(tmp_path):
    for path in (tmp_path / "none.jsonl", tmp_path):
        with pytest.raises(BadData, match="missing") as error:
            read_prompts(path)
        assert str(path) in str(error.value)


def test_a_split_is_of_the_question_alone():
    """Whatever else is in the file, in whatever order; a third of them, about; nothing twice."""
    asked = [Example("own", f"question {n}", "x") for n in range(600)]
    tune, judge = split(asked)
    assert sorted(e.id for e in tune + judge) == sorted(e.id for e in asked) and 165 <= len(tune) <= 235
    mixed = random.Random(0).sample(asked, 300)
    part, rest = split(mixed)
    assert set(part) == set(tune) & set(mixed) and rest == [e for e in mixed if e in set(judge)]
    assert split(asked, 0) == ([], asked) and split(asked, 1) == (asked, [])
    assert set(split(asked, 0.2)[0]) < set(tune)
    # sha256("a") begins with ca97, 0.79 of the way; of "c" with 2e7d, 0.18
    known = [Example("own", "", "", name) for name in "ac"]
    assert split(known) == (known[1:], known[:1])


def test_distance_is_in_tokens_from_the_last_place(bundled):
    tokenizer = bundled.tokenizer

    def far(prompt, answer):
        return distance(tokenizer, Example("recall_4", prompt, answer))

    assert far("Where is the bell? Garth", "Garth") == 0 and far("Where?", "Garth") is None and far("Where?", "") is None
    end = ", the box in Redcliff."
    tokens = tokenizer.encode(end, add_special_tokens=False)
    assert far(f"Garth: the bell in Garth{end}", "Garth") == len(tokens)
    assert tokenizer.decode(tokens) == end and 5 <= len(tokens) <= 8  # a word each, about
