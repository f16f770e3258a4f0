"""From a folder that data/prepare.py wrote to batches of windows for training, and to the validation loss."""

import math
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from data.prepare import SOURCES, prepare, progress
from data.tokenizer import blame, encoding_from_json, ends_of_data, need, read_json, token_lengths


def open_bin(path, meta):
    """Maps a .bin file from disk: its tokens, (n,) uint16 or uint32. Of a .mask file, which data with pairs
    have: whether each token of the .bin file beside it is to be predicted, (n,) bool."""
    dtype = np.dtype(bool if path.suffix == ".mask" else meta["dtype"])
    size = path.stat().st_size
    expected = meta.get(f"{path.stem}_tokens", size // dtype.itemsize) * dtype.itemsize     # if recorded
    if size != expected:
        raise ValueError(f"{path} has {size:,} bytes in place of {expected:,}: cut off, or changed since it "
                         "was prepared; delete the folder and prepare the data again")
    return np.memmap(path, dtype, mode="r")


def check_ids(path, highest, vocab_size):
    if highest >= vocab_size:
        raise ValueError(f"{path} holds token {highest}, outside the vocabulary of {vocab_size}; prepare the "
                         "data again with the model's tokenizer, or give a new model a larger --vocab_size")


class Tokens:
    """The windows of a .bin file, in an order that depends on the seed and the sample's number only.

    Each epoch cuts the file at a random offset into windows that don't overlap, and shuffles them. Sample n
    is the same whatever came before, so a resumed run needs nothing but n.
    """

    def __init__(self, path, meta, block_size, vocab_size, seed):
        self.path, self.T, self.vocab_size, self.seed = path, block_size, vocab_size, seed
        self.tokens = open_bin(path, meta)
        self.mask = open_bin(path.with_suffix(".mask"), meta) if meta.get("pairs") else None
        if len(self.tokens) <= block_size:
            raise ValueError(f"{path} holds {len(self.tokens)} tokens, too few for a window of --block_size "
                             f"{block_size} and a token after it; give more data or a smaller block")
        self.windows = max((len(self.tokens) - 1) // block_size - 1, 1)     # one less: room for the offset
        self.epoch = None

    def batch(self, n, count):
        """Samples n..n+count-1: x, y (count, T) int64; y is x shifted by one, -100 where nothing is
        predicted."""
        starts = []
        for i in range(n, n + count):
            epoch, j = divmod(i, self.windows)
            if epoch != self.epoch:
                rng = np.random.default_rng([self.seed, epoch])
                spare = min(len(self.tokens) - 1 - self.windows * self.T, self.T - 1)
                self.epoch, self.offset = epoch, rng.integers(spare + 1)
                self.order = rng.permutation(self.windows)
            starts.append(self.offset + self.order[j] * self.T)
        rows = np.stack([self.tokens[at:at + self.T + 1] for at in starts]).astype(np.int64)
        check_ids(self.path, rows.max(), self.vocab_size)   # on a GPU the model can't look without a stall
        x, y = torch.tensor(rows[:, :-1]), torch.tensor(rows[:, 1:])
        if self.mask is not None:
            y[torch.from_numpy(np.stack([~self.mask[at + 1:at + self.T + 1] for at in starts]))] = -100
        return x, y


def read_meta(path):
    with blame(f"{path} is damaged; delete the folder and prepare the data again"):
        meta = read_json(path)
        need(meta["dtype"] in ("uint16", "uint32"), f"dtype {meta['dtype']}")
        need(0 <= meta["separator"] < meta["vocab_size"] < 2**31, "a separator outside the vocabulary")
        ends = ends_of_data(meta)
        need(all(0 <= token < meta["vocab_size"] for token in (ends.begin, *ends.eos)),
             "a bos or eos outside the vocabulary")
        return meta


def open_data(cfg, config, vocab_size_given, rank=0):
    """-> meta.json's dict, encoding.json's text and the train Tokens. Sizes config.vocab_size to the data
    unless it was given. Rank 0 prepares a folder that has the name of a source and no data yet."""
    data_dir = Path(cfg.data_dir)
    if rank == 0 and data_dir.name in SOURCES and not (data_dir / "meta.json").is_file():
        print(f"{data_dir} has no data yet: preparing {data_dir.name}")
        prepare(data_dir, data_dir.name, again=False)
    for name in ("meta.json", "encoding.json", "train.bin", "val.bin"):
        path = data_dir / name
        if not path.is_file() or not path.stat().st_size:
            raise ValueError(f"{path} is missing or empty; prepare your text with: python data/prepare.py "
                             f"--input FILE_OR_DIR --out_dir {data_dir}")
    meta = read_meta(data_dir / "meta.json")
    encoding = (data_dir / "encoding.json").read_text(encoding="utf-8")
    if not vocab_size_given:
        config.vocab_size = -(-meta["vocab_size"] // 64) * 64       # a multiple of 64: tensor cores like it
    check_ids(data_dir, meta.get("max_token", meta["vocab_size"] - 1), config.vocab_size)
    return meta, encoding, Tokens(data_dir / "train.bin", meta, cfg.block_size, config.vocab_size, cfg.seed)


class Validation:
    """Mean loss over the validation split, or its first 256 KB of text.

    Every token is predicted exactly once, except those of prompts: windows overlap by one token, and the
    first one starts with a separator.
    """

    def __init__(self, path, meta, encoding, batch_size, block_size):
        lengths, separator = token_lengths(encoding_from_json(encoding)), meta["separator"]
        tokens = open_bin(path, meta)[:4 * 2**18].astype(np.int64)
        check_ids(path, tokens.max(), len(lengths))
        tokens = tokens[:np.searchsorted(lengths[tokens].cumsum(), 2**18, side="right")]
        targets = tokens.copy()
        if meta.get("pairs"):
            targets[~open_bin(path.with_suffix(".mask"), meta)[:len(tokens)]] = -100
        start = int(tokens[0] == separator)
        tokens, targets = np.concatenate([[separator], tokens[start:]]), targets[start:]
        self.n, self.bytes = int((targets != -100).sum()), int(lengths[targets[targets != -100]].sum())
        if not self.bytes:
            raise ValueError(f"{path} holds no text to evaluate on; prepare more data")
        shape = -1, batch_size, block_size      # equal batches: torch.compile would recompile for others
        spare = -len(targets) % (batch_size * block_size)
        self.x = F.pad(torch.from_numpy(tokens[:-1]), (0, spare), value=separator).view(shape)
        self.y = F.pad(torch.from_numpy(targets), (0, spare), value=-100).view(shape)

    @torch.no_grad()
    def evaluate(self, model, device, autocast, doc_ids):
        """-> val_loss in nats per token, val_bpb in bits per byte of the raw text."""
        model.eval()
        nats = 0.0
        for x, y in progress(list(zip(self.x, self.y)), "evaluating"):
            x, y = x.to(device), y.to(device)
            with autocast():
                logits = model(x, doc_ids=doc_ids(x, y))[0]        # without targets: no MTP
            nats += F.cross_entropy(logits.flatten(0, 1).float(), y.flatten(), reduction="sum").item()
        model.train()
        return {"val_loss": nats / self.n, "val_bpb": nats / math.log(2) / self.bytes}
