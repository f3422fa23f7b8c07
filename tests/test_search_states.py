"""The corpus of what saffron's own search visits, on tiny models with a vocabulary of single bytes."""

import gzip
import json
import random
import shutil

import pytest
import torch
from conftest import GOLDEN, in_two_processes, run_script, write_tokenizer
from plumbing.checkpoint import load_llama
from safetensors.torch import load_file
from test_data import script

from data import search_states
from data.corpus import read_rewards
from mrm import MRM, Guard, add_lora, trained_tensors
from plumbing.adapters import load_adapter, read_metadata, save_adapter
from plumbing.shared import share_pass
from plumbing.tokenizer import Prompt
from plumbing.files import content_hash
from search import Branch, nucleus

LORA = (2, 4, ["q_proj", "v_proj"], 0)
REQUESTS = [("Tell me", "Sure, here is", False), ("Show me", "Of course, this is it", True),
            ("What is this?", None, False)]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A folder with a policy, a guard and an MRM on it (random ones), labels and dialogues."""
    folder = tmp_path_factory.mktemp("tiny")
    base = folder / "base"
    shutil.copytree(GOLDEN / "tiny_guard", base)
    write_tokenizer(base, {b: b + 10 for b in range(256)}, {"<s>": 0, "<e>": 7}, bos="<s>")
    llama = load_llama(base)
    torch.manual_seed(0)
    for kind, name in ((Guard, "guard"), (MRM, "mrm"), (MRM, "other")):
        model = kind(add_lora(llama, *LORA), llama.tokenizer.template("reward"))
        for tensor in trained_tensors(model).values():
            if tensor.is_floating_point() and tensor.dim():
                torch.nn.init.normal_(tensor, std=0.5)
        if kind is MRM:
            model.unseen[:] = torch.arange(512) % 3 == 2                # end-of-sequence, 7, is among them
            model.unseen[7] = False
        save_adapter(model, folder / f"{name}.safetensors", *LORA, "")
    labels = [{"source": "advbench", "prompt": f"Request {i}", "response": "Sure, here is", "unsafe": 1}
              for i in range(10)]
    labels += [{"source": "opening", "prompt": f"Question {i}?", "response": "It is", "unsafe": 0}
               for i in range(3)]
    (folder / "labels.jsonl").write_text("".join(json.dumps(row) + "\n" for row in labels))
    path = folder / "hh_rlhf" / "harmless-base" / "test.jsonl.gz"
    path.parent.mkdir(parents=True)
    dialogue = "\n\nHuman: First {0}\n\nAssistant: Yes.\n\nHuman: More?\n\nAssistant: No{1}."
    path.write_bytes(gzip.compress("\n".join(
        json.dumps({side: dialogue.format(i, side) for side in ("chosen", "rejected")})
        for i in range(12)).encode()))
    return folder


@pytest.fixture(scope="module")
def models(tiny):
    """(policy, guard, MRM)."""
    policy = load_llama(tiny / "base")
    mrm = load_adapter(tiny / "mrm.safetensors", policy, "mrm")
    return policy, load_adapter(tiny / "guard.safetensors", policy, "guard"), share_pass(policy, mrm)


def test_first_turns():
    """Each once, without the dialogues' later turns; a tenth is held out."""
    pairs = [{"chosen": f"\n\nHuman: First {i // 2}\n\nAssistant: A.\n\nHuman: B?\n\nAssistant: C",
              "rejected": f"\n\nHuman: Other {i // 2}\n\nAssistant: D."} for i in range(30)]
    turns = search_states.first_turns([*pairs, {"chosen": "\n\nHuman: \n\nAssistant: E", "rejected": "F"}])
    assert [request for request, _, _ in turns[:3]] == ["First 0", "Other 0", "First 1"]
    assert len(turns) == 30
    many = [{"chosen": f"\n\nHuman: {i}\n\nAssistant: A"} for i in range(5000)]
    spread = [int(request) for request, _, _ in search_states.first_turns(many)]
    assert len(spread) == 2000 and {b - a for a, b in zip(spread, spread[1:])} == {2, 3}
    held_out = [request for request, _, held in search_states.first_turns(many) if held]
    assert 160 < len(held_out) < 240 and all(map(search_states.is_held_out, held_out))


