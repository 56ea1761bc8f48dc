"""One clip: what an adapter answers, and what each part changes; python eval.py RUN --text calls it."""
from pathlib import Path

import numpy as np

from adapter import MultimodalLLM
from data import FEATURES, Split, Task, clean
from reports.tables import aligned
from support.files import UserError, brief

MOST_FRAMES = 100_000                   # a file of a few bytes may claim to hold billions
ADVICE = {".npz": "numpy.load(FILE)[NAME]", ".csv": "numpy.loadtxt(FILE, delimiter=',')",
          ".txt": "numpy.loadtxt(FILE)", ".pt": "torch.load(FILE, weights_only=True).numpy()"}


def read_features(path, width: int) -> np.ndarray:
    """The numbers (frames, width) in a .npy file. Raises UserError if it holds anything else."""
    try:
        x = np.lib.format.open_memmap(path, mode="r")
    except Exception as error:          # whatever a damaged or hostile file provokes, it was refused
        array = ADVICE.get(Path(path).suffix, "ARRAY")
        raise UserError(f"{path}: not a .npy file of numbers ({brief(error)}); expected (frames, {width}), "
                        f"written by numpy.save('a.npy', {array})") from None
    is_table = x.ndim == 2 and x.shape[1] == width
    is_number = x.dtype.kind in "fiub"
    if not is_table or not is_number or not 0 < len(x) <= MOST_FRAMES:
        raise UserError(f"{path}: holds {x.dtype!s:.40} {x.shape!s:.40}; expected numbers (frames, {width}) "
                        f"of 1 to {MOST_FRAMES:,} frames")
    return x


def feature_range(split: Split) -> dict:
    """{"audio": [low, high], "video": ...}: each feature's least and largest value over all real frames."""
    ranges = {}
    for modality in FEATURES:
        lows, highs = [], []
        for row in range(len(split)):   # one row in memory
            x = split.frames(modality, row)
            if len(x) > 0:
                lows.append(x.min(axis=0))
                highs.append(x.max(axis=0))
        if lows:
            low = np.min(lows, axis=0)
            high = np.max(highs, axis=0)
            ranges[modality] = [low.tolist(), high.tolist()]
    return ranges


def oddities(x: np.ndarray, modality: str, ranges: dict) -> list:
    """What is strange about a clip's features: missing, not finite, or far outside those of training."""
    if len(x) == 0:
        return [f"{modality}: none given, taken as missing"]
    notes = []
    bad = np.count_nonzero(~np.isfinite(x))
    if bad:
        notes.append(f"{modality}: {bad} values are not finite and count as 0")
    if modality not in ranges:
        return [*notes, f"{modality}: not compared with the training data, whose range was not recorded"]
    try:
        table = np.array(ranges[modality], float)
        low, high = table.reshape(2, x.shape[1])
    except (TypeError, ValueError, OverflowError):
        raise UserError(f"features.json: the range of {modality} is {ranges[modality]!r:.80}; expected 2 "
                        f"lists of {x.shape[1]} numbers; train again") from None
    x = clean(x)
    beyond = np.maximum(low - x, x - high).max(axis=0)          # each feature's distance from its range
    far = np.flatnonzero(beyond > high - low)                   # further than that range is wide
    if len(far) > 0:
        k = far[0]
        values = x[:, k]
        notes.append(f"{modality}: {len(far)} of {len(low)} features are far outside the training data; "
                     f"feature {k} is {values.min():.4g} to {values.max():.4g}, "
                     f"there {low[k]:.4g} to {high[k]:.4g}")
    return notes


def clip_row(net: MultimodalLLM, text: str, paths: dict, ranges: dict) -> tuple:
    """A clip as a split of one row, and what is strange about it. paths: {modality: .npy file or None}."""
    features, notes = {}, []
    for modality in FEATURES:
        width = getattr(net.adapter.config, f"{modality}_dim")
        x = np.zeros((0, width))
        if paths[modality]:
            x = read_features(paths[modality], width)
        features[modality] = [x]
        features[f"{modality}_len"] = [len(x)]
        notes += oddities(x, modality, ranges)
    tokens = len(net.tokenizer.encode(text))
    if tokens > net.task.text_len:
        notes.append(f"text: of {tokens} tokens the first {net.task.text_len} are read")
    label = net.task.values()[:1]       # nobody reads it
    return Split([text], **features, label=label, id=["clip"]), notes


def clip_report(results: dict, task: Task) -> dict:
    """What the clip's results by label scoring say, {variant: Result}: the whole clip's answer, and those of
    the other variants as "changes"."""
    names = list(task.labels) or [f"{value:+.1f}" for value in task.values()]
    answers = {}
    for variant, result in results.items():
        p = result.probabilities[0]
        answer = {"label": names[p.argmax()], "probability": p.max()}
        if result.unparsed:             # not a number: the backbone's arithmetic broke
            answer["label"] = None
        if not task.labels:
            answer["mean"], answer["std"] = result.moments()[:, 0]
        answer["probabilities"] = dict(zip(names, p))
        answers[variant] = answer
    return {**answers.pop("all"), "changes": answers}


def clip_text(report: dict) -> str:
    """A clip's report for people: a line per label, a column for the clip and one without each part."""
    answers = [report, *report["changes"].values()]
    lines = [["", "clip", *report["changes"]]]
    lines.append(["answer", *[answer["label"] for answer in answers]])
    few = len(report["probabilities"]) < 10
    for name in report["probabilities"]:
        row = [answer["probabilities"][name] for answer in answers]
        if few or max(row) > 0.01:      # of 21 or 61 the likely ones
            lines.append([name, *[f"{p:.3f}" for p in row]])
    for key in ("mean", "std"):
        if key in report:
            lines.append([key, *[f"{answer[key]:.3f}" for answer in answers]])
    greedy = f"greedy answer {report['greedy']!r}"
    return "\n".join([aligned(lines), greedy, *report["notes"]])
