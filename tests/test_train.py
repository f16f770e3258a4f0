"""train.py as a program: schedules, data order, checkpoints, resuming, Ctrl-C, and bad input."""

import contextlib
import functools
import io
import json
import math
import os
import re
import signal
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import model
import sample
import train
from checkpoint import load_run, replaced_classes
from data.loader import Tokens, Validation
from data.prepare import prepare
from model import DeepSeekV3, DeepSeekV3Config
from optim import batch_sizes, schedule

ROOT = Path(__file__).parent.parent
SHAPE = ("--hidden_size 32 --intermediate_size 48 --moe_intermediate_size 16 --num_hidden_layers 2 "
         "--num_attention_heads 2 --q_lora_rank 16 --kv_lora_rank 16 --qk_nope_head_dim 8 "
         "--qk_rope_head_dim 8 "
         "--v_head_dim 8 --n_routed_experts 4 --num_experts_per_tok 2 --n_group 2 --topk_group 2 "
         "--block_size 32 --batch_size 4 --device cpu --dtype float32").split()


def command(data_dir, out_dir, *flags, script="train.py"):
    if script == "train.py":
        flags = ["--data_dir", str(data_dir), "--out_dir", str(out_dir), *SHAPE, *flags]
    return [sys.executable, str(ROOT / script), *map(str, flags)]


def ok(*args, script="train.py"):
    """A run that succeeds, in this process, as importing torch takes longer than most of them."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        (train if script == "train.py" else sample).main(command(*args, script=script)[2:])
    return types.SimpleNamespace(stdout=out.getvalue(), stderr=err.getvalue())


def log(out_dir):
    return [json.loads(line) for line in (out_dir / "log.jsonl").read_text().splitlines()]


def checkpoint(out_dir):
    return torch.load(out_dir / "ckpt.pt", weights_only=True)


def step_of(path):
    return load_run(path)["state"]["step"]


def assert_equal_runs(a, b):
    """Weights, optimizer state, router bias, position: bit for bit."""
    a, b = checkpoint(a), checkpoint(b)
    for key in ("state", "config", "meta"):
        assert a[key] == b[key]
    assert a["model"].keys() == b["model"].keys()
    assert all(torch.equal(a["model"][k], b["model"][k]) for k in a["model"])
    for one, other in zip(a["optimizers"], b["optimizers"], strict=True):
        for i in one["state"]:
            assert all(torch.equal(torch.as_tensor(v), torch.as_tensor(other["state"][i][k]))
                       for k, v in one["state"][i].items())


def interrupt(monkeypatch, step, number=signal.SIGINT):
    """A signal, such as Ctrl-C's, in the middle of a step."""
    schedule, calls = train.schedule, [0]

    def interrupted(progress):
        calls[0] += 1
        if calls[0] == step:
            os.kill(os.getpid(), number)
        return schedule(progress)

    monkeypatch.setattr(train, "schedule", interrupted)


def test_trains_logs_and_samples(data_dir, tmp_path):
    done = ok(data_dir, tmp_path / "out", "--max_iters", 60, "--learning_rate", 1e-2, "--eval_interval", 30,
              "--log_interval", 5)
    entries = log(tmp_path / "out")
    assert [e["iter"] for e in entries] == [1, *range(5, 61, 5)]
    keys = {"iter", "loss", "main_loss", "mtp_loss", "balance_loss", "lr", "grad_norm", "tokens_per_s", "mfu",
            "max_vio", "elapsed_s"}
    assert all(keys <= e.keys() for e in entries) and all(math.isfinite(e["loss"]) for e in entries)
    assert [e["iter"] for e in entries if "val_loss" in e] == [30, 60]
    last = entries[-1]
    assert last["main_loss"] < entries[0]["main_loss"] - 1.5
    # bytes, but for separators
    assert last["val_bpb"] == pytest.approx(last["val_loss"] / math.log(2), rel=0.05)
    parts = last["main_loss"] + 0.1 * last["mtp_loss"] + 1e-4 * last["balance_loss"]
    assert last["loss"] == pytest.approx(parts)
    assert entries[-1]["elapsed_s"] > entries[0]["elapsed_s"] > 0
    assert {p.name for p in (tmp_path / "out").iterdir()} == {"ckpt.pt", "ckpt.prev.pt", "best.pt",
                                                              "log.jsonl", "lock"}
    assert 10 < len(last["sample"]) <= 31 and repr(last["sample"]) in done.stdout
    assert "sample" not in entries[1]

    for ckpt in (tmp_path / "out", tmp_path / "out" / "ckpt.pt"):
        done = ok(None, None, "--ckpt", ckpt, "--prompt", "line 3", "--max_new_tokens", 40,
                  "--temperature", 0.5, script="sample.py")
        assert "line 3" in done.stdout and "tokens per forward pass" in done.stderr
        assert len(re.findall(r"of|\d", done.stdout.split("line 3", 1)[1])) >= 3
    again = ok(None, None, "--ckpt", ckpt, "--prompt", "line 3", "--max_new_tokens", 40, "--temperature", 0.5,
               script="sample.py")
    assert again.stdout == done.stdout
    greedy = [ok(None, None, "--ckpt", ckpt, "--temperature", 0, "--max_new_tokens", 40, "--num_samples", 2,
                 *flags, script="sample.py").stdout for flags in ([], ["--no-speculative"])]
    assert greedy[0] == greedy[1]


