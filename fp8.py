"""
FP8 training as in DeepSeek-V3 (technical report, arXiv 2412.19437, §3.3): Triton kernels for NVIDIA GPUs, and
the same arithmetic in plain PyTorch, which is their specification and runs everywhere else.

A linear layer y = x W^T is three matrix products, each contracting over a different dimension:

    Fprop   y  (M, N) = x   (M, K) · W  (N, K)^T      contracts over the input channels K
    Dgrad   dx (M, K) = dy  (M, N) · W^T(K, N)^T      contracts over the output channels N
    Wgrad   dW (N, K) = dy^T(N, M) · x^T(K, M)^T      contracts over the tokens M

FP8 tensor cores want the contracted dimension of both operands contiguous, A (·, k) and B (·, k), so W, x and
dy are each needed both as they are and transposed. E4M3 has 3 bits of mantissa and reaches from 2^-9 to 448,
so every number is stored as q = x / s, with an fp32 scale s that puts the largest of its neighbours at 448.
Along the contracted dimension, 128 numbers share a scale: that is where the partial sum leaves the tensor
core, whose own accumulator keeps only about 14 bits, and is scaled and added up in fp32:

              k: 128 channels                       k: 128 channels
           ┌────────┬────────┬──                  ┌────────┬────────┬──
    token  │ s 1x128│ s      │         n: 128     │   s    │   s    │
           ├────────┼────────┼──       outputs    │128x128 │128x128 │
    token  │ s      │ s      │                    ├────────┼────────┼──
           ├────────┼────────┼──                  │   s    │   s    │
      activations and gradients                        weights

    acc = 0                                                    in fp32, on the CUDA cores
    for k in 0, 128, 256, ...:
        acc += (A[:, k:k+128] · B[:, k:k+128]^T) * s_A[:, k] * s_B[:, k]^T
               `------ FP8 tensor cores ------'

Wgrad contracts over tokens, so x and dy have a scale per 128 tokens of one channel there (128x1), which is
the 1x128 tile of their transpose. x is saved for the backward pass in FP8, and Wgrad requantizes it.

Embedding, head, gate, norms, attention itself, master weights and their gradients stay in bf16/fp32.

    convert_to_fp8(model)       swaps the layers of a model.DeepSeekV3 in place; names and checkpoints stay
"""

import contextlib
import functools
import warnings
from itertools import pairwise
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model import MLP, Experts, compute_dtype

try:
    import triton
    import triton.language as tl
    from triton.tools.tensor_descriptor import TensorDescriptor
except ImportError:     # no Triton for this platform: the emulation works without it
    triton = None

E4M3 = torch.float8_e4m3fn
E4M3_MAX = 448.0
# The smallest amax that becomes a scale, so that an all-zero tile gives zeros and not NaN. differs from
# DeepSeek's 1e-4: gradients of a mean over 10^6 tokens are smaller than that, and would vanish.
AMAX_MIN = 1e-30


class Quantized(NamedTuple):
    """A matrix, or a stack of them, in FP8. Sizes that are not multiples of 128 end in ragged tiles."""
    q: Tensor       # (..., M, K) float8_e4m3fn; the kernels need its rows to start at multiples of 16 bytes
    s: Tensor       # fp32, (..., M, ceil(K/128)) for 1x128 tiles, (..., ceil(M/128), ceil(K/128)) for blocks


# ------------------------------------------------------------------------------------------------------------
# The specification, in PyTorch

def tile_scale(amax, pow2=False):
    """amax of a tile -> its scale, both fp32. pow2: the next power of two (UE8M0): requantizing is exact."""
    scale = amax.clamp(min=AMAX_MIN) / E4M3_MAX
    if pow2:        # round the exponent up by clearing the mantissa; inf stays inf
        scale = ((scale.view(torch.int32) + 0x7FFFFF) & 0x7F800000).view(torch.float32)
    return scale


def quantize_reference(x, rows=1, pow2=False):
    """x: (..., M, K) -> Quantized with a scale per (rows x 128) tile. An inf or NaN becomes NaN."""
    M, K = x.shape[-2:]
    x = F.pad(x.float(), (0, -K % 128, 0, -M % rows)).contiguous()
    tiles = x.unflatten(-1, (-1, 128)).unflatten(-3, (-1, rows))            # (..., M/rows, rows, K/128, 128)
    amax = tiles.abs().nan_to_num_(0.0, torch.inf).amax((-3, -1), keepdim=True)
    scale = tile_scale(amax, pow2)                                              # (..., M/rows, 1, K/128, 1)
    q = (tiles * (1 / scale)).to(E4M3).flatten(-2).flatten(-3, -2)
    s = scale[..., 0, :, 0]
    return Quantized(q[..., :M, :K], s if rows > 1 else s.mT.contiguous().mT)   # laid out as in empty


