"""Tokenizers, text <-> ids, read from a checkpoint's own files.

    tokenizer = load_tokenizer("Qwen2.5-0.5B")
    tokenizer.encode("I'm fine")            a list of ids
    tokenizer.decode(ids)                   the text again
    tokenizer.token_id("<|endoftext|>")     the id of a special token

`encode` adds no special token and reads one in a text as plain text ("<s>" is "<", "s", ">"), so that no data
can forge one; `decode` leaves them out; `token_id` finds one by its name.
"""
import base64
import heapq
import json
import re
import unicodedata
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import sentencepiece

from support.files import DataError, brief

CHATGLM3_PIECES = 64789     # of its sentencepiece model; special tokens follow: [gMASK] is 64790, sop 64792
CHATGLM3_SPECIALS = "[MASK] [gMASK] [sMASK] sop eop <|system|> <|user|> <|assistant|> <|observation|>".split()
QWEN_SPECIALS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *(f"<|extra_{i}|>" for i in range(205))]
# How a text is cut into words. Qwen: "I'll pay $12\n" -> "I", "'ll", " pay", " $", "1", "2", "\n"
QWEN_SPLIT = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
              r"|\s*[\r\n]+|\s+(?!\S)|\s+")
GPT2_SPLIT = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
TEKKEN_SPLIT = (r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
                r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
                r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+")
QWEN35_SPLIT = QWEN_SPLIT.replace(r"\p{L}+", r"[\p{L}\p{M}]+").replace(r"\s\p{L}", r"\s\p{L}\p{M}")
# What published tokenizers cut by; each pattern cuts what the one before has left. Every other is refused: a
# stranger's may take for ever, as (\p{L}+)+\p{N} does.
KNOWN_SPLITS = (
    [QWEN_SPLIT],                                                   # Qwen1.5, 2, 2.5 and 3
    [QWEN35_SPLIT],
    [QWEN_SPLIT.replace(r"\p{N}|", r"\p{N}{1,3}|")],                # Llama 3, GPT-4
    [GPT2_SPLIT],
    [r"\p{N}", GPT2_SPLIT],                                         # SmolLM2, StarCoder
    [r"\p{N}{1,3}", QWEN_SPLIT.replace(r"\p{N}|", r"\p{N}+|")],     # MiniCPM5
    [TEKKEN_SPLIT],                                                 # Mistral Nemo
)
# How Hugging Face's files write bytes, each as one character: b" caf\xc3\xa9" is "ĠcafÃ©".
UNPRINTED = [byte for byte in range(256) if byte == 32 or not chr(byte).isprintable()]
SPELL = {byte: 256 + n for n, byte in enumerate(UNPRINTED)}
UNSPELL = {256 + n: byte for n, byte in enumerate(UNPRINTED)}
UNREAD = "is not known here: take a backbone with tokenizer.model, or with a byte-level BPE like Llama 3's"
MOST_IDS = 2**24            # more than any vocabulary has
LARGEST_FILE = 2**27        # bytes, a multiple of any tokenizer's
READABLE = {                # what the model in a tokenizer.json may have: this or nothing
    "type": "BPE", "normalizer": {"type": "NFC"}, "dropout": None, "unk_token": None,
    "continuing_subword_prefix": "", "end_of_word_suffix": "",
}


def whole_characters(text: str) -> str:
    """Joins surrogate pairs; a lone surrogate, which UTF-8 cannot write, becomes U+FFFD (as in tiktoken)."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


class SentencePiece:
    """`tokenizer.model` of LLaMA2 and ChatGLM3. size: the number of ids, with ChatGLM3's special tokens."""

    def __init__(self, file: Path):
        self.file = file
        self.sp = sentencepiece.SentencePieceProcessor(model_proto=read_file(file))
        self.plain = set()
        self.special = {}           # name -> id: <s>, </s>, and also <unk>, with which both families pad
        n = self.sp.vocab_size()
        for i in range(n):
            piece = self.sp.id_to_piece(i)      # raises ValueError where it is no UTF-8
            if self.sp.is_control(i) or self.sp.is_unknown(i):
                self.special[piece] = i
            else:
                self.plain.add(i)
        if n == CHATGLM3_PIECES:
            for i, name in enumerate(CHATGLM3_SPECIALS):
                self.special[name] = n + i
        self.size = len(self.plain) + len(self.special)

    def encode(self, text: str) -> list[int]:
        return self.sp.encode(whole_characters(text))

    def decode(self, ids: list[int]) -> str:
        return self.sp.decode([i for i in ids if i in self.plain])

    def token_id(self, name: str) -> int:
        if name not in self.special:
            raise DataError(f"{self.file} has no special token {name!r}, only {list(self.special)!s:.300}")
        return self.special[name]


# Python's re has no \p{L}: it finds stand-ins. Unicode's category of a character -> what stands for it.
STAND_INS = {"Lu": "X", "Lt": "X", "Ll": "x", "Lm": "ª", "Lo": "ª", "Nd": "0", "Nl": "0", "No": "0"}
STAND_INS |= {"Mn": "\u0300", "Mc": "\u0300", "Me": "\u0300"}
CLASSES = {                 # what a split pattern says -> how re finds it among stand-ins; in this order
    r"(?i:'s": "(?i:'ſ|'s",             # it takes the long s, too
    r"\p{L}+": r"[\p{L}]+",
    r"\p{L}": "a-zA-Zſª",
    r"\p{Lu}\p{Lt}": "A-Z",
    r"\p{Ll}": "a-zſ",
    r"\p{Lm}\p{Lo}": "ª",
    r"\p{M}": "\u0300",
    r"\p{N}": r"\d",
}


@cache
def stand_in(char: str) -> str:
    """A character of the same class: "Łódź №²" -> "Xxxx !0"."""
    if char.isascii() or char == "ſ":
        return char
    if char.isspace():
        return "\t"
    return STAND_INS.get(unicodedata.category(char), "!")


def compile_split(pattern: str) -> re.Pattern:
    """A known pattern, for stand-ins. By its one group re.split returns what it finds and what is between."""
    for name, stand_ins in CLASSES.items():
        pattern = pattern.replace(name, stand_ins)
    return re.compile(f"({pattern})", re.ASCII)


@dataclass(repr=False)
class ByteBPE:
    """Byte-level BPE (Qwen, Llama 3): texts are cut into words, of a word's UTF-8 bytes the two neighbours
    of lowest rank are joined until no two have a rank: "low" -> l o w -> lo w -> low."""
    file: Path
    ids: dict                   # token -> id
    special: dict               # name -> id
    ranks: dict                 # what may be joined, "Ġ t" -> its rank
    splits: list                # patterns; each cuts what the one before has left
    nfc: bool = True            # composes a text first: "e" and an accent become "é"
    whole: bool = False         # a word that is a token is not merged but taken as it is
    between: str = " "          # in the keys of `ranks`; "" where any two that make "Ġt" have its rank

    def __post_init__(self):
        self.ids = {token: i for token, i in self.ids.items() if token not in self.special}
        self.patterns = [compile_split(pattern) for pattern in self.splits]
        # The bytes of what people write: UTF-8 has no 0xC0 and 0xC1, above 0xF0 lie planes that nobody uses.
        written = [*range(32, 127), *range(0x80, 0xC0), *range(0xC2, 0xF1)]
        needed = {chr(byte).translate(SPELL) for byte in written}
        needed |= {pair.replace(" ", "") for pair in self.ranks}
        lost = needed - self.ids.keys()
        if lost:
            raise DataError(f"the vocabulary lacks {len(lost)} bytes or merges, such as {min(lost)!r:.80}: "
                            "cut short or of another model, download it again with its merges")
        taken = set()
        for token, i in (self.ids | self.special).items():
            if type(i) is not int or i not in range(MOST_IDS) or i in taken:
                raise DataError(f"the id of its token {token!r:.80} is {i!r:.80}, not a number of its own "
                                f"below {MOST_IDS}: download it again")
            taken.add(i)
        self.size = max(taken) + 1
        self.token = {i: token for token, i in self.ids.items()}

    def encode(self, text: str) -> list[int]:
        ids = []
        for word in self.words(text):
            spelled = word.encode().decode("latin-1").translate(SPELL)
            ids += [self.ids[token] for token in self.merge(spelled)]
        return ids

    def words(self, text: str) -> list[str]:
        text = whole_characters(text)
        if self.nfc:
            text = unicodedata.normalize("NFC", text)
        parts = ["".join(map(stand_in, text))]          # cut are the stand-ins; the lengths are the text's
        for pattern in self.patterns:
            cut = []
            for part in parts:
                cut += pattern.split(part)
            parts = cut
        words = []
        start = 0
        for part in parts:
            if part:
                words.append(text[start:start + len(part)])
            start += len(part)
        return words

    def merge(self, word: str) -> list[str]:
        """The tokens of a word, in n log n steps; of equal ranks the leftmost goes first."""
        if self.whole and word in self.ids:
            return [word]
        word = "".join(byte for byte in word if byte in self.ids)   # a byte that nobody writes may have none
        n = len(word)
        end = list(range(1, n + 1))     # of the part that begins here; 0 where none does
        start = list(range(-1, n))      # of the part that ends here
        heap = []                       # of what can be joined: (rank, i, j, k) for word[i:j] and word[j:k]

        def offer(i: int, j: int, k: int):
            rank = self.ranks.get(word[i:j] + self.between + word[j:k])
            if rank is not None:
                heapq.heappush(heap, (rank, i, j, k))

        for i in range(n - 1):
            offer(i, i + 1, i + 2)
        while heap:
            _, i, j, k = heapq.heappop(heap)
            if end[i] != j or end[j] != k:
                continue                # one of the two has been joined with another part since
            end[i] = k                  # word[i:k] is one part now
            end[j] = 0
            start[k] = i
            if i > 0:
                offer(start[i], i, k)
            if k < n:
                offer(i, k, end[k])
        return [word[i:k] for i, k in enumerate(end) if k]

    def decode(self, ids: list[int]) -> str:
        text = "".join(self.token.get(i, "") for i in ids)
        data = text.translate(UNSPELL).encode("latin-1", "replace")
        return data.decode(errors="replace")            # half a character: U+FFFD

    token_id = SentencePiece.token_id


def read_file(file: Path) -> bytes:
    if not file.is_file():
        raise DataError(f"{file.name} is missing or not a file: download it again")
    if file.stat().st_size > LARGEST_FILE:
        raise DataError(f"{file.name} has over {LARGEST_FILE} bytes, as no tokenizer has: download it again")
    data = file.read_bytes()
    if not data:
        raise DataError(f"{file.name} is empty: download it again")
    if data.startswith(b"version https://git-lfs"):
        raise DataError(f"{file.name} is a git-lfs pointer, not the file itself: run `git lfs pull`")
    return data


def read_object(file: Path) -> dict:
    """The object in a JSON file."""
    data = read_file(file)
    try:
        found = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{file.name} is not valid JSON ({brief(error)}): download it again") from None
    if not isinstance(found, dict):
        raise DataError(f"{file.name} holds a {type(found).__name__}, not an object: download it again")
    return found


def read_special(tokens: list) -> dict:
    """name -> id, of what the files call added tokens."""
    special = {}
    for token in tokens:
        match token:
            case {"content": str(name), "id": i}:
                special[name] = i
            case _:
                raise DataError(f"its added token {token!r:.200} lacks a name or id: download it again")
    return special


def read_ranks(merges: list) -> dict:
    """Which two tokens may be joined, "Ġ t" or ["Ġ", "t"] -> {"Ġ t": rank}."""
    ranks = {}
    for rank, merge in enumerate(merges):
        pair = merge.split(" ") if isinstance(merge, str) else merge
        if not isinstance(pair, list) or len(pair) != 2:
            raise DataError(f"its merge {merge!r:.80} is not two tokens: download it again")
        ranks[" ".join(pair)] = rank
    return ranks


def read_tiktoken(file: Path) -> ByteBPE:
    """`qwen.tiktoken`: on each line a token in base64 and its id, its rank too; special tokens follow."""
    ids = {}
    for n, line in enumerate(read_file(file).splitlines()):
        token, _, rank = line.partition(b" ")
        if rank != b"%d" % n:
            raise DataError(f"line {n + 1} is {line[:60]!r}, not a token and {n}: download it again")
        token = base64.b64decode(token, validate=True)
        ids[token.decode("latin-1").translate(SPELL)] = n
    special = {name: len(ids) + i for i, name in enumerate(QWEN_SPECIALS)}
    return ByteBPE(file, ids, special, ids, [QWEN_SPLIT], whole=True, between="")


def read_merges(file: Path) -> ByteBPE:
    """Qwen2's `merges.txt`, vocab.json and tokenizer_config.json, which do not tell how a text is cut."""
    vocab = read_object(file.with_name("vocab.json"))
    config = read_object(file.with_name("tokenizer_config.json"))
    kind = config.get("tokenizer_class", "Qwen2Tokenizer")
    if not str(kind).startswith("Qwen"):
        raise DataError(f"it does not tell how {kind!r:.80} cuts texts: copy the original tokenizer.json")
    special = read_special([{**token, "id": int(i)} for i, token in config["added_tokens_decoder"].items()])
    lines = read_file(file).decode().splitlines()
    ranks = read_ranks([line for line in lines if line and not line.startswith("#version")])
    if len(ranks) < len(vocab.keys() - special.keys()) - 256:
        raise DataError(f"{len(ranks)} merges cannot make {len(vocab)} tokens: cut short, download it again")
    return ByteBPE(file, vocab, special, ranks, [QWEN_SPLIT])


def read_tokenizer_json(file: Path) -> ByteBPE:
    """`tokenizer.json` of a byte-level BPE, which tells itself how a text is cut into words."""
    data = read_object(file)
    model = {**data["model"], "normalizer": data.get("normalizer")}
    if model.get("byte_fallback"):
        raise DataError("it is sentencepiece in another form (byte_fallback), which is not read here: "
                        "copy tokenizer.model from the original checkpoint into this folder")
    for name, value in READABLE.items():
        if model.get(name) not in (value, None):
            raise DataError(f"its {name} {model[name]!r:.200} {UNREAD}")
    splits = read_splits(data.get("pre_tokenizer") or {})
    special = read_special(data["added_tokens"])
    ranks = read_ranks(model["merges"])
    nfc = model["normalizer"] is not None
    whole = model.get("ignore_merges", False)
    return ByteBPE(file, model["vocab"], special, ranks, splits, nfc, whole)


def read_splits(cutter: dict) -> list[str]:
    """The patterns by which a tokenizer.json's `pre_tokenizer` cuts texts; its last one is ByteLevel."""
    steps = cutter.get("pretokenizers") or [cutter]
    splits = []
    for step in steps:
        match step, step is steps[-1]:
            case {"type": "Split", "behavior": "Isolated", "invert": False, "pattern": {"Regex": cut}}, False:
                splits.append(cut)
            case {"type": "Digits", "individual_digits": True}, False:
                splits.append(r"\p{N}")
            case {"type": "ByteLevel", "add_prefix_space": False}, True:
                if step.get("use_regex", True):
                    splits.append(GPT2_SPLIT)
            case _:
                raise DataError(f"its pre_tokenizer {step!r:.400} {UNREAD}")
    if splits not in KNOWN_SPLITS:
        raise DataError(f"its list of split patterns {splits!r:.400} {UNREAD}")
    return splits


READERS = {                             # of each file, the first that is there is read
    "qwen.tiktoken": read_tiktoken,
    "tokenizer.model": SentencePiece,
    "tokenizer.json": read_tokenizer_json,
    "merges.txt": read_merges,
}


def special_names(folder: Path) -> dict:
    """{"bos": name or None, "eos": ..., "pad": ...}, as tokenizer_config.json in the folder has it."""
    file = folder / "tokenizer_config.json"
    config = {}
    if file.exists():
        config = read_object(file)
    names = {}
    for kind in ("bos", "eos", "pad"):
        token = config.get(f"{kind}_token")         # "<s>" or {"content": "<s>", ...}
        if isinstance(token, dict):
            token = token.get("content", token)
        if token is not None and not isinstance(token, str):
            raise DataError(f"{kind}_token in {file.name} is {token!r:.80}, not a name: download it again")
        names[kind] = token
    return names


def load_tokenizer(path: str | Path) -> SentencePiece | ByteBPE:
    """The tokenizer of a checkpoint's folder, from the first of READERS' files in it, or from the file given.

    `.names` are its special_names. Raises DataError where there is none, or it is not whole or not known.
    """
    path = Path(path)
    for name, reader in READERS.items():
        file = path if path.name == name else path / name
        if not file.is_file():
            continue
        try:
            tokenizer = reader(file)
            tokenizer.names = special_names(file.parent)
            return tokenizer
        except DataError as error:
            raise DataError(f"{file}: {error}") from None
        except (AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
            raise DataError(f"{file}: cut short or another kind, {error!r:.99}: download it again") from None
    raise DataError(f"no tokenizer in {path}: copy {' or '.join(READERS)} there from the original checkpoint")
