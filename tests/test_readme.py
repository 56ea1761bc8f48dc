"""The pages tell the truth: README.md names what is there, its numbers agree with the code, README.zh.md says the same.

    python tests/test_readme.py         run the demo and paste its output into both pages
"""
import json
import pickle
import re
import shlex
import subprocess
import sys
import tempfile
from collections import Counter
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "demo")]

import adapter  # noqa: E402
import data  # noqa: E402
import eval  # noqa: E402
import make  # noqa: E402
import model  # noqa: E402
import train  # noqa: E402
from conftest import small_data  # noqa: E402
from support import tokenizers  # noqa: E402
from test_adapter import COUNTS  # noqa: E402
from tweaks import TWEAKS, copy  # noqa: E402

PAGES = {name: (ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "README.zh.md")}
OUTPUT = re.compile(r"(?<=```\n)demo: .*?(?=```)", re.DOTALL)           # the one-minute run's, in a page
NUMBER = re.compile(r"[-+]?\d+(?:[.,:]\d+)*(?:e-?\d+)?")
FLAG = re.compile(r"(?<![\w-])--[a-z][\w-]*")
FOREIGN = {"--repo-type", "--local-dir"}                                # flags of hf download


@pytest.fixture(params=PAGES)
def page(request) -> str:
    return PAGES[request.param]


def flags_of(script: str) -> set:
    """All flags that a script takes."""
    if script == "train.py":
        return {"--" + field.name.replace("_", "-") for field in fields(train.Settings)}
    return set(re.findall(r'add(?:_argument)?\("(--[\w-]+)"', (ROOT / script).read_text(encoding="utf-8")))


def test_files_exist(page):
    folders = r"\b(?:demo|docs|support|reports|tests)/[\w/]*"
    for name in re.findall(r"[\w./-]+\.(?:py|md|svg|txt)\b|docs/\w+\.json|" + folders, page):
        assert any((ROOT / folder / name).exists() for folder in ("", "tests")), name


def test_flags_exist(page):
    scripts = {"train.py", "eval.py", "data.py", "model.py", "tests/bench.py", "tests/tweaks.py"}
    for script, line in re.findall(r"python (\S+\.py)([^\n`|#]*)", page):
        assert set(FLAG.findall(line)) <= (flags_of(script) if script in scripts else set()), line
    assert set(FLAG.findall(page)) <= set.union(FOREIGN, *map(flags_of, scripts))


def test_functions_and_tables_exist(page):
    """What begins with a capital, and what the table from the paper to the code names."""
    table = page[page.index("adapter.py, `SequenceEncoder"):]
    names = re.findall(r"`([A-Za-z_]\w+(?:\.\w+)?)`", table[:table.index("\n## ")])
    names += re.findall(r"`([A-Z]\w+(?:\.\w+)?)`", page)
    assert len(names) > 30
    for name in names:
        head, *tail = name.split(".")
        modules = (adapter, data, eval, model, tokenizers, train)
        owner = next((getattr(m, head) for m in modules if hasattr(m, head)), None)
        assert owner is not None and all(hasattr(owner, part) for part in tail), name


def test_sizes(page):
    counts = [n for row in COUNTS.values() for n in row.values()]
    for n in (min(counts), max(counts)):
        assert f"{n / 1e6:.1f}M" in page
    assert str(sum(data.TASKS["demo"].rows.values())) in page


def test_published_figures(page):
    backbones = {"Qwen-1.8B": "qwen", "ChatGLM3-6B": "chatglm", "LLaMA2-7B": "llama"}
    tasks = ["mosei", "mosi", "simsv2", "meld", "cherma"]
    recorded = json.loads((ROOT / "docs" / "release.json").read_text(encoding="utf-8"))
    rows = re.findall(r"^\| (\S+) \|(.*±.*)\|$", page[:page.index("adapter.py, `SequenceEncoder")], re.MULTILINE)
    rows = [(name, row) for name, row in rows if name in backbones]
    assert [name for name, _ in rows] == list(backbones)
    for name, row in rows:
        for task, cell in zip(tasks, row.split("|"), strict=True):
            metrics, wanted = recorded.get(f"{backbones[name]} {task}", {}), []
            for metric, pair in metrics.items():
                if metric != "note":
                    scale = 1 if metric in ("mae", "corr") else 100
                    wanted += [scale * x for x in pair if x is not None]
            assert [float(x) for x in re.findall(r"\d*\.\d+", cell)] == pytest.approx(wanted), (name, task)


def skeleton(output: str) -> list[str]:
    """A run's lines without their numbers, marks and warnings; the settings apart."""
    lines = [NUMBER.sub("#", line.replace(", best yet", "")) for line in re.sub(r"\n  ", " ", output).splitlines()]
    return [line for line in lines if not line.startswith(("settings", "looks collapsed", "more answers", "wrote"))]


