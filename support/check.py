"""The check of a data set: what is wrong with which row, what the set holds; python data.py NAME calls it.

It imports nothing of data.py: `task` is a data.Task and `data` a data.Split, `splits` is {split: data.Split}.
"""
import hashlib
import math
import re
from collections import Counter, defaultdict

import numpy as np

from support.files import DataError, printable

FEATURES = ("audio", "video")       # the modalities beside the text
# Text that was written in one encoding and read in another ("cafÃ©" for "café"), or a spreadsheet's "nan".
WRONG_TEXT = re.compile(r"[\x80-\x9f\ufffd]|â[€„]|[ÂÃ][\xa0-\xbf]|ðŸ|([ã-é][\xa0-\xbf]{2}){2}|^([nN]a[nN])$")
SHOWN = 10                          # problems of one kind in one split; the others are only counted
WIDEST = 65536                      # features of a frame: more of them are pixels, or a mistake


def check_task(task, family: str = "llama"):
    """Raise DataError for an entry of TASKS with which no run could go on to its end."""
    has_range = isinstance(task.range, (tuple, list)) and len(task.range) == 2
    if bool(task.labels) == has_range:
        raise DataError(f"task {task.name}: labels {task.labels!r:.80}, range {task.range!r:.80}; expected "
                        "one of the two in TASKS: class names, or the least and the largest intensity")
    if has_range:
        check_range(task)
    else:
        check_labels(task)
    try:
        task.wording(family)
    except KeyError as error:
        raise DataError(f"task {task.name}: data.py has no words for {error}; add this language to TAG, and "
                        "to prompts and lead of each family") from None


def check_range(task):
    """Raise DataError unless the range gives at least two intensities, and no more than can be tried."""
    low, high = task.range
    numbers = isinstance(low, (int, float)) and isinstance(high, (int, float))
    if not numbers or not -1000 <= low < high <= 1000 or len(task.values()) < 2:
        raise DataError(f"task {task.name}: range {task.range!r:.80}; expected two numbers in rising order, "
                        "at least 0.1 apart and within -1000 to 1000; scale the labels so that they fit")


def check_labels(task):
    """Raise DataError unless the labels are a tuple of different names, as people write them."""
    names = task.labels
    if not isinstance(names, (tuple, list)) or len(names) < 2:
        raise DataError(f"task {task.name}: labels {names!r:.80}; expected at least two class names in "
                        'brackets, ("joy", "anger")')
    for i, name in enumerate(names):
        if not isinstance(name, str) or not name.isprintable() or not name.strip():
            raise DataError(f"task {task.name}: the label {name!r:.80}; expected a name, as a text in quotes")
        if name in names[:i]:
            raise DataError(f"task {task.name}: the label {name!r:.80} twice; name each class once")


# --- What is wrong with a row -------------------------------------------------------------------------------
def problems(task, data, widths: dict):
    """Yield (row, field, what the row has, is it unusable?) for each problem of a split, in the rows' order:

        (4, "label", "the label 'joyful'; expected neutral, surprise, ...", True)

    widths: features of a frame, {"audio": 64, "video": 64}; what it lacks becomes the commonest of the split.
    """
    for kind in FEATURES:
        if kind not in widths:
            widths[kind] = commonest_width(getattr(data, kind))
    if task.labels:
        expected = ", ".join(task.labels)
    else:
        low, high = task.range
        expected = f"a number from {low} to {high}"
    ids = set()
    for row, text in enumerate(data.text):
        if data.id[row] in ids:
            yield row, "id", "an id that another row has before it", False
        ids.add(data.id[row])
        if not isinstance(text, str):
            has = f"a text that is {text!r:.60}; expected a string, '' for none"
            yield row, "text", has, True
        elif WRONG_TEXT.search(text):
            yield row, "text", "a text that was decoded wrongly, or is nan", False
        label = data.label[row]
        if task.number(label) is None:
            has = f"the label {label!r:.60}; expected {expected}"
            yield row, "label", has, True
        for kind in FEATURES:
            x = getattr(data, kind)[row]
            length = getattr(data, f"{kind}_len")[row]
            has = unusable_features(kind, x, length, widths[kind])
            if has:
                yield row, kind, has, True
                continue
            real = x[:length]
            finite = np.abs(real) <= np.finfo(np.float32).max       # what fp32 can hold
            if not finite.all():
                has = f"NaN or infinities in {kind}, read as 0"
                yield row, kind, has, False
            elif len(real) > 0 and not real[0].any() and x[length:].any():
                has = f"zeros in front of {kind} and features behind its length, not read"
                yield row, kind, has, False


