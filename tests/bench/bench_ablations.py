"""
The report's claims, small: the tiny preset on the default corpus, three seeds of everything.

    python tests/bench/bench_ablations.py --out_dir out-ablations               # an hour or two on two cores
    python tests/bench/bench_ablations.py --out_dir out-ablations balance mtp   # only these studies
    python tests/bench/bench_ablations.py --log tests/results/ablations.jsonl --plot .    # kept results

    balance     auxiliary-loss-free balancing, an auxiliary loss, and neither (§4.5.2, arXiv 2408.15664)
    router      the bias update speed γ and the routed scaling factor
    mtp         with and without multi-token prediction, at equal steps and at equal time (§4.5.1)
    attention   MLA and multi-head attention with the same number of parameters
    documents   attention and MTP across documents and within them, on short, unrelated texts (§4.1)
    scaling     loss against active parameters and tokens, a fit, and its prediction for the next size

A study that was cut off continues where it stopped. OUT_DIR/ablations.jsonl gets the log of each run and what
is measured on its weights.
"""

import itertools
import json
import random
import statistics
import sys
import time
from pathlib import Path
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

import model  # noqa: E402
import sample  # noqa: E402
import train  # noqa: E402
from data.loader import open_bin, read_meta  # noqa: E402
from data.prepare import documents, prepare  # noqa: E402
from runs import command_line, finished, pyplot, read_log, train_all  # noqa: E402

SEEDS = (1, 2, 3)
STEPS = 250                     # of 3,072 tokens
SPEEDUP_WITHOUT_MTP = 1.43      # measured on one thread: the steps that fit into the same time
MANY_EXPERTS = dict(n_routed_experts=32, num_experts_per_tok=4, moe_intermediate_size=64)   # more to balance
ROUTER = ((0.0001, 1.0), (0.001, 1.0), (0.01, 1.0), (0.01, 0.75), (0.01, 2.5))  # γ, routed scaling factor

# Multi-head attention caches keys and values of 4 heads x (32 + 34): 264 numbers where MLA has 48 + 16
MHA_FLAGS = dict(v_head_dim=34, kv_lora_rank=248)


class MHA(nn.Module):
    """Multi-head attention with MLA's interface. Keys and values have their own projections, and all of them
    are cached. RoPE rotates d_rope of a head's d_nope channels. With v_head_dim=34 it has as many parameters
    as the tiny preset's MLA, up to MLA's two norms."""

    def __init__(self, config):
        super().__init__()
        D, self.H = config.hidden_size, config.num_attention_heads
        self.d_qk, self.d_rope, self.d_v = config.qk_nope_head_dim, config.qk_rope_head_dim, config.v_head_dim
        self.q_proj, self.k_proj = (nn.Linear(D, self.H * self.d_qk, bias=False) for _ in range(2))
        self.v_proj = nn.Linear(D, self.H * self.d_v, bias=False)
        self.o_proj = nn.Linear(self.H * self.d_v, D, bias=False)

    def forward(self, x, cos, sin, mask=None, cache=None, pos=0):
        B, T, _ = x.shape
        q = self.q_proj(x).view(B, T, self.H, -1)                                       # (B, T, H, d_qk)
        k = self.k_proj(x).view(B, T, self.H, -1)                                       # (B, T, H, d_qk)
        v = self.v_proj(x).view(B, T, self.H, -1)                                       # (B, T, H, d_v)
        q, k = (torch.cat([t[..., self.d_rope:], model.rotate(t[..., :self.d_rope], cos, sin)], -1)
                for t in (q, k))
        if cache is not None:       # (B, S, H * (d_qk + d_v))
            cache[:, pos:pos + T] = torch.cat([k, v], -1).flatten(2)
            k, v = cache[:, :pos + T].unflatten(-1, (self.H, -1)).split([self.d_qk, self.d_v], -1)
        # equal head sizes, as SDPA's fast kernels want them
        q, k = (F.pad(t, (0, self.d_v - self.d_qk)).transpose(1, 2) for t in (q, k))
        causal = mask is None and pos == 0
        o = F.scaled_dot_product_attention(q, k, v.transpose(1, 2), attn_mask=mask, is_causal=causal,
                                           scale=self.d_qk ** -0.5)
        return self.o_proj(o.transpose(1, 2).flatten(2))


