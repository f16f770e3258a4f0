"""Text in, tokens out: writes train.bin, val.bin, encoding.json and meta.json for train.py.

    python data/prepare.py                                   # Python's own source as bytes: nothing to download
    python data/prepare.py --source shakespeare
    python data/prepare.py --input book.txt --tokenizer gpt2
    python data/prepare.py --input folder/ --tokenizer DeepSeek-V3/tokenizer.json
    python data/prepare.py --input folder/ --fim_rate 0.1    # a tenth of the documents teach to fill in a middle

A .bin file is a flat array of token ids, np.memmap(file, dtype=meta["dtype"]):
    separator, document, separator, document, ...            # the separator stands *before* each document
A released tokenizer's separator is its end of a text; if it begins texts with a token, that follows the separator.
The last 10% of the raw bytes are val. The cut is made before tokenising, so that every tokenizer is judged on the
same text; a document that lies across the cut goes on in val without a separator.

Fill-in-middle (§4.1 of the DeepSeek-V3 report): of the documents that lie in train as a whole, --fim_rate are cut at two
random characters and written as prefix, suffix, middle, from which a model learns to put a middle into a hole:
    separator, <｜fim▁begin｜>, prefix, <｜fim▁hole｜>, suffix, <｜fim▁end｜>, middle, separator, ...
"""

import argparse
import contextlib
import fnmatch
import http.client
import json
import os
import sys
import sysconfig
import tempfile
import urllib.request
import zlib
from pathlib import Path

import numpy as np
import tiktoken

sys.path.insert(0, str(Path(__file__).parent.parent))  # so that this file runs as a script and imports as a module

from data.tokenizer import (BYTES, FIM, encode, encoding_to_json, fim_ids, get_tokenizer, read_ends,  # noqa: E402
                            token_lengths, with_special_tokens)

SHAKESPEARE = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
FINEWEB_BYTES = 1_000_000_000  # of text, where --source fineweb stops
STDLIB_SKIP = ("site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test",  # not the library, and
               "encodings", "pydoc_data", "config-*", "_sysconfigdata*")                       # tables made by machines
FILES = ("train.bin", "val.bin", "encoding.json", "meta.json")  # meta.json last: who sees it sees a whole dataset

# ----------------------------------------------------------------------------------------------------------------------
# Sources. Each yields documents: non-empty bytes that are valid UTF-8, kept to the byte (CRLF too).


def documents(source: str, input, out_dir: Path):
    if input is not None and source != "stdlib":
        raise ValueError("give either a source or an input, not both")
    if input is not None:
        path = Path(input)
        if path.is_dir():
            return folder(path, "*", (".*",), out_dir)
        if not path.is_file():
            raise FileNotFoundError(f"no input {path}: there is no such file or folder")
        raw = path.read_bytes()
        if not raw or not is_text(raw):
            raise ValueError(f"input {path} is {'not UTF-8 text' if raw else 'empty'}")
        return iter([raw])
    if source == "stdlib":
        return folder(Path(sysconfig.get_paths()["stdlib"]), "*.py", STDLIB_SKIP, out_dir)
    if source == "shakespeare":
        return shakespeare()
    if source == "fineweb":
        return fineweb()
    raise ValueError(f"no source {source}: give stdlib, shakespeare or fineweb")


def is_text(raw: bytes) -> bool:
    try:
        return "\0" not in raw.decode()
    except UnicodeDecodeError:
        return False


def folder(root: Path, pattern: str, skip: tuple, out_dir: Path):
    """Each text file below root whose name fits pattern, by relative path; files and folders named in skip are not."""
    paths, odd, found = [], [], False
    for where, folders, names in os.walk(root):
        folders[:] = [f for f in folders if not any(fnmatch.fnmatchcase(f, s) for s in skip)]
        names = [n for n in fnmatch.filter(names, pattern) if not any(fnmatch.fnmatchcase(n, s) for s in skip)]
        if Path(where).resolve() == out_dir.resolve():
            names = [n for n in names if n not in FILES]  # our own output is not input, or a second run would differ
        paths += [Path(where, n) for n in names]
    for path in sorted(paths, key=lambda p: p.relative_to(root).as_posix()):
        if path.is_file() and (raw := path.read_bytes()):
            if is_text(raw):
                found = True
                yield raw
            else:
                odd.append(path)
    if odd:
        print(f"skipped (not UTF-8 text): {odd[0]}" + f" and {len(odd) - 1} more" * (len(odd) > 1))
    if not found:
        raise ValueError(f"no text in {root}: name some with --input FILE_OR_DIR")