def test_requests_of_three_kinds_take_turns():
    kinds = {"harmful": list(range(100, 150)), "dialogue": list(range(200, 230)),
             "ordinary": list(range(300, 320))}
    batches = [search_states.requests_of(batch, 8, kinds) for batch in range(25)]       # 200 requests
    assert {len(batch) for batch in batches} == {8}
    drawn = [request for batch in batches for request in batch]
    for low, count in ((100, 50), (200, 30), (300, 20)):
        assert [r for r in drawn if low <= r < low + 100] == 2 * list(range(low, low + count))


def test_rows_are_what_the_search_has_visited(models, monkeypatch):
    """The winner first. Then other branches, none of them twice. They begin with the prefill, or after it."""
    policy, _, mrm = models
    searches = []

    def recorded(policy, mrm, prompts, options):
        results = search(policy, mrm, prompts, options)
        searches.append((prompts, options, results))
        return results
    search = search_states.saffron
    monkeypatch.setattr(search_states, "saffron", recorded)
    drawn = set()
    for batch in (0, 1, 4, 6):
        rows = search_states.search_batch(policy, mrm, REQUESTS, batch, (6, 7), 9, 12, seed=0)
        prompts, options, results = searches[-1]
        drawn.add((options.width, options.beta > 0, prompts[0].hide_prefill))
        assert {row["source"] for row in rows} == {7 if options.beta else 6}
        for (request, opening, held_out), prompt, result in zip(REQUESTS, prompts, results):
            mine = [row for row in rows if row["prompt"] == prompt.user]
            assert prompt.user == policy.tokenizer.encode(request)[-9:]
            assert all(row["held_out"] == held_out and row["hidden"] == prompt.hide_prefill
                       and row["prefill"] == prompt.prefill for row in mine)
            openings = search_states.OPENINGS if opening is None else [opening]
            assert any(policy.tokenizer.encode(text)[:len(prompt.prefill)] == prompt.prefill
                       for text in openings)
            before = [] if prompt.hide_prefill else prompt.prefill
            last, *others = [row["reply"] for row in mine]
            assert last == (before + result.tokens)[:12]
            visited = [(before + branch.tokens)[:12] for frontier in result.trace for branch in frontier]
            assert all(reply in visited for reply in others)
            assert len({tuple(row["reply"]) for row in mine}) == len(mine) <= (3 if options.width > 1 else 1)
    assert rows == search_states.search_batch(policy, mrm, REQUESTS, batch, (6, 7), 9, 12, seed=0)
    assert {width for width, _, _ in drawn} == {1, 4, 16}
    assert {beta for _, beta, _ in drawn} == {hidden for _, _, hidden in drawn} == {False, True}


def test_settings_of_batches():
    """Each combination once in 36 batches; a third has beta above 0, half hides the prefill."""
    drawn = [search_states.settings(batch, 5) for batch in range(36)]
    assert drawn == [search_states.settings(batch, 5) for batch in range(36, 72)]
    assert [[width for width, _, _ in drawn].count(width) for width in (1, 4, 16)] == [12] * 3
    assert sum(beta > 0 for _, beta, _ in drawn) == 12 and sum(hidden for *_, hidden in drawn) == 18
    assert len(set(drawn)) == 18                                        # beta 0 comes four times


