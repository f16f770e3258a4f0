"""
FP8 training as DeepSeek-V3 does it (technical report, arXiv 2412.19437, §3.3): Triton kernels for NVIDIA GPUs, and the
same arithmetic in plain PyTorch, which is their specification and what runs everywhere else.

A linear layer y = x W^T is three matrix products, and each of them contracts over another dimension:

    Fprop   y  (M, N) = x   (M, K) · W  (N, K)^T      contracts over the input channels K
    Dgrad   dx (M, K) = dy  (M, N) · W^T(K, N)^T      contracts over the output channels N
    Wgrad   dW (N, K) = dy^T(N, M) · x^T(K, M)^T      contracts over the tokens M

FP8 tensor cores want both operands with the contracted dimension contiguous, A (·, k) and B (·, k), so that W, x and dy
are each needed as they are and transposed. E4M3 has 3 bits of mantissa and reaches from 2^-9 to 448, so every number is
stored as q = x / s with an fp32 scale s that puts the largest of its neighbours at 448. How many share a scale is what
makes it work or not. Along the contracted dimension it is always 128 numbers, which is where the partial sum leaves the
tensor core, whose own accumulator keeps about 14 bits, and is scaled and added up in fp32:

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

Wgrad contracts over tokens: there x and dy have a scale per 128 tokens of one channel (128x1), which is the 1x128 tile of
their transpose. The activation x is saved for the backward pass in FP8, and Wgrad requantizes that.

Stays in bf16/fp32: embedding, head, gate, norms, attention itself, master weights, gradients of weights.

    convert_to_fp8(model)       swaps the right layers of a model.DeepSeekV3 in place; names and checkpoints stay
"""

import warnings
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from model import MLP, Experts

try:
    import triton
    import triton.language as tl
    from triton.tools.tensor_descriptor import TensorDescriptor
except ImportError:     # no Triton for this platform: the arithmetic below still is
    triton = None

E4M3 = torch.float8_e4m3fn
E4M3_MAX = 448.0
# Smallest amax that becomes a scale, so that an all-zero tile gives zeros and not NaN. differs from DeepSeek's 1e-4: the
# gradients of a mean over 10^6 tokens lie below that, and would vanish.
AMAX_MIN = 1e-30


class Quantized(NamedTuple):
    """A matrix, or a stack of them, in FP8; sizes that are no multiples of 128 end in ragged tiles."""
    q: torch.Tensor     # (..., M, K) float8_e4m3fn; the kernels want its rows to start at multiples of 16 bytes
    s: torch.Tensor     # fp32, (..., M, ceil(K/128)) for tiles of 1x128, (..., ceil(M/128), ceil(K/128)) for blocks


# ----------------------------------------------------------------------------------------------------------------------
# The specification, in PyTorch

def tile_scale(amax, pow2=False):
    """amax of a tile -> its scale, both fp32. pow2: the next power of two, so that requantizing loses nothing."""
    scale = amax.clamp(min=AMAX_MIN) / E4M3_MAX
    if pow2:        # round the exponent up by clearing the mantissa; inf stays inf
        scale = ((scale.view(torch.int32) + 0x7FFFFF) & 0x7F800000).view(torch.float32)
    return scale


def quantize_reference(x, rows=1, pow2=False):
    """x: (..., M, K) -> Quantized with a scale per (rows x 128) tile. A NaN stays one; an inf makes its tile NaN."""
    M, K = x.shape[-2:]
    x = F.pad(x.float(), (0, -K % 128, 0, -M % rows)).contiguous()
    tiles = x.unflatten(-1, (-1, 128)).unflatten(-3, (-1, rows))                # (..., M/rows, rows, K/128, 128)
    amax = tiles.abs().nan_to_num_(0.0, torch.inf).amax((-3, -1), keepdim=True)
    scale = tile_scale(amax, pow2)                                              # (..., M/rows, 1, K/128, 1)
    q = (tiles * (1 / scale)).to(E4M3).flatten(-2).flatten(-3, -2)
    return Quantized(q[..., :M, :K], scale[..., 0, :, 0])


