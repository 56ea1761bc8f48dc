"""Runs: the schedule, one step, resuming to the same bytes, what a run is known by, refusals, what is printed.

    python tests/test_train.py 30       kill a run with SIGKILL at 30 random moments and compare the end, by hand
"""
import csv
import hashlib
import io
import json
import pickle
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn as nn
from safetensors.torch import load_file

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import eval  # noqa: E402
import train  # noqa: E402
from adapter import AdapterConfig, MSEAdapter, MultimodalLLM  # noqa: E402
from conftest import essence, flags, small_data  # noqa: E402
from data import TASKS, Split, Task, collate, load_split, load_tokenizer, main, read_pickle  # noqa: E402
from eval import score  # noqa: E402
from model import LLM, Config, load_llm  # noqa: E402
from support.files import UserError, read_json  # noqa: E402

DISABLED = torch.amp.GradScaler("cpu", enabled=False)


@pytest.fixture(scope="module")
def net(data):
    llm = load_llm(ROOT / "demo" / "llm")
    torch.manual_seed(0)
    split = load_split(TASKS["demo"], data, "train")
    config = AdapterConfig(llm.config.dim, split.audio[0].shape[1], split.video[0].shape[1], 8, 8, 2)
    return MultimodalLLM(llm, MSEAdapter(config), load_tokenizer(ROOT / "demo" / "llm"), TASKS["demo"]), split


# ---------------------------------------------------------------------------------------------------------------------
# Settings, one step


def test_schedule():
    rates = [train.learning_rate(step, 40, 0.1, 1.0) for step in range(60)]
    assert rates[:5] == [0, 0.25, 0.5, 0.75, 1.0]
    assert all(a > b for a, b in zip(rates[4:40], rates[5:41]))
    assert rates[22] == pytest.approx(0.5) and rates[40:] == [0.0] * 20        # it does not climb again


def test_settings():
    given = train.parse_settings(["--data", "simsv2", "--seeds", "7", "8", "--no-mixer", "--epochs", "3"])
    assert given == train.Settings(data="simsv2", seeds=[7, 8], no_mixer=True, epochs=3)
    s = train.resolve(given, "chatglm")
    assert (s.batch_size, s.epochs, s.max_epochs, s.patience, s.audio_hidden) == (8, 3, 3, 10, 64)
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="--device cuda:1: torch finds no GPU"):
            train.resolve(train.Settings(device="cuda:1"), "llama")
    assert s.out == "runs/simsv2-Qwen-1_8B" and train.resolve(train.Settings(), "llama").patience == 8


def test_what_differs_from_the_release(monkeypatch):
    """Whatever shapes the method, a new flag of a fork's, too; not how a run is computed or read."""
    def changed(*argv):
        settings = train.resolve(train.parse_settings(["--data", "meld", "--device", "cpu", *argv]), "chatglm")
        return train.changed(settings, "chatglm")

    assert changed() == changed("--learning-rate", "5e-5", "--seeds", "7", "--eval-batch", "2", "--out", "x") == []
    assert changed("--official", "--decode", "labels", "--readout", "mode", "--dtype", "float16") == []
    assert changed("--max-epochs", "1") == ["max_epochs"]
    assert changed("--no-mixer", "--modality", "text", "--valid-share", "0.1", "--batch-size", "9") == [
        "batch_size", "no_mixer", "modality", "valid_share"]

    @dataclass
    class Forked(train.Settings):
        dropout: float = train.setting(float, 0.0, "of a fork")

    monkeypatch.setattr(train, "Settings", Forked)
    assert changed() == [] and changed("--dropout", "0.1") == ["dropout"]


def test_what_may_change_before_a_run_goes_on():
    before = asdict(train.resolve(train.Settings(device="cpu"), "llama"))
    free = set()
    for name in before:
        words = train.difference(before, before | {name: "another"})
        if words:
            assert words == f"{name} {before[name]!r}, now 'another'"
        else:
            free.add(name)
    assert free == {"data_dir", "llm", "out", "seeds", "eval_batch", "recompute", "overwrite", "download"}


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


