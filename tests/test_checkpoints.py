"""Sizes from config.json, weights from .safetensors or .bin: what is right loads, all else is refused."""
import json
import math
import os
import runpy
import weakref
import zipfile

import pytest
import torch
from conftest import TINY, Bomb, tiny_tensors, write_checkpoint, write_tiny
from safetensors.torch import load_file, save_file

import model
from model import LLM, Config, load_llm

PUBLISHED = {   # the sizes in the models' own config.json, and their number of parameters
    "LLaMA2-7B": (6_738_415_616, dict(
        model_type="llama", hidden_size=4096, intermediate_size=11008, max_position_embeddings=4096,
        num_attention_heads=32, num_hidden_layers=32, num_key_value_heads=32, rms_norm_eps=1e-05,
        rope_scaling=None, hidden_act="silu", tie_word_embeddings=False, torch_dtype="float16",
        vocab_size=32000)),
    "Qwen-1.8B": (1_836_828_672, dict(
        model_type="qwen", hidden_size=2048, intermediate_size=11008, kv_channels=128,
        layer_norm_epsilon=1e-06, no_bias=True, max_position_embeddings=8192, num_attention_heads=16,
        num_hidden_layers=24, rotary_emb_base=10000, rotary_pct=1.0, scale_attn_weights=True, seq_length=8192,
        tie_word_embeddings=False, use_dynamic_ntk=True, use_logn_attn=True, vocab_size=151936)),
    "ChatGLM3-6B": (6_243_584_000, dict(
        model_type="chatglm", add_bias_linear=False, add_qkv_bias=True, apply_query_key_layer_scaling=True,
        apply_residual_connection_post_layernorm=False, attention_softmax_in_fp32=True, ffn_hidden_size=13696,
        fp32_residual_connection=False, hidden_size=4096, kv_channels=128, layernorm_epsilon=1e-05,
        multi_query_attention=True, multi_query_group_num=2, num_attention_heads=32, num_layers=28,
        original_rope=True, padded_vocab_size=65024, post_layer_norm=True, quantization_bit=0, rmsnorm=True,
        seq_length=8192, tie_word_embeddings=False)),
}


def refused(folder, *words):
    """Loading raises one ValueError that has all these words."""
    with pytest.raises(ValueError) as error:
        load_llm(folder)
    for word in map(str, words):
        assert word in str(error.value), f"{word!r} is not in: {error.value}"
    assert "\n" not in str(error.value) or "do not fit" in str(error.value)


# ---------------------------------------------------------------------------------------------------------
# config.json


def write_config(folder, raw: dict):
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(raw))
    return folder


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_sizes(name, tmp_path):
    count, raw = PUBLISHED[name]
    with torch.device("meta"):
        llm = LLM(Config.from_dir(write_config(tmp_path, raw)))
    assert sum(p.numel() for p in llm.parameters()) == count
    assert not any(p.requires_grad for p in llm.parameters())


def test_the_first_of_two_keys_counts(tmp_path):
    """Qwen-7B was trained for 8192 positions, and its config.json names 32768, too."""
    _, raw = PUBLISHED["Qwen-1.8B"]
    raw = raw | {"seq_length": 8192, "max_position_embeddings": 32768}
    assert Config.from_dir(write_config(tmp_path, raw)).max_len == 8192


FAMILIES = ["llama", "mistral", "qwen2", "qwen3", "qwen", "chatglm"]
GPTQ = {"bits": 4, "group_size": 128, "quant_method": "gptq", "modules_to_not_convert": ["lm_head"] * 99}
YARN = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 8192}
PARTIAL = {"rope_type": "default", "partial_rotary_factor": 0.5}


