"""Training: batches, losses, resuming, measures. On the tiny golden models with a vocabulary made here."""

import json
import os
import shutil
import signal
import sys
import tracemalloc
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import GOLDEN, run_script, spelled, torchrun, write_tokenizer
from plumbing.checkpoint import load_llama
from safetensors.torch import load_file, save_file

import train_mrm
from plumbing.errors import BadInput
from plumbing.tokenizer import Template
from plumbing.adapters import read_metadata
from data.corpus import Example, collate, read_labels, read_rewards
from mrm import sibling_loss
from plumbing.parallel import place_among_processes
from plumbing.validate import auc, compare_siblings, predictions, validate_guard
from train_mrm import batches, guard_loss, mrm_loss
from plumbing.mixture import weigh

SHARD = "corpus-00-of-01.safetensors"


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """tiny_guard with a vocabulary of single bytes, as a folder that a run can use."""
    folder = tmp_path_factory.mktemp("base")
    shutil.copytree(GOLDEN / "tiny_guard", folder, dirs_exist_ok=True)
    write_tokenizer(folder, {b: b + 10 for b in range(256)}, {"<s>": 0, "<e>": 7}, bos="<s>")
    return folder


@pytest.fixture(scope="module")
def labels(tmp_path_factory):
    """Labelled replies of which a guard can learn something: those with an x are unsafe."""
    folder, generator = tmp_path_factory.mktemp("labels"), np.random.default_rng(0)
    for name, count in (("train", 60), ("val", 24)):
        rows = [{"source": "ab"[i % 2], "prompt": "p" * int(generator.integers(1, 5)),
                 "response": ("x" if i % 3 == 0 else "y") * int(generator.integers(2, 12)),
                 "unsafe": int(i % 3 == 0)} for i in range(count)]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture(scope="module")
def rewards(tmp_path_factory, base):
    """A corpus as data/safety_rewards writes it:
    the reward is +1 after a token 20..29 and -1 after 30..39."""
    folder, generator = tmp_path_factory.mktemp("rewards"), torch.Generator().manual_seed(0)
    lengths = torch.randint(3, 9, (40,), generator=generator)
    replies = torch.randint(20, 40, (int(lengths.sum()),), generator=generator, dtype=torch.int32)
    replies[0], replies[-1] = 90, 91            # 90 in a held-out reply only; 91 once in a training reply
    tensors = {"sources": torch.zeros(40, dtype=torch.uint8), "held_out": torch.arange(40) % 5 == 0,
               "prompts": torch.full((40,), 50, dtype=torch.int32),
               "prompt_lengths": torch.ones(40, dtype=torch.long),
               "replies": replies, "reply_lengths": lengths, "rewards": (replies < 30).float() * 2 - 1}
    vocabulary = load_llama(base).tokenizer.fingerprint
    template = load_llama(base).tokenizer.template("reward")
    metadata = {"vocabulary": vocabulary, "source_names": ["made"],
                "template": [template.prefix, template.infix]}
    metadata |= {"shards": 1, "run": {"seed": 0}}
    save_file(tensors, folder / SHARD, metadata={k: json.dumps(v) for k, v in metadata.items()})
    return folder


def copy_shard(source, target, tensors=None, **changes):
    """A shard with other tensors or metadata."""
    meta = read_metadata(source) | changes
    save_file(tensors or load_file(source), target, metadata={k: json.dumps(v) for k, v in meta.items()})


def run(monkeypatch, *options):
    monkeypatch.setattr(sys, "argv", ["train_mrm.py", *map(str, options)])
    train_mrm.main()


def options(objective, data, base, out, steps=60):
    return ["--objective", objective, "--data", data, "--base", base, "--out", out, "--steps", steps,
            "--rank", 4, "--first_layer", 0, "--batch_size", 6, "--lr", 0.02, "--eval_every", 20,
            "--log_every", 20]


@pytest.mark.parametrize("objective, precision", [
    ("guard", []), ("mrm", []), ("mrm", ["--dtype", "bfloat16"])])
