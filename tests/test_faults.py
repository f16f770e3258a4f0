"""Nothing that befalls a run loses it: kills, full disks, damaged files, a second process, swapped data."""

import contextlib
import fcntl
import io
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import checkpoint
import sample
import train
from data.prepare import prepare
from test_train import SHAPE, assert_equal_runs, command, interrupt, log, ok, step_of

ROOT = Path(__file__).parent.parent


def refused(*argv, main=train.main):
    """The one sentence in which a program ends."""
    with pytest.raises(SystemExit) as e, contextlib.redirect_stdout(io.StringIO()):
        main([str(a) for a in argv])
    said = str(e.value.code)
    assert "\n" not in said and said.startswith((f"{main.__module__}.py: ")), said
    return said


@pytest.fixture(scope="module")
def run_dir(data_dir, tmp_path_factory):
    """A run of 4 steps with checkpoints at 2 and 4."""
    out = tmp_path_factory.mktemp("run") / "out"
    ok(data_dir, out, "--max_iters", 4, "--eval_interval", 2)
    return out


@pytest.fixture
def copy(run_dir, tmp_path):
    """A copy of it that a test may damage."""
    (tmp_path / "out").mkdir()
    for path in run_dir.iterdir():
        (tmp_path / "out" / path.name).write_bytes(path.read_bytes())
    return tmp_path / "out"


