"""
DeepSeek-V3 in one file: Multi-head Latent Attention, DeepSeekMoE with auxiliary-loss-free load balancing,
and Multi-Token Prediction. Read it top to bottom, leaf to root:

    config -> RMSNorm -> RoPE/YaRN -> MLA -> MLP -> Gate -> Experts -> MoE -> Block -> MTP -> DeepSeekV3

Equation and section numbers refer to the DeepSeek-V3 Technical Report (arXiv 2412.19437). Modules carry the
names of the released checkpoints, local variables the symbols of the report. checkpoint.py reads and writes
files, sample.py drafts and verifies several tokens per pass.

Shapes      B batch, T tokens of a sequence, S tokens in the cache, N = B*T tokens of a batch, D hidden size,
            H heads, E routed experts, K experts per token, V vocabulary

paper                 code                          paper                code
h_t  input of a layer x                             u_t  input of FFN    x, in MoE
c_t^KV  KV latent     c_kv     (kv_lora_rank)       e_i  centroid        gate.weight[i]
c_t^Q   query latent  c_q      (q_lora_rank)        s_{i,t} affinity     scores
W^DKV, W^KR           kv_a_proj_with_mqa            g_{i,t} gate value   weights
W^UK, W^UV            kv_b_proj                     b_i  router bias     gate.e_score_correction_bias
W^DQ                  q_a_proj                      N_s, N_r, K_r        n_shared_experts, n_routed_experts,
W^UQ, W^QR            q_b_proj                                           num_experts_per_tok
q_t^C, q_t^R          q_c, q_r                      gamma, alpha         bias_update_speed, balance_loss_alpha
k_t^C, k_t^R          k_c, k_r                      M_k  MTP projection  eh_proj
W^O                   o_proj                        lambda, D (MTP)      mtp_loss_weight,
                                                                         num_nextn_predict_layers
"""

import dataclasses
import math
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn


# ------------------------------------------------------------------------------------------------------------
# Configuration

