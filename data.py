"""Everything about the data: what a task is and how its rows are worded, tokenizers, safe readers, batches.

    python data.py meld --data-dir DIR      check a data set: what it holds, and what is wrong with which row
    python data.py meld --download          fetch it first (needs huggingface_hub)

    TASKS, FAMILIES, PRESETS   every fact about the data sets, the wording of a row, the release's hyper-parameters
    load_tokenizer             sentencepiece (LLaMA2, ChatGLM3) or byte-level BPE (Qwen)
    read_pickle                the published pickles, without ever running one
    find_data, find_llm, ...   files, also in the hub's cache and from the hub
    load_split, epoch_rows, collate     rows -> shuffled row numbers -> padded arrays
    check                      the first lines above; exit code 0: clean, 1: problems, 2: could not be read

Shapes: N rows of a split, B of a batch, La / Lv frames, Da / Dv features of a frame.
"""
import argparse
import base64
import binascii
import hashlib
import heapq
import json
import math
import mmap
import os
import pickletools
import re
import sys
import unicodedata
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
import sentencepiece
import torch

HERE = Path(__file__).resolve().parent

# ---------------------------------------------------------------------------------------------------------------------
# Tasks


@dataclass(frozen=True)
class Family:
    """How the release words a row for one family of backbones. Special tokens by name."""
    bos: tuple                      # in front of each row
    official_bos: tuple             # the same in the release
    eos: str
    pad: str                        # fills up a row; in the release, on the text's left, an ordinary token
    lead: dict = field(default_factory=lambda: {"en": "", "zh": ""})    # stands before the open tag
    reply: str = "Assistant"        # who answers, in an English prompt
    plus: str = "+"                 # sign of the upper end of a range in a prompt
    label_sign: str = ""            # "+": an intensity's label is written with its sign
    official_decoding: str = ""     # how the release's decoding differs from plain: see MultimodalLLM.answer


_QWEN = Family(bos=("<|im_start|>",), official_bos=("<|im_start|>",), eos="<|endoftext|>", pad="<|endoftext|>",
               label_sign="+")
FAMILIES = {
    "llama": Family(bos=("<s>",), official_bos=("<s>", "<s>"), eos="</s>", pad="<unk>",
                    official_decoding="placeholder"),
    "qwen": _QWEN,
    "qwen2": _QWEN,
    "chatglm": Family(bos=("[gMASK]", "sop"), official_bos=("[gMASK]", "sop"), eos="</s>", pad="<unk>",
                      lead={"en": "{question}\n\n ", "zh": "{问题}\n\n "}, reply="response", plus="",
                      official_decoding="reread"),
}

TAG = {"en": "Multimodal", "zh": "多模态"}
PROMPTS = {     # (language, is the label a class?)
    ("en", True): "Please recognize the emotion of the above multimodal content from the{gap}target set <{labels}>. "
                  "{reply}: The emotion is",
    ("zh", True): "请选择适用于上述多模态内容的情绪标签：<{labels}>。响应: 情绪为",
    ("en", False): "Please predict the sentiment intensity of the above multimodal content in the range "
                   "[{low}, {high}]. {reply}: The sentiment is",
    ("zh", False): "请对上述多模态内容的情感强度进行预测，范围在[{low}, {high}]之间。响应: 情感为",
}


class Wording(NamedTuple):
    """One task in one family's words: special tokens by name, everything else as text."""
    bos: tuple
    eos: str
    pad: str
    open: str
    close: str
    prompt: str
    labels: list                    # the text of every legal label
    label: object                   # a function: label -> its text
    decoding: str                   # "", or how the release decodes


@dataclass(frozen=True)
class Task:
    """What the method needs to know of a data set. Feature widths come from the files; those here are only compared."""
    name: str
    files: dict                     # split -> published file
    rows: dict                      # split -> published number of rows
    text_len: int                   # tokens; longer texts are cut
    audio_len: int                  # frames, as published
    video_len: int
    audio_dim: int                  # features of a frame, as published
    video_dim: int
    labels: tuple = ()              # class names, written as 0, 1, ...; empty: the label is an intensity
    range: tuple = ()               # of an intensity
    language: str = "en"
    official_gap: str = " "         # between "the" and "target set" in the release's prompt
    hub: str = ""                   # the published data set
    sha256: str = ""                # of the published file, where it is one
    twins: tuple = ()               # texts of rows that the published splits have in common
    home: str = "data"              # folder below which the files are looked for
    llm: str = "Qwen/Qwen-1_8B"     # the backbone if none is named

    @property
    def select(self) -> str:
        """The validation metric by which the best epoch is chosen: the largest weighted F1 or the smallest MAE."""
        return "weighted_f1" if self.labels else "mae"

    def wording(self, family: str, official: bool = False) -> Wording:
        words, tag = FAMILIES[family], TAG[self.language]
        low, high = ("", "") if self.labels else (f"{self.range[0]:.1f}", f"{words.plus}{self.range[1]:.1f}")
        prompt = PROMPTS[self.language, bool(self.labels)].format(
            gap=self.official_gap if official else " ", reply=words.reply, low=low, high=high,
            labels=", ".join(f"{name}:{i}" for i, name in enumerate(self.labels)))

        def label(y) -> str:
            return str(int(y)) if self.labels else f"{y:{words.label_sign}.1f}"

        return Wording(words.official_bos if official else words.bos, words.eos, words.pad,
                       f"{words.lead[self.language]}<{tag}>", f"</{tag}>", prompt,
                       [label(y) for y in self.values()], label, words.official_decoding if official else "")

    def values(self) -> list:
        """Every legal label: class numbers, or the range in steps of 0.1."""
        if self.labels:
            return list(range(len(self.labels)))
        return [i / 10 for i in range(round(10 * self.range[0]), round(10 * self.range[1]) + 1)]


