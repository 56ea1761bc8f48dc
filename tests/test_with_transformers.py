"""demo/with_transformers.py: a model of transformers gives what ours gives, and every family can be a backbone."""
import json
import sys
from pathlib import Path

import pytest
import torch
from torch.nn.utils import parameters_to_vector

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "demo")]

transformers = pytest.importorskip("transformers")

import eval  # noqa: E402
import train  # noqa: E402
import with_transformers as wt  # noqa: E402
from adapter import AdapterConfig, MultimodalLLM  # noqa: E402
from conftest import flags, near, random_adapter, recipe  # noqa: E402
from data import TASKS, collate, load_split, load_tokenizer  # noqa: E402
from model import CheckpointError, KVCache, load_llm  # noqa: E402
from support.files import DataError, UserError  # noqa: E402

DEMO = TASKS["demo"]
NAMES = {"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>"}


def byte_tokenizer():
    """Each byte is a token; one special token more than there are embeddings, as in Gemma 3."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: i for i, token in enumerate([*NAMES.values(), *letters])}
    inner = Tokenizer(models.BPE(vocab, []))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    inner.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 0)])
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=inner, **NAMES)
    tokenizer.add_tokens("<picture>", special_tokens=True)
    tokenizer.add_tokens("<h1>")
    return tokenizer


@pytest.fixture(scope="module")
def gemma(tmp_path_factory):
    """A folder with a small Gemma 2: scaled embeddings, a soft cap on its scores, blocks that see 4 tokens back, and
    a dropout that must stay off."""
    folder = tmp_path_factory.mktemp("gemma")
    config = transformers.Gemma2Config(
        hidden_size=36, num_hidden_layers=3, num_attention_heads=6, num_key_value_heads=2, head_dim=10, vocab_size=260,
        intermediate_size=34, max_position_embeddings=300, sliding_window=4, final_logit_softcapping=3.0,
        attention_dropout=0.5, bos_token_id=0, eos_token_id=1, pad_token_id=2)
    model = transformers.Gemma2ForCausalLM(config)
    save(model, folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


def save(model, folder):
    """With the recipe's weights."""
    for name, p in model.named_parameters():
        p.data = recipe(f"transformers.{name}", p.shape, 0.3)
    model.save_pretrained(folder)


def save_gpt2(folder):
    sizes = dict(n_embd=36, n_layer=3, n_head=6, n_positions=40, vocab_size=260, bos_token_id=0, eos_token_id=1)
    save(transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes)), folder)


def read_rows(llm, tokenizer, recompute: int) -> tuple:
    """Loss, the adapter's gradients, answers and the labels' log-probabilities of four rows of the demo."""
    batch = collate(load_split(DEMO, ROOT / DEMO.home, "train"), range(4))
    adapter = random_adapter(AdapterConfig(llm.config.dim, DEMO.audio_dim, DEMO.video_dim, 5, 3, pseudo_tokens=4))
    net = MultimodalLLM(llm, adapter, tokenizer, DEMO).train()
    loss = net.loss(batch, recompute)
    loss.backward()
    gradients = parameters_to_vector([p.grad for p in adapter.parameters()])
    return loss.detach(), gradients, eval.label_logprobs(net, batch), net.answer(batch)


def test_equals_our_transformer():
    tokenizer = load_tokenizer(DEMO.llm)
    ours, theirs = load_llm(DEMO.llm), wt.load_llm(DEMO.llm)
    for name in wt.Sizes.__dataclass_fields__:
        assert getattr(ours.config, name) == getattr(theirs.config, name)
    *numbers, answers = read_rows(ours, tokenizer, 0)
    for recompute in (0, 2):
        *their_numbers, their_answers = read_rows(theirs, tokenizer, recompute)
        for mine, other in zip(numbers, their_numbers):
            near(other, mine, 1e-5)
        assert their_answers == answers
        assert theirs.recomputed == recompute


@pytest.mark.parametrize("kind", ["gemma", "gpt2"])
def test_padding_cache_and_recomputation_change_nothing(kind, gemma, tmp_path):
    folder = gemma
    if kind == "gpt2":                                          # it has an embedding for each position
        folder = tmp_path
        save_gpt2(folder)
    llm = wt.load_llm(folder)
    assert wt.load_llm(folder, dtype=torch.bfloat16).embed.weight.dtype == torch.bfloat16
    model = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    ids = torch.arange(27).view(3, 9) + 50
    real = torch.arange(9) >= torch.tensor([[0], [3], [7]])
    x = llm.embed(ids).requires_grad_()
    whole = llm.train()(x, real)
    for row, first in enumerate((0, 3, 7)):                     # a soft cap is in it, no dropout is
        near(llm.logits(whole[row, first:]), model(ids[row:row + 1, first:]).logits[0].detach(), 1e-5)
        alone = llm.generate(llm.embed(ids[row:row + 1, first:]), 6)
        assert torch.equal(llm.generate(x, 6, real)[row:row + 1], alone)

    with torch.no_grad():
        cache = KVCache(llm.config.n_layer)
        llm(x[:, :4], real[:, :4], cache)
        for _ in range(2):                                      # twice behind the same beginning
            longer = cache.copy()
            steps = [llm(x[:, i:i + 1], real[:, i:i + 1], longer) for i in range(4, 9)]
            near(torch.cat(steps, dim=1)[real[:, 4:]], whole[:, 4:][real[:, 4:]], 1e-5)

    near(llm(x, real, last=2), whole[:, -2:], 1e-6)
    calls = []                                                  # the blocks, each time that one begins
    for n, block in enumerate(llm.blocks):
        block.mlp.register_forward_pre_hook(lambda *_, n=n: calls.append(n))
    gradients = []
    for recompute in (0, 2, 2):
        target = llm(x, real, recompute=recompute, last=2).logsumexp(-1).sum()
        gradients += torch.autograd.grad(target, x)
    assert calls == [0, 1, 2] + 2 * [0, 1, 2, 1, 0] and llm.recomputed == 2
    near(gradients[1], gradients[0])
    assert gradients[0][real].any(dim=-1).all() and not gradients[0][~real].any()


