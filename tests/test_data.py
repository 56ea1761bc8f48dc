"""Data sets in both layouts and every spelling; batches; odd values; the check; finding and fetching files."""
import hashlib
import os
import pickle
import re
import subprocess
import sys
import types
from dataclasses import replace
from fnmatch import fnmatch
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import HERE, need_shared

import data
import support.check
from data import FEATURES, SPLITS, TASKS, DataError, Task, clean, collate, find_data, find_llm, load_split

pytestmark = pytest.mark.filterwarnings("error")            # a warning is a failure
SIZES = dict(train=7, valid=3, test=4)


def make_rows(task, n: int, seed: int = 0, audio_dim=None, video_dim=None) -> list:
    """Rows in the first layout: at the published shapes if no widths are given, zero behind each length."""
    rng, rows = np.random.default_rng(seed), []
    for i in range(n):
        features = {"text": f"{task.name} {seed} {i}, 你好"}
        for kind, dim in (("audio", audio_dim), ("video", video_dim)):
            frames = getattr(task, f"{kind}_len") if dim is None else 6
            length = int(rng.integers(1, frames + 1))
            x = rng.standard_normal((frames, dim or getattr(task, f"{kind}_dim")), dtype=np.float32)
            x[length:] = 0
            features |= {kind: x, f"{kind}_len": length}
        y = rng.integers(len(task.labels)) if task.labels else rng.integers(10 * task.range[0], 10 * task.range[1] + 1)
        rows.append({"label": task.labels[y] if task.labels else float(np.float32(y / 10)), "features": features})
    return rows


def make_table(task, rows: list) -> dict:
    """The same in the second layout."""
    column = {key: [row["features"][key] for row in rows] for key in rows[0]["features"]}
    return {"raw_text": column["text"], "audio": np.stack(column["audio"]), "vision": np.stack(column["video"]),
            "audio_lengths": column["audio_len"], "vision_lengths": column["video_len"],
            "id": [f"clip {text}" for text in column["text"]],
            "labels" if task.labels else "regression_labels":
                [row["label"] for row in rows] if task.labels else np.array([row["label"] for row in rows], np.float32)}


def write(folder: Path, task, splits: dict, protocol: int = 4) -> Path:
    """A data set under its published names; returns the folder."""
    for name in set(task.files.values()):
        file = folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        here = {split: part for split, part in splits.items() if task.files[split] == name}
        with open(file, "wb") as out:
            pickle.dump(here if len(set(task.files.values())) == 1 else here.popitem()[1], out, protocol)
    return folder


def make_splits(task, layout: str = "rows", **widths) -> dict:
    splits = {split: make_rows(task, n, seed, **widths) for seed, (split, n) in enumerate(SIZES.items())}
    return splits if layout == "rows" else {split: make_table(task, rows) for split, rows in splits.items()}


@pytest.fixture(autouse=True)
def no_hub(monkeypatch):
    """The hub's cache of this machine stays out of the tests."""
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)


def check(capsys, *argv) -> tuple[int, str, str]:
    """`python data.py ...` in this process: exit code, what was printed, what was complained about."""
    code = data.main(list(map(str, argv)))
    printed = capsys.readouterr()
    return code, printed.out, printed.err


# ---------------------------------------------------------------------------------------------------------------------
# Words


@pytest.mark.parametrize("name, text, label", [("meld", "Oh my God!", 4), ("mosei", "It was not funny.", -1.6)])
def test_the_rows_in_the_docstring_are_what_is_said(name, text, label):
    words, shown = TASKS[name].wording("llama"), " ".join(data.Wording.__doc__.split())
    row = f"{words.bos[0]}{words.open}PPPP{text}{words.close}{words.prompt}{words.label(label)}"
    assert f" {row} " in f"{shown} "


# ---------------------------------------------------------------------------------------------------------------------
# Layouts


@pytest.mark.parametrize("layout", ["rows", "table"])
@pytest.mark.parametrize("name", TASKS)
def test_every_task_in_both_layouts_at_the_published_shapes(tmp_path, capsys, name, layout):
    task = TASKS[name]
    write(tmp_path, task, make_splits(task, layout))
    code, out, err = check(capsys, name, "--data-dir", tmp_path)
    assert (code, err) == (0, "") and out.count(f"({task.audio_len}, {task.audio_dim}) (as published), float32") == 3
    for seed, split in enumerate(SPLITS):
        ours, rows = load_split(task, tmp_path, split), make_rows(task, SIZES[split], seed)
        assert len(ours) == len(rows)
        for i, row in enumerate(rows):
            features = row["features"]
            assert ours.text[i] == features["text"] and task.number(row["label"]) == ours.label[i]
            for kind in FEATURES:
                assert getattr(ours, f"{kind}_len")[i] == features[f"{kind}_len"]
                assert np.array_equal(getattr(ours, kind)[i], features[kind])
        assert ours.id == [f"clip {text}" if layout == "table" else str(i) for i, text in enumerate(ours.text)]
    assert capsys.readouterr().err == ""


SPELLINGS = {       # of a table's columns: none changes what is read
    "texts in an object array": lambda t: t.update(raw_text=np.array(t["raw_text"], object)),
    "texts in a fixed-width array": lambda t: t.update(raw_text=np.array(t["raw_text"])),
    "texts as bytes, some long": lambda t: t.update(raw_text=[x.encode() for x in t["raw_text"]]),
    "texts in a big-endian array": lambda t: t.update(raw_text=np.array(t["raw_text"], ">U400")),
    "texts as a column of one": lambda t: t.update(raw_text=np.array(t["raw_text"])[:, None]),
    "ids as bytes": lambda t: t.update(id=np.array([x.encode() for x in t["id"]])),
    "lengths in an array": lambda t: t.update(audio_lengths=np.array(t["audio_lengths"], ">i2")),
    "lengths as floats": lambda t: t.update(audio_lengths=np.array(t["audio_lengths"], float)),
    "lengths as numpy scalars": lambda t: t.update(vision_lengths=[np.int64(n) for n in t["vision_lengths"]]),
    "lengths in small arrays": lambda t: t.update(vision_lengths=[np.array([n]) for n in t["vision_lengths"]]),
    "labels in a list": lambda t: t.update(regression_labels=t["regression_labels"].tolist()),
    "labels as a column": lambda t: t.update(regression_labels=t["regression_labels"][:, None].astype(">f8")),
    "big-endian": lambda t: t.update(audio=t["audio"].astype(">f4"), vision=t["vision"].astype(">f8")),
    "Fortran order": lambda t: t.update(audio=np.asfortranarray(t["audio"]), vision=np.asfortranarray(t["vision"])),
    "float64": lambda t: t.update(audio=t["audio"].astype(float)),
    "float16": lambda t: t.update(audio=t["audio"].astype(np.float16)),
    "integers": lambda t: t.update(vision=(10 * t["vision"]).astype("i1")),
    "a list of arrays": lambda t: t.update(audio=list(t["audio"]), vision=tuple(t["vision"])),
    "an object array of arrays": lambda t: t.update(audio=np.fromiter(t["audio"], object, len(t["audio"]))),
    "other columns": lambda t: t.update(text_bert=np.zeros((3, 3, 50)), annotations=["Neutral"] * 3),
}


