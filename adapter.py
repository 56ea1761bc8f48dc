"""MSE-Adapter: audio and video, guided by the text, become a few pseudo tokens in front of a frozen LLM's text.

     audio (B, La, Da)     video (B, Lv, Dv)          text embeddings (B, Lt, C)
           | SequenceEncoder     | SequenceEncoder          | mean, linear
       x_a (B, 256)          x_v (B, 256)               t (B, 256)
           \\_____________________|__________________________/
                       TextGuideMixer:     M  = x_a * t + x_v * t                         (B, 256)
                       MultiScaleFusion:   M~ = joined three-scale MLPs of M              (B, 256)
                       projector:          h  = W_3 M~ + b_3,  P_k = w_k h + c_k          (B, P, C)

    the LLM reads      [bos] open  P_1 .. P_P  text  close prompt  ->  label

Only the adapter trains. Where the paper and the authors' release differ, this follows the release, which made the
published numbers; `official=True` also words and pads each row as the release does.

Shapes: B rows, S length of a row, La / Lv frames, Da / Dv features of a frame, Lt text tokens, C the LLM's width,
P pseudo tokens.
"""
import hashlib
import json
from dataclasses import asdict, dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from model import Beginning, write_atomic


@dataclass(frozen=True)
class AdapterConfig:
    dim: int                # C
    audio_dim: int          # Da
    video_dim: int          # Dv
    audio_hidden: int       # the LSTM's state
    video_hidden: int
    pseudo_tokens: int      # P
    fusion_dim: int = 256   # the common space of text, audio and video
    # The paper's ablations
    no_mixer: bool = False              # the modalities are added without the text's product
    no_fusion: bool = False             # one linear layer in the place of three scales
    modality: str = "both"              # or only "audio", only "video"
    independent_tokens: bool = False    # a linear layer from M~ to each pseudo token, no scaled copies of one vector

    def __post_init__(self):
        if self.modality not in ("both", "audio", "video"):
            raise ValueError(f"modality is {self.modality!r}; expected 'both', 'audio' or 'video'")


# ---------------------------------------------------------------------------------------------------------------------
# The method


class SequenceEncoder(nn.Module):
    """x = W h_last(LSTM(features)) + b: one layer, one direction, the state after the last real frame."""

    def __init__(self, features: int, hidden: int, out: int):
        super().__init__()
        self.rnn = nn.LSTM(features, hidden, batch_first=True)
        self.linear = nn.Linear(hidden, out)

    def forward(self, x, lengths):
        """Features (B, L, D), `lengths` (B,) of them real -> (B, 256). Length 0: the modality is missing."""
        states = self.rnn(x)[0]         # (B, L, hidden), of padding, too: simpler and faster than packed sequences
        h = states.take_along_dim(lengths.clamp(min=1)[:, None, None] - 1, dim=1)[:, 0]           # (B, hidden)
        return self.linear(h * (lengths > 0)[:, None])                  # a missing modality has the state 0: x = b


class TextGuideMixer(nn.Module):
    """M = x_a * t + x_v * t, t = W_t mean(text embeddings) + b_t: the text says which channels of the others count."""

    def __init__(self, dim: int, fusion_dim: int):
        super().__init__()
        self.text = nn.Linear(dim, fusion_dim)

    def forward(self, text, audio, video):
        t = self.text(text)                                             # (B, C) -> (B, 256)
        return audio * t + video * t


