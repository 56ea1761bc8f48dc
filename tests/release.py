"""The authors' release: its names of the adapter's parameters, and how to read an adapter that it saved."""
import torch

from adapter import AdapterConfig, AdapterError, MSEAdapter

OFFICIAL_LAYERS = {                     # our layer: the release's; the misspelling is theirs
    "audio.linear": "audio_LSTM.linear",
    "video.linear": "video_LSTM.linear",
    "mixer.text": "text_guide_mixer.text_mlp",
    "fusion.scales.0.0": "mutli_scale_fusion.scale1.0",
    "fusion.scales.0.2": "mutli_scale_fusion.scale1.2",
    "fusion.scales.1.0": "mutli_scale_fusion.scale2.0",
    "fusion.scales.1.2": "mutli_scale_fusion.scale2.2",
    "fusion.scales.2.0": "mutli_scale_fusion.scale3.0",
    "fusion.scales.2.2": "mutli_scale_fusion.scale3.2",
    "fusion.join": "mutli_scale_fusion.integrating.Integrating_layer.0",
    "project": "mutli_scale_fusion.multi_scale_projector",
    "spread": "mutli_scale_fusion.projector",
}
OFFICIAL_NAMES = {}                     # our parameter: the release's
for ours, theirs in OFFICIAL_LAYERS.items():
    OFFICIAL_NAMES[f"{ours}.weight"] = f"{theirs}.weight"
    OFFICIAL_NAMES[f"{ours}.bias"] = f"{theirs}.bias"
for kind in ("audio", "video"):
    for part in ("weight_ih_l0", "weight_hh_l0", "bias_ih_l0", "bias_hh_l0"):
        OFFICIAL_NAMES[f"{kind}.rnn.{part}"] = f"{kind}_LSTM.rnn.{part}"


def read_official(path) -> dict:
    """The tensors of a .pth of the release by our names; `Model.` in front of theirs does not count."""
    our_names = {theirs: ours for ours, theirs in OFFICIAL_NAMES.items()}
    tensors = {}
    for name, tensor in torch.load(path, map_location="cpu", weights_only=True).items():
        name = name.removeprefix("Model.")
        if name.endswith("inv_freq"):
            continue                                    # a table of the frozen LLM's
        if name.endswith("Integrating_layer.0.weight") and tensor.shape == (1, 1, 1, 3):
            tensor = tensor[0, 0]                       # the convolution's, against our (1, 3)
        tensors[our_names.get(name, name)] = tensor
    return tensors


def load_official(path, config: AdapterConfig) -> MSEAdapter:
    """Read a state dict of the release, a .pth. Raises AdapterError."""
    adapter = MSEAdapter(config)
    try:
        adapter.load_state_dict(read_official(path))
    except Exception as error:          # whatever a damaged or hostile file provokes, it was refused
        reason = " ".join(str(error)[:400].split())
        raise AdapterError(f"{path}: no state dict of tensors as the release saves ({reason})") from None
    return adapter
