"""
Generate text from a run of train.py or a released checkpoint.

    python sample.py --ckpt out
    python sample.py --ckpt out --prompt "def binary_search(" --temperature 0.5 --num_samples 3
    python sample.py --ckpt out --prompt FILE:notes.txt --top_p 0.9 --seed 7
    python sample.py --ckpt out --prefix "def add(a, b):" --suffix "return c"     # what comes between the two
    python sample.py --ckpt Moonlight-16B-A3B --prompt "Once"           # a folder with config.json and *.safetensors

Without a prompt a new document is begun. Generation ends with the document, or after --max_new_tokens. Where the text
outgrows the --block_size that the model was trained with, it goes on from the last half of that. A hole between --prefix
and --suffix is filled by models whose data were prepared with --fim_rate.

Where the model has MTP modules, text comes several tokens per forward pass: speculative decoding (report, §5.4.3).
A round, for the newest token t_p, which is not in the cache yet:

    draft    MTP module k = 1..depth reads h^{k-1} and the token k ahead, and draws t_{p+k} from its distribution q
    verify   one pass of the main model over t_p and the drafts gives p, a distribution for what follows each of them
    keep     drafts from the left, each with probability min(1, p/q), and one token more: 1 to depth + 1 tokens

What was refused stays in the caches until it is overwritten. Without MTP modules a round is the plain step, depth 0.

Shapes      B batch, T tokens of the prompt, t of a part of it, D hidden size, V vocabulary
"""

import argparse
import codecs
import sys
import time
from functools import partial
from pathlib import Path

import torch

from checkpoint import Parser, load_checkpoint, load_run, load_shards, read_json, released_folder
from data.tokenizer import encode, encoding_from_json, fim_ids, get_tokenizer, separator, token_bytes
from model import PREFILL_CHUNK, DeepSeekV3, DeepSeekV3Config, draw, rope_cos_sin, sampling_probs


@torch.inference_mode()
def generate_stream(model, idx, max_new_tokens, temperature=1.0, top_k=None, top_p=None, speculative=None, stop=(),
                    generator=None, stats=None):
    """Continue the prompts idx (B, T) int64; yields tokens (B, 1) int64 as they come.

    The arguments are those of DeepSeekV3.generate, and so is the distribution. speculative: draft with the MTP modules
    and verify with the main model, several tokens per forward pass; None means where the model has such modules.
    stats: a dict of the caller's in which "forwards", "drafted" and "accepted" are counted up.
    """
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
    for a in range(0, h.size(1), PREFILL_CHUNK):
        b = min(a + PREFILL_CHUNK, h.size(1))
        cos, sin = rope_cos_sin(model.config, pos + a, pos + b, h.device)
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


def load(path, device, ema=False):
    """A run's folder, its ckpt.pt, or a released checkpoint's folder or id on the Hugging Face Hub -> model in eval mode
    on the device (bfloat16 on a GPU), tiktoken.Encoding, the token that begins a document, whether prompts begin with it
    too, the set of tokens to stop at, and the number of tokens that the model was trained to see at a time (None: what its
    config allows). ema: the average of the run's weights."""
    path = released_folder(path)
    if (path / "config.json").is_file() and not (path / "ckpt.pt").is_file():
        if ema:
            raise ValueError(f"--ema: {path} is a released checkpoint, which holds no average; leave the flag out")
        return load_released(path, device)
    if not path.exists():
        raise ValueError(f"--ckpt {path} does not exist; train a model first with: python train.py --out_dir {path}")
    if path.is_dir() and not (path / "run.pt").is_file():
        ckpt, used = load_run(path)
        if ".prev" in used.name:
            print(f"the last checkpoint of {path} is damaged or missing: using {used}", file=sys.stderr)
    else:
        ckpt = load_checkpoint(path)
    if ema and "ema" not in ckpt:
        raise ValueError(f"--ema: {path} holds no average of its weights; train with --ema_decay, or leave the flag out")
    with torch.device("cpu" if "shards" in ckpt else "meta"):
        model = DeepSeekV3(DeepSeekV3Config(**ckpt["config"]))
    if "shards" in ckpt:
        load_shards(ckpt["shards"], model)
    else:
        model.load_state_dict(ckpt["ema" if ema else "model"], assign=True)
    model.to(device, torch.bfloat16 if device == "cuda" else torch.float32)
    enc, block_size = encoding_from_json(ckpt["encoding"]), ckpt["train_config"].get("block_size")
    if type(block_size) is not int:
        raise ValueError(f"{path} has the block_size {block_size!r}, which is no number")
    return model.eval(), enc, separator(enc), False, {separator(enc)}, max(block_size, 2)


