"""
A KV cache that is a trie: token sequences with a common prefix share the keys and values of that prefix.

Tree search extends a few sequences by a token each and drops others. Here each distinct prefix is computed
once and stored once, without padding or copies. The paper (Qiu et al. 2025, arXiv 2506.06444, Section 4.4)
has the idea; the layout is ours, with tree attention as in SpecInfer (Miao et al. 2023, arXiv 2305.09781):

    a node   = the last token of a prefix; the path from the root to it spells the prefix
    a slot   = a node's place in the arena, the tensor of keys and values; dropped branches give theirs back
    position = how many tokens stand before it on the path: its depth - 1
    a mask lets each token look at the slots on its own path only, so slots may lie in any order
"""

import heapq

import numpy as np
import torch
import torch.nn.functional as F

from plumbing.errors import check_states

PIECE = 256                     # the most tokens of a trie that one pass reads: a mask has a row for each


class TrieNode:
    """One token after its parent's prefix."""
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

    A search goes on from where it was. It holds nodes in place of sequences, so no token is looked up again:

        node = trie.insert(trie.root, prompt)       # new nodes wait for the next forward pass
        compute(model, [trie])                      # reads all that waits, in one trie or several
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
        self.paths = {self.root: np.zeros(0, dtype=bool)}   # some nodes' paths, as marks on slots: see `mask`
        config = model.config
        shape = config.num_hidden_layers, 2, config.num_key_value_heads, capacity, config.head_dim
        self.arena = torch.zeros(shape, dtype=model.dtype, device=model.device)   # [:, 0] keys, [:, 1] values
        self.hidden = self.arena.new_zeros(capacity, config.hidden_size)     # (slots, d), after the last norm

    def __call__(self, sequences):
        """Final hidden states of the last tokens of n token lists: (n, d). Only what is new is read."""
        assert all(sequences), "a sequence has no token, so there is nothing to read"
        nodes = [self.insert(self.root, sequence) for sequence in sequences]
        compute(self.model, [self])
        return self.hidden_at(nodes)

    def insert(self, node, tokens):
        """The node that these tokens lead to from `node`. Those that are new wait for `compute`."""
        longest = self.model.config.max_position_embeddings
        assert node.depth + len(tokens) <= longest, f"{self.model.config.name} reads at most {longest} tokens"
        assert node is self.root or node.slot is not None, "this node was forgotten"
        before = len(self.waiting)
        for token in tokens:
            child = node.children.get(token)
            if child is None:
                child = TrieNode(token, self.take_slot(), node)
                node.children[token] = child
                self.waiting.append(child)
            node = child
        self.cached += node.depth - (len(self.waiting) - before)
        return node

    def hidden_at(self, nodes):
        """Final hidden states of n computed nodes: (n, d)."""
        return check_states(self.hidden[[node.slot for node in nodes]], self.model)

    def mask(self, nodes):
        """Which of the first S slots n waiting nodes, parents first, look at: (n, S), 0 or −∞. Those are the
        slots on a node's path: its parent's, which `paths` may know, and its own."""
        rows = np.zeros((len(nodes), self.used), dtype=bool)
        for row, node in zip(rows, nodes):
            above = node
            while above not in self.paths:                  # mostly one step: the parent was read just before
                row[above.slot] = True
                above = above.parent
            row[:len(self.paths[above])] |= self.paths[above]
            self.paths[node] = row
        self.paths = {self.root: self.paths[self.root], **dict(zip(nodes, rows))}
        blocked = torch.from_numpy(~rows[:, :1 + rows.any(axis=0).nonzero()[0][-1]]).to(self.hidden.device)
        return torch.zeros_like(blocked, dtype=self.hidden.dtype).masked_fill_(blocked, -torch.inf)

    def attend(self, layer, q, k, v, slots, mask):
        """Attention in one layer: n waiting tokens write keys and values to their slots and look at their
        paths. q: (1, heads, n, head_dim), k and v: (1, kv_heads, n, head_dim), slots: ints (n,), mask: (n, S)
        to add. Result: (1, heads, n, head_dim)."""
        arena = self.arena[layer]                                             # (2, kv_heads, slots, head_dim)
        arena[:, :, slots] = torch.cat((k, v))                                   # (2, kv_heads, n, head_dim)
        keys, values = arena[:, None, :, :mask.shape[1]]                     # (1, kv_heads, S, head_dim) each
        return F.scaled_dot_product_attention(q, keys, values, attn_mask=mask, enable_gqa=True)

    def take_slot(self):
        """The lowest free slot, or else the next that was never used. Without one, all tensors double."""
        if self.free:
            return heapq.heappop(self.free)
        if self.used == len(self.hidden):
            self.arena = F.pad(self.arena, (0, 0, 0, self.used))
            self.hidden = F.pad(self.hidden, (0, 0, 0, self.used))
        self.used += 1
        return self.used - 1

    def prune(self, nodes):
        """Forget every node that is neither one of these nor an ancestor of one, and give its slot back.
        Whoever still holds a forgotten node sees that its slot is None. No node may be waiting."""
        assert not self.waiting, "compute first: a forgotten node must not be computed into a slot of another"
        assert all(node is self.root or node.slot is not None for node in nodes), "this node was forgotten"
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
    """A forward pass over waiting tokens of several tries, one trie's after another's. It is the `cache` that
    Llama.forward hands each layer's queries, keys and values to; each token looks at its own trie."""

    def __init__(self, tries, device):
        self.tries = tries
        self.nodes = [trie.waiting[:PIECE] for trie in tries]           # of each trie: what is read of it
        self.sizes = [len(nodes) for nodes in self.nodes]
        self.masks = [trie.mask(nodes) for trie, nodes in zip(tries, self.nodes)]
        self.slots = [torch.tensor([node.slot for node in nodes], device=device) for nodes in self.nodes]

    def attend(self, layer, q, k, v):
        """Each trie's attention over its own tokens. q (1, heads, n, head_dim), k and v (1, kv_heads, n,
        head_dim), n the tokens of all tries; returns the shape of q."""
        q, k, v = (x.split(self.sizes, dim=2) for x in (q, k, v))           # of each trie its own tokens
        parts = zip(self.tries, q, k, v, self.slots, self.masks)
        return torch.cat([trie.attend(layer, *part) for trie, *part in parts], dim=2)


@torch.no_grad()
def compute(model, tries):
    """Read all that waits in these tries, in one forward pass where that is at most PIECE tokens of each.
    model: the Llama of all, or what is called like one and reads for several (plumbing/shared.py)."""
    while tries := [trie for trie in tries if trie.waiting]:
        reading = Pass(tries, model.device)
        nodes = [node for piece in reading.nodes for node in piece]
        tokens = torch.tensor([[node.token for node in nodes]], device=model.device)            # (1, n)
        positions = torch.tensor([[node.depth - 1 for node in nodes]], device=model.device)     # (1, n)
        hidden = model(tokens, positions, reading)[0].split(reading.sizes)              # of each trie: (n, d)
        for trie, piece, slots, h in zip(tries, reading.nodes, reading.slots, hidden):
            trie.hidden[slots] = h
            trie.computed += len(piece)
            trie.attended += sum(node.depth for node in piece)
            trie.waiting = trie.waiting[len(piece):]
