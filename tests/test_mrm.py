"""Reward models: the loss is partial supervision, only the adapter learns, M_cons forbids,
adapters fit or are refused."""

import copy
import json
import math
import shutil
from dataclasses import replace

import pytest
import torch
from conftest import GOLDEN, paper
from safetensors import safe_open
from safetensors.torch import save_file
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import mrm as mrm_module
import plumbing.adapters as adapters_module
import plumbing.released as released_module
from data.corpus import Batch, Example, collate
from plumbing.errors import BadInput
from plumbing.tokenizer import Prompt, Template
from model import Llama
from mrm import MRM, PROJECTIONS, add_lora, Guard, LoRALinear, partial_supervision_loss
from mrm import trained_tensors, unseen_tokens
from plumbing.adapters import check_lora, load_adapter, save_adapter
from plumbing.released import load_released_mrm
from plumbing.fast import speed_up
from plumbing.shared import SharedPass
from search import saffron
from trie_cache import TrieCache, compute

TARGETS = ["q_proj", "v_proj"]


def randomized(reward_model, seed=0):
    """Give every trained tensor values as if it had been trained."""
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in trained_tensors(reward_model).items():
        if tensor.is_floating_point():
            tensor.data = torch.randn(tensor.shape, generator=generator, dtype=tensor.dtype) / 10
        else:
            tensor[::5] = True
    return reward_model


@pytest.fixture
def new_mrm(tiny_guard):
    return randomized(MRM(add_lora(tiny_guard, 4, 8, TARGETS), Template([0, 21], [22, 23])))


@pytest.fixture
def new_guard(tiny_guard):
    return randomized(Guard(add_lora(tiny_guard, 4, 8, TARGETS, first_layer=1), Template([0, 21], [22, 23])))


