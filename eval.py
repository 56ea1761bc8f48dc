"""What a trained adapter answers, what that scores, and what the modalities are worth.

    python eval.py RUN                      score a run's test split: greedy answers, and label scoring
    python eval.py RUN --ablate             drop or shuffle audio and video, empty the text
    python eval.py RUN --text "Oh, great." --audio a.npy --video v.npy      one clip; --json for programs
    python eval.py RUN --ask "Once upon"    the frozen backbone's plain text
    python eval.py RUN --check-backbone     its logits with and without the adapter, bit by bit
"""
import argparse
import json
import re
import sys
from collections import Counter
from dataclasses import dataclass, replace
from functools import cached_property
from math import nan
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

from adapter import MultimodalLLM, load_adapter
from data import FEATURES, HERE, SPLITS, TASKS, Split, Task
from data import collate, divide, find_llm, load_split, load_tokenizer
from extras import backbone
from extras.clip import clip_row, clip_text, found
from extras.files import read_json
from extras.guards import check_device, read_settings
from extras.report import aligned, write_results
from model import load_llm

# --- Answers: the LLM's text -> a number, or None -----------------------------------------------------------
CLASS, INTENSITY = r"[0-9]+", r"[+-]?[0-9]+(\.[0-9]+)?"         # not \d, which takes "٣" too
OFFICIAL = str.maketrans("–一", "--", "：:/(")                  # the release's: two become "-", four go

def parse_answer(text: str, task: Task, official: bool = False) -> float | None:
    """The number that an answer is, in the task's range or not; None where it is anything but one number.

    Classes: digits only. Intensities: sign if any, digits, fraction if any ("+0.4", "-1"; not ".5", "1e0").
    official: as in the release, float(), for intensities after its replacements; 0.0 where that fails.
    """
    if official:
        try:
            return float(text if task.labels else text.translate(OFFICIAL))
        except ValueError:
            return 0.0
    number = re.fullmatch(CLASS if task.labels else INTENSITY, text.strip())
    return float(number[0]) if number else None

def in_range(value: float, task: Task) -> bool:
    """Whether a parsed answer is one of the task's classes, or an intensity within its range."""
    return value in task.values() if task.labels else task.range[0] <= value <= task.range[1]

# --- Metrics: (pred, true) -> {name: value}. A prediction that is None, nan or no class is wrong.

def confusion(pred, true, n: int) -> np.ndarray:
    """(n, n + 1) counts: row the true class, column the predicted one, the last one for no class at all."""
    pred, true = np.asarray(pred, float), np.asarray(true, int)
    assert pred.shape == true.shape, f"{pred.shape} predictions for {true.shape} true classes"
    assert ((0 <= true) & (true < n)).all(), f"a true class is not one of 0..{n - 1}"
    column = np.where(np.isin(pred, np.arange(n)), pred, n).astype(int)
    return np.bincount(true * (n + 1) + column, minlength=n * (n + 1)).reshape(n, n + 1)

