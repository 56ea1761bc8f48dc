"""The pages tell the truth: what they name is there, what they print is of this code, README.zh.md says the same.

    python tests/test_readme.py         run the first commands of README.md and paste their output into both pages
"""
import io
import json
import pickle
import re
import shlex
import subprocess
import sys
import tempfile
import unicodedata
from collections import Counter
from contextlib import redirect_stdout
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
from measure_tweaks import TWEAKS, copy  # noqa: E402
from reports.tables import width  # noqa: E402
from support import tokenizers  # noqa: E402
from test_adapter import COUNTS  # noqa: E402

FRONT = ("README.md", "README.zh.md")
DOCS = tuple(f"docs/{path.name}" for path in sorted((ROOT / "docs").glob("*.md")))
PAGES = {name: (ROOT / name).read_text(encoding="utf-8") for name in FRONT + DOCS}
CONSOLE = re.compile(r"(?<=```console\n).*?(?=```)", re.DOTALL)         # commands behind "$ ", and what they print
PYTHON = re.compile(r"(?<=```python\n).*?(?=```)", re.DOTALL)
NUMBER = re.compile(r"[-+]?\d+(?:[.,:]\d+)*(?:e-?\d+)?")
FLAG = re.compile(r"(?<![\w-])--[a-z][\w-]*")
FOREIGN = {"--array", "--gres", "--time", "--signal", "--repo-type", "--local-dir"}     # of sbatch, hf download

every_page = pytest.mark.parametrize("page", PAGES)
each_front = pytest.mark.parametrize("page", FRONT)


# ---------------------------------------------------------------------------------------------------------------------
# What the pages name


@every_page
def test_a_page_can_be_read(page):
    lines = PAGES[page].splitlines()
    for line in lines:
        above = [c for c in line if unicodedata.combining(c)]           # as the tilde of M̃
        assert width(line) - len(above) <= 110, line
    assert len(lines) <= 120 or page in DOCS


@every_page
def test_files_exist(page):
    folders = ("", "docs", "tests", "tests/tweaks")                     # a page may leave these out
    for word in re.findall(r"[A-Za-z0-9_./-]+", PAGES[page]):
        name = word.rstrip(".")                                         # of the sentence
        is_ours = name.startswith(("demo/", "docs/", "support/", "reports/", "tests/"))
        if is_ours or name.endswith((".py", ".md", ".svg", ".txt", ".patch")):
            assert name in train.WRITTEN or any((ROOT / folder / name).exists() for folder in folders), name


def anchors(page: str) -> set:
    """Those of a page's headings, as GitHub makes them: "## 48.12 % on MELD" -> "4812--on-meld"."""
    headings = re.findall(r"^#+ (.*)$", PAGES[page], re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@every_page
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)]*)\)", PAGES[page]):
        if not target.startswith("https://"):
            name, _, anchor = target.partition("#")
            file = (ROOT / page).parent / name if name else ROOT / page
            assert file.is_file(), target
            assert not anchor or anchor in anchors(file.resolve().relative_to(ROOT).as_posix()), target


@each_front
def test_the_front_page_leads_to_all_others(page):
    assert set(DOCS) <= set(re.findall(r"\]\((docs/\S+\.md)\)", PAGES[page]))


def flags_of(script: str) -> set:
    """All flags that a script takes."""
    if script == "train.py":
        return {"--" + field.name.replace("_", "-") for field in fields(train.Settings)}
    return set(re.findall(r'add(?:_argument)?\("(--[\w-]+)"', (ROOT / script).read_text(encoding="utf-8")))


@every_page
def test_flags_exist(page):
    scripts = {"train.py", "eval.py", "data.py", "tests/bench.py"}      # others take none
    text = PAGES[page].replace("\\\n", " ")
    for script, line in re.findall(r"python (\S+\.py)([^\n`|#]*)", text):
        if script == "demo/with_transformers.py":       # behind "train" or "eval" stand the flags of that file
            script = line.split()[0] + ".py"
        assert set(FLAG.findall(line)) <= (flags_of(script) if script in scripts else set()), line
    assert set(FLAG.findall(text)) <= set.union(FOREIGN, *map(flags_of, scripts))


