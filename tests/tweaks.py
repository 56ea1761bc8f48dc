"""Ten tweaks to try, and what each does to the demo's test accuracy: the README's table.

    python tests/tweaks.py                      all of them, three seeds each: some 25 minutes on one core
    python tests/tweaks.py "GRU" "label head"   some of them
    python tests/tweaks.py "GRU" --to FOLDER    no measuring: a copy of the code with this tweak, to train with

A tweak is flags of train.py, or edits of a copy of the code: (file, old text, new text).
"""
import argparse
import csv
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
CODE = ("model.py", "adapter.py", "data.py", "train.py", "eval.py")
SEEDS = ["1111", "2222", "3333"]
TWEAKS = {
    "none": [],
    "--official": ["--official"],               # no tweak: what the release's rows are worth here
    "no Text-Guide-Mixer": ["--no-mixer"],
    "no Multi-Scale-Fusion": ["--no-fusion"],
    "one pseudo token": ["--pseudo-tokens", "1"],
    "independent pseudo tokens": ["--independent-tokens"],
    "mean over frames": [
        ("adapter.py", """        last = lengths.clamp(min=1) - 1
        h = states.take_along_dim(last[:, None, None], dim=1)[:, 0]""",
         """        real = torch.arange(x.size(1), device=x.device) < lengths[:, None]            # (B, L)
        h = (states * real[..., None]).sum(dim=1) / lengths.clamp(min=1)[:, None]""")],
    "GRU": [("adapter.py", "self.rnn = nn.LSTM(", "self.rnn = nn.GRU(")],
    "guided by the LLM's reading": [
        ("adapter.py", "text_sum = (x.float()", "text_sum = (self.llm(x, is_text).float()")],
    "modality dropout": [
        ("train.py", "import torch\n", "import numpy as np\nimport torch\n"),
        ("train.py", "loss = train_step(run.net, run.optimizer, run.scaler, collate(train, rows), recompute)",
         """batch = without_some(collate(train, rows), [run.seed, epoch, run.step])
            loss = train_step(run.net, run.optimizer, run.scaler, batch, recompute)"""),
        ("train.py", "def train_epoch(",
         """def without_some(batch, seed):
    \"\"\"The batch in which a fifth of the rows, drawn anew, miss their audio, and a fifth their video.\"\"\"
    keep = torch.from_numpy(np.random.RandomState(seed).rand(2, len(batch.text)) > 0.2)
    return batch._replace(audio_len=batch.audio_len * keep[0], video_len=batch.video_len * keep[1])


def train_epoch(""")],
    "label head": [                 # one score for each class, or for each step of 0.1 of an intensity
        ("adapter.py", "    def __post_init__(",
         """    labels: int = 0                     # of the head

    def __post_init__("""),
        ("train.py", "modality=s.modality,", "modality=s.modality, labels=len(self.task.values()),"),
        ("adapter.py", "        if c.independent_tokens:",
         """        self.head = nn.Linear(c.dim, c.labels)
        if c.independent_tokens:"""),
        ("adapter.py", "    def loss(",
         """    def scores(self, batch, recompute: int = 0):
        \"\"\"Of every legal label, (B, labels), from the hidden state in front of the label.\"\"\"
        x, real, _ = self.rows(batch)
        hidden = self.llm(x, real, recompute=recompute, last=1)                 # (B, 1, C)
        return self.adapter.head(hidden[:, 0].float())

    def loss(self, batch, recompute: int = 0):
        \"\"\"Cross-entropy of the legal label nearest to the row's.\"\"\"
        legal = self.tensor(self.task.values())
        right = (self.tensor(batch.label)[:, None] - legal).abs().argmin(dim=1)
        return F.cross_entropy(self.scores(batch, recompute), right)

    def loss_of_text("""),
        ("adapter.py", "    def answer(",
         """    def answer(self, batch) -> list[str]:
        \"\"\"The text of the label with the highest score.\"\"\"
        best = self.scores(batch).argmax(dim=-1).tolist()
        return [self.tokenizer.decode(self.labels[label]) for label in best]

    @torch.no_grad()
    def answer_in_text("""),
        ("eval.py", "def label_logprobs(",
         """def label_logprobs(net: MultimodalLLM, batch):
    \"\"\"Log-probabilities (B, labels) of the task's legal labels, from the head.\"\"\"
    return net.scores(batch).log_softmax(dim=-1)


@torch.no_grad()
def label_logprobs_in_text(""")],
    "LoRA beside the adapter": [    # of rank 8, on queries, keys and values of every block; blocks cannot recompute
        "--recompute", "0",
        ("model.py", "        self.layer = layer",
         """        self.layer = layer
        self.lora = None                        # the adapter's, while its rows are read"""),
        ("model.py", "qkv = self.qkv(x).unflatten(1, (-1, c.head_dim))",
         """qkv = self.qkv(x)
        if self.lora is not None:
            qkv = qkv + self.lora(x)
        qkv = qkv.unflatten(1, (-1, c.head_dim))"""),
        ("adapter.py", "class MSEAdapter(",
         """class LoRA(nn.Module):
    \"\"\"B A x, which is added to W x; B begins with zeros, so that the LLM begins as it was.\"\"\"

    def __init__(self, dim: int, out: int, rank: int = 8):
        super().__init__()
        self.a = nn.Linear(dim, rank, bias=False)
        self.b = nn.Linear(rank, out, bias=False)
        nn.init.zeros_(self.b.weight)

    def forward(self, x):
        return self.b(self.a(x.float())).type_as(x)


class MSEAdapter("""),
        ("adapter.py", "    def __post_init__(",
         """    layers: int = 0                     # of the LLM
    qkv_width: int = 0

    def __post_init__("""),
        ("adapter.py", "        if c.independent_tokens:",
         """        self.lora = nn.ModuleList(LoRA(c.dim, c.qkv_width) for _ in range(c.layers))
        if c.independent_tokens:"""),
        ("train.py", "modality=s.modality,",
         """modality=s.modality,
            layers=llm.config.n_layer, qkv_width=llm.blocks[0].attn.qkv.out_features,"""),
        ("adapter.py", "        self.llm = llm",
         """        self.llm = llm
        for block in llm.blocks:
            block.attn.lora = None              # that of another adapter, whose rows it read before"""),
        ("adapter.py", "        P = self.adapter.config.pseudo_tokens",
         """        for block, lora in zip(self.llm.blocks, self.adapter.lora):
            block.attn.lora = lora
        P = self.adapter.config.pseudo_tokens""")],
}


