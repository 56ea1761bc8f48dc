"""What keeps a run whole: Ctrl-C waits for the end of a step, one process at a time works in a folder, and a
device is tried before it is used."""
import os
import signal
import sys
from contextlib import contextmanager
from pathlib import Path

import torch

from support.files import UserError, brief

try:
    import fcntl
except ImportError:         # Windows has none: there nothing locks a run's folder
    fcntl = None


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


@contextmanager
def uninterrupted():
    """Hold Ctrl-C back until the block is done, so that no half step is ever saved."""
    caught = []
    before = signal.signal(signal.SIGINT, lambda *_: caught.append(True))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
    if caught:
        raise KeyboardInterrupt


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
