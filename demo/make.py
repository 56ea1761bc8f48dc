"""Make everything in this folder anew: a tiny language model and a tiny data set, from templates and a seed.

    python demo/make.py             # CPU, a few minutes

    demo_{train,valid,test}.pkl     rows in MELD's published format; 40 x 6 audio and 24 x 8 video at most
    llm/                            a LLaMA of 0.8M parameters with its tokenizer, in Hugging Face layout

An emotion is an arousal and a valence: joy is high and +, anger high and -, sadness low and -, calm low
and +. The text of a row settles both, one, or none of the two. What it leaves open is told by the voice
(arousal: energy and pitch climb through the clip, or sink) and by the face (valence: at some moment it
smiles, or frowns). What the text does settle, voice and face show at random, so they must be ignored there,
and only the text tells where.

    words   both        "My brother repaired my radio today, I could hug everyone!"; voice and face random
    voice   valence     "My boss forgot my birthday yesterday."; voice: anger or sadness; face random
    face    arousal     "Stop everything and look at this letter from Anna!"; face: joy or anger; voice random
    both    neither     "My sister put the lamp on the shelf today."; voice and face together
"""
import io
import json
import pickle
import random
import re
import sys
from pathlib import Path

import numpy as np
import sentencepiece
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from tqdm import tqdm

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
from data import TASKS, load_tokenizer  # noqa: E402
from model import LLM, Config, sources  # noqa: E402

SEED = 2502
TASK = TASKS["demo"]
AROUSAL = {"joy": 1, "anger": 1, "sadness": -1, "calm": -1}
VALENCE = {"joy": 1, "anger": -1, "sadness": -1, "calm": 1}

