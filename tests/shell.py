"""The command line on one registry, as a person uses it."""

from __future__ import annotations

from pathlib import Path

from click.testing import CliRunner, Result

from overpaint.cli import main


class Shell:
    """Runs commands on one registry."""

    def __init__(self, registry: Path) -> None:
        self.registry = registry

    def __call__(self, *words: str) -> Result:
        return CliRunner().invoke(main, ["--registry", str(self.registry), *words], catch_exceptions=False)

    def ok(self, *words: str) -> str:
        """What a command prints that must succeed."""
        found = self(*words)
        assert found.exit_code == 0, found.output
        return found.stdout

    def fails(self, *words: str) -> str:
        """What a command says that must be refused with a sentence."""
        found = self(*words)
        assert found.exit_code in (1, 2), found.output
        assert "Traceback" not in found.output
        return found.stderr
