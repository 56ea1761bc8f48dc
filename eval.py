"""What a trained adapter answers, what that scores, and what the modalities are worth.

    python eval.py RUN                      score a run's test split: greedy answers, and label scoring
    python eval.py RUN --ablate             drop or shuffle audio and video, empty the text
    python eval.py RUN --text "Oh, great." --audio a.npy --video v.npy      one clip; --json for programs
    python eval.py RUN --ask "Once upon"    the frozen backbone's plain text
    python eval.py RUN --check-backbone     its logits with and without the adapter, bit by bit
    python eval.py --compare runs/demo*     runs by their validation score, with what differs between them

From Python:

    net = load_run("runs/demo-llm/1111")
    for answer in predict(net, ["Oh, great."], audio=[a], video=[v]):     # arrays (frames, features), or None
        print(answer["label"], answer["probability"])
"""
import argparse
import hashlib
import re
import sys
from dataclasses import dataclass, replace
from functools import cached_property
from math import nan
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from adapter import AdapterError, MultimodalLLM, load_adapter
from data import FEATURES, HERE, SPLITS, TASKS, Split, Task
from data import collate, find_llm, load_split, load_tokenizer, share_of, some_rows
from model import CheckpointError, KVCache, load_llm
from reports import backbone
from reports.clip import answers, clip_row, clip_text, clips
from reports.tables import aligned, comparison, in_names, in_words, read_record, side_by_side, truth_table
from reports.tables import write_results
from support.files import UserError, json_bytes, printable, read_json
from support.guards import check_device, run_program

# --- Answers: the LLM's text -> a number, or None -----------------------------------------------------------
CLASS = r"[0-9]+"                       # not \d, which takes "٣" too
INTENSITY = r"[+-]?[0-9]+(\.[0-9]+)?"
OFFICIAL = str.maketrans("–一", "--", "：:/(")          # the release's: two become "-", four go


def parse_answer(text: str, task: Task, official: bool = False) -> float | None:
    """The number that an answer is, in the task's range or not; None where it is anything but one number.

    Classes: digits only. Intensities: sign if any, digits, fraction if any ("+0.4", "-1"; not ".5", "1e0").
    official: as in the release, float(), for intensities after its replacements.
    """
    if official:
        if not task.labels:
            text = text.translate(OFFICIAL)
        try:
            return float(text)
        except ValueError:
            return None
    pattern = CLASS if task.labels else INTENSITY
    number = re.fullmatch(pattern, text.strip())
    return float(number[0]) if number else None


def in_range(value: float, task: Task) -> bool:
    """Whether a parsed answer is one of the task's classes, or an intensity within its range."""
    if task.labels:
        return value in task.values()
    low, high = task.range
    return low <= value <= high


# --- Metrics: (pred, true) -> {name: value}. A prediction that is None, nan or no class is wrong. -----------
def confusion(pred, true, n: int) -> np.ndarray:
    """(n, n + 1) counts: row the true class, column the predicted one, the last one for no class at all.

    pred [0, 1, 9], true [0, 0, 1], n 2  ->  [[1, 1, 0], [0, 0, 1]]
    """
    pred = np.asarray(pred, float)      # None becomes nan
    true = np.asarray(true, int)
    assert pred.shape == true.shape, f"{pred.shape} predictions for {true.shape} true classes"
    assert ((0 <= true) & (true < n)).all(), f"a true class is not one of 0..{n - 1}"
    is_class = np.isin(pred, np.arange(n))          # 2.5, -1 and nan are none
    pred = np.where(is_class, pred, n).astype(int)
    counts = np.zeros((n, n + 1), int)
    np.add.at(counts, (true, pred), 1)              # also where one pair comes several times
    return counts


def per_class(counts: np.ndarray) -> tuple:
    """Of each class in `counts`, as in scikit-learn: precision = hits / predicted, recall = hits / true,
    F1 = 2 hits / (predicted + true), 0 where that is 0 / 0, and support = true."""
    hits = counts.diagonal()
    predicted = counts[:, :-1].sum(axis=0)          # how often each class was answered
    true = counts.sum(axis=1)                       # how many rows are of it
    precision = hits / np.maximum(predicted, 1)     # where nothing was predicted there are no hits: 0
    recall = hits / np.maximum(true, 1)
    f1 = 2 * hits / np.maximum(predicted + true, 1)
    return precision, recall, f1, true


