"""The method: sizes, formulas, default and official rows, what training may change, files.

The backbone is in float64, the adapter in fp32: what is equal is equal to 1e-5 of the largest number.
"""
import copy
import json
from dataclasses import asdict
from types import SimpleNamespace

import pytest
import torch
from conftest import TINY, ByteTokenizer, near, published_tensors, random_adapter, recipe, write_checkpoint
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from adapter import AdapterConfig, MSEAdapter, MultimodalLLM, load_adapter, save_adapter
from data import TASKS, Batch, DataError, preset
from eval import label_logprobs
from model import load_llm
from release import OFFICIAL_NAMES

PAIRS = [("llama", "meld"), ("qwen", "simsv2"), ("qwen2", "cherma"), ("chatglm", "mosei")]
AUDIO, VIDEO = 5, 7                                                     # features of a frame
TEXTS = ["", "Oh!", "I can't believe it: she left me. Again!", "好吧，真是太“好”了。", "x" * 90]
AUDIO_LEN, VIDEO_LEN = [0, 3, 11, 6, 1], [4, 0, 1, 9, 0]                # 0: the modality is missing


def features(kind: str, width: int, lengths: list, noise: bool):
    """All rows' frames (B, L, width), and their lengths; behind those, zeros up to the longest or noise."""
    real = [recipe(f"{kind}.{n}", (12, width), 1.0)[:length] for n, length in lengths]
    x = recipe(f"noise.{kind}", (len(real), 12 if noise else max(1, *map(len, real)), width), float(noise))
    for row, frames in zip(x, real):
        row[:len(frames)] = frames
    return x, torch.tensor([len(frames) for frames in real])


def rows(task, numbers, noise: bool = False) -> Batch:
    """These rows of five as a batch."""
    labels = [1, 0, 3, 6, 2] if task.labels else [-1.0, 0.4, 0.0, 0.6, -0.2]
    audio = features("audio", AUDIO, [(n, AUDIO_LEN[n]) for n in numbers], noise)
    video = features("video", VIDEO, [(n, VIDEO_LEN[n]) for n in numbers], noise)
    return Batch([TEXTS[n] for n in numbers], *audio, *video, [labels[n] for n in numbers])


def make(llm, task, official=False, tokens=3) -> MultimodalLLM:
    config = AdapterConfig(llm.config.dim, AUDIO, VIDEO, audio_hidden=6, video_hidden=4, pseudo_tokens=tokens)
    return MultimodalLLM(llm, random_adapter(config), ByteTokenizer(), TASKS[task], official)


@pytest.fixture(params=PAIRS, ids="-".join)
def net(request, tiny64) -> MultimodalLLM:
    family, task = request.param
    return make(tiny64[family], task)


# ---------------------------------------------------------------------------------------------------------
# The adapter alone


COUNTS = {
    ("llama", 4096): dict(mosei=2_631_692, simsv2=2_680_716, meld=2_632_844, cherma=2_842_380),
    ("chatglm", 4096): dict(mosei=2_631_692, simsv2=2_680_716, meld=2_632_844, cherma=2_842_380),
    ("qwen", 2048): dict(mosei=1_351_244, simsv2=1_400_268, meld=1_312_072, cherma=1_561_932),
}


@pytest.mark.release
@pytest.mark.parametrize("family, dim", COUNTS)
def test_trainable_parameters_at_the_published_sizes(family, dim):
    for name, count in COUNTS[family, dim].items():
        task, p = TASKS[name], preset(name, family)
        with torch.device("meta"):
            adapter = MSEAdapter(AdapterConfig(
                dim, task.audio_dim, task.video_dim, p.audio_hidden, p.video_hidden, p.pseudo_tokens))
        assert sum(p.numel() for p in adapter.parameters() if p.requires_grad) == count


