"""What holds for the whole project: who imports whom, public names, docstrings, the README's code."""

import ast
import importlib
import re
from pathlib import Path

import pytest

from collectives.__main__ import markdown_table

ROOT = Path(__file__).parents[1]
MAY_IMPORT = {
    "kernels": {"kernels"},
    "transports": {"transports"},
    "collectives": {"collectives", "transports", "kernels"},
    "parallel": {"parallel", "collectives", "kernels"},
}
OURS = {*MAY_IMPORT, "bench", "tests"}
FILES = [path for package in MAY_IMPORT for path in sorted((ROOT / package).rglob("*.py"))]


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_go_one_way(path):
    package = path.relative_to(ROOT).parts[0]
    for node in ast.walk(ast.parse(path.read_text())):
        names = (
            [a.name for a in node.names]
            if isinstance(node, ast.Import)
            else [node.module or ""]
            if isinstance(node, ast.ImportFrom)
            else []
        )
        for name in names:
            imported = name.partition(".")[0]
            assert imported not in OURS or imported in MAY_IMPORT[package], f"{path}: {package} must not import {name}"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_public_things_have_docstrings(path):
    tree = ast.parse(path.read_text())
    if path.stat().st_size:
        assert ast.get_docstring(tree), f"{path} does not say what it is"
    scopes = [tree, *(node for node in tree.body if isinstance(node, ast.ClassDef) and not node.name.startswith("_"))]
    for scope in scopes:
        for node in scope.body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
                overload = any("overload" in ast.dump(d) for d in node.decorator_list)
                assert overload or ast.get_docstring(node), f"{path}: {node.name} has no docstring"


@pytest.mark.parametrize("package", MAY_IMPORT)
def test_public_names_exist_and_are_few(package):
    module = importlib.import_module(package)
    assert 0 < len(set(module.__all__)) == len(module.__all__) <= 25
    assert all(hasattr(module, name) for name in module.__all__)
    assert not [name for name in module.__all__ if name.startswith("_")]


def test_algorithms_are_short():
    for path in (ROOT / "collectives" / "algorithms").glob("*.py"):
        if path.name not in ("__init__.py", "registry.py"):
            assert len(path.read_text().splitlines()) < 80, path


def test_readme_code_runs(monkeypatch):
    for block in re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL):
        exec(compile(block, "README.md", "exec"), {})


def test_readme_shows_the_algorithms_that_are_here():
    assert markdown_table() in (ROOT / "README.md").read_text(), "see `python -m collectives list --markdown`"