def dequantize(q, s):
    """The two of a Quantized, or a released weight and its weight_scale_inv, which multiplies in spite of its
    name -> fp32 (..., M, K)."""
    M, K = q.shape[-2:]
    if s.size(-2) != M:
        s = s.repeat_interleave(128, -2)[..., :M, :]
    if q.device.type == "cpu":      # PyTorch's conversion is five times slower than a look-up there
        values = E4M3_VALUES.index_select(0, q.flatten().view(torch.uint8).int()).view(q.shape)
    else:
        values = q.float()
    return values.mul_(s.repeat_interleave(128, -1)[..., :K])


E4M3_VALUES = torch.arange(256, dtype=torch.uint8).view(E4M3).float()


def expert_rows(ends, M):
    """The rows of each expert; None: all M rows."""
    ends = [M] if ends is None else ends.tolist()
    return [slice(*pair) for pair in pairwise([0, *ends])]


def gemm_reference(a, b, dtype, ends=None):
    """See gemm."""
    a, b = dequantize(*a), dequantize(*b)                                       # (M, K), (J, E, N, K)
    c = a.new_zeros(b.size(0), a.size(0), b.size(2), dtype=dtype)
    for c_j, b_j in zip(c, b):
        for rows, b_e in zip(expert_rows(ends, len(a)), b_j):
            c_j[rows] = a[rows] @ b_e.T
    return c


def wgrad_reference(dy_t, x_t, ends=None):
    """See wgrad."""
    dy_t, x_t = dequantize(*dy_t), dequantize(*x_t)                             # (N, M), (K, M)
    return torch.stack([dy_t[:, rows] @ x_t[:, rows].T for rows in expert_rows(ends, dy_t.size(1))])


def swiglu_backward_reference(g, u, dh):
    """See swiglu_backward."""
    g, u, dtype, dh = dequantize(*g), dequantize(*u), dh.dtype, dh.float()
    sigmoid = g.sigmoid()
    silu = g * sigmoid
    return (silu * u).to(dtype), (dh * u * sigmoid * (1 + g - silu)).to(dtype), (dh * silu).to(dtype)


# ------------------------------------------------------------------------------------------------------------
# The kernels

