"""Tables: what a split scores, metrics.json and predictions.csv, several seeds beside the release's figures.

A Result (of eval.py) is passed in; nothing here needs its class.
"""
import csv
import io
import json
import math
import unicodedata
from pathlib import Path

import numpy as np

from data import HERE, TASKS, Split, family_words
from support.files import UserError, json_bytes, read_json, write_atomic


def aligned(lines) -> str:
    """Lines of cells as text in columns, flush right.

    [["", "joy"], ["true", 12]] -> "      joy\\ntrue   12"
    """
    columns = []
    for cells in zip(*lines, strict=True):
        cells = [str(cell) for cell in cells]
        widest = max(map(width, cells))
        columns.append([" " * (widest - width(cell)) + cell for cell in cells])
    return "\n".join("  ".join(line).rstrip() for line in zip(*columns))


def width(cell: str) -> int:
    """In a terminal, where a Chinese character takes two columns."""
    wide = [c for c in cell if unicodedata.east_asian_width(c) in "WF"]
    return len(cell) + len(wide)


# --- What a split scores ------------------------------------------------------------------------------------
WHY_NAN = {"corr": "predictions or true values are constant or no numbers",
           "r2": "true values are constant, or a prediction is no number",
           "mae": "a prediction is no number", "weak_acc2": "no true value within 0.4 of 0",
           "non0_acc2": "no true value but 0", "non0_f1": "no true value but 0"}
# Equal where classes have one size.
TWINS = {"macro_f1": "weighted_f1", "unweighted_accuracy": "accuracy"}


def in_words(scores: dict) -> str:
    """{"weighted_f1": 0.5, "mae": nan} -> "weighted f1 0.5000, mae nan (a prediction is no number)". What
    classes of one size have twice is said once."""
    words = []
    for name, value in scores.items():
        if name in TWINS and f"{value:.4f}" == f"{scores[TWINS[name]]:.4f}":
            continue
        text = f"{name.replace('_', ' ')} {value:.4f}"
        if np.isnan(value):
            text += f" ({WHY_NAN.get(name, 'no rows')})"
        words.append(text)
    return ", ".join(words)


def in_names(task, values: list) -> list:
    """Labels and parsed answers as people read them: 4 -> "joy", 0.5 -> "+0.5", None -> "no answer"."""
    names = []
    for value in values:
        if value is None:
            names.append("no answer")
        elif not task.labels:
            low, high = task.range
            beyond = "" if low <= value <= high else ", out of range"
            names.append(f"{value:+.1f}{beyond}")
        elif value in task.values():
            names.append(task.labels[int(value)])
        else:
            names.append(f"{value:g}, no class")
    return names


def side_by_side(results: dict) -> str:
    """{way of decoding: Result} -> a line per score, a column per way, each score with its 95 % interval."""
    columns = []
    for way, result in results.items():
        column = {"": f"{way} [95 % interval]"}         # the row's name: its cell
        for name, score in result.scores.items():
            low, high = result.intervals[name]
            column[name] = f"{score:.4f} [{low:.4f}, {high:.4f}]"
        if not result.task.labels:
            column["bias"] = f"{result.bias:+.4f}"
        for name in ("unparsed", "out_of_range"):
            column[name] = f"{getattr(result, name)}/{len(result.true)}"
        columns.append(column.values())
    names = [name.replace("_", " ") for name in column]         # each column's are the same
    return aligned(zip(names, *columns))


def truth_table(names: list, counts: np.ndarray, per_class=()) -> str:
    """Truth by prediction of (n, n + 1) counts, the last column for no class. per_class: precision, recall,
    F1 and more of each class, of which the first three are shown."""
    lines = [["true \\ pred", *names, "none"]]
    for name, row in zip(names, counts):
        lines.append([name, *row])
    if per_class:
        lines[0] += ["precision", "recall", "f1"]
        for line, *scores in zip(lines[1:], *per_class[:3]):
            line += [f"{score:.4f}" for score in scores]
    return aligned(lines)


