"""What the tests share: where things are, tiny checkpoints in the four published layouts, a tokenizer of bytes."""
import json
import os
import pickle
import shutil
import signal
import zlib
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import eval
import train
from adapter import AdapterConfig, MSEAdapter
from model import load_llm
from release import OFFICIAL_NAMES
from support import guards
from support.pickles import read_pickle

HERE = Path(__file__).resolve().parent
SHARED = HERE / "../../shared"          # beside the repository: real tokenizers, a real tiny LLM
signal.signal(signal.SIGINT, signal.default_int_handler)        # what a script starts with "&" ignores it
torch.set_num_threads(1)                # for tensors this small a second thread only waits


def need_shared(*parts) -> Path:
    """A file or folder of ../shared; skips the test where there is none."""
    path = SHARED.joinpath(*parts)
    if not path.exists():
        pytest.skip(f"needs ../shared/{'/'.join(parts)}, which is not part of the repository")
    return path


def need_smollm2() -> Path:
    """The folder that ../shared/weights/make_smollm2.py makes, beside it or where SMOLLM2 says."""
    return Path(os.environ.get("SMOLLM2") or need_shared("weights", "SmolLM2-135M-Instruct"))


def small_data(folder: Path, change=lambda rows: rows) -> Path:
    """The first rows of the demo's data, in the published format."""
    for split, n in (("train", 40), ("valid", 12), ("test", 12)):
        rows = read_pickle(HERE.parent / "demo" / f"demo_{split}.pkl")[:n]
        with open(folder / f"demo_{split}.pkl", "wb") as file:
            pickle.dump(change(rows), file, 4)
    return folder


@pytest.fixture(autouse=True)
def few_draws(monkeypatch):
    """Intervals in a tenth of the time; test_metrics.py tests them in full."""
    monkeypatch.setattr(eval, "bootstrap", partial(eval.bootstrap, draws=100))


@pytest.fixture(autouse=True)
def own_signals():
    """What a test makes of signals ends with it: a later one's Ctrl-C would else kill all tests."""
    before = {number: signal.getsignal(number) for number in guards.SIGNALS}
    for number, handler in before.items():
        if handler is signal.SIG_IGN:           # under nohup, say; what a test starts would inherit it
            signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return small_data(tmp_path_factory.mktemp("data"))


def flags(data: Path, out: Path, *more) -> list[str]:
    return ["--data-dir", str(data), "--out", str(out), "--epochs", "2", "--batch-size", "8", "--device", "cpu", *more]


def essence(out: Path, seed: int = 1111) -> dict:
    """What two runs of one seed must share to the byte: all but the times. A finished run holds no state."""
    run = out / str(seed)
    files = {file.name for file in run.iterdir()}
    assert files >= {
        ".lock", "settings.json", "features.json", "log.jsonl", "report.svg", "adapter.safetensors", "predictions.csv",
        "metrics.json", "results.json"}
    assert not [name for name in files if name.startswith("state-") or name.endswith(".new")]
    log = [{k: v for k, v in json.loads(line).items() if k != "seconds"} for line in (run / "log.jsonl").open()]
    return {"log": log, **{name: (run / name).read_bytes() for name in ("adapter.safetensors", "predictions.csv")}}


@pytest.fixture(scope="module")
def finished(data, tmp_path_factory):
    out = tmp_path_factory.mktemp("finished")
    train.main(flags(data, out))
    return out


@pytest.fixture(scope="module")
def interrupted(data, tmp_path_factory):
    """A run that Ctrl-C ended while it validated its second epoch: two states are there."""
    out = tmp_path_factory.mktemp("interrupted")

    def interrupt(*args, evaluate=train.evaluate):
        if list(out.glob("1111/state-0001-000005-*")):          # the second epoch's steps are done
            raise KeyboardInterrupt
        return evaluate(*args)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(train, "evaluate", interrupt)
        train.main(flags(data, out))
    assert len(list(out.glob("1111/state-*"))) == 2
    return out


@pytest.fixture
def begun(interrupted, tmp_path):
    """A copy of it, to go on with or to damage."""
    shutil.copytree(interrupted, tmp_path, dirs_exist_ok=True)
    return tmp_path