def copy(folder):
    """Copy the code and the demo to a folder."""
    for name in CODE:
        shutil.copy(ROOT / name, folder)
    for name in ("support", "reports", "docs", "demo"):
        shutil.copytree(ROOT / name, Path(folder, name))


def edit(folder, tweak: list):
    """Apply a tweak's edits to the code in a folder."""
    for file, old, new in (part for part in tweak if isinstance(part, tuple)):
        code = Path(folder, file).read_text(encoding="utf-8")
        assert code.count(old) == 1, f"{file} has {code.count(old)} times: {old}"
        Path(folder, file).write_text(code.replace(old, new), encoding="utf-8")


def measure(tweak: list) -> list[float]:
    """The demo's test accuracy with a tweak, a number per seed."""
    with tempfile.TemporaryDirectory() as folder:
        copy(folder)
        edit(folder, tweak)
        flags = [part for part in tweak if isinstance(part, str)]
        run = [sys.executable, "train.py", "--device", "cpu", "--out", "runs", "--seeds", *SEEDS, *flags]
        subprocess.run(run, cwd=folder, check=True, stdout=subprocess.DEVNULL)
        with open(Path(folder, "runs", "results.csv"), encoding="utf-8") as table:
            return [float(row["test_accuracy"]) for row in csv.DictReader(table)]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="TWEAK", help=", ".join(TWEAKS))
    parser.add_argument("--to", type=Path, help="a new folder for a copy of the code with one of them")
    args = parser.parse_args()
    names = args.names or list(TWEAKS)
    for name in names:
        if name not in TWEAKS:
            parser.error(f"no tweak is named {name!r}; expected some of: {', '.join(TWEAKS)}")
    if args.to:
        if len(names) != 1 or args.to.exists():
            parser.error("--to wants the name of one tweak, and a folder that is not there yet")
        args.to.mkdir(parents=True)
        copy(args.to)
        edit(args.to, TWEAKS[names[0]])
        print("cd", args.to, "&& python train.py", *(part for part in TWEAKS[names[0]] if isinstance(part, str)))
        return
    for name in names:
        scores = measure(TWEAKS[name])
        print(f"{name:30} {statistics.mean(scores):.3f} +- {statistics.stdev(scores):.3f}   "
              f"{' '.join(f'{score:.3f}' for score in scores)}", flush=True)


if __name__ == "__main__":
    main()
