"""Prompts to keep: remembered with the base, part of every solve, named in what comes of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from overpaint.cli import main
from overpaint.core.errors import NotFound, OverpaintError
from overpaint.registry import Registry
from overpaint.workspace.workspace import Workspace

from .contents import stock


@pytest.fixture
def registry(location: str | Path) -> Registry:
    return stock(Registry.open(location))


def prompts(registry: Registry, base: str = "small") -> list[str]:
    return [kept.prompt for kept in registry.preserved_prompts(base)]


def test_prompts_are_stored_once_in_alphabetical_order_with_who_asked(registry: Registry) -> None:
    assert registry.preserve_prompts("small", ["watermark", " a logo ", "watermark"], who="ann") == 2
    assert registry.preserve_prompts("small", ["a logo", "Zoë's mark"], who="bob") == 1
    found = registry.preserved_prompts("small")
    assert [(kept.prompt, kept.who) for kept in found] == [
        ("Zoë's mark", "bob"),
        ("a logo", "ann"),
        ("watermark", "ann"),
    ]
    assert found[0].at >= found[1].at


def test_prompts_are_forgotten_all_or_none(registry: Registry) -> None:
    registry.preserve_prompts("small", ["one", "two", "three"], who="ann")
    with pytest.raises(NotFound, match=r"'four' is not preserved on 'small'; see `overpaint base preserve small`"):
        registry.forget_prompts("small", ["one", "four"])
    assert prompts(registry) == ["one", "three", "two"]
    assert registry.forget_prompts("small", ["one", "one"]) == 1
    assert registry.forget_prompts("small") == 2
    assert prompts(registry) == []


def test_each_base_has_its_own_preserved_prompts(registry: Registry) -> None:
    registry.add_base("large", Path("/models/large"), "sdxl", "e" * 8)
    registry.preserve_prompts("small", ["one"], who="ann")
    assert prompts(registry, "large") == []
    with pytest.raises(NotFound, match="small"):
        registry.preserve_prompts("smal", ["one"], who="ann")


@pytest.mark.parametrize("bad", ["", "  ", "two\nlines", "a\x1bb", "x" * 1001])
def test_a_prompt_that_is_none_is_refused_and_nothing_is_stored(registry: Registry, bad: str) -> None:
    with pytest.raises(OverpaintError):
        registry.preserve_prompts("small", ["good", bad], who="ann")
    assert prompts(registry) == []


def test_the_command_adds_lists_and_removes_and_a_manifest_has_the_prompts(tmp_path: Path, base_folder: Path) -> None:
    place, file = str(tmp_path / "registry"), tmp_path / "prompts.txt"
    workspace = Workspace.open(place)
    workspace.add_base("tiny", base_folder)
    file.write_text("a moon in the style of art\n\n  the sun \n", "utf-8")

    def run(*words: str) -> Any:
        return CliRunner().invoke(main, ["--registry", place, "base", "keep", "tiny", *words], catch_exceptions=False)

    plain = workspace.patch(workspace.solve("cat", base="tiny").id)
    assert "keep" not in plain.manifest["solver"]
    assert "2 of 2 are new" in run("--prompts", str(file)).stderr
    rows = json.loads(run("--json").stdout)
    assert [row["prompt"] for row in rows] == ["a moon in the style of art", "the sun"]
    kept = workspace.patch(workspace.solve("cat", base="tiny").id)
    assert kept.manifest["solver"]["keep"] == ["a moon in the style of art", "the sun"]
    assert kept.delta != plain.delta
    assert "2 no longer preserved" in run("--remove-all").stderr
    assert workspace.solve("cat", base="tiny").id == plain.id


def test_a_file_that_is_no_text_is_refused(tmp_path: Path, base_folder: Path) -> None:
    place, file = tmp_path / "registry", tmp_path / "prompts.bin"
    Workspace.open(place).add_base("tiny", base_folder)
    file.write_bytes(b"\xff\xfe\x00")
    result = CliRunner().invoke(main, ["--registry", str(place), "base", "keep", "tiny", "--prompts", str(file)])
    assert result.exit_code == 2
    assert "prompts.bin is not UTF-8 text" in result.stderr


def test_a_base_is_prepared_once_and_solved_from_the_stored_vocabulary(tmp_path: Path, base_folder: Path) -> None:
    place = tmp_path / "registry"
    Workspace.open(place).add_base("tiny", base_folder)
    result = CliRunner().invoke(main, ["--registry", str(place), "base", "prepare", "tiny"], catch_exceptions=False)
    assert "tiny is ready" in result.stderr
    kept = list((place / "cache" / "vocabulary").iterdir())
    assert len(kept) == 1
    kept[0].write_bytes(kept[0].read_bytes()[:-1])
    again = CliRunner().invoke(main, ["--registry", str(place), "base", "prepare", "tiny"], catch_exceptions=False)
    assert f"warning: {kept[0]} is damaged; the vocabulary is encoded again" in again.stderr
    before = kept[0].stat().st_mtime_ns
    Workspace.open(place).solve("cat", base="tiny")
    stored = (place / "cache" / "vocabulary").glob("*.safetensors")
    assert [file.stat().st_mtime_ns for file in stored] == [before]
