"""
How runs of train.py went, drawn from their log.jsonl: loss and validation, norm of the gradients, balance of the experts, speed.

    python tests/bench/plot_log.py out                                # writes log.png; needs: pip install matplotlib
    python tests/bench/plot_log.py out-a out-b --plot both.png        # runs beside each other
"""

import argparse
from pathlib import Path

import numpy as np

from runs import pyplot, read_log

PANELS = (("loss of the main model, nats per token", "main_loss", "val_loss"), ("norm of the gradients", "grad_norm", None),
          ("MaxVio, mean of the layers", "max_vio", None), ("tokens per second", "tokens_per_s", None))


def plot(runs, path):
    """runs: folders of train.py. One panel per quantity over the steps; dots are evaluations."""
    fig, axes = pyplot().subplots(1, len(PANELS), figsize=(14, 3.2), layout="constrained", width_ratios=[1.6, 1, 1, 1])
    for i, run in enumerate(runs):
        log = read_log(run)
        if not log:
            raise SystemExit(f"{run} has no log.jsonl with an entry in it; name the --out_dir of a run of train.py")
        for axis, (title, key, val_key) in zip(axes, PANELS):
            values = np.array([entry[key] for entry in log], float)        # None, which was not finite, becomes NaN: a gap
            axis.plot([entry["iter"] for entry in log], values, color=f"C{i}", linewidth=1, label=f"{run.name}, training")
            val = [entry for entry in log if val_key and entry.get(val_key) is not None]
            if val:
                axis.plot([entry["iter"] for entry in val], [entry[val_key] for entry in val], "o--", color=f"C{i}",
                          label=f"{run.name}, validation ({val[-1]['val_bpb']:.3f} bits per byte)")
            axis.set(title=title, xlabel="step")
            axis.grid(alpha=0.3)
    axes[0].legend()
    fig.savefig(path, dpi=80)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, help="folders of train.py")
    parser.add_argument("--plot", type=Path, default=Path("log.png"), help="the picture to write")
    args = parser.parse_args()
    plot(args.runs, args.plot)
    print(f"wrote {args.plot}")
