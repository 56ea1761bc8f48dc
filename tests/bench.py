"""Time training steps and answers, and compare with the same work through `transformers` as the release does it.

    python tests/bench.py --llm ../shared/weights/stories260K --data-dir ../shared/data --batch 16 --steps 20
    python tests/bench.py --shape 100m --tokenizer ../shared/tokenizers/llama2 --data-dir ../shared/data --steps 3
    python tests/bench.py --shape llama2-7b --device cuda --dtype bfloat16 --batch 8 --recompute 32

Three ways do the same rows in turn, step by step, so that a noisy machine hurts all alike: `default` and `official`
are this repository's modes; `release` is a transformers model of the same weights on the official rows: padded to the
fixed length, logits over the whole vocabulary at every position. TFLOP/s count 4 FLOP per weight and token (forward 2,
backward to the activations 2), 6 with recomputation, 2 when answering.
"""
import argparse
import statistics
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from adapter import AdapterConfig, MSEAdapter, MultimodalLLM  # noqa: E402
from data import HERE, TASKS, batches, load_split, load_tokenizer, preset  # noqa: E402
from model import LLM, NAMES, Config, _sources, load_llm  # noqa: E402
from train import peak_bytes, train_step  # noqa: E402

SHAPES = {      # layers, width, heads, MLP, vocabulary; all as a LLaMA, whose work is theirs
    "100m": (12, 768, 12, 2048, 32000), "llama2-7b": (32, 4096, 32, 11008, 32000),
    "qwen-1.8b": (24, 2048, 16, 5504, 151936), "chatglm3-6b": (28, 4096, 32, 13696, 65024),
}


def random_llm(shape: str, device: str, dtype) -> LLM:
    """A backbone of a published shape with small random weights."""
    layers, dim, heads, ffn, vocab = SHAPES[shape]
    with torch.device("meta"):
        head = dim // heads
        llm = LLM(Config("llama", dim, layers, heads, heads, head, ffn, vocab, 4096, 1e-5, rope_dim=head))
    generator = torch.Generator(device).manual_seed(0)
    weights = {}
    for name, p in llm.state_dict().items():
        weights[name] = torch.empty(p.shape, device=device, dtype=dtype)
        weights[name].fill_(1) if p.dim() == 1 else weights[name].normal_(0, 0.02, generator=generator)
    llm.load_state_dict(weights, assign=True)
    return llm.requires_grad_(False)


def transformers_twin(llm: LLM):
    """The same weights in a transformers LLaMA with its default attention."""
    from transformers import LlamaConfig, LlamaForCausalLM
    c = llm.config
    config = LlamaConfig(
        vocab_size=c.vocab_size, hidden_size=c.dim, intermediate_size=c.ffn_dim, num_hidden_layers=c.n_layer,
        num_attention_heads=c.n_head, num_key_value_heads=c.n_kv_head, rms_norm_eps=c.norm_eps,
        max_position_embeddings=c.max_len, tie_word_embeddings=False, bos_token_id=1, eos_token_id=2, pad_token_id=0)
    with torch.device("meta"):
        twin = LlamaForCausalLM(config)
    weights = {}
    for name, tensor in llm.state_dict().items():
        sources = _sources(c.family, name)
        heights = [c.n_head, c.n_kv_head, c.n_kv_head] if len(sources) == 3 else [1] * len(sources)
        sizes = [len(tensor) * h // sum(heights) for h in heights]
        weights.update(zip(sources, tensor.split(sizes)))
    assert len(weights) >= len(NAMES["llama"])
    twin.load_state_dict(weights, assign=True)
    rotary = twin.model.rotary_emb                          # its tables are no part of the state: make them for real
    twin.model.rotary_emb = type(rotary)(config=config).to(llm.embedding.weight.device)
    return twin.requires_grad_(False).eval()


class Release(MultimodalLLM):
    """The release's way: every position goes through the head, and the loss looks at the label's alone."""

    def loss(self, batch, recompute: int = 0):
        labels = [self.tokenizer.encode(self.label_text(y)) for y in batch.label]
        x, _, _ = self.inputs(batch, labels)
        target = torch.full(x.shape[:2], -100, device=x.device)
        for row, ids in zip(target, labels):
            row[-len(ids):] = torch.tensor(ids)
        logits = self.twin(inputs_embeds=x).logits[:, :-1].float()                                # (B, S - 1, V)
        return F.cross_entropy(logits.flatten(0, 1), target[:, 1:].flatten())

    @torch.no_grad()
    def answer(self, batch):
        x, _, _ = self.inputs(batch)
        mask = torch.ones(x.shape[:2], dtype=torch.long, device=x.device)
        return self.twin.generate(inputs_embeds=x, attention_mask=mask, max_new_tokens=self.answer_len, do_sample=False)


def synchronize(device: str):
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)


