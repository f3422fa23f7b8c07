"""What people bring: checkpoints of other families, real tokenizers, guards of another vocabulary,
odd texts and files."""

import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import GOLDEN, ROOT, SMOLLM2, paper, run_script, write_json, write_tokenizer
from safetensors.torch import load_file, save_file

import model
from data.hub.prepare import weight_files
from plumbing.adapters import load_adapter, save_adapter
from plumbing.released import load_released_mrm
from plumbing.options import check_prompt
from eval import Measures
from plumbing.errors import BadInput
from plumbing.files import check_keys, read_field, read_jsonl, read_lines
from plumbing.start import printable
from plumbing.checkpoint import load_llama
from plumbing.config import read_config
from mrm import MRM, Guard, add_lora
from plumbing.bridge import Bridge
from plumbing.guards import guard_for
from baselines import beam, best_of_n, rebase
from search import Branch, saffron
from plumbing.tokenizer import Prompt, Template, Tokenizer
from plumbing.options import read_prompts
from trie_cache import TrieCache

FAMILIES = ["tiny_mistral", "tiny_qwen2", "tiny_qwen3"]


# ------------------------------------------------------------------------------------------------------------
# families

@pytest.mark.parametrize("name", FAMILIES)
def test_logits_equal_those_of_transformers(name, monkeypatch):
    """To 1e-5 in float64. The golden figures were made with RoPE's frequencies rounded to float16 (those of
    the models' type), so here they are too; with exact ones, transformers 5.24 itself and this agree
    to 1e-6."""
    exact = model.rotary_frequencies
    monkeypatch.setattr(model, "rotary_frequencies", lambda config: exact(config).half().double())
    golden, llama = (load_file(GOLDEN / "logits_families.safetensors"),
                     load_llama(GOLDEN / name, torch.float64))
    tokens, expected = golden[f"{name}.tokens"], golden[f"{name}.logits"].double()
    logits = llama.logits(llama(tokens[None])[0, golden[f"{name}.positions"]])
    assert (logits - expected).abs().max() < 1e-5 * expected.abs().max()
    trie = TrieCache(llama)
    assert torch.allclose(llama.logits(trie([tokens[:17].tolist()]))[0], logits[1], atol=1e-9)


@pytest.mark.parametrize("name", FAMILIES)
def test_lora_a_guard_and_a_search_on_each_family(name):
    """An MRM and a guard on it share the base's weights, biases and norms,
    in one pass with the policy too."""
    policy = load_llama(GOLDEN / name, torch.float64)
    policy.template = Template([1, 2], [3])
    torch.manual_seed(0)
    mrm = MRM(add_lora(policy, 2, 4, ["q_proj", "v_proj", "down_proj"]), Template([4], [5]))
    for p in mrm.parameters():
        if p.requires_grad and p.dim() and p is not mrm.llama.lm_head.weight:
            torch.nn.init.normal_(p, std=0.3)
    result = saffron(policy, mrm, Prompt([6, 8], [9]), paper(width=3, max_new_tokens=5, min_new_tokens=5))
    for branch in result.trace[-1]:
        before = mrm.template([6, 8], [9]) + branch.tokens[:-1]
        reward = mrm.next_rewards(mrm.llama(torch.tensor([before]))[0, -1])[branch.tokens[-1]]
        assert branch.reward == pytest.approx(reward.item(), abs=1e-9)


def changed(folder, tmp_path, **changes):
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    config = json.loads((tmp_path / "config.json").read_text()) | changes
    write_json(tmp_path / "config.json", {key: value for key, value in config.items() if value != "absent"})
    return tmp_path


def test_a_sliding_window_ends_what_is_read(tmp_path):
    """Within its window, a Mistral attends to everything; so that is as long as its context is here.
    Qwen's is off."""
    assert read_config(changed(GOLDEN / "tiny_mistral", tmp_path,
                               sliding_window=100)).max_position_embeddings == 100
    assert read_config(changed(GOLDEN / "tiny_qwen2", tmp_path,
                               sliding_window=100)).max_position_embeddings == 512


