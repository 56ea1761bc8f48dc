"""Label scoring against brute force, what evaluation prints and writes, the ablations, one clip, the backbone."""
import csv
import json
import pickle
import re
import shutil
from argparse import Namespace
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch
from conftest import HERE, Bomb, ByteTokenizer, close, need_shared, random_adapter, recipe
from pytest import approx
from safetensors.torch import load_file, save_file

import eval
from adapter import AdapterConfig, MSEAdapter, MultimodalLLM, load_adapter, save_adapter
from data import TASKS, Batch, Split, collate, load_split, load_tokenizer
from eval import evaluate, label_logprobs, moments, score, score_labels, variants
from model import load_llm
from release import OFFICIAL_NAMES
from reports import backbone, clip
from reports.tables import write_results
from support.files import UserError

TEXTS = ["Oh!", "", "I can't believe it: she left me. Again!", "好吧"]


def rows(task, texts=TEXTS) -> Split:
    """These texts as a split, with 4 audio and 6 video features; some rows lack one."""
    features = {m: [recipe(f"eval.{m}.{text}", (5, width), 1.0).numpy() for text in texts]
                for m, width in (("audio", 4), ("video", 6))}
    n, lengths = len(texts), [3, 5, 0, 1] * len(texts)
    return Split(list(texts), features["audio"], lengths[:n], features["video"], lengths[1:n + 1],
                 task.values()[:n], [f"row {i}" for i in range(n)], unused=[])


def make(llm, task: str, official: bool = False, **switches) -> MultimodalLLM:
    config = AdapterConfig(llm.config.dim, 4, 6, audio_hidden=5, video_hidden=3, pseudo_tokens=2, **switches)
    return MultimodalLLM(llm, random_adapter(config), ByteTokenizer(), TASKS[task], official)


# ---------------------------------------------------------------------------------------------------------------------
# Label scoring


@torch.no_grad()
def brute_force(net, batch):
    """The labels' probabilities from one full forward pass each, over the rows with that label behind them."""
    scores = torch.zeros(len(batch.text), len(net.labels))
    for k, ids in enumerate(net.labels):
        x, real, _ = net.rows(batch, [list(ids)] * len(batch.text))
        hidden = net.llm(x, real)[:, -len(ids) - 1:-1]
        after = net.llm.logits(hidden).log_softmax(dim=-1)                                        # (B, n, V)
        scores[:, k] = after.gather(2, torch.tensor(ids).expand(len(scores), -1)[..., None]).sum((1, 2))
    return scores.softmax(dim=-1)


@pytest.mark.parametrize("family, task, official", [
    ("llama", "meld", False), ("llama", "simsv2", True), ("qwen", "mosei", False), ("qwen2", "cherma", True),
    ("chatglm", "mosei", False)])
def test_label_probabilities_equal_brute_force(tiny, family, task, official):
    net = make(tiny[family], task, official)
    batch = collate(rows(net.task), range(4))
    ours = label_logprobs(net, batch).exp()
    close(ours, brute_force(net, batch))
    close(ours.sum(dim=1), torch.ones(4))
    assert ours.shape == (4, len(net.task.values())) and ours.std(dim=0).max() > 1e-3


@pytest.mark.parametrize("family, task", [
    ("llama", "mosei"), ("qwen", "simsv2"), ("qwen2", "meld"), ("chatglm", "cherma")])
def test_label_scoring_always_answers(tiny, family, task):
    net = make(tiny[family], task)
    split, legal = rows(net.task), net.task.values()
    greedy, mode = evaluate(net, split, 3), evaluate(net, split, 3, decode="labels", readout="mode")
    mean = evaluate(net, split, 3, decode="labels")
    assert greedy.unparsed == 4 and mode.unparsed == mean.unparsed == mode.out_of_range == mean.out_of_range == 0
    assert set(mode.pred) <= set(legal) and np.isfinite(list(mode.scores.values())[0])
    for i in range(4):                                                  # in the split's order
        p = label_logprobs(net, collate(split, [i])).exp()[0].double().numpy()
        close(torch.tensor(mean.probabilities[i]), torch.tensor(p))      # whatever the batch
        assert mode.pred[i] == legal[p.argmax()] == float(mode.answers[i])
        assert greedy.answers[i] == net.answer(collate(split, [i]))[0]
        assert mean.pred[i] == (mode.pred[i] if net.task.labels else pytest.approx(p @ np.array(legal), abs=1e-5))


class Forgetful(torch.nn.Module):
    """What a fork may put in front of the mixer: half of what it lets through is lost in training."""

    def __init__(self, encoder):
        super().__init__()
        self.encoder, self.dropout = encoder, torch.nn.Dropout(0.5)

    def forward(self, x, lengths):
        return self.dropout(self.encoder(x, lengths))


