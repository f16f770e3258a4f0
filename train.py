"""
Train a DeepSeek-V3 on one device, or by torchrun on many.

    python train.py                                   # 0.7M active parameters on the Python standard library's source
    python train.py --preset small --data_dir data/fineweb
    python train.py --init_from DIR --data_dir data/mine    # fine-tune a released checkpoint
    python train.py --resume                          # go on where out/ckpt.pt stopped
    python train.py --preset tiny --n_routed_experts 32 --num_nextn_predict_layers 2    # any field of the model's config
    torchrun --nproc_per_node 8 train.py --preset small         # --batch_size is each GPU's; --fsdp: for larger models

Writes OUT_DIR/ckpt.pt (the last checkpoint, with all that sample.py and --resume need), OUT_DIR/best.pt (that of the
lowest validation loss) and OUT_DIR/log.jsonl.
"""

import time
START = time.monotonic()    # before torch, whose import takes seconds

import argparse
import contextlib
import ctypes
import dataclasses
import json
import math
import os
import signal
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from checkpoint import (Parser, has_bf16, keep_best, load_run, load_shards, pick_device, read_config,
                        released_folder, save_run, save_shards, set_aside, sole_process, write_atomically, writing)
from data.loader import Validation, open_data
from data.tokenizer import encoding_from_json, get_tokenizer, same_ids, token_bytes
from model import MTP, DeepSeekV3, DeepSeekV3Config, Gate
from optim import batch_sizes, make_optimizers, schedule


# ----------------------------------------------------------------------------------------------------------------------
# Settings: every field is a flag

def option(default, help):
    return field(default=default, metadata={"help": help})


@dataclass
class TrainConfig:
    preset: str = option("tiny", "model and recipe to start from: tiny, small, 16b, 671b")
    data_dir: str = option("data/stdlib", "folder with train.bin and val.bin; prepared if there is nothing in it yet")
    out_dir: str = option("out", "folder for ckpt.pt and log.jsonl")
    resume: bool = option(False, "go on from OUT_DIR/ckpt.pt, with its settings")
    init_from: str = option(None, "fine-tune: folder of a released checkpoint, whose weights, config and tokenizer are "
                                  "taken; a --block_size beyond its context extends it with YaRN")
    device: str = option("auto", "cuda, mps or cpu; auto: the first of these that is there")
    dtype: str = option("auto", "of the computation, float32 or bfloat16; auto: bfloat16 on a GPU that has it")
    fp8: bool = option(False, "multiply in FP8 as the report does (fp8.py): Triton kernels from sm_89 on, elsewhere "
                              "emulated")
    compile: bool = option(None, "torch.compile the model; default: on a GPU")
    fsdp: bool = option(False, "torchrun: shard weights, gradients and optimizer over the ranks, for models that one card "
                               "can't hold")
    recompute: bool = option(False, "save memory: compute norms, SwiGLU and MLA's up-projections anew in the backward pass, "
                                    "as the report does")
    deterministic: bool = option(False, "the same bits from run to run, on a GPU too, for some speed")
    seed: int = option(1337, "of the initial weights and of the order of the data")
    max_iters: int = option(None, "optimizer steps")
    batch_size: int = option(None, "sequences of a micro-batch, on each rank of torchrun")
    block_size: int = option(None, "tokens of a sequence")
    gradient_accumulation_steps: int = option(1, "micro-batches of an optimizer step")
    batch_ramp: bool = option(False, "begin with micro-batches of a fifth of --batch_size, as the report does")
    optimizer: str = option("adamw", "adamw, or muon for the hidden matrices with adamw for the rest (tiny: muon)")
    bf16_moments: bool = option(False, "keep AdamW's moments in bfloat16, as the report does")
    learning_rate: float = option(None, "the peak")
    ema_decay: float = option(0.0, "of a moving average of the weights on the CPU, evaluated and saved beside them (0: none)")
    mask_documents: bool = option(False, "keep attention and MTP from crossing documents (the report doesn't, in "
                                         "pre-training)")
    eval_interval: int = option(None, "steps between evaluations, each with a checkpoint; the last step has one anyway")
    log_interval: int = option(10, "steps between progress lines")


