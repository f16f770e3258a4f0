"""
The files of a run of train.py, and released checkpoints: DeepSeek-V3 and its kin on the Hugging Face Hub.

A run's OUT/ckpt.pt is one dict, written by torch.save: the same for one process, DDP and FSDP. Its checksums
are verified before it replaces the file before it, and again whenever it is read.

A released folder holds config.json and model.safetensors, or shards of it with model.safetensors.index.json.
It differs from model.py in three things: each expert is a tensor by itself; the MTP modules, layers
num_hidden_layers and up, repeat embedding and head; and `weight` may be FP8 with a `weight_scale_inv` for
each 128x128 block, which multiplies. Use it as DeepSeekV3.from_pretrained and save_pretrained.
"""

import argparse
import contextlib
import dataclasses
import difflib
import inspect
import json
import math
import os
import re
import shutil
import sys
import tempfile
import zipfile
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist

from model import DeepSeekV3, DeepSeekV3Config

try:
    import fcntl
except ImportError:     # not a Unix: there, nothing keeps a second process out of a run's folder
    fcntl = None

# ----------------------------------------------------------------------------------------------------------
# What the scripts share

class Parser(argparse.ArgumentParser):
    """The flags of a script. A mistake gets one line, with the closest flag, in place of the whole usage."""

    def __init__(self, description):
        super().__init__(description=description, formatter_class=argparse.RawDescriptionHelpFormatter,
                         allow_abbrev=False)

    def error(self, message):
        flags, words = list(self._option_string_actions), message.split()
        given = [word.split("=")[0].rstrip(":,") for word in words if word.startswith("-")]
        close = [flag for word in given if word not in flags
                 for flag in difflib.get_close_matches(word, flags, 1)]
        hint = f"did you mean {', '.join(close)}?" if close else "--help lists the flags"
        self.exit(2, f"{self.prog}: {' '.join(words)[:300]}; {hint}\n")


def pick_device(name="auto"):
    """--device -> torch.device; under torchrun, each of a machine's processes has a GPU of its own."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    local_rank = os.environ.get("LOCAL_RANK")
    try:
        device = torch.device(f"cuda:{local_rank}" if name == "cuda" and local_rank else name)
        torch.zeros(1, device=device)
        if device.type == "cuda" and device.index is not None:
            torch.cuda.set_device(device)
    except (RuntimeError, AssertionError) as e:
        reason = str(e).splitlines()[0].split(". ")[0]
        raise ValueError(f"--device {name} can't be used here ({reason}); choose cuda, mps or cpu") from None
    if device.type not in ("cuda", "mps", "cpu"):
        raise ValueError(f"--device {name} can't be used here; choose cuda, mps or cpu")
    return device


def has_bf16(device):
    """Whether a device computes in bfloat16 itself: not all do, and emulation is slow."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    has_units = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return device.type == "cpu" and has_units


# ----------------------------------------------------------------------------------------------------------
# Runs

FORMAT = 2      # of ckpt.pt


@contextlib.contextmanager
def sole_process(out_dir):
    """Holds OUT/lock, so that two processes never mix their files in one folder. The kernel releases the lock
    however the process ends: a leftover file means nothing. ValueError if another process holds it."""
    new = not out_dir.exists()
    out_dir.mkdir(parents=True, exist_ok=True)
    with open(out_dir / "lock", "w") as f:
        try:
            if fcntl:
                fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"another process is training in {out_dir}; let it end, or choose another "
                             "--out_dir") from None
        try:
            yield
        finally:
            if new and os.listdir(out_dir) == ["lock"]:     # nothing came of it
                (out_dir / "lock").unlink()
                out_dir.rmdir()


@contextlib.contextmanager
def writing(path):
    """A full disk, a quota or a lost network drive ends the run in one sentence."""
    try:
        yield
    except OSError as e:
        raise OSError(f"{path} can't be written ({e.strerror or e}); what was there is intact: make room, "
                      "then continue with --resume, or start again if there is no checkpoint yet") from None


def write_atomically(path, write, check=lambda path: None, keep_as=None):
    """write(file) into a temporary file beside path, check(its path), then rename: a reader finds the old
    file or the new one, never half of it. The old file stays under the name keep_as."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        with writing(path):
            with open(temporary, "wb") as f:
                write(f)
                f.flush()
                os.fsync(f.fileno())
            check(temporary)
            if keep_as and path.exists():
                os.replace(path, keep_as)
            os.replace(temporary, path)     # after a kill just before this, there is only keep_as
    finally:
        temporary.unlink(missing_ok=True)


def save_run(out_dir, run):
    """Write a run's dict to OUT/ckpt.pt and read it back; the file before it stays as OUT/ckpt.prev.pt."""
    write_atomically(out_dir / "ckpt.pt", partial(torch_save, run), check_zip, out_dir / "ckpt.prev.pt")


