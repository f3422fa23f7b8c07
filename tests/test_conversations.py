"""A conversation is a text: its tokens are those that transformers gives the whole of it. Templates, ends."""

import json
import shutil

import pytest
import torch
from conftest import GOLDEN, SMOLLM2, run_script, write_json, write_tokenizer
from safetensors.torch import load_file, save_file

from data.corpus import read_labels
from model import Llama
from plumbing.checkpoint import identity, load_llama
from plumbing.config import read_config
from plumbing.errors import BadInput
from plumbing.bridge import Bridge
from plumbing.templates import TODAY, chat_texts
from plumbing.tokenizer import Tokenizer

CONVERSATIONS = json.loads((GOLDEN / "conversations.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("name", ["qwen3", "llama3"])
def test_a_conversation_has_the_tokens_of_transformers(real, name, tmp_path):
    """Of ten prompts in eight templates; a control token's text that a user writes stays plain text."""
    assert CONVERSATIONS["date"] == TODAY.strftime("%d %B %Y")
    tokenizer = Tokenizer(real[name])
    compared = 0
    for title, case in CONVERSATIONS["vocabularies"][name].items():
        tokenizer.texts["chat"] = chat_texts(case["template"], {})
        template = tokenizer.template("chat")
        for text, ids in zip(CONVERSATIONS["prompts"], case["ids"]):
            ours = tokenizer.prompt(text).policy_tokens(template)
            if ids is not None:
                assert ours == ids, (title, text)
                compared += 1
                continue
            user = getattr(text, template.trim)() if template.trim else text
            region = template.before + user + template.after
            assert ours == [*template.prefix, *tokenizer.encode(region), *template.infix], (title, text)
    assert compared == 72


@pytest.mark.parametrize("source, user, expected", [
    ("[{{ messages[0].content }}]", " a ", "[ a ]"), ("[{{ messages[0].content | trim }}]", " a\n", "[a]"),
    ("[{{ messages[0].content.lstrip() }}]", " a ", "[a ]"),
    ("[{{ messages[0].content.rstrip() }}]", " a ", "[ a]")])
def test_a_template_that_trims_is_followed(tmp_path, source, user, expected):
    write_tokenizer(tmp_path, {b: b + 1 for b in range(256)}, {"<s>": 0})
    (tmp_path / "chat_template.jinja").write_text(source)
    tokenizer = Tokenizer(tmp_path)
    tokens = tokenizer.template("chat")(tokenizer.encode(user))
    assert tokenizer.decode(tokens) == expected


@pytest.mark.parametrize("source, said", [
    ("{{ messages[0].content | upper }}", "exactly once"),
    ("{{ messages[0].content }}{{ messages[0].content }}", "exactly once"),
    ("{{ messages[0].content.replace('\\n', '') }}", "does not just trim"),
    ("{{ raise_exception('no user') }}", "no user")])
def test_a_template_that_changes_the_text_is_refused(tmp_path, source, said):
    write_tokenizer(tmp_path, {b: b + 1 for b in range(256)}, {"<s>": 0})
    (tmp_path / "chat_template.jinja").write_text(source)
    with pytest.raises(BadInput, match=f"chat_template.jinja.*{said}"):
        Tokenizer(tmp_path)


@pytest.mark.parametrize("source, expected", [
    ("{{ strftime_now('%d %b %Y') }}: {{ messages[0].content }}", "26 Jul 2024: "),
    ("{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}", ""),
    ("{{ {'a': '<é>'} | tojson }}{{ messages[0].content }}", '{"a": "<é>"}'),
    ("{% if tools is defined %}{{ raise_exception('tools') }}{% endif %}> {{ messages[0].content }}", "> "),
    ("{% for m in messages %}{% if not m.role %}{% continue %}{% endif %}{{ m.content }}{% endfor %}", "")])
def test_the_engine_is_that_of_transformers(source, expected):
    assert chat_texts(source, {})["prefix"] == expected


def test_a_format_that_opens_think_is_for_the_policy_alone(tmp_path, smollm2_folder):
    """With a note; a guard or an MRM would judge its reasoning."""
    config = json.loads((SMOLLM2 / "config.json").read_text()) | {
        "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2,
        "num_key_value_heads": 1, "head_dim": 8}
    write_json(tmp_path / "config.json", config)
    torch.manual_seed(0)
    weights = {name: torch.randn_like(p) for name, p in Llama(read_config(tmp_path)).named_parameters()}
    save_file(weights, tmp_path / "model.safetensors")
    shutil.copy(SMOLLM2 / "tokenizer.json", tmp_path)
    (tmp_path / "chat_template.jinja").write_text("{{ messages[0].content }}<|im_end|>{{ '<think>\n' }}")
    ask = ["sample.py", "--policy", tmp_path, "--prompt", "Hi", "--max_new_tokens", 2, "--min_new_tokens", 1]
    status, _, error = run_script(*ask, "--safety", "none")
    assert status == 0 and "note: the chat format" in error
    for search in ("rebase", "saffron"):
        status, _, error = run_script(*ask, "--safety", search)
        assert status == 2 and "opens <think>" in error and error.count("\n") == 1


def folder_of(tmp_path, **changes):
    """tiny_guard with single bytes for a vocabulary, and changes of its config.json."""
    shutil.copytree(GOLDEN / "tiny_guard", tmp_path)
    control = {"<s>": 0, "<eot>": 5, "<eom>": 6, "<eos>": 7}
    write_tokenizer(tmp_path, {b: b + 100 for b in range(256)}, control)
    config = json.loads((tmp_path / "config.json").read_text())
    write_json(tmp_path / "config.json", config | {"eos_token_id": [7, 6, 5]} | changes)
    return tmp_path


@pytest.mark.parametrize("template, eos_token, changes, expected", [
    ("<s>{{ messages[0].content }}<eot>>", "<eos>", {}, 5), ("{{ messages[0].content }}\n", "<eom>", {}, 6),
    ("{{ messages[0].content }}<s>", "<s>", {}, 7),
    ("{{ messages[0].content }}<eot>", "<eos>", {"eos_token_id": 7}, 7)])
def test_a_labelled_reply_ends_as_a_turn_does(tmp_path, template, eos_token, changes, expected):
    """With the control token after the user's text or eos_token, if it is one of the ends, or the first."""
    folder = folder_of(tmp_path / "model", **changes)
    write_json(folder / "tokenizer_config.json", {"chat_template": template, "eos_token": eos_token})
    llama = load_llama(folder)
    assert llama.config.end_of_turn == expected
    row = {"source": "a", "prompt": "Lock?", "response": "No.", "unsafe": 0}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n")
    example, = read_labels(tmp_path / "rows.jsonl", llama, 9, 9)
    assert example.reply[-1] == expected
    bridge = Bridge(load_llama(SMOLLM2), type("Guard", (), {"llama": llama}))
    assert bridge.tokens([2])[-1:] == [expected]                        # the policy's end of sequence


def test_the_identity_of_a_checkpoint_is_its_content(tmp_path):
    """At another path it is the same; with other weights, another chat format or other ends it is not."""
    one, two = folder_of(tmp_path / "one"), folder_of(tmp_path / "two")
    assert identity(load_llama(one)) == identity(load_llama(two))
    before = identity(load_llama(two))
    write_json(two / "tokenizer_config.json", {"chat_template": "{{ messages[0].content }}?"})
    seen = {before, identity(load_llama(two))}
    write_json(two / "generation_config.json", {"eos_token_id": [8]})
    seen.add(identity(load_llama(two)))
    tensors = load_file(two / "model.safetensors")
    save_file({name: tensor * 0.5 for name, tensor in tensors.items()}, two / "model.safetensors")
    seen.add(identity(load_llama(two)))
    assert len(seen) == 4


def vocabulary_with(folder, merges):
    """The default vocabulary's single characters, and what these merges make."""
    raw = json.loads((SMOLLM2 / "tokenizer.json").read_text(encoding="utf-8"))
    letters = sorted(text for text in raw["model"]["vocab"] if len(text) == 1)
    made = ["".join(merge.split()) for merge in merges]
    vocab = {text: i for i, text in enumerate(dict.fromkeys(letters + made))}
    write_json(folder / "tokenizer.json", raw | {"added_tokens": [], "model": {
        "type": "BPE", "vocab": vocab, "merges": merges}})
    return Tokenizer(folder)


@pytest.mark.parametrize("merges, text", [
    (["a b", "b c", "a bc"], "abc"), (["a a", "a aa"], "aaa")])
def test_merges_that_differ_from_the_order_of_ranks_are_refused(smollm2_folder, tmp_path, merges, text):
    """Hugging Face's library merges listed pairs only: with a+b, b+c and a+bc it makes ab and c of abc."""
    tokenizer = vocabulary_with(tmp_path, merges)
    assert tokenizer.encode("a b")                              # where no such token is made, all is well
    with pytest.raises(BadInput, match="another way than by rank"):
        tokenizer.encode(text)


def test_a_token_with_merges_at_two_places_is_refused(smollm2_folder, tmp_path):
    with pytest.raises(BadInput, match="at two places"):
        vocabulary_with(tmp_path, ["a b", "ab c", "b c", "a bc"])


def test_every_token_of_the_default_vocabulary_is_made_by_its_merge(smollm2):
    from plumbing.vocabulary import is_proper
    vocabulary, known = smollm2.tokenizer.vocabulary, set()
    assert len(vocabulary.halves) > 48_000 and all(is_proper(t, vocabulary, known) for t in vocabulary.halves)


def test_neutral_keys(tmp_path):
    """A switch that is off, the library's default, and the name of a kernel pass; other values do not."""
    for key, value in (("top_k", 50), ("partial_rotary_factor", 1.0), ("use_sdpa", True),
                       ("_attn_implementation", "eager")):
        load_llama(folder_of(tmp_path / key, **{key: value}))
    for key, value in (("top_k", 20), ("partial_rotary_factor", 0.5)):
        with pytest.raises(BadInput, match=key):
            load_llama(folder_of(tmp_path / f"{key} {value}", **{key: value}))


def test_the_window_of_a_mistral_counts_whatever_the_switch_says(tmp_path):
    shutil.copytree(GOLDEN / "tiny_mistral", tmp_path / "m")
    config = json.loads((tmp_path / "m" / "config.json").read_text())
    write_json(tmp_path / "m" / "config.json", config | {"sliding_window": 16, "use_sliding_window": False})
    assert load_llama(tmp_path / "m").config.max_position_embeddings == 16
    assert torch.isfinite(load_llama(tmp_path / "m").lm_head.weight).all()
