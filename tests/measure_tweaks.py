"""What each tweak does to the demo's test accuracy: the table of docs/worth.md.

    python tests/measure_tweaks.py                      all of them, three seeds each: some 30 minutes on one core
    python tests/measure_tweaks.py GRU "label head"     some of them

A tweak is a patch of tests/tweaks/, flags of train.py, or both. After an edit of the code a patch may not fit any
more. Then, in a clean checkout:

    patch -p1 < tests/tweaks/gru.patch                              # finds what moved; mend what it rejects
    (sed '/^$/q' tests/tweaks/gru.patch; git diff) > new.patch      # the head of the old one, and the change
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
PATCHES = Path(__file__).resolve().parent / "tweaks"
CODE = [path.name for path in ROOT.glob("*.py")]
SEEDS = ["1111", "2222", "3333"]
TWEAKS = {                                      # name: (patch or "", flags)
    "none": ("", []),
    "as the release": ("", ["--official"]),     # no tweak: what the release's rows are worth here
    "no Text-Guide-Mixer": ("", ["--no-mixer"]),
    "no Multi-Scale-Fusion": ("", ["--no-fusion"]),
    "one pseudo token": ("", ["--pseudo-tokens", "1"]),
    "independent pseudo tokens": ("", ["--independent-tokens"]),
    "mean over frames": ("mean-over-frames", []),
    "GRU": ("gru", []),
    "guided by the LLM's reading": ("guided-by-reading", []),
    "cross-attention": ("cross-attention", []),
    "modality dropout": ("modality-dropout", []),
    "label head": ("label-head", []),
    "LoRA beside the adapter": ("lora", ["--recompute", "0"]),      # its blocks cannot recompute
}                                               # third-modality.patch needs data that the demo has not


def copy(folder):
    """Copy the code and the demo to a folder."""
    for name in CODE:
        shutil.copy(ROOT / name, folder)
    for name in ("support", "reports", "docs", "demo"):
        shutil.copytree(ROOT / name, Path(folder, name))


def apply(patch: str, folder):
    """Change the code in a folder, as the page tells people to."""
    subprocess.run(["git", "apply", PATCHES / f"{patch}.patch"], cwd=folder, check=True)


def measure(patch: str, flags: list) -> list[float]:
    """The demo's test accuracy with a tweak, a number per seed."""
    with tempfile.TemporaryDirectory() as folder:
        copy(folder)
        if patch:
            apply(patch, folder)
        run = [sys.executable, "train.py", "--device", "cpu", "--out", "runs", "--seeds", *SEEDS, *flags]
        subprocess.run(run, cwd=folder, check=True, stdout=subprocess.DEVNULL)
        with open(Path(folder, "runs", "results.csv"), encoding="utf-8") as table:
            return [float(row["test_accuracy"]) for row in csv.DictReader(table)]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="TWEAK", help=", ".join(TWEAKS))
    names = parser.parse_args().names or list(TWEAKS)
    for name in names:
        if name not in TWEAKS:
            parser.error(f"no tweak is named {name!r}; expected some of: {', '.join(TWEAKS)}")
    for name in names:
        scores = measure(*TWEAKS[name])
        print(f"{name:30} {statistics.mean(scores):.3f} +- {statistics.stdev(scores):.3f}   "
              f"{' '.join(f'{score:.3f}' for score in scores)}", flush=True)


if __name__ == "__main__":
    main()
