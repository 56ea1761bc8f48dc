"""MSE-Adapter: audio and video, guided by the text, become pseudo tokens in front of a frozen LLM's text.

     audio (B, La, Da)     video (B, Lv, Dv)          text embeddings (B, Lt, C)
           | SequenceEncoder     | SequenceEncoder          | mean, linear
       x_a (B, 256)          x_v (B, 256)               t (B, 256)
           \\_____________________|__________________________/
                       TextGuideMixer:     M  = x_a * t + x_v * t                         (B, 256)
                       MultiScaleFusion:   M~ = joined three-scale MLPs of M              (B, 256)
                       projector:          h  = W_3 M~ + b_3,  P_k = w_k h + c_k          (B, P, C)
    the LLM reads      [bos] open  P_1 .. P_P  text  close prompt  ->  label

Where paper and release differ, this follows the release. Shapes: B rows, T / S length of a row without / with
[bos] open, La / Lv frames, Da / Dv features of one, C the LLM's width, Lt text tokens, P pseudo tokens.
"""
from dataclasses import asdict, dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F

from data import special_ids
from extras.files import brief, digest, read_tensors, write_tensors
from extras.release import OFFICIAL_NAMES, read_official, reread  # noqa: F401
from model import KVCache

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
            raise ValueError(f"modality is {self.modality!r}; expected one of {', '.join(MODALITIES)}")

class SequenceEncoder(nn.Module):
    """x = W h_last(LSTM(features)) + b: one layer, one direction, the state after the last real frame."""

    def __init__(self, features: int, hidden: int, out: int):
        super().__init__()
        self.rnn = nn.LSTM(features, hidden, batch_first=True)
        self.linear = nn.Linear(hidden, out)

    def forward(self, x, lengths):
        """Features (B, L, D), `lengths` (B,) of them real -> (B, 256). Length 0: the modality is missing."""
        if x.size(-1) != self.rnn.input_size:
            raise ValueError(f"{x.size(-1)} features in a frame, but the adapter was made for "
                             f"{self.rnn.input_size}; use data like that of its training, or train again")
        states = self.rnn(x)[0]         # (B, L, hidden), of padding, too: faster than packed sequences
        h = states.take_along_dim(lengths.clamp(min=1)[:, None, None] - 1, dim=1)[:, 0]         # (B, hidden)
        return self.linear(h * (lengths > 0)[:, None])      # a missing modality has the state 0: x = b

class TextGuideMixer(nn.Module):
    """M = x_a * t + x_v * t, t = W_t mean(text embeddings) + b_t: the text says which channels count."""

    def __init__(self, dim: int, fusion_dim: int):
        super().__init__()
        self.text = nn.Linear(dim, fusion_dim)

    def forward(self, text, audio, video):
        t = self.text(text)                                 # (B, C) -> (B, 256)
        return audio * t + video * t