@pytest.mark.parametrize("changes", [
    {"quantization_config": {"quant_method": "bitnet"}}, {"quantization_config": {"quant_method": "fp8"}},
    {"attention_multiplier": 0.5}, {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}},
    {"partial_rotary_factor": 0.5}, {"hidden_act": "gelu"}, {"attention_bias": True}, {"use_qk_norm": True},
    {"tie_word_embeddings": "false"}, {"hidden_size": 48.0}, {"vocab_size": -1}, {"vocab_size": 10 ** 30},
    {"num_hidden_layers": 10 ** 9}, {"num_attention_heads": None}, {"rms_norm_eps": "1e-5"},
    {"eos_token_id": 512}, {"eos_token_id": -1}, {"eos_token_id": [7, "8"]}, {"head_dim": 7},
    {"rope_theta": 0}, {"_name_or_path": 3},
])
def test_a_key_that_changes_the_numbers_is_refused_by_name(tmp_path, changes):
    key, = changes
    with pytest.raises(BadInput) as error:
        load_llama(changed(GOLDEN / "tiny_guard", tmp_path, **changes))
    name = "rope type" if key == "rope_scaling" else key
    assert name in str(error.value) and "config.json" in str(error.value)


def test_keys_that_change_nothing_pass(tmp_path):
    expected = load_llama(GOLDEN / "tiny_guard").fingerprint
    for changes in ({"quantization_config": None}, {"torch_dtype": "bfloat16"}, {"use_cache": False},
                    {"pretraining_tp": 2}, {"attention_dropout": 0.1}, {"rope_interleaved": False},
                    {"transformers_version": "5.0"}):
        assert load_llama(changed(GOLDEN / "tiny_guard", tmp_path, **changes)).fingerprint == expected


def test_two_sources_that_disagree(tmp_path):
    """As in transformers: generation_config.json's ends count too, a single file wins over an old index, and
    a head that is not the embedding it should be is refused."""
    write_json(tmp_path / "generation_config.json", {"eos_token_id": [7, 9], "temperature": 0.6})
    folder = changed(GOLDEN / "tiny_policy", tmp_path)
    assert load_llama(folder).config.eos_token_ids == (7, 9)
    write_json(folder / "model.safetensors.index.json",
               {"weight_map": {"model.norm.weight": "old.safetensors"}})
    tensors = load_file(folder / "model.safetensors")
    before = load_llama(folder).fingerprint
    save_file(tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"].clone()},
              folder / "model.safetensors")
    assert load_llama(folder).fingerprint == before
    save_file(tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"] + 1},
              folder / "model.safetensors")
    with pytest.raises(BadInput, match="lm_head.weight.*is not the embedding"):
        load_llama(folder)


@pytest.mark.parametrize("entry", ["../model.safetensors", "/etc/passwd", "x.bin", 3])
def test_an_index_stays_in_its_folder(tmp_path, entry):
    folder = changed(GOLDEN / "tiny_policy", tmp_path / "a")
    (folder / "model.safetensors").rename(tmp_path / "model.safetensors")
    write_json(folder / "model.safetensors.index.json", {"weight_map": {"model.norm.weight": entry}})
    with pytest.raises(BadInput, match="index"):
        weight_files(folder)


def test_a_tensor_stands_in_one_shard(tmp_path):
    folder = changed(GOLDEN / "tiny_policy", tmp_path)
    for name in ("model-00001-of-00002.safetensors", "model-00001-of-00003.safetensors"):
        shutil.copy(folder / "model.safetensors", folder / name)
    (folder / "model.safetensors").unlink()
    with pytest.raises(BadInput, match="of-00003.*another file"):
        load_llama(folder)


def test_whole_numbers_are_no_weights(tmp_path):
    folder = changed(GOLDEN / "tiny_policy", tmp_path)
    tensors = load_file(folder / "model.safetensors")
    save_file(tensors | {"model.norm.weight": torch.ones(48, dtype=torch.int8)}, folder / "model.safetensors")
    with pytest.raises(BadInput, match="model.norm.weight.*int8"):
        load_llama(folder)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json"])
