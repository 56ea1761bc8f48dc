"""Tokenizers against the libraries that define them: sentencepiece, tiktoken (Qwen), tokenizers (tokenizer.json)."""
import base64
import json
import os
import random
import unicodedata
from functools import cache
from pathlib import Path

import pytest
import sentencepiece
import tiktoken
import tokenizers
from conftest import need_shared, need_smollm2
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from support.pickles import read_pickle
from support.files import DataError
from support.tokenizers import CHATGLM3_SPECIALS, QWEN_SPECIALS, SPELL, ByteBPE, load_tokenizer, special_names

# As published; GPT-2's stands in `tokenizers` itself, as ByteLevel's own
QWEN2 = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
         r"|\s*[\r\n]+|\s+(?!\S)|\s+")
LLAMA3 = QWEN2.replace(r"\p{N}| ?", r"\p{N}{1,3}| ?")
QWEN35 = QWEN2.replace(r"?\p{L}+", r"?[\p{L}\p{M}]+").replace(r"\s\p{L}\p{N}", r"\s\p{L}\p{M}\p{N}")
MINICPM5 = QWEN2.replace(r"\p{N}| ?", r"\p{N}+| ?")
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
NEMO = (r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
        r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
        r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+")
EDGES = [
    *("", " ", "  ", "\n", " \n ", "\r\n\r\n", "a  \n\n  b", "x   ", "   x", "\t\tx", " !\n a", "_a_b __c", "a   1  2"),
    *("!!!\n\n???\r\n", "I'LL we've It'S 'tis don't'd o'", "'ſ it'ſ", "'K 'ﬅ", "12345 ½²Ⅻ٣一", "ß ẞ ı İ ŉ"),
    *("\x1c\x1d a\x1e\x1fb", "\x85\x85a\xa0\xa0b\u2003\u3000c\u200b\u180ed", "\0a\0", "中文，标点。\n  下一行"),
    *("\ud7ff\ue000\U0010ffff\ufeff\ufdd0", "e\u0301 é Å ﬁ 가각", "a\u0300\u0301b", "👩‍👩‍👧‍👦🏳️‍🌈"),
    *("fooBarBAZ ABCdef ÀÉîÖ ΑΒγδ ſS Sſs ǅa aǅ ªA 中A文b", "https://a/b//\n/c ?/!\r\n/"),
    *("a\x04b\x16", "\U00050000\U00090000x", "a" * 700, " " * 700),
    *("ab" * 400 + "!" * 600, "\n" * 300 + " " * 300 + "x"),
]


@cache
def random_strings(count: int, seed: int = 0) -> list[str]:
    """Strings of runs of one kind each; only characters that this Python's Unicode version assigns."""
    rng = random.Random(seed)
    spans = [(32, 127), (97, 123), (0xA0, 0x250), (0x300, 0x370), (0x370, 0x530), (0x600, 0x6FF), (0x900, 0xE00)]
    spans += [(0x1100, 0x1200), (0xAC00, 0xD7A4), (0x3000, 0x3040), (0x4E00, 0x9FFF), (0x1F300, 0x1F650)]
    spans += [(0x2000, 0x2070), (0x2150, 0x2190), (0, 0x20), (0x7F, 0xA0), (0, 0x30000)]
    pools = [[c for c in map(chr, range(*span)) if unicodedata.category(c) not in ("Cn", "Cs")] for span in spans]
    pools += map(list, (" ", " \t", "\n\r", " \n\r\t", "0123456789", "'"))
    pools += [["'s", "'LL", "'ve", "'ſ"], ["the ", "Hello", " world", "ing", "你好", "，"]]
    pools += [["👩‍👩‍👧", "🇨🇳", "e\u0301", "\u1100\u1161"]]

    def run() -> str:
        return "".join(rng.choices(rng.choice(pools), k=rng.choice((1, 1, 2, 3, 5, 12))))

    return ["".join(run() for _ in range(rng.randint(1, 8))) for _ in range(count)]


@cache
def meld_texts() -> list[str]:
    rows = read_pickle(need_shared("data/MELD/meld_train.pkl"))
    return [row["features"]["text"] for row in rows[:5000]]


def composed(texts) -> list[str]:
    """In NFC: `tokenizers` has tables of an older Unicode, which do not reorder later marks such as U+09FE."""
    return [unicodedata.normalize("NFC", text) for text in texts]


def spelled(byte: int) -> str:
    return chr(byte).translate(SPELL)


BYTES = {spelled(byte): byte for byte in range(256)}

# ---------------------------------------------------------------------------------------------------------------------
# Byte-level BPE on toy vocabularies


def split(*patterns):
    steps = [pre_tokenizers.Split(tokenizers.Regex(pattern), "isolated", invert=False) for pattern in patterns]
    return [*steps, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]


KINDS = {   # name: (normalizer, pre_tokenizers)
    "qwen2": (normalizers.NFC(), split(QWEN2)),
    "llama3": (None, split(LLAMA3)),
    "qwen3.5": (normalizers.NFC(), split(QWEN35)),
    "minicpm5": (None, split(r"\p{N}{1,3}", MINICPM5)),
    "nemo": (None, split(NEMO)),
    "gpt2": (None, [pre_tokenizers.ByteLevel(add_prefix_space=False)]),
    "smollm2": (None, [pre_tokenizers.Digits(True), pre_tokenizers.ByteLevel(add_prefix_space=False)]),
}


@cache
def toy(kind: str) -> dict:
    """tokenizer.json of a toy of this kind, as `tokenizers` writes it, with what published ones have of oddities."""
    normalizer, steps = KINDS[kind]
    specials = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    reference = tokenizers.Tokenizer(models.BPE())
    if normalizer:
        reference.normalizer = normalizer
    reference.pre_tokenizer = pre_tokenizers.Sequence(steps) if len(steps) > 1 else steps[0]
    reference.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=900, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False,
        special_tokens=specials[:1] if kind == "qwen2" else specials)       # in the vocabulary itself
    reference.train_from_iterator([*random_strings(300, seed=1), *EDGES, *[__doc__] * 20], trainer)
    reference.add_special_tokens(specials)
    data = json.loads(reference.to_str())
    model = data["model"]
    if kind == "llama3":
        model["ignore_merges"] = True
        model["vocab"] |= {"Ġtoken": 1000, "zers": 1001, "Ġ123": 1002}      # words that no merges make
    if kind == "smollm2":
        made = {char for pair in model["merges"] for char in "".join(pair)}
        for byte in (0x04, 0x16, 0xC0, 0xF1, 0xF2, 0xFF):
            assert spelled(byte) not in made
            del model["vocab"][spelled(byte)]
        model["vocab"] |= {"never": 1000, "12": 1001}
        model["merges"].append(["1", "2"])      # in no word, as digits stand alone
    if kind == "gpt2":
        model["merges"] = [" ".join(pair) for pair in model["merges"]]
    return data


