"""
What a folder's chat_template writes before and after the user's text: it is rendered around a marker.
"""

import datetime
import json
from pathlib import Path

import jinja2
import jinja2.ext
import jinja2.sandbox

from plumbing.errors import BadInput
from plumbing.files import read_field, read_json, read_text, reading

MARKER = "saffron's user"               # stands for the user's text
REPLY = "saffron's reply"               # stands for the reply, for a guard that reads both
BLANKS = " \n "
TODAY = datetime.date(2024, 7, 26)      # for a template that asks for the date: the same tokens on every day


def read_special(folder):
    """(texts of bos_token, eos_token, ..., the chat_template or None, the file that has it) of a folder."""
    path = folder / "tokenizer_config.json"
    config = read_json(path) if path.exists() else {}
    with reading(path, "a tokenizer's configuration"):
        if config.get("add_prefix_space"):
            raise BadInput("add_prefix_space = true is not supported")
        special = {key: value if isinstance(value, str) else read_field(value, "content", str)
                   for key, value in config.items()
                   if key in ("bos_token", "eos_token", "unk_token", "pad_token") and value}
        source = config.get("chat_template")
        if isinstance(source, list):
            source = {one["name"]: one["template"] for one in source}["default"]
    if (folder / "chat_template.jinja").exists():
        path = folder / "chat_template.jinja"
        source = read_text(path)
    return special, source, path


def read_templates(folder):
    """{"chat": {"prefix": text, "infix": text, "trim": ...}, "reward": ...} of a folder; "chat" only where it
    has a chat_template. "reward" is what guard and MRM of this repository read (mrm.py). A Llama Guard's
    folder has a "guard" too, in its templates.json; "turns" is a Qwen3Guard's, and its loader makes it."""
    special, source, path = read_special(folder)
    texts = {"reward": {"prefix": special.get("bos_token", "") + "\n\nUser:", "infix": "\n\nAgent:"}}
    if source:
        with reading(path, "a chat template"):
            texts["chat"] = chat_texts(source, special)
    ours = folder / "templates.json"
    return texts | (read_json(ours) if ours.exists() else {})


def chat_texts(source, special):
    """Prefix and infix of a chat_template, and how it trims the user's text (a method of str, or ""), which
    is found by rendering it twice. Raises BadInput where it does something else with that text."""
    plain = render(source, MARKER, special)
    if plain.count(MARKER) != 1:
        raise BadInput("the chat_template must contain the user's text exactly once")
    prefix, infix = plain.split(MARKER)
    user = BLANKS + MARKER + BLANKS
    spaced = render(source, user, special)
    for trim in ("", "strip", "lstrip", "rstrip"):
        if spaced == prefix + (getattr(user, trim)() if trim else user) + infix:
            return {"prefix": prefix, "infix": infix, "trim": trim}
    raise BadInput("the chat_template changes the blanks around the user's text, and does not just trim them")


def opens_thinking(llama):
    """Whether a chat format lets a reply begin within <think>, although it is told not to."""
    return llama.tokenizer.texts.get("chat", {}).get("infix", "").rstrip().endswith("<think>")


def both_turns(folder, add_generation_prompt):
    """Prefix, infix and suffix of a folder's chat_template around the user's text and a reply to it."""
    special, source, path = read_special(Path(folder))
    with reading(path, "a chat template"):
        text = render(source or "", MARKER, special, REPLY, add_generation_prompt)
        if text.count(MARKER) != 1 or text.count(REPLY) != 1:
            raise BadInput("the chat_template must contain the user's text and the reply exactly once")
        prefix, rest = text.split(MARKER)
        infix, suffix = rest.split(REPLY)
        if suffix.rstrip().endswith("<think>"):
            raise BadInput("the chat_template opens <think>, so a guard would not begin with its verdict")
    return {"prefix": prefix, "infix": infix, "suffix": suffix}


def render(source, user, special, reply=None, add_generation_prompt=True):
    """The conversation of one user's message, and perhaps a reply, as a template writes it, without thinking.
    The functions are those that transformers gives to templates."""
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", Generation])
    environment.filters["tojson"] = tojson
    environment.globals |= {"raise_exception": raise_exception, "strftime_now": TODAY.strftime}
    messages = [{"role": "user", "content": user}]
    if reply is not None:
        messages.append({"role": "assistant", "content": reply})
    return environment.from_string(source).render(
        messages=messages, add_generation_prompt=add_generation_prompt, enable_thinking=False, **special)


class Generation(jinja2.ext.Extension):
    """{% generation %} ... {% endgeneration %}, which marks what a model has said: just what is inside."""
    tags = {"generation"}

    def parse(self, parser):
        next(parser.stream)
        return parser.parse_statements(["name:endgeneration"], drop_needle=True)


def raise_exception(message):
    raise jinja2.TemplateError(message)


def tojson(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
    """JSON as it is, where jinja's own would escape < and > for HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators,
                      sort_keys=sort_keys)