def flip(path, at=None, bit=0):
    content = bytearray(path.read_bytes())
    content[len(content) // 2 if at is None else at] ^= 1 << bit
    path.write_bytes(content)


def test_a_damaged_tokenizer_or_end_of_texts_is_refused(copy, data_dir, tmp_path):
    damaged = tmp_path / "data"
    shutil.copytree(data_dir, damaged)
    encoding = json.loads((damaged / "encoding.json").read_text())
    ranks = encoding["ranks"]
    ranks["ZQ=="], ranks["Zg=="] = ranks["Zg=="], ranks["ZQ=="]
    (damaged / "encoding.json").write_text(json.dumps(encoding))
    flags = "--data_dir", damaged, "--max_iters", 5
    assert "are not those that" in refused("--resume", "--out_dir", copy, *flags)
    said = refused("--init_from", copy, "--out_dir", tmp_path / "new", *flags)
    assert "prepare.py --tokenizer bytes" in said

    meta = json.loads((damaged / "meta.json").read_text())
    for eos in [meta["vocab_size"]], None, 5:
        (damaged / "meta.json").write_text(json.dumps({**meta, "eos": eos}))
        assert "meta.json is damaged" in refused("--out_dir", tmp_path / "new", *flags)


def test_a_folder_with_nothing_but_best_pt_says_how_to_continue_from_it(copy):
    (copy / "ckpt.pt").rename(copy / "best.pt")
    (copy / "ckpt.prev.pt").unlink(missing_ok=True)
    assert f"copy {copy / 'best.pt'} to it" in refused("--resume", "--out_dir", copy)


# ---------------------------------------------------------------------- damaged checkpoints

def test_torch_load_alone_would_take_a_flipped_bit(copy):
    flip(copy / "ckpt.pt")
    torch.load(copy / "ckpt.pt", weights_only=True)
    with pytest.raises(ValueError, match="is damaged"):
        checkpoint.load_run(copy / "ckpt.pt")


def test_a_flipped_bit_anywhere_is_refused_or_harmless(copy):
    path, rng, refusals = copy / "ckpt.pt", random.Random(0), 0
    good, run = path.read_bytes(), checkpoint.load_run(path)
    # half of them in the zip file's directory, at the end, which no checksum covers
    for i in range(300):
        flip(path, rng.randrange(len(good)) if i % 2 else len(good) - 1 - rng.randrange(6000),
             rng.randrange(8))
        try:
            found = checkpoint.load_run(path)
            assert found["state"] == run["state"] and found["config"] == run["config"]
            assert all(torch.equal(found["model"][name], t) for name, t in run["model"].items())
        except ValueError as e:
            assert "damaged or not a checkpoint" in str(e) and "\n" not in str(e)
            refusals += 1
        path.write_bytes(good)
    assert refusals > 200


def test_a_checkpoint_of_another_format_is_refused(copy):
    run = checkpoint.load_run(copy / "ckpt.pt")
    for format in 1, None:
        torch.save({**run, "format": format}, copy / "ckpt.pt")
        assert "doesn't fit this version of" in refused("--resume", "--out_dir", copy)
    assert "doesn't fit this version of" in refused("--ckpt", copy, main=sample.main)


@pytest.mark.parametrize("key, value", [
    ("config", None), ("config", {"hidden_size": "x"}), ("config", {"no_such_field": 1}), ("model", {}),
    ("config", {"num_hidden_layers": 10**30}), ("config", {"rope_theta": 10**400}),
    ("config", "a vast model"), ("model", "other shapes"), ("replaced", 5)])
def test_a_checkpoint_of_absurd_contents_is_refused(copy, key, value):
    run = checkpoint.load_run(copy / "ckpt.pt")
    if value == "other shapes":
        value = {name: t.flatten() for name, t in run["model"].items()}
    if value == "a vast model":     # refused before there is memory for it
        value = {**run["config"], "hidden_size": 10**9}
    torch.save({**run, key: value}, copy / "ckpt.pt")
    for flags in ["--resume", "--out_dir", copy], ["--init_from", copy, "--out_dir", copy / "new"]:
        assert "this version of" in refused(*flags)
    assert "this version of" in refused("--ckpt", copy, main=sample.main)


def test_resuming_without_optimizers_of_this_model_is_refused(copy):
    run = checkpoint.load_run(copy / "ckpt.pt")
    for key, value in (("optimizers", [{"state": 1}] * 2), ("rng_state", torch.zeros(3)),
                       ("state", {"step": 2}),
                       ("state", {**run["state"], "step": [2]})):
        torch.save({**run, key: value}, copy / "ckpt.pt")
        assert "this version of" in refused("--resume", "--out_dir", copy)


def test_an_export_says_where_the_texts_of_a_run_begin_and_end(copy, tmp_path):
    run = checkpoint.load_run(copy / "ckpt.pt")
    meta = run["meta"] | {"bos": 65, "eos": [256, 66], "add_bos": True}
    torch.save(run | {"meta": meta}, copy / "ckpt.pt")
    loaded = sample.load(copy, "cpu")
    loaded.model.save_pretrained(tmp_path / "export", loaded.encoding)
    assert sample.load(tmp_path / "export", "cpu").ends == loaded.ends == (65, (256, 66), True)


@pytest.mark.parametrize("script", ["train.py", "sample.py", "data/prepare.py"])
def test_ctrl_c_during_the_imports_shows_no_traceback(script, tmp_path):
    flags = ["--ckpt", "x"] if script == "sample.py" else ["--out_dir", tmp_path / "out"]
    for seconds in 0.1, 0.3:
        process = subprocess.Popen([sys.executable, ROOT / script, *flags], stderr=subprocess.PIPE)
        time.sleep(seconds)
        process.send_signal(signal.SIGINT)
        assert b"Traceback" not in process.communicate(timeout=300)[1]


@pytest.mark.parametrize("damage", [flip, lambda p: p.write_bytes(p.read_bytes()[:-1]),
                                    lambda p: p.write_bytes(b""),
                                    lambda p: p.unlink()], ids=["flip", "cut", "empty", "missing"])
def test_a_damaged_checkpoint_falls_back_to_the_one_before(data_dir, run_dir, copy, damage, capsys):
    damage(copy / "ckpt.pt")
    sample.load(copy, "cpu")
    assert "using" in capsys.readouterr().err
    assert (copy / "ckpt.pt").exists() == (damage.__code__.co_names[-1] != "unlink")
    done = ok(data_dir, copy, "--resume")
    assert "ckpt.prev.pt, of step 2" in done.stderr and "at step 2" in done.stdout
    assert_equal_runs(run_dir, copy)
    assert [e["iter"] for e in log(copy)] == [e["iter"] for e in log(run_dir)]
    assert checkpoint.load_run(copy / "ckpt.pt")["state"]["step"] == 4 and not (copy / "ckpt.pt.tmp").exists()
    # the damaged one did not displace it, and is kept
    assert checkpoint.load_run(copy / "ckpt.prev.pt")["state"]["step"] == 2
    assert (copy / "ckpt.damaged.pt").exists() == (damage.__code__.co_names[-1] != "unlink")


def test_falling_back_leaves_a_better_best_pt(data_dir, copy):
    best = checkpoint.load_run(copy / "best.pt")
    assert best["state"]["step"] == 4
    (copy / "ckpt.pt").unlink()
    ok(data_dir, copy, "--resume", "--max_iters", 2)        # nothing left to do
    assert step_of(copy) == 2
    ok(data_dir, copy, "--resume", "--max_iters", 3, "--learning_rate", 1e-9)       # a worse one
    assert step_of(copy) == 3 and step_of(copy / "best.pt") == 4


def test_both_damaged_is_one_sentence(copy):
    flip(copy / "ckpt.pt"), flip(copy / "ckpt.prev.pt")
    before = {p.name: p.read_bytes() for p in copy.iterdir()}
    for said in refused("--resume", "--out_dir", copy), refused("--ckpt", copy, main=sample.main):
        assert "ckpt.pt is damaged" in said and "ckpt.prev.pt is damaged" in said
    assert before == {p.name: p.read_bytes() for p in copy.iterdir()}


def test_an_earlier_run_is_not_overwritten_even_if_only_its_first_checkpoint_is_left(data_dir, copy):
    (copy / "ckpt.pt").unlink()
    assert "ckpt.prev.pt holds an earlier run" in refused("--data_dir", data_dir, "--out_dir", copy, *SHAPE)


def test_a_checkpoint_that_reads_back_wrong_replaces_nothing(copy, monkeypatch):
    before = {p.name: p.read_bytes() for p in copy.iterdir()}
    save = torch.save

    def flipping(run, f):
        save(run, f)
        f.seek(100_000)
        f.write(b"bad")

    monkeypatch.setattr(torch, "save", flipping)
    assert "can't be written (" in refused("--resume", "--out_dir", copy, "--max_iters", 6)
    after = {p.name: p.read_bytes() for p in copy.iterdir()}
    assert all(before[n] == after[n] for n in ("ckpt.pt", "ckpt.prev.pt")) and before.keys() == after.keys()


# ---------------------------------------------------------------------- disks

@pytest.mark.parametrize("name, limit", [("ckpt.pt", 30_000), ("ckpt.pt", 10), ("log.jsonl", 10)])
def test_a_full_disk_ends_in_one_sentence_and_keeps_the_checkpoint(data_dir, copy, name, limit, monkeypatch):
    """A limit on the size of files makes the kernel refuse a write in the middle, as a full disk does."""
    before = {p.name: p.read_bytes() for p in copy.iterdir()}
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    original = train.save_run if name == "ckpt.pt" else train.writing

    def on_a_full_disk(path, *args):
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limits[1]))
        return original(path, *args)

    monkeypatch.setattr(train, "save_run" if name == "ckpt.pt" else "writing", on_a_full_disk)
    try:
        said = refused("--resume", "--out_dir", copy, "--max_iters", 6)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert f"{name} can't be written (File too large)" in said
    after = {p.name: p.read_bytes() for p in copy.iterdir()}
    assert all(before[n] == after[n] for n in ("ckpt.pt", "ckpt.prev.pt")) and before.keys() == after.keys()
    monkeypatch.undo()
    ok(data_dir, copy, "--resume")


