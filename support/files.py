"""Reading JSON and writing files such that neither a broken file nor a crash does harm."""
import json
import math
import os
import secrets
from pathlib import Path


class UserError(ValueError):
    """What whoever typed the command can mend: one sentence says what was found, expected, and what to do.
    Every other exception is a mistake in the code, and shows its traceback."""


class DataError(UserError):
    """Data that cannot be used: the file, what was found and expected, what to do."""


def brief(error: Exception) -> str:
    """What it says, on one line: it may quote the whole file that provoked it."""
    return " ".join(str(error)[:400].split())


def printable(text: str) -> str:
    """A text from a file, for a terminal, which would obey what is written in escape sequences."""
    shown = ""
    for char in text:
        if char.isprintable() or char in "\n\t":
            shown += char
        else:
            shown += char.encode("unicode_escape").decode()         # "\\x1b" in four characters
    return shown


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


def json_bytes(found, indent=None) -> bytes:
    """As a JSON file; nan and infinities, which JSON cannot write, become null."""
    text = json.dumps(only_finite(found), indent=indent, ensure_ascii=False, allow_nan=False)
    return text.encode()


def only_finite(x):
    """The same lists and dicts, with None for numbers that are not finite."""
    if isinstance(x, dict):
        return {key: only_finite(value) for key, value in x.items()}
    if isinstance(x, (list, tuple)):
        return [only_finite(value) for value in x]
    if isinstance(x, float) and not math.isfinite(x):
        return None
    return x


def write_atomic(path, data: bytes):
    """Write a file such that after a crash at any moment it is whole: the old one or the new one."""
    path = Path(path)
    # A name that nobody knows before: two processes may write the same file, a stranger may lay a link.
    draft = path.with_name(f".{path.name}.{secrets.token_hex(4)}.new")
    try:
        with open(draft, "xb") as file:         # x: never a file that is there
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
