"""Where people run it: jobs told to end, file systems that cannot lock or sync, strangers' folders, devices, code
that was edited in between, consoles."""
import csv
import errno
import json
import math
import os
import shutil
import signal
import stat
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from torch.overrides import TorchFunctionMode

import eval
import train
from adapter import AdapterConfig, AdapterError, MSEAdapter, MultimodalLLM, load_adapter
from conftest import HERE, essence, flags
from data import TASKS, collate, load_split, load_tokenizer
from eval import label_logprobs
from model import load_llm
from reports import clip, tables
from support import files, guards
from support.files import UserError, json_bytes, printable, write_atomic
from support.states import load_state, save_state


# ---------------------------------------------------------------------------------------------------------------------
# Signals


def begin(data, out, *how):
    """A training that has begun its steps, as a process."""
    command = [sys.executable, str(HERE.parent / "train.py"), "--data-dir", str(data), "--out", str(out),
               "--device", "cpu", "--batch-size", "1", "--epochs", "30"]
    process = subprocess.Popen([*how, *command], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    for line in process.stdout:
        if line.startswith(("memory:", "continuing")):
            break
    time.sleep(0.3)
    return process


@pytest.mark.parametrize("number, code", [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGHUP, 129)])
def test_a_job_that_is_told_to_end_saves_within_its_epoch(data, tmp_path, number, code):
    process = begin(data, tmp_path)
    process.send_signal(number)
    _, said = process.communicate(timeout=60)
    assert process.returncode == code and "Traceback" not in said
    assert "interrupted; the state is saved, the same command again continues" in said
    assert list(tmp_path.glob("1111/state-*")) and f"stopped by {signal.Signals(number).name}" in said


def test_what_was_ignored_stays_ignored(data, tmp_path):
    process = begin(data, tmp_path, "nohup")
    process.send_signal(signal.SIGHUP)
    time.sleep(0.5)
    assert process.poll() is None
    process.kill()
    process.communicate()


def test_nothing_is_said_to_be_saved_before_training(tmp_path):
    code = ("import os, signal, sys; sys.path.insert(0, sys.argv[1]); from support import guards\n"
            "guards.stop_on_signals()\n"
            "try:\n    os.kill(os.getpid(), signal.SIGTERM)\n"
            "except guards.Stopped as stopped:\n    print(stopped, stopped.exit_code, flush=True)\n"
            "os.kill(os.getpid(), signal.SIGINT)")              # the second ends it at once
    done = subprocess.run([sys.executable, "-c", code, str(HERE.parent)], capture_output=True, text=True)
    assert done.stdout == "stopped by SIGTERM 143\n" and done.returncode == -signal.SIGINT and not done.stderr


def test_a_second_signal_does_not_wait_for_the_step():
    code = ("import os, signal, sys; sys.path.insert(0, sys.argv[1]); from support import guards\n"
            "guards.stop_on_signals()\n"
            "with guards.uninterrupted():\n"
            "    os.kill(os.getpid(), signal.SIGTERM)\n    print('held', flush=True)\n"
            "    os.kill(os.getpid(), signal.SIGTERM)\n    print('not reached', flush=True)")
    done = subprocess.run([sys.executable, "-c", code, str(HERE.parent)], capture_output=True, text=True)
    assert done.stdout == "held\n" and done.returncode == -signal.SIGTERM


