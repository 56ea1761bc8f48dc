"""One clip: what an adapter answers, and what each part changes; python eval.py RUN --text calls it."""
from pathlib import Path

import numpy as np

from adapter import MultimodalLLM
from data import FEATURES, Split, clean
from reports.tables import aligned, in_names
from support.files import UserError, brief, printable

MOST_FRAMES = 100_000                   # a file of a few bytes may claim to hold billions
ADVICE = {".npz": "numpy.load(FILE)[NAME]", ".csv": "numpy.loadtxt(FILE, delimiter=',')",
          ".txt": "numpy.loadtxt(FILE)", ".pt": "torch.load(FILE, weights_only=True).numpy()"}


def read_features(path, width: int) -> np.ndarray:
    """The numbers (frames, width) in a .npy file. Raises UserError if it holds anything else."""
    try:
        if not Path(path).is_file():    # a pipe would be waited for
            raise OSError("no file is there")
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
    features = {}
    for modality in FEATURES:
        path = paths[modality]
        width = getattr(net.adapter.config, f"{modality}_dim")
        features[modality] = [read_features(path, width)] if path else None
    row = clips(net, [text], **features)
    notes = []
    for modality in FEATURES:
        notes += oddities(row.features(modality, 0), modality, ranges)
    tokens = len(net.tokenizer.encode(text))
    if tokens > net.task.text_len:
        notes.append(f"text: of {tokens} tokens the first {net.task.text_len} are read")
    return row, notes


def clips(net: MultimodalLLM, texts: list, audio, video) -> Split:
    """Clips as a split without true labels. audio, video: an array (frames, features) or None for each text;
    None: of none. Raises UserError for other shapes."""
    given = {"audio": audio, "video": video}
    if isinstance(texts, str):
        raise UserError(f"one text, {texts!r:.60}; expected a list of texts")
    columns = {}
    for modality in FEATURES:
        width = getattr(net.adapter.config, f"{modality}_dim")
        arrays = given[modality]
        if arrays is None:
            arrays = [None] * len(texts)
        if len(arrays) != len(texts):
            raise UserError(f"{len(texts)} texts, but {len(arrays)} of {modality}; expected an array or None "
                            "for each")
        columns[modality] = []
        for number, x in enumerate(arrays):
            x = np.zeros((0, width)) if x is None else np.asarray(x)
            if x.ndim != 2 or x.shape[1] != width or x.dtype.kind not in "fiub":
                raise UserError(f"{modality} of clip {number} is {x.dtype} {x.shape}; expected numbers "
                                f"(frames, {width})")
            columns[modality].append(x)
        columns[f"{modality}_len"] = [len(x) for x in columns[modality]]
    label = net.task.values()[:1] * len(texts)          # nobody reads it
    return Split(list(texts), **columns, label=label, id=[str(number) for number in range(len(texts))])


def answers(result) -> list[dict]:
    """What the rows of a Result by label scoring are answered: see `predict` in eval.py."""
    task = result.task
    names = in_names(task, task.values())
    if not task.labels:
        means, stds = result.moments().tolist()
    found = []
    for row, p in enumerate(result.probabilities.tolist()):
        answer = {"label": names[np.argmax(p)], "probability": max(p)}
        if result.values[row] is None:  # not a number: the backbone's arithmetic broke
            answer["label"] = None
        if not task.labels:
            answer["mean"] = means[row]
            answer["std"] = stds[row]
        answer["probabilities"] = dict(zip(names, p))
        found.append(answer)
    return found


def clip_text(report: dict) -> str:
    """A clip's report for people: a line per label, a column for the clip and one without each part."""
    columns = [report, *report["changes"].values()]
    lines = [["", "clip", *report["changes"]]]
    lines.append(["answer", *[answer["label"] for answer in columns]])
    few = len(report["probabilities"]) < 10
    for name in report["probabilities"]:
        row = [answer["probabilities"][name] for answer in columns]
        if few or max(row) > 0.01:      # of 21 or 61 the likely ones
            lines.append([name, *[f"{p:.3f}" for p in row]])
    for key in ("mean", "std"):
        if key in report:
            lines.append([key, *[f"{answer[key]:.3f}" for answer in columns]])
    greedy = f"greedy answer: {report['greedy']}, written {report['written']!r}"
    return printable("\n".join([aligned(lines), greedy, *report["notes"]]))
