"""
How fast the FP8 kernels are. On a GPU of sm_89 or later, everything side by side, medians of interleaved repeats:

    python tests/bench/bench_fp8.py

Without one, nothing is run: prints what the kernels compile to (registers, shared memory, spills, tensor-core
instructions) and the roofline time of a product, which is a bound and no measurement.
"""

import dataclasses
import itertools
import os
import re
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[2]))

import fp8  # noqa: E402
from model import DeepSeekV3, DeepSeekV3Config  # noqa: E402

# (M tokens, N outputs, K inputs) of the 671B and the 16B model
DENSE = {"671b q_b_proj": (4096, 24576, 1536), "671b o_proj": (4096, 7168, 16384), "671b expert": (4096, 4096, 7168),
         "671b down_proj": (4096, 7168, 2048), "16b q_proj": (8192, 3072, 2048), "16b dense MLP": (8192, 11264, 2048)}
GROUPED = {"671b, 8 experts": (8, 8192, 2048, 7168), "16b, 64 experts": (64, 49152, 1408, 2048)}   # E, tokens, N, K
# FP8 FLOP/s with fp32 accumulation, without sparsity, and memory bytes/s of a card of each kind, from data sheets
CARDS = {89: ("L40S", 733e12, 0.864e12), 90: ("H100 SXM", 1979e12, 3.35e12), 100: ("B200", 4500e12, 8e12),
         120: ("RTX PRO 6000 Blackwell", 1000e12, 1.79e12)}


# ----------------------------------------------------------------------------------------------------------------------
# Without a GPU

