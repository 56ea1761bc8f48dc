"""The frozen backbone: one decoder-only transformer for the published LLaMA, Qwen and ChatGLM3 weights.

    Config     the sizes, read from the checkpoint's own config.json
    Block      attention and SwiGLU, each added to what came in
    KVCache    the keys and values of the positions already read
    Recompute  gradient checkpointing, written by hand
    LLM        embeddings -> blocks -> norm -> output head; greedy decoding
    NAMES      our names for the layers and each family's
    load_llm   .safetensors or .bin -> device, tensor by tensor, strict both ways; try python model.py DIR

The families differ by data (sizes, biases, the pairing of rotary channels, tensor names), never by class.
This file needs torch, numpy and safetensors alone: copy it wherever you want a LLaMA.

Shapes: B rows, T new positions, S cached + new positions, C width (dim), H query heads, K key/value heads,
D width of a head, R rotated channels of a head, V vocabulary, N positions of all rows that are no padding.
"""
import hashlib
import json
import math
import pickletools
import re
import sys
import zipfile
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors.torch import load_file


class CheckpointError(ValueError):
    """A checkpoint that cannot be used: the file, what was found, what was expected, what to do."""


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
        """Read `path`/config.json. Raises CheckpointError for a family or feature that is not implemented."""
        return cls(**read_sizes(Path(path) / "config.json"))


# --- The transformer ----------------------------------------------------------------------------------------
def rope_table(positions, config: Config):
    """Positions (N,) -> cosines and sines (N, 1, R/2) in fp32, shared by all layers and heads."""
    steps = torch.arange(0, config.rope_dim, 2, device=positions.device).float() / config.rope_dim
    turns = 1.0 / config.rope_theta ** steps                        # (R/2,), radians per position
    if config.rope_llama3:
        # Channels that turn less than `low` times in `length` positions slow down by `factor`, those that
        # turn more than `high` times stay, in between it is a mixture.
        factor, low, high, length = config.rope_llama3
        keep = (length * turns / (2 * math.pi) - low) / (high - low)
        keep = keep.clamp(0, 1)
        turns = (1 - keep) * turns / factor + keep * turns
    angle = positions[:, None, None].float() * turns                # (N, 1, R/2)
    return angle.cos(), angle.sin()


def apply_rope(x, rope, interleaved: bool):
    """Turn the first R channels of each head of x (N, heads, D) by its position's angles; others stay."""
    cos, sin = rope
    R = 2 * cos.size(-1)        # all of a head, but for ChatGLM3, whose other half knows no position
    turned, rest = x[..., :R], x[..., R:]
    turned = turned.to(torch.promote_types(x.dtype, torch.float32))     # fp32 at least
    if interleaved:             # the pairs are channels (0,1), (2,3), ...
        a, b = turned[..., 0::2], turned[..., 1::2]
    else:                       # (0,R/2), (1,R/2+1), ...
        a, b = turned.chunk(2, dim=-1)
    a, b = a * cos - b * sin, b * cos + a * sin                     # (N, heads, R/2)
    if interleaved:
        turned = torch.stack((a, b), dim=-1).flatten(-2)
    else:
        turned = torch.cat((a, b), dim=-1)
    return torch.cat((turned.type_as(x), rest), dim=-1)


class Places:
    """Where the new positions stand and what each of them sees: made once, the same for all blocks.

    A batch is padded in front. The blocks compute its real positions alone, packed into one long row; only
    attention needs them row by row. Of three rows, "." being padding:

        . . a b          mask  0 0 1 1
        c d e f                1 1 1 1      ->   packed  a b c d e f g h i       N = 9
        . g h i                0 1 1 1
    """

    def __init__(self, mask, sees, positions, config: Config):
        self.shape = mask.shape             # B, T
        self.sees = sees                    # (B, 1, T, S) bool: which positions each new one looks at
        self.real = mask.flatten().nonzero()[:, 0]      # (N,): numbers of the real positions among B * T
        if len(self.real) == mask.numel():
            self.real = None                # all are real: packing and unpacking cost nothing
        self.rope = rope_table(self.pack(positions), config)

    def pack(self, x):
        """(B, T, ...) -> (N, ...)."""
        x = x.flatten(0, 1)
        if self.real is None:
            return x
        return x.index_select(0, self.real)

    def unpack(self, x):
        """(N, ...) -> (B, T, ...), with zeros where a row is padding."""
        if self.real is not None:
            B, T = self.shape
            zeros = x.new_zeros(B * T, *x.shape[1:])
            x = zeros.index_copy(0, self.real, x)
        return x.unflatten(0, self.shape)


