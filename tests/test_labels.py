"""Where a label ends, what is made of its probabilities, metrics that follow a range, validation rows of one's own."""
import copy
import json
import pickle
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import HERE, ByteTokenizer, flags, need_shared, random_adapter
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import data
import eval
import train
from adapter import AdapterConfig, MultimodalLLM, load_adapter, save_adapter
from data import FAMILIES, TASKS, Split, Task, collate, load_split, load_tokenizer, preset, share_of
from eval import alarms, evaluate, metrics_of, score, score_labels
from support.files import UserError
from support.pickles import read_pickle

DEMO = HERE.parent / "demo" / "llm"
TWELVE = Task("twelve", labels=tuple("abcdefghijkl"), text_len=40)


def make(llm, task: Task, official: bool = False) -> MultimodalLLM:
    config = AdapterConfig(llm.config.dim, 12, 3, audio_hidden=16, video_hidden=4, pseudo_tokens=2)
    return MultimodalLLM(llm, random_adapter(config), ByteTokenizer(), task, official)


# ---------------------------------------------------------------------------------------------------------------------
# Where a label ends


@pytest.mark.parametrize("family, task, official, ends", [
    ("llama", TASKS["mosei"], False, True), ("llama", TASKS["mosei"], True, False), ("chatglm", TWELVE, False, True),
    ("chatglm", TWELVE, True, False), ("qwen", TASKS["mosei"], False, False), ("qwen2", TASKS["meld"], False, False)])
def test_labels_of_unequal_lengths_end_with_the_end_token(tiny, family, task, official, ends):
    net = make(tiny[family], task, official)
    texts = task.wording(family, official).labels
    assert net.labels == [net.tokenizer.encode(text) + [net.eos_id] * ends for text in texts]
    assert net.end == [net.eos_id] * ends and net.answer_len == max(map(len, net.labels))


@pytest.mark.release
@pytest.mark.parametrize("folder, family", [("llama2", "llama"), ("chatglm3", "chatglm"), ("qwen", "qwen")])
def test_no_published_pair_needs_an_end(tiny, folder, family):
    tokenizer = load_tokenizer(need_shared("tokenizers", folder))
    for name in ("meld", "cherma", "mosei", "simsv2"):
        assert len({len(tokenizer.encode(text)) for text in TASKS[name].wording(family).labels}) == 1


def test_the_end_is_taught(tiny):
    net = make(tiny["llama"], TASKS["mosei"])
    batch = collate(spoken(TASKS["mosei"], [-1.5, 1.5]), [0, 1])
    x, real, _ = net.rows(batch, [net.tokenizer.encode(text) + [net.eos_id] for text in ("-1.5", "1.5")])
    logprobs = net.llm.logits(net.llm(x, real)).log_softmax(dim=-1)
    expected = 0
    labels = [[*net.tokenizer.encode(text), net.eos_id] for text in ("-1.5", "1.5")]
    for row, label in zip(logprobs, labels):
        expected -= sum(row[i - len(label) - 1, token] for i, token in enumerate(label)) / len(label) / 2
    torch.testing.assert_close(net.loss(batch), expected)


def test_an_adapter_saved_without_ends_is_refused(tiny, tmp_path):
    llm, tokenizer, file = tiny["llama"], ByteTokenizer(), tmp_path / "a.safetensors"
    save_adapter(file, make(llm, TASKS["mosei"]))
    load_adapter(file, llm, tokenizer, TASKS["mosei"])
    with safe_open(file, "pt") as opened:
        meta = json.loads(opened.metadata()["mse-adapter"])
    save_file(load_file(file), file, {"mse-adapter": json.dumps(meta | {"mode": "default"})})       # as it was
    with pytest.raises(ValueError, match="mode is 'default', but here 'default, an end token behind each label'"):
        load_adapter(file, llm, tokenizer, TASKS["mosei"])


def spoken(task: Task, labels: list) -> Split:
    """Rows without words whose audio alone tells the label, as one of 12."""
    audio = [np.eye(12, dtype=np.float32)[[round(label) % 12]] for label in labels]
    video, one = [np.zeros((1, 3), np.float32)] * len(labels), [1] * len(labels)
    return Split(["So."] * len(labels), audio, one, video, one, labels, list(map(str, range(len(labels)))))


def test_every_one_of_twelve_classes_is_answered_both_ways(tiny):
    """'1' begins '10': without an end, either one or the other could never be answered."""
    llm = copy.deepcopy(tiny["llama"]).requires_grad_()     # untrained as it is, it must learn to write, too
    net, split = make(llm, TWELVE), spoken(TWELVE, list(range(12)))
    optimizer, batch = torch.optim.Adam(net.parameters(), lr=3e-3), collate(split, range(12))
    for _ in range(60):
        optimizer.zero_grad()
        net.loss(batch).backward()
        optimizer.step()
    for decode in ("greedy", "labels"):
        assert evaluate(net, split, 12, decode).pred.tolist() == list(range(12)), decode