@pytest.mark.parametrize("family, change, words", [
    ("llama", {"model_type": "gpt2"}, ["'gpt2'", *FAMILIES]),
    ("llama", {"model_type": ["llama"]}, ["['llama']", *FAMILIES]),
    ("llama", {"model_type": None}, ["None", *FAMILIES]),
    ("llama", {"rope_scaling": {"factor": 8.0, "rope_type": "llama3"}}, ["low_freq_factor is missing"]),
    ("llama", {"rope_scaling": {"factor": 8.0, "rope_type": "longrope"}}, ["rope_scaling", "longrope"]),
    ("llama", {"rope_scaling": LLAMA3 | {"factor": 0}}, ["factor is 0"]),               # these make NaN
    ("llama", {"rope_scaling": LLAMA3 | {"factor": 1e-320}}, ["factor is 1e-320"]),
    ("llama", {"rope_scaling": LLAMA3 | {"factor": 10**400}}, ["factor is 1000"]),
    ("llama", {"rope_scaling": LLAMA3 | {"high_freq_factor": 1e400}}, ["high_freq_factor is inf"]),
    ("llama", {"rope_scaling": LLAMA3 | {"high_freq_factor": 1.0}}, ["low_freq_factor is 1.0 and"]),
    ("llama", {"rope_theta": 1e-300}, ["rope_theta is 1e-300"]),
    ("llama", {"rope_theta": float("nan")}, ["rope_theta is nan"]),
    ("llama", {"rope_theta": 10**400}, ["rope_theta is 1000"]),
    ("llama", {"rms_norm_eps": 1e-320}, ["rms_norm_eps is 1e-320", "1e-12 to 1.0"]),
    ("llama", {"rms_norm_eps": 1e6}, ["rms_norm_eps is 1000000.0"]),
    ("llama", {"tie_word_embeddings": "no"}, ["tie_word_embeddings is 'no'", "False to True"]),
    ("llama", {"head_dim": None, "hidden_size": 5}, ["0 channels of a head"]),
    ("llama", {"head_dim": 7}, ["7 channels of a head"]),
    ("qwen", {"intermediate_size": 1}, ["intermediate_size is 1"]),
    ("llama", {"max_position_embeddings": None, "max_sequence_length": True}, ["max_sequence_length or"]),
    ("mistral", {"sliding_window": 4096}, ["sliding_window is 4096"]),
    ("llama", {"rope_scaling": "linear"}, ["rope_scaling", "linear"]),
    ("llama", {"rope_parameters": {"rope_type": "default"}, "rope_scaling": {"type": "ntk"}}, ["ntk"]),
    ("llama", {"rope_parameters": PARTIAL}, ["partial_rotary_factor", "0.5"]),
    ("qwen2", {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}}, ["yarn"]),
    ("qwen2", {"rope_scaling": YARN}, ["yarn", "delete the key"]),
    ("qwen2", {"quantization_config": GPTQ}, ["quantization_config", "gptq", "fp16, bf16 or fp32"]),
    ("qwen2", {"use_sliding_window": True}, ["use_sliding_window"]),
    ("qwen", {"rotary_pct": 0.5}, ["rotary_pct", "0.5"]),
    ("chatglm", {"quantization_bit": 4}, ["quantization_bit is 4", "fp16, bf16 or fp32"]),
    ("chatglm", {"rope_ratio": 500}, ["rope_ratio is 500"]),                                    # GLM-4
    ("chatglm", {"original_rope": False}, ["original_rope"]),
    ("chatglm", {"kv_channels": 1e400}, ["kv_channels", "inf"]),
    ("llama", {"vocab_size": 2**63}, ["vocab_size is 9223372036854775808"]),
    ("chatglm", {"ffn_hidden_size": -34}, ["-34"]),
    ("llama", {"hidden_act": "gelu"}, ["hidden_act", "gelu"]),
    ("llama", {"attention_bias": True}, ["attention_bias"]),
    ("llama", {"num_attention_heads": 0}, ["num_attention_heads is 0"]),
    ("llama", {"hidden_size": "36"}, ["hidden_size is '36'"]),
    ("llama", {"hidden_size": 36.0}, ["hidden_size is 36.0"]),
    ("llama", {"num_hidden_layers": 2**31 - 1}, ["num_hidden_layers or num_layers is 2147483647"]),
    ("llama", {"intermediate_size": 2**30}, ["intermediate_size is 1073741824"]),
    ("llama", {"num_hidden_layers": 2.5}, ["num_hidden_layers or num_layers is 2.5"]),
    ("llama", {"vocab_size": -1}, ["vocab_size is -1"]),
    ("llama", {"rms_norm_eps": "small"}, ["small"]),
    ("llama", {"num_key_value_heads": 4}, ["6 heads", "4 key/value heads"]),
])
def test_a_model_that_is_not_implemented_is_refused_in_one_sentence(tmp_path, family, change, words):
    folder = write_config(tmp_path / "x", {**TINY.get(family, TINY["llama"] | {"model_type": family}), **change})
    refused(folder, folder / "config.json", *words)
    with pytest.raises(ValueError) as error:
        Config.from_dir(folder)
    assert len(str(error.value).replace(str(folder), "")) < 330