class KVCache:
    """Keys and values of the positions already read, layer by layer; new ones are joined behind."""

    def __init__(self, n_layer: int):
        self.layers = [None] * n_layer      # each (k, v), both (B, K, S, D)
        self.real = None                    # (B, S) bool: which of them are no padding

    def mark(self, mask):
        """Note which of the new positions (B, T) are real -> the same of all S positions."""
        if self.real is not None:
            mask = torch.cat((self.real, mask), dim=1)
        self.real = mask
        return mask

    def extend(self, layer: int, k, v):
        """Keys and values (B, K, T, D) of the new positions -> those of all S positions."""
        if self.layers[layer] is not None:
            k_past, v_past = self.layers[layer]
            k = torch.cat((k_past, k), dim=2)                       # (B, K, S, D)
            v = torch.cat((v_past, v), dim=2)
        self.layers[layer] = k, v
        return k, v

    def copy(self) -> "KVCache":
        """Another one that holds the same so far, to go on behind it in a different way."""
        copy = KVCache(len(self.layers))
        copy.layers = list(self.layers)
        copy.real = self.real
        return copy


class Attention(nn.Module):
    """Each position mixes the values of the positions that it sees, more where key and query fit."""

    def __init__(self, config: Config, layer: int):
        super().__init__()
        self.config = config
        self.layer = layer
        heads = config.n_head + 2 * config.n_kv_head                # queries; keys and values
        self.qkv = nn.Linear(config.dim, heads * config.head_dim, bias=config.qkv_bias)
        self.out = nn.Linear(config.n_head * config.head_dim, config.dim, bias=False)
        if config.qk_norm:
            self.q_norm = nn.RMSNorm(config.head_dim, config.norm_eps)
            self.k_norm = nn.RMSNorm(config.head_dim, config.norm_eps)

    def forward(self, x, places: Places, cache: KVCache | None = None):
        """Hidden states (N, C) -> what each position reads, (N, C)."""
        c = self.config
        qkv = self.qkv(x).unflatten(1, (-1, c.head_dim))            # (N, H + 2K, D)
        q, k, v = qkv.split([c.n_head, c.n_kv_head, c.n_kv_head], dim=1)
        if c.qk_norm:
            q = self.q_norm(q)
            k = self.k_norm(k)
        q = apply_rope(q, places.rope, c.rope_interleaved)
        k = apply_rope(k, places.rope, c.rope_interleaved)

        # By rows: (N, heads, D) -> (B, heads, T, D)
        q, k, v = (places.unpack(t).transpose(1, 2) for t in (q, k, v))
        if cache is not None:
            k, v = cache.extend(self.layer, k, v)                   # (B, K, S, D)
        shared = c.n_head // c.n_kv_head    # query heads that read one key/value head
        if shared > 1:
            # Query head h reads key/value head h // shared: 0 0 0 1 1 1, not 0 1 0 1 0 1.
            k = k.repeat_interleave(shared, dim=1)
            v = v.repeat_interleave(shared, dim=1)
        h = F.scaled_dot_product_attention(q, k, v, attn_mask=places.sees)      # (B, H, T, D)
        h = h.transpose(1, 2).flatten(2)                            # (B, T, H * D)
        return self.out(places.pack(h))                             # (N, C)


class MLP(nn.Module):
    """SwiGLU: down(silu(gate(x)) * up(x))."""

    def __init__(self, config: Config):
        super().__init__()
        self.gate_up = nn.Linear(config.dim, 2 * config.ffn_dim, bias=False)    # both in one product
        self.down = nn.Linear(config.ffn_dim, config.dim, bias=False)

    def forward(self, x):
        gate, up = self.gate_up(x).chunk(2, dim=-1)
        return self.down(F.silu(gate) * up)


class Block(nn.Module):
    def __init__(self, config: Config, layer: int):
        super().__init__()
        self.attn_norm = nn.RMSNorm(config.dim, config.norm_eps)
        self.attn = Attention(config, layer)
        self.mlp_norm = nn.RMSNorm(config.dim, config.norm_eps)
        self.mlp = MLP(config)

    def forward(self, x, places: Places, cache: KVCache | None = None):
        """Hidden states (N, C) -> those after the block, (N, C)."""
        x = self.add_attention(x, places, cache)
        return self.add_mlp(x)

    def add_attention(self, x, places: Places, cache: KVCache | None):
        return x + self.attn(self.attn_norm(x), places, cache)

    def add_mlp(self, x):
        return x + self.mlp(self.mlp_norm(x))


