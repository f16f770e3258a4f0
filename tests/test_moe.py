"""The router and the experts, each against a loop too slow to be wrong."""

import math
import types

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import model as model_module
from model import DeepSeekV3, DeepSeekV3Config, Gate, balance_loss, grouped_linear


def slow_gate(gate, x):
    """One token (D,) -> {expert: weight}, following §2.1.2 word by word."""
    E, per_group = gate.weight.size(0), gate.weight.size(0) // gate.n_group
    s = [1 / (1 + math.exp(-sum(a * b for a, b in zip(x.tolist(), e.tolist())))) for e in gate.weight]
    biased = [s[i] + gate.e_score_correction_bias[i].item() for i in range(E)]
    groups = [sorted(biased[g * per_group:(g + 1) * per_group], reverse=True)[:2]
              for g in range(gate.n_group)]
    kept = sorted(range(gate.n_group), key=lambda g: -sum(groups[g]))[:gate.topk_group]
    allowed = [i for i in range(E) if i // per_group in kept]
    chosen = sorted(allowed, key=lambda i: -biased[i])[:gate.K]
    total = sum(s[i] for i in chosen) if gate.norm_topk_prob else 1.0
    return {i: s[i] / total * gate.scaling for i in chosen}


@pytest.mark.parametrize("changes", [
    {}, dict(n_group=1, topk_group=1), dict(norm_topk_prob=False), dict(topk_group=1),
    dict(n_group=12, topk_group=5)])
@pytest.mark.parametrize("bias", ["zero", "negative", "large"])
def test_gate_against_a_loop(make_config, changes, bias):
    gate = Gate(make_config(**changes))
    torch.nn.init.normal_(gate.weight, std=0.3)
    # every score + bias below 0: a mask of 0 instead of -inf would pick from the dropped groups
    gate.e_score_correction_bias.copy_({"zero": torch.zeros(12), "negative": -1.5 - torch.rand(12),
                                        "large": torch.randn(12) * 5}[bias])
    x = torch.randn(40, 48)
    weights, experts, scores = gate(x)
    assert weights.dtype == scores.dtype == torch.float32
    for n in range(40):
        found = dict(zip(experts[n].tolist(), weights[n].tolist()))
        assert found == pytest.approx(slow_gate(gate, x[n]), rel=1e-4)


def test_bias_selects_but_does_not_weigh(make_config):
    gate = Gate(make_config(n_group=1, topk_group=1))
    torch.nn.init.normal_(gate.weight, std=0.3)
    x = torch.randn(5, 48)
    gate.e_score_correction_bias[4] = 100.0
    weights, experts, scores = gate(x)
    assert (experts == 4).any(-1).all()
    picked = scores.gather(1, experts)
    torch.testing.assert_close(weights, 2.5 * picked / picked.sum(-1, True))


def test_gate_works_in_fp32_whatever_surrounds_it(make_config):
    gate = Gate(make_config())
    torch.nn.init.normal_(gate.weight, std=0.3)
    x = torch.randn(5, 48)
    expected = gate(x)[2]
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(gate(x)[2], expected, rtol=0, atol=0)
    gate.e_score_correction_bias.fill_(5.0)
    gate.to(torch.bfloat16)
    assert gate.weight.dtype == torch.bfloat16 and gate.e_score_correction_bias.dtype == torch.float32
    gate.update_bias(torch.arange(12), 0.001)
    assert gate.e_score_correction_bias[0].item() == pytest.approx(5.001, abs=1e-5)
    assert gate.e_score_correction_bias[11].item() == pytest.approx(4.999, abs=1e-5)


def slow_moe(moe, x):
    """Token by token, expert by expert."""
    experts, out = moe.experts, []
    for token in x.flatten(0, 1):
        weights, chosen, _ = moe.gate(token)
        y = moe.shared_experts(token) if moe.n_shared else torch.zeros_like(token)
        for w, e in zip(weights, chosen):
            h = F.silu(experts.gate_proj[e] @ token) * (experts.up_proj[e] @ token)
            y = y + w * (experts.down_proj[e] @ h)
        out.append(y)
    return torch.stack(out).view_as(x)


def check_against_a_loop(moe, x):
    """Values and all gradients, where expert 7 gets no token -> the load of the experts."""
    moe.gate.e_score_correction_bias[7] = -100.0
    y, load, _ = moe(x.requires_grad_())
    assert load.sum() == x[..., 0].numel() * 3 and load[7] == 0 and load.dtype == torch.int64
    expected, inputs = slow_moe(moe, x), [x, *moe.parameters()]
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-4)
    towards = torch.randn_like(y)
    grads = torch.autograd.grad(y, inputs, towards)
    for grad, slow in zip(grads, torch.autograd.grad(expected, inputs, towards), strict=True):
        torch.testing.assert_close(grad, slow, rtol=1e-3, atol=1e-4)
    gate_proj = grads[[name for name, _ in moe.named_parameters()].index("experts.gate_proj") + 1]
    assert torch.all(gate_proj[7] == 0) and gate_proj[load > 0].abs().amax((1, 2)).all()
    return load


