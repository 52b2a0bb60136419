"""The docs site builds without a warning, and has every page."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from tests.docs.pages import ROOT, name_of

if any(find_spec(name) is None for name in ("material", "mkdocstrings_handlers")):
    pytest.skip("mkdocs-material and mkdocstrings-python are not installed", allow_module_level=True)

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(folder)],
        cwd=ROOT,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr.strip()) == (0, ""), done.stdout + done.stderr
    return folder


def test_every_page_is_built_and_asks_nobody_for_anything(site: Path) -> None:
    for page in (ROOT / "docs").rglob("*.md"):
        folder = site / page.relative_to(ROOT / "docs").with_suffix("")
        assert (folder / "index.html").is_file(), name_of(page)
    for file in site.rglob("*.html"):
        loaded = re.findall(r"<(?:script|img)[^>]* src=\"?(https?:[^\" >]+)", file.read_text("utf-8"))
        assert loaded == [], file


def test_the_links_of_the_built_site_lead_to_files(site: Path) -> None:
    dead = set()
    for file in site.rglob("index.html"):
        for link in re.findall(r"href=\"?((?!\w+:|//|#)[^\"# >]+)", file.read_text("utf-8")):
            target = (file.parent / link).resolve()
            if not target.exists():
                dead.add((file.relative_to(site).as_posix(), link))
    assert dead == set()


def test_every_command_and_every_public_method_has_its_place(site: Path) -> None:
    commands = (site / "reference" / "commands" / "index.html").read_text("utf-8")
    assert 'id="overpaint-patch-add"' in commands
    python = (site / "reference" / "python" / "index.html").read_text("utf-8")
    assert 'id="overpaint.workspace.recipe.Recipe.undo"' in python
