"""The pages tell the truth: README.md names what is there, its numbers agree with the code, README.zh.md says the same.

    python tests/test_readme.py         run the demo and paste its output into both pages
"""
import re
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from dataclasses import fields
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import adapter  # noqa: E402
import data  # noqa: E402
import eval  # noqa: E402
import model  # noqa: E402
import train  # noqa: E402
from test_adapter import COUNTS  # noqa: E402
from test_train import small_data  # noqa: E402
from tweaks import CODE, TWEAKS, copy, edit  # noqa: E402

NAMES = ("README.md", "README.zh.md")
OUTPUT = re.compile(r"(?<=```\n)demo: .*?(?=```)", re.DOTALL)           # the one-minute run's, in a page
NUMBER = re.compile(r"[-+]?\d+(?:[.,:]\d+)*(?:e-?\d+)?")
FOREIGN = {"--repo-type", "--local-dir"}                                # flags of hf download


@pytest.fixture(params=NAMES)
def page(request) -> str:
    return (ROOT / request.param).read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def english() -> str:
    return (ROOT / "README.md").read_text(encoding="utf-8")


def flags_of(script: str) -> set:
    """All flags that a script takes."""
    if script == "train.py":
        return {"--" + field.name.replace("_", "-") for field in fields(train.Settings)}
    return set(re.findall(r'add_argument\("(--[\w-]+)"', (ROOT / script).read_text(encoding="utf-8")))


def test_files_exist(page):
    for name in re.findall(r"[\w./-]+\.(?:py|md|svg|txt)\b|\b(?:demo|docs|tests)/[\w/]*", page):
        assert any((ROOT / folder / name).exists() for folder in ("", "demo", "tests")), name


def test_flags_exist(page):
    scripts = {"train.py", "eval.py", "data.py", "model.py", "tests/bench.py"}
    for script, line in re.findall(r"python (\S+\.py)([^\n`|#]*)", page):
        assert set(re.findall(r"(?<=\s)--[\w-]+", line)) <= (flags_of(script) if script in scripts else set()), line
    every = set.union(FOREIGN, *map(flags_of, scripts))
    assert set(re.findall(r"(?<![\w-])--[a-z][\w-]*", page)) <= every


def test_functions_and_tables_exist(page):
    table = page[page.index("adapter.py, `SequenceEncoder"):]
    names = re.findall(r"`([A-Za-z_]\w+(?:\.\w+)?)`", table[:table.index("\n## ")])
    assert len(names) > 20
    submodules = {"join", "project", "spread"}                          # made in constructors
    for name in set(names) - submodules:
        head, *tail = name.split(".")
        owner = next((getattr(m, head) for m in (adapter, data, eval, model, train) if hasattr(m, head)), None)
        assert owner is not None and all(hasattr(owner, part) for part in tail), name


def test_sizes(page):
    counts = [n for row in COUNTS.values() for n in row.values()]
    for n in (min(counts), max(counts)):
        assert f"{n / 1e6:.1f}M" in page
    for name, lines in re.findall(r"^\| (\w+\.py) \| (\d+) \|", page, re.MULTILINE):
        found = len((ROOT / name).read_text(encoding="utf-8").splitlines())
        assert abs(found - int(lines)) <= 0.03 * found, f"{name} has {found} lines"
    assert str(sum(data.TASKS["demo"].rows.values())) in page


def test_published_figures(page):
    backbones = {"qwen": "Qwen-1.8B", "chatglm": "ChatGLM3-6B", "llama": "LLaMA2-7B"}
    for (family, task), metrics in train.PUBLISHED.items():
        row, = re.findall(rf"^\| {backbones[family]} \| \D*\|.*±.*$", page, re.MULTILINE)
        cell = row.split("|")[{"mosei": 3, "simsv2": 4, "meld": 5, "cherma": 6}[task]]
        shown = [float(x) for x in re.findall(r"\d*\.\d+", cell)]
        scale = 100 if task in ("meld", "cherma") else 1
        wanted = [x * (100 if "acc" in name else scale) for name, pair in metrics.items() for x in pair if x]
        assert shown == pytest.approx(wanted), (family, task)


def skeleton(output: str) -> list[str]:
    """A run's lines without their numbers, marks and warnings; the settings apart."""
    lines = [NUMBER.sub("#", line.replace(", best yet", "")) for line in re.sub(r"\n  ", " ", output).splitlines()]
    return [line for line in lines if not line.startswith(("settings", "looks collapsed", "more answers", "wrote"))]


def settings_line(output: str) -> str:
    line, = re.findall(r"^settings: .*(?:\n  .*)*", output, re.MULTILINE)
    return re.sub(r" (data_dir|out) \S+,", "", " ".join(line.split()))


def test_the_demos_output_is_of_this_code(page, tmp_path, capsys):
    train.main(["--data-dir", str(small_data(tmp_path)), "--out", str(tmp_path / "out"), "--device", "cpu"])
    real, shown = capsys.readouterr().out, OUTPUT.search(page)[0]
    assert skeleton(real) == skeleton(shown)
    assert settings_line(real) == settings_line(shown)
    seed = re.compile(r"^seed 1111: .*", re.MULTILINE)
    assert seed.search(real)[0] == seed.search(shown)[0]                # the parameters


def test_every_tweak_is_on_the_page_and_applies(page, tmp_path):
    for name, tweak in TWEAKS.items():
        assert name in ("none", "--official") or re.search(rf"^\| {re.escape(name)} \|", page, re.MULTILINE), name
        for file in CODE:
            shutil.copy(ROOT / file, tmp_path)
        edit(tmp_path, tweak)
        for file in CODE:
            compile((tmp_path / file).read_text(encoding="utf-8"), file, "exec")


def test_the_chinese_page_says_the_same(english):
    chinese = (ROOT / "README.zh.md").read_text(encoding="utf-8")

    def parts(page):
        return re.split(r"^(#+) .*$", page, flags=re.MULTILINE)

    def code(page):         # fenced blocks and indented lines, without their comments
        blocks = re.findall(r"```.*?```", page, re.DOTALL) + re.findall(r"^    .*$", page, re.MULTILINE)
        return [re.sub(r"\s*# .*", "", block) for block in blocks]

    ours, theirs = parts(english), parts(chinese)
    assert ours[1::2] == theirs[1::2]                                   # the headings' levels
    assert code(english) == code(chinese)
    for one, other in zip(ours[::2], theirs[::2]):
        assert Counter(NUMBER.findall(one)) == Counter(NUMBER.findall(other)), one[:80]
        assert Counter(re.findall(r"--[a-z][\w-]*", one)) == Counter(re.findall(r"--[a-z][\w-]*", other)), one[:80]


def refresh():
    """Run the demo as the page says, in a copy without anything else, and paste what it prints."""
    with tempfile.TemporaryDirectory() as folder:
        copy(folder)
        output = subprocess.run([sys.executable, "train.py"], cwd=folder, check=True, capture_output=True, text=True)
    for name in NAMES:
        page = (ROOT / name).read_text(encoding="utf-8")
        (ROOT / name).write_text(OUTPUT.sub(lambda _: output.stdout, page), encoding="utf-8")
    print(output.stdout, end="")


if __name__ == "__main__":
    refresh()