def is_features(x) -> bool:
    """Is it an array of numbers (frames, features)?"""
    if not isinstance(x, np.ndarray) or x.ndim != 2:
        return False
    return x.dtype.kind in "fiub" and x.shape[1] > 0


def commonest_width(arrays: list) -> int:
    """Features of a frame in most of the rows; of equally many rows, in the first; 0 if no row has any."""
    rows = Counter()                # width -> how many rows have it
    for x in arrays:
        if is_features(x):
            rows[x.shape[1]] += 1
    return max(rows, key=rows.get, default=0)


def unusable_features(kind: str, x, length, width: int) -> str:
    """What a row has instead of frames of this width and their number; "" if it is fine."""
    if not is_features(x):
        found = f"{x!r:.60}"
        advice = ""
        if isinstance(x, np.ndarray):
            found = f"{x.dtype} {x.shape}"
            if x.ndim == 1:
                advice = "; x[None] makes one frame of a vector"
        return f"{kind} that is {found}; expected numbers (frames, features){advice}"
    if x.shape[1] > WIDEST:
        return f"{x.shape[1]:,} {kind} features; expected at most {WIDEST:,} of a frame"
    if x.shape[1] != width:
        return f"{x.shape[1]} {kind} features; expected {width}, as most rows"
    if not isinstance(length, int) or length < 0:
        return f"the {kind} length {length!r:.60}; expected 0 to its {len(x)} frames"
    return ""


# --- What a data set holds ----------------------------------------------------------------------------------
def check(task, files: dict, splits: dict, tokenizer=None) -> int:
    """Print what a data set holds, then its problems by row, some of each kind; returns their number.

    files: split -> path. tokenizer: tells how many texts are too long.
    """
    widths = {}                     # of the first split, with which the others are compared
    usable = {}                     # split -> numbers of the rows that can be used
    found = defaultdict(list)       # (split, field) -> [(row, what it has), ...]
    published = False               # is it the very file that was published? It has odd values and doubles
    for split, data in splits.items():
        count = beside(len(data), task.rows.get(split))
        print(printable(f"{split}: {count} rows in {files[split]}"))
        if task.sha256 and not usable:          # once: all splits are in one file
            content = np.memmap(files[split], mode="r")
            published = hashlib.sha256(content).hexdigest() == task.sha256
            verdict = "as published" if published else "not the published one: another version"
            print(f"  sha256   {verdict}")
        bad = set()
        for row, name, has, unusable in problems(task, data, widths):
            if unusable:
                bad.add(row)
            if unusable or not published:
                found[split, name].append((row, has))
        usable[split] = [row for row in range(len(data)) if row not in bad]
        if usable[split]:
            describe(task, data, usable[split], tokenizer)
    for split, row, has in doubles(task, splits, usable):
        if not published:
            found[split, "double"].append((row, has))

    n = 0
    for (split, name), rows in found.items():
        n += len(rows)
        for row, has in rows[:SHOWN]:
            print(printable(f"problem: {split} row {row} has {has}"))
        if len(rows) > SHOWN:
            print(f"problem: {len(rows) - SHOWN:,} more such rows of {split} ({name})")
    note = ", rows counted from 0" if n > 0 else ""
    print(f"{task.name}: {n:,} problems{note}")
    return n


def beside(found, published) -> str:
    """7 and 9989 -> "7 (published: 9989)"."""
    if not published:
        return f"{found}"
    if found == published:
        return f"{found} (as published)"
    return f"{found} (published: {published})"


def describe(task, data, rows: list, tokenizer):
    """Print what these rows hold."""
    describe_texts(task, [data.text[row] for row in rows], tokenizer)
    for kind in FEATURES:
        describe_features(task, data, kind, rows)
    for has, n in data.oddities.items():
        print(f"  remark   {n} rows have {has}")
    unused = ", ".join(data.unused) or "nothing else is in the file"
    print(printable(f"  unused   {unused:.300}"))
    describe_labels(task, [task.number(data.label[row]) for row in rows])


def describe_texts(task, texts: list, tokenizer):
    sizes = [len(text) for text in texts]
    cut = ""
    if tokenizer is not None:
        n = sum(len(tokenizer.encode(text)) > task.text_len for text in texts)
        share = n / len(texts)
        cut = f"; {n} ({share:.1%}) have more than {task.text_len} tokens and will be cut"
    print(f"  text     {min(sizes)} to {max(sizes)} characters, {sizes.count(0)} empty{cut}")


