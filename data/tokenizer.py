""" Tokenizers, each as a tiktoken.Encoding: a pattern cuts text into pieces, then byte pairs are merged
within each.

"bytes" needs no file, "gpt2" is downloaded by tiktoken, a tokenizer file is a .tiktoken file or a Hugging
Face tokenizer.json of byte-level BPE, such as DeepSeek-V3's. As JSON they travel beside the data and inside
checkpoints. """

import base64
import contextlib
import itertools
import json
import re
from pathlib import Path
from typing import NamedTuple

import numpy as np
import tiktoken

ENDOFTEXT, DEEPSEEK_EOS, KIMI_EOS = "<|endoftext|>", "<｜end▁of▁sentence｜>", "[EOS]"
KNOWN_EOS = (ENDOFTEXT, DEEPSEEK_EOS, KIMI_EOS, "<|end_of_text|>", "</s>", "<eos>", "<|im_end|>")
KNOWN_BOS = ("<｜begin▁of▁sentence｜>", "[BOS]")
FIM = ("<｜fim▁begin｜>", "<｜fim▁hole｜>", "<｜fim▁end｜>")  # as DeepSeek-V3's tokenizer names them
OTHER_FILES = ("tokenizer.model", "spiece.model", "vocab.txt", "vocab.json")    # of other kinds
BYTES = {bytes([b]): b for b in range(256)}
GPT2_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
# of Moonlight and Kimi, whose tiktoken.model comes without a pattern (their tokenization_*.py has it)
KIMI_PATTERN = "|".join([
    r"[\p{Han}]+",
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]*[\p{Ll}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]+"
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]+[\p{Ll}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]*"
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
    r"\p{N}{1,3}", r" ?[^\s\p{L}\p{N}]+[\r\n]*", r"\s*[\r\n]+", r"\s+(?!\S)", r"\s+"])
# DeepSeek-V3 splits text three times in sequence: digits off, runs of CJK off, then the rest and these runs
# into words
DEEPSEEK_SPLITS = [
    r"\p{N}{1,3}", "[一-龥぀-ゟ゠-ヿ]+",
    "[!\"#$%&'()*+,\\-./:;<=>?@\\[\\\\\\]^_`{|}~][A-Za-z]+|[^\r\n\\p{L}\\p{P}\\p{S}]?[\\p{L}\\p{M}]+|"
    " ?[\\p{P}\\p{S}]+[\r\n]*|\\s*[\r\n]+|\\s+(?!\\S)|\\s+"]
# The same cuts by one pattern. To the third split, the stretch that the first two leave is the whole text: it
# ends at a digit, and where CJK begins or ends. What it does not match is a piece too: the last line of each
# group.
DEEPSEEK_PATTERN = "|".join([
    r"\p{N}{1,3}",
    r"[CJK&&[^\p{L}\p{M}\p{P}\p{S}]]?[CJK&&[\p{L}\p{M}]]+", r"[CJK&&[\p{P}\p{S}]]+",
    r"[CJK&&[^\p{L}\p{M}\p{P}\p{S}]]+(?![CJK&&[\p{L}\p{M}]])",
    r"[!-/:-@\[-`{-~][A-Za-z]+", r"[^\r\n\p{L}\p{P}\p{S}\p{N}CJK]?[\p{L}\p{M}&&[^CJK]]+",
    r" ?[\p{P}\p{S}&&[^CJK]]+[\r\n]*", r"\s*[\r\n]+", r"\s+(?![^\s\p{N}CJK])", r"\s+",
    r"[^\s\p{L}\p{M}\p{P}\p{S}\p{N}CJK]+(?![\p{L}\p{M}&&[^CJK]])"]).replace("CJK", "一-龥぀-ゟ゠-ヿ")
PROBE = "Hi, it's 1234\r\n\t   of 我们の・e\u0301 👩\u200d🚀 \u200b\0"    # a tokenizer must give it back unchanged