@pytest.mark.parametrize("changes", [{}, dict(n_shared_experts=2), dict(n_shared_experts=0),
                                     dict(moe_intermediate_size=27)])      # 27: not for grouped_mm
def test_moe_against_a_loop_forward_and_backward(make_model, changes):
    check_against_a_loop(make_model(**changes).model.layers[1].mlp, torch.randn(2, 11, 48))


@pytest.mark.parametrize("N", [1, 2, 3])
def test_few_slots_take_the_gathered_path_and_agree(make_model, monkeypatch, N):
    moe = make_model().model.layers[1].mlp
    x = torch.randn(1, N, 48)
    expected = slow_moe(moe, x)
    torch.testing.assert_close(moe(x)[0], expected, rtol=1e-4, atol=1e-4)
    weights, experts, _ = moe.gate(x[0])
    y, load = moe.experts(x[0], weights, experts)
    assert load.tolist() == torch.bincount(experts.flatten(), minlength=12).tolist()
    slots = experts.flatten()
    torch.testing.assert_close(moe.experts.gathered(x[0], slots, 3), moe.experts.grouped(x[0], slots, load))
    monkeypatch.setattr(moe.experts, "grouped", None)
    moe(x)          # at 3 slots a token and 12 experts, up to 3 tokens do without grouped_mm


@pytest.mark.parametrize("padding", [(1, 0, False), (1, 1, False), (64, 0, False), (8, 1, False)])
def test_padding_changes_neither_values_nor_gradients(make_model, monkeypatch, padding):
    moe, ends = make_model().model.layers[1].mlp, []
    monkeypatch.setattr(moe.experts, "padding", lambda x, load: padding)
    monkeypatch.setattr(model_module, "grouped_linear",
                        lambda x, w, e: ends.append(e) or grouped_linear(x, w, e))
    load = check_against_a_loop(moe, torch.randn(1, 22, 48))
    rows = ends[0].diff(prepend=torch.zeros(1))
    multiple, least, _ = padding
    assert (rows % multiple == 0).all() and (rows >= load).all() and (rows - load < multiple + least).all()
    assert rows[7] == multiple * least


def test_bfloat16_on_a_cpu_meets_few_numbers_of_rows_and_fp32_no_padding(make_model):
    experts = make_model().model.layers[1].mlp.experts
    x, load = torch.randn(4, 48), torch.ones(12, dtype=torch.int64)
    assert experts.padding(x, load) == (1, 0, False)
    assert experts.padding(x.bfloat16(), load) == (128, 0, False)
    with torch.autocast("cpu", torch.bfloat16):
        assert experts.padding(x, load) == (128, 0, False)


def test_equal_shares_change_neither_values_nor_gradients(make_model, monkeypatch):
    """One batched product for all experts, with as many rows for each as the busiest needs."""
    moe, busiest = make_model().model.layers[1].mlp, []
    monkeypatch.setattr(moe.experts, "padding",
                        lambda x, load: busiest.append(int(load.max())) or (busiest[0], 1, True))
    monkeypatch.setattr(F, "grouped_mm", None)      # nobody calls it
    assert check_against_a_loop(moe, torch.randn(1, 22, 48)).max() == busiest[0]


