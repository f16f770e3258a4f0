"""Multi-token prediction, and the loss as a whole."""

import math
import os
import shutil

import pytest
import torch
import torch.nn.functional as F

import model as model_module
from model import DeepSeekV3, rope_cos_sin, sampling_probs


def slow_mtp_losses(model, idx, targets):
    """Eq. 21-25 position by position, from the tokens t_0..t_T written out."""
    B, T = idx.shape
    t = torch.cat([idx, targets[:, -1:]], 1)                    # t_0..t_T
    assert torch.equal(t[:, 1:], targets)
    h = model.main_model(idx)[0]
    losses = []
    for k in (1, 2)[:model.config.num_nextn_predict_layers]:
        module, rows = model.model.layers[model.config.num_hidden_layers + k - 1], []
        for i in range(T - k):                                   # h_i^{k-1} together with Emb(t_{i+k})
            emb = module.enorm(model.model.embed_tokens(t[:, i + k]))
            rows.append(torch.cat([emb, module.hnorm(h[:, i])], -1))
        x = module.eh_proj(torch.stack(rows, 1))
        cos, sin = rope_cos_sin(model.config, 0, T - k)
        x = x + module.self_attn(module.input_layernorm(x), cos, sin)
        h = x + module.mlp(module.post_attention_layernorm(x))[0]
        total = 0.0
        for i in range(T - k):                                   # predicts t_{i+k+1}
            logits = model.lm_head(module.shared_head.norm(h[:, i]))
            total += F.cross_entropy(logits, t[:, i + k + 1], reduction="sum")
        losses.append(total / (B * T))
    return losses


@pytest.mark.parametrize("depth", [1, 2])
def test_labels_against_a_hand_written_alignment(make_model, depth):
    model = make_model(num_nextn_predict_layers=depth).train()
    tokens = torch.randint(0, 61, (2, 11))
    idx, targets = tokens[:, :-1], tokens[:, 1:]
    _, loss, aux = model(idx, targets)
    logits = model(idx)[0]
    expected = slow_mtp_losses(model, idx, targets)
    assert aux["mtp"].item() == pytest.approx(sum(expected).item() / depth, rel=1e-5)
    main = F.cross_entropy(logits.flatten(0, 1), targets.flatten())
    assert aux["main"].item() == pytest.approx(main.item(), rel=1e-6)
    assert loss.item() == pytest.approx((main + 0.3 * aux["mtp"] + 1e-4 * aux["balance"]).item(), rel=1e-6)
    assert model(idx, targets, mtp_loss_weight=0.1)[1].item() == \
        pytest.approx((main + 0.1 * aux["mtp"] + 1e-4 * aux["balance"]).item(), rel=1e-6)


@pytest.mark.skipif(not shutil.which(os.environ.get("CXX", "g++")),
                    reason="torch.compile needs a C++ compiler on a CPU")
def test_a_compiled_dense_model_without_mtp_trains(make_model):
    """Its loss is the main one: the compiler must not take it for aux["main"], which is detached."""
    model = make_model(num_hidden_layers=1, num_nextn_predict_layers=0).train()
    tokens = torch.randint(0, 61, (2, 11))
    _, loss, aux = torch.compile(model)(tokens[:, :-1], tokens[:, 1:])
    loss.backward()
    assert model.lm_head.weight.grad.any() and aux["main"] == loss and aux["mtp"] == aux["balance"] == 0


def test_which_half_of_eh_proj_is_the_embedding(make_model):
    """The released weights have the embedding first: without the first half, the next token can't matter."""
    model = make_model(num_nextn_predict_layers=1).train()
    module = model.model.layers[-1]
    h, emb = torch.randn(1, 5, 48), torch.randn(1, 5, 48)
    cos, sin = rope_cos_sin(model.config, 0, 5)
    with torch.no_grad():
        module.eh_proj.weight[:, :48] = 0
    assert torch.equal(module(h, emb, cos, sin)[0], module(h, emb + 1, cos, sin)[0])
    assert not torch.equal(module(h, emb, cos, sin)[0], module(h * torch.randn(48), emb, cos, sin)[0])