def test_an_interrupted_run_resumes_to_the_same_weights_bit_for_bit(data_dir, tmp_path):
    """AdamW; test_faults.py kills runs of Muon."""
    flags = ["--max_iters", 20, "--eval_interval", 10, "--log_interval", 1, "--optimizer", "adamw",
             "--gradient_accumulation_steps", 2, "--bias_update_speed", 0.01]
    ok(data_dir, tmp_path / "whole", *flags)
    process = subprocess.Popen(command(data_dir, tmp_path / "cut", *flags), stdout=subprocess.PIPE,
                               stderr=subprocess.STDOUT, text=True)
    for line in process.stdout:
        if line.startswith("step 7/"):
            process.send_signal(signal.SIGINT)
            break
    said = process.stdout.read()
    assert process.wait() == 130 and "--resume" in said and "Traceback" not in said, said
    stopped = checkpoint(tmp_path / "cut")["state"]["step"]
    assert 7 <= stopped < 20
    # as after a kill -9, log.jsonl is ahead of the checkpoint and its last line torn; others are damaged
    with open(tmp_path / "cut" / "log.jsonl", "ab") as f:
        f.write(b'{"iter": 19, "loss": 1.0}\n[1]\n{"loss": 2}\n\xff\xfe}\n{"iter": 20, "lo')
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        train.main(["--resume", "--out_dir", str(tmp_path / "cut")])
    assert f"at step {stopped}" in said.getvalue()
    assert_equal_runs(tmp_path / "whole", tmp_path / "cut")
    whole, cut = log(tmp_path / "whole"), log(tmp_path / "cut")
    assert [e["iter"] for e in cut] == [e["iter"] for e in whole]
    assert [e["loss"] for e in cut] == [e["loss"] for e in whole]


def test_an_out_dir_that_is_a_file_is_named(data_dir, tmp_path):
    (tmp_path / "notes").write_text("mine")
    with pytest.raises(SystemExit, match="^train.py: --out_dir .*notes is a file; give a folder$"):
        ok(data_dir, tmp_path / "notes", "--max_iters", 1)
    assert (tmp_path / "notes").read_text() == "mine"


def test_resume_can_lengthen_a_run_but_not_change_it(data_dir, tmp_path):
    ok(data_dir, tmp_path, "--max_iters", 4)
    for flag, value in ("--hidden_size", 64), ("--seed", 3), ("--batch_size", 2), ("--optimizer", "adamw"):
        with pytest.raises(SystemExit, match=f"^train.py: {flag} {value} contradicts"):
            train.main(["--resume", "--out_dir", str(tmp_path), flag, str(value)])
    ok(data_dir, tmp_path, "--resume", "--max_iters", 6)
    assert checkpoint(tmp_path)["state"]["step"] == 6


def test_a_run_resumes_in_the_folder_that_it_was_moved_to(data_dir, tmp_path, monkeypatch):
    ok(data_dir, tmp_path / "before", "--max_iters", 1)
    (tmp_path / "before").rename(tmp_path / "out")
    monkeypatch.chdir(tmp_path)
    train.main(["--resume", "--max_iters", "2"])        # in "out", the default
    assert checkpoint(tmp_path / "out")["state"]["step"] == 2 and not (tmp_path / "before").exists()


def test_accumulated_micro_batches_equal_the_large_batch(data_dir, tmp_path):
    """AdamW's first steps see the gradient's sign only, so router biases, losses and norms are compared."""
    common = ["--max_iters", 3, "--log_interval", 1, "--balance_loss_alpha", 0, "--eval_interval", 3]
    ok(data_dir, tmp_path / "a", *common, "--batch_size", 8)
    ok(data_dir, tmp_path / "b", *common, "--batch_size", 2, "--gradient_accumulation_steps", 4)
    for a, b in zip(log(tmp_path / "a"), log(tmp_path / "b"), strict=True):
        for key in ("loss", "main_loss", "mtp_loss", "grad_norm", "max_vio"):
            assert a[key] == pytest.approx(b[key], rel=1e-3), key
    a, b = checkpoint(tmp_path / "a")["model"], checkpoint(tmp_path / "b")["model"]
    for name in a:
        if "e_score_correction_bias" in name:
            torch.testing.assert_close(a[name], b[name])
            assert a[name].abs().max() > 0


@pytest.fixture(scope="module")
def pairs_dir(tmp_path_factory):
    """Pairs with long prompts, so that windows of 32 tokens have 32 labels, some, or none."""
    dir = tmp_path_factory.mktemp("pairs")
    lines = [json.dumps({"prompt": "p" * (5 + 97 * i % 90), "completion": "abc" * (1 + i % 9)})
             for i in range(60)]
    (dir / "pairs.jsonl").write_text("\n".join(lines))
    prepare(dir / "data", input=dir / "pairs.jsonl")
    return dir / "data"


def test_each_label_of_a_step_counts_alike(pairs_dir, tmp_path):
    common = ["--max_iters", 3, "--log_interval", 1, "--balance_loss_alpha", 0, "--eval_interval", 3]
    ok(pairs_dir, tmp_path / "a", *common, "--batch_size", 8)
    ok(pairs_dir, tmp_path / "b", *common, "--batch_size", 1, "--gradient_accumulation_steps", 8)
    for a, b in zip(log(tmp_path / "a"), log(tmp_path / "b"), strict=True):
        for key in ("loss", "main_loss", "mtp_loss", "grad_norm"):
            assert a[key] == pytest.approx(b[key], rel=1e-3), key
    nothing = torch.full((1, 4), -100)
    some = torch.tensor([[1, -100, -100, 1]])
    assert train.mean_over_labels([(None, some), (None, nothing)], 1) == [1, math.inf]
    assert train.mean_over_labels([(None, nothing)], 1) == [math.inf]