def test_training_learns_and_resumes_bit_for_bit(objective, precision, request, base, tmp_path, monkeypatch,
                                                 capsys):
    data = request.getfixturevalue("labels" if objective == "guard" else "rewards")
    run(monkeypatch, *options(objective, data, base, tmp_path / "one.safetensors"), *precision)
    log = capsys.readouterr().out
    final = dict(pair.rsplit(" ", 1) for pair in log.strip().splitlines()[-1].split(": ", 1)[1].split(", "))
    if objective == "guard":
        assert float(final["auc a"]) > 0.95 and float(final["auc b at 12"]) > 0.95
    else:
        assert float(final["r2"]) > 0.8 and float(final["sign agreement"]) > 0.95
    # the same run, stopped at some step and resumed
    again = options(objective, data, base, tmp_path / "two.safetensors") + precision
    run(monkeypatch, *again, "--stop_after", 33)
    torch.manual_seed(999)                      # nothing may depend on the state of the process
    assert ((tmp_path / "two.safetensors.checkpoint.pt").exists()
            and not (tmp_path / "two.safetensors").exists())
    run(monkeypatch, *again, "--resume")
    one, two = load_file(tmp_path / "one.safetensors"), load_file(tmp_path / "two.safetensors")
    assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)
    assert {p.name for p in tmp_path.iterdir()} == {"one.safetensors", "two.safetensors"}


@pytest.mark.slow
def test_compiled_layers_learn_the_same(rewards, base, tmp_path, monkeypatch):
    """--compile traces the layers without a change to what they compute. (What C++ torch makes of that takes
    a minute, and is not looked at here.)"""
    compile_module = torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile",
                        lambda self, **how: compile_module(self, backend="aot_eager", **how))
    for name, more in (("plain", []), ("compiled", ["--compile"])):
        run(monkeypatch, *options("mrm", rewards, base, tmp_path / name, steps=4),
            "--dtype", "float64", *more)
    plain, compiled = load_file(tmp_path / "plain"), load_file(tmp_path / "compiled")
    assert all(torch.allclose(plain[name].double(), compiled[name].double(), atol=1e-6) for name in plain)


@pytest.mark.parametrize("min_count, seen", [(1, {7, 91, *range(20, 40)}), (2, {7, *range(20, 40)})])
def test_mrm_counts_supervised_tokens_as_seen(rewards, base, tmp_path, monkeypatch, min_count, seen):
    """Those of training replies, often enough, and end-of-sequence in any case."""
    run(monkeypatch, *options("mrm", rewards, base, tmp_path / "m.safetensors", steps=1),
        "--min_count", min_count)
    unseen = load_file(tmp_path / "m.safetensors")["unseen"]
    assert set((~unseen).nonzero().flatten().tolist()) == seen


def test_a_trained_mrm_under_another_mask(rewards, base, tmp_path, monkeypatch):
    """results/masks.py: with the count and weights of training the file is the same;
    the mask alone changes with others."""
    trained = tmp_path / "m.safetensors"
    weights = ["--weights", '{"made": 0.5}']
    run(monkeypatch, *options("mrm", rewards, base, trained, steps=1), "--min_count", 3, *weights)
    tensors = load_file(rewards / SHARD) | {"sibling_counts": torch.ones(40, dtype=torch.long)}
    tensors |= {"sibling_positions": torch.zeros(40).int(), "sibling_tokens": torch.full((40,), 60).int(),
                "sibling_rewards": torch.zeros(40)}
    (tmp_path / "data").mkdir()
    copy_shard(rewards / SHARD, tmp_path / "data" / SHARD, tensors)
    masks = {}
    for name, more in (("same", ["--min_count", 3, *weights]), ("none", ["--min_count", 0]),
                       ("once", ["--min_count", 1]), ("siblings", ["--min_count", 1, "--siblings"])):
        out = tmp_path / name
        status, log, err = run_script("results/masks.py", "--mrm", trained, "--base", base,
                                      "--data", tmp_path / "data", *more, "--out", out)
        assert (status, err) == (0, "") and read_metadata(out) == read_metadata(trained)
        before, after = load_file(trained), load_file(out)
        masks[name] = after.pop("unseen")
        assert all(torch.equal(before[key], value) for key, value in after.items())
        assert f"seen tokens: {int((~masks[name]).sum())} of" in log
    assert torch.equal(masks["same"], before["unseen"]) and not masks["none"].any()
    assert masks["once"][60] and (masks["siblings"] != masks["once"]).nonzero().tolist() == [[60]]