def class_metrics(pred, true) -> dict:
    """Emotion classes. accuracy (WA in IEMOCAP's papers): share of rows with pred = true; weighted_f1: the
    mean of the classes' F1 by support; macro_f1 and unweighted_accuracy (UA): the plain means of F1 and of
    recall over the classes that are true of any row. nan without rows."""
    rows = len(true)
    if rows == 0:
        return dict.fromkeys(("accuracy", "weighted_f1", "macro_f1", "unweighted_accuracy"), nan)
    n = int(np.max(true)) + 1           # a class above is never true: its weight is 0
    counts = confusion(pred, true, n)
    _, recall, f1, support = per_class(counts)
    return {
        "accuracy": float(counts.trace() / rows),
        "weighted_f1": float(f1 @ support / rows),
        "macro_f1": float(f1[support > 0].mean()),
        "unweighted_accuracy": float(recall[support > 0].mean()),
    }


def intensities(pred, true) -> np.ndarray:
    """(2, rows), pred and true, rounded to float32 as the release compares. Edges are rounded alike: a true
    0.4 is on the edge 0.4 be it stored as float32 or as 0.4000000000000001."""
    both = np.array([pred, true], float)
    assert both.ndim == 2 and np.isfinite(both[1]).all(), f"{both.shape}: ragged, or a truth is not finite"
    with np.errstate(over="ignore"):    # an answer of 1e300 becomes inf
        return both.astype(np.float32).astype(float)


def range_metrics(pred, true) -> dict:
    """Any intensities. mae: mean |pred - true|; corr: Pearson's r; r2: 1 - mean (true - pred)^2 / variance of
    true. nan where undefined: a prediction is no number, all are the same, or all true values are."""
    pred, true = intensities(pred, true)
    scores = {"mae": nan, "corr": nan, "r2": nan}
    if len(true) == 0 or np.isnan(pred).any():
        return scores
    # An answer without bounds (official) may be inf: then mae is inf, r2 -inf, and there is no corr.
    error = pred - true
    scores["mae"] = float(np.abs(error).mean())
    if np.ptp(true) == 0:               # largest - least
        return scores
    scores["r2"] = float(1 - (error**2).mean() / true.var())
    if np.isfinite(pred).all() and np.ptp(pred) > 0:
        scores["corr"] = float(np.corrcoef(pred, true)[0, 1])
    return scores


def bins(x, edges: list, right: bool = True):
    """The bin of each value, 0..len(edges), closed on the right or else on the left; nan is in none, -1.

    [-1, 0, 1] with the edge 0  ->  [0, 0, 1], or closed on the left [0, 1, 1]
    """
    number = np.digitize(x, np.float32(edges), right)
    return np.where(np.isnan(x), -1, number)


def whole(x, top: int):
    """Values clipped to [-top, top] and rounded half to even, as classes 0..2 top."""
    return np.round(np.clip(x, -top, top)) + top        # numpy rounds 0.5 to 0 and 1.5 to 2


def mosei_metrics(pred, true) -> dict:
    """CMU-MOSEI and CMU-MOSI, intensities -3..3. F1 is weighted by support, over the two bins of its acc2.

    has0_*: pred >= 0 against true >= 0, all rows; non0_*: pred > 0 against true > 0, rows with true != 0;
    acc5, acc7: equal after clipping to [-2, 2], [-3, 3] and rounding half to even;
    mae: mean |pred - true|; corr: Pearson's r, both unclipped (but `score` clips, unless official).
    """
    both = intensities(pred, true)                      # (2, rows)
    nonzero = both[:, both[1] != 0]                     # the rows whose truth is not 0
    has0 = class_metrics(*bins(both, [0], right=False))
    non0 = class_metrics(*bins(nonzero, [0]))
    errors = range_metrics(*both)
    return {
        "has0_acc2": has0["accuracy"],
        "has0_f1": has0["weighted_f1"],
        "non0_acc2": non0["accuracy"],
        "non0_f1": non0["weighted_f1"],
        "acc5": class_metrics(*whole(both, 2))["accuracy"],
        "acc7": class_metrics(*whole(both, 3))["accuracy"],
        "mae": errors["mae"],
        "corr": errors["corr"],
    }


SIMS_EDGES = [-0.7, -0.1, 0.1, 0.7]
SIMS_BINS = ["[-1,-.7]", "(-.7,-.1]", "(-.1,.1]", "(.1,.7]", "(.7,1]"]