def kept_numbers(llm, x, recompute: int) -> int:
    """How many fp32 numbers autograd keeps for backward, the weights aside."""
    kept = {}

    def keep(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes() // 4
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        _ = llm(x, recompute=recompute)                 # while it lives, so does what is kept
    for p in llm.parameters():
        kept.pop(p.untyped_storage().data_ptr(), None)
    return sum(kept.values())


@pytest.mark.parametrize("kv_heads, rope_dim", [(8, 16), (2, 8)])
def test_memory_plan_counts_what_autograd_keeps(kv_heads, rope_dim):
    config = Config("llama", 128, 4, 8, kv_heads, 16, 352, 100, 500, 1e-5, rope_dim=rope_dim)
    llm, x = LLM(config), torch.randn(2, 48, 128).requires_grad_()
    saved = kept_numbers(llm, x, 0) - kept_numbers(llm, x, 3)           # by recomputing 3 blocks of 96 tokens
    assert kept_numbers(llm, x, 4) == kept_numbers(llm, x, 3)           # the last of 4 never does
    assert 3 * 96 * (train.kept_by_block(config) - 128) == pytest.approx(saved, rel=0.2)


def test_memory_plan(net, capsys):
    net, split = net
    settings = train.resolve(train.Settings(device="cpu"), "llama")
    assert train.plan_recompute(net, split, settings) == 0
    for asked, planned in ((-1, 0), (1, 1), (99, net.llm.config.n_layer - 1)):
        settings.recompute = asked
        assert train.plan_recompute(net, split, settings) == planned
    assert "2 of 3 blocks recompute" in capsys.readouterr().out


@pytest.mark.parametrize("room, blocks", [(40, 0), (39.9, 1), (37, 1), (36.9, 2), (13, 9), (1, 9)])
def test_as_few_blocks_recompute_as_room_allows(room, blocks):
    """Of 10 blocks, of which one keeps 4 GiB, or 1 if it recomputes."""
    assert train.blocks_to_recompute(None, 10, 1.0, 4.0, room) == blocks


def test_a_loss_that_is_not_finite_names_the_tensor(net):
    net, split = net
    weight = net.adapter.fusion.join.weight
    before = weight.detach().clone()
    weight.data[0, 1] = float("nan")
    with pytest.raises(ValueError, match="first not finite: fusion.join.weight"):
        train.train_step(net, train.make_optimizer(net), DISABLED, collate(split, [0]))
    weight.data.copy_(before)


def test_features_of_another_width_are_refused(net, tmp_path):
    net, split = net
    batch = collate(split, [0, 1])
    with pytest.raises(ValueError, match="7 features in a frame, but the adapter was made for 6"):
        net.loss(batch._replace(audio=torch.zeros(2, 3, 7)))
    small_data(tmp_path)
    rows = read_pickle(tmp_path / "demo_valid.pkl")
    for row in rows:
        row["features"]["audio"] = row["features"]["audio"][:, :5]
    (tmp_path / "demo_valid.pkl").write_bytes(pickle.dumps(rows, 4))
    with pytest.raises(ValueError, match="expected as many in each"):
        train.main(flags(tmp_path, tmp_path))


def test_every_group_of_parameters_follows_the_schedule(data, tmp_path, monkeypatch):
    def two_groups(net):
        first, *others = net.adapter.parameters()
        return torch.optim.AdamW([{"params": [first]}, {"params": others, "lr": 9.0}])

    def noting_step(net, optimizer, *rest, step=train.train_step):
        rates.append([group["lr"] for group in optimizer.param_groups])
        return step(net, optimizer, *rest)

    rates = []
    monkeypatch.setattr(train, "make_optimizer", two_groups)
    monkeypatch.setattr(train, "train_step", noting_step)
    train.main(flags(data, tmp_path, "--learning-rate", "1e-3"))
    assert rates == [[train.learning_rate(step, 10, train.WARMUP, 1e-3)] * 2 for step in range(10)]


def test_what_trains_is_counted_saved_and_optimized_or_the_run_does_not_begin(data, tmp_path, monkeypatch, capsys):
    class Headed(MultimodalLLM):
        def __init__(self, *args):
            super().__init__(*args)
            self.head = nn.Linear(3, 2)

    class Wider(MSEAdapter):
        def __init__(self, config):
            super().__init__(config)
            self.more = nn.Linear(3, 2)

        def forward(self, *args):
            return super().forward(*args) + 0 * sum(p.sum() for p in self.more.parameters())

    class Forgotten(Wider):
        def forward(self, *args):
            return MSEAdapter.forward(self, *args)

    with monkeypatch.context() as patch, pytest.raises(UserError, match="^head.weight .* put it into MSEAdapter"):
        patch.setattr(train, "MultimodalLLM", Headed)
        train.main(flags(data, tmp_path))
    with monkeypatch.context() as patch, pytest.raises(UserError, match=r"^adapter\.\S+ .* optimizer"):
        patch.setattr(train, "make_optimizer", lambda net: torch.optim.AdamW([*net.adapter.parameters()][1:]))
        train.main(flags(data, tmp_path))
    assert not (tmp_path / "1111" / "settings.json").exists()
    with monkeypatch.context() as patch, pytest.raises(UserError, match="^more.weight gets no gradient, .*forward"):
        patch.setattr(train, "MSEAdapter", Forgotten)
        train.main(flags(data, tmp_path / "forgotten"))
    monkeypatch.setattr(train, "MSEAdapter", Wider)
    train.main(flags(data, tmp_path, "--epochs", "1"))
    saved = load_file(tmp_path / "1111" / "adapter.safetensors")
    assert "more.weight" in saved
    trained = sum(x.numel() for x in saved.values())
    assert f"seed 1111: {trained:,} parameters train, 799,616 are frozen" in capsys.readouterr().out


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "int8"])
def test_a_backbone_in_fewer_bits(data, tmp_path, monkeypatch, capsys, dtype):
    """It trains to finite numbers, and what was saved scores the same line again."""
    # A CPU emulates them: few rows.
    train.main(flags(data, tmp_path, "--dtype", dtype, "--learning-rate", "3e-3", "--train-share", "0.4"))
    run = tmp_path / "1111"
    losses = [json.loads(line)["loss"] for line in (run / "log.jsonl").open()]
    assert 0 < losses[1] < losses[0] < 3
    assert all(x.dtype == torch.float32 and x.isfinite().all() for x in load_file(run / "adapter.safetensors").values())
    monkeypatch.setattr("sys.argv", ["eval.py", str(run), "--decode", "greedy"])
    capsys.readouterr()
    eval.main()
    line = json.loads((run / "results.json").read_text())["line"]
    assert re.match(rf"test \(best epoch \d\): {re.escape(line)}\n", capsys.readouterr().out)