def test_resume_refuses_the_checkpoint_of_another_run(labels, base, tmp_path, monkeypatch):
    mine = options("guard", labels, base, tmp_path / "g.safetensors")
    run(monkeypatch, *mine, "--stop_after", 2)
    with pytest.raises(BadInput, match="--lr 0.02, not 0.5"):
        run(monkeypatch, *mine, "--lr", 0.5, "--resume")
    with pytest.raises(BadInput, match="no checkpoint"):
        run(monkeypatch, *options("guard", labels, base, tmp_path / "absent.safetensors"), "--resume")


def test_a_run_is_told_by_content_not_by_path(labels, base, tmp_path, monkeypatch):
    """The same base and data at another path go on; other weights, or another label, do not."""
    run(monkeypatch, *options("guard", labels, base, tmp_path / "g.safetensors"), "--stop_after", 2)
    shutil.copytree(base, tmp_path / "base")
    shutil.copytree(labels, tmp_path / "labels")
    moved = options("guard", tmp_path / "labels", tmp_path / "base", tmp_path / "g.safetensors")
    run(monkeypatch, *moved, "--stop_after", 3, "--resume")
    lines = (tmp_path / "labels" / "train.jsonl").read_text().splitlines()
    row = json.loads(lines[0])
    changed = [json.dumps(row | {"unsafe": 1 - row["unsafe"]}), *lines[1:]]
    (tmp_path / "labels" / "train.jsonl").write_text("\n".join(changed) + "\n")
    with pytest.raises(BadInput, match="is of a run with --data"):
        run(monkeypatch, *moved, "--resume")
    (tmp_path / "labels" / "train.jsonl").write_text("\n".join(lines) + "\n")
    tensors = load_file(tmp_path / "base" / "model.safetensors")
    halved = {name: tensor * 0.5 for name, tensor in tensors.items()}
    save_file(halved, tmp_path / "base" / "model.safetensors")
    with pytest.raises(BadInput, match="is of a run with --base"):
        run(monkeypatch, *moved, "--resume")


def test_a_loss_that_is_not_finite_stops_the_run(rewards, base, tmp_path, monkeypatch):
    data = load_file(rewards / SHARD)
    data["rewards"][:] = float("nan")
    copy_shard(rewards / SHARD, tmp_path / SHARD, data)
    with pytest.raises(SystemExit, match="step 0.*nan.*batch 0.*made"):
        run(monkeypatch, *options("mrm", tmp_path, base, tmp_path / "m.safetensors"))
    assert not (tmp_path / "m.safetensors").exists()


def test_a_corpus_of_another_vocabulary_is_refused(rewards, smollm2_folder, tmp_path, monkeypatch):
    with pytest.raises(BadInput, match="vocabulary"):
        run(monkeypatch, *options("mrm", rewards, smollm2_folder, tmp_path / "m.safetensors"))


def test_shards_are_read_as_one_corpus_or_not_at_all(rewards, base, tmp_path):
    llama, names = load_llama(base), ["corpus-00-of-02.safetensors", "corpus-01-of-02.safetensors"]
    for name in names:
        copy_shard(rewards / SHARD, tmp_path / name, shards=2)
    once, twice = read_rewards(rewards, llama), read_rewards(tmp_path, llama)
    assert [2 * part for part in once] == list(twice)
    copy_shard(rewards / SHARD, tmp_path / names[1], shards=2, run={"seed": 1})
    with pytest.raises(BadInput, match="seed': 1.*must be.*seed': 0"):
        read_rewards(tmp_path, llama)
    (tmp_path / names[1]).unlink()
    with pytest.raises(BadInput, match="found 1 shards.*expected 2"):
        read_rewards(tmp_path, llama)


@pytest.fixture(scope="module")
def corpora(rewards, tmp_path_factory):
    """Two corpora of one guard, the second one with other rewards, and `union`: their shards as one."""
    folder = tmp_path_factory.mktemp("corpora")
    run_of = {"seed": 0, "guard": "abc"}
    changed = load_file(rewards / SHARD)
    changed["rewards"] = changed["rewards"] * 2
    for name in ("one", "two", "union"):
        (folder / name).mkdir()
    copy_shard(rewards / SHARD, folder / "one" / SHARD, run=run_of)
    copy_shard(rewards / SHARD, folder / "two" / SHARD, changed, run=run_of | {"seed": 1})
    for i, name in enumerate(("one", "two")):
        copy_shard(folder / name / SHARD, folder / "union" / f"corpus-0{i}-of-02.safetensors", shards=2,
                   run=run_of)
    return folder


