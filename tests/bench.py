"""Time training steps, answers and loading, beside the same work done through `transformers` as the release does it.

    python tests/bench.py --llm ../shared/weights/stories260K --data-dir ../shared/data --rounds 40
    python tests/bench.py --shape 100m --tokenizer ../shared/tokenizers/llama2 --data-dir ../shared/data --batch 4
    python tests/bench.py --shape llama2-7b --device cuda --dtype bfloat16 --batch 8 --recompute 32 --peak 989
    python tests/bench.py --shape 100m --scaling            cost by rows and tokens, memory by recomputed blocks

Three ways train on as many rows and answer as many, in turn, so that a noisy machine hurts all alike:
    default     this repository: real tokens only; answers with --eval-batch rows of like length
    official    this repository, on the release's rows
    release     transformers, on the release's rows: padded to the fixed length, in random order, --batch rows at a time
                also when answering, logits over the whole vocabulary at every position of a row (as its transformers
                4.36 computed them in `generate`, too)
default and official share the weights with release. TFLOP/s count 4 FLOP per weight of the blocks and token (forward 2,
backward to the activations 2), 6 with recomputation, 2 when answering.
"""
import argparse
import resource
import sys
import time
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from adapter import AdapterConfig, MSEAdapter, MultimodalLLM  # noqa: E402
from data import HERE, TASKS, collate, epoch_rows, load_split, load_tokenizer, preset  # noqa: E402
from eval import rows_by_length  # noqa: E402
from model import LLM, NAMES, Config, _sources, load_llm  # noqa: E402
from train import Settings, train_step  # noqa: E402

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
    twin.model.rotary_emb = type(rotary)(config=config).to(llm.embed.weight.device)
    return twin.requires_grad_(False).eval()


class Release(MultimodalLLM):
    """The release's way: every position goes through the head; the loss and the next token need few of them."""

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
        ids = self.twin.generate(inputs_embeds=x, attention_mask=mask, max_new_tokens=self.answer_len, do_sample=False,
                                 logits_to_keep=0)              # 0: of every position, as all versions once did
        return [self.tokenizer.decode(row) for row in ids.tolist()]


def synchronize(device: str):
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)


def measure(ways: dict, rounds: dict, work, device: str) -> tuple[dict, dict]:
    """Seconds and results of `work(name, net, batch)` by way. rounds: each way's list of lists of batches; the ways
    take turns, and the first round, which warms up, does not count."""
    seconds, results = dict.fromkeys(ways, 0.0), {name: [] for name in ways}
    for i in range(len(rounds["default"])):
        for name, net in ways.items():
            synchronize(device)
            began = time.perf_counter()
            results[name] += [work(name, net, batch) for batch in rounds[name][i]]
            synchronize(device)
            seconds[name] += (time.perf_counter() - began) * (i > 0)
    return seconds, results


def report(title: str, ways: dict, rounds: dict, seconds: dict, flops: int, peak: float):
    """A line per way: its rates, and its time for a row as a share of the release's."""
    print(f"{title:9}  rows   seconds   rows/s  tokens/s  tokens/row  TFLOP/s{'  of peak' * bool(peak)}  of release")
    for name, net in reversed(ways.items()):
        batches = [batch for part in rounds[name][1:] for batch in part]
        rows, took = sum(len(batch.text) for batch in batches), seconds[name]
        with torch.no_grad():
            tokens = sum(int(net.inputs(batch)[1].sum()) for batch in batches)     # the release's pads count
        if name == "release":
            slowest = took / rows
        weights = sum(p.numel() for block in net.llm.blocks for p in block.parameters())
        rate = flops * weights * tokens / took / 1e12
        print(f"{name:9}{rows:6}{took:10.2f}{rows / took:9.1f}{tokens / took:10.0f}{tokens / rows:12.1f}{rate:9.3f}"
              f"{f'{rate / peak:9.1%}' if peak else ''}{f'{took / rows / slowest:12.2f}' if 'release' in ways else ''}")


def compare(llm, tokenizer, task, args):
    """Train and answer in each way."""
    splits = {split: load_split(task, args.data_dir or HERE / task.home, split) for split in ("train", "test")}
    p = preset(task, llm.config.family)
    config = AdapterConfig(llm.config.dim, splits["train"].audio[0].shape[1], splits["train"].video[0].shape[1],
                           p.audio_hidden, p.video_hidden, p.pseudo_tokens)
    ways = {}
    for name in ("default", "official") + (() if args.alone else ("release",)):
        torch.manual_seed(0)
        adapter, kind = MSEAdapter(config).to(args.device), Release if name == "release" else MultimodalLLM
        ways[name] = kind(llm, adapter, tokenizer, task, official=name != "default")
    if not args.alone:
        object.__setattr__(ways["release"], "twin", transformers_twin(llm))     # no submodule: the weights are llm's
    optimizers = {name: torch.optim.AdamW(net.adapter.parameters(), lr=1e-4, eps=1e-4) for name, net in ways.items()}
    scaler = torch.amp.GradScaler(args.device.split(":")[0], enabled=False)

    def rounds(split, size, seed):
        """For each way so many rounds: the first ones of an epoch, or some from the whole range of lengths."""
        found = {}
        for name, net in ways.items():
            ours = seed is None and name != "release"
            order = rows_by_length(net, split, size) if ours else epoch_rows(len(split), size, seed)
            n = len(order) if seed is None else args.rounds
            picked = [order[int((i + 0.5) * n / args.rounds)] for i in range(args.rounds)]
            parts = [[rows[i:i + args.batch] for i in range(0, size, args.batch)] if name == "release" else [rows]
                     for rows in [picked[0], *picked]]
            found[name] = [[collate(split, rows) for rows in part if rows] for part in parts]
        return found

    def step(name, net, batch):
        return float(train_step(net, optimizers[name], scaler, batch, args.recompute))

    work = rounds(splits["train"], args.batch, 1)
    seconds, losses = measure(ways, work, step, args.device)
    report("training", ways, work, seconds, 6 if args.recompute else 4, args.peak)
    if not args.alone:
        gap = max(abs(a - b) for a, b in zip(losses["official"], losses["release"], strict=True))
        print(f"losses of official and release differ by at most {gap:.1e}")
    work = rounds(splits["test"], args.eval_batch, None)
    seconds, _ = measure(ways, work, lambda name, net, batch: net.answer(batch), args.device)
    report("answers", ways, work, seconds, 2, args.peak)
    print(f"peak memory {peak_bytes(args.device) / 2**30:.2f} GiB")