def write(folder: Path, data, name: str = "tokenizer.json") -> Path:
    content = data if isinstance(data, str) else json.dumps(data, ensure_ascii=False)
    (folder / name).write_text(content, encoding="utf-8")
    return folder


def write_files(folder: Path, data: dict, **config) -> Path:
    """The same in three files: vocab.json, merges.txt and tokenizer_config.json."""
    write(folder, data["model"]["vocab"], "vocab.json")
    write(folder, "\n".join(["#version: 0.2", *map(" ".join, data["model"]["merges"]), ""]), "merges.txt")
    config["added_tokens_decoder"] = {token["id"]: token for token in data["added_tokens"]}
    return write(folder, config, "tokenizer_config.json")


def equal(mine, reference, texts):
    for text, expected in zip(texts, reference.encode_batch(texts, add_special_tokens=False), strict=True):
        ids = mine.encode(text)
        assert ids == expected.ids, repr(text)
        assert mine.decode(ids) == reference.decode(ids), repr(text)


@pytest.mark.parametrize("kind", KINDS)
def test_tokenizer_json_equals_tokenizers(kind, tmp_path):
    reference = tokenizers.Tokenizer.from_str(json.dumps(toy(kind)))
    mine = load_tokenizer(write(tmp_path, toy(kind)))
    assert mine.size == max(reference.get_vocab(with_added_tokens=True).values()) + 1
    for token in ("<|endoftext|>", "<|im_start|>", "<|im_end|>"):
        assert mine.token_id(token) == reference.token_to_id(token)
    words = [" token zers tokens 123 1234 never", "never"]
    equal(mine, reference, composed([*words, *EDGES, *random_strings(1000, seed=2)]))
    if toy(kind)["normalizer"]:
        assert mine.encode("e\u0301 가") == mine.encode("é 가")
    elif kind == "llama3":
        equal(mine, reference, random_strings(300, seed=3))
        assert mine.encode(" token") == [1000] and mine.encode(" tokens") != [1000, *mine.encode("s")]