def measure(ways: dict, rounds: list, work, device: str) -> dict:
    """Seconds of `work(net, batch)` for each way and round, the ways in turn; the first round warms up."""
    seconds, results = {name: [] for name in ways}, {name: [] for name in ways}
    for batch in rounds:
        for name, net in ways.items():
            synchronize(device)
            began = time.perf_counter()
            results[name].append(work(name, net, batch))
            synchronize(device)
            seconds[name].append(time.perf_counter() - began)
    return {name: times[1:] for name, times in seconds.items()}, results


def report(title: str, seconds: dict, rounds: list, ways: dict, flops: int, weights: int):
    """One line per way: medians, rates, and the ratio to the release's way, step by step."""
    print(f"{title}: median of {len(rounds) - 1} batches of {len(rounds[0].text)} rows")
    for name, times in seconds.items():
        tokens = [net_tokens(ways[name], batch) for batch in rounds[1:]]
        rate = sum(tokens) / sum(times)
        ratio = statistics.median(a / b for a, b in zip(times, seconds["release"])) if "release" in seconds else 1.0
        rows = sum(len(batch.text) for batch in rounds[1:]) / sum(times)
        print(f"  {name:9} {statistics.median(times):8.3f} s  {rows:8.1f} rows/s  {rate:9.0f} tokens/s  "
              f"{flops * weights * rate / 1e12:7.3f} TFLOP/s  {ratio:5.2f} of release")


def net_tokens(net, batch) -> int:
    """Positions that the backbone computes, padding included."""
    with torch.no_grad():
        return net.inputs(batch)[0].shape[:2].numel()


def parse():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--llm", help="checkpoint folder [the demo's]")
    parser.add_argument("--shape", choices=SHAPES, help="a published shape with random weights instead")
    parser.add_argument("--tokenizer", help="folder of the tokenizer for --shape [the demo's]")
    parser.add_argument("--data", default="meld", choices=TASKS)
    parser.add_argument("--data-dir", help="folder with the published files [the task's]")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--recompute", type=int, default=0, help="blocks that recompute, in this repository's ways")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--alone", action="store_true", help="without transformers")
    return parser.parse_args()


def main():
    args = parse()
    task, dtype = TASKS[args.data], getattr(torch, args.dtype)
    folder = args.llm or HERE / "demo" / "llm"
    began = time.perf_counter()
    llm = random_llm(args.shape, args.device, dtype) if args.shape else load_llm(folder, args.device, dtype)
    weights = sum(p.numel() for block in llm.blocks for p in block.parameters())
    print(f"{args.shape or folder}: {sum(p.numel() for p in llm.parameters()):,} parameters on {args.device}, "
          f"{torch.get_num_threads()} threads, ready in {time.perf_counter() - began:.1f} s")
    tokenizer = load_tokenizer(args.tokenizer or folder)
    train = load_split(task, args.data_dir or HERE / task.home, "train")
    p = preset(task, "llama")
    config = AdapterConfig(llm.config.dim, train.audio[0].shape[1], train.video[0].shape[1], p.audio_hidden,
                           p.video_hidden, p.pseudo_tokens)
    ways, twin = {}, None if args.alone else transformers_twin(llm)
    for name, kind, official in (("default", MultimodalLLM, False), ("official", MultimodalLLM, True),
                                 ("release", Release, True)):
        if name == "release" and args.alone:
            continue
        torch.manual_seed(0)
        ways[name] = kind(llm, MSEAdapter(config).to(args.device), tokenizer, task, official)
        if name == "release":
            object.__setattr__(ways[name], "twin", twin)    # not a submodule: its weights are the backbone's
    optimizers = {name: torch.optim.AdamW(net.adapter.parameters(), eps=1e-4) for name, net in ways.items()}
    scaler = torch.amp.GradScaler(args.device.split(":")[0], enabled=False)
    rounds = [batch for _, batch in zip(range(args.steps + 1), batches(train, args.batch, seed=1))]

    def step(name, net, batch):
        return float(train_step(net, optimizers[name], scaler, [batch], 1e-4, args.recompute))

    seconds, losses = measure(ways, rounds, step, args.device)
    report("training", seconds, rounds, ways, 6 if args.recompute else 4, weights)
    if "release" in losses:
        gap = max(abs(a - b) for a, b in zip(losses["official"], losses["release"]))
        print(f"  losses of official and release differ by at most {gap:.1e}")
    seconds, _ = measure(ways, rounds, lambda name, net, batch: net.answer(batch), args.device)
    report("answers", seconds, rounds, ways, 2, weights)
    print(f"peak memory {peak_bytes(args.device) / 2**30:.2f} GiB")


if __name__ == "__main__":
    main()