def describe_features(task, data, kind: str, rows: list):
    """Print shapes, lengths and the numbers' statistics of a modality."""
    shapes = set()
    dtypes = set()
    lengths = []
    zero = 0                        # rows that have frames, all of them zero
    low, high = math.inf, -math.inf
    n = 0                           # frames; the sums of each column, and of its squares: (D,)
    sums = 0.0
    squares = 0.0
    for row in rows:
        x = getattr(data, kind)[row]
        shapes.add(x.shape)
        dtypes.add(str(x.dtype))
        x = data.frames(kind, row).astype(float)
        lengths.append(len(x))
        if len(x) == 0:
            continue
        if not x.any():
            zero += 1
        low = min(low, x.min())
        high = max(high, x.max())
        n += len(x)
        sums = sums + x.sum(axis=0)
        squares = squares + (x * x).sum(axis=0)

    shape = f"{min(shapes)}"
    if len(shapes) > 1:
        shape = f"{min(shapes)} to {max(shapes)}"
    width = getattr(task, f"{kind}_dim", 0)
    published = ""
    if width > 0:                   # else nothing is published
        frames = getattr(task, f"{kind}_len")
        published = f"({frames}, {width})"
    missing = lengths.count(0)
    print(f"  {kind:8} {beside(shape, published)}, {', '.join(sorted(dtypes))}; "
          f"lengths {min(lengths)} to {max(lengths)}; "
          f"missing in {missing} rows, all zero in {zero}")
    if n == 0:
        return
    if zero == len(rows) - missing:
        print(f"  remark   {kind} is zero in every row that has it")
    describe_scales(kind, low, high, sums / n, squares / n)


def describe_scales(kind: str, low, high, means, squares):
    """Print the statistics of all numbers. means, squares (D,): of each column, and of its squares."""
    mean = means.mean()
    std = deviation(squares.mean(), mean)
    print(f"           {low:.3g} to {high:.3g}, mean {mean:.3g}, std {std:.3g}")
    stds = deviation(squares, means)
    widest = stds.argmax()
    varied = stds[stds > 0.001]             # others are constant, but for rounding
    if stds[widest] > 10 and varied.min() < stds[widest] / 5:
        print(f"  remark   {kind} has very unlike scales: std {stds[widest]:.3g} in column {widest}, "
              f"{varied.min():.3g} in another; standardise each column by its mean and std in train")


def deviation(squares, mean):
    """The standard deviation, from the means of the squares and of the numbers."""
    return np.sqrt(np.maximum(0, squares - mean ** 2))      # rounding may leave it a little below 0


def describe_labels(task, numbers: list):
    """Print a bar for each class, or for each step in the range of an intensity."""
    names = task.labels
    if not names:
        names = [f"{mark:+.1f}" for mark in task.marks()]
        numbers = task.nearest(numbers).tolist()        # now the number of its mark
    for i, name in enumerate(names):
        n = numbers.count(i)
        share = n / len(numbers)
        bar = "#" * round(60 * share)
        print(f"  {name:8} {n:6,} {share:6.1%} {bar}".rstrip())


def doubles(task, splits: dict, usable: dict) -> list:
    """The rows that are in two splits: [(split, row, what it has), ...]. Texts and ids are only counted."""
    text_splits, id_splits = Counter(), Counter()       # in how many splits a text, an id is
    first = {}                      # content of a row -> (split, row) that has it first
    found = []
    known = 0                       # doubles of the published files
    for split, data in splits.items():
        rows = usable[split]
        text_splits.update({data.text[row] for row in rows})
        id_splits.update({data.id[row] for row in rows if data.id[row] != str(row)})    # the file's own ids
        for row in rows:
            text = data.text[row]
            features = [data.frames(kind, row) for kind in FEATURES]
            content = hash((text, data.label[row], *[x.tobytes() for x in features]))
            before, twin = first.setdefault(content, (split, row))
            if before == split:
                continue
            if not any(x.any() for x in features):      # without features it is only a text
                continue
            if text in task.twins:
                known += 1
            else:
                has = f"text, label and features of {before} row {twin}"
                found.append((split, row, has))
    texts = sum(n > 1 for n in text_splits.values())
    ids = sum(n > 1 for n in id_splits.values())
    whole = len(found) + known
    print(f"in more than one split: {texts:,} texts, {ids:,} ids, {whole:,} whole rows "
          f"({known} of them known)")
    return found