# --- Files --------------------------------------------------------------------------------------------------
def write_results(folder, split: Split, results: dict, ending: str = ""):
    """Write metrics.json and predictions.csv into a folder; `ending` goes behind both names."""
    report = {"rows": len(split)}
    for way, result in results.items():
        part = {"scores": result.scores, "intervals": result.intervals,
                "unparsed": result.unparsed, "out_of_range": result.out_of_range}
        if result.task.labels:
            part["confusion"] = result.counts().tolist()
            part["per_class"] = {}
            columns = [column.tolist() for column in result.per_class()]
            for name, *row in zip(result.task.labels, *columns):
                part["per_class"][name] = dict(zip(("precision", "recall", "f1", "rows"), row))
        else:
            part["bias"] = result.bias
        report[way] = part
    write_atomic(Path(folder) / f"metrics{ending}.json", json_bytes(report, indent=1))
    write_predictions(Path(folder) / f"predictions{ending}.csv", split, list(results.values()))


def write_predictions(path, split: Split, results: list):
    """One line per row: id, text, truth, the first result's answer, what it parsed as (empty if it did not)
    and, if a result has probabilities, that of each class, or an intensity's mean and standard deviation."""
    first = results[0]
    parsed = ["" if value is None else f"{value:.6g}" for value in first.values]
    head = ["id", "text", "truth", "answer", "parsed"]
    columns = [map(harmless, split.id), map(harmless, split.text), split.label, map(harmless, first.answers),
               parsed]
    scored = [result for result in results if result.probabilities is not None]
    if scored:                          # several readouts are of the same probabilities
        numbers = scored[0].probabilities.T
        head += [f"p({name})" for name in first.task.labels]
        if not first.task.labels:
            numbers = scored[0].moments()
            head += ["mean", "std"]
        columns += [map("{:.6f}".format, column) for column in numbers]
    file = io.StringIO()
    csv.writer(file).writerows([head, *zip(*columns)])
    write_atomic(path, file.getvalue().encode("utf-8-sig"))     # a byte order mark, for spreadsheets


def harmless(text: str) -> str:
    """A cell that a spreadsheet would run as a formula begins with an apostrophe; numbers stay numbers."""
    if not text.startswith(("=", "+", "-", "@", "\t", "\r")):
        return text
    try:
        is_number = math.isfinite(float(text))
    except ValueError:
        is_number = False
    return text if is_number else "'" + text


# --- Several seeds ------------------------------------------------------------------------------------------
def read_record(file: Path) -> dict:
    """What a results.json holds: see `test` in train.py. Raises UserError if it is anything else."""
    kinds = {"seed": int, "family": str, "data": str, "line": str, "changed": list, "test_rows": int}
    record = read_json(file, kinds)
    whole = True
    for name, value in record.items():
        kind = kinds.get(name, str | int | float | None)
        if name.startswith(("test_", "valid_")):
            kind = int | float | None       # None: it was not defined
        whole = whole and isinstance(value, kind)
        if isinstance(value, (int, float)):
            whole = whole and abs(value) < 1e300        # nan, too, is damage
    if not whole:
        raise UserError(f"{file}: damaged; train again with --overwrite")
    if record["data"] not in TASKS:
        raise UserError(f"{file}: the task {record['data']!r:.80} is not in TASKS of data.py; add its entry "
                        "again")
    return record


def finished(out: Path) -> list:
    """The records of all seeds that are finished in OUT, of other processes, too."""
    files = sorted(out.glob("[0-9]*/results.json"), key=lambda file: file.parent.name.zfill(10))
    return [read_record(file) for file in files]


def write_table(out: Path):
    """results.csv: a row for each finished seed in OUT, as results.json has it."""
    records = None
    now = finished(out)
    while records != now:                   # another process may have finished one meanwhile
        records = now
        names = [name for name in records[0] if name != "line"]
        text = io.StringIO()
        writer = csv.DictWriter(text, names, extrasaction="ignore", lineterminator="\n")
        writer.writeheader()
        for record in records:
            changed = " ".join(map(str, record["changed"]))
            writer.writerow(record | {"changed": changed})
        write_atomic(out / "results.csv", text.getvalue().encode())
        now = finished(out)


