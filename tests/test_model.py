"""The backbone: its parts and the whole against slow independent formulas, decoding, recomputation, loading."""
import json
import math
import weakref

import pytest
import torch
from conftest import TINY, close, need_shared, published_tensors, recipe, tiny_tensors, write_checkpoint, write_tiny
from safetensors.torch import load_file, save_file

from data import load_tokenizer
from model import LLM, MLP, Attention, Beginning, Block, Config, KVCache, RMSNorm
from model import apply_rope, causal_attention, load_llm, rope_table

FAMILIES = list(TINY)

# ---------------------------------------------------------------------------------------------------------------------
# The same transformer a second time: in fp64, one row, one head and one position at a time, on the published tensors


def slow_norm(x, weight, eps):
    return torch.stack([v / math.sqrt(sum(n * n for n in v.tolist()) / len(v) + eps) for v in x]) * weight


def slow_rope(x, theta, width, interleaved):
    """x (T, D): channel pair j, as a complex number, times exp(i t theta^(-2j / width))."""
    out = x.clone()
    for position in range(len(x)):
        for j in range(width // 2):
            a, b = (2 * j, 2 * j + 1) if interleaved else (j, j + width // 2)
            angle = position * theta ** (-2 * j / width)
            z = complex(x[position, a], x[position, b]) * complex(math.cos(angle), math.sin(angle))
            out[position, a], out[position, b] = z.real, z.imag
    return out


def slow_head(q, k, v):
    """One head, q, k, v (T, D): each position looks at itself and at those before it."""
    return torch.stack([(q[t] @ k[:t + 1].T / math.sqrt(q.size(1))).softmax(dim=0) @ v[:t + 1] for t in range(len(q))])


def slow_attention(q, k, v, heads, *rope):
    """q (T, H D), k, v (T, K D) -> (T, H D). For H = 6, K = 2 query heads 0 1 2 read key/value head 0, 3 4 5 read 1."""
    D = q.size(1) // heads
    q, k, v = (x.split(D, dim=1) for x in (q, k, v))
    q, k = ([slow_rope(x, *rope) for x in part] for part in (q, k))
    return torch.cat([slow_head(q[h], k[h * len(k) // heads], v[h * len(k) // heads]) for h in range(heads)], dim=1)


def slow_mlp(x, gate, up, down):
    z = x @ gate.T
    return (z / (1 + (-z).exp()) * (x @ up.T)) @ down.T


def published_layer(raw, w, i):
    """q, k, v as (weight, bias) and the other tensors of layer i, taken apart as its family stores them."""
    if raw["model_type"] == "qwen":
        p = f"transformer.h.{i}."
        qkv = list(zip(w[p + "attn.c_attn.weight"].chunk(3), w[p + "attn.c_attn.bias"].chunk(3)))
        rest = "ln_1", "attn.c_proj", "ln_2", "mlp.w2", "mlp.w1", "mlp.c_proj"
    elif raw["model_type"] == "chatglm":
        p = f"transformer.encoder.layers.{i}."
        sizes = [n * raw["kv_channels"] for n in (raw["num_attention_heads"], *[raw["multi_query_group_num"]] * 2)]
        name = p + "self_attention.query_key_value."
        qkv = list(zip(w[name + "weight"].split(sizes), w[name + "bias"].split(sizes)))
        gate, up = w[p + "mlp.dense_h_to_4h.weight"].chunk(2)
        w = {**w, p + "gate.weight": gate, p + "up.weight": up}
        rest = "input_layernorm", "self_attention.dense", "post_attention_layernorm", "gate", "up", "mlp.dense_4h_to_h"
    else:
        p = f"model.layers.{i}."
        qkv = [(w[f"{p}self_attn.{x}_proj.weight"], w.get(f"{p}self_attn.{x}_proj.bias", 0)) for x in "qkv"]
        norms = "input_layernorm", "post_attention_layernorm"
        rest = norms[0], "self_attn.o_proj", norms[1], "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"
    return qkv, *(w[f"{p}{name}.weight"] for name in rest)


def slow_llm(raw, tensors, ids):
    """Token ids (T,) -> logits (T, V)."""
    w, glm = {name: t.double() for name, t in tensors.items()}, raw["model_type"] == "chatglm"
    ends = {
        "qwen": ("transformer.wte", "transformer.ln_f", "lm_head"),
        "chatglm": ("transformer.embedding.word_embeddings", "transformer.encoder.final_layernorm",
                    "transformer.output_layer"),
    }.get(raw["model_type"], ("model.embed_tokens", "model.norm", "lm_head"))
    embedding, last_norm, head = (w[name + ".weight"] for name in ends)
    eps = next(raw[key] for key in ("rms_norm_eps", "layer_norm_epsilon", "layernorm_epsilon") if key in raw)
    theta, heads = raw.get("rope_theta") or raw.get("rotary_emb_base") or 10000, raw["num_attention_heads"]
    x = embedding[ids]
    for i in range(raw.get("num_hidden_layers") or raw["num_layers"]):
        qkv, norm1, out, norm2, gate, up, down = published_layer(raw, w, i)
        q, k, v = (slow_norm(x, norm1, eps) @ weight.T + bias for weight, bias in qkv)
        D = q.size(1) // heads                                          # ChatGLM3 turns half of a head, in pairs (0, 1)
        x = x + slow_attention(q, k, v, heads, theta, D // 2 if glm else D, glm) @ out.T
        x = x + slow_mlp(slow_norm(x, norm2, eps), gate, up, down)
    return slow_norm(x, last_norm, eps) @ head.T


def config(**change) -> Config:
    """Sizes for a test of one part; 4 of a head's 6 channels turn."""
    sizes = dict(family="llama", dim=20, n_layer=2, n_head=6, n_kv_head=2, head_dim=6, ffn_dim=14, vocab_size=31,
                 max_len=64, norm_eps=1e-2, rope_theta=50.0, rope_dim=4, qkv_bias=True)
    return Config(**{**sizes, **change})


def filled(module, name="part"):
    """The module with every parameter random."""
    for key, p in module.named_parameters():
        p.data = recipe(f"{name}.{key}", p.shape, 0.3, mean=1.0 if "norm" in key or p.dim() == 1 else 0.0)
    return module.requires_grad_(False)


def test_rms_norm():
    norm, x = filled(RMSNorm(11, eps=0.1)), recipe("norm.x", (5, 11), 0.3)
    expected = slow_norm(x.double(), norm.weight.double(), 0.1)
    close(norm(x), expected)
    half = norm.bfloat16()(x.bfloat16())                                # the activation's dtype comes back
    assert half.dtype == torch.bfloat16
    close(half, expected, 0.03)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("width", [4, 6])
def test_rope_is_a_complex_rotation(interleaved, width):
    c, x = config(rope_dim=width), recipe("rope.x", (2, 3, 7, 6), 1.0)  # B, heads, T, D
    positions = torch.arange(7).expand(2, 7)
    ours = apply_rope(x, rope_table(positions, c), interleaved)
    for row in range(2):
        for head in range(3):
            close(ours[row, head], slow_rope(x[row, head].double(), c.rope_theta, width, interleaved))
    later = apply_rope(x[:, :, 3:], rope_table(positions[:, 3:], c), interleaved)
    assert torch.equal(later, ours[:, :, 3:])                           # by position, not by place in the row


@pytest.mark.parametrize("interleaved", [False, True])
def test_attention_reads_grouped_heads(interleaved):
    c = config(rope_interleaved=interleaved)
    attention, x = filled(Attention(c)), recipe("attention.x", (1, 5, 20), 1.0)
    ours = attention(x, rope_table(torch.arange(5)[None], c), None, None, 0)[0]
    qkv, out = attention.qkv.double(), attention.out.double()
    q, k, v = qkv(x[0].double()).split([6 * 6, 2 * 6, 2 * 6], dim=1)
    close(ours, out(slow_attention(q, k, v, 6, c.rope_theta, 4, interleaved)))


@pytest.mark.parametrize("way", [dict(whole=True), dict(whole=False, step=4), dict(whole=False)], ids=str)
@pytest.mark.parametrize("past, T", [(0, 1), (0, 9), (3, 1), (3, 4), (3, 9), (5, 70)])
def test_causal_attention_and_its_gradients(past, T, way):
    """A GPU's way and a CPU's, with slices that end within the row, at its end, and alone."""
    sizes = {"q": T, "k": past + T, "v": past + T}
    ours = [recipe(f"causal.{name}", (2, 3, n, 6), 1.0).requires_grad_() for name, n in sizes.items()]
    h = causal_attention(*ours, **way)
    theirs = [x.detach().double().requires_grad_() for x in ours]
    before = torch.zeros(past, 6, dtype=torch.double)                   # their results are not asked for
    expected = torch.stack([slow_head(torch.cat((before, q)), k, v)[past:] for q, k, v in zip(
        *(x.flatten(0, 1) for x in theirs))]).view_as(h)
    close(h, expected)
    weight = recipe("causal.weight", h.shape, 1.0)
    for a, b in zip(torch.autograd.grad(h, ours, weight), torch.autograd.grad(expected, theirs, weight.double())):
        close(a, b)


def test_mlp():
    mlp, x = filled(MLP(config())), recipe("mlp.x", (3, 20), 1.0)
    expected = slow_mlp(x, *mlp.gate_up.weight.split(14), mlp.down.weight)
    close(mlp(x), expected)
    with torch.no_grad():               # another way to the same numbers, in less memory
        close(mlp(x), expected)


def test_block_has_two_residuals():
    c = config()
    block, x, rope = filled(Block(c)), recipe("block.x", (2, 5, 20), 1.0), rope_table(torch.arange(5)[None], c)
    h = x + block.attn(block.attn_norm(x), rope, None, None, 0)
    close(block(x, rope), h + block.mlp(block.mlp_norm(h)))


@pytest.mark.parametrize("family", FAMILIES)
def test_whole_backbone(tiny, family):
    ids = torch.tensor([3, 141, 59, 26, 5, 35, 89, 79, 3, 238])
    llm = tiny[family]
    ours = llm.logits(llm(llm.embed(ids[None])))[0]
    close(ours, slow_llm(TINY[family], tiny_tensors(family), ids), 1e-4)
    assert llm.config.family == family and ours.std() > 0.3             # they do differ


def test_tied_head_is_the_embedding(tmp_path):
    raw = {**TINY["qwen2"], "tie_word_embeddings": True}
    tensors = published_tensors(raw)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    expected = slow_llm(raw, tensors, torch.arange(6))
    del tensors["lm_head.weight"]
    llm = load_llm(write_checkpoint(tmp_path, raw, tensors))
    close(llm.logits(llm(llm.embed(torch.arange(6)[None])))[0], expected, 1e-4)
    assert not hasattr(llm, "head")


# ---------------------------------------------------------------------------------------------------------------------
# Cache, padding, decoding


def padded(llm, lengths, behind=False):
    """Rows of these lengths, each alone (1, T, C), and all of them padded with noise, in front or behind, and the mask.
    """
    rows = [recipe(f"row.{n}", (1, length, llm.config.dim), 0.5) for n, length in enumerate(lengths)]
    S = max(lengths)
    pads = [recipe("padding", (1, S - row.size(1), llm.config.dim), 9.0) for row in rows]
    x = torch.cat([torch.cat(both[::-1] if behind else both, dim=1) for both in zip(pads, rows)])
    mask = torch.tensor([[n >= S - length for n in range(S)] for length in lengths])
    return rows, x, mask.flip(1) if behind else mask


@pytest.mark.parametrize("family", FAMILIES)
def test_padded_rows_equal_rows_alone(tiny, family):
    llm = tiny[family]
    rows, x, mask = padded(llm, [9, 1, 4])
    together = llm(x, mask)
    for row, hidden in zip(rows, together):
        close(hidden[-row.size(1):], llm(row)[0])
    rows, x, mask = padded(llm, [9, 1, 4], behind=True)
    for together in (llm(x, mask), llm(x)):                             # padding behind needs no mask
        for row, hidden in zip(rows, together):
            close(hidden[:row.size(1)], llm(row)[0])


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("masked", [False, True])
def test_only_the_positions_wanted(tiny, family, masked):
    llm, at = tiny[family], torch.tensor([[8, 0], [3, 8], [5, 6]])
    _, x, mask = padded(llm, [9, 1, 4])
    mask, every = mask if masked else None, torch.arange(9).expand(3, -1)
    whole = llm(x, mask)
    close(llm(x, mask, at=every), whole, 2e-5)
    for past in (0, 2):                                                 # read at once, or behind two cached positions
        cache = KVCache(llm.config, 3, 9, "cpu", torch.float32)
        if past:
            llm(x[:, :past], mask if mask is None else mask[:, :past], cache=cache)
        index = (at - past).clamp(min=0)
        picked = llm(x[:, past:], mask, cache=cache, at=index)
        close(picked, whole.take_along_dim((index + past)[..., None], dim=1), 2e-5)
    x.requires_grad_()
    (expected,) = torch.autograd.grad(llm(x, mask).take_along_dim(at[..., None], dim=1).square().sum(), x)
    (found,) = torch.autograd.grad(llm(x, mask, at=at, recompute=llm.config.n_layer).square().sum(), x)
    close(found, expected, 2e-5)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("recompute", [0, 2, 3])
@pytest.mark.parametrize("before", [[], [3, 1, 4]], ids=["whole", "behind a beginning"])
def test_packed_rows_equal_padded_ones(tiny, family, recompute, before):
    llm, lengths = tiny[family], torch.tensor([9, 1, 4])
    _, x, mask = padded(llm, lengths.tolist(), behind=True)
    beginning, at = Beginning(llm, before) if before else None, torch.stack((lengths - 1, lengths // 2), dim=1)
    x = torch.where(mask[..., None], x, math.inf).requires_grad_()      # nobody looks there
    padding_free = llm(x, cache=beginning, recompute=recompute, at=at, lengths=lengths)
    finite = x.detach().nan_to_num(posinf=0).requires_grad_()
    expected = llm(finite, cache=beginning, at=at)
    close(padding_free, expected, 2e-5)
    target = recipe("target", expected.shape, 1.0)
    (ours,), (theirs,) = (torch.autograd.grad(h, inp, target) for h, inp in ((padding_free, x), (expected, finite)))
    close(ours, theirs, 2e-5)
    assert not ours[~mask].any() and ours[mask].any(dim=-1).all()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("lengths", [[9, 9], [9, 1, 4]], ids=["full", "padded"])
@pytest.mark.parametrize("split", [[9], [1, 8], [5, 4], [8, 1], [3, 1, 3, 2], [1] * 9], ids=str)
def test_cached_equals_full(tiny, family, lengths, split):
    llm = tiny[family]
    _, x, mask = padded(llm, lengths)
    mask = None if bool(mask.all()) else mask
    cache, hidden, end = KVCache(llm.config, len(x), 9, "cpu", torch.float32), [], 0
    for part in split:
        end += part
        hidden.append(llm(x[:, end - part:end], mask if mask is None else mask[:, :end], cache=cache))
    real = torch.ones(len(x), 9, dtype=torch.bool) if mask is None else mask
    close(torch.cat(hidden, dim=1)[real], llm(x, mask)[real])
    assert cache.length == 9


@pytest.mark.parametrize("family", FAMILIES)
def test_rows_behind_a_beginning_equal_whole_rows(tiny, family):
    llm, ids = tiny[family], [3, 1, 4]
    beginning, before = Beginning(llm, ids), llm.embed(torch.tensor(ids))
    rows, x, mask = padded(llm, [6, 1, 4], behind=True)
    whole, at = torch.cat((before.expand(3, -1, -1), x), dim=1), torch.tensor([[5, 2], [0, 0], [3, 1]])
    whole_mask = torch.cat((torch.ones(3, 3, dtype=torch.bool), mask), dim=1)
    kept = beginning.k.clone()
    close(llm(x, cache=beginning), llm(whole)[:, 3:], 2e-5)
    close(llm(x, whole_mask, cache=beginning), llm(whole, whole_mask)[:, 3:], 2e-5)
    x.requires_grad_()
    target = recipe("target", (3, 2, llm.config.dim), 1.0)
    whole = torch.cat((before.expand(3, -1, -1), x), dim=1)
    (expected,) = torch.autograd.grad((llm(whole, at=at + 3) * target).sum(), x)
    for recompute in (0, llm.config.n_layer):
        (found,) = torch.autograd.grad((llm(x, cache=beginning, recompute=recompute, at=at) * target).sum(), x)
        close(found, expected, 2e-5)
    for n in (1, 6):
        assert torch.equal(llm.generate(whole, n, whole_mask, beginning=beginning), llm.generate(whole, n, whole_mask))
    assert torch.equal(beginning.k, kept) and beginning.length == 3                     # used often, never changed


def slow_generate(llm, x, n):
    """Greedy ids of one row x (1, T, C) without cache: everything is read again for each token."""
    ids = []
    for _ in range(n):
        ids.append(llm.logits(llm(x))[0, -1].argmax().item())
        x = torch.cat((x, llm.embed(torch.tensor([ids[-1:]]))), dim=1)
    return ids


@pytest.mark.parametrize("family", FAMILIES)
def test_generate_returns_the_new_tokens(tiny, family):
    llm = tiny[family]
    rows, x, mask = padded(llm, [9, 1, 4])
    expected = [slow_generate(llm, row, 6) for row in rows]
    assert llm.generate(x, 6, mask).tolist() == expected
    _, behind, mask_behind = padded(llm, [9, 1, 4], behind=True)
    assert llm.generate(behind, 6, mask_behind).tolist() == expected
    both, mixed = torch.cat((x, behind)), torch.cat((mask, mask_behind))    # some in front, some behind
    assert llm.generate(both, 6, mixed).tolist() == expected * 2
    assert llm.generate(rows[0], 6).tolist() == expected[:1]            # a batch of one, no mask
    assert llm.generate(x, 1, mask).tolist() == [ids[:1] for ids in expected]
    assert llm.generate(x, 0, mask).shape == (3, 0)


def test_generate_stops_at_the_end_token(tiny):
    llm = tiny["llama"]
    rows, x, mask = padded(llm, [9, 4])
    first, second = (slow_generate(llm, row, 6) for row in rows)
    eos = first[2]
    assert eos not in first[:2] + second                                # or this test would show nothing
    assert llm.generate(rows[0], 6, eos_id=eos).tolist() == [first[:3]]
    assert llm.generate(x, 6, mask, eos).tolist() == [first[:3] + [eos] * 3, second]
    both = torch.cat((rows[0], rows[0]))
    assert llm.generate(both, 6, eos_id=eos).tolist() == [first[:3]] * 2


def test_more_positions_than_trained_for_are_refused(tiny):
    llm = tiny["chatglm"]
    with pytest.raises(ValueError, match="901 .* 900"):
        llm(torch.zeros(1, 901, llm.config.dim))
    with pytest.raises(ValueError, match="901 .* 900"):
        llm.generate(torch.zeros(1, 899, llm.config.dim), 4)
    assert llm.generate(torch.zeros(1, 899, llm.config.dim), 2).shape == (1, 2)


# ---------------------------------------------------------------------------------------------------------------------
# Recomputation


class Kept:
    """Bytes that autograd keeps for backward, now and at their peak, without the parameters themselves."""

    class Box:
        def __init__(self, tensor):
            self.tensor = tensor

    def __init__(self, llm):
        self.parameters, self.now, self.peak = {p.data_ptr() for p in llm.parameters()}, 0, 0

    def change(self, size):
        self.now += size
        self.peak = max(self.peak, self.now)

    def pack(self, tensor):
        box = self.Box(tensor)
        if tensor.data_ptr() not in self.parameters:
            self.change(tensor.nbytes)
            weakref.finalize(box, self.change, -tensor.nbytes)
        return box

    def hooks(self):
        return torch.autograd.graph.saved_tensors_hooks(self.pack, lambda box: box.tensor)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("lengths", [[9, 9], [9, 1, 4]], ids=["full", "padded"])
def test_recomputed_gradients_are_bit_equal(tiny, family, lengths):
    llm = tiny[family]
    _, x, mask = padded(llm, lengths)
    target, plain = recipe("target", x.shape, 1.0), None
    for n in range(llm.config.n_layer + 1):
        x = x.detach().requires_grad_()
        (llm(x, None if mask.all() else mask, recompute=n) * target).sum().backward()
        plain = x.grad if n == 0 else plain
        assert torch.equal(x.grad, plain) and plain.abs().min() > 0


def test_recomputation_keeps_one_hidden_state_per_block():
    llm = filled(LLM(config(n_layer=5)))
    x = recipe("x", (2, 9, 20), 1.0).requires_grad_()
    kept, peak = [], []
    for n in range(6):
        meter = Kept(llm)
        with meter.hooks():
            y = llm(x, recompute=n)
            kept.append(meter.now)
            y.sum().backward()
        peak.append(meter.peak)
        assert meter.now == 0
    per_block = kept[0] - kept[1] + x.nbytes                            # what a block keeps that is not recomputed
    last_norm = kept[5] - 5 * x.nbytes
    assert per_block > 8 * x.nbytes > 3 * last_norm
    assert kept == [n * x.nbytes + (5 - n) * per_block + last_norm for n in range(6)]
    assert peak[0] == kept[0] and peak[5] <= 5 * x.nbytes + per_block   # in backward, one block at a time


def test_recomputation_refuses_a_block_that_trains():
    llm = filled(LLM(config()))
    llm.blocks[1].mlp.down.weight.requires_grad_(True)
    x = torch.ones(1, 2, 20, requires_grad=True)
    llm(x, recompute=1)
    with pytest.raises(AssertionError, match="frozen"):
        llm(x, recompute=2)


# ---------------------------------------------------------------------------------------------------------------------
# Real models


@pytest.mark.parametrize("kind", ["llama", "qwen2"])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_equals_transformers(kind, tied, tmp_path):
    import transformers

    kinds = {"llama": (transformers.LlamaConfig, transformers.LlamaForCausalLM),
             "qwen2": (transformers.Qwen2Config, transformers.Qwen2ForCausalLM)}
    make_config, make_model = kinds[kind]
    theirs = make_model(make_config(
        hidden_size=60, num_hidden_layers=3, num_attention_heads=6, num_key_value_heads=2, intermediate_size=34,
        vocab_size=83, max_position_embeddings=64, rope_theta=3000.0, tie_word_embeddings=tied,
        bos_token_id=1, eos_token_id=None, pad_token_id=0)).eval()
    for name, p in theirs.named_parameters():
        p.data = recipe(name, p.shape, 0.2, mean=1.0 if "norm" in name else 0.0)
    theirs.save_pretrained(tmp_path)
    llm, ids = load_llm(tmp_path), torch.tensor([[2, 71, 82, 8, 18, 28], [45, 9, 0, 4, 52, 35]])
    assert llm.config.tied_head == tied and llm.config.n_kv_head == 2
    with torch.no_grad():
        close(llm.logits(llm(llm.embed(ids))), theirs(ids).logits)
        expected = theirs.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, do_sample=False)[:, 6:]
    assert torch.equal(llm.generate(llm.embed(ids), 8), expected)
    assert slow_generate(llm, llm.embed(ids[:1]), 8) == expected[0].tolist()


PUBLISHED = {   # the sizes in the models' own config.json, and their number of parameters
    "LLaMA2-7B": (6_738_415_616, dict(
        model_type="llama", hidden_size=4096, intermediate_size=11008, max_position_embeddings=4096,
        num_attention_heads=32, num_hidden_layers=32, num_key_value_heads=32, rms_norm_eps=1e-05, rope_scaling=None,
        hidden_act="silu", tie_word_embeddings=False, torch_dtype="float16", vocab_size=32000)),
    "Qwen-1.8B": (1_836_828_672, dict(
        model_type="qwen", hidden_size=2048, intermediate_size=11008, kv_channels=128, layer_norm_epsilon=1e-06,
        no_bias=True, max_position_embeddings=8192, num_attention_heads=16, num_hidden_layers=24, rotary_emb_base=10000,
        rotary_pct=1.0, scale_attn_weights=True, seq_length=8192, tie_word_embeddings=False, use_dynamic_ntk=True,
        use_logn_attn=True, vocab_size=151936)),
    "ChatGLM3-6B": (6_243_584_000, dict(
        model_type="chatglm", add_bias_linear=False, add_qkv_bias=True, apply_query_key_layer_scaling=True,
        apply_residual_connection_post_layernorm=False, attention_softmax_in_fp32=True, ffn_hidden_size=13696,
        fp32_residual_connection=False, hidden_size=4096, kv_channels=128, layernorm_epsilon=1e-05,
        multi_query_attention=True, multi_query_group_num=2, num_attention_heads=32, num_layers=28, original_rope=True,
        padded_vocab_size=65024, post_layer_norm=True, quantization_bit=0, rmsnorm=True, seq_length=8192,
        tie_word_embeddings=False)),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_sizes(name, tmp_path):
    count, raw = PUBLISHED[name]
    (tmp_path / "config.json").write_text(json.dumps(raw))
    with torch.device("meta"):
        llm = LLM(Config.from_dir(tmp_path))
    assert sum(p.numel() for p in llm.parameters()) == count
    assert not any(p.requires_grad for p in llm.parameters())


STORY = ("Once upon a time, there was a little girl named Lily. She loved to play outside in the park. "
         "One day, she saw a big, red ball.")


def test_a_real_model_writes_its_story():
    path = need_shared("weights", "stories260K")
    llm, tokenizer = load_llm(path), load_tokenizer(path)
    x = llm.embed(torch.tensor([[tokenizer.token_id("<s>")]]))
    cached = llm.generate(x, 64)[0].tolist()
    assert tokenizer.decode(cached).startswith(STORY)
    assert slow_generate(llm, x, 64) == cached


# ---------------------------------------------------------------------------------------------------------------------
# Loading


@pytest.fixture
def checkpoint(tmp_path):
    """Write the tiny checkpoint of a family: checkpoint("llama", shards=3) -> its folder."""
    return lambda family="llama", shards=0: write_tiny(tmp_path / "llm", family, shards)


def refused(folder, *words):
    """Loading raises one ValueError that has all these words."""
    with pytest.raises(ValueError) as error:
        load_llm(folder)
    for word in map(str, words):
        assert word in str(error.value), f"{word!r} is not in: {error.value}"


def resave(folder, change, name="model.safetensors"):
    """Rewrite a weight file after change(tensors)."""
    tensors = load_file(folder / name)
    change(tensors)
    save_file(tensors, folder / name)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("shards", [1, 5])
def test_shards_equal_a_single_file(tiny, checkpoint, family, shards):
    llm = load_llm(checkpoint(family, shards))
    theirs = tiny[family].state_dict()
    assert all(torch.equal(p, theirs[name]) for name, p in llm.state_dict().items())
    assert llm.fingerprint == tiny[family].fingerprint != ""
    assert not any(p.requires_grad for p in llm.parameters())


def test_load_in_another_dtype(tiny, checkpoint):
    llm = load_llm(checkpoint(), dtype=torch.bfloat16)
    assert all(torch.equal(p, tiny["llama"].state_dict()[name].bfloat16()) for name, p in llm.state_dict().items())


@pytest.mark.parametrize("family, name", [
    ("llama", "model.layers.2.self_attn.rotary_emb.inv_freq"), ("chatglm", "transformer.rotary_pos_emb.inv_freq")])
def test_published_rotary_tables_are_let_be(checkpoint, family, name):
    folder = checkpoint(family)
    resave(folder, lambda t: t.update({name: torch.ones(5)}))
    load_llm(folder)


def test_fingerprint_tells_weights_apart(tiny, checkpoint):
    folder = checkpoint()
    resave(folder, lambda t: t["model.layers.1.mlp.up_proj.weight"][0, :1].add_(1))
    assert load_llm(folder).fingerprint != tiny["llama"].fingerprint


def test_every_wrong_tensor_is_named(checkpoint):
    folder, name = checkpoint(), "model.layers.{}.self_attn.{}_proj.weight".format

    def damage(t):
        del t["lm_head.weight"], t[name(0, "v")]
        t["model.layers.3.input_layernorm.weight"] = torch.ones(36)                     # one layer too many
        t["model.embed_tokens.weight"] = torch.ones(270, 36)
        t[name(1, "q")], t[name(1, "k")] = t[name(1, "k")], t[name(1, "q")]             # stacked, they look right

    resave(folder, damage)
    refused(folder, folder, "missing: lm_head.weight", f"missing: {name(0, 'v')}")
    refused(folder, "unused: model.layers.3.input_layernorm.weight", "model.safetensors")
    refused(folder, "model.embed_tokens.weight", "[270, 36]", "[271, 36]", "model.safetensors")
    refused(folder, name(1, "q"), name(1, "k"), "[20, 36]", "[60, 36]")


def test_a_misshapen_tensor_is_named_with_its_own_shard(checkpoint):
    folder, name = checkpoint(shards=7), "model.layers.2.self_attn.v_proj.weight"
    file = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"][name]
    resave(folder, lambda t: t.update({name: torch.ones(20, 35)}), file)
    refused(folder, name, "[20, 35]", file)


def test_a_scalar_is_misshapen(checkpoint):
    folder = checkpoint()
    resave(folder, lambda t: t.update({"model.norm.weight": torch.tensor(1.0)}))
    refused(folder, "model.norm.weight", "[]", "[36]")


def test_integer_weights_are_refused(checkpoint):
    folder, name = checkpoint(), "model.layers.1.mlp.up_proj.weight"
    resave(folder, lambda t: t.update({name: t[name].to(torch.int8)}))
    refused(folder, name, "I8", "model.safetensors")


def test_incomplete_downloads_are_refused(checkpoint):
    folder = checkpoint(shards=3)
    shard = folder / "model-00002-of-00003.safetensors"
    whole = shard.read_bytes()
    for content, words in {
        whole[:len(whole) // 2]: ["incomplete"], whole[:5]: ["incomplete"], b"": ["incomplete"],
        b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n": ["git-lfs pointer"],
    }.items():
        shard.write_bytes(content)
        refused(folder, shard, *words)
    shard.unlink()
    refused(folder, shard, "missing", "model.safetensors.index.json")
    (folder / "model.safetensors.index.json").write_text("{}")
    refused(folder, "model.safetensors.index.json", "weight_map")


def test_a_folder_without_safetensors_is_refused(checkpoint):
    folder = checkpoint()
    (folder / "model.safetensors").unlink()
    refused(folder, folder, ".safetensors")
    (folder / "pytorch_model.bin").write_bytes(b"a pickle, never opened")
    refused(folder, folder, ".bin", "--to-safetensors")


@pytest.mark.parametrize("family, change, words", [
    ("llama", {"model_type": "gpt2"}, ["'gpt2'", "llama", "qwen", "qwen2", "chatglm"]),
    ("llama", {"model_type": None}, ["None", "llama"]),
    ("qwen2", {"quantization_config": {"bits": 4}}, ["quantization_config", "4"]),
    ("chatglm", {"quantization_bit": 8}, ["quantization_bit", "8"]),
    ("llama", {"rope_scaling": {"type": "linear", "factor": 2.0}}, ["rope_scaling", "linear"]),
    ("qwen2", {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}}, ["yarn"]),
    ("qwen", {"rotary_pct": 0.5}, ["rotary_pct", "0.5"]),
    ("chatglm", {"rope_ratio": 500}, ["rope_ratio", "500"]),
    ("chatglm", {"original_rope": False}, ["original_rope"]),
    ("llama", {"hidden_act": "gelu"}, ["hidden_act", "gelu"]),
    ("llama", {"attention_bias": True}, ["attention_bias"]),
    ("qwen2", {"use_sliding_window": True}, ["use_sliding_window"]),
    ("llama", {"num_key_value_heads": 4}, ["6 heads", "4 key/value"]),
    ("llama", {"hidden_size": "36"}, ["'36'"]),
    ("chatglm", {"ffn_hidden_size": -34}, ["-34"]),
])
def test_a_model_that_this_transformer_does_not_implement_is_refused(tmp_path, family, change, words):
    (tmp_path / "config.json").write_text(json.dumps({**TINY[family], **change}))
    refused(tmp_path, tmp_path / "config.json", *words)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_size_must_be_in_the_config(tmp_path, family):
    optional = {"model_type", "num_key_value_heads", "head_dim", "rope_theta"}
    for key in TINY[family].keys() - optional:
        (tmp_path / "config.json").write_text(json.dumps({k: v for k, v in TINY[family].items() if k != key}))
        refused(tmp_path, tmp_path / "config.json", key, "missing")


def test_a_broken_config_is_refused(tmp_path):
    refused(tmp_path / "absent", "absent", "no such folder")
    refused(tmp_path, "config.json", "not found")
    for text, word in {"": "JSON", '{"model_type": "llama",': "JSON", "[1, 2]": "model_type", "\xff": "JSON"}.items():
        (tmp_path / "config.json").write_text(text, encoding="latin-1")
        refused(tmp_path, "config.json", word)


def test_config_reads_both_homes_of_theta(tmp_path):
    raw = {k: v for k, v in TINY["qwen2"].items() if k != "rope_theta"}
    new = {"rope_parameters": {"rope_theta": 7e5, "rope_type": "default"}}
    for change, theta in [({"rope_theta": 7e5}, 7e5), (new, 7e5), ({}, 1e4)]:
        (tmp_path / "config.json").write_text(json.dumps({**raw, **change}))
        assert Config.from_dir(tmp_path).rope_theta == theta
