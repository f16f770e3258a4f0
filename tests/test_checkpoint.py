"""Checkpoints in the released format, written by hand or by Hugging Face: read, written, refused."""

import base64
import dataclasses
import json
import math
import os
import random
import shutil
import struct
import subprocess
import sys
import types
from fnmatch import fnmatch
from pathlib import Path

import pytest
import torch

import checkpoint
import sample
import train
from checkpoint import load_run
from data.prepare import prepare
from data.tokenizer import (BYTES, DEEPSEEK_EOS, KIMI_PATTERN, Ends, build, encode, get_tokenizer,
                            read_ends, token_bytes, tokenizer_files)
from fp8 import dequantize, quantize_reference
from model import MLA, MLP, DeepSeekV3, DeepSeekV3Config

st = pytest.importorskip("safetensors.torch", reason="released checkpoints are safetensors files")
YARN = dict(type="yarn", factor=4, original_max_position_embeddings=32, beta_fast=32, beta_slow=1, mscale=0.7,
            mscale_all_dim=1.0)
NASTY = ("Hi, it's 1234567\r\n\r\n\t   of      spaces 我们の・e\u0301 👩\u200d🚀 \u200b IT'S "
         "naïve Straße中文1a中 x=+=1;\n\n\n"
         "  def f(x):\n        return x**2  # ok\x00\ufeff 한국어 ١٢٣ ½²" + " " * 300 + "end \n \r\n")