def test_overwrite_typed_again_goes_on(data, finished, tmp_path, monkeypatch, capsys):
    def stopping_step(*args, step=train.train_step):
        steps.append(1)
        if len(steps) == 14:                    # a seed takes ten
            signal.raise_signal(signal.SIGINT)
        return step(*args)

    steps, words = [], flags(data, tmp_path, "--seeds", "7", "1111", "--overwrite")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(train, "train_step", stopping_step)
        train.main(words)
    first = essence(tmp_path, 7)
    capsys.readouterr()
    train.main(words)                           # as a cluster begins an ended job again
    said = capsys.readouterr().out
    assert "1111: going on with what this command began" in said and "continuing after epoch 0, step 4" in said
    assert "seed 7: finished before, left alone; test" in said
    assert (essence(tmp_path, 7), essence(tmp_path)) == (first, essence(finished))
    done = [tmp_path / seed / "results.json" for seed in ("7", "1111")]
    (tmp_path / "1111").rename(tmp_path / "away")
    monkeypatch.setattr(train, "train_run", lambda *_: {})
    for name in ("summarize", "write_table"):
        monkeypatch.setattr(train, name, lambda _: None)
    train.main(words)                           # ended between the two
    assert done[0].is_file() and "1111: going on with what this command began" in capsys.readouterr().out
    shutil.rmtree(tmp_path / "1111")
    (tmp_path / "away").rename(tmp_path / "1111")
    with guards.locked(tmp_path / "1111"), pytest.raises(UserError, match="another process trains here"):
        train.main(words)
    assert all(file.is_file() for file in done)             # all or none
    kept = shutil.copytree(tmp_path / "7", tmp_path / "kept")
    train.main(flags(data, tmp_path, "--seeds", "7", "2222", "--overwrite"))            # another command
    assert [file.is_file() for file in done] == [False, True]
    shutil.rmtree(tmp_path / "7")
    kept.rename(tmp_path / "7")
    train.main(words)                           # finished runs are what --overwrite is for
    assert [file.is_file() for file in done] == [False, False]


def test_overwrite_discards_what_another_command_wrote(data, begun, capsys):
    (begun / "1111" / "settings.json").write_text("{")                  # damaged, too
    train.main(flags(data, begun, "--overwrite"))
    assert "epoch 1/2" in capsys.readouterr().out


# ---------------------------------------------------------------------------------------------------------------------
# File systems


@pytest.mark.parametrize("code", [errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS])
def test_a_file_system_that_cannot_lock_gets_a_note(tmp_path, monkeypatch, capsys, code):
    def flock(*_):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(guards.fcntl, "flock", flock)
    with guards.locked(tmp_path / "run"):
        pass
    assert f"run: cannot be locked ({os.strerror(code)}); start no second process" in capsys.readouterr().err


def test_a_locked_folder_is_another_processes(tmp_path):
    with guards.locked(tmp_path), pytest.raises(UserError, match="another process trains here"):
        with guards.locked(tmp_path):
            pass
    with guards.locked(tmp_path):           # the lock is gone with its holder
        pass


@pytest.mark.parametrize("code", [errno.EINVAL, errno.EIO, errno.EACCES])
def test_a_folder_that_cannot_be_synced_is_passed_over(tmp_path, monkeypatch, code):
    sync = os.fsync

    def fsync(file):
        if stat.S_ISDIR(os.fstat(file).st_mode):
            raise OSError(code, os.strerror(code))
        sync(file)

    monkeypatch.setattr(os, "fsync", fsync)
    write_atomic(tmp_path / "a.json", b"{}")
    assert (tmp_path / "a.json").read_bytes() == b"{}"


def test_links_in_a_strangers_folder_are_not_followed(tmp_path, monkeypatch):
    victim, run = tmp_path / "victim", tmp_path / "run"
    victim.write_text("precious")
    run.mkdir()
    for name in (".metrics.json.1.new", "metrics.json", ".lock"):
        (run / name).symlink_to(victim)
    with monkeypatch.context() as patch, pytest.raises(OSError):
        patch.setattr(files.secrets, "token_hex", lambda n: "1")        # even if the draft's name is guessed
        write_atomic(run / "metrics.json", b"new")
    assert victim.read_text() == "precious"
    write_atomic(run / "metrics.json", b"new")
    with pytest.raises(OSError), guards.locked(run):
        pass
    assert victim.read_text() == "precious" and (run / "metrics.json").read_bytes() == b"new"
    assert not (run / "metrics.json").is_symlink()
    (run / ".lock").unlink()
    (run / ".lock").write_text("not emptied")
    with guards.locked(run):
        assert (run / ".lock").read_text() == "not emptied"


def test_two_processes_may_write_the_same_file(tmp_path, monkeypatch):
    def replace(draft, path, replace=os.replace):
        if not others:                          # the other one comes in between
            others.append(1)
            write_atomic(tmp_path / "metrics.json", b"theirs")
        replace(draft, path)

    others = []
    monkeypatch.setattr(os, "replace", replace)
    write_atomic(tmp_path / "metrics.json", b"ours")
    assert [(file.name, file.read_bytes()) for file in tmp_path.iterdir()] == [("metrics.json", b"ours")]