@pytest.mark.parametrize("family", TINY)
def test_every_size_must_be_in_the_config(tmp_path, family):
    optional = {"model_type", "num_key_value_heads", "multi_query_group_num", "head_dim", "kv_channels",
                "rope_theta", "rotary_emb_base", "add_qkv_bias"}
    for key in TINY[family].keys() - optional:
        raw = {name: value for name, value in TINY[family].items() if name != key}
        refused(write_config(tmp_path, raw), tmp_path / "config.json", key, "missing")


def test_a_broken_config_is_refused(tmp_path):
    refused(tmp_path / "absent", "absent", "not found")
    refused(tmp_path, "config.json", "not found")
    for text, word in {"": "JSON", '{"model_type": "llama",': "JSON", "[1, 2]": "object", "\xff": "JSON",
                       "[" * 100_000: "JSON", '{"hidden_size": ' + "9" * 5000 + "}": "JSON"}.items():
        (tmp_path / "config.json").write_text(text, encoding="latin-1")
        refused(tmp_path, "config.json", word)
    write_config(tmp_path, TINY["llama"])
    expected, text = Config.from_dir(tmp_path), (tmp_path / "config.json").read_text()
    (tmp_path / "config.json").write_text(text, encoding="utf-8-sig")               # as Windows' editor saves it
    assert Config.from_dir(tmp_path) == expected


def test_config_reads_both_homes_of_theta(tmp_path):
    raw = {name: value for name, value in TINY["qwen2"].items() if name != "rope_theta"}
    new = {"rope_parameters": {"rope_theta": 7e5, "rope_type": "default"}}
    for change, theta in [({"rope_theta": 7e5}, 7e5), (new, 7e5), ({}, 1e4)]:
        assert Config.from_dir(write_config(tmp_path, {**raw, **change})).rope_theta == theta


def test_the_first_llamas_call_it_max_sequence_length(tmp_path):
    raw = {name: value for name, value in TINY["llama"].items() if name != "max_position_embeddings"}
    assert Config.from_dir(write_config(tmp_path, raw | {"max_sequence_length": 2048})).max_len == 2048


@pytest.mark.parametrize("files, words", [
    (["adapter_config.json", "adapter_model.safetensors"], ["an adapter of PEFT", "merge"]),
    (["adapter_config.json", "adapter_model.safetensors", "config.json"], ["an adapter of PEFT", "merge"]),
    (["model-q4_0.gguf"], ["GGUF", "whole weights"]),
    (["model-q4_0.gguf", "config.json"], ["GGUF", "whole weights"])])
def test_what_people_take_for_a_checkpoint_is_refused_with_advice(tmp_path, files, words):
    for name in files:
        (tmp_path / name).write_text(json.dumps(TINY["llama"]))
    refused(tmp_path, tmp_path, *words)


# ---------------------------------------------------------------------------------------------------------
# Weights


