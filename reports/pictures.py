"""A run as a picture: how it learned, what it answers, what each modality is worth. Needs numpy alone."""
from html import escape
from math import ceil, floor, log10

import numpy as np

WIDTH, HEIGHT = 310, 200        # pixels of a plot; (0, 0) is its upper left corner
PANEL = 420, 310                # of a plot with its title and the numbers around it

STYLE = """<style>
.page{fill:#fff} text{fill:#1f2328} .dim{fill:#59636e} .title{font-size:14px;font-weight:600}
.mid{text-anchor:middle} .end{text-anchor:end}
.grid{fill:none;stroke:#d1d9e0} .chance{fill:none;stroke:#59636e;stroke-dasharray:5 4}
.line{fill:none;stroke:#0969da;stroke-width:2;stroke-linecap:round;stroke-linejoin:round}
.fill{fill:#0969da} .box{fill:#0969da;stroke:#d1d9e0}
.best{fill:#bc4c00} .interval{fill:none;stroke:#bc4c00;stroke-width:2}
@media (prefers-color-scheme:dark) {
.page{fill:#0d1117} text{fill:#e6edf3} .dim{fill:#9198a1} .grid{stroke:#30363d} .chance{stroke:#9198a1}
.line{stroke:#4493f8} .fill{fill:#4493f8} .box{fill:#4493f8;stroke:#30363d}
.best{fill:#f0883e} .interval{stroke:#f0883e}
}
</style>
"""


def report(log: list, select: str, best_epoch: int, chance, result, ablation) -> str:
    """A run as an SVG picture, for light and dark pages. What is no finite number is not drawn.

    log: a dict for each epoch, {"epoch": 1, "loss": 0.4, "losses": [0.5, 0.3], "valid_mae": 0.7}. "losses"
    are the steps', or means of as many steps each; without them "loss" stands for the whole epoch.
    select: the score that selects, "weighted_f1" or "mae". best_epoch: counted from 1.
    chance: what one answer for all validation rows scores (the commonest class, the mean intensity), or None.
    result: what the test rows' answers are, None as long as there are none. For classes {"names": n texts,
    "counts": (n, n + 1)}, row the true class, column the answered one, the last column for none. For
    intensities {"low": -3, "high": 3, "true": (rows,), "pred": (rows,)}; what is beyond stands at the end.
    ablation: {"all": (score, low, high), "without audio": ...}, the test rows' score that selects and its
    95 % interval; None as long as there is none.
    """
    panels = []
    if log:
        panels += [loss_panel(log), score_panel(log, select, best_epoch, chance)]
    if result and "counts" in result:
        panels.append(confusion_panel(**result))
    elif result:
        panels.append(scatter_panel(**result))
    if ablation:
        panels.append(ablation_panel(ablation, select))
    width, height = PANEL
    rows = ceil(len(panels) / 2)                # of two panels side by side
    picture = (f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {2 * width} {rows * height}" '
               f'font-family="system-ui, sans-serif" font-size="12">\n{STYLE}'
               '<rect class="page" width="100%" height="100%"/>\n')       # legible wherever it is shown
    for i, panel in enumerate(panels):
        x = i % 2 * width + 90
        y = i // 2 * height + 54
        picture += f'<g transform="translate({x},{y})">\n{panel}</g>\n'
    return picture + "</svg>\n"


# --- The panels ---------------------------------------------------------------------------------------------
def loss_panel(log: list) -> str:
    """The training loss by step."""
    epochs, losses = [], []
    for entry in log:
        steps = entry.get("losses") or [entry["loss"]]
        for i, loss in enumerate(steps, 1):
            epochs.append(entry["epoch"] - 1 + i / len(steps))
            losses.append(loss)
    # A loss of one step says little, and thousands of points make a band: means of neighbours instead.
    points = min(len(losses), 150)
    epochs = [part[-1] for part in np.array_split(epochs, points)]
    losses = [part.mean() for part in np.array_split(drawable(losses), points)]
    low, high = ends(losses)
    picture = title("training loss", f"by epoch; the last one's mean is {drawable(log[-1]['loss']):.4g}")
    picture += x_axis(0, len(log)) + y_axis(low, high)
    return picture + line(place(epochs, 0, len(log), WIDTH), place(losses, high, low, HEIGHT))


