"""
What fits where, and what a training step asks of a GPU. Needs none.

    python tests/bench/bench_memory.py              # all of the below
    python tests/bench/bench_memory.py weights      # only this part

    weights     bytes of weights and of cache, computed from the presets' shapes
    loss        the peak of a loss over a vocabulary of 65,536, measured in processes of their own: ours, in
                chunks, and the plain one, with all logits at once
    step        the peak of a training step under bf16 autocast with AdamW, computed by running the step on
                fake tensors and adding up what is alive; and the largest batches that fit a card.
                Four layers of 16b, 2 x 4096 tokens: 36.5 GiB computed, 35.9 on an H200 (commit 8a8adbf).
    work        the time that an H100 would need for a step, estimated: a roofline over the ops of the step on
                fake tensors. The products alone, as if all else were free, and all ops of an eager step
    products    the experts' matrix products in a step of `small`, and how often they wait for the GPU, by
                what grouped_mm is there: one kernel, a loop over the experts, or our batched products
"""

import contextlib
import dataclasses
import math
import resource
import subprocess
import sys
import weakref
from pathlib import Path
from unittest import mock

import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

sys.path.insert(0, str(Path(__file__).parents[2]))

import train  # noqa: E402
from bench_train import PRESETS  # noqa: E402
from checkpoint import is_quantized  # noqa: E402
from model import MLA, DeepSeekV3, DeepSeekV3Config, Experts, RMSNorm  # noqa: E402
from runs import command_line  # noqa: E402

GiB = 2**30
RESERVE = 2 * GiB       # of a card, for CUDA itself and for gaps between tensors; a guess


# ------------------------------------------------------------------------------------------------------------
# Weights and cache

def stored_bytes(name, tensor, fp8):
    """Bytes of a tensor in a released file; FP8 has an fp32 scale per block of 128x128."""
    if not (fp8 and is_quantized(name)):
        return tensor.numel() * tensor.element_size()
    *stack, rows, columns = tensor.shape
    return tensor.numel() + 4 * math.prod(stack) * -(-rows // 128) * -(-columns // 128)


def weights():
    print("| preset | MTP modules | weights in bf16 | stored in FP8 | cache per token, bf16 | cache of 32K "
          "tokens |\n|---|---|---|---|---|---|")
    for name in ("16b", "671b"):
        for depth in (0, 1):
            config = dataclasses.replace(DeepSeekV3Config.preset(name), num_nextn_predict_layers=depth)
            with torch.device("meta"):
                model = DeepSeekV3(config).to(torch.bfloat16)
                cache = sum(c.numel() * c.element_size() for c in model.new_cache(1, 1, mtp=True))
            tensors = model.state_dict().items()
            bf16, fp8 = (sum(stored_bytes(n, t, fp8) for n, t in tensors) / 1e9 for fp8 in (False, True))
            print(f"| `{name}` | {depth} | {bf16:,.2f} GB | {fp8:,.2f} GB | {cache:,} bytes | "
                  f"{cache * 32768 / 1e9:.2f} GB |")


# ------------------------------------------------------------------------------------------------------------
# The loss over a real vocabulary

def peak_of_a_step(chunked, vocab_size=65536, batch=4, length=1024):
    """MiB that forward and backward add to this process's peak. The model is one small dense layer, so logits
    outweigh the rest. Eval mode computes all logits at once and returns them, train mode goes by chunks."""
    config = dataclasses.replace(DeepSeekV3Config.preset("tiny"), vocab_size=vocab_size, num_hidden_layers=1,
                                 num_nextn_predict_layers=0)
    model = DeepSeekV3(config).train(chunked)
    tokens = torch.randint(vocab_size, (batch, length + 1))
    model(tokens[:1, :16], tokens[:1, 1:17])[1].backward()              # load what any step needs
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    _, loss, _ = model(tokens[:, :-1], tokens[:, 1:])
    loss.backward()
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024


def loss():
    print("| loss over 4 x 1024 tokens, 65,536 ids | peak over the base |\n|---|---|")
    for name in ("plain", "chunked"):
        command = [sys.executable, __file__, "--one", name]
        peak = float(subprocess.run(command, check=True, text=True, stdout=subprocess.PIPE).stdout)
        print(f"| {name} | {peak:,.0f} MiB |", flush=True)


# ------------------------------------------------------------------------------------------------------------
# A training step

class LiveBytes(TorchDispatchMode):
    """Adds up the storages that exist, and remembers the peak."""

    def __init__(self):
        super().__init__()
        self.sizes, self.now, self.peak = {}, 0, 0

    def forget(self, key):
        self.now -= self.sizes.pop(key)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                if storage._cdata not in self.sizes:
                    self.sizes[storage._cdata] = storage.nbytes()
                    self.now += storage.nbytes()
                    weakref.finalize(storage, self.forget, storage._cdata)
        self.peak = max(self.peak, self.now)
        return out


def gpu_attention(self, q, k, v, mask):
    """MLA.attention as on a GPU: in bf16, where a CPU computes in fp32."""
    v = F.pad(v, (0, self.d_qk - self.d_v))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=self.softmax_scale)[..., :self.d_v]