class Recompute(torch.autograd.Function):
    """Gradient checkpointing of one frozen block: keep its input only, run it again in backward.

    A block's own activations (some 16 times its input) live only while its backward runs, so memory grows by
    one hidden state (N, C) per block. The price is one more forward. Gradients flow to the input alone.
    """

    @staticmethod
    def forward(ctx, x, block, places):
        assert not any(p.requires_grad for p in block.parameters()), "Recompute is for frozen blocks only"
        ctx.save_for_backward(x)
        ctx.block = block
        ctx.places = places
        return block(x, places)         # autograd is off in here: nothing of the block is kept

    @staticmethod
    def backward(ctx, grad):
        x = ctx.saved_tensors[0].detach().requires_grad_()
        with torch.enable_grad():
            y = ctx.block(x, ctx.places)
        (grad_x,) = torch.autograd.grad(y, x, grad)
        return grad_x, None, None       # one for each argument of forward


class Int8Product(torch.autograd.Function):
    """x W^T with a frozen W that is kept in 8 bits: W = weight * scale, one scale for each row of W.

    W is widened for the moment of each product, forward and backward. Autograd keeps `weight` and `scale`,
    which are there anyway; of the same in plain operations it would keep the widened W of every block.
    """

    @staticmethod
    def forward(ctx, x, weight, scale):
        ctx.save_for_backward(weight, scale)
        return F.linear(x, widen(weight, scale))

    @staticmethod
    def backward(ctx, grad):
        weight, scale = ctx.saved_tensors
        return grad @ widen(weight, scale), None, None      # W is frozen


def widen(weight, scale):
    """int8 (rows, columns) and the scale of each row (rows,) -> W in the scale's dtype."""
    return weight.to(scale.dtype).mul_(scale[:, None])      # in place: one widened copy at a time


def to_int8(w, dtype):
    """W (rows, columns) in fp32, which is used up -> int8 of the same shape, and the scale of each row in
    `dtype`, (rows,)."""
    largest = torch.maximum(w.amax(dim=1), -w.amin(dim=1))
    scale = (largest / 127).to(dtype)
    w.div_(scale.float().clamp(min=1e-30)[:, None])         # a row of zeros has scale 0
    return w.round_().clamp_(-127, 127).to(torch.int8), scale