def simsv2_metrics(pred, true) -> dict:
    """CH-SIMS v2, intensities -1..1: both sides are clipped to that first. Bins are closed on the right.

    acc2, f1: cut at 0, with 0 negative, F1 weighted by support; weak_acc2: of the rows with |true| <= 0.4;
    acc3: cut at -0.1, 0.1; acc5: cut at -0.7, -0.1, 0.1, 0.7;
    mae: mean |pred - true|; corr: Pearson's r; r2: 1 - mean (true - pred)^2 / variance of true.
    """
    both = np.clip(intensities(pred, true), -1, 1)      # (2, rows)
    weak = both[:, np.abs(both[1]) <= np.float32(0.4)]  # the rows whose truth is near 0
    two = class_metrics(*bins(both, [0]))
    return {
        "acc2": two["accuracy"],
        "f1": two["weighted_f1"],
        "weak_acc2": class_metrics(*bins(weak, [0]))["accuracy"],
        "acc3": class_metrics(*bins(both, [-0.1, 0.1]))["accuracy"],
        "acc5": class_metrics(*bins(both, SIMS_EDGES))["accuracy"],
        **range_metrics(*both),
    }


def metrics_of(task: Task):
    """The task's metrics: of classes, of intensities from below 0 to above it, within -1..1 or beyond, or
    of others, which have no 0 to cut at."""
    if task.labels:
        return class_metrics
    low, high = task.range
    if not low < 0 < high:
        return range_metrics
    if max(-low, high) <= 1:
        return simsv2_metrics
    return mosei_metrics


def bootstrap(metric, pred, true, seed: int = 0, draws: int = 1000) -> dict:
    """{name: (low, high)}: the 95 % percentile interval of each score of `metric`, over `draws` resamplings
    of the rows with replacement; a draw in which a score is nan does not count for that score. `pred` may be
    (rows, k): a metric that compares k systems gets the same rows of each."""
    pred = np.asarray(pred, float)
    true = np.asarray(true)
    assert len(pred) == len(true), f"{len(pred)} predictions for {len(true)} true values"
    rng = np.random.default_rng(seed)   # the same intervals each time
    # 1) score as many rows as there are, drawn with replacement, again and again
    scores = []
    for _ in range(draws):
        rows = rng.integers(len(true), size=len(true))
        scores.append(metric(pred[rows], true[rows]))
    # 2) leave out as many of the draws at each end
    intervals = {}
    for name in scores[0]:
        values = [draw[name] for draw in scores if not np.isnan(draw[name])] or [nan]
        values.sort()
        beyond = len(values) // 40      # 2.5 %
        intervals[name] = values[beyond], values[-1 - beyond]
    return intervals


# --- What a split's answers score ---------------------------------------------------------------------------
DECODE = ("greedy", "labels")           # what the LLM writes, as in the paper, or the labels' probabilities
READOUT = ("mean", "median", "mode")    # of those, for intensities; a class is always the most probable
DTYPES = ("auto", "float32", "bfloat16", "float16", "int8")


@dataclass
class Result:
    """A split's answers and what they score."""
    task: Task
    true: list
    answers: list                       # texts, in the split's order
    parsed: list                        # False where an answer is no number
    values: list                        # numbers as parsed; else None, official 0
    pred: np.ndarray                    # numbers as scored
    out_of_range: int = 0
    probabilities: np.ndarray | None = None     # (rows, labels), if labels were scored

    @property
    def unparsed(self) -> int:
        return self.parsed.count(False)

    @cached_property
    def scores(self) -> dict:
        return metrics_of(self.task)(self.pred, self.true)

    @cached_property
    def intervals(self) -> dict:
        return bootstrap(metrics_of(self.task), self.pred, self.true)

    @property
    def bias(self) -> float:
        """The mean error of intensities, pred - true: which way they lean."""
        errors = self.pred - np.array(self.true, float)
        return float(errors.mean())

    def counts(self) -> np.ndarray:
        """`confusion` of the answers as parsed, for classes."""
        return confusion(self.values, self.true, len(self.task.labels))

    def per_class(self) -> tuple:
        """Precision, recall, F1 and support of each class."""
        return per_class(self.counts())

    def moments(self) -> np.ndarray:
        """Mean and standard deviation of each row's intensity, (2, rows), if labels were scored."""
        return moments(self.probabilities, self.task)

    def picture(self) -> dict:
        """What reports/pictures.py draws of the answers."""
        if self.task.labels:
            return {"names": self.task.labels, "counts": self.counts()}
        low, high = self.task.range
        return {"low": low, "high": high, "true": self.true, "pred": self.pred}

    def line(self) -> str:
        """As "accuracy 0.5000, weighted f1 0.4500, macro f1 0.4000, unparsed 1/4, out of range 0/4"."""
        n = len(self.true)
        scores = in_words(self.scores)
        return f"{scores}, unparsed {self.unparsed}/{n}, out of range {self.out_of_range}/{n}"

    def table(self) -> str:
        """Truth by prediction, intensities in whole numbers or the bins of acc5; of classes also their F1."""
        task = self.task
        if task.labels:
            return truth_table(task.labels, self.counts(), self.per_class())
        both = intensities(self.values, self.true)
        if metrics_of(task) is simsv2_metrics:
            names = SIMS_BINS
            pred, true = bins(both, SIMS_EDGES)
        else:
            names = [f"{mark:g}" for mark in task.marks()]
            pred, true = task.nearest(both)
        return truth_table(names, confusion(pred, true, len(names)))