def test_several_corpora_are_read_as_one(corpora, base, tmp_path, monkeypatch):
    """The training on two folders is that on their union."""
    run(monkeypatch, *options("mrm", corpora / "union", base, tmp_path / "union", steps=8))
    run(monkeypatch, *options("mrm", corpora / "one", base, tmp_path / "two", steps=8),
        "--data", corpora / "one", corpora / "two")
    union, two = load_file(tmp_path / "union"), load_file(tmp_path / "two")
    assert union.keys() == two.keys() and all(torch.equal(union[name], two[name]) for name in union)


def test_corpora_of_two_guards_are_refused(corpora, labels, base, tmp_path, monkeypatch):
    copy_shard(corpora / "two" / SHARD, tmp_path / SHARD, run={"seed": 0, "guard": "xyz"})
    both = ["--data", corpora / "one", tmp_path]
    with pytest.raises(BadInput, match="guard xyz, but here it must be abc"):
        run(monkeypatch, *options("mrm", tmp_path, base, tmp_path / "m"), *both)
    copy_shard(corpora / "two" / SHARD, tmp_path / SHARD, vocabulary="xyz")
    with pytest.raises(BadInput, match="vocabulary xyz, but here it must be"):
        run(monkeypatch, *options("mrm", tmp_path, base, tmp_path / "m"), *both)
    with pytest.raises(BadInput, match="one folder for the guard"):
        run(monkeypatch, *options("guard", labels, base, tmp_path / "m"), "--data", labels, labels)
    assert {path.name for path in tmp_path.iterdir()} == {SHARD}


def test_training_starts_at_an_adapter(corpora, base, tmp_path, monkeypatch):
    """After a step with learning rate 0, the tensors are those of --init, and what it has seen stays seen.
    Tokens of the new data are seen too."""
    run(monkeypatch, *options("mrm", corpora / "one", base, tmp_path / "first", steps=5))
    first = load_file(tmp_path / "first")
    first["unseen"][:] = True
    first["unseen"][[7, 300]] = False                       # end-of-sequence, and one that is not in the data
    metadata = {key: json.dumps(value) for key, value in read_metadata(tmp_path / "first").items()}
    save_file(first, tmp_path / "init", metadata)
    again = options("mrm", corpora / "two", base, tmp_path / "second", steps=1)
    run(monkeypatch, *again, "--init", tmp_path / "init", "--lr", 0)
    second = load_file(tmp_path / "second")
    seen = set((~second.pop("unseen")).nonzero().flatten().tolist())
    assert seen == {7, 91, 300, *range(20, 40)}
    assert all(torch.equal(first[name], tensor) for name, tensor in second.items())
    run(monkeypatch, *again, "--init", tmp_path / "init")                       # and it is trained further
    trained = load_file(tmp_path / "second")
    assert not any(torch.equal(first[name], trained[name]) for name in second)


def test_an_initial_adapter_must_fit(corpora, labels, base, tmp_path, monkeypatch):
    """Its LoRA is what is asked for; and a run that is resumed had the same one, by its content."""
    run(monkeypatch, *options("mrm", corpora / "one", base, tmp_path / "first", steps=2))
    again = [*options("mrm", corpora / "two", base, tmp_path / "second", steps=4),
             "--init", tmp_path / "first"]
    for more, said in ((["--rank", 3], "rank 4, but here it is 3"), (["--alpha", 2], "alpha 16"),
                       (["--targets", "q_proj"], "targets"), (["--first_layer", 1], "first_layer 0")):
        with pytest.raises(BadInput, match=f"--init .*first was trained with the {said}"):
            run(monkeypatch, *again, *more)
    with pytest.raises(BadInput, match="kind mrm, but here it must be guard"):
        run(monkeypatch, *again, "--objective", "guard", "--data", labels)
    run(monkeypatch, *again, "--stop_after", 2)
    shutil.copy(tmp_path / "first", tmp_path / "moved")
    run(monkeypatch, *again, "--init", tmp_path / "moved", "--stop_after", 3, "--resume")
    run(monkeypatch, *options("mrm", corpora / "one", base, tmp_path / "moved", steps=3))
    with pytest.raises(BadInput, match="is of a run with --init [0-9a-f]{12}, not [0-9a-f]{12}"):
        run(monkeypatch, *again, "--init", tmp_path / "moved", "--resume")
    with pytest.raises(BadInput, match="is of a run with --init [0-9a-f]{12}, not None"):
        run(monkeypatch, *again[:-2], "--resume")


