"""The command line on one registry, as a person uses it."""

from __future__ import annotations

from pathlib import Path

from click.testing import CliRunner, Result

from overpaint.cli import main


class Shell:
    """Runs commands on one registry."""

    def __init__(self, registry: Path) -> None:
        self.registry = registry

    def __call__(self, *words: object) -> Result:
        command = ["--registry", str(self.registry), *(str(word) for word in words)]
        return CliRunner().invoke(main, command, catch_exceptions=False)

    def succeeds(self, *words: object) -> Result:
        """The result of a command that must succeed."""
        result = self(*words)
        assert result.exit_code == 0, result.output
        return result

    def ok(self, *words: object) -> str:
        """The standard output of a command that must succeed."""
        return self.succeeds(*words).stdout

    def fails(self, *words: object) -> str:
        """The standard error of a command that must be refused with a sentence."""
        result = self(*words)
        assert result.exit_code in (1, 2), result.output
        assert "Traceback" not in result.output
        return result.stderr
