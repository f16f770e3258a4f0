"""
For the scripts beside this file: run train.py several times in parallel, one thread each, and read its logs.
"""

import argparse
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor


def command_line(doc):
    """A parser whose --help shows the script's docstring as it stands."""
    return argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)


def read_log(run):
    """The entries of run/log.jsonl, oldest first."""
    path = run / "log.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def finished(run, max_iters):
    log = read_log(run)
    return bool(log) and log[-1]["iter"] == max_iters and "val_loss" in log[-1]


def train_all(runs, out_dir, jobs):
    """runs: {name: (command, flags of train.py)}. Each trains into out_dir/name. A finished run is not
    repeated, and one that was cut off is resumed."""
    out_dir.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(jobs) as pool:
        for _ in pool.map(lambda name: train_one(out_dir / name, *runs[name]), runs):
            pass


def train_one(run, command, flags):
    if finished(run, flags["max_iters"]):
        return
    words = ["--resume"]
    if not (run / "ckpt.pt").exists():
        words = [word for key, value in flags.items()
                 for word in ([f"--{key}"] if value is True else [f"--{key}", str(value)])]
    with open(f"{run}.txt", "a") as output:
        code = subprocess.run([sys.executable, *map(str, command), "--out_dir", run, *words], stdout=output,
                              stderr=subprocess.STDOUT, env=os.environ | {"OMP_NUM_THREADS": "1"}).returncode
    print(f"{run.name}: " + ("done" if code == 0 else f"failed, see {run}.txt"), flush=True)


def pyplot():
    """matplotlib.pyplot, drawing into files."""
    try:
        import matplotlib
    except ImportError:
        raise SystemExit("pictures need matplotlib: pip install matplotlib") from None
    matplotlib.use("Agg")
    from matplotlib import pyplot
    return pyplot