SPLITS = ("train", "valid", "test")
TASKS = {task.name: task for task in (
    Task("demo", {s: f"demo_{s}.pkl" for s in SPLITS}, dict(train=2000, valid=300, test=600), 40, 40, 24, 6, 8,
         labels=("joy", "anger", "sadness", "calm"), home="demo", llm=str(HERE / "demo" / "llm")),
    Task("meld", {s: f"MELD/meld_{s}.pkl" for s in SPLITS}, dict(train=9989, valid=1109, test=2610),
         65, 157, 32, 64, 64, labels=("neutral", "surprise", "fear", "sadness", "joy", "disgust", "anger"),
         official_gap=" " * 45, hub="AZYoung/MELD_processed",
         twins=("But um, I don’t think it’s anything serious.",)),
    Task("cherma", {s: f"CHERMA0723/cherma_{s}.pkl" for s in SPLITS}, {}, 78, 543, 16, 1024, 2048,
         labels=("愤怒", "厌恶", "恐惧", "高兴", "平静", "悲伤", "惊奇"), language="zh",
         hub="AZYoung/CHERMA0723_processed"),
    Task("mosei", {s: "MOSEI/Processed/unaligned_50.pkl" for s in SPLITS}, dict(train=16326, valid=1871, test=4659),
         50, 500, 375, 74, 35, range=(-3.0, 3.0), hub="AZYoung/MOSEI_processed",
         sha256="ad8b23d50557045e7d47959ce6c5b955d8d983f2979c7d9b7b9226f6dd6fec1f"),
    Task("simsv2", {s: "SIMS_V2/ch-simsv2s.pkl" for s in SPLITS}, dict(train=2722, valid=647, test=1034),
         50, 925, 232, 25, 177, range=(-1.0, 1.0), language="zh", hub="AZYoung/SIMSV2_processed",
         sha256="f8fd9a1dd070588a714ff357b00f31d5bb93277b4e502cf2dc4ff718a95fc49b"),
    Task("mosi", {s: "MOSI/Processed/unaligned_50.pkl" for s in SPLITS}, dict(train=1284, valid=229, test=686),
         50, 375, 500, 5, 20, range=(-3.0, 3.0),
         sha256="78e0f8b5ef8ff71558e7307848fc1fa929ecb078203f565ab22b9daab2e02524"),
)}


class Preset(NamedTuple):
    """The release's hyper-parameters for one task and family; those that are the same for all stand in train.py."""
    learning_rate: float
    batch_size: int
    epochs: int                     # length of the cosine; early stopping usually ends a run before
    pseudo_tokens: int
    audio_hidden: int               # width of the LSTM's state
    video_hidden: int


PRESETS = {
    "mosei": {"llama": Preset(5e-5, 8, 30, 4, 64, 32), "qwen": Preset(5e-3, 16, 30, 4, 64, 32),
              "chatglm": Preset(5e-5, 8, 30, 4, 64, 32)},
    "simsv2": {"llama": Preset(5e-5, 8, 40, 4, 64, 64), "qwen": Preset(5e-4, 16, 30, 4, 64, 64),
               "chatglm": Preset(5e-5, 8, 80, 4, 64, 64)},
    "meld": {"llama": Preset(5e-4, 6, 30, 4, 64, 32), "qwen": Preset(5e-4, 16, 50, 2, 32, 16),
             "chatglm": Preset(5e-5, 8, 90, 4, 64, 32)},
    "cherma": {"llama": Preset(5e-5, 6, 30, 4, 32, 16), "qwen": Preset(5e-3, 16, 30, 4, 32, 16),
               "chatglm": Preset(5e-5, 8, 30, 4, 32, 16)},
    "demo": {"llama": Preset(1e-2, 16, 4, 4, 32, 16)},
}


def preset(task: Task | str, family: str) -> Preset:
    """The release's hyper-parameters. Where it has none: MOSI takes MOSEI's, qwen2 qwen's, other families llama's."""
    name = {"mosi": "mosei"}.get(getattr(task, "name", task), getattr(task, "name", task))
    rows = PRESETS[name]
    return rows.get({"qwen2": "qwen"}.get(family, family)) or rows["llama"]


# ----------------------------------------------------------------------------------------------------------------------
# Tokenizers: text <-> ids. `encode` adds no special token and reads one that stands in the text as plain text ("<s>" is
# "<", "s", ">"), so that no data can forge one; `decode` leaves special tokens out; `token_id` finds one by its name.

CHATGLM3_PIECES = 64789  # of its sentencepiece model; its special tokens follow: [gMASK] is 64790, sop is 64792
CHATGLM3_SPECIALS = "[MASK] [gMASK] [sMASK] sop eop <|system|> <|user|> <|assistant|> <|observation|>".split()
QWEN_SPECIALS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *(f"<|extra_{i}|>" for i in range(205))]  # 151643, ...
# How Qwen cuts a text into words: "I'll pay $12\n" -> "I", "'ll", " pay", " $", "1", "2", "\n"
QWEN_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def whole_characters(text: str) -> str:
    """Joins surrogate pairs; a lone surrogate, which UTF-8 cannot write, becomes U+FFFD (as in tiktoken)."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


class SentencePiece:
    """`tokenizer.model` of LLaMA2 and ChatGLM3. size: the number of ids, ChatGLM3's special tokens included."""

    def __init__(self, file: Path):
        self.file = file
        self.sp = sentencepiece.SentencePieceProcessor(model_proto=read_file(file))
        pieces = range(self.sp.vocab_size())
        # <s>, </s>, and also <unk>, with which both families pad
        self.special = {self.sp.id_to_piece(i): i for i in pieces if self.sp.is_control(i) or self.sp.is_unknown(i)}
        self.plain = set(pieces) - set(self.special.values())
        if len(pieces) == CHATGLM3_PIECES:
            self.special |= {name: len(pieces) + i for i, name in enumerate(CHATGLM3_SPECIALS)}
        self.size = len(self.plain) + len(self.special)

    def encode(self, text: str) -> list[int]:
        return self.sp.encode(whole_characters(text))

    def decode(self, ids: list[int]) -> str:
        return self.sp.decode([i for i in ids if i in self.plain])

    def token_id(self, name: str) -> int:
        if name not in self.special:
            raise ValueError(f"{self.file} has no special token {name!r}, only {', '.join(self.special) or 'plain'}")
        return self.special[name]


class StandIn(dict):
    r"""For str.translate: puts an ASCII character of the same class for every other one, "Łódź №²" -> "xxdx !0".

    Python's re lacks \p{L} and \p{N}; on the stand-ins [a-zA-Z] and [0-9] are the same, at the same positions.
    """

    def __missing__(self, code: int) -> str:
        char = chr(code)
        kind = unicodedata.category(char)[0]  # L of Lu, Ll, Lt, Lm, Lo; N of Nd, Nl, No
        if code < 128:
            self[code] = char
        elif kind == "L":
            self[code] = "s" if char == "ſ" else "x"  # (?i:'s) takes the long s too; "x" is in no 's 't 're ...
        else:  # isspace is White_Space from 128 on; below, it has U+001C..U+001F in excess, but re.ASCII's \s has not
            self[code] = "0" if kind == "N" else "\t" if char.isspace() else "!"
        return self[code]


