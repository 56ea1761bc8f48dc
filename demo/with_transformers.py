"""Any causal language model of `transformers` as the backbone: Gemma, Phi, a model in 4 bits, ...

    pip install transformers            4.56 or later; for a tokenizer.model protobuf, too
    python demo/with_transformers.py train --data meld --llm google/gemma-2-2b --download
    python demo/with_transformers.py eval RUN

Behind `train` and `eval` stand the flags of train.py and eval.py; a run of this script is evaluated by this
script. A family that data.py does not know is spoken to as LLaMA2, with its own special tokens. A model in
4 bits is one whose config.json says so, from the hub or made once (pip install accelerate bitsandbytes):

    bits = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.bfloat16)
    AutoModelForCausalLM.from_pretrained(NAME, quantization_config=bits).save_pretrained(FOLDER)
    AutoTokenizer.from_pretrained(NAME).save_pretrained(FOLDER)

Shapes as in model.py. The model must take `inputs_embeds` and `position_ids`, as nearly all do.
"""
import copy
import hashlib
import inspect
import sys
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import torch.nn as nn
from torch.utils.checkpoint import checkpoint
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import eval  # noqa: E402
import train  # noqa: E402
from adapter import AdapterError  # noqa: E402
from model import LLM, CheckpointError, KVCache, bit_sums, find_tensors  # noqa: E402
from support.files import DataError, UserError, brief, read_json  # noqa: E402
from support.guards import run_program  # noqa: E402
from support.tokenizers import whole_characters  # noqa: E402


@contextmanager
def reading(path):
    """Raise CheckpointError for whatever keeps transformers from reading a folder."""
    try:
        yield
    except Exception as error:
        raise CheckpointError(f"{path}: transformers cannot use it ({brief(error)[:300]}); expected the "
                              "folder of a causal language model, with its tokenizer") from None


@dataclass(frozen=True)
class Sizes:
    """What train.py and eval.py ask of model.Config."""
    family: str             # model_type in config.json
    dim: int
    n_layer: int
    n_head: int
    head_dim: int
    ffn_dim: int
    vocab_size: int
    max_len: int

    @classmethod
    def from_dir(cls, path) -> "Sizes":
        """Read `path`/config.json. Raises CheckpointError if transformers does not know the family."""
        with reading(path):
            config = AutoConfig.from_pretrained(path, trust_remote_code=False)      # nothing in it is run
            text = config.get_text_config()             # of a model that sees, too, the part that reads
            dim = text.hidden_size
            n_head = text.num_attention_heads
            return cls(
                family=config.model_type,
                dim=dim,
                n_layer=text.num_hidden_layers,
                n_head=n_head,
                head_dim=getattr(text, "head_dim", None) or dim // n_head,
                ffn_dim=getattr(text, "intermediate_size", None) or 4 * dim,
                vocab_size=text.vocab_size,
                max_len=text.max_position_embeddings)


class TransformersLLM(nn.Module):
    """A frozen model of transformers with all that adapter.py wants of an LLM.

    Its "hidden states" are the scores of the next token already: what a family does between its last state
    and its scores, such as Gemma's soft cap, is its own affair.
    """
    generate = LLM.generate             # which needs embed, forward and logits alone
    bit_sums = LLM.bit_sums

    def __init__(self, model, config: Sizes, fingerprint: str):
        super().__init__()
        self.model = model.requires_grad_(False)        # frozen
        self.config = config
        self.fingerprint = fingerprint
        self.embed = model.get_input_embeddings()       # token ids (B, T) -> (B, T, C)
        self.blocks = []                # transformers has no one name for them
        for part in model.modules():
            if isinstance(part, nn.ModuleList) and len(part) == config.n_layer and not self.blocks:
                self.blocks = list(part)
        self.recomputed = 0             # how many of them compute themselves again in backward
        takes = inspect.signature(type(model).forward).parameters
        self.past = "cache" if "cache" in takes else "past_key_values"      # its older name
        self.train()

    def train(self, mode: bool = True):
        """Frozen is without dropout, too, when the net around it trains."""
        return super().train(False)

    def logits(self, hidden):
        """What forward returns, (..., V), in fp32."""
        return hidden.float()

    def forward(self, x, mask=None, cache: KVCache | None = None, recompute=0, last=None, positions=None):
        """Embeddings (B, T, C) -> scores of the next token, (B, T or last, V). The arguments are those of
        model.LLM. Raises CheckpointError if a row is longer than those that the backbone was trained for."""
        assert positions is None, "only ChatGLM3 reads its rows again"
        T = x.size(1)
        if mask is None:
            mask = torch.ones(x.shape[:2], dtype=torch.bool, device=x.device)
        past = None
        if cache is not None:
            mask = cache.mark(mask)                                             # (B, S)
            past = copy.deepcopy(cache.layers[0])       # it is written into, but label scoring goes back
        if mask.size(1) > self.config.max_len:
            raise CheckpointError(f"a row has {mask.size(1)} positions, but the backbone was trained for "
                                  f"{self.config.max_len}; shorten the text or take another backbone")
        # Such a block keeps only its inputs for backward. It stays so: where none follows, nothing changes.
        for block in self.blocks[self.recomputed:recompute]:
            block.forward = partial(checkpoint, block.forward, use_reentrant=False)
            self.recomputed += 1
        positions = mask.cumsum(dim=1)[:, -T:] - 1      # real positions in front of each
        output = self.model(
            inputs_embeds=x,
            attention_mask=mask.long(),
            position_ids=positions.clamp(min=0),        # padding has none
            use_cache=cache is not None,
            logits_to_keep=last or 0,                   # 0: all
            **{self.past: past})
        if cache is not None:
            cache.layers[0] = output[self.past]         # of all layers
        return output.logits