# What the flags above default to, by preset. "tiny" was tuned by measurement on two CPU cores (README); the others
# follow common practice for their size, 671b the report (§4.2), and have not been run.
RECIPES = {
    "tiny": dict(optimizer="muon", learning_rate=0.015, max_iters=500, batch_size=24, block_size=128, eval_interval=250),
    "small": dict(learning_rate=6e-4, max_iters=20000, batch_size=32, block_size=1024, eval_interval=1000),
    "16b": dict(learning_rate=4.2e-4, max_iters=100000, batch_size=8, block_size=4096, eval_interval=1000),
    "671b": dict(learning_rate=2.2e-4, max_iters=235000, batch_size=8, block_size=4096, eval_interval=1000),
}
FINETUNE = dict(learning_rate=1e-5, max_iters=200, batch_size=4, block_size=1024, eval_interval=100)   # not tuned


def ranks():
    """-> the number of this process and how many there are, as torchrun tells them."""
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def parse_args(argv):
    """-> dict of the flags that were given, defaults left out."""
    def int_or_none(text):
        return None if text.lower() == "none" else int(text)

    def flag(f):
        if f.type is bool:
            kind = dict(action=argparse.BooleanOptionalAction)
        else:
            kind = dict(type={"q_lora_rank": int_or_none, "rope_scaling": json.loads}.get(f.name, f.type))
        return dict(default=argparse.SUPPRESS, help=f.metadata.get("help"), **kind)

    parser = Parser(__doc__)
    for f in dataclasses.fields(TrainConfig):
        parser.add_argument(f"--{f.name}", **flag(f))
    group = parser.add_argument_group("the model's config (defaults: the preset's)")
    for f in dataclasses.fields(DeepSeekV3Config):
        group.add_argument(f"--{f.name}", **flag(f))
    return vars(parser.parse_args(argv))


def configure(given):
    """The flags that were given -> TrainConfig, DeepSeekV3Config and, with --resume, the checkpoint (else None)."""
    train_fields = {f.name for f in dataclasses.fields(TrainConfig)}
    train_flags = {k: v for k, v in given.items() if k in train_fields}
    model_flags = {k: v for k, v in given.items() if k not in train_fields}
    out_dir, ckpt = Path(given.get("out_dir", TrainConfig.out_dir)), None
    if given.get("resume"):
        ckpt, path = load_run(out_dir)
        for key, value in {**model_flags, **{k: v for k, v in train_flags.items() if k in FIXED_ON_RESUME}}.items():
            saved = (ckpt["config"] | ckpt["train_config"]).get(key)
            if value != saved:
                raise ValueError(f"--{key} {value} contradicts {path}, which was trained with {key}={saved}; leave "
                                 "the flag out, or start a new run in another --out_dir")
        try:
            cfg, config = TrainConfig(**{**ckpt["train_config"], **train_flags}), DeepSeekV3Config(**ckpt["config"])
        except TypeError as e:
            raise ValueError(f"{path} is of another version of train.py ({e}); go on with that one") from None
        for f in dataclasses.fields(cfg):
            value = getattr(cfg, f.name)
            if type(value) is not f.type and (value is not None or f.name not in ("init_from", "compile")):
                raise ValueError(f"{path} has {f.name}={value!r}, which is not of type {f.type.__name__}")
        per_step = ranks()[1] * cfg.batch_size * cfg.gradient_accumulation_steps
        if per_step != ckpt["sequences_per_step"]:
            raise ValueError(f"--batch_size {cfg.batch_size} contradicts {path}: with {ranks()[1]} ranks and "
                             f"--gradient_accumulation_steps {cfg.gradient_accumulation_steps} it makes {per_step} "
                             f"sequences per step, and the run has {ckpt['sequences_per_step']}")
        if ".prev" in path.name:
            set_aside(path, ckpt)
        model_flags = {}
    elif earlier := [p for name in ("ckpt.pt", "ckpt.prev.pt", "ckpt", "ckpt.prev", "best.pt")
                     if (p := out_dir / name).exists()]:
        raise ValueError(f"{earlier[0]} holds an earlier run; go on with it by --resume, or start anew in another "
                         "--out_dir")
    elif "init_from" in given:
        if "preset" in given:
            raise ValueError("--preset and --init_from contradict each other: the folder has its own config.json")
        given["init_from"] = train_flags["init_from"] = str(released_folder(given["init_from"]))
        config = read_config(Path(given["init_from"]))
        for name in model_flags.keys() - set(FREE_OF_WEIGHTS):
            raise ValueError(f"--{name} can't be given with --init_from, as the weights of {given['init_from']} decide "
                             f"it; only {', '.join(FREE_OF_WEIGHTS)} can")
        cfg = TrainConfig(**{**FINETUNE, **train_flags})
        if cfg.block_size > config.max_position_embeddings and not {"rope_scaling",
                                                                    "max_position_embeddings"} & model_flags.keys():
            model_flags |= extend_context(config, cfg.block_size)
            print(f"context extended from {config.max_position_embeddings} to {cfg.block_size} tokens with YaRN: "
                  f"{model_flags['rope_scaling']}")
    else:
        config = DeepSeekV3Config.preset(given.get("preset", TrainConfig.preset))
        cfg = TrainConfig(**{**RECIPES[given.get("preset", TrainConfig.preset)], **train_flags})
    config = dataclasses.replace(config, **model_flags)
    for name in ("max_iters", "batch_size", "block_size", "gradient_accumulation_steps", "eval_interval",
                 "log_interval"):
        if getattr(cfg, name) < 1:
            raise ValueError(f"--{name} must be at least 1, got {getattr(cfg, name)}")
    if cfg.batch_ramp and cfg.batch_size < 5:
        raise ValueError(f"--batch_ramp begins with a fifth of --batch_size {cfg.batch_size}, which is less than a "
                         "sequence; make it at least 5")
    if not 0 < cfg.learning_rate < math.inf:
        raise ValueError(f"--learning_rate must be a finite number over 0, got {cfg.learning_rate}")
    if not 0 <= cfg.ema_decay < 1:
        raise ValueError(f"--ema_decay must be at least 0 and less than 1, got {cfg.ema_decay}")
    if cfg.ema_decay and cfg.fsdp:
        raise ValueError("--ema_decay can't be given with --fsdp: rank 0 averages whole weights, and has none")
    if cfg.optimizer not in ("adamw", "muon"):
        raise ValueError(f"--optimizer {cfg.optimizer!r} is unknown; choose adamw or muon")
    if cfg.recompute and cfg.fp8:
        raise ValueError("--recompute can't be given with --fp8, which has its own way: activations are kept in FP8")
    if cfg.fsdp and cfg.optimizer == "muon":
        raise ValueError("--fsdp needs --optimizer adamw: Muon orthogonalizes whole matrices, and no rank holds one")
    if cfg.fsdp and cfg.bf16_moments:
        raise ValueError("--bf16_moments can't be given with --fsdp, which divides the fp32 ones among the ranks")
    if cfg.fsdp and "RANK" not in os.environ:
        raise ValueError("--fsdp shards over the ranks of torchrun; start it with: torchrun --nproc_per_node N train.py")
    if cfg.block_size > config.max_position_embeddings:
        raise ValueError(f"--block_size {cfg.block_size} is more than max_position_embeddings="
                         f"{config.max_position_embeddings}; lower it, raise --max_position_embeddings, or extend a "
                         "trained model with YaRN (--rope_scaling)")
    return cfg, config, ckpt


