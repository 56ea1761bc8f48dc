"""MSE-Adapter: audio and video, guided by the text, become pseudo tokens in front of a frozen LLM's text.

     audio (B, La, Da)     video (B, Lv, Dv)          text embeddings (B, Lt, C)
           | SequenceEncoder     | SequenceEncoder          | mean, linear
       x_a (B, 256)          x_v (B, 256)               t (B, 256)
           \\_____________________|__________________________/
                       TextGuideMixer:     M  = x_a * t + x_v * t                         (B, 256)
                       MultiScaleFusion:   M~ = joined three-scale MLPs of M              (B, 256)
                       projector:          h  = W_3 M~ + b_3,  P_k = w_k h + c_k          (B, P, C)
    the LLM reads      [bos] open  P_1 .. P_P  text  close prompt  ->  label

Where paper and release differ, the layers follow the release; rows do so with official=True. This file needs
torch, numpy and safetensors alone, and of an LLM its `embed`, `forward`, `logits`, `generate`, `config` and
`fingerprint`, as in model.py.

Shapes: B rows, T length of the longest row, La / Lv frames, Da / Dv features of one, C the LLM's width,
Lt text tokens, P pseudo tokens, n tokens of the longest label, V vocabulary.
"""
import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save


class AdapterError(ValueError):
    """An adapter that does not fit, or a file that holds none: what was found and expected, what to do."""


MODALITIES = {"both": ("audio", "video"), "audio": ("audio",), "video": ("video",), "text": ()}


@dataclass(frozen=True)
class AdapterConfig:
    dim: int                            # C
    audio_dim: int                      # Da
    video_dim: int                      # Dv
    audio_hidden: int                   # the LSTM's state
    video_hidden: int
    pseudo_tokens: int                  # P
    fusion_dim: int = 256               # the common space of text, audio and video
    no_mixer: bool = False              # ablation: the modalities are added without the text's product
    no_fusion: bool = False             # ablation: one linear layer in the place of three scales
    modality: str = "both"              # or only "audio", only "video"; "text": neither of them
    independent_tokens: bool = False    # a linear layer for each pseudo token, no scaled copies of one vector

    def __post_init__(self):
        if self.modality not in MODALITIES:
            raise AdapterError(f"modality is {self.modality!r}; expected one of {', '.join(MODALITIES)}")


class SequenceEncoder(nn.Module):
    """x = W h_last(LSTM(features)) + b: one layer, one direction, the state after the last real frame."""

    def __init__(self, features: int, hidden: int, out: int):
        super().__init__()
        self.rnn = nn.LSTM(features, hidden, batch_first=True)
        self.linear = nn.Linear(hidden, out)

    def forward(self, x, lengths):
        """Features (B, L, D), `lengths` (B,) of them real -> (B, 256). Length 0: the modality is missing."""
        if x.size(-1) != self.rnn.input_size:
            raise AdapterError(f"{x.size(-1)} features in a frame, but the adapter was made for "
                               f"{self.rnn.input_size}; use data like that of its training, or train again")
        states, _ = self.rnn(x)         # (B, L, hidden), of padding, too: faster than packed sequences
        last = lengths.clamp(min=1) - 1
        h = states.take_along_dim(last[:, None, None], dim=1)[:, 0]     # (B, hidden)
        h = h * (lengths > 0)[:, None]  # a missing modality has the state 0: x = b
        return self.linear(h)


class TextGuideMixer(nn.Module):
    """M = x_a * t + x_v * t, t = W_t mean(text embeddings) + b_t: the text says which channels count."""

    def __init__(self, dim: int, fusion_dim: int):
        super().__init__()
        self.text = nn.Linear(dim, fusion_dim)

    def forward(self, text, audio, video):
        t = self.text(text)                                     # (B, C) -> (B, 256)
        return audio * t + video * t