def test_pipes_in_the_place_of_files_are_not_waited_for(tmp_path):
    for name in ("adapter.safetensors", "a.npy", "state-0001-000001-ab.pt", "settings.json"):
        os.mkfifo(tmp_path / name)
    with pytest.raises(AdapterError, match="not a saved adapter"):
        load_adapter(tmp_path / "adapter.safetensors", *demo_backbone(), TASKS["demo"])
    with pytest.raises(UserError, match="not a .npy file"):
        clip.read_features(tmp_path / "a.npy", 6)
    with pytest.raises(UserError, match="settings.json: not there"):
        eval.load_run(tmp_path)
    assert load_state(tmp_path) is None


def demo_backbone() -> tuple:
    folder = HERE.parent / "demo" / "llm"
    return load_llm(folder), load_tokenizer(folder)


def test_the_table_holds_the_seeds_of_all_processes(data, finished, tmp_path, capsys):
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    train.main(flags(data, tmp_path, "--seeds", "7", "--epochs", "1"))
    rows = list(csv.DictReader((tmp_path / "results.csv").open()))
    assert [(row["seed"], row["epochs"], row["ran_epochs"]) for row in rows] == [("7", "1", "1"), ("1111", "2", "2")]
    assert all(float(row["valid_weighted_f1"]) <= 1 and row["learning_rate"] == "0.01" for row in rows)
    print(eval.compare([tmp_path / "7", tmp_path]))
    chosen, tested = capsys.readouterr().out.split("\n\n")[-2:]
    assert chosen.splitlines()[-3].split() == ["valid", "weighted", "f1", "seed", "epochs", "max_epochs", "run"]
    scores = [float(line.split()[0]) for line in chosen.splitlines()[-2:]]
    assert scores == sorted(scores, reverse=True) and "not to choose by" in tested
    record = json.loads((tmp_path / "7" / "results.json").read_text())
    (tmp_path / "7" / "results.json").write_text(json.dumps(record | {"data": "x"}))
    with pytest.raises(UserError, match="the task 'x' is not in TASKS of data.py; add its entry again"):
        train.write_table(tmp_path)
    for wrong in ({"test_accuracy": "x"}, {"line": 3}, {"changed": None}, {"data": []}, {"dtype": []}):
        (tmp_path / "7" / "results.json").write_text(json.dumps(record | wrong))
        with pytest.raises(UserError, match="7.results.json: damaged; train again with --overwrite"):
            train.write_table(tmp_path)
    shown = {None: "-", 5e-05: "5e-05", 0.0: "0.0000", -0.72039: "-0.7204", 3: "3", "qwen": "qwen"}
    assert {x: tables.cell(x) for x in shown} == shown
    with pytest.raises(UserError, match="no finished run; expected folders of train.py"):
        eval.compare([data])


def test_a_run_that_only_others_may_write_is_still_scored(finished, tmp_path, monkeypatch, capsys):
    def write_results(folder, *args, write=eval.write_results):
        if folder == finished / "1111":
            raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(folder))
        write(folder, *args)

    monkeypatch.setattr(eval, "write_results", write_results)
    monkeypatch.setattr("sys.argv", ["eval.py", str(finished / "1111")])
    eval.main()
    out, err = capsys.readouterr()
    assert out.startswith("test (best epoch") and "nothing was written: " in err and "--out FOLDER" in err
    monkeypatch.setattr("sys.argv", ["eval.py", str(finished / "1111"), "--out", str(tmp_path / "mine")])
    eval.main()
    assert {file.name for file in (tmp_path / "mine").iterdir()} == {"metrics-test.json", "predictions-test.csv"}


# ---------------------------------------------------------------------------------------------------------------------
# States, and code that changes


def other_state(folder, change):
    """The newest state with something else in it, under the name that proves it."""
    state = load_state(folder)
    change(state)
    for file in folder.glob("state-*"):
        file.unlink()
    save_state(folder, 1, 5, state)


def change_moments(state):
    state[0][2]["state"][0]["exp_avg"] = torch.zeros(3)


