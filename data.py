"""The data: tasks and how their rows are worded, rows and batches, the files of a data set.

    python data.py meld --data-dir DIR      check a data set: what it holds, and what is wrong with which row
    python data.py meld --download          fetch it first (needs huggingface_hub)

Exit code 0: clean (there need not be a valid split), 1: problems, 2: could not be read. A data set of your
own is one more Task in TASKS.

Shapes: N rows of a split, B of a batch, La / Lv frames, Da / Dv features of a frame.
"""
import argparse
import math
import os
import re
import sys
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from support.check import FEATURES, check, check_task, is_features, problems
from support.files import DataError, UserError, printable
from support.guards import run_program
from support.hub import find_llm, hub_folder
from support.pickles import read_pickle, scalar
from support.tokenizers import load_tokenizer

HERE = Path(__file__).resolve().parent
SPLITS = ("train", "valid", "test")


# --- Tasks --------------------------------------------------------------------------------------------------
class Wording(NamedTuple):
    """One task in the words of one family of backbones: special tokens by name, everything else as text.

    A row is `bos open P text close prompt label`, where P stands for the pseudo tokens. For LLaMA2:

        MELD    <s><Multimodal>PPPPOh my God!</Multimodal>Please recognize the emotion of the above multimodal
                content from the target set <neutral:0, surprise:1, fear:2, sadness:3, joy:4, disgust:5,
                anger:6>. Assistant: The emotion is4
        MOSEI   <s><Multimodal>PPPPIt was not funny.</Multimodal>Please predict the sentiment intensity of the
                above multimodal content in the range [-3.0, +3.0]. Assistant: The sentiment is-1.6

    No space stands between two parts: each is tokenized on its own.
    """
    bos: tuple
    eos: str
    pad: str
    open: str
    close: str
    prompt: str
    label: object                   # a function: label -> its text
    labels: list                    # the text of every legal label
    reread: bool                    # see Family

    def special_ids(self, tokenizer) -> tuple[list, int, int]:
        """Ids of the tokens in front of a row, of its end and of padding: the release's or, if the tokenizer
        has other ones, those that its tokenizer_config.json names. Raises DataError if it names none."""
        try:
            bos = [tokenizer.token_id(name) for name in self.bos]
            return bos, tokenizer.token_id(self.eos), tokenizer.token_id(self.pad)
        except DataError:
            names = tokenizer.names
            if names["eos"] is None:
                raise
        bos = []
        if names["bos"] is not None:
            bos = [tokenizer.token_id(names["bos"])]
        eos = tokenizer.token_id(names["eos"])
        pad = eos
        if names["pad"] is not None:
            pad = tokenizer.token_id(names["pad"])
        return bos, eos, pad


