"""Reading JSON and writing files such that neither a broken file nor a crash does harm."""
import json
import os
from pathlib import Path


class UserError(ValueError):
    """What whoever typed the command can mend: one sentence says what was found, expected, and what to do.
    Every other exception is a mistake in the code, and shows its traceback."""


class DataError(UserError):
    """Data that cannot be used: the file, what was found and expected, what to do."""


def brief(error: Exception) -> str:
    """What it says, on one line: it may quote the whole file that provoked it."""
    return " ".join(str(error)[:400].split())


def read_json(file: Path, keys=()) -> dict:
    """A JSON file of an object that has these keys. Raises UserError that names the file otherwise."""
    if not file.is_file():
        raise UserError(f"{file}: not found; fetch or make it again, or name another folder")
    try:
        found = json.loads(file.read_text(encoding="utf-8-sig"))
        json.dumps(found, ensure_ascii=False).encode()      # refuses halves of characters, "\ud800"
    except (ValueError, RecursionError) as error:
        raise UserError(f"{file}: not valid JSON ({brief(error)}); fetch or make it again") from None
    missing = keys or ["names"]
    if isinstance(found, dict):
        missing = [key for key in keys if key not in found]
    if missing:
        raise UserError(f"{file}: expected an object with {', '.join(missing)}; make it again")
    return found


def write_atomic(path, data: bytes):
    """Write a file such that after a crash at any moment it is whole: the old one or the new one."""
    path = Path(path)
    draft = path.with_name(f".{path.name}.new")
    try:
        draft.unlink(missing_ok=True)           # of a process that was killed
        with open(draft, "xb") as file:         # x: a link that stands there is not followed
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(draft, path)
    except OSError as error:
        draft.unlink(missing_ok=True)           # a full disk needs the room
        what = f"{error.strerror} while writing; what was there before is intact"
        raise OSError(error.errno, what, str(path)) from None
    try:
        folder = os.open(path.parent, os.O_RDONLY)      # the new name, too, must reach the disk
        os.fsync(folder)
        os.close(folder)
    except OSError:
        pass                                    # Windows and some shared folders cannot: it will, in time
