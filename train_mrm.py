"""
Train a reward model: the guard on labelled replies, or the MRM on the rewards that a guard gave every prefix.

    python train_mrm.py --objective guard --data data/safety_labels  --out out/guard.safetensors
    python train_mrm.py --objective mrm   --data data/safety_rewards --out out/mrm.safetensors

    torchrun --nproc_per_node 4 train_mrm.py --device cuda ...    each batch shared by four processes

docs/train.md has the options of the committed adapters. Only LoRA and the small head are trained (mrm.py).
Each validation but the last also writes a checkpoint beside --out, from which --resume goes on, on a CPU bit
for bit. The log goes to stdout.

Shapes: B conversations of at most T tokens, n reply tokens, m siblings, d = hidden_size.
"""

from plumbing.start import run                          # first: it sets what torch reads

import contextlib
import math
import shlex
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.parallel import DistributedDataParallel

from data.corpus import collate
from mrm import MRM, Guard, add_lora, partial_supervision_loss, sibling_loss, trained_tensors, unseen_tokens
from plumbing.adapters import check_lora, load_adapter, save_adapter
from plumbing.checkpoint import load_llama
from plumbing.files import check_output
from plumbing.mixture import read_data, weights
from plumbing.parallel import is_first, join_processes, log, run_beside_others
from plumbing.parser import Parser, number
from plumbing.resume import load_checkpoint, load_to_train, run_identity, save_checkpoint
from plumbing.validate import histogram, validate_guard, validate_mrm

# Hyperparameters: each is an option, as in --rank 8. name: (default, its type and range, what it means)
HYPERPARAMETERS = {
    # what is trained
    "rank": (8, number(1), "rank of LoRA"),
    "alpha": (16, number(0, 1e6, float), "LoRA's output is scaled by alpha / rank"),
    "targets": ("q_proj,v_proj", str, "the projections that get LoRA"),
    "first_layer": (None, number(0), "the first layer that gets LoRA (default: layers / 3)"),
    # optimization
    "steps": (1000, number(1), "steps of the optimizer, AdamW"),
    "batch_size": (8, number(1), "replies a step"),
    "lr": (1e-3, number(0, 10, float), "peak learning rate"),
    "weight_decay": (0.0, number(0, 10, float), "weight decay of AdamW"),
    "clip": (1.0, number(1e-9, 1e9, float), "larger gradients are scaled down to this norm"),
    "seed": (0, number(0, 2 ** 63 - 1), "seed of LoRA's start, the order of the data, and the replies that a "
             "validation reads"),
    # data
    "max_prompt": (64, number(1), "guard: tokens kept of a prompt, the last ones"),
    "max_reply": (64, number(1), "guard: tokens kept of a reply, the first ones"),
    "weights": ({}, weights, 'JSON, how often to read a source: \'{"jailbreakbench": 2}\''),
    "min_count": (1, number(1), "MRM: occurrences that make a token count as seen"),
    "siblings": (10, number(0, 1e6, float), "MRM: weight of the error among the siblings of a prefix, beside "
                 "that of the next tokens; 0: as in the paper")}
SMOOTHING = 0.02            # of the guard's labels


# ------------------------------------------------------------------------------------------------------------
# the two objectives

def guard_loss(guard, batch):
    """Binary cross-entropy at every reply token; R is the log-odds of "safe". batch.targets: 0 safe to 1
    unsafe, 0.2 a needless refusal. They are smoothed to 0.02 and 0.98, whose log-odds are ±3.9: labels are
    not more certain than that."""
    hidden = guard.llama(batch.tokens)                                                  # (B, T, d)
    rewards = guard.reward(hidden[batch.rows, batch.columns])                           # (n,)
    safe = 1 - batch.targets.to(rewards.dtype)
    return F.binary_cross_entropy_with_logits(rewards, SMOOTHING + (1 - 2 * SMOOTHING) * safe)