@dataclass(frozen=True)
class Task:
    """What the method needs to know of a data set. What is published is only compared with files."""
    name: str
    labels: tuple = ()              # class names, written as 0, 1, ...; empty: the label is an intensity
    range: tuple = ()               # of an intensity
    language: str = "en"            # of tag and prompt
    text_len: int = 65              # tokens; longer texts are cut
    pattern: str = ""               # file of each split, {} its name; by default NAME_{}.pkl
    rows: dict = field(default_factory=dict)        # split -> published number of rows
    audio_len: int = 0              # published frames of a row
    video_len: int = 0
    audio_dim: int = 0              # published features of a frame
    video_dim: int = 0
    hub: str = ""                   # the published data set
    sha256: str = ""                # of the published file, where it is one
    release_prompt: str = ""        # of its own under --official, where the release has it for Qwen alone
    twins: tuple = ()               # texts of rows that the published splits have in common
    home: str = "data"              # folder below which the files are looked for
    llm: str = "Qwen/Qwen-1_8B"     # the backbone if none is named

    @property
    def files(self) -> dict:
        """split -> file name."""
        pattern = self.pattern or self.name + "_{}.pkl"
        return {split: pattern.format(split) for split in SPLITS}

    @property
    def select(self) -> str:
        """The validation metric that chooses the best epoch: the largest weighted F1 or smallest MAE."""
        return "weighted_f1" if self.labels else "mae"

    def nearest(self, x):
        """The number of the mark nearest to each value, of two equally near ones the even; nan stays nan."""
        marks = self.marks()
        step = marks[1] - marks[0]
        steps = np.array(x) / step                      # from 0
        steps = steps.round(6).round()                  # 0.3 / 0.2 comes out a little below 1.5
        first = round(marks[0] / step)
        return (steps - first).clip(0, len(marks) - 1)

    def number(self, label) -> int | float | None:
        """A file's label as what is learned: "joy" -> 4, an intensity as it is; None if it is no label."""
        if self.labels:
            name = str(label)
            return self.labels.index(name) if name in self.labels else None
        low, high = self.range
        slack = 1e-6 * max(abs(low), abs(high))         # files hold float32, whose 0.8 is above ours
        if isinstance(label, (int, float)) and low - slack <= label <= high + slack:
            return float(min(max(low, label), high))
        return None

    def values(self) -> list:
        """Every legal label: class numbers, or the range in steps of 0.1."""
        if self.labels:
            return list(range(len(self.labels)))
        low, high = self.range
        return [i / 10 for i in range(round(10 * low), round(10 * high) + 1)]

    def marks(self) -> list:
        """Evenly spaced intensities for tables and bars: -3, -2, ... 3; of a range up to 2.4 every 0.2."""
        low, high = self.range
        for step in (0.2, 1, 2, 5, 10, 100, high - low):
            if (high - low) / step <= 12:
                break
        first = math.floor(low / step + 1e-9)       # a whole number may come out a little too small
        last = math.ceil(high / step - 1e-9)
        return [round(i * step, 1) for i in range(first, last + 1)]

    def wording(self, family: str, official: bool = False) -> Wording:
        """The words around a row; official: to the letter the release's, if it has the task, else each run of
        spaces is one."""
        words = family_words(family)
        tag = TAG[self.language]
        if self.labels:
            names = ", ".join(f"{name}:{i}" for i, name in enumerate(self.labels))
            prompt = words.prompts[self.language, "class"].format(labels=names)
        else:
            low, high = self.range
            prompt = words.prompts[self.language, "range"].format(low=low, high=high)
        if not (official and self.hub):
            prompt = re.sub(" +", " ", prompt)
        if official and self.release_prompt and words.name == "qwen":
            prompt = self.release_prompt

        def label(y) -> str:
            if self.labels:
                return str(int(y))
            if not official:
                y = round(y, 1) + 0.0           # never "-0.0", which is no legal label
            return words.intensity.format(y)

        return Wording(
            bos=words.official_bos if official else words.bos,
            eos=words.eos,
            pad=words.pad,
            open=f"{words.lead[self.language]}<{tag}>",
            close=f"</{tag}>",
            prompt=prompt,
            label=label,
            labels=[label(y) for y in self.values()],
            reread=words.reread and official,
        )