# ---------------------------------------------------------------------------------------------------------------------
# Baselines


def test_a_share_of_the_rows(data):
    split = load_split(TASKS["demo"], data, "train")
    (few, others), (more, _) = (train.share_of(split, part, 1111) for part in (0.2, 0.5))
    assert (len(few), len(more)) == (8, 20) and set(few.id) < set(more.id) < set(split.id)
    rows = [split.id.index(name) for name in few.id]
    assert rows == sorted(rows) and few.text == [split.text[row] for row in rows]
    assert all(a is split.audio[row] for a, row in zip(few.audio, rows))
    assert train.share_of(split, 0.2, 7)[0].id != few.id and train.share_of(split, 1.0, 7)[0].id == split.id
    assert sorted(few.id + others.id, key=int) == split.id
    for wrong in ("0", "1.1", "nan"):
        with pytest.raises(SystemExit):
            train.parse_settings(["--train-share", wrong])


def test_a_share_of_the_rows_is_what_trains(data, tmp_path, monkeypatch):
    def counting_step(net, optimizer, scaler, batch, recompute, step=train.train_step):
        seen.append(len(batch.text))
        return step(net, optimizer, scaler, batch, recompute)

    seen = []
    monkeypatch.setattr(train, "train_step", counting_step)
    train.main(flags(data, tmp_path, "--train-share", "0.3"))
    assert seen == [8, 4, 8, 4]
    changed = json.loads((tmp_path / "1111" / "results.json").read_text())["changed"]
    assert changed == ["batch_size", "epochs", "max_epochs", "train_share"]
    with pytest.raises(ValueError, match="begun with train_share 0.3, now 0.5"):
        train.main(flags(data, tmp_path, "--train-share", "0.5"))


