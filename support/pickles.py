"""Reading a pickle without running it.

A pickle is a program for a small stack machine, and pickle.load calls whatever the program names. The machine
here knows only what plain data needs and calls nothing by name, so all that a hostile or broken file can do
is be refused. Large arrays stay views of the mapped file, which take no memory until their rows are read.
"""
import mmap
import os
import pickletools
import re
from dataclasses import dataclass

import numpy as np

from support.files import DataError

ADVICE = (      # what was found, as a pattern, and what to do about it
    ("version https://git-lfs", "this only points to the data: fetch them with `git lfs pull`"),
    ("with b.<", "this is a web page: fetch the file again, the server answered with a page"),
    (r"with b.[(\]}]| \w*STRING", 'if Python 2 wrote it, load it once with encoding="latin1" where you trust '
                                  "it, and save it again with protocol=4"),
    (r"with b.PK|'torch\.", "save plain arrays, of tensors their .numpy(), with pickle.dump"),
    (r"'pandas\.", 'save tables as their .to_dict("list") or .to_numpy(), with pickle.dump'),
    ("starts with", "expected a pickle of protocol 2 to 5: fetch it again, or write it with protocol=4"),
    (r"\\r", "its line ends were changed on the way: transfer it again, in binary mode"),
    ("cannot be read", "expected one whole pickle: fetch or write it again"),
    ("", "expected dicts, lists, text, numbers, plain arrays: save yours so, do not load it otherwise"),
)
PLAIN = {str, bytes, memoryview, int, float, bool, type(None), list, tuple, dict, np.ndarray}
DTYPE = re.compile("b1|[iu][1248]|f[248]|[US][1-9][0-9]{0,6}|O8?")
CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
LENGTH = {"SHORT_BINUNICODE": 1, "BINUNICODE": 4, "BINUNICODE8": 8,
          "BINBYTES": 4, "BINBYTES8": 8, "BYTEARRAY8": 8}
OPCODES = {ord(op.code): op for op in pickletools.opcodes}


def read_pickle(path) -> object:
    """The plain data in a pickle, protocols 2 to 5, numpy 1 or 2. Raises DataError for everything else.

    Arrays are read-only views of the mapped file, perhaps unaligned or byte-swapped; of objects, lists.
    """
    data = b""
    try:
        if not os.path.isfile(path):        # a FIFO would wait for its other end
            raise OSError("missing, or not a file")
        with open(path, "rb") as file:
            data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        return PickleMachine(data).run()
    except DataError as error:
        found = str(error)
    except Exception as error:              # of any type: who knows what a broken file leads to
        found = f"cannot be read ({error!r})"
    if data.find(b"\n", 0) > 0 and not re.search(rb"(?<!\r)\n", data):
        found += r" and has \n only behind \r"
    for pattern, advice in ADVICE:          # the last fits whatever was found
        if re.search(pattern, found):
            raise DataError(f"{path} {found:.250}; {advice}")


@dataclass
class Named:
    """Stands for what the pickle names or begins to describe; once described, `made` is the real object."""
    text: str                               # a function or class, the code of a dtype, or "array"


