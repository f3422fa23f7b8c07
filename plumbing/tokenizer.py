"""
Text to tokens and back: byte-pair encoding on a local tokenizer.json, and the conversation that is read.

Byte-pair encoding: Sennrich et al. 2016, arXiv 1508.07909. tiktoken does it; nothing is downloaded.
"""

import codecs
import dataclasses
import hashlib
import json
import re
from dataclasses import dataclass
from pathlib import Path

import tiktoken

from plumbing.errors import BadInput
from plumbing.files import check_keys, parsing, read_field, read_json, reading
from plumbing.templates import read_splitting, read_templates

BLANKS = 100_000                # in a row, at most: at several times as many, tiktoken's stack overflows


@dataclass
class Template:
    """The tokens around a conversation: prefix + user + infix + reply. A guard that is asked for its verdict
    in words reads the suffix after that."""
    prefix: list
    infix: list
    suffix: list = dataclasses.field(default_factory=list)

    def __call__(self, user, reply=()):
        return [*self.prefix, *user, *self.infix, *reply]


@dataclass
class Prompt:
    """What a search is asked: the user's tokens, and the prefill, which the reply is forced to begin with.

    The policy always reads the prefill. The guard and the MRM read it as the beginning of the reply, unless
    hide_prefill is set. The prefill is never part of a result's tokens.
    """
    user: list
    prefill: list = dataclasses.field(default_factory=list)
    hide_prefill: bool = False

    def policy_tokens(self, template):
        return template(self.user, self.prefill)

    def reward_tokens(self, template):
        return template(self.user, () if self.hide_prefill else self.prefill)


class Tokenizer:
    """Byte-level byte-pair encoding, as a folder's tokenizer.json has it (Hugging Face's format).

    Beside it are read, where they are there: tokenizer_config.json (bos_token, chat_template),
    chat_template.jinja, which wins over that, and templates.json, which is ours and wins over both. Raises
    BadInput for what is broken, and for a setting that is not known here and may change the tokens.
    """

    def __init__(self, folder):
        self.folder = Path(folder)
        path = self.folder / "tokenizer.json"
        raw = read_json(path)
        with reading(path, "a byte-level BPE tokenizer"):
            model = raw["model"]
            added = raw.get("added_tokens") or []
            check_keys(raw, dict.fromkeys("model normalizer pre_tokenizer post_processor decoder "
                                          "added_tokens version padding truncation".split()))
            check_keys(model, dict.fromkeys("vocab merges ignore_merges unk_token fuse_unk".split())
                       | {"type": ["BPE"]})
            self.normalize, pattern = read_splitting(raw)
            self.added = {}                                                   # text to id
            for token in added:
                check_keys(token, dict.fromkeys(("id", "content", "special", "normalized")))
                self.added[read_field(token, "content", str)] = read_field(token, "id", int, 0, 2 ** 31)
            ids = {to_bytes(text): read_field(model["vocab"], text, int, 0, 2 ** 31)
                   for text in model["vocab"] if text not in self.added}
            self.bytes = {i: token for token, i in ids.items()}
            if (min(map(len, [*ids, *self.added])) < 1
                    or len({*ids.values(), *self.added.values()}) < len(ids) + len(added)):
                raise BadInput("a token is empty, or two tokens have one text or one id")
            # Added tokens are never made of a user's text. Those that are not special (<think>) are shown.
            self.bytes |= {token["id"]: token["content"].encode() for token in added
                           if not token.get("special")}
            # tiktoken merges in the order of ranks. An id need not be a rank: self.ids maps back. First come
            # the bytes (some vocabularies lack a few), then what merges make, by the first that makes it.
            # Where whole words are looked up first, tokens that no merge makes come last.
            merges = (merge.split(" ") if isinstance(merge, str) else merge for merge in model["merges"])
            order = [*(bytes([b]) for b in range(256)), *(to_bytes(a + b) for a, b in merges),
                     *(ids if model.get("ignore_merges") else [])]
            ranks = {token: rank for rank, token in enumerate(dict.fromkeys(order))}
            if ranks.keys() - ids.keys() - {*order[:256]}:
                raise BadInput("a merge makes a token that is not in the vocabulary")
            self.ids = [ids.get(token) for token in ranks]                      # of each rank
            self.encoding = tiktoken.Encoding("", pat_str=pattern, mergeable_ranks=ranks, special_tokens={})
            self.size = 1 + max(*ids.values(), *self.added.values())
        meaning = json.dumps([pattern, bool(raw.get("normalizer")), sorted(self.added.items()),
                              [token.hex() for token in ranks], self.ids])
        self.fingerprint = hashlib.sha256(meaning.encode()).hexdigest()[:12]    # equal for equal tokenizers
        self.texts = read_templates(self.folder)

    def encode(self, text):
        """Token ids of plain text: what looks like a control token is ordinary text here. Bytes that have no
        token are left out. Raises BadInput for text that is no valid Unicode, and for endless blanks."""
        text = self.normalize(text)
        if any("\ud800" <= c <= "\udfff" for c in text):
            raise BadInput("the text is not valid Unicode: it has unpaired surrogates")
        if re.search(rf"\s{{{BLANKS}}}", text):
            raise BadInput(f"the text has {BLANKS} or more blanks in a row")
        with parsing(self.folder, "a tokenizer whose pattern can split this text"):
            ranks = self.encoding.encode_ordinary(text)
        if len(self.encoding.decode_bytes(ranks)) < len(text.encode()):
            raise BadInput(f"{self.folder}: its pre-tokenizer's pattern leaves out a part of the text")
        return [self.ids[rank] for rank in ranks if self.ids[rank] is not None]

    def template(self, name):
        """The Template of that name. Its texts are the checkpoint's own, so control tokens count as such."""
        if name not in self.texts:
            raise BadInput(f"{self.folder}: no template {name!r}; expected chat_template in tokenizer_config"
                           ".json or chat_template.jinja, or this template in templates.json")
        with parsing(self.folder, f"a folder whose template {name!r} has a prefix and an infix"):
            parts = {"suffix": ""} | self.texts[name]
            check_keys(parts, dict.fromkeys(("prefix", "infix", "suffix")))
            return Template(*(self.encode_template(parts[part]) for part in ("prefix", "infix", "suffix")))

    def encode_template(self, text):
        """Token ids of a template's text, in which the text of a control token means that token."""
        control = "|".join(map(re.escape, sorted(self.added, key=len, reverse=True))) or "(?!)"
        tokens = []
        end = 0
        for match in re.finditer(control, text):
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


def to_bytes(text):
    """The bytes of a token in tokenizer.json, where a printable character stands for each byte: itself, or
    one from U+0100 on."""
    return bytes(map(BYTE_OF.__getitem__, text))


SELF = [*range(33, 127), *range(161, 173), *range(174, 256)]
OTHERS = [b for b in range(256) if b not in SELF]
BYTE_OF = {chr(b): b for b in SELF} | {chr(256 + i): b for i, b in enumerate(OTHERS)}
