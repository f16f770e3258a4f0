"""
Text in, tokens out: writes train.bin, val.bin, encoding.json and meta.json for train.py.

    python data/prepare.py                              # Python's own source as bytes: nothing to download
    python data/prepare.py --source shakespeare
    python data/prepare.py --input book.txt --tokenizer gpt2
    python data/prepare.py --input folder/ --tokenizer DeepSeek-V3/tokenizer.json
    python data/prepare.py --input folder/ --fim_rate 0.1                   # teach to fill in a middle
    python data/prepare.py --input chats.jsonl --tokenizer DeepSeek-V3      # pairs, for fine-tuning

A .bin file is a flat array of token ids, np.memmap(file, dtype=meta["dtype"]):
    separator, document, separator, document, ...       # the separator stands *before* each document
The separator is the token that ends a text. Where a model expects a token before each text, it follows the
separator. The last 10% of the raw bytes are val: the cut comes before tokenising, so that every tokenizer is
judged on the same text. A document that lies across the cut continues in val without a separator.

A .jsonl file holds a JSON object per line. {"text": ...} is a document. {"prompt": ..., "completion": ...} is
one too, but only the completion and the separator after it are trained on: train.mask and val.mask hold a
byte per token, 1 where the token is to be predicted. A pair is never cut, and special tokens in it, such as
<|im_start|>, become their ids.

Fill-in-middle (§4.1 of the DeepSeek-V3 report): --fim_rate of the documents that lie in train as a whole are
cut at two random characters and reordered, so that a model learns to fill a hole:
    separator, <｜fim▁begin｜>, prefix, <｜fim▁hole｜>, suffix, <｜fim▁end｜>, middle, separator, ...
"""

import signal

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)    # Ctrl-C during the imports needs no traceback

import argparse
import contextlib
import errno
import fnmatch
import http.client
import json
import os
import shutil
import sys
import sysconfig
import tempfile
import time
import urllib.request
import zlib
from difflib import get_close_matches
from pathlib import Path
from typing import NamedTuple

import numpy as np

sys.path.insert(0, str(Path(__file__).parent.parent))   # this file runs as a script and imports as a module

from data.tokenizer import (BYTES, FIM, blame, encode, encoding_to_json, fim_ids, get_tokenizer,  # noqa: E402
                            read_ends, token_bytes, with_special_tokens)

SOURCES = ("stdlib", "shakespeare", "fineweb")
SHAKESPEARE = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
FINEWEB_BYTES = 1_000_000_000  # of text, where --source fineweb stops
STDLIB_SKIP = ("site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test",   # no library,
               "encodings", "pydoc_data", "config-*", "_sysconfigdata*")                        # generated
TABLES = (".json", ".csv", ".tsv", ".parquet", ".arrow", ".ipynb", ".xlsx")
FILES = ("train.bin", "val.bin", "train.mask", "val.mask", "encoding.json", "meta.json")


# ------------------------------------------------------------------------------------------------------------
# Sources

class Document(NamedTuple):
    text: bytes                 # valid UTF-8, kept to the byte (CRLF too)
    name: str                   # its file or line, for messages
    prompt: bytes | None = None     # of a pair: precedes the text and is not trained on


def documents(source, input, out_dir):
    """An iterator over the Documents of a source, or of the file or folder `input`."""
    if input is not None:
        path = Path(input)
        if not path.exists():
            raise FileNotFoundError(f"no input {path}: there is no such file or folder")
        if path.is_file() and path.suffix.lower() in TABLES:
            raise ValueError(f"input {path} is a table or markup, not text: write it as {path.stem}.jsonl, "
                             'an object per line: {"text": ...} or {"prompt": ..., "completion": ...}')
        return files(path, "*", (".*",), out_dir)
    if source == "stdlib":
        return files(Path(sysconfig.get_paths()["stdlib"]), "*.py", STDLIB_SKIP, out_dir)
    if source == "shakespeare":
        return shakespeare()
    if source == "fineweb":
        return fineweb()
    raise ValueError(f"no source {source}: give {', '.join(SOURCES)}")


def fail(error):
    raise error


