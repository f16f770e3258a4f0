"""
How fast the FP8 kernels are. On a GPU of sm_89 or later, everything side by side, as medians of interleaved
repeats:

    python tests/bench/bench_fp8.py

Without one, nothing is run: prints what the kernels compile to (registers, shared memory, spills, tensor-core
instructions), one of each kind for each card, or with --sweep all that the launchers in fp8.py can ask for,
and the roofline time of a product, which is a bound and not a measurement.
"""

import argparse
import dataclasses
import itertools
import os
import re
import statistics
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

import torch

sys.path.insert(0, str(Path(__file__).parents[2]))

import fp8  # noqa: E402
from model import DeepSeekV3, DeepSeekV3Config  # noqa: E402

# (M tokens, N outputs, K inputs) of the 671B and the 16B model
DENSE = {"671b q_b_proj": (4096, 24576, 1536), "671b o_proj": (4096, 7168, 16384),
         "671b expert": (4096, 4096, 7168), "671b down_proj": (4096, 7168, 2048),
         "16b q_proj": (8192, 3072, 2048), "16b dense MLP": (8192, 11264, 2048)}
# (E experts, M tokens, N outputs, K inputs)
GROUPED = {"671b, 8 experts": (8, 8192, 2048, 7168), "16b, 64 experts": (64, 49152, 1408, 2048)}
# FP8 FLOP/s with fp32 accumulation, without sparsity, and memory bytes/s of a card of each kind, from data
# sheets
CARDS = {89: ("L40S", 733e12, 0.864e12), 90: ("H100 SXM", 1979e12, 3.35e12), 100: ("B200", 4500e12, 8e12),
         120: ("RTX PRO 6000 Blackwell", 1000e12, 1.79e12)}


# ------------------------------------------------------------------------------------------------------------
# Without a GPU

def launches(card=None):
    """[(family, description, function that launches one kernel)]: every specialization that the launchers in
    fp8.py can ask Triton for. Sizes differ in whether they are multiples of 16 or 1; 128x128 tiles of the
    last are ragged. With a card (89, ...), one of each family, a different one for each card."""
    dtypes, pow2s = (torch.bfloat16, torch.float32), (False, True)
    sizes, lengths = (256, 200), (256, 200, 201, 1)         # of channels, of tokens

    def matrix(M, K):
        return fp8.quantize_reference(torch.ones(M, K))

    def quantizers(cols, rows):
        for dtype, pow2, M, K in itertools.product(dtypes, pow2s, lengths, sizes):
            x = torch.ones(M, K, dtype=dtype)
            yield partial(fp8.quantize, x, rows, cols, pow2), (dtype, pow2, M, K)

    def requantizers():
        for pow2, M, K in itertools.product(pow2s, lengths, sizes):
            yield partial(fp8.quantize, matrix(M, K), False, True, pow2), (pow2, M, K)

    def weights(transposed):
        for dtype, pow2, E, N, K in itertools.product(dtypes, pow2s, (1, 3), sizes, sizes):
            w = torch.ones(E, N, K, dtype=dtype)
            yield partial(fp8.quantize_weights, [w], transposed, pow2), (dtype, pow2, E, N, K)

    ends = torch.tensor([128, 128, 256], dtype=torch.int32)

    def gemms(experts, lengths):
        for dtype, E, J, M, N, K in itertools.product(dtypes, experts, (1, 2), lengths, sizes, sizes):
            b = fp8.empty(ends, J, max(E, 1), N, K)
            yield partial(fp8.gemm, matrix(M, K), b, dtype, ends[:E] if E else None), (dtype, E, J, M, N, K)

    def wgrads(experts, lengths):
        for E, M, N, K in itertools.product(experts, lengths, sizes, sizes):
            yield partial(fp8.wgrad, matrix(N, M), matrix(K, M), ends[:E] if E else None), (E, M, N, K)

    def swiglus():
        for dtype, M, K in itertools.product(dtypes, lengths, sizes):
            g, u, dh = matrix(M, K), matrix(M, K), torch.ones(M, K, dtype=dtype)
            yield partial(fp8.swiglu_backward, g, u, dh), (dtype, M, K)

    families = {
        "quantize 1x128": quantizers(False, True), "quantize both ways": quantizers(True, True),
        "quantize 128x1": quantizers(True, False), "requantize 128x1": requantizers(),
        "quantize 128x128": weights(False), "transpose 128x128": weights(True), "gemm": gemms([0], lengths),
        "gemm, grouped": gemms([3, 1], [256]), "wgrad": wgrads([0], lengths),
        "wgrad, grouped": wgrads([3, 1], [256]), "swiglu backward": swiglus()}
    for family, members in families.items():
        members = list(members)
        for function, sizes_of in members if card is None else members[card % len(members):][:1]:
            yield family, " ".join(str(size).removeprefix("torch.") for size in sizes_of), function


