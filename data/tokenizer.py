"""
Tokenizers, each as a tiktoken.Encoding: a pattern cuts text into pieces, then byte pairs are merged within
each piece. A tokenizer travels as JSON beside the data and inside checkpoints.
"""

import base64
import contextlib
import itertools
import json
import re
from pathlib import Path
from typing import NamedTuple

import numpy as np
import tiktoken

ENDOFTEXT, DEEPSEEK_EOS = "<|endoftext|>", "<｜end▁of▁sentence｜>"
KNOWN_EOS = (ENDOFTEXT, DEEPSEEK_EOS, "[EOS]", "<|end_of_text|>", "</s>", "<eos>", "<|im_end|>")
KNOWN_BOS = ("<｜begin▁of▁sentence｜>", "[BOS]")
FIM = ("<｜fim▁begin｜>", "<｜fim▁hole｜>", "<｜fim▁end｜>")  # as DeepSeek-V3's tokenizer names them
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
# DeepSeek-V3 splits three times: numbers off, runs of CJK off, then these runs and the rest into words
DEEPSEEK_SPLITS = [
    r"\p{N}{1,3}", "[一-龥぀-ゟ゠-ヿ]+",
    "[!\"#$%&'()*+,\\-./:;<=>?@\\[\\\\\\]^_`{|}~][A-Za-z]+|[^\r\n\\p{L}\\p{P}\\p{S}]?[\\p{L}\\p{M}]+|"
    " ?[\\p{P}\\p{S}]+[\r\n]*|\\s*[\r\n]+|\\s+(?!\\S)|\\s+"]
# The same cuts by one pattern. For the third split, a stretch that the first two leave is a whole text, which
# ends at a number and where CJK begins or ends. What that split does not match is a piece too: the last line
# of each group.
DEEPSEEK_PATTERN = "|".join([
    r"\p{N}{1,3}",
    r"[CJK&&[^\p{L}\p{M}\p{P}\p{S}]]?[CJK&&[\p{L}\p{M}]]+", r"[CJK&&[\p{P}\p{S}]]+",
    r"[CJK&&[^\p{L}\p{M}\p{P}\p{S}]]+(?![CJK&&[\p{L}\p{M}]])",
    r"[!-/:-@\[-`{-~][A-Za-z]+", r"[^\r\n\p{L}\p{P}\p{S}\p{N}CJK]?[\p{L}\p{M}&&[^CJK]]+",
    r" ?[\p{P}\p{S}&&[^CJK]]+[\r\n]*", r"\s*[\r\n]+", r"\s+(?![^\s\p{N}CJK])", r"\s+",
    r"[^\s\p{L}\p{M}\p{P}\p{S}\p{N}CJK]+(?![\p{L}\p{M}&&[^CJK]])"]).replace("CJK", "一-龥぀-ゟ゠-ヿ")
BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
# every kind of character that Unicode knows: a tokenizer must lose none
PROBE = ("Hi, it's 1234\r\n\t   of 我们の・e\u0301 👩\u200d🚀 \u200b\0 ǅʰª\u0903\u20ddⅧ² ‿—([)]«» +$^© "
         "\xa0\u2028\u2029\x85\ue000\u0378")
# what the regex of a Split may consist of: anchors, \w, \b, named groups and the like mean one thing to
# Hugging Face's regex engine and another to tiktoken's
ESCAPE = r"\\(?:[pP](?:\{\^?\w+\}|\w)|[sSdDrnt]|[^a-zA-Z0-9])"
SYNTAX = re.compile("(?:" + "|".join([
    r"\((?:\?(?:i?:|>|<?[=!])|(?!\?))", r"[)|?*+]", r"\{\d+(?:,\d*)?\}(?!\+)", ESCAPE, r"[^()|?*+{}\[\]\\^$]",
    rf"\[\^?(?:{ESCAPE}|[^\[\]\\]|(?<=&&)\[(?:{ESCAPE}|[^\[\]\\])+\])+\]"]) + ")*", re.S)