def files(root, pattern, skip, out_dir):
    """The Documents in a file, or in the files below a folder that match pattern, except files and folders
    that match skip. Files that are not text are skipped and counted."""
    paths, odd = [root] if root.is_file() else [], []
    for where, folders, names in os.walk(root, onerror=fail) if root.is_dir() else ():
        for listed in folders, names:
            listed[:] = [name for name in listed if not any(fnmatch.fnmatchcase(name, s) for s in skip)]
        own = FILES if Path(where).resolve() == out_dir.resolve() else ()   # our output is not our input
        paths += [Path(where, name) for name in fnmatch.filter(names, pattern) if name not in own]
    paths = [path for path in paths if path.is_file() and path.stat().st_size]
    for path in progress(sorted(paths, key=lambda p: p.relative_to(root).as_posix()), f"reading {root}"):
        if path.suffix.lower() == ".jsonl":
            yield from json_lines(path)
        elif fault := text_fault(raw := path.read_bytes()):
            odd.append(f"{path} {fault}")
        else:
            yield Document(raw, str(path))
    if len(odd) == len(paths):
        raise ValueError(f"no text in {root}: {odd[0] if odd else 'name some with --input FILE_OR_DIR'}")
    if odd:
        print(f"skipped: {odd[0]}" + f" (and {len(odd) - 1} more like it)" * (len(odd) > 1))


def text_fault(raw):
    """Why bytes are not a text; None if they are."""
    try:
        raw.decode()
    except UnicodeDecodeError as error:
        return f"is not UTF-8 text ({error.reason} at byte {error.start}); convert it to UTF-8"
    return f"is binary, not text: byte {raw.index(0)} is NUL" if b"\0" in raw else None


def json_lines(path):
    """The Documents in a .jsonl file. ValueError names a malformed line."""
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            name, entry = f"{path}, line {number}", None
            if not line.strip():
                continue
            with contextlib.suppress(ValueError, RecursionError):
                entry = json.loads(line)
            match entry:
                case {"text": str(text)} if not entry.keys() & {"prompt", "completion"}:
                    prompt = None
                case {"prompt": str(prompt), "completion": str(text)} if "text" not in entry:
                    prompt = prompt.encode("utf-8", "replace")  # JSON can spell lone surrogates, UTF-8 can't
                case _:
                    raise ValueError(f'{name} is neither {{"text": ...}} nor {{"prompt": ..., "completion": '
                                     "...} with strings as values")
            if text or prompt:
                yield Document(text.encode("utf-8", "replace"), name, prompt)


def shakespeare():
    try:
        with urllib.request.urlopen(SHAKESPEARE, timeout=30) as response:
            yield Document(response.read(), SHAKESPEARE)
    except (OSError, http.client.HTTPException) as error:
        raise OSError(f"could not download {SHAKESPEARE} ({error}): use --input FILE instead") from error


def fineweb():
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise ImportError("--source fineweb needs the datasets package: pip install datasets") from error
    size = 0
    rows = load_dataset("HuggingFaceFW/fineweb-edu", name="sample-10BT", split="train", streaming=True)
    for number, row in enumerate(progress(rows, "downloading FineWeb-Edu")):
        if text := row["text"].encode():
            yield Document(text, f"document {number}")
            size += len(text)
        if size >= FINEWEB_BYTES:
            break


def progress(items, what):
    """items, with progress on a terminal: tqdm's bar where it is installed, else a line now and then."""
    shown = sys.stderr and sys.stderr.isatty() and os.environ.get("RANK", "0") == "0"
    try:
        from tqdm import tqdm
        yield from tqdm(items, what, leave=False, delay=1, disable=not shown)
    except ImportError:
        last = time.monotonic()
        for number, item in enumerate(items):
            if shown and time.monotonic() - last > 10:
                print(f"{what}: {number:,} of {len(items):,}", file=sys.stderr)
                last = time.monotonic()
            yield item


# ------------------------------------------------------------------------------------------------------------
# Tokens