def shakespeare():
    try:
        with urllib.request.urlopen(SHAKESPEARE, timeout=30) as response:
            yield response.read()
    except (OSError, http.client.HTTPException) as error:
        raise OSError(f"could not download {SHAKESPEARE} ({error}): get it another way and use --input FILE") from error


def fineweb():
    try:
        from datasets import load_dataset
        from tqdm import tqdm
    except ImportError as error:
        raise ImportError("--source fineweb needs the datasets package: pip install datasets") from error
    size = 0
    with tqdm(total=FINEWEB_BYTES, unit="B", unit_scale=True) as bar:
        for row in load_dataset("HuggingFaceFW/fineweb-edu", name="sample-10BT", split="train", streaming=True):
            if text := row["text"].encode():
                yield text
                size += len(text)
                bar.update(len(text))
            if size >= FINEWEB_BYTES:
                break


# ----------------------------------------------------------------------------------------------------------------------


def prepare(out_dir, source="stdlib", input=None, tokenizer="bytes", fim_rate=0.0) -> dict:
    """Tokenises a source (or the file or folder `input`) into out_dir. Returns the contents of meta.json: dtype,
    vocab_size, tokenizer, separator (an id), bos, eos, add_bos (see Ends), source, documents, bytes_per_token, max_token
    (the highest id in the data), {train,val}_tokens, {train,val}_bytes, {train,val}.bin_crc32 (by which a resumed run
    knows its data); with fim_rate also that and fim_documents.

    All or nothing: when it raises (ValueError for bad input, OSError, ImportError, KeyboardInterrupt), an earlier
    dataset in out_dir is untouched and nothing is left beside it. Memory: one document with its tokens at a time.
    """
    out_dir = Path(out_dir)
    if not 0 <= fim_rate <= 1:
        raise ValueError(f"--fim_rate must be from 0 to 1, got {fim_rate}")
    docs, enc = documents(source, input, out_dir), get_tokenizer(tokenizer)
    ends = read_ends(tokenizer, enc)
    if fim_rate:
        enc = with_special_tokens(enc, FIM)
    out_dir.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".prepare-", dir=out_dir) as staged:  # removed whatever happens
        staged = Path(staged)
        meta = {"dtype": "uint16" if enc.n_vocab <= 1 << 16 else "uint32", "vocab_size": enc.n_vocab,
                "tokenizer": enc.name, "separator": ends.eos[0], "bos": ends.bos,
                "eos": list(ends.eos), "add_bos": ends.add_bos,
                "source": Path(input).name if input else source}
        meta |= write_tokens(docs, enc, ends, meta["dtype"], staged, fim_rate)
        for name, text in ("encoding.json", encoding_to_json(enc)), ("meta.json", json.dumps(meta, indent=2) + "\n"):
            with open(staged / name, "w", encoding="utf-8") as file:
                file.write(text)
                sync(file)
        publish(staged, out_dir)
    print(f"{out_dir}: {meta['train_tokens']:,} train + {meta['val_tokens']:,} val tokens from {meta['documents']:,} "
          f"documents\n"
          f"vocabulary {enc.n_vocab:,} ({enc.name}), {meta['bytes_per_token']:.2f} bytes/token, {meta['dtype']}")
    if fim_rate:
        print(f"fill-in-middle: {meta['fim_documents']:,} documents")
    return meta


