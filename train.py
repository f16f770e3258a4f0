"""
Train a DeepSeek-V3 on one device, or by torchrun on many.

    python train.py                         # 0.7M active parameters on the Python standard library's source
    python train.py --preset small --data_dir data/fineweb
    python train.py --n_routed_experts 32           # any field of the model's config is a flag
    python train.py --init_from DIR --data_dir data/mine        # fine-tune a run or a released model
    python train.py --resume                        # continue from out/ckpt.pt
    torchrun --nproc_per_node 8 train.py --preset small     # --batch_size is per GPU; --fsdp shards

Writes OUT_DIR/ckpt.pt (the last checkpoint, with all that sample.py and --resume need), OUT_DIR/best.pt (the
one with the lowest validation loss) and OUT_DIR/log.jsonl. From Python: train.main([flag, ...], on_log).
"""

import signal
import time

START = time.monotonic()    # before torch, whose import takes seconds
if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)    # Ctrl-C during the imports needs no traceback

import argparse
import contextlib
import dataclasses
import json
import math
import os
import shlex
import sys
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from torch.func import functional_call
from torch.nn.parallel import DistributedDataParallel

from checkpoint import (FORMAT, best_of, fitting, has_bf16, keep_best, load_optimizer, load_run,
                        load_shards, model_of_run, pick_device, read_config, released_folder,
                        replaced_classes, save_run, sole_process, write_atomically, writing)
from data.loader import Validation, open_data
from data.prepare import Parser
from data.tokenizer import encoding_from_json, ends_of_data, get_tokenizer, same_ids, token_bytes
from model import MTP, DeepSeekV3, DeepSeekV3Config, Gate
from optim import averaged_model, batch_sizes, make_optimizers, schedule


# ----------------------------------------------------------------------------------------------------------
# Settings: every field is a flag

def option(default, help, choices=None):
    return field(default=default, metadata={"help": help, "choices": choices})


@dataclass
class TrainConfig:
    preset: str = option(None, "model and recipe to start from: tiny, mini, small, large, 16b, 671b; "
                               "default: mini on an NVIDIA GPU, else tiny")
    data_dir: str = option("data/stdlib", "folder with train.bin and val.bin, see data/prepare.py")
    out_dir: str = option("out", "folder for ckpt.pt, best.pt and log.jsonl")
    resume: bool = option(False, "continue from OUT_DIR/ckpt.pt, with its settings")
    init_from: str = option(None, "fine-tune: a run's folder or ckpt.pt, or a released model's folder or id "
                                  "on the Hugging Face Hub; gives weights, config and tokenizer")
    device: str = option("auto", "cuda, mps or cpu; auto: the first of these that is there")
    dtype: str = option("auto", "of the computation; auto: bfloat16 where the device computes in it itself",
                        choices=("auto", "float32", "bfloat16"))
    fp8: bool = option(False, "multiply in FP8 as the report does (fp8.py); emulated where no kernel runs")
    fp8_pow2: bool = option(False, "with --fp8: all scales are powers of two, as DeepSeek-V3.1 was trained")
    compile: bool = option(None, "torch.compile the model; default: on a GPU")
    fsdp: bool = option(False, "with torchrun: shard weights, gradients and moments over the ranks")
    recompute: bool = option(False, "save memory: compute cheap activations again in the backward pass")
    deterministic: bool = option(False, "the same bits in every run, on a GPU too, at some cost in speed")
    seed: int = option(1337, "of the initial weights and of the order of the data")
    max_iters: int = option(None, "optimizer steps")
    batch_size: int = option(None, "sequences of a micro-batch, on each rank of torchrun")
    block_size: int = option(None, "tokens of a sequence; with --init_from: what the model was trained on, "
                                   "at most 4096; a longer one extends its context with YaRN")
    gradient_accumulation_steps: int = option(1, "micro-batches of an optimizer step")
    batch_ramp: bool = option(False, "begin with a fifth of --batch_size, as the report does")
    optimizer: str = option("adamw", "muon: for the hidden matrices, with adamw for the rest",
                            choices=("adamw", "muon"))
    bf16_moments: bool = option(False, "keep AdamW's moments in bfloat16, as the report does")
    learning_rate: float = option(None, "the peak; with --init_from: 1e-5, more below 1B active parameters")
    ema_decay: float = option(0.0, "of a moving average of the weights, evaluated and saved too (0: none)")
    mask_documents: bool = option(False, "keep attention and MTP within documents (report: fine-tuning only)")
    eval_interval: int = option(None, "steps between evaluations, each with a checkpoint; the last has one")
    log_interval: int = option(10, "steps between progress lines")