def test_dropped_branches_are_no_beginnings_of_the_last_frontier():
    """And rather one of at least four tokens, where there is one."""
    def chain(tokens, parent):
        for token in tokens:
            parent = Branch(parent.tokens + [token], parent=parent)
        return parent
    start = chain([1, 2], Branch())
    winner = chain([3, 4, 5], start)
    loser = chain([6], winner.parent)
    short = chain([7], start)
    long = chain([8], short)
    trace = [[start.parent], [start], [winner.parent.parent, short], [winner.parent, long], [winner, loser]]
    for seed in range(5):
        chosen = search_states.visited(trace, 99, random.Random(seed))
        assert chosen == [winner.tokens, loser.tokens, long.tokens]
        cut = search_states.visited(trace, 4, random.Random(seed))      # here winner and loser are the same
        assert cut == [winner.tokens[:4], long.tokens]
    assert search_states.visited(trace[:3], 99, random.Random(0))[1:] == [short.tokens]
    assert search_states.visited([[start.parent], [start]], 99, random.Random(0)) == [start.tokens]


def test_the_search_reads_the_attacked_request_and_the_guard_the_one_that_was_asked(models):
    policy, guard, mrm = models
    rows = search_states.search_batch(policy, mrm, REQUESTS, 1, (6, 7), 64, 14, seed=0, attack="scramble")
    asked = [policy.tokenizer.encode(request) for request, _, _ in REQUESTS]
    assert {tuple(row["asked"]) for row in rows} == set(map(tuple, asked))
    assert all(row["prompt"] != row["asked"] for row in rows)
    row = max(rows, key=lambda row: len(row["reply"]))
    labels = script("safety_rewards").sibling_labels(policy, guard, row, 6, torch.Generator(), mrm)
    position, token, reward = labels[0]
    expected = guard.score(Prompt(row["asked"]), [row["reply"][:position] + [token]])
    assert reward == pytest.approx(expected.item(), abs=1e-4)


def test_siblings_of_a_search_are_those_that_m_likes_best_and_others(models):
    """At every third position after the prefill: the likeliest candidate first, M's four best, seven in all,
    with R of each."""
    policy, guard, mrm = models
    corpus = script("safety_rewards")
    rows = [row for batch in (1, 4)
            for row in search_states.search_batch(policy, mrm, REQUESTS, batch, (6, 7), 64, 14, seed=0)]
    assert {row["hidden"] for row in rows} == {False, True}
    for row in rows[::2]:
        labels = corpus.sibling_labels(policy, guard, row, 6, torch.Generator().manual_seed(0), mrm)
        assert labels == corpus.sibling_labels(policy, guard, row, 6, torch.Generator().manual_seed(0), mrm)
        positions = sorted({position for position, _, _ in labels})
        forced = 0 if row["hidden"] else len(row["prefill"])
        if len(row["reply"]) - forced >= 3:
            assert positions == list(range(positions[0], len(row["reply"]), 3))
            assert forced <= positions[0] < forced + 3
        for position in positions:
            reply = row["reply"][:position]
            before = row["prefill"] if row["hidden"] else []
            sequence = torch.tensor([policy.template(row["prompt"], before + reply)])
            p = policy.logits(policy(sequence)[0, -1]).softmax(-1)
            inside = [token for token in nucleus(p, 0.8).tolist() if not mrm.unseen[token]
                      and token not in policy.config.eos_token_ids]             # no reply ends so soon
            context = torch.tensor([mrm.template(row["prompt"], reply)])
            m = mrm.conservative_rewards(mrm.llama(context)[0, -1])
            tokens = [token for where, token, _ in labels if where == position]
            assert tokens[0] == inside[0] and len(tokens) == len(set(tokens)) == min(7, len(inside))
            assert set(sorted(inside, key=lambda token: -m[token])[:4]) <= set(tokens) <= set(inside)
        replies = [row["reply"][:position] + [token] for position, token, _ in labels]
        for reply, (_, _, reward) in zip(replies[::9], labels[::9]):
            sequence = torch.tensor([guard.template(row["prompt"], reply)])
            assert guard.reward(guard.llama(sequence)[0, -1]).item() == pytest.approx(reward, abs=1e-3)


