"""Reading JSON and writing files such that neither a broken file nor a crash does harm."""
import json
import os
from pathlib import Path

def read_json(file: Path, keys=()) -> dict:
    """A JSON file of an object that has these keys. Raises ValueError with the file's name for anything else."""
    if not file.is_file():
        raise ValueError(f"{file}: not found; fetch or make it again, or name another folder")
    try:
        found = json.loads(file.read_text(encoding="utf-8-sig"))
        json.dumps(found, ensure_ascii=False).encode()      # refuses halves of characters, "\ud800"
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file}: not valid JSON ({error}); fetch or make it again") from None
    missing = [key for key in keys if not isinstance(found, dict) or key not in found]
    if missing or not isinstance(found, dict):
        raise ValueError(f"{file}: expected an object with {', '.join(missing) or 'names'}; fetch or make it again")
    return found

def write_atomic(path, data: bytes):
    """Write a file such that after a crash at any moment it is whole: the old one or the new one."""
    path = Path(path)
    draft = path.with_name(f".{path.name}.new")
    try:
        with open(draft, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(draft, path)
    except OSError as error:
        draft.unlink(missing_ok=True)           # a full disk needs the room
        what = f"{error.strerror} while writing; what was there before is intact"
        raise OSError(error.errno, what, str(path)) from None
    if os.name == "posix":                      # the new name, too, must reach the disk
        folder = os.open(path.parent, os.O_RDONLY)
        os.fsync(folder)
        os.close(folder)