def dequantize(q, s):
    """fp32 (..., M, K) from q: (..., M, K) float8_e4m3fn and s: scales of its 1x128 tiles or 128x128 blocks, the last
    of which may be ragged: (..., M or ceil(M/128), ceil(K/128))."""
    M, K = q.shape[-2:]
    if s.size(-2) != M:
        s = s.repeat_interleave(128, -2)[..., :M, :]
    if q.device.type == "cpu":      # where PyTorch's conversion takes five times as long as a look-up
        values = E4M3_VALUES.index_select(0, q.flatten().view(torch.uint8).int()).view(q.shape)
    else:
        values = q.float()
    return values.mul_(s.repeat_interleave(128, -1)[..., :K])


E4M3_VALUES = torch.arange(256, dtype=torch.uint8).view(E4M3).float()


def weight_dequant(weight, scale_inv):
    """A released checkpoint's FP8 to fp32. weight: (M, N) float8_e4m3fn; scale_inv: (ceil(M/128), ceil(N/128)), the
    scales of blocks, which multiply in spite of their name."""
    return dequantize(weight, scale_inv.float())


def gemm_reference(a, b, dtype, ends=None):
    """See gemm."""
    a, b = dequantize(*a), dequantize(*b)
    if ends is None:
        return (a @ b[0].T).to(dtype)
    *of_experts, beyond = a.tensor_split(ends.tolist())
    products = [a_e @ b_e.T for a_e, b_e in zip(of_experts, b)]
    return torch.cat([*products, a.new_zeros(len(beyond), b.size(1))]).to(dtype)


def wgrad_reference(dy_t, x_t, ends=None):
    """See wgrad."""
    dy_t, x_t = dequantize(*dy_t), dequantize(*x_t)
    if ends is None:
        return (dy_t @ x_t.T)[None]
    split = ends.tolist()
    return torch.stack([d @ x.T for d, x, _ in zip(dy_t.tensor_split(split, 1), x_t.tensor_split(split, 1), split)])


def swiglu_backward_reference(g, u, dh):
    """See swiglu_backward."""
    g, u, dtype, dh = dequantize(*g), dequantize(*u), dh.dtype, dh.float()
    sigmoid = g.sigmoid()
    silu = g * sigmoid
    return (silu * u).to(dtype), (dh * u * sigmoid * (1 + g - silu)).to(dtype), (dh * silu).to(dtype)


# ----------------------------------------------------------------------------------------------------------------------
# The kernels