TASKS = {task.name: task for task in (
    Task("demo", labels=("joy", "anger", "sadness", "calm"), text_len=40,
         rows=dict(train=2000, valid=300, test=600), audio_len=40, audio_dim=6, video_len=24, video_dim=8,
         home="demo", llm=str(HERE / "demo" / "llm")),
    Task("meld", labels=("neutral", "surprise", "fear", "sadness", "joy", "disgust", "anger"), text_len=65,
         rows=dict(train=9989, valid=1109, test=2610), pattern="MELD/meld_{}.pkl",
         audio_len=157, audio_dim=64, video_len=32, video_dim=64, hub="AZYoung/MELD_processed",
         twins=("But um, I don’t think it’s anything serious.",)),
    Task("iemocap", labels=("hap", "sad", "neu", "ang", "exc", "fru"), text_len=84,
         rows=dict(train=5240), pattern="IEMOCAP/iemocap_{}.pkl",
         audio_len=157, audio_dim=64, video_len=32, video_dim=64,
         release_prompt="Please recognize the emotion of the above multimodal content from the label"
         + 49 * " " + "set <hap: 0, sad: 1, neu: 2, ang: 3, exc: 4, fru: 5>. Assistant: The emotion is"),
    Task("cherma", labels=("愤怒", "厌恶", "恐惧", "高兴", "平静", "悲伤", "惊奇"), language="zh", text_len=78,
         audio_len=543, audio_dim=1024, video_len=16, video_dim=2048,
         pattern="CHERMA0723/cherma_{}.pkl", hub="AZYoung/CHERMA0723_processed"),
    Task("mosei", range=(-3.0, 3.0), text_len=50,
         rows=dict(train=16326, valid=1871, test=4659), pattern="MOSEI/Processed/unaligned_50.pkl",
         audio_len=500, audio_dim=74, video_len=375, video_dim=35, hub="AZYoung/MOSEI_processed",
         sha256="ad8b23d50557045e7d47959ce6c5b955d8d983f2979c7d9b7b9226f6dd6fec1f"),
    Task("simsv2", range=(-1.0, 1.0), language="zh", text_len=50,
         rows=dict(train=2722, valid=647, test=1034), pattern="SIMS_V2/ch-simsv2s.pkl",
         audio_len=925, audio_dim=25, video_len=232, video_dim=177, hub="AZYoung/SIMSV2_processed",
         sha256="f8fd9a1dd070588a714ff357b00f31d5bb93277b4e502cf2dc4ff718a95fc49b"),
    Task("sims", range=(-1.0, 1.0), language="zh", text_len=39,
         rows=dict(train=1368, valid=456, test=457), pattern="SIMS/Processed/unaligned_39.pkl",
         audio_len=400, audio_dim=33, video_len=55, video_dim=709),
    Task("mosi", range=(-3.0, 3.0), text_len=50,
         rows=dict(train=1284, valid=229, test=686), audio_len=375, audio_dim=5, video_len=500, video_dim=20,
         pattern="MOSI/Processed/unaligned_50.pkl",
         sha256="78e0f8b5ef8ff71558e7307848fc1fa929ecb078203f565ab22b9daab2e02524"),
)}

# --- Words: how the release words a row for each family of backbones ----------------------------------------
_CLASS_EN = "Please recognize the emotion of the above multimodal content from the"
_CLASS_ZH = "请选择适用于上述多模态内容的情绪标签：<{labels}>。"
_RANGE_EN = "Please predict the sentiment intensity of the above multimodal content in the range "
_RANGE_ZH = "请对上述多模态内容的情感强度进行预测，范围在"
TAG = {"en": "Multimodal", "zh": "多模态"}


@dataclass(frozen=True)
class Family:
    """The words of one family. Special tokens by name."""
    name: str                       # in PRESETS and docs/release.json
    backbone: str                   # of which the release's figures are
    bos: tuple                      # in front of each row
    official_bos: tuple             # the same in the release
    eos: str
    pad: str                        # fills up a row; in the release, on the text's left, an ordinary token
    prompts: dict                   # (language, "class" or "range") -> the release's prompt, to the letter
    lead: dict                      # language -> what stands before the open tag
    intensity: str = "{:.1f}"       # how an intensity is written as a label
    reread: bool = False            # official decoding reads the whole row again at each step


_LLAMA = Family(
    "llama", "LLaMA2-7B", bos=("<s>",), official_bos=("<s>", "<s>"), eos="</s>", pad="<unk>",
    lead={"en": "", "zh": ""},
    # Neither who answers nor a range's sign follows a rule, and MELD's prompt has a run of spaces.
    prompts={
        ("en", "class"): _CLASS_EN + 45 * " " + "target set <{labels}>. Assistant: The emotion is",
        ("zh", "class"): _CLASS_ZH + "助手: 情绪为",
        ("en", "range"): _RANGE_EN + "[{low:.1f}, {high:+.1f}]. Assistant: The sentiment is",
        ("zh", "range"): _RANGE_ZH + "[{low:.1f}, {high:.1f}]之间。响应: 情感为",
    })
_QWEN = Family(
    "qwen", "Qwen-1.8B", bos=("<|im_start|>",), official_bos=("<|im_start|>",), eos="<|endoftext|>",
    pad="<|endoftext|>", lead={"en": "", "zh": ""}, intensity="{:+.1f}",
    prompts=_LLAMA.prompts | {("zh", "range"): _RANGE_ZH + "[{low:.1f}, {high:+.1f}]之间。响应: 情感为"})
