"""
Generate text from a run of train.py or a released checkpoint.

    python sample.py --ckpt out
    python sample.py --ckpt out --prompt "def binary_search(" --temperature 0.5 --num_samples 3
    python sample.py --ckpt out --prompt FILE:notes.txt --top_p 0.9 --seed 7
    python sample.py --ckpt out --prefix "def add(a, b):" --suffix "return c"   # fill in the middle
    python sample.py --ckpt Moonlight-16B-A3B --prompt "Once"       # a folder with config.json, *.safetensors

Without a prompt the model begins a new document. Generation stops at the end of the document or after
--max_new_tokens. Text that outgrows the length a run was trained on continues from its last half. --prefix
and --suffix need a model whose data were prepared with --fim_rate.

Where the model has MTP modules, a forward pass yields several tokens: speculative decoding (report, §5.4.3).
One round, for the newest token t_p, which is not in the cache yet:

    draft    MTP module k = 1..depth reads h^{k-1} and the token k ahead, and draws t_{p+k} from its q
    verify   one pass of the main model over t_p and the drafts gives p, a distribution for each successor
    keep     drafts from the left, each with probability min(1, p/q), and one more token: 1 to depth + 1

Rejected drafts stay in the caches until they are overwritten. Without MTP modules a round is a plain step.
Shapes      B batch, T tokens of the prompt, t tokens of a part, D hidden size, V vocabulary
"""

import signal

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)    # Ctrl-C needs no traceback, not even out of the imports

import argparse
import codecs
import math
import os
import sys
import time
from functools import partial
from pathlib import Path
from typing import NamedTuple

import tiktoken
import torch

from checkpoint import fitting, has_bf16, load_run, model_of_run, pick_device, released_folder
from data.prepare import Parser
from data.tokenizer import (Ends, encode, encoding_from_json, ends_of_data, fim_ids, get_tokenizer, read_ends,
                            read_json, token_bytes)
from model import PREFILL_CHUNK, DeepSeekV3, draw, rope_cos_sin, sampling_probs


# ------------------------------------------------------------------------------------------------------------
# Speculative decoding

def draft(model, k, h, next_tokens, cache, pos):
    """MTP module k: h^{k-1} (B, t, D) at positions pos.. and the tokens (B, t) k positions later -> h^k."""
    i = model.config.num_hidden_layers + k - 1
    layer, emb = model.model.layers[i], model.model.embed_tokens(next_tokens)
    cos, sin = rope_cos_sin(model.config, pos, pos + h.size(1), h.device)           # (t, qk_rope_head_dim/2)
    chunks = [slice(a, a + PREFILL_CHUNK) for a in range(0, h.size(1), PREFILL_CHUNK)]
    return torch.cat([layer(h[:, part], emb[:, part], cos[part], sin[part], cache=cache[i],
                            pos=pos + part.start)[0] for part in chunks], 1)        # (B, t, D)


