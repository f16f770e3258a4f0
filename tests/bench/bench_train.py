"""
Training speed: a step (forward, backward, AdamW) beside transformers' DeepseekV3ForCausalLM from the same weights, and
how its time grows with the work.

    python tests/bench/bench_train.py                 # beside transformers (where it is installed), losses compared
    python tests/bench/bench_train.py --table         # step time against experts, sequence, depth and batch
    python tests/bench/bench_train.py --presets       # on a GPU: small and layers of 16b, bf16 and fp8, compiled or not;
                                                # without one: their FLOPs, bytes and the roofline on a data sheet's H100

Medians of repeated steps, the contestants taking turns, so that a noisy machine disturbs all of them alike.
"""

import argparse
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
from train import keep_freed_memory, peak_flops  # noqa: E402

BATCH, T, REPEATS = 8, 256, 9


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
    """-> {name: median seconds of a step}, {name: losses}."""
    seconds, losses = ({name: [] for name in trainers} for _ in range(2))
    for i in range(repeats + 2):
        idx, targets = batch(i)
        for name, trainer in trainers.items():
            synchronize()
            start = time.perf_counter()
            losses[name].append(trainer.step(idx, targets).item())
            if i >= 2:
                seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(s) for name, s in seconds.items()}, losses


def random_batch(vocab_size, batch, length, device="cpu"):
    def make(i):
        tokens = torch.randint(vocab_size, (batch, length + 1), generator=torch.Generator().manual_seed(i)).to(device)
        return tokens[:, :-1], tokens[:, 1:]
    return make


def beside_transformers():
    config = DeepSeekV3Config(**BENCH, balance_loss_alpha=0.0, bias_update_speed=0.0)
    model = DeepSeekV3(config)
    trainers = {}
    for implementation in "eager", "grouped_mm":
        if (theirs := transformers_model(model, implementation)) is not None:
            trainers[f"transformers {implementation}"] = Trainer(theirs, their_loss)
    trainers["ours"] = Trainer(copy.deepcopy(model), our_loss)
    trainers["ours, autocast to bf16"] = Trainer(copy.deepcopy(model), our_loss, torch.bfloat16)
    seconds, losses = interleaved(trainers, random_batch(config.vocab_size, BATCH, T))
    base = seconds.get("transformers grouped_mm")
    print(f"{model.num_params() / 1e6:.1f}M parameters, {BATCH} x {T} tokens, {torch.get_num_threads()} threads\n")
    print("| | ms per step | tokens/s | against transformers grouped_mm | largest difference of loss in "
          f"{REPEATS + 2} steps |\n|---|---|---|---|---|")
    for name, s in seconds.items():
        ratio = f"{base / s:.2f}x" if base else "not installed"
        apart = max(abs(a - b) for a, b in zip(losses[name], losses["ours"]))
        print(f"| {name} | {1e3 * s:.0f} | {BATCH * T / s:,.0f} | {ratio} | {apart:.1e} |")


def table():
    """One axis at a time around the bench config, its other sizes fixed."""
    def measure(batch=BATCH, length=T, **changes):
        config = DeepSeekV3Config(**{**BENCH, **changes})
        model = DeepSeekV3(config)
        seconds, _ = interleaved({"": Trainer(model, our_loss)}, random_batch(config.vocab_size, batch, length), 5)
        gflop = model.flops_per_token(length) * batch * length / 1e9
        del model
        gc.collect()
        return seconds[""], gflop

    axes = {"experts (4 active)": ("n_routed_experts", (8, 16, 32, 64, 128, 256)),
            "sequence (4096 tokens)": ("length", (256, 512, 1024, 2048, 4096)),
            "layers": ("num_hidden_layers", (3, 6, 12, 24)), "batch": ("batch", (2, 4, 8, 16, 32))}
    print("| axis | value | ms per step | GFLOP per step | GFLOP/s |\n|---|---|---|---|---|")
    for name, (axis, values) in axes.items():
        for value in values:
            changes = {axis: value} | ({"batch": 4096 // value} if axis == "length" else {})
            s, gflop = measure(**changes)
            print(f"| {name} | {value} | {1e3 * s:.0f} | {gflop:.0f} | {gflop / s:.0f} |", flush=True)


PRESETS = {"small, 16 x 1024 tokens": (DeepSeekV3Config.preset("small"), 16, 1024),
           "four layers of 16b, 2 x 4096 tokens": (dataclasses.replace(
               DeepSeekV3Config.preset("16b"), num_hidden_layers=4, num_nextn_predict_layers=0, vocab_size=32768), 2, 4096)}


def presets():
    if not torch.cuda.is_available():
        return roofline()
    print(f"{torch.cuda.get_device_name()}, PyTorch {torch.__version__}\n")
    print("| model | arithmetic | compiled | tokens/s | MFU, of bf16's peak | peak memory | loss of the last step |\n"
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
                trainer = Trainer(torch.compile(model) if compiled else model, our_loss, torch.bfloat16)
                seconds, losses = interleaved({"": trainer}, random_batch(config.vocab_size, batch, length, "cuda"), 20)
                speed = batch * length / seconds[""]
                print(f"| {name} | {arithmetic} | {'yes' if compiled else 'no'} | {speed:,.0f} | "
                      f"{f'{speed * flops / peak:.1%}' if peak else 'n/a'} | "
                      f"{torch.cuda.max_memory_allocated() / 2**30:.1f} GiB | {losses[''][-1]:.3f} |", flush=True)
                del model, trainer
                gc.collect()
                torch.cuda.empty_cache()
                torch.compiler.reset()


def roofline():
    print("No GPU here: nothing was run. What a step amounts to, and the bound that an H100's data sheet (989 TFLOP/s in "
          "bf16,\n3.35 TB/s) sets to it: weights, gradients and AdamW's moments are read and written once in fp32 (28 bytes"
          " a parameter)\n")
    print("| model | TFLOP per step | GB of optimizer traffic | FLOP bound | memory bound | at 40% MFU |\n"
          "|---|---|---|---|---|---|")
    for name, (config, batch, length) in PRESETS.items():
        with torch.device("meta"):
            model = DeepSeekV3(config)
        flops = model.flops_per_token(length) * batch * length
        moved = 28 * sum(p.numel() for p in model.parameters())
        print(f"| {name} | {flops / 1e12:.1f} | {moved / 1e9:.1f} | {1e3 * flops / 989e12:.0f} ms | "
              f"{1e3 * moved / 3.35e12:.0f} ms | {batch * length / (flops / 989e12 / 0.4):,.0f} tokens/s |")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table", action="store_true")
    parser.add_argument("--presets", action="store_true")
    args = parser.parse_args()
    keep_freed_memory()
    table() if args.table else presets() if args.presets else beside_transformers()
