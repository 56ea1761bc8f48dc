"""The saved states of a run: the name of each file proves its content, and the one before it is kept."""
import hashlib
import io
import re
from pathlib import Path

import torch

from support.files import UserError, printable, write_atomic

NAME = r"state-\d+-\d+-[0-9a-f]*\.pt"         # state-EPOCH-STEP-SHA256.pt


def states(folder: Path) -> list:
    """The files of states in a folder, the newest last."""
    return sorted(file for file in folder.glob("state-*") if re.fullmatch(NAME, file.name) and file.is_file())


def save_state(folder: Path, epoch: int, step: int, state):
    """Write a state. Neither epoch nor, in one epoch, step must be before those of the state before."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    data = buffer.getvalue()
    seal = hashlib.sha256(data).hexdigest()
    write_atomic(folder / f"state-{epoch:04d}-{step:06d}-{seal}.pt", data)
    for old in states(folder)[:-2]:
        old.unlink()


def load_state(folder: Path):
    """The newest undamaged state, on the CPU; None if there is none. Raises UserError if all are damaged."""
    files = states(folder)
    for file in reversed(files):
        data = file.read_bytes()
        if file.stem.endswith(hashlib.sha256(data).hexdigest()):
            return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
        problem = "damaged (its sha256 is not the one in its name), using the state before it"
        print(printable(f"{file}: {problem}"))
    if files:
        raise UserError(f"{folder}: no undamaged state is left; start again with --overwrite")
    return None