def gpu_padding(self, x, load):
    """Experts.padding as on an H100: every expert has a row, and no more than its tokens need."""
    return 1, 1, False


def gpu_norm(self, x):
    """RMSNorm.forward as on a GPU: one kernel."""
    weight = self.weight.float()
    return torch.ops.aten._fused_rms_norm(x.float(), [len(weight)], weight, self.eps)[0].type_as(x)


@contextlib.contextmanager
def fake_gpu(padding=gpu_padding):
    """A model that is built in here computes on fake tensors, with the operations of a GPU."""
    with (mock.patch.object(DeepSeekV3, "check_tokens"),        # reads values, which fake tensors lack
          mock.patch.object(MLA, "attention", gpu_attention), mock.patch.object(RMSNorm, "forward", gpu_norm),
          mock.patch.object(Experts, "padding", padding), FakeTensorMode()):
        yield


def step_memory(config, batch, length, recompute=False):
    """-> peak bytes of a training step, with the optimizer's state; bytes that forward keeps for backward."""
    live = LiveBytes()
    with fake_gpu(), live:
        model = DeepSeekV3(config)
        if recompute:
            train.recompute(model)
        optimizer = torch.optim.AdamW(model.parameters(), foreach=False)
        idx = torch.zeros(batch, length, dtype=torch.int64)
        for _ in range(2):              # the first step makes the optimizer's state
            before = live.peak = live.now
            with torch.autocast("cpu", torch.bfloat16):
                total = model(idx, idx)[1]
            kept = live.now - before
            total.backward()
            del total
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
    return live.peak, kept


