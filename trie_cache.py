"""
A KV cache that is a trie: token sequences with a common prefix share the keys and values of that prefix.

Tree search extends a few sequences by a token each, drops some, extends the rest: nearly all of every sequence has
been computed before, most of it once for all of them. Here each distinct prefix is computed once and stored once.
The paper (Qiu et al. 2025, arXiv 2506.06444) uses a trie for the same purpose; the layout below is our own, with
tree attention in the manner of SpecInfer (Miao et al. 2023, arXiv 2305.09781):

    a node   = the last token of a prefix; the path from the root to it spells the prefix
    a slot   = a node's row in the arena, i.e. in the preallocated tensors of keys and values of all layers
    position = depth in the trie
    a mask lets each token look at the slots on its own path only, so slots may lie in any order

So there is no padding, no copy of a cache, no concatenation along a path. A branch that is not needed any more
gives its slots back, and they are used again.
"""

import heapq

import torch

from model import BadInput


class TrieNode:
    """One token after its parent's prefix."""
    __slots__ = ("slot", "children")

    def __init__(self, slot):
        self.slot = slot                # its row in the arena
        self.children = {}              # token -> TrieNode


class TrieCache:
    """The cached forward pass of one Llama.

        trie = TrieCache(model)
        hidden = trie(sequences)        # list of token lists -> (n, d): the final hidden state of each last token
        trie.retain(sequences)          # forget all that none of these sequences needs

    `computed` counts tokens that went through the model, `cached` all others of the requested sequences (computed
    before, or for another sequence of the same call), `attended` the keys on the paths of computed tokens, themselves
    included (masked ones do not count), `peak_slots` the most slots in use.
    """

    def __init__(self, model, capacity=256):
        self.model = model
        self.root = TrieNode(slot=None)         # the empty prefix: no token, no slot
        self.free, self.used = [], 0            # slots given back (a heap), and how many were ever handed out
        self.slots = None                       # where the pass under way writes its keys, see `compute`
        self.computed = self.cached = self.attended = self.peak_slots = 0
        config = model.config
        like = dict(dtype=model.dtype, device=model.device)
        self.arena = torch.zeros(config.num_hidden_layers, 2, config.num_key_value_heads, capacity, config.head_dim,
                                 **like)        # (layers, keys and values, kv_heads, slots, head_dim)
        self.hidden = torch.zeros(capacity, config.hidden_size, **like)         # (slots, d), after the last norm

    @torch.no_grad()
    def __call__(self, sequences):
        """Final hidden states of the last tokens of n sequences (token lists): (n, d).

        What is not in the trie yet is computed in one forward pass. Raises BadInput for an empty sequence and for
        one longer than the model's context; the trie is then unchanged.
        """
        limit = self.model.config.max_position_embeddings
        for sequence in sequences:
            if not 1 <= len(sequence) <= limit:
                raise BadInput(f"a sequence of {len(sequence)} tokens: {self.model.config.name} reads 1 to {limit}")
        tokens, positions, branches, last = [], [], [], []
        for sequence in sequences:
            node, path, start = self.root, [], len(tokens)          # path: the slots from the root to here
            for token in sequence:
                child = node.children.get(token)
                if child is None:
                    child = node.children[token] = TrieNode(self.take_slot())
                    tokens.append(token)
                    positions.append(len(path))
                node = child
                path.append(node.slot)
            if len(tokens) > start:
                branches.append((start, len(tokens), path))
            last.append(node.slot)
        self.cached += sum(map(len, sequences)) - len(tokens)
        if tokens:
            self.compute(tokens, positions, branches)
        return self.hidden[last]                                                # (n, d)

    def compute(self, tokens, positions, branches):
        """One forward pass over n new tokens, given as a flat list. A branch (start, end, path) says that tokens
        start..end are the last ones of the path of slots."""
        n, device = len(tokens), self.model.device
        mask = torch.zeros(n, self.used, dtype=torch.bool)                      # (n, slots): who may look where
        self.slots = torch.empty(n, dtype=torch.long)                           # (n,): where new keys are written
        for start, end, path in branches:
            path = torch.tensor(path)
            known, new = path[:start - end], path[start - end:]
            mask[start:end, known] = True
            mask[torch.arange(start, end)[:, None], new] = torch.ones(len(new), len(new), dtype=torch.bool).tril()
            self.slots[start:end] = new
        self.slots = self.slots.to(device)
        self.computed += n
        self.attended += sum(positions) + n
        self.hidden[self.slots] = self.model(torch.tensor([tokens], device=device),
                                             torch.tensor([positions], device=device), mask.to(device), self)[0]

    def update(self, layer, k, v):
        """Called by each attention layer: store k and v of the new tokens, (1, kv_heads, n, head_dim) each, and
        return those of all slots, (1, kv_heads, slots, head_dim) each."""
        arena = self.arena[layer]
        arena[0, :, self.slots], arena[1, :, self.slots] = k[0], v[0]
        return arena[0, None, :, :self.used], arena[1, None, :, :self.used]

    def take_slot(self):
        """The lowest free slot; when none is left, the arena doubles."""
        if self.free:
            slot = heapq.heappop(self.free)
        else:
            slot, self.used = self.used, self.used + 1
            if self.used > self.arena.shape[3]:
                self.arena = torch.cat((self.arena, torch.zeros_like(self.arena)), dim=3)
                self.hidden = torch.cat((self.hidden, torch.zeros_like(self.hidden)), dim=0)
        self.peak_slots = max(self.peak_slots, self.used - len(self.free))
        return slot

    def retain(self, sequences):
        """Forget every node that is on none of these sequences' paths, and give its slot back."""
        needed = set()
        for sequence in sequences:
            node = self.root
            for token in sequence:
                node = node.children.get(token)
                if node is None:
                    break
                needed.add(node.slot)
        stack = [self.root]
        while stack:
            node = stack.pop()
            for token, child in list(node.children.items()):
                stack.append(child)                     # below a forgotten node, all are forgotten
                if child.slot not in needed:
                    heapq.heappush(self.free, child.slot)
                    if node.slot is None or node.slot in needed:
                        del node.children[token]

    @property
    def bytes_per_slot(self):
        """Bytes of keys and values that one token takes, in all layers together."""
        return self.arena[:, :, :, 0].nbytes
