"""Generation: what plain decoding gives, what speculation must not change, and sample.py's command line."""

import contextlib
import copy
import io
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import model as model_module
import sample
import train
from data.prepare import prepare
from data.tokenizer import Ends, get_tokenizer
from model import DeepSeekV3, sampling_probs
from sample import compile_steps, generate_stream, verify


def speculate(model, idx, n, **kwargs):
    return torch.cat([idx, *generate_stream(model, idx, n, **kwargs)], 1)


def plain_greedy(model, idx, n):
    for _ in range(n):
        with torch.no_grad():
            idx = torch.cat([idx, model(idx)[0][:, -1].argmax(-1, keepdim=True)], 1)
    return idx


@pytest.mark.parametrize("depth", [0, 1, 2, 3])
@pytest.mark.parametrize("batch", [1, 3])
def test_greedy_is_the_argmax_of_the_whole_forward(make_model, depth, batch, monkeypatch):
    monkeypatch.setattr(model_module, "PREFILL_CHUNK", 5)
    monkeypatch.setattr(sample, "PREFILL_CHUNK", 5)
    model = make_model(num_nextn_predict_layers=depth)
    for T in (1, 2, 12):
        idx = torch.randint(0, 61, (batch, T))
        expected = plain_greedy(model, idx, 20)
        assert torch.equal(model.generate(idx, 20, temperature=0), expected)
        for speculative in (None, False):
            assert torch.equal(speculate(model, idx, 20, temperature=0, speculative=speculative), expected)


@pytest.mark.skipif(not shutil.which(os.environ.get("CXX", "g++")),
                    reason="torch.compile needs a C++ compiler on a CPU")
def test_compiled_steps_give_the_same_tokens(make_model):
    # one graph
    model = make_model(num_hidden_layers=1, first_k_dense_replace=0, num_nextn_predict_layers=0)
    idx = torch.randint(0, 61, (1, 9))
    expected = model.generate(idx, 60, temperature=0)
    compile_steps(model)
    torch._dynamo.utils.counters.clear()
    assert torch.equal(model.generate(idx, 60, temperature=0), expected)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1      # for every length of the cache


def test_generated_tokens_can_be_trained_on(make_model):
    """Generation runs in inference mode, whose tensors autograd refuses: none may leave it."""
    model = make_model().train()
    idx = torch.tensor([[1, 2]])
    for tokens in (model.generate(idx, 4), *generate_stream(model, idx, 1)):
        model(tokens, tokens)[1].backward()
    (model.decode(idx, model.new_cache(1, 2), 0) * torch.ones(61, requires_grad=True)).sum().backward()


