"""
Optimization as in §4.2 of the report: schedules, a ramp of the batch size, AdamW (its moments in BF16,
§3.3.3), a moving average of the weights (§3.2.2); and Muon, which is not in the report: small models profit.
"""

import math

import numpy as np
import torch
from torch.optim.swa_utils import AveragedModel


def batch_sizes(batch_size, max_iters, ramp=False):
    """(max_iters,) int: the sequences of a micro-batch at each step. With ramp they grow from a fifth of
    batch_size to all of it over the first 469B of 14.8T tokens (§4.2: 3072 to 15360), 5.17% of the steps."""
    share = np.ones(max_iters)
    if ramp:
        share = (0.2 + 0.8 * np.arange(max_iters) / (0.0517 * max_iters)).clip(max=1)
    return (batch_size * share).round().astype(int)


def schedule(progress):
    """The report's schedules (§4.2): factors of the learning rate, gamma and lambda.

    progress: the share of the run's tokens that have been seen, in [0, 1]. Of the report's 14.8T tokens, the
    learning rate warms up (2K steps; here 2% of the run), is constant up to 10T, follows a cosine down to a
    tenth up to 14.3T, stays there, and is 0.033 for the last 167B. gamma is 0.001 up to 14.3T, then 0; lambda
    is 0.3 up to 10T, then 0.1.
    """
    warm, constant, decayed, last = 0.02, 10 / 14.8, 14.3 / 14.8, 14.633 / 14.8
    if progress < warm:
        lr = progress / warm
    elif progress < constant:
        lr = 1.0
    elif progress < decayed:
        lr = 0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * (progress - constant) / (decayed - constant)))
    else:
        lr = 0.1 if progress < last else 0.033
    gamma = 1.0 if progress < decayed else 0.0
    lam = 1.0 if progress < constant else 1 / 3
    return lr, gamma, lam


def orthogonalize(x):
    """Newton-Schulz: each matrix of x (..., m, n) with its singular values brought near 1."""
    tall = x.size(-2) > x.size(-1)
    if tall:
        x = x.mT
    x = x.bfloat16() if x.is_cuda else x        # on a CPU that gains little
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-7)
    multiply_add = torch.addmm if x.dim() == 2 else torch.baddbmm
    for _ in range(5):
        gram = x @ x.mT
        polynomial = multiply_add(gram, gram, gram, beta=-4.7750, alpha=2.0315)
        x = multiply_add(x, polynomial, x, beta=3.4445)
    return x.mT if tall else x


@torch.enable_grad()
def loss_of(closure):
    """What `step` returns in PyTorch's optimizers: they take a function that computes loss and gradients."""
    return None if closure is None else closure()


class Muon(torch.optim.Optimizer):
    """torch.optim.Muon (adjust_lr_fn="match_rms_adamw") that also takes stacks of matrices (E, m, n): every
    expert's matrix is orthogonalized by itself, all of a stack in one batch. The update has the size of
    AdamW's, so both can share a learning rate."""

    def __init__(self, params, lr, weight_decay=0.1, momentum=0.95):
        super().__init__(params, dict(lr=lr, weight_decay=weight_decay, momentum=momentum))

    @torch.no_grad()
    def step(self, closure=None):
        loss = loss_of(closure)
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:
                    state["momentum_buffer"] = torch.zeros_like(p)
                average = state["momentum_buffer"].lerp_(p.grad, 1 - group["momentum"])
                update = orthogonalize(p.grad.lerp(average, group["momentum"]))     # Nesterov momentum
                size = 0.2 * max(p.shape[-2:]) ** 0.5
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.add_(update, alpha=-group["lr"] * size)
        return loss


def bf16_adamw(p, grad, m, v, step, lr, beta1, beta2, eps, weight_decay):
    """One step of AdamW in place; p and grad in fp32, the moments m and v rounded to bf16 after use. About a
    dozen kernels in eager mode, one when compiled."""
    mean = m.float().lerp(grad, 1 - beta1)
    square = v.float().lerp(grad.square(), 1 - beta2)
    m.copy_(mean)
    v.copy_(square)
    denominator = (square / (1 - beta2 ** step)).sqrt() + eps
    p.copy_(p * (1 - lr * weight_decay) - lr / (1 - beta1 ** step) * mean / denominator)


class BF16AdamW(torch.optim.Optimizer):
    """torch.optim.AdamW with both moments stored in bfloat16 (§3.3.3), in half the memory. Weights, gradients
    and the arithmetic stay in fp32."""

    def __init__(self, params, lr, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1):
        super().__init__(params, dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay))
        on_gpu = self.param_groups[0]["params"][0].is_cuda
        self.update = torch.compile(bf16_adamw, dynamic=True) if on_gpu else bf16_adamw

    def load_state_dict(self, state_dict):
        super().load_state_dict(state_dict)
        for state in self.state.values():       # torch casts them to the dtype of the weights
            for key in "exp_avg", "exp_avg_sq":
                state[key] = state[key].bfloat16()

    @torch.no_grad()
    def step(self, closure=None):
        loss = loss_of(closure)
        for group in self.param_groups:
            lr = torch.tensor(group["lr"])      # a tensor: torch.compile compiles again for a new number
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:
                    state["step"] = torch.tensor(0.0)
                    state["exp_avg"] = torch.zeros_like(p, dtype=torch.bfloat16)
                    state["exp_avg_sq"] = torch.zeros_like(p, dtype=torch.bfloat16)
                state["step"] += 1
                # detached, as torch.compile gives Parameters static shapes and so compiles for each
                self.update(p.detach(), p.grad, state["exp_avg"], state["exp_avg_sq"], state["step"], lr,
                            *group["betas"], group["eps"], group["weight_decay"])
        return loss


def make_optimizers(model, kind="adamw", learning_rate=1e-3, bf16_moments=False):
    """-> list of optimizers: AdamW as in §4.2; of kind "muon", Muon for the hidden matrices before it."""
    params, ends = list(model.parameters()), {model.model.embed_tokens.weight, model.lm_head.weight}
    groups = [{"params": [p for p in params if p.dim() > 1 and p not in ends], "weight_decay": 0.1},
              {"params": [p for p in params if p in ends], "weight_decay": 0.1},
              {"params": [p for p in params if p.dim() == 1], "weight_decay": 0.0}]     # norms do not decay
    muon = [Muon([groups.pop(0)], learning_rate)] if kind == "muon" else []
    if bf16_moments:
        return [*muon, BF16AdamW(groups, learning_rate)]
    fused = model.lm_head.weight.device.type in ("cuda", "cpu")
    return [*muon, torch.optim.AdamW(groups, learning_rate, betas=(0.9, 0.95), fused=fused)]


def averaged_model(model, decay):
    """A copy of the model for the exponential moving average of weights and router biases (§3.2.2), an early
    estimate of what the decay of the learning rate will bring; call update_parameters(model) after each step.
    Early weights fade fast: the share of the newest is at least 9/(n + 9)."""
    def average(means, weights, n):
        torch._foreach_lerp_(means, weights, max(1 - decay, 9 / (int(n) + 9)))

    return AveragedModel(model, multi_avg_fn=average, use_buffers=True)