def load_released(path, device):
    """load for a folder with config.json, *.safetensors and a tokenizer."""
    enc = get_tokenizer(path)
    settings = {}       # generation_config.json overrides config.json; either may lack the ids, or both
    for name in ("config.json", "generation_config.json"):
        if (path / name).is_file():
            settings |= {k: v for k, v in read_json(path / name).items() if v is not None}
    tokenizer = read_json(path / "tokenizer_config.json") if (path / "tokenizer_config.json").is_file() else {}
    bos, eos = (special_token(enc, tokenizer.get(name)) for name in ("bos_token", "eos_token"))
    stop = settings.get("eos_token_id", separator(enc) if eos is None else eos)
    stop = stop if isinstance(stop, list) else [stop]
    template, adds_bos = template_bos(path), tokenizer.get("add_bos_token")
    if template is not None:
        bos, adds_bos = special_token(enc, template), adds_bos is None or adds_bos
    if bos is None:
        bos = settings.get("bos_token_id")
    for token in stop + ([] if bos is None else [bos]):
        if type(token) is not int or not 0 <= token < enc.n_vocab:
            raise ValueError(f"{path}: bos or eos token {repr(token)[:100]} is not one of the tokenizer's {enc.n_vocab} ids; "
                             "correct config.json, generation_config.json or tokenizer_config.json")
    prepend = adds_bos is True and bos is not None
    begin = bos if prepend else stop[0] if stop else separator(enc)
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    if device == "cuda" and settings.get("quantization_config"):
        from fp8 import kernels_missing
        if kernels_missing(torch.device(device)) is None:
            dtype = torch.float8_e4m3fn
    model = DeepSeekV3.from_pretrained(path, dtype, device)
    return model, enc, begin, prepend, set(stop), None


def special_token(enc, token):
    """The id of a special token that tokenizer_config.json names, as text or as {"content": text}; None if there is none."""
    text = token.get("content") if isinstance(token, dict) else token
    return enc._special_tokens.get(text) if isinstance(text, str) else None


def template_bos(path):
    """The special token that the post_processor of a folder's tokenizer.json puts before a text, or None."""
    post = read_json(path / "tokenizer.json").get("post_processor") if (path / "tokenizer.json").is_file() else None
    match post:
        case {"type": "Sequence", "processors": [*parts]}:
            pass
        case _:
            parts = [post]
    for part in parts:
        match part:
            case {"type": "TemplateProcessing", "single": [{"SpecialToken": {"id": str(name)}}, *_]}:
                return name


def compile_steps(model):
    """torch.compile the layers for decoding steps: a minute or so before the first tokens, then each step is faster.

    One compilation serves all layers of a kind and all lengths of the cache. Prompts are read as before: their few
    large operations gain nothing. Has only been run on a CPU.
    """
    def forward(eager, compiled, x, *args, pos=0, **kwargs):
        return (compiled if pos > 0 and x.size(1) <= 8 else eager)(x, *args, pos=pos, **kwargs)

    # On a CPU, one row times a matrix takes PyTorch's BLAS far longer than reading the matrix: write the loop ourselves
    options = {"post_grad_fusion_options": {"decompose_mm_pass": {}}}
    for layer in model.model.layers:
        layer.forward = partial(forward, layer.forward, torch.compile(layer.forward, dynamic=True, options=options))


def read_text(prompt, flag="--prompt"):
    """The text that a flag gives, itself or as FILE:path."""
    if prompt.startswith("FILE:"):
        text = Path(prompt.removeprefix("FILE:")).read_bytes()
        try:
            prompt = text.decode("utf-8")
        except UnicodeDecodeError as e:
            raise ValueError(f"{flag} {prompt}: the file is not UTF-8 text ({e.reason} at byte {e.start}); convert "
                             "it to UTF-8") from None
    try:
        prompt.encode("utf-8")
    except UnicodeEncodeError as e:
        raise ValueError(f"{flag} holds {prompt[e.start]!r} at character {e.start}, which is not text that a "
                         "tokenizer knows; give it in UTF-8") from None
    return prompt


def read_prompt(prompt, enc, begin, prepend):
    """--prompt -> its text and its tokens, (1, T) int64; None begins a document."""
    if prompt is None:
        return "", torch.tensor([[begin]])
    prompt = read_text(prompt)
    if not prompt:
        raise ValueError("the prompt is empty; leave --prompt out to begin a new document")
    tokens = enc.encode(prompt, allowed_special="all")
    return prompt, torch.tensor([[begin] * (prepend and tokens[0] != begin) + tokens])


def read_hole(prefix, suffix, enc, begin, window, max_new_tokens):
    """--prefix, --suffix -> the tokens that ask for the middle, (1, T) int64, and how many new ones have room."""
    fim_begin, hole, end = fim_ids(enc)
    idx = torch.tensor([[begin, fim_begin, *encode(enc, prefix), hole, *encode(enc, suffix), end]])
    if window is not None and idx.size(1) >= window:
        raise ValueError(f"--prefix and --suffix make {idx.size(1)} tokens, which leave no room for a middle in the "
                         f"{window} that the model was trained to see; shorten them")
    return idx, max_new_tokens if window is None else min(max_new_tokens, window - idx.size(1))