def write_bin(folder, raw, tensors, shards=0):
    """A checkpoint folder with torch.save's files: pytorch_model.bin, or shards with their index."""
    write_config(folder, raw)
    names = [f"pytorch_model-{i + 1:05}-of-{shards:05}.bin" for i in range(shards)] or ["pytorch_model.bin"]
    homes = {name: names[i % len(names)] for i, name in enumerate(tensors)}
    for file in names:
        torch.save({name: tensors[name] for name in homes if homes[name] == file}, folder / file)
    if shards:
        (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": homes}))
    return folder


@pytest.fixture
def checkpoint(tmp_path):
    """Write the tiny checkpoint of a family: checkpoint("llama", shards=3) -> its folder."""
    return lambda family="llama", shards=0: write_tiny(tmp_path / "llm", family, shards)


@pytest.fixture
def bins(tmp_path):
    """The same in .bin files, with these tensors changed: bins("llama", change={"extra": torch.ones(1)})."""
    return lambda family="llama", shards=0, change=(): write_bin(
        tmp_path / "bin", TINY[family], {**tiny_tensors(family), **dict(change)}, shards)


def equal(llm, theirs) -> bool:
    expected = theirs.state_dict()
    return all(torch.equal(p, expected[name].to(p.dtype)) for name, p in llm.state_dict().items())


def resave(folder, change, name="model.safetensors"):
    """Rewrite a weight file of either kind after change(tensors)."""
    load, save = (torch.load, torch.save) if name.endswith(".bin") else (load_file, save_file)
    tensors = load(folder / name)
    change(tensors)
    save(tensors, folder / name)


@pytest.fixture(params=["safetensors", "bin"])
def shards(request, checkpoint, bins) -> tuple:
    """A checkpoint in seven files of one kind: its folder, the file of its index, and what lies where."""
    folder = (checkpoint if request.param == "safetensors" else bins)(shards=7)
    (index,) = folder.glob("*.index.json")
    return folder, index, json.loads(index.read_text())["weight_map"]


@pytest.mark.parametrize("family", TINY)
@pytest.mark.parametrize("n", [0, 1, 5])
def test_both_kinds_of_files_and_shards_are_the_same(tiny, checkpoint, bins, family, n):
    for folder in (checkpoint(family, n), bins(family, n)):
        llm = load_llm(folder)
        assert equal(llm, tiny[family]) and llm.fingerprint == tiny[family].fingerprint
        assert not any(p.requires_grad for p in llm.parameters())


def test_the_fingerprint_is_of_the_weights(tiny, checkpoint):
    assert tiny["llama"].fingerprint == "639d2864b8aff7e8"                   # saved adapters name it
    llm = load_llm(checkpoint(), dtype=torch.bfloat16)
    assert equal(llm, tiny["llama"]) and llm.fingerprint == tiny["llama"].fingerprint


EMBED, UP, GATE = "model.embed_tokens.weight", *(f"model.layers.1.mlp.{name}_proj.weight" for name in ("up", "gate"))


def move(t, name, there, back):
    t[name][there], t[name][back] = t[name][back].clone(), t[name][there].clone()


@pytest.mark.parametrize("change", [
    lambda t: t[EMBED][270, 35].mul_(1 + 1e-6),                     # the last number
    lambda t: t["model.norm.weight"][20].neg_(),
    lambda t: t[EMBED][200:].add_(1),
    lambda t: t[EMBED][7, 3::4].neg_(),
    lambda t: move(t, EMBED, (7, 3), (7, 5)),                       # two numbers of a row, two rows
    lambda t: move(t, EMBED, 7, 9),
    lambda t: move(t, "model.norm.weight", 7, 9),
    lambda t: t.update({UP: t[GATE], GATE: t[UP]}),
])
def test_the_fingerprint_shows_any_change(tiny, checkpoint, change):
    folder = checkpoint()
    resave(folder, change)
    assert load_llm(folder).fingerprint != tiny["llama"].fingerprint


@pytest.mark.parametrize("dtype", model.FLOATS)
@pytest.mark.parametrize("shape", [(5, 8), (3, 7), (4, 1), (1, 9), (6,), (1,)])
def test_bit_sums_are_what_they_say(dtype, shape):
    numbers = torch.arange(41).add(0.7).log().to(dtype)
    x = numbers[1:1 + math.prod(shape)].view(shape)         # begins within a word
    expected = []
    for row in x.reshape(len(x), -1):
        raw = row.clone().view(torch.uint8).numpy().tobytes()
        if len(row) % 4:
            raw += bytes((4 - len(row) % 4) * x.element_size())
        words = [int.from_bytes(raw[i:i + 8], "little") for i in range(0, len(raw), 8)]
        total = sum(word * (2 * i + 1) for i, word in enumerate(words)) % 2**64
        expected.append(total if total < 2**63 else total - 2**64)
    assert model.bit_sums(x).tolist() == expected
    columns_first = x.T.contiguous().T if x.dim() == 2 else x
    assert model.bit_sums(columns_first).tolist() == expected


@pytest.mark.parametrize("n", [0, 3])
@pytest.mark.parametrize("family", TINY)
def test_however_tensors_lie_in_a_file_they_are_read_right(tiny, tmp_path, family, n):
    ways = [lambda t: torch.stack((t + 1, t, t - 1))[1],                # a part of a larger storage
            lambda t: torch.stack((t, t + 1), dim=-1)[..., 0],          # every second number
            lambda t: t.T.contiguous().T if t.dim() == 2 else t,        # columns first
            lambda t: t[:1].expand_as(t),                               # one row, seen many times
            lambda t: t.bfloat16(), lambda t: torch.nn.Parameter(t.half()), lambda t: t.double()]
    tensors = {name: ways[i % 7](t) for i, (name, t) in enumerate(tiny_tensors(family).items())}
    head, embedding = (model.sources(tiny[family].config, name)[0] for name in ("head.weight", "embed.weight"))
    tensors[head] = tensors[embedding]                                  # one storage, two names
    plain = {name: t.detach().clone(memory_format=torch.contiguous_format) for name, t in tensors.items()}
    expected = load_llm(write_checkpoint(tmp_path / "plain", TINY[family], plain), dtype=torch.float64)
    llm = load_llm(write_bin(tmp_path / "bin", TINY[family], tensors, n), dtype=torch.float64)
    assert equal(llm, expected) and llm.fingerprint == expected.fingerprint


def test_no_tensor_outlives_its_turn(bins, checkpoint, monkeypatch):
    """So loading takes no more memory than the weights and what is being read."""
    seen, open_tensors = [], model.open_tensors

    def watched(file):
        assert sum(tensor() is not None for tensor in seen) <= 2            # the one just read, and what all hold
        tensors = open_tensors(file)
        seen.append(weakref.ref(tensors["model.norm.weight"]))
        return tensors

    monkeypatch.setattr(model, "open_tensors", watched)
    for folder in (bins(), checkpoint()):
        seen.clear()
        load_llm(folder)
        assert len(seen) == len(tiny_tensors("llama")) + 1


@pytest.mark.parametrize("family, name", [
    ("llama", "model.layers.2.self_attn.rotary_emb.inv_freq"),
    ("chatglm", "transformer.rotary_pos_emb.inv_freq")])
def test_published_rotary_tables_are_let_be(checkpoint, bins, family, name):
    folder = checkpoint(family)
    resave(folder, lambda t: t.update({name: torch.ones(5)}))
    load_llm(folder)
    load_llm(bins(family, change={name: torch.ones(1).expand(1 << 40)}))    # 4 TB, from one number


def test_a_tied_head_that_is_stored_must_be_the_embedding(tmp_path):
    raw, tensors = {**TINY["qwen2"], "tie_word_embeddings": True}, tiny_tensors("qwen2")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    assert "head.weight" not in load_llm(write_checkpoint(tmp_path, raw, tensors)).state_dict()
    tensors["lm_head.weight"][270, 35] += 1
    refused(write_checkpoint(tmp_path, raw, tensors), tmp_path, "tie_word_embeddings", "lm_head.weight")
    tensors["lm_head.weight"] = torch.ones(270, 36)
    refused(write_checkpoint(tmp_path, raw, tensors), "misshapen: lm_head.weight")


# ---------------------------------------------------------------------------------------------------------
# Weights that are refused


def test_every_wrong_tensor_is_named(checkpoint):
    folder, name = checkpoint(), "model.layers.{}.self_attn.{}_proj.weight".format

    def damage(t):
        del t["lm_head.weight"], t[name(0, "v")]
        t["model.layers.3.input_layernorm.weight"] = torch.ones(36)     # one layer too many
        t["model.embed_tokens.weight"] = torch.ones(270, 36)
        t["model.norm.weight"] = torch.tensor(1.0)
        t[name(1, "q")], t[name(1, "k")] = t[name(1, "k")], t[name(1, "q")]     # stacked, they look right

    resave(folder, damage)
    refused(folder, folder, "missing: lm_head.weight", f"missing: {name(0, 'v')}", "model.norm.weight is []")
    refused(folder, "unused: model.layers.3.input_layernorm.weight", "model.safetensors")
    refused(folder, "model.embed_tokens.weight is [270, 36]", "[271, 36]", "model.safetensors")
    refused(folder, name(1, "q"), name(1, "k"), "[20, 36]", "[60, 36]")


def test_a_long_list_is_cut_but_counted(checkpoint):
    folder = checkpoint()
    write_config(folder, TINY["llama"] | {"num_hidden_layers": 99})
    with pytest.raises(ValueError, match="864 weights do not fit config.json:\n  missing: model.layers.3") as error:
        load_llm(folder)
    assert len(str(error.value)) < 2000


def test_a_misshapen_tensor_is_named_with_its_own_shard(shards):
    folder, _, homes = shards
    name = "model.layers.2.self_attn.v_proj.weight"
    resave(folder, lambda t: t.update({name: torch.ones(20, 35)}), homes[name])
    refused(folder, f"misshapen: {name}", "[20, 35]", "[20, 36]", homes[name])


def test_quantised_weights_are_refused(checkpoint):
    folder, name = checkpoint(), "model.layers.{}.self_attn.q_proj.{}".format

    def quantise(t):
        for i in range(3):
            t[name(i, "qweight")] = t.pop(name(i, "weight")).to(torch.int32)

    resave(folder, quantise)
    refused(folder, name(0, "qweight"), "torch.int32", "model.safetensors", "fp16, bf16 or fp32")


@pytest.mark.filterwarnings("ignore")                           # some kinds are on their way out of torch
@pytest.mark.parametrize("make, word", [
    (lambda: torch.eye(4).to_sparse(), "_rebuild_sparse_tensor"),
    (lambda: torch.quantize_per_tensor(torch.ones(3, 3), 0.1, 0, torch.qint8), "_rebuild_qtensor"),
    (lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]), "_rebuild_nested_tensor"),
    (lambda: torch.empty(3, device="meta"), "_rebuild_meta_tensor"),
    (lambda: torch.ones(3, dtype=torch.float8_e4m3fn), "_rebuild_tensor_v3"),
    (lambda: [1.0, 2.0], "lm_head.weight is no plain dense tensor"),
    (lambda: {"weight": torch.ones(3)}, "lm_head.weight is no plain dense tensor"),
    (lambda: torch.ones(3, dtype=torch.int32), "torch.int32: lm_head.weight"),
    (lambda: torch.ones(3, dtype=torch.complex64), "complex64: lm_head.weight"),
    (lambda: torch.ones(1).expand(1 << 40, 36), "lm_head.weight is [1099511627776, 36]"),
], ids=["sparse", "quantised", "nested", "meta", "fp8", "list", "dict", "integers", "complex", "huge"])
def test_tensors_that_are_not_plain_floats_are_refused(bins, make, word):
    refused(bins(change={"lm_head.weight": make()}), "pytorch_model.bin", word)