class MultiScaleFusion(nn.Module):
    """M~ = conv([m_1, m_2, m_3]), m_i = W2_i gelu(W1_i M): three widths, one 3-tap filter shared by all channels."""

    def __init__(self, dim: int, fusion_dim: int):
        super().__init__()
        self.scales = nn.ModuleList(
            nn.Sequential(nn.Linear(fusion_dim, width), nn.GELU(), nn.Linear(width, fusion_dim))
            for width in (dim // 8, dim // 32, dim // 16))
        self.join = nn.Linear(3, 1)                                     # the release writes it as a 1x3 convolution

    def forward(self, m):
        scales = torch.stack([scale(m) for scale in self.scales], dim=-1)                         # (B, 256, 3)
        return self.join(scales)[..., 0]                                                          # (B, 256)


class MSEAdapter(nn.Module):
    """The plug-in, the only part that trains."""

    def __init__(self, config: AdapterConfig):
        super().__init__()
        self.config = config
        c, width = config, config.fusion_dim
        self.audio = SequenceEncoder(c.audio_dim, c.audio_hidden, width) if c.modality != "video" else None
        self.video = SequenceEncoder(c.video_dim, c.video_hidden, width) if c.modality != "audio" else None
        self.mixer = TextGuideMixer(c.dim, width) if not c.no_mixer else None
        self.fusion = MultiScaleFusion(c.dim, width) if not c.no_fusion else nn.Linear(width, width)
        self.project = nn.Linear(width, c.dim if not c.independent_tokens else c.dim * c.pseudo_tokens)
        self.spread = nn.Linear(1, c.pseudo_tokens) if not c.independent_tokens else None         # w_k, c_k

    def forward(self, text, audio, audio_len, video, video_len):
        """Mean text embedding (B, C), features (B, La, Da), (B, Lv, Dv) and lengths (B,) -> pseudo tokens (B, P, C)."""
        for name, x, width in (("audio", audio, self.config.audio_dim), ("video", video, self.config.video_dim)):
            if x.size(-1) != width:
                raise ValueError(f"the {name} has {x.size(-1)} features in a frame, the adapter was made for {width}; "
                                 "use the data that it was trained on, or train again")
        a = self.audio(audio, audio_len) if self.audio else 0                                     # (B, 256)
        v = self.video(video, video_len) if self.video else 0
        m = self.mixer(text, a, v) if self.mixer else a + v
        h = self.project(self.fusion(m))                    # (B, C), or all independent tokens' P * C
        if self.spread is None:
            return h.unflatten(1, (self.config.pseudo_tokens, -1))                                # (B, P, C)
        return self.spread(h[..., None]).transpose(1, 2)    # P_k = w_k h + c_k: scaled copies of one vector, (B, P, C)


# ---------------------------------------------------------------------------------------------------------------------
# The adapter in front of the LLM


class MultimodalLLM(nn.Module):
    """A frozen LLM behind an adapter, for one task.

    official=False: rows hold real tokens only; padding up to the longest of the batch comes after, where none looks.
    official=True: the text is padded on the left to the task's fixed length with an ordinary token, to which the LLM
    attends and which counts in the mean of the text embeddings, as in the release.

    A row of MELD in LLaMA2's tokens, on average; in brackets the official one, always 145:

        [bos] <Multimodal>  P1 P2 P3 P4  What a day!  </Multimodal>  Please recognize ... The emotion is  4
        1 (2)       6            4         13 (65)           6                   57 (60)                  2
    """

    def __init__(self, llm, adapter: MSEAdapter, tokenizer, task, official: bool = False):
        super().__init__()
        self.llm, self.adapter, self.tokenizer, self.task, self.official = llm, adapter, tokenizer, task, official
        config = llm.config
        if adapter.config.dim != config.dim:
            raise ValueError(f"the adapter is made for a backbone of width {adapter.config.dim}, this has {config.dim}")
        if tokenizer.size > config.vocab_size:
            raise ValueError(f"the tokenizer has {tokenizer.size} ids, the backbone's embedding {config.vocab_size} "
                             "rows: they belong to different models; use the tokenizer of the backbone's own folder")
        words = task.wording(config.family, official)
        self.pad_id, self.eos_id = tokenizer.token_id(words.pad), tokenizer.token_id(words.eos)
        # Every part of a row is tokenised on its own.
        self.before = [tokenizer.token_id(name) for name in words.bos] + tokenizer.encode(words.open)
        self.after = tokenizer.encode(words.close) + tokenizer.encode(words.prompt)
        self.beginning = Beginning(llm, self.before)
        self.label_text = words.label
        self.read_next = self._reread if words.reread else None             # between two new tokens: see answer
        self.labels = [tuple(tokenizer.encode(text)) for text in words.labels]          # every legal one, as tokens
        self.answer_len = max(map(len, self.labels))

    def text_ids(self, text: str) -> list[int]:
        """The tokens of a row's text, cut at the task's length; in the release padded to it on the left."""
        ids = self.tokenizer.encode(text)[:self.task.text_len]
        return [self.pad_id] * (self.task.text_len - len(ids) if self.official else 0) + ids

    def put(self, data):
        """A tensor or nested lists of numbers -> a tensor on the LLM's device; a GPU's work goes on meanwhile."""
        tensor, device = torch.as_tensor(data), self.llm.embedding.weight.device
        return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)

    def inputs(self, batch, labels=None):
        """Embed the rows [bos] open P text close prompt (label). labels: token ids of each row's label, or None.

        Returns x (B, S, C), the rows' lengths (B,) on the CPU, after which comes padding, and the pseudo tokens
        (B, P, C).
        """
        B, texts = len(batch.text), [self.text_ids(text) for text in batch.text]
        rows = [text + self.after + label for text, label in zip(texts, labels or [[]] * B)]
        longest = max(map(len, rows))
        ids = self.put([row + [self.pad_id] * (longest - len(row)) for row in rows])
        x = self.llm.embed(ids)                                         # behind the pseudo tokens, (B, longest, C)
        n = self.put([[len(text)] for text in texts])                                             # (B, 1)
        is_text = torch.arange(max(map(len, texts)), device=x.device) < n                         # (B, Lt)
        mean = (x[:, :is_text.size(1)].float() * is_text[..., None]).sum(1) / n.clamp(min=1)      # (B, C)
        features = map(self.put, (batch.audio, batch.audio_len, batch.video, batch.video_len))
        pseudo = self.adapter(mean, *features)                                                    # (B, P, C)
        before = self.beginning.x.expand(B, -1, -1)
        x = torch.cat((before, pseudo.to(x.dtype), x), dim=1)                                     # (B, S, C)
        return x, torch.tensor([before.size(1) + pseudo.size(1) + len(row) for row in rows]), pseudo

    def pseudo_tokens(self, batch):
        """The pseudo tokens (B, P, C) of a batch."""
        return self.inputs(batch)[2]

    def loss(self, batch, recompute: int = 0):
        """Cross-entropy of the label's tokens, mean over a row's, then over rows. recompute: see LLM.forward."""
        labels = [self.tokenizer.encode(self.label_text(y)) for y in batch.label]
        x, lengths, _ = self.inputs(batch, labels)
        n = max(map(len, labels))
        target = self.put([[-100] * (n - len(ids)) + ids for ids in labels])                      # (B, n)
        past = self.beginning.length                                        # read once, for all rows
        x, lengths = x[:, past:], lengths - past
        at = self.put(lengths[:, None] - 1 - n + torch.arange(n))           # a position predicts the token after it
        hidden = self.llm(x, cache=self.beginning, recompute=recompute, at=at, lengths=lengths)   # (B, n, C)
        loss = F.cross_entropy(self.llm.logits(hidden).flatten(0, 1), target.flatten(), reduction="none")
        return (loss.view_as(target).sum(1) / (target >= 0).sum(1)).mean()     # 0 where the target is -100

    @torch.no_grad()
    def answer(self, batch) -> list[str]:
        """What the LLM writes after each row, greedily, up to the length of a label or its end token.

        official=True with ChatGLM3: each step after the first reads, after all that is cached already, not one new
        token but the whole row and all new tokens, as in the release under transformers 4.36.
        """
        x, lengths, _ = self.inputs(batch)
        mask = self.put(torch.arange(x.size(1)) < lengths[:, None])                               # (B, S)
        ids = self.llm.generate(x, self.answer_len, mask, self.eos_id, self.read_next, self.beginning).tolist()
        ends = [row.index(self.eos_id) if self.eos_id in row else len(row) for row in ids]
        return [self.tokenizer.decode(row[:end]) for row, end in zip(ids, ends)]

    def _reread(self, row, new):
        x = torch.cat((row, self.llm.embed(new)), dim=1)
        return x, torch.arange(x.size(1), device=x.device)[None]


# ---------------------------------------------------------------------------------------------------------------------
# Files


FORMAT = "mse-adapter 1"


def save_adapter(path, net: MultimodalLLM):
    """Write the adapter's tensors to one .safetensors file, with all that loading must check in its metadata."""
    meta = _identity(net.llm, net.task, net.official) | {"config": asdict(net.adapter.config)}
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in net.adapter.state_dict().items()}
    meta["sha256"] = _digest(meta, tensors)
    write_atomic(path, save(tensors, {"mse-adapter": json.dumps(meta)}))    # one key: the order of several is random


