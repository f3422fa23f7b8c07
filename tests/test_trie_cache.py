"""The trie computes each distinct prefix once, gives the same numbers as no cache at all, and forgets on demand."""

import random

import pytest
import torch

from model import BadInput
from trie_cache import TrieCache


def prefixes(sequences):
    return {tuple(s[:i + 1]) for s in sequences for i in range(len(s))}


def without_cache(model, sequence):
    return model(torch.tensor([sequence]))[0, -1]


@pytest.mark.parametrize("seed", range(12))
def test_random_trees(tiny_guard, seed):
    """A random search: grow branches, ask again, forget most. Capacity 4 makes the arena double several times."""
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
            trie.retain(kept)
            known = prefixes(kept)
            assert trie.used - len(trie.free) == len(known)         # slots in use: the kept prefixes, no more
    assert trie.arena.shape[3] >= 8 and trie.peak_slots <= trie.used


def test_asking_again_computes_nothing(tiny_guard):
    trie = TrieCache(tiny_guard)
    first, computed = trie([[1, 2, 3], [1, 2]]), trie.computed
    assert torch.equal(trie([[1, 2, 3], [1, 2]]), first)
    assert trie.computed == computed == 3


def test_slots_are_given_back_and_used_again(tiny_guard):
    trie = TrieCache(tiny_guard)
    trie([[1, 2, 3, 4], [1, 2, 5, 6]])
    trie.retain([[1, 2, 5]])
    assert sorted(trie.free) == [2, 3, 5]
    trie([[1, 2, 5, 7, 8]])
    assert trie.free == [5] and trie.used == 6
    trie.retain([])
    assert len(trie.free) == trie.used and not trie.root.children


def test_attended_counts_every_key_that_is_looked_at(tiny_guard):
    trie = TrieCache(tiny_guard)
    trie([[1, 2, 3], [1, 2, 4]])
    assert trie.attended == 1 + 2 + 3 + 3


@pytest.mark.parametrize("length", [0, 513])
def test_a_sequence_that_does_not_fit_is_refused(tiny_guard, length):
    trie = TrieCache(tiny_guard)
    with pytest.raises(BadInput, match=f"{length} tokens.*tiny_guard.*512"):
        trie([[1, 2], [0] * length])
    assert trie.computed == 0 and not trie.root.children            # and nothing has changed


def test_default_weights_in_float32(smollm2):
    pick = random.Random(0)
    trie, kept = TrieCache(smollm2), [[pick.randrange(49152) for _ in range(30)]]
    for _ in range(4):
        kept = [pick.choice(kept) + [pick.randrange(49152) for _ in range(3)] for _ in range(4)]
        for sequence, h in zip(kept, trie(kept)):
            torch.testing.assert_close(h, without_cache(smollm2, sequence), atol=1e-3, rtol=1e-3)
        trie.retain(kept)