_CHATGLM = Family(
    "chatglm", "ChatGLM3-6B", bos=("[gMASK]", "sop"), official_bos=("[gMASK]", "sop"), eos="</s>",
    pad="<unk>", lead={"en": "{question}\n\n ", "zh": "{问题}\n\n "}, reread=True,     # with the braces
    prompts={
        ("en", "class"): _CLASS_EN + " target" + 49 * " " + "set <{labels}>. response: The emotion is",
        ("zh", "class"): _CLASS_ZH + "响应: 情绪为",
        ("en", "range"): _RANGE_EN + "[{low:.1f}, {high:.1f}]. response: The sentiment is",
        ("zh", "range"): _RANGE_ZH + "[{low:.1f}, {high:.1f}]之间。响应: 情感为",
    })
FAMILIES = {"llama": _LLAMA, "qwen": _QWEN, "qwen2": _QWEN, "qwen3": _QWEN, "chatglm": _CHATGLM}


def family_words(family: str) -> Family:
    """A family that the release does not know is spoken to as LLaMA2."""
    return FAMILIES.get(family, _LLAMA)


# --- Presets ------------------------------------------------------------------------------------------------
class Preset(NamedTuple):
    """The release's hyper-parameters for one task and family; what is the same for all is in train.py."""
    learning_rate: float
    batch_size: int
    epochs: int                     # length of the cosine; early stopping usually ends a run before
    pseudo_tokens: int
    audio_hidden: int               # width of the LSTM's state
    video_hidden: int


PRESETS = {
    ("mosei", "llama"): Preset(5e-5, 8, 30, 4, 64, 32),
    ("mosei", "qwen"): Preset(5e-3, 16, 30, 4, 64, 32),
    ("mosei", "chatglm"): Preset(5e-5, 8, 30, 4, 64, 32),
    ("simsv2", "llama"): Preset(5e-5, 8, 40, 4, 64, 64),
    ("simsv2", "qwen"): Preset(5e-4, 16, 30, 4, 64, 64),
    ("simsv2", "chatglm"): Preset(5e-5, 8, 80, 4, 64, 64),
    ("meld", "llama"): Preset(5e-4, 6, 30, 4, 64, 32),
    ("meld", "qwen"): Preset(5e-4, 16, 50, 2, 32, 16),
    ("meld", "chatglm"): Preset(5e-5, 8, 90, 4, 64, 32),
    ("iemocap", "qwen"): Preset(5e-4, 4, 30, 4, 32, 32),
    ("cherma", "llama"): Preset(5e-5, 6, 30, 4, 32, 16),
    ("cherma", "qwen"): Preset(5e-3, 16, 30, 4, 32, 16),
    ("cherma", "chatglm"): Preset(5e-5, 8, 30, 4, 32, 16),
    ("demo", "llama"): Preset(1e-2, 16, 4, 4, 32, 16),
}


def preset(task: Task | str, family: str) -> Preset:
    """The release's hyper-parameters; where it has none, MELD's for classes, for an intensity MOSEI's or, in
    Chinese, SIMS-V2's; for a family with words of its own LLaMA2's."""
    if isinstance(task, str):
        task = TASKS[task]
    words = family_words(family).name
    nearest = "simsv2" if task.language == "zh" else "mosei"
    if task.labels:
        nearest = "meld"
    for pair in ((task.name, words), (nearest, words), (task.name, "llama")):
        if pair in PRESETS:
            return PRESETS[pair]
    return PRESETS[nearest, "llama"]