def numbers_in_shared(sass):
    """How many of the FP8 numbers that a thread makes get to shared memory, where a transpose passes: follows
    the bytes of registers from the conversions to the stores. All of 64 should (128x128 of 256 threads);
    ptxas 12.8 was seen to store other registers instead (see quantize_kernel)."""
    registers, numbers, stored = {}, itertools.count(), set()

    def content(register):      # what its four bytes hold: a number's name, or None for anything else
        return registers.get(register.split(".")[0], (None,) * 4)

    # Triton 3.6's disassembler adds scheduling hints (&req=..., ?trans1) to instructions of sm_120
    for op, args in re.findall(r"\*/ +(?:@!?\w+ )?([A-Z][\w.]+) (.*?) *[&?;]", sass):
        to, *args = args.split(", ")
        if op.startswith("F2FP.SATFINITE.E4M3"):    # two numbers, before the lower half of the last operand
            registers[to] = next(numbers), next(numbers), *content(args[-1])[:2]
        elif op == "PRMT" and args[1].startswith("0x"):     # a byte of two registers for each digit
            digits = int(args[1], 16)
            both = content(args[0]) + content(args[2])
            registers[to] = tuple(both[digits >> 4 * i & 7] for i in range(4))
        elif op == "LOP3.LUT" and args[1:4] == ["0xffff", "RZ", "0xc0"]:
            registers[to] = *content(args[0])[:2], None, None
        elif op.startswith("SHF.R.") and args[:2] == ["RZ", "0x8"]:
            registers[to] = *content(args[2])[1:], None
        elif op.startswith(("MOV", "IMAD.MOV")):
            registers[to] = content(args[-1])
        elif op == "STS":
            stored.update(content(args[-1]))
        elif re.fullmatch(r"R\d+", to):
            wide = ("64" in op or "WIDE" in op) and not op.startswith("SHF")    # SHF.R.U64 writes one
            for i in range(4 if "128" in op else 2 if wide else 1):
                registers.pop(f"R{int(to[1:]) + i}", None)
    return len(stored - {None})


def compiled(capability, launch):
    """What launch() would run on a GPU: Triton's compiled kernels, by a driver that only pretends to have
    one."""
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction
    # Triton keeps what it compiled by the number of the device: each card has its own
    pretended = SimpleNamespace(get_current_target=lambda: GPUTarget("cuda", capability, 32),
                                get_current_device=lambda: capability, get_current_stream=lambda device: 0)
    kernels, run = [], JITFunction.run

    def compile_only(self, *args, grid, warmup, **kwargs):
        kernels.append(run(self, *args, grid=grid, warmup=True, **kwargs))

    driver.set_active(pretended)
    with (patch.object(JITFunction, "run", compile_only), patch.object(fp8, "emulated", lambda x: False),
          patch.object(fp8, "capability", lambda device: divmod(capability, 10))):
        launch()
    return kernels


def inspect(capability, family, description, kernel):
    """What a kernel was compiled to, and what is wrong with it, as a dict."""
    import triton
    tools = Path(triton.__file__).parent / "backends/nvidia/bin"

    def disassemble(tool, *args):
        return subprocess.run([tools / tool, *args], capture_output=True, text=True, check=True).stdout

    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(kernel.asm["cubin"])
        cubin.flush()
        usage = disassemble("cuobjdump", "-res-usage", cubin.name)
        sass = disassemble("nvdisasm", "-c", cubin.name)
    registers, stack = re.search(r"REG:(\d+) STACK:(\d+)", usage).groups()
    ptx = kernel.asm["ptx"]

    def count(pattern, text=sass):
        return len(re.findall(pattern, text))

    row = dict(capability=capability, kernel=family, sizes=description, warps=kernel.metadata.num_warps,
               registers=int(registers), stack=int(stack), spills=count(r"\b(STL|LDL)\b"),
               shared=kernel.metadata.shared, tma_loads=count(r"\bUTMALDG\b"),
               fp8_mma=count(r"\b(QGMMA|QMMA|UTCQMMA)\b"),
               half_mma=count(r"\b(HMMA|HGMMA)\b"), fp8_in_shared=numbers_in_shared(sass),
               direct_casts=count(r"cvt\.rn\.satfinite\.e4m3x2\.f32", ptx))
    product = family.startswith(("gemm", "wgrad"))
    # Triton 3.6: ptxas 12.9 spills two registers on sm_120, and on sm_100 a transpose comes before the FP8
    old = tuple(map(int, fp8.triton.__version__.split(".")[:2])) < (3, 7)
    transposed_before = old and count(r"\bLDSM\S*\.MT88")
    faults = dict(
        spills=(row["stack"] or row["spills"]) and not (old and capability == 120 and row["stack"] <= 8),
        shared_memory=row["shared"] > {89: 99, 90: 227, 100: 227, 120: 99}[capability] * 1024,
        no_fp8_tensor_cores=product and not (row["fp8_mma"] and count(
            r"wgmma\.mma_async.*e4m3\.e4m3|mma\.sync.*e4m3\.e4m3|tcgen05\.mma.*kind::f8f6f4", ptx)),
        half_precision=row["half_mma"], tma=product and (row["tma_loads"] > 0) != (capability >= 90),
        # on sm_89 by way of fp16: see to_e4m3
        indirect_casts="quantize" in family and capability != 89 and not row["direct_casts"],
        wrong_registers=row["fp8_in_shared"] != 64 * (family in TRANSPOSES and not transposed_before))
    return row | dict(faults=[name for name, found in faults.items() if found])