# ------------------------------------------------------------------------------------------------------------
# several processes

def loss_curve(log):
    return [float(line.split("loss ")[1].split(",")[0]) for line in log.splitlines() if "loss " in line]


def test_only_torchrun_starts_several_processes(monkeypatch):
    """A scheduler may set RANK for a process that runs alone."""
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    assert place_among_processes(SimpleNamespace(device="cpu")) == (0, 1)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "one")
    assert place_among_processes(SimpleNamespace(device="cpu")) == (1, 4)


@pytest.mark.slow
@pytest.mark.parametrize("objective", ["guard", "mrm"])
def test_two_processes_learn_what_one_does(objective, request, base, tmp_path, monkeypatch, capsys):
    """At the same batch size, in float64; also one process that takes each batch in pieces. Batches of 7 and
    the shorter last ones of an epoch cannot be shared evenly."""
    data = request.getfixturevalue("labels" if objective == "guard" else "rewards")
    some = lambda name: [*options(objective, data, base, tmp_path / name, steps=16), "--batch_size", 7,
                         "--dtype", "float64", "--log_every", 1, "--eval_every", 99]
    run(monkeypatch, *some("one.safetensors"))
    one = loss_curve(capsys.readouterr().out)
    run(monkeypatch, *some("pieces.safetensors"), "--accumulate", 3)
    pieces = loss_curve(capsys.readouterr().out)
    process = torchrun("train_mrm.py", *some("two.safetensors"), "--accumulate", 2)
    out, error = process.communicate(timeout=120)
    assert process.returncode == 0, error
    assert len(one) == 16 and one[-1] < one[0]
    assert pieces == pytest.approx(one, rel=1e-5) and loss_curve(out) == pytest.approx(one, rel=1e-5)
    weights = [load_file(tmp_path / f"{name}.safetensors") for name in ("one", "pieces", "two")]
    for other in weights[1:]:
        for name, tensor in weights[0].items():
            torch.testing.assert_close(other[name], tensor, atol=1e-5, rtol=1e-3)  # LoRA is stored in float16
    assert out.count("wrote") == 1                                                      # one process writes


@pytest.mark.slow
def test_a_killed_process_ends_the_run_which_can_be_resumed(rewards, base, tmp_path):
    mine = [*options("mrm", rewards, base, tmp_path / "m.safetensors", steps=2000),
            "--log_every", 1, "--eval_every", 5]
    process = torchrun("train_mrm.py", *mine)
    for line in process.stdout:                                                 # until there is a checkpoint
        if line.startswith("step 7:"):
            break
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    os.kill(int(children[1]), signal.SIGKILL)
    _, error = process.communicate(timeout=120)
    assert process.returncode != 0 and "--resume goes on from the last checkpoint" in error, error
    assert {p.name for p in tmp_path.iterdir()} == {"m.safetensors.checkpoint.pt"}
    process = torchrun("train_mrm.py", *mine, "--resume", "--stop_after", 20)
    out, error = process.communicate(timeout=120)
    steps = [int(line.split(":")[0].split()[1]) for line in out.splitlines() if "loss" in line]
    assert process.returncode == 0 and steps == list(range(steps[0], 21)) and steps[0] > 5, error


def test_a_malformed_label_is_named_by_its_line(labels, base, tmp_path):
    text = (labels / "train.jsonl").read_text().splitlines()
    text[4] = '{"source": "a", "prompt": "p"}'
    (tmp_path / "train.jsonl").write_text("\n".join(text))
    with pytest.raises(BadInput, match="line 5.*response"):
        read_labels(tmp_path / "train.jsonl", load_llama(base), 8, 8)
    status, _, error = run_script("train_mrm.py",
                                  *options("guard", tmp_path, base, tmp_path / "g.safetensors"))
    assert status == 2 and error.count("\n") == 1 and "line 5" in error


