"""The backbone against slow independent formulas; padding, cache, decoding, recomputation.

Backbones are in float64 here: see `tiny64` and `near` in conftest.py.
"""
import copy
import gc
import math

import pytest
import torch
import torch.nn.functional as F
from bench import kept_bytes
from conftest import TINY, near, need_shared, need_smollm2, published_tensors, recipe
from conftest import tiny_tensors, write_checkpoint, write_tiny
from torch.nn import RMSNorm

from data import load_tokenizer
from model import LLM, MLP, Config, Int8Product, KVCache, apply_rope, load_llm, rope_table, to_int8, widen

# ---------------------------------------------------------------------------------------------------------
# The same transformer a second time: one row, one head, one position at a time, on the published tensors


def slow_norm(x, weight, eps):
    return torch.stack([v / math.sqrt(sum(n * n for n in v.tolist()) / len(v) + eps) for v in x]) * weight


def slow_rope(x, positions, theta, width, interleaved):
    """x (T, D): channel pair j, as a complex number, times exp(i t theta^(-2j / width)) at position t."""
    out = x.clone()
    for row, position in enumerate(positions):
        for j in range(width // 2):
            a, b = (2 * j, 2 * j + 1) if interleaved else (j, j + width // 2)
            angle = position * theta ** (-2 * j / width)
            z = complex(x[row, a], x[row, b]) * complex(math.cos(angle), math.sin(angle))
            out[row, a], out[row, b] = z.real, z.imag
    return out


def slow_head(q, k, v):
    """One head, q, k, v (T, D): each position looks at itself and at those before it."""
    scores = [q[t] @ k[:t + 1].T / math.sqrt(q.size(1)) for t in range(len(q))]
    return torch.stack([score.softmax(dim=0) @ v[:t + 1] for t, score in enumerate(scores)])


def slow_attention(q, k, v, heads, *rope):
    """q (T, H D), k, v (T, K D) -> (T, H D). H = 6, K = 2: query heads 0 1 2 read k/v head 0, others 1."""
    D = q.size(1) // heads
    q, k, v = (x.split(D, dim=1) for x in (q, k, v))
    q, k = ([slow_rope(x, *rope) for x in part] for part in (q, k))
    shared = [i * len(k) // heads for i in range(heads)]
    return torch.cat([slow_head(q[i], k[j], v[j]) for i, j in enumerate(shared)], dim=1)


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
        heads = raw["num_attention_heads"], raw["multi_query_group_num"], raw["multi_query_group_num"]
        sizes = [n * raw["kv_channels"] for n in heads]
        name = p + "self_attention.query_key_value."
        qkv = list(zip(w[name + "weight"].split(sizes), w[name + "bias"].split(sizes)))
        gate, up = w[p + "mlp.dense_h_to_4h.weight"].chunk(2)
        w = {**w, p + "gate.weight": gate, p + "up.weight": up}
        norms = "input_layernorm", "post_attention_layernorm"
        rest = norms[0], "self_attention.dense", norms[1], "gate", "up", "mlp.dense_4h_to_h"
    else:
        p = f"model.layers.{i}."
        qkv = [(w[f"{p}self_attn.{x}_proj.weight"], w.get(f"{p}self_attn.{x}_proj.bias", 0)) for x in "qkv"]
        norms = "input_layernorm", "post_attention_layernorm"
        rest = norms[0], "self_attn.o_proj", norms[1], "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"
    return qkv, *(w[f"{p}{name}.weight"] for name in rest)


def slow_llm(raw, tensors, ids, positions=None):
    """Token ids (T,) at these positions [0, 1, ...] -> logits (T, V)."""
    w, glm = {name: t.double() for name, t in tensors.items()}, raw["model_type"] == "chatglm"
    positions = range(len(ids)) if positions is None else positions
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
        D = q.size(1) // heads
        rope = (positions, theta, D // 2, True) if glm else (positions, theta, D, False)
        x = x + slow_attention(q, k, v, heads, *rope) @ out.T
        x = x + slow_mlp(slow_norm(x, norm2, eps), gate, up, down)
    return slow_norm(x, last_norm, eps) @ head.T


# ---------------------------------------------------------------------------------------------------------
# Parts


def config(**change) -> Config:
    """Sizes for a test of one part; 4 of a head's 6 channels turn."""
    sizes = dict(family="llama", dim=20, n_layer=2, n_head=6, n_kv_head=2, head_dim=6, ffn_dim=14, max_len=64,
                 vocab_size=31, norm_eps=1e-2, rope_theta=50.0, rope_dim=4, qkv_bias=True)
    return Config(**{**sizes, **change})


def filled(module):
    """The module with every parameter random, in float64."""
    for name, p in module.named_parameters():
        p.data = recipe(f"part.{name}", p.shape, 0.3, mean=1.0 if "norm" in name or p.dim() == 1 else 0.0)
    return module.requires_grad_(False).double()


def random(name, *shape):
    return recipe(name, shape, 0.5).double()


def test_rms_norm():
    norm, x = filled(RMSNorm(11, eps=0.1)), random("norm.x", 5, 11)
    expected = slow_norm(x, norm.weight, 0.1)
    near(norm(x), expected)
    half = norm.bfloat16()(x.bfloat16())                                # the activation's dtype comes back
    assert half.dtype == torch.bfloat16
    near(half, expected, 0.01)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("width", [4, 6])
def test_rope_is_a_complex_rotation_by_position(interleaved, width):
    c, x = config(rope_dim=width), random("rope.x", 7, 3, 6)            # N, heads, D
    positions = [0, 1, 2, 0, 2, 60, 7]
    ours = apply_rope(x, rope_table(torch.tensor(positions), c), interleaved)
    for head in range(3):
        near(ours[:, head], slow_rope(x[:, head], positions, c.rope_theta, width, interleaved))


@pytest.mark.parametrize("interleaved", [False, True])
def test_attention_reads_grouped_heads(interleaved):
    llm, x = filled(LLM(config(rope_interleaved=interleaved))), random("attention.x", 1, 5, 20)
    attention = llm.blocks[0].attn
    q, k, v = attention.qkv(x[0]).split([6 * 6, 2 * 6, 2 * 6], dim=1)
    expected = slow_attention(q, k, v, 6, range(5), llm.config.rope_theta, 4, interleaved)
    near(attention(x[0], llm.places(x, None, None, None)), attention.out(expected))


def test_mlp():
    mlp, x = filled(MLP(config())), random("mlp.x", 3, 20)
    near(mlp(x), slow_mlp(x, *mlp.gate_up.weight.split(14), mlp.down.weight))


def test_block_has_two_residuals():
    llm, rows = filled(LLM(config())), random("block.x", 2, 5, 20)
    block, places, x = llm.blocks[0], llm.places(rows, None, None, None), rows.flatten(0, 1)
    h = x + block.attn(block.attn_norm(x), places)
    near(block(x, places), h + block.mlp(block.mlp_norm(h)))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_scores_of_16_bits_come_in_32(dtype):
    llm = filled(LLM(config())).to(dtype)
    assert llm.logits(random("head.x", 2, 20).to(dtype)).dtype == torch.float32


def test_padding_is_packed_away_and_back():
    llm, x = filled(LLM(config())), random("packed.x", 2, 3, 20)
    real = torch.tensor([[False, True, True], [False, False, True]])
    places = llm.places(x, real, None, None)
    assert torch.equal(places.pack(x), x[real]) and places.rope[0].shape == (3, 1, 2)
    assert torch.equal(places.unpack(x[real]), x * real[..., None])
    everywhere = llm.places(x, None, None, None)
    assert everywhere.pack(x).data_ptr() == x.data_ptr()                # where all is real, nothing is copied
    assert everywhere.unpack(everywhere.pack(x)).data_ptr() == x.data_ptr()


def test_what_each_position_sees():
    llm, x = filled(LLM(config())), random("seen.x", 2, 3, 20)
    real = torch.tensor([[False, True, True], [True, True, True]])
    sees = llm.places(x, real, None, None).sees[:, 0].int().tolist()
    assert sees == [[[1, 0, 0], [0, 1, 0], [0, 1, 1]], [[1, 0, 0], [1, 1, 0], [1, 1, 1]]]   # padding sees itself


# ---------------------------------------------------------------------------------------------------------
# The whole


@pytest.fixture(params=TINY)
def llm(request, tiny64) -> LLM:
    return tiny64[request.param]


def logits(llm, ids, cache=None):
    return llm.logits(llm(llm.embed(torch.tensor([ids])), cache=cache))[0]


def test_whole_backbone(llm):
    family, ids = llm.config.family, [3, 141, 59, 26, 5, 35, 89, 79, 3, 238]
    ours = logits(llm, ids)
    near(ours, slow_llm(TINY[family], tiny_tensors(family), ids))
    assert ours.std() > 0.3                                             # they do differ


def test_tied_head_is_the_embedding(tmp_path):
    raw = {**TINY["qwen2"], "tie_word_embeddings": True}
    tensors = published_tensors(raw)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    expected = slow_llm(raw, tensors, range(6))
    del tensors["lm_head.weight"]
    llm = load_llm(write_checkpoint(tmp_path, raw, tensors), dtype=torch.float64)
    near(logits(llm, range(6)), expected)
    assert not hasattr(llm, "head")


LLAMA3 = dict(rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
              original_max_position_embeddings=32)        # some channels stay, some are slowed, some mixed
KINDS = {"Llama": {}, "Qwen2": {}, "Qwen3": dict(head_dim=14), "Mistral": dict(sliding_window=None),
         "Llama 3": dict(rope_scaling={**LLAMA3, "rope_theta": 300.0})}


def in_double(theirs):
    """Puts torch's norm, which computes in the dtype that it is given, in the place of theirs."""
    for module in list(theirs.modules()):
        for name, child in module.named_children():
            if type(child).__name__.endswith("RMSNorm"):
                norm = torch.nn.RMSNorm(len(child.weight), child.variance_epsilon, dtype=torch.float64)
                norm.weight.data = child.weight.data
                setattr(module, name, norm)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_equals_transformers(kind, tied, tmp_path):
    import transformers

    name = kind.split()[0]
    theirs = getattr(transformers, f"{name}ForCausalLM")(getattr(transformers, f"{name}Config")(
        hidden_size=60, num_hidden_layers=3, num_attention_heads=6, num_key_value_heads=2, vocab_size=83,
        intermediate_size=34, max_position_embeddings=64, rope_theta=3000.0, tie_word_embeddings=tied,
        bos_token_id=1, eos_token_id=None, pad_token_id=0, **KINDS[kind])).eval()
    for name, p in theirs.named_parameters():
        p.data = recipe(name, p.shape, 0.2, mean=1.0 if "norm" in name else 0.0)
    theirs.save_pretrained(tmp_path)
    theirs.double()
    llm = load_llm(tmp_path, dtype=torch.float64)
    ids = torch.tensor([[2, 71, 82, 8, 18, 28], [45, 9, 0, 4, 52, 35]])
    assert llm.config.tied_head == tied and llm.config.n_kv_head == 2
    assert (llm.config.qk_norm, bool(llm.config.rope_llama3)) == (kind == "Qwen3", kind == "Llama 3")
    with torch.no_grad():
        ours = llm.logits(llm(llm.embed(ids)))
        near(ours, theirs(ids).logits)                  # their norm computes in fp32 at most
        in_double(theirs)
        near(ours, theirs(ids).logits, 1e-9)
        mask = torch.ones_like(ids)
        expected = theirs.generate(ids, attention_mask=mask, max_new_tokens=8, do_sample=False)[:, 6:]
    assert torch.equal(llm.generate(llm.embed(ids), 8), expected)


# ---------------------------------------------------------------------------------------------------------
# Padding and cache: whatever the way, a row is what it is alone


def padded(llm, lengths):
    """Rows of these lengths, each alone (1, T, C); with noise in front (B, T, C); what is real (B, T)."""
    rows = [random(f"row.{n}", 1, length, llm.config.dim) for n, length in enumerate(lengths)]
    x = 20 * random("padding", len(rows), max(lengths), llm.config.dim)
    real = torch.zeros(x.shape[:2], dtype=torch.bool)
    for n, row in enumerate(rows):
        x[n, -row.size(1):], real[n, -row.size(1):] = row[0], True
    return rows, x, real


def read(llm, x, target, *how):
    """Hidden states of the rows x, and the gradient at x of their product with the target."""
    x = x.detach().requires_grad_()
    hidden = llm(x, *how)
    return hidden.detach(), *torch.autograd.grad(hidden, x, target)


LENGTHS = pytest.mark.parametrize("lengths", [[9, 9], [9, 1, 4]], ids=["full", "padded"])


@pytest.mark.parametrize("recompute", [0, 2, 3])
def test_padded_rows_equal_rows_alone(llm, recompute):
    rows, x, real = padded(llm, [9, 1, 4])
    target = random("target", *x.shape) * real[..., None]
    hidden, gradient = read(llm, x, target, real, None, recompute)
    for row, h, g, t in zip(rows, hidden, gradient, target):
        T = row.size(1)
        alone = read(llm, row, t[None, -T:])
        near(h[-T:], alone[0][0])
        near(g[-T:], alone[1][0])
    assert not gradient[~real].any() and gradient[real].any(dim=-1).all()


@LENGTHS
@pytest.mark.parametrize("last", [1, 3, 7])
@pytest.mark.parametrize("recompute", [0, 3])
def test_the_last_positions_equal_those_of_the_whole(llm, lengths, last, recompute):
    _, x, real = padded(llm, lengths)
    mask = None if real.all() else real
    wanted = real[:, -last:, None]                                      # nobody asks for padding
    target = random("target", *x.shape)[:, -last:] * wanted
    expected, gradient = read(llm, x, F.pad(target, (0, 0, 9 - last, 0)), mask)
    found = read(llm, x, target, mask, None, recompute, last)
    near(found[0] * wanted, expected[:, -last:] * wanted)
    near(found[1], gradient)
    cache = KVCache(llm.config.n_layer)
    llm(x[:, :2], None if mask is None else mask[:, :2], cache)
    near(llm(x[:, 2:], None if mask is None else mask[:, 2:], cache, 0, last) * wanted, expected[:, -last:] * wanted)


def test_what_nobody_asks_for_is_not_computed(llm):
    _, x, real = padded(llm, [9, 1, 4])
    counts, parts = [], [part for part in llm.modules() if isinstance(part, torch.nn.Linear)]
    handles = [part.register_forward_hook(lambda part, inputs, output: counts.append(output[..., 0].numel()))
               for part in parts]
    llm(x, real, last=2)
    for handle in handles:
        handle.remove()
    n, asked = 9 + 1 + 4, 3 * 2
    assert counts == [n] * 4 * (llm.config.n_layer - 1) + [n, n, asked, asked]


@LENGTHS
@pytest.mark.parametrize("split", [[9], [1, 8], [5, 4], [8, 1], [3, 1, 3, 2], [1] * 9], ids=str)
def test_cached_equals_full(llm, lengths, split):
    _, x, real = padded(llm, lengths)
    cache, hidden, end = KVCache(llm.config.n_layer), [], 0
    for part in split:
        start, end = end, end + part
        mask = None if real[:, start:end].all() else real[:, start:end]
        hidden.append(llm(x[:, start:end], mask, cache))
        assert cache.layers[-1][0].size(2) == end and torch.equal(cache.real, real[:, :end])
    near(torch.cat(hidden, dim=1)[real], llm(x, None if real.all() else real)[real])


def test_a_copy_of_a_cache_is_its_own(llm):
    rows, x, real = padded(llm, [6, 2])
    cache = KVCache(llm.config.n_layer)
    llm(x, real, cache)
    before = [[t.clone() for t in layer] for layer in cache.layers]
    more = random("more", 2, 3, llm.config.dim)
    hidden = llm(more, None, cache.copy())
    assert torch.equal(llm(more, None, cache.copy()), hidden)           # nothing was stored in the first
    assert all(torch.equal(a, b) for layer, old in zip(cache.layers, before) for a, b in zip(layer, old))
    for row, new, h in zip(rows, more, hidden):
        near(llm(torch.cat((row[0], new))[None])[0, -3:], h)


def test_positions_can_start_anew_and_still_see_what_is_cached(llm):
    first, second, family = [3, 141, 59, 26], [5, 35, 89, 79, 3], llm.config.family
    positions = [*range(4), *range(5), *range(5)]
    expected = slow_llm(TINY[family], tiny_tensors(family), first + second + second, positions)
    cache = KVCache(llm.config.n_layer)
    near(logits(llm, first, cache), expected[:4])
    for end in (9, 14):
        x = llm.embed(torch.tensor([second]))
        near(llm.logits(llm(x, cache=cache, positions=torch.arange(5)[None]))[0], expected[end - 5:end])


def test_more_positions_than_trained_for_are_refused():
    llm = filled(LLM(config(max_len=8)))
    x = random("long", 1, 9, 20)
    with pytest.raises(ValueError, match="9 .* 8"):
        llm(x)
    with pytest.raises(ValueError, match="9 .* 8"):
        llm.generate(x[:, :7], 4)
    with pytest.raises(ValueError, match="9 .* 8"):
        llm.generate(x[:, :7], 4, reread=True)
    cache = KVCache(2)
    llm(x[:, :8], cache=cache)
    with pytest.raises(ValueError, match="9 .* 8"):
        llm(x[:, :1], cache=cache)
    assert llm.generate(x[:, :7], 2).shape == llm.generate(x[:, :7], 2, reread=True).shape == (1, 2)


# ---------------------------------------------------------------------------------------------------------
# Decoding


def slow_generate(llm, x, n):
    """Greedy ids of one row x (1, T, C) without cache: everything is read again for each token."""
    ids = []
    for _ in range(n):
        ids.append(llm.logits(llm(x))[0, -1].argmax().item())
        x = torch.cat((x, llm.embed(torch.tensor([ids[-1:]]))), dim=1)
    return ids


def test_generate_returns_the_new_tokens(llm):
    rows, x, real = padded(llm, [9, 1, 4])
    expected = [slow_generate(llm, row, 6) for row in rows]
    for n in (6, 1):
        assert llm.generate(x, n, real).tolist() == [ids[:n] for ids in expected]
    assert llm.generate(rows[0], 6).tolist() == expected[:1]            # a batch of one, no mask
    assert llm.generate(x, 0, real).shape == (3, 0)


def test_reading_again_sees_all_that_was_read_before(llm):
    """As the release's ChatGLM3: rows from position 0 on, behind all earlier readings of them."""
    first = [3, 141, 59, 26]
    ids, positions, new = list(first), list(range(4)), []
    raw = TINY[llm.config.family]
    for _ in range(3):
        new.append(slow_llm(raw, tiny_tensors(llm.config.family), ids, positions)[-1].argmax().item())
        ids += first + new
        positions += range(4 + len(new))
    assert llm.generate(llm.embed(torch.tensor([first])), 3, reread=True).tolist() == [new]


def test_generate_stops_at_the_end_token(tiny64):
    llm = tiny64["llama"]
    rows, x, real = padded(llm, [9, 4])
    first, second = (slow_generate(llm, row, 6) for row in rows)
    eos = first[2]
    assert eos not in first[:2] + second                                # or this test would show nothing
    assert llm.generate(rows[0], 6, eos_id=eos).tolist() == [first[:3]]
    assert llm.generate(x, 6, real, eos).tolist() == [first[:3] + [eos] * 3, second]
    both = torch.cat((rows[0], rows[0]))
    assert llm.generate(both, 6, eos_id=eos).tolist() == [first[:3]] * 2


STORY = ("Once upon a time, there was a little girl named Lily. She loved to play outside in the park. "
         "One day, she saw a big, red ball.")


def test_smollm2_knows_the_capital_of_france():
    path = need_smollm2()
    llm, tokenizer = load_llm(path), load_tokenizer(path)
    start, end = tokenizer.token_id("<|im_start|>"), tokenizer.token_id("<|im_end|>")
    ids = []
    for said in ("system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face",
                 "user\nWhat is the capital of France?"):
        ids += [start, *tokenizer.encode(said), end, *tokenizer.encode("\n")]
    x = llm.embed(torch.tensor([[*ids, start, *tokenizer.encode("assistant\n")]]))
    assert tokenizer.decode(llm.generate(x, 20, eos_id=end)[0].tolist()) == "The capital of France is Paris."


def test_a_real_model_writes_its_story():
    path = need_shared("weights", "stories260K")
    llm, tokenizer = load_llm(path), load_tokenizer(path)
    x = llm.embed(torch.tensor([[tokenizer.token_id("<s>")]]))
    assert tokenizer.decode(llm.generate(x, 64)[0].tolist()).startswith(STORY)


# ---------------------------------------------------------------------------------------------------------
# Recomputation


@LENGTHS
def test_recomputed_gradients_are_bit_equal(llm, lengths):
    _, x, real = padded(llm, lengths)
    target = random("target", *x.shape)
    plain = read(llm, x, target, real)
    for n in range(1, llm.config.n_layer + 1):
        ours = read(llm, x, target, real, None, n)
        assert torch.equal(ours[0], plain[0]) and torch.equal(ours[1], plain[1])


def test_recomputation_keeps_one_hidden_state_per_block():
    llm, x = filled(LLM(config(n_layer=6))), random("x", 2, 9, 20).requires_grad_()
    kept = [kept_bytes(llm, x, n) for n in range(7)]
    saved = [a - b for a, b in zip(kept, kept[1:])]                     # by each block more that recomputes
    assert min(saved[:-1]) > 8 * x.nbytes and saved[-1] == 0            # the last block never does
    one = kept_bytes(filled(LLM(config(n_layer=1))), x, 0)              # what the last block and norm keep
    assert kept[-1] - one < 6 * x.nbytes


def test_recomputation_refuses_what_it_would_get_wrong():
    llm, x = filled(LLM(config(n_layer=3))), random("x", 1, 2, 20).requires_grad_()
    with pytest.raises(AssertionError, match="a second time"):
        llm(x, cache=KVCache(3), recompute=1)
    llm.blocks[1].mlp.down.weight.requires_grad_(True)
    llm(x, recompute=1)
    with pytest.raises(AssertionError, match="frozen"):
        llm(x, recompute=2)


# ---------------------------------------------------------------------------------------------------------------------
# 8 bits


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_row_in_8_bits_is_off_by_half_a_step(dtype):
    w = recipe("int8.rows", (64, 500), 1.0)
    weight, scale = to_int8(w.clone(), dtype)
    widened = widen(weight, scale)
    assert widened.dtype == scale.dtype == dtype
    rounding = 0 if dtype == torch.float32 else w.abs() * torch.finfo(dtype).eps / 2        # of the widened entry
    assert ((widened - w).abs() <= 1.01 * (scale.float()[:, None] / 2 + rounding)).all()
    assert ((widened - w).abs() <= 2 * w.abs().amax(dim=1, keepdim=True) / 250).all()       # as the docstring says


def test_a_product_in_8_bits_is_that_of_the_widened_weights():
    w = recipe("int8.w", (5, 12), 1.0)
    w[3] = 0                                                            # a row of zeros has no scale
    weight, scale = to_int8(w.clone(), torch.float32)
    assert weight.dtype == torch.int8 and weight.abs().amax(dim=1).tolist() == [127, 127, 127, 0, 127]
    assert ((widen(weight, scale) - w).abs() <= scale[:, None] / 2 + 1e-7).all()
    x = recipe("int8.x", (7, 12), 1.0).requires_grad_()
    y = Int8Product.apply(x, weight, scale)
    near(y, x.double() @ widen(weight, scale).double().T)
    (gradient,) = torch.autograd.grad(y.square().sum(), x)
    near(gradient, 2 * y.double() @ widen(weight, scale).double())


@pytest.mark.parametrize("family", ["llama", "qwen", "chatglm"])
def test_a_backbone_in_8_bits(tiny, tmp_path, family):
    folder = write_tiny(tmp_path, family)
    whole, llm = tiny[family], load_llm(folder, dtype=torch.int8)
    assert llm.fingerprint == whole.fingerprint                         # of the weights on disk
    matrices = {name for name, p in llm.named_parameters() if p.dtype == torch.int8}
    assert matrices == {f"blocks.{i}.{layer}.weight" for i in range(whole.config.n_layer)
                        for layer in ("attn.qkv", "attn.out", "mlp.gate_up", "mlp.down")}
    for name, p in whole.named_parameters():
        found = llm.get_parameter(name)
        if name in matrices:
            found = widen(found, llm.get_parameter(name.replace("weight", "scale")))
            assert ((found - p).abs().amax(dim=1) <= p.abs().amax(dim=1) / 253).all()
        else:
            assert torch.equal(found, p)

    # As a backbone of fp32 that has the widened weights: answers, loss, gradients; and recomputation is allowed.
    twin = copy.deepcopy(whole)
    for name in matrices:
        scale = llm.get_parameter(name.replace("weight", "scale"))
        twin.get_parameter(name).data = widen(llm.get_parameter(name), scale)
    x = recipe("int8.row", (2, 6, whole.config.dim), 1.0)
    assert torch.equal(llm.generate(x, 3), twin.generate(x, 3))
    gradients = []
    for net, recompute in ((twin, 0), (llm, 0), (llm, 2)):
        row = x.clone().requires_grad_()
        loss = net.logits(net(row, recompute=recompute)).square().mean()
        gradients.append(torch.autograd.grad(loss, row)[0])
    near(gradients[0], gradients[1], 1e-5)
    assert torch.equal(gradients[1], gradients[2])
    row = x.clone().requires_grad_()
    shapes = {twin.get_parameter(name).shape for name in matrices}

    def widened() -> int:
        return sum(type(x) is torch.Tensor and x.shape in shapes and x.is_floating_point() for x in gc.get_objects())

    before = widened()
    kept = llm(row)                                                     # while it lives, so does what is kept
    assert widened() == before and kept.requires_grad                   # nothing widened is kept for backward
    assert kept_bytes(llm, row, 0) == kept_bytes(twin, row, 0)