def test_a_folder_that_cannot_be_written_is_refused_before_training(data_dir, tmp_path):
    (tmp_path / "file").write_text("")
    for out in ("/proc/self", "/proc/nowhere", tmp_path / "file", tmp_path / "file" / "below"):
        refused("--data_dir", data_dir, "--out_dir", out, *SHAPE)
    if os.geteuid():       # root may write anywhere
        (tmp_path / "closed").mkdir(mode=0o555)
        assert "Permission" in refused("--data_dir", data_dir, "--out_dir", tmp_path / "closed", *SHAPE)


# ---------------------------------------------------------------------- data

@pytest.mark.parametrize("name", ["train.bin", "val.bin"])
@pytest.mark.parametrize("damage", [lambda p: p.write_bytes(p.read_bytes()[:-1]),
                                    lambda p: p.write_bytes(p.read_bytes()[:-2]),
                                    lambda p: open(p, "ab").write(b"ab")])
def test_damaged_data_are_noticed(data_dir, tmp_path, name, damage):
    for path in data_dir.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    damage(tmp_path / name)
    said = refused("--data_dir", tmp_path, "--out_dir", tmp_path / "out", *SHAPE)
    assert f"{name} has " in said and "prepare the data again" in said and not (tmp_path / "out").exists()


def test_other_data_are_refused_on_resume(tmp_path):
    """Of the same size and vocabulary, one letter apart."""
    for name in "ab":
        (tmp_path / f"{name}.txt").write_text((name + "bcdefghij\n") * 200)
        prepare(tmp_path / name, input=tmp_path / f"{name}.txt")
        meta = json.loads((tmp_path / name / "meta.json").read_text())
        (tmp_path / name / "meta.json").write_text(json.dumps(meta | {"source": "text"}))
    ok(tmp_path / "a", tmp_path / "out", "--max_iters", 1)
    said = refused("--resume", "--out_dir", tmp_path / "out", "--max_iters", 2, "--data_dir", tmp_path / "b")
    assert "are not those" in said
    ok(tmp_path / "a", tmp_path / "out", "--max_iters", 2, "--resume")


# ---------------------------------------------------------------------- two processes

def test_a_second_process_is_refused_and_a_dead_one_s_lock_is_not_in_the_way(data_dir, copy, tmp_path):
    holder = subprocess.Popen([sys.executable, "-c",
                               f"import fcntl, time; f = open({str(copy / 'lock')!r}, 'w'); "
                               "fcntl.flock(f, fcntl.LOCK_EX); print(flush=True); time.sleep(60)"],
                               stdout=subprocess.PIPE)
    holder.stdout.readline()
    before = {p.name: p.read_bytes() for p in copy.iterdir()}
    for more in (["--resume"], ["--data_dir", data_dir, *SHAPE]):
        assert "another process is training in" in refused("--out_dir", copy, *more)
    assert before == {p.name: p.read_bytes() for p in copy.iterdir()}
    holder.kill(), holder.wait()
    ok(data_dir, copy, "--resume", "--max_iters", 5)
    with open(copy / "lock") as f:      # released at the end, within a process too
        fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)


