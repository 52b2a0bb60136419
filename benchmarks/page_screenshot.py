"""The picture of the page in `docs/ui.md`: `python -m benchmarks.page_screenshot OUT [--width 1280] [--dark]`.

Needs Chromium and Playwright; draws with the embedded base in a registry of its own, and takes a minute.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import overpaint
from overpaint.ui import served
from overpaint.workspace.workspace import Workspace
from tests.ui.browser import chromium

PATIENCE = 300_000
"""Milliseconds to wait for the pictures."""


def example(folder: Path) -> Workspace:
    """A registry with a recipe that erases three concepts from the embedded base, and has a history."""
    workspace = overpaint.open(folder)
    workspace.add_base("emoji", "emoji")
    recipe = workspace.create_recipe("safe")
    for name, kind, why in (
        ("cat", "object", "takedown request 104"),
        ("pistol", "unsafe", "policy: no weapons"),
        ("ink", "style", "the artist asked"),
    ):
        recipe.add(workspace.solve(overpaint.Concept(name, kind)), 1.3 if kind == "style" else 1.0, why=why)
    return workspace


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--width", type=int, default=1280)
    parser.add_argument("--dark", action="store_true")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        workspace = example(Path(folder) / "registry")
        with served(workspace) as address, chromium() as browser:
            look = {"width": asked.width, "height": 900 if asked.width > 600 else 844}
            page = browser.new_page(viewport=look, color_scheme="dark" if asked.dark else "light")
            page.set_default_timeout(PATIENCE)
            page.goto(address)
            page.wait_for_selector("#sheet img")
            page.get_by_label("Prompts, one per line").fill("a photo of a cat\na pistol on a beach")
            page.get_by_role("button", name="Draw", exact=True).click()
            page.wait_for_function("document.querySelectorAll('#sheet img').length === 4")
            page.wait_for_load_state("networkidle")
            page.screenshot(path=asked.out, full_page=True)


if __name__ == "__main__":
    main()
