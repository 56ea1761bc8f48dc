"""What a run leaves for people: curves, metrics.json and predictions.csv, and several seeds in a table beside
the release's figures."""
import csv
import io
import json
import unicodedata
from pathlib import Path

import numpy as np

from data import HERE, TASKS, Split, family_words
from extras.files import write_atomic

def aligned(lines) -> str:
    """Lines of cells as text in columns, flush right."""
    def width(cell):                    # in a terminal, where a Chinese character takes two columns
        return sum(2 if unicodedata.east_asian_width(c) in "WF" else 1 for c in str(cell))

    widths, text = [max(map(width, column)) for column in zip(*lines, strict=True)], []
    for line in lines:
        cells = [" " * (n - width(cell)) + str(cell) for n, cell in zip(widths, line)]
        text.append("  ".join(cells).rstrip())
    return "\n".join(text)

def curves(log: list, metric: str, best_epoch: int) -> str:
    """Loss, learning rate and validation score by epoch as an SVG picture, for light and dark pages."""
    picture = ('<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 840 200" font-family="sans-serif" '
               'font-size="12" fill="#777">\n')
    titles = {"loss": "training loss", "learning_rate": "learning rate at the epoch's end",
              f"valid_{metric}": f"valid {metric}, best: epoch {best_epoch}".replace("_", " ")}
    for i, (key, title) in enumerate(titles.items()):
        values = np.array([entry[key] for entry in log])
        low, high = values.min(), values.max()
        x = np.linspace(0, 200, len(log))
        y = 160 - 120 * (values - low) / (high - low or 1)
        line = " ".join(f"{a:.1f},{b:.1f}" for a, b in zip(x, y))
        best = f'cx="{x[best_epoch - 1]:.1f}" cy="{y[best_epoch - 1]:.1f}"'
        picture += (f'<g transform="translate({60 + 280 * i})"><text y="20">{title}</text>\n'
                    f'<text x="-54" y="44">{high:.3g}</text> <text x="-54" y="164">{low:.3g}</text> '
                    f'<text y="182">epoch 1 to {len(log)}</text> <path d="M0 36V164H204" stroke="#777" '
                    f'fill="none"/>\n<polyline points="{line}" stroke="#28d" fill="none"/> '
                    f'<circle {best} r="4" fill="#c50"/></g>\n')
    return picture + "</svg>\n"

# The method of the paper on all rows; what is trained otherwise is not compared with the release's figures.
METHOD = {"no_mixer": False, "no_fusion": False, "modality": "both", "independent_tokens": False,
          "train_share": 1.0, "valid_share": 0.0}

def summarize(records: list[dict], out: Path):
    """Write results.csv, a row per seed; print several with mean, std, worst and the release's figure."""
    columns, text = [name for name in records[0] if name != "line"], io.StringIO()
    writer = csv.DictWriter(text, columns, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows(records)
    write_atomic(out / "results.csv", text.getvalue().encode())
    if len(records) == 1:
        return
    names = [name[5:] for name in columns if name.startswith("test_") and name != "test_rows"]
    table = np.array([[record.get(f"test_{name}") for name in names] for record in records], float)
    lower = [name in ("mae", "unparsed") for name in names]             # where less is better
    rows = {record["seed"]: line for record, line in zip(records, table)}
    rows |= {"mean": table.mean(0), "std": table.std(0, ddof=1)}
    rows["worst"] = np.where(lower, table.max(0), table.min(0))
    print("seed".ljust(10) + "".join(name.rjust(13) for name in names))
    for label, values in rows.items():
        print(f"{label!s:10}" + "".join(f"{v:13.4f}" for v in values))
    task, published = TASKS[records[0]["data"]], recorded(records[0]["family"], records[0]["data"])
    if records[0]["test_rows"] != task.rows.get("test", records[0]["test_rows"]):
        return                                      # other data have nothing to compare with
    if any(records[0].get(name, value) != value for name, value in METHOD.items()):
        return
    note = published.pop("note", None)
    for name, (mean, std) in published.items():
        line = f"{name}: the release recorded {mean:.4f}"
        ours = table[:, names.index(name)].mean()
        if std is None:
            print(f"{line}; here {ours:.4f}")
        else:
            away = (ours - mean) / std
            print(f"{line} +- {std:.4f}; here {ours:.4f}, {away:+.1f} of its standard deviations")
    if note:
        print(f"note: {note}")

def recorded(family: str, task: str) -> dict:
    """What the release recorded of a pair, {metric: [mean, std over five seeds or null]}, and a note."""
    figures = json.loads((HERE / "docs" / "release.json").read_text(encoding="utf-8"))
    return figures.get(f"{family_words(family).name} {task}", {})

def write_results(folder, split: Split, results: dict, ending: str = ""):
    """Write metrics.json and predictions.csv into a folder; `ending` goes behind both names."""
    def plain(numbers):                                         # JSON knows no nan
        return {name: x if np.isfinite(x).all() else None for name, x in numbers.items()}

    report = {"rows": len(split)}
    for decode, r in results.items():
        report[decode] = {"scores": plain(r.scores), "intervals": plain(r.intervals),
                          "unparsed": r.unparsed, "out_of_range": r.out_of_range}
        if not r.task.labels:
            report[decode]["bias"] = r.bias if np.isfinite(r.bias) else None
        if r.task.labels:
            columns = [column.tolist() for column in r.per_class()]
            rows = [dict(zip(("precision", "recall", "f1", "rows"), row)) for row in zip(*columns)]
            report[decode] |= {"confusion": r.counts().tolist(), "per_class": dict(zip(r.task.labels, rows))}
    text = json.dumps(report, indent=1, ensure_ascii=False)
    write_atomic(Path(folder) / f"metrics{ending}.json", text.encode())
    write_predictions(Path(folder) / f"predictions{ending}.csv", split, list(results.values()))

def write_predictions(path, split: Split, results: list):
    """One line per row: id, text, truth, the first result's answer, what it parsed as (empty if it did not)
    and, if a result has probabilities, that of each class, or an intensity's mean and standard deviation."""
    first = results[0]
    parsed = ["" if value is None else f"{value:.6g}" for value in first.values]
    head = ["id", "text", "truth", "answer", "parsed"]
    columns = [split.id, split.text, split.label, first.answers, parsed]
    scored = [r for r in results if r.probabilities is not None]
    if scored:                          # several readouts are of the same probabilities
        r = scored[0]
        head += [f"p({name})" for name in r.task.labels] or ["mean", "std"]
        numbers = r.probabilities.T if r.task.labels else r.moments()
        columns += [map("{:.6f}".format, column) for column in numbers]
    file = io.StringIO()
    csv.writer(file).writerows([head, *zip(*columns)])
    write_atomic(path, file.getvalue().encode("utf-8-sig"))     # a byte order mark, for spreadsheets
