"""
The files of a run of train.py, and released checkpoints: DeepSeek-V3 and its kin on the Hugging Face Hub.

A run's OUT/ckpt.pt is one dict, written by torch.save: the same for one process, DDP and FSDP. Its checksums
are verified before it replaces the file before it, and again whenever it is read.

A released folder holds config.json and model.safetensors, or shards of it with model.safetensors.index.json.
It differs from model.py in three things: each expert is a tensor by itself; the MTP modules, layers
num_hidden_layers and up, repeat embedding and head; and `weight` may be FP8 with a `weight_scale_inv` for
each 128x128 block, which multiplies. Use it as DeepSeekV3.from_pretrained and save_pretrained.
"""

import contextlib
import dataclasses
import inspect
import json
import math
import os
import re
import reprlib
import shutil
import sys
import tempfile
import zipfile
from collections import namedtuple
from functools import partial
from pathlib import Path

import safetensors.torch
import torch
import torch.distributed as dist

from data.prepare import progress
from data.tokenizer import blame, get_tokenizer, read_ends, read_json, same_ids, tokenizer_files
from model import DeepSeekV3, DeepSeekV3Config

# ----------------------------------------------------------------------------------------------------------
# What the scripts share

def pick_device(name="auto"):
    """--device -> torch.device; under torchrun, each of a machine's processes has a GPU of its own."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    local_rank = os.environ.get("LOCAL_RANK")
    try:
        device = torch.device(f"cuda:{local_rank}" if name == "cuda" and local_rank else name)
        torch.zeros(1, device=device).item()        # fails on "meta" too
        if device.type == "cuda" and device.index is not None:
            torch.cuda.set_device(device)
    except (RuntimeError, AssertionError) as e:
        raise ValueError(f"--device {name} can't be used ({one_line(e)}); choose cuda, mps or cpu") from None
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
    new = not os.path.lexists(out_dir)
    if not new and not out_dir.is_dir():
        raise ValueError(f"--out_dir {out_dir} is a file; give a folder")
    out_dir.mkdir(parents=True, exist_ok=True)
    with open(out_dir / "lock", "w") as f:
        with contextlib.suppress(ImportError, OSError):     # Windows and some network drives have no locks
            import fcntl
            try:
                fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise ValueError(f"another process is training in {out_dir}; let it end, or choose another "
                                 "--out_dir") from None
        try:
            yield
        finally:
            with contextlib.suppress(OSError):      # somebody moved the folder
                if new and os.listdir(out_dir) == ["lock"]:     # nothing came of it
                    (out_dir / "lock").unlink()
                    out_dir.rmdir()


@contextlib.contextmanager
def writing(path):
    """A full disk, a quota or a lost network drive ends the program in one sentence."""
    try:
        yield
    # torch.save and safetensors turn the OSError of a write into their own; the last two are check_zip's
    except (OSError, RuntimeError, safetensors.SafetensorError, EOFError, zipfile.BadZipFile) as e:
        reason = next((x.strerror for x in (e, e.__context__) if getattr(x, "strerror", None)), one_line(e))
        raise OSError(f"{path} can't be written ({reason}); what was there is intact: make room, then start "
                      "again, with --resume where a run has saved a checkpoint") from None


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


def check_zip(path):
    """An error if a bit of a tensor has flipped: torch.save writes a zip file, whose entries have CRC-32
    checksums, but torch.load does not look at them."""
    with zipfile.ZipFile(path) as f:
        if damaged := f.testzip():
            raise zipfile.BadZipFile(f"{damaged} fails its checksum")


def save_run(out_dir, run, model, optimizers, ema=None):
    """Write a run's dict, with all tensors, to OUT/ckpt.pt and read it back; the file before it stays as
    OUT/ckpt.prev.pt. A copy becomes OUT/best.pt if no earlier loss was lower. All ranks call it."""
    run = {**run, "model": whole(model.state_dict()), "rng_state": torch.get_rng_state(),
           "optimizers": [whole(optimizer.state_dict()) for optimizer in optimizers]}
    if ema:
        run["ema"] = whole(ema.module.state_dict())
    if not dist.is_initialized() or dist.get_rank() == 0:
        write_atomically(out_dir / "ckpt.pt", partial(torch.save, run), check_zip, out_dir / "ckpt.prev.pt")
        if run["state"]["best"]["iter"] == run["state"]["step"]:
            keep_best(out_dir / "ckpt.pt")
    if dist.is_initialized():
        dist.barrier()      # torchrun ends all ranks when one ends, so none may before the file is there


def keep_best(path):
    """A copy of a checkpoint as best.pt."""
    with open(path, "rb") as f:
        write_atomically(path.with_name("best.pt"), partial(shutil.copyfileobj, f), check_zip)


def best_of(out_dir):
    """state["best"] of a run's best.pt, as good as nothing where that is missing or damaged."""
    try:
        return load_run(out_dir / "best.pt")["state"]["best"]
    except ValueError:
        return {"val_loss": math.inf, "iter": 0}