@pytest.mark.parametrize("change", [
    lambda state: state.pop(), lambda state: state[0].pop(), lambda state: state[0].__setitem__(0, {}),
    lambda state: state[0][2]["param_groups"][0].update(betas="x"), change_moments,
    lambda state: state.__setitem__(1, []), lambda state: state.__setitem__(2, [{"loss": 1.0}]),
    lambda state: state[2][0].update(valid_weighted_f1="x"), lambda state: state.__setitem__(3, -1),
    lambda state: state.__setitem__(3, "x"), lambda state: state.__setitem__(4, None),
    lambda state: state.__setitem__(5, float("inf"))])
def test_a_state_that_holds_something_else_is_refused(data, begun, change):
    other_state(begun / "1111", change)
    with pytest.raises(UserError, match="its state is of another version .*; start again with --overwrite"):
        train.main(flags(data, begun))


def test_a_file_of_the_users_own_is_no_state(data, begun, finished):
    (begun / "1111" / "state-of-my-work.txt").write_text("thesis")
    train.main(flags(data, begun))
    train.main(flags(data, begun, "--overwrite"))
    assert (begun / "1111" / "state-of-my-work.txt").read_text() == "thesis"
    (begun / "1111" / "state-of-my-work.txt").unlink()
    assert essence(begun) == essence(finished)


def test_a_run_knows_its_code(data, begun, finished, monkeypatch, capsys):
    now = eval.code_digests()
    assert set(now) >= {"model.py", "adapter.py", "data.py", "eval.py", "train.py", "support/tokenizers.py"}
    assert set(now) == {*eval.CODE, *(f"support/{file.name}" for file in (HERE.parent / "support").glob("*.py"))}
    assert eval.edited({"code": now}, now | {"new.py": "0"}) == []                  # which nothing uses
    assert eval.edited({}, now) == ["its version"]
    for program in (eval, train):
        monkeypatch.setattr(program, "code_digests", lambda: now | {"adapter.py": "0"})
    with pytest.raises(UserError, match=r"begun with other code \(adapter.py changed since\); continue as it began"):
        train.main(flags(data, begun))
    train.main(flags(data, finished))
    assert "finished before by other code (adapter.py changed since), left alone" in capsys.readouterr().out
    monkeypatch.setattr("sys.argv", ["eval.py", str(finished / "1111"), "--ask", "x"])
    eval.main()
    assert "the run is of other code (adapter.py changed since)" in capsys.readouterr().err


# ---------------------------------------------------------------------------------------------------------------------
# What reaches people


def test_a_console_that_cannot_write_it_gets_it_spelled_out():
    code = ("import sys; sys.path.insert(0, sys.argv[1]); from support import guards\n"
            "def main():\n    print('中')\n    raise guards.UserError('no \\x1b[2J 文')\n"
            "guards.run_program(main)")
    done = subprocess.run([sys.executable, "-c", code, str(HERE.parent)], capture_output=True, text=True,
                          env=os.environ | {"PYTHONIOENCODING": "cp1252"})
    assert (done.returncode, done.stdout, done.stderr) == (1, "\\u4e2d\n", "error: no \\x1b[2J \\u6587\n")
    assert printable("a\tb\nc \x9b \u202e 文") == "a\tb\nc \\x9b \\u202e 文"


def test_a_spreadsheet_runs_nothing():
    for text in ("=1+1", "+cmd", "-x", "@a", "\tx", "-nan", "+inf"):
        assert tables.harmless(text) == "'" + text
    for text in ("-1.6", "+0.4", "Oh -", "", "1"):
        assert tables.harmless(text) == text


def test_json_has_no_nan():
    found = {"a": [1.5, math.nan, (math.inf, 2)], "文": np.float64(-math.inf)}
    assert json.loads(json_bytes(found)) == {"a": [1.5, None, [None, 2]], "文": None}


# ---------------------------------------------------------------------------------------------------------------------
# Devices


