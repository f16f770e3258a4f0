"""
The files of a run of train.py, and released checkpoints: those of DeepSeek-V3 and its kin on the Hugging Face Hub.

A run's OUT/ckpt.pt is what torch.save writes, and behind that its CRC-32, which torch.load doesn't mind. It is checked
before the file takes the place of the one before it, and again whenever it is used.

A released folder holds config.json and model.safetensors, or shards of it with model.safetensors.index.json. Beside
model.py's stacked experts there are three things to know: each expert is a tensor by itself; the MTP modules, layers
num_hidden_layers and up, repeat embedding and head; and `weight` may be FP8 with a `weight_scale_inv` for each 128x128
block, which multiplies. Use it as DeepSeekV3.from_pretrained and save_pretrained.
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
import time
import warnings
import zlib
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist

from model import DeepSeekV3, DeepSeekV3Config

try:
    import fcntl
except ImportError:     # not a Unix: there, nothing keeps a second process out of a run's folder
    fcntl = None

# ----------------------------------------------------------------------------------------------------------------------
# What the scripts share

class Parser(argparse.ArgumentParser):
    """The flags of a script. A mistake gets one line, with the closest flag, in place of the whole usage."""

    def __init__(self, description):
        super().__init__(description=description, formatter_class=argparse.RawDescriptionHelpFormatter,
                         allow_abbrev=False)

    def error(self, message):
        flags, words = list(self._option_string_actions), message.split()
        given = [word.split("=")[0].rstrip(":,") for word in words if word.startswith("-")]
        close = [flag for word in given if word not in flags for flag in difflib.get_close_matches(word, flags, 1)]
        hint = f"did you mean {', '.join(close)}?" if close else "--help lists the flags"
        self.exit(2, f"{self.prog}: {' '.join(words)[:300]}; {hint}\n")


def pick_device(name="auto"):
    """--device -> torch.device; under torchrun, which counts a machine's processes, each has a GPU of its own."""
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
    return device.type == "cpu" and (torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


# ----------------------------------------------------------------------------------------------------------------------
# Runs

@contextlib.contextmanager
def sole_process(out_dir):
    """Holds OUT/lock, so that two processes never mix their files in one folder. The kernel releases it whatever the
    process dies of: a lock file that was left over means nothing. ValueError if another process holds it."""
    new = not out_dir.exists()
    out_dir.mkdir(parents=True, exist_ok=True)
    with open(out_dir / "lock", "w") as f:
        try:
            if fcntl:
                fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"another process is training in {out_dir}; let it end, or choose another --out_dir"
                             ) from None
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
        raise OSError(cannot_write(path, e.strerror or e)) from None


def cannot_write(path, reason):
    return (f"{path} can't be written ({reason}); what was there before is intact: make room, then go on with --resume, or "
            "start again if there is no checkpoint yet")


def write_atomically(path, write, check=lambda path: None, keep_as=None):
    """write(file) into a temporary file beside path, then rename: a reader finds the old file or the new, never half.
    The new one takes its place after check(its path); the old one stays under the name keep_as."""
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
            os.replace(temporary, path)     # killed just before: path is missing, keep_as is there
    finally:
        temporary.unlink(missing_ok=True)


def save_run(out_dir, state):
    """OUT/ckpt.pt, proven readable; the one before it stays as OUT/ckpt.prev.pt."""
    write_atomically(out_dir / "ckpt.pt", lambda f: save_summed(state, f), check_sum, out_dir / "ckpt.prev.pt")


def keep_best(out_dir):
    """OUT/ckpt.pt (or, where --resume went back to it, OUT/ckpt.prev.pt) under the name OUT/best.pt too: the same file,
    whatever becomes of its first name, where the file system has hard links, else a copy."""
    path, previous, best, temporary = (out_dir / name for name in ("ckpt.pt", "ckpt.prev.pt", "best.pt", "best.pt.tmp"))
    path = path if path.exists() else previous
    try:
        temporary.unlink(missing_ok=True)
        os.link(path, temporary)
        os.replace(temporary, best)
    except OSError:
        with open(path, "rb") as f:
            write_atomically(best, lambda copy: shutil.copyfileobj(f, copy), check_sum)
    finally:
        temporary.unlink(missing_ok=True)       # it stays where both are the same file already


def save_shards(out_dir, state, model, optimizer):
    """The like of save_run for a sharded model, called by all ranks: a folder OUT/ckpt, and OUT/ckpt.prev. Tensors go into
    safetensors by torch.distributed.checkpoint (whose own format has pickles), state and checksums into run.pt."""
    from torch.distributed import checkpoint as dcp     # half a second that only sharded runs need
    path, previous, temporary = (out_dir / name for name in ("ckpt", "ckpt.prev", "ckpt.tmp"))
    rank, sums = dist.get_rank(), [None] * dist.get_world_size()
    try:
        with writing(path):
            if rank == 0:
                shutil.rmtree(temporary, ignore_errors=True)
                temporary.mkdir()
            dist.barrier()
            dcp.save(shards(model, optimizer),
                     storage_writer=dcp.HuggingFaceStorageWriter(str(temporary), save_distributed=True))
            own = {}
            for file in temporary.glob(f"shard-{rank + 1:05}-*"):
                with open(file, "rb+") as f:
                    os.fsync(f.fileno())
                own[file.name] = crc32(file)
            dist.all_gather_object(sums, own)
            if rank == 0:
                write_atomically(temporary / "run.pt", lambda f: save_summed(
                    {**state, "sums": {k: v for part in sums for k, v in part.items()}}, f), check_sum)
                shutil.rmtree(previous, ignore_errors=True)
                if path.exists():
                    os.replace(path, previous)
                os.replace(temporary, path)     # killed just before: path is missing, previous is there
    except dcp.CheckpointException as e:        # on all ranks, whichever it was that failed
        reason = " ".join(str(next(iter(e.failures.values()))[0]).split())[:200]
        raise OSError(cannot_write(path, reason)) from None
    finally:
        if rank == 0:
            shutil.rmtree(temporary, ignore_errors=True)