class Int8Linear(nn.Module):
    """A frozen linear layer in half the memory of 16 bits. An entry is off by at most half a step, 1/254 of
    the largest in its row; in bf16 by up to twice that, for the widened entry is rounded, too. Each product
    takes the time to widen W.

    Takes the layer's shapes and its bias. The numbers of weight and scale come from to_int8, see load_llm.
    """

    def __init__(self, linear: nn.Linear):
        super().__init__()
        weight = torch.empty_like(linear.weight, dtype=torch.int8)      # (rows, columns)
        scale = torch.empty_like(linear.weight[:, 0])                   # (rows,)
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.scale = nn.Parameter(scale, requires_grad=False)
        self.bias = linear.bias

    def forward(self, x):
        y = Int8Product.apply(x, self.weight, self.scale)
        if self.bias is not None:
            y = y + self.bias
        return y


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
        self.requires_grad_(False)      # frozen

    def logits(self, hidden):
        """Hidden states (..., C) -> scores of the next token (..., V) in fp32. Pass only what you need."""
        head = self.embed if self.config.tied_head else self.head
        scores = F.linear(hidden, head.weight)
        return scores.to(torch.promote_types(hidden.dtype, torch.float32))

    def forward(self, x, mask=None, cache: KVCache | None = None, recompute=0, last=None, positions=None):
        """Embeddings (B, T, C) -> hidden states after the last norm, (B, T, C).

        mask: (B, T) bool, False where a row is padding, which stands in front; None: there is none.
        cache: what was read before; x goes on behind it.
        recompute: how many blocks, from the first on, keep only their input for backward. The last block
            never does: its backward comes first, so that would save nothing.
        last: compute only so many positions of each row, from its end -> (B, last, C).
        positions: (B, T) or (1, T), of each new position in its row; None: behind the real ones before it.
        """
        # Padding is packed away once, here: the blocks see real positions alone.
        places = self.places(x, mask, cache, positions)
        x = places.pack(x)                                          # (B, T, C) -> (N, C)
        *blocks, final = self.blocks
        for layer, block in enumerate(blocks):
            if layer < recompute and torch.is_grad_enabled():
                assert cache is None, "what a block caches would be cached a second time"
                x = Recompute.apply(x, block, places)
            else:
                x = block(x, places, cache)
        # The last block in its two halves: attention for all, then the MLP for the wanted positions alone.
        x = final.add_attention(x, places, cache)
        x = places.unpack(x)                                        # (N, C) -> (B, T, C)
        if last is not None:
            x = x[:, -last:]                                        # (B, last, C)
        x = final.add_mlp(x)
        return self.norm(x)

    def places(self, x, mask, cache, positions) -> Places:
        """Where the new positions x (B, T, C) stand, and what they see. Raises CheckpointError if a row is
        longer than those that the backbone was trained for."""
        B, T, _ = x.shape
        if mask is None:
            mask = torch.ones(B, T, dtype=torch.bool, device=x.device)
        seen = mask if cache is None else cache.mark(mask)          # (B, S)
        S = seen.size(1)
        length = S if positions is None else T                      # how far positions go
        if length > self.config.max_len:
            raise CheckpointError(f"a row has {length} positions, but the backbone was trained for "
                                  f"{self.config.max_len}; shorten the text or take another backbone")
        if positions is None:
            positions = seen.cumsum(dim=1)[:, -T:] - 1              # real positions in front of each
        key = torch.arange(S, device=x.device)                      # (S,)
        query = key[-T:, None]                                      # (T, 1)
        sees = (key <= query) & seen[:, None]                       # (B, T, S)
        sees = sees | (key == query)    # padding must look at something: itself
        return Places(mask, sees[:, None], positions.expand(B, T), self.config)

    @torch.no_grad()
    def generate(self, x, max_new_tokens: int, mask=None, eos_id: int | None = None, reread=False):
        """Greedy decoding from embeddings x (B, T, C), padded in front where the mask (B, T) is False.

        Returns the new tokens alone, (B, at most max_new_tokens). A row that has written `eos_id` goes on
        with it, and decoding ends when all rows have. reread: as the release's ChatGLM3 does it (under
        transformers 4.36), each step reads the whole row and all new tokens again, from position 0 on, and
        still sees what all steps before it read.
        """
        assert mask is None or bool(mask[:, -1].all()), "padding stands in front of a row"
        assert mask is None or not reread, "rows that are read again have no padding"
        row = x                                                     # to be read again
        positions = None
        cache = KVCache(self.config.n_layer)
        done = torch.zeros(len(x), dtype=torch.bool, device=x.device)       # which rows have ended
        new = torch.empty(len(x), 0, dtype=torch.long, device=x.device)
        while new.size(1) < max_new_tokens and not bool(done.all()):
            hidden = self(x, mask, cache, last=1, positions=positions)          # (B, 1, C)
            ids = self.logits(hidden[:, -1]).argmax(dim=-1)         # (B,)
            if eos_id is not None:
                ids = ids.masked_fill(done, eos_id)
                done = done | (ids == eos_id)
            new = torch.cat((new, ids[:, None]), dim=1)
            mask = None                                             # what follows is no padding
            x = self.embed(new[:, -1:])                             # (B, 1, C)
            if reread:
                x = torch.cat((row, self.embed(new)), dim=1)
                positions = torch.arange(x.size(1), device=x.device)[None]
        return new

    def make_int8(self):
        """Let the blocks' linear layers be Int8Linear; embedding and head stay as they are. The numbers come
        from load_llm."""
        for block in self.blocks:
            for part in (block.attn, block.mlp):
                for name, layer in list(part.named_children()):
                    if isinstance(layer, nn.Linear):
                        setattr(part, name, Int8Linear(layer))

    def bit_sums(self) -> list:
        """What bit_sums gives of every parameter: equal lists, equal weights."""
        return [bit_sums(parameter) for parameter in self.parameters()]


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
# What torch.save names for dense tensors. torch.load knows more, by which twenty bytes can take all memory.
NAMED = r"collections OrderedDict|torch\._utils _rebuild_(tensor_v2|parameter)|torch \w+Storage"
OTHERS = {      # what people take for a checkpoint
    "adapter_config.json": "an adapter of PEFT, not a backbone; merge it into its backbone first "
                           "(merge_and_unload, then save_pretrained) and name that folder",
    "*.gguf": "GGUF files are not read; use the model's whole weights, .safetensors in fp16, bf16 or fp32",
}
ROTARY_TABLES = ("rotary_emb.inv_freq", "rotary_pos_emb.inv_freq")  # some checkpoints have them


def default_dtype(device) -> torch.dtype:
    """Of a backbone: bf16 on a GPU, fp16 on an older one that only emulates bf16 (V100, T4), else fp32."""
    if torch.device(device).type != "cuda":
        return torch.float32
    if torch.cuda.is_bf16_supported(including_emulation=False):
        return torch.bfloat16
    return torch.float16