def test_no_dropout_in_evaluation(tiny):
    net = make(tiny["llama"], "meld")
    split, there = rows(net.task), dict(size=4, decode="labels")
    expected = evaluate(net, split, **there).probabilities
    net.adapter.audio = Forgetful(net.adapter.audio)
    net.train()
    assert evaluate(net, split, **there).probabilities.tolist() == expected.tolist() and not net.training


def test_readout():
    task, p = TASKS["simsv2"], np.zeros((2, 21))
    p[0, [0, 20]], p[1, [9, 10]] = (0.75, 0.25), (0.4, 0.6)              # -1 and 1; -0.1 and 0
    mean, mode = (score_labels(p, [-1.0, 0.1], task, readout) for readout in ("mean", "mode"))
    assert mean.pred.tolist() == pytest.approx([-0.5, -0.04]) and mode.pred.tolist() == [-1, 0]
    assert mean.scores["mae"] == pytest.approx((0.5 + 0.14) / 2) and mode.scores["mae"] == pytest.approx(0.05)
    assert moments(p, task)[1].tolist() == pytest.approx([np.sqrt(0.75), np.sqrt(0.0024)])


@pytest.mark.parametrize("family, folder", [("llama", "llama2"), ("qwen", "qwen"), ("chatglm", "chatglm3")])
def test_no_label_begins_another(family, folder):
    tokenizer = load_tokenizer(need_shared("tokenizers", folder))
    for task in TASKS.values():
        labels = [tuple(tokenizer.encode(text)) for text in task.wording(family).labels]
        assert not any(a[:len(b)] == b for a in labels for b in labels if a is not b)


# ---------------------------------------------------------------------------------------------------------------------
# Results


@pytest.mark.release
@pytest.mark.parametrize("name", sorted(path.stem for path in (HERE / "golden").glob("*.json")))
def test_the_release_reads_its_answers_so(name):
    info = json.loads((HERE / "golden" / f"{name}.json").read_text(encoding="utf-8"))
    result = score(info["generated_text"], info["labels"], TASKS[info["dataset"]], official=True)
    assert result.values == result.pred.tolist() == info["parsed"] and result.unparsed == len(info["parsed"])


def test_scoring_of_odd_answers():
    meld, mosei = TASKS["meld"], TASKS["mosei"]
    classes = score(["0", "joy", "9", " 4"], [0, 0, 0, 4], meld)
    assert (classes.values, classes.unparsed, classes.out_of_range) == ([0, None, 9, 4], 1, 1)
    assert classes.scores["accuracy"] == 0.5
    assert classes.line() == ("accuracy 0.5000, weighted f1 0.6250, macro f1 0.7500, unweighted accuracy 0.6667, "
                              "unparsed 1/4, out of range 1/4")
    same = score(["0", "4"], [0, 4], meld)                  # classes of one size: once
    assert same.line() == "accuracy 1.0000, weighted f1 1.0000, unparsed 0/2, out of range 0/2"
    answers = ["245.0", "what", "-1.0", "（1"]
    ours, release = (score(answers, [3.0, 1.0, -1.0, 1.0], mosei, official) for official in (False, True))
    assert ours.pred.tolist() == [3, 0, -1, 0] and release.pred.tolist() == [245, 0, -1, 0]
    assert (ours.unparsed, ours.out_of_range, release.unparsed, release.out_of_range) == (2, 1, 2, 1)


def test_a_line_says_why_a_score_is_undefined():
    line = score(["1.0"] * 3, [1.0, 2.0, 0.0], TASKS["mosei"]).line()
    assert "corr nan (predictions or true values are constant" in line and "mae 0.6667, " in line
    assert line.endswith("unparsed 0/3, out of range 0/3")


def test_a_collapse_is_said():
    meld, mosei = TASKS["meld"], TASKS["mosei"]
    labels = [0] * 5 + [1] * 45 + [2] * 50
    said = eval.collapsed(score(["5"] * 96 + ["0"] * 4, labels, meld))
    assert said.startswith("looks collapsed: 'disgust' is 96 of 100 answers; that answer alone scores accuracy 0.0000,")
    for none in (["joy"] * 100, ["9"] * 100, ["joy", "7", "9", "-1"] * 25):
        assert "'no class' is 100 of 100" in eval.collapsed(score(none, labels, meld))
    assert eval.collapsed(score(["5"] * 95 + ["0"] * 5, labels, meld)) == ""
    truth = [-2.0, -1.0, 0.0, 1.0, 2.0]
    said = eval.collapsed(score(["0.4", "0.4", "0.4", "0.4", "0.5"], truth, mosei))
    assert said.startswith("looks collapsed: the predictions' standard deviation is 0.04, the labels' 1.41; their mean")
    assert "mae 1.2840, corr nan" in said
    assert eval.collapsed(score(["0.0", "0.1", "0.2", "0.3", "0.4"], truth, mosei)) == ""