# --- Rows and batches ---------------------------------------------------------------------------------------
class Batch(NamedTuple):
    """What the method reads. Features end with the longest row; behind a row's length they are zero.

    Two rows with 3 frames and 1 frame of audio, Da = 2:

        audio[0]    [.1 .4]  [.2 .5]  [.3 .6]       audio_len[0]    3
        audio[1]    [.7 .8]  [ 0  0]  [ 0  0]       audio_len[1]    1
    """
    text: list                      # B strings
    audio: torch.Tensor             # (B, La, Da) fp32
    audio_len: torch.Tensor         # (B,)
    video: torch.Tensor             # (B, Lv, Dv) fp32
    video_len: torch.Tensor         # (B,)
    label: list


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
    oddities: Counter = field(default_factory=Counter)      # of the lengths: what some rows have -> how many

    def __len__(self) -> int:
        return len(self.text)

    def features(self, kind: str, row: int) -> np.ndarray:
        """The real frames of a row's "audio" or "video"."""
        length = getattr(self, f"{kind}_len")[row]
        return getattr(self, kind)[row][:length]

    def frames(self, kind: str, row: int) -> np.ndarray:
        """The same as fp32 without NaN and infinities, see clean."""
        return clean(self.features(kind, row))


def clean(x: np.ndarray) -> np.ndarray:
    """Features as fp32; NaN and both infinities become 0 (in the release, NaN of video and -inf of audio)."""
    with np.errstate(over="ignore", invalid="ignore"):
        x = x.astype(np.float32)
    x[~np.isfinite(x)] = 0
    return x


def collate(split: Split, rows) -> Batch:
    """The batch of these row numbers."""
    columns = {name: [getattr(split, name)[row] for row in rows] for name in ("text", "label")}
    for kind in FEATURES:
        frames = [split.frames(kind, row) for row in rows]
        columns[kind], columns[f"{kind}_len"] = padded(frames)
    return Batch(**columns)


def padded(features):
    """B arrays (length, D) as one tensor (B, L, D), zero behind each length, and the lengths (B,)."""
    lengths = [len(x) for x in features]
    longest = max(1, *lengths)                  # one frame of zeros where no row has any
    x = torch.zeros(len(features), longest, features[0].shape[1])
    for i, length in enumerate(lengths):
        x[i, :length] = torch.from_numpy(features[i])
    return x, torch.tensor(lengths)


def epoch_rows(n: int, size: int, seed: int | None = None, epoch: int = 0) -> list:
    """Row numbers of each batch: a pure function of (seed, epoch); in the file's order without a seed.

    7 rows in batches of 3, without a seed: [[0, 1, 2], [3, 4, 5], [6]]. Rows of like lengths would need less
    padding, but are no random samples: on MELD they scored worse.
    """
    order = np.arange(n)
    if seed is not None:
        # The legacy generator, because numpy promises that its stream never changes.
        order = np.random.RandomState([seed, epoch]).permutation(n)
    return [order[i:i + size].tolist() for i in range(0, n, size)]


def some_rows(split: Split, rows) -> Split:
    """These rows as a split of their own."""
    columns = {}
    for name in COLUMNS:
        column = getattr(split, name)
        columns[name] = [column[row] for row in rows]
    return Split(**columns)


def share_of(split: Split, share: float, seed: int, left: int = 0) -> tuple[Split, Split]:
    """A random `share` of the rows, and the others, at least `left`. Of one seed a smaller share lies within
    a larger one."""
    order = np.random.RandomState(seed).permutation(len(split))
    n = max(1, round(share * len(split)))
    n = min(n, len(split) - left)
    return some_rows(split, sorted(order[:n])), some_rows(split, sorted(order[n:]))


# --- Reading a split ----------------------------------------------------------------------------------------
COLUMNS = {                         # field of a Split -> its column in a table
    "text": "raw_text",
    "audio": "audio",
    "video": "vision",
    "label": "regression_labels",
    "audio_len": "audio_lengths",
    "video_len": "vision_lengths",
    "id": "id",
}
FIELDS = tuple(COLUMNS)
REQUIRED = ("text", *FEATURES, "label")
ROW_OF_FILES = '{"label": y, "features": {"text": x, "audio": np.load(A), "video": np.load(V)}}'


class NoSplit(DataError):
    """A split is not there. Training can do without the valid one."""

    def __init__(self, split: str, problem: str):
        if split == "valid":
            problem += "; or take validation rows from the training rows: train.py --valid-share 0.1"
        super().__init__(problem)


