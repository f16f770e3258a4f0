"""Files and prompts from anywhere are read or refused in one sentence; none runs code or eats memory."""

import base64
import copy
import json
import os
import pickle
import random
import resource
import signal
import struct
from pathlib import Path

import pytest
import torch

import checkpoint
import sample
from data.tokenizer import BYTES, Ends, build, encode, encoding_from_json, encoding_to_json, get_tokenizer
from checkpoint import read_config
from model import DeepSeekV3
from test_checkpoint import CL100K, config_json, released, toy_ranks, write
from test_data import bpe_json, sequence, split_json

ABSURD = [None, True, False, 0, 1, -1, 2, 3, 7, 2**15, 2**30, 2**31 - 1, 2**31, 2**62, 10**30, -2**31, 0.5,
          1.5, -0.0, 1e-320, 1e308,
          float("nan"), float("inf"), "", "8", "yarn", "deepseek_v3", [], [8], {}, {"type": "yarn"},
          {"a": {"b": [{}]}},
          {"type": "yarn", "factor": 1e308}, {"type": "yarn", "factor": "4"},
          {"rope_type": "yarn", "factor": 4, "beta_fast": 0},
          {"rope_type": "yarn", "rope_theta": None}, "a\nb" * 400]


@pytest.fixture(autouse=True)
def limits():
    """Each test may use a GB more memory than the process has now, and a minute."""
    with open("/proc/self/statm") as f:
        used = int(f.read().split()[0]) * resource.getpagesize()
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (used + 2**30, before[1]))

    def late(*_):
        raise KeyboardInterrupt("a minute is over")

    handler = signal.signal(signal.SIGALRM, late)
    signal.alarm(60)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, handler)
    resource.setrlimit(resource.RLIMIT_AS, before)


def one_sentence(read, case):
    """Whether read() accepts. If it does not, its error must be one line."""
    try:
        read()
        return True
    except (ValueError, OSError) as e:
        assert "\n" not in str(e) and 0 < len(str(e)) < 2000, (case, str(e)[:3000])
    except BaseException as e:
        raise AssertionError(f"{type(e).__name__}: {str(e)[:300]} on {str(case)[:600]}") from e
    return False


def mutate(tree, rng, values=ABSURD):
    """A copy of a JSON value with one or two of its members replaced, deleted, renamed or doubled."""
    tree = json.loads(json.dumps(tree))
    for _ in range(rng.choice((1, 1, 2))):
        node = tree
        while True:
            if not isinstance(node, (dict, list)) or not node:
                break
            key = rng.choice(list(node) if isinstance(node, dict) else range(len(node)))
            if isinstance(node[key], (dict, list)) and node[key] and rng.random() < 0.8:
                node = node[key]
                continue
            action = rng.random()
            if action < 0.7:
                node[key] = copy.deepcopy(rng.choice(values))
            elif action < 0.85:
                del node[key]
            elif isinstance(node, list):
                node.append(copy.deepcopy(node[key]))
            else:
                node[str(key) + "x"] = node.pop(key)
            break
    return tree


def test_absurd_configs(tmp_path, make_model):
    """500 config.json, read or refused."""
    rng, path, accepted = random.Random(0), tmp_path / "config.json", 0
    raw = config_json(make_model().config, rope_scaling={"type": "yarn", "factor": 4, "mscale": 1.0})
    for i in range(500):
        case = mutate(raw, rng)
        path.write_text(json.dumps(case))
        accepted += one_sentence(lambda: read_config(tmp_path), case)
    assert 50 < accepted < 450


def test_absurd_configs_with_weights(tmp_path, make_model):
    """150 folders whose config.json describes a model of any size instead of the one that is stored."""
    rng, accepted, model = random.Random(1), 0, make_model(num_hidden_layers=2)
    raw = config_json(model.config)
    write(tmp_path, released(model), raw)
    sizes = [n for n in ABSURD if type(n) is int and n > 0]
    for i in range(150):
        case = mutate(raw, rng, sizes if i % 2 else ABSURD)
        (tmp_path / "config.json").write_text(json.dumps(case))
        accepted += one_sentence(lambda: DeepSeekV3.from_pretrained(tmp_path), case)
    assert 10 < accepted < 140
    for name in ("hidden_size", "num_nextn_predict_layers", "num_hidden_layers", "vocab_size",
                 "n_shared_experts", "moe_intermediate_size"):
        value = 2**30 if name == "hidden_size" else 2**31 - 1
        (tmp_path / "config.json").write_text(json.dumps(raw | {name: value}))
        assert not one_sentence(lambda: DeepSeekV3.from_pretrained(tmp_path), (name, value))


def test_safetensors_headers_that_lie(tmp_path, make_model):
    """500 headers with other offsets, shapes, dtypes, names or lengths over the same bytes."""
    model = make_model(num_hidden_layers=1, first_k_dense_replace=1, num_nextn_predict_layers=0)
    write(tmp_path, released(model), config_json(model.config))
    file, rng, accepted = tmp_path / "model.safetensors", random.Random(2), 0
    good = file.read_bytes()
    length = struct.unpack("<Q", good[:8])[0]
    header, body = json.loads(good[8:8 + length]), good[8 + length:]
    lies = [-1, 0, 1, 4, 2**31, 2**63 - 1, 2**64 - 1, 2**64, 10**30, 1.5, None, "F32", "BF16", "F8_E4M3",
            "I64", "BOOL", "F32x", [], [48],
            [0, 2**63], [8, 4], [-4, 0], [2**32, 2**32], {}, len(body), len(body) - 4]
    for i in range(500):
        lie = mutate(header, rng, lies)
        if i % 10 == 0:     # two tensors in one place
            a, b = rng.sample(sorted(set(lie) - {"__metadata__"}), 2)
            lie[a] = lie[b]
        text = json.dumps(lie).encode()
        claimed = rng.choice((0, 1, length, 2**20, 2**40, 2**63, 2**64 - 1)) if i % 10 == 1 else len(text)
        file.write_bytes(struct.pack("<Q", claimed) + text + body)
        accepted += one_sentence(lambda: DeepSeekV3.from_pretrained(tmp_path), lie)
    assert accepted < 50       # metadata, and values replaced by themselves


