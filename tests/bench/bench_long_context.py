"""
Context extension in two phases, as in §4.3 of the report: a model trained on 128 bytes is extended to 512,
then to 2048, by YaRN.

    python tests/bench/bench_long_context.py --out_dir out-long      # continues where it stopped
    python tests/bench/bench_long_context.py --out_dir out-long --plot long_context.png     # needs matplotlib

The data alternate between Python's own source and filler with a pass key that is asked for at the end, in
texts that fit a phase's context. Evaluated before and after each phase, at lengths up to 2048:
    loss by position        on held-out source
    passkey retrieval       share of the keys whose 4 characters are all the likeliest tokens, by length of
                            the text and depth of the key in it
A key has characters of four kinds that the filler lacks, so looking one up takes a single step of attention.
A model this small learns none of it in so few steps, not even at 128 (nor keys of 5 digits): what the study
shows is the loss. The report's YaRN in both phases: s = 40, alpha = 1, beta = 32, attention factor
0.1 ln s + 1.
"""

import json
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

import sample  # noqa: E402
from runs import command_line, pyplot  # noqa: E402
from data.prepare import documents, prepare  # noqa: E402
from model import DeepSeekV3  # noqa: E402

PHASES = {128: (1000, 16), 512: (200, 4), 2048: (200, 1)}       # context: steps, batch
MODEL = ("--hidden_size 96 --num_hidden_layers 2 --n_routed_experts 4 --num_experts_per_tok 2 --n_group 1 "
         "--topk_group 1 --num_nextn_predict_layers 0 --max_position_embeddings 128").split()
YARN = dict(type="yarn", factor=40, original_max_position_embeddings=128, beta_fast=32, beta_slow=1,
            mscale=1.0, mscale_all_dim=1.0)
FILLER = b"the grass is green. the sky is blue. the sun is yellow. here we go. there and back again. "
KEY, QUESTION = b"the pass key is %b. ", b"which? the pass key is "
KINDS = ("ABCDEFGHIJKLM", "0123456789", "NOPQRSTUVWXYZ", "!#$%&*+=<>@")     # of the characters of a key
LENGTHS, DEPTHS, TRIES = (128, 256, 512, 1024, 2048), (0.0, 0.25, 0.5, 0.75, 1.0), 20


