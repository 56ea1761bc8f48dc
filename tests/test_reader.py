"""The safe pickle reader: plain data reads as pickle.load reads it, and nothing else gets past the door."""
import functools
import json
import mmap
import operator
import os
import pickle
import random
import subprocess
import tracemalloc
from collections import OrderedDict
from contextlib import contextmanager
from fractions import Fraction
from struct import pack

import numpy as np
import pytest
import torch

from conftest import need_shared
from support.files import DataError
from support.pickles import read_pickle

PROTOCOLS = (2, 3, 4, 5)
DTYPES = "b1 i1 u1 <i2 >i2 <u4 >i8 <u8 <f2 >f2 <f4 >f4 <f8 >f8 <U3 >U5 S4".split()


def write(path, raw):
    path.write_bytes(raw)
    return path


def check(path, data, protocol):
    """Reads `data` as pickle wrote it, compares with pickle's own reading, and returns ours."""
    raw = pickle.dumps(data, protocol)
    ours = read_pickle(write(path, raw))
    same(ours, pickle.loads(raw))
    return ours


def same(ours, theirs):
    """Equal in kind, value, shape and dtype, except that the file's byte order stays, numpy scalars become Python's,
    arrays of objects lists, and long bytes views of the file."""
    if isinstance(theirs, np.ndarray) and theirs.dtype == object:
        theirs = theirs.tolist()
    if isinstance(theirs, np.ndarray):
        assert type(ours) is np.ndarray and ours.shape == theirs.shape and not ours.flags.writeable
        assert ours.dtype.newbyteorder("=") == theirs.dtype.newbyteorder("=")
        assert np.array_equal(ours, theirs)
    elif isinstance(theirs, dict):
        assert type(ours) is dict and list(ours) == list(theirs)
        for key in theirs:
            same(ours[key], theirs[key])
    elif isinstance(theirs, (list, tuple)):
        assert type(ours) is type(theirs)
        for one, other in zip(ours, theirs, strict=True):
            same(one, other)
    else:
        theirs = theirs.item() if isinstance(theirs, np.generic) else theirs
        kinds = (bytes, memoryview) if type(theirs) in (bytes, bytearray) else (type(theirs),)
        assert ours == theirs and type(ours) in kinds


def rows(n=3):
    """The published shape of the classification sets."""
    rng = np.random.default_rng(n)
    return [{"label": "joy", "features": {
        "text": f"row {i}, 你好", "audio": rng.normal(size=(i + 1, 4)).astype("f4"), "video": rng.normal(size=(2, 3)),
        "audio_len": i + 1, "video_len": np.int64(2)}} for i in range(n)]


def splits(text, lengths):
    """The published shape of the regression sets, with texts and lengths in the caller's containers."""
    rng = np.random.default_rng(0)
    return {split: {
        "raw_text": text(["a", "b é", "", "你好"]), "id": text(["v$_$0", "v$_$1", "v$_$2", "v$_$3"]),
        "audio": rng.normal(size=(4, 5, 2)).astype("f4"), "vision": rng.normal(size=(4, 3, 2)),
        "audio_lengths": lengths([5, 1, 2, 3]), "regression_labels": rng.normal(size=4).astype("f4"),
    } for split in ("train", "valid", "test")}


def objects(items):
    """A list as an array of objects, whatever they are."""
    array = np.empty(len(items), object)
    for i, item in enumerate(items):
        array[i] = item
    return array


# ---------------------------------------------------------------------------------------------------------------------
# What must be read

