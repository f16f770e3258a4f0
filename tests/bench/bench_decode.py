"""
Decoding speed beside transformers' DeepseekV3ForCausalLM with the same weights, where it is installed.

    python tests/bench/bench_decode.py                # prefill and plain decoding, with the ratios
    python tests/bench/bench_decode.py --compile      # with our steps under torch.compile as well
    python tests/bench/bench_decode.py --ckpt out     # plain and speculative decoding of a trained model
    python tests/bench/bench_decode.py --against DIR  # beside model.py of another checkout, as of an older commit

Medians of repeated runs. The contestants take turns, so that a noisy machine disturbs all of them alike.
"""

import copy
import importlib.util
import itertools
import resource
import statistics
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[2]))

from model import DeepSeekV3, DeepSeekV3Config  # noqa: E402
from runs import command_line  # noqa: E402
from sample import compile_steps, continuation, load  # noqa: E402

BENCH = dict(vocab_size=512, hidden_size=256, num_hidden_layers=6, first_k_dense_replace=1,
             num_attention_heads=8, q_lora_rank=128, kv_lora_rank=64, qk_nope_head_dim=32,
             qk_rope_head_dim=16, v_head_dim=32, n_routed_experts=32, num_experts_per_tok=4, n_group=1,
             topk_group=1, moe_intermediate_size=128, intermediate_size=704, num_nextn_predict_layers=0,
             max_position_embeddings=8192, initializer_range=0.02)
REPEATS, STEPS, NEW_TOKENS = 7, 32, 200


def transformers_model(model, implementation):
    """transformers' model with our weights, or None where it isn't installed."""
    try:
        from transformers import DeepseekV3Config, DeepseekV3ForCausalLM
    except ImportError:
        return None
    shape = {k: v for k, v in BENCH.items() if k != "num_nextn_predict_layers"}
    config = DeepseekV3Config(**shape, num_key_value_heads=BENCH["num_attention_heads"],
                              experts_implementation=implementation)
    theirs = DeepseekV3ForCausalLM(config).eval()
    state = dict(model.state_dict())
    for name in [name for name in state if name.endswith("experts.gate_proj")]:
        up = name.replace("gate_proj", "up_proj")
        state[name.replace("gate_proj", "gate_up_proj")] = torch.cat([state.pop(name), state.pop(up)], 1)
    theirs.load_state_dict(state)
    return theirs


def load_source(path):
    """Another checkout's model.py as a module."""
    spec = importlib.util.spec_from_file_location("other_model", path)
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)     # dataclasses look it up
    spec.loader.exec_module(module)
    return module


class Ours:
    def __init__(self, model):
        self.model = model

    @torch.inference_mode()
    def prefill(self, idx):
        self.cache, self.pos = self.model.new_cache(1, idx.size(1) + STEPS), idx.size(1)
        return self.model.lm_head(self.model.prefill(idx, self.cache)[:, -1:]).argmax(-1)   # as generate does

    def step(self, token):
        self.pos += 1
        return self.model.decode(token, self.cache, self.pos - 1)[:, -1:].argmax(-1)


class Theirs:
    def __init__(self, model):
        self.model = model

    @torch.no_grad()
    def prefill(self, idx):
        out = self.model(idx, use_cache=True, logits_to_keep=1)
        self.cache = out.past_key_values
        return out.logits[:, -1:].argmax(-1)

    @torch.no_grad()
    def step(self, token):
        out = self.model(token, past_key_values=self.cache, use_cache=True)
        self.cache = out.past_key_values
        return out.logits[:, -1:].argmax(-1)


def measure(contestants, lengths):
    """-> {(length, name): (median prefill seconds, median seconds per token)}; greedy tokens must agree."""
    times = {(length, name): ([], []) for length in lengths for name in contestants}
    for repeat, length in itertools.product(range(REPEATS + 1), lengths):
        idx = torch.randint(0, BENCH["vocab_size"], (1, length), generator=torch.Generator().manual_seed(1))
        texts = {}
        for name in sorted(contestants, reverse=repeat % 2):
            contestant = contestants[name]
            start = time.perf_counter()
            token, text = contestant.prefill(idx), []
            middle = time.perf_counter()
            for _ in range(STEPS):
                text.append(token.item())
                token = contestant.step(token)
            if repeat:      # the first round warms up
                times[length, name][0].append(middle - start)
                times[length, name][1].append((time.perf_counter() - middle) / STEPS)
            texts[name] = text
        assert len({tuple(text) for text in texts.values()}) == 1, f"the greedy tokens differ: {texts}"
    return {key: tuple(map(statistics.median, pair)) for key, pair in times.items()}


