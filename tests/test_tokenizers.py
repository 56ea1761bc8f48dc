"""Tokenizers against the libraries that define them: sentencepiece, tiktoken (Qwen), tokenizers (Qwen2)."""

import base64
import json
import pickle
import random
import time
import unicodedata
from functools import cache
from pathlib import Path

import pytest
import sentencepiece
import tiktoken
import tokenizers
from conftest import need_shared
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from data import CHATGLM3_SPECIALS, QWEN_SPECIALS, ByteBPE, SentencePiece, load_tokenizer

# as Qwen's tokenization_qwen.py has it
QWEN_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SENTENCEPIECE = {"llama2": "tokenizers/llama2", "chatglm3": "tokenizers/chatglm3", "stories": "weights/stories260K"}
EDGES = [
    *("", " ", "  ", "\n", " \n ", "\r\n\r\n", "a  \n\n  b", "x   ", "   x", "\t\tx", " !\n a", "_a_b __c"),
    *("!!!\n\n???\r\n", "I'LL we've It'S 'tis don't'd o'", "'ſ it'ſ", "'K 'ﬅ", "12345 ½²Ⅻ٣一", "ß ẞ ı İ ŉ"),
    *("\x1c\x1d a\x1e\x1fb", "\x85\x85a\xa0\xa0b\u2003\u3000c\u200b\u180ed", "\0a\0", "中文，标点。\n  下一行"),
    *("\ud7ff\ue000\U0010ffff\ufeff\ufdd0", "e\u0301 é Å ﬁ 가각", "a\u0300\u0301b", "👩‍👩‍👧‍👦🏳️‍🌈"),
    "<s></s><unk><|endoftext|><|im_start|>[gMASK]sop",
    *("a" * 700, " " * 700, "ab" * 400 + "!" * 600, "\n" * 300 + " " * 300 + "x"),
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
    files = [need_shared(f"data/MELD/meld_{split}.pkl") for split in ("train", "valid", "test")]
    texts = [row["features"]["text"] for file in files for row in pickle.loads(file.read_bytes())]
    assert len(texts) == 13708
    return texts


def words(tokenizer: ByteBPE, text: str) -> list[str]:
    return [text[m.start() : m.end()] for m in tokenizer.split.finditer(text.translate(tokenizer.stand_in))]


# ----------------------------------------------------------------------------------------------------------------------
# Byte-level BPE on toy vocabularies


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    """A folder per way to write one toy Qwen2 tokenizer, and the `tokenizers` object itself."""
    reference = tokenizers.Tokenizer(models.BPE())
    reference.normalizer = normalizers.NFC()
    split = pre_tokenizers.Split(tokenizers.Regex(QWEN_SPLIT), behavior="isolated", invert=False)
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    reference.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
    reference.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=900,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<|endoftext|>"],  # in the vocabulary itself, as some files have it
        show_progress=False,
    )
    reference.train_from_iterator([*random_strings(400, seed=1), *EDGES, *[__doc__] * 20], trainer)
    reference.add_special_tokens(["<|im_start|>", "<|im_end|>"])

    root = tmp_path_factory.mktemp("toy")
    for name in ("pairs", "strings", "files", "added"):
        (root / name).mkdir()
    data = json.loads(reference.to_str())
    assert isinstance(data["model"]["merges"][0], list) and len(data["model"]["merges"]) > 500
    (root / "pairs/tokenizer.json").write_text(json.dumps(data), encoding="utf-8")
    data["model"]["merges"] = [" ".join(pair) for pair in data["model"]["merges"]]
    (root / "strings/tokenizer.json").write_text(json.dumps(data, ensure_ascii=False), encoding="utf-8")
    special = {token["content"]: token["id"] for token in data["added_tokens"]}
    for name in ("files", "added"):
        reference.model.save(str(root / name))
    decoder = {str(i): {"content": token, "special": True} for token, i in special.items()}
    (root / "files/tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": decoder}))
    (root / "added/added_tokens.json").write_text(json.dumps(special))
    return root, reference