def whole(state):
    """A state_dict with FSDP's shards as whole tensors, on rank 0's CPU alone. All ranks call it."""
    if isinstance(state, dict):
        return {key: whole(value) for key, value in state.items()}
    if hasattr(state, "full_tensor"):
        tensor = state.full_tensor()
        return tensor.cpu() if dist.get_rank() == 0 else None
    return state


def load_run(path):
    """-> the dict that save_run wrote, with tensors on the CPU and under "path" the file it came from.

    path: such a file, or the folder of a run, whose newest good checkpoint is taken: ckpt.pt, or ckpt.prev.pt
    where that is damaged, or missing after a kill between two renames. No pickled code is executed.
    ValueError if there is none.
    """
    path, faults = Path(path), []
    files = [path / "ckpt.pt", *path.glob("ckpt.prev.pt")] if path.is_dir() else [path]
    for file in files:
        try:
            check_zip(file)
            # under torchrun the ranks of a machine share one mapping of the file, and read only what they use
            run = torch.load(file, map_location="cpu", weights_only=True, mmap=dist.is_initialized())
            break
        except FileNotFoundError:
            best = file.with_name("best.pt")
            hint = (f"copy {best} to it to continue from there" if best.exists()
                    else "train.py saves it at its first evaluation")
            faults.append(f"there is no checkpoint {file}; {hint}")
        except Exception as e:      # torch.load raises whatever the damaged bytes lead to
            faults.append(f"{file} is damaged or not a checkpoint ({one_line(e)}); restore it from a copy, "
                          "such as best.pt, or start a new run in another --out_dir")
    else:
        raise ValueError("; ".join(faults))
    with fitting(file):
        if run["format"] != FORMAT:
            raise ValueError(f"its format is {run['format']} instead of {FORMAT}")
        if faults:
            print(f"{files[0]} is damaged or missing: using the one before it, {file}, of step "
                  f"{run['state']['step']}", file=sys.stderr)
        return run | {"path": str(file)}


def fitting(path):
    """One sentence for a checkpoint whose contents this code can't use, as other code wrote them."""
    return blame(f"{path} doesn't fit this version of model.py and train.py (use the files that it was "
                 "trained with, or start a new run in another --out_dir)")


def model_of_run(run, weights="model"):
    """The model of a run with the run's own tensors as weights, or with its average's ("ema"). ValueError
    unless its classes are those that the run was trained with."""
    with fitting(run["path"]), torch.device("meta"):
        config = DeepSeekV3Config(**run["config"])
        if max(config.num_hidden_layers, config.num_nextn_predict_layers) > len(run["model"]):
            raise ValueError("more layers than tensors")       # would take forever to build
        model = DeepSeekV3(config)
        replaced = replaced_classes(model)
        if run["replaced"] != replaced:
            before, now = (", ".join(names) or "nothing" for names in (run["replaced"], replaced))
            raise ValueError(f"it was trained with these parts of model.py replaced: {before}; replaced now: "
                             f"{now}; replace the same ones first")
        model.load_state_dict(run[weights], assign=True)
        model.source_files = run["source_files"]
    return model