@dataclass
class DeepSeekV3Config:
    """Hyper-parameters, named as in a released config.json; the defaults are those of DeepSeek-V3's
    pre-training (§4.2). ValueError for a model that cannot be built."""

    vocab_size: int = 129280
    hidden_size: int = 7168                 # d
    intermediate_size: int = 18432          # of the dense layers' MLP
    moe_intermediate_size: int = 2048       # of each expert
    num_hidden_layers: int = 61
    num_attention_heads: int = 128          # n_h
    q_lora_rank: int | None = 1536          # d_c'; None: queries are projected directly from the hidden state
    kv_lora_rank: int = 512                 # d_c
    qk_nope_head_dim: int = 128             # d_h: the part of a query or key without position
    qk_rope_head_dim: int = 64              # d_h^R: the part that RoPE rotates
    v_head_dim: int = 128
    n_routed_experts: int = 256             # N_r
    n_shared_experts: int = 1               # N_s
    num_experts_per_tok: int = 8            # K_r
    n_group: int = 8                        # group-limited routing: experts in n_group groups,
    topk_group: int = 4                     # a token goes to at most topk_group of them
    routed_scaling_factor: float = 2.5
    norm_topk_prob: bool = True
    first_k_dense_replace: int = 3          # the first layers have a dense MLP
    num_nextn_predict_layers: int = 1       # D: depth of multi-token prediction
    rope_theta: float = 10000.0
    rope_scaling: dict | None = None        # YaRN: {"type": "yarn", "factor": 40, ...}
    max_position_embeddings: int = 4096
    rms_norm_eps: float = 1e-6
    initializer_range: float = 0.006
    tie_word_embeddings: bool = False
    # training only (§4.2); a released config.json doesn't have these
    bias_update_speed: float = 0.001        # gamma
    balance_loss_alpha: float = 0.0001      # alpha
    mtp_loss_weight: float = 0.3            # lambda

    def __post_init__(self):
        may_be_zero = "num_nextn_predict_layers", "n_shared_experts", "first_k_dense_replace"
        for field in dataclasses.fields(self):
            name, value, kind = field.name, getattr(self, field.name), field.type
            allowed = int | float if kind is float else kind
            if not isinstance(value, allowed) or isinstance(value, bool) != (kind is bool):
                kind = getattr(kind, "__name__", kind)
                raise ValueError(f"{name} must be of type {kind}, got {repr(value)[:100]}")
            least = 1 if kind in (int, int | None) and name not in may_be_zero else 0
            if isinstance(value, int | float) and not least <= value < 2**31:       # false for NaN too
                raise ValueError(f"{name} must be a number from {least} to 2^31, got {value}")
        if self.qk_rope_head_dim % 2:
            raise ValueError(f"qk_rope_head_dim must be even for RoPE's pairs, got {self.qk_rope_head_dim}")
        if self.n_routed_experts % self.n_group:
            raise ValueError(f"n_routed_experts={self.n_routed_experts} is not divisible into n_group="
                             f"{self.n_group} equal groups; change one of them (n_group 1: no groups)")
        if self.topk_group > self.n_group:
            raise ValueError(f"topk_group={self.topk_group} is more than the n_group={self.n_group} groups")
        reachable = self.topk_group * (self.n_routed_experts // self.n_group)
        if self.num_experts_per_tok > reachable:
            raise ValueError(f"num_experts_per_tok={self.num_experts_per_tok} is more than the {reachable} "
                             f"experts in the topk_group={self.topk_group} groups of a token; lower it, or "
                             "keep more groups")
        no_scaling = {"type": "yarn", "factor": 1}
        self.check_rope(no_scaling if self.rope_scaling is None else self.rope_scaling)

    def check_rope(self, yarn):
        if (kind := yarn.get("rope_type", yarn.get("type"))) != "yarn":
            raise ValueError(f"rope_scaling must be of type 'yarn', got {repr(kind)[:100]}")
        for key in yarn.keys() - {"type", "rope_type"}:
            value = yarn[key]
            if value is not None and (type(value) not in (int, float) or not 0 <= value < 2**31):
                raise ValueError(f"{repr(key)[:100]} of rope_scaling must be a number from 0 to 2^31, got "
                                 f"{repr(value)[:100]}")
        if not (yarn.get("factor") or 0) >= 1:
            raise ValueError(f"rope_scaling needs a 'factor' of at least 1 for YaRN, got {repr(yarn)[:200]}")
        fast, slow = yarn.get("beta_fast") or 32, yarn.get("beta_slow") or 1
        if self.rope_theta <= 1 or not 0.001 < slow <= fast:
            raise ValueError("RoPE needs rope_theta > 1 and 0.001 < beta_slow <= beta_fast, got "
                             f"{self.rope_theta}, {slow} and {fast}")
        if "rope_theta" in yarn:
            raise ValueError("rope_theta is a field of its own: take it out of rope_scaling")

    @classmethod
    def preset(cls, name):
        """One of PRESETS: tiny, mini, small, large, 16b, 671b. ValueError for any other name."""
        if name not in PRESETS:
            raise ValueError(f"unknown preset {name!r}; choose one of {', '.join(PRESETS)}")
        return cls(**PRESETS[name])


_V3_YARN = dict(type="yarn", factor=40, original_max_position_embeddings=4096, beta_fast=32, beta_slow=1,
                mscale=1.0, mscale_all_dim=1.0)
PRESETS = {
    # two CPU cores, minutes: bytes in, 0.7M parameters active per token. Few wide experts, unscaled, and a
    # faster bias work best in so short a run (README)
    "tiny": dict(
        vocab_size=320, hidden_size=128, intermediate_size=384, moe_intermediate_size=128,
        num_hidden_layers=3, num_attention_heads=4, q_lora_rank=96, kv_lora_rank=48, qk_nope_head_dim=32,
        qk_rope_head_dim=16, v_head_dim=32, n_routed_experts=8, num_experts_per_tok=2, n_group=1,
        topk_group=1, first_k_dense_replace=1, max_position_embeddings=4096, initializer_range=0.02,
        routed_scaling_factor=1.0, bias_update_speed=0.01),
    # ten minutes of a GPU: bytes in, 25M parameters active per token
    "mini": dict(
        vocab_size=320, hidden_size=512, intermediate_size=1408, moe_intermediate_size=512,
        num_hidden_layers=8, num_attention_heads=8, q_lora_rank=256, kv_lora_rank=128, qk_nope_head_dim=64,
        qk_rope_head_dim=32, v_head_dim=64, n_routed_experts=16, num_experts_per_tok=2, n_group=1,
        topk_group=1, first_k_dense_replace=1, initializer_range=0.02, routed_scaling_factor=1.0),
    # one GPU: GPT-2's size in parameters active per token, its vocabulary padded to a multiple of 64
    "small": dict(
        vocab_size=50304, hidden_size=768, intermediate_size=2048, moe_intermediate_size=384,
        num_hidden_layers=12, num_attention_heads=12, q_lora_rank=384, kv_lora_rank=128, qk_nope_head_dim=64,
        qk_rope_head_dim=32, v_head_dim=64, n_routed_experts=64, num_experts_per_tok=5, n_group=1,
        topk_group=1, first_k_dense_replace=1, initializer_range=0.02, tie_word_embeddings=True),
    # one 80 GB card: active like GPT-2 large, wide enough for 40% of an H100's FLOP/s (on paper)
    "large": dict(
        vocab_size=50304, hidden_size=2048, intermediate_size=5632, moe_intermediate_size=1408,
        num_hidden_layers=16, num_attention_heads=16, q_lora_rank=None, n_routed_experts=16,
        num_experts_per_tok=2, n_group=1, topk_group=1, first_k_dense_replace=1, initializer_range=0.02,
        tie_word_embeddings=True),
    # Moonlight-16B-A3B, a released model of the deepseek_v3 architecture, with an added MTP module
    "16b": dict(
        vocab_size=163840, hidden_size=2048, intermediate_size=11264, moe_intermediate_size=1408,
        num_hidden_layers=27, num_attention_heads=16, q_lora_rank=None, n_routed_experts=64,
        n_shared_experts=2, num_experts_per_tok=6, n_group=1, topk_group=1, first_k_dense_replace=1,
        routed_scaling_factor=2.446, rope_theta=50000.0, max_position_embeddings=8192),
    # the released model: its context is extended to 128K, its config.json allows 160K
    "671b": dict(rope_scaling=_V3_YARN, max_position_embeddings=163840, initializer_range=0.02),
}


# ------------------------------------------------------------------------------------------------------------
# Norm and positions

class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last dimension, computed in fp32 and returned in x's dtype.

    Copy along: nothing.
    """

    def __init__(self, dim, eps=1e-6):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x):
        return F.rms_norm(x.float(), self.weight.shape, self.weight.float(), self.eps).type_as(x)


def rope_inv_freq(config, device=None):
    """Angular frequencies of RoPE, (qk_rope_head_dim/2,) fp32 in radians per token, YaRN's where configured.

    YaRN (§4.3, arXiv 2309.00071): a pair that turns more than beta_fast times within the original context
    keeps its frequency, one that turns less than beta_slow times is slowed by `factor`, and those in between
    blend linearly.
    """
    dim, theta, yarn = config.qk_rope_head_dim, config.rope_theta, config.rope_scaling
    inv_freq = theta ** (-torch.arange(0, dim, 2, dtype=torch.float32, device=device) / dim)
    if yarn is None:
        return inv_freq
    original = yarn.get("original_max_position_embeddings") or config.max_position_embeddings

    def pair_that_turns(times):     # index of the pair that makes this many turns within the original context
        return dim * math.log(original / (times * 2 * math.pi)) / (2 * math.log(theta))

    low = max(math.floor(pair_that_turns(yarn.get("beta_fast") or 32)), 0)
    high = min(math.ceil(pair_that_turns(yarn.get("beta_slow") or 1)), dim - 1)
    ramp = (torch.arange(dim // 2, dtype=torch.float32, device=device) - low) / max(high - low, 0.001)
    keep = 1 - ramp.clamp(0, 1)
    return inv_freq * keep + inv_freq / yarn["factor"] * (1 - keep)


def yarn_mscale(factor, mscale):
    """YaRN's attention temperature, 0.1·mscale·ln(factor) + 1 (§4.3)."""
    return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0


def rope_cos_sin(config, start, end, device=None):
    """cos and sin of the angles at positions start..end-1, each (end - start, qk_rope_head_dim/2) fp32."""
    positions = torch.arange(start, end, dtype=torch.float32, device=device)
    angles = torch.outer(positions, rope_inv_freq(config, device))
    yarn = config.rope_scaling or {"attention_factor": 1.0}
    scale = yarn.get("attention_factor")
    if scale is None:       # 1 for released models, whose two mscale agree: MLA's softmax scale does it all
        both = yarn.get("mscale") and yarn.get("mscale_all_dim")
        mscale, all_dim = (yarn["mscale"], yarn["mscale_all_dim"]) if both else (1.0, 0.0)
        scale = yarn_mscale(yarn["factor"], mscale) / yarn_mscale(yarn["factor"], all_dim)
    return angles.cos() * scale, angles.sin() * scale


def rotate(x, cos, sin):
    """RoPE. x: (B, T, ..., R) as *interleaved* pairs (x0, x1), (x2, x3), ...; cos, sin: (T, R/2)."""
    x0, x1 = x.float().unflatten(-1, (-1, 2)).unbind(-1)                        # (B, T, ..., R/2) each
    if x.dim() == 4:
        cos, sin = cos[:, None], sin[:, None]               # (T, 1, R/2): the same for all heads
    y0, y1 = torch.addcmul(x0 * cos, x1, sin, value=-1), torch.addcmul(x1 * cos, x0, sin)
    return torch.stack([y0, y1], dim=-1).flatten(-2).type_as(x)


# ------------------------------------------------------------------------------------------------------------
# Attention

class MLA(nn.Module):
    """Multi-head Latent Attention (§2.1.1): all heads read keys and values out of one latent per token.

    Only that latent c_kv (normalised) and one rotated key k_r, shared by the heads, are cached:
    kv_lora_rank + qk_rope_head_dim numbers per token. Two ways to attend give the same result. `attend_naive`
    expands the latents into keys and values per head, which is cheap per query-key pair: training, prefill.
    `attend_absorbed` folds the expansion into query and output and reads the cache as it is: decoding.
    Copy along: RMSNorm, rotate, yarn_mscale.
    """

    # A subclass may define visible(self, query, key): which keys, of those up to its own position, a query
    # sees. query: (T, 1), key: (S,), positions; returns bool (T, S), as in `return key > query - 512`
    visible = None

    def __init__(self, config):
        super().__init__()
        D, self.H = config.hidden_size, config.num_attention_heads
        self.d_c, self.d_v = config.kv_lora_rank, config.v_head_dim
        self.d_nope, self.d_rope = config.qk_nope_head_dim, config.qk_rope_head_dim
        self.d_qk = self.d_nope + self.d_rope
        self.q_lora_rank = config.q_lora_rank
        if self.q_lora_rank is None:
            self.q_proj = nn.Linear(D, self.H * self.d_qk, bias=False)
        else:
            self.q_a_proj = nn.Linear(D, self.q_lora_rank, bias=False)          # W^DQ
            self.q_a_layernorm = RMSNorm(self.q_lora_rank)
            self.q_b_proj = nn.Linear(self.q_lora_rank, self.H * self.d_qk, bias=False)     # W^UQ, W^QR
        self.kv_a_proj_with_mqa = nn.Linear(D, self.d_c + self.d_rope, bias=False)          # W^DKV and W^KR
        self.kv_a_layernorm = RMSNorm(self.d_c)     # the released code keeps eps at 1e-6 in these two norms
        self.kv_b_proj = nn.Linear(self.d_c, self.H * (self.d_nope + self.d_v), bias=False)     # W^UK, W^UV
        self.o_proj = nn.Linear(self.H * self.d_v, D, bias=False)               # W^O
        self.cores = torch.get_num_threads()        # here, since torch.compile cannot trace it
        self.softmax_scale = self.d_qk ** -0.5
        if (yarn := config.rope_scaling) is not None and yarn.get("mscale_all_dim"):
            self.softmax_scale *= yarn_mscale(yarn["factor"], yarn["mscale_all_dim"]) ** 2

    def forward(self, x, cos, sin, mask=None, cache=None, pos=0):
        """x: (B, T, D) at positions pos..pos+T-1, whose RoPE angles are cos, sin. Returns (B, T, D).

        mask: (B, 1, T, T) bool for pos = 0, what a query sees (default: all), further limited by causality
        and `visible`. cache: (B, S, d_c + d_rope), the caller's, S >= pos+T, which holds positions 0..pos-1;
        the new positions are written into it.
        """
        B, T, _ = x.shape
        if self.q_lora_rank is None:
            q = self.q_proj(x)
        else:
            q = self.q_b_proj(self.q_a_layernorm(self.q_a_proj(x)))             # Eq. 6, 7
        q_c, q_r = q.view(B, T, self.H, self.d_qk).split([self.d_nope, self.d_rope], -1)    # (B, T, H, ·)
        c_kv, k_r = self.kv_a_proj_with_mqa(x).split([self.d_c, self.d_rope], -1)           # Eq. 1; (B, T, ·)
        c_kv = self.kv_a_layernorm(c_kv)
        # k_r goes along as one more head
        q_r, k_r = rotate(torch.cat([q_r, k_r[:, :, None]], 2), cos, sin).split([self.H, 1], 2)     # Eq. 8, 3
        if cache is not None:
            cache[:, pos:pos + T] = torch.cat([c_kv, k_r[:, :, 0]], -1)
        if pos > 0 and T <= 16 and self.can_absorb():
            # Drafts attend one at a time, so verification reproduces plain decoding bit for bit
            o = torch.cat([self.attend_absorbed(q_c[:, t:t + 1], q_r[:, t:t + 1], cache[:, :pos + t + 1])
                           for t in range(T)], 1)
        else:
            if pos > 0:     # a later chunk of a long prompt: with many queries, expanding the cache pays
                c_kv, k_r = cache[:, :pos + T, None].split([self.d_c, self.d_rope], -1)
            o = self.attend_naive(q_c, q_r, c_kv, k_r, self.causal_mask(pos, T, x.device, mask))
        return self.o_proj(o.flatten(2))                                        # Eq. 11

    def causal_mask(self, pos, T, device, mask=None):
        """What queries at pos..pos+T-1 see: bool (T, pos + T) or mask's shape, None for plain causal
        attention, which kernels do without a mask."""
        if pos == 0 and self.visible is None and mask is None:
            return None
        query, key = torch.arange(pos, pos + T, device=device)[:, None], torch.arange(pos + T, device=device)
        seen = key <= query
        if self.visible is not None:
            seen = seen & self.visible(query, key)
        return seen if mask is None else seen & mask

    def can_absorb(self):
        """Absorbed attention reads kv_b_proj.weight and would ignore an adapter or a hook."""
        layer = self.kv_b_proj
        changed = "forward" in vars(layer) or layer._forward_hooks or layer._forward_pre_hooks
        plain = type(layer) is nn.Linear and type(layer.weight) is nn.Parameter and layer.bias is None
        return plain and not changed

    def attend_naive(self, q_c, q_r, c_kv, k_r, mask=None):
        """Eq. 2-5, 9, 10 as they stand. q_c, q_r: (B, T, H, ·); c_kv: (B, S, d_c); k_r: (B, S, 1, d_rope);
        mask: bool, broadcast to (B, H, T, S) (default: causal, for T = S). Returns (B, T, H, d_v)."""
        (B, T, H, _), S = q_c.shape, c_kv.size(1)
        kv = self.kv_b_proj(c_kv).view(B, S, H, self.d_nope + self.d_v)
        k_c, v = kv.split([self.d_nope, self.d_v], -1)                          # Eq. 2, 5
        q = torch.cat([q_c, q_r], -1).transpose(1, 2)                           # Eq. 9; (B, H, T, d_qk)
        k = torch.cat([k_c, k_r.expand(-1, -1, H, -1)], -1).transpose(1, 2)     # Eq. 4; (B, H, S, d_qk)
        v = v.transpose(1, 2)                                                   # (B, H, S, d_v)
        return self.attention(q, k, v, mask).transpose(1, 2)                    # Eq. 10; (B, T, H, d_v)

    def attention(self, q, k, v, mask):
        """softmax(scale * q k^T) v. q, k: (B, H, ·, d_qk); v: (B, H, S, d_v). Returns (B, H, T, d_v)."""
        T, S = q.size(2), k.size(2)
        if q.device.type == "cpu" and q.dtype == torch.bfloat16 and S <= 512:
            # two plain products are faster there, as long as (B, H, T, S) stays small
            seen = torch.ones(T, S, dtype=torch.bool).tril() if mask is None else mask
            if mask is None and T > 128:        # 128 queries at a time leave out most of the keys after them
                return torch.cat([self.attention(q[:, :, i:i + 128], k[:, :, :i + 128], v[:, :, :i + 128],
                                                 seen[i:i + 128, :i + 128]) for i in range(0, T, 128)], 2)
            bias = q.new_zeros(seen.shape).masked_fill(~seen, -math.inf)
            return (self.softmax_scale * q @ k.mT + bias).softmax(-1) @ v
        # PyTorch prefers cuDNN on Hopper and data-center Blackwell; it takes a v narrower than the keys. The
        # other fast kernels do not: zeros appended to v come out as zeros and are cut off
        cudnn = q.is_cuda and q.dtype != torch.float32 and mask is None
        if not cudnn or torch.cuda.get_device_properties(q.device).major not in (9, 10):
            v = F.pad(v, (0, max(self.d_qk - self.d_v, 0)))
        options = dict(attn_mask=mask, is_causal=mask is None, scale=self.softmax_scale)
        if q.is_cuda and mask is not None:          # not cuDNN, whose gradient can be NaN (pytorch#196678)
            kernels = torch.nn.attention.SDPBackend
            with torch.nn.attention.sdpa_kernel([kernels.EFFICIENT_ATTENTION, kernels.MATH]):
                o = F.scaled_dot_product_attention(q, k, v, **options)
        else:
            o = F.scaled_dot_product_attention(q, k, v, **options)
        return o[..., :self.d_v]

    def attend_absorbed(self, q_c, q_r, cache):
        """The same for one query at the cache's last position, without expanding a single key or value.

        q_c · (W^UK c_kv) = (W^UK^T q_c) · c_kv, so the latent itself is key and value of all heads
        (multi-query attention), and W^UV follows the weighted sum. q_c, q_r: (B, 1, H, ·);
        cache: (B, S, d_c + d_rope). Returns (B, 1, H, d_v).
        """
        B, _, H, _ = q_c.shape
        w = self.kv_b_proj.weight.view(H, self.d_nope + self.d_v, self.d_c).type_as(q_c)
        w_uk, w_uv = w.split([self.d_nope, self.d_v], 1)                        # (H, ·, d_c)
        q_c = torch.bmm(q_c[:, 0].transpose(0, 1), w_uk).transpose(0, 1)        # (B, H, d_c)
        # The heads are queries to the one latent "head". A CPU's cores share them in groups; a GPU takes one
        # group, since more would copy the cache
        G = math.gcd(H, self.cores) if q_c.device.type == "cpu" else 1
        q = torch.cat([q_c, q_r[:, 0]], -1).view(B, G, H // G, -1)              # (B, G, H/G, d_c + d_rope)
        kv = cache[:, None].type_as(q)                                          # (B, 1, S, d_c + d_rope)
        seen = None
        if self.visible is not None:
            key = torch.arange(cache.size(1), device=q.device)
            seen = self.visible(key[-1:, None], key)                            # (1, S)
        # k_r rides along as part of the "value", so that key and value are one tensor, and is cut off
        o = F.scaled_dot_product_attention(q, kv, kv, attn_mask=seen, scale=self.softmax_scale,
                                           enable_gqa=G > 1)                    # (B, G, H/G, d_c + d_rope)
        o = torch.bmm(o[..., :self.d_c].reshape(B, H, -1).transpose(0, 1), w_uv.mT)         # (H, B, d_v)
        return o.transpose(0, 1)[:, None]                                       # (B, 1, H, d_v)


# ------------------------------------------------------------------------------------------------------------
# Feed-forward

class MLP(nn.Module):
    """SwiGLU: down(silu(gate(x)) * up(x)), the FFN of dense layers and of the shared experts.

    Copy along: nothing.
    """

    def __init__(self, hidden_size, intermediate_size):
        super().__init__()
        self.gate_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.up_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.down_proj = nn.Linear(intermediate_size, hidden_size, bias=False)

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Gate(nn.Module):
    """The router (§2.1.2): sigmoid affinities; a bias steers which experts are *selected*, not their weights.

    Auxiliary-loss-free load balancing: after each step the bias of an overloaded expert goes down by gamma
    and that of an underloaded one goes up (`update_bias`). No gradient is involved, so the loss pays nothing.
    Copy along: nothing.
    """

    def __init__(self, config):
        super().__init__()
        self.K, self.n_group, self.topk_group = config.num_experts_per_tok, config.n_group, config.topk_group
        self.norm_topk_prob, self.scaling = config.norm_topk_prob, config.routed_scaling_factor
        self.weight = nn.Parameter(torch.empty(config.n_routed_experts, config.hidden_size))    # e_i
        nn.init.normal_(self.weight, std=config.initializer_range)
        bias = torch.zeros(config.n_routed_experts, dtype=torch.float32)
        self.register_buffer("e_score_correction_bias", bias)                   # b_i

    def _apply(self, fn, recurse=True):
        """Keep the bias in fp32 in model.to(bfloat16): bf16 cannot add gamma to one near 5, as released."""
        bias = self.e_score_correction_bias
        super()._apply(fn, recurse)
        if self.e_score_correction_bias.dtype != torch.float32:
            self.e_score_correction_bias = bias.to(self.e_score_correction_bias.device)
        return self

    def forward(self, x):
        """x: (..., D) -> weights (..., K) fp32, experts (..., K) int64, scores (..., E) fp32."""
        with torch.autocast(x.device.type, enabled=False):              # in fp32, even under autocast
            scores = F.linear(x.float(), self.weight.float()).sigmoid()         # Eq. 15
        choice = scores.detach() + self.e_score_correction_bias                 # Eq. 16
        if self.n_group > 1:
            groups = choice.unflatten(-1, (self.n_group, -1))                   # (..., G, E/G)
            group_score = groups.topk(min(2, groups.size(-1)), -1).values.sum(-1)  # its two best; (..., G)
            kept = group_score.topk(self.topk_group, -1).indices                # (..., topk_group)
            dropped = torch.ones_like(group_score, dtype=torch.bool).scatter_(-1, kept, False)
            # -inf, not 0: with negative biases 0 would beat every expert of the kept groups
            choice = groups.masked_fill(dropped[..., None], -math.inf).flatten(-2)          # (..., E)
        experts = choice.topk(self.K, -1, sorted=False).indices                 # Eq. 14, on s + b
        weights = scores.gather(-1, experts)                                    # on s alone
        if self.norm_topk_prob:
            weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)         # Eq. 13
        return weights * self.scaling, experts, scores

    @torch.no_grad()
    def update_bias(self, load, speed):
        """b_i += gamma * sign(mean load - load_i). load: (E,) tokens per expert in the whole global batch."""
        load = load.to(self.e_score_correction_bias)                            # fp32: exact up to 2^24
        self.e_score_correction_bias += speed * torch.sign(load.mean() - load)


def balance_loss(scores, K):
    """Sequence-wise balance loss without its alpha (Eq. 17-20): 1 when each sequence uses the experts evenly.

    scores: (B, T, E) affinities. Returns a scalar, the mean over the sequences.
    """
    B, T, E = scores.shape
    # Eq. 18 counts on the unbiased scores and without groups
    top = scores.detach().topk(K, -1).indices
    picked = torch.zeros_like(scores, requires_grad=False).scatter_(-1, top, 1.0)               # (B, T, E)
    f = picked.sum(1) * (E / (K * T))                                           # Eq. 18; (B, E)
    P = (scores / (scores.sum(-1, keepdim=True) + 1e-20)).mean(1)               # Eq. 19, 20; (B, E)
    return (f * P).sum(-1).mean()                                               # Eq. 17


def compute_dtype(x):
    """The dtype of products with x: autocast's where it is on, else x's own."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


@torch._disable_dynamo      # torch.compiler.disable would import the compiler: a second for every start
def untraced_grouped_mm(x, weight, offs):
    """torch.compile traces grouped_mm in bf16 only: in other dtypes it runs as it is, between two graphs."""
    return F.grouped_mm(x, weight, offs=offs)


def grouped_linear(x, weight, ends):
    """One linear layer per expert. x: (M, in), its rows sorted by expert; weight: (E, out, in); -> (M, out).

    ends: (E,) int32, expert e owns rows ends[e-1]..ends[e]-1, or none; rows from ends[-1] on are undefined.
    None: every expert owns M/E rows.
    """
    x, weight = (t.to(compute_dtype(x)) for t in (x, weight))       # grouped_mm isn't on autocast's list
    if ends is None:
        return torch.bmm(x.view(weight.size(0), -1, x.size(1)), weight.mT).flatten(0, 1)
    if x.element_size() < 8 and all(size * x.element_size() % 16 == 0 for size in weight.shape[1:]):
        traceable = x.dtype == torch.bfloat16 or not torch.compiler.is_compiling()
        return (F.grouped_mm if traceable else untraced_grouped_mm)(x, weight.transpose(1, 2), offs=ends)
    # grouped_mm wants rows of a multiple of 16 bytes and no float64: the rest goes expert by expert
    *parts, rest = x.tensor_split(ends.tolist())
    y = [F.linear(x_e, w_e) for x_e, w_e in zip(parts, weight)]
    return torch.cat([*y, rest.new_zeros(rest.size(0), weight.size(1))])


class ToRows(torch.autograd.Function):
    """x (N, D) -> x[token] (rows, D), token: (rows,). The gradient is gathered by place (N*K,), the row of
    each slot: that of x[token] itself would add with atomics on a GPU.

    Copy along: nothing.
    """

    @staticmethod
    def forward(ctx, x, token, place):
        ctx.save_for_backward(place)
        ctx.N = x.size(0)
        return x.index_select(0, token)

    @staticmethod
    def backward(ctx, dy):
        place, = ctx.saved_tensors
        return dy.index_select(0, place).unflatten(0, (ctx.N, -1)).sum(1), None, None


class FromRows(torch.autograd.Function):
    """y (rows, D) -> y[place] (N*K, D). Rows without a slot get a gradient of zero.

    Copy along: nothing.
    """

    @staticmethod
    def forward(ctx, y, place):
        ctx.save_for_backward(place)
        ctx.rows = y.size(0)
        return y.index_select(0, place)

    @staticmethod
    def backward(ctx, dy):
        place, = ctx.saved_tensors
        new = dy.new_empty if ctx.rows == place.size(0) else dy.new_zeros
        return new(ctx.rows, dy.size(1)).index_copy_(0, place, dy), None


class Experts(nn.Module):
    """The routed experts, stacked, each a SwiGLU MLP: a token visits all its K experts, none is dropped.

    The rows of an expert lie side by side, so that a layer of all experts is one grouped matrix product.
    Copy along: compute_dtype, untraced_grouped_mm, grouped_linear, ToRows, FromRows.
    """

    def __init__(self, config):
        super().__init__()
        E, D, I = config.n_routed_experts, config.hidden_size, config.moe_intermediate_size
        self.gate_proj = nn.Parameter(torch.empty(E, I, D))
        self.up_proj = nn.Parameter(torch.empty(E, I, D))
        self.down_proj = nn.Parameter(torch.empty(E, D, I))
        for p in self.parameters():
            nn.init.normal_(p, std=config.initializer_range)

    def forward(self, x, weights, experts):
        """x: (N, D); weights, experts: (N, K). Returns the weighted sum (N, D) and the load (E,) int64."""
        N, K = experts.shape
        slots = experts.flatten()           # (N*K,): slot n*K + k is token n at its k-th expert
        load = slots.new_zeros(self.gate_proj.size(0))
        load.scatter_add_(0, slots, torch.ones_like(slots))         # bincount would wait for a GPU
        # On a CPU grouped_mm makes a call per expert, idle or not: too many for the few slots of decoding
        few = x.device.type == "cpu" and N * K < load.size(0)
        y = self.gathered(x, slots, K) if few else self.grouped(x, slots, load)             # (N*K, D)
        return torch.bmm(weights.type_as(y)[:, None], y.view(N, K, -1))[:, 0], load

    def padding(self, x, load):
        """(multiple, least, equal): each expert gets a multiple of `multiple` rows, for `least` tokens or
        more; equal: that is `multiple` rows for every expert."""
        bf16, E = compute_dtype(x) == torch.bfloat16, load.size(0)
        if not x.is_cuda:       # oneDNN compiles a bf16 kernel for each number of rows that it meets
            return 128 if bf16 else 1, 0, False
        # grouped_mm is one kernel for bf16 on sm_90 and sm_100. Elsewhere each of its nine calls in a
        # training step waits for the GPU and launches a product per expert; batched products wait only here
        if not bf16 or torch.cuda.get_device_properties(x.device).major not in (9, 10):
            busiest, slots = torch.stack([load.max(), load.sum()]).tolist()
            if busiest * E <= 2 * slots:
                return busiest, 1, True
        return 1, int(torch.is_grad_enabled()), False       # idle experts: garbage gradients (pytorch#172439)

    def grouped(self, x, slots, load):
        """x: (N, D); slots: (N*K,), the expert of each; load: (E,). Returns (N*K, D), by slot."""
        (multiple, least, equal), E = self.padding(x, load), load.size(0)
        size = (load.clamp(min=least) + multiple - 1) // multiple * multiple    # (E,): rows, with padding
        ends = size.cumsum(0)
        if x.is_cuda or torch.compiler.is_compiling():
            # the most rows there can be: to wait for the exact number would cost more
            most = slots.size(0) + E * least
            rows = E * multiple if equal else (most + min(E, most) * (multiple - 1)) // multiple * multiple
        else:
            rows = int(ends[-1])

        order = slots.argsort(stable=True)                                      # slots, sorted by expert
        shift = (ends - size) - (load.cumsum(0) - load)                         # (E,): padding before it
        row = torch.arange(slots.size(0), device=x.device) + shift[slots[order]]
        place = torch.empty_like(order).index_copy_(0, order, row)              # (N*K,): row of each slot
        y = self.swiglu(x, place, rows, None if equal else ends.to(torch.int32))            # (rows, D)
        return FromRows.apply(y, place)

    def swiglu(self, x, place, rows, ends):
        """Each expert's MLP on its rows. x: (N, D); place: (N*K,), the row of each slot; ends: (E,) int32,
        the end of each expert's rows; None: all have rows/E. Returns (rows, D), undefined without a slot."""
        N, slots = x.size(0), torch.arange(place.size(0), device=x.device)
        token = place.new_zeros(rows).index_copy_(0, place, slots * N // place.size(0))     # 0 in padding
        x = ToRows.apply(x.to(compute_dtype(x)), token, place)                  # (rows, D), by expert
        g, u = grouped_linear(x, self.gate_proj, ends), grouped_linear(x, self.up_proj, ends)
        h = F.silu(g) * u                                                       # (rows, I)
        return grouped_linear(h, self.down_proj, ends)

    def gathered(self, x, slots, K):
        """Each slot on its own, with its expert's matrices copied out. Returns (N*K, D), by slot."""
        def linear(x, weight):                                                  # (N*K, in) -> (N*K, out)
            if torch.compiler.is_compiling():       # one loop, which reads the weights where they are
                return (weight[slots] * x[:, None]).sum(-1)
            # gather copies a CPU's rows two to three times as fast as weight[slots]
            flat = weight.flatten(1)                                            # (E, out*in)
            weight = flat.gather(0, slots[:, None].expand(-1, flat.size(1))).view(-1, *weight.shape[1:])
            return torch.bmm(x[:, None], weight.mT)[:, 0]
        x = x[:, None].expand(-1, K, -1).flatten(0, 1)                          # (N*K, D)
        return linear(F.silu(linear(x, self.gate_proj)) * linear(x, self.up_proj), self.down_proj)


class MoE(nn.Module):
    """DeepSeekMoE (Eq. 12): shared experts that see every token plus K of E fine-grained routed experts.

    Copy along: MLP, Gate, Experts.
    """

    def __init__(self, config):
        super().__init__()
        self.gate = Gate(config)
        self.experts = Experts(config)
        self.n_shared = config.n_shared_experts
        if self.n_shared:       # n_shared experts side by side are one MLP of n_shared times the width
            self.shared_experts = MLP(config.hidden_size, self.n_shared * config.moe_intermediate_size)

    def forward(self, x):
        """x: (B, T, D). Returns y (B, T, D), load (E,) int64 tokens per expert, scores (B, T, E) fp32."""
        weights, experts, scores = self.gate(x)
        y, load = self.experts(x.flatten(0, -2), weights.flatten(0, -2), experts.flatten(0, -2))
        y = y.view_as(x)
        if self.n_shared:
            y = y + self.shared_experts(x)
        return y, load, scores


# ------------------------------------------------------------------------------------------------------------
# Layers and model

class Block(nn.Module):
    """One Transformer layer: x + MLA(norm(x)), then x + FFN(norm(x)), the FFN dense or MoE.

    Copy along: RMSNorm, MLA, MLP, MoE.
    """

    def __init__(self, config, moe=True):
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = MLA(config)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MoE(config) if moe else MLP(config.hidden_size, config.intermediate_size)

    def forward(self, x, cos, sin, mask=None, cache=None, pos=0):
        """x: (B, T, D). Returns the new x and the router's (load (E,), scores (B, T, E)), None if dense."""
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, mask, cache, pos)
        h = self.post_attention_layernorm(x)
        if not isinstance(self.mlp, MoE):
            return x + self.mlp(h), None
        y, load, scores = self.mlp(h)
        return x + y, (load, scores)


class MTP(Block):
    """A Multi-Token Prediction module (§2.2): h^{k-1} at position i and token t_{i+k} predict t_{i+k+1}.

    Embedding and output head are the main model's; shared_head.norm is the module's own.
    Copy along: RMSNorm, Block.
    """

    def __init__(self, config):
        super().__init__(config)
        D = config.hidden_size
        self.enorm, self.hnorm = RMSNorm(D, config.rms_norm_eps), RMSNorm(D, config.rms_norm_eps)
        self.eh_proj = nn.Linear(2 * D, D, bias=False)                          # M_k
        self.shared_head = nn.ModuleDict({"norm": RMSNorm(D, config.rms_norm_eps)})

    def forward(self, h, emb, cos, sin, mask=None, cache=None, pos=0):
        """h: h^{k-1} (B, T, D); emb: Emb(t_{i+k}) (B, T, D). Returns h^k and what Block returns besides."""
        # differs from the report: Eq. 21 writes [h; emb], the released weights hold [emb; h]
        x = self.eh_proj(torch.cat([self.enorm(emb), self.hnorm(h)], -1))       # Eq. 21
        return super().forward(x, cos, sin, mask, cache, pos)                   # Eq. 22


def cross_entropy(logits, labels):
    """logits: (..., V); labels: (...), -100 ignored. Their sum in nats, computed in fp32."""
    return F.cross_entropy(logits.flatten(0, -2).float(), labels.flatten(), reduction="sum")


class DeepSeekV3(nn.Module):
    """The whole model. state_dict() has the names of the released checkpoints, with the experts stacked.

    The MTP modules follow the main layers in model.layers, as in the release.
    Copy along: all of this file.
    """

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.source_files = {}      # {name: text} of small files beside the weights that it was loaded from
        c, L, depth = config, config.num_hidden_layers, config.num_nextn_predict_layers
        self.model = nn.ModuleDict({
            "embed_tokens": nn.Embedding(c.vocab_size, c.hidden_size),
            "layers": nn.ModuleList([Block(c, moe=i >= c.first_k_dense_replace) for i in range(L)]
                                    + [MTP(c) for _ in range(depth)]),
            "norm": RMSNorm(c.hidden_size, c.rms_norm_eps)})
        self.lm_head = nn.Linear(c.hidden_size, c.vocab_size, bias=False)
        if c.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight
        for p in self.parameters():         # norms keep their ones
            if p.dim() > 1:
                nn.init.normal_(p, std=c.initializer_range)

    # ----------------------------------------------------------------------------------------------- training

    def forward(self, idx, targets=None, doc_ids=None, mtp_loss_weight=None):
        """Logits and training loss.

        idx, targets: (B, T) int64; targets are idx shifted by one, -100 where there is none. doc_ids: (B, T)
        int64; attention and MTP stay within tokens of one id (default: the report's packing, which crosses
        documents). mtp_loss_weight: lambda, default the config's; as a 0-dim tensor it may change without a
        recompilation.

        Returns logits (B, T, V), None in train mode with targets; loss, a scalar in nats: main + lambda*mtp +
        alpha*balance in train mode, main in eval mode; and aux, a dict of detached main, mtp (mean over
        depths), balance (sum over MoE layers) and load (L, E) int64, the tokens of each expert in each MoE
        layer of the main model, then in each MTP module. Without targets the loss is None and aux is empty.
        ValueError for a token id out of range, T > max_position_embeddings, or idx that is no such tensor.
        """
        self.check_tokens(idx)
        T, L, depth = idx.size(1), self.config.num_hidden_layers, self.config.num_nextn_predict_layers
        # (B, 1, T, T): the query's own document
        mask = None if doc_ids is None else doc_ids[:, None, :, None] == doc_ids[:, None, None, :]
        h, stats = self.main_model(idx, mask)
        logits = None if self.training and targets is not None else self.lm_head(h)
        if targets is None:
            return logits, None, {}
        n = (targets != -100).sum().clamp(min=1)            # T of Eq. 24, also for MTP
        main = (self.head_loss(h, targets) if logits is None else cross_entropy(logits, targets)) / n

        mtp = 0.0       # no tensor: torch.compile may drop its addition, and main.detach() be the loss
        cos, sin = rope_cos_sin(self.config, 0, T, idx.device)
        for k in range(1, min(depth, T - 1) + 1):       # h starts as h^0, the main model's output
            layer = self.model.layers[L + k - 1]
            labels = targets[:, k:]                     # targets[i+k] is t_{i+k+1}; (B, T-k)
            if doc_ids is not None:     # position i may not read t_{i+k} out of another document
                labels = labels.masked_fill(doc_ids[:, k:] != doc_ids[:, :-k], -100)
            emb = self.model.embed_tokens(idx[:, k:])                           # (B, T-k, D)
            cut_mask = None if mask is None else mask[..., :T - k, :T - k]
            h, layer_stats = layer(h[:, :T - k], emb, cos[:T - k], sin[:T - k], cut_mask)
            stats.append(layer_stats)
            mtp = mtp + self.head_loss(layer.shared_head.norm(h), labels) / n / depth       # Eq. 23-25

        K, E = self.config.num_experts_per_tok, self.config.n_routed_experts
        balance = sum(balance_loss(scores, K) for _, scores in stats)
        loads = [load for load, _ in stats]
        loads += [idx.new_zeros(E)] * (depth - max(T - 1, 0))       # MTP modules beyond the sequence
        load = torch.stack(loads) if loads else idx.new_zeros(0, E)
        loss = main
        if self.training:
            weight = self.config.mtp_loss_weight if mtp_loss_weight is None else mtp_loss_weight
            loss = main + weight * mtp + self.config.balance_loss_alpha * balance
        mtp, balance = (main.new_zeros(()) + part for part in (mtp, balance))
        aux = {"main": main.detach(), "mtp": mtp.detach(), "balance": balance.detach(), "load": load}
        return logits, loss, aux

    def main_model(self, idx, mask=None, cache=None, pos=0):
        """idx: (B, T) at positions pos.. -> h^0 (B, T, D), normalised, and per MoE layer (load, scores)."""
        x = self.model.embed_tokens(idx)
        cos, sin = rope_cos_sin(self.config, pos, pos + idx.size(1), idx.device)
        stats = []
        for i in range(self.config.num_hidden_layers):
            layer_cache = None if cache is None else cache[i]
            x, layer_stats = self.model.layers[i](x, cos, sin, mask, cache=layer_cache, pos=pos)
            if layer_stats is not None:
                stats.append(layer_stats)
        return self.model.norm(x), stats

    def check_tokens(self, idx, others=0):
        """others: how many tokens the sequence has before and after these."""
        if not isinstance(idx, torch.Tensor) or idx.dtype != torch.int64 or idx.dim() != 2:
            got = f"{idx.dtype} {tuple(idx.shape)}" if isinstance(idx, torch.Tensor) else type(idx).__name__
            raise ValueError(f"tokens must be an int64 tensor (B, T), got {got}; for lists of different "
                             "lengths: for p in prompts: model.generate(torch.tensor([p]), max_new_tokens)")
        if idx.numel() == 0:
            raise ValueError(f"the batch or prompt is empty, with the shape {tuple(idx.shape)}: give at "
                             "least one token, such as the document separator")
        if (length := idx.size(1) + others) > self.config.max_position_embeddings:
            raise ValueError(f"a sequence of {length} tokens is longer than max_position_embeddings="
                             f"{self.config.max_position_embeddings}; shorten it, or extend the context with "
                             "YaRN (rope_scaling) and raise max_position_embeddings")
        # on a GPU this check would wait for the device: the data's loader has to look there
        if idx.device.type == "cpu" and not torch.compiler.is_compiling():
            low, high = idx.aminmax()
            if low < 0 or high >= self.config.vocab_size:
                bad = int(low if low < 0 else high)
                size = self.config.vocab_size
                raise ValueError(f"token id {bad} is outside the vocabulary of {size} (0 to {size - 1}); was "
                                 "the text encoded with another tokenizer?")

    def head_loss(self, h, labels):
        """cross_entropy of the head's logits for h (B, T, D), a chunk of tokens at a time: all logits are the
        largest tensor of a training step, so the backward pass computes each chunk's again."""
        def of_chunk(h, labels):
            return cross_entropy(self.lm_head(h), labels)
        tokens = max(LOSS_CHUNK // self.config.vocab_size, 1)
        if labels.numel() <= tokens:
            return of_chunk(h, labels)
        chunks = zip(h.flatten(0, 1).split(tokens), labels.flatten().split(tokens))
        recomputed = partial(torch.utils.checkpoint.checkpoint, use_reentrant=False, preserve_rng_state=False)
        return sum(recomputed(of_chunk, *chunk) for chunk in chunks)

    def update_router_bias(self, load, speed=None):
        """Auxiliary-loss-free balancing (Eq. 16): once per optimizer step, outside forward.

        load: aux["load"] (L, E), summed over the step's micro-batches and ranks. speed: gamma.
        """
        gates = [m for m in self.modules() if isinstance(m, Gate)]      # in the order of load's rows
        if load.shape != (len(gates), self.config.n_routed_experts):
            raise ValueError(f"load must have the shape ({len(gates)}, {self.config.n_routed_experts}), a "
                             f"row per MoE layer, MTP modules included; got {tuple(load.shape)}")
        for gate, layer_load in zip(gates, load):
            gate.update_bias(layer_load, self.config.bias_update_speed if speed is None else speed)

    def num_params(self, active=False, mtp=False):
        """Parameters of the main model, embedding and head included; router biases are buffers and do not
        count. active: only those that one token meets (K of E routed experts). mtp: the MTP modules too."""
        c, total = self.config, 0
        share = c.num_experts_per_tok / c.n_routed_experts
        extra = tuple(f"model.layers.{i}." for i in range(c.num_hidden_layers, len(self.model.layers)))
        for name, p in self.named_parameters():     # a tied head appears once
            if mtp or not name.startswith(extra):
                total += round(p.numel() * share) if active and ".mlp.experts." in name else p.numel()
        return total

    def flops_per_token(self, T):
        """Model FLOPs of one training token (forward and backward) in sequences of T: 6 per active matrix
        weight, MTP included, and 6 per query-key and attention-value product, (T+1)/2 per causal query."""
        c, depth = self.config, self.config.num_nextn_predict_layers
        head = self.lm_head.weight.numel()
        embeddings = head if c.tie_word_embeddings else 2 * head
        norms = sum(p.numel() for p in self.parameters() if p.dim() == 1)
        # the embedding is looked up, the head is applied once per depth
        matrices = self.num_params(active=True, mtp=True) - norms - embeddings + head * (1 + depth)
        per_pair = c.num_attention_heads * (c.qk_nope_head_dim + c.qk_rope_head_dim + c.v_head_dim)
        return 6 * matrices + 6 * (c.num_hidden_layers + depth) * per_pair * (T + 1) / 2

    # ----------------------------------------------------------------------------------- released checkpoints

    @classmethod
    def from_pretrained(cls, dir, dtype=None, device=None, **changes):
        """A model in eval mode from a folder in the released format, or from its id on the Hugging Face Hub.

        dtype: of all weights; default: the embedding's in the files (FP8 becomes bfloat16).
        torch.float8_e4m3fn: linear layers hold and compute in FP8 (fp8.py), the rest in bfloat16. changes:
        fields of the config to override. MTP modules that the files lack are left out. Peak memory: the model
        and one tensor.
        ValueError for damaged files and for tensors other than the config asks for.
        """
        import checkpoint
        return checkpoint.load(cls, dir, dtype, device, **changes)

    def save_pretrained(self, dir, encoding=None, fp8=False, shard_bytes=5 * 10**9, ends=None):
        """Write the model in the released format, for from_pretrained and for transformers.

        encoding, ends: a tiktoken.Encoding and its data.tokenizer.Ends, for tokenizer files; default: what
        the model was loaded with. fp8: linear layers in FP8 with a scale per 128x128 block, the rest in bf16,
        as released. An earlier checkpoint in dir stays intact until the new one is written. To export a run:

            model, encoding, ends, _ = sample.load("out", "cpu")
            model.save_pretrained("export", encoding, ends=ends)
        """
        import checkpoint
        checkpoint.save(self, dir, encoding, fp8, shard_bytes, ends)

    # --------------------------------------------------------------------------------------------- generation

    def new_cache(self, batch_size, length, mtp=False):
        """The latent cache for `length` positions, kept by the caller: a list of (B, length, kv_lora_rank +
        qk_rope_head_dim) tensors in the model's dtype, one per layer, then with mtp one per MTP module."""
        like, c = self.lm_head.weight, self.config
        layers = c.num_hidden_layers + (c.num_nextn_predict_layers if mtp else 0)
        size = batch_size, length, c.kv_lora_rank + c.qk_rope_head_dim
        return [like.new_zeros(size) for _ in range(layers)]

    @torch.no_grad()
    def decode(self, idx, cache, pos):
        """Logits (B, T, V) of tokens idx (B, T) at positions pos..pos+T-1, given a cache that holds 0..pos-1,
        to which the new ones are added. To go back to an earlier position, call with that pos: later ones are
        overwritten. ValueError for a token id out of range or more tokens than the cache holds."""
        return self.lm_head(self.prefill(idx, cache, pos))

    @torch.inference_mode()
    def prefill(self, idx, cache, pos=0):
        """h^0 (B, T, D) of T tokens from pos on, in chunks, which bound the memory of a long prompt. It is an
        inference tensor: autograd does not take it."""
        self.check_tokens(idx, pos)
        end = pos + idx.size(1)
        if end > cache[0].size(1):
            raise ValueError(f"the cache holds {cache[0].size(1)} positions, {end} are needed; make it with "
                             f"new_cache(batch_size, {end})")
        return torch.cat([self.main_model(idx[:, i:i + PREFILL_CHUNK], cache=cache, pos=pos + i)[0]
                          for i in range(0, idx.size(1), PREFILL_CHUNK)], 1)

    def check_prompt(self, idx, max_new_tokens):
        if max_new_tokens < 0:
            raise ValueError(f"max_new_tokens must be at least 0, got {max_new_tokens}")
        self.check_tokens(idx, max_new_tokens)

    @torch.no_grad()
    def generate(self, idx, max_new_tokens, temperature=1.0, top_k=None, top_p=None, stop=(), generator=None):
        """Continue the prompts idx (B, T) int64 -> (B, T + new) int64, one token per forward pass.

        temperature 0 is greedy. top_k keeps the k likeliest tokens, top_p the likeliest that together reach
        probability p. stop: token ids; a row that produced one repeats it until every row has. ValueError for
        an argument out of range. sample.generate_stream drafts with the MTP modules: several tokens per pass.
        """
        self.check_prompt(idx, max_new_tokens)
        B, T = idx.shape
        stop = torch.tensor(sorted(stop), dtype=torch.int64, device=idx.device)
        done = torch.zeros(B, 1, dtype=torch.bool, device=idx.device)
        cache, pos = self.new_cache(B, T + max_new_tokens), 0           # the cache holds positions 0..pos-1
        for _ in range(max_new_tokens):
            h = self.prefill(idx[:, pos:], cache, pos)[:, -1:]                  # (B, 1, D)
            pos = idx.size(1)
            token = draw(sampling_probs(self.lm_head(h), temperature, top_k, top_p), generator)     # (B, 1)
            token = torch.where(done, idx[:, -1:], token)
            idx = torch.cat([idx, token], 1)
            done = done | torch.isin(token, stop)
            if stop.numel() and done.all():
                break
        return idx


# ------------------------------------------------------------------------------------------------------------
# Sampling

def sampling_probs(logits, temperature=1.0, top_k=None, top_p=None):
    """logits: (..., V) -> probabilities (..., V) fp32 to sample from."""
    if not 0 <= temperature < math.inf:
        raise ValueError(f"temperature must be a finite number >= 0 (0 is greedy), got {temperature}")
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k must be at least 1, got {top_k}")
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"top_p must be over 0 and at most 1, got {top_p}")
    logits = logits.float()
    if temperature == 0:
        return torch.zeros_like(logits).scatter_(-1, logits.argmax(-1, keepdim=True), 1.0)
    # the maximum at 0 doesn't overflow at any temperature; one below fp32's smallest number would be 0 there
    logits = (logits - logits.amax(-1, keepdim=True)) / max(temperature, 1e-30)
    if top_k is not None and top_k < logits.size(-1):
        kth = logits.topk(top_k, -1).values[..., -1:]
        logits = logits.masked_fill(logits < kth, -math.inf)
    probs = logits.softmax(-1)
    if top_p is not None and top_p < 1:
        p, order = probs.sort(-1, descending=True)
        p = p.masked_fill(p.cumsum(-1) - p >= max(top_p, 1e-30), 0.0)       # what comes before reaches top_p
        probs = torch.zeros_like(probs).scatter_(-1, order, p)
        probs = probs / probs.sum(-1, keepdim=True)
    return probs


def draw(probs, generator):
    """probs: (B, 1, V) -> (B, 1) int64. torch.multinomial does the same, with checks that wait for a GPU."""
    waiting = torch.empty_like(probs[:, 0]).exponential_(generator=generator)
    return (probs[:, 0] / waiting).argmax(-1, keepdim=True)


PREFILL_CHUNK = 1024    # tokens that a prompt is read in at a time
LOSS_CHUNK = 2**25      # logits that training holds at a time: 128 MiB in fp32