def get_tokenizer(name_or_path):
    """-> tiktoken.Encoding. name_or_path: "bytes", "gpt2" (downloaded on first use), a .tiktoken file, a
    tokenizer.json of byte-level BPE, such as DeepSeek-V3's, or a folder with that or Kimi's tiktoken.model.
    Adds ENDOFTEXT to a tokenizer that knows no token which ends a text. FileNotFoundError, ValueError for an
    unsupported or damaged file, OSError for gpt2 while offline."""
    if name_or_path == "bytes":     # pieces of 64: 4x faster than a piece per character
        return build("bytes", r"[\s\S]{1,64}", BYTES, {ENDOFTEXT: 256})
    if name_or_path == "gpt2":
        try:
            return tiktoken.get_encoding("gpt2")
        except OSError as error:
            raise OSError(f"could not download tokenizer gpt2 ({type(error).__name__}): go online once, or "
                          "give --tokenizer bytes or a tokenizer file") from error
    path = tokenizer_path(name_or_path)
    if not path.is_file():
        raise FileNotFoundError(f"no tokenizer {name_or_path}: give bytes, gpt2, a .tiktoken file, a "
                                "tokenizer.json, or a folder with a tokenizer.json or tiktoken.model")
    with blame(path):
        enc = from_tokenizer_json(path) if path.suffix == ".json" else from_tiktoken_file(path)
        return enc if read_ends(path, enc).eos else with_special_tokens(enc, [ENDOFTEXT])


def tokenizer_path(name_or_path):
    """The file of a tokenizer that may be given as its folder."""
    path = Path(name_or_path)
    if name_or_path not in ("bytes", "gpt2") and path.is_dir():
        path /= "tokenizer.json" if (path / "tokenizer.json").is_file() else "tiktoken.model"
    return path


class Ends(NamedTuple):
    """Where texts begin and end for a model, in token ids."""
    bos: int | None
    eos: tuple[int, ...]    # each of them ends a text; the first one separates the documents of a data folder
    add_bos: bool           # the model expects bos before every text

    @property
    def begin(self):        # the token after which a new document begins
        return self.bos if self.add_bos else self.eos[0]


def read_ends(name_or_path, enc):
    """The Ends of a tokenizer whose encoding is enc, as the files of a release declare them: config.json by
    ids, which generation_config.json overrides, and tokenizer_config.json by names. The named eos comes
    first. If no eos is declared, it is the first of KNOWN_EOS (and bos too, as in GPT-2). ValueError for
    ids that the tokenizer does not have."""
    path, ids, said = tokenizer_path(name_or_path), enc._special_tokens, {}
    if path.name in ("tokenizer.json", "tiktoken.model"):   # a file of any other name may lie beside anything
        for file in "special_tokens_map", "tokenizer_config", "config", "generation_config":
            values = read_json(path.with_name(f"{file}.json"))
            said |= {key: value for key, value in values.items() if value is not None}
    if path.suffix == ".json":
        post_processor = read_json(path).get("post_processor") or {}
        for part in post_processor.get("processors", [post_processor]):
            match part:
                case {"type": "TemplateProcessing", "single": [{"SpecialToken": {"id": bos}}, *_]}:
                    said = {"add_bos_token": True} | said | {"bos_token": bos}

    named = [said.get("bos_token"), said.get("eos_token")]
    bos, eos = [ids.get(token["content"] if isinstance(token, dict) else token) for token in named]
    bos = said.get("bos_token_id") if bos is None else bos
    stops = said.get("eos_token_id", [])
    stops = sorted(stops if isinstance(stops, list) else [stops], key=lambda token: token != eos)
    for token in stops if bos is None else [*stops, bos]:
        if type(token) is not int or not 0 <= token < enc.n_vocab:
            raise ValueError(f"bos or eos token {repr(token)[:100]} is not one of the tokenizer's "
                             f"{enc.n_vocab} ids; correct config.json or generation_config.json")
    if eos is not None and not {*stops} & {*ids.values()}:  # none, or transformers' default, another token's
        stops = [eos]
    if not stops:
        known = [ids[token] for token in KNOWN_BOS + KNOWN_EOS if token in ids]
        stops = [ids[token] for token in KNOWN_EOS if token in ids][:1]
        bos = known[0] if bos is None and known else bos
    return Ends(bos, tuple(stops), bool(said.get("add_bos_token")) and bos is not None)


def ends_of_data(meta):
    """The Ends that a data folder's meta.json records; data of other making may have the separator alone."""
    return Ends(meta.get("bos"), tuple(meta.get("eos", [meta["separator"]])), meta.get("add_bos", False))