@pytest.mark.parametrize("name", ["pairs", "strings", "files", "added"])
def test_toy_qwen2_equals_tokenizers(toy, name):
    root, reference = toy
    mine = load_tokenizer(root / name)
    assert mine.size == reference.get_vocab_size(with_added_tokens=True)
    for token in ("<|endoftext|>", "<|im_start|>", "<|im_end|>"):
        assert mine.token_id(token) == reference.token_to_id(token)
    texts = [s for s in EDGES if "<|" not in s]
    # `tokenizers` has NFC tables of an older Unicode, which do not reorder later marks such as U+09FE
    texts += [unicodedata.normalize("NFC", s) for s in random_strings(2000, seed=2)]
    for text, expected in zip(texts, reference.encode_batch(texts), strict=True):
        ids = mine.encode(text)
        assert ids == expected.ids, repr(text)
        assert mine.decode(ids) == reference.decode(ids) == unicodedata.normalize("NFC", text)


def test_merges_rank_pairs_and_tiktoken_bytes():
    """"abc" is the merge of a and bc. Of ab and c it is one only where bytes are ranked, as they are in tiktoken."""
    ids = {bytes([b]): b for b in range(256)} | {b"ab": 256, b"bc": 257, b"abc": 258, b"xyz": 259}
    by_pair = ByteBPE(Path("toy"), ids, {(b"a", b"b"): 0, (b"b", b"c"): 1, (b"a", b"bc"): 2}, {}, joined=False)
    assert by_pair.encode("abc bc") == [256, 99, 32, 257]
    by_bytes = ByteBPE(Path("toy"), ids, ids, {}, joined=True)
    assert by_bytes.encode("abcx") == [258, 120]
    assert by_bytes.encode("xyz") == [259] and by_bytes.encode("xyzx") == [120, 121, 122, 120]  # whole, or not at all


def test_toy_ranks_equal_tiktoken(tmp_path):
    """Ranks at random, so that tokens can be reached in many ways and some in none."""
    for seed in range(5):
        rng = random.Random(seed)
        tokens = [bytes([b]) for b in range(256)]
        rng.shuffle(tokens)
        common = [t for t in tokens if t in b" aehlot'1\n!\xe4\xbd\xa0\xcc\x81"]
        for _ in range(400):
            if (token := rng.choice(common) + rng.choice(common)) not in tokens:
                tokens.append(token)
                common.append(token)
        lines = [base64.b64encode(token) + b" %d\n" % rank for rank, token in enumerate(tokens)]
        (tmp_path / "qwen.tiktoken").write_bytes(b"".join(lines))
        mine = load_tokenizer(tmp_path)
        special = {name: len(tokens) + i for i, name in enumerate(QWEN_SPECIALS)}
        assert mine.special == special and mine.size == len(tokens) + 208
        reference = tiktoken.Encoding(
            "toy", pat_str=QWEN_SPLIT, mergeable_ranks={t: i for i, t in enumerate(tokens)}, special_tokens=special
        )
        letters = "".join(rng.choices("aehlot", k=3000))
        texts = [letters, letters[:499] + " " * 1500, "aeh" * 500, *EDGES, *random_strings(300, seed)]
        texts += ["".join(rng.choices(" aehlot'1\n!你\u0301", k=30)) for _ in range(500)]
        for text in texts:
            assert mine.encode(text) == reference.encode_ordinary(unicodedata.normalize("NFC", text)), repr(text)


def test_split_of_every_assigned_character(toy):
    root, _ = toy
    mine = load_tokenizer(root / "pairs")
    reference = pre_tokenizers.Split(tokenizers.Regex(QWEN_SPLIT), behavior="isolated")
    assigned = [c for c in map(chr, range(0x30000)) if unicodedata.category(c) not in ("Cn", "Cs", "Co")]
    assert len(assigned) > 130_000
    for start in range(0, len(assigned), 1000):
        text = "".join(f"a{c}a {c}{c}!{c}'{c}" for c in assigned[start : start + 1000])
        assert words(mine, text) == [word for word, _ in reference.pre_tokenize_str(text)]
    assert words(mine, "I'll pay $12\n") == ["I", "'ll", " pay", " $", "1", "2", "\n"]
    assert "Łódź №²".translate(mine.stand_in) == "xxdx !0"