def torch_save(run, file):
    try:
        torch.save(run, file)
    except RuntimeError as e:       # torch's zip writer turns an OSError of file.write into this
        raise e.__context__ if isinstance(e.__context__, OSError) else e


def check_zip(path):
    """OSError if a bit of a tensor has flipped: torch.save writes a zip file, whose entries have CRC-32
    checksums, but torch.load does not look at them."""
    try:
        with zipfile.ZipFile(path) as f:
            damaged = f.testzip()
    except (zipfile.BadZipFile, EOFError, NotImplementedError, RuntimeError, ValueError) as e:
        raise OSError(f"no valid zip file: {e}") from None
    if damaged:
        raise OSError(f"{damaged} fails its checksum")


def keep_best(path):
    """A copy of a checkpoint as best.pt."""
    with open(path, "rb") as f:
        write_atomically(path.with_name("best.pt"), partial(shutil.copyfileobj, f), check_zip)


def load_run(path):
    """-> the dict that save_run wrote, with tensors on the CPU and under "path" the file it came from.

    path: such a file, or the folder of a run, whose newest good checkpoint is taken: ckpt.pt, or ckpt.prev.pt
    where that is damaged, or missing after a kill between two renames. No pickled code is executed.
    ValueError if there is none.
    """
    path = Path(path)
    if (path / "ckpt").is_dir() or (path / "run.pt").exists():
        raise ValueError(f"{path} holds the sharded checkpoint of an older train.py, which can't be read; "
                         "start a new run in another --out_dir")
    if not path.is_dir():
        try:
            return read_run(path)
        except OSError as e:
            raise ValueError(e) from None
    newest, previous = path / "ckpt.pt", path / "ckpt.prev.pt"
    try:
        return read_run(newest)
    except OSError as e:
        if not previous.exists():
            raise ValueError(e) from None
        try:
            run = read_run(previous)
        except OSError:
            raise ValueError(f"{e}; {previous}, the one before it, is damaged too") from None
    step = run["state"]["step"]
    print(f"{newest} is damaged or missing: using the one before it, {previous}, of step {step}",
          file=sys.stderr)
    return run


def read_run(path):
    """load_run of a file. OSError if it is damaged, ValueError if it is no checkpoint of this train.py."""
    if not path.exists():
        raise OSError(f"there is no checkpoint {path}; train without --resume first")
    try:
        check_zip(path)
        # under torchrun the ranks of a machine share one mapping of the file, and read only what they use
        run = torch.load(path, map_location="cpu", weights_only=True, mmap=dist.is_initialized())
    except Exception as e:      # torch.load raises whatever the damaged bytes lead to
        reason = " ".join(str(e).split())[:100] or type(e).__name__
        raise OSError(f"{path} is damaged or not a checkpoint ({reason}); restore it from a copy, or start "
                      "a new run in another --out_dir") from None
    if not isinstance(run, dict) or run.get("format") != FORMAT:
        raise ValueError(f"{path} is not a checkpoint of this version of train.py; start a new run in "
                         "another --out_dir")
    return run | {"path": str(path)}


def whole(state):
    """A state_dict with its tensors on the CPU, and whole where FSDP shards them. All ranks must take part;
    rank 0 alone gets the tensors."""
    if isinstance(state, dict):
        return {key: whole(value) for key, value in state.items()}
    if isinstance(state, list):
        return [whole(value) for value in state]
    if isinstance(state, torch.Tensor):
        tensor = state.full_tensor() if hasattr(state, "full_tensor") else state
        return tensor.cpu() if not dist.is_initialized() or dist.get_rank() == 0 else None
    return state


def like(target, tensor):
    """Rank 0's whole tensor on target's device and, where FSDP shards target, in its shards."""
    if not dist.is_initialized() or dist.get_rank() == 0:
        tensor = tensor.to(target.device, copy=True)        # else it might stay mapped to the file
    else:
        tensor = torch.empty_like(tensor, device=target.device)
    if hasattr(target, "device_mesh"):
        from torch.distributed.tensor import distribute_tensor      # slow to import
        return distribute_tensor(tensor, target.device_mesh, target.placements)
    if dist.is_initialized():
        dist.broadcast(tensor, 0)
    return tensor


def load_weights(model, weights):
    """Fill a model from a whole state_dict. On ranks other than 0 only the shapes of its tensors matter."""
    targets = model.state_dict()
    if missing := targets.keys() - weights.keys():
        raise ValueError(f"the checkpoint lacks {', '.join(sorted(missing)[:3])} of this model.py; "
                         "use the model.py that it was trained with")
    model.load_state_dict({name: like(target, weights[name]) for name, target in targets.items()})