def per_class(counts: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Of each class in `counts`, as in scikit-learn: precision = hits / predicted, recall = hits / true,
    F1 = 2 hits / (predicted + true), 0 where that is 0 / 0, and support = true."""
    hits, predicted, true = counts.diagonal(), counts[:, :-1].sum(axis=0), counts.sum(axis=1)
    f1 = 2 * hits / np.maximum(predicted + true, 1)
    return hits / np.maximum(predicted, 1), hits / np.maximum(true, 1), f1, true

def accuracy_f1(pred, true) -> tuple[float, float, float]:
    """The share of rows with pred = true; the classes' mean F1 by support; their plain mean, of true ones."""
    if len(true) == 0:
        return nan, nan, nan
    counts = confusion(pred, true, int(np.max(true)) + 1)       # a class above is never true: its weight is 0
    _, _, f1, support = per_class(counts)
    accuracy, weighted_f1, macro_f1 = counts.trace(), f1 @ support, f1[support > 0].mean()
    return float(accuracy / len(true)), float(weighted_f1 / len(true)), float(macro_f1)

def mae_corr_r2(pred: np.ndarray, true: np.ndarray) -> tuple[float, float, float]:
    """mean |pred - true|; Pearson's r; 1 - mean (true - pred)^2 / variance of true."""
    if len(true) == 0 or np.isnan(pred).any():
        return nan, nan, nan
    mae = float(np.abs(pred - true).mean())
    if (true == true[0]).all():
        return mae, nan, nan
    r2 = float(1 - ((true - pred) ** 2).mean() / true.var())
    if np.isinf(pred).any() or (pred == pred[0]).all():
        return mae, nan, r2
    return mae, float(np.corrcoef(pred, true)[0, 1]), r2

def intensities(pred, true) -> np.ndarray:
    """(2, rows), pred and true, rounded to float32 as the release compares. Edges are rounded alike: a true
    0.4 is on the edge 0.4 be it stored as float32 or as 0.4000000000000001."""
    both = np.array([pred, true], float)
    assert both.ndim == 2 and np.isfinite(both[1]).all(), f"{both.shape}: ragged, or a truth is not finite"
    with np.errstate(over="ignore"):                            # an answer of 1e300 becomes inf
        return both.astype(np.float32).astype(float)

def bins(x: np.ndarray, edges: list[float], right: bool = True) -> np.ndarray:
    """The bin of each value, 0..len(edges), closed on the right or else on the left; nan is in none, -1."""
    return np.where(np.isnan(x), -1, np.digitize(x, np.float32(edges), right))

def whole(x: np.ndarray, top: int) -> np.ndarray:
    """Values clipped to [-top, top] and rounded half to even, as classes 0..2 top."""
    return np.round(np.clip(x, -top, top)) + top

def class_metrics(pred, true) -> dict[str, float]:
    """Emotion classes. accuracy: share of rows with pred = true; weighted_f1: the mean of the classes' F1 by
    support; macro_f1: the plain mean over the classes that are true of any row."""
    return dict(zip(("accuracy", "weighted_f1", "macro_f1"), accuracy_f1(pred, true)))

def mosei_metrics(pred, true) -> dict[str, float]:
    """CMU-MOSEI and CMU-MOSI, intensities -3..3. F1 is weighted by support, over the two bins of its acc2.

    has0_*: pred >= 0 against true >= 0, all rows; non0_*: pred > 0 against true > 0, rows with true != 0;
    acc5, acc7: equal after clipping to [-2, 2], [-3, 3] and rounding half to even;
    mae: mean |pred - true|; corr: Pearson's r, both unclipped (but `score` clips, unless official).
    """
    both = intensities(pred, true)
    has0_acc2, has0_f1, _ = accuracy_f1(*bins(both, [0], right=False))
    non0_acc2, non0_f1, _ = accuracy_f1(*bins(both[:, both[1] != 0], [0]))
    acc5, *_ = accuracy_f1(*whole(both, 2))
    acc7, *_ = accuracy_f1(*whole(both, 3))
    mae, corr, _ = mae_corr_r2(*both)
    return dict(has0_acc2=has0_acc2, has0_f1=has0_f1, non0_acc2=non0_acc2, non0_f1=non0_f1,
                acc5=acc5, acc7=acc7, mae=mae, corr=corr)

SIMS_EDGES = [-0.7, -0.1, 0.1, 0.7]

def simsv2_metrics(pred, true) -> dict[str, float]:
    """CH-SIMS v2, intensities -1..1: both sides are clipped to that first. Bins are closed on the right.

    acc2, f1: cut at 0, with 0 negative, F1 weighted by support; weak_acc2: of the rows with |true| <= 0.4;
    acc3: cut at -0.1, 0.1; acc5: cut at -0.7, -0.1, 0.1, 0.7;
    mae: mean |pred - true|; corr: Pearson's r; r2: 1 - mean (true - pred)^2 / variance of true.
    """
    both = np.clip(intensities(pred, true), -1, 1)
    acc2, f1, _ = accuracy_f1(*bins(both, [0]))
    weak_acc2, *_ = accuracy_f1(*bins(both[:, np.abs(both[1]) <= np.float32(0.4)], [0]))
    acc3, *_ = accuracy_f1(*bins(both, [-0.1, 0.1]))
    acc5, *_ = accuracy_f1(*bins(both, SIMS_EDGES))
    mae, corr, r2 = mae_corr_r2(*both)
    return dict(acc2=acc2, f1=f1, weak_acc2=weak_acc2, acc3=acc3, acc5=acc5, mae=mae, corr=corr, r2=r2)

def range_metrics(pred, true) -> dict[str, float]:
    """Intensities that are all of one sign: how far off, and how well they follow. There is no 0 to cut at."""
    mae, corr, r2 = mae_corr_r2(*intensities(pred, true))
    return dict(mae=mae, corr=corr, r2=r2)

def metrics_of(task: Task):
    """The task's metrics: of classes, of intensities from below 0 to above it, within -1..1 or beyond, or
    of others."""
    if task.labels:
        return class_metrics
    low, high = task.range
    if not low < 0 < high:
        return range_metrics
    return simsv2_metrics if max(-low, high) <= 1 else mosei_metrics

def nearest(x: np.ndarray, marks: list) -> np.ndarray:
    """The number of the mark nearest to each value, of two equally near ones the even; nan: none, -1."""
    step = marks[1] - marks[0]
    place = np.round(x / step) - round(marks[0] / step)
    return np.where(np.isnan(x), -1, place.clip(0, len(marks) - 1))

WHY_NAN = {"corr": "predictions or true values are constant or no numbers",
           "r2": "true values are constant, or a prediction is no number",
           "mae": "a prediction is no number", "weak_acc2": "no true value within 0.4 of 0",
           "non0_acc2": "no true value but 0", "non0_f1": "no true value but 0"}

def bootstrap(metric, pred, true, seed: int = 0, draws: int = 1000) -> dict[str, tuple[float, float]]:
    """{name: (low, high)}: the 95 % percentile interval of each score of `metric`, over `draws` resamplings
    of the rows with replacement; a draw in which a score is nan does not count for that score. `pred` may be
    (rows, k): a metric that compares k systems gets the same rows of each."""
    pred, true, rng = np.asarray(pred, float), np.asarray(true), np.random.default_rng(seed)
    assert len(pred) == len(true), f"{len(pred)} predictions for {len(true)} true values"
    scores, intervals = [], {}
    for _ in range(draws):
        rows = rng.integers(len(true), size=len(true))
        scores.append(metric(pred[rows], true[rows]))
    for name in scores[0]:
        values = sorted(draw[name] for draw in scores if not np.isnan(draw[name])) or [nan]
        beyond = len(values) // 40                              # so many draws, 2.5 %, lie beyond each end
        intervals[name] = values[beyond], values[-1 - beyond]
    return intervals

# --- Evaluation ---------------------------------------------------------------------------------------------
DECODE = ("greedy", "labels")           # what the LLM writes, as in the paper, or the labels' probabilities
READOUT = ("mean", "median", "mode")    # of those, for intensities; a class is always the most probable

@dataclass
class Result:
    """A split's answers and what they score."""
    task: Task
    true: list
    answers: list                       # texts, in the split's order
    values: list                        # numbers as parsed, None where an answer did not parse
    pred: np.ndarray                    # numbers as scored
    unparsed: int = 0
    out_of_range: int = 0
    probabilities: np.ndarray | None = None     # (rows, labels), if labels were scored

    @cached_property
    def scores(self) -> dict[str, float]:
        return metrics_of(self.task)(self.pred, self.true)

    @cached_property
    def intervals(self) -> dict[str, tuple[float, float]]:
        return bootstrap(metrics_of(self.task), self.pred, self.true)

    @property
    def bias(self) -> float:
        """The mean error of intensities, pred - true: which way they lean."""
        return float(np.mean(self.pred - np.array(self.true, float)))

    def counts(self) -> np.ndarray:
        """`confusion` of the answers as parsed, for classes."""
        return confusion(self.values, self.true, len(self.task.labels))

    def per_class(self) -> tuple:
        """Precision, recall, F1 and support of each class."""
        return per_class(self.counts())

    def moments(self) -> np.ndarray:
        """Mean and standard deviation of each row's intensity, (2, rows), if labels were scored."""
        return moments(self.probabilities, self.task)

    def line(self) -> str:
        n = len(self.true)
        return f"{in_words(self.scores)}, unparsed {self.unparsed}/{n}, out of range {self.out_of_range}/{n}"

    def table(self) -> str:
        """Truth by prediction, intensities in whole numbers or the bins of acc5; of classes also their F1."""
        names, both = self.task.labels, (self.values, self.true)
        if metrics_of(self.task) is simsv2_metrics:
            names = ["[-1,-.7]", "(-.7,-.1]", "(-.1,.1]", "(.1,.7]", "(.7,1]"]
            both = bins(intensities(*both), SIMS_EDGES)
        elif not names:
            names = self.task.marks()
            both = np.array([nearest(column, names) for column in intensities(*both)])
            names = [f"{mark:g}" for mark in names]
        counts = confusion(*both, len(names))
        lines = [["true \\ pred", *names, "none"]]
        lines += [[name, *row] for name, row in zip(names, counts)]
        if self.task.labels:
            lines[0] += ["precision", "recall", "f1"]
            for line, precision, recall, f1, _ in zip(lines[1:], *per_class(counts)):
                line += [f"{precision:.4f}", f"{recall:.4f}", f"{f1:.4f}"]
        return aligned(lines)

def in_words(scores: dict[str, float]) -> str:
    words = []
    for name, x in scores.items():
        why = f" ({WHY_NAN.get(name, 'no rows')})" if np.isnan(x) else ""
        words.append(f"{name.replace('_', ' ')} {x:.4f}{why}")
    return ", ".join(words)

def score(answers: list, true: list, task: Task, official: bool = False) -> Result:
    """Parse and score. A class answer that did not parse or is no class is wrong; an intensity that did not
    parse is taken for 0, one out of range for the range's end. official: each number as it reads, or 0."""
    values = [parse_answer(text, task, official) for text in answers]
    unparsed = sum(parse_answer(text, task) is None for text in answers)
    out_of_range = sum(value is not None and not in_range(value, task) for value in values)
    instead = -1.0 if task.labels else 0.0
    pred = np.array([instead if value is None else value for value in values])
    if not official and not task.labels:
        pred = pred.clip(*task.range)
    return Result(task, true, answers, values, pred, unparsed, out_of_range)

def score_labels(probabilities: np.ndarray, true: list, task: Task, readout: str = "mean") -> Result:
    """Score the probabilities (rows, labels): the most probable class; an intensity's mean, median or mode.

    The median is the least intensity with at least half of the probability on it or below. A row of nan is
    unparsed: a wrong class, an intensity of 0.
    """
    labels = np.array(task.values())
    pred = mode = labels[probabilities.argmax(axis=1)]
    if not task.labels and readout == "mean":
        pred, _ = moments(probabilities, task)
    elif not task.labels and readout == "median":
        pred = labels[(probabilities.cumsum(axis=1) >= 0.5 - 1e-9).argmax(axis=1)]
    broken = np.isnan(probabilities).any(axis=1)
    values = [None if nan else value for nan, value in zip(broken, pred.tolist())]
    answers = ["" if nan else str(value) for nan, value in zip(broken, mode)]
    pred = np.where(broken, -1 if task.labels else 0, pred)
    return Result(task, true, answers, values, pred, unparsed=int(broken.sum()), probabilities=probabilities)

def moments(probabilities: np.ndarray, task: Task) -> np.ndarray:
    """Mean and standard deviation of each row's intensity, (2, rows)."""
    labels = np.array(task.values())
    mean = probabilities @ labels
    return np.stack((mean, np.sqrt(np.maximum(probabilities @ labels**2 - mean**2, 0))))

@torch.no_grad()
def label_logprobs(net: MultimodalLLM, batch):
    """Log-probabilities (B, labels) of the task's legal labels behind each row, normalised over them.

    The labels are a tree, "-0.1" and "-0.2" one branch up to their last token. Each row is read once, then
    each branch behind it: the state after its last token says how probable every next token is.
    """
    x, real, _ = net.rows(batch)
    cache = net.beginning().copy()
    scores = torch.zeros(len(x), len(net.labels), device=x.device)

    def follow(begun: list, path, hidden, cache, real):
        """Score the labels that begin with the tokens `begun`, read up to the state `hidden` (B, 1, C), of
        which `path` (B,) is the log-probability."""
        after = net.llm.logits(hidden[:, 0]).log_softmax(dim=-1)                                # (B, V)
        n = len(begun)
        longer = [label for label in net.labels if label[:n] == begun and len(label) > n]
        for token in sorted({label[n] for label in longer}):
            branch, branch_path = [*begun, token], path + after[:, token]
            if branch in net.labels:
                scores[:, net.labels.index(branch)] = branch_path
            if any(label[:n + 1] == branch and len(label) > n + 1 for label in longer):
                x = net.llm.embed(net.tensor([[token]] * len(batch.text)))                      # (B, 1, C)
                sees, read = F.pad(real, (0, 1), value=True), cache.copy()
                follow(branch, branch_path, net.llm(x, sees, read), read, sees)

    hidden = net.llm(x, real, cache, last=1)
    follow([], 0, hidden, cache, real)
    return scores.log_softmax(dim=-1)

def rows_by_length(net: MultimodalLLM, split: Split, size: int) -> list:
    """Row numbers of each batch, sorted by the tokens of their texts: like lengths need little padding."""
    lengths = [len(net.tokenizer.encode(text)) for text in split.text]
    order = sorted(range(len(split)), key=lengths.__getitem__)
    return [order[i:i + size] for i in range(0, len(order), size)]

def evaluate(net: MultimodalLLM, split: Split, size: int, decode="greedy", readout="mean") -> Result:
    """Answer and score a split, `size` rows at a time. decode, readout: see DECODE, READOUT."""
    outputs = [None] * len(split)
    for rows in tqdm(rows_by_length(net, split, size), f"{decode} answers", leave=False, disable=None):
        batch = collate(split, rows)
        found = net.answer(batch) if decode == "greedy" else label_logprobs(net, batch)
        for row, output in zip(rows, found):
            outputs[row] = output
    if decode == "greedy":
        return score(outputs, split.label, net.task, net.official)
    return score_labels(torch.stack(outputs).exp().double().cpu().numpy(), split.label, net.task, readout)

def evaluate_all(net: MultimodalLLM, split: Split, size: int, decode="greedy", readout="mean") -> dict:
    """{name: Result} of every way to answer, the asked one first: "greedy", and "labels" for classes or
    "labels mean", "labels median", "labels mode" for intensities."""
    results = {"greedy": evaluate(net, split, size)}
    labels = evaluate(net, split, size, "labels", readout)
    if net.task.labels:
        results["labels"] = labels
    else:
        for name in READOUT:
            results[f"labels {name}"] = score_labels(labels.probabilities, split.label, net.task, name)
    first = way(net.task, decode, readout)
    return {first: results.pop(first), **results}

def way(task: Task, decode: str, readout: str) -> str:
    """A way to answer by its name: "greedy", "labels", "labels median"."""
    if decode == "greedy" or task.labels:
        return decode
    return f"labels {readout}"

def collapsed(result: Result) -> str:
    """A warning if the answers hardly differ, with what their one value alone would score; or "".

    Classes: more than 95 % of the answers are the same one, or none. Intensities: the predictions' standard
    deviation is below 5 % of the labels'."""
    labels, task, n = result.true, result.task, len(result.true)
    if task.labels:
        classes = [value if in_range(value, task) else -1 for value in result.values]
        value, count = Counter(classes).most_common(1)[0]
        name = "no class" if value == -1 else task.labels[int(value)]
        hardly, found = count > 0.95 * n, f"{name!r} is {count} of {n} answers; that answer"
    else:
        value, spread, wanted = result.pred.mean(), result.pred.std(), np.std(labels)
        hardly = spread < 0.05 * wanted
        found = f"the predictions' standard deviation is {spread:.3g}, the labels' {wanted:.3g}; their mean"
    alone = in_words(metrics_of(task)(np.full(n, value), labels))
    return f"looks collapsed: {found} alone scores {alone}" if hardly else ""

ZERO_IS = {"has0_acc2": ", to which 0 is positive", "acc2": ", to which 0 is negative"}

def unparsed_note(result: Result) -> str:
    """What unparsed intensities do to the first score, where they are more than 2 % of the rows; or ""."""
    n, task = len(result.true), result.task
    if task.labels or result.unparsed <= 0.02 * n:
        return ""
    name = next(iter(result.scores))
    parsed = [parse_answer(text, task) is not None for text in result.answers]
    without = metrics_of(task)(result.pred[parsed], np.array(result.true)[parsed])[name]
    return (f"{result.unparsed} of {n} answers ({result.unparsed / n:.1%}) do not parse and count as 0: "
            f"{name.replace('_', ' ')}{ZERO_IS.get(name, '')}, is {result.scores[name]:.4f} with them, "
            f"{without:.4f} without them")

def alarms(result: Result) -> list[str]:
    """What looks wrong with the answers, a line each."""
    return [line for line in (collapsed(result), unparsed_note(result)) if line]

def side_by_side(results: dict[str, Result]) -> str:
    """A line per score, a column per way of decoding, each score with its 95 % interval."""
    lines = [["", *(f"{decode} [95 % interval]" for decode in results)]]
    for name in next(iter(results.values())).scores:
        line = [name.replace("_", " ")]
        for r in results.values():
            low, high = r.intervals[name]
            line.append(f"{r.scores[name]:.4f} [{low:.4f}, {high:.4f}]")
        lines.append(line)
    if not r.task.labels:
        lines.append(["bias", *(f"{r.bias:+.4f}" for r in results.values())])
    for name in ("unparsed", "out_of_range"):
        lines.append([name.replace("_", " "), *(f"{getattr(r, name)}/{len(r.true)}" for r in results.values())])
    return aligned(lines)

# --- What the modalities are worth --------------------------------------------------------------------------
def variants(split: Split) -> dict[str, Split]:
    """The split as it is, with modalities missing, with one's features in other rows, and without text."""
    order, none = np.random.RandomState(0).permutation(len(split)), [0] * len(split)

    def moved(column):
        return [column[i] for i in order]

    return {
        "all": split,
        "without audio": replace(split, audio_len=none),
        "without video": replace(split, video_len=none),
        "without audio and video": replace(split, audio_len=none, video_len=none),
        "audio shuffled": replace(split, audio=moved(split.audio), audio_len=moved(split.audio_len)),
        "video shuffled": replace(split, video=moved(split.video), video_len=moved(split.video_len)),
        "text empty": replace(split, text=[""] * len(split))}

def one_clip(net: MultimodalLLM, row: Split) -> dict:
    """The answer to a split of one row by label scoring, greedily, and again without each part."""
    parts = {name: part for name, part in variants(row).items() if "shuffled" not in name}
    results = {name: evaluate(net, part, 1, decode="labels") for name, part in parts.items()}
    return found(results, net.task) | {"greedy": evaluate(net, row, 1).answers[0]}

def ablation(net: MultimodalLLM, split: Split, size: int, decode="greedy", readout="mean") -> list[str]:
    """One line per modality dropped from the same trained model, and for both."""
    parts = {name: part for name, part in variants(split).items() if name.startswith("without")}
    results = {name: evaluate(net, part, size, decode, readout) for name, part in parts.items()}
    return [f"test {name}: {result.line()}" for name, result in results.items()]

def ablation_table(results: dict[str, Result]) -> str:
    """Of each variant the first score and the one that selects, and their differences to `all`."""
    everything = results["all"]
    metric, names = metrics_of(everything.task), [next(iter(everything.scores))]
    if everything.task.select not in names:
        names.append(everything.task.select)

    def difference(pred, true):
        before, after = metric(pred[:, 0], true), metric(pred[:, 1], true)
        return {name: after[name] - before[name] for name in names}

    lines = [[""]]
    for name in names:
        lines[0] += [name.replace("_", " "), "difference [95 % interval]"]
    lines[0].append("unparsed")
    for variant, result in results.items():
        intervals = bootstrap(difference, np.stack((everything.pred, result.pred), axis=1), result.true)
        line = [variant]
        for name, (low, high) in intervals.items():
            change = result.scores[name] - everything.scores[name]
            line += [f"{result.scores[name]:.4f}", f"{change:+.4f} [{low:+.4f}, {high:+.4f}]"]
        lines.append([*line, f"{result.unparsed}/{len(result.true)}"])
    return aligned(lines)

# --- One clip -----------------------------------------------------------------------------------------------
def feature_range(split: Split) -> dict[str, list]:
    """{"audio": [low, high], "video": ...}: each feature's least and largest value over all real frames."""
    ranges = {}
    for m in FEATURES:
        frames = (split.frames(m, row) for row in range(len(split)))       # one row in memory
        ends = [(x.min(axis=0), x.max(axis=0)) for x in frames if len(x) > 0]
        if ends:
            low, high = zip(*ends)
            ranges[m] = [np.min(low, axis=0).tolist(), np.max(high, axis=0).tolist()]
    return ranges

# --- Command line -------------------------------------------------------------------------------------------
def score_split(net: MultimodalLLM, split: Split, run: Path, settings: dict, args):
    """Print and write what a split scores: first as the run was selected, then in the other ways."""
    chosen = args.decode or settings["decode"], args.readout or settings["readout"]
    if args.decode is None:
        results = evaluate_all(net, split, settings["eval_batch"], *chosen)
    else:
        results = {way(net.task, *chosen): evaluate(net, split, settings["eval_batch"], *chosen)}
    first = way(net.task, *chosen)
    record = run / "results.json"
    best = read_json(record).get("best_epoch") if record.is_file() else "unknown"
    print(f"{args.split} (best epoch {best}): {results[first].line()}")
    for alarm in alarms(results[first]):
        print(alarm)
    print(f"\n{side_by_side(results)}\n\n{first}:\n{results[first].table()}\n")
    write_results(run, split, results, f"-{args.split}")        # the run's own record, without ending, stays
    print(f"wrote {run}/metrics-{args.split}.json and predictions-{args.split}.csv")

def parse_args():
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="folder of a run of train.py")
    parser.add_argument("--split", default="test", choices=SPLITS, help="rows to score [test]")
    parser.add_argument("--decode", choices=DECODE, help="how to answer [both, side by side]")
    parser.add_argument("--readout", choices=READOUT, help="an intensity by label scoring [the run's]")
    parser.add_argument("--ablate", action="store_true", help="what audio, video and text are worth")
    parser.add_argument("--text", help="one clip: what is said")
    parser.add_argument("--audio", help="its audio features, a .npy file of (frames, features)")
    parser.add_argument("--video", help="its video features")
    parser.add_argument("--json", action="store_true", help="print what is found of the clip as JSON")
    parser.add_argument("--ask", metavar="TEXT", help="what the frozen backbone goes on to write")
    parser.add_argument("--check-backbone", action="store_true", help="compare it with a fresh copy")
    parser.add_argument("--llm", help="where the backbone lies now, if it was moved")
    parser.add_argument("--data-dir", help="where the data lies now, if it was moved")
    parser.add_argument("--device", help="cpu, cuda, ... [the run's]")
    args = parser.parse_args()
    if args.text is None and (args.audio or args.video or args.json):
        parser.error("--audio, --video and --json belong to --text, which may be empty")
    return args