def settings_line(output: str) -> str:
    line, = re.findall(r"^settings: .*(?:\n  .*)*", output, re.MULTILINE)
    return re.sub(r" (data_dir|out) \S+,", "", " ".join(line.split()))


@pytest.mark.release
def test_the_demos_output_is_of_this_code(page, tmp_path, capsys):
    train.main(["--data-dir", str(small_data(tmp_path)), "--out", str(tmp_path / "out"), "--device", "cpu"])
    real, shown = capsys.readouterr().out, OUTPUT.search(page)[0]
    assert skeleton(real) == skeleton(shown)
    assert settings_line(real) == settings_line(shown)
    seed = re.compile(r"^seed 1111: .*", re.MULTILINE)
    assert seed.search(real)[0] == seed.search(shown)[0]                # the parameters


def test_own_data_as_printed(page, tmp_path, monkeypatch, capsys):
    """The entry in TASKS, a row, and the commands from there on; tests/test_features.py makes rows of clips."""
    entry, = re.findall(r"^    (Task\(.*\)),", page, re.MULTILINE)
    row, = re.findall(r'^    ({"label".*})$', page, re.MULTILINE)
    command = re.compile(r"^    python (?:data|train)\.py ((?:--data )?mine .*?)(?: *#.*)?$", re.MULTILINE)
    checks, trains = command.findall(page)
    evals, = re.findall(r"^    python eval.py (runs/mine.*)$", page, re.MULTILINE)
    task, row = eval_in(entry, Task=data.Task), eval_in(row, np=np)
    monkeypatch.setitem(data.TASKS, "mine", task)
    monkeypatch.chdir(tmp_path)
    for split in data.SPLITS:
        rows = []
        for n, label in enumerate(task.labels * 4):
            rows.append({"label": label, "features": row["features"] | {"text": f"Was für ein {split}, {n}!"}})
        Path(f"mine_{split}.pkl").write_bytes(pickle.dumps(rows, 4))
    np.save("new.audio.npy", row["features"]["audio"])
    assert row["label"] in task.labels and data.main(checks.split()) == 0
    trains = trains.replace("demo/llm", str(ROOT / "demo" / "llm"))
    train.main([*trains.split(), "--device", "cpu", "--max-epochs", "1"])
    monkeypatch.setattr("sys.argv", ["eval.py", *shlex.split(evals)])
    eval.main()
    assert re.search(r"^ *answer +(gut|schlecht) ", capsys.readouterr().out, re.MULTILINE)


def eval_in(code: str, **names):
    """What a line of the page says, in Python."""
    exec(f"said = {code}", names)
    return names["said"]


def test_the_demos_backbone_is_saved_to_the_same_bytes(tmp_path, monkeypatch):
    """The last step of demo/make.py; its training takes minutes."""
    monkeypatch.setattr(make, "HERE", tmp_path)
    (tmp_path / "llm").mkdir()
    make.save_llm(model.load_llm(ROOT / "demo" / "llm"))
    file = Path("llm", "model.safetensors")
    assert (tmp_path / file).read_bytes() == (ROOT / "demo" / file).read_bytes()


def test_every_tweak_is_on_the_page(page):
    for name in TWEAKS:
        assert name in ("none", "--official") or re.search(rf"^\| {re.escape(name)} \|", page, re.MULTILINE), name


def test_the_chinese_page_says_the_same():
    def parts(page):
        return re.split(r"^(#+) .*$", page, flags=re.MULTILINE)

    def code(page):         # fenced blocks and indented lines, without their comments
        blocks = re.findall(r"```.*?```", page, re.DOTALL) + re.findall(r"^    .*$", page, re.MULTILINE)
        return [re.sub(r"\s*# .*", "", block) for block in blocks]

    english, chinese = PAGES.values()
    assert code(english) == code(chinese)
    ours, theirs = parts(english), parts(chinese)
    assert ours[1::2] == theirs[1::2]                                   # the headings' levels
    for one, other in zip(ours[::2], theirs[::2]):
        for pattern in (NUMBER, FLAG, re.compile("TODO-BENCH")):
            assert Counter(pattern.findall(one)) == Counter(pattern.findall(other)), one[:80]


def refresh():
    """Run the demo as the page says, in a copy without anything else, and paste what it prints."""
    with tempfile.TemporaryDirectory() as folder:
        copy(folder)
        output = subprocess.run([sys.executable, "train.py"], cwd=folder, check=True, capture_output=True, text=True)
    for name, page in PAGES.items():
        (ROOT / name).write_text(OUTPUT.sub(lambda _: output.stdout, page), encoding="utf-8")
    print(output.stdout, end="")


if __name__ == "__main__":
    refresh()