def test_results_on_disk(tmp_path):
    task = TASKS["meld"]
    split = replace(rows(task), text=['=1, "quoted"', "two\nlines", "好吧", ""], label=[0, 1, 1, 6])
    p = np.full((4, 7), 0.1)
    p[:, 1] = 0.4
    results = {"greedy": score(["0", "no", "1", "8"], split.label, task), "labels": score_labels(p, split.label, task)}
    write_results(tmp_path, split, results)
    raw = (tmp_path / "predictions.csv").read_bytes()
    lines = list(csv.reader(raw.decode("utf-8-sig").splitlines(keepends=True)))
    assert raw.startswith("\ufeffid,text,truth,answer,parsed,p(neutral),p(surprise)".encode())
    assert [line[:5] for line in lines[1:]] == [
        ["row 0", "'" + split.text[0], "0", "0", "0"], ["row 1", split.text[1], "1", "no", ""],
        ["row 2", "好吧", "1", "1", "1"], ["row 3", "", "6", "8", "8"]]
    assert [float(x) for x in lines[1][5:]] == p[0].tolist()
    report = json.loads((tmp_path / "metrics.json").read_text())
    assert report["rows"] == 4 and report["greedy"]["scores"]["accuracy"] == 0.5
    assert (report["greedy"]["unparsed"], report["greedy"]["out_of_range"]) == (1, 1)
    assert report["labels"]["per_class"]["surprise"] == dict(precision=0.5, recall=1, f1=pytest.approx(2 / 3), rows=2)
    assert report["greedy"]["confusion"][1] == [0, 1, 0, 0, 0, 0, 0, 1]
    low, high = report["labels"]["intervals"]["accuracy"]
    assert 0 <= low < 0.5 < high <= 1


def test_results_of_intensities_on_disk(tmp_path):
    task = TASKS["mosei"]
    split, p = rows(task), np.full((4, 61), 1 / 61)
    results = {"labels": score_labels(p, split.label, task), "greedy": score(["x"] * 4, split.label, task)}
    write_results(tmp_path, split, results, "-valid")
    text = (tmp_path / "metrics-valid.json").read_text()
    report = json.loads(text, parse_constant=pytest.fail)["labels"]     # NaN is no JSON
    assert report["scores"]["corr"] is None and report["intervals"]["corr"] == [None, None]
    head, first, *_ = csv.reader((tmp_path / "predictions-valid.csv").read_text("utf-8-sig").splitlines())
    assert head[5:] == ["mean", "std"] and [float(x) for x in first[5:]] == pytest.approx([0, 1.760682], abs=1e-6)


def table(pred, true, task: str) -> list[list[str]]:
    return [line.split() for line in score(pred, true, TASKS[task]).table().splitlines()]


def test_tables():
    surprise = table(["0", "1", "x", "6"], [0, 1, 1, 6], "meld")[2]
    assert " ".join(surprise) == "surprise 0 1 0 0 0 0 0 1 1.0000 0.5000 0.6667"
    rows = table(["-9", "-0.5", "0.5", "1.5", "3", "x"], [-3.0, 0.0, 0.4, 2.5, 3.0, 1.0], "mosei")[1:]
    assert ["".join(row[1:]) for row in rows] == [                      # -3 .. 3 and none
        "10000000", "00000000", "00000000", "00020000", "00000001", "00000100", "00000010"]
    rows = table(["-1.0", "-0.7", "0.1", "0.7", "?"], [-0.7, -0.1, 0.1, 0.2, 1.0], "simsv2")[1:]
    assert [row[0] for row in rows] == ["[-1,-.7]", "(-.7,-.1]", "(-.1,.1]", "(.1,.7]", "(.7,1]"]
    assert ["".join(row[1:]) for row in rows] == ["100000", "100000", "001000", "000100", "000001"]


def test_cells_are_flush_right_where_a_chinese_character_takes_two_columns():
    assert eval.aligned([["", "愤怒", "joy"], ["愤怒", 1, 1001]]) == "      愤怒   joy\n愤怒     1  1001"


# ---------------------------------------------------------------------------------------------------------------------
# What the modalities are worth


class Listener:
    """Answers with the number that it hears, sees, or reads; what is missing is no answer."""
    task, official, tokenizer = TASKS["meld"], False, ByteTokenizer()

    def __init__(self, sense: str):
        self.sense = sense

    def answer(self, batch: Batch) -> list[str]:
        if self.sense == "text":
            return batch.text
        features, lengths = getattr(batch, self.sense), getattr(batch, f"{self.sense}_len")
        return [str(int(x[n - 1, 0])) if n else "" for x, n in zip(features, lengths)]


@pytest.fixture
def spoken() -> Split:
    """100 rows in which text, audio and video each tell the label, audio and video in their last real frame."""
    labels = [i % 7 for i in range(100)]
    features = [np.full((n % 3 + 1, 2), y) for n, y in enumerate(labels)]
    lengths = [len(x) for x in features]
    return Split([str(y) for y in labels], features, lengths, features, lengths, labels, list(map(str, range(100))), [])


