"""
Several runs of train.py at a time, each a process with one thread, and what they logged; for the scripts beside this file.
"""

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor


def read_log(run):
    """The entries of run/log.jsonl, oldest first."""
    path = run / "log.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def finished(run, max_iters):
    return (log := read_log(run)) and log[-1]["iter"] == max_iters and "val_loss" in log[-1]


def train_all(runs, out_dir, jobs):
    """runs: {name: (command, flags of train.py)}. Each trains into out_dir/name; one that is over is not made again, one
    that was cut off goes on."""
    def train(name, command, flags):
        run = out_dir / name
        if finished(run, flags["max_iters"]):
            return
        words = ["--resume"] if (run / "ckpt.pt").exists() else [
            word for key, value in flags.items() for word in ([f"--{key}", str(value)] if value is not True else [f"--{key}"])]
        with open(out_dir / f"{name}.txt", "a") as output:
            code = subprocess.run([sys.executable, *map(str, command), "--out_dir", run, *words], stdout=output,
                                  stderr=subprocess.STDOUT, env=os.environ | {"OMP_NUM_THREADS": "1"}).returncode
        print(f"{name}: " + ("done" if code == 0 else f"failed, see {output.name}"), flush=True)

    out_dir.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(jobs) as pool:
        list(pool.map(lambda run: train(run[0], *run[1]), runs.items()))


def pyplot():
    """matplotlib.pyplot, drawing into files."""
    try:
        import matplotlib
    except ImportError:
        raise SystemExit("pictures need matplotlib: pip install matplotlib") from None
    matplotlib.use("Agg")
    from matplotlib import pyplot
    return pyplot