# What the flags above default to, by preset. "tiny" was tuned by measurement on two CPU cores, 671b follows
# the report (§4.2), the others common practice for their size. Only "tiny" has been run as a whole.
RECIPES = {
    "tiny": dict(optimizer="muon", learning_rate=0.015, max_iters=500, batch_size=24, block_size=128,
                 eval_interval=250),
    "mini": dict(learning_rate=1e-3, max_iters=2000, batch_size=64, block_size=512, eval_interval=250),
    "small": dict(learning_rate=6e-4, max_iters=20000, batch_size=32, block_size=1024, eval_interval=1000),
    "large": dict(learning_rate=4e-4, max_iters=20000, batch_size=4, block_size=2048,
                  gradient_accumulation_steps=32, eval_interval=1000),
    "16b": dict(learning_rate=4.2e-4, max_iters=100000, batch_size=1, block_size=4096,
                gradient_accumulation_steps=8, eval_interval=1000),
    "671b": dict(learning_rate=2.2e-4, max_iters=235000, batch_size=8, block_size=4096, eval_interval=1000),
}
FINETUNE = dict(max_iters=200, batch_size=4, eval_interval=100)
# fields of a config that trained weights leave open
FREE_OF_WEIGHTS = ("max_position_embeddings", "rope_scaling", "bias_update_speed", "balance_loss_alpha",
                   "mtp_loss_weight")
# flags that --resume can't change: the order of the data and the optimizer's state depend on them
FIXED_ON_RESUME = ("preset", "init_from", "fp8", "fp8_pow2", "seed", "block_size", "batch_ramp",
                   "optimizer", "bf16_moments")
CHECKPOINTS = "ckpt.pt", "ckpt.prev.pt"
GIVE_UP_AFTER = 10      # steps in a row whose loss or gradient is not finite


def ranks():
    """-> the number of this process and how many there are, as torchrun tells them."""
    return (int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])) if "RANK" in os.environ else (0, 1)


def int_or_none(text):
    return None if text.lower() == "none" else int(text)


def json_object(text):
    if not isinstance(value := json.loads(text), dict):
        raise ValueError
    return value


def parse_args(argv):
    """-> dict of the flags that were given, and of out_dir in any case: a run may have been moved there."""
    kinds = {"q_lora_rank": int_or_none, "rope_scaling": json_object}
    parser = Parser(__doc__)
    group = parser.add_argument_group("the model's config (defaults: the preset's)")
    for cls, where in (TrainConfig, parser), (DeepSeekV3Config, group):
        for f in dataclasses.fields(cls):
            kind = dict(type=kinds.get(f.name, f.type), choices=f.metadata.get("choices"))
            if f.type is bool:
                kind = dict(action=argparse.BooleanOptionalAction)
            where.add_argument(f"--{f.name}", default=argparse.SUPPRESS, help=f.metadata.get("help"), **kind)
    return {"out_dir": TrainConfig.out_dir, **vars(parser.parse_args(argv))}


def settings(given):
    """The flags that were given -> TrainConfig, DeepSeekV3Config, and the checkpoint whose weights the run
    starts from: its own with --resume, another run's with --init_from, else None."""
    own = {f.name for f in dataclasses.fields(TrainConfig)}
    flags = {key: value for key, value in given.items() if key in own}
    model_flags = {key: value for key, value in given.items() if key not in own}
    out_dir, ckpt = Path(given["out_dir"]), None
    earlier = [out_dir / name for name in (*CHECKPOINTS, "best.pt") if (out_dir / name).exists()]
    if given.get("resume"):
        ckpt = load_run(out_dir)
        config = model_of_run(ckpt).config
        with fitting(ckpt["path"]):
            base = dataclasses.asdict(TrainConfig(**ckpt["train_config"]))
        for key, value in given.items():
            value = str(released_folder(value)) if key == "init_from" else value
            saved = getattr(config, key) if key in model_flags else base[key]
            if (key in model_flags or key in FIXED_ON_RESUME) and value != saved:
                raise ValueError(f"--{key} {value} contradicts {ckpt['path']}, trained with {key}={saved}; "
                                 "leave it out, or start a new run in another --out_dir")
    elif earlier:
        raise ValueError(f"{earlier[0]} holds an earlier run; continue it with --resume, or start a new one "
                         "in another --out_dir")
    elif "init_from" in given:
        source = released_folder(given["init_from"])
        if source.is_file() or any((source / name).exists() for name in CHECKPOINTS):
            ckpt = load_run(source)
        config = model_of_run(ckpt).config if ckpt else read_config(source)
        for name in given.keys() & {"preset", *model_flags} - set(FREE_OF_WEIGHTS):
            raise ValueError(f"--{name} can't be given with --init_from, as the weights of "
                             f"{given['init_from']} decide it; only {', '.join(FREE_OF_WEIGHTS)} can")
        longest = config.max_position_embeddings
        trained = ckpt["train_config"]["block_size"] if ckpt else longest
        base = {**FINETUNE, "block_size": min(trained, 4096), "learning_rate": finetuning_rate(config)}
        length = flags.get("block_size", 0)
        if length > longest and not model_flags.keys() & {"rope_scaling", "max_position_embeddings"}:
            model_flags |= extend_context(config, length)
            say(f"context extended from {longest} to {length} tokens with YaRN: "
                f"{model_flags['rope_scaling']}")
        flags["init_from"] = str(source)
    else:
        device = pick_device(given.get("device", "auto"))
        preset = given.get("preset", "mini" if device.type == "cuda" else "tiny")
        config, base = DeepSeekV3Config.preset(preset), {**RECIPES[preset], "preset": preset}
        # the trained length travels with the model: positions beyond it are noise
        trained = max((base | flags)["block_size"], 2)
        model_flags = {"max_position_embeddings": trained} | model_flags
    cfg, config = TrainConfig(**base | flags), dataclasses.replace(config, **model_flags)
    check(cfg, config, ckpt)
    return cfg, config, ckpt