@pytest.mark.parametrize("major, dtype, load, padding", [
    (9, torch.bfloat16, [4, 0, 2], (1, 1, False)),      # grouped_mm is one kernel
    (10, torch.bfloat16, [4, 0, 2], (1, 1, False)),
    (9, torch.float32, [2, 1, 3], (3, 1, True)),        # it is a loop: equal shares
    (8, torch.bfloat16, [2, 1, 3], (3, 1, True)),
    (12, torch.bfloat16, [2, 1, 3], (3, 1, True)),
    (8, torch.bfloat16, [9, 0, 0], (1, 1, False)),      # too uneven for that
])
def test_how_experts_are_multiplied_on_which_gpu(make_model, monkeypatch, major, dtype, load, padding):
    class SaysItIsOnAGPU(torch.Tensor):
        is_cuda = True

    experts = make_model().model.layers[1].mlp.experts
    card = types.SimpleNamespace(major=major)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: card)
    x = torch.randn(2, 48, dtype=dtype).as_subclass(SaysItIsOnAGPU)
    assert experts.padding(x, torch.tensor(load)) == padding


def test_padding_never_exceeds_what_the_slots_need(make_model, monkeypatch):
    """One token of the released model in FP8: 8 experts of 128 rows, not 256."""
    experts, seen = make_model().model.layers[1].mlp.experts, []
    monkeypatch.setattr(experts, "padding", lambda x, load: (128, 0, False))
    monkeypatch.setattr(experts, "swiglu",
                        lambda x, place, rows, ends: seen.append(rows) or x.new_zeros(rows, 48))
    experts.grouped(torch.randn(1, 48), torch.tensor([3, 5, 11]), torch.bincount(torch.tensor([3, 5, 11])))
    assert seen == [3 * 128]


def test_gradients_of_experts_are_gathered_not_scattered(make_model):
    """Scattering adds up with atomics on a GPU, slowly and in another order each time."""
    class Operations(TorchDispatchMode):
        def __torch_dispatch__(self, op, types, args=(), kwargs=None):
            names.append(op.name())
            return op(*args, **(kwargs or {}))
    moe, names = make_model().model.layers[1].mlp, []
    x = torch.randn(2, 11, 48, requires_grad=True)
    weights, experts, _ = moe.gate(x[0])
    with Operations():
        moe.experts(x[0], weights, experts)[0].sum().backward()
    assert "aten::index_select" in names and not {"aten::index_add", "aten::index_add_"} & set(names)


def test_load_counts_the_selected_experts(make_model):
    moe = make_model().model.layers[1].mlp
    x = torch.randn(2, 11, 48)
    _, experts, _ = moe.gate(x)
    assert moe(x)[1].tolist() == [int((experts == e).sum()) for e in range(12)]


def test_grouped_linear_under_autocast():
    x, w, ends = torch.randn(10, 16), torch.randn(3, 8, 16), torch.tensor([4, 4, 10], dtype=torch.int32)
    expected = torch.cat([x[:4] @ w[0].T, x[4:] @ w[2].T])
    torch.testing.assert_close(grouped_linear(x, w, ends), expected)
    with torch.autocast("cpu", torch.bfloat16):
        y = grouped_linear(x, w, ends)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), expected, rtol=0.05, atol=0.1)


def test_balance_loss_on_numbers_by_hand():
    # 1 sequence, 2 tokens, 3 experts, K = 1. Token 1 picks expert 0, token 2 expert 2.
    scores = torch.tensor([[[0.6, 0.3, 0.1], [0.2, 0.2, 0.6]]])
    # f = 3/(1*2) * (1, 0, 1); P = ((0.6 + 0.2)/2, (0.3 + 0.2)/2, (0.1 + 0.6)/2)
    assert balance_loss(scores, 1).item() == pytest.approx(1.5 * 0.4 + 1.5 * 0.35)
    # affinities are normalised over all experts: scaling a token's scores changes nothing
    assert balance_loss(scores * torch.tensor([[[1.0], [0.5]]]), 1).item() == pytest.approx(1.125)
    # averaged over the sequences, each balanced by itself
    lopsided = torch.tensor([[[0.8, 0.1, 0.1], [0.8, 0.1, 0.1]]])
    assert balance_loss(lopsided, 1).item() == pytest.approx(3 * 0.8)
    assert balance_loss(torch.cat([scores, lopsided]), 1).item() == pytest.approx((1.125 + 2.4) / 2)
    assert balance_loss(torch.full((2, 6, 3), 0.5), 3).item() == pytest.approx(1.0)


