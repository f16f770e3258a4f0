import os
import sys
from pathlib import Path

# On tensors as small as these a second thread waits longer than it computes, seconds where another process
# wants the core. The processes that tests start inherit this.
os.environ["OMP_NUM_THREADS"] = "1"

import pytest  # noqa: E402
import torch  # noqa: E402

sys.path.insert(0, str(Path(__file__).parent.parent))
if not torch.cuda.is_available():
    # read when fp8.py is imported: its kernels run on the CPU, as Python
    os.environ["TRITON_INTERPRET"] = "1"

from model import DeepSeekV3, DeepSeekV3Config  # noqa: E402


def exact_interpreter():
    """Make the casts and products of Triton's interpreter those of the hardware. As of 3.7.1 its fp32 to e4m3
    loses the carry of the mantissa, does not saturate and truncates subnormals, its fp32 to bf16 truncates,
    and its bf16 dot multiplies the raw bits. Tests only: on a GPU none of this is involved."""
    try:
        import triton.language as tl
        from triton.runtime import interpreter
    except ImportError:
        return
    dtypes = {tl.float8e4nv: torch.float8_e4m3fn, tl.bfloat16: torch.bfloat16, tl.float16: torch.float16,
              tl.float32: torch.float32}

    def to_torch(data, dtype):      # data: numpy, with fp8 and bf16 as unsigned integers
        data = torch.from_numpy(data.copy())
        return data if data.dtype == dtypes[dtype] else data.view(dtypes[dtype])

    def convert_float(data, from_dtype, to_dtype, rounding_mode):
        x = to_torch(data, from_dtype).float()
        if to_dtype == tl.float8e4nv:
            x = x.clamp(-448, 448)
        out = x.to(dtypes[to_dtype])
        return out.view({1: torch.uint8, 2: torch.uint16, 4: torch.uint32}[out.element_size()]).numpy()

    def create_dot(self, a, b, d, input_precision, max_num_imprecise_acc):
        a, b = to_torch(a.data, a.dtype.scalar).float(), to_torch(b.data, b.dtype.scalar).float()
        return interpreter.TensorHandle((a @ b).numpy() + d.data, d.dtype.scalar)

    interpreter._convert_float = convert_float
    interpreter.InterpreterBuilder.create_dot = create_dot


exact_interpreter()


@pytest.fixture(autouse=True)
def fixed_seed():
    torch.manual_seed(0)


@pytest.fixture
def two_threads():
    """For tests of results that must not depend on how threads share the work."""
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(1)


@pytest.fixture
def make_config():
    """A config in which every size differs from every other, so that a swapped pair shows."""
    def make(**changes):
        small = dict(vocab_size=61, hidden_size=48, intermediate_size=80, moe_intermediate_size=32,
                     num_hidden_layers=3, num_attention_heads=3, q_lora_rank=20, kv_lora_rank=16,
                     qk_nope_head_dim=12, qk_rope_head_dim=8, v_head_dim=28, n_routed_experts=12,
                     num_experts_per_tok=3, n_group=4, topk_group=2,
                     first_k_dense_replace=1, max_position_embeddings=128, initializer_range=0.2)
        return DeepSeekV3Config(**{**small, **changes})
    return make


@pytest.fixture
def make_model(make_config):
    """A model with such a config and random, partly negative, router biases."""
    def make(**changes):
        model = DeepSeekV3(make_config(**changes))
        for name, buffer in model.named_buffers():
            if "e_score_correction_bias" in name:
                buffer.normal_(-0.3, 0.3)
        return model.eval()
    return make
