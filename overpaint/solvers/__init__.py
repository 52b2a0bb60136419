"""One method per file: a problem in, a delta out. Installed packages add solvers of their own (see `listing`)."""

from __future__ import annotations

import ast
from collections.abc import Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cached_property
from importlib import import_module
from importlib.metadata import entry_points
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from overpaint.core.errors import NotFound, OverpaintError

# Solvers by name: this package's and those that installed packages add through an entry-point group.
#
# A package writes `[project.entry-points."overpaint.solvers"]` and `NAME = "module:Class"` into its `pyproject.toml`.


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


SOLVERS = {
    "separable": "overpaint.solvers.closed_form.separable:Separable",
    "uce": "overpaint.solvers.closed_form.uce:UCE",
    "rece": "overpaint.solvers.closed_form.rece:RECE",
    "nullspace": "overpaint.solvers.closed_form.nullspace:NullSpace",
    "mace": "overpaint.solvers.trained.mace:MACE",
    "sepme": "overpaint.solvers.trained.sepme:SepME",
    "few_shot": "overpaint.solvers.trained.few_shot:FewShot",
    "few_shot_lora": "overpaint.solvers.trained.few_shot_lora:FewShotLoRA",
    "surgical": "overpaint.solvers.trained.surgical:Surgical",
    "esd": "overpaint.solvers.trained.esd:ESD",
    "ablation": "overpaint.solvers.trained.ablation:Ablation",
    "sdd": "overpaint.solvers.trained.sdd:SDD",
    "spm": "overpaint.solvers.trained.spm:SPM",
}
"""Every solver of this package by name; listed without importing any of them."""


def solvers() -> tuple[dict[str, Listed], list[str]]:
    """Every solver that can be asked for by name, and a sentence for each one that is refused."""
    return listed(SOLVERS)


def solver_class(name: str) -> type[Any]:
    """The solver of a name. Raises NotFound with the known names, BrokenSolver when another package's does not load."""
    if name in SOLVERS:
        return Listed(name, SOLVERS[name]).load()
    found, refused = solvers()
    if name not in found:
        near = get_close_matches(name, found, 1)
        hint = f"did you mean {near[0]}? " if near else ""
        taken = [sentence for sentence in refused if repr(name) in sentence]
        raise NotFound("; ".join([f"no solver is called {name!r}; {hint}known are: {', '.join(found)}", *taken]))
    return found[name].load()
