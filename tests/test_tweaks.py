"""The tweaks of docs/forking.md: each patch applies, trains, changes something, and its parts agree: loss, greedy
answer, label scoring, one clip, and the adapter read from its file in front of a backbone of its own."""
import json
import pickle
import sys
from dataclasses import replace
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import measure_tweaks  # noqa: E402
import train  # noqa: E402
from conftest import flags, near, small_data  # noqa: E402
from measure_tweaks import CODE, PATCHES, TWEAKS, apply, copy  # noqa: E402

pytestmark = pytest.mark.release         # a fork's files have changed: patches may not apply
FLAGS = {patch: more for patch, more in TWEAKS.values() if patch}           # what a patch is trained with
CALM = ["--epochs", "1", "--learning-rate", "1e-3"]      # one epoch of 40 rows, after which answers still parse


@pytest.fixture(scope="module")
def plain_loss(data, tmp_path_factory):
    out = tmp_path_factory.mktemp("plain")
    train.main(flags(data, out, *CALM))
    return json.loads((out / "1111" / "log.jsonl").read_text())["loss"]


@pytest.fixture
def tweaked(request, tmp_path, monkeypatch):
    """A patch's name, and the modules of a copy of the code with it, in the place of the project's."""
    copy(tmp_path)
    apply(request.param, tmp_path)
    ours = {Path(file).stem for file in CODE} | {"support", "reports"}
    for name in list(sys.modules):
        if name.split(".")[0] in ours:
            monkeypatch.delitem(sys.modules, name)
    monkeypatch.syspath_prepend(tmp_path)
    modules = {name: import_module(name) for name in ours}
    assert modules["adapter"].__file__ == str(tmp_path / "adapter.py")
    return request.param, modules


def check_parts(code: dict, run: Path, data: Path):
    """Everything of a trained run agrees. Returns its net, the test split and what label scoring makes of that."""
    llm, tokenizer = code["model"].load_llm(ROOT / "demo" / "llm"), code["data"].load_tokenizer(ROOT / "demo" / "llm")
    task = code["data"].TASKS["demo"]
    backbone = import_module("reports.backbone")
    fresh = backbone.fingerprints(llm, tokenizer, task)
    net = code["adapter"].load_adapter(run / "adapter.safetensors", llm, tokenizer, task)
    split = code["data"].load_split(task, data, "test")
    greedy, labels = (code["eval"].evaluate(net, split, 5, decode) for decode in code["eval"].DECODE)
    assert json.loads((run / "results.json").read_text())["line"] == greedy.line()
    assert greedy.unparsed + greedy.out_of_range == 0 and (greedy.pred == labels.pred).all()
    clip = code["eval"].one_clip(net, code["data"].some_rows(split, [0]))
    assert float(clip["written"]) == task.labels.index(clip["label"]) == greedy.pred[0]

    batch = code["data"].collate(split, range(12))
    row = code["data"].collate(split, [0])
    assert backbone.check_backbone(net, fresh, batch, row).startswith("backbone unchanged")
    net.loss(batch).backward()
    assert all(p.grad is not None and p.grad.any() for p in net.adapter.parameters())
    with torch.no_grad():
        pseudo = net.pseudo_tokens(batch)
        alone = [net.pseudo_tokens(code["data"].collate(split, [row])) for row in range(12)]
        near(pseudo, torch.cat(alone), 1e-5)    # padding does not matter
        for kind in code["data"].FEATURES:      # nor does what stands where a modality is missing
            deaf = batch._replace(**{f"{kind}_len": torch.zeros(12, dtype=torch.long)})
            noise = deaf._replace(**{kind: torch.randn_like(getattr(batch, kind))})
            assert torch.equal(net.pseudo_tokens(deaf), net.pseudo_tokens(noise))
            assert not torch.equal(net.pseudo_tokens(deaf), pseudo)
    return net, split, labels