@pytest.mark.parametrize("sense, hurt", [
    ("audio", {"without audio", "without audio and video", "audio shuffled"}),
    ("video", {"without video", "without audio and video", "video shuffled"}), ("text", {"text empty"})])
def test_the_ablation_finds_what_a_model_uses(spoken, sense, hurt):
    results = {name: evaluate(Listener(sense), part, 16) for name, part in variants(spoken).items()}
    lines = eval.ablation_table(results).splitlines()[1:]
    table = {line[:23].strip(): line[23:].split() for line in lines}
    assert table.pop("all")[0] == "1.0000" and len(table) == 6
    for name, (accuracy, change, low, high, *_, unparsed) in table.items():
        if name not in hurt:
            assert (accuracy, change, low, high) == ("1.0000", "+0.0000", "[+0.0000,", "+0.0000]"), name
        elif "shuffled" in name:
            assert float(low[1:-1]) < float(change) < float(high[:-1]) < -0.5
        else:
            assert (accuracy, change, low, high) == ("0.0000", "-1.0000", "[-1.0000,", "-1.0000]"), name
        assert unparsed == ("100/100" if accuracy == "0.0000" else "0/100")
    dropped = dict(eval.ablation(Listener(sense), spoken, 16))
    assert list(dropped) == ["without audio", "without video", "without audio and video"]
    assert all((result.scores["accuracy"] == 0) == (name in hurt) for name, result in dropped.items())
    assert dropped["without audio"].unparsed == (100 if sense == "audio" else 0)


def test_shuffling_moves_features_with_their_lengths(spoken):
    parts = variants(spoken)
    moved = parts["audio shuffled"]
    assert [len(x) for x in moved.audio] == moved.audio_len
    assert moved.video is spoken.video and moved.label is spoken.label
    assert sorted(x[0, 0] for x in moved.audio) == sorted(spoken.label) != [x[0, 0] for x in moved.audio]
    deaf = parts["without audio"]
    assert deaf.audio_len == [0] * 100 and deaf.video_len == spoken.video_len
    assert parts["text empty"].text == [""] * 100 and spoken.text[1] == "1"


# ---------------------------------------------------------------------------------------------------------------------
# The paper's ablations as switches

SWITCHES = [dict(no_mixer=True), dict(no_fusion=True), dict(modality="audio"), dict(modality="video"),
            dict(independent_tokens=True), dict(modality="text"), dict(modality="text", no_mixer=True),
            dict(no_mixer=True, no_fusion=True, modality="video", independent_tokens=True)]


@pytest.mark.release
def test_without_switches_nothing_changes():
    assert {name for name, _ in MSEAdapter(AdapterConfig(36, 4, 6, 5, 3, 2)).named_parameters()} == set(OFFICIAL_NAMES)


@pytest.mark.release
@pytest.mark.parametrize("switches", SWITCHES, ids=" ".join)
def test_switches(tiny, tmp_path, switches):
    torch.manual_seed(0)
    llm, task = tiny["llama"], TASKS["meld"]
    config = AdapterConfig(36, 4, 6, 5, 3, 2, **switches)
    net = MultimodalLLM(llm, MSEAdapter(config), ByteTokenizer(), task)
    split, a = rows(task), net.adapter
    batch, names = collate(split, range(4)), [name for name, _ in a.named_parameters()]
    net.loss(batch).backward()
    for name, p in a.named_parameters():                                # nothing is left over
        assert p.grad is not None and p.grad.abs().max() > 0, name
    gone = {"no_mixer": "mixer", "independent_tokens": "spread", "no_fusion": "fusion.scales",
            "modality": dict(audio="video", video="audio", text=("audio", "video")).get(switches.get("modality"))}
    assert not any(name.startswith(gone[key]) for key in switches for name in names)
    # the formulas
    text = recipe("eval.text", (4, 36), 1.0)
    heard = a.audio(batch.audio, batch.audio_len) if a.audio else torch.zeros(4, 256)
    seen = a.video(batch.video, batch.video_len) if a.video else torch.zeros(4, 256)
    both = torch.ones(4, 256) if config.modality == "text" else heard + seen
    m = both if config.no_mixer else both * a.mixer.text(text)
    h = a.project(a.fusion(m))
    if config.independent_tokens:
        tokens = torch.stack(h.chunk(2, dim=1), dim=1)
    else:
        tokens = torch.stack([h * w + c for w, c in zip(a.spread.weight[:, 0], a.spread.bias)], dim=1)
    close(a(text, batch.audio, batch.audio_len, batch.video, batch.video_len), tokens)
    # recorded
    save_adapter(tmp_path / "a.safetensors", net)
    loaded = load_adapter(tmp_path / "a.safetensors", llm, ByteTokenizer(), task)
    assert loaded.adapter.config == config and torch.equal(loaded.pseudo_tokens(batch), net.pseudo_tokens(batch))


