"""
Training speed: a step (forward, backward, AdamW) beside transformers' DeepseekV3ForCausalLM from the same
weights, and how its time grows with the work.

    python tests/bench/bench_train.py             # beside transformers, if installed; losses compared
    python tests/bench/bench_train.py --table     # step time against experts, sequence, depth and batch
    python tests/bench/bench_train.py --presets   # on a GPU: mini, small, large, four layers of 16b,
                                                  # in bf16 and fp8, compiled and not; without one:
                                                  # FLOPs, bytes and the roofline of an H100
    python tests/bench/bench_train.py --compile_time    # torch.compile of the model and of its blocks

Medians of repeated steps. The contestants take turns, so that a noisy machine disturbs all of them alike.
"""

import copy
import dataclasses
import gc
import statistics
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[2]))

from bench_decode import BENCH, transformers_model  # noqa: E402
from model import DeepSeekV3, DeepSeekV3Config  # noqa: E402
from runs import command_line  # noqa: E402
from train import peak_flops  # noqa: E402

BATCH, T, REPEATS = 8, 256, 5
FOUR_LAYERS = dataclasses.replace(DeepSeekV3Config.preset("16b"), num_hidden_layers=4,
                                  num_nextn_predict_layers=0, vocab_size=32768)
PRESETS = {"mini, 64 x 512 tokens": (DeepSeekV3Config.preset("mini"), 64, 512),
           "small, 16 x 1024 tokens": (DeepSeekV3Config.preset("small"), 16, 1024),
           "large, 4 x 2048 tokens": (DeepSeekV3Config.preset("large"), 4, 2048),
           "four layers of 16b, 2 x 4096 tokens": (FOUR_LAYERS, 2, 4096)}       # config, batch, length


class Trainer:
    """One contestant: a model, its optimizer, and its loss on (idx, targets)."""

    def __init__(self, model, loss, autocast=None):
        self.model, self.loss, self.autocast = model.train(), loss, autocast
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)

    def step(self, idx, targets):
        with torch.autocast(idx.device.type, self.autocast, enabled=self.autocast is not None):
            loss = self.loss(self.model, idx, targets)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss.detach()


def our_loss(model, idx, targets):
    return model(idx, targets)[1]


def their_loss(model, idx, targets):
    return torch.nn.functional.cross_entropy(model(idx).logits.flatten(0, 1).float(), targets.flatten())


def synchronize():
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def interleaved(trainers, batch, repeats=REPEATS):
    """-> {name: median seconds of a step}, {name: losses}. A turn is four steps, of which the last two count:
    the first after another contestant find oneDNN's cache full of kernels for the other's shapes, as no run
    does. The first turn warms up."""
    seconds, losses = ({name: [] for name in trainers} for _ in range(2))
    for turn in range(repeats + 1):
        for name, trainer in trainers.items():
            for k in range(4):
                idx, targets = batch(4 * turn + k)
                synchronize()
                start = time.perf_counter()
                losses[name].append(trainer.step(idx, targets).item())
                if turn > 0 and k > 1:
                    seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(s) for name, s in seconds.items()}, losses


def random_batch(vocab_size, batch, length, device="cpu"):
    def make(i):
        generator = torch.Generator().manual_seed(i)
        tokens = torch.randint(vocab_size, (batch, length + 1), generator=generator).to(device)
        return tokens[:, :-1], tokens[:, 1:]
    return make


def beside_transformers():
    """fp32 and bf16 autocast of everyone in one run, and the ratio of the fastest."""
    config = DeepSeekV3Config(**BENCH, balance_loss_alpha=0.0, bias_update_speed=0.0)
    model = DeepSeekV3(config)
    trainers = {}
    for dtype, autocast in ("fp32", None), ("bf16", torch.bfloat16):
        trainers[f"ours, {dtype}"] = Trainer(copy.deepcopy(model), our_loss, autocast)
        for implementation in "grouped_mm", "eager":
            if (theirs := transformers_model(model, implementation)) is not None:
                trainers[f"transformers {implementation}, {dtype}"] = Trainer(theirs, their_loss, autocast)
    seconds, losses = interleaved(trainers, random_batch(config.vocab_size, BATCH, T))
    print(f"{model.num_params() / 1e6:.1f}M parameters, {BATCH} x {T} tokens, {torch.get_num_threads()} "
          "threads; bf16: autocast\n")
    print("| | ms per step | tokens/s | loss against ours in fp32, largest gap of "
          f"{4 * REPEATS + 4} steps |\n|---|---|---|---|")
    for name, s in seconds.items():
        apart = max(abs(a - b) for a, b in zip(losses[name], losses["ours, fp32"]))
        print(f"| {name} | {1e3 * s:.0f} | {BATCH * T / s:,.0f} | {apart:.1e} |")
    theirs = {name: s for name, s in seconds.items() if name.startswith("transformers")}
    if not theirs:
        print("\ntransformers is not installed: only our own times (pip install transformers)")
        return
    ours = {name: s for name, s in seconds.items() if name.startswith("ours")}
    best, rival = min(ours, key=ours.get), min(theirs, key=theirs.get)
    print(f"\nfastest of ours ({best}) against the fastest of transformers ({rival}): "
          f"{seconds[rival] / seconds[best]:.2f}x")
    fp32 = seconds["transformers grouped_mm, fp32"] / seconds["ours, fp32"]
    print(f"fp32 alone, against grouped_mm: {fp32:.2f}x")


