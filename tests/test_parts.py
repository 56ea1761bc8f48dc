"""Encoder, mixer and fusion, each alone, against what the authors' release computed for four rows of MELD."""
import json

import pytest
import torch
from conftest import HERE, close, random_adapter, recipe
from safetensors.torch import load_file

from adapter import AdapterConfig

pytestmark = pytest.mark.release
GOLDEN = HERE / "golden"
INFO = json.loads((GOLDEN / "llama2-meld-a.json").read_text(encoding="utf-8"))
OUT = load_file(GOLDEN / "llama2-meld-a.safetensors")
LLM = json.loads((GOLDEN / "config" / "llama2.json").read_text())


@pytest.fixture(scope="module")
def adapter():
    sizes = [INFO[key] for key in ("audio_dim", "video_dim", "audio_hidden", "video_hidden", "pseudo_tokens")]
    return random_adapter(AdapterConfig(LLM["hidden_size"], *sizes)).requires_grad_(False)


@pytest.mark.parametrize("kind, frames", [("audio", INFO["seq_lens"][1]), ("video", INFO["seq_lens"][2])])
def test_encoder(adapter, kind, frames):
    """(4, frames, features) -> (4, 256). Behind a row's length stands noise here, in the recording zeros."""
    features = recipe(f"{INFO['tag']}.{kind}", (4, frames, INFO[f"{kind}_dim"]), 1.0)
    close(adapter.get_submodule(kind)(features, OUT[f"{kind}_len"]), OUT[f"{kind}_h"])


def test_encoder_of_no_frames(adapter):
    """Without any real frame the state is 0, and x = b."""
    x = adapter.audio(torch.ones(1, 3, INFO["audio_dim"]), torch.tensor([0]))
    close(x[0], adapter.audio.linear.bias)


def test_mixer(adapter):
    """(4, C), (4, 256), (4, 256) -> (4, 256)"""
    embeddings = recipe("llama2.model.embed_tokens.weight", (LLM["vocab_size"], LLM["hidden_size"]), 0.5)
    mean = embeddings[OUT["text_ids"]].mean(dim=1)          # of all 65: in the release pads count
    close(adapter.mixer(mean, OUT["audio_h"], OUT["video_h"]), OUT["mixed"])


def test_fusion(adapter):
    """(4, 256) -> (4, 256), and on through the projector to the pseudo tokens (4, P, C)."""
    h = adapter.project(adapter.fusion(OUT["mixed"]))
    pseudo = adapter.spread(h[..., None]).transpose(1, 2)
    close(pseudo, OUT["pseudo_tokens"])
