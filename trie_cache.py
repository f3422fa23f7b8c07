"""
A KV cache that is a trie: token sequences with a common prefix share the keys and values of that prefix.

Tree search extends a few sequences by a token each, drops some, and extends the rest. Most of their tokens
are old, and many are shared. Here each distinct prefix is computed once and stored once. The paper (Qiu et
al. 2025, arXiv 2506.06444, Section 4.4) uses a trie for the same purpose; the layout is our own, with tree
attention in the manner of SpecInfer (Miao et al. 2023, arXiv 2305.09781):

    a node   = the last token of a prefix; the path from the root to it spells the prefix
    a slot   = a node's place in the arena, the preallocated tensor of keys and values of all layers
    position = how many tokens stand before it on the path: its depth - 1
    a mask lets each token look at the slots on its own path only, so slots may lie in any order

So there is no padding and no copy of a cache. A branch that is not needed any more gives its slots back.
"""

import heapq
import math

import numpy as np
import torch
import torch.nn.functional as F


class TrieNode:
    """One token after its parent's prefix."""
    __slots__ = ("token", "slot", "depth", "parent", "children")

    def __init__(self, token, slot, parent):
        self.token = token
        self.slot = slot
        self.parent = parent
        self.depth = parent.depth + 1 if parent else 0      # tokens in the prefix
        self.children = {}                                  # token -> TrieNode


class TrieCache:
    """The cached forward pass of one Llama.

        trie = TrieCache(model)
        hidden = trie(sequences)    # list of token lists -> (n, d): the final hidden state of each last token

    A search goes on from where it was. It holds nodes in place of sequences, so it walks no path again:

        node = trie.insert(trie.root, prompt)       # new nodes wait for the next forward pass
        compute(model, [trie])                      # one pass over all that waits, in one trie or several
        hidden = trie.hidden_at([node])             # (1, d)
        child = trie.insert(node, [token])
        trie.prune([child])                         # forget all but the paths to these nodes

    `computed` counts tokens that went through the model, `cached` those of inserted paths that had a node
    already, `attended` the keys on the paths of computed tokens, themselves included."""

    def __init__(self, model, capacity=256):
        self.model = model
        self.root = TrieNode(None, None, None)  # the empty prefix: no token, no slot
        self.waiting = []                       # nodes that no forward pass has read yet
        self.free = []                          # slots given back, a heap
        self.used = 0                           # slots 0 to used - 1 are in use, or were (then they are free)
        self.computed = self.cached = self.attended = 0
        config = model.config
        like = dict(dtype=model.dtype, device=model.device)
        shape = config.num_hidden_layers, 2, config.num_key_value_heads, capacity, config.head_dim
        self.arena = torch.zeros(shape, **like)     # (layers, keys and values, kv_heads, slots, head_dim)
        self.hidden = torch.zeros(capacity, config.hidden_size, **like)      # (slots, d), after the last norm
        self.visible = np.zeros((capacity, capacity), dtype=bool)          # [i, j]: may slot i look at slot j

    def __call__(self, sequences):
        """Final hidden states of the last tokens of n token lists: (n, d), in one pass over what is new."""
        assert all(sequences), "a sequence has no token, so there is nothing to read"
        nodes = [self.insert(self.root, sequence) for sequence in sequences]
        compute(self.model, [self])
        return self.hidden_at(nodes)

    def insert(self, node, tokens):
        """The node that these tokens lead to from `node`. Those that are new wait for `compute`."""
        longest = self.model.config.max_position_embeddings
        assert node.depth + len(tokens) <= longest, f"{self.model.config.name} reads at most {longest} tokens"
        assert node is self.root or node.slot is not None, "this node was forgotten"
        new = 0
        for token in tokens:
            child = node.children.get(token)
            if child is None:
                child = TrieNode(token, self.take_slot(), node)
                node.children[token] = child
                # A token sees what its parent sees, and itself.
                self.visible[child.slot] = self.visible[node.slot] if node.slot is not None else False
                self.visible[child.slot, child.slot] = True
                self.waiting.append(child)
                new += 1
            node = child
        self.cached += node.depth - new
        return node

    def hidden_at(self, nodes):
        """Final hidden states of n computed nodes: (n, d)."""
        return self.hidden[[node.slot for node in nodes]]

    def attend(self, layer, q, k, v, slots, mask):
        """Attention of n waiting tokens in one layer: write their keys and values to their slots, then let
        each look at its path. q: (1, heads, n, head_dim), k and v: (1, kv_heads, n, head_dim), slots: ints
        (n,), mask: (n, used), 0 where a token may look and −∞ elsewhere. Result: (1, heads, n, head_dim)."""
        arena = self.arena[layer]                                             # (2, kv_heads, slots, head_dim)
        arena[:, :, slots] = torch.cat((k, v))                                   # (2, kv_heads, n, head_dim)
        keys, values = arena[:, None, :, :self.used]                      # (1, kv_heads, used, head_dim) each
        return F.scaled_dot_product_attention(q, keys, values, attn_mask=mask, enable_gqa=True)

    def take_slot(self):
        """The lowest free slot, or else the next that was never used. Without one, all tensors double."""
        if self.free:
            return heapq.heappop(self.free)
        slot = self.used
        self.used += 1
        if self.used > len(self.hidden):
            self.arena = torch.cat((self.arena, torch.zeros_like(self.arena)), dim=3)
            self.hidden = torch.cat((self.hidden, torch.zeros_like(self.hidden)), dim=0)
            self.visible = np.pad(self.visible, (0, slot))      # slot: as many as there were
        return slot

    def prune(self, nodes):
        """Forget every node that is neither one of these nor an ancestor of one, and give its slot back.
        Whoever still holds a forgotten node sees that its slot is None. No node may be waiting."""
        assert not self.waiting, "compute first: a forgotten node must not be computed into a slot of another"
        # 1. mark what is wanted: these nodes and all above them
        wanted = {self.root}
        for node in nodes:
            while node not in wanted:
                wanted.add(node)
                node = node.parent
        # 2. free what hangs from a wanted node without being wanted, and all below it
        unwanted = [child for node in wanted for child in node.children.values() if child not in wanted]
        for node in unwanted:
            del node.parent.children[node.token]
        while unwanted:
            node = unwanted.pop()
            heapq.heappush(self.free, node.slot)
            node.slot = None
            unwanted += node.children.values()

    def bytes_of(self, slots):
        """Bytes of the keys and values in so many slots, in all layers together."""
        return slots * self.arena[:, :, :, 0].nbytes