def load_shards(model, weights):
    """Fill a model that FSDP has sharded from rank 0's whole state_dict; other ranks' may be on "meta"."""
    model.load_state_dict({name: shards(weights[name], like) for name, like in model.state_dict().items()})


def load_optimizer(optimizer, saved):
    """Its state is numbered by parameter, in the order of its groups."""
    params = [p for group in optimizer.param_groups for p in group["params"]]
    if hasattr(params[0], "device_mesh"):
        saved = {**saved, "state": {i: {key: shards(t, like=params[i]) if t.dim() else t
                                        for key, t in state.items()} for i, state in saved["state"].items()}}
    optimizer.load_state_dict(saved)


def shards(tensor, like):
    """Rank 0's whole tensor, on the device of `like` and sharded as that is, if it is."""
    from torch.distributed.tensor import distribute_tensor      # slow to import
    tensor = tensor.to(like.device) if dist.get_rank() == 0 else torch.empty_like(tensor, device=like.device)
    if hasattr(like, "device_mesh"):
        return distribute_tensor(tensor, like.device_mesh, like.placements)
    dist.broadcast(tensor, 0)
    return tensor


# ------------------------------------------------------------------------------------------------------------
# Released checkpoints

FLOATS = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
FP8_FORMAT = {"activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8",
              "weight_block_size": [128, 128]}
# What a config.json says besides the fields of DeepSeekV3Config
ALSO = {"hidden_act": "silu", "scoring_func": "sigmoid", "topk_method": "noaux_tc", "moe_layer_freq": 1,
        "attention_bias": False, "attention_dropout": 0.0}
# Keys that must be absent, null or this: no tensor would show another value
FIXED = {**ALSO, "rope_interleave": True, "partial_rotary_factor": 1, "truncate": True, "index_topk": None,
         "sliding_window": None}
# The model types that compute what DeepSeek-V3 does, with defaults of their own
SAME_MODEL = {"deepseek_v3": {}, "kimi_k2": {},
              "glm4_moe_lite": {"n_group": 1, "topk_group": 1, "num_experts_per_tok": 4, "rms_norm_eps": 1e-5,
                                "first_k_dense_replace": 1, "routed_scaling_factor": 1.8,
                                "max_position_embeddings": 202752}}
OTHER_MODELS = {"deepseek_v2": "its router uses a softmax", "deepseek_v32": "its attention is sparse",
                "deepseek_v4": "its attention is not MLA"}
INDEX = "model.safetensors.index.json"
# What says where texts begin and end, and how chats are written: an export keeps these files
SIDE_FILES = re.compile(r"(config|generation_config|tokenizer|tokenizer_config|special_tokens_map"
                        r"|added_tokens)\.json|tiktoken\.model|tokenization_\w+\.py"
                        r"|chat_template\.(json|jinja)")
Stored = namedtuple("Stored", "file dtype shape")       # of a tensor, as its file's header says


def released_folder(name):
    """The folder of a path or, if there is none, of an id on the Hugging Face Hub (owner/name), which
    huggingface_hub downloads. ImportError without that, ValueError if the Hub refuses."""
    path = Path(name)
    if len(path.parts) != 2 or path.parent.exists():
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
    return " ".join(str(e).split())[:200] or type(e).__name__


# ----------------------------------------------------------------------------------------------- config.json

