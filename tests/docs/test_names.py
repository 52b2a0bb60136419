"""What people can call is explained: every public name has a docstring, every command an example that it understands."""

from __future__ import annotations

import ast
import builtins
import re
from collections.abc import Iterator
from pathlib import Path

import click
import pytest

from tests.docs.pages import ROOT
from tests.docs.test_blocks import problems
from tools.docs.commands import every_command, help_text


def undocumented(file: Path) -> Iterator[str]:
    """Public names of a module without a docstring; a method may have that of the method it implements, a test its name."""
    tree = ast.parse(file.read_text("utf-8"))
    if not ast.get_docstring(tree):
        yield file.name
    classes = [node for node in tree.body if isinstance(node, ast.ClassDef)]
    explained = {name for node in classes for name, text in methods(node) if text}
    for node in tree.body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef) and not node.name.startswith("_"):
            if not ast.get_docstring(node):
                yield node.name
            if isinstance(node, ast.ClassDef):
                yield from (f"{node.name}.{name}" for name, _ in methods(node) if name not in explained)


def methods(node: ast.ClassDef) -> Iterator[tuple[str, str | None]]:
    """The public methods and properties of a class, with their docstrings; `of` makes a record of a row and needs none."""
    for inner in node.body:
        if isinstance(inner, ast.FunctionDef) and not inner.name.startswith(("_", "test_")) and inner.name != "of":
            yield inner.name, ast.get_docstring(inner)


PUBLIC = (
    "__init__.py",
    "core/concepts.py",
    "core/errors.py",
    "workspace/workspace.py",
    "workspace/opened.py",
    "workspace/recipe.py",
    "registry/records.py",
    "solvers/problem.py",
    "patches/compose.py",
    "patches/delta.py",
    "patches/patch.py",
    "bases/base.py",
    "bases/text_encoder.py",
    "evaluation/judges.py",
    "testing/__init__.py",
    "testing/contract.py",
)
"""The modules that the reference shows."""


@pytest.mark.parametrize("name", PUBLIC)
def test_every_public_name_has_a_docstring(name: str) -> None:
    assert list(undocumented(ROOT / "overpaint" / name)) == []


@pytest.mark.parametrize(
    ("words", "command"), every_command(), ids=lambda value: " ".join(value) if isinstance(value, tuple) else ""
)
def test_every_command_has_an_example_that_it_understands(words: tuple[str, ...], command: object) -> None:

    assert isinstance(command, click.Command)
    examples = help_text(command)[1]
    assert examples, "add an Example to its docstring"
    called = " ".join(("overpaint", *words))
    assert [line for line in examples if not f"{line} ".startswith(f"{called} ")] == []
    assert [problem for line in examples for problem in problems(line)] == []


HEADERS = {"Host", "Origin"}
"""Names of HTTP, which no code defines."""


def test_what_docstrings_name_is_there() -> None:
    """Classes in backquotes, errors after "Raises", files of Python."""
    trees = {file: ast.parse(file.read_text("utf-8")) for file in (ROOT / "overpaint").rglob("*.py")}
    known = {*dir(builtins), *HEADERS}
    files = {file.name for folder in ("overpaint", "tests", "tools") for file in (ROOT / folder).rglob("*.py")}
    wrong = []
    for node in (node for tree in trees.values() for node in ast.walk(tree)):
        if isinstance(node, ast.ClassDef | ast.FunctionDef):
            known.add(node.name)
        elif isinstance(node, ast.Name):
            known.add(node.id)
        elif isinstance(node, ast.Attribute):
            known.add(node.attr)
        elif isinstance(node, ast.alias):
            known |= {*node.name.split("."), node.asname or ""}
    for file, tree in trees.items():
        expressions = (node.value for node in ast.walk(tree) if isinstance(node, ast.Expr))
        text = "\n".join(str(each.value) for each in expressions if isinstance(each, ast.Constant))
        named = re.findall(r"`([A-Z][A-Za-z0-9]*[a-z][A-Za-z0-9]*)`|\bRaises ([A-Z][a-z]\w+)", text)
        wrong += [(file.name, name) for pair in named for name in pair if name and name not in known]
        wrong += [(file.name, name) for name in re.findall(r"\b(\w+\.py)\b", text) if name not in files]
    assert wrong == []