def get_tokenizer(name_or_path) -> tiktoken.Encoding:
    """"bytes", "gpt2" (downloaded on first use), a .tiktoken file, or a Hugging Face tokenizer.json (or its
    folder, or one with the tiktoken.model of Moonlight or Kimi).

    Raises FileNotFoundError, ValueError (an unsupported or damaged file) or OSError (gpt2 while offline).
    """
    if name_or_path == "bytes":  # long pieces: 4x faster than a piece per character, and nothing to backtrack
        return build("bytes", r"[\s\S]{1,64}", BYTES, {ENDOFTEXT: 256})
    if name_or_path == "gpt2":
        try:
            return tiktoken.get_encoding("gpt2")
        except OSError as error:
            raise OSError(f"could not download tokenizer gpt2 ({type(error).__name__}): go online once, or "
                          "give --tokenizer bytes or a tokenizer file") from error
    path = tokenizer_path(name_or_path)
    if path.name in OTHER_FILES:
        raise ValueError(f"{path}: a tokenizer in the form of {path.name} is not supported, only "
                         "tokenizer.json and tiktoken.model are")
    if not path.is_file():
        raise FileNotFoundError(f"no tokenizer {name_or_path}: give bytes, gpt2, a .tiktoken file or a "
                                "tokenizer.json")
    with blame(path):
        if path.name == "tiktoken.model":
            enc = from_kimi(path)
        else:
            enc = (from_tokenizer_json if path.suffix == ".json" else from_tiktoken_file)(path)
    return enc if read_ends(path, enc).eos else with_special_tokens(enc, [ENDOFTEXT])


def tokenizer_path(name_or_path) -> Path:
    """The file of a tokenizer that may be given as the folder that holds it."""
    path = Path(name_or_path)
    if name_or_path not in ("bytes", "gpt2") and path.is_dir():
        names = "tokenizer.json", "tiktoken.model", *OTHER_FILES
        path /= next((name for name in names if (path / name).is_file()), "tokenizer.json")
    return path


class Ends(NamedTuple):
    """Where texts begin and end for a model, in token ids."""
    bos: int | None
    eos: tuple[int, ...]    # each of them ends a text; the first one separates the documents of a data folder
    add_bos: bool           # the model expects bos before every text

    @property
    def begin(self) -> int:
        """The token after which a new document begins."""
        return self.bos if self.add_bos else self.eos[0]


def read_ends(name_or_path, enc: tiktoken.Encoding) -> Ends:
    """Where texts begin and end with the tokenizer name_or_path, whose encoding is enc.

    The files beside a release's tokenizer declare it: the ids in config.json, or instead in
    generation_config.json, say where the model stops; the names in tokenizer_config.json say what the
    tokenizer puts around a text. Of several eos ids, the named one comes first. If no eos is declared, it is
    the first of KNOWN_EOS (and, as in GPT-2, bos too); get_tokenizer makes sure that there is one. """
    path, ids, names, template = tokenizer_path(name_or_path), {}, {}, None
    if path.name in ("tokenizer.json", "tiktoken.model"):   # a file of any other name may lie beside anything
        for file in "config.json", "generation_config.json":
            ids |= {key: value for key, value in read_json(path.parent / file).items() if value is not None}
        for file in "special_tokens_map.json", "tokenizer_config.json":
            names |= {key: value for key, value in read_json(path.parent / file).items() if value is not None}
    if path.suffix == ".json":
        template = template_bos(read_json(path).get("post_processor"))

    bos, eos = (special_token(enc, names.get(key)) for key in ("bos_token", "eos_token"))
    add_bos = names.get("add_bos_token", template is not None)
    if template is not None:
        bos = special_token(enc, template)
    if bos is None:
        bos = ids.get("bos_token_id")
    stops = ids.get("eos_token_id", [])
    stops = stops if isinstance(stops, list) else [stops]
    if eos in stops or not stops:
        stops = [eos, *(token for token in stops if token != eos)] if eos is not None else []
    for token in stops if bos is None else [*stops, bos]:
        if type(token) is not int or not 0 <= token < enc.n_vocab:
            raise ValueError(f"{path.parent}: bos or eos token {repr(token)[:100]} is not one of the "
                             f"tokenizer's {enc.n_vocab} ids; correct config.json, generation_config.json or "
                             "tokenizer_config.json")
    if not stops:
        stops = [enc._special_tokens[token] for token in KNOWN_EOS if token in enc._special_tokens][:1]
        known = [enc._special_tokens[token] for token in KNOWN_BOS if token in enc._special_tokens] + stops
        bos = known[0] if bos is None and known else bos
    return Ends(bos, tuple(stops), add_bos is True and bos is not None)


def ends_of_data(meta: dict) -> Ends:
    """The ends that meta.json of a data folder records. Folders of other making may have the separator
    alone."""
    with blame("meta.json"):
        ends = Ends(meta.get("bos"), tuple(meta.get("eos", [meta["separator"]])), meta.get("add_bos", False))
        need(all(type(i) is int for i in [ends.begin, *ends.eos]), f"bos {ends.bos!r} or eos {ends.eos!r}")
        return ends


