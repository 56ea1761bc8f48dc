"""Time training steps and answers, beside the same work done through `transformers`.

    python tests/bench.py --llm PATH --data-dir DIR --rounds 40
    python tests/bench.py --shape 100m --tokenizer PATH --data-dir DIR --batch 4
    python tests/bench.py --shape llama2-7b --device cuda --dtype bfloat16 --batch 8 --recompute 31
    python tests/bench.py --shape 100m --scaling    cost by rows and tokens, memory by recomputed blocks

Four ways with the same weights take turns, so that a noisy machine hurts all alike:
    default     this repository: real tokens only; answers with --eval-batch rows of like length
    official    this repository, on the release's rows
    peer        transformers used well, on the rows of default. Training: padded behind, no mask, the head at
                the label's positions only. Answers: its `generate`, padded in front, with a mask
    release     transformers as the release uses it: rows of fixed length, in random order, --batch at a time
                also when answering, logits over the vocabulary at every position, in `generate`, too
TFLOP/s count 4 FLOP per weight of the blocks and token read, 6 with recomputation, 2 when answering. `of product`
is their share of what a plain matrix product reaches on the same device.
"""
import math
import sys
import time
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from adapter import AdapterConfig, MSEAdapter, MultimodalLLM  # noqa: E402
from data import HERE, TASKS, collate, epoch_rows, load_split, load_tokenizer, preset  # noqa: E402
from eval import rows_by_length  # noqa: E402
from model import LLM, Config, load_llm, sources  # noqa: E402
from train import Settings, train_step  # noqa: E402

SHAPES = {      # layers, width, heads, MLP, vocabulary; all as a LLaMA, whose work is theirs
    "100m": (12, 768, 12, 2048, 32000), "llama2-7b": (32, 4096, 32, 11008, 32000),
    "qwen-1.8b": (24, 2048, 16, 5504, 151936), "chatglm3-6b": (28, 4096, 32, 13696, 65024),
}
PRODUCT, PRODUCTS = (870, 768, 4096), 20        # a plain matrix product, and how many of them a round


def random_llm(shape: str, device: str, dtype) -> LLM:
    """A backbone of a published shape with small random weights."""
    layers, dim, heads, ffn, vocab = SHAPES[shape]
    with torch.device("meta"):
        head = dim // heads
        llm = LLM(Config("llama", dim, layers, heads, heads, head, ffn, vocab, 4096, 1e-5, rope_dim=head))
    llm = llm.to(dtype).to_empty(device=device)
    torch.manual_seed(0)
    for p in llm.parameters():
        p.fill_(1) if p.dim() == 1 else p.normal_(0, 0.02)
    return llm