@pytest.fixture(scope="module")
def trained():
    """A small model that has learnt to count, MTP included, so that drafts are right most of the time."""
    torch.manual_seed(0)
    config = model_module.DeepSeekV3Config(
        vocab_size=11, hidden_size=32, intermediate_size=64, moe_intermediate_size=16, num_hidden_layers=2,
        num_attention_heads=2, q_lora_rank=16, kv_lora_rank=16, qk_nope_head_dim=8, qk_rope_head_dim=8,
        v_head_dim=8, n_routed_experts=4, num_experts_per_tok=2, n_group=1, topk_group=1,
        first_k_dense_replace=1, num_nextn_predict_layers=2, max_position_embeddings=128,
        initializer_range=0.1)
    model = model_module.DeepSeekV3(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(100):        # t -> t + 1, or now and then t + 2: a choice that sampling has to get right
        jumps = 1 + (torch.rand(16, 25) < 0.3).long()
        tokens = jumps.cumsum(1) % 11
        _, loss, aux = model(tokens[:, :-1], tokens[:, 1:])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        model.update_router_bias(aux["load"])
    return model.eval()


def test_drafts_are_accepted_and_change_nothing(trained):
    idx = torch.tensor([[1, 2, 3, 4], [7, 9, 10, 0]])
    expected = plain_greedy(trained, idx, 60)
    for rows in (idx[:1], idx):
        stats = {}
        assert torch.equal(speculate(trained, rows, 60, temperature=0, stats=stats), expected[:len(rows)])
        assert stats["accepted"] / stats["drafted"] > 0.7 and stats["forwards"] < 35, stats


def test_mtp_caches_are_right_after_rejections(trained, monkeypatch):
    """Each draft must be what the MTP modules say of the whole sequence, computed without a cache."""
    trained = copy.deepcopy(trained).requires_grad_(False)
    for layer in trained.model.layers[2:]:      # worse drafts, for more rejections
        layer.eh_proj.weight.data += 0.1 * torch.randn(layer.eh_proj.weight.shape)
    calls = []
    monkeypatch.setattr(sample, "verify", lambda drafts, q, *rest: (calls.append((drafts.clone(), q)),
                                                                    verify(drafts, q, *rest))[1])
    idx = torch.tensor([[1, 2, 3, 5, 6]])
    steps, out = [], [idx]
    dice = torch.Generator().manual_seed(1)
    for token in generate_stream(trained, idx, 90, temperature=1.0, generator=dice):
        steps.append((len(calls), sum(t.size(1) for t in out)))
        out.append(token)
    whole = torch.cat(out, 1)
    rejected = 0
    for number, (drafts, q) in enumerate(calls):
        p = max(length for seen, length in steps if seen == number)        # position of the newest token then
        h, sequence = trained.main_model(whole[:, :p])[0], torch.cat([whole[:, :p + 1], drafts], 1)
        for k in (1, 2):
            emb = trained.model.embed_tokens(sequence[:, k:p + k])
            cos, sin = model_module.rope_cos_sin(trained.config, 0, p)
            layer = trained.model.layers[1 + k]
            h = layer(h, emb, cos, sin)[0]
            expected = sampling_probs(trained.lm_head(layer.shared_head.norm(h[:, -1:])))
            torch.testing.assert_close(q[k - 1], expected, rtol=0, atol=1e-4)
        rejected += not torch.equal(drafts, whole[:, p + 1:p + 3])
    assert rejected > 3 and len(calls) - rejected > 3


@pytest.mark.parametrize("place", [0, 1])
def test_a_verified_draft_is_distributed_as_the_main_model_says(trained, place):
    """Many rows, the last draft from a distribution that has little to do with the main model's, one before
    it from the main model's own, so that it is accepted."""
    N = 200_000
    p, q = torch.randn(place + 2, 11).softmax(-1), torch.randn(place + 1, 11).softmax(-1)
    q[:place] = p[:place]
    drafts = torch.stack([torch.multinomial(q_k, N, replacement=True) for q_k in q], 1)     # (N, place + 1)
    tokens = verify(drafts, [q_k.expand(N, 1, 11) for q_k in q], p.expand(N, place + 2, 11),
                    torch.zeros(N, 1, dtype=torch.bool), torch.Generator().manual_seed(0))
    kept = (tokens[:, place] == drafts[:, place]).float().mean()
    assert tokens.shape == drafts.shape and 0.2 < kept < 0.95
    assert torch.equal(tokens[:, :place], drafts[:, :place])
    chi2 = ((tokens[:, place].bincount(minlength=11) - N * p[place]) ** 2 / (N * p[place])).sum()
    assert chi2 < 10 + 4 * math.sqrt(20), chi2


@pytest.mark.parametrize("settings", [dict(temperature=1.0), dict(temperature=1.7, top_k=4),
                                      dict(temperature=1.5, top_p=0.8)])
def test_speculation_keeps_the_distribution_exactly(trained, settings):
    """Joint frequencies of 3 sampled tokens against the model's own probabilities, by a chi-square test."""
    N, prompt = 2000, torch.tensor([[1, 2, 3]])
    generator = torch.Generator().manual_seed(0)
    idx = prompt.expand(4, -1)      # rows share the number of accepted drafts, and do not disturb each other
    counts = torch.zeros(11, 11, 11)
    stats, model = {}, trained
    for _ in range(N // 4):
        out = torch.cat(list(generate_stream(model, idx, 3, generator=generator, stats=stats, **settings)), 1)
        for row in out.tolist():
            counts[tuple(row)] += 1
    assert 0.1 < stats["accepted"] / stats["drafted"] < 0.95        # both outcomes are really tried

    expected = torch.zeros(11, 11, 11)
    with torch.no_grad():
        first = sampling_probs(model(prompt)[0][:, -1], **settings)[0]
        for a in range(11):
            pa = torch.cat([prompt, torch.tensor([[a]])], 1)
            second = sampling_probs(model(pa)[0][:, -1], **settings)[0]
            pab = torch.cat([pa.expand(11, -1), torch.arange(11)[:, None]], 1)
            third = sampling_probs(model(pab)[0][:, -1], **settings)
            expected[a] = first[a] * second[:, None] * third
    expected = expected * N
    assert counts[expected == 0].sum() == 0         # nothing that top_k or top_p cut off
    common = expected >= 5
    chi2 = ((counts - expected)[common] ** 2 / expected[common]).sum()
    rest = (counts[~common].sum() - expected[~common].sum()) ** 2 / expected[~common].sum().clamp(min=1)
    dof = int(common.sum())
    assert chi2 + rest < dof + 4 * math.sqrt(2 * dof), (chi2, rest, dof)


@pytest.mark.parametrize("generate", [DeepSeekV3.generate, speculate], ids=["plain", "speculative"])
def test_stop_and_max_new_tokens_are_exact(trained, generate):
    idx = torch.tensor([[1, 2, 3], [6, 7, 8]])
    for n in (0, 1, 2, 3, 7):
        assert generate(trained, idx, n, temperature=0).shape == (2, 3 + n)
    free = generate(trained, idx, 12, temperature=0)
    assert free[0].tolist() != free[1].tolist()
    first = generate(trained, idx[:1], 12, temperature=0, stop=[6])[0].tolist()
    assert first == free[0].tolist()[:free[0].tolist().index(6, 3) + 1]     # the stop token is the last one
    both = generate(trained, idx, 12, temperature=0, stop=[0])
    for row, unstopped in zip(both.tolist(), free.tolist()):
        end = unstopped.index(0, 3) + 1
        assert row[:end] == unstopped[:end] and set(row[end:]) <= {0}
    assert both.size(1) == max(row.index(0, 3) for row in free.tolist()) + 1


def test_streaming_without_drafts_is_plain_sampling(trained):
    idx, settings = torch.tensor([[1, 2, 3], [6, 7, 8]]), dict(temperature=1.3, top_k=5, top_p=0.9)
    whole = trained.generate(idx, 9, **settings, generator=torch.Generator().manual_seed(5))
    dice = torch.Generator().manual_seed(5)
    stream = generate_stream(trained, idx, 9, **settings, speculative=False, generator=dice)
    assert torch.equal(next(stream), whole[:, 3:4])
    assert torch.equal(torch.cat(list(stream), 1), whole[:, 4:])


def test_generation_does_not_touch_the_model(trained):
    before = {k: v.clone() for k, v in trained.state_dict().items()}
    trained.train()
    trained.generate(torch.tensor([[1]]), 5)
    assert trained.training
    trained.eval()
    assert all(torch.equal(v, before[k]) for k, v in trained.state_dict().items())


def test_sampling_probs():
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0])
    p = logits.softmax(-1)
    torch.testing.assert_close(sampling_probs(logits), p)
    torch.testing.assert_close(sampling_probs(logits, 0.5), (logits * 2).softmax(-1))
    assert sampling_probs(logits, 0).tolist() == [1, 0, 0, 0]
    two = torch.cat([p[:2] / p[:2].sum(), torch.zeros(2)])
    torch.testing.assert_close(sampling_probs(logits, top_k=2), two)
    # 0.64 alone doesn't reach 0.7, 0.64 + 0.24 does
    torch.testing.assert_close(sampling_probs(logits, top_p=0.7), two)
    assert sampling_probs(logits, top_p=1e-6).tolist() == [1, 0, 0, 0]
    for tiny in (1e-30, 1e-46, 5e-324):         # the last two are 0 in fp32
        assert sampling_probs(logits, tiny).tolist() == [1, 0, 0, 0]
        assert sampling_probs(logits, top_p=tiny).tolist() == [1, 0, 0, 0]
    torch.testing.assert_close(sampling_probs(logits, 1e300), torch.full((4,), 0.25))


