"""Two rows of the demo go through the method, step by step. Read this file beside what it prints.

    python demo/walk.py         train for some seconds on the two rows alone, which learns them by heart
    python demo/walk.py RUN     take a run's adapter instead: `python train.py` leaves runs/demo-llm/1111

B is 2 rows; the other letters of the shapes are adapter.py's. In a token, ▁ is a space.
"""
import argparse
import sys
import textwrap
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from adapter import AdapterConfig, AdapterError, MSEAdapter, MultimodalLLM, load_adapter  # noqa: E402
from data import HERE, TASKS, collate, load_split, load_tokenizer  # noqa: E402
from model import CheckpointError, load_llm  # noqa: E402
from support.files import UserError  # noqa: E402
from support.guards import run_program  # noqa: E402

TASK = TASKS["demo"]
ROWS = (0, 8)               # of the training split
STEPS = 30


def split_row(net, text, label):
    """{name: ids} of a row's parts, in their order. text, label: the ids of these two."""
    words = net.task.wording(net.llm.config.family)
    bos, _, _ = words.special_ids(net.tokenizer)
    encode = net.tokenizer.encode
    place = [net.pad_id] * net.adapter.config.pseudo_tokens     # is kept for the pseudo tokens
    return {"bos": bos, "open": encode(words.open), "P": place, "text": text,
            "close": encode(words.close), "prompt": encode(words.prompt), "label": label}


def show_shape(name, letters, x):
    print(f"  {name:32}{'(' + letters + ')':18}{tuple(x.shape)}")


def show_row(net, batch, labels):
    print("1. What the LLM reads: the tokens of each row's parts, and how many")
    x, real, _ = net.rows(batch, labels)
    pictures = []
    for row, text in enumerate(net.text_ids(batch)):
        print(f"row {row}: {TASK.labels[batch.label[row]]}, {batch.text[row]!r}")
        letters = ""
        for name, ids in split_row(net, text, labels[row]).items():
            tokens = " ".join(net.tokenizer.sp.id_to_piece(i) for i in ids)
            print(textwrap.fill(f"  {name:7}{len(ids):2}  {tokens}", 100, subsequent_indent=" " * 13))
            letters += name[0] * len(ids)
        mask = "".join(str(int(is_real)) for is_real in real[row])
        pictures.append(f"  row {row}  {letters.rjust(len(mask), '.')[:60]} ...\n         {mask[:60]} ...")
    show_shape("x, padded in front", "B, T, C", x)
    print("  The first 60 positions: to which part each belongs (. is padding), and the mask")
    print("\n".join(pictures))


def show_adapter(net, batch):
    """MSEAdapter.forward once more, with what lies between."""
    print("\n2. From the features to the pseudo tokens")
    adapter = net.adapter
    states, _ = adapter.audio.rnn(batch.audio)
    x_a = adapter.audio(batch.audio, batch.audio_len)
    x_v = adapter.video(batch.video, batch.video_len)
    mean = torch.stack([net.llm.embed(torch.tensor(ids)).mean(dim=0) for ids in net.text_ids(batch)])
    m = adapter.mixer(mean, x_a, x_v)
    fused = adapter.fusion(m)
    h = adapter.project(fused)
    pseudo = adapter.spread(h[..., None]).transpose(1, 2)
    assert torch.allclose(pseudo, net.pseudo_tokens(batch), atol=1e-4)      # nothing was left out

    show_shape("audio features", "B, La, Da", batch.audio)
    show_shape("states of the audio's LSTM", "B, La, hidden", states)
    show_shape("x_a, from the last real state", "B, 256", x_a)
    show_shape("x_v, the same of the video", "B, 256", x_v)
    show_shape("mean of the text's embeddings", "B, C", mean)
    show_shape("t  = W_t mean + b_t", "B, 256", adapter.mixer.text(mean))
    show_shape("M  = x_a * t + x_v * t", "B, 256", m)
    show_shape("M~ = three scales of M, joined", "B, 256", fused)
    show_shape("h  = W_3 M~ + b_3", "B, C", h)
    show_shape("P_k = w_k h + c_k", "B, P, C", pseudo)


@torch.no_grad()
def show_answer(net, batch, labels):
    """How long the pseudo tokens are as vectors, and how probable the LLM finds the label."""
    piece = net.tokenizer.sp.id_to_piece
    x, real, pseudo = net.rows(batch, labels)
    n = len(labels[0])                                      # in this task all labels have equally many tokens
    hidden = net.llm(x, real, last=n + 1)[:, :-1]           # in front of each of them, (B, n, C)
    probabilities = net.llm.logits(hidden).softmax(dim=-1)  # (B, n, V)
    for row, text in enumerate(net.text_ids(batch)):
        norms = " ".join(f"{norm:.1f}" for norm in pseudo[row].norm(dim=-1))
        of_text = net.llm.embed(torch.tensor(text)).norm(dim=-1).mean()
        print(f"  row {row}: norms of its pseudo tokens {norms}; its text's embeddings have {of_text:.1f}")
        for token, p in zip(labels[row], probabilities[row]):
            best = "  ".join(f"{piece(i)} {p[i]:.3f}" for i in p.topk(5).indices.tolist())
            loss = -p[token].log()
            print(f"    label {piece(token)}  -log {p[token]:.3f} = {loss:.3f}   five best  {best}")
    print(f"  loss, the mean of all -log: {net.loss(batch):.3f}; greedy answers: {net.answer(batch)}")


def train(net, batch):
    optimizer = torch.optim.AdamW(net.adapter.parameters(), lr=5e-3, eps=1e-4)
    for _ in range(STEPS):
        loss = net.loss(batch)
        optimizer.zero_grad()
        loss.backward()         # through the frozen LLM to the pseudo tokens, and on into the adapter
        optimizer.step()


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, nargs="?", help="the folder of a run on the demo")
    run = parser.parse_args(argv).run
    torch.set_num_threads(1)            # tensors this small are done before a second thread wakes up
    torch.manual_seed(1111)
    llm = load_llm(TASK.llm)
    tokenizer = load_tokenizer(TASK.llm)
    batch = collate(load_split(TASK, HERE / TASK.home, "train"), ROWS)
    config = AdapterConfig(llm.config.dim, TASK.audio_dim, TASK.video_dim, 32, 16, pseudo_tokens=4)
    net = MultimodalLLM(llm, MSEAdapter(config), tokenizer, TASK)
    labels = [tokenizer.encode(net.label_text(y)) for y in batch.label]
    if run:
        trained = load_adapter(run / "adapter.safetensors", llm, tokenizer, TASK)
        if trained.adapter.config != config:
            raise UserError(f"{run}: trained with other flags ({trained.adapter.config}); expected a run of "
                            "`python train.py` with the method as it is")

    show_row(net, batch, labels)
    show_adapter(net, batch)
    print("\n3. Before training")
    show_answer(net, batch, labels)
    if run:
        print(f"\n4. With the adapter of {run}")
        net = trained
    else:
        print(f"\n4. After {STEPS} steps on these two rows alone")
        train(net, batch)
    show_answer(net, batch, labels)


if __name__ == "__main__":
    run_program(main, CheckpointError, AdapterError)