def load_split(task: Task, data_dir, split: str, fetch: bool = False) -> Split:
    """Read "train", "valid" or "test"; tells on stderr what is odd. Raises DataError for what is unusable."""
    file = find_data(task, data_dir, split, fetch)
    data = read_split(task, file, split)
    odd = Counter()
    for row, _, has, unusable in problems(task, data, {}):
        if unusable:
            raise DataError(f"{file}, {split}: row {row} has {has}; to list every such row: "
                            f"python data.py {task.name} --data-dir {data_dir}")
        odd[has] += 1
    missing = {"no text": data.text.count("")}
    for kind in FEATURES:
        missing[f"no {kind}"] = getattr(data, f"{kind}_len").count(0)
    for has, n in {**data.oddities, **missing, **odd}.items():
        if n > 0:
            print(printable(f"{task.name} {split}: {n} rows have {has}"), file=sys.stderr)
    data.label = [task.number(label) for label in data.label]
    return data


def read_split(task: Task, file: Path, split: str) -> Split:
    """A split just as the file has it; `problems` looks at its rows. Raises DataError for another layout.

    The file holds one split, or all in a dict {"train": split, ...}. It may lack ids, and lengths: then all
    frames are real. A split is either of
        rows    [{"label": y, "features": {"text", "audio" (La, Da), "video", "audio_len", "video_len"}}, ...]
        table   {"raw_text": N texts, "audio": (N, La, Da), "vision": (N, Lv, Dv), "audio_lengths",
                 "vision_lengths", "regression_labels" or, if they are classes, "labels", "id"}
    """
    raw = read_pickle(file)
    if isinstance(raw, dict) and split in raw:
        raw = raw[split]
    elif len(set(task.files.values())) == 1:
        raise NoSplit(split, f"{file}, {split}: not there; expected a dict of train, valid, test in this one "
                             "file")
    names = dict(COLUMNS)
    if task.labels:
        names["label"] = "labels"
    if isinstance(raw, list):
        raw = table_of(raw)
        names = {name: name for name in FIELDS}
    elif not isinstance(raw, dict):
        raw = {}

    columns = {name: [] for name in REQUIRED}
    for name in FIELDS:
        column = raw.get(names[name])
        is_array = isinstance(column, np.ndarray) and column.ndim > 0
        if is_array or isinstance(column, (list, tuple)):
            columns[name] = list(column)
    counts = {names[name]: len(column) for name, column in columns.items()}
    n = len(columns["text"])
    if n == 0 or set(counts.values()) != {n}:
        raise DataError(f"{file}, {split}: has {counts} entries; expected as many in each, and at least one, "
                        "or a list of rows {'label': y, 'features': {'text': x, 'audio': (La, Da), ...}}")
    for name in FIELDS:
        if name not in FEATURES:
            column = columns.get(name, [None] * n)
            columns[name] = [scalar(x) for x in column]
    for row, name in enumerate(columns["id"]):
        columns["id"][row] = str(row if name is None else name)
    oddities = settle_lengths(columns)
    unused = sorted(" ".join(key.split()) for key in raw.keys() - names.values())
    return Split(**columns, unused=unused, oddities=oddities)


def table_of(rows):
    """[{"label": "joy", "features": {"text": "Hi!"}}, ...] -> {"label": ["joy", ...], "text": ["Hi!", ...]}.
    A row of another layout has None everywhere."""
    flat_rows = []
    names = set(FIELDS)
    for row in rows:
        features = row.get("features") if isinstance(row, dict) else None
        flat = row | features if isinstance(features, dict) else {}
        flat_rows.append(flat)
        names.update(flat)
    table = dict.fromkeys(names - {"features"})         # what is not used is only named
    for name in FIELDS:
        table[name] = [row.get(name) for row in flat_rows]
    return table


def settle_lengths(columns):
    """All frames are real where a length is absent or beyond them. Returns how many rows have which."""
    oddities = Counter()
    for kind in FEATURES:
        lengths = columns[f"{kind}_len"]
        for row, x in enumerate(columns[kind]):
            if not is_features(x):
                continue
            length = lengths[row]
            if length is None:
                lengths[row] = len(x)
                if len(x) > 0 and not x[-1].any():
                    oddities[f"no {kind} length, but zeros at the end, which are read"] += 1
            elif isinstance(length, int) and length > len(x):
                lengths[row] = len(x)
                oddities[f"a {kind} length above its frames, all of which are read"] += 1
    return oddities


