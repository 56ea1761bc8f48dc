"""For learners: demo/walk.py prints what is true, and docs/build-it.md's tests are red until a step is written."""
import ast
import math
import re
import subprocess
import sys
import xml.etree.ElementTree as xml
from functools import cache
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "demo")]

import walk  # noqa: E402
from adapter import AdapterConfig, MSEAdapter, MultimodalLLM, save_adapter  # noqa: E402
from build_it import STEPS, functions, strip  # noqa: E402
from data import TASKS, load_tokenizer  # noqa: E402
from support.files import UserError  # noqa: E402

# ---------------------------------------------------------------------------------------------------------------------
# The walk


walk.load_llm = cache(walk.load_llm)        # frozen: all walks can share it


def printed(capsys, *arguments: str) -> list[str]:
    """The four sections that the script prints."""
    walk.main(list(arguments))
    text = capsys.readouterr().out
    assert max(map(len, text.splitlines())) <= 100
    return re.split(r"^\d\. ", text, flags=re.MULTILINE)[1:]


def test_the_walk(capsys, monkeypatch):
    monkeypatch.setattr(walk, "STEPS", 6)
    row, adapter, before, after = printed(capsys)

    # The tokens of the parts are as many as the mask and the picture say.
    T, = re.findall(r"\(B, T, C\) +\(2, (\d+), 128\)", row)
    sizes = [int(n) for n in re.findall(r"^  (?:bos|open|P|text|close|prompt|label) +(\d+)  ", row, re.MULTILINE)]
    pictures = re.findall(r"^  row \d  (\S+) \.\.\.\n +([01]+) \.\.\.$", row, re.MULTILINE)
    assert len(sizes) == 14 and len(pictures) == 2
    for n, (letters, mask) in enumerate(pictures):
        bos, start, P, text, *rest = sizes[7 * n:7 * n + 7]
        padding = int(T) - sum((bos, start, P, text, *rest))
        front = "." * padding + "b" * bos + "o" * start + "P" * P + "t" * text + "c"
        assert letters.startswith(front) and mask == ("0" * padding + 60 * "1")[:60]
    assert "0" in pictures[0][1]

    assert re.findall(r"\(B, P, C\) +(.*)", adapter) == ["(2, 4, 128)"]
    labels = re.findall(r"^  label +2  (\S+) (\S+)$", row, re.MULTILINE)
    losses = []
    for section in (before, after):
        lines = re.findall(r"^    label (\S+)  -log (\S+) = (\S+)   five best  (\S+) ", section, re.MULTILINE)
        tokens, probabilities, negative_logs, best = zip(*lines)
        mean = sum(map(float, negative_logs)) / 4
        loss, = re.findall(r"the mean of all -log: (\S+);", section)
        losses.append(float(loss))
        assert tokens == labels[0] + labels[1]
        assert mean == pytest.approx(losses[-1], abs=2e-3)
        assert mean == pytest.approx(-sum(math.log(float(p)) for p in probabilities) / 4, abs=5e-3)
        assert section.strip().endswith(f"greedy answers: {list(best[1::2])}")
    assert losses[1] < losses[0] - 0.05


def save_run(folder: Path, **change) -> str:
    """A run's folder whose adapter makes pseudo tokens of nothing but zeros."""
    config = AdapterConfig(128, 6, 8, 32, 16, 4, **change)
    adapter = MSEAdapter(config)
    torch.nn.init.zeros_(adapter.spread.weight)
    torch.nn.init.zeros_(adapter.spread.bias)
    task = TASKS["demo"]
    net = MultimodalLLM(walk.load_llm(task.llm), adapter, load_tokenizer(task.llm), task)
    save_adapter(folder / "adapter.safetensors", net)
    return str(folder)


def test_the_walk_takes_a_runs_adapter(tmp_path, capsys):
    *_, before, after = printed(capsys, save_run(tmp_path))
    assert "pseudo tokens 0.0 0.0 0.0 0.0;" in after and "0.0 0.0;" not in before