@pytest.mark.parametrize("protocol", [2, 5])
@pytest.mark.parametrize("spelling", SPELLINGS)
def test_spellings_of_a_table(tmp_path, spelling, protocol):
    task = TASKS["mosei"]
    splits = make_splits(task, "table", audio_dim=5, video_dim=3)
    splits["valid"]["raw_text"][1] = "long " * 70           # bytes beyond 255 come from the reader as a view
    SPELLINGS[spelling](splits["valid"])
    ours = load_split(task, write(tmp_path, task, splits, protocol), "valid")
    rows = make_rows(task, SIZES["valid"], 1, audio_dim=5, video_dim=3)
    assert ours.text == [rows[0]["features"]["text"], "long " * 70, rows[2]["features"]["text"]]
    assert ours.label == [row["label"] for row in rows] and {type(y) for y in ours.label} == {float}
    assert ours.id[0] == f"clip {ours.text[0]}"
    assert ours.audio_len == [row["features"]["audio_len"] for row in rows] and type(ours.audio_len[0]) is int
    assert ours.video_len == [row["features"]["video_len"] for row in rows]
    batch = collate(ours, [0, 1, 2])
    for i, row in enumerate(rows):
        for kind in FEATURES:
            x, length = row["features"][kind], row["features"][f"{kind}_len"]
            x = x.astype("f2") if (spelling, kind) == ("float16", "audio") else x
            x = (10 * x).astype("i1") if (spelling, kind) == ("integers", "video") else x
            assert np.array_equal(getattr(batch, kind)[i, :length].numpy(), x[:length])


def test_lengths_may_be_absent(tmp_path):
    for name, layout in (("meld", "rows"), ("simsv2", "table")):
        task = TASKS[name]
        splits = make_splits(task, layout, audio_dim=5, video_dim=3)
        for part in splits.values():
            for row in part if layout == "rows" else [part]:
                for key in ("audio_len", "video_len", "audio_lengths", "vision_lengths", "id"):
                    row.get("features", row).pop(key, None)
        ours = load_split(task, write(tmp_path, task, splits), "test")
        assert ours.audio_len == ours.video_len == [6] * 4 and ours.id == ["0", "1", "2", "3"]


def test_a_file_per_split_may_hold_all_splits(tmp_path):
    task = TASKS["meld"]
    splits = make_splits(task, audio_dim=5, video_dim=3)
    write(tmp_path, task, dict.fromkeys(SPLITS, splits))
    assert load_split(task, tmp_path, "test").text == [row["features"]["text"] for row in splits["test"]]


def test_rows_of_an_intensity_in_one_file(tmp_path):
    task = TASKS["mosi"]
    splits = make_splits(task, audio_dim=1, video_dim=9)
    assert load_split(task, write(tmp_path, task, splits), "valid").label == [row["label"] for row in splits["valid"]]


def test_features_stay_views_of_the_file(tmp_path):
    for name, layout in (("meld", "rows"), ("mosei", "table")):
        write(tmp_path, TASKS[name], make_splits(TASKS[name], layout, audio_dim=64, video_dim=64))
        ours = load_split(TASKS[name], tmp_path, "train")
        assert not any(x.flags.writeable or x.flags.owndata for x in ours.audio + ours.video)


LAYOUTS = {         # what a file may hold instead of a split, and what is said of it
    "nothing": ([], "has .*'text': 0, .*; expected as many in each, and at least one, or a list of rows"),
    "a number": (3, "has {'raw_text': 0, 'audio': 0, 'vision': 0, 'labels': 0} entries; expected"),
    "rows that are lists": ([[1, 2]], "row 0 has a text that is None; expected a string"),
    "few texts": (dict(raw_text=["a"], audio=np.zeros((2, 1, 1)), vision=np.zeros((2, 1, 1)), labels=["joy"] * 2),
                  "has {'raw_text': 1, 'audio': 2, .* expected as many"),
    "few lengths": (dict(raw_text=["a", "b"], audio=np.zeros((2, 1, 1)), vision=np.zeros((2, 1, 1)),
                         labels=["joy"] * 2, audio_lengths=[1]), "'audio_lengths': 1}"),
    "an empty table": (dict(raw_text=[], audio=[], vision=[], labels=[]), "and at least one"),
    "no audio": (dict(raw_text=["a"], vision=np.zeros((1, 1, 1)), labels=["joy"]), "'audio': 0"),
    "a 0-d array": (dict(raw_text=["a"], audio=np.zeros(()), vision=np.zeros((1, 1, 1)), labels=["joy"]), "'audio': 0"),
    "0-d arrays": (dict.fromkeys(("raw_text", "audio", "vision", "labels"), np.zeros(())), "'raw_text': 0"),
    "a number for audio": (dict(raw_text=["a"], audio=3, vision=np.zeros((1, 1, 1)), labels=["joy"]), "'audio': 0"),
}


@pytest.mark.parametrize("case", LAYOUTS)
def test_other_layouts_are_refused(tmp_path, capsys, case):
    task, (what, says) = TASKS["meld"], LAYOUTS[case]
    write(tmp_path, task, make_splits(task, audio_dim=5, video_dim=3) | {"train": what})
    with pytest.raises(DataError, match=f"meld_train.pkl, train: .*{says}"):
        load_split(task, tmp_path, "train")
    code, out, err = check(capsys, "meld", "--data-dir", tmp_path)
    if code == 1:
        assert "problem: train row 0 has a text that is None" in out and err == ""
    else:
        assert code == 2 and err.startswith(f"error: {tmp_path}") and err.count("\n") == 1