def test_the_prompt_alone(data, tmp_path, capsys):
    """The same scores as rows that are put together by hand, without pseudo tokens; nothing is written."""
    train.main(flags(data, tmp_path / "out", "--prompt-alone"))
    llm, tokenizer = load_llm(ROOT / "demo" / "llm"), load_tokenizer(ROOT / "demo" / "llm")
    words, split = TASKS["demo"].wording("llama"), load_split(TASKS["demo"], data, "test")
    answers = []
    for text in split.text:
        parts = [tokenizer.encode(part) for part in (words.open, text, words.close, words.prompt)]
        ids = llm.generate(llm.embed(torch.tensor([[1, *sum(parts, [])]])), len(tokenizer.encode("0")))
        answers.append(tokenizer.decode(ids[0].tolist()))
    wanted = score(answers, split.label, TASKS["demo"]).scores
    out = capsys.readouterr().out
    for name, value in wanted.items():
        assert re.search(rf"{name.replace('_', ' ')} +{value:.4f} \[", out), out
    assert re.search(r"out of range +\d/12 +0/12", out)
    assert not (tmp_path / "out").exists()


# ---------------------------------------------------------------------------------------------------------------------
# Runs: stopped and continued, finished, changed


def test_same_seed_same_bytes_other_seed_other_bytes(data, finished, tmp_path):
    train.main(flags(data, tmp_path, "--seeds", "1111", "7"))
    assert essence(tmp_path) == essence(finished)
    assert essence(tmp_path, 7)["adapter.safetensors"] != essence(finished)["adapter.safetensors"]
    rows = list(csv.DictReader((tmp_path / "results.csv").open()))
    assert [row["seed"] for row in rows] == ["7", "1111"] and float(rows[0]["test_accuracy"]) <= 1


@pytest.mark.parametrize("stop_at", [1, 5, 9])
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


class Dropping(MSEAdapter):
    """As a fork's might be: it draws while it trains, and must not while it answers."""

    def __init__(self, config):
        super().__init__(config)
        self.drop = nn.Dropout(0.5)

    def forward(self, *args):
        return self.drop(super().forward(*args))


def test_dropout_goes_on_as_it_would_have_and_never_acts_in_answers(data, tmp_path, monkeypatch):
    def evaluate_twice(net, *args, evaluate=train.evaluate):
        results = [evaluate(net, *args) for _ in range(2)]
        assert (results[0].probabilities == results[1].probabilities).all()
        return results[0]

    def stopping_step(net, *args, step=train.train_step):
        calls.append(net.training)
        if len(calls) == 7:
            signal.raise_signal(signal.SIGINT)
        return step(net, *args)

    calls = []
    argv = ["--decode", "labels", "--learning-rate", "1e-3"]
    monkeypatch.setattr(train, "MSEAdapter", Dropping)
    with monkeypatch.context() as patch:
        patch.setattr(train, "evaluate", evaluate_twice)
        train.main(flags(data, tmp_path / "calm", *argv))
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(train, "train_step", stopping_step)
        train.main(flags(data, tmp_path / "stopped", *argv))
    torch.rand(5)                                       # what else is drawn in between does not count
    train.main(flags(data, tmp_path / "stopped", *argv))
    assert calls == [True] * 7 and essence(tmp_path / "stopped") == essence(tmp_path / "calm")
    monkeypatch.setattr("adapter.MSEAdapter", Dropping)
    monkeypatch.setattr("sys.argv", ["eval.py", str(tmp_path / "calm" / "1111")])
    eval.main()                                         # writes its answers beside those of the run
    run = tmp_path / "calm" / "1111"
    assert (run / "predictions-test.csv").read_bytes() == (run / "predictions.csv").read_bytes()