def transformers_twin(llm: LLM):
    """The same weights in a transformers LLaMA with its default attention."""
    from transformers import LlamaConfig, LlamaForCausalLM
    c = llm.config
    config = LlamaConfig(
        vocab_size=c.vocab_size, hidden_size=c.dim, intermediate_size=c.ffn_dim, num_hidden_layers=c.n_layer,
        num_attention_heads=c.n_head, num_key_value_heads=c.n_kv_head, rms_norm_eps=c.norm_eps,
        max_position_embeddings=c.max_len, tie_word_embeddings=False, eos_token_id=2, pad_token_id=0)
    with torch.device("meta"):
        twin = LlamaForCausalLM(config)
    weights = {}
    for name, tensor in llm.state_dict().items():
        names = sources(c, name)
        heads = [c.n_head * c.head_dim, c.n_kv_head * c.head_dim, c.n_kv_head * c.head_dim]
        weights.update(zip(names, tensor.split(heads if len(names) == 3 else len(tensor) // len(names))))
    twin.load_state_dict(weights, assign=True)
    rotary = twin.model.rotary_emb                          # its tables are no part of the state: make them for real
    twin.model.rotary_emb = type(rotary)(config=config).to(llm.embed.weight.device)
    return twin.requires_grad_(False).eval()


class Peer(MultimodalLLM):
    """transformers used well."""
    options = {}

    def loss(self, batch, recompute: int = 0):
        """The mean over the labels' tokens: as in MultimodalLLM where all labels have equally many."""
        labels = [self.tokenizer.encode(self.label_text(y)) for y in batch.label]
        x, real, _ = self.rows(batch, labels)
        rows = [row[where] for row, where in zip(x, real)]
        target = [self.tensor([-100] * (len(row) - len(ids)) + ids) for row, ids in zip(rows, labels)]
        target = pad_sequence(target, batch_first=True, padding_value=-100)
        return self.cross_entropy(pad_sequence(rows, batch_first=True), target)

    def cross_entropy(self, x, target):
        row, place = (target >= 0).nonzero(as_tuple=True)
        hidden = self.twin.model(inputs_embeds=x).last_hidden_state
        return F.cross_entropy(self.twin.lm_head(hidden[row, place - 1]).float(), target[row, place])

    @torch.no_grad()
    def answer(self, batch):
        x, real, _ = self.rows(batch)
        ids = self.twin.generate(inputs_embeds=x, attention_mask=real.long(), max_new_tokens=self.answer_len,
                                 do_sample=False, **self.options)
        return [self.tokenizer.decode(row) for row in ids.tolist()]


class Release(Peer):
    """Every position goes through the head; the loss and the next token need few of them."""
    options = {"logits_to_keep": 0}             # 0: of every position, as all versions once did

    def cross_entropy(self, x, target):
        logits = self.twin(inputs_embeds=x).logits[:, :-1].float()                      # (B, S - 1, V)
        return F.cross_entropy(logits.flatten(0, 1), target[:, 1:].flatten())


def pick(ways: dict, split, size: int, seed, args) -> dict:
    """Each way's rounds, lists of batches: shuffled by a seed, or from the whole range of lengths."""
    rounds = {}
    for name, net in ways.items():
        order = epoch_rows(len(split), size, seed)
        if seed is None and name != "release":
            order = rows_by_length(net, split, size)
        part = args.batch if name == "release" else size
        chosen = [order[int((i + 0.5) * len(order) / args.rounds)] for i in range(args.rounds)]
        rounds[name] = [[collate(split, rows[i:i + part]) for i in range(0, len(rows), part)]
                        for rows in [chosen[0], *chosen]]
    return rounds


def clock(device: str) -> float:
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)
    return time.perf_counter()


def measure(work, rounds: dict, factors: list, device: str) -> tuple[dict, dict]:
    """Seconds and results of work(batch, name) by way; seconds of the product. The first round warms up."""
    seconds, results = dict.fromkeys([*rounds, "product"], 0.0), {name: [] for name in rounds}
    for i in range(len(rounds["default"])):
        for name in seconds:
            began = clock(device)
            if name == "product":
                for _ in range(PRODUCTS):
                    torch.mm(*factors)
            else:
                results[name] += [work(batch, name) for batch in rounds[name][i]]
            if i > 0:
                seconds[name] += clock(device) - began
    return seconds, results


def report(title: str, ways: dict, rounds: dict, seconds: dict, flops: int):
    """A line per way: its rates, and its time for a row as a share of transformers'."""
    print(f"{title:9}  rows   seconds   rows/s  tokens/row  TFLOP/s  of product   of peer  of release")
    batches = {name: sum(rounds[name][1:], []) for name in ways}
    weights = sum(p.numel() for p in ways["default"].llm.blocks.parameters())
    product = 2 * math.prod(PRODUCT) * PRODUCTS * (len(rounds["default"]) - 1) / seconds["product"]
    rows = {name: sum(len(batch.text) for batch in batches[name]) for name in ways}
    for name, net in ways.items():
        with torch.no_grad():                                   # the release's pads count
            tokens = sum(int(net.rows(batch)[1].sum()) for batch in batches[name])
        rate, n, took = flops * weights * tokens / seconds[name], rows[name], seconds[name]
        peer, release = (took / n * rows[other] / seconds[other] for other in ("peer", "release"))
        print(f"{name:9}{n:6}{took:10.2f}{n / took:9.1f}{tokens / n:12.1f}{rate / 1e12:9.3f}"
              f"{rate / product:12.2f}{peer:10.2f}{release:12.2f}")
    print(f"product of {PRODUCT[0]} x {PRODUCT[1]} x {PRODUCT[2]} {product / 1e12:24.3f}")


def compare(llm, tokenizer, task, args):
    """Train and answer in each way."""
    train, test = (load_split(task, args.data_dir or HERE / task.home, split) for split in ("train", "test"))
    p, ways, twin = preset(task, llm.config.family), {}, transformers_twin(llm)
    features = train.audio[0].shape[1], train.video[0].shape[1]
    config = AdapterConfig(llm.config.dim, *features, p.audio_hidden, p.video_hidden, p.pseudo_tokens)
    for name, kind in dict(default=MultimodalLLM, official=MultimodalLLM, peer=Peer, release=Release).items():
        torch.manual_seed(0)
        adapter = MSEAdapter(config).to(args.device)
        ways[name] = kind(llm, adapter, tokenizer, task, official=name in ("official", "release"))
        object.__setattr__(ways[name], "twin", twin)            # no submodule: the weights are llm's
    optimizers = {name: torch.optim.AdamW(net.adapter.parameters(), lr=1e-4, eps=1e-4) for name, net in ways.items()}
    scaler = torch.amp.GradScaler(args.device.split(":")[0], enabled=False)
    factors = [llm.embed.weight.new_ones(size) for size in (PRODUCT[:2], PRODUCT[1:])]

    def step(batch, name):
        return float(train_step(ways[name], optimizers[name], scaler, batch, args.recompute))

    rounds = pick(ways, train, args.batch, 1, args)
    seconds, losses = measure(step, rounds, factors, args.device)
    report("training", ways, rounds, seconds, 6 if args.recompute else 4)
    gap = max(abs(a - b) for a, b in zip(losses["official"], losses["release"], strict=True))
    print(f"losses of official and release differ by at most {gap:.1e}")
    rounds = pick(ways, test, args.eval_batch, None, args)
    seconds, answers = measure(lambda batch, name: ways[name].answer(batch), rounds, factors, args.device)
    report("answers", ways, rounds, seconds, 2)
    print(f"answers of default and peer are equal: {answers['default'] == answers['peer']}")


def kept_bytes(llm, x, recompute: int) -> int:
    """Bytes that autograd keeps for the backward of rows x, the weights aside."""
    kept = {}

    def keep(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        _ = llm(x, recompute=recompute)         # while it lives, so does what is kept
    weights = {p.untyped_storage().data_ptr() for p in llm.parameters()}
    return sum(size for at, size in kept.items() if at not in weights)


def scaling(llm, device: str):
    """Cost of a forward and backward by rows and tokens; memory by recomputed blocks."""
    def rows(n, tokens):
        return llm.embed.weight.new_ones(n, tokens, llm.config.dim).normal_().requires_grad_()

    def seconds(x, recompute=0):
        for _ in range(3):                                      # the first one warms up
            began = clock(device)
            llm(x, recompute=recompute, last=2).float().sum().backward()
        return clock(device) - began

    sizes = [n for n in (64, 128, 256, 512) if n <= llm.config.max_len]
    print("microseconds per token, forward and backward\nrows " + "".join(f"{n:6} tokens" for n in sizes))
    for n in (1, 2, 4, 8):
        print(f"{n:4} " + "".join(f"{1e6 * seconds(rows(n, T)) / n / T:13.1f}" for T in sizes))
    print("8 rows of 200 tokens\nrecomputed blocks   kept for backward   forward and backward")
    x, layers = rows(8, 200), llm.config.n_layer
    for k in sorted({0, layers // 4, layers // 2, 3 * layers // 4, layers - 1}):      # the last never does
        print(f"{k:17} {kept_bytes(llm, x, k) / 2**20:15.0f} MiB {seconds(x, k):20.2f} s")


def main():
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--llm", help="checkpoint folder [the demo's]")
    add("--shape", choices=SHAPES, help="a published shape with random weights instead")
    add("--tokenizer", help="folder of the tokenizer for --shape [the demo's]")
    add("--data", default="meld", choices=TASKS)
    add("--data-dir", help="folder with the published files [the task's]")
    add("--batch", type=int, default=16, help="rows of a training step [16]")
    add("--eval-batch", type=int, default=Settings.eval_batch, help="rows when answering, but for release")
    add("--rounds", type=int, default=10, help="training steps, and batches of --eval-batch [10]")
    add("--recompute", type=int, default=0, help="blocks that recompute, in our ways")
    add("--device", default="cpu")
    add("--dtype", default="float32", choices=("float32", "bfloat16", "float16"))
    add("--scaling", action="store_true", help="cost by rows and tokens, memory by recomputed blocks")
    args = parser.parse_args()
    dtype, folder = getattr(torch, args.dtype), args.llm or HERE / "demo" / "llm"
    llm = random_llm(args.shape, args.device, dtype) if args.shape else load_llm(folder, args.device, dtype)
    print(f"{args.shape or folder}: {sum(p.numel() for p in llm.parameters()):,} parameters, {args.dtype} on "
          f"{args.device}, {torch.get_num_threads()} threads, batch {args.batch}")
    if args.scaling:
        return scaling(llm, args.device)
    compare(llm, load_tokenizer(args.tokenizer or folder), TASKS[args.data], args)


if __name__ == "__main__":
    main()