if triton is not None:
    MAX: tl.constexpr = tl.constexpr(E4M3_MAX)
    MIN: tl.constexpr = tl.constexpr(AMAX_MIN)
    TILE: tl.constexpr = tl.constexpr(128)

    @triton.jit
    def to_e4m3(v, SM89: tl.constexpr):
        """Round to nearest, ties to even. On sm_89, Triton's cast truncates, so v is rounded before it."""
        if SM89:
            bits = v.to(tl.int32, bitcast=True)         # to 3 bits of mantissa, ties to even
            bits = (bits + 0x7FFFF + ((bits >> 20) & 1)) & -0x100000
            subnormal = (v + 24576.0) - 24576.0         # 1.5 * 2^14, where neighbours are 2^-9 apart
            rounded = tl.where(tl.abs(v) < 0.015625, subnormal, bits.to(tl.float32, bitcast=True))
            v = tl.where(v == v, rounded, v)
        return v.to(tl.float8e4nv)

    @triton.jit
    def quantize_tile(v, AXIS: tl.constexpr, BLOCK: tl.constexpr, POW2: tl.constexpr, SM89: tl.constexpr):
        """v (128, 128) -> v in FP8, and its scales along AXIS, (128,), all the same for a BLOCK."""
        amax = tl.max(tl.where(v == v, tl.abs(v), 0.0), AXIS)       # tl.max is undefined for NaN
        if BLOCK:
            amax = tl.max(amax, 0) + tl.zeros_like(amax)
        scale = tl.div_rn(tl.maximum(amax, MIN), MAX)               # plain / is an approximation on a GPU
        if POW2:
            scale = ((scale.to(tl.int32, bitcast=True) + 0x7FFFFF) & 0x7F800000).to(tl.float32, bitcast=True)
        return to_e4m3(v * tl.expand_dims(tl.div_rn(1.0, scale), AXIS), SM89), scale

    @triton.jit
    def quantize_kernel(x, x_s, q, s, qt, st, M, K, stride, ROWS: tl.constexpr, COLS: tl.constexpr,
                        BLOCK: tl.constexpr, POW2: tl.constexpr, SM89: tl.constexpr):
        """One 128x128 tile of x (E, M, K), whose rows are `stride` apart.

        ROWS: writes q (E, M, K) with scales s (K/128, M). COLS: writes the transpose qt (E, K, M) with st
        (M/128, K). BLOCK: one scale per block instead, s (E, M/128, K/128), st (E, K/128, M/128). Rows of q
        and qt are filled with zeros up to a multiple of 128. x_s: if given, x is itself FP8 with these scales
        (K/128, M).

        Never BLOCK with both: q and qt would hold the same FP8 numbers, and ptxas up to 12.9, which Triton
        calls for sm_89 and sm_90, then fills part of qt from the wrong registers (triton-lang/triton issue
        11111). Training became NaN because of it."""
        m, k, e = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
        MB, KB = tl.cdiv(M, TILE), tl.cdiv(K, TILE)
        i = tl.arange(0, TILE)
        rows, cols = m * TILE + i, k * TILE + i
        in_rows, in_cols = rows < M, cols < K
        # 64 bits for where the tile starts, 32 for the steps inside it: half the registers
        x += (e * M + m * TILE) * stride + k * TILE
        inside = in_rows[:, None] & in_cols[None, :]
        v = tl.load(x + i[:, None] * stride + i[None, :], inside, 0.0).to(tl.float32)
        if x_s is not None:
            v *= tl.load(x_s + k * M + rows, in_rows, 0.0)[:, None]
        at, at_t = i[:, None] * (KB * TILE) + i[None, :], i[:, None] * (MB * TILE) + i[None, :]
        if ROWS:
            v_q, scale = quantize_tile(v, 1, BLOCK, POW2, SM89)
            q += (e * M + m * TILE) * (KB * TILE) + k * TILE
            tl.store(q + at, v_q, in_rows[:, None])
            if BLOCK:
                tl.store(s + (e * MB + m) * KB + k + i, scale, i == 0)
            else:
                tl.store(s + k * M + rows, scale, in_rows)
        if COLS:
            v_q, scale = quantize_tile(v, 0, BLOCK, POW2, SM89)
            qt += (e * K + k * TILE) * (MB * TILE) + m * TILE
            tl.store(qt + at_t, tl.trans(v_q), in_cols[:, None])
            if BLOCK:
                tl.store(st + (e * KB + k) * MB + m + i, scale, i == 0)
            else:
                tl.store(st + m * K + cols, scale, in_cols)

    @triton.jit
    def tile_of(pid, M_TILES, N_TILES, GROUP: tl.constexpr = 8):
        """Tiles of C in bands of 8 rows, so that tiles in flight share their operands in the L2 cache."""
        band = pid // (GROUP * N_TILES)
        height = min(M_TILES - band * GROUP, GROUP)
        return band * GROUP + pid % (GROUP * N_TILES) % height, pid % (GROUP * N_TILES) // height

    @triton.jit
    def load_tile(x, row, col, height, stride, ROWS: tl.constexpr, TMA: tl.constexpr):
        """ROWS x 128 numbers of an FP8 matrix, through a TMA descriptor or from a pointer, whose rows of
        `stride` bytes must extend to a multiple of 128. Rows beyond the height are zeros or other rows; their
        sums are unused."""
        if TMA:
            return x.load([row, col])
        else:
            rows, cols = (tl.arange(0, ROWS) + row) % height, tl.arange(0, TILE) + col
            return tl.load(x + rows[:, None].to(tl.int64) * stride + cols[None, :])

    @triton.jit
    def gemm_kernel(a, s_a, stride_a, b, s_b, stride_b, c, stride_c, ends, J, E, M, N, KB,
                    EXPERTS: tl.constexpr, ROWS: tl.constexpr, TMA: tl.constexpr):
        """Fprop and Dgrad: c[j] (M, N) = a (M, K)·b[j, e] (N, K)^T. e: the expert that owns these rows of a
        by ends, or 0. a, and b flattened to (J*E*N, K): see load_tile; s_a: (K/128, M); s_b: (J, E, N/128,
        K/128); KB: K/128; EXPERTS: E rounded up to a power of two; ROWS: a tile of c is ROWS x 128."""
        N_TILES = tl.cdiv(N, TILE)
        pid_m, pid_n = tile_of(tl.program_id(0), tl.cdiv(M, ROWS), J * N_TILES)
        j, pid_n = pid_n // N_TILES, pid_n % N_TILES
        e = 0
        if ends is not None:
            i = tl.arange(0, EXPERTS)
            e = tl.sum((tl.load(ends + i, i < E, M) <= pid_m * ROWS).to(tl.int32), 0)
            KB = tl.where(e < E, KB, 0)     # rows after the last expert's come out as zeros
        e += j * E
        i, n = tl.arange(0, ROWS), tl.arange(0, TILE)
        rows, cols = pid_m * ROWS + i, pid_n * TILE + n
        s_b += (e * N_TILES + pid_n) * KB
        acc = tl.zeros((ROWS, TILE), tl.float32)
        for k in range(KB):
            tile_a = load_tile(a, pid_m * ROWS, k * TILE, M, stride_a, ROWS, TMA)
            tile_b = load_tile(b, e * N + pid_n * TILE, k * TILE, J * E * N, stride_b, TILE, TMA)
            scale = tl.load(s_a + k * M + rows, rows < M, 0.0) * tl.load(s_b + k)           # (ROWS,)
            acc += tl.dot(tile_a, tile_b.T) * scale[:, None]
        c += (j * M + pid_m * ROWS).to(tl.int64) * stride_c + pid_n * TILE
        tl.store(c + i[:, None] * stride_c + n[None, :], acc.to(c.dtype.element_ty),
                 (rows < M)[:, None] & (cols < N)[None, :])

    @triton.jit
    def wgrad_kernel(a, s_a, stride_a, b, s_b, stride_b, c, stride_c, ends, N, K, M, ROWS: tl.constexpr,
                     TMA: tl.constexpr):
        """Wgrad: c[e] (N, K) = a (N, M)·b (K, M)^T over the tokens of expert e, or all tokens. a, b: see
        load_tile; s_a: (M/128, N); s_b: (M/128, K); rows of the stack c are stride_c apart."""
        pid_n, pid_k = tile_of(tl.program_id(0), tl.cdiv(N, ROWS), tl.cdiv(K, TILE))
        e = tl.program_id(1)
        start, end = 0, M
        if ends is not None:
            start, end = tl.load(ends + e - 1, e > 0, 0), tl.load(ends + e)
        rows, cols = pid_n * ROWS + tl.arange(0, ROWS), pid_k * TILE + tl.arange(0, TILE)
        acc = tl.zeros((ROWS, TILE), tl.float32)
        for t in range(start // TILE, tl.cdiv(end, TILE)):
            tile_a = load_tile(a, pid_n * ROWS, t * TILE, N, stride_a, ROWS, TMA)
            tile_b = load_tile(b, pid_k * TILE, t * TILE, K, stride_b, TILE, TMA)
            scale_a = tl.load(s_a + t * N + rows % N)                                       # (ROWS,)
            scale_b = tl.load(s_b + t * K + cols % K)                                       # (128,)
            acc += tl.dot(tile_a, tile_b.T) * scale_a[:, None] * scale_b[None, :]
        at = (e.to(tl.int64) * N + rows)[:, None] * stride_c + cols[None, :]
        tl.store(c + at, acc, (rows < N)[:, None] & (cols < K)[None, :])

    @triton.jit
    def swiglu_backward_kernel(g, s_g, stride_g, u, s_u, stride_u, dh, h, dg, du, M, K, ROWS: tl.constexpr):
        """See swiglu_backward; ROWS x 128 numbers of each. s_g, s_u: (K/128, M); dh, h, dg, du are
        contiguous."""
        m, k = tl.program_id(0), tl.program_id(1)
        rows, cols = m * ROWS + tl.arange(0, ROWS), k * TILE + tl.arange(0, TILE)
        in_rows, inside = rows < M, (rows < M)[:, None] & (cols < K)[None, :]
        row, col = rows[:, None].to(tl.int64), cols[None, :]
        g = tl.load(g + row * stride_g + col, inside, 0.0).to(tl.float32)
        g *= tl.load(s_g + k * M + rows, in_rows, 0.0)[:, None]
        u = tl.load(u + row * stride_u + col, inside, 0.0).to(tl.float32)
        u *= tl.load(s_u + k * M + rows, in_rows, 0.0)[:, None]
        d = tl.load(dh + row * K + col, inside, 0.0).to(tl.float32)
        sigmoid = tl.sigmoid(g)
        silu = g * sigmoid
        tl.store(h + row * K + col, (silu * u).to(h.dtype.element_ty), inside)
        tl.store(dg + row * K + col, (d * u * sigmoid * (1 + g - silu)).to(h.dtype.element_ty), inside)
        tl.store(du + row * K + col, (d * silu).to(h.dtype.element_ty), inside)


# ------------------------------------------------------------------------------------------------------------
# Each operation: its kernel, or the specification where no kernel runs

def capability(device):
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else (9, 0)   # interpreted


def kernels_missing(device):
    """None where the kernels run on this device, else the reason why they do not, for a message."""
    if triton is None:
        return "triton is not installed (pip install triton)"
    if device.type != "cuda":
        return f"the device is {device.type}, not an NVIDIA GPU"
    if torch.version.hip:
        return "the kernels are written for NVIDIA GPUs, and this one is AMD's"
    major, minor = capability(device)
    if (major, minor) < (8, 9) or major not in (8, 9, 10, 12):
        name = torch.cuda.get_device_name(device)
        return f"{name} (sm_{major}{minor}) is not one of sm_89, sm_90, sm_100 and sm_120"
    return None


def emulated(x):
    """Whether PyTorch computes instead of a kernel: where none runs, and on nothing at all."""
    return kernels_missing(x.device) is not None or not x.numel()


def empty(x, *shape):
    """An uninitialized Quantized on x's device: (M, K) in 1x128 tiles, a stack of weights (..., M, K) in
    blocks. Rows of q extend to a multiple of 128. Scales of tiles are stored with the contracted dimension
    first: the GEMM reads those of neighbouring rows together."""
    *stack, M, K = shape
    MB, KB = -(-M // 128), -(-K // 128)     # triton.cdiv takes microseconds
    q = x.new_empty(*stack, M, KB * 128, dtype=E4M3)[..., :K]
    if stack:
        return Quantized(q, x.new_empty(*stack, MB, KB, dtype=torch.float32))
    return Quantized(q, x.new_empty(KB, M, dtype=torch.float32).T)


def launch_quantizer(x, s, straight, transposed, pow2):
    """Quantizes x into straight and x^T into transposed, unless they are None. x: (M, K) bf16 or fp32, or FP8
    with its scales s, in tiles; a stack of weights (E, M, K) in blocks."""
    *stack, M, K = x.shape
    x = x.contiguous() if stack or x.stride(1) != 1 else x
    quantize_kernel[(-(-M // 128), -(-K // 128), *(stack or [1]))](
        x, None if s is None else s.T.contiguous(), *(straight or [None] * 2), *(transposed or [None] * 2),
        M, K, x.stride(-2), ROWS=straight is not None, COLS=transposed is not None, BLOCK=bool(stack),
        POW2=pow2, SM89=capability(x.device) == (8, 9), num_warps=8)


def quantize(x, rows=True, cols=False, pow2=False):
    """An activation or a gradient. x: (M, K) bf16 or fp32, or a Quantized of 1x128 tiles. -> (x in 1x128
    tiles if rows, else None; x^T (K, M) in 1x128 tiles, which are x's 128x1, if cols, else None)."""
    x, s = x if isinstance(x, Quantized) else (x, None)
    if emulated(x):
        x = x if s is None else dequantize(x, s)
        return (quantize_reference(x, 1, pow2) if rows else None,
                quantize_reference(x.T, 1, pow2) if cols else None)
    M, K = x.shape
    outputs = empty(x, M, K) if rows else None, empty(x, K, M) if cols else None
    launch_quantizer(x, s, *outputs, pow2)
    return outputs


def quantize_weights(weights, transposed=False, pow2=False):
    """J weights of one shape, each (N, K) or a stack (E, N, K) -> Quantized (J, E, N, K), or their transposes
    (J, E, K, N), in blocks of 128x128."""
    cache = getattr(weights[0], "fp8_cache", None)      # see quantized_once
    if cache is None:
        return quantize_weights_uncached(weights, transposed, pow2)
    key = transposed, pow2, *((id(w), w._version) for w in weights)
    if key not in cache:
        cache[key] = quantize_weights_uncached(weights, transposed, pow2)
    return cache[key]


def quantize_weights_uncached(weights, transposed, pow2):
    if weights[0].dtype == E4M3:
        raise TypeError("weights held in FP8 are for inference; to train them, load them in bfloat16")
    weights = [w.view(-1, *w.shape[-2:]) for w in weights]
    if emulated(weights[0]):
        quantized = [quantize_reference(w.mT if transposed else w, 128, pow2) for w in weights]
        return Quantized(*map(torch.stack, zip(*quantized)))
    E, N, K = weights[0].shape
    stack = empty(weights[0], len(weights), E, *((K, N) if transposed else (N, K)))
    for w, out in zip(weights, map(Quantized, *stack)):
        launch_quantizer(w, None, *((None, out) if transposed else (out, None)), pow2)
    return stack


@contextlib.contextmanager
def quantized_once(model):
    """Inside this context each weight is quantized once, at its first use, for all micro-batches and
    recomputations of a step; without it, at every use. Costs two bytes per weight until it ends. A weight
    that is changed in place meanwhile is quantized again. FSDP's gathered weights are other tensors and are
    quantized at every use, since their contents change unseen."""
    weights = [p for m in model.modules() if type(m) in FP8_LAYERS.values() for p in m.parameters()]
    for p in weights:
        p.fp8_cache = {}
    try:
        yield
    finally:
        for p in weights:
            p.__dict__.pop("fp8_cache", None)


def gemm(a, b, dtype, ends=None):
    """Fprop and Dgrad: a · b[j]^T, (J, M, N) in dtype, J products in one. a: Quantized (M, K) in 1x128 tiles;
    b: Quantized (J, E, N, K) in blocks.

    ends: (E,) int32, multiples of 128: rows ends[e-1]..ends[e]-1 of a meet b[:, e], rows beyond come out as
    zeros. None: E is 1, and M need not be a multiple of anything."""
    if emulated(a.q):
        return gemm_reference(a, b, dtype, ends)
    M, (J, E, N, K), options = len(a.q), b.q.shape, launch_options(a.q.device)
    c = empty_aligned(J, M, N, dtype=dtype, device=a.q.device)
    gemm_kernel[-(-M // options["ROWS"]) * J * -(-N // 128),](
        *operand(a.q, a.s.T, options["ROWS"], options), *operand(b.q, b.s, 128, options),
        c, c.stride(1), ends, J, E, M, N, -(-K // 128), EXPERTS=1 << (E - 1).bit_length(), **options)
    return c.contiguous()


def wgrad(dy_t, x_t, ends=None):
    """Wgrad: dy^T · x, (E, N, K) fp32. dy_t: Quantized (N, M), x_t: Quantized (K, M), both in 1x128 tiles;
    ends: as in gemm; an expert without rows gets zeros."""
    if emulated(dy_t.q):
        return wgrad_reference(dy_t, x_t, ends)
    (N, M), K, options = dy_t.q.shape, len(x_t.q), launch_options(dy_t.q.device)
    E = 1 if ends is None else len(ends)
    c = empty_aligned(E, N, K, dtype=torch.float32, device=dy_t.q.device)
    wgrad_kernel[-(-N // options["ROWS"]) * -(-K // 128), E](
        *operand(dy_t.q, dy_t.s.T, options["ROWS"], options), *operand(x_t.q, x_t.s.T, 128, options),
        c, c.stride(1), ends, N, K, M, **options)
    return c.contiguous()


def empty_aligned(*shape, **kwargs):
    """Rows start at multiples of 16 elements: with unaligned rows, the kernels would run out of registers."""
    return torch.empty(*shape[:-1], -(-shape[-1] // 16) * 16, **kwargs)[..., :shape[-1]]


def operand(q, s, rows, options):
    """A kernel's three arguments for a matrix: where it is, its scales, and the bytes between its rows."""
    q = q.flatten(0, -2)
    # TMA, the copy engine of sm_90 and later, fetches whole tiles, and zeros for what lies beyond the edges
    where = TensorDescriptor.from_tensor(q, [rows, 128]) if options["TMA"] else q
    return where, s.contiguous(), q.stride(0)


def launch_options(device):
    """Options of the matrix products. The tiles in flight fill the shared memory: 227 KB in data-center
    cards, 99 KB in the others. On Hopper three small programs share it: while one scales its sums, the others
    keep the tensor cores busy."""
    major, _ = capability(device)
    if major == 9:
        return dict(ROWS=64, TMA=True, num_warps=4, num_stages=3)
    return dict(ROWS=128, TMA=major > 9, num_warps=8, num_stages=4 if major == 10 else 3)


def swiglu_backward(g, u, dh):
    """g, u: Quantized (M, I) in 1x128 tiles; dh: (M, I), the gradient of h = silu(g) * u. -> h and the
    gradients of g and u, each (M, I) in dh's dtype, computed in fp32."""
    if emulated(dh):
        return swiglu_backward_reference(g, u, dh)
    (M, K), dh = dh.shape, dh.contiguous()
    outputs = torch.empty_like(dh), torch.empty_like(dh), torch.empty_like(dh)
    swiglu_backward_kernel[-(-M // 16), -(-K // 128)](
        g.q, g.s.T.contiguous(), g.q.stride(0), u.q, u.s.T.contiguous(), u.q.stride(0), dh, *outputs,
        M, K, ROWS=16, num_warps=4)
    return outputs


# ------------------------------------------------------------------------------------------------------------
# Forward and backward of the layers. torch.compile cannot trace kernels that take TMA descriptors: to it each
# is one opaque operation, whose results have the shapes that the function after it gives.

def operation(function):
    """A custom operation of PyTorch, which runs outside of autocast: its arguments give the dtypes."""
    @functools.wraps(function)
    def without_autocast(*args):
        with torch.autocast(args[0].device.type, enabled=False):
            return function(*args)
    return torch.library.custom_op(f"fp8::{function.__name__}", without_autocast, mutates_args=())


@operation
def linear(x: Tensor, weight: Tensor, scale: Tensor | None, pow2_x: bool, pow2: bool,
           dtype: torch.dtype) -> list[Tensor]:
    """y = x W^T. x: (M, K); weight: (N, K), in FP8 if it has a scale. -> y (M, N) in dtype, and x's q, s."""
    x_q, _ = quantize(x, pow2=pow2_x)
    w = quantize_weights([weight], pow2=pow2) if scale is None else held(weight, scale)
    return [gemm(x_q, w, dtype)[0], *x_q]                                                   # Fprop


@linear.register_fake
def _(x, weight, scale, pow2_x, pow2, dtype):
    return [x.new_empty(x.size(0), weight.size(0), dtype=dtype), *empty(x, *x.shape)]


def held(weight, scale):
    """A weight that is stored in FP8 (see hold_in_fp8), as quantize_weights returns it."""
    return Quantized(weight.view(1, -1, *weight.shape[-2:]), scale.view(1, -1, *scale.shape[-2:]))


@operation
def linear_backward(dy: Tensor, weight: Tensor, q: Tensor, s: Tensor, pow2_x: bool, pow2: bool,
                    dtype: torch.dtype) -> list[Tensor]:
    """q, s: linear's; dtype: x's. -> dx (M, K), dW (N, K)."""
    dy_q, dy_t = quantize(dy, cols=True, pow2=pow2)
    _, x_t = quantize(Quantized(q, s), rows=False, cols=True, pow2=pow2_x)
    return [input_grad(weight, dy_q, pow2, dtype), weight_grad(weight, dy_t, x_t)]


@linear_backward.register_fake
def _(dy, weight, q, s, pow2_x, pow2, dtype):
    return [dy.new_empty(q.shape, dtype=dtype), torch.empty_like(weight)]


def input_grad(weight, dy_q, pow2, dtype, ends=None):                                       # Dgrad
    return gemm(dy_q, quantize_weights([weight], transposed=True, pow2=pow2), dtype, ends)[0]


def weight_grad(weight, dy_t, x_t, ends=None):                                              # Wgrad
    return wgrad(dy_t, x_t, ends).view_as(weight).to(weight.dtype)


class Linear(torch.autograd.Function):
    """y = x W^T with its three products in FP8; x is saved for the backward pass in FP8."""

    @staticmethod
    def forward(ctx, x, weight, scale, pow2_x, pow2, dtype):
        y, q, s = linear(x, weight, scale, pow2_x, pow2, dtype)
        ctx.save_for_backward(weight, q, s)
        ctx.options = pow2_x, pow2, x.dtype
        return y

    @staticmethod
    def backward(ctx, dy):
        return *linear_backward(dy, *ctx.saved_tensors, *ctx.options), *[None] * 4


def scatter_rows(x, place, rows):
    """x: Quantized (N, D) in 1x128 tiles; place: (N*K,), the row of each of a token's K slots. -> the rows of
    all slots, (rows, D), zeros elsewhere. None: every token has one slot, in order."""
    if place is None:
        return x
    (N, D), KB = x.q.shape, x.s.size(1)
    place = place.view(N, -1)                                                               # (N, K)
    q, s = x.q.new_zeros(rows, KB * 128, dtype=torch.uint8), x.s.new_zeros(KB, rows).T
    q[:, :D][place] = x.q.view(torch.uint8)[:, None]
    s[place] = x.s[:, None]
    return Quantized(q.view(E4M3)[:, :D], s)


@operation
def mlp(x: Tensor, weights: list[Tensor], scales: list[Tensor], place: Tensor | None, rows: int,
        ends: Tensor | None, pow2: bool, dtype: torch.dtype) -> list[Tensor]:
    """y = W_down (silu(W_gate x) * W_up x), of an MLP or, with ends, of experts, each on its rows.

    x: (N, D); weights: gate and up, (I, D) or (E, I, D), and down, (D, I) or (E, D, I), in FP8 if they have
    scales; place, rows: see scatter_rows; ends: see gemm. -> y (rows, D) in dtype; q, s of x, W_gate x and
    W_up x."""
    x_q, _ = quantize(x, pow2=pow2)     # before its rows are copied K times
    x_rows = scatter_rows(x_q, place, rows)
    if scales:
        gate, up, down = map(held, weights, scales)
        g, u = gemm(x_rows, gate, dtype, ends)[0], gemm(x_rows, up, dtype, ends)[0]
    else:
        g, u = gemm(x_rows, quantize_weights(weights[:2], pow2=pow2), dtype, ends)          # (rows, I) each
        down = quantize_weights(weights[2:], pow2=pow2)
    h, _ = quantize(F.silu(g) * u, pow2=pow2)
    return [gemm(h, down, dtype, ends)[0], *x_q, *quantize(g, pow2=pow2)[0], *quantize(u, pow2=pow2)[0]]


@mlp.register_fake
def _(x, weights, scales, place, rows, ends, pow2, dtype):
    (N, D), I = x.shape, weights[0].size(-2)
    y = x.new_empty(rows, D, dtype=dtype)
    return [y, *empty(x, N, D), *empty(x, rows, I), *empty(x, rows, I)]


@operation
def mlp_backward(dy: Tensor, weights: list[Tensor], saved: list[Tensor], place: Tensor | None,
                 ends: Tensor | None, pow2: bool, dtype: torch.dtype) -> list[Tensor]:
    """saved: what mlp returns after y; dtype: x's. -> the gradients of x and of the three weights."""
    (gate, up, down), (x_q, g_q, u_q) = weights, map(Quantized, saved[::2], saved[1::2])

    dy_q, dy_t = quantize(dy, cols=True, pow2=pow2)
    dh = input_grad(down, dy_q, pow2, dy.dtype, ends)                                       # (rows, I)
    h, dg, du = swiglu_backward(g_q, u_q, dh)
    dg_q, dg_t = quantize(dg, cols=True, pow2=pow2)
    du_q, du_t = quantize(du, cols=True, pow2=pow2)
    _, h_t = quantize(h, rows=False, cols=True, pow2=pow2)
    _, x_t = quantize(scatter_rows(x_q, place, dy.size(0)), rows=False, cols=True, pow2=pow2)
    dx = input_grad(gate, dg_q, pow2, dtype, ends) + input_grad(up, du_q, pow2, dtype, ends)    # (rows, D)
    if place is not None:
        dx = dx[place].view(x_q.q.size(0), -1, dx.size(1)).sum(1)                           # (N, D)
    return [dx, weight_grad(gate, dg_t, x_t, ends), weight_grad(up, du_t, x_t, ends),
            weight_grad(down, dy_t, h_t, ends)]


@mlp_backward.register_fake
def _(dy, weights, saved, place, ends, pow2, dtype):
    return [dy.new_empty(saved[0].shape, dtype=dtype), *map(torch.empty_like, weights)]


class SwiGLU(torch.autograd.Function):
    """mlp. x, W_gate x and W_up x are saved for the backward pass in FP8; h is recomputed (§3.3.3)."""

    @staticmethod
    def forward(ctx, x, gate, up, down, scales, place, rows, ends, pow2, dtype):
        y, *saved = mlp(x, [gate, up, down], scales, place, rows, ends, pow2, dtype)
        ctx.save_for_backward(gate, up, down, place, ends, *saved)
        ctx.options = pow2, x.dtype
        return y

    @staticmethod
    def backward(ctx, dy):
        gate, up, down, place, ends, *saved = ctx.saved_tensors
        return *mlp_backward(dy, [gate, up, down], saved, place, ends, *ctx.options), *[None] * 6


# ------------------------------------------------------------------------------------------------------------
# Layers: those of model.py, with different arithmetic

class FP8Linear(nn.Linear):
    """nn.Linear in FP8. pow2: all scales are powers of two; pow2_x: those of x are, as the report has them
    for o_proj, whose input is quantized twice, along channels and along tokens."""
    pow2 = pow2_x = False

    def forward(self, x):
        """x: (..., in_features) bf16 or fp32; returns (..., out_features) in autocast's dtype or x's."""
        scale = getattr(self, "weight_scale_inv", None)     # see hold_in_fp8
        rows = x.reshape(-1, self.in_features)                                              # (M, K)
        y = Linear.apply(rows, self.weight, scale, self.pow2_x, self.pow2, compute_dtype(x))
        y = y.view(*x.shape[:-1], self.out_features)
        return y if self.bias is None else y + self.bias


def apply_mlp(layer, x, place, rows, ends):
    """SwiGLU with the layer's weights, which are gate_proj, up_proj and down_proj, and their scales."""
    weights, scales = layer.parameters(), list(layer.buffers())         # see hold_in_fp8
    return SwiGLU.apply(x, *weights, scales, place, rows, ends, layer.pow2, compute_dtype(x))


class FP8MLP(MLP):
    """model.MLP in FP8."""
    pow2 = False

    def forward(self, x):
        rows = x.flatten(0, -2)                                                             # (M, D)
        return apply_mlp(self, rows, None, len(rows), None).view(x.shape)


class FP8Experts(Experts):
    """model.Experts in FP8. Each expert's rows are padded to a multiple of 128, since for Wgrad a tile of 128
    tokens must not straddle two experts."""
    pow2 = False
    swiglu = apply_mlp

    def padding(self, x, load):
        return 128, 0, False

    def gathered(self, x, slots, K):
        load = slots.new_zeros(self.gate_proj.size(0)).scatter_add_(0, slots, torch.ones_like(slots))
        return self.grouped(x, slots, load)


FP8_LAYERS = {nn.Linear: FP8Linear, MLP: FP8MLP, Experts: FP8Experts}


def convert_to_fp8(model, pow2=False):
    """Make nn.Linear, MLP and Experts inside a model compute in FP8, in place, and return it. Embedding, head
    (lm_head), gates and norms stay. Parameters and their names stay too, so optimizers and checkpoints are
    unaffected. pow2: all scales are powers of two (UE8M0), as DeepSeek-V3.1 was trained; else only those of
    o_proj's input. Warns where PyTorch emulates the kernels; ValueError for a device without FP8 numbers."""
    device = next(model.parameters()).device
    if device.type not in ("cuda", "cpu", "meta"):
        raise ValueError(f"FP8 needs cuda or, emulated, cpu; the model is on {device.type}")
    for name, module in model.named_modules():
        if name.rpartition(".")[2] != "lm_head" and type(module) in FP8_LAYERS:
            module.__class__ = FP8_LAYERS[type(module)]
            module.pow2, module.pow2_x = pow2, pow2 or name.endswith("o_proj")
    if reason := kernels_missing(device):
        warnings.warn(f"FP8 is emulated in PyTorch, with the same rounding but no speed-up: {reason}",
                      stacklevel=2)
    return model


def hold_in_fp8(model, pow2=False):
    """Make a model that was built on "meta" hold what a release stores in FP8 in that form, for inference:
    `weight` float8_e4m3fn and `weight_scale_inv`, half of bf16's memory. pow2: as in convert_to_fp8. Left as
    they are: kv_b_proj, whose weights absorbed attention reads directly, layers whose inputs are no multiple
    of 128, and what a release does not quantize. Returns the model."""
    for name, module in model.named_modules():
        stays = name.endswith(("lm_head", "eh_proj", "kv_b_proj"))
        if stays or type(module) not in FP8_LAYERS or any(p.size(-1) % 128 for p in module.parameters()):
            continue
        module.__class__ = FP8_LAYERS[type(module)]
        module.pow2, module.pow2_x = pow2, pow2 or name.endswith("o_proj")
        for key, p in list(module.named_parameters(recurse=False)):
            blocks = *p.shape[:-2], -(-p.size(-2) // 128), -(-p.size(-1) // 128)
            setattr(module, key, nn.Parameter(torch.empty_like(p, dtype=E4M3), requires_grad=False))
            scale = torch.empty(blocks, dtype=torch.float32, device=p.device)
            module.register_buffer(f"{key}_scale_inv", scale)
    return model
