"""Attention: positions, the three ways through the cache, and no look into the future."""

import contextlib
import math
import types

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrize

import model as model_module
from model import MLA, rope_cos_sin, rope_inv_freq, rotate, yarn_mscale

YARN = dict(type="yarn", factor=4, original_max_position_embeddings=32, beta_fast=32, beta_slow=1, mscale=1.0,
            mscale_all_dim=1.0)


def test_rope_rotates_interleaved_pairs(make_config):
    config = make_config()
    cos, sin = rope_cos_sin(config, 5, 9)
    x = torch.randn(2, 4, 3, 8)
    for t in range(4):
        for j in range(4):
            angle = (5 + t) * 10000.0 ** (-2 * j / 8)
            a, b = x[:, t, :, 2 * j], x[:, t, :, 2 * j + 1]
            y = rotate(x, cos, sin)[:, t]
            torch.testing.assert_close(y[..., 2 * j], a * math.cos(angle) - b * math.sin(angle))
            torch.testing.assert_close(y[..., 2 * j + 1], a * math.sin(angle) + b * math.cos(angle))


def test_rope_scores_depend_on_the_distance_only(make_config):
    config = make_config()
    q, k = torch.randn(1, 1, 1, 8), torch.randn(1, 1, 1, 8)

    def score(i, j):
        return (rotate(q, *rope_cos_sin(config, i, i + 1)) * rotate(k, *rope_cos_sin(config, j, j + 1))).sum()

    torch.testing.assert_close(score(9, 4), score(105, 100))
    assert abs(score(9, 4) - score(4, 9)) > 1e-3


