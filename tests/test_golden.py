"""Official mode against recorded runs of the authors' release, number by number.

A pair golden/FAMILY-DATASET-a.{json,safetensors} holds what the release (github AZYoung233/MSE-Adapter, transformers
4.36.1, fp32 on a CPU) computed for four rows on a tiny random LLM: outputs and what cannot be re-made. Every weight and
feature comes from the recipe in conftest.py. A stand-in tokenizer replays the recorded token ids, so all of this runs
anywhere; the real tokenizers, where they are at hand, are held to the same ids.
"""
import json
import re
import shutil

import pytest
import torch
from conftest import HERE, Bomb, close, need_shared, published_tensors, random_adapter, recipe, write_checkpoint
from safetensors.torch import load_file

from adapter import AdapterConfig, MultimodalLLM
from data import TASKS, Batch, load_tokenizer, preset
from model import load_llm
from release import OFFICIAL_NAMES, load_official
from train import learning_rate, make_optimizer, train_step

pytestmark = pytest.mark.release
GOLDEN = HERE / "golden"
SPECIAL = {
    "llama2": {"<unk>": 0, "<s>": 1, "</s>": 2},
    "qwen": {"<|endoftext|>": 151643, "<|im_start|>": 151644},
    "chatglm3": {"<unk>": 0, "</s>": 2, "[gMASK]": 64790, "sop": 64792},
}
CONVOLUTION = "mutli_scale_fusion.integrating.Integrating_layer.0.weight"   # the one shape that differs


class Replay:
    """A tokenizer that knows exactly the texts that a golden file records."""
    size = 0

    def __init__(self, info: dict, out: dict):
        self.special = SPECIAL[info["family"]]
        before = [i for i in info["before_ids"] if i not in self.special.values()]  # <s>, [gMASK] sop stand in front
        close_tag = "</" + info["before_text"].rpartition("<")[2]                   # "<多模态>" -> "</多模态>"
        text = [ids[mask > 0].tolist() for ids, mask in zip(out["text_ids"], out["text_mask"])]
        self.label = out["label_ids"].tolist()
        self.ids = {info["before_text"]: before, close_tag: info["after_ids"],
                    info["task_prompt"]: info["task_prompt_ids"],
                    **dict(zip(info["texts"], text)), **dict(zip(info["label_text"], self.label))}
        self.text = {tuple(ids): text for ids, text in zip(info["generated_ids"], info["generated_text"])}

    def encode(self, text: str) -> list[int]:
        if text not in self.ids and re.fullmatch(r"[+-]?\d(\.\d)?", text):
            return [-1] * len(self.label[0])                # another label: as long as those recorded, and of no use
        return self.ids[text]

    def decode(self, ids: list[int]) -> str:
        return self.text[tuple(ids)]

    def token_id(self, name: str) -> int:
        return self.special[name]


class Golden:
    """One pair: .info is the json, .out the safetensors."""

    def __init__(self, name: str, backbone):
        self.info = json.loads((GOLDEN / f"{name}.json").read_text(encoding="utf-8"))
        self.out = load_file(GOLDEN / f"{name}.safetensors")
        self.llm, self.task = backbone(self.info["family"]), TASKS[self.info["dataset"]]
        self.config = AdapterConfig(self.llm.config.dim, *(self.info[key] for key in (
            "audio_dim", "video_dim", "audio_hidden", "video_hidden", "pseudo_tokens")))
        _, La, Lv = self.info["seq_lens"]
        features = {}
        for kind, L in (("audio", La), ("video", Lv)):
            features[kind] = recipe(f"{self.info['tag']}.{kind}", (4, L, self.info[f"{kind}_dim"]), 1.0)
            for x, length in zip(features[kind], self.out[f"{kind}_len"]):
                x[length:] = 0
        self.batch = Batch(self.info["texts"], features["audio"], self.out["audio_len"], features["video"],
                           self.out["video_len"], self.info["labels"])

    def net(self, tokenizer=None) -> MultimodalLLM:
        tokenizer = tokenizer or Replay(self.info, self.out)
        return MultimodalLLM(self.llm, random_adapter(self.config), tokenizer, self.task, official=True)


