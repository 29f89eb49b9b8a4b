import copy
import json
import re
import shutil
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GPT2Config, GPT2LMHeadModel, OPTConfig, OPTForCausalLM, PreTrainedTokenizerFast

from helpers.files import folder_hash, weight_files
from helpers.measure import tasks
from helpers.measure.answers import generate
from helpers.measure.bytes import measured_bytes
from helpers.measure.quality import score
from helpers.measure.tasks import Example, applicable, encode, encode_all, encode_text, examples, text
from helpers.methods.rtn import Rtn
from helpers.models.layers import Fold, UnknownStructure, common_group, left_alone, linears
from helpers.models.outliers import add_outliers
from helpers.models.quantize import quantize_model, quantized
from helpers.models.source import BUNDLED, DATA, ModelUnavailable, Source, load, resolve, stored_names
from helpers.models.texts import BadData, calibration, context_of, random_tokens, read_jsonl, read_text, windows
from helpers.models.walk import first_step
from helpers.toolkits.process import ORIGINALS


def test_linears_are_the_blocks_and_nothing_else(tiny):
    names = [n for n, _ in linears(tiny)]
    assert len(names) == 14 and names[:4] == [f"model.layers.0.self_attn.{n}_proj" for n in "qkvo"]
    opt = OPTForCausalLM(OPTConfig(vocab_size=64, hidden_size=32, ffn_dim=64, num_hidden_layers=1, num_attention_heads=2,
                                   word_embed_proj_dim=32, max_position_embeddings=32))
    assert {n.rsplit(".", 1)[1] for n, _ in linears(opt)} == {"k_proj", "v_proj", "q_proj", "out_proj", "fc1", "fc2"}


def test_unknown_structure_says_what_was_looked_for(tiny):
    model = copy.deepcopy(tiny)
    model.config.num_hidden_layers = 7
    with pytest.raises(UnknownStructure, match="LlamaForCausalLM: looked for a ModuleList of 7 blocks"):
        linears(model)
    gpt2 = GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=2, n_head=2, vocab_size=64))
    with pytest.raises(UnknownStructure, match="transformer.h is 2 x GPT2Block without a single nn.Linear"):
        linears(gpt2)


def test_layout_of_a_block(tiny, bundled):
    qkv, mlp = tuple(f"self_attn.{n}_proj" for n in "qkv"), ("mlp.gate_proj", "mlp.up_proj")
    for model in (tiny, bundled.model):
        layout = first_step(model, [range(8)]).layout
        assert layout.groups == (qkv, ("self_attn.o_proj",), mlp, ("mlp.down_proj",))
        # queries share values, so what makes the inputs of o_proj has fewer outputs than these are
        assert layout.folds == (Fold("input_layernorm", qkv), Fold("post_attention_layernorm", mlp),
                                Fold("mlp.up_proj", ("mlp.down_proj",)))
        assert left_alone(model) == []
    assert common_group(tiny) == 64 and common_group(bundled.model) == 128


def test_rtn_leaves_the_original_and_lists_what_no_group_fits(tiny):
    before = {k: v.clone() for k, v in tiny.state_dict().items()}
    rounded, method = copy.deepcopy(tiny), Rtn(4, 128, sym=False)
    outcome = quantize_model(rounded, method)
    assert outcome.left == [f"model.layers.{i}.mlp.down_proj" for i in range(2)]  # 192 inputs
    assert all("group_size 128 does not divide 192" in outcome.notes[n]["left"] for n in outcome.left)
    again = quantized(tiny, method)
    assert all(torch.equal(v, tiny.state_dict()[k]) for k, v in before.items())
    assert all(torch.equal(v, again.state_dict()[k]) for k, v in rounded.state_dict().items())
    # what is not quantized is rounded to fp16, as in a file
    changed = {n for n, v in rounded.state_dict().items() if not torch.equal(v, before[n].half().float())}
    changed = {n.removesuffix(".weight") for n in changed}
    assert changed == {n for n, _ in linears(tiny)} - set(outcome.left)
    assert "lm_head" not in changed and rounded.lm_head.weight is rounded.model.embed_tokens.weight


def test_outliers_change_no_bit_of_the_output(tiny):
    ids = torch.arange(40)[None]
    loud = add_outliers(copy.deepcopy(tiny), channels=3, factor=32)
    assert torch.equal(loud(ids).logits, tiny(ids).logits)
    norm = loud.model.layers[0].input_layernorm.weight
    assert (norm == 32).sum() == 3
    # ... but rounding to nearest now does more harm
    harm = [(quantized(m, Rtn(4, 64, sym=False))(ids).logits - tiny(ids).logits).square().mean() for m in (tiny, loud)]
    assert harm[1] > 1.05 * harm[0]