def load_shards(path, model, optimizer=None):
    """Fill model and optimizer from a folder of save_shards, whatever the number of ranks that wrote it or read it."""
    from torch.distributed import checkpoint as dcp
    for p in model.parameters() if optimizer else ():
        optimizer.state[p] = {"step": torch.zeros((), device=p.device), "exp_avg": torch.zeros_like(p),
                              "exp_avg_sq": torch.zeros_like(p)}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")     # that it is one process that reads
        dcp.load(shards(model, optimizer), storage_reader=dcp.HuggingFaceStorageReader(str(path)))      # in place


def shards(model, optimizer):
    tensors = model.state_dict()
    if model.config.tie_word_embeddings:
        del tensors["lm_head.weight"]       # is the embedding
    for name, p in model.named_parameters() if optimizer else ():
        tensors |= {f"optimizer.{key}.{name}": value for key, value in optimizer.state[p].items()}
    return tensors


def load_run(out_dir):
    """-> the newest good checkpoint of a run and its path: OUT/ckpt.pt or, where that is damaged or a kill came between
    two renames, OUT/ckpt.prev.pt; of a sharded run OUT/ckpt or OUT/ckpt.prev. ValueError if there is none."""
    suffix = "" if (out_dir / "ckpt").is_dir() or (out_dir / "ckpt.prev").is_dir() else ".pt"
    path, previous = out_dir / f"ckpt{suffix}", out_dir / f"ckpt.prev{suffix}"
    try:
        return load_checkpoint(path), path
    except ValueError as e:
        if not previous.exists():
            raise
        try:
            return load_checkpoint(previous), previous
        except ValueError:
            raise ValueError(f"{e}; {previous}, the one before it, is damaged too") from None


def set_aside(previous, ckpt):
    """Move what is damaged out of the way, lest it displace the good checkpoint before it at the next save."""
    path = previous.with_name(previous.name.replace(".prev", ""))
    print(f"{path} is damaged or missing: going on from the one before it, {previous}, of step {ckpt['step']}")
    if path.exists():
        damaged = previous.with_name(previous.name.replace(".prev", ".damaged"))
        shutil.rmtree(damaged, ignore_errors=True)
        os.replace(path, damaged)


class SummedFile:
    """Writes through to a file, and keeps the CRC-32 of all that was written."""

    def __init__(self, file):
        self.file, self.crc = file, 0

    def write(self, part):
        self.crc = zlib.crc32(part, self.crc)
        return self.file.write(part)

    def flush(self):
        self.file.flush()


def save_summed(state, file):
    """torch.save, and the checksum behind it."""
    summed = SummedFile(file)
    try:
        torch.save(state, summed)
    except RuntimeError as e:       # what torch's zip writer makes of an OSError from write
        raise e.__context__ if isinstance(e.__context__, OSError) else e
    file.write(b"crc32:%08x" % summed.crc)


def check_sum(path):
    """OSError unless a file holds what save_summed wrote."""
    with open(path, "rb") as f:
        f.seek(max(path.stat().st_size - 14, 0))
        stored = f.read()
    if stored != b"crc32:%08x" % crc32(path, path.stat().st_size - 14):
        raise OSError("its checksum is wrong")


def crc32(path, size=None):
    """CRC-32 of a file, or of its first `size` bytes: a second for a GB or two."""
    crc, left = 0, path.stat().st_size if size is None else size
    with open(path, "rb") as f:
        while left > 0 and (chunk := f.read(min(left, 2**24))):
            crc, left = zlib.crc32(chunk, crc), left - len(chunk)
    return crc


