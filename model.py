"""The frozen backbone: one decoder-only transformer that runs the published LLaMA2, Qwen and ChatGLM3 checkpoints.

    Config     the sizes, read from the checkpoint's own config.json
    LLM        embeddings -> blocks of attention and SwiGLU -> norm -> output head; greedy decoding from embeddings
    KVCache    the keys and values of the positions already seen; Beginning: of those that all rows share
    Packing    rows without the padding behind them
    Recompute  gradient checkpointing, written by hand
    NAMES      our parameter names and each family's
    load_llm   safetensors -> device, tensor by tensor, strict both ways
    convert    .bin shards, which are pickles, -> safetensors, without running them

    python model.py DIR                         what a checkpoint is
    python model.py DIR --to-safetensors OUT    convert one that comes as .bin

The families differ by data (sizes, biases, the pairing of rotary channels, tensor names), never by class.

Shapes: B rows, T new positions, S cached + new positions, C width (dim), H query heads, K key/value heads, D width of
a head, R rotated channels of a head, V vocabulary, N real positions of all rows together.
"""
import argparse
import hashlib
import json
import math
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


# What this transformer takes for granted. A config.json that sets one of these keys to anything else is refused.
FIXED = {
    "quantization_config": None, "quantization_bit": 0,                        # whole weights only
    "rope_ratio": 1, "rotary_pct": 1.0, "partial_rotary_factor": 1.0, "original_rope": True,
    "hidden_act": "silu", "use_sliding_window": False,
    "attention_bias": False, "mlp_bias": False, "no_bias": True, "add_bias_linear": False,
    "rmsnorm": True, "post_layer_norm": True, "apply_residual_connection_post_layernorm": False,
    "multi_query_attention": True, "scale_attn_weights": True, "fp32_residual_connection": False,
}


@dataclass(frozen=True)
class Config:
    """The sizes of a backbone and the few switches by which the families differ."""
    family: str             # "llama", "qwen" (first generation), "qwen2" (Qwen1.5, 2, 2.5) or "chatglm" (ChatGLM3)
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
        raw = _read_config(file)
        family, kinds = raw["model_type"], {field.name: field.type for field in fields(cls)}
        try:
            sizes = _FIELDS[family](raw)
            wrong = [f"{name} is {value!r}, expected a positive number" for name, value in sizes.items()
                     if value != kinds[name](value) or (value is not False and value <= 0)]
            if not wrong and sizes["n_head"] % sizes["n_kv_head"]:
                wrong = [f"{sizes['n_head']} heads cannot share {sizes['n_kv_head']} key/value heads evenly"]
        except KeyError as error:
            wrong = [f"the key {error} is missing, which the {family!r} models implemented here have"]
        except (TypeError, ValueError, ZeroDivisionError) as error:
            wrong = [f"a size is not a positive number ({error})"]
        if wrong:
            raise ValueError(f"{file}: {', '.join(wrong)}; fetch the file again, or take another backbone")
        return cls(family=family, **sizes)


def _read_config(file: Path) -> dict:
    if not file.parent.is_dir():
        raise ValueError(f"{file.parent}: no such folder; expected a checkpoint in Hugging Face layout")
    if not file.is_file():
        raise ValueError(f"{file}: not found; a checkpoint folder holds config.json, tokenizer and .safetensors files")
    try:
        raw = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file}: not valid JSON ({error}); fetch the file again from the model's page") from None
    family = raw.get("model_type") if isinstance(raw, dict) else None
    if family not in [*_FIELDS]:
        raise ValueError(f"{file}: model_type is {family!r}; use a backbone of a family that is implemented: llama "
                         "(LLaMA, LLaMA2), qwen (Qwen), qwen2 (Qwen1.5, Qwen2, Qwen2.5) or chatglm (ChatGLM3)")
    for key in ("rope_scaling", "rope_parameters"):     # newer files keep theta in the second, too
        rope = raw.get(key) or {}
        kind = rope.get("rope_type", rope.get("type", "default")) if isinstance(rope, dict) else rope
        if kind != "default":
            raise ValueError(f"{file}: {key} is {_short(rope)}, but only the plain rotary embedding is implemented; "
                             "use a model trained without scaling (where it was added for long texts, delete the key)")
        raw |= {k: rope[k] for k in ("rope_theta", "partial_rotary_factor") if k in rope}
    for key, value in FIXED.items():
        if raw.get(key) not in (None, value):
            better = "its version in fp16, bf16 or fp32" if key.startswith("quantization") else "another of its family"
            raise ValueError(f"{file}: {key} is {_short(raw[key])}, but only {_short(value)} is implemented; instead "
                             f"of this model use {better}")
    return raw


