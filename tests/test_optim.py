"""optim.py: the report's schedules, Muon against torch.optim.Muon, BF16 moments against torch.optim.AdamW."""

import numpy as np
import pytest
import torch

from model import DeepSeekV3, DeepSeekV3Config
from optim import BF16AdamW, Muon, batch_sizes, bf16_adamw, make_optimizers, schedule


def test_schedule_has_the_report_s_corners():
    def lr(tokens):
        return schedule(tokens / 14.8e12)[0]

    assert schedule(0)[0] == 0 and schedule(0.01)[0] == pytest.approx(0.5) and schedule(0.02)[0] == 1
    assert lr(9.99e12) == 1 and lr(14.29e12) == pytest.approx(0.1, abs=1e-4)
    assert lr((10e12 + 14.3e12) / 2) == pytest.approx(0.55, abs=1e-6)        # half-way down the cosine
    assert 2.2e-4 * lr(14.4e12) == pytest.approx(2.2e-5)
    assert 2.2e-4 * lr(14.7e12) == pytest.approx(7.3e-6, rel=0.01)
    # gamma
    assert [schedule(t / 14.8)[1] for t in (0, 14.2, 14.31, 14.8)] == [1, 1, 0, 0]
    assert [0.3 * schedule(t / 14.8)[2] for t in (0, 9.9, 10.01, 14.8)] == pytest.approx([0.3, 0.3, 0.1, 0.1])


def test_the_batch_ramps_over_the_report_s_share_of_the_tokens():
    sizes = batch_sizes(15360, 100_000, ramp=True)
    tokens = sizes.cumsum() / sizes.sum()
    assert sizes[0] == 3072 and sizes.max() == 15360 and (np.diff(sizes) >= 0).all()
    assert tokens[sizes.argmax()] == pytest.approx(469e9 / 14.8e12, rel=0.01)
    assert (sizes[sizes.argmax():] == 15360).all()
    assert batch_sizes(16, 30, ramp=True).tolist() == [3, 11] + 28 * [16]
    assert batch_sizes(4, 3).tolist() == [4, 4, 4]


def test_weight_decay_touches_matrices_only():
    model = DeepSeekV3(DeepSeekV3Config.preset("tiny"))
    optimizer, = make_optimizers(model)
    decayed = {id(p): g["weight_decay"] for g in optimizer.param_groups for p in g["params"]}
    assert len(decayed) == len(list(model.parameters()))
    assert all(g["betas"] == (0.9, 0.95) for g in optimizer.param_groups)
    for name, p in model.named_parameters():
        assert decayed[id(p)] == (0.0 if "norm" in name else 0.1), name


def test_bf16_moments_follow_adamw_and_are_half_the_size():
    torch.manual_seed(1)
    mine, theirs = (torch.nn.Parameter(torch.ones(50, 40)) for _ in range(2))
    bf16 = BF16AdamW([{"params": [mine], "weight_decay": 0.1}], lr=0.01)
    fp32 = torch.optim.AdamW([{"params": [theirs], "weight_decay": 0.1}], lr=0.01, betas=(0.9, 0.95))
    for step in range(50):
        mine.grad = theirs.grad = torch.randn(50, 40) + 0.3
        bf16.step()
        fp32.step()
        if step == 0:       # nothing has been rounded yet
            torch.testing.assert_close(mine, theirs)
        if step == 25:      # as a checkpoint does
            bf16.load_state_dict(bf16.state_dict())
    moved = (theirs - 1).abs().mean()
    assert moved > 0.1 and (mine - theirs).abs().mean() < 0.01 * moved and not torch.equal(mine, theirs)
    assert {t.dtype for k, t in bf16.state[mine].items() if k != "step"} == {torch.bfloat16}


@pytest.mark.parametrize("optimizer", [Muon, BF16AdamW])
def test_step_takes_a_closure_as_torch_s_optimizers_do(optimizer):
    weight = torch.nn.Parameter(torch.ones(4, 4))
    stepper = optimizer([weight], lr=0.1)

    def closure():
        loss = weight.square().sum()
        loss.backward()
        return loss

    assert stepper.step(closure) == 16 and weight.max() < 1
    assert stepper.step() is None


def test_a_compiled_update_is_traced_once_for_all_sizes_steps_and_rates():
    graphs = []

    def count(graph, inputs):
        graphs.append(graph)
        return graph.forward

    torch.compiler.reset()
    params = [torch.nn.Parameter(torch.ones(shape)) for shape in ((7, 5), (4, 6), (8, 3))]
    eager = [torch.nn.Parameter(p.detach().clone()) for p in params]
    compiled, plain = BF16AdamW(params, lr=0.01), BF16AdamW(eager, lr=0.01)
    compiled.update = torch.compile(bf16_adamw, dynamic=True, backend=count)
    for step in range(3):
        for p, q in zip(params, eager):
            p.grad = torch.randn(p.shape)
            q.grad = p.grad
        for optimizer in compiled, plain:
            optimizer.param_groups[0]["lr"] = 0.01 / (step + 1)
            optimizer.step()
    torch.compiler.reset()
    assert len(graphs) == 1 and all(map(torch.equal, params, eager))


@pytest.mark.parametrize("shape", [(24, 40), (40, 24), (3, 24, 40), (3, 40, 24)])
def test_muon_is_torch_s_for_a_matrix_and_for_each_matrix_of_a_stack(shape):
    mine = torch.nn.Parameter(torch.randn(shape))
    theirs = [torch.nn.Parameter(w.clone()) for w in mine.detach().view(-1, *shape[-2:])]
    muon, reference = Muon([mine], lr=0.01), torch.optim.Muon(theirs, lr=0.01, adjust_lr_fn="match_rms_adamw")
    before = mine.detach().clone()
    for _ in range(3):
        mine.grad = torch.randn(shape)
        for w, grad in zip(theirs, mine.grad.view(-1, *shape[-2:])):
            w.grad = grad
        muon.step()
        reference.step()
    moved, expected = mine - before, torch.stack(list(theirs)).view(shape) - before
    assert (moved - expected).norm() < 0.02 * expected.norm()       # torch's orthogonalizes in bf16


def test_muon_leaves_an_expert_without_tokens_as_it_is():
    stack = torch.nn.Parameter(torch.randn(4, 6, 8))
    before = stack.detach().clone()
    stack.grad = torch.randn(4, 6, 8)
    stack.grad[3] = 0
    Muon([stack], lr=0.01, weight_decay=0).step()
    moved = (stack - before).abs().amax((1, 2))
    assert moved[3] == 0 and (moved[:3] > 1e-4).all()


def test_muon_takes_the_hidden_matrices_and_adamw_the_rest():
    model = DeepSeekV3(DeepSeekV3Config.preset("tiny"))
    muon, adamw = make_optimizers(model, "muon")
    names = {id(p): name for name, p in model.named_parameters()}
    by_muon, by_adamw = ({names[id(p)] for g in o.param_groups for p in g["params"]} for o in (muon, adamw))
    ends = {"lm_head.weight", "model.embed_tokens.weight"}
    assert {n for n in names.values() if "norm" in n} | ends == by_adamw
    assert by_muon == set(names.values()) - by_adamw and "model.layers.1.mlp.experts.up_proj" in by_muon
