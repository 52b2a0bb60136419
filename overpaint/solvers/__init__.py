"""Solvers by name: a problem in, a delta out; a method is in one file with those that vary it.

Installed packages add their own through the entry-point group `overpaint.solvers`: `NAME = "module:Class"` in their
`pyproject.toml`. Listing solvers imports none of them, and no PyTorch.
"""

from __future__ import annotations

import ast
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import entry_points
from importlib.util import find_spec
from pathlib import Path
from pkgutil import resolve_name
from typing import Any

from overpaint.core.errors import NotFound, OverpaintError
from overpaint.core.names import nearest

GROUP = "overpaint.solvers"

SOLVERS = {
    "separable": "overpaint.solvers.closed_form.separable:Separable",
    "separable_mlp": "overpaint.solvers.closed_form.separable:SeparableMLP",
    "uce": "overpaint.solvers.closed_form.uce:UCE",
    "rece": "overpaint.solvers.closed_form.uce:RECE",
    "nullspace": "overpaint.solvers.closed_form.nullspace:NullSpace",
    "mace": "overpaint.solvers.trained.mace:MACE",
    "sepme": "overpaint.solvers.trained.sepme:SepME",
    "few_shot": "overpaint.solvers.trained.few_shot:FewShot",
    "few_shot_lora": "overpaint.solvers.trained.few_shot:FewShotLoRA",
    "surgical": "overpaint.solvers.trained.guidance:Surgical",
    "esd": "overpaint.solvers.trained.guidance:ESD",
    "ablation": "overpaint.solvers.trained.guidance:Ablation",
    "sdd": "overpaint.solvers.trained.guidance:SDD",
    "spm": "overpaint.solvers.trained.spm:SPM",
}
"""Every solver of this package: where its class is, by name."""


PREPARED = ("separable", "separable_mlp")
"""Solvers for which a base's vocabulary can be encoded ahead. Every other one that reads it reads what `separable` does."""
DECOUPLING_RULES = ("ridge", "exact")
"""How a change can be decoupled from other concepts (`closed_form/decoupling.py`)."""


class BrokenSolver(OverpaintError):
    """A solver of another package that cannot be used."""


@dataclass(frozen=True)
class ListedSolver:
    """A solver known by name: where its class is (`module:Class`), and which package it belongs to."""

    name: str
    target: str
    package: str = "overpaint"

    @property
    def about(self) -> str:
        """The first line of the class's docstring. Raises BrokenSolver when there is no such class."""
        return (ast.get_docstring(self._source) or "").partition("\n")[0]

    @property
    def is_closed_form(self) -> bool:
        """Whether the class declares `is_closed_form = True`. Raises BrokenSolver when there is no such class."""
        return any(
            isinstance(node, ast.Assign)
            and ast.unparse(node.targets[0]) == "is_closed_form"
            and ast.unparse(node.value) == "True"
            for node in self._source.body
        )

    def load(self) -> type[Any]:
        """The class. Raises BrokenSolver when its module cannot be imported or has no such solver."""
        if self.package == "overpaint":
            own: type[Any] = resolve_name(self.target)
            return own
        try:
            loaded = resolve_name(self.target)
        except Exception as error:  # whatever another package's module does on import
            raise self._broken(f"{type(error).__name__}: {error}") from error
        from overpaint.solvers.problem import Solver

        if not (isinstance(loaded, type) and issubclass(loaded, Solver)):
            raise self._broken(f"{self.target} is no overpaint.solvers.problem.Solver")
        return loaded

    @cached_property
    def _source(self) -> ast.ClassDef:
        """The class as it is written: nothing is imported but the folders above its module."""
        module, _, name = self.target.partition(":")
        try:
            spec = find_spec(module)
            source = Path(spec.origin).read_bytes() if spec is not None and spec.origin else b""
            classes = [node for node in ast.parse(source).body if isinstance(node, ast.ClassDef) and node.name == name]
        except Exception as error:  # whatever another package does on import
            raise self._broken(f"{type(error).__name__}: {error}") from error
        if not classes:
            raise self._broken(f"there is no class {name} in {module}")
        return classes[0]

    def _broken(self, why: str) -> BrokenSolver:
        return BrokenSolver(
            f"the solver {self.name!r} of the package {self.package} cannot be used ({why}); upgrade or uninstall it"
        )


def solvers() -> tuple[dict[str, ListedSolver], list[str]]:
    """Every solver by name, this package's first, and a sentence for each that is refused because its name is in use.

    A name that two other packages claim is given to neither: which one was meant, only the user knows.
    """
    listed = {name: ListedSolver(name, target) for name, target in SOLVERS.items()}
    claims = dict[str, list[ListedSolver]]()
    for point in entry_points(group=GROUP):
        package = point.dist.name if point.dist is not None else point.module
        claims.setdefault(point.name, []).append(ListedSolver(point.name, point.value, package))
    refused = []
    for name, claimed in sorted(claims.items()):
        owners = ", ".join(sorted(claim.package for claim in claimed))
        if name in SOLVERS:
            refused.append(f"{owners}: the name {name!r} is overpaint's own solver; the package must choose another")
        elif len(claimed) > 1:
            refused.append(f"{owners}: all of them call a solver {name!r}; uninstall all but one")
        else:
            listed[name] = claimed[0]
    return listed, refused


def solver_class(name: str) -> type[Any]:
    """The solver of a name. Raises NotFound with the known names, BrokenSolver when another package's does not load."""
    if name in SOLVERS:
        return ListedSolver(name, SOLVERS[name]).load()
    listed, refused = solvers()
    if name not in listed:
        why = [sentence for sentence in refused if repr(name) in sentence]
        raise NotFound(
            "; ".join([f"no solver is called {name!r}{nearest(name, listed)}; known: {', '.join(listed)}", *why])
        )
    return listed[name].load()


def is_closed_form(name: str) -> bool:
    """Whether the solver of a name answers with a formula; False for one that is not (or no longer) installed."""
    # Of other packages only where it is theirs: to find these, every installed package is read.
    listed = ListedSolver(name, SOLVERS[name]) if name in SOLVERS else solvers()[0].get(name)
    try:
        return listed is not None and listed.is_closed_form
    except BrokenSolver:
        return False