@pytest.mark.parametrize("generate", [DeepSeekV3.generate, speculate], ids=["plain", "speculative"])
@pytest.mark.parametrize("arguments, words", [
    (dict(temperature=-1.0), "temperature"), (dict(temperature=math.nan), "temperature"),
    (dict(top_k=0), "top_k"),
    (dict(top_p=0.0), "top_p"), (dict(top_p=1.5), "top_p"), (dict(max_new_tokens=-1), "max_new_tokens"),
    (dict(max_new_tokens=200), "YaRN"), (dict(idx=torch.zeros(1, 0, dtype=torch.int64)), "prompt is empty")])
def test_bad_arguments_get_one_sentence(trained, generate, arguments, words):
    arguments = {"idx": torch.tensor([[1, 2]]), "max_new_tokens": 3, **arguments}
    with pytest.raises(ValueError, match=words):
        generate(trained, arguments.pop("idx"), arguments.pop("max_new_tokens"), **arguments)


def test_speculation_without_mtp_is_refused(make_model):
    with pytest.raises(ValueError, match="MTP"):
        speculate(make_model(num_nextn_predict_layers=0), torch.tensor([[1]]), 2, speculative=True)


def test_bf16_drafts_change_no_greedy_token(trained):
    """Drafts are verified with the very operations of plain decoding, so not even rounding differs."""
    model = copy.deepcopy(trained).bfloat16()
    idx = torch.tensor([[1, 2, 3, 4], [7, 9, 10, 0]])
    assert torch.equal(speculate(model, idx, 60, temperature=0), model.generate(idx, 60, temperature=0))


