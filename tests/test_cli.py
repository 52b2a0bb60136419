"""The command line as a user meets it: sentences, tables, JSON, one clear line and an exit code for every mistake."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from PIL import Image

from overpaint.cli import main


class Shell:
    """Runs commands on one registry."""

    def __init__(self, registry: Path) -> None:
        self.registry = registry

    def __call__(self, *words: str) -> Result:
        return CliRunner().invoke(main, ["--registry", str(self.registry), *words], catch_exceptions=False)

    def ok(self, *words: str) -> str:
        found = self(*words)
        assert found.exit_code == 0, found.output
        return found.stdout

    def fails(self, *words: str) -> str:
        found = self(*words)
        assert found.exit_code in (1, 2), found.output
        assert "Traceback" not in found.output
        return found.stderr


@pytest.fixture
def shell(tmp_path: Path) -> Shell:
    return Shell(tmp_path / "registry")


@pytest.fixture
def ready(shell: Shell, base_folder: Path) -> Shell:
    shell.ok("init")
    shell.ok("base", "add", "tiny", str(base_folder))
    return shell


def imports_torch(*words: str) -> bool:
    """Whether a command, run in a process of its own, ends with PyTorch loaded."""
    call = f"overpaint.cli.main({list(words)!r}, standalone_mode=False)"
    code = f"import sys, overpaint.cli; {call}; sys.exit('torch' in sys.modules)"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert not found.stderr, found.stderr
    return found.returncode == 1


def test_help_and_lists_import_no_torch(ready: Shell) -> None:
    registry = ("--registry", str(ready.registry))
    assert not imports_torch("--help")
    for what in ("base", "concept", "patch", "recipe"):
        assert not imports_torch(*registry, what, "list")


def test_the_road_from_base_to_checkpoint(ready: Shell, tmp_path: Path) -> None:
    ready.ok("concept", "add", "cat", "--synonym", "fox")
    solved = json.loads(ready.ok("solve", "cat", "dog", "--base", "tiny", "--json"))
    assert [row["concept"] for row in solved] == ["cat", "dog"]
    assert all(row["bytes"] < 16 << 10 for row in solved)
    added = ready.ok("patch", "add", "cat", solved[1]["patch"][:12], "--recipe", "safe", "--why", "takedown")
    assert added.count("weights") == 2
    shown = json.loads(ready.ok("recipe", "show", "safe", "--json"))
    assert [row["concept"] for row in shown] == ["cat", "dog"]
    ready.ok("build", "safe", str(tmp_path / "out"))
    picture = tmp_path / "p.png"
    ready.ok("generate", "a cat", "--recipe", "safe", "-o", str(picture), "--compare", "--count", "2", "--steps", "2")
    with Image.open(picture) as found:
        assert found.width > 64
    removed = ready.ok("patch", "remove", "cat", "dog", "--recipe", "safe", "--why", "licence")
    assert "bit for bit" in removed
    log = json.loads(ready.ok("recipe", "log", "safe", "--json"))
    assert [(row["did"], row["why"]) for row in log] == [("add", "takedown")] * 2 + [("remove", "licence")] * 2
    fingerprint = json.loads(ready.ok("base", "list", "--json"))[0]["fingerprint"]
    assert log[-1]["weights"] == fingerprint


def test_every_table_is_also_json(ready: Shell) -> None:
    ready.ok("solve", "cat", "--base", "tiny")
    ready.ok("patch", "add", "cat")
    for words in (
        ("base", "list"),
        ("base", "show", "tiny"),
        ("concept", "list"),
        ("concept", "show", "cat"),
        ("patch", "list"),
        ("patch", "show", "cat"),
        ("recipe", "list"),
        ("recipe", "show"),
        ("recipe", "log"),
    ):
        assert json.loads(ready.ok(*words, "--json"))
        assert ready.ok(*words)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("solve", "cat", "--base", "tiny", "--solver", "magic"), "no solver is called 'magic'"),
        (("solve", "cat", "--base", "tiny", "--set", "rnk=1"), "did you mean rank"),
        (("solve", "cat", "--base", "tiny", "--set", "rank"), "NAME=VALUE"),
        (("solve", "cat", "--base", "other"), "other"),
        (("solve", "cat", "--base", "tiny", "--device", "tpu9"), "device"),
        (("patch", "add", "cat"), "cat"),
        (("patch", "remove", "cat"), "default"),
        (("concept", "add", " "), "name"),
        (("concept", "add", "x", "--anchor", "x"), "anchor"),
        (("recipe", "show", "nothing"), "nothing"),
        (("build", "nothing", "out"), "nothing"),
        (("base", "add", "x", "/nowhere"), "not a folder"),
        (("generate", "a cat", "-o", "/nowhere/p.png", "--recipe", "nothing"), "no folder"),
    ],
    ids=" ".join,
)
def test_a_mistake_gets_one_sentence(ready: Shell, words: tuple[str, ...], message: str) -> None:
    said = ready.fails(*words)
    assert message in said
    assert len(said.strip().splitlines()) <= 4


def test_cuda_without_a_device_is_said_plainly(ready: Shell, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert "finds no CUDA device" in ready.fails("solve", "cat", "--base", "tiny", "--device", "cuda")
    assert json.loads(ready.ok("patch", "list", "--json")) == []


def test_a_concept_or_base_that_is_there_is_not_replaced(ready: Shell, base_folder: Path) -> None:
    ready.ok("concept", "add", "cat")
    assert "already" in ready.fails("concept", "add", "cat", "--kind", "style")
    assert "already" in ready.fails("base", "add", "tiny", str(base_folder))


def test_without_a_registry_the_way_to_one_is_named(shell: Shell) -> None:
    assert "overpaint init" in shell.fails("patch", "list")


def test_the_registry_may_come_from_the_environment(ready: Shell, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OVERPAINT_REGISTRY", str(ready.registry))
    found = CliRunner().invoke(main, ["base", "list", "--json"])
    assert json.loads(found.stdout)[0]["name"] == "tiny"


def test_every_command_says_what_it_does() -> None:
    def walk(command: object) -> None:
        for child in getattr(command, "commands", {}).values():
            assert child.help, child.name
            walk(child)

    walk(main)