def test_a_state_of_another_version_is_refused(data, begun):
    newest = sorted(begun.glob("1111/state-*"))[-1]
    saved = torch.load(newest, weights_only=True)
    buffer = io.BytesIO()
    torch.save(saved[:-1], buffer)
    digest = hashlib.sha256(buffer.getvalue()).hexdigest()
    newest.with_name(f"state-0009-000000-{digest}.pt").write_bytes(buffer.getvalue())
    with pytest.raises(UserError, match="its state is of another version .*; start again with --overwrite"):
        train.main(flags(data, begun))


def flip_a_byte(file: Path):
    raw = bytearray(file.read_bytes())
    raw[len(raw) // 2] ^= 1
    file.write_bytes(raw)


def test_a_damaged_state_is_noticed_and_the_one_before_used(data, finished, begun, capsys):
    older, newest = sorted(begun.glob("1111/state-*"))
    flip_a_byte(newest)
    (begun / "1111" / ".adapter.safetensors.new").write_bytes(b"half")
    train.main(flags(data, begun))
    out = capsys.readouterr().out
    assert f"{newest}: damaged" in out and "continuing after epoch 1, step 5" in out
    assert essence(begun) == essence(finished)


def test_without_an_undamaged_state_it_ends(data, begun):
    for file in begun.glob("1111/state-*"):
        flip_a_byte(file)
    with pytest.raises(ValueError, match="no undamaged state"):
        train.main(flags(data, begun))


def test_a_finished_run_is_left_alone_unless_told(data, finished, capsys):
    run = finished / "1111"
    before, records = essence(finished), (run / "results.json").stat().st_mtime_ns
    (run / "state-0003-000000-0.pt").write_bytes(b"")               # killed between its record and its clean-up
    train.main(flags(data, finished))
    assert "finished before, left alone" in capsys.readouterr().out
    assert essence(finished) == before and (run / "results.json").stat().st_mtime_ns == records
    train.main(flags(data, finished, "--overwrite"))
    assert essence(finished) == before and (run / "results.json").stat().st_mtime_ns > records


def test_another_setting_is_refused_by_name(data, finished):
    with pytest.raises(ValueError, match=r"learning_rate 0\.\d+, now 0\.5"):
        train.main(flags(data, finished, "--learning-rate", "0.5"))


def test_a_run_is_known_by_content_not_by_paths(data, finished, begun, tmp_path, capsys):
    (tmp_path / "llm").symlink_to(ROOT / "demo" / "llm")
    (tmp_path / "data").symlink_to(data)
    for out, said in ((finished, "finished before"), (begun, "continuing after epoch 1")):
        train.main(flags(tmp_path / "data", out, "--llm", f"{tmp_path / 'llm'}/"))
        assert said in capsys.readouterr().out
    assert essence(begun) == essence(finished)


def other_features(rows):
    for row in rows:
        row["features"]["video"] = row["features"]["video"] + 1
    return rows


@pytest.mark.parametrize("change", [other_features, lambda rows: rows[:-1]])
def test_other_data_are_refused(begun, finished, tmp_path_factory, change):
    other = small_data(tmp_path_factory.mktemp("other"), change)
    for out in (begun, finished):
        with pytest.raises(ValueError, match="begun with train_sha256"):
            train.main(flags(other, out))


def test_other_weights_are_refused(data, begun, monkeypatch):
    def other(*args, load=load_llm):
        llm = load(*args)
        llm.fingerprint = "another"
        return llm

    monkeypatch.setattr(train, "load_llm", other)
    with pytest.raises(ValueError, match="begun with llm_sha256 .* now 'another'"):
        train.main(flags(data, begun))


@pytest.mark.parametrize("text, words", [
    ("{", "not valid JSON"), ("[" * 100_000, "not valid JSON"), (r'{"a": "\ud800"}', "not valid JSON"),
    ("\xff", "not valid JSON"), ("[1]", "expected an object"), ('"{}"', "expected an object"),
    ("{}", "expected an object with seed")])
def test_json_of_ours_is_refused_in_a_sentence(tmp_path, text, words):
    (tmp_path / "a.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(ValueError, match=f"a.json: {words}"):
        read_json(tmp_path / "a.json", ("seed",))


def test_a_record_of_another_shape_is_refused_in_a_sentence(data, finished, tmp_path):
    shutil.copytree(finished / "1111", tmp_path / "1111")
    record = json.loads((tmp_path / "1111" / "results.json").read_bytes())
    for wrong, words in ((record | {"family": []}, "damaged"), (record | {"changed": ""}, "damaged"),
                         ({"seed": 1}, "expected an object with family, data")):
        (tmp_path / "1111" / "results.json").write_text(json.dumps(wrong))
        with pytest.raises(ValueError, match=f"results.json: {words}"):
            train.main(flags(data, tmp_path))


def own_data(folder: Path, task) -> list[str]:
    """The demo's rows under a task of one's own, and the flags that train on them."""
    def own(rows):
        for row in rows:
            row["label"] = row["label"] if task.labels else round(len(row["features"]["text"]) % 20 / 10 - 1, 1)
        return rows

    for file in small_data(folder, own).glob("demo_*.pkl"):
        file.rename(folder / file.name.replace("demo", task.name))
    return ["--data", task.name, "--llm", str(ROOT / "demo" / "llm"), *flags(folder, folder / "out", "--epochs", "1")]


@pytest.mark.parametrize("entry, metric", [
    (dict(labels=("joy", "anger", "sadness", "calm"), language="zh"), "weighted_f1"),
    (dict(range=(-1.0, 1.0)), "acc3")])
def test_one_entry_makes_a_task(tmp_path, monkeypatch, entry, metric):
    monkeypatch.setitem(TASKS, "own", Task("own", **entry))
    train.main(own_data(tmp_path, TASKS["own"]))
    assert f"test_{metric}" in json.loads((tmp_path / "out" / "1111" / "results.json").read_text())


@pytest.mark.parametrize("entry, words", [
    (dict(labels=("joy", "anger"), language="fr"), "data.py has no words for 'fr'"),
    (dict(range=(3,)), "expected one of"),
    (dict(range=(-1.0, 1.0), labels=("joy",)), "expected one of"), (dict(), "expected one of the two in TASKS")])
def test_a_task_that_could_not_end_is_refused_before_it_begins(tmp_path, monkeypatch, capsys, entry, words):
    monkeypatch.setitem(TASKS, "own", Task("own", **entry))
    with pytest.raises(ValueError, match=f"task own: .*{words}"):
        train.main(["--data", "own", "--llm", str(ROOT / "demo" / "llm"), *flags(tmp_path, tmp_path / "out")])
    assert not (tmp_path / "out").exists()
    if "fr" not in words:
        assert main(["own", "--data-dir", str(tmp_path)]) == 2 and "task own: " in capsys.readouterr().err


def test_a_second_run_in_the_folder_is_refused(data, finished):
    with train.locked(finished / "1111"), pytest.raises(ValueError, match="another process"):
        train.main(flags(data, finished))


def kill_and_continue(kills: int, folder: Path, data: Path, calm: dict, seconds: float):
    """Kill a run that takes so long at random moments, let it end, and compare with an undisturbed one."""
    chance, done, run = random.Random(0), 0, folder / "1111"
    command = [sys.executable, str(ROOT / "train.py"), *flags(data, folder)]
    while done < kills:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        for line in process.stdout:
            if line.startswith("memory:"):                  # training begins
                break
        time.sleep(chance.random() * seconds)
        process.kill()
        process.wait()
        if (run / "results.json").exists():                 # it got through: once more from the start
            for file in run.iterdir():
                file.unlink()
        else:
            done += 1
    train.main(flags(data, folder))
    assert essence(folder) == calm


def test_killed_and_continued_is_undisturbed(data, finished, tmp_path):
    kill_and_continue(2, tmp_path, data, essence(finished), 0.4)


# ---------------------------------------------------------------------------------------------------------------------
# What is printed and drawn


def test_alarms_of_an_epoch(capsys):
    task, settings = TASKS["demo"], train.resolve(train.Settings(), "llama")
    valid = Split(*[["\x1b[2J\nx"] * 100] * 5, [0, 1, 2, 3] * 25, ["1"] * 100)
    run = SimpleNamespace(task=task, settings=settings, log=[], best_epoch=lambda: 1,
                          say=lambda line, epochs: print(line))
    for epoch, answers in enumerate((["0", "1"] * 50, ["0"] * 98 + [""] * 2, ["0"] * 97 + [""] * 3), 1):
        result = score(answers, valid.label, task)
        run.log.append({"epoch": epoch, "loss": 1.0, "valid_unparsed": result.unparsed,
                        "valid_weighted_f1": result.scores["weighted_f1"]})
        train.print_epoch(run, result, valid)
    lines = capsys.readouterr().out.splitlines()
    first, second, collapsed, unparsed, third, again = [line for line in lines if not line.startswith("  ")]
    assert first == "epoch 1/4: loss 1.0000, valid weighted f1 0.3333 (best yet), unparsed 0/100"
    assert second == "epoch 2/4: loss 1.0000, valid weighted f1 0.1016, unparsed 2/100"
    assert third.startswith("epoch 3/4: ")
    assert collapsed.startswith("looks collapsed: 'joy' is 98 of 100") and again.startswith("looks collapsed")
    assert unparsed == "more answers do not parse: 0 before, 2 now"
    assert lines[1:4] == ["  anger, answered anger: \\x1b[2J x", "  sadness, answered joy: \\x1b[2J x",
                          "  calm, answered anger: \\x1b[2J x"]
    assert max(map(len, lines[:4])) <= 100


def test_the_time_that_is_left(capsys):
    run = SimpleNamespace(began=time.time() - 7300, settings=SimpleNamespace(max_epochs=4))
    train.Run.say(run, "epoch 2/4", 2.0)
    assert capsys.readouterr().out == "epoch 2/4, 2:01:40, 2:01:40 left\n"
    assert [train.clock(seconds) for seconds in (0, 83.2, 3599.6)] == ["0:00", "1:23", "1:00:00"]


def test_a_file_gets_a_line_now_and_then(data, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(train, "SAY_SECONDS", 0)
    train.main(flags(data, tmp_path, "--epochs", "1"))
    assert "epoch 1, step 5/5: loss " in capsys.readouterr().out


@pytest.mark.parametrize("task, epoch", [("meld", 2), ("mosei", 3)])
def test_best_epoch_is_the_first_of_the_largest_f1_or_the_least_mae(task, epoch):
    run = SimpleNamespace(task=TASKS[task], log=[])
    assert train.Run.best_epoch(run) == 0
    run.log = [{"valid_weighted_f1": y, "valid_mae": y} for y in (.5, .7, .4, .7, .4)]
    assert train.Run.best_epoch(run) == epoch


def test_the_table_of_seeds(tmp_path, capsys):
    rows = [(1111, .60, .58, 3), (2222, .64, .61, 0), (3333, .62, .60, 1)]
    records = [{"seed": seed, "family": "qwen2", "data": "meld", "test_accuracy": accuracy, "test_weighted_f1": f1,
                "test_rows": 2610, "test_unparsed": unparsed, "line": "", "changed": []}
               for seed, accuracy, f1, unparsed in rows]
    train.summarize(records)
    lines = capsys.readouterr().out.splitlines()
    table = {line.split()[0]: [float(x) for x in line.split()[1:]] for line in lines[1:7]}
    assert lines[0].split() == ["seed", "accuracy", "weighted_f1", "unparsed"] and table["2222"] == [.64, .61, 0]
    assert table["mean"][0] == pytest.approx(.62) and table["std"][0] == pytest.approx(.02)
    assert table["worst"] == [.60, .58, 3]                              # more unparsed is worse
    assert "the release recorded 0.6218 +- 0.0132 with Qwen-1.8B; here 0.6200, -0.1 of its" in lines[7]
    for record in records:
        (tmp_path / str(record["seed"])).mkdir()
        (tmp_path / str(record["seed"]) / "results.json").write_text(json.dumps(record))
    train.write_table(tmp_path)
    with open(tmp_path / "results.csv") as file:
        assert [(int(row["seed"]), float(row["test_accuracy"])) for row in csv.DictReader(file)] == [
            (seed, accuracy) for seed, accuracy, _, _ in rows]


def test_the_releases_figures_stand_beside_the_same_data_and_method_alone(capsys):
    record = {"seed": 1111, "family": "chatglm", "data": "simsv2", "test_acc2": .8, "test_rows": 1034, "line": ""}
    changes = [({}, True), ({"test_rows": 40}, False), ({"changed": []}, True),
               ({"changed": ["train_share"]}, False), ({"changed": ["no_mixer", "a_new_one"]}, False)]
    for change, shown in changes:
        train.summarize([record | change] * 2)
        out = capsys.readouterr().out
        assert ("acc2: the release recorded 0.7944 +- 0.0251" in out) == shown
        assert ("note: with the shipped prompt" in out) == shown


@pytest.mark.parametrize("argv, words", [
    (["--data", "nope"], "invalid choice: 'nope'"), (["--batch-sise", "3"], "unrecognized"),
    (["--epochs", "0"], "0 is not above 0"), (["--pseudo-tokens", "9" * 4000], "999 is not above 0 and below"),
    *[(["--learning-rate", rate], f"{rate} is not above 0 and at most 1") for rate in ("nan", "-1", "1e38", "0")],
    (["--llm", "\udcff"], "is no UTF-8; rename the folder, or link to it"), (["--data-dir", "/nowhere"], "/nowhere"),
    (["--llm", "/nowhere"], "hf download"), (["--device", "meta"], "pass --device cpu"),
    (["--data", "meld", "--data-dir", "/nowhere", "--llm", str(ROOT / "demo" / "llm")],
     "hf download AZYoung/MELD_processed"),
])
def test_bad_input_is_one_sentence(argv, words, tmp_path, capsys):
    with pytest.raises((ValueError, SystemExit)) as error:
        train.main(["--out", str(tmp_path / "out"), *argv])
    assert words in str(error.value) + capsys.readouterr().err


def test_never_a_traceback(tmp_path):
    done = subprocess.run([sys.executable, str(ROOT / "train.py"), "--data-dir", str(tmp_path)], cwd=tmp_path,
                          capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.startswith("error: ") and len(done.stderr.splitlines()) == 1


def test_a_mistake_in_the_code_shows_its_traceback():
    script = """
import runpy, data
def load_split(*args):
    raise ValueError("a mistake of a fork")
data.load_split = load_split
runpy.run_path("train.py", run_name="__main__")
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.startswith("Traceback")
    assert done.stderr.endswith("ValueError: a mistake of a fork\n")


if __name__ == "__main__":
    kills = int(sys.argv[1]) if len(sys.argv) > 1 else 30
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        data = small_data(folder)
        train.main(flags(data, folder / "calm"))
        kill_and_continue(kills, folder / "killed", data, essence(folder / "calm"), 0.6)
    print(f"{kills} kills, the same bytes")
