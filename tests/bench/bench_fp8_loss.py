"""
What FP8 does to the loss: training runs in BF16 and FP8 from the same seed over the same data, on a CPU by
emulation.

    python tests/bench/bench_fp8_loss.py --out_dir out-fp8      # about two hours on two cores; resumes
    python tests/bench/bench_fp8_loss.py --log tests/results/fp8_loss.jsonl --plot fp8_loss.png     # as kept

Six arithmetics, three seeds each, 1000 steps of a model of 0.9M active parameters (the tiny preset with one
more layer and eight more experts) with the report's optimizer, AdamW:
    bf16            autocast to bfloat16, the report's baseline
    fp8             its recipe: scales per 1x128 and 128x128, fp32 accumulation
    fp8_pow2        the same with scales that are powers of two
    fp32            next to no rounding: how far two runs drift apart when neither is better
    per_tensor      one scale per matrix
    no_promotion    the recipe's scales, but sums kept to 14 bits all along K, as Hopper's tensor cores do by
                    themselves (emulated: the accumulator is truncated after every 32 products)
Prints, and plots, the relative error of the training loss against the bf16 run of the same seed, smoothed.
"""

import argparse
import json
import os
import sys
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[2]))

import fp8  # noqa: E402
from runs import finished, pyplot, read_log, train_all  # noqa: E402

SHAPE = dict(num_hidden_layers=4, moe_intermediate_size=64, n_routed_experts=16, num_experts_per_tok=4,
             n_group=4, topk_group=2)
# flags of train.py
EMULATED = dict(dtype="bfloat16", fp8=True)
VARIANTS = {"bf16": dict(dtype="bfloat16"), "fp8": EMULATED, "fp8_pow2": EMULATED | dict(fp8_pow2=True),
            "fp32": dict(dtype="float32"), "per_tensor": EMULATED, "no_promotion": EMULATED}
SMOOTHING = 0.95    # of the exponential moving average over steps