def mrm_loss(mrm, batch, sibling_weight=0.0):
    """Partial supervision (Eq. 5): the hidden state before a reply token predicts the reward after it. Plus
    sibling_weight · sibling_loss, where there are siblings."""
    hidden = mrm.llama(batch.tokens)                                                    # (B, T, d)
    loss = partial_supervision_loss(mrm, *batch.supervised(hidden))
    if sibling_weight and len(batch.sibling_tokens):
        before = hidden[batch.sibling_rows, batch.sibling_columns]                      # (m, d)
        of_siblings = sibling_loss(mrm, before, batch.sibling_tokens, batch.sibling_rewards,
                                   batch.sibling_prefixes)
        loss = loss + sibling_weight * of_siblings
    return loss


class Objective(nn.Module):
    """The loss as a module, which is what DistributedDataParallel wraps."""

    def __init__(self, reward_model, args):
        super().__init__()
        self.reward_model = reward_model
        self.device = torch.device(args.device).type
        self.bfloat16 = args.dtype == "bfloat16"

    def forward(self, batch, sibling_weight):
        # In bfloat16 on a CPU, the fused attention's backward pass is slower than plain products.
        plain_products = self.bfloat16 and self.device == "cpu"
        attention = sdpa_kernel(SDPBackend.MATH) if plain_products else contextlib.nullcontext()
        with torch.autocast(self.device, torch.bfloat16, enabled=self.bfloat16), attention:
            if self.reward_model.kind == "guard":
                return guard_loss(self.reward_model, batch)
            return mrm_loss(self.reward_model, batch, sibling_weight)


# ------------------------------------------------------------------------------------------------------------
# training

def batches(examples, size, seed):
    """The examples in a random order, in lists of `size` of about equal length: little is lost to padding."""
    generator = torch.Generator().manual_seed(seed)
    order = [examples[i] for i in torch.randperm(len(examples), generator=generator).tolist()]
    result = []
    for start in range(0, len(order), 64 * size):
        pool = sorted(order[start:start + 64 * size], key=lambda e: len(e.context + e.reply))
        result += [pool[i:i + size] for i in range(0, len(pool), size)]
    return [result[i] for i in torch.randperm(len(result), generator=generator).tolist()]


def new_reward_model(args, llama, training):
    """The reward model to train: that of --init, or new LoRA on `llama`. A new MRM begins near the mean
    reward: with that as its bias, and with a gain that scales logits down to rewards."""
    torch.manual_seed(args.seed)
    lora = [args.rank, args.alpha, args.targets.split(","), args.first_layer]
    if args.init:
        model = load_to_train(args.init, llama, args.objective, *lora)
    else:
        model = {"guard": Guard, "mrm": MRM}[args.objective](
            add_lora(llama, *lora), llama.tokenizer.template("reward"))
    if args.objective == "mrm":
        distinct = {id(e): e.reply for e in training}.values()      # --weights may repeat a reply
        unseen = unseen_tokens(distinct, llama.config, args.min_count)
        if args.init:
            unseen &= model.unseen.cpu()                            # what --init has seen stays seen
        else:
            model.gain.data.fill_(0.02)
            model.bias.data.fill_(float(np.mean(np.concatenate([e.targets for e in training]))))
        model.unseen.copy_(unseen)
    return model


def learning_rate(step, args):
    """Linear warm-up over the first 5 % of the steps, then a cosine down to a tenth."""
    warmup = max(1, args.steps // 20)
    progress = max(0, step - warmup) / max(1, args.steps - warmup)
    return args.lr * min((step + 1) / warmup, 0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * progress)))


