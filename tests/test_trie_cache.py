"""The trie computes each distinct prefix once, gives the same numbers as no cache at all,
and forgets on demand."""

import itertools
import math
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import trie_cache
from trie_cache import TrieCache


def prefixes(sequences):
    return {tuple(s[:i + 1]) for s in sequences for i in range(len(s))}


def without_cache(model, sequence):
    return model(torch.tensor([sequence]))[0, -1]


@pytest.mark.exercise(3, points=3)
@pytest.mark.parametrize("seed", range(12))
def test_random_trees(tiny_guard, seed, monkeypatch):
    """A random search: grow branches, ask again, forget most. Capacity 4 makes the arena double several
    times. For every other seed, what waits is read in pieces."""
    monkeypatch.setattr(trie_cache, "PIECE", 3 if seed % 2 else 256)
    pick = random.Random(seed)
    trie, kept, known = TrieCache(tiny_guard, capacity=4), [[]], set()
    for step in range(12):
        asked = [pick.choice(kept) + [pick.randrange(4) for _ in range(pick.randint(1, 5))] for _ in range(5)]
        new, before, cached = prefixes(asked) - known, trie.computed, trie.cached
        hidden = trie(asked)
        known |= new
        assert trie.computed - before == len(new)                   # each distinct prefix exactly once
        assert trie.cached - cached == sum(map(len, asked)) - len(new)
        for sequence, h in zip(asked, hidden):
            torch.testing.assert_close(h, without_cache(tiny_guard, sequence), atol=1e-9, rtol=0)
        kept = [[]] + pick.sample(asked, 2)
        if step % 3 == 2:
            trie.prune([trie.insert(trie.root, sequence) for sequence in kept])
            known = prefixes(kept)
            assert trie.used - len(trie.free) == len(known)         # slots in use: the kept prefixes, no more
    assert trie.arena.shape[3] >= 8


@pytest.mark.exercise(3, points=1)
def test_asking_again_computes_nothing(tiny_guard):
    trie = TrieCache(tiny_guard)
    first, computed = trie([[1, 2, 3], [1, 2]]), trie.computed
    assert torch.equal(trie([[1, 2, 3], [1, 2]]), first)
    assert trie.computed == computed == 3


def grown(model, sequences, capacity=256):
    """A trie that these sequences were put into, and their nodes. No model reads them."""
    trie = TrieCache(model, capacity)
    nodes = [trie.insert(trie.root, sequence) for sequence in sequences]
    trie.waiting.clear()
    return trie, nodes


def path(node):
    """The tokens and the slots from the root to a node."""
    tokens, slots = [], []
    while node.parent:
        tokens, slots, node = [node.token] + tokens, [node.slot] + slots, node.parent
    return tokens, slots


@pytest.mark.exercise(3, points=1)
def test_a_prefix_has_one_node_and_each_node_one_slot(tiny_guard):
    sequences = [[1, 2, 3], [1, 2, 4, 5], [1, 2], [6]]
    trie, nodes = grown(tiny_guard, sequences, capacity=2)
    assert [path(node)[0] for node in nodes] == sequences and [node.depth for node in nodes] == [3, 4, 2, 1]
    slots = {tuple(path(node)[0]): node.slot for leaf in nodes for node in ancestors(leaf)}
    # Of 10 tokens, 6 are different prefixes.
    assert sorted(slots.values()) == list(range(6)) and trie.used == 6
    assert trie.cached == 0 + 2 + 2 + 0                                     # the rest were there
    assert trie.insert(nodes[0].parent, [4]) is nodes[1].parent and trie.insert(nodes[3], []) is nodes[3]
    assert trie.cached == 4 + 3 + 1


@pytest.mark.exercise(3, points=1)
def test_the_tensors_double_and_keep_what_is_in_them(tiny_guard):
    trie, _ = grown(tiny_guard, [[1, 2]], capacity=2)
    trie.arena.fill_(1.0), trie.hidden.fill_(1.0)
    trie.insert(trie.root, [3])
    assert trie.arena.shape[3] == len(trie.hidden) == 4
    for tensor in (trie.arena.movedim(3, 0), trie.hidden):
        assert (tensor[:2] == 1).all() and (tensor[2:] == 0).all()