def test_yarn_against_its_formula():
    """The 671B model's frequencies against the ramp of arXiv 2309.00071 (Eq. 17-23), pair by pair."""
    config = model_module.DeepSeekV3Config.preset("671b")
    inv_freq = rope_inv_freq(config)
    d, base, s, L = 64, 10000.0, 40, 4096

    def index(turns):
        return d * math.log(L / (turns * 2 * math.pi)) / (2 * math.log(base))

    low, high = math.floor(index(32)), math.ceil(index(1))
    assert (low, high) == (10, 23)
    for i in range(d // 2):
        theta = base ** (-2 * i / d)
        slowed = min(max((i - low) / (high - low), 0), 1)
        assert inv_freq[i].item() == pytest.approx(theta * (1 - slowed) + theta / s * slowed, rel=1e-5)
    assert inv_freq[0].item() == pytest.approx(1.0)
    assert inv_freq[31].item() == pytest.approx(base ** (-62 / 64) / 40)
    cos, sin = rope_cos_sin(config, 0, 3)
    assert torch.all(cos[0] == 1) and torch.all(sin[0] == 0)      # mscale = mscale_all_dim: no factor on them


def test_yarn_scales_the_softmax(make_config):
    plain, extended = MLA(make_config()), MLA(make_config(rope_scaling=YARN))
    assert plain.softmax_scale == 20 ** -0.5
    assert extended.softmax_scale == pytest.approx(20 ** -0.5 * (0.1 * math.log(4) + 1) ** 2)
    assert yarn_mscale(40, 1.0) == pytest.approx(1.3689, abs=1e-4)
    # without mscale_all_dim the temperature goes into cos and sin instead, as transformers has it
    only_factor = make_config(rope_scaling=dict(type="yarn", factor=4, original_max_position_embeddings=32))
    assert rope_cos_sin(only_factor, 0, 1)[0][0, 0].item() == pytest.approx(0.1 * math.log(4) + 1)
    assert MLA(only_factor).softmax_scale == 20 ** -0.5


def slow_attention(mla, x, config):
    """Eq. 1-11 for one head, one query at a time."""
    B, T, _ = x.shape
    H, nope, rope, v_dim = 3, 12, 8, 28
    cos, sin = rope_cos_sin(config, 0, T)
    c_q = mla.q_a_layernorm(mla.q_a_proj(x)) if config.q_lora_rank else None
    q = (mla.q_b_proj(c_q) if config.q_lora_rank else mla.q_proj(x)).view(B, T, H, nope + rope)
    down = mla.kv_a_proj_with_mqa(x)
    c_kv, k_r = mla.kv_a_layernorm(down[..., :16]), down[..., 16:]
    up = mla.kv_b_proj.weight.view(H, nope + v_dim, 16)
    out = torch.zeros(B, T, H, v_dim)
    for b in range(B):
        for h in range(H):
            for t in range(T):
                scores = []
                for j in range(t + 1):
                    score = q[b, t, h, :nope] @ (up[h, :nope] @ c_kv[b, j])
                    q_r = rotate(q[b:b + 1, t:t + 1, h, nope:], cos[t:t + 1], sin[t:t + 1])[0, 0]
                    score += q_r @ rotate(k_r[b:b + 1, j:j + 1], cos[j:j + 1], sin[j:j + 1])[0, 0]
                    scores.append(score * mla.softmax_scale)
                weights = torch.stack(scores).softmax(0)
                out[b, t, h] = sum(w * (up[h, nope:] @ c_kv[b, j]) for j, w in enumerate(weights))
    return mla.o_proj(out.flatten(2))


@pytest.mark.parametrize("changes", [{}, {"q_lora_rank": None}, {"rope_scaling": YARN}])
@torch.no_grad()
def test_attention_against_a_loop(make_model, changes):
    model = make_model(**changes)
    mla, config = model.model.layers[0].self_attn, model.config
    mla.kv_a_layernorm.weight.normal_(1, 0.3)
    x = torch.randn(2, 9, 48)
    cos, sin = rope_cos_sin(config, 0, 9)
    expected = slow_attention(mla, x, config)
    torch.testing.assert_close(mla(x, cos, sin), expected, rtol=1e-4, atol=1e-5)
    cache = torch.zeros(2, 9, 24)
    parts = [mla(x[:, a:b], cos[a:b], sin[a:b], cache=cache, pos=a) for a, b in ((0, 4), (4, 5), (5, 9))]
    torch.testing.assert_close(torch.cat(parts, 1), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("changes", [{}, {"q_lora_rank": None, "rope_scaling": YARN}, {"v_head_dim": 12},
                                     {"num_attention_heads": 4}])
def test_any_split_into_prefill_and_decode_gives_the_same_logits(make_model, changes, monkeypatch):
    monkeypatch.setattr(model_module, "PREFILL_CHUNK", 7)
    model = make_model(**changes, initializer_range=0.1)
    for layer in model.model.layers:
        layer.self_attn.cores = 2       # 4 heads in two groups, 3 in one
    idx = torch.randint(0, 61, (2, 40))
    with torch.no_grad():
        whole = model(idx)[0]
    for cuts in ([], [1], [39], [13, 14, 15, 30], list(range(1, 40))):
        cache = model.new_cache(2, 40)
        edges = [0, *cuts, 40]
        parts = [model.decode(idx[:, a:b], cache, a) for a, b in zip(edges, edges[1:])]
        torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=0, atol=1e-5)


def test_later_chunks_of_a_long_prompt_see_the_earlier_ones(make_model, monkeypatch):
    monkeypatch.setattr(model_module, "PREFILL_CHUNK", 140)
    model = make_model(max_position_embeddings=512, initializer_range=0.1)
    idx = torch.randint(0, 61, (2, 300))
    monkeypatch.setattr(MLA, "attend_absorbed", lambda *_: pytest.fail("absorbed, for many queries"))
    cache = model.new_cache(2, 300)
    parts = [model.decode(idx[:, :280], cache, 0)]
    monkeypatch.undo()
    parts += [model.decode(idx[:, a:b], cache, a) for a, b in ((280, 299), (299, 300))]
    with torch.no_grad():
        torch.testing.assert_close(torch.cat(parts, 1), model(idx)[0], rtol=0, atol=1e-5)


def test_decoding_never_expands_the_cache(make_model, monkeypatch):
    model = make_model()
    cache = model.new_cache(1, 20)
    model.decode(torch.randint(0, 61, (1, 12)), cache, 0)
    for layer in model.model.layers:
        monkeypatch.setattr(layer.self_attn, "attend_naive", None)
    model.decode(torch.randint(0, 61, (1, 1)), cache, 12)


class Adapted(nn.Module):
    """An adapter around a layer, such as LoRA's."""

    def __init__(self, layer):
        super().__init__()
        self.layer, self.extra = layer, nn.Linear(layer.in_features, layer.out_features, bias=False)

    @property
    def weight(self):
        return self.layer.weight

    def forward(self, x):
        return self.layer(x) + self.extra(x)


class Doubled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


class Negated(nn.Module):
    def forward(self, weight):
        return -weight


def with_adapter(mla):
    mla.kv_b_proj = Adapted(mla.kv_b_proj)


def with_subclass(mla):
    mla.kv_b_proj.__class__ = Doubled


def with_hook(mla):
    mla.kv_b_proj.register_forward_hook(lambda module, args, out: 2 * out)


def with_pre_hook(mla):
    mla.kv_b_proj.register_forward_pre_hook(lambda module, args: (2 * args[0],))


def with_parametrization(mla):
    parametrize.register_parametrization(mla.kv_b_proj, "weight", Negated())


def with_patched_forward(mla):
    forward = mla.kv_b_proj.forward
    mla.kv_b_proj.forward = lambda x: 2 * forward(x)


def with_bias(mla):
    mla.kv_b_proj.bias = nn.Parameter(torch.randn(mla.kv_b_proj.out_features))


@pytest.mark.parametrize("change", [with_adapter, with_subclass, with_hook, with_pre_hook,
                                    with_parametrization, with_patched_forward, with_bias])
def test_whatever_is_added_to_kv_b_proj_acts_in_decoding_too(make_model, change):
    """Absorbed attention reads its weight, and would pass over an adapter."""
    model = make_model(initializer_range=0.1)
    idx = torch.randint(0, 61, (2, 12))
    with torch.no_grad():
        plain = model(idx)[0]
        for layer in model.model.layers:
            change(layer.self_attn)
        whole = model(idx)[0]
    assert (whole - plain).abs().max() > 0.01
    cache = model.new_cache(2, 12)
    parts = [model.decode(idx[:, a:b], cache, a) for a, b in ((0, 6), (6, 7), (7, 10), (10, 12))]
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=0, atol=1e-5)


