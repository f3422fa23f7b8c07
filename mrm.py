"""
Reward models: the guard R(s), one reward for a sequence, and the multifurcation reward model M(s), one reward for
every next token at once. Source: Qiu et al. 2025, "Saffron-1", arXiv 2506.06444, called "the paper" below.

Both are a frozen Llama with LoRA (Hu et al. 2021, arXiv 2106.09685) and a small head of their own:

    guard   R(s)   = w · h(s) + b0              a scalar, the log-odds that s is safe: R(s) < 0 means unsafe
    MRM     M(s)_a = gain · (h(s) · W_a) + b_a  ≈ R(s·a), W the frozen unembedding, b a trainable bias

h(s) is the final hidden state of the last token of s. Both read the tokens of a conversation in the template

    bos "\\n\\nUser:" prompt "\\n\\nAgent:" reply

An adapter (all that was trained, and what it was trained on) is one small safetensors file. In the guard's place, a
Llama Guard can stand, which has no LoRA and a template of its own: llama_guard.

Shapes: n sequences, T tokens, d = hidden_size, V = vocab_size, r = LoRA rank.
"""

import copy
import hashlib
import json
import math
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from model import BadInput, Llama, Template, read_json, read_tensors, write_file
from trie_cache import TrieCache

# ---------------------------------------------------------------------------------------------------------------
# LoRA

PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


class LoRALinear(nn.Module):
    """y = x Wᵀ + (alpha / r) (x Aᵀ) Bᵀ with W frozen; B starts at zero, so that training starts at W."""

    def __init__(self, linear, rank, alpha):
        super().__init__()
        d_out, d_in = linear.weight.shape
        self.linear, self.scale = linear, alpha / rank
        like = dict(dtype=linear.weight.dtype, device=linear.weight.device)
        self.lora_A = nn.Parameter(torch.randn(rank, d_in, **like) / math.sqrt(d_in))       # (r, d_in)
        self.lora_B = nn.Parameter(torch.zeros(d_out, rank, **like))                        # (d_out, r)

    def forward(self, x):
        return self.linear(x) + self.scale * F.linear(F.linear(x, self.lora_A), self.lora_B)


def add_lora(llama, rank, alpha, targets, first_layer=0):
    """A copy of `llama` with LoRA on the target projections of layers first_layer and up. All frozen weights are
    shared with the original, not copied. A is drawn from torch's global generator. Raises BadInput for a rank below
    1, a layer that is not there and a projection that no Llama has."""
    layers = llama.config.num_hidden_layers
    for what, value, ok, allowed in (
            ("rank", rank, rank >= 1, "at least 1"),
            ("first layer", first_layer, 0 <= first_layer < layers, f"between 0 and {layers - 1}"),
            ("targets", targets, targets and set(targets) <= set(PROJECTIONS), f"some of {', '.join(PROJECTIONS)}")):
        if not ok:
            raise BadInput(f"LoRA's {what} cannot be {value}: it must be {allowed}")
    llama = shallow_copy(llama)
    for block in llama.model.layers[first_layer:]:
        for name in targets:
            part = part_of(block, name)
            setattr(part, name, LoRALinear(getattr(part, name), rank, alpha))
    return llama


def shallow_copy(module):
    """New modules around the very same tensors: a module can be replaced without a change to the original."""
    new = copy.copy(module)
    new._modules = {name: shallow_copy(child) for name, child in module._modules.items()}
    return new


def part_of(block, name):
    """The module of a block that has the projection of that name."""
    return block.self_attn if hasattr(block.self_attn, name) else block.mlp


# ---------------------------------------------------------------------------------------------------------------
# the two reward models

class Guard(nn.Module):
    """R(s): a scalar head on every token, so that one forward pass scores every prefix of a reply."""

    kind = "guard"

    def __init__(self, llama, template):
        super().__init__()
        self.llama, self.template = llama, template
        self.head = nn.Linear(llama.config.hidden_size, 1, dtype=llama.dtype, device=llama.device)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def rewards(self, hidden):
        """R of the sequences that end at these hidden states (suffix included, where the template has one):
        (..., d) -> (...)."""
        return self.head(hidden).squeeze(-1)

    def score(self, prompt, replies):
        """R of n replies to a Prompt, a token list each: (n,). Any object with this method can be a search's guard. A guard
        that has `llama`, `template` and `rewards` besides, as this one, is read through a trie of the search's own."""
        context, suffix = prompt.reward_tokens(self.template), self.template.suffix
        return self.rewards(TrieCache(self.llama)([context + reply + suffix for reply in replies]))