# ---------------------------------------------------------------------------------------- the command line

@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    """A run of one step, with the tokens that fill a hole."""
    folder = tmp_path_factory.mktemp("run")
    for i in range(90):
        (folder / f"{i:02}.txt").write_text(f"line {i} of text")
    prepare(folder / "tokens", input=folder, fim_rate=0.5)
    flags = ("--hidden_size 32 --intermediate_size 48 --moe_intermediate_size 16 --num_hidden_layers 2 "
             "--num_attention_heads 2 --q_lora_rank 16 --kv_lora_rank 16 --qk_nope_head_dim 8 "
             "--qk_rope_head_dim 8 --v_head_dim 8 --n_routed_experts 4 --num_experts_per_tok 2 --n_group 2 "
             "--topk_group 2 --block_size 32 --batch_size 4 --device cpu --max_iters 1").split()
    with contextlib.redirect_stdout(io.StringIO()):
        train.main(["--data_dir", str(folder / "tokens"), "--out_dir", str(folder / "out"), *flags])
    return folder / "out"


@pytest.mark.parametrize("speculative", [None, False])
def test_text_beyond_the_context_continues_from_its_last_half(make_model, speculative):
    model = make_model(max_position_embeddings=16)
    prompt = torch.randint(0, 60, (1, 5))
    found = list(sample.continuation(model, prompt, 30, (), temperature=0, speculative=speculative))
    text = prompt
    for i in range(30):
        length = 5 + i if i < 11 else 8 + (i - 11) % 8
        text = torch.cat([text, model.generate(text[:, -length:], 1, temperature=0)[:, -1:]], 1)
    assert found == text[0, 5:].tolist()


