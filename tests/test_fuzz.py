"""Whatever stands in a file from outside, reading it works or ends in one line.
2,000 seeded damaged files."""

import contextlib
import copy
import json
import random
import shutil
import time

import pytest
import torch
from conftest import GOLDEN, write_json, write_tokenizer
from plumbing.checkpoint import load_llama

from plumbing.adapters import load_adapter, save_adapter
from plumbing.released import load_released_mrm
from plumbing.tables import HARMFUL, markdown, read_results, summarize
from plumbing.errors import BadInput
from mrm import MRM, add_lora
from safetensors.torch import load_file, save
from plumbing.tokenizer import Template, Tokenizer

HOSTILE = [None, True, False, "", "text", "2", -1, 0, 1, 3, 10 ** 9, 10 ** 30, 2 ** 63, 0.5, -0.0, 1e308,
           float("nan"), float("inf"), [], {}, [[]], [None], ["a", 1], {"a": 1}, "\ud83d", "\x1b[31m",
           "\u202e", "(", "(a+)+$", [1] * 50, "../../x", "llama3", "yarn", {"Regex": ""},
           {"type": "Sequence", "normalizers": []}]


def places(value, path=()):
    """The paths of all values in a JSON document."""
    yield path
    for key in (value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()):
        yield from places(value[key], (*path, key))


def damaged(document, pick):
    """The text of a JSON document after one to three changes, or with bytes of it changed."""
    document = copy.deepcopy(document)
    for _ in range(pick.randint(1, 3)):
        *parents, last = pick.choice([path for path in places(document) if path] or [("new",)])
        at = document
        for key in parents:
            at = at[key]
        if pick.random() < 0.15 and last != "new":
            del at[last]
        elif isinstance(at, dict) and pick.random() < 0.2:
            at[pick.choice(["new", "quantization_config", "sliding_window", "layer_types"])] = pick.choice(
                HOSTILE)
        else:
            at[last] = copy.deepcopy(pick.choice(HOSTILE))
    text = json.dumps(document)
    kind = pick.random()
    if kind < 0.05:
        return text[:pick.randrange(len(text))]
    if kind < 0.1:
        at = pick.randrange(len(text))
        return text[:at] + pick.choice("{}[]\",:x\x00\ufeff") + text[at + 1:]
    return "[" * 200_000 if kind < 0.11 else text


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint")
    shutil.copytree(GOLDEN / "tiny_guard", folder, dirs_exist_ok=True)
    write_tokenizer(folder, {b: b + 10 for b in range(256)}, {"<s>": 0, "<e>": 7}, bos="<s>")
    write_json(folder / "generation_config.json", {"eos_token_id": [7, 8]})
    return folder


@contextlib.contextmanager
def replaced(path, text):
    """The file with another text, and afterwards as it was."""
    before = path.read_bytes()
    path.write_bytes(text.encode("utf-8", "surrogatepass"))
    try:
        yield
    finally:
        path.write_bytes(before)


def configs(checkpoint, out):
    """A checkpoint whose config.json or generation_config.json is damaged."""
    shutil.copytree(checkpoint, out, dirs_exist_ok=True)
    for name, share in (("config.json", 4), ("generation_config.json", 1)):
        document = json.loads((checkpoint / name).read_text())

        def read(text):
            with replaced(out / name, text):
                load_llama(out)(torch.tensor([[1, 2, 3]]))
        yield document, share, read


def tokenizers(checkpoint, out):
    shutil.copytree(checkpoint, out, dirs_exist_ok=True)
    for name, share in (("tokenizer.json", 5), ("tokenizer_config.json", 3)):
        document = json.loads((checkpoint / name).read_text())

        def read(text):
            with replaced(out / name, text):
                tokenizer = Tokenizer(out)
                tokenizer.decode([*tokenizer.encode("Hello <s> world é"), 500, 511])
                for template in ("chat", "reward"):
                    tokenizer.template(template)([1], [2])
        yield document, share, read


def adapters(checkpoint, out):
    llama = load_llama(checkpoint)
    mrm = MRM(add_lora(llama, 2, 4, ["q_proj"], 1), llama.tokenizer.template("reward"))
    save_adapter(mrm, out.with_suffix(".safetensors"), 2, 4, ["q_proj"], 1, "command")
    tensors = load_file(out.with_suffix(".safetensors"))
    document = {"kind": "mrm", "base": "x", "base_fingerprint": llama.fingerprint,
                "vocabulary": llama.vocabulary, "rank": 2, "alpha": 4, "targets": ["q_proj"],
                "first_layer": 1, "template": [[0, 21], [22, 23]], "command": "c"}

    def read(text):
        try:
            metadata = {key: json.dumps(value) for key, value in json.loads(text).items()}
        except Exception:
            metadata = {"kind": text.encode("utf-8", "replace").decode()}
        out.with_suffix(".safetensors").write_bytes(save(tensors, metadata))
        load_adapter(out.with_suffix(".safetensors"), llama, "mrm")
    yield document, 4, read
    released = shutil.copytree(GOLDEN / "tiny_mrm", out.parent / "released", dirs_exist_ok=True)

    def read_released(text):
        (released / "adapter_config.json").write_bytes(text.encode("utf-8", "surrogatepass"))
        load_released_mrm(released, llama, Template([0], [1]))
    yield json.loads((GOLDEN / "tiny_mrm" / "adapter_config.json").read_text()), 4, read_released


def results(checkpoint, out):
    out.mkdir()
    row = {"row": 0, "safety": "saffron", "width": 4, "source": "a, line 1", "prompt": "p", "text": "t",
           "refused": False, **dict.fromkeys(HARMFUL, 0.5),
           "asr": True, "judge_asr": False, "degenerate": False}

    def read(text):
        (out / "results.jsonl").write_bytes(
            json.dumps(row).encode() + b"\n" + text.encode("utf-8", "surrogatepass") + b"\n")
        markdown(summarize(read_results(out), None))
    yield row | {"row": 1, "category": "harmless"}, 4, read


@pytest.mark.parametrize("kind", [configs, tokenizers, adapters, results])
def test_a_damaged_file_works_or_gives_one_line(checkpoint, tmp_path, kind, capsys):
    pick, started, refused, count = random.Random(kind.__name__), time.time(), 0, 0
    for document, share, read in kind(checkpoint, tmp_path / "copy"):
        for _ in range(500 * share // {configs: 5, tokenizers: 8, adapters: 8, results: 4}[kind]):
            text, count = damaged(document, pick), count + 1
            try:
                read(text)
            except BadInput as error:
                refused += 1
                assert "\n" not in str(error) and 10 < len(str(error)) < 700, error
            except Exception as error:
                raise AssertionError(f"{type(error).__name__}: {error}\n{text[:2000]}") from error
    with capsys.disabled():
        print(f"\n{kind.__name__}: {count} files, {refused} refused, {time.time() - started:.1f} s")
    assert count > 490 and 0.3 < refused / count < 1