def special_token(enc: tiktoken.Encoding, token) -> int | None:
    """The id of a special token that tokenizer_config.json names, as text or as {"content": text}."""
    text = token.get("content") if isinstance(token, dict) else token
    return enc._special_tokens.get(text) if isinstance(text, str) else None


def template_bos(post_processor) -> str | None:
    """The special token that the post_processor of a tokenizer.json puts before a text."""
    match post_processor:
        case {"type": "Sequence", "processors": [*parts]}:
            pass
        case _:
            parts = [post_processor]
    for part in parts:
        match part:
            case {"type": "TemplateProcessing", "single": [{"SpecialToken": {"id": str(name)}}, *_]}:
                return name


def read_json(path: Path) -> dict:
    """The JSON object in a file; {} if there is no such file."""
    if not path.is_file():
        return {}
    with blame(path):
        content = json.loads(path.read_text("utf-8"))
        need(isinstance(content, dict), f"a {type(content).__name__} in place of a JSON object")
        return content


def fim_ids(enc: tiktoken.Encoding) -> list:
    """Ids of the three tokens FIM. Raises ValueError if the tokenizer lacks one."""
    if missing := [token for token in FIM if token not in enc._special_tokens]:
        raise ValueError(f"tokenizer {enc.name} has no {missing[0]}, so nothing was trained to fill in a "
                         "middle; prepare the data with --fim_rate 0.1, and train on them")
    return [enc._special_tokens[token] for token in FIM]


def with_special_tokens(enc: tiktoken.Encoding, tokens) -> tiktoken.Encoding:
    """The same tokenizer with these special tokens, which come after all others where it lacks them."""
    missing = [token for token in tokens if token not in enc._special_tokens]
    added = {token: enc.n_vocab + i for i, token in enumerate(missing)}
    return build(enc.name, enc._pat_str, enc._mergeable_ranks, enc._special_tokens | added) if added else enc


def token_lengths(enc: tiktoken.Encoding) -> np.ndarray:
    """(n_vocab,) int64: bytes of text per token id; 0 for special tokens and unused ids. For bits per
    byte."""
    lengths = np.zeros(enc.n_vocab, np.int64)
    for token, rank in enc._mergeable_ranks.items():
        lengths[rank] = len(token)
    return lengths


def token_bytes(enc: tiktoken.Encoding, token: int) -> bytes:
    """The text of a token id; of an id that no token has, of which a model's vocabulary may hold some,
    none."""
    try:
        return enc.decode_single_token_bytes(token)
    except KeyError:
        return b""


def same_ids(a: tiktoken.Encoding, b: tiktoken.Encoding) -> bool:
    """Whether each id stands for the same token in both, whatever their files and their patterns."""
    return a._mergeable_ranks == b._mergeable_ranks and a._special_tokens == b._special_tokens


def encoding_to_json(enc: tiktoken.Encoding) -> str:
    """All of a tokenizer in an ASCII string, which travels inside checkpoints."""
    ranks = sorted(enc._mergeable_ranks.items(), key=lambda item: item[1])
    return json.dumps({"name": enc.name, "pat_str": enc._pat_str, "special_tokens": enc._special_tokens,
                       "ranks": {base64.b64encode(t).decode(): r for t, r in ranks}})


def encoding_from_json(text: str) -> tiktoken.Encoding:
    """The inverse of encoding_to_json. Raises ValueError, one sentence, whatever else the string holds."""
    with blame("encoding json"):
        spec = json.loads(text)
        ranks = {base64.b64decode(t, validate=True): r for t, r in spec["ranks"].items()}
        return build(spec["name"], spec["pat_str"], ranks, spec["special_tokens"])


def build(name: str, pat_str: str, ranks: dict, special_tokens: dict) -> tiktoken.Encoding:
    """A checked tiktoken.Encoding: on what is a ValueError here, tiktoken panics or loses text."""
    ids = [*ranks.values(), *special_tokens.values()]
    need(all(type(i) is int and 0 <= i < 1 << 24 for i in ids), "a token id that is no integer below 2**24")
    need(len(set(ids)) == len(ids), "an id that two tokens share")
    need(b"" not in ranks and "" not in special_tokens and isinstance(name, str), "an empty token or name")
    for token, other in itertools.pairwise(sorted(special_tokens)):     # Hugging Face finds the longer one
        need(not other.startswith(token), f"special token {other!r}, which begins with another, {token!r},")
    for byte in BYTES:
        need(byte in ranks, f"a vocabulary without a token for the byte {byte!r}")
    enc = tiktoken.Encoding(name, pat_str=pat_str, mergeable_ranks=ranks, special_tokens=special_tokens)
    need(enc.decode(encode(enc, PROBE)) == PROBE, f"a pattern that loses text ({pat_str[:60]!r})")
    return enc


