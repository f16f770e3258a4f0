import contextlib
import copy
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import fp8
from fp8 import E4M3, FP8Experts, FP8Linear, FP8MLP, Quantized, convert_to_fp8, quantized_once
from model import MLP, MTP, DeepSeekV3, Experts
from train import recompute

ROOT = Path(__file__).parent.parent
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
NO_GPU = fp8.kernels_missing(torch.device(DEVICE))      # why the kernels are interpreted, if they are
# Kernels run for the GPU that is there, else in Triton's interpreter, with pointers (sm_89) and with TMA
# (sm_90)
CARDS = [(8, 9), (9, 0)] if DEVICE == "cpu" else [fp8.capability(torch.device(DEVICE))]

# Largest relative errors of a tile of a product in fp32, and of a layer's results, against the emulation in
# fp32. A difference in the last bit of a sum may round to the next FP8 number further on, hence the layers'
# error.
EXACT = dict(product=1e-6, layer=2e-3)
# Within 128 products, tensor cores of sm_89 and sm_90 (and, as long as nobody has measured it, sm_120) keep
# about 13 bits of the sum. Simulated (tensor_core), products are off by 1.3e-4, those of positive numbers by
# 5e-4, and layers by up to 5.8e-3. A sum of 2048 products that never leaves the tensor core is off by 3e-2.
THIRTEEN_BITS = dict(product=1e-3, layer=1.5e-2)
TOLERANCE = EXACT if DEVICE == "cpu" or CARDS[0][0] == 10 else THIRTEEN_BITS


def tensor_core(a, b):
    """a (M, K) · b (K, N), both FP8, summed as on sm_89 and sm_90: 32 products at a time are aligned to the
    largest among them and the running sum, and what is below 13 bits of mantissa is cut off."""
    total = torch.zeros(a.size(0), 1, b.size(1))        # fp32 holds all of this exactly
    for a_k, b_k in zip(a.float().split(32, 1), b.float().split(32, 0)):
        terms = torch.cat([total, a_k[:, :, None] * b_k], 1)                        # (M, 33, N)
        for _ in range(2):          # the terms, then their sum
            unit = torch.exp2(terms.abs().amax(1, keepdim=True).clamp(min=1e-30).log2().floor() - 13)
            terms = total = (terms / unit).trunc_().sum(1, keepdim=True) * unit
    return total[:, 0]


def equal(a, b):
    """Same Quantized, bit for bit; NaN equals NaN, and the sign of a zero does not matter."""
    same_q = (a.q.float() == b.q.float()) | a.q.float().isnan() & b.q.float().isnan()
    same_s = (a.s == b.s) | a.s.isnan() & b.s.isnan()
    return a.q.shape == b.q.shape and a.s.shape == b.s.shape and bool(same_q.all() and same_s.all())


def relative_error(a, b):
    return ((a.float() - b.float()).norm() / b.float().norm()).item()


def nasty(M, K):
    """Ties between two FP8 numbers, subnormals, numbers that round up to 448, tiles of zeros, and tiny and
    huge tiles."""
    x = torch.randn(M, K)
    ties = torch.arange(256, dtype=torch.uint8).view(E4M3).float()
    ties = ties[ties.isfinite()].sort().values
    ties = (ties[1:] + ties[:-1]) / 2
    n = min(K, len(ties))
    x[0, :n] = ties[:n]
    x[1, :n] = ties[-n:]
    x[:2, 0] = 448                              # a scale of 1
    x[2] = torch.linspace(2**-12, 2**-5, K)
    x[2, 0] = 448
    x[3] = torch.linspace(440, 448, K)
    x[4:6] = 0
    x[6] *= 1e-12
    x[7] *= 1e12
    x[8] = 1e-35
    if M > 128:
        x[128:] *= torch.logspace(-6, 6, K)
        x[-1] = 0
    return x.to(DEVICE)


# ------------------------------------------------------------------------------------------------------------
# The specification

