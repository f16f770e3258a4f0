"""DeepSeekV3Config, its presets, and what a model of that config counts."""

import inspect
import json
import math
import re

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import model
from checkpoint import read_config
from model import PRESETS, DeepSeekV3, DeepSeekV3Config


RELEASED = {    # config.json of the released DeepSeek-V3, keys that don't concern the model included
    "architectures": ["DeepseekV3ForCausalLM"], "attention_bias": False, "attention_dropout": 0.0,
    "bos_token_id": 0, "eos_token_id": 1, "ep_size": 1, "first_k_dense_replace": 3, "hidden_act": "silu",
    "hidden_size": 7168,
    "initializer_range": 0.02, "intermediate_size": 18432, "kv_lora_rank": 512,
    "max_position_embeddings": 163840,
    "model_type": "deepseek_v3", "moe_intermediate_size": 2048, "moe_layer_freq": 1, "n_group": 8,
    "n_routed_experts": 256, "n_shared_experts": 1, "norm_topk_prob": True, "num_attention_heads": 128,
    "num_experts_per_tok": 8, "num_hidden_layers": 61, "num_key_value_heads": 128,
    "num_nextn_predict_layers": 1,
    "q_lora_rank": 1536, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64,
    "quantization_config": {"activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8",
                            "weight_block_size": [128, 128]},
    "rms_norm_eps": 1e-06, "rope_scaling": {"beta_fast": 32, "beta_slow": 1, "factor": 40, "mscale": 1.0,
                                            "mscale_all_dim": 1.0, "original_max_position_embeddings": 4096,
                                            "type": "yarn"},
    "rope_theta": 10000, "routed_scaling_factor": 2.5, "scoring_func": "sigmoid",
    "tie_word_embeddings": False,
    "topk_group": 4, "topk_method": "noaux_tc", "torch_dtype": "bfloat16", "use_cache": True,
    "v_head_dim": 128,
    "vocab_size": 129280}


def write(tmp_path, raw):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(raw))
    return tmp_path


def test_released_config_is_the_671b_preset(tmp_path):
    assert read_config(write(tmp_path, RELEASED)) == DeepSeekV3Config.preset("671b")


def test_transformers_5_form_reads_the_same(tmp_path):
    raw = {k: v for k, v in RELEASED.items() if k not in ("rope_scaling", "rope_theta")}
    yarn = {k: v for k, v in RELEASED["rope_scaling"].items() if k != "type"}
    raw["rope_parameters"] = {**yarn, "rope_type": "yarn", "rope_theta": 50000.0}
    config = read_config(write(tmp_path, raw))
    assert config.rope_theta == 50000.0 and config.rope_scaling == {**yarn, "rope_type": "yarn"}
    raw["rope_parameters"] = {"rope_type": "default", "rope_theta": 50000.0}
    config = read_config(write(tmp_path, raw))
    assert config.rope_theta == 50000.0 and config.rope_scaling is None