def test_a_separator_inside_a_prompt_does_not_end_the_document():
    x, y = torch.tensor([[9, 1, 9, 2, 3, 9, 4]]), torch.tensor([[-100, -100, -100, 3, 9, 4, 5]])
    assert train.document_ids(9, x, y).tolist() == [[1, 1, 1, 1, 1, 2, 2]]
    assert train.document_ids(None, x, y) is None


def test_masked_documents_train(data_dir, tmp_path):
    ok(data_dir, tmp_path / "a", "--max_iters", 2, "--block_size", 512, "--mask_documents")
    ok(data_dir, tmp_path / "b", "--max_iters", 2, "--block_size", 512)
    assert log(tmp_path / "a")[0]["main_loss"] != log(tmp_path / "b")[0]["main_loss"]


@pytest.mark.filterwarnings("ignore:FP8 is emulated")
@pytest.mark.parametrize("flags", [[], ["--fp8"]])
def test_recomputing_leaves_a_run_as_it_is(data_dir, tmp_path, flags):
    ok(data_dir, tmp_path / "a", "--max_iters", 3, *flags)
    ok(data_dir, tmp_path / "b", "--max_iters", 3, *flags, "--recompute")
    assert log(tmp_path / "a")[-1]["val_loss"] == log(tmp_path / "b")[-1]["val_loss"]


def test_bfloat16_trains(data_dir, tmp_path):
    ok(data_dir, tmp_path / "a", "--max_iters", 3, "--dtype", "bfloat16")
    ok(data_dir, tmp_path / "b", "--max_iters", 3)
    a, b = log(tmp_path / "a")[0]["main_loss"], log(tmp_path / "b")[0]["main_loss"]
    assert a != b and a == pytest.approx(b, rel=0.01)
    assert all(v.dtype == torch.float32 for v in checkpoint(tmp_path / "a")["model"].values())


@pytest.mark.parametrize("backend, graphs, flags", [
    ("eager", 5, ["--gradient_accumulation_steps", 2]),
    ("aot_eager", 3, ["--recompute", "--first_k_dense_replace", 0])])       # seconds a graph: no dense block
def test_a_compiled_run_has_a_graph_per_kind(data_dir, tmp_path, monkeypatch, backend, graphs, flags):
    """One to train and one to evaluate dense and MoE, one to train MTP, without a break, though lambda and
    the learning rate change. In bfloat16: in fp32 torch.compile can't trace grouped_mm. Without inductor,
    whose kernels take the C++ compiler a minute."""
    flags = [*flags, "--dtype", "bfloat16", "--max_iters", 6, "--eval_interval", 3, "--log_interval", 1,
             "--num_hidden_layers", 3, "--learning_rate", 1e-3]
    ok(data_dir, tmp_path / "eager", *flags)
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=backend))
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()
    ok(data_dir, tmp_path / "compiled", "--compile", *flags)
    counters = torch._dynamo.utils.counters
    torch.compiler.reset()
    assert not counters["graph_break"] and counters["stats"]["unique_graphs"] == graphs
    for a, b in zip(log(tmp_path / "eager"), log(tmp_path / "compiled"), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-4)
        assert a.get("val_loss", 0) == pytest.approx(b.get("val_loss", 0), rel=1e-4)


def test_a_step_casts_its_weights_once_for_all_micro_batches(data_dir, tmp_path):
    class Casts(TorchDispatchMode):
        count = 0
        def __torch_dispatch__(self, op, types, args=(), kwargs=None):
            is_cast = op is torch.ops.aten._to_copy.default and kwargs.get("dtype") == torch.bfloat16
            if is_cast and sorted(args[0].shape) == [4, 16, 32]:        # the matrices of 4 experts
                Casts.count += torch.is_grad_enabled()
            return op(*args, **(kwargs or {}))

    def losses(accumulation, batch_size):
        Casts.count, out_dir = 0, tmp_path / str(accumulation)
        with Casts():
            ok(data_dir, out_dir, "--dtype", "bfloat16", "--max_iters", 2, "--batch_size", batch_size,
               "--gradient_accumulation_steps", accumulation, "--log_interval", 1)
        return [entry["loss"] for entry in log(out_dir)]

    assert losses(1, 6) == pytest.approx(losses(3, 2), rel=1e-3)
    layers, matrices, steps = 2, 3, 2       # of MoE: one and the MTP module
    assert Casts.count == layers * matrices * steps


def test_recomputing_saves_memory_and_leaves_the_gradients_equal_bit_for_bit(make_model):
    class Operations(TorchDispatchMode):
        names = []
        def __torch_dispatch__(self, op, types, args=(), kwargs=None):
            self.names = [*self.names, op.name()]
            return op(*args, **(kwargs or {}))

    model = make_model().train()
    idx = torch.randint(61, (2, 17))

    def gradients():
        # bytes of the storages that the graph holds on to between forward and backward, by address
        kept = {}
        def pack(t):
            kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
            return t
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            loss = model(idx[:, :-1], idx[:, 1:])[1]
        with Operations() as done:
            loss.backward()
        products = done.names.count("aten::mm")
        grads = [p.grad for p in model.parameters()]
        model.zero_grad()
        return grads, products, sum(kept.values())

    plain, products, kept = gradients()
    train.recompute(model)
    again, products_again, kept_again = gradients()
    assert all(map(torch.equal, plain, again))
    # q_b_proj and kv_b_proj, and no others
    assert products_again == products + 2 * len(model.model.layers)
    # what the blocks' checkpoints keep by themselves doesn't pass the hooks
    assert kept_again < 0.3 * kept