def load_optimizer(optimizer, saved):
    """The same for an optimizer. Its state is numbered by parameter, in the order of its groups."""
    params = [p for group in optimizer.param_groups for p in group["params"]]
    state = {i: {key: like(params[i], value) if value.dim() else value.clone()
                 for key, value in values.items()} for i, values in saved["state"].items()}
    optimizer.load_state_dict({"state": state, "param_groups": saved["param_groups"]})


# ------------------------------------------------------------------------------------------------------------
# Released checkpoints

STORED_DTYPES = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
SCALE_DTYPES = [*STORED_DTYPES, "F8_E8M0"]
FP8_FORMAT = {"activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8",
              "weight_block_size": [128, 128]}
# Keys of config.json that are absent or have this value; no tensor would show another one
FIXED = {"hidden_act": "silu", "scoring_func": "sigmoid", "topk_method": "noaux_tc", "moe_layer_freq": 1,
         "attention_bias": False, "attention_dropout": 0, "rope_interleave": True, "partial_rotary_factor": 1,
         "index_topk": None, "sliding_window": None}
# The model types that compute what DeepSeek-V3 does, with defaults of their own
SAME_MODEL = {"deepseek_v3": {}, "kimi_k2": {},
              "glm4_moe_lite": {"n_group": 1, "topk_group": 1, "num_experts_per_tok": 4, "rms_norm_eps": 1e-5,
                                "first_k_dense_replace": 1, "routed_scaling_factor": 1.8,
                                "max_position_embeddings": 202752}}
OTHER_MODELS = {"deepseek_v2": "its router uses a softmax", "deepseek_v32": "its attention is sparse",
                "deepseek_v4": "its attention is not MLA", "glm_moe_dsa": "its attention is sparse",
                "glm4_moe": "its attention is not MLA", "kimi_linear": "most of its attention is linear",
                "kimi_k25": "it also reads images", "deepseek_vl_v2": "it also reads images"}
# What says where texts begin and end: an export keeps these files, up to this size each
SIDE_FILES = re.compile(r"(generation_config|tokenizer(_config)?|special_tokens_map|added_tokens)\.json"
                        r"|tiktoken\.model|tokenization_\w+\.py|chat_template\.(json|jinja)"
                        r"|additional_chat_templates/\w+\.jinja")
SIDE_BYTES = 2**26
YARN_NUMBERS = ("factor", "original_max_position_embeddings", "beta_fast", "beta_slow", "mscale",
                "mscale_all_dim", "attention_factor")
WEIGHT_FILES = re.compile(r"model(-\d+-of-\d+)?\.safetensors(\.index\.json)?")


class Stored(NamedTuple):
    file: Path
    dtype: str      # as the file's header spells it
    shape: tuple


def released_folder(name):
    """The folder of a path or, if there is none, of an id on the Hugging Face Hub (owner/name), which
    huggingface_hub downloads. ImportError without that, ValueError if the Hub refuses."""
    path = Path(name)
    if path.parent.exists() or path.is_absolute() or len(path.parts) != 2 or str(name).startswith("."):
        return path
    try:
        from huggingface_hub import snapshot_download
        patterns = ["*.json", "*.safetensors", "*.model", "*.jinja"]        # never a pickle
        return Path(snapshot_download(str(name), allow_patterns=patterns))
    except ImportError:
        raise ImportError(f"there is no folder {name}; to fetch {name} from the Hugging Face Hub: "
                          "pip install huggingface_hub") from None
    except (OSError, ValueError) as e:
        raise ValueError(f"there is no folder {name}, and the Hugging Face Hub did not give it "
                         f"({one_line(e)}); check the name and the network, or give a folder") from None


def one_line(e):
    return " ".join(str(e).split())[:200]


def read_json(path):
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(content, dict):
            return content
        reason = f"it holds a {type(content).__name__}"
    except (ValueError, RecursionError) as e:
        reason = one_line(e)
    raise ValueError(f"{path} is not a JSON object: {reason}")


# ----------------------------------------------------------------------------------------------- config.json