def write_tokens(docs, enc: tiktoken.Encoding, ends, dtype: str, where: Path, fim_rate=0.0) -> dict:
    """Writes train.bin and val.bin of docs (non-empty UTF-8 bytes) into `where`; returns the counts for meta.json."""
    lengths, before = token_lengths(enc), [ends.eos[0], ends.bos] if ends.add_bos else [ends.eos[0]]
    is_bytes = enc._mergeable_ranks == BYTES  # then the text *is* its tokens: no list of a billion ints for a GB of it

    with contextlib.ExitStack() as stack:
        raw, train, val = (stack.enter_context(open(where / name, "w+b")) for name in ("raw", "train.bin", "val.bin"))
        sizes = [raw.write(doc) for doc in docs]  # the cut needs the total, so the text waits on disk, not in memory
        total = sum(sizes)
        cut = total * 9 // 10
        raw.seek(0)
        crcs, max_token = {train: 0, val: 0}, 0

        def write(file, ids) -> None:
            nonlocal max_token
            ids = np.asarray(ids, dtype)
            file.write(ids.tobytes())
            crcs[file] = zlib.crc32(ids.tobytes(), crcs[file])
            max_token = max(max_token, int(ids.max(initial=0)))

        def append(file, text: bytes) -> int:
            ids = np.frombuffer(text, np.uint8) if is_bytes else np.array(encode(enc, text.decode()), dtype)
            if not is_bytes and lengths[ids].sum() != len(text):
                raise ValueError(f"tokenizer {enc.name} loses text: its pattern does not match all of it")
            write(file, ids)
            return len(ids)

        rng = np.random.default_rng(0)  # of fill-in-middle: the same text gives the same data
        start = train_bytes = tokens = fims = 0
        for size in sizes:  # a plain loop: threads (encode_ordinary_batch) gain no more than their number
            doc = raw.read(size)
            at = min(max(cut - start, 0), size)  # this many bytes of the document are train's
            while 0 < at < size and doc[at] & 0xC0 == 0x80:  # never inside a character
                at -= 1
            write(train if at > 0 else val, before)
            if at == size and rng.random() < fim_rate:
                text = doc.decode()
                a, b = sorted(rng.integers(len(text) + 1, size=2))
                for token, part in zip(fim_ids(enc), (text[:a], text[b:], text[a:b]), strict=True):
                    write(train, [token])
                    tokens += append(train, part.encode())
                fims += 1
            elif at > 0:
                tokens += append(train, doc[:at])
            if at < size:
                tokens += append(val, doc[at:])
            train_bytes += at
            start += size
        if not 0 < train_bytes < total:
            raise ValueError(f"too little text to split into train and val: {total} bytes")
        sync(train), sync(val)
        return {"documents": len(sizes), "bytes_per_token": total / tokens, "train_bytes": train_bytes,
                "val_bytes": total - train_bytes, "train_tokens": train.tell() // np.dtype(dtype).itemsize,
                "val_tokens": val.tell() // np.dtype(dtype).itemsize, "train.bin_crc32": crcs[train], "val.bin_crc32": crcs[val],
                "max_token": max_token,
                **({"fim_rate": fim_rate, "fim_documents": fims} if fim_rate else {})}


def sync(file) -> None:
    file.flush()
    os.fsync(file.fileno())  # a full disk shows here at the latest, before anything is renamed


def publish(staged: Path, out_dir: Path) -> None:
    """Moves FILES from staged to out_dir in place of the old ones, which come back if a move fails."""
    (staged / "old").mkdir()
    moves = [(out_dir / n, staged / "old" / n) for n in reversed(FILES) if (out_dir / n).exists()]
    moves += [(staged / n, out_dir / n) for n in FILES]  # so meta.json is the first to go and the last to come
    try:
        for here, there in moves:
            os.replace(here, there)
    except BaseException:
        for here, there in reversed(moves):
            if not here.exists():
                os.replace(there, here)
        raise


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     allow_abbrev=False)
    text = parser.add_mutually_exclusive_group()
    text.add_argument("--source", choices=("stdlib", "shakespeare", "fineweb"),
                      help="Python's own library (the default), tinyshakespeare (downloads 1 MB) or FineWeb-Edu "
                           "(downloads 1 GB, needs pip install datasets)")
    text.add_argument("--input", metavar="FILE_OR_DIR", help="your own text: a UTF-8 file, or a folder of them")
    parser.add_argument("--out_dir", metavar="DIR", help="default: a folder beside prepare.py, named after the text")
    parser.add_argument("--tokenizer", default="bytes", metavar="bytes|gpt2|PATH",
                        help="bytes (the default), gpt2, a .tiktoken file or a tokenizer.json of byte-level BPE")
    parser.add_argument("--fim_rate", type=float, default=0.0,
                        help="share of the documents to write as prefix, suffix, middle (default 0; the report: 0.1)")
    args = parser.parse_args()
    source = args.source or "stdlib"
    name = source if args.input is None else Path(args.input).resolve().stem
    try:
        prepare(args.out_dir or Path(__file__).parent / name, source, args.input, args.tokenizer,
                args.fim_rate)
    except (ValueError, OSError, ImportError) as error:
        raise SystemExit(f"prepare.py: {error}")


if __name__ == "__main__":
    main()