class Tokenizer:
    """A tokenizer of transformers, like those of support/tokenizers.py."""

    def __init__(self, path):
        self.path = path
        with reading(path):
            self.inner = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
        self.special = {}               # name -> id
        for i, token in self.inner.added_tokens_decoder.items():
            if token.special:           # Gemma adds "<h1>", which is none
                self.special[token.content] = i
        self.names = {"bos": self.inner.bos_token, "eos": self.inner.eos_token, "pad": self.inner.pad_token}
        # Other special tokens never come up: Gemma 3 has one for pictures, behind the embeddings' end.
        used = [self.special[name] for name in self.names.values() if name in self.special]
        self.size = max([self.inner.vocab_size - 1, *used]) + 1

    def encode(self, text: str) -> list[int]:
        text = whole_characters(text)
        return self.inner(text, add_special_tokens=False, split_special_tokens=True).input_ids

    def decode(self, ids: list[int]) -> str:
        return self.inner.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)

    def token_id(self, name: str) -> int:
        if name not in self.special:
            raise DataError(f"{self.path} has no special token {name!r}, only {list(self.special)!s:.300}")
        return self.special[name]


def load_llm(path, device="cpu", dtype=torch.float32) -> TransformersLLM:
    """A checkpoint folder as a frozen backbone. Raises CheckpointError if a weight is missing."""
    if dtype == torch.int8:
        raise UserError("--dtype int8 is model.py's own; take a checkpoint that is quantised on disk")
    config = Sizes.from_dir(path)
    seal = hashlib.sha256()
    for name, (_, tensor) in sorted(find_tensors(Path(path)).items()):
        seal.update(name.encode())
        seal.update(bit_sums(torch.atleast_1d(tensor)).numpy().tobytes())
    quantised = "quantization_config" in read_json(Path(path, "config.json"))
    place = device if quantised else None               # such a model can hardly be moved later
    with reading(path):
        model, info = AutoModelForCausalLM.from_pretrained(
            path, dtype=dtype, device_map=place, output_loading_info=True, trust_remote_code=False)
    if info["missing_keys"]:            # transformers makes up numbers for them
        raise CheckpointError(f"{path}: without {sorted(info['missing_keys'])!s:.300}; fetch the whole model")
    if not quantised:
        model.to(device)
    return TransformersLLM(model, config, f"{seal.hexdigest()[:16]} in transformers")


def take_over():
    """From here on train.py and eval.py load their backbones and tokenizers by transformers."""
    train.Config = Sizes
    for program in (train, eval):
        program.load_llm = load_llm
        program.load_tokenizer = Tokenizer
    eval.CODE = (*eval.CODE, "demo/with_transformers.py")       # it shapes a run, too


def main():
    if sys.argv[1:2] not in (["train"], ["eval"]):
        raise UserError("expected: with_transformers.py train ..., or with_transformers.py eval RUN ...; the "
                        "flags are those of train.py and eval.py")
    program = {"train": train, "eval": eval}[sys.argv.pop(1)]
    take_over()
    return program.main()


if __name__ == "__main__":
    run_program(main, CheckpointError, AdapterError)
