"""
Text from a DeepSeekV3 model, several tokens per forward pass: speculative decoding with the model's own MTP modules
(report, §5.4.3). Use it as DeepSeekV3.generate and generate_stream.

A round, for the newest token t_p, which is not in the cache yet:

    draft    MTP module k = 1..depth reads h^{k-1} and the token k ahead, and draws t_{p+k} from its distribution q
    verify   one pass of the main model over t_p and the drafts gives p, a distribution for what follows each of them
    keep     drafts from the left, each with probability min(1, p/q), and one token more: 1 to depth + 1 tokens

What was refused stays in the caches until it is overwritten. Without MTP modules a round is the plain step, depth 0.

Shapes      B batch, T tokens of the prompt, t of a part of it, D hidden size, V vocabulary
"""

import math

import torch

import model as deepseek


@torch.inference_mode()
def generate_stream(model, idx, max_new_tokens, temperature=1.0, top_k=None, top_p=None, speculative=None, stop=(),
                    generator=None, stats=None):
    """DeepSeekV3.generate_stream."""
    B, T = idx.shape
    if T == 0:
        raise ValueError("the prompt is empty: give at least one token, such as the document separator")
    if max_new_tokens < 0:
        raise ValueError(f"max_new_tokens must be at least 0, got {max_new_tokens}")
    depth = model.config.num_nextn_predict_layers
    if speculative and not depth:
        raise ValueError("speculative decoding needs an MTP module, and this model has num_nextn_predict_layers=0")
    depth = depth if speculative is None or speculative else 0
    model.check_tokens(idx, T + max_new_tokens)
    probs = lambda h: sampling_probs(model.lm_head(h), temperature, top_k, top_p)   # (B, t, D) -> (B, t, V)
    stop = torch.tensor(sorted(stop), dtype=torch.int64, device=idx.device)
    stats = {} if stats is None else stats
    for name in ("forwards", "drafted", "accepted"):
        stats.setdefault(name, 0)

    # drafts may reach beyond the last position that the caller asked for, and are cut off
    tokens = idx.new_zeros(B, T + max_new_tokens + depth + 1)
    tokens[:, :T] = idx
    cache = model.new_cache(B, tokens.size(1), mtp=depth > 0)
    h = model.prefill(idx, cache)        # h^0 of positions start..p-1, for the MTP modules
    new = draw(probs(h[:, -1:]), generator)                                         # (B, 1)
    start, p, end = 0, T, T + max_new_tokens        # p: position of the newest token, not yet in the cache
    done, last = torch.zeros(B, 1, dtype=torch.bool, device=idx.device), new
    while True:
        for token in new.split(1, 1)[:end - p]:
            last = torch.where(done, last, token)
            with torch.inference_mode(False):        # a tensor that training may use
                token = last.clone()
            yield token
            done = done | torch.isin(last, stop)
            if stop.numel() and done.all():
                return
        tokens[:, p:p + new.size(1)] = new
        p += new.size(1) - 1
        if p + 1 >= end:
            return

        # Each depth k reads h^{k-1} and t_{i+k} at positions i = start..p-1, the token of its last one known (k = 1)
        # or drafted by the depth before, and drafts t_{p+k}
        q, x = [], h
        for k in range(1, depth + 1):
            x = draft(model, k, x, tokens[:, start + k:p + k], cache, start)
            q.append(probs(model.model.layers[model.config.num_hidden_layers + k - 1].shared_head.norm(x[:, -1:])))
            tokens[:, p + k:p + k + 1] = draw(q[-1], generator)

        # One pass of the main model over the newest token and the drafts: a distribution for each's successor
        h_new = model.main_model(tokens[:, p:p + depth + 1], cache=cache, pos=p)[0] # (B, depth + 1, D)
        new = verify(tokens[:, p + 1:p + depth + 1], q, probs(h_new), done, generator)
        stats["forwards"] += 1
        stats["drafted"] += depth
        stats["accepted"] += new.size(1) - 1
        # the MTP caches are right up to where only known tokens were read; from there on they are made again
        again = max(p - depth + 1, start)
        h = torch.cat([h[:, again - start:], h_new[:, :new.size(1)]], 1) if depth else h_new
        start, p = again, p + 1