@pytest.mark.exercise(5, points=2)
def test_loss_equals_the_naive_one(new_mrm):
    """Against M(s) in full, [positions, vocab],
    of which the entry of the token that is really there is picked."""
    tokens = torch.randint(0, 512, (3, 15), generator=torch.Generator().manual_seed(1))
    rewards = torch.randn(3, 14, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    hidden = new_mrm.llama(tokens)[:, :-1]                              # h(s[0:j]) for j = 1..14
    full = new_mrm.next_rewards(hidden)                                      # [3, 14, 512]
    naive = sum((full[i, j, tokens[i, j + 1]] - rewards[i, j]) ** 2
                for i in range(3) for j in range(14)) / (3 * 14)
    loss = partial_supervision_loss(new_mrm, hidden.flatten(0, 1), tokens[:, 1:].flatten(), rewards.flatten())
    torch.testing.assert_close(loss, naive, atol=1e-12, rtol=1e-12)


class Operations(TorchDispatchMode):
    """Counts the operations on tensors, and the numbers of the largest result that is no view of the
    weights."""

    def __init__(self, weights):
        super().__init__()
        self.count = self.largest = 0
        self.weights = weights.untyped_storage().data_ptr()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        self.count += 1
        if isinstance(result, torch.Tensor) and result.untyped_storage().data_ptr() != self.weights:
            self.largest = max(self.largest, result.numel())
        return result


@pytest.mark.exercise(5, points=2)
def test_loss_computes_one_entry_for_each_position(new_mrm, monkeypatch):
    """Never M(s) for the whole vocabulary, which in training would be [positions, vocab]; and without a loop
    over positions: 64 of them take no more operations than 4."""
    monkeypatch.setattr(new_mrm.llama, "logits", lambda hidden: pytest.fail("all of M(s) was computed"))
    monkeypatch.setattr(new_mrm, "next_rewards", lambda hidden: pytest.fail("all of M(s) was computed"))
    hidden, children = torch.randn(7, 48, dtype=torch.float64), torch.tensor([1, 5, 1, 400, 0, 511, 5])
    with FlopCounterMode(display=False) as counter:
        entries = new_mrm.child_rewards(hidden, children)
    assert counter.get_total_flops() <= 2 * 7 * 48, "a product of hidden states with other tokens' rows too"
    assert entries.shape == (7,)
    rewards = entries.detach() + 2
    # a mean of squares:
    assert partial_supervision_loss(new_mrm, hidden, children, rewards).item() == pytest.approx(4)
    new_mrm.bias.data += 1
    torch.testing.assert_close(new_mrm.child_rewards(hidden, children), entries + 1)
    new_mrm.bias.data.zero_(), new_mrm.gain.data.zero_()
    entries = new_mrm.child_rewards(hidden, children)
    assert entries.abs().max() == 0, "the product is times the gain"
    hidden, children = torch.randn(64, 48, dtype=torch.float64), torch.arange(64)
    rewards = torch.ones(64, dtype=torch.float64)
    weights = new_mrm.llama.lm_head.weight
    for function in (lambda n: new_mrm.child_rewards(hidden[:n], children[:n]),
                     lambda n: partial_supervision_loss(new_mrm, hidden[:n], children[:n], rewards[:n])):
        with Operations(weights) as few:
            function(4)
        with Operations(weights) as many:
            function(64)
        assert many.count == few.count, "a loop over positions"
        assert many.largest <= hidden.numel(), "more than one product for each position was computed"


@pytest.mark.exercise(5, points=1)
def test_gradient_touches_the_adapter_only(new_mrm):
    tokens = torch.randint(0, 512, (2, 9), generator=torch.Generator().manual_seed(1))
    hidden = new_mrm.llama(tokens)[:, :-1].flatten(0, 1)
    children = tokens[:, 1:].flatten()
    partial_supervision_loss(new_mrm, hidden, children, torch.ones(16, dtype=torch.float64)).backward()
    touched = {name for name, p in new_mrm.named_parameters()
               if p.grad is not None and p.grad.abs().sum() > 0}
    assert touched == {name for name in trained_tensors(new_mrm) if name != "unseen"}
    assert {name.split(".")[-1] for name in touched} == {"lora_A", "lora_B", "gain", "bias"}


@pytest.mark.exercise(5, points=1)
def test_the_bias_of_an_unseen_token_does_not_learn(new_mrm):
    """The paper's Proposition 1 (Eq. 6): the biases of tokens that never follow anything do not learn,
    all others do."""
    tokens = torch.randint(0, 512, (2, 9), generator=torch.Generator().manual_seed(1))
    hidden = new_mrm.llama(tokens)[:, :-1].flatten(0, 1)
    children = tokens[:, 1:].flatten()
    partial_supervision_loss(new_mrm, hidden, children,
                             torch.full((16,), 9.0, dtype=torch.float64)).backward()
    assert set(new_mrm.bias.grad.nonzero().flatten().tolist()) == set(children.tolist())


def example(context, reply, targets, siblings=()):
    return Example("s", context, reply, targets, list(siblings))


@pytest.mark.exercise(5, points=2)
def test_a_batch_has_each_reply_token_with_its_reward():
    """Of replies and contexts of unequal lengths: padded on the right, in the order of the examples."""
    one, two = example([1, 2], [30, 31, 32], [0.5, -1.0, 2.0]), example([3, 4, 5, 6, 7], [33], [0.25])
    three = example([8], [34, 35], [-3.0, 4.0])
    batch = collate([one, two, three], "cpu")
    assert batch.tokens.shape == (3, 6) and batch.tokens.dtype == torch.long
    assert batch.tokens.tolist() == [[1, 2, 30, 31, 32, 0], [3, 4, 5, 6, 7, 33], [8, 34, 35, 0, 0, 0]], (
        "a context, its reply, then padding")
    assert batch.targets.is_floating_point() and batch.rows.dtype == batch.columns.dtype == torch.long
    assert list(zip(batch.rows.tolist(), batch.columns.tolist(), batch.targets.tolist())) == [
        (0, 2, 0.5), (0, 3, -1.0), (0, 4, 2.0), (1, 5, 0.25), (2, 1, -3.0), (2, 2, 4.0)]
    assert batch.tokens[batch.rows, batch.columns].tolist() == [30, 31, 32, 33, 34, 35]


@pytest.mark.exercise(5, points=2)
def test_siblings_go_with_the_token_before_them():
    """A sibling at position p could follow reply[:p]; those of one prefix share a number, others do not: of
    another example (with the same tokens too), or where one of another prefix stands between two of the
    same."""
    one = example([1, 2], [30, 31, 32], [0.0] * 3, [(0, 40, 1.0), (2, 42, -1.0), (0, 41, 0.5), (2, 43, 2.0)])
    two = example([3, 4, 5], [33, 34], [0.0] * 2)
    three = example([1, 2], [30, 36], [0.0] * 2, [(2, 44, 0.25), (2, 40, -0.5), (0, 45, 3.0)])
    batch = collate([one, two, three], "cpu")
    assert batch.sibling_rows.tolist() == [0, 0, 0, 0, 2, 2, 2]
    assert batch.sibling_columns.tolist() == [1, 3, 1, 3, 3, 3, 1], (
        "a sibling's column is that of the last token of its prefix")
    assert batch.tokens[batch.sibling_rows, batch.sibling_columns].tolist() == [2, 31, 2, 31, 36, 36, 2]
    assert batch.sibling_tokens.tolist() == [40, 42, 41, 43, 44, 40, 45]
    assert batch.sibling_rewards.tolist() == [1.0, -1.0, 0.5, 2.0, 0.25, -0.5, 3.0]
    assert batch.sibling_prefixes.tolist() == [0, 1, 0, 1, 2, 2, 3]
    none = collate([two], "cpu")
    assert len(none.sibling_rows) == len(none.sibling_tokens) == len(none.sibling_prefixes) == 0
    assert none.sibling_rows.dtype == none.sibling_columns.dtype == torch.long, "ints, though none is there"
    assert none.tokens[none.sibling_rows, none.sibling_columns].shape == (0,)


@pytest.mark.exercise(5, points=2)
def test_the_state_before_a_token_goes_with_the_reward_after_it():
    """Of a batch made by hand, whose state at row i and column t is (i, t): no token's own state."""
    tokens = torch.tensor([[1, 2, 30, 31, 0], [3, 4, 5, 32, 33]])
    rows, columns = torch.tensor([0, 0, 1, 1]), torch.tensor([2, 3, 3, 4])
    targets, none = torch.tensor([0.5, -1.0, 2.0, 3.0]), torch.zeros(0, dtype=torch.long)
    batch = Batch(tokens, rows, columns, targets, none, none, none, none, none)
    hidden = torch.stack(torch.meshgrid(torch.arange(2), torch.arange(5), indexing="ij"), dim=-1)  # (2, 5, 2)
    before, children, rewards = batch.supervised(hidden)
    assert before.tolist() == [[0, 1], [0, 2], [1, 2], [1, 3]], "h(s[0:j]) is the state of token j - 1"
    assert children.tolist() == [30, 31, 32, 33] and rewards.tolist() == targets.tolist()


def test_lora_starts_at_the_base_model_and_shares_its_weights(tiny_guard):
    lora = add_lora(tiny_guard, 4, 8, TARGETS, first_layer=1)
    tokens = torch.arange(10)[None]
    assert torch.equal(lora(tokens), tiny_guard(tokens))                # B = 0
    assert lora.model.embed_tokens.weight is tiny_guard.model.embed_tokens.weight
    assert [sum(isinstance(m, LoRALinear) for m in block.modules()) for block in lora.model.layers] == [0, 2]
    assert not any(isinstance(m, LoRALinear) for m in tiny_guard.modules())


def test_lora_is_a_change_of_the_weight(tiny_guard, new_mrm):
    """W + (alpha / r) B A, written into a model that has no LoRA, gives the same states."""
    plain = copy.deepcopy(tiny_guard)
    for block, adapted in zip(plain.model.layers, new_mrm.llama.model.layers):
        for name in TARGETS:
            lora = getattr(adapted.self_attn, name)
            getattr(block.self_attn, name).weight.data += 8 / 4 * lora.lora_B @ lora.lora_A
    tokens = torch.arange(10)[None]
    torch.testing.assert_close(new_mrm.llama(tokens), plain(tokens), atol=1e-12, rtol=0)
    assert not torch.allclose(plain(tokens), tiny_guard(tokens))


def test_one_pass_of_a_backbone_reads_for_all(tiny_guard, new_mrm, new_guard):
    """Base model, MRM and guard, with LoRA of other ranks in other layers: the states of each alone."""
    other = randomized(Guard(add_lora(tiny_guard, 2, 5, ["gate_proj", "o_proj"]), None), seed=1)
    llamas = [tiny_guard, new_mrm.llama, new_guard.llama, other.llama]
    tries = [TrieCache(llama) for llama in llamas + llamas[1:2]]
    sequences = [[5, 6, 7, 8], [5, 6, 9], [1], [2, 3], [4, 4, 4]]
    nodes = [trie.insert(trie.root, sequence) for trie, sequence in zip(tries, sequences)]
    compute(SharedPass(llamas), tries)
    for trie, node, sequence in zip(tries, nodes, sequences):
        expected = trie.model(torch.tensor([sequence]))[:, -1]
        torch.testing.assert_close(trie.hidden_at([node]), expected, atol=1e-12, rtol=0)


@pytest.mark.parametrize("targets", [["k_proj"], ["v_proj", "up_proj"], ["gate_proj", "o_proj"], PROJECTIONS])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-12), (torch.float32, 2e-5),
                                              (torch.bfloat16, 0.2)])