class WindowedMLA(MLA):
    """A query sees the 4 newest positions, its own included."""

    def visible(self, query, key):
        return key > query - 4


def test_a_sliding_window_is_one_method(make_model, monkeypatch):
    monkeypatch.setattr(model_module, "PREFILL_CHUNK", 17)      # later chunks go through the cache
    monkeypatch.setattr(model_module, "MLA", WindowedMLA)
    model = make_model(num_nextn_predict_layers=0, num_hidden_layers=2, initializer_range=0.1)
    idx = torch.randint(0, 61, (2, 50))
    with torch.no_grad():
        whole = model(idx)[0]
    for edges in ((0, 50), (0, 20, 40, 41, 44, 50), range(51)):
        cache = model.new_cache(2, 50)
        parts = [model.decode(idx[:, a:b], cache, a) for a, b in zip(edges, edges[1:])]
        torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=0, atol=1e-5)
    # two layers of a window of 4: token 10 reaches positions 10 to 16, and no other
    changed = idx.clone()
    changed[:, 10] = (changed[:, 10] + 1) % 61
    with torch.no_grad():
        moved = (model(changed)[0] - whole).abs().amax((0, 2)) > 1e-6
    assert moved.nonzero().flatten().tolist() == list(range(10, 17))
    # a document's mask comes on top
    doc_ids = (torch.arange(50) >= 12).long().expand(2, -1)
    a, b = model(idx, idx, doc_ids=doc_ids)[0], model(changed, changed, doc_ids=doc_ids)[0]
    assert ((a - b).abs().amax((0, 2)) > 1e-6).nonzero().flatten().tolist() == [10, 11]