def test_names_of_models(tmp_path):
    assert resolve("bundled") == resolve(str(BUNDLED)) == BUNDLED
    for bad in ("no such thing", "/no/such/folder", "../up/there"):
        with pytest.raises(ModelUnavailable, match="neither 'bundled'"):
            resolve(bad)
    with pytest.raises(ModelUnavailable, match=r"no config.json"):
        resolve(str(tmp_path))
    for name in ("config.json", "tokenizer_config.json"):
        shutil.copy(BUNDLED / name, tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(ModelUnavailable, match="safetensors"):
        resolve(str(tmp_path))


def test_damaged_and_unreachable_models_say_what_to_do(tmp_path, monkeypatch):
    shutil.copytree(BUNDLED, tmp_path / "m")
    weights = tmp_path / "m" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1_000_000])
    with pytest.raises(ModelUnavailable, match="truncated"):
        load(str(tmp_path / "m"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ModelUnavailable, match=r"'bundled'.*hf download nobody/nothing --revision abc"):
        load("nobody/nothing", revision="abc")


def test_what_is_no_source_says_so(tmp_path):
    """A model that is quantized already, whose codes are no weights; a download that broke off; a device that is not there."""
    shutil.copytree(BUNDLED, tmp_path / "m")
    config = json.loads((tmp_path / "m" / "config.json").read_text())
    (tmp_path / "m" / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "fp8"}}))
    for read in (lambda: load(str(tmp_path / "m")), lambda: Source.from_folder(tmp_path / "m")):
        with pytest.raises(ModelUnavailable, match=r"m/config.json: the model is quantized already \(fp8\)"):
            read()
    (tmp_path / "m" / "config.json").write_text("[")
    for read in (lambda: load(str(tmp_path / "m")), lambda: Source.from_folder(tmp_path / "m")):
        with pytest.raises(ModelUnavailable, match=r"m/config.json is not a model's configuration"):
            read()
    (tmp_path / "m" / "config.json").write_text(json.dumps(config))
    weights = tmp_path / "m" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1_000_000])
    with pytest.raises(ModelUnavailable, match=r"m/model.safetensors is not a whole safetensors file"):
        Source.from_folder(tmp_path / "m")
    for device in ("cuda:17", "gpu"):
        for read in (lambda at=device: load("bundled", device=at), lambda at=device: Source.from_folder(BUNDLED, at)):
            with pytest.raises(ModelUnavailable, match=f"device '{device}' cannot be used"):
                read()