@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_arrays_of_every_dtype_and_order(tmp_path, protocol):
    for code in DTYPES:
        a = (np.random.default_rng(1).integers(0, 1000, (2, 3, 4)) / 7).astype(code)
        ours = check(tmp_path / "a.pkl", {
            "c": a, "fortran": np.asfortranarray(a), "axes": a.transpose(1, 2, 0), "swapped": a.transpose(1, 0, 2),
            "strided": a[:, ::2, ::-1], "row": a[0, 0], "point": a[0, 0, 0, ...], "none": a[:0], "flat": a[:, :, :0],
            "scalar": a[1, 1, 1], "twice": [a, a]}, protocol)
        assert ours["fortran"].flags.f_contiguous and ours["c"].flags.c_contiguous
        assert ours["twice"][0] is ours["twice"][1]


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_the_published_shapes(tmp_path, protocol):
    path = tmp_path / "a.pkl"
    check(path, rows(), protocol)
    containers = (list, tuple, np.array, objects)
    for text in containers:
        for lengths in (*containers, lambda x: np.array(x, ">i4"), lambda x: [np.int32(i) for i in x]):
            check(path, splits(text, lengths), protocol)
    grid = np.array([["a", None], ["ü", 3]], dtype=object)
    check(path, [grid, np.asfortranarray(grid), grid[:0], grid[0, 0]], protocol)
    check(path, [objects([np.eye(2), np.eye(2)]), objects([np.ones(1), [np.ones(2)], objects(["a"])])], protocol)


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_scalars_and_containers(tmp_path, protocol):
    integers = [0, 255, 256, 65535, 65536, -1, -2**31, 2**31, 2**63 - 1, -2**63, 2**64, -2**2000]
    text = ["", "é", "x" * 300, "你" * 70_000, b"", b"\xff\x00", b"y" * 300, bytes(range(256)) * 300]
    numpy = [np.float32(0.1), np.bool_(True), np.str_("né" * 60), np.bytes_(b"ab"), np.float16(0.5), np.uint64(2**63)]
    tuples = [(), (1,), (1, 2), (1, 2, 3), (1, 2, 3, 4)]
    check(tmp_path / "a.pkl", [None, True, False, 0.0, -1.5e300, float("inf"), integers, text, numpy, tuples, [], {},
                               {"a": {}}, {str(i): i for i in range(2500)}, list(range(2500))], protocol)
    one = {"x": np.arange(3)}
    ours = check(tmp_path / "a.pkl", {"train": one, "valid": one, "test": one}, protocol)
    assert ours["train"] is ours["test"]


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("core", ["numpy.core", "numpy._core"])
def test_module_names_of_numpy_1_and_2(tmp_path, protocol, core):
    data = [rows(), np.float32(1.5), np.asfortranarray(np.eye(3)), np.array(["a"], object)]
    raw = pickle.dumps(data, protocol)
    for here in ("numpy.core", "numpy._core"):
        for part in ("multiarray", "numeric"):
            old, new = f"{here}.{part}".encode(), f"{core}.{part}".encode()
            if protocol >= 4:  # a name is a text with its length; before, a line
                old, new = bytes([len(old)]) + old, bytes([len(new)]) + new
            raw = raw.replace(old, new)
    assert (b"numpy._core" in raw) == (core == "numpy._core") and (b"numpy.core" in raw) == (core == "numpy.core")
    same(read_pickle(write(tmp_path / "a.pkl", raw)), data)


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_a_pickler_that_keeps_no_memo(tmp_path, protocol):
    with open(tmp_path / "a.pkl", "wb") as file:
        pickler = pickle.Pickler(file, protocol)
        pickler.fast = True
        pickler.dump(rows())
    same(read_pickle(tmp_path / "a.pkl"), rows())


def test_what_other_writers_do(tmp_path):
    """A memo slot of any number; the two flags of a dtype as 0 and 1, as numpy before 1.20 wrote them."""
    raw = b"\x80\x02]r\xff\xff\xff\x7fj\xff\xff\xff\x7f\x86."  # a list into slot 2**31 - 1, a tuple of both
    assert read_pickle(write(tmp_path / "a.pkl", raw)) == ([], [])
    raw = pickle.dumps(np.arange(3.0), 3).replace(b"\x89\x88\x87", b"K\x00K\x01\x87")
    assert b"K\x00K\x01\x87" in raw
    same(read_pickle(write(tmp_path / "a.pkl", raw)), np.arange(3.0))


def home(array):
    """What holds an array's values."""
    while isinstance(array, np.ndarray):
        array = array.base
    return array.obj if isinstance(array, memoryview) else array


@pytest.mark.parametrize("protocol", (3, 4, 5))
def test_large_arrays_are_views_of_the_file(tmp_path, protocol):
    ours = check(tmp_path / "a.pkl", {"audio": np.ones(1 << 16, "f4")}, protocol)["audio"]
    assert isinstance(home(ours), mmap.mmap)