def read_config(dir):
    """The DeepSeekV3Config of a folder's config.json, in the release's form or that of transformers 5.

    Keys that don't concern the model are ignored; what can't be honoured, such as another scoring function,
    is a ValueError. Absent keys have the model type's defaults, but there is no MTP unless it says so.
    """
    path = Path(dir) / "config.json"
    if not path.is_file():
        raise ValueError(f"{dir} is no folder with a config.json")
    raw = read_json(path)
    with blame(path):
        kind = str(raw.get("model_type", "deepseek_v3"))
        if kind not in SAME_MODEL:
            why = OTHER_MODELS.get(kind, "only models that compute the same as DeepSeek-V3 are")
            raise ValueError(f"model_type={reprlib.repr(kind)} is not supported: {why}")
        check_fixed(raw, FIXED)
        check_fixed(section(raw, "quantization_config"), FP8_FORMAT)
        raw = {"num_nextn_predict_layers": 0, **SAME_MODEL[kind], **raw, **read_rope(raw)}
        may_be_null = "num_nextn_predict_layers", "n_shared_experts"        # which means 0
        raw |= {key: 0 for key in may_be_null if raw.get(key, 0) is None}
        if (kinds := raw.get("mlp_layer_types")) is not None:       # in place of first_k_dense_replace
            dense = raw["first_k_dense_replace"] = kinds.count("dense")
            if kinds != ["dense"] * dense + ["sparse"] * (len(kinds) - dense):
                raise ValueError(f"mlp_layer_types={reprlib.repr(kinds)} is not supported, only 'dense' for "
                                 "the first layers and 'sparse' for the rest")
        return DeepSeekV3Config(**{f.name: raw[f.name] for f in dataclasses.fields(DeepSeekV3Config)
                                   if f.name in raw})


def read_rope(raw):
    """rope_theta and rope_scaling, or both in rope_parameters, which transformers 5 writes but reads last."""
    scaling, parameters = section(raw, "rope_scaling"), section(raw, "rope_parameters")
    rope = {"rope_theta": raw.get("rope_theta", 10000), **(scaling or parameters)}
    if "original_max_position_embeddings" in raw:
        rope["original_max_position_embeddings"] = raw["original_max_position_embeddings"]
    check_fixed(rope, FIXED)
    theta = rope.pop("rope_theta")
    for key, value in rope.items():
        if isinstance(value, dict):
            raise ValueError(f"{reprlib.repr(key)} of RoPE is not supported: all layers must share one RoPE")
    plain = rope.get("rope_type", rope.get("type", "default")) == "default"
    scaling = {key: value for key, value in rope.items() if key not in FIXED}
    return {"rope_theta": theta, "rope_scaling": None if plain else scaling}


def check_fixed(section, fixed):
    for key, value in section.items():
        # null is the same as absent, except for rope_interleave, where transformers takes null for false
        if value != fixed.get(key, value) and (value is not None or key == "rope_interleave"):
            raise ValueError(f"{key}={reprlib.repr(value)} is not supported, only {fixed[key]!r} is")


def section(raw, name):
    """A section of a JSON file that may hold anything; {} where it is null or absent."""
    if not isinstance(value := raw.get(name), dict | None):
        raise ValueError(f"{name} must be of type dict, got {reprlib.repr(value)}")
    return value or {}


# --------------------------------------------------------------------------------------------------- loading

def find_tensors(dir):
    """A folder's safetensors files -> {tensor's name: Stored}, from their headers, and the absent files."""
    files, stored, absent = ["model.safetensors"], {}, []
    if (dir / INDEX).is_file():
        with blame(dir / INDEX):
            shards = sorted({str(file) for file in read_json(dir / INDEX)["weight_map"].values()})
        present = {path.name for path in dir.iterdir()}
        if present.isdisjoint(files) or present.intersection(shards):   # else only the index was left over
            files = shards
    for file in files:
        if not re.fullmatch(r"[^/\\:\0]{1,200}\.safetensors", file):
            raise ValueError(f"{dir / INDEX} names {file[:200]!r}; only safetensors files of its own folder "
                             "are read")
        path = dir / file
        if not path.is_file():
            absent.append(file)
            continue
        try:
            with safetensors.safe_open(path, "pt") as f:
                for name in f.keys():
                    view = f.get_slice(name)
                    stored[name] = Stored(path, view.get_dtype(), tuple(view.get_shape()))
        except (safetensors.SafetensorError, OSError, ValueError, RuntimeError) as e:
            raise ValueError(f"{path} is damaged or no safetensors file: {one_line(e)}") from None
    return stored, absent


