"""The saved states of a run: the name of each file proves its content, and the one before it is kept."""
import hashlib
import io
from pathlib import Path

import torch

from support.files import UserError, write_atomic


def save_state(folder: Path, progress: str, state):
    """Write state-PROGRESS-SHA256.pt. `progress` must not sort in front of that of the state before."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    data = buffer.getvalue()
    seal = hashlib.sha256(data).hexdigest()
    write_atomic(folder / f"state-{progress}-{seal}.pt", data)
    for old in sorted(folder.glob("state-*"))[:-2]:
        old.unlink()


def load_state(folder: Path):
    """The newest undamaged state, on the CPU; None if there is none. Raises UserError if all are damaged."""
    files = sorted(folder.glob("state-*"), reverse=True)
    for file in files:
        data = file.read_bytes()
        if file.stem.endswith(hashlib.sha256(data).hexdigest()):
            return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
        print(f"{file}: damaged (its sha256 is not the one in its name), using the state before it")
    if files:
        raise UserError(f"{folder}: no undamaged state is left; start again with --overwrite")
    return None