@pytest.mark.parametrize("flags, words", [
    ("--ckpt nowhere", "there is no checkpoint nowhere; train.py saves it"),
    ("--ckpt {dir}/empty", "/empty/ckpt.pt; train.py saves it"),
    ("--ckpt {dir}/young", "saves it at its first evaluation"),
    ("--ckpt {dir}/latin.txt", "not a checkpoint"),
    ("--ckpt {out} --prompt=", "prompt is empty"),
    ("--ckpt {out} --prompt FILE:{dir}/empty.txt", "prompt is empty"),
    ("--ckpt {out} --prompt a\udcffb", "'a\\udcffb' is not UTF-8"),
    ("--ckpt {out} --prompt a\ud800b", "'a\\ud800b' is not UTF-8"),
    ("--ckpt {out} --prompt FILE:nowhere.txt", "nowhere.txt"),
    ("--ckpt {out} --prompt FILE:{dir}",
     "FILE:{dir}' is not UTF-8 text or a file of it: [Errno 21] Is a directory"),
    ("--ckpt {out} --prompt FILE:{dir}/latin.txt", "not UTF-8"),
    ("--ckpt {out} --temperature -1", "temperature"),
    ("--ckpt {out} --temperature nan", "temperature"),
    ("--ckpt {out} --top_p 2", "top_p"),
    ("--ckpt {out} --top_k 0", "top_k"),
    ("--ckpt {out} --max_new_tokens -1", "max_new_tokens"),
    ("--ckpt {out} --num_sampels 1", "--num_sampels 1; did you mean --num_samples?"),
    ("--ckpt {out} --num-samples=1", "--num-samples=1; did you mean --num_samples?"),
    ("--ckpt {out} --num_samples 0", "--num_samples"),
    ("--ckpt {out} --seed 99999999999999999999", "--seed must fit in 64 bits"),
    ("--ckpt {out} --device gpu", "--device gpu can't be used"),
    ("--ckpt {out} --device meta", "--device meta can't be used"),
    ("--ckpt {out} --dtype float16", "--dtype: invalid choice: 'float16'"),
    ("--ckpt {out} --ema", "holds no average"),
    ("--ckpt {out} --suffix x --prompt y", "one of the two"),
    ("--ckpt {out} --prefix FILE:{dir}/latin.txt", "--prefix 'FILE:"),
    ("--ckpt {out} --prefix " + "x" * 100, "104 tokens leave room for 0 in the model's context of 32"),
    ("--ckpt {out} --prefix x --max_new_tokens 99", "room for 27 in"),
])
def test_bad_input_ends_in_one_sentence(run_dir, flags, words, capsys):
    base = run_dir.parent
    if not (base / "young").exists():
        (base / "latin.txt").write_bytes("café".encode("latin-1"))
        (base / "empty.txt").touch()
        (base / "empty").mkdir()
        (base / "young").mkdir()
        (base / "young" / "lock").touch()
    with pytest.raises(SystemExit) as e:
        sample.main([flag.format(out=run_dir, dir=base) for flag in flags.split(" ")])
    said = capsys.readouterr().err if e.value.code == 2 else e.value.code       # 2: argparse's own
    assert words.format(dir=base) in said and "\n" not in said.strip()