def llama_guard(llama):
    """The guard that a Llama Guard is (Inan et al. 2023, arXiv 2312.06674), the paper's PRM: R(s) = logit("safe") −
    logit("unsafe") of the first word that it says of s, for which the template's suffix asks. As a head: the difference
    of two rows of the unembedding. Raises BadInput when one of the two words is not one token."""
    guard = Guard(llama, llama.tokenizer.template("guard"))
    safe, unsafe = (llama.tokenizer.encode(word) for word in ("safe", "unsafe"))
    if len(safe) != 1 or len(unsafe) != 1:
        raise BadInput(f"{llama.config.name}: a Llama Guard needs a vocabulary with the tokens safe and unsafe")
    guard.head.weight.data = llama.lm_head.weight[safe] - llama.lm_head.weight[unsafe]      # (1, d)
    return guard.requires_grad_(False)


class MRM(nn.Module):
    """M(s): the rewards of all next tokens at once, the paper's multifurcation reward model.

    `unseen` marks V_unseen: the tokens that were not supervised, or too seldom, so that M knows nothing of them.
    (train_mrm.py never puts end-of-sequence there: a search must be able to end.)
    """

    kind = "mrm"

    def __init__(self, llama, template):
        super().__init__()
        self.llama, self.template = llama, template
        like = dict(dtype=llama.dtype, device=llama.device)
        # Language-model logits are two orders of magnitude larger than rewards. One learned gain takes that out;
        # the released weights of the paper's authors have none, which is gain = 1.
        self.gain = nn.Parameter(torch.ones((), **like))
        self.bias = nn.Parameter(torch.zeros(llama.config.vocab_size, **like))
        self.register_buffer("unseen", torch.zeros(llama.config.vocab_size, dtype=torch.bool, device=llama.device))

    def rewards(self, hidden):
        """M(s): (..., d) -> (..., V)."""
        return self.gain * self.llama.logits(hidden) + self.bias

    def conservative_rewards(self, hidden):
        """M_cons(s), the paper's Eq. 7: M(s), and -inf for the tokens in V_unseen: (..., d) -> (..., V)."""
        return self.rewards(hidden).masked_fill(self.unseen, -math.inf)

    def child_rewards(self, hidden, children):
        """One entry M(s)_a for each s and its child a, without the others: (n, d), ints (n,) -> (n,)."""
        unembedding = self.llama.lm_head.weight[children]                                   # (n, d)
        return self.gain * (hidden * unembedding).sum(-1) + self.bias[children]


def partial_supervision_loss(mrm, hidden, children, rewards):
    """The mean of (M(s[0:j])_{s_j} − R(s[0:j+1]))² over response positions j: partial supervision, the paper's Eq. 5.

    hidden: h(s[0:j]) (n, d). children: the tokens s_j that are really there, ints (n,). rewards: R(s[0:j+1]) (n,).
    """
    return F.mse_loss(mrm.child_rewards(hidden, children), rewards)


# ---------------------------------------------------------------------------------------------------------------
# adapters

def trained_tensors(reward_model):
    """What an adapter holds: LoRA, head or gain and bias, and the mask of unseen tokens, by name."""
    tensors = {name: p for name, p in reward_model.named_parameters()
               if "lora_" in name or not name.startswith("llama.")}
    if reward_model.kind == "mrm":
        tensors["unseen"] = reward_model.unseen
    return tensors


def save_adapter(reward_model, path, rank, alpha, targets, first_layer, command):
    """Write an adapter: trained tensors (LoRA's in float16), and metadata that says what it belongs to and which
    command made it."""
    llama = reward_model.llama
    metadata = {"kind": reward_model.kind, "base": llama.config.name, "base_fingerprint": llama.fingerprint,
                "vocabulary": llama.tokenizer.fingerprint if llama.tokenizer else "",
                "rank": rank, "alpha": alpha, "targets": targets, "first_layer": first_layer,
                "template": [reward_model.template.prefix, reward_model.template.infix], "command": command}
    tensors = {name: tensor.detach().to("cpu", torch.float16 if "lora_" in name else tensor.dtype).contiguous()
               for name, tensor in trained_tensors(reward_model).items()}
    metadata = {key: json.dumps(value) for key, value in metadata.items()}
    write_file(path, lambda partial: save_file(tensors, partial, metadata))


