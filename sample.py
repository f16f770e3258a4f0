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
    signal.signal(signal.SIGINT, signal.SIG_DFL)    # Ctrl-C during the imports needs no traceback

import argparse
import codecs
import os
import sys
import time
from functools import partial
from pathlib import Path
from typing import NamedTuple

import tiktoken
import torch

from checkpoint import fitting, has_bf16, load_run, pick_device, released_folder, replaced_classes
from data.prepare import Parser
from data.tokenizer import (Ends, encode, encoding_from_json, ends_of_data, fim_ids, get_tokenizer, read_ends,
                            read_json, token_bytes)
from model import PREFILL_CHUNK, DeepSeekV3, DeepSeekV3Config, draw, rope_cos_sin, sampling_probs


# ------------------------------------------------------------------------------------------------------------
# Speculative decoding

def draft(model, k, h, next_tokens, cache, pos):
    """MTP module k: h^{k-1} (B, t, D) at positions pos.. and the tokens (B, t) k positions later -> h^k."""
    i = model.config.num_hidden_layers + k - 1
    layer, emb = model.model.layers[i], model.model.embed_tokens(next_tokens)
    out = []
    for a in range(0, h.size(1), PREFILL_CHUNK):
        b = min(a + PREFILL_CHUNK, h.size(1))
        cos, sin = rope_cos_sin(model.config, pos + a, pos + b, h.device)
        out.append(layer(h[:, a:b], emb[:, a:b], cos, sin, cache=cache[i], pos=pos + a)[0])
    return torch.cat(out, 1)                                                        # (B, t, D)


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
    residual = p[:, n]                                                              # (B, V)
    if n < depth:
        excess = (p[:, n] - q[:, n]).clamp(min=0)
        residual = torch.where(excess.sum(-1, keepdim=True) > 0, excess, residual)
    token = draw(residual[:, None], generator)                                      # (B, 1)
    if n < depth:                               # a row that accepted draft n keeps it
        token = torch.where(accepted[:, None] > n, drafts[:, n:n + 1], token)
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
    depth = model.config.num_nextn_predict_layers
    if speculative and not depth:
        raise ValueError("speculative decoding needs an MTP module, and this model has none: "
                         "num_nextn_predict_layers=0")
    if speculative is False:
        depth = 0
    settings = temperature, top_k, top_p
    stop = torch.tensor(sorted(stop), dtype=torch.int64, device=idx.device)
    stats = {} if stats is None else stats
    for name in ("forwards", "drafted", "accepted"):
        stats.setdefault(name, 0)

    # drafts may reach beyond the last position that the caller asked for, and are cut off
    tokens = idx.new_zeros(B, T + max_new_tokens + depth + 1)
    tokens[:, :T] = idx
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

    dtype: of the weights; None: bfloat16 on a GPU that has it, see released_dtype for released weights, else
    float32. ema: the moving average of a run's weights.
    """
    path, device = released_folder(path), torch.device(device)
    if (path / "config.json").is_file() and not (path / "ckpt.pt").is_file():
        if ema:
            raise ValueError(f"--ema: {path} is a released model, which has no average; leave the flag out")
        encoding = get_tokenizer(path)
        model = DeepSeekV3.from_pretrained(path, dtype or released_dtype(path, device), device)
        return Loaded(model, encoding, read_ends(path, encoding), None)

    ckpt = read_run(path)
    if ema and "ema" not in ckpt:
        raise ValueError(f"--ema: {path} holds no average of its weights; train with --ema_decay, or leave "
                         "the flag out")
    with fitting(ckpt["path"]), torch.device("meta"):
        model = DeepSeekV3(DeepSeekV3Config(**ckpt["config"]))
    if ckpt["replaced"] != replaced_classes(model):
        replaced = ", ".join(map(str, ckpt["replaced"])) or "nothing"
        raise ValueError(f"{ckpt['path']} was trained with {replaced} in place of model.py's own; replace "
                         "the same before you load it")
    with fitting(ckpt["path"]):
        model.load_state_dict(ckpt["ema" if ema else "model"], assign=True)
    encoding, model.source_files = encoding_from_json(ckpt["encoding"]), ckpt["source_files"]
    model.ends = ends_of_data(ckpt["meta"])
    bf16 = device.type == "cuda" and has_bf16(device)
    model.to(device, dtype or (torch.bfloat16 if bf16 else torch.float32))
    return Loaded(model.eval(), encoding, model.ends, model.config.max_position_embeddings)


def read_run(path):
    """--ckpt of a run -> the dict that its checkpoint holds."""
    if not path.exists():
        raise ValueError(f"--ckpt {path} does not exist; train a model first with: "
                         f"python train.py --out_dir {path}")
    if path.is_dir() and not any([*path.glob("ckpt*"), *path.glob("best.pt")]):
        if (path / "lock").exists():
            raise ValueError(f"the run in {path} has no checkpoint yet; it saves one at its first evaluation")
        raise ValueError(f"--ckpt {path} holds neither a run's ckpt.pt nor a released model's config.json")
    return load_run(path)


def released_dtype(path, device):
    """FP8 where released weights are stored so and the GPU has our kernels, bfloat16 where they take 16 bits
    or fewer and the device computes in it, else float32."""
    config = read_json(path / "config.json")
    stored = "FP8" if config.get("quantization_config") else config.get("dtype", config.get("torch_dtype"))
    if stored == "FP8" and device.type == "cuda":
        from fp8 import kernels_missing     # imports Triton, which nothing else here needs
        if kernels_missing(device) is None:
            return torch.float8_e4m3fn
    narrow = stored in ("FP8", "bfloat16", "float16")
    if has_bf16(device) and (narrow or device.type == "cuda"):
        return torch.bfloat16
    if narrow:
        print(f"holding the weights, stored in {stored}, in float32, as this {device.type} does not compute "
              "in bfloat16; --dtype bfloat16 takes half the memory, but may be slow", file=sys.stderr)
    return torch.float32


def compile_steps(model):
    """torch.compile the layers for decoding steps: about a minute before the first tokens, then faster steps.

    One compilation serves all layers of a kind and all lengths of the cache. Prompts are read without it, as
    their few large operations gain nothing. Has only been run on a CPU.
    """
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
    parser.add_argument("--ckpt", required=True, help="a run's folder, its ckpt.pt, or a released model's "
                                                      "folder or id on the Hugging Face Hub")
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
    args = parser.parse_args(argv)
    if args.num_samples < 1:
        parser.error(f"--num_samples must be at least 1, got {args.num_samples}")
    if args.max_new_tokens is not None and args.max_new_tokens < 0:
        parser.error(f"--max_new_tokens must be at least 0, got {args.max_new_tokens}")
    if not -2**63 <= args.seed < 2**64:
        parser.error(f"--seed must fit in 64 bits, got {args.seed}")
    if args.prompt is not None and not args.prefix is args.suffix is None:
        parser.error("--prompt is continued, --prefix and --suffix surround a hole; give one or the other")
    return args


def read_text(flag, text):
    """The text that a flag gives, itself or as FILE:path."""
    try:
        if text.startswith("FILE:"):
            raw = Path(text.removeprefix("FILE:")).read_bytes()
        else:
            raw = text.encode("utf-8", "surrogateescape")       # outside a UTF-8 locale, Python escapes bytes
        return raw.decode("utf-8")
    except UnicodeError as e:
        raise ValueError(f"{flag} {ascii(text[:60])} is not UTF-8 text ({e.reason} at byte {e.start}); "
                         "convert it to UTF-8") from None


def prompt_tokens(prompt, encoding, ends):
    """Text to continue -> its tokens, (1, T) int64. None begins a new document."""
    if prompt is None:
        return torch.tensor([[ends.begin]])
    if not prompt:
        raise ValueError("the prompt is empty; leave --prompt out to begin a new document")
    tokens = encoding.encode(prompt, allowed_special="all")
    if ends.add_bos and tokens[0] != ends.bos:
        tokens.insert(0, ends.bos)
    return torch.tensor([tokens])


def hole_tokens(prefix, suffix, encoding, ends):
    """The text around a hole -> the tokens that ask for what is in it, (1, T) int64."""
    before, after = encode(encoding, prefix), encode(encoding, suffix)
    fim_begin, fim_hole, fim_end = fim_ids(encoding)
    return torch.tensor([[ends.begin, fim_begin, *before, fim_hole, *after, fim_end]])


def room_for(wanted, T, context):
    """--max_new_tokens (None: at most 500) after a prompt of T tokens, if all must fit in the context."""
    if T > context or (T == context and wanted != 0):
        raise ValueError(f"the prompt's {T} tokens leave no room in the model's context of {context}; "
                         "shorten the prompt")
    if wanted is None:
        return min(500, context - T)
    if T + wanted > context:
        raise ValueError(f"--max_new_tokens {wanted} and the prompt's {T} tokens exceed the model's context "
                         f"of {context}; ask for {context - T} at most")
    return wanted


def continuation(model, idx, max_new_tokens, window, stop, **settings):
    """Yields tokens one by one; idx: (1, T) int64. Text beyond the window continues from its last half."""
    count, token = 0, None
    while count < max_new_tokens and token not in stop:
        new = max_new_tokens - count
        if window is not None:
            if idx.size(1) >= window:
                idx = idx[:, -(window // 2):]
            new = min(new, window - idx.size(1))
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
    device = pick_device(args.device)
    dtype = None if args.dtype == "auto" else getattr(torch, args.dtype)
    model, encoding, ends, window = load(args.ckpt, device, dtype, args.ema)
    new, before, after = args.max_new_tokens, "", ""
    if args.prefix is not None or args.suffix is not None:
        before, after = read_text("--prefix", args.prefix or ""), read_text("--suffix", args.suffix or "")
        idx = hole_tokens(before, after, encoding, ends)
        new = room_for(new, idx.size(1), window or model.config.max_position_embeddings)
    else:
        before = None if args.prompt is None else read_text("--prompt", args.prompt)
        idx = prompt_tokens(before, encoding, ends)
        if window is None:
            new = room_for(new, idx.size(1), model.config.max_position_embeddings)
    new = 500 if new is None else new
    model.check_tokens(idx, 0)
    if args.compile:
        print("compiling the decoding step: about a minute, or seconds where the compiler's cache has it",
              file=sys.stderr)
        compile_steps(model)
    generator = torch.Generator(device).manual_seed(args.seed)
    for _ in range(args.num_samples):
        stats = {}
        tokens = continuation(model, idx.to(device), new, window, ends.eos, temperature=args.temperature,
                              top_k=args.top_k, top_p=args.top_p, speculative=args.speculative,
                              generator=generator, stats=stats)
        print("-" * 80 + "\n" + (before or ""), end="", flush=True)
        line = write_text(tokens, ends.eos, encoding, stats)
        print(after, flush=True)
        print(line, file=sys.stderr)


def main(argv=None):
    for stream in sys.stdout, sys.stderr:
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")        # a terminal may lack a character of the text
    args = parse_args(argv)
    try:
        run(args)
    except BrokenPipeError:     # as in `python sample.py | head`; what Python flushes at its end goes nowhere
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
    except (ValueError, OSError, ImportError) as e:
        raise SystemExit(f"sample.py: {e}") from None
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)
    main()
