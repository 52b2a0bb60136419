"""Every command and Python block of the pages runs, one after the other, as somebody would paste them.

A block that cannot run here says why behind its language: it needs a graphics card (`gpu`), what only the network has
(`network`), minutes (`slow`), or it is shown to be read (`shown`); `python -m tests.docs.pages` lists these. A block with
`file=NAME` becomes that file.
"""

from __future__ import annotations

import re
import shlex
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import click
import pytest
from click.testing import CliRunner

from overpaint.bases.base import EMOJI
from overpaint.cli import main
from overpaint.testing import tiny_pipeline
from overpaint.workspace.opened import OpenRegistry
from tests.docs.pages import REASONS, ROOT, Block, blocks, name_of, pages

FEW_STEPS = {"generate": ("--steps", "2", "--count", "1")}
"""What a command is given more where a page leaves it out: how a picture looks is not what is tested here."""


def sd15(folder: Path) -> None:
    tiny_pipeline().save_pretrained(folder / "path/to/stable-diffusion-v1-5")


def my_model(folder: Path) -> None:
    shutil.copytree(EMOJI, folder / "path/to/my-model")


def nothing(folder: Path) -> None:
    """What most pages need."""


@dataclass(frozen=True)
class Run:
    """How a page is run: what has to be there first, what is written otherwise here, and how many blocks that is."""

    blocks: int
    before: Callable[[Path], None] = nothing
    otherwise: Mapping[str, str] = field(default_factory=dict)


RUN = {
    "README.md": Run(2),
    "docs/install.md": Run(1),
    "docs/tutorials/monday-friday.md": Run(8),
    "docs/tutorials/safe-checkpoint.md": Run(6, sd15),
    "docs/tutorials/compare-erasers.md": Run(3, my_model),
    "docs/tutorials/team-registry.md": Run(7, otherwise={"s3://overpaint": "{bucket}"}),
}
ELSEWHERE = {
    "docs/adding-a-solver.md": "tests/solvers/test_adding_a_solver.py",
    "docs/adding-a-layout.md": "tests/bases/test_adding_a_layout.py",
    "docs/evaluation.md": "tests/evaluation/test_docs.py",
    "docs/solving-many.md": "tests/workspace/solving/test_docs.py",
    "docs/using-with.md": "tests/patches/formats/test_using_with.py",
    "docs/sharing.md": "tests/registry/sharing/test_documents.py",
    "docs/teams.md": "tests/registry/test_teams.py",
}
"""Pages whose blocks are held by the tests of what they are about."""


@pytest.fixture(scope="module")
def vocabularies(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where encoded vocabularies are kept: the embedded base's takes ten seconds, and is the same for every page."""
    return tmp_path_factory.mktemp("vocabularies")


@pytest.fixture
def folder(tmp_path: Path, vocabularies: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder to be in, with a registry of its own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OVERPAINT_REGISTRY", "registry")
    monkeypatch.setattr(OpenRegistry, "vocabularies", property(lambda self: vocabularies))
    return tmp_path


@pytest.mark.slow
@pytest.mark.parametrize("name", RUN)
def test_every_block_of_the_page_runs(name: str, folder: Path, request: pytest.FixtureRequest) -> None:
    run = RUN[name]
    run.before(folder)
    otherwise = {old: new.format(bucket=request.getfixturevalue("bucket")) for old, new in run.otherwise.items()}
    names = vars(ModuleType("page"))
    count = 0
    for block in blocks(ROOT / name):
        if block.about.startswith("file="):
            Path(block.about.removeprefix("file=")).write_text(block.text, "utf-8")
        elif block.about not in REASONS and block.language in ("sh", "python"):
            count += 1
            if block.language == "python":
                exec(compile(block.text, name, "exec"), names)
            for line in commands(block):
                for old, new in otherwise.items():
                    line = line.replace(old, new)
                run_line(line)
    assert count == run.blocks


def commands(block: Block) -> list[str]:
    """The lines of a block of commands, without comments; one that ends in a backslash goes on in the next."""
    lines = block.text.replace("\\\n", " ").splitlines() if block.language == "sh" else []
    return [line for line in lines if line.strip() and not line.strip().startswith("#")]


def run_line(line: str) -> None:
    """One command, in this process, which has PyTorch already."""
    program, *words = shlex.split(line, comments=True)
    assert program == "overpaint", f"{line!r} is no command of ours: mark its block"
    for command, more in FEW_STEPS.items():
        if command in words:
            words += [] if more[0] in words else more
    done = CliRunner().invoke(main, words, catch_exceptions=False)
    assert done.exit_code == 0, (line, done.output)


@pytest.mark.parametrize("page", pages(), ids=name_of)
def test_every_command_on_the_page_is_one_with_its_options(page: Path) -> None:
    """Also in blocks that do not run here, and in the middle of a sentence."""
    lines = [line for block in blocks(page) for line in commands(block) if line.startswith("overpaint ")]
    lines += re.findall(r"`(overpaint (?!signature 1)[a-z][^`]*)`", page.read_text("utf-8"))  # that one is signed bytes
    wrong = [(line, problem) for line in lines for problem in problems(line)]
    assert wrong == []


def problems(line: str) -> Iterator[str]:
    """What is wrong with a command: no such command, no such option."""
    words = shlex.split(line.replace("'", "").replace("[", "").replace("]", ""), comments=True)[1:]
    if words[:1] == ["--registry"]:
        words = words[2:]
    command: click.Command = main
    while isinstance(command, click.Group) and words and words[0].islower() and not words[0].startswith("-"):
        if words[0] not in command.commands:
            yield f"no command {words[0]}"
            return
        command = command.commands[words.pop(0)]
    known = {option for parameter in command.params for option in (*parameter.opts, *parameter.secondary_opts)}
    known |= {"--help", "-h", "--version"}
    yield from (f"no option {word}" for word in words if word.startswith("-") and word.split("=")[0] not in known)


def test_every_page_with_blocks_is_run_or_held_elsewhere() -> None:
    left = []
    for page in pages():
        runnable = [b for b in blocks(page) if b.language in ("sh", "python") and b.about not in REASONS]
        name = name_of(page)
        if runnable and name not in RUN and name not in ELSEWHERE:
            left.append(name)
    assert left == []
    for name, test in ELSEWHERE.items():
        assert Path(name).name in (ROOT / test).read_text("utf-8"), f"{test} does not read {name}"


def test_no_block_is_left_without_a_language_and_the_marks_are_known() -> None:
    for page in pages():
        for block in blocks(page):
            assert block.language, (name_of(page), block.text)
            mark = block.about.partition("=")[0]
            assert mark in {"", "file", "error", *REASONS}, (name_of(page), block.about)


@pytest.mark.slow
@pytest.mark.parametrize("script", sorted((ROOT / "examples").glob("*.py")), ids=lambda path: path.stem)
def test_the_example_runs(
    script: Path, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    module = ModuleType(script.stem)
    monkeypatch.setitem(sys.modules, script.stem, module)
    exec(compile(script.read_text("utf-8"), str(script), "exec"), vars(module))
    few: dict[str, dict[str, Any]] = {
        "monday_friday": {"steps": 2},
        "compare_erasers": {"steps": 10, "settings": {"erased": "2", "objects": "1", "styles": "1"}},
    }
    if hasattr(module, "SOLVERS"):
        monkeypatch.setattr(module, "SOLVERS", module.SOLVERS[:1])  # what the others leave is not what is tested here
    module.main(folder / "first", **few.get(script.stem, {}))
    assert "Traceback" not in capsys.readouterr().out
