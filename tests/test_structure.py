"""The rules of the files: who imports whom, and what can be copied out of here."""
import ast
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
LISTED = {"torch", "sentencepiece", "numpy", "safetensors", "tqdm"}     # in requirements.txt
# Who may import what of the project: arrows go one way.
RULES = {
    "model.py": set(),
    "adapter.py": set(),
    "support": {"support"},
    "data.py": {"support"},
    "reports": {"support", "data", "adapter", "reports"},
    "eval.py": {"support", "data", "adapter", "reports", "model"},
    "train.py": {"support", "data", "adapter", "reports", "model", "eval"},
}
OWN = {name.removesuffix(".py") for name in RULES}


def imported(file: Path) -> set[str]:
    """The first part of every module's name that a file imports, wherever in it."""
    names = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(node.module.split(".")[0])
    return names


def files_of(place: str) -> list[Path]:
    path = ROOT / place
    return sorted(path.glob("*.py")) if path.is_dir() else [path]


@pytest.mark.parametrize("place", RULES)
def test_arrows_go_one_way(place):
    for file in files_of(place):
        assert imported(file) & OWN <= RULES[place], f"{file.name} imports what stands above it"


@pytest.mark.parametrize("place", RULES)
def test_nothing_is_imported_but_what_is_listed(place):
    allowed = LISTED | OWN | set(sys.stdlib_module_names)
    if place == "support":
        allowed = allowed | {"huggingface_hub"}                         # optional, inside --download
    for file in files_of(place):
        assert imported(file) <= allowed


@pytest.mark.parametrize("folder", ["support", "reports"])
def test_each_folder_says_its_rule_in_a_line(folder):
    said = ast.get_docstring(ast.parse((ROOT / folder / "__init__.py").read_text()))
    assert said and "\n" not in said


@pytest.mark.release
def test_the_top_level_is_the_five_files():
    assert {path.name for path in ROOT.glob("*.py")} == {name for name in RULES if name.endswith(".py")}


@pytest.mark.parametrize("name", ["model", "adapter"])
def test_a_copy_in_an_empty_folder_imports(name, tmp_path):
    shutil.copy(ROOT / f"{name}.py", tmp_path)
    code = (f"import sys; sys.path.insert(0, {str(tmp_path)!r}); import {name}; "
            f"print({name}.__file__, 'sentencepiece' in sys.modules, sys.modules.keys() & {OWN - {name}!r})")
    done = subprocess.run([sys.executable, "-I", "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.stdout == f"{tmp_path / name}.py False set()\n", done.stderr
