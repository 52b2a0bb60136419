"""The reference of commands, from the commands themselves: `python -m tools.docs.commands` prints it."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator

import click

from overpaint.cli import SECTIONS, main

EXAMPLE = re.compile(r"^Examples?:\s*(.*)", re.MULTILINE | re.DOTALL)


def commands_page() -> str:
    """Markdown: every command by section, with what it does, its arguments and options, and its examples."""
    parts = [
        "# Commands",
        "Written by `python -m tools.docs.commands` from the commands themselves. What all of them share (which registry, "
        "what is printed where, exit codes, completion) is on [the page about the command line](../command-line.md).",
    ]
    for section, commands in SECTIONS.items():
        parts.append(f"## {section}")
        for command in commands:
            for words, each in shown((command.name or "",), command):
                parts += described(words, each)
    return "\n\n".join(parts) + "\n"


def shown(words: tuple[str, ...], command: click.Command) -> Iterator[tuple[tuple[str, ...], click.Command]]:
    """A command and those below it, without the names of earlier versions."""
    if not command.hidden:
        yield words, command
        if isinstance(command, click.Group):
            for name, below in sorted(command.commands.items()):
                yield from shown((*words, name), below)


def every_command() -> list[tuple[tuple[str, ...], click.Command]]:
    """All commands that do something, with the words that call them."""
    found = [pair for name, command in sorted(main.commands.items()) for pair in shown((name,), command)]
    return [(words, command) for words, command in found if not isinstance(command, click.Group)]


def help_text(command: click.Command) -> tuple[str, list[str]]:
    """What a command says it does, and the lines of its example."""
    text = inspect.cleandoc(command.help or "").replace("\b\n", "")
    match = EXAMPLE.search(text)
    if match is None:
        return text, []
    lines = [line.strip() for line in match[1].replace("\\\n", " ").splitlines()]
    return text[: match.start()].strip(), [re.sub(r"\s+", " ", line) for line in lines if line]


def described(words: tuple[str, ...], command: click.Command) -> list[str]:
    """The paragraphs about one command."""
    about, examples = help_text(command)
    if isinstance(command, click.Group):
        return [f"### overpaint {' '.join(words)}", about]
    usage = " ".join(["overpaint", *words, *command.collect_usage_pieces(click.Context(command))])
    parts = [f"### overpaint {' '.join(words)}", f"`{usage}`", about]
    options = [each for each in command.params if isinstance(each, click.Option) and not each.hidden]
    if options:
        rows = ["| option | |", "|---|---|"]
        rows += [f"| {names(each, command)} | {sentence(each)} |" for each in options]
        parts.append("\n".join(rows))
    if examples:
        parts.append("```sh\n" + "\n".join(examples) + "\n```")
    return parts


def names(option: click.Option, command: click.Command) -> str:
    """How an option is written, with what it takes."""
    written = ", ".join(f"`{each}`" for each in (*option.opts, *option.secondary_opts))
    return (
        written if option.is_flag else f"{written} `{option.make_metavar(click.Context(command))}`".replace("|", "\\|")
    )


def sentence(option: click.Option) -> str:
    """What an option is for, and its default."""
    text = (option.help or "").replace("|", "\\|")
    if option.required:
        return f"{text} Required.".strip()
    default = option.default
    shown_default = option.show_default and default is not None and not option.is_flag and not callable(default)
    return f"{text} Default: `{default}`.".strip() if shown_default else text


if __name__ == "__main__":
    print(commands_page(), end="")