def kernel_variants(capability):
    """{name: (kernel, signature, constants, options)} as the launchers in fp8.py use them."""
    options = fp8.launch_options(capability // 10)
    tile = {arg: options.pop(arg) for arg in ("ROWS", "TMA")}
    a, b = (f"tensordesc<fp8e4nv[{rows}, 128]>" if tile["TMA"] else "*fp8e4nv" for rows in (tile["ROWS"], 128))
    operands = dict(a=a, s_a="*fp32", stride_a="i32", b=b, s_b="*fp32", stride_b="i32")
    gemm = dict(**operands, c="*bf16", stride_c="i32", ends="*i32", E="i32", M="i32", N="i32", KB="i32")
    wgrad = dict(**operands, c="*fp32", stride_c="i32", ends="*i32", N="i32", K="i32", M="i32")
    quantize = dict(x="*bf16", x_s="*fp32", q="*fp8e4nv", s="*fp32", qt="*fp8e4nv", st="*fp32", M="i32", K="i32",
                    stride="i32")
    flags = dict(ROWS=False, COLS=False, BLOCK=False, POW2=False, SM89=capability == 89)
    products = {
        "gemm": (fp8.gemm_kernel, gemm, dict(ends=None, EXPERTS=1)),
        "gemm, grouped": (fp8.gemm_kernel, gemm, dict(EXPERTS=64)),
        "wgrad": (fp8.wgrad_kernel, wgrad, dict(ends=None)),
        "wgrad, grouped": (fp8.wgrad_kernel, wgrad, {})}
    quantizers = {
        "quantize 1x128": (fp8.quantize_kernel, quantize, flags | dict(x_s=None, qt=None, st=None, ROWS=True)),
        "quantize both ways": (fp8.quantize_kernel, quantize, flags | dict(x_s=None, ROWS=True, COLS=True)),
        "requantize 128x1": (fp8.quantize_kernel, quantize | dict(x="*fp8e4nv"),
                             flags | dict(q=None, s=None, COLS=True, POW2=True)),
        "quantize 128x128": (fp8.quantize_kernel, quantize | dict(x="*fp32"),
                             flags | dict(x_s=None, qt=None, st=None, ROWS=True, BLOCK=True)),
        "transpose 128x128": (fp8.quantize_kernel, quantize | dict(x="*fp32"),
                              flags | dict(x_s=None, q=None, s=None, COLS=True, BLOCK=True))}
    swiglu = dict(g="*fp8e4nv", s_g="*fp32", stride_g="i32", u="*fp8e4nv", s_u="*fp32", stride_u="i32", dh="*bf16", h="*bf16",
                  dg="*bf16", du="*bf16", M="i32", K="i32")
    return ({name: (kernel, signature, constants | tile, options)
             for name, (kernel, signature, constants) in products.items()}
            | {name: (*variant, dict(num_warps=8)) for name, variant in quantizers.items()}
            | {"swiglu backward": (fp8.swiglu_backward_kernel, swiglu, dict(ROWS=16), dict(num_warps=4))})


def numbers_in_shared(sass):
    """How many of the FP8 numbers that a thread makes get to shared memory, where a transpose passes: follows the bytes of
    registers from the conversions to the stores. All of 64 should (128x128 of 256 threads); ptxas 12.8 was seen to store
    other registers instead (see quantize_kernel)."""
    registers, numbers, stored = {}, itertools.count(), set()

    def content(register):      # what its four bytes hold: a number's name, or None for anything else
        return registers.get(register.split(".")[0], (None,) * 4)

    for op, args in re.findall(r"\*/ +(?:@!?\w+ )?([A-Z][\w.]+) (.*?) ?;", sass):
        to, *args = args.split(", ")
        if op.startswith("F2FP.SATFINITE.E4M3"):        # two numbers, before the lower half of the last operand
            registers[to] = next(numbers), next(numbers), *content(args[-1])[:2]
        elif op == "PRMT" and args[1].startswith("0x"):     # a byte of two registers for each digit
            digits = int(args[1], 16)
            registers[to] = tuple((content(args[0]) + content(args[2]))[digits >> 4 * i & 7] for i in range(4))
        elif op == "LOP3.LUT" and args[1:4] == ["0xffff", "RZ", "0xc0"]:
            registers[to] = *content(args[0])[:2], None, None
        elif op.startswith("SHF.R.") and args[:2] == ["RZ", "0x8"]:
            registers[to] = *content(args[2])[1:], None
        elif op.startswith(("MOV", "IMAD.MOV")):
            registers[to] = content(args[-1])
        elif op == "STS":
            stored.update(content(args[-1]))
        elif re.fullmatch(r"R\d+", to):
            for i in range(4 if "128" in op else 2 if "64" in op or "WIDE" in op else 1):
                registers.pop(f"R{int(to[1:]) + i}", None)
    return len(stored - {None})


def compile_kernels(capabilities):
    """Ahead of time, without a driver -> a list of dicts, one per kernel and capability. TRITON_INTERPRET must be unset."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    tools = Path(triton.__file__).parent / "backends/nvidia/bin"

    def disassemble(tool, *args):
        return subprocess.run([tools / tool, *args], capture_output=True, text=True, check=True).stdout

    rows = []
    for capability in capabilities:
        for name, (kernel, signature, constants, options) in kernel_variants(capability).items():
            signature = {arg: "constexpr" if arg in constants else signature[arg] for arg in kernel.arg_names}
            aligned = [i for i, arg in enumerate(kernel.arg_names) if signature[arg][0] == "*" or arg in (
                "M", "N", "K") or arg.startswith("stride")]     # what the launcher finds out by itself
            source = ASTSource(kernel, signature, {(kernel.arg_names.index(k),): v for k, v in constants.items()},
                               {(i,): [["tt.divisibility", 16]] for i in aligned if signature[kernel.arg_names[i]] !=
                                "constexpr"})
            compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
            with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
                cubin.write(compiled.asm["cubin"])
                cubin.flush()
                usage = re.search(r"REG:(\d+) STACK:(\d+)", disassemble("cuobjdump", "-res-usage", cubin.name))
                sass = disassemble("nvdisasm", "-c", cubin.name)
            count = {op: len(re.findall(rf"\b{op}\b", sass)) for op in ("QGMMA", "QMMA", "UTCQMMA", "HMMA", "HGMMA",
                                                                       "STL", "LDL", "UTMALDG")}
            ptx = compiled.asm["ptx"]
            rows.append(dict(
                capability=capability, kernel=name, warps=options["num_warps"], registers=int(usage[1]), stack=int(usage[2]),
                shared=compiled.metadata.shared, spills=count["STL"] + count["LDL"], tma_loads=count["UTMALDG"],
                fp8_mma=count["QGMMA"] + count["QMMA"] + count["UTCQMMA"], half_mma=count["HMMA"] + count["HGMMA"],
                ptx_fp8_mma=len(re.findall(r"wgmma\.mma_async.*e4m3\.e4m3|mma\.sync.*e4m3\.e4m3|tcgen05\.mma.*kind::f8f6f4",
                                           ptx)),
                fp8_in_shared=numbers_in_shared(sass),
                direct_casts=len(re.findall(r"cvt\.rn\.satfinite\.e4m3x2\.f32", ptx))))
    return rows


def print_compiled():
    print("No GPU with FP8 tensor cores here: nothing was run. Compiled ahead of time by Triton:\n")
    print("| sm | kernel | warps | registers | spills | shared memory | FP8 MMA instructions | TMA loads |")
    print("|---|---|---|---|---|---|---|---|")
    for row in compile_kernels(CARDS):
        print(f"| {row['capability']} | {row['kernel']} | {row['warps']} | {row['registers']} | {row['spills']} | "
              f"{row['shared'] / 1024:.0f} KB | {row['fp8_mma']} | {row['tma_loads']} |")
    print("\nRoofline, a bound and no measurement: the larger of FLOPs / peak and bytes / bandwidth, in microseconds\n")
    print("| product | M, N, K | " + " | ".join(f"{name} (sm_{sm})" for sm, (name, _, _) in CARDS.items()) + " |")
    print("|---|---|" + "---|" * len(CARDS))
    for name, (M, N, K) in DENSE.items():
        moved = M * K + N * K + 2 * M * N + 4 * K // 128 * (M + N // 128)
        bounds = [max(2 * M * N * K / flops, moved / bandwidth) for _, flops, bandwidth in CARDS.values()]
        print(f"| {name} | {M}, {N}, {K} | " + " | ".join(f"{1e6 * t:.0f}" for t in bounds) + " |")


# ----------------------------------------------------------------------------------------------------------------------
# On a GPU

def times(functions, repeats=20):
    """{name: function} -> {name: median seconds}, repeats interleaved, a cold L2 cache before each."""
    flush = torch.empty(2**30, dtype=torch.int8, device="cuda")     # takes longer to fill than a kernel to be launched
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
        a, b = fp8.quantize(x)[0], fp8.quantize_weight(w)
        one = torch.ones(M, 1, device="cuda"), torch.ones(1, N, device="cuda")
        out = torch.empty(M, N, device="cuda", dtype=torch.bfloat16)
        run = {"ours": lambda: fp8.gemm(a, b, torch.bfloat16), "bf16": lambda: x @ w.T,
               "rowwise": lambda: torch._scaled_mm(a.q, b.q[0].T, *one, out_dtype=torch.bfloat16)}
        if deep_gemm:
            run["DeepGEMM"] = lambda: deep_gemm.fp8_gemm_nt((a.q, a.s), (b.q[0], b.s[0]), out)
        t = times(run)
        print(f"| {name} | {M}, {N}, {K} | {2 * M * N * K / t['ours'] / 1e12:.0f} | {t['bf16'] / t['ours']:.2f}x | "
              f"{t['rowwise'] / t['ours']:.2f}x | "
              + (f"{t['DeepGEMM'] / t['ours']:.2f}x |" if deep_gemm else "not installed |"))


def bench_grouped():
    print("\n| grouped product | E, rows, N, K | gemm, TFLOP/s | vs bf16 grouped_mm | wgrad, TFLOP/s | vs bf16 |")
    print("|---|---|---|---|---|---|")
    for name, (E, M, N, K) in GROUPED.items():
        ends = torch.arange(1, E + 1, device="cuda", dtype=torch.int32) * (M // E // 128 * 128)
        x = torch.randn(M, K, device="cuda", dtype=torch.bfloat16)
        dy = torch.randn(M, N, device="cuda", dtype=torch.bfloat16)
        w = torch.randn(E, N, K, device="cuda", dtype=torch.bfloat16)
        (a, a_t), dy_t, b = fp8.quantize(x, cols=True), fp8.quantize(dy, cols=True)[1], fp8.quantize_weight(w)
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
               "both ways": lambda: fp8.quantize(x, cols=True), "again, 128x1": lambda: fp8.quantize(q, False, True),
               "128x128, fp32": lambda: fp8.quantize_weight(w),
               "128x128, fp32, transposed": lambda: fp8.quantize_weight(w, transposed=True)})
    moved = {"copy": 4, "1x128": 3, "both ways": 4, "again, 128x1": 2, "128x128, fp32": 5,
             "128x128, fp32, transposed": 5}        # bytes per number
    speed = {name: moved[name] * x.numel() / t[name] for name in t}
    print("\n| quantizer | GB/s | of a copy's |\n|---|---|---|")
    for name in t:
        print(f"| {name} | {speed[name] / 1e9:.0f} | {speed[name] / speed['copy']:.0%} |")


def bench_step():
    """Forward and backward of a dense and a MoE layer at the 16B model's shapes, 8192 tokens."""
    config = dataclasses.replace(DeepSeekV3Config.preset("16b"), num_hidden_layers=2, num_nextn_predict_layers=0,
                                 vocab_size=8192)
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
    print(f"\nTwo layers of the 16b preset, {idx.numel()} tokens, forward and backward: bf16 {1e3 * t['bf16']:.1f} ms, "
          f"fp8 {1e3 * t['fp8']:.1f} ms, {t['bf16'] / t['fp8']:.2f}x")


if __name__ == "__main__":
    if not torch.cuda.is_available() or fp8.kernels_missing(torch.device("cuda")):
        if fp8.triton is None:
            sys.exit("bench_fp8.py: " + fp8.kernels_missing(torch.device("cpu")))
        if os.environ.get("TRITON_INTERPRET"):
            sys.exit("bench_fp8.py: unset TRITON_INTERPRET, under which nothing is compiled")
        print_compiled()
    else:
        print(f"{torch.cuda.get_device_name()}, PyTorch {torch.__version__}, Triton {fp8.triton.__version__}")
        bench_dense()
        bench_grouped()
        bench_quantizers()
        bench_step()