def slow_encoder(w, kind, x):
    """x (L, D) -> (256,): the LSTM's equations, frame by frame; gates: input, forget, cell, output."""
    w = {name.removeprefix(kind + "."): p for name, p in w.items() if name.startswith(kind)}
    from_x, from_h = w["rnn.weight_ih_l0"], w["rnn.weight_hh_l0"]
    h = c = torch.zeros(from_h.size(1), dtype=torch.float64)
    for frame in x.double():
        z = from_x @ frame + w["rnn.bias_ih_l0"] + from_h @ h + w["rnn.bias_hh_l0"]
        i, f, g, o = z.chunk(4)
        c = f.sigmoid() * c + i.sigmoid() * g.tanh()
        h = o.sigmoid() * c.tanh()
    return w["linear.weight"] @ h + w["linear.bias"]


def slow_pseudo_tokens(net, batch, n):
    """The paper's formulas for row n, without its padding, in fp64 -> (P, C)."""
    w = {name: p.detach().double() for name, p in net.adapter.named_parameters()}
    ids = net.tokenizer.encode(batch.text[n])[:net.task.text_len]
    mean = net.llm.embed(torch.tensor(ids, dtype=torch.long)).double().sum(0) / max(1, len(ids))
    t = w["mixer.text.weight"] @ mean + w["mixer.text.bias"]
    m = slow_encoder(w, "audio", batch.audio[n, :batch.audio_len[n]]) * t
    m = m + slow_encoder(w, "video", batch.video[n, :batch.video_len[n]]) * t
    fused = w["fusion.join.bias"]
    for i in range(3):
        part = f"fusion.scales.{i}."
        z = w[part + "0.weight"] @ m + w[part + "0.bias"]
        scale = w[part + "2.weight"] @ (z * 0.5 * (1 + torch.erf(z / 2 ** 0.5))) + w[part + "2.bias"]
        fused = fused + w["fusion.join.weight"][0, i] * scale
    h = w["project.weight"] @ fused + w["project.bias"]
    return torch.stack([scale * h + shift for (scale,), shift in zip(w["spread.weight"], w["spread.bias"])])


@pytest.mark.release
def test_pseudo_tokens_are_the_papers_formulas(net):
    batch = rows(net.task, range(5))
    pseudo = net.pseudo_tokens(batch).detach()
    assert pseudo.shape == (5, 3, net.llm.config.dim)
    for n in range(5):
        near(pseudo[n], slow_pseudo_tokens(net, batch, n), 1e-5)


@pytest.mark.release
def test_every_parameter_has_its_official_name(net):
    assert set(OFFICIAL_NAMES) == set(dict(net.adapter.named_parameters())) == set(net.adapter.state_dict())
    assert len(set(OFFICIAL_NAMES.values())) == len(OFFICIAL_NAMES)


# ---------------------------------------------------------------------------------------------------------
# Rows


def slow_row(net, batch, n, label):
    """Row n, written out: its parts in order, the log-probability of each token of the label."""
    words, encode = net.task.wording(net.llm.config.family), net.tokenizer.encode
    before = [net.tokenizer.token_id(name) for name in words.bos] + encode(words.open)
    after = encode(batch.text[n])[:net.task.text_len] + encode(words.close) + encode(words.prompt) + label
    before, after = (net.llm.embed(torch.tensor(ids)) for ids in (before, after))
    x = torch.cat((before, net.pseudo_tokens(batch)[n], after))
    logprob = net.llm.logits(net.llm(x[None]))[0].log_softmax(dim=-1)
    return logprob[-1 - len(label):-1].gather(1, torch.tensor(label)[:, None])[:, 0]


def slow_loss(net, batch):
    labels = [net.tokenizer.encode(net.label_text(y)) + net.end for y in batch.label]
    return torch.stack([-slow_row(net, batch, n, label).mean() for n, label in enumerate(labels)]).mean()


def test_loss_is_the_mean_over_rows_of_the_labels_cross_entropy(net):
    batch = rows(net.task, range(5))
    lengths = {len(net.tokenizer.encode(net.label_text(y))) for y in batch.label}
    assert net.task.name != "mosei" or len(lengths) > 1     # "-1.0" and "0.4" in one batch
    near(net.loss(batch), slow_loss(net, batch), 1e-5)