def test_a_modality_that_does_not_exist_is_refused():
    with pytest.raises(ValueError, match="'smell'; expected one of both, audio"):
        AdapterConfig(36, 4, 6, 5, 3, 2, modality="smell")


# ---------------------------------------------------------------------------------------------------------------------
# Commands, on the demo's backbone


DEMO = HERE.parent / "demo" / "llm"


@pytest.fixture(scope="module")
def demo():
    return load_llm(DEMO), load_tokenizer(DEMO)


@pytest.fixture
def run(demo, tmp_path):
    """A run's folder as train.py leaves it, with an untrained adapter, and 24 rows of data."""
    task, (llm, tokenizer) = TASKS["demo"], demo
    config = AdapterConfig(llm.config.dim, 6, 8, 32, 16, 4)
    adapter = random_adapter(config)
    adapter.spread.weight.data *= 20                                    # so that the backbone listens
    save_adapter(tmp_path / "adapter.safetensors", MultimodalLLM(llm, adapter, tokenizer, task))
    random = np.random.RandomState(0)
    table = [{"label": task.labels[i % 4], "features": {
        "text": f"Tom put {i} lamps on the shelf.", "audio": random.randn(5, 6), "video": random.randn(4, 8),
        "audio_len": 5, "video_len": i % 5}} for i in range(24)]
    for split in ("train", "valid", "test"):
        (tmp_path / f"demo_{split}.pkl").write_bytes(pickle.dumps(table, protocol=4))
    ranges = clip.feature_range(variants(load_split(task, tmp_path, "train"))["without video"])
    (tmp_path / "features.json").write_text(json.dumps(ranges))
    settings = asdict(config) | dict(data="demo", data_dir=str(tmp_path), llm=None, official=False, device="cpu",
                                     dtype="float32", eval_batch=7, decode="greedy", readout="mean")
    (tmp_path / "settings.json").write_text(json.dumps(settings))
    (tmp_path / "results.json").write_text(json.dumps({"best_epoch": 3}))
    return tmp_path


def command(monkeypatch, capsys, *words) -> str:
    monkeypatch.setattr("sys.argv", ["eval.py", *map(str, words)])
    eval.main()
    return capsys.readouterr().out


def test_scoring_a_run(run, demo, monkeypatch, capsys):
    out = command(monkeypatch, capsys, run).splitlines()
    net = load_adapter(run / "adapter.safetensors", *demo, TASKS["demo"])
    split = load_split(TASKS["demo"], run, "test")
    greedy, labels = (evaluate(net, split, 7, decode=decode) for decode in ("greedy", "labels"))
    assert out[0] == f"test (best epoch 3): {greedy.line()}"
    accuracy = next(line for line in out if line.strip().startswith("accuracy")).split()
    assert (accuracy[1], accuracy[4]) == tuple(f"{r.scores['accuracy']:.4f}" for r in (greedy, labels))
    report = json.loads((run / "metrics-test.json").read_text())
    assert report["greedy"]["unparsed"] == greedy.unparsed and report["labels"]["scores"] == labels.scores
    assert (run / "predictions-test.csv").is_file() and not (run / "metrics.json").exists()
    settings = json.loads((run / "settings.json").read_text())
    (run / "settings.json").write_text(json.dumps(settings | {"decode": "labels"}))
    out = command(monkeypatch, capsys, run, "--split", "valid")
    assert out.startswith(f"valid (best epoch 3): {labels.line()}\n")
    assert out.index("labels [95 %") < out.index("greedy [95 %")
    assert "text empty" in command(monkeypatch, capsys, run, "--ablate")
    sizes = []
    monkeypatch.setattr(MultimodalLLM, "answer", lambda net, batch: sizes.append(len(batch.text)) or ["0"] * sizes[-1])
    command(monkeypatch, capsys, run, "--decode", "greedy", "--eval-batch", "2")
    assert set(sizes) == {2}


def test_scoring_a_run_as_it_was_selected(tiny, tmp_path, capsys):
    net = make(tiny["qwen"], "mosei")
    split, settings = rows(net.task), dict(decode="labels", readout="mode", eval_batch=3)
    mode, mean = (evaluate(net, split, 3, decode="labels", readout=readout) for readout in ("mode", "mean"))
    assert mode.line() != mean.line()
    for given, result in ((None, mode), ("mean", mean)):
        eval.score_split(net, split, tmp_path, settings, Namespace(split="valid", decode=None, readout=given, out=None))
        assert capsys.readouterr().out.startswith(f"valid (best epoch unknown): {result.line()}\n")