def read_config(dir):
    """The DeepSeekV3Config of a folder's config.json, in the release's form or that of transformers 5.

    Keys that don't concern the model are ignored. ValueError for what this code can't honour, such as another
    scoring function: it would silently load as a different model. Absent keys have the model type's defaults,
    except num_nextn_predict_layers, which is 0.
    """
    path = Path(dir) / "config.json"
    if not path.is_file():
        raise ValueError(f"{dir} is no folder with a config.json")
    raw = read_json(path)
    try:
        kind = raw.get("model_type", "deepseek_v3")
        if not isinstance(kind, str) or kind not in SAME_MODEL:
            why = OTHER_MODELS.get(str(kind), "only models that compute the same as DeepSeek-V3 are")
            raise ValueError(f"model_type={repr(kind)[:100]} is not supported: {why}; choose a checkpoint "
                             f"of type {' or '.join(SAME_MODEL)}")
        check_fixed(raw)
        quantized = raw.get("quantization_config") or {}
        for key, value in FP8_FORMAT.items():
            if quantized and (not isinstance(quantized, dict) or quantized.get(key, value) != value):
                raise ValueError(f"quantization_config={repr(quantized)[:200]} is not supported, only "
                                 f"DeepSeek's FP8 is, whose {key} is {value!r}")
        raw = {"num_nextn_predict_layers": 0, **SAME_MODEL[kind], **raw, **read_rope(raw)}
        for key in "num_nextn_predict_layers", "n_shared_experts":
            if raw.get(key, 0) is None:
                raw[key] = 0
        config = DeepSeekV3Config(**{f.name: read_value(f.name, f.type, raw[f.name])
                                     for f in dataclasses.fields(DeepSeekV3Config) if f.name in raw})
        if (kinds := raw.get("mlp_layer_types")) is not None:       # glm4_moe_lite's first_k_dense_replace
            layers, shown = config.num_hidden_layers, repr(kinds)[:100]
            kinds = kinds[:layers] if isinstance(kinds, list) else []
            dense = config.first_k_dense_replace = kinds.count("dense")
            if len(kinds) < layers or kinds != ["dense"] * dense + ["sparse"] * (layers - dense):
                raise ValueError(f"mlp_layer_types={shown} is not supported; it must be 'dense' for the "
                                 f"first layers and 'sparse' for the rest, {layers} in all")
        return config
    except ValueError as e:
        raise ValueError(f"{path}: {e}") from None


def check_fixed(section):
    for key in FIXED.keys() & section.keys():
        # null means absent, except for rope_interleave, where transformers takes null for false
        if section[key] != FIXED[key] and (section[key] is not None or key == "rope_interleave"):
            raise ValueError(f"{key}={repr(section[key])[:100]} is not supported, only {FIXED[key]!r} is; "
                             "choose a checkpoint of DeepSeek-V3's own architecture")


def read_value(name, kind, value):
    """A value of type `kind`, from a JSON file that may hold anything."""
    if type(value) in (int, float) and not 0 <= value < 2**31:      # false for NaN too
        raise ValueError(f"{name} must be a number from 0 to 2^31, got {str(value)[:100]}")
    if kind is float and type(value) is int:
        return float(value)
    if not isinstance(value, kind) or isinstance(value, bool) != (kind is bool):
        raise ValueError(f"{name} must be of type {getattr(kind, '__name__', kind)}, got {repr(value)[:100]}")
    return value


def read_rope(raw):
    """rope_theta and rope_scaling, or both in rope_parameters, which transformers 5 writes but reads last."""
    for key in "rope_scaling", "rope_parameters":
        if raw.get(key) is not None and not isinstance(raw[key], dict):
            raise ValueError(f"{key} must be a JSON object, got {repr(raw[key])[:100]}")
    rope = dict(raw.get("rope_scaling") or raw.get("rope_parameters") or {})
    check_fixed(rope)
    theta = rope.pop("rope_theta", raw.get("rope_theta", DeepSeekV3Config.rope_theta))
    if "original_max_position_embeddings" in raw:
        rope["original_max_position_embeddings"] = raw["original_max_position_embeddings"]
    for key, value in rope.items():
        if isinstance(value, dict):
            raise ValueError(f"RoPE parameters by kind of layer ({key[:100]!r}) are not supported")
        if key in YARN_NUMBERS and value is not None:
            read_value(f"rope_scaling['{key}']", int | float, value)
    theta = read_value("rope_theta", float, theta)
    if theta <= 1:
        raise ValueError(f"rope_theta must be over 1, got {theta}")
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return {"rope_theta": theta, "rope_scaling": None}
    if kind != "yarn" or rope.get("factor") is None:
        raise ValueError(f"rope_scaling={repr(rope)[:200]} is not supported, only YaRN with a 'factor' is")
    fast, slow = rope.get("beta_fast") or 32, rope.get("beta_slow") or 1
    if not 1e-3 < slow <= fast or rope.get("truncate", True) is not True:
        raise ValueError("rope_scaling must have 0.001 < beta_slow <= beta_fast, and not truncate=false, as "
                         f"DeepSeek-V3 rounds YaRN's range; got {repr(rope)[:200]}")
    return {"rope_theta": theta, "rope_scaling": rope}


# --------------------------------------------------------------------------------------------------- loading

