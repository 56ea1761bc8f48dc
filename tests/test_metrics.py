"""Parsing of odd answers; metrics against plain loops and scikit-learn; undefined values, intervals."""
import math
import pickle
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from data import TASKS
from eval import bootstrap, class_metrics, confusion, in_range, metrics_of, mosei_metrics, parse_answer
from eval import per_class, simsv2_metrics

pytestmark = pytest.mark.filterwarnings("error")            # a warning is a failure
MELD_TEST = Path(__file__).parents[1] / "../shared/data/MELD/meld_test.pkl"
MELD_LABELS = ("neutral", "surprise", "fear", "sadness", "joy", "disgust", "anger")


CLASSES, MOSEI, SIMS = TASKS["meld"], TASKS["mosei"], TASKS["simsv2"]

# ----------------------------------------------------------------------------------------------------------------------
# Answers

nan, inf, _ = float("nan"), float("inf"), None
ANSWERS = [                 # text, strict class, strict intensity, official
    ("3", 3.0, 3.0, 3.0), (" 3", 3.0, 3.0, 3.0), ("3\n", 3.0, 3.0, 3.0), ("\t3 \u3000", 3.0, 3.0, 3.0),
    ("\x1c3", 3.0, 3.0, _),                                # strip() takes what float() does not
    ("0", 0.0, 0.0, 0.0), ("7", 7.0, 7.0, 7.0), ("12", 12.0, 12.0, 12.0), ("03", 3.0, 3.0, 3.0), ("3.0", _, 3.0, 3.0),
    ("+3", _, 3.0, 3.0), ("-1", _, -1.0, -1.0), ("-1.6", _, -1.6, -1.6), ("+0.5", _, 0.5, 0.5),
    ("0.25", _, 0.25, 0.25), ("-0.0", _, -0.0, -0.0), ("+0.0", _, 0.0, 0.0), ("99.9", _, 99.9, 99.9),
    ("9" * 400, inf, inf, inf),
    # not plain, and yet the release reads them
    ("–1.0", _, _, -1.0), ("一0.5", _, _, -0.5), ("：1", _, _, 1.0), (": 0.4", _, _, 0.4), ("0.4/", _, _, 0.4),
    ("1/2", _, _, 12.0), ("(0.6", _, _, 0.6), ("(/：2:", _, _, 2.0), (".5", _, _, 0.5), ("5.", _, _, 5.0),
    ("1e9", _, _, 1e9), ("1E0", _, _, 1.0), ("1_0", _, _, 10.0), ("nan", _, _, nan), ("inf", _, _, inf),
    ("-Infinity", _, _, -inf), ("٣", _, _, 3.0), ("３", _, _, 3.0), ("-٣.٥", _, _, -3.5), ("1e400", _, _, inf),
    ("–一1", _, _, _),
    # what nobody reads: the release makes a 0 of it
    ("", _, _, _), (" ", _, _, _), ("0.5.", _, _, _), ("½", _, _, _), ("3²", _, _, _), ("²", _, _, _),
    ("- 1", _, _, _), ("--1", _, _, _), ("+-1", _, _, _), ("−1", _, _, _), ("0,5", _, _, _),
    ("(0.6)", _, _, _), ("1 2", _, _, _), ("1\n2", _, _, _), ("3</s>", _, _, _), ("joy", _, _, _),
    ("0x1", _, _, _), ("-", _, _, _), (".", _, _, _), ("None", _, _, _), ("三", _, _, _),
    ("3\x00", _, _, _), ("portalΨ", _, _, _), ("位置清晨地在仍是", _, _, _),
]


def same(a, b):
    """Equal in value, None and nan and the sign of zero included."""
    if None in (a, b):
        return a is b
    return (a == b or (a != a and b != b)) and math.copysign(1, a) == math.copysign(1, b)