def run_program(monkeypatch, capsys, *arguments) -> str:
    """What the script prints for these arguments. train.py and eval.py are what they were when the test ends."""
    loaders = [(program, f"load_{what}") for program in (train, eval) for what in ("llm", "tokenizer")]
    for program, name in ((train, "Config"), (eval, "CODE"), *loaders):
        monkeypatch.setattr(program, name, getattr(program, name))
    monkeypatch.setattr(sys, "argv", ["with_transformers.py", *map(str, arguments)])
    wt.main()
    return capsys.readouterr().out


def test_a_run_is_evaluated_to_the_same_line(gemma, data, tmp_path, monkeypatch, capsys):
    threads = torch.get_num_threads()
    short = flags(data, tmp_path, "--llm", str(gemma), "--epochs", "1", "--train-share", "0.4")
    run_program(monkeypatch, capsys, "train", *short)
    run = tmp_path / "1111"
    line = json.loads((run / "results.json").read_text())["line"]
    settings = json.loads((run / "settings.json").read_text())
    assert settings["llm_sha256"].endswith(" in transformers")
    assert "demo/with_transformers.py" in settings["code"]              # an edit of it is noticed
    assert f"): {line}\n" in run_program(monkeypatch, capsys, "eval", run, "--decode", "greedy")
    assert run_program(monkeypatch, capsys, "eval", run, "--check-backbone").startswith("backbone unchanged")
    torch.set_num_threads(threads)

    # Another model of the same sizes is none for this adapter.
    other = tmp_path / "other"
    model = transformers.AutoModelForCausalLM.from_pretrained(gemma)
    model.model.layers[1].mlp.up_proj.weight.data[3, 5] += 1
    model.save_pretrained(other)
    byte_tokenizer().save_pretrained(other)
    with pytest.raises(wt.AdapterError, match="the adapter's backbone is 'gemma2, 3 layers, width 36"):
        run_program(monkeypatch, capsys, "eval", run, "--llm", other)


def test_sizes(gemma, tmp_path):
    assert wt.Sizes.from_dir(gemma) == wt.Sizes("gemma2", 36, 3, 6, 10, 34, 260, 300)
    save_gpt2(tmp_path)
    assert wt.Sizes.from_dir(tmp_path) == wt.Sizes("gpt2", 36, 3, 6, 6, 144, 260, 40)


def test_tokenizer(gemma):
    tokenizer = wt.Tokenizer(gemma)
    assert tokenizer.encode("") == []
    assert len(tokenizer.encode("<eos>é")) == 5 + 2             # read as plain text, nothing in front
    assert tokenizer.encode("\ud800") == tokenizer.encode("\ufffd")
    text = " I'm fine , <eos>\n<picture> 你好"
    assert tokenizer.decode([0, 2, *tokenizer.encode(text), 1]) == text
    assert tokenizer.size == 259 and len(tokenizer.inner) > tokenizer.size
    # The tokenizer's own tokens: "<h1>" is none of them, nor are LLaMA's names.
    assert tokenizer.names == {"bos": "<bos>", "eos": "<eos>", "pad": "<pad>"}
    assert DEMO.wording("gemma2").special_ids(tokenizer) == ([0], 1, 2)
    with pytest.raises(DataError, match="no special token '<h1>', only .*<bos>"):
        tokenizer.token_id("<h1>")


def test_tokens_are_those_of_our_tokenizer():
    pytest.importorskip("google.protobuf", reason="transformers reads tokenizer.model with protobuf")
    ours, theirs = load_tokenizer(DEMO.llm), wt.Tokenizer(DEMO.llm)
    for text in [*load_split(DEMO, ROOT / DEMO.home, "valid").text, "</Multimodal>", "<s>2</s>", "é 你好 🙂", "0.4"]:
        ids = ours.encode(text)
        assert theirs.encode(text) == ids and theirs.decode(ids) == ours.decode(ids)
    assert theirs.size == ours.size and DEMO.wording("llama").special_ids(theirs) == ([1], 2, 0)


def test_refusals(gemma, tmp_path, monkeypatch):
    with pytest.raises(UserError, match="quantised on disk"):
        wt.load_llm(gemma, dtype=torch.int8)
    llm = wt.load_llm(gemma)
    with pytest.raises(CheckpointError, match="a row has 301 positions, .* for 300"):
        llm(torch.zeros(1, 301, 36))
    with pytest.raises(CheckpointError, match="cannot use it"):
        wt.Tokenizer(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "unheard"}')
    with pytest.raises(CheckpointError, match="unheard"):
        wt.Sizes.from_dir(tmp_path)
    # A model without its head: transformers would make one up.
    raw = json.loads((gemma / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(raw | {"tie_word_embeddings": False}))
    llm.model.model.save_pretrained(tmp_path / "body")
    (tmp_path / "body" / "model.safetensors").rename(tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"without \['lm_head.weight'\]"):
        wt.load_llm(tmp_path)
    monkeypatch.setattr(sys, "argv", ["with_transformers.py", "evaluate"])
    with pytest.raises(UserError, match="train ..., or"):
        wt.main()