def _short(value) -> str:
    text = json.dumps(value)
    return text if len(text) < 100 else text[:100] + " ..."


def _llama_fields(raw: dict) -> dict:
    heads = raw["num_attention_heads"]
    head_dim = raw.get("head_dim") or raw["hidden_size"] // heads
    return dict(
        dim=raw["hidden_size"], n_layer=raw["num_hidden_layers"], n_head=heads, head_dim=head_dim,
        n_kv_head=raw.get("num_key_value_heads") or heads, ffn_dim=raw["intermediate_size"],
        vocab_size=raw["vocab_size"], max_len=raw["max_position_embeddings"], norm_eps=raw["rms_norm_eps"],
        rope_theta=raw.get("rope_theta") or 10000.0, rope_dim=head_dim, tied_head=bool(raw.get("tie_word_embeddings")))


def _qwen_fields(raw: dict) -> dict:
    # Beyond seq_length Qwen scales attention by log n and stretches the rotary base; up to it both are the identity.
    return dict(
        dim=raw["hidden_size"], n_layer=raw["num_hidden_layers"], n_head=raw["num_attention_heads"],
        head_dim=raw["kv_channels"], n_kv_head=raw["num_attention_heads"], ffn_dim=raw["intermediate_size"] // 2,
        vocab_size=raw["vocab_size"], max_len=raw["seq_length"], norm_eps=raw["layer_norm_epsilon"],
        rope_theta=raw["rotary_emb_base"], rope_dim=raw["kv_channels"], qkv_bias=True)