def test_weights_that_are_there_twice_count_once(tmp_path):
    """Some repositories hold a second copy of the weights under the names of another library."""
    before = folder_hash(BUNDLED), measured_bytes(BUNDLED)
    shutil.copytree(BUNDLED, tmp_path / "m")
    save_file({f"other.{n}": t for n, t in load_file(BUNDLED / "model.safetensors").items()},
              tmp_path / "m" / "consolidated.safetensors")
    assert (folder_hash(tmp_path / "m"), measured_bytes(tmp_path / "m")) == before
    assert set(stored_names(tmp_path / "m")) == set(stored_names(BUNDLED))
    load(str(tmp_path / "m")).model.save_pretrained(tmp_path / "shards", max_shard_size="2MB")
    named = json.loads((tmp_path / "shards" / "model.safetensors.index.json").read_text())["weight_map"]
    assert {f.name for f in weight_files(tmp_path / "shards")} == set(named.values()) and len(set(named.values())) > 3
    (tmp_path / "shards" / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(ValueError, match=r"model.safetensors.index.json is no index of weights"):
        weight_files(tmp_path / "shards")


def test_tied_and_16_bit_models_load(tiny, tmp_path):
    copy.deepcopy(tiny).half().save_pretrained(tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(BUNDLED / name, tmp_path)
    model, _ = load(str(tmp_path))
    assert model.dtype == torch.float32 and model.lm_head.weight is model.model.embed_tokens.weight


def test_a_source_holds_one_block_at_a_time(bundled):
    source = Source.from_folder(BUNDLED)
    assert {p.device.type for p in source.model.parameters()} == {"meta"}
    whole = dict(bundled.model.named_parameters())
    for name, block in source:
        assert {n.rsplit(".", 1)[0] for n, p in source.model.named_parameters() if p.device.type != "meta"} == {
            f"{name}.{n.rsplit('.', 1)[0]}" for n, _ in block.named_parameters()}
        assert all(torch.equal(p, whole[f"{name}.{n}"]) for n, p in block.named_parameters())
    assert {p.device.type for p in source.model.parameters()} == {"meta"}


def test_a_weight_that_is_not_in_the_files_is_named():
    with pytest.raises(ModelUnavailable, match="does not hold.*no.such.weight"), Source.from_folder(BUNDLED).present(
            ["no.such.weight"]):
        pass


def test_encode_marks_the_answer(bundled):
    tok = bundled.tokenizer
    item = encode(tok, Example("facts", "Where does Ada live?", "Brask"))
    assert tok.decode(item.ids[item.start:]) == " Brask<|end|>"
    with_shot = encode(tok, Example("facts", "Where?", "Brask"), shots=[Example("facts", "Who?", "Ada")])
    whole = "<|start|><|user|> Who?<|assistant|> Ada<|end|><|user|> Where?<|assistant|> Brask<|end|>"
    assert tok.decode(with_shot.ids) == whole
    with pytest.raises(BadData, match="the context 1024"):
        encode(tok, Example("facts", "Ada " * 2000, "Brask"))


def test_encode_without_a_chat_template(bundled):
    tok = load("bundled").tokenizer
    tok.chat_template = None
    item = encode(tok, Example("facts", "Where does Ada live?", "Brask"))
    assert tok.decode(item.ids) == "Where does Ada live?\nAnswer: Brask\n" and tok.decode(item.ids[item.start:]) == " Brask\n"


def test_world_tasks_are_for_the_model_of_this_world(bundled):
    assert applicable(bundled.tokenizer, ["facts", "json"]) == ["facts", "json"]

    class Foreign:
        def get_vocab(self):
            return {"the": 0}

    assert applicable(Foreign(), ["facts", "facts_rare", "json"]) == ["json"]


def test_text_is_scored_once_and_wholly(bundled):
    passages = text("essay")
    items = encode_text(bundled.tokenizer, passages, length=64)
    assert all(len(i.ids) <= 64 and i.ids[0] == bundled.tokenizer.bos_token_id for i in items)
    total = sum(len(bundled.tokenizer.encode(f" {p}", add_special_tokens=False)) for p in passages)
    assert sum(len(i.ids) - 1 for i in items) >= total - len(items)


def test_ids_are_of_what_is_said():
    """They stay when the order of a file changes, and no two texts of a split share one."""
    asked = [*examples("tune"), *examples("judge")]
    assert len({e.id for e in asked}) == len(asked)
    assert Example("facts", "Who?", "Ada").id == Example("facts", "Who?", "Ada").id == "facts-8489530d22"
    assert len({Example("facts", *parts).id for parts in (("Who?", "Ada"), ("Who?A", "da"), ("Who?", "Adam"))}) == 3


def test_questions_that_fit(bundled, tiny, capsys):
    """What a context does not hold is left out, and said."""
    items = encode_text(bundled.tokenizer, text("essay"), length=64)
    assert len({i.id for i in items}) == len(items)
    asked = examples("tune", ["facts", "recall_far"], limit=4)
    kept = encode_all(bundled.tokenizer, asked, tiny.config)  # a context of 256
    assert {i.task for i in kept} == {"facts"}
    assert "4 of 8 questions are longer than the context of 256" in capsys.readouterr().out
    with pytest.raises(BadData, match="none of 4 questions fits a context of 256 tokens"):
        encode_all(bundled.tokenizer, asked[4:], tiny.config)


def test_context_is_the_smaller_limit(tiny):
    class Boundless:
        model_max_length = int(1e30)

    assert context_of(Boundless()) == 2**31 and context_of(Boundless(), tiny.config) == 256


@pytest.mark.parametrize("name", ["instructions", "recipes", "short", "long"])
def test_calibration_sets(bundled, name):
    sequences = calibration(bundled.tokenizer, name)
    assert all(s[0] == bundled.tokenizer.bos_token_id and len(s) <= 1024 for s in sequences)
    mean = sum(map(len, sequences)) / len(sequences)
    assert {"short": mean < 20, "long": mean > 400}.get(name, 20 < mean < 400)


def test_windows():
    assert windows([(1, 2, 3), (4, 5), (6, 7)], 3, 5) == [(1, 2, 3), (4, 5, 6)]
    with pytest.raises(BadData, match="2 tokens, fewer than one window of 3"):
        windows([(1, 2)], 3, 5)


def test_random_tokens_are_the_same_again(bundled):
    drawn = random_tokens(bundled.tokenizer, 16, 3)
    assert [len(d) for d in drawn] == [16] * 3 and drawn == random_tokens(bundled.tokenizer, 16, 3)
    assert drawn != random_tokens(bundled.tokenizer, 16, 3, seed=1)
    assert all(5 <= t < len(bundled.tokenizer) for d in drawn for t in d)


def test_own_texts(tmp_path):
    (tmp_path / "a.txt").write_text("one\ntwo\n\n\nthree\n")
    (tmp_path / "a.jsonl").write_text('{"text": "one"}\n{"text": "two"}\n')
    assert read_text(tmp_path / "a.txt") == ["one\ntwo", "three"] and read_text(tmp_path / "a.jsonl") == ["one", "two"]
    (tmp_path / "bad.jsonl").write_text('{"text": "one"}\n{"txt": "two"}\n')
    (tmp_path / "empty.txt").write_text("\n \n")
    (tmp_path / "latin.txt").write_bytes(b"na\xefve")
    for name, said in (("bad.jsonl", r"bad.jsonl:2: expected"), ("empty.txt", "is empty"), ("latin.txt", "not UTF-8"),
                       ("none.txt", "cannot be read: No such file")):
        with pytest.raises(BadData, match=said):
            read_text(tmp_path / name)


def test_a_text_is_text(tmp_path):
    for wrong in ("5", "null"):
        (tmp_path / "a.jsonl").write_text(f'{{"text": "one"}}\n{{"text": {wrong}}}\n')
        with pytest.raises(BadData, match=r'a.jsonl:2: expected \{"text"'):
            read_text(tmp_path / "a.jsonl")


def test_of_the_books_own_files_it_says_what_makes_them():
    with pytest.raises(BadData, match=r"none.jsonl is missing; `make sets` and `make english`"):
        read_jsonl(DATA / "eval" / "none.jsonl")


def test_bad_data_names_file_and_line(tmp_path, monkeypatch):
    monkeypatch.setattr(tasks, "DATA", tmp_path)
    (tmp_path / "eval").mkdir()
    with pytest.raises(BadData, match=r"judge.jsonl is missing$"):  # a file of one's own no target makes
        examples()
    (tmp_path / "eval" / "judge.jsonl").write_text(json.dumps({"task": "t", "prompt": "p", "answer": "a"}) + "\n{oops\n")
    with pytest.raises(BadData, match=r"judge.jsonl:2: not a line of JSON"):
        examples()
    (tmp_path / "eval" / "judge.jsonl").write_text("")
    with pytest.raises(BadData, match="is empty"):
        examples()


def test_the_bundled_model_means_the_same_to_transformers_4(bundled):
    """The originals' environment loads it, tokenizer class and all, and computes the same logits."""
    if not (ORIGINALS / "transformers").is_dir():
        pytest.skip("`make originals` has not been run")
    prompt = "<|start|><|user|> What is 12 + 30?<|assistant|>"
    script = f"""
import torch, transformers
assert transformers.__version__ == "4.51.3"
tokenizer = transformers.AutoTokenizer.from_pretrained({str(BUNDLED)!r})
model = transformers.AutoModelForCausalLM.from_pretrained({str(BUNDLED)!r}, torch_dtype=torch.float32)
ids = tokenizer.encode({prompt!r}, add_special_tokens=False)
print("LOGITS", ids, model(torch.tensor([ids])).logits[0, -1, :50].tolist())
"""
    env = {"PYTHONPATH": str(ORIGINALS), "PATH": "", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, "-c", script], env=env, capture_output=True, text=True)
    [line] = [x for x in done.stdout.splitlines() if x.startswith("LOGITS")] or [done.stderr]
    ids, logits = re.fullmatch(r"LOGITS (\[.*?\]) (\[.*\])", line).groups()
    ours = bundled.tokenizer.encode(prompt, add_special_tokens=False)
    assert json.loads(ids) == ours
    with torch.inference_mode():
        expected = bundled.model(torch.tensor([ours])).logits[0, -1, :50]
    assert torch.allclose(torch.tensor(json.loads(logits)), expected, atol=1e-4)


def test_a_foreign_model_can_be_measured(tiny):
    """Another tokenizer, without a chat template, start or padding token: what applies is asked, with worked examples."""
    bpe = Tokenizer(models.BPE(unk_token="?"))
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(), decoders.ByteLevel()
    bpe.train_from_iterator(text("essay"), trainers.BpeTrainer(
        vocab_size=600, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), special_tokens=["?", "</s>"]))
    foreign = PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="</s>", model_max_length=256)
    names = applicable(foreign, ["facts", "json", "recall_4"])
    assert names == ["json", "recall_4"]
    asked, shots = examples("judge", ["recall_4"], limit=3), examples("tune", ["recall_4"], limit=1)
    items = [encode(foreign, e, shots) for e in asked]
    assert all(foreign.decode(i.ids[i.start:]).strip() == e.answer for i, e in zip(items, asked, strict=True))
    assert score(tiny, items).answer.perplexity() > 1
    assert score(tiny, encode_text(foreign, text("essay"), 128)).all.perplexity() > 1
    assert len(generate(tiny, foreign, asked, shots, max_new_tokens=3)) == 3