class ByteBPE:
    """Qwen's byte-level BPE: the NFC text is cut into words, and of a word's UTF-8 bytes the two neighbours of lowest
    rank are joined until no two have a rank: "low" -> l o w -> lo w -> low.

    ids: {bytes: id}. special: {name: id}. ranks: {merge: rank}, where a merge is the pair of parts (merges.txt) or, if
    joined, the bytes they make, whatever the parts (tiktoken, which also leaves a word that is one token whole).
    """

    def __init__(self, file: Path, ids: dict, ranks: dict, special: dict[str, int], joined: bool):
        if missing := [byte for byte in range(256) if bytes([byte]) not in ids]:
            raise ValueError(f"{file} has no token for {len(missing)} of the 256 bytes: cut short? download it again")
        self.file, self.ids, self.ranks, self.special, self.joined = file, ids, ranks, special, joined
        self.token = {i: token for token, i in ids.items()}
        self.size = max([*ids.values(), *special.values()]) + 1
        split = QWEN_SPLIT.replace(r"\p{L}\p{N}", "a-zA-Z0-9")  # inside [...] the two stand together
        self.split = re.compile(split.replace(r"\p{L}", "[a-zA-Z]").replace(r"\p{N}", "[0-9]"), re.ASCII)
        self.stand_in = StandIn()
        self.seen: dict[str, list[int]] = {}  # the ids of words met before

    def encode(self, text: str) -> list[int]:
        text, out = whole_characters(unicodedata.normalize("NFC", text)), []
        for match in self.split.finditer(text.translate(self.stand_in)):
            word = text[match.start() : match.end()]
            if (ids := self.seen.get(word)) is None:
                ids = [self.ids[part] for part in self.merge(word.encode())]
                if len(word) <= 32 and len(self.seen) < 100_000:
                    self.seen[word] = ids
            out += ids
        return out

    def rank(self, left: bytes, right: bytes) -> int | None:
        return self.ranks.get(left + right if self.joined else (left, right))

    def merge(self, word: bytes) -> list[bytes]:
        """The tokens of one word; of equal ranks the leftmost is joined first, b"aaa" -> b"aa", b"a".

        The parts are a linked list, the candidates a heap: n log n steps for n bytes, where rescanning takes n^2.
        """
        if self.joined and word in self.ids:
            return [word]
        n = len(word)
        parts: list[bytes | None] = [word[i : i + 1] for i in range(n)]  # the right one of two joined becomes None
        before, after, heap = list(range(-1, n - 1)), list(range(1, n + 1)), []

        def offer(i: int, j: int) -> None:
            if i >= 0 and j < n and (rank := self.rank(parts[i], parts[j])) is not None:
                heapq.heappush(heap, (rank, i))

        for i in range(n - 1):
            offer(i, i + 1)
        while heap:
            rank, i = heapq.heappop(heap)
            j = after[i]
            if parts[i] is None or j == n or self.rank(parts[i], parts[j]) != rank:
                continue  # one of the two has been joined with another part since this was offered
            parts[i], parts[j], after[i] = parts[i] + parts[j], None, after[j]
            if after[i] < n:
                before[after[i]] = i
            offer(before[i], i)
            offer(i, after[i])
        return [part for part in parts if part is not None]

    def decode(self, ids: list[int]) -> str:
        return b"".join(self.token.get(i, b"") for i in ids).decode(errors="replace")  # half a character is U+FFFD

    token_id = SentencePiece.token_id


def read_file(file: Path) -> bytes:
    data = file.read_bytes() if file.is_file() else b""
    if not data:
        raise ValueError(f"{file} is {'empty' if file.is_file() else 'missing'}: download it again")
    if data.startswith(b"version https://git-lfs"):
        raise ValueError(f"{file} is a git-lfs pointer of {len(data)} bytes, not the file itself: run `git lfs pull`")
    return data


def read_tiktoken(file: Path) -> ByteBPE:
    """`qwen.tiktoken`: on each line a token in base64 and its rank, which is its id too; the special tokens follow."""
    ids = {}
    for n, line in enumerate(read_file(file).splitlines()):
        token, _, rank = line.partition(b" ")
        if rank != b"%d" % n:
            raise ValueError(f"{file} line {n + 1} is {line[:60]!r}, not a token and {n}: cut short? download it again")
        ids[base64.b64decode(token, validate=True)] = n
    return ByteBPE(file, ids, ids, {name: len(ids) + i for i, name in enumerate(QWEN_SPECIALS)}, joined=True)


def byte_bpe(file: Path, vocab: dict[str, int], merges: list, special: dict[str, int]) -> ByteBPE:
    """From Hugging Face's spelling of the same, one printable character per byte: " café" is written "ĠcafÃ©"."""
    own = [*range(33, 127), *range(161, 173), *range(174, 256)]  # bytes that stand for themselves; the rest: U+0100 ...
    byte = {chr(b): b for b in own} | {chr(256 + n): b for n, b in enumerate(sorted(set(range(256)) - set(own)))}
    ids = {bytes(byte[char] for char in token): i for token, i in vocab.items() if token not in special}
    pairs = [merge.partition(" ")[::2] if isinstance(merge, str) else merge for merge in merges]  # "Ġ t" or ["Ġ", "t"]
    ranks = {tuple(bytes(byte[char] for char in part) for part in pair): rank for rank, pair in enumerate(pairs)}
    if odd := {b"".join(pair) for pair in ranks} ^ {token for token in ids if len(token) > 1}:
        raise ValueError(f"{file}: {len(odd)} tokens, such as {min(odd)!r}, are in only one of vocabulary and merges: "
                         "one is cut short or of another model, download both again")
    return ByteBPE(file, ids, ranks, special, joined=False)


def read_merges(file: Path) -> ByteBPE:
    """`merges.txt`, with `vocab.json` and the files that may tell of special tokens beside it."""
    vocab, config, added = (file.with_name(n) for n in ("vocab.json", "tokenizer_config.json", "added_tokens.json"))
    special = json.loads(read_file(added)) if added.exists() else {}
    if config.exists():
        decoder = json.loads(read_file(config)).get("added_tokens_decoder", {})  # {"151643": {"content": name, ...}}
        special |= {token["content"]: int(i) for i, token in decoder.items()}
    lines = [line.rstrip("\r") for line in read_file(file).decode().split("\n")]
    merges = [line for line in lines if line and not line.startswith("#version")]
    return byte_bpe(file, json.loads(read_file(vocab)), merges, special)


def read_tokenizer_json(file: Path) -> ByteBPE:
    data = json.loads(read_file(file))
    model, normalizer = data["model"], data["normalizer"] or {}
    steps = {step["type"]: step for step in (data["pre_tokenizer"] or {}).get("pretokenizers", [])}
    for what, have, want in (
        ("model", model.get("type"), "BPE"),
        ("ignore_merges", model.get("ignore_merges", False), False),
        ("normalizer", normalizer.get("type"), "NFC"),
        ("pre_tokenizer", list(steps), ["Split", "ByteLevel"]),
        ("split pattern", steps.get("Split", {}).get("pattern", {}).get("Regex"), QWEN_SPLIT),
    ):
        if have != want:
            raise ValueError(f"{file} is not Qwen's kind of BPE, the only one read here: {what} {have!r}, not {want!r}")
    return byte_bpe(file, model["vocab"], model["merges"], {t["content"]: t["id"] for t in data["added_tokens"]})