def summarize(records: list):
    """Print several seeds with mean, std, worst and the release's figures.

    A record's "changed" lists the settings that differ from the release's method: where there are some, or
    other test rows than the published ones, nothing compares with its figures.
    """
    scores = {}                         # name: an array with a number per seed
    for name in records[0]:
        if name.startswith("test_") and name != "test_rows":
            values = [record.get(name) for record in records]
            scores[name.removeprefix("test_")] = np.array(values, float)
    columns = [["seed", *[record["seed"] for record in records], "mean", "std", "worst"]]
    for name, x in scores.items():
        less_is_better = name in ("mae", "unparsed")
        worst = x.max() if less_is_better else x.min()
        columns.append([name, *[f"{value:.4f}" for value in (*x, x.mean(), x.std(ddof=1), worst)]])
    print(aligned(zip(*columns)))
    first = records[0]
    rows = TASKS[first["data"]].rows.get("test", first["test_rows"])
    if first["test_rows"] == rows and not first.get("changed"):
        backbone = family_words(first["family"]).backbone
        compare_with_release(scores, recorded(first["family"], first["data"]), backbone)


def compare_with_release(scores: dict, published: dict, backbone: str):
    """Print each figure that the release recorded with its backbone beside the mean over the seeds here."""
    note = published.pop("note", None)
    for name, (mean, std) in published.items():
        here = scores[name].mean()
        if std is None:
            print(f"{name}: the release recorded {mean:.4f} with {backbone}; here {here:.4f}")
        else:
            away = (here - mean) / std
            print(f"{name}: the release recorded {mean:.4f} +- {std:.4f} with {backbone}; here {here:.4f}, "
                  f"{away:+.1f} of its standard deviations")
    if note:
        print(f"note: {note}")


# What a record holds beside the settings, and what begins with valid_ or test_.
OUTCOMES = ("changed", "line", "best_epoch", "ran_epochs", "seconds", "gpu_gib", "torch")


def comparison(runs: dict) -> str:
    """{a run's folder: its record} -> the runs by their validation score, with the settings in which they
    differ; then what they scored on the test split. Raises UserError for runs of several data sets."""
    data = sorted({record["data"] for record in runs.values()})
    if len(data) > 1:
        raise UserError(f"runs of {' and '.join(data)}; compare those of one data set")
    task = TASKS[data[0]]
    select = f"valid_{task.select}"

    def score(folder) -> float:         # the best is the least
        value = runs[folder].get(select)
        if value is None:
            return math.inf
        return -value if task.labels else value

    settings, tests = [], []            # by name
    for record in runs.values():
        for name, value in record.items():
            if name.startswith("test_") and name not in tests:
                tests.append(name)
            other = any(value != another.get(name) for another in runs.values())
            outcome = name in OUTCOMES or name.startswith(("test_", "valid_"))
            if other and not outcome and name not in settings:
                settings.append(name)
    chosen = [[select.replace("_", " "), *settings, "run"]]
    tested = [[*[name.removeprefix("test_") for name in tests], "run"]]
    for folder in sorted(runs, key=score):
        record = runs[folder]
        chosen.append([cell(record.get(select)), *[cell(record.get(name)) for name in settings], folder])
        tested.append([*[cell(record.get(name)) for name in tests], folder])
    return (f"{aligned(chosen)}\n\nThe test split, not to choose by: whoever does reports a score that is "
            f"too good\n{aligned(tested)}")


def cell(value) -> str:
    """A number in few digits, a gap for what is not known."""
    if value is None:
        return "-"
    if not isinstance(value, float):
        return f"{value}"
    if 0 < value < 0.01:                # a learning rate, 5e-05
        return f"{value:.4g}"
    return f"{value:.4f}"


def recorded(family: str, task: str) -> dict:
    """What the release recorded of a pair, {metric: [mean, std over five seeds or null]}, and a note."""
    figures = json.loads((HERE / "docs" / "release.json").read_text(encoding="utf-8"))
    return figures.get(f"{family_words(family).name} {task}", {})