def test_a_split_that_is_not_there(tmp_path):
    """Rows alone in the one file of a task would be taken for every split."""
    task = TASKS["mosei"]
    file = write(tmp_path, task, {"train": make_rows(task, 2)}) / task.files["train"]
    with pytest.raises(DataError, match="unaligned_50.pkl, test: not there; expected a dict of train, valid, test"):
        load_split(task, tmp_path, "test")
    file.write_bytes(pickle.dumps(make_rows(task, 2), 4))
    with pytest.raises(DataError, match="unaligned_50.pkl, train: not there; expected a dict of train, valid, test"):
        load_split(task, tmp_path, "train")


def test_a_table_without_a_valid_split_is_checked(tmp_path, capsys):
    task = TASKS["mosei"]
    splits = make_splits(task)
    valid = splits.pop("valid")
    write(tmp_path, task, splits)
    assert data.main(["mosei", "--data-dir", str(tmp_path)]) == 0
    said = capsys.readouterr().out
    assert "no valid split: " in said and "--valid-share 0.1" in said and "\ntest: 4 " in said
    del splits["test"]
    write(tmp_path, task, {**splits, "valid": valid})
    assert data.main(["mosei", "--data-dir", str(tmp_path)]) == 2           # without a test split there is no score


def test_a_label_on_the_ends_of_a_range_may_be_a_float32():
    task = Task("own", range=(-0.8, 0.8))
    assert [task.number(sign * float(np.float32(0.8))) for sign in (-1, 1)] == [-0.8, 0.8]
    assert task.number(0.801) is None and task.number(-0.5) == -0.5


def test_of_two_marks_equally_near_the_even_one():
    task = Task("own", range=(0.0, 1.0))                # marks every 0.2
    assert task.nearest([0.1, 0.3, 0.5, 0.7, 0.9, 0.31]).tolist() == [0, 2, 2, 4, 4, 2]


# ---------------------------------------------------------------------------------------------------------------------
# Faults and odd values


FAULTS = {          # what a row holds instead, and what is said of it
    "label": (dict(label="joyful"), "the label 'joyful'; expected neutral, surprise, fear, .*, anger"),
    "no label": (dict(label=None), "the label None; expected neutral"),
    "class number": (dict(label=3), "the label 3; expected neutral"),
    "labels": (dict(label=np.zeros(2)), r"the label array\(\[0., 0.\]\); expected neutral"),
    "negative length": (dict(video_len=-1), "the video length -1; expected 0 to its 6 frames"),
    "half a frame": (dict(video_len=2.5), "the video length 2.5; expected 0 to"),
    "lengths": (dict(video_len=np.array([1, 2])), r"the video length array\(\[1, 2\]\); expected 0 to its 6 frames"),
    "text": (dict(text=None), "a text that is None; expected a string, '' for none"),
    "texts": (dict(text=np.array(["a", "b"])), r"a text that is array\(\['a', 'b'\], .*\); expected a string"),
    "width": (dict(audio=np.zeros((6, 4), "f4")), "4 audio features; expected 5, as most rows"),
    "no width": (dict(audio=np.zeros((6, 0), "f4")), r"audio that is float32 \(6, 0\); expected numbers"),
    "one axis": (dict(video=np.zeros(3, "f4")), r"video that is float32 \(3,\); .*; x\[None\] makes one frame"),
    "too wide": (dict(video=np.zeros((0, 65537), "f4")), "65,537 video features; expected at most 65,536 of a frame"),
    "words": (dict(video=np.array([["a"]])), r"video that is <U1 \(1, 1\); expected numbers"),
    "lists": (dict(video=[[1.0]]), r"video that is \[\[1.0\]\]; expected numbers"),
    "no video": (dict(video=None), "video that is None; expected numbers"),
}


@pytest.mark.parametrize("case", FAULTS)
def test_a_fault_is_told_with_its_row(tmp_path, capsys, case):
    task, (fault, says) = TASKS["meld"], FAULTS[case]
    splits = make_splits(task, audio_dim=5, video_dim=3)
    row = splits["train"][4]
    (row if "label" in fault else row["features"]).update(fault)
    write(tmp_path, task, splits)
    with pytest.raises(DataError, match=f"meld_train.pkl, train: row 4 has {says}.* python data.py meld"):
        load_split(task, tmp_path, "train")
    code, out, _ = check(capsys, "meld", "--data-dir", tmp_path)
    assert code == 1 and out.count("problem: ") == 1 and out.endswith("meld: 1 problems, rows counted from 0\n")
    assert re.search(f"problem: train row 4 has {says}", out)


@pytest.mark.parametrize("label", [1.1, -1.01, float("nan"), float("inf"), "0.4", None])
def test_an_intensity_out_of_range_is_a_fault(tmp_path, label):
    task = TASKS["simsv2"]
    splits = make_splits(task, "table", audio_dim=5, video_dim=3)
    splits["test"]["regression_labels"] = [0.0, label, 0.5, -1.0]
    with pytest.raises(DataError, match="test: row 1 has the label .*; expected a number from -1.0 to 1.0"):
        load_split(task, write(tmp_path, task, splits), "test")


def test_odd_values_become_zero_and_are_told_once(tmp_path, capsys):
    task = TASKS["meld"]
    splits = make_splits(task, audio_dim=5, video_dim=3)
    rows = [row["features"] for row in splits["train"]]
    for row in rows:
        row |= {"audio_len": 4, "video_len": 6}
    rows[1]["audio"][0, :3] = np.nan, -np.inf, -np.inf
    rows[2]["audio"][3, 0] = np.inf
    rows[2]["audio"][4:] = np.nan                           # behind its length
    rows[3]["video"] = np.full((6, 3), 1e300)               # too large for fp32
    rows[4]["video_len"], rows[5]["text"] = 0, ""
    ours = load_split(task, write(tmp_path, task, splits), "train")
    assert capsys.readouterr().err.splitlines() == [f"meld train: {words}" for words in (
        "1 rows have no text", "1 rows have no video", "2 rows have NaN or infinities in audio, read as 0",
        "1 rows have NaN or infinities in video, read as 0")]
    batch = collate(ours, range(7))
    assert torch.isfinite(batch.audio).all() and torch.isfinite(batch.video).all()
    assert batch.audio[1, 0].tolist() == [0, 0, 0, *rows[1]["audio"][0, 3:].tolist()]
    assert not batch.video[3].any() and batch.audio.shape == (7, 4, 5) and batch.text[5] == ""
    assert batch.video_len.tolist() == [6, 6, 6, 6, 0, 6, 6] and not batch.video[4].any()
    load_split(task, tmp_path, "valid")
    assert capsys.readouterr().err == ""