def check_names(names: list):
    modules = (adapter, data, eval, model, tokenizers, train)
    for name in names:
        head, *tail = name.split(".")
        owner = next((getattr(module, head) for module in modules if hasattr(module, head)), None)
        assert owner is not None and all(hasattr(owner, part) for part in tail), name


@every_page
def test_names_exist(page):
    check_names(re.findall(r"`([A-Z]\w+(?:\.\w+)?)`", PAGES[page]))


@each_front
def test_the_way_through_the_code_exists(page):
    _, _, reading, *_ = PAGES[page].split("\n## ")
    names = re.findall(r"`([A-Za-z_]\w+(?:\.\w+)?)`", reading)
    assert len(names) > 20
    check_names(names)


@each_front
def test_sizes(page):
    counts = [n for row in COUNTS.values() for n in row.values()]
    for n in (min(counts), max(counts)):
        assert f"{n / 1e6:.1f}M" in PAGES[page]
    assert str(sum(data.TASKS["demo"].rows.values())) in PAGES[page]


def test_published_figures():
    """The table of docs/release.md, a row for each score, a column for each backbone, is docs/release.json."""
    recorded = json.loads((ROOT / "docs" / "release.json").read_text(encoding="utf-8"))
    tasks = {"MOSEI": "mosei", "MOSI": "mosi", "SIMS-V2": "simsv2", "MELD": "meld", "CHERMA": "cherma"}
    scores = {"acc-2 (Has0)": "has0_acc2", "acc-2": "acc2", "MAE": "mae", "Corr": "corr", "accuracy": "accuracy",
              "weighted F1": "weighted_f1"}
    shown, wanted = {}, {}
    for line in re.findall(r"^\| (.*) \|$", PAGES["docs/release.md"], re.MULTILINE):
        task, score, *cells = [cell.strip() for cell in line.split("|")]
        if task in tasks:
            for family, cell in zip(("qwen", "chatglm", "llama"), cells, strict=True):
                numbers = [float(x) for x in re.findall(r"\d*\.\d+", cell)]
                if numbers:
                    shown[family, tasks[task], scores[score]] = numbers
    for pair, metrics in recorded.items():
        for name, numbers in metrics.items():
            if name != "note":
                scale = 1 if name in ("mae", "corr") else 100
                wanted[(*pair.split(), name)] = [scale * x for x in numbers if x is not None]
    assert shown.keys() == wanted.keys()
    for key, numbers in wanted.items():
        assert shown[key] == pytest.approx(numbers), key


@pytest.mark.parametrize("page", ["docs/worth.md", "docs/forking.md"])
def test_every_tweak_is_on_the_page(page):
    named = re.findall(r"^\| ([^|]*) \|", PAGES[page], re.MULTILINE)
    assert set(TWEAKS) - {"none", "as the release"} <= set(named)


def test_every_patch_is_on_the_page():
    there = {path.name for path in (ROOT / "tests" / "tweaks").glob("*.patch")}
    assert there and set(re.findall(r"[\w-]+\.patch", PAGES["docs/forking.md"])) == there


# ---------------------------------------------------------------------------------------------------------------------
# What the pages print, and what they let people type


def session(page: str) -> list:
    """[("$ python ...", the lines below it)] of the console on a page."""
    parts = []
    for line in CONSOLE.search(PAGES[page])[0].splitlines():
        if line.startswith("$ "):
            parts.append((line, []))
        else:
            parts[-1][1].append(line)
    return parts


def words_of(prompt: str) -> list:
    """"$ python eval.py RUN    # a comment" -> ["python", "eval.py", "RUN"]"""
    return shlex.split(prompt[2:], comments=True)


def shorten(lines: list) -> list:
    """Of a training: the data, the first epoch whole, the last one's line, and the test; "..." is the rest."""
    epochs = [n for n, line in enumerate(lines) if line.startswith("epoch ")]
    test = next(n for n, line in enumerate(lines) if line.startswith("test "))
    first = lines[epochs[0]:epochs[1]]
    return [lines[0], "...", *first, "...", lines[epochs[-1]], *lines[test:]]