def backward(objective, examples, args):
    """Compute the gradient of a batch's loss, the mean over its reply tokens plus --siblings times that over
    its siblings; returns the loss. Alone and with --accumulate 1 that is one pass. Else the batch is cut into
    pieces, for several processes or one after another. A piece counts by its share of the batch's tokens, its
    siblings by their share of all: the cut changes nothing but rounding. (All shares add up to 1, so a term
    of the loss that is no mean over tokens, such as a penalty, counts once.)"""
    rank, processes = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    pieces = processes * args.accumulate
    total = torch.zeros((), dtype=torch.float64, device=args.device)
    for i in range(args.accumulate):
        piece = examples[rank * args.accumulate + i::pieces]
        share = sum(len(e.reply) for e in piece) / sum(len(e.reply) for e in examples)
        of_siblings = sum(len(e.siblings) for e in piece) / max(1, sum(len(e.siblings) for e in examples))
        sibling_weight = args.siblings * of_siblings / share if piece else 0.0
        # Gradients are exchanged after the last piece. A process without one computes another, with share 0.
        last = i == args.accumulate - 1 or processes == 1
        with contextlib.nullcontext() if last else objective.no_sync():
            loss = share * objective(collate(piece or examples[:1], args.device), sibling_weight)
            (processes * loss).backward()                    # DistributedDataParallel averages over processes
        total += loss.detach()
    if processes > 1:
        dist.all_reduce(total)
    return total.item()


def train(args):
    """A whole run: data, model, steps with validations and checkpoints, the adapter, its validation."""
    # 1. Data and model.
    out = Path(args.out)
    if not args.validate:
        out.parent.mkdir(parents=True, exist_ok=True)
        check_output(out)
    llama = load_llama(args.base, torch.float64 if args.dtype == "float64" else torch.float32, args.device)
    if args.first_layer is None:
        args.first_layer = llama.config.num_hidden_layers // 3
    check_lora(args.rank, args.alpha, args.targets.split(","), args.first_layer, llama.config)
    training, held_out = read_data(args, llama)
    validate = {"guard": validate_guard, "mrm": validate_mrm}[args.objective]
    if args.validate:
        report = validate(load_adapter(out, llama, args.objective), held_out, args.device)
        return log_report(f"{out}, all {len(held_out)} held-out replies", report)
    reward_model = new_reward_model(args, llama, training)
    generator = torch.Generator().manual_seed(args.seed)
    picked = torch.randperm(len(held_out), generator=generator)[:args.eval_replies].tolist()
    some = [held_out[i] for i in picked]                # what validations before the last one read

    # 2. The optimizer, and what an earlier run has left.
    parameters = [p for p in trained_tensors(reward_model).values() if p.requires_grad]
    if args.compile:
        for block in reward_model.llama.model.layers:
            block.compile(dynamic=True)                     # one program for batches of all lengths
    optimizer = torch.optim.AdamW(parameters, lr=args.lr, betas=(0.9, 0.98), weight_decay=args.weight_decay)
    objective = Objective(reward_model, args)
    if dist.is_initialized():
        objective = DistributedDataParallel(objective)
    checkpoint = out.with_name(out.name + ".checkpoint.pt")
    identity = run_identity(args, llama, training)
    step = load_checkpoint(checkpoint, identity, reward_model, optimizer) if args.resume else 0
    log(f"{args.objective}: {len(training)} replies, {sum(len(e.reply) for e in training)} supervised tokens"
        f", {sum(len(e.siblings) for e in training)} siblings, "
        f"{sum(p.numel() for p in parameters)} trained parameters, {args.steps} steps")
    if args.objective == "mrm":
        log(f"seen tokens: {int((~reward_model.unseen).sum())} of {len(reward_model.unseen)}")
        log(f"rewards: {histogram(np.concatenate([e.targets for e in training]))}")

    # 3. Steps. The order of the batches is a function of seed and epoch alone.
    per_epoch = math.ceil(len(training) / args.batch_size)
    started = time.time()
    tokens_read = 0
    losses = []
    while step < min(args.steps, args.stop_after or args.steps):
        epoch, position = divmod(step, per_epoch)
        if position == 0 or not losses:                 # a new epoch, or a run that goes on within one
            order = batches(training, args.batch_size, args.seed + epoch)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, args)
        losses.append(backward(objective, order[position], args))
        if not math.isfinite(losses[-1]):
            sys.exit(f"step {step}: the loss is {losses[-1]}, on epoch {epoch}, batch {position}, of sources "
                     f"{[e.source for e in order[position]]}; nothing was saved since the last checkpoint")
        torch.nn.utils.clip_grad_norm_(parameters, args.clip)
        optimizer.step()
        optimizer.zero_grad()
        step += 1
        tokens_read += sum(len(e.context) + len(e.reply) for e in order[position])
        if step % args.log_every == 0:
            log(f"step {step}: loss {np.mean(losses[-args.log_every:]):.6g}, "
                f"{tokens_read / (time.time() - started):.0f} tokens/s")
        if is_first() and step < args.steps and (step % args.eval_every == 0 or step == args.stop_after):
            save_checkpoint(checkpoint, identity, step, reward_model, optimizer)
            with torch.compiler.set_stance("force_eager"):  # not compiled anew for a validation
                report = validate(reward_model, some, args.device)
            log_report(f"step {step}, {len(some)} held-out replies", report)

    # 4. The adapter, read again and validated.
    if step < args.steps or not is_first():         # stopped by --stop_after, or another process writes
        return
    targets = args.targets.split(",")
    save_adapter(reward_model, out, args.rank, args.alpha, targets, args.first_layer, args.command)
    log(f"wrote {out} after {time.time() - started:.0f} s")
    log_report(f"as written, all {len(held_out)} held-out replies",
               validate(load_adapter(out, llama, args.objective), held_out, args.device))
    checkpoint.unlink(missing_ok=True)


