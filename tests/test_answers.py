from dataclasses import replace

import pytest
import torch

from helpers.measure.answers import Said, answered, form, generate, is_correct, loops, parses, prompt_ids, said, schema_of
from helpers.measure.tasks import Example, examples, render


def test_generate_does_not_depend_on_the_batch(bundled):
    asked = examples("tune", ["json", "facts", "recall_12"], limit=4)
    together = generate(bundled.model, bundled.tokenizer, asked)
    alone = [generate(bundled.model, bundled.tokenizer, [e])[0] for e in asked]
    assert together == alone


@pytest.mark.parametrize("task, answer, text, right", [
    ("facts", "cooper", "Cooper.", True), ("own", "A cooper.", "A cooper.", True),
    ("facts", "cooper", "cooper of Brask", False),
    ("json", '{"a": 1, "b": "x"}', '{"b":"x","a":1}', True), ("json", '{"a": 1}', '{"a": "1"}', False),
    ("json", '{"a": 1}', '{"a": 1.0}', True), ("json", '{"a": 1}', '{"a": true}', False),
    ("tool", '{"a": 1}', '{"a": 1', False), ("facts", '{"a": 1}', '{"a":1}', False)])
def test_is_correct(task, answer, text, right):
    assert is_correct(Example(task, "", answer), text) is right


def test_an_own_schema_makes_it_json():
    assert is_correct(Example("own", "", '{"a": 1}', schema={}), '{"a":1}')
    # the answer of a model that was asked for JSON and gave none: to be right is to say the same
    sorry = Example("own", "", "Sorry.", schema={})
    assert is_correct(sorry, "Sorry.") and is_correct(sorry, "sorry") and not is_correct(sorry, "1")


@pytest.mark.parametrize("text, whole", [
    ("[1]", True), ('"a"', True), ("{'a': 1}", False), ("", False), ('{"a": 1} {', False), ("NaN", False),
    ("[-Infinity]", False), ("[" * 100_000, False), ("9" * 5000, False)])
def test_parses(text, whole):
    assert parses(text) is whole


def test_a_models_own_penalty_does_not_apply(bundled):
    """Some models' generation_config brings one (Qwen2.5), and `do_sample=False` alone leaves it on."""
    asked = examples("tune", ["json"], limit=4)
    before, own = generate(bundled.model, bundled.tokenizer, asked), bundled.model.generation_config.repetition_penalty
    bundled.model.generation_config.repetition_penalty = 8.0
    try:
        assert generate(bundled.model, bundled.tokenizer, asked) == before
        with torch.inference_mode():
            prompt = render(bundled.tokenizer, asked[0])[0]
            ids = bundled.tokenizer(prompt, add_special_tokens=False, return_tensors="pt").input_ids
            out = bundled.model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=40)
        assert bundled.tokenizer.decode(out[0, ids.shape[1]:], skip_special_tokens=True).strip() != before[0]
    finally:
        bundled.model.generation_config.repetition_penalty = own


@pytest.mark.parametrize("tokens, round_in_circles", [
    ([7] * 12, True), ([7] * 11, False), ([1, 2] * 6, True), ([1, 2] * 5, False), ([1, 2, 3, 4] * 4, True),
    ([1, 2, 3, 4] * 3, False), ([9, 8, 9] + [1, 2, 3] * 4, True), ([1, 2, 3] * 4 + [1, 2], True), ([1, 2, 3] * 4 + [9], False),
    ([1, 1, 2] * 4, True), (list(range(40)), False), ([], False)])
def test_loops(tokens, round_in_circles):
    """Four times the same, and twelve tokens of it, at the end; where it breaks off does not matter."""
    assert loops(tokens) is round_in_circles


def test_a_schema_is_that_of_the_right_answer():
    shape = schema_of(Example("json", "", '{"a": "x", "b": {"c": [1], "d": null}, "e": true, "f": 2.5}'))
    assert shape == {"type": "object", "required": ["a", "b", "e", "f"], "properties": {
        "a": {"type": "string"}, "e": {"type": "boolean"}, "f": {"type": "number"},
        "b": {"type": "object", "required": ["c", "d"], "properties": {"c": {"type": "array"}, "d": {"type": "null"}}}}}
    own = {"type": "array"}
    assert schema_of(Example("json", "", '{"a": 1}', schema=own)) is own
    assert schema_of(Example("json", "", "no JSON")) == {}


