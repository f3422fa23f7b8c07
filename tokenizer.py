"""
Text to tokens and back: byte-pair encoding on a local vocabulary, and the texts that stand around a
conversation.

Byte-pair encoding: Sennrich et al. 2016, arXiv 1508.07909. tiktoken does it; nothing is downloaded.
"""

import base64
import codecs
import hashlib
import sys
import unicodedata
from dataclasses import dataclass, field
from pathlib import Path

import tiktoken

from files import BadInput, read_json, reading


@dataclass
class Template:
    """The tokens around a conversation: prefix + user + infix + reply. A guard that is asked for its verdict
    in words reads the suffix after that."""
    prefix: list
    infix: list
    suffix: list = field(default_factory=list)

    def __call__(self, user, reply=()):
        return [*self.prefix, *user, *self.infix, *reply]


@dataclass
class Prompt:
    """What a search is asked: the user's tokens, and the prefill, which the reply is forced to begin with.

    The policy always reads the prefill. The guard and the MRM read it as the beginning of the reply, unless
    hide_prefill is set. It is never part of a result's tokens.
    """
    user: list
    prefill: list = field(default_factory=list)
    hide_prefill: bool = False

    def policy_tokens(self, template):
        return template(self.user, self.prefill)

    def reward_tokens(self, template):
        return template(self.user, () if self.hide_prefill else self.prefill)


class Tokenizer:
    """Byte-pair encoding on the vocabulary of a folder.

    It holds vocab.tiktoken (one line for each token: base64 of its bytes, its rank) and
    tokenizer_config.json, of which these fields are read: `pattern` (the pre-tokenizer's regular expression),
    `special_tokens` (text to id) and `templates` (name to {"prefix": text, "infix": text}, in which control
    tokens count as such). Raises BadInput when one of the files is absent or broken.
    """

    def __init__(self, folder):
        path, self.path = Path(folder) / "vocab.tiktoken", Path(folder) / "tokenizer_config.json"
        config = read_json(self.path)
        for name in ("special_tokens", "templates", "pattern"):
            if name not in config:
                raise BadInput(f"{self.path}: the field {name} is missing")
        with reading(path, "a readable vocabulary"):
            data = path.read_bytes()
            lines = map(bytes.split, data.splitlines())
            ranks = {base64.b64decode(token): int(rank) for token, rank in lines}
            self.special, self.templates = dict(config["special_tokens"]), config["templates"]
            self.size = max(*ranks.values(), *self.special.values()) + 1
            # tiktoken stops the program at a byte that has no token (SmolLM2 lacks 21 that are rare or no
            # UTF-8): such a byte gets an id beyond the vocabulary here, and `encode` leaves it out.
            absent = [bytes([b]) for b in range(256) if bytes([b]) not in ranks]
            ranks |= {byte: self.size + i for i, byte in enumerate(absent)}
            self.encoding = tiktoken.Encoding(path.stem, pat_str=config["pattern"], mergeable_ranks=ranks,
                                              special_tokens=self.special)
        self.fingerprint = hashlib.sha256(data).hexdigest()[:12]        # equal for equal vocabularies
        self.control = set(self.special.values())

    def encode(self, text):
        """Token ids of plain text: what looks like a control token is ordinary text here. Bytes that have no
        token are left out. Raises BadInput for text with unpaired surrogates, which is not Unicode."""
        if any("\ud800" <= c <= "\udfff" for c in text):
            raise BadInput("the text is not valid Unicode: it has unpaired surrogates")
        return [token for token in self.encoding.encode_ordinary(text) if token < self.size]

    def template(self, name):
        """The Template of that name. Its texts are the repository's own, so control tokens are allowed."""
        try:
            parts = {"suffix": ""} | self.templates[name]
            texts = [parts[part] for part in ("prefix", "infix", "suffix")]
        except (KeyError, TypeError):
            raise BadInput(f"{self.path}: no template {name!r} with a prefix and an infix") from None
        return Template(*(self.encoding.encode(text, allowed_special="all") for text in texts))

    def prompt(self, user, prefill="", hide_prefill=False):
        """A Prompt, tokenized piece by piece. Raises BadInput for an empty text."""
        prompt = Prompt(self.encode(user), self.encode(prefill), hide_prefill)
        if not user.strip() or not prompt.user:
            raise BadInput("the prompt is empty; expected some text")
        return prompt

    def decode(self, tokens):
        """The text of token ids, without control tokens; bytes that are no UTF-8 become U+FFFD."""
        return "".join(self.pieces(tokens))

    def token_bytes(self, token):
        """The bytes that a token stands for: none for a control token, nor for one that pads the head."""
        silent = token in self.control or token >= self.size
        return b"" if silent else self.encoding.decode_single_token_bytes(token)

    def pieces(self, tokens):
        """The text that each token adds; joined, the pieces are the whole text. A character whose bytes are
        spread over several tokens comes with the last of them: a stream never shows half of one."""
        decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        pieces = [decoder.decode(self.token_bytes(token)) for token in tokens]
        tail = decoder.decode(b"", final=True)
        return pieces[:-1] + [pieces[-1] + tail] if pieces else pieces


def read_prompts(prompt):
    """The prompts that an argument stands for: itself, with - all of standard input, with FILE:path one a
    line. Raises BadInput for a file that has none or is no text."""
    path = prompt.removeprefix("FILE:")
    if prompt not in ("-", f"FILE:{path}"):
        return [prompt]
    with reading(f"--prompt {prompt}", "UTF-8"):
        text = (sys.stdin.buffer.read() if prompt == "-" else Path(path).read_bytes()).decode("utf-8")
    if prompt == "-":
        return [text.rstrip("\n")]
    lines = [line for line in text.splitlines() if line.strip()]
    if not lines:
        raise BadInput(f"--prompt {prompt}: expected one prompt a line, but the file is empty")
    return lines


def printable(text):
    """Without control characters that a terminal would obey: a model may write any byte."""
    return "".join("\ufffd" if unicodedata.category(c) == "Cc" and c not in "\n\t" else c for c in text)
