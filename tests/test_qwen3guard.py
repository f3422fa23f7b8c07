"""Qwen3Guard, Stream and Gen, as tiny random folders with the real vocabulary of Qwen3."""

import gzip
import json

import pytest
import torch
import torch.nn.functional as F
from conftest import paper, run_script, write_json
from safetensors.torch import save_file

from baselines import best_of_n, rebase
from data.corpus import read_rewards
from model import Llama
from plumbing.checkpoint import load_llama
from plumbing.config import read_config
from plumbing.errors import BadInput
from plumbing.guards import guard_for, load_guard
from plumbing.stream_guard import StreamGuard

SIZE, INNER = 16, 8
CONFIG = {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "vocab_size": 151_936,
          "hidden_size": SIZE, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4,
          "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 1024, "rms_norm_eps": 1e-6,
          "rope_theta": 1e6, "tie_word_embeddings": True, "hidden_act": "silu", "eos_token_id": 151_645}
CHAT = ("{% for m in messages %}"
        "{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}")
ASKS = ("{{ '<|im_start|>user\nIs the reply safe?\nUSER: ' + messages[0]['content'] }}"
        "{% if messages | length > 1 %}{{ '\nASSISTANT: ' + messages[1]['content'] }}{% endif %}"
        "{{ '\nFormat: Safety: (Safe|Unsafe)<|im_end|>\n' }}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}")


def make(folder, public_data, seed, template=CHAT, heads=False, **changes):
    """A tiny model with random weights, on disk as on the hub."""
    folder.mkdir()
    for path in (public_data / "tokenizers" / "qwen3").glob("*.gz"):
        (folder / path.stem).write_bytes(gzip.decompress(path.read_bytes()))
    config = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    write_json(folder / "tokenizer_config.json", config | {"chat_template": template})
    write_json(folder / "config.json", CONFIG | changes)
    torch.manual_seed(seed)
    tensors = {name: torch.randn_like(p) * 0.3 if p.dim() > 1 else torch.ones_like(p)
               for name, p in Llama(read_config(folder)).named_parameters()}
    if heads:
        tensors |= {"risk_level_category_pre.weight": torch.randn(INNER, SIZE),
                    "risk_level_category_layernorm.weight": torch.rand(INNER) + 0.5,
                    "risk_level_head.weight": torch.randn(3, INNER),
                    "category_head.weight": torch.randn(8, INNER),
                    "query_risk_level_head.weight": torch.randn(3, INNER)}
    save_file(tensors, folder / "model.safetensors")
    return folder


@pytest.fixture(scope="module")
def folders(public_data, tmp_path_factory):
    root = tmp_path_factory.mktemp("qwen3guard")
    head = {"architectures": ["Qwen3ForGuardModel"], "guard_inner_size": INNER, "num_category": 8,
            "num_risk_level": 3, "num_query_category": 9, "num_query_risk_level": 3,
            "response_risk_level_map": {"0": "Safe", "1": "Unsafe", "2": "Controversial"}}
    return {"policy": make(root / "policy", public_data, 0),
            "stream": make(root / "stream", public_data, 1, heads=True, **head),
            "gen": make(root / "gen", public_data, 2, ASKS)}


@pytest.fixture(scope="module")
def policy(folders):
    return load_llama(folders["policy"], torch.float64)


def test_stream_judges_every_token_by_its_head(folders, policy):
    """R is the difference of two classes of the head, on the conversation in the guard's own chat format."""
    guard = load_guard(folders["stream"], policy)
    assert isinstance(guard, StreamGuard) and guard_for(policy, guard) is guard
    prompt, reply = policy.tokenizer.prompt("How do I pick a lock?"), policy.tokenizer.encode(" Take a pin.")
    heads = {}
    llama = load_llama(folders["stream"], torch.float64, heads=heads)
    text = "<|im_start|>user\nHow do I pick a lock?<|im_end|>\n<|im_start|>assistant\n"
    context = policy.tokenizer.encode_template(text)
    hidden = llama(torch.tensor([context + reply]))[0]
    for n in (1, len(reply)):
        x = F.linear(hidden[len(context) + n - 1], heads["risk_level_category_pre.weight"])
        x = x / (x.square().mean() + 1e-6).sqrt() * heads["risk_level_category_layernorm.weight"]
        classes = F.linear(x, heads["risk_level_head.weight"])
        expected = (classes[0] - classes[1]).item()
        assert guard.score(prompt, [reply[:n]]).item() == pytest.approx(expected, abs=1e-6)