@pytest.fixture(scope="session")
def backbone(tmp_path_factory):
    """family -> the golden files' tiny LLM of it, made at the first use."""
    made = {}

    def get(family: str):
        if family not in made:
            raw = json.loads((GOLDEN / "config" / f"{family}.json").read_text())
            folder = write_checkpoint(tmp_path_factory.mktemp(family), raw, published_tensors(raw, f"{family}."))
            made[family] = load_llm(folder)
            shutil.rmtree(folder)                               # up to 120 MB: the vocabularies have their real size
        return made[family]

    return get


@pytest.fixture(scope="module", params=sorted(path.stem for path in GOLDEN.glob("*.json")))
def golden(request, backbone) -> Golden:
    return Golden(request.param, backbone)


def test_the_row_is_worded_as_in_the_release(golden):
    net, info, out = golden.net(), golden.info, golden.out
    assert net.before == info["bos_ids"] + info["before_ids"]
    assert net.after == info["after_ids"] + info["task_prompt_ids"]
    assert [net.label_text(y) for y in info["labels"]] == info["label_text"]
    assert net.answer_len == info["max_new_tokens"]
    x, real, pseudo = net.rows(golden.batch, out["label_ids"].tolist())
    before, after = (torch.tensor(ids).expand(4, -1) for ids in (net.before, net.after))
    before, *behind = [golden.llm.embed(ids) for ids in (before, out["text_ids"], after, out["label_ids"])]
    assert real.all() and torch.equal(x, torch.cat((before, pseudo, *behind), dim=1))


EN_CLASS = "Please recognize the emotion of the above multimodal content from the"
MELD = "<neutral:0, surprise:1, fear:2, sadness:3, joy:4, disgust:5, anger:6>"
CHERMA = "请选择适用于上述多模态内容的情绪标签：<愤怒:0, 厌恶:1, 恐惧:2, 高兴:3, 平静:4, 悲伤:5, 惊奇:6>。"
EN_RANGE = "Please predict the sentiment intensity of the above multimodal content in the range"
ZH_RANGE = "请对上述多模态内容的情感强度进行预测，范围在"
SPACES = " " * 45
OFFICIAL_PROMPTS = {
    ("llama", "meld"): f"{EN_CLASS}{SPACES}target set {MELD}. Assistant: The emotion is",
    ("llama", "cherma"): f"{CHERMA}助手: 情绪为",
    ("llama", "mosei"): f"{EN_RANGE} [-3.0, +3.0]. Assistant: The sentiment is",
    ("llama", "simsv2"): f"{ZH_RANGE}[-1.0, 1.0]之间。响应: 情感为",
    ("qwen", "meld"): f"{EN_CLASS}{SPACES}target set {MELD}. Assistant: The emotion is",
    ("qwen", "cherma"): f"{CHERMA}助手: 情绪为",
    ("qwen", "mosei"): f"{EN_RANGE} [-3.0, +3.0]. Assistant: The sentiment is",
    ("qwen", "simsv2"): f"{ZH_RANGE}[-1.0, +1.0]之间。响应: 情感为",
    ("chatglm", "meld"): f"{EN_CLASS} target{SPACES}    set {MELD}. response: The emotion is",
    ("chatglm", "cherma"): f"{CHERMA}响应: 情绪为",
    ("chatglm", "mosei"): f"{EN_RANGE} [-3.0, 3.0]. response: The sentiment is",
    ("chatglm", "simsv2"): f"{ZH_RANGE}[-1.0, 1.0]之间。响应: 情感为",
}


@pytest.mark.parametrize("family, task", OFFICIAL_PROMPTS, ids="-".join)
def test_the_twelve_prompts(family, task):
    wording, prompt = TASKS[task].wording, OFFICIAL_PROMPTS[family, task]
    assert wording(family, official=True).prompt == prompt
    assert wording(family).prompt == re.sub(" {2,}", " ", prompt)
    lead = "" if family != "chatglm" else "{question}\n\n " if task in ("meld", "mosei") else "{问题}\n\n "
    assert wording(family).open == lead + ("<Multimodal>" if task in ("meld", "mosei") else "<多模态>")
    if task == "mosei":
        assert TASKS["mosi"].wording(family, official=True)[:6] == wording(family, official=True)[:6]