def main(argv=None):
    parser = Parser(__doc__)
    parser.add_argument("--ckpt", required=True, help="folder of a run, its ckpt.pt, or a released checkpoint's folder or "
                                                      "id on the Hugging Face Hub")
    parser.add_argument("--ema", action="store_true", help="the moving average of a run's weights (train.py --ema_decay)")
    parser.add_argument("--prompt", help="text to continue, or FILE:path")
    parser.add_argument("--prefix", help="fill in the middle: text before the hole, or FILE:path")
    parser.add_argument("--suffix", help="text after the hole, or FILE:path")
    parser.add_argument("--max_new_tokens", type=int, help="default: 500, or as many as a released model has room for")
    parser.add_argument("--temperature", type=float, default=0.8, help="0 is greedy")
    parser.add_argument("--top_k", type=int, help="sample from the k likeliest tokens only")
    parser.add_argument("--top_p", type=float, help="sample from the likeliest tokens that together reach p only")
    parser.add_argument("--num_samples", type=int, default=1)
    parser.add_argument("--seed", type=int, default=1337)
    parser.add_argument("--speculative", action=argparse.BooleanOptionalAction,
                        help="draft with the MTP modules (default: where the model has any)")
    parser.add_argument("--compile", action="store_true", help="torch.compile the decoding step: pays for long texts")
    args = parser.parse_args(argv)
    try:
        if args.num_samples < 1:
            raise ValueError(f"--num_samples must be at least 1, got {args.num_samples}")
        if args.max_new_tokens is not None and args.max_new_tokens < 0:
            raise ValueError(f"--max_new_tokens must be at least 0, got {args.max_new_tokens}")
        if args.prompt is not None and (args.prefix is not None or args.suffix is not None):
            raise ValueError("--prompt is text to continue, --prefix and --suffix surround a hole; give one or the other")
        device = "cuda" if torch.cuda.is_available() else "cpu"
        model, enc, begin, prepend, stop, window = load(args.ckpt, device, args.ema)
        if args.compile:
            compile_steps(model)
        suffix, new = "", 500 if args.max_new_tokens is None else args.max_new_tokens
        if args.prefix is None and args.suffix is None:
            prompt, idx = read_prompt(args.prompt, enc, begin, prepend)
        else:
            prompt, suffix = read_text(args.prefix or "", "--prefix"), read_text(args.suffix or "", "--suffix")
            idx, new = read_hole(prompt, suffix, enc, begin, window, new)
        room = model.config.max_position_embeddings - idx.size(1)
        if window is None and args.max_new_tokens is None and room > 0:
            new = min(new, room)
        if window is None:
            model.check_tokens(idx, idx.size(1) + new)
        args.max_new_tokens = new
        generator = torch.Generator(device).manual_seed(args.seed)
        for i in range(args.num_samples):
            sample(model, enc, window, stop, prompt, suffix, idx.to(device), args, generator)
    except (ValueError, OSError, ImportError) as e:
        raise SystemExit(f"sample.py: {e}") from None
    except KeyboardInterrupt:
        sys.exit(130)


def continuation(model, idx, window, stop, args, generator, stats):
    """Yield tokens one by one; idx: (1, T) int64. Each stretch of them sees at most `window` tokens, if that is given."""
    count, token = 0, None
    while count < args.max_new_tokens and token not in stop:
        new = args.max_new_tokens - count
        if window is not None:
            if idx.size(1) >= window:
                idx = idx[:, -(window // 2):]
            new = min(new, window - idx.size(1))
        for token in generate_stream(model, idx, new, args.temperature, args.top_k, args.top_p, args.speculative,
                                     stop=stop, generator=generator, stats=stats):
            idx, token, count = torch.cat([idx, token], 1), token.item(), count + 1
            yield token


def sample(model, enc, window, stop, prompt, suffix, idx, args, generator):
    """Print one continuation as it comes, then the suffix, then a line on speed and speculation to stderr."""
    decoder = codecs.getincrementaldecoder("utf-8")("replace")      # a character may be spread over tokens
    stats, count, start = {}, 0, time.monotonic()
    print("-" * 80 + "\n" + prompt, end="", flush=True)
    for count, token in enumerate(continuation(model, idx, window, stop, args, generator, stats), 1):
        if token not in stop:
            print(decoder.decode(token_bytes(enc, token)), end="", flush=True)
    print(decoder.decode(b"", final=True) + suffix, flush=True)
    seconds = time.monotonic() - start
    line = f"{count} tokens, {count / seconds:.0f} tokens/s"
    if stats.get("drafted"):
        line += (f"; drafts accepted {stats['accepted'] / stats['drafted']:.0%}, "
                 f"{1 + stats['accepted'] / stats['forwards']:.2f} tokens per forward pass")
    print(line, file=sys.stderr)


if __name__ == "__main__":
    main()