def test_qwen3_is_spoken_to_as_qwen():
    for name in ("meld", "mosei", "simsv2"):
        three, two = (TASKS[name].wording(family) for family in ("qwen3", "qwen2"))
        assert three._replace(label=None) == two._replace(label=None)
        assert preset(name, "qwen3") == preset(name, "qwen")
    assert TASKS["mosei"].wording("qwen3").label(0.4) == "+0.4"


def test_a_family_with_words_of_its_own_trains_as_llama2(monkeypatch):
    monkeypatch.setitem(FAMILIES, "gemma2", replace(FAMILIES["llama"], name="gemma2", pad="<pad>"))
    assert all(preset(name, "gemma2") == preset(name, "llama") for name in TASKS)


# ---------------------------------------------------------------------------------------------------------------------
# Readouts


def test_the_median_has_half_of_the_probability_on_it_or_below():
    task, p = TASKS["simsv2"], np.zeros((3, 21))
    p[0, [0, 10, 20]] = 0.4, 0.2, 0.4
    p[1, [0, 20]] = 0.49, 0.51
    p[2, :] = 1 / 21
    true = [-1.0, 0.0, 0.5]
    median = score_labels(p, true, task, "median")
    assert median.pred.tolist() == [0, 1, 0] and median.bias == pytest.approx(((0 + 1) + (1 - 0) + (0 - 0.5)) / 3)
    # it is what the mean absolute error asks for
    values = np.array(task.values())
    costs = np.abs(values[:, None] - values).dot(p.T)                       # (guess, row)
    assert (costs.min(axis=0) == pytest.approx([costs[list(values).index(x), i] for i, x in enumerate(median.pred)]))


@pytest.mark.parametrize("name, wrong", [("meld", -1), ("simsv2", 0)])
def test_a_row_without_probabilities_is_unparsed(name, wrong):
    task = TASKS[name]
    p = np.full((2, len(task.values())), 1 / len(task.values()))
    p[1] = np.nan
    for readout in ("mean", "median", "mode"):
        result = score_labels(p, task.values()[:2], task, readout)
        assert result.unparsed == 1 and result.values[1] is None and result.pred[1] == wrong
        assert result.answers[1] == "" and "unparsed 1/2" in result.line()


def test_what_unparsed_intensities_do_to_has0_is_said():
    answers, true = ["1.0"] * 48 + ["-1.0"] * 49 + ["what"] * 3, [1.0] * 48 + [-1.0] * 49 + [2.0] * 3
    (line,) = alarms(score(answers, true, TASKS["mosei"]))
    assert line.startswith("3 of 100 answers (3.0%) do not parse and count as 0: has0 acc2, to which 0 is positive, ")
    assert line.endswith("is 1.0000 with them, 1.0000 without them")
    assert alarms(score(answers[:-1], true[:-1], TASKS["mosei"])) != []     # 2 of 99
    assert alarms(score([*answers[:-2], "0.0", "0.0"], true, TASKS["mosei"])) == []     # 1 of 100
    (nothing,) = alarms(score(["what"] * 9, true[:9], TASKS["mosei"]))
    assert nothing == "9 of 9 answers (100.0%) do not parse and count as 0"
    # a range without 0: its nearest end, in both ways
    marks, p = Task("marks", range=(1.0, 5.0)), np.full((4, 41), np.nan)
    for result in (score(["what", "", "3.0", "2.0"], [1.0, 2.0, 3.0, 4.0], marks), score_labels(p, [1.0] * 4, marks)):
        assert result.pred[0] == result.pred[1] == 1 and "do not parse and count as 1" in alarms(result)[-1]
    assert "do not parse and count as 0" in alarms(score(["what", "3.0"], [1.0, 2.0], marks, official=True))[-1]
    # what only the release reads is parsed under its rules
    for answers, true, name in ((["：0.4", ".5", "–0.6"], [0.4, 0.5, -0.6], "simsv2"), (["+4", "4.0"], [4, 4], "meld")):
        release, strict = (score(answers, true, TASKS[name], official) for official in (True, False))
        assert (release.unparsed, strict.unparsed) == (0, len(answers)) and release.pred.tolist() == true


def test_all_readouts_stand_in_a_runs_metrics(tmp_path, monkeypatch):
    monkeypatch.setitem(TASKS, "own", Task("own", range=(-1.0, 1.0)))
    write_own(tmp_path, ("train", "valid", "test"))
    train.main([*own_flags(tmp_path), "--decode", "labels", "--readout", "median"])
    report = json.loads((tmp_path / "out" / "1111" / "metrics.json").read_text())
    assert list(report) == ["rows", "labels median", "greedy", "labels mean", "labels mode"]
    assert all(abs(report[name]["bias"]) < 2 for name in report if name != "rows")
    line = json.loads((tmp_path / "out" / "1111" / "results.json").read_text())["line"]
    assert f"mae {report['labels median']['scores']['mae']:.4f}" in line