def extend_context(config, length):
    """Fields of a config that extend its context to `length` tokens, with the report's YaRN (§4.3). A factor that was
    chosen larger than this length needs stays: the report's is 40 through both of its phases."""
    yarn = config.rope_scaling or dict(type="yarn", original_max_position_embeddings=config.max_position_embeddings,
                                       beta_fast=32, beta_slow=1, mscale=1.0, mscale_all_dim=1.0)
    original = yarn.get("original_max_position_embeddings") or config.max_position_embeddings
    factor = max(yarn.get("factor", 1), length / original)
    return {"rope_scaling": {**yarn, "original_max_position_embeddings": original, "factor": factor},
            "max_position_embeddings": length}


# the fields of a config that weights can do without
FREE_OF_WEIGHTS = ("max_position_embeddings", "rope_scaling", "bias_update_speed", "balance_loss_alpha",
                   "mtp_loss_weight")
GIVE_UP_AFTER = 10      # steps in a row whose loss or gradient is not finite
# what --resume can't change: the order of the data and the optimizer's state depend on these
FIXED_ON_RESUME = ("preset", "init_from", "fp8", "seed", "block_size", "batch_ramp", "optimizer", "bf16_moments",
                   "fsdp")


def pick_dtype(cfg, device):
    """-> dtype of the computation."""
    if cfg.dtype not in ("auto", "float32", "bfloat16"):
        raise ValueError(f"--dtype {cfg.dtype!r} is unknown; choose float32 or bfloat16")
    bf16 = cfg.dtype == "bfloat16" or (cfg.dtype == "auto" and device.type == "cuda" and has_bf16(device))
    return torch.bfloat16 if bf16 else torch.float32