@pytest.mark.parametrize("kind", [{}, {"qkv_bias": True}, {"qk_norm": True}])
def test_joined_and_packed_products_change_nothing(tiny_guard, targets, dtype, tolerance, kind):
    """Policy and MRM, both with LoRA, in one pass and each alone, against the plain layers of model.py, which
    gradients ask for: with a bias on q, k, v (Qwen2), and with norms of q and k (Qwen3)."""
    torch.manual_seed(0)
    base = speed_up(Llama(replace(tiny_guard.config, **kind)).to(dtype))
    llamas = [add_lora(base, 3, 6, ["v_proj"]), add_lora(base, 2, 5, targets, first_layer=1)]
    for name, p in [pair for llama in llamas for pair in llama.named_parameters()]:
        if "lora_B" in name or name.endswith("bias"):
            torch.nn.init.normal_(p, std=0.1)
    for shared in (SharedPass(llamas), None):
        tries = [TrieCache(llama) for llama in llamas]
        sequences = [[5, 6, 7], [1, 2]]
        nodes = [trie.insert(trie.root, sequence) for trie, sequence in zip(tries, sequences)]
        for trie in tries:
            compute(shared or trie.model, tries if shared else [trie])
        for trie, node, sequence in zip(tries, nodes, sequences):
            plain = trie.model(torch.tensor([sequence]))[0, -1:].detach()
            torch.testing.assert_close(trie.hidden_at([node]), plain, atol=tolerance, rtol=tolerance)