def test_a_position_without_a_label_adds_nothing(make_model):
    model = make_model(num_nextn_predict_layers=2).train()
    tokens = torch.randint(0, 61, (1, 13))
    idx, targets = tokens[:, :-1], tokens[:, 1:].clone()
    targets[0, 4:] = -100           # labels t_1..t_4
    aux = model(idx, targets)[2]
    short = model(idx[:, :4], tokens[:, 1:5])[2]
    for key in ("main", "mtp"):
        torch.testing.assert_close(aux[key], short[key])
    nothing = model(idx, torch.full_like(targets, -100))
    assert nothing[2]["main"] == 0 and nothing[2]["mtp"] == 0 and torch.isfinite(nothing[1])


def test_mtp_stays_within_the_document(make_model):
    model = make_model(num_nextn_predict_layers=1).train()
    tokens = torch.randint(0, 61, (1, 9))
    idx, targets = tokens[:, :-1], tokens[:, 1:]
    doc_ids = torch.tensor([[0, 0, 0, 0, 1, 1, 1, 1]])
    aux = model(idx, targets, doc_ids=doc_ids)[2]
    # position 3 would read t_4 of the next document; positions 0-2 and 4-6 are the documents by themselves
    a = model(idx[:, :4], targets[:, :4])[2]
    cut = torch.where(torch.arange(4) < 4, targets[:, 4:], -100)
    cos, sin = rope_cos_sin(model.config, 4, 8)
    expected = a["mtp"] * 4
    module = model.model.layers[-1]
    h = model.main_model(idx, doc_ids[:, None, :, None] == doc_ids[:, None, None, :])[0][:, 4:]
    x = module(h[:, :3], model.model.embed_tokens(idx[:, 5:]), cos[:3], sin[:3])[0]
    logits = model.lm_head(module.shared_head.norm(x))[0]
    expected = expected + F.cross_entropy(logits, cut[0, 1:], reduction="sum")
    torch.testing.assert_close(aux["mtp"] * 8, expected)


