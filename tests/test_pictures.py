"""The pictures of a run: numbers stand where they belong, and nothing in a file can break them."""
import re
from math import inf, isnan, nan
from pathlib import Path
from xml.etree import ElementTree

import pytest

from reports.pictures import HEIGHT, PANEL, WIDTH, marks, report

LOG = [{"epoch": 1, "loss": 0.75, "losses": [1.0, 0.5], "valid_weighted_f1": 0.2},
       {"epoch": 2, "loss": 0.25, "losses": [0.5, 0.0], "valid_weighted_f1": 0.6}]


def panels(*inputs):
    """{a panel's title: its elements}, and the picture. Fails if the picture is no XML."""
    text = report(*inputs).replace(' xmlns="http://www.w3.org/2000/svg"', "")           # short names in searches
    picture = ElementTree.fromstring(text.encode())
    parts = {panel.findtext("text"): panel for panel in picture.findall("g")}
    return parts, picture


def texts(panel, kind: str) -> list:
    """[(x, y, text)] of a panel's texts of one kind, in order."""
    found = []
    for text in panel.iter("text"):
        if text.get("class") == kind:
            found.append((float(text.get("x")), float(text.get("y")), text.text))
    return found


def numbers(element, *names) -> list:
    """Attributes of an element as numbers."""
    return [float(element.get(name)) for name in names]


def points(panel) -> list:
    """[(x, y)] of a panel's line."""
    path = panel.find("path[@class='line']").get("d")
    return [(float(x), float(y)) for x, y in re.findall(r"([-\d.]+),([-\d.]+)", path)]


def test_loss_by_step_score_by_epoch_and_chance():
    parts, _ = panels(LOG, "weighted_f1", 2, -0.2, None, None)
    loss, score = parts.values()
    quarter = WIDTH / 4                                     # half an epoch
    assert points(loss) == [(quarter, 0), (2 * quarter, HEIGHT / 2), (3 * quarter, HEIGHT / 2), (WIDTH, HEIGHT)]
    assert points(score) == [(WIDTH / 2, HEIGHT / 2), (WIDTH, 0)]           # 0.2 and 0.6 of -0.2 to 0.6
    assert numbers(score.find("circle"), "cx", "cy") == [WIDTH, 0]       # the best epoch
    assert score.find("path[@class='chance']").get("d") == f"M0,{HEIGHT}.0h{WIDTH}"
    assert texts(score, "dim")[0][2] == "best 0.6000 at epoch 2; dashed: one answer for all, -0.2000"


def test_an_axis_says_where_its_numbers_are():
    parts, _ = panels(LOG, "weighted_f1", 2, None, None, None)
    score = parts["validation weighted f1"]
    left = {text: y - 4 for x, y, text in texts(score, "dim end")}          # letters stand 4 pixels lower
    below = {text: x for x, y, text in texts(score, "dim mid")}
    assert left["0.2"] == HEIGHT and left["0.4"] == HEIGHT / 2 and left["0.6"] == 0
    assert below["0"] == 0 and below["1"] == WIDTH / 2 and below["2"] == WIDTH
    assert score.find("path[@class='chance']") is None


@pytest.mark.parametrize("ends, expected", [
    ((0.13, 1), [0.2, 0.4, 0.6, 0.8, 1]), ((-3, 3), [-3, -2, -1, 0, 1, 2, 3]), ((0, 50), [0, 10, 20, 30, 40, 50]),
    ((0.1, 0.3), [0.1, 0.15, 0.2, 0.25, 0.3]), ((0, 2610), [0, 500, 1000, 1500, 2000, 2500]),
    ((-0.6, -0.2), [-0.6, -0.5, -0.4, -0.3, -0.2]),
])
def test_marks_are_round(ends, expected):
    assert marks(*ends) == pytest.approx(expected)