@pytest.mark.parametrize("changes, words", [
    ({"scoring_func": "softmax"}, "scoring_func='softmax'"),
    ({"topk_method": "greedy"}, "topk_method='greedy'"),
    ({"hidden_act": "gelu"}, "hidden_act='gelu'"),
    ({"attention_bias": True}, "attention_bias=True"),
    ({"moe_layer_freq": 2}, "moe_layer_freq=2"),
    ({"rope_interleave": False}, "rope_interleave=False"),
    ({"rope_interleave": None}, "rope_interleave=None"),        # false for transformers
    ({"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5"),
    ({"rope_scaling": None, "rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor=0.5"),
    ({"rope_scaling": None, "rope_parameters": {"type": "linear", "factor": 2}}, "'linear'"),
    ({"rope_scaling": None, "rope_parameters": {"full_attention": {"rope_type": "yarn"}}},
     "'full_attention'"),
    ({"rope_scaling": None, "rope_parameters": False}, "rope_parameters must be of type dict"),
    ({"rope_scaling": {"type": "yarn", "factor": None}}, "'factor'"),
    ({"rope_scaling": {"type": "yarn", "factor": 2, "beta_fast": 1, "beta_slow": 32}},
     "0.001 < beta_slow <= beta_fast, got 10000, 32 and 1"),
    ({"rope_scaling": {"type": "yarn", "factor": 2, "truncate": False}}, "truncate=False"),
    ({"rope_scaling": {"type": "yarn", "factor": 2, "beta_slow": 1e-308}}, "0.001 < beta_slow"),
    ({"rope_scaling": {"type": "yarn", "factor": 2, "mscale_all_dim": 1e308}}, "'mscale_all_dim'"),
    ({"rope_scaling": {"type": "yarn", "factor": 10**400}}, "'factor'"),
    ({"rope_theta": 1}, "rope_theta > 1 and 0.001 < beta_slow <= beta_fast, got 1,"),
    ({"rms_norm_eps": 10**400}, "rms_norm_eps"),
    ({"hidden_act": "x" * 10**5}, "hidden_act='xxx"),
    ({"vocab_size": "x" * 10**5}, "vocab_size"),
    ({"rope_scaling": {"type": "x" * 10**5}}, "'xxx"),
    ({"model_type": "deepseek_v2"}, "model_type='deepseek_v2' is not supported: its router uses a softmax"),
    ({"model_type": "deepseek_v32"}, "its attention is sparse"),
    ({"model_type": "deepseek_v4"}, "its attention is not MLA"),
    ({"model_type": "llama"}, "only models that compute the same as DeepSeek-V3 are"),
    ({"model_type": ["deepseek_v3"]}, "model_type=\"['deepseek_v3']\""),
    ({"index_n_heads": 64, "index_topk": 2048}, "index_topk=2048"),
    ({"mlp_layer_types": ["sparse", "dense"] + ["sparse"] * 59}, "mlp_layer_types"),
    ({"mlp_layer_types": ["dense"] * 3 + ["linear"] * 58}, "mlp_layer_types"),
    ({"mlp_layer_types": "dense"}, "mlp_layer_types='dense'"),
    ({"quantization_config": ["fp8"]}, "quantization_config must be of type dict, got ['fp8']"),
    ({"rope_scaling": {"type": "linear", "factor": 2}}, "'linear'"),
    ({"rope_scaling": {"type": "yarn"}}, "'factor'"),
    ({"hidden_size": -1}, "hidden_size"),
    ({"hidden_size": 1.5}, "hidden_size"),
    ({"hidden_size": "big"}, "hidden_size"),
    ({"hidden_size": None}, "hidden_size"),
    ({"vocab_size": True}, "vocab_size"),
    ({"rms_norm_eps": float("nan")}, "rms_norm_eps"),
    ({"rope_theta": float("inf")}, "rope_theta"),
    ({"vocab_size": 10**12}, "vocab_size"),
])
def test_what_cannot_be_honoured_is_refused(tmp_path, changes, words):
    with pytest.raises(ValueError, match="config.json") as e:
        read_config(write(tmp_path, {**RELEASED, **changes}))
    assert words in str(e.value) and len(str(e.value)) < 500


V3_YARN = {k: v for k, v in RELEASED["rope_scaling"].items() if k != "type"}


@pytest.mark.parametrize("changes, scaling, theta", [
    ({"rope_parameters": {**V3_YARN, "type": "yarn"}, "rope_scaling": None}, {**V3_YARN, "type": "yarn"},
     10000),
    # both forms
    ({"rope_parameters": {**V3_YARN, "rope_type": "yarn", "factor": 4}}, RELEASED["rope_scaling"], 10000),
    ({"rope_scaling": {**V3_YARN, "type": "yarn", "rope_theta": 333}}, {**V3_YARN, "type": "yarn"}, 333),
    ({"rope_scaling": {"type": "yarn", "factor": 4}, "original_max_position_embeddings": 16},
     {"type": "yarn", "factor": 4, "original_max_position_embeddings": 16}, 10000),
    ({"rope_scaling": {"rope_type": "default"}}, None, 10000),
    ({"rope_scaling": {}}, None, 10000),
    ({"rope_scaling": None, "num_key_value_heads": 8}, None, 10000),        # MLA has no such heads
])
def test_rope_is_read_as_transformers_reads_it(tmp_path, changes, scaling, theta):
    config = read_config(write(tmp_path, {**RELEASED, **changes}))
    assert config.rope_scaling == scaling and config.rope_theta == theta
    try:
        from transformers import DeepseekV3Config
    except ImportError:
        return
    config = DeepseekV3Config.from_pretrained(tmp_path)
    config.standardize_rope_params()        # as the model does
    theirs = config.rope_parameters
    assert theirs["rope_theta"] == theta and theirs["rope_type"] == ("yarn" if scaling else "default")
    assert not scaling or {k: theirs[k] for k in scaling} == scaling


MOONLIGHT = {"model_type": "deepseek_v3", "q_lora_rank": None, "n_group": 1, "topk_group": 1,
             "n_shared_experts": 2,
             "aux_loss_alpha": 0.001, "seq_aux": True, "ep_size": 1, "num_nextn_predict_layers": 0,
             "rope_scaling": None,
             "quantization_config": None}
GLM_FLASH = {"model_type": "glm4_moe_lite", "n_group": 1, "topk_group": 1, "partial_rotary_factor": 1.0,
             "rope_scaling": None, "rope_theta": 1000000, "rms_norm_eps": 1e-05, "first_k_dense_replace": 1,
             "quantization_config": None}


@pytest.mark.parametrize("changes, fields", [
    (MOONLIGHT, dict(q_lora_rank=None, n_shared_experts=2, num_nextn_predict_layers=0)),
    ({"model_type": "kimi_k2", "n_group": 1, "topk_group": 1, "n_routed_experts": 384},
     dict(n_routed_experts=384)),
    ({"quantization_config": RELEASED["quantization_config"] | {"scale_fmt": "ue8m0"}}, {}),       # V3.1
    (GLM_FLASH, dict(first_k_dense_replace=1, rope_theta=1e6, num_nextn_predict_layers=1)),
    (GLM_FLASH | {"mlp_layer_types": ["dense"] * 2 + ["sparse"] * 60, "first_k_dense_replace": 9},
     dict(first_k_dense_replace=2)),        # with the kind of the MTP layer
    ({"mlp_layer_types": None, "num_nextn_predict_layers": None},
     dict(first_k_dense_replace=3, num_nextn_predict_layers=0)),
    ({"n_shared_experts": None}, dict(n_shared_experts=0)),
    ({"index_topk": None, "sliding_window": None}, {}),
])
def test_models_of_the_family_are_read(tmp_path, changes, fields):
    config = read_config(write(tmp_path, {**RELEASED, **changes}))
    assert {name: getattr(config, name) for name in fields} == fields


def test_absent_keys_have_the_defaults_of_their_model_type(tmp_path):
    """Those of transformers' classes, where it is installed."""
    absent = ("n_group", "topk_group", "num_experts_per_tok", "routed_scaling_factor",
              "first_k_dense_replace", "rms_norm_eps", "max_position_embeddings", "norm_topk_prob",
              "rope_theta", "rope_scaling")
    raw = {k: v for k, v in RELEASED.items() if k not in absent}
    for kind, name in ("deepseek_v3", "DeepseekV3Config"), ("glm4_moe_lite", "Glm4MoeLiteConfig"):
        config = read_config(write(tmp_path, raw | {"model_type": kind}))
        assert config.first_k_dense_replace == {"deepseek_v3": 3, "glm4_moe_lite": 1}[kind]
        transformers = pytest.importorskip("transformers")
        theirs = getattr(transformers, name)()
        for key in absent[:4] + absent[5:8]:
            assert getattr(config, key) == getattr(theirs, key), key
        assert config.rope_theta == theirs.rope_parameters["rope_theta"] and config.rope_scaling is None


@pytest.mark.parametrize("text", ["", "[1]", "{", "null", "\x00"])
def test_a_file_that_is_no_config_is_refused(tmp_path, text):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ValueError, match="config.json"):
        read_config(tmp_path)


@pytest.mark.parametrize("changes, words", [
    (dict(n_routed_experts=10, n_group=4), "not divisible"),
    (dict(num_experts_per_tok=7, topk_group=2), "more than the 6 experts"),
    (dict(topk_group=5), "topk_group=5"),
    (dict(qk_rope_head_dim=7), "even"),
    (dict(num_attention_heads=0), "num_attention_heads must be a number from 1 to 2\\^31, got 0"),
    (dict(hidden_size="48"), "hidden_size must be of type int, got '48'"),
    (dict(hidden_size=None), "hidden_size must be of type int, got None"),
    (dict(rms_norm_eps="1e-6"), "rms_norm_eps must be of type float"),
    (dict(rope_theta=1.0), "rope_theta > 1 and .* got 1.0, 1 and 32"),
    (dict(rope_scaling="yarn"), "rope_scaling must be of type dict"),
    (dict(rope_scaling={}), "must be of type 'yarn', got None"),
    (dict(rope_scaling={"type": "yarn", "factor": "4"}), "'factor' of rope_scaling must be a number .* got '4'"),
    (dict(rope_scaling={"type": "yarn", "factor": 4, "beta_fast": "x"}), "'beta_fast' of rope_scaling"),
    (dict(rope_scaling={"type": "yarn", "factor": 4, "beta_fast": 1, "beta_slow": 32}), "0.001 < beta_slow"),
    (dict(rope_scaling={"type": "yarn", "factor": 4, "truncate": False}), "'truncate' of rope_scaling"),
    (dict(rope_scaling={"type": "yarn", "factor": 4, "rope_theta": 50}), "a field of its own"),
])
def test_an_impossible_model_is_refused(make_config, changes, words):
    with pytest.raises(ValueError, match=words):
        make_config(**changes)


def test_tokens_must_be_a_batch_of_ids(make_model):
    for idx in torch.ones(5, dtype=torch.int64), torch.ones(1, 5, dtype=torch.int32), [[1, 2]]:
        with pytest.raises(ValueError, match=r"must be an int64 tensor \(B, T\)"):
            make_model()(idx)
    for shape in (2, 0), (0, 5):
        with pytest.raises(ValueError, match="is empty"):
            make_model()(torch.ones(shape, dtype=torch.int64))


def test_unknown_preset_names_the_known():
    with pytest.raises(ValueError, match="'huge'.*tiny, mini, small, large, 16b, 671b"):
        DeepSeekV3Config.preset("huge")


def test_671b_counts_exactly():
    with torch.device("meta"):
        model = DeepSeekV3(DeepSeekV3Config.preset("671b"))
    counts = {"total": model.num_params(), "active": model.num_params(active=True),
              "MTP module": model.num_params(mtp=True) - model.num_params()}
    print(counts)
    assert counts == {"total": 671_026_404_352, "active": 37_552_282_624, "MTP module": 11_610_067_968}
    biases = [b for name, b in model.named_buffers() if not name.startswith("model.layers.61.")]
    assert sum(b.numel() for b in biases) == 14_848


def test_counts_agree_with_a_real_model(make_model):
    model = make_model(num_nextn_predict_layers=2)
    everything = sum(p.numel() for p in model.parameters())
    mtp = sum(p.numel() for name, p in model.named_parameters()
              if ".layers.3." in name or ".layers.4." in name)
    assert model.num_params(mtp=True) == everything and model.num_params() == everything - mtp
    one_expert = 3 * 48 * 32
    assert model.num_params() - model.num_params(active=True) == 2 * (12 - 3) * one_expert
    assert make_model(tie_word_embeddings=True,
                      num_nextn_predict_layers=2).num_params() == everything - mtp - 61 * 48


@pytest.mark.parametrize("tied", [False, True])
def test_flops_count_the_matrix_products(make_model, tied):
    """A third of them (the forward pass) are what torch counts while it runs."""
    from torch.utils.flop_counter import FlopCounterMode
    model, T = make_model(num_nextn_predict_layers=0, tie_word_embeddings=tied), 32
    with FlopCounterMode(display=False) as counter:
        model(torch.randint(0, 61, (1, T)))
    seen = counter.get_total_flops()
    # torch counts the masked half of attention as well,
    seen -= 2 * 3 * 3 * (20 + 28) * (T * T - T * (T + 1) // 2)
    # and the weighted sum over a token's experts,
    seen -= 2 * 2 * T * 3 * 48
    # but not grouped_mm: 2 layers, 3 experts a token
    seen += 2 * 2 * T * 3 * (3 * 48 * 32)
    assert model.flops_per_token(T) * T / 3 == seen
    with_mtp = make_model(num_nextn_predict_layers=1, tie_word_embeddings=tied)
    extra = with_mtp.num_params(active=True, mtp=True) - with_mtp.num_params(active=True) - (20 + 16 + 5 * 48)
    extra = 6 * (extra + 61 * 48) + 6 * 3 * (20 + 28) * (T + 1) / 2
    assert with_mtp.flops_per_token(T) == model.flops_per_token(T) + extra


@pytest.mark.parametrize("name", PRESETS)
def test_presets_build_on_meta(name):
    with torch.device("meta"):
        model = DeepSeekV3(DeepSeekV3Config.preset(name))
    assert all(p.is_meta for p in model.parameters())


def test_presets_have_the_sizes_they_promise():
    def active(name):
        with torch.device("meta"):
            return DeepSeekV3(DeepSeekV3Config.preset(name)).num_params(active=True)
    assert 0.7e6 < active("tiny") < 1.3e6 and 117e6 < active("small") < 131e6


def copied_along(name):
    """What a class needs, and what that needs in turn, as its docstring says in the line "Copy along"."""
    thing = getattr(model, name)
    needs = []
    if inspect.isclass(thing):
        line = re.search(r"^ *Copy along: (.*)\.$", thing.__doc__, re.M)[1]
        needs = [] if line == "nothing" else line.split(", ")
    return {inner for need in needs for inner in copied_along(need)} | {name}


BUILD = {"RMSNorm": "RMSNorm(48)(x)", "MLP": "MLP(48, 80)(x)", "Gate": "x * Gate(config)(x)[0].sum()",
         "Experts": "x * Experts(config)(x[0], torch.ones(5, 1), torch.ones(5, 1).long())[0]",
         "MLA": "MLA(config)(x, *angles)", "MoE": "MoE(config)(x)[0]",
         "Block": "Block(config)(x, *angles)[0]",
         "MTP": "MTP(config)(x, x, *angles)[0]"}


@pytest.mark.parametrize("name", BUILD)
def test_classes_can_be_copied_into_a_notebook(name, make_config):
    """They need torch, the config and what the docstring names, and they use all of it."""
    config = make_config(rope_scaling=dict(type="yarn", factor=2, mscale_all_dim=1.0))
    notebook = {"torch": torch, "nn": nn, "F": F, "math": math, "config": config, "x": torch.randn(2, 5, 48),
                "angles": model.rope_cos_sin(config, 0, 5)}
    names = copied_along(name)
    sources = {each: inspect.getsource(getattr(model, each)) for each in names}
    for each in sorted(names, key=lambda each: inspect.getsourcelines(getattr(model, each))[1]):
        exec(sources[each], notebook)
    assert eval(BUILD[name], notebook).shape == (2, 5, 48)
    code = {each: re.sub('""".*?"""', "", source, flags=re.S) for each, source in sources.items()}
    for each in names - {name}:     # in the code, not only in the docstrings
        assert any(re.search(rf"\b{each}\b", code[other]) for other in names - {each}), each
