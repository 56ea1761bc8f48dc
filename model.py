"""The frozen backbone: one decoder-only transformer for the published LLaMA, Qwen and ChatGLM3 weights.

    Config     the sizes, read from the checkpoint's own config.json
    LLM        embeddings -> blocks of attention and SwiGLU -> norm -> output head; greedy decoding
    KVCache    the keys and values of the positions already read
    Recompute  gradient checkpointing, written by hand
    NAMES      our names for the layers and each family's
    load_llm   .safetensors or .bin -> device, tensor by tensor, strict both ways; try python model.py DIR

The families differ by data (sizes, biases, the pairing of rotary channels, tensor names), never by class.
Shapes: B rows, T new positions, S cached + new positions, C width (dim), H query heads, K key/value heads,
D width of a head, R rotated channels of a head, V vocabulary, N positions of all rows that are no padding.
"""
import hashlib
import math
import re
import sys
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors.torch import load_file

from extras.files import read_index, read_json

# --- Config -------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Config:
    """The sizes of a backbone and the few switches by which the families differ."""
    family: str             # model_type in config.json, a key of SWITCHES
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
    rope_interleaved: bool = False  # channels (0,1), (2,3), ... turn together; else (0,R/2), (1,R/2+1), ...
    rope_llama3: tuple = ()         # factor, low and high frequency factor, original length; (): no scaling
    qk_norm: bool = False           # RMSNorm over each head's queries and keys
    qkv_bias: bool = False
    tied_head: bool = False         # the output head is the embedding matrix
    column: int = 0                 # of NAMES

    @classmethod
    def from_dir(cls, path) -> "Config":
        """Read `path`/config.json. Raises ValueError for a family or feature that is not implemented."""
        file = Path(path) / "config.json"
        raw = read_json(file)
        check_features(raw, file)
        sizes = {"family": raw["model_type"], **SWITCHES[raw["model_type"]]}
        for name, keys in KEYS.items():
            found = [raw[key] for key in keys if raw.get(key) is not None]
            if found:
                sizes[name] = found[0]
        sizes.setdefault("n_kv_head", sizes.get("n_head"))
        for field in fields(cls):
            value = sizes.get(field.name, 1 if field.name == "head_dim" else field.default)
            if field.name in KEYS and field.type in (int, float):
                is_number = type(value) in (int, field.type)
                if not is_number or not 0 < value < LIMITS.get(field.name, 2**24):
                    found = repr(value)[:80] if field.name in sizes else "missing"
                    raise ValueError(f"{file}: {' or '.join(KEYS[field.name])} is {found}, expected a "
                                     "positive number; fetch the file again")
        sizes.setdefault("head_dim", sizes["dim"] // sizes["n_head"])
        if sizes["n_head"] % sizes["n_kv_head"]:
            raise ValueError(f"{file}: {sizes['n_head']} heads cannot share {sizes['n_kv_head']} key/value "
                             "heads evenly; fetch the file again")
        sizes["rope_llama3"] = tuple(raw.get("rope_llama3", ()))
        if sizes["family"] == "qwen":           # it counts gate and up together
            sizes["ffn_dim"] //= 2
        sizes["rope_dim"] = sizes["head_dim"] // 2 if sizes["family"] == "chatglm" else sizes["head_dim"]
        return cls(**sizes)

# Our sizes: where config.json has them. Where it has two of the keys, the first counts.
KEYS = {
    "dim": ["hidden_size"],
    "n_layer": ["num_hidden_layers", "num_layers"],
    "n_head": ["num_attention_heads"],
    "n_kv_head": ["multi_query_group_num", "num_key_value_heads"],
    "head_dim": ["kv_channels", "head_dim"],
    "ffn_dim": ["ffn_hidden_size", "intermediate_size"],
    "vocab_size": ["padded_vocab_size", "vocab_size"],
    "max_len": ["seq_length", "max_position_embeddings"],       # beyond it Qwen's first generation differs
    "norm_eps": ["layernorm_epsilon", "layer_norm_epsilon", "rms_norm_eps"],
    "rope_theta": ["rotary_emb_base", "rope_theta"],
    "qkv_bias": ["add_qkv_bias"],
    "tied_head": ["tie_word_embeddings"],
}
LIMITS = {"n_layer": 1000, "n_head": 1000, "n_kv_head": 1000, "rope_theta": 2**40}      # others: 2**24
SWITCHES = {
    "llama": {},
    "mistral": {},
    "qwen2": {"qkv_bias": True},                                            # Qwen1.5, 2, 2.5
    "qwen3": {"qk_norm": True},
    "qwen": {"qkv_bias": True, "column": 1},                                # first generation
    "chatglm": {"qkv_bias": True, "rope_interleaved": True, "column": 2},   # ChatGLM3
}
LLAMA3 = ["factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"]
# What this transformer takes for granted. A config.json that has one of these keys otherwise is refused.
FIXED = {
    "quantization_config": None, "quantization_bit": 0,         # whole weights only
    "rope_ratio": 1, "rotary_pct": 1.0, "partial_rotary_factor": 1.0, "original_rope": True,
    "hidden_act": "silu", "use_sliding_window": False,
    "attention_bias": False, "mlp_bias": False, "no_bias": True, "add_bias_linear": False,
    "rmsnorm": True, "post_layer_norm": True, "apply_residual_connection_post_layernorm": False,
    "multi_query_attention": True, "scale_attn_weights": True, "fp32_residual_connection": False,
}

def check_features(raw: dict, file: Path):
    """Raise ValueError for what is not implemented. Newer files nest the rotary keys: lift them."""
    if raw.get("model_type") not in list(SWITCHES):
        raise ValueError(f"{file}: model_type is {raw.get('model_type')!r:.80}; use a backbone of a family "
                         f"that is implemented: {', '.join(SWITCHES)}")
    for key in ("rope_scaling", "rope_parameters"):
        rope = raw.get(key) or {}
        kind = rope.get("rope_type", rope.get("type", "default")) if isinstance(rope, dict) else rope
        if kind == "llama3":
            raw["rope_llama3"] = [rope.get(name) for name in LLAMA3]
            for name, value in zip(LLAMA3, raw["rope_llama3"]):
                if type(value) not in (int, float):
                    raise ValueError(f"{file}: {name} is {value!r:.80}, expected a number; fetch it again")
        elif kind != "default":
            raise ValueError(f"{file}: {key} is {rope!r:.100}, but only plain rotary embedding and llama3's "
                             "are here; use a model without (where it was added for length, delete the key)")
        raw |= {name: rope[name] for name in ("rope_theta", "partial_rotary_factor") if name in rope}
    if raw.get("sliding_window") and raw.get("use_sliding_window", True):
        raise ValueError(f"{file}: sliding_window is {raw['sliding_window']!r:.80}, which is not here; "
                         "use a model whose attention sees everything")
    for key, value in FIXED.items():
        if raw.get(key) not in (None, value):
            raise ValueError(f"{file}: {key} is {raw[key]!r:.100}, but only {value!r} is implemented; use "
                             "another of the family, of a quantised one its version in fp16, bf16 or fp32")

# --- The transformer ----------------------------------------------------------------------------------------
def rope_table(positions, config: Config):
    """Positions (B, T) -> cosines and sines (B, 1, T, R/2) in fp32, shared by all layers and heads."""
    steps = torch.arange(0, config.rope_dim, 2, device=positions.device).float() / config.rope_dim
    turns = 1.0 / config.rope_theta ** steps                                    # (R/2,), radians per position
    if config.rope_llama3:              # channels that turn less than `low` times in `length` slow down
        factor, low, high, length = config.rope_llama3
        keep = ((length * turns / (2 * math.pi) - low) / (high - low)).clamp(0, 1)
        turns = turns * (keep + (1 - keep) / factor)
    angle = positions[:, None, :, None].float() * turns
    return angle.cos(), angle.sin()

def apply_rope(x, rope, interleaved: bool):
    """Turn the first R channels of each head of x (B, heads, T, D) by its position's angles; others stay."""
    cos, sin = rope
    R = 2 * cos.size(-1)
    turned, rest = x[..., :R].to(torch.promote_types(x.dtype, torch.float32)), x[..., R:]
    a, b = (turned[..., 0::2], turned[..., 1::2]) if interleaved else turned.chunk(2, dim=-1)
    a, b = a * cos - b * sin, b * cos + a * sin                                 # (B, heads, T, R/2)
    turned = torch.stack((a, b), dim=-1).flatten(-2) if interleaved else torch.cat((a, b), dim=-1)
    return torch.cat((turned.type_as(x), rest), dim=-1)

class KVCache:
    """Keys and values of the positions already read, layer by layer; new ones are joined behind. A frozen
    one stores nothing new: rows go on behind it, again and again. Its one row serves all of a batch."""

    def __init__(self, n_layer: int):
        self.layers = [None] * n_layer      # each (k, v), both (B or 1, K, S, D)
        self.frozen = False
        self.origin = 0                     # cached positions that are seen, but do not count for new ones

    @property
    def length(self) -> int:
        """Positions cached."""
        return 0 if self.layers[-1] is None else self.layers[-1][0].size(2)

    def extend(self, layer: int, k, v):
        """Keys and values (B, K, T, D) of the new positions -> those of all S positions."""
        if self.layers[layer] is not None:
            k_past, v_past = (past.expand(len(k), -1, -1, -1) for past in self.layers[layer])
            k, v = torch.cat((k_past, k), dim=2), torch.cat((v_past, v), dim=2)     # (B, K, S, D)
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
    real: torch.Tensor | None       # (N,): which of all rows' new positions, B * T, are no padding; None: all
    last: int               # how many positions, from the end of each row, are wanted after the block

def at_real(module, x, real):
    """Apply a module that treats each position alone to the real ones of x (B, T, C); padding gets zeros."""
    if real is None:
        return module(x)
    y = module(x.flatten(0, 1).index_select(0, real))                           # (N, C')
    rows = y.new_zeros(x.size(0) * x.size(1), y.size(1)).index_copy(0, real, y)
    return rows.unflatten(0, x.shape[:2])                                       # (B, T, C')

class Attention(nn.Module):
    def __init__(self, config: Config, layer: int):
        super().__init__()
        self.config, self.layer = config, layer
        heads = config.n_head + 2 * config.n_kv_head
        self.qkv = nn.Linear(config.dim, heads * config.head_dim, bias=config.qkv_bias)
        self.out = nn.Linear(config.n_head * config.head_dim, config.dim, bias=False)
        if config.qk_norm:
            self.q_norm = nn.RMSNorm(config.head_dim, config.norm_eps)
            self.k_norm = nn.RMSNorm(config.head_dim, config.norm_eps)

    def forward(self, x, places: Places, cache: KVCache | None = None):
        """Hidden states (B, T, C) -> what the wanted positions read, (B, last, C)."""
        c, last = self.config, places.last
        qkv = at_real(self.qkv, x, places.real).unflatten(2, (-1, c.head_dim))  # (B, T, H + 2K, D)
        q, k, v = qkv.transpose(1, 2).split([c.n_head, c.n_kv_head, c.n_kv_head], dim=1)
        if c.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = (apply_rope(t, places.rope, c.rope_interleaved) for t in (q, k))
        if cache is not None:
            k, v = cache.extend(self.layer, k, v)                               # (B, K, S, D)
        if c.n_kv_head < c.n_head:      # query head h reads head h // (H/K): 0 0 0 1 1 1, not 0 1 0 1 0 1
            k, v = (t.repeat_interleave(c.n_head // c.n_kv_head, dim=1) for t in (k, v))
        sees = places.sees[:, :, -last:]
        h = F.scaled_dot_product_attention(q[:, :, -last:], k, v, attn_mask=sees).transpose(1, 2).flatten(2)
        return at_real(self.out, h, places.real if last == x.size(1) else None) # (B, last, C)

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
        self.attn_norm, self.attn = nn.RMSNorm(config.dim, config.norm_eps), Attention(config, layer)
        self.mlp_norm, self.mlp = nn.RMSNorm(config.dim, config.norm_eps), MLP(config)

    def forward(self, x, places: Places, cache: KVCache | None = None):
        """Hidden states (B, T, C) -> those after the block at the wanted positions, (B, last, C)."""
        real = places.real if places.last == x.size(1) else None
        x = x[:, -places.last:] + self.attn(self.attn_norm(x), places, cache)
        return x + at_real(self.mlp, self.mlp_norm(x), real)

class Recompute(torch.autograd.Function):
    """Gradient checkpointing of one frozen block: keep its input only, run it again in backward.

    A block's own activations (some 16 times its input) live only while its backward runs, so memory grows by
    one hidden state (B, T, C) per block. The price is one more forward. Gradients flow to the input alone.
    """

    @staticmethod
    def forward(ctx, x, block, places, cache):
        assert not any(p.requires_grad for p in block.parameters()), "Recompute is for frozen blocks only"
        fit = cache is None or (cache.frozen and not cache.layers[block.attn.layer][0].requires_grad)
        assert fit, "what is cached would be stored twice, or gradients into it lost: take a frozen cache"
        ctx.save_for_backward(x)
        ctx.block, ctx.places, ctx.cache = block, places, cache
        return block(x, places, cache)  # autograd is off in here: nothing of the block is kept

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
        # Token ids (B, T) -> (B, T, C). (nn.Embedding(V, C) imports a compiler on the meta device.)
        self.embed = nn.Embedding.from_pretrained(torch.randn(config.vocab_size, config.dim))
        self.blocks = nn.ModuleList(Block(config, layer) for layer in range(config.n_layer))
        self.norm = nn.RMSNorm(config.dim, config.norm_eps)
        if not config.tied_head:
            self.head = nn.Linear(config.dim, config.vocab_size, bias=False)
        self.requires_grad_(False)

    def logits(self, hidden):
        """Hidden states (..., C) -> scores of the next token (..., V) in fp32. Pass only what you need."""
        head = self.embed if self.config.tied_head else self.head
        return F.linear(hidden, head.weight).to(torch.promote_types(hidden.dtype, torch.float32))

    def forward(self, x, mask=None, cache: KVCache | None = None, recompute=0, last: int | None = None):
        """Embeddings (B, T, C) -> hidden states after the last norm, (B, T, C), or of `last` positions alone.

        mask: (B, S) bool of cached and new positions, False where a row is padding, which stands in front;
        None: there is none. Only attention computes padding. recompute: how many blocks, from the first on,
        keep only their input for backward. last: wanted positions, from the end; the last block gives these.
        """
        places = self.places(x, mask, cache)
        for layer, block in enumerate(self.blocks):
            if last is not None and layer == self.config.n_layer - 1:
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
        S = past + T                                                            # new ones, and cached ones
        if S - origin > self.config.max_len:
            raise ValueError(f"a row has {S - origin} positions, but the backbone was trained for "
                             f"{self.config.max_len}; shorten the text or take another backbone")
        key = torch.arange(S, device=x.device)                                  # (S,)
        query = key[past:, None]                                                # (T, 1)
        if mask is None:
            mask = torch.ones(1, S, dtype=torch.bool, device=x.device)
        positions = (mask.cumsum(dim=1) - 1 - origin).clamp(min=0)[:, past:]    # (B, T)
        sees = (key <= query) & mask[:, None] | (key == query)      # padding must look at something: itself
        real = mask[:, past:].flatten().nonzero()[:, 0]                         # (N,)
        if len(real) == positions.numel():
            real = None
        return Places(rope_table(positions, self.config), sees[:, None], real, T)

    def read(self, ids: list[int]) -> KVCache:
        """Read a beginning that rows share -> a frozen cache, behind which they go on."""
        cache = KVCache(self.config.n_layer)
        self(self.embed(torch.tensor([ids], device=self.embed.weight.device)), cache=cache)
        cache.frozen = True
        return cache

    @torch.no_grad()
    def generate(self, x, max_new_tokens: int, mask=None, eos_id: int | None = None, cache=None):
        """Greedy decoding from embeddings x (B, T, C), padded in front where the mask is False; see forward.

        Returns the new tokens alone, (B, at most max_new_tokens). A row that has written `eos_id` goes on
        with it, and decoding ends when all rows have. cache: what was read before x; it is left as it is.
        """
        assert mask is None or bool(mask[:, -1].all()), "padding stands in front of a row"
        cache = KVCache(self.config.n_layer) if cache is None else cache.copy()
        done = torch.zeros(len(x), dtype=torch.bool, device=x.device)
        new = torch.empty(len(x), 0, dtype=torch.long, device=x.device)
        while new.size(1) < max_new_tokens and not bool(done.all()):
            ids = self.logits(self(x, mask, cache, last=1)[:, -1]).argmax(dim=-1)               # (B,)
            if eos_id is not None:
                ids = ids.masked_fill(done, eos_id)
                done = done | (ids == eos_id)
            new = torch.cat((new, ids[:, None]), dim=1)
            x = self.embed(new[:, -1:])                                         # (B, 1, C)
            if mask is not None:
                mask = F.pad(mask, (0, 1), value=True)
        return new

# --- Loading ------------------------------------------------------------------------------------------------
# Our layers' names: those in a LLaMA checkpoint and its kin, in Qwen's first generation, in ChatGLM3. Several
# tensors on disk that make one of ours are stacked along dimension 0; {} is the number of the block.
NAMES = {
    "blocks.{}.": ("model.layers.{}.", "transformer.h.{}.", "transformer.encoder.layers.{}."),
    "attn_norm": ("input_layernorm", "ln_1", "input_layernorm"),
    "attn.qkv": ("self_attn.q_proj self_attn.k_proj self_attn.v_proj", "attn.c_attn",
                 "self_attention.query_key_value"),
    "attn.q_norm": ("self_attn.q_norm",),
    "attn.k_norm": ("self_attn.k_norm",),
    "attn.out": ("self_attn.o_proj", "attn.c_proj", "self_attention.dense"),
    "mlp_norm": ("post_attention_layernorm", "ln_2", "post_attention_layernorm"),
    "mlp.gate_up": ("mlp.gate_proj mlp.up_proj", "mlp.w2 mlp.w1", "mlp.dense_h_to_4h"),  # w2 is the gate
    "mlp.down": ("mlp.down_proj", "mlp.c_proj", "mlp.dense_4h_to_h"),
    "embed": ("model.embed_tokens", "transformer.wte", "transformer.embedding.word_embeddings"),
    "norm": ("model.norm", "transformer.ln_f", "transformer.encoder.final_layernorm"),
    "head": ("lm_head", "lm_head", "transformer.output_layer"),
}
FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
ROTARY_TABLES = ("rotary_emb.inv_freq", "rotary_pos_emb.inv_freq")  # some checkpoints have them

def load_llm(path, device="cpu", dtype=torch.float32) -> LLM:
    """Load a checkpoint folder (config.json, .safetensors or .bin files) onto `device` in `dtype`, frozen.
    Raises ValueError that names each missing, unused or misshapen tensor with both shapes and the file."""
    path = Path(path)
    with torch.device("meta"):                  # no memory yet
        llm = LLM(Config.from_dir(path))
    stored = find_tensors(path)
    check_tensors(path, llm, stored)
    weights, seal = {}, hashlib.sha256()
    for name, parameter in llm.state_dict().items():
        weights[name] = torch.empty(parameter.shape, device=device, dtype=dtype)
        start = 0
        for source in sources(llm.config, name):
            # Mapped anew: what was read through a mapping takes memory until that closes.
            tensor = open_tensors(stored[source][0])[source]
            weights[name][start:start + len(tensor)].copy_(tensor)
            start += len(tensor)
            seal.update(tensor.flatten()[:1024].clone().view(torch.uint8).numpy().tobytes())
    llm.load_state_dict(weights, assign=True)
    llm.requires_grad_(False)
    llm.fingerprint = seal.hexdigest()[:16]     # the first 1024 numbers of every tensor, as stored
    return llm

def sources(config: Config, name: str) -> list[str]:
    """A parameter's names on disk: blocks.7.mlp.down.weight -> [model.layers.7.mlp.down_proj.weight]."""
    block, part, kind = re.fullmatch(r"(?:blocks\.(\d+)\.)?(.+)\.(weight|bias)", name).groups()
    prefix = NAMES["blocks.{}."][config.column].format(block) if block else ""
    return [f"{prefix}{layer}.{kind}" for layer in NAMES[part][config.column].split()]

def find_tensors(path: Path) -> dict:
    """{name: (file, tensor)} of a folder's weights, mapped, not read. An index is followed."""
    stored, (files, homes) = {}, weight_files(path)
    for file in files:
        for name, tensor in open_tensors(file).items():
            if homes.get(name, file.name) != file.name:
                continue                        # the index says that it lies in another file
            if name in stored:
                raise ValueError(f"{path}: {name:.99} is in {stored[name][0].name} and in {file.name}; keep "
                                 "the file that belongs to this checkpoint")
            stored[name] = file, tensor
    return stored

def weight_files(path: Path) -> tuple[list[Path], dict]:
    """The .safetensors or else .bin files of a folder, and their index {tensor: file name} or {}."""
    for kind, glob in (("model.safetensors", "*.safetensors"), ("pytorch_model.bin", "pytorch_model*.bin")):
        index = path / f"{kind}.index.json"
        if index.is_file():
            homes = read_index(index)
            return [path / name for name in sorted(set(homes.values()))], homes
        files = sorted(path.glob(glob))
        if files:
            return files, {}
    raise ValueError(f"{path}: no .safetensors and no pytorch_model*.bin there; fetch the model's weights")

def open_tensors(file: Path) -> dict[str, torch.Tensor]:
    """The tensors of a file, mapped. Raises ValueError for any but dense ones; nothing in a .bin is run."""
    try:
        if file.suffix == ".bin":
            tensors = dict(torch.load(file, map_location="cpu", weights_only=True, mmap=True))
        else:
            tensors = load_file(file)
        for name, x in tensors.items():
            dense = type(x) in (torch.Tensor, nn.Parameter) and x.layout == torch.strided and not x.is_nested
            if not dense or x.is_meta:
                raise TypeError(f"{name} is no plain dense tensor")
    except FileNotFoundError:
        raise ValueError(f"{file}: named in the index beside it, but missing; finish the download, or delete "
                         "the index if the weights beside it are whole") from None
    except Exception as error:                  # whatever a damaged or hostile file provokes, it was refused
        with open(file, "rb") as start:
            pointer = start.read(7) == b"version"
        found = "a git-lfs pointer: run `git lfs pull`" if pointer else " ".join(str(error).split())[-300:]
        raise ValueError(f"{file}: not a whole file of dense tensors ({found}); nothing in it was run; fetch "
                         "it again, from a source that you trust") from None
    return {str(name): tensor.detach() for name, tensor in tensors.items()}

def check_tensors(path: Path, llm: LLM, stored: dict):
    """Raise ValueError that lists what is missing, left over, or of another shape or kind than asked."""
    config, asked = llm.config, {}
    for name, parameter in llm.state_dict().items():
        names, (rows, *rest) = sources(config, name), parameter.shape
        heights = [rows // len(names)] * len(names)
        if len(names) == 3:                     # queries, keys and values
            heights = [n * config.head_dim for n in (config.n_head, config.n_kv_head, config.n_kv_head)]
        asked |= {source: (height, *rest) for source, height in zip(names, heights)}
    head, embedding = (sources(config, name)[0] for name in ("head.weight", "embed.weight"))
    twice = config.tied_head and head in stored             # some publish a tied embedding a second time
    if twice:
        asked[head] = asked[embedding]
    problems = [f"missing: {name}" for name in asked if name not in stored]
    for name, (file, x) in stored.items():
        if x.dtype not in FLOATS:
            problems.append(f"{x.dtype}: {name} in {file.name}; use the version in fp16, bf16 or fp32")
        elif name not in asked and not name.endswith(ROTARY_TABLES):
            problems.append(f"unused: {name} in {file.name}")
        elif name in asked and x.shape != asked[name]:
            problems.append(f"misshapen: {name} is {list(x.shape)} in {file.name}, config.json asks for "
                            f"{list(asked[name])}")
    if twice and not problems and not torch.equal(stored[head][1], stored[embedding][1]):
        problems.append(f"{head} is not {embedding}, but config.json has tie_word_embeddings")
    if problems:
        listed = "\n  ".join(problems)[:1800]
        raise ValueError(f"{path}: {len(problems)} weights do not fit config.json:\n  {listed}")

if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("error: expected a checkpoint folder: python model.py DIR")
    try:
        llm = load_llm(sys.argv[1])
        print(f"{asdict(llm.config)}\n{sum(p.numel() for p in llm.parameters()):,} parameters, all there")
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