def load_tokenizer(path: str | Path) -> SentencePiece | ByteBPE:
    """The tokenizer in a checkpoint's folder; the path may also be that of the tokenizer's own file.

    Raises ValueError where there is none, or one that is not whole or of an unknown kind.
    """
    path = Path(path)
    names = {path.name} if path.is_file() else {file.name for file in path.glob("*")}
    if path.name == "vocab.json":
        names = {"merges.txt"}
    for name, reader in (("qwen.tiktoken", read_tiktoken), ("tokenizer.model", SentencePiece),
                         ("merges.txt", read_merges), ("tokenizer.json", read_tokenizer_json)):
        if name in names:
            file = path.with_name(name) if path.is_file() else path / name
            try:
                return reader(file)
            except (LookupError, TypeError, AttributeError, RuntimeError, binascii.Error,
                    json.JSONDecodeError, UnicodeDecodeError) as error:
                raise ValueError(f"{file} is cut short or of another kind ({error!r}): download it again") from None
    found = ", ".join(sorted(names)[:9]) or ("nothing" if path.exists() else "no such folder")
    raise ValueError(f"no tokenizer in {path}: found {found}, expected qwen.tiktoken, tokenizer.model, merges.txt with "
                     "vocab.json, or tokenizer.json: copy the checkpoint's own tokenizer files there")


# ---------------------------------------------------------------------------------------------------------------------
# Reading a pickle without running it. A pickle is a program for a small stack machine, and pickle.load calls
# whatever the program names. The machine here knows only what plain data needs and calls nothing by name, so all
# that a hostile or broken file can do is be refused. Large arrays stay views of the mapped file.


class DataError(ValueError):
    """The one exception for data that cannot be used: the file, what was found, what was expected, what to do."""


ADVICE = (      # what was found, as a pattern, and what to do about it
    ("version https://git-lfs", "this only points to the data: fetch them with `git lfs pull`"),
    ("with b.<", "this is a web page: fetch the file again, the server answered with a page"),
    (r"with b.[(\]}]| \w*STRING", 'if Python 2 wrote it, load it once with encoding="latin1" where you trust it, and '
                                  "save it again with protocol=4"),
    (r"with b.PK|'torch\.", "save plain arrays, of tensors their .numpy(), with pickle.dump"),
    (r"'pandas\.", 'save tables as their .to_dict("list") or .to_numpy(), with pickle.dump'),
    ("starts with", "expected a pickle of protocol 2 to 5: fetch it again, or write it with protocol=4"),
    (r"\\r", "its line ends were changed on the way: transfer it again, in binary mode"),
    ("cannot be read", "expected one whole pickle: fetch or write it again"),
    ("", "expected dicts, lists, text, numbers, plain arrays: save yours so, and do not load this by other means"),
)
PLAIN = {str, bytes, memoryview, int, float, bool, type(None), list, tuple, dict, np.ndarray}
DTYPE = re.compile("b1|[iu][1248]|f[248]|[US][1-9][0-9]{0,6}|O8?")
CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
LENGTH = {"SHORT_BINUNICODE": 1, "BINUNICODE": 4, "BINUNICODE8": 8, "BINBYTES": 4, "BINBYTES8": 8, "BYTEARRAY8": 8}
OPCODES = {ord(op.code): op for op in pickletools.opcodes}


def read_pickle(path) -> object:
    """The plain data in a pickle, protocols 2 to 5, numpy 1 or 2. Raises DataError for everything else.

    Arrays are read-only views of the mapped file, perhaps unaligned or byte-swapped; those of objects come as lists.
    """
    data = b""
    try:
        if not os.path.isfile(path):        # a FIFO would wait for its other end
            raise OSError("missing, or not a file")
        with open(path, "rb") as file:
            data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        return PickleMachine(data).run()
    except Exception as error:              # of any type: who knows what a broken file leads to
        found = str(error) if isinstance(error, DataError) else f"cannot be read ({error!r})"
    if data.find(b"\n", 0) > 0 and not re.search(rb"(?<!\r)\n", data):
        found += r" and has \n only behind \r"
    advice = next(advice for pattern, advice in ADVICE if re.search(pattern, found))
    raise DataError(f"{path} {found:.250}; {advice}")


@dataclass
class Named:
    """Stands for what the pickle names or begins to describe; once described, `made` is the real object."""
    text: str                               # a function or class, the code of a dtype, or "array"