def test_vocab_and_merges_are_qwen2s_or_refused(tmp_path):
    data = toy("qwen2")
    reference = tokenizers.Tokenizer.from_str(json.dumps(data))
    mine = load_tokenizer(write_files(tmp_path, data))
    assert mine.file.name == "merges.txt" and mine.token_id("<|im_end|>") == reference.token_to_id("<|im_end|>")
    assert mine.size == reference.get_vocab_size()
    equal(mine, reference, composed([*EDGES, *random_strings(300, seed=2)]))
    load_tokenizer(write_files(tmp_path, data, tokenizer_class="Qwen2TokenizerFast"))
    write_files(tmp_path, data, tokenizer_class="GPT2Tokenizer")
    with pytest.raises(ValueError, match="not tell how .GPT2Tokenizer. cuts.*copy .*tokenizer.json"):
        load_tokenizer(tmp_path)
    write(tmp_path, toy("gpt2"))        # a folder that has both: what tokenizer.json tells
    mine = load_tokenizer(tmp_path)
    assert mine.file.name == "tokenizer.json" and mine.words("12 (a") == ["12", " (", "a"]


@pytest.mark.parametrize("seed", range(3))
def test_toy_ranks_equal_tiktoken(tmp_path, seed):
    """Ranks at random, so that tokens can be reached in many ways and some in none."""
    rng = random.Random(seed)
    tokens = [bytes([b]) for b in range(256)]
    rng.shuffle(tokens)
    common = [t for t in tokens if t in b" aehlot'1\n!\xe4\xbd\xa0\xcc\x81"]
    for _ in range(400):
        if (token := rng.choice(common) + rng.choice(common)) not in tokens:
            tokens.append(token)
            common.append(token)
    tokens.append(b"tales")         # made of no two, but a word
    lines = [base64.b64encode(token) + b" %d\n" % rank for rank, token in enumerate(tokens)]
    (tmp_path / "qwen.tiktoken").write_bytes(b"".join(lines))
    mine = load_tokenizer(tmp_path)
    special = {name: len(tokens) + i for i, name in enumerate(QWEN_SPECIALS)}
    assert mine.special == special and mine.size == len(tokens) + 208
    ranks = {token: rank for rank, token in enumerate(tokens)}
    reference = tiktoken.Encoding("toy", pat_str=QWEN2, mergeable_ranks=ranks, special_tokens=special)
    letters = "".join(rng.choices("aehlot", k=1000))
    texts = ["tales tales", letters, letters[:499] + " " * 1500, "aeh" * 500, *EDGES, *random_strings(200, seed)]
    texts += ["".join(rng.choices(" aehlot'1\n!你\u0301", k=30)) for _ in range(300)]
    for text in composed(texts):
        assert mine.encode(text) == reference.encode_ordinary(text), repr(text)