def score(answers: list, true: list, task: Task, official: bool = False) -> Result:
    """Parse and score. A class answer that did not parse or is no class is wrong. An intensity that did not
    parse is taken for 0; what is out of range, this 0 included, is taken for the range's end. official: each
    number as it reads, or 0."""
    values = [parse_answer(text, task, official) for text in answers]
    parsed = [value is not None for value in values]
    if official:
        values = [value if good else 0.0 for value, good in zip(values, parsed)]
    pred = np.array(values, float)      # None becomes nan
    if not official:
        pred[np.isnan(pred)] = -1 if task.labels else 0         # -1 is no class
        if not task.labels:
            pred = pred.clip(*task.range)
    out_of_range = sum(value is not None and not in_range(value, task) for value in values)
    return Result(task, true, answers, parsed, values, pred, out_of_range)


def score_labels(probabilities: np.ndarray, true: list, task: Task, readout: str = "mean") -> Result:
    """Score the probabilities (rows, labels): the most probable class; an intensity's mean, median or mode.

    The median is the least intensity with at least half of the probability on it or below. A row of nan is
    an answer that does not parse.
    """
    labels = np.array(task.values())
    broken = np.isnan(probabilities).any(axis=1)
    # The most probable label is scored as if the LLM had written it.
    mode = labels.astype(str)[probabilities.argmax(axis=1)]
    answers = np.where(broken, "", mode)
    result = score(answers.tolist(), true, task)
    result.probabilities = probabilities
    if task.labels or readout == "mode":
        return result
    # Of an intensity there is more to read out than that.
    if readout == "mean":
        pred, _ = moments(probabilities, task)
    else:
        half = probabilities.cumsum(axis=1) >= 0.5 - 1e-9       # rounding may leave a sum a little below
        pred = labels[half.argmax(axis=1)]      # the first that is True
    result.pred = np.where(broken, result.pred, pred)
    result.values = [None if bad else value for bad, value in zip(broken, pred.tolist())]
    return result


def moments(probabilities: np.ndarray, task: Task) -> np.ndarray:
    """Mean and standard deviation of each row's intensity, (2, rows)."""
    labels = np.array(task.values())
    mean = probabilities @ labels
    variance = probabilities @ labels**2 - mean**2
    std = np.sqrt(variance.clip(min=0))                 # rounding may leave it below 0
    return np.stack((mean, std))


# --- Evaluation ---------------------------------------------------------------------------------------------
@torch.no_grad()
def label_logprobs(net: MultimodalLLM, batch):
    """Log-probabilities (B, labels) of the task's legal labels behind each row, normalised over them.

    A label is a path in a tree of tokens; labels that begin alike share a branch:
        "-0.1", "-0.2", "0.1"  ->  - 0 . 1
                                       \\ 2
                                   0 . 1
    A label's log-probability is the sum over its path. Each row is read once, and each branch once behind it.
    """
    B = len(batch.text)
    x, real, _ = net.rows(batch)
    cache = KVCache(net.llm.config.n_layer)
    hidden = net.llm(x, real, cache, last=1)                                    # (B, 1, C)
    scores = torch.zeros(B, len(net.labels), device=x.device)

    def follow(labels: dict, path, hidden, cache):
        """Score the labels of one branch, {a label's number: its tokens behind the branch}.

        path (B,): the branch's log-probability; hidden (B, 1, C): the state after its last token.
        """
        logits = net.llm.logits(hidden[:, 0])
        logprobs = logits.log_softmax(dim=-1)                                   # of the next token, (B, V)
        for token in sorted({tokens[0] for tokens in labels.values()}):
            longer_path = path + logprobs[:, token]
            longer = {}
            for number, tokens in labels.items():
                if tokens == [token]:
                    scores[:, number] = longer_path             # here a label ends
                elif tokens[0] == token:
                    longer[number] = tokens[1:]
            if longer:
                x = net.llm.embed(net.tensor([[token]] * B))                    # (B, 1, C)
                longer_cache = cache.copy()
                longer_hidden = net.llm(x, None, longer_cache)
                follow(longer, longer_path, longer_hidden, longer_cache)

    follow(dict(enumerate(net.labels)), 0, hidden, cache)
    return scores.log_softmax(dim=-1)