class MultiScaleFusion(nn.Module):
    """M~ = conv([m_1, m_2, m_3]), m_i = W2_i gelu(W1_i M): three widths, one filter for all channels."""

    def __init__(self, dim: int, fusion_dim: int):
        super().__init__()
        self.scales = nn.ModuleList(
            nn.Sequential(nn.Linear(fusion_dim, width), nn.GELU(), nn.Linear(width, fusion_dim))
            for width in (dim // 8, dim // 32, dim // 16))
        self.join = nn.Linear(3, 1)                         # the release writes it as a 1x3 convolution

    def forward(self, m):
        scales = torch.stack([scale(m) for scale in self.scales], dim=-1)                       # (B, 256, 3)
        return self.join(scales)[..., 0]                                                        # (B, 256)

class MSEAdapter(nn.Module):
    """The plug-in, the only part that trains."""

    def __init__(self, config: AdapterConfig):
        super().__init__()
        self.config = config
        c, width, parts = config, config.fusion_dim, MODALITIES[config.modality]
        self.audio = SequenceEncoder(c.audio_dim, c.audio_hidden, width) if "audio" in parts else None
        self.video = SequenceEncoder(c.video_dim, c.video_hidden, width) if "video" in parts else None
        self.mixer = TextGuideMixer(c.dim, width) if not c.no_mixer else None
        self.fusion = MultiScaleFusion(c.dim, width) if not c.no_fusion else nn.Linear(width, width)
        self.project = nn.Linear(width, c.dim if not c.independent_tokens else c.dim * c.pseudo_tokens)
        self.spread = nn.Linear(1, c.pseudo_tokens) if not c.independent_tokens else None       # w_k, c_k

    def forward(self, text, audio, audio_len, video, video_len):
        """Mean text embedding (B, C), features (B, La, Da), (B, Lv, Dv), lengths (B,) -> pseudo tokens."""
        a = self.audio(audio, audio_len) if self.audio else 0                                   # (B, 256)
        v = self.video(video, video_len) if self.video else 0
        if self.config.modality == "text":
            a = text.new_ones(len(text), self.config.fusion_dim)        # M = t; all ones without the mixer
        m = self.mixer(text, a, v) if self.mixer else a + v
        h = self.project(self.fusion(m))                    # (B, C), or all independent tokens' P * C
        if self.spread is None:
            return h.unflatten(1, (self.config.pseudo_tokens, -1))                              # (B, P, C)
        return self.spread(h[..., None]).transpose(1, 2)    # P_k = w_k h + c_k: scaled copies of one vector

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
        self.llm, self.adapter, self.tokenizer = llm, adapter, tokenizer
        self.task, self.official = task, official
        dim, vocab_size = llm.config.dim, llm.config.vocab_size
        if adapter.config.dim != dim or tokenizer.size > vocab_size:
            raise ValueError(f"the backbone: width {dim} and {vocab_size} embeddings, but the adapter width "
                             f"{adapter.config.dim} and the tokenizer {tokenizer.size} ids; take others")
        words = task.wording(llm.config.family, official)
        self.bos, self.eos_id, self.pad_id = special_ids(words, tokenizer)
        self.before = self.bos + tokenizer.encode(words.open)   # each part of a row is tokenised on its own
        self.after = tokenizer.encode(words.close) + tokenizer.encode(words.prompt)
        self.label_text, self.reread = words.label, words.reread
        self.end = label_end(words, tokenizer, self.eos_id, official)           # behind each label: [eos] or []
        self.labels = [tokenizer.encode(text) + self.end for text in words.labels]      # every legal one
        self.answer_len = max(map(len, self.labels))
        self.kept = None                                    # see beginning

    def tensor(self, numbers):
        return torch.as_tensor(numbers, device=self.llm.embed.weight.device)

    def beginning(self) -> KVCache:
        """What all rows begin with, [bos] open: read once, or for each batch if a part of the LLM trains."""
        trains = any(p.requires_grad for p in self.llm.parameters())
        if self.kept is not None and not trains:
            return self.kept
        cache = self.llm.read(self.before)
        self.kept = None if trains else cache
        return cache

    def rows(self, batch, labels=None):
        """Embed what stands behind the beginning: P text close prompt (label). labels: each row's, as ids.
        Returns x (B, T, C), padded in front; which positions of beginning and x are real, (B, S) bool; and
        the pseudo tokens (B, P, C)."""
        P, L = self.adapter.config.pseudo_tokens, self.task.text_len
        texts = [self.tokenizer.encode(text)[:L] for text in batch.text]
        if self.official:
            texts = [[self.pad_id] * (L - len(text)) + text for text in texts]
        rows = [[self.pad_id] * P + text + self.after for text in texts]
        if labels is not None:
            rows = [row + label for row, label in zip(rows, labels)]
        T = max(map(len, rows))
        x = self.llm.embed(self.tensor([[self.pad_id] * (T - len(row)) + row for row in rows]))  # (B, T, C)
        place = self.tensor([range(len(row) - T, len(row)) for row in rows])    # in its row; below 0: padding
        n = self.tensor([[len(text)] for text in texts])                                        # (B, 1)
        is_text = (place >= P) & (place < P + n)                                                # (B, T)
        mean = (x.float() * is_text[..., None]).sum(1) / n.clamp(min=1)                         # (B, C)
        features = map(self.tensor, (batch.audio, batch.audio_len, batch.video, batch.video_len))
        pseudo = self.adapter(mean, *features)                                                  # (B, P, C)
        x = x.masked_scatter(((place >= 0) & (place < P))[..., None], pseudo.to(x.dtype))
        return x, F.pad(place >= 0, (len(self.before), 0), value=True), pseudo

    def pseudo_tokens(self, batch):
        """The pseudo tokens (B, P, C) of a batch."""
        return self.rows(batch)[2]

    def loss(self, batch, recompute: int = 0):
        """Cross-entropy of the label's tokens, mean over a row's, then over rows. recompute: see LLM."""
        labels = [self.tokenizer.encode(self.label_text(y)) + self.end for y in batch.label]
        n = max(map(len, labels))
        target = self.tensor([[-100] * (n - len(ids)) + ids for ids in labels])                 # (B, n)
        x, real, _ = self.rows(batch, labels)
        hidden = self.llm(x, real, self.beginning(), recompute, last=n + 1)                   # (B, n + 1, C)
        logits = self.llm.logits(hidden[:, :-1].flatten(0, 1))    # of the token after each, (B * n, V)
        loss = F.cross_entropy(logits, target.flatten(), reduction="none").view_as(target)
        return (loss.sum(1) / (target >= 0).sum(1)).mean()          # it is 0 where the target is -100

    @torch.no_grad()
    def answer(self, batch) -> list[str]:
        """What the LLM writes after each row, greedily, up to the length of a label or its end token."""
        x, real, _ = self.rows(batch)
        if self.reread:
            ids = reread(self.llm, self.before, x, self.answer_len).tolist()
        else:
            ids = self.llm.generate(x, self.answer_len, real, self.eos_id, self.beginning()).tolist()
        ends = [row.index(self.eos_id) if self.eos_id in row else len(row) for row in ids]
        return [self.tokenizer.decode(row[:end]) for row, end in zip(ids, ends)]

def label_end(words, tokenizer, eos_id: int, official: bool) -> list[int]:
    """The tokens that end each label: [eos_id] where labels have unequally many tokens, else none."""
    lengths = {len(tokenizer.encode(text)) for text in words.labels}
    if official or len(lengths) == 1:
        return []
    return [eos_id]

# --- Files --------------------------------------------------------------------------------------------------
def identity(llm, tokenizer, task, official: bool) -> dict:
    """What an adapter is made for: a file's metadata, compared when it is loaded."""
    c, mode = llm.config, "official" if official else "default"
    words = task.wording(c.family, official)
    if label_end(words, tokenizer, special_ids(words, tokenizer)[1], official):
        mode = "default, an end token behind each label"
    sizes = f"{c.family}, {c.n_layer} layers, width {c.dim}, weights {llm.fingerprint}"
    return {"format": "mse-adapter 1", "backbone": sizes, "task": task.name,
            "mode": mode}

def save_adapter(path, net: MultimodalLLM):
    """Write the adapter's tensors to one .safetensors file, with what loading must check in its header."""
    meta = identity(net.llm, net.tokenizer, net.task, net.official) | {"config": asdict(net.adapter.config)}
    write_tensors(path, net.adapter.state_dict(), meta)

def load_adapter(path, llm, tokenizer, task, official: bool = False) -> MultimodalLLM:
    """Read a file of save_adapter. Raises ValueError, with both values, if it was made for another backbone,
    task or mode, or if a tensor is missing, left over, misshapen or changed."""
    tensors, meta = read_tensors(path)
    for key, here in identity(llm, tokenizer, task, official).items():
        if meta.get(key) != here:
            raise ValueError(f"{path}: the adapter's {key} is {meta.get(key)!r:.200}, but here {here!r}")
    try:
        with torch.device("meta"):                          # no memory, whatever sizes the file names
            adapter = MSEAdapter(AdapterConfig(**meta["config"]))
        adapter.load_state_dict(tensors, assign=True)       # raises what is missing, unexpected or misshapen
    except Exception as error:          # whatever a damaged or hostile file provokes, it was refused
        raise ValueError(f"{path}: not a whole saved adapter ({brief(error)}); copy it again") from None
    if meta.get("sha256") != digest(tensors):
        raise ValueError(f"{path}: its numbers are not those that were saved (sha256); copy it again")
    return MultimodalLLM(llm, adapter.to(llm.embed.weight.device), tokenizer, task, official)

def load_official(path, config: AdapterConfig) -> MSEAdapter:
    """Read a state dict of the release, a .pth (names prefixed `Model.` or not). Raises ValueError."""
    adapter = MSEAdapter(config)
    try:
        adapter.load_state_dict(read_official(path))
    except Exception as error:          # whatever a damaged or hostile file provokes, it was refused
        raise ValueError(f"{path}: no state dict of tensors as the release saves ({brief(error)})") from None
    return adapter