@pytest.mark.parametrize("pattern", [QWEN2, LLAMA3, QWEN35, GPT2, NEMO, r"\p{N}"])
def test_split_of_every_assigned_character(pattern):
    mine = ByteBPE(Path("toy"), BYTES, {}, {}, [pattern], nfc=False)
    reference = pre_tokenizers.Split(tokenizers.Regex(pattern), behavior="isolated")
    assigned = [c for c in map(chr, range(0x30000)) if unicodedata.category(c) not in ("Cn", "Cs", "Co", "Lo")]
    assigned += random.Random(0).sample([c for c in map(chr, range(0x30000)) if unicodedata.category(c) == "Lo"], 3000)
    assert len(assigned) > 12_000
    for start in range(0, len(assigned), 1000):
        text = "".join(f"a{c}a {c}{c}!{c}'{c}1{c}A{c}A{c}a'{c}a" for c in assigned[start : start + 1000])
        assert mine.words(text) == [word for word, _ in reference.pre_tokenize_str(text)]


def test_splits_follow_one_another():
    mine = ByteBPE(Path("toy"), BYTES, {}, {}, [r"\p{N}", GPT2])
    assert mine.words("a  12") == ["a", "  ", "1", "2"]          # GPT-2's alone: "a", " ", " 12"
    assert ByteBPE(Path("toy"), BYTES, {}, {}, [QWEN2]).words("I'll pay $12\n") == [
        "I", "'ll", " pay", " $", "1", "2", "\n"]


def test_special_tokens_are_neither_read_nor_written(tmp_path):
    mine = load_tokenizer(write(tmp_path, toy("qwen2")))
    end = mine.token_id("<|endoftext|>")
    ids = mine.encode("<|endoftext|>")
    assert end not in ids and len(ids) > 1 and mine.decode(ids) == "<|endoftext|>"
    assert mine.decode([end, *mine.encode("yes"), end, mine.size + 50]) == "yes"
    with pytest.raises(ValueError, match=r"tokenizer.json has no special token '<s>'.*<\|im_end\|>"):
        mine.token_id("<s>")
    smile = mine.encode("😀")
    assert len(smile) > 1 and mine.decode(smile[:-1]) == "�"     # part of a character
    assert mine.encode("a\ud800b\udc00") == mine.encode("a\ufffdb\ufffd")
    assert mine.encode("\ud83d\ude00") == mine.encode("😀")      # as in tiktoken
    whole = ByteBPE(Path("toy"), BYTES | {"end": 256}, {"end": 256}, {}, [QWEN2], whole=True)
    assert whole.encode("end") == [101, 110, 100]


class Counted(dict):
    """Counts what is looked up."""
    steps = 0

    def get(self, key):
        self.steps += 1
        return super().get(key)


@pytest.mark.parametrize("word", ["a", "the", "token ", "中文"])
def test_a_word_twice_as_long_takes_twice_the_steps(word):
    model, steps = toy("gpt2")["model"], []
    for n in (1000, 2000):
        ranks = Counted((merge, rank) for rank, merge in enumerate(model["merges"]))
        mine = ByteBPE(Path("toy"), model["vocab"], {}, ranks, [], nfc=False)
        assert mine.decode(mine.encode(word * n)) == word * n
        steps.append(ranks.steps)
    assert len(word.encode()) * 1000 - 1 <= steps[0] and steps[1] < 2.1 * steps[0]


# ---------------------------------------------------------------------------------------------------------------------
# Which file, and refusals