def test_special_tokens_are_neither_read_nor_written(toy):
    root, reference = toy
    mine = load_tokenizer(root / "files")
    end = mine.token_id("<|endoftext|>")
    ids = mine.encode("<|endoftext|>")
    assert end not in ids and len(ids) > 1 and mine.decode(ids) == "<|endoftext|>"
    assert mine.decode([end, *mine.encode("yes"), end, mine.size + 50]) == "yes"
    with pytest.raises(ValueError, match=r"merges.txt has no special token '<s>'.*<\|im_end\|>"):
        mine.token_id("<s>")
    smile = mine.encode("😀")
    assert len(smile) > 1 and mine.decode(smile[:-1]) == "�"  # part of a character


def test_surrogates_as_in_tiktoken(toy):
    mine = load_tokenizer(toy[0] / "files")
    assert mine.encode("a\ud800b\udc00") == mine.encode("a\ufffdb\ufffd")
    assert mine.encode("\ud83d\ude00") == mine.encode("😀")


@pytest.mark.parametrize("name", ["toy", "tokenizers/qwen"])
def test_time_is_near_linear(toy, name):
    """A fraction of a second for each; minutes if a step were quadratic."""
    mine = load_tokenizer(toy[0] / "files" if name == "toy" else need_shared(name))
    texts = [kind * 100_000 for kind in ("a", " ")] + [" " * 100_000 + "x"]
    texts += [(__doc__ + "中文，标点。 don't 12345 😀\n\n   ") * 9000]
    assert len(texts[-1].encode()) > 1_000_000
    for text in texts:
        start = time.perf_counter()
        back = mine.decode(mine.encode(text))
        assert time.perf_counter() - start < 10, f"{text[:10]!r}...: 0.3 s on an idle machine"
        assert back == text


# ----------------------------------------------------------------------------------------------------------------------
# Which file, and refusals


def test_files_are_chosen_by_name(toy, tmp_path):
    root, _ = toy
    for file in ("tokenizer.json", "vocab.json", "merges.txt", "tokenizer_config.json"):
        source = root / ("pairs" if file == "tokenizer.json" else "files") / file
        (tmp_path / file).write_bytes(source.read_bytes())
    for name in ("", "vocab.json", "merges.txt"):
        assert load_tokenizer(str(tmp_path / name)).file.name == "merges.txt"
    assert load_tokenizer(tmp_path / "tokenizer.json").file.name == "tokenizer.json"
    (tmp_path / "vocab.json").unlink()
    with pytest.raises(ValueError, match=r"vocab.json is missing: download it again"):
        load_tokenizer(tmp_path)
    (tmp_path / "merges.txt").unlink()
    assert load_tokenizer(tmp_path).file.name == "tokenizer.json"
    (tmp_path / "tokenizer.model").touch()
    with pytest.raises(ValueError, match=r"tokenizer.model is empty: download it again"):
        load_tokenizer(tmp_path)
    tokens = b"".join(base64.b64encode(bytes([b])) + b" %d\n" % b for b in range(256))
    (tmp_path / "qwen.tiktoken").write_bytes(tokens)
    assert load_tokenizer(tmp_path).file.name == "qwen.tiktoken"
    assert load_tokenizer(tmp_path / "qwen.tiktoken").token_id("<|im_start|>") == 257


def test_refuses_a_folder_without_tokenizer(tmp_path):
    with pytest.raises(ValueError, match="no tokenizer in .*found no such folder, expected qwen.tiktoken, .*copy"):
        load_tokenizer(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="found nothing, expected"):
        load_tokenizer(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "vocab.json").write_text("{}")
    with pytest.raises(ValueError, match="found config.json, vocab.json, expected"):
        load_tokenizer(tmp_path)


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 1018370\n"


@pytest.mark.parametrize("name", ["qwen.tiktoken", "tokenizer.model", "merges.txt", "vocab.json", "tokenizer.json"])
@pytest.mark.parametrize("content, message", [
    (b"", "is empty: download it again"),
    (POINTER, "is a git-lfs pointer of 72 bytes, not the file itself: run `git lfs pull`"),
    (b"<html>404</html>", "download it again|one is cut short"),
    (b"\x00\xff\xfe garbage \x80", "download it again"),
    (b"[1, 2]", "download it again|one is cut short"),
    (b"{}", "download it again|one is cut short"),
])  # fmt: skip
def test_refuses_a_broken_file(toy, tmp_path, name, content, message):
    if name in ("merges.txt", "vocab.json"):
        for file in ("vocab.json", "merges.txt"):
            (tmp_path / file).write_bytes((toy[0] / "files" / file).read_bytes())
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message) as error:
        load_tokenizer(tmp_path)
    assert str(tmp_path) in str(error.value)