def load_llm(path, device="cpu", dtype=torch.float32) -> LLM:
    """Load a checkpoint folder (config.json, .safetensors or .bin files) onto `device` in `dtype`, frozen.
    torch.int8: the blocks' matrices in 8 bits, see Int8Linear; all else, and what is computed, default_dtype.
    Raises CheckpointError that names each missing, unused or misshapen tensor, both shapes and the file."""
    path = Path(path)
    int8 = dtype == torch.int8
    if int8:
        dtype = default_dtype(device)
    with torch.device("meta"):                  # names and shapes, no memory yet
        llm = LLM(Config.from_dir(path))
    stored = find_tensors(path)
    check_tensors(path, llm, stored)
    if int8:
        llm.make_int8()
    # Tensor by tensor, so that no moment holds the checkpoint a second time.
    weights = {}
    seal = hashlib.sha256()
    for name, parameter in llm.state_dict().items():
        if name.endswith(".scale"):
            continue                            # is made of its weight
        to_quantise = parameter.dtype == torch.int8
        kind = torch.float32 if to_quantise else dtype
        weight = torch.empty(parameter.shape, device=device, dtype=kind)
        start = 0
        for source in sources(llm.config, name):
            file, _ = stored[source]
            # Opened anew: what was read through a mapping stays in memory as long as that does.
            tensor = open_tensors(file)[source]
            weight[start:start + len(tensor)].copy_(tensor)
            start += len(tensor)
            seal.update(bit_sums(tensor).numpy().tobytes())
        if to_quantise:
            weight, weights[name.replace(".weight", ".scale")] = to_int8(weight, dtype)
        weights[name] = weight
    llm.load_state_dict(weights, assign=True)       # frozen, as it was
    llm.fingerprint = seal.hexdigest()[:16]     # of every number as stored, whatever files and dtype
    return llm


def bit_sums(x):
    """Numbers (rows, columns) or (rows,) -> a checksum of each row's bits, (rows,) int64.

    A row is read as words of 8 bytes, which are added with weights 1, 3, 5, ..., modulo 2**64. One word that
    changes always shows, as an odd weight loses nothing; so do rows that change places. Several changes
    in a row, and words that change places, show unless their differences happen to cancel out. Whoever makes
    them cancel on purpose is not stopped: that would take a real hash, which is several times slower.
    """
    x = x.detach().cpu().flatten().contiguous().view(len(x), -1)
    in_word = 8 // x.element_size()             # numbers
    if x.size(1) % in_word or x.storage_offset() % in_word:
        x = F.pad(x, (0, -x.size(1) % in_word))         # a copy, in whole words
    words = x.view(torch.int64)
    weights = torch.arange(1, 2 * words.size(1), 2)
    return words @ weights


def sources(config: Config, name: str) -> list[str]:
    """A parameter's names on disk: blocks.7.mlp.down.weight -> [model.layers.7.mlp.down_proj.weight]."""
    block, part, kind = re.fullmatch(r"(?:blocks\.(\d+)\.)?(.+)\.(weight|bias)", name).groups()
    prefix = ""
    if block:
        prefix = NAMES["blocks.{}."][config.column].format(block)
    return [f"{prefix}{layer}.{kind}" for layer in NAMES[part][config.column].split()]