class PickleMachine:
    """Follows the pickle's instructions. It has stacks of objects: each mark begins another one, on top.

        [1, "a"], protocol 4            the stacks after each instruction
        EMPTY_LIST                      [[]]
        MARK                            [[]]  []
        BININT1 1                       [[]]  [1]
        SHORT_BINUNICODE "a"            [[]]  [1, "a"]
        APPENDS                         [[1, "a"]]
    """

    def __init__(self, data: mmap.mmap):
        self.data = data
        self.memo = {}
        self.stacks = [[]]
        self.budget = (8 << 20) + 24 * len(data)                # bytes of memory: plain data needs less

    def spend(self, cost):
        self.budget -= cost
        if self.budget < 0:
            raise DataError("would take far more memory than its size")

    def run(self):
        """Follows the instructions to the last and returns the one object that they leave on the stack."""
        data = self.data
        if not re.match(rb"\x80[\x02-\x05]", data):
            raise DataError(f"starts with {data[:64].lstrip()[:24]!r}")
        while True:
            op = OPCODES[data.read_byte()]
            if op.name == "STOP":
                break
            if op.arg is None and op.name not in CONSTANTS:
                self.spend(64)              # what a container or memo entry takes; in the file, one byte
            self.follow(op)
        [[root]] = self.stacks              # one object, or it raises
        if data.tell() < len(data):
            raise ValueError("more follows the pickle")
        return self.check(root)

    def take(self, op) -> list:
        """The objects that an instruction takes from the stack: so many, or also all since the last mark."""
        n = len(op.stack_before)
        since_mark = []
        if pickletools.stackslice in op.stack_before:
            n -= 2                          # the mark, and what stands for all behind it
            since_mark = self.stacks.pop()
        items = [self.stacks[-1].pop() for _ in range(n)]
        return items[::-1] + since_mark

    def follow(self, op):
        """One instruction. What is not listed here is refused."""
        data, memo = self.data, self.memo
        items = self.take(op)
        push = self.stacks[-1].append
        match op.name:
            case "BINGET" | "LONG_BINGET":
                found = memo[op.arg.reader(data)]
                push(getattr(found, "made", found))
            case "MEMOIZE" | "BINPUT" | "LONG_BINPUT":
                self.stacks[-1] += items                        # what MEMOIZE took
                slot = op.arg.reader(data) if op.arg else len(memo)
                memo[slot] = self.stacks[-1][-1]
            case "MARK":
                self.stacks.append([])
            case name if name in LENGTH:
                n = int.from_bytes(data.read(LENGTH[name]), "little")
                data.seek(n, os.SEEK_CUR)                       # raises beyond the end
                raw = memoryview(data)[data.tell() - n:data.tell()]
                if "UNICODE" not in name:
                    self.spend(200)                             # the view itself
                push(str(raw, "utf-8") if "UNICODE" in name else raw)
            case "BININT" | "BININT1" | "BININT2" | "LONG1" | "BINFLOAT" | "SHORT_BINBYTES":
                push(op.arg.reader(data))
            case "NONE" | "NEWTRUE" | "NEWFALSE":
                push(CONSTANTS[op.name])
            case "EMPTY_LIST" | "EMPTY_DICT" | "EMPTY_TUPLE" | "TUPLE1" | "TUPLE2" | "TUPLE3" | "TUPLE":
                push(op.stack_after[0].obtype(items))           # list, dict or tuple
            case "APPEND" | "APPENDS":
                push(items[0])
                items[0].extend(items[1:])
            case "SETITEM" | "SETITEMS":
                if not {str}.issuperset(map(type, items[1::2])):        # others could be chosen to collide
                    raise DataError("has a dict whose keys are not all text")
                push(items[0])
                items[0].update(zip(items[1::2], items[2::2], strict=True))
            case "GLOBAL":
                push(Named(op.arg.reader(data).replace(" ", ".")))
            case "STACK_GLOBAL":
                self.spend(len(items[0]) + len(items[1]))
                push(Named(".".join(items)))
            case "REDUCE" | "BUILD":
                push(self.make(*items))
            case "PROTO" | "FRAME":         # of use only to readers of streams
                op.arg.reader(data)
            case _:
                names = [x.text for x in items if type(x) is Named]
                raise DataError(f"has the instruction {op.name} {ascii(names)}")

    def make(self, named, args):
        """What numpy would make of a call or of a description, but for one of "2 GiB" that has 8 bytes."""
        match named.text.replace("numpy._core.", "numpy.core."), args:      # numpy 2 and 1
            case "numpy.core.multiarray._reconstruct", (Named("numpy.ndarray"), (0,), _):
                return Named("array")
            case "array", (_, shape, dtype, fortran, raw):
                named.made = self.array(raw, dtype, shape, fortran)
                return named.made
            case "numpy.core.numeric._frombuffer", (raw, dtype, shape, order, *axes):
                return self.array(raw, dtype, shape, order == "F", *axes)
            case "numpy.core.multiarray.scalar", (dtype, raw):
                return self.array(raw, dtype, (), False).item()
            case "numpy.dtype", (str(code), _, _):
                return Named(code)
            case code, (3, "<" | ">" | "|" as order, None, None, None, _, _, _) if DTYPE.fullmatch(code):
                named.made = np.dtype(code).newbyteorder(order)
                return named.made
            case "_codecs.encode", (str(text), "latin1"):       # how protocol 2 writes bytes
                self.spend(len(text))
                return text.encode("latin1")
            case "__builtin__.bytes", ():
                return b""
        raise DataError(f"names {ascii(named.text)}, which is not plain data")

    def array(self, raw, dtype, shape, fortran, axes=None):
        self.spend(8 * len(raw))
        if dtype.hasobject:     # a list in C order, whatever the array's order
            if not raw:         # of whatever shape: (10**10, 0) would be very many lists
                return []
            return np.fromiter(raw, dtype, len(raw)).reshape(shape).tolist()
        if dtype.kind == "U":   # raises if it is no text
            str(raw, "utf-32-be" if dtype.str[0] == ">" else "utf-32-le")
        array = np.frombuffer(raw, dtype).reshape(shape, order="F" if fortran else "C")
        if axes is not None:
            array = array.transpose(axes)
        if array.size == 0:     # (10**10, 0) has no bytes, but rows
            self.spend(128 * len(array))
        return array

    def check(self, x, depth=16):
        """Nothing unfinished or cyclic is left, nor parts shared so often that a walk would not end."""
        self.spend(16)
        if type(x) not in PLAIN:
            raise DataError("has a name or half an array in the place of data")
        if depth == 0:
            raise DataError("has containers more than 16 deep")
        parts = ()
        if type(x) in (bytes, memoryview):
            self.spend(len(x))              # whoever reads it as text makes a copy
        elif type(x) is np.ndarray and x.dtype.kind in "SU":
            self.spend(x.nbytes)
        elif type(x) is np.ndarray:
            self.spend(x.nbytes // 32)      # one array of zeros may stand for all that is missing
        elif type(x) is dict:
            parts = x.values()              # its keys are text
        elif type(x) in (list, tuple):
            parts = x
        for part in parts:
            self.check(part, depth - 1)
        return x


def scalar(x):
    """A number or text in the forms that writers give it, as Python's own: np.array([3.0]) -> 3, b"a" -> "a".
    Anything else comes back as it is."""
    if isinstance(x, (np.ndarray, np.generic)) and x.size == 1:
        x = x.item()
    if isinstance(x, float) and x.is_integer():
        return int(x)
    if isinstance(x, (bytes, memoryview)):
        return str(x, "utf-8", "replace")
    return x