def verify(drafts, q, p, done, generator):
    """Speculative sampling (arXiv 2211.17192): the tokens to keep, (B, n + 1), distributed exactly as p.

    drafts: (B, depth) int64, drawn from q, a list of (B, 1, V); p: (B, depth + 1, V), the main model's. Draft
    x is kept with probability min(1, p(x)/q(x)). The first one rejected is replaced by a draw from
    max(p - q, 0); if none is, one more token comes for free. The rows of a batch stay in step: all keep as
    many drafts as the row with the fewest. That adds no bias: a row that loses accepted drafts to another row
    draws them again. Rows that are done have no say. Greedy decoding is the case of one-hot p and q.
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
    if n == depth:
        return torch.cat([drafts, draw(p[:, n:], generator)], 1)
    excess = (p[:, n] - q[:, n]).clamp(min=0)                                       # (B, V)
    residual = torch.where(excess.sum(-1, keepdim=True) > 0, excess, p[:, n])
    token = draw(residual[:, None], generator)                                      # (B, 1)
    token = torch.where(accepted[:, None] > n, drafts[:, n:n + 1], token)   # a row that accepted it keeps it
    return torch.cat([drafts[:, :n], token], 1)


@torch.inference_mode()
def generate_stream(model, idx, max_new_tokens, temperature=1.0, top_k=None, top_p=None, speculative=None,
                    stop=(), generator=None, stats=None):
    """Continue the prompts idx (B, T) int64; yields tokens (B, 1) int64 as they come.

    The arguments, and the distribution of the text, are those of DeepSeekV3.generate. speculative: draft with
    the MTP modules and verify with the main model; None: where the model has such modules. stats: a dict of
    the caller's in which "forwards", "drafted" and "accepted" are counted up.
    """
    model.check_prompt(idx, max_new_tokens)
    B, T = idx.shape
    depth = 0 if speculative is False else model.config.num_nextn_predict_layers
    if speculative and not depth:
        raise ValueError("speculative decoding needs an MTP module, and this model has none: "
                         "num_nextn_predict_layers=0")
    settings = temperature, top_k, top_p
    stop = torch.tensor(sorted(stop), dtype=torch.int64, device=idx.device)
    stats = {} if stats is None else stats
    for name in "forwards", "drafted", "accepted":
        stats.setdefault(name, 0)

    # drafts may reach beyond the last position that the caller asked for, and are cut off
    tokens = torch.nn.functional.pad(idx, (0, max_new_tokens + depth + 1))
    cache = model.new_cache(B, tokens.size(1), mtp=depth > 0)
    h = model.prefill(idx, cache)        # h^0 of positions start..p-1, for the MTP modules
    new = draw(sampling_probs(model.lm_head(h[:, -1:]), *settings), generator)      # (B, 1)
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

        # Depth k reads h^{k-1} and t_{i+k} at positions i = start..p-1, and drafts t_{p+k}. The last token it
        # reads, t_{p+k-1}, is the newest one for k = 1, and the draft of the depth before for k > 1
        q, x = [], h
        for k in range(1, depth + 1):
            x = draft(model, k, x, tokens[:, start + k:p + k], cache, start)
            norm = model.model.layers[model.config.num_hidden_layers + k - 1].shared_head.norm
            q.append(sampling_probs(model.lm_head(norm(x[:, -1:])), *settings))     # (B, 1, V)
            tokens[:, p + k:p + k + 1] = draw(q[-1], generator)

        # One pass of the main model over the newest token and the drafts: a distribution for each successor
        h_new = model.main_model(tokens[:, p:p + depth + 1], cache=cache, pos=p)[0] # (B, depth + 1, D)
        probs = sampling_probs(model.lm_head(h_new), *settings)                     # (B, depth + 1, V)
        new = verify(tokens[:, p + 1:p + depth + 1], q, probs, done, generator)     # (B, 1 to depth + 1)
        stats["forwards"] += 1
        stats["drafted"] += depth
        stats["accepted"] += new.size(1) - 1
        # up to `again` the MTP caches are made of known tokens; the next round computes the rest once more
        again = max(p - depth + 1, start)
        h = torch.cat([h[:, again - start:], h_new[:, :new.size(1)]], 1) if depth else h_new
        start, p = again, p + 1


# ------------------------------------------------------------------------------------------------------------
# Loading

class Loaded(NamedTuple):
    model: DeepSeekV3               # in eval mode
    encoding: tiktoken.Encoding
    ends: Ends                      # where texts begin and end, in token ids
    window: int | None              # how many positions a run was trained on; None for a released model


def load(path, device, dtype=None, ema=False):
    """A run's folder or ckpt.pt, or a released checkpoint's folder or id on the Hugging Face Hub -> Loaded.

    dtype: of the weights; None: see default_dtype. ema: the moving average of a run's weights.
    """
    path, device = released_folder(path), torch.device(device)
    is_release = (path / "config.json").is_file() and not (path / "ckpt.pt").is_file()
    ckpt = {} if is_release else load_run(path)
    if ema and "ema" not in ckpt:
        raise ValueError(f"--ema: {path} holds no average of its weights; train with --ema_decay, or leave "
                         "the flag out")
    if is_release:
        config, encoding = read_json(path / "config.json"), get_tokenizer(path)
        stored = config.get("dtype", config.get("torch_dtype"))
        stored = "float8_e4m3fn" if config.get("quantization_config") else stored
        model = DeepSeekV3.from_pretrained(path, dtype or default_dtype(stored, device), device)
        return Loaded(model, encoding, read_ends(path, encoding), None)

    model = model_of_run(ckpt, "ema" if ema else "model")
    with fitting(ckpt["path"]):
        encoding, model.ends = encoding_from_json(ckpt["encoding"]), ends_of_data(ckpt["meta"])
    model.to(device, dtype or default_dtype("float32", device))
    return Loaded(model.eval(), encoding, model.ends, model.config.max_position_embeddings)


def default_dtype(stored, device):
    """FP8 where weights are stored in it and the GPU has our kernels; bfloat16 where the device computes in
    it, and a CPU only where they are stored in 16 bits or fewer; else float32."""
    narrow = stored in ("float8_e4m3fn", "bfloat16", "float16")
    if stored == "float8_e4m3fn" and device.type == "cuda":
        from fp8 import kernels_missing     # imports Triton, which nothing else here needs
        if kernels_missing(device) is None:
            return torch.float8_e4m3fn
    if has_bf16(device) and (narrow or device.type == "cuda"):
        return torch.bfloat16
    if narrow:
        print(f"holding the weights, stored in {stored}, in float32, as this {device.type} does not compute "
              "in bfloat16; --dtype bfloat16 takes half the memory, but may be slow", file=sys.stderr)
    return torch.float32


def compile_steps(model):
    """torch.compile the layers for decoding steps, once for all layers of a kind and all lengths of the
    cache. Prompts gain nothing, and are read without it. Has only been run on a CPU."""
    def forward(eager, compiled, x, *args, pos=0, **kwargs):
        return (compiled if pos > 0 and x.size(1) <= 8 else eager)(x, *args, pos=pos, **kwargs)

    # On a CPU, PyTorch's BLAS multiplies one row by a matrix far slower than memory delivers the matrix
    options = {"post_grad_fusion_options": {"decompose_mm_pass": {}}}       # so the compiler writes that loop
    for layer in model.model.layers:
        compiled = torch.compile(layer.forward, dynamic=True, options=options)
        layer.forward = partial(forward, layer.forward, compiled)


# ------------------------------------------------------------------------------------------------------------
# The command line

def parse_args(argv):
    parser = Parser(__doc__)
    parser.add_argument("--ckpt", required=True,
                        help="a run's folder or ckpt.pt, or a released model's folder or id on the Hub")
    parser.add_argument("--ema", action="store_true", help="use the average of a run's weights (--ema_decay)")
    parser.add_argument("--prompt", help="text to continue, or FILE:path")
    parser.add_argument("--prefix", help="fill in the middle: text before the hole, or FILE:path")
    parser.add_argument("--suffix", help="text after the hole, or FILE:path")
    parser.add_argument("--max_new_tokens", type=int, help="default: 500, less where the context is full")
    parser.add_argument("--temperature", type=float, default=0.8, help="0 is greedy")
    parser.add_argument("--top_k", type=int, help="sample from the k likeliest tokens only")
    parser.add_argument("--top_p", type=float, help="sample from the likeliest that together reach p only")
    parser.add_argument("--num_samples", type=int, default=1)
    parser.add_argument("--seed", type=int, default=1337)
    parser.add_argument("--device", default="auto", help="cuda, mps or cpu; auto: the first that is there")
    parser.add_argument("--dtype", default="auto", choices=("auto", "float32", "bfloat16"),
                        help="of the weights; auto: bfloat16 where the device has it and they are not finer")
    parser.add_argument("--speculative", action=argparse.BooleanOptionalAction,
                        help="draft with the MTP modules (default: where the model has any)")
    parser.add_argument("--compile", action="store_true", help="torch.compile decoding: pays for long texts")
    return parser.parse_args(argv)


def read_text(flag, text):
    """The text that a flag gives, itself or as FILE:path."""
    try:
        if text.startswith("FILE:"):
            return Path(text.removeprefix("FILE:")).read_bytes().decode()
        # outside a UTF-8 locale, Python escapes what is not ASCII
        return text.encode("utf-8", "surrogateescape").decode()
    except (UnicodeError, OSError) as e:
        raise ValueError(f"{flag} {ascii(text[:60])} is not UTF-8 text or a file of it: {e}") from None


def prompt_tokens(prompt, encoding, ends):
    """Text to continue -> its tokens, (1, T) int64. None begins a new document."""
    if prompt is None:
        return torch.tensor([[ends.begin]])
    if not prompt:
        raise ValueError("the prompt is empty; leave --prompt out to begin a new document")
    tokens = encode(encoding, prompt, special=True)
    if ends.add_bos and tokens[0] != ends.bos:
        tokens.insert(0, ends.bos)
    return torch.tensor([tokens])


def hole_tokens(prefix, suffix, encoding, ends):
    """The text around a hole -> the tokens that ask for what is in it, (1, T) int64."""
    before, after = encode(encoding, prefix), encode(encoding, suffix)
    fim_begin, fim_hole, fim_end = fim_ids(encoding)
    return torch.tensor([[ends.begin, fim_begin, *before, fim_hole, *after, fim_end]])


def continuation(model, idx, max_new_tokens, stop, **settings):
    """Yields tokens one by one; idx: (1, T) int64. Text beyond the context continues from its last half."""
    count, token, context = 0, None, model.config.max_position_embeddings
    while count < max_new_tokens and token not in stop:
        if idx.size(1) >= context:
            idx = idx[:, -(context // 2):]
        new = min(max_new_tokens - count, context - idx.size(1))
        for token in generate_stream(model, idx, new, stop=stop, **settings):
            idx, token, count = torch.cat([idx, token], 1), token.item(), count + 1
            yield token


def write_text(tokens, stop, encoding, stats):
    """Print text as its tokens come -> a line on speed and speculation."""
    decoder = codecs.getincrementaldecoder("utf-8")("replace")      # a character may be spread over tokens
    count, start = 0, time.monotonic()
    for count, token in enumerate(tokens, 1):
        if token not in stop:
            print(decoder.decode(token_bytes(encoding, token)), end="", flush=True)
    print(decoder.decode(b"", final=True), end="")
    line = f"{count} tokens, {count / (time.monotonic() - start):.0f} tokens/s"
    if stats.get("drafted"):
        line += (f"; drafts accepted {stats['accepted'] / stats['drafted']:.0%}, "
                 f"{1 + stats['accepted'] / stats['forwards']:.2f} tokens per forward pass")
    return line


def run(args):
    hole = args.prefix is not None or args.suffix is not None
    for wrong, sentence in (
            (args.num_samples < 1, f"--num_samples must be at least 1, got {args.num_samples}"),
            ((args.max_new_tokens or 0) < 0,
             f"--max_new_tokens must be at least 0, got {args.max_new_tokens}"),
            (not -2**63 <= args.seed < 2**64, f"--seed must fit in 64 bits, got {args.seed}"),
            (hole and args.prompt is not None,
             "--prompt is continued, --prefix and --suffix surround a hole; give one of the two")):
        if wrong:
            raise ValueError(sentence)
    device = pick_device(args.device)
    dtype = None if args.dtype == "auto" else getattr(torch, args.dtype)
    model, encoding, ends, window = load(args.ckpt, device, dtype, args.ema)
    if hole:
        before, after = read_text("--prefix", args.prefix or ""), read_text("--suffix", args.suffix or "")
        idx = hole_tokens(before, after, encoding, ends)
    else:
        before, after = args.prompt and read_text("--prompt", args.prompt), ""
        idx = prompt_tokens(before, encoding, ends)
    T, context = idx.size(1), model.config.max_position_embeddings
    room = context - T if hole or window is None else math.inf      # a run's text may outgrow its context
    new = min(500, max(room, 1)) if args.max_new_tokens is None else args.max_new_tokens
    if new > room:
        raise ValueError(f"the prompt's {T} tokens leave room for {max(room, 0)} in the model's context of "
                         f"{context}; shorten the prompt, or lower --max_new_tokens")
    model.check_tokens(idx[:, -context:])
    sampling_probs(torch.zeros(1), args.temperature, args.top_k, args.top_p)    # raises what it does not take
    if args.compile:
        print("compiling the decoding step, which takes a minute the first time", file=sys.stderr)
        compile_steps(model)
    generator = torch.Generator(device).manual_seed(args.seed)
    for _ in range(args.num_samples):
        stats = {}
        tokens = continuation(model, idx.to(device), new, ends.eos, temperature=args.temperature,
                              top_k=args.top_k, top_p=args.top_p, speculative=args.speculative,
                              generator=generator, stats=stats)
        print("-" * 80 + "\n" + (before or ""), end="", flush=True)
        line = write_text(tokens, ends.eos, encoding, stats)
        print(after, flush=True)
        print(line, file=sys.stderr)


def main(argv=None):
    args = parse_args(argv)
    try:
        run(args)
    except BrokenPipeError:     # as in `python sample.py | head`; what Python flushes at its end goes nowhere
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
    except (ValueError, OSError, ImportError) as e:
        raise SystemExit(f"sample.py: {e}") from None


if __name__ == "__main__":
    main()