def test_files_are_chosen_by_name(tmp_path):
    write(write_files(tmp_path, toy("qwen2")), toy("qwen2"))
    tokens = b"".join(base64.b64encode(bytes([b])) + b" %d\n" % b for b in range(256))
    (tmp_path / "qwen.tiktoken").write_bytes(tokens)
    (tmp_path / "tokenizer.model").touch()
    for name in ("merges.txt", "tokenizer.json", "qwen.tiktoken"):
        assert load_tokenizer(tmp_path / name).file.name == name
    assert load_tokenizer(str(tmp_path)).token_id("<|im_start|>") == 257
    (tmp_path / "qwen.tiktoken").unlink()
    with pytest.raises(ValueError, match=r"tokenizer.model is empty: download it again"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.model").unlink()
    for name in ("tokenizer.json", "merges.txt"):
        assert load_tokenizer(tmp_path).file.name == name
        (tmp_path / name).unlink()
    write_files(tmp_path, toy("qwen2"))
    (tmp_path / "vocab.json").unlink()
    with pytest.raises(ValueError, match=r"merges.txt: vocab.json is missing or not a file: download it again"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("name", ["", "nowhere", "config.json"])
def test_refuses_a_folder_without_tokenizer(tmp_path, name):
    write(tmp_path, {}, "config.json")
    with pytest.raises(ValueError, match="no tokenizer in .*: copy qwen.tiktoken or tokenizer.model or .* there from"):
        load_tokenizer(tmp_path / name)


def test_special_names(tmp_path):
    assert special_names(tmp_path) == {"bos": None, "eos": None, "pad": None}
    end = {"__type": "AddedToken", "content": "<|im_end|>", "lstrip": False}
    write_files(tmp_path, toy("qwen2"), bos_token=None, eos_token=end, pad_token="<|endoftext|>")
    names = {"bos": None, "eos": "<|im_end|>", "pad": "<|endoftext|>"}
    assert special_names(tmp_path) == names == load_tokenizer(tmp_path).names


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 1018370\n"
FILES = ["qwen.tiktoken", "tokenizer.model", "tokenizer.json", "merges.txt", "vocab.json", "tokenizer_config.json"]


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("content, message", [
    (b"", "is empty: download it again"),
    (POINTER, "is a git-lfs pointer, not the file itself: run `git lfs pull`"),
    (b"<html>404</html>", "download .*again"),
    (b"\x00\xff\xfe garbage \x80", "download .*again"),
    (b"[1, 2]", "download .*again"),
    (b"{}", "download .*again"),
    (b'{"model": 3, "\\ud800": [], "added_tokens_decoder": [1]}', "download .*again"),
    (b"[" * 100_000, "download .*again"),
    (b"{}" + b"\xff" * 9999, "download .*again"),
])  # fmt: skip
def test_refuses_a_broken_file(tmp_path, name, content, message):
    if name in FILES[3:]:
        write_files(tmp_path, toy("qwen2"))
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message) as error:
        load_tokenizer(tmp_path)
    assert str(tmp_path) in str(error.value) and "\n" not in str(error.value) and len(str(error.value)) < 999


def test_refuses_a_file_cut_short(tmp_path):
    write_files(tmp_path, toy("qwen2"))
    for name in ("vocab.json", "merges.txt", "tokenizer.json"):
        write(tmp_path, toy("qwen2"))
        whole = (tmp_path / name).read_bytes()
        line = whole.rindex(b"\n", 0, -1) + 1 if b"\n" in whole else -1
        for size in (len(whole) // 3, line, len(whole) - 2):
            (tmp_path / name).write_bytes(whole[:size])
            with pytest.raises(ValueError, match="download .*again"):
                load_tokenizer(tmp_path / (name if name == "tokenizer.json" else "merges.txt"))
        (tmp_path / name).write_bytes(whole)
    lines = [base64.b64encode(bytes([b])) + b" %d\n" % b for b in range(256)] + [b"aGVsbG8= 256\n", b"d29ybGQ= 257\n"]
    model = need_shared("weights/stories260K/tokenizer.model").read_bytes()
    for name, broken in (
        ("qwen.tiktoken", b"".join(lines)[:-3]), ("qwen.tiktoken", b"".join(lines)[:-8]),
        ("qwen.tiktoken", b"".join(lines[:200])), ("qwen.tiktoken", b"".join(lines[1:])),
        ("tokenizer.model", model[:10]), ("tokenizer.model", model[:-1]), ("tokenizer.model", model[:len(model) // 2]),
    ):
        (tmp_path / name).write_bytes(broken)
        with pytest.raises(ValueError, match="download .*again"):
            load_tokenizer(tmp_path / name)


def step(**change):
    """Changes the first step of the pre_tokenizer."""
    return lambda data: data["pre_tokenizer"]["pretokenizers"][0].update(change)


@pytest.mark.parametrize("change, message", [
    (lambda data: data["model"].update(type="Unigram"), "type 'Unigram' is not known"),
    (lambda data: data["model"].update(byte_fallback=True), "sentencepiece in another form.*copy tokenizer.model"),
    (lambda data: data["model"].update(dropout=0.1), "dropout 0.1 is not"),
    (lambda data: data["model"].update(unk_token="<unk>"), "unk_token '<unk>' is not"),
    (lambda data: data["model"].update(end_of_word_suffix="</w>"), "end_of_word_suffix '</w>' is not"),
    (lambda data: data["model"].update(continuing_subword_prefix="##"), "continuing_subword_prefix '##' is not"),
    (lambda data: data.update(normalizer={"type": "NFKC"}), "normalizer {'type': 'NFKC'} is not"),
    (lambda data: data.update(pre_tokenizer=None), "pre_tokenizer {} is not"),
    (lambda data: data.update(pre_tokenizer={"type": "Metaspace"}), "pre_tokenizer {'type': 'Metaspace'} is not"),
    (lambda data: data["pre_tokenizer"]["pretokenizers"].pop(), "pre_tokenizer {'type': 'Split'.*} is not"),
    (lambda data: data["pre_tokenizer"]["pretokenizers"].reverse(), "pre_tokenizer {'type': 'ByteLevel'.*} is not"),
    (lambda data: data["pre_tokenizer"]["pretokenizers"][1].update(add_prefix_space=True), "'add_prefix_space': True"),
    (step(behavior="Removed"), "'Removed'.* is not"),
    (step(invert=True), "'invert': True.* is not"),
    (step(pattern={"String": " "}), "'String': ' '.* is not"),
    (lambda data: data["pre_tokenizer"].update(pretokenizers=["\x1b[2J"]), r"pre_tokenizer '.x1b\[2J' is not"),
    (lambda data: data["pre_tokenizer"]["pretokenizers"].pop(0), r"list of split patterns \[\] is not"),
    (lambda data: data["pre_tokenizer"].update(pretokenizers=data["pre_tokenizer"]["pretokenizers"][:1] * 9
                                               + data["pre_tokenizer"]["pretokenizers"][1:]), "list of split patterns"),
    (step(pattern={"Regex": r"(?:\p{L}+)+\p{N}"}), r"split patterns \['\(\?:.*\)\+.*'\] is not known here: take a"),
    (step(pattern={"Regex": QWEN2 + "|(a+)+b"}), r"split patterns .* is not"),
    (step(pattern={"Regex": r"\p{N}{99999999999999}"}), r"split patterns \['.*\{9+\}'\] is not"),
    (step(pattern={"Regex": r"(\p{L}"}), r"split patterns \['\(.*'\] is not"),
    (step(pattern={"Regex": [1]}), r"split patterns \[\[1\]\] is not"),
    (step(pattern={"Regex": "\x1b[2J"}), r"split patterns \['.x1b\[2J'\] is not"),
    (step(type="Digits", individual_digits=False), "'Digits'.* is not"),
    (lambda data: data["model"].update(vocab={}), "the vocabulary lacks"),
    (lambda data: data["model"]["vocab"].pop("Ġ"), "the vocabulary lacks .* such as 'Ġ'.*: cut short or of another"),
    (lambda data: data["model"]["vocab"].pop("".join(data["model"]["merges"][9])), "the vocabulary lacks 1 bytes or"),
])  # fmt: skip
def test_refuses_what_it_does_not_know_by_name(tmp_path, change, message):
    data = json.loads(json.dumps(toy("qwen2")))
    change(data)
    with pytest.raises(ValueError, match="tokenizer.json: .*" + message):
        load_tokenizer(write(tmp_path, data))


@pytest.mark.parametrize("i", [-7, 1.5, 0.0, True, None, "7", [7], float("nan"), 99999999999999, 10**400, 300])
def test_refuses_an_id_that_is_no_number_of_its_own(tmp_path, i):
    data = json.loads(json.dumps(toy("llama3")))
    data["model"]["vocab"]["a"] = i                             # 300 is another token's
    with pytest.raises(DataError, match="the id of its token '.{1,9}' is .*, not a number of its own below 16777216"):
        load_tokenizer(write(tmp_path, data))
    data = json.loads(json.dumps(toy("llama3")))
    data["added_tokens"][1]["id"] = i
    with pytest.raises(DataError, match=r"the id of its token '<\|im_start\|>' is .*, not a number of its own below"):
        load_tokenizer(write(tmp_path, data))


@pytest.mark.parametrize("merge", ["", "a", "a b c", [], ["a"], ["a", "b", "c"], 5, None, {"a": 1, "b": 2}])
def test_refuses_merges_that_are_not_pairs(tmp_path, merge):
    data = json.loads(json.dumps(toy("qwen2")))
    data["model"]["merges"][9] = merge
    with pytest.raises(DataError, match=r"its merge .* is not two tokens: download it again"):
        load_tokenizer(write(tmp_path, data))


@pytest.mark.parametrize("token", [7, None, "x", [], ["x", 7], {}, {"content": "x"}, {"id": 7},
                                   {"content": ["x"], "id": 7}, {"content": None, "id": 7}])  # fmt: skip
def test_refuses_special_tokens_without_name_or_id(tmp_path, token):
    data = json.loads(json.dumps(toy("qwen2")))
    data["added_tokens"].append(token)
    with pytest.raises(DataError, match="its added token .* lacks a name or id: download it again"):
        load_tokenizer(write(tmp_path, data))


@pytest.mark.parametrize("kind", ["bos", "eos", "pad"])
@pytest.mark.parametrize("name", [["<s>"], 5, False, {"lstrip": True}, {"content": ["<s>"]}])
def test_refuses_names_of_special_tokens_that_are_none(tmp_path, kind, name):
    write_files(tmp_path, toy("qwen2"), **{f"{kind}_token": name})
    with pytest.raises(DataError, match=f"{kind}_token in tokenizer_config.json is .*, not a name: download it again"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("name", ["tokenizer.json", "vocab.json", "tokenizer_config.json"])
@pytest.mark.parametrize("content, message", [
    ("3", "{} holds a int, not an object"),
    ("nan", "{} is not valid JSON"),
    ("NaN", "{} holds a float, not an object"),
    ("[" * 100_000, "{} is not valid JSON"),
])  # fmt: skip
def test_names_the_file_that_is_broken(tmp_path, name, content, message):
    write_files(tmp_path, toy("qwen2"))
    write(tmp_path, content, name)
    with pytest.raises(DataError, match=message.format(name)):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("name", FILES)
def test_a_pipe_in_the_place_of_a_file_is_passed_over_or_refused(tmp_path, name):
    write_files(tmp_path, toy("qwen2"))
    (tmp_path / name).unlink(missing_ok=True)
    os.mkfifo(tmp_path / name)              # who opens it waits for ever
    if name in FILES[:3]:
        assert load_tokenizer(tmp_path).file.name == "merges.txt"
    else:
        with pytest.raises(DataError, match=f"{name} is missing or not a file|no tokenizer in"):
            load_tokenizer(tmp_path)


def test_refuses_a_huge_file_before_it_is_read(tmp_path):
    with open(tmp_path / "tokenizer.json", "wb") as file:
        file.truncate(2**27 + 1)            # takes no room on the disk
    with pytest.raises(DataError, match="tokenizer.json has over 134217728 bytes"):
        load_tokenizer(tmp_path)


def test_refuses_a_sentencepiece_token_that_is_no_text(tmp_path):
    model = (Path(__file__).parents[1] / "demo/llm/tokenizer.model").read_bytes()
    pieces = sentencepiece.SentencePieceProcessor(model_proto=model)
    piece = max(map(pieces.id_to_piece, range(300, 400)), key=len).encode()
    (tmp_path / "tokenizer.model").write_bytes(model.replace(piece, b"\xff" * len(piece)))
    with pytest.raises(DataError, match="tokenizer.model: cut short or another kind, UnicodeDecodeError.*download it"):
        load_tokenizer(tmp_path)


def test_decodes_a_token_that_spells_no_bytes(tmp_path):
    data = json.loads(json.dumps(toy("llama3")))
    data["model"]["vocab"] |= {"中": 1003, "\ud800": 1004}
    mine = load_tokenizer(write(tmp_path, json.dumps(data)))
    assert mine.decode([1003, *mine.encode("a"), 1004]) == "?a?"


# ---------------------------------------------------------------------------------------------------------------------
# The published files


@pytest.mark.parametrize("name", ["tokenizers/llama2", "tokenizers/chatglm3", "weights/stories260K"])
def test_sentencepiece_files(name):
    folder = need_shared(name)
    mine = load_tokenizer(folder)
    reference = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    for text in [*meld_texts(), *EDGES, *random_strings(2000)]:
        ids = reference.encode(text)
        assert mine.encode(text) == ids, repr(text)
        assert mine.decode(ids) == reference.decode(ids)
    assert mine.encode("a\ud800") == reference.encode("a\ufffd")
    assert [mine.token_id(t) for t in ("<unk>", "<s>", "</s>")] == [0, 1, 2]
    assert mine.decode([1, *mine.encode("yes"), 2, 0, 0, mine.size, -1]) == "yes"       # as a padded answer looks
    for no_special in ("the", "▁the", "<|im_start|>"):
        with pytest.raises(ValueError, match=rf"tokenizer.model has no special token '{no_special.replace('|', '.')}'"):
            mine.token_id(no_special)


def test_chatglm3_specials():
    mine = load_tokenizer(need_shared("tokenizers/chatglm3"))
    assert [mine.token_id(t) for t in CHATGLM3_SPECIALS] == list(range(64789, 64798))
    assert (mine.token_id("[gMASK]"), mine.token_id("sop"), mine.size) == (64790, 64792, 64798)
    assert mine.decode([64790, 64792, *mine.encode("你好 sop"), 64795, 65023]) == "你好 sop"
    llama = load_tokenizer(need_shared("tokenizers/llama2"))
    assert llama.size == 32000
    with pytest.raises(ValueError, match="gMASK"):
        llama.token_id("[gMASK]")


def test_qwen_file():
    file = need_shared("tokenizers/qwen/qwen.tiktoken")
    mine = load_tokenizer(file.parent)
    ranks = {base64.b64decode(token): int(rank) for token, rank in map(bytes.split, file.read_bytes().splitlines())}
    special = {name: 151643 + i for i, name in enumerate(QWEN_SPECIALS)}
    reference = tiktoken.Encoding("qwen", pat_str=QWEN2, mergeable_ranks=ranks, special_tokens=special)
    assert mine.size == reference.n_vocab == 151851
    for name in ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|extra_0|>", "<|extra_204|>"):
        assert mine.token_id(name) == reference.encode_single_token(name)
    for text in [*meld_texts(), *EDGES, *random_strings(2000)]:
        nfc = unicodedata.normalize("NFC", text)
        ids = reference.encode_ordinary(nfc)
        assert mine.encode(text) == ids, repr(text)
        assert mine.decode(ids) == reference.decode(ids) == nfc
    rng = random.Random(0)
    for _ in range(500):        # ids that are no text's: halves of characters
        ids = rng.choices(range(151643), k=6)
        assert mine.decode(ids) == reference.decode(ids)
    assert mine.decode([151644, *mine.encode("yes"), 151643, 151935]) == "yes"
    for text in ("a\ud800b", "\ud83d\ude00", "\udc00\ud800"):
        assert mine.encode(text) == reference.encode_ordinary(text)


def test_smollm2_file():
    folder = need_smollm2()
    mine = load_tokenizer(folder)
    reference = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    assert mine.size == 49152 and mine.names == {"bos": "<|im_start|>", "eos": "<|im_end|>", "pad": "<|im_end|>"}
    equal(mine, reference, [*meld_texts(), *EDGES, *random_strings(2000)])
