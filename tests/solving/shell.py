"""The command line, run in this process on one registry."""

from __future__ import annotations

from pathlib import Path

from click.testing import CliRunner, Result

from overpaint.cli import main


class Shell:
    """Runs commands on a registry."""

    def __init__(self, registry: Path) -> None:
        self.registry = registry

    def __call__(self, *words: str) -> Result:
        return CliRunner().invoke(main, ["--registry", str(self.registry), *words], catch_exceptions=False)

    def ok(self, *words: str) -> tuple[str, str]:
        """Standard output and standard error of a command that succeeds."""
        found = self(*words)
        assert found.exit_code == 0, found.output
        return found.stdout, found.stderr