def test_a_row_does_not_depend_on_its_batch(net):
    with torch.no_grad():
        batch = rows(net.task, range(5))
        alone = [rows(net.task, [n]) for n in range(5)]
        losses = torch.stack([net.loss(one) for one in alone])
        near(net.loss(batch), losses.mean(), 1e-5)
        for n in range(5):                                  # with a row of quite another length beside it
            near(2 * net.loss(rows(net.task, [n, 4 - n])) - losses[4 - n], losses[n], 1e-5)
        near(net.pseudo_tokens(batch), torch.cat([net.pseudo_tokens(one) for one in alone]), 1e-5)
        assert [net.answer(one)[0] for one in alone] == net.answer(batch)
        assert losses.std() > 1e-3                          # the rows do differ


def test_what_stands_behind_a_features_length_does_not_matter(net):
    batch, noisy = rows(net.task, range(5)), rows(net.task, range(5), noise=True)
    assert noisy.audio.shape[1] > batch.audio.shape[1] and noisy.audio[0].abs().min() > 0
    near(net.loss(batch), net.loss(noisy), 1e-6)            # the LSTM sums rows of other lengths in another order
    assert net.answer(batch) == net.answer(noisy)


def test_a_missing_modality_gives_finite_gradients(net):
    none = torch.tensor([0, 0])
    missing = Batch(["", "no voice, no face"], torch.zeros(2, 1, AUDIO), none, torch.zeros(2, 1, VIDEO), none,
                    rows(net.task, [0, 1]).label)
    net.loss(missing).backward()
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in net.adapter.parameters())
    assert net.adapter.audio.rnn.weight_ih_l0.grad.abs().max() == 0


def text_mean(net, batch):
    """What the Text-Guide-Mixer gets of the text, (B, C)."""
    seen = []
    handle = net.adapter.mixer.register_forward_hook(lambda part, inputs, output: seen.append(inputs[0]))
    net.pseudo_tokens(batch)
    handle.remove()
    return seen[0]


@pytest.mark.parametrize("official", [False, True])
def test_pads_count_in_official_mode_alone(tiny64, official):
    llm, task = tiny64["llama"], TASKS["meld"]
    net, batch = make(llm, "meld", official), rows(task, range(5))
    x, real, pseudo = net.rows(batch, [[9] * (n + 1) for n in range(5)])
    means = text_mean(net, batch)
    for n, text in enumerate(batch.text):
        ids = net.tokenizer.encode(text)[:65]
        if official:
            ids = [net.tokenizer.token_id("<unk>")] * (65 - len(ids)) + ids
        embedded = llm.embed(torch.tensor(ids, dtype=torch.long))
        near(means[n], embedded.sum(0).float() / max(1, len(ids)), 1e-5)
        start, end = (llm.embed(torch.tensor(part)) for part in (net.before, net.after + [9] * (n + 1)))
        row = torch.cat((start, pseudo[n], embedded, end))
        assert torch.equal(x[n, -len(row):], row)           # in this order, with padding in front
        assert real[n, -len(row):].all() and real[n].sum() == len(row)


def test_official_wording_differs_where_the_release_does(tiny):
    ours, theirs = make(tiny["llama"], "meld"), make(tiny["llama"], "meld", official=True)
    bos = ours.tokenizer.token_id("<s>")
    assert theirs.before == [bos] + ours.before and ours.before.count(bos) == 1
    prompt = ours.tokenizer.decode(theirs.after)
    assert "from the" + " " * 45 + "target set" in prompt
    assert ours.tokenizer.decode(ours.after) == prompt.replace(" " * 45, " ")


