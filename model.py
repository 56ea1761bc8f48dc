"""The frozen backbone: one decoder-only transformer that runs the published LLaMA2, Qwen and ChatGLM3 checkpoints.

    Config     the sizes, read from the checkpoint's own config.json
    LLM        embeddings -> blocks of attention and SwiGLU -> norm -> output head; greedy decoding from embeddings
    KVCache    the keys and values of the positions already read
    Recompute  gradient checkpointing, written by hand
    NAMES      our parameter names and each family's
    load_llm   .safetensors or .bin -> device, tensor by tensor, strict both ways

    python model.py DIR         what a checkpoint is

The families differ by data (sizes, biases, the pairing of rotary channels, tensor names), never by class.

Shapes: B rows, T new positions, S cached + new positions, C width (dim), H query heads, K key/value heads, D width of
a head, R rotated channels of a head, V vocabulary, N real positions of all rows together.
"""
import hashlib
import json
import os
import re
import sys
from dataclasses import dataclass, fields
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open

# ---------------------------------------------------------------------------------------------------------------------
# Config


@dataclass(frozen=True)
class Config:
    """The sizes of a backbone and the few switches by which the families differ."""
    family: str             # model_type in config.json, a key of NAMES
    dim: int                # C
    n_layer: int
    n_head: int             # H
    n_kv_head: int          # K; H is a multiple of it
    head_dim: int           # D
    ffn_dim: int
    vocab_size: int         # V: rows of the embedding, which may exceed the tokenizer's size
    max_len: int            # positions the backbone was trained for; more are refused
    norm_eps: float
    rope_theta: float = 10000.0
    rope_dim: int = 0       # R
    rope_interleaved: bool = False  # channels (0,1), (2,3), ... turn together; otherwise (0,R/2), (1,R/2+1), ...
    qkv_bias: bool = False
    tied_head: bool = False  # the output head is the embedding matrix

    @classmethod
    def from_dir(cls, path) -> "Config":
        """Read `path`/config.json. Raises ValueError for a family or a feature that this transformer does not have."""
        file = Path(path) / "config.json"
        if not file.parent.is_dir():
            raise ValueError(f"{file.parent}: no such folder; expected a checkpoint in Hugging Face layout")
        raw = read_json(file)
        check_features(raw, file)
        family = raw["model_type"]
        try:
            sizes = SIZES[family](raw)
            wrong = [f"{f.name} is {sizes[f.name]!r}, expected a positive number"
                     for f in fields(cls) if f.name in sizes and not is_size(sizes[f.name], f.type)]
            if not wrong and sizes["n_head"] % sizes["n_kv_head"]:
                wrong = [f"{sizes['n_head']} heads cannot share {sizes['n_kv_head']} key/value heads evenly"]
        except KeyError as error:
            wrong = [f"the key {error} is missing, which the {family!r} models implemented here have"]
        except (TypeError, ValueError, ZeroDivisionError, OverflowError) as error:
            wrong = [f"a size is not a positive number ({error})"]
        if wrong:
            raise ValueError(f"{file}: {', '.join(wrong)}; fetch the file again, or take another backbone")
        return cls(family=family, **sizes)


def is_size(value, kind: type) -> bool:
    """Whether a value of config.json can be a field of this type: numbers are above 0, and what a tensor can hold."""
    if kind is bool:
        return isinstance(value, bool)
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return False
    return 0 < value < 2**40 and value == kind(value)


# What this transformer takes for granted. A config.json that sets one of these keys to anything else is refused.
FIXED = {
    "quantization_config": None, "quantization_bit": 0,                        # whole weights only
    "rope_ratio": 1, "rotary_pct": 1.0, "partial_rotary_factor": 1.0, "original_rope": True,
    "hidden_act": "silu", "use_sliding_window": False,
    "attention_bias": False, "mlp_bias": False, "no_bias": True, "add_bias_linear": False,
    "rmsnorm": True, "post_layer_norm": True, "apply_residual_connection_post_layernorm": False,
    "multi_query_attention": True, "scale_attn_weights": True, "fp32_residual_connection": False,
}