def in_front(features):
    features |= {"audio": np.concatenate([np.zeros((4, 5), "f4"), np.ones((2, 5), "f4")]), "audio_len": 2}


def partly_in_front(features):
    features |= {"video": np.concatenate([np.zeros((2, 3), "f4"), np.ones((4, 3), "f4")]), "video_len": 4}


BEHIND = "zeros in front of {} and features behind its length, not read"
WRONG_TEXT = "a text that was decoded wrongly, or is nan"
LIKELY_MISTAKES = {     # what is done to a row's features, and what the check says of it
    "padded in front": (in_front, BEHIND.format("audio")), "partly": (partly_in_front, BEHIND.format("video")),
    **{text: (lambda features, text=text: features.update(text=text), WRONG_TEXT) for text in (
        "It\x92s", "Itâ€™s", "â€œNo", "cafÃ©", "Â£5", "ä½\xa0å¥½", "ðŸ™‚", "bad \ufffd", "nan", "NaN")},
}
FINE = ["", "café", "AMANHÃ", "Spaß“", "MENÜ”", "«É»", "nan bread", "Nan!", "你好，世界", "It’s", "naïve", "£5 – 10°"]


@pytest.mark.parametrize("case", LIKELY_MISTAKES)
def test_a_likely_mistake_is_a_problem_but_no_refusal(tmp_path, capsys, case):
    task, (plant, says) = TASKS["meld"], LIKELY_MISTAKES[case]
    splits = make_splits(task, audio_dim=5, video_dim=3)
    plant(splits["train"][2]["features"])
    code, out, _ = check(capsys, "meld", "--data-dir", write(tmp_path, task, splits))
    assert code == 1 and f"problem: train row 2 has {says}\nmeld: 1 problems" in out
    assert len(load_split(task, tmp_path, "train")) == 7
    assert capsys.readouterr().err == f"meld train: 1 rows have {says}\n"


def test_fine_texts_are_no_problem():
    assert not [text for text in FINE if support.check.WRONG_TEXT.search(text)]


def without_lengths(table):
    del table["audio_lengths"]
    table["audio"][:, 0] = 1
    table["audio"][:3, 4:], table["audio"][3:, 4:] = 0, 1


REMARKS = {         # what is done to a table, and what is said of it; the check still ends in 0
    "no lengths": (without_lengths, 3, "no audio length, but zeros at the end, which are read"),
    "long lengths": (lambda table: table.update(vision_lengths=[7, 9, 6, 6, 6, 6, 6]), 2,
                     "a video length above its frames, all of which are read"),
    "zeros": (lambda table: table.update(vision=np.zeros((7, 6, 3), "f4")), 0, "video is zero in every row"),
    "scales": (lambda table: np.multiply(table["vision"], [1, 1000, 0], out=table["vision"]), 0,
               "video has very unlike scales: std "),
}


@pytest.mark.parametrize("case", REMARKS)
def test_remarks(tmp_path, capsys, case):
    task, (plant, n, says) = TASKS["simsv2"], REMARKS[case]
    splits = make_splits(task, "table", audio_dim=5, video_dim=3)
    plant(splits["train"])
    code, out, _ = check(capsys, "simsv2", "--data-dir", write(tmp_path, task, splits))
    assert code == 0 and out.count("  remark ") == 1 and f"  remark   {f'{n} rows have ' if n else ''}{says}" in out
    ours = load_split(task, tmp_path, "train")
    assert capsys.readouterr().err == (f"simsv2 train: {n} rows have {says}\n" if n else "")
    assert ours.video_len == [6] * 7 if case == "long lengths" else len(ours) == 7


def test_the_remark_on_scales(tmp_path, capsys):
    """Raw Hertz beside standardised columns; large numbers alone, or beside a constant column, are no remark."""
    task = TASKS["mosi"]
    splits = make_splits(task, "table", audio_dim=4, video_dim=3)
    splits["train"]["audio"] = np.tile([[1.0, 1, 1, 520], [-1, -1, -1, 480]], (7, 3, 1))
    splits["train"]["audio_lengths"] = [6] * 7
    splits["test"]["vision"] = splits["test"]["vision"] * 100
    splits["test"]["vision"][..., 2] = 500
    code, out, _ = check(capsys, "mosi", "--data-dir", write(tmp_path, task, splits))
    assert code == 0 and out.count("unlike") == 1 and out.index("unlike") < out.index("valid: ")
    assert "audio has very unlike scales: std 20 in column 3, 1 in another; standardise each column by its mean" in out


@pytest.mark.parametrize("split, row", [("train", 0), ("train", 6), ("test", 1)])
def test_the_commonest_width_of_train_is_the_norm(tmp_path, capsys, split, row):
    """A missing clip, stored as zeros of another width, may come first."""
    task = TASKS["meld"]
    splits = make_splits(task, audio_dim=5, video_dim=3)
    splits[split][row]["features"] |= {"audio": np.zeros((1, 1), "f4"), "audio_len": 1}
    if split == "test":
        splits[split] = splits[split][1:2]                  # nothing but the other width
        row = 0
    code, out, _ = check(capsys, "meld", "--data-dir", write(tmp_path, task, splits))
    assert code == 1 and f"problem: {split} row {row} has 1 audio features; expected 5, as most rows\n" in out
    assert "meld: 1 problems" in out


def test_clean_leaves_the_file_alone():
    x = np.array([[1.0, np.nan]], np.float32)
    x.flags.writeable = False
    assert clean(x).tolist() == [[1, 0]] and np.isnan(x[0, 1])
    assert clean(np.array([[True, False]])).dtype == np.float32


def test_a_file_cannot_write_to_the_terminal(tmp_path, capsys):
    """Nor make up lines: escape sequences in keys, labels, texts and names of folders are shown, not obeyed."""
    task, folder = TASKS["meld"], tmp_path / "\x1b[2Jx"
    splits = make_splits(task, audio_dim=5, video_dim=3)
    splits["train"][0]["\x1b[31mred\nmeld: 0 problems"] = 1
    splits["train"][1]["label"] = "\x1b[31mjoy"
    code, out, err = check(capsys, "meld", "--data-dir", write(folder, task, splits))
    assert code == 1 and r"\x1b[2Jx/MELD/meld_train.pkl" in out and r"unused   \x1b[31mred meld: 0 problems" in out
    code, out_of_none, err = check(capsys, "mosi", "--data-dir", folder)
    assert code == 2 and r"\x1b[2Jx: MOSI/Processed/unaligned_50.pkl was not found" in err
    assert "\x1b" not in out + out_of_none + err