def test_label_text(tiny):
    assert [make(tiny["qwen"], "simsv2").label_text(y) for y in (0.4, -1.0, 0.0)] == ["+0.4", "-1.0", "+0.0"]
    assert [make(tiny["llama"], "mosei").label_text(y) for y in (0.4, -1.0, 0.0)] == ["0.4", "-1.0", "0.0"]
    assert [make(tiny["qwen"], "cherma").label_text(y) for y in (0, 6)] == ["0", "6"]
    for family in tiny:         # whatever the label, its text is a legal one; the release writes "-0.0", too
        words = TASKS["simsv2"].wording(family)
        assert {words.label(y / 100) for y in range(-100, 101)} == set(words.labels)
        assert TASKS["simsv2"].wording(family, official=True).label(-0.04) == "-0.0"


def test_answer_is_the_greedy_continuation_up_to_the_end_token(net):
    net.answer_len = 6
    batch = rows(net.task, [2, 0])
    x, real, _ = net.rows(batch)
    ids = net.llm.generate(x, 6, real).tolist()
    net.eos_id = ids[0][2]
    assert net.eos_id not in ids[0][:2]
    expected = [row[:row.index(net.eos_id)] if net.eos_id in row else row for row in ids]
    assert net.answer(batch) == [net.tokenizer.decode(row) for row in expected]


def test_label_logprobs_score_every_legal_label(net):
    batch, labels = rows(net.task, [2, 0]), net.task.wording(net.llm.config.family).labels
    labels = [net.tokenizer.encode(text) + net.end for text in labels]
    for n, scores in enumerate(label_logprobs(net, batch)):
        expected = torch.stack([slow_row(net, batch, n, label).sum() for label in labels])
        near(scores, expected.log_softmax(dim=0).detach(), 1e-5)


class FourThings(torch.nn.Module):
    """All that the adapter needs of an LLM, of whatever make: what it is, in five fields, and four functions."""

    def __init__(self, llm):
        super().__init__()
        c = llm.config
        self.config = SimpleNamespace(family=c.family, n_layer=c.n_layer, dim=c.dim, vocab_size=c.vocab_size)
        self.fingerprint = "theirs"
        self.hidden = [llm]                                 # in a list: no module of this one
        self.embed = llm.embed

    def forward(self, x, mask=None, cache=None, recompute=0, last=None):
        return self.hidden[0](x, mask, cache, recompute, last)

    def logits(self, hidden):
        return self.hidden[0].logits(hidden)

    def generate(self, x, max_new_tokens, mask=None, eos_id=None, reread=False):
        return self.hidden[0].generate(x, max_new_tokens, mask, eos_id, reread)


def test_four_things_of_an_llm_will_do(net, tmp_path):
    other = make(FourThings(net.llm), net.task.name)
    batch = rows(net.task, range(5))
    assert torch.equal(other.loss(batch), net.loss(batch)) and other.answer(batch) == net.answer(batch)
    assert torch.equal(label_logprobs(other, batch), label_logprobs(net, batch))
    save_adapter(tmp_path / "a.safetensors", other)
    again = load_adapter(tmp_path / "a.safetensors", FourThings(net.llm), other.tokenizer, other.task)
    assert again.answer(batch) == net.answer(batch)


def test_what_does_not_fit_together_is_refused(tiny):
    tokenizer = ByteTokenizer()
    wide, fitting = (MSEAdapter(AdapterConfig(width, AUDIO, VIDEO, 6, 4, 3)) for width in (40, 36))
    with pytest.raises(ValueError, match="width 36 .* width 40"):
        MultimodalLLM(tiny["llama"], wide, tokenizer, TASKS["meld"])
    tokenizer.size = 272
    with pytest.raises(ValueError, match="271 embeddings, .* 272 ids"):
        MultimodalLLM(tiny["llama"], fitting, tokenizer, TASKS["meld"])


# ---------------------------------------------------------------------------------------------------------
# Training