@pytest.mark.exercise(3, points=1)
@pytest.mark.parametrize("seed", range(6))
def test_time_and_space_are_those_of_proposition_2(tiny_guard, seed):
    """The paper's Eq. 9: slots are the sequences' lengths less the common prefixes of neighbours, in the
    order of the sequences that makes these longest. Eq. 8: the same of their squares for attention; here
    exactly, 1 + 2 + ... + n keys for n tokens."""
    pick = random.Random(seed)
    sequences = [[pick.randrange(2) for _ in range(pick.randint(1, 9))] for _ in range(5)]
    common = lambda s, t: next((i for i, (a, b) in enumerate(zip(s, t)) if a != b), min(len(s), len(t)))
    shared = lambda cost: max(sum(cost(common(s, t)) for s, t in zip(order, order[1:]))
                              for order in itertools.permutations(sequences))
    trie = TrieCache(tiny_guard)
    trie(sequences)
    keys = lambda n: n * (n + 1) // 2
    assert trie.used == trie.computed == sum(map(len, sequences)) - shared(lambda n: n)
    assert trie.attended == sum(keys(len(s)) for s in sequences) - shared(keys)


def ancestors(node):
    """The node and all above it but the root."""
    return [node, *ancestors(node.parent)] if node.parent else []


@pytest.mark.exercise(3, points=1)
def test_new_nodes_wait_to_be_computed_and_see_their_path_only(tiny_guard):
    trie = TrieCache(tiny_guard, capacity=2)
    trie.insert(trie.root, [1, 2, 3])
    trie.insert(trie.root, [1, 4])
    assert [path(node)[0] for node in trie.waiting] == [[1], [1, 2], [1, 2, 3], [1, 4]]
    for node, looks_at in zip(trie.waiting, trie.mask(trie.waiting) == 0):
        assert looks_at.nonzero().flatten().tolist() == sorted(path(node)[1])


@pytest.mark.exercise(3, points=4)
def test_slots_are_given_back_and_used_again(tiny_guard):
    """All but what is wanted and its ancestors is forgotten; of the free slots, the lowest are used first."""
    trie, (_, leaf) = grown(tiny_guard, [[1, 2, 3, 4], [1, 2, 5, 6]])
    lost = trie.root.children[1].children[2].children[3]
    trie.prune([leaf.parent])
    assert (sorted(trie.free) == [2, 3, 5] and lost.slot is None and leaf.slot is None
            and not leaf.parent.children)
    node = trie.insert(leaf.parent, [7, 8])
    assert trie.free == [5] and trie.used == 6 and path(node) == ([1, 2, 5, 7, 8], [0, 1, 4, 2, 3])
    trie.waiting.clear()
    trie.prune([])
    assert len(trie.free) == trie.used and not trie.root.children


@pytest.mark.exercise(3, points=1)
def test_a_slot_that_is_used_again_sees_nothing_of_what_it_saw_before(tiny_guard):
    trie, (_, kept) = grown(tiny_guard, [[1, 2, 3, 4], [5]])
    trie.prune([kept])
    children = [trie.insert(kept, [token]) for token in (6, 7, 8, 9)]
    assert [child.slot for child in children] == [0, 1, 2, 3]
    assert ((trie.mask(children) == 0).tolist()
            == [[slot in (child.slot, 4) for slot in range(5)] for child in children])


@pytest.mark.exercise(3, points=1)
def test_the_lowest_free_slot_is_taken_first(tiny_guard):
    """Of any heap of them."""
    trie, nodes = grown(tiny_guard, [[token] for token in range(8)])
    trie.free = [0, 5, 1, 6, 7, 2]
    assert [trie.insert(nodes[3], [token]).slot for token in range(7)] == [0, 1, 2, 5, 6, 7, 8]


def attended(trie, q, k, v, slots, sees):
    """trie.attend for tokens at these slots, of which each sees those slots."""
    mask = torch.full((len(slots), 1 + max(map(max, sees))), -torch.inf, dtype=q.dtype)
    for row, visible in zip(mask, sees):
        row[visible] = 0
    return trie.attend(0, q[None], k[None], v[None], torch.tensor(slots), mask)[0]


@pytest.fixture
def qkv(tiny_guard):
    """Two tokens' queries (heads, 2, head_dim), keys and values (kv_heads, 2, head_dim)."""
    config, generator = tiny_guard.config, torch.Generator().manual_seed(0)
    draw = lambda heads: torch.randn(heads, 2, config.head_dim, dtype=torch.float64, generator=generator)
    return (draw(config.num_attention_heads), draw(config.num_key_value_heads),
            draw(config.num_key_value_heads))