def test_quantizers_round_to_the_nearest_fp8_number_and_scale_by_tiles():
    x = torch.randn(130, 300)
    for tile in 1, 128:
        q, s = fp8.quantize_reference(x, tile)
        assert q.dtype == E4M3 and q.shape == x.shape and s.shape == (-(-130 // tile), 3)
        for i in range(0, 130, tile):
            for j in range(0, 300, 128):
                part, scale = x[i:i + tile, j:j + 128], s[i // tile, j // 128]
                assert scale == part.abs().max() / 448
                got = q[i:i + tile, j:j + 128].float()
                torch.testing.assert_close(got, (part / scale).to(E4M3).float(), rtol=0.07, atol=0)
                assert (got.abs() == 448).any()
        assert relative_error(fp8.dequantize(q, s), x) < 0.03


def test_power_of_two_scales_lose_nothing_when_quantized_again():
    x = torch.randn(128, 128) * 3
    q, s = fp8.quantize_reference(x, pow2=True)
    assert (s.log2() == s.log2().round()).all() and (q.float().abs() <= 448).all()
    assert (x.abs().amax(1, keepdim=True) / s > 224).all()          # and not too large by a factor of two
    first = fp8.dequantize(q, s)
    again = fp8.dequantize(*fp8.quantize_reference(first.T, pow2=True)).T
    kept = first.abs() > first.abs().amax(0) / 2**13                # above the subnormals of its new tile
    assert (again == first)[kept].all() and kept.float().mean() > 0.99
    exact = torch.full((1, 128), 448.0)
    assert fp8.quantize_reference(exact, pow2=True).s == 1          # a power of two stays


def test_nan_stays_visible_zeros_stay_zero_and_inf_is_no_number():
    x = torch.randn(4, 256)
    x[0], x[1, 5], x[2, 7] = 0, torch.nan, torch.inf
    y = fp8.dequantize(*fp8.quantize_reference(x))
    assert (y[0] == 0).all()
    assert y[1, 5].isnan() and y[1].isnan().sum() == 1
    assert y[2, 7].isnan() and y[2, 128:].isfinite().all()
    linear = FP8Linear(256, 16, bias=False)
    assert linear(x)[1:3].isnan().all() and linear(x)[[0, 3]].isfinite().all()


def test_the_size_of_a_gradient_does_not_matter():
    """A mean over millions of tokens has gradients far below 1e-4, which must not vanish."""
    linear = FP8Linear(96, 64, bias=False)
    x, dy = torch.randn(40, 96, requires_grad=True), torch.randn(40, 64)
    grads = [torch.autograd.grad(linear(x), (x, linear.weight), dy * 2.0**-n) for n in (0, 40)]
    for big, small in zip(*grads):
        assert torch.equal(big, small * 2.0**40)


# ------------------------------------------------------------------------------------------------------------
# The kernels against the specification: under Triton's interpreter, or on a GPU where there is one

@pytest.fixture(params=CARDS, ids=[f"sm_{major}{minor}" for major, minor in CARDS])
def card(request, monkeypatch):
    """Launches kernels as for this card: with pointers, or with TMA descriptors."""
    if fp8.triton is None or DEVICE == "cuda" and NO_GPU:
        pytest.skip(NO_GPU)
    monkeypatch.setattr(fp8, "kernels_missing", lambda device: None)
    monkeypatch.setattr(fp8, "capability", lambda device: request.param)


@pytest.mark.usefixtures("card")
@pytest.mark.parametrize("M, K", [(128, 128), (9, 130), (200, 256), (257, 70)])
@pytest.mark.parametrize("pow2", [False, True])
def test_activation_quantizer_equals_the_specification(M, K, pow2):
    x = nasty(M, K)
    rows, cols = fp8.quantize(x, cols=True, pow2=pow2)
    assert equal(rows, fp8.quantize_reference(x, pow2=pow2))
    assert equal(cols, fp8.quantize_reference(x.T, pow2=pow2))
    assert equal(fp8.quantize(x, pow2=pow2)[0], rows)
    _, again = fp8.quantize(rows, rows=False, cols=True, pow2=pow2)
    assert equal(again, fp8.quantize_reference(fp8.dequantize(*rows).T, pow2=pow2))
    x = x.bfloat16()
    assert equal(fp8.quantize(x)[0], fp8.quantize_reference(x))


@pytest.mark.usefixtures("card")
def test_kernels_keep_nan_and_inf():
    x = nasty(130, 140)
    x[3, 5], x[129, 139], x[10, 10] = torch.nan, torch.nan, torch.inf
    for got, want in zip(fp8.quantize(x, cols=True),
                         (fp8.quantize_reference(x), fp8.quantize_reference(x.T))):
        assert equal(got, want) and want.q.float().isnan().any()
    for transposed in False, True:
        want = fp8.quantize_reference(x.T if transposed else x, 128)
        assert equal(fp8.quantize_weights([x], transposed), Quantized(want.q[None, None], want.s[None, None]))


@pytest.mark.usefixtures("card")
@pytest.mark.parametrize("E, N, K", [(1, 128, 256), (3, 70, 200)])
@pytest.mark.parametrize("pow2", [False, True])
def test_weight_quantizer_equals_the_specification(E, N, K, pow2):
    w, v = (torch.stack([nasty(N, K) for _ in range(E)]) for _ in range(2))
    for transposed in False, True:
        stacked = fp8.quantize_weights([w, v], transposed, pow2)
        for got, weight in zip(map(Quantized, *stacked), (w, v)):
            assert equal(got, fp8.quantize_reference(weight.mT if transposed else weight, 128, pow2))


def operands(M, K, rows, seed=0):
    """(M, K) whose tiles all have scales of their own, so that one taken for another shows."""
    generator = torch.Generator().manual_seed(seed)
    sizes = torch.rand(-(-M // rows), -(-K // 128), generator=generator)
    sizes = sizes.repeat_interleave(rows, 0)[:M].repeat_interleave(128, 1)[:, :K]
    return (torch.randn(M, K, generator=generator) * sizes).to(DEVICE)


def check_tiles(got, want):
    assert got.shape == want.shape and got.dtype == want.dtype
    for i in range(0, got.size(-2), 128):
        for j in range(0, got.size(-1), 128):
            tile = ..., slice(i, i + 128), slice(j, j + 128)
            error = relative_error(got[tile], want[tile])
            limit = TOLERANCE["product"] if want.dtype == torch.float32 else 5e-3
            assert error < limit, f"tile at {i}, {j} of {tuple(got.shape)} is off by {error}"


@pytest.mark.usefixtures("card")
@pytest.mark.parametrize("M, N, K, dtype", [
    (128, 128, 128, torch.float32), (300, 200, 390, torch.float32), (1, 7, 5, torch.float32),
    (130, 260, 128, torch.float32), (130, 200, 390, torch.bfloat16)])
def test_gemm_equals_the_specification(M, N, K, dtype):
    a, _ = fp8.quantize(operands(M, K, 1))
    b = fp8.quantize_weights([operands(N, K, 128, 1)])
    check_tiles(fp8.gemm(a, b, dtype), fp8.gemm_reference(a, b, dtype))


@pytest.mark.usefixtures("card")
@pytest.mark.parametrize("N, K", [(128, 128), (200, 130)])
def test_grouped_gemm_equals_the_specification_with_empty_experts(N, K):
    ends = torch.tensor([0, 128, 128, 384, 384], dtype=torch.int32, device=DEVICE)
    a, _ = fp8.quantize(operands(384, K, 1))
    weights = [torch.stack([operands(N, K, 128, seed) for seed in range(j, j + 5)]) for j in (0, 5)]
    one, two = fp8.quantize_weights(weights[:1]), fp8.quantize_weights(weights)
    want = fp8.gemm_reference(a, two, torch.float32, ends)
    check_tiles(fp8.gemm(a, one, torch.float32, ends), want[:1])
    check_tiles(fp8.gemm(a, two, torch.float32, ends), want)            # two products in one
    for e, rows in (1, slice(0, 128)), (3, slice(128, 384)):
        for j in range(2):
            exact = fp8.dequantize(*a)[rows] @ weights[j][e].T
            assert relative_error(want[j, rows], exact) < 0.04
    longer, _ = fp8.quantize(torch.cat([operands(384, K, 1), operands(256, K, 1)]))
    for gemm in fp8.gemm, fp8.gemm_reference:        # rows behind the last expert's
        got = gemm(longer, one, torch.float32, ends)
        check_tiles(got[:, :384], want[:1])
        assert got.size(1) == 640 and not got[:, 384:].any()


@pytest.mark.usefixtures("card")
@pytest.mark.parametrize("N, K, M", [(128, 128, 256), (200, 130, 300), (5, 3, 1)])
def test_wgrad_equals_the_specification(N, K, M):
    _, dy = fp8.quantize(operands(M, N, 128), rows=False, cols=True)
    _, x = fp8.quantize(operands(M, K, 128, 1), rows=False, cols=True)
    check_tiles(fp8.wgrad(dy, x), fp8.wgrad_reference(dy, x))


@pytest.mark.usefixtures("card")
def test_grouped_wgrad_equals_the_specification_with_empty_experts():
    ends = torch.tensor([0, 256, 256, 384], dtype=torch.int32, device=DEVICE)
    dy, x = operands(512, 70, 128), operands(512, 200, 128, 1)
    dy_t, x_t = (fp8.quantize(t, rows=False, cols=True)[1] for t in (dy, x))
    got, want = fp8.wgrad(dy_t, x_t, ends), fp8.wgrad_reference(dy_t, x_t, ends)
    assert not got[0].any() and not got[2].any()
    for e, rows in (1, slice(0, 256)), (3, slice(256, 384)):        # the last 128 rows are no expert's
        check_tiles(got[e], want[e])
        assert relative_error(want[e], dy[rows].T @ x[rows]) < 0.06


@pytest.mark.usefixtures("card")
@pytest.mark.parametrize("M, I", [(128, 128), (30, 300), (17, 5)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_swiglu_backward_equals_the_specification_and_that_autograd(M, I, dtype):
    (g, _), (u, _) = (fp8.quantize(operands(M, I, 1, seed).to(dtype)) for seed in (1, 2))
    dh = operands(M, I, 128, 3).to(dtype)
    want = fp8.swiglu_backward_reference(g, u, dh)
    for got, specified in zip(fp8.swiglu_backward(g, u, dh), want):
        check_tiles(got, specified)
    g, u = (fp8.dequantize(*t).requires_grad_() for t in (g, u))
    h = torch.nn.functional.silu(g) * u
    for got, exact in zip(want, (h, *torch.autograd.grad(h, (g, u), dh.float()))):
        assert relative_error(got, exact) < (1e-6 if dtype == torch.float32 else 5e-3)


@pytest.mark.usefixtures("card")
def test_no_rows_at_all():
    linear, mlp = FP8Linear(200, 30).to(DEVICE), FP8MLP(200, 30).to(DEVICE)
    for layer, width in (linear, 30), (mlp, 200):
        y = layer(torch.zeros(0, 200, device=DEVICE, requires_grad=True))
        assert y.shape == (0, width)
        y.sum().backward()
        assert all(p.grad.shape == p.shape and not p.grad.any() for p in layer.parameters())


@pytest.mark.skipif(NO_GPU is not None, reason=f"no GPU with FP8 tensor cores: {NO_GPU}")
@pytest.mark.parametrize("M, N, K", [(4096, 7168, 2048), (1000, 2112, 7168)])
def test_large_products_on_the_gpu(M, N, K):
    x, w = torch.randn(M, K, device="cuda", dtype=torch.bfloat16), torch.randn(N, K, device="cuda")
    y = fp8.gemm(fp8.quantize(x)[0], fp8.quantize_weights([w]), torch.bfloat16)
    assert relative_error(y[0], x.float() @ w.T) < 0.04


@pytest.mark.skipif(DEVICE == "cuda", reason="simulates in the interpreter what a GPU does")
@pytest.mark.usefixtures("card")
@pytest.mark.parametrize("card", [(9, 0)], indirect=True)
def test_a_sound_card_is_within_the_tolerances(make_config, monkeypatch):
    from triton.runtime import interpreter

    def create_dot(self, a, b, d, input_precision, max_num_imprecise_acc):
        a, b = (torch.from_numpy(t.data.copy()).view(E4M3) for t in (a, b))
        return interpreter.TensorHandle(tensor_core(a, b).numpy() + d.data, d.dtype.scalar)

    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", create_dot)
    with pytest.raises(AssertionError, match="is off by"):      # the simulation is in use
        test_gemm_equals_the_specification(130, 130, 390, torch.float32)
    monkeypatch.setitem(globals(), "TOLERANCE", THIRTEEN_BITS)
    test_gemm_equals_the_specification(130, 130, 390, torch.float32)
    test_grouped_gemm_equals_the_specification_with_empty_experts(128, 128)
    test_wgrad_equals_the_specification(128, 130, 300)
    test_long_sums_leave_the_tensor_core_every_128_products()
    test_layers_through_the_kernels_equal_the_emulation(make_config, monkeypatch, "mlp", False)


@pytest.mark.usefixtures("card")
def test_long_sums_leave_the_tensor_core_every_128_products():
    """Positive numbers, so that a truncated sum drifts: one that stays in the tensor core is out of
    tolerance."""
    a, b = (torch.rand(rows, 2048, device=DEVICE).to(E4M3) for rows in (64, 128))
    ones = torch.ones(128, 16, device=DEVICE)
    want = (a.double() @ b.double().T).float()
    tiles, block = Quantized(a, ones[:64]), Quantized(b[None, None], ones[None, None, :1])
    check_tiles(fp8.gemm(tiles, block, torch.float32)[0], want)
    check_tiles(fp8.wgrad(tiles, Quantized(b, ones))[0], want)
    unpromoted = tensor_core(a.cpu(), b.T.cpu())
    assert relative_error(unpromoted, want.cpu()) > 10 * THIRTEEN_BITS["product"]


COMPILE = """
import json, sys, bench_fp8
for half, card in enumerate(map(int, sys.argv[1:])):
    for row in bench_fp8.compile_all(card, list(bench_fp8.launches(card))[half::2]):
        print(json.dumps(row))
"""


@pytest.mark.skipif(fp8.triton is None, reason="triton is not installed")
def test_kernels_compile_to_fp8_tensor_cores_without_spills(tmp_path):
    """A sample of what the launchers ask for, ahead of time and without a GPU. Of each pair of cards with the
    same options, sm_89 and sm_120 (mma), sm_100 (tcgen05) and sm_90 (wgmma), one gets half of the kinds of
    launches and one the other; tests/bench/bench_fp8.py --sweep compiles everything. -s prints registers."""
    env = os.environ | {"TRITON_CACHE_DIR": str(tmp_path)}
    env.pop("TRITON_INTERPRET", None)
    pairs = ("89", "120"), ("100", "90")
    processes = [subprocess.Popen([sys.executable, "-c", COMPILE, *pair], cwd=ROOT / "tests/bench", env=env,
                                  text=True, stdout=subprocess.PIPE) for pair in pairs]
    rows = [json.loads(line) for process in processes for line in process.communicate()[0].splitlines()]
    for card in 89, 90, 100, 120:       # all have a quantizer and both products
        kinds = {row["kernel"].split()[0].strip(",") for row in rows if row["capability"] == card}
        assert kinds >= {"quantize", "gemm", "wgrad"}
    assert len({row["kernel"] for row in rows}) == 11
    for row in rows:
        print(row)
        assert not row["faults"], row


# ------------------------------------------------------------------------------------------------------------
# Layers

def test_gradients_of_a_linear_layer_have_the_errors_of_the_format():
    """Rounding to 3 bits of mantissa leaves 2.6% (root mean square) on each operand; Wgrad's x has been
    rounded twice."""
    torch.manual_seed(1)
    linear = FP8Linear(700, 500, bias=False).to(DEVICE)
    x = torch.randn(6, 100, 700, device=DEVICE, requires_grad=True)
    dy = torch.randn(6, 100, 500, device=DEVICE)
    y = linear(x)
    y.backward(dy)
    assert 0.030 < relative_error(y, x @ linear.weight.T) < 0.040
    assert 0.030 < relative_error(x.grad, dy @ linear.weight) < 0.040
    assert 0.030 < relative_error(linear.weight.grad, dy.flatten(0, 1).T @ x.flatten(0, 1)) < 0.048


def mean_error_of_products(x, pow2):
    """Of y, dx, dW, relative, where all numbers have one sign, so that no rounding error can hide behind
    another."""
    linear = FP8Linear(256, 192, bias=False)
    linear.weight.data, linear.pow2_x = torch.rand(192, 256) + 0.5, pow2
    dy = torch.rand(512, 192) + 0.5
    x.requires_grad_()
    y = linear(x)
    y.backward(dy)
    pairs = (y, x @ linear.weight.T), (x.grad, dy @ linear.weight), (linear.weight.grad, dy.T @ x)
    return [(got / want - 1).mean().abs().item() for got, want in pairs]


def test_products_are_unbiased():
    """Averaged over many rounding errors nothing is left: nothing is truncated anywhere."""
    assert max(mean_error_of_products(torch.rand(512, 256) + 0.5, pow2=True)) < 5e-4
    assert max(mean_error_of_products(torch.rand(512, 256) + 0.5, pow2=False)[:2]) < 5e-4
    # Wgrad quantizes x a second time. Where all tiles have nearly the same largest number, its new scale is a
    # little larger than the old ones and the FP8 numbers stay: a bias of half a percent. It averages out once
    # tiles differ, and powers of two have none.
    assert mean_error_of_products(torch.rand(512, 256) + 0.5, pow2=False)[2] < 8e-3
    assert mean_error_of_products(torch.randn(512, 256).exp(), pow2=False)[2] < 1e-3


def test_linear_keeps_dtype_bias_and_device_rules():
    linear = FP8Linear(64, 32)
    x = torch.randn(3, 5, 64, dtype=torch.bfloat16)
    assert linear.bfloat16()(x).dtype == torch.bfloat16
    linear.float()
    with torch.autocast("cpu", torch.bfloat16):
        assert FP8Linear(64, 32, bias=False)(x.float()).dtype == torch.bfloat16
    want = torch.nn.functional.linear(x.float(), linear.weight, linear.bias)
    assert relative_error(linear(x.float()), want) < 0.05
    torch.testing.assert_close(linear(x[0, 0].float()), linear(x.float())[0, 0])
    linear.bias.data += 100
    assert linear(x.float()).mean() > 90


def test_the_activation_is_saved_in_fp8():
    linear = FP8Linear(256, 128, bias=False)
    saved = []

    def pack(t):
        if not isinstance(t, torch.nn.Parameter):
            saved.append(t)
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        linear(torch.randn(1024, 256, requires_grad=True))
        assert {t.dtype for t in saved if t.numel() >= 1024 * 256} == {E4M3}
        saved.clear()
        FP8MLP(256, 384)(torch.randn(1024, 256, requires_grad=True))
        assert {t.dtype for t in saved if t.numel() >= 1024 * 256} == {E4M3}
        assert sum(t.numel() * t.element_size() for t in saved) < 1.1 * 1024 * (256 + 2 * 384)


def test_swiglu_gradients():
    torch.manual_seed(2)
    plain, eight = MLP(256, 384).to(DEVICE), FP8MLP(256, 384).to(DEVICE)
    eight.load_state_dict(plain.state_dict())
    x, dy = torch.randn(2, 2, 100, 256, device=DEVICE)
    x1, x2 = (x.clone().requires_grad_() for _ in range(2))
    plain(x1).backward(dy)
    eight(x2).backward(dy)
    assert relative_error(eight(x2), plain(x1)) < 0.07
    assert relative_error(x2.grad, x1.grad) < 0.09
    for a, b in zip(eight.parameters(), plain.parameters()):
        assert relative_error(a.grad, b.grad) < 0.09


@pytest.mark.parametrize("experts", [[[0, 1], [3, 1], [1, 0], [3, 4]], [[2, 2]] * 3])
def test_experts_with_few_and_no_rows(make_config, experts):
    torch.manual_seed(4)
    config = make_config(n_routed_experts=5, num_experts_per_tok=2, n_group=1, topk_group=1)
    plain = Experts(config).to(DEVICE)
    eight = copy.deepcopy(plain)
    eight.__class__ = FP8Experts
    experts = torch.tensor(experts, device=DEVICE).repeat(40, 1)
    N = len(experts)
    weights = torch.rand(N, 2, device=DEVICE)
    x1 = torch.randn(N, 48, device=DEVICE, requires_grad=True)
    x2 = x1.detach().clone().requires_grad_()
    (y1, load1), (y2, load2) = plain(x1, weights, experts), eight(x2, weights, experts)
    dy = torch.randn(N, 48, device=DEVICE)
    y1.backward(dy)
    y2.backward(dy)
    assert torch.equal(load1, load2)
    assert relative_error(y2, y1) < 0.08 and relative_error(x2.grad, x1.grad) < 0.1
    for a, b in zip(eight.parameters(), plain.parameters()):
        for e in range(5):
            assert (load1[e] == 0) == (not a.grad[e].any())
            if load1[e]:
                assert relative_error(a.grad[e], b.grad[e]) < 0.1


@pytest.mark.usefixtures("card")
@pytest.mark.parametrize("kind, pow2", [("linear", False), ("mlp", False), ("mlp", True), ("experts", False)])
def test_layers_through_the_kernels_equal_the_emulation(make_config, monkeypatch, kind, pow2):
    config = make_config(n_routed_experts=5, num_experts_per_tok=2, n_group=1, topk_group=1, hidden_size=136)
    make = dict(linear=lambda: FP8Linear(136, 200), mlp=lambda: FP8MLP(136, 48),
                experts=lambda: FP8Experts(config))
    layer = make[kind]().to(DEVICE)
    layer.pow2 = layer.pow2_x = pow2
    x = operands(150, 136, 1).requires_grad_()
    experts = torch.tensor([[0, 3], [3, 4], [4, 3]], device=DEVICE).repeat(50, 1)
    routing = torch.rand(150, 2, device=DEVICE), experts
    results = []
    for reason in "to be emulated", None:
        monkeypatch.setattr(fp8, "kernels_missing", lambda device: reason)
        y = layer(x, *routing)[0] if kind == "experts" else layer(x)
        results.append([y, *torch.autograd.grad(y.square().sum(), [x, *layer.parameters()])])
    for emulation, kernels in zip(*results):
        assert emulation.any()
        error = relative_error(kernels, emulation)
        assert error < TOLERANCE["layer"], f"{tuple(kernels.shape)} is off by {error}"


def test_converts_the_right_layers_and_changes_no_name(make_model):
    model = make_model()
    before, embedding = model.state_dict(), model.model.embed_tokens
    with pytest.warns(UserWarning, match="emulated.*cpu"):
        assert convert_to_fp8(model) is model
    assert list(model.state_dict()) == list(before)
    assert type(model.lm_head) is torch.nn.Linear and model.model.embed_tokens is embedding
    kinds = {name: type(m).__name__ for name, m in model.named_modules()}
    for i in range(4):      # the last is the MTP module
        for name in "q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj":
            assert kinds[f"model.layers.{i}.self_attn.{name}"] == "FP8Linear"
        assert kinds[f"model.layers.{i}.mlp" + (".experts" if i else "")] == ("FP8Experts" if i else "FP8MLP")
    assert kinds["model.layers.3.eh_proj"] == "FP8Linear" and kinds["model.layers.2.mlp.gate"] == "Gate"
    assert [name for name, m in model.named_modules() if getattr(m, "pow2_x", False)] == [
        f"model.layers.{i}.self_attn.o_proj" for i in range(4)]


@pytest.mark.filterwarnings("ignore:FP8 is emulated")
def test_pow2_makes_every_scale_a_power_of_two(make_model, monkeypatch):
    scales, tile_scale = [], fp8.tile_scale

    def spy(amax, pow2=False):
        scales.append(tile_scale(amax, pow2))
        return scales[-1]

    monkeypatch.setattr(fp8, "tile_scale", spy)
    idx = torch.randint(61, (2, 17))
    found = []
    for pow2 in False, True:
        scales.clear()
        convert_to_fp8(make_model().train(), pow2)(idx[:, :-1], idx[:, 1:])[1].backward()
        found.append([bool((s.log2() == s.log2().round()).all()) for s in scales])
    assert len(found[0]) == len(found[1]) > 200 and all(found[1])
    assert sum(found[0]) < 0.1 * len(found[0])


@pytest.fixture
def fp8_model(make_config):
    """A dense layer, and an MTP module with experts."""
    model = DeepSeekV3(make_config(num_hidden_layers=1, n_routed_experts=4, n_group=1, topk_group=1))
    with pytest.warns(UserWarning, match="emulated") if NO_GPU else contextlib.nullcontext():
        return convert_to_fp8(model.to(DEVICE))


def loss_and_gradients(model, function=None, seed=0):
    generator = torch.Generator().manual_seed(seed)
    idx = torch.randint(61, (2, 17), generator=generator).to(DEVICE)
    model.zero_grad()
    loss = (model if function is None else function)(idx[:, :-1], idx[:, 1:])[1]
    loss.backward()
    return [loss.detach(), *(p.grad for p in model.parameters())]


def test_torch_compile_sees_one_graph_without_a_break(fp8_model):
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()
    want = loss_and_gradients(fp8_model)
    compiled = torch.compile(fp8_model, backend="aot_eager")
    for _ in range(2):
        got = loss_and_gradients(fp8_model, compiled)
    counters = torch._dynamo.utils.counters
    torch.compiler.reset()
    assert not counters["graph_break"] and counters["stats"]["unique_graphs"] == 1
    for a, b in zip(got, want):
        assert relative_error(a, b) < 0.02


def test_operations_return_what_torch_compile_expects_of_them(make_config):
    """Shapes, dtypes and strides of the fake results equal the real ones, for sizes that are no multiples of
    128."""
    x, place = torch.randn(9, 200, device=DEVICE), torch.tensor([0, 128, 1, 129, 2, 130], device=DEVICE)
    stack = [torch.randn(3, *shape, device=DEVICE) for shape in [(70, 200), (70, 200), (200, 70)]]
    ends = torch.tensor([128, 128, 256], device=DEVICE, dtype=torch.int32)
    dtype, check = torch.bfloat16, torch.library.opcheck
    for weights, rows in ([w[0] for w in stack], (None, 9, None)), (stack, (place, 256, ends)):
        inputs = x if rows[0] is None else x[:3]
        y, *saved = fp8.mlp(inputs, weights, [], *rows, False, dtype)
        check(fp8.mlp, (inputs, weights, [], *rows, False, dtype), test_utils="test_faketensor")
        check(fp8.mlp_backward, (y, weights, saved, rows[0], rows[2], False, torch.float32),
              test_utils="test_faketensor")
    y, *saved = fp8.linear(x, weights[0][0], None, True, False, dtype)
    check(fp8.linear, (x, weights[0][0], None, True, False, dtype), test_utils="test_faketensor")
    check(fp8.linear_backward, (y, weights[0][0], *saved, True, False, dtype), test_utils="test_faketensor")


def test_a_weight_is_quantized_once_per_step_and_again_after_an_update(fp8_model, monkeypatch):
    count = []
    quantize = fp8.quantize_weights_uncached
    monkeypatch.setattr(fp8, "quantize_weights_uncached", lambda *args: count.append(args) or quantize(*args))
    want = loss_and_gradients(fp8_model)
    per_use = len(count)
    count.clear()
    with quantized_once(fp8_model):
        for _ in range(3):      # micro-batches
            assert all(map(torch.equal, loss_and_gradients(fp8_model), want))
        assert len(count) == per_use
        torch.optim.SGD(fp8_model.parameters(), lr=0.1).step()
        updated = loss_and_gradients(fp8_model)
        assert len(count) == 2 * per_use and not torch.equal(updated[0], want[0])
    count.clear()
    assert all(map(torch.equal, loss_and_gradients(fp8_model), updated)) and len(count) == per_use
    assert not any(hasattr(p, "fp8_cache") for p in fp8_model.parameters())


def test_recomputation_keeps_products_but_mla_s_up_projections(fp8_model, monkeypatch):
    products, gemm = [], fp8.gemm
    monkeypatch.setattr(fp8, "gemm", lambda *args: products.append(args) or gemm(*args))
    want = loss_and_gradients(fp8_model)
    without = len(products)
    recompute(fp8_model)
    products.clear()
    assert all(map(torch.equal, loss_and_gradients(fp8_model), want))
    assert len(products) == without + 2 * len(fp8_model.model.layers)


@pytest.mark.skipif(DEVICE == "cuda", reason="one process of gloo")
def test_fsdp_weights_are_never_stale(fp8_model):
    """fully_shard gathers weights into the same tensors at every step, and hides that from their version
    counters."""
    import torch.distributed as dist
    from torch.distributed.fsdp import fully_shard
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        whole, sharded = fp8_model, copy.deepcopy(fp8_model)
        for block in sharded.model.layers:
            if isinstance(block, MTP):
                fully_shard(block.shared_head.norm)     # it runs after the block
            fully_shard(block)
        fully_shard(sharded)
        optimizers = [torch.optim.SGD(model.parameters(), lr=0.1) for model in (whole, sharded)]
        for step in range(2):
            want = loss_and_gradients(whole, seed=step)
            with quantized_once(sharded):
                for _ in range(2):
                    got = loss_and_gradients(sharded, seed=step)
                    for a, b in zip(got, want):
                        torch.testing.assert_close(getattr(a, "full_tensor", lambda: a)(), b)
            for optimizer in optimizers:
                optimizer.step()
    finally:
        dist.destroy_process_group()


@pytest.mark.filterwarnings("ignore:FP8 is emulated")
@pytest.mark.parametrize("bf16", [False, True], ids=["fp32", "bf16"])
def test_the_whole_model_learns_alike(make_config, bf16):
    model = DeepSeekV3(make_config(initializer_range=0.05, num_hidden_layers=2)).to(DEVICE)
    eight = convert_to_fp8(copy.deepcopy(model))
    idx = torch.randint(61, (4, 33), device=DEVICE)
    losses = {}
    for name, m in ("plain", model), ("fp8", eight):
        optimizer = torch.optim.AdamW(m.parameters(), lr=3e-3)
        losses[name] = []
        for _ in range(15):
            with torch.autocast(DEVICE, torch.bfloat16, enabled=bf16):
                _, loss, aux = m(idx[:, :-1], idx[:, 1:])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses[name].append(loss.item())
    fallen = losses["plain"][0] - losses["plain"][-1]
    assert fallen > 1 and losses["fp8"] != losses["plain"]
    assert abs(losses["fp8"][-1] - losses["plain"][-1]) < 0.03 * fallen


def test_an_unfit_device_is_named():
    assert "not an NVIDIA GPU" in fp8.kernels_missing(torch.device("cpu"))
    on_a_mac = SimpleNamespace(parameters=lambda: iter([SimpleNamespace(device=torch.device("mps"))]))
    with pytest.raises(ValueError, match="mps"):
        convert_to_fp8(on_a_mac)


def test_too_old_a_gpu_is_named(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA A100")
    for capability, runs in ((8, 0), False), ((8, 9), True), ((9, 0), True), ((10, 0), True), ((12, 0), True):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
        reason = fp8.kernels_missing(torch.device("cuda"))
        assert (reason is None) == (runs and fp8.triton is not None)
        assert runs or fp8.triton is None or "NVIDIA A100 (sm_80)" in reason