def test_refuses_a_file_cut_short(toy, tmp_path):
    root, _ = toy
    for name in ("vocab.json", "merges.txt", "tokenizer.json"):
        for file in ("vocab.json", "merges.txt", "tokenizer.json"):
            (tmp_path / file).write_bytes((root / ("pairs" if "token" in file else "files") / file).read_bytes())
        whole = (tmp_path / name).read_bytes()
        for size in (len(whole) // 3, whole.rindex(b"\n", 0, -1) + 1 if b"\n" in whole else -1, len(whole) - 2):
            (tmp_path / name).write_bytes(whole[:size])
            with pytest.raises(ValueError, match="cut short"):
                load_tokenizer(tmp_path / name)
    lines = [base64.b64encode(bytes([b])) + b" %d\n" % b for b in range(256)] + [b"aGVsbG8= 256\n", b"d29ybGQ= 257\n"]
    for broken in (b"".join(lines)[:-3], b"".join(lines)[:-8], b"".join(lines[:200]), b"".join(lines[1:])):
        (tmp_path / "qwen.tiktoken").write_bytes(broken)
        with pytest.raises(ValueError, match="cut short"):
            load_tokenizer(tmp_path)


def test_refuses_a_sentencepiece_model_cut_short(tmp_path):
    whole = need_shared("weights/stories260K/tokenizer.model").read_bytes()
    for size in (10, len(whole) // 2, len(whole) - 1):
        (tmp_path / "tokenizer.model").write_bytes(whole[:size])
        with pytest.raises(ValueError, match=r"tokenizer.model is cut short or of another kind .*: download it again"):
            load_tokenizer(tmp_path)


LLAMA3_SPLIT = QWEN_SPLIT.replace(r"\p{N}| ?", r"\p{N}{1,3}| ?")


@pytest.mark.parametrize("change, message", [
    (lambda data: data["model"].update(type="Unigram"), "model 'Unigram', not 'BPE'"),
    (lambda data: data["model"].update(ignore_merges=True), "ignore_merges True, not False"),
    (lambda data: data.update(normalizer=None), "normalizer None, not 'NFC'"),
    (lambda data: data.update(pre_tokenizer=None), r"pre_tokenizer \[\], not"),
    (lambda data: data["pre_tokenizer"]["pretokenizers"].pop(0), r"pre_tokenizer \['ByteLevel'\], not \['Split', "),
    (lambda data: data["pre_tokenizer"]["pretokenizers"][0].update(pattern={"Regex": LLAMA3_SPLIT}), r"split.*\{1,3\}"),
])  # fmt: skip
def test_refuses_other_tokenizers_by_name(toy, tmp_path, change, message):
    data = json.loads((toy[0] / "pairs/tokenizer.json").read_text(encoding="utf-8"))
    change(data)
    (tmp_path / "tokenizer.json").write_text(json.dumps(data))
    with pytest.raises(ValueError, match="tokenizer.json is not Qwen's kind of BPE.*" + message):
        load_tokenizer(tmp_path)


# ----------------------------------------------------------------------------------------------------------------------
# The published files


@pytest.mark.parametrize("name", SENTENCEPIECE)
def test_sentencepiece_files(name):
    folder = need_shared(SENTENCEPIECE[name])
    mine = load_tokenizer(folder)
    reference = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    assert isinstance(mine, SentencePiece)
    for text in [*meld_texts(), *EDGES, *random_strings(10_000)]:
        ids = reference.encode(text)
        assert mine.encode(text) == ids, repr(text)
        assert mine.decode(ids) == reference.decode(ids)
    assert mine.encode("a\ud800") == reference.encode("a\ufffd")
    assert [mine.token_id(t) for t in ("<unk>", "<s>", "</s>")] == [0, 1, 2]
    assert mine.decode([1, *mine.encode("yes"), 2, 0, 0, mine.size, -1]) == "yes"  # as a padded answer looks
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


@pytest.fixture(scope="module")
def qwen():
    file = need_shared("tokenizers/qwen/qwen.tiktoken")
    mine = load_tokenizer(file.parent)
    ranks = {base64.b64decode(token): int(rank) for token, rank in map(bytes.split, file.read_bytes().splitlines())}
    special = {name: 151643 + i for i, name in enumerate(QWEN_SPECIALS)}
    return mine, tiktoken.Encoding("qwen", pat_str=QWEN_SPLIT, mergeable_ranks=ranks, special_tokens=special)


def test_qwen_file(qwen):
    mine, reference = qwen
    assert mine.size == reference.n_vocab == 151851
    for name in ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|extra_0|>", "<|extra_204|>"):
        assert mine.token_id(name) == reference.encode_single_token(name)
    for text in [*meld_texts(), *EDGES, *random_strings(10_000)]:
        nfc = unicodedata.normalize("NFC", text)
        ids = reference.encode_ordinary(nfc)
        assert mine.encode(text) == ids, repr(text)
        assert mine.decode(ids) == reference.decode(ids) == nfc
    rng = random.Random(0)
    for _ in range(500):  # ids that are no text's: halves of characters
        ids = rng.choices(range(151643), k=6)
        assert mine.decode(ids) == reference.decode(ids)
    assert mine.decode([151644, *mine.encode("yes"), 151643, 151935]) == "yes"
    for text in ("a\ud800b", "\ud83d\ude00", "\udc00\ud800"):
        assert mine.encode(text) == reference.encode_ordinary(text)


def test_qwen_ranks_as_pairs_give_the_same_ids(qwen):
    """Qwen2's merges.txt holds one pair of parts for each token of qwen.tiktoken: the two ways to rank must agree."""
    mine, _ = qwen
    few = {token: rank for token, rank in mine.ranks.items() if rank < 20_000}
    pairs = {}
    for token, rank in few.items():
        parts = [token[i : i + 1] for i in range(len(token))]
        while len(parts) > 2:  # join the lowest, down to the two parts that make the token
            _, i = min((few.get(a + b, rank), i) for i, (a, b) in enumerate(zip(parts, parts[1:], strict=False)))
            parts[i : i + 2] = [parts[i] + parts[i + 1]]
        if len(parts) == 2:
            pairs[tuple(parts)] = rank
    by_pair = ByteBPE(Path("toy"), few, pairs, {}, joined=False)
    by_bytes = ByteBPE(Path("toy"), few, few, {}, joined=True)
    for text in random_strings(2000, seed=3) + meld_texts()[:2000]:
        assert by_pair.encode(text) == by_bytes.encode(text)


@pytest.mark.parametrize("name", [
    "llama2-meld-a", "llama2-mosei-a", "qwen-meld-a", "qwen-simsv2-a", "chatglm3-cherma-a", "chatglm3-mosei-a"
])  # fmt: skip
def test_golden_token_ids(name):
    golden = json.loads(need_shared(f"golden/{name}.json").read_text(encoding="utf-8"))
    mine = load_tokenizer(need_shared(f"tokenizers/{golden['family']}"))
    prefix = {"llama2": ["<s>"], "chatglm3": ["[gMASK]", "sop"], "qwen": []}[golden["family"]]
    bos = {"llama2": ["<s>"], "chatglm3": [], "qwen": ["<|im_start|>"]}[golden["family"]]
    assert [mine.token_id(t) for t in bos] == golden["bos_ids"]
    before = golden["before_text"]
    assert [mine.token_id(t) for t in prefix] + mine.encode(before) == golden["before_ids"]
    assert mine.encode("</" + before[before.index("<") + 1 :]) == golden["after_ids"]
    assert mine.encode(golden["task_prompt"]) == golden["task_prompt_ids"]
    assert [mine.decode(ids) for ids in golden["generated_ids"]] == golden["generated_text"]
    safetensors = pytest.importorskip("safetensors.numpy")
    arrays = safetensors.load_file(need_shared(f"golden/{name}.safetensors"))
    pad = mine.token_id("<|endoftext|>" if golden["family"] == "qwen" else "<unk>")
    for text, row in zip(golden["texts"], arrays["text_ids"].tolist(), strict=True):
        ids = mine.encode(text)
        assert [pad] * (len(row) - len(ids)) + ids == row
    assert [mine.encode(label) for label in golden["label_text"]] == arrays["label_ids"].tolist()
