"""Solvers by name: this package's and those that installed packages add through an entry-point group.

A package writes `[project.entry-points."overpaint.solvers"]` and `NAME = "module:Class"` into its `pyproject.toml`.
"""

from __future__ import annotations

import ast
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from importlib import import_module
from importlib.metadata import entry_points
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from overpaint.errors import OverpaintError

GROUP = "overpaint.solvers"


class BrokenSolver(OverpaintError):
    """A solver of another package that cannot be used."""


@dataclass(frozen=True)
class Listed:
    """A solver that can be asked for by name: where its class is (`module:Class`), and whose it is."""

    name: str
    target: str
    package: str = "overpaint"

    @cached_property
    def about(self) -> str:
        """The first line of the class's docstring, read from its source: nothing is imported but the folders above it.

        Raises BrokenSolver when there is no such class.
        """
        module, _, name = self.target.partition(":")
        try:
            spec = find_spec(module)
            source = Path(spec.origin).read_bytes() if spec is not None and spec.origin else b""
            classes = [node for node in ast.parse(source).body if isinstance(node, ast.ClassDef) and node.name == name]
            text = ast.get_docstring(classes[0]) if classes else None
        except Exception as error:  # whatever a stranger's package does on import
            raise self._broken(f"{type(error).__name__}: {error}") from error
        if not classes:
            raise self._broken(f"there is no class {name} in {module}")
        return (text or "").partition("\n")[0]

    def load(self) -> type[Any]:
        """The class. Raises BrokenSolver when its module cannot be imported or has no such solver."""
        module, _, name = self.target.partition(":")
        if self.package == "overpaint":
            found: type[Any] = getattr(import_module(module), name)
            return found
        try:
            found = getattr(import_module(module), name)
        except Exception as error:  # whatever a stranger's module does on import
            raise self._broken(f"{type(error).__name__}: {error}") from error
        from overpaint.solvers.problem import Solver

        if not (isinstance(found, type) and issubclass(found, Solver)):
            raise self._broken(f"{self.target} is no overpaint.solvers.problem.Solver")
        return found

    def _broken(self, why: str) -> BrokenSolver:
        return BrokenSolver(
            f"the solver {self.name!r} of the package {self.package} cannot be used ({why}); upgrade or uninstall it"
        )


def listed(own: Mapping[str, str]) -> tuple[dict[str, Listed], list[str]]:
    """Every solver by name, this package's `own` first, and a sentence for each that is refused because its name is taken.

    A name that two other packages claim is given to neither: which one was meant, only the user knows.
    """
    found = {name: Listed(name, target) for name, target in own.items()}
    refused, claimed = [], dict[str, list[Listed]]()
    for point in entry_points(group=GROUP):
        package = point.dist.name if point.dist is not None else point.module
        claimed.setdefault(point.name, []).append(Listed(point.name, point.value, package))
    for name, claims in sorted(claimed.items()):
        owners = ", ".join(sorted(claim.package for claim in claims))
        if name in found:
            refused.append(f"{owners}: the name {name!r} is overpaint's own solver; the package must choose another")
        elif len(claims) > 1:
            refused.append(f"{owners}: all of them call a solver {name!r}; uninstall all but one")
        else:
            found[name] = claims[0]
    return found, refused