def outputs(run) -> dict:
    """{the words of a command: what the page shows of its output}. run: words -> output."""
    printed = {}
    for prompt, _ in session("README.md"):
        program, *words = words_of(prompt)
        if program == "python":
            lines = run(words).splitlines()
            printed[tuple(words)] = shorten(lines) if words == ["train.py"] else lines
    return printed


def call(words: list) -> str:
    """What a script of the project prints, run in this process."""
    script, *arguments = words
    main = {"data.py": data.main, "train.py": train.main, "eval.py": eval.main}[script]
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(io.StringIO()) as output:
        patch.setattr("sys.argv", [script, *arguments])
        main()
    return output.getvalue()


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """A folder where the commands of README.md's console were run, on a few rows; and `outputs`."""
    folder = tmp_path_factory.mktemp("demo")
    (folder / "demo").symlink_to(ROOT / "demo")
    rows = small_data(tmp_path_factory.mktemp("rows"))
    few = {"train.py": ["--data-dir", str(rows), "--device", "cpu", "--epochs", "2"]}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        return folder, outputs(lambda words: call(words + few.get(words[0], [])))


def skeleton(lines: list) -> list[str]:
    """Lines without numbers, marks, answers, spaces and warnings."""
    bare = []
    for line in lines:
        line = re.sub(r"^  \w+, answered .*", "  #, answered #", line.replace(" (best yet)", ""))
        line = re.sub(r", (macro f1|unweighted accuracy) [\d.]+", "", line)      # printed where they differ
        line = re.sub(r"\b(joy|anger|sadness|calm)\b", "#", NUMBER.sub("#", line))
        if not line.startswith(("looks collapsed", "more answers")):
            bare.append(" ".join(line.split()))
    return bare


@pytest.mark.release
@each_front
def test_the_demos_output_is_of_this_code(page, demo):
    _, printed = demo
    for prompt, below in session(page):
        if below:
            assert skeleton(below) == skeleton(printed[tuple(words_of(prompt)[1:])])
    assert session("README.md")[-1][1], "the clip's answer is shown"


def test_from_python_as_printed(demo, monkeypatch, capsys):
    """The very lines of the page, on a run of a few rows."""
    monkeypatch.chdir(demo[0])
    code, = PYTHON.findall(PAGES["README.md"])
    exec(code, {})
    answers = re.findall(r"^(\w+) (\S+) {(.*)}$", capsys.readouterr().out, re.MULTILINE)
    assert len(answers) == 3 and all(label in data.TASKS["demo"].labels for label, _, _ in answers)
    assert len({probability for _, probability, _ in answers}) == 3     # the voices were heard


def test_the_adapter_alone_as_printed():
    code, = PYTHON.findall(PAGES["docs/forking.md"])
    names = {}
    exec(code, names)
    assert names["pseudo"].shape == (2, 4, 2048)


def eval_in(code: str, **names):
    """What a line of the page says, in Python."""
    exec(f"said = {code}", names)
    return names["said"]


@pytest.mark.parametrize("page", ["README.md", "docs/own-data.md"])
def test_own_data_as_printed(page, tmp_path, monkeypatch):
    """The entry in TASKS, a row, and the commands from there on; tests/test_features.py makes rows of clips."""
    text = PAGES[page]
    entry, = re.findall(r"^    (Task\(.*\)),", text, re.MULTILINE)
    row, = re.findall(r'^    ({"label".*})$', text, re.MULTILINE)
    commands = re.findall(r"^    python ((?:data|train|eval)\.py .*\bmine\b.*)$", text, re.MULTILINE)
    task, row = eval_in(entry, Task=data.Task), eval_in(row, np=np)
    assert row["label"] in task.labels
    monkeypatch.setitem(data.TASKS, "mine", task)
    monkeypatch.chdir(tmp_path)
    for split in data.SPLITS:
        rows = []
        for n, label in enumerate(task.labels * 4):
            rows.append({"label": label, "features": row["features"] | {"text": f"Was für ein {split}, {n}!"}})
        Path(f"mine_{split}.pkl").write_bytes(pickle.dumps(rows, 4))
    np.save("new.audio.npy", row["features"]["audio"])
    Path("demo").symlink_to(ROOT / "demo")
    Path("Qwen-1_8B").symlink_to(ROOT / "demo" / "llm")                 # in the place of a large one

    check, training, *clip = [shlex.split(command, comments=True) for command in commands]
    assert "mine: 0 problems" in call(check) and training[0] == "train.py"
    assert "\ntest " in call([*training, "--device", "cpu", "--max-epochs", "1"])
    assert page == "README.md" or re.search(r"^ *answer +(gut|schlecht) ", call(*clip), re.MULTILINE)