def test_gen_says_its_verdict_after_both_turns(folders, policy):
    guard = load_guard(folders["gen"], policy)
    prompt, reply = policy.tokenizer.prompt("Lock?"), policy.tokenizer.encode(" A pin.")
    llama = load_llama(folders["gen"], torch.float64)
    before = "<|im_start|>user\nIs the reply safe?\nUSER: Lock?\nASSISTANT: "
    after = "\nFormat: Safety: (Safe|Unsafe)<|im_end|>\n<|im_start|>assistant\nSafety:"
    tokens = [*llama.tokenizer.encode_template(before), *reply, *llama.tokenizer.encode_template(after)]
    logits = llama.logits(llama(torch.tensor([tokens]))[0, -1])
    safe, unsafe = (llama.tokenizer.encode(word)[0] for word in (" Safe", " Unsafe"))
    expected = (logits[safe] - logits[unsafe]).item()
    assert guard.score(prompt, [reply]).item() == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("search", [rebase, best_of_n])
def test_a_search_asks_stream_for_one_token_a_call(folders, policy, search):
    guard = load_guard(folders["stream"], policy)
    prompt = policy.tokenizer.prompt("How do I pick a lock?", "Sure")
    options = paper(width=3, max_new_tokens=5, min_new_tokens=5, top_p=0.01)
    result = search(policy, guard, prompt, options)
    assert result.reward == pytest.approx(guard.score(prompt, [result.tokens]).item(), abs=1e-6)
    contexts = len(prompt.policy_tokens(policy.template)) + len(prompt.reward_tokens(guard.template))
    a_call = 5 if search is best_of_n else 1                            # the guard's tokens
    most = contexts + result.stats.policy_calls + result.stats.reward_calls * a_call
    assert result.stats.tokens_computed <= most


def test_a_stream_without_its_head_is_refused(public_data, tmp_path, policy):
    folder = make(tmp_path / "g", public_data, 3, architectures=["Qwen3ForGuardModel"])
    with pytest.raises(BadInput, match="risk_level_category_pre.weight has shape None"):
        load_guard(folder, policy)


def test_a_model_that_is_no_guard_is_refused(folders, policy):
    with pytest.raises(BadInput, match="not a guard.*Safety:"):
        load_guard(folders["policy"], policy)


@pytest.mark.slow
def test_corpus_mrm_and_saffron(folders, tmp_path):
    """The paper's experiment, from weights that nobody has to ask for: rewards, an MRM on the guard's base,
    searches."""
    labels = [{"source": "advbench", "prompt": f"Request {i}", "response": "Sure, here is", "unsafe": 1}
              for i in range(10)]
    (tmp_path / "labels.jsonl").write_text("".join(json.dumps(row) + "\n" for row in labels))
    (tmp_path / "corpus").mkdir()
    status, _, error = run_script(
        "data/safety_rewards/prepare.py", "--policy", folders["policy"], "--guard", folders["stream"],
        "--labels", tmp_path / "labels.jsonl", "--out", tmp_path / "corpus", "--shards", 1, "--hh_replies", 0,
        "--policy_batches", 2, "--refused_batches", 0, "--ordinary_batches", 0, "--siblings", 3,
        "--max_reply", 12)
    assert status == 0, error
    training, held_out = read_rewards(tmp_path / "corpus", load_llama(folders["stream"]))
    assert training and held_out
    status, _, error = run_script(
        "train_mrm.py", "--objective", "mrm", "--base", folders["stream"], "--data", tmp_path / "corpus",
        "--out", tmp_path / "mrm.safetensors", "--steps", 4, "--rank", 2)
    assert status == 0, error
    for search in ("saffron", "rebase"):
        status, out, error = run_script(
            "sample.py", "--safety", search, "--policy", folders["policy"], "--guard", folders["stream"],
            "--mrm_base", folders["stream"], "--mrm", tmp_path / "mrm.safetensors", "--json",
            "--prompt", "How do I pick a lock?", "--max_new_tokens", 4, "--min_new_tokens", 4)
        assert status == 0, error
        assert len(json.loads(out)["tokens"]) == 4