def read_tensor(stored, name):
    """A tensor as it is stored. Opens the file each time, as all that was read stays in memory until then."""
    with safetensors.safe_open(stored[name].file, "pt") as f:
        return f.get_tensor(name)


def read_weight(stored, name, in_fp8=False, pow2=False):
    """A tensor and, to hold it in FP8, the fp32 scale of each 128x128 block, else None."""
    tensor, scale = read_tensor(stored, name), None
    if stored[name].dtype == "F8_E4M3":
        scale = read_tensor(stored, name + "_scale_inv").float()
        if not (scale.isfinite() & (scale >= 0)).all():
            raise ValueError(f"{stored[name].file} is damaged: {name}_scale_inv holds scales that are "
                             "negative or not finite")
    if in_fp8 == (scale is not None):
        return tensor, scale
    from fp8 import dequantize, quantize_reference      # imports Triton, which is slow
    return quantize_reference(tensor, 128, pow2) if in_fp8 else (dequantize(tensor, scale), None)


def released_tensors(model):
    """{name in a released checkpoint: tensor}, each expert by itself; and {name: name of the original} of
    copies: embedding and head of the MTP modules, and a tied head."""
    tensors = {}
    for name, tensor in model.state_dict().items():
        stem, _, last = name.rpartition(".")
        if stem.endswith(".mlp.experts"):       # stacked in up_proj and, if held in FP8, up_proj_scale_inv
            proj, scale, _ = last.partition("_scale_inv")
            tensors |= {f"{stem}.{e}.{proj}.weight{scale}": tensor[e] for e in range(len(tensor))}
        else:
            tensors[name] = tensor
    copies = {"lm_head.weight": "model.embed_tokens.weight"} if model.config.tie_word_embeddings else {}
    for i in range(model.config.num_hidden_layers, len(model.model.layers)):
        copies |= {f"model.layers.{i}.embed_tokens.weight": "model.embed_tokens.weight",
                   f"model.layers.{i}.shared_head.head.weight": "lm_head.weight"}
    return tensors | {name: tensors[original] for name, original in copies.items()}, copies


def find_model(cls, dir, changes):
    """The model of a folder, without memory for its weights, and {name: Stored} of its tensors. ValueError if
    they don't fit each other."""
    config, (stored, absent) = dataclasses.replace(read_config(dir), **changes), find_tensors(dir)
    main, depth, experts = config.num_hidden_layers, config.num_nextn_predict_layers, config.n_routed_experts
    if absent:
        dir = f"{dir}, where {listed(absent)} is missing (complete the download),"
    if not any(name.startswith(f"model.layers.{main}.") for name in stored):
        depth = 0       # Hugging Face saves no MTP modules
    moe_layers = max(main - config.first_k_dense_replace, 0) + depth
    if max(main + depth, 3 * experts * moe_layers) > len(stored):       # absurd sizes would take forever
        raise ValueError(f"the {len(stored)} tensors of {dir} are too few for the {main} layers, {depth} MTP "
                         f"modules and {experts} experts of its config.json")
    with blame(f"impossible sizes in the config.json of {dir}"), torch.device("meta"):
        model = cls(dataclasses.replace(config, num_nextn_predict_layers=depth))
    expected, copies = released_tensors(model)
    mtp = (re.fullmatch(r"(model\.layers\.\d{1,9}\.)eh_proj\.weight", name) for name in stored)
    if extra := tuple(m[1] for m in mtp if m and m[1] + "input_layernorm.weight" not in expected):
        print(f"{dir}: left out MTP layer {', '.join(extra)}*, as num_nextn_predict_layers is {depth}",
              file=sys.stderr)
    stored = {name: at for name, at in stored.items() if not name.startswith(extra)}
    check_tensors(dir, expected, copies, stored)
    if absent:
        print(f"{dir} holds all that the model and {depth} MTP modules need", file=sys.stderr)
    return model, stored