class MultiScaleFusion(nn.Module):
    """M~ = conv([m_1, m_2, m_3]), m_i = W2_i gelu(W1_i M): three widths, one filter for all channels."""

    def __init__(self, dim: int, fusion_dim: int):
        super().__init__()
        self.scales = nn.ModuleList(
            nn.Sequential(nn.Linear(fusion_dim, width), nn.GELU(), nn.Linear(width, fusion_dim))
            for width in (dim // 8, dim // 32, dim // 16))
        self.join = nn.Linear(3, 1)                             # the release writes it as a 1x3 convolution

    def forward(self, m):
        scales = torch.stack([scale(m) for scale in self.scales], dim=-1)       # (B, 256, 3)
        return self.join(scales)[..., 0]                        # (B, 256)


class MSEAdapter(nn.Module):
    """The plug-in, the only part that trains."""

    def __init__(self, config: AdapterConfig):
        super().__init__()
        self.config = c = config
        width = c.fusion_dim
        parts = MODALITIES[c.modality]
        self.audio = SequenceEncoder(c.audio_dim, c.audio_hidden, width) if "audio" in parts else None
        self.video = SequenceEncoder(c.video_dim, c.video_hidden, width) if "video" in parts else None
        self.mixer = TextGuideMixer(c.dim, width) if not c.no_mixer else None
        self.fusion = MultiScaleFusion(c.dim, width) if not c.no_fusion else nn.Linear(width, width)
        if c.independent_tokens:
            self.project = nn.Linear(width, c.dim * c.pseudo_tokens)
            self.spread = None
        else:
            self.project = nn.Linear(width, c.dim)
            self.spread = nn.Linear(1, c.pseudo_tokens)         # w_k, c_k

    def forward(self, text, audio, audio_len, video, video_len):
        """Mean text embedding (B, C), features (B, La, Da), (B, Lv, Dv), lengths (B,) -> pseudo tokens."""
        a = self.audio(audio, audio_len) if self.audio else 0   # (B, 256)
        v = self.video(video, video_len) if self.video else 0
        if self.config.modality == "text":
            a = text.new_ones(len(text), self.config.fusion_dim)        # M = t; all ones without the mixer
        m = self.mixer(text, a, v) if self.mixer else a + v
        h = self.project(self.fusion(m))                        # (B, C), or all independent tokens' P * C
        if self.spread is None:
            return h.unflatten(1, (self.config.pseudo_tokens, -1))      # (B, P, C)
        tokens = self.spread(h[..., None])                      # (B, C, P): P_k = w_k h + c_k
        return tokens.transpose(1, 2)                           # (B, P, C), scaled copies of one vector


# --- The adapter in front of the LLM ------------------------------------------------------------------------
class MultimodalLLM(nn.Module):
    """A frozen LLM behind an adapter, for one task.

    official=False: rows hold real tokens only; padding in front, up to the longest of the batch, is masked.
    official=True, as the release: the text is padded in front to the task's fixed length with an ordinary
    token, to which the LLM attends and which counts in the mean of the text's embeddings.
    A row of MELD in LLaMA2's tokens, on average; in brackets the official one, always 145:
        [bos] <Multimodal>  P1 P2 P3 P4  What a day!  </Multimodal>  Please recognize ... The emotion is  4
        1 (2)       6            4         13 (65)           6                   57 (60)                  2

    Where a task's labels have unequally many tokens, the end token is a part of each, unless official:
        "1.5" and "-1.5" of a byte-level BPE       ->  1 . 5 <end>  and  - 1 . 5 <end>
        "1" and "10", of more than ten classes     ->  1 <end>  and  1 0 <end>
        the classes "0" to "6"; "-1.5" and "+1.5"  ->  as they are: how far a label goes is known
    Without it the LLM would never learn where "1.5" stops ("1.50"), and "1" would be at least as probable as
    "10" whatever the row says.
    """

    def __init__(self, llm, adapter: MSEAdapter, tokenizer, task, official: bool = False):
        super().__init__()
        self.llm = llm
        self.adapter = adapter
        self.tokenizer = tokenizer
        self.task = task
        self.official = official
        dim, vocab_size = llm.config.dim, llm.config.vocab_size
        if adapter.config.dim != dim or tokenizer.size > vocab_size:
            raise AdapterError(f"the backbone: width {dim} and {vocab_size} embeddings, but the adapter "
                               f"width {adapter.config.dim} and the tokenizer {tokenizer.size} ids; take "
                               "others")
        words = task.wording(llm.config.family, official)
        bos, self.eos_id, self.pad_id = words.special_ids(tokenizer)
        # Each part of a row is tokenised on its own.
        self.before = bos + tokenizer.encode(words.open)
        self.after = tokenizer.encode(words.close) + tokenizer.encode(words.prompt)
        self.label_text = words.label           # a function: 0.4 -> "0.4" or "+0.4"
        self.reread = words.reread              # see LLM.generate
        self.end = [self.eos_id] if needs_end(words, tokenizer, official) else []      # behind each label
        self.labels = [tokenizer.encode(text) + self.end for text in words.labels]      # every legal one
        self.answer_len = max(len(ids) for ids in self.labels)

    @property
    def device(self):
        return next(self.parameters()).device

    def tensor(self, numbers):
        return torch.as_tensor(numbers, device=self.device)

    def rows(self, batch, labels=None):
        """Embed a batch's rows, [bos] open P text close prompt (label). labels: each row's, as ids.

        Returns x (B, T, C), padded in front; real (B, T) bool, False where x is padding; and the pseudo
        tokens (B, P, C). Of two rows whose [bos] open are b o, whose close prompt are c p, and P is 2:
            . . b o P P t c p       real  0 0 1 1 1 1 1 1 1
            b o P P t t t c p             1 1 1 1 1 1 1 1 1
        """
        P = self.adapter.config.pseudo_tokens
        texts = self.text_ids(batch)
        rows = [self.before + [self.pad_id] * P + text + self.after for text in texts]
        if labels is not None:
            rows = [row + label for row, label in zip(rows, labels)]
        T = max(len(row) for row in rows)
        ids = self.tensor([[self.pad_id] * (T - len(row)) + row for row in rows])
        x = self.llm.embed(ids)                                 # (B, T, C)

        # Which positions are what. `place` counts in each row from its beginning; below 0 is padding.
        place = self.tensor([range(len(row) - T, len(row)) for row in rows])    # (B, T)
        text_len = self.tensor([[len(text)] for text in texts])                 # (B, 1)
        first = len(self.before)
        is_pseudo = (place >= first) & (place < first + P)
        is_text = (place >= first + P) & (place < first + P + text_len)

        text_sum = (x.float() * is_text[..., None]).sum(dim=1)                  # (B, C)
        mean = text_sum / text_len.clamp(min=1)
        audio, audio_len = self.tensor(batch.audio), self.tensor(batch.audio_len)
        video, video_len = self.tensor(batch.video), self.tensor(batch.video_len)
        pseudo = self.adapter(mean, audio, audio_len, video, video_len)         # (B, P, C)
        x = x.masked_scatter(is_pseudo[..., None], pseudo.to(x.dtype))
        return x, place >= 0, pseudo

    def text_ids(self, batch) -> list[list[int]]:
        """The tokens of each text, cut at the task's length; official: filled up to it in front."""
        length = self.task.text_len
        texts = [self.tokenizer.encode(text)[:length] for text in batch.text]
        if self.official:
            texts = [[self.pad_id] * (length - len(text)) + text for text in texts]
        return texts

    def pseudo_tokens(self, batch):
        """The pseudo tokens (B, P, C) of a batch."""
        return self.rows(batch)[2]

    def loss(self, batch, recompute: int = 0):
        """Cross-entropy of the label's tokens, mean over a row's, then over rows. recompute: see LLM."""
        labels = [self.tokenizer.encode(self.label_text(y)) + self.end for y in batch.label]
        n = max(len(ids) for ids in labels)
        # Shorter labels stand at the end, too: what is left in front of them, -100, has no loss.
        target = self.tensor([[-100] * (n - len(ids)) + ids for ids in labels])     # (B, n)
        x, real, _ = self.rows(batch, labels)
        hidden = self.llm(x, real, recompute=recompute, last=n + 1)             # (B, n + 1, C)
        hidden = hidden[:, :-1].flatten(0, 1)                   # in front of each label token, (B * n, C)
        logits = self.llm.logits(hidden)                        # (B * n, V)
        losses = F.cross_entropy(logits, target.flatten(), reduction="none")
        losses = losses.view_as(target)                         # (B, n)
        row_loss = losses.sum(dim=1) / (target >= 0).sum(dim=1)
        return row_loss.mean()

    @torch.no_grad()
    def answer(self, batch) -> list[str]:
        """What the LLM writes after each row, greedily, up to the length of a label or its end token."""
        x, real, _ = self.rows(batch)
        mask = None if self.official else real                  # official rows hold no padding
        new = self.llm.generate(x, self.answer_len, mask, self.eos_id, reread=self.reread)
        answers = []
        for ids in new.tolist():
            if self.eos_id in ids:
                ids = ids[:ids.index(self.eos_id)]
            answers.append(self.tokenizer.decode(ids))
        return answers


def needs_end(words, tokenizer, official: bool) -> bool:
    """Whether the end token is a part of each label: where they have unequally many, unless official."""
    lengths = {len(tokenizer.encode(text)) for text in words.labels}
    return len(lengths) > 1 and not official


# --- Files --------------------------------------------------------------------------------------------------
def identity(llm, tokenizer, task, official: bool) -> dict:
    """What an adapter is made for: a file's metadata, compared when it is loaded."""
    c = llm.config
    backbone = f"{c.family}, {c.n_layer} layers, width {c.dim}, weights {llm.fingerprint}"
    mode = "official" if official else "default"
    if needs_end(task.wording(c.family, official), tokenizer, official):
        mode = "default, an end token behind each label"
    return {"format": "mse-adapter 2", "backbone": backbone, "task": task.name, "mode": mode}


def adapter_bytes(net: MultimodalLLM) -> bytes:
    """A .safetensors file of the adapter's tensors, with what loading must check in its header."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in net.adapter.state_dict().items()}
    meta = identity(net.llm, net.tokenizer, net.task, net.official)
    meta |= {"config": asdict(net.adapter.config), "sha256": digest(tensors)}
    return save(tensors, {"mse-adapter": json.dumps(meta)})     # one key: several have no fixed order


def save_adapter(path, net: MultimodalLLM):
    """Write the adapter to one .safetensors file. (A run may be killed: it writes adapter_bytes itself.)"""
    Path(path).write_bytes(adapter_bytes(net))


def load_adapter(path, llm, tokenizer, task, official: bool = False) -> MultimodalLLM:
    """Read a file of save_adapter; the net is ready to answer. Raises AdapterError, with both values, if it
    was made for another backbone, task or mode, or a tensor is missing, left over, misshapen or changed."""
    tensors, meta = read_tensors(path)
    for key, here in identity(llm, tokenizer, task, official).items():
        if meta.get(key) != here:
            raise AdapterError(f"{path}: the adapter's {key} is {meta.get(key)!r:.200}, but here {here!r}; "
                               "load it with what it was made for, or train again")
    try:
        with torch.device("meta"):                              # no memory, whatever sizes the file names
            adapter = MSEAdapter(AdapterConfig(**meta["config"]))
        adapter.load_state_dict(tensors, assign=True)           # raises what is missing, left over, misshapen
    except Exception as error:          # whatever a damaged or hostile file provokes, it was refused
        raise AdapterError(f"{path}: not a whole saved adapter ({brief(error)}); copy it again, or take the "
                           "code that it was trained with") from None
    if meta.get("sha256") != digest(tensors):
        raise AdapterError(f"{path}: its numbers are not those that were saved (sha256); copy it again")
    net = MultimodalLLM(llm, adapter, tokenizer, task, official)
    adapter.to(net.device)
    return net.eval()


def read_tensors(path) -> tuple[dict, dict]:
    """The tensors and the metadata of a file of save_adapter. Raises AdapterError if it is none."""
    try:
        if not Path(path).is_file():            # a pipe would be waited for
            raise OSError("no file is there")
        with safe_open(path, "pt") as file:
            tensors = {name: file.get_tensor(name).clone() for name in list(file.keys())}
            return tensors, dict(json.loads(file.metadata()["mse-adapter"]))
    except Exception as error:          # whatever a damaged or hostile file provokes, it was refused
        raise AdapterError(f"{path}: not a saved adapter ({brief(error)}); copy it again") from None


def digest(tensors: dict) -> str:
    return hashlib.sha256(save(tensors)).hexdigest()


def brief(error: Exception) -> str:
    """What it says, on one line: it may quote the whole file that provoked it."""
    return " ".join(str(error)[:400].split())
