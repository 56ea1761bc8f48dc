"""Runs: the schedule, a step in parts, resuming to the same bytes, records that notice a changed byte, refusals.

    python tests/test_train.py 30       kill a run with SIGKILL at 30 random moments and compare the end, by hand
"""
import csv
import json
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import train  # noqa: E402
from adapter import AdapterConfig, MSEAdapter, MultimodalLLM  # noqa: E402
from data import TASKS, Split, collate, load_split, load_tokenizer, read_pickle  # noqa: E402
from eval import score  # noqa: E402
from model import load_llm  # noqa: E402


def small_data(folder: Path) -> Path:
    """The first rows of the demo's data, in the published format."""
    import pickle
    for split, rows in (("train", 40), ("valid", 12), ("test", 12)):
        with open(folder / f"demo_{split}.pkl", "wb") as file:
            pickle.dump(read_pickle(ROOT / "demo" / f"demo_{split}.pkl")[:rows], file, 4)
    return folder


def flags(data: Path, out: Path, *more) -> list[str]:
    return ["--data-dir", str(data), "--out", str(out), "--epochs", "3", "--batch-size", "8", "--device", "cpu", *more]


def essence(out: Path, seed: int = 1111) -> dict:
    """What two runs of one seed must share to the byte: all but the times."""
    run = out / str(seed)
    log = [{k: v for k, v in json.loads(line).items() if k != "seconds"} for line in (run / "log.jsonl").open()]
    return {"log": log, **{name: (run / name).read_bytes() for name in ("adapter.safetensors", "predictions.csv")}}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return small_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def finished(data, tmp_path_factory):
    out = tmp_path_factory.mktemp("finished")
    train.main(flags(data, out))
    return out


@pytest.fixture(scope="module")
def net(data):
    llm = load_llm(ROOT / "demo" / "llm")
    torch.manual_seed(0)
    split = load_split(TASKS["demo"], data, "train")
    config = AdapterConfig(llm.config.dim, split.audio[0].shape[1], split.video[0].shape[1], 8, 8, 2)
    return MultimodalLLM(llm, MSEAdapter(config), load_tokenizer(ROOT / "demo" / "llm"), TASKS["demo"]), split


def test_schedule():
    rates = [train.learning_rate(step, 40, 0.1, 1.0) for step in range(60)]
    assert rates[:5] == [0, 0.25, 0.5, 0.75, 1.0]
    assert all(a > b for a, b in zip(rates[4:40], rates[5:41]))
    assert rates[22] == pytest.approx(0.5) and rates[40:] == [0.0] * 20        # it does not climb again


def test_a_step_in_parts_is_the_same_step(net):
    net, split = net
    rows, scaler = list(range(8)), torch.amp.GradScaler("cpu", enabled=False)
    grads = []
    for micro in (8, 3, 1):
        parts = [collate(split, rows[i:i + micro]) for i in range(0, 8, micro)]
        optimizer = torch.optim.SGD(net.adapter.parameters(), lr=0.0)
        loss = train.train_step(net, optimizer, scaler, parts, 0.0)
        grads.append((loss, torch.cat([p.grad.flatten() for p in net.adapter.parameters()])))
    for loss, grad in grads[1:]:
        assert abs(loss - grads[0][0]) < 1e-6 and (grad - grads[0][1]).abs().max() < 1e-6


def test_recomputation_changes_nothing(net):
    net, split = net
    losses = []
    for blocks in (0, 1, 99):
        net.adapter.zero_grad()
        loss = net.loss(collate(split, [0, 1, 2]), blocks)
        loss.backward()
        losses.append((loss.item(), [p.grad.clone() for p in net.adapter.parameters()]))
    for loss, grads in losses[1:]:
        assert loss == losses[0][0] and all(torch.equal(a, b) for a, b in zip(grads, losses[0][1]))


def test_same_seed_same_bytes_other_seed_other_bytes(data, finished, tmp_path):
    train.main(flags(data, tmp_path, "--seeds", "1111", "7"))
    assert essence(tmp_path) == essence(finished)
    assert essence(tmp_path, 7)["adapter.safetensors"] != essence(finished)["adapter.safetensors"]
    rows = list(csv.DictReader((tmp_path / "results.csv").open()))
    assert [row["seed"] for row in rows] == ["1111", "7"] and float(rows[0]["test_accuracy"]) <= 1


@pytest.mark.parametrize("stop_at", [1, 4, 5, 12])
def test_interrupted_and_continued_is_uninterrupted(data, finished, tmp_path, monkeypatch, stop_at):
    step, calls = train.train_step, []

    def stopping_step(*args):
        calls.append(1)
        if len(calls) == stop_at:
            signal.raise_signal(signal.SIGINT)      # Ctrl-C in the middle of a step
        return step(*args)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(train, "train_step", stopping_step)
        train.main(flags(data, tmp_path))
    assert len(calls) == stop_at and list((tmp_path / "1111").glob("state-*"))
    train.main(flags(data, tmp_path))
    assert essence(tmp_path) == essence(finished)
    assert not list((tmp_path / "1111").glob("state-*")) and not list((tmp_path / "1111").glob(".*.new"))


