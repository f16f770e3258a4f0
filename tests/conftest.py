import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))

from model import DeepSeekV3, DeepSeekV3Config  # noqa: E402


@pytest.fixture(autouse=True)
def fixed_seed():
    torch.manual_seed(0)


@pytest.fixture
def make_config():
    """A config in which every size differs from every other, so that a swapped pair shows."""
    def make(**changes):
        small = dict(vocab_size=61, hidden_size=48, intermediate_size=80, moe_intermediate_size=32, num_hidden_layers=3,
                     num_attention_heads=3, q_lora_rank=20, kv_lora_rank=16, qk_nope_head_dim=12, qk_rope_head_dim=8,
                     v_head_dim=28, n_routed_experts=12, num_experts_per_tok=3, n_group=4, topk_group=2,
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