def test_a_device_that_fails_loses_nothing(data, finished, tmp_path, monkeypatch):
    for done, error in enumerate((
            torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 3 GiB"), MemoryError(),
            torch.AcceleratorError("CUDA error: an illegal memory access"),
            RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"),
            RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`")), 1):
        steps = []

        def failing_step(*args, step=train.train_step, steps=steps, error=error):
            if steps:                                       # each time it fails in the second step
                raise error
            steps.append(1)
            return step(*args)

        with monkeypatch.context() as patch, pytest.raises(UserError) as told:
            patch.setattr(train, "train_step", failing_step)
            train.main(flags(data, tmp_path))
        for words in ("--recompute", "--batch-size", "--eval-batch", "the state is saved"):
            assert words in str(told.value), error
        epoch, step = divmod(done, 5)
        assert list(tmp_path.glob(f"1111/state-{epoch:04}-{step:06}-*")), error
    train.main(flags(data, tmp_path))
    assert essence(tmp_path) == essence(finished)


def test_a_device_that_fails_while_a_state_is_read_does_no_harm_to_it(data, begun, monkeypatch):
    def load(*args, **more):
        raise torch.OutOfMemoryError("CUDA out of memory")

    with monkeypatch.context() as patch, pytest.raises(torch.OutOfMemoryError):
        patch.setattr(torch, "load", load)
        train.main(flags(data, begun))
    assert len(list(begun.glob("1111/state-*"))) == 2


def test_what_is_not_finite_is_not_saved(data, tmp_path, monkeypatch):
    def step(*args, step=train.train_step):
        return step(*args) * math.nan           # as on a GPU, where no step looks

    monkeypatch.setattr(train, "train_step", step)
    for _ in range(2):                          # the same command again does not pass it by
        with pytest.raises(UserError, match="the loss is nan"):
            train.main(flags(data, tmp_path))
    assert not list(tmp_path.glob("1111/state-*"))


def test_a_mistake_in_the_code_is_no_device_that_fails(data, tmp_path, monkeypatch, capsys):
    def mistaken_step(*args):
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    monkeypatch.setattr(train, "train_step", mistaken_step)
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        train.main(flags(data, tmp_path))

    def main():
        raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(SystemExit) as end:
        guards.run_program(main)
    assert end.value.code == 1 and "error: the device failed (CUDA out of memory); " in capsys.readouterr().err


@pytest.mark.parametrize("cuda, mps, native, device, dtype, official", [
    (False, False, False, "cpu", "float32", "float32"), (False, True, False, "mps", "float32", "float32"),
    (True, False, True, "cuda", "bfloat16", "float16"), (True, False, False, "cuda", "float16", "float16")])
def test_auto_takes_the_best_device_and_no_emulated_dtype(monkeypatch, cuda, mps, native, device, dtype, official):
    def is_bf16_supported(including_emulation=True):
        return native or including_emulation            # what is emulated counts by default

    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", is_bf16_supported)
    monkeypatch.setattr(train, "check_device", lambda name: None)
    settings = train.resolve(train.Settings(), "llama")
    assert (settings.device, settings.dtype) == (device, dtype)
    assert train.resolve(train.Settings(official=True), "llama").dtype == official      # the release's on a GPU
    assert train.resolve(train.Settings(device=f"{device}:0", dtype="int8"), "llama").dtype == "int8"


def test_a_gpu_without_kernels_says_torchs_own_words(monkeypatch):
    def ones(*_, **__):
        raise RuntimeError("CUDA error: no kernel image is available for execution on the device")

    with pytest.raises(UserError, match="--device cuda: torch finds no GPU here; pass --device cpu"):
        guards.check_device("cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch, "ones", ones)
    with pytest.raises(UserError, match="--device cuda: .*no kernel image is available.*; pass --device cpu"):
        guards.check_device("cuda")


class NoFloat64(TorchFunctionMode):
    """As on Apple's devices, which have no float64."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        assert not isinstance(result, torch.Tensor) or result.dtype != torch.float64, func
        return result


def test_nothing_is_computed_in_float64(data):
    folder, task = HERE.parent / "demo" / "llm", TASKS["demo"]
    llm, tokenizer = load_llm(folder), load_tokenizer(folder)
    net = MultimodalLLM(llm, MSEAdapter(AdapterConfig(llm.config.dim, 6, 8, 4, 4, 2)), tokenizer, task)
    batch, optimizer = collate(load_split(task, data, "valid"), range(4)), train.make_optimizer(net)
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    with pytest.raises(AssertionError), NoFloat64():
        torch.ones(1).double()
    with NoFloat64():
        for recompute in (0, 2):
            train.train_step(net, optimizer, scaler, batch, recompute)
        net.answer(batch)
        label_logprobs(net, batch)