# --- Words --------------------------------------------------------------------------------------------------
SLOTS = {       # {slot} in a line stands for any of these; they may hold slots themselves
    "who":
        "Anna|Tom|Maria|Peter|my sister|my brother|my neighbor|our teacher|the landlord|my boss|"
        "my cousin|the doctor",
    "thing":
        "key|lamp|letter|bicycle|camera|ticket|radio|garden chair|blue coat|phone|suitcase|umbrella|"
        "guitar|book|clock",
    "place":
        "on the table|in the kitchen|by the door|on the shelf|in the car|at the office|"
        "under the stairs|next to the bed",
    "when":
        "this morning|yesterday|last night|on Monday|after lunch|at noon|before work|in the evening|"
        "today|on Friday",
    "plain":
        "{who} put the {thing} {place} {when}|the {thing} is still {place}|"
        "{who} asked about the {thing} {when}|{who} has the {thing}, it was {place}|"
        "we talked about the {thing} {when}|{who} came for the {thing} {when}|"
        "I saw {who} with the {thing} {when}|there is a note about the {thing} {place}",
    "good":
        "{who} won first prize {when}|the train was early {when}|"
        "we won the match against {who} {when}|{who} praised my work {when}|"
        "the soup tasted delicious {when}|{who} found my lost {thing} {place}|"
        "{who} invited us to a picnic {when}|I passed the test, {who} told me {when}|"
        "the surgery of {who} went well {when}|{who} repaired my {thing} {when}|"
        "{who} came back healthy {when}|{who} gave me a pretty {thing} {when}",
    "bad":
        "{who} crashed into a tree {when}|the train was cancelled {when}|"
        "we lost the match against {who} {when}|{who} mocked my work {when}|"
        "the soup tasted awful {when}|a thief took my {thing} {place}|"
        "{who} forgot my birthday {when}|I failed the test, {who} told me {when}|"
        "the surgery of {who} went badly {when}|{who} broke my {thing} {when}|"
        "{who} came back sick {when}|{who} lied about the damaged {thing} {when}",
    "it":
        "what {who} did {when}|what {who} said about the {thing}|this letter from {who}|"
        "what happened {place} {when}|who called about the {thing} {when}|the news about {who}|"
        "what is {place}",
    "stirred":
        "I cannot believe {it}|stop everything and look at {it}|I have to tell everyone about {it}|"
        "my heart is racing, you must see {it}|I am shaking all over, just think of {it}",
    "subdued":
        "{who} and I did not say much {when}|I just want to sit by the {thing} for a while|"
        "I stayed in bed {when}|I looked out of the window {when} and thought of {who}|"
        "it is late and I left the {thing} {place}|let us not talk about the {thing} {when}|"
        "I walked home slowly with {who} {when}",
    "joy":
        "I could hug everyone|this is the best day of my life|I am so happy|hooray, let us celebrate|"
        "I am over the moon|I want to dance and sing",
    "anger":
        "I am furious|how dare they|I have had enough of this|that makes my blood boil|"
        "I will never forgive them|I hate this so much",
    "sadness":
        "I cried for hours|my heart is broken|I feel so lonely|I have lost all hope|"
        "everything feels empty now|I miss the old days so much",
    "calm":
        "I feel at peace|there is no hurry at all|I am quite relaxed|all is well as it is|"
        "I could rest here for hours|it is pleasant and quiet",
    "say": "well, |you know, |listen, |so, |by the way, |oh, ||||",
}
LINES = {       # the emotions that the words leave open: the lines that do
    ("joy",): ["{say}{good}, {joy}!", "{say}{joy}, {good}!", "{say}{plain}, and {joy}!"],
    ("anger",): ["{say}{bad}, {anger}!", "{say}{anger}, {bad}!", "{say}{plain}, and {anger}!"],
    ("sadness",): ["{say}{bad}, {sadness}.", "{say}{sadness}, {bad}.", "{say}{plain}, and {sadness}."],
    ("calm",): ["{say}{good}, {calm}.", "{say}{calm}, {good}.", "{say}{plain}, and {calm}."],
    ("joy", "calm"): ["{say}{good}."],
    ("anger", "sadness"): ["{say}{bad}."],
    ("joy", "anger"): ["{say}{stirred}!"],
    ("sadness", "calm"): ["{say}{subdued}."],
    TASK.labels: ["{say}{plain}.", "{say}{plain}, I think.", "{say}{plain}, right?"],
}
# What a script's stage directions say of voice and face. The language model reads them, the data has none.
VOICE = {1: ["loudly", "shouting", "excited"], -1: ["quietly", "whispering", "slowly"]}
FACE = {1: ["smiling", "bright", "warmly"], -1: ["frowning", "dark", "coldly"]}


def draw_line(emotions, rng: random.Random, seen: set) -> str:
    """A line that leaves these emotions open, and that no one drew before."""
    def fill(slot) -> str:
        return rng.choice(SLOTS[slot[1]].split("|"))

    while True:
        text = rng.choice(LINES[emotions])
        while "{" in text:
            text = re.sub(r"{(\w+)}", fill, text)
        text = text[0].upper() + text[1:]
        if text not in seen:
            seen.add(text)
            return text


# --- The data set -------------------------------------------------------------------------------------------
ROWS = {        # rows of each label that the words settle, that need the voice, the face, both
    "train": (140, 90, 90, 180),
    "valid": (21, 14, 14, 26),
    "test": (42, 27, 27, 54),
}


def voice(arousal: int, rng: np.random.RandomState) -> np.ndarray:
    """Frames (15..40, 6): energy and pitch climb or sink around the speaker's own level; and noise."""
    n = rng.randint(15, TASK.audio_len + 1)
    speaker = rng.normal(0, 2, 6)
    x = speaker + rng.normal(0, 1, (n, 6))
    slope = arousal * rng.uniform(3, 5)
    climb = slope * np.linspace(-1, 1, n)
    x[:, :2] += climb[:, None]
    return x


def face(valence: int, rng: np.random.RandomState) -> np.ndarray:
    """Frames (10..24, 8): at some moment mouth and cheeks rise, or brows and lips tighten; and noise."""
    n = rng.randint(10, TASK.video_len + 1)
    x = rng.normal(0, 1, (n, 8))
    onset = np.arange(n) > rng.uniform(0.2, 0.7) * n
    change = rng.uniform(3, 5) * onset[:, None]
    if valence > 0:
        x[:, 0:2] += change         # mouth and cheeks
    else:
        x[:, 2:4] += change         # brows and lips
    return x


