"""
Text to tokens and back: byte-pair encoding on a local tokenizer.json, and the conversation that is read.

Byte-pair encoding: Sennrich et al. 2016, arXiv 1508.07909. tiktoken does it; nothing is downloaded.
"""

import codecs
import dataclasses
import hashlib
import json
import re
import unicodedata
from dataclasses import dataclass
from pathlib import Path

import tiktoken

from plumbing.errors import BadInput
from plumbing.files import check_keys, parsing
from plumbing.templates import read_special, read_templates
from plumbing.vocabulary import is_proper, read_vocabulary

MOST_BLANKS = 100_000           # in a row, at most: at several times as many, tiktoken's stack overflows


@dataclass
class Template:
    """The tokens around a conversation: prefix + user + infix + reply. A guard that is asked for its verdict
    in words reads the suffix after that."""
    prefix: list
    infix: list
    suffix: list = dataclasses.field(default_factory=list)

    def __call__(self, user, reply=()):
        return [*self.prefix, *user, *self.infix, *reply]

    def opening(self):
        """The tokens before the user's text."""
        return self.prefix


@dataclass
class ChatTemplate(Template):
    """The text around a conversation. Between two control tokens, the template's text and the user's are
    encoded as one: "?" and a line end after it may be one token."""
    tokenizer: object = None
    before: str = ""                # the end of the prefix, after its last control token
    after: str = ""                 # the beginning of the infix, before its first one
    trim: str = ""                  # how the template trims the user's text: a method of str, "" for none

    def __call__(self, user, reply=()):
        text = self.tokenizer.decode(user)
        if self.trim:
            text = getattr(text, self.trim)()
        return [*self.prefix, *self.tokenizer.encode(self.before + text + self.after), *self.infix, *reply]

    def opening(self):
        return self.prefix + self.tokenizer.encode(self.before)


@dataclass
class Prompt:
    """What a search is asked: the user's tokens, and the prefill, which the reply is forced to begin with.
    The policy always reads the prefill. Guard and MRM read it as the beginning of the reply, unless
    hide_prefill is set. It is never part of a result's tokens."""
    user: list
    prefill: list = dataclasses.field(default_factory=list)
    hide_prefill: bool = False

    def policy_tokens(self, template):
        return template(self.user, self.prefill)

    def reward_tokens(self, template):
        return template(self.user, () if self.hide_prefill else self.prefill)