def load_checkpoint(path):
    """-> the dict of save_run, on the CPU; of save_shards, with the folder under "shards" in place of the tensors. No
    pickled code is executed. ValueError if it can't be used."""
    if not path.exists():
        raise ValueError(f"there is no checkpoint {path}; start a run without --resume first")
    file = path / "run.pt" if path.is_dir() else path
    try:
        check_sum(file)
        ckpt = torch.load(file, map_location="cpu", weights_only=True)
        for name, crc in ckpt["sums"].items() if path.is_dir() else ():
            if crc32(path / name) != crc:
                raise OSError(f"{name} has changed")
    except Exception as e:      # torch.load raises whatever the damaged bytes lead to
        reason = " ".join(str(e).split())[:100] or type(e).__name__
        raise ValueError(f"{path} is damaged or not a checkpoint ({reason}); restore it from a copy, or start a new run "
                         "in another --out_dir") from None
    kinds = {"config": dict, "train_config": dict, "meta": dict, "encoding": str, "step": int, "samples": int,
             "skipped": int, "sequences_per_step": int}
    if not isinstance(ckpt, dict) or any(type(ckpt.get(key)) is not kind for key, kind in kinds.items()):
        raise ValueError(f"{path} is not a checkpoint of train.py; start a new run in another --out_dir")
    if path.is_dir():
        return ckpt | {"shards": path}
    try:        # before any memory is spent: do the weights fit the config?
        config = DeepSeekV3Config(**ckpt["config"])
        if config.num_hidden_layers + config.num_nextn_predict_layers > len(ckpt["model"]):
            raise ValueError("too few tensors")
        # a dict of its own, as assign=True leaves a mark in a state_dict's metadata that makes the next load assign too
        model = on_meta(DeepSeekV3, config, path)
        for weights in ckpt["model"], ckpt.get("ema", ckpt["model"]):
            model.load_state_dict(dict(weights), assign=True)
    except (ValueError, RuntimeError, TypeError, LookupError, AttributeError) as e:
        raise ValueError(f"{path} holds weights that don't fit its config: {' '.join(str(e).split())[:200]}") from None
    return ckpt


# ----------------------------------------------------------------------------------------------------------------------
# Released checkpoints

STORED_DTYPES = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
SCALE_DTYPES = [*STORED_DTYPES, "F8_E8M0"]      # all of them are exact in fp32, but for F64
FP8_FORMAT = {"activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8", "weight_block_size": [128, 128]}
# Keys of config.json that may be absent or have this value. No tensor would show that they differ.
FIXED = {"hidden_act": "silu", "scoring_func": "sigmoid", "topk_method": "noaux_tc", "moe_layer_freq": 1,
         "attention_bias": False, "attention_dropout": 0, "rope_interleave": True, "partial_rotary_factor": 1,
         "index_topk": None, "sliding_window": None}
# The model types that compute what DeepSeek-V3 does, each with the defaults of its own that no tensor's shape shows
SAME_MODEL = {"deepseek_v3": {}, "kimi_k2": {},
              "glm4_moe_lite": dict(n_group=1, topk_group=1, num_experts_per_tok=4, routed_scaling_factor=1.8,
                                    first_k_dense_replace=1, rms_norm_eps=1e-5, max_position_embeddings=202752)}
OTHER_MODELS = {"deepseek_v2": "its router uses a softmax", "deepseek_v32": "its attention is sparse",
                "deepseek_v4": "its attention is not MLA", "glm_moe_dsa": "its attention is sparse",
                "glm4_moe": "its attention is not MLA", "kimi_linear": "most of its layers have linear attention",
                "kimi_k25": "it also reads images", "deepseek_vl": "it also reads images",
                "deepseek_vl_v2": "it also reads images"}
# The small files beside the weights that an export keeps: everything that says where texts begin and end
SIDE_FILES = re.compile(r"generation_config\.json|tokenizer(_config)?\.json|special_tokens_map\.json|added_tokens\.json|"
                        r"tiktoken\.model|tokenization_\w+\.py|chat_template\.(json|jinja)|"
                        r"additional_chat_templates/\w+\.jinja")
SIDE_BYTES = 2**26      # what is larger in sum is left behind
SAFETENSORS_ONLY = "weights are read from safetensors files only, never from pickles"
WEIGHT_FILES = re.compile(r"model(-\d+-of-\d+)?\.safetensors(\.index\.json)?(\.tmp)?")


class Stored(NamedTuple):
    """What a file's header says about a tensor; dtype None: the index names the tensor, but the file is missing."""
    file: Path
    dtype: str | None
    shape: tuple


def released_folder(name):
    """The folder of a released checkpoint: a path or, where there is none, an id on the Hugging Face Hub (owner/model),
    whose files are downloaded by huggingface_hub. ImportError without that, ValueError if the Hub doesn't give them."""
    path = Path(name)
    if path.parent.exists() or path.is_absolute() or len(path.parts) != 2 or str(name).startswith("."):
        return path
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise ImportError(f"there is no folder {name}; to fetch {name} from the Hugging Face Hub: pip install "
                          "huggingface_hub") from None
    try:
        # never a pickle
        return Path(snapshot_download(str(name), allow_patterns=["*.json", "*.safetensors", "*.model", "*.jinja"]))
    except (OSError, ValueError) as e:
        reason = " ".join(str(e).split())[:100]
        raise ValueError(f"there is no folder {name}, and the Hugging Face Hub did not give {name} ({reason}); check the "
                         "name and the network, or download the files and give their folder") from None


def read_json(path):
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(content, dict):
            return content
        reason = f"it holds a {type(content).__name__}"
    except (ValueError, RecursionError) as e:
        reason = " ".join(str(e).split())[:100]
    raise ValueError(f"{path} is not a JSON object: {reason}")


