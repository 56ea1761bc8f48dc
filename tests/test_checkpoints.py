"""What a checkpoint is, in words; .bin shards become .safetensors and load bit-equal; what must be refused is."""
import json
import os
import subprocess
import sys
from collections import OrderedDict

import pytest
import torch
from conftest import TINY, tiny_tensors, write_checkpoint
from safetensors import safe_open
from safetensors.torch import load_file
from test_model import PUBLISHED

import model
from model import Config, convert, describe, load_llm


def write_bin(folder, raw, tensors, shards=0, old_format=False):
    """A checkpoint folder with its weights in torch.save's files: pytorch_model.bin, or shards with their index."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(raw))
    names = ["pytorch_model.bin"] if not shards else [
        f"pytorch_model-{i + 1:05}-of-{shards:05}.bin" for i in range(shards)]
    home = {name: names[i % len(names)] for i, name in enumerate(tensors)}
    for file in names:
        part = OrderedDict((name, tensors[name]) for name in home if home[name] == file)
        torch.save(part, folder / file, _use_new_zipfile_serialization=not old_format)
    if shards:
        (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": home}))
    return folder


@pytest.fixture
def bins(tmp_path):
    """Write a tiny checkpoint of .bin files; change(tensors) first."""
    def write(family="llama", shards=0, old_format=False, change=lambda tensors: None):
        tensors = tiny_tensors(family)
        change(tensors)
        return write_bin(tmp_path / "bin", TINY[family], tensors, shards, old_format)
    return write


def bit_equal(a, b) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(
        a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))


def refusal(function, *args) -> str:
    """The message of the ValueError that the call raises: one sentence on one line."""
    with pytest.raises(ValueError) as error:
        function(*args)
    assert "\n" not in str(error.value)
    return str(error.value)


def has(text: str, *words):
    for word in map(str, words):
        assert word in text, f"{word!r} is not in: {text}"


# ---------------------------------------------------------------------------------------------------------------------
# Conversion


@pytest.mark.parametrize("old_format", [False, True], ids=["zip", "old"])
@pytest.mark.parametrize("family, shards", [
    ("chatglm", 0), ("chatglm", 3), ("llama", 1), ("llama", 4), ("qwen", 2), ("qwen2", 2)])
def test_converted_weights_are_bit_equal(tiny, bins, tmp_path, family, shards, old_format):
    folder, out = bins(family, shards, old_format), tmp_path / "deep" / "out"
    (folder / "tokenizer.model").write_bytes(b"any")
    (folder / "modeling.py").write_text("raise SystemExit('remote code')")
    convert(folder, out)
    llm, n = load_llm(out), max(shards, 1)
    assert all(bit_equal(p, tiny[family].state_dict()[name]) for name, p in llm.state_dict().items())
    assert llm.fingerprint == tiny[family].fingerprint
    assert sorted(file.name for file in out.iterdir()) == sorted([
        "config.json", "tokenizer.model", "model.safetensors.index.json",
        *(f"model-{i + 1:05}-of-{n:05}.safetensors" for i in range(n))])
    assert (out / "config.json").read_bytes() == (folder / "config.json").read_bytes()


def test_a_folder_may_be_converted_in_place(tiny, bins):
    folder = bins("chatglm", shards=2)
    convert(folder, folder)
    assert load_llm(folder).fingerprint == tiny["chatglm"].fingerprint


def layouts(tensors) -> dict:
    """The same numbers in every way in which they can lie in a file."""
    def lay(i, t):
        if i % 6 == 0:                                      # a part of a larger storage
            return torch.stack((t + 1, t, t - 1))[1]
        if i % 6 == 1:                                      # columns first, or every second number
            return t.T.contiguous().T if t.dim() == 2 else torch.stack((t, t + 1), dim=1)[:, 0]
        if i % 6 == 2:
            return t.bfloat16()
        if i % 6 == 3:
            return torch.nn.Parameter(t.half())
        if i % 6 == 4:                                      # one row, seen many times
            return t[:1].expand_as(t)
        return t.double()
    return {name: lay(i, t) for i, (name, t) in enumerate(tensors.items())}


@pytest.mark.parametrize("shards", [0, 3])
@pytest.mark.parametrize("family", ["llama", "chatglm"])
def test_views_and_shared_storages_are_copied_right(bins, tmp_path, family, shards):
    tensors = layouts(tiny_tensors(family))
    head, embedding = (model._sources(family, name)[0] for name in ("head.weight", "embedding.weight"))
    tensors[head] = tensors[embedding]                      # one storage, two names
    assert sum(not t.is_contiguous() for t in tensors.values()) > 5
    assert any(t.storage_offset() for t in tensors.values())
    folder = write_bin(tmp_path / "bin", TINY[family], tensors, shards)
    convert(folder, tmp_path / "out")
    stored = {}
    for file in (tmp_path / "out").glob("*.safetensors"):
        stored |= load_file(file)
    assert stored.keys() == tensors.keys()
    assert all(bit_equal(stored[name], t.detach()) for name, t in tensors.items())
    llm = load_llm(tmp_path / "out", dtype=torch.float64)   # F64 holds all that the others do
    assert bit_equal(llm.head.weight, tensors[embedding].double())
    assert bit_equal(llm.norm.weight, tensors[model._sources(family, "norm.weight")[0]].detach().double())


def test_every_tensor_is_aligned(tmp_path):
    tensors = {"a": torch.ones(3).bfloat16(), "b": torch.rand(2).double(), "c": torch.rand(5)}
    model.write_atomic(tmp_path / "x.safetensors", model._safetensors(tensors, {"format": "pt"}))
    raw = (tmp_path / "x.safetensors").read_bytes()
    start = 8 + int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8:start])
    assert all((start + header[name]["data_offsets"][0]) % t.itemsize == 0 for name, t in tensors.items())
    assert all(bit_equal(t, tensors[name]) for name, t in load_file(tmp_path / "x.safetensors").items())


def test_rotary_tables_are_left_behind(bins, tmp_path):
    name = "transformer.rotary_pos_emb.inv_freq"            # it may be of any size: here 4 TB, from one number
    convert(bins("chatglm", change=lambda t: t.update({name: torch.ones(1).expand(1 << 40)})), tmp_path / "out")
    with safe_open(tmp_path / "out" / "model-00001-of-00001.safetensors", "pt") as file:
        assert name not in file.keys()
    load_llm(tmp_path / "out")


@pytest.mark.parametrize("stop", range(6))
def test_an_interrupted_conversion_goes_on(tiny, bins, tmp_path, monkeypatch, stop):
    folder, out, moved = bins(shards=4), tmp_path / "out", []
    steps = [f"model-{i:05}-of-00004.safetensors" for i in (1, 2, 3, 4)]
    steps += ["config.json", "model.safetensors.index.json"]

    def replace(draft, target):
        if len(moved) == stop:
            raise KeyboardInterrupt
        moved.append(target.name)
        os.rename(draft, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", replace)
        with pytest.raises(KeyboardInterrupt):
            convert(folder, out)
        if stop:                                            # half done, it passes for no whole checkpoint
            (out / "config.json").write_bytes((folder / "config.json").read_bytes())
            has(refusal(load_llm, out), out, "without model.safetensors.index.json", "again")
            has(refusal(describe, out), out, "without model.safetensors.index.json", "again")
        moved.clear()
        stop, again = 99, min(stop, 4)
        convert(folder, out)
    assert moved == steps[again:]                           # no whole shard is written twice, and the index is the last
    assert load_llm(out).fingerprint == tiny["llama"].fingerprint
    assert not list(out.glob(".*"))


def test_another_checkpoint_is_never_overwritten_or_mixed_in(bins, tmp_path):
    out = write_checkpoint(tmp_path / "out", TINY["llama"], tiny_tensors("llama"))
    before = {file: file.read_bytes() for file in out.iterdir()}
    has(refusal(convert, bins(), out), out / "model.safetensors", "choose a folder")
    convert(bins(shards=3), tmp_path / "two")
    shard = tmp_path / "two" / "model-00001-of-00003.safetensors"
    folder = bins(shards=3, change=lambda t: t["model.embed_tokens.weight"][0, :1].add_(1))    # of another training
    has(refusal(convert, folder, tmp_path / "two"), shard, "not made from", folder / "pytorch_model-00001-of-00003.bin")
    shard.write_bytes(shard.read_bytes()[:-1])
    has(refusal(convert, folder, tmp_path / "two"), shard, "delete it")
    assert before == {file: file.read_bytes() for file in out.iterdir()}


# ---------------------------------------------------------------------------------------------------------------------
# Refusals: nothing is run, nothing is written


class Hostile:
    def __init__(self, canary):
        self.canary = canary

    def __reduce__(self):
        return os.system, (f"touch {self.canary}",)


@pytest.mark.parametrize("old_format", [False, True], ids=["zip", "old"])
def test_a_hostile_pickle_is_never_run(bins, tmp_path, old_format):
    canary = tmp_path / "canary"
    folder = bins(old_format=old_format, change=lambda t: t.update({"lm_head.weight": Hostile(canary)}))
    for function, *args in [(convert, folder, tmp_path / "out"), (describe, folder), (load_llm, folder)]:
        has(refusal(function, *args), folder)
    has(refusal(convert, folder, tmp_path / "out"), "pytorch_model.bin", "system", "nothing in it was run")
    assert not canary.exists() and not (tmp_path / "out").exists()
    torch.load(folder / "pytorch_model.bin", weights_only=False)
    assert canary.exists()                                  # it was a live one


def test_the_command_line_ends_with_one_line(bins, tmp_path):
    folder = bins(change=lambda t: t.update({"lm_head.weight": Hostile(tmp_path / "canary")}))
    run = subprocess.run([sys.executable, model.__file__, folder, "--to-safetensors", tmp_path / "out"],
                         capture_output=True, text=True)
    assert run.returncode == 1 and run.stdout == ""
    assert run.stderr.startswith("error: ") and run.stderr.count("\n") == 1
    assert not (tmp_path / "canary").exists()


def test_an_index_cannot_make_loading_open_a_pickle(bins, tmp_path, monkeypatch):
    folder = bins()
    monkeypatch.setattr(torch, "load", None)
    for name in ("pytorch_model.bin", "../out.safetensors", 7):
        index = folder / "model.safetensors.index.json"
        index.write_text(json.dumps({"weight_map": {"lm_head.weight": name}}))
        has(refusal(load_llm, folder), index, "weight_map")


@pytest.mark.filterwarnings("ignore")                       # some of these kinds are on their way out of torch
@pytest.mark.parametrize("make, words", [
    (lambda: torch.eye(4).to_sparse(), ["torch.sparse_coo"]),
    (lambda: torch.quantize_per_tensor(torch.ones(3, 3), 0.1, 0, torch.qint8), ["torch.qint8"]),
    (lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]), ["plain dense"]),
    (lambda: torch.empty(3, device="meta"), ["on meta"]),
    (lambda: [1.0, 2.0], ["a list"]),
    (lambda: {"weight": torch.ones(3)}, ["a dict"]),
    (lambda: torch.ones(3, dtype=torch.int32), ["torch.int32", "quantised"]),
    (lambda: torch.ones(3, dtype=torch.float8_e4m3fn), ["float8", "quantised"]),
    (lambda: torch.ones(3, dtype=torch.complex64), ["complex"]),
    (lambda: torch.ones(1).expand(1 << 40, 36), ["misshapen", "[1099511627776, 36]", "[271, 36]"]),
], ids=lambda value: value[0] if isinstance(value, list) else "")
def test_tensors_that_are_not_plain_floats_are_refused(bins, tmp_path, make, words):
    folder = bins(change=lambda t: t.update({"lm_head.weight": make()}))
    with pytest.raises(ValueError) as error:
        convert(folder, tmp_path / "out")
    has(str(error.value), "lm_head.weight", "pytorch_model.bin", *words)
    assert not (tmp_path / "out").exists()


def test_files_that_are_not_whole_are_refused(bins, tmp_path):
    for old_format in (False, True):
        folder = bins(shards=3, old_format=old_format)
        file = folder / "pytorch_model-00002-of-00003.bin"
        whole = file.read_bytes()
        for data in (b"", b"PK\3\4", b"junk", whole[:9], whole[:len(whole) // 2]):
            file.write_bytes(data)
            has(refusal(convert, folder, tmp_path / "out"), file, "not a whole file")
        file.write_bytes(b"version https://git-lfs.github.com/spec/v1")
        has(refusal(convert, folder, tmp_path / "out"), file, "git-lfs pointer")
        torch.save([torch.ones(3)], file)
        has(refusal(convert, folder, tmp_path / "out"), file, "holds a list")
        file.unlink()
        has(refusal(convert, folder, tmp_path / "out"), file, "missing", "finish the download")
    (folder / "pytorch_model.bin.index.json").unlink()
    has(refusal(convert, folder, tmp_path / "out"), folder, "without pytorch_model.bin.index.json")
    for file in folder.glob("*.bin"):
        file.unlink()
    has(refusal(convert, folder, tmp_path / "out"), folder, "no pytorch_model*.bin")
    assert not (tmp_path / "out").exists()


def test_weights_of_another_model_are_refused_before_anything_is_written(bins, tmp_path):
    folder = bins(change=lambda t: t.pop("model.norm.weight"))
    with pytest.raises(ValueError, match="missing: model.norm.weight"):
        convert(folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()


GPTQ = {"bits": 4, "group_size": 128, "quant_method": "gptq", "modules_to_not_convert": ["lm_head"] * 99}
FAMILIES = ["llama (LLaMA, LLaMA2)", "qwen (Qwen)", "qwen2 (Qwen1.5, Qwen2, Qwen2.5)", "chatglm (ChatGLM3)"]


@pytest.mark.parametrize("family, change, words", [
    ("llama", {"model_type": "mistral"}, ["'mistral'", *FAMILIES]),
    ("llama", {"model_type": ["llama"]}, ["['llama']", *FAMILIES]),
    ("llama", {"rope_scaling": {"factor": 8.0, "rope_type": "llama3"}}, ["rope_scaling", "llama3"]),
    ("llama", {"rope_parameters": {"rope_type": "default"}, "rope_scaling": {"type": "dynamic"}}, ["dynamic"]),
    ("llama", {"rope_scaling": "linear"}, ["rope_scaling", "linear"]),
    ("llama", {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}, ["partial", "0.5"]),
    ("qwen2", {"rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}},
     ["yarn", "delete the key"]),
    ("qwen2", {"quantization_config": GPTQ}, ["quantization_config", "gptq", "fp16, bf16 or fp32"]),
    ("chatglm", {"quantization_bit": 4}, ["quantization_bit is 4", "fp16, bf16 or fp32"]),
    ("chatglm", {"rope_ratio": 500}, ["rope_ratio is 500"]),                                               # GLM-4
    ("chatglm", {"kv_channels": None}, ["not a positive number"]),
    ("llama", {"num_attention_heads": 0}, ["n_head is 0"]),
    ("llama", {"hidden_size": "36"}, ["dim is '36'"]),
    ("llama", {"num_hidden_layers": 2.5}, ["n_layer is 2.5"]),
    ("llama", {"vocab_size": -1}, ["vocab_size is -1"]),
    ("llama", {"rms_norm_eps": "small"}, ["small"]),
    ("llama", {"num_key_value_heads": 4}, ["6 heads", "4 key/value heads"]),
])
def test_a_config_is_refused_in_one_short_sentence(tmp_path, family, change, words):
    (tmp_path / "config.json").write_text(json.dumps({**TINY[family], **change}))
    message = refusal(Config.from_dir, tmp_path)
    has(message, tmp_path / "config.json", *words)
    assert len(message.replace(str(tmp_path), "")) < 330


def test_quantised_tensors_are_refused_in_one_sentence(tmp_path):
    tensors, name = tiny_tensors("llama"), "model.layers.{}.self_attn.q_proj.{}".format
    for i in range(3):
        del tensors[name(i, "weight")]
        tensors |= {name(i, "qweight"): torch.ones(4, 60, dtype=torch.int32), name(i, "scales"): torch.ones(1, 60)}
    folder = write_checkpoint(tmp_path, TINY["llama"], tensors)
    has(refusal(load_llm, folder), name(0, "qweight"), "I32", "model.safetensors", "3 of", "GPTQ", "fp16, bf16 or fp32")


# ---------------------------------------------------------------------------------------------------------------------
# Loading


def test_a_tensor_in_pieces_is_the_same(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(model, "PIECE", 2000)
    llm = load_llm(write_checkpoint(tmp_path, TINY["llama"], tiny_tensors("llama")))
    assert all(bit_equal(p, tiny["llama"].state_dict()[name]) for name, p in llm.state_dict().items())
    assert llm.fingerprint == tiny["llama"].fingerprint


def test_a_tied_head_that_is_stored_must_be_the_embedding(tmp_path):
    raw, tensors = {**TINY["qwen2"], "tie_word_embeddings": True}, tiny_tensors("qwen2")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    assert "head.weight" not in load_llm(write_checkpoint(tmp_path, raw, tensors)).state_dict()
    tensors["lm_head.weight"][270, 35] += 1
    has(refusal(load_llm, write_checkpoint(tmp_path, raw, tensors)), tmp_path, "tie_word_embeddings", "lm_head.weight")
    tensors["lm_head.weight"] = torch.ones(270, 36)
    with pytest.raises(ValueError, match="misshapen: lm_head.weight"):
        load_llm(write_checkpoint(tmp_path, raw, tensors))


# ---------------------------------------------------------------------------------------------------------------------
# What a checkpoint is


def words_of(capsys, monkeypatch, *args) -> dict:
    """The lines that `python model.py ARGS` prints, by their first word."""
    monkeypatch.setattr(sys, "argv", ["model.py", *map(str, args)])
    model.main()
    return dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_config_alone_tells_the_sizes(name, tmp_path, capsys, monkeypatch):
    count, raw = PUBLISHED[name]
    (tmp_path / "config.json").write_text(json.dumps(raw))
    said = words_of(capsys, monkeypatch, tmp_path)
    assert said["parameters"] == f"{count:,}" and said["family"] == raw["model_type"]
    assert said["weights"] == "none in this folder" == said["tokenizer"]


def test_a_checkpoint_in_words(bins, tmp_path, capsys, monkeypatch):
    folder = bins("chatglm", shards=2, change=lambda t: t.update({k: v.half() for k, v in t.items()}))
    (folder / "tokenizer.model").write_bytes(b"any")
    size = sum(file.stat().st_size for file in folder.glob("*.bin"))
    said = words_of(capsys, monkeypatch, folder)
    assert said["family"] == "chatglm" and said["tokenizer"] == "tokenizer.model (sentencepiece)"
    assert said["parameters"] == f"{sum(t.numel() for t in tiny_tensors('chatglm').values()):,}"
    has(said["sizes"], "3 layers of width 36", "6 heads of 12 (2 for keys and values)", "MLP 34", "vocabulary 271")
    assert said["weights"] == f"{size:,} bytes of F16 in 2 .bin files; --to-safetensors makes them loadable"
    said = words_of(capsys, monkeypatch, folder, "--to-safetensors", tmp_path / "out")
    size = sum(file.stat().st_size for file in (tmp_path / "out").glob("*.safetensors"))
    assert said["weights"] == f"{size:,} bytes of F16 in 2 .safetensors files"
    assert said["pytorch_model-00002-of-00002.bin"].endswith("model-00002-of-00002.safetensors")


@pytest.mark.parametrize("files, kind", [
    (["qwen.tiktoken"], "qwen.tiktoken (byte-level BPE)"), (["tokenizer.json"], "tokenizer.json (byte"),
    (["vocab.json", "merges.txt", "tokenizer.json"], "merges.txt (byte")])
def test_the_tokenizer_is_known_by_its_files(tmp_path, capsys, files, kind):
    for name in files:
        (tmp_path / name).write_text("")
    (tmp_path / "config.json").write_text(json.dumps(TINY["qwen2"]))
    describe(tmp_path)
    has(capsys.readouterr().out, f"tokenizer   {kind}")


def test_weights_that_do_not_fit_are_an_error(tmp_path, capsys):
    tensors = tiny_tensors("llama")
    del tensors["lm_head.weight"]
    with pytest.raises(ValueError, match="missing: lm_head.weight"):
        describe(write_checkpoint(tmp_path, TINY["llama"], tensors))
    has(capsys.readouterr().out, "family      llama")