def test_a_pointer_of_git_lfs_says_what_to_do(tmp_path, name):
    folder = changed(GOLDEN / "tiny_policy", tmp_path)
    write_tokenizer(folder, {b: b + 10 for b in range(256)}, {"<s>": 0})
    (folder / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    with pytest.raises(BadInput, match=f"{name}.*git lfs pull"):
        load_llama(folder)


# ------------------------------------------------------------------------------------------------------------
# adapters

@pytest.mark.parametrize("changes, said", [
    ({"init_lora_weights": "pissa"}, "init_lora_weights"),
    ({"init_lora_weights": "olora"}, "init_lora_weights"),
    ({"alora_invocation_tokens": [1]}, "alora_invocation_tokens"), ({"use_dora": True}, "use_dora"),
    ({"trainable_token_indices": [3]}, "trainable_token_indices"), ({"r": 10 ** 9}, "rank"),
    ({"r": "2"}, "rank"), ({"r": True}, "rank"), ({"lora_alpha": "4"}, "alpha"),
    ({"target_modules": ["lm_head"]}, "target_modules"),
    ({"target_modules": "model.layers.0.self_attn.q_proj"}, "target_modules"),
])
def test_lora_that_is_another_kind_is_refused_by_name(tiny_guard, tmp_path, changes, said):
    folder = shutil.copytree(GOLDEN / "tiny_mrm", tmp_path, dirs_exist_ok=True)
    config = json.loads((folder / "adapter_config.json").read_text())
    write_json(folder / "adapter_config.json", config | changes)
    with pytest.raises(BadInput, match=said):
        load_released_mrm(folder, tiny_guard, Template([0], [1]))


@pytest.mark.parametrize("targets", [
    ["v_proj", "q_proj", "q_proj"], r"model\.layers\.\d+\.self_attn\.(q|v)_proj", r".*\.(q_proj|v_proj)",
    [f"model.layers.{i}.self_attn.{name}" for i in (0, 1) for name in ("q_proj", "v_proj")],
    ["self_attn.q_proj", "v_proj"],
])
def test_target_modules_in_every_spelling(tiny_guard, tiny_mrm, tmp_path, targets):
    folder = shutil.copytree(GOLDEN / "tiny_mrm", tmp_path, dirs_exist_ok=True)
    config = json.loads((folder / "adapter_config.json").read_text())
    write_json(folder / "adapter_config.json", config | {"target_modules": targets})
    mrm = load_released_mrm(folder, tiny_guard, Template([0], [1]))
    tokens = torch.tensor([[1, 2, 3]])
    assert torch.equal(mrm.llama(tokens), tiny_mrm.llama(tokens))


def test_numbers_that_are_none_are_refused_where_they_arise(tiny_guard, tiny_policy, tmp_path):
    """In a guard's score (nan < 0 is false, so it would count as safe),
    in saving and in loading an adapter."""
    guard = Guard(add_lora(tiny_guard, 2, 4, ["q_proj"]), Template([0], [1]))
    torch.nn.init.constant_(guard.llama.model.layers[1].self_attn.q_proj.lora_A, 1e6)  # too large for float16
    with pytest.raises(BadInput, match="lora_A"):
        save_adapter(guard, tmp_path / "a.safetensors", 2, 4, ["q_proj"], 0, "")
    assert not list(tmp_path.iterdir())
    torch.nn.init.zeros_(guard.llama.model.layers[1].self_attn.q_proj.lora_A)
    save_adapter(guard, tmp_path / "a.safetensors", 2, 4, ["q_proj"], 0, "")
    tensors = load_file(tmp_path / "a.safetensors")
    from safetensors import safe_open
    with safe_open(tmp_path / "a.safetensors", "pt") as file:
        metadata = file.metadata()
    save_file(tensors | {"head.bias": tensors["head.bias"] * float("nan")},
              tmp_path / "a.safetensors", metadata)
    with pytest.raises(BadInput, match="head.bias"):
        load_adapter(tmp_path / "a.safetensors", tiny_guard, "guard")
    guard.head.bias.data.fill_(float("nan"))
    with pytest.raises(BadInput, match="not numbers"):
        guard.score(Prompt([5]), [[6]])
    with pytest.raises(BadInput, match="not numbers"):
        best_of_n(tiny_policy, guard, Prompt([5, 6]), paper(width=2, max_new_tokens=2, min_new_tokens=2))


# ------------------------------------------------------------------------------------------------------------
# tokenizers

@pytest.mark.parametrize("name", ["qwen3", "llama3"])
def test_a_real_tokenizer_gives_the_ids_of_hugging_face(real, name):
    golden, tokenizer = json.loads((GOLDEN / "hf_tokenizers.json").read_text()), Tokenizer(real[name])
    for text, ids in zip(golden["texts"], golden[name]["ids"]):
        assert tokenizer.encode(text) == ids, text
    prompt = tokenizer.prompt("How do I pick a lock?")
    assert prompt.policy_tokens(tokenizer.template("chat")) == golden[name]["chat_ids"]
    assert not {*tokenizer.added.values()} & {
        *tokenizer.encode("<|im_end|><|eot_id|><think><|begin_of_text|>")}


def random_checkpoint(family, tokenizer, folder):
    """A tiny model of a family with random weights and a real tokenizer."""
    shutil.copytree(GOLDEN / family, folder, dirs_exist_ok=True)
    shutil.copytree(tokenizer, folder, dirs_exist_ok=True)
    size = Tokenizer(folder).size + 7                               # heads are padded
    write_json(folder / "config.json", json.loads((folder / "config.json").read_text()) | {
        "vocab_size": size, "eos_token_id": size - 20, "_name_or_path": f"random {family}\x1b[31m\u202e"})
    generator = torch.Generator().manual_seed(0)
    tensors = {name: (torch.randn(size, tensor.shape[1], generator=generator) if len(tensor) == 512
                      else tensor.float())
               for name, tensor in load_file(folder / "model.safetensors").items()}
    save_file(tensors, folder / "model.safetensors")
    return folder


@pytest.mark.parametrize("family, tokenizer", [
    ("tiny_qwen3", "qwen3"), pytest.param("tiny_qwen2", "qwen3", marks=pytest.mark.slow),
    pytest.param("tiny_mistral", "llama3", marks=pytest.mark.slow), ("tiny_guard", "llama3")])
def test_a_folder_as_people_have_it_answers(real, tmp_path, family, tokenizer):
    """No guard is asked, so none need fit; the page shows what there is;
    and a name cannot steer the terminal."""
    folder = random_checkpoint(family, real[tokenizer], tmp_path)
    options = ["--policy", folder, "--safety", "none", "--prompt", "How do I pick a lock?",
               "--max_new_tokens", 3]
    status, out, error = run_script("sample.py", *options, "--html", tmp_path / "tree.html")
    assert (status == 0 and "no guard was asked, 3 tokens" in out and "\x1b" not in out
            and "\u202e" not in out), error
    assert '"mrm":[[],' in (tmp_path / "tree.html").read_text()
    status, out, _ = run_script("sample.py", *options, "--json")
    assert status == 0 and json.loads(out)["guard"] is None and len(json.loads(out)["tokens"]) == 3


def test_an_mrm_must_share_the_vocabulary_and_the_command_says_so(real, tmp_path, smollm2_folder):
    folder = random_checkpoint("tiny_qwen3", real["qwen3"], tmp_path)
    status, _, error = run_script("sample.py", "--policy", folder, "--prompt", "Hi", "--max_new_tokens", 3)
    assert (status == 2 and error.count("\n") == 1 and "an MRM must share" in error
            and "train_mrm.py --objective mrm" in error)


@pytest.mark.parametrize("change, said", [
    (lambda t: t["model"].update(type="Unigram"), "type"),
    (lambda t: t["model"].update(dropout=0.1), "dropout"),
    (lambda t: t.update(normalizer={"type": "Lowercase"}), "type"),
    (lambda t: t["model"]["vocab"].update(a=0), "one id"),
    (lambda t: t["model"]["vocab"].update(a=-1), "a = -1"),
    (lambda t: t["model"]["vocab"].update(a=10 ** 30), "a = 1000"),
    (lambda t: t["added_tokens"].append({"id": 300, "content": ""}), "empty"),
    (lambda t: t["added_tokens"].append({"id": 300, "content": "<m>", "lstrip": True}), "lstrip"),
    (lambda t: t["model"]["merges"].append(["a", "b"]), "merge"),
    (lambda t: t["pre_tokenizer"]["pretokenizers"].insert(0, {"type": "Whitespace"}), "pre_tokenizer"),
    (lambda t: t["pre_tokenizer"]["pretokenizers"][0]["pattern"].update(Regex="("), "tokenizer.json"),
    (lambda t: t["decoder"].update(type="Metaspace"), "type"),
])
def test_a_tokenizer_that_is_another_kind_is_refused(tmp_path, change, said):
    write_tokenizer(tmp_path, {b: b + 10 for b in range(256)}, {"<s>": 0, "<e>": 7})
    tokenizer = json.loads((tmp_path / "tokenizer.json").read_text())
    change(tokenizer)
    write_json(tmp_path / "tokenizer.json", tokenizer)
    with pytest.raises(BadInput, match=said):
        Tokenizer(tmp_path)


@pytest.mark.parametrize("pattern", ["", "b+"])
def test_a_pattern_that_loses_text_is_noticed(tmp_path, pattern):
    write_tokenizer(tmp_path, {b: b + 10 for b in range(256)}, {"<s>": 0}, pattern)
    with pytest.raises(BadInput, match="leaves out"):
        Tokenizer(tmp_path).encode("abc")


def test_ids_without_a_token_are_silent_and_added_words_are_shown(tmp_path):
    write_tokenizer(tmp_path, {b: b + 10 for b in range(256)}, {"<s>": 0, "<e>": 7})
    tokenizer = json.loads((tmp_path / "tokenizer.json").read_text())
    tokenizer["added_tokens"].append({"id": 400, "content": "<think>", "special": False})
    write_json(tmp_path / "tokenizer.json", tokenizer)
    tokenizer = Tokenizer(tmp_path)
    assert tokenizer.decode([107, 0, 300, 399, 400, 10 ** 6, 108]) == "a<think>b" and tokenizer.size == 401
    assert 400 not in tokenizer.encode("<think>")


@pytest.mark.parametrize("template, said", [
    ("{{ messages[0].content }}{{ messages[0].content }}", "once"), ("nothing", "once"),
    ("{{ ''.__class__.mro() }}", "chat template"), ("{% for", "chat template"),
    ("{{ raise_exception('no system') }}", "chat template"), (3, "chat template"),
])
def test_a_chat_template_that_cannot_be_used(tmp_path, template, said):
    write_tokenizer(tmp_path, {b: b + 10 for b in range(256)}, {"<s>": 0})
    write_json(tmp_path / "tokenizer_config.json", {"chat_template": template})
    with pytest.raises(BadInput, match=said):
        Tokenizer(tmp_path)


def test_chat_templates_in_every_place(tmp_path):
    """In tokenizer_config.json, as one of several there, or in a file of its own, which wins; templates.json
    wins over all. The reward template is made of the first token."""
    write_tokenizer(tmp_path, {b: b + 10 for b in range(256)}, {"<s>": 0, "<u>": 1})
    text = lambda name: "".join(f"<{t}>" if t < 10 else Tokenizer(tmp_path).decode([t])
                                for t in Tokenizer(tmp_path).template(name)(Tokenizer(tmp_path).encode("~")))
    write_json(tmp_path / "tokenizer_config.json", {"bos_token": {"content": "<s>"}, "chat_template": [
        {"name": "tools", "template": "x"},
        {"name": "default", "template": "{{ bos_token }}a{{ messages[0].content }}b"}]})
    assert text("chat") == "<0>a~b" and text("reward") == "<0>\n\nUser:~\n\nAgent:"
    (tmp_path / "chat_template.jinja").write_text(
        "{%- for m in messages %}\n<u>{{ m.content }}\n{%- break %}{% endfor %}")
    assert text("chat") == "<1>~"
    write_json(tmp_path / "templates.json", {"chat": {"prefix": "p<u>", "infix": "i"}})
    assert text("chat") == "p<1>~i"
    for wrong in ({"chat": {"prefix": "p"}}, {"chat": {"prefix": 1, "infix": "i"}}, {"chat": []}):
        write_json(tmp_path / "templates.json", wrong)
        with pytest.raises(BadInput, match="chat"):
            Tokenizer(tmp_path).template("chat")


# ------------------------------------------------------------------------------------------------------------
# guards of another vocabulary

@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """A policy, and a guard of the same size whose vocabulary has the bytes in another order
    and one pair of letters."""
    policy, other = tmp_path_factory.mktemp("policy"), tmp_path_factory.mktemp("other")
    for folder, name in ((policy, "tiny_policy"), (other, "tiny_guard")):
        shutil.copytree(GOLDEN / name, folder, dirs_exist_ok=True)
    write_tokenizer(policy, {b: b + 10 for b in range(256)}, {"<s>": 0, "<e>": 7}, bos="<s>")
    write_tokenizer(other, {b: 300 - b for b in range(256)}, {"<t>": 1, "<f>": 7}, bos="<t>")
    raw = json.loads((other / "tokenizer.json").read_text())
    raw["model"]["vocab"]["ab"] = 400
    raw["model"]["merges"] = ["a b"]
    write_json(other / "tokenizer.json", raw)
    return load_llama(policy, torch.float64), load_llama(other, torch.float64)


def scalar_guard(llama, seed=0):
    torch.manual_seed(seed)
    guard = Guard(llama, llama.tokenizer.template("reward"))
    torch.nn.init.normal_(guard.head.weight)
    return guard


def test_a_bridge_reads_the_text(two):
    policy, other = two
    bridge = guard_for(policy, scalar_guard(other))
    assert isinstance(bridge, Bridge) and guard_for(policy, scalar_guard(policy)).llama is policy
    encode = policy.tokenizer.encode
    assert (bridge.tokens(encode("xaby")) == other.tokenizer.encode("xaby")
            and 400 in bridge.tokens(encode("ab")))
    assert bridge.tokens(encode("é")[:1]) == []                             # half a character: not yet
    assert bridge.tokens(encode("a") + [7]) == other.tokenizer.encode("a") + [7]    # its own end of sequence
    assert bridge.tokens(encode("<f><e>")) == other.tokenizer.encode("<f><e>")      # text stays text
    prompt, replies = (policy.tokenizer.prompt("Hello ab", "So"),
                       [encode("ab ba"), encode("b"), encode("a") + [7]])
    theirs = other.tokenizer.prompt("Hello ab", "So")
    direct = bridge.guard.score(theirs, [
        other.tokenizer.encode("ab ba"), other.tokenizer.encode("b"), other.tokenizer.encode("a") + [7]])
    assert torch.equal(bridge.score(prompt, replies), direct)
    # as eval.py reads them, in its tries
    judged = Measures(policy, bridge, bridge, {}, asked={0: prompt, 1: prompt}).rewards(
        bridge, {0: replies[0], 1: replies[2]})
    assert list(judged.values()) == pytest.approx(direct[[0, 2]].tolist(), abs=1e-9)
    plain = [policy.tokenizer.prompt("Hello"), other.tokenizer.prompt("Hello")]
    assert torch.equal(bridge.score(plain[0], [encode("b")]),
                       bridge.guard.score(plain[1], [other.tokenizer.encode("b")]))


@pytest.mark.parametrize("search", [best_of_n, beam, rebase, saffron])
def test_searches_through_a_bridge_and_directly_are_equal(two, search):
    """Where replies encode back to themselves: the same guard, of the policy's vocabulary, both ways."""
    policy, _ = two
    guard = scalar_guard(policy)
    prompt = policy.tokenizer.prompt("Hello", "Yes")
    options = dict(width=3, max_new_tokens=6, min_new_tokens=6, top_p=0.5)
    plain = lambda result: [[(b.tokens, pytest.approx(b.reward, abs=1e-9)) for b in frontier]
                            for frontier in result.trace]
    allowed = policy.lm_head.weight.data.clone()
    logits = policy.logits
    policy.logits = lambda hidden: logits(hidden).index_fill(
        -1, torch.tensor([i for i in range(512) if not 42 <= i < 137]), -1e4)
    try:
        direct, across = (search(policy, guard, prompt, paper(**options)),
                          search(policy, Bridge(policy, guard), prompt, paper(**options)))
    finally:
        del policy.logits
    assert torch.equal(allowed, policy.lm_head.weight) and plain(across) == [
        [(b.tokens, b.reward) for b in frontier] for frontier in direct.trace]
    assert across.tokens == direct.tokens and across.stats.reward_calls == direct.stats.reward_calls
    assert across.stats.tokens_computed == direct.stats.tokens_computed             # the trie shares as much


def test_a_search_through_a_bridge_is_counted_and_shares(two):
    """Its rewards are those of the whole text read anew, and far fewer tokens are computed than read."""
    policy, other = two
    bridge, prompt = guard_for(policy, scalar_guard(other)), policy.tokenizer.prompt("Hello ab", "ab")
    result = beam(policy, bridge, prompt, paper(width=2, max_new_tokens=8, min_new_tokens=8, top_p=0.3))
    for branch in result.trace[-1]:
        assert branch.reward == pytest.approx(bridge.score(prompt, [branch.tokens]).item(), abs=1e-9)
    assert result.stats.flops > 0 and result.stats.tokens_cached > 5 * result.stats.tokens_computed


def test_a_prefill_that_ends_within_a_character_is_gone_on_with(two):
    """The first byte of "é" is the prefill's, the second one the reply's: the guard reads one character."""
    policy, other = two
    bridge = guard_for(policy, scalar_guard(other))
    whole = policy.tokenizer.encode("caf\u00e9s")
    cut = next(i for i in range(len(whole)) if policy.tokenizer.decode(whole[:i]).endswith("\ufffd"))
    prompt = Prompt(policy.tokenizer.encode("Hello"), whole[:cut])
    reply = bridge.tokens(whole[cut:], bridge.half(prompt))
    assert other.tokenizer.decode(bridge.prompt(prompt).prefill + reply) == "caf\u00e9s"
    hidden = Prompt(prompt.user, prompt.prefill, hide_prefill=True)
    assert other.tokenizer.decode(bridge.tokens(whole[cut:], bridge.half(hidden))) == "\ufffds"
    reader = bridge.reader(prompt)
    branch = Branch(whole[cut:])
    reader.ask([branch])
    assert reader.trie.waiting and bridge.score(prompt, [branch.tokens]).shape == (1,)


@pytest.mark.slow
def test_a_qwen_policy_with_a_guard_of_llamas_vocabulary(real, tmp_path):
    policy = load_llama(random_checkpoint("tiny_qwen3", real["qwen3"], tmp_path / "policy"), torch.float64)
    guard = scalar_guard(load_llama(random_checkpoint("tiny_guard", real["llama3"], tmp_path / "guard"),
                                    torch.float64))
    prompt = policy.tokenizer.prompt("Nenne drei Städte", "Gern: 日本")
    result = rebase(policy, guard_for(policy, guard), prompt,
                    paper(width=4, max_new_tokens=6, min_new_tokens=6, top_p=0.01))
    assert len(result.tokens) == 6 and result.reward == pytest.approx(
        guard_for(policy, guard).score(prompt, [result.tokens]).item(), abs=1e-9)


@pytest.mark.parametrize("give, said", [
    (lambda n: [1.0] * n, None), (lambda n: np.ones(n), None), (lambda n: torch.ones(n), None),
    (lambda n: [1] * n, None), (lambda n: [1.0] * (n + 1), "shape"), (lambda n: 1.0, "shape"),
    (lambda n: [float("nan")] * n, "not numbers"), (lambda n: [float("inf")] * n, "not numbers"),
])
def test_a_guard_of_ones_own_may_give_a_list(tiny_policy, give, said):
    """A wrong shape is a programming error: a traceback.
    Numbers that are none are the fault of weights, and one line."""
    class Own:
        def score(self, prompt, replies):
            return give(len(replies))
    search = lambda: best_of_n(tiny_policy, guard_for(tiny_policy, Own()), Prompt([5, 6]),
                               paper(width=2, max_new_tokens=2, min_new_tokens=2))
    if said is None:
        assert search().reward == 1.0
    else:
        with pytest.raises(AssertionError if said == "shape" else BadInput, match=said):
            search()


def test_a_policy_without_a_chat_format_is_named(two):
    policy, _ = two
    template, policy.template = policy.template, None
    texts = policy.tokenizer.texts
    policy.tokenizer.texts = {}
    try:
        with pytest.raises(BadInput, match="chat_template"):
            check_prompt(policy, None, Prompt([5]), 3)
    finally:
        policy.template, policy.tokenizer.texts = template, texts


# ------------------------------------------------------------------------------------------------------------
# text

def test_lines_end_at_line_ends_only(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_bytes("\ufeffa\u2028b\x0cc\x85d\r\n\r\n  \nlast".encode())
    assert (read_prompts(f"FILE:{path}") == ["a\u2028b\x0cc\x85d", "last"]
            and read_lines(path)[1] == (4, "last"))
    path.write_bytes(b'\xef\xbb\xbf{"a": 1}\r\n\r\n{"a": 2}')
    assert list(read_jsonl(path)) == [(1, {"a": 1}), (3, {"a": 2})]


@pytest.mark.parametrize("line, said", [
    ("[1]", "a JSON object"), ('{"a": "\\ud83d"}', "Unicode"), ("{", "line 2"), ('{"a": NaN}', "line 2"),
    ("[" * 100_000, "line 2")])
def test_a_line_that_is_no_object_is_named(tmp_path, line, said):
    (tmp_path / "rows.jsonl").write_text('{"a": 1}\n' + line)
    with pytest.raises(BadInput, match=said) as error:
        list(read_jsonl(tmp_path / "rows.jsonl"))
    assert "line 2" in str(error.value) and "\n" not in str(error.value)


def test_standard_input(monkeypatch):
    import io
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO("\ufeffone\r\ntwo\r\n".encode())))
    assert read_prompts("-") == ["one\ntwo"]