def prepare(out_dir, source="stdlib", input=None, tokenizer="bytes", fim_rate=0.0, again=True):
    """Tokenise a source, or the file or folder `input`, into out_dir. With again=False, data that out_dir
    holds already stay.

    Returns what meta.json holds: dtype, vocab_size, tokenizer, separator, bos, eos, add_bos (ids, see Ends),
    max_token (the highest id in the data), source, documents, pairs, fim_documents, bytes_per_token,
    {train,val}_{tokens,bytes}, {train,val}.bin_crc32 (by which a resumed run knows its data).

    ValueError, OSError or ImportError for bad input; an earlier dataset in out_dir is then untouched. Memory:
    one document with its tokens at a time.
    """
    out_dir = Path(out_dir)
    if not 0 <= fim_rate <= 1:
        raise ValueError(f"--fim_rate must be from 0 to 1, got {fim_rate}")
    docs, enc = documents(source, input, out_dir), get_tokenizer(tokenizer)
    ends = read_ends(tokenizer, enc)
    if fim_rate:
        enc = with_special_tokens(enc, FIM)
    with staging(out_dir) as staged:
        if not again and (out_dir / "meta.json").is_file():     # another process was faster
            return None
        meta = {"dtype": "uint16" if enc.n_vocab <= 1 << 16 else "uint32", "vocab_size": enc.n_vocab,
                "tokenizer": enc.name, "separator": ends.eos[0], "bos": ends.bos, "eos": list(ends.eos),
                "add_bos": ends.add_bos, "source": Path(input).name if input else source}
        meta |= write_tokens(docs, enc, ends, meta["dtype"], staged, fim_rate)
        if fim_rate and not meta["fim_documents"]:
            raise ValueError(f"--fim_rate {fim_rate} rearranged none of the {meta['documents']} documents; "
                             "only whole ones of the training part can be: give more, or a higher rate")
        (staged / "encoding.json").write_text(encoding_to_json(enc), encoding="utf-8")
        (staged / "meta.json").write_text(json.dumps(meta, indent=2) + "\n", encoding="utf-8")
        for name in reversed(FILES):    # meta.json goes first and comes last: a folder that has it is whole
            (out_dir / name).unlink(missing_ok=True)
        for name in FILES:
            if (staged / name).exists():
                os.replace(staged / name, out_dir / name)
    print(f"{out_dir}: {meta['documents']:,} documents, {meta['train_tokens']:,} train + "
          f"{meta['val_tokens']:,} val tokens, vocabulary {enc.n_vocab:,} ({enc.name}), "
          f"{meta['bytes_per_token']:.2f} bytes/token")
    return meta


@contextlib.contextmanager
def staging(out_dir):
    """A temporary folder in out_dir, which other preparations wait for. Removes what a killed one left."""
    out_dir.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(ImportError, OSError):     # Windows and some network drives have no locks
            import fcntl
            folder = os.open(out_dir, os.O_RDONLY)
            stack.callback(os.close, folder)
            fcntl.flock(folder, fcntl.LOCK_EX)
            for left in out_dir.glob(".prepare-*"):
                shutil.rmtree(left, ignore_errors=True)
        try:
            yield Path(stack.enter_context(tempfile.TemporaryDirectory(prefix=".prepare-", dir=out_dir)))
        except OSError as e:
            if e.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                raise
            raise OSError(f"{out_dir} can't be written ({e.strerror}); make room, then start again") from None


class Split:
    """train.bin or val.bin while it is written, and the mask beside it if there are pairs."""

    def __init__(self, path, enc, dtype, masked, stack):
        self.file = stack.enter_context(open(path, "wb"))
        self.mask = stack.enter_context(open(path.with_suffix(".mask"), "wb")) if masked else None
        self.enc, self.dtype, self.bytes, self.text_tokens = enc, dtype, 0, 0

    def add(self, part, predicted=True, special=False):
        """part: text as bytes, or a list of ids. special: special tokens in the text become their ids."""
        ids = part
        if isinstance(part, bytes):
            if self.enc._mergeable_ranks == BYTES and not special:
                ids = np.frombuffer(part, np.uint8)     # no list of a billion ints for a GB of text
            else:
                ids = encode(self.enc, part.decode(), special)
            self.bytes += len(part)
            self.text_tokens += len(ids)
        self.file.write(np.asarray(ids, self.dtype).tobytes())
        if self.mask:
            self.mask.write(bytes([predicted]) * len(ids))


