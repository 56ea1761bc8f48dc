"""Reading JSON and writing files such that neither a broken file nor a crash does harm."""
import hashlib
import json
import os
import re
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import save

def brief(error: Exception) -> str:
    """What it says, on one line: it may quote the whole file that provoked it."""
    return " ".join(str(error)[:400].split())

def read_json(file: Path, keys=()) -> dict:
    """A JSON file of an object that has these keys. Raises ValueError that names the file otherwise."""
    if not file.is_file():
        raise ValueError(f"{file}: not found; fetch or make it again, or name another folder")
    try:
        found = json.loads(file.read_text(encoding="utf-8-sig"))
        json.dumps(found, ensure_ascii=False).encode()      # refuses halves of characters, "\ud800"
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file}: not valid JSON ({brief(error)}); fetch or make it again") from None
    missing = [key for key in keys if not isinstance(found, dict) or key not in found]
    if missing or not isinstance(found, dict):
        raise ValueError(f"{file}: expected an object with {', '.join(missing) or 'names'}; make it again")
    return found

def read_index(file: Path) -> dict:
    """{tensor: the file that holds it} of a checkpoint's index. Raises ValueError if they lie elsewhere."""
    homes = read_json(file).get("weight_map")
    names = homes.values() if isinstance(homes, dict) else ()
    if not names or not all(re.fullmatch(r"[\w.-]{1,200}\.(safetensors|bin)", str(name)) for name in names):
        raise ValueError(f"{file}: expected a weight_map of tensors to files here; fetch it again")
    return homes

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

def digest(tensors: dict) -> str:
    return hashlib.sha256(save(tensors)).hexdigest()

def write_tensors(path, tensors: dict, meta: dict):
    """Write a .safetensors file with `meta`, and a digest of the numbers, in its header."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    header = json.dumps(meta | {"sha256": digest(tensors)})
    write_atomic(path, save(tensors, {"mse-adapter": header}))      # one key: several have no fixed order

def read_tensors(path) -> tuple[dict, dict]:
    """The tensors and the meta of a file of write_tensors. Raises ValueError if it is none."""
    try:
        with safe_open(path, "pt") as file:
            tensors = {name: file.get_tensor(name).clone() for name in list(file.keys())}
            return tensors, dict(json.loads(file.metadata()["mse-adapter"]))
    except Exception as error:          # whatever a damaged or hostile file provokes, it was refused
        raise ValueError(f"{path}: not a saved adapter ({brief(error)}); copy it again") from None