def test_nothing_steers_the_terminal():
    assert (printable("a\x1b[31m\u202eb\u2066c\x07\n\té👩\u200d👧")
            == "a\ufffd[31m\ufffdb\ufffdc\ufffd\n\té👩\u200d👧")


@pytest.mark.parametrize("text, said", [
    (" " * 1_000_000, "blanks"), ("\n" * 1_000_000, "blanks"), ("\ud83d", "Unicode")])
def test_a_text_that_no_tokenizer_reads(smollm2, text, said):
    with pytest.raises(BadInput, match=said):
        smollm2.tokenizer.encode("a" + text + "b")


@pytest.mark.parametrize("options, said", [
    (["--width", "9" * 30], "width"), (["--width", "1000000000"], "width"),
    (["--seed", str(2 ** 70)], "seed"), (["--seed", "-1"], "seed"),
    (["--top_p", "nan"], "top_p"), (["--beta", "inf"], "beta"), (["--temperature", "nan"], "temperature"),
])
def test_numbers_out_of_range_are_refused_before_anything_is_read(options, said):
    status, _, error = run_script("sample.py", "--policy", "no/such/folder", "--prompt", "Hi", *options)
    assert status == 2 and error.count("\n") == 1 and said in error and len(error) < 300


@pytest.mark.parametrize("options, said", [
    (["--lr", "nan"], "--lr"), (["--weight_decay", "-1"], "--weight_decay"), (["--clip", "-1"], "--clip"),
    (["--seed", str(2 ** 70)], "--seed"), (["--rank", "0"], "--rank")])