@pytest.mark.parametrize("text, as_class, as_intensity, as_release", ANSWERS, ids=[ascii(a[0])[:20] for a in ANSWERS])
def test_answers(text, as_class, as_intensity, as_release):
    assert same(parse_answer(text, CLASSES), as_class)
    for task in (MOSEI, SIMS):
        assert same(parse_answer(text, task), as_intensity)
        assert same(parse_answer(text, task, official=True), as_release)
    replaced = set(text) & set("–一：:/(")                  # in the release, for intensities only
    assert same(parse_answer(text, CLASSES, official=True), None if replaced else as_release)


def test_label_texts_are_read_back():
    for value in range(-30, 31):
        for text in (f"{value / 10:.1f}", f"{value / 10:+.1f}"):
            assert parse_answer(text, MOSEI) == value / 10 == parse_answer(text, MOSEI, official=True)


def test_in_range():
    assert [in_range(x, CLASSES) for x in (0, 6.0, 7.0, -1, 3.5, nan, inf)] == [True, True] + [False] * 5
    assert [in_range(x, MOSEI) for x in (-3, 3.0, 0.05, -3.1, 245, nan, inf)] == [True] * 3 + [False] * 4
    assert [in_range(x, SIMS) for x in (-1, -0.0, 1.0, 1.1, -inf)] == [True] * 3 + [False] * 2


# ----------------------------------------------------------------------------------------------------------------------
# Metrics against plain loops

def slow_accuracy_f1(pred, true):
    """Accuracy, weighted and macro F1, nan without rows; pred may be anything, true a list of hashable classes."""
    n = len(true)
    if n == 0:
        return nan, nan, nan
    accuracy, weighted, macro = sum(1 for p, t in zip(pred, true) if p == t) / n, 0.0, 0.0
    for c in set(true):
        tp = sum(1 for p, t in zip(pred, true) if p == c and t == c)
        fp = sum(1 for p, t in zip(pred, true) if p == c and t != c)
        fn = sum(1 for p, t in zip(pred, true) if p != c and t == c)
        precision = tp / (tp + fp) if tp + fp else 0.0
        recall = tp / (tp + fn)
        f1 = 2 * precision * recall / (precision + recall) if tp else 0.0
        weighted += f1 * (tp + fn) / n
        macro += f1 / len(set(true))
    return accuracy, weighted, macro


def slow_moments(pred, true):
    """MAE, Pearson's r, R2; nan where undefined."""
    n = len(true)
    if n == 0:
        return nan, nan, nan
    mae, mp, mt = sum(abs(p - t) for p, t in zip(pred, true)) / n, math.fsum(pred) / n, math.fsum(true) / n
    flat_pred, flat_true = len(set(pred)) == 1, len(set(true)) == 1
    spp, stt = math.fsum((p - mp) ** 2 for p in pred), math.fsum((t - mt) ** 2 for t in true)
    spt = math.fsum((p - mp) * (t - mt) for p, t in zip(pred, true))
    corr = nan if flat_pred or flat_true else spt / math.sqrt(spp * stt)
    r2 = nan if flat_true else 1 - math.fsum((t - p) ** 2 for p, t in zip(pred, true)) / stt
    return mae, corr, r2


def clip(x, top):
    return max(-top, min(top, x))


def half_even(x):
    low = math.floor(x)
    return low if x - low < 0.5 else low + 1 if x - low > 0.5 else low + low % 2


