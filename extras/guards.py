"""What keeps a run whole: Ctrl-C waits for the end of a step, one process at a time works in a folder, and
the settings of a run are looked at before they are used."""
import signal
from contextlib import contextmanager
from pathlib import Path

import torch

from extras.files import read_json

try:
    import fcntl
except ImportError:         # Windows has none: there nothing locks a run's folder
    fcntl = None

# What evaluation needs of a run's settings.json.
RECORDED = {"data": str, "data_dir": str | None, "llm": str | None, "official": bool, "decode": str,
            "readout": str, "eval_batch": int, "device": str, "dtype": str}
DTYPES = ("float32", "bfloat16", "float16")

def read_settings(file: Path, allowed: dict) -> dict:
    """A run's settings. allowed: {key: the values that it may have}. Raises ValueError for any others."""
    if not file.is_file():
        raise ValueError(f"{file}: not there; expected the folder of one run of train.py, OUT/SEED")
    found, allowed = read_json(file, RECORDED), {**allowed, "dtype": DTYPES}
    for key, kind in RECORDED.items():
        value = found[key]
        fits = isinstance(value, kind) and value in allowed.get(key, [value]) and len(str(value)) < 999
        if not fits or (kind is int and value < 1):
            raise ValueError(f"{file}: {key} is {value!r:.80}, which no run writes; copy the file again")
    return found

# What may change before a run goes on. Data and backbone may move: what they hold is compared.
FREE = {"data_dir", "llm", "out", "seeds", "eval_batch", "recompute", "overwrite", "download"}

def compare(file: Path, settings: dict):
    """Raises ValueError if a run was begun with other settings, weights or data."""
    before = read_json(file) if file.is_file() else settings
    for name, value in settings.items():
        if name not in FREE and before.get(name) != value:
            raise ValueError(f"{file.parent}: begun with {name} {before.get(name)!r:.60}, now {value!r:.60}; "
                             "continue as it began, choose another --out, or discard it with --overwrite")

def check_device(name: str):
    """Raises ValueError if torch cannot compute on a device here."""
    try:
        torch.ones(1, device=name).tolist()
    except Exception as error:          # its type depends on the device
        why = "torch finds no GPU here" if name.startswith("cuda") else f"{error!s:.100}"
        raise ValueError(f"--device {name:.40}: {why}; pass --device cpu") from None

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
            raise ValueError(f"{folder}: another process trains here; wait or choose another --out") from None
        yield