def find_tensors(dir):
    """The safetensors files of a folder -> {tensor's name: Stored}, from their headers only; and {name: file}
    of the tensors that the index places in missing files."""
    index, weight_map, files = dir / "model.safetensors.index.json", {}, ["model.safetensors"]
    if index.is_file():
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict):
            raise ValueError(f"{index} has no weight_map")
        files = list(dict.fromkeys(map(str, weight_map.values())))
    elif not (dir / files[0]).is_file():
        raise ValueError(f"{dir} has no {files[0]}; weights are read from safetensors, never from pickles")
    stored = {}
    for file in files:
        path = dir / file
        if file != path.name or not file.endswith(".safetensors") or not file.isprintable():
            raise ValueError(f"{index} names {file!r}, which is no safetensors file of its own folder")
        if path.is_file():
            with open_safetensors(path) as f:
                for name in f.keys():
                    if name in stored:
                        first = stored[name].file.name
                        raise ValueError(f"{dir} has {name[:200]!r} in two files, {first} and {file}")
                    view = f.get_slice(name)
                    stored[name] = Stored(path, view.get_dtype(), tuple(view.get_shape()))
    lost = {file for file in files if not (dir / file).is_file()}
    return stored, {name: file for name, file in weight_map.items() if file in lost}


def safetensors():
    try:
        import safetensors.torch
        return safetensors
    except ImportError:
        raise ImportError("released checkpoints need safetensors: pip install safetensors") from None


def open_safetensors(file):
    try:
        return safetensors().safe_open(file, "pt")
    except (safetensors().SafetensorError, OSError, ValueError, RuntimeError) as e:
        raise ValueError(f"{file} is damaged or no safetensors file: {one_line(e)}") from None


def read_tensor(file, name):
    """One tensor, on the CPU. Opens the file each time, as all that was read stays in memory until then."""
    with open_safetensors(file) as f:
        return f.get_tensor(name)


def read_weight(stored, name):
    """A tensor and, if it is stored in FP8, the scale of each 128x128 block in fp32, else None."""
    tensor, scale_name = read_tensor(stored[name].file, name), name + "_scale_inv"
    if stored[name].dtype != "F8_E4M3":
        return tensor, None
    scale = read_tensor(stored[scale_name].file, scale_name).float()
    if not (scale.isfinite() & (scale >= 0)).all():
        raise ValueError(f"{stored[name].file}: {scale_name} holds scales that are negative or not finite; "
                         "the file is damaged")
    return tensor, scale


def dequantize(tensor, scale):
    if scale is None:
        return tensor
    from fp8 import weight_dequant      # imports Triton, which is slow
    return weight_dequant(tensor, scale)


def released_tensors(model):
    """{name in a released checkpoint: tensor}, each expert by itself; and {name: name of the original} of
    copies: embedding and head of the MTP modules, and a tied head."""
    tensors = {}
    for name, tensor in model.state_dict().items():
        stem, _, kind = name.rpartition(".")
        if stem.endswith(".mlp.experts"):
            proj, scale = kind.removesuffix("_scale_inv"), kind.endswith("_scale_inv")
            kind = f"{proj}.weight_scale_inv" if scale else f"{proj}.weight"
            tensors |= {f"{stem}.{e}.{kind}": tensor[e] for e in range(len(tensor))}
        else:
            tensors[name] = tensor
    copies = {"lm_head.weight": "model.embed_tokens.weight"} if model.config.tie_word_embeddings else {}
    for i in range(model.config.num_hidden_layers, len(model.model.layers)):
        copies |= {f"model.layers.{i}.embed_tokens.weight": "model.embed_tokens.weight",
                   f"model.layers.{i}.shared_head.head.weight": "lm_head.weight"}
    return tensors | {name: tensors[original] for name, original in copies.items()}, copies


def on_meta(cls, config, origin):
    """The model without memory for its weights. ValueError if they are more than numbers can count."""
    try:
        with torch.device("meta"):
            return cls(config)
    except (RuntimeError, TypeError) as e:
        raise ValueError(f"{origin} has a config of an impossible size ({one_line(e)})") from None