def test_thousands_of_steps_become_means():
    log = [{"epoch": 1, "loss": 1.0, "losses": [0.0, 2.0] * 1500, "valid_mae": 1.0},
           {"epoch": 2, "loss": 1.0, "losses": [1.0, 1.0] * 1500, "valid_mae": 1.0}]
    parts, _ = panels(log, "mae", 1, None, None, None)
    drawn = points(parts["training loss"])
    assert len(drawn) == 150 and {y for x, y in drawn} == {HEIGHT / 2} and drawn[-1][0] == WIDTH


def test_the_heat_map_counts_each_class_by_each_answer():
    counts = [[6, 2, 0], [1, 0, 3]]
    parts, _ = panels([], "weighted_f1", 0, None, {"names": ["joy", "愤怒"], "counts": counts}, None)
    panel = parts["truth by answer, test"]
    cells = texts(panel, "mid")
    assert [text for x, y, text in cells] == ["6", "2", "0", "1", "0", "3"]
    for i, box in enumerate(panel.iter("rect")):
        x, y, width, height = numbers(box, "x", "y", "width", "height")
        row, column = divmod(i, 3)
        assert (x, y) == pytest.approx((column * WIDTH / 3, row * HEIGHT / 2), abs=0.1)
        assert x < cells[i][0] < x + width and y < cells[i][1] < y + height          # its number is inside
        share = counts[row][column] / sum(counts[row])
        assert float(box.get("fill-opacity")) == pytest.approx(0.6 * share, abs=0.01)
    rows = [(y, text) for x, y, text in texts(panel, "end")]
    assert [text for y, text in rows] == ["joy", "愤怒", "joy", "愤怒", "none"]      # of rows, then of columns
    assert rows[0][0] == cells[0][1] and rows[1][0] == cells[3][1]


def test_a_dot_for_each_intensity():
    result = {"low": -1, "high": 1, "true": [-1, 0, 0, 1], "pred": [1, 0, 0, -7.5]}
    parts, _ = panels([], "mae", 0, None, result, None)
    dots = {}
    for dot in parts["answers by truth, test"].iter("circle"):
        x, y, opacity = numbers(dot, "cx", "cy", "opacity")
        dots[x, y] = opacity
    assert set(dots) == {(0, 0), (WIDTH / 2, HEIGHT / 2), (WIDTH, HEIGHT)}          # an answer beyond: at the end
    assert dots[WIDTH / 2, HEIGHT / 2] > dots[0, 0]                                 # two rows are there


def test_a_bar_is_as_long_as_its_score_and_carries_its_interval():
    ablation = {"all": (0.8, 0.6, 1.0), "without audio": (0.4, 0.35, 0.5), "without video": (0.2, 0.1, 0.25)}
    parts, _ = panels([], "weighted_f1", 0, None, None, ablation)
    panel = parts["what each modality is worth, test"]
    bars = list(panel.iter("rect"))
    assert [numbers(bar, "x", "width") for bar in bars] == [[0, 0.8 * WIDTH], [0, 0.4 * WIDTH], [0, 0.2 * WIDTH]]
    for (_, low, high), bar, path in zip(ablation.values(), bars, panel.findall("path[@class='interval']")):
        start, y, stop = map(float, re.match(r"M([-\d.]+),([-\d.]+)H([-\d.]+)", path.get("d")).groups())
        assert (start, stop) == pytest.approx((low * WIDTH, high * WIDTH))
        top, height = numbers(bar, "y", "height")
        assert y == pytest.approx(top + height / 2, abs=0.2)
    assert [text for x, y, text in texts(panel, "")][1] == "without audio: 0.4000 [0.3500, 0.5000]"


def test_below_zero_a_bar_goes_to_the_left():
    parts, _ = panels([], "corr", 0, None, None, {"all": (1, 1, 1), "text empty": (-1, -1, -1)})
    bars = [numbers(bar, "x", "width") for bar in parts["what each modality is worth, test"].iter("rect")]
    assert bars == [[WIDTH / 2, WIDTH / 2], [0, WIDTH / 2]]