def check_features(raw: dict, file: Path):
    """Raise ValueError for a family or a feature that is not implemented. Newer files nest rotary keys: lift them."""
    family = raw.get("model_type")
    if family not in list(SIZES):
        raise ValueError(f"{file}: model_type is {family!r}; use a backbone of a family that is implemented: llama "
                         "(LLaMA, LLaMA2), qwen (Qwen), qwen2 (Qwen1.5, Qwen2, Qwen2.5) or chatglm (ChatGLM3)")
    for key in ("rope_scaling", "rope_parameters"):
        rope = raw.get(key) or {}
        kind = rope.get("rope_type", rope.get("type", "default")) if isinstance(rope, dict) else rope
        if kind != "default":
            raise ValueError(f"{file}: {key} is {rope!r:.100}, but only the plain rotary embedding is implemented; "
                             "use a model trained without scaling (where it was added for long texts, delete the key)")
        raw |= {name: rope[name] for name in ("rope_theta", "partial_rotary_factor") if name in rope}
    for key, value in FIXED.items():
        if raw.get(key) not in (None, value):
            better = "another of its family"
            if key.startswith("quantization"):
                better = "its version in fp16, bf16 or fp32"
            raise ValueError(f"{file}: {key} is {raw[key]!r:.100}, but only {value!r} is implemented; instead of this "
                             f"model use {better}")


def llama_sizes(raw: dict) -> dict:
    heads = raw["num_attention_heads"]
    head_dim = raw.get("head_dim") or raw["hidden_size"] // heads
    return dict(
        dim=raw["hidden_size"], n_layer=raw["num_hidden_layers"], n_head=heads, head_dim=head_dim,
        n_kv_head=raw.get("num_key_value_heads") or heads, ffn_dim=raw["intermediate_size"],
        vocab_size=raw["vocab_size"], max_len=raw["max_position_embeddings"], norm_eps=raw["rms_norm_eps"],
        rope_theta=raw.get("rope_theta") or 10000.0, rope_dim=head_dim, tied_head=bool(raw.get("tie_word_embeddings")))


def qwen2_sizes(raw: dict) -> dict:
    return llama_sizes(raw) | {"qkv_bias": True}


def qwen_sizes(raw: dict) -> dict:
    # Beyond seq_length Qwen scales attention by log n and stretches the rotary base; up to it both are the identity.
    return dict(
        dim=raw["hidden_size"], n_layer=raw["num_hidden_layers"], n_head=raw["num_attention_heads"],
        head_dim=raw["kv_channels"], n_kv_head=raw["num_attention_heads"], ffn_dim=raw["intermediate_size"] // 2,
        vocab_size=raw["vocab_size"], max_len=raw["seq_length"], norm_eps=raw["layer_norm_epsilon"],
        rope_theta=raw["rotary_emb_base"], rope_dim=raw["kv_channels"], qkv_bias=True)