def close(ours, theirs, tolerance: float = 1e-5):
    torch.testing.assert_close(ours, theirs, rtol=0, atol=tolerance, check_dtype=False)


def near(ours, theirs, tolerance: float = 1e-6):
    """Equal but for a share of the largest number: the same verdict on every processor, whatever the numbers' size."""
    assert ours.shape == theirs.shape
    gap = (ours.double() - theirs.double()).abs().max()
    assert gap <= tolerance * theirs.abs().max(), f"off by {gap:.1e}, the largest is {theirs.abs().max():.1e}"


class Bomb:
    """Unpickled, it makes a folder: a canary."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


# ---------------------------------------------------------------------------------------------------------------------
# Checkpoints


def recipe(name: str, shape, std: float, mean: float = 0.0):
    """A tensor that is a function of its name alone: the golden files' recipe for every weight and feature."""
    r = np.random.RandomState(zlib.crc32(name.encode()))                # numpy guarantees that its stream never changes
    return torch.from_numpy((r.standard_normal(shape) * std + mean).astype(np.float32))


TINY = {    # config.json of each family, at odd sizes that tell the dimensions apart
    "llama": dict(
        model_type="llama", hidden_size=36, num_hidden_layers=3, num_attention_heads=6, num_key_value_heads=2,
        head_dim=10, intermediate_size=34, vocab_size=271, max_position_embeddings=900, rms_norm_eps=1e-5,
        rope_theta=5000.0),
    "qwen2": dict(
        model_type="qwen2", hidden_size=48, num_hidden_layers=3, num_attention_heads=6, num_key_value_heads=3,
        intermediate_size=34, vocab_size=271, max_position_embeddings=900, rms_norm_eps=1e-6, rope_theta=1e6),
    "qwen": dict(
        model_type="qwen", hidden_size=36, num_hidden_layers=3, num_attention_heads=6, kv_channels=6,
        intermediate_size=68, vocab_size=271, seq_length=900, layer_norm_epsilon=1e-6, rotary_emb_base=10000),
    "chatglm": dict(
        model_type="chatglm", hidden_size=36, num_layers=3, num_attention_heads=6, multi_query_group_num=2,
        kv_channels=12, ffn_hidden_size=34, padded_vocab_size=271, seq_length=900, layernorm_epsilon=1e-5,
        add_qkv_bias=True),
}


def published_shapes(raw: dict) -> dict:
    """Names and shapes of the tensors that a checkpoint with this config.json holds, as the families publish them."""
    C, H = raw["hidden_size"], raw["num_attention_heads"]
    V, F = raw.get("vocab_size") or raw["padded_vocab_size"], raw.get("intermediate_size") or raw["ffn_hidden_size"]
    if raw["model_type"] == "qwen":
        F, W = F // 2, H * raw["kv_channels"]
        shapes = {"transformer.wte.weight": (V, C), "transformer.ln_f.weight": (C,), "lm_head.weight": (V, C)}
        layer, parts = "transformer.h.{}.", {
            "ln_1.weight": (C,), "ln_2.weight": (C,), "attn.c_attn.weight": (3 * W, C), "attn.c_attn.bias": (3 * W,),
            "attn.c_proj.weight": (C, W), "mlp.w1.weight": (F, C), "mlp.w2.weight": (F, C), "mlp.c_proj.weight": (C, F)}
    elif raw["model_type"] == "chatglm":
        W = H * raw["kv_channels"]
        Q = W + 2 * raw["multi_query_group_num"] * raw["kv_channels"]
        shapes = {"transformer.embedding.word_embeddings.weight": (V, C), "transformer.output_layer.weight": (V, C),
                  "transformer.encoder.final_layernorm.weight": (C,)}
        layer, parts = "transformer.encoder.layers.{}.", {
            "input_layernorm.weight": (C,), "post_attention_layernorm.weight": (C,),
            "self_attention.query_key_value.weight": (Q, C), "self_attention.query_key_value.bias": (Q,),
            "self_attention.dense.weight": (C, W),
            "mlp.dense_h_to_4h.weight": (2 * F, C), "mlp.dense_4h_to_h.weight": (C, F)}
    else:
        D = raw.get("head_dim") or C // H
        sizes = dict(q=H * D, k=raw["num_key_value_heads"] * D, v=raw["num_key_value_heads"] * D)
        shapes = {"model.embed_tokens.weight": (V, C), "model.norm.weight": (C,), "lm_head.weight": (V, C)}
        layer, parts = "model.layers.{}.", {
            "input_layernorm.weight": (C,), "post_attention_layernorm.weight": (C,),
            "mlp.gate_proj.weight": (F, C), "mlp.up_proj.weight": (F, C), "mlp.down_proj.weight": (C, F),
            "self_attn.o_proj.weight": (C, H * D),
            **{f"self_attn.{x}_proj.weight": (size, C) for x, size in sizes.items()}}
        if raw["model_type"] == "qwen2":
            parts |= {f"self_attn.{x}_proj.bias": (size,) for x, size in sizes.items()}
    layers = raw.get("num_hidden_layers") or raw["num_layers"]
    return shapes | {layer.format(i) + name: shape for i in range(layers) for name, shape in parts.items()}


