"""
Draw runs of train.py from their log.jsonl: loss and validation, gradient norm, balance of the experts, speed.

    python tests/bench/plot_log.py out                              # writes log.png; needs matplotlib
    python tests/bench/plot_log.py out-a out-b --plot both.png      # several runs in one picture
"""

from pathlib import Path

import numpy as np

from runs import command_line, pyplot, read_log

PANELS = (("loss of the main model, nats per token", "main_loss"), ("gradient norm", "grad_norm"),
          ("MaxVio, mean of the layers", "max_vio"), ("tokens per second", "tokens_per_s"))


def plot(runs, path):
    """runs: folders of train.py. One panel per quantity over the steps; dots are evaluations."""
    fig, axes = pyplot().subplots(1, len(PANELS), figsize=(14, 3.2), layout="constrained",
                                  width_ratios=[1.6, 1, 1, 1])
    for i, run in enumerate(runs):
        log = read_log(run)
        if not log:
            raise SystemExit(f"{run} has no log.jsonl with an entry; name the --out_dir of a run of train.py")
        for axis, (title, key) in zip(axes, PANELS):
            # a value that was not finite is logged as null: it becomes NaN here, a gap in the line
            values = np.array([entry[key] for entry in log], float)
            axis.plot([entry["iter"] for entry in log], values, color=f"C{i}", linewidth=1,
                      label=f"{run.name}, training")
            axis.set(title=title, xlabel="step")
            axis.grid(alpha=0.3)
        evals = [entry for entry in log if entry.get("val_loss") is not None]
        if evals:
            label = f"{run.name}, validation ({evals[-1]['val_bpb']:.3f} bits per byte)"
            axes[0].plot([entry["iter"] for entry in evals], [entry["val_loss"] for entry in evals], "o--",
                         color=f"C{i}", label=label)
    axes[0].legend()
    fig.savefig(path, dpi=80)


if __name__ == "__main__":
    parser = command_line(__doc__)
    parser.add_argument("runs", nargs="+", type=Path, help="folders of train.py")
    parser.add_argument("--plot", type=Path, default=Path("log.png"), help="the picture to write")
    args = parser.parse_args()
    plot(args.runs, args.plot)
    print(f"wrote {args.plot}")