def find_tensors(path: Path) -> dict:
    """{name: (file, tensor)} of a folder's weights, mapped, not read. An index is followed."""
    stored = {}
    files, homes = weight_files(path)
    for file in files:
        for name, tensor in open_tensors(file).items():
            if homes.get(name, file.name) != file.name:
                continue                        # the index says that it lies in another file
            if name in stored:
                first, _ = stored[name]
                raise CheckpointError(f"{path}: {name:.99} is in {first.name} and in {file.name}; keep "
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
        files = sorted(set(path.glob(glob)) - set(path.glob("adapter_model*")))
        if files:
            return files, {}
    refuse_others(path)
    raise CheckpointError(f"{path}: no .safetensors and no pytorch_model*.bin there; fetch the model's "
                          "weights")


def refuse_others(path: Path):
    """Raise CheckpointError if a folder that is no checkpoint holds what people take for one."""
    for glob, problem in OTHERS.items():
        if any(path.glob(glob)):
            raise CheckpointError(f"{path}: {problem}")


def open_tensors(file: Path) -> dict[str, torch.Tensor]:
    """The tensors of a file, mapped. Raises CheckpointError for any but dense ones; nothing in it is run."""
    if not file.is_file():                      # a FIFO would wait for its other end
        raise CheckpointError(f"{file}: missing, or no ordinary file; finish the download, or delete the "
                              "index if the weights beside it are whole")
    try:
        tensors = load_bin(file) if file.suffix == ".bin" else load_file(file)
        for name in tensors:
            if not str(name).isprintable():     # a message may bring it to a terminal
                raise TypeError(f"a tensor is called {name!a:.99}")
    except Exception as error:                  # whatever a damaged or hostile file provokes, it was refused
        problem = " ".join(str(error).split())[-300:]
        with open(file, "rb") as start:
            if start.read(7) == b"version":
                problem = "a git-lfs pointer: run `git lfs pull`"
        raise CheckpointError(f"{file}: not a whole file of dense tensors ({problem!r}); nothing in it "
                              "was run; fetch it again, from a source that you trust") from None
    return {str(name): tensor.detach() for name, tensor in tensors.items()}


def load_bin(file: Path) -> dict[str, torch.Tensor]:
    """The tensors of a file of torch.save, mapped: a zip archive of their numbers and of a pickle, a program
    that puts them together. Raises an error of any type for what is more, or would take more than it has."""
    if not zipfile.is_zipfile(file):
        raise TypeError("no whole zip archive, which torch.save has written since torch 1.6")
    with zipfile.ZipFile(file) as archive:
        entries = archive.infolist()
        if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
            raise TypeError("it is compressed; load it where it was made and save it with torch.save")
        (pickle,) = [entry for entry in entries if entry.filename.endswith("/data.pkl")]
        if pickle.file_size > 2**18:            # 130 bytes describe a tensor
            raise TypeError(f"its list of tensors has {pickle.file_size} bytes")
        check_pickle(archive.read(pickle))
    tensors = dict(torch.load(file, map_location="cpu", weights_only=True, mmap=True))
    claimed = {}                                # {where it begins: bytes}
    for name, x in tensors.items():
        if type(x) not in (torch.Tensor, nn.Parameter):
            raise TypeError(f"{name} is no plain dense tensor")
        storage = x.untyped_storage()           # several tensors may share one
        claimed[storage.data_ptr()] = storage.nbytes()
    held = sum(entry.file_size for entry in entries if "/data/" in entry.filename)
    if sum(claimed.values()) > held:
        raise TypeError("its tensors claim numbers that are not theirs")
    return tensors


def check_pickle(program: bytes):
    """Raise TypeError unless a pickle does what torch.save's do for dense tensors, and no more."""
    made_by = {}                                # {place in its memory: the step that made what is there}
    before = ""
    for step, value, _ in pickletools.genops(program):
        if step.name == "GLOBAL" and not re.fullmatch(NAMED, value):
            raise TypeError(f"it uses {value!a:.99}")
        if step.name in ("BINPUT", "LONG_BINPUT"):
            made_by[value] = before
        # Not tuples: such that hold one another twice, forty deep, would be walked through for ever.
        reused = step.name in ("BINGET", "LONG_BINGET")
        if reused and made_by[value] not in ("BINUNICODE", "GLOBAL", "REDUCE"):
            raise TypeError("parts of it are used twice")
        before = step.name


# --- Refusals: what a checkpoint may be ---------------------------------------------------------------------
def wanted_tensors(llm: LLM) -> dict[str, tuple]:
    """{name on disk: shape} of every tensor that the backbone needs."""
    config = llm.config
    wanted = {}
    for name, parameter in llm.state_dict().items():
        names = sources(config, name)
        rows, *rest = parameter.shape
        heights = [rows // len(names)] * len(names)
        if len(names) == 3:                     # queries, keys and values
            heights = [n * config.head_dim for n in (config.n_head, config.n_kv_head, config.n_kv_head)]
        for source, height in zip(names, heights):
            wanted[source] = (height, *rest)
    return wanted


def check_tensors(path: Path, llm: LLM, stored: dict):
    """Raise CheckpointError that lists what is missing, left over, or of another shape or kind."""
    config = llm.config
    wanted = wanted_tensors(llm)
    head = sources(config, "head.weight")[0]
    embedding = sources(config, "embed.weight")[0]
    twice = config.tied_head and head in stored             # some publish a tied embedding a second time
    if twice:
        wanted[head] = wanted[embedding]
    problems = [f"missing: {name}" for name in wanted if name not in stored]
    taken = 0                                               # bytes, of all that is wanted
    for name, (file, x) in stored.items():
        if x.dtype not in FLOATS:
            problems.append(f"{x.dtype}: {name} in {file.name}; use the version in fp16, bf16 or fp32")
        elif name not in wanted:
            if not name.endswith(ROTARY_TABLES):
                problems.append(f"unused: {name} in {file.name}")
        elif x.shape != wanted[name]:
            problems.append(f"misshapen: {name} is {list(x.shape)} in {file.name}, config.json asks for "
                            f"{list(wanted[name])}")
        else:
            taken += x.nbytes
    held = sum(file.stat().st_size for file in {file for file, _ in stored.values()})
    if taken > 2 * held:            # a .bin can repeat a number; twice: a tied head is the embedding again
        problems.append(f"they take {taken} bytes, but the files have {held}; fetch them again")
    if twice and not problems:
        _, first = stored[embedding]
        _, second = stored[head]
        if not torch.equal(first, second):
            problems.append(f"{head} is not {embedding}, but config.json has tie_word_embeddings")
    if problems:
        listed = "\n  ".join(problems)[:1800]
        # All at once, but no novel: a wrong config.json misses every tensor.
        raise CheckpointError(f"{path}: {len(problems)} weights do not fit config.json:\n  {listed}")


# Our sizes: where config.json has them. Where it has two of the keys, the first counts.
KEYS = {
    "dim": "hidden_size",
    "n_layer": "num_hidden_layers num_layers",
    "n_head": "num_attention_heads",
    "n_kv_head": "multi_query_group_num num_key_value_heads",
    "head_dim": "kv_channels head_dim",
    "ffn_dim": "ffn_hidden_size intermediate_size",
    "vocab_size": "padded_vocab_size vocab_size",
    # Beyond it Qwen's first generation differs; the second name is LLaMA-1's.
    "max_len": "seq_length max_sequence_length max_position_embeddings",
    "norm_eps": "layernorm_epsilon layer_norm_epsilon rms_norm_eps",
    "rope_theta": "rotary_emb_base rope_theta",
    "qkv_bias": "add_qkv_bias",
    "tied_head": "tie_word_embeddings",
}
OPTIONAL = ("head_dim", "rope_theta", "qkv_bias", "tied_head")      # the others must be there
RANGES = {      # the others are whole numbers from 1 to 2**24
    "n_layer": (1, 1000), "n_head": (1, 1000), "n_kv_head": (1, 1000), "ffn_dim": (2, 2**24),
    "norm_eps": (1e-12, 1.0), "rope_theta": (1.0, 2.0**40),
    "qkv_bias": (False, True), "tied_head": (False, True),
}
SWITCHES = {
    "llama": {},
    "mistral": {},
    "qwen2": {"qkv_bias": True},                                            # Qwen1.5, 2, 2.5
    "qwen3": {"qk_norm": True},
    "qwen": {"qkv_bias": True, "column": 1},                                # first generation
    "chatglm": {"qkv_bias": True, "rope_interleaved": True, "column": 2},   # ChatGLM3
}
LLAMA3 = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
# What this transformer takes for granted. A config.json that has one of these keys otherwise is refused.
FIXED = {
    "quantization_config": None, "quantization_bit": 0,         # whole weights only
    "rope_ratio": 1, "rotary_pct": 1.0, "partial_rotary_factor": 1.0, "original_rope": True,
    "hidden_act": "silu", "use_sliding_window": False,
    "attention_bias": False, "mlp_bias": False, "no_bias": True, "add_bias_linear": False,
    "rmsnorm": True, "post_layer_norm": True, "apply_residual_connection_post_layernorm": False,
    "multi_query_attention": True, "scale_attn_weights": True, "fp32_residual_connection": False,
}


def read_sizes(file: Path) -> dict:
    """The fields of Config in a config.json. Raises CheckpointError for what is missing or not here."""
    if not file.exists():
        refuse_others(file.parent)
    raw = read_json(file)
    family = raw.get("model_type")
    if family not in list(SWITCHES):            # a list: what a file holds may have no hash
        raise CheckpointError(f"{file}: model_type is {family!r:.80}; use a backbone of a family that is "
                              f"implemented: {', '.join(SWITCHES)}")
    rope_llama3 = lift_rope(raw, file)
    check_features(raw, file)
    sizes = {"family": family, "rope_llama3": rope_llama3, **SWITCHES[family]}
    for name, keys in KEYS.items():
        for key in reversed(keys.split()):      # the first one that is there has the last word
            if raw.get(key) is not None:
                sizes[name] = raw[key]
    sizes.setdefault("n_kv_head", sizes.get("n_head"))      # each head has keys and values of its own
    for name, keys in KEYS.items():
        if name in sizes or name not in OPTIONAL:
            low, high = RANGES.get(name, (1, 2**24))
            check_number(keys, sizes.get(name), low, high, file)
    sizes.setdefault("head_dim", sizes["dim"] // sizes["n_head"])
    if sizes["n_head"] % sizes["n_kv_head"]:
        raise CheckpointError(f"{file}: {sizes['n_head']} heads cannot share {sizes['n_kv_head']} key/value "
                              "heads evenly; fetch the file again")
    sizes["rope_dim"] = sizes["head_dim"]
    if family == "qwen":                        # it counts gate and up together
        sizes["ffn_dim"] //= 2
    if family == "chatglm":                     # it turns half of each head
        sizes["rope_dim"] //= 2
    if sizes["rope_dim"] % 2 or not sizes["rope_dim"]:
        raise CheckpointError(f"{file}: {sizes['rope_dim']} channels of a head cannot turn in pairs; fetch "
                              "the file again")
    return sizes


def check_number(keys: str, value, low, high, file: Path):
    """Raise CheckpointError unless a value is between the limits and of their type; 1 for 1.0 will do."""
    kinds = [type(low)]
    if type(low) is float:
        kinds.append(int)
    if type(value) not in kinds or not low <= value <= high:
        problem = "missing" if value is None else repr(value)[:80]
        keys = keys.replace(" ", " or ")
        kind = type(low).__name__
        raise CheckpointError(f"{file}: {keys} is {problem}, expected {low} to {high} ({kind}); fetch the "
                              "file again")


def lift_rope(raw: dict, file: Path) -> tuple:
    """Newer files nest the rotary keys: lift them into `raw`. Returns llama3's four numbers, or ()."""
    scaling = ()
    for key in ("rope_scaling", "rope_parameters"):
        rope = raw.get(key) or {}
        kind = rope
        if isinstance(rope, dict):
            kind = rope.get("rope_type", rope.get("type", "default"))
        if kind == "llama3":
            scaling = tuple(rope.get(name) for name in LLAMA3)
            for name, value in zip(LLAMA3, scaling):
                check_number(name, value, 1e-3, 2.0**40, file)
            _, low, high, _ = scaling
            if low >= high:
                raise CheckpointError(f"{file}: low_freq_factor is {low} and high_freq_factor {high}; "
                                      "expected the second to be larger; fetch the file again")
        elif kind != "default":
            raise CheckpointError(f"{file}: {key} is {rope!r:.100}, but only plain rotary embedding and "
                                  "llama3's are here; use a model without (where it was added for length, "
                                  "delete the key)")
        for name in ("rope_theta", "partial_rotary_factor"):
            if name in rope:
                raw[name] = rope[name]
    return scaling


def check_features(raw: dict, file: Path):
    """Raise CheckpointError for a feature that is not implemented."""
    if raw.get("sliding_window") and raw.get("use_sliding_window", True):
        raise CheckpointError(f"{file}: sliding_window is {raw['sliding_window']!r:.80}, which is not here; "
                              "use a model whose attention sees everything")
    for key, value in FIXED.items():
        if raw.get(key) not in (None, value):
            raise CheckpointError(f"{file}: {key} is {raw[key]!r:.100}, but only {value!r} is implemented; "
                                  "use another of the family, of a quantised one its version in fp16, bf16 "
                                  "or fp32")


def read_json(file: Path) -> dict:
    """The object in a JSON file. Raises CheckpointError that names the file if there is none."""
    if not file.is_file():
        raise CheckpointError(f"{file}: not found; fetch or make it again, or name another folder")
    try:
        raw = json.loads(file.read_text(encoding="utf-8-sig"))
        json.dumps(raw, ensure_ascii=False).encode()        # refuses halves of characters, "\ud800"
    except (ValueError, RecursionError) as error:
        problem = " ".join(str(error)[:400].split())
        raise CheckpointError(f"{file}: not valid JSON ({problem}); fetch or make it again") from None
    if not isinstance(raw, dict):
        raise CheckpointError(f"{file}: expected an object with names; make it again")
    return raw


def read_index(file: Path) -> dict:
    """{tensor: the file beside it that holds it} of an index. Raises CheckpointError if none is there."""
    homes = read_json(file).get("weight_map")
    names = homes.values() if isinstance(homes, dict) else ()
    if not names or not all(re.fullmatch(r"[\w.-]{1,200}\.(safetensors|bin)", str(name)) for name in names):
        raise CheckpointError(f"{file}: expected a weight_map of tensors to files here; fetch it again")
    return homes


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("error: expected a checkpoint folder: python model.py DIR")
    try:
        llm = load_llm(sys.argv[1])
    except (CheckpointError, OSError) as error:
        sys.exit(f"error: {error}")
    n = sum(p.numel() for p in llm.parameters())
    print(f"{asdict(llm.config)}\n{n:,} parameters, all there")