@pytest.mark.parametrize("tweaked", sorted(FLAGS), indirect=True)
def test_tweak(tweaked, data, plain_loss, tmp_path):
    name, code = tweaked
    code["train"].main(flags(data, tmp_path / "out", *CALM, *FLAGS[name]))
    run = tmp_path / "out" / "1111"
    assert json.loads((run / "log.jsonl").read_text())["loss"] != plain_loss
    net, split, labels = check_parts(code, run, data)
    alone = flags(data, tmp_path / "alone", "--prompt-alone")
    if name != "label-head":
        code["train"].main(alone)       # what a patch asks of an adapter, NoTokens has
    else:
        with pytest.raises(ValueError, match="nothing has trained the head"):
            code["train"].main(alone)
        # Elsewhere the label's first token, a space, counts in the loss.
        right = torch.tensor(labels.probabilities)[range(12), split.label]
        loss = net.loss(code["data"].collate(split, range(12)))
        assert loss.item() == pytest.approx(-right.log().mean().item(), rel=1e-5)


@pytest.mark.parametrize("tweaked", ["label-head"], indirect=True)
@pytest.mark.parametrize("official", [False, True])
def test_the_label_head_takes_an_intensity_for_the_nearest_label(tweaked, data, official):
    code = tweaked[1]
    task = code["data"].Task("own", range=(-1.0, 1.0))
    llm, tokenizer = code["model"].load_llm(ROOT / "demo" / "llm"), code["data"].load_tokenizer(ROOT / "demo" / "llm")
    adapter = code["adapter"].MSEAdapter(code["adapter"].AdapterConfig(128, 6, 8, 4, 4, 2, labels=21))
    net = code["adapter"].MultimodalLLM(llm, adapter, tokenizer, task, official)
    batch = code["data"].collate(code["data"].load_split(code["data"].TASKS["demo"], data, "test"), [0, 1, 2])
    batch = batch._replace(label=[-0.0333, 0.96, -1.0])
    scores = code["eval"].label_logprobs(net, batch)
    assert net.loss(batch).item() == pytest.approx(-scores[[0, 1, 2], [10, 20, 0]].mean().item(), rel=1e-5)
    assert [float(text) for text in net.answer(batch)] == [task.values()[k] for k in scores.argmax(dim=1)]


# ---------------------------------------------------------------------------------------------------------------------
# A third modality


def with_haptics(rows: list) -> list:
    """The demo's rows with three more numbers, four times a clip; the first row has none of them."""
    for number, row in enumerate(rows):
        features = row["features"]
        features["haptics"] = np.float32(number % 7 + features["audio"][:4, :3])
        features["haptics_len"] = 4 if number else 0
    return rows