@torch.no_grad()
def load(cls, dir, dtype=None, device=None, **changes):
    """DeepSeekV3.from_pretrained; cls: DeepSeekV3."""
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise ValueError(f"dtype must be a floating-point torch.dtype such as torch.bfloat16, got {dtype!r}")
    dir = released_folder(dir)
    config = dataclasses.replace(read_config(dir), **changes)
    stored, lost = find_tensors(dir)
    config, stored = match_mtp(dir, config, stored, lost, quiet="num_nextn_predict_layers" in changes)
    layers, depth = config.num_hidden_layers, config.num_nextn_predict_layers
    experts, count = config.n_routed_experts, len(stored) + len(lost)
    moe_layers = max(layers - config.first_k_dense_replace, 0) + depth
    if max(layers + depth, 3 * experts * moe_layers) > count:       # too much to build, even on meta
        raise ValueError(f"{dir} holds {count} tensors, too few for the {layers} layers, {depth} MTP modules "
                         f"and {experts} experts of its config.json")
    model = on_meta(cls, config, dir)
    expected, copies = released_tensors(model)
    check_tensors(dir, expected, copies, stored, lost)

    dtype = dtype or STORED_DTYPES.get(stored["model.embed_tokens.weight"].dtype, torch.bfloat16)
    if dtype == torch.float8_e4m3fn:
        from fp8 import hold_in_fp8, quantize_reference
        model = hold_in_fp8(model.to(torch.bfloat16))
    else:
        model = model.to(dtype)
    model = model.to_empty(device=device or "cpu")
    if config.tie_word_embeddings:
        model.lm_head.weight = model.model.embed_tokens.weight      # to_empty parts them
    targets, _ = released_tensors(model)
    from data.prepare import progress
    for name in progress([n for n in stored if n in expected and n not in copies], f"reading {dir}"):
        tensor, scale = read_weight(stored, name)
        if name + "_scale_inv" in targets:      # stays in FP8
            tensor, scale = quantize_reference(tensor, 128) if scale is None else (tensor, scale)
            targets[name + "_scale_inv"].copy_(scale)
        else:
            tensor = dequantize(tensor, scale)
        targets[name].copy_(tensor)
    for name in [n for n in copies if n in stored]:
        copy, original = dequantize(*read_weight(stored, name)), targets[copies[name]]
        # a copy may be stored in another dtype
        if not torch.equal(copy.to(original), original) and not torch.equal(copy, original.to(copy)):
            cure = ("tie_word_embeddings to false" if name == "lm_head.weight" else
                    "num_nextn_predict_layers to 0, for the main model alone,")
            raise ValueError(f"{dir}: {name} differs from {copies[name]}, but the model has one tensor for "
                             f"both; set {cure} in config.json")
    model.source_files = read_side_files(dir)
    return model.eval()


def match_mtp(dir, config, stored, lost, quiet):
    """config and stored, reduced to the MTP modules that both have: Hugging Face drops them from files, and a
    config may count fewer than there are."""
    first, end = config.num_hidden_layers, config.num_hidden_layers + config.num_nextn_predict_layers
    layer = {name: int(match[1]) for name in stored.keys() | lost.keys()
             if (match := re.match(r"model\.layers\.(\d{1,9})\.", name))}
    if not any(first <= i < end for i in layer.values()):
        config = dataclasses.replace(config, num_nextn_predict_layers=0)
    extra = sorted({i for i in layer.values() if i >= end and f"model.layers.{i}.eh_proj.weight" in layer})
    if extra and not quiet:
        print(f"{dir}: left out MTP layer {', '.join(map(str, extra))}, as num_nextn_predict_layers is "
              f"{end - first} in config.json", file=sys.stderr)
    return config, {name: at for name, at in stored.items() if layer.get(name) not in extra}