def test_plain_causal_attention_needs_no_mask(make_model, monkeypatch):
    seen = []
    attend = F.scaled_dot_product_attention
    monkeypatch.setattr(F, "scaled_dot_product_attention",
                        lambda *args, **kwargs: seen.append(kwargs) or attend(*args, **kwargs))
    model, idx = make_model(), torch.randint(0, 61, (2, 12))
    model(idx, idx)
    assert seen and all(call["attn_mask"] is None and call["is_causal"] for call in seen)


class SaysItIsOnAGPU(torch.Tensor):
    is_cuda, device = True, torch.device("cuda")


@pytest.mark.parametrize("major, dtype, masked, width, backends", [
    (9, torch.bfloat16, False, 28, None),        # cuDNN: v as it is
    (10, torch.float16, False, 28, None),
    (8, torch.bfloat16, False, 36, None),        # flash attention: v as wide as the keys
    (12, torch.bfloat16, False, 36, None),
    (9, torch.float32, False, 36, None),
    (9, torch.bfloat16, True, 36, ["EFFICIENT_ATTENTION", "MATH"]),
    (8, torch.bfloat16, True, 36, ["EFFICIENT_ATTENTION", "MATH"]),
])
def test_which_attention_runs_on_which_gpu(make_config, monkeypatch, major, dtype, masked, width, backends):
    """cuDNN never sees a mask, and v is padded for every kernel but cuDNN's."""
    mla, seen = MLA(make_config(qk_nope_head_dim=28)), []
    card = types.SimpleNamespace(major=major)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: card)
    monkeypatch.setattr(torch.nn.attention, "sdpa_kernel",
                        lambda kinds: seen.append([kind.name for kind in kinds]) or contextlib.nullcontext())

    def attend(q, k, v, attn_mask, is_causal, scale):
        seen.append((v.size(-1), is_causal))
        return v

    monkeypatch.setattr(F, "scaled_dot_product_attention", attend)
    q, v = (torch.randn(2, 3, 9, size, dtype=dtype).as_subclass(SaysItIsOnAGPU) for size in (36, 28))
    mask = torch.ones(9, 9, dtype=torch.bool) if masked else None
    assert mla.attention(q, q, v, mask).shape == v.shape
    assert seen == ([backends] if backends else []) + [(width, not masked)]


@pytest.mark.parametrize("T, masked", [(40, False), (40, True), (300, False)])     # 300: in three parts
def test_bfloat16_attention_on_a_cpu_equals_the_fused_kernel_of_fp32(make_config, T, masked):
    mla, mask = MLA(make_config(qk_nope_head_dim=28)), None
    q, k, v = (torch.randn(2, 3, T, size, requires_grad=True) for size in (36, 36, 28))
    if masked:
        mask = (torch.rand(2, 1, 40, 40) < 0.7).tril() | torch.eye(40, dtype=torch.bool)
    expected = mla.attention(q, k, v, mask)
    got = mla.attention(*(t.bfloat16() for t in (q, k, v)), mask)
    assert got.dtype == torch.bfloat16
    torch.testing.assert_close(got.float(), expected, atol=0.03, rtol=0.03)
    weight = torch.randn_like(expected)
    for right, grad in zip(torch.autograd.grad((expected * weight).sum(), (q, k, v)),
                           torch.autograd.grad((got.float() * weight).sum(), (q, k, v))):
        torch.testing.assert_close(grad, right, atol=0.05, rtol=0.05)


