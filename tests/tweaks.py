"""Ten tweaks to try, and what each does to the demo's test accuracy: the README's table.

    python tests/tweaks.py                      all of them, three seeds each: some 25 minutes on one core
    python tests/tweaks.py "GRU" "class head"   some of them

A tweak is flags of train.py, or edits of a copy of the code: (file, old text, new text).
"""
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
    "pseudo tokens per modality": [             # the even outputs of `spread` are the audio's, the odd ones the video's
        ("adapter.py", "m = self.mixer(text, a, v) if self.mixer else a + v",
         "m = torch.stack((self.mixer(text, a, 0 * v), self.mixer(text, 0 * a, v)), dim=1)  # (B, 2, 256)"),
        ("adapter.py", "return self.spread(h[..., None]).transpose(1, 2)",
         "return torch.cat([self.spread(h[:, i, :, None])[..., i::2].transpose(1, 2) for i in (0, 1)], dim=1)")],
    "mean over frames": [
        ("adapter.py", "h = states.take_along_dim(lengths.clamp(min=1)[:, None, None] - 1, dim=1)[:, 0]",
         "real = torch.arange(x.size(1), device=x.device) < lengths[:, None]\n"
         "        h = (states * real[..., None]).sum(1) / lengths.clamp(min=1)[:, None]")],
    "GRU": [("adapter.py", "self.rnn = nn.LSTM(", "self.rnn = nn.GRU(")],
    "guided by the LLM's reading": [
        ("adapter.py", "mean = (x.float()", "mean = (self.llm(x, is_text).float()")],
    "prompt first": [
        ("adapter.py", "self.before = self.bos +", "self.before = self.bos + tokenizer.encode(words.prompt) +"),
        ("adapter.py", "tokenizer.encode(words.close) + tokenizer.encode(words.prompt)",
         "tokenizer.encode(words.close)")],
    "class head": [
        # As many classes as MELD has; the demo uses four of them.
        ("adapter.py", "        self.project =", "        self.head = nn.Linear(c.dim, 7)\n        self.project ="),
        ("adapter.py", "        logits = self.llm.logits(",
         "        return F.cross_entropy(self.adapter.head(hidden[:, 0]), self.tensor(batch.label))\n"
         "        logits = self.llm.logits("),
        ("adapter.py", "        if self.reread:",
         "        hidden = self.llm(x, real, self.beginning(), last=1)[:, 0]\n"
         "        return [str(label) for label in self.adapter.head(hidden).argmax(dim=-1).tolist()]\n"
         "        if self.reread:")],
}


def copy(folder):
    """Copy the code and the demo to a folder."""
    for name in CODE:
        shutil.copy(ROOT / name, folder)
    for name in ("extras", "docs", "demo"):
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


if __name__ == "__main__":
    for name in sys.argv[1:] or TWEAKS:
        scores = measure(TWEAKS[name])
        print(f"{name:30} {statistics.mean(scores):.3f} +- {statistics.stdev(scores):.3f}   "
              f"{' '.join(f'{score:.3f}' for score in scores)}", flush=True)
