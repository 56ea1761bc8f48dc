"""What only the release does: the names of its parameters, and how its ChatGLM3 decodes."""
from itertools import product

import torch

from model import KVCache

LSTM_PARTS = ("rnn.weight_ih_l0", "rnn.weight_hh_l0", "rnn.bias_ih_l0", "rnn.bias_hh_l0")
OFFICIAL_LAYERS = {                     # our layer: the release's; the misspelling is theirs
    "audio.linear": "audio_LSTM.linear",
    "video.linear": "video_LSTM.linear",
    "mixer.text": "text_guide_mixer.text_mlp",
    **{f"fusion.scales.{i}.{j}": f"mutli_scale_fusion.scale{i + 1}.{j}"
       for i, j in product(range(3), (0, 2))},
    "fusion.join": "mutli_scale_fusion.integrating.Integrating_layer.0",
    "project": "mutli_scale_fusion.multi_scale_projector",
    "spread": "mutli_scale_fusion.projector",
}
OFFICIAL_NAMES = {                      # our parameter: the release's
    **{f"{kind}.{part}": f"{kind}_LSTM.{part}" for kind, part in product(("audio", "video"), LSTM_PARTS)},
    **{f"{ours}.weight": f"{theirs}.weight" for ours, theirs in OFFICIAL_LAYERS.items()},
    **{f"{ours}.bias": f"{theirs}.bias" for ours, theirs in OFFICIAL_LAYERS.items()},
}

@torch.no_grad()
def reread(llm, before: list[int], x, steps: int):
    """The release's ChatGLM3 (transformers 4.36): each step reads the whole row, the ids `before` and x
    (B, T, C), and all new tokens again, from position 0 on, and still sees what all steps before it read.

    Returns the new ids, (B, steps).
    """
    before = torch.tensor([before] * len(x), device=x.device)
    row = torch.cat((llm.embed(before), x), dim=1)                                              # (B, S, C)
    cache = KVCache(llm.config.n_layer)
    new = torch.empty(len(row), 0, dtype=torch.long, device=row.device)
    for _ in range(steps):
        cache.origin = cache.length
        hidden = llm(torch.cat((row, llm.embed(new)), dim=1), cache=cache, last=1)              # (B, 1, C)
        new = torch.cat((new, llm.logits(hidden).argmax(dim=-1)), dim=1)
    return new

def read_official(path) -> dict:
    """The tensors of a .pth of the release by our names; `Model.` in front of theirs does not count."""
    ours, tensors = {theirs: name for name, theirs in OFFICIAL_NAMES.items()}, {}
    for name, tensor in torch.load(path, map_location="cpu", weights_only=True).items():
        name = name.removeprefix("Model.")
        if name.endswith("Integrating_layer.0.weight") and tensor.shape == (1, 1, 1, 3):
            tensor = tensor[0, 0]                       # the convolution's, against our (1, 3)
        if not name.endswith("inv_freq"):               # a table of the frozen LLM's
            tensors[ours.get(name, name)] = tensor
    return tensors