class PickleMachine:
    def __init__(self, data: mmap.mmap):
        self.data, self.memo, self.stacks = data, {}, [[]]      # each mark begins another stack
        self.budget = (32 << 20) + 24 * len(data)               # bytes of memory: plain data needs less

    def spend(self, cost):
        self.budget -= cost
        if self.budget < 0:
            raise DataError("would take far more memory than its size")

    def take(self, op) -> list:
        """The objects that an instruction takes from the stack: so many, or also all since the last mark."""
        n, items = len(op.stack_before), []
        if pickletools.stackslice in op.stack_before:
            n, items = n - 2, self.stacks.pop()
        return [self.stacks[-1].pop() for _ in range(n)][::-1] + items

    def run(self):
        """Follows the instructions to the last and returns the one object that they leave on the stack."""
        data, memo = self.data, self.memo
        if not re.match(rb"\x80[\x02-\x05]", data):
            raise DataError(f"starts with {data[:64].lstrip()[:24]!r}")
        while (op := OPCODES[data.read_byte()]).name != "STOP":
            if op.arg is None and op.name not in CONSTANTS:
                self.spend(64)              # about what a container or a memo entry takes; in the file, one byte
            items = self.take(op) if op.stack_before else []
            push = self.stacks[-1].append
            match op.name:
                case "BINGET" | "LONG_BINGET":
                    found = memo[op.arg.reader(data)]
                    push(getattr(found, "made", found))
                case "MEMOIZE" | "BINPUT" | "LONG_BINPUT":
                    self.stacks[-1] += items                    # what MEMOIZE took
                    slot = op.arg.reader(data) if op.arg else len(memo)
                    memo[slot] = self.stacks[-1][-1]
                case "MARK":
                    self.stacks.append([])
                case name if name in LENGTH:
                    n = int.from_bytes(data.read(LENGTH[name]), "little")
                    data.seek(n, os.SEEK_CUR)       # raises beyond the end
                    raw = memoryview(data)[data.tell() - n:data.tell()]
                    push(str(raw, "utf-8") if "UNICODE" in name else raw)
                case "BININT" | "BININT1" | "BININT2" | "LONG1" | "BINFLOAT" | "SHORT_BINBYTES":
                    push(op.arg.reader(data))
                case "NONE" | "NEWTRUE" | "NEWFALSE":
                    push(CONSTANTS[op.name])
                case "EMPTY_LIST" | "EMPTY_DICT" | "EMPTY_TUPLE" | "TUPLE1" | "TUPLE2" | "TUPLE3" | "TUPLE":
                    push(op.stack_after[0].obtype(items))       # list, dict or tuple
                case "APPEND" | "APPENDS":
                    push(items[0])
                    items[0].extend(items[1:])
                case "SETITEM" | "SETITEMS":
                    if not {str}.issuperset(map(type, items[1::2])):    # others could be chosen to collide
                        raise DataError("has a dict whose keys are not all text")
                    push(items[0])
                    items[0].update(zip(items[1::2], items[2::2], strict=True))
                case "GLOBAL":
                    push(Named(op.arg.reader(data).replace(" ", ".")))
                case "STACK_GLOBAL":
                    push(Named(".".join(items)))
                case "REDUCE" | "BUILD":
                    push(self.make(*items))
                case "PROTO" | "FRAME":     # of use only to readers of streams
                    op.arg.reader(data)
                case _:
                    names = [x.text for x in items if type(x) is Named]
                    raise DataError(f"has the instruction {op.name} {ascii(names)}")
        [[root]] = self.stacks              # one object, or it raises
        if data.tell() < len(data):
            raise ValueError("more follows the pickle")
        return self.check(root)

    def make(self, named, args):
        """What numpy would make of a call or of a description, but for a file that says "2 GiB" and has 8 bytes."""
        match named.text.replace("numpy._core.", "numpy.core."), args:      # numpy 2 and 1
            case "numpy.core.multiarray._reconstruct", (Named("numpy.ndarray"), (0,), _):
                return Named("array")
            case "array", (_, shape, dtype, fortran, raw):
                named.made = self.array(raw, dtype, shape, fortran)
                return named.made
            case "numpy.core.numeric._frombuffer", (raw, dtype, shape, order, *axes):
                return self.array(raw, dtype, shape, order == "F", *axes)
            case "numpy.core.multiarray.scalar", (dtype, raw):
                return self.array(raw, dtype, (), False).item()
            case "numpy.dtype", (str(code), _, _):
                return Named(code)
            case code, (3, "<" | ">" | "|" as order, None, None, None, _, _, _) if DTYPE.fullmatch(code):
                named.made = np.dtype(code).newbyteorder(order)
                return named.made
            case "_codecs.encode", (str(text), "latin1"):       # how protocol 2 writes bytes
                self.spend(len(text))
                return text.encode("latin1")
            case "__builtin__.bytes", ():
                return b""
        raise DataError(f"names {ascii(named.text)}, which is not plain data")

    def array(self, raw, dtype, shape, fortran, axes=None):
        self.spend(8 * len(raw))
        if dtype.hasobject:     # a list in C order, whatever the array's order
            return np.fromiter(raw, dtype, len(raw)).reshape(shape).tolist()
        if dtype.kind == "U":   # raises if it is no text
            str(raw, "utf-32-be" if dtype.str[0] == ">" else "utf-32-le")
        array = np.frombuffer(raw, dtype).reshape(shape, order="F" if fortran else "C")
        return array if axes is None else array.transpose(axes)

    def check(self, x, depth=16):
        """Nothing unfinished or cyclic is left, nor parts shared so often that a walk over all would not end."""
        self.spend(16)
        if type(x) not in PLAIN:
            raise DataError("has a name or half an array in the place of data")
        if depth == 0:
            raise DataError("has containers more than 16 deep")
        if type(x) in (dict, list, tuple):
            for part in x.values() if type(x) is dict else x:
                self.check(part, depth - 1)
        return x


# ---------------------------------------------------------------------------------------------------------------------
# Files: below a folder, else in the hub's cache, which is where downloads go


def hub_cache(repo: str, kind: str) -> Path:
    """The folder in which the hub's client keeps a "model" or "dataset"; there may be none."""
    env = os.environ.get
    home = env("HF_HOME") or Path(env("XDG_CACHE_HOME") or "~/.cache") / "huggingface"
    cache = Path(env("HF_HUB_CACHE") or Path(home) / "hub").expanduser() / f"{kind}s--{repo.replace('/', '--')}"
    commit = cache / "refs" / "main"
    return cache / "snapshots" / (commit.read_text().strip() if commit.is_file() else "none")


def candidates(task: Task, root: Path, split: str) -> list[Path]:
    """All files below `root` that may be the published one of a split."""
    name = task.files[split]
    if (root / name).is_file():
        return [root / name]
    # MOSI's and MOSEI's files have one last name: the nearest folder that is named like one of the two decides.
    alike = [other.files[split] for other in TASKS.values() if Path(other.files[split]).name == Path(name).name]
    homes = sorted(Path(other).parts[0] for other in alike)

    def ours(path: Path) -> bool:
        named = [home for part in path.absolute().parts for home in homes if home in part]
        return path.is_file() and named[-1:] in ([], [Path(name).parts[0]])

    found = sorted(filter(ours, root.rglob(Path(name).name)))
    return [path for path in found if path.absolute().as_posix().endswith(name)] or found


def find_data(task: Task, data_dir, split: str) -> Path:
    """The published file of a split, anywhere below `data_dir`. Raises DataError that says how to get it."""
    name = task.files[split]
    for root in (Path(data_dir), *([hub_cache(task.hub, "dataset")] if task.hub else [])):
        found = candidates(task, root, split)
        if len(found) > 1:
            raise DataError(f"{root}: {len(found)} files could be {name}: {', '.join(map(str, found))}; "
                            "point --data-dir at the folder of one")
        if found:
            return found[0]
    get = (f"get it with --download, or: hf download {task.hub} --repo-type dataset --local-dir {data_dir}"
           if task.hub else "put it there; github.com/thuiar/MMSA tells where it is published")
    raise DataError(f"{data_dir}: {name} was not found in or below this folder; {get}")


def find_llm(name) -> Path:
    """The checkpoint's folder, given that or a hub name. Raises DataError that says how to get it."""
    for path in (Path(name), hub_cache(str(name), "model")):
        if path.is_dir():
            return path
    hub = str(name) if str(name).count("/") == 1 else "Qwen/Qwen-1_8B"
    raise DataError(f"{name}: no such backbone, neither as a folder nor in the hub's cache; get one with: "
                    f"train.py --llm {hub} --download, or: hf download {hub}")


def fetch_data(task: Task, data_dir):
    """Download a data set that is not below `data_dir`. Raises DataError."""
    published = {Path(name).name for name in task.files.values()}
    if task.hub and not all(candidates(task, Path(data_dir), split) for split in SPLITS):
        fetch(task.hub, "dataset", lambda names: [name for name in names if Path(name).name in published])