def score_panel(log: list, select: str, best_epoch: int, chance) -> str:
    """The validation score by epoch, the best epoch, and chance."""
    scores = drawable([entry[f"valid_{select}"] for entry in log])
    low, high = ends([*scores, chance])
    x = place(range(1, len(log) + 1), 0, len(log), WIDTH)
    y = place(scores, high, low, HEIGHT)
    level = place(chance, high, low, HEIGHT)
    best = best_epoch - 1
    about = f"best {scores[best]:.4f} at epoch {best_epoch}"
    picture = x_axis(0, len(log)) + y_axis(low, high)
    if np.isfinite(level):
        about += f"; dashed: one answer for all, {chance:.4f}"
        picture += f'<path class="chance" d="M0,{level}h{WIDTH}"/>\n'
    picture += line(x, y)
    if np.isfinite(y[best]):
        picture += f'<circle class="best" cx="{x[best]}" cy="{y[best]}" r="5"/>\n'
    return title(f"validation {in_words(select)}", about) + picture


def confusion_panel(names: list, counts) -> str:
    """Counts of each true class (row) by answered class (column)."""
    counts = np.asarray(counts)
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    across = WIDTH / (len(names) + 1)           # a cell
    down = HEIGHT / len(names)
    size = min(12, 0.6 * down, 0.35 * across)           # of the letters
    picture = title("truth by answer, test", "row: the true class; column: the answer; shade: share of row")
    picture += f'<g font-size="{size:.1f}">\n'
    for i, name in enumerate(names):
        base = (i + 0.5) * down + 0.35 * size           # the line that letters stand on
        picture += text(-8, base, short(name), "end")
        for j, count in enumerate(counts[i]):
            picture += box(j * across, i * down, across, down, shares[i, j])
            picture += text((j + 0.5) * across, base, f"{count}", "mid")
    for j, name in enumerate([*names, "none"]):
        label = text(4, 8, short(name), "end")
        x = (j + 0.5) * across
        picture += f'<g transform="translate({x:.1f},{HEIGHT + 8}) rotate(-35)">{label}</g>\n'
    return picture + "</g>\n"


def scatter_panel(low: float, high: float, true, pred) -> str:
    """A dot for each row at its true intensity and the answered one."""
    both = drawable([true, pred]).clip(low, high)               # (2, rows)
    x, y = both[:, np.isfinite(both).all(axis=0)]
    # Many rows share a place: it is drawn once, the darker the more there are.
    dots = np.stack((place(x, low, high, WIDTH), place(y, high, low, HEIGHT)))
    places, rows = np.unique(dots.round(), axis=1, return_counts=True)
    picture = title("answers by truth, test", "across: the true intensity; up: the answer; dashed: right")
    picture += x_axis(low, high) + y_axis(low, high)
    picture += f'<path class="chance" d="M0,{HEIGHT}L{WIDTH},0"/>\n'
    for x, y, n in zip(*places, rows):
        picture += f'<circle class="fill" cx="{x}" cy="{y}" r="2.5" opacity="{1 - 0.7**n:.2f}"/>\n'
    return picture


def ablation_panel(ablation: dict, select: str) -> str:
    """A bar for the score with everything, and for each modality less."""
    low, high = ends([0, *np.ravel(list(ablation.values()))])
    zero = place(0, low, high, WIDTH)
    room = HEIGHT / len(ablation)
    picture = title("what each modality is worth, test", f"{in_words(select)} with 95 % intervals")
    picture += x_axis(low, high)
    for i, (name, numbers) in enumerate(ablation.items()):
        score, least, most = drawable(numbers)
        stop, start, end = place(numbers, low, high, WIDTH)
        top = i * room
        middle = top + room / 2 + 8
        picture += text(2, top + 14, f"{name}: {score:.4f} [{least:.4f}, {most:.4f}]")
        if np.isfinite(stop):
            picture += box(min(zero, stop), top + 19, abs(stop - zero), room - 22)
        if np.isfinite(start + end):
            ticks = f"M{start},{middle - 4:.1f}v8M{end},{middle - 4:.1f}v8"
            picture += f'<path class="interval" d="M{start},{middle:.1f}H{end}{ticks}"/>\n'
    return picture