@pytest.mark.exercise(2, points=2)
def test_a_token_that_sees_one_slot_gets_its_value(tiny_guard, qkv):
    """Each head that of its group: of 6 heads, the first three share keys and values, and the last three."""
    trie, (q, k, v) = TrieCache(tiny_guard), qkv
    trie.used = 5                                           # of these, the first three are looked at
    out = attended(trie, q, k, v, [2, 0], [[2], [0]])
    assert out.shape == q.shape
    for head in range(len(q)):
        torch.testing.assert_close(out[head], v[head // (len(q) // len(v))])
    torch.testing.assert_close(trie.arena[0, :, :, [2, 0]], torch.stack((k, v)))    # kept for later tokens
    assert trie.arena[1:].abs().sum() == 0 and trie.arena[0, :, :, 1].abs().sum() == 0      # and nothing else


@pytest.mark.exercise(2, points=3)
def test_attention_looks_at_visible_slots_only_by_softmax_of_scaled_products(tiny_guard, qkv):
    trie, (q, k, v) = TrieCache(tiny_guard), qkv
    trie.used = 4
    trie.arena[0, 0, :, :2], trie.arena[0, 1, :, :2] = 2 * v, 3 * k  # as if two tokens had been there before
    first = attended(trie, q, k, v, [2, 3], [[0, 2], [0, 2, 3]])
    trie.arena[0, :, :, 1] = 1e3                                             # a slot that nobody sees
    torch.testing.assert_close(attended(trie, q, k, v, [2, 3], [[0, 2], [0, 2, 3]]), first)
    trie.arena[0, 0, :, 0] = k[:, 0]                                    # equal keys: the mean of the values
    mean = (trie.arena[0, 1, :, 0] + v[:, 0]) / 2
    both = attended(trie, q, k, v, [2, 3], [[0, 2], [3]])
    for head in range(len(q)):
        torch.testing.assert_close(both[head, 0], mean[head // 3])      # heads 0 to 2 share keys, 3 to 5 too
        torch.testing.assert_close(both[head, 1], v[head // 3, 1])
    # Keys whose products with the first head's query are 0 and log 3, after the division by sqrt(head_dim):
    # weights 1 : 3.
    toward = q[:1, :1] / q[:1, :1].square().sum() * q.shape[-1] ** 0.5          # (1, 1, head_dim): product 1
    k = (toward * torch.tensor([0.0, math.log(3)], dtype=torch.float64)[:, None]).expand_as(k)
    out = attended(trie, q[:1, :1].expand_as(q), k, v, [2, 3], [[2, 3], [2, 3]])
    for head in range(len(q)):
        torch.testing.assert_close(out[head, 0], (v[head // 3, 0] + 3 * v[head // 3, 1]) / 4)


LONG_PROMPT = """
import resource, torch
from model import Llama, LlamaConfig
from trie_cache import TrieCache
llama = Llama(LlamaConfig(512, 48, 96, 2, 6, 2, 8, 40_000)).requires_grad_(False)
TrieCache(llama)([[1, 2, 3]])
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
trie = TrieCache(llama)
trie([torch.randint(512, (20_000,)).tolist()])
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print((peak - before) * 1024 - trie.bytes_of(trie.used))
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss has other units elsewhere")
def test_a_long_prompt_takes_little_more_memory_than_its_keys_and_values():
    """20,000 tokens: less than 100 MB more, where the whole mask would take 1.6 GB."""
    root = Path(trie_cache.__file__).parent
    run = subprocess.run([sys.executable, "-c", LONG_PROMPT], cwd=root, capture_output=True, text=True,
                         check=True)
    assert int(run.stdout) < 100e6


def test_attended_counts_every_key_that_is_looked_at(tiny_guard):
    trie = TrieCache(tiny_guard)
    trie([[1, 2, 3], [1, 2, 4]])
    assert trie.attended == 1 + 2 + 3 + 3


@pytest.mark.parametrize("length", [0, 513])
def test_a_sequence_that_does_not_fit_is_refused(tiny_guard, length):
    trie = TrieCache(tiny_guard)
    with pytest.raises(AssertionError, match="no token|tiny_guard reads at most 512 tokens"):
        trie([[1, 2], [0] * length])
    assert trie.computed == 0


def test_default_weights_in_float32(smollm2):
    pick = random.Random(0)
    trie, kept = TrieCache(smollm2), [[pick.randrange(49152) for _ in range(30)]]
    for _ in range(4):
        kept = [pick.choice(kept) + [pick.randrange(49152) for _ in range(3)] for _ in range(4)]
        for sequence, h in zip(kept, trie(kept)):
            torch.testing.assert_close(h, without_cache(smollm2, sequence), atol=1e-3, rtol=1e-3)
        trie.prune([trie.insert(trie.root, sequence) for sequence in kept])