def fetch_llm(name):
    """Download a backbone given by its hub name: config, tokenizer, weights (.bin only if there is no .safetensors)."""
    def wanted(names):
        weights = ".safetensors" if any(name.endswith(".safetensors") for name in names) else ".bin"
        ends = (".json", ".model", ".tiktoken", "merges.txt", weights)
        return [name for name in names if name.endswith(ends) and "/" not in name]

    if not Path(name).is_dir() and str(name).count("/") == 1:
        fetch(str(name), "model", wanted)


def fetch(repo: str, kind: str, wanted):
    """Download into the hub's cache what the function `wanted` picks of a repository's file names. Raises DataError."""
    endpoint, cached = (os.environ.get("HF_ENDPOINT") or "https://huggingface.co").rstrip("/"), hub_cache(repo, kind)
    page, by_hand = f"{endpoint}/{repo}", f"hf download {repo}"
    if kind == "dataset":
        page, by_hand = f"{endpoint}/datasets/{repo}", f"{by_hand} --repo-type dataset"
    try:
        import huggingface_hub as hub  # only downloads need it
    except ImportError:
        raise DataError("--download needs huggingface_hub: pip install huggingface_hub, and run this again; "
                        f"or fetch it yourself: {by_hand}") from None
    try:
        info = hub.HfApi().repo_info(repo, repo_type=kind, files_metadata=True)
        sizes = {file.rfilename: file.size or 0 for file in info.siblings}
        names = wanted(list(sizes))
        new = [name for name in names if not (cached.with_name(info.sha) / name).exists()]
        if new:
            print(f"downloading {', '.join(new)}: {sum(sizes[name] for name in new):,} bytes from {page} "
                  f"to {cached.parents[1]}", flush=True)
            hub.snapshot_download(repo, repo_type=kind, allow_patterns=names)
    except Exception as error:          # the client's kinds of error change from version to version
        status = getattr(getattr(error, "response", None), "status_code", 0)
        found = {404: "does not exist (status 404): check the name"}.get(status)
        if status in (401, 403):
            found = (f"is gated, private or misspelt (status {status}): check the name; if it is gated, as LLaMA2 is, "
                     f"accept the licence on that page, make a token at {endpoint}/settings/tokens and pass it on with "
                     "`hf auth login` or in HF_TOKEN")
        if found is None:
            reason = " ".join(str(error).split())[:200]
            found = (f"cannot be fetched ({type(error).__name__}: {reason}): check the network, name a mirror in "
                     f"HF_ENDPOINT, or fetch it on another machine: {by_hand}")
            if cached.is_dir():         # perhaps all that is needed
                return print(f"{page} {found}; going on with {cached}", file=sys.stderr)
        raise DataError(f"{page} {found}") from None
    if not names:
        raise DataError(f"{page} has none of the files that were expected, only {', '.join(sizes)[:500] or 'nothing'}")


# ---------------------------------------------------------------------------------------------------------------------
# Rows


FEATURES = ("audio", "video")
FIELDS = ("text", "audio", "video", "label", "audio_len", "video_len", "id")        # the first four are required
TABLE_KEYS = ("raw_text", "audio", "vision", "regression_labels", "audio_lengths", "vision_lengths", "id")


@dataclass
class Split:
    """One split as plain lists and arrays; features stay in the file's dtype until a batch is made."""
    text: list                      # N strings
    audio: list                     # N arrays (La, Da), views of the mapped file
    audio_len: list                 # real frames of each row; 0: the modality is missing
    video: list
    video_len: list
    label: list                     # class numbers or intensities
    id: list
    unused: list = field(default_factory=list)      # what else the file holds

    def __len__(self) -> int:
        return len(self.text)

    def features(self, kind: str, row: int) -> np.ndarray:
        """The real frames of a row's "audio" or "video"."""
        return getattr(self, kind)[row][:getattr(self, f"{kind}_len")[row]]


def read_split(task: Task, file: Path, split: str) -> Split:
    """A split just as the file has it; `faults` looks at its rows. Raises DataError for another layout.

    The file holds one split or a dict of all, {"train": split, "valid": split, "test": split}. A split is either of
        rows    [{"label": y, "features": {"text", "audio" (La, Da), "video" (Lv, Dv), "audio_len", "video_len"}}, ...]
        table   {"raw_text": N texts, "audio": (N, La, Da), "vision": (N, Lv, Dv), "audio_lengths", "vision_lengths",
                 "regression_labels" or, if they are classes, "labels", "id"}
    and may lack ids, and lengths: then all frames are real.
    """
    raw, where, keys = read_pickle(file), f"{file}, {split}", dict(zip(FIELDS, TABLE_KEYS))
    if isinstance(raw, dict) and split in raw:
        raw = raw[split]
    elif len(set(task.files.values())) == 1:
        raise DataError(f"{where}: not there; expected a dict of {', '.join(SPLITS)} in the one file of {task.name}")
    if isinstance(raw, list):
        raw, keys = _table(raw, where), dict(zip(FIELDS, FIELDS))
    elif task.labels:
        keys["label"] = "labels"
    raw = raw if isinstance(raw, dict) else {}
    table = {name: raw[key] for name, key in keys.items() if isinstance(raw.get(key), (list, tuple, np.ndarray))}
    if lacking := [keys[name] for name in FIELDS[:4] if name not in table]:
        raise DataError(f"{where}: has no {', '.join(lacking)}; expected a list of rows or a dict of such columns")
    n, counts = len(table["text"]), {keys[name]: len(column) for name, column in table.items()}
    if set(counts.values()) != {n} or n == 0:
        raise DataError(f"{where}: has columns of {counts} entries; expected as many in each, and at least one")
    columns = {name: _scalars(table.get(name, [None] * n)) for name in FIELDS if name not in FEATURES}
    for kind in FEATURES:
        columns[kind], key = list(table[kind]), f"{kind}_len"
        columns[key] = [_length(length, x) for length, x in zip(columns[key], columns[kind])]
    columns["id"] = [str(i if name is None else name) for i, name in enumerate(columns["id"])]
    return Split(**columns, unused=sorted(raw.keys() - keys.values()))


def _table(rows: list, where: str) -> dict:
    """Rows as columns; None stands where a row has no length or id."""
    table = {}
    for i, row in enumerate(rows):
        features = row.get("features") if isinstance(row, dict) else None
        flat = row | features if isinstance(features, dict) else {}
        if lacking := [name for name in FIELDS[:4] if name not in flat]:
            raise DataError(f"{where}: row {i} has no {', '.join(lacking)}; expected "
                            "{'label': y, 'features': {'text', 'audio', 'video', 'audio_len', 'video_len'}}")
        table = table or {key: [] for key in (*FIELDS, *flat) if key != "features"}
        for key, column in table.items():
            column.append(flat.get(key))
    return table


