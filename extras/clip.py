"""One clip: what an adapter answers, and what each part changes; python eval.py RUN --text calls it."""
from pathlib import Path

import numpy as np

from adapter import MultimodalLLM
from data import FEATURES, Split, Task, clean
from extras.files import brief
from extras.report import aligned

MOST_FRAMES = 100_000                   # a file of a few bytes may claim to hold billions
ADVICE = {".npz": "numpy.load(FILE)[NAME]", ".csv": "numpy.loadtxt(FILE, delimiter=',')",
          ".txt": "numpy.loadtxt(FILE)", ".pt": "torch.load(FILE, weights_only=True).numpy()"}

def read_features(path, width: int) -> np.ndarray:
    """The numbers (frames, width) in a .npy file. Raises ValueError if it holds anything else."""
    try:
        x = np.lib.format.open_memmap(path, mode="r")
    except Exception as error:          # whatever a damaged or hostile file provokes, it was refused
        array = ADVICE.get(Path(path).suffix, "ARRAY")
        raise ValueError(f"{path}: not a .npy file of numbers ({brief(error)}); expected (frames, {width}), "
                         f"written by numpy.save('a.npy', {array})") from None
    if x.ndim != 2 or x.shape[1] != width or x.dtype.kind not in "fiub" or not 0 < len(x) <= MOST_FRAMES:
        raise ValueError(f"{path}: holds {x.dtype!s:.40} {x.shape!s:.40}; expected numbers (frames, {width}) "
                         f"of 1 to {MOST_FRAMES:,} frames")
    return x

def oddities(x: np.ndarray, modality: str, ranges: dict) -> list[str]:
    """What is strange about a clip's features: missing, not finite, or far outside those of training."""
    if len(x) == 0:
        return [f"{modality}: none given, taken as missing"]
    notes, bad = [], np.count_nonzero(~np.isfinite(x))
    if bad:
        notes.append(f"{modality}: {bad} values are not finite and count as 0")
    if modality not in ranges:
        return [*notes, f"{modality}: not compared with the training data, whose range was not recorded"]
    try:
        low, high = np.array(ranges[modality], float).reshape(2, x.shape[1])
    except (TypeError, ValueError, OverflowError):
        raise ValueError(f"features.json: the range of {modality} is {ranges[modality]!r:.80}; expected 2 "
                         f"lists of {x.shape[1]} numbers; train again") from None
    x = clean(x)
    outside = np.maximum(low - x, x - high).max(axis=0)         # of each feature, by how much
    far = np.flatnonzero(outside > high - low)                  # by more than all of its range
    if len(far) > 0:
        k = far[0]
        notes.append(f"{modality}: {len(far)} of {len(low)} features are far outside the training data; "
                     f"feature {k} is {x[:, k].min():.4g} to {x[:, k].max():.4g}, "
                     f"there {low[k]:.4g} to {high[k]:.4g}")
    return notes

def clip_row(net: MultimodalLLM, text: str, paths: dict, ranges: dict) -> tuple[Split, list[str]]:
    """A clip as a split of one row, and what is strange about it. paths: {modality: .npy file or None}."""
    columns, notes = {}, []
    for m in FEATURES:
        width = getattr(net.adapter.config, f"{m}_dim")
        x = read_features(paths[m], width) if paths[m] else np.zeros((0, width))
        columns |= {m: [x], f"{m}_len": [len(x)]}
        notes += oddities(x, m, ranges)
    tokens = len(net.tokenizer.encode(text))
    if tokens > net.task.text_len:
        notes.append(f"text: of {tokens} tokens the first {net.task.text_len} are read")
    return Split([text], **columns, label=net.task.values()[:1], id=["clip"]), notes  # nobody reads the label

def found(results: dict, task: Task) -> dict:
    """What the clip's results by label scoring say: the whole clip's answer; the others as "changes"."""
    names, answers = list(task.labels) or [f"{y:+.1f}" for y in task.values()], {}
    for part, result in results.items():
        p = result.probabilities
        answers[part] = {"label": names[p.argmax()], "probability": p.max()}
        if not task.labels:
            answers[part] |= zip(("mean", "std"), result.moments()[:, 0])
        answers[part]["probabilities"] = dict(zip(names, p[0]))
    return {**answers.pop("all"), "changes": answers}

def clip_text(found: dict) -> str:
    """What was found, for people: a line per label, a column for the clip and one without each part."""
    answers = [found, *found["changes"].values()]
    lines = [["", "clip", *found["changes"]], ["answer", *(answer["label"] for answer in answers)]]
    for name in found["probabilities"]:
        row = [answer["probabilities"][name] for answer in answers]
        if len(found["probabilities"]) < 10 or max(row) > 0.01:         # of 21 or 61 the likely ones
            lines.append([name, *(f"{p:.3f}" for p in row)])
    for key in ("mean", "std"):
        if key in found:
            lines.append([key, *(f"{answer[key]:.3f}" for answer in answers)])
    notes = [f"greedy answer {found['greedy']!r}", *found["notes"]]
    return "\n".join([aligned(lines), *notes])