def prepare(tiny, out, *options, run=run_script, mrm="mrm.safetensors"):
    """Runs data/safety_rewards/prepare.py on the tiny models, with search batches alone."""
    out.mkdir(exist_ok=True)
    chosen = ["--mrm", tiny / mrm] if mrm else []
    return run("data/safety_rewards/prepare.py", "--from", tiny, "--labels", tiny / "labels.jsonl",
               "--policy", tiny / "base", "--guard", tiny / "guard.safetensors", "--out", out,
               "--hh_replies", 0, "--policy_batches", 0, "--refused_batches", 0, "--ordinary_batches", 0,
               "--synthetic", 0, "--search_batches", 4, "--max_reply", 14, "--shards", 2, *chosen, *options)


@pytest.fixture(scope="module")
def corpus(tiny, tmp_path_factory):
    """The folder of a corpus of four search batches in two shards."""
    out = tmp_path_factory.mktemp("corpus")
    status, log, error = prepare(tiny, out)
    assert status == 0, error
    assert "search, beta 0: " in log and "siblings" in log
    return out


def replies(folder, tiny, targets=True):
    """What a training reads of a corpus, sorted."""
    examples = [e for part in read_rewards(folder, load_llama(tiny / "base")) for e in part]
    return sorted([e.source, e.context, e.reply] + [e.targets] * targets for e in examples)


@pytest.mark.slow
def test_a_corpus_of_searches(corpus, tiny, tmp_path):
    """The same whenever it is made, and its replies in any number of shards. Missing shards are made again.
    The metadata knows the MRM by its content."""
    training, held_out = read_rewards(corpus, load_llama(tiny / "base"))
    assert len(held_out) > 0
    assert sum(bool(e.siblings) for e in training) > len(training) / 2      # the others end with the prefill
    assert {e.source for e in training} <= {"search, beta 0", "search, beta above 0"}
    name = "corpus-01-of-02.safetensors"
    run = read_metadata(corpus / name)["run"]
    assert run["mrm"] == content_hash(tiny / "mrm.safetensors") and run["search_batches"] == 4
    shutil.copytree(corpus, tmp_path / "again")
    (tmp_path / "again" / name).unlink()
    status, log, _ = prepare(tiny, tmp_path / "again")
    assert status == 0 and "corpus-00-of-02.safetensors is there already" in log
    ours, again = load_file(corpus / name), load_file(tmp_path / "again" / name)
    assert ours.keys() == again.keys() and all(torch.equal(ours[key], again[key]) for key in ours)
    assert prepare(tiny, tmp_path / "one", "--shards", 1)[0] == 0
    assert replies(tmp_path / "one", tiny, targets=False) == replies(corpus, tiny, targets=False)
    shutil.copy(tiny / "other.safetensors", tmp_path)
    (tmp_path / "again" / name).unlink()
    status, _, error = prepare(tiny, tmp_path / "again", mrm="other.safetensors")
    assert status == 2 and error.count("\n") == 1 and "is of a run" in error and not (
        tmp_path / "again" / name).exists()


@pytest.mark.slow
def test_two_processes_search_as_one_does(corpus, tiny, tmp_path):
    status, _, error = prepare(tiny, tmp_path / "two", run=in_two_processes)
    assert status == 0, error
    for ours, theirs in zip(replies(corpus, tiny), replies(tmp_path / "two", tiny), strict=True):
        assert ours[:3] == theirs[:3] and ours[3] == pytest.approx(theirs[3], abs=1e-3)


@pytest.mark.parametrize("mrm, more, said", [
    (None, [], "--mrm PATH go together"), ("mrm.safetensors", ["--search_batches", 0], "go together"),
    ("guard.safetensors", [], "kind guard"), ("none.safetensors", [], "no such file"),
    ("mrm.safetensors", ["--policy", "data/smollm2", "--guard", "data/smollm2/guard.safetensors"],
     "vocabulary"), ("mrm.safetensors", ["--from", "data"], "test.jsonl.gz: no such file")])
def test_a_search_without_its_mrm_is_refused_before_the_work(tiny, tmp_path, mrm, more, said):
    status, out, error = prepare(tiny, tmp_path, *more, mrm=mrm)
    assert status == 2 and out == "" and error.count("\n") == 1 and said in error, error
    assert not list(tmp_path.iterdir())