@pytest.mark.exercise(6, points=3)
def test_unseen_tokens_are_those_that_stand_too_seldom_in_the_replies(tiny_guard):
    """Each occurrence counts, in whichever reply; as many as min_count are enough. The ends of a sequence
    (here 7 and 11) are never unseen."""
    config = replace(tiny_guard.config, eos_token_ids=(7, 11))
    replies = [[20, 20, 30, 7], [20, 30, 40], [50]]
    for min_count, seen in ((1, {7, 11, 20, 30, 40, 50}), (2, {7, 11, 20, 30}), (3, {7, 11, 20}),
                            (4, {7, 11})):
        unseen = unseen_tokens(replies, config, min_count)
        assert unseen.shape == (512,) and unseen.dtype == torch.bool
        assert set((~unseen).nonzero().flatten().tolist()) == seen, f"min_count {min_count}"
    assert set((~unseen_tokens(replies, config)).nonzero().flatten().tolist()) == {7, 11, 20, 30, 40, 50}
    assert set((~unseen_tokens([[]], config)).nonzero().flatten().tolist()) == {7, 11}
    distinct = {tuple(reply): reply for reply in replies}                   # train_mrm.py gives such a view
    assert torch.equal(unseen_tokens(distinct.values(), config, 2), unseen_tokens(replies, config, 2))


@pytest.mark.exercise(6, points=2)
def test_conservative_rewards_forbid_unseen_tokens_only(new_mrm):
    hidden = new_mrm.llama(torch.arange(6)[None])[0]
    for some in (hidden, hidden[0], hidden.reshape(2, 3, -1)):              # any number of leading dimensions
        free, cons = new_mrm.next_rewards(some), new_mrm.conservative_rewards(some)
        expected = [[-math.inf if unseen else value for value, unseen in zip(row, new_mrm.unseen.tolist())]
                    for row in free.reshape(-1, 512).tolist()]
        torch.testing.assert_close(cons, torch.tensor(expected, dtype=cons.dtype).view(free.shape),
                                   atol=0, rtol=0)
    assert new_mrm.unseen.any() and not new_mrm.unseen.all()
    new_mrm.unseen[:] = False
    assert torch.equal(new_mrm.conservative_rewards(hidden), new_mrm.next_rewards(hidden))