def released(model, fp8=False):
    """What the release holds, put together without the code under test: {name: tensor}."""
    c, tensors = model.config, {}
    for name, t in model.state_dict().items():
        if ".experts." in name and "shared" not in name:
            for e, w in enumerate(t):
                stem, kind = name.rsplit(".", 1)
                tensors[f"{stem}.{e}.{kind}.weight"] = w.clone()
        elif not (name == "lm_head.weight" and c.tie_word_embeddings):
            tensors[name] = t.clone()
    for k in range(c.num_nextn_predict_layers):
        stem = f"model.layers.{c.num_hidden_layers + k}"
        tensors[f"{stem}.embed_tokens.weight"] = model.model.embed_tokens.weight.detach().clone()
        tensors[f"{stem}.shared_head.head.weight"] = model.lm_head.weight.detach().clone()
    if fp8:
        for name in [n for n in tensors if n.endswith("_proj.weight") and "eh_proj" not in n or "mqa" in n]:
            w = tensors[name]
            scale = torch.rand(-(-w.size(0) // 128), -(-w.size(1) // 128)) * 1e-3 + 1e-4
            full = scale.repeat_interleave(128, 0)[:w.size(0)].repeat_interleave(128, 1)[:, :w.size(1)]
            tensors[name] = (w / full).clamp(-448, 448).to(torch.float8_e4m3fn)
            tensors[name + "_scale_inv"] = scale
    return tensors


def config_json(config, form="release", **changes):
    raw = {k: v for k, v in dataclasses.asdict(config).items()
           if k not in ("bias_update_speed", "balance_loss_alpha", "mtp_loss_weight")}
    raw |= {"architectures": ["DeepseekV3ForCausalLM"], "model_type": "deepseek_v3", "hidden_act": "silu",
            "num_key_value_heads": config.num_attention_heads, "scoring_func": "sigmoid",
            "topk_method": "noaux_tc",
            "bos_token_id": 0, "eos_token_id": 1}
    if form == "transformers 5":
        theta, yarn = raw.pop("rope_theta"), raw.pop("rope_scaling")
        raw["rope_parameters"] = {"rope_theta": theta, "rope_type": "default"}
        if yarn:
            raw["rope_parameters"] = {"rope_theta": theta, "rope_type": "yarn",
                                      **{k: v for k, v in yarn.items() if k != "type"}}
    return {**raw, **changes}


def write(dir, tensors, raw, shards=1):
    dir.mkdir(exist_ok=True)
    (dir / "config.json").write_text(json.dumps(raw))
    if shards == 1:
        st.save_file(tensors, dir / "model.safetensors", metadata={"format": "pt"})
        return dir
    index = {}
    for i in range(shards):     # a weight and its scale are in different files
        part = {name: tensors[name] for name in list(tensors)[i::shards]}
        st.save_file(part, dir / f"model-{i}.safetensors", metadata={"format": "pt"})
        index |= dict.fromkeys(part, f"model-{i}.safetensors")
    (dir / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    return dir


def edit(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_index(dir, change):
    content = json.loads((dir / "model.safetensors.index.json").read_text())
    change(content["weight_map"])
    (dir / "model.safetensors.index.json").write_text(json.dumps(content))


def equal(a, b):
    a, b = a.state_dict(), b.state_dict()
    assert a.keys() == b.keys()
    for name in a:
        assert a[name].dtype == b[name].dtype and torch.equal(a[name], b[name]), name


# ---------------------------------------------------------------------------------------------------- loading

CASES = [{}, dict(q_lora_rank=None), dict(tie_word_embeddings=True), dict(num_nextn_predict_layers=0),
         dict(num_nextn_predict_layers=2, tie_word_embeddings=True), dict(rope_scaling=YARN),
         dict(n_shared_experts=0),
         dict(first_k_dense_replace=0), dict(first_k_dense_replace=3, num_nextn_predict_layers=0)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shards, form", [(1, "release"), (3, "transformers 5")])
@pytest.mark.parametrize("changes", CASES, ids=str)
def test_released_layout_loads(tmp_path, make_model, changes, dtype, shards, form):
    model = make_model(**changes).to(dtype)
    tensors = released(model) | {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}
    loaded = DeepSeekV3.from_pretrained(write(tmp_path, tensors, config_json(model.config, form), shards))
    equal(loaded, model)
    assert not loaded.training and loaded.num_params() == model.num_params()        # a tied head stays tied
    idx = torch.randint(61, (2, 9))
    assert torch.equal(loaded(idx)[0], model(idx)[0])


def test_bias_stays_fp32_even_if_stored_in_bf16(tmp_path, make_model):
    model = make_model()
    tensors = {k: v.bfloat16() for k, v in released(model).items()}
    loaded = DeepSeekV3.from_pretrained(write(tmp_path, tensors, config_json(model.config)))
    bias = loaded.model.layers[1].mlp.gate.e_score_correction_bias
    stored = tensors["model.layers.1.mlp.gate.e_score_correction_bias"]
    assert bias.dtype == torch.float32 and torch.equal(bias, stored.float())
    assert loaded.lm_head.weight.dtype == torch.bfloat16
    assert DeepSeekV3.from_pretrained(tmp_path, torch.float32).lm_head.weight.dtype == torch.float32


def test_weights_cast_to_bf16_under_a_config_that_still_says_fp8(tmp_path, make_model):
    """What DeepSeek's fp8_cast_bf16.py leaves: no scales, and the config as it was."""
    model = make_model().bfloat16()
    raw = config_json(model.config, quantization_config=checkpoint.FP8_FORMAT)
    equal(DeepSeekV3.from_pretrained(write(tmp_path, released(model), raw, shards=3)), model)


def test_a_checkpoint_without_the_mtp_modules_of_its_config_loads(tmp_path, make_model):
    model = make_model(num_nextn_predict_layers=2)
    mtp = "model.layers.3.", "model.layers.4."
    tensors = {k: v for k, v in released(model).items() if not k.startswith(mtp)}
    loaded = DeepSeekV3.from_pretrained(write(tmp_path, tensors, config_json(model.config)))
    assert loaded.config.num_nextn_predict_layers == 0 and len(loaded.model.layers) == 3


@pytest.mark.parametrize("count", [0, None, "absent"])
def test_an_mtp_layer_that_the_config_does_not_count_is_left_out(tmp_path, make_model, capsys, count):
    model = make_model()
    raw = config_json(model.config, num_nextn_predict_layers=count)
    if count == "absent":
        del raw["num_nextn_predict_layers"]
    loaded = DeepSeekV3.from_pretrained(write(tmp_path, released(model), raw, shards=3))
    assert loaded.config.num_nextn_predict_layers == 0
    assert torch.equal(loaded.lm_head.weight, model.lm_head.weight)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and "MTP layer model.layers.3" in lines[0]


def test_the_second_of_two_mtp_layers_is_left_out(tmp_path, make_model, capsys):
    model = make_model(num_nextn_predict_layers=2)
    raw = config_json(model.config, num_nextn_predict_layers=1)
    loaded = DeepSeekV3.from_pretrained(write(tmp_path, released(model), raw))
    assert len(loaded.model.layers) == 4 and "model.layers.4" in capsys.readouterr().err
    raw = config_json(model.config, num_hidden_layers=2, num_nextn_predict_layers=0)
    with pytest.raises(ValueError, match="unexpected model.layers.2."):     # not an MTP layer
        DeepSeekV3.from_pretrained(write(tmp_path, released(model), raw))


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
@pytest.mark.parametrize("layer", [3, 4])
@pytest.mark.parametrize("name, original", [("embed_tokens", "model.embed_tokens"),
                                            ("shared_head.head", "lm_head")])
def test_mtp_with_its_own_embedding_or_head_is_refused(tmp_path, make_model, layer, name, original, dtype):
    model = make_model(num_nextn_predict_layers=2)
    tensors = released(model)
    name = f"model.layers.{layer}.{name}.weight"
    same = tensors[name].bfloat16()         # rounded, but the same
    equal(DeepSeekV3.from_pretrained(write(tmp_path, tensors | {name: same}, config_json(model.config))),
          model)
    tensors[name][60, 47] += 0.01
    write(tmp_path, tensors, config_json(model.config))
    with pytest.raises(ValueError,
                       match=f"{name} differs from {original}.weight.*num_nextn_predict_layers to 0"):
        DeepSeekV3.from_pretrained(tmp_path, dtype)
    edit(tmp_path / "config.json", num_nextn_predict_layers=0)
    assert len(DeepSeekV3.from_pretrained(tmp_path).model.layers) == 3


def test_a_head_in_fp8_and_its_copy(tmp_path, make_model):
    model = make_model()
    tensors = released(model)
    q, scale = quantize_reference(model.lm_head.weight.detach(), 128)
    for name in "lm_head.weight", "model.layers.3.shared_head.head.weight":
        tensors |= {name: q.clone(), name + "_scale_inv": scale.clone()}
    loaded = DeepSeekV3.from_pretrained(write(tmp_path, tensors, config_json(model.config)))
    assert torch.equal(loaded.lm_head.weight, dequantize(q, scale))
    tensors["model.layers.3.shared_head.head.weight_scale_inv"] *= 2
    write(tmp_path, tensors, config_json(model.config))
    with pytest.raises(ValueError, match="model.layers.3.shared_head.head.weight differs"):
        DeepSeekV3.from_pretrained(tmp_path)


def test_an_index_may_list_tensors_that_do_not_exist(tmp_path, make_model):
    """As after a conversion to bf16, which leaves the names of the scales behind."""
    model = make_model().bfloat16()
    write(tmp_path, released(model), config_json(model.config), shards=3)
    edit_index(tmp_path, lambda index: index.update({"model.norm.weight_scale_inv": "model-0.safetensors",
                                                     "unneeded": "absent.safetensors"}))
    equal(DeepSeekV3.from_pretrained(tmp_path), model)
    tensors = {n: t for n, t in released(model).items() if n != "lm_head.weight"}
    write(tmp_path, tensors, config_json(model.config), shards=3)
    edit_index(tmp_path, lambda index: index.update({"lm_head.weight": "model-0.safetensors"}))
    with pytest.raises(ValueError, match="missing lm_head.weight"):
        DeepSeekV3.from_pretrained(tmp_path)
    edit_index(tmp_path, lambda index: index.update({"lm_head.weight": "absent.safetensors"}))
    with pytest.raises(ValueError, match="absent.safetensors .*complete the download.* missing lm_head.w"):
        DeepSeekV3.from_pretrained(tmp_path)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64, torch.float8_e8m0fnu])
def test_scales_of_any_float_type(tmp_path, make_model, dtype):
    model = make_model()
    tensors = released(model, fp8=True)
    for name in [n for n in tensors if n.endswith("_scale_inv")]:
        tensors[name] = tensors[name].to(dtype)
    loaded = DeepSeekV3.from_pretrained(write(tmp_path, tensors, config_json(model.config)), torch.float32)
    name = "model.layers.0.self_attn.o_proj.weight"
    want = tensors[name].float() * tensors[name + "_scale_inv"].float()
    assert torch.equal(loaded.state_dict()[name], want)
    tensors["model.layers.0.self_attn.o_proj.weight_scale_inv"] = torch.full((1, 1), math.nan).to(dtype)
    with pytest.raises(ValueError, match="o_proj.weight_scale_inv holds scales"):
        DeepSeekV3.from_pretrained(write(tmp_path, tensors, config_json(model.config)))


def test_changes_override_the_config(tmp_path, make_model):
    model = make_model()
    write(tmp_path, released(model), config_json(model.config))
    longer = DeepSeekV3.from_pretrained(tmp_path, rope_scaling=YARN, max_position_embeddings=512)
    assert longer.config.rope_scaling == YARN and longer.config.max_position_embeddings == 512
    assert longer.model.layers[0].self_attn.softmax_scale != model.model.layers[0].self_attn.softmax_scale
    without = DeepSeekV3.from_pretrained(tmp_path, num_nextn_predict_layers=0)
    assert len(without.model.layers) == 3 and torch.equal(without.lm_head.weight, model.lm_head.weight)


def test_float64_survives_a_round_trip(tmp_path, make_model):
    model = make_model().double()
    model.save_pretrained(tmp_path)
    loaded = DeepSeekV3.from_pretrained(tmp_path)
    equal(loaded, model)
    idx = torch.randint(61, (2, 20))
    torch.testing.assert_close(loaded(idx)[0], model.float()(idx)[0].double(), rtol=0, atol=1e-5)


def test_empty_tensors_are_ignored(tmp_path, make_model):
    """transformers writes them for n_shared_experts 0."""
    model = make_model(n_shared_experts=0)
    empty = {f"model.layers.1.mlp.shared_experts.{name}_proj.weight": torch.empty(0, 48)
             for name in ("gate", "up")}
    equal(DeepSeekV3.from_pretrained(write(tmp_path, released(model) | empty, config_json(model.config))),
          model)


@pytest.mark.parametrize("shape", [(128, 128), (1, 1), (130, 300), (256, 129), (127, 384)])
def test_fp8_blocks_dequantise_and_quantise(shape):
    w = torch.randn(shape) * torch.logspace(-3, 1, shape[1])
    w[:64] = 0 if shape[0] == 127 else w[:64]
    q, scale = quantize_reference(w, 128)
    assert q.dtype == torch.float8_e4m3fn and scale.dtype == torch.float32
    assert q.shape == shape and scale.shape == tuple(-(-n // 128) for n in shape)
    back = dequantize(q, scale)
    for i in range(scale.size(0)):
        for j in range(scale.size(1)):
            block = slice(128 * i, 128 * i + 128), slice(128 * j, 128 * j + 128)
            assert torch.equal(back[block], q[block].float() * scale[i, j])
            amax = w[block].abs().max()
            assert torch.allclose(scale[i, j], amax / 448) and torch.allclose(back[block].abs().max(), amax)
            assert ((back[block] - w[block]).abs() <= w[block].abs() / 16 + amax / 448 / 512).all()
    q, scale = quantize_reference(torch.zeros(130, 5), 128)
    assert torch.equal(dequantize(q, scale), torch.zeros(130, 5))


@pytest.mark.parametrize("shards", [1, 3])
def test_fp8_loads_dequantised(tmp_path, make_model, shards):
    model = make_model(hidden_size=144, intermediate_size=272, kv_lora_rank=136)
    tensors = released(model.bfloat16(), fp8=True)
    quantized = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    raw = config_json(model.config, quantization_config=quantized)
    loaded = DeepSeekV3.from_pretrained(write(tmp_path, tensors, raw, shards))
    assert {t.dtype for n, t in loaded.state_dict().items() if "e_score" not in n} == {torch.bfloat16}
    name = "model.layers.0.mlp.down_proj.weight"
    scale = tensors[name + "_scale_inv"]
    assert scale.shape == (2, 3)
    full = torch.kron(scale, torch.ones(128, 128))[:144, :272]
    assert torch.equal(loaded.state_dict()[name], (tensors[name].float() * full).bfloat16())
    expert = "model.layers.1.mlp.experts.7.up_proj.weight"
    want = dequantize(tensors[expert], tensors[expert + "_scale_inv"])
    in_fp32 = DeepSeekV3.from_pretrained(tmp_path, torch.float32)
    assert torch.equal(in_fp32.model.layers[1].mlp.experts.up_proj[7], want)


def test_a_hub_id_is_fetched_by_huggingface_hub_and_nothing_else_is(tmp_path, make_model, monkeypatch):
    monkeypatch.chdir(tmp_path)
    asked = []

    def snapshot_download(name, allow_patterns):
        asked.append(name)
        for file in "pytorch_model.bin", "model.pt", "modeling.py":
            assert not any(fnmatch(file, pattern) for pattern in allow_patterns)
        if name == "some/typo":
            raise OSError("404 Client Error.\nRepository Not Found")
        return str(tmp_path / "cache")

    model = make_model()
    write(tmp_path / "cache", released(model), config_json(model.config))
    monkeypatch.setitem(sys.modules, "huggingface_hub",
                        types.SimpleNamespace(snapshot_download=snapshot_download))
    loaded = DeepSeekV3.from_pretrained("owner/model")
    assert asked == ["owner/model"] and torch.equal(loaded.lm_head.weight, model.lm_head.weight)
    with pytest.raises(ValueError,
                       match="^there is no folder some/typo, .*404 Client Error. Repository Not Found.*name"):
        DeepSeekV3.from_pretrained("some/typo")
    (tmp_path / "out").mkdir()
    # paths, whether they exist or not
    for path in "cache", "out/run", str(tmp_path / "a" / "b"), "a/b/c", "nothing":
        assert checkpoint.released_folder(path) == Path(path)
    assert len(asked) == 2
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ImportError, match="no folder owner/model.*pip install huggingface_hub"):
        DeepSeekV3.from_pretrained("owner/model")
    with pytest.raises(SystemExit,
                       match="^sample.py: there is no folder owner/model.*pip install huggingface_hub"):
        sample.main(["--ckpt", "owner/model"])


@pytest.mark.parametrize("stored_in_fp8", [True, False])
def test_weights_can_stay_in_fp8(tmp_path, make_model, stored_in_fp8):
    model = make_model(hidden_size=128, intermediate_size=256, moe_intermediate_size=128, q_lora_rank=128,
                       kv_lora_rank=100, num_attention_heads=4, v_head_dim=32,
                       initializer_range=0.05).bfloat16()
    tensors = released(model, fp8=stored_in_fp8)
    quantized = {"quant_method": "fp8", "weight_block_size": [128, 128]} if stored_in_fp8 else None
    write(tmp_path, tensors, config_json(model.config, quantization_config=quantized))
    held = DeepSeekV3.from_pretrained(tmp_path, torch.float8_e4m3fn)
    plain = DeepSeekV3.from_pretrained(tmp_path, torch.float32)
    kinds = {name: t.dtype for name, t in held.state_dict().items()}
    for name in ("self_attn.q_a_proj.weight", "self_attn.o_proj.weight", "mlp.experts.up_proj",
                 "mlp.shared_experts.up_proj.weight"):
        assert kinds[f"model.layers.1.{name}"] == torch.float8_e4m3fn, name
        assert kinds[f"model.layers.1.{name}_scale_inv"] == torch.float32
    for name in "model.layers.3.eh_proj.weight", "model.layers.1.self_attn.kv_b_proj.weight":
        assert kinds[name] == torch.bfloat16
    name = "model.layers.1.mlp.experts.7.down_proj.weight"
    experts = held.model.layers[1].mlp.experts
    if stored_in_fp8:
        assert torch.equal(experts.down_proj[7].float(), tensors[name].float())
        assert torch.equal(experts.down_proj_scale_inv[7], tensors[name + "_scale_inv"])
    assert torch.allclose(dequantize(experts.down_proj[7], experts.down_proj_scale_inv[7]),
                          plain.model.layers[1].mlp.experts.down_proj[7], rtol=0.07, atol=1e-4)
    idx = torch.randint(61, (2, 40))
    with torch.no_grad():
        a, b = held(idx)[0].float(), plain(idx)[0]
    # activations are in FP8 too, and some tokens go to other experts
    assert (a - b).norm() < 0.2 * b.norm()
    tokens = held.generate(idx[:1, :5], 12, temperature=0)
    assert torch.equal(tokens, held.generate(idx[:1, :5], 12, temperature=0)) and tokens.shape == (1, 17)
    with pytest.raises(ValueError, match="load FP8 weights with dtype=torch.bfloat16"):
        held.save_pretrained(tmp_path / "again")


@pytest.mark.parametrize("scale_fmt", [None, "ue8m0"])
def test_fp8_weights_compute_with_the_scales_that_the_config_names(tmp_path, make_model, scale_fmt):
    """DeepSeek-V3.1 was trained with powers of two. Here they are stored in bf16, quantized on loading."""
    model = make_model(hidden_size=128, moe_intermediate_size=128).bfloat16()
    quantized = checkpoint.FP8_FORMAT | ({"scale_fmt": scale_fmt} if scale_fmt else {})
    write(tmp_path, released(model), config_json(model.config, quantization_config=quantized))
    held = DeepSeekV3.from_pretrained(tmp_path, torch.float8_e4m3fn)
    assert {module.pow2 for module in held.modules() if hasattr(module, "pow2")} == {scale_fmt is not None}
    scales = torch.cat([t.flatten() for name, t in held.state_dict().items() if name.endswith("_scale_inv")])
    assert (scales.frexp().mantissa == 0.5).all() == (scale_fmt is not None)


def test_peak_memory_is_the_model_and_one_tensor(tmp_path):
    if sys.platform != "linux":
        pytest.skip("reads /proc/self/status")
    code = f"""if True:
        import sys; sys.path.insert(0, {str(Path(__file__).parent.parent)!r})
        import torch, safetensors.torch
        import checkpoint as module
        from model import DeepSeekV3
        def kb(key): return int(open("/proc/self/status").read().split(key)[1].split()[0])
        read, seen = module.read_tensor, [0]
        def sampled(*args):
            tensor = read(*args)
            tensor.sum()        # touches all of its pages
            seen.append(kb("VmRSS:"))
            return tensor
        module.read_tensor = sampled
        with torch.device("meta"):
            DeepSeekV3(module.read_config({str(tmp_path)!r}))       # the first use imports 100 MB of torch
        before = kb("VmRSS:")
        model = DeepSeekV3.from_pretrained({str(tmp_path)!r})
        size = sum(t.numel() * t.element_size() for t in model.state_dict().values()) / 1024
        print(size, model.lm_head.weight.numel() * 4 / 1024, max(*seen, kb("VmRSS:")) - before)
    """
    DeepSeekV3(DeepSeekV3Config(
        vocab_size=16384, hidden_size=512, intermediate_size=1024, moe_intermediate_size=512,
        num_hidden_layers=5, num_attention_heads=4, q_lora_rank=None, kv_lora_rank=64, n_routed_experts=8,
        n_group=1, topk_group=1, num_experts_per_tok=2, first_k_dense_replace=1,
        num_nextn_predict_layers=0)).save_pretrained(tmp_path)
    out = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    model, tensor, peak = map(float, out.split())
    print(f"model {model / 1024:.0f} MB, largest tensor {tensor / 1024:.0f} MB, peak {peak / 1024:.0f} MB")
    assert model > 190 * 1024 and peak < model + tensor + 24 * 1024


# ----------------------------------------------------------------------------------------------------- saving

@pytest.mark.parametrize("changes", CASES, ids=str)
def test_round_trip_is_bit_equal(tmp_path, make_model, changes):
    model = make_model(**changes)
    model.save_pretrained(tmp_path, shard_bytes=20_000)
    assert len(list(tmp_path.glob("*.safetensors"))) > 3 and not list(tmp_path.glob("*.tmp"))
    size = sum(t.numel() * t.element_size() for t in released(model).values())
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"] == {"total_size": size}
    loaded = DeepSeekV3.from_pretrained(tmp_path)
    equal(loaded, model)
    assert loaded.config == model.config
    model.bfloat16().save_pretrained(tmp_path)      # over the earlier one, whose shards go
    assert [p.name for p in tmp_path.glob("*.safetensors*")] == ["model.safetensors"]
    equal(DeepSeekV3.from_pretrained(tmp_path), model)
    with st.safe_open(tmp_path / "model.safetensors", "pt") as f:
        assert set(f.keys()) == released(model).keys() and f.metadata() == {"format": "pt"}
        # embedding and head of the MTP modules too, which loading skips
        for name, tensor in released(model).items():
            assert torch.equal(f.get_tensor(name), tensor), name


def test_fp8_export_has_the_releases_tensors(tmp_path, make_model):
    model = make_model(hidden_size=144, intermediate_size=272)
    model.save_pretrained(tmp_path, fp8=True)
    tensors, want = st.load_file(tmp_path / "model.safetensors"), released(model, fp8=True)
    assert tensors.keys() == want.keys()
    for name, t in tensors.items():
        as_it_is = "e_score" in name or "scale" in name or want[name].dtype == torch.float8_e4m3fn
        kind = want[name].dtype if as_it_is else torch.bfloat16
        assert t.dtype == kind and t.shape == want[name].shape, name
    loaded = DeepSeekV3.from_pretrained(tmp_path, torch.float32)
    for name, t in model.state_dict().items():
        assert (loaded.state_dict()[name] - t).abs().max() <= t.abs().max() / 16, name
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["quantization_config"]["weight_block_size"] == [128, 128]


def test_interrupted_save_keeps_the_old_checkpoint(tmp_path, make_model, monkeypatch):
    model = make_model()
    model.save_pretrained(tmp_path)
    save, calls = st.save_file, []

    def full_disk(*args, **kwargs):
        calls.append(1)
        if len(calls) == 3:
            raise OSError("No space left on device")
        save(*args, **kwargs)

    monkeypatch.setattr(st, "save_file", full_disk)
    with pytest.raises(OSError, match="No space"):
        make_model(hidden_size=32).save_pretrained(tmp_path, shard_bytes=20_000)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["config.json", "model.safetensors"]
    equal(DeepSeekV3.from_pretrained(tmp_path), model)


def test_save_cut_between_two_renames_leaves_no_mixed_checkpoint(tmp_path, make_model, monkeypatch):
    make_model().save_pretrained(tmp_path, shard_bytes=20_000)
    replace, calls = os.replace, []

    def cut(*args):
        calls.append(args)
        if len(calls) == 2:
            raise OSError("cut")
        replace(*args)

    monkeypatch.setattr(os, "replace", cut)
    with pytest.raises(OSError, match="cut"):
        make_model().save_pretrained(tmp_path, shard_bytes=20_000)
    with pytest.raises(ValueError, match="no folder with a config.json"):
        DeepSeekV3.from_pretrained(tmp_path)


# ----------------------------------------------------------------------------------- parity with Hugging Face

HF_CASES = [{}, dict(q_lora_rank=None, num_nextn_predict_layers=0),
            dict(rope_scaling=YARN, num_nextn_predict_layers=2),
            dict(tie_word_embeddings=True),
            dict(norm_topk_prob=False, n_group=1, topk_group=1, routed_scaling_factor=1.7),
            dict(n_group=2, topk_group=1, n_shared_experts=2, rope_theta=50000.0)]


@pytest.fixture
def hf():
    transformers = pytest.importorskip("transformers", reason="parity is with Hugging Face transformers")
    if not hasattr(transformers, "DeepseekV3ForCausalLM"):
        pytest.skip("this transformers has no DeepseekV3ForCausalLM")
    transformers.logging.set_verbosity_error()
    return transformers.DeepseekV3ForCausalLM


def same_outputs(ours, theirs):
    idx = torch.randint(61, (2, 40))
    with torch.no_grad():
        a, b = ours(idx)[0], theirs(idx).logits
    assert (a - b).abs().max() < 1e-4, (a - b).abs().max()
    theirs.generation_config.eos_token_id = None        # as an argument, None means the config's
    everything = torch.ones(2, 7, dtype=torch.int64)    # else token 0 is masked as padding
    want = theirs.generate(idx[:, :7], max_new_tokens=20, do_sample=False, pad_token_id=0,
                           attention_mask=everything)
    assert torch.equal(ours.generate(idx[:, :7], 20, temperature=0), want)


@pytest.mark.parametrize("form", ["release", "transformers 5"])
@pytest.mark.parametrize("changes", HF_CASES, ids=str)
def test_same_file_same_logits_as_transformers(tmp_path, make_model, hf, changes, form):
    model = make_model(**changes)
    write(tmp_path, released(model), config_json(model.config, form))
    theirs = hf.from_pretrained(tmp_path, dtype=torch.float32).eval()
    same_outputs(DeepSeekV3.from_pretrained(tmp_path), theirs)


@pytest.mark.parametrize("changes", HF_CASES, ids=str)
def test_transformers_loads_what_we_save_and_we_what_it_saves(tmp_path, make_model, hf, changes):
    model = make_model(**changes)
    model.save_pretrained(tmp_path / "a", shard_bytes=30_000)
    theirs, info = hf.from_pretrained(tmp_path / "a", dtype=torch.float32, output_loading_info=True)
    assert not info["missing_keys"] and not info["mismatched_keys"]
    assert all(int(name.split(".")[2]) >= 3 for name in info["unexpected_keys"])       # of the MTP modules
    same_outputs(model, theirs.eval())
    theirs.save_pretrained(tmp_path / "b")
    back = DeepSeekV3.from_pretrained(tmp_path / "b")
    assert back.config.num_nextn_predict_layers == 0
    for name, t in back.state_dict().items():
        assert torch.equal(t, model.state_dict()[name]), name
    same_outputs(back, theirs)


@pytest.mark.parametrize("changes", [
    {}, dict(q_lora_rank=None), dict(n_group=4, topk_group=2, norm_topk_prob=False),
    dict(mlp_layer_types=["sparse"] * 3),
    dict(mlp_layer_types=["dense", "dense", "sparse"], n_shared_experts=2),
    dict(rope_parameters={"rope_type": "yarn", "rope_theta": 5e4,
                          **{k: v for k, v in YARN.items() if k != "type"}})], ids=str)
def test_glm4_moe_lite_computes_the_same(tmp_path, make_config, changes):
    """eps is large, so that the norms of q_a and kv_a, whose eps is always 1e-6, would show a wrong one."""
    transformers = pytest.importorskip("transformers", reason="parity is with Hugging Face transformers")
    pytest.importorskip("transformers.models.glm4_moe_lite")
    sizes = dataclasses.asdict(make_config(rms_norm_eps=0.1, n_group=1, topk_group=1))
    for key in "first_k_dense_replace", "num_nextn_predict_layers", "rope_theta", "rope_scaling":
        del sizes[key]
    theirs = transformers.Glm4MoeLiteForCausalLM(transformers.Glm4MoeLiteConfig(**sizes | changes)).eval()
    for name, t in theirs.named_buffers():
        if "e_score_correction_bias" in name:
            t.normal_(-0.3, 0.3)
    theirs.save_pretrained(tmp_path / "a")
    ours = DeepSeekV3.from_pretrained(tmp_path / "a")
    same_outputs(ours, theirs)
    ours.save_pretrained(tmp_path / "b")        # as a deepseek_v3
    again = transformers.DeepseekV3ForCausalLM.from_pretrained(tmp_path / "b", dtype=torch.float32)
    same_outputs(ours, again.eval())


def test_kimi_k2_is_read_as_deepseek_v3(tmp_path, make_model, hf):
    model = make_model(num_nextn_predict_layers=0, n_group=1, topk_group=1, routed_scaling_factor=2.827,
                       rope_scaling=YARN | {"beta_fast": 1.0})
    write(tmp_path / "kimi", released(model), config_json(model.config, model_type="kimi_k2"))
    write(tmp_path / "v3", released(model), config_json(model.config))
    same_outputs(DeepSeekV3.from_pretrained(tmp_path / "kimi"), hf.from_pretrained(tmp_path / "v3").eval())


def test_fp8_equals_transformers_on_dequantised_weights(tmp_path, make_model, hf):
    model = make_model(hidden_size=144, intermediate_size=272, kv_lora_rank=136)
    tensors = released(model, fp8=True)
    ours = DeepSeekV3.from_pretrained(write(tmp_path / "fp8", tensors, config_json(model.config)),
                                      torch.float32)
    plain = {}
    for name, t in tensors.items():
        if t.dtype == torch.float8_e4m3fn:
            blocks = torch.kron(tensors[name + "_scale_inv"], torch.ones(128, 128))
            plain[name] = t.float() * blocks[:t.size(0), :t.size(1)]
        elif not name.endswith("_scale_inv"):
            plain[name] = t
    write(tmp_path / "plain", plain, config_json(model.config))
    same_outputs(ours, hf.from_pretrained(tmp_path / "plain", dtype=torch.float32).eval())


# --------------------------------------------------------------------------------------------------- refusals

def drop(*names):
    return lambda tensors, raw: [tensors.pop(n) for n in names]


def put(name, tensor):
    return lambda tensors, raw: tensors.update({name: tensor})


def conf(**changes):
    return lambda tensors, raw: raw.update(changes)


@pytest.mark.parametrize("damage, words", [
    (drop("model.norm.weight"), ["missing model.norm.weight"]),
    (drop("model.layers.1.mlp.experts.7.up_proj.weight"),
     ["missing model.layers.1.mlp.experts.7.up_proj.weight"]),
    (drop(*(f"model.layers.2.mlp.experts.{e}.up_proj.weight" for e in range(12))),
     ["missing", "(12 in all)"]),
    (drop("lm_head.weight"), ["missing lm_head.weight"]),
    (drop("model.layers.3.eh_proj.weight"), ["missing model.layers.3.eh_proj.weight"]),
    (put("model.layers.0.self_attn.q_proj.bias", torch.ones(3)),
     ["unexpected model.layers.0.self_attn.q_proj.bias"]),
    (put("model.layers.1.mlp.experts.12.up_proj.weight", torch.ones(32, 48)),
     ["unexpected", "experts.12.up_proj"]),
    (put("model.norm.weight_scale_inv", torch.ones(1)), ["unexpected model.norm.weight_scale_inv"]),
    (put("model.norm.weight", torch.ones(47)),
     ["model.norm.weight is F32 (47,) instead of F64/F32/BF16/F16 (48,)"]),
    (put("model.layers.3.embed_tokens.weight", torch.ones(60, 48)),
     ["embed_tokens.weight is F32 (60, 48)"]),
    (put("model.norm.weight", torch.ones(48, dtype=torch.int32)), ["model.norm.weight is I32 (48,)"]),
    (put("model.norm.weight", torch.ones(48).to(torch.float8_e4m3fn)),
     ["model.norm.weight is F8_E4M3"]),
    (put("lm_head.weight", torch.ones(61, 48).to(torch.float8_e5m2)),
     ["lm_head.weight is F8_E5M2"]),
    (put("lm_head.weight", torch.ones(61, 48).to(torch.float8_e4m3fn)), ["missing lm_head.weight_scale_inv"]),
    (lambda t, r: t.update({"lm_head.weight": torch.ones(61, 48).to(torch.float8_e4m3fn),
                            "lm_head.weight_scale_inv": torch.ones(2, 1)}),
     ["lm_head.weight_scale_inv is F32 (2, 1)"]),
    (lambda t, r: (drop("model.norm.weight")(t, r), put("x", torch.ones(1))(t, r)),
     ["missing", "unexpected x"]),
    (conf(num_hidden_layers=4), ["unexpected model.layers.3"]),
    (conf(num_nextn_predict_layers=2), ["missing model.layers.4"]),
    (conf(num_hidden_layers=2**31 - 1), ["too few for the 2147483647 layers"]),
    (conf(n_routed_experts=2**30, n_group=1, topk_group=1), ["too few"]),
    # in the MTP module only; 3 matrices of 40 experts in each of 60 layers
    (conf(n_routed_experts=2**30, n_group=1, topk_group=1, first_k_dense_replace=2**30), ["too few"]),
    (conf(num_hidden_layers=60, n_routed_experts=40), ["too few"]),
    (put("evil\n\x1b[31m", torch.ones(1)), [r"unexpected evil\n\x1b[31m"]),
    (put("x" * 10**5, torch.ones(1)), ["unexpected xxx"]),
    (conf(tie_word_embeddings=True), ["lm_head.weight differs from model.embed_tokens.weight",
                                      "tie_word_embeddings to false"]),
    (conf(model_type="llama"), ["model_type='llama'"]),
    (conf(quantization_config={"quant_method": "gptq"}), ["quant_method='gptq'"]),
    (conf(quantization_config={"quant_method": "fp8", "weight_block_size": [64, 64]}), ["weight_block_size"]),
])
def test_every_tensor_is_accounted_for(tmp_path, make_model, damage, words):
    model = make_model()
    tensors, raw = released(model), config_json(model.config)
    damage(tensors, raw)
    write(tmp_path, tensors, raw)
    with pytest.raises(ValueError) as error:
        DeepSeekV3.from_pretrained(tmp_path)
    assert all(word in str(error.value) for word in words) and str(error.value).isprintable(), error.value
    assert len(str(error.value)) < 2500


@pytest.mark.parametrize("scale", [math.nan, math.inf, -1.0])
def test_scales_that_are_negative_or_not_finite_are_refused(tmp_path, make_model, scale):
    tensors = released(make_model(), fp8=True)
    tensors["model.layers.0.self_attn.o_proj.weight_scale_inv"][0, 0] = scale
    write(tmp_path, tensors, config_json(make_model().config))
    with pytest.raises(ValueError, match="layers.0.self_attn.o_proj.weight_scale_inv"):
        DeepSeekV3.from_pretrained(tmp_path)


@pytest.mark.parametrize("dtype", ["float32", torch.int8])
def test_a_dtype_that_is_no_float_is_refused(tmp_path, dtype):
    with pytest.raises(ValueError, match=str(dtype)):
        DeepSeekV3.from_pretrained(tmp_path, dtype=dtype)


def test_a_save_that_fails_says_so_in_one_sentence(tmp_path, make_model, monkeypatch):
    def full(*args, **kwargs):
        raise checkpoint.safetensors.SafetensorError("I/O error: No space left on device (os error 28)")
    make_model().save_pretrained(tmp_path)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    monkeypatch.setattr(st, "save_file", full)
    with pytest.raises(OSError, match="can't be written .*No space left.* is intact"):
        make_model().save_pretrained(tmp_path)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before


@pytest.mark.parametrize("names", [["model-00001-of-000163", "model-00163-of-000163"], ["model-1-of-61"],
                                   ["model"], ["model-00001-of-00002", "model-00002-of-00002", "weights"]])
def test_saving_into_the_folder_of_a_release_leaves_none_of_its_weights(tmp_path, make_model, names):
    """Readers that take all safetensors files would mix them with the new ones. Other files stay."""
    mine = {"model_of_mine.safetensors", "adapter_model.safetensors", "model-1-of-2.safetensors.txt",
            "README.md"}
    old = {f"{name}.safetensors" for name in names}
    for file in mine | old:
        (tmp_path / file).write_text("x")
    (tmp_path / "model-7-of-8.safetensors").mkdir()
    weight_map = dict.fromkeys(old, "") | {name: name for name in old}
    weight_map |= {"a": "../model_of_mine.safetensors", "b": "README.md", "c": 7}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    new = tmp_path / "new"
    make_model().save_pretrained(new)
    for file in mine:
        (new / file).write_text("x")
    make_model().save_pretrained(tmp_path)
    left = {p.name for p in tmp_path.iterdir()} - {"new", "model-7-of-8.safetensors"}
    assert left == {p.name for p in new.iterdir()} == mine | {"config.json", "model.safetensors"}
    # a damaged index: files that are named like shards still go
    (tmp_path / "model.safetensors.index.json").write_text("{")
    (tmp_path / "saving.tmp").mkdir()       # of a killed save
    (tmp_path / "saving.tmp" / "7.safetensors").write_text("x")
    make_model().save_pretrained(tmp_path, shard_bytes=20_000)
    assert not [p for p in tmp_path.iterdir() if p.name in ("model.safetensors", "saving.tmp")]
    DeepSeekV3.from_pretrained(tmp_path)


def test_all_files_of_an_export_have_the_same_mode(tmp_path, make_model):
    for mask in 0o022, 0o077, 0o002:
        before = os.umask(mask)
        try:
            make_model().save_pretrained(tmp_path / str(mask), get_tokenizer("bytes"), shard_bytes=20_000)
        finally:
            os.umask(before)
        assert {p.stat().st_mode & 0o777 for p in (tmp_path / str(mask)).iterdir()} == {0o666 & ~mask}


class Doubled(MLP):
    def forward(self, x):
        return 2 * super().forward(x)


class Adapter(torch.nn.Module):
    def __init__(self, linear):
        super().__init__()
        self.linear = linear

    def forward(self, x):
        return self.linear(x)


def test_a_model_of_other_classes_is_not_exported(tmp_path, make_model, monkeypatch):
    plain = make_model()
    assert checkpoint.replaced_classes(plain) == []
    monkeypatch.setattr("model.MLP", Doubled)
    other = make_model()
    monkeypatch.undo()
    adapted, in_a_row = make_model(), make_model()
    adapted.model.layers[0].self_attn.kv_b_proj = Adapter(adapted.model.layers[0].self_attn.kv_b_proj)
    in_a_row.lm_head = torch.nn.Sequential(in_a_row.lm_head)
    for model, names in (other, ["Doubled"]), (adapted, ["Adapter"]), (in_a_row, []):
        assert checkpoint.replaced_classes(model) == names
        first = names[0] if names else "lm_head.0.weight"
        with pytest.raises(ValueError, match=f"{first}.*put the original classes back"):
            model.save_pretrained(tmp_path / "no")
        assert not (tmp_path / "no").exists()
    monkeypatch.setattr(MLA, "forward", lambda self, x, *args: x)
    assert checkpoint.replaced_classes(plain) == ["MLA.forward"]
    monkeypatch.undo()
    plain.model.layers[0].mlp.forward = types.MethodType(Adapter.forward, plain.model.layers[0].mlp)
    assert checkpoint.replaced_classes(plain) == ["MLP.forward"]


@pytest.fixture
def chat_model(tmp_path, make_model):
    """A released chat model: it begins texts with BOS, ends them in two ways, and has chat templates."""
    dir = tmp_path / "chat"
    make_model(vocab_size=320).save_pretrained(dir, get_tokenizer("bytes"))
    edit(dir / "tokenizer_config.json", add_bos_token=True, bos_token="<|endoftext|>",
         chat_template="{{ x }}")
    edit(dir / "config.json", bos_token_id=256, eos_token_id=[256, 5], pad_token_id=0, model_type="kimi_k2")
    (dir / "generation_config.json").write_bytes(b'{"eos_token_id": [256, 5],\r\n "temperature": 0.6}')
    (dir / "chat_template.jinja").write_bytes("{{ 'é' }}\r\n".encode())
    return dir


def contents(dir):
    return {p.relative_to(dir).as_posix(): p.read_bytes() for p in dir.rglob("*")
            if p.is_file() and p.name not in ("config.json", "model.safetensors")}


@pytest.mark.parametrize("with_encoding", [False, True])
def test_an_export_keeps_where_texts_begin_and_end(tmp_path, chat_model, with_encoding):
    enc = get_tokenizer(chat_model)
    ends = read_ends(chat_model, enc)
    assert ends.add_bos and set(ends.eos) == {256, 5}
    DeepSeekV3.from_pretrained(chat_model).save_pretrained(tmp_path / "b", enc if with_encoding else None)
    assert contents(tmp_path / "b") == contents(chat_model) and len(contents(chat_model)) == 4
    assert read_ends(tmp_path / "b", get_tokenizer(tmp_path / "b")) == ends
    config = json.loads((tmp_path / "b" / "config.json").read_text())
    ids = {key: config[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id", "model_type")}
    assert ids == {"bos_token_id": 256, "eos_token_id": [256, 5], "pad_token_id": 0,
                   "model_type": "deepseek_v3"}


def test_another_tokenizer_replaces_the_released_one(tmp_path, chat_model):
    enc = build("x", get_tokenizer("bytes")._pat_str, BYTES, {"<|endoftext|>": 300, "<s>": 301})
    model = DeepSeekV3.from_pretrained(chat_model)
    model.save_pretrained(tmp_path / "b", enc, ends=Ends(301, (300, 7), True))
    assert contents(tmp_path / "b").keys() == {"tokenizer.json", "tokenizer_config.json"}
    assert read_ends(tmp_path / "b", get_tokenizer(tmp_path / "b")) == Ends(301, (300, 7), True)
    # the same tokens, but texts that end in another: a fine-tuning may teach that
    model.save_pretrained(tmp_path / "c", get_tokenizer(chat_model), ends=Ends(256, (7,), False))
    assert read_ends(tmp_path / "c", get_tokenizer(tmp_path / "c")).eos == (7,)
    model.save_pretrained(chat_model, enc)      # the old ids and chat templates would be wrong now
    assert contents(chat_model).keys() == {"tokenizer.json", "tokenizer_config.json"}
    assert read_ends(chat_model, get_tokenizer(chat_model)).eos == (300,)


def test_odd_files_beside_the_weights_do_no_harm(tmp_path, chat_model):
    good = DeepSeekV3.from_pretrained(chat_model).source_files
    (chat_model / "generation_config.json").write_bytes(b"\xff\xfe")
    (chat_model / "tokenizer.json").unlink()
    (chat_model / "tokenizer.json").mkdir()
    (chat_model / "special_tokens_map.json").symlink_to(tmp_path / "nowhere")
    os.mkfifo(chat_model / "tiktoken.model")
    model = DeepSeekV3.from_pretrained(chat_model)
    odd = {"generation_config.json", "tokenizer.json"}
    assert model.source_files == {name: text for name, text in good.items() if name not in odd}
    model.source_files |= {"../outside": "x", "/outside": "x", "../tokenizer.json": "x", "x.safetensors": "x",
                           7: "x", "tiktoken.model": 7}
    model.save_pretrained(tmp_path / "b", get_tokenizer("bytes"))
    model.save_pretrained(tmp_path / "b")
    assert {p.name for p in tmp_path.iterdir()} == {"chat", "b"}
    assert not (tmp_path / "b" / "x.safetensors").exists()


def test_an_export_has_the_context_of_the_model(tmp_path, make_model):
    make_model(max_position_embeddings=77).save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["max_position_embeddings"] == 77


def index(**changes):
    def damage(dir):
        path = dir / "model.safetensors.index.json"
        content = json.loads(path.read_text())
        for name, file in changes.items():
            content["weight_map"][name.replace("__", ".")] = file
        path.write_text(json.dumps(content))
    return damage


@pytest.mark.parametrize("damage, words", [
    (index(lm_head__weight="../../etc/passwd"),
     "names '../../etc/passwd'"),
    (index(lm_head__weight="/etc/passwd.safetensors"), "only safetensors files of its own folder"),
    (index(lm_head__weight="pytorch_model.bin"), "only safetensors files"),
    (index(lm_head__weight=7), "'7'"),
    (lambda d: (d / "model-1.safetensors").unlink(),
     "model-1.safetensors is missing (complete the download)"),
    (lambda d: (d / "model.safetensors.index.json").write_text("[1]"), "model.safetensors.index.json: "),
    (lambda d: (d / "model.safetensors.index.json").write_text("{"), "model.safetensors.index.json: "),
    (lambda d: (d / "model.safetensors.index.json").write_bytes(b"\xff"), "model.safetensors.index.json: "),
    (lambda d: (d / "model.safetensors.index.json").write_text("[" * 99999), "safetensors.index.json: "),
    (lambda d: (d / "model.safetensors.index.json").write_text("{}"), "malformed: KeyError('weight_map')"),
    (lambda d: (d / "model.safetensors.index.json").unlink(),
     "model.safetensors is missing (complete the download)"),
    (lambda d: (d / "config.json").unlink(), "no folder with a config.json"),
    (lambda d: (d / "config.json").write_text("nan?"), "config.json: "),
    (lambda d: (d / "model-1.safetensors").write_bytes(b""),
     "model-1.safetensors is damaged or no safetensors file"),
    (lambda d: torch.save({"a": torch.ones(1)}, d / "model-1.safetensors"), "damaged or no safetensors file"),
    (lambda d: (d / "model-1.safetensors").write_bytes(struct.pack("<Q", 2**62) + b"{}"), "damaged or no"),
    (lambda d: (d / "model-1.safetensors").write_bytes((d / "model-0.safetensors").read_bytes()),
     "missing"),
])
def test_damaged_folders_are_refused(tmp_path, make_model, damage, words):
    model = make_model()
    write(tmp_path, released(model), config_json(model.config), shards=3)
    damage(tmp_path)
    with pytest.raises(ValueError) as error:
        DeepSeekV3.from_pretrained(tmp_path)
    assert words in str(error.value) and "\n" not in str(error.value), error.value


def test_fuzzed_headers_give_one_value_error(tmp_path, make_model):
    model = make_model(num_hidden_layers=1, first_k_dense_replace=1, num_nextn_predict_layers=0)
    write(tmp_path, released(model), config_json(model.config))
    file, rng = tmp_path / "model.safetensors", random.Random(0)
    good = file.read_bytes()
    header = struct.unpack("<Q", good[:8])[0]
    DeepSeekV3.from_pretrained(tmp_path)
    refused = 0
    for i in range(400):
        if i % 4 == 0:
            bad = good[:rng.randrange(len(good))]
        elif i % 4 == 1:    # digits: lengths, shapes, offsets
            at = rng.choice([j for j in range(8, 8 + header) if chr(good[j]).isdigit()])
            bad = good[:at] + bytes([rng.choice(b"0123456789")]) + good[at + 1:]
        else:
            at = rng.randrange(8 + header)
            bad = good[:at] + bytes([good[at] ^ 1 << rng.randrange(8)]) + good[at + 1:]
        file.write_bytes(bad)
        try:
            DeepSeekV3.from_pretrained(tmp_path)
        except ValueError as error:
            assert "\n" not in str(error) and len(str(error)) < 1000
            refused += 1
        else:       # padding or metadata, or the same digit again
            changed = [j for j in range(len(good)) if bad[j] != good[j]]
            near = good[max(changed[0] - 40, 0):changed[0] + 40] if changed else b""
            assert not changed or good[changed[0]] == ord(" ") or b"__metadata__" in near
    assert refused > 350


# ------------------------------------------------------------------------------------------------- tokenizers

def toy_ranks(n=600):
    """Byte pairs merged by their frequency in NASTY, as BPE training would."""
    texts = NASTY.split(" ") * 2 + [" " * 40, "12345"]
    ranks, words = dict(BYTES), [[bytes([b]) for b in text.encode()] for text in texts]
    while len(ranks) < n:
        counts = {}
        for w in words:
            for pair in zip(w, w[1:]):
                counts[pair] = counts.get(pair, 0) + 1
        pair = max(counts, key=lambda p: (counts[p], p), default=None)
        if pair is None:
            break
        ranks[pair[0] + pair[1]] = len(ranks)
        for w in words:
            i = 0
            while i < len(w) - 1:
                if (w[i], w[i + 1]) == pair:
                    w[i:i + 2] = [pair[0] + pair[1]]
                i += 1
    return ranks


CL100K = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|"
          r"\s*[\r\n]+|\s+(?!\S)|\s+")


def kimi(dir, **changes):
    ranks = toy_ranks()
    lines = [base64.b64encode(token) + b" %d\n" % rank for token, rank in ranks.items()]
    (dir / "tiktoken.model").write_bytes(b"".join(lines))
    n = len(ranks)
    tokens = {n: "[BOS]", n + 1: "[EOS]", n + 2: "<|im_end|>", n + 60: "[PAD]"}
    raw = {"tokenizer_class": "TikTokenTokenizer", "bos_token": "[BOS]", "eos_token": "[EOS]",
           "added_tokens_decoder": {str(i): {"content": t, "special": True} for i, t in tokens.items()}}
    (dir / "tokenizer_config.json").write_text(json.dumps(raw | changes))
    return tokens


@pytest.mark.parametrize("pattern", [CL100K, KIMI_PATTERN, "bytes"], ids=["cl100k", "kimi", "bytes"])
def test_exported_tokenizer_gives_the_same_ids(tmp_path, pattern):
    transformers = pytest.importorskip("transformers", reason="reads the exported tokenizer")
    enc = get_tokenizer("bytes")
    if pattern != "bytes":
        enc = build("toy", pattern, toy_ranks(), {DEEPSEEK_EOS: 700, "<|x|>": 705})
    for name, content in tokenizer_files(enc).items():
        (tmp_path / name).write_text(json.dumps(content), encoding="utf-8")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    again = get_tokenizer(tmp_path)
    rng = random.Random(1)
    for text in [NASTY, "", " ", "\r\n"] + ["".join(rng.choices(NASTY, k=60)) for _ in range(200)]:
        assert theirs.encode(text) == encode(enc, text) == encode(again, text), text
        assert theirs.decode(theirs.encode(text)) == text
    eos = next(iter(enc._special_tokens))
    ids = [97, enc._special_tokens[eos]]
    assert theirs.encode(f"a{eos}") == ids == again.encode(f"a{eos}", allowed_special="all")
    assert theirs.eos_token_id == enc._special_tokens[eos]


def test_what_an_index_left_over_and_odd_names_of_shards_load(tmp_path, make_model):
    a, b = make_model(), make_model()
    a.save_pretrained(tmp_path / "a", shard_bytes=20_000)
    b.save_pretrained(tmp_path / "b")
    shutil.copy(tmp_path / "a/model.safetensors.index.json", tmp_path / "b")
    odd = json.loads((tmp_path / "a/model.safetensors.index.json").read_text())
    for name in set(odd["weight_map"].values()):
        (tmp_path / "a" / name).rename(tmp_path / "a" / f"my model (1)+{name}")
    odd["weight_map"] = {key: f"my model (1)+{name}" for key, name in odd["weight_map"].items()}
    (tmp_path / "a/model.safetensors.index.json").write_text(json.dumps(odd))
    for saved, name in (a, "a"), (b, "b"):
        loaded = DeepSeekV3.from_pretrained(tmp_path / name).state_dict()
        assert all(torch.equal(t, loaded[key]) for key, t in saved.state_dict().items())


def test_kimi_tokenizer(tmp_path):
    tokens = kimi(tmp_path)
    enc = get_tokenizer(tmp_path)
    assert enc._special_tokens == {t: i for i, t in tokens.items()}
    assert enc.decode(encode(enc, NASTY)) == NASTY
    assert enc.encode("[BOS]", allowed_special="all") == [min(tokens)]


@pytest.mark.parametrize("damage, words", [
    (lambda d: kimi(d, tokenizer_class="QWenTokenizer"), "tokenizer_class 'QWenTokenizer'"),
    (lambda d: (d / "tokenizer.model").write_bytes(b"\n\x0e"),
     "a folder with a tokenizer.json or tiktoken.model"),
    (lambda d: (d / "tokenizer.json").write_text(json.dumps({"model": {"type": "Unigram"}})), "Unigram"),
    (lambda d: kimi(d, added_tokens_decoder={"5": {"content": "[BOS]"}}), "an id that two tokens share"),
    (lambda d: (kimi(d), (d / "tokenizer_config.json").write_text("{")), "tokenizer_config.json: "),
])
def test_unsupported_tokenizer_is_refused_by_name(tmp_path, damage, words):
    damage(tmp_path)
    with pytest.raises((ValueError, FileNotFoundError), match=words):
        get_tokenizer(tmp_path)


# ---------------------------------------------------------------------------------------- sample.py, train.py

@pytest.fixture
def exported(tmp_path, make_model):
    model = make_model(vocab_size=320)
    model.save_pretrained(tmp_path / "hf", get_tokenizer("bytes"))
    return model, tmp_path / "hf"


def test_sample_from_a_released_checkpoint(exported, capsys):
    model, dir = exported
    want = model.generate(torch.tensor([list(b"ab")]), 12, temperature=0, stop=[256])[0, 2:].tolist()
    loaded, enc, ends, window = sample.load(dir, "cpu")
    equal(loaded, model)
    config = json.loads((dir / "config.json").read_text())      # what vLLM and others stop at
    assert config["bos_token_id"] == config["eos_token_id"] == 256
    assert ends == (256, (256,), False) and window is None and encode(enc, "ab") == [97, 98]
    sample.main(["--ckpt", str(dir), "--prompt", "ab", "--max_new_tokens", "12", "--temperature", "0"])
    text = capsys.readouterr().out.split("\n", 1)[1]
    shown = bytes(t for t in want if t < 256).decode("utf-8", "replace")
    assert text == "ab" + shown + "\n"


def test_bos_and_eos_are_what_the_folder_says(exported, capsys):
    model, dir = exported
    edit(dir / "tokenizer_config.json", add_bos_token=True, bos_token={"content": "<|endoftext|>"})
    first = model.generate(torch.tensor([[256, *b"ab"]]), 3, temperature=0, stop=[])[0, 3:].tolist()
    edit(dir / "config.json", eos_token_id=[first[1], 256])
    (dir / "generation_config.json").write_text("{}")
    assert sample.load(dir, "cpu").ends == (256, (256, first[1]), True)
    sample.main(["--ckpt", str(dir), "--prompt", "ab", "--max_new_tokens", "12", "--temperature", "0"])
    out = capsys.readouterr()
    shown = bytes(t for t in first[:1] if t < 256).decode(errors="replace")
    assert out.err.startswith("2 tokens") and out.out.endswith(shown + "\n")
    (dir / "generation_config.json").write_text(json.dumps({"eos_token_id": 257 + 50}))
    with pytest.raises(SystemExit, match="bos or eos token 307"):
        sample.main(["--ckpt", str(dir)])


@pytest.mark.parametrize("file, changes", [
    ("generation_config.json", {"eos_token_id": {}}),
    ("generation_config.json", {"eos_token_id": [256, [1]]}),
    ("generation_config.json", {"bos_token_id": [256]}),
    ("config.json", {"eos_token_id": "x" * 10**5}),
])
def test_odd_ids_end_in_one_sentence(exported, file, changes):
    _, dir = exported
    (dir / "tokenizer_config.json").unlink()
    if not (dir / file).exists():
        (dir / file).write_text("{}")
    edit(dir / file, **changes)
    with pytest.raises(SystemExit, match="bos or eos token .* is not one of") as error:
        sample.main(["--ckpt", str(dir)])
    assert len(str(error.value)) < 500


@pytest.mark.parametrize("bos", [{}, ["x"], {"content": ["a"]}, {"content": {}}, 3, None])
def test_odd_names_of_bos_are_ignored_or_refused(exported, bos):
    _, dir = exported
    edit(dir / "tokenizer_config.json", add_bos_token=True, bos_token=bos)
    edit(dir / "config.json", bos_token_id=None)
    if isinstance(bos, dict | list):
        with pytest.raises(ValueError, match="malformed"):
            sample.load(dir, "cpu")
    else:
        ends = sample.load(dir, "cpu").ends
        assert not ends.add_bos and ends.begin == 256       # the end of a document begins the next


def test_bos_of_a_template(exported):
    """As Llama's tokenizers, and what transformers 5 makes of add_bos_token when it saves."""
    _, dir = exported
    settings = json.loads((dir / "tokenizer_config.json").read_text())
    del settings["add_bos_token"]
    (dir / "tokenizer_config.json").write_text(json.dumps(settings))
    template = {"type": "TemplateProcessing", "single": [
        {"SpecialToken": {"id": "<|endoftext|>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]}
    nested = {"type": "Sequence", "processors": [{"type": "ByteLevel"}, template]}
    without = {**template, "single": template["single"][1:]}
    for post, bos in (template, 256), (nested, 256), (without, None), ({"type": "ByteLevel"}, None):
        edit(dir / "tokenizer.json", post_processor=post)
        assert sample.load(dir, "cpu").ends == (256, (256,), bos is not None)
    edit(dir / "tokenizer.json", post_processor=template)
    for adds, prepend in ((None, True), (False, False)):        # None: what the template says
        edit(dir / "tokenizer_config.json", add_bos_token=adds)
        assert sample.load(dir, "cpu").ends.add_bos == prepend


@pytest.mark.parametrize("eos", ["<|return|>", {"content": "<|return|>"}])
def test_eos_by_its_name(tmp_path, make_model, eos):
    """The name is unknown, and only in tokenizer_config.json; without bos, it also begins documents."""
    special = {"<|endoftext|>": 256, "<|return|>": 257}
    enc = build("x", get_tokenizer("bytes")._pat_str, BYTES, special)
    make_model(vocab_size=258).save_pretrained(tmp_path, enc)
    config = json.loads((tmp_path / "config.json").read_text())
    del config["eos_token_id"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    edit(tmp_path / "tokenizer_config.json", eos_token=eos)
    assert sample.load(tmp_path, "cpu").ends == (256, (257,), False)
    edit(tmp_path / "config.json", eos_token_id=[5, 257])       # ids come before names
    assert sample.load(tmp_path, "cpu").ends == (256, (257, 5), False)


def test_ids_without_a_token_print_nothing(tmp_path, make_model, capsys):
    """Kimi's special tokens have gaps between their ids, and a vocabulary may be padded."""
    make_model(vocab_size=900).save_pretrained(tmp_path)
    tokens = kimi(tmp_path)
    enc = get_tokenizer(tmp_path)
    assert max(tokens) - min(tokens) > 3 and token_bytes(enc, max(tokens) - 1) == token_bytes(enc, 899) == b""
    assert token_bytes(enc, min(tokens)) == b"[BOS]" and token_bytes(enc, 97) == b"a"
    sample.main(["--ckpt", str(tmp_path), "--prompt", "a", "--temperature", "100"])
    assert capsys.readouterr().out.split("\n", 1)[1].startswith("a")


def test_sampling_stops_at_the_end_of_the_context(exported, capsys, monkeypatch):
    """The context of the folder is 128 tokens."""
    _, dir = exported
    monkeypatch.setattr(sample, "read_ends", lambda path, encoding: Ends(None, (), False))
    sample.main(["--ckpt", str(dir), "--prompt", "ab"])
    assert capsys.readouterr().err.startswith("126 tokens")
    for arguments, words in ((["--prompt", "ab", "--max_new_tokens", "127"], "2 tokens .* room for 126"),
                             (["--prompt", "a" * 128], "prompt's 128 tokens .* for 0 in .* context of 128;"),
                             (["--prompt", "a" * 129, "--max_new_tokens", "0"], "129 .* context of 128")):
        with pytest.raises(SystemExit, match=words):
            sample.main(["--ckpt", str(dir), *arguments])
        assert not capsys.readouterr().out      # the prompt is not printed first


def test_a_context_is_extended_in_two_phases(make_config):
    """Each factor is relative to the original length; a larger one stays, as the report's 40 does."""
    def extend(config, length):
        return dataclasses.replace(config, **train.extend_context(config, length))

    first = extend(make_config(), 512)
    second = extend(first, 2048)
    assert [(c.max_position_embeddings, c.rope_scaling["factor"],
             c.rope_scaling["original_max_position_embeddings"])
            for c in (first, second)] == [(512, 4, 128), (2048, 16, 128)]
    assert MLA(second).softmax_scale == pytest.approx(20 ** -0.5 * (0.1 * math.log(16) + 1) ** 2)
    chosen = dataclasses.replace(first, rope_scaling={**first.rope_scaling, "factor": 40})
    assert extend(chosen, 2048).rope_scaling == {"type": "yarn", "factor": 40,
                                                 "original_max_position_embeddings": 128,
                                                 "beta_fast": 32, "beta_slow": 1, "mscale": 1.0,
                                                 "mscale_all_dim": 1.0}
    assert extend(chosen, 128 * 80).rope_scaling["factor"] == 80


def test_fine_tuning(exported, tmp_path, capsys, monkeypatch):
    model, dir = exported
    text = tmp_path / "text.txt"
    text.write_text("the cat sat on the mat. " * 400)
    # the tokenizer of the release, under another name
    prepare(tmp_path / "data", input=text, tokenizer="bytes")
    lines = [base64.b64encode(token) + b" %d\n" % i for i, token in enumerate([*BYTES, b"th"])]
    (tmp_path / "th.tiktoken").write_bytes(b"".join(lines))
    prepare(tmp_path / "other", input=text, tokenizer=tmp_path / "th.tiktoken")
    args = ["--init_from", str(dir), "--data_dir", str(tmp_path / "data"), "--out_dir", str(tmp_path / "out"),
            "--batch_size", "2", "--max_iters", "2", "--learning_rate", "1e-4", "--device", "cpu",
            "--block_size"]
    train.main([*args, "256", "--mtp_loss_weight", "0.1"])
    assert "context extended from 128 to 256 tokens" in capsys.readouterr().out
    log = (tmp_path / "out" / "log.jsonl").read_text().splitlines()
    losses = [json.loads(line)["main_loss"] for line in log]
    ckpt = load_run(tmp_path / "out" / "ckpt.pt")
    assert ckpt["config"]["rope_scaling"]["factor"] == 2 and ckpt["config"]["mtp_loss_weight"] == 0.1
    before, after = model.state_dict(), ckpt["model"]
    assert all((before[n] - after[n]).abs().max() < 2e-3 for n in before) and losses
    assert any((before[n] != after[n]).any() for n in before)
    tuned, enc = sample.load(tmp_path / "out", "cpu")[:2]
    tuned.save_pretrained(tmp_path / "again", enc)
    equal(DeepSeekV3.from_pretrained(tmp_path / "again"), tuned)
    train.main(["--resume", "--out_dir", str(tmp_path / "out"), "--max_iters", "3"])
    for more, words in ((["64", "--hidden_size", "32"], "--hidden_size can't be given with --init_from"),
                        (["64", "--preset", "tiny"], "--preset can't be given with --init_from"),
                        (["64", "--data_dir", str(tmp_path / "other")], "not prepared with the tokenizer of"),
                        (["64", "--init_from", str(tmp_path)], "no folder with a config.json")):
        with pytest.raises(SystemExit, match=words):
            train.main([*args, *more, "--out_dir", str(tmp_path / "new")])
