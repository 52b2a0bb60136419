"""`docs/using-with.md` cannot drift: its commands and programs run, one after the other, as somebody would paste them."""

from __future__ import annotations

import re
import shlex
import shutil
from collections.abc import Iterator
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

import overpaint
from overpaint.cli import main
from overpaint.patches.formats.dialects import READERS
from overpaint.patches.formats.exporting import FORMATS
from overpaint.testing import tiny_pipeline

PAGE = Path(__file__).parents[3] / "docs" / "using-with.md"
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def test_what_the_page_says_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    tiny_pipeline().save_pretrained("path/to/sd15")
    workspace = overpaint.open("registry")
    workspace.add_base("sd15", "path/to/sd15")
    for name in ("cat", "dog"):
        workspace.create_recipe("safe", base="sd15", exist_ok=True).add(workspace.solve(name, base="sd15"))
    ran = []
    for kind, text in BLOCK.findall(PAGE.read_text("utf-8")):
        if kind == "python":
            exec(compile(text, str(PAGE), "exec"), {})
        for line in text.splitlines() if kind == "sh" else ():
            words = shlex.split(line, comments=True)
            assert words[0] == "overpaint"
            found = CliRunner().invoke(main, ["--registry", "registry", *words[1:]], catch_exceptions=False)
            assert found.exit_code == 0, (line, found.output)
        ran.append(kind)
    assert (ran.count("sh"), ran.count("python")) == (3, 3)
    shutil.rmtree(tmp_path)


def test_every_option_that_the_page_names_is_one_that_a_command_has() -> None:
    text = re.sub(r"^```text\n.*?^```$", "", PAGE.read_text("utf-8"), flags=re.MULTILINE | re.DOTALL)
    known = {option for command in _commands(main) for param in command.params for option in param.opts}
    named = set(re.findall(r"(?<![\w-])--[a-z][a-z-]*", text))
    assert len(named) > 5
    assert named - known == set()


def _commands(group: click.Command) -> Iterator[click.Command]:
    yield group
    if isinstance(group, click.Group):
        for name in group.list_commands(click.Context(group)):
            found = group.get_command(click.Context(group), name)
            assert found is not None
            yield from _commands(found)


def test_the_page_has_every_format_and_every_tool() -> None:
    page = PAGE.read_text("utf-8")
    assert [name for name in FORMATS if f"| `{name}`" not in page] == []
    assert [name for name in READERS if f"--for {name}" not in page] == []