def check(cfg, config, ckpt):
    """ValueError, one sentence, for settings that are wrong or do not go together."""
    world, accumulation = ranks()[1], cfg.gradient_accumulation_steps
    per_step, longest = world * cfg.batch_size * accumulation, config.max_position_embeddings
    resumed = ckpt["sequences_per_step"] if cfg.resume else per_step
    for wrong, sentence in [
        *((not 1 <= getattr(cfg, name) < 2**31,
           f"--{name} must be at least 1 and below 2^31, got {getattr(cfg, name)}")
          for name in ("max_iters", "batch_size", "block_size", "gradient_accumulation_steps",
                       "eval_interval", "log_interval")),
        (not 0 < cfg.learning_rate <= 1e6,
         f"--learning_rate must be over 0 and at most 1e6, got {cfg.learning_rate}"),
        (not cfg.out_dir, "--out_dir is empty; give a folder"),
        (not 0 <= cfg.seed < 2**63, f"--seed must be from 0 to 2^63 - 1, got {cfg.seed}"),
        (not 0 <= cfg.ema_decay < 1, f"--ema_decay must be from 0 to less than 1, got {cfg.ema_decay}"),
        (cfg.batch_ramp and cfg.batch_size < 5,
         f"--batch_ramp begins with a fifth of --batch_size {cfg.batch_size}; make it at least 5"),
        (cfg.fp8_pow2 and not cfg.fp8, "--fp8_pow2 says how --fp8 scales; give --fp8 too"),
        (cfg.fsdp and (cfg.optimizer == "muon" or cfg.ema_decay or cfg.bf16_moments),
         "--fsdp shards the state of plain AdamW only: it can't be given with --optimizer muon, --ema_decay "
         "or --bf16_moments"),
        (cfg.fsdp and "RANK" not in os.environ, "start --fsdp with: torchrun --nproc_per_node N train.py"),
        (cfg.block_size > longest,
         f"--block_size {cfg.block_size} is more than max_position_embeddings={longest}; lower it, raise "
         "--max_position_embeddings, or extend a trained model with YaRN (--rope_scaling)"),
        (Path(cfg.data_dir).resolve() == Path(cfg.out_dir).resolve(),
         f"--data_dir and --out_dir are both {cfg.out_dir}; give the run a folder of its own"),
        (per_step != resumed,
         f"--batch_size {cfg.batch_size} contradicts {cfg.out_dir}: times --gradient_accumulation_steps "
         f"{accumulation} and {world} ranks it makes {per_step} sequences per step; make it {resumed}"),
    ]:
        if wrong:
            raise ValueError(sentence)


def finetuning_rate(config):
    """1e-5 from 1B active parameters on, as is usual for released models. Below, the rate is proportional to
    their number to the power of -2/3, up to 1e-3 for a million. (A tiny run tuned for 20 steps on other text
    went from 4.54 bits per byte to 4.35 at 1e-4, 4.18 at 3e-4, 4.03 at 1e-3 and 3.96 at 3e-3.)"""
    with torch.device("meta"):
        active = DeepSeekV3(config).num_params(active=True)
    return min(max(10 * active ** (-2 / 3), 1e-5), 1e-3)


def extend_context(config, length):
    """Fields of a config that extend its context to `length` tokens with the report's YaRN (§4.3). A factor
    larger than this length needs stays: the report's is 40 in both of its phases."""
    yarn = config.rope_scaling or dict(type="yarn", beta_fast=32, beta_slow=1, mscale=1.0, mscale_all_dim=1.0)
    original = yarn.get("original_max_position_embeddings") or config.max_position_embeddings
    factor = max(yarn.get("factor", 1), length / original)
    return {"rope_scaling": {**yarn, "original_max_position_embeddings": original, "factor": factor},
            "max_position_embeddings": length}


# ----------------------------------------------------------------------------------------------------------
# The model

def build_model(cfg, config, device, dtype, ckpt):
    """The model to train. New, released and saved weights reach it by one path: under FSDP, rank 0 holds them
    whole on the CPU, and the shards of all ranks receive them."""
    place = torch.device("meta" if ranks()[0] else "cpu") if cfg.fsdp else device
    if cfg.init_from and not ckpt and place.type != "meta":
        changes = {name: getattr(config, name) for name in FREE_OF_WEIGHTS}
        model = DeepSeekV3.from_pretrained(cfg.init_from, torch.float32, place, **changes).train()
    else:
        with place:
            model = DeepSeekV3(config)
    if ckpt and place.type != "meta":
        model.load_state_dict(ckpt["model"])
        model.source_files = ckpt["source_files"]
    if cfg.fsdp:
        model = sharded(model, device, dtype)
    if cfg.fp8:
        from fp8 import convert_to_fp8      # imports Triton, if it is there
        convert_to_fp8(model, cfg.fp8_pow2)
    if cfg.recompute:
        recompute(model)
    return model