# ------------------------------------------------------------------------------------------------------------
# What to train

def sizes():
    """{hidden size: flags}. Everything grows with the width, including the depth."""
    return {32 * n: dict(hidden_size=32 * n, num_hidden_layers=n, num_attention_heads=n, q_lora_rank=24 * n,
                         kv_lora_rank=12 * n, intermediate_size=96 * n, moe_intermediate_size=32 * n,
                         num_nextn_predict_layers=0) for n in (2, 3, 4, 5, 6)}


TOKENS = (40, 80, 160)          # steps of 3,072 tokens; the last size is trained for the longest only


def variants(experiments):
    """{name of a run without its seed: (command, flags)}"""
    base, found = dict(max_iters=STEPS), {}
    plain = [ROOT / "train.py"]
    if "balance" in experiments:
        found["aux-free"] = plain, base | MANY_EXPERTS
        found["aux-loss"] = plain, base | MANY_EXPERTS | dict(bias_update_speed=0, balance_loss_alpha=0.01)
        found["no-balance"] = plain, base | MANY_EXPERTS | dict(bias_update_speed=0, balance_loss_alpha=0)
    if "router" in experiments:
        for speed, scale in ROUTER:
            flags = dict(bias_update_speed=speed, routed_scaling_factor=scale)
            found[f"router-{speed}-{scale}"] = plain, base | flags
    if {"mtp", "attention"} & set(experiments):
        found["base"] = plain, base
    if "mtp" in experiments:
        without = dict(num_nextn_predict_layers=0)
        found["no-mtp"] = plain, base | without
        found["no-mtp-same-time"] = plain, without | dict(max_iters=round(STEPS * SPEEDUP_WITHOUT_MTP))
    if "attention" in experiments:
        found["mha"] = [__file__, "--as_mha"], base | MHA_FLAGS
    if "documents" in experiments:
        packed = base | dict(block_size=256, batch_size=8)
        found["packed"], found["masked"] = (plain, packed), (plain, packed | dict(mask_documents=True))
    if "scaling" in experiments:
        *small, last = sizes().items()
        for (width, flags), steps in [*itertools.product(small, TOKENS), (last, TOKENS[-1])]:
            found[f"width-{width}-{steps}"] = plain, flags | dict(max_iters=steps)
    return found


def write_paragraphs(where):
    """The standard library cut at blank lines into small texts, shuffled: neighbours are unrelated."""
    parts = [part + b"\n" for doc in documents("stdlib", None, where) for part in doc.text.split(b"\n\n")
             if 80 < len(part) < 400]
    random.Random(0).shuffle(parts)
    where.mkdir(parents=True)
    for i, part in enumerate(parts[:6000]):
        (where / f"{i:04}.txt").write_bytes(part)


def train_runs(experiments, out_dir, jobs):
    data = {"stdlib": out_dir / "data-stdlib", "paragraphs": out_dir / "data-paragraphs"}
    if not (data["stdlib"] / "meta.json").exists():
        prepare(data["stdlib"])
    if "documents" in experiments and not (data["paragraphs"] / "meta.json").exists():
        if not (out_dir / "paragraphs").exists():
            write_paragraphs(out_dir / "paragraphs")
        prepare(data["paragraphs"], input=out_dir / "paragraphs")
    common = dict(eval_interval=1000, log_interval=25, device="cpu")
    runs = {}
    for seed in SEEDS:
        for name, (command, flags) in variants(experiments).items():
            text = "paragraphs" if name in ("packed", "masked") else "stdlib"
            runs[f"{name}-{seed}"] = command, flags | common | dict(seed=seed, data_dir=data[text])
    train_all(runs, out_dir, jobs)
    return [name for name, (_, flags) in runs.items() if finished(out_dir / name, flags["max_iters"])]


# ------------------------------------------------------------------------------------------------------------
# What to measure on the trained weights