def check_tensors(dir, expected, copies, stored, lost):
    """Account for every tensor before any memory is spent."""
    missing, wrong = [name for name in expected if name not in stored and name not in copies], []
    # an empty tensor can be ignored: transformers writes them for n_shared_experts 0
    unexpected = {name for name, at in stored.items()
                  if name not in expected and not name.endswith(".rotary_emb.inv_freq") and 0 not in at.shape}
    for name in expected.keys() & stored.keys():
        _, dtype, shape = stored[name]
        scale, blocks = name + "_scale_inv", tuple(-(-n // 128) for n in shape)
        if shape != tuple(expected[name].shape):
            wrong.append(f"{name} has the shape {shape} instead of {tuple(expected[name].shape)}")
        elif dtype == "F8_E4M3" and len(shape) == 2:
            unexpected.discard(scale)
            if scale not in stored:
                missing.append(scale)
            elif stored[scale].shape != blocks or stored[scale].dtype not in SCALE_DTYPES:
                _, dtype, shape = stored[scale]
                wrong.append(f"{scale} is {dtype} {shape} instead of F32 {blocks}")
        elif dtype not in STORED_DTYPES:
            known = ", ".join(STORED_DTYPES)
            wrong.append(f"{name} has the dtype {dtype}, which is none of {known} or F8_E4M3")
    for name in missing:
        if name in lost:
            raise ValueError(f"{dir} has no {lost[name]}, which holds {name}; complete the download")
    parts = []
    for what, names in ("missing", missing), ("unexpected", unexpected), ("wrong:", wrong):
        shown = [n if n.isprintable() and len(n) < 250 else ascii(n)[:250] for n in sorted(names)[:10]]
        if names:
            more = f" and {len(names) - 10} more" if len(names) > 10 else ""
            parts.append(f"{what} {', '.join(shown)}{more}")
    if parts:
        raise ValueError(f"the tensors of {dir} don't fit its config.json: {'; '.join(parts)}")


def read_side_files(dir):
    """model.source_files: {name: text} of a folder's SIDE_FILES, and of the token ids in its config.json."""
    texts = {}
    for path in [*dir.iterdir(), *dir.glob("additional_chat_templates/*")]:
        name = path.relative_to(dir).as_posix()
        with contextlib.suppress(OSError, UnicodeDecodeError):      # the weights are as good without it
            if SIDE_FILES.fullmatch(name) and path.is_file() and path.stat().st_size <= SIDE_BYTES:
                texts[name] = path.read_bytes().decode("utf-8")
    raw = read_json(dir / "config.json")
    keys = [key for key in ("bos_token_id", "eos_token_id", "pad_token_id") if raw.get(key) is not None]
    ids = {key: raw[key] for key in keys}
    return texts | {"config.json": json.dumps(ids)}


# ---------------------------------------------------------------------------------------------------- saving

def is_quantized(name):
    """Whether the release holds this tensor in FP8: the matrices of attention and MLPs, experts included. The
    embedding, the head, norms, gates and eh_proj stay in bf16."""
    return (".self_attn." in name or ".mlp." in name) and "norm" not in name and ".gate." not in name


def split(tensors, copies, fp8, shard_bytes):
    """The tensors as the release stores them: yields {name: tensor} for each file of at most shard_bytes."""
    shard, size = {}, 0
    for name, t in tensors:
        if fp8 and is_quantized(name):
            from fp8 import quantize_reference      # imports Triton, which is slow
            q, scale = quantize_reference(t, 128)
            part = {name: q.contiguous(), name + "_scale_inv": scale}
        else:
            t = t.to(torch.bfloat16) if fp8 and "e_score" not in name else t
            # safetensors refuses two tensors in the same memory
            part = {name: t.clone() if name in copies else t.contiguous()}
        more = sum(t.nbytes for t in part.values())
        if shard and size + more > shard_bytes:
            yield shard
            shard, size = {}, 0
        shard |= part
        size += more
    yield shard


@torch.no_grad()
def save(model, dir, encoding=None, fp8=False, shard_bytes=5 * 10**9, ends=None):
    """DeepSeekV3.save_pretrained. An earlier checkpoint goes when all of the new one is on the disk."""
    check_plain(model)
    from data.prepare import progress
    dir, lib, (tensors, copies) = Path(dir), safetensors(), released_tensors(model)
    if model.config.tie_word_embeddings:
        del tensors["lm_head.weight"]
    texts = config_and_side_files(model, encoding, fp8, ends)
    dir.mkdir(parents=True, exist_ok=True)
    old, shards = old_files(dir), []
    if "tokenizer.json" in texts:
        old.add("generation_config.json")       # its ids would override those of config.json
    try:
        for file, content in texts.items():
            write_text(dir / f"{file}.tmp", content)
        for shard in split(progress(tensors.items(), f"writing {dir}"), copies, fp8, shard_bytes):
            shards.append({name: t.nbytes for name, t in shard.items()})
            path = dir / f"model-{len(shards)}.safetensors.tmp"
            lib.torch.save_file(shard, path, metadata={"format": "pt"})
            shutil.copymode(dir / "config.json.tmp", path)      # else only the owner may read it
            with open(path, "rb+") as f:
                os.fsync(f.fileno())
        names = [f"model-{i:05}-of-{len(shards):05}.safetensors" for i in range(1, len(shards) + 1)]
        if len(shards) == 1:
            names = ["model.safetensors"]
        else:
            index = {"metadata": {"total_size": sum(sum(shard.values()) for shard in shards)},
                     "weight_map": {name: file for file, shard in zip(names, shards) for name in shard}}
            texts["model.safetensors.index.json"] = index
            write_text(dir / "model.safetensors.index.json.tmp", index)
    except (lib.SafetensorError, OSError) as e:     # a full disk, a folder that can't be written
        raise OSError(f"{dir} can't be written ({one_line(e)}); an earlier checkpoint in it is intact: make "
                      "room, or save to another folder") from None
    else:
        for file in ["config.json", *old]:      # without config.json, old and new files are no checkpoint
            (dir / file).unlink(missing_ok=True)
        for i, file in enumerate(names, 1):
            os.replace(dir / f"model-{i}.safetensors.tmp", dir / file)
        for file in reversed(texts):            # config.json comes last
            os.replace(dir / f"{file}.tmp", dir / file)
    finally:
        for path in [*dir.glob("model-[0-9]*.safetensors.tmp"), *(dir / f"{file}.tmp" for file in texts)]:
            path.unlink(missing_ok=True)


def write_text(path, content):
    path.parent.mkdir(exist_ok=True)
    with open(path, "wb") as f:
        f.write((content if isinstance(content, str) else json.dumps(content, indent=2) + "\n").encode())
        f.flush()
        os.fsync(f.fileno())


def check_plain(model):
    """ValueError for a model that the released format can't describe."""
    shapes = {(name, t.shape) for name, t in model.state_dict().items()}
    if any(name.endswith("_scale_inv") for name, _ in shapes):
        raise ValueError("this model holds its weights in FP8, for inference only; load it with "
                         "dtype=torch.bfloat16 and save it with fp8=True")
    plain = on_meta(DeepSeekV3, model.config, "the model").state_dict()
    odd = replaced_classes(model) or sorted({n for n, _ in shapes ^ {(n, t.shape) for n, t in plain.items()}})
    if odd:
        raise ValueError(f"{', '.join(odd[:5])}: not as in model.py, which readers of a released checkpoint "
                         "expect; put the original classes back, and merge adapters into the weights")


def config_and_side_files(model, encoding, fp8, ends):
    """{file name: content} of config.json, which comes first, and of the tokenizer's files."""
    source, ids = getattr(model, "source_files", {}), {}
    if encoding is None or is_tokenizer_of(source, encoding):
        texts = {name: text for name, text in source.items() if SIDE_FILES.fullmatch(name)}     # never ../x
        ids = json.loads(source.get("config.json", "{}"))
    else:
        from data.tokenizer import tokenizer_files
        texts = tokenizer_files(encoding, ends)
        ids = {key: texts["tokenizer_config.json"].pop(key) for key in ("bos_token_id", "eos_token_id")}
    config = {**dataclasses.asdict(model.config), "architectures": ["DeepseekV3ForCausalLM"],
              "model_type": "deepseek_v3", "num_key_value_heads": model.config.num_attention_heads,
              "hidden_act": "silu", "attention_bias": False, "attention_dropout": 0.0, "moe_layer_freq": 1,
              "scoring_func": "sigmoid", "topk_method": "noaux_tc",
              "bos_token_id": None, "eos_token_id": None, **ids,
              "torch_dtype": "bfloat16" if fp8 else str(model.lm_head.weight.dtype).removeprefix("torch.")}
    if fp8:
        config["quantization_config"] = FP8_FORMAT
    return {"config.json": config, **texts}


def is_tokenizer_of(source, encoding):
    """Whether the tokenizer among model.source_files gives the ids of a tiktoken.Encoding."""
    from data.tokenizer import get_tokenizer, same_ids
    with tempfile.TemporaryDirectory() as dir:
        for name, text in source.items():
            if name == "config.json" or SIDE_FILES.fullmatch(name) and "/" not in name:
                Path(dir, name).write_bytes(text.encode())
        try:
            return same_ids(get_tokenizer(dir), encoding)
        except (ValueError, OSError):
            return False


def old_files(dir):
    """The files of an earlier checkpoint's weights: what its index lists, and whatever is named like a shard.
    Readers that take all safetensors files of a folder would mix them with the new ones."""
    weight_map = {}
    with contextlib.suppress(ValueError, OSError):
        weight_map = read_json(dir / "model.safetensors.index.json").get("weight_map")
    listed = {str(file) for file in weight_map.values()} if isinstance(weight_map, dict) else set()
    return {path.name for path in dir.iterdir() if not path.is_dir() and (
        WEIGHT_FILES.fullmatch(path.name) or path.suffix == ".safetensors" and path.name in listed)}


def replaced_classes(model):
    """Names of a model's classes, methods and functions that are not model.py's, fp8.py's or torch's own: a
    checkpoint holds their weights, but not what they compute."""
    functions = vars(sys.modules[DeepSeekV3.__module__]).items()
    names = {name for name, value in functions if inspect.isfunction(value) and is_foreign(value)}
    for module in model.modules():
        classes = type(module).__mro__
        names |= {cls.__name__ for cls in classes if is_foreign(cls)}
        for owner in [module, *(cls for cls in classes if cls.__module__ in ("model", "fp8"))]:
            name = getattr(owner, "__name__", type(module).__name__)
            names |= {f"{name}.{key}" for key, value in vars(owner).items()
                      if callable(value) and is_foreign(value)}
    return sorted(names)


def is_foreign(thing):
    origin = (getattr(thing, "__module__", None) or "").split(".")[0]
    return origin not in ("model", "fp8", "torch", "builtins", "dataclasses", "")