# ---------------------------------------------------------------------------------------------------------------------
# Metrics and tables by range


@pytest.mark.parametrize("low, high, names", [
    (1.0, 5.0, ["mae", "corr", "r2"]), (0.0, 1.0, ["mae", "corr", "r2"]), (-5.0, 0.0, ["mae", "corr", "r2"]),
    (-5.0, 5.0, ["has0_acc2"]), (-1.0, 1.0, ["acc2"]), (-0.5, 3.0, ["has0_acc2"])])
def test_two_sides_of_0_are_scored_only_where_there_are_two(low, high, names):
    task = Task("own", range=(low, high))
    true = [low, (low + high) / 2, high]
    assert list(metrics_of(task)(true, true))[:len(names)] == names
    assert score([f"{y:.2f}" for y in true], true, task).scores["mae"] == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("low, high, marks", [
    (1, 5, "1 2 3 4 5"), (-3, 3, "-3 -2 -1 0 1 2 3"), (0, 1, "0 0.2 0.4 0.6 0.8 1"),
    (0, 100, "0 10 20 30 40 50 60 70 80 90 100")])
def test_the_tables_rows_follow_the_range(low, high, marks):
    task = Task("own", range=(float(low), float(high)))
    result = score([f"{high}.0", f"{low}.0", "x"], [float(high)] * 3, task)
    lines = [line.split() for line in result.table().splitlines()]
    assert [line[0] for line in lines[1:]] == marks.split()
    assert lines[-1][1:] == ["1", *["0"] * (len(lines) - 3), "1", "1"]          # low, between, high, none


def test_a_seed_twice_is_refused(tmp_path):
    with pytest.raises(ValueError, match="--seeds 1111 1111: a seed twice"):
        train.main(["--out", str(tmp_path), "--seeds", "1111", "1111"])
    with pytest.raises(ValueError, match="--seeds 1 -1: expected whole numbers from 0 to"):
        train.main(["--out", str(tmp_path), "--seeds", "1", "-1"])


# ---------------------------------------------------------------------------------------------------------------------
# A data set without a valid split


def write_own(folder, splits):
    """Rows of a task "own" with an intensity that their length tells."""
    for split in splits:
        rows = read_pickle(HERE.parent / "demo" / f"demo_{split}.pkl")[:20 if split == "train" else 6]
        for row in rows:
            row["label"] = round(len(row["features"]["text"]) % 20 / 10 - 1, 1)
        (folder / f"own_{split}.pkl").write_bytes(pickle.dumps(rows, 4))


def own_flags(folder) -> list:
    return ["--data", "own", "--llm", str(DEMO), *flags(folder, folder / "out", "--epochs", "1")]


def test_validation_rows_can_be_drawn_from_the_training_rows(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(TASKS, "own", Task("own", range=(-1.0, 1.0)))
    write_own(tmp_path, ("train", "test"))
    with pytest.raises(ValueError, match="own_valid.pkl was not found .*--valid-share 0.1"):
        train.main(own_flags(tmp_path))
    assert data.main(["own", "--data-dir", str(tmp_path)]) == 0             # the other splits are checked
    said = capsys.readouterr().out
    assert "no valid split: " in said and "\ntest: 6 rows in " in said and "own: 0 problems" in said
    train.main([*own_flags(tmp_path), "--valid-share", "0.1"])
    first = capsys.readouterr().out.splitlines()[0]
    assert first.startswith("own: 18 train, 2 valid (drawn from train by the seed), 6 test rows")
    whole = load_split(TASKS["own"], tmp_path, "train")
    valid_rows, train_rows = share_of(whole, 0.1, 1111, left=1)
    assert sorted(train_rows.id + valid_rows.id, key=int) == whole.id           # whole and disjoint
    assert share_of(whole, 0.1, 1111)[0].id == valid_rows.id != share_of(whole, 0.1, 2222)[0].id
    log = json.loads((tmp_path / "out" / "1111" / "log.jsonl").read_text())
    monkeypatch.setattr("sys.argv", ["eval.py", str(tmp_path / "out" / "1111"), "--split", "valid"])
    eval.main()
    assert f"mae {log['valid_mae']:.4f}" in capsys.readouterr().out
    file = tmp_path / "out" / "1111" / "settings.json"
    settings = json.loads(file.read_text())
    for change in (dict(seed="1111"), dict(seed=None), dict(seed=-1), dict(seed=1.5), dict(seed=2**40)):
        file.write_text(json.dumps(settings | change))
        with pytest.raises(UserError, match=f"settings.json: seed is {change['seed']!r}, which no run writes"):
            eval.main()