if triton is not None:
    MAX: tl.constexpr = tl.constexpr(E4M3_MAX)
    MIN: tl.constexpr = tl.constexpr(AMAX_MIN)
    TILE: tl.constexpr = tl.constexpr(128)

    @triton.jit
    def scale_of(amax, POW2: tl.constexpr):
        scale = tl.div_rn(tl.maximum(amax, MIN), MAX)      # plain / is an approximation on a GPU
        if POW2:
            scale = ((scale.to(tl.int32, bitcast=True) + 0x7FFFFF) & 0x7F800000).to(tl.float32, bitcast=True)
        return scale

    @triton.jit
    def to_e4m3(v, SM89: tl.constexpr):
        """To the nearest. For sm_89 Triton casts by way of fp16, which it truncates to: there v is rounded beforehand."""
        if SM89:
            bits = v.to(tl.int32, bitcast=True)         # to 3 bits of mantissa, ties to even
            bits = (bits + 0x7FFFF + ((bits >> 20) & 1)) & -0x100000
            subnormal = (v + 24576.0) - 24576.0         # 1.5 * 2^14, whose neighbours are 2^-9 apart
            rounded = tl.where(tl.abs(v) < 0.015625, subnormal, bits.to(tl.float32, bitcast=True))
            v = tl.where(v == v, rounded, v)
        return v.to(tl.float8e4nv)

    @triton.jit
    def quantize_kernel(x, x_s, q, s, qt, st, M, K, stride, ROWS: tl.constexpr, COLS: tl.constexpr,
                        BLOCK: tl.constexpr, POW2: tl.constexpr, SM89: tl.constexpr):
        """One 128x128 tile of x (E, M, K), whose rows are `stride` apart: if ROWS q (E, M, K) with scales s (K/128, M), if
        COLS its transpose qt (E, K, M) with st (M/128, K); if BLOCK with one scale per block instead, s (E, M/128, K/128),
        st (E, K/128, M/128). Rows of q and qt are filled up with zeros to a multiple of 128. If x_s is given, x is itself
        FP8 with scales (K/128, M).

        Never BLOCK with both: q and qt would hold the same FP8 numbers, and ptxas up to 12.9, which Triton calls for sm_89
        and sm_90, then fills part of qt with other registers (triton-lang/triton issue 11111). Training became NaN by it."""
        m, k, e = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
        MB, KB = tl.cdiv(M, TILE), tl.cdiv(K, TILE)
        i = tl.arange(0, TILE)
        rows, cols = m * TILE + i, k * TILE + i
        in_rows, in_cols = rows < M, cols < K
        # 64 bits for where the tile starts, 32 for the steps inside it: half the registers
        x += (e * M + m * TILE) * stride + k * TILE
        v = tl.load(x + i[:, None] * stride + i[None, :], in_rows[:, None] & in_cols[None, :], 0.0).to(tl.float32)
        if x_s is not None:
            v *= tl.load(x_s + k * M + rows, in_rows, 0.0)[:, None]
        a = tl.where(v == v, tl.abs(v), 0.0)        # tl.max promises nothing about a NaN
        at, at_t = i[:, None] * (KB * TILE) + i[None, :], i[:, None] * (MB * TILE) + i[None, :]
        if ROWS:
            amax = tl.max(a, 1)                                                             # (128,)
            if BLOCK:
                amax = tl.max(amax, 0) + tl.zeros_like(amax)
            scale = scale_of(amax, POW2)
            q += (e * M + m * TILE) * (KB * TILE) + k * TILE
            tl.store(q + at, to_e4m3(v * tl.div_rn(1.0, scale)[:, None], SM89), in_rows[:, None])
            if BLOCK:
                tl.store(s + (e * MB + m) * KB + k + i, scale, i == 0)
            else:
                tl.store(s + k * M + rows, scale, in_rows)
        if COLS:
            amax = tl.max(a, 0)
            if BLOCK:
                amax = tl.max(amax, 0) + tl.zeros_like(amax)
            scale = scale_of(amax, POW2)
            qt += (e * K + k * TILE) * (MB * TILE) + m * TILE
            tl.store(qt + at_t, tl.trans(to_e4m3(v * tl.div_rn(1.0, scale)[None, :], SM89)), in_cols[:, None])
            if BLOCK:
                tl.store(st + (e * KB + k) * MB + m + i, scale, i == 0)
            else:
                tl.store(st + m * K + cols, scale, in_cols)

    @triton.jit
    def tile_of(pid, M_TILES, N_TILES, GROUP: tl.constexpr = 8):
        """Tiles of C in bands of 8 rows, so that those at work at one time share what they read in the L2 cache."""
        band = pid // (GROUP * N_TILES)
        height = min(M_TILES - band * GROUP, GROUP)
        return band * GROUP + pid % (GROUP * N_TILES) % height, pid % (GROUP * N_TILES) // height

    @triton.jit
    def load_tile(x, row, col, height, stride, ROWS: tl.constexpr, TMA: tl.constexpr):
        """ROWS x 128 numbers of an FP8 matrix: through a TMA descriptor, or from a pointer, whose rows of `stride` bytes
        must reach to a multiple of 128. Rows beyond the height are zeros, or some other rows: nobody looks at their sums."""
        if TMA:
            return x.load([row, col])
        else:
            rows, cols = (tl.arange(0, ROWS) + row) % height, tl.arange(0, TILE) + col
            return tl.load(x + rows[:, None].to(tl.int64) * stride + cols[None, :])

    @triton.jit
    def gemm_kernel(a, s_a, stride_a, b, s_b, stride_b, c, stride_c, ends, E, M, N, KB, EXPERTS: tl.constexpr,
                    ROWS: tl.constexpr, TMA: tl.constexpr):
        """Fprop and Dgrad: c (M, N) = a (M, K)·b[e] (N, K)^T; e: the expert whose rows of a these are, by ends, or 0. a and
        b, the stack flattened to (E*N, K): see load_tile; s_a: (K/128, M); s_b: (E, N/128, K/128); KB: K/128; EXPERTS: E
        rounded up to a power of two; ROWS: a tile of c is ROWS x 128."""
        pid_m, pid_n = tile_of(tl.program_id(0), tl.cdiv(M, ROWS), tl.cdiv(N, TILE))
        e = 0
        if ends is not None:
            i = tl.arange(0, EXPERTS)
            e = tl.sum((tl.load(ends + i, i < E, M) <= pid_m * ROWS).to(tl.int32), 0)
            KB = tl.where(e < E, KB, 0)     # rows behind the last expert's come out as zeros
        i, j = tl.arange(0, ROWS), tl.arange(0, TILE)
        rows, cols = pid_m * ROWS + i, pid_n * TILE + j
        s_b += (e * tl.cdiv(N, TILE) + pid_n) * KB
        acc = tl.zeros((ROWS, TILE), tl.float32)
        for k in range(KB):
            tile_a = load_tile(a, pid_m * ROWS, k * TILE, M, stride_a, ROWS, TMA)
            tile_b = load_tile(b, e * N + pid_n * TILE, k * TILE, E * N, stride_b, TILE, TMA)
            scale = tl.load(s_a + k * M + rows, rows < M, 0.0) * tl.load(s_b + k)           # (ROWS,)
            acc += tl.dot(tile_a, tile_b.T) * scale[:, None]
        c += (pid_m * ROWS).to(tl.int64) * stride_c + pid_n * TILE
        tl.store(c + i[:, None] * stride_c + j[None, :], acc.to(c.dtype.element_ty),
                 (rows < M)[:, None] & (cols < N)[None, :])

    @triton.jit
    def wgrad_kernel(a, s_a, stride_a, b, s_b, stride_b, c, stride_c, ends, N, K, M,
                     ROWS: tl.constexpr, TMA: tl.constexpr):
        """Wgrad: c[e] (N, K) = a (N, M)·b (K, M)^T over the tokens of expert e, or all. a, b: see load_tile; s_a: (M/128,
        N); s_b: (M/128, K); rows of the stack c are stride_c apart."""
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
            scale_a, scale_b = tl.load(s_a + t * N + rows % N), tl.load(s_b + t * K + cols % K)     # (ROWS,), (128,)
            acc += tl.dot(tile_a, tile_b.T) * scale_a[:, None] * scale_b[None, :]
        at = (e.to(tl.int64) * N + rows)[:, None] * stride_c + cols[None, :]
        tl.store(c + at, acc, (rows < N)[:, None] & (cols < K)[None, :])

    @triton.jit
    def swiglu_backward_kernel(g, s_g, stride_g, u, s_u, stride_u, dh, h, dg, du, M, K, ROWS: tl.constexpr):
        """See swiglu_backward; ROWS x 128 numbers of each. s_g, s_u: (K/128, M); dh, h, dg, du are contiguous."""
        m, k = tl.program_id(0), tl.program_id(1)
        rows, cols = m * ROWS + tl.arange(0, ROWS), k * TILE + tl.arange(0, TILE)
        in_rows, inside = rows < M, (rows < M)[:, None] & (cols < K)[None, :]
        row, col = rows[:, None].to(tl.int64), cols[None, :]
        g = tl.load(g + row * stride_g + col, inside, 0.0).to(tl.float32) * tl.load(s_g + k * M + rows, in_rows, 0.0)[:, None]
        u = tl.load(u + row * stride_u + col, inside, 0.0).to(tl.float32) * tl.load(s_u + k * M + rows, in_rows, 0.0)[:, None]
        d = tl.load(dh + row * K + col, inside, 0.0).to(tl.float32)
        sigmoid = tl.sigmoid(g)
        silu = g * sigmoid
        tl.store(h + row * K + col, (silu * u).to(h.dtype.element_ty), inside)
        tl.store(dg + row * K + col, (d * u * sigmoid * (1 + g - silu)).to(h.dtype.element_ty), inside)
        tl.store(du + row * K + col, (d * silu).to(h.dtype.element_ty), inside)