def keep_freed_memory():
    """On Linux glibc returns each large buffer to the kernel when it is freed, and pays for it in page faults when the
    next step asks for it again: about a tenth of a small model's step on a CPU. Tell it to keep them."""
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return      # another C library, which has no such habit to break
    mallopt(-3, 2**30)          # M_MMAP_THRESHOLD
    mallopt(-1, 2**31 - 1)      # M_TRIM_THRESHOLD


# ----------------------------------------------------------------------------------------------------------------------
# The model and its average

class EMA:
    """Exponential moving average of weights and router biases in the CPU's memory (§3.2.2): an early estimate of what the
    learning rate's decay will bring. A GPU doesn't wait for it: while it computes the next step, the weights travel into
    pinned memory on a stream of their own, and a thread averages what has arrived."""

    def __init__(self, model, decay, mean=None):
        self.weights, self.decay = model.state_dict(), decay        # the weights themselves, no copies
        self.mean = mean or {name: w.to("cpu", copy=True) for name, w in self.weights.items()}
        self.arrived, self.stream = self.weights, None
        if model.lm_head.weight.is_cuda:
            self.arrived = {name: torch.empty_like(m, pin_memory=True) for name, m in self.mean.items()}
            self.stream, self.thread, self.averaged = torch.cuda.Stream(), ThreadPoolExecutor(1), None

    def update(self, step):
        """Take in the weights as this step left them. In the first steps their share is larger, 9 / (step + 9), lest the
        initial weights linger."""
        share = max(1 - self.decay, 9 / (step + 9))
        if not self.stream:
            return self.average(share)
        self.wait()
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            for name, w in self.weights.items():
                self.arrived[name].copy_(w, non_blocking=True)
        self.averaged = self.thread.submit(self.average, share)

    def average(self, share):
        if self.stream:
            self.stream.synchronize()
        torch._foreach_lerp_(list(self.mean.values()), list(self.arrived.values()), share)

    def before_weights_change(self):
        """The GPU waits until they have left."""
        if self.stream:
            torch.cuda.current_stream().wait_stream(self.stream)

    def wait(self):
        if self.stream and self.averaged:
            self.averaged.result()

    @contextlib.contextmanager
    def in_place(self):
        """The average in the weights' place, for a while."""
        self.wait()
        raw = {name: w.to("cpu", copy=True) for name, w in self.weights.items()}
        try:
            for name, w in self.weights.items():
                w.copy_(self.mean[name])
            yield
        finally:
            for name, w in self.weights.items():
                w.copy_(raw[name])


def load_released(dir, config, device):
    """The model of a released checkpoint in fp32, with config's choice of what weights can do without."""
    changes = {name: getattr(config, name) for name in FREE_OF_WEIGHTS}
    return DeepSeekV3.from_pretrained(dir, torch.float32, device, **changes).train()