def test_training_changes_the_adapter_alone(net):
    llm, batch = net.llm, rows(net.task, range(5))
    prompt = llm.embed(torch.tensor([net.tokenizer.encode("Once upon a time")]))
    before = {name: p.clone() for name, p in llm.state_dict().items()}
    start = {name: p.clone() for name, p in net.adapter.state_dict().items()}
    hidden, text = llm(prompt), llm.generate(prompt, 12)
    trains = {name for name, p in net.named_parameters() if p.requires_grad}
    assert trains == {f"adapter.{name}" for name in start}
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-2)    # handed the backbone too: it has no gradient
    losses = []
    for _ in range(4):
        losses.append(net.loss(batch, recompute=2))
        optimizer.zero_grad()
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < losses[0] and all(p.grad is None for p in llm.parameters())
    assert not any(torch.equal(p, start[name]) for name, p in net.adapter.state_dict().items())
    assert all(torch.equal(p, before[name]) for name, p in llm.state_dict().items())
    assert torch.equal(llm(prompt), hidden) and torch.equal(llm.generate(prompt, 12), text)


def test_recomputation_does_not_change_the_gradients(net):
    batch, parameters = rows(net.task, range(5)), list(net.adapter.parameters())
    plain = torch.autograd.grad(net.loss(batch), parameters)
    for n in (1, 3):
        found = torch.autograd.grad(net.loss(batch, recompute=n), parameters)
        assert all(torch.equal(a, b) for a, b in zip(found, plain))


@pytest.mark.parametrize("family", TINY)
@pytest.mark.parametrize("name, recompute", [
    ("embed.weight", 0), ("blocks.0.attn.qkv.weight", 0), ("blocks.1.mlp.gate_up.weight", 1)])
def test_a_backbone_that_trains_gets_the_right_gradients(tiny64, family, name, recompute):
    net = make(copy.deepcopy(tiny64[family]), "meld")
    batch, weight = rows(net.task, range(2)), net.llm.get_parameter(name)
    weight.requires_grad_()
    for _ in range(2):
        (gradient,) = torch.autograd.grad(net.loss(batch, recompute), weight)
        (expected,) = torch.autograd.grad(slow_loss(net, batch), weight)
        near(gradient, expected, 1e-5)
        with torch.no_grad():
            weight += recipe("step", weight.shape, 0.1)     # as an optimizer's
        near(net.loss(batch, recompute), slow_loss(net, batch), 1e-5)


# ---------------------------------------------------------------------------------------------------------
# Files


@pytest.fixture
def saved(tiny, tmp_path):
    """A saved adapter: its net and its file."""
    net = make(tiny["llama"], "meld")
    save_adapter(tmp_path / "adapter.safetensors", net)
    return net, tmp_path / "adapter.safetensors"


@pytest.mark.parametrize("official", [False, True])
def test_round_trip(tiny, official, tmp_path):
    for family, task in PAIRS:
        net, file = make(tiny[family], task, official), tmp_path / f"{family}.safetensors"
        save_adapter(file, net)
        again = load_adapter(file, net.llm, net.tokenizer, net.task, official)
        tensors, batch = net.adapter.state_dict(), rows(net.task, range(5))
        assert all(torch.equal(p, tensors[name]) for name, p in again.adapter.state_dict().items())
        assert again.adapter.config == net.adapter.config and again.official == official
        assert torch.equal(again.loss(batch), net.loss(batch)) and again.answer(batch) == net.answer(batch)


def refused(net, file, *words, llm=None, task="meld", official=False):
    with pytest.raises(ValueError) as error:
        load_adapter(file, llm or net.llm, net.tokenizer, TASKS[task], official)
    for word in [file.name, *words]:
        assert word in str(error.value), f"{word!r} is not in: {error.value}"


def test_another_backbone_task_or_mode_is_refused(saved, tiny, tmp_path):
    net, file = saved
    tensors = published_tensors(TINY["llama"], "twin.")
    twin = load_llm(write_checkpoint(tmp_path / "twin", TINY["llama"], tensors))
    refused(net, file, "backbone", net.llm.fingerprint, twin.fingerprint, llm=twin)
    refused(net, file, "backbone", "llama", "chatglm", llm=tiny["chatglm"])
    refused(net, file, "task", "'meld'", "'cherma'", task="cherma")
    refused(net, file, "mode", "'default'", "'official'", official=True)


