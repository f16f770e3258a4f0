"""
The schedules of a run by the report's recipe (§4.2), as train.py --batch_ramp follows them: learning rate, batch size, gamma,
lambda.

    python tests/plot_schedules.py schedules.png        # needs: pip install matplotlib
"""

import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parent.parent))

import train  # noqa: E402
from runs import pyplot  # noqa: E402

sizes = train.batch_sizes(train.TrainConfig(batch_ramp=True, max_iters=10_000, batch_size=15360))
progress = sizes.cumsum() / sizes.sum()
lr, gamma, lam = np.array([train.schedule(p) for p in progress]).T
fig, axes = pyplot().subplots(2, 2, figsize=(8, 4.4), layout="constrained", sharex=True)
for axis, y, title in zip(axes.flat, (2.2e-4 * lr, sizes, 0.001 * gamma, 0.3 * lam), (
        "learning rate (peak 2.2e-4)", "batch size, sequences", "γ, speed of the router's bias", "λ, weight of MTP's loss")):
    axis.plot(progress * 14.8, y)
    axis.set(title=title, ylim=(0, None))
    axis.grid(alpha=0.3)
for axis in axes[1]:
    axis.set_xlabel("trillion tokens of the report's 14.8")
fig.savefig(sys.argv[1] if len(sys.argv) > 1 else "schedules.png", dpi=80)