def padded(x: np.ndarray, frames: int) -> np.ndarray:
    return np.pad(x, ((0, frames - len(x)), (0, 0))).astype(np.float16)


def make_row(label: str, emotions, seen: set, rng: random.Random, noise: np.random.RandomState) -> dict:
    """A row whose words leave `emotions` open, its label among them; voice and face tell the rest.

    Where the words settle the arousal or the valence, voice or face show it at random.
    """
    arousal, valence = AROUSAL[label], VALENCE[label]
    if len({AROUSAL[e] for e in emotions}) == 1:
        arousal = rng.choice((-1, 1))
    if len({VALENCE[e] for e in emotions}) == 1:
        valence = rng.choice((-1, 1))
    audio = voice(arousal, noise)
    video = face(valence, noise)
    features = {
        "text": draw_line(emotions, rng, seen),
        "audio": padded(audio, TASK.audio_len),
        "video": padded(video, TASK.video_len),
        "audio_len": len(audio),
        "video_len": len(video),
    }
    return {"label": label, "features": features}


def pair(label: str, kind: dict):
    """The two emotions, `label` and another, that have the same arousal, or the same valence."""
    for emotions in LINES:
        if len(emotions) == 2 and label in emotions and kind[emotions[0]] == kind[emotions[1]]:
            return emotions


def make_data(seen: set):
    for n, (split, counts) in enumerate(ROWS.items()):
        rng = random.Random(SEED + n)
        noise = np.random.RandomState(SEED + n)
        rows = []
        for label in TASK.labels:
            left_open = [(label,), pair(label, VALENCE), pair(label, AROUSAL), TASK.labels]
            for emotions, count in zip(left_open, counts):
                rows += [make_row(label, emotions, seen, rng, noise) for _ in range(count)]
        rng.shuffle(rows)
        with open(HERE / TASK.files[split], "wb") as file:
            pickle.dump(rows, file, protocol=4)


# --- The language model -------------------------------------------------------------------------------------
CORPUS = 12000      # lines, none of them in the data set
STEPS = 600
BATCH = 32
LEARNING_RATE = 3e-3
NOISE = 1.0         # on the embeddings of a question: what an adapter writes lies between words, not on one
CONFIG = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu",
    "torch_dtype": "float16",
    "vocab_size": 768, "hidden_size": 128, "intermediate_size": 352, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 4, "max_position_embeddings": 256, "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False, "attention_bias": False, "bos_token_id": 1, "eos_token_id": 2,
}


def make_tokenizer(lines, words):
    """Byte pairs as LLaMA's: bytes for what the vocabulary lacks, a piece per digit, spaces as they are."""
    every = "".join(map(chr, range(33, 127)))
    sentences = [text for text, _ in lines]
    sentences += [words.open, words.close, words.prompt, every] * 200
    model = io.BytesIO()            # a file's path would become part of the model
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(sentences), model_writer=model,
        model_type="bpe", vocab_size=CONFIG["vocab_size"], byte_fallback=True, split_digits=True,
        normalization_rule_name="identity", remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True, character_coverage=1.0, num_threads=1, minloglevel=2)
    (HERE / "llm" / "tokenizer.model").write_bytes(model.getvalue())


def plain(line, rng: random.Random, words, tokenizer) -> tuple[list[int], int]:
    """Token ids of a line, and how many at their end to learn: all but <s>."""
    ids = tokenizer.encode(line[0]) + [2]
    return [1] + ids, len(ids)


