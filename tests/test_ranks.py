"""train.py on two processes with gloo: what they compute equals what one does with the batch of both."""

import os
import shutil
import signal

import pytest
import torch

import sample
import train
from checkpoint import load_run
from data.prepare import prepare
from data.tokenizer import get_tokenizer
from test_faults import refused
from test_train import SHAPE, assert_equal_runs, command, log, ok, pairs_dir  # noqa: F401


@pytest.fixture
def torchrun(fork, data_dir):
    def start(world, out_dir, *flags, patch=""):
        return fork(command(data_dir, out_dir, *flags)[2:], world, patch)
    return start


def same_curve(a, b, rel=1e-4):
    a, b = log(a), log(b)
    assert [e["iter"] for e in a] == [e["iter"] for e in b]
    for x, y in zip(a, b):
        if x["iter"] == 0:      # fine-tuning begins with an evaluation alone
            assert x["val_loss"] == pytest.approx(y["val_loss"], rel=rel)
            continue
        for key in ("loss", "main_loss", "mtp_loss", "balance_loss", "grad_norm", "max_vio", "dead_experts",
                    "lr"):
            assert x[key] == pytest.approx(y[key], rel=rel, abs=1e-6), (x["iter"], key)
        assert x.get("val_loss", 0) == pytest.approx(y.get("val_loss", 0), rel=rel)
    return a


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_two_ranks_train_as_one_with_twice_the_batch(data_dir, tmp_path, torchrun, optimizer):
    flags = ["--max_iters", 6, "--eval_interval", 3, "--log_interval", 1, "--optimizer", optimizer,
             "--learning_rate", 1e-3, "--bias_update_speed", 0.01, "--gradient_accumulation_steps", 2]
    _, end = torchrun(2, tmp_path / "two", *flags)
    ok(data_dir, tmp_path / "one", *flags, "--batch_size", 8)
    out, _ = end()
    same_curve(tmp_path / "one", tmp_path / "two")
    assert out.count("done.") == 1 and "steps of 512 tokens on 2 x cpu" in out


def test_two_ranks_count_the_labels_of_pairs_as_one(pairs_dir, tmp_path, fork):
    flags = ["--max_iters", 3, "--log_interval", 1, "--balance_loss_alpha", 0]
    end = fork(command(pairs_dir, tmp_path / "two", *flags, "--batch_size", 1,
                       "--gradient_accumulation_steps", 2)[2:], 2, "")[1]
    ok(pairs_dir, tmp_path / "one", *flags, "--batch_size", 4)
    end()
    for a, b in zip(log(tmp_path / "one"), log(tmp_path / "two"), strict=True):
        for key in "loss", "main_loss", "mtp_loss", "grad_norm":
            assert a[key] == pytest.approx(b[key], rel=1e-3), key


def test_two_ranks_ramp_the_batch_and_average_the_weights_as_one(data_dir, tmp_path, torchrun):
    flags = ["--max_iters", 6, "--eval_interval", 3, "--log_interval", 1, "--learning_rate", 1e-3,
             "--batch_ramp", "--ema_decay", 0.5]
    torchrun(2, tmp_path / "two", *flags, "--batch_size", 5)[1]()
    ok(data_dir, tmp_path / "one", *flags, "--batch_size", 10)
    same_curve(tmp_path / "one", tmp_path / "two")
    one, two = (load_run(tmp_path / name / "ckpt.pt") for name in ("one", "two"))
    assert one["state"]["samples"] == two["state"]["samples"] == 2 + 5 * 10       # a fifth in the first step
    last, same = log(tmp_path / "one")[-1], log(tmp_path / "two")[-1]
    assert last["val_loss_ema"] == pytest.approx(same["val_loss_ema"], rel=1e-4)
    for name, w in one["ema"].items():
        assert (two["ema"][name] - w).abs().mean() < 2e-5


def parameters(out_dir):
    return load_run(out_dir / "ckpt.pt")["model"]


def test_the_router_s_bias_needs_the_load_of_all_ranks(data_dir, tmp_path, torchrun):
    """If each rank looked at its own tokens only, the bias would not be that of one process."""
    flags = ["--max_iters", 3, "--bias_update_speed", 0.01, "--learning_rate", 1e-3]
    ok(data_dir, tmp_path / "one", *flags, "--batch_size", 8)
    torchrun(2, tmp_path / "two", *flags)[1]()
    forget = """
reduce = train.dist.all_reduce
is_load = lambda t: t.dtype == torch.int64 and t.dim() == 2
train.dist.all_reduce = lambda t, *a, **k: None if is_load(t) else reduce(t, *a, **k)"""
    torchrun(2, tmp_path / "forgotten", *flags, patch=forget)[1]()
    one, two, forgotten = (parameters(tmp_path / name) for name in ("one", "two", "forgotten"))
    biases = [name for name in one if "e_score_correction_bias" in name]
    assert len(biases) == 2 and all(torch.allclose(one[n], two[n]) for n in biases)
    assert not all(torch.allclose(one[n], forgotten[n]) for n in biases)