def rows_by_length(net: MultimodalLLM, split: Split, size: int) -> list:
    """Row numbers of each batch, sorted by the tokens of their texts: like lengths need little padding."""
    lengths = [len(net.tokenizer.encode(text)) for text in split.text]
    order = sorted(range(len(split)), key=lengths.__getitem__)
    return [order[i:i + size] for i in range(0, len(order), size)]


def evaluate(net: MultimodalLLM, split: Split, size: int, decode="greedy", readout="mean") -> Result:
    """Answer and score a split, `size` rows at a time. decode, readout: see DECODE, READOUT.

    Leaves the net in evaluation mode: whoever trains on calls net.train().
    """
    if isinstance(net, torch.nn.Module):        # whatever else answers has no such mode
        net.eval()
    outputs = [None] * len(split)       # in the split's order, whatever the batches'
    batches = rows_by_length(net, split, size)
    for rows in tqdm(batches, f"{decode} answers", leave=False, disable=None):
        batch = collate(split, rows)
        if decode == "greedy":
            answers = net.answer(batch)
        else:
            answers = label_logprobs(net, batch)
        for row, answer in zip(rows, answers):
            outputs[row] = answer
    if decode == "greedy":
        return score(outputs, split.label, net.task, net.official)
    probabilities = torch.stack(outputs).exp().cpu().double().numpy()           # (rows, labels)
    return score_labels(probabilities, split.label, net.task, readout)


def evaluate_all(net: MultimodalLLM, split: Split, size: int, decode="greedy", readout="mean") -> dict:
    """{name: Result} of every way to answer, the asked one first: "greedy", and "labels" for classes or
    "labels mean", "labels median", "labels mode" for intensities."""
    results = {"greedy": evaluate(net, split, size)}
    labels = evaluate(net, split, size, "labels")
    for name in READOUT:                # for classes three times the same
        result = score_labels(labels.probabilities, split.label, net.task, name)
        results[way(net.task, "labels", name)] = result
    first = way(net.task, decode, readout)
    return {first: results[first]} | results


def way(task: Task, decode: str, readout: str) -> str:
    """A way to answer by its name: "greedy", "labels", "labels median"."""
    if decode == "greedy" or task.labels:
        return decode
    return f"labels {readout}"


# --- What looks wrong with the answers ----------------------------------------------------------------------
def collapsed(result: Result) -> str:
    """A warning if the answers hardly differ, with what their one value alone would score; or "".

    Classes: more than 95 % of the answers are the same one, or none. Intensities: the predictions' standard
    deviation is below 5 % of the labels'.
    """
    task = result.task
    n = len(result.true)
    if task.labels:
        names = [*task.labels, "no class"]
        counts = result.counts().sum(axis=0)    # of each of these answers
        value = counts.argmax()
        hardly = counts[value] > 0.95 * n
        what = f"{names[value]!r} is {counts[value]} of {n} answers; that answer"
    else:
        value = result.pred.mean()
        spread = result.pred.std()
        wanted = np.std(result.true)
        hardly = spread < 0.05 * wanted
        what = f"the predictions' standard deviation is {spread:.3g}, the labels' {wanted:.3g}; their mean"
    if not hardly:
        return ""
    alone = metrics_of(task)(np.full(n, value), result.true)
    return f"looks collapsed: {what} alone scores {in_words(alone)}"


ZERO_IS = {
    "has0_acc2": ", to which 0 is positive",
    "acc2": ", to which 0 is negative",
}


