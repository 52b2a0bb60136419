"""What a shell completes: names of the registry, read without PyTorch, and nothing where there is no registry."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from click.shell_completion import ShellComplete

from overpaint.cli import main
from overpaint.core.concepts import Concept
from overpaint.registry.registry import Registry


@pytest.fixture
def place(tmp_path: Path) -> Path:
    registry = Registry.open(tmp_path)
    registry.add_base("emoji", Path("emoji"), "stable-diffusion", "f" * 64)
    registry.add_concept(Concept("cat"))
    registry.add_concept(Concept("van gogh", "style"))
    registry.create_recipe("safe", "emoji")
    registry.tag("v1", recipes=["safe"], who="ann")
    return tmp_path


def completed(place: Path, *words: str) -> list[str]:
    """What is offered for the last word."""
    shell = ShellComplete(main, {}, "overpaint", "_OVERPAINT_COMPLETE")
    return [item.value for item in shell.get_completions(["--registry", str(place), *words[:-1]], words[-1])]


@pytest.mark.parametrize(
    ("words", "offered"),
    [
        (("recipe", "show", ""), ["safe"]),
        (("recipe", "checkout", "safe@"), ["safe@v1", "safe@0"]),
        (("patch", "add", "cat", "--recipe", "s"), ["safe"]),
        (("solve", ""), ["cat", "van gogh"]),
        (("solve", "cat", "--base", ""), ["emoji"]),
        (("solve", "cat", "--solver", "uc"), ["uce"]),
        (("concept", "show", "v"), ["van gogh"]),
        (("base", "move", "e"), ["emoji"]),
        (("build", ""), ["safe"]),
        (("undo", ""), ["safe"]),
        (("solvers", "few"), ["few_shot", "few_shot_lora"]),
        (("patch", "show", ""), []),
    ],
    ids=lambda each: " ".join(each),
)
def test_names_are_completed(place: Path, words: tuple[str, ...], offered: list[str]) -> None:
    assert completed(place, *words) == offered


def test_without_a_registry_nothing_is_offered_and_none_is_made(tmp_path: Path) -> None:
    assert completed(tmp_path / "none", "recipe", "show", "") == []
    assert not (tmp_path / "none").exists()


def test_commands_of_the_past_are_not_offered(place: Path) -> None:
    assert "expired" in completed(place, "recipe", "")
    assert "due" not in completed(place, "recipe", "")


def test_completing_loads_no_torch(place: Path) -> None:
    code = (
        "import sys; from click.shell_completion import ShellComplete; from overpaint.cli import main;"
        "shell = ShellComplete(main, {}, 'overpaint', '_OVERPAINT_COMPLETE');"
        f"shell.get_completions(['--registry', {str(place)!r}, 'solve', '--solver'], ''); sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