def test_no_sample_is_seen_twice(data_dir, tmp_path, torchrun):
    spy = f"""
from data.loader import Tokens
batch = Tokens.batch
def spied(self, n, count):
    print(*range(n, n + count), file=open({str(tmp_path / "seen")!r} + os.environ["RANK"], "a"))
    return batch(self, n, count)
Tokens.batch = spied"""
    torchrun(2, tmp_path / "out", "--max_iters", 3, "--gradient_accumulation_steps", 2, patch=spy)[1]()
    seen = [list(map(int, (tmp_path / f"seen{rank}").read_text().split())) for rank in range(2)]
    assert len(seen[0]) == len(seen[1]) == 24 and sorted(seen[0] + seen[1]) == list(range(48))


def test_a_step_that_is_not_finite_on_one_rank_is_skipped_by_all(tmp_path, torchrun):
    """The second rank's loss is NaN in step 2; afterwards both still have the same weights."""
    poison = """
forward, calls = train.DeepSeekV3.forward, [0]
def poisoned(self, *args, **kwargs):
    logits, loss, aux = forward(self, *args, **kwargs)
    calls[0] += self.training
    return logits, loss * float("nan") if self.training and rank == 1 and calls[0] == 2 else loss, aux
train.DeepSeekV3.forward = poisoned
step, steps = torch.optim.AdamW.step, []
def counted(*args):
    steps.append(1)
    print(len(steps), file=open(%r + str(rank), "w"))
    step(*args)
torch.optim.AdamW.step = counted
""" % str(tmp_path / "steps")
    out, _ = torchrun(2, tmp_path / "out", "--max_iters", 3, patch=poison)[1]()
    assert "step 2/3 skipped" in out and log(tmp_path / "out")[-1]["skipped"] == 1
    assert [(tmp_path / f"steps{rank}").read_text() for rank in range(2)] == ["2\n", "2\n"]


def test_a_signal_to_one_rank_stops_all_at_the_same_step_and_resumes(tmp_path, torchrun):
    flags = ["--max_iters", 30, "--eval_interval", 100, "--log_interval", 1]
    pids, end = torchrun(2, tmp_path / "cut", *flags)
    while not (tmp_path / "cut" / "log.jsonl").exists() or len(log(tmp_path / "cut")) < 2:
        os.kill(pids[1], 0)
    os.kill(pids[1], signal.SIGTERM)
    out, _ = end(130)
    stopped = int(out.split("interrupted at step ")[1].split(";")[0])
    assert 2 <= stopped < 30 and len(log(tmp_path / "cut")) == stopped
    torchrun(2, tmp_path / "cut", *flags, "--resume")[1]()
    torchrun(2, tmp_path / "whole", *flags)[1]()
    assert same_curve(tmp_path / "cut", tmp_path / "whole", rel=0)
    assert_equal_runs(tmp_path / "cut", tmp_path / "whole")


def test_resuming_keeps_the_global_batch(data_dir, tmp_path, torchrun):
    """2 ranks with 4 sequences each go on as 1 with 8; as 1 with 4 they are refused."""
    torchrun(2, tmp_path / "two", "--max_iters", 2)[1]()
    said = refused("--resume", "--out_dir", tmp_path / "two", "--max_iters", 4)
    assert "--batch_size 4 contradicts" in said and "makes 4 sequences per step; make it 8" in said
    ok(data_dir, tmp_path / "two", "--resume", "--max_iters", 4, "--batch_size", 8)
    ok(data_dir, tmp_path / "one", "--max_iters", 2, "--batch_size", 8)
    ok(data_dir, tmp_path / "one", "--resume", "--max_iters", 4, "--batch_size", 8)
    same_curve(tmp_path / "one", tmp_path / "two")