def chatglm_sizes(raw: dict) -> dict:
    return dict(
        dim=raw["hidden_size"], n_layer=raw["num_layers"], n_head=raw["num_attention_heads"],
        head_dim=raw["kv_channels"], n_kv_head=raw["multi_query_group_num"], ffn_dim=raw["ffn_hidden_size"],
        vocab_size=raw["padded_vocab_size"], max_len=raw["seq_length"], norm_eps=raw["layernorm_epsilon"],
        rope_dim=raw["kv_channels"] // 2, rope_interleaved=True, qkv_bias=raw["add_qkv_bias"])


SIZES = {"llama": llama_sizes, "qwen2": qwen2_sizes, "qwen": qwen_sizes, "chatglm": chatglm_sizes}


# ---------------------------------------------------------------------------------------------------------------------
# The transformer


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight, computed in fp32 whatever the dtype of x."""

    def __init__(self, dim: int, eps: float):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(dim)), eps

    def forward(self, x):
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


def rope_table(positions, config: Config):
    """Positions (B, T) -> cosines and sines (B, 1, T, R/2) in fp32, shared by all layers and heads."""
    steps = torch.arange(0, config.rope_dim, 2, device=positions.device).float() / config.rope_dim
    angle = positions[:, None, :, None].float() * (1.0 / config.rope_theta ** steps)
    return angle.cos(), angle.sin()


def apply_rope(x, rope, interleaved: bool):
    """Turn the first R channels of each head of x (B, heads, T, D) by its position's angles; the others stay."""
    cos, sin = rope
    R = 2 * cos.size(-1)
    turned, rest = x[..., :R].float(), x[..., R:]
    if interleaved:
        a, b = turned[..., 0::2], turned[..., 1::2]                                               # (B, heads, T, R/2)
    else:
        a, b = turned.chunk(2, dim=-1)
    a, b = a * cos - b * sin, b * cos + a * sin
    if interleaved:
        turned = torch.stack((a, b), dim=-1).flatten(-2)
    else:
        turned = torch.cat((a, b), dim=-1)
    return torch.cat((turned.type_as(x), rest), dim=-1)


class KVCache:
    """Keys and values of the positions already read, layer by layer; new ones are joined behind them.

    A frozen one stores nothing new: rows go on behind it, again and again. Its one row serves all rows of a batch.
    """

    def __init__(self, n_layer: int):
        self.layers = [None] * n_layer      # each (k, v), both (B or 1, K, S, D)
        self.frozen = False
        self.origin = 0                     # how many of the cached positions do not count: new ones start after them

    @property
    def length(self) -> int:
        """Positions cached."""
        if self.layers[-1] is None:
            return 0
        return self.layers[-1][0].size(2)

    def extend(self, layer: int, k, v):
        """Keys and values (B, K, T, D) of the new positions -> those of all S positions."""
        if self.layers[layer] is not None:
            k_past, v_past = (past.expand(len(k), -1, -1, -1) for past in self.layers[layer])
            k, v = torch.cat((k_past, k), dim=2), torch.cat((v_past, v), dim=2)                   # (B, K, S, D)
        if not self.frozen:
            self.layers[layer] = k, v
        return k, v

    def copy(self) -> "KVCache":
        """One that holds the same so far, and stores."""
        copy = KVCache(len(self.layers))
        copy.layers = list(self.layers)
        return copy


class Places(NamedTuple):
    """Where the T new positions stand; the same for all blocks but the last."""
    rope: tuple             # see rope_table
    sees: torch.Tensor      # (B or 1, 1, T, S) bool: which positions each new one looks at
    real: torch.Tensor | None       # (N,): the new positions of all rows, B * T in a line, without padding; None: all
    last: int               # how many positions, from the end of each row, are wanted after the block


def at_real(module, x, real):
    """Apply a module that treats each position alone to the real ones of x (B, T, C); padding gets zeros."""
    if real is None:
        return module(x)
    y = module(x.flatten(0, 1).index_select(0, real))                                             # (N, C')
    rows = y.new_zeros(x.size(0) * x.size(1), y.size(1)).index_copy(0, real, y)
    return rows.unflatten(0, x.shape[:2])                                                         # (B, T, C')


class Attention(nn.Module):
    def __init__(self, config: Config, layer: int):
        super().__init__()
        self.config, self.layer = config, layer
        heads = config.n_head + 2 * config.n_kv_head
        self.qkv = nn.Linear(config.dim, heads * config.head_dim, bias=config.qkv_bias)
        self.out = nn.Linear(config.n_head * config.head_dim, config.dim, bias=False)

    def forward(self, x, places: Places, cache: KVCache | None = None):
        """Hidden states (B, T, C) -> what the wanted positions read, (B, last, C)."""
        c, last = self.config, places.last
        heads = at_real(self.qkv, x, places.real).unflatten(2, (-1, c.head_dim)).transpose(1, 2)  # (B, H + 2K, T, D)
        qk, v = heads.split([c.n_head + c.n_kv_head, c.n_kv_head], dim=1)
        q, k = apply_rope(qk, places.rope, c.rope_interleaved).split([c.n_head, c.n_kv_head], dim=1)
        if cache is not None:
            k, v = cache.extend(self.layer, k, v)                                                 # (B, K, S, D)
        if c.n_kv_head < c.n_head:      # query head h reads key/value head h // (H/K): 0 0 0 1 1 1, not 0 1 0 1 0 1
            k, v = (t.repeat_interleave(c.n_head // c.n_kv_head, dim=1) for t in (k, v))          # (B, H, S, D)
        h = F.scaled_dot_product_attention(q[:, :, -last:], k, v, attn_mask=places.sees[:, :, -last:])
        h = h.transpose(1, 2).flatten(2)                                                          # (B, last, H * D)
        return at_real(self.out, h, places.real if last == x.size(1) else None)                   # (B, last, C)


class MLP(nn.Module):
    """SwiGLU: down(silu(gate(x)) * up(x))."""

    def __init__(self, config: Config):
        super().__init__()
        self.gate_up = nn.Linear(config.dim, 2 * config.ffn_dim, bias=False)
        self.down = nn.Linear(config.ffn_dim, config.dim, bias=False)

    def forward(self, x):
        gate, up = self.gate_up(x).chunk(2, dim=-1)
        return self.down(F.silu(gate) * up)


class Block(nn.Module):
    def __init__(self, config: Config, layer: int):
        super().__init__()
        self.attn_norm, self.attn = RMSNorm(config.dim, config.norm_eps), Attention(config, layer)
        self.mlp_norm, self.mlp = RMSNorm(config.dim, config.norm_eps), MLP(config)

    def forward(self, x, places: Places, cache: KVCache | None = None):
        """Hidden states (B, T, C) -> those after the block at the wanted positions, (B, last, C)."""
        real = places.real if places.last == x.size(1) else None
        x = x[:, -places.last:] + self.attn(self.attn_norm(x), places, cache)
        return x + at_real(self.mlp, self.mlp_norm(x), real)


class Recompute(torch.autograd.Function):
    """Gradient checkpointing of one frozen block: keep its input only, run it again in backward.

    A block's own activations (some 16 times its input) live only while its backward runs, so memory grows by one
    hidden state (B, T, C) per block. The price is one more forward. Gradients flow to the input alone.
    """

    @staticmethod
    def forward(ctx, x, block, places, cache):
        assert not any(p.requires_grad for p in block.parameters()), "Recompute is for frozen blocks only"
        assert cache is None or cache.frozen, "what is recomputed would be stored twice"
        ctx.save_for_backward(x)
        ctx.block, ctx.places, ctx.cache = block, places, cache
        return block(x, places, cache)                      # autograd is off in here: nothing of the block is kept

    @staticmethod
    def backward(ctx, grad):
        x = ctx.saved_tensors[0].detach().requires_grad_()
        with torch.enable_grad():
            y = ctx.block(x, ctx.places, ctx.cache)
        return torch.autograd.grad(y, x, grad)[0], None, None, None


class LLM(nn.Module):
    """The backbone. Its parameters are frozen; gradients pass through it to its input."""

    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        self.fingerprint = ""           # of the weights on disk; load_llm sets it
        # nn.Embedding would draw the same numbers, but on the meta device it first imports a compiler, for two seconds.
        self.embedding = nn.Embedding.from_pretrained(torch.randn(config.vocab_size, config.dim))
        self.blocks = nn.ModuleList(Block(config, layer) for layer in range(config.n_layer))
        self.norm = RMSNorm(config.dim, config.norm_eps)
        if not config.tied_head:
            self.head = nn.Linear(config.dim, config.vocab_size, bias=False)
        self.requires_grad_(False)

    def embed(self, ids):
        """Token ids (B, T) -> embeddings (B, T, C)."""
        return self.embedding(ids)

    def logits(self, hidden):
        """Hidden states (..., C) -> scores of the next token (..., V) in fp32. Pass only the positions you need."""
        head = self.embedding if self.config.tied_head else self.head
        return F.linear(hidden, head.weight).float()

    def forward(self, x, mask=None, cache: KVCache | None = None, recompute: int = 0, last: int | None = None):
        """Embeddings (B, T, C) -> hidden states after the last norm, (B, T, C), or of the `last` positions alone.

        mask: (B, S) bool over cached and new positions, False where a row is padding, which stands in front of the
        row; None when there is none. Only attention computes padding. recompute: how many blocks, from the first on,
        keep only their input for backward. last: the wanted positions, from the end; the last block computes no others.
        """
        T, config = x.size(1), self.config
        last = T if last is None else last
        places = self.places(x, mask, cache)
        for layer, block in enumerate(self.blocks):
            if layer == config.n_layer - 1:
                places = places._replace(last=last)
            if layer < recompute and torch.is_grad_enabled():
                x = Recompute.apply(x, block, places, cache)
            else:
                x = block(x, places, cache)
        return self.norm(x)

    def places(self, x, mask, cache) -> Places:
        """Where the new positions x (B, T, C) stand. A position is a row's count of real tokens before it."""
        T = x.size(1)
        past, origin = (0, 0) if cache is None else (cache.length, cache.origin)
        S = past + T
        if S - origin > self.config.max_len:
            raise ValueError(f"a row has {S - origin} positions, but the backbone was trained for "
                             f"{self.config.max_len}; shorten the text or take another backbone")
        key = torch.arange(S, device=x.device)                                                    # (S,)
        query = key[past:, None]                                                                  # (T, 1)
        if mask is None:
            return Places(rope_table(key[None, past:] - origin, self.config), (key <= query)[None, None], None, T)
        positions = (mask.cumsum(dim=1) - 1 - origin).clamp(min=0)[:, past:]                      # (B, T)
        sees = (key <= query) & mask[:, None, :] | (key == query)       # padding must look at something: itself
        real = mask[:, past:].flatten().nonzero()[:, 0]                                           # (N,)
        if len(real) == mask[:, past:].numel():
            real = None
        return Places(rope_table(positions, self.config), sees[:, None], real, T)

    def read(self, ids: list[int]) -> KVCache:
        """Read a beginning that rows share -> a frozen cache, behind which they go on."""
        cache = KVCache(self.config.n_layer)
        self(self.embed(torch.tensor([ids], device=self.embedding.weight.device)), cache=cache)
        cache.frozen = True
        return cache

    @torch.no_grad()
    def generate(self, x, max_new_tokens: int, mask=None, eos_id: int | None = None, cache: KVCache | None = None):
        """Greedy decoding from embeddings x (B, T, C), padded in front where the mask is False, see forward.

        Returns the new tokens alone, (B, at most max_new_tokens). A row that has written `eos_id` goes on with it, and
        decoding ends when all rows have. cache: what was read before x; it is left as it is.
        """
        cache = KVCache(self.config.n_layer) if cache is None else cache.copy()
        done = torch.zeros(len(x), dtype=torch.bool, device=x.device)
        new = torch.empty(len(x), 0, dtype=torch.long, device=x.device)
        while new.size(1) < max_new_tokens and not bool(done.all()):
            ids = self.logits(self(x, mask, cache, last=1)[:, -1]).argmax(dim=-1)                 # (B,)
            if eos_id is not None:
                ids = ids.masked_fill(done, eos_id)
                done = done | (ids == eos_id)
            new = torch.cat((new, ids[:, None]), dim=1)
            x = self.embed(new[:, -1:])                                                           # (B, 1, C)
            if mask is not None:
                mask = F.pad(mask, (0, 1), value=True)
        return new


# ---------------------------------------------------------------------------------------------------------------------
# Loading


# Our parameter: the checkpoint's tensors that make it up, stacked along dimension 0; the layer number is {}.
_LLAMA = {
    "embedding.weight": ["model.embed_tokens.weight"],
    "blocks.{}.attn_norm.weight": ["model.layers.{}.input_layernorm.weight"],
    "blocks.{}.attn.qkv.weight": [f"model.layers.{{}}.self_attn.{x}_proj.weight" for x in "qkv"],
    "blocks.{}.attn.out.weight": ["model.layers.{}.self_attn.o_proj.weight"],
    "blocks.{}.mlp_norm.weight": ["model.layers.{}.post_attention_layernorm.weight"],
    "blocks.{}.mlp.gate_up.weight": [f"model.layers.{{}}.mlp.{x}_proj.weight" for x in ("gate", "up")],
    "blocks.{}.mlp.down.weight": ["model.layers.{}.mlp.down_proj.weight"],
    "norm.weight": ["model.norm.weight"],
    "head.weight": ["lm_head.weight"],
}
NAMES = {
    "llama": _LLAMA,
    "qwen2": {**_LLAMA, "blocks.{}.attn.qkv.bias": [f"model.layers.{{}}.self_attn.{x}_proj.bias" for x in "qkv"]},
    "qwen": {
        "embedding.weight": ["transformer.wte.weight"],
        "blocks.{}.attn_norm.weight": ["transformer.h.{}.ln_1.weight"],
        "blocks.{}.attn.qkv.weight": ["transformer.h.{}.attn.c_attn.weight"],
        "blocks.{}.attn.qkv.bias": ["transformer.h.{}.attn.c_attn.bias"],
        "blocks.{}.attn.out.weight": ["transformer.h.{}.attn.c_proj.weight"],
        "blocks.{}.mlp_norm.weight": ["transformer.h.{}.ln_2.weight"],
        "blocks.{}.mlp.gate_up.weight": [f"transformer.h.{{}}.mlp.{x}.weight" for x in ("w2", "w1")],   # w2 is the gate
        "blocks.{}.mlp.down.weight": ["transformer.h.{}.mlp.c_proj.weight"],
        "norm.weight": ["transformer.ln_f.weight"],
        "head.weight": ["lm_head.weight"],
    },
    "chatglm": {
        "embedding.weight": ["transformer.embedding.word_embeddings.weight"],
        "blocks.{}.attn_norm.weight": ["transformer.encoder.layers.{}.input_layernorm.weight"],
        "blocks.{}.attn.qkv.weight": ["transformer.encoder.layers.{}.self_attention.query_key_value.weight"],
        "blocks.{}.attn.qkv.bias": ["transformer.encoder.layers.{}.self_attention.query_key_value.bias"],
        "blocks.{}.attn.out.weight": ["transformer.encoder.layers.{}.self_attention.dense.weight"],
        "blocks.{}.mlp_norm.weight": ["transformer.encoder.layers.{}.post_attention_layernorm.weight"],
        "blocks.{}.mlp.gate_up.weight": ["transformer.encoder.layers.{}.mlp.dense_h_to_4h.weight"],
        "blocks.{}.mlp.down.weight": ["transformer.encoder.layers.{}.mlp.dense_4h_to_h.weight"],
        "norm.weight": ["transformer.encoder.final_layernorm.weight"],
        "head.weight": ["transformer.output_layer.weight"],
    },
}
FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
ROTARY_TABLES = ("rotary_emb.inv_freq", "rotary_pos_emb.inv_freq")     # of published checkpoints; see rope_table


def load_llm(path, device="cpu", dtype=torch.float32) -> LLM:
    """Load a checkpoint folder (config.json and .safetensors or .bin files) onto `device` in `dtype`, frozen.

    Raises ValueError that names every missing, unused or misshapen tensor with both shapes and the file.
    """
    path = Path(path)
    llm = empty_llm(path)
    stored = stored_tensors(path)
    check_tensors(path, llm, stored)
    weights, seal = {}, hashlib.sha256()
    for name, parameter in llm.state_dict().items():
        weights[name] = torch.empty(parameter.shape, device=device, dtype=dtype)
        start = 0
        for source in sources(llm.config.family, name):
            tensor = read_tensor(source, stored[source].file)
            weights[name][start:start + len(tensor)].copy_(tensor)
            start += len(tensor)
            seal.update(tensor.flatten()[:1024].contiguous().view(torch.uint8).numpy().tobytes())
    llm.load_state_dict(weights, assign=True)
    llm.requires_grad_(False)
    llm.fingerprint = seal.hexdigest()[:16]                 # the first 1024 numbers of every tensor, as stored
    return llm


def empty_llm(path) -> LLM:
    """The backbone that a folder's config.json describes, without memory for its weights."""
    with torch.device("meta"):
        return LLM(Config.from_dir(path))


def sources(family: str, name: str) -> list[str]:
    """The checkpoint's names for a parameter: blocks.7.mlp.down.weight -> [model.layers.7.mlp.down_proj.weight]."""
    layer = re.search(r"(?<=^blocks\.)\d+", name)
    if layer is None:
        return NAMES[family][name]
    key = name.replace(layer[0], "{}", 1)
    return [source.format(layer[0]) for source in NAMES[family][key]]


class Stored(NamedTuple):
    """A tensor of a checkpoint: where it lies and what it is, but not its numbers."""
    file: Path
    shape: list
    dtype: torch.dtype | str        # as the file names it if it is none of FLOATS


def stored_tensors(path: Path) -> dict[str, Stored]:
    """What a folder's weight files hold, by the tensors' names: .safetensors or, where there are none, .bin."""
    files, homes = weight_files(path)
    stored = {}
    for file in files:
        for name, tensor in list_tensors(file).items():
            if homes.get(name, file.name) != file.name:
                continue                                    # the index says that it lies in another file
            if name in stored:
                raise ValueError(f"{path}: {name} is in {stored[name].file.name} and in {file.name}; keep the file "
                                 "that belongs to this checkpoint")
            stored[name] = tensor
    return stored


def weight_files(path: Path) -> tuple[list[Path], dict]:
    """A folder's weight files, and its index: tensor name -> file name; {} where there is none."""
    for kind, pattern in (("model.safetensors", "*.safetensors"), ("pytorch_model.bin", "pytorch_model*.bin")):
        index = path / f"{kind}.index.json"
        homes = {}
        files = sorted(path.glob(pattern))
        if index.is_file():
            homes = read_json(index).get("weight_map")
            named = [] if not isinstance(homes, dict) else sorted(set(map(str, homes.values())))
            if not named or any(Path(name).name != name for name in named):
                raise ValueError(f"{index}: expected a weight_map of tensors to files of this folder; fetch it again")
            files = [path / name for name in named]
        for file in files:
            if not file.is_file():
                raise ValueError(f"{file}: named in {index.name}, but missing; finish the download, or delete the "
                                 "index if the weights beside it are whole")
        if files:
            return files, homes
    raise ValueError(f"{path}: no .safetensors and no pytorch_model*.bin file there; fetch the model's weights")


def list_tensors(file: Path) -> dict[str, Stored]:
    """What one file holds. Raises ValueError for anything but plain dense tensors; nothing in it is run."""
    with open(file, "rb") as start:
        if start.read(7) == b"version":
            raise ValueError(f"{file}: a git-lfs pointer, not the weights; run `git lfs pull` or fetch the file")
    if file.suffix == ".bin":
        return {name: Stored(file, list(tensor.shape), tensor.dtype) for name, tensor in read_bin(file).items()}
    try:
        with safe_open(file, "pt") as shard:
            parts = {name: shard.get_slice(name) for name in list(shard.keys())}
            return {name: Stored(file, part.get_shape(), FLOATS.get(part.get_dtype(), part.get_dtype()))
                    for name, part in parts.items()}
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{file}: not a whole .safetensors file ({error}); finish the download") from None


def read_tensor(name: str, file: Path):
    """One tensor of a file. The file is mapped anew each time, for what was read through a mapping takes memory until
    that is closed."""
    if file.suffix == ".bin":
        return read_bin(file)[name]
    with safe_open(file, "pt") as shard:
        return shard.get_tensor(name)


def read_bin(file: Path) -> dict[str, torch.Tensor]:
    """A file of torch.save, memory-mapped: plain dense tensors only, and nothing in it is run."""
    try:
        tensors = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:          # whatever a damaged or hostile file provokes, it was refused
        asked = re.search(r"GLOBAL ([\w.]+)", str(error))
        reason = f"it wants {asked[1]}" if asked else str(error).split("\n")[0][:300]
        raise ValueError(f"{file}: not a whole file of plain tensors ({reason}); nothing in it was run; fetch it "
                         "again, from a source that you trust, or the model's .safetensors") from None
    if not isinstance(tensors, dict):
        raise ValueError(f"{file}: holds a {type(tensors).__name__}, expected names and tensors; fetch the file again")
    for name, x in tensors.items():
        if not is_plain(x) or not isinstance(name, str):
            raise ValueError(f"{file}: {name!r:.100} is no plain dense tensor; use the model's version in fp16, bf16 "
                             "or fp32")
    return {name: x.detach() for name, x in tensors.items()}


def is_plain(x) -> bool:
    """Whether x is a tensor of numbers that lie in the file as they are."""
    if type(x) not in (torch.Tensor, nn.Parameter) or x.layout != torch.strided or x.device.type != "cpu":
        return False
    return not (x.is_quantized or x.is_nested or x.is_neg() or x.is_conj())


def check_tensors(path: Path, llm: LLM, stored: dict[str, Stored]):
    """Raise ValueError that lists whatever is missing, left over, or of another shape or kind than config.json asks."""
    odd = [name for name, tensor in stored.items() if tensor.dtype not in FLOATS.values()]
    if odd:
        raise ValueError(f"{path}: {odd[0]} in {stored[odd[0]].file.name} is {stored[odd[0]].dtype}, {len(odd)} of "
                         f"{len(stored)} tensors are not {', '.join(FLOATS)}; quantised weights (GPTQ, AWQ, ...) are "
                         "not implemented, use the model's version in fp16, bf16 or fp32")
    config, asked = llm.config, {}
    for name, parameter in llm.state_dict().items():
        names, (rows, *rest) = sources(config.family, name), parameter.shape
        heights = [rows // len(names)] * len(names)
        if len(names) == 3:                                 # queries, keys and values
            heights = [n * config.head_dim for n in (config.n_head, config.n_kv_head, config.n_kv_head)]
        asked |= {source: [height, *rest] for source, height in zip(names, heights)}
    embedding, head = (sources(config.family, f"{name}.weight")[0] for name in ("embedding", "head"))
    if config.tied_head and head in stored:                 # some publish the embedding a second time
        asked[head] = asked[embedding]
    problems = [f"missing: {name}" for name in asked if name not in stored]
    problems += [f"misshapen: {name} is {stored[name].shape} in {stored[name].file.name}, config.json asks for {shape}"
                 for name, shape in asked.items() if name in stored and stored[name].shape != shape]
    problems += [f"unused: {name} in {tensor.file.name}" for name, tensor in stored.items()
                 if name not in asked and not name.endswith(ROTARY_TABLES)]
    if problems:
        raise ValueError(f"{path}: the weights do not fit config.json:\n  " + "\n  ".join(problems))
    if config.tied_head and head in stored and not torch.equal(*(
            read_tensor(name, stored[name].file) for name in (head, embedding))):
        raise ValueError(f"{path}: tie_word_embeddings in config.json says that the output head is the embedding, but "
                         f"{head} is not {embedding}; fetch the checkpoint again")


# ---------------------------------------------------------------------------------------------------------------------
# Files


def read_json(file: Path) -> dict:
    """A JSON file that holds an object. Raises ValueError with the file's name for anything else."""
    if not file.is_file():
        raise ValueError(f"{file}: not found; fetch or write it again")
    try:
        found = json.loads(file.read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file}: not valid JSON ({error}); fetch or write it again") from None
    if not isinstance(found, dict):
        raise ValueError(f"{file}: holds a JSON {type(found).__name__}, expected an object; fetch or write it again")
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
        draft.unlink(missing_ok=True)                       # a full disk needs the room
        what = f"{error.strerror} while writing; what was there before is intact"
        raise OSError(error.errno, what, str(path)) from None
    if os.name == "posix":                                  # the new name, too, must reach the disk
        folder = os.open(path.parent, os.O_RDONLY)
        os.fsync(folder)
        os.close(folder)


def main():
    """Print what a checkpoint is. Raises ValueError if its weights are not as config.json asks for them."""
    if len(sys.argv) != 2:
        raise ValueError("expected one checkpoint folder: python model.py DIR")
    path = Path(sys.argv[1])
    llm = empty_llm(path)
    for name, value in vars(llm.config).items():
        print(f"{name:18} {value}")
    print(f"{'parameters':18} {sum(p.numel() for p in llm.parameters()):,}", flush=True)
    stored = stored_tensors(path)
    check_tensors(path, llm, stored)
    files = sorted({tensor.file for tensor in stored.values()})
    size = sum(file.stat().st_size for file in files)
    print(f"{'weights':18} {size:,} bytes in {len(files)} files: {', '.join(file.name for file in files)}")


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
