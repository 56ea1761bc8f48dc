"""The README's tweaks: each applies, trains, changes something, and its parts agree: loss, greedy answer, label
scoring, one clip, and the adapter read from its file in front of a backbone of its own."""
import json
import sys
from importlib import import_module
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import train  # noqa: E402
from test_train import flags, small_data  # noqa: E402
from tweaks import CODE, TWEAKS, copy, edit  # noqa: E402

EDITED = [name for name, tweak in TWEAKS.items() if any(isinstance(part, tuple) for part in tweak)]
CALM = ["--epochs", "1", "--learning-rate", "1e-3"]      # one epoch of 40 rows, after which answers still parse


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return small_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def plain_loss(data, tmp_path_factory):
    out = tmp_path_factory.mktemp("plain")
    train.main(flags(data, out, *CALM))
    return json.loads((out / "1111" / "log.jsonl").read_text())["loss"]


@pytest.fixture
def tweaked(request, tmp_path, monkeypatch):
    """The modules of a copy of the code with a tweak, in the place of the project's."""
    copy(tmp_path)
    edit(tmp_path, TWEAKS[request.param])
    ours = {Path(file).stem for file in CODE} | {"extras"}
    for name in list(sys.modules):
        if name.split(".")[0] in ours:
            monkeypatch.delitem(sys.modules, name)
    monkeypatch.syspath_prepend(tmp_path)
    modules = {name: import_module(name) for name in ours}
    assert modules["adapter"].__file__ == str(tmp_path / "adapter.py")
    return request.param, modules


@pytest.mark.parametrize("tweaked", EDITED, indirect=True)
def test_tweak(tweaked, data, plain_loss, tmp_path):
    name, code = tweaked
    more = [part for part in TWEAKS[name] if isinstance(part, str)]
    code["train"].main(flags(data, tmp_path / "out", *CALM, *more))
    run = tmp_path / "out" / "1111"
    assert json.loads((run / "log.jsonl").read_text())["loss"] != plain_loss

    llm, tokenizer = code["model"].load_llm(ROOT / "demo" / "llm"), code["data"].load_tokenizer(ROOT / "demo" / "llm")
    task = code["data"].TASKS["demo"]
    net = code["adapter"].load_adapter(run / "adapter.safetensors", llm, tokenizer, task)
    split = code["data"].load_split(task, data, "test")
    greedy, labels = (code["eval"].evaluate(net, split, 5, decode) for decode in code["eval"].DECODE)
    assert json.loads((run / "results.json").read_text())["line"] == greedy.line()
    assert greedy.unparsed + greedy.out_of_range == 0 and (greedy.pred == labels.pred).all()
    first = {name: getattr(split, name)[:1] for name in code["data"].FIELDS}
    clip = code["eval"].one_clip(net, code["data"].Split(**first))
    assert float(clip["greedy"]) == task.labels.index(clip["label"]) == greedy.pred[0]

    loss = net.loss(code["data"].collate(split, range(12)))
    loss.backward()
    assert all(p.grad is not None and p.grad.any() for p in net.adapter.parameters())
    if name == "label head":            # elsewhere the label's first token, a space, counts in the loss
        right = torch.tensor(labels.probabilities)[range(12), split.label]
        assert loss.item() == pytest.approx(-right.log().mean().item(), rel=1e-5)