def read_json(path):
    """The JSON object in a file; {} if there is no such file."""
    if not path.is_file():
        return {}
    with blame(path):
        content = json.loads(path.read_text("utf-8"))
        need(isinstance(content, dict), f"a {type(content).__name__} in place of a JSON object")
        return content


def fim_ids(enc):
    """The ids of the three tokens FIM. ValueError if the tokenizer lacks one."""
    if missing := [token for token in FIM if token not in enc._special_tokens]:
        raise ValueError(f"tokenizer {enc.name} has no {missing[0]}, so nothing was trained to fill in a "
                         "middle; prepare the data with --fim_rate 0.1, and train on them")
    return [enc._special_tokens[token] for token in FIM]


def with_special_tokens(enc, tokens):
    """The same tokenizer with these special tokens; those that it lacks get the next ids."""
    missing = [token for token in tokens if token not in enc._special_tokens]
    added = {token: enc.n_vocab + i for i, token in enumerate(missing)}
    return build(enc.name, enc._pat_str, enc._mergeable_ranks, enc._special_tokens | added) if added else enc


def token_lengths(enc):
    """(n_vocab,) int64: bytes of text per token id, for bits per byte; 0 for special tokens, unused ids."""
    lengths = np.zeros(enc.n_vocab, np.int64)
    for token, rank in enc._mergeable_ranks.items():
        lengths[rank] = len(token)
    return lengths


def token_bytes(enc, token):
    """The text of a token id; empty for the ids that pad a model's vocabulary."""
    try:
        return enc.decode_single_token_bytes(token)
    except KeyError:
        return b""


def same_ids(a, b):
    """Whether each id means the same token in both, whatever their files and patterns."""
    return a._mergeable_ranks == b._mergeable_ranks and a._special_tokens == b._special_tokens


def encoding_to_json(enc):
    """All of a tokenizer in an ASCII string, which travels inside checkpoints."""
    ranks = {base64.b64encode(token).decode(): rank for token, rank in enc._mergeable_ranks.items()}
    return json.dumps({"name": enc.name, "pat_str": enc._pat_str, "special_tokens": enc._special_tokens,
                       "ranks": ranks})


def encoding_from_json(text):
    """The inverse of encoding_to_json. ValueError, one sentence, if the string holds anything else."""
    with blame("encoding json"):
        spec = json.loads(text)
        ranks = {base64.b64decode(token, validate=True): rank for token, rank in spec["ranks"].items()}
        return build(spec["name"], spec["pat_str"], ranks, spec["special_tokens"])


def build(name, pat_str, ranks, special_tokens):
    """A checked tiktoken.Encoding. Where this raises ValueError, tiktoken panics or loses text."""
    ids = [*ranks.values(), *special_tokens.values()]
    need(all(type(i) is int and 0 <= i < 1 << 24 for i in ids), "a token id that is no integer below 2**24")
    need(len(set(ids)) == len(ids), "an id that two tokens share")
    need(b"" not in ranks and "" not in special_tokens and isinstance(name, str), "an empty token or name")
    for token, other in itertools.pairwise(sorted(special_tokens)):     # Hugging Face finds the longer one
        need(not other.startswith(token), f"special token {other!r}, which begins with another, {token!r},")
    need(ranks.keys() >= BYTES.keys(), "a vocabulary without a token for each byte")
    enc = tiktoken.Encoding(name, pat_str=pat_str, mergeable_ranks=ranks, special_tokens=special_tokens)
    encode(enc, PROBE)
    return enc


def encode(enc, text, special=False):
    """Token ids of text. A literal "<|endoftext|>" is text like any other, unless `special`."""
    try:
        ids = enc.encode(text, allowed_special="all") if special else enc.encode_ordinary(text)
    except BaseException as error:
        if type(error).__name__ != "PanicException":    # Rust's: no Exception, its class can't be imported
            raise
        raise ValueError(f"the pattern of tokenizer {enc.name} fails on this text: a run of a million spaces "
                         "or the like is too long for it (shorten it, or use --tokenizer bytes), or it has "
                         "an empty match") from None
    need(enc.decode(ids) == text, f"a pattern that loses text ({enc._pat_str[:60]!r})")
    return ids


def need(ok, feature):
    if not ok:
        raise ValueError(f"{feature} is not supported")