def test_one_clip(run, demo, monkeypatch, capsys):
    audio, video = run / "a.npy", run / "v.npy"
    np.save(audio, np.ones((3, 6)))
    np.save(video, np.full((2, 8), np.nan))
    words = [run, "--text", "Tom put the lamp away.", "--audio", audio]
    found = json.loads(command(monkeypatch, capsys, *words, "--json"))
    net = load_adapter(run / "adapter.safetensors", *demo, TASKS["demo"])
    batch = Batch(["Tom put the lamp away."], torch.ones(1, 3, 6), torch.tensor([3]),
                  torch.zeros(1, 1, 8), torch.tensor([0]), [0])
    close(torch.tensor(list(found["probabilities"].values())), label_logprobs(net, batch)[0].exp())
    deaf, k = batch._replace(audio_len=torch.tensor([0])), TASKS["demo"].labels.index(found["label"])
    close(torch.tensor(found["changes"]["without audio"]["probability"]), label_logprobs(net, deaf)[0].exp().max())
    for name, other in {"without audio": deaf, "text empty": batch._replace(text=[""])}.items():
        p = label_logprobs(net, other)[0].exp()
        close(torch.tensor(list(found["changes"][name]["probabilities"].values())), p)
        assert abs(p[k] - found["probability"]) > 1e-3
    assert found["label"] == max(found["probabilities"], key=found["probabilities"].get)
    assert found["notes"] == ["video: none given, taken as missing"]
    assert list(found["changes"]) == ["without audio", "text empty"]     # a clip without video cannot lose it
    lines = {line.split()[0]: line.split()[1:] for line in command(monkeypatch, capsys, *words).splitlines()[1:6]}
    assert lines["answer"][0] == found["label"] and len(lines["joy"]) == 3
    assert lines["joy"][:2] == [f"{answer['probabilities']['joy']:.3f}" for answer in (
        found, found["changes"]["without audio"])]
    text = command(monkeypatch, capsys, *words, "--video", video)
    assert "video: 16 values are not finite and count as 0" in text and "video: not compared" in text
    head = "without audio  without video  without audio and video  text empty"
    assert text.splitlines()[0].endswith(head)
    assert f"greedy answer: {found['greedy']}, written '{TASKS['demo'].labels.index(found['greedy'])}'" in text
    np.save(audio, np.full((3, 6), [0, 0, 500, 0, 0, 0]))
    text = command(monkeypatch, capsys, *words)
    assert "audio: 1 of 6 features are far outside the training data; feature 2 is 500 to 500, there -" in text


def test_a_net_to_call_from_python(run):
    net = eval.load_run(run)
    split = load_split(TASKS["demo"], run, "test")
    some = range(9)
    audio, video = [split.audio[row] for row in some], [split.features("video", row) for row in some]
    video = [x if len(x) > 0 else None for x in video]                  # None: this clip has none
    found = eval.predict(net, [split.text[row] for row in some], audio, video)
    result = evaluate(net, split, 24, "labels")
    for row, answer in enumerate(found):
        p = result.probabilities[row]
        assert answer["label"] == TASKS["demo"].labels[p.argmax()]
        assert sum(answer["probabilities"].values()) == approx(1)
        assert answer["probability"] == max(answer["probabilities"].values()) == approx(p.max(), rel=1e-4)
    assert eval.predict(net, []) == []
    with pytest.raises(UserError, match="one text, 'My'; expected a list of texts"):
        eval.predict(net, "My")
    deaf = eval.predict(net, [split.text[0]])[0]
    assert deaf == eval.predict(net, [split.text[0]], [None], [None])[0] != found[0]
    for audio, words in (([np.ones((3, 5))], "audio of clip 0 is float64 (3, 5); expected numbers (frames, 6)"),
                         ([np.ones(6)], "expected numbers"), ([None, None], "1 texts, but 2 of audio")):
        with pytest.raises(UserError, match=re.escape(words)):
            eval.predict(net, ["x"], audio)


def test_far_outside_is_by_more_than_the_whole_range():
    two = [np.array([[0.0, 5.0], [1.0, 5.5]]), np.array([[0.5, 4.0], [90.0, 90.0]])]
    split = Split(["a", "b"], two, [2, 1], two, [0, 0], [0, 0], ["a", "b"])
    ranges = clip.feature_range(split)                                  # of real frames
    assert ranges == {"audio": [[0.0, 4.0], [1.0, 5.5]]}
    assert clip.oddities(np.array([[1.9, 6.9], [-0.9, 2.6]]), "audio", ranges) == []
    for odd in (2.1, -1.1):
        found = clip.oddities(np.array([[odd, 5.0], [0.0, 5.0]]), "audio", ranges)
        assert found[0].startswith("audio: 1 of 2 features")


def test_clip_of_an_intensity(tiny, tmp_path):
    net = make(tiny["chatglm"], "simsv2")
    np.save(tmp_path / "v.npy", np.ones((2, 6), np.float32))
    row, notes = clip.clip_row(net, "好" * 50, dict(audio=None, video=tmp_path / "v.npy"), {})
    found = eval.one_clip(net, row) | {"notes": notes}
    assert notes == [
        "audio: none given, taken as missing",
        "video: not compared with the training data, whose range was not recorded",
        "text: of 150 tokens the first 50 are read"]
    p = np.array(list(found["probabilities"].values()))
    assert list(found["probabilities"])[::10] == ["-1.0", "+0.0", "+1.0"] and p.sum() == pytest.approx(1)
    assert found["mean"] == pytest.approx(p @ np.linspace(-1, 1, 21)) and "mean" in clip.clip_text(found)
    found["probabilities"] |= {"+0.3": 0.9, "+0.4": 0.0}
    shown = [line.split()[0] for line in clip.clip_text(found).splitlines()]
    assert "+0.3" in shown and shown.count("answer") == 1