def _identity(llm, task, official: bool) -> dict:
    sizes = f"{llm.config.family}, {llm.config.n_layer} layers, width {llm.config.dim}, weights {llm.fingerprint}"
    return {"format": FORMAT, "backbone": sizes, "task": task.name, "mode": "official" if official else "default"}


def _digest(meta: dict, tensors: dict) -> str:
    numbers = b"".join(tensors[name].numpy().tobytes() for name in sorted(tensors))
    return hashlib.sha256(json.dumps([meta, sorted(tensors)], sort_keys=True).encode() + numbers).hexdigest()


def load_adapter(path, llm, tokenizer, task, official: bool = False) -> MultimodalLLM:
    """Read a file of save_adapter. Raises ValueError, with both values, if it was made for another backbone, task or
    mode, or if a tensor is missing, left over, misshapen or changed."""
    try:
        with safe_open(path, "pt") as file:
            meta = json.loads((file.metadata() or {}).get("mse-adapter", "{}"))
            tensors = {name: file.get_tensor(name) for name in list(file.keys())}
    except (SafetensorError, OSError, ValueError) as error:
        raise ValueError(f"{path}: not a saved adapter ({error})") from None
    for key, here in _identity(llm, task, official).items():
        if meta.get(key) != here:
            raise ValueError(f"{path}: the adapter's {key} is {meta.get(key)!r}, but here it is {here!r}")
    try:
        adapter = MSEAdapter(AdapterConfig(**meta["config"]))
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"{path}: the adapter's config cannot be read ({error!r}); save or train it again") from None
    _fill(adapter, tensors, path)
    if meta.pop("sha256", None) != _digest(meta, tensors):
        raise ValueError(f"{path}: its tensors are not those that were saved (sha256 differs); copy or train it again")
    return MultimodalLLM(llm, adapter.to(llm.embedding.weight.device), tokenizer, task, official)


