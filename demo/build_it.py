"""Build the method yourself: a copy of the code without the six functions that make it. See docs/build-it.md.

    python demo/build_it.py FOLDER      in adapter.py of the copy each of them raises NotImplementedError
"""
import ast
import shutil
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
COPIED = ("*.py", "pyproject.toml", "demo", "docs", "reports", "support", "tests")
STEPS = {
    "SequenceEncoder.forward": "step 1: the encoder",
    "TextGuideMixer.forward": "step 2: the mixer",
    "MultiScaleFusion.forward": "step 3: the fusion",
    "MultimodalLLM.rows": "step 4: the row",
    "MultimodalLLM.loss": "step 5: the loss",
    "MultimodalLLM.answer": "step 6: decoding",
}


def functions(source: str) -> dict:
    """{"Class.function": its node in the syntax tree} of a file's text."""
    found = {}
    for owner in ast.parse(source).body:
        if isinstance(owner, ast.ClassDef):
            for node in owner.body:
                if isinstance(node, ast.FunctionDef):
                    found[f"{owner.name}.{node.name}"] = node
    return found


def strip(source: str, names) -> str:
    """The text of adapter.py without the bodies of these functions: signatures and docstrings stay."""
    lines = source.splitlines()
    found = functions(source)
    for name in sorted(names, key=lambda name: -found[name].lineno):        # from below: lines above stay put
        node = found[name]
        first = node.body[0].lineno - 1
        if ast.get_docstring(node) is not None:
            first = node.body[0].end_lineno
        lines[first:node.end_lineno] = [f'        raise NotImplementedError("{STEPS[name]}")']
    return "\n".join(lines) + "\n"


def build(folder: Path):
    """Make the copy. Raises FileExistsError where there is something already."""
    if ROOT in folder.resolve().parents:
        sys.exit(f"error: {folder} lies within the code; name a folder beside it, like ../mine")
    folder.mkdir(parents=True)
    for pattern in COPIED:
        for path in ROOT.glob(pattern):
            if path.is_dir():
                shutil.copytree(path, folder / path.name, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                shutil.copy(path, folder)
    source = (ROOT / "adapter.py").read_text(encoding="utf-8")
    (folder / "adapter.py").write_text(strip(source, STEPS), encoding="utf-8")


def main():
    if len(sys.argv) != 2 or sys.argv[1].startswith("-"):
        sys.exit(__doc__)
    folder = Path(sys.argv[1])
    try:
        build(folder)
    except FileExistsError:
        sys.exit(f"error: {folder} exists; name a folder that does not")
    except OSError as error:
        sys.exit(f"error: {error}")
    print(f"{folder}/adapter.py: {len(STEPS)} functions to write, in this order")
    for name, step in STEPS.items():
        print(f"  {step}: {name}")


if __name__ == "__main__":
    main()
