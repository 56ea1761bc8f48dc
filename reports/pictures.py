"""The curves of a run as a picture."""
import numpy as np


def curves(log: list, metric: str, best_epoch: int) -> str:
    """Loss, learning rate and validation score by epoch as an SVG picture, for light and dark pages."""
    titles = {"loss": "training loss",
              "learning_rate": "learning rate at the epoch's end",
              f"valid_{metric}": f"valid {metric}, best: epoch {best_epoch}".replace("_", " ")}
    picture = ('<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 840 200" font-family="sans-serif" '
               'font-size="12" fill="#777">\n')
    left = 60                           # of the panel, pixels from the picture's edge
    for key, title in titles.items():
        values = np.array([entry[key] for entry in log])
        picture += f'<g transform="translate({left})">{panel(title, values, best_epoch)}</g>\n'
        left += 280
    return picture + "</svg>\n"


def panel(title: str, values: np.ndarray, best_epoch: int) -> str:
    """One curve, 200 pixels wide and 120 high, with its axes and a dot at the best epoch."""
    low = values.min()
    high = values.max()
    x = np.linspace(0, 200, len(values))
    y = 160 - 120 * (values - low) / (high - low or 1)
    points = [f"{a:.1f},{b:.1f}" for a, b in zip(x, y)]
    best_x, best_y = points[best_epoch - 1].split(",")
    return (f'<text y="20">{title}</text>\n'
            f'<text x="-54" y="44">{high:.3g}</text> <text x="-54" y="164">{low:.3g}</text> '
            f'<text y="182">epoch 1 to {len(values)}</text> '
            f'<path d="M0 36V164H204" stroke="#777" fill="none"/>\n'
            f'<polyline points="{" ".join(points)}" stroke="#28d" fill="none"/> '
            f'<circle cx="{best_x}" cy="{best_y}" r="4" fill="#c50"/>')