def test_form_of_answers():
    """One row each: right; right fields but wrong; a field of another type; cut off; and what is not to be JSON."""
    asked = [Example("json", str(n), '{"a": 1}') for n in range(4)] + [Example("facts", "", "Marrow")]
    texts = ['{"a": 1.0}', '{"a": 2, "b": 0}', '{"a": "1"}', '{"a": 1', "Marrow."]
    found = form([Said(t, (5,) * (20 if n == 3 else 2), n != 3) for n, t in enumerate(texts)], asked)
    assert {k: v.tolist() for k, v in found.items()} == {
        "id": [e.id for e in asked], "task": ["json"] * 4 + ["facts"], "text": texts, "structured": [True] * 4 + [False],
        "right": [True, False, False, False, True], "ends": [True] * 3 + [False, True],
        "no_loops": [True] * 3 + [False, True], "json_parses": [True] * 3 + [False, True],
        "schema": [True, True, False, False, True]}


def test_a_plain_answer_is_its_first_line():
    found = form([Said("Paris\nParis\nParis", (7, 8) * 20, False), Said("Paris", (7, 8) * 20, False)], [
        Example("own", str(n), "Paris", plain=True) for n in range(2)])
    assert found["right"].all() and found["ends"].tolist() == [True, False] and found["no_loops"].tolist() == [True, False]


def test_form_by_a_schema_of_ones_own():
    schema = {"type": "object", "properties": {"n": {"type": "integer", "minimum": 3}}, "required": ["n"]}
    asked = [Example("own", str(n), "", schema=schema) for n in range(3)] + [Example("own", "3", "not JSON", schema=schema)]
    found = form([Said(t, (1,), True) for t in ('{"n": 3}', '{"n": 2}', "three", '{"n": 4}')], asked)
    assert found["schema"].tolist() == [True, False, False, True] and found["json_parses"].tolist() == [True, True, False, True]
    assert found["structured"].all() and not found["right"].any()


def test_said_tells_whether_the_answer_came_to_an_end(bundled):
    model, tokenizer = bundled.model, bundled.tokenizer
    prompts = [prompt_ids(tokenizer, e) for e in examples("tune", ["json", "facts"], limit=2)]
    whole = said(model, tokenizer, prompts)
    assert all(s.ended and s.text == tokenizer.decode(s.tokens, skip_special_tokens=True).strip() for s in whole)
    longest = max(len(s.tokens) for s in whole)
    for few in (2, longest, longest + 1):  # with the end token
        cut = said(model, tokenizer, prompts, max_new_tokens=few)
        assert [c.tokens for c in cut] == [s.tokens[:few] for s in whole]
        assert [c.ended for c in cut] == [len(s.tokens) < few for s in whole]
    assert said(model, tokenizer, []) == []


def test_answered_fills_only_what_is_missing(bundled):
    asked = [replace(e, answer="") if n % 2 else replace(e, answer="given") for n, e in
             enumerate(examples("tune", ["facts"], limit=4))]
    filled = answered(bundled.model, bundled.tokenizer, asked)
    own = generate(bundled.model, bundled.tokenizer, asked)
    assert [e.answer for e in filled] == ["given", own[1], "given", own[3]] and all(own)
    assert [(e.id, e.prompt) for e in filled] == [(e.id, e.prompt) for e in asked]


def test_a_long_prompt_does_not_pad_the_short_ones(bundled, monkeypatch):
    """Most questions are short and a few a thousand tokens long: in one batch nine tenths of what is computed is padding."""
    model, sizes, own = bundled.model, [], bundled.model.generate
    monkeypatch.setattr(model, "generate", lambda input_ids, **also: sizes.append(input_ids.numel()) or own(input_ids, **also))
    prompts = [list(range(10, 30))] * 40 + [list(range(10, 810))] * 2
    together = said(model, bundled.tokenizer, prompts, max_new_tokens=2)
    assert sizes == [40 * 20, 2 * 800] and together == [*[together[0]] * 40, *[together[-1]] * 2]