def _scalars(column) -> list:
    """A column's entries as Python's own scalars: bytes become text, arrays of one number that number."""
    entries = column.tolist() if isinstance(column, np.ndarray) and column.ndim == 1 else list(column)
    entries = [x.item() if isinstance(x, np.ndarray) and x.size == 1 else x for x in entries]
    return [str(x, "utf-8", "replace") if isinstance(x, (bytes, memoryview)) else x for x in entries]


def _length(length, x):
    if length is None:
        return len(x) if isinstance(x, np.ndarray) and x.ndim else 0
    return int(length) if isinstance(length, float) and length.is_integer() else length


def number(task: Task, label) -> int | float | None:
    """A class's number, or the intensity; None for what is no label of the task."""
    if task.labels:
        return task.labels.index(label) if isinstance(label, str) and label in task.labels else None
    return float(label) if isinstance(label, (int, float)) and task.range[0] <= label <= task.range[1] else None


def faults(task: Task, data: Split, widths: dict):
    """Yield (row, field, what it has) for all that makes a row unusable. widths: of the features seen so far."""
    wanted = ", ".join(task.labels) or "a number from {} to {}".format(*task.range)
    for row, (text, label) in enumerate(zip(data.text, data.label)):
        if not isinstance(text, str):
            yield row, "text", f"a text that is {text!r:.60}; expected a string, '' for none"
        if number(task, label) is None:
            yield row, "label", f"the label {label!r:.60}; expected {wanted}"
        for kind in FEATURES:
            x, length = getattr(data, kind)[row], getattr(data, f"{kind}_len")[row]
            if not isinstance(x, np.ndarray) or x.ndim != 2 or x.dtype.kind not in "fiub" or x.shape[1] == 0:
                found = f"{x.dtype} {x.shape}" if isinstance(x, np.ndarray) else f"{x!r:.60}"
                yield row, kind, f"{kind} that is {found}; expected numbers (frames, features)"
            elif x.shape[1] != widths.setdefault(kind, x.shape[1]):
                yield row, kind, f"{x.shape[1]} {kind} features; expected {widths[kind]} as in the rows before it"
            elif not isinstance(length, int) or not 0 <= length <= len(x):
                yield row, kind, f"the {kind} length {length!r:.60}; expected a count of its {len(x)} frames"


def clean(x: np.ndarray) -> np.ndarray:
    """Features as fp32. The one policy for odd values: NaN and both infinities become 0 (in the release, NaN of video
    and -inf of audio). An empty text is kept, a modality of length 0 is missing, and anything else odd is a fault."""
    with np.errstate(over="ignore"):
        x = x.astype(np.float32)
    x[~np.isfinite(x)] = 0
    return x


def odd_values(x: np.ndarray) -> Counter:
    """How many values `clean` sets to 0, by kind."""
    with np.errstate(over="ignore"):
        x = x.astype(np.float32, copy=False)
    if np.isfinite(x).all():            # nearly always
        return Counter()
    return Counter({"NaN": np.isnan(x).sum(), "+inf": np.isposinf(x).sum(), "-inf": np.isneginf(x).sum()})


def odd_words(odd: Counter) -> str:
    return ", ".join(f"{odd[name]:,} {name}" for name in ("NaN", "+inf", "-inf") if odd[name])


def load_split(task: Task, data_dir, split: str) -> Split:
    """Read "train", "valid" or "test"; tells on stderr what is odd. Raises DataError that names file, row and value."""
    file = find_data(task, data_dir, split)
    data, told = read_split(task, file, split), []
    for row, _, has in faults(task, data, {}):
        raise DataError(f"{file}, {split}: row {row} has {has}; to list every such row: python data.py {task.name} "
                        f"--data-dir {data_dir}")
    data.label = [number(task, label) for label in data.label]
    for kind in FEATURES:
        odd = sum((odd_values(data.features(kind, row)) for row in range(len(data))), Counter())
        missing = getattr(data, f"{kind}_len").count(0)
        told += [f"{odd_words(odd)} in {kind} become 0"] * bool(odd) + [f"{missing} rows lack {kind}"] * bool(missing)
    if "" in data.text:
        told.append(f"{data.text.count('')} texts are empty")
    if told:
        print(f"{task.name} {split}: {', '.join(told)}", file=sys.stderr)
    return data


# ---------------------------------------------------------------------------------------------------------------------
# Batches


class Batch(NamedTuple):
    """What the method reads. Features end with the longest row of the batch; behind a row's length they are zero."""
    text: list                      # B strings
    audio: torch.Tensor             # (B, La, Da) fp32
    audio_len: torch.Tensor         # (B,)
    video: torch.Tensor             # (B, Lv, Dv) fp32
    video_len: torch.Tensor         # (B,)
    label: list


def collate(split: Split, rows) -> Batch:
    """The batch of these row numbers."""
    def padded(kind):
        features = [clean(split.features(kind, row)) for row in rows]
        lengths = [len(x) for x in features]
        out = np.zeros((len(rows), max(1, *lengths), features[0].shape[1]), np.float32)
        for row, x in zip(out, features):
            row[:len(x)] = x
        return torch.from_numpy(out), torch.tensor(lengths)

    (audio, audio_len), (video, video_len) = map(padded, FEATURES)
    return Batch([split.text[i] for i in rows], audio, audio_len, video, video_len, [split.label[i] for i in rows])


def epoch_rows(n: int, size: int, seed: int | None = None, epoch: int = 0) -> list:
    """Row numbers of each batch: shuffled, a pure function of (seed, epoch); in the file's order without a seed.

    Batches of rows of like length would need less padding, but they are no random samples: tried on MELD, they scored
    worse.
    """
    # The legacy generator, because numpy promises that its stream never changes.
    order = np.arange(n) if seed is None else np.random.RandomState([seed, epoch]).permutation(n)
    return [order[i:i + size].tolist() for i in range(0, n, size)]


def batches(split: Split, size: int, seed: int | None = None, epoch: int = 0):
    """Yield the epoch's batches of `size` rows; the last may be smaller."""
    for rows in epoch_rows(len(split), size, seed, epoch):
        yield collate(split, rows)


# ---------------------------------------------------------------------------------------------------------------------
# The check: what a data set holds, in words, and its problems. A problem is (row, field, what the row "has").


SHOWN = 10      # problems of one kind that are listed