TRANSPOSES = ("quantize both ways", "quantize 128x1", "requantize 128x1", "transpose 128x128")


def compile_all(capability, launches):
    """The rows of `inspect` for what is launched, each kernel once."""
    seen = set()
    for family, description, launch in launches:
        for kernel in compiled(capability, launch):
            if kernel.hash not in seen:
                seen.add(kernel.hash)
                yield inspect(capability, family, description, kernel)


def print_compiled(sweep):
    print("No GPU with FP8 tensor cores here: nothing was run. Compiled ahead of time by Triton:\n")
    titles = "sm kernel sizes warps registers spills shared_memory FP8_MMA TMA_loads faults".split()
    print("| " + " | ".join(titles) + " |\n" + "|---" * len(titles) + "|")
    for capability in CARDS:
        for row in compile_all(capability, launches(None if sweep else capability)):
            print(f"| {row['capability']} | {row['kernel']} | {row['sizes']} | {row['warps']} | "
                  f"{row['registers']} | {row['spills']} | {row['shared'] / 1024:.0f} KB | "
                  f"{row['fp8_mma']} | {row['tma_loads']} | {', '.join(row['faults']) or 'none'} |",
                  flush=True)
    print("\nRoofline, a bound and not a measurement: the larger of FLOPs / peak and bytes / bandwidth, in "
          "microseconds\n")
    cards = [f"{name} (sm_{sm})" for sm, (name, _, _) in CARDS.items()]
    print("| product | M, N, K | " + " | ".join(cards) + " |")
    print("|---|---|" + "---|" * len(CARDS))
    for name, (M, N, K) in DENSE.items():
        moved = M * K + N * K + 2 * M * N + 4 * K // 128 * (M + N // 128)
        bounds = [max(2 * M * N * K / flops, moved / bandwidth) for _, flops, bandwidth in CARDS.values()]
        print(f"| {name} | {M}, {N}, {K} | " + " | ".join(f"{1e6 * t:.0f}" for t in bounds) + " |")


# ------------------------------------------------------------------------------------------------------------
# On a GPU

def times(functions, repeats=20):
    """{name: function} -> {name: median seconds}, repeats interleaved, a cold L2 cache before each."""
    flush = torch.empty(2**30, dtype=torch.int8, device="cuda")     # takes longer to fill than a launch
    spans = {name: [] for name in functions}
    for i in range(repeats + 3):
        for name, function in functions.items():
            flush.zero_()
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            function()
            end.record()
            torch.cuda.synchronize()
            if i >= 3:
                spans[name].append(start.elapsed_time(end) / 1e3)
    return {name: statistics.median(span) for name, span in spans.items()}


def bench_dense():
    try:
        import deep_gemm
    except ImportError:
        deep_gemm = None
    print("\n| product | M, N, K | ours, TFLOP/s | vs bf16 matmul | vs _scaled_mm row-wise | vs DeepGEMM |")
    print("|---|---|---|---|---|---|")
    for name, (M, N, K) in DENSE.items():
        x = torch.randn(M, K, device="cuda", dtype=torch.bfloat16)
        w = torch.randn(N, K, device="cuda", dtype=torch.bfloat16)
        a, b = fp8.quantize(x)[0], fp8.quantize_weights([w])
        one = torch.ones(M, 1, device="cuda"), torch.ones(1, N, device="cuda")
        q, s = b.q[0, 0], b.s[0, 0]
        out = torch.empty(M, N, device="cuda", dtype=torch.bfloat16)
        run = {"ours": lambda: fp8.gemm(a, b, torch.bfloat16), "bf16": lambda: x @ w.T,
               "rowwise": lambda: torch._scaled_mm(a.q, q.T, *one, out_dtype=torch.bfloat16)}
        if deep_gemm:
            run["DeepGEMM"] = lambda: deep_gemm.fp8_gemm_nt((a.q, a.s), (q, s), out)
        t = times(run)
        print(f"| {name} | {M}, {N}, {K} | {2 * M * N * K / t['ours'] / 1e12:.0f} | "
              f"{t['bf16'] / t['ours']:.2f}x | "
              f"{t['rowwise'] / t['ours']:.2f}x | "
              + (f"{t['DeepGEMM'] / t['ours']:.2f}x |" if deep_gemm else "not installed |"))