def read_config(dir):
    """The DeepSeekV3Config of a folder's config.json: the release's, or what Hugging Face transformers 5 writes.

    Keys that don't concern the model are ignored. ValueError for what this code cannot honour, such as another scoring
    function: it would silently load as a different model. Absent keys have the defaults of their model type, except
    num_nextn_predict_layers, which is 0.
    """
    path = Path(dir) / "config.json"
    if not path.is_file():
        raise ValueError(f"{dir} is no folder with a config.json")
    raw = read_json(path)
    try:
        kind = raw.get("model_type", "deepseek_v3")
        if not isinstance(kind, str) or kind not in SAME_MODEL:
            why = OTHER_MODELS.get(str(kind), "only models that compute the same as DeepSeek-V3 are")
            raise ValueError(f"model_type={repr(kind)[:100]} is not supported: {why}; choose a checkpoint of type "
                             + " or ".join(SAME_MODEL))
        check_fixed(raw)
        quantized = raw.get("quantization_config") or {}
        for key, value in FP8_FORMAT.items():
            if quantized and (not isinstance(quantized, dict) or quantized.get(key, value) != value):
                raise ValueError(f"quantization_config={repr(quantized)[:200]} is not supported, only DeepSeek's FP8 is, "
                                 f"whose {key} is {value!r}")
        raw = {"num_nextn_predict_layers": 0, **SAME_MODEL[kind], **raw, **read_rope(raw)}
        for key in "num_nextn_predict_layers", "n_shared_experts":
            if raw.get(key, 0) is None:
                raw[key] = 0
        values = {f.name: read_value(f.name, f.type, raw[f.name])
                  for f in dataclasses.fields(DeepSeekV3Config) if f.name in raw}
        if raw.get("mlp_layer_types") is not None:      # glm4_moe_lite's spelling of first_k_dense_replace
            values["first_k_dense_replace"] = count_dense(raw["mlp_layer_types"], values["num_hidden_layers"])
        return DeepSeekV3Config(**values)
    except ValueError as e:
        raise ValueError(f"{path}: {e}") from None


def check_fixed(section):
    for key in FIXED.keys() & section.keys():
        # null is the same as absent, except for rope_interleave, where transformers takes null for false
        if section[key] != FIXED[key] and (section[key] is not None or key == "rope_interleave"):
            raise ValueError(f"{key}={repr(section[key])[:100]} is not supported, only {FIXED[key]!r} is; choose a "
                             "checkpoint of DeepSeek-V3's own architecture")


def read_value(name, kind, value):
    """A field of the config, of type `kind`, out of a JSON file that may hold anything."""
    if type(value) in (int, float) and not 0 <= value < 2**31:      # NaN neither
        raise ValueError(f"{name} must be a number from 0 to 2^31, got {str(value)[:100]}")
    if kind is float and type(value) is int:
        return float(value)
    if not isinstance(value, kind) or isinstance(value, bool) != (kind is bool):
        raise ValueError(f"{name} must be of type {getattr(kind, '__name__', kind)}, got {repr(value)[:100]}")
    return value


def read_rope(raw):
    """rope_theta and rope_scaling. transformers 5 keeps both in rope_parameters; if there are both forms, it reads the
    old one, too."""
    for key in "rope_scaling", "rope_parameters":
        if raw.get(key) is not None and not isinstance(raw[key], dict):
            raise ValueError(f"{key} must be a JSON object, got {repr(raw[key])[:100]}")
    rope = dict(raw.get("rope_scaling") or raw.get("rope_parameters") or {})
    check_fixed(rope)
    for key, value in rope.items():
        if isinstance(value, dict):
            raise ValueError(f"RoPE's parameters by kind of layer ({key[:100]!r}) are not supported; all layers share one")
    theta = rope.pop("rope_theta", raw.get("rope_theta", DeepSeekV3Config.rope_theta))
    if "original_max_position_embeddings" in raw:
        rope["original_max_position_embeddings"] = raw["original_max_position_embeddings"]
    if rope.get("rope_type", rope.get("type", "default")) == "default":
        return {"rope_theta": theta, "rope_scaling": None}
    check_yarn(rope, theta)
    return {"rope_theta": theta, "rope_scaling": rope}


def check_yarn(rope, theta):
    if (kind := rope.get("rope_type", rope.get("type"))) != "yarn":
        raise ValueError(f"rope_scaling of type {repr(kind)[:100]} is not supported, only 'yarn' is")
    if rope.get("factor") is None:
        raise ValueError(f"rope_scaling needs a 'factor' for YaRN, got {repr(rope)[:200]}")
    for key, least in {"factor": 1, "original_max_position_embeddings": 1, "beta_fast": 0, "beta_slow": 0, "mscale": 0,
                       "mscale_all_dim": 0, "attention_factor": 0}.items():
        if (value := rope.get(key)) is not None and read_value(f"rope_scaling['{key}']", int | float, value) < least:
            raise ValueError(f"rope_scaling['{key}'] must be at least {least}, got {value}")
    fast, slow = rope.get("beta_fast") or 32, rope.get("beta_slow") or 1
    if not 1e-3 < slow <= fast:
        raise ValueError(f"rope_scaling['beta_slow'] must be over 0.001 and at most beta_fast, got {slow} and {fast}")
    if theta == 1:
        raise ValueError("rope_theta must be over 1 for YaRN, got 1")
    if rope.get("truncate", True) is not True:
        raise ValueError("rope_scaling['truncate'] = false is not supported; DeepSeek-V3 rounds YaRN's range")


