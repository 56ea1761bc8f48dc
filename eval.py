"""What a trained adapter answers, what that scores, and what the modalities are worth.

    python eval.py RUN                      score a run's test split: greedy answers, the paper's, and label scoring
    python eval.py RUN --ablate             drop or shuffle audio and video, empty the text
    python eval.py RUN --text "Oh, great." --audio a.npy --video v.npy      one clip; --json for programs
    python eval.py RUN --ask "Once upon"    the frozen backbone's plain text
    python eval.py RUN --check-backbone     its logits with and without the adapter, bit by bit

    parse_answer, METRICS, bootstrap        text -> number -> every task's scores, with intervals
    evaluate, label_logprobs, score         a split's answers, the labels' probabilities, what they score
    write_results                           metrics.json and predictions.csv
    ablate, clip, check_backbone            the other commands
"""
import argparse
import csv
import io
import json
import re
import sys
import unicodedata
from collections import Counter
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

from adapter import MultimodalLLM, load_adapter
from data import FEATURES, HERE, TASKS, Split, Task, clean, collate, find_llm, load_split, load_tokenizer
from model import load_llm, write_atomic

# ----------------------------------------------------------------------------------------------------------------------
# Answers: the LLM's text -> a number, or None

CLASS, INTENSITY = re.compile(r"[0-9]+"), re.compile(r"[+-]?[0-9]+(\.[0-9]+)?")   # [0-9], as \d would take "٣"
OFFICIAL = str.maketrans("–一", "--", "：:/(")             # as the release's Textmodel.py: two become "-", four go


def parse_answer(text: str, task, official: bool = False) -> float | None:
    """The number that an answer is, in the task's range or not; None where it is anything but one plain number.

    Classes: digits only. Intensities: sign if any, digits, fraction if any ("+0.4", "-1"; not ".5", not "1e0").
    official: the release's rule, a bare float(), for intensities after its replacements, and 0.0 where that fails.
    """
    if official:
        try:
            return float(text if task.labels else text.translate(OFFICIAL))
        except ValueError:
            return 0.0
    text = text.strip()
    return float(text) if (CLASS if task.labels else INTENSITY).fullmatch(text) else None


def in_range(value: float, task) -> bool:
    """Whether a parsed answer is one of the task's classes, or an intensity within its range."""
    return value in range(len(task.labels)) if task.labels else task.range[0] <= value <= task.range[1]


# ----------------------------------------------------------------------------------------------------------------------
# Metrics: (pred, true) -> {name: value}. A prediction that is None, nan or no class at all is wrong in every class.

class Undefined(float):
    """A nan that knows why: Undefined("predictions are constant").why"""
    def __new__(cls, why: str):
        value = super().__new__(cls, "nan")
        value.why = why
        return value


def reasons(scores: dict[str, float]) -> dict[str, str]:
    """{name: why it is nan} of the scores that are undefined."""
    return {name: score.why for name, score in scores.items() if isinstance(score, Undefined)}


def confusion(pred, true, n: int) -> np.ndarray:
    """(n, n + 1) counts: row the true class, column the predicted one, the last column the answers that are none."""
    pred, true = np.asarray(pred, float), np.asarray(true, int)
    assert pred.shape == true.shape, f"{pred.shape} predictions for {true.shape} true classes"
    assert not true.size or 0 <= true.min() <= true.max() < n, f"a true class is not one of 0..{n - 1}"
    column = np.where(np.isin(pred, np.arange(n)), pred, n).astype(int)
    return np.bincount(true * (n + 1) + column, minlength=n * (n + 1)).reshape(n, n + 1)