def largest_batches(config, length, cards, recompute, batch=16):
    """The largest batch whose step fits each card. From `batch` on, memory is linear in it."""
    some, more = (step_memory(config, size, length, recompute)[0] for size in (batch, 2 * batch))
    return [batch + int((card * GiB - RESERVE - some) // ((more - some) / batch)) for card in cards]


def step():
    print("| training step, bf16 autocast, AdamW | peak | kept for backward | with --recompute: peak | kept "
          "|\n|---|---|---|---|---|")
    sizes = [*PRESETS.items(), ("16b, 1 x 4096 tokens, unsharded", (DeepSeekV3Config.preset("16b"), 1, 4096))]
    for name, size in sizes:
        found = [f"{n / GiB:.1f} GiB" for flag in (False, True) for n in step_memory(*size, recompute=flag)]
        print(f"| {name} | {' | '.join(found)} |", flush=True)
    print("\n| largest --batch_size | card | as it is | with --recompute |\n|---|---|---|---|")
    for name, length, batch, cards in ("mini", 512, 32, (12, 24)), ("small", 1024, 16, (24, 40, 80)), (
            "large", 2048, 4, (80,)):
        config = DeepSeekV3Config.preset(name)
        plain, recompute = (largest_batches(config, length, cards, flag, batch) for flag in (False, True))
        for row in zip(cards, plain, recompute):
            print("| `{}`, blocks of {} | {} GB | {} | {} |".format(name, length, *row), flush=True)


# ------------------------------------------------------------------------------------------------------------
# What a step asks of a GPU

PEAK, BANDWIDTH = 989e12, 0.85 * 3.35e12        # an H100 by its data sheet; a share of it is reached
LAUNCH = 2e-6           # seconds between two kernels, at best
NO_KERNEL = {"_unsafe_view", "detach", "alias", "empty", "empty_like", "new_empty", "empty_strided",
             "new_empty_strided", "lift_fresh", "_reshape_alias"}


class Operations(TorchDispatchMode):
    """Lists the operations that a GPU would launch, each with the seconds that it takes there at least."""

    def __init__(self):
        super().__init__()
        self.rows = []          # name, seconds, FLOPs (0: no product)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out, name = func(*args, **(kwargs or {})), func._schema.name.removeprefix("aten::")
        if not func.is_view and name not in NO_KERNEL and not name.startswith("prim::"):
            ins, outs = ([t for t in tree_leaves(tree) if isinstance(t, torch.Tensor)]
                         for tree in ((args, kwargs), out))
            flops, share = product(name, ins)
            moved = sum(map(stored, ins + outs))
            self.rows.append((name, LAUNCH + max(moved / BANDWIDTH, flops / (share * PEAK)), flops))
        return out


def stored(tensor):
    """Bytes of a tensor; an expanded dimension costs nothing."""
    return tensor.element_size() * math.prod(n for n, step in zip(tensor.shape, tensor.stride()) if step)


def product(name, ins):
    """-> FLOPs of an operation, and the share of the peak at which such a product runs on an H100: guesses,
    after what an H200 showed."""
    if "attention" in name:
        backward = "backward" in name
        B, H, T, d = ins[1 if backward else 0].shape
        return (5 if backward else 2) * B * H * T * T * d, 0.33 if backward else 0.38       # causal: half
    if name not in ("mm", "bmm", "_grouped_mm"):
        return 0, 1
    narrowest = min(ins[0].shape[-2], ins[0].shape[-1], ins[1].shape[-1])
    flops = 2 * ins[0].numel() * ins[1].shape[-1]
    if name == "_grouped_mm":
        return flops, 0.45 if narrowest >= 1024 else 0.30
    return flops, 0.65 if narrowest >= 1024 else 0.5 if narrowest >= 512 else 0.35


def operations(config, batch, length, padding=gpu_padding):
    """The Operations.rows of forward and backward, and the number of parameters."""
    with fake_gpu(padding):
        model = DeepSeekV3(config)
        idx, done = torch.zeros(batch, length, dtype=torch.int64), Operations()
        with done, torch.autocast("cpu", torch.bfloat16):
            loss = model(idx, idx)[1]
        with done:
            loss.backward()
    return done.rows, sum(p.numel() for p in model.parameters()), model.flops_per_token(length)


def work():
    print("| training step on an H100, estimated | operations | products alone | MFU | all, eager | MFU |\n"
          "|---|---|---|---|---|---|")
    for name, (config, batch, length) in PRESETS.items():
        rows, params, per_token = operations(config, batch, length)
        ideal = per_token * batch * length / PEAK
        products = sum(seconds for _, seconds, flops in rows if flops)
        # AdamW reads and writes weights, gradients and moments; clipping reads the gradients
        total = sum(seconds for _, seconds, _ in rows) + (28 + 4) * params / BANDWIDTH
        print(f"| {name} | {len(rows):,} | {1e3 * products:.0f} ms | {ideal / products:.1%} | "
              f"{1e3 * total:.0f} ms | {ideal / total:.1%} |", flush=True)


def products():
    config, batch, length = PRESETS["small, 16 x 1024 tokens"]
    layers = config.num_hidden_layers - config.first_k_dense_replace + config.num_nextn_predict_layers
    equal = batch * length * config.num_experts_per_tok // config.n_routed_experts
    grouped, batched = ([name for name, *_ in operations(config, batch, length, padding)[0]]
                        for padding in (gpu_padding, lambda *_: (equal, 1, True)))
    calls, ours = grouped.count("_grouped_mm"), batched.count("bmm") - grouped.count("bmm")
    print("| a step of small | products of experts | waits for the GPU |\n|---|---|---|\n"
          f"| grouped_mm, one kernel | {calls} | 0 |\n"
          f"| grouped_mm, a loop | {calls * config.n_routed_experts:,} | {calls} |\n"
          f"| batched | {ours} | {layers} |")


def main():
    if sys.argv[1:2] == ["--one"]:      # one of our own processes
        return print(peak_of_a_step(chunked=sys.argv[2] == "chunked"))
    parts = {"weights": weights, "loss": loss, "step": step, "work": work, "products": products}
    parser = command_line(__doc__)
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"{', '.join(parts)}; default: all")
    args = parser.parse_args()
    if unknown := set(args.parts) - set(parts):
        parser.error(f"unknown part {', '.join(unknown)}; choose from {', '.join(parts)}")
    for i, name in enumerate(args.parts or parts):
        if i:
            print()
        parts[name]()


if __name__ == "__main__":
    main()
