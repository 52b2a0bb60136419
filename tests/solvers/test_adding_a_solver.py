"""`docs/adding-a-solver.md` cannot drift: its blocks run, its files are those of the example package, and that installs."""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import pytest

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "adding-a-solver.md"
EXAMPLE = ROOT / "examples" / "overpaint-project-out"


class Block(NamedTuple):
    """A fenced block: its language, what stands beside it (`file=PATH`, `error`), its text."""

    language: str
    about: str
    text: str


def blocks() -> list[Block]:
    found = re.findall(r"^```(\w+) ?([^\n]*)\n(.*?)^```$", PAGE.read_text("utf-8"), re.MULTILINE | re.DOTALL)
    return [Block(*parts) for parts in found]


def test_the_files_shown_are_those_of_the_example() -> None:
    shown = {b.about.removeprefix("file="): b.text for b in blocks() if b.about.startswith("file=")}
    assert len(shown) == 3
    assert shown == {name: (ROOT / name).read_text("utf-8") for name in shown}


def test_every_block_runs_and_prints_what_the_page_shows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(EXAMPLE))
    # A dataclass looks its module up, so the page is one.
    page = type(sys)("page")
    monkeypatch.setitem(sys.modules, "page", page)
    printed = ""
    for block in blocks():
        if block.language == "text":
            assert block.text == printed
        if block.language == "python":
            printed = run(block, vars(page))


def run(block: Block, names: dict[str, Any]) -> str:
    """What a block prints, or the sentence of the error that it is there to show."""
    with contextlib.redirect_stdout(io.StringIO()) as out:
        try:
            exec(compile(block.text, str(PAGE), "exec"), names)
        except Exception as error:
            if block.about != "error":
                raise
            return f"{error}\n"
    assert block.about != "error", "this block should be refused"
    return out.getvalue()


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The example, installed by pip into a folder of its own, from a copy: building writes beside the sources."""
    place = tmp_path_factory.mktemp("example")
    shutil.copytree(EXAMPLE, place / "source", ignore=shutil.ignore_patterns("build", "*.egg-info", "__pycache__"))
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-build-isolation", "--no-deps", "--no-index"]
    subprocess.run([*pip, "--target", str(place / "site"), str(place / "source")], check=True, capture_output=True)
    return place


def python(installed: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Python with the example installed."""
    path = os.pathsep.join([str(installed / "site"), str(ROOT), os.environ.get("PYTHONPATH", "")])
    # Plug-ins of pytest that are installed here take longer to load than the tests take to run.
    environment = {**os.environ, "PYTHONPATH": path, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    return subprocess.run([sys.executable, *arguments], env=environment, cwd=installed, capture_output=True, text=True)


def test_the_installed_example_is_listed_without_being_imported_and_found_by_name(installed: Path) -> None:
    listed = python(installed, "-m", "overpaint", "solvers", "--json")
    rows = {row["name"]: row for row in json.loads(listed.stdout)}
    assert rows["project_out"] == {
        "name": "project_out",
        "what it does": "Project a concept's direction out of the prompt.",
        "package": "overpaint-project-out",
    }
    shown = python(installed, "-m", "overpaint", "solvers", "project_out", "--json")
    assert json.loads(shown.stdout)[0]["setting"] == "share"


def test_the_installed_example_passes_its_own_tests(installed: Path) -> None:
    """Of the contract, which is held elsewhere, what needs least time."""
    some = ("-k", "bit_identical or only_declared or direction or settings", "--rootdir", str(installed / "source"))
    options = ("-q", "-W", "error", "-p", "no:cacheprovider", *some)
    found = python(installed, "-m", "pytest", *options, str(installed / "source" / "tests"))
    assert found.returncode == 0, found.stdout + found.stderr
    assert "4 passed" in found.stdout