def test_a_damaged_state_is_noticed_and_the_one_before_used(data, finished, tmp_path, monkeypatch, capsys):
    run = tmp_path / "1111"
    monkeypatch.setattr(train, "evaluate", lambda *a, evaluate=train.evaluate, **k: (
        (_ for _ in ()).throw(KeyboardInterrupt) if len(list(run.glob("state-*"))) == 2 else evaluate(*a, **k)))
    with pytest.raises(KeyboardInterrupt):
        train.main(flags(data, tmp_path))
    monkeypatch.undo()
    newest = sorted(run.glob("state-*"))[-1]
    raw = bytearray(newest.read_bytes())
    raw[len(raw) // 2] ^= 1
    newest.write_bytes(raw)
    (run / ".adapter.safetensors.new").write_bytes(b"half")
    train.main(flags(data, tmp_path))
    assert f"{newest}: damaged" in capsys.readouterr().out
    assert essence(tmp_path) == essence(finished) and not list(run.glob(".*.new"))


def test_a_finished_run_is_left_alone_unless_told(data, finished, capsys):
    before = {p: p.stat().st_mtime_ns for p in (finished / "1111").iterdir()}
    train.main(flags(data, finished))
    assert "finished before, left alone" in capsys.readouterr().out
    assert before.items() >= {p: p.stat().st_mtime_ns for p in before if p.name != ".lock"}.items()


@pytest.mark.parametrize("name", ["adapter.safetensors", "predictions.csv", "log.jsonl", "settings.json",
                                  "results.json", "curves.svg"])
def test_a_flipped_byte_is_noticed(finished, tmp_path, name):
    for file in (finished / "1111").iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    raw = bytearray((tmp_path / name).read_bytes())
    for at in random.Random(name).sample(range(len(raw)), 3):
        (tmp_path / name).write_bytes(raw[:at] + bytes([raw[at] ^ 4]) + raw[at + 1:])
        with pytest.raises(ValueError, match="damaged|changed"):
            train.read_record(tmp_path)


def test_another_setting_is_refused_by_name(data, finished):
    with pytest.raises(ValueError, match=r"learning_rate 0\.\d+, now 0\.5"):
        train.main(flags(data, finished, "--learning-rate", "0.5"))


def test_a_second_run_in_the_folder_is_refused(data, finished):
    with train.locked(finished / "1111"), pytest.raises(ValueError, match="another process"):
        train.main(flags(data, finished))


def test_a_loss_that_is_not_finite_names_the_tensor(net):
    net, split = net
    weight = net.adapter.fusion.join.weight
    before = weight.detach().clone()
    weight.data[0, 1] = float("nan")
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    with pytest.raises(ValueError, match="first not finite: adapter parameter fusion.join.weight"):
        train.train_step(net, torch.optim.SGD(net.adapter.parameters(), lr=0.0), scaler, [collate(split, [0])], 0.0)
    weight.data.copy_(before)


def test_memory_plan_counts_what_autograd_keeps(net):
    net, split = net
    plain, least = train.activation_bytes(net.llm)
    batch, kept = collate(split, range(4)), {}

    def keep(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    x, _, _ = net.inputs(batch)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        net.llm(x)
    weights = {p.untyped_storage().data_ptr() for p in net.parameters()}
    measured = sum(n for at, n in kept.items() if at not in weights)
    planned = plain * x.shape[:2].numel() * net.llm.config.n_layer
    assert abs(planned - measured) < 0.2 * measured and least < plain / 4


def test_features_of_another_width_are_refused(net):
    net, split = net
    batch = collate(split, [0, 1])
    with pytest.raises(ValueError, match="the audio has 7 features in a frame, the adapter was made for 6"):
        net.loss(batch._replace(audio=torch.zeros(2, 3, 7)))


def test_alarms_of_an_epoch(capsys):
    task, settings = TASKS["demo"], train.parse_settings([])
    valid = Split(*[["x"] * 100] * 5, [0, 1, 2, 3] * 25, ["1"] * 100)
    progress = train.Progress()
    for epoch, answers in enumerate((["0", "1"] * 50, ["0"] * 98 + [""] * 2, ["0"] * 97 + [""] * 3), 1):
        result = score(answers, valid.label, task)
        progress.log.append({"epoch": epoch, "loss": 1.0, "valid_unparsed": result.unparsed, "seconds": 9.0})
        train.tell(progress, result, valid, settings)
    first, second, collapsed, unparsed, third, again = capsys.readouterr().out.splitlines()
    assert first.startswith("epoch 1/") and second.startswith("epoch 2/") and third.startswith("epoch 3/")
    assert collapsed.startswith("looks collapsed: 'joy' is 98 of 100") and again.startswith("looks collapsed")
    assert unparsed == "more answers do not parse: 0 before, 2 now"


def test_the_table_of_seeds(tmp_path, capsys):
    rows = [(1111, .60, .58, 3), (2222, .64, .61, 0), (3333, .62, .60, 1)]
    records = [{"seed": seed, "family": "qwen2", "data": "meld", "test_accuracy": accuracy, "test_weighted_f1": f1,
                "test_rows": 2610, "test_unparsed": unparsed, "line": "", "sha256": {}}
               for seed, accuracy, f1, unparsed in rows]
    train.summarize(records, tmp_path)
    lines = capsys.readouterr().out.splitlines()
    table = {line.split()[0]: [float(x) for x in line.split()[1:]] for line in lines[1:7]}
    assert lines[0].split() == ["seed", "accuracy", "weighted_f1", "unparsed"] and table["2222"] == [.64, .61, 0]
    assert table["mean"][0] == pytest.approx(.62) and table["std"][0] == pytest.approx(.02)
    assert table["worst"] == [.60, .58, 3]                              # more unparsed is worse
    assert "the release recorded 0.6218 +- 0.0132 with its qwen backbone; here 0.6200, -0.1 of its" in lines[7]
    with open(tmp_path / "results.csv") as file:
        assert [(int(row["seed"]), float(row["test_accuracy"])) for row in csv.DictReader(file)] == [
            (seed, accuracy) for seed, accuracy, _, _ in rows]


def test_the_releases_figures_stand_beside_the_published_data_alone(tmp_path, capsys):
    record = {"seed": 1111, "family": "chatglm", "data": "simsv2", "test_acc2": .8, "test_rows": 1034, "line": ""}
    for rows, shown in ((1034, True), (40, False)):
        train.summarize([{**record, "test_rows": rows}] * 2, tmp_path)
        out = capsys.readouterr().out
        assert ("acc2: the release recorded 0.7944 +- 0.0251" in out) == shown
        assert ("note: with the shipped prompt" in out) == shown
    assert all(pair in train.PUBLISHED or pair == ("qwen", "mosi") for pair in train.NOTES)


def test_curves_are_well_formed():
    from xml.etree import ElementTree
    log = [{"loss": 2.0 / e, "learning_rate": 0.1, "valid_mae": 1.0} for e in (1, 2, 3)]
    for entries, best in ((log, 2), (log[:1], 1), ([], 0)):
        ElementTree.fromstring(train.curves(entries, "mae", best))


@pytest.mark.parametrize("argv, words", [
    (["--data", "nope"], "none of demo"), (["--batch-sise", "3"], "unrecognized"), (["--epochs", "0"], "not above 0"),
    (["--data-dir", "/nowhere"], "/nowhere"), (["--llm", "/nowhere"], "hf download"),
    (["--data", "meld", "--data-dir", "/nowhere", "--llm", str(ROOT / "demo" / "llm")],
     "hf download AZYoung/MELD_processed"),
])
def test_bad_input_is_one_sentence(argv, words, tmp_path):
    done = subprocess.run([sys.executable, str(ROOT / "train.py"), "--out", str(tmp_path / "out"), *argv],
                          capture_output=True, text=True)
    assert done.returncode != 0 and words in done.stderr and "Traceback" not in done.stderr, done.stderr


def kill_and_continue(kills: int, seed: int = 0):
    """Kill a run that saves after every step at random moments, let it end, and compare with an undisturbed one."""
    chance = random.Random(seed)
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        data = small_data(folder)
        program = [sys.executable, str(ROOT / "train.py")]
        subprocess.run([*program, *flags(data, folder / "calm")], check=True, stdout=subprocess.DEVNULL)
        command = [*program, *flags(data, folder / "killed", "--save-minutes", "0")]
        done = 0
        while done < kills:
            process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
            for line in process.stdout:
                if line.startswith("memory:"):              # training begins
                    break
            time.sleep(chance.random() * 1.5)
            if process.poll() is None:
                done += 1
            elif (folder / "killed" / "1111" / "results.json").exists():
                for file in (folder / "killed" / "1111").iterdir():     # it got through: once more from the start
                    file.unlink()
            process.kill()
            process.wait()
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        run = folder / "killed" / "1111"
        assert essence(folder / "killed") == essence(folder / "calm")
        assert not list(run.glob("state-*")) and not list(run.glob(".*.new"))


def test_killed_and_continued_is_undisturbed():
    kill_and_continue(2)


if __name__ == "__main__":
    kills = int(sys.argv[1]) if len(sys.argv) > 1 else 30
    kill_and_continue(kills)
    print(f"{kills} kills, the same bytes")