def question(line, rng: random.Random, words, tokenizer) -> tuple[list[int], int]:
    """The same for the prompt with its answer, of which only the answer is learned.

    The answer is drawn evenly among the emotions that the words leave open, so that the model is sure where
    the words are and knows nothing elsewhere. As in a script, stage directions may stand before a line and
    outrank its words: "(shouting) The book is still on the shelf." has a high arousal, whatever the words. So
    the model listens to what stands at the pseudo tokens' place, and an adapter must not put there what voice
    and face show at random.
    """
    text, emotions = line
    label = rng.choice(emotions)
    stage = []
    arousal, valence = AROUSAL[label], VALENCE[label]
    if rng.random() < 0.5:
        arousal = rng.choice((-1, 1))
        stage.append(rng.choice(VOICE[arousal]))
    if rng.random() < 0.5:
        valence = rng.choice((-1, 1))
        stage.append(rng.choice(FACE[valence]))
    directions = f"({', '.join(stage)})" if stage else ""
    ids = [1]
    for part in (words.open, directions, text, words.close, words.prompt):
        ids += tokenizer.encode(part)
    for i, emotion in enumerate(TASK.labels):
        if AROUSAL[emotion] == arousal and VALENCE[emotion] == valence:
            label = i
    answer = tokenizer.encode(words.label(label)) + [2]
    return ids + answer, len(answer)


def lm_loss(llm: LLM, examples, noise: float):
    """Mean cross-entropy of what there is to learn. examples: (ids, how many at their end to learn)."""
    longest = max(len(ids) for ids, _ in examples)
    # Padded at the end, where nothing looks at it.
    x = torch.zeros(len(examples), longest, dtype=torch.long)
    learned = torch.zeros(len(examples), longest, dtype=torch.bool)
    for i, (ids, n) in enumerate(examples):
        x[i, :len(ids)] = torch.tensor(ids)
        learned[i, len(ids) - n:len(ids)] = True
    target = x[:, 1:][learned[:, 1:]]
    h = llm.embed(x[:, :-1])
    h = llm(h + noise * torch.randn_like(h))
    return F.cross_entropy(llm.logits(h[learned[:, 1:]]), target)


def train_llm(lines, words, tokenizer) -> LLM:
    torch.manual_seed(SEED)
    torch.set_num_threads(1)                    # the same sums in the same order on any number of cores
    rng = random.Random(SEED)
    llm = LLM(Config.from_dir(HERE / "llm")).requires_grad_(True)
    optimizer = torch.optim.AdamW(llm.parameters(), LEARNING_RATE, betas=(0.9, 0.95), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, LEARNING_RATE, STEPS, pct_start=0.1, cycle_momentum=False)
    bar = tqdm(range(STEPS), desc="language model")
    for _ in bar:
        losses = []
        for make, noise in ((plain, 0), (question, NOISE)):
            batch = rng.choices(lines, k=BATCH)
            examples = [make(line, rng, words, tokenizer) for line in batch]
            losses.append(lm_loss(llm, examples, noise))
        optimizer.zero_grad()
        sum(losses).backward()
        torch.nn.utils.clip_grad_norm_(llm.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        bar.set_postfix_str("loss of a plain line {:.3f}, of an answer {:.3f}".format(*losses), refresh=False)
    return llm


def save_llm(llm: LLM):
    """fp16, under Hugging Face's names: our stacked tensors are cut again."""
    tensors = {}
    for name, tensor in llm.state_dict().items():
        names = sources(llm.config, name)
        parts = tensor.chunk(len(names))        # q, k, v are equally high here, and so are gate and up
        for source, part in zip(names, parts):
            tensors[source] = part.half().clone()
    save_file(tensors, HERE / "llm" / "model.safetensors", metadata={"format": "pt"})


def main():
    seen = set()
    make_data(seen)
    rng = random.Random(SEED)
    words = TASK.wording("llama")
    lines = []
    for emotions in rng.choices(list(LINES), k=CORPUS):
        lines.append((draw_line(emotions, rng, seen), emotions))
    (HERE / "llm").mkdir(exist_ok=True)
    (HERE / "llm" / "config.json").write_text(json.dumps(CONFIG, indent=2) + "\n")
    make_tokenizer(lines, words)
    save_llm(train_llm(lines, words, load_tokenizer(HERE / "llm")))


if __name__ == "__main__":
    main()