def read_metadata(path):
    """The metadata of an adapter. Raises BadInput when the file is absent, damaged or no adapter of ours."""
    try:
        with safe_open(path, framework="pt") as file:
            return {key: json.loads(value) for key, value in (file.metadata() or {}).items()}
    except FileNotFoundError:
        raise BadInput(f"{path}: no such file") from None
    except (SafetensorError, OSError) as error:
        raise BadInput(f"{path}: not a readable adapter ({error})") from None
    except ValueError:
        raise BadInput(f"{path}: not an adapter of this repository (its metadata is not ours)") from None


def load_adapter(path, llama, kind):
    """The Guard (kind "guard") or MRM ("mrm") of an adapter file on `llama`, whose weights it shares; frozen.

    Raises BadInput, with both values named, for an adapter of another kind, made for another base model, another
    vocabulary, or whose rank is not the one it says.
    """
    meta = read_metadata(path)
    if not {"kind", "base", "base_fingerprint", "vocabulary", "rank", "alpha", "targets", "first_layer",
            "template"} <= meta.keys():
        raise BadInput(f"{path}: not an adapter of this repository (its metadata is missing)")
    vocabulary = llama.tokenizer.fingerprint if llama.tokenizer else ""
    for what, theirs, ours in (
            ("is an adapter of kind", meta["kind"], kind),
            ("was made for the vocabulary", meta["vocabulary"], vocabulary),
            (f"was made for the base model {meta['base']}, fingerprint", meta["base_fingerprint"], llama.fingerprint)):
        if theirs != ours:
            raise BadInput(f"{path} {what} {theirs}, but here it must be {ours} ({llama.config.name})")
    llama = add_lora(llama, meta["rank"], meta["alpha"], meta["targets"], meta["first_layer"])
    model = {"guard": Guard, "mrm": MRM}[kind](llama, Template(*meta["template"]))
    fill(path, trained_tensors(model), dict(read_tensors(path)), f"rank {meta['rank']}")
    return model.requires_grad_(False)


def fill(path, wanted, found, said):
    """Copy tensors into those of the same names. Raises BadInput when a name or shape differs."""
    for name in sorted(wanted.keys() | found.keys()):
        if name not in found or name not in wanted:
            raise BadInput(f"{path}: tensor {name} is {'missing' if name in wanted else 'not expected'}")
        if wanted[name].shape != found[name].shape:
            raise BadInput(f"{path}: tensor {name} has shape {tuple(found[name].shape)}, "
                           f"expected {tuple(wanted[name].shape)} ({said})")
        wanted[name].data.copy_(found[name])


def load_released_mrm(folder, llama, template):
    """The MRM of a folder in the layout of the paper's released weights: adapter_config.json and
    adapter_model.safetensors (PEFT's LoRA), lm_head_bias.pt and unseen_mask.pt (plain tensors), frozen.

    Raises BadInput for a missing or damaged file and for kinds of LoRA other than the plain one.
    """
    folder = Path(folder)
    config = read_json(folder / "adapter_config.json")
    plain = {"peft_type": "LORA", "bias": "none", "use_dora": False, "use_rslora": False, "fan_in_fan_out": False,
             "rank_pattern": {}, "alpha_pattern": {}, "modules_to_save": None, "layers_to_transform": None}
    for key, value in plain.items():
        if config.get(key, value) != value:
            raise BadInput(f"{folder}/adapter_config.json: {key} = {config[key]!r} is not supported, only {value!r}")
    try:
        rank, alpha, targets = config["r"], config["lora_alpha"], sorted(config["target_modules"])
    except (KeyError, TypeError) as error:
        raise BadInput(f"{folder}/adapter_config.json: the field {error} is missing or no list") from None
    model = MRM(add_lora(llama, rank, alpha, targets), template)
    path = folder / "adapter_model.safetensors"
    found = {name.replace("base_model.model.", "llama.").replace(".weight", ""): tensor
             for name, tensor in read_tensors(path)}
    found |= {"gain": torch.ones(()), "bias": read_tensor(folder / "lm_head_bias.pt"),
              "unseen": read_tensor(folder / "unseen_mask.pt")}
    fill(folder, trained_tensors(model), found, f"rank {rank}, vocabulary {llama.config.vocab_size}")
    return model.requires_grad_(False)


def read_tensor(path):
    """A file that holds one plain tensor; anything that could run code is refused."""
    try:
        tensor = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:                      # torch raises many kinds for a file that is not a tensor
        raise BadInput(f"{path}: not a plain tensor ({type(error).__name__})") from None
    if not isinstance(tensor, torch.Tensor):
        raise BadInput(f"{path}: expected a tensor, found {type(tensor).__name__}")
    return tensor