@contextlib.contextmanager
def blame(origin):
    """Turns what reading a damaged file raises into a ValueError of one sentence that names the file."""
    try:
        yield
    except (ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RuntimeError) as error:
        reason = str(error) if isinstance(error, ValueError) else f"malformed: {error!r}"
        raise ValueError(f"{origin}: {' '.join(reason.split())[:400]}") from error


# ------------------------------------------------------------------------------------------------------------
# Files in

def from_tiktoken_file(path):
    """A file of `base64 rank` lines. It holds no pattern: GPT-2's is assumed, and Kimi's for tiktoken.model,
    whose special tokens are in the tokenizer_config.json beside it."""
    pattern, special, ranks = GPT2_PATTERN, {}, {}
    if path.name == "tiktoken.model":
        spec = read_json(path.with_name("tokenizer_config.json"))
        kind = spec.get("tokenizer_class")
        need(kind == "TikTokenTokenizer", f"tokenizer_class {kind!r}")
        pattern = KIMI_PATTERN
        special = {added_text(token): int(i) for i, token in spec["added_tokens_decoder"].items()}
    for number, line in enumerate(path.read_bytes().splitlines(), 1):
        with blame(f"line {number} is not `base64 rank`"):
            if line:    # tiktoken skips empty lines too
                token, rank = line.split()
                ranks[base64.b64decode(token, validate=True)] = int(rank)
    need(sorted(ranks.values()) == list(range(len(ranks))), "a rank missing, or twice,")
    return build(path.name, pattern, ranks, special)


def added_text(token):
    """The text of an added token of Hugging Face."""
    for option in ("lstrip", "rstrip", "single_word"):  # they remove spaces beside it, or depend on them
        need(not token.get(option), f"added token {token['content']!r} with {option}")
    return token["content"]


def byte_alphabet():
    """GPT-2 writes a byte as a character: itself if it shows, else the characters 256, 257, ..."""
    shown = [b for b in range(256) if chr(b).isprintable() and b != ord(" ")]
    hidden = [b for b in range(256) if b not in shown]
    return {chr(b): b for b in shown} | {chr(256 + i): b for i, b in enumerate(hidden)}


def from_tokenizer_json(path):
    """A tokenizer.json of byte-level BPE. Its added tokens become special: plain text never makes them."""
    spec = json.loads(path.read_text("utf-8"))
    model, normalizer, alphabet = spec["model"], spec.get("normalizer"), byte_alphabet()
    need(not normalizer or normalizer.get("normalizers") == [], f"normalizer {normalizer}")
    need(model.get("type", "BPE") == "BPE", f"model {model.get('type')}")
    for key in ("dropout", "continuing_subword_prefix", "end_of_word_suffix", "byte_fallback"):
        need(not model.get(key), f"model.{key}")

    def raw(token):
        need(alphabet.keys() >= set(token), f"token {token!r} (not byte-level)")
        return bytes(alphabet[c] for c in token)

    special = {}
    for token in spec.get("added_tokens") or []:
        text, free = added_text(token), max(len(model["vocab"]), 1 + max(special.values(), default=0))
        theirs = model["vocab"].get(text, special.get(text, free))
        need(token["id"] == theirs,
             f"added token {text!r} with the id {token['id']}, for which Hugging Face takes {theirs},")
        special[text] = theirs
    ranks = {raw(token): i for token, i in model["vocab"].items() if token not in special}
    merges = [tuple(map(raw, m.split(" ") if isinstance(m, str) else m)) for m in model["merges"]]
    made = [ranks.get(b"".join(pair)) for pair in merges if len(pair) == 2 and ranks.keys() >= {*pair}]
    need(len(made) == len(merges) and None not in made, "a merge that is no pair of tokens, or makes none")

    # tiktoken knows no merges: it joins the pair that makes the lowest id. That gives the same tokens if the
    # ids grow in the order of the merges, and every pair that it joins is a merge.
    need(made == sorted(made), "a merge order that differs from the order of the ids")
    pairs, whole = needed_merges(ranks)
    merges = set(merges)
    unmade = [a + b for a, b in pairs if (a, b) not in merges]
    if not model.get("ignore_merges"):      # it finds whole pieces of text first, as tiktoken does
        unmade += whole
    need(not unmade, f"token {unmade[:1]}, which no merges build up,")
    return build(path.name, one_pattern(spec.get("pre_tokenizer")), ranks, special)