def sharded_model(config, device, dtype, init_from=None):
    """FSDP2: each rank keeps its share of every weight; a block's are gathered when it computes, in the computation's
    dtype, and dropped again; gradients are summed in fp32. No device ever holds more than one whole weight and block;
    of a released checkpoint, rank 0 holds all on the CPU for a while."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict       # slow
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
    from torch.distributed.tensor import distribute_tensor
    released = load_released(init_from, config, "cpu") if init_from and dist.get_rank() == 0 else None
    configs = [released.config if released else config]
    dist.broadcast_object_list(configs)
    with torch.device("meta"):
        model = DeepSeekV3(configs[0])
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    for block in model.model.layers:
        for module in [m for m in block.modules() if isinstance(m, Gate)]:
            fully_shard(module, mesh=mesh)                      # the router computes in fp32
        if isinstance(block, MTP):
            fully_shard(block.shared_head.norm, mesh=mesh)      # runs after the block, which has dropped its weights
        fully_shard(block, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh)       # embedding, final norm, head: in fp32, for the residual stream
    model.to_empty(device=device)
    if init_from:
        set_model_state_dict(model, released.state_dict() if released else {},
                             options=StateDictOptions(full_state_dict=True, broadcast_from_rank0=True))
        return model
    with torch.no_grad():
        for p in model.parameters():    # as in DeepSeekV3.__init__; whole, so that the number of ranks doesn't matter
            whole = torch.ones(p.shape, device=device)
            if p.dim() > 1:
                whole.normal_(std=config.initializer_range)
            p.copy_(distribute_tensor(whole, mesh, p.placements, src_data_rank=None))
        for router_bias in model.buffers():
            router_bias.zero_()
    return model


def recompute(model):
    """Activation checkpointing (§3.2.3): the backward pass computes norms, rotations, SwiGLU and MLA's up-projections anew
    instead of finding them in memory. The other matrix products and attention, dear to compute, are kept."""
    from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts      # slow
    aten, c = torch.ops.aten, model.config
    kept = {aten.mm.default, aten._grouped_mm.default, aten._scaled_dot_product_flash_attention.default,
            aten._scaled_dot_product_flash_attention_for_cpu.default, aten._scaled_dot_product_cudnn_attention.default,
            aten._scaled_dot_product_efficient_attention.default}
    up_projections = {(c.q_lora_rank, c.num_attention_heads * (c.qk_nope_head_dim + c.qk_rope_head_dim)),
                      (c.kv_lora_rank, c.num_attention_heads * (c.qk_nope_head_dim + c.v_head_dim))}    # q_b_proj, kv_b_proj

    def policy(ctx, op, *args, **kwargs):
        keep = op in kept and not (op is aten.mm.default and tuple(args[1].shape) in up_projections)
        return CheckpointPolicy.MUST_SAVE if keep else CheckpointPolicy.PREFER_RECOMPUTE

    for block in model.model.layers:
        block.forward = partial(checkpoint, block.forward, use_reentrant=False,
                                context_fn=partial(create_selective_checkpoint_contexts, policy))


def build_model(cfg, config, device, dtype, init_from):
    """The model to train, with the weights of the released checkpoint init_from or new ones; its layers as cfg asks."""
    if cfg.fsdp:
        model = sharded_model(config, device, dtype, init_from)
    elif init_from:
        model = load_released(init_from, config, device)
    else:
        with torch.device(device):
            model = DeepSeekV3(config)
    if cfg.fp8:
        from fp8 import convert_to_fp8      # and with it Triton, if it is there
        convert_to_fp8(model)
    if cfg.recompute:
        recompute(model)
    return model


def peak_flops(device):
    """Dense bf16 FLOP/s of the card, from its maker's data sheet, or None where unknown."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    table = {"GB200": 2.5e15, "B200": 2.25e15, "H200": 989e12, "H100 PCIe": 756e12, "H100": 989e12, "H800": 989e12,
             "A100": 312e12, "L40S": 362e12, "L4": 121e12, "RTX 4090": 165e12, "RTX 3090": 71e12}
    return next((flops for key, flops in table.items() if key in name), None)


# ----------------------------------------------------------------------------------------------------------------------
# A run

def short_sample(model, separator, encoding, cfg):
    """How a document may begin, at most 64 tokens of it: the same dice each time, and not those of the training."""
    dice = torch.Generator(model.lm_head.weight.device).manual_seed(cfg.seed)
    start = torch.tensor([[separator]], device=dice.device)
    tokens = model.generate(start, min(64, cfg.block_size - 1), 0.8, stop=[separator], generator=dice)
    enc = encoding_from_json(encoding)
    text = b"".join(token_bytes(enc, token) for token in tokens[0, 1:].tolist() if token != separator)
    return text.decode("utf-8", "replace")


def logged(path, step):
    """The lines of log.jsonl up to a step: what came after the checkpoint happens anew. A line that was cut off or damaged
    is left out, for it should not keep a run from going on."""
    lines = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else ():
        try:
            if json.loads(line)["iter"] <= step:
                lines.append(line)
        except (ValueError, LookupError, TypeError):
            continue
    return lines


def progress(entry):
    """What a terminal shows of an entry of log.jsonl."""
    mfu = f"{entry['mfu']:.1%}" if entry["mfu"] is not None else "n/a"
    dead = f" dead {entry['dead_experts']}" if entry["dead_experts"] else ""    # no token of this step went to them
    return (f"loss {entry['loss']:.3f} main {entry['main_loss']:.3f} mtp {entry['mtp_loss']:.3f} | "
            f"norm {entry['grad_norm']:.2f} | lr {entry['lr']:.1e} | maxvio {entry['max_vio']:.2f}{dead} | "
            f"{entry['tokens_per_s']:,.0f} tok/s | mfu {mfu}")