def passkey_text(length, depth, rng):
    """A text of `length` bytes that ends in the question, the key's 4 characters and a full stop."""
    key = "".join(rng.choice(kind) for kind in KINDS).encode()
    room = length - len(KEY % key) - len(QUESTION) - 5
    before, start = round(depth * room), rng.randrange(len(FILLER))
    filler = (FILLER * (length // len(FILLER) + 2))[start:start + room]
    return filler[:before] + KEY % key + filler[before:] + QUESTION + key + b"."


def write_texts(where, context):
    """A million bytes each of source and of pass key texts."""
    rng, source, size = random.Random(context), [], 0
    for text, *_ in documents("stdlib", None, where):
        source.append(text)
        size += len(text)
        if size > 1e6:
            break
    per_source = int(1e6 / (context * 0.75) / len(source)) + 1
    where.mkdir(parents=True, exist_ok=True)
    for i, text in enumerate(source):
        (where / f"{i:04}-source.txt").write_bytes(text)
        for j in range(per_source):
            length = rng.randint(max(context // 4, 70), context - 8)
            (where / f"{i:04}-key{j:04}.txt").write_bytes(passkey_text(length, rng.random(), rng))


def run_phase(out_dir, context, released):
    """Train from `released` (None: from scratch), and export to OUT/released-CONTEXT."""
    steps, batch = PHASES[context]
    data, run, export = (out_dir / f"{name}-{context}" for name in ("data", "run", "released"))
    if (export / "config.json").exists():
        return export
    if not (data / "meta.json").exists():
        write_texts(out_dir / f"texts-{context}", context)
        prepare(data, input=out_dir / f"texts-{context}", tokenizer=released or "bytes")
    flags = ["--resume"] if (run / "ckpt.pt").exists() else [
        "--data_dir", data, "--max_iters", steps, "--batch_size", batch, "--block_size", context,
        "--optimizer", "muon", "--learning_rate", 0.02 if released is None else 0.005,
        "--eval_interval", 250, "--log_interval", 50]
    if flags != ["--resume"]:
        flags += MODEL if released is None else ["--init_from", released]
        if context == 512:
            flags += ["--rope_scaling", json.dumps(YARN), "--max_position_embeddings", 512]
    subprocess.run([sys.executable, ROOT / "train.py", "--out_dir", run, *map(str, flags)], check=True)
    model, enc, *_ = sample.load(run, "cpu")
    model.save_pretrained(export, enc)
    return export


def held_out(data):
    """The separator, and windows of source (n, 2049) that no phase trains on."""
    separator = json.loads((data / "meta.json").read_text())["separator"]
    tokens = np.fromfile(data / "val.bin", np.uint16).astype(np.int64)
    tokens = tokens[len(tokens) // 5:]      # the phases' splits are not cut at quite the same file
    cuts = [*np.flatnonzero(tokens == separator), len(tokens)]
    rows = [tokens[i:i + 2049] for a, b in zip(cuts, cuts[1:]) for i in range(a, b - 2048, 2049)][:64]
    return separator, torch.from_numpy(np.stack(rows))


@torch.no_grad()
def evaluate(path, separator, source, lengths, **changes):
    """-> {"loss": nats by position (2048,), "passkey": {length: [share by depth]}}"""
    model = DeepSeekV3.from_pretrained(path, torch.float32, max_position_embeddings=4096, **changes)
    losses = []
    for rows in source.split(4):
        logits = model(rows[:, :-1])[0]
        losses.append(torch.nn.functional.cross_entropy(logits.mT, rows[:, 1:], reduction="none"))
    passkey, rng = {}, random.Random(0)
    for length in lengths:
        passkey[length] = []
        for depth in DEPTHS:
            texts = [[separator, *passkey_text(length - 1, depth, rng)] for _ in range(TRIES)]
            rows = torch.tensor(texts)
            found = torch.cat([model(part[:, :-1])[0][:, -5:-1].argmax(-1) for part in rows.split(4)])
            passkey[length].append((found == rows[:, -5:-1]).all(1).float().mean().item())
    return {"loss": torch.cat(losses).mean(0).tolist(), "passkey": passkey}


def plot(results, path):
    plt = pyplot()
    fig, axes = plt.subplots(1, 1 + len(results), figsize=(4.2 + 2.6 * len(results), 3.6),
                             layout="constrained", width_ratios=[1.7] + [1] * len(results))
    for name, result in results.items():
        loss = np.array(result["loss"]).reshape(-1, 64).mean(1)
        axes[0].plot(np.arange(len(loss)) * 64 + 32, loss, label=name)
    axes[0].set(xscale="log", xlabel="position", ylabel="loss, nats per byte", title="loss by position")
    axes[0].legend(fontsize=8)
    for axis, (name, result) in zip(axes[1:], results.items()):
        lengths = sorted(result["passkey"], key=int)
        grid = np.array([result["passkey"][n] for n in lengths]).T      # (depth, length)
        axis.imshow(grid, vmin=0, vmax=1, cmap="RdYlGn", aspect="auto")
        for (y, x), value in np.ndenumerate(grid):
            axis.text(x, y, f"{value:.0%}", ha="center", va="center", fontsize=7)
        axis.set(xticks=range(len(lengths)), yticks=range(len(DEPTHS)), xlabel="length of the text",
                 title=name)
        axis.set_xticklabels(lengths, fontsize=8)
        axis.set_yticklabels([f"{d:.0%}" for d in DEPTHS], fontsize=8)
        axis.title.set_fontsize(9)
    axes[1].set_ylabel("depth of the pass key")
    fig.savefig(path, dpi=90)


def main():
    parser = command_line(__doc__)
    parser.add_argument("--out_dir", type=Path, default=Path("out-long"))
    parser.add_argument("--plot", help="write the picture to this file")
    args = parser.parse_args()
    args.out_dir.mkdir(parents=True, exist_ok=True)
    path, results, released = args.out_dir / "results.json", {}, None
    if path.exists():
        results = json.loads(path.read_text())
    for context in PHASES:
        released = run_phase(args.out_dir, context, released)
        names = {f"extended to {context}": {}}
        if context == 128:
            names = {"trained on 128": {}, "YaRN, not trained": {"rope_scaling": YARN}}
        for name, changes in names.items():
            if name not in results:
                results[name] = evaluate(released, *held_out(args.out_dir / "data-128"), LENGTHS, **changes)
                path.write_text(json.dumps(results))
            loss = np.array(results[name]["loss"])
            print(f"{name}: loss at positions " + ", ".join(f"{a}-{b}: {loss[a:b].mean():.3f}" for a, b in (
                (0, 128), (128, 512), (512, 1024), (1024, 2048))))
            for length, shares in results[name]["passkey"].items():
                shares = "  ".join(f"{depth:.0%}: {share:.0%}" for depth, share in zip(DEPTHS, shares))
                print(f"    passkey in {length}: {shares}")
    if args.plot:
        plot(results, args.plot)


if __name__ == "__main__":
    main()