def test_labels_become_tokens(labels, base):
    llama = load_llama(base)
    example = read_labels(labels / "train.jsonl", llama, 3, 8)[0]
    assert spelled(llama.tokenizer, example.context).startswith("<s>\n\nUser:p")
    assert len(example.reply) <= 8 and example.targets == [1.0] * len(example.reply)
    assert all(e.reply[-1] == 7 for e in read_labels(labels / "train.jsonl", llama, 3, 99))  # it ends there


def test_long_texts_are_cut(base, tmp_path):
    row = {"source": "a", "prompt": "abcdef", "response": "uvwxyz", "unsafe": 0}
    (tmp_path / "train.jsonl").write_text(json.dumps(row))
    llama = load_llama(base)
    example, = read_labels(tmp_path / "train.jsonl", llama, 3, 4)
    text = lambda tokens: spelled(llama.tokenizer, tokens)
    assert text(example.context) == "<s>\n\nUser:def\n\nAgent:" and text(example.reply) == "uvwx"


def test_a_prefill_is_unsafe_whatever_follows(base, tmp_path):
    row = {"source": "a", "prompt": "p", "prefill": "uvw", "response": "xyz", "unsafe": 0}
    (tmp_path / "train.jsonl").write_text(json.dumps(row))
    llama = load_llama(base)
    whole, = read_labels(tmp_path / "train.jsonl", llama, 3, 99)
    assert spelled(llama.tokenizer, whole.reply) == "uvwxyz<e>" and whole.targets == [1.0] * 3 + [0.0] * 4
    cut, = read_labels(tmp_path / "train.jsonl", llama, 3, 5)
    assert cut.reply == whole.reply[:5] and cut.targets == whole.targets[:5]


def test_the_sibling_loss_sees_differences_only(tiny_mrm):
    """It is the squared error of what is left when each prefix' mean is taken out, of M and of R."""
    torch.manual_seed(0)
    hidden, children = torch.randn(7, 48, dtype=torch.float64), torch.randint(512, (7,))
    rewards, prefixes = torch.randn(7, dtype=torch.float64), torch.tensor([0, 0, 0, 1, 1, 2, 2])
    m = tiny_mrm.child_rewards(hidden, children)
    expected = []
    for prefix in range(3):
        mine = prefixes == prefix
        expected += (((m[mine] - m[mine].mean()) - (rewards[mine] - rewards[mine].mean())) ** 2).tolist()
    loss = sibling_loss(tiny_mrm, hidden, children, rewards, prefixes)
    assert loss.item() == pytest.approx(np.mean(expected), abs=1e-12)
    shifted = rewards + torch.tensor([5.0, -3.0, 8.0], dtype=torch.float64)[prefixes]
    assert (sibling_loss(tiny_mrm, hidden, children, shifted, prefixes).item()
            == pytest.approx(loss.item(), abs=1e-9))


def test_siblings_in_a_batch_are_those_of_the_sequences_alone(tiny_mrm):
    """mrm_loss with siblings against M(s) in full, read off prefix by prefix;
    weight 0 is the paper's loss."""
    one = Example("s", [1, 2], [30, 31, 32], [0.5, -1.0, 2.0],
                  [(0, 40, 1.0), (0, 41, 0.0), (2, 42, -1.0), (2, 43, 0.5)])
    two = Example("s", [1, 2, 3], [33], [0.1], [(0, 44, 1.0), (0, 45, 2.0)])
    batch = collate([one, two], "cpu")
    errors = []
    for e in (one, two):
        for position in sorted({p for p, _, _ in e.siblings}):
            m = tiny_mrm.next_rewards(tiny_mrm.llama(torch.tensor([e.context + e.reply[:position]]))[0, -1])
            pairs = np.array([(m[token].item(), reward) for p, token, reward in e.siblings if p == position])
            errors += ((pairs[:, 0] - pairs[:, 0].mean()) - (pairs[:, 1] - pairs[:, 1].mean())).tolist()
    paper = mrm_loss(tiny_mrm, batch)
    assert paper == mrm_loss(tiny_mrm, batch, 0.0)
    assert (mrm_loss(tiny_mrm, batch, 3.0) - paper).item() == pytest.approx(
        3 * np.mean(np.square(errors)), abs=1e-9)