def test_only_monotonic_clocks():
    for name in ("train.py", "sample.py", "checkpoint.py"):
        assert "time.time(" not in (ROOT / name).read_text() and "datetime" not in (ROOT / name).read_text()


# ---------------------------------------------------------------------- terminals and pipes

def test_no_character_costs_a_run(data_dir, tmp_path, monkeypatch):
    """The sample of an untrained model is full of characters that ASCII lacks."""
    terminal = io.TextIOWrapper(io.BytesIO(), "ascii")
    monkeypatch.setattr(sys, "stdout", terminal)
    train.main(command(data_dir, tmp_path, "--max_iters", 1)[2:])
    terminal.flush()
    said = terminal.buffer.getvalue()
    assert b"done." in said and b"sample" in said
    assert checkpoint.load_run(tmp_path)["state"]["step"] == 1


def test_a_closed_pipe_stops_a_run_saved(data_dir, tmp_path):
    process = subprocess.Popen(command(data_dir, tmp_path, "--max_iters", 100_000, "--log_interval", 1),
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.readline()
    process.stdout.close()
    assert process.wait(timeout=300) == 130 and process.stderr.read() == b""
    assert 0 < checkpoint.load_run(tmp_path)["state"]["step"] < 100_000


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_saves(data_dir, tmp_path, monkeypatch, number):
    interrupt(monkeypatch, 3, number)
    with pytest.raises(SystemExit):
        ok(data_dir, tmp_path, "--max_iters", 30)
    assert checkpoint.load_run(tmp_path)["state"]["step"] == 3


def test_nohup_is_respected(data_dir, tmp_path, monkeypatch):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        interrupt(monkeypatch, 3, signal.SIGHUP)
        ok(data_dir, tmp_path, "--max_iters", 4)
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)
    assert checkpoint.load_run(tmp_path)["state"]["step"] == 4


def test_ctrl_c_while_torch_is_imported_shows_no_traceback(tmp_path):
    interrupted = "import os, signal, time\nos.kill(os.getpid(), signal.SIGINT)\ntime.sleep(5)\n"
    (tmp_path / "torch.py").write_text(interrupted)
    done = subprocess.run([sys.executable, str(ROOT / "train.py")],
                          env=os.environ | {"PYTHONPATH": str(tmp_path)},
                          capture_output=True, timeout=60)
    assert done.returncode == -signal.SIGINT and not done.stderr


# ---------------------------------------------------------------------- kills

KILL_AT = """
original, calls = {function}, []
def counted(*args, **kwargs):
    calls.append(args)
    if len(calls) == {call}:
        os.kill(os.getpid(), signal.SIGKILL)
    return original(*args, **kwargs)
{function} = counted
"""


def test_killed_at_any_moment_a_run_ends_in_the_same_weights_bit_for_bit(data_dir, tmp_path, fork):
    flags = ("--max_iters 40 --eval_interval 2 --optimizer muon --bias_update_speed 0.01 "
             "--block_size 16 --batch_size 8").split()
    end, began = fork(command(data_dir, tmp_path / "whole", *flags)[2:])[1], time.monotonic()
    end()
    longest = 0.05 + (time.monotonic() - began) / 8        # on any machine, the run is to outlast the kills
    killed, rng = tmp_path / "killed", random.Random(0)

    def start(patch=""):
        have = any((killed / name).exists() for name in train.CHECKPOINTS)
        return fork([*command(data_dir, killed, *flags)[2:], *["--resume"] * have], patch=patch)

    # moments that chance would seldom hit: before a write, before the rename of the log, of the old
    # checkpoint, of the new one (there is no ckpt.pt then), and of the next ones; after each one by chance
    renames = [("os.replace", call) for call in (2, 1, 3, 2, 3, 4, 5)]
    for function, call in [("torch.save", 2), ("os.fsync", 2), ("checkpoint.check_zip", 2), *renames]:
        start(KILL_AT.format(function=function, call=call))[1](-signal.SIGKILL)
        (process,), end = start()
        time.sleep(rng.uniform(0.05, longest))
        os.kill(process, signal.SIGKILL)
        end(-signal.SIGKILL)
    start()[1]()
    assert_equal_runs(tmp_path / "whole", killed)
    assert [e["loss"] for e in log(killed)] == [e["loss"] for e in log(tmp_path / "whole")]
    assert {p.name for p in killed.iterdir()} == {"ckpt.pt", "ckpt.prev.pt", "best.pt", "log.jsonl", "lock"}