@torch.no_grad()
def expert_load(run):
    """(layers, E): tokens of validation text that each expert gets, as a multiple of the mean."""
    m = sample.load(run, "cpu")[0]
    data = run.parent / "data-stdlib"
    tokens = open_bin(data / "val.bin", read_meta(data / "meta.json"))[:128 * 256 + 1]
    tokens = torch.from_numpy(tokens.astype(np.int64))
    batches = zip(tokens[:-1].view(8, -1, 128), tokens[1:].view(8, -1, 128))
    load = sum(m(x, y)[2]["load"] for x, y in batches).float()
    return (load / load.mean(1, keepdim=True)).tolist()


def acceptance(run):
    """Share of the MTP module's drafts that greedy decoding accepts, continuing 20 validation texts."""
    m = sample.load(run, "cpu")[0]
    data = run.parent / "data-stdlib"
    tokens = open_bin(data / "val.bin", read_meta(data / "meta.json"))
    stats = {}
    for i in range(20):
        idx = torch.from_numpy(tokens[i * 1000:i * 1000 + 64].astype(np.int64))[None]
        list(sample.generate_stream(m, idx, 64, 0, stats=stats))
    return stats["accepted"] / stats["drafted"]


def decode_speed(length=2048, repeats=7, steps=32):
    """{"MLA", "MHA": (bytes of cache per token, parameters, median ms per token after `length` tokens)}"""
    found, models = {}, {}
    for name, attention, flags in ("MLA", model.MLA, {}), ("MHA", MHA, MHA_FLAGS):
        config = model.DeepSeekV3Config(**{**model.PRESETS["tiny"], **flags})
        with mock.patch.object(model, "MLA", attention):
            m = model.DeepSeekV3(config).eval()
        cache = m.new_cache(1, length + steps)
        m.decode(torch.zeros(1, length, dtype=torch.int64), cache, 0)
        models[name] = m, cache, []
    for _ in range(repeats):
        for m, cache, times in models.values():
            start = time.perf_counter()
            for i in range(steps):
                m.decode(torch.zeros(1, 1, dtype=torch.int64), cache, length + i)
            times.append((time.perf_counter() - start) / steps * 1e3)
    for name, (m, cache, times) in models.items():
        attention = sum(p.numel() for p in m.model.layers[0].self_attn.parameters())
        cache_bytes = sum(c[0, 0].numel() * c.element_size() for c in cache)
        found[name] = cache_bytes, attention, statistics.median(times)
    return found


def collect(names, out_dir):
    """OUT_DIR/ablations.jsonl: a line per run, small enough to keep."""
    path, kept = out_dir / "ablations.jsonl", {}
    if path.exists():
        kept = {entry["run"]: entry for entry in map(json.loads, path.read_text().splitlines())}
    for name in names:
        if name not in kept:
            log = read_log(out_dir / name)
            last = log[-1]
            kept[name] = {"run": name, "val_loss": last["val_loss"], "elapsed_s": round(last["elapsed_s"], 1)}
            for key in ("iter", "main_loss", "max_vio"):
                kept[name][key] = [round(entry[key], 4) for entry in log]
            kind = name.rpartition("-")[0]
            if kind in ("aux-free", "aux-loss", "no-balance"):
                kept[name]["load"] = [[round(x, 3) for x in row] for row in expert_load(out_dir / name)]
            if kind == "base":
                kept[name]["acceptance"] = acceptance(out_dir / name)
            if kind.startswith("width"):
                config = sample.load(out_dir / name, "cpu")[0].config
                with torch.device("meta"):
                    kept[name]["active"] = active_matrices(model.DeepSeekV3(config))
    if "mha-1" in kept and "attention" not in kept:
        kept["attention"] = {"run": "attention", **decode_speed()}
    path.write_text("".join(json.dumps(entry) + "\n" for entry in kept.values()))
    return path


def active_matrices(m):
    """Active parameters without embedding and head, which outweigh the rest at this size."""
    return m.num_params(active=True) - m.model.embed_tokens.weight.numel() - m.lm_head.weight.numel()