@pytest.mark.parametrize("array", [np.zeros((2, 5)), np.zeros((0, 6)), np.zeros(6), np.array([["a"] * 6]),
                                   np.array([[{}] * 6]), None, b"\x93NUMPY", b"PK\x03\x04", b""])
def test_features_that_do_not_fit_are_refused(tmp_path, array):
    file = tmp_path / "x.npy"
    if isinstance(array, np.ndarray):
        np.save(file, array, allow_pickle=True)
    elif array is not None:
        file.write_bytes(array)
    with pytest.raises(ValueError, match="x.npy: "):
        clip.read_features(file, 6)


def test_a_huge_sparse_file_is_refused_unread(tmp_path):
    np.lib.format.open_memmap(tmp_path / "x.npy", "w+", np.float32, (200_000_000, 6))       # 4.8 GB of holes
    with pytest.raises(ValueError, match=r"\(200000000, 6\); expected numbers \(frames, 6\) of 1 to 100,000"):
        clip.read_features(tmp_path / "x.npy", 6)


@pytest.mark.parametrize("name, content, advice", [
    ("x.npz", b"PK\x03\x04", "numpy.load(FILE)[NAME]"),
    ("x.csv", b"1,2\n3,4\n", "numpy.loadtxt(FILE,"),
    ("x.pt", b"PK\x03\x04", "weights_only=True"), ("x", b"y" * 9999, "numpy.save('a.npy', ARRAY)")])
def test_the_advice_for_other_files(tmp_path, name, content, advice):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError) as error:
        clip.read_features(tmp_path / name, 6)
    assert advice in str(error.value) and "\n" not in str(error.value) and len(str(error.value)) < 999


@pytest.mark.parametrize("write", [
    lambda file, bomb: np.save(file, np.array([[bomb] * 6]), allow_pickle=True),
    lambda file, bomb: file.write_bytes(pickle.dumps(bomb))], ids=["array", "pickle"])
def test_features_are_never_run(tmp_path, write):
    write(tmp_path / "x.npy", Bomb(tmp_path / "exploded"))
    with pytest.raises(ValueError, match="x.npy: not a .npy file of numbers"):
        clip.read_features(tmp_path / "x.npy", 6)
    assert not (tmp_path / "exploded").exists()


def test_the_backbone_answers_without_the_adapter(run, demo, monkeypatch, capsys):
    llm, tokenizer = demo
    ids, said = [1, *tokenizer.encode("Tom put the lamp")], []
    while len(said) < 100 and 2 not in said:                            # without a cache
        hidden = llm(llm.embed(torch.tensor([ids + said])))
        said.append(int(llm.logits(hidden[0, -1]).argmax()))
    out = command(monkeypatch, capsys, run, "--ask", "Tom put the lamp")
    assert out == tokenizer.decode(ids[1:] + said) + "\n" and out.startswith("Tom put the lamp")


def test_a_changed_backbone_is_noticed(run, monkeypatch, capsys):
    assert command(monkeypatch, capsys, run, "--check-backbone").startswith("backbone unchanged")
    llm = load_llm(DEMO)
    adapter = random_adapter(AdapterConfig(llm.config.dim, 4, 6, 5, 3, 2))
    net = MultimodalLLM(llm, adapter, load_tokenizer(DEMO), TASKS["demo"])
    batch, row = (collate(rows(net.task), range(n)) for n in (4, 1))
    fresh = backbone.fingerprints(net.llm, net.tokenizer, net.task)
    before = {name: p.clone() for name, p in net.state_dict().items()}
    for mode in (True, False):
        net.train(mode)
        backbone.check_backbone(net, fresh, batch, row)                      # leaves the net as it was
        assert all(part.training == mode for part in net.modules())
        assert all(torch.equal(p, before[name]) for name, p in net.state_dict().items())
        assert all(p.grad is None for p in net.parameters())
    llm.embed.weight.data[3, 7] *= 1 + 1e-6                         # of a byte that no prompt has
    with pytest.raises(ValueError, match="backbone changed: 1 of "):
        backbone.check_backbone(net, fresh, batch, row)
    fresh = backbone.fingerprints(net.llm, net.tokenizer, net.task)
    llm.requires_grad_(True)                                            # a training step may move it
    with pytest.raises(ValueError, match="backbone changed: "):
        backbone.check_backbone(net, fresh, batch, row)


