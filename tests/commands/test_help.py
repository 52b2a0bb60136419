"""What `--help` prints: whole summaries, no names of the past; and that every name of version 0.1 goes on working."""

from __future__ import annotations

from collections.abc import Iterator

import click
import pytest
from click.testing import CliRunner

from overpaint.cli import SECTIONS, main

V01 = """
init --blobs
base add NAME SOURCE
base list --json
base show NAME --json
base keep NAME --prompts --remove --remove-all --json
base prepare NAME --vocabulary --device
concept add NAME --kind --synonym --anchor --prompt
concept list --limit --offset --json
concept show NAME --json
solve CONCEPTS --from --base --solver --set --seed --compress --update --again --dry-run --device --json
patch list --concept --base --solver --tag --limit --offset --json
patch show PATCH --json
patch add PATCHES --recipe --strength --until --why
patch remove PATCHES --recipe --why
patch import FILE --base --concept --allow-unmatched --meaning --keep-rounding --within --json
patch export PATCHES --strength -o --out --format --dtype --truncate --json
patch compress PATCHES --to --json
recipe list --deleted --json
recipe show NAME --json
recipe create NAME --base
recipe copy SOURCE NAME --why
recipe delete NAME --why
recipe undelete NAME --why
recipe checkout REVISION --why
recipe diff BEFORE AFTER --json
recipe log NAME --deleted --json
recipe due NAME --on --json
recipe export NAME -o --out --format --dtype --truncate --json
recipe reseparate NAME --why --device
tag add TAG --patch --recipe
tag remove TAG --patch --recipe
tag list TAG --json
search WORDS --kind --solver --tag --base --limit --offset --json
build NAME OUT --format
generate PROMPT --recipe -o --out --compare --seed --count --steps --guidance --device
inspect PATH --json
crosstalk --recipe --base --all -o --out --above --device --json
demo -o --out --quick
db upgrade
db backup FILE
db restore FILE
evaluate NAME --suite --list --set --judge --prompts --seed --steps --guidance --batch --device --json
report RECIPE -o --out --device
solvers NAME --json
export PATCHES --recipe -o --out --sign
import FILE PATCHES --recipe --trust --as --json
push DESTINATION PATCHES --recipe --sign
pull SOURCE PATCHES --recipe --trust --as --json
key new FILE
verify --json
gc --dry-run --grace --json
"""
"""Every command of version 0.1 with its arguments and options."""

RENAMED = {
    "keep": "preserve",
    "due": "expired",
    "--again": "--force",
    "--until": "--expires",
    "--within": "--tolerance",
}
"""Names of 0.1 that still work and that no help shows, with those of today."""


def commands(group: click.Group = main, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], click.Command]]:
    """Every command and group with the words that call it, the root left out."""
    for name, command in group.commands.items():
        yield (*path, name), command
        if isinstance(command, click.Group):
            yield from commands(command, (*path, name))


def help_of(*words: str) -> str:
    return CliRunner(env={"COLUMNS": "80"}).invoke(main, [*words, "--help"]).stdout


def test_every_command_says_what_it_does() -> None:
    for path, command in commands():
        assert command.help, path


def test_every_command_of_the_root_is_in_a_section_of_its_help() -> None:
    assert {command.name for section in SECTIONS.values() for command in section} == set(main.commands)


def test_no_summary_is_cut_off_at_80_columns() -> None:
    groups = [(), *(path for path, command in commands() if isinstance(command, click.Group))]
    for path in groups:
        listed = help_of(*path)
        assert max(map(len, listed.splitlines())) <= 80
        summaries = [line for line in listed.splitlines() if line.startswith("  ") and not line.startswith("  -")]
        assert not [line for line in summaries if line.rstrip().endswith("...")], path


def test_the_registrys_variable_is_in_the_help() -> None:
    assert "OVERPAINT_REGISTRY" in help_of()


@pytest.mark.parametrize("line", V01.strip().splitlines())
def test_what_version_0_1_understood_is_understood(line: str) -> None:
    command: click.Command = main
    words = line.split()
    while isinstance(command, click.Group):
        command = command.commands[words.pop(0)]
    arguments = [each for each in command.params if isinstance(each, click.Argument)]
    assert len(arguments) == sum(not word.startswith("-") for word in words)
    known = {name for parameter in command.params for name in parameter.opts}
    assert {word for word in words if word.startswith("-")} <= known


def test_old_names_are_in_no_help_and_new_ones_are() -> None:
    shown = [help_of(*path) for path, command in commands() if not command.hidden]
    words = {word.strip(",[]") for text in (help_of(), *shown) for word in text.split()}
    listed = {line.split()[0] for text in shown for line in text.splitlines() if line.startswith("  ") and line.split()}
    for old, new in RENAMED.items():
        assert old not in (words if old.startswith("-") else listed), old
        assert new in words
