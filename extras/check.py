"""The check of a data set: what it holds, in words, and its problems; python data.py NAME calls it."""
import hashlib
import math
from collections import Counter, defaultdict

import numpy as np

def check_task(task, family: str = "llama"):
    """Raise ValueError for an entry of TASKS with which no run could go on to its end."""
    if bool(task.labels) == (len(task.range) == 2):
        raise ValueError(f"task {task.name}: labels {task.labels!r:.80}, range {task.range!r:.80}; expected "
                         "one of the two in TASKS: class names, or the least and the largest intensity")
    try:
        task.wording(family)
    except KeyError as error:
        raise ValueError(f"task {task.name}: data.py has no words for {error}; add this language to TAG, and "
                         "to prompts and lead of each family") from None

def check(task, files: dict, splits: dict, problems: dict, tokenizer=None, shown: int = 10) -> int:
    """Print what a data set holds, then its problems by row, some of each kind; returns their number.

    By split: the file, a data.Split, and what data.problems finds: (row, field, what it has, unusable?).
    """
    usable, found, published = {}, defaultdict(list), False
    for split, data in splits.items():
        print(f"{split}: {beside(len(data), task.rows.get(split))} rows in {files[split]}")
        if task.sha256 and not usable:                  # the published files have odd values and doubles
            published = hashlib.sha256(np.memmap(files[split], mode="r")).hexdigest() == task.sha256
            print(f"  sha256   {'as published' if published else 'not the published one: another version'}")
        bad = {row for row, _, _, unusable in problems[split] if unusable}
        for row, name, has, unusable in problems[split]:
            if unusable or not published:
                found[split, name].append((row, has))
        usable[split] = [row for row in range(len(data)) if row not in bad]
        if usable[split]:
            describe(task, data, usable[split], tokenizer)
    for split, row, has in compare(task, splits, usable):
        if not published:
            found[split, "double"].append((row, has))
    for (split, name), listed in found.items():
        for row, has in listed[:shown]:
            print(f"problem: {split} row {row} has {has}")
        if len(listed) > shown:
            print(f"problem: {len(listed) - shown:,} more such rows of {split} ({name})")
    n = sum(map(len, found.values()))
    print(f"{task.name}: {n:,} problems{', rows counted from 0' if n else ''}")
    return n

def beside(found, published) -> str:
    note = "as published" if found == published else f"published: {published}"
    return f"{found} ({note})" if published else f"{found}"

def describe(task, data, rows: list, tokenizer):
    """Print what these rows hold: texts, features, labels."""
    texts, cut = [data.text[row] for row in rows], ""
    sizes = [len(text) for text in texts]
    if tokenizer is not None:
        n = sum(len(tokenizer.encode(text)) > task.text_len for text in texts)
        cut = f"; {n} ({n / len(rows):.1%}) have more than {task.text_len} tokens and will be cut"
    print(f"  text     {min(sizes)} to {max(sizes)} characters, {sizes.count(0)} empty{cut}")
    for kind in ("audio", "video"):
        lengths, figures = [getattr(data, f"{kind}_len")[row] for row in rows], []
        for row in rows:
            x = data.frames(kind, row).astype(float)
            low, high = x.min(initial=math.inf), x.max(initial=-math.inf)
            figures.append((low, high, x.size, x.sum(), (x * x).sum()))
        low, high, n, total, squares = np.array(figures).T
        shapes = sorted({getattr(data, kind)[row].shape for row in rows})
        shape = f"{shapes[0]}" if len(shapes) == 1 else f"{shapes[0]} to {shapes[-1]}"
        width = getattr(task, f"{kind}_dim")            # 0: nothing is published
        published = f"({getattr(task, f'{kind}_len')}, {width})" if width else ""
        dtypes = ", ".join(sorted({str(getattr(data, kind)[row].dtype) for row in rows}))
        zero = np.sum((n > 0) & (squares == 0))
        print(f"  {kind:8} {beside(shape, published)}, {dtypes}; lengths {min(lengths)} to {max(lengths)}; "
              f"missing in {lengths.count(0)} rows, all zero in {zero}")
        if zero == np.sum(n > 0) > 0:
            print(f"  remark   {kind} is zero in every row that has it")
        if n.any():
            mean = total.sum() / n.sum()
            std = math.sqrt(max(0, squares.sum() / n.sum() - mean ** 2))
            print(f"           {low.min():.3g} to {high.max():.3g}, mean {mean:.3g}, std {std:.3g}")
    for has, n in data.told.items():
        print(f"  remark   {n} rows have {has}")
    print(f"  unused   {', '.join(data.unused) or 'nothing else is in the file'}")
    labels, names = [task.number(data.label[row]) for row in rows], task.labels
    if not names:                       # a bar for each step in the range of an intensity
        marks = task.marks()
        step, names = marks[1] - marks[0], [f"{mark:+.1f}" for mark in marks]
        labels = [round(y / step) - round(marks[0] / step) for y in labels]
    for i, name in enumerate(names):
        share = labels.count(i) / len(rows)
        print(f"  {name:8} {labels.count(i):6,} {share:6.1%} {'#' * round(60 * share)}".rstrip())

def compare(task, splits: dict, usable: dict) -> list:
    """The rows that are in two splits: (split, row, what it has). Texts and ids in two are only counted."""
    texts, ids, first, doubles, known = Counter(), Counter(), {}, [], 0
    for split, data in splits.items():
        rows = usable[split]
        texts.update({data.text[row] for row in rows})
        ids.update({data.id[row] for row in rows if data.id[row] != str(row)})      # ids of their own
        for row in rows:
            text, features = data.text[row], [data.frames(kind, row) for kind in ("audio", "video")]
            content = hash((text, data.label[row], *(x.tobytes() for x in features)))
            before, twin = first.setdefault(content, (split, row))
            if before == split or not any(x.any() for x in features):       # without features: only a text
                continue
            known += text in task.twins
            if text not in task.twins:
                doubles.append((split, row, f"text, label and features of {before} row {twin}"))
    texts, ids = sum(n > 1 for n in texts.values()), sum(n > 1 for n in ids.values())
    print(f"in more than one split: {texts:,} texts, {ids:,} ids, {len(doubles) + known:,} whole rows "
          f"({known} of them known)")
    return doubles