def test_one_pass_of_the_guard_scores_every_prefix(new_guard):
    prompt, reply = Prompt([5, 6], [7]), [8, 9, 10]
    tokens = prompt.reward_tokens(new_guard.template) + reply
    every = new_guard.reward(new_guard.llama(torch.tensor([tokens]))[0])
    each = new_guard.score(prompt, [reply[:i] for i in range(4)])
    torch.testing.assert_close(every[-4:], each, atol=1e-12, rtol=0)


# ------------------------------------------------------------------------------------------------------------
# adapters of this repository

@pytest.mark.parametrize("kind", ["guard", "mrm"])
def test_an_adapter_comes_back(kind, tmp_path, tiny_guard, request):
    model = request.getfixturevalue(f"new_{kind}")
    for name, tensor in trained_tensors(model).items():
        if "lora_" in name:
            tensor.data = tensor.data.half().double()                   # LoRA is stored in float16
    path = tmp_path / "a.safetensors"
    save_adapter(model, path, 4, 8, TARGETS, 1 if kind == "guard" else 0, "python train_mrm.py ...")
    back = load_adapter(path, tiny_guard, kind)
    hidden = lambda m: m.llama(torch.arange(9)[None])[0]
    rewards = lambda m: (m.reward if kind == "guard" else m.conservative_rewards)(hidden(m))
    torch.testing.assert_close(rewards(back), rewards(model), atol=1e-12, rtol=0)
    assert back.template == model.template and not any(p.requires_grad for p in back.parameters())
    with safe_open(path, framework="pt") as file:
        assert json.loads(file.metadata()["command"]) == "python train_mrm.py ..."
    assert [p.name for p in tmp_path.iterdir()] == ["a.safetensors"]    # no temporary file is left


@pytest.fixture
def adapter(tmp_path, new_mrm):
    """An adapter of tiny_guard, with changes to its metadata or tensors: adapter(rank=2) -> path."""
    def write(tensors={}, **changes):
        path = tmp_path / "a.safetensors"
        save_adapter(new_mrm, path, 4, 8, TARGETS, 0, "")
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() | {key: json.dumps(value) for key, value in changes.items()}
            found = {name: file.get_tensor(name) for name in file.keys()} | tensors
        save_file({n: t for n, t in found.items() if t is not None}, path, metadata=metadata)
        return path
    return write


@pytest.mark.parametrize("changes, said", [
    ({"base_fingerprint": "beef"}, ["base model", "beef", "tiny_guard"]),
    ({"vocabulary": "feed"}, ["vocabulary", "feed"]),
    ({"kind": "guard"}, ["guard", "mrm"]),
    ({"rank": 2}, ["(4, 48)", "(2, 48)", "rank 2"]),
    ({"tensors": {"bias": None}}, ["bias", "missing"]),
    ({"tensors": {"bias": torch.zeros(3)}}, ["bias", "(3,)", "(512,)"]),
])
def test_an_adapter_of_something_else_is_refused(adapter, tiny_guard, changes, said):
    with pytest.raises(BadInput) as error:
        load_adapter(adapter(**changes), tiny_guard, "mrm")
    assert all(word in str(error.value) for word in said), error.value


def test_an_adapter_of_another_checkpoint_is_refused(adapter, tiny_policy):
    with pytest.raises(BadInput, match="tiny_guard.*tiny_policy"):
        load_adapter(adapter(), tiny_policy, "mrm")


@pytest.mark.parametrize("rank, targets, first_layer, said", [
    (0, TARGETS, 0, "rank.*at least 1"), (4, ["q_proj", " v_proj"], 0, "targets.*q_proj, k_proj"),
    (4, TARGETS, 2, "first layer.*0 and at most 1"),
])
def test_lora_where_there_is_none_is_refused(tiny_guard, rank, targets, first_layer, said):
    with pytest.raises(BadInput, match=said):
        check_lora(rank, 8, targets, first_layer, tiny_guard.config)