def count_dense(kinds, layers):
    """first_k_dense_replace out of mlp_layer_types, which says "dense" or "sparse" for each layer."""
    if isinstance(kinds, list) and len(kinds) >= layers:
        dense = next((i for i, kind in enumerate(kinds) if kind != "dense"), len(kinds))
        if all(kind == "sparse" for kind in kinds[dense:layers]):
            return dense
    raise ValueError(f"mlp_layer_types={repr(kinds)[:100]} is not supported; it must be 'dense' for the first layers and "
                     f"'sparse' for the rest, {layers} in all")


def find_tensors(dir):
    """The safetensors files of a folder -> {tensor's name: Stored}, from their headers only, and {name: file} of what
    the index names in files that are not there."""
    index, weight_map, files = dir / "model.safetensors.index.json", {}, ["model.safetensors"]
    if index.is_file():
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict):
            raise ValueError(f"{index} has no weight_map")
        files = list(dict.fromkeys(map(str, weight_map.values())))
    elif not (dir / files[0]).is_file():
        raise ValueError(f"{dir} has no {files[0]}; {SAFETENSORS_ONLY}")
    stored = {}
    for file in files:
        path = dir / file
        if file != path.name or not file.endswith(".safetensors"):
            raise ValueError(f"{index} names {file!r}, which is no safetensors file of its own folder")
        if path.is_file():
            with open_safetensors(path) as f:
                for name in f.keys():
                    if name in stored:
                        raise ValueError(f"{dir} has {name} in two files, {stored[name].file.name} and {file}")
                    view = f.get_slice(name)
                    stored[name] = Stored(path, view.get_dtype(), tuple(view.get_shape()))
    for name, file in weight_map.items():
        if name in stored and stored[name].file.name != file:
            raise ValueError(f"{index} says that {name} is in {file}, which doesn't hold it")
    lost = {file for file in files if not (dir / file).is_file()}
    return stored, {name: file for name, file in weight_map.items() if file in lost}


def open_safetensors(file):
    lib = safetensors()
    try:
        return lib.safe_open(file, "pt")
    except (lib.SafetensorError, OSError, ValueError, RuntimeError) as e:
        raise ValueError(f"{file} is damaged or no safetensors file: {' '.join(str(e).split())[:200]}") from None


def safetensors():
    try:
        import safetensors.torch
        return safetensors
    except ImportError:
        raise ImportError("released checkpoints need the safetensors package: pip install safetensors") from None


def released_tensors(model):
    """{name in a released checkpoint: tensor}, each expert by itself; and {name: name} of those that only repeat
    another tensor: embedding and head of the MTP modules, and a tied head."""
    tensors = {}
    for name, tensor in model.state_dict().items():
        stem, _, kind = name.rpartition(".")
        if stem.endswith(".mlp.experts"):
            kind, suffix = kind.removesuffix("_scale_inv"), "_scale_inv" if kind.endswith("_scale_inv") else ""
            tensors |= {f"{stem}.{e}.{kind}.weight{suffix}": tensor[e] for e in range(len(tensor))}
        else:
            tensors[name] = tensor
    copies = {"lm_head.weight": "model.embed_tokens.weight"} if model.config.tie_word_embeddings else {}
    for i in range(model.config.num_hidden_layers, len(model.model.layers)):
        for name, shared in ("embed_tokens", "model.embed_tokens.weight"), ("shared_head.head", "lm_head.weight"):
            tensors[f"model.layers.{i}.{name}.weight"] = tensors[shared]
            copies[f"model.layers.{i}.{name}.weight"] = shared
    return tensors, copies