class Tokenizer:
    """Byte-level byte-pair encoding, as a folder's tokenizer.json has it (Hugging Face's format). Beside it
    are read, where they are there: tokenizer_config.json (bos_token, eos_token, chat_template),
    chat_template.jinja, which wins over that, and templates.json, which is ours and wins over both. Raises
    BadInput for what is broken, and for a setting that is not known here and may change the tokens."""

    def __init__(self, folder):
        self.folder = Path(folder)
        path = self.folder / "tokenizer.json"
        vocabulary = read_vocabulary(path)
        with parsing(path, "a byte-level BPE tokenizer"):
            self.encoding = tiktoken.Encoding(
                "", pat_str=vocabulary.pattern, mergeable_ranks=vocabulary.ranks, special_tokens={})
        self.vocabulary = vocabulary
        self.added = vocabulary.added                                           # text to id
        self.ids = [vocabulary.ids.get(token) for token in vocabulary.ranks]    # of each rank, or None
        self.proper = set()                             # tokens whose merges were checked: is_proper
        self.bytes = {i: token for token, i in vocabulary.ids.items()}
        self.bytes |= {i: text.encode() for text, i in self.added.items() if i in vocabulary.shown}
        self.size = 1 + max(*vocabulary.ids.values(), *self.added.values())
        meaning = [vocabulary.pattern, vocabulary.nfc, sorted(self.added.items()),
                   [token.hex() for token in vocabulary.ranks], self.ids]
        self.fingerprint = hashlib.sha256(json.dumps(meaning).encode()).hexdigest()[:12]    # of the content
        self.texts = read_templates(self.folder)
        self.eos_token = self.added.get(read_special(self.folder)[0].get("eos_token"))      # its id, or None

    def encode(self, text):
        """Token ids of plain text: what looks like a control token is ordinary text here. Bytes that have no
        token are left out. Raises BadInput for text that is no valid Unicode, and for MOST_BLANKS."""
        text = unicodedata.normalize("NFC", text) if self.vocabulary.nfc else text
        if any("\ud800" <= c <= "\udfff" for c in text):
            raise BadInput("the text is not valid Unicode: it has unpaired surrogates")
        if re.search(rf"\s{{{MOST_BLANKS}}}", text):
            raise BadInput(f"the text has {MOST_BLANKS} or more blanks in a row")
        with parsing(self.folder, "a tokenizer whose pattern can split this text"):
            ranks = self.encoding.encode_ordinary(text)
        if len(self.encoding.decode_bytes(ranks)) < len(text.encode()):
            raise BadInput(f"{self.folder}: its pre-tokenizer's pattern leaves out a part of the text")
        for token in self.encoding.decode_tokens_bytes(set(ranks)):
            if not is_proper(token, self.vocabulary, self.proper):
                raise BadInput(f"{self.folder}: its merges make {token!r} in another way than by rank")
        return [self.ids[rank] for rank in ranks if self.ids[rank] is not None]

    def template(self, name):
        """The Template of that name (plumbing/templates.py). Control tokens count in its texts."""
        if name not in self.texts:
            raise BadInput(f"{self.folder}: no template {name!r}; expected chat_template in tokenizer_config"
                           ".json or chat_template.jinja, or this template in templates.json")
        with parsing(self.folder, f"a folder whose template {name!r} has a prefix and an infix"):
            parts = {"suffix": "", "trim": ""} | self.texts[name]
            check_keys(parts, {"prefix": None, "infix": None, "suffix": None,
                               "trim": ["", "strip", "lstrip", "rstrip"]})
            prefix, infix, suffix = parts["prefix"], parts["infix"], parts["suffix"]
            if name in ("chat", "turns"):                   # ChatTemplate encodes the text next to the user's
                last = max((match.end() for match in re.finditer(self.control(), prefix)), default=0)
                next_one = re.search(self.control(), infix)
                first = next_one.start() if next_one else len(infix)
                around = {"before": prefix[last:], "after": infix[:first], "trim": parts["trim"]}
                prefix, infix = prefix[:last], infix[first:]
            tokens = [self.encode_template(text) for text in (prefix, infix, suffix)]
        return ChatTemplate(*tokens, self, **around) if name in ("chat", "turns") else Template(*tokens)

    def control(self):
        """The regular expression of all control tokens."""
        return "|".join(map(re.escape, sorted(self.added, key=len, reverse=True))) or "(?!)"

    def encode_template(self, text):
        """Token ids of a template's text, in which the text of a control token means that token."""
        tokens = []
        end = 0
        for match in re.finditer(self.control(), text):
            tokens += self.encode(text[end:match.start()])
            tokens.append(self.added[match[0]])
            end = match.end()
        return tokens + self.encode(text[end:])

    def prompt(self, user, prefill="", hide_prefill=False):
        """A Prompt, tokenized piece by piece. Raises BadInput if the user says nothing."""
        prompt = Prompt(self.encode(user), self.encode(prefill), hide_prefill)
        if not user.strip() or not prompt.user:
            raise BadInput("the prompt is empty; expected some text")
        return prompt

    def decode(self, tokens):
        """The text of token ids, without special tokens; bytes that are no UTF-8 become U+FFFD."""
        return "".join(self.pieces(tokens))

    def token_bytes(self, token):
        """The bytes that a token stands for: none for a special token, nor for one that pads the head."""
        return self.bytes.get(token, b"")

    def pieces(self, tokens):
        """The text that each token adds; joined, the pieces are the whole text. A character whose bytes are
        spread over several tokens comes with the last of them: a stream never shows half of one."""
        decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        pieces = [decoder.decode(self.token_bytes(token)) for token in tokens]
        if pieces:
            pieces[-1] += decoder.decode(b"", final=True)
        return pieces
