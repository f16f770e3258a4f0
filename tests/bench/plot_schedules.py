"""
The report's schedules (§4.2) as train.py --batch_ramp follows them: learning rate, batch size, gamma, lambda.

    python tests/bench/plot_schedules.py --plot schedules.png        # needs: pip install matplotlib
"""

import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[2]))

from optim import batch_sizes, schedule  # noqa: E402
from runs import command_line, pyplot  # noqa: E402


def plot(path):
    sizes = batch_sizes(15360, 10_000, ramp=True)
    progress = sizes.cumsum() / sizes.sum()
    lr, gamma, lam = np.array([schedule(p) for p in progress]).T
    panels = [(2.2e-4 * lr, "learning rate (peak 2.2e-4)"), (sizes, "batch size, sequences"),
              (0.001 * gamma, "γ, speed of the router's bias"), (0.3 * lam, "λ, weight of MTP's loss")]
    fig, axes = pyplot().subplots(2, 2, figsize=(8, 4.4), layout="constrained", sharex=True)
    for axis, (y, title) in zip(axes.flat, panels):
        axis.plot(progress * 14.8, y)
        axis.set(title=title, ylim=(0, None))
        axis.grid(alpha=0.3)
    for axis in axes[1]:
        axis.set_xlabel("trillion tokens of the report's 14.8")
    fig.savefig(path, dpi=80)


if __name__ == "__main__":
    parser = command_line(__doc__)
    parser.add_argument("--plot", type=Path, default=Path("schedules.png"), help="the picture to write")
    plot(parser.parse_args().plot)