def kept_bytes(module, run) -> int:
    """Bytes that autograd keeps for the backward of what `run()` returns, the module's own weights aside."""
    kept = {}

    def keep(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        _ = run()                                   # while it lives, so does what is kept
    weights = {p.untyped_storage().data_ptr() for p in module.parameters()}
    return sum(n for at, n in kept.items() if at not in weights)


def peak_bytes(device: str) -> int:
    """The most memory used so far: the GPU's, or else this process's."""
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def scaling(llm, device: str):
    """Cost of a forward and backward through the backbone, by rows and tokens, and its memory by recomputed blocks."""
    def run(rows, tokens, recompute=0):
        x = torch.zeros(rows, tokens, llm.config.dim, dtype=llm.embed.weight.dtype, device=device)
        x = x.normal_().requires_grad_()
        at = torch.tensor([[tokens - 2, tokens - 1]] * rows, device=device)
        llm(x, recompute=recompute, at=at).float().sum().backward()

    def seconds(*shape):
        run(*shape)
        synchronize(device)
        began = time.perf_counter()
        run(*shape), run(*shape), synchronize(device)
        return (time.perf_counter() - began) / 2

    sizes = [n for n in (64, 128, 256, 512) if n <= llm.config.max_len]
    print("microseconds per token, forward and backward\nrows " + "".join(f"{n:6} tokens" for n in sizes))
    for rows in (1, 2, 4, 8):
        print(f"{rows:4} " + "".join(f"{1e6 * seconds(rows, n) / rows / n:13.1f}" for n in sizes))
    print("8 rows of 200 tokens\nrecomputed blocks   kept for backward   forward and backward")
    layers = llm.config.n_layer
    x = torch.zeros(8, 200, llm.config.dim, dtype=llm.embed.weight.dtype, device=device).requires_grad_()
    for k in sorted({0, layers // 4, layers // 2, 3 * layers // 4, layers}):
        kept = kept_bytes(llm, partial(llm, x, recompute=k))
        print(f"{k:17} {kept / 2**20:15.0f} MiB {seconds(8, 200, k):20.2f} s")


def load(folder, device: str, dtype) -> LLM:
    """Load a checkpoint, and say how long that takes beside copying as many bytes."""
    began = time.perf_counter()
    llm = load_llm(folder, device, dtype)
    synchronize(device)
    took, size = time.perf_counter() - began, sum(file.stat().st_size for file in Path(folder).glob("*.safetensors"))
    block = torch.ones(min(size, 1 << 28), dtype=torch.uint8)
    began = time.perf_counter()
    block.to(device, copy=True)
    synchronize(device)
    copy = (time.perf_counter() - began) * size / block.numel()
    print(f"load_llm: {size / 1e9:.2f} GB in {took:.2f} s; copying as much takes {copy:.2f} s")
    return llm


def parse():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--llm", help="checkpoint folder [the demo's]")
    parser.add_argument("--shape", choices=SHAPES, help="a published shape with random weights instead")
    parser.add_argument("--tokenizer", help="folder of the tokenizer for --shape [the demo's]")
    parser.add_argument("--data", default="meld", choices=TASKS)
    parser.add_argument("--data-dir", help="folder with the published files [the task's]")
    parser.add_argument("--batch", type=int, default=16, help="rows of a training step [16]")
    parser.add_argument("--eval-batch", type=int, default=Settings.eval_batch,
                        help=f"rows when answering, in our ways [{Settings.eval_batch}]")
    parser.add_argument("--rounds", type=int, default=10, help="training steps, and batches of --eval-batch [10]")
    parser.add_argument("--recompute", type=int, default=0, help="blocks that recompute, in our ways")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--peak", type=float, default=0, help="the device's dense peak in TFLOP/s")
    parser.add_argument("--alone", action="store_true", help="without transformers")
    parser.add_argument("--scaling", action="store_true", help="cost by rows and tokens, memory by recomputed blocks")
    return parser.parse_args()


def main():
    args = parse()
    dtype, folder = getattr(torch, args.dtype), args.llm or HERE / "demo" / "llm"
    llm = random_llm(args.shape, args.device, dtype) if args.shape else load(folder, args.device, dtype)
    print(f"{args.shape or folder}: {sum(p.numel() for p in llm.parameters()):,} parameters, {args.dtype} on "
          f"{args.device}, {torch.get_num_threads()} threads, batch {args.batch}")
    if args.scaling:
        scaling(llm, args.device)
    else:
        compare(llm, load_tokenizer(args.tokenizer or folder), TASKS[args.data], args)


if __name__ == "__main__":
    main()