@pytest.mark.parametrize("code", [b"\x8e", b"\x96"])
def test_a_large_file_is_not_read_into_memory(tmp_path, code):
    """1 GiB of bytes, or of a bytearray, as protocol 5 writes arrays that may be changed."""
    size = 1 << 30
    before = b"}" + text("audio") + blank() + b"(" + num(1) + tup(num(2, size // 8)) + dtype("f4") + b"\x89"
    with open(tmp_path / "a.pkl", "wb") as file:
        file.write(b"\x80\x05" + before + code + pack("<Q", size))
        file.seek(size, os.SEEK_CUR)  # a hole, which takes no room on the disk
        file.write(b"tbs.")
    tracemalloc.start()
    ours = read_pickle(tmp_path / "a.pkl")["audio"]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert ours.shape == (2, size // 8) and isinstance(home(ours), mmap.mmap) and peak < 1 << 20


def test_real_files():
    pytest.importorskip("numpy._core")          # they were written by numpy 2, and pickle itself needs that
    for path in sorted(need_shared("data", "MELD").glob("*.pkl")):
        same(read_pickle(path), pickle.loads(path.read_bytes()))


# ---------------------------------------------------------------------------------------------------------------------
# What must be refused. First an assembler for pickles that pickle itself would not write.

def text(s):
    return b"X" + pack("<I", len(s.encode())) + s.encode()


def num(*values):
    return b"".join(b"\x8a\x08" + pack("<q", value) for value in values)


def data(raw):
    return b"B" + pack("<I", len(raw)) + raw


def name(module, attribute):
    return f"c{module}\n{attribute}\n".encode()


def tup(*parts):
    return b"(" + b"".join(parts) + b"t"


def call(function, *args):
    return function + tup(*args) + b"R"


def dtype(code, order="<", fields=b"NNN"):
    state = tup(b"K\x03", text(order), fields, num(-1, -1, 0))
    return call(name("numpy", "dtype"), text(code), b"\x89\x88") + state + b"b"


def blank(shape=tup(num(0)), kind=name("numpy", "ndarray")):
    return call(name("numpy.core.multiarray", "_reconstruct"), kind, shape, b"C\x01b")


def array(shape, kind, content):
    return blank() + tup(num(1), shape, kind, b"\x89", content) + b"b"


def frombuffer(*args):
    return call(name("numpy.core.numeric", "_frombuffer"), *args)


F8, ONE, BOOL, OBJECT = dtype("f8"), data(bytes(8)), dtype("b1", "|"), dtype("O8", "|")
SCALAR, ENCODE = name("numpy.core.multiarray", "scalar"), name("_codecs", "encode")
OFFSET = b"N" + tup(text("a")) + b"}" + text("a") + tup(OBJECT, num(-8)) + b"s"  # fields: an object at offset -8
MILLION = 1_000_000

PROGRAMS = [  # what it is, its instructions between the header and the stop, a part of the message
    ("torch", call(name("torch._utils", "_rebuild_tensor_v2")), "names 'torch._utils._rebuild_tensor_v2', which"),
    ("pandas", name("pandas.core.frame", "DataFrame") + b")\x81", "instruction NEWOBJ ['pandas.core.frame.DataFrame']"),
    ("dotted name", call(text("numpy") + text("core.multiarray._save") + b"\x93"), "names 'numpy.core.multiarray._sa"),
    ("dotted class", call(text("numpy") + text("ndarray.__class__") + b"\x93"), "names 'numpy.ndarray.__class__'"),
    ("terminal codes", call(text("\x1b[2J") + text("\n") + b"\x93"), r"names '\x1b[2J.\n', which"),
    ("name of lists", b"]]\x93", "TypeError"),
    ("name too deep to hash", text("numpy") + b")" + b"\x85" * 100_000 + b"\x93", "TypeError"),
    ("endless name", b"c" + b"a" * 9999, "ValueError"),
    ("persistent id", b"NQ", "BINPERSID"), ("extension", b"\x82\x01", "EXT1"), ("inst", b"(ios\nsystem\n", "INST"),
    ("obj", b"(" + name("numpy", "ndarray") + b"o", "IndexError"),
    ("newobj", name("numpy", "ndarray") + b")\x81", "NEWOBJ ['numpy.ndarray']"),
    ("newobj_ex", name("numpy", "ndarray") + b")}\x92", "NEWOBJ_EX"), ("buffer elsewhere", b"\x97", "NEXT_BUFFER"),
    ("integer as text", b"I" + b"9" * MILLION + b"\n", "INT"), ("long as text", b"L" + b"9" * MILLION + b"L\n", "LONG"),
    ("integer of 2 GiB", b"\x8b\xff\xff\xff\x7f", "LONG4"), ("unicode as text", b"Va\n", "UNICODE"),
    ("call an array", call(name("numpy", "ndarray"), tup(num(2**40))), "names 'numpy.ndarray', which"),
    ("call a text", call(text("numpy.dtype"), text("f8"), b"\x89\x88"), "AttributeError"),
    ("call with a buffer", ENCODE + data(bytes(2)) + b"R", "names '_codecs.encode', which"),
    ("bare name", name("numpy", "ndarray"), "in the place of data"), ("bare dtype", F8, "in the place of data"),
    ("bare function", b"]" + name("numpy", "dtype") + b"a", "in the place of data"),
    ("half a dtype", F8[:F8.index(b"R") + 1], "in the place of data"),
    ("half an array", blank(), "in the place of data"),
    ("half an array in a list", b"]" + blank() + b"q\x00a" + b"h\x00" + tup(num(1), tup(num(1)), F8, b"\x89", ONE)
     + b"b0", "POP"),
    ("dtype with an offset", dtype("V8", "|", OFFSET), "names 'V8', which"),
    ("dtype of dates", dtype("M8[s]"), "names 'M8[s]', which"),
    ("plain dtype with an offset", dtype("f8", "|", OFFSET), "names 'f8', which"),
    ("plain dtype with a subarray", dtype("f8", "|", tup(F8, tup(num(2**40))) + b"NN"), "names 'f8', which"),
    ("dtype of long text", dtype("U999999999"), "names 'U999999999', which"),
    ("dtype of no text", dtype("U0"), "names 'U0', which"), ("dtype's order", dtype("f8", "S"), "names 'f8', which"),
    ("2 GiB by _reconstruct", blank(tup(num(2**31))), "_reconstruct', which"),
    ("another class by _reconstruct", blank(kind=name("numpy", "dtype")), "_reconstruct', which"),
    ("shape of 16 GiB", array(tup(num(2**31)), F8, ONE), "cannot reshape array of size 1 into shape (2147483648,)"),
    ("shape too short", array(tup(num(0)), F8, ONE), "cannot reshape array of size 1 into shape (0,)"),
    ("half a number", array(tup(num(1)), F8, data(bytes(9))), "multiple of element size"),
    ("shape that overflows", array(tup(num(2**62, 4)), F8, ONE), "cannot reshape"),
    ("shape that overflows at zero", array(tup(num(0, 2**62, 2**62)), F8, data(b"")), "ValueError"),
    ("shape below zero", array(tup(num(-1, -1)), F8, ONE), "ValueError"),
    ("shape of text", array(text("a"), F8, ONE), "TypeError"),
    ("shape of floats", array(tup(b"G" + pack(">d", 1)), F8, ONE), "TypeError"),
    ("shape of many", array(tup(num(2**62) * 10_000), F8, ONE), "ValueError"),
    ("array of text", array(tup(num(8)), BOOL, text("a" * 8)), "TypeError"),
    ("array of a number as dtype", array(tup(num(1)), num(8), ONE), "AttributeError"),
    ("array of half a dtype", array(tup(num(1)), F8[:F8.index(b"R") + 1], ONE), "AttributeError"),
    ("objects too few", array(tup(num(2)), OBJECT, b"]Na"), "cannot reshape"),
    ("text beyond unicode", array(tup(num(1)), dtype("U2"), data(b"\xff" * 8)), "UnicodeDecodeError"),
    ("half a pair in an array", array(tup(num(1)), dtype("U1"), data(b"\0\xd8\0\0")), "UnicodeDecodeError"),
    ("half a pair", b"X\x03\0\0\0\xed\xa0\x80", "UnicodeDecodeError"),
    ("axes unknown", frombuffer(ONE, F8, tup(num(1)), text("K"), tup(num(7))), "Error"),
    ("scalar too short", call(SCALAR, F8, b"C\x01a"), "multiple of element size"),
    ("another codec", call(ENCODE, text("a"), text("rot13")), "names '_codecs.encode', which"),
    ("bytes beyond latin1", call(ENCODE, text("你"), text("latin1")), "UnicodeEncodeError"),
    ("keys that are numbers", b"}K\x01Ns", "keys"), ("keys that are lists", b"}]Ns", "keys"),
    ("key without value", b"}(" + text("a") + b"u", "ValueError"), ("append to a dict", b"}Na", "AttributeError"),
    ("set in a list", b"]" + text("a") + b"Ns", "AttributeError"), ("state of a list", b"])b", "AttributeError"),
    ("nothing", b"", "ValueError"), ("two objects", b"NN", "ValueError"),
    ("two pickles", b"N.\x80\x02N", "more follows"),
    ("empty stack", b"a", "IndexError"), ("no mark", b"]e", "IndexError"), ("below the mark", b"]N(ae", "IndexError"),
    ("a mark left", b"](Na", "IndexError"), ("a mark at the end", b"N(", "ValueError"),
    ("empty memo", b"j\xff\xff\xff\x7f", "KeyError"), ("not utf-8", b"X\x01\x00\x00\x00\xff", "UnicodeDecodeError"),
    ("4 GiB in 12 bytes", b"\x8e" + pack("<Q", 2**32), "out of range"),
    ("text of 4 GiB", b"X\xff\xff\xff\xffa", "out of range"),
    ("text of 2**64", b"\x8d" + b"\xff" * 8, "Error"), ("bytearray of 2**64", b"\x96" + b"\xff" * 8, "Error"),
    # Bombs: small files that would be large, slow or deep in memory.
    ("tuple cheaply deep", b")" + b"\x85" * 100_000, "deep"),
    ("list cheaply deep", b"]" * 10_000 + b"a" * 9_999, "deep"),
    ("list deep by the memo", b"](]q\x00" + b"]h\x00aq\x00" * 5_000 + b"e", "deep"),
    ("dict deep by the memo", b"](]q\x00" + (b"}" + text("a") + b"h\x00sq\x00") * 5_000 + b"e", "deep"),
    ("list in itself", b"]q\x00h\x00a", "deep"), ("dict in itself", b"}q\x00" + text("a") + b"h\x00s", "deep"),
    ("marks", b"(" * 250_000, "far more memory"), ("memo entries", b"N" + b"\x94" * 250_000, "far more memory"),
    ("list of lists", pickle.dumps(functools.reduce(lambda part, _: [part] * 10, range(7), []), 4)[2:-1],
     "far more memory"),
    ("a list copied into arrays", b"](](" + b"N" * 50_000 + b"eq\x00"
     + array(tup(num(50_000)), OBJECT, b"h\x00") * 4000 + b"e", "far more memory"),
    ("a text copied into bytes", b"](" + text("a" * MILLION) + b"q\x00"
     + call(ENCODE, b"h\x00", text("latin1")) * 1000 + b"e", "far more memory"),
    ("a tuple for many calls", b"](" + tup(text("f8") + b"N" * 100_000) + b"q\x00" + name("numpy", "dtype") + b"q\x01"
     + b"h\x01h\x00R" * 10_000 + b"e", "names 'numpy.dtype', which"),
    ("a buffer for many arrays", b"](" + data(bytes(MILLION)) + b"q\x00"
     + array(tup(num(MILLION)), BOOL, b"h\x00") * 1000 + b"e", "far more memory"),
    ("rows of nothing", array(tup(num(10**10, 0)), F8, data(b"")), "far more memory"),
    ("rows of nothing, turned", frombuffer(data(b""), F8, tup(num(0, 10**10)), text("C"), tup(num(1, 0))),
     "far more memory"),
    ("a text in many names", b"](" + text("a" * MILLION) + b"q\x00" + b"h\x00h\x00\x93" * 1000 + b"e",
     "far more memory"),
    ("one of bytes for many rows", b"](" + data(b"a" * MILLION) + b"q\x00" + b"h\x00" * 1000 + b"e", "far more memory"),
    ("one text array for many rows", b"](" + array(tup(num(1)), dtype("U250000"), data(bytes(MILLION))) + b"q\x00"
     + b"h\x00" * 1000 + b"e", "far more memory"),
    ("one array for too many rows", b"](" + array(tup(num(MILLION)), BOOL, data(bytes(MILLION))) + b"q\x00"
     + b"h\x00" * 10_000 + b"e", "far more memory"),
    ("views of nothing", b"](" + data(b"") * 130_000 + b"e", "far more memory"),
]
FILES = [  # what is no pickle at all
    ("zero bytes", b"", "empty"), ("a word", b"hello\n", "protocol 2 to 5"),
    ("git-lfs pointer", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", "git lfs pull"),
    ("web page", b"\n<!DOCTYPE html><html><body>404</body></html>", "a web page"),
    ("half a header", b"\x80", "protocol 2 to 5"),
    ("protocol 1", b"\x80\x01N.", "protocol 2 to 5"), ("protocol 6", b"\x80\x06N.", "protocol 2 to 5"),
]


class Gadget:
    """Pickles as a call, which pickle.load would make."""

    def __init__(self, function, *args):
        self.function, self.args = function, args

    def __reduce__(self):
        return self.function, self.args


def gadgets(canary):
    """Calls that touch the canary or lead to what can, in every protocol."""
    command = f"touch {canary}"
    calls = {"os.system": Gadget(os.system, command), "eval": Gadget(eval, f"open({str(canary)!r}, 'w')"),
             "numpy.load": Gadget(np.load, str(canary)), "partial": Gadget(functools.partial, os.system, command),
             "subprocess": Gadget(subprocess.call, ["touch", str(canary)]),
             "attrgetter": Gadget(operator.attrgetter, "system"), "OrderedDict": OrderedDict(a=1),
             "Fraction": Fraction(1, 2), "complex": 1j}
    for label, gadget in calls.items():
        for protocol in range(6):
            raw = pickle.dumps({"features": [gadget]}, protocol)
            yield f"{label}, protocol {protocol}", raw, "names '" if protocol > 1 else "starts with"
    yield "set", pickle.dumps({1}, 4), "EMPTY_SET"
    yield "structured array", pickle.dumps(np.zeros(2, "f4,i4"), 4), "names 'V8', which"
    yield "masked array", pickle.dumps(np.ma.zeros(2), 4), "names 'numpy.ma.core._mareconstruct'"
    yield "matrix", pickle.dumps(np.zeros((2, 2)).view(np.matrix), 4), "_reconstruct', which"


def hostile(canary):
    yield from FILES
    yield from gadgets(canary)
    for label, program, part in PROGRAMS:
        yield label, b"\x80\x04" + program + b".", part
    good = pickle.dumps(rows(), 3)  # protocol 4 would give the length away at its start
    for i in range(1, 51):
        yield f"cut at {i}/51", good[:len(good) * i // 51], "; expected"


@contextmanager
def at_most(size):
    """Lets this process take so many bytes more than it has, where that can be said (on Linux)."""
    if not os.path.exists("/proc/self/statm"):
        yield
        return
    import resource
    with open("/proc/self/statm") as file:
        now = int(file.read().split()[0]) * resource.getpagesize()
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (now + size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


def test_what_a_good_file_may_share(tmp_path):
    """One array of zeros for all rows that miss a modality; objects of a shape that holds none."""
    zeros = np.zeros((375, 35), "f4")
    shared = [{"text": f"row {i}", "audio": np.ones((2, 3)), "video": zeros} for i in range(2000)]
    same(read_pickle(write(tmp_path / "a.pkl", pickle.dumps(shared, 4))), shared)
    assert read_pickle(write(tmp_path / "a.pkl", b"\x80\x04" + array(tup(num(10**10, 0)), OBJECT, b"]") + b".")) == []


def test_hostile_files_are_refused_without_effect(tmp_path):
    canary, path, wrong = tmp_path / "canary", tmp_path / "a.pkl", []
    for label, raw, part in hostile(canary):
        write(path, raw)
        with at_most(300 << 20):
            try:
                said = f"read as {read_pickle(path)!r:.99}"
            except DataError as error:
                said = str(error)
        if not said.startswith(str(path)) or part not in said or len(said) > 500 + len(str(path)):
            wrong.append(f"{label}: {said}")
    assert not wrong, "\n".join(wrong)
    assert not canary.exists()
    pickle.loads(pickle.dumps(Gadget(os.system, f"touch {canary}")))  # the trap itself works
    assert canary.exists()


def test_what_is_not_a_file(tmp_path):
    os.mkfifo(tmp_path / "fifo")
    end = os.open(tmp_path / "fifo", os.O_RDWR)  # the other end, without which opening the FIFO would wait for ever
    for path in (tmp_path, tmp_path / "fifo", tmp_path / "no.pkl"):
        with pytest.raises(DataError, match="not a file"):
            read_pickle(path)
    os.close(end)


ADVICE = [  # what users bring, how it begins, what the message advises
    ("Python 2, protocol 0", b"(lp0\n(dp1\nS'label'\np2\nS'joy'\np3\nsa.", "Python 2 wrote it"),
    ("Python 2, protocol 1", b"]q\x00}q\x01U\x05labelq\x02U\x03joyq\x03sa.", "Python 2 wrote it"),
    ("Python 2, protocol 2", b"\x80\x02]q\x00}q\x01U\x05labelq\x02U\x03joyq\x03sa.", 'encoding="latin1"'),
    ("a tensor", pickle.dumps([torch.ones(3)]), ".numpy()"), ("torch.save", b"PK\x03\x04", ".numpy()"),
    ("a table", b"\x80\x04" + name("pandas.core.frame", "DataFrame") + b")\x81.", '.to_dict("list")'),
    ("a column", b"\x80\x04" + call(name("pandas.core.series", "Series")) + b".", '.to_dict("list")'),
    *[(f"line ends, protocol {p}", pickle.dumps(rows(), p).replace(b"\n", b"\r\n"), "binary mode") for p in PROTOCOLS],
    ("cut", pickle.dumps(rows(), 3)[:-9], "expected one whole pickle"),
]


@pytest.mark.parametrize("raw, advice", [case[1:] for case in ADVICE], ids=[case[0] for case in ADVICE])
def test_the_advice_fits_the_cause(tmp_path, raw, advice):
    with pytest.raises(DataError) as error:
        read_pickle(write(tmp_path / "a.pkl", raw))
    assert advice in str(error.value)


@pytest.mark.filterwarnings("ignore:invalid escape")  # pickletools' own, for names in damaged files
def test_mutations_of_a_good_file(tmp_path):
    """Whatever is broken, only DataError comes out, or plain data."""
    rng, path, count = random.Random(4), tmp_path / "a.pkl", 0
    content = [rows(1), {"id": np.array(["a", "b"]), "raw_text": np.array(["x"], object), "length": np.int32(1)}]
    good = [pickle.dumps(content, protocol) for protocol in PROTOCOLS]
    with open(path, "wb", buffering=0) as file:
        for i in range(1000):
            raw = bytearray(good[i % len(good)])
            for _ in range(rng.choice((1, 1, 2, 5))):
                mutate(raw, rng)
            file.truncate(0)
            file.seek(0)
            file.write(raw)
            try:
                plain(read_pickle(path))
                count += 1
            except DataError as error:
                assert str(error).startswith(str(path))
    assert 30 < count < 970, f"{count} of 1,000 still read: too gross or too gentle to test anything"


def mutate(raw, rng):
    at, other, n = rng.randrange(2, len(raw)), rng.randrange(2, len(raw)), rng.randrange(1, 20)
    opcodes = b"]}()tRbaesuhqrjXBCKJMGN.\x85\x86\x87\x8a\x8c\x8e\x93\x94\x95\x96"
    match rng.randrange(5):
        case 0:
            raw[at] ^= 1 << rng.randrange(8)
        case 1:
            del raw[at:at + n]
        case 2:
            raw[at:at] = rng.randbytes(n)
        case 3:
            raw[at:at] = raw[other:other + n]
        case 4:
            raw[at] = rng.choice(opcodes)


def plain(value):
    """Walks all that was read."""
    def leaf(x):
        assert type(x) in (bytes, memoryview, np.ndarray)
        return x.tolist() if isinstance(x, np.ndarray) else list(x)

    json.dumps(value, default=leaf)