def test_what_is_not_used_takes_no_room():
    """Rows of a thousand different keys are no table of a million cells."""
    table = data.table_of([{"label": "joy", f"note {i}": i, "features": {"text": "a"}} for i in range(1000)])
    assert table["label"] == ["joy"] * 1000 and table["note 7"] is None and len(table) == 1000 + len(data.FIELDS)


# ---------------------------------------------------------------------------------------------------------------------
# Tasks of one's own


TASKS_THAT_CANNOT_BE = {    # what stands in an entry of TASKS, and what is said of it
    "twice": (dict(labels=("joy", "anger", "joy")), "the label 'joy' twice; name each class once"),
    "no comma": (dict(labels=("joy")), r"labels 'joy'; expected at least two class names in brackets, \(\"joy\", "),
    "one class": (dict(labels=("joy",)), "at least two class names"),
    "numbers": (dict(labels=(0, 1)), "the label 0; expected a name, as a text in quotes"),
    "no name": (dict(labels=("joy", " ")), "the label ' '; expected a name"),
    "two lines": (dict(labels=("joy", "an\nger")), r"the label 'an\\nger'; expected a name"),
    "neither": ({}, r"labels \(\), range \(\); expected one of the two"),
    "both": (dict(labels=("a", "b"), range=(0, 1)), "expected one of the two"),
    "one end": (dict(range=(3,)), "expected one of the two"), "no pair": (dict(range=3), "expected one of the two"),
    "falling": (dict(range=(1.0, -1.0)), "range .*; expected two numbers in rising order"),
    "narrow": (dict(range=(0.0, 0.04)), "at least 0.1 apart"), "nan": (dict(range=(0.0, float("nan"))), "expected two"),
    "wide": (dict(range=(0, 10**9)), "within -1000 to 1000; scale"), "endless": (dict(range=(0, 1e400)), "within"),
    "words": (dict(range=("0", "1")), r"range \('0', '1'\); expected two numbers"),
    "another language": (dict(labels=("a", "b"), language="de"), "no words for 'de'; add this language to TAG"),
}


@pytest.mark.parametrize("case", TASKS_THAT_CANNOT_BE)
def test_a_task_that_cannot_be_is_told(case):
    entry, says = TASKS_THAT_CANNOT_BE[case]
    with pytest.raises(DataError, match=f"task mine: .*{says}"):
        support.check.check_task(data.Task("mine", **entry))


def test_tasks_that_can_be():
    for task in (*TASKS.values(), data.Task("a", labels=["gut", "schlecht"]), data.Task("b", range=(0, 100)),
                 data.Task("c", labels=("joy", "Joy", "not so happy")), data.Task("d", range=(0.2, 0.4))):
        support.check.check_task(task)


# ---------------------------------------------------------------------------------------------------------------------
# Batches


def test_order_is_a_function_of_seed_and_epoch():
    assert data.epoch_rows(7, 3, 1111, 2) == [[0, 3, 6], [4, 1, 5], [2]]             # for ever: a run can be repeated
    assert data.epoch_rows(7, 3, 1111, 2) != data.epoch_rows(7, 3, 1111, 3) != data.epoch_rows(7, 3, 2222, 3)
    assert data.epoch_rows(7, 3) == [[0, 1, 2], [3, 4, 5], [6]]
    np.random.seed(0)
    before = np.random.get_state()[1].tolist()
    for n, size in ((1, 1), (5, 8), (6, 3), (1000, 16)):
        rows = data.epoch_rows(n, size, 5, 1)
        assert sorted(sum(rows, [])) == list(range(n)) and [len(part) for part in rows[:-1]] == [size] * (len(rows) - 1)
    assert np.random.get_state()[1].tolist() == before                          # no global random state


def test_batches_hold_each_row_once_and_pad_on_the_right(tmp_path):
    task = TASKS["cherma"]
    splits = make_splits(task, audio_dim=5, video_dim=3)
    for row in splits["train"]:
        for kind in FEATURES:
            row["features"][kind][row["features"][f"{kind}_len"]:] = 9.0        # must not be seen
    ours, seen = load_split(task, write(tmp_path, task, splits), "train"), []
    order = data.epoch_rows(len(ours), 3, 1111, 1)
    for batch in [collate(ours, rows) for rows in order]:
        assert batch.audio.dtype == batch.video.dtype == torch.float32 and batch.audio_len.dtype == torch.int64
        for kind in FEATURES:
            x, lengths = getattr(batch, kind), getattr(batch, f"{kind}_len")
            assert x.shape[1] == lengths.max()
            for row, length, text in zip(x, lengths, batch.text):
                theirs = splits["train"][ours.text.index(text)]["features"]
                assert length == theirs[f"{kind}_len"] and not row[length:].any()
                assert np.array_equal(row[:length].numpy(), theirs[kind][:length])
        for text, label in zip(batch.text, batch.label):
            assert task.labels[label] == splits["train"][ours.text.index(text)]["label"]
        seen += batch.text
    assert sorted(seen) == sorted(ours.text)
    assert list(map(len, order)) == [3, 3, 1]


def test_a_batch_without_any_frame_has_one_of_zeros(tmp_path):
    task = TASKS["meld"]
    splits = make_splits(task, audio_dim=5, video_dim=3)
    splits["train"][0]["features"] |= {"audio_len": 0, "video": np.zeros((0, 3), "f4"), "video_len": 0}
    batch = collate(load_split(task, write(tmp_path, task, splits), "train"), [0])
    assert batch.audio.shape == (1, 1, 5) and batch.video.shape == (1, 1, 3) and not batch.audio.any()
    assert batch.audio_len.tolist() == batch.video_len.tolist() == [0]


# ---------------------------------------------------------------------------------------------------------------------
# The check


