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
import tweaks  # noqa: E402
from test_train import flags  # noqa: E402
from tweaks import CODE, TWEAKS, copy, edit  # noqa: E402

EDITED = [name for name, tweak in TWEAKS.items() if any(isinstance(part, tuple) for part in tweak)]
CALM = ["--epochs", "1", "--learning-rate", "1e-3"]      # one epoch of 40 rows, after which answers still parse


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
    ours = {Path(file).stem for file in CODE} | {"support", "reports"}
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


@pytest.mark.parametrize("tweaked", ["label head"], indirect=True)
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


def test_a_copy_to_train_with(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["tweaks.py", "LoRA beside the adapter", "--to", str(tmp_path / "lora")])
    tweaks.main()
    assert capsys.readouterr().out == f"cd {tmp_path / 'lora'} && python train.py --recompute 0\n"
    assert "class LoRA" in (tmp_path / "lora" / "adapter.py").read_text() and (tmp_path / "lora" / "demo").is_dir()
    for words in (["GRU", "--to", str(tmp_path / "lora")], ["--to", str(tmp_path / "new")], ["gru"]):
        monkeypatch.setattr("sys.argv", ["tweaks.py", *words])
        with pytest.raises(SystemExit):
            tweaks.main()
    assert not (tmp_path / "new").exists()