def test_the_walk_refuses_an_ablated_run(tmp_path):
    with pytest.raises(UserError, match="no_mixer=True.* expected"):
        walk.main([save_run(tmp_path, no_mixer=True)])


# ---------------------------------------------------------------------------------------------------------------------
# Six steps


SOURCE = (ROOT / "adapter.py").read_text(encoding="utf-8")
PAGE = (ROOT / "docs" / "build-it.md").read_text(encoding="utf-8")


def named_tests() -> dict:
    """{step: the tests that its part of the page names}"""
    named = {}
    for part in re.split(r"^## ", PAGE, flags=re.MULTILINE)[1:7]:
        heading, _, text = part.partition("\n")
        number, name = re.fullmatch(r"(\d)\. .*: `(.*)`", heading).groups()
        assert STEPS[name].startswith(f"step {number}: ")
        named[STEPS[name]] = re.findall(r"tests/\S+\.py::\S+", text)
    return named


def test_the_page_names_tests_that_are_there():
    named = named_tests()
    assert list(named) == list(STEPS.values()) and all(named.values())
    for test in sum(named.values(), []):
        file, name = test.split("::")
        assert f"\ndef {name}(" in (ROOT / file).read_text(encoding="utf-8"), test


def test_only_the_six_bodies_are_stripped():
    assert strip(SOURCE, []) == SOURCE
    before, after = functions(SOURCE), functions(strip(SOURCE, STEPS))
    assert list(before) == list(after)
    for name, node in after.items():
        if name in STEPS:
            *documentation, body = node.body
            assert ast.unparse(body) == f"raise NotImplementedError({STEPS[name]!r})"
            assert ast.get_docstring(node) == ast.get_docstring(before[name]) and len(documentation) <= 1
            before[name].body = node.body
        assert ast.unparse(node) == ast.unparse(before[name]), name


def build_it(folder: Path):
    return subprocess.run([sys.executable, ROOT / "demo" / "build_it.py", folder], capture_output=True, text=True)


@pytest.mark.release
def test_in_a_half_built_copy_what_is_written_is_green_and_the_rest_red(tmp_path):
    folder = tmp_path / "new" / "mine"
    done = build_it(folder)
    assert done.returncode == 0 and all(step in done.stdout for step in STEPS.values()), done.stderr
    adapter = folder / "adapter.py"
    assert adapter.read_text(encoding="utf-8") == strip(SOURCE, STEPS)
    adapter.write_text(strip(SOURCE, list(STEPS)[3:]), encoding="utf-8")        # the first three are back
    step_of = {}
    for step, tests in named_tests().items():
        for test in tests:
            if "test_golden" not in test:           # it would make large backbones first
                step_of[test] = step
    assert set(step_of.values()) == set(STEPS.values())

    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "--junitxml", "results.xml", *step_of]
    subprocess.run(command, cwd=folder, stdout=subprocess.DEVNULL)
    seen = set()
    for case in xml.parse(folder / "results.xml").iter("testcase"):
        test = f"{case.get('classname').replace('.', '/')}.py::{case.get('name').partition('[')[0]}"
        seen.add(test)
        failure = case.find("failure")
        if step_of[test] < "step 4":
            assert failure is None, test
        else:                                       # at its own step, or at the row, from which it begins
            said = failure.get("message").removeprefix("NotImplementedError: ")
            assert said in (step_of[test], "step 4: the row"), test
    assert seen == set(step_of)


def test_a_folder_that_exists_and_one_in_the_code_are_refused(tmp_path):
    (tmp_path / "notes").write_text("mine")
    for folder, words in ((tmp_path, "exists"), (ROOT / "demo" / "mine", "within the code")):
        done = build_it(folder)
        assert done.returncode == 1 and words in done.stderr and done.stderr.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["notes"] and not (ROOT / "demo" / "mine").exists()