def capability(device):
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else (9, 0)    # in Triton's interpreter


def kernels_missing(device):
    """None where the kernels run on this device, else why they don't, for a message."""
    if triton is None:
        return "triton is not installed (pip install triton)"
    if device.type != "cuda":
        return f"the device is {device.type}, no NVIDIA GPU"
    if torch.version.hip:
        return "the kernels are written for NVIDIA GPUs, this one is AMD's"
    major, minor = capability(device)
    if (major, minor) < (8, 9) or major not in (8, 9, 10, 12):
        return f"{torch.cuda.get_device_name(device)} (sm_{major}{minor}) is none of sm_89, sm_90, sm_100 and sm_120"
    return None


def quantize_triton(x, s=None, rows=False, cols=False, block=False, pow2=False):
    """x: (M, K) bf16 or fp32, or FP8 with its scales s; with block (E, M, K). -> a pair of Quantized: x if rows, x^T if
    cols, (K, M) or (E, K, M), in tiles of 1x128 or, with block, one of the two in blocks."""
    M, K = x.shape[-2:]
    E, MB, KB = x.size(0) if block else 1, -(-M // 128), -(-K // 128)      # triton.cdiv takes microseconds
    new = x.new_empty
    straight = transposed = None
    # scales of tiles are stored with the contracted dimension first: the GEMM reads those of neighbouring rows at once
    if rows:
        straight = Quantized(new(*x.shape[:-1], KB * 128, dtype=E4M3)[..., :K],
                             new(E, MB, KB, dtype=torch.float32) if block else new(KB, M, dtype=torch.float32).T)
    if cols:
        transposed = Quantized(new(*x.shape[:-2], K, MB * 128, dtype=E4M3)[..., :M],
                               new(E, KB, MB, dtype=torch.float32) if block else new(MB, K, dtype=torch.float32).T)
    if x.numel():
        x = x if x.stride(-1) == 1 and (E == 1 or x.is_contiguous()) else x.contiguous()
        s = None if s is None else s.T.contiguous()
        quantize_kernel[MB, KB, E](x, s, *(straight or (None, None)), *(transposed or (None, None)), M, K, x.stride(-2),
                                   ROWS=rows, COLS=cols, BLOCK=block, POW2=pow2,
                                   SM89=capability(x.device) == (8, 9), num_warps=8)
    return straight, transposed


def gemm_triton(a, b, dtype, ends=None):
    """See gemm."""
    M, (E, N, K) = a.q.size(0), b.q.shape
    c = empty_aligned(M, N, dtype=dtype, device=a.q.device)
    if c.numel() == 0 or K == 0:
        return c.zero_()
    options = launch_options(capability(c.device)[0])
    grid = -(-M // options["ROWS"]) * -(-N // 128),
    gemm_kernel[grid](*operand(a.q, a.s.T, options["ROWS"], options["TMA"]), *operand(b.q, b.s, 128, options["TMA"]), c,
                      c.stride(0), ends, E, M, N, -(-K // 128), EXPERTS=1 << (E - 1).bit_length(), **options)
    return c


def wgrad_triton(dy_t, x_t, ends=None):
    """See wgrad."""
    (N, M), K = dy_t.q.shape, x_t.q.size(0)
    E = 1 if ends is None else ends.size(0)
    c = empty_aligned(E, N, K, dtype=torch.float32, device=dy_t.q.device)
    if M == 0 or c.numel() == 0:
        return c.zero_()
    options = launch_options(capability(c.device)[0])
    grid = -(-N // options["ROWS"]) * -(-K // 128), E
    wgrad_kernel[grid](*operand(dy_t.q, dy_t.s.T, options["ROWS"], options["TMA"]),
                       *operand(x_t.q, x_t.s.T, 128, options["TMA"]), c, c.stride(1), ends, N, K, M,
                       **options)
    return c


def swiglu_backward_triton(g, u, dh):
    """See swiglu_backward."""
    (M, K), dh = dh.shape, dh.contiguous()
    outputs = torch.empty_like(dh), torch.empty_like(dh), torch.empty_like(dh)
    if dh.numel():
        swiglu_backward_kernel[-(-M // 16), -(-K // 128)](g.q, g.s.T.contiguous(), g.q.stride(0), u.q, u.s.T.contiguous(),
                                                          u.q.stride(0), dh, *outputs, M, K, ROWS=16, num_warps=4)
    return outputs


def empty_aligned(*shape, **kwargs):
    """Rows start at multiples of 16 elements: with those of unaligned rows, the kernels would run out of registers."""
    return torch.empty(*shape[:-1], -(-shape[-1] // 16) * 16, **kwargs)[..., :shape[-1]]


def operand(q, s, rows, tma):
    """A kernel's three arguments for a matrix: where it is, its scales, and the bytes between rows."""
    q = q.flatten(0, -2)
    # TMA is the copy engine of sm_90 and later: it fetches whole tiles, and zeros for what lies beyond the edges
    return TensorDescriptor.from_tensor(q, [rows, 128]) if tma else q, s.contiguous(), q.stride(0)


def launch_options(major):
    """Of the kernels of products, by major compute capability. The tiles in flight fill the shared memory: 227 KB in the
    data-center cards, 99 KB in the others. On a Hopper three small programs share it: while one of them scales its sums, the
    others keep the tensor cores busy."""
    if major == 9:
        return dict(ROWS=64, TMA=True, num_warps=4, num_stages=3)
    return dict(ROWS=128, TMA=major > 9, num_warps=8, num_stages=4 if major == 10 else 3)


# ----------------------------------------------------------------------------------------------------------------------
# One interface to both

def quantize(x, rows=True, cols=False, pow2=False):
    """An activation or a gradient. x: (M, K) bf16 or fp32, or a Quantized of 1x128 tiles. -> (x in 1x128 tiles if rows,
    else None; x^T (K, M) in 1x128 tiles, which are x's 128x1, if cols, else None)."""
    x, s = x if isinstance(x, Quantized) else (x, None)
    if kernels_missing(x.device) is None:
        return quantize_triton(x, s, rows, cols, pow2=pow2)
    x = x if s is None else dequantize(x, s)
    return quantize_reference(x, 1, pow2) if rows else None, quantize_reference(x.mT, 1, pow2) if cols else None


def quantize_weight(w, transposed=False):
    """w: (N, K) or a stack (E, N, K) -> Quantized w (E, N, K), or w^T (E, K, N) if transposed, in blocks of 128x128."""
    w = w.view(-1, *w.shape[-2:])
    if kernels_missing(w.device) is None:
        return quantize_triton(w, rows=not transposed, cols=transposed, block=True)[transposed]
    return quantize_reference(w.mT if transposed else w, 128)


def gemm(a, b, dtype, ends=None):
    """Fprop and Dgrad: a · b^T, (M, N) in dtype. a: Quantized (M, K) in 1x128 tiles; b: Quantized (E, N, K) in blocks.

    ends: (E,) int32, multiples of 128: rows ends[e-1]..ends[e]-1 of a meet b[e], rows beyond come out as zeros.
    None: E is 1, and M need not be a multiple of anything.
    """
    if kernels_missing(a.q.device) is None:
        return gemm_triton(a, b, dtype, ends)
    with torch.autocast(a.q.device.type, enabled=False):
        return gemm_reference(a, b, dtype, ends)


def wgrad(dy_t, x_t, ends=None):
    """Wgrad: dy^T · x, (E, N, K) fp32. dy_t: Quantized (N, M), x_t: Quantized (K, M), both in 1x128 tiles; ends: as in
    gemm, an expert without rows gets zeros."""
    if kernels_missing(dy_t.q.device) is None:
        return wgrad_triton(dy_t, x_t, ends)
    with torch.autocast(dy_t.q.device.type, enabled=False):
        return wgrad_reference(dy_t, x_t, ends)


def swiglu_backward(g, u, dh):
    """g, u: Quantized (M, I) in 1x128 tiles; dh: (M, I), the gradient of h = silu(g) * u. -> h and the gradients of g and u,
    each (M, I) in dh's dtype, computed in fp32."""
    return (swiglu_backward_triton if kernels_missing(dh.device) is None else swiglu_backward_reference)(g, u, dh)


# ----------------------------------------------------------------------------------------------------------------------
# Autograd

def output_dtype(x):
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


def weight_grad(weight, dy_t, x_t, ends=None):
    return wgrad(dy_t, x_t, ends).view_as(weight).to(weight.dtype)


class Linear(torch.autograd.Function):
    """y = x W^T with its three products in FP8; x is kept for the backward pass in FP8."""

    @staticmethod
    def forward(ctx, x, weight, pow2):
        """x: (M, K); weight: (N, K); returns (M, N)."""
        x_q, _ = quantize(x, pow2=pow2)
        ctx.save_for_backward(*x_q)
        ctx.weight, ctx.pow2, ctx.dtype = weight, pow2, x.dtype
        return gemm(x_q, quantize_weight(weight), output_dtype(x))                          # Fprop

    @staticmethod
    def backward(ctx, dy):
        x_q, dx, dw = Quantized(*ctx.saved_tensors), None, None
        dy_q, dy_t = quantize(dy, cols=True)
        if ctx.needs_input_grad[0]:
            dx = gemm(dy_q, quantize_weight(ctx.weight, transposed=True), ctx.dtype)        # Dgrad
        if ctx.needs_input_grad[1]:
            _, x_t = quantize(x_q, rows=False, cols=True, pow2=ctx.pow2)
            dw = weight_grad(ctx.weight, dy_t, x_t)                                         # Wgrad
        return dx, dw, None


def swiglu(x, gate, up, down, dtype, ends):
    """All Quantized. -> gate x and up x, (M, I) each, and down (silu(gate x) * up x), (M, D)."""
    g, u = gemm(x, gate, dtype, ends), gemm(x, up, dtype, ends)
    h, _ = quantize(F.silu(g) * u)
    return g, u, gemm(h, down, dtype, ends)


class SwiGLU(torch.autograd.Function):
    """y = W_down (silu(W_gate x) * W_up x), for one MLP or, given ends, for each expert's rows with its own weights.

    Kept for the backward pass are x, W_gate x and W_up x, in FP8; the product is computed anew (§3.3.3).
    """

    @staticmethod
    def forward(ctx, x, gate, up, down, ends):
        """x: (M, D); gate, up: (I, D) or, with ends, (E, I, D); down: (D, I) or (E, D, I); ends: see gemm. -> (M, D)."""
        x_q, _ = quantize(x)
        g, u, y = swiglu(x_q, *map(quantize_weight, (gate, up, down)), output_dtype(x), ends)
        ctx.save_for_backward(ends, *x_q, *quantize(g)[0], *quantize(u)[0])
        ctx.weights, ctx.dtype = (gate, up, down), x.dtype
        return y

    @staticmethod
    def backward(ctx, dy):
        ends, *saved = ctx.saved_tensors
        x_q, g_q, u_q = map(Quantized, saved[::2], saved[1::2])
        gate, up, down = ctx.weights

        def dgrad(dy_q, weight, dtype):
            return gemm(dy_q, quantize_weight(weight, transposed=True), dtype, ends)

        dy_q, dy_t = quantize(dy, cols=True)
        h, dg, du = swiglu_backward(g_q, u_q, dgrad(dy_q, down, dy.dtype))                  # (M, I) each
        (dg_q, dg_t), (du_q, du_t) = quantize(dg, cols=True), quantize(du, cols=True)
        (_, h_t), (_, x_t) = quantize(h, rows=False, cols=True), quantize(x_q, rows=False, cols=True)
        dx = dgrad(dg_q, gate, ctx.dtype) + dgrad(du_q, up, ctx.dtype)
        return (dx, weight_grad(gate, dg_t, x_t, ends), weight_grad(up, du_t, x_t, ends),
                weight_grad(down, dy_t, h_t, ends), None)


# ----------------------------------------------------------------------------------------------------------------------
# Layers: those of model.py, with other arithmetic

def weight_of(module, name="weight"):
    """A parameter; as a Quantized (E, N, K) where it is held in FP8 (hold_in_fp8)."""
    w = getattr(module, name)
    if w.dtype != E4M3:
        return w
    s = getattr(module, name + "_scale_inv")
    return Quantized(w.view(-1, *w.shape[-2:]), s.view(-1, *s.shape[-2:]))


def apply_swiglu(x, gate, up, down, ends=None):
    if isinstance(gate, Quantized):
        return swiglu(quantize(x)[0], gate, up, down, output_dtype(x), ends)[-1]
    return SwiGLU.apply(x, gate, up, down, ends)


class FP8Linear(nn.Linear):
    """nn.Linear in FP8. pow2: scales of x are powers of two, as the report has them for o_proj, whose input is quantized
    twice, along channels and along tokens."""
    pow2 = False

    @torch.compiler.disable     # can't trace kernels that take TMA descriptors
    def forward(self, x):
        """x: (..., in_features) bf16 or fp32; returns (..., out_features) in autocast's dtype or x's."""
        w, shape = weight_of(self), x.shape[:-1]
        x = x.flatten(0, -2)
        if isinstance(w, Quantized):
            y = gemm(quantize(x, pow2=self.pow2)[0], w, output_dtype(x))
        else:
            y = Linear.apply(x, w, self.pow2)
        y = y.unflatten(0, shape)
        return y if self.bias is None else y + self.bias


class FP8MLP(MLP):
    """model.MLP in FP8."""

    @torch.compiler.disable
    def forward(self, x):
        """x: (..., D); returns the same shape."""
        return apply_swiglu(x.flatten(0, -2), *map(weight_of, (self.gate_proj, self.up_proj, self.down_proj))).view(x.shape)


class FP8Experts(Experts):
    """model.Experts in FP8. Tiles of 128 tokens may not straddle experts, for the sake of Wgrad: each expert's rows are
    filled up with zeros to a multiple of 128."""

    def padding(self, x):
        return 128, 0

    @torch.compiler.disable
    def swiglu(self, x, place, rows, ends):
        x = x.repeat_interleave(place.size(0) // x.size(0), 0)                              # (N*K, D), by slot
        x = x.new_zeros(rows, x.size(1)).index_copy_(0, place, x)                           # (rows, D), by expert
        weights = (weight_of(self, name) for name in ("gate_proj", "up_proj", "down_proj"))
        return apply_swiglu(x, *weights, ends)

    def gathered(self, x, slots, K):
        return self.grouped(x, slots, slots.bincount(minlength=self.gate_proj.size(0)))


def convert_to_fp8(model):
    """Let a DeepSeekV3, or any module with nn.Linear, MLP or Experts inside, compute in FP8 from now on, in place.

    Embedding, head (lm_head), gates and norms stay. The parameters stay what and where they were, so that optimizers,
    checkpoints and state_dict don't notice. A warning says so where the kernels can't run and PyTorch emulates them;
    ValueError for a device that has no FP8 numbers at all. Returns the model.
    """
    device = next(model.parameters()).device
    if device.type not in ("cuda", "cpu", "meta"):
        raise ValueError(f"FP8 is for cuda and, emulated, for cpu; the model is on {device.type}")
    for name, module in model.named_modules():
        if name.rpartition(".")[2] != "lm_head" and type(module) in FP8_LAYERS:
            swap_class(name, module)
    if reason := kernels_missing(device):
        warnings.warn(f"FP8 is emulated in PyTorch, with the same rounding but no speed-up: {reason}", stacklevel=2)
    return model


FP8_LAYERS = {nn.Linear: FP8Linear, MLP: FP8MLP, Experts: FP8Experts}


def swap_class(name, module):
    module.__class__ = FP8_LAYERS[type(module)]
    module.pow2 = name.endswith("o_proj")


def hold_in_fp8(model):
    """Let a model that was built on "meta" hold what a release stores in FP8 that way, for inference: `weight` float8_e4m3fn
    and `weight_scale_inv`, half of bf16's memory. Stay as they are: kv_b_proj, whose weights absorbed attention reads
    itself, layers with inputs that are no multiple of 128, and what is not quantized in a release."""
    for name, module in model.named_modules():
        stays = name.endswith(("lm_head", "eh_proj", "kv_b_proj"))
        if stays or type(module) not in FP8_LAYERS or any(p.size(-1) % 128 for p in module.parameters()):
            continue
        swap_class(name, module)
        for key, p in list(module.named_parameters(recurse=False)):
            blocks = *p.shape[:-2], -(-p.size(-2) // 128), -(-p.size(-1) // 128)
            setattr(module, key, nn.Parameter(torch.empty_like(p, dtype=E4M3), requires_grad=False))
            module.register_buffer(f"{key}_scale_inv", torch.empty(blocks, dtype=torch.float32, device=p.device))
    return model