def unparsed_note(result: Result) -> str:
    """What unparsed intensities do to the first score, where they are more than 2 % of the rows; or ""."""
    task = result.task
    n = len(result.true)
    if task.labels or result.unparsed <= 0.02 * n:
        return ""
    zero = result.pred[result.parsed.index(False)]
    note = f"{result.unparsed} of {n} answers ({result.unparsed / n:.1%}) do not parse and count as {zero:g}"
    if result.unparsed == n:
        return note
    name, score = next(iter(result.scores.items()))
    true = np.array(result.true)
    without = metrics_of(task)(result.pred[result.parsed], true[result.parsed])
    return (f"{note}: {name.replace('_', ' ')}{ZERO_IS.get(name, '')}, is {score:.4f} with them, "
            f"{without[name]:.4f} without them")


def alarms(result: Result) -> list[str]:
    """What looks wrong with the answers, a line each."""
    return [line for line in (collapsed(result), unparsed_note(result)) if line]


# --- What the modalities are worth --------------------------------------------------------------------------
def variants(split: Split) -> dict:
    """The split as it is, with modalities missing, with one's features in other rows, and without text."""
    parts = {"all": split}
    groups = [[kind] for kind in FEATURES]
    for kinds in [*groups, FEATURES]:           # each alone, and all of them
        missing = {f"{kind}_len": [0] * len(split) for kind in kinds}       # length 0: see SequenceEncoder
        parts["without " + " and ".join(kinds)] = replace(split, **missing)
    order = np.random.RandomState(0).permutation(len(split))
    moved = some_rows(split, order)
    for kind in FEATURES:
        shuffled = {name: getattr(moved, name) for name in (kind, f"{kind}_len")}
        parts[f"{kind} shuffled"] = replace(split, **shuffled)
    parts["text empty"] = replace(split, text=[""] * len(split))
    return parts


def one_clip(net: MultimodalLLM, row: Split) -> dict:
    """`predict` of a split of one row, with the greedy answer, and as "changes" again without each part."""
    missing = [kind for kind in FEATURES if getattr(row, f"{kind}_len")[0] == 0]
    changes = {}
    for name, part in variants(row).items():
        shuffled = "shuffled" in name       # one row has no other's features to take
        if not shuffled and not any(kind in name for kind in missing):
            changes[name] = answers(evaluate(net, part, 1, "labels"))[0]
    report = changes.pop("all")
    greedy = evaluate(net, row, 1)
    report["greedy"] = in_names(net.task, greedy.values)[0]
    report["written"] = greedy.answers[0]
    return report | {"changes": changes}


def ablation(net: MultimodalLLM, split: Split, size: int, decode="greedy", readout="mean"):
    """Yields (name, Result) for each modality dropped from the same trained model, and for both."""
    for name, part in variants(split).items():
        if name.startswith("without"):
            yield name, evaluate(net, part, size, decode, readout)


def ablation_table(results: dict) -> str:
    """Of each variant the first score and the one that selects, and their differences to `all`."""
    everything = results["all"]
    metric = metrics_of(everything.task)
    first = next(iter(everything.scores))
    names = dict.fromkeys((first, everything.task.select))          # twice the same counts once

    def difference(pred, true):         # pred (rows, 2): everything's and the variant's
        before, after = (metric(system, true) for system in pred.T)
        return {name: after[name] - before[name] for name in names}

    head = [""]
    for name in names:
        head += [name.replace("_", " "), "difference [95 % interval]"]
    lines = [[*head, "unparsed"]]
    for variant, result in results.items():
        pairs = np.stack((everything.pred, result.pred), axis=1)
        line = [variant]
        for name, (low, high) in bootstrap(difference, pairs, result.true).items():
            score = result.scores[name]
            change = score - everything.scores[name]
            line.append(f"{score:.4f}")
            line.append(f"{change:+.4f} [{low:+.4f}, {high:+.4f}]")
        line.append(f"{result.unparsed}/{len(result.true)}")
        lines.append(line)
    return aligned(lines)


# --- A run's folder -----------------------------------------------------------------------------------------
# What evaluation needs of a run's settings.json: each value's type and, where not all will do, which ones.
RECORDED = {
    "data": str,
    "data_dir": str | None,
    "llm": str | None,
    "official": bool,
    "decode": str,
    "readout": str,
    "eval_batch": int,
    "device": str,
    "dtype": str,
}
CHOICES = {
    "data": TASKS,
    "decode": DECODE,
    "readout": READOUT,
    "eval_batch": range(1, 2**32),
    "dtype": DTYPES[1:],
    "seed": range(2**32),
}