def test_training_options_out_of_range(tmp_path, options, said):
    status, _, error = run_script("train_mrm.py", "--objective", "mrm", "--data", tmp_path,
                                  "--out", tmp_path / "x", *options)
    assert status == 2 and error.count("\n") == 1 and said in error


@pytest.mark.parametrize("variable, value, said", [
    ("HF_TOKEN", "hf_secret\nX-Other: 1", "HF_TOKEN"), ("HF_ENDPOINT", "huggingface.co", "HF_ENDPOINT"),
    ("HF_ENDPOINT", "ftp://x", "HF_ENDPOINT")])
def test_an_environment_that_cannot_be_used(tmp_path, variable, value, said):
    environment = {"HF_ENDPOINT": "http://127.0.0.1:9"} | {variable: value}
    done = subprocess.run([sys.executable, "data/hub/prepare.py", "--repo", "a/b", "--out", tmp_path],
                          cwd=ROOT, capture_output=True, text=True, env=os.environ | environment)
    assert (done.returncode == 2 and done.stderr.count("\n") == 1 and said in done.stderr
            and "secret" not in done.stderr)


def test_fields_and_keys():
    assert (read_field({"a": 1}, "a", float) == 1.0 and read_field({}, "a", default=5) == 5
            and read_field({"a": None}, "a", default=5) == 5)
    for raw in ({"a": True}, {"a": "1"}, {"a": 1.5}, {"a": 11}, {}, {"a": None}):
        with pytest.raises(BadInput, match="a"):
            read_field(raw, "a", int, 0, 10)
    check_keys({"a": 1, "b": None, "c": [], "d": False}, {"a": [1, 2]})
    for raw in ({"a": 3}, {"z": 1}, {"z": "x"}):
        with pytest.raises(BadInput):
            check_keys(raw, {"a": [1, 2]})


def test_default_weights_need_no_conversion_by_hand():
    """Nothing but files as they are on the hub: what data/smollm2/prepare.py writes."""
    assert ({"config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors"}
            <= {p.name for p in SMOLLM2.iterdir()})