def _fill(adapter: MSEAdapter, tensors: dict, path):
    wanted = adapter.state_dict()
    problems = [f"missing: {name}" for name in wanted if name not in tensors]
    problems += [f"unexpected: {name}" for name in tensors if name not in wanted]
    problems += [f"misshapen: {name} is {list(tensors[name].shape)}, expected {list(w.shape)}"
                 for name, w in wanted.items() if name in tensors and tensors[name].shape != w.shape]
    if problems:
        raise ValueError(f"{path}: the tensors do not fit the adapter:\n  " + "\n  ".join(problems))
    adapter.load_state_dict(tensors)


_MSF = "mutli_scale_fusion"                                             # the release's spelling
_LSTM = ("rnn.weight_ih_l0", "rnn.weight_hh_l0", "rnn.bias_ih_l0", "rnn.bias_hh_l0", "linear.weight", "linear.bias")
OFFICIAL_NAMES = {                                                      # our parameter -> the release's
    **{f"{m}.{part}": f"{m}_LSTM.{part}" for m in ("audio", "video") for part in _LSTM},
    **{f"{ours}.{kind}": f"{theirs}.{kind}" for kind in ("weight", "bias") for ours, theirs in {
        "mixer.text": "text_guide_mixer.text_mlp",
        **{f"fusion.scales.{i}.{j}": f"{_MSF}.scale{i + 1}.{j}" for i in range(3) for j in (0, 2)},
        "fusion.join": f"{_MSF}.integrating.Integrating_layer.0",
        "project": f"{_MSF}.multi_scale_projector",
        "spread": f"{_MSF}.projector"}.items()},
}


def load_official(path, config: AdapterConfig) -> MSEAdapter:
    """Read a state dict of the release, a .pth (names prefixed `Model.` or not). Raises ValueError as load_adapter."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:          # whatever a damaged or hostile file provokes, it was refused
        raise ValueError(f"{path}: not a state dict of tensors ({type(error).__name__}: {error})") from None
    if not isinstance(state, dict) or not all(
            isinstance(name, str) and isinstance(tensor, torch.Tensor) for name, tensor in state.items()):
        raise ValueError(f"{path}: not a state dict of tensors; expected the .pth that the release saves")
    ours = {theirs: name for name, theirs in OFFICIAL_NAMES.items()}
    state = {name.removeprefix("Model."): tensor for name, tensor in state.items() if not name.endswith("inv_freq")}
    tensors = {ours.get(name, name): tensor for name, tensor in state.items()}
    join = tensors.get("fusion.join.weight")
    if join is not None and join.shape == (1, 1, 1, 3):                 # the convolution's, against our (1, 3)
        tensors["fusion.join.weight"] = join[0, 0]
    adapter = MSEAdapter(config)
    _fill(adapter, tensors, path)
    return adapter