@pytest.mark.parametrize("T", [1, 2, 3])
def test_sequences_shorter_than_the_depth(make_model, T):
    model = make_model(num_nextn_predict_layers=3).train()
    idx = torch.randint(0, 61, (2, T))
    _, loss, aux = model(idx, idx)
    assert torch.isfinite(loss) and aux["load"].shape == (5, 12)
    assert aux["load"].sum(1).tolist() == [2 * 3 * max(T - k, 0) for k in (0, 0, 1, 2, 3)]
    model.update_router_bias(aux["load"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_chunked_loss_has_the_values_and_gradients_of_the_naive_one(make_model, monkeypatch, dtype):
    model = make_model(num_nextn_predict_layers=2, tie_word_embeddings=True).train()
    tokens = torch.randint(0, 61, (3, 33))
    idx, targets = tokens[:, :-1], tokens[:, 1:].clone()
    targets[0, 5:20] = -100

    def step(logits_at_once, dtype):
        monkeypatch.setattr(model_module, "LOSS_CHUNK", logits_at_once)
        model.zero_grad()
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            logits, loss, aux = model(idx, targets)
        assert logits is None
        loss.backward()
        return [loss, aux["main"], aux["mtp"], *(p.grad for p in model.parameters())]

    naive, chunked = step(10**9, dtype), step(7 * 61 + 5, dtype)        # 7 tokens a chunk, and 96 in all
    if dtype == torch.float32:
        for a, b in zip(chunked, naive, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    else:
        exact = step(10**9, torch.float32)
        error, naive_error = (sum((a - b).square().sum() for a, b in zip(results, exact))
                              for results in (chunked, naive))
        assert error < 1.1 * naive_error


def test_training_holds_few_logits_at_a_time(make_model, monkeypatch):
    """What the backward pass needs, and the largest tensors on the way, of the vocabulary's width."""
    monkeypatch.setattr(model_module, "LOSS_CHUNK", 4 * 5000)
    model = make_model(num_nextn_predict_layers=1, vocab_size=5000).train()
    tokens = torch.randint(0, 5000, (2, 65))
    kept, rows = {}, []

    def pack(t):
        if t.dim() == 2 and t.size(1) == 5000:
            kept[t.untyped_storage().data_ptr()] = t.size(0)
        return t

    model.lm_head.register_forward_hook(lambda module, args, out: rows.append(out.numel() // 5000))
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        loss = model(tokens[:, :-1], tokens[:, 1:])[1]
    loss.backward()
    assert sum(kept.values()) <= 4 and max(rows) == 4
    assert sum(rows) == 2 * (128 + 126)     # each of both heads' once forward and once backward


def test_a_small_vocabulary_is_not_cut(make_model):
    model, calls = make_model(num_nextn_predict_layers=1).train(), []
    model.lm_head.register_forward_hook(lambda *_: calls.append(1))
    model(torch.randint(0, 61, (4, 64)), torch.randint(0, 61, (4, 64)))[1].backward()
    assert len(calls) == 2


def test_eval_mode_returns_the_main_loss(make_model):
    model = make_model(num_nextn_predict_layers=1)
    idx = torch.randint(0, 61, (2, 9))
    _, loss, aux = model(idx, idx)
    assert torch.equal(loss, aux["main"]) and aux["mtp"] > 0
    assert model(idx)[1] is None
    model.train()
    assert model(idx, idx)[1] > loss


def test_overfits_one_batch_and_finds_mtp_the_harder_task(make_config):
    model = DeepSeekV3(make_config(num_nextn_predict_layers=2, initializer_range=0.05))
    tokens = torch.randint(0, 61, (4, 17))
    idx, targets = tokens[:, :-1], tokens[:, 1:]
    optimizer = torch.optim.AdamW(model.parameters(), lr=6e-3, betas=(0.9, 0.95))
    first = None
    for step in range(60):
        _, loss, aux = model(idx, targets)
        first = first or aux
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        model.update_router_bias(aux["load"])
        if step == 20:      # a label fed as input would make it the easier one
            assert aux["mtp"] * 16 / 14.5 > aux["main"]
    assert first["main"].item() == pytest.approx(math.log(61), rel=0.15)
    # each sequence's first tokens can't be told from nothing but themselves; the rest is learnt by heart
    assert aux["main"] < 0.05 and aux["mtp"] < 0.15, aux


def test_every_parameter_gets_a_gradient(make_model):
    model = make_model(num_nextn_predict_layers=2).train()
    _, loss, _ = model(torch.randint(0, 61, (2, 16)), torch.randint(0, 61, (2, 16)))
    loss.backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in model.parameters())


@pytest.mark.parametrize("bad", [-1, 61])
def test_a_token_id_out_of_range_is_named(make_model, bad):
    idx = torch.tensor([[1, 2, bad]])
    for call in (lambda m: m(idx), lambda m: m.generate(idx, 2),
                 lambda m: m.decode(idx, m.new_cache(1, 3), 0)):
        with pytest.raises(ValueError, match=f"token id {bad} is outside the vocabulary of 61"):
            call(make_model())


@pytest.mark.parametrize("prompts", [[[1, 2], [3]], [1, 2], "text", None, torch.tensor([1, 2]),
                                     torch.ones(1, 2)])
def test_prompts_that_are_no_batch_are_refused_with_a_way_out(make_model, prompts):
    with pytest.raises(ValueError, match=r"for p in prompts: model.generate\(torch.tensor\(\[p\]\)"):
        make_model().generate(prompts, 2)


@pytest.mark.parametrize("temperature", [1e-30, 1e-45, 1e-46, 1e-320])
def test_a_tiny_temperature_is_greedy(temperature):
    logits = torch.tensor([[2.0, 1.0, -math.inf, 2.0], [0.0, 1e-30, 0.0, 0.0]])
    probs = sampling_probs(logits, temperature)
    assert probs[0].tolist() == [0.5, 0.0, 0.0, 0.5] and probs[1].argmax() == 1
    assert torch.isfinite(probs).all()


def test_a_sequence_beyond_the_context_is_refused(make_model):
    with pytest.raises(ValueError, match="129 tokens.*YaRN"):
        make_model()(torch.zeros(1, 129, dtype=torch.int64))