def test_names_are_text_whatever_they_hold():
    names = ["<b>&\ud800", "a\x00\x0b'\"]]>", "a very long name", "一二三四五六七", ""]
    result = {"names": names, "counts": [[1] * 6] * 5}
    parts, picture = panels(LOG, "weighted_f1", 2, None, result, {"<i>&": (1, 1, 1)})
    shown = [text for x, y, text in texts(parts["truth by answer, test"], "end")]
    assert shown[:4] == ["<b>&", "a'\"]]>", "a very long…", "一二三四五…"]
    assert texts(parts["what each modality is worth, test"], "")[0][2].startswith("<i>&: ")
    assert not {"script", "b", "i", "image", "a"} & {element.tag for element in picture.iter()}


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("bad", [nan, inf, -inf, 1e300, None])            # None: as JSON has it
def test_what_is_no_number_is_not_drawn(bad):
    log = [{"epoch": 1, "loss": 1.0, "losses": [0.0, bad, 1.0], "valid_mae": 0.5},
           {"epoch": 2, "loss": bad, "valid_mae": bad}, {"epoch": 3, "loss": 0.5, "valid_mae": 0.7}]
    result = {"low": -1, "high": 1, "true": [0, 0], "pred": [bad, 0]}
    parts, picture = panels(log, "mae", 1, bad, result, {"all": (bad, bad, bad), "without audio": (0.5, 0.4, bad)})
    for element in picture.iter():
        for name, value in element.attrib.items():
            assert "nan" not in value and "inf" not in value, name
    loss = parts["training loss"].find("path[@class='line']").get("d")
    assert loss.count("M") == loss.count("h0") == 3 and "L" not in loss         # each of the three stands alone
    assert len(list(parts["answers by truth, test"].iter("circle"))) == 1
    worth = parts["what each modality is worth, test"]
    assert len(list(worth.iter("rect"))) == 1 and worth.find("path[@class='interval']") is None


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("value", [None, nan, 0.0, 1e-300, -5.0])
def test_one_epoch_or_the_same_value_throughout(value):
    log = [{"epoch": e, "loss": value, "valid_mae": value} for e in range(1, 51)]
    missing = value is None or isnan(value)
    for entries in (log[:1], log):
        parts, _ = panels(entries, "mae", 1, value, None, {"all": (value,) * 3})
        score = parts["validation mae (less is better)"]
        assert (score.find("circle") is None) == missing and "nan" not in score.find("path").get("d")


def test_only_what_is_known_is_drawn_and_all_fits():
    classes = {"names": ["a", "b"], "counts": [[1, 0, 0], [0, 1, 0]]}
    worth = {"all": (1.0, 0.9, 1.0)}
    for result, ablation, count in ((None, None, 2), (classes, None, 3), (classes, worth, 4), (None, worth, 3)):
        parts, picture = panels(LOG, "weighted_f1", 2, 0.3, result, ablation)
        _, _, width, height = map(float, picture.get("viewBox").split())
        assert len(parts) == count and (width, height) == (2 * PANEL[0], (count + 1) // 2 * PANEL[1])
    for panel in parts.values():
        for x, _, text in texts(panel, "dim") + texts(panel, "title"):
            assert x + 6.5 * len(text) < PANEL[0] - 90          # 12 px letters are narrower, of most fonts
    assert "prefers-color-scheme:dark" in report(LOG, "weighted_f1", 2, 0.3, None, None)


def test_the_methods_figure_needs_nothing_that_a_program_may_lack():
    figure = (Path(__file__).resolve().parents[1] / "docs" / "method.svg").read_text(encoding="utf-8")
    tags = {element.tag.split("}")[1] for element in ElementTree.fromstring(figure).iter()}
    assert tags == {"svg", "title", "style", "defs", "marker", "g", "rect", "path", "text", "tspan"}
    assert "prefers-color-scheme:dark" in figure
    # A symbol behind another in one text stands elsewhere in each font, and a shifted one not in each program.
    assert all(word not in figure for word in ("baseline-shift", " dy=", " dx=", "\u0303"))