@pytest.mark.parametrize("name, layout", [("meld", "rows"), ("mosei", "table")])
def test_planted_faults_are_each_listed_by_row(tmp_path, capsys, name, layout):
    task = TASKS[name]
    splits = make_splits(task, audio_dim=5, video_dim=3)
    train, test = splits["train"], splits["test"]
    for split, rows in splits.items():
        for i, row in enumerate(rows):
            row["id"] = f"{split}{i}"
    train[0]["features"]["audio"][0, 0] = np.nan
    train[1]["label"] = "joyful"
    train[2]["features"]["video_len"] = -1
    train[4]["id"] = "train3"
    train[5]["features"] = test[1]["features"] | {"audio": test[1]["features"]["audio"].copy()}
    train[5]["label"] = test[1]["label"]
    train[6]["features"]["text"] = test[2]["features"]["text"]                  # only the text: natural
    if layout == "table":
        train[1]["label"] = -9.5
        splits = {split: make_table(task, rows) | {"id": [row["id"] for row in rows]} for split, rows in splits.items()}
    code, out, err = check(capsys, name, "--data-dir", write(tmp_path, task, splits))
    problems = [line for line in out.splitlines() if line.startswith("problem: ")]
    label = "'joyful'" if layout == "rows" else "-9.5"
    for line, start in zip(problems, (
            "problem: train row 0 has NaN or infinities in audio, read as 0",
            f"problem: train row 1 has the label {label}; expected ",
            "problem: train row 2 has the video length -1; expected 0 to its 6 frames",
            "problem: train row 4 has an id that another row has before it",
            "problem: test row 1 has text, label and features of train row 5"), strict=True):
        assert line.startswith(start), (line, start)
    assert code == 1 and err == "" and f"{name}: 5 problems, rows counted from 0" in out
    assert "in more than one split: 2 texts, 0 ids, 1 whole rows (0 of them known)" in out


def test_the_check_in_words(tmp_path, capsys):
    task = TASKS["simsv2"]
    splits = make_splits(task, "table", audio_dim=5, video_dim=3)
    splits["train"] |= {
        "regression_labels": np.array([-1, -1, -1, -0.4, -0.4, 1, 0], "f4"), "text_bert": np.zeros((7, 3, 5)),
        "vision": np.zeros((7, 6, 3), ">f8"), "vision_lengths": [0, 6, 6, 6, 6, 6, 1], "raw_text": ["", *"abcdef"]}
    splits["train"]["vision"][1, 0, 0] = 2.0
    code, out, _ = check(capsys, "simsv2", "--data-dir", write(tmp_path, task, splits))
    assert code == 0 and out.startswith("train: 7 (published: 2722) rows in ")
    for words in (
            "  sha256   not the published one",
            "  text     0 to 1 characters, 1 empty\n",
            "  video    (6, 3) (published: (232, 177)), >f8; lengths 0 to 6; missing in 1 rows, all zero in 5\n"
            "           0 to 2, mean 0.0215, std 0.206\n",
            "  unused   text_bert\n",
            "  -1.0          3  42.9% ##########################\n  -0.8          0   0.0%\n",
            "  -0.4          2  28.6% #################\n"):
        assert words in out, words


def test_many_problems_of_one_kind_do_not_hide_others(tmp_path, capsys):
    task = TASKS["meld"]
    rows = make_rows(task, 40, audio_dim=5, video_dim=3)
    for row in rows:
        row["features"]["audio"][0] = np.nan
    rows[39]["label"] = "glee"
    code, out, _ = check(capsys, "meld", "--data-dir", write(tmp_path, task, make_splits(
        task, audio_dim=5, video_dim=3) | {"train": rows}))
    assert code == 1 and out.count("problem: train row ") == 11 and "row 39 has the label 'glee'" in out
    assert "problem: 30 more such rows of train (audio)\n" in out and "meld: 41 problems" in out


def test_what_the_published_files_have_is_no_problem(tmp_path, capsys, monkeypatch):
    """Odd values and doubles count only in a file of another sha256; MELD is known to have one row in two splits."""
    task = TASKS["mosei"]
    splits = make_splits(task, "table", audio_dim=5, video_dim=3)
    splits["train"]["audio"][2, 0, 0] = -np.inf
    for column in splits["train"].keys() - {"id"}:
        splits["test"][column][0] = splits["train"][column][1]
    file = write(tmp_path, task, splits) / task.files["train"]
    code, out, _ = check(capsys, "mosei", "--data-dir", tmp_path)
    assert code == 1 and out.count("problem: ") == 2
    monkeypatch.setitem(TASKS, "mosei", replace(task, sha256=hashlib.sha256(file.read_bytes()).hexdigest()))
    code, out, _ = check(capsys, "mosei", "--data-dir", tmp_path)
    assert code == 0 and "sha256   as published" in out and "1 whole rows (0 of them known)\nmosei: 0 problems" in out
    task = TASKS["meld"]
    splits = make_splits(task, audio_dim=5, video_dim=3)
    splits["train"].append(splits["test"][0])
    write(tmp_path, task, splits)
    assert check(capsys, "meld", "--data-dir", tmp_path)[0] == 1
    splits["test"][0]["features"]["text"] = task.twins[0]
    write(tmp_path, task, splits)
    code, out, _ = check(capsys, "meld", "--data-dir", tmp_path)
    assert code == 0 and "1 whole rows (1 of them known)" in out and "sha256" not in out


def test_like_texts_without_features_or_with_another_label_are_no_double(tmp_path, capsys):
    task = TASKS["meld"]
    splits = make_splits(task, audio_dim=5, video_dim=3)
    splits["test"][1] = splits["train"][1] | {"label": "fear" if splits["train"][1]["label"] == "joy" else "joy"}
    for split in ("train", "test"):
        splits[split][0]["label"] = "joy"
        splits[split][0]["features"] |= {"text": "Yeah.", "audio": np.zeros((2, 5)), "audio_len": 2, "video_len": 0}
    code, out, _ = check(capsys, "meld", "--data-dir", write(tmp_path, task, splits))
    assert code == 0 and "in more than one split: 2 texts, 0 ids, 0 whole rows" in out


def test_texts_beyond_the_limit_are_counted(tmp_path, capsys):
    task = TASKS["meld"]
    splits = make_splits(task, audio_dim=5, video_dim=3)
    splits["test"][0]["features"]["text"] = "lamp " * 100
    write(tmp_path, task, splits)
    code, out, _ = check(capsys, "meld", "--data-dir", tmp_path, "--llm", HERE.parent / "demo" / "llm")
    assert code == 0 and "; 1 (25.0%) have more than 65 tokens and will be cut\n" in out


