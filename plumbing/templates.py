"""
What stands beside the vocabulary: how a tokenizer.json splits text into words, and the texts around a
conversation.
"""

import json
import unicodedata

import jinja2.sandbox

from plumbing.errors import BadInput
from plumbing.files import check_keys, read_field, read_json, read_text, reading

# GPT-2's pre-tokenizer, and the same without digits, which were split off first, singly or in runs.
GPT2 = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
AFTER_DIGITS = r"|'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?[^\s\p{L}\p{N}]+|\s+(?=\p{N})|\s+(?!\S)|\s+"
MARKER = "saffron's user"       # stands for the user's text while a chat_template is rendered


def read_splitting(raw):
    """(normalizer, the regular expression that splits text into words) of a tokenizer.json."""
    form = raw.get("normalizer")
    split = raw["pre_tokenizer"]
    check_keys(form or {}, {"type": ["NFC"]})
    harmless = dict.fromkeys(("trim_offsets", "use_regex"))
    check_keys(raw["decoder"], harmless | {"type": ["ByteLevel"], "add_prefix_space": None})
    *first, last = split["pretokenizers"] if split["type"] == "Sequence" else [split]
    check_keys(last, harmless | {"type": ["ByteLevel"]})
    kinds = [part["type"] for part in first] + [last.get("use_regex", True)]
    pattern = GPT2
    if kinds == ["Digits", True]:
        check_keys(first[0], {"type": None, "individual_digits": None})
        pattern = (r"\p{N}" if first[0]["individual_digits"] else r"\p{N}+") + AFTER_DIGITS
    elif kinds == ["Split", False]:
        check_keys(first[0], {"type": None, "pattern": None, "behavior": ["Isolated"]})
        pattern = read_field(first[0]["pattern"], "Regex", str) or "(?!)"  # the empty one matches too much
    elif kinds != [True]:
        raise BadInput(f"pre_tokenizer = {json.dumps(split)[:200]} is not supported; expected ByteLevel with "
                       "its own pattern, one Split and ByteLevel without, or Digits and ByteLevel")
    return (lambda text: unicodedata.normalize("NFC", text)) if form else str, pattern


def read_templates(folder):
    """{"chat": {"prefix": text, "infix": text}, "reward": ...} of a folder; "chat" only where it has one. The
    chat_template is rendered once, around a marker in the place of the user's text, without thinking."""
    path = folder / "tokenizer_config.json"
    jinja = folder / "chat_template.jinja"
    config = read_json(path) if path.exists() else {}
    with reading(path, "a tokenizer's configuration"):
        if config.get("add_prefix_space"):
            raise BadInput("add_prefix_space = true is not supported")
        special = {key: value if isinstance(value, str) else read_field(value, "content", str)
                   for key, value in config.items()
                   if key in ("bos_token", "eos_token", "unk_token", "pad_token") and value}
        texts = {"reward": {"prefix": special.get("bos_token", "") + "\n\nUser:", "infix": "\n\nAgent:"}}
        source = config.get("chat_template")
        if isinstance(source, list):
            source = {one["name"]: one["template"] for one in source}["default"]
    if jinja.exists():
        path = jinja
        source = read_text(jinja)
    if source:
        with reading(path, "a chat template"):
            environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
                trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"])
            text = environment.from_string(source).render(
                messages=[{"role": "user", "content": MARKER}], add_generation_prompt=True,
                enable_thinking=False, **special)
            if text.count(MARKER) != 1:
                raise BadInput("the chat_template must contain the user's text exactly once")
            texts["chat"] = dict(zip(("prefix", "infix"), text.split(MARKER)))
    ours = folder / "templates.json"
    return texts | (read_json(ours) if ours.exists() else {})