def draft(model, k, h, next_tokens, cache, pos):
    """h^k (B, t, D) from h^{k-1} (B, t, D) at positions pos.. and the tokens (B, t) k positions later."""
    i = model.config.num_hidden_layers + k - 1
    layer, emb = model.model.layers[i], model.model.embed_tokens(next_tokens)
    out = []
    for a in range(0, h.size(1), deepseek.PREFILL_CHUNK):
        b = min(a + deepseek.PREFILL_CHUNK, h.size(1))
        cos, sin = deepseek.rope_cos_sin(model.config, pos + a, pos + b, h.device)
        out.append(layer(h[:, a:b], emb[:, a:b], cos, sin, cache=cache[i], pos=pos + a)[0])
    return torch.cat(out, 1)


def verify(drafts, q, p, done, generator):
    """Speculative sampling (arXiv 2211.17192): the tokens to keep, (B, n + 1), distributed exactly as p.

    drafts: (B, depth) int64, drawn from q, a list of (B, 1, V); p: (B, depth + 1, V), the main model's. Draft x is
    kept with probability min(1, p(x)/q(x)); the first one refused is replaced by a draw from max(p - q, 0), and
    if none is, a token more comes for free. Rows keep in step: the batch takes as many drafts as its most
    refusing row, which skews nothing, as a draft that another row cut off is simply drawn anew. Rows that are
    done have no say. Greedy decoding is the case of one-hot p and q.
    """
    depth = drafts.size(1)
    if depth == 0:
        return draw(p, generator)
    q = torch.cat(q, 1)                                                             # (B, depth, V)
    p_x, q_x = (t[:, :depth].gather(-1, drafts[..., None])[..., 0] for t in (p, q))     # (B, depth)
    u = torch.rand(p_x.shape, generator=generator, device=p_x.device)
    accepted = (u * q_x < p_x).long().cumprod(1).sum(1)                             # (B,) leading ones
    accepted = accepted.masked_fill(done[:, 0], depth)
    n = int(accepted.min())
    residual = p[:, n]                                                              # (B, V)
    if n < depth:
        excess = (p[:, n] - q[:, n]).clamp(min=0)
        residual = torch.where(excess.sum(-1, keepdim=True) > 0, excess, residual)
    token = draw(residual[:, None], generator)                                      # (B, 1)
    if n < depth:                                                                   # a row that accepted draft n keeps it
        token = torch.where(accepted[:, None] > n, drafts[:, n:n + 1], token)
    return torch.cat([drafts[:, :n], token], 1)


def draw(probs, generator):
    """probs: (B, 1, V) -> (B, 1) int64. What torch.multinomial does, without its checks, which wait for a GPU."""
    return (probs[:, 0] / torch.empty_like(probs[:, 0]).exponential_(generator=generator)).argmax(-1, keepdim=True)


def sampling_probs(logits, temperature=1.0, top_k=None, top_p=None):
    """logits: (..., V) -> probabilities (..., V) fp32 to sample from. ValueError for an argument out of range."""
    if not 0 <= temperature < math.inf:
        raise ValueError(f"temperature must be a finite number >= 0 (0 is greedy), got {temperature}")
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k must be at least 1, got {top_k}")
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"top_p must be over 0 and at most 1, got {top_p}")
    logits = logits.float()
    if temperature == 0:
        return torch.zeros_like(logits).scatter_(-1, logits.argmax(-1, keepdim=True), 1.0)
    logits = (logits - logits.amax(-1, keepdim=True)) / temperature     # the maximum at 0: no overflow at any temperature
    if top_k is not None and top_k < logits.size(-1):
        kth = logits.topk(top_k, -1).values[..., -1:]
        logits = logits.masked_fill(logits < kth, -math.inf)
    probs = logits.softmax(-1)
    if top_p is not None and top_p < 1:
        p, order = probs.sort(-1, descending=True)
        p = p.masked_fill(p.cumsum(-1) - p >= top_p, 0.0)                           # what comes before already reaches top_p
        probs = torch.zeros_like(probs).scatter_(-1, order, p)
        probs = probs / probs.sum(-1, keepdim=True)
    return probs