def quantize_per_tensor(x, rows=1, pow2=False):
    """fp8.quantize_reference with one scale for the whole of each (M, K)."""
    M, K = x.shape[-2:]
    scale = fp8.tile_scale(x.float().abs().amax((-2, -1), keepdim=True))
    s = scale.expand(*x.shape[:-2], -(-M // rows), -(-K // 128))
    return fp8.Quantized((x.float() / scale).to(fp8.E4M3), s.contiguous())


def matmul_14_bits(a, b):
    """a (M, K) · b (N, K)^T, the running sum cut to 14 significant bits after every 32 of K."""
    spare = -a.size(1) % 32
    a, b = (torch.nn.functional.pad(t, (0, spare)).unflatten(1, (-1, 32)).transpose(0, 1) for t in (a, b))
    acc = a.new_zeros(a.size(1), b.size(1))
    for product in torch.bmm(a, b.mT):          # (K/32, M, N)
        acc = ((acc + product).view(torch.int32) & ~0x3FF).view(torch.float32)
    return acc


def gemm_14_bits(a, b, dtype, ends=None):
    a, b = fp8.dequantize(*a), fp8.dequantize(*b)
    c = a.new_zeros(b.size(0), a.size(0), b.size(2), dtype=dtype)
    for c_j, b_j in zip(c, b):
        for rows, b_e in zip(fp8.expert_rows(ends, len(a)), b_j):
            c_j[rows] = matmul_14_bits(a[rows], b_e)
    return c


def wgrad_14_bits(dy_t, x_t, ends=None):
    dy_t, x_t = fp8.dequantize(*dy_t), fp8.dequantize(*x_t)
    return torch.stack([matmul_14_bits(dy_t[:, rows], x_t[:, rows])
                        for rows in fp8.expert_rows(ends, dy_t.size(1))])


def train_one(variant, flags):
    """In a process of its own: one run of train.py."""
    if variant == "per_tensor":
        fp8.quantize_reference = quantize_per_tensor
    elif variant == "no_promotion":
        fp8.gemm_reference, fp8.wgrad_reference = gemm_14_bits, wgrad_14_bits
    import train
    train.main(flags)


def collect(out_dir, runs, max_iters):
    """OUT_DIR/fp8_loss.jsonl: a line per finished run, small enough to keep."""
    path = out_dir / "fp8_loss.jsonl"
    with open(path, "w") as f:
        for name in runs:
            if finished(out_dir / name, max_iters):
                log = read_log(out_dir / name)
                f.write(json.dumps({"run": name, "val_loss": log[-1]["val_loss"],
                                    "main_loss": [round(entry["main_loss"], 3) for entry in log]}) + "\n")
    return path


def smooth(x):
    out, average = [], x[0]
    for value in x:
        average = SMOOTHING * average + (1 - SMOOTHING) * value
        out.append(average)
    return np.array(out)


def report(path):
    """The table, and {variant: relative errors (seeds, steps)}."""
    kept = [json.loads(line) for line in path.read_text().splitlines()]
    logs = {variant: {} for variant in VARIANTS}    # {variant: {seed: (training losses, validation loss)}}
    for run in kept:
        variant, seed = run["run"].rsplit("-", 1)
        logs[variant][seed] = np.array(run["main_loss"]), run["val_loss"]
    errors = {}
    print("| arithmetic | mean relative loss error | largest, after step 100 | validation loss | "
          "against bf16 |")
    print("|---|---|---|---|---|")
    for variant in VARIANTS:
        pairs = [(log, logs["bf16"][seed]) for seed, log in logs[variant].items() if seed in logs["bf16"]]
        if not pairs:
            continue
        errors[variant] = np.array([smooth(log[0]) / smooth(base[0]) - 1 for log, base in pairs])
        val = np.array([log[1] for log, _ in pairs])
        gap = np.array([log[1] / base[1] - 1 for log, base in pairs])
        late = np.abs(errors[variant][:, 100:])
        print(f"| {variant} ({len(pairs)} seeds) | {late.mean():.3%} | {late.max():.3%} | {val.mean():.4f} | "
              + ", ".join(f"{g:+.2%}" for g in gap) + " |")
    if len(base := list(logs["bf16"].values())) > 1:
        a, b = smooth(base[0][0])[100:], smooth(base[1][0])[100:]
        print(f"For scale: the bf16 runs of two seeds differ by {np.abs(a / b - 1).mean():.3%} on average")
    return errors


def plot(errors, path):
    plt = pyplot()
    fig, axes = plt.subplots(1, len(errors) - 1, figsize=(12, 3.2), sharey=True)
    for ax, variant in zip(np.atleast_1d(axes), [v for v in errors if v != "bf16"]):
        ax.axhspan(-0.25, 0.25, color="0.9")
        ax.plot(100 * errors[variant].T, linewidth=0.8)
        ax.set_title(variant)
        ax.set_xlabel("step")
    np.atleast_1d(axes)[0].set_ylabel("loss against bf16, %")
    fig.suptitle("training loss relative to the BF16 run of the same seed; grey: the report's 0.25%")
    fig.tight_layout()
    fig.savefig(path, dpi=110)


def main():
    if sys.argv[1:2] == ["--one"]:      # a process of ours
        return train_one(sys.argv[2], sys.argv[3:])
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out_dir", type=Path, default=Path("out-fp8"))
    parser.add_argument("--data_dir", default="data/stdlib")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--max_iters", type=int, default=1000)
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="runs at a time, one thread each")
    parser.add_argument("--log", type=Path, help="print and plot these results instead of training")
    parser.add_argument("--plot", type=Path, help="write the picture to this file")
    args = parser.parse_args()
    if not (path := args.log):
        shared = SHAPE | dict(data_dir=args.data_dir, device="cpu", optimizer="adamw", learning_rate=3e-3,
                              batch_size=8, max_iters=args.max_iters, eval_interval=250, log_interval=1)
        runs = {f"{variant}-{seed}": ([__file__, "--one", variant], shared | flags | dict(seed=seed))
                for seed in args.seeds for variant, flags in VARIANTS.items()}
        train_all(runs, args.out_dir, args.jobs)
        path = collect(args.out_dir, runs, args.max_iters)
    errors = report(path)
    if args.plot:
        plot(errors, args.plot)


if __name__ == "__main__":
    main()