def table():
    """One size of the bench config at a time, the others fixed."""
    axes = {"experts (4 active)": ("n_routed_experts", (8, 16, 32, 64, 128, 256)),
            "sequence (4096 tokens)": ("length", (256, 512, 1024, 2048, 4096)),
            "layers": ("num_hidden_layers", (3, 6, 12, 24)), "batch": ("batch", (2, 4, 8, 16, 32))}
    print("| axis | value | ms per step | GFLOP per step | GFLOP/s |\n|---|---|---|---|---|")
    for name, (axis, values) in axes.items():
        for value in values:
            changes = {axis: value} | ({"batch": 4096 // value} if axis == "length" else {})
            s, gflop = measure(**changes)
            print(f"| {name} | {value} | {1e3 * s:.0f} | {gflop:.0f} | {gflop / s:.0f} |", flush=True)


def measure(batch=BATCH, length=T, **changes):
    """-> seconds of a step and its GFLOP, of the bench config with these changes."""
    model = DeepSeekV3(DeepSeekV3Config(**{**BENCH, **changes}))
    gflop = model.flops_per_token(length) * batch * length / 1e9
    trainers = {"": Trainer(model, our_loss)}
    seconds, _ = interleaved(trainers, random_batch(model.config.vocab_size, batch, length), 5)
    del model, trainers
    gc.collect()
    return seconds[""], gflop


def presets():
    if not torch.cuda.is_available():
        return roofline()
    print(f"{torch.cuda.get_device_name()}, PyTorch {torch.__version__}\n")
    print("| model | arithmetic | compiled | tokens/s | MFU, of bf16's peak | peak memory | last loss |\n"
          "|---|---|---|---|---|---|---|")
    peak = peak_flops(torch.device("cuda"))
    for name, (config, batch, length) in PRESETS.items():
        for arithmetic in "bf16", "fp8":
            for compiled in False, True:
                torch.cuda.reset_peak_memory_stats()
                with torch.device("cuda"):
                    model = DeepSeekV3(config)
                flops = model.flops_per_token(length)
                if arithmetic == "fp8":
                    from fp8 import convert_to_fp8
                    convert_to_fp8(model)
                for block in model.model.layers if compiled else ():
                    block.compile()
                trainer = Trainer(model, our_loss, torch.bfloat16)
                batches = random_batch(config.vocab_size, batch, length, "cuda")
                seconds, losses = interleaved({"": trainer}, batches, 20)
                speed = batch * length / seconds[""]
                mfu = f"{speed * flops / peak:.1%}" if peak else "n/a"
                memory = torch.cuda.max_memory_allocated() / 2**30
                print(f"| {name} | {arithmetic} | {'yes' if compiled else 'no'} | {speed:,.0f} | {mfu} | "
                      f"{memory:.1f} GiB | {losses[''][-1]:.3f} |", flush=True)
                del model, trainer
                gc.collect()
                torch.cuda.empty_cache()
                torch.compiler.reset()


def roofline():
    print("No GPU here: nothing was run. What a step amounts to, and the bound that an H100's data sheet\n"
          "sets (989 TFLOP/s in bf16, 3.35 TB/s). Optimizer traffic: weights, gradients and AdamW's moments\n"
          "are read and written once in fp32, 28 bytes per parameter.\n")
    print("| model | TFLOP per step | optimizer traffic | FLOP bound | memory bound | at 40% MFU |\n"
          "|---|---|---|---|---|---|")
    for name, (config, batch, length) in PRESETS.items():
        with torch.device("meta"):
            model = DeepSeekV3(config)
        flops = model.flops_per_token(length) * batch * length
        moved = 28 * sum(p.numel() for p in model.parameters())
        print(f"| {name} | {flops / 1e12:.1f} | {moved / 1e9:.1f} GB | {1e3 * flops / 989e12:.0f} ms | "
              f"{1e3 * moved / 3.35e12:.0f} ms | {batch * length / (flops / 989e12 / 0.4):,.0f} tokens/s |")


def compile_time():
    """Seconds of a first step with nothing in the compiler's cache: the whole model compiled, or block by
    block, as train.py does."""
    from torch._dynamo.utils import counters
    from torch._inductor.utils import fresh_inductor_cache
    print("| layers | compiled | graphs | seconds | loss |\n|---|---|---|---|---|")
    for layers in 3, 12:
        for blocks in False, True:
            torch.manual_seed(0)
            torch.compiler.reset()
            counters.clear()
            sizes = BENCH | dict(num_hidden_layers=layers, num_nextn_predict_layers=1)
            model = DeepSeekV3(DeepSeekV3Config(**sizes))
            for block in model.model.layers if blocks else ():
                block.compile()
            trainer = Trainer(model if blocks else torch.compile(model), our_loss, torch.bfloat16)
            with fresh_inductor_cache():
                start = time.perf_counter()
                loss = trainer.step(*random_batch(model.config.vocab_size, BATCH, T)(0)).item()
                seconds = time.perf_counter() - start
            how, graphs = "by block" if blocks else "whole", counters["stats"]["unique_graphs"]
            print(f"| {layers} | {how} | {graphs} | {seconds:.1f} | {loss:.4f} |", flush=True)


if __name__ == "__main__":
    parser = command_line(__doc__)
    parser.add_argument("--table", action="store_true")
    parser.add_argument("--presets", action="store_true")
    parser.add_argument("--compile_time", action="store_true")
    args = parser.parse_args()
    if args.compile_time:
        compile_time()
    else:
        table() if args.table else presets() if args.presets else beside_transformers()