def log_report(title, report):
    log(f"{title}: " + ", ".join(f"{key} {value if isinstance(value, int) else f'{value:.4f}'}"
                                 for key, value in report.items()))


def main():
    parser = Parser(description="Train the guard or the MRM.")
    add = parser.group("what is trained")
    add("--objective", choices=["guard", "mrm"], required=True, help="the reward model")
    add("--data", required=True, nargs="+", metavar="DIR", help="the folder that data/safety_labels or "
        "data/safety_rewards prepared; for the MRM also several")
    add("--out", required=True, help="the adapter file to write")
    add("--base", default="data/smollm2", help="the Llama to put LoRA on")
    add("--init", metavar="PATH", help="the adapter to start from (default: new weights)")
    add("--guard", metavar="PATH", help="MRM: accept only a corpus that this guard has labelled")
    add = parser.group("hyperparameters")
    for name, (default, kind, what) in HYPERPARAMETERS.items():
        add(f"--{name}", type=kind, default=default, help=what)
    add = parser.group("machine")
    add("--device", default="cpu", help="cpu or cuda")
    add("--accumulate", type=number(1), default=1, help="read a process's part of a batch in "
        "N pieces, to save memory")
    add("--dtype", choices=["float32", "float64", "bfloat16"], default="float32", help="bfloat16: matrix"
        " products in it, weights in float32; faster on hardware that has it")
    add("--compile", action="store_true", help="compile the layers first, which takes a minute or two and a "
        "C++ compiler; then a step takes about two thirds of the time")
    add = parser.group("course of the run")
    add("--eval_every", type=number(1), default=200, help="steps from one validation to the next")
    add("--eval_replies", type=number(1), default=400, help="replies of a validation; the last reads all")
    add("--log_every", type=number(1), default=20, help="steps from one line of the log to the next")
    add("--stop_after", type=number(1), help="stop after this step, with a checkpoint")
    add("--resume", action="store_true", help="go on from the checkpoint beside --out")
    add("--validate", action="store_true", help="do not train: validate the adapter at --out")
    args = parser.parse_args()
    args.command = "python " + shlex.join(["train_mrm.py", *sys.argv[1:]])
    join_processes(args, "nccl" if args.device == "cuda" else "gloo")
    if dist.is_initialized():
        run_beside_others(lambda: train(args), "--resume goes on from the last checkpoint")
    else:
        train(args)


if __name__ == "__main__":
    run(main)
