"""What keeps a run whole: Ctrl-C waits for the end of a step, and one process at a time works in a folder."""
import signal
from contextlib import contextmanager
from pathlib import Path

try:
    import fcntl
except ImportError:         # Windows has none: there nothing locks a run's folder
    fcntl = None

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