def test_hostile_tokenizer_files(tmp_path):
    """500 of each kind: ranks twice or missing, ids that clash, other types, patterns that are none."""
    rng, accepted = random.Random(3), {}
    values = [None, True, -1, 0, 1, 255, 256, 257, 2**24, 2**64, 1.5, "", "a", "YQ==", "YWI=", "(",
              "(?:a*)*b", r"\s*", r"\p{Foo}", "[^",
              "a{99999}", "\ud800", [], {}, ["a", "b"], ["ab", "c"], {"Regex": "(a|b"}, {"type": "Split"},
              float("nan")]
    trees = {"encoding": json.loads(encoding_to_json(build("toy", r"[\s\S]{1,8}", toy_ranks(280),
                                                           {"<|endoftext|>": 400}))),
             "bpe": bpe_json(), "split": bpe_json(pre_tokenizer=sequence(split_json(CL100K)))}
    for kind, tree in trees.items():
        accepted[kind] = 0
        for i in range(500):
            case = json.dumps(mutate(tree, rng, values))
            if kind == "encoding":
                accepted[kind] += one_sentence(lambda: encoding_from_json(case), case)
            else:
                (tmp_path / "tokenizer.json").write_text(case)
                accepted[kind] += one_sentence(lambda: get_tokenizer(tmp_path), case)
    lines, accepted["tiktoken"] = [base64.b64encode(t) + b" %d" % r for t, r in toy_ranks(300).items()], 0
    for i in range(500):
        case = list(lines)
        for _ in range(rng.randrange(1, 4)):
            j, k = rng.randrange(len(case)), rng.randrange(len(case))
            case[j] = rng.choice([case[k], b"", b" ",
                                  case[j].split()[0] + b" "
                                  + rng.choice([b"-1", b"9" * 30, b"1e3", b"300", b"\xff"]),
                                  case[j][:rng.randrange(9)], b"\0" * 9, b"YWI= 299",
                                  case[k].split()[0] + b" 7" if case[k].split() else b""])
        (tmp_path / "x.tiktoken").write_bytes(b"\n".join(case))
        accepted["tiktoken"] += one_sentence(lambda: get_tokenizer(tmp_path / "x.tiktoken"), case)
    assert all(n < 475 for n in accepted.values()), accepted


def test_prompts_of_any_bytes(tmp_path):
    """2,000 of them, as an argument and as a file, through two tokenizers."""
    rng, accepted = random.Random(4), 0
    encs = [get_tokenizer("bytes"), build("toy", CL100K, toy_ranks(), {"<|endoftext|>": 900})]
    words = [b"<|endoftext|>", b"<|", b"\xff", b"\xf0\x9f\x91", "👩\u200d🚀".encode(), b"\0", b" " * 50,
             b"\r\n", b"abc", b"\xed\xa0\x80", b""]
    for i in range(2000):
        raw = b"".join(rng.choice(words) if rng.random() < 0.5 else rng.randbytes(rng.randrange(4))
                       for _ in range(rng.randrange(12)))
        enc = encs[i % 2]
        if i % 3:
            text = os.fsdecode(raw)     # as sys.argv has it: bytes that are not UTF-8 become lone surrogates
            text = text if not text.startswith("FILE:") else "x"
        else:
            (tmp_path / "prompt").write_bytes(raw)
            text = f"FILE:{tmp_path / 'prompt'}"
        ends = Ends(0, (0,), i % 5 == 0)
        accepted += one_sentence(
            lambda: sample.prompt_tokens(sample.read_text("--prompt", text), enc, ends), raw)
    assert 200 < accepted < 1900
    one_sentence(lambda: sample.prompt_tokens(" " * 1_000_000 + "a", encs[1], Ends(0, (0,), False)),
                 "a million spaces")


# -------------------------------------------------------------------------------------------- run checkpoints

class Gadget:
    """An object whose pickle calls a function when it is loaded."""

    def __init__(self, function, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call


def test_pickles_are_refused_wherever_they_hide(tmp_path):
    mark = tmp_path / "executed"
    gadgets = [Gadget(os.system, f"touch {mark}"), Gadget(eval, f"open({str(mark)!r}, 'w')"),
               Gadget(exec, f"open({str(mark)!r}, 'w')"), Gadget(Path.touch, mark),
               Gadget(open, str(mark), "w"), Gadget(torch.load, str(mark)), Gadget(getattr, Path, "touch"),
               Gadget(torch.hub.load, "x", "y"),
               Gadget(pickle.loads, pickle.dumps(Gadget(os.mkdir, str(mark))))]
    path = tmp_path / "ckpt.pt"
    good = {"format": checkpoint.FORMAT, "model": {}, "config": {}, "train_config": {}, "encoding": "",
            "state": {}}
    for gadget in gadgets:
        for place in [None, *good]:
            torch.save(gadget if place is None else good | {place: gadget}, path)
            assert not one_sentence(lambda: checkpoint.load_run(path), (gadget.call, place))
    for raw in (pickle.dumps(gadgets[0]), pickle.dumps(gadgets[0], 0)):
        path.write_bytes(raw)
        assert not one_sentence(lambda: checkpoint.load_run(path), raw)
    assert not mark.exists()