@torch.no_grad()
def load(cls, dir, dtype=None, device=None, **changes):
    """DeepSeekV3.from_pretrained; cls: DeepSeekV3."""
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise ValueError(f"dtype must be a floating-point torch.dtype such as torch.bfloat16, got {dtype!r}")
    dir = released_folder(dir)
    config = dataclasses.replace(read_config(dir), **changes)
    stored, absent = find_tensors(dir)
    # MTP modules beyond config's are left out; Hugging Face drops them, so the files may hold none of config's
    names, end = stored.keys() | absent.keys(), config.num_hidden_layers + config.num_nextn_predict_layers
    numbers = {layer_number(name) for name in names}
    left_out = sorted(n for n in numbers if n >= end and f"model.layers.{n}.eh_proj.weight" in names)
    if left_out and "num_nextn_predict_layers" not in changes:
        print(f"{dir}: left out MTP layer {', '.join(map(str, left_out))}, which is beyond the num_nextn_predict_layers="
              f"{config.num_nextn_predict_layers} of config.json", file=sys.stderr)
    stored = {name: at for name, at in stored.items() if layer_number(name) not in left_out}
    if not any(config.num_hidden_layers <= n < end for n in numbers):
        config = dataclasses.replace(config, num_nextn_predict_layers=0)
    model = on_meta(cls, check_size(dir, config, len(names)), dir)
    expected, copies = released_tensors(model)
    check_tensors(dir, expected, copies, stored, absent)

    dtype = dtype or STORED_DTYPES.get(stored["model.embed_tokens.weight"].dtype, torch.bfloat16)
    if dtype == torch.float8_e4m3fn:
        from fp8 import hold_in_fp8, quantize_reference     # brings Triton, slow to import
        model = hold_in_fp8(model.to(torch.bfloat16))
    model = (model if dtype == torch.float8_e4m3fn else model.to(dtype)).to_empty(device=device or "cpu")
    if config.tie_word_embeddings:
        model.lm_head.weight = model.model.embed_tokens.weight      # to_empty parts them
    targets, _ = released_tensors(model)
    for name in progress([n for n in stored if n in expected and n not in copies], f"reading {dir}"):
        tensor, scale = read_weight(stored, name)
        if name + "_scale_inv" in targets:
            tensor, scale = quantize_reference(tensor, 128) if scale is None else (tensor, scale)
            targets[name + "_scale_inv"].copy_(scale)
        else:
            tensor = dequantize(tensor, scale)
        targets[name].copy_(tensor)
    for name, original in copies.items():
        if name in stored and not same(dequantize(*read_weight(stored, name)), targets[original]):
            raise ValueError(f"{dir}: {name} differs from {original}, but the model has one tensor for both; " + (
                "set tie_word_embeddings to false in config.json" if name == "lm_head.weight" else
                "set num_nextn_predict_layers to 0 in config.json, to load the main model alone"))
    model.source_files = read_side_files(dir)
    return model.eval()


def layer_number(name):
    """The N of model.layers.N.; -1 for a tensor outside the layers."""
    match = re.match(r"model\.layers\.(\d{1,9})\.", name)
    return int(match[1]) if match else -1


def check_size(dir, config, count):
    """config, if `count` tensors can be enough for it. ValueError before a hostile one is built, be it on meta."""
    layers, depth = config.num_hidden_layers, config.num_nextn_predict_layers
    moe_layers = max(layers - config.first_k_dense_replace, 0) + depth
    if layers + depth > count or 3 * config.n_routed_experts * moe_layers > count:
        raise ValueError(f"{dir} holds {count} tensors, too few for the {layers} layers, {depth} MTP modules and "
                         f"{config.n_routed_experts} experts of its config.json")
    return config


def on_meta(cls, config, origin):
    """The model without memory for its weights. ValueError if they are more than numbers can count."""
    try:
        with torch.device("meta"):
            return cls(config)
    except (RuntimeError, TypeError) as e:
        raise ValueError(f"{origin} has a config of an impossible size ({' '.join(str(e).split())[:100]})") from None