def test_exit_codes_of_the_command(tmp_path):
    """0 is tested above, in this process; here the rest of the way, with no traceback."""
    task = TASKS["meld"]
    splits = make_splits(task, audio_dim=5, video_dim=3)
    splits["train"][2]["label"] = "joyful"
    write(tmp_path, task, splits)
    run = subprocess.run([sys.executable, HERE.parent / "data.py", "meld", "--data-dir", tmp_path], capture_output=True,
                         encoding="utf-8", env={"PATH": "", "PYTHONUTF8": "1"})
    assert run.returncode == 1 and "problem: train row 2 has the label 'joyful'" in run.stdout and run.stderr == ""


def test_a_mistake_in_the_code_is_no_refusal(tmp_path, monkeypatch):
    def mistaken(*_):
        raise ValueError("no shape that fits")

    task = TASKS["meld"]
    write(tmp_path, task, make_splits(task, audio_dim=5, video_dim=3))
    monkeypatch.setattr(data, "check", mistaken)
    with pytest.raises(ValueError, match="no shape that fits"):
        data.main(["meld", "--data-dir", str(tmp_path)])


def test_real_meld_passes(capsys):
    code, out, err = check(capsys, "meld", "--data-dir", need_shared("data"))
    assert (code, err) == (0, "") and "train: 9989 (as published) rows" in out and "  neutral   1,256  48.1%" in out
    assert "176 texts, 0 ids, 1 whole rows (1 of them known)\nmeld: 0 problems" in out


# ---------------------------------------------------------------------------------------------------------------------
# Finding files


def touch(*files: Path):
    for file in files:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch()


def test_files_are_found_anywhere_below(tmp_path, monkeypatch):
    meld, mosi, mosei = (TASKS[name] for name in ("meld", "mosi", "mosei"))
    with pytest.raises(DataError, match="meld_train.pkl was not found .* hf download AZYoung/MELD_processed"):
        find_data(meld, tmp_path / "none", "train")
    touch(tmp_path / "own" / "train.pkl", tmp_path / "own" / "notes.txt")
    with pytest.raises(DataError, match="MELD/meld_train.pkl was not found in .*, where there is own/train.pkl; "):
        find_data(meld, tmp_path, "train")
    touch(tmp_path / "a" / "b" / "meld_train.pkl")
    assert find_data(meld, tmp_path, "train") == tmp_path / "a" / "b" / "meld_train.pkl"
    touch(tmp_path / "MELD" / "meld_train.pkl")                                 # where it is published: this one
    assert find_data(meld, tmp_path, "train") == tmp_path / "MELD" / "meld_train.pkl"
    touch(tmp_path / "c" / "meld_test.pkl", tmp_path / "d" / "meld_test.pkl")
    with pytest.raises(DataError, match="2 files could be MELD/meld_test.pkl: .*/c/.*, .*/d/.*; point --data"):
        find_data(meld, tmp_path, "test")
    with pytest.raises(DataError, match="MOSI/Processed/unaligned_50.pkl was not found .*; put it there; .*MMSA"):
        find_data(mosi, tmp_path, "train")
    with pytest.raises(DataError, match="hf download AZYoung/MOSEI_processed --repo-type dataset --local-dir"):
        find_data(mosei, tmp_path, "train")


def test_links_to_folders_are_followed_and_circles_end(tmp_path):
    meld, root, disk = TASKS["meld"], tmp_path / "root", tmp_path / "disk"
    touch(disk / "deep" / "meld_test.pkl", root / "a" / "notes.txt")
    (root / "a" / "sets").symlink_to(disk)
    (disk / "deep" / "round").symlink_to(root)
    (disk / "self").symlink_to(disk / "self")
    assert find_data(meld, root, "test") == root / "a" / "sets" / "deep" / "meld_test.pkl"
    with pytest.raises(DataError, match="where there is a/sets/deep/meld_test.pkl; "):
        find_data(meld, root, "train")
    (tmp_path / "link").symlink_to(root)
    assert find_data(meld, tmp_path / "link", "test").samefile(disk / "deep" / "meld_test.pkl")
    (disk / "deep" / "round").unlink()
    (root / "again").symlink_to(disk)                       # a second way to the same file is no second file
    assert find_data(meld, root, "test") == root / "a" / "sets" / "deep" / "meld_test.pkl"


@pytest.mark.skipif(not hasattr(os, "seteuid"), reason="permissions of POSIX")
def test_folders_that_may_not_be_read_are_passed_over(tmp_path, monkeypatch):
    touch(tmp_path / "MELD" / "meld_test.pkl", tmp_path / "b" / "meld_test.pkl")
    (tmp_path / "MELD").chmod(0)
    tmp_path.chmod(0o755)
    monkeypatch.chdir(tmp_path)
    me = os.geteuid()
    if me == 0:                                             # who may read everything
        os.seteuid(65534)
    try:
        assert find_data(TASKS["meld"], ".", "test") == Path("b", "meld_test.pkl")
    finally:
        os.seteuid(me)
        (tmp_path / "MELD").chmod(0o755)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="FIFOs of POSIX")
def test_what_is_no_file_is_no_data(tmp_path):
    """A FIFO would wait for its other end."""
    (tmp_path / "MELD" / "meld_train.pkl").mkdir(parents=True)
    os.mkfifo(tmp_path / "meld_train.pkl")
    with pytest.raises(DataError, match="meld_train.pkl was not found"):
        find_data(TASKS["meld"], tmp_path, "train")
    touch(tmp_path / "c" / "meld_train.pkl")
    assert find_data(TASKS["meld"], tmp_path, "train") == tmp_path / "c" / "meld_train.pkl"


def test_who_brings_own_data_is_sent_to_the_page_and_not_to_others_data(tmp_path):
    mine = data.Task("mine", labels=("gut", "schlecht"))
    with pytest.raises(DataError) as error:
        find_data(mine, tmp_path, "train")
    assert 'mine_train.pkl was not found' in str(error.value) and 'says under "Your own data"' in str(error.value)
    assert "MMSA" not in str(error.value) and ".npy" not in str(error.value)
    touch(tmp_path / "audio" / "1.npy", tmp_path / "audio" / "2.npy")
    with pytest.raises(DataError, match=r"no .pkl file, but 2 .npy; mine_train.pkl is to be a pickled list of rows "
                       r'made of them, {"label": y, "features": {"text": x, "audio": np.load\(A\), .*"Your own data"'):
        find_data(mine, tmp_path, "train")