def memory(model):
    cache = sum(c.numel() * c.element_size() for c in model.new_cache(1, 4096 + 1))
    model.generate(torch.zeros(1, 1, dtype=torch.int64), 4096)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024        # before others load their models
    weights = model.num_params() * 4 / 2**20
    print(f"4096 tokens generated: cache {cache / 2**20:.1f} MiB, peak memory of the process {peak:.0f} MiB, "
          f"of which {weights:.0f} MiB are weights and most of the rest is PyTorch", flush=True)


def beside_transformers(model, compile):
    contestants = {"ours": Ours(model)}
    if compile:
        contestants["ours compiled"] = Ours(copy.deepcopy(model))
        compile_steps(contestants["ours compiled"].model)
    for implementation in ("eager", "grouped_mm"):
        if (theirs := transformers_model(model, implementation)) is not None:
            contestants[f"transformers {implementation}"] = Theirs(theirs)
    if len(contestants) == 1:
        print("transformers is not installed: only our own times (pip install transformers)")
    return contestants


def beside_checkout(model, compile, folder):
    """Both compiled, or neither."""
    source = load_source(Path(folder) / "model.py")
    other = source.DeepSeekV3(source.DeepSeekV3Config(**BENCH)).eval()
    other.load_state_dict(model.state_dict())
    if compile:
        compile_steps(model)
        compile_steps(other)
    return {"ours": Ours(model), Path(folder).name: Ours(other)}


def compare(contestants):
    print(f"{'prompt':>6}  {'contestant':<24}{'prefill ms':>12}{'ms/token':>10}{'prefill x':>11}"
          f"{'decode x':>10}")
    found = measure(contestants, (128, 512, 2048))
    for (length, name), (prefill, step) in found.items():
        ours = found[length, "ours"]
        print(f"{length:>6}  {name:<24}{prefill * 1e3:>12.1f}{step * 1e3:>10.2f}"
              f"{prefill / ours[0]:>11.2f}{step / ours[1]:>10.2f}")


def speculation(ckpt, compile):
    """Tokens per second of greedy and sampled text from a trained model, plain and speculative in turns."""
    run = load(ckpt, "cpu")
    prompt = torch.tensor([run.encoding.encode_ordinary("import os\n\n\ndef ")])
    if compile:
        compile_steps(run.model)
    print(f"{'temperature':>11}{'plain tok/s':>13}{'speculative':>13}{'ratio':>7}{'accepted':>10}"
          f"{'tokens/forward':>16}{'ms/forward plain':>18}{'speculative':>13}")
    for temperature in (0.0, 0.8):
        rates = {True: [], False: []}
        for repeat in range(REPEATS + 1):
            for speculative in (False, True):
                stats, start = {}, time.perf_counter()
                generator = torch.Generator().manual_seed(repeat)
                for _ in continuation(run.model, prompt, NEW_TOKENS, run.window, (), temperature=temperature,
                                      speculative=speculative, generator=generator, stats=stats):
                    pass
                if repeat:
                    rates[speculative].append((NEW_TOKENS / (time.perf_counter() - start), stats))
        plain, fast = (statistics.median(rate for rate, _ in rates[s]) for s in (False, True))
        drafted, accepted, forwards = (sum(s[k] for _, s in rates[True])
                                       for k in ("drafted", "accepted", "forwards"))
        per_forward = 1 + accepted / forwards
        print(f"{temperature:>11}{plain:>13.0f}{fast:>13.0f}{fast / plain:>7.2f}{accepted / drafted:>10.0%}"
              f"{per_forward:>16.2f}{1e3 / plain:>18.2f}{1e3 * per_forward / fast:>13.2f}")


if __name__ == "__main__":
    parser = command_line(__doc__)
    parser.add_argument("--ckpt", help="a run of train.py: measure speculation on it instead")
    parser.add_argument("--compile", action="store_true", help="compile our decoding steps too")
    parser.add_argument("--against", metavar="DIR", help="compare with the model.py in this folder instead")
    args = parser.parse_args()
    if args.ckpt:
        speculation(args.ckpt, args.compile)
    else:
        torch.manual_seed(0)
        model = DeepSeekV3(DeepSeekV3Config(**BENCH)).eval()
        print(f"config bench: {model.num_params():,} parameters, batch 1, fp32, "
              f"{torch.get_num_threads()} threads")
        if args.against:
            compare(beside_checkout(model, args.compile, args.against))
        else:
            memory(model)
            compare(beside_transformers(model, args.compile))