def test_a_tensor_in_two_files_is_refused_unless_the_index_tells_them_apart(tiny, shards):
    folder, index, homes = shards
    name, other = "model.embed_tokens.weight", homes["lm_head.weight"]
    resave(folder, lambda t: t.update({name: torch.ones(271, 36)}), other)
    assert equal(load_llm(folder), tiny["llama"])
    home = homes.pop(name)
    index.write_text(json.dumps({"weight_map": homes}))
    refused(folder, name, home, other)
    index.unlink()
    refused(folder, name, home, other)


def test_an_index_that_is_wrong_is_refused(shards):
    folder, index, homes = shards
    above = {**homes, "x": "../x.safetensors"}
    for found in ({}, {"weight_map": {}}, {"weight_map": []}, {"weight_map": above}, {"weight_map": {"x": ["x.bin"]}},
                  {"weight_map": {"x": "x" * 9999 + ".safetensors"}}, {"weight_map": {"x": "\0.safetensors"}}, [], 3):
        index.write_text(json.dumps(found))
        refused(folder, index, "weight_map" if isinstance(found, dict) else "expected an object")
    index.write_text("[" * 100_000)
    refused(folder, index, "not valid JSON")
    index.write_text(json.dumps({"weight_map": {**homes, "lm_head.weight": homes["model.norm.weight"]}}))
    refused(folder, "missing: lm_head.weight")