def _chatglm_fields(raw: dict) -> dict:
    return dict(
        dim=raw["hidden_size"], n_layer=raw["num_layers"], n_head=raw["num_attention_heads"],
        head_dim=raw["kv_channels"], n_kv_head=raw["multi_query_group_num"], ffn_dim=raw["ffn_hidden_size"],
        vocab_size=raw["padded_vocab_size"], max_len=raw["seq_length"], norm_eps=raw["layernorm_epsilon"],
        rope_dim=raw["kv_channels"] // 2, rope_interleaved=True, qkv_bias=raw["add_qkv_bias"])


_FIELDS = {"llama": _llama_fields, "qwen": _qwen_fields, "chatglm": _chatglm_fields,
           "qwen2": lambda raw: {**_llama_fields(raw), "qkv_bias": True}}


# ---------------------------------------------------------------------------------------------------------------------
# The transformer


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight, computed in fp32 whatever the dtype of x; on a GPU one kernel."""

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
    turned = x[..., :R].float()
    a, b = (turned[..., 0::2], turned[..., 1::2]) if interleaved else turned.chunk(2, dim=-1)   # (B, heads, T, R/2)
    a, b = a * cos - b * sin, b * cos + a * sin
    turned = torch.stack((a, b), dim=-1).flatten(-2) if interleaved else torch.cat((a, b), dim=-1)
    return torch.cat((turned.type_as(x), x[..., R:]), dim=-1) if R < x.size(-1) else turned.type_as(x)


class KVCache:
    """Keys and values of the positions already seen, allocated once for `max_len` of them. It may start with those of a
    beginning that all rows share."""

    def __init__(self, config: Config, rows: int, max_len: int, device, dtype, beginning: "Beginning | None" = None):
        shape = (config.n_layer, rows, config.n_kv_head, max_len, config.head_dim)
        self.k, self.v = (torch.empty(shape, device=device, dtype=dtype) for _ in range(2))
        self.length = 0                                                 # positions filled
        if beginning is not None:
            self.length = beginning.length
            self.k[:, :, :, :self.length], self.v[:, :, :, :self.length] = beginning.k, beginning.v

    def append(self, layer: int, k, v):
        """Store the keys and values (B, K, T, D) of T new positions; return those of all S positions of this layer."""
        S = self.length + k.size(2)
        assert S <= self.k.size(3), f"cache of {self.k.size(3)} positions is full, {S} wanted"
        self.k[layer, :, :, self.length:S], self.v[layer, :, :, self.length:S] = k, v
        self.length = S if layer == len(self.k) - 1 else self.length    # the last layer has them, too
        return self.k[layer, :, :, :S], self.v[layer, :, :, :S]


class Beginning:
    """Embeddings, keys and values of a beginning that all rows share: computed once and never changed. Pass it to
    LLM.forward as the cache, and the rows go on after it. Unlike a KVCache it stores nothing new, so gradients flow and
    blocks may recompute."""

    def __init__(self, llm: "LLM", ids: list[int]):
        self.x = llm.embed(torch.tensor([ids], device=llm.embedding.weight.device))               # (1, T, C)
        cache, self.length = KVCache(llm.config, 1, len(ids), self.x.device, self.x.dtype), len(ids)
        with torch.no_grad():
            llm(self.x, cache=cache)
        self.k, self.v = cache.k, cache.v                                                         # (layers, 1, K, T, D)

    def append(self, layer: int, k, v):
        """In front of the keys and values (B, K, T, D) of new positions those of the beginning: (B, K, S, D)."""
        k0, v0 = (past[layer].expand(len(k), -1, -1, -1) for past in (self.k, self.v))
        return torch.cat((k0, k), dim=2), torch.cat((v0, v), dim=2)


class Packing:
    """Rows without the padding behind them. Attention wants rows, (B, T, C); whatever else a block does it does to each
    position alone, and does it to the N real ones, (N, C)."""

    def __init__(self, lengths, T: int, device):
        """lengths: (B,), how many of each row's T positions are real; on the CPU, so that no GPU is waited for."""
        self.rows = len(lengths)
        real = (torch.arange(T) < lengths[:, None]).flatten().nonzero()[:, 0]
        self.size, self.real = self.rows * T, real.to(device, non_blocking=True)                  # (N,)

    def pack(self, x):
        return x.flatten(0, 1).index_select(0, self.real)                                         # (B, T, C) -> (N, C)

    def unpack(self, x):
        rows = x.new_zeros(self.size, x.size(1)).index_copy_(0, self.real, x)
        return rows.unflatten(0, (self.rows, -1))                                                 # (N, C) -> (B, T, C)


def causal_attention(q, k, v, whole: bool, step: int = 64):
    """Queries (B, H, T, D) of the last T of S positions look at keys and values (B, H, S, D) up to their own position.

    Two ways to spare the hidden half. whole: torch's causal kernels for a GPU skip it, but want as many queries as
    keys; those of the earlier positions are zeros and ask in vain. Otherwise: torch on a CPU computes what is hidden,
    too, so `step` queries ask at a time, and no keys behind the last of them are there.
    """
    T, S = q.size(2), k.size(2)
    if whole and T > 1:
        return F.scaled_dot_product_attention(F.pad(q, (0, 0, S - T, 0)), k, v, is_causal=True)[:, :, S - T:]
    slices = []
    for start in range(0, T, step):
        ask = q[:, :, start:start + step]                                                         # (B, H, n, D)
        n, end = ask.size(2), S - T + start + ask.size(2)
        sees = torch.ones(n, end, dtype=torch.bool, device=q.device).tril(end - n)
        slices.append(F.scaled_dot_product_attention(ask, k[:, :, :end], v[:, :, :end], attn_mask=sees))
    return torch.cat(slices, dim=2)                                                               # (B, H, T, D)


class Attention(nn.Module):
    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        heads = config.n_head + 2 * config.n_kv_head
        self.qkv = nn.Linear(config.dim, heads * config.head_dim, bias=config.qkv_bias)
        self.out = nn.Linear(config.n_head * config.head_dim, config.dim, bias=False)

    def forward(self, x, rope, mask, cache, layer, at=None, packing=None):
        c, qkv = self.config, self.qkv(x)
        qkv = packing.unpack(qkv) if packing else qkv
        heads = qkv.unflatten(2, (-1, c.head_dim)).transpose(1, 2)                                # (B, H + 2K, T, D)
        qk, v = heads.split([c.n_head + c.n_kv_head, c.n_kv_head], dim=1)
        q, k = apply_rope(qk, rope, c.rope_interleaved).split([c.n_head, c.n_kv_head], dim=1)
        if cache is not None:
            k, v = cache.append(layer, k, v)                                                      # (B, K, S, D)
        if c.n_kv_head < c.n_head:      # query head h reads key/value head h // (H/K): 0 0 0 1 1 1, not 0 1 0 1 0 1
            k, v = (t.repeat_interleave(c.n_head // c.n_kv_head, dim=1) for t in (k, v))          # (B, H, S, D)
        if at is not None:              # only the positions wanted ask, all answer; the mask is theirs
            q = q.take_along_dim(at[:, None, :, None], dim=2)                                     # (B, H, n, D)
        if mask is None:
            h = causal_attention(q, k, v, whole=x.is_cuda)
        else:
            h = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        h = h.transpose(1, 2).flatten(2)                                                          # (B, T or n, H * D)
        return self.out(packing.pack(h) if packing and at is None else h)                         # (B, T or n, C)


class MLP(nn.Module):
    def __init__(self, config: Config):
        super().__init__()
        self.gate_up = nn.Linear(config.dim, 2 * config.ffn_dim, bias=False)
        self.down = nn.Linear(config.ffn_dim, config.dim, bias=False)

    def forward(self, x):
        gate, up = self.gate_up(x).chunk(2, dim=-1)
        h = F.silu(gate)
        return self.down(h * up if torch.is_grad_enabled() else h.mul_(up))     # in place where no backward wants h


class Block(nn.Module):
    def __init__(self, config: Config):
        super().__init__()
        self.attn_norm, self.attn = RMSNorm(config.dim, config.norm_eps), Attention(config)
        self.mlp_norm, self.mlp = RMSNorm(config.dim, config.norm_eps), MLP(config)

    def forward(self, x, rope, mask=None, cache=None, layer=0, at=None, packing=None):
        """Hidden states (B, T, C), packed (N, C) -> those after the block, of all positions or, (B, n, C), of those
        `at` (B, n)."""
        h = self.attn(self.attn_norm(x), rope, mask, cache, layer, at, packing)
        if at is not None:
            x = (packing.unpack(x) if packing else x).take_along_dim(at[..., None], dim=1)        # (B, n, C)
        x = x + h
        return x + self.mlp(self.mlp_norm(x))


class Recompute(torch.autograd.Function):
    """Gradient checkpointing of one frozen block: keep its input only, run it again in backward.

    A block's own activations (some 16 times its input) live only while its backward runs, so memory grows by one
    hidden state (B, T, C) per block. The price is one more forward. Gradients flow to the input alone.
    """

    @staticmethod
    def forward(ctx, x, block, *rest):
        assert not any(p.requires_grad for p in block.parameters()), "Recompute is for frozen blocks only"
        ctx.save_for_backward(x)
        ctx.run, ctx.others = lambda x: block(x, *rest), (None,) * (1 + len(rest))
        return ctx.run(x)                                   # autograd is off in here: nothing of the block is kept

    @staticmethod
    def backward(ctx, grad):
        x, = ctx.saved_tensors
        x = x.detach().requires_grad_()
        with torch.enable_grad():
            y = ctx.run(x)
        return torch.autograd.grad(y, x, grad)[0], *ctx.others


class LLM(nn.Module):
    """The backbone. Its parameters are frozen; gradients pass through it to its input."""

    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        self.fingerprint = ""           # of the weights on disk; load_llm sets it
        # nn.Embedding would draw the same numbers, but on the meta device it first imports a compiler, for two seconds.
        self.embedding = nn.Embedding.from_pretrained(torch.randn(config.vocab_size, config.dim))
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.norm = RMSNorm(config.dim, config.norm_eps)
        if not config.tied_head:
            self.head = nn.Linear(config.dim, config.vocab_size, bias=False)
        self.requires_grad_(False)

    def embed(self, ids):
        """Token ids (B, T) -> embeddings (B, T, C)."""
        return self.embedding(ids)

    def logits(self, hidden):
        """Hidden states (..., C) -> scores of the next token (..., V) in fp32. Pass only the positions you need."""
        return F.linear(hidden, (self.embedding if self.config.tied_head else self.head).weight).float()

    def forward(self, x, mask=None, positions=None, cache: KVCache | Beginning | None = None, recompute: int = 0,
                at=None, lengths=None):
        """Embeddings (B, T, C) -> hidden states after the last norm, (B, T, C) or (B, n, C).

        mask: (B, S) bool, False where a row is padding; None when there is none. positions: (B, T), by default each
        row's count of real tokens. recompute: how many blocks, from the first on, keep only their input for backward.
        at: which positions are wanted, (B, n), by default all; but for keys and values, the last block computes these
        alone. Padding behind a row needs no mask: no real token looks that far ahead. lengths: (B,) on the CPU, real
        positions of each row; with them, and with `at`, only attention computes that padding.
        """
        T, past = x.size(1), cache.length if cache is not None else 0
        if past + T > self.config.max_len:
            raise ValueError(f"a row has {past + T} positions, but the backbone was trained for {self.config.max_len}; "
                             "shorten the text or take another backbone")
        if positions is None and mask is None:
            positions = torch.arange(past, past + T, device=x.device)[None]                      # (1, T)
        elif positions is None:
            positions = (mask.cumsum(dim=1) - 1).clamp(min=0)[:, past:]                           # (B, T)
        rope, sees, wanted = rope_table(positions, self.config), attention_mask(mask, past, T, x.device), None
        packing = None
        if lengths is not None and int(lengths.min()) < T:
            assert at is not None, "packed rows come back at the positions wanted"
            packing = Packing(lengths, T, x.device)
            x = packing.pack(x)                                                                   # (N, C)
        for layer, block in enumerate(self.blocks):
            if layer == self.config.n_layer - 1 and at is not None:
                sees, wanted = attention_mask(mask, past, T, x.device, at), at
            if layer < recompute and torch.is_grad_enabled():
                assert not isinstance(cache, KVCache), "a KVCache stores; what is recomputed would be stored twice"
                x = Recompute.apply(x, block, rope, sees, cache, layer, wanted, packing)
            else:
                x = block(x, rope, sees, cache, layer, wanted, packing)
        return self.norm(x)

    @torch.no_grad()
    def generate(self, x, max_new_tokens: int, mask=None, eos_id: int | None = None, read_next=None,
                 beginning: Beginning | None = None):
        """Greedy decoding from embeddings x (B, T, C), padded on either side where mask (B, T) is False.

        Returns the new tokens alone, (B, at most max_new_tokens). A row that has written `eos_id` goes on with it, and
        decoding ends when all rows have. read_next: a function of (x, new tokens) that gives what is read before the
        next token, as embeddings and positions; by default the last new token. beginning: that of x, read already.
        """
        B, T, _ = x.shape
        row, positions = x, None
        steps = max_new_tokens if read_next else 1      # read_next may read row and new tokens again, each time anew
        cache = KVCache(self.config, B, (T + max_new_tokens) * steps, x.device, x.dtype, beginning)
        done = torch.zeros(B, dtype=torch.bool, device=x.device)
        new = torch.empty(B, 0, dtype=torch.long, device=x.device)
        mask = torch.ones(B, T, dtype=torch.bool, device=x.device) if mask is None else mask.bool()
        at = (mask * torch.arange(T, device=x.device)).amax(dim=1, keepdim=True)         # each row's last token, (B, 1)
        sees = None if bool((mask[:, 1:] <= mask[:, :-1]).all()) else mask      # all padding behind: see forward
        x, at = x[:, cache.length:], at - cache.length
        while new.size(1) < max_new_tokens and not (eos_id is not None and bool(done.all())):
            ids = self.logits(self(x, sees, positions, cache, at=at)[:, -1]).argmax(dim=-1)       # (B,)
            if eos_id is not None:
                ids = ids.masked_fill(done, eos_id)
                done = done | (ids == eos_id)
            new = torch.cat((new, ids[:, None]), dim=1)
            x, positions = read_next(row, new) if read_next else (self.embed(new[:, -1:]), None)
            sees = mask = F.pad(mask, (0, x.size(1)), value=True)
            at = None
        return new


def attention_mask(mask, past: int, T: int, device, at=None):
    """Which of S positions each of the T new ones, or of those `at` (B, n), may look at: bool (B or 1, 1, T or n, S),
    or None for plain causal. mask: (B, S) bool of real tokens, or None; (B, 1, T, S) is taken as it is.
    """
    if mask is not None and mask.dim() == 4:
        return mask
    if mask is None and at is None:
        return None
    key = torch.arange(past + T, device=device)                                                   # (S,)
    query = (key[None, past:] if at is None else past + at)[..., None]                            # (B or 1, T or n, 1)
    if mask is None:
        return (key <= query)[:, None]
    # A padding position must look at something: itself.
    return ((key <= query) & mask[:, None, :] | (key == query))[:, None]                          # (B, 1, T or n, S)


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
INDEX = {".safetensors": "model.safetensors.index.json", ".bin": "pytorch_model.bin.index.json"}
FLOATS = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
PIECE = 1 << 23             # numbers of a tensor that are read at a time
ROTARY_TABLES = ("rotary_emb.inv_freq", "rotary_pos_emb.inv_freq")     # of published checkpoints


def write_atomic(path, data):
    """Write a file such that after a crash at any moment it is whole: the old one or the new one. data: bytes, or an
    iterable of pieces of them."""
    path = Path(path)
    draft = path.with_name(f".{path.name}.new")
    try:
        with open(draft, "wb") as file:
            file.writelines([data] if isinstance(data, bytes) else data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(draft, path)
    except OSError as error:
        draft.unlink(missing_ok=True)                       # a full disk needs the room
        what = f"{error.strerror} while writing; what was there before is intact"
        raise OSError(error.errno, what, str(path)) from None
    folder = os.open(path.parent, os.O_RDONLY)              # the new name, too, must reach the disk
    os.fsync(folder)
    os.close(folder)


def load_llm(path, device="cpu", dtype=torch.float32) -> LLM:
    """Load a checkpoint folder (config.json and one or many .safetensors files) onto `device` in `dtype`, frozen.

    Raises ValueError that names every missing, unused or misshapen tensor with both shapes and the file.
    """
    llm, path = _on_meta(path), Path(path)
    stored = _stored(_shards(path, ".safetensors"))
    if not stored:
        advice = f"convert the .bin files, which are pickles: python model.py {path} --to-safetensors OUT" if (
            list(path.glob("*.bin"))) else "fetch the model's weights"
        raise ValueError(f"{path}: no .safetensors file there, and loading opens no other; {advice}")
    _check_tensors(path, llm, stored)
    head, embedding = (_sources(llm.config.family, f"{name}.weight")[0] for name in ("head", "embedding"))
    if llm.config.tied_head and head in stored and not all(
            bool((a == b).all()) for a, b in zip(_pieces(head, stored[head]), _pieces(embedding, stored[embedding]))):
        raise ValueError(f"{path}: tie_word_embeddings in config.json says that the output head is the embedding, but "
                         f"{head} is not {embedding}; fetch the checkpoint again")
    weights, seal = {}, hashlib.sha256()
    for name, parameter in llm.state_dict().items():
        weights[name] = torch.empty(parameter.shape, device=device, dtype=dtype)
        start = 0
        for source in _sources(llm.config.family, name):
            for i, piece in enumerate(_pieces(source, stored[source])):
                weights[name][start:start + len(piece)].copy_(piece)
                start += len(piece)
                if i == 0:
                    seal.update(_beginning(piece))
    llm.load_state_dict(weights, assign=True)
    llm.requires_grad_(False)
    llm.fingerprint = seal.hexdigest()[:16]                 # the first 1024 numbers of every tensor, as stored
    return llm


def _on_meta(path) -> LLM:
    """The backbone that a folder's config.json describes, without memory for its weights."""
    with torch.device("meta"):
        return LLM(Config.from_dir(path))


def _sources(family: str, name: str) -> list[str]:
    """The checkpoint's names for a parameter: blocks.7.mlp.down.weight -> [model.layers.7.mlp.down_proj.weight]."""
    layer = name.split(".")[1] if name.startswith("blocks.") else ""
    key = name.replace(f"blocks.{layer}.", "blocks.{}.") if layer else name
    return [source.format(layer) for source in NAMES[family][key]]


def _shards(path: Path, kind: str) -> list[Path]:
    """A folder's weight files of one kind (a key of INDEX): those that its index names, or what lies there."""
    index = path / INDEX[kind]
    if index.is_file():
        try:
            names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
            files = [path / name for name in names if name.endswith(kind) and name == Path(name).name]
        except (ValueError, KeyError, AttributeError, TypeError):
            names, files = [], []
        if not files or len(files) < len(names):
            raise ValueError(f"{index}: not a shard index: expected a weight_map to {kind} files of this folder; fetch "
                             "it again")
    else:
        files = sorted(path.glob("*.safetensors" if kind == ".safetensors" else "pytorch_model*.bin"))
        if any("-of-" in file.name for file in files):
            raise ValueError(f"{path}: {len(files)} shards without {index.name}, which comes last; finish the "
                             "download, or start the conversion that wrote them again")
    for file in files:
        if not file.is_file():
            raise ValueError(f"{file}: this shard is named in {index.name} but missing; finish the download")
        with open(file, "rb") as start:
            if start.read(7) == b"version":
                raise ValueError(f"{file}: a git-lfs pointer, not the weights; run `git lfs pull` or fetch the file")
    return files


class Stored(NamedTuple):
    """A tensor of a checkpoint: where it lies and what it is, but not its numbers."""
    file: Path
    dtype: str              # as safetensors names it
    shape: list


def _stored(files: list[Path]) -> dict[str, Stored]:
    """What the files hold, by the tensors' names."""
    stored = {}
    for file in files:
        if file.suffix == ".bin":
            stored |= {name: Stored(file, FLOATS.get(tensor.dtype, str(tensor.dtype)), list(tensor.shape))
                       for name, tensor in _read_bin(file).items()}
            continue
        try:
            with safe_open(file, "pt") as shard:
                parts = {name: shard.get_slice(name) for name in list(shard.keys())}
                stored |= {name: Stored(file, part.get_dtype(), part.get_shape()) for name, part in parts.items()}
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{file}: not a whole .safetensors file ({error}); finish the download") from None
    return stored


def _pieces(name: str, tensor: Stored):
    """The rows of a tensor, some at a time. The file is mapped anew for each piece, because what has been read through
    a mapping takes memory until that is closed."""
    rows = max(1, PIECE // math.prod(tensor.shape[1:]))
    for start in range(0, tensor.shape[0], rows):
        with safe_open(tensor.file, "pt") as shard:
            yield shard.get_slice(name)[start:start + rows]


def _beginning(tensor) -> bytes:
    """Its first 1024 numbers, as stored."""
    return tensor.flatten()[:1024].contiguous().view(torch.uint8).numpy().tobytes()


def _check_tensors(path: Path, llm: LLM, stored: dict[str, Stored]):
    """Raise ValueError that lists whatever is missing, left over, or of another shape or kind than config.json asks."""
    odd = [name for name, tensor in stored.items() if tensor.dtype not in FLOATS.values()]
    if odd:
        raise ValueError(f"{path}: {odd[0]} in {stored[odd[0]].file.name} is {stored[odd[0]].dtype}, {len(odd)} of "
                         f"{len(stored)} tensors are not {', '.join(FLOATS.values())}; quantised weights (GPTQ, AWQ, "
                         "...) are not implemented, use the model's version in fp16, bf16 or fp32")
    config, asked = llm.config, {}
    for name, parameter in llm.state_dict().items():
        sources, (rows, *rest) = _sources(config.family, name), parameter.shape
        heads = (config.n_head, config.n_kv_head, config.n_kv_head)
        heights = [rows // len(sources)] * len(sources) if len(sources) < 3 else [n * config.head_dim for n in heads]
        asked |= {source: [height, *rest] for source, height in zip(sources, heights)}
    head, = _sources(config.family, "head.weight")
    if config.tied_head and head in stored:                 # some publish the embedding a second time
        asked[head] = [config.vocab_size, config.dim]
    problems = [f"missing: {name}" for name in asked if name not in stored]
    problems += [f"misshapen: {name} is {stored[name].shape} in {stored[name].file.name}, config.json asks for {shape}"
                 for name, shape in asked.items() if name in stored and stored[name].shape != shape]
    # Published checkpoints also carry their rotary tables, which rope_table computes.
    problems += [f"unused: {name} in {tensor.file.name}" for name, tensor in stored.items()
                 if name not in asked and not name.endswith(ROTARY_TABLES)]
    if problems:
        raise ValueError(f"{path}: the weights do not fit config.json:\n  " + "\n  ".join(problems))


# ---------------------------------------------------------------------------------------------------------------------
# What a checkpoint is, and how one of .bin files becomes one of .safetensors


# File: the kind of tokenizer it makes, in the order in which they are looked for.
TOKENIZERS = {"qwen.tiktoken": "byte-level BPE", "tokenizer.model": "sentencepiece",
              "merges.txt": "byte-level BPE, with vocab.json", "tokenizer.json": "byte-level BPE"}


def describe(path):
    """Print what a checkpoint is. Raises ValueError if its weights are there, but not as config.json asks for them."""
    llm, path = _on_meta(path), Path(path)
    c = llm.config
    print(f"family      {c.family}")
    print(f"sizes       {c.n_layer} layers of width {c.dim}, {c.n_head} heads of {c.head_dim} ({c.n_kv_head} for keys "
          f"and values), MLP {c.ffn_dim}, vocabulary {c.vocab_size}, {c.max_len} positions")
    print(f"parameters  {sum(p.numel() for p in llm.parameters()):,}")
    name = next((name for name in TOKENIZERS if (path / name).is_file()), None)
    print(f"tokenizer   {f'{name} ({TOKENIZERS[name]})' if name else 'none in this folder'}", flush=True)
    files = _shards(path, ".safetensors") or _shards(path, ".bin")
    if not files:
        return print("weights     none in this folder")
    stored = _stored(files)
    _check_tensors(path, llm, stored)
    dtypes, kind = ", ".join(sorted({tensor.dtype for tensor in stored.values()})), files[0].suffix
    print(f"weights     {sum(file.stat().st_size for file in files):,} bytes of {dtypes} in {len(files)} {kind} "
          f"file{'s'[:len(files) > 1]}{'; --to-safetensors makes them loadable' if kind == '.bin' else ''}")


def convert(path, out):
    """Write the checkpoint of .bin shards in `path` as .safetensors shards to the folder `out`.

    After an interruption call it again: it goes on with the first shard that is not there. The index is written last,
    and load_llm refuses shards without one. Raises ValueError before anything is written if a file is not what it
    should be.
    """
    llm, path, out = _on_meta(path), Path(path), Path(out)
    files = _shards(path, ".bin")
    if not files:
        raise ValueError(f"{path}: no pytorch_model*.bin there to convert; fetch the model's weights")
    _check_tensors(path, llm, _stored(files))
    targets = [out / f"model-{i:05}-of-{len(files):05}.safetensors" for i in range(1, len(files) + 1)]
    if strangers := sorted(set(out.glob("*.safetensors")) - set(targets)):
        raise ValueError(f"{strangers[0]}: not of this conversion; choose a folder without .safetensors files")
    out.mkdir(parents=True, exist_ok=True)
    home = {}                                               # each tensor's new file
    for file, target in zip(files, targets):
        tensors = {name: tensor for name, tensor in _read_bin(file).items() if not name.endswith(ROTARY_TABLES)}
        seal = hashlib.sha256(b"".join(name.encode() + _beginning(tensor) for name, tensor in tensors.items()))
        metadata = {"format": "pt", "source": seal.hexdigest()}
        try:
            with safe_open(target, "pt") as shard:
                whole = shard.metadata() == metadata
        except FileNotFoundError:
            write_atomic(target, _safetensors(tensors, metadata))
            whole = True
        except SafetensorError:
            whole = False
        if not whole:
            raise ValueError(f"{target}: not made from {file}; delete it, or choose another folder")
        home |= dict.fromkeys(tensors, target.name)
        print(f"{file.name} -> {target}", flush=True)
    for file in path.iterdir():                             # config.json and whatever belongs to a tokenizer
        if file.suffix in (".json", ".txt", ".model", ".tiktoken") and not file.name.endswith(".index.json"):
            write_atomic(out / file.name, file.read_bytes())
    write_atomic(out / INDEX[".safetensors"], json.dumps({"metadata": {}, "weight_map": home}, indent=1).encode())


def _read_bin(file: Path) -> dict[str, torch.Tensor]:
    """A file of torch.save: plain dense tensors only, and nothing in it is run. Memory-mapped, unless it is of the old
    format (before torch 1.6), which must be read whole."""
    with open(file, "rb") as start:
        mapped = start.read(4) == b"PK\3\4"
    try:
        tensors = torch.load(file, map_location="cpu", weights_only=True, mmap=mapped)
    except Exception as error:          # whatever a damaged or hostile file provokes, it was refused
        asked = re.search(r"GLOBAL ([\w.]+)", str(error))
        reason = f"it wants {asked[1]}" if asked else str(error).split("\n")[0] or type(error).__name__
        raise ValueError(f"{file}: not a whole file of plain tensors ({reason}); nothing in it was run; fetch it "
                         "again, from a source that you trust") from None
    if not isinstance(tensors, dict):
        raise ValueError(f"{file}: holds a {type(tensors).__name__}, expected names and tensors; fetch the file again")
    for name, x in tensors.items():
        if not isinstance(name, str) or type(x) not in (torch.Tensor, nn.Parameter) or x.layout != torch.strided or (
                x.is_quantized or x.is_nested or x.is_neg() or x.device.type != "cpu"):
            kind = f"{x.layout} {x.dtype} on {x.device}" if isinstance(x, torch.Tensor) else type(x).__name__
            raise ValueError(f"{file}: {name!r} is a {kind}, expected a plain dense tensor; use the model's version in "
                             "fp16, bf16 or fp32")
    return {name: x.detach() for name, x in tensors.items()}


def _safetensors(tensors: dict[str, torch.Tensor], metadata: dict[str, str]):
    """The pieces of a .safetensors file: the header's length, the header in JSON, each tensor's bytes. One tensor at a
    time is copied, and only where it is a view whose numbers do not lie in a row."""
    names = sorted(tensors, key=lambda name: -tensors[name].itemsize)   # the widest first, so that all are aligned
    header, end = {"__metadata__": metadata}, 0
    for name in names:
        x, start, end = tensors[name], end, end + tensors[name].nbytes
        header[name] = {"dtype": FLOATS[x.dtype], "shape": list(x.shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    yield len(text).to_bytes(8, "little") + text
    for name in names:
        yield tensors[name].contiguous().flatten().view(torch.uint8).numpy()


def main():
    parser = argparse.ArgumentParser(description="What a checkpoint is; with --to-safetensors, convert it.")
    parser.add_argument("path", metavar="DIR", help="a checkpoint folder in Hugging Face layout")
    parser.add_argument("--to-safetensors", metavar="OUT", help="write its .bin weights as .safetensors to this folder")
    options = parser.parse_args()
    if options.to_safetensors:
        convert(options.path, options.to_safetensors)
        options.path = options.to_safetensors
    describe(options.path)


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