@pytest.mark.parametrize("damage, words", [
    (lambda t: t.pop("project.bias"), ["Missing", "project.bias"]),
    (lambda t: t.update({"project.extra": torch.ones(1)}), ["Unexpected", "project.extra"]),
    (lambda t: t.update({"project.bias": torch.ones(35)}), ["project.bias", "[35]", "[36]"]),
    (lambda t: t["project.bias"].add_(1e-3), ["sha256"]),
], ids=["missing", "extra", "misshapen", "changed"])
def test_other_tensors_are_refused(saved, damage, words):
    net, file = saved
    tensors = load_file(file)
    with safe_open(file, "pt") as opened:
        meta = opened.metadata()
    damage(tensors)
    save_file(tensors, file, metadata=meta)
    refused(net, file, *words)


@pytest.mark.parametrize("change", [
    {"format": ["x"] * 999}, {"task": {"a": 1}}, {"backbone": "\ud800"}, {"sha256": None}, {"config": None},
    {"config": [1]}, {"config": {}}], ids=lambda change: str(change)[:30])
def test_other_metadata_is_refused(saved, change):
    refused_with(saved, change)


@pytest.mark.parametrize("change", [
    {"x" * 9999: 1}, {"dim": "36"}, {"dim": 10**9}, {"audio_hidden": 10**12}, {"pseudo_tokens": 1e400},
    {"modality": []}], ids=lambda change: str(change)[:30])
def test_other_sizes_are_refused(saved, change):
    refused_with(saved, {"config": asdict(saved[0].adapter.config) | change})


def refused_with(saved, change):
    """A file with other metadata is refused in one short sentence."""
    net, file = saved
    with safe_open(file, "pt") as opened:
        meta = json.loads(opened.metadata()["mse-adapter"])
    save_file(load_file(file), file, metadata={"mse-adapter": json.dumps(meta | change)})
    with pytest.raises(ValueError) as error:
        load_adapter(file, net.llm, net.tokenizer, net.task)
    assert file.name in str(error.value) and "\n" not in str(error.value) and len(str(error.value)) < 999


def test_other_files_are_refused(saved):
    net, file = saved
    tensors = load_file(file)
    save_file(tensors, file)
    refused(net, file, "not a saved adapter")
    for meta, words in (("{}", "format is None"), ("not JSON", "not a saved adapter"), ("5", "not a saved adapter"),
                        ("[" * 100_000, "not a saved adapter"), ("null", "not a saved adapter"),
                        ('{"format": "mse-adapter 0"}', "format is 'mse-adapter 0'")):
        save_file(tensors, file, metadata={"mse-adapter": meta})
        refused(net, file, words)
    for content in (b"", b"not one", file.read_bytes()[:-9]):
        file.write_bytes(content)
        refused(net, file, "not a saved adapter")
    file.unlink()
    refused(net, file)


# ---------------------------------------------------------------------------------------------------------
# A backbone that the release does not know


class OtherTokens(ByteTokenizer):
    """Its special tokens are its own, as tokenizer_config.json names them."""
    special = ["<begin>", "<end>"]
    names = {"bos": "<begin>", "eos": "<end>", "pad": None}

    def token_id(self, name: str) -> int:
        if name not in self.special:
            raise DataError(f"no token {name}")
        return super().token_id(name)


def test_special_tokens_come_from_the_checkpoint_where_the_release_has_other_ones(tiny):
    words, tokenizer = TASKS["meld"].wording("llama"), OtherTokens()
    assert words.special_ids(tokenizer) == ([0], 1, 1)
    tokenizer.names = {"bos": None, "eos": "<end>", "pad": "<begin>"}
    assert words.special_ids(tokenizer) == ([], 1, 0)
    assert TASKS["meld"].wording("mistral").prompt == words.prompt      # it is spoken to as LLaMA2
    tokenizer.names = {"bos": None, "eos": None, "pad": None}
    with pytest.raises(DataError, match="no token"):
        words.special_ids(tokenizer)