def encode(enc: tiktoken.Encoding, text: str, special=False) -> list:
    """Token ids of text, in which a literal "<|endoftext|>" is text like any other, unless `special`.
    ValueError if the pattern fails."""
    try:
        return enc.encode(text, allowed_special="all") if special else enc.encode_ordinary(text)
    except BaseException as error:
        if type(error).__name__ != "PanicException":    # Rust's: no Exception, its class can't be imported
            raise
        raise ValueError(f"the pattern of tokenizer {enc.name} fails on this text: a run of a million spaces "
                         "or the like is too long for it (shorten it, or use --tokenizer bytes), or it has "
                         "an empty match") from None


def need(ok: bool, feature: str) -> None:
    if not ok:
        raise ValueError(f"{feature} is not supported")


@contextlib.contextmanager
def blame(origin):
    """Whatever reading a damaged tokenizer raises becomes a ValueError of one sentence that names its
    origin."""
    try:
        yield
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        reason = str(error) if isinstance(error, ValueError) else f"malformed: {error!r}"
        raise ValueError(f"{origin}: {' '.join(reason.split())[:400]}") from error


def from_kimi(path: Path) -> tiktoken.Encoding:
    """A tiktoken.model, with the special tokens that tokenizer_config.json beside it lists, ids kept."""
    config = path.parent / "tokenizer_config.json"
    with blame(config):
        spec = json.loads(config.read_text("utf-8"))
        kind = spec.get("tokenizer_class")
        need(kind == "TikTokenTokenizer", f"tokenizer_class {kind!r}")
        special = {added(token): int(i) for i, token in spec["added_tokens_decoder"].items()}
        need(len(special) == len(spec["added_tokens_decoder"]), "an added token with two ids")
    return from_tiktoken_file(path, KIMI_PATTERN, special)


def added(token: dict) -> str:
    """The text of an entry of Hugging Face's added tokens."""
    for option in ("lstrip", "rstrip", "single_word"):  # they remove spaces beside it, or depend on them
        need(not token.get(option), f"added token {token['content']!r} with {option}")
    return token["content"]


def from_tiktoken_file(path: Path, pat_str=GPT2_PATTERN, special_tokens={}) -> tiktoken.Encoding:
    """A file of `base64 rank` lines. It holds no pattern: we take GPT-2's by default."""
    ranks = {}
    for number, line in enumerate(path.read_bytes().splitlines(), 1):
        if not line:    # as tiktoken does
            continue
        try:
            token, rank = line.split()
            token, rank = base64.b64decode(token, validate=True), int(rank)
        except ValueError:
            raise ValueError(f"line {number} is not `base64 rank`") from None
        need(token not in ranks, f"line {number}: token {token!r} a second time")
        ranks[token] = rank
    need(sorted(ranks.values()) == list(range(len(ranks))),
         f"a rank missing from, or twice in, 0...{len(ranks) - 1}")
    return build(path.name, pat_str, ranks, special_tokens)


def byte_alphabet() -> dict:
    """GPT-2 writes a byte as a character: itself if it shows, else the characters 256, 257, ..."""
    shown = [b for b in range(256) if chr(b).isprintable() and b != ord(" ")]
    hidden = [b for b in range(256) if b not in shown]
    return {chr(b): b for b in shown} | {chr(256 + i): b for i, b in enumerate(hidden)}


