"""On a GPU: the searches find what they find on the CPU, and every command that trains or measures runs.
Skipped where there is none."""

import copy
import json

import pytest
import torch
from conftest import paper, reward_model_of, run_script
from test_search_states import prepare, tiny  # noqa: F401 (a fixture)

from baselines import SEARCHES
from mrm import MRM, add_lora, trained_tensors
from plumbing.shared import share_pass
from plumbing.tokenizer import Prompt

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="this machine has no CUDA")


@pytest.mark.parametrize("beta", [0.0, 0.1])
@pytest.mark.parametrize("method", SEARCHES)
def test_the_same_frontiers_as_on_the_cpu(method, beta, tiny_policy, tiny_mrm, tiny_scalar_guard):
    """In float64. Random draws are made on the CPU, so they are the same too."""
    frontiers = []
    for device in ("cpu", "cuda"):
        policy = copy.deepcopy(tiny_policy).to(device)
        mrm = copy.deepcopy(tiny_mrm).to(device)
        guard = copy.deepcopy(tiny_scalar_guard).to(device)
        options = paper(width=4, max_new_tokens=12, min_new_tokens=3, beta=beta, temperature=1.0)
        reward_model = reward_model_of(method, mrm, guard)
        result = SEARCHES[method].search(policy, reward_model, Prompt([5, 6, 7]), options)
        frontiers.append([[branch.tokens for branch in frontier] for frontier in result.trace])
    assert frontiers[0] == frontiers[1]


def test_corpus_training_evaluation_attack(tiny, tmp_path):  # noqa: F811
    """The whole chain on tiny models, in bfloat16 where there is no training."""
    def command(script, *options):
        status, out, error = run_script(script, "--device", "cuda", *options)
        assert status == 0, error
        return out
    cuda = ["--device", "cuda", "--dtype", "bfloat16"]
    replies = ["--policy_batches", 1, "--refused_batches", 0, "--hh_replies", 6]
    status, _, error = prepare(tiny, tmp_path / "corpus", *replies, *cuda)
    assert status == 0, error
    attack = ["--attack", "learned_suffix", "--max_prompt", 16]
    status, _, error = prepare(tiny, tmp_path / "attacked", *attack, *cuda)
    assert status == 0, error
    lora = ["--rank", 2, "--alpha", 4, "--targets", "q_proj,v_proj", "--first_layer", 0]
    log = command("train_mrm.py", "--objective", "mrm", "--data", tmp_path / "corpus", tmp_path / "attacked",
                  "--init", tiny / "mrm.safetensors", "--out", tmp_path / "new.safetensors", "--steps", 3,
                  "--eval_every", 2, "--dtype", "bfloat16", "--base", tiny / "base", *lora)
    assert "within r2" in log
    rows = [{"prompt": "Tell me", "response": "Sure, here is"}, {"prompt": "What?", "category": "harmless"}]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    common = ["--data", tmp_path / "rows.jsonl", "--policy", tiny / "base", "--mrm_base", tiny / "base",
              "--guard", tiny / "guard.safetensors", "--judge", tiny / "guard.safetensors",
              "--mrm", tmp_path / "new.safetensors", "--dtype", "bfloat16", "--max_new_tokens", 6,
              "--batch", 2, "--width", 2]
    table = command("eval.py", "--safety", ",".join(SEARCHES), "--out", tmp_path / "eval", *common)
    assert all(name in table for name in SEARCHES)
    attack = ["--attack", "learned_suffix", "--tries", 2, "--out", tmp_path / "tries"]
    table = command("attack.py", *attack, *common)
    assert "excess" in table


def test_a_shared_pass_on_the_gpu(tiny_policy, tiny_guard):
    """Two models whose frozen weights are the same are read in one pass: the numbers of two passes."""
    policy = copy.deepcopy(tiny_policy).to("cuda")
    mrm = MRM(add_lora(policy, 2, 4, ["q_proj", "v_proj"], 0), policy.template)
    for tensor in trained_tensors(mrm).values():
        if tensor.is_floating_point():
            torch.nn.init.normal_(tensor, std=0.1)
    options = paper(width=4, max_new_tokens=8, min_new_tokens=3)
    apart, shared = (SEARCHES["saffron"].search(policy, model, Prompt([5, 6, 7]), options)
                     for model in (mrm, share_pass(policy, mrm)))
    assert apart.tokens == shared.tokens
    assert apart.reward == pytest.approx(shared.reward, abs=1e-9)