CODE = ("adapter.py", "data.py", "eval.py", "model.py", "train.py")     # a fork names its further files, too


def code_digests() -> dict:
    """{file: digest} of the code that shapes a run; what only prints and draws is left out."""
    digests = {}
    for file in [*(HERE / name for name in CODE), *sorted(HERE.glob("support/*.py"))]:
        name = file.relative_to(HERE).as_posix()
        digests[name] = hashlib.sha256(file.read_bytes()).hexdigest()[:16]
    return digests


def edited(settings: dict, now: dict) -> list[str]:
    """The files of code that are not any more what they were when a run began. now: code_digests."""
    began = settings.get("code")
    if not isinstance(began, dict):
        return ["its version"]
    # A file that is new in `now` matters only if one of the others uses it.
    return [name for name, digest in began.items() if now.get(name) != digest]


def read_settings(file: Path) -> dict:
    """A run's settings, valid_share 0 where it has none. Raises UserError for what no run writes."""
    if not file.is_file():
        raise UserError(f"{file}: not there; expected the folder of one run of train.py, OUT/SEED")
    settings = {"valid_share": 0.0, "seed": None} | read_json(file, RECORDED)
    types = RECORDED | {"valid_share": float}
    if settings["valid_share"] != 0:
        types["seed"] = int             # it draws the validation rows
    for key, kind in types.items():
        value = settings[key]
        fits = isinstance(value, kind) and len(str(value)) < 999
        if fits and key in CHOICES:
            fits = value in CHOICES[key]
        if fits and key == "valid_share":
            fits = 0 <= value <= 1
        if key == "data" and isinstance(value, str) and not fits:
            raise UserError(f"{file}: the task {value!r:.80} is not in TASKS of data.py; add its entry again")
        if not fits:
            raise UserError(f"{file}: {key} is {value!r:.80}, which no run writes; copy the file again")
    return settings


def load_backbone(settings: dict, device=None, llm=None):
    """A run's backbone and tokenizer; llm: its folder, if it was moved."""
    device = device or settings["device"]
    check_device(device)
    path = find_llm(llm or settings["llm"] or TASKS[settings["data"]].llm)
    dtype = getattr(torch, settings["dtype"])
    return load_llm(path, device, dtype), load_tokenizer(path)


def load_run(folder, device=None, llm=None) -> MultimodalLLM:
    """The net of a run of train.py, OUT/SEED, with its best adapter, ready to answer.

    device: "cpu", "cuda", ..., by default the run's. llm: where the backbone lies now, if it was moved.
    Raises UserError, CheckpointError or AdapterError if something is missing or not the run's.
    """
    folder = Path(folder)
    settings = read_settings(folder / "settings.json")
    frozen, tokenizer = load_backbone(settings, device, llm)
    task = TASKS[settings["data"]]
    return load_adapter(folder / "adapter.safetensors", frozen, tokenizer, task, settings["official"])


def predict(net: MultimodalLLM, texts: list, audio=None, video=None) -> list[dict]:
    """What clips are answered by label scoring, a dict each: "label" (a class's name, or an intensity like
    "+0.4"), its "probability", and "probabilities" {label: p}; of intensities also "mean" and "std".

    audio, video: for each text an array (frames, features) like those of training, or None where it is
    missing; None: of all. Raises UserError for other shapes.
    """
    if len(texts) == 0:
        return []
    return answers(evaluate(net, clips(net, texts, audio, video), 32, "labels"))


def read_rows(task: Task, settings: dict, args) -> Split:
    """The split to score; validation rows may have been drawn from the training rows."""
    data_dir = args.data_dir or settings["data_dir"] or HERE / task.home
    if args.split == "valid" and settings["valid_share"]:
        train = load_split(task, data_dir, "train")
        valid, _ = share_of(train, settings["valid_share"], settings["seed"], left=1)
        return valid
    return load_split(task, data_dir, args.split)