def needed_merges(ranks):
    """The pairs that tiktoken joins, by the rank of what they make, and the tokens that it only finds as a
    whole piece of text, since the merges below their rank leave more than two parts of them."""
    merges, whole = [], []
    for token, rank in sorted(ranks.items(), key=lambda item: item[1]):
        parts = [token[i:i + 1] for i in range(len(token))]
        while len(parts) > 2:
            best, i = min((ranks.get(a + b, rank), i) for i, (a, b) in enumerate(zip(parts, parts[1:])))
            if best >= rank:
                break
            parts[i:i + 2] = [parts[i] + parts[i + 1]]
        if len(parts) == 2:
            merges.append(tuple(parts))
        elif len(parts) > 2:
            whole.append(token)
            pairs = [(token[:i], token[i:]) for i in range(1, len(token))]  # tiktoken joins them elsewhere
            merges += [(a, b) for a, b in pairs if a in ranks and b in ranks]
    return merges, whole


def one_pattern(pre_tokenizer):
    """The single pattern that cuts text like a pre_tokenizer: GPT-2's, which ByteLevel has built in, that of
    a single Split, or DeepSeek-V3's. ValueError for any other."""
    match pre_tokenizer:
        case {"type": "ByteLevel", "add_prefix_space": False} if pre_tokenizer.get("use_regex", True):
            return GPT2_PATTERN
        case {"type": "Sequence", "pretokenizers": [
                {"type": "Split", "pattern": {"Regex": str(regex)}, "behavior": "Isolated"}
                | {"type": "Split", "pattern": {"Regex": str(regex)}, "behavior": "Removed", "invert": True},
                {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}
                ]} if SYNTAX.fullmatch(regex):
            return regex    # what lies between matches is kept or dropped; build sees that there is nothing
    need(pre_tokenizer == pre_tokenizer_json(DEEPSEEK_PATTERN), f"pre_tokenizer {str(pre_tokenizer)[:300]}, "
         "unlike GPT-2's, DeepSeek-V3's, and a single Split whose regex means the same to tiktoken,")
    return DEEPSEEK_PATTERN


# ------------------------------------------------------------------------------------------------------------
# Files out

def tokenizer_files(enc, ends=None):
    """{file name: contents} of a tokenizer for Hugging Face's PreTrainedTokenizerFast, with the same ids.
    bos_token_id and eos_token_id in tokenizer_config.json are meant for config.json."""
    bos, eos, add_bos = ends or read_ends("bytes", enc)
    names = dict(sorted((i, token) for token, i in enc._special_tokens.items()))
    letters = {b: c for c, b in byte_alphabet().items()}
    spelled = {token: "".join(letters[b] for b in token) for token in enc._mergeable_ranks}
    merges, whole = needed_merges(enc._mergeable_ranks)
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    begin = names.get(bos, str(bos))
    first = {"SpecialToken": {"id": begin, "type_id": 0}}
    a, b = ({"Sequence": {"id": letter, "type_id": 0}} for letter in "AB")
    template = {"type": "TemplateProcessing", "single": [first, a], "pair": [first, a, b],
                "special_tokens": {begin: {"id": begin, "ids": [bos], "tokens": [begin]}}}
    return {
        "tokenizer.json": {
            "version": "1.0",
            "added_tokens": [{"id": i, "content": token, **plain} for i, token in names.items()],
            "pre_tokenizer": pre_tokenizer_json(enc._pat_str), "decoder": BYTE_LEVEL,
            "post_processor": template if add_bos else None,
            "model": {"type": "BPE", "ignore_merges": bool(whole),
                      "vocab": {spelled[t]: i for t, i in enc._mergeable_ranks.items()} | enc._special_tokens,
                      "merges": [[spelled[a], spelled[b]] for a, b in merges]}},
        "tokenizer_config.json": {
            "tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False,
            "add_bos_token": add_bos, "bos_token": names.get(bos), "bos_token_id": bos,
            "add_eos_token": False, "eos_token": names.get(eos[0]),
            "eos_token_id": eos[0] if len(eos) == 1 else list(eos)}}


def pre_tokenizer_json(pattern):
    """The inverse of one_pattern."""
    regexes = DEEPSEEK_SPLITS if pattern == DEEPSEEK_PATTERN else [pattern]
    return {"type": "Sequence", "pretokenizers": [
        *({"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": False}
          for regex in regexes), BYTE_LEVEL]}