def bench_grouped():
    print("\n| grouped product | E, rows, N, K | gemm, TFLOP/s | vs bf16 grouped_mm | wgrad, TFLOP/s | "
          "vs bf16 |")
    print("|---|---|---|---|---|---|")
    for name, (E, M, N, K) in GROUPED.items():
        ends = torch.arange(1, E + 1, device="cuda", dtype=torch.int32) * (M // E // 128 * 128)
        x = torch.randn(M, K, device="cuda", dtype=torch.bfloat16)
        dy = torch.randn(M, N, device="cuda", dtype=torch.bfloat16)
        w = torch.randn(E, N, K, device="cuda", dtype=torch.bfloat16)
        (a, a_t), (_, dy_t) = fp8.quantize(x, cols=True), fp8.quantize(dy, cols=True)
        b = fp8.quantize_weights([w])
        t = times({"gemm": lambda: fp8.gemm(a, b, torch.bfloat16, ends),
                   "bf16": lambda: torch.nn.functional.grouped_mm(x, w.mT, offs=ends),
                   "wgrad": lambda: fp8.wgrad(dy_t, a_t, ends),
                   "bf16 wgrad": lambda: torch.nn.functional.grouped_mm(dy.T, x, offs=ends)})
        flops = 2 * int(ends[-1]) * N * K / 1e12
        print(f"| {name} | {E}, {M}, {N}, {K} | {flops / t['gemm']:.0f} | {t['bf16'] / t['gemm']:.2f}x | "
              f"{flops / t['wgrad']:.0f} | {t['bf16 wgrad'] / t['wgrad']:.2f}x |")


def bench_quantizers():
    x = torch.randn(16384, 7168, device="cuda", dtype=torch.bfloat16)
    w = torch.randn(1, 7168, 16384, device="cuda")
    q, copy = fp8.quantize(x)[0], torch.empty_like(x)
    t = times({"copy": lambda: copy.copy_(x), "1x128": lambda: fp8.quantize(x),
               "both ways": lambda: fp8.quantize(x, cols=True),
               "again, 128x1": lambda: fp8.quantize(q, False, True),
               "128x128, fp32": lambda: fp8.quantize_weights([w]),
               "128x128, fp32, transposed": lambda: fp8.quantize_weights([w], transposed=True)})
    moved = {"copy": 4, "1x128": 3, "both ways": 4, "again, 128x1": 2, "128x128, fp32": 5,
             "128x128, fp32, transposed": 5}        # bytes per number
    speed = {name: moved[name] * x.numel() / t[name] for name in t}
    print("\n| quantizer | GB/s | of a copy's |\n|---|---|---|")
    for name in t:
        print(f"| {name} | {speed[name] / 1e9:.0f} | {speed[name] / speed['copy']:.0%} |")


def bench_step():
    """Forward and backward of a dense and a MoE layer at the 16B model's shapes, 8192 tokens."""
    config = dataclasses.replace(DeepSeekV3Config.preset("16b"), num_hidden_layers=2,
                                 num_nextn_predict_layers=0, vocab_size=8192)
    idx = torch.randint(config.vocab_size, (2, 4096), device="cuda")
    steps = {}
    for name in "bf16", "fp8":
        with torch.device("cuda"):
            model = DeepSeekV3(config)
        if name == "fp8":
            fp8.convert_to_fp8(model)

        def step(model=model):
            with torch.autocast("cuda", torch.bfloat16):
                loss = model(idx, idx)[1]
            loss.backward()
            model.zero_grad()
        steps[name] = step
    t = times(steps, repeats=10)
    print(f"\nTwo layers of the 16b preset, {idx.numel()} tokens, forward and backward: "
          f"bf16 {1e3 * t['bf16']:.1f} ms, fp8 {1e3 * t['fp8']:.1f} ms, {t['bf16'] / t['fp8']:.2f}x")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sweep", action="store_true",
                        help="without a GPU: compile every specialization, not one of each kind")
    if not torch.cuda.is_available() or fp8.kernels_missing(torch.device("cuda")):
        if fp8.triton is None:
            sys.exit("bench_fp8.py: " + fp8.kernels_missing(torch.device("cpu")))
        if os.environ.get("TRITON_INTERPRET"):
            sys.exit("bench_fp8.py: unset TRITON_INTERPRET, under which nothing is compiled")
        print_compiled(parser.parse_args().sweep)
    else:
        print(f"{torch.cuda.get_device_name()}, PyTorch {torch.__version__}, Triton {fp8.triton.__version__}")
        bench_dense()
        bench_grouped()
        bench_quantizers()
        bench_step()
