"""
What fits where: bytes of weights and of cache, computed from the presets' shapes.

    python tests/bench/bench_memory.py
"""

import dataclasses
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[2]))

from checkpoint import stored_size  # noqa: E402
from model import DeepSeekV3, DeepSeekV3Config  # noqa: E402

print(f"{'preset':<8}{'MTP':>4}{'weights bf16 GB':>18}{'FP8 GB':>10}{'cache bytes/token':>20}{'of 32K tokens, GB':>20}")
for name in ("16b", "671b"):
    for depth in (0, 1):
        config = dataclasses.replace(DeepSeekV3Config.preset(name), num_nextn_predict_layers=depth)
        with torch.device("meta"):
            model = DeepSeekV3(config).to(torch.bfloat16)
            cache = sum(c.numel() * c.element_size() for c in model.new_cache(1, 1, mtp=True))
        tensors = model.state_dict().items()
        bf16, fp8 = (sum(stored_size(n, t, fp8) for n, t in tensors) / 1e9 for fp8 in (False, True))
        print(f"{name:<8}{depth:>4}{bf16:>18.2f}{fp8:>10.2f}{cache:>20,}{cache * 32768 / 1e9:>20.2f}")