def encoding_to_tokenizer_json(enc: tiktoken.Encoding, bos: int | None = None) -> dict:
    """The inverse of from_tokenizer_json: contents of a tokenizer.json, from which Hugging Face makes the
    same ids, with bos before each text if it is given."""
    letters = {b: c for c, b in byte_alphabet().items()}
    ranks = dict(sorted(enc._mergeable_ranks.items(), key=lambda item: item[1]))

    def spell(token):
        return "".join(letters[b] for b in token)

    merges, ignore_merges = [], False
    for token, rank in ranks.items():
        pair = last_pair(token, rank, ranks)
        if len(pair) == 2:
            merges.append(pair)
        elif len(token) > 1:    # it is found whole, or made by the pairs that tiktoken may join
            merges += splits(token, ranks)
            ignore_merges = True
    byte_level = {"add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    post_processor = None
    if bos is not None:
        name = {i: token for token, i in enc._special_tokens.items()}.get(bos, str(bos))
        first, a, b = ({kind: {"id": id, "type_id": 0}} for kind, id in (
            ("SpecialToken", name), ("Sequence", "A"), ("Sequence", "B")))
        post_processor = {"type": "TemplateProcessing", "single": [first, a], "pair": [first, a, b],
                          "special_tokens": {name: {"id": name, "ids": [bos], "tokens": [name]}}}
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    return {"version": "1.0", "truncation": None, "padding": None,
            "added_tokens": [{"id": i, "content": token, **plain}
                             for token, i in sorted(enc._special_tokens.items(), key=lambda item: item[1])],
            "normalizer": None,
            "pre_tokenizer": {"type": "Sequence", "pretokenizers": [
                *({"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
                  for pattern in split_patterns(enc._pat_str)),
                {"type": "ByteLevel", **byte_level}]},
            "post_processor": post_processor, "decoder": {"type": "ByteLevel", **byte_level},
            "model": {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
                      "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False,
                      "ignore_merges": ignore_merges,
                      "vocab": {spell(token): i for token, i in ranks.items()} | enc._special_tokens,
                      "merges": [[spell(a), spell(b)] for a, b in merges]}}


def tokenizer_files(enc: tiktoken.Encoding, ends: Ends | None = None) -> dict:
    """{file name: contents} of a tokenizer for Hugging Face's PreTrainedTokenizerFast. bos_token_id and
    eos_token_id in tokenizer_config.json are meant for config.json. Without `ends`, a known special token is
    bos and eos."""
    bos, eos, add_bos = ends or read_ends("bytes", enc)
    names = {i: token for token, i in enc._special_tokens.items()}
    return {"tokenizer.json": encoding_to_tokenizer_json(enc, bos if add_bos else None),
            "tokenizer_config.json": {
                "tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False,
                "add_bos_token": add_bos, "bos_token": names.get(bos), "bos_token_id": bos,
                "add_eos_token": False, "eos_token": names.get(eos[0]),
                "eos_token_id": eos[0] if len(eos) == 1 else list(eos)}}


def from_tokenizer_json(path: Path) -> tiktoken.Encoding:
    """A byte-level BPE tokenizer.json, ids kept. Its added tokens become special: they never come out of
    plain text."""
    spec = json.loads(path.read_text("utf-8"))
    model, normalizer = spec["model"], spec.get("normalizer")
    need(not normalizer or normalizer.get("normalizers") == [],
         f"normalizer {normalizer and normalizer['type']}")
    need(model.get("type", "BPE") == "BPE", f"model {model.get('type')}")
    for key in ("dropout", "continuing_subword_prefix", "end_of_word_suffix", "byte_fallback"):
        need(not model.get(key), f"model.{key}")

    alphabet = byte_alphabet()

    def raw(token):
        need(all(c in alphabet for c in token), f"token {token!r} (not byte-level)")
        return bytes(alphabet[c] for c in token)

    special = {}
    for token in spec.get("added_tokens") or []:
        text, free = added(token), max(len(model["vocab"]), 1 + max(special.values(), default=0))
        theirs = model["vocab"].get(text, special.get(text, free))
        need(token["id"] == theirs,
             f"added token {text!r} with the id {token['id']}, for which Hugging Face takes {theirs},")
        special[text] = theirs
    ranks = {raw(token): i for token, i in model["vocab"].items() if token not in special}

    # tiktoken knows no merges: it joins the pair that makes the lowest id. That is the same thing if the ids
    # grow in the order of the merges, and each token, built up from its bytes, is at last made by a pair that
    # is a merge. With ignore_merges a token may also be found whole, as tiktoken finds it, if all pairs that
    # make it are merges.
    merges = [tuple(map(raw, m.split(" ") if isinstance(m, str) else m)) for m in model["merges"]]
    need(all(len(pair) == 2 for pair in merges), "a merge that is no pair")
    made = [ranks.get(a + b) for a, b in merges]
    need(None not in made, "a merge that makes no token, or an added one,")
    need(made == sorted(made), "a merge order that differs from the order of the ids")
    merges = set(merges)
    for token, rank in ranks.items():
        if len(token) > 1 and last_pair(token, rank, ranks) not in merges:
            whole = model.get("ignore_merges") and merges.issuperset(splits(token, ranks))
            need(whole, f"token {token!r}, which no merges build up,")
    return build(path.name, one_pattern(spec.get("pre_tokenizer")), ranks, special)


def last_pair(token: bytes, rank: int, ranks: dict) -> tuple:
    """The pieces (two, if all is well) that token consists of once every merge below its rank is made."""
    parts = [token[i:i + 1] for i in range(len(token))]
    while len(parts) > 2:
        best, i = min((ranks.get(a + b, rank), i) for i, (a, b) in enumerate(zip(parts, parts[1:])))
        if best >= rank:
            break
        parts[i:i + 2] = [parts[i] + parts[i + 1]]
    return tuple(parts)


def splits(token: bytes, ranks: dict) -> list:
    """All pairs of tokens that make up a token."""
    pairs = [(token[:i], token[i:]) for i in range(1, len(token))]
    return [(a, b) for a, b in pairs if a in ranks and b in ranks]


# What a pattern may consist of. The rest (anchors, \w, \b, named groups, ...) means one thing to Hugging
# Face's regex engine and another to tiktoken's.
SYNTAX = re.compile(r"\((?:\?(?:i?:|>|<?[=!])|(?!\?))|[)|?*+]|\{\d+(?:,\d*)?\}(?!\+)"
                    r"|\[\^?(?:\\.|[^\[\]\\]|(?<=&&)\[(?:\\.|[^\[\]\\])+\])+\]|\\[pP](?:\{\^?\w+\}|\w)|\\."
                    r"|[^()|?*+{}\[\]\\^$]", re.S)


def one_pattern(pre_tokenizer: dict) -> str:
    """The single pattern that cuts text like a pre_tokenizer. ValueError if we know none."""
    need(isinstance(pre_tokenizer, dict), f"pre_tokenizer {pre_tokenizer}")
    steps = pre_tokenizer["pretokenizers"] if pre_tokenizer["type"] == "Sequence" else [pre_tokenizer]
    need(steps, "an empty pre_tokenizer")
    *steps, end = steps
    need(end["type"] == "ByteLevel", f"a pre_tokenizer that ends in {end['type']}, not ByteLevel,")
    need(not end.get("add_prefix_space", True), "add_prefix_space")
    patterns, keeps_gaps = [], True  # Isolated keeps what lies between matches; Removed, inverted, drops it
    for step in steps:
        need(step["type"] == "Split", f"pre_tokenizer {step['type']} before ByteLevel")
        keeps_gaps = step["behavior"] == "Isolated"
        need(keeps_gaps or (step["behavior"] == "Removed" and step["invert"] and steps == [step]),
             f"Split behavior {step['behavior']}")
        regex, string = step["pattern"].get("Regex"), step["pattern"].get("String")
        patterns.append(re.sub(r"([][\\.+*?()|{}^$])", r"\\\1", string) if regex is None else regex)
    if end.get("use_regex", True):
        patterns.append(GPT2_PATTERN)
    need(patterns, "ByteLevel with neither use_regex nor a Split before it")
    if patterns == DEEPSEEK_SPLITS:
        return DEEPSEEK_PATTERN
    need(len(patterns) == 1, f"a sequence of splits other than DeepSeek-V3's ({patterns[0][:60]!r}, then "
                             f"{patterns[-1][:60]!r})")
    escapes = set(re.findall(r"\\([a-zA-Z0-9])", patterns[0].replace("\\\\", "")))
    understood = "".join(part[0] for part in SYNTAX.finditer(patterns[0]))
    need(understood == patterns[0] and escapes <= set("pPsSdDrnt"), f"the regex {patterns[0][:60]!r}")
    return with_gaps(patterns[0]) if keeps_gaps else patterns[0]


def with_gaps(pattern: str) -> str:
    """The pattern, and all that lies between its matches: tiktoken drops what it does not match."""
    return pattern + rf"|(?:(?!{pattern})[\s\S])+"


def split_patterns(pattern: str) -> list:
    """The inverse of one_pattern: the Splits that Hugging Face needs for the same cuts."""
    if pattern == DEEPSEEK_PATTERN:
        return DEEPSEEK_SPLITS
    inner = pattern[:(len(pattern) - len(with_gaps(""))) // 2]
    return [inner if with_gaps(inner) == pattern else pattern]