# ------------------------------------------------------------------------------------------------------------
# Tables and pictures

def seeds_of(kept, name):
    return [kept[f"{name}-{seed}"] for seed in SEEDS if f"{name}-{seed}" in kept]


def mean_and_spread(values):
    spread = f" ± {statistics.stdev(values):.4f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.4f}{spread}"


def table(kept, title, rows):
    """rows: {label: name of the runs}. Validation loss, its difference from the first row, MaxVio, time."""
    if not all(seeds_of(kept, name) for name in rows.values()):
        return
    print(f"\n| {title} | val loss, nats per byte | against the first row, same seed | MaxVio, last third | "
          "seconds |\n|---|---|---|---|---|")
    first = seeds_of(kept, next(iter(rows.values())))
    for label, name in rows.items():
        runs = seeds_of(kept, name)
        gaps = ""
        if runs != first:
            gaps = ", ".join(f"{a['val_loss'] - b['val_loss']:+.4f}" for a, b in zip(runs, first))
        vio = statistics.mean(statistics.mean(run["max_vio"][-len(run["max_vio"]) // 3:]) for run in runs)
        loss = mean_and_spread([run["val_loss"] for run in runs])
        seconds = statistics.mean(run["elapsed_s"] for run in runs)
        print(f"| {label} ({len(runs)} seeds) | {loss} | {gaps} | {vio:.2f} | {seconds:.0f} |")


def fit(points):
    """points: (n, 3) of active parameters N, tokens D, loss. -> E, A, alpha, B, beta of E + A/N^alpha +
    B/D^beta: the exponents by search, the rest by least squares."""
    N, D, loss = np.array(points).T
    best = None
    for alpha, beta in itertools.product(np.linspace(0.05, 1.5, 59), repeat=2):
        basis = np.stack([np.ones_like(N), (N / N[0]) ** -alpha, (D / D[0]) ** -beta], 1)
        x = np.linalg.lstsq(basis, loss, rcond=None)[0]
        error = np.square(basis @ x - loss).sum()
        if (x >= 0).all() and (best is None or error < best[0]):
            best = error, x[0], x[1] * N[0] ** alpha, alpha, x[2] * D[0] ** beta, beta
    return best[1:]


def predict(law, N, D):
    E, A, alpha, B, beta = law
    return E + A / N**alpha + B / D**beta


def scaling(kept):
    points, rows = [], []
    *small, last = sizes()
    for width, steps in [*itertools.product(small, TOKENS), (last, TOKENS[-1])]:
        if runs := seeds_of(kept, f"width-{width}-{steps}"):
            losses = [run["val_loss"] for run in runs]
            rows.append((width, steps, runs[0]["active"], steps * 3072, statistics.mean(losses),
                         mean_and_spread(losses)))
    points = [row[2:5] for row in rows if row[0] != last]
    if len(points) < len(small) * len(TOKENS):
        return None
    law = E, A, alpha, B, beta = fit(points)
    print(f"\nloss = {E:.3f} + {A:.3g} / N^{alpha:.2f} + {B:.3g} / D^{beta:.2f}, "
          f"from the {len(points)} points above the last\n")
    print("| width = 32 x layers | active parameters N | tokens D | val loss | fit |\n|---|---|---|---|---|")
    for width, _, N, D, _, spread in rows:
        predicted = " (predicted)" if width == last else ""
        print(f"| {width} | {N:,} | {D:,} | {spread} | {predict(law, N, D):.4f}{predicted} |")
    return rows, law


def report(kept, plot):
    table(kept, "balancing", {
        "auxiliary-loss-free": "aux-free", "auxiliary loss, α = 0.01": "aux-loss", "neither": "no-balance"})
    table(kept, "γ, routed scaling factor", {
        f"{speed}, {scale}": f"router-{speed}-{scale}" for speed, scale in ROUTER})
    table(kept, "prediction", {
        "MTP": "base", "no MTP, as many steps": "no-mtp", "no MTP, as much time": "no-mtp-same-time"})
    if rates := [run["acceptance"] for run in seeds_of(kept, "base")]:
        print(f"drafts accepted, greedily, on held-out prompts: {', '.join(f'{rate:.1%}' for rate in rates)}")
    table(kept, "attention", {"MLA": "base", "MHA": "mha"})
    for name in ("MLA", "MHA") if "attention" in kept else ():
        cache, parameters, ms = kept["attention"][name]
        print(f"{name}: {parameters:,} parameters a layer, {cache:,} bytes of cache per token, "
              f"{ms:.2f} ms per token after 2048")
    table(kept, "packing", {"across documents": "packed", "within documents": "masked"})
    fitted = scaling(kept)
    if plot and seeds_of(kept, "aux-free") and seeds_of(kept, "no-balance"):
        plot_balance(kept, plot / "balance.png")
    if plot and fitted:
        plot_scaling(*fitted, plot / "scaling.png")


def plot_balance(kept, path):
    """MaxVio over the steps of every seed, and the load of each expert in the runs of the first seed."""
    fig, axes = pyplot().subplots(1, 4, figsize=(14, 3.4), layout="constrained", width_ratios=[1.3, 1, 1, 1])
    runs = (("no-balance", "neither", "C3"), ("aux-loss", "auxiliary loss", "C1"),
            ("aux-free", "auxiliary-loss-free", "C0"))
    for axis, (name, label, color) in zip(axes[1:], runs):
        for run in seeds_of(kept, name):
            axes[0].plot(run["iter"], run["max_vio"], color=color, linewidth=1,
                         label=label if run["run"].endswith("1") else None)
        image = axis.imshow(seeds_of(kept, name)[0]["load"], vmin=0, vmax=3, cmap="viridis", aspect="auto")
        axis.set(title=label, xlabel="expert", yticks=range(3), yticklabels=["layer 1", "2", "MTP"])
    fig.colorbar(image, ax=axes[1:], label="tokens, 1: the mean", shrink=0.9)
    axes[0].set(xlabel="step", ylabel="MaxVio", title="3 seeds each", yscale="log")
    axes[0].legend()
    fig.savefig(path, dpi=90)


def plot_scaling(rows, law, path):
    fig, axis = pyplot().subplots(figsize=(6, 3.8), layout="constrained")
    for i, steps in enumerate(TOKENS):
        N = np.array([row[2] for row in rows if row[1] == steps])
        loss = [row[4] for row in rows if row[1] == steps]
        axis.plot(N, loss, "o", color=f"C{i}", label=f"{steps * 3072:,} tokens")
        grid = np.geomspace(N.min(), rows[-1][2], 50)
        axis.plot(grid, predict(law, grid, steps * 3072), color=f"C{i}", linewidth=1)
    axis.plot(*rows[-1][2:5:2], "o", markersize=11, fillstyle="none", color="black", label="not in the fit")
    axis.set(xscale="log", xlabel="active parameters without embedding and head",
             ylabel="val loss, nats per byte")
    axis.legend()
    fig.savefig(path, dpi=90)


def main():
    if sys.argv[1:2] == ["--as_mha"]:       # one of our own processes: train.py with the other attention
        model.MLA = MHA
        return train.main(sys.argv[2:])
    names = ("balance", "router", "mtp", "attention", "documents", "scaling")
    parser = command_line(__doc__)
    parser.add_argument("experiments", nargs="*", metavar="STUDY", help=f"{', '.join(names)}; default: all")
    parser.add_argument("--out_dir", type=Path, default=Path("out-ablations"))
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, one thread each")
    parser.add_argument("--log", type=Path, help="print and plot these results instead of training")
    parser.add_argument("--plot", type=Path, help="folder for the pictures")
    args = parser.parse_args()
    if unknown := set(args.experiments) - set(names):
        parser.error(f"unknown experiment {', '.join(unknown)}; choose from {', '.join(names)}")
    path = args.log or collect(train_runs(args.experiments or names, args.out_dir, args.jobs), args.out_dir)
    report({entry["run"]: entry for entry in map(json.loads, path.read_text().splitlines())}, args.plot)


if __name__ == "__main__":
    main()