# --- Numbers to pixels --------------------------------------------------------------------------------------
def drawable(x) -> np.ndarray:
    """Numbers as an array, nan where they are too large to be drawn, infinite, or None."""
    x = np.array(x, float)
    return np.where(np.abs(x) < 1e9, x, np.nan)


def ends(values) -> tuple:
    """The least and the largest of the numbers; of equal ones half a unit around; of none 0 and 1."""
    values = drawable(values)
    values = values[np.isfinite(values)]
    if len(values) == 0:
        return 0, 1
    low, high = values.min(), values.max()
    if high - low < 1e-6:
        return low - 0.5, high + 0.5
    return low, high


def place(x, start: float, stop: float, size: float) -> np.ndarray:
    """Where numbers stand on `size` pixels that begin with the number `start` and end with `stop`."""
    return (size * (drawable(x) - start) / (stop - start)).round(1)


def marks(low: float, high: float) -> list:
    """Round numbers from low to high, up to seven: 0.13, 1 -> [0.2, 0.4, 0.6, 0.8, 1.0]."""
    step = 10 ** floor(log10((high - low) / 6))         # at most a sixth of the way
    for times in (2, 2.5, 2):                           # to 2, 5 and 10 times that
        if (high - low) / step > 6:
            step *= times
    first = ceil(low / step - 1e-9)
    last = floor(high / step + 1e-9)
    return [i * step for i in range(first, last + 1)]


# --- What a panel is drawn of -------------------------------------------------------------------------------
def in_words(select: str) -> str:
    words = select.replace("_", " ")
    if select == "mae":
        words += " (less is better)"
    return words


def short(name: str) -> str:
    """A class's name, cut to the room beside the plot."""
    most = 12
    if max(name, default="") > "\u2e80":            # Chinese characters are twice as wide
        most = 6
    return name if len(name) <= most else name[:most - 1] + "…"


def text(x: float, y: float, words: str, kind: str = "") -> str:
    """A line of text, without the control characters that no XML may hold."""
    words = "".join(c for c in words if c.isprintable())
    return f'<text class="{kind}" x="{x:.1f}" y="{y:.1f}">{escape(words)}</text>\n'


def title(words: str, about: str) -> str:
    return text(-76, -32, words, "title") + text(-76, -13, about, "dim")


def x_axis(low: float, high: float) -> str:
    """Numbers below the plot, with a faint line up from each."""
    picture = f'<path class="grid" d="M0,{HEIGHT}h{WIDTH}"/>\n'
    for mark in marks(low, high):
        x = place(mark, low, high, WIDTH)
        picture += f'<path class="grid" d="M{x},0v{HEIGHT}"/>'
        picture += text(x, HEIGHT + 18, f"{mark:.6g}", "dim mid")
    return picture


def y_axis(low: float, high: float) -> str:
    """Numbers left of the plot, with a faint line to the right of each."""
    picture = f'<path class="grid" d="M0,0v{HEIGHT}"/>\n'
    for mark in marks(low, high):
        y = place(mark, high, low, HEIGHT)
        picture += f'<path class="grid" d="M0,{y}h{WIDTH}"/>'
        picture += text(-8, y + 4, f"{mark:.6g}", "dim end")
    return picture


def line(x, y) -> str:
    """A line through the points, with a gap where one is nan; a point that stands alone is a dot."""
    path = ""
    pen = "M"                   # moves, and draws nothing
    for a, b in zip(x, y):
        if np.isnan(b):
            pen = "M"
        else:
            path += f"{pen}{a},{b}h0"
            pen = "L"
    return f'<path class="line" d="{path}"/>\n'


def box(x: float, y: float, width: float, height: float, shade: float = 1) -> str:
    """A rectangle, its shade from 0 to 1; text on the darkest is still legible."""
    return (f'<rect class="box" x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height:.1f}" '
            f'fill-opacity="{0.6 * shade:.2f}"/>\n')