def main():
    args = parse_args()
    settings = read_settings(args.run / "settings.json", {"data": TASKS, "decode": DECODE, "readout": READOUT})
    task, device = TASKS[settings["data"]], args.device or settings["device"]
    check_device(device)
    path, dtype = find_llm(args.llm or settings["llm"] or task.llm), getattr(torch, settings["dtype"])
    tokenizer = load_tokenizer(path)
    if args.check_backbone:             # the fresh copy is gone before the other comes
        fresh = backbone.fingerprints(load_llm(path, device, dtype), tokenizer, task)
    llm = load_llm(path, device, dtype)
    net = load_adapter(args.run / "adapter.safetensors", llm, tokenizer, task, settings["official"])
    if args.llm:
        print(f"backbone found by --llm: {path}, whose weights are the run's", file=sys.stderr)
    if args.ask is not None:
        print(backbone.ask(net, args.ask))
        return
    if args.text is not None:
        paths = {"audio": args.audio, "video": args.video}
        row, notes = clip_row(net, args.text, paths, read_json(args.run / "features.json"))
        answer = one_clip(net, row) | {"notes": notes}
        print(json.dumps(answer, ensure_ascii=False, indent=1) if args.json else clip_text(answer))
        return
    data_dir = args.data_dir or settings["data_dir"] or HERE / task.home
    if args.split == "valid" and settings.get("valid_share"):
        train = load_split(task, data_dir, "train")
        _, split = divide(train, settings["valid_share"], settings["seed"])
    else:
        split = load_split(task, data_dir, args.split)
    if args.check_backbone:
        batch = collate(split, range(min(settings["eval_batch"], len(split))))
        print(backbone.check_backbone(net, fresh, batch))
    elif args.ablate:
        chosen = args.decode or settings["decode"], args.readout or settings["readout"]
        size, parts = settings["eval_batch"], variants(split)
        results = {name: evaluate(net, part, size, *chosen) for name, part in parts.items()}
        print(ablation_table(results))
    else:
        score_split(net, split, args.run, settings, args)

if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
