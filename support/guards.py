"""What keeps a run whole: every ending has its words, signals wait for the end of a step, one process at a
time works in a folder, and a device is tried before it is used."""
import os
import signal
import sys
from contextlib import contextmanager
from pathlib import Path

import torch

from support.files import UserError, brief, printable

try:
    import fcntl
except ImportError:         # Windows has none: there nothing locks a run's folder
    fcntl = None


# --- Programs and devices -----------------------------------------------------------------------------------
def run_program(main, *errors):
    """Call a program's main, which returns its exit code or None. What was asked wrongly, or failed on the
    way, ends in one sentence; every other exception is a mistake in the code, and shows its traceback.

    errors: kinds of exceptions whose text is such a sentence, beside UserError's.
    """
    for stream in (sys.stdout, sys.stderr):     # "é" on a console that cannot write it becomes "\\xe9"
        stream.reconfigure(errors="backslashreplace")
    stop_on_signals()
    try:
        sys.exit(main())
    except Stopped as stopped:
        print(stopped, file=sys.stderr)
        sys.exit(stopped.exit_code)
    except (UserError, OSError, *errors) as error:
        message = str(error)
    except (RuntimeError, MemoryError) as error:
        if not failed_device(error):
            raise
        message = f"{device_advice(error)}"
    print(printable(f"error: {message}"), file=sys.stderr)
    sys.exit(1)


def failed_device(error: Exception) -> bool:
    """Whether it is the device that failed, memory that ran out or a GPU that fell over, and not the code."""
    if isinstance(error, (torch.OutOfMemoryError, torch.AcceleratorError, MemoryError)):
        return True
    # A CPU, Apple's devices, cuBLAS and cuDNN have no exception of their own.
    words = ("out of memory", "not enough memory", "can't allocate memory", "ALLOC_FAILED")
    return any(part in str(error) for part in words)


def device_advice(error: Exception) -> str:
    what = brief(error)[:200] or type(error).__name__
    return (f"the device failed ({what}); where memory ran out, take a smaller --eval-batch, and to train "
            "let more blocks recompute (--recompute 99) or take a smaller --batch-size")


def check_device(name: str):
    """Raises UserError if torch cannot compute on a device here."""
    try:
        x = torch.ones(2, 2, device=name)
        (x @ x).tolist()                # waits for the device, so that its error comes here
    except Exception as error:          # its type depends on the device
        why = brief(error)[:200]        # an old GPU is there, but this torch may have no kernels for it
        if name.startswith("cuda") and not torch.cuda.is_available():
            why = "torch finds no GPU here"
        raise UserError(f"--device {name:.40}: {why}; pass --device cpu") from None


# --- Signals ------------------------------------------------------------------------------------------------
# Ctrl-C, what clusters and containers send before they kill, a terminal that closes (not on Windows).
SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]


class Stopped(KeyboardInterrupt):
    """A signal asks the program to end. .exit_code is what a shell expects then: 130 for Ctrl-C, 143 for
    SIGTERM."""

    def __init__(self, number: int):
        super().__init__(f"stopped by {signal.Signals(number).name}")
        self.exit_code = 128 + number


def stop(number: int, frame=None):
    """The first signal raises Stopped; the second ends the program at once."""
    for each in SIGNALS:
        if signal.getsignal(each) is stop:
            signal.signal(each, signal.SIG_DFL)
    raise Stopped(number)


def stop_on_signals():
    """Let SIGNALS raise Stopped. What was ignored when the program began (a script's `&`, nohup) stays so."""
    for number in SIGNALS:
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, stop)


@contextmanager
def uninterrupted():
    """Hold a signal back until the block is done, so that no half step is saved; a second ends at once."""
    caught = []

    def hold(number: int, frame):
        if caught:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
        caught.append(number)

    before = {}
    for number in SIGNALS:
        if signal.getsignal(number) not in (signal.SIG_IGN, signal.SIG_DFL):
            before[number] = signal.signal(number, hold)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if caught:
        stop(caught[0])


# --- Folders ------------------------------------------------------------------------------------------------
@contextmanager
def locked(folder: Path):
    """Only one process at a time works in a run's folder. The lock goes with the process, however it ends.

    Raises UserError if another process has it. Where the file system cannot lock (Lustre, some NFS), the run
    goes on, with a note.
    """
    folder.mkdir(parents=True, exist_ok=True)
    # Neither is a link followed nor a file emptied: the folder may be a stranger's.
    flags = os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0)
    with open(os.open(folder / ".lock", flags, 0o644), "rb") as file:
        try:
            if fcntl:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"{folder}: another process trains here; wait or choose another --out") from None
        except OSError as error:
            print(f"{folder}: cannot be locked ({error.strerror}); start no second process in it",
                  file=sys.stderr)
        yield