def published_tensors(raw: dict, prefix: str = "") -> dict:
    """The recipe's weights for such a checkpoint: nothing is left at zero or one."""
    def tensor(name, shape):
        if len(shape) == 1:
            return recipe(prefix + name, shape, 0.1, mean=1.0 if "norm" in name or "ln_" in name else 0.0)
        return recipe(prefix + name, shape, 0.5 if "embed" in name or "wte" in name else 0.2)

    return {name: tensor(name, shape) for name, shape in published_shapes(raw).items()}


def tiny_tensors(family: str) -> dict:
    return published_tensors(TINY[family], f"tiny.{family}.")


def write_checkpoint(folder: Path, raw: dict, tensors: dict, shards: int = 0) -> Path:
    """A checkpoint folder: one .safetensors file, or shards with their index."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(raw))
    if not shards:
        save_file(tensors, folder / "model.safetensors")
        return folder
    home = {name: f"model-{i % shards + 1:05}-of-{shards:05}.safetensors" for i, name in enumerate(tensors)}
    for file in set(home.values()):
        save_file({name: tensors[name] for name in home if home[name] == file}, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": home}))
    return folder


def write_tiny(folder: Path, family: str, shards: int = 0) -> Path:
    return write_checkpoint(folder, TINY[family], tiny_tensors(family), shards)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """family -> its tiny backbone, loaded from disk. Shared by all tests, so nobody may change one."""
    return {family: load_llm(write_tiny(tmp_path_factory.mktemp(family), family)) for family in TINY}


@pytest.fixture(scope="session")
def tiny64(tmp_path_factory):
    """The same in float64, where what is algebraically equal is equal to 1e-6: rotation and logits are fp32 inside."""
    return {family: load_llm(write_tiny(tmp_path_factory.mktemp(family), family), dtype=torch.float64)
            for family in TINY}


# ---------------------------------------------------------------------------------------------------------------------
# Text


class ByteTokenizer:
    """Each byte is a token; in front of them stand the special tokens of all families."""
    special = ["<unk>", "<s>", "</s>", "[gMASK]", "sop", "<|im_start|>", "<|endoftext|>"]
    size = len(special) + 256

    def encode(self, text: str) -> list[int]:
        return [len(self.special) + byte for byte in text.encode()]

    def decode(self, ids: list[int]) -> str:
        first = len(self.special)
        return bytes(i - first for i in ids if first <= i < self.size).decode("latin-1")    # every byte shows

    def token_id(self, name: str) -> int:
        return self.special.index(name)


# ---------------------------------------------------------------------------------------------------------------------
# Adapters


def random_adapter(config: AdapterConfig) -> MSEAdapter:
    """An adapter with the recipe's weights, by their official names: std 0.15 (matrices) or 0.05 (vectors)."""
    adapter = MSEAdapter(config)
    for name, p in adapter.named_parameters():
        official = OFFICIAL_NAMES.get(name, name)       # a fork's own layers have their own names
        p.data = recipe(f"adapter.{official}", p.shape, 0.15 if p.dim() > 1 else 0.05)
    return adapter
