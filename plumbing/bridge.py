"""
A search of one vocabulary asks a guard of another: by the text that both can read.
"""

import codecs
import dataclasses

from engine import Reader
from plumbing.errors import BadInput


class Bridge:
    """A guard with another vocabulary than the policy's. It reads the text of the policy's tokens, in tokens
    of its own. Half a character at the end is left out. The policy's end of sequence becomes the guard's."""
    kind = "guard"
    shared_pass = None

    def __init__(self, policy, guard):
        self.policy = policy
        self.guard = guard

    def tokens(self, tokens, before=b""):
        """The policy's tokens as the guard's. before: the bytes of a
        character that the prefill began and did not finish."""
        text, _ = self.decoded(tokens, before)
        llama = self.guard.llama
        ended = tokens and tokens[-1] in self.policy.config.eos_token_ids
        end = [llama.config.end_of_turn] if ended and llama.config.eos_token_ids else []
        return llama.tokenizer.encode(text) + end

    def decoded(self, tokens, before=b""):
        """(the text of the policy's tokens, the bytes of half a character at their end)."""
        decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        text = decoder.decode(before + b"".join(map(self.policy.tokenizer.token_bytes, tokens)))
        return text, decoder.getstate()[0]

    def prompt(self, prompt):
        return dataclasses.replace(prompt, user=self.tokens(prompt.user), prefill=self.tokens(prompt.prefill))

    def half(self, prompt):
        """The bytes of half a character at the end of the prefill, if the guard reads that."""
        return b"" if prompt.hide_prefill else self.decoded(prompt.prefill)[1]

    def score(self, prompt, replies):
        """As Guard.score."""
        half = self.half(prompt)
        return self.guard.score(self.prompt(prompt), [self.tokens(reply, half) for reply in replies])

    def reader(self, prompt):
        return BridgeReader(self, prompt)


class BridgeReader(Reader):
    """A Reader for a Bridge. It encodes the whole reply each time, and goes on from the longest beginning
    that is in the trie."""

    def __init__(self, bridge, prompt):
        guard = bridge.guard
        context = bridge.prompt(prompt).reward_tokens(guard.template)
        super().__init__(guard.llama, context, guard.template.suffix, "rewards", guard.reward)
        self.bridge = bridge
        self.half = bridge.half(prompt)

    def remember(self, branch, node):
        """Nothing: the beginning of a text may have other tokens than the whole."""

    def nearest(self, branch):
        tokens = self.context + self.bridge.tokens(branch.tokens, self.half)
        config = self.trie.model.config
        if len(tokens) + len(self.suffix) > config.max_position_embeddings:
            raise BadInput("prompt and reply are longer than the "
                           f"{config.max_position_embeddings} tokens that the guard {config.name} reads")
        node = self.trie.root
        known = 0
        while known < len(tokens) and tokens[known] in node.children:
            node = node.children[tokens[known]]
            known += 1
        return node, tokens[known:]