@pytest.mark.parametrize("words, message", [
    (["--audio", "a.npy"], "belong to --text"), (["--decode", "beam"], "invalid choice"),
    (["--tex", "x"], "unrecognized")])
def test_wrong_usage(run, monkeypatch, capsys, words, message):
    with pytest.raises(SystemExit) as error:
        command(monkeypatch, capsys, run, *words)
    assert error.value.code == 2 and message in capsys.readouterr().err


@pytest.mark.parametrize("change, message", [
    (dict(official=True), "mode"),
    (dict(device="cuda"), "pass --device cpu"), (dict(llm="nowhere/at-all"), "no such backbone")])
def test_a_run_that_does_not_fit_is_refused(run, monkeypatch, capsys, change, message):
    if "device" in change and torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    settings = json.loads((run / "settings.json").read_text())
    (run / "settings.json").write_text(json.dumps(settings | change))
    with pytest.raises(ValueError, match=message):
        command(monkeypatch, capsys, run)


@pytest.mark.parametrize("change", [
    dict(data=["demo"]), dict(llm=3), dict(llm="y" * 9999),
    dict(data_dir=[]), dict(official="no"), dict(decode="beam"),
    dict(readout=None), dict(eval_batch="x"), dict(eval_batch=0), dict(dtype="load"), dict(dtype={}),
    dict(device=None), dict(valid_share="0.1"), dict(valid_share=None), dict(valid_share=True), dict(valid_share=1.5),
    dict(valid_share=-0.1), dict(valid_share=float("nan"))])
def test_settings_that_no_run_writes_are_refused(run, monkeypatch, capsys, change):
    settings = json.loads((run / "settings.json").read_text())
    (run / "settings.json").write_text(json.dumps(settings | change))
    (key, value), = change.items()
    with pytest.raises(UserError) as error:
        command(monkeypatch, capsys, run)
    assert str(error.value).endswith(f"settings.json: {key} is {value!r:.80}, which no run writes; copy the file again")


def test_a_task_that_is_gone_is_named(run, monkeypatch, capsys):
    settings = json.loads((run / "settings.json").read_text())
    (run / "settings.json").write_text(json.dumps(settings | {"data": "mine"}))
    with pytest.raises(UserError, match="the task 'mine' is not in TASKS of data.py; add its entry again"):
        command(monkeypatch, capsys, run)


@pytest.mark.parametrize("device", ["nonsense", "meta", "cpu:x", "x" * 9999])
def test_a_device_that_is_not_at_hand_is_refused(run, monkeypatch, capsys, device):
    with pytest.raises(ValueError, match=f"--device {device[:9]}.*; pass --device cpu") as error:
        command(monkeypatch, capsys, run, "--device", device)
    assert len(str(error.value)) < 300


def test_a_backbone_that_moved_is_told_and_another_refused(run, monkeypatch, capsys):
    shutil.copytree(DEMO, run / "moved")
    words = [run, "--text", "Oh.", "--json", "--llm", run / "moved"]
    monkeypatch.setattr("sys.argv", ["eval.py", *map(str, words)])
    eval.main()
    out, err = capsys.readouterr()
    assert json.loads(out)["label"] and f"backbone found by --llm: {run / 'moved'}" in err
    tensors = load_file(run / "moved" / "model.safetensors")
    before = load_llm(DEMO).fingerprint
    tensors["model.norm.weight"][0] += 1
    save_file(tensors, run / "moved" / "model.safetensors")
    with pytest.raises(ValueError, match=f"the adapter's backbone is .*{before}.*, but here "):
        eval.main()


@pytest.mark.parametrize("wrong", [
    3, "nn", None, {}, [[1.0] * 6], [[1.0] * 6, [1.0] * 5], [[1.0] * 6, [None] * 5 + [{}]], [[10**400] * 6] * 2,
    [["a"] * 6] * 2], ids=str)
def test_a_range_of_another_shape_is_refused(run, monkeypatch, capsys, wrong):
    np.save(run / "a.npy", np.ones((3, 6)))
    (run / "features.json").write_text(json.dumps({"audio": wrong}))
    with pytest.raises(ValueError, match="features.json: the range of audio is .*; expected 2 lists of 6") as error:
        command(monkeypatch, capsys, run, "--text", "x", "--audio", run / "a.npy")
    assert len(str(error.value)) < 300


def test_no_run(tmp_path, monkeypatch, capsys):
    with pytest.raises(ValueError, match="settings.json: not there; expected the folder of one run"):
        command(monkeypatch, capsys, tmp_path)
    (tmp_path / "settings.json").write_text("{")
    with pytest.raises(ValueError, match="settings.json: not valid JSON"):
        command(monkeypatch, capsys, tmp_path)
    (tmp_path / "settings.json").write_text('{"data": "demo", "llm": null, "device": "cpu", "dtype": "float32"}')
    with pytest.raises(ValueError, match="an object with data_dir, official, decode, readout, eval_batch"):
        command(monkeypatch, capsys, tmp_path)