def test_balance_loss_pulls_towards_the_idle_expert():
    scores = torch.tensor([[[0.8, 0.1, 0.1], [0.7, 0.2, 0.1]]], requires_grad=True)
    balance_loss(scores, 1).backward()
    assert (scores.grad[..., 0] > 0).all() and (scores.grad[..., 1:] < 0).all()


def test_bias_update_on_numbers_by_hand(make_model):
    model = make_model(num_nextn_predict_layers=1, bias_update_speed=0.01)   # 2 MoE layers and an MTP module
    before = [g.clone() for name, g in model.named_buffers() if "bias" in name]
    load = torch.tensor([[10, 0, 5] + [5] * 9, [5] * 12, [3] * 11 + [27]])      # means 5, 5, 5
    model.update_router_bias(load)
    signs = [[-1, 1, 0] + [0] * 9, [0] * 12, [1] * 11 + [-1]]
    after = [g for name, g in model.named_buffers() if "bias" in name]
    for a, b, sign in zip(after, before, signs, strict=True):
        torch.testing.assert_close(a, b + 0.01 * torch.tensor(sign))
    model.update_router_bias(load, speed=0.0)
    now = [g for name, g in model.named_buffers() if "bias" in name]
    torch.testing.assert_close(torch.stack(after), torch.stack(now))
    with pytest.raises(ValueError, match=r"\(3, 12\)"):
        model.update_router_bias(load[:2])


def test_the_load_of_micro_batches_adds_up(make_model):
    model = make_model(num_nextn_predict_layers=1).train()
    idx = torch.randint(0, 61, (4, 10))
    whole = model(idx, idx)[2]["load"]
    parts = model(idx[:2], idx[:2])[2]["load"] + model(idx[2:], idx[2:])[2]["load"]
    assert whole.shape == (3, 12) and torch.equal(whole, parts)
    assert whole.sum(1).tolist() == [4 * 10 * 3, 4 * 10 * 3, 4 * 9 * 3]


def test_the_bias_balances_a_skewed_router(make_model):
    model = make_model(num_nextn_predict_layers=0, n_group=1, topk_group=1).train()
    idx = torch.randint(0, 61, (8, 32))
    violation = lambda: (load := model(idx, idx)[2]["load"].float()).amax(1) / load.mean(1)
    first = violation()
    with torch.no_grad():
        for _ in range(100):
            model.update_router_bias(model(idx, idx)[2]["load"], speed=0.03)
    assert (violation() < 1.3).all() and (first > 2).any()


def test_only_training_moves_the_bias_and_only_by_the_update(make_model):
    model = make_model(num_nextn_predict_layers=1).train()
    before = {name: b.clone() for name, b in model.named_buffers()}
    _, loss, _ = model(torch.randint(0, 61, (2, 9)), torch.randint(0, 61, (2, 9)))
    loss.backward()
    assert all(torch.equal(b, before[name]) for name, b in model.named_buffers())
    assert not any("bias" in name for name, _ in model.named_parameters())


def test_gradients_are_the_same_bits_twice(two_threads):
    """At a size at which the CPU's threads share the work; resumed runs rest on it."""
    model = DeepSeekV3(DeepSeekV3Config.preset("tiny"))
    idx = torch.randint(0, 257, (16, 128))
    grads = []
    for _ in range(3):
        model.zero_grad()
        model(idx, idx)[1].backward()
        grads.append([p.grad for p in model.parameters()])
    assert all(torch.equal(a, b) and torch.equal(a, c) for a, b, c in zip(*grads))