def write_tokens(docs, enc, ends, dtype, where, fim_rate=0.0):
    """Write Documents to train.bin and val.bin in the folder `where`. Returns the counts for meta.json."""
    with contextlib.ExitStack() as stack:
        raw, queue = stack.enter_context(open(where / "raw", "w+b")), []
        for text, name, prompt in docs:     # the cut needs the total: the text waits on disk, not in memory
            queue.append((name, prompt is not None, raw.write(prompt or b""), raw.write(text)))
        total, pairs = raw.tell(), sum(is_pair for _, is_pair, _, _ in queue)
        cut = total * 9 // 10
        raw.seek(0)
        train, val = (Split(where / name, enc, dtype, pairs > 0, stack) for name in ("train.bin", "val.bin"))
        rng = np.random.default_rng(0)      # of fill-in-middle: the same text gives the same data
        fims = 0
        for name, is_pair, prompt_size, size in progress(queue, "tokenising"):
            rest = cut - raw.tell()
            prompt, doc = raw.read(prompt_size), raw.read(size)
            whole = rest >= prompt_size + size or pairs and not train.bytes
            at = size if whole else 0 if pairs else max(rest, 0)    # bytes of the document that are train's
            while 0 < at < size and doc[at] & 0xC0 == 0x80:         # never inside a character
                at -= 1
            split = train if whole or at > 0 else val
            with blame(name):
                split.add([ends.eos[0]])    # ends the document before: predicted even before a prompt
                # a chat template may have begun the prompt itself
                if ends.add_bos and not (is_pair and (prompt or doc).startswith(token_bytes(enc, ends.bos))):
                    split.add([ends.bos], predicted=not is_pair)
                if is_pair:
                    split.add(prompt, predicted=False, special=True)
                    split.add(doc, special=True)
                elif whole and rng.random() < fim_rate:
                    text = doc.decode()
                    a, b = sorted(rng.integers(len(text) + 1, size=2))
                    for token, part in zip(fim_ids(enc), (text[:a], text[b:], text[a:b])):
                        split.add([token])
                        split.add(part.encode())
                    fims += 1
                else:
                    train.add(doc[:at])
                    val.add(doc[at:])
        if not train.bytes or not val.bytes:
            raise ValueError(f"too little text to split into train and val: {total} bytes")
        for split in train, val:
            if pairs:   # the last completion ends too
                split.add([ends.eos[0]])
    meta = {"documents": len(queue), "pairs": pairs, "fim_documents": fims, "max_token": 0,
            "bytes_per_token": total / (train.text_tokens + val.text_tokens)}
    for name, split in ("train", train), ("val", val):
        tokens = np.memmap(where / f"{name}.bin", dtype, "r")
        meta |= {f"{name}_bytes": split.bytes, f"{name}_tokens": len(tokens),
                 f"{name}.bin_crc32": zlib.crc32(tokens),
                 "max_token": max(meta["max_token"], int(tokens.max()))}
    return meta


# ------------------------------------------------------------------------------------------------------------
# The command line

class Parser(argparse.ArgumentParser):
    """The flags of a script. A mistake gets one line, with the closest flag, in place of the whole usage. No
    character that a terminal cannot show ends the script."""

    def __init__(self, description):
        for stream in sys.stdout, sys.stderr:
            if hasattr(stream, "reconfigure"):
                stream.reconfigure(errors="replace")
        super().__init__(description=description, formatter_class=argparse.RawDescriptionHelpFormatter,
                         allow_abbrev=False)

    def error(self, message):
        words = message.partition("unrecognized arguments: ")[2].split()
        wrong = [word.partition("=")[0] for word in words if word.startswith("-")]
        close = [flag for word in wrong for flag in get_close_matches(word, self._option_string_actions, 1)]
        hint = f"did you mean {', '.join(close)}?" if close else "--help lists the flags"
        self.exit(2, f"{self.prog}: {' '.join(message.split())[:300]}; {hint}\n")


def main():
    parser = Parser(__doc__)
    text = parser.add_mutually_exclusive_group()
    text.add_argument("--source", choices=SOURCES, default="stdlib",
                      help="fineweb (FineWeb-Edu, 1 GB) needs pip install datasets")
    text.add_argument("--input", metavar="FILE_OR_DIR", help="a UTF-8 file, a .jsonl, or a folder of them")
    parser.add_argument("--out_dir", metavar="DIR", help="default: beside prepare.py, named after the text")
    parser.add_argument("--tokenizer", default="bytes", metavar="bytes|gpt2|PATH",
                        help="PATH: a released model's folder, a tokenizer.json or a .tiktoken file")
    parser.add_argument("--fim_rate", type=float, default=0.0,
                        help="share of the documents to write as prefix, suffix, middle (the report: 0.1)")
    args = parser.parse_args()
    name = args.source if args.input is None else Path(os.path.realpath(args.input)).stem
    out_dir = args.out_dir or Path(__file__).parent / name
    try:
        prepare(out_dir, args.source, args.input, args.tokenizer, args.fim_rate)
        print(end="", flush=True)
    except BrokenPipeError:     # as in `python data/prepare.py | head`; nothing is left to flush
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
    except KeyboardInterrupt:
        sys.exit(130)
    except (ValueError, OSError, ImportError) as error:
        raise SystemExit(f"prepare.py: {error}")


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)
    main()