def test_the_prompt_of_iemocap_is_its_own_for_qwen():
    wording = TASKS["iemocap"].wording
    classes = "<hap: 0, sad: 1, neu: 2, ang: 3, exc: 4, fru: 5>"
    prompt = f"{EN_CLASS} label{SPACES}    set {classes}. Assistant: The emotion is"
    assert wording("qwen", official=True).prompt == wording("qwen3", official=True).prompt == prompt
    ours = f"{EN_CLASS} target set {classes.replace(': ', ':')}. Assistant: The emotion is"
    assert wording("qwen").prompt == wording("llama", official=True).prompt == ours
    assert preset("iemocap", "qwen") == (5e-4, 4, 30, 4, 32, 32)
    sims, simsv2 = TASKS["sims"], TASKS["simsv2"]
    for family in ("llama", "qwen", "chatglm"):
        assert sims.wording(family, official=True)[:6] == simsv2.wording(family, official=True)[:6]
        assert preset("sims", family) == preset("simsv2", family)


def test_token_ids_of_the_real_tokenizers(golden):
    tokenizer = load_tokenizer(need_shared("tokenizers", golden.info["family"]))
    replay = Replay(golden.info, golden.out)
    assert {text: tokenizer.encode(text) for text in replay.ids} == replay.ids
    assert {name: tokenizer.token_id(name) for name in replay.special} == replay.special
    assert [tokenizer.decode(ids) for ids in golden.info["generated_ids"]] == golden.info["generated_text"]
    net, recorded = golden.net(tokenizer), golden.net()
    assert (net.before, net.after, net.answer_len) == (recorded.before, recorded.after, golden.info["max_new_tokens"])


def test_parameters(golden):
    net = golden.net()
    ours = {OFFICIAL_NAMES[name]: list(p.shape) for name, p in net.adapter.named_parameters()}
    assert ours[CONVOLUTION] == [1, 3]
    ours[CONVOLUTION] = [1, 1, 1, 3]
    assert ours == golden.info["parameters"]
    assert sum(p.numel() for p in net.parameters() if p.requires_grad) == golden.info["trainable"]
    row = preset(golden.task, golden.llm.config.family)
    assert row == tuple(golden.info[key] for key in (
        "learning_rate", "batch_size", "warm_up_epochs", "pseudo_tokens", "audio_hidden", "video_hidden"))


def test_forward(golden):
    net, out, seen = golden.net(), golden.out, {}
    for name, part in dict(audio_h=net.adapter.audio, video_h=net.adapter.video, mixed=net.adapter.mixer).items():
        part.register_forward_hook(lambda part, inputs, output, name=name: seen.update({name: output}))
    with torch.no_grad():
        close(net.pseudo_tokens(golden.batch), out["pseudo_tokens"])
        for name, tensor in seen.items():
            close(tensor, out[name])
        x, real, _ = net.rows(golden.batch, out["label_ids"].tolist())
        hidden = golden.llm(x, real)[:, -out["label_ids"].size(1) - 1:-1]
        logprob = golden.llm.logits(hidden).log_softmax(dim=-1)
    close(logprob.gather(-1, out["label_ids"][..., None])[..., 0], out["label_logprob"], 1e-4)
    close(logprob.gather(-1, out["top_ids"]), out["top_logprob"], 1e-4)
    assert seen.keys() == {"audio_h", "video_h", "mixed"}


def test_loss_and_gradients(golden):
    net, out = golden.net(), golden.out
    loss = net.loss(golden.batch)
    close(loss.detach(), out["loss"][0])
    loss.backward()
    norms = {name: out[f"grad_norm.{theirs}"].item() for name, theirs in OFFICIAL_NAMES.items()}
    for name, p in net.adapter.named_parameters():
        tolerance = min(2e-3 * norms[name], 1e-4 * max(norms.values()))
        head, theirs = p.grad.flatten()[:64], out[f"grad_head.{OFFICIAL_NAMES[name]}"]
        assert abs(p.grad.norm().item() - norms[name]) < tolerance and (head - theirs).norm() < tolerance, name