@pytest.mark.parametrize("name", ["LoRALinear.__init__", "add_lora", "MRM.__init__", "Guard.__init__"])
@pytest.mark.parametrize("mistake", [TypeError("a student's"), NotImplementedError("exercise 5"),
                                     IndexError("a student's"), FileNotFoundError("a student's")])
def test_a_students_mistake_is_a_traceback(tiny_guard, new_mrm, new_guard, tmp_path, monkeypatch, name,
                                           mistake):
    """Not "a wrong file", though an adapter is being loaded."""
    save_adapter(new_mrm, tmp_path / "m.safetensors", 4, 8, TARGETS, 0, "")
    save_adapter(new_guard, tmp_path / "g.safetensors", 4, 8, TARGETS, 1, "")

    def wrong(*args, **options):
        raise mistake
    owner, _, attribute = name.rpartition(".")
    for module in (mrm_module, adapters_module, released_module):
        target = getattr(module, owner, None) if owner else module
        if target is not None and hasattr(target, attribute):
            monkeypatch.setattr(target, attribute, wrong)
    with pytest.raises(type(mistake), match=str(mistake)):
        if owner == "Guard":
            load_adapter(tmp_path / "g.safetensors", tiny_guard, "guard")
        else:
            load_adapter(tmp_path / "m.safetensors", tiny_guard, "mrm")
    if owner != "Guard":
        with pytest.raises(type(mistake), match=str(mistake)):
            load_released_mrm(GOLDEN / "tiny_mrm", tiny_guard, Template([], []))


def test_a_mask_that_gives_nan_is_a_traceback(tiny_policy, tiny_mrm, monkeypatch):
    """0 · −inf is nan. It is no fault of the weights, so they are not named."""
    right = TrieCache.mask
    monkeypatch.setattr(TrieCache, "mask", lambda self, nodes: right(self, nodes) * math.inf)
    with pytest.raises(ArithmeticError, match="a mistake in the code"):
        saffron(tiny_policy, tiny_mrm, Prompt([1, 2]), paper(width=2, max_new_tokens=3))


def test_a_file_that_is_no_adapter_is_refused(tiny_guard, tmp_path):
    (tmp_path / "broken").write_bytes(b"not safetensors")
    for path, said in ((tmp_path / "absent", "no such file"), (tmp_path / "broken", "not a readable adapter"),
                       (GOLDEN / "tiny_guard" / "model.safetensors", "not an adapter")):
        with pytest.raises(BadInput, match=said):
            load_adapter(path, tiny_guard, "mrm")


# ------------------------------------------------------------------------------------------------------------
# the layout of the released weights

def test_released_layout_gives_the_golden_rewards(tiny_mrm, golden_search):
    """Rewards of the paper's authors' code: LoRA scale, template and bias must all be right."""
    for case in golden_search["cases"]:
        hidden = tiny_mrm.llama(torch.tensor([tiny_mrm.template(case["prompt"])]))[0, -1]
        expected = torch.tensor(case["first_rewards"], dtype=torch.float64)
        torch.testing.assert_close(tiny_mrm.next_rewards(hidden)[:8], expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("change, said", [
    ({"use_rslora": True}, "use_rslora"), ({"r": 2}, "rank 2"), ({"peft_type": "IA3"}, "peft_type"),
])
def test_other_kinds_of_adapter_are_refused(tmp_path, tiny_guard, change, said):
    shutil.copytree(GOLDEN / "tiny_mrm", tmp_path / "mrm")
    path = tmp_path / "mrm" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(BadInput, match=said):
        load_released_mrm(tmp_path / "mrm", tiny_guard, Template([], []))


def test_a_pickle_that_runs_code_is_refused(tmp_path, tiny_guard):
    shutil.copytree(GOLDEN / "tiny_mrm", tmp_path / "mrm")

    class Malicious:
        def __reduce__(self):
            return (open, (str(tmp_path / "was run"), "w"))

    torch.save(Malicious(), tmp_path / "mrm" / "lm_head_bias.pt")
    with pytest.raises(BadInput, match="lm_head_bias.pt: not a plain tensor"):
        load_released_mrm(tmp_path / "mrm", tiny_guard, Template([], []))
    assert not (tmp_path / "was run").exists()


def test_the_committed_mrm_can_end_a_reply(mrm):
    assert not mrm.unseen[list(mrm.llama.config.eos_token_ids)].any()
    assert mrm.unseen.any()
