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
import json
import math
import os
import re
import shutil
import warnings
import zlib
from pathlib import Path

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
FP8_FORMAT = {"activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8", "weight_block_size": [128, 128]}


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


def released_tensors(model):
    """{name in a released checkpoint: tensor}, each expert by itself, and the names that only repeat another
    tensor: embedding and head of the MTP modules, and a tied head."""
    tensors = {}
    for name, tensor in model.state_dict().items():
        stem, _, kind = name.rpartition(".")
        if stem.endswith(".mlp.experts"):
            kind, suffix = kind.removesuffix("_scale_inv"), "_scale_inv" if kind.endswith("_scale_inv") else ""
            tensors |= {f"{stem}.{e}.{kind}.weight{suffix}": tensor[e] for e in range(len(tensor))}
        else:
            tensors[name] = tensor
    copies = {"lm_head.weight"} if model.config.tie_word_embeddings else set()
    for i in range(model.config.num_hidden_layers, len(model.model.layers)):
        for name, shared in ("embed_tokens", model.model.embed_tokens), ("shared_head.head", model.lm_head):
            tensors[f"model.layers.{i}.{name}.weight"] = shared.weight.detach()
            copies.add(f"model.layers.{i}.{name}.weight")
    return tensors, copies


@torch.no_grad()
def load(cls, dir, dtype=None, device=None, **changes):
    """DeepSeekV3.from_pretrained; cls: DeepSeekV3."""
    dir, E4M3 = released_folder(dir), torch.float8_e4m3fn
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise ValueError(f"dtype must be a floating-point torch.dtype such as torch.bfloat16, got {dtype!r}")
    config = dataclasses.replace(read_config(dir), **changes)
    where = find_tensors(dir)       # {name: (file, dtype, shape)}
    if dtype == E4M3 or any(stored == "F8_E4M3" for _, stored, _ in where.values()):
        from fp8 import hold_in_fp8, quantize_reference, weight_dequant     # brings Triton, slow to import
    layers, depth = config.num_hidden_layers, config.num_nextn_predict_layers
    if "num_nextn_predict_layers" in changes:       # the caller wants fewer than there are
        pattern = re.compile(r"model\.layers\.(\d{1,9})\.")
        where = {n: at for n, at in where.items() if not (m := pattern.match(n)) or int(m[1]) < layers + depth}
    if layers + depth <= len(where):
        there = {".".join(name.split(".")[:3]) for name in where}
        if not any(f"model.layers.{layers + k}" in there for k in range(depth)):
            config, depth = dataclasses.replace(config, num_nextn_predict_layers=0), 0
    moe_layers = max(layers - config.first_k_dense_replace, 0) + depth
    if layers + depth > len(where) or 3 * config.n_routed_experts * moe_layers > len(where):
        raise ValueError(f"{dir} holds {len(where)} tensors, too few for the {layers} layers, {depth} MTP modules and "
                         f"{config.n_routed_experts} experts of its config.json")
    model = on_meta(cls, config, dir)
    expected, copies = released_tensors(model)

    # Account for every tensor before any memory is spent
    missing, wrong = [n for n in expected if n not in where and n not in copies], []
    # nothing is lost with an empty tensor: transformers writes them for n_shared_experts 0
    unexpected = {n for n in where if n not in expected and not n.endswith(".rotary_emb.inv_freq") and 0 not in where[n][2]}
    for name in expected.keys() & where.keys():
        _, stored, shape = where[name]
        if shape != tuple(expected[name].shape):
            wrong.append(f"{name} has the shape {shape} instead of {tuple(expected[name].shape)}")
        elif stored == "F8_E4M3" and len(shape) == 2:
            scale, blocks = name + "_scale_inv", tuple(-(-n // 128) for n in shape)
            unexpected.discard(scale)
            if scale not in where:
                missing.append(scale)
            elif where[scale][1:] != ("F32", blocks):
                wrong.append(f"{scale} is {where[scale][1]} {where[scale][2]} instead of F32 {blocks}")
        elif stored not in STORED_DTYPES:
            wrong.append(f"{name} has the dtype {stored}, which is none of {', '.join(STORED_DTYPES)} or F8_E4M3")
    parts = [f"{what} {', '.join(n if n.isprintable() and len(n) < 250 else ascii(n)[:250] for n in sorted(names)[:10])}"
             + (f" and {len(names) - 10} more" if len(names) > 10 else "")
             for what, names in (("missing", missing), ("unexpected", unexpected), ("wrong:", wrong)) if names]
    if parts:
        raise ValueError(f"the tensors of {dir} don't fit its config.json: {'; '.join(parts)}")

    dtype = dtype or STORED_DTYPES.get(where["model.embed_tokens.weight"][1], torch.bfloat16)
    model = hold_in_fp8(model.to(torch.bfloat16)) if dtype == E4M3 else model.to(dtype)
    model = model.to_empty(device=device or "cpu")
    if config.tie_word_embeddings:
        model.lm_head.weight = model.model.embed_tokens.weight      # to_empty parts them
    targets = released_tensors(model)[0]
    for name in expected.keys() & where.keys() - copies:
        tensor, scale_name, scale = read_tensor(where[name][0], name), name + "_scale_inv", None
        if tensor.dtype == E4M3:
            scale = read_tensor(where[scale_name][0], scale_name)
            if not (scale.isfinite() & (scale >= 0)).all():
                raise ValueError(f"{dir}: {scale_name} holds scales that are negative or not finite; the file is damaged")
        if targets[name].dtype == E4M3:
            tensor, scale = (tensor, scale) if scale is not None else quantize_reference(tensor, 128)
            targets[scale_name].copy_(scale)
        elif scale is not None:
            tensor = weight_dequant(tensor, scale)
        targets[name].copy_(tensor)
    if config.tie_word_embeddings and "lm_head.weight" in where:
        head = read_tensor(where["lm_head.weight"][0], "lm_head.weight")
        if not torch.equal(head.to(model.lm_head.weight), model.lm_head.weight):
            raise ValueError(f"{dir} has an lm_head.weight other than its embedding, although its config.json says "
                             "tie_word_embeddings true; write false there")
    return model.eval()


def on_meta(cls, config, origin):
    """The model without memory for its weights. ValueError if they are more than numbers can count."""
    try:
        with torch.device("meta"):
            return cls(config)
    except (RuntimeError, TypeError) as e:
        raise ValueError(f"{origin} has a config of an impossible size ({' '.join(str(e).split())[:100]})") from None


def is_quantized(name):
    """Whether the release holds this tensor in FP8: the matrices of attention and MLPs, experts included. The embedding,
    the head, norms, gates and eh_proj stay in bf16."""
    return (".self_attn." in name or ".mlp." in name) and "norm" not in name and ".gate." not in name


def stored_size(name, t, fp8):
    """Bytes of a tensor in a checkpoint; t may be a stack of experts (E, M, N)."""
    if fp8 and is_quantized(name):      # a byte each, and an fp32 scale per block
        return t.numel() + 4 * t.shape[:-2].numel() * math.prod(-(-n // 128) for n in t.shape[-2:])
    return t.numel() * (2 if fp8 and "e_score" not in name else t.element_size())


@torch.no_grad()
def save(model, dir, encoding=None, fp8=False, shard_bytes=5 * 10**9):
    """DeepSeekV3.save_pretrained."""
    from fp8 import quantize_reference
    save_file, dir, tmp = safetensors().torch.save_file, Path(dir), ".tmp"
    tensors, copies = released_tensors(model)
    if any(name.endswith("_scale_inv") for name in tensors):
        raise ValueError("this model holds its weights in FP8, for inference only; load it with dtype=torch.bfloat16 "
                         "and save it with fp8=True")
    if model.config.tie_word_embeddings:
        del tensors["lm_head.weight"]

    shards, room = [], 0
    for name, t in tensors.items():
        if stored_size(name, t, fp8) > room or not shards:
            shards.append([])
            room = shard_bytes
        shards[-1].append(name)
        room -= stored_size(name, t, fp8)
    dir.mkdir(parents=True, exist_ok=True)
    files, index = [], {}
    try:
        for i, names in enumerate(shards, 1):
            file = f"model-{i:05}-of-{len(shards):05}.safetensors" if len(shards) > 1 else "model.safetensors"
            shard = {}
            for name in names:
                t = tensors[name].clone() if name in copies else tensors[name].contiguous()
                if fp8 and is_quantized(name):
                    q, shard[name + "_scale_inv"] = quantize_reference(t, 128)
                    shard[name] = q.contiguous()
                else:
                    shard[name] = t.to(torch.bfloat16) if fp8 and "e_score" not in name else t
            files.append(file)
            try:
                save_file(shard, dir / (file + tmp), metadata={"format": "pt"})
            except safetensors().SafetensorError as e:      # a full disk, a folder that can't be written
                raise OSError(f"{dir / file} can't be written ({' '.join(str(e).split())[:200]}); an earlier checkpoint in "
                              f"{dir} is intact: make room, or save to another folder") from None
            index |= dict.fromkeys(shard, file)
        texts = {}
        if len(shards) > 1:
            total = sum(stored_size(name, t, fp8) for name, t in tensors.items())
            texts["model.safetensors.index.json"] = {"metadata": {"total_size": total}, "weight_map": index}
        config = {**dataclasses.asdict(model.config), "architectures": ["DeepseekV3ForCausalLM"],
                  "model_type": "deepseek_v3", "num_key_value_heads": model.config.num_attention_heads,
                  "hidden_act": "silu", "attention_bias": False, "attention_dropout": 0.0, "moe_layer_freq": 1,
                  "scoring_func": "sigmoid", "topk_method": "noaux_tc", "bos_token_id": None, "eos_token_id": None,
                  "torch_dtype": "bfloat16" if fp8 else str(model.lm_head.weight.dtype).removeprefix("torch.")}
        if fp8:
            config["quantization_config"] = FP8_FORMAT
        if encoding is not None:
            from data.tokenizer import tokenizer_files
            token_files = tokenizer_files(encoding)
            config |= {k: token_files["tokenizer_config.json"].pop(k) for k in ("bos_token_id", "eos_token_id")}
            texts |= token_files
        for file, content in (texts | {"config.json": config}).items():
            files.append(file)
            (dir / (file + tmp)).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        for file in files:
            with open(dir / (file + tmp), "rb+") as f:
                os.fsync(f.fileno())
        (dir / "config.json").unlink(missing_ok=True)       # from here until it is back, this is no checkpoint
        for old in ("model.safetensors", "model-?????-of-?????.safetensors", "model.safetensors.index.json"):
            for path in dir.glob(old):
                path.unlink()
        for file in files:
            os.replace(dir / (file + tmp), dir / file)
    finally:
        for file in files:
            (dir / (file + tmp)).unlink(missing_ok=True)


def safetensors():
    try:
        import safetensors.torch
        return safetensors
    except ImportError:
        raise ImportError("released checkpoints need the safetensors package: pip install safetensors") from None


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
    """The DeepSeekV3Config of a folder's config.json. ValueError for a quantization other than the release's."""
    if not (path := dir / "config.json").is_file():
        raise ValueError(f"{dir} is no folder with a config.json")
    quantized = read_json(path).get("quantization_config") or {}
    for key, value in FP8_FORMAT.items():
        if quantized and (not isinstance(quantized, dict) or quantized.get(key, value) != value):
            raise ValueError(f"{path}: quantization_config={str(quantized)[:200]} is not supported, only DeepSeek's "
                             f"FP8 is, whose {key} is {value!r}")
    return DeepSeekV3Config.from_json(path)


def config_from_json(cls, path):
    """DeepSeekV3Config.from_json; cls: DeepSeekV3Config."""
    raw = read_json(Path(path))
    # num_key_value_heads isn't looked at: MLA has none, whatever a config says
    honoured = {"model_type": "deepseek_v3", "hidden_act": "silu", "scoring_func": "sigmoid",
                "topk_method": "noaux_tc", "moe_layer_freq": 1, "attention_bias": False, "attention_dropout": 0,
                "rope_interleave": True, "partial_rotary_factor": 1}

    def check(section, keys):
        for key in keys & section.keys():
            # absent and null are the same but for rope_interleave, where transformers takes null for false
            if section[key] != honoured[key] and (section[key] is not None or key == "rope_interleave"):
                raise ValueError(f"{path}: {key}={repr(section[key])[:100]} is not supported, only {honoured[key]!r} is; "
                                 "choose a checkpoint of DeepSeek-V3's own architecture")

    check(raw, honoured.keys())
    for key in ("rope_scaling", "rope_parameters"):
        if raw.get(key) is not None and not isinstance(raw[key], dict):
            raise ValueError(f"{path}: {key} must be a JSON object, got {repr(raw[key])[:100]}")
    # transformers 5 keeps theta and YaRN together in rope_parameters; where both are there it reads the old one, too
    rope = dict(raw.get("rope_scaling") or raw.get("rope_parameters") or {})
    check(rope, {"partial_rotary_factor"})
    if nested := [key for key, value in rope.items() if isinstance(value, dict)]:
        raise ValueError(f"{path}: RoPE's parameters by kind of layer ({nested[0]!r}) are not supported; all layers share one")
    raw["rope_theta"] = rope.pop("rope_theta", raw.get("rope_theta", DeepSeekV3Config.rope_theta))
    if "original_max_position_embeddings" in raw:
        rope["original_max_position_embeddings"] = raw["original_max_position_embeddings"]
    raw["rope_scaling"] = None if rope.get("rope_type", rope.get("type", "default")) == "default" else rope
    raw.setdefault("num_nextn_predict_layers", 0)
    if raw.get("n_shared_experts", 1) is None:
        raw["n_shared_experts"] = 0
    try:
        return cls(**{f.name: raw[f.name] for f in dataclasses.fields(cls) if f.name in raw})
    except ValueError as e:
        raise ValueError(f"{path}: {e}") from None


def open_safetensors(file):
    lib = safetensors()
    try:
        return lib.safe_open(file, "pt")
    except (lib.SafetensorError, OSError, ValueError, RuntimeError) as e:
        raise ValueError(f"{file} is damaged or no safetensors file: {' '.join(str(e).split())[:200]}") from None


def find_tensors(dir):
    """The safetensors files of a folder -> {tensor's name: (file, dtype as stored, shape)}. Reads their headers only."""
    index_file, files, weight_map = dir / "model.safetensors.index.json", ["model.safetensors"], None
    if index_file.is_file():
        weight_map = read_json(index_file).get("weight_map")
        if not isinstance(weight_map, dict):
            raise ValueError(f"{index_file} has no weight_map")
        files = list(dict.fromkeys(map(str, weight_map.values())))
    where = {}
    for file in files:
        path = dir / file
        if file != path.name or not file.endswith(".safetensors"):
            raise ValueError(f"{index_file} names {file!r}, which is no safetensors file of its own folder")
        if not path.is_file():
            raise ValueError(f"{dir} has no {file}; weights are read from safetensors files only, never from pickles")
        with open_safetensors(path) as f:
            for name in f.keys():
                if name in where:
                    raise ValueError(f"{dir} has {name} in two files, {where[name][0].name} and {file}")
                view = f.get_slice(name)
                where[name] = path, view.get_dtype(), tuple(view.get_shape())
    for name, file in (weight_map or {}).items():
        if name not in where or where[name][0].name != file:
            raise ValueError(f"{index_file} says that {name} is in {file}, which doesn't hold it")
    return where


def read_tensor(file, name):
    """One tensor, on the CPU. The file is mapped anew for each: pages stay in memory as long as the mapping does."""
    with open_safetensors(file) as f:
        return f.get_tensor(name)