def test_rows_of_npy_files_as_printed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    np.save("a.npy", np.ones((3, 2)))
    np.save("v.npy", np.ones((1, 5)))
    Path("train.csv").write_text('label,text,audio,video\ngut,"Ja, gut!",a.npy,v.npy\n', encoding="utf-8")
    code, = PYTHON.findall(PAGES["docs/own-data.md"])
    exec(code, {})
    split = data.load_split(data.Task("mine", labels=("schlecht", "gut")), tmp_path, "train")
    assert (split.text, split.label, split.audio_len, split.video_len) == (["Ja, gut!"], [1], [3], [1])


def test_the_demos_backbone_is_saved_to_the_same_bytes(tmp_path, monkeypatch):
    """The last step of demo/make.py; its training takes minutes."""
    monkeypatch.setattr(make, "HERE", tmp_path)
    (tmp_path / "llm").mkdir()
    make.save_llm(model.load_llm(ROOT / "demo" / "llm"))
    file = Path("llm", "model.safetensors")
    assert (tmp_path / file).read_bytes() == (ROOT / "demo" / file).read_bytes()


# ---------------------------------------------------------------------------------------------------------------------
# Two languages


def test_the_chinese_page_says_the_same():
    def parts(page):
        return re.split(r"^(#+) .*$", page, flags=re.MULTILINE)

    def code(page):         # fenced blocks and indented lines, without their comments
        blocks = re.findall(r"```.*?```", page, re.DOTALL) + re.findall(r"^    .*$", page, re.MULTILINE)
        return [re.sub(r"\s*# .*", "", block) for block in blocks]

    english, chinese = (PAGES[name] for name in FRONT)
    assert code(english) == code(chinese)
    ours, theirs = parts(english), parts(chinese)
    assert ours[1::2] == theirs[1::2]                                   # the headings' levels
    for one, other in zip(ours[::2], theirs[::2]):
        for pattern in (NUMBER, FLAG):
            assert Counter(pattern.findall(one)) == Counter(pattern.findall(other)), one[:80]


# ---------------------------------------------------------------------------------------------------------------------
# Pasting


def paste(page: str, printed: dict) -> str:
    """A page in which each command that shows an output shows this one."""
    lines = []
    for prompt, below in session(page):
        lines.append(prompt)
        if below:
            lines += printed[tuple(words_of(prompt)[1:])]
    return CONSOLE.sub(lambda _: "\n".join([*lines, ""]), PAGES[page])


def test_pasting_changes_the_outputs_alone():
    printed = {tuple(words_of(prompt)[1:]): ["new"] for prompt, _ in session("README.md")}
    for page in FRONT:
        pasted = paste(page, printed)
        assert [line for line in PAGES[page].splitlines() if line.startswith("$ ")] == [
            line for line in pasted.splitlines() if line.startswith("$ ")]
        assert pasted.count("\nnew\n") == 2 and CONSOLE.sub("", pasted) == CONSOLE.sub("", PAGES[page])


def refresh():
    """Run the console's commands in a copy without anything else, and paste what they print."""
    with tempfile.TemporaryDirectory() as folder:
        copy(folder)

        def run(words):
            print("python", *words, flush=True)
            done = subprocess.run([sys.executable, *words], cwd=folder, check=True, stdout=subprocess.PIPE,
                                  encoding="utf-8")
            return done.stdout

        printed = outputs(run)
    for page in FRONT:
        (ROOT / page).write_text(paste(page, printed), encoding="utf-8")
    print(CONSOLE.search(paste("README.md", printed))[0], end="")


if __name__ == "__main__":
    refresh()