def test_incomplete_downloads_are_refused(shards):
    folder, index, homes = shards
    file = folder / homes["model.norm.weight"]
    whole = file.read_bytes()
    for content in (whole[:len(whole) // 2], whole[:9], b"", b"PK\3\4", b"junk"):
        file.write_bytes(content)
        refused(folder, file, "not a whole")
    file.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    refused(folder, file, "git-lfs pointer")
    file.unlink()
    refused(folder, file, "missing", "index")
    for name in {index.name, *homes.values()}:
        (folder / name).unlink(missing_ok=True)
    refused(folder, folder, ".safetensors", ".bin")


def test_bin_files_of_other_things_are_refused(bins):
    folder = bins()
    file = folder / "pytorch_model.bin"
    torch.save(tiny_tensors("llama"), file, _use_new_zipfile_serialization=False)
    refused(folder, file, "no whole zip archive", "torch 1.6")          # the format before that
    for content, word in [([torch.ones(3)], "not a whole"), ({"weight": [1.0]}, "weight is no plain")]:
        torch.save(content, file)
        refused(folder, file, word)


@pytest.mark.parametrize("old_format", [False, True], ids=["zip", "old"])
def test_nothing_in_a_hostile_file_is_run(bins, tmp_path, old_format):
    canary, folder = tmp_path / "canary", bins()
    file = folder / "pytorch_model.bin"
    hostile = {**tiny_tensors("llama"), "lm_head.weight": Bomb(canary)}
    torch.save(hostile, file, _use_new_zipfile_serialization=not old_format)
    refused(folder, file, "nothing in it was run")
    if not old_format:
        refused(folder, "mkdir")
    assert not canary.exists()
    torch.load(file, weights_only=False)
    assert canary.exists()                                              # it was a live one


def rezip(file, change, kind=zipfile.ZIP_STORED):
    """Write a zip archive again with change(name, content) of each entry, stored or compressed."""
    with zipfile.ZipFile(file) as archive:
        entries = {entry.filename: archive.read(entry) for entry in archive.infolist()}
    with zipfile.ZipFile(file, "w", kind) as archive:
        for name, content in entries.items():
            archive.writestr(name, change(name, content))


def test_a_compressed_bin_is_refused(bins, tiny):
    folder = bins()
    rezip(folder / "pytorch_model.bin", lambda name, content: content)
    assert equal(load_llm(folder), tiny["llama"])
    rezip(folder / "pytorch_model.bin", lambda name, content: content, zipfile.ZIP_DEFLATED)
    refused(folder, "pytorch_model.bin", "compressed", "torch.save")


# Tuples that hold the one before twice, from () on: sixty steps to 2**60 parts, which a dictionary would walk through.
LAUGHS = b"\x80\2)q\0" + b"".join(b"h%ch%c\x86q%c" % (i, i, i + 1) for i in range(60))


@pytest.mark.parametrize("program, word", [
    (b"\x80\2cbuiltins\nbytearray\nJ\0\0\0\x7f\x85R.", "builtins bytearray"),                 # 2 GB
    (b"\x80\2ctorch.storage\nUntypedStorage\nJ\0\0\0\x7f\x85R.", "torch.storage UntypedStorage"),
    (b"\x80\2}" + LAUGHS + b"K\1s.", "used twice"),
    (LAUGHS + b"Q.", "used twice"),
    (b"\x80\2" + b"(" * 300_000 + b".", "its list of tensors has 300003 bytes"),
    (b"", "pickle"), (b"\x80\2", "pickle"), (b"\x80\2h\7.", "'7'"),
], ids=["bytearray", "storage", "key", "number", "long", "empty", "cut", "no such memory"])
def test_a_bin_that_would_take_memory_or_time_is_refused(bins, program, word):
    folder = bins()
    rezip(folder / "pytorch_model.bin", lambda name, content: program if name.endswith("data.pkl") else content)
    refused(folder, "pytorch_model.bin", word)


def test_a_tensor_that_claims_its_neighbours_numbers_is_refused(bins):
    folder = bins()
    claim = [b"K" + bytes([36]) + b"tq", b"K" + bytes([40]) + b"tq"]        # 36 numbers, 40
    rezip(folder / "pytorch_model.bin", lambda name, content: content.replace(*claim, 1))
    refused(folder, "pytorch_model.bin", "numbers that are not theirs")


def test_weights_that_are_one_number_seen_many_times_are_refused(bins):
    """A config.json may ask for as much, and a .bin of a few bytes give it."""
    folder = bins(change={name: torch.ones(1).expand(1 << 23, 36) for name in (EMBED, "lm_head.weight")})
    write_config(folder, TINY["llama"] | {"vocab_size": 1 << 23})
    refused(folder, "they take 24160", "but the files have")


def test_names_that_a_terminal_would_obey_are_refused(checkpoint, bins):
    for folder in (checkpoint(), bins()):
        (file,) = folder.glob("*model.*")
        resave(folder, lambda t: t.update({"\x1b[31m": torch.ones(1)}), file.name)
        refused(folder, file, r"\x1b[31m")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no such files here")
@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "pytorch_model.bin"])
def test_a_fifo_in_the_place_of_a_file_is_refused(tmp_path, name):
    folder = write_config(tmp_path, TINY["llama"])
    (folder / name).unlink(missing_ok=True)
    os.mkfifo(folder / name)
    refused(folder, folder / name, "not found" if name == "config.json" else "no ordinary file")


def test_safetensors_are_taken_first(checkpoint, tiny, monkeypatch):
    folder = checkpoint()
    (folder / "pytorch_model.bin").write_bytes(b"never opened")
    monkeypatch.setattr(torch, "load", None)
    assert equal(load_llm(folder), tiny["llama"])


# ---------------------------------------------------------------------------------------------------------
# python model.py


def test_the_command_line_ends_with_one_line(bins, monkeypatch):
    folder = bins(change={"extra": torch.ones(1)})
    for args, word in [([], "python model.py DIR"), ([folder], "unused: extra"), ([folder / "x"], "not found")]:
        monkeypatch.setattr("sys.argv", ["model.py", *map(str, args)])
        with pytest.raises(SystemExit) as end:              # its code is a text: Python prints it and exits with 1
            runpy.run_path(model.__file__, run_name="__main__")
        assert end.value.code.startswith("error: ") and word in end.value.code
