"""Multi-token prediction, and the loss as a whole."""

import math

import pytest
import torch
import torch.nn.functional as F

from model import DeepSeekV3, rope_cos_sin


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
    logits, loss, aux = model(idx, targets)
    expected = slow_mtp_losses(model, idx, targets)
    assert aux["mtp"].item() == pytest.approx(sum(expected).item() / depth, rel=1e-5)
    main = F.cross_entropy(logits.flatten(0, 1), targets.flatten())
    assert aux["main"].item() == pytest.approx(main.item(), rel=1e-6)
    assert loss.item() == pytest.approx((main + 0.3 * aux["mtp"] + 1e-4 * aux["balance"]).item(), rel=1e-6)
    assert model(idx, targets, mtp_loss_weight=0.1)[1].item() == \
        pytest.approx((main + 0.1 * aux["mtp"] + 1e-4 * aux["balance"]).item(), rel=1e-6)


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
    h = model.main_model(idx, model._document_mask(doc_ids))[0][:, 4:]
    x = module(h[:, :3], model.model.embed_tokens(idx[:, 5:]), cos[:3], sin[:3])[0]
    expected = expected + F.cross_entropy(model.lm_head(module.shared_head.norm(x))[0], cut[0, 1:], reduction="sum")
    torch.testing.assert_close(aux["mtp"] * 8, expected)


@pytest.mark.parametrize("T", [1, 2, 3])
def test_sequences_shorter_than_the_depth(make_model, T):
    model = make_model(num_nextn_predict_layers=3).train()
    idx = torch.randint(0, 61, (2, T))
    _, loss, aux = model(idx, idx)
    assert torch.isfinite(loss) and aux["load"].shape == (5, 12)
    assert aux["load"].sum(1).tolist() == [2 * 3 * max(T - k, 0) for k in (0, 0, 1, 2, 3)]
    model.update_router_bias(aux["load"])


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
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, betas=(0.9, 0.95))
    first = None
    for step in range(250):
        _, loss, aux = model(idx, targets)
        first = first or aux
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        model.update_router_bias(aux["load"])
        if step == 40:      # a label fed as input would make it the easier one
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
    for call in (lambda m: m(idx), lambda m: m.generate(idx, 2), lambda m: m.decode(idx, m.new_cache(1, 3), 0)):
        with pytest.raises(ValueError, match=f"token id {bad} is outside the vocabulary of 61"):
            call(make_model())


def test_a_sequence_beyond_the_context_is_refused(make_model):
    with pytest.raises(ValueError, match="129 tokens.*YaRN"):
        make_model()(torch.zeros(1, 129, dtype=torch.int64))