def slow_mosei(pred, true):
    non0 = [(p, t) for p, t in zip(pred, true) if t != 0]
    has0 = slow_accuracy_f1([p >= 0 for p in pred], [t >= 0 for t in true])[:2]
    cut = slow_accuracy_f1([p > 0 for p, _ in non0], [t > 0 for _, t in non0])[:2]
    acc = {n: slow_accuracy_f1(*([half_even(clip(x, n // 2)) for x in side] for side in (pred, true)))[0]
           for n in (5, 7)}
    mae, corr, _ = slow_moments(pred, true)
    return {"has0_acc2": has0[0], "has0_f1": has0[1], "non0_acc2": cut[0], "non0_f1": cut[1],
            "acc5": acc[5], "acc7": acc[7], "mae": mae, "corr": corr}


def slow_sims(pred, true):
    pred, true = [clip(p, 1.0) for p in pred], [clip(t, 1.0) for t in true]

    def bins(values, *edges):
        return [sum(1 for e in edges if x > e) for x in values]
    weak = [(p, t) for p, t in zip(pred, true) if -0.4 <= t <= 0.4]
    acc2, f1, _ = slow_accuracy_f1(bins(pred, 0), bins(true, 0))
    weak_acc2 = slow_accuracy_f1(bins([p for p, _ in weak], 0), bins([t for _, t in weak], 0))[0]
    acc3 = slow_accuracy_f1(bins(pred, -0.1, 0.1), bins(true, -0.1, 0.1))[0]
    acc5 = slow_accuracy_f1(bins(pred, -0.7, -0.1, 0.1, 0.7), bins(true, -0.7, -0.1, 0.1, 0.7))[0]
    mae, corr, r2 = slow_moments(pred, true)
    return {"acc2": acc2, "f1": f1, "weak_acc2": weak_acc2, "acc3": acc3, "acc5": acc5,
            "mae": mae, "corr": corr, "r2": r2}


def slow_classes(pred, true):
    recalls = [sum(p == t for p, t in zip(pred, true) if t == k) / true.count(k) for k in set(true)]
    names = ("accuracy", "weighted_f1", "macro_f1", "unweighted_accuracy")
    return dict(zip(names, (*slow_accuracy_f1(pred, true), sum(recalls) / len(recalls))))


TIES = [0.0, -0.0, 0.1, -0.1, 0.4, -0.4, 0.7, -0.7, 0.5, -0.5, 1.0, -1.0, 1.5, -1.5, 2.0, -2.0, 2.5, -2.5, 3.0, -3.0,
        3.5, -4.0]


def vectors(count, seed):
    """(pred, true) of tenths and ties, a few rows each: ordinary, one true value, constant predictions, both."""
    rng = np.random.default_rng(seed)
    for i in range(count):
        n = int(rng.integers(1, 24))
        scale = (1, 3, 4)[i % 3]
        pred, true = (np.where(rng.random(n) < 0.5, rng.choice(TIES, n), np.round(rng.uniform(-scale, scale, n), 1))
                      for _ in "pt")
        if i % 8 == 1:
            true[:] = true[0]
        if i % 8 == 2:
            pred[:] = pred[0]
        if i % 32 == 3:
            pred[:], true[:] = pred[0], true[0]
        if i % 8 == 4:
            pred = true.copy()
        yield pred, true


def agree(ours, theirs, where):
    assert list(ours) == list(theirs)
    for name, value in ours.items():
        assert type(value) is float
        assert value == pytest.approx(theirs[name], rel=1e-6, abs=1e-6, nan_ok=True), (name, where)
        is_share = "acc" in name and name != "unweighted_accuracy"      # a quotient of counts, not a sum of shares
        if is_share and not math.isnan(value):
            assert value == theirs[name], (name, where)


def test_intensities_equal_plain_loops():
    forms = (lambda x: x.astype(np.float32), lambda x: x, lambda x: x.tolist())
    for i, (pred, true) in enumerate(vectors(600, seed=1)):
        ours = [forms[i % 3](pred), forms[i // 3 % 3](true)]
        agree(mosei_metrics(*ours), slow_mosei(pred.tolist(), true.tolist()), (pred, true))
        agree(simsv2_metrics(*ours), slow_sims(pred.tolist(), true.tolist()), (pred, true))


def class_vectors(count, seed):
    """(pred, true, number of classes): some predictions are no class; truth of one class, constant predictions."""
    rng = np.random.default_rng(seed)
    for i in range(count):
        n, k = int(rng.integers(1, 40)), int(rng.integers(1, 8))
        pred, true = rng.integers(-1 if i % 2 else 0, k, n), rng.integers(0, k, n)
        if i % 8 == 1:
            true[:] = true[0]
        if i % 8 == 2:
            pred[:] = pred[0]
        yield pred, true, k


def test_classes_equal_plain_loops():
    for pred, true, _ in class_vectors(1_500, seed=2):
        agree(class_metrics(pred, true), slow_classes(pred.tolist(), true.tolist()), (pred, true))
        assert class_metrics(pred.tolist(), true.tolist()) == class_metrics(pred, true)


def test_classes_equal_scikit_learn():
    sk = pytest.importorskip("sklearn.metrics")
    for pred, true, k in class_vectors(60, seed=4):
        ours, labels = class_metrics(pred, true), range(k)
        weights = dict(labels=labels, average="weighted", zero_division=0)          # -1 is not among the labels
        assert ours["accuracy"] == sk.accuracy_score(true, pred)
        assert ours["weighted_f1"] == pytest.approx(sk.f1_score(true, pred, **weights))
        there = dict(labels=np.unique(true), average="macro", zero_division=0)
        assert ours["macro_f1"] == pytest.approx(sk.f1_score(true, pred, **there))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            assert ours["unweighted_accuracy"] == pytest.approx(sk.balanced_accuracy_score(true, pred))
                                                                                    # about y_pred holding other classes
            theirs = sk.precision_recall_fscore_support(true, pred, labels=labels, zero_division=0)
            matrix = sk.confusion_matrix(true, pred, labels=[*labels, -1])
        np.testing.assert_allclose(per_class(confusion(pred, true, k)), theirs, atol=1e-12)
        np.testing.assert_array_equal(confusion(pred, true, k), matrix[:k])


# ----------------------------------------------------------------------------------------------------------------------
# Edges, one by one

@pytest.mark.parametrize("width", [np.float32, np.float64])
@pytest.mark.parametrize("other", [np.float32, np.float64])
def test_a_value_on_an_edge_lands_as_an_exact_decimal(width, other):
    def score(metric, pred, true):
        return metric(np.array([pred], width), np.array([true], other))
    bins = {"acc2": [(-0.4, 0), (-0.0, 0), (0.0, 0), (0.1, 1)], "acc3": [(-0.1, 0), (-0.0, 1), (0.1, 1), (0.2, 2)],
            "acc5": [(-1.0, 0), (-0.7, 0), (-0.6, 1), (-0.1, 1), (0.0, 2), (0.1, 2), (0.2, 3), (0.7, 3), (0.8, 4)]}
    for name, known in bins.items():
        for pred, p in known:
            for true, t in known:
                assert score(simsv2_metrics, pred, true)[name] == (p == t), (name, pred, true)
    for true, weak in {0.4: True, -0.4: True, 0.5: False, -0.5: False}.items():
        assert math.isnan(score(simsv2_metrics, 0.0, true)["weak_acc2"]) != weak
    rounded = {-3.2: -3, -2.5: -2, -1.5: -2, -0.5: 0, -0.0: 0, 0.5: 0, 0.6: 1, 1.5: 2, 2.5: 2, 2.6: 3, 3.5: 3}
    for pred, p in rounded.items():
        for true, t in rounded.items():
            assert score(mosei_metrics, pred, true)["acc7"] == (p == t), (pred, true)
            assert score(mosei_metrics, pred, true)["acc5"] == (clip(p, 2) == clip(t, 2)), (pred, true)
    assert score(mosei_metrics, -0.0, 0.0)["has0_acc2"] == 1 and score(mosei_metrics, -0.1, -0.0)["has0_acc2"] == 0
    assert score(mosei_metrics, 0.0, -1.0)["non0_acc2"] == 1 and score(mosei_metrics, 0.0, 1.0)["non0_acc2"] == 0


def test_the_noise_of_an_average_is_no_side_of_an_edge():
    noisy = (0.1 + 0.2 + 0.3 - 0.2) / 1.0                                           # 0.4000000000000001
    assert noisy != 0.4 and noisy > 0.4
    assert simsv2_metrics([0.3], [noisy])["weak_acc2"] == 1
    assert simsv2_metrics([0.3], [np.float32(0.4)])["weak_acc2"] == 1               # 0.4 of float32 is 0.4000000059...
    assert simsv2_metrics([0.4], [np.float32(0.4)])["mae"] == 0


# ----------------------------------------------------------------------------------------------------------------------
# Undefined values

def undefined(scores) -> set:
    return {name for name, value in scores.items() if math.isnan(value)}


@pytest.mark.parametrize("metric, pred, true, names", [
    (class_metrics, [], [], "accuracy weighted_f1 macro_f1 unweighted_accuracy"), (class_metrics, [-1], [0], ""),
    (mosei_metrics, [], [], "has0_acc2 has0_f1 non0_acc2 non0_f1 acc5 acc7 mae corr"),
    (simsv2_metrics, [], [], "acc2 f1 weak_acc2 acc3 acc5 mae corr r2"),
    (mosei_metrics, [1], [2], "corr"), (simsv2_metrics, [1], [.2], "corr r2"),
    (mosei_metrics, [1, 1], [2, 3], "corr"), (mosei_metrics, [0.0, -0.0], [2, 3], "corr"),
    (mosei_metrics, [1, 2], [3, 3], "corr"), (mosei_metrics, [1, 2], [0.0, -0.0], "non0_acc2 non0_f1 corr"),
    (simsv2_metrics, [2, 3], [.2, .3], "corr"),                                     # constant once clipped
    (simsv2_metrics, [.2, .3], [.8, .8], "weak_acc2 corr r2")])
def test_what_is_undefined_is_nan(metric, pred, true, names):
    assert undefined(metric(pred, true)) == set(names.split())


def test_answers_that_are_no_number():
    for missing in (None, nan):
        scores = mosei_metrics([missing, 1.0, -2.0], [1.0, 1.0, -2.0])
        assert [scores[k] for k in ("has0_acc2", "non0_acc2", "acc5", "acc7")] == [2 / 3] * 4
        assert undefined(scores) == {"mae", "corr"}
        scores = simsv2_metrics([missing, .2, -.6], [-.4, .2, -.6])
        assert [scores[k] for k in ("acc2", "acc3", "acc5")] == [2 / 3] * 3 and scores["weak_acc2"] == 1 / 2
        assert undefined(scores) == {"mae", "corr", "r2"}
        assert class_metrics([missing, 1, 2], [0, 1, 2])["accuracy"] == 2 / 3
    for endless in (inf, 1e300):
        scores = mosei_metrics([endless, 1.0, -2.0], [3.0, 1.0, -2.0])
        assert scores["acc7"] == 1 and scores["mae"] == inf and undefined(scores) == {"corr"}
        assert simsv2_metrics([endless, .2, -.6], [1.0, .2, -.6])["r2"] == 1
    assert mosei_metrics([1e30, 1.0, -2.0], [3.0, 1.0, -2.0])["mae"] == pytest.approx(1e30 / 3)
    assert class_metrics([1e300, inf, 2.5, 7, 2], [0, 1, 2, 2, 2]) == {
        "accuracy": 1 / 5, "weighted_f1": 3 / 5 * 2 / 4, "macro_f1": 2 / 4 / 3,
        "unweighted_accuracy": pytest.approx(1 / 9)}


def test_what_cannot_be_scored_is_refused():
    for metric in map(metrics_of, TASKS.values()):
        with pytest.raises((AssertionError, ValueError)):
            metric([1, 2], [1, 2, 3])
    with pytest.raises(AssertionError, match="3 predictions for 2"):
        bootstrap(class_metrics, [1, 2, 3], [1, 2])
    for true in ([-1], [7]):
        with pytest.raises(AssertionError, match="0..6"):
            confusion([0], true, 7)
    with pytest.raises(AssertionError, match="finite"):
        mosei_metrics([1.0], [nan])


# ----------------------------------------------------------------------------------------------------------------------
# MELD

def meld_test_labels():
    """The labels of the pickle's rows; every object that is not of a plain type is read as an empty shell."""
    class Shell:
        def __init__(self, *_):
            pass

        def __setstate__(self, _):
            pass

    class Plain(pickle.Unpickler):
        def find_class(self, module, name):
            return Shell
    with MELD_TEST.open("rb") as file:
        return [MELD_LABELS.index(row["label"]) for row in Plain(file).load()]


@pytest.mark.skipif(not MELD_TEST.exists(), reason="MELD's test split is not beside the project")
def test_always_neutral_on_meld():
    true = meld_test_labels()
    scores = class_metrics(np.zeros(len(true)), true)
    assert len(true) == 2610 and confusion(np.zeros(2610), true, 7)[0, 0] == 1256
    assert {k: round(v, 4) for k, v in scores.items()} == {
        "accuracy": 0.4812, "weighted_f1": 0.3127, "macro_f1": 0.0928, "unweighted_accuracy": 0.1429}


# ----------------------------------------------------------------------------------------------------------------------
# Intervals

def test_every_task_has_metrics():
    expected = {
        "meld": "class_metrics", "cherma": "class_metrics", "demo": "class_metrics",
        "iemocap": "class_metrics", "mosei": "mosei_metrics", "mosi": "mosei_metrics",
        "simsv2": "simsv2_metrics", "sims": "simsv2_metrics"}
    assert {name: metrics_of(TASKS[name]).__name__ for name in expected} == expected
    assert metrics_of(replace(MOSEI, name="new")) is mosei_metrics
    assert metrics_of(replace(SIMS, name="new")) is simsv2_metrics
    assert metrics_of(replace(CLASSES, name="new", labels=("no", "yes"))) is class_metrics


def test_bootstrap():
    rng = np.random.default_rng(5)
    true = rng.integers(0, 7, 2610)
    pred = np.where(rng.random(2610) < 0.6, true, rng.integers(-1, 7, 2610))
    low, high = bootstrap(class_metrics, pred, true, seed=3)["accuracy"]
    share = (pred == true).mean()
    half = 1.96 * math.sqrt(share * (1 - share) / 2610)                             # of the normal approximation
    assert low == pytest.approx(share - half, abs=0.004) and high == pytest.approx(share + half, abs=0.004)
    again = bootstrap(class_metrics, pred.tolist(), true.tolist(), seed=3)
    assert again["accuracy"] == (low, high) != bootstrap(class_metrics, pred, true, seed=4)["accuracy"]


def test_bootstrap_leaves_out_as_many_draws_at_each_end():
    drawn = iter(np.random.default_rng(0).permutation(1000))
    assert bootstrap(lambda pred, true: {"x": float(next(drawn))}, [0], [0]) == {"x": (25.0, 974.0)}


def test_bootstrap_draws_rows_in_pairs():
    true = np.arange(50) / 25 - 1
    assert bootstrap(simsv2_metrics, true, true, draws=50)["mae"] == (0, 0)
    both = np.stack([true, true + 0.1], 1)                                        # the second is off by 0.1 everywhere

    def difference(pred, true):
        first, second = (mosei_metrics(system, true)["mae"] for system in pred.T)
        return {"mae": second - first}
    worse = bootstrap(difference, both, true, draws=50)
    assert worse["mae"] == pytest.approx((0.1, 0.1), abs=1e-6)


def test_bootstrap_of_what_is_undefined():
    for metric in (class_metrics, mosei_metrics, simsv2_metrics):
        assert np.isnan(list(bootstrap(metric, [], [], draws=5).values())).all()
    intervals = bootstrap(mosei_metrics, [1, 2, 2], [1, 3, 0], draws=200)          # some draws are constant
    assert intervals["corr"][1] == pytest.approx(1) and not np.isnan(intervals["non0_f1"]).any()
    assert bootstrap(mosei_metrics, [inf, 2], [1, 3], draws=200)["mae"] == (1, inf)
    assert np.isnan(bootstrap(mosei_metrics, [1, 1], [1, 2], draws=9)["corr"]).all()