def test_drafts_to_verify_attend_as_they_would_alone(make_model, monkeypatch):
    """In bfloat16 they would round differently otherwise, which changes greedy text at near ties."""
    model = make_model().bfloat16()
    idx = torch.randint(0, 61, (2, 13))
    cache = model.new_cache(2, 13)
    model.decode(idx[:, :10], cache, 0)
    attend, calls = F.scaled_dot_product_attention, []

    def recording(q, k, v, attn_mask=None, **kwargs):
        calls.append((q.shape, k.shape, attn_mask))
        return attend(q, k, v, attn_mask=attn_mask, **kwargs)

    monkeypatch.setattr(F, "scaled_dot_product_attention", recording)
    for t in (10, 11, 12):
        model.decode(idx[:, t:t + 1], cache, t)
    alone = calls.copy()
    calls.clear()
    model.decode(idx[:, 10:], cache, 10)
    layers = model.config.num_hidden_layers
    assert len(calls) == 3 * layers
    assert [calls[layer * 3 + t] for t in range(3) for layer in range(layers)] == alone


def test_cache_holds_the_latents_and_nothing_per_head(make_model):
    model = make_model(num_nextn_predict_layers=2)
    assert [c.shape for c in model.new_cache(5, 30)] == [(5, 30, 16 + 8)] * 3
    assert len(model.new_cache(5, 30, mtp=True)) == 5
    cache = model.new_cache(1, 4)
    idx = torch.randint(0, 61, (1, 4))
    model.decode(idx, cache, 0)
    block = model.model.layers[0]
    mla, x = block.self_attn, block.input_layernorm(model.model.embed_tokens(idx))
    c_kv, k_r = mla.kv_a_proj_with_mqa(x).split([16, 8], -1)
    torch.testing.assert_close(cache[0][..., :16], mla.kv_a_layernorm(c_kv))              # normalised
    rotated = rotate(k_r, *rope_cos_sin(model.config, 0, 4))
    torch.testing.assert_close(cache[0][..., 16:], rotated)


def test_going_back_overwrites_the_cache(make_model):
    model = make_model()
    idx = torch.randint(0, 61, (1, 10))
    cache = model.new_cache(1, 12)
    model.decode(torch.cat([idx[:, :6], torch.randint(0, 61, (1, 6))], 1), cache, 0)
    with torch.no_grad():
        whole = model(idx)[0]
    torch.testing.assert_close(model.decode(idx[:, 6:], cache, 6), whole[:, 6:], rtol=0, atol=1e-5)


def test_no_look_into_the_future(make_model):
    model = make_model(num_nextn_predict_layers=2).train()
    idx = torch.randint(0, 61, (1, 16))
    logits = []
    model.lm_head.register_forward_hook(lambda module, args, out: logits.append(out.detach()))
    for j in (5, 9, 15):
        changed = idx.clone()
        changed[0, j] = (changed[0, j] + 1) % 61
        logits.clear()
        model(idx, idx)
        model(changed, changed)
        assert len(logits) == 6       # main, depth 1, depth 2, twice
        for k in range(3):      # at depth k position i has seen the tokens up to i+k
            a, b = logits[k], logits[3 + k]
            torch.testing.assert_close(a[:, :j - k], b[:, :j - k], rtol=0, atol=1e-5)
            assert k and j == 15 or not torch.allclose(a[:, j - k:], b[:, j - k:])


def test_documents_do_not_see_each_other(make_model):
    model = make_model(num_nextn_predict_layers=2)
    idx = torch.randint(0, 61, (1, 14))
    doc_ids = torch.tensor([[0] * 6 + [1] * 8])
    masked = model(idx, idx, doc_ids=doc_ids)[0]
    other = idx.clone()
    other[:, :6] = (other[:, :6] + 7) % 61
    torch.testing.assert_close(model(other, other, doc_ids=doc_ids)[0][:, 6:], masked[:, 6:])
    assert not torch.allclose(model(other, other)[0][:, 6:], model(idx, idx)[0][:, 6:])
    one = torch.zeros_like(doc_ids)
    torch.testing.assert_close(model(idx, idx, doc_ids=one)[0], model(idx)[0])