@pytest.mark.parametrize("tweaked", ["third-modality"], indirect=True)
def test_a_third_modality_from_the_pickle_to_the_clip(tweaked, data, tmp_path, capsys, monkeypatch):
    _, code = tweaked
    (tmp_path / "felt").mkdir()
    felt = small_data(tmp_path / "felt", with_haptics)

    # 1) the check of the data: shapes, what is missing, rows in two splits; a table's columns
    assert code["data"].main(["demo", "--data-dir", str(felt)]) == 0
    assert "  haptics  (4, 3), float32; lengths 0 to 4; missing in 1 rows, all zero in 0" in capsys.readouterr().out
    with pytest.raises(ValueError, match="row 0 has haptics that is None; expected numbers"):
        code["data"].load_split(code["data"].TASKS["demo"], data, "test")
    as_rows = code["data"].load_split(code["data"].TASKS["demo"], felt, "test")
    table = {column: getattr(as_rows, name) for name, column in code["data"].COLUMNS.items() if name != "label"}
    splits = dict.fromkeys(("train", "valid", "test"), table | {"labels": [0.0] * 12, "regression_labels": [0.0] * 12})
    (tmp_path / "table.pkl").write_bytes(pickle.dumps(splits, 4))
    own = code["data"].Task("own", range=(-1, 1), pattern="table.pkl")
    as_table = code["data"].load_split(own, tmp_path, "test")
    assert as_table.haptics_len == as_rows.haptics_len == [0] + [4] * 11
    doubles = import_module("support.check").doubles
    silent = replace(as_rows, audio_len=[0] * 12)
    other = replace(as_rows, haptics=[x + 1 for x in as_rows.haptics])
    for twin, is_double in ((as_rows, True), (silent, True), (other, False)):
        first = silent if twin is silent else as_rows
        assert bool(doubles(own, {"train": first, "test": twin}, {"train": [1], "test": [1]})) == is_double

    # 2) training, and what the modality is worth
    code["train"].main(flags(felt, tmp_path / "out", *CALM))
    printed = capsys.readouterr().out
    for name in ("audio", "video", "haptics", "audio and video and haptics"):
        assert f"\ntest without {name}: accuracy" in printed
    run = tmp_path / "out" / "1111"
    net, split, _ = check_parts(code, run, felt)
    alone = code["adapter"].AdapterConfig(128, 6, 8, 3, 4, 4, 4, 2, modality="haptics")
    assert {name.split(".")[0] for name, _ in code["adapter"].MSEAdapter(alone).named_parameters()} == {
        "haptics", "mixer", "fusion", "project", "spread"}
    code["train"].main(flags(felt, tmp_path / "prompt", "--prompt-alone"))

    # 3) one clip, from Python and by eval.py
    texts, touch = split.text[:2], [split.haptics[1], None]
    found = code["eval"].predict(net, texts, haptics=touch)
    assert found != code["eval"].predict(net, texts) and found[1] == code["eval"].predict(net, texts)[1]
    np.save(tmp_path / "h.npy", touch[0])
    command = ["eval.py", str(run), "--haptics", str(tmp_path / "h.npy"), "--json"]
    monkeypatch.setattr("sys.argv", [*command, "--text", texts[0]])
    capsys.readouterr()
    code["eval"].main()
    clip = json.loads(capsys.readouterr().out)
    assert clip["probability"] == pytest.approx(found[0]["probability"], rel=1e-5)
    assert list(clip["changes"]) == ["without haptics", "text empty"]
    assert clip["notes"] == ["audio: none given, taken as missing", "video: none given, taken as missing"]
    monkeypatch.setattr("sys.argv", command[:-1])
    with pytest.raises(SystemExit):             # as other features without --text
        code["eval"].main()


def test_the_adapter_must_know_every_modality_of_the_data(data, tmp_path, monkeypatch):
    monkeypatch.setattr(train, "MODALITIES", {"both": ("audio",)})
    with pytest.raises(AssertionError, match="adapter.py has .*, support/check.py .*video"):
        train.main(flags(data, tmp_path))


# ---------------------------------------------------------------------------------------------------------------------
# Measuring


def test_every_patch_says_what_it_is_for_and_is_measured():
    names = {path.stem for path in PATCHES.glob("*.patch")}
    assert set(FLAGS) == names - {"third-modality"}
    for name in names:
        about, rest = (PATCHES / f"{name}.patch").read_text(encoding="utf-8").split("\n\n", 1)
        assert ": " in about and about.endswith(".") and "--- a/" in rest


def test_measuring(monkeypatch, capsys):
    monkeypatch.setattr(measure_tweaks, "measure", lambda patch, flags: [len(patch), len(flags), 2.0])
    monkeypatch.setattr("sys.argv", ["measure_tweaks.py", "GRU", "one pseudo token"])
    measure_tweaks.main()
    assert [line.split() for line in capsys.readouterr().out.splitlines()] == [
        "GRU 1.667 +- 1.528 3.000 0.000 2.000".split(), "one pseudo token 1.333 +- 1.155 0.000 2.000 2.000".split()]
    monkeypatch.setattr("sys.argv", ["measure_tweaks.py", "gru"])
    with pytest.raises(SystemExit):
        measure_tweaks.main()
