"""Where people run it: jobs told to end, file systems that cannot lock or sync, strangers' folders, devices."""
import errno
import os
import signal
import stat
import subprocess
import sys
import time

import pytest
import torch
from torch.overrides import TorchFunctionMode

import train
from adapter import AdapterConfig, MSEAdapter, MultimodalLLM
from conftest import HERE
from data import TASKS, collate, load_split, load_tokenizer
from eval import label_logprobs
from model import load_llm
from support import guards
from support.files import UserError, write_atomic


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


def test_links_in_a_strangers_folder_are_not_followed(tmp_path):
    victim, run = tmp_path / "victim", tmp_path / "run"
    victim.write_text("precious")
    run.mkdir()
    for name in (".metrics.json.new", "metrics.json", ".lock"):
        (run / name).symlink_to(victim)
    write_atomic(run / "metrics.json", b"new")
    with pytest.raises(OSError), guards.locked(run):
        pass
    assert victim.read_text() == "precious" and (run / "metrics.json").read_bytes() == b"new"
    assert not (run / "metrics.json").is_symlink()
    (run / ".lock").unlink()
    (run / ".lock").write_text("not emptied")
    with guards.locked(run):
        assert (run / ".lock").read_text() == "not emptied"


# ---------------------------------------------------------------------------------------------------------------------
# Devices


@pytest.mark.parametrize("cuda, mps, native, device, dtype", [
    (False, False, False, "cpu", "float32"), (False, True, False, "mps", "float32"),
    (True, False, True, "cuda", "bfloat16"), (True, False, False, "cuda", "float16")])
def test_auto_takes_the_best_device_and_no_emulated_dtype(monkeypatch, cuda, mps, native, device, dtype):
    def is_bf16_supported(including_emulation=True):
        return native or including_emulation            # what is emulated counts by default

    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", is_bf16_supported)
    monkeypatch.setattr(train, "check_device", lambda name: None)
    settings = train.resolve(train.Settings(), "llama")
    assert (settings.device, settings.dtype) == (device, dtype)


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