def test_siblings_are_compared_as_the_docstring_says():
    """A perfect M, a constant one, and one that is always wrong."""
    r = [(0, 5, 1.0), (0, 6, 3.0), (0, 7, 2.0), (4, 5, 0.0), (4, 6, -1.0)]
    theirs = np.array([x for _, _, x in r])
    perfect, constant, wrong = (compare_siblings([(r, m)])
                                for m in (theirs + np.array([9, 9, 9, 0, 0]), theirs * 0, -theirs))
    assert perfect["within r2"] == 1 and perfect["rank"] == 1 and perfect["regret"] == 0
    assert constant["within r2"] == 0 and constant["regret"] == constant["of the likeliest"] == (2 + 0) / 2
    assert wrong["rank"] == -1 and wrong["regret"] == (2 + 1) / 2 and wrong["within r2"] == -3
    assert (perfect["of a random sibling"] == (1 + 0.5) / 2 and perfect["siblings"] == 5
            and compare_siblings([([], [])]) == {})


def test_training_on_siblings_tells_them_apart(rewards, base, tmp_path, monkeypatch, capsys):
    """Of a corpus where only the next token matters, in any number of processes' pieces the same."""
    tensors = load_file(rewards / SHARD)
    lengths = tensors["reply_lengths"]
    tokens = torch.tensor([25, 35, 27, 33] * len(lengths), dtype=torch.int32)
    tensors |= {"sibling_counts": torch.full_like(lengths, 4),
                "sibling_positions": torch.ones(len(tokens), dtype=torch.int32),
                "sibling_tokens": tokens, "sibling_rewards": (tokens < 30).float() * 2 - 1}
    (tmp_path / "data").mkdir()
    copy_shard(rewards / SHARD, tmp_path / "data" / SHARD, tensors)
    finals = []
    for name, more in (("one", []), ("two", ["--accumulate", 2])):
        run(monkeypatch, *options("mrm", tmp_path / "data", base, tmp_path / f"{name}.safetensors"), *more)
        log = capsys.readouterr().out
        assert "128 siblings" in log
        finals.append(dict(pair.rsplit(" ", 1)
                           for pair in log.strip().splitlines()[-1].split(": ", 1)[1].split(", ")))
    assert (float(finals[0]["within r2"]) > 0.8
            and float(finals[0]["regret"]) < 0.1 < float(finals[0]["of a random sibling"]))
    assert float(finals[1]["within r2"]) == pytest.approx(float(finals[0]["within r2"]), abs=0.05)


def examples(lengths):
    return [Example("s", [1] * 3, [2] * n, [0.0] * n) for n in lengths]


def test_batches_hold_every_example_once_and_of_like_length():
    data = examples(torch.randint(1, 60, (500,), generator=torch.Generator().manual_seed(0)).tolist())
    order = batches(data, 8, seed=3)
    assert sorted(map(id, (e for batch in order for e in batch))) == sorted(map(id, data))
    assert order == batches(data, 8, seed=3) != batches(data, 8, seed=4)
    spread = np.mean([max(len(e.reply) for e in b) - min(len(e.reply) for e in b) for b in order])
    assert spread < 5                                                               # of 59: little padding


def test_weights_repeat_and_thin_out():
    data = [Example(source, [], [], []) for source in "aaaaabbbb"]
    count = lambda weights: {s: sum(e.source == s for e in weigh(data, weights)) for s in "ab"}
    assert count({}) == {"a": 5, "b": 4} and count({"a": 2, "b": 0.5}) == {"a": 10, "b": 2}
    with pytest.raises(BadInput, match="names c, but"):
        weigh(data, {"c": 1})