def check(task: Task, data_dir, tokenizer=None) -> int:
    """Print what a data set holds, then its problems by row; returns their number. Raises DataError."""
    splits, usable, widths, problems, published = {}, {}, {}, [], False
    for split in SPLITS:
        file = find_data(task, data_dir, split)
        data = splits[split] = read_split(task, file, split)
        print(f"{split}: {beside(len(data), task.rows.get(split))} rows in {file}")
        if task.sha256 and split == SPLITS[0]:
            published = sha256(file) == task.sha256
            print(f"  sha256   {'as published' if published else 'not the published one: changed, or another version'}")
        found = list(faults(task, data, widths))
        unfit = {(row, field) for row, field, _ in found}
        fit = {name: [row for row in range(len(data)) if (row, name) not in unfit] for name in FIELDS}
        usable[split] = sorted(set.intersection(*map(set, fit.values())))
        print_texts(task, [data.text[row] for row in fit["text"]], tokenizer)
        for kind in FEATURES:
            odd = print_features(task, data, kind, fit[kind])
            found += [] if published else odd           # some of the published files have such values
        print(f"  unused   {', '.join(data.unused) or 'nothing else is in the file'}")
        print_labels(task, [number(task, data.label[row]) for row in fit["label"]])
        first = {}
        found += [(row, "id", f"the id {name!r} of row {first[name]}") for row, name in enumerate(data.id)
                  if first.setdefault(name, row) != row]
        problems += [(split, *problem) for problem in found]
    doubles = compare(task, splits, usable)
    problems += [] if published else doubles
    shown = Counter()
    for split, row, kind, has in problems:
        shown[split, kind] += 1
        if shown[split, kind] <= SHOWN:
            print(f"problem: {split} row {row} has {has}")
    for (split, kind), n in shown.items():
        if n > SHOWN:
            print(f"problem: {n - SHOWN:,} more such rows of {split} ({kind})")
    print(f"{task.name}: {len(problems):,} problems{', rows counted from 0' if problems else ''}")
    return len(problems)


def beside(found, published) -> str:
    note = "" if published is None else "as published" if found == published else f"published: {published}"
    return f"{found} ({note})" if note else f"{found}"


def sha256(file: Path) -> str:
    digest = hashlib.sha256()
    with open(file, "rb") as blocks:
        while block := blocks.read(1 << 24):
            digest.update(block)
    return digest.hexdigest()


def print_texts(task: Task, texts: list, tokenizer):
    sizes, cut = list(map(len, texts)) or [0], ""
    if tokenizer is not None:
        n = sum(len(tokenizer.encode(text)) > task.text_len for text in texts)
        cut = f"; {n} ({n / max(1, len(texts)):.1%}) have more than {task.text_len} tokens and will be cut"
    print(f"  text     {min(sizes)} to {max(sizes)} characters, {texts.count('')} empty{cut}")


def print_features(task: Task, data: Split, kind: str, rows: list) -> list:
    """Describe one modality of these rows; returns the problems, values that are not finite."""
    odd, low, high, sums, zero = [], math.inf, -math.inf, np.zeros(3), 0
    for row in rows:
        x = data.features(kind, row)
        if values := odd_values(x):
            odd.append((row, kind, f"{odd_words(values)} in {kind}, read as 0"))
        x = clean(x).astype(float).ravel()
        low, high = min(low, x.min(initial=math.inf)), max(high, x.max(initial=-math.inf))
        sums, zero = sums + (x.size, x.sum(), x @ x), zero + (x.size > 0 and not x.any())
    n, mean, square = sums / (1, sums[0] or 1, sums[0] or 1)
    std = math.sqrt(max(0, square - mean ** 2))
    values = f"{low:.3g} to {high:.3g}, mean {mean:.3g}, std {std:.3g}" if n else "no values"
    if rows:
        shapes = sorted({getattr(data, kind)[row].shape for row in rows})
        shape = " to ".join(map(str, shapes[::max(1, len(shapes) - 1)]))        # the first and the last
        types = ", ".join(sorted({str(getattr(data, kind)[row].dtype) for row in rows}))
        lengths = [getattr(data, f"{kind}_len")[row] for row in rows]
        published = str((getattr(task, f"{kind}_len"), getattr(task, f"{kind}_dim")))
        print(f"  {kind:8} {beside(shape, published)}, {types}; lengths {min(lengths)} to {max(lengths)}; "
              f"missing in {lengths.count(0)} rows, all zero in {zero}\n           {values}")
    return odd


def print_labels(task: Task, labels: list):
    """A line and a bar for each class, or for each step in the range of an intensity."""
    names = task.labels
    if not names:
        low, high = task.range
        step = 1.0 if high > 1 else 0.2
        names = [f"{low + i * step:+.1f}" for i in range(round((high - low) / step) + 1)]
        labels = [round((y - low) / step) for y in labels]
    for i, name in enumerate(names):
        share = labels.count(i) / max(1, len(labels))
        print(f"  {name:8} {labels.count(i):6,} {share:6.1%} {'#' * round(60 * share)}".rstrip())


def compare(task: Task, splits: dict, usable: dict) -> list:
    """The problems between splits: rows that are in two. Texts and ids that are in two are only counted."""
    doubles, texts, ids = [], {}, {}
    for split, data in splits.items():
        for row in usable[split]:
            texts.setdefault(data.text[row], []).append((split, row))
            if data.id[row] != str(row):                # an id of its own
                ids.setdefault(data.id[row], set()).add(split)
    shared = [places for places in texts.values() if len({split for split, _ in places}) > 1]
    for places in shared:
        first = {}                                      # what a row is -> where it is first
        for split, row in places:
            features = [clean(splits[split].features(kind, row)) for kind in FEATURES]
            content = splits[split].label[row], *(x.tobytes() for x in features)
            before, twin = first.setdefault(content, (split, row))
            if before != split and any(x.any() for x in features):      # without features there is only the text
                doubles.append((split, row, "double", f"text, label and features of {before} row {twin}"))
    problems = [double for double in doubles if splits[double[0]].text[double[1]] not in task.twins]
    print(f"in more than one split: {len(shared):,} texts, {sum(len(found) > 1 for found in ids.values()):,} ids, "
          f"{len(doubles):,} whole rows ({len(doubles) - len(problems)} of them known)")
    return problems


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=TASKS, help="the data set")
    parser.add_argument("--data-dir", help="folder with the published files somewhere below [data; the demo's: demo]")
    parser.add_argument("--download", action="store_true", help="fetch the data set first, unless it is there")
    parser.add_argument("--llm", help="a backbone, whose tokenizer tells how many texts are too long")
    args = parser.parse_args(argv)
    task = TASKS[args.name]
    data_dir = args.data_dir or HERE / task.home
    try:
        if args.download:
            fetch_data(task, data_dir)
        tokenizer = load_tokenizer(find_llm(args.llm)) if args.llm else None
        return 1 if check(task, data_dir, tokenizer) else 0
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