def score_split(net: MultimodalLLM, split: Split, run: Path, settings: dict, args):
    """Print and write what a split scores: first as the run was selected, then in the other ways."""
    size = settings["eval_batch"]
    readout = args.readout or settings["readout"]
    if args.decode is None:
        results = evaluate_all(net, split, size, settings["decode"], readout)
    else:
        result = evaluate(net, split, size, args.decode, readout)
        results = {way(net.task, args.decode, readout): result}
    name, first = next(iter(results.items()))
    best = "unknown"
    record = run / "results.json"
    if record.is_file():
        best = printable(str(read_json(record).get("best_epoch")))
    print(f"{args.split} (best epoch {best}): {first.line()}")
    for alarm in alarms(first):
        print(alarm)
    print(f"\n{side_by_side(results)}\n\n{name}:\n{first.table()}\n", flush=True)
    out = args.out or run
    try:
        out.mkdir(parents=True, exist_ok=True)
        write_results(out, split, results, f"-{args.split}")    # the run's own record, without ending, stays
        print(f"wrote {out}/metrics-{args.split}.json and predictions-{args.split}.csv")
    except OSError as error:
        if args.out:
            raise
        # The run's folder may be another's, who lets us read it.
        print(f"nothing was written: {error}; --out FOLDER takes the files", file=sys.stderr)


def answer_clip(net: MultimodalLLM, run: Path, args) -> str:
    """What is found of the clip on the command line, for people or as JSON."""
    paths = {kind: getattr(args, kind) for kind in FEATURES}
    ranges = read_json(run / "features.json")
    row, notes = clip_row(net, args.text, paths, ranges)
    report = one_clip(net, row)
    report["notes"] = notes
    if args.json:
        return json_bytes(report, indent=1).decode()
    return clip_text(report)


def compare(folders: list) -> str:
    """Finished runs beside each other; a folder is a run's, or holds those of several seeds."""
    runs = {}
    for folder in folders:
        files = [folder / "results.json"]
        if not files[0].is_file():
            files = sorted(folder.glob("*/results.json"))
        for file in files:
            runs[printable(str(file.parent))] = read_record(file)
    if not runs:
        raise UserError(f"{' '.join(map(str, folders)):.200}: no finished run; expected folders of train.py")
    return comparison(runs)


# --- Command line -------------------------------------------------------------------------------------------
def count(text: str) -> int:
    if not 0 < int(text) < 10**9:
        raise argparse.ArgumentTypeError(f"{text:.40} is not above 0 and below a billion")
    return int(text)


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, nargs="+", help="folder of a run of train.py")
    parser.add_argument("--compare", action="store_true", help="several runs, by their validation score")
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
    parser.add_argument("--eval-batch", type=count, help="rows at a time when answering [the run's]")
    parser.add_argument("--out", type=Path, help="folder of what is written [the run's]")
    args = parser.parse_args()
    if len(args.run) > 1 and not args.compare:
        parser.error("several runs are for --compare")
    given = [kind for kind in FEATURES if getattr(args, kind)]
    if args.text is None and (given or args.json):
        parser.error("--audio, --video and --json belong to --text, which may be empty")
    return args


def main():
    args = parse_args()
    if args.compare:
        print(compare(args.run))
        return

    # 1) what the run was
    run = args.run[0]
    settings = read_settings(run / "settings.json")
    if args.eval_batch:
        settings["eval_batch"] = args.eval_batch
    task = TASKS[settings["data"]]
    changed = ", ".join(edited(settings, code_digests()))
    if changed:
        print(printable(f"the run is of other code ({changed} changed since): its answers may differ"),
              file=sys.stderr)

    # 2) its backbone, and its adapter in front of that
    if args.check_backbone:             # the fresh copy is gone before the other comes
        fresh = backbone.fingerprints(*load_backbone(settings, args.device, args.llm), task)
    net = load_run(run, args.device, args.llm)
    if args.llm:
        print(f"backbone found by --llm: {args.llm}, whose weights are the run's", file=sys.stderr)

    # 3) what needs no data set
    if args.ask is not None:
        print(printable(backbone.ask(net, args.ask)))
        return
    if args.text is not None:
        print(answer_clip(net, run, args))
        return

    # 4) what does
    split = read_rows(task, settings, args)
    size = settings["eval_batch"]
    if args.check_backbone:
        batch = collate(split, range(min(size, len(split))))
        print(backbone.check_backbone(net, fresh, batch, collate(split, [0])))
    elif args.ablate:
        decode = args.decode or settings["decode"]
        readout = args.readout or settings["readout"]
        parts = variants(split)
        results = {name: evaluate(net, parts[name], size, decode, readout) for name in parts}
        print(ablation_table(results))
    else:
        score_split(net, split, run, settings, args)


if __name__ == "__main__":
    run_program(main, CheckpointError, AdapterError)