def test_validation_counts_every_token_once(tmp_path):
    text = b"".join(b"%d squared is %d\n" % (i, i * i) for i in range(300))
    (tmp_path / "text.txt").write_bytes(text)
    meta = prepare(tmp_path / "d", input=tmp_path / "text.txt")
    val = text[len(text) * 9 // 10:]
    v = Validation(tmp_path / "d" / "val.bin", meta, (tmp_path / "d" / "encoding.json").read_text(), 4, 32)
    assert v.n == v.bytes == len(val)
    assert bytes(v.y[v.y != -100].tolist()) == val
    assert v.x[0, 0, 0] == meta["separator"] and bytes(v.x.flatten()[1:v.n].tolist()) == val[:-1]
    assert int((v.y != -100).sum()) == len(val) and v.x.shape[1:] == (4, 32)

    config = DeepSeekV3Config.preset("tiny")
    model = DeepSeekV3(config)
    with torch.no_grad():
        nats = 0.0
        for i in range(0, len(val), 32):
            row = [meta["separator"], *val][i:i + 32 + 1]
            logp = model(torch.tensor([row[:-1]]))[0].log_softmax(-1)[0]
            nats -= sum(logp[j, token].item() for j, token in enumerate(row[1:]))
    found = v.evaluate(model, torch.device("cpu"), torch.no_grad, lambda x, y: None)
    assert found["val_loss"] == pytest.approx(nats / len(val), rel=1e-4)
    assert found["val_bpb"] == pytest.approx(nats / len(val) / math.log(2), rel=1e-4)
    assert model.training


def test_validation_stops_at_256_kb(tmp_path):
    (tmp_path / "text.txt").write_bytes(b"0123456789abcde\n" * 180_000)
    meta = prepare(tmp_path / "d", input=tmp_path / "text.txt")
    v = Validation(tmp_path / "d" / "val.bin", meta, (tmp_path / "d" / "encoding.json").read_text(), 4, 256)
    assert meta["val_tokens"] > 2**18 and v.bytes == v.n == 2**18


def test_an_epoch_shows_each_window_once_and_the_next_one_another_cut(tmp_path):
    np.arange(1000, dtype=np.uint16).tofile(tmp_path / "train.bin")
    tokens = Tokens(tmp_path / "train.bin", {"dtype": "uint16"}, 16, 1000, seed=1)
    epochs = []
    for epoch in range(2):
        x, y = tokens.batch(epoch * tokens.windows, tokens.windows)
        assert torch.equal(y, x + 1)
        seen = x.flatten().tolist()
        assert len(set(seen)) == len(seen) >= 1000 - 3 * 16
        epochs.append(x[:, 0].tolist())
    assert sorted(epochs[0]) != sorted(epochs[1]) and epochs[0] != sorted(epochs[0])
    # a sample depends on its number only
    fresh = Tokens(tmp_path / "train.bin", {"dtype": "uint16"}, 16, 1000, seed=1)
    assert torch.equal(fresh.batch(70, 3)[0], torch.cat([tokens.batch(n, 1)[0] for n in (70, 71, 72)]))
    other = Tokens(tmp_path / "train.bin", {"dtype": "uint16"}, 16, 1000, seed=2)
    assert not torch.equal(other.batch(0, 5)[0], tokens.batch(0, 5)[0])


def test_a_token_outside_the_vocabulary_is_named(tmp_path):
    np.arange(100, dtype=np.uint16).tofile(tmp_path / "train.bin")
    with pytest.raises(ValueError, match=r"token \d\d, outside the vocabulary of 64"):
        Tokens(tmp_path / "train.bin", {"dtype": "uint16"}, 16, 64, seed=1).batch(0, 5)


def test_a_run_with_a_ramped_batch_follows_its_tokens_and_resumes(data_dir, tmp_path, monkeypatch):
    flags = ["--max_iters", 30, "--batch_size", 10, "--gradient_accumulation_steps", 2, "--batch_ramp",
             "--log_interval", 1, "--eval_interval", 30, "--learning_rate", 0.01, "--block_size", 8]
    ok(data_dir, tmp_path / "whole", *flags)
    sizes = batch_sizes(10, 30, ramp=True)
    assert sizes.tolist() == [2, 7] + 28 * [10]
    done = 2 * sizes.cumsum()
    assert checkpoint(tmp_path / "whole")["state"]["samples"] == done[-1]
    for entry, n in zip(log(tmp_path / "whole"), done, strict=True):       # the schedules follow the tokens
        assert entry["lr"] == pytest.approx(0.01 * schedule(n / done[-1])[0], rel=1e-12)
    interrupt(monkeypatch, 3)
    with pytest.raises(SystemExit):
        ok(data_dir, tmp_path / "cut", *flags)
    state = checkpoint(tmp_path / "cut")["state"]
    assert state["step"] == 3 and state["samples"] == done[2]
    ok(data_dir, tmp_path / "cut", *flags, "--resume")
    assert_equal_runs(tmp_path / "whole", tmp_path / "cut")


def test_the_average_of_the_weights_is_evaluated_saved_and_resumed(data_dir, tmp_path, monkeypatch):
    flags = ["--max_iters", 12, "--eval_interval", 6, "--learning_rate", 0.03, "--bias_update_speed", 0.01]
    seen, update = [], DeepSeekV3.update_router_bias        # the last thing that a step does to the model

    def watched(self, *args, **kwargs):
        update(self, *args, **kwargs)
        seen.append({k: v.clone() for k, v in self.state_dict().items()})

    monkeypatch.setattr(DeepSeekV3, "update_router_bias", watched)
    ok(data_dir, tmp_path / "plain", *flags)
    weights = list(seen)
    done = ok(data_dir, tmp_path / "whole", *flags, "--ema_decay", 0.6)
    a, b = checkpoint(tmp_path / "plain"), checkpoint(tmp_path / "whole")
    # it only looks on
    assert "ema" not in a and all(torch.equal(v, b["model"][k]) for k, v in a["model"].items())

    expected = weights[0]
    for n, now in enumerate(weights):
        share = max(0.4, 9 / (n + 9))
        expected = {k: (1 - share) * v + share * now[k] for k, v in expected.items()}
    assert any("e_score_correction_bias" in k for k in expected)
    for k, v in b["ema"].items():
        torch.testing.assert_close(v, expected[k], rtol=1e-4, atol=1e-6)

    last = log(tmp_path / "whole")[-1]
    assert last["val_loss"] == log(tmp_path / "plain")[-1]["val_loss"] != last["val_loss_ema"]
    assert f"of the average {last['val_loss_ema']:.4f}, {last['val_bpb_ema']:.4f}" in done.stdout
    meta = json.loads((data_dir / "meta.json").read_text())
    validation = Validation(data_dir / "val.bin", meta, b["encoding"], 4, 32)
    model = sample.load(tmp_path / "whole", "cpu", ema=True)[0]
    found = validation.evaluate(model, torch.device("cpu"), torch.no_grad, lambda x, y: None)
    assert found["val_loss"] == pytest.approx(last["val_loss_ema"], rel=1e-6)
    said = [ok(None, None, "--ckpt", tmp_path / "whole", "--temperature", 2, "--max_new_tokens", 100, *flag,
               script="sample.py").stdout for flag in ([], ["--ema"])]
    assert said[0] != said[1]

    interrupt(monkeypatch, 5)
    with pytest.raises(SystemExit):
        ok(data_dir, tmp_path / "cut", *flags, "--ema_decay", 0.6)
    assert checkpoint(tmp_path / "cut")["state"]["step"] == 5
    ok(data_dir, tmp_path / "cut", "--resume")
    assert all(torch.equal(v, checkpoint(tmp_path / "cut")["ema"][k]) for k, v in b["ema"].items())
    assert_equal_runs(tmp_path / "whole", tmp_path / "cut")


@pytest.mark.filterwarnings("ignore:FP8 is emulated")
def test_an_fp8_run_with_bf16_moments_resumes_bit_for_bit(data_dir, tmp_path, monkeypatch):
    flags = ["--max_iters", 4, "--fp8", "--optimizer", "adamw", "--bf16_moments"]
    ok(data_dir, tmp_path / "whole", *flags)
    interrupt(monkeypatch, 2)
    with pytest.raises(SystemExit):
        ok(data_dir, tmp_path / "cut", *flags)
    state, = checkpoint(tmp_path / "cut")["optimizers"]
    assert step_of(tmp_path / "cut") == 2 and state["state"][0]["exp_avg"].dtype == torch.bfloat16
    ok(data_dir, tmp_path / "cut", "--resume")
    assert_equal_runs(tmp_path / "whole", tmp_path / "cut")


def test_the_best_checkpoint_is_kept(data_dir, tmp_path, monkeypatch):
    """Losses are made up; a run is resumed after its best step, and after a kill between the two files."""
    losses = {1: 5.0, 2: 3.0, 3: 4.0, 4: math.nan, 5: 3.5, 6: 2.0, 7: 2.5}
    steps = iter(losses)
    monkeypatch.setattr(Validation, "evaluate", lambda *_: {"val_loss": losses[next(steps)], "val_bpb": 1.0})
    best = lambda: step_of(tmp_path / "best.pt")
    ok(data_dir, tmp_path, "--max_iters", 3, "--eval_interval", 1)
    assert best() == 2 and checkpoint(tmp_path)["state"]["step"] == 3
    ok(data_dir, tmp_path, "--max_iters", 5, "--eval_interval", 1, "--resume")
    assert best() == 2 and [("sample" in e) for e in log(tmp_path)] == [True, True, True, False, True]

    def killed(path):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr("checkpoint.keep_best", killed)
        ok(data_dir, tmp_path, "--max_iters", 7, "--eval_interval", 1, "--resume")
    assert best() == 2 and checkpoint(tmp_path)["state"]["step"] == 6
    ok(data_dir, tmp_path, "--max_iters", 7, "--eval_interval", 1, "--resume")
    assert best() == 6 and checkpoint(tmp_path)["state"]["step"] == 7 and not list(tmp_path.glob("*.tmp"))
    (tmp_path / "ckpt.pt").unlink()     # back to step 6, the best
    (tmp_path / "best.pt").unlink()
    steps = iter([7])
    ok(data_dir, tmp_path, "--max_iters", 7, "--eval_interval", 1, "--resume")
    assert best() == 6
    ok(None, None, "--ckpt", tmp_path / "best.pt", "--max_new_tokens", 1, script="sample.py")


def test_samples_leave_the_run_as_it_is(data_dir, tmp_path, monkeypatch):
    ok(data_dir, tmp_path / "a", "--max_iters", 4, "--eval_interval", 1)
    monkeypatch.setattr(train, "short_sample", lambda *_: "")
    ok(data_dir, tmp_path / "b", "--max_iters", 4, "--eval_interval", 1)
    assert_equal_runs(tmp_path / "a", tmp_path / "b")
    assert torch.equal(checkpoint(tmp_path / "a")["rng_state"], checkpoint(tmp_path / "b")["rng_state"])


@pytest.mark.parametrize("flags, words", [
    (["--preset", "huge"], "unknown preset 'huge'"),
    (["--hidden_sise", "3"], "--hidden_sise"),
    (["--vocab_size", "100"], "holds token 256, outside the vocabulary of 100; prepare"),
    (["--max_position_embeddings", "16"], "YaRN"),
    (["--n_routed_experts", "5"], "not divisible"),
    (["--num_experts_per_tok", "5"], "more than the 4 experts"),
    (["--qk_rope_head_dim", "7"], "even"),
    (["--max_iters", "0"], "--max_iters must be at least 1"),
    (["--learning_rate", "nan"], "--learning_rate"),
    (["--optimizer", "sgd"], "'sgd'"),
    (["--batch_ramp"], "a fifth of --batch_size 4"),
    (["--out_dir", "{data}"], "--data_dir and --out_dir are both"),
    (["--ema_decay", "1"], "--ema_decay must be from 0 to less than 1"),
    (["--ema_decay", "0.9", "--fsdp", "--optimizer", "adamw"], "plain AdamW only"),
    (["--dtype", "float16"], "'float16'"),
    (["--device", "cuda:77"], "--device cuda:77"),
    (["--device", "abacus"], "--device abacus"),
    (["--block_size", "100000", "--max_position_embeddings", "200000"], "too few"),
    (["--resume"], "no checkpoint"),
    (["--rope_scaling", "{"], "--rope_scaling"),
    (["--rope_scaling", "[]"], "--rope_scaling"),
    (["--seed", "-1"], "--seed must be from 0"),
    (["--seed", str(2**64)], "--seed must be from 0"),
])
def test_bad_flags_end_in_one_sentence(data_dir, tmp_path, flags, words, capsys):
    with pytest.raises(SystemExit) as e:
        train.main(["--data_dir", str(data_dir), "--out_dir", str(tmp_path / "out"), *SHAPE,
                    *(flag.format(data=data_dir) if "{data" in flag else flag for flag in flags)])
    said = capsys.readouterr().err if e.value.code == 2 else str(e.value.code)      # 2: argparse's own
    assert words in said and not (tmp_path / "out").exists()


def damage(data_dir, folder, name, content):
    folder.mkdir()
    for path in data_dir.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    if content is None:
        (folder / name).unlink()
    else:
        (folder / name).write_bytes(content)
    if name.endswith(".bin"):       # as data of other making, which don't record their sizes
        meta = json.loads((folder / "meta.json").read_text())
        (folder / "meta.json").write_text(json.dumps({k: v for k, v in meta.items()
                                                      if not k.endswith("_tokens")}))
    return folder


@pytest.mark.parametrize("name, content, words", [
    ("train.bin", None, "train.bin is missing"), ("train.bin", b"", "or empty"), ("val.bin", b"", "or empty"),
    ("meta.json", None, "meta.json is missing"), ("meta.json", b"{", "meta.json"),
    ("meta.json", b"[]", "meta.json"),
    ("meta.json", b'{"dtype": "float99", "vocab_size": 9, "separator": 3}', "meta.json"),
    ("encoding.json", b"{}", "encoding"), ("train.bin", b"\0" * 8, "too few"),
    ("val.bin", b"\xff" * 80, "65535"),
    ("train.bin", b"\0" * 333, "train.bin"),
])
def test_damaged_data_end_in_one_sentence(data_dir, tmp_path, name, content, words):
    folder = damage(data_dir, tmp_path / "d", name, content)
    with pytest.raises(SystemExit, match="^train.py: ") as e:
        train.main(["--data_dir", str(folder), "--out_dir", str(tmp_path / "out"), *SHAPE])
    assert words in str(e.value.code) and "\n" not in str(e.value.code) and not (tmp_path / "out").exists()


def test_a_run_is_never_overwritten(data_dir, tmp_path):
    flags = ["--data_dir", str(data_dir), "--out_dir", str(tmp_path), *SHAPE]
    (tmp_path / "ckpt.pt").write_bytes(b"precious")
    for extra, words in ([], "holds an earlier run"), (["--resume"], "is damaged or not a checkpoint"):
        with pytest.raises(SystemExit, match="^train.py: ") as e:
            train.main([*flags, *extra])
        assert words in str(e.value.code) and "\n" not in str(e.value.code)
    assert (tmp_path / "ckpt.pt").read_bytes() == b"precious"


def test_any_damage_to_a_checkpoint_ends_in_one_sentence(data_dir, tmp_path):
    ok(data_dir, tmp_path, "--max_iters", 1)
    whole = (tmp_path / "ckpt.pt").read_bytes()
    for damaged in b"", whole[:1], whole[:100], whole[:len(whole) // 2], whole[:-1], b"\0" * 1000, whole[1:]:
        (tmp_path / "ckpt.pt").write_bytes(damaged)
        with pytest.raises(ValueError, match="is damaged or not a checkpoint") as e:
            load_run(tmp_path / "ckpt.pt")
        assert "\n" not in str(e.value)


def test_a_pickle_is_not_executed(tmp_path):
    class Evil:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path}/executed",)

    torch.save({"model": Evil()}, tmp_path / "ckpt.pt")
    with pytest.raises(ValueError, match="is damaged or not a checkpoint"):
        load_run(tmp_path / "ckpt.pt")
    assert not (tmp_path / "executed").exists()


def poison(monkeypatch, bad, where="loss"):
    """The training loss, or one weight's gradient, is not finite in the forward passes of these numbers."""
    forward, calls = DeepSeekV3.forward, [0]

    def poisoned(self, *args, **kwargs):
        logits, loss, aux = forward(self, *args, **kwargs)
        calls[0] += self.training
        if self.training and calls[0] in bad:
            w = self.lm_head.weight[0, 0]       # the root's value is 0, its slope infinite
            loss = loss * math.nan if where == "loss" else loss + (w - w.detach()).sqrt()
        return logits, loss, aux

    monkeypatch.setattr(DeepSeekV3, "forward", poisoned)


@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_a_step_that_is_not_finite_changes_nothing(data_dir, tmp_path, monkeypatch, where):
    poison(monkeypatch, {6}, where)     # the second micro-batch of step 3
    done = ok(data_dir, tmp_path, "--max_iters", 3, "--eval_interval", 1, "--gradient_accumulation_steps", 2,
              "--optimizer",
              "muon", "--bias_update_speed", 0.01)
    before, after = torch.load(tmp_path / "ckpt.prev.pt", weights_only=True), checkpoint(tmp_path)
    assert [(run["state"]["step"], run["state"]["samples"]) for run in (before, after)] == [(2, 16), (3, 24)]
    assert all(torch.equal(before["model"][k], after["model"][k]) for k in after["model"])
    for a, b in zip(before["optimizers"], after["optimizers"], strict=True):
        assert all(torch.equal(torch.as_tensor(v), torch.as_tensor(b["state"][i][k])) for i in a["state"]
                   for k, v in a["state"][i].items())
    assert [e["skipped"] for e in log(tmp_path)] == [0, 0, 1] and "step 3/3 skipped" in done.stdout
    last = log(tmp_path)[-1]
    assert last["grad_norm"] is None and (last["loss"] is None) == (where == "loss")      # NaN is no JSON
    ok(data_dir, tmp_path, "--max_iters", 4, "--resume")
    assert log(tmp_path)[-1]["skipped"] == 1
    resumed = checkpoint(tmp_path)["model"]
    assert not torch.equal(resumed["lm_head.weight"], after["model"]["lm_head.weight"])


def test_a_run_that_stays_not_finite_stops_with_its_last_good_weights(data_dir, tmp_path, monkeypatch):
    flags = ["--data_dir", str(data_dir), "--out_dir", str(tmp_path / "out"), *SHAPE]
    poison(monkeypatch, {2, *range(4, 999)})
    with pytest.raises(SystemExit, match=r"10 times in a row, up to step 13 \(samples 48 to 51\)") as e:
        train.main([*flags, "--max_iters", "50"])
    assert "\n" not in str(e.value)
    saved = checkpoint(tmp_path / "out")
    assert saved["state"]["step"] == 13 and saved["state"]["skipped"] == 11
    assert all(v.isfinite().all() for v in saved["model"].values())


def test_dead_experts_are_counted(data_dir, tmp_path):
    """4 tokens of 2 experts each can't reach 16, and 3 in the MTP module can't either."""
    done = ok(data_dir, tmp_path, "--max_iters", 1, "--n_routed_experts", 16, "--batch_size", 1,
              "--block_size", 4)
    assert 2 * 16 - 8 - 6 <= log(tmp_path)[0]["dead_experts"] < 2 * 16 and " dead " in done.stdout
    done = ok(data_dir, tmp_path / "b", "--max_iters", 1)
    assert log(tmp_path / "b")[0]["dead_experts"] == 0 and " dead " not in done.stdout


def test_deterministic_runs_are_equal_bit_for_bit(data_dir, tmp_path, monkeypatch, two_threads):
    seen, step = [], torch.optim.AdamW.step

    def watched(*args):
        seen.append(torch.are_deterministic_algorithms_enabled())
        step(*args)

    monkeypatch.setattr(torch.optim.AdamW, "step", watched)
    for name in "ab":
        ok(data_dir, tmp_path / name, "--max_iters", 4, "--deterministic", "--optimizer", "muon")
    assert_equal_runs(tmp_path / "a", tmp_path / "b")
    assert seen == [True] * 8 and os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    ok(data_dir, tmp_path / "c", "--max_iters", 1)
    assert not torch.are_deterministic_algorithms_enabled()


# ---------------------------------------------------------------------- experiments

def test_on_log_gets_each_entry_and_the_load_and_may_add_to_it(data_dir, tmp_path):
    loads = []

    def on_log(entry, load):
        loads.append(load)
        entry |= {"note": "mine", "tokens": load.sum(1).tolist(), "path": tmp_path, "bad": math.nan,
                  "mean": load.float().mean()}

    train.main(command(data_dir, tmp_path, "--max_iters", 2, "--log_interval", 1)[2:], on_log=on_log)
    assert [entry["note"] for entry in log(tmp_path)] == ["mine", "mine"]
    # 4 sequences of 32 tokens with 2 experts each; the MTP module has no label at the last position
    assert log(tmp_path)[0]["tokens"] == loads[0].sum(1).tolist() == [256, 248] and loads[0].shape == (2, 4)
    assert log(tmp_path)[0]["mean"] == (256 + 248) / 8
    assert log(tmp_path)[0]["bad"] is None and log(tmp_path)[0]["path"] == str(tmp_path)
    with pytest.raises(RuntimeError, match="on_log failed") as e:       # with the traceback, as it's their code
        train.main(command(data_dir, tmp_path / "b", "--max_iters", 2)[2:], on_log=lambda *_: math.sqrt(-1))
    assert isinstance(e.value.__cause__, ValueError)


def test_a_run_with_a_replaced_class_needs_it_to_go_on(data_dir, tmp_path, monkeypatch):
    class Softmax(model.Gate):
        pass

    with monkeypatch.context() as patch:
        patch.setattr(model, "Gate", Softmax)
        ok(data_dir, tmp_path, "--max_iters", 1)
        assert checkpoint(tmp_path)["replaced"] == ["Softmax"]
        ok(data_dir, tmp_path, "--max_iters", 2, "--resume")
        sample.load(tmp_path, "cpu")
    with pytest.raises(SystemExit, match="Softmax"):
        ok(data_dir, tmp_path, "--max_iters", 3, "--resume")
    with pytest.raises(ValueError, match="Softmax"):
        sample.load(tmp_path, "cpu")


@pytest.mark.parametrize("name, replacement, said", [
    ("MLP.forward", functools.wraps(model.MLP.forward)(lambda self, x: x), "MLP.forward"),
    ("rope_cos_sin", functools.partial(model.rope_cos_sin), "rope_cos_sin"),
    ("RMSNorm", torch.nn.RMSNorm, "RMSNorm"),
    ("Gate.update_bias", torch.no_grad()(lambda *_: None), "Gate.update_bias")])
def test_replacements_in_disguise_are_recorded(make_model, monkeypatch, name, replacement, said):
    assert replaced_classes(make_model()) == []
    owner, _, last = name.rpartition(".")
    monkeypatch.setattr(getattr(model, owner) if owner else model, last, replacement)
    assert said in replaced_classes(make_model())


def test_a_new_run_sets_the_log_of_a_killed_one_aside(data_dir, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/log.jsonl").write_text('{"iter": 0, "val_loss": 1.0}\n')
    ok(data_dir, tmp_path / "out", "--max_iters", 1)
    assert [entry["iter"] for entry in log(tmp_path / "out")] == [1]
    assert "1.0" in (tmp_path / "out/log.prev.jsonl").read_text()


def test_a_run_is_fine_tuned_at_its_own_length_after_an_evaluation_at_step_0(data_dir, tmp_path):
    ok(data_dir, tmp_path / "a", "--max_iters", 4)
    assert checkpoint(tmp_path / "a")["config"]["max_position_embeddings"] == 32      # what it was trained on
    flags = ["--init_from", tmp_path / "a", "--data_dir", data_dir, "--device", "cpu", "--dtype", "float32",
             "--max_iters", 1]
    train.main([str(flag) for flag in [*flags, "--out_dir", tmp_path / "b"]])
    settings, entries = checkpoint(tmp_path / "b")["train_config"], log(tmp_path / "b")
    assert settings["block_size"] == 32 and settings["learning_rate"] == 1e-3       # a tiny model
    assert entries[0]["iter"] == 0 and entries[0]["val_loss"] == log(tmp_path / "a")[-1]["val_loss"]
    with pytest.raises(SystemExit, match="--hidden_size can't be given"):
        train.main([str(flag) for flag in [*flags, "--out_dir", tmp_path / "c", "--hidden_size", 8]])
    same_folder = f"{tmp_path}/./a/"
    ok(data_dir, tmp_path / "b", "--resume", "--max_iters", 2, "--batch_size", 4, "--init_from", same_folder)
    assert [entry["iter"] for entry in log(tmp_path / "b")] == [0, 1, 2]


def test_a_finished_run_says_how_to_go_on(data_dir, tmp_path):
    ok(data_dir, tmp_path, "--max_iters", 1)
    done = ok(data_dir, tmp_path, "--resume")
    assert "has done its 1 steps; to train on, give a larger --max_iters" in done.stdout
    assert "plot_log.py" in done.stdout


def test_learning_rates_of_fine_tuning_fall_with_size():
    rates = [train.finetuning_rate(DeepSeekV3Config.preset(name)) for name in ("tiny", "small", "16b")]
    assert rates[0] == 1e-3 and 1e-5 < rates[1] < 1e-4 and rates[2] == 1e-5


def test_a_block_too_large_for_the_machine_is_warned_of(data_dir, tmp_path, monkeypatch):
    assert "warning" not in ok(data_dir, tmp_path / "a", "--max_iters", 1).stdout
    monkeypatch.setattr(os, "sysconf", lambda name: 2 ** 10)
    assert "warning: a step with --batch_size 4" in ok(data_dir, tmp_path / "b", "--max_iters", 1).stdout