def sharded(whole, device, dtype):
    """FSDP2: each rank keeps a share of every weight of rank 0's whole model. A block's weights are gathered
    when it computes, in the dtype of the computation, and then dropped; gradients are summed in fp32."""
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard        # slow to import
    configs = [whole.config]        # a release may lack its MTP modules, which only rank 0 has seen
    dist.broadcast_object_list(configs)
    with torch.device("meta"):
        model = DeepSeekV3(configs[0])
    model.source_files = whole.source_files
    mesh = dist.init_device_mesh(device.type, (dist.get_world_size(),))
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    for block in model.model.layers:
        for module in block.modules():
            if isinstance(module, Gate):
                fully_shard(module, mesh=mesh)                  # the router computes in fp32
        if isinstance(block, MTP):
            fully_shard(block.shared_head.norm, mesh=mesh)      # runs after the block has dropped its weights
        fully_shard(block, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh)       # embedding, final norm and head stay in fp32
    load_shards(model.to_empty(device=device), whole.state_dict())
    return model


def recompute(model):
    """Activation checkpointing (§3.2.3): the backward pass computes norms, rotations, SwiGLU and MLA's
    up-projections again instead of keeping them. Other products and attention, which cost more, are kept."""
    from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts
    c = model.config
    q_b_proj = {c.q_lora_rank, c.num_attention_heads * (c.qk_nope_head_dim + c.qk_rope_head_dim)}
    kv_b_proj = {c.kv_lora_rank, c.num_attention_heads * (c.qk_nope_head_dim + c.v_head_dim)}

    def policy(ctx, op, *args, **kwargs):
        name = op.name()
        product = name in ("aten::mm", "fp8::linear")       # of args[0] and a weight, args[1]
        up_projection = product and set(args[1].shape) in (q_b_proj, kv_b_proj)
        costly = name in ("aten::mm", "aten::_grouped_mm") or "attention" in name or name.startswith("fp8::")
        if costly and not up_projection:
            return CheckpointPolicy.MUST_SAVE
        return CheckpointPolicy.PREFER_RECOMPUTE

    contexts = partial(create_selective_checkpoint_contexts, policy)
    for block in model.model.layers:
        block.forward = partial(recomputed, block.forward, contexts)


def recomputed(forward, contexts, *args, **kwargs):
    """A frame of its own, as torch.compile skips checkpoint's."""
    checkpoint = partial(torch.utils.checkpoint.checkpoint, use_reentrant=False, context_fn=contexts)
    return checkpoint(forward, *args, **kwargs)


# ----------------------------------------------------------------------------------------------------------
# Around the run

@contextlib.contextmanager
def caught_signals():
    """-> a list that Ctrl-C, SIGTERM and SIGHUP (a closed terminal) add to, unless they are ignored, as nohup
    has it. A second one ends the process at once, but not under torchrun, which repeats what the terminal has
    already sent."""
    caught = []

    def on_signal(number, frame):
        caught.append(number)
        if ranks()[1] == 1:
            signal.signal(number, signal.SIG_DFL)

    with contextlib.ExitStack() as afterwards:
        for name in "SIGINT", "SIGTERM", "SIGHUP":
            number = getattr(signal, name, None)        # Windows has no SIGHUP
            if number and signal.getsignal(number) != signal.SIG_IGN:
                handler = signal.signal(number, on_signal)
                afterwards.callback(signal.signal, number, handler)
        yield caught


def cast_weights(model, dtype):
    """{name: matrix in dtype}, which autocast would cast again for each micro-batch. Gradients flow through
    to the fp32 weights. The router and the embedding stay in fp32."""
    return {name: p.to(dtype) for name, p in model.named_parameters()
            if p.dim() > 1 and not name.endswith(("gate.weight", "embed_tokens.weight"))}


def to_device(batch, device):
    """x, y (B, T) of data.batch on the device; pinned on the way to a GPU, so that kernels run meanwhile."""
    if device.type == "cuda":
        batch = [t.pin_memory() for t in batch]
    return [t.to(device, non_blocking=True) for t in batch]


def forward_backward(model, weights, batches, divisors, autocast, doc_ids, mtp_loss_weight):
    """Forward and backward pass over the micro-batches (x, y) of a step: the gradients of the sum of their
    losses, each divided by its divisor. weights: see cast_weights. Returns that sum of the losses (total,
    main, MTP, balance), (4,), and the sum of the experts' load, (L, E)."""
    losses, load = 0, 0
    for i, ((x, y), divisor) in enumerate(zip(batches, divisors), 1):
        model.require_backward_grad_sync = i == len(divisors)       # DDP averages gradients once, at the end
        with autocast():
            options = dict(doc_ids=doc_ids(x, y), mtp_loss_weight=mtp_loss_weight)
            _, loss, aux = functional_call(model, weights, (x, y), options)
        (loss / divisor).backward()
        losses = losses + torch.stack([loss.detach(), aux["main"], aux["mtp"], aux["balance"]]) / divisor
        load = load + aux["load"]
    return losses, load