@pytest.mark.parametrize("mosi, mosei", [
    ("MOSI/Processed", "MOSEI/Processed"), ("CMU-MOSI", "CMU-MOSEI/x"), ("x/MOSI/Processed", "y/MOSEI"),
    ("MOSI", "MOSI/MOSEI"), ("MOSEI/MOSI/Processed", "MOSEI/Processed"), ("mosi", "cmu_mosei")])
def test_mosi_and_mosei_are_told_apart(tmp_path, monkeypatch, mosi, mosei):
    """Their files have one last name."""
    folders = {"mosi": tmp_path / mosi, "mosei": tmp_path / mosei}
    touch(*(folder / "unaligned_50.pkl" for folder in folders.values()))
    for name, folder in folders.items():
        assert find_data(TASKS[name], tmp_path, "train") == folder / "unaligned_50.pkl"
        monkeypatch.chdir(folder)                           # inside, where only the absolute path tells
        assert find_data(TASKS[name], ".", "train").absolute() == folder / "unaligned_50.pkl"
    (folders["mosei"] / "unaligned_50.pkl").unlink()
    monkeypatch.chdir(folders["mosi"])
    for root in (tmp_path, "."):
        with pytest.raises(DataError, match="was not found"):                   # and never the one for the other
            find_data(TASKS["mosei"], root, "train")


def fetch_all(task, folder):
    for split in SPLITS:
        find_data(task, folder, split, fetch=True)


def test_folders_come_before_the_hub(tmp_path):
    assert find_llm(tmp_path) == tmp_path
    find_llm(tmp_path, fetch=True)                                # what is here is not fetched
    touch(*(tmp_path / name for name in TASKS["meld"].files.values()))
    fetch_all(TASKS["meld"], tmp_path)
    with pytest.raises(DataError, match="a/b: no such backbone, .* with --llm, or get it: hf download a/b"):
        find_llm("a/b")


# ---------------------------------------------------------------------------------------------------------------------
# The hub


class GatedRepoError(OSError):
    """By name the client's."""


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A stand-in of the client: `there` names the files of the repository, `asked` what was asked for."""
    hub = types.SimpleNamespace(there=[], asked=[], error=None, cache=tmp_path / "cache")

    def snapshot_download(repo, repo_type, allow_patterns, ignore_patterns, local_files_only):
        if local_files_only and not hub.cache.exists():
            raise FileNotFoundError("not in the cache")
        if not local_files_only:
            if hub.error:
                raise hub.error
            for name in hub.there:
                ignored = any(fnmatch(name, pattern) for pattern in ignore_patterns or ())
                if not ignored and any(fnmatch(name, pattern) for pattern in allow_patterns):
                    hub.asked.append(f"{repo_type} {repo} {name}")
                    touch(hub.cache / name)
        return str(hub.cache)

    monkeypatch.setitem(sys.modules, "huggingface_hub", types.SimpleNamespace(snapshot_download=snapshot_download))
    return hub


@pytest.mark.parametrize("weights, fetched", [
    (["model.safetensors", "pytorch_model.bin", "onnx/model.safetensors", "consolidated.safetensors"],
     ["model.safetensors"]),
    (["pytorch_model.bin", "onnx/model.bin"], ["pytorch_model.bin"])])
def test_a_backbone_is_fetched_without_code_and_with_weights_of_one_format(hub, weights, fetched):
    small = ["config.json", "qwen.tiktoken", "tokenizer.model", "merges.txt"]
    hub.there = [*small, "modeling_qwen.py", "assets/logo.json", *weights]
    with pytest.raises(DataError, match="no such backbone"):
        find_llm("a/b")
    assert find_llm("a/b", fetch=True) == hub.cache and hub.asked == [f"model a/b {name}" for name in small + fetched]
    assert find_llm("a/b") == hub.cache


def test_a_data_set_is_fetched_and_checked(hub, tmp_path, capsys):
    task, none = TASKS["meld"], tmp_path / "none"
    hub.there = [f"sub/meld_{split}.pkl" for split in SPLITS] + ["README.md", "raw.pkl"]
    fetch_all(task, none)
    assert hub.asked == [f"dataset AZYoung/MELD_processed {name}" for name in hub.there[:3]]
    assert find_data(task, none, "valid") == hub.cache / "sub" / "meld_valid.pkl"
    touch(tmp_path / "data" / "meld_valid.pkl")             # a folder comes first
    assert find_data(task, tmp_path / "data", "valid") == tmp_path / "data" / "meld_valid.pkl"
    hub.there, task = ["README.md"], TASKS["cherma"]
    code, _, err = check(capsys, "cherma", "--data-dir", none, "--download")
    assert code == 2 and "CHERMA0723/cherma_train.pkl was not found" in err


@pytest.mark.parametrize("error, says", [
    (GatedRepoError("403"), r"a/b cannot be fetched \(403\): accept the licence .*, run: hf auth login; or by hand"),
    (OSError("no\nroute"), r"\(no route\): check the network and the name; or by hand: hf download a/b")])
def test_what_cannot_be_fetched_is_told_in_one_sentence(hub, error, says):
    hub.error = error
    with pytest.raises(DataError, match=says):
        find_llm("a/b", fetch=True)


def test_download_without_the_client(tmp_path, capsys):
    code, _, err = check(capsys, "meld", "--data-dir", tmp_path, "--download")
    assert code == 2 and "pip install huggingface_hub" in err and err.count("\n") == 1
    assert "hf download AZYoung/MELD_processed --repo-type dataset" in err
    with pytest.raises(DataError, match="pip install huggingface_hub; or by hand: hf download Qwen/Qwen-1_8B"):
        find_llm("Qwen/Qwen-1_8B", fetch=True)


def test_the_real_client_finds_what_is_in_its_cache(tmp_path, monkeypatch):
    monkeypatch.undo()
    constants = pytest.importorskip("huggingface_hub.constants")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    folder = tmp_path / "models--Qwen--Tiny"
    touch(folder / "refs" / "main", folder / "snapshots" / "abc" / "config.json")
    (folder / "refs" / "main").write_text("abc")
    assert find_llm("Qwen/Tiny") == folder / "snapshots" / "abc"
    for name in ("Qwen/Other", "/nowhere", "a/b/c"):
        with pytest.raises(DataError, match="no such backbone"):
            find_llm(name)
