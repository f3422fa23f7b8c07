"""
A tokenizer.json of the Hugging Face hub, as byte-pair encoding by tiktoken needs it.

What may change the tokens and is not known here is refused by name.
"""

import json
from dataclasses import dataclass

from plumbing.errors import BadInput
from plumbing.files import check_keys, read_field, read_json, reading

# GPT-2's pre-tokenizer, and the same without digits, which were split off first, singly or in runs.
GPT2 = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
AFTER_DIGITS = r"|'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?[^\s\p{L}\p{N}]+|\s+(?=\p{N})|\s+(?!\S)|\s+"

# In tokenizer.json a printable character stands for each byte: itself, or one from U+0100 on.
SELF = [*range(33, 127), *range(161, 173), *range(174, 256)]
OTHERS = [b for b in range(256) if b not in SELF]
BYTE_OF = {chr(b): b for b in SELF} | {chr(256 + i): b for i, b in enumerate(OTHERS)}


@dataclass
class Vocabulary:
    pattern: str                # the regular expression that splits text into words
    nfc: bool                   # whether text is brought into Unicode's normal form C first
    added: dict                 # of each added token's text: its id. They are never made of plain text
    shown: set                  # ids of added tokens that are part of a reply's text (<think>)
    ids: dict                   # of each other token's bytes: its id
    ranks: dict                 # of each token's bytes: its place in the order of merging
    halves: dict                # of each token that one merge makes: what that merges


def read_vocabulary(path):
    """The Vocabulary of a tokenizer.json. Raises BadInput for what is broken, and for a setting that is not
    known here and may change the tokens.

    tiktoken merges in the order of ranks. An id need not be a rank. First come the bytes (some vocabularies
    lack a few), then what merges make, by the first that makes it. Where whole words are looked up first
    (ignore_merges), tokens that no merge makes come last."""
    raw = read_json(path)
    with reading(path, "a byte-level BPE tokenizer"):
        model = raw["model"]
        check_keys(raw, dict.fromkeys("model normalizer pre_tokenizer post_processor decoder added_tokens "
                                      "version padding truncation".split()))
        check_keys(model, dict.fromkeys("vocab merges ignore_merges unk_token fuse_unk".split())
                   | {"type": ["BPE"]})
        added = {}
        shown = set()
        for token in raw.get("added_tokens") or []:
            check_keys(token, dict.fromkeys(("id", "content", "special", "normalized")))
            added[read_field(token, "content", str)] = read_field(token, "id", int, 0, 2 ** 31)
            if not token.get("special"):
                shown.add(token["id"])
        ids = {to_bytes(text): read_field(model["vocab"], text, int, 0, 2 ** 31)
               for text in model["vocab"] if text not in added}
        if (min(map(len, [*ids, *added])) < 1 or len({*ids.values(), *added.values()})
                < len(ids) + len(raw.get("added_tokens") or [])):
            raise BadInput("a token is empty, or two tokens have one text or one id")
        merges = []
        for merge in model["merges"]:
            left, right = merge.split(" ") if isinstance(merge, str) else merge
            merges.append((to_bytes(left), to_bytes(right)))
        order = [bytes([b]) for b in range(256)] + [left + right for left, right in merges]
        if model.get("ignore_merges"):
            order += ids
        ranks = {token: rank for rank, token in enumerate(dict.fromkeys(order))}
        if ranks.keys() - ids.keys() - {*order[:256]}:
            raise BadInput("a merge makes a token that is not in the vocabulary")
        halves = {} if model.get("ignore_merges") else halves_of(merges)
        pattern = read_pattern(raw)
        nfc = bool(raw.get("normalizer"))
    return Vocabulary(pattern, nfc, added, shown, ids, ranks, halves)


def to_bytes(text):
    return bytes(map(BYTE_OF.__getitem__, text))


def read_pattern(raw):
    """The regular expression that splits text into words."""
    split = raw["pre_tokenizer"]
    check_keys(raw.get("normalizer") or {}, {"type": ["NFC"]})
    harmless = dict.fromkeys(("trim_offsets", "use_regex"))
    check_keys(raw["decoder"], harmless | {"type": ["ByteLevel"], "add_prefix_space": None})
    *first, last = split["pretokenizers"] if split["type"] == "Sequence" else [split]
    check_keys(last, harmless | {"type": ["ByteLevel"]})
    kinds = [part["type"] for part in first] + [last.get("use_regex", True)]
    if kinds == [True]:
        return GPT2
    if kinds == ["Digits", True]:
        check_keys(first[0], {"type": None, "individual_digits": None})
        return (r"\p{N}" if first[0]["individual_digits"] else r"\p{N}+") + AFTER_DIGITS
    if kinds == ["Split", False]:
        check_keys(first[0], {"type": None, "pattern": None, "behavior": ["Isolated"]})
        return read_field(first[0]["pattern"], "Regex", str) or "(?!)"      # the empty one matches too much
    raise BadInput(f"pre_tokenizer = {json.dumps(split)[:200]} is not supported; expected ByteLevel with its "
                   "own pattern, one Split and ByteLevel without, or Digits and ByteLevel")


def halves_of(merges):
    """{token: its two halves} of the tokens that one merge makes. Raises BadInput for a token with several
    merges, unless these stand one after another: then they are all the ways to make it (Llama 3)."""
    ways = {}
    last = None
    for left, right in merges:
        token = left + right
        if token in ways and token != last:
            raise BadInput(f"the merges make {token!r} at two places of the list")
        ways.setdefault(token, []).append((left, right))
        last = token
    return {token: pairs[0] for token, pairs in ways.items() if len(pairs) == 1}


def is_proper(token, vocabulary, known):
    """Whether merging by rank, as tiktoken does, makes a token as its one listed merge does, which alone
    counts in Hugging Face's library. known: a set of tokens that are proper, which grows.

    Of the token's own text, its halves l and r are made first, if no earlier merge takes a piece of both. On
    the way there, l ends with l itself, its right half, the right half of that, ...; r begins likewise. Two
    such pieces stand side by side until one of them is merged with its other half."""
    if token in known or token not in vocabulary.halves:
        return True
    left, right = vocabulary.halves[token]
    if not is_proper(left, vocabulary, known) or not is_proper(right, vocabulary, known):
        return False
    never = len(vocabulary.ranks)
    ends = [(left, never)]                      # pieces that l ends with, and until when each is there
    while ends[-1][0] in vocabulary.halves:
        ends.append((vocabulary.halves[ends[-1][0]][1], vocabulary.ranks[ends[-1][0]]))
    beginnings = [(right, never)]
    while beginnings[-1][0] in vocabulary.halves:
        beginnings.append((vocabulary.halves[beginnings[-1][0]][0], vocabulary.ranks[beginnings[-1][0]]))
    for x, until_x in ends:
        for y, until_y in beginnings:
            rank = vocabulary.ranks.get(x + y, never)
            # (Of two merges of one rank, the one on the left comes first.)
            if rank < until_x and rank <= until_y and (x, y) != (left, right):
                return False
    known.add(token)
    return True