def main(argv=None):
    given, (rank, world) = parse_args(argv), ranks()
    if rank > 0:
        sys.stdout = open(os.devnull, "w")      # one speaks for all
    try:
        if "RANK" in os.environ:
            dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
        with sole_process(Path(given.get("out_dir", TrainConfig.out_dir))) if rank == 0 else contextlib.nullcontext():
            run(given, rank, world)
    except (ValueError, OSError, ImportError) as e:
        raise SystemExit(f"train.py: {e}") from None
    except RuntimeError as e:
        if "gloo" not in str(e) and not isinstance(e, dist.DistError):
            raise
        raise SystemExit(f"train.py: rank {rank} lost touch with another rank, whose own words say why") from None
    except KeyboardInterrupt:
        sys.exit(130)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def run(given, rank, world):
    if rank > 0:        # rank 0 goes first: it prepares the data, and says what is wrong
        dist.broadcast(torch.zeros(1), 0)
    cfg, config, ckpt = configure(given)
    device = pick_device(cfg.device)
    dtype = pick_dtype(cfg, device)
    meta, encoding, data = open_data(cfg, config, ckpt is not None or "vocab_size" in given or bool(cfg.init_from),
                                     rank)
    if cfg.init_from and not ckpt and not same_ids(encoding_from_json(encoding), get_tokenizer(cfg.init_from)):
        raise ValueError(f"the data in {cfg.data_dir} were not prepared with the tokenizer of {cfg.init_from}; "
                         f"prepare them with: python data/prepare.py --tokenizer {cfg.init_from} --out_dir DIR")
    out_dir = Path(cfg.out_dir)
    if ckpt and not ckpt["meta"].items() <= meta.items():
        raise ValueError(f"the data in {cfg.data_dir} are not those that {out_dir} was trained on; restore them, or "
                         "start a new run in another --out_dir")
    validation = Validation(Path(cfg.data_dir, "val.bin"), meta, encoding, cfg.block_size)
    if rank == 0 and world > 1:
        dist.broadcast(torch.zeros(1), 0)

    # Model, optimizers, and where to go on
    if device.type == "cpu":
        keep_freed_memory()
    torch.manual_seed(cfg.seed)
    torch.set_float32_matmul_precision("high")      # TF32 for what stays in fp32 on a GPU
    if cfg.deterministic:       # without it cuBLAS may differ from run to run
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(cfg.deterministic)
    raw_model = build_model(cfg, config, device, dtype, None if ckpt else cfg.init_from)
    config = raw_model.config       # a released model may come without its MTP modules
    optimizers = make_optimizers(raw_model, cfg.optimizer, cfg.learning_rate, cfg.bf16_moments)
    step, samples, skipped, log, best = 0, 0, 0, [], {"val_loss": math.inf, "iter": 0}
    if ckpt:
        if cfg.fsdp:
            load_shards(ckpt["shards"], raw_model, *optimizers)
        else:
            raw_model.load_state_dict(ckpt["model"])
            for optimizer, state in zip(optimizers, ckpt["optimizers"], strict=True):
                optimizer.load_state_dict(state)
        step, samples, skipped, best = ckpt["step"], ckpt["samples"], ckpt["skipped"], ckpt.get("best", best)
        if best["iter"] == step and rank == 0 and not cfg.fsdp:     # a kill may have come between the two files
            keep_best(out_dir)
        torch.set_rng_state(ckpt["rng_state"])
        log = logged(out_dir / "log.jsonl", step)
    if rank == 0:
        write_atomically(out_dir / "log.jsonl", lambda f: f.write("".join(line + "\n" for line in log).encode()))
    ema = EMA(raw_model, cfg.ema_decay, ckpt and ckpt.get("ema")) if cfg.ema_decay and rank == 0 else None
    use_compile = device.type == "cuda" and not cfg.fsdp if cfg.compile is None else cfg.compile
    model = single = torch.compile(raw_model) if use_compile else raw_model      # single: what a rank can run alone
    if world > 1 and not cfg.fsdp:      # averages the gradients; the only buffers are router biases, equal on all ranks
        model = DistributedDataParallel(model, forward_sync_buffers=False)

    def autocast():
        return torch.autocast(device.type, dtype) if dtype != torch.float32 else contextlib.nullcontext()

    def doc_ids(x):
        return (x == meta["separator"]).cumsum(1) if cfg.mask_documents else None

    def micro_batches(start):
        """This rank's share, on the device, of every micro-batch from here to the end of the run."""
        for size in sizes[step:].tolist():
            for _ in range(cfg.gradient_accumulation_steps):
                x, y = data.batch(start + rank * size, size)
                if device.type == "cuda":       # the copy runs beside the kernels
                    x, y = x.pin_memory(), y.pin_memory()
                yield tuple(t.to(device, non_blocking=device.type == "cuda") for t in (x, y))
                start += world * size

    def save_checkpoint():
        state = {"config": dataclasses.asdict(config), "train_config": {**dataclasses.asdict(cfg), "resume": False},
                 "step": step, "samples": samples, "skipped": skipped, "best": best,
                 "rng_state": torch.get_rng_state(), "meta": meta, "encoding": encoding,
                 "sequences_per_step": sequences_per_step}
        if cfg.fsdp:
            save_shards(out_dir, state, raw_model, *optimizers)
        elif rank == 0:
            if ema:
                ema.wait()
                state["ema"] = ema.mean
            save_run(out_dir, state | {"model": raw_model.state_dict(),
                                       "optimizers": [optimizer.state_dict() for optimizer in optimizers]})
            if best["iter"] == step:
                keep_best(out_dir)
        if world > 1:       # torchrun ends all ranks when one ends, so none may before the file is there
            dist.barrier()

    saved = out_dir / ("ckpt" if cfg.fsdp else "ckpt.pt")
    sequences_per_step = world * cfg.batch_size * cfg.gradient_accumulation_steps
    sizes = batch_sizes(cfg.batch_size, cfg.max_iters, cfg.batch_ramp)
    sequences = (sizes * (world * cfg.gradient_accumulation_steps)).cumsum()        # up to and with each step
    flops_per_token, peak = raw_model.flops_per_token(cfg.block_size), peak_flops(device)
    peak = peak and peak * world
    print(f"{cfg.init_from or cfg.preset}: {raw_model.num_params():,} parameters, "
          f"{raw_model.num_params(active=True):,} active per token; {len(data.tokens):,} tokens of {cfg.data_dir}; "
          f"{cfg.max_iters} steps of {sequences_per_step * cfg.block_size:,} tokens{' in the end' * cfg.batch_ramp} on "
          f"{f'{world} x ' * (world > 1)}{device.type} in {str(dtype).removeprefix('torch.')}")
    if step:
        print(f"resumed {out_dir} at step {step}")

    # Ctrl-C or SIGTERM: finish the step, save, and go; a second one ends the process at once, but not under torchrun,
    # which passes on what the terminal has sent already
    interrupted = stop = False

    def on_signal(number, frame):
        nonlocal interrupted
        interrupted = True
        if world == 1:
            signal.signal(number, signal.SIG_DFL)

    before = {number: signal.signal(number, on_signal) for number in (signal.SIGINT, signal.SIGTERM)}

    # The training loop
    batches = micro_batches(samples)
    upcoming = next(batches, None)
    timer, timed_from, skipped_in_a_row = time.monotonic(), samples, 0
    while step < cfg.max_iters and not stop:
        batch_size, (lr, gamma, lam) = int(sizes[step]), schedule(float(sequences[step] / sequences[-1]))
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = cfg.learning_rate * lr
        load = 0
        losses = torch.zeros(5, device=device)      # loss, main, mtp, balance: sums over micro-batches; interrupted
        for micro_step in range(cfg.gradient_accumulation_steps):
            x, y = upcoming
            if isinstance(model, DistributedDataParallel):      # averages the gradients with the last micro-batch only
                model.require_backward_grad_sync = micro_step == cfg.gradient_accumulation_steps - 1
            with autocast():
                _, loss, aux = model(x, y, doc_ids=doc_ids(x), mtp_loss_weight=torch.tensor(config.mtp_loss_weight * lam))
            (loss / cfg.gradient_accumulation_steps).backward()
            upcoming = next(batches, None)      # read while a GPU still computes
            losses[:4] += torch.stack([loss.detach(), aux["main"], aux["mtp"], aux["balance"]])
            load = load + aux["load"]
            samples += world * batch_size
        losses[4] = interrupted
        if world > 1:       # one sum for all, so that all decide alike what follows
            dist.all_reduce(losses)
            dist.all_reduce(load)
        grad_norm = torch.nn.utils.clip_grad_norm_(raw_model.parameters(), 1.0)
        if cfg.fsdp:
            grad_norm = grad_norm.full_tensor()
        # One NaN or infinity would spread to every weight: such a step changes nothing. To know in time, the CPU waits
        # for the GPU here, at the cost of queueing no kernels ahead of it
        finite, stop = torch.stack([torch.isfinite(losses.sum() + grad_norm), losses[4] > 0]).tolist()
        if finite:
            if ema:
                ema.before_weights_change()
            for optimizer in optimizers:
                optimizer.step()
            raw_model.update_router_bias(load, speed=config.bias_update_speed * gamma)
            if ema:
                ema.update(step + 1)
            skipped_in_a_row = 0
        else:
            skipped, skipped_in_a_row = skipped + 1, skipped_in_a_row + 1
            print(f"step {step + 1}/{cfg.max_iters} skipped: its loss or gradient is not finite", flush=True)
        raw_model.zero_grad(set_to_none=True)
        step += 1
        if skipped_in_a_row == GIVE_UP_AFTER:
            save_checkpoint()
            first = samples - world * batch_size * cfg.gradient_accumulation_steps
            raise ValueError(f"loss or gradient were not finite {GIVE_UP_AFTER} times in a row, up to step {step} "
                             f"(samples {first} to {samples - 1}); {saved} holds the last good weights: look "
                             "at the data, or --resume with a lower --learning_rate")

        # Logging
        evaluate = step % cfg.eval_interval == 0 or step == cfg.max_iters
        if step % cfg.log_interval == 0 or step == 1 or evaluate:
            loss, main_loss, mtp_loss, balance_loss = (losses[:4] / cfg.gradient_accumulation_steps / world).tolist()
            tokens_per_s = (samples - timed_from) * cfg.block_size / (time.monotonic() - timer)
            vio = load.float().amax(1) / load.float().mean(1) - 1      # MaxVio of each layer (arXiv 2408.15664)
            entry = {"iter": step, "loss": loss, "main_loss": main_loss, "mtp_loss": mtp_loss,
                     "balance_loss": balance_loss, "lr": cfg.learning_rate * lr, "grad_norm": grad_norm.item(),
                     "tokens_per_s": tokens_per_s, "mfu": flops_per_token * tokens_per_s / peak if peak else None,
                     "max_vio": vio.mean().item() if len(vio) else 0.0, "dead_experts": int((load == 0).sum()),
                     "skipped": skipped}
            left = int((sequences[-1] - sequences[step - 1]) * cfg.block_size / tokens_per_s)
            print(f"step {step}/{cfg.max_iters} | {progress(entry)} | {left // 60}:{left % 60:02d} left", flush=True)
            if evaluate:
                val = validation.evaluate(model, cfg.batch_size, device, autocast, doc_ids)
                if ema:
                    with ema.in_place():
                        averaged = validation.evaluate(single, cfg.batch_size, device, autocast, doc_ids)
                    val |= {f"{name}_ema": value for name, value in averaged.items()}
                if val["val_loss"] < best["val_loss"]:
                    best = {"val_loss": val["val_loss"], "iter": step}
                entry |= val
            entry["elapsed_s"] = time.monotonic() - START
            if rank == 0:
                entry = {k: v if v is not None and math.isfinite(v) else None for k, v in entry.items()}    # JSON has no NaN
                if evaluate and entry["val_loss"] and not cfg.fsdp:
                    entry["sample"] = short_sample(raw_model, meta["separator"], encoding, cfg)
                    print(f"step {step}/{cfg.max_iters} | sample {entry['sample']!r}")
                with writing(out_dir / "log.jsonl"), open(out_dir / "log.jsonl", "a") as f:
                    f.write(json.dumps(entry) + "\n")
            if evaluate:
                save_checkpoint()
                average = f"; of the average {val['val_loss_ema']:.4f}, {val['val_bpb_ema']:.4f}" if ema else ""
                print(f"step {step}/{cfg.max_iters} | val loss {val['val_loss']:.4f} nats/token, "
                      f"{val['val_bpb']:.4f} bits/byte{average} | saved {saved}", flush=True)
            timer, timed_from = time.monotonic(), samples

    if stopped := stop and step < cfg.max_iters:
        save_checkpoint()
    for number, handler in before.items():
        signal.signal(number, handler)
    if stopped:
        print(f"interrupted at step {step}; saved {saved}. Go on with: python train.py --resume --out_dir "
              f"{out_dir}")
        sys.exit(130)
    print(f"done. Sample with: python sample.py --ckpt {out_dir}")


if __name__ == "__main__":
    main()
    if "RANK" in os.environ:
        # FSDP's caches keep gloo's threads alive; one that still drops a tensor while Python shuts down aborts the process
        # (torch 2.13). The checkpoint is written, so leave without the shutdown
        sys.stdout.flush()
        os._exit(0)