class Pass:
    """A forward pass over the waiting tokens of several tries, one trie's after another's. It is the `cache`
    that Llama.forward hands each layer's queries, keys and values to; each token looks at its own trie."""

    def __init__(self, tries, device):
        self.tries = tries
        self.sizes = [len(trie.waiting) for trie in tries]
        self.slots = []                                     # of each trie: where its keys are written, (n,)
        self.masks = []                                     # of each trie: who looks where, (n, used)
        for trie in tries:
            slots = [node.slot for node in trie.waiting]
            blocked = torch.from_numpy(~trie.visible[slots, :trie.used]).to(device)
            mask = torch.zeros_like(blocked, dtype=trie.hidden.dtype)
            self.slots.append(torch.tensor(slots, device=device))
            self.masks.append(mask.masked_fill_(blocked, -math.inf))

    def attend(self, layer, q, k, v):
        """Each trie's attention over its own tokens. q (1, heads, n, head_dim), k and v (1, kv_heads, n,
        head_dim), n the tokens of all tries; returns the shape of q."""
        q, k, v = (x.split(self.sizes, dim=2) for x in (q, k, v))           # of each trie its own tokens
        parts = zip(self.tries, q, k, v, self.slots, self.masks)
        return torch.cat([trie.attend(layer, *part) for trie, *part in parts], dim=2)


@torch.no_grad()
def compute(model, tries):
    """One forward pass over all waiting tokens of these tries. model: the Llama of all of them, or an object
    that is called in the same way and reads for several Llamas (plumbing/fast.py)."""
    tries = [trie for trie in tries if trie.waiting]
    if not tries:
        return
    waiting = [node for trie in tries for node in trie.waiting]
    tokens = torch.tensor([[node.token for node in waiting]], device=model.device)              # (1, n)
    positions = torch.tensor([[node.depth - 1 for node in waiting]], device=model.device)       # (1, n)
    forward_pass = Pass(tries, model.device)
    hidden = model(tokens, positions, forward_pass)[0]                                          # (n, d)
    for trie, slots, h in zip(tries, forward_pass.slots, hidden.split(forward_pass.sizes)):
        trie.hidden[slots] = h
        trie.computed += len(trie.waiting)
        trie.attended += sum(node.depth for node in trie.waiting)
        trie.waiting = []