def test_a_hole_is_filled(run_dir, tmp_path, monkeypatch, capsys):
    """The model is asked with the tokens that it was trained on, and the text comes out in its order."""
    asked = []

    def fills(model, idx, new, **kwargs):
        asked.append((idx[0].tolist(), new))
        return iter(torch.tensor([[[token]] for token in (*b"mid", 256)]))

    with monkeypatch.context() as patch:
        patch.setattr(sample, "generate_stream", fills)
        (tmp_path / "suffix.txt").write_text(" the end")
        sample.main(["--ckpt", str(run_dir), "--prefix", "a é ", "--suffix", f"FILE:{tmp_path}/suffix.txt"])
    assert capsys.readouterr().out.endswith("-\na é mid the end\n")
    idx = [256, 257, *"a é ".encode(), 258, *b" the end", 259]
    assert asked == [(idx, 32 - len(idx))]
    sample.main(["--ckpt", str(run_dir), "--suffix", "<b"])
    said = capsys.readouterr()
    assert said.out.endswith("<b\n")
    assert 1 <= int(said.err.split()[0]) <= 32 - 6      # not beyond the window, which hides the prefix


def test_a_hole_needs_tokens_that_mark_it():
    with pytest.raises(ValueError, match="tokenizer bytes has no <｜fim▁begin｜>"):
        sample.hole_tokens("a", "b", get_tokenizer("bytes"), Ends(None, (256,), False))


def test_a_prompt_begins_as_the_model_was_taught():
    encoding = get_tokenizer("bytes")
    plain, bos = Ends(1, (256,), False), Ends(256, (3,), True)
    assert sample.prompt_tokens(None, encoding, plain).tolist() == [[256]]
    assert sample.prompt_tokens(None, encoding, bos).tolist() == [[256]]
    assert sample.prompt_tokens("ab", encoding, plain).tolist() == [[97, 98]]
    assert sample.prompt_tokens("ab", encoding, bos).tolist() == [[256, 97, 98]]
    assert sample.prompt_tokens("<|endoftext|>a", encoding, bos).tolist() == [[256, 97]]       # not twice


def test_a_prompt_of_bytes_that_the_locale_lacks(tmp_path):
    (tmp_path / "text").write_bytes("é\0\r\n".encode())
    assert sample.read_text("--prompt", f"FILE:{tmp_path}/text") == "é\0\r\n"
    assert sample.read_text("--prompt", "\udcc3\udca9") == "é"       # as a POSIX locale reads it


def test_half_of_the_precision_where_it_is_stored_and_computed(monkeypatch, capsys):
    for stored in "float32", None, "bfloat16", "float16", "float8_e4m3fn":
        narrow = stored not in (None, "float32")
        for fast in (True, False):
            monkeypatch.setattr(sample, "has_bf16", lambda device: fast)
            dtype = sample.default_dtype(stored, torch.device("cpu"))
            assert dtype == (torch.bfloat16 if narrow and fast else torch.float32)
            said = capsys.readouterr().err
            assert ("--dtype bfloat16" in said and said.count("\n") == 1) if narrow and not fast else not said


def test_dtype_is_that_of_the_flag(run_dir):
    for dtype in (torch.float32, torch.bfloat16):
        assert sample.load(run_dir, "cpu", dtype).model.lm_head.weight.dtype == dtype
    assert sample.load(run_dir, "cpu").model.lm_head.weight.dtype == torch.float32


@pytest.mark.parametrize("encoding", ["cp1252", "ascii"])
def test_no_character_costs_a_text(run_dir, monkeypatch, encoding):
    terminal = io.TextIOWrapper(io.BytesIO(), encoding)
    monkeypatch.setattr(sys, "stdout", terminal)
    sample.main(["--ckpt", str(run_dir), "--prompt", "→é", "--max_new_tokens", "3"])
    assert terminal.buffer.getvalue().split(b"\n")[1].startswith("→é".encode(encoding, "replace"))


def test_a_closed_pipe_ends_quietly(run_dir):
    """As `python sample.py | head -1`: neither a traceback nor a complaint of the interpreter at its end."""
    script = str(Path(sample.__file__).parent / "sample.py")
    process = subprocess.Popen([sys.executable, script, "--ckpt", str(run_dir), "--max_new_tokens", "100000"],
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout.readline() == b"-" * 80 + b"\n"
    process.stdout.close()
    assert process.stderr.read() == b"" and process.wait() == 141