def check_tensors(dir, expected, copies, stored, absent):
    """Account for every tensor before any memory is spent."""
    missing, wrong = [name for name in expected if name not in stored and name not in copies], []
    # nothing is lost with an empty tensor: transformers writes them for n_shared_experts 0
    unexpected = {name for name, at in stored.items()
                  if name not in expected and not name.endswith(".rotary_emb.inv_freq") and 0 not in at.shape}
    for name in expected.keys() & stored.keys():
        _, dtype, shape = stored[name]
        if shape != tuple(expected[name].shape):
            wrong.append(f"{name} has the shape {shape} instead of {tuple(expected[name].shape)}")
        elif dtype == "F8_E4M3" and len(shape) == 2:
            scale, blocks = name + "_scale_inv", tuple(-(-n // 128) for n in shape)
            unexpected.discard(scale)
            if scale not in stored:
                missing.append(scale)
            elif stored[scale].shape != blocks or stored[scale].dtype not in SCALE_DTYPES:
                wrong.append(f"{scale} is {stored[scale].dtype} {stored[scale].shape} instead of F32 {blocks}")
        elif dtype not in STORED_DTYPES:
            wrong.append(f"{name} has the dtype {dtype}, which is none of {', '.join(STORED_DTYPES)} or F8_E4M3")
    for name in missing:
        if name in absent:
            raise ValueError(f"{dir} has no {absent[name]}, which holds {show(name)}; {SAFETENSORS_ONLY}")
    parts = [f"{what} {', '.join(map(show, sorted(names)[:10]))}" + f" and {len(names) - 10} more" * (len(names) > 10)
             for what, names in (("missing", missing), ("unexpected", unexpected), ("wrong:", wrong)) if names]
    if parts:
        raise ValueError(f"the tensors of {dir} don't fit its config.json: {'; '.join(parts)}")


def show(text):
    """What a file says, fit for a terminal."""
    return text if text.isprintable() and len(text) < 250 else ascii(text)[:250]


def read_weight(stored, name):
    """A tensor and, where it is stored in FP8, the scale of each 128x128 block in fp32, else None."""
    tensor = read_tensor(stored[name].file, name)
    if stored[name].dtype != "F8_E4M3":
        return tensor, None
    name += "_scale_inv"
    scale = read_tensor(stored[name].file, name).float()
    if not (scale.isfinite() & (scale >= 0)).all():
        raise ValueError(f"{stored[name].file}: {name} holds scales that are negative or not finite; the file is damaged")
    return tensor, scale


def read_tensor(file, name):
    """One tensor, on the CPU. Each maps the file by itself: pages stay in memory as long as their mapping does."""
    with open_safetensors(file) as f:
        return f.get_tensor(name)


def dequantize(tensor, scale):
    if scale is None:
        return tensor
    from fp8 import weight_dequant
    return weight_dequant(tensor, scale)


def same(copy, weight):
    """Whether a stored copy repeats a weight of the model, in the dtype of either."""
    return torch.equal(copy.to(weight), weight) or torch.equal(copy, weight.to(copy))


def read_side_files(dir):
    """model.source_files: {name: text} of what stands beside the weights, and of config.json the special tokens' ids."""
    texts, room = {}, SIDE_BYTES
    for path in sorted([*dir.iterdir(), *dir.glob("additional_chat_templates/*")]):
        name = path.relative_to(dir).as_posix()
        if SIDE_FILES.fullmatch(name) and path.is_file():
            try:
                with open(path, "rb") as f:
                    content = f.read(room + 1)
                if len(content) <= room:
                    texts[name] = content.decode("utf-8")
                    room -= len(content)
            except (OSError, UnicodeDecodeError):
                pass    # the weights are as good without it
    raw = read_json(dir / "config.json")
    ids = {key: raw[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id") if are_ids(raw.get(key))}
    return texts | {"config.json": json.dumps(ids)}


def are_ids(value):
    return value is not None and all(type(i) is int for i in (value if isinstance(value, list) else [value]))


def is_quantized(name):
    """Whether the release holds this tensor in FP8: the matrices of attention and MLPs, experts included. The embedding,
    the head, norms, gates and eh_proj stay in bf16."""
    return (".self_attn." in name or ".mlp." in name) and "norm" not in name and ".gate." not in name


def stored_size(name, t, fp8):
    """Bytes of a tensor in a file."""
    if fp8 and is_quantized(name):      # a byte each, and an fp32 scale per block
        return t.numel() + 4 * math.prod(-(-n // 128) for n in t.shape)
    return t.numel() * (2 if fp8 and "e_score" not in name else t.element_size())


@torch.no_grad()
def save(model, dir, encoding=None, fp8=False, shard_bytes=5 * 10**9, ends=None):
    """DeepSeekV3.save_pretrained. Everything is written under temporary names first; then the old checkpoint goes."""
    check_plain(model)
    dir, (tensors, copies) = Path(dir), released_tensors(model)
    if model.config.tie_word_embeddings:
        del tensors["lm_head.weight"]
    shards, room = [], 0        # names of tensors, for each file
    for name, t in tensors.items():
        if stored_size(name, t, fp8) > room or not shards:
            shards.append([])
            room = shard_bytes
        shards[-1].append(name)
        room -= stored_size(name, t, fp8)
    files = {f"model-{i:05}-of-{len(shards):05}.safetensors": names for i, names in enumerate(shards, 1)}
    files = files if len(shards) > 1 else {"model.safetensors": shards[0]}

    side, ids = side_files(model, encoding, ends)
    config = {**dataclasses.asdict(model.config), "architectures": ["DeepseekV3ForCausalLM"],
              "model_type": "deepseek_v3", "num_key_value_heads": model.config.num_attention_heads,
              "hidden_act": "silu", "attention_bias": False, "attention_dropout": 0.0, "moe_layer_freq": 1,
              "scoring_func": "sigmoid", "topk_method": "noaux_tc", "bos_token_id": None, "eos_token_id": None, **ids,
              "torch_dtype": "bfloat16" if fp8 else str(model.lm_head.weight.dtype).removeprefix("torch.")}
    if fp8:
        config["quantization_config"] = FP8_FORMAT
    texts = {"config.json": json.dumps(config, indent=2) + "\n", **side}
    if len(files) > 1:
        weight_map = {name: file for file, names in files.items() for name in names}
        if fp8:
            weight_map |= {name + "_scale_inv": file for name, file in weight_map.items() if is_quantized(name)}
        total = sum(stored_size(name, t, fp8) for name, t in tensors.items())
        texts["model.safetensors.index.json"] = json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map},
                                                           indent=2) + "\n"

    lib, tmp, new = safetensors(), ".tmp", [*texts, *files]
    dir.mkdir(parents=True, exist_ok=True)
    old = old_files(dir) - {file + tmp for file in new} - set(new)
    if encoding is not None and "generation_config.json" not in texts:
        old.add("generation_config.json")       # of another tokenizer, whose ids would override those of config.json
    try:
        for file, text in texts.items():
            (dir / file).parent.mkdir(exist_ok=True)
            (dir / (file + tmp)).write_bytes(text.encode())
        for file, names in progress(list(files.items()), f"writing {dir}"):
            shard = {}
            for name in names:
                shard |= to_stored(name, tensors[name].clone() if name in copies else tensors[name], fp8)
            lib.torch.save_file(shard, dir / (file + tmp), metadata={"format": "pt"})
            shutil.copymode(dir / ("config.json" + tmp), dir / (file + tmp))    # safetensors makes it unreadable for others
        for file in new:
            with open(dir / (file + tmp), "rb+") as f:
                os.fsync(f.fileno())
    except (lib.SafetensorError, OSError) as e:     # a full disk, a folder that can't be written
        for file in new:
            (dir / (file + tmp)).unlink(missing_ok=True)
        raise OSError(f"{dir / file} can't be written ({' '.join(str(e).split())[:200]}); an earlier checkpoint in {dir} is "
                      "intact: make room, or save to another folder") from None
    (dir / "config.json").unlink(missing_ok=True)       # from here until it is back, this is no checkpoint
    for file in old:
        (dir / file).unlink(missing_ok=True)
    for file in reversed(new):
        os.replace(dir / (file + tmp), dir / file)


def check_plain(model):
    """ValueError for a model that the released format can't describe."""
    shapes = {(name, t.shape) for name, t in model.state_dict().items()}
    if any(name.endswith("_scale_inv") for name, _ in shapes):
        raise ValueError("this model holds its weights in FP8, for inference only; load it with dtype=torch.bfloat16 "
                         "and save it with fp8=True")
    plain = on_meta(DeepSeekV3, model.config, "the model").state_dict()
    odd = replaced_classes(model) or sorted({name for name, _ in shapes ^ {(n, t.shape) for n, t in plain.items()}})
    if odd:
        raise ValueError(f"{', '.join(odd[:5])}: not as in model.py, which readers of a released checkpoint expect; put "
                         "the original classes back, and merge adapters into the weights")


def to_stored(name, t, fp8):
    """{name: tensor} of what a file holds for a tensor."""
    if fp8 and is_quantized(name):
        from fp8 import quantize_reference
        q, scale = quantize_reference(t, 128)
        return {name: q.contiguous(), name + "_scale_inv": scale}
    return {name: (t.to(torch.bfloat16) if fp8 and "e_score" not in name else t).contiguous()}


def side_files(model, encoding, ends):
    """{name: text} of the tokenizer's files for an export, and the ids that belong into its config.json."""
    source = getattr(model, "source_files", {})
    if encoding is None or is_tokenizer_of(source, encoding):
        kept = {name: text for name, text in source.items() if SIDE_FILES.fullmatch(name)}      # never ../x
        return kept, json.loads(source.get("config.json", "{}"))
    from data.tokenizer import tokenizer_files
    files = tokenizer_files(encoding, ends) if ends else tokenizer_files(encoding)
    ids = {key: files["tokenizer_config.json"].pop(key) for key in ("bos_token_id", "eos_token_id")}
    return {name: json.dumps(content, indent=2) + "\n" for name, content in files.items()}, ids


def is_tokenizer_of(source, encoding):
    """Whether the source's own tokenizer files give the ids of this tiktoken.Encoding."""
    from data.tokenizer import get_tokenizer, same_ids
    with tempfile.TemporaryDirectory() as dir:
        for name in source:
            if name == "config.json" or SIDE_FILES.fullmatch(name) and "/" not in name:
                Path(dir, name).write_bytes(source[name].encode())
        try:
            return same_ids(get_tokenizer(dir), encoding)
        except (ValueError, OSError):
            return False


def old_files(dir):
    """Names of an earlier checkpoint's weights in a folder: what its index names, and whatever is named like a shard. A
    reader that takes all safetensors files of the folder would mix them with the new ones."""
    named = ()
    with contextlib.suppress(ValueError, OSError):
        named = read_json(dir / "model.safetensors.index.json").get("weight_map")
    named = {str(file) for file in named.values()} if isinstance(named, dict) else ()
    return {path.name for path in dir.iterdir() if (path.is_file() or path.is_symlink()) and (
        WEIGHT_FILES.fullmatch(path.name) or path.suffix == ".safetensors" and path.name in named)}


def progress(items, what):
    """items, with a progress bar on a terminal: tqdm's where it is installed, else a line now and then."""
    if not (sys.stderr and sys.stderr.isatty()):
        yield from items
        return
    try:
        from tqdm import tqdm
    except ImportError:
        shown = time.monotonic()
        for i, item in enumerate(items):
            if time.monotonic() > shown + 5:
                print(f"{what}: {i} of {len(items)}", file=sys.stderr)
                shown = time.monotonic()
            yield item
    else:
        yield from tqdm(items, what, leave=False, delay=1)


def replaced_classes(model):
    """Names of the classes, methods and functions of a model that are not model.py's, fp8.py's or torch's own. Files hold
    their weights, but not what they compute with them."""
    home = sys.modules[DeepSeekV3.__module__]
    names = {name for name, value in vars(home).items() if inspect.isfunction(value) and is_foreign(value)}
    for module in model.modules():
        for cls in type(module).__mro__:
            if is_foreign(cls):
                names.add(cls.__name__)
        owners = [cls for cls in type(module).__mro__ if cls.__module__ in ("model", "fp8")]
        for owner in [*owners, module]:
            names |= {f"{getattr(owner, '__name__', type(module).__name__)}.{key}" for key, value in vars(owner).items()
                      if callable(value) and is_foreign(value)}
    return sorted(names)


def is_foreign(thing):
    origin = (getattr(thing, "__module__", None) or "").split(".")[0]
    return origin not in ("model", "fp8", "torch", "builtins", "dataclasses")