def load_guard(path, llama):
    """The guard at `path`: an adapter file of this repository on `llama`, or the folder of a Llama Guard (of `llama`
    itself, where that is the same checkpoint)."""
    if not Path(path).is_dir():
        return load_adapter(path, llama, "guard")
    other = Llama.load(path, llama.dtype, llama.device)
    if other.tokenizer is None or other.tokenizer.fingerprint != (llama.tokenizer and llama.tokenizer.fingerprint):
        raise BadInput(f"{path} and {llama.config.name} have different vocabularies; guard and policy must share one")
    return llama_guard(llama if other.fingerprint == llama.fingerprint else other)


def guard_id(path, guard):
    """12 hex digits that tell a guard from others: of an adapter's file, or of a Llama Guard's weights."""
    return guard.llama.fingerprint if Path(path).is_dir() else hashlib.sha256(Path(path).read_bytes()).hexdigest()[:12]


def load_mrm(path, llama):
    """The MRM at `path`: an adapter file of this repository, or a folder in the layout of the released weights
    (read in the reward template of the base model's vocabulary)."""
    if not Path(path).is_dir():
        return load_adapter(path, llama, "mrm")
    if llama.tokenizer is None:
        raise BadInput(f"{llama.config.name} has no vocabulary here, so {path} has no template to be read in")
    return load_released_mrm(path, llama, llama.tokenizer.template("reward"))


# ---------------------------------------------------------------------------------------------------------------
# several readers, one pass: speed only. trie_cache.py and search.py say what is read together.

class Backbone:
    """Llamas that differ in LoRA only, as one: a pass reads the base weights once for the tokens of all of them.

    It is a copy of the Llama in which each projection that some of them adapt is a SharedLinear. Of K, the sum of all
    ranks, those with `owner == i` belong to llamas[i]; `own` says for each token of a pass which ranks are its Llama's.
    """

    def __init__(self, llamas):
        self.llamas, self.device, self.dtype = llamas, llamas[0].device, llamas[0].dtype
        ranks = [next((len(m.lora_A) for m in llama.modules() if isinstance(m, LoRALinear)), 0) for llama in llamas]
        self.owner = torch.tensor([i for i, r in enumerate(ranks) for _ in range(r)], device=self.device)   # (K,)
        self.llama = shallow_copy(llamas[0])
        for block, *blocks in zip(self.llama.model.layers, *(llama.model.layers for llama in llamas)):
            for name in PROJECTIONS:
                linears = [getattr(part_of(b, name), name) for b in blocks]
                if any(isinstance(linear, LoRALinear) for linear in linears):
                    setattr(part_of(block, name), name, SharedLinear(self, linears, ranks))

    def __call__(self, tokens, positions, cache):
        """As Llama's forward, with B = 1. cache: a trie_cache.Pass, whose tries say whose the tokens are."""
        reader = [self.llamas.index(trie.model) for trie in cache.tries for _ in trie.waiting]
        own = torch.tensor(reader, device=self.device)[:, None] == self.owner               # (T, K)
        self.own = own.to(self.dtype)
        return self.llama(tokens, positions, cache)


class SharedLinear(nn.Module):
    """y = x Wᵀ + (own ⊙ x Aᵀ) Bᵀ, where A and B hold the LoRA of all Llamas one after another."""

    def __init__(self, backbone, linears, ranks):
        super().__init__()
        self.backbone = backbone
        self.linear = next(linear.linear for linear in linears if isinstance(linear, LoRALinear))
        zeros = self.linear.weight.new_zeros
        d_out, d_in = self.linear.weight.shape
        pairs = [(linear.lora_A, linear.scale * linear.lora_B) if isinstance(linear, LoRALinear) else
                 (zeros(r, d_in), zeros(d_out, r)) for linear, r in zip(linears, ranks)]
        self.A = torch.cat([a for a, _ in pairs])                                           # (K, d_in)
        self.B = torch.cat([b for _, b in pairs], dim=1)                                    # (d_out, K)

    def forward(self, x):                                                                   # (1, T, d_in)
        return self.linear(x) + F.linear(F.linear(x, self.A) * self.backbone.own, self.B)   # (1, T, d_out)


def same_base(a, b):
    """Whether two Llamas differ in LoRA only: one is an `add_lora` of the other, or both of a third."""
    return a.model.embed_tokens.weight is b.model.embed_tokens.weight
