"""What keeps a run whole: Ctrl-C waits for the end of a step, one process at a time works in a folder, and a
device is tried before it is used."""
import signal
from contextlib import contextmanager
from pathlib import Path

import torch

from support.files import UserError

try:
    import fcntl
except ImportError:         # Windows has none: there nothing locks a run's folder
    fcntl = None


def check_device(name: str):
    """Raises UserError if torch cannot compute on a device here."""
    try:
        torch.ones(1, device=name).tolist()     # tolist waits for the device, so that its error comes here
    except Exception as error:          # its type depends on the device
        why = f"{error!s:.100}"
        if name.startswith("cuda"):
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
    """Only one process at a time works in a run's folder. The lock goes with the process, however it ends."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / ".lock", "w") as file:
        try:
            if fcntl:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise UserError(f"{folder}: another process trains here; wait or choose another --out") from None
        yield