def test_the_state_before_a_token_predicts_the_reward_after_it(tiny_mrm):
    """mrm_loss against M(s) in full, read off position by position."""
    e = Example("s", [0, 21, 30], [100, 101, 102], [0.5, -1.0, 2.0])
    tokens = e.context + e.reply
    naive = sum((tiny_mrm.next_rewards(tiny_mrm.llama(torch.tensor([tokens[:j]]))[0, -1])[tokens[j]] - r) ** 2
                for j, r in zip(range(3, 6), e.targets)) / 3
    torch.testing.assert_close(mrm_loss(tiny_mrm, collate([e], "cpu")), naive, atol=1e-10, rtol=0)


@pytest.mark.parametrize("kind", ["guard", "mrm"])
def test_padding_changes_no_loss(kind, tiny_guard, tiny_mrm):
    """The loss of a batch is the mean over its reply tokens, whatever the other lengths are."""
    from mrm import Guard
    torch.manual_seed(0)
    model, loss = (Guard(tiny_guard, None), guard_loss) if kind == "guard" else (tiny_mrm, mrm_loss)
    if kind == "guard":
        torch.nn.init.normal_(model.head.weight)
    data = [Example("s", [0, 21, 30 + i], list(range(100, 102 + 3 * i)), [1.0 * (i % 2)] * (2 + 3 * i))
            for i in range(4)]
    together = loss(model, collate(data, "cpu"))
    apart = sum(loss(model, collate([e], "cpu")) * len(e.reply) for e in data)
    torch.testing.assert_close(together, apart / sum(len(e.reply) for e in data), atol=1e-10, rtol=0)


def test_predictions_come_in_the_order_of_the_examples(tiny_guard):
    from mrm import Guard
    guard = Guard(tiny_guard, Template([0], [5]))
    torch.nn.init.normal_(guard.head.weight)
    data = [Example("s", [0, 5], list(range(60, 60 + n)), [0.0] * n) for n in (9, 2, 7, 4)]
    for example, values in zip(data, predictions(guard, data, "cpu", size=3)):
        hidden = tiny_guard(torch.tensor([example.context + example.reply]))[0, 2:]
        np.testing.assert_allclose(values, guard.reward(hidden).detach(), atol=1e-5)


def test_a_guard_is_validated_by_the_worst_label_of_each_source():
    """Unsafe replies stand against all others; where there are none, needless refusals against answers."""
    class Constant(torch.nn.Module):            # R of a sequence: its first reply token
        kind = "guard"

        def llama(self, tokens):
            return tokens[..., None].float()

        def reward(self, hidden):
            return hidden.squeeze(-1)
    reply = lambda source, reward, label: Example(source, [0], [reward], [label])
    report = validate_guard(Constant(), [reply("a", 3, 0.0), reply("a", 2, 0.2), reply("a", 1, 1.0),
                                         reply("b", 1, 0.0), reply("b", 2, 0.2)], "cpu")
    assert report["auc a"] == 1.0 and report["auc b"] == 0.0


def test_auc_is_the_share_of_pairs_in_the_right_order():
    generator = np.random.default_rng(0)
    scores, labels = generator.integers(0, 6, 80), generator.random(80) < 0.4
    pairs = [(a > b) + (a == b) / 2 for a in scores[labels] for b in scores[~labels]]
    assert auc(scores, labels) == pytest.approx(np.mean(pairs))
    assert auc([1, 2, 3], [0, 0, 1]) == 1 and auc([1, 1], [0, 1]) == 0.5
    tracemalloc.start()
    assert auc(np.arange(50_000), np.arange(50_000) % 2) == pytest.approx(0.5, abs=1e-4)
    assert tracemalloc.get_traced_memory()[1] < 100e6                   # the matrix of all pairs takes 5 GB
    tracemalloc.stop()


def test_smoothed_labels_bound_the_reward(tiny_guard):
    """The best constant reward of safe replies is log(0.98 / 0.02),
    of unsafe ones minus that: not infinity."""
    from mrm import Guard
    guard = Guard(tiny_guard, None)
    for label, best in ((0.0, 3.89), (1.0, -3.89)):
        batch = collate([Example("s", [0, 5], [60, 61], [label] * 2)], "cpu")
        losses = []
        for reward in (best - 0.5, best, best + 0.5):
            torch.nn.init.constant_(guard.head.bias, reward)            # the head's weight is zero
            losses.append(guard_loss(guard, batch).item())
        assert losses[1] < min(losses[0], losses[2])