def mean_over_labels(batches, world):
    """What each micro-batch's mean loss is divided by, for the mean over all labels of a step on `world`
    ranks: those of prompts, -100, do not count, so that batches have different numbers of them."""
    labels = torch.tensor([(y != -100).sum() for _, y in batches], dtype=torch.float64)
    total = labels.sum()
    if world > 1:
        dist.all_reduce(total)
    return (total.clamp(min=1) / (labels * world)).tolist()     # inf for a batch without any


def document_ids(separator, x, y):
    """x, y (B, T) -> the number of each token's document, (B, T); None where separator is None: no masking.
    A separator inside a prompt, which is not predicted, does not end the document."""
    if separator is None:
        return None
    begins = x == separator
    begins[:, 1:] &= y[:, :-1] != -100
    return begins.cumsum(1)


def say(text):
    """print. Where nobody listens any more (a pipe to head, a closed terminal), save and stop."""
    try:
        print(text, flush=True)
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())      # for what is still in the buffer
        signal.raise_signal(signal.SIGTERM)


def peak_flops(device):
    """Dense bf16 FLOP/s of the card, from its maker's data sheet, or None where unknown."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    table = {"GB200": 2.5e15, "B200": 2.25e15, "H200": 989e12, "H100 PCIe": 756e12, "H100": 989e12,
             "H800": 989e12, "A100": 312e12, "L40S": 362e12, "L4": 121e12, "RTX 4090": 165e12,
             "RTX 3090": 71e12}
    return next((flops for key, flops in table.items() if key in name), None)


def warn_of_memory(model, cfg, device, dtype):
    """One line if a step will hardly fit: weights, gradients and moments, and about 25 activations of width
    hidden_size per token and layer."""
    activations = 25 * cfg.batch_size * cfg.block_size * model.config.hidden_size * len(model.model.layers)
    params = sum(p.numel() for p in model.parameters()) / (ranks()[1] if cfg.fsdp else 1)
    need, have = 16 * params + dtype.itemsize * activations, math.inf
    if device.type == "cuda":
        have = torch.cuda.get_device_properties(device).total_memory
    elif hasattr(os, "sysconf"):        # not on Windows
        have = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if need > have:
        say(f"warning: a step with --batch_size {cfg.batch_size} and --block_size {cfg.block_size} needs "
            f"about {need / 2**30:.0f} GB, and this {device.type} has {have / 2**30:.0f}; lower one of them")


def short_sample(model, ends, encoding, cfg):
    """How a document may begin, at most 64 tokens of it, sampled with a fixed seed of its own."""
    dice = torch.Generator(model.lm_head.weight.device).manual_seed(cfg.seed)
    start = torch.tensor([[ends.begin]], device=dice.device)
    tokens = model.generate(start, min(64, cfg.block_size - 1), 0.8, stop=ends.eos, generator=dice)
    enc = encoding_from_json(encoding)
    text = b"".join(token_bytes(enc, token) for token in tokens[0, 1:].tolist() if token not in ends.eos)
    return text.decode("utf-8", "replace")


def cut_log(path, step):
    """Keep the lines of log.jsonl up to a step: those after the checkpoint come again. Damaged lines go."""
    lines = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else ():
        with contextlib.suppress(ValueError, LookupError, TypeError, RecursionError):
            if json.loads(line)["iter"] <= step:
                lines.append(line + "\n")
    write_atomically(path, lambda f: f.write("".join(lines).encode()))


def write_log(path, entry):
    """Append an entry to log.jsonl; null for what is not finite, as JSON has no NaN."""
    entry = {key: None if isinstance(value, float) and not math.isfinite(value) else value
             for key, value in entry.items()}
    with writing(path), open(path, "a") as f:
        f.write(json.dumps(entry, default=lambda x: x.tolist() if hasattr(x, "tolist") else str(x)) + "\n")


def progress(entry):
    """What a terminal shows of an entry of log.jsonl."""
    mfu = f"{entry['mfu']:.1%}" if entry["mfu"] is not None else "n/a"
    dead = f" dead {entry['dead_experts']}" if entry["dead_experts"] else ""       # got no token
    return (f"loss {entry['loss']:.3f} main {entry['main_loss']:.3f} mtp {entry['mtp_loss']:.3f} | "
            f"norm {entry['grad_norm']:.2f} | lr {entry['lr']:.1e} | maxvio {entry['max_vio']:.2f}{dead} | "
            f"{entry['tokens_per_s']:,.0f} tok/s | mfu {mfu}")


def evaluation(val):
    """The same of what an evaluation found."""
    text = f"val loss {val['val_loss']:.4f} nats/token, {val['val_bpb']:.4f} bits/byte"
    if "val_loss_ema" in val:
        text += f"; of the average {val['val_loss_ema']:.4f}, {val['val_bpb_ema']:.4f}"
    return text


# ----------------------------------------------------------------------------------------------------------
# The run

def train(given, on_log):
    rank, world = ranks()
    if rank > 0:        # rank 0 goes first: it prepares the data, and says what is wrong
        dist.broadcast(torch.zeros(1), 0)
    cfg, config, ckpt = settings(given)
    out_dir = Path(cfg.out_dir)
    device = pick_device(cfg.device)
    bf16 = cfg.dtype == "bfloat16" or cfg.dtype == "auto" and has_bf16(device)
    dtype = torch.bfloat16 if bf16 else torch.float32
    meta, encoding, data = open_data(cfg, config, bool(ckpt or cfg.init_from or "vocab_size" in given), rank)
    if ckpt or cfg.init_from:
        known = encoding_from_json(ckpt["encoding"]) if ckpt else get_tokenizer(cfg.init_from)
        same_tokens = same_ids(encoding_from_json(encoding), known)
        if cfg.resume and not (same_tokens and ckpt["meta"].items() <= meta.items()):
            raise ValueError(f"the data in {cfg.data_dir} are not those that {out_dir} was trained on; "
                             "restore them, or start a new run in another --out_dir")
        if not same_tokens:
            raise ValueError(f"the data in {cfg.data_dir} were not prepared with the tokenizer of "
                             f"{cfg.init_from}; prepare them with: python data/prepare.py --tokenizer "
                             f"{ckpt['meta']['tokenizer'] if ckpt else cfg.init_from} --out_dir DIR")
    with torch.device("meta"):
        replaced = replaced_classes(DeepSeekV3(config))
    validation = Validation(Path(cfg.data_dir, "val.bin"), meta, encoding, cfg.batch_size, cfg.block_size)
    fell_back = rank == 0 and cfg.resume and ckpt["path"] != str(out_dir / "ckpt.pt")
    if fell_back:
        if (out_dir / "ckpt.pt").exists():
            os.replace(out_dir / "ckpt.pt", out_dir / "ckpt.damaged.pt")
        os.replace(ckpt["path"], out_dir / "ckpt.pt")
    if rank == 0 and world > 1:
        dist.broadcast(torch.zeros(1), 0)

    # Model and optimizers: new, released or saved weights
    torch.manual_seed(cfg.seed)
    torch.set_float32_matmul_precision("high")      # TF32 for what stays in fp32 on a GPU
    if cfg.deterministic:       # cuBLAS may differ from run to run without it
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(cfg.deterministic)
    raw_model = build_model(cfg, config, device, dtype, ckpt)
    config = raw_model.config       # a release may come without its MTP modules
    optimizers = make_optimizers(raw_model, cfg.optimizer, cfg.learning_rate, cfg.bf16_moments)
    ema = averaged_model(raw_model, cfg.ema_decay) if cfg.ema_decay else None
    state = {"step": 0, "samples": 0, "skipped": 0, "best": {"val_loss": math.inf, "iter": 0}}
    if cfg.resume:
        with fitting(ckpt["path"]):
            # a wrong type ends here in one sentence, not in the middle of the run
            state = {key: type(start)(ckpt["state"][key]) for key, start in state.items()}
            for optimizer, saved in zip(optimizers, ckpt["optimizers"], strict=True):
                load_optimizer(optimizer, saved)
            if ema:
                ema.module.load_state_dict(ckpt.get("ema", ckpt["model"]))
                ema.n_averaged.fill_(state["step"] - state["skipped"])
            torch.set_rng_state(ckpt["rng_state"])
    ckpt, model = None, raw_model       # frees the checkpoint's tensors
    eager = contextlib.nullcontext      # for decoding, whose shapes the compiler has not seen
    if cfg.compile or cfg.compile is None and device.type == "cuda" and not cfg.fsdp:
        eager = partial(torch.compiler.set_stance, "force_eager")
        torch._dynamo.config.recompile_limit = 16       # 3 kinds, to train, evaluate and --batch_ramp
        torch._dynamo.config.optimize_ddp = False       # which splits graphs that blocks have split already
        for block in raw_model.model.layers:            # blocks of one kind share what is compiled
            block.compile()
    if world > 1 and not cfg.fsdp:
        model = DistributedDataParallel(model)
        model.broadcast_buffers = False     # the only ones are router biases, which are equal on all ranks

    # The run, which is what a checkpoint holds, and its log
    accumulation = cfg.gradient_accumulation_steps
    sequences_per_step = world * cfg.batch_size * accumulation
    run = {"format": FORMAT, "config": dataclasses.asdict(config), "state": state, "meta": meta,
           "train_config": {**dataclasses.asdict(cfg), "resume": False, "fsdp": False},     # which may change
           "encoding": encoding, "source_files": raw_model.source_files, "replaced": replaced,
           "sequences_per_step": sequences_per_step}
    log_file = out_dir / "log.jsonl"
    if rank == 0:
        if not cfg.resume and log_file.exists():    # of a run that saved nothing, or was moved away
            os.replace(log_file, out_dir / "log.prev.jsonl")
        cut_log(log_file, state["step"])
        is_best = state["best"]["iter"] == state["step"] > 0
        if fell_back or is_best:
            kept = best_of(out_dir)
            if kept["val_loss"] < state["best"]["val_loss"]:    # of a later checkpoint, which was lost
                state["best"] = kept
            elif is_best and kept != state["best"]:             # a kill came between ckpt.pt and best.pt
                keep_best(out_dir / "ckpt.pt")

    # The order of the data, and what a step may look at
    sizes = batch_sizes(cfg.batch_size, cfg.max_iters, cfg.batch_ramp)
    sequences = (sizes * (world * accumulation)).cumsum()       # up to and with each step
    autocast = partial(torch.autocast, device.type, dtype, enabled=dtype != torch.float32)
    reused_weights = contextlib.nullcontext
    if cfg.fp8 and (cfg.recompute or accumulation > 1):
        from fp8 import quantized_once
        reused_weights = partial(quantized_once, raw_model)
    casts_weights = accumulation > 1 and dtype != torch.float32 and not (cfg.fp8 or cfg.fsdp or cfg.recompute)
    doc_ids = partial(document_ids, meta["separator"] if cfg.mask_documents else None)
    flops_per_token, peak = raw_model.flops_per_token(cfg.block_size), peak_flops(device)
    say(f"{cfg.init_from or cfg.preset}: {raw_model.num_params():,} parameters, "
        f"{raw_model.num_params(active=True):,} active per token; {len(data.tokens):,} tokens of "
        f"{cfg.data_dir}; {cfg.max_iters} steps of {sequences_per_step * cfg.block_size:,} tokens"
        f"{' in the end' * cfg.batch_ramp} on {f'{world} x ' * (world > 1)}{device.type} in "
        f"{str(dtype).removeprefix('torch.')}")
    warn_of_memory(raw_model, cfg, device, dtype)
    if cfg.resume:
        say(f"resumed {out_dir} at step {state['step']}")
        if state["step"] >= cfg.max_iters:
            say(f"{out_dir} has done its {cfg.max_iters} steps; to train on, give a larger --max_iters")
    elif cfg.init_from:
        val = validation.evaluate(model, device, autocast, doc_ids)
        say(f"step 0/{cfg.max_iters} | {evaluation(val)}")
        if rank == 0:
            nothing_yet = dict.fromkeys(["loss", "main_loss", "mtp_loss", "balance_loss", "lr", "grad_norm",
                                         "tokens_per_s", "mfu", "max_vio"])
            write_log(log_file, {"iter": 0, **nothing_yet, **val, "elapsed_s": time.monotonic() - START})

    # The loop
    stop, skipped_in_a_row = False, 0
    timer, timed_from = time.monotonic(), state["samples"]
    with caught_signals() as signals:
        while state["step"] < cfg.max_iters and not stop:
            step, size = state["step"], int(sizes[state["step"]])
            lr, gamma, lam = schedule(float(sequences[step] / sequences[-1]))
            # lambda is a tensor, as torch.compile takes a new number for a new constant
            lam = torch.tensor(config.mtp_loss_weight * lam)
            starts = [state["samples"] + (i * world + rank) * size for i in range(accumulation)]
            batches = (data.batch(start, size) for start in starts)
            divisors = [accumulation] * accumulation
            if data.mask is not None:
                batches = list(batches)
                divisors = mean_over_labels(batches, world)
            batches = (to_device(batch, device) for batch in batches)
            weights = cast_weights(model, dtype) if casts_weights else {}
            with reused_weights():
                losses, load = forward_backward(model, weights, batches, divisors, autocast, doc_ids, lam)
            losses = torch.cat([losses / world, losses.new_tensor([len(signals)])])
            if world > 1:       # the same sums on all ranks, so that all decide alike what follows
                dist.all_reduce(losses)
                dist.all_reduce(load)
            norm = torch.nn.utils.clip_grad_norm_(raw_model.parameters(), 1.0)
            grad_norm = norm.full_tensor() if cfg.fsdp else norm
            # The one moment in which the CPU waits for a GPU. It must, as a NaN would spread to every weight
            loss, main, mtp, balance, stop, grad_norm = torch.cat([losses, grad_norm[None]]).tolist()
            if math.isfinite(loss + grad_norm):
                for optimizer in optimizers:
                    for group in optimizer.param_groups:
                        group["lr"] = cfg.learning_rate * lr
                    optimizer.step()
                raw_model.update_router_bias(load, speed=config.bias_update_speed * gamma)
                if ema:
                    ema.update_parameters(raw_model)
                skipped_in_a_row = 0
            else:
                state["skipped"], skipped_in_a_row = state["skipped"] + 1, skipped_in_a_row + 1
                say(f"step {step + 1}/{cfg.max_iters} skipped: its loss or gradient is not finite")
            raw_model.zero_grad()
            samples = size * world * accumulation
            state["step"], state["samples"] = step + 1, state["samples"] + samples
            if skipped_in_a_row == GIVE_UP_AFTER:
                save_run(out_dir, run, raw_model, optimizers, ema)
                raise ValueError(
                    f"loss or gradient were not finite {GIVE_UP_AFTER} times in a row, up to step {step + 1} "
                    f"(samples {state['samples'] - samples} to {state['samples'] - 1}); {out_dir}/ckpt.pt "
                    "holds the last finite weights: look at the data, or --resume with a lower "
                    "--learning_rate; if these weights are ruined, copy best.pt to ckpt.pt first")

            # Logging
            evaluate = state["step"] % cfg.eval_interval == 0 or state["step"] == cfg.max_iters
            if not (evaluate or state["step"] % cfg.log_interval == 0 or state["step"] == 1):
                continue
            tokens_per_s = (state["samples"] - timed_from) * cfg.block_size / (time.monotonic() - timer)
            vio = load.float().amax(1) / load.float().mean(1) - 1       # MaxVio by layer (arXiv 2408.15664)
            entry = {"iter": state["step"], "loss": loss, "main_loss": main, "mtp_loss": mtp,
                     "balance_loss": balance, "lr": cfg.learning_rate * lr, "grad_norm": grad_norm,
                     "tokens_per_s": tokens_per_s,
                     "mfu": peak and flops_per_token * tokens_per_s / (peak * world),
                     "max_vio": vio.mean().item() if len(vio) else 0.0,
                     "dead_experts": int((load == 0).sum()), "skipped": state["skipped"]}
            left = int((sequences[-1] - sequences[step]) * cfg.block_size / tokens_per_s)
            name = f"step {state['step']}/{cfg.max_iters}"
            say(f"{name} | {progress(entry)} | {left // 60}:{left % 60:02d} left")
            if evaluate:
                val = validation.evaluate(model, device, autocast, doc_ids)
                if val["val_loss"] < state["best"]["val_loss"]:
                    state["best"] = {"val_loss": val["val_loss"], "iter": state["step"]}
                if ema:
                    averaged = validation.evaluate(ema.module, device, autocast, doc_ids)
                    val |= {f"{key}_ema": value for key, value in averaged.items()}
                if rank == 0 and not cfg.fsdp and math.isfinite(val["val_loss"]):
                    with autocast(), eager():
                        val["sample"] = short_sample(raw_model, ends_of_data(meta), encoding, cfg)
                entry |= val
            entry["elapsed_s"] = time.monotonic() - START
            if rank == 0:
                if on_log:
                    try:
                        on_log(entry, load)
                    except Exception as e:      # main would take a ValueError for a fault of the flags
                        raise RuntimeError("on_log failed") from e
                write_log(log_file, entry)
            if evaluate:        # saved before it is printed
                save_run(out_dir, run, raw_model, optimizers, ema)
                if "sample" in entry:
                    say(f"{name} | sample {entry['sample']!r}")
                say(f"{name} | {evaluation(val)} | saved {out_dir / 'ckpt.pt'}")
            timer, timed_from = time.monotonic(), state["samples"]

        if state["step"] < cfg.max_iters:
            save_run(out_dir, run, raw_model, optimizers, ema)
            command = f"torchrun --nproc_per_node {world}" if world > 1 else "python"
            say(f"interrupted at step {state['step']}; saved {out_dir / 'ckpt.pt'}. Continue with: "
                f"{command} train.py --resume{' --fsdp' * cfg.fsdp} --out_dir {shlex.quote(cfg.out_dir)}")
            sys.exit(130)
        where = shlex.quote(cfg.out_dir)
        say(f"done. Sample with: python sample.py --ckpt {where}; draw the run's curves with: python "
            f"tests/bench/plot_log.py {where}")


def main(argv=None, on_log=None):
    """Train as the flags in argv say. on_log(entry, load) is called on rank 0 with each entry of log.jsonl, a
    dict that it may add to, and with the load of the experts in that step, (L, E)."""
    given, rank = parse_args(argv), ranks()[0]
    if rank > 0:
        sys.stdout = open(os.devnull, "w")      # one speaks for all
    try:
        if "RANK" in os.environ:
            dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
        with sole_process(Path(given["out_dir"])) if rank == 0 else contextlib.nullcontext():
            train(given, on_log)
    except (ValueError, OSError, ImportError) as e:
        raise SystemExit(f"train.py: {e}") from None
    except RuntimeError as e:
        if "gloo" not in str(e) and not isinstance(e, dist.DistError):
            raise
        raise SystemExit(f"train.py: rank {rank} lost its connection to another rank; see that rank's error"
                         ) from None
    except KeyboardInterrupt:
        sys.exit(130)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)
    main()
    if "RANK" in os.environ:
        # FSDP's caches keep gloo's threads alive, and one that drops a tensor while Python shuts down aborts
        # the process (torch 2.13). The checkpoint is written, so leave without the shutdown
        if sys.stdout:
            sys.stdout.flush()
        os._exit(0)