def check_tensors(dir, expected, copies, stored):
    """ValueError that names the missing, unexpected and wrong tensors."""
    wanted = {}     # name -> the shape and the dtypes it may have
    for name, tensor in expected.items():
        if name in stored or name not in copies:
            wanted[name] = tuple(tensor.shape), [*FLOATS, "F8_E4M3"] if tensor.dim() == 2 else [*FLOATS]
        if name in stored and stored[name].dtype == "F8_E4M3":
            blocks = tuple(-(-n // 128) for n in tensor.shape)
            wanted[name + "_scale_inv"] = blocks, [*FLOATS, "F8_E8M0"]
    faults = {
        "missing": wanted.keys() - stored.keys(),
        # transformers writes empty tensors for n_shared_experts 0
        "unexpected": [name for name in stored.keys() - wanted.keys()
                       if not name.endswith(".rotary_emb.inv_freq") and 0 not in stored[name].shape],
        "wrong:": [f"{name} is {at.dtype} {at.shape} instead of {'/'.join(dtypes)} {shape}"
                   for name, (shape, dtypes) in wanted.items()
                   if (at := stored.get(name)) and (at.shape != shape or at.dtype not in dtypes)]}
    said = [f"{fault} {listed(names)} ({len(names)} in all)" for fault, names in faults.items() if names]
    if said:
        raise ValueError(f"the tensors of {dir} don't fit its config.json: {'; '.join(said)}")


def listed(names):
    """The first of names that may come from a hostile file."""
    return ", ".join(ascii(name)[1:-1][:200] for name in sorted(names)[:6])


@torch.no_grad()
def load(cls, dir, dtype=None, device=None, **changes):
    """DeepSeekV3.from_pretrained; cls: DeepSeekV3."""
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise ValueError(f"dtype must be a floating-point torch.dtype such as torch.bfloat16, got {dtype!r}")
    dir = released_folder(dir)
    model, stored = find_model(cls, dir, changes)

    # Its memory
    quantization = read_json(dir / "config.json").get("quantization_config") or {}
    pow2 = quantization.get("scale_fmt") == "ue8m0"         # DeepSeek-V3.1
    dtype = dtype or FLOATS.get(stored["model.embed_tokens.weight"].dtype, torch.bfloat16)
    if dtype == torch.float8_e4m3fn:
        from fp8 import hold_in_fp8
        model = hold_in_fp8(model.to(torch.bfloat16), pow2)
    else:
        model = model.to(dtype)
    model = model.to_empty(device=device or "cpu")
    if model.config.tie_word_embeddings:
        model.lm_head.weight = model.model.embed_tokens.weight      # to_empty parts them

    targets, copies = released_tensors(model)       # what a tensor is a copy of comes before it
    names = [name for name in targets if name in stored and not name.endswith("_scale_inv")]
    for name in progress(names, f"reading {dir}"):
        target, target_scale = targets[name], targets.get(name + "_scale_inv")
        tensor, scale = read_weight(stored, name, target_scale is not None, pow2)
        if name not in copies:
            target.copy_(tensor)
            if target_scale is not None:
                target_scale.copy_(scale)
        # a copy may be stored in another dtype
        elif not torch.equal(tensor.to(target), target) and not torch.equal(tensor, target.to(tensor)):
            raise ValueError(f"{dir}: {name} differs from {copies[name]}, but the model has one tensor for "
                             "both; in config.json, set num_nextn_predict_layers to 0 to leave out MTP, or "
                             "tie_word_embeddings to false for a head of its own")
    for path in dir.iterdir():
        if SIDE_FILES.fullmatch(path.name) and path.is_file():
            with contextlib.suppress(OSError, UnicodeDecodeError):      # the weights are as good without it
                model.source_files[path.name] = path.read_bytes().decode()
    return model.eval()


# ---------------------------------------------------------------------------------------------------- saving

def is_quantized(name):
    """Whether the release holds this tensor in FP8: the matrices of attention and MLPs, experts included. The
    embedding, the head, norms, gates and eh_proj stay in bf16."""
    return (".self_attn." in name or ".mlp." in name) and "norm" not in name and ".gate." not in name


def as_stored(name, tensor, fp8, is_copy):
    """{name: tensor} as a file holds it, with the scales of FP8."""
    if fp8 and is_quantized(name):
        from fp8 import quantize_reference
        q, scale = quantize_reference(tensor, 128)
        return {name: q.contiguous(), name + "_scale_inv": scale}
    dtype = torch.bfloat16 if fp8 and "e_score" not in name else tensor.dtype
    return {name: tensor.to(dtype, copy=is_copy).contiguous()}      # safetensors refuses shared memory


@torch.no_grad()
def save(model, dir, encoding=None, fp8=False, shard_bytes=5 * 10**9, ends=None):
    """DeepSeekV3.save_pretrained. All is written in a folder inside dir, and then takes the place of an
    earlier checkpoint."""
    with torch.device("meta"):
        plain = DeepSeekV3(model.config).state_dict()
    if odd := replaced_classes(model) or sorted(model.state_dict().keys() ^ plain.keys()):
        raise ValueError(f"{', '.join(odd[:5])}: not as in model.py, which readers of a released checkpoint "
                         "expect; put the original classes back, merge adapters into the weights, and load "
                         "FP8 weights with dtype=torch.bfloat16")
    dir, (tensors, copies) = Path(dir), released_tensors(model)
    if model.config.tie_word_embeddings:
        del tensors["lm_head.weight"]
    parts, size = [[]], 0      # the names of each file's tensors
    for name, tensor in tensors.items():
        if parts[-1] and size + tensor.nbytes > shard_bytes:
            parts, size = [*parts, []], 0
        parts[-1].append(name)
        size += tensor.nbytes
    texts = config_and_side_files(model, encoding, fp8, ends)

    new, count, index, total = dir / "saving.tmp", len(parts), {}, 0
    try:
        with writing(dir):
            shutil.rmtree(new, ignore_errors=True)      # of a killed save
            new.mkdir(parents=True)
            for i, names in enumerate(progress(parts, f"writing {dir}"), 1):
                file = f"model-{i:05}-of-{count:05}.safetensors" if count > 1 else "model.safetensors"
                shard = {}
                for name in names:
                    shard |= as_stored(name, tensors[name], fp8, name in copies)
                safetensors.torch.save_file(shard, new / file, metadata={"format": "pt"})
                index |= dict.fromkeys(shard, file)
                total += sum(tensor.nbytes for tensor in shard.values())
            if count > 1:
                content = {"metadata": {"total_size": total}, "weight_map": index}
                texts[INDEX] = json.dumps(content, indent=2)
            for file, text in texts.items():
                (new / file).write_bytes(text.encode())
            for path in new.iterdir():
                shutil.copymode(new / "config.json", path)      # safetensors lets only the owner read a file
                with open(path, "rb+") as f:
                    os.fsync(f.fileno())        # not even a power cut costs the earlier checkpoint
        (dir / "config.json").unlink(missing_ok=True)       # without it, old and new files are no checkpoint
        for path in old_files(dir, texts):
            path.unlink()
        for path in sorted(new.iterdir(), key=lambda path: path.name == "config.json"):     # which comes last
            os.replace(path, dir / path.name)
    finally:
        shutil.rmtree(new, ignore_errors=True)


def old_files(dir, texts):
    """What a new checkpoint replaces: the index, the shards that it lists or that are named like shards (some
    readers take all of a folder), and what another tokenizer left, if the new one has its own files."""
    index = (dir / INDEX).read_text(errors="replace") if (dir / INDEX).is_file() else ""
    return [path for path in dir.iterdir() if path.is_file() and (
        re.fullmatch(r"model(-\d+-of-\d+)?\.safetensors(\.index\.json)?", path.name)
        or path.suffix == ".safetensors" and f'"{path.name}"' in index
        or SIDE_FILES.fullmatch(path.name) and texts.keys() & {"tokenizer.json", "tiktoken.model"})]


def config_and_side_files(model, encoding, fp8, ends):
    """{file name: text} of config.json and of the tokenizer's files: those that the model was loaded with,
    unless encoding is another tokenizer or the texts end in another token."""
    ends = ends or getattr(model, "ends", None)     # sample.load sets it to those of a run's data
    texts = {name: text for name, text in model.source_files.items()        # anything, from a hostile ckpt.pt
             if SIDE_FILES.fullmatch(str(name)) and isinstance(text, str)}
    if encoding is None or is_tokenizer_of(texts, encoding, ends):
        source = json.loads(texts.pop("config.json", "{}"))
    else:
        files = tokenizer_files(encoding, ends)
        source = {key: files["tokenizer_config.json"].pop(key) for key in ("bos_token_id", "eos_token_id")}
        texts = {name: json.dumps(content, indent=2) for name, content in files.items()}
    ids = {key: source.get(key) for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    config = {**dataclasses.asdict(model.config), **ALSO, **ids,
              "architectures": ["DeepseekV3ForCausalLM"], "model_type": "deepseek_v3",
              "num_key_value_heads": model.config.num_attention_heads,
              "torch_dtype": "bfloat16" if fp8 else str(model.lm_head.weight.dtype).removeprefix("torch.")}
    if fp8:
        config["quantization_config"] = FP8_FORMAT
    return {"config.json": json.dumps(config, indent=2), **texts}


def is_tokenizer_of(texts, encoding, ends):
    """Whether tokenizer files give the ids of a tiktoken.Encoding, and the end tokens in ends (None: any)."""
    with tempfile.TemporaryDirectory() as dir, contextlib.suppress(ValueError, OSError):
        for name, text in texts.items():
            Path(dir, name).write_bytes(text.encode())
        found = get_tokenizer(dir)
        return same_ids(found, encoding) and (ends is None or {*ends.eos} <= {*read_ends(dir, found).eos})


def replaced_classes(model):
    """Names of a model's classes, methods and functions that are not model.py's, fp8.py's or torch's own: a
    checkpoint holds their weights, but not what they compute."""
    source = vars(sys.modules[DeepSeekV3.__module__])
    things = [(name, value) for name, value in source.items()
              if inspect.isfunction(value) or isinstance(value, partial)]
    # model.py imports no module class of torch's by name
    of_torch = [name for name, value in source.items() if inspect.isclass(value)
                and issubclass(value, torch.nn.Module) and value.__module__.startswith("torch")]
    for module in model.modules():
        for owner in [module, *type(module).__mro__]:
            name = getattr(owner, "__name__", type(module).__name__)
            things.append((name, owner))
            if owner is module or owner.__module__ in ("model", "fp8"):
                things += [(f"{name}.{key}", value) for key, value in vars(owner).items() if callable(value)]

    def homes(thing):       # functools.wraps copies __module__, and torch.no_grad makes functions of its own
        names = getattr(thing, "__module__", None), getattr(thing, "__globals__", {}).get("__name__")
        return {(name or "").split(".")[0] for name in names}

    known = {"model", "fp8", "torch", "builtins", "dataclasses", ""}
    return sorted({*of_torch, *(name for name, thing in things if not homes(thing) <= known)})