# --- Finding the files: below a folder, else in the hub's cache, which is where downloads go ----------------
def find_data(task: Task, data_dir, split: str, fetch: bool = False) -> Path:
    """The published file of a split, anywhere below `data_dir`. Raises DataError that says how to get it."""
    name = task.files[split]
    root = Path(data_dir)
    found = candidates(task, root, split)
    advice = 'the page says under "Your own data" what it holds and how to make it'
    if task.rows:                       # it is published
        advice = ("put it there; github.com/thuiar/MMSA or, for emotions, github.com/AZYoung233/MSE-Adapter "
                  "tells where it is published")
    if task.hub and not found:
        advice = (f"name its folder with --data-dir, or get it: python data.py {task.name} --download, or "
                  f"hf download {task.hub} --repo-type dataset --local-dir {data_dir}")
        folder = hub_folder(task.hub, "dataset", [f"*{Path(name).name}"], fetch)
        if folder:
            found = candidates(task, folder, split)
    if len(found) == 1:
        return found[0]
    if found:
        listed = ", ".join(map(str, found))[:500]
        raise DataError(f"{data_dir}: {len(found)} files could be {name}: {listed}; point --data-dir at one")
    below = files_below(root)
    pickles = [str(path.relative_to(root)) for path in below if path.suffix == ".pkl"]
    listed = ", ".join(pickles)[:300] or "no .pkl file"
    arrays = sum(path.suffix == ".npy" for path in below)
    if arrays > 0:
        listed += f", but {arrays} .npy"
        advice = f"{name} is to be a pickled list of rows made of them, {ROW_OF_FILES}; {advice}"
    raise NoSplit(split, f"{data_dir}: {name} was not found in or below this folder, where there is "
                         f"{listed}; {advice}")


def candidates(task: Task, root: Path, split: str) -> list:
    """The files in or below `root` that may be the published one of a split."""
    published = root / task.files[split]
    if os.path.isfile(published):
        return [published]
    # MOSI's and MOSEI's files have one last name: the nearest folder named like one of the two decides.
    names = [task.name]
    for other in TASKS.values():
        if Path(other.files[split]).name == published.name:
            names.append(other.name)
    found = []
    for path in files_below(root):
        if path.name != published.name or not path.is_file():       # a folder, say, or a FIFO
            continue
        named = re.findall("|".join(names), str(path.absolute()).lower())
        if not named or named[-1] == task.name:
            found.append(path)
    return found


def files_below(root: Path) -> list:
    """What is in `root` and the folders below it, links to folders, too; each folder once, so that circles
    end. A folder that may not be read is passed over."""
    found = []
    seen = set()
    for folder, inner, names in os.walk(root, followlinks=True):
        real = os.path.realpath(folder)
        if real in seen:
            inner.clear()
            continue
        seen.add(real)
        inner.sort()
        found += [Path(folder, name) for name in sorted(names)]
    return found


# --- The command --------------------------------------------------------------------------------------------
def main(argv=None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=TASKS, help="the data set")
    parser.add_argument("--data-dir", help="folder with the published files somewhere below [data or demo]")
    parser.add_argument("--download", action="store_true", help="first fetch what is not there")
    parser.add_argument("--llm", help="a backbone, whose tokenizer tells how many texts are too long")
    args = parser.parse_args(argv)
    task = TASKS[args.name]
    data_dir = args.data_dir or HERE / task.home
    try:
        check_task(task)
        tokenizer = load_tokenizer(find_llm(args.llm)) if args.llm else None
        files = {}
        splits = {}
        for split in SPLITS:
            try:
                files[split] = find_data(task, data_dir, split, args.download)
                splits[split] = read_split(task, files[split], split)
            except NoSplit as error:
                if split != "valid":
                    raise
                print(printable(f"no valid split: {error}"))
        n = check(task, files, splits, tokenizer)
    except (UserError, OSError) as error:
        print(printable(f"error: {error}"), file=sys.stderr)
        return 2
    return 1 if n > 0 else 0


if __name__ == "__main__":
    run_program(main)