def test_what_is_wrong_is_said_in_one_sentence(data_dir, tmp_path, torchrun):
    lost = "train.py: rank 1 lost its connection to another rank; see that rank's error\n"
    _, err = torchrun(2, tmp_path / "out", "--max_iters", 0)[1](1)
    assert err == ["train.py: --max_iters must be at least 1 and below 2^31, got 0\n", lost]
    assert not (tmp_path / "out").exists()
    full = ("import checkpoint\n"
            "checkpoint.write_atomically = lambda *a: (_ for _ in ()).throw(OSError('the disk is full'))")
    _, err = torchrun(2, tmp_path / "out", "--max_iters", 3, "--eval_interval", 1, patch=full)[1](1)
    assert err == ["train.py: the disk is full\n", lost]
    full = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (20000, 20000))"
    _, err = torchrun(2, tmp_path / "fsdp", "--max_iters", 3, "--eval_interval", 1, "--fsdp",
                      "--optimizer", "adamw", patch=full)[1](1)
    assert "ckpt.pt can't be written (" in err[0] and err[0].count("\n") == 1 and err[1] == lost, err
    assert {p.name for p in (tmp_path / "fsdp").iterdir()} == {"log.jsonl", "lock"}


# ---------------------------------------------------------------------- sharded

@pytest.mark.parametrize("changes", [{}, dict(tie_word_embeddings=True, num_nextn_predict_layers=0)],
                         ids=["mtp", "tied"])
def test_sharded_ranks_train_as_one_process_does(tmp_path, fork, make_model, changes):
    """From the same released weights. Then each goes on as the other: in one process, and on two ranks."""
    pytest.importorskip("safetensors")
    model = make_model(vocab_size=320, initializer_range=0.05, **changes)
    model.save_pretrained(tmp_path / "hf", get_tokenizer("bytes"))
    (tmp_path / "text").write_text("".join(f"line {i}: {i * i % 17}\n" for i in range(400)))
    prepare(tmp_path / "data", input=tmp_path / "text", tokenizer=tmp_path / "hf")
    flags = ["--init_from", tmp_path / "hf", "--block_size", 32, "--log_interval", 1, "--eval_interval", 2,
             "--max_iters", 4, "--learning_rate", 1e-3, "--bias_update_speed", 0.01,
             "--data_dir", tmp_path / "data", "--device", "cpu", "--dtype", "float32"]

    def alone(out, *more):
        train.main([str(flag) for flag in ("--out_dir", tmp_path / out, "--batch_size", 8, *more)])

    def sharded(out, *more):
        fork(["--out_dir", tmp_path / out, "--batch_size", 4, "--fsdp", *more], world=2)[1]()

    alone("one", *flags)
    sharded("two", *flags)
    same_curve(tmp_path / "one", tmp_path / "two")
    names = {"ckpt.pt", "ckpt.prev.pt", "best.pt", "log.jsonl", "lock"}
    assert {p.name for p in (tmp_path / "two").iterdir()} == names
    one, two = load_run(tmp_path / "one"), load_run(tmp_path / "two")
    assert one.keys() == two.keys() and one["model"].keys() == two["model"].keys()
    for run, resume in ("one", sharded), ("two", alone):
        shutil.copytree(tmp_path / run, tmp_path / f"{run}-resumed")
        (tmp_path / f"{run}-resumed" / "ckpt.pt").unlink()      # back to step 2
        resume(f"{run}-resumed", "--resume")
        assert load_run(tmp_path / f"{run}-resumed")["state"]["step"] == 4
        same_curve(tmp_path / run, tmp_path / f"{run}-resumed")
    sample.main(["--ckpt", str(tmp_path / "two"), "--prompt", "line", "--max_new_tokens", "3"])


def test_sharded_weights_are_those_of_one_process(data_dir, tmp_path, torchrun):
    flags = ["--max_iters", 1, "--optimizer", "adamw", "--learning_rate", 1e-30]
    torchrun(2, tmp_path / "two", "--batch_size", 2, "--fsdp", *flags)[1]()
    ok(data_dir, tmp_path / "one", "--batch_size", 4, *flags)
    one, two = parameters(tmp_path / "one"), parameters(tmp_path / "two")
    assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)
    first, same = log(tmp_path / "one")[0], log(tmp_path / "two")[0]
    assert first["main_loss"] == pytest.approx(same["main_loss"], rel=1e-5)


@pytest.mark.parametrize("flags, words", [(["--optimizer", "muon"], "plain AdamW only"),
                                          (["--optimizer", "adamw"], "start --fsdp with: torchrun")])
def test_what_cannot_be_sharded_is_refused(data_dir, tmp_path, flags, words):
    assert words in refused("--data_dir", data_dir, "--out_dir", tmp_path / "out", *SHAPE, "--fsdp", *flags)