def test_answers(golden):
    net = golden.net()
    if not net.reread:                  # plain decoding, but for ChatGLM3
        x, _, _ = net.rows(golden.batch)
        ids = golden.llm.generate(x, net.answer_len, eos_id=net.eos_id)
        assert ids.tolist() == golden.info["generated_ids"]
    assert net.answer(golden.batch) == golden.info["generated_text"]


def train(net, batch, rates):
    """The losses of train.py's steps on one batch, one step per learning rate."""
    optimizer, scaler, losses = make_optimizer(net), torch.amp.GradScaler("cpu", enabled=False), []
    for rate in rates:
        optimizer.param_groups[0]["lr"] = rate
        losses.append(train_step(net, optimizer, scaler, batch))
    return torch.stack(losses)


def test_twenty_training_steps(golden):
    net, out, peak = golden.net(), golden.out, golden.info["learning_rate"]
    rates = [learning_rate(step, 40, 0.1, peak) for step in range(20)]
    close(torch.tensor(rates, dtype=torch.float64), out["train_lrs"], 1e-12)
    close(train(net, golden.batch, rates).double(), out["train_losses"], 1e-4)
    for name, p in net.adapter.named_parameters():
        close(p.norm().detach(), out[f"after20_norm.{OFFICIAL_NAMES[name]}"].squeeze(), 1e-3)


# ---------------------------------------------------------------------------------------------------------------------
# The release's own files


@pytest.fixture(scope="module")
def release(backbone):
    """The tensors of a .pth of the release, and the config and the state dict of the adapter that they make."""
    golden = Golden("llama2-meld-a", backbone)
    tensors = {name: recipe(f"adapter.{name}", shape, 0.15 if len(shape) > 1 else 0.05)
               for name, shape in golden.info["parameters"].items()}
    return tensors, golden.config, random_adapter(golden.config).state_dict()


@pytest.mark.parametrize("prefix", ["", "Model."])
def test_load_official(release, prefix, tmp_path):
    tensors, config, ours = release
    state = {prefix + name: tensor for name, tensor in tensors.items()}
    state[prefix + "LLM.model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(8)      # a buffer of the frozen LLM
    torch.save(state, tmp_path / "a.pth")
    loaded = load_official(tmp_path / "a.pth", config).state_dict()
    assert loaded.keys() == ours.keys() and all(torch.equal(loaded[name], ours[name]) for name in ours)


@pytest.mark.parametrize("damage, words", [
    (lambda t: t.pop("text_guide_mixer.text_mlp.bias"), ["Missing", "mixer.text.bias"]),
    (lambda t: t.update({"Model.extra.weight": torch.ones(2)}), ["Unexpected", "extra.weight"]),
    (lambda t: t.update({"audio_LSTM.linear.bias": torch.ones(255)}), ["audio.linear.bias", "[255]", "[256]"]),
    (lambda t: t.update({CONVOLUTION: torch.ones(4)}), ["fusion.join.weight", "[4]", "[1, 3]"]),
    (lambda t: t.update({"audio_LSTM.linear.bias": "text"}), ["state dict of tensors"]),
], ids=["missing", "extra", "misshapen", "misshapen convolution", "no tensor"])
def test_load_official_refuses_other_tensors(release, damage, words, tmp_path):
    tensors, config, _ = release
    tensors = dict(tensors)
    damage(tensors)
    torch.save(tensors, tmp_path / "a.pth")
    with pytest.raises(ValueError) as error:
        load_official(tmp_path / "a.pth", config)
    assert all(word in str(error.value) for word in ["a.pth", *words])


def test_load_official_refuses_other_files(release, tmp_path):
    tensors, config, _ = release
    torch.save({**tensors, "code": Bomb(tmp_path / "exploded")}, tmp_path / "code.pth")
    torch.save(list(tensors.values()), tmp_path / "list.pth")
    torch.save({1: torch.ones(1)}, tmp_path / "numbered.pth")
    (tmp_path / "text.pth").write_text("no tensors here")
    for name in ("code.pth", "list.pth", "numbered.pth", "text.pth", "absent.pth"):
        with pytest.raises(ValueError, match=name):
            load_official(tmp_path / name, config)
    assert not (tmp_path / "exploded").exists()