def per_class(pred, true, n: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """(precision, recall, F1, support) of each class 0..n-1: hits / predicted, hits / true,
    2 hits / (predicted + true), true; 0 where that divides by nothing, as in scikit-learn."""
    counts = confusion(pred, true, n)
    hits, predicted, support = counts.diagonal(), counts[:, :n].sum(0), counts.sum(1)
    precision, recall = hits / np.maximum(predicted, 1), hits / np.maximum(support, 1)
    return precision, recall, 2 * hits / np.maximum(predicted + support, 1), support


def _accuracy_f1(pred, true, empty: str = "no rows") -> tuple[float, float]:
    if not len(true):
        return Undefined(empty), Undefined(empty)
    _, _, f1, support = per_class(pred, true, int(np.max(true)) + 1)    # classes above that are never true: weight 0
    return float(np.mean(np.asarray(pred, float) == true)), float(f1 @ support / len(true))


def _mae_corr_r2(pred: np.ndarray, true: np.ndarray) -> tuple[float, float, float]:
    """Each one, or the first of its reasons that holds (a nan is truthy, so `or` keeps it)."""
    def undefined(*reasons):
        return next((Undefined(why) for holds, why in reasons if holds), None)
    unread = (not len(true), "no rows"), (np.isnan(pred).any(), "a prediction is no number")
    infinite = np.isinf(pred).any(), "a prediction is infinite"
    constant = (len(true) == 1, "only one row"), ((true == true[:1]).all(), "true values are constant")
    same = (pred == pred[:1]).all(), "predictions are constant"
    mae = undefined(*unread) or float(np.abs(pred - true).mean())
    corr = undefined(*unread, infinite, *constant, same) or float(np.corrcoef(pred, true)[0, 1])
    r2 = undefined(*unread, *constant) or float(1 - ((true - pred) ** 2).mean() / true.var())
    return mae, corr, r2


def _intensities(pred, true) -> np.ndarray:
    """(2, rows), pred and true as float64 once rounded to float32, as the release compares; edges are rounded alike, so
    that a true 0.4 is on the edge 0.4 be it stored as float32, as float64 or as 0.4000000000000001."""
    both = np.array([pred, true], float)
    assert both.ndim == 2 and np.isfinite(both[1]).all(), f"{both.shape} intensities, or a true one is not finite"
    with np.errstate(over="ignore"):                                    # an answer of 1e300 becomes inf
        return both.astype(np.float32).astype(float)


def _bins(x: np.ndarray, edges: list[float], closed: str = "right") -> np.ndarray:
    """The bin of each value, 0..len(edges); a value on an edge is in the bin whose closed side it is; nan is in -1."""
    side = {"right": "left", "left": "right"}[closed]                   # searchsorted names where it would insert
    return np.where(np.isnan(x), -1, np.searchsorted(np.float32(edges), x, side))


def _whole(x: np.ndarray, top: int) -> np.ndarray:
    """Values clipped to [-top, top] and rounded half to even, as classes 0..2 top."""
    return np.round(np.clip(x, -top, top)) + top


def class_metrics(pred, true) -> dict[str, float]:
    """Emotion classes. accuracy: share of rows with pred = true; weighted_f1: mean of the classes' F1 by support."""
    accuracy, weighted_f1 = _accuracy_f1(pred, true)
    return dict(accuracy=accuracy, weighted_f1=weighted_f1)


def mosei_metrics(pred, true) -> dict[str, float]:
    """CMU-MOSEI and CMU-MOSI, intensities -3..3. F1 is weighted by support, over the two bins of its acc2.

    has0_*: pred >= 0 against true >= 0, all rows; non0_*: pred > 0 against true > 0, rows with true != 0;
    acc5, acc7: equal after clipping to [-2, 2], [-3, 3] and rounding half to even;
    mae: mean |pred - true|; corr: Pearson's r, both unclipped (but `score` clips answers before, unless official).
    """
    both = _intensities(pred, true)
    has0_acc2, has0_f1 = _accuracy_f1(*_bins(both, [0], closed="left"))
    non0_acc2, non0_f1 = _accuracy_f1(*_bins(both[:, both[1] != 0], [0]), empty="no true value but 0")
    (acc5, _), (acc7, _) = (_accuracy_f1(*_whole(both, top)) for top in (2, 3))
    mae, corr, _ = _mae_corr_r2(*both)
    return dict(has0_acc2=has0_acc2, has0_f1=has0_f1, non0_acc2=non0_acc2, non0_f1=non0_f1,
                acc5=acc5, acc7=acc7, mae=mae, corr=corr)


SIMS_EDGES = [-0.7, -0.1, 0.1, 0.7]


def simsv2_metrics(pred, true) -> dict[str, float]:
    """CH-SIMS v2, intensities -1..1: both sides are clipped to that first, for mae, corr and r2 too; bins closed right.

    acc2, f1: cut at 0, with 0 negative, F1 weighted by support; weak_acc2: acc2 of the rows with |true| <= 0.4;
    acc3: cut at -0.1, 0.1; acc5: cut at -0.7, -0.1, 0.1, 0.7;
    mae: mean |pred - true|; corr: Pearson's r; r2: 1 - mean (true - pred)^2 / variance of true.
    """
    both = np.clip(_intensities(pred, true), -1, 1)
    weak = both[:, np.abs(both[1]) <= np.float32(0.4)]
    acc2, f1 = _accuracy_f1(*_bins(both, [0]))
    weak_acc2, _ = _accuracy_f1(*_bins(weak, [0]), empty="no true value within 0.4 of 0")
    (acc3, _), (acc5, _) = (_accuracy_f1(*_bins(both, edges)) for edges in (SIMS_EDGES[1:3], SIMS_EDGES))
    mae, corr, r2 = _mae_corr_r2(*both)
    return dict(acc2=acc2, f1=f1, weak_acc2=weak_acc2, acc3=acc3, acc5=acc5, mae=mae, corr=corr, r2=r2)


METRICS = {"meld": class_metrics, "cherma": class_metrics, "demo": class_metrics,
           "mosei": mosei_metrics, "mosi": mosei_metrics, "simsv2": simsv2_metrics}


def bootstrap(metric, pred, true, seed: int = 0, draws: int = 1000) -> dict[str, tuple[float, float]]:
    """{name: (low, high)}: the 95 % percentile interval of each score of `metric`, over `draws` resamplings of the rows
    with replacement; a draw in which a score is nan does not count for that score. `pred` may be (rows, k): a metric
    that compares k systems gets the same rows of each."""
    pred, true, rng = np.asarray(pred, float), np.asarray(true), np.random.default_rng(seed)
    assert len(pred) == len(true), f"{len(pred)} predictions for {len(true)} true values"
    rows = (rng.integers(len(true), size=len(true)) for _ in range(draws))
    scores = [metric(pred[r], true[r]) for r in rows]
    intervals = {}
    for name in scores[0]:
        values = np.sort([s[name] for s in scores if not np.isnan(s[name])])
        out = len(values) // 40                                         # so many draws, 2.5 %, lie beyond each end
        intervals[name] = (float(values[out]), float(values[-1 - out])) if len(values) else (np.nan, np.nan)
    return intervals


# ---------------------------------------------------------------------------------------------------------------------
# Tables as text

def _width(text) -> int:
    """Columns in a terminal, where a Chinese character takes two."""
    return sum(1 + (unicodedata.east_asian_width(c) in "WF") for c in str(text))


def aligned(lines) -> str:
    """Lines of cells as text in columns, flush right."""
    widths = [max(map(_width, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(" " * (width - _width(cell)) + str(cell) for cell, width in zip(line, widths)).rstrip()
                     for line in lines)


def confusion_table(matrix: np.ndarray, names) -> str:
    """The counts of `confusion` with the classes' names, a line per true class; "none": answers that are no class."""
    return aligned([["true \\ pred", *names, "none"]] + [[name, *row] for name, row in zip(names, matrix, strict=True)])


def intensity_table(pred, true, lo: float, hi: float) -> str:
    """Truth by prediction: clipped and rounded to whole numbers for -3..3, the five classes of CH-SIMS for -1..1."""
    both = _intensities(pred, true)
    if hi > 1:
        bins, names = _whole(both, int(hi)), range(int(lo), int(hi) + 1)
    else:
        bins, names = _bins(both, SIMS_EDGES), ["[-1,-.7]", "(-.7,-.1]", "(-.1,.1]", "(.1,.7]", "(.7,1]"]
    return confusion_table(confusion(*bins, len(names)), names)


# ---------------------------------------------------------------------------------------------------------------------
# Evaluation

DECODE = ("greedy", "labels")           # what the LLM writes, as in the paper, or the legal labels' probabilities
READOUT = ("mean", "mode")              # of those probabilities, for intensities; a class is always the most probable


@dataclass
class Result:
    """A split's answers and what they score."""
    task: Task
    true: list
    answers: list                   # texts, in the split's order
    values: list                    # numbers as parsed, None where an answer did not parse
    pred: np.ndarray                # numbers as scored
    unparsed: int = 0
    out_of_range: int = 0
    probabilities: np.ndarray | None = None     # (rows, labels), if labels were scored

    @cached_property
    def scores(self) -> dict[str, float]:
        return METRICS[self.task.name](self.pred, np.array(self.true))

    @cached_property
    def intervals(self) -> dict[str, tuple[float, float]]:
        return bootstrap(METRICS[self.task.name], self.pred, self.true)

    def line(self) -> str:
        why, n = reasons(self.scores), len(self.true)
        scores = [f"{name.replace('_', ' ')} {value:.4f}" + (f" ({why[name]})" if name in why else "")
                  for name, value in self.scores.items()]
        return f"{', '.join(scores)}, unparsed {self.unparsed}/{n}, out of range {self.out_of_range}/{n}"

    def tables(self) -> str:
        """Classes: each one's precision, recall and F1, and the confusion matrix; intensities: truth by prediction."""
        names = self.task.labels
        if not names:
            return intensity_table(self.values, self.true, *self.task.range)
        columns = zip(names, *per_class(self.pred, self.true, len(names)))
        lines = [[name, f"{p:.4f}", f"{r:.4f}", f"{f1:.4f}", support] for name, p, r, f1, support in columns]
        return (aligned([["", "precision", "recall", "f1", "rows"], *lines]) + "\n\n"
                + confusion_table(confusion(self.values, self.true, len(names)), names))


def score(answers: list, true: list, task: Task, official: bool = False) -> Result:
    """Parse and score. A class answer that did not parse or is no class is wrong; an intensity that did not parse is
    taken for 0, one out of range for the range's end. official=True: every number as it reads, 0 where none does."""
    values = [parse_answer(text, task, official) for text in answers]
    unparsed = sum(parse_answer(text, task) is None for text in answers)
    out = sum(v is not None and not in_range(v, task) for v in values)
    pred = np.array([(-1.0 if task.labels else 0.0) if v is None else v for v in values])
    if not official and not task.labels:
        pred = pred.clip(*task.range)
    return Result(task, true, answers, values, pred, unparsed, out)


def score_labels(probabilities: np.ndarray, true: list, task: Task, readout: str = "mean") -> Result:
    """Score what the probabilities (rows, labels) say: the most probable class; an intensity's mean, or its mode."""
    mode = np.array(task.values())[probabilities.argmax(axis=1)]
    pred = moments(probabilities, task)[0] if readout == "mean" and not task.labels else mode
    return Result(task, true, [str(x) for x in mode], pred.tolist(), pred, probabilities=probabilities)


def moments(probabilities: np.ndarray, task: Task) -> np.ndarray:
    """Mean and standard deviation of each row's intensity, (2, rows)."""
    labels = np.array(task.values())
    mean = probabilities @ labels
    return np.stack((mean, np.sqrt(np.maximum(probabilities @ labels**2 - mean**2, 0))))


@torch.no_grad()
def label_logprobs(net: MultimodalLLM, batch):
    """Log-probabilities (B, labels) of the task's legal labels behind each row, normalised over them.

    Each row is read once. Labels that differ in their last token alone ("-0.1", "-0.2") share a stem, which is read
    behind the rows; what stands there says how probable each of its tokens, and each last one, is.
    """
    x, real, _ = net.rows(batch)
    cache = net.beginning().copy()
    end = net.llm(x, real, cache, last=1)                                                     # (B, 1, C)
    cache.frozen = True
    stems = {}
    for k, label in enumerate(net.labels):
        stems.setdefault(tuple(label[:-1]), []).append(k)
    scores = torch.zeros(len(x), len(net.labels), device=x.device)
    for stem, labels in stems.items():
        hidden = end
        if stem:
            behind = net.llm.embed(net.tensor([stem])).expand(len(x), -1, -1)
            sees = F.pad(real, (0, len(stem)), value=True)
            hidden = torch.cat((end, net.llm(behind, sees, cache)), dim=1)                    # (B, stem + 1, C)
        after = net.llm.logits(hidden).log_softmax(dim=-1)                                    # (B, stem + 1, V)
        path = sum(after[:, i, token] for i, token in enumerate(stem))                        # (B,), or 0
        for k in labels:
            scores[:, k] = path + after[:, -1, net.labels[k][-1]]
    return scores.log_softmax(dim=-1)


def rows_by_length(net: MultimodalLLM, split: Split, size: int) -> list:
    """Row numbers of each batch, sorted by the tokens of their texts: rows of like length need little padding."""
    lengths = [len(net.tokenizer.encode(text)) for text in split.text]
    order = sorted(range(len(split)), key=lengths.__getitem__)
    return [order[i:i + size] for i in range(0, len(order), size)]


def evaluate(net: MultimodalLLM, split: Split, size: int, name: str = "", decode: str = "greedy",
             readout: str = "mean") -> Result:
    """Answer and score a split, `size` rows at a time."""
    outputs = [None] * len(split)
    for rows in tqdm(rows_by_length(net, split, size), name, leave=False, disable=None):
        batch = collate(split, rows)
        for row, output in zip(rows, net.answer(batch) if decode == "greedy" else label_logprobs(net, batch)):
            outputs[row] = output
    if decode == "greedy":
        return score(outputs, split.label, net.task, net.official)
    return score_labels(torch.stack(outputs).exp().double().cpu().numpy(), split.label, net.task, readout)


def collapsed(result: Result, labels: list, task: Task) -> str:
    """A warning if the answers hardly differ, with what their one value alone would score; or "".

    Classes: one of them, or what does not parse, is more than 95 % of the answers. Intensities: the predictions'
    standard deviation is below 5 % of the labels'.
    """
    if task.labels:
        value, count = Counter(result.values).most_common(1)[0]
        name = "unparsed" if value is None else task.labels[int(value)] if in_range(value, task) else value
        hardly, constant = count > 0.95 * len(labels), -1 if value is None else value
        found = f"{name!r} is {count} of {len(labels)} answers; that answer"
    else:
        spread, wanted, constant = result.pred.std(), np.std(labels), result.pred.mean()
        hardly = spread < 0.05 * wanted
        found = f"the predictions' standard deviation is {spread:.3g}, the labels' {wanted:.3g}; their mean"
    if not hardly:
        return ""
    alone = METRICS[task.name](np.full(len(labels), constant), np.array(labels))
    return f"looks collapsed: {found} alone scores " + ", ".join(
        f"{key.replace('_', ' ')} {v:.4f}" for key, v in alone.items())


def side_by_side(results: dict[str, Result]) -> str:
    """A line per score, a column per way of decoding, each score with its 95 % interval."""
    def cell(result, name):
        if name in (why := reasons(result.scores)):
            return f"nan: {why[name]}"
        return "{:.4f} [{:.4f}, {:.4f}]".format(result.scores[name], *result.intervals[name])

    lines = [["", *(f"{name} [95 % interval]" for name in results)]]
    for name in next(iter(results.values())).scores:
        lines.append([name.replace("_", " "), *(cell(result, name) for result in results.values())])
    lines.append(["unparsed", *(f"{r.unparsed}/{len(r.true)}" for r in results.values())])
    return aligned(lines)


def write_results(folder, split: Split, results: dict[str, Result], ending: str = ""):
    """Write metrics.json and predictions.csv into a folder; `ending` goes behind both names: metrics-valid.json."""
    def plain(scores):                                                  # JSON knows no nan
        return {name: [float(x) if np.isfinite(x) else None for x in np.atleast_1d(v)] for name, v in scores.items()}

    report = {"rows": len(split)}
    for decode, r in results.items():
        names = r.task.labels
        report[decode] = {
            "scores": {name: value for name, (value,) in plain(r.scores).items()}, "intervals": plain(r.intervals),
            "undefined": reasons(r.scores), "unparsed": r.unparsed, "out_of_range": r.out_of_range}
        if names:
            report[decode] |= {"confusion": confusion(r.values, r.true, len(names)).tolist(), "per_class": {
                name: dict(zip(("precision", "recall", "f1", "rows"), (x.item() for x in row)))
                for name, *row in zip(names, *per_class(r.pred, r.true, len(names)))}}
    write_atomic(Path(folder) / f"metrics{ending}.json", json.dumps(report, indent=1, ensure_ascii=False).encode())
    write_predictions(Path(folder) / f"predictions{ending}.csv", split, *results.values())


def write_predictions(path, split: Split, result: Result, *others: Result):
    """One line per row: id, text, truth, answer, what it parsed as (empty if it did not) and, if one of the results has
    probabilities, that of each class, or an intensity's mean and standard deviation."""
    head, extra = ["id", "text", "truth", "answer", "parsed"], [[]] * len(split)
    for r in (result, *others):
        if r.probabilities is not None:
            head += [f"p({name})" for name in r.task.labels] or ["mean", "std"]
            extra = r.probabilities if r.task.labels else moments(r.probabilities, r.task).T
    table = io.StringIO()
    writer = csv.writer(table)
    writer.writerow(head)
    for *row, value, numbers in zip(split.id, split.text, split.label, result.answers, result.values, extra):
        writer.writerow([*row, "" if value is None else f"{value:.6g}", *(f"{x:.6f}" for x in numbers)])
    write_atomic(path, table.getvalue().encode("utf-8-sig"))            # with a byte order mark, for spreadsheets


# ---------------------------------------------------------------------------------------------------------------------
# What the modalities are worth


def without(split: Split, *modalities: str) -> Split:
    """The split with these modalities ("audio", "video") missing: their length is 0 in every row."""
    return replace(split, **{f"{m}_len": [0] * len(split) for m in modalities})


def shuffled(split: Split, modality: str) -> Split:
    """The split with one modality's features moved to other rows."""
    order = np.random.RandomState(0).permutation(len(split))
    return replace(split, **{key: [getattr(split, key)[i] for i in order] for key in (modality, f"{modality}_len")})


def variants(split: Split) -> dict[str, Split]:
    return {
        "all": split, "without audio": without(split, "audio"), "without video": without(split, "video"),
        "without audio and video": without(split, "audio", "video"),
        "audio shuffled": shuffled(split, "audio"), "video shuffled": shuffled(split, "video"),
        "text empty": replace(split, text=[""] * len(split))}


def ablation(net: MultimodalLLM, split: Split, size: int, decode: str = "greedy", readout: str = "mean") -> list[str]:
    """One line per modality dropped from the same trained model, and for both."""
    return [f"test {name}: {evaluate(net, part, size, name, decode, readout).line()}"
            for name, part in variants(split).items() if name.startswith("without")]


def ablate(net: MultimodalLLM, split: Split, size: int, decode: str = "greedy", readout: str = "mean") -> str:
    """A table of all variants: the first score and the one that selects, and their differences to `all`."""
    results = {name: evaluate(net, part, size, name, decode, readout) for name, part in variants(split).items()}
    metric, everything = METRICS[net.task.name], results["all"]
    main = dict.fromkeys((next(iter(everything.scores)), net.task.select))

    def difference(pred, true):
        before, after = metric(pred[:, 0], true), metric(pred[:, 1], true)
        return {name: after[name] - before[name] for name in main}

    titles = [cell for name in main for cell in (name.replace("_", " "), "difference [95 % interval]")]
    lines = [["", *titles, "unparsed"]]
    for variant, result in results.items():
        both, cells = np.stack((everything.pred, result.pred), axis=1), []
        intervals = bootstrap(difference, both, result.true)
        for name, delta in difference(both, np.array(result.true)).items():
            low, high = intervals[name]
            change = f"{delta:+.4f} [{low:+.4f}, {high:+.4f}]" if result is not everything else ""
            cells += [f"{result.scores[name]:.4f}", change]
        lines.append([variant, *cells, f"{result.unparsed}/{len(result.true)}"])
    return aligned(lines)


# ---------------------------------------------------------------------------------------------------------------------
# One clip


def feature_range(split: Split) -> dict[str, list]:
    """{"audio": [low, high], "video": ...}: each feature's least and largest value over all real frames."""
    ranges = {}
    for m in FEATURES:
        ends = [(x.min(0), x.max(0)) for row in range(len(split)) if len(x := clean(split.features(m, row)))]
        if ends:
            low, high = zip(*ends)
            ranges[m] = [np.min(low, axis=0).tolist(), np.max(high, axis=0).tolist()]
    return ranges


def read_features(path, width: int) -> np.ndarray:
    """The numbers (frames, width) in a .npy file. Raises ValueError if it holds anything else."""
    try:
        x = np.load(path, allow_pickle=False, mmap_mode="r")
    except Exception as error:          # whatever a damaged or hostile file provokes, it was refused
        raise ValueError(f"{path}: not a .npy file of numbers ({error})") from None
    shape, dtype = getattr(x, "shape", ()), getattr(x, "dtype", np.dtype(object))
    if len(shape) != 2 or shape[0] == 0 or shape[1] != width or dtype.kind not in "fiub":
        raise ValueError(f"{path}: holds {dtype} {shape}; expected numbers (frames, {width}), as in training")
    return x


def oddities(x: np.ndarray, modality: str, ranges: dict) -> list[str]:
    """What is strange about a clip's features: values that are not finite or far outside those of training."""
    bad, x = int((~np.isfinite(x)).sum()), clean(x)
    notes = [f"{modality}: {bad} values are not finite and count as 0"] if bad else []
    if modality not in ranges:
        return [*notes, f"{modality}: not compared with the training data, whose range was not recorded"]
    low, high = np.array(ranges[modality])
    far = np.flatnonzero((np.maximum(low - x, x - high) > high - low).any(axis=0))      # by more than all of its range
    return notes + [f"{modality}: {len(far)} of {len(low)} features are far outside the training data; feature {k} is "
                    f"{x[:, k].min():.4g} to {x[:, k].max():.4g}, there {low[k]:.4g} to {high[k]:.4g}" for k in far[:1]]


def clip(net: MultimodalLLM, text: str, paths: dict, ranges: dict) -> dict:
    """Answer one clip, given as text and {modality: path of its features, or None}, and again without each part."""
    notes, columns, task = [], [], net.task
    names = list(task.labels) or [f"{y:+.1f}" for y in task.values()]
    for m in FEATURES:
        width = getattr(net.adapter.config, f"{m}_dim")
        x = read_features(paths[m], width) if paths[m] else np.zeros((0, width))
        columns += [[x], [len(x)]]
        notes += oddities(x, m, ranges) if paths[m] else [f"{m}: none given, taken as missing"]
    row = Split([text], *columns, [task.values()[0]], ["clip"], unused=[])      # nobody looks at the label

    if (n := len(net.tokenizer.encode(text))) > task.text_len:
        notes.append(f"text: of {n} tokens the first {task.text_len} are read")

    def read(row):
        p = label_logprobs(net, collate(row, [0])).exp().double().cpu().numpy()
        mean_std = {} if task.labels else dict(zip(("mean", "std"), moments(p, task)[:, 0].tolist()))
        return {"label": names[p.argmax()], "probability": float(p.max()), **mean_std}, dict(zip(names, p[0].tolist()))

    answer, p = read(row)
    parts = {f"without {m}": without(row, m) for m in FEATURES if paths[m]} | {"without text": replace(row, text=[""])}
    changes = {}
    for name, part in parts.items():
        other, q = read(part)
        changes[name] = other | {"change": q[answer["label"]] - p[answer["label"]]}     # of the first answer
    greedy, = net.answer(collate(row, [0]))
    return {**answer, "greedy": greedy, "probabilities": p, "changes": changes, "notes": notes}


def clip_text(found: dict) -> str:
    """What `clip` returns, for people."""
    def short(answer):
        numbers = [f"{key} {answer[key]:.3f}" for key in ("probability", "mean", "std") if key in answer]
        return f"{answer['label']}, {', '.join(numbers)}"

    bars = [[name, f"{p:.3f}", f"{'#' * round(50 * p):50}"] for name, p in found["probabilities"].items()]
    return "\n".join([f"{short(found)}; greedy answer {found['greedy']!r}", aligned(bars),
                      *(f"{name}: {short(answer)}; {found['label']} {answer['change']:+.3f}"
                        for name, answer in found["changes"].items()), *found["notes"]])


# ---------------------------------------------------------------------------------------------------------------------
# The backbone itself

PROMPTS = ("Once upon a time", "The capital of France is", "1 + 1 =", "今天天气很好，")


def embed_prompt(llm, tokenizer, task: Task, text: str):
    """A text behind the backbone's own first tokens, (1, T, C)."""
    ids = [tokenizer.token_id(name) for name in task.wording(llm.config.family).bos] + tokenizer.encode(text)
    return llm.embed(torch.tensor([ids], device=llm.embed.weight.device))


def ask(net: MultimodalLLM, text: str, new_tokens: int = 100) -> str:
    """How the frozen backbone goes on with a text, greedily; the adapter has no part in it."""
    x = embed_prompt(net.llm, net.tokenizer, net.task, text)
    ids = net.llm.generate(x, max(1, min(new_tokens, net.llm.config.max_len - x.size(1))), eos_id=net.eos_id)
    return net.tokenizer.decode(ids[0].tolist())


@torch.no_grad()
def fingerprints(llm, tokenizer, task: Task) -> list:
    """The logits at every token of PROMPTS, and a checksum over the bits of every tensor."""
    prompts = [embed_prompt(llm, tokenizer, task, text) for text in PROMPTS]
    return [llm.logits(llm(x)).cpu() for x in prompts] + [p.view(torch.int16).sum().cpu() for p in llm.parameters()]


def check_backbone(net: MultimodalLLM, fresh: list, batch) -> str:
    """Compare the backbone with `fresh`, the fingerprints of a copy that never saw an adapter, bit by bit: as it is,
    after answering a batch and after a training step on it. Raises ValueError where one differs."""
    def compare(when: str):
        pairs = zip(fingerprints(net.llm, net.tokenizer, net.task), fresh, strict=True)
        if wrong := sum(not torch.equal(now, before) for now, before in pairs):
            raise ValueError(f"the backbone changed: {wrong} of {len(fresh)} fingerprints differ {when}")

    compare("behind the adapter")
    net.answer(batch), label_logprobs(net, batch)
    compare("after answering")
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-3)            # the frozen ones too
    net.loss(batch).backward()
    optimizer.step()
    compare("after a training step")
    return (f"backbone unchanged: logits of {len(PROMPTS)} prompts and bits of {len(fresh) - len(PROMPTS)} tensors "
            f"are a fresh copy's behind the adapter, after {len(batch.text)} answers and after a training step")


# ---------------------------------------------------------------------------------------------------------------------
# Command line


def find_run(path) -> Path:
    """A run's folder, or the one run in a folder of runs."""
    path = Path(path)
    found = [path] if (path / "settings.json").is_file() else sorted(p.parent for p in path.glob("*/settings.json"))
    if len(found) == 1:
        return found[0]
    raise ValueError(f"{path}: {len(found) or 'no'} runs found; expected the folder of one run of train.py, "
                     f"which holds settings.json{': ' + ', '.join(map(str, found)) if found else ''}")


def read_json(file: Path, keys=()) -> dict:
    """A file of a run, {} if there is none. Raises ValueError if it holds no JSON object or lacks one of `keys`."""
    found = {}
    if file.is_file():
        try:
            with open(file, "rb") as opened:
                found = json.loads(opened.read(1 << 24))        # ours are shorter: what is longer is cut, thus refused
            json.dumps(found, ensure_ascii=False).encode()      # refuses halves of characters, "\ud800"
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{file}: not valid JSON ({error}); train again with --overwrite") from None
    if not isinstance(found, dict):
        raise ValueError(f"{file}: holds a {type(found).__name__}, not an object; train again with --overwrite")
    missing = [key for key in keys if key not in found]
    if missing:
        raise ValueError(f"{file}: has no {', '.join(missing)}; train again with --overwrite")
    return found


def score_split(net: MultimodalLLM, split: Split, run: Path, settings: dict, args):
    """Print and write what a split scores: first as the run was selected, then the other way of decoding beside it."""
    name, readout = args.split, args.readout or settings["readout"]
    results = {decode: evaluate(net, split, settings["eval_batch"], f"{name}, {decode}", decode, readout)
               for decode in sorted(DECODE, key=lambda d: d != settings["decode"]) if args.decode in (None, decode)}
    (decode, result), *_ = results.items()
    best = read_json(run / "results.json").get("best_epoch")
    print(f"{name}{f' (best epoch {best})' if best else ''}: {result.line()}")
    if warning := collapsed(result, split.label, net.task):
        print(warning)
    print(f"\n{side_by_side(results)}\n\n{decode}:\n{result.tables()}")
    write_results(run, split, results, f"-{name}")      # the run's own record, without ending, stays as it is
    print(f"\nwrote {run}/metrics-{name}.json and predictions-{name}.csv")


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", help="folder of a run of train.py")
    parser.add_argument("--split", default="test", choices=("train", "valid", "test"), help="rows to score [test]")
    parser.add_argument("--decode", choices=DECODE, help="how to answer [both, side by side]")
    parser.add_argument("--readout", choices=READOUT, help="an intensity by label scoring [the run's]")
    parser.add_argument("--ablate", action="store_true", help="what audio, video and text are worth")
    parser.add_argument("--text", help="one clip: what is said")
    parser.add_argument("--audio", help="its audio features, a .npy file of (frames, features)")
    parser.add_argument("--video", help="its video features")
    parser.add_argument("--json", action="store_true", help="print what is found of the clip as JSON")
    parser.add_argument("--ask", metavar="TEXT", help="what the frozen backbone goes on to write")
    parser.add_argument("--check-backbone", action="store_true", help="compare it with a fresh copy, bit by bit")
    parser.add_argument("--llm", help="where the backbone lies now, if it was moved")
    parser.add_argument("--data-dir", help="where the data lies now, if it was moved")
    parser.add_argument("--device", help="cpu, cuda, ... [the run's]")
    args = parser.parse_args()
    if args.text is None and (args.audio or args.video or args.json):
        parser.error("--audio, --video and --json belong to --text: a clip needs its text, which may be empty")
    return args


def main():
    args = parse_args()
    run = find_run(args.run)
    settings = read_json(run / "settings.json", (
        "data", "data_dir", "llm", "official", "decode", "readout", "eval_batch", "device", "dtype"))
    device, task, dtype = args.device or settings["device"], TASKS[settings["data"]], getattr(torch, settings["dtype"])
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError(f"{run} ran on a GPU, which is not at hand here; pass --device cpu")
    path = find_llm(args.llm or settings["llm"] or task.llm)
    tokenizer, size = load_tokenizer(path), settings["eval_batch"]
    if args.check_backbone:             # the fresh copy is gone before the other comes
        fresh = fingerprints(load_llm(path, device, dtype), tokenizer, task)
    llm = load_llm(path, device, dtype)
    net = load_adapter(run / "adapter.safetensors", llm, tokenizer, task, settings["official"])
    for name, value in asdict(net.adapter.config).items():
        if settings.get(name, value) != value:
            raise ValueError(f"{run}: {name} is {settings[name]!r} in settings.json, {value!r} in adapter.safetensors")
    if args.ask is not None:
        print(ask(net, args.ask))
    elif args.text is not None:
        found = clip(net, args.text, dict(audio=args.audio, video=args.video), read_json(run / "features.json"))
        print(json.dumps(found, ensure_ascii=False, indent=1) if args.json else clip_text(found))
    else:
        split = load_split(task, args.data_dir or settings["data_dir"] or HERE / task.home, args.split)
        if args.check_backbone:
            print(check_backbone(net, fresh, collate(split, range(min(size, len(split))))))
        elif args.ablate:
            decode, readout = args.decode or settings["decode"], args.readout or settings["readout"]
            print(ablate(net, split, size, decode, readout))
        else:
            score_split(net, split, run, settings, args)


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
